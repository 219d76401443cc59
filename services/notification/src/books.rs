//! What a batch of messages changes: the service's books about the products in it, in memory and pure.
//!
//! Messages are taken in the order of the stream. The rule that admits them is every reader's (`contract::admission`); what
//! breaks it is no alert and changes nothing. A message that was recorded before does nothing again.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use lomash_contract::id::EventRole;
use lomash_contract::{Cause, Envelope, EventId, InventoryUpdated, LedgerEvent, ProductDetails, ProductId, chains};
use lomash_platform::trace::TraceContext;
use time::OffsetDateTime;

use crate::low_stock::{MailKind, Policy, judge};

/// By what alerts are raised.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Which alerts are mailed.
    pub policy: Policy,
    /// The threshold of products that have none of their own.
    pub threshold: u32,
    /// A cause that was stored longer ago than this when it is first seen is not mailed.
    pub max_age: Duration,
}

/// A message of the ledger as it arrived.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// Its sequence in the stream.
    pub sequence: u64,
    /// 1 the first time.
    pub deliveries: u64,
    /// When the server stored it.
    pub stored_at: OffsetDateTime,
    /// Its W3C trace context.
    pub trace: Option<TraceContext>,
    /// The event, or why it is none.
    pub event: Result<Envelope<LedgerEvent>, String>,
}

impl Arrival {
    /// The product it is about.
    #[must_use]
    pub fn product_id(&self) -> Option<ProductId> {
        self.event.as_ref().ok().map(|event| ProductId(event.payload.key()))
    }
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is recorded.
    Recorded,
    /// It was not written by us, and why.
    Foreign(String),
}

/// What an alert tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AlertKind {
    /// Stock is low.
    LowStock,
    /// Stock is above the threshold again.
    Recovered,
}

/// Why an alert is not mailed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMailed {
    /// Its cause was past when it was first seen.
    Old,
    /// The product was low already, and the policy mails edges.
    Edge,
}

/// What one event caused.
#[derive(Clone, Debug)]
pub struct NewAlert {
    /// The cause.
    pub caused_by: EventId,
    /// Its sequence.
    pub sequence: u64,
    /// What it tells.
    pub kind: AlertKind,
    /// The change of stock.
    pub change: InventoryUpdated,
    /// The product's name at that sequence.
    pub name: String,
    /// The threshold in force at that sequence.
    pub threshold: u32,
    /// The timestamp of the cause's envelope.
    pub occurred_at: OffsetDateTime,
    /// When the server stored the cause.
    pub stored_at: OffsetDateTime,
    /// The cause's trace context.
    pub trace: Option<TraceContext>,
    /// Id of the notification.
    pub event_id: EventId,
    /// By which mail it is told.
    pub mail: Result<MailKind, NotMailed>,
}

/// Stock of a product as the last admitted event left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stock {
    /// Units.
    pub quantity: u32,
    /// Sequence of that event.
    pub sequence: u64,
    /// An alert was raised since the stock was last above its threshold.
    pub is_low: bool,
}

/// What a registration or revision said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// The name.
    pub name: String,
    /// The product's own threshold.
    pub threshold: Option<u32>,
}

/// What is known of a product.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Its stock, once it is registered.
    pub stock: Option<Stock>,
    /// Its registration and revisions by sequence.
    pub details: BTreeMap<u64, Details>,
}

/// The books about the products of one batch, and what is new in them.
#[derive(Debug)]
pub struct Books {
    checkpoint: u64,
    known: HashMap<ProductId, Known>,
    /// Products whose stock has changed.
    changed: HashMap<ProductId, Stock>,
    /// New details.
    details: Vec<(ProductId, u64, Details)>,
    /// New alerts.
    alerts: Vec<NewAlert>,
}

/// What is to be written.
#[derive(Debug)]
pub struct Changes {
    /// Every message up to here is recorded.
    pub checkpoint: u64,
    /// Products whose stock has changed, as it is at the end of the batch.
    pub stock: HashMap<ProductId, Stock>,
    /// New details with their sequences.
    pub details: Vec<(ProductId, u64, Details)>,
    /// New alerts in the order of the stream.
    pub alerts: Vec<NewAlert>,
}

impl Books {
    /// Books in which everything up to `checkpoint` is recorded, with what is known of the products to come.
    #[must_use]
    pub fn open(checkpoint: u64, known: HashMap<ProductId, Known>) -> Self {
        Self { checkpoint, known, changed: HashMap::new(), details: Vec::new(), alerts: Vec::new() }
    }

    /// Takes the next message.
    pub fn take(&mut self, arrival: &Arrival, rules: Rules, now: OffsetDateTime) -> Verdict {
        let is_late = arrival.sequence <= self.checkpoint;
        if is_late && arrival.deliveries <= 1 {
            // The consumer was made anew or reset: all of this was told in its time, perhaps by other rules.
            return Verdict::Recorded;
        }
        self.checkpoint = self.checkpoint.max(arrival.sequence);
        let event = match &arrival.event {
            Ok(event) => event,
            Err(reason) => return Verdict::Foreign(reason.clone()),
        };
        let Some(told) = Told::by(&event.payload) else { return Verdict::Recorded };
        let product = self.known.entry(ProductId(event.payload.key())).or_default();
        if !is_late && let Err(foreign) = chains(&event.payload, product.stock.map(|stock| stock.quantity)) {
            return Verdict::Foreign(foreign.to_string());
        }
        match told {
            Told::Registered(details) => {
                if !is_late {
                    let stock = Stock { quantity: 0, sequence: arrival.sequence, is_low: false };
                    product.stock = Some(stock);
                    self.changed.insert(details.product_id, stock);
                }
                self.learn(arrival.sequence, details);
            }
            Told::Revised(details) => self.learn(arrival.sequence, details),
            Told::Changed(change) => self.judge(arrival, event, change, is_late, rules, now),
        }
        Verdict::Recorded
    }

    fn learn(&mut self, sequence: u64, details: &ProductDetails) {
        let product = self.known.entry(details.product_id).or_default();
        let details_now = Details { name: details.name.to_string(), threshold: details.low_stock_threshold };
        if product.details.insert(sequence, details_now.clone()).is_none() {
            self.details.push((details.product_id, sequence, details_now));
        }
    }

    /// `is_late`: delivered again after later messages were recorded. Then it is nearly always recorded as well, which the
    /// alert's key tells; if it is not, no alert may be missing, but the stock since is not known to continue it.
    fn judge(
        &mut self,
        arrival: &Arrival,
        event: &Envelope<LedgerEvent>,
        change: &InventoryUpdated,
        is_late: bool,
        rules: Rules,
        now: OffsetDateTime,
    ) {
        let Some(product) = self.known.get_mut(&change.product_id) else { return };
        let Some((_, details)) = product.details.range(..arrival.sequence).next_back() else { return };
        let threshold = details.threshold.unwrap_or(rules.threshold);
        let was_low = is_late || product.stock.is_some_and(|stock| stock.is_low);
        let judgement = judge(rules.policy, change, threshold, was_low);
        let name = details.name.clone();
        if !is_late {
            let stock = Stock { quantity: change.new_quantity, sequence: arrival.sequence, is_low: judgement.is_low };
            product.stock = Some(stock);
            self.changed.insert(change.product_id, stock);
        }
        let kind = match (judgement.qualifies, judgement.mail) {
            (true, _) => AlertKind::LowStock,
            (false, Some(_)) if !is_late => AlertKind::Recovered,
            (false, _) => return,
        };
        let mail = match judgement.mail {
            Some(_) if now - arrival.stored_at > rules.max_age => Err(NotMailed::Old),
            Some(mail) => Ok(mail),
            None => Err(NotMailed::Edge),
        };
        self.alerts.push(NewAlert {
            caused_by: event.event_id,
            sequence: arrival.sequence,
            kind,
            change: change.clone(),
            name,
            threshold,
            occurred_at: event.timestamp.get(),
            stored_at: arrival.stored_at,
            trace: arrival.trace.clone(),
            event_id: EventId::derive(&Cause::Event(event.event_id), EventRole::Alert, &change.product_id.0),
            mail,
        });
    }

    /// What is to be written.
    #[must_use]
    pub fn close(self) -> Changes {
        Changes { checkpoint: self.checkpoint, stock: self.changed, details: self.details, alerts: self.alerts }
    }
}

/// What an event tells that alerts depend on: changes of stock cause them, registrations and revisions carry names and
/// thresholds.
enum Told<'e> {
    Registered(&'e ProductDetails),
    Revised(&'e ProductDetails),
    Changed(&'e InventoryUpdated),
}

impl<'e> Told<'e> {
    /// Nothing for the other events, which the consumer delivers too, see its definition.
    const fn by(event: &'e LedgerEvent) -> Option<Self> {
        match event {
            LedgerEvent::ProductRegistered(registered) => Some(Self::Registered(&registered.0)),
            LedgerEvent::ProductRevised(revised) => Some(Self::Revised(&revised.0)),
            LedgerEvent::InventoryUpdated(change) => Some(Self::Changed(change)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use lomash_contract::{
        ChangedField, FailureReason, InventoryUpdateFailed, OrderId, ProductRegistered, ProductRevised, ProductUpdated,
        Timestamp, Trigger, UpdatedBy,
    };
    use uuid::Uuid;

    use super::*;

    const RULES: Rules = Rules { policy: Policy::Every, threshold: 3, max_age: Duration::from_secs(3600) };
    const NOW: OffsetDateTime = time::macros::datetime!(2026-01-31 09:30 UTC);

    fn product() -> ProductId {
        ProductId(Uuid::from_u128(7))
    }

    fn arrival(sequence: u64, payload: LedgerEvent) -> Arrival {
        let event = Envelope {
            event_id: EventId(Uuid::from_u128(sequence.into())),
            event_type: payload.topic().event_type(),
            timestamp: Timestamp::new(NOW),
            version: lomash_contract::Version::CURRENT,
            payload,
        };
        Arrival { sequence, deliveries: 1, stored_at: NOW, trace: None, event: Ok(event) }
    }

    fn details(name: &str, low_stock_threshold: Option<u32>) -> ProductDetails {
        let sku = "SKU".parse().expect("a sku");
        ProductDetails {
            product_id: product(),
            sku,
            name: name.into(),
            category: None,
            low_stock_threshold,
            active: true,
        }
    }

    fn registered(sequence: u64, threshold: Option<u32>) -> Arrival {
        arrival(sequence, LedgerEvent::ProductRegistered(ProductRegistered(details("first", threshold))))
    }

    fn revised(sequence: u64, threshold: Option<u32>) -> Arrival {
        arrival(sequence, LedgerEvent::ProductRevised(ProductRevised(details("second", threshold))))
    }

    fn changed(sequence: u64, previous_quantity: u32, new_quantity: u32) -> Arrival {
        let (trigger, order_id, updated_by) = (Trigger::AdminUpdate, None, UpdatedBy::System);
        let sku = "SKU".parse().expect("a sku");
        let product_id = product();
        arrival(
            sequence,
            LedgerEvent::InventoryUpdated(InventoryUpdated {
                product_id,
                sku,
                previous_quantity,
                new_quantity,
                trigger,
                order_id,
                updated_by,
            }),
        )
    }

    fn again(arrival: Arrival) -> Arrival {
        Arrival { deliveries: 2, ..arrival }
    }

    /// Takes all of them, all of which must be recorded; the alerts as sequence, threshold and name.
    fn alerts(books: &mut Books, arrivals: &[Arrival]) -> Vec<(u64, u32, String)> {
        for arrival in arrivals {
            assert_eq!(books.take(arrival, RULES, NOW), Verdict::Recorded, "{arrival:?}");
        }
        books.alerts.iter().map(|alert| (alert.sequence, alert.threshold, alert.name.clone())).collect()
    }

    fn reopened(books: Books) -> Books {
        let Books { checkpoint, known, .. } = books;
        Books::open(checkpoint, known)
    }

    #[test]
    fn a_change_is_judged_by_the_threshold_before_it() {
        let mut books = Books::open(0, HashMap::new());
        let arrivals = [
            registered(1, Some(10)),
            changed(2, 0, 11),
            changed(3, 11, 10),
            revised(4, None),
            changed(5, 10, 4),
            changed(6, 4, 3),
            revised(7, Some(2)),
            changed(8, 3, 2),
        ];
        let found = alerts(&mut books, &arrivals);
        let expected = [(3, 10, "first"), (6, 3, "second"), (8, 2, "second")];
        assert_eq!(found, expected.map(|(sequence, threshold, name)| (sequence, threshold, name.to_owned())));
        let changes = books.close();
        assert_eq!((changes.checkpoint, changes.details.len()), (8, 3));
        assert_eq!(changes.stock[&product()], Stock { quantity: 2, sequence: 8, is_low: true });
    }

    #[test]
    fn what_is_replayed_does_nothing() {
        let mut books = Books::open(0, HashMap::new());
        let arrivals = [registered(1, None), changed(2, 0, 3), revised(3, Some(9)), changed(4, 3, 5)];
        assert_eq!(alerts(&mut books, &arrivals).len(), 2);
        let mut books = reopened(books);
        // By other rules it would be an alert.
        let rules = Rules { threshold: 1000, ..RULES };
        for arrival in &arrivals {
            assert_eq!(books.take(arrival, rules, NOW), Verdict::Recorded);
        }
        let changes = books.close();
        assert!(changes.alerts.is_empty() && changes.stock.is_empty() && changes.details.is_empty(), "{changes:?}");
    }

    #[test]
    fn what_comes_late_moves_nothing_back_and_is_judged_as_it_was() {
        let mut books = Books::open(0, HashMap::new());
        // 3 and 5 are with another replica, which has died; nobody could know.
        alerts(&mut books, &[registered(1, Some(1)), changed(2, 0, 8), revised(4, Some(20))]);
        let mut books = reopened(books);
        let late = [again(changed(3, 8, 1)), again(revised(4, Some(20))), again(registered(1, Some(1)))];
        assert_eq!(alerts(&mut books, &late), [(3, 1, "first".to_owned())]);
        let changes = books.close();
        assert!(changes.stock.is_empty() && changes.details.is_empty(), "{changes:?}");
        assert_eq!(changes.checkpoint, 4);
    }

    #[test]
    fn events_that_alerts_do_not_depend_on_only_move_the_checkpoint() {
        let mut books = Books::open(0, HashMap::new());
        let order_id = OrderId(Uuid::from_u128(7));
        let failed = InventoryUpdateFailed { order_id, reason: FailureReason::UnknownProduct, items: Vec::new() };
        // The product need not be known: it is not looked at.
        let updated = ProductUpdated {
            product_id: product(),
            changed_fields: vec![ChangedField::IsAvailable],
            updated_at: Timestamp::new(NOW),
        };
        let arrivals =
            [arrival(1, LedgerEvent::InventoryUpdateFailed(failed)), arrival(2, LedgerEvent::ProductUpdated(updated))];
        assert!(alerts(&mut books, &arrivals).is_empty());
        assert!(books.known.is_empty(), "an order is no product");
        assert_eq!(books.close().checkpoint, 2);
    }

    #[test]
    fn foreign_messages_change_nothing() {
        let mut books = Books::open(0, HashMap::new());
        let foreign = |books: &mut Books, arrival: &Arrival| match books.take(arrival, RULES, NOW) {
            Verdict::Foreign(reason) => reason,
            Verdict::Recorded => panic!("recorded: {arrival:?}"),
        };
        assert_eq!(foreign(&mut books, &changed(1, 0, 2)), "the product was never registered");
        alerts(&mut books, &[registered(2, None), changed(3, 0, 9)]);
        assert!(foreign(&mut books, &changed(4, 8, 1)).contains("the chain is broken"));
        assert_eq!(foreign(&mut books, &registered(5, None)), "the product is registered already");
        let unreadable = Arrival { event: Err("no event".to_owned()), ..changed(6, 9, 2) };
        assert_eq!(foreign(&mut books, &unreadable), "no event");
        assert_eq!(alerts(&mut books, &[changed(7, 9, 3)]).len(), 1, "the chain goes on");
        assert_eq!(books.close().checkpoint, 7, "what is no event is dealt with, too");
    }

    #[test]
    fn the_past_is_recorded_and_not_mailed() {
        let mut books = Books::open(0, HashMap::new());
        let aged = |arrival: Arrival, seconds| Arrival { stored_at: NOW - Duration::from_secs(seconds), ..arrival };
        let arrivals = [registered(1, None), aged(changed(2, 0, 3), 3601), aged(changed(3, 3, 2), 3599)];
        alerts(&mut books, &arrivals);
        let mails: Vec<_> = books.close().alerts.iter().map(|alert| alert.mail).collect();
        assert_eq!(mails, [Err(NotMailed::Old), Ok(MailKind::LowStock)]);
    }
}
