//! What the stock metrics answer to readers: stock levels, what is low, the days of a product, a summary.
//!
//! Owns the queries and the types that HTTP shows as they are. Every answer is one statement, with the checkpoint from the
//! same snapshot. Each of them is held to its index by `tests/integration/analytics.rs`.
//!
//! Today is a day of the reader's clock, which arrives as an argument. Intervals without stock that are open are counted
//! here, up to the end of the day asked for or to now.

use std::fmt::Write as _;
use std::str::FromStr;

use lomash_contract::limits::LOW_STOCK_THRESHOLD;
use lomash_contract::text;
use lomash_contract::{ProductId, Timestamp};
use lomash_platform::Secret;
use lomash_platform::postgres::ANALYTICS;
use lomash_platform::projected::NotYetProjected;
use lomash_platform::reader::{Query, Reader, Unreadable, cut};
use serde::{Deserialize, Serialize, Serializer};
use time::{Date, OffsetDateTime};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use utoipa::ToSchema;

use crate::rows::{self, DAY_COLUMNS, POSITION_COLUMNS, PRODUCT_DAY_COLUMNS};
use crate::stock_metrics::{self, ProductDay, Velocity, day_of};

/// Most entries of one page.
pub const MAX_PAGE: u16 = 200;

/// Entries of a page when nobody says how many.
pub const DEFAULT_PAGE: u16 = 50;

/// Longest window of a velocity.
pub const MAX_WINDOW_DAYS: u16 = 365;

/// Most products that the list of what is low is made of: those with the fewest units. Each costs the sum of its window, and
/// who has more than that low has no use for a list.
pub const MAX_LOW: u16 = 2_000;

const _: () = assert!(LOW_STOCK_THRESHOLD == 3, "as the index stock_low of sql/ and the statements here say");

// ── Answers ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// A value and the stream sequence as of which it is so.
#[derive(Clone, Debug, PartialEq)]
pub struct At<T> {
    /// The checkpoint in the snapshot that `value` was read in.
    pub sequence: u64,
    /// What was read.
    pub value: T,
}

/// Why a read has no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// There is no such product, as of `sequence`.
    #[error("there is no product {product_id}, as of sequence {sequence}")]
    NoProduct {
        /// Which.
        product_id: ProductId,
        /// The checkpoint when it was looked for.
        sequence: u64,
    },
    /// A sequence was asked for that is not reflected yet.
    #[error(transparent)]
    NotYet(#[from] NotYetProjected),
    /// Postgres is down, too slow, or has no metrics just now.
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
}

/// A piece of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T, K> {
    /// The entries.
    pub items: Vec<T>,
    /// Where the next piece begins; none when this is the last.
    pub next: Option<K>,
}

/// A product's stock, and how long it will last.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct StockLevel {
    /// The product.
    #[schema(value_type = Uuid)]
    pub product_id: ProductId,
    /// Its stock-keeping unit.
    #[schema(example = "KIT-0001")]
    pub sku: String,
    /// Its name.
    pub name: String,
    /// Its category, if it has one.
    #[schema(required)]
    pub category: Option<String>,
    /// Whether it is for sale.
    pub active: bool,
    /// Units in stock.
    pub quantity: u32,
    /// Whether there are any.
    pub is_available: bool,
    /// The stock at or below which it is low: its own threshold or the default of 3.
    pub low_stock_threshold: u32,
    /// Whether it is.
    pub is_low: bool,
    /// Since when there is no stock; null while there is.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    pub out_of_stock_since: Option<Timestamp>,
    /// Units sold within the window, today included.
    pub units_sold_in_window: i64,
    /// Days of the window over which the velocity is measured, those without a sale and today among them: `windowDays`, or
    /// the days since the product joined, if those are fewer.
    pub velocity_days: u16,
    /// Velocity: units sold a day.
    pub units_per_day: f64,
    /// Days that the stock lasts at that velocity; null when nothing sells.
    #[schema(required)]
    pub days_of_cover: Option<f64>,
    /// Stream sequence of the last event that changed its details or its stock.
    pub version: u64,
    /// When the server stored that event.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}

/// Changes of stock that are no orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Changes {
    /// How many.
    pub count: i64,
    /// Units that came.
    pub units_up: i64,
    /// Units that went.
    pub units_down: i64,
}

impl From<stock_metrics::Changes> for Changes {
    fn from(stock_metrics::Changes { count, up, down }: stock_metrics::Changes) -> Self {
        Self { count, units_up: up, units_down: down }
    }
}

/// Something for each reason of a refusal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct ByReason {
    /// There was less than was asked for.
    pub insufficient_stock: i64,
    /// The product was not for sale.
    pub product_inactive: i64,
    /// There is no such product; of one product always 0.
    pub unknown_product: i64,
}

impl From<stock_metrics::ByReason> for ByReason {
    fn from(reasons: stock_metrics::ByReason) -> Self {
        let stock_metrics::ByReason { insufficient_stock, product_inactive, unknown_product } = reasons;
        Self { insufficient_stock, product_inactive, unknown_product }
    }
}

/// What happened to a product on a UTC day of the server's store time.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DayOfProduct {
    /// The day.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String, format = Date)]
    pub day: Date,
    /// Units that allocated orders took.
    pub units_sold: i64,
    /// Orders that took some.
    pub orders_allocated: i64,
    /// What admins changed; the first stock of a registration is such a change.
    pub adjustments: Changes,
    /// What reconciliation corrected.
    pub corrections: Changes,
    /// Orders that were refused because of it.
    pub orders_refused: i64,
    /// Units that they wanted of it, by reason.
    pub units_refused: ByReason,
    /// How often its stock went to 0.
    pub stock_outs: i64,
    /// Seconds without stock on this day, up to now.
    pub out_of_stock_seconds: f64,
    /// Units at the end of the day, or now.
    pub closing_quantity: u32,
}

/// What happened to all products on a UTC day of the server's store time, or on several.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Happened {
    /// Events of the ledger.
    pub events: i64,
    /// Products that joined.
    pub products_registered: i64,
    /// Units that allocated orders took.
    pub units_sold: i64,
    /// Orders that were allocated.
    pub orders_allocated: i64,
    /// Orders that were refused, by reason.
    pub orders_refused: ByReason,
    /// Units that they wanted of the products because of which they were refused, by reason.
    pub units_refused: ByReason,
    /// What admins changed.
    pub adjustments: Changes,
    /// What reconciliation corrected.
    pub corrections: Changes,
    /// How often a stock went to 0.
    pub stock_outs: i64,
}

/// A day of all products.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct DayOfAll {
    /// The day.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String, format = Date)]
    pub day: Date,
    /// What happened.
    #[serde(flatten)]
    pub happened: Happened,
}

/// All products as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Now {
    /// Products.
    pub products: i64,
    /// Those for sale.
    pub active_products: i64,
    /// Of those, without any stock.
    pub out_of_stock_products: i64,
    /// Of those, at or below their threshold, those without any stock among them.
    pub low_stock_products: i64,
    /// Units of all products.
    pub units_in_stock: i64,
}

/// The summary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The stream sequence as of which all of this is.
    pub sequence: u64,
    /// When the server stored the event of that sequence.
    #[schema(value_type = String, format = DateTime)]
    pub as_of: Timestamp,
    /// Messages of the ledger up to there that were not events of ours. Not zero is an alarm.
    pub skipped_messages: u64,
    /// All products as of that sequence.
    pub now: Now,
    /// The first day of the range.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String, format = Date)]
    pub from: Date,
    /// The last.
    #[serde(serialize_with = "as_text")]
    #[schema(value_type = String, format = Date)]
    pub to: Date,
    /// All of its days together.
    pub totals: Happened,
    /// Each day on which anything happened.
    pub days: Vec<DayOfAll>,
}

fn as_text<S: Serializer>(day: &Date, serializer: S) -> Result<S::Ok, S::Error> {
    // As RFC 3339 has it, and as `time` displays the years that it can hold here.
    serializer.collect_str(day)
}

// ── Questions ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Which products a list holds: those to which all of this applies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StockLevelFilter {
    /// Of exactly this category.
    pub category: Option<String>,
    /// With exactly this stock-keeping unit.
    pub sku: Option<String>,
    /// With any stock, or with none.
    pub available: Option<bool>,
    /// At or below the threshold, or above.
    pub below_threshold: Option<bool>,
    /// For sale, or not.
    pub active: Option<bool>,
}

/// By what a list is sorted; the product's id settles ties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum SortBy {
    /// By stock-keeping unit, character by character.
    #[default]
    Sku,
    /// By name, character by character.
    Name,
    /// By units in stock.
    Quantity,
}

/// By what a list is sorted, and in which direction. As text `name`, or `-name` for the opposite direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sort {
    /// By what.
    pub by: SortBy,
    /// From the largest to the smallest.
    pub descending: bool,
}

/// Why a text is not a [`Sort`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a list is sorted by sku, name or quantity, with a leading `-` from the largest to the smallest")]
pub struct InvalidSort;

impl FromStr for Sort {
    type Err = InvalidSort;

    fn from_str(text: &str) -> Result<Self, InvalidSort> {
        let (name, descending) = text.strip_prefix('-').map_or((text, false), |name| (name, true));
        let by = match name {
            "sku" => SortBy::Sku,
            "name" => SortBy::Name,
            "quantity" => SortBy::Quantity,
            _ => return Err(InvalidSort),
        };
        Ok(Self { by, descending })
    }
}

/// A place in a list of stock levels: right behind this product.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LevelKey {
    /// What the list is sorted by, as text.
    pub text: String,
    /// The same as a number.
    pub number: u32,
    /// What settles ties.
    pub product_id: ProductId,
}

/// A place in the list of what is low.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowKey {
    /// Thousandths of days of cover.
    pub cover: i64,
    /// Thousandths of units a day, negative.
    pub pace: i64,
    /// Units in stock.
    pub quantity: u32,
    /// What settles ties.
    pub product_id: ProductId,
}

/// Which stock levels, in which order, and which piece.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StockLevelQuery {
    /// Which.
    pub filter: StockLevelFilter,
    /// In which order.
    pub sort: Sort,
    /// What was the last of the piece before; none for the first piece.
    pub after: Option<LevelKey>,
    /// How many: 1 to [`MAX_PAGE`].
    pub limit: u16,
    /// Days of the velocity's window.
    pub window_days: u16,
}

// ── Asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

/// The columns of a [`StockLevel`] but its sales, as [`level`] reads them after the checkpoint.
const LEVEL_COLUMNS: &str = "p.product_id, p.sku, p.name, p.category, p.active, p.registered_at, s.quantity,
     s.low_stock_threshold, s.out_of_stock_since, s.sequence, s.updated_at";

/// Reads the stock metrics. Clones share their connections.
#[derive(Clone)]
pub struct Reads {
    reader: Reader,
}

type Values<'v> = Vec<(&'v (dyn ToSql + Sync), Type)>;

impl Reads {
    /// Readers with connections of their own. Does not need the server to be there.
    ///
    /// # Errors
    /// When `url` is not a Postgres URL.
    pub fn new(url: &Secret) -> anyhow::Result<Self> {
        Ok(Self { reader: Reader::new(url)? })
    }

    /// A piece of a list of stock levels.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn stock_levels(
        &self,
        query: &StockLevelQuery,
        now: OffsetDateTime,
    ) -> Result<At<Page<StockLevel, LevelKey>>, QueryError> {
        let limit = usize::from(query.limit.clamp(1, MAX_PAGE));
        let list = List::of(query, day_of(now), limit + 1);
        let values: Values<'_> =
            list.values.iter().map(|(value, kind)| (&**value as &(dyn ToSql + Sync), kind.clone())).collect();
        let asked = Query { what: "the list of stock levels", text: &list.text, values: &values, prepared: false };
        let (sequence, rows) = self.reader.ask(asked).await?;
        let mut items: Vec<StockLevel> =
            rows.iter().map(|row| level(row, row.get(12), query.window_days, now)).collect();
        let next = cut(&mut items, limit).map(|last| LevelKey {
            text: match query.sort.by {
                SortBy::Sku => last.sku.clone(),
                SortBy::Name => last.name.clone(),
                SortBy::Quantity => String::new(),
            },
            number: last.quantity,
            product_id: last.product_id,
        });
        Ok(At { sequence, value: Page { items, next } })
    }

    /// A piece of the list of active products at or below their threshold, the most urgent first: by days of cover (what
    /// does not sell comes last), then by velocity from fast to slow, then by units in stock.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn low_stock(
        &self,
        window_days: u16,
        after: Option<&LowKey>,
        limit: u16,
        now: OffsetDateTime,
    ) -> Result<At<Page<StockLevel, LowKey>>, QueryError> {
        let limit = usize::from(limit.clamp(1, MAX_PAGE));
        let text = low_stock_text(after.is_some(), limit + 1);
        let (today, window) = (day_of(now), i32::from(window_days));
        let mut values: Values<'_> = vec![(&today, Type::DATE), (&window, Type::INT4)];
        let quantity = after.map(|key| i32::try_from(key.quantity).unwrap_or(i32::MAX));
        if let (Some(key), Some(quantity)) = (after, &quantity) {
            values.extend([
                (&key.cover as &(dyn ToSql + Sync), Type::INT8),
                (&key.pace, Type::INT8),
                (quantity, Type::INT4),
                (&key.product_id.0, Type::UUID),
            ]);
        }
        let asked = Query { what: "the list of low stock", text: &text, values: &values, prepared: false };
        let (sequence, rows) = self.reader.ask(asked).await?;
        let entry = |row: &Row| {
            let item = level(row, row.get(12), window_days, now);
            let (quantity, product_id) = (item.quantity, item.product_id);
            (item, LowKey { cover: row.get(13), pace: row.get(14), quantity, product_id })
        };
        let mut entries: Vec<(StockLevel, LowKey)> = rows.iter().map(entry).collect();
        let next = cut(&mut entries, limit).map(|(_, key)| key.clone());
        Ok(At { sequence, value: Page { items: entries.into_iter().map(|(item, _)| item).collect(), next } })
    }

    /// The days of a product from `from` to `to`, at most `limit`; none before it joined. Where it goes on, if it does.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn daily(
        &self,
        product_id: ProductId,
        (from, to): (Date, Date),
        limit: u16,
        now: OffsetDateTime,
    ) -> Result<At<Page<DayOfProduct, Date>>, QueryError> {
        let limit = usize::from(limit.clamp(1, MAX_PAGE));
        let most = i32::try_from(limit).unwrap_or(i32::MAX);
        let text = daily_text();
        let values: Values<'_> =
            vec![(&product_id.0, Type::UUID), (&from, Type::DATE), (&to, Type::DATE), (&most, Type::INT4)];
        let asked = Query { what: "the days of a product", text: &text, values: &values, prepared: true };
        let (sequence, rows) = self.reader.ask(asked).await?;
        if rows.is_empty() {
            return Err(QueryError::NoProduct { product_id, sequence });
        }
        let found = rows.iter().filter_map(|row| {
            let (day, of): (Option<Date>, Option<Date>) = (row.get(2), row.get(3));
            let (day, of) = (day?, of?);
            let mut found = rows::product_day(row, 4);
            if of < day {
                found = found.carried_to(day);
            }
            Some(day_of_product(day, &found, now))
        });
        let mut items: Vec<DayOfProduct> = found.collect();
        let next = cut(&mut items, limit).and_then(|last| last.day.next_day());
        Ok(At { sequence, value: Page { items, next } })
    }

    /// All products now, and what happened from `from` to `to`.
    ///
    /// # Errors
    /// [`QueryError`].
    pub async fn summary(&self, (from, to): (Date, Date)) -> Result<At<Summary>, QueryError> {
        let text = summary_text();
        let values: Values<'_> = vec![(&from, Type::DATE), (&to, Type::DATE)];
        let asked = Query { what: "the summary", text: &text, values: &values, prepared: true };
        let (sequence, rows) = self.reader.ask(asked).await?;
        let Some(first) = rows.first() else {
            return Err(Unreadable { what: "the summary", cause: "there is no checkpoint".to_owned() }.into());
        };
        let position = rows::position(first, 0);
        let mut totals = Happened::default();
        let days = rows.iter().filter_map(|row| {
            let day: Date = row.get::<_, Option<Date>>(9)?;
            Some(DayOfAll { day, happened: happened(&rows::day(row, 10)) })
        });
        let days: Vec<DayOfAll> = days.inspect(|day| totals.add(&day.happened)).collect();
        let stock_metrics::Totals {
            products,
            active_products,
            out_of_stock_products,
            low_stock_products,
            units_in_stock,
        } = position.totals;
        let now = Now { products, active_products, out_of_stock_products, low_stock_products, units_in_stock };
        let (as_of, skipped_messages) = (position.clock.into(), position.skipped);
        Ok(At { sequence, value: Summary { sequence, as_of, skipped_messages, now, from, to, totals, days } })
    }
}

// ── Statements ──────────────────────────────────────────────────────────────────────────────────────────────────

/// The statement of a list, with only those conditions that are asked for.
struct List {
    text: String,
    values: Vec<(Box<dyn ToSql + Sync + Send>, Type)>,
}

impl List {
    fn of(query: &StockLevelQuery, today: Date, rows: usize) -> Self {
        let StockLevelFilter { category, sku, available, below_threshold, active } = &query.filter;
        let mut list = Self { text: String::new(), values: Vec::new() };
        let (today, window) = (list.value(today, Type::DATE), list.value(i32::from(query.window_days), Type::INT4));
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
        let [by, tie] = match query.sort.by {
            SortBy::Sku => ["p.sku", "p.product_id"],
            SortBy::Name => ["p.name", "p.product_id"],
            SortBy::Quantity => ["s.quantity", "s.product_id"],
        };
        let (beyond, direction) = if query.sort.descending { ("<", "DESC") } else { (">", "ASC") };
        if let Some(LevelKey { text, number, product_id }) = &query.after {
            let value = match query.sort.by {
                SortBy::Sku | SortBy::Name => list.value(text.clone(), Type::TEXT),
                SortBy::Quantity => list.value(i32::try_from(*number).unwrap_or(i32::MAX), Type::INT4),
            };
            let product = list.value(product_id.0, Type::UUID);
            conditions.push(format!("({by}, {tie}) {beyond} ({value}, {product})"));
        }
        let filtered =
            if conditions.is_empty() { String::new() } else { format!("WHERE {}", conditions.join(" AND ")) };
        // The outer order is that of the inner one again: a join promises none, even with a single row.
        let sorted = format!("ORDER BY {by} {direction}, {tie} {direction}");
        let of_list = |text: &str| text.replace("p.", "l.").replace("s.", "l.");
        let (columns, outer) = (of_list(LEVEL_COLUMNS), of_list(&sorted));
        let written = write!(
            list.text,
            "SELECT c.sequence, {columns}, v.units
             FROM {live}.checkpoint c
             LEFT JOIN LATERAL (
                 SELECT {LEVEL_COLUMNS} FROM {live}.products p JOIN {live}.stock s ON s.product_id = p.product_id
                 {filtered} {sorted} LIMIT {rows}
             ) l ON true
             LEFT JOIN LATERAL ({}) v ON true
             WHERE c.projection = '{}'
             {outer}",
            sold_text("l.product_id", &today, &window),
            ANALYTICS.projection,
            live = ANALYTICS.live,
        );
        debug_assert!(written.is_ok(), "text takes whatever is written to it");
        list
    }

    /// Takes a value in; returns what stands for it in the text.
    fn value(&mut self, value: impl ToSql + Sync + Send + 'static, kind: Type) -> String {
        self.values.push((Box::new(value), kind));
        format!("${}", self.values.len())
    }
}

/// The units of a product that were sold within a window.
fn sold_text(product: &str, today: &str, window: &str) -> String {
    format!(
        "SELECT COALESCE(sum(d.units_sold), 0)::bigint AS units FROM {}.product_days d
         WHERE d.product_id = {product} AND d.day > {today}::date - {window}::int AND d.day <= {today}::date",
        ANALYTICS.live
    )
}

/// `$1` today, `$2` the window, `$3` to `$6` what was the last of the piece before.
fn low_stock_text(goes_on: bool, rows: usize) -> String {
    let after = if goes_on { "WHERE (u.cover, u.pace, u.quantity, u.product_id) > ($3, $4, $5, $6)" } else { "" };
    format!(
        "SELECT c.sequence, u.*
         FROM {live}.checkpoint c
         LEFT JOIN LATERAL (
             SELECT * FROM (
                 SELECT low.*, v.units,
                        CASE WHEN v.units > 0 THEN low.quantity::bigint * w.days * 1000 / v.units
                             ELSE 9223372036854775807 END AS cover,
                        CASE WHEN v.units > 0 THEN -(v.units * 1000 / w.days) ELSE 0 END AS pace
                 FROM (
                     SELECT {LEVEL_COLUMNS} FROM {live}.stock s JOIN {live}.products p ON p.product_id = s.product_id
                     WHERE s.quantity <= COALESCE(s.low_stock_threshold, 3) AND p.active
                     ORDER BY s.quantity, s.product_id LIMIT {MAX_LOW}
                 ) low
                 CROSS JOIN LATERAL (
                     SELECT GREATEST(1, LEAST($2::int, $1::date - (low.registered_at AT TIME ZONE 'UTC')::date + 1))
                            AS days
                 ) w
                 CROSS JOIN LATERAL ({sold}) v
             ) u {after}
             ORDER BY u.cover, u.pace, u.quantity, u.product_id LIMIT {rows}
         ) u ON true
         WHERE c.projection = '{projection}'
         ORDER BY u.cover, u.pace, u.quantity, u.product_id",
        sold = sold_text("low.product_id", "$1", "$2"),
        live = ANALYTICS.live,
        projection = ANALYTICS.projection,
    )
}

/// `$1` the product, `$2` and `$3` the days, `$4` how many. One row a day, with the last row of the tables up to it.
fn daily_text() -> String {
    format!(
        "SELECT c.sequence, p.product_id, g.day, d.day, {columns}
         FROM {live}.checkpoint c
         LEFT JOIN {live}.products p ON p.product_id = $1
         LEFT JOIN LATERAL (
             SELECT f.first + n AS day
             FROM (SELECT GREATEST($2::date, (p.registered_at AT TIME ZONE 'UTC')::date) AS first) f,
                  generate_series(0, $4::int) n
             WHERE f.first + n <= $3::date
         ) g ON true
         LEFT JOIN LATERAL (
             SELECT day, {PRODUCT_DAY_COLUMNS} FROM {live}.product_days
             WHERE product_id = p.product_id AND day <= g.day ORDER BY day DESC LIMIT 1
         ) d ON true
         WHERE c.projection = '{projection}'
         ORDER BY g.day",
        columns = prefixed("d.", PRODUCT_DAY_COLUMNS),
        live = ANALYTICS.live,
        projection = ANALYTICS.projection,
    )
}

/// `$1` and `$2` the days.
fn summary_text() -> String {
    format!(
        "SELECT {position}, d.day, {columns}
         FROM {live}.checkpoint c LEFT JOIN {live}.days d ON d.day BETWEEN $1 AND $2
         WHERE c.projection = '{projection}'
         ORDER BY d.day",
        position = prefixed("c.", POSITION_COLUMNS),
        columns = prefixed("d.", DAY_COLUMNS),
        live = ANALYTICS.live,
        projection = ANALYTICS.projection,
    )
}

fn prefixed(prefix: &str, columns: &str) -> String {
    columns.split(',').map(|column| format!("{prefix}{}", column.trim())).collect::<Vec<_>>().join(", ")
}

// ── Rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

fn level(row: &Row, units: i64, window_days: u16, now: OffsetDateTime) -> StockLevel {
    let registered_at: OffsetDateTime = row.get(6);
    let days_since = (day_of(now) - day_of(registered_at)).whole_days() + 1;
    let days = u16::try_from(days_since.max(1)).unwrap_or(u16::MAX).min(window_days);
    let velocity = Velocity { units, days };
    let quantity = row.get::<_, i32>(7).unsigned_abs();
    let threshold = row.get::<_, Option<i32>>(8).map_or(LOW_STOCK_THRESHOLD, i32::unsigned_abs);
    let instant = |at: OffsetDateTime| Timestamp::from(at);
    StockLevel {
        product_id: ProductId(row.get(1)),
        sku: row.get(2),
        name: row.get(3),
        category: row.get(4),
        active: row.get(5),
        quantity,
        is_available: quantity > 0,
        low_stock_threshold: threshold,
        is_low: quantity <= threshold,
        out_of_stock_since: row.get::<_, Option<OffsetDateTime>>(9).map(instant),
        units_sold_in_window: units,
        velocity_days: days,
        units_per_day: rounded(velocity.units_per_day()),
        days_of_cover: velocity.days_of_cover(quantity).map(rounded),
        version: row.get::<_, i64>(10).unsigned_abs(),
        updated_at: instant(row.get(11)),
    }
}

/// To three digits, the most that anybody reads.
fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

fn day_of_product(day: Date, row: &ProductDay, now: OffsetDateTime) -> DayOfProduct {
    DayOfProduct {
        day,
        units_sold: row.units_sold,
        orders_allocated: row.orders_allocated,
        adjustments: row.adjusted.into(),
        corrections: row.corrected.into(),
        orders_refused: row.orders_refused,
        units_refused: row.units_refused.into(),
        stock_outs: row.stock_outs,
        out_of_stock_seconds: rounded(row.out_of_stock(day, now).as_seconds_f64()),
        closing_quantity: row.closing_quantity,
    }
}

fn happened(day: &stock_metrics::Day) -> Happened {
    Happened {
        events: day.events,
        products_registered: day.products_registered,
        units_sold: day.units_sold,
        orders_allocated: day.orders_allocated,
        orders_refused: day.orders_refused.into(),
        units_refused: day.units_refused.into(),
        adjustments: day.adjusted.into(),
        corrections: day.corrected.into(),
        stock_outs: day.stock_outs,
    }
}

impl Happened {
    fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.products_registered += other.products_registered;
        self.units_sold += other.units_sold;
        self.orders_allocated += other.orders_allocated;
        self.orders_refused.add(&other.orders_refused);
        self.units_refused.add(&other.units_refused);
        self.adjustments.add(&other.adjustments);
        self.corrections.add(&other.corrections);
        self.stock_outs += other.stock_outs;
    }
}

impl ByReason {
    fn add(&mut self, other: &Self) {
        self.insufficient_stock += other.insufficient_stock;
        self.product_inactive += other.product_inactive;
        self.unknown_product += other.unknown_product;
    }
}

impl Changes {
    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.units_up += other.units_up;
        self.units_down += other.units_down;
    }
}
