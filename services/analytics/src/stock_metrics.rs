//! What the stock metrics are: the fold of the ledger's events into stock levels, days of products, and totals.
//!
//! Pure: no I/O, no clock, no randomness. It decides what counts as what; the tables of `sql/analytics/` are its state, and
//! the projection loads the rows that events touch, folds over them, and writes those that changed. Because all that the
//! fold remembers is in those rows, it may be cut after any event: folding 1..n and then n+1..m is folding 1..m.
//!
//! A day is a UTC day of the server's store time. Should that ever go backwards, the clock of the fold stands still.
//!
//! # What counts as what
//! - *Sold*: units that allocated orders took (`ORDER_CONFIRMED`).
//! - *Adjusted*: units that admins added or took away (`ADMIN_UPDATE`), each way apart. A product's first stock is one.
//! - *Corrected*: the same by reconciliation (`SCHEDULED_SYNC`): stock that was found or lost, not bought or sold.
//! - *Refused*: units that refused orders wanted of the products because of which they were refused. What else such an order
//!   wanted is not in the event.
//! - *Out of stock*: the time from the event that left a product without stock (its registration, if it came without any)
//!   to the event that gave it some. An interval belongs to each day in which it lies. A day's row holds what ended on that
//!   day and where an open interval begins; the open one is counted by who reads ([`ProductDay::out_of_stock`]), up to the
//!   end of the day or to now. A day without a row is as the day before ended ([`ProductDay::carried_to`]).

use std::collections::BTreeMap;

use hashbrown::HashMap;
use lomash_contract::limits::{LOW_STOCK_THRESHOLD, OUT_OF_STOCK_THRESHOLD};
use lomash_contract::{
    Envelope, FailureReason, Foreign, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, ProductDetails,
    ProductId, ProductRegistered, ProductRevised, Trigger, chains,
};
use time::{Date, Duration, OffsetDateTime, UtcOffset};

/// Days of the window over which velocity is measured, when nobody says otherwise: four weeks, so that each day of the
/// week weighs the same.
pub const WINDOW_DAYS: u16 = 28;

/// A message by the stateless half of the rule that every reader applies.
pub type Parsed = Result<Envelope<LedgerEvent>, Foreign>;

/// Where a fold stands, and what it must remember there besides rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The last sequence that is folded in.
    pub sequence: u64,
    /// Messages up to there that were not ours.
    pub skipped: u64,
    /// Store time of the last one; never goes back.
    pub clock: OffsetDateTime,
    /// The order of the last allocated line.
    pub last_order: Option<OrderId>,
    /// All products together.
    pub totals: Totals,
}

impl Default for Position {
    fn default() -> Self {
        let clock = OffsetDateTime::UNIX_EPOCH;
        Self { sequence: 0, skipped: 0, clock, last_order: None, totals: Totals::default() }
    }
}

/// All products together, now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Products.
    pub products: i64,
    /// Those for sale.
    pub active_products: i64,
    /// Of those, without any stock.
    pub out_of_stock_products: i64,
    /// Of those, at or below their threshold.
    pub low_stock_products: i64,
    /// Units of all products.
    pub units_in_stock: i64,
}

/// A product as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Product {
    /// What it is called, whether it is for sale, its threshold.
    pub details: ProductDetails,
    /// Units in stock.
    pub quantity: u32,
    /// Since when there are none.
    pub out_of_stock_since: Option<OffsetDateTime>,
    /// When it joined.
    pub registered_at: OffsetDateTime,
    /// When details or stock changed last, and with which event.
    pub updated_at: OffsetDateTime,
    /// See there.
    pub sequence: u64,
}

/// What happened to a product on a day.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProductDay {
    /// Units that orders took.
    pub units_sold: i64,
    /// Orders that took some.
    pub orders_allocated: i64,
    /// What admins did.
    pub adjusted: Changes,
    /// What reconciliation did.
    pub corrected: Changes,
    /// Orders that were refused because of it.
    pub orders_refused: i64,
    /// Units that they wanted, by reason; of an unknown product there is no row.
    pub units_refused: ByReason,
    /// How often its stock went to 0.
    pub stock_outs: i64,
    /// Microseconds without stock, in intervals that ended on this day.
    pub out_of_stock_us: i64,
    /// Beginning within this day of the interval that is open at its end.
    pub out_of_stock_since: Option<OffsetDateTime>,
    /// Units at its end.
    pub closing_quantity: u32,
}

/// What happened to all products on a day.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Day {
    /// Events of ours.
    pub events: i64,
    /// Products that joined.
    pub products_registered: i64,
    /// Units that orders took.
    pub units_sold: i64,
    /// Orders that took them, however many lines they had.
    pub orders_allocated: i64,
    /// What admins did.
    pub adjusted: Changes,
    /// What reconciliation did.
    pub corrected: Changes,
    /// Orders that were refused.
    pub orders_refused: ByReason,
    /// Units that they wanted of the products because of which they were refused.
    pub units_refused: ByReason,
    /// How often a stock went to 0.
    pub stock_outs: i64,
}

/// Changes of stock that are no orders: how many, and the units each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// How many.
    pub count: i64,
    /// Units that came.
    pub up: i64,
    /// Units that went.
    pub down: i64,
}

impl Changes {
    fn add(&mut self, change: i64) {
        self.count += 1;
        if change >= 0 { self.up += change } else { self.down -= change }
    }
}

/// Something for each reason of a refusal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ByReason {
    /// There was less than was asked for.
    pub insufficient_stock: i64,
    /// The product is not for sale.
    pub product_inactive: i64,
    /// There is no such product.
    pub unknown_product: i64,
}

impl ByReason {
    fn of(&mut self, reason: FailureReason) -> &mut i64 {
        match reason {
            FailureReason::InsufficientStock => &mut self.insufficient_stock,
            FailureReason::ProductInactive => &mut self.product_inactive,
            FailureReason::UnknownProduct => &mut self.unknown_product,
        }
    }
}

/// The stock at or below which a product is low.
#[must_use]
pub fn threshold(details: &ProductDetails) -> u32 {
    details.low_stock_threshold.unwrap_or(LOW_STOCK_THRESHOLD)
}

const fn is_out(quantity: u32) -> bool {
    let is_available = quantity > OUT_OF_STOCK_THRESHOLD;
    !is_available
}

impl Totals {
    /// What one product adds.
    fn of(product: &Product) -> Self {
        let active = product.details.active;
        let low = product.quantity <= threshold(&product.details);
        Self {
            products: 1,
            active_products: active.into(),
            out_of_stock_products: (active && is_out(product.quantity)).into(),
            low_stock_products: (active && low).into(),
            units_in_stock: product.quantity.into(),
        }
    }

    fn add(&mut self, other: Self, sign: i64) {
        self.products += sign * other.products;
        self.active_products += sign * other.active_products;
        self.out_of_stock_products += sign * other.out_of_stock_products;
        self.low_stock_products += sign * other.low_stock_products;
        self.units_in_stock += sign * other.units_in_stock;
    }
}

impl ProductDay {
    /// A day of `product` before anything happens on it.
    fn opening(product: &Product, day: Date) -> Self {
        let since = product.out_of_stock_since.map(|since| since.max(beginning(day)));
        Self { closing_quantity: product.quantity, out_of_stock_since: since, ..Self::default() }
    }

    /// The later day `day`, on which nothing happened.
    #[must_use]
    pub fn carried_to(&self, day: Date) -> Self {
        let since = self.out_of_stock_since.map(|since| since.max(beginning(day)));
        Self { closing_quantity: self.closing_quantity, out_of_stock_since: since, ..Self::default() }
    }

    /// How long there was no stock on `day`, which this is, as far as it has passed at `now`.
    #[must_use]
    pub fn out_of_stock(&self, day: Date, now: OffsetDateTime) -> Duration {
        let end = day.next_day().map_or(now, |next| beginning(next).min(now));
        let open = self.out_of_stock_since.map_or(Duration::ZERO, |since| (end - since).max(Duration::ZERO));
        Duration::microseconds(self.out_of_stock_us) + open
    }
}

/// How fast a product sells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Velocity {
    /// Units sold within the window.
    pub units: i64,
    /// Days of the window, those without a sale and today among them; of a product that joined later, the days since.
    pub days: u16,
}

impl Velocity {
    /// Units a day.
    #[must_use]
    pub fn units_per_day(self) -> f64 {
        // Exact far beyond any stock: 2^53 units.
        #[allow(clippy::cast_precision_loss)]
        let units = self.units as f64;
        units / f64::from(self.days.max(1))
    }

    /// How many days `quantity` lasts; none when nothing sells.
    #[must_use]
    pub fn days_of_cover(self, quantity: u32) -> Option<f64> {
        (self.units > 0).then(|| f64::from(quantity) / self.units_per_day())
    }
}

/// The UTC day of an instant.
#[must_use]
pub fn day_of(at: OffsetDateTime) -> Date {
    at.to_offset(UtcOffset::UTC).date()
}

fn beginning(day: Date) -> OffsetDateTime {
    day.midnight().assume_utc()
}

/// As precise as the tables are, so that the fold goes on from rows as it would have from memory.
fn in_microseconds(at: OffsetDateTime) -> OffsetDateTime {
    at.replace_microsecond(at.microsecond()).unwrap_or(at)
}

/// What became of a message.
#[derive(Debug, PartialEq, Eq)]
pub enum Folded {
    /// It is in.
    Taken,
    /// It was in already.
    Known,
    /// It is not an event of ours, by the rule that every reader applies.
    Skipped(Foreign),
}

/// The fold: rows, and where it stands. Rows that are not in it and are touched are those of a product or day of which
/// nothing is known: whoever uses it loads first what [`touched`] names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StockMetrics {
    /// Where it stands.
    pub position: Position,
    /// Products.
    pub products: HashMap<ProductId, Tracked<Product>>,
    /// Their days.
    pub product_days: HashMap<(ProductId, Date), Tracked<ProductDay>>,
    /// Days of all products.
    pub days: BTreeMap<Date, Tracked<Day>>,
}

/// A row, and whether the tables do not have it so yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked<T> {
    /// The row.
    pub row: T,
    /// Whether it changed.
    pub changed: bool,
    /// Of a product, whether its details did: they rarely do, and their indexes are dear.
    pub details_changed: bool,
}

impl<T> Tracked<T> {
    /// A row as the tables have it.
    #[must_use]
    pub const fn stored(row: T) -> Self {
        Self { row, changed: false, details_changed: false }
    }

    fn touch(&mut self) -> &mut T {
        self.changed = true;
        &mut self.row
    }
}

/// The products whose rows a message may touch.
pub fn touched(parsed: &Parsed) -> impl Iterator<Item = ProductId> {
    let event = parsed.as_ref().ok().map(|envelope| &envelope.payload);
    let failed = match event {
        Some(LedgerEvent::InventoryUpdateFailed(failed)) => failed.items.as_slice(),
        _ => &[],
    };
    // Of a refusal the key is the order; the rule looks whether there is such a product all the same.
    event.map(|event| ProductId(event.key())).into_iter().chain(failed.iter().map(|item| item.product_id))
}

impl StockMetrics {
    /// Takes one message in, or skips it by the rule that every reader applies. One that is in changes nothing.
    ///
    /// # Panics
    /// When a message is left out before it: whoever uses the fold sees to that.
    pub fn fold(&mut self, sequence: u64, stored_at: OffsetDateTime, parsed: Parsed) -> Folded {
        if sequence <= self.position.sequence {
            return Folded::Known;
        }
        assert_eq!(sequence, self.position.sequence + 1, "the metrics are folded without a gap");
        self.position.sequence = sequence;
        self.position.clock = self.position.clock.max(in_microseconds(stored_at));
        let admitted = parsed.and_then(|envelope| {
            let stock = self.products.get(&ProductId(envelope.payload.key())).map(|product| product.row.quantity);
            chains(&envelope.payload, stock).map(|()| envelope.payload)
        });
        let event = match admitted {
            Ok(event) => event,
            Err(foreign) => {
                self.position.skipped += 1;
                return Folded::Skipped(foreign);
            }
        };
        // For the product service alone: nothing happened.
        if matches!(event, LedgerEvent::CommandAnswered(_)) {
            return Folded::Taken;
        }
        self.today().events += 1;
        match event {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => self.register(details),
            LedgerEvent::ProductRevised(ProductRevised(details)) => self.change(details.product_id, |product| {
                product.details = details;
                true
            }),
            LedgerEvent::InventoryUpdated(updated) => self.update(&updated),
            LedgerEvent::InventoryUpdateFailed(failed) => self.refuse(&failed),
            LedgerEvent::InventoryCounted(_) | LedgerEvent::ProductUpdated(_) | LedgerEvent::CommandAnswered(_) => {}
        }
        Folded::Taken
    }

    fn today(&mut self) -> &mut Day {
        let stored = Tracked::stored(Day::default());
        self.days.entry(day_of(self.position.clock)).or_insert(stored).touch()
    }

    /// Today's row of a product; none when there is no such product.
    fn product_today(&mut self, product_id: ProductId) -> Option<&mut ProductDay> {
        let day = day_of(self.position.clock);
        let product = self.products.get(&product_id)?;
        let row = self.product_days.entry((product_id, day));
        Some(row.or_insert_with(|| Tracked::stored(ProductDay::opening(&product.row, day))).touch())
    }

    /// Changes a product, and the totals with it; the change says whether it was one of details.
    fn change(&mut self, product_id: ProductId, change: impl FnOnce(&mut Product) -> bool) {
        let Position { sequence, clock, totals, .. } = &mut self.position;
        let Some(product) = self.products.get_mut(&product_id) else { return };
        totals.add(Totals::of(&product.row), -1);
        let row = product.touch();
        let of_details = change(row);
        (row.sequence, row.updated_at) = (*sequence, *clock);
        totals.add(Totals::of(&product.row), 1);
        product.details_changed |= of_details;
    }

    fn register(&mut self, details: ProductDetails) {
        let Position { sequence, clock, totals, .. } = &mut self.position;
        let product_id = details.product_id;
        let product = Product {
            details,
            quantity: 0,
            out_of_stock_since: Some(*clock),
            registered_at: *clock,
            updated_at: *clock,
            sequence: *sequence,
        };
        totals.add(Totals::of(&product), 1);
        self.products.insert(product_id, Tracked { row: product, changed: true, details_changed: true });
        self.today().products_registered += 1;
        // Its first day has a row, so that every later day has one to go back to.
        self.product_today(product_id);
    }

    fn update(&mut self, updated: &InventoryUpdated) {
        let InventoryUpdated { product_id, previous_quantity, new_quantity, trigger, order_id, .. } = *updated;
        let clock = self.position.clock;
        let (was_out, is_out) = (is_out(previous_quantity), is_out(new_quantity));
        let change = i64::from(new_quantity) - i64::from(previous_quantity);
        // Before the product changes: a day opens with what the one before left.
        let Some(row) = self.product_today(product_id) else { return };
        match trigger {
            Trigger::OrderConfirmed => {
                row.units_sold -= change;
                row.orders_allocated += i64::from(order_id.is_some());
            }
            Trigger::AdminUpdate => row.adjusted.add(change),
            Trigger::ScheduledSync => row.corrected.add(change),
        }
        if is_out && !was_out {
            row.stock_outs += 1;
            row.out_of_stock_since = Some(clock);
        }
        if was_out
            && !is_out
            && let Some(since) = row.out_of_stock_since.take()
        {
            // Within a day: fits by far.
            row.out_of_stock_us += i64::try_from((clock - since).whole_microseconds()).unwrap_or(i64::MAX);
        }
        row.closing_quantity = new_quantity;
        self.change(product_id, |product| {
            product.quantity = new_quantity;
            product.out_of_stock_since = if is_out { product.out_of_stock_since.or(Some(clock)) } else { None };
            false
        });
        // An order's lines follow each other: its first one is where another order's end.
        let is_another = order_id.is_some() && order_id != self.position.last_order;
        if order_id.is_some() {
            self.position.last_order = order_id;
        }
        let day = self.today();
        day.stock_outs += i64::from(is_out && !was_out);
        match trigger {
            Trigger::OrderConfirmed => {
                day.units_sold -= change;
                day.orders_allocated += i64::from(is_another);
            }
            Trigger::AdminUpdate => day.adjusted.add(change),
            Trigger::ScheduledSync => day.corrected.add(change),
        }
    }

    fn refuse(&mut self, failed: &InventoryUpdateFailed) {
        *self.today().orders_refused.of(failed.reason) += 1;
        for item in &failed.items {
            let units = i64::from(item.requested);
            *self.today().units_refused.of(failed.reason) += units;
            // Rows for ids that anybody can invent would have no bound.
            if failed.reason != FailureReason::UnknownProduct
                && let Some(row) = self.product_today(item.product_id)
            {
                row.orders_refused += 1;
                *row.units_refused.of(failed.reason) += units;
            }
        }
    }
}

#[cfg(test)]
#[path = "stock_metrics_tests.rs"]
mod tests;
