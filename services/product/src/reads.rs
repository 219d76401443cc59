//! What the projection answers to readers: products and lists of them, stock now and at a past moment, history, what
//! became of an order, counts.
//!
//! Owns the queries and the types that HTTP shows as they are (and the cache keeps as MessagePack). Every answer is one
//! statement, so that its rows and the checkpoint they are true at come from one snapshot ([`At`]); the checkpoint is
//! named first in it, so that a rebuild which swaps the schemas meanwhile can make rows newer than they say, never older.
//!
//! Lists are planned anew each time, for the best plan depends on the values asked for and there are thousands of
//! combinations; everything else is prepared once a connection. Each of these queries is held to its index by
//! `tests/integration/reads.rs`.
//!
//! Assumes nothing of the projector but its rows. They lag behind the stream: whoever must see a write waits for its
//! sequence first ([`crate::projected`]) and then holds the answer to it ([`At::at_least`]). A stock "as of" an instant is
//! final only when the projection had reached, when it was read, what the stream held at that instant.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use hashbrown::HashMap;
use lomash_contract::limits::{LOW_STOCK_THRESHOLD, MAX_NAME_CHARS};
use lomash_contract::text;
use lomash_contract::{
    CountedBy, EventId, FailedItem, FailureReason, OrderId, ProductId, Sku, Timestamp, Trigger, UpdatedBy,
};
use lomash_platform::Secret;
use lomash_platform::postgres::Schema;
use lomash_platform::reader::{Query, Reader, Unreadable, cut};
pub use lomash_platform::reader::{READ_TIMEOUT, STATEMENT_TIMEOUT};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::projected::{NotYetProjected, Unreached};
use crate::projection::{PROJECTION, unfolded_words};

/// Most entries of one page.
pub const MAX_PAGE: u16 = 200;

/// Entries of a page when nobody says how many.
pub const DEFAULT_PAGE: u16 = 50;

/// Most words that a search looks for, from the first on; more make no search narrower that a person reads.
pub const MAX_WORDS: usize = 8;

/// Products that one statement asks for.
const PRODUCTS_A_STATEMENT: usize = 5_000;

const _: () = assert!(LOW_STOCK_THRESHOLD == 3, "as the index stock_low of sql/ and the statements here say");

/// The columns of a [`Product`], as [`product`] reads them after the checkpoint.
const PRODUCT_COLUMNS: &str = "p.product_id, p.sku, p.name, p.category, s.low_stock_threshold, p.active, s.quantity,
     s.is_available, s.sequence, p.registered_at, s.updated_at";

// ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// A value and the stream sequence at which it was so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct At<T> {
    /// The projection's checkpoint in the snapshot that `value` was read in.
    pub sequence: u64,
    /// What was read.
    pub value: T,
}

impl<T> At<T> {
    /// Itself, if it was read at `sequence` or later.
    ///
    /// # Errors
    /// [`NotYetProjected`] otherwise.
    pub fn at_least(self, sequence: u64) -> Result<Self, NotYetProjected> {
        if self.sequence >= sequence {
            Ok(self)
        } else {
            Err(NotYetProjected { wanted: sequence, reached: self.sequence })
        }
    }

    /// Another value, as of the same sequence.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> At<U> {
        At { sequence: self.sequence, value: f(self.value) }
    }
}

/// What was asked for and is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// No such product.
    #[error("there is no product {0}")]
    Product(ProductId),
    /// The product was registered later than the moment asked for.
    #[error(
        "product {product_id} was registered at {registered_at} with sequence {registered_sequence}, and not before"
    )]
    NotYetRegistered {
        /// The product.
        product_id: ProductId,
        /// Since when there is such a product.
        registered_at: Timestamp,
        /// The stream sequence of its registration.
        registered_sequence: u64,
    },
    /// No decision of this order: it was never placed, or is not decided yet.
    #[error("there is no decision of order {0}")]
    Decision(OrderId),
}

/// Why a read has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// It is not there, as of `sequence`. Of a projection that is being filled anew, that is no last word: compare it
    /// with what is known to be there.
    #[error("{what}, as of sequence {sequence}")]
    NotFound {
        /// What.
        what: NotFound,
        /// The projection's checkpoint when it was looked for.
        sequence: u64,
    },
    /// A sequence was asked for that is not projected yet.
    #[error(transparent)]
    NotYet(#[from] NotYetProjected),
    /// The projection did not come to where the reader wants it, or never will.
    #[error(transparent)]
    Unreached(#[from] Unreached),
    /// The page asked for continues a list that was sorted otherwise.
    #[error("the page asked for continues a list that was sorted otherwise")]
    OtherSort,
    /// Postgres is down, too slow, or has no projection just now.
    #[error(transparent)]
    Unavailable(#[from] Unreadable),
}

/// A piece of a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<T, K> {
    /// The entries.
    pub items: Vec<T>,
    /// Where the next piece begins; none when this is the last.
    pub next: Option<K>,
}

/// A product: its details and its stock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Product {
    /// The product.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Its stock-keeping unit, unique in the catalogue.
    #[schema(value_type = String, example = "KIT-0001")]
    pub sku: Sku,
    /// Its name.
    #[schema(example = "Oak worktop")]
    pub name: String,
    /// Its category, if it has one.
    #[schema(required)]
    pub category: Option<String>,
    /// Its own low-stock threshold; null is the default of 3.
    #[schema(required)]
    pub low_stock_threshold: Option<u32>,
    /// Whether it is for sale.
    pub active: bool,
    /// Units in stock.
    pub quantity: u32,
    /// Whether there is any stock.
    pub is_available: bool,
    /// Stream sequence of the last event that changed its details or its stock; its `ETag`.
    pub version: u64,
    /// When it joined the catalogue.
    #[schema(value_type = String, format = DateTime)]
    pub registered_at: Timestamp,
    /// When its details or its stock changed last.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}

/// The stock of a product at a past moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct PastStock {
    /// The product.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Its stock-keeping unit, as it is today.
    #[schema(value_type = String, example = "KIT-0001")]
    pub sku: Sku,
    /// Units in stock at that moment.
    pub quantity: u32,
    /// Whether there was any stock.
    pub is_available: bool,
    /// Stream sequence of the event that made it so: the last change of stock, or the registration when there was none.
    pub sequence: u64,
    /// When the server stored that event.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
}

/// One change of stock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Movement {
    /// Stream sequence of its event.
    pub sequence: u64,
    /// Its event.
    #[schema(value_type = Uuid)]
    pub event_id: EventId,
    /// Units before.
    pub previous_quantity: u32,
    /// Units after.
    pub new_quantity: u32,
    /// Why: `ORDER_CONFIRMED`, `ADMIN_UPDATE` or `SCHEDULED_SYNC`.
    #[schema(value_type = String, example = "ADMIN_UPDATE")]
    pub trigger: Trigger,
    /// For which order, when the trigger is one.
    #[schema(value_type = Option<Uuid>, required)]
    pub order_id: Option<OrderId>,
    /// By whom: the admin's id, or `system`.
    #[schema(value_type = String, example = "system")]
    pub updated_by: UpdatedBy,
    /// In the admin's words, if there are any.
    #[schema(required)]
    pub reason: Option<String>,
    /// The writer's clock; orders nothing.
    #[schema(value_type = String, format = DateTime)]
    pub occurred_at: Timestamp,
    /// The server's clock when it stored the event.
    #[schema(value_type = String, format = DateTime)]
    pub stored_at: Timestamp,
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum DecisionOutcome {
    /// It got all it asked for.
    Allocated,
    /// It got nothing.
    Refused,
}

/// What became of an order, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Decision {
    /// The order.
    #[schema(value_type = Uuid)]
    pub order_id: OrderId,
    /// What became of it.
    pub outcome: DecisionOutcome,
    /// Why it was refused: `INSUFFICIENT_STOCK`, `UNKNOWN_PRODUCT` or `PRODUCT_INACTIVE`; null when it was not.
    #[schema(value_type = Option<String>, required, example = "INSUFFICIENT_STOCK")]
    pub reason: Option<FailureReason>,
    /// The lines that failed for that reason; empty when it was allocated.
    pub failed: Vec<FailedLine>,
    /// The lines that were allocated; empty when it was refused.
    pub allocated: Vec<AllocatedLine>,
    /// Stream sequence of its first event.
    pub sequence: u64,
    /// When the server stored that event.
    #[schema(value_type = String, format = DateTime)]
    pub decided_at: Timestamp,
}

/// A line of a refused order that could not be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedLine {
    /// The product asked for.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Its stock-keeping unit; null when there is no such product.
    #[schema(value_type = Option<String>, required)]
    pub sku: Option<Sku>,
    /// Units that the order wants in all.
    pub requested: u32,
    /// Units that there were.
    pub available: u32,
}

/// A line of an allocated order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllocatedLine {
    /// The product.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Its stock-keeping unit, as it is today.
    #[schema(value_type = String)]
    pub sku: Sku,
    /// Units that the order took.
    pub quantity: u32,
    /// Stream sequence of the line's event.
    pub sequence: u64,
}

/// A count of the warehouse or of an admin.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Count {
    /// Stream sequence of its event.
    pub sequence: u64,
    /// Its event.
    #[schema(value_type = Uuid)]
    pub event_id: EventId,
    /// What was counted.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Units that there were.
    pub quantity: u32,
    /// The moment that the count describes.
    #[schema(value_type = String, format = DateTime)]
    pub counted_at: Timestamp,
    /// By whom: the admin's id, or `warehouse`.
    #[schema(value_type = String, example = "warehouse")]
    pub counted_by: CountedBy,
    /// The server's clock when it stored the event.
    #[schema(value_type = String, format = DateTime)]
    pub stored_at: Timestamp,
}

// ── Questions ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Which products a list holds: those to which all of this applies. None applies to all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductFilter {
    /// Of exactly this category.
    pub category: Option<String>,
    /// With any stock, or with none.
    pub available: Option<bool>,
    /// With a stock at or below the low-stock threshold (its own or the default), or above.
    pub below_threshold: Option<bool>,
    /// For sale, or not.
    pub active: Option<bool>,
    /// With exactly this stock-keeping unit.
    pub sku: Option<String>,
    /// With all of these words.
    pub words: Option<Words>,
}

impl ProductFilter {
    /// Whether it lets every product through.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Words of which each must be the beginning of a word of sku or name, whatever its case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Words(Vec<String>);

/// Why a text cannot be searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must have a word of letters or digits, and at most {MAX_NAME_CHARS} characters in all")]
pub struct InvalidWords;

impl FromStr for Words {
    type Err = InvalidWords;

    fn from_str(text: &str) -> Result<Self, InvalidWords> {
        if text.chars().count() > MAX_NAME_CHARS {
            return Err(InvalidWords);
        }
        let mut words: Vec<String> = Vec::new();
        for word in text::words(text) {
            if words.len() < MAX_WORDS && !words.contains(&word) {
                words.push(word);
            }
        }
        words.sort_unstable();
        if words.is_empty() { Err(InvalidWords) } else { Ok(Self(words)) }
    }
}

impl Words {
    /// As a `tsquery`. The words hold letters, digits and marks only, so nothing in them has a meaning of its own.
    ///
    /// A word that is not of ASCII is also looked for as rows have it that were written before words were folded: of names
    /// that were kept composed, or else of names that were kept decomposed.
    fn to_tsquery(&self, of_decomposed: bool) -> String {
        let begins = |word: &str| format!("'{word}':*");
        let one = |word: &String| {
            let mut ways = vec![begins(word)];
            let forms = if word.is_ascii() { Vec::new() } else { text::forms(word) };
            for form in forms.iter().take(if of_decomposed { forms.len() } else { 1 }) {
                let words = unfolded_words(form);
                let way = words.iter().map(|word| begins(word)).collect::<Vec<_>>().join(" & ");
                if !way.is_empty() && !ways.contains(&way) {
                    ways.push(way);
                }
            }
            match &ways[..] {
                [one] => one.clone(),
                several => format!("({})", several.join(" | ")),
            }
        };
        self.0.iter().map(one).collect::<Vec<_>>().join(" & ")
    }
}

/// By what a list is sorted; the product's id settles ties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SortBy {
    /// By stock-keeping unit, character by character.
    #[default]
    Sku,
    /// By name, character by character.
    Name,
    /// By units in stock.
    Quantity,
    /// By the last change, that is by version.
    Updated,
}

/// By what a list is sorted, and in which direction. As text `name`, or `-name` for the opposite direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductSort {
    /// By what.
    pub by: SortBy,
    /// From the largest to the smallest.
    pub descending: bool,
}

/// Why a text is not a [`ProductSort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a list is sorted by sku, name, quantity or updated, with a leading `-` from the largest to the smallest")]
pub struct InvalidSort;

impl FromStr for ProductSort {
    type Err = InvalidSort;

    fn from_str(text: &str) -> Result<Self, InvalidSort> {
        let (name, descending) = text.strip_prefix('-').map_or((text, false), |name| (name, true));
        let by = match name {
            "sku" => SortBy::Sku,
            "name" => SortBy::Name,
            "quantity" => SortBy::Quantity,
            "updated" => SortBy::Updated,
            _ => return Err(InvalidSort),
        };
        Ok(Self { by, descending })
    }
}

impl fmt::Display for ProductSort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.descending { "-" } else { "" })?;
        f.write_str(match self.by {
            SortBy::Sku => "sku",
            SortBy::Name => "name",
            SortBy::Quantity => "quantity",
            SortBy::Updated => "updated",
        })
    }
}

impl SortBy {
    /// The columns of its index.
    const fn columns(self) -> [&'static str; 2] {
        match self {
            Self::Sku => ["p.sku", "p.product_id"],
            Self::Name => ["p.name", "p.product_id"],
            Self::Quantity => ["s.quantity", "s.product_id"],
            Self::Updated => ["s.sequence", "s.product_id"],
        }
    }

    fn key(self, product: &Product) -> ProductKey {
        let value = match self {
            Self::Sku => SortValue::Text(product.sku.as_str().to_owned()),
            Self::Name => SortValue::Text(product.name.clone()),
            Self::Quantity => SortValue::Number(product.quantity.into()),
            Self::Updated => SortValue::Number(product.version),
        };
        ProductKey { value, product_id: product.product_id }
    }
}

/// What a list is sorted by, of one product.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SortValue {
    /// Its sku or name.
    Text(String),
    /// Its quantity or version.
    Number(u64),
}

/// A place in a list of products: right behind this one, whether it still is there or not.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductKey {
    /// What the list is sorted by.
    pub value: SortValue,
    /// What settles ties.
    pub product_id: ProductId,
}

/// Which products, in which order, and which piece of the list.
///
/// Pages follow each other without a product twice or left out, as long as what they are sorted by does not change
/// meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProductQuery {
    /// Which.
    pub filter: ProductFilter,
    /// In which order.
    pub sort: ProductSort,
    /// What was the last of the piece before; none for the first piece.
    pub after: Option<ProductKey>,
    /// How many: 1 to [`MAX_PAGE`], and otherwise the nearest of these.
    pub limit: u16,
}

/// A past moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AsOf {
    /// By the server's clock: what was stored until then, that moment included, to the microsecond.
    Instant(OffsetDateTime),
    /// Right after this stream sequence.
    Sequence(u64),
}

/// Which changes of a product's stock, in which direction, and which piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HistoryQuery {
    /// From the first to the last; otherwise from the last to the first.
    pub oldest_first: bool,
    /// Sequence of the last of the piece before; none for the first piece.
    pub after: Option<u64>,
    /// Only of this trigger.
    pub trigger: Option<Trigger>,
    /// How many: 1 to [`MAX_PAGE`], and otherwise the nearest of these.
    pub limit: u16,
}

/// The stock that one of many products had at its moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StockThen {
    /// So many units.
    Quantity(u32),
    /// It was registered later.
    NotYetRegistered,
    /// There is no such product.
    Unknown,
}

// ── Asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

/// Reads the projection. Clones share their connections.
#[derive(Clone)]
pub struct Reads {
    reader: Reader,
}

impl Reads {
    /// Readers with connections of their own, so that they and the projector do not take each other's. Does not need the
    /// server to be there.
    ///
    /// # Errors
    /// When `url` is not a Postgres URL.
    pub fn new(url: &Secret) -> anyhow::Result<Self> {
        Ok(Self { reader: Reader::new(url)? })
    }

    /// One product.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn product(&self, product_id: ProductId) -> Result<At<Product>, QueryError> {
        let text = format!(
            "SELECT c.sequence, {PRODUCT_COLUMNS}
             FROM {schema}.checkpoint c
             LEFT JOIN ({schema}.products p JOIN {schema}.stock s USING (product_id)) ON p.product_id = $1
             WHERE c.projection = '{PROJECTION}'",
            schema = Schema::Live
        );
        let (sequence, rows) = self.prepared("the product", &text, &[(&product_id.0, Type::UUID)]).await?;
        match rows.first() {
            Some(row) => Ok(At { sequence, value: product(row)? }),
            None => Err(QueryError::NotFound { what: NotFound::Product(product_id), sequence }),
        }
    }

    /// A piece of a list of products.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn products(&self, query: &ProductQuery) -> Result<At<Page<Product, ProductKey>>, QueryError> {
        let limit = usize::from(query.limit.clamp(1, MAX_PAGE));
        let list = List::of(query, limit + 1)?;
        let values: Vec<(&(dyn ToSql + Sync), Type)> =
            list.values.iter().map(|(value, kind)| (&**value as &(dyn ToSql + Sync), kind.clone())).collect();
        let asked = Query { what: "the list of products", text: &list.text, values: &values, prepared: false };
        let (sequence, rows) = self.reader.ask(asked).await?;
        let mut items = rows.iter().map(product).collect::<Result<Vec<_>, _>>()?;
        let next = cut(&mut items, limit).map(|last| query.sort.by.key(last));
        Ok(At { sequence, value: Page { items, next } })
    }

    /// The products with these stock-keeping units; who has none is left out.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn products_by_skus(&self, skus: &[Sku]) -> Result<At<HashMap<Sku, Product>>, QueryError> {
        let text = Self::products_where("p.sku = ANY($1)");
        let mut found = At { sequence: u64::MAX, value: HashMap::with_capacity(skus.len()) };
        // Once at least, for the sequence.
        for start in (0..skus.len().max(1)).step_by(PRODUCTS_A_STATEMENT) {
            let some: Vec<&str> = skus[start..].iter().take(PRODUCTS_A_STATEMENT).map(Sku::as_str).collect();
            let (sequence, rows) = self.prepared("products", &text, &[(&some, Type::TEXT_ARRAY)]).await?;
            found.sequence = found.sequence.min(sequence);
            for row in &rows {
                let product = product(row)?;
                found.value.insert(product.sku.clone(), product);
            }
        }
        Ok(found)
    }

    /// The products with these ids; what is not there is left out.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn products_by_ids(&self, ids: &[ProductId]) -> Result<At<HashMap<ProductId, Product>>, QueryError> {
        let text = Self::products_where("p.product_id = ANY($1)");
        let mut found = At { sequence: u64::MAX, value: HashMap::with_capacity(ids.len()) };
        for start in (0..ids.len().max(1)).step_by(PRODUCTS_A_STATEMENT) {
            let some: Vec<Uuid> = ids[start..].iter().take(PRODUCTS_A_STATEMENT).map(|id| id.0).collect();
            let (sequence, rows) = self.prepared("products", &text, &[(&some, Type::UUID_ARRAY)]).await?;
            found.sequence = found.sequence.min(sequence);
            for row in &rows {
                let product = product(row)?;
                found.value.insert(product.product_id, product);
            }
        }
        Ok(found)
    }

    fn products_where(condition: &str) -> String {
        format!(
            "SELECT c.sequence, {PRODUCT_COLUMNS}
             FROM {schema}.checkpoint c
             LEFT JOIN ({schema}.products p JOIN {schema}.stock s USING (product_id)) ON {condition}
             WHERE c.projection = '{PROJECTION}'",
            schema = Schema::Live
        )
    }

    /// The stock of a product at a past moment.
    ///
    /// # Errors
    /// [`QueryError`]; [`QueryError::NotYet`] for a sequence that is not projected yet.
    pub async fn stock_as_of(&self, product_id: ProductId, as_of: AsOf) -> Result<At<PastStock>, QueryError> {
        let text = stock_as_of_text(as_of);
        let wanted = match as_of {
            AsOf::Instant(_) => 0,
            AsOf::Sequence(sequence) => sequence,
        };
        let bound = bigint(wanted);
        let id = (&product_id.0 as &(dyn ToSql + Sync), Type::UUID);
        let (sequence, rows) = match as_of {
            AsOf::Instant(at) => self.prepared("past stock", &text, &[id, (&at, Type::TIMESTAMPTZ)]).await?,
            AsOf::Sequence(_) => self.prepared("past stock", &text, &[id, (&bound, Type::INT8)]).await?,
        };
        if sequence < wanted {
            return Err(NotYetProjected { wanted, reached: sequence }.into());
        }
        let Some(row) = rows.first() else {
            return Err(QueryError::NotFound { what: NotFound::Product(product_id), sequence });
        };
        let (registered_sequence, registered_at) = (unsigned(row, 3), row.get::<_, OffsetDateTime>(4));
        let existed = match as_of {
            AsOf::Instant(at) => registered_at <= at,
            AsOf::Sequence(wanted) => registered_sequence <= wanted,
        };
        if !existed {
            let registered_at = registered_at.into();
            let what = NotFound::NotYetRegistered { product_id, registered_at, registered_sequence };
            return Err(QueryError::NotFound { what, sequence });
        }
        let moved: Option<i32> = row.get(5);
        let quantity = moved.unwrap_or(0).unsigned_abs();
        let value = PastStock {
            product_id,
            sku: sku(row.get(2))?,
            quantity,
            is_available: quantity > 0,
            sequence: if moved.is_some() { unsigned(row, 6) } else { registered_sequence },
            since: if moved.is_some() { instant(row, 7) } else { registered_at.into() },
        };
        Ok(At { sequence, value })
    }

    /// The stock that each of many products had at an instant of its own, in the order asked.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn stock_as_of_each(
        &self,
        moments: &[(ProductId, OffsetDateTime)],
    ) -> Result<At<Vec<StockThen>>, QueryError> {
        let mut then = At { sequence: u64::MAX, value: Vec::with_capacity(moments.len()) };
        let text = stock_as_of_each_text();
        for start in (0..moments.len().max(1)).step_by(PRODUCTS_A_STATEMENT) {
            let some = moments[start..].iter().take(PRODUCTS_A_STATEMENT);
            let (ids, instants): (Vec<Uuid>, Vec<OffsetDateTime>) = some.map(|(id, at)| (id.0, *at)).unzip();
            let values: [(&(dyn ToSql + Sync), Type); 2] =
                [(&ids, Type::UUID_ARRAY), (&instants, Type::TIMESTAMPTZ_ARRAY)];
            let (sequence, rows) = self.prepared("past stocks", &text, &values).await?;
            then.sequence = then.sequence.min(sequence);
            then.value.extend(rows.iter().map(|row| match row.get::<_, Option<bool>>(2) {
                None => StockThen::Unknown,
                Some(false) => StockThen::NotYetRegistered,
                Some(true) => StockThen::Quantity(row.get::<_, Option<i32>>(3).unwrap_or(0).unsigned_abs()),
            }));
        }
        Ok(then)
    }

    /// A piece of the history of a product's stock.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn history(
        &self,
        product_id: ProductId,
        query: &HistoryQuery,
    ) -> Result<At<Page<Movement, u64>>, QueryError> {
        let limit = usize::from(query.limit.clamp(1, MAX_PAGE));
        let text = history_text(query);
        let rows = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let after = query.after.map_or(0, bigint);
        let mut values: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&product_id.0, Type::UUID), (&rows, Type::INT8)];
        if query.after.is_some() {
            values.push((&after, Type::INT8));
        }
        let (sequence, rows) = self.prepared("the history", &text, &values).await?;
        if rows.is_empty() {
            return Err(QueryError::NotFound { what: NotFound::Product(product_id), sequence });
        }
        // A product without movements is one row without one.
        let moved = rows.iter().filter(|row| row.get::<_, Option<i64>>(2).is_some());
        let mut items = moved.map(movement).collect::<Result<Vec<_>, _>>()?;
        let next = cut(&mut items, limit).map(|last| last.sequence);
        Ok(At { sequence, value: Page { items, next } })
    }

    /// What became of an order.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn decision(&self, order_id: OrderId) -> Result<At<Decision>, QueryError> {
        let text = decision_text();
        let (sequence, rows) = self.prepared("the decision", &text, &[(&order_id.0, Type::UUID)]).await?;
        let Some(first) = rows.first() else {
            return Err(QueryError::NotFound { what: NotFound::Decision(order_id), sequence });
        };
        let failing: Option<serde_json::Value> = first.get(4);
        let failing: Vec<FailedItem> = match failing {
            None => Vec::new(),
            Some(items) => serde_json::from_value(items).map_err(|_| damaged("items of a refused order"))?,
        };
        let failed = failing.into_iter().map(|FailedItem { product_id, sku, requested, available }| FailedLine {
            product_id,
            sku,
            requested,
            available,
        });
        let lines = rows.iter().filter(|row| row.get::<_, Option<i64>>(7).is_some());
        let allocated = lines.map(|row| {
            let (previous, new): (i32, i32) = (row.get(9), row.get(10));
            Ok(AllocatedLine {
                product_id: ProductId(row.get(8)),
                sku: sku(row.get(11))?,
                quantity: u32::try_from(previous - new).unwrap_or(0),
                sequence: unsigned(row, 7),
            })
        });
        let reason: Option<String> = first.get(3);
        let value = Decision {
            order_id,
            outcome: if first.get::<_, &str>(2) == "allocated" {
                DecisionOutcome::Allocated
            } else {
                DecisionOutcome::Refused
            },
            reason: reason.map(|reason| named(&reason, "reason of a refused order")).transpose()?,
            failed: failed.collect(),
            allocated: allocated.collect::<Result<_, QueryError>>()?,
            sequence: unsigned(first, 5),
            decided_at: instant(first, 6),
        };
        Ok(At { sequence, value })
    }

    /// Counts that were stored after `sequence`, from the first to the last.
    ///
    /// # Errors
    /// [`QueryError::Unavailable`].
    pub async fn counts_after(&self, sequence: u64, limit: u16) -> Result<At<Page<Count, u64>>, QueryError> {
        let limit = usize::from(limit.clamp(1, MAX_PAGE));
        let text = format!(
            "SELECT c.sequence, n.sequence, n.event_id, n.product_id, n.quantity, n.counted_at, n.counted_by, n.stored_at
             FROM {schema}.checkpoint c
             LEFT JOIN LATERAL (SELECT * FROM {schema}.counts WHERE sequence > $1 ORDER BY sequence LIMIT $2) n ON true
             WHERE c.projection = '{PROJECTION}'
             ORDER BY n.sequence",
            schema = Schema::Live
        );
        let rows = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let values: [(&(dyn ToSql + Sync), Type); 2] = [(&bigint(sequence), Type::INT8), (&rows, Type::INT8)];
        let (sequence, rows) = self.prepared("counts", &text, &values).await?;
        let mut items: Vec<Count> = rows.iter().map(count).collect();
        let next = cut(&mut items, limit).map(|last| last.sequence);
        Ok(At { sequence, value: Page { items, next } })
    }

    async fn prepared(
        &self,
        what: &'static str,
        text: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<(u64, Vec<Row>), QueryError> {
        Ok(self.reader.ask(Query { what, text, values, prepared: true }).await?)
    }
}

// ── Statements ──────────────────────────────────────────────────────────────────────────────────────────────────

/// The statement of a list, with only those conditions that are asked for.
struct List {
    text: String,
    values: Vec<(Box<dyn ToSql + Sync + Send>, Type)>,
}

impl List {
    fn of(query: &ProductQuery, rows: usize) -> Result<Self, QueryError> {
        let ProductFilter { category, available, below_threshold, active, sku, words } = &query.filter;
        let mut list = Self { text: String::new(), values: Vec::new() };
        let mut conditions: Vec<String> = Vec::new();
        for (column, text) in [("p.category", category), ("p.sku", sku)] {
            let Some(text) = text else { continue };
            // In each form in which it may have been kept before there was one.
            let mut forms = text::forms(text);
            conditions.push(match (forms.pop(), forms.is_empty()) {
                (Some(one), true) => format!("{column} = {}", list.value(one, Type::TEXT)),
                (last, _) => {
                    forms.extend(last);
                    format!("{column} = ANY({})", list.value(forms, Type::TEXT_ARRAY))
                }
            });
        }
        if let Some(words) = words {
            let (composed, decomposed) = (words.to_tsquery(false), words.to_tsquery(true));
            let is_one = composed == decomposed;
            let found = |looked_for: String| format!("array_to_tsvector(p.words) @@ {looked_for}::text::tsquery");
            let condition = found(list.value(composed, Type::TEXT));
            conditions.push(if is_one {
                condition
            } else {
                let decomposed = found(list.value(decomposed, Type::TEXT));
                format!("({condition} OR ({decomposed} AND (p.sku || ' ' || p.name) IS NOT NFC NORMALIZED))")
            });
        }
        // By quantity and not by is_available: it has an index and statistics.
        let flags = [
            (*available, "s.quantity > 0", "s.quantity = 0"),
            (
                *below_threshold,
                "s.quantity <= COALESCE(s.low_stock_threshold, 3)",
                "s.quantity > COALESCE(s.low_stock_threshold, 3)",
            ),
            (*active, "p.active", "NOT p.active"),
        ];
        for (flag, yes, no) in flags {
            conditions.extend(flag.map(|flag| (if flag { yes } else { no }).to_owned()));
        }
        let [by, tie] = query.sort.by.columns();
        let (beyond, direction) = if query.sort.descending { ("<", "DESC") } else { (">", "ASC") };
        if let Some(ProductKey { value, product_id }) = &query.after {
            let value = match (query.sort.by, value) {
                (SortBy::Sku | SortBy::Name, SortValue::Text(text)) => list.value(text.clone(), Type::TEXT),
                (SortBy::Quantity, SortValue::Number(number)) => {
                    list.value(i32::try_from(*number).unwrap_or(i32::MAX), Type::INT4)
                }
                (SortBy::Updated, SortValue::Number(number)) => list.value(bigint(*number), Type::INT8),
                _ => return Err(QueryError::OtherSort),
            };
            let product = list.value(product_id.0, Type::UUID);
            conditions.push(format!("({by}, {tie}) {beyond} ({value}, {product})"));
        }
        let filtered =
            if conditions.is_empty() { String::new() } else { format!("WHERE {}", conditions.join(" AND ")) };
        // The outer order is that of the inner one again: a join promises none, even with a single row.
        let sorted = format!("ORDER BY {by} {direction}, {tie} {direction}");
        let outer = sorted.replace("p.", "l.").replace("s.", "l.");
        let columns = PRODUCT_COLUMNS.replace("p.", "l.").replace("s.", "l.");
        let written = write!(
            list.text,
            "SELECT c.sequence, {columns}
             FROM {schema}.checkpoint c
             LEFT JOIN LATERAL (
                 SELECT {PRODUCT_COLUMNS} FROM {schema}.products p JOIN {schema}.stock s ON s.product_id = p.product_id
                 {filtered} {sorted} LIMIT {rows}
             ) l ON true
             WHERE c.projection = '{PROJECTION}'
             {outer}",
            schema = Schema::Live
        );
        debug_assert!(written.is_ok(), "text takes whatever is written to it");
        Ok(list)
    }

    /// Takes a value in; returns what stands for it in the text.
    fn value(&mut self, value: impl ToSql + Sync + Send + 'static, kind: Type) -> String {
        self.values.push((Box::new(value), kind));
        format!("${}", self.values.len())
    }
}

/// `$1` the product, `$2` the moment.
fn stock_as_of_text(as_of: AsOf) -> String {
    let until = match as_of {
        AsOf::Instant(_) => "m.stored_at <= $2".to_owned(),
        // The index is by store time: what was stored until the sequence was stored until its store time.
        AsOf::Sequence(_) => format!("(m.stored_at, m.sequence) <= ({}, $2)", stored_at_of("$2")),
    };
    format!(
        "SELECT c.sequence, p.product_id, p.sku, p.registered_sequence, p.registered_at, m.new_quantity, m.sequence,
                m.stored_at
         FROM {schema}.checkpoint c
         LEFT JOIN {schema}.products p ON p.product_id = $1
         LEFT JOIN LATERAL (
             SELECT m.new_quantity, m.sequence, m.stored_at FROM {schema}.movements m
             WHERE m.product_id = p.product_id AND {until}
             ORDER BY m.stored_at DESC, m.sequence DESC LIMIT 1
         ) m ON true
         WHERE c.projection = '{PROJECTION}'",
        schema = Schema::Live
    )
}

/// When the last movement up to a sequence was stored, of whatever product.
fn stored_at_of(sequence: &str) -> String {
    format!(
        "COALESCE((SELECT stored_at FROM {}.movements WHERE sequence <= {sequence} ORDER BY sequence DESC LIMIT 1),
                  '-infinity')",
        Schema::Live
    )
}

/// `$1` the products, `$2` their instants.
fn stock_as_of_each_text() -> String {
    format!(
        "SELECT c.sequence, asked.place, p.registered_at <= asked.at, m.new_quantity
         FROM {schema}.checkpoint c
         LEFT JOIN UNNEST($1::uuid[], $2::timestamptz[]) WITH ORDINALITY AS asked (product_id, at, place) ON true
         LEFT JOIN {schema}.products p ON p.product_id = asked.product_id
         LEFT JOIN LATERAL (
             SELECT m.new_quantity FROM {schema}.movements m
             WHERE m.product_id = p.product_id AND m.stored_at <= asked.at
             ORDER BY m.stored_at DESC, m.sequence DESC LIMIT 1
         ) m ON true
         WHERE c.projection = '{PROJECTION}'
         ORDER BY asked.place",
        schema = Schema::Live
    )
}

/// `$1` the product, `$2` how many, `$3` after which sequence.
fn history_text(query: &HistoryQuery) -> String {
    let (beyond, direction) = if query.oldest_first { (">", "ASC") } else { ("<", "DESC") };
    let mut conditions = String::new();
    if let Some(trigger) = query.trigger {
        // In the statement and not beside it: only so is it known to be in the index of what is no order.
        conditions = format!(" AND m.trigger = '{trigger}'");
    }
    if query.after.is_some() {
        conditions.push_str(&format!(" AND (m.stored_at, m.sequence) {beyond} ({}, $3)", stored_at_of("$3")));
    }
    format!(
        "SELECT c.sequence, p.product_id, m.sequence, m.event_id, m.previous_quantity, m.new_quantity, m.trigger,
                m.order_id, m.updated_by, m.reason, m.occurred_at, m.stored_at
         FROM {schema}.checkpoint c
         LEFT JOIN {schema}.products p ON p.product_id = $1
         LEFT JOIN LATERAL (
             SELECT * FROM {schema}.movements m WHERE m.product_id = p.product_id{conditions}
             ORDER BY m.stored_at {direction}, m.sequence {direction} LIMIT $2
         ) m ON true
         WHERE c.projection = '{PROJECTION}'
         ORDER BY m.stored_at {direction}, m.sequence {direction}",
        schema = Schema::Live
    )
}

/// `$1` the order. One row a line. An order's events stand together in the stream, so among the movements its own follow
/// each other from its decision's sequence on, and the first of another one ends them.
fn decision_text() -> String {
    format!(
        "WITH RECURSIVE decision AS (
             SELECT * FROM {schema}.order_decisions WHERE order_id = $1
         ), moved AS (
             SELECT m.* FROM decision d, LATERAL (
                 SELECT * FROM {schema}.movements WHERE sequence >= d.sequence ORDER BY sequence LIMIT 1
             ) m WHERE d.outcome = 'allocated' AND m.order_id = $1
             UNION ALL
             SELECT m.* FROM moved before, LATERAL (
                 SELECT * FROM {schema}.movements WHERE sequence > before.sequence ORDER BY sequence LIMIT 1
             ) m WHERE m.order_id = $1
         )
         SELECT c.sequence, d.order_id, d.outcome, d.reason, d.items, d.sequence, d.decided_at, m.sequence, m.product_id,
                m.previous_quantity, m.new_quantity, p.sku
         FROM {schema}.checkpoint c
         LEFT JOIN decision d ON true
         LEFT JOIN (moved m JOIN {schema}.products p ON p.product_id = m.product_id) ON true
         WHERE c.projection = '{PROJECTION}'
         ORDER BY m.sequence",
        schema = Schema::Live
    )
}

// ── Rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row, column: usize) -> u64 {
    row.get::<_, i64>(column).unsigned_abs()
}

fn instant(row: &Row, column: usize) -> Timestamp {
    row.get::<_, OffsetDateTime>(column).into()
}

/// What no projector writes.
fn damaged(what: &'static str) -> QueryError {
    let cause = "the row is damaged; `lomash verify` names it and `lomash rebuild` mends it".to_owned();
    Unreadable { what, cause }.into()
}

fn sku(text: &str) -> Result<Sku, QueryError> {
    text.parse().map_err(|_| damaged("sku of a product"))
}

/// A value of the contract by its name on the wire.
fn named<T: serde::de::DeserializeOwned>(name: &str, what: &'static str) -> Result<T, QueryError> {
    serde_json::from_value(serde_json::Value::from(name)).map_err(|_| damaged(what))
}

fn product(row: &Row) -> Result<Product, QueryError> {
    Ok(Product {
        product_id: ProductId(row.get(1)),
        sku: sku(row.get(2))?,
        name: row.get(3),
        category: row.get(4),
        low_stock_threshold: row.get::<_, Option<i32>>(5).map(i32::unsigned_abs),
        active: row.get(6),
        quantity: row.get::<_, i32>(7).unsigned_abs(),
        is_available: row.get(8),
        version: unsigned(row, 9),
        registered_at: instant(row, 10),
        updated_at: instant(row, 11),
    })
}

fn movement(row: &Row) -> Result<Movement, QueryError> {
    Ok(Movement {
        sequence: unsigned(row, 2),
        event_id: EventId(row.get(3)),
        previous_quantity: row.get::<_, i32>(4).unsigned_abs(),
        new_quantity: row.get::<_, i32>(5).unsigned_abs(),
        trigger: named(row.get(6), "trigger of a movement")?,
        order_id: row.get::<_, Option<Uuid>>(7).map(OrderId),
        updated_by: row.get::<_, Option<Uuid>>(8).map_or(UpdatedBy::System, UpdatedBy::User),
        reason: row.get(9),
        occurred_at: instant(row, 10),
        stored_at: instant(row, 11),
    })
}

fn count(row: &Row) -> Count {
    Count {
        sequence: unsigned(row, 1),
        event_id: EventId(row.get(2)),
        product_id: ProductId(row.get(3)),
        quantity: u32::try_from(row.get::<_, i64>(4)).unwrap_or(u32::MAX),
        counted_at: instant(row, 5),
        counted_by: row.get::<_, Option<Uuid>>(6).map_or(CountedBy::Warehouse, CountedBy::User),
        stored_at: instant(row, 7),
    }
}
