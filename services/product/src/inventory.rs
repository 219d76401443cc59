//! The inventory aggregate: commands, state, decisions. The whole business is in this file and nothing else is.
//!
//! Pure: no I/O, no clock, no randomness, no async. Time and ids come in as arguments. [`State`] is the fold of the
//! `INVENTORY` stream up to a sequence and is never changed but by [`State::evolve`]; [`Draft`] is that state with the
//! decisions of a batch on top, which become real when the batch is stored or vanish with it. How the state lies in memory
//! and how it is copied is in [`frozen`] and the two files beside it.

mod decided;
pub mod frozen;
mod products;
mod remembered;

use std::sync::Arc;
use std::time::Duration;

use hashbrown::hash_map::Entry;
use hashbrown::{HashMap, HashSet};
use lomash_contract::event::is_name;
use lomash_contract::id::EventRole;
use lomash_contract::limits::{KEYS_KEPT, MAX_NAME_CHARS, MAX_STOCK, OUT_OF_STOCK_THRESHOLD};
use lomash_contract::text;
use lomash_contract::{
    Cause, ChangedField, CommandAnswered, CountedBy, EventId, FailedItem, FailureReason, Fingerprint, Foreign,
    InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, ProductDetails, ProductId,
    ProductRegistered, ProductRevised, ProductUpdated, Sku, Timestamp, Trigger, UpdatedBy,
};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use self::decided::Decided;
use self::products::Products;
pub use self::remembered::{MAX_REMEMBERED_COMMANDS, MAX_REMEMBERED_OF_ONE};
use self::remembered::{Remembered, RememberedCommand, caller, millis};

// ── Commands ────────────────────────────────────────────────────────────────────────────────────────────────────

/// Something to be decided.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Allocate an order, all lines or none.
    Order(Order),
    /// Anything an admin or the system does to one product.
    Product(ProductCommand),
}

/// An order as it is decided: every product once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Order {
    /// Which order; decided once, for ever.
    pub order_id: OrderId,
    /// Its lines, merged by product, in the order in which products first appear.
    pub lines: Vec<OrderLine>,
}

/// What an order wants of one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OrderLine {
    /// The product.
    pub product_id: ProductId,
    /// How many in all; at least 1 and at most [`MAX_STOCK`].
    pub quantity: u32,
}

/// A command about one product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductCommand {
    /// Identity of the command: its events' ids derive from it, so that a retry does not act twice within the stream's
    /// de-duplication window. Of one under a key the caller and the key make it.
    pub command_id: Uuid,
    /// The product.
    pub product_id: ProductId,
    /// Who wants it.
    pub by: UpdatedBy,
    /// Versions of the product (see [`Product::version`]) of which one must be the present one; empty asks for none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub if_version: Vec<u64>,
    /// A fingerprint of the request, for a command under a key: its answer is then put on record, whatever it is, and
    /// remembered for [`lomash_contract::limits::KEYS_KEPT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<u64>,
    /// Whether another replica was asked to carry it out and did not say what became of it. Its answer is then put on record
    /// like that of a command under a key, so that whichever of the two comes later knows it, be it after hours.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_second_try: bool,
    /// What to do.
    pub action: Action,
}

impl ProductCommand {
    /// A command without conditions that is not remembered.
    #[must_use]
    pub const fn new(command_id: Uuid, product_id: ProductId, by: UpdatedBy, action: Action) -> Self {
        Self { command_id, product_id, by, if_version: Vec::new(), fingerprint: None, is_second_try: false, action }
    }

    /// By what its request is known, when its answer is to be put on record.
    fn remembered_by(&self) -> Option<Fingerprint> {
        self.fingerprint.or((self.is_second_try && self.is_once()).then_some(0)).map(Fingerprint)
    }

    /// Whether what it comes to is put on record.
    #[must_use]
    pub fn is_on_record(&self) -> bool {
        self.remembered_by().is_some()
    }

    /// Whether its id is that of one request. That of a correction is the count's: it may be asked for again at any time, and
    /// a count corrects once by itself.
    const fn is_once(&self) -> bool {
        self.fingerprint.is_some() || !matches!(self.action, Action::CorrectCount { .. })
    }

    /// What its events' ids derive from, when it is decided on top of `sequence`.
    #[must_use]
    pub fn cause(&self, sequence: u64) -> Cause {
        match (&self.action, self.fingerprint) {
            (_, Some(_)) => Cause::KeyedCommand { command_id: self.command_id, sequence },
            (Action::CorrectCount { .. }, None) => Cause::Correction(self.command_id),
            (_, None) => Cause::Command(self.command_id),
        }
    }
}

/// What marked the events of a command under a key in a header beside them, before an event of its own told its answer. It is
/// read still, so that a key which was used on an older ledger holds, and never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommandMark {
    /// The command.
    pub command_id: Uuid,
    /// Of its request: the same id with another fingerprint is another request under a used key.
    pub fingerprint: u64,
}

impl CommandMark {
    /// Reads an id and 16 hexadecimal digits; `None` for anything else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (id, fingerprint) = text.split_once(' ')?;
        let command_id = Uuid::try_parse(id).ok()?;
        Some(Self { command_id, fingerprint: u64::from_str_radix(fingerprint, 16).ok()? })
    }
}

/// How far the clock of whoever counted may be ahead of ours.
pub const MAX_COUNT_SKEW: Duration = Duration::from_secs(300);

/// What to do to a product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Action {
    /// Add it to the catalogue, with stock if it has some.
    Register {
        /// Its details.
        details: Details,
        /// Its first stock.
        #[serde(default)]
        initial_quantity: u32,
    },
    /// Give it new details, all of them.
    Revise {
        /// Its details.
        details: Details,
    },
    /// Change some of its details and leave the others as they are.
    Amend(Amendment),
    /// Set the stock to an absolute figure.
    SetQuantity {
        /// The new stock.
        quantity: u32,
        /// Refuse unless the stock is this now.
        #[serde(default)]
        expected_quantity: Option<u32>,
    },
    /// Add to the stock, or take away.
    Adjust {
        /// How many; negative takes away. Never below zero.
        delta: i64,
    },
    /// Put a count on record; it changes no stock by itself.
    RecordCount(Count),
    /// Correct the stock by a count: `quantity - stock_at_count` is added to today's stock, so that what was sold since
    /// the count is not undone. Never below zero; the shortfall is reported. A count corrects once, however often it is
    /// tried, and not at all when a newer one is on record.
    CorrectCount {
        /// The count.
        #[serde(flatten)]
        count: Count,
        /// What the ledger said at the moment of the count.
        stock_at_count: u32,
    },
}

/// How many of a product somebody counted, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Count {
    /// How many were there.
    pub quantity: u32,
    /// When they were counted.
    pub counted_at: Timestamp,
    /// Who counted.
    pub counted_by: CountedBy,
}

/// The details to change; what is none stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Amendment {
    /// Its unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sku: Option<Sku>,
    /// Its name.
    pub name: Option<Box<str>>,
    /// Its category; `Some(None)` takes it away.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub category: Option<Option<Box<str>>>,
    /// Its own low-stock threshold; `Some(None)` takes it away.
    #[serde(deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    pub low_stock_threshold: Option<Option<u32>>,
    /// Whether it is for sale.
    pub active: Option<bool>,
}

impl Amendment {
    /// Puts it on sale or takes it off.
    #[must_use]
    pub fn activate(active: bool) -> Self {
        Self { active: Some(active), ..Self::default() }
    }

    fn of(&self, details: &ProductDetails) -> Details {
        let Self { sku, name, category, low_stock_threshold, active } = self.clone();
        let present = Details::from(details);
        Details {
            name: name.unwrap_or(present.name),
            category: category.unwrap_or(present.category),
            low_stock_threshold: low_stock_threshold.unwrap_or(present.low_stock_threshold),
            active: active.unwrap_or(present.active),
            sku: sku.unwrap_or(present.sku),
        }
    }
}

/// A field that is there, be it null: a field that is not there is `None`.
pub(crate) fn given<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// Details of a product as an admin gives them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// Its unit; unique.
    pub sku: Sku,
    /// Its name.
    pub name: Box<str>,
    /// Its category.
    #[serde(default)]
    pub category: Option<Box<str>>,
    /// Its own low-stock threshold.
    #[serde(default)]
    pub low_stock_threshold: Option<u32>,
    /// Whether it is for sale.
    #[serde(default = "yes")]
    pub active: bool,
}

const fn yes() -> bool {
    true
}

// ── Decisions ───────────────────────────────────────────────────────────────────────────────────────────────────

/// What is to be done about a command.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Store these events, all in one batch; then the outcome holds.
    Store(Vec<Fact>, Outcome),
    /// Nothing to store: it is so already.
    Settled(Outcome),
    /// The command is not acceptable; nothing is stored.
    Reject(Rejection),
    /// The command is not acceptable, and this is put on record: it came under a key.
    Refuse(Box<Fact>, Rejection),
}

/// An event to be stored, with its deterministic id.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    /// Its id.
    pub event_id: EventId,
    /// What happened.
    pub event: LedgerEvent,
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Outcome {
    /// The order got all it asked for.
    Allocated,
    /// The order got nothing, and this is on record.
    Refused {
        /// Why.
        reason: FailureReason,
    },
    /// The order had been decided before.
    AlreadyDecided,
    /// The product joined the catalogue.
    Registered,
    /// The product's details changed.
    Revised {
        /// Which of them, and how.
        changes: Vec<Change>,
    },
    /// The stock changed.
    StockChanged {
        /// Before.
        previous_quantity: u32,
        /// After.
        new_quantity: u32,
        /// By how much a correction would have gone below zero.
        shortfall: u32,
    },
    /// The count is on record.
    CountRecorded,
    /// Nothing to change.
    Unchanged,
    /// The command was answered before.
    Replayed {
        /// Where its answer is: of the event that tells it, or in an older ledger of the first event that it brought about.
        first_sequence: u64,
    },
}

/// A detail that changed: what it was, and what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "field", rename_all = "camelCase")]
pub enum Change {
    /// Its unit.
    Sku {
        /// What it was.
        before: Sku,
        /// What it is.
        after: Sku,
    },
    /// Its name.
    Name {
        /// What it was.
        before: Box<str>,
        /// What it is.
        after: Box<str>,
    },
    /// Its category.
    Category {
        /// What it was.
        before: Option<Box<str>>,
        /// What it is.
        after: Option<Box<str>>,
    },
    /// Its own low-stock threshold.
    LowStockThreshold {
        /// What it was.
        before: Option<u32>,
        /// What it is.
        after: Option<u32>,
    },
    /// Whether it is for sale.
    Active {
        /// Whether it was.
        before: bool,
        /// Whether it is.
        after: bool,
    },
}

impl Change {
    /// The name of the detail.
    #[must_use]
    pub const fn field(&self) -> ChangedField {
        match self {
            Self::Sku { .. } => ChangedField::Sku,
            Self::Name { .. } => ChangedField::Name,
            Self::Category { .. } => ChangedField::Category,
            Self::LowStockThreshold { .. } => ChangedField::LowStockThreshold,
            Self::Active { .. } => ChangedField::Active,
        }
    }

    /// What differs between the details of a product.
    fn between(was: &ProductDetails, is: &ProductDetails) -> Vec<Self> {
        let mut changes = Vec::new();
        if was.sku != is.sku {
            changes.push(Self::Sku { before: was.sku.clone(), after: is.sku.clone() });
        }
        if was.name != is.name {
            changes.push(Self::Name { before: was.name.clone(), after: is.name.clone() });
        }
        if was.category != is.category {
            changes.push(Self::Category { before: was.category.clone(), after: is.category.clone() });
        }
        if was.low_stock_threshold != is.low_stock_threshold {
            let (before, after) = (was.low_stock_threshold, is.low_stock_threshold);
            changes.push(Self::LowStockThreshold { before, after });
        }
        if was.active != is.active {
            changes.push(Self::Active { before: was.active, after: is.active });
        }
        changes
    }
}

/// Why a command is not acceptable, as a sentence for the admin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Rejection {
    /// No such product.
    #[error("the product is not registered")]
    UnknownProduct,
    /// It is registered, with other details.
    #[error("the product is registered already, with other details; revise it instead")]
    AlreadyRegistered,
    /// Another product has the unit.
    #[error("the sku belongs to product {owner} already")]
    SkuTaken {
        /// That product.
        owner: ProductId,
    },
    /// A name or category that is empty, too long or unprintable.
    #[error("the {field} must have 1 to {MAX_NAME_CHARS} characters, none of them a control character")]
    BadText {
        /// Which.
        field: String,
    },
    /// A quantity or threshold out of range.
    #[error("the {field} must be from 0 to {MAX_STOCK}")]
    OutOfRange {
        /// Which.
        field: String,
    },
    /// More would be taken away than there is.
    #[error("the stock is {quantity}; taking {taken} away would leave less than nothing")]
    BelowZero {
        /// The stock.
        quantity: u32,
        /// How many should go.
        taken: u64,
    },
    /// The stock is not what the admin believed.
    #[error("the stock is {actual}, not the expected {expected}")]
    UnexpectedQuantity {
        /// What the admin believed.
        expected: u32,
        /// What it is.
        actual: u32,
    },
    /// The product changed since the admin saw it.
    #[error("the product is at version {actual}, not at the expected one; read it again")]
    VersionMismatch {
        /// Its version.
        actual: u64,
    },
    /// The id of the command was used for another request.
    #[error("the key was used for another request before; use a new key")]
    KeyReused,
    /// A newer count of the product, or another one of the same moment, is on record.
    #[error("a count of {newest} is on record; this one is not newer")]
    CountSuperseded {
        /// When that one was taken.
        newest: Timestamp,
    },
    /// A count of the future.
    #[error("the count is of {counted_at}, which is still to come; check the clock of whoever counted")]
    CountInFuture {
        /// When it claims to be taken.
        counted_at: Timestamp,
    },
    /// The same command was stored before.
    #[error("this command was carried out before")]
    Repeated,
    /// So many commands under a key are remembered that there is no room for another. None is forgotten before its time.
    #[error(
        "{} within {} hours; writes without an Idempotency-Key go on, with one when the oldest are forgotten",
        if *of_caller {
            format!("the caller used {MAX_REMEMBERED_OF_ONE} keys")
        } else {
            format!("{MAX_REMEMBERED_COMMANDS} keys were used")
        },
        KEYS_KEPT.as_secs() / 3_600
    )]
    TooManyKeys {
        /// Whether the caller alone used that many.
        of_caller: bool,
    },
}

impl Rejection {
    /// Whether no replica decides otherwise later, whatever happens to the product. What the state of the ledger made so holds
    /// when it is on record.
    #[must_use]
    pub const fn is_final(&self, is_on_record: bool) -> bool {
        match self {
            Self::BadText { .. } | Self::KeyReused | Self::Repeated => true,
            Self::CountInFuture { .. } | Self::TooManyKeys { .. } => false,
            _ => is_on_record,
        }
    }

    /// Whether the state of the ledger made it so, and not the request alone: only then it is put on record under a key. A
    /// request that is wrong by itself may be mended and sent again under the same key.
    const fn is_by_rule(&self, action: &Action) -> bool {
        match self {
            Self::UnknownProduct
            | Self::AlreadyRegistered
            | Self::SkuTaken { .. }
            | Self::BelowZero { .. }
            | Self::UnexpectedQuantity { .. }
            | Self::VersionMismatch { .. }
            | Self::CountSuperseded { .. } => true,
            // More than a stock can be: of what is there and what is to be added.
            Self::OutOfRange { .. } => matches!(action, Action::Adjust { .. } | Action::CorrectCount { .. }),
            Self::BadText { .. }
            | Self::CountInFuture { .. }
            | Self::KeyReused
            | Self::Repeated
            | Self::TooManyKeys { .. } => false,
        }
    }

    /// As `command-answered` has it.
    fn to_refusal(&self) -> Box<Map<String, Value>> {
        match serde_json::to_value(self) {
            Ok(Value::Object(refusal)) => Box::new(refusal),
            other => unreachable!("a rejection is an object: {other:?}"),
        }
    }

    /// Reads the refusal of a `command-answered`.
    ///
    /// # Errors
    /// When it is none that this program knows.
    pub fn of_refusal(refusal: &Map<String, Value>) -> Result<Self, serde_json::Error> {
        Self::deserialize(Value::Object(refusal.clone()))
    }
}

// ── State ───────────────────────────────────────────────────────────────────────────────────────────────────────

/// A product as the ledger knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// Its details; shared, because a change of stock leaves them alone.
    pub details: Arc<ProductDetails>,
    /// Its stock.
    pub quantity: u32,
    /// Sequence of the last event that changed its details or its stock.
    pub version: u64,
    /// Its newest count on record. Few products have one, so it is kept aside.
    pub count: Option<Box<CountOnRecord>>,
}

/// The newest count of a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountOnRecord {
    /// How many.
    pub quantity: u32,
    /// When.
    pub counted_at: Timestamp,
    /// Whether the stock was corrected by it.
    pub corrected: bool,
}

/// The fold of the ledger up to a sequence.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    sequence: u64,
    products: Products,
    decided: Decided,
    remembered: Remembered,
    skipped: u64,
}

/// What deciding needs to know; [`State`] and [`Draft`] both tell it.
trait View {
    fn product(&self, id: &ProductId) -> Option<&Product>;
    fn sku_owner(&self, sku: &Sku) -> Option<ProductId>;
    fn is_decided(&self, order: &OrderId) -> bool;
    /// The last sequence before what is decided next.
    fn sequence(&self) -> u64;
    fn remembered(&self, command_id: &Uuid) -> Option<RememberedCommand>;
    /// How many commands are remembered, and how many of them by this caller.
    fn remembered_commands(&self, caller: &Uuid) -> (usize, u32);
    /// The command that is forgotten next.
    fn oldest_remembered(&self) -> Option<&RememberedCommand>;
}

impl State {
    /// The sequence up to which the ledger is folded in.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Messages on the way that were not ours.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.skipped
    }

    /// A product.
    #[must_use]
    pub fn product(&self, id: &ProductId) -> Option<&Product> {
        self.products.get(id)
    }

    /// All products, in the order in which they were registered.
    pub fn products(&self) -> impl Iterator<Item = (&ProductId, &Product)> {
        self.products.iter()
    }

    /// Whether an order was decided.
    #[must_use]
    pub fn is_decided(&self, order: &OrderId) -> bool {
        self.decided.contains(order)
    }

    /// How many orders were decided.
    #[must_use]
    pub fn decided_orders(&self) -> usize {
        self.decided.len()
    }

    /// Whether a command was answered under a key and is remembered.
    #[must_use]
    pub fn remembers(&self, command_id: &Uuid) -> bool {
        self.remembered.get(command_id).is_some()
    }

    /// How many commands are remembered.
    #[must_use]
    pub fn remembered_commands(&self) -> usize {
        self.remembered.len()
    }

    /// Whether `event` continues the ledger; the rule all readers share, see `lomash_contract::admission`.
    ///
    /// # Errors
    /// [`Foreign`] when we cannot have written it.
    pub fn admits(&self, event: &LedgerEvent) -> Result<(), Foreign> {
        let stock = self.products.get(&ProductId(event.key())).map(|product| product.quantity);
        lomash_contract::chains(event, stock)
    }

    /// Records what happened at `at`, by the event's own words; never refuses. `mark` is what its header said, in an older
    /// ledger.
    ///
    /// # Panics
    /// When `sequence` is not the next one: a fold with a gap is worthless.
    pub fn evolve(&mut self, sequence: u64, at: Timestamp, event: &LedgerEvent, mark: Option<CommandMark>) {
        self.advance(sequence);
        if !self.remembered.is_empty() {
            self.remembered.forget_before(millis(at));
        }
        if let Some(CommandMark { command_id, fingerprint }) = mark {
            let at_ms = millis(at);
            // Its further events change nothing.
            if self.remembered.get(&command_id).is_none_or(|known| known.is_over(at_ms)) {
                let by = Uuid::nil();
                self.remembered.note(RememberedCommand { command_id, fingerprint, sequence, at_ms, by });
            }
        }
        if let Some(order) = decided_order(event) {
            self.decided.insert(order);
        }
        match event {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => {
                self.products.put(Product::registered(details, sequence));
            }
            LedgerEvent::ProductRevised(ProductRevised(details)) => {
                if let Some(mut product) = self.products.get(&details.product_id).cloned() {
                    product.evolve(sequence, event);
                    self.products.put(product);
                }
            }
            LedgerEvent::InventoryUpdated(InventoryUpdated { product_id, .. })
            | LedgerEvent::InventoryCounted(InventoryCounted { product_id, .. }) => {
                if let Some(product) = self.products.get_mut(product_id) {
                    product.evolve(sequence, event);
                }
            }
            LedgerEvent::CommandAnswered(answered) => {
                self.remembered.note(RememberedCommand::by(answered, sequence, millis(at)));
            }
            LedgerEvent::InventoryUpdateFailed(_) | LedgerEvent::ProductUpdated(_) => {}
        }
    }

    /// Passes over a message that is not ours.
    ///
    /// # Panics
    /// When `sequence` is not the next one.
    pub fn skip(&mut self, sequence: u64) {
        self.advance(sequence);
        self.skipped += 1;
    }

    fn advance(&mut self, sequence: u64) {
        assert_eq!(sequence, self.sequence + 1, "the ledger is folded without gaps");
        self.sequence = sequence;
    }
}

impl Product {
    fn registered(details: &ProductDetails, sequence: u64) -> Self {
        Self { details: Arc::new(details.clone()), quantity: 0, version: sequence, count: None }
    }

    /// Records what happened to a product that is registered; its id is the event's.
    fn evolve(&mut self, sequence: u64, event: &LedgerEvent) {
        match event {
            LedgerEvent::ProductRevised(ProductRevised(details)) => {
                self.details = Arc::new(details.clone());
                self.version = sequence;
            }
            LedgerEvent::InventoryUpdated(updated) => {
                self.quantity = updated.new_quantity;
                self.version = sequence;
                if let (Trigger::ScheduledSync, Some(count)) = (updated.trigger, &mut self.count) {
                    count.corrected = true;
                }
            }
            LedgerEvent::InventoryCounted(InventoryCounted { quantity, counted_at, .. }) => {
                let (quantity, counted_at) = (*quantity, *counted_at);
                if self.count.as_deref().is_none_or(|count| count.counted_at < counted_at) {
                    self.count = Some(Box::new(CountOnRecord { quantity, counted_at, corrected: false }));
                }
            }
            LedgerEvent::ProductRegistered(_)
            | LedgerEvent::InventoryUpdateFailed(_)
            | LedgerEvent::ProductUpdated(_)
            | LedgerEvent::CommandAnswered(_) => {}
        }
    }
}

impl RememberedCommand {
    fn by(answered: &CommandAnswered, sequence: u64, at_ms: i64) -> Self {
        let CommandAnswered { command_id, fingerprint, requested_by, .. } = answered;
        Self { command_id: *command_id, fingerprint: fingerprint.0, sequence, at_ms, by: caller(*requested_by) }
    }
}

fn registered_sku(event: &LedgerEvent) -> Option<&Sku> {
    match event {
        LedgerEvent::ProductRegistered(ProductRegistered(details))
        | LedgerEvent::ProductRevised(ProductRevised(details)) => Some(&details.sku),
        _ => None,
    }
}

fn decided_order(event: &LedgerEvent) -> Option<OrderId> {
    match event {
        LedgerEvent::InventoryUpdated(InventoryUpdated { order_id, .. }) => *order_id,
        LedgerEvent::InventoryUpdateFailed(InventoryUpdateFailed { order_id, .. }) => Some(*order_id),
        _ => None,
    }
}

impl View for State {
    fn product(&self, id: &ProductId) -> Option<&Product> {
        self.products.get(id)
    }

    fn sku_owner(&self, sku: &Sku) -> Option<ProductId> {
        self.products.owner(sku)
    }

    fn is_decided(&self, order: &OrderId) -> bool {
        self.decided.contains(order)
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn remembered(&self, command_id: &Uuid) -> Option<RememberedCommand> {
        self.remembered.get(command_id)
    }

    fn remembered_commands(&self, caller: &Uuid) -> (usize, u32) {
        (self.remembered.len(), self.remembered.of(caller))
    }

    fn oldest_remembered(&self) -> Option<&RememberedCommand> {
        self.remembered.oldest()
    }
}

/// The state with the decisions of a batch that is not stored yet.
#[derive(Debug)]
pub struct Draft<'s> {
    state: &'s State,
    /// The sequence of the last fact taken in, if the batch is stored: it is stored right behind the state or not at all.
    sequence: u64,
    remembered: HashMap<Uuid, RememberedCommand>,
    /// How many of those are by each caller.
    by_caller: HashMap<Uuid, u32>,
    products: HashMap<ProductId, Product>,
    skus: HashMap<Sku, ProductId>,
    decided: HashSet<OrderId>,
}

impl<'s> Draft<'s> {
    /// A draft on top of `state`.
    #[must_use]
    pub fn new(state: &'s State) -> Self {
        Self {
            state,
            sequence: state.sequence,
            remembered: HashMap::new(),
            by_caller: HashMap::new(),
            products: HashMap::new(),
            skus: HashMap::new(),
            decided: HashSet::new(),
        }
    }

    /// Takes the facts of a decision at `at` in, so that the next command is decided after it.
    pub fn apply(&mut self, facts: &[Fact], at: Timestamp) {
        for Fact { event, .. } in facts {
            self.sequence += 1;
            if let LedgerEvent::CommandAnswered(answered) = event {
                let command = RememberedCommand::by(answered, self.sequence, millis(at));
                self.remembered.insert(command.command_id, command);
                *self.by_caller.entry(command.by).or_default() += 1;
                continue;
            }
            let id = ProductId(event.key());
            if let Some(sku) = registered_sku(event) {
                self.skus.insert(sku.clone(), id);
            }
            if let Some(order) = decided_order(event) {
                self.decided.insert(order);
            }
            match (event, self.products.entry(id)) {
                (
                    LedgerEvent::InventoryUpdateFailed(_)
                    | LedgerEvent::ProductUpdated(_)
                    | LedgerEvent::CommandAnswered(_),
                    _,
                ) => {}
                (LedgerEvent::ProductRegistered(ProductRegistered(details)), place) => {
                    place.insert(Product::registered(details, self.sequence));
                }
                (_, Entry::Occupied(mut product)) => product.get_mut().evolve(self.sequence, event),
                (_, Entry::Vacant(place)) => {
                    if let Some(mut product) = self.state.product(&id).cloned() {
                        product.evolve(self.sequence, event);
                        place.insert(product);
                    }
                }
            }
        }
    }
}

impl View for Draft<'_> {
    fn product(&self, id: &ProductId) -> Option<&Product> {
        self.products.get(id).or_else(|| self.state.products.get(id))
    }

    fn sku_owner(&self, sku: &Sku) -> Option<ProductId> {
        // A sku that the draft gave away is free, though the state below still knows its old owner.
        let owner = self.skus.get(sku).copied().or_else(|| self.state.products.owner(sku))?;
        View::product(self, &owner).is_some_and(|product| product.details.sku == *sku).then_some(owner)
    }

    fn is_decided(&self, order: &OrderId) -> bool {
        self.decided.contains(order) || self.state.is_decided(order)
    }

    fn remembered(&self, command_id: &Uuid) -> Option<RememberedCommand> {
        self.remembered.get(command_id).copied().or_else(|| self.state.remembered(command_id))
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }

    fn remembered_commands(&self, caller: &Uuid) -> (usize, u32) {
        let (all, of_caller) = View::remembered_commands(self.state, caller);
        let here = self.by_caller.get(caller).copied().unwrap_or(0);
        (all + self.remembered.len(), of_caller + here)
    }

    fn oldest_remembered(&self) -> Option<&RememberedCommand> {
        self.state.remembered.oldest()
    }
}

// ── Deciding ────────────────────────────────────────────────────────────────────────────────────────────────────

/// Decides one command against the state as the commands before it left it.
#[must_use]
pub fn decide(draft: &Draft<'_>, command: &Command, now: Timestamp) -> Decision {
    match command {
        Command::Order(order) => decide_order(draft, order, now),
        Command::Product(command) => decide_product(draft, command, now),
    }
}

fn decide_order(view: &impl View, order: &Order, now: Timestamp) -> Decision {
    if view.is_decided(&order.order_id) {
        return Decision::Settled(Outcome::AlreadyDecided);
    }
    // The gravest reason wins, and only the lines that fail for it are named.
    let failing = |reason: FailureReason| -> Vec<FailedItem> {
        let fails = |line: &OrderLine| {
            let product = view.product(&line.product_id);
            let found = match product {
                None => Some(FailureReason::UnknownProduct),
                Some(product) if !product.details.active => Some(FailureReason::ProductInactive),
                Some(product) if product.quantity < line.quantity => Some(FailureReason::InsufficientStock),
                Some(_) => None,
            };
            (found == Some(reason)).then(|| FailedItem {
                product_id: line.product_id,
                sku: product.map(|product| product.details.sku.clone()),
                requested: line.quantity,
                available: product.map_or(0, |product| product.quantity),
            })
        };
        order.lines.iter().filter_map(fails).collect()
    };
    let gravest_first =
        [FailureReason::UnknownProduct, FailureReason::ProductInactive, FailureReason::InsufficientStock];
    for reason in gravest_first {
        let items = failing(reason);
        if !items.is_empty() {
            let event_id = EventId::derive(&Cause::Order(order.order_id), EventRole::Refusal, &order.order_id.0);
            let failed = InventoryUpdateFailed { order_id: order.order_id, reason, items };
            let fact = Fact { event_id, event: LedgerEvent::InventoryUpdateFailed(failed) };
            return Decision::Store(vec![fact], Outcome::Refused { reason });
        }
    }
    let mut facts = Vec::with_capacity(order.lines.len());
    for line in &order.lines {
        let product = view.product(&line.product_id).expect("a line of an unknown product was refused above");
        let change = StockChange {
            cause: Cause::Order(order.order_id),
            new_quantity: product.quantity - line.quantity,
            trigger: Trigger::OrderConfirmed,
            order_id: Some(order.order_id),
            by: UpdatedBy::System,
        };
        change.record(&product.details, product.quantity, now, &mut facts);
    }
    Decision::Store(facts, Outcome::Allocated)
}

/// A change of stock and all that belongs to it.
struct StockChange {
    cause: Cause,
    new_quantity: u32,
    trigger: Trigger,
    order_id: Option<OrderId>,
    by: UpdatedBy,
}

impl StockChange {
    /// `inventory-updated`, and `product-updated` when the product became available or ceased to be.
    fn record(self, product: &ProductDetails, previous_quantity: u32, now: Timestamp, facts: &mut Vec<Fact>) {
        let product_id = product.product_id;
        facts.push(Fact {
            event_id: EventId::derive(&self.cause, EventRole::Stock, &product_id.0),
            event: LedgerEvent::InventoryUpdated(InventoryUpdated {
                product_id,
                sku: product.sku.clone(),
                previous_quantity,
                new_quantity: self.new_quantity,
                trigger: self.trigger,
                order_id: self.order_id,
                updated_by: self.by,
            }),
        });
        if is_available(previous_quantity) != is_available(self.new_quantity) {
            let changed = vec![ChangedField::StockQuantity, ChangedField::IsAvailable];
            facts.push(product_updated(&self.cause, product_id, changed, now));
        }
    }
}

/// Whether a product with this stock can be bought.
#[must_use]
pub const fn is_available(quantity: u32) -> bool {
    quantity > OUT_OF_STOCK_THRESHOLD
}

fn product_updated(cause: &Cause, product_id: ProductId, changed_fields: Vec<ChangedField>, now: Timestamp) -> Fact {
    Fact {
        event_id: EventId::derive(cause, EventRole::ChangedFields, &product_id.0),
        event: LedgerEvent::ProductUpdated(ProductUpdated { product_id, changed_fields, updated_at: now }),
    }
}

/// A command under a key is answered once; what it was answered is put on record before the events that it brings about, and
/// also when it brings about none.
fn decide_product(view: &impl View, command: &ProductCommand, now: Timestamp) -> Decision {
    let now_ms = millis(now);
    let known = if command.is_once() { view.remembered(&command.command_id) } else { None };
    if let Some(known) = known.filter(|known| !known.is_over(now_ms)) {
        return match command.fingerprint {
            Some(fingerprint) if fingerprint != known.fingerprint => Decision::Reject(Rejection::KeyReused),
            _ => Decision::Settled(Outcome::Replayed { first_sequence: known.sequence }),
        };
    }
    let decided = decide_new(view, command, now);
    let Some(fingerprint) = command.remembered_by() else { return decided.unwrap_or_else(Decision::Reject) };
    if decided.as_ref().is_err_and(|rejection| !rejection.is_by_rule(&command.action)) {
        return decided.unwrap_or_else(Decision::Reject);
    }
    if let Some(rejection) = no_room(view, command, now_ms) {
        return Decision::Reject(rejection);
    }
    let answered = |events: usize, refusal: Option<&Rejection>| {
        // Its own id says where it was decided, also where those of the events do not: a forgotten command has another one.
        let cause = Cause::KeyedCommand { command_id: command.command_id, sequence: view.sequence() };
        let event = CommandAnswered {
            command_id: command.command_id,
            fingerprint,
            product_id: command.product_id,
            requested_by: command.by,
            events: u32::try_from(events).expect("a command has a handful of events"),
            refusal: refusal.map(Rejection::to_refusal),
        };
        let event_id = EventId::derive(&cause, EventRole::Answer, &command.product_id.0);
        Fact { event_id, event: LedgerEvent::CommandAnswered(event) }
    };
    match decided {
        Ok(Decision::Store(mut facts, outcome)) => {
            facts.insert(0, answered(facts.len(), None));
            Decision::Store(facts, outcome)
        }
        Ok(Decision::Settled(outcome)) => Decision::Store(vec![answered(0, None)], outcome),
        Ok(other) => other,
        Err(rejection) => Decision::Refuse(Box::new(answered(0, Some(&rejection))), rejection),
    }
}

/// Why another command cannot be remembered, if it cannot: none is forgotten before its time.
fn no_room(view: &impl View, command: &ProductCommand, now_ms: i64) -> Option<Rejection> {
    let (all, of_caller) = view.remembered_commands(&caller(command.by));
    let of_caller = of_caller >= MAX_REMEMBERED_OF_ONE;
    if all < MAX_REMEMBERED_COMMANDS && !of_caller {
        return None;
    }
    // What is over is forgotten with the next event, which is this one.
    if view.oldest_remembered().is_some_and(|oldest| oldest.is_over(now_ms)) {
        return None;
    }
    Some(Rejection::TooManyKeys { of_caller })
}

fn decide_new(view: &impl View, command: &ProductCommand, now: Timestamp) -> Result<Decision, Rejection> {
    let cause = command.cause(view.sequence());
    let product = view.product(&command.product_id);
    if let Some(product) =
        product.filter(|product| !command.if_version.is_empty() && !command.if_version.contains(&product.version))
    {
        return Err(Rejection::VersionMismatch { actual: product.version });
    }
    match &command.action {
        Action::Register { details, initial_quantity } => {
            register(view, command, &cause, details, *initial_quantity, now)
        }
        Action::Revise { details } => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            revise(view, command, &cause, product, details.clone(), now)
        }
        Action::Amend(amendment) => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            revise(view, command, &cause, product, amendment.of(&product.details), now)
        }
        Action::SetQuantity { quantity, expected_quantity } => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            if let Some(expected) = expected_quantity.filter(|expected| *expected != product.quantity) {
                return Err(Rejection::UnexpectedQuantity { expected, actual: product.quantity });
            }
            change_stock(command, &cause, product, NewStock::by_admin(i64::from(*quantity)), Vec::new(), now)
        }
        Action::Adjust { delta } => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            let new = i64::from(product.quantity).saturating_add(*delta);
            if new < 0 {
                return Err(Rejection::BelowZero { quantity: product.quantity, taken: delta.unsigned_abs() });
            }
            change_stock(command, &cause, product, NewStock::by_admin(new), Vec::new(), now)
        }
        Action::RecordCount(count) => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            match look_at(product, count, now)? {
                OnRecord::Corrected | OnRecord::Recorded => Ok(Decision::Settled(Outcome::Unchanged)),
                OnRecord::New => {
                    Ok(Decision::Store(vec![counted(command, &cause, product, count)], Outcome::CountRecorded))
                }
            }
        }
        Action::CorrectCount { count, stock_at_count } => {
            let product = product.ok_or(Rejection::UnknownProduct)?;
            let mut facts = Vec::with_capacity(3);
            match look_at(product, count, now)? {
                OnRecord::Corrected => return Ok(Decision::Settled(Outcome::Unchanged)),
                OnRecord::Recorded => {}
                OnRecord::New => facts.push(counted(command, &cause, product, count)),
            }
            let new = i64::from(product.quantity) + i64::from(count.quantity) - i64::from(*stock_at_count);
            let shortfall = u32::try_from(-new).unwrap_or(0);
            let stock = NewStock { quantity: new.max(0), trigger: Trigger::ScheduledSync, shortfall };
            change_stock(command, &cause, product, stock, facts, now)
        }
    }
}

/// What the ledger knows of a count.
enum OnRecord {
    New,
    Recorded,
    Corrected,
}

fn look_at(product: &Product, count: &Count, now: Timestamp) -> Result<OnRecord, Rejection> {
    in_range("quantity", i64::from(count.quantity))?;
    if count.counted_at.get() > now.get() + MAX_COUNT_SKEW {
        return Err(Rejection::CountInFuture { counted_at: count.counted_at });
    }
    match &product.count {
        Some(known) if known.counted_at == count.counted_at && known.quantity == count.quantity => {
            Ok(if known.corrected { OnRecord::Corrected } else { OnRecord::Recorded })
        }
        Some(known) if known.counted_at >= count.counted_at => {
            Err(Rejection::CountSuperseded { newest: known.counted_at })
        }
        _ => Ok(OnRecord::New),
    }
}

fn counted(command: &ProductCommand, cause: &Cause, product: &Product, count: &Count) -> Fact {
    let Count { quantity, counted_at, counted_by } = *count;
    Fact {
        event_id: EventId::derive(cause, EventRole::Count, &command.product_id.0),
        event: LedgerEvent::InventoryCounted(InventoryCounted {
            product_id: command.product_id,
            sku: product.details.sku.clone(),
            quantity,
            counted_at,
            counted_by,
        }),
    }
}

/// What a stock is to become, and why.
struct NewStock {
    quantity: i64,
    trigger: Trigger,
    /// By how much a correction would have gone below zero.
    shortfall: u32,
}

impl NewStock {
    const fn by_admin(quantity: i64) -> Self {
        Self { quantity, trigger: Trigger::AdminUpdate, shortfall: 0 }
    }
}

/// Changes the stock, after `facts` that belong to the same decision.
fn change_stock(
    command: &ProductCommand,
    cause: &Cause,
    product: &Product,
    NewStock { quantity, trigger, shortfall }: NewStock,
    mut facts: Vec<Fact>,
    now: Timestamp,
) -> Result<Decision, Rejection> {
    let new_quantity = in_range("quantity", quantity)?;
    let previous_quantity = product.quantity;
    let outcome = Outcome::StockChanged { previous_quantity, new_quantity, shortfall };
    if new_quantity == previous_quantity {
        let outcome = if shortfall == 0 { Outcome::Unchanged } else { outcome };
        let settled = facts.is_empty();
        return Ok(if settled { Decision::Settled(outcome) } else { Decision::Store(facts, outcome) });
    }
    let change = StockChange { cause: *cause, new_quantity, trigger, order_id: None, by: command.by };
    change.record(&product.details, previous_quantity, now, &mut facts);
    Ok(Decision::Store(facts, outcome))
}

fn register(
    view: &impl View,
    command: &ProductCommand,
    cause: &Cause,
    details: &Details,
    initial_quantity: u32,
    now: Timestamp,
) -> Result<Decision, Rejection> {
    details.check()?;
    let initial_quantity = in_range("initial quantity", i64::from(initial_quantity))?;
    let wanted = details.of(command.product_id);
    if let Some(product) = view.product(&command.product_id) {
        let same = *product.details == wanted;
        return if same { Ok(Decision::Settled(Outcome::Unchanged)) } else { Err(Rejection::AlreadyRegistered) };
    }
    if let Some(owner) = owner_of(view, &details.sku) {
        return Err(Rejection::SkuTaken { owner });
    }
    let mut facts = vec![Fact {
        event_id: EventId::derive(cause, EventRole::Details, &command.product_id.0),
        event: LedgerEvent::ProductRegistered(ProductRegistered(wanted.clone())),
    }];
    if initial_quantity > 0 {
        let change = StockChange {
            cause: *cause,
            new_quantity: initial_quantity,
            trigger: Trigger::AdminUpdate,
            order_id: None,
            by: command.by,
        };
        change.record(&wanted, 0, now, &mut facts);
    }
    Ok(Decision::Store(facts, Outcome::Registered))
}

fn revise(
    view: &impl View,
    command: &ProductCommand,
    cause: &Cause,
    product: &Product,
    details: Details,
    now: Timestamp,
) -> Result<Decision, Rejection> {
    details.check()?;
    let wanted = details.of(command.product_id);
    let current = &*product.details;
    if *current == wanted {
        return Ok(Decision::Settled(Outcome::Unchanged));
    }
    // Another spelling of the product's own unit is its own.
    let owner = if current.sku == wanted.sku { None } else { owner_of(view, &wanted.sku) };
    if let Some(owner) = owner.filter(|owner| *owner != command.product_id) {
        return Err(Rejection::SkuTaken { owner });
    }
    let changes = Change::between(current, &wanted);
    let changed_fields = changes.iter().map(Change::field).collect();
    let revised = Fact {
        event_id: EventId::derive(cause, EventRole::Details, &command.product_id.0),
        event: LedgerEvent::ProductRevised(ProductRevised(wanted)),
    };
    let facts = vec![revised, product_updated(cause, command.product_id, changed_fields, now)];
    Ok(Decision::Store(facts, Outcome::Revised { changes }))
}

/// The product that has a unit, in whichever of the forms that look the same: what was registered before there was one form
/// is kept as it was given.
fn owner_of(view: &impl View, sku: &Sku) -> Option<ProductId> {
    let other = || text::forms(sku.as_str()).into_iter().filter_map(|form| form.parse().ok());
    view.sku_owner(sku).or_else(|| other().find_map(|form: Sku| view.sku_owner(&form)))
}

fn in_range(field: &str, quantity: i64) -> Result<u32, Rejection> {
    u32::try_from(quantity)
        .ok()
        .filter(|quantity| *quantity <= MAX_STOCK)
        .ok_or_else(|| Rejection::OutOfRange { field: field.to_owned() })
}

impl Details {
    fn check(&self) -> Result<(), Rejection> {
        for (field, text) in [("name", Some(&self.name)), ("category", self.category.as_ref())] {
            if text.is_some_and(|text| !is_name(text)) {
                return Err(Rejection::BadText { field: field.to_owned() });
            }
        }
        in_range("low-stock threshold", i64::from(self.low_stock_threshold.unwrap_or(0))).map(|_| ())
    }

    fn of(&self, product_id: ProductId) -> ProductDetails {
        ProductDetails {
            product_id,
            sku: self.sku.clone(),
            name: self.name.clone(),
            category: self.category.clone(),
            low_stock_threshold: self.low_stock_threshold,
            active: self.active,
        }
    }
}

impl From<&ProductDetails> for Details {
    fn from(details: &ProductDetails) -> Self {
        Self {
            sku: details.sku.clone(),
            name: details.name.clone(),
            category: details.category.clone(),
            low_stock_threshold: details.low_stock_threshold,
            active: details.active,
        }
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
