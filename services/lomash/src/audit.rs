//! The ledger's auditor: folds the stream on its own and says which invariants hold.
//!
//! Pure: no I/O and no clock. It shares the contract with the product service (types, `parse_stored`, `chains`) but on
//! purpose not its state or its decisions: an auditor that runs the audited code confirms its mistakes.
//!
//! The caller hands things over in this order, because a refusal can only be judged against the stock at its moment:
//! [`Audit::observe_letter`] for the dead letters of `product-orders`, [`Audit::observe_order`] or
//! [`Audit::observe_malformed_order`] for the messages of `ORDERS`, then [`Audit::observe`] for each message of
//! `INVENTORY` in sequence, then [`Audit::finish`]. What `INVENTORY` is compared with must have been read as
//! `verify.rs` explains, or traffic during the audit looks like faults.
//!
//! # Memory
//! Event ids cost 17 bytes each at the table's best load and 35 at its worst, orders 41 to 82 bytes and 8 more a line,
//! products some 300, commands under a key 33 to 66. Ten million one-line orders with as many events: 0.8 to 1.3 GB. Nothing grows with the size of
//! the payloads.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::fmt;

use hashbrown::{HashMap, HashSet};
use lomash_contract::id::EventRole;
use lomash_contract::limits::{KEYS_KEPT, OUT_OF_STOCK_THRESHOLD};
use lomash_contract::{
    Cause, ChangedField, CommandAnswered, CountedBy, EventId, FailedItem, FailureReason, Foreign, InventoryCounted,
    InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderCreated, OrderId, ProductDetails, ProductId,
    ProductRegistered, ProductRevised, ProductUpdated, Sku, Timestamp, Trigger, UpdatedBy,
};
use lomash_ledger::StoredMessage;
use serde::Serialize;
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::output::hex;

/// Violations of one invariant that are named; the rest are only counted.
pub const MAX_NAMED: usize = 10;

/// Lines of an order, or fields of a list, that a sentence repeats.
const MAX_LINES_IN_A_SENTENCE: usize = 3;

const INVENTORY: &str = "INVENTORY";
const ORDERS: &str = "ORDERS";
const DEAD_LETTERS: &str = "DEAD_LETTERS";

// ── The report ──────────────────────────────────────────────────────────────────────────────────────────────────

/// What the audit found. The same inputs give the same report.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Up to where each source was read.
    pub as_of: AsOf,
    /// One entry an invariant, in the order of their numbers.
    pub invariants: Vec<Invariant>,
    /// What the ledger adds up to.
    pub totals: Totals,
}

impl Report {
    /// Whether no invariant is violated. What was not checked is not counted as a violation; see
    /// [`Report::unchecked`].
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.invariants.iter().all(|invariant| invariant.violations == 0)
    }

    /// The invariants that were not checked at all.
    pub fn unchecked(&self) -> impl Iterator<Item = &Invariant> {
        self.invariants.iter().filter(|invariant| invariant.status == Status::NotChecked)
    }

    /// The invariant with this number.
    #[must_use]
    pub fn invariant(&self, number: u8) -> Option<&Invariant> {
        self.invariants.iter().find(|invariant| invariant.number == number)
    }
}

/// Up to where each source was read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AsOf {
    /// Last sequence of `INVENTORY` that was folded.
    pub inventory_sequence: u64,
    /// Last sequence of `ORDERS` that was read.
    pub orders_sequence: u64,
    /// The acknowledgement floor of `product-orders`: up to here every order must be decided.
    pub orders_ack_floor: Option<u64>,
    /// The projection's checkpoint.
    pub projection_checkpoint: Option<u64>,
}

/// One invariant and what became of it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Invariant {
    /// Its number in the list of invariants.
    pub number: u8,
    /// What must hold.
    pub holds: &'static str,
    /// Whether it does.
    pub status: Status,
    /// What was looked at.
    pub checked: Vec<Count>,
    /// How often it is violated.
    pub violations: u64,
    /// The first of them.
    pub first: Vec<Violation>,
    /// What the reader should know besides.
    pub notes: Vec<String>,
}

/// Whether an invariant holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Status {
    /// It does.
    Holds,
    /// It does not.
    Violated,
    /// Nobody looked; `notes` says why.
    NotChecked,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Holds => "ok",
            Self::Violated => "VIOLATED",
            Self::NotChecked => "not checked",
        })
    }
}

/// How many of something were checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Of what.
    pub what: String,
    /// How many.
    pub count: u64,
}

/// Where an invariant is violated, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// The stream or table.
    pub source: &'static str,
    /// Its sequence, when it is about one.
    pub sequence: Option<u64>,
    /// What is wrong, as a sentence.
    pub problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sequence {
            Some(sequence) => write!(f, "{} {sequence}: {}", self.source, self.problem),
            None => write!(f, "{}: {}", self.source, self.problem),
        }
    }
}

/// What the ledger adds up to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Messages folded.
    pub messages: u64,
    /// Atomic batches.
    pub batches: u64,
    /// Products registered.
    pub products: u64,
    /// Changes of stock.
    pub movements: u64,
    /// Messages on `lomash.orders.created` that are orders.
    pub order_messages: u64,
    /// Distinct orders among them.
    pub orders_published: u64,
    /// Messages there that are no orders.
    pub malformed_orders: u64,
    /// Dead letters of `product-orders`.
    pub dead_letters: u64,
    /// Orders allocated.
    pub orders_allocated: u64,
    /// Orders refused for want of stock.
    pub refused_insufficient_stock: u64,
    /// Orders refused for an unknown product.
    pub refused_unknown_product: u64,
    /// Orders refused for an inactive product.
    pub refused_product_inactive: u64,
    /// Published orders that nobody decided yet.
    pub orders_undecided: u64,
    /// Commands under a key that were answered.
    pub commands_answered: u64,
    /// Messages that are not ours.
    pub foreign: u64,
    /// Units of all first stocks.
    pub initial_units: i128,
    /// Units that admins added, less what they took away.
    pub admin_units: i128,
    /// Units that reconciliation added, less what it took away.
    pub sync_units: i128,
    /// Units that allocated orders took.
    pub allocated_units: i128,
    /// Units in stock.
    pub stock_units: i128,
}

impl Totals {
    /// Orders refused, for whatever reason.
    #[must_use]
    pub const fn orders_refused(&self) -> u64 {
        self.refused_insufficient_stock + self.refused_unknown_product + self.refused_product_inactive
    }
}

/// The findings of one invariant while the audit runs.
#[derive(Debug, Default)]
struct Findings {
    violations: u64,
    first: Vec<Violation>,
    notes: Vec<String>,
}

impl Findings {
    /// Counts a violation; the sentence is only made for those that are named.
    fn violate(&mut self, source: &'static str, sequence: impl Into<Option<u64>>, problem: impl FnOnce() -> String) {
        self.violations += 1;
        if self.first.len() < MAX_NAMED {
            self.first.push(Violation { source, sequence: sequence.into(), problem: problem() });
        }
    }

    fn conclude(mut self, number: u8, holds: &'static str, checked: &[(&str, u64)]) -> Invariant {
        // A batch or an order is judged when it ends, so findings can come out of order.
        self.first.sort_by_key(|violation| (violation.source, violation.sequence));
        Invariant {
            number,
            holds,
            status: if self.violations == 0 { Status::Holds } else { Status::Violated },
            checked: checked.iter().map(|(what, count)| Count { what: (*what).to_owned(), count: *count }).collect(),
            violations: self.violations,
            first: self.first,
            notes: self.notes,
        }
    }
}

// ── What the projection must hold ───────────────────────────────────────────────────────────────────────────────

/// A row that both the fold and the projection have. Its JSON is its canonical form.
///
/// Instants are microseconds since 1970, cut and not rounded: Postgres keeps no more, the stream has nanoseconds.
pub trait Row: Serialize + PartialEq {
    /// The table.
    const TABLE: &'static str;
    /// By what rows are ordered and found.
    type Key: Ord + Copy;
    /// This row's key.
    fn key(&self) -> Self::Key;
    /// The stream sequence that wrote it.
    fn sequence(&self) -> u64;
}

/// A row of `inventory.products` and its row of `inventory.stock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductRow {
    /// The product.
    pub product_id: Uuid,
    /// Its unit.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// Its category.
    pub category: Option<String>,
    /// Its own low-stock threshold.
    pub low_stock_threshold: Option<i64>,
    /// Whether it is for sale.
    pub active: bool,
    /// Its stock.
    pub quantity: i64,
    /// Whether it can be bought.
    pub is_available: bool,
    /// The event that changed it last.
    pub sequence: u64,
    /// The event that registered it.
    pub registered_sequence: u64,
    /// When it joined, in microseconds.
    pub registered_at: i64,
    /// When it changed last, in microseconds.
    pub updated_at: i64,
}

/// A row of `inventory.movements`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MovementRow {
    /// The event.
    pub sequence: u64,
    /// Whose stock.
    pub product_id: Uuid,
    /// Before.
    pub previous_quantity: i64,
    /// After.
    pub new_quantity: i64,
    /// Why.
    pub trigger: Cow<'static, str>,
    /// For which order.
    pub order_id: Option<Uuid>,
    /// By whom; none is the system.
    pub updated_by: Option<Uuid>,
    /// In whose words.
    pub reason: Option<String>,
    /// The event's id.
    pub event_id: Uuid,
    /// The writer's clock, in microseconds.
    pub occurred_at: i64,
    /// The server's clock, in microseconds.
    pub stored_at: i64,
}

/// A row of `inventory.counts`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CountRow {
    /// The event.
    pub sequence: u64,
    /// What was counted.
    pub product_id: Uuid,
    /// How many there were.
    pub quantity: i64,
    /// The moment that the count describes, in microseconds.
    pub counted_at: i64,
    /// By whom; none is the warehouse.
    pub counted_by: Option<Uuid>,
    /// The event's id.
    pub event_id: Uuid,
    /// The server's clock, in microseconds.
    pub stored_at: i64,
}

/// A row of `inventory.order_decisions`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionRow {
    /// The order's first event.
    pub sequence: u64,
    /// The order.
    pub order_id: Uuid,
    /// `allocated` or `refused`.
    pub outcome: Cow<'static, str>,
    /// Why it was refused.
    pub reason: Option<Cow<'static, str>>,
    /// The failing lines, see [`canonical_items`].
    pub items: Option<serde_json::Value>,
    /// When, in microseconds.
    pub decided_at: i64,
}

impl Row for ProductRow {
    const TABLE: &'static str = "products";
    type Key = Uuid;

    fn key(&self) -> Uuid {
        self.product_id
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Row for MovementRow {
    const TABLE: &'static str = "movements";
    type Key = u64;

    fn key(&self) -> u64 {
        self.sequence
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Row for CountRow {
    const TABLE: &'static str = "counts";
    type Key = u64;

    fn key(&self) -> u64 {
        self.sequence
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Row for DecisionRow {
    const TABLE: &'static str = "order_decisions";
    type Key = (u64, Uuid);

    fn key(&self) -> (u64, Uuid) {
        (self.sequence, self.order_id)
    }

    fn sequence(&self) -> u64 {
        self.sequence
    }
}

/// An instant as rows hold it: whole microseconds since 1970, the rest cut off.
#[must_use]
pub fn micros(at: OffsetDateTime) -> i64 {
    i64::try_from(at.unix_timestamp_nanos().div_euclid(1_000)).unwrap_or(i64::MAX)
}

/// Failing lines as rows hold them: one spelling for what means the same, and as they are when they mean nothing.
#[must_use]
pub fn canonical_items(items: serde_json::Value) -> serde_json::Value {
    let parsed: Option<Vec<FailedItem>> = serde_json::from_value(items.clone()).ok();
    parsed.and_then(|items| serde_json::to_value(items).ok()).unwrap_or(items)
}

/// What one message of the stream adds to the projection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Projected {
    /// A change of stock.
    pub movement: Option<MovementRow>,
    /// A count.
    pub count: Option<CountRow>,
    /// The decision of an order: at its first event.
    pub decision: Option<DecisionRow>,
}

/// Compares a table of the projection with the fold, row by row in the order of their keys, without holding either.
#[derive(Debug)]
pub struct TableComparison<R: Row> {
    waiting: VecDeque<R>,
    projection_ended: bool,
    fold_rows: u64,
    projection_rows: u64,
    fold_digest: Sha256,
    projection_digest: Sha256,
    differences: Findings,
}

impl<R: Row> Default for TableComparison<R> {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            projection_ended: false,
            fold_rows: 0,
            projection_rows: 0,
            fold_digest: Sha256::new(),
            projection_digest: Sha256::new(),
            differences: Findings::default(),
        }
    }
}

/// What came of comparing one table.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TableReport {
    /// The table.
    pub table: &'static str,
    /// Rows of the fold.
    pub fold_rows: u64,
    /// Rows of the projection.
    pub projection_rows: u64,
    /// Digest of the fold's rows.
    pub fold_sha256: String,
    /// Digest of the projection's rows.
    pub projection_sha256: String,
    /// Rows that differ, are missing or are too many.
    pub differences: u64,
    /// The first of them.
    pub first: Vec<Violation>,
}

impl<R: Row> TableComparison<R> {
    /// The next rows of the projection, in order.
    pub fn push_projection(&mut self, rows: impl IntoIterator<Item = R>) {
        for row in rows {
            self.projection_rows += 1;
            digest(&mut self.projection_digest, &row);
            self.waiting.push_back(row);
        }
    }

    /// The projection has no more rows.
    pub fn end_projection(&mut self) {
        self.projection_ended = true;
    }

    /// Whether [`TableComparison::end_projection`] was said.
    #[must_use]
    pub fn is_projection_ended(&self) -> bool {
        self.projection_ended
    }

    /// The next row of the fold, in order. Gives it back when rows of the projection are needed first.
    #[must_use = "a row that comes back was not compared yet"]
    pub fn push_fold(&mut self, row: R) -> Option<R> {
        while let Some(found) = self.waiting.front() {
            if found.key() < row.key() {
                self.surplus();
                continue;
            }
            if found.key() > row.key() {
                self.missing(&row);
            } else {
                if *found != row {
                    let sequence = row.sequence();
                    let problem = || format!("the fold has {}, the projection {}", json(&row), json(found));
                    self.differences.violate(R::TABLE, sequence, problem);
                }
                self.waiting.pop_front();
            }
            self.count_fold(&row);
            return None;
        }
        if !self.projection_ended {
            return Some(row);
        }
        self.missing(&row);
        self.count_fold(&row);
        None
    }

    /// The fold has no more rows: what the projection still has is too much. Call it again after each
    /// [`TableComparison::push_projection`] until the projection has ended.
    pub fn drain_projection(&mut self) {
        while !self.waiting.is_empty() {
            self.surplus();
        }
    }

    /// The result.
    #[must_use]
    pub fn report(mut self) -> TableReport {
        self.drain_projection();
        TableReport {
            table: R::TABLE,
            fold_rows: self.fold_rows,
            projection_rows: self.projection_rows,
            fold_sha256: hex(self.fold_digest.finalize()),
            projection_sha256: hex(self.projection_digest.finalize()),
            differences: self.differences.violations,
            first: self.differences.first,
        }
    }

    fn count_fold(&mut self, row: &R) {
        self.fold_rows += 1;
        digest(&mut self.fold_digest, row);
    }

    fn missing(&mut self, row: &R) {
        self.differences.violate(R::TABLE, row.sequence(), || format!("the projection lacks {}", json(row)));
    }

    fn surplus(&mut self) {
        if let Some(row) = self.waiting.pop_front() {
            let problem = || format!("the projection has {}, which the stream does not tell", json(&row));
            self.differences.violate(R::TABLE, row.sequence(), problem);
        }
    }
}

fn json(row: &impl Serialize) -> String {
    serde_json::to_string(row).unwrap_or_else(|error| format!("(unprintable: {error})"))
}

fn digest(digest: &mut Sha256, row: &impl Serialize) {
    digest.update(json(row).as_bytes());
    digest.update(b"\n");
}

// ── What the audit is told at its end ───────────────────────────────────────────────────────────────────────────

/// What the caller found out besides the messages.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The last sequence of `ORDERS` that was read.
    pub orders_sequence: u64,
    /// Letters that were taken out of `DEAD_LETTERS` (redriven or deleted), at most.
    pub letters_removed: u64,
    /// In what the configuration of `INVENTORY` is not its definition, or why that is not known.
    pub configuration: Result<Vec<String>, String>,
    /// What came of comparing the projection.
    pub projection: Projection,
}

/// What came of comparing the projection.
#[derive(Clone, Debug)]
pub enum Projection {
    /// It was not asked for; why, as a sentence.
    NotChecked(String),
    /// It was asked for and could not be read; why, as a sentence.
    Unreadable(String),
    /// Its checkpoint is beyond the end of the stream, so there is nothing to compare it with.
    AheadOfStream {
        /// The checkpoint.
        checkpoint: u64,
    },
    /// It was compared.
    Compared {
        /// The checkpoint.
        checkpoint: u64,
        /// Messages that the projection skipped.
        skipped: u64,
        /// Messages that the fold skipped up to there.
        skipped_by_fold: u64,
        /// The tables.
        tables: Vec<TableReport>,
    },
}

// ── The audit ───────────────────────────────────────────────────────────────────────────────────────────────────

/// What an order wants of one product, the product by its place in [`Audit::products`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Line {
    product: u32,
    quantity: u32,
}

/// Where the merged lines of an order stand in [`Audit::lines`].
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u32,
    len: u16,
}

/// An order: 24 bytes beside its id, however long it is.
#[derive(Clone, Copy, Debug)]
struct OrderEntry {
    /// Its first message in `ORDERS`; 0 when there is none.
    published_at: u64,
    /// Its first event in `INVENTORY`; 0 while it is undecided.
    decided_at: u64,
    /// What its first message wants; other wishes of the same order stand in [`Audit::other_wishes`].
    wish: Span,
    outcome: Outcome,
    /// Whether a message of it is in the dead letters.
    dead: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Undecided,
    Allocated,
    Refused,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Undecided => "undecided",
            Self::Allocated => "allocated",
            Self::Refused => "refused",
        })
    }
}

/// A product that an order or the ledger names.
#[derive(Debug)]
struct Product {
    id: ProductId,
    /// None until the ledger registers it.
    registered: Option<Box<Registered>>,
}

#[derive(Debug)]
struct Registered {
    details: ProductDetails,
    quantity: u32,
    sequence: u64,
    registered_sequence: u64,
    registered_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    /// Which batch registered it: its first change in the same one is its initial stock.
    registered_in: u64,
    moved: bool,
    initial: i64,
    admin: i64,
    sync: i64,
    /// What allocated orders wanted of it, by `ORDERS` where the order is still there.
    allocated: i64,
}

/// The batch that is being read.
#[derive(Debug)]
struct OpenBatch {
    id: String,
    position: u64,
    last: u64,
}

/// The events that a command under a key still owes in the batch that is being read.
#[derive(Debug)]
struct Owing {
    answered: CommandAnswered,
    sequence: u64,
    left: u32,
}

/// What an order took in the batch that is being read.
#[derive(Debug)]
struct Allocation {
    order: OrderId,
    sequence: u64,
    lines: Vec<Line>,
    /// Set when it was decided before: its lines are no order's.
    repeated: bool,
}

/// The audit of one ledger. See the top of the file for the order in which it is fed.
#[derive(Debug)]
pub struct Audit {
    ack_floor: Option<u64>,
    letters: HashSet<u64>,
    /// Malformed orders at or below the floor without a letter.
    without_letter: Vec<(u64, String)>,
    places: HashMap<ProductId, u32>,
    products: Vec<Product>,
    lines: Vec<Line>,
    orders: HashMap<OrderId, OrderEntry>,
    other_wishes: HashMap<OrderId, Vec<Span>>,
    acknowledged: u64,

    sequence: u64,
    /// Each with the sequence that it was first seen at.
    event_ids: HashMap<Uuid, u64>,
    /// Commands under a key, and when each was answered last, in seconds since 1970.
    commands: HashMap<Uuid, i64>,
    owing: Option<Owing>,
    batch: Option<OpenBatch>,
    allocations: Vec<Allocation>,
    allocation_of: HashMap<OrderId, usize>,
    crossings: HashMap<u32, VecDeque<u64>>,
    crossings_seen: u64,
    lines_compared: u64,
    unpublished: u64,
    totals: Totals,

    present: Findings,
    whole: Findings,
    chained: Findings,
    decided: Findings,
    balanced: Findings,
    gapless: Findings,
    available: Findings,
}

impl Audit {
    /// An audit of a ledger from its beginning.
    ///
    /// `ack_floor` is the acknowledgement floor of `product-orders`, read before anything else; without it lost orders
    /// cannot be told from waiting ones.
    #[must_use]
    pub fn new(ack_floor: Option<u64>) -> Self {
        Self {
            ack_floor,
            letters: HashSet::new(),
            without_letter: Vec::new(),
            places: HashMap::new(),
            products: Vec::new(),
            lines: Vec::new(),
            orders: HashMap::new(),
            other_wishes: HashMap::new(),
            acknowledged: 0,
            sequence: 0,
            event_ids: HashMap::new(),
            commands: HashMap::new(),
            owing: None,
            batch: None,
            allocations: Vec::new(),
            allocation_of: HashMap::new(),
            crossings: HashMap::new(),
            crossings_seen: 0,
            lines_compared: 0,
            unpublished: 0,
            totals: Totals::default(),
            present: Findings::default(),
            whole: Findings::default(),
            chained: Findings::default(),
            decided: Findings::default(),
            balanced: Findings::default(),
            gapless: Findings::default(),
            available: Findings::default(),
        }
    }

    /// The last sequence of `INVENTORY` that was observed.
    #[must_use]
    pub const fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Messages so far that are not ours.
    #[must_use]
    pub const fn skipped(&self) -> u64 {
        self.totals.foreign
    }

    /// Whether the last message observed left its batch open.
    #[must_use]
    pub const fn in_batch(&self) -> bool {
        self.batch.is_some()
    }

    /// A dead letter of `product-orders` and the sequence in `ORDERS` that its headers name.
    pub fn observe_letter(&mut self, letter_sequence: u64, origin: Option<u64>) {
        self.totals.dead_letters += 1;
        match origin {
            Some(origin) => {
                self.letters.insert(origin);
            }
            None => self.present.violate(DEAD_LETTERS, letter_sequence, || {
                "the letter does not say which message of ORDERS it holds".to_owned()
            }),
        }
    }

    /// A message of `ORDERS`, by its sequence, that waits to be tried alone: it owes nothing yet.
    pub fn observe_suspect(&mut self, sequence: u64) {
        self.letters.insert(sequence);
    }

    /// A message of `ORDERS` that is no order.
    pub fn observe_malformed_order(&mut self, sequence: u64, problem: &str) {
        self.totals.malformed_orders += 1;
        if self.ack_floor.is_some_and(|floor| sequence <= floor) {
            self.acknowledged += 1;
            if !self.letters.contains(&sequence) {
                self.without_letter.push((sequence, problem.to_owned()));
            }
        }
    }

    /// A message of `ORDERS` that is an order.
    pub fn observe_order(&mut self, sequence: u64, order: &OrderCreated) {
        self.totals.order_messages += 1;
        if self.ack_floor.is_some_and(|floor| sequence <= floor) {
            self.acknowledged += 1;
        }
        let wish = self.merged(order);
        let dead = self.letters.contains(&sequence);
        if let Some(known) = self.orders.get_mut(&order.order_id) {
            known.dead |= dead;
            let first = known.wish;
            let same = |span: &Span| self.lines[span.range()] == wish;
            let others = self.other_wishes.get(&order.order_id);
            if !same(&first) && !others.is_some_and(|spans| spans.iter().any(same)) {
                let span = self.keep(&wish);
                self.other_wishes.entry(order.order_id).or_default().push(span);
            }
            return;
        }
        let wish = self.keep(&wish);
        let entry = OrderEntry { published_at: sequence, decided_at: 0, wish, outcome: Outcome::Undecided, dead };
        self.orders.insert(order.order_id, entry);
        self.totals.orders_published += 1;
    }

    /// The order's lines, every product once, in the order of the products' places.
    fn merged(&mut self, order: &OrderCreated) -> Vec<Line> {
        let items = order.items.as_slice();
        let mut lines: Vec<Line> = items
            .iter()
            .map(|item| Line { product: self.place(item.product_id), quantity: item.quantity.get() })
            .collect();
        lines.sort_unstable();
        // 1,000 lines of at most 1,000,000 cannot overflow.
        lines.dedup_by(|line, kept| {
            let same = line.product == kept.product;
            if same {
                kept.quantity += line.quantity;
            }
            same
        });
        lines
    }

    fn keep(&mut self, lines: &[Line]) -> Span {
        let start = u32::try_from(self.lines.len()).expect("4 billion order lines are 34 GB: memory ends before");
        let len = u16::try_from(lines.len()).expect("an order has at most 1,000 lines");
        self.lines.extend_from_slice(lines);
        Span { start, len }
    }

    fn place(&mut self, id: ProductId) -> u32 {
        let Self { places, products, .. } = self;
        *places.entry(id).or_insert_with(|| {
            products.push(Product { id, registered: None });
            u32::try_from(products.len() - 1).expect("4 billion products do not fit into memory")
        })
    }

    fn registered(&self, place: u32) -> Option<&Registered> {
        self.products[place as usize].registered.as_deref()
    }

    /// The stream has no message between `after` and `found`. Observing goes on at `found`.
    pub fn observe_gap(&mut self, after: u64, found: u64) {
        self.gapless.violate(INVENTORY, after + 1, || match found - after {
            2 => format!("sequence {} is missing", after + 1),
            _ => format!("sequences {} to {} are missing", after + 1, found - 1),
        });
        self.sequence = found - 1;
    }

    /// The next message of `INVENTORY`. Returns what it adds to the projection.
    pub fn observe(&mut self, message: &StoredMessage) -> Projected {
        let expected = self.sequence + 1;
        if message.sequence > expected {
            self.observe_gap(self.sequence, message.sequence);
        } else if message.sequence < expected {
            let problem = || format!("the message comes after sequence {}", expected - 1);
            self.gapless.violate(INVENTORY, message.sequence, problem);
        }
        self.sequence = message.sequence;
        self.totals.messages += 1;
        self.enter_batch(message);
        let admitted = self.admit(message);
        let projected = admitted.unwrap_or_else(|foreign| {
            self.foreign(message.sequence, &foreign);
            Projected::default()
        });
        if message.ends_batch() {
            self.batch = None;
            self.close_batch();
        }
        projected
    }

    // ── 2: batches ──

    fn enter_batch(&mut self, message: &StoredMessage) {
        let Some(position) = &message.batch else {
            self.abandon_batch();
            self.whole.violate(INVENTORY, message.sequence, || "the message was stored outside any batch".to_owned());
            self.totals.batches += 1;
            return;
        };
        if let Some(open) = self.batch.as_mut().filter(|open| open.id == position.id) {
            let due = open.position + 1;
            open.position = position.sequence;
            open.last = message.sequence;
            if position.sequence != due {
                let problem = || {
                    format!(
                        "the message is number {} of batch {}, number {due} was due",
                        position.sequence, position.id
                    )
                };
                self.whole.violate(INVENTORY, message.sequence, problem);
            }
            return;
        }
        self.abandon_batch();
        self.totals.batches += 1;
        if position.sequence != 1 {
            let problem = || format!("batch {} begins with its message number {}", position.id, position.sequence);
            self.whole.violate(INVENTORY, message.sequence, problem);
        }
        let before = message.sequence.checked_sub(1);
        if message.expected_last_sequence != before {
            self.whole.violate(INVENTORY, message.sequence, || match message.expected_last_sequence {
                Some(expected) => {
                    format!("batch {} was written for a stream that ends at {expected}", position.id)
                }
                None => format!("batch {} was written without an expected last sequence", position.id),
            });
        }
        let open = OpenBatch { id: position.id.clone(), position: position.sequence, last: message.sequence };
        self.batch = Some(open);
    }

    /// A batch that ends without its commit was torn: the server never stores one.
    fn abandon_batch(&mut self) {
        if let Some(open) = self.batch.take() {
            let problem = || format!("batch {} ends without its commit after {} messages", open.id, open.position);
            self.whole.violate(INVENTORY, open.last, problem);
            self.close_batch();
        }
    }

    fn close_batch(&mut self) {
        self.judge_owing(None);
        self.allocation_of.clear();
        for allocation in std::mem::take(&mut self.allocations) {
            self.judge_allocation(allocation);
        }
        for (place, waiting) in self.crossings.drain() {
            for sequence in waiting {
                let id = self.products[place as usize].id;
                let problem =
                    || format!("the availability of product {id} changes and no product-updated of the batch names it");
                self.available.violate(INVENTORY, sequence, problem);
            }
        }
    }

    // ── 1 and 3: ids and chains ──

    fn foreign(&mut self, sequence: u64, foreign: &Foreign) {
        self.totals.foreign += 1;
        self.chained.violate(INVENTORY, sequence, || format!("not an event of ours: {foreign}"));
        if let Foreign::MessageId { .. } = foreign {
            self.present.violate(INVENTORY, sequence, || foreign.to_string());
        }
    }

    fn admit(&mut self, message: &StoredMessage) -> Result<Projected, Foreign> {
        let envelope = message.parse()?;
        let sequence = message.sequence;
        let first = *self.event_ids.entry(envelope.event_id.0).or_insert(sequence);
        if first != sequence {
            let problem = || {
                let id = envelope.event_id;
                format!(
                    "it and {first} share the event id {id}: a reader that knows events by their ids takes this one for \
                     known and misses it; see `Two events with one id` in docs/operations.md"
                )
            };
            self.present.violate(INVENTORY, sequence, problem);
        }
        let event = &envelope.payload;
        self.judge_owing(Some(event));
        let of_product = !matches!(event, LedgerEvent::InventoryUpdateFailed(_));
        let place = of_product.then(|| self.places.get(&ProductId(event.key())).copied()).flatten();
        let stock = place.and_then(|place| self.registered(place)).map(|product| product.quantity);
        lomash_contract::chains(event, stock)?;
        let mut projected = Projected::default();
        match event {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => {
                let place = self.place(details.product_id);
                self.totals.products += 1;
                self.products[place as usize].registered = Some(Box::new(Registered {
                    details: details.clone(),
                    quantity: 0,
                    sequence,
                    registered_sequence: sequence,
                    registered_at: message.stored_at,
                    updated_at: message.stored_at,
                    registered_in: self.totals.batches,
                    moved: false,
                    initial: 0,
                    admin: 0,
                    sync: 0,
                    allocated: 0,
                }));
            }
            LedgerEvent::ProductRevised(ProductRevised(details)) => {
                let product = self.known(place);
                product.details = details.clone();
                product.sequence = sequence;
                product.updated_at = message.stored_at;
            }
            LedgerEvent::InventoryCounted(counted) => {
                self.check_sku(sequence, place, &counted.sku);
                projected.count = Some(count_row(message, envelope.event_id.0, counted));
            }
            LedgerEvent::ProductUpdated(updated) => self.changed_fields(sequence, place, updated),
            LedgerEvent::CommandAnswered(answered) => {
                self.answered(sequence, envelope.event_id, envelope.timestamp, answered);
            }
            LedgerEvent::InventoryUpdateFailed(failed) => {
                projected.decision = self.refusal(message, failed);
            }
            LedgerEvent::InventoryUpdated(updated) => {
                projected.decision = self.movement(message, place, updated);
                let at = envelope.timestamp;
                projected.movement = Some(movement_row(message, envelope.event_id.0, at, updated));
            }
        }
        Ok(projected)
    }

    // ── 1: answers under a key ──

    fn answered(&mut self, sequence: u64, event_id: EventId, at: Timestamp, answered: &CommandAnswered) {
        let CommandAnswered { command_id, product_id, events, refusal, .. } = answered;
        self.totals.commands_answered += 1;
        let at = at.get().unix_timestamp();
        let kept = i64::try_from(KEYS_KEPT.as_secs()).unwrap_or(i64::MAX);
        if let Some(earlier) = self.commands.insert(*command_id, at)
            && at - earlier < kept
        {
            let problem = || format!("command {command_id} was answered before, {} s ago", at - earlier);
            self.present.violate(INVENTORY, sequence, problem);
        }
        let cause = Cause::KeyedCommand { command_id: *command_id, sequence: sequence - 1 };
        if event_id != EventId::derive(&cause, EventRole::Answer, &product_id.0) {
            let problem =
                || format!("the id of command {command_id}'s answer is not the one that it has at this sequence");
            self.present.violate(INVENTORY, sequence, problem);
        }
        if *events > 0 && refusal.is_some() {
            let problem = || format!("command {command_id} was refused and brought about {events} events");
            self.present.violate(INVENTORY, sequence, problem);
        }
        self.owing = (*events > 0).then(|| Owing { answered: answered.clone(), sequence, left: *events });
    }

    /// Looks whether the next event of the batch, or its end, is what the command before it owes.
    fn judge_owing(&mut self, next: Option<&LedgerEvent>) {
        let Some(owing) = &mut self.owing else { return };
        let is_its = |event: &LedgerEvent| {
            let is_of_command =
                !matches!(event, LedgerEvent::CommandAnswered(_) | LedgerEvent::InventoryUpdateFailed(_));
            is_of_command && event.key() == owing.answered.product_id.0
        };
        if next.is_some_and(is_its) {
            owing.left -= 1;
            if owing.left == 0 {
                self.owing = None;
            }
            return;
        }
        let Owing { answered, sequence, left } = self.owing.take().expect("there is one");
        let problem = || {
            let CommandAnswered { command_id, events, .. } = &answered;
            format!("command {command_id} brought about {events} events, and the last {left} of them do not follow")
        };
        self.present.violate(INVENTORY, sequence, problem);
    }

    /// The product of an event that `chains` let pass.
    fn known(&mut self, place: Option<u32>) -> &mut Registered {
        let place = place.expect("an event of an unregistered product does not chain") as usize;
        self.products[place].registered.as_deref_mut().expect("an event of an unregistered product does not chain")
    }

    fn check_sku(&mut self, sequence: u64, place: Option<u32>, sku: &Sku) {
        let product = self.known(place);
        if product.details.sku != *sku {
            let known = product.details.sku.clone();
            self.chained.violate(INVENTORY, sequence, || format!("the event's sku is {sku}, the product's is {known}"));
        }
    }

    // ── 4, 5 and 10: what a change of stock means ──

    fn movement(
        &mut self,
        message: &StoredMessage,
        place: Option<u32>,
        updated: &InventoryUpdated,
    ) -> Option<DecisionRow> {
        let sequence = message.sequence;
        self.check_sku(sequence, place, &updated.sku);
        self.totals.movements += 1;
        let delta = i64::from(updated.new_quantity) - i64::from(updated.previous_quantity);
        let batch = self.totals.batches;
        let product = self.known(place);
        match updated.trigger {
            Trigger::AdminUpdate if !product.moved && product.registered_in == batch => product.initial += delta,
            Trigger::AdminUpdate => product.admin += delta,
            Trigger::ScheduledSync => product.sync += delta,
            Trigger::OrderConfirmed => {}
        }
        product.moved = true;
        product.quantity = updated.new_quantity;
        product.sequence = sequence;
        product.updated_at = message.stored_at;
        let active = product.details.active;
        let place = place.expect("known above");
        if is_available(updated.previous_quantity) != is_available(updated.new_quantity) {
            self.crossings_seen += 1;
            self.crossings.entry(place).or_default().push_back(sequence);
        }
        // Whatever its trigger: an event that carries an order's id says to every reader that the order succeeded.
        match (updated.trigger, updated.order_id) {
            (Trigger::OrderConfirmed, None) => {
                let problem = || "the trigger is ORDER_CONFIRMED and no order is named".to_owned();
                self.decided.violate(INVENTORY, sequence, problem);
            }
            (Trigger::AdminUpdate | Trigger::ScheduledSync, Some(order)) => {
                let problem = || format!("order {order} is named and the trigger is {}", updated.trigger);
                self.decided.violate(INVENTORY, sequence, problem);
            }
            _ => {}
        }
        let order = updated.order_id?;
        self.allocated_line(message, order, Line { product: place, quantity: 0 }, delta, active)
    }

    fn allocated_line(
        &mut self,
        message: &StoredMessage,
        order: OrderId,
        line: Line,
        delta: i64,
        active: bool,
    ) -> Option<DecisionRow> {
        let sequence = message.sequence;
        let product = self.products[line.product as usize].id;
        if !active {
            let problem = || format!("order {order} took from product {product}, which was not for sale");
            self.decided.violate(INVENTORY, sequence, problem);
        }
        let taken = u32::try_from(-delta).unwrap_or(0);
        if taken == 0 {
            let problem = || format!("order {order} added {delta} to product {product} where orders take away");
            self.decided.violate(INVENTORY, sequence, problem);
        }
        let line = Line { quantity: taken, ..line };
        if let Some(&index) = self.allocation_of.get(&order) {
            let allocation = &mut self.allocations[index];
            if allocation.lines.iter().any(|earlier| earlier.product == line.product) {
                let problem = || format!("order {order} took from product {product} twice in one batch");
                self.decided.violate(INVENTORY, sequence, problem);
            }
            allocation.lines.push(line);
            return None;
        }
        let first = self.decide(sequence, order, Outcome::Allocated);
        self.allocation_of.insert(order, self.allocations.len());
        self.allocations.push(Allocation { order, sequence, lines: vec![line], repeated: !first });
        first.then(|| {
            self.totals.orders_allocated += 1;
            DecisionRow {
                sequence,
                order_id: order.0,
                outcome: Cow::Borrowed("allocated"),
                reason: None,
                items: None,
                decided_at: micros(message.stored_at),
            }
        })
    }

    /// Records a decision; false, and a violation, when there is one already.
    fn decide(&mut self, sequence: u64, order: OrderId, outcome: Outcome) -> bool {
        let entry = self.orders.entry(order).or_insert(OrderEntry {
            published_at: 0,
            decided_at: 0,
            wish: Span { start: 0, len: 0 },
            outcome: Outcome::Undecided,
            dead: false,
        });
        if entry.outcome != Outcome::Undecided {
            let OrderEntry { outcome: earlier, decided_at, .. } = *entry;
            let problem = || format!("order {order} is {outcome}, but sequence {decided_at} {earlier} it already");
            self.decided.violate(INVENTORY, sequence, problem);
            return false;
        }
        entry.outcome = outcome;
        entry.decided_at = sequence;
        if entry.published_at == 0 {
            self.unpublished += 1;
        }
        true
    }

    /// Every wish that was published under this order's id. More than one is a publisher's mistake; the decision must
    /// then fit one of them, whichever was delivered first.
    fn wishes(&self, order: &OrderId) -> Vec<Span> {
        let Some(entry) = self.orders.get(order).filter(|entry| entry.published_at != 0) else {
            return Vec::new();
        };
        let others = self.other_wishes.get(order).into_iter().flatten().copied();
        std::iter::once(entry.wish).chain(others).collect()
    }

    fn judge_allocation(&mut self, allocation: Allocation) {
        let Allocation { order, sequence, mut lines, repeated } = allocation;
        if repeated {
            return;
        }
        lines.sort_unstable();
        let wishes = self.wishes(&order);
        self.lines_compared += lines.len() as u64;
        let wished = match wishes.iter().find(|wish| self.lines[wish.range()] == lines) {
            Some(wish) => Some(*wish),
            None => {
                if let Some(first) = wishes.first() {
                    let (wished, taken) =
                        (self.describe_lines(&self.lines[first.range()]), self.describe_lines(&lines));
                    let problem = || format!("order {order} wants {wished} and took {taken}");
                    self.decided.violate(INVENTORY, sequence, problem);
                }
                wishes.first().copied()
            }
        };
        // What was ordered, not what the events say was taken: the balance is to be an independent sum.
        let ordered = wished.map_or(lines, |wish| self.lines[wish.range()].to_vec());
        for Line { product, quantity } in ordered {
            if let Some(product) = self.products[product as usize].registered.as_deref_mut() {
                product.allocated += i64::from(quantity);
            }
        }
    }

    fn describe_lines(&self, lines: &[Line]) -> String {
        let shown = lines.iter().take(MAX_LINES_IN_A_SENTENCE);
        let mut parts: Vec<String> =
            shown.map(|line| format!("{} of {}", line.quantity, self.products[line.product as usize].id)).collect();
        if lines.len() > MAX_LINES_IN_A_SENTENCE {
            parts.push(format!("{} more lines", lines.len() - MAX_LINES_IN_A_SENTENCE));
        }
        if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
    }

    // ── 4: refusals ──

    fn refusal(&mut self, message: &StoredMessage, failed: &InventoryUpdateFailed) -> Option<DecisionRow> {
        let sequence = message.sequence;
        let order = failed.order_id;
        if !self.decide(sequence, order, Outcome::Refused) {
            return None;
        }
        match failed.reason {
            FailureReason::InsufficientStock => self.totals.refused_insufficient_stock += 1,
            FailureReason::UnknownProduct => self.totals.refused_unknown_product += 1,
            FailureReason::ProductInactive => self.totals.refused_product_inactive += 1,
        }
        if let Some(problem) = self.untrue(failed) {
            self.decided.violate(INVENTORY, sequence, || problem);
        }
        Some(DecisionRow {
            sequence,
            order_id: order.0,
            outcome: Cow::Borrowed("refused"),
            reason: Some(Cow::Borrowed(failed.reason.as_str())),
            items: serde_json::to_value(&failed.items).ok(),
            decided_at: micros(message.stored_at),
        })
    }

    /// What is untrue about a refusal, given the state right before it.
    fn untrue(&self, failed: &InventoryUpdateFailed) -> Option<String> {
        let InventoryUpdateFailed { order_id, reason, items } = failed;
        let mut stated = items.clone();
        stated.sort_unstable_by_key(|item| item.product_id);
        let wishes = self.wishes(order_id);
        if wishes.is_empty() {
            // Without the order the refusal can still be false about what it does name.
            let lines: Vec<(ProductId, u32)> = items.iter().map(|item| (item.product_id, item.requested)).collect();
            return self.compare_refusal(*order_id, *reason, &stated, &lines);
        }
        let mut problem = None;
        for wish in wishes {
            let lines: Vec<(ProductId, u32)> = self.lines[wish.range()]
                .iter()
                .map(|line| (self.products[line.product as usize].id, line.quantity))
                .collect();
            let found = self.compare_refusal(*order_id, *reason, &stated, &lines)?;
            problem.get_or_insert(found);
        }
        problem
    }

    fn compare_refusal(
        &self,
        order: OrderId,
        reason: FailureReason,
        stated: &[FailedItem],
        lines: &[(ProductId, u32)],
    ) -> Option<String> {
        let Some((due_reason, due)) = self.due_refusal(lines) else {
            return Some(format!("order {order} is refused for {reason}, but all it wants was there"));
        };
        if due_reason != reason {
            return Some(format!("order {order} is refused for {reason} where {due_reason} was due"));
        }
        if due != stated {
            let (stated, due) = (describe_items(stated), describe_items(&due));
            return Some(format!("order {order} is refused for {reason} of {stated}; true was {due}"));
        }
        None
    }

    /// How these lines must be refused now, or `None` when they must not. The gravest reason wins.
    fn due_refusal(&self, lines: &[(ProductId, u32)]) -> Option<(FailureReason, Vec<FailedItem>)> {
        let mut failing: [Vec<FailedItem>; 3] = Default::default();
        for &(product_id, requested) in lines {
            let product = self.places.get(&product_id).and_then(|place| self.registered(*place));
            let gravity = match product {
                None => 0,
                Some(product) if !product.details.active => 1,
                Some(product) if product.quantity < requested => 2,
                Some(_) => continue,
            };
            failing[gravity].push(FailedItem {
                product_id,
                sku: product.map(|product| product.details.sku.clone()),
                requested,
                available: product.map_or(0, |product| product.quantity),
            });
        }
        let gravest = [FailureReason::UnknownProduct, FailureReason::ProductInactive, FailureReason::InsufficientStock];
        let (reason, mut items) = gravest.into_iter().zip(failing).find(|(_, items)| !items.is_empty())?;
        items.sort_unstable_by_key(|item| item.product_id);
        Some((reason, items))
    }

    // ── 10: availability ──

    fn changed_fields(&mut self, sequence: u64, place: Option<u32>, updated: &ProductUpdated) {
        if !updated.changed_fields.contains(&ChangedField::IsAvailable) {
            return;
        }
        let place = place.expect("an event of an unregistered product does not chain");
        let product = updated.product_id;
        if self.crossings.get_mut(&place).and_then(VecDeque::pop_front).is_none() {
            let problem = || format!("isAvailable of product {product} is named and did not change in this batch");
            self.available.violate(INVENTORY, sequence, problem);
        }
        if !updated.changed_fields.contains(&ChangedField::StockQuantity) {
            let problem = || format!("isAvailable of product {product} is named without stockQuantity");
            self.available.violate(INVENTORY, sequence, problem);
        }
    }

    // ── 7: what the projection must hold ──

    /// The rows of `products` as of now, in the order of their ids.
    pub fn product_rows(&self) -> impl Iterator<Item = ProductRow> {
        let mut known: Vec<&Registered> =
            self.products.iter().filter_map(|product| product.registered.as_deref()).collect();
        known.sort_unstable_by_key(|product| product.details.product_id);
        known.into_iter().map(|product| {
            let ProductDetails { product_id, sku, name, category, low_stock_threshold, active } = &product.details;
            ProductRow {
                product_id: product_id.0,
                sku: sku.as_str().to_owned(),
                name: name.to_string(),
                category: category.as_deref().map(str::to_owned),
                low_stock_threshold: low_stock_threshold.map(i64::from),
                active: *active,
                quantity: i64::from(product.quantity),
                is_available: is_available(product.quantity),
                sequence: product.sequence,
                registered_sequence: product.registered_sequence,
                registered_at: micros(product.registered_at),
                updated_at: micros(product.updated_at),
            }
        })
    }

    // ── The end ──

    /// Judges what can only be judged at the end.
    #[must_use]
    pub fn finish(mut self, evidence: Evidence) -> Report {
        self.abandon_batch();
        self.judge_lost_orders(evidence.letters_removed);
        self.judge_balance();
        let undecided = self.orders.values().filter(|entry| entry.outcome == Outcome::Undecided).count();
        self.totals.orders_undecided = undecided as u64;
        let as_of = AsOf {
            inventory_sequence: self.sequence,
            orders_sequence: evidence.orders_sequence,
            orders_ack_floor: self.ack_floor,
            projection_checkpoint: evidence.projection.checkpoint(),
        };
        let totals = self.totals;

        let mut present = self.present;
        if self.ack_floor.is_none() {
            present.notes.push(
                "whether acknowledged orders are decided is not checked: there is no consumer product-orders"
                    .to_owned(),
            );
        }
        let mut decided = self.decided;
        if self.unpublished > 0 {
            decided.notes.push(format!(
                "{} decided orders are not in ORDERS any more; only what their events say was checked",
                self.unpublished
            ));
        }
        if !self.other_wishes.is_empty() {
            decided.notes.push(format!(
                "{} orders were published with different lines under one id; the decision fits one of them or is named",
                self.other_wishes.len()
            ));
        }
        let mut gapless = self.gapless;
        match &evidence.configuration {
            Ok(differences) => {
                for difference in differences {
                    gapless.violate("configuration", None, || difference.clone());
                }
            }
            Err(problem) => gapless.violate("configuration", None, || problem.clone()),
        }

        let orders_decided = totals.orders_allocated + totals.orders_refused();
        let invariants = vec![
            present.conclude(
                1,
                "every acknowledged write is present, unchanged, once",
                &[
                    ("event ids", self.event_ids.len() as u64),
                    ("acknowledged orders", self.acknowledged),
                    ("answers under a key", totals.commands_answered),
                ],
            ),
            self.whole.conclude(
                2,
                "batches are whole and expect the sequence before them",
                &[("batches", totals.batches), ("messages", totals.messages)],
            ),
            self.chained.conclude(
                3,
                "quantities form a chain per product, key and payload agree, nothing is foreign",
                &[("changes of stock", totals.movements), ("products", totals.products)],
            ),
            decided.conclude(
                4,
                "every order is decided exactly once, as it was placed and as the stock then was",
                &[
                    ("orders", orders_decided),
                    ("allocated", totals.orders_allocated),
                    ("refused", totals.orders_refused()),
                    ("lines", self.lines_compared),
                ],
            ),
            self.balanced.conclude(
                5,
                "initial + admin + reconciliations - allocated orders = stock",
                &[
                    ("products", totals.products),
                    ("units in stock", u64::try_from(totals.stock_units).unwrap_or(u64::MAX)),
                ],
            ),
            gapless.conclude(
                6,
                "the stream starts at 1, has no gaps, and is configured as defined",
                &[("messages", totals.messages)],
            ),
            evidence.projection.conclude(),
            self.available.conclude(
                10,
                "isAvailable is quantity > 0 at every sequence, and every change of it is announced",
                &[("changes of availability", self.crossings_seen)],
            ),
        ];
        Report { as_of, invariants, totals }
    }

    fn judge_lost_orders(&mut self, letters_removed: u64) {
        let Some(floor) = self.ack_floor else { return };
        let mut lost: Vec<(u64, OrderId)> = self
            .orders
            .iter()
            .filter(|(_, entry)| {
                entry.outcome == Outcome::Undecided && !entry.dead && (1..=floor).contains(&entry.published_at)
            })
            .map(|(order, entry)| (entry.published_at, *order))
            .collect();
        lost.sort_unstable();
        for (sequence, order) in lost {
            let problem = || format!("order {order} was acknowledged, but is neither decided nor in the dead letters");
            self.present.violate(ORDERS, sequence, problem);
        }
        let without_letter = std::mem::take(&mut self.without_letter);
        let missing = without_letter.len() as u64;
        if missing > letters_removed {
            for (sequence, malformed) in without_letter {
                let problem =
                    || format!("the message was acknowledged, is no order and not in the dead letters ({malformed})");
                self.present.violate(ORDERS, sequence, problem);
            }
        } else if missing > 0 {
            self.present.notes.push(format!(
                "{missing} malformed orders have no dead letter; {letters_removed} letters were redriven or removed, \
                 which explains it"
            ));
        }
    }

    fn judge_balance(&mut self) {
        let Self { products, totals, balanced, .. } = self;
        for Registered { details, quantity, sequence, initial, admin, sync, allocated, .. } in
            products.iter().filter_map(|product| product.registered.as_deref())
        {
            totals.initial_units += i128::from(*initial);
            totals.admin_units += i128::from(*admin);
            totals.sync_units += i128::from(*sync);
            totals.allocated_units += i128::from(*allocated);
            totals.stock_units += i128::from(*quantity);
            if initial + admin + sync - allocated != i64::from(*quantity) {
                balanced.violate(INVENTORY, *sequence, || {
                    format!(
                        "product {}: initial {initial} + admin {admin} + reconciliations {sync} - allocated {allocated} \
                         is {}, the stock is {quantity}",
                        details.product_id,
                        initial + admin + sync - allocated,
                    )
                });
            }
        }
        let sum = totals.initial_units + totals.admin_units + totals.sync_units - totals.allocated_units;
        if sum != totals.stock_units {
            balanced.violate(INVENTORY, None, || {
                format!("in total the changes add up to {sum}, the stock to {}", totals.stock_units)
            });
        }
    }
}

impl Span {
    fn range(self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        start..start + usize::from(self.len)
    }
}

impl Projection {
    const fn checkpoint(&self) -> Option<u64> {
        match self {
            Self::NotChecked(_) | Self::Unreadable(_) => None,
            Self::AheadOfStream { checkpoint } | Self::Compared { checkpoint, .. } => Some(*checkpoint),
        }
    }

    fn conclude(self) -> Invariant {
        const HOLDS: &str = "the projection at its checkpoint equals the fold up to there";
        let mut findings = Findings::default();
        match self {
            Self::NotChecked(why) => {
                findings.notes.push(format!("not checked: {why}"));
                let invariant = findings.conclude(7, HOLDS, &[]);
                return Invariant { status: Status::NotChecked, ..invariant };
            }
            Self::Unreadable(why) => findings.violate("projection", None, || why),
            Self::AheadOfStream { checkpoint } => findings.violate("projection", checkpoint, || {
                "the checkpoint is beyond the end of the stream: the stream went backwards, or the projection belongs \
                 to another one; restore the stream or rebuild the projection"
                    .to_owned()
            }),
            Self::Compared { checkpoint, skipped, skipped_by_fold, tables } => {
                if skipped != skipped_by_fold {
                    findings.violate("checkpoint", checkpoint, || {
                        format!("the projection skipped {skipped} messages, {skipped_by_fold} are not ours")
                    });
                }
                for table in &tables {
                    findings.violations += table.differences;
                    let room = MAX_NAMED.saturating_sub(findings.first.len());
                    findings.first.extend(table.first.iter().take(room).cloned());
                    if table.differences == 0 && table.fold_sha256 != table.projection_sha256 {
                        findings.violate(table.table, None, || {
                            "the digests differ though no row does: rows do not come in the order of their keys"
                                .to_owned()
                        });
                    }
                    let TableReport { table, fold_sha256, projection_sha256, .. } = table;
                    findings.notes.push(if fold_sha256 == projection_sha256 {
                        format!("{table}: sha256 {fold_sha256}")
                    } else {
                        format!("{table}: sha256 {fold_sha256} by the fold, {projection_sha256} by the projection")
                    });
                }
                let rows: Vec<(&str, u64)> = tables.iter().map(|table| (table.table, table.fold_rows)).collect();
                return findings.conclude(7, HOLDS, &rows);
            }
        }
        findings.conclude(7, HOLDS, &[])
    }
}

fn is_available(quantity: u32) -> bool {
    quantity > OUT_OF_STOCK_THRESHOLD
}

fn movement_row(message: &StoredMessage, event_id: Uuid, at: Timestamp, updated: &InventoryUpdated) -> MovementRow {
    MovementRow {
        sequence: message.sequence,
        product_id: updated.product_id.0,
        previous_quantity: i64::from(updated.previous_quantity),
        new_quantity: i64::from(updated.new_quantity),
        trigger: Cow::Borrowed(updated.trigger.as_str()),
        order_id: updated.order_id.map(|order| order.0),
        updated_by: match updated.updated_by {
            UpdatedBy::System => None,
            UpdatedBy::User(user) => Some(user),
        },
        reason: message.carried.reason.clone(),
        event_id,
        occurred_at: micros(at.get()),
        stored_at: micros(message.stored_at),
    }
}

fn count_row(message: &StoredMessage, event_id: Uuid, counted: &InventoryCounted) -> CountRow {
    CountRow {
        sequence: message.sequence,
        product_id: counted.product_id.0,
        quantity: i64::from(counted.quantity),
        counted_at: micros(counted.counted_at.get()),
        counted_by: match counted.counted_by {
            CountedBy::Warehouse => None,
            CountedBy::User(user) => Some(user),
        },
        event_id,
        stored_at: micros(message.stored_at),
    }
}

fn describe_items(items: &[FailedItem]) -> String {
    let shown = items.iter().take(MAX_LINES_IN_A_SENTENCE);
    let mut parts: Vec<String> = shown
        .map(|item| {
            let sku = item.sku.as_ref().map_or("no sku", Sku::as_str);
            format!("{} ({sku}) requested {} available {}", item.product_id, item.requested, item.available)
        })
        .collect();
    if items.len() > MAX_LINES_IN_A_SENTENCE {
        parts.push(format!("{} more", items.len() - MAX_LINES_IN_A_SENTENCE));
    }
    if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
}
