//! When stock is low, and whom that concerns: pure.
//!
//! A change of stock *qualifies* when it leaves a product at or below its threshold and is not a correction by
//! reconciliation. Each qualifying change is notified on NATS, always. Which of them are mailed is the [`Policy`].

use clap::ValueEnum;
use lomash_contract::{InventoryUpdated, Trigger};

/// Which alerts are mailed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Each qualifying change.
    #[default]
    Every,
    /// The change by which a product becomes low, and the one by which it recovers.
    Edge,
    /// One mail a period, with what became low in it.
    Digest,
}

/// What is mailed about a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MailKind {
    /// A mail of its own: stock is low.
    LowStock,
    /// A mail of its own: stock is above the threshold again.
    Recovered,
    /// A line in the mail of the period.
    Digest,
}

/// What follows from a change of stock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// It qualifies.
    pub qualifies: bool,
    /// What is mailed.
    pub mail: Option<MailKind>,
    /// Whether an alert has been raised since the stock was last above its threshold.
    pub is_low: bool,
}

/// Judges a change by the threshold in force at its sequence.
///
/// `was_low` is the product's `is_low` before it. A correction never raises an alert but may end one: the next sale of a
/// product that a correction has made low is the edge.
#[must_use]
pub fn judge(policy: Policy, change: &InventoryUpdated, threshold: u32, was_low: bool) -> Judgement {
    let is_above = change.new_quantity > threshold;
    let qualifies = !is_above && change.trigger != Trigger::ScheduledSync;
    let mail = match policy {
        Policy::Every => qualifies.then_some(MailKind::LowStock),
        Policy::Digest => qualifies.then_some(MailKind::Digest),
        Policy::Edge if qualifies && !was_low => Some(MailKind::LowStock),
        Policy::Edge if is_above && was_low => Some(MailKind::Recovered),
        Policy::Edge => None,
    };
    Judgement { qualifies, mail, is_low: qualifies || (was_low && !is_above) }
}

#[cfg(test)]
mod tests {
    use lomash_contract::limits::LOW_STOCK_THRESHOLD;
    use lomash_contract::{ProductId, UpdatedBy};
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::MailKind::{Digest, LowStock, Recovered};
    use super::*;

    fn change(previous_quantity: u32, new_quantity: u32, trigger: Trigger) -> InventoryUpdated {
        InventoryUpdated {
            product_id: ProductId(Uuid::nil()),
            sku: "SKU".parse().expect("a sku"),
            previous_quantity,
            new_quantity,
            trigger,
            order_id: None,
            updated_by: UpdatedBy::System,
        }
    }

    #[test]
    fn the_table_of_the_contract() {
        const ORDER: Trigger = Trigger::OrderConfirmed;
        const ADMIN: Trigger = Trigger::AdminUpdate;
        const SYNC: Trigger = Trigger::ScheduledSync;
        // previous, new, trigger, threshold, was low → qualifies; mail by every, edge, digest; is low
        let table = [
            ((5, 4, ORDER, 3, false), (false, [None, None, None], false)),
            ((4, 3, ORDER, 3, false), (true, [Some(LowStock), Some(LowStock), Some(Digest)], true)),
            ((3, 2, ORDER, 3, true), (true, [Some(LowStock), None, Some(Digest)], true)),
            ((1, 0, ADMIN, 3, true), (true, [Some(LowStock), None, Some(Digest)], true)),
            ((0, 3, ADMIN, 3, false), (true, [Some(LowStock), Some(LowStock), Some(Digest)], true)),
            ((9, 1, SYNC, 3, false), (false, [None, None, None], false)),
            ((1, 0, ORDER, 3, false), (true, [Some(LowStock), Some(LowStock), Some(Digest)], true)),
            ((3, 1, SYNC, 3, true), (false, [None, None, None], true)),
            ((3, 4, ADMIN, 3, true), (false, [None, Some(Recovered), None], false)),
            ((3, 4, SYNC, 3, true), (false, [None, Some(Recovered), None], false)),
            ((3, 4, ADMIN, 3, false), (false, [None, None, None], false)),
            // A threshold of the product's own, also one that was raised over the stock or lowered under it.
            ((50, 40, ORDER, 40, false), (true, [Some(LowStock), Some(LowStock), Some(Digest)], true)),
            ((2, 1, ORDER, 0, true), (false, [None, Some(Recovered), None], false)),
            ((1, 0, ORDER, 0, false), (true, [Some(LowStock), Some(LowStock), Some(Digest)], true)),
        ];
        for ((previous, new, trigger, threshold, was_low), (qualifies, mails, is_low)) in table {
            let change = change(previous, new, trigger);
            for (policy, mail) in [Policy::Every, Policy::Edge, Policy::Digest].into_iter().zip(mails) {
                let judgement = judge(policy, &change, threshold, was_low);
                assert_eq!(
                    judgement,
                    Judgement { qualifies, mail, is_low },
                    "{policy:?} {change:?} {threshold} {was_low}"
                );
            }
        }
        assert_eq!(LOW_STOCK_THRESHOLD, 3, "as in the contract");
    }

    fn triggers() -> impl Strategy<Value = Trigger> {
        prop_oneof![Just(Trigger::OrderConfirmed), Just(Trigger::AdminUpdate), Just(Trigger::ScheduledSync)]
    }

    proptest! {
        #[test]
        fn what_qualifies_is_the_contract_whatever_the_policy(
            previous in 0_u32..12, new in 0_u32..12, trigger in triggers(), threshold in 0_u32..12, was_low: bool,
        ) {
            let change = change(previous, new, trigger);
            let every = judge(Policy::Every, &change, threshold, was_low);
            prop_assert_eq!(every.qualifies, new <= threshold && trigger != Trigger::ScheduledSync);
            prop_assert_eq!(every.mail.is_some(), every.qualifies);
            for policy in [Policy::Edge, Policy::Digest] {
                let other = judge(policy, &change, threshold, was_low);
                prop_assert_eq!((other.qualifies, other.is_low), (every.qualifies, every.is_low));
            }
        }

        #[test]
        fn edges_alternate(quantities in prop::collection::vec((0_u32..8, triggers()), 1..60)) {
            let (mut stock, mut is_low, mut mails) = (0, false, Vec::new());
            for (new, trigger) in quantities {
                let judgement = judge(Policy::Edge, &change(stock, new, trigger), 3, is_low);
                mails.extend(judgement.mail);
                (stock, is_low) = (new, judgement.is_low);
            }
            for (at, mail) in mails.iter().enumerate() {
                prop_assert_eq!(*mail, if at % 2 == 0 { LowStock } else { Recovered });
            }
            prop_assert_eq!(mails.len() % 2 == 1, is_low, "the last mail says how it is");
        }
    }
}
