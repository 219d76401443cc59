//! The judge of the rivals: what their outboxes tell is held against the orders and the stock, decision by decision.
//!
//! Every order is decided once, each decision is right by the stock of its moment, each product's quantities are a chain
//! from its first stock to what the rival holds now. What a rival is called and how its outbox is read is its own matter.

use anyhow::Context as _;
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::workload::PlainOrder;

/// What an order came to, as an outbox tells it: about what our events of one order hold.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Decision {
    pub order_id: Uuid,
    pub allocated: bool,
    pub lines: Vec<DecidedLine>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct DecidedLine {
    pub product_id: Uuid,
    pub previous_quantity: i64,
    pub new_quantity: i64,
}

impl Decision {
    /// All lines or none; what is allocated is taken from `stock`.
    pub fn of(order: &PlainOrder, stock: &mut HashMap<Uuid, i64>) -> Self {
        let available = |product: &Uuid| stock.get(product).copied().unwrap_or(0);
        let allocated = order.lines().all(|(product, quantity)| available(&product) >= quantity);
        let lines = order
            .lines()
            .map(|(product_id, quantity)| {
                let previous_quantity = available(&product_id);
                let new_quantity = if allocated { previous_quantity - quantity } else { previous_quantity };
                DecidedLine { product_id, previous_quantity, new_quantity }
            })
            .collect::<Vec<_>>();
        if allocated {
            stock.extend(lines.iter().map(|line| (line.product_id, line.new_quantity)));
        }
        Self { order_id: order.id, allocated, lines }
    }

    pub fn to_json(&self) -> anyhow::Result<String> {
        serde_json::to_string(self).context("a decision cannot be written as JSON")
    }
}

/// The books of one run, while the outbox is read.
pub(super) struct Books<'o> {
    open: HashMap<Uuid, &'o PlainOrder>,
    due: u64,
    stock: HashMap<Uuid, i64>,
    allocated: u64,
    refused: u64,
}

impl<'o> Books<'o> {
    pub fn new(initial: &HashMap<Uuid, i64>, orders: &'o [PlainOrder]) -> Self {
        let open: HashMap<_, _> = orders.iter().map(|order| (order.id, order)).collect();
        let due = open.len() as u64;
        Self { open, due, stock: initial.clone(), allocated: 0, refused: 0 }
    }

    /// Takes the next decision, in an order in which each product's decisions were made; what is wrong with it.
    pub fn judge(&mut self, found: &Decision) -> Result<(), String> {
        let Some(order) = self.open.remove(&found.order_id) else {
            return Err(format!("order {} was decided twice", found.order_id));
        };
        let right = Decision::of(order, &mut self.stock);
        if right != *found {
            return Err(format!("order {} was decided wrongly: {found:?} instead of {right:?}", order.id));
        }
        if found.allocated {
            self.allocated += 1;
        } else {
            self.refused += 1;
        }
        Ok(())
    }

    /// Orders allocated and refused, or what is missing: `decided` orders are noted as such, `held` is the stock now.
    pub fn close(self, decided: u64, held: &HashMap<Uuid, i64>) -> Result<(u64, u64), String> {
        if let Some(id) = self.open.keys().next() {
            return Err(format!("{} orders were not decided, among them {id}", self.open.len()));
        }
        if decided != self.due {
            return Err(format!("{decided} orders are noted as decided where {} were published", self.due));
        }
        if *held != self.stock {
            return Err("the stock in the table is not what the outbox adds up to".to_owned());
        }
        Ok((self.allocated, self.refused))
    }
}
