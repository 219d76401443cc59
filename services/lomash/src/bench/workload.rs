//! What every contestant is given: the same products and the same orders, in the same sequence.
//!
//! Every outcome is certain before the race, whatever the interleaving: a product has more stock than
//! all good orders together want of it, and an order that must be refused wants more than there ever was. Each contestant's
//! books can therefore be held to [`Workload::allocated`] and [`Workload::refused`].

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use hashbrown::HashMap;
use lomash_contract::limits::{MAX_LINE_QUANTITY, MAX_STOCK};
use lomash_contract::{
    Envelope, EventId, LineQuantity, OrderCreated, OrderId, OrderItem, OrderItems, ProductId, Sku, Timestamp,
};
use uuid::Uuid;

use super::scenario::Scenario;
use crate::dice::Dice;
use crate::retail;

/// Lines of an order of [`Scenario::Lines14`], each of another product.
const LINES: usize = 14;

/// One order in so many wants more than there is and must be refused.
const REFUSED_EVERY: usize = 50;

/// One order in so many is an earlier one again, as another event, and must change nothing.
const REPEATED_EVERY: usize = 100;

/// Largest quantity of a line of a made-up order.
const MAX_QUANTITY: u64 = 2;

/// Stock that is left when all good orders are served, so that no product ever becomes unavailable.
const SPARE_STOCK: u32 = 1_000;

/// Most orders of one run: their envelopes and what they came to are held in memory.
pub const MAX_ORDERS: u32 = 400_000;

/// Most orders of a study's history: what they are made of is made piece by piece, so only disk and patience count.
pub const MAX_HISTORY: u32 = 10_000_000;

/// Units of a product of a study. With the fewest products (100 in the tiny run, 10,000 otherwise) far more than they are
/// ordered, and still fewer than an order wants that must be refused.
const PLENTY: u64 = 900_000;

const _: () = assert!(
    PLENTY + (SPARE_STOCK as u64) < MAX_LINE_QUANTITY as u64
        && MAX_HISTORY as u64 * MAX_QUANTITY / 10_000 * 10 < PLENTY,
    "a study's good orders are served and its bad ones are not"
);

const _: () = assert!(
    MAX_ORDERS as u64 * MAX_QUANTITY + (SPARE_STOCK as u64) < MAX_LINE_QUANTITY as u64,
    "an order that must be refused wants more than any stock"
);

/// How large a run is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Products of the made-up scenarios, but for the hot one.
    pub products: usize,
    /// Orders of one line.
    pub one_line: usize,
    /// Orders of many lines, also at most so many of a file.
    pub many_lines: usize,
    /// Products where there are to be many.
    pub many_products: usize,
    /// Orders that were decided before, where there are to be many.
    pub history: usize,
}

/// A product to begin with.
#[derive(Clone, Debug)]
pub(super) struct Stocked {
    pub id: ProductId,
    pub sku: Sku,
    pub stock: u32,
}

/// One scenario, ready to be run any number of times.
#[derive(Debug)]
pub(super) struct Workload {
    pub scenario: Scenario,
    /// As tables and pictures call it.
    pub title: String,
    pub products: Vec<Stocked>,
    /// In the sequence in which they are published; repeats included.
    pub orders: Vec<Envelope<OrderCreated>>,
    /// Lines of all of them.
    pub lines: u64,
    /// Distinct orders that must be allocated.
    pub allocated: u64,
    /// Distinct orders that must be refused.
    pub refused: u64,
}

impl Workload {
    /// The scenario as made from `seed`; for [`Scenario::Real`] from `file`.
    ///
    /// # Errors
    /// When the file is missing or holds no usable orders.
    pub fn of(scenario: Scenario, extent: Extent, seed: u64, file: Option<&Path>) -> anyhow::Result<Self> {
        let (products, orders, lines) = match scenario {
            Scenario::Uniform => (extent.products, extent.one_line, 1),
            Scenario::Hot => (1, extent.one_line, 1),
            Scenario::Million => (extent.many_products, extent.one_line, 1),
            Scenario::Lines14 => (extent.products, extent.many_lines, LINES),
            Scenario::Real => {
                let file = file.context("the scenario `real` needs a file of orders; name it with --orders FILE")?;
                return Self::of_file(file, extent.many_lines);
            }
            _ => bail!("`{}` is no race", scenario.key()),
        };
        Self::made_up(scenario, products, orders, lines, seed)
    }

    fn made_up(scenario: Scenario, products: usize, orders: usize, lines: usize, seed: u64) -> anyhow::Result<Self> {
        let mut dice = Dice(seed.wrapping_add(scenario as u64));
        let ids: Vec<ProductId> = (0..products).map(|_| ProductId(dice.uuid())).collect();
        let mut made: Vec<Envelope<OrderCreated>> = Vec::with_capacity(orders);
        let mut refused = 0;
        let mut repeated = 0;
        let mut wanted: HashMap<ProductId, u64> = HashMap::new();
        for index in 0..orders {
            let event_id = EventId(dice.uuid());
            if (index + 1).is_multiple_of(REPEATED_EVERY) {
                let earlier = made[index / 2].payload.clone();
                made.push(Envelope::new(event_id, Timestamp::now(), earlier));
                repeated += 1;
                continue;
            }
            let short = (index + 1).is_multiple_of(REFUSED_EVERY);
            let mut items: Vec<OrderItem> = Vec::with_capacity(lines);
            while items.len() < lines.min(products) {
                let product_id = ids[dice.index(products)];
                if items.iter().any(|item| item.product_id == product_id) {
                    continue;
                }
                let quantity = if short { MAX_LINE_QUANTITY } else { 1 + dice.below(MAX_QUANTITY) as u32 };
                let quantity = LineQuantity::new(quantity).context("a line's quantity is out of range")?;
                items.push(OrderItem { product_id, sku: None, quantity });
            }
            if short {
                refused += 1;
            } else {
                for item in &items {
                    *wanted.entry(item.product_id).or_default() += u64::from(item.quantity.get());
                }
            }
            let items = OrderItems::new(items).context("an order has too many lines")?;
            let order = OrderCreated { order_id: OrderId(dice.uuid()), customer_id: None, items };
            made.push(Envelope::new(event_id, Timestamp::now(), order));
        }
        let products: Vec<Stocked> = ids
            .into_iter()
            .enumerate()
            .map(|(index, id)| {
                let product = stocked(id, &sku(index), wanted.get(&id).copied().unwrap_or(0))?;
                // Of a million most are not ordered; without stock they are one event each and not two.
                let is_idle = scenario == Scenario::Million && !wanted.contains_key(&id);
                Ok(if is_idle { Stocked { stock: 0, ..product } } else { product })
            })
            .collect::<anyhow::Result<_>>()?;
        let title = match scenario {
            Scenario::Hot => "one line, one hot product".to_owned(),
            _ if lines == 1 => format!("one line, {} products", crate::output::thousands(products.len() as u64)),
            _ => format!("{lines} lines, {} products", crate::output::thousands(products.len() as u64)),
        };
        let lines = made.iter().map(|order| order.payload.items.as_slice().len() as u64).sum();
        let allocated = (orders - repeated) as u64 - refused;
        Ok(Self { scenario, title, products, orders: made, lines, allocated, refused })
    }

    /// The first orders of a file, with enough stock for all of them.
    fn of_file(file: &Path, limit: usize) -> anyhow::Result<Self> {
        let mut orders = Vec::new();
        let mut distinct = HashSet::new();
        let mut wanted: BTreeMap<ProductId, (u64, Option<Sku>)> = BTreeMap::new();
        for order in retail::open(file)?.fit().take(limit) {
            let order = order.with_context(|| format!("{}, order {}", file.display(), orders.len() + 1))?;
            if distinct.insert(order.payload.order_id) {
                for item in order.payload.items.as_slice() {
                    let (quantity, sku) = wanted.entry(item.product_id).or_default();
                    *quantity += u64::from(item.quantity.get());
                    *sku = sku.take().or_else(|| item.sku.clone());
                }
            }
            orders.push(order);
        }
        ensure!(!orders.is_empty(), "{} holds no orders", file.display());
        let products = wanted
            .into_iter()
            .map(|(id, (quantity, sku))| match sku {
                Some(sku) => stocked(id, sku.as_str(), quantity),
                None => stocked(id, &id.to_string(), quantity),
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let lines = orders.iter().map(|order| order.payload.items.as_slice().len() as u64).sum();
        Ok(Self {
            scenario: Scenario::Real,
            title: format!(
                "real orders, {} products, {:.1} lines on average",
                crate::output::thousands(products.len() as u64),
                lines as f64 / orders.len() as f64
            ),
            products,
            lines,
            allocated: distinct.len() as u64,
            refused: 0,
            orders,
        })
    }

    /// What rivals get: each order's products once and sorted, as they lock them. They need not read or decode anything.
    pub fn as_rivals_see_it(&self) -> Vec<PlainOrder> {
        self.orders.iter().map(|order| PlainOrder::of(&order.payload)).collect()
    }
}

/// The unit of a made-up product.
fn sku(index: usize) -> String {
    format!("BENCH-{index}")
}

/// Products for a study, and any number of orders of one line for them, each once. One in fifty must be refused, as in the
/// made-up workloads.
#[derive(Debug)]
pub(super) struct Source {
    dice: Dice,
    /// The products.
    pub products: Vec<Stocked>,
    made: usize,
}

/// Orders of a study.
#[derive(Debug, Default)]
pub(super) struct Orders {
    /// In the sequence in which they arrive.
    pub orders: Vec<Envelope<OrderCreated>>,
    /// How many of them must be refused; all others must be allocated.
    pub refused: u64,
}

impl Source {
    /// Every product has enough for [`MAX_HISTORY`] orders, as long as they are spread evenly.
    pub fn new(products: usize, seed: u64) -> anyhow::Result<Self> {
        let mut dice = Dice(seed);
        let products = (0..products)
            .map(|index| stocked(ProductId(dice.uuid()), &sku(index), PLENTY))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { dice, products, made: 0 })
    }

    /// The next orders.
    pub fn take(&mut self, count: usize) -> anyhow::Result<Orders> {
        let mut taken = Orders::default();
        for _ in 0..count {
            self.made += 1;
            let short = self.made.is_multiple_of(REFUSED_EVERY);
            taken.refused += u64::from(short);
            let quantity = if short { MAX_LINE_QUANTITY } else { 1 + self.dice.below(MAX_QUANTITY) as u32 };
            let quantity = LineQuantity::new(quantity).context("a line's quantity is out of range")?;
            let product_id = self.products[self.dice.index(self.products.len())].id;
            let items = OrderItems::new(vec![OrderItem { product_id, sku: None, quantity }]);
            let items = items.context("an order has no lines")?;
            let order = OrderCreated { order_id: OrderId(self.dice.uuid()), customer_id: None, items };
            taken.orders.push(Envelope::new(EventId(self.dice.uuid()), Timestamp::now(), order));
        }
        Ok(taken)
    }
}

/// A product with enough for `wanted` units and some to spare.
fn stocked(id: ProductId, sku: &str, wanted: u64) -> anyhow::Result<Stocked> {
    let stock = u32::try_from(wanted).ok().and_then(|wanted| wanted.checked_add(SPARE_STOCK));
    match stock.filter(|stock| *stock <= MAX_STOCK) {
        Some(stock) => Ok(Stocked { id, sku: sku.parse().with_context(|| format!("`{sku}`"))?, stock }),
        None => bail!("the orders want {wanted} of {sku}, more than the {MAX_STOCK} one product may have; take fewer"),
    }
}

/// An order without its envelope: products sorted, each once.
#[derive(Clone, Debug)]
pub(super) struct PlainOrder {
    pub id: Uuid,
    pub products: Vec<Uuid>,
    pub quantities: Vec<i64>,
}

impl PlainOrder {
    fn of(order: &OrderCreated) -> Self {
        let mut merged: BTreeMap<Uuid, i64> = BTreeMap::new();
        for item in order.items.as_slice() {
            *merged.entry(item.product_id.0).or_default() += i64::from(item.quantity.get());
        }
        let (products, quantities) = merged.into_iter().unzip();
        Self { id: order.order_id.0, products, quantities }
    }

    /// Product and quantity of each line.
    pub fn lines(&self) -> impl Iterator<Item = (Uuid, i64)> + '_ {
        self.products.iter().copied().zip(self.quantities.iter().copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Extent = Extent { products: 30, one_line: 300, many_lines: 200, many_products: 1_000, history: 0 };

    #[test]
    fn outcomes_do_not_depend_on_the_interleaving() {
        for scenario in [Scenario::Uniform, Scenario::Hot, Scenario::Million, Scenario::Lines14] {
            let workload = Workload::of(scenario, EXTENT, 7, None).expect("made up");
            let stock: HashMap<_, _> = workload.products.iter().map(|p| (p.id.0, i64::from(p.stock))).collect();
            let mut seen = HashSet::new();
            let mut wanted: HashMap<Uuid, i64> = HashMap::new();
            let (mut allocated, mut refused) = (0, 0);
            for order in workload.as_rivals_see_it() {
                if !seen.insert(order.id) {
                    continue;
                }
                if order.lines().any(|(product, quantity)| quantity > stock[&product]) {
                    refused += 1;
                } else {
                    allocated += 1;
                    order.lines().for_each(|(product, quantity)| *wanted.entry(product).or_default() += quantity);
                }
            }
            assert_eq!((allocated, refused), (workload.allocated, workload.refused), "{scenario:?}");
            assert!(refused > 0 && seen.len() < workload.orders.len(), "{scenario:?} has refusals and repeats");
            assert!(wanted.iter().all(|(product, wanted)| *wanted < stock[product]), "{scenario:?}");
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_orders() {
        let orders = |seed| -> Vec<_> {
            let workload = Workload::of(Scenario::Lines14, EXTENT, seed, None).expect("made up");
            workload.orders.into_iter().map(|order| order.payload).collect()
        };
        assert_eq!(orders(1), orders(1));
        assert_ne!(orders(1), orders(2));
    }
}
