//! The ids of decided orders: a set that only grows, made for tens of millions.
//!
//! The ids stand one behind the other in pages, in the order in which the orders were decided; beside them an index of
//! their places. That is some 25 bytes an order where a hash set of ids takes up to 39, and a full page never changes, so
//! a copy for a snapshot shares all of them. The index is cut into shards that grow on their own: one table would now and
//! then move millions of entries at once while every order waits.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};
use lomash_contract::OrderId;

/// Orders of a page: 1 MiB, the most that a copy has to copy.
pub(super) const PAGE_ORDERS: usize = 65_536;

/// With ten million orders a shard holds some 40,000, which move in about a millisecond.
const SHARDS: usize = 256;

/// Decided orders.
#[derive(Clone, Debug)]
pub(super) struct Decided {
    full: Vec<Arc<Vec<OrderId>>>,
    open: Vec<OrderId>,
    /// Places of ids in the pages.
    index: Box<[HashTable<u32>]>,
    hasher: DefaultHashBuilder,
}

impl Default for Decided {
    fn default() -> Self {
        let index = std::iter::repeat_with(HashTable::new).take(SHARDS).collect();
        Self { full: Vec::new(), open: Vec::new(), index, hasher: DefaultHashBuilder::default() }
    }
}

/// The same orders, decided in the same sequence.
impl PartialEq for Decided {
    fn eq(&self, other: &Self) -> bool {
        self.full == other.full && self.open == other.open
    }
}

fn hash_of(hasher: &DefaultHashBuilder, order: &OrderId) -> u64 {
    hasher.hash_one(order.0.as_u128())
}

/// Which shard. The table takes its own bits from both ends of the hash.
const fn shard_of(hash: u64) -> usize {
    (hash >> 32) as usize % SHARDS
}

fn at<'a>(full: &'a [Arc<Vec<OrderId>>], open: &'a [OrderId], place: u32) -> &'a OrderId {
    let place = place as usize;
    full.get(place / PAGE_ORDERS).map_or_else(|| &open[place % PAGE_ORDERS], |page| &page[place % PAGE_ORDERS])
}

impl Decided {
    pub(super) const fn len(&self) -> usize {
        self.full.len() * PAGE_ORDERS + self.open.len()
    }

    pub(super) fn contains(&self, order: &OrderId) -> bool {
        let hash = hash_of(&self.hasher, order);
        self.index[shard_of(hash)].find(hash, |place| at(&self.full, &self.open, *place) == order).is_some()
    }

    /// Adds an order; false when it was there.
    ///
    /// # Panics
    /// At four billion orders.
    pub(super) fn insert(&mut self, order: OrderId) -> bool {
        let place = u32::try_from(self.len()).expect("fewer than four billion orders");
        let Self { full, open, index, hasher } = self;
        let hash = hash_of(hasher, &order);
        let is_it = |place: &u32| *at(full, open, *place) == order;
        match index[shard_of(hash)].entry(hash, is_it, |place| hash_of(hasher, at(full, open, *place))) {
            Entry::Occupied(_) => return false,
            Entry::Vacant(free) => free.insert(place),
        };
        open.push(order);
        if open.len() == PAGE_ORDERS {
            full.push(Arc::new(std::mem::replace(open, Vec::with_capacity(PAGE_ORDERS))));
        }
        true
    }

    /// Makes room for so many more, so that filling it moves nothing.
    pub(super) fn reserve(&mut self, more: usize) {
        // Ids spread evenly, but not exactly: an eighth on top, and a few for the small.
        let each = more / SHARDS + more / SHARDS / 8 + 1;
        let Self { full, open, index, hasher } = self;
        for shard in index {
            shard.reserve(each, |place| hash_of(hasher, at(full, open, *place)));
        }
    }

    /// The pages, in the order in which the orders were decided. Only the last one is copied.
    pub(super) fn pages(&self) -> Vec<Arc<Vec<OrderId>>> {
        let open = (!self.open.is_empty()).then(|| Arc::new(self.open.clone()));
        self.full.iter().cloned().chain(open).collect()
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn it_is_a_set_across_pages_and_its_copy_does_not_change() {
        let order = |n: usize| OrderId(Uuid::from_u128(n as u128 * 7));
        let mut decided = Decided::default();
        let all = 2 * PAGE_ORDERS + 5;
        let mut pages = Vec::new();
        for n in 0..all {
            if n == PAGE_ORDERS + 3 {
                pages = decided.pages();
            }
            assert!(!decided.contains(&order(n)));
            assert!(decided.insert(order(n)));
            assert!(!decided.insert(order(n)), "{n} is there");
        }
        assert_eq!(decided.len(), all);
        assert!((0..all).all(|n| decided.contains(&order(n))));
        assert!(!decided.contains(&order(all)));
        let then: Vec<_> = pages.iter().flat_map(|page| page.iter().copied()).collect();
        assert_eq!(then, (0..PAGE_ORDERS + 3).map(order).collect::<Vec<_>>());
        assert!(Arc::ptr_eq(&pages[0], &decided.pages()[0]), "full pages are shared");
    }
}
