//! What a batch of messages changes: the pure part of projecting, the same for the projector and for a rebuild.
//!
//! Owns what is remembered of products between batches. Assumes that whoever folds is the only one who writes the tables.

use hashbrown::hash_map::Entry;
use hashbrown::{HashMap, HashSet};
use lomash_contract::{
    Envelope, Foreign, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, ProductDetails,
    ProductId, ProductRegistered, ProductRevised, chains,
};
use lomash_ledger::StoredMessage;
use time::OffsetDateTime;
use tracing::error;
use uuid::Uuid;

/// Products of which it is remembered what the tables say, so that they need not be asked for each of their events: some
/// 30 MB.
const KNOWN_PRODUCTS: usize = 900_000;

/// Products while messages are folded over them: what the tables have of them, and what is to be written.
///
/// Whoever folds is the only one who writes the tables, so what was loaded or written once need not be read again.
#[derive(Default)]
pub(crate) struct Products {
    /// Whose tables: the identity of the checkpoint's, see [`Products::of_table`].
    table: u32,
    /// As the tables have them.
    known: HashMap<ProductId, Known>,
    /// Rows of `stock` that the tables do not have so yet.
    pub(crate) stock: HashMap<ProductId, StockRow>,
    /// The same of `products`. They change rarely, and their indexes are dear.
    pub(crate) details: HashMap<ProductId, DetailsRow>,
}

/// Of a row of `stock`, what the next event does not say by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) quantity: u32,
    pub(crate) threshold: Option<u32>,
}

/// A row of `stock` to be written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StockRow {
    pub(crate) now: Known,
    pub(crate) sequence: u64,
    pub(crate) updated_at: OffsetDateTime,
    /// Whether the table has no row of the product.
    pub(crate) is_new: bool,
}

/// A row of `products` to be written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct DetailsRow {
    pub(crate) details: ProductDetails,
    /// Of the registration, when that is to be written too.
    pub(crate) registered: Option<(u64, OffsetDateTime)>,
}

impl Products {
    /// What is remembered, if it is of the tables that are there now; nothing otherwise. A rebuild puts others in their place,
    /// which may say something else.
    pub(crate) fn of_table(self, table: u32) -> Self {
        if self.table == table { self } else { Self { table, ..Self::default() } }
    }

    /// Takes in what the tables say.
    pub(crate) fn learn(&mut self, rows: impl IntoIterator<Item = (ProductId, Known)>) {
        self.known.extend(rows);
    }

    /// The products that `batch` is about and of which nothing is known here.
    pub(crate) fn unknown(&self, batch: &[Parsed]) -> Vec<Uuid> {
        let mut unknown: Vec<Uuid> = batch
            .iter()
            .flatten()
            .filter(|envelope| {
                !matches!(envelope.payload, LedgerEvent::InventoryUpdateFailed(_) | LedgerEvent::CommandAnswered(_))
            })
            .map(|envelope| envelope.payload.key())
            .filter(|key| self.of(ProductId(*key)).is_none())
            .collect();
        unknown.sort_unstable();
        unknown.dedup();
        unknown
    }

    fn of(&self, product_id: ProductId) -> Option<Known> {
        self.stock.get(&product_id).map(|row| row.now).or_else(|| self.known.get(&product_id).copied())
    }

    /// The row of a product that there is, changed by this message.
    fn touch(&mut self, product_id: ProductId, message: &StoredMessage) -> Option<&mut Known> {
        let (sequence, updated_at) = (message.sequence, message.stored_at);
        let row = match self.stock.entry(product_id) {
            Entry::Occupied(row) => row.into_mut(),
            Entry::Vacant(place) => {
                let now = *self.known.get(&product_id)?;
                place.insert(StockRow { now, sequence, updated_at, is_new: false })
            }
        };
        (row.sequence, row.updated_at) = (sequence, updated_at);
        Some(&mut row.now)
    }

    fn register(&mut self, details: ProductDetails, message: &StoredMessage) {
        let (sequence, updated_at) = (message.sequence, message.stored_at);
        let now = Known { quantity: 0, threshold: details.low_stock_threshold };
        let product_id = details.product_id;
        self.stock.insert(product_id, StockRow { now, sequence, updated_at, is_new: true });
        self.details.insert(product_id, DetailsRow { details, registered: Some((sequence, updated_at)) });
    }

    fn revise(&mut self, details: ProductDetails, message: &StoredMessage) {
        let product_id = details.product_id;
        if let Some(now) = self.touch(product_id, message) {
            now.threshold = details.low_stock_threshold;
            let registered = self.details.get(&product_id).and_then(|row| row.registered);
            self.details.insert(product_id, DetailsRow { details, registered });
        }
    }

    /// The tables have it all now.
    pub(crate) fn written(&mut self) {
        self.details.clear();
        self.known.extend(self.stock.drain().map(|(product_id, row)| (product_id, row.now)));
    }

    /// Forgets what the tables have when it is more than [`KNOWN_PRODUCTS`]: it can be asked for again.
    pub(crate) fn bound(&mut self) {
        if self.known.len() > KNOWN_PRODUCTS {
            self.known = HashMap::new();
        }
    }
}

/// One change of stock, and with which message it came.
pub(crate) struct Movement<'m> {
    pub(crate) message: &'m StoredMessage,
    pub(crate) event_id: Uuid,
    pub(crate) occurred_at: OffsetDateTime,
    pub(crate) updated: InventoryUpdated,
}

/// A count, and with which message it came.
pub(crate) struct Count<'m> {
    pub(crate) message: &'m StoredMessage,
    pub(crate) event_id: Uuid,
    pub(crate) counted: InventoryCounted,
}

pub(crate) enum OrderDecision {
    Allocated,
    Refused(InventoryUpdateFailed),
}

/// What was decided of an order, with the sequence of its first event and when that was stored.
pub(crate) struct OrderDecided {
    pub(crate) order_id: OrderId,
    pub(crate) sequence: u64,
    pub(crate) decided_at: OffsetDateTime,
    pub(crate) decision: OrderDecision,
}

/// What a batch of messages changes.
#[derive(Default)]
pub(crate) struct Changes<'m> {
    pub(crate) products: Products,
    pub(crate) movements: Vec<Movement<'m>>,
    pub(crate) counts: Vec<Count<'m>>,
    pub(crate) decisions: Vec<OrderDecided>,
    decided: HashSet<OrderId>,
    pub(crate) skipped: u64,
}

impl<'m> Changes<'m> {
    /// Nothing yet, over these products as they are.
    pub(crate) fn over(products: Products) -> Self {
        Self { products, ..Self::default() }
    }

    /// Takes one message in, or skips it by the rule that every reader applies.
    pub(crate) fn fold(&mut self, message: &'m StoredMessage, parsed: Parsed) {
        let admitted = parsed.and_then(|envelope| {
            let stock = self.products.of(ProductId(envelope.payload.key())).map(|now| now.quantity);
            chains(&envelope.payload, stock).map(|()| envelope)
        });
        let envelope = match admitted {
            Ok(envelope) => envelope,
            Err(foreign) => {
                error!(sequence = message.sequence, subject = message.subject, reason = %foreign, "skipped: not ours");
                self.skipped += 1;
                return;
            }
        };
        match envelope.payload {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => self.products.register(details, message),
            LedgerEvent::ProductRevised(ProductRevised(details)) => self.products.revise(details, message),
            LedgerEvent::InventoryUpdated(updated) => {
                if let Some(now) = self.products.touch(updated.product_id, message) {
                    now.quantity = updated.new_quantity;
                }
                if let Some(order_id) = updated.order_id {
                    self.decide(order_id, message, OrderDecision::Allocated);
                }
                let (event_id, occurred_at) = (envelope.event_id.0, envelope.timestamp.get());
                self.movements.push(Movement { message, event_id, occurred_at, updated });
            }
            LedgerEvent::InventoryUpdateFailed(failed) => {
                self.decide(failed.order_id, message, OrderDecision::Refused(failed));
            }
            LedgerEvent::InventoryCounted(counted) => {
                self.counts.push(Count { message, event_id: envelope.event_id.0, counted });
            }
            LedgerEvent::ProductUpdated(_) | LedgerEvent::CommandAnswered(_) => {}
        }
    }

    /// The first event of an order is its decision; the others are its further lines.
    fn decide(&mut self, order_id: OrderId, message: &StoredMessage, decision: OrderDecision) {
        if self.decided.insert(order_id) {
            let (sequence, decided_at) = (message.sequence, message.stored_at);
            self.decisions.push(OrderDecided { order_id, sequence, decided_at, decision });
        }
    }
}

/// A message by the stateless half of the rule that every reader applies.
pub(crate) type Parsed = Result<Envelope<LedgerEvent>, Foreign>;

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
