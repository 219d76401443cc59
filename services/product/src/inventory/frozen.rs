//! The state as bytes and back: what a snapshot holds.
//!
//! Pure, like the state itself. [`Frozen`] is a copy that shares what the state does not change, so taking it stops nobody,
//! whatever the state's size. It becomes a [`Head`] and parts, each of bounded size and MessagePack on its own, so that
//! neither writing nor reading needs the whole in memory twice. [`Thawing`] takes them back one by one and believes nothing:
//! bytes that are not the parts of that head are [`Damaged`]. Whether they belong to this ledger is not known here.

use std::sync::Arc;

use lomash_contract::{OrderId, ProductDetails, ProductId, Sku, Timestamp};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use super::decided::PAGE_ORDERS;
use super::products::{PAGE_PRODUCTS, Page};
use super::remembered::{PAGE_COMMANDS, RememberedCommand};
use super::{CountOnRecord, Product, State};

/// Most bytes of a part: 512 products with the longest texts, or the ids of 65,536 orders, and room to spare.
pub const MAX_PART_BYTES: usize = 4 << 20;

/// Bytes of an id.
const ID_BYTES: usize = 16;

/// Fewest bytes of a product: its id, and a byte for each other field.
const LEAST_PRODUCT_BYTES: usize = ID_BYTES + 8;

const _: () = assert!(PAGE_ORDERS * ID_BYTES * 2 <= MAX_PART_BYTES && PAGE_COMMANDS * 80 <= MAX_PART_BYTES);
const _: () = assert!(PAGE_PRODUCTS * 4_096 <= MAX_PART_BYTES, "a sku and two names of 200 characters take 2 kB");

/// A copy of a [`State`] that does not change any more.
#[derive(Clone, Debug)]
pub struct Frozen {
    sequence: u64,
    skipped: u64,
    products: Vec<Arc<Page>>,
    orders: Vec<Arc<Vec<OrderId>>>,
    commands: Vec<Arc<Vec<RememberedCommand>>>,
    /// How many commands at the front of the first page are forgotten.
    forgotten: usize,
}

/// What a snapshot says of itself: where in the ledger it was taken, and how much there must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// The sequence up to which the ledger is folded in.
    pub sequence: u64,
    /// Messages on the way that were not ours.
    pub skipped: u64,
    /// How many products there are.
    pub products: u64,
    /// How many orders were decided.
    pub orders: u64,
    /// How many commands are remembered.
    pub commands: u64,
}

/// A part of the state.
#[derive(Serialize, Deserialize)]
enum Part {
    Products(Vec<SavedProduct>),
    Orders(Ids),
    Commands(Vec<SavedCommand>),
}

/// A product, its fields by position.
#[derive(Serialize, Deserialize)]
struct SavedProduct {
    id: ProductId,
    sku: Sku,
    name: Box<str>,
    category: Option<Box<str>>,
    low_stock_threshold: Option<u32>,
    active: bool,
    quantity: u32,
    version: u64,
    count: Option<(u32, Timestamp, bool)>,
}

/// A remembered command: its id, the fingerprint of its request, where its answer is, when it was answered, by whom.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct SavedCommand(Uuid, u64, u64, i64, Uuid);

impl From<&RememberedCommand> for SavedCommand {
    fn from(command: &RememberedCommand) -> Self {
        let RememberedCommand { command_id, fingerprint, sequence, at_ms, by } = *command;
        Self(command_id, fingerprint, sequence, at_ms, by)
    }
}

/// Ids of orders, one behind the other in one string of bytes.
struct Ids(Vec<OrderId>);

impl Serialize for Ids {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::with_capacity(self.0.len() * ID_BYTES);
        self.0.iter().for_each(|id| bytes.extend_from_slice(id.as_bytes()));
        serializer.serialize_bytes(&bytes)
    }
}

impl<'de> Deserialize<'de> for Ids {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IdsVisitor;
        impl Visitor<'_> for IdsVisitor {
            type Value = Ids;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("ids of 16 bytes each")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Ids, E> {
                let (ids, rest) = bytes.as_chunks::<ID_BYTES>();
                if !rest.is_empty() {
                    return Err(E::invalid_length(bytes.len(), &self));
                }
                Ok(Ids(ids.iter().map(|id| OrderId(Uuid::from_bytes(*id))).collect()))
            }
        }
        deserializer.deserialize_bytes(IdsVisitor)
    }
}

impl From<&Product> for SavedProduct {
    fn from(product: &Product) -> Self {
        let ProductDetails { product_id, sku, name, category, low_stock_threshold, active } =
            (*product.details).clone();
        let count = product.count.as_deref().map(|count| (count.quantity, count.counted_at, count.corrected));
        let (id, quantity, version) = (product_id, product.quantity, product.version);
        Self { id, sku, name, category, low_stock_threshold, active, quantity, version, count }
    }
}

impl From<SavedProduct> for Product {
    fn from(saved: SavedProduct) -> Self {
        let SavedProduct { id: product_id, sku, name, category, low_stock_threshold, active, .. } = saved;
        let details = ProductDetails { product_id, sku, name, category, low_stock_threshold, active };
        let count = saved
            .count
            .map(|(quantity, counted_at, corrected)| Box::new(CountOnRecord { quantity, counted_at, corrected }));
        Self { details: Arc::new(details), quantity: saved.quantity, version: saved.version, count }
    }
}

impl State {
    /// A copy for a snapshot. It takes a moment whatever the state's size: at most a page of ids and a page of remembered
    /// commands are copied, all else is shared until it changes.
    #[must_use]
    pub fn freeze(&self) -> Frozen {
        let (commands, forgotten) = self.remembered.pages();
        Frozen {
            sequence: self.sequence,
            skipped: self.skipped,
            products: self.products.pages(),
            orders: self.decided.pages(),
            commands,
            forgotten,
        }
    }
}

impl Frozen {
    /// What the snapshot says of itself.
    #[must_use]
    pub fn head(&self) -> Head {
        Head {
            sequence: self.sequence,
            skipped: self.skipped,
            products: self.products.iter().map(|page| page.products().count() as u64).sum(),
            orders: self.orders.iter().map(|page| page.len() as u64).sum(),
            commands: (self.commands.iter().map(|page| page.len()).sum::<usize>() - self.forgotten) as u64,
        }
    }

    /// The parts, made one at a time.
    pub fn into_parts(self) -> impl Iterator<Item = Vec<u8>> + Send {
        let products = self.products.into_iter().map(|page| Part::Products(page.products().map(Into::into).collect()));
        let orders = self.orders.into_iter().map(|page| Part::Orders(Ids(page.to_vec())));
        let mut forgotten = self.forgotten;
        let commands = self.commands.into_iter().map(move |page| {
            let kept = &page[std::mem::take(&mut forgotten)..];
            Part::Commands(kept.iter().map(Into::into).collect())
        });
        let parts = products.chain(orders).chain(commands);
        parts.map(|part| rmp_serde::to_vec(&part).expect("the types of a state are always MessagePack"))
    }
}

/// Bytes that are no snapshot, or not a whole one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damaged {
    /// A part cannot be read.
    #[error("a part cannot be read: {0}")]
    Unreadable(String),
    /// Something is in it twice.
    #[error("{what} {id} is in it twice")]
    Twice {
        /// What kind of thing.
        what: &'static str,
        /// Which.
        id: Uuid,
    },
    /// More or less than its head says.
    #[error("it holds {found} {what} where its head says {expected}")]
    Count {
        /// Of what.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many there should be.
        expected: u64,
    },
}

/// A state that is put together again.
#[derive(Debug)]
pub struct Thawing {
    head: Head,
    state: State,
}

impl Thawing {
    /// Begins with nothing but the head. `bytes` is how large all parts are together: no more room is made than they can
    /// fill, whatever the head says.
    #[must_use]
    pub fn begin(head: Head, bytes: usize) -> Self {
        let mut state = State { sequence: head.sequence, skipped: head.skipped, ..State::default() };
        let room = |told: u64, least: usize| usize::try_from(told).unwrap_or(usize::MAX).min(bytes / least);
        state.decided.reserve(room(head.orders, ID_BYTES));
        state.products.reserve(room(head.products, LEAST_PRODUCT_BYTES));
        Self { head, state }
    }

    /// Takes a part in.
    ///
    /// # Errors
    /// [`Damaged`]; what was begun is then worth nothing.
    pub fn take(&mut self, part: &[u8]) -> Result<(), Damaged> {
        let state = &mut self.state;
        match rmp_serde::from_slice(part).map_err(|problem| Damaged::Unreadable(problem.to_string()))? {
            Part::Products(products) => {
                for product in products {
                    let id = product.id;
                    if state.products.get(&id).is_some() {
                        return Err(Damaged::Twice { what: "product", id: id.0 });
                    }
                    state.products.put(product.into());
                }
            }
            Part::Orders(Ids(orders)) => {
                if let Some(order) = orders.into_iter().find(|order| !state.decided.insert(*order)) {
                    return Err(Damaged::Twice { what: "order", id: order.0 });
                }
            }
            Part::Commands(commands) => {
                for SavedCommand(command_id, fingerprint, sequence, at_ms, by) in commands {
                    // One id may be there twice: answered, forgotten by then, and answered again.
                    if state.remembered.get(&command_id).is_some_and(|known| known.sequence >= sequence) {
                        return Err(Damaged::Twice { what: "command", id: command_id });
                    }
                    state.remembered.note(RememberedCommand { command_id, fingerprint, sequence, at_ms, by });
                }
            }
        }
        Ok(())
    }

    /// The state, if all of it is there.
    ///
    /// # Errors
    /// [`Damaged`].
    pub fn finish(self) -> Result<State, Damaged> {
        let Self { head, state } = self;
        for (what, found, expected) in [
            ("products", state.products.len(), head.products),
            ("orders", state.decided.len(), head.orders),
            ("commands", state.remembered.len(), head.commands),
        ] {
            let found = found as u64;
            if found != expected {
                return Err(Damaged::Count { what, found, expected });
            }
        }
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thaw(head: Head, parts: &[Vec<u8>]) -> Result<State, Damaged> {
        let mut thawing = Thawing::begin(head, parts.iter().map(Vec::len).sum());
        parts.iter().try_for_each(|part| thawing.take(part))?;
        thawing.finish()
    }

    /// A state of several pages, as no history of a test makes it.
    fn large() -> State {
        let mut state = State { sequence: 9, skipped: 2, ..State::default() };
        for n in 0..(PAGE_ORDERS + 7) as u128 {
            state.decided.insert(OrderId(Uuid::from_u128(n)));
        }
        for n in 0..(PAGE_PRODUCTS + 7) as u128 {
            let counted_at: Timestamp = "2026-01-31T09:30:00.123Z".parse().expect("a valid instant");
            let count = Some((7, counted_at, n % 2 == 0)).filter(|_| n % 3 == 0);
            let product = SavedProduct {
                id: ProductId(Uuid::from_u128(n)),
                sku: format!("SKU-{n}").parse().expect("a valid sku"),
                name: "Oak base unit, 600 mm".into(),
                category: Some("Kitchens".into()).filter(|_| n % 2 == 0),
                low_stock_threshold: Some(4).filter(|_| n % 5 == 0),
                active: n % 7 != 0,
                quantity: 3,
                version: 8,
                count,
            };
            state.products.put(product.into());
        }
        for n in 0..(PAGE_COMMANDS + 7) as u64 {
            let (command_id, by) = (Uuid::from_u128(n.into()), Uuid::max());
            let at_ms = i64::try_from(n).expect("a small number");
            let command = RememberedCommand { command_id, fingerprint: u64::MAX, sequence: 5 + n, at_ms, by };
            state.remembered.note(command);
        }
        // Some of the first page are forgotten.
        state.remembered.forget_before(lomash_contract::limits::KEYS_KEPT.as_millis() as i64 + 3);
        state
    }

    #[test]
    fn what_is_thawed_is_what_was_frozen_and_nothing_else_is_believed() {
        let state = large();
        let frozen = state.freeze();
        let head = frozen.head();
        let parts: Vec<Vec<u8>> = frozen.into_parts().collect();
        assert_eq!(parts.len(), 6, "two pages of each");
        assert!(parts.iter().all(|part| part.len() <= MAX_PART_BYTES));
        assert_eq!(thaw(head.clone(), &parts).as_ref(), Ok(&state));

        for missing in 0..parts.len() {
            let mut fewer = parts.clone();
            fewer.remove(missing);
            assert!(matches!(thaw(head.clone(), &fewer), Err(Damaged::Count { .. })), "without part {missing}");
            let mut more = parts.clone();
            more.push(parts[missing].clone());
            assert!(matches!(thaw(head.clone(), &more), Err(Damaged::Twice { .. })), "part {missing} twice");
            let mut shorter = parts.clone();
            shorter[missing].pop();
            assert!(matches!(thaw(head.clone(), &shorter), Err(Damaged::Unreadable(_))), "part {missing} cut");
        }
        let boastful = Head { orders: u64::MAX, ..head.clone() };
        assert!(matches!(thaw(boastful, &parts), Err(Damaged::Count { what: "orders", .. })));
        let boastful = Head { products: u64::MAX, ..head };
        assert!(matches!(thaw(boastful, &parts), Err(Damaged::Count { what: "products", .. })));
    }

    #[test]
    fn a_copy_stays_as_it_was_while_the_state_goes_on() {
        let mut state = large();
        let (then, frozen) = (state.clone(), state.freeze());
        state.decided.insert(OrderId(Uuid::from_u128(u128::MAX)));
        for n in [0, PAGE_PRODUCTS as u128] {
            state.products.get_mut(&ProductId(Uuid::from_u128(n))).expect("a product").quantity = 77;
        }
        let (head, parts) = (frozen.head(), frozen.into_parts().collect::<Vec<_>>());
        assert_eq!(thaw(head, &parts), Ok(then));
    }
}
