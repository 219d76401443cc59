//! The auditor finds nothing in honest histories and names each kind of corruption with its sequence.
//!
//! Histories are built by hand: the builder writes what the contract says an honest writer writes, and does not use
//! the product service's code, so the two can only agree by both being right.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use bytes::Bytes;
use lomash::audit::{
    Audit, CountRow, DecisionRow, Evidence, MovementRow, ProductRow, Projection, Report, Row, Status, TableComparison,
    TableReport, canonical_items, micros,
};
use lomash::dice::Dice;
use lomash_contract::id::EventRole;
use lomash_contract::limits::KEYS_KEPT;
use lomash_contract::{
    Cause, ChangedField, CommandAnswered, ContentType, CountedBy, Envelope, EventId, FailedItem, FailureReason,
    Fingerprint, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, LineQuantity, OrderCreated,
    OrderId, OrderItem, OrderItems, Payload, ProductDetails, ProductId, ProductRegistered, ProductRevised,
    ProductUpdated, Sku, Timestamp, Trigger, UpdatedBy, codec,
};
use lomash_ledger::{BatchPosition, Carried, StoredMessage};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use uuid::Uuid;

// ── Building histories ──────────────────────────────────────────────────────────────────────────────────────────

fn product(number: u128) -> ProductId {
    ProductId(Uuid::from_u128(0x1000 + number))
}

fn order(number: u128) -> OrderId {
    OrderId(Uuid::from_u128(0x2000 + number))
}

fn sku(id: ProductId) -> Sku {
    format!("SKU-{}", id.0.as_u128()).parse().unwrap()
}

fn details(id: ProductId, active: bool) -> ProductDetails {
    let name = "Oak worktop".into();
    ProductDetails { product_id: id, sku: sku(id), name, category: None, low_stock_threshold: Some(3), active }
}

fn instant(sequence: u64) -> OffsetDateTime {
    // With nanoseconds, which Postgres does not keep.
    OffsetDateTime::UNIX_EPOCH + Duration::days(20_000) + Duration::nanoseconds(sequence as i64 * 1_000_001)
}

fn encoded(event: &LedgerEvent, id: EventId, at: OffsetDateTime) -> Bytes {
    fn bytes<P: Payload + Clone>(payload: &P, id: EventId, at: OffsetDateTime) -> Bytes {
        codec::encode(ContentType::Json, &Envelope::new(id, Timestamp::new(at), payload.clone())).into()
    }
    match event {
        LedgerEvent::InventoryUpdated(payload) => bytes(payload, id, at),
        LedgerEvent::InventoryUpdateFailed(payload) => bytes(payload, id, at),
        LedgerEvent::InventoryCounted(payload) => bytes(payload, id, at),
        LedgerEvent::ProductRegistered(payload) => bytes(payload, id, at),
        LedgerEvent::ProductRevised(payload) => bytes(payload, id, at),
        LedgerEvent::ProductUpdated(payload) => bytes(payload, id, at),
        LedgerEvent::CommandAnswered(payload) => bytes(payload, id, at),
    }
}

fn placed(id: OrderId, lines: &[(ProductId, u32)]) -> OrderCreated {
    let item = |(product_id, quantity): &(ProductId, u32)| OrderItem {
        product_id: *product_id,
        sku: None,
        quantity: LineQuantity::new(*quantity).unwrap(),
    };
    let items = OrderItems::new(lines.iter().map(item).collect()).unwrap();
    OrderCreated { order_id: id, customer_id: None, items }
}

/// A ledger with everything around it, as an honest platform would leave it.
#[derive(Clone, Default)]
struct History {
    stock: BTreeMap<ProductId, (u32, bool)>,
    pending: Vec<LedgerEvent>,
    grouped: bool,
    batches: u64,
    messages: Vec<StoredMessage>,
    orders: Vec<(u64, Option<OrderCreated>)>,
    letters: Vec<(u64, Option<u64>)>,
    letters_removed: u64,
    floor: Option<u64>,
    configuration: Vec<String>,
    decided: Vec<OrderId>,
}

impl History {
    fn last(&self) -> u64 {
        self.messages.last().map_or(0, |message| message.sequence)
    }

    /// Ends a command: a batch of its own, unless several commands share one.
    fn done(&mut self) {
        if !self.grouped {
            self.commit();
        }
    }

    fn commit(&mut self) {
        let before = self.last();
        let count = self.pending.len();
        if count == 0 {
            return;
        }
        self.batches += 1;
        for (index, event) in std::mem::take(&mut self.pending).into_iter().enumerate() {
            let sequence = before + 1 + index as u64;
            let event_id = match &event {
                LedgerEvent::CommandAnswered(CommandAnswered { command_id, product_id, .. }) => {
                    let cause = Cause::KeyedCommand { command_id: *command_id, sequence: before + index as u64 };
                    EventId::derive(&cause, EventRole::Answer, &product_id.0)
                }
                _ => EventId(Uuid::from_u128(0x9000_0000 + u128::from(sequence))),
            };
            self.messages.push(StoredMessage {
                sequence,
                stored_at: instant(sequence),
                subject: event.subject().to_string(),
                message_id: Some(event_id.to_string()),
                expected_last_sequence: (index == 0).then_some(before),
                batch: Some(BatchPosition {
                    id: format!("b{}", self.batches),
                    sequence: index as u64 + 1,
                    commit: index + 1 == count,
                }),
                carried: Carried::default(),
                payload: encoded(&event, event_id, instant(sequence)),
            });
        }
    }

    fn change(&mut self, id: ProductId, quantity: u32, trigger: Trigger, order_id: Option<OrderId>) {
        let entry = self.stock.get_mut(&id).unwrap();
        let previous = std::mem::replace(&mut entry.0, quantity);
        self.pending.push(LedgerEvent::InventoryUpdated(InventoryUpdated {
            product_id: id,
            sku: sku(id),
            previous_quantity: previous,
            new_quantity: quantity,
            trigger,
            order_id,
            updated_by: UpdatedBy::System,
        }));
        if (previous == 0) != (quantity == 0) {
            self.pending.push(LedgerEvent::ProductUpdated(ProductUpdated {
                product_id: id,
                changed_fields: vec![ChangedField::StockQuantity, ChangedField::IsAvailable],
                updated_at: Timestamp::new(instant(0)),
            }));
        }
    }

    fn register(&mut self, id: ProductId, quantity: u32, active: bool) {
        self.pending.push(LedgerEvent::ProductRegistered(ProductRegistered(details(id, active))));
        self.stock.insert(id, (0, active));
        if quantity > 0 {
            self.change(id, quantity, Trigger::AdminUpdate, None);
        }
        self.done();
    }

    fn set(&mut self, id: ProductId, quantity: u32, trigger: Trigger) {
        if self.stock[&id].0 != quantity {
            self.change(id, quantity, trigger, None);
            self.done();
        }
    }

    fn revise(&mut self, id: ProductId, active: bool) {
        self.stock.get_mut(&id).unwrap().1 = active;
        self.pending.push(LedgerEvent::ProductRevised(ProductRevised(details(id, active))));
        self.pending.push(LedgerEvent::ProductUpdated(ProductUpdated {
            product_id: id,
            changed_fields: vec![ChangedField::Active],
            updated_at: Timestamp::new(instant(0)),
        }));
        self.done();
    }

    /// A command under a key, answered before the events that it brings about.
    fn answer(&mut self, command: u128, id: ProductId, events: u32) {
        self.pending.push(LedgerEvent::CommandAnswered(CommandAnswered {
            command_id: Uuid::from_u128(command),
            fingerprint: Fingerprint(7),
            product_id: id,
            requested_by: UpdatedBy::System,
            events,
            refusal: None,
        }));
    }

    fn count(&mut self, id: ProductId) {
        self.pending.push(LedgerEvent::InventoryCounted(InventoryCounted {
            product_id: id,
            sku: sku(id),
            quantity: 1,
            counted_at: Timestamp::new(instant(0)),
            counted_by: CountedBy::Warehouse,
        }));
        self.done();
    }

    /// A message on ORDERS, not decided.
    fn publish(&mut self, id: OrderId, lines: &[(ProductId, u32)]) {
        let sequence = self.orders.len() as u64 + 1;
        self.orders.push((sequence, Some(placed(id, lines))));
        self.floor = Some(sequence);
    }

    fn malformed(&mut self) {
        let sequence = self.orders.len() as u64 + 1;
        self.orders.push((sequence, None));
        self.letters.push((self.letters.len() as u64 + 1, Some(sequence)));
        self.floor = Some(sequence);
    }

    /// An order, published and decided.
    fn order(&mut self, id: OrderId, lines: &[(ProductId, u32)]) {
        self.publish(id, lines);
        self.decide(id, lines);
    }

    fn decide(&mut self, id: OrderId, lines: &[(ProductId, u32)]) {
        if self.decided.contains(&id) {
            return;
        }
        self.decided.push(id);
        let mut merged: Vec<(ProductId, u32)> = Vec::new();
        for (wanted, quantity) in lines {
            match merged.iter_mut().find(|(known, _)| known == wanted) {
                Some((_, sum)) => *sum += quantity,
                None => merged.push((*wanted, *quantity)),
            }
        }
        let reason = |(id, quantity): &(ProductId, u32)| match self.stock.get(id) {
            None => Some(FailureReason::UnknownProduct),
            Some((_, false)) => Some(FailureReason::ProductInactive),
            Some((stock, true)) if stock < quantity => Some(FailureReason::InsufficientStock),
            Some(_) => None,
        };
        let gravest = [FailureReason::UnknownProduct, FailureReason::ProductInactive, FailureReason::InsufficientStock]
            .into_iter()
            .find(|candidate| merged.iter().any(|line| reason(line) == Some(*candidate)));
        if let Some(gravest) = gravest {
            let items = merged
                .iter()
                .filter(|line| reason(line) == Some(gravest))
                .map(|(id, requested)| FailedItem {
                    product_id: *id,
                    sku: self.stock.get(id).map(|_| sku(*id)),
                    requested: *requested,
                    available: self.stock.get(id).map_or(0, |(stock, _)| *stock),
                })
                .collect();
            let failed = InventoryUpdateFailed { order_id: id, reason: gravest, items };
            self.pending.push(LedgerEvent::InventoryUpdateFailed(failed));
        } else {
            for (product, quantity) in merged {
                let left = self.stock[&product].0 - quantity;
                self.change(product, left, Trigger::OrderConfirmed, Some(id));
            }
        }
        self.done();
    }

    fn observed(&self) -> Audit {
        let mut audit = Audit::new(self.floor);
        for (letter, origin) in &self.letters {
            audit.observe_letter(*letter, *origin);
        }
        for (sequence, order) in &self.orders {
            match order {
                Some(order) => audit.observe_order(*sequence, order),
                None => audit.observe_malformed_order(*sequence, "it is no JSON"),
            }
        }
        for message in &self.messages {
            audit.observe(message);
        }
        audit
    }

    fn evidence(&self, projection: Projection) -> Evidence {
        Evidence {
            orders_sequence: self.orders.len() as u64,
            letters_removed: self.letters_removed,
            configuration: Ok(self.configuration.clone()),
            projection,
        }
    }

    fn report(&self) -> Report {
        self.observed().finish(self.evidence(Projection::NotChecked("no DATABASE_URL".to_owned())))
    }

    fn message(&mut self, sequence: u64) -> &mut StoredMessage {
        self.messages.iter_mut().find(|message| message.sequence == sequence).unwrap()
    }

    /// Rewrites a payload, as someone with the stream's files in hand could.
    fn edit(&mut self, sequence: u64, pointer: &str, value: Value) {
        let message = self.message(sequence);
        let mut envelope: Value = serde_json::from_slice(&message.payload).unwrap();
        *envelope.pointer_mut(pointer).unwrap() = value;
        message.payload = serde_json::to_vec(&envelope).unwrap().into();
    }

    /// Appends a message as an honest batch of its own would be, whatever it says.
    fn append(&mut self, event: LedgerEvent) {
        self.pending.push(event);
        self.commit();
    }
}

/// One of everything. The numbers on the right are sequences.
fn history() -> History {
    let mut history = History::default();
    history.register(product(1), 10, true); // 1, 2, 3
    history.register(product(2), 5, true); // 4, 5, 6
    history.register(product(3), 0, true); // 7
    history.register(product(4), 7, false); // 8, 9, 10
    history.order(order(1), &[(product(1), 1), (product(2), 1), (product(1), 1)]); // 11, 12; ORDERS 1
    history.publish(order(1), &[(product(1), 1), (product(2), 1), (product(1), 1)]); // ORDERS 2
    history.order(order(2), &[(product(1), 8)]); // 13, 14; ORDERS 3
    history.malformed(); // ORDERS 4
    history.order(order(3), &[(product(1), 1), (product(2), 1)]); // 15; ORDERS 5
    history.order(order(4), &[(product(9), 1), (product(1), 1)]); // 16; ORDERS 6
    history.order(order(5), &[(product(4), 1), (product(1), 1)]); // 17; ORDERS 7
    history.set(product(2), 9, Trigger::AdminUpdate); // 18
    history.set(product(2), 8, Trigger::ScheduledSync); // 19
    history.revise(product(2), false); // 20, 21
    history.count(product(2)); // 22
    history
}

fn stock_event(id: ProductId, previous: u32, new: u32, trigger: Trigger, order_id: Option<OrderId>) -> LedgerEvent {
    LedgerEvent::InventoryUpdated(InventoryUpdated {
        product_id: id,
        sku: sku(id),
        previous_quantity: previous,
        new_quantity: new,
        trigger,
        order_id,
        updated_by: UpdatedBy::System,
    })
}

fn refusal(id: OrderId, reason: FailureReason, items: Vec<FailedItem>) -> LedgerEvent {
    LedgerEvent::InventoryUpdateFailed(InventoryUpdateFailed { order_id: id, reason, items })
}

fn show(report: &Report) -> String {
    let lines = report.invariants.iter().flat_map(|invariant| {
        invariant.first.iter().map(move |violation| format!("  violates {}: {violation}", invariant.number))
    });
    lines.collect::<Vec<_>>().join("\n")
}

// ── Honest histories ────────────────────────────────────────────────────────────────────────────────────────────

#[test]
fn an_honest_history_is_clean_and_adds_up() {
    let report = history().report();
    assert!(report.is_clean(), "{}", show(&report));
    let totals = &report.totals;
    assert_eq!((totals.messages, totals.products, totals.movements), (22, 4, 8));
    assert_eq!((totals.order_messages, totals.orders_published, totals.malformed_orders), (6, 5, 1));
    assert_eq!((totals.orders_allocated, totals.orders_refused(), totals.orders_undecided), (2, 3, 0));
    assert_eq!((totals.initial_units, totals.admin_units, totals.sync_units), (22, 5, -1));
    assert_eq!((totals.allocated_units, totals.stock_units), (11, 15));
    let unchecked: Vec<u8> = report.unchecked().map(|invariant| invariant.number).collect();
    assert_eq!(unchecked, [7], "without a database the projection is shown as not checked");
}

#[test]
fn an_empty_ledger_is_clean() {
    assert!(History::default().report().is_clean());
}

#[test]
fn an_order_above_the_floor_owes_nothing_yet() {
    let mut history = history();
    history.publish(order(8), &[(product(1), 1)]);
    history.floor = Some(7);
    let report = history.report();
    assert!(report.is_clean(), "{}", show(&report));
    assert_eq!(report.totals.orders_undecided, 1);
}

#[test]
fn a_valid_order_in_the_dead_letters_is_not_lost() {
    let mut history = history();
    history.publish(order(8), &[(product(1), 1)]);
    history.letters.push((2, Some(8)));
    assert!(history.report().is_clean());
}

#[test]
fn a_redriven_letter_is_explained_and_noted() {
    let mut history = history();
    history.letters.clear();
    history.letters_removed = 1;
    let report = history.report();
    assert!(report.is_clean(), "{}", show(&report));
    assert!(report.invariant(1).unwrap().notes[0].contains("redriven or removed"));
}

#[test]
fn two_wishes_under_one_order_id_allow_either_decision_and_no_third() {
    for (decided, clean) in [(1, true), (2, true), (3, false)] {
        let mut history = history();
        history.set(product(2), 4, Trigger::AdminUpdate); // 23
        history.revise(product(2), true); // 24, 25
        history.publish(order(8), &[(product(2), 1)]);
        history.publish(order(8), &[(product(2), 2)]);
        history.decide(order(8), &[(product(2), decided)]); // 26
        let report = history.report();
        assert_eq!(report.is_clean(), clean, "{}", show(&report));
        let four = report.invariant(4).unwrap();
        assert!(four.notes.iter().any(|note| note.contains("different lines under one id")));
        if !clean {
            assert_eq!(four.first[0].sequence, Some(26));
        }
    }
}

#[test]
fn decided_orders_that_left_the_orders_stream_are_noted() {
    let mut history = history();
    history.orders.retain(|(sequence, _)| *sequence > 2);
    let report = history.report();
    assert!(report.is_clean(), "{}", show(&report));
    assert!(report.invariant(4).unwrap().notes[0].contains("not in ORDERS any more"));
}

#[test]
fn a_key_may_be_used_again_when_it_is_forgotten() {
    let mut history = history();
    history.answer(1, product(2), 0);
    history.commit(); // 23
    history.answer(1, product(2), 0);
    history.commit(); // 24
    let later = Timestamp::new(instant(23) + KEYS_KEPT);
    history.edit(24, "/timestamp", json!(later));
    let report = history.report();
    assert!(report.is_clean(), "{}", show(&report));
    assert_eq!(report.totals.commands_answered, 2);
}

fn random_history(seed: u64) -> History {
    let mut random = Dice(seed);
    let mut history = History { floor: Some(0), ..History::default() };
    let mut placed: Vec<(OrderId, Vec<(ProductId, u32)>)> = Vec::new();
    for _ in 0..80 {
        history.grouped = random.below(3) > 0;
        let id = product(u128::from(random.below(8)));
        let known = history.stock.get(&id).copied();
        match (random.below(10), known) {
            (0..=2, None) => history.register(id, random.below(12) as u32, random.below(6) > 0),
            (0, Some(_)) => history.set(id, random.below(12) as u32, Trigger::AdminUpdate),
            (1, Some(_)) => history.set(id, random.below(12) as u32, Trigger::ScheduledSync),
            (2, Some((_, active))) => history.revise(id, !active),
            (3, Some(_)) => history.count(id),
            (6, Some((quantity, _))) => {
                // Answered under a key of its own, and to the same quantity nothing follows.
                let new = 1 + random.below(12) as u32;
                let crosses = (quantity == 0) != (new == 0);
                history.answer(
                    history.messages.len() as u128 + history.pending.len() as u128,
                    id,
                    match quantity == new {
                        true => 0,
                        false => 1 + u32::from(crosses),
                    },
                );
                history.set(id, new, Trigger::AdminUpdate);
            }
            (4, _) => history.malformed(),
            (5, _) if !placed.is_empty() => {
                let (id, lines) = placed[random.below(placed.len() as u64) as usize].clone();
                history.order(id, &lines);
            }
            _ => {
                let lines: Vec<_> = (0..=random.below(4))
                    .map(|_| (product(u128::from(random.below(8))), 1 + random.below(5) as u32))
                    .collect();
                let id = order(placed.len() as u128);
                placed.push((id, lines.clone()));
                history.order(id, &lines);
            }
        }
    }
    history.commit();
    history
}

#[test]
fn random_honest_histories_are_clean() {
    for seed in 0..300 {
        let history = random_history(seed);
        let report = history.report();
        assert!(report.is_clean(), "seed {seed}:\n{}", show(&report));
        let stock: i128 = history.stock.values().map(|(quantity, _)| i128::from(*quantity)).sum();
        assert_eq!(report.totals.stock_units, stock, "seed {seed}");
    }
}

#[test]
fn no_single_quantity_can_be_changed_unnoticed() {
    for seed in 0..60 {
        let honest = random_history(seed);
        let movements = honest.messages.iter().filter(|message| message.subject.contains("inventory.updated"));
        for sequence in movements.map(|message| message.sequence) {
            let mut forged = honest.clone();
            let payload: Value = serde_json::from_slice(&forged.message(sequence).payload).unwrap();
            let quantity = payload["payload"]["newQuantity"].as_u64().unwrap();
            forged.edit(sequence, "/payload/newQuantity", json!(quantity + 1));
            let order = payload["payload"]["orderId"].is_string();
            let report = forged.report();
            let last_of_its_product = !honest.messages.iter().any(|later| {
                let key = |message: &StoredMessage| message.subject.rsplit_once('.').map(|(_, key)| key.to_owned());
                later.sequence > sequence
                    && later.subject.contains("inventory.updated")
                    && key(later) == key(&honest.messages[sequence as usize - 1])
            });
            // The last admin change of a product is what the admin said: nothing else in the system knows better.
            assert!(!report.is_clean() || (last_of_its_product && !order), "seed {seed}, sequence {sequence}");
        }
    }
}

// ── Corruptions ─────────────────────────────────────────────────────────────────────────────────────────────────

struct Corruption {
    what: &'static str,
    corrupt: fn(&mut History),
    invariant: u8,
    source: &'static str,
    sequence: Option<u64>,
    says: &'static str,
}

const fn case(
    what: &'static str,
    invariant: u8,
    sequence: u64,
    says: &'static str,
    corrupt: fn(&mut History),
) -> Corruption {
    Corruption { what, corrupt, invariant, source: "INVENTORY", sequence: Some(sequence), says }
}

#[test]
fn each_corruption_is_named_with_its_sequence() {
    let cases = [
        // 1
        case("an event id occurs twice", 1, 19, "share the event id", |history| {
            let id = history.message(18).message_id.clone().unwrap();
            history.edit(19, "/eventId", json!(id));
            history.message(19).message_id = Some(id);
        }),
        case("Nats-Msg-Id is not the event id", 1, 18, "Nats-Msg-Id is", |history| {
            history.message(18).message_id = Some(Uuid::from_u128(7).to_string());
        }),
        Corruption {
            source: "ORDERS",
            ..case("an acknowledged order is lost", 1, 8, "neither decided nor", |history| {
                history.publish(order(8), &[(product(1), 1)]);
            })
        },
        Corruption {
            source: "ORDERS",
            ..case("a malformed order vanished", 1, 4, "not in the dead letters", |history| history.letters.clear())
        },
        Corruption {
            source: "DEAD_LETTERS",
            ..case("a letter has no origin", 1, 2, "does not say which message", |history| {
                history.letters.push((2, None));
            })
        },
        case("a command is answered twice", 1, 25, "answered before, 0 s ago", |history| {
            history.answer(1, product(2), 1);
            history.set(product(2), 7, Trigger::AdminUpdate); // 23, 24
            history.answer(1, product(2), 0);
            history.commit(); // 25
        }),
        case("an event of a command is missing", 1, 23, "the last 1 of them do not follow", |history| {
            history.answer(1, product(2), 2);
            history.set(product(2), 7, Trigger::AdminUpdate);
        }),
        case("another product's event follows", 1, 23, "the last 1 of them do not follow", |history| {
            history.answer(1, product(1), 1);
            history.set(product(2), 7, Trigger::AdminUpdate);
        }),
        case("an answer in another's name", 1, 23, "is not the one that it has at this sequence", |history| {
            history.answer(1, product(2), 0);
            history.commit();
            history.edit(23, "/eventId", json!(Uuid::from_u128(5)));
            history.message(23).message_id = Some(Uuid::from_u128(5).to_string());
        }),
        // 2
        case("a message of a batch is missing", 2, 12, "number 2 was due", |history| {
            history.message(12).batch.as_mut().unwrap().sequence = 3;
        }),
        case("a batch lost its beginning", 2, 11, "begins with its message number 2", |history| {
            history.message(11).batch.as_mut().unwrap().sequence = 2;
        }),
        case("a batch was never committed", 2, 12, "ends without its commit after 2", |history| {
            history.message(12).batch.as_mut().unwrap().commit = false;
        }),
        case("the last batch was never committed", 2, 22, "ends without its commit", |history| {
            history.message(22).batch.as_mut().unwrap().commit = false;
        }),
        case("no expected sequence", 2, 13, "without an expected last sequence", |history| {
            history.message(13).expected_last_sequence = None;
        }),
        case("another expected sequence", 2, 13, "a stream that ends at 11", |history| {
            history.message(13).expected_last_sequence = Some(11);
        }),
        case("outside any batch", 2, 22, "outside any batch", |history| history.message(22).batch = None),
        // 3
        case("the chain is broken", 3, 19, "previousQuantity is 7, the stock was 9", |history| {
            history.edit(19, "/payload/previousQuantity", json!(7));
        }),
        case("a negative stock", 3, 19, "newQuantity", |history| {
            history.edit(19, "/payload/newQuantity", json!(-1));
        }),
        case("more than a product can have", 3, 19, "beyond the largest stock", |history| {
            history.edit(19, "/payload/newQuantity", json!(1_000_000_001_u64));
        }),
        case("the key is another product's", 3, 18, "the subject's key is", |history| {
            history.message(18).subject = format!("lomash.inventory.updated.{}", product(1));
        }),
        case("not an event", 3, 23, "not an event of ours", |history| {
            history.append(stock_event(product(2), 8, 7, Trigger::AdminUpdate, None));
            history.message(23).payload = Bytes::from_static(b"{\"type\":\"io.nats.jetstream.api.v1\"}");
        }),
        case("an unregistered product", 3, 23, "never registered", |history| {
            history.append(stock_event(product(9), 0, 7, Trigger::AdminUpdate, None));
        }),
        case("a second registration", 3, 23, "registered already", |history| {
            history.append(LedgerEvent::ProductRegistered(ProductRegistered(details(product(1), true))));
        }),
        case("another product's sku", 3, 18, "the product's is SKU-", |history| {
            history.edit(18, "/payload/sku", json!("OTHER"));
        }),
        // 4
        case("allocated twice", 4, 23, "sequence 11 allocated it already", |history| {
            history.append(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, Some(order(1))));
        }),
        case("refused after it was allocated", 4, 23, "sequence 11 allocated it already", |history| {
            history.append(refusal(order(1), FailureReason::InsufficientStock, Vec::new()));
        }),
        case("allocated after it was refused", 4, 23, "sequence 15 refused it already", |history| {
            history.append(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, Some(order(3))));
        }),
        case("partly applied", 4, 23, "wants 1 of", |history| {
            history.publish(order(8), &[(product(1), 1), (product(2), 1)]);
            history.append(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, Some(order(8))));
        }),
        case("another quantity than ordered", 4, 13, "and took 7", |history| {
            history.edit(13, "/payload/newQuantity", json!(1));
        }),
        case("from a product not for sale", 4, 23, "which was not for sale", |history| {
            history.publish(order(8), &[(product(2), 1)]);
            history.append(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, Some(order(8))));
        }),
        case("an order that adds stock", 4, 23, "where orders take away", |history| {
            history.publish(order(8), &[(product(2), 1)]);
            history.append(stock_event(product(2), 8, 9, Trigger::OrderConfirmed, Some(order(8))));
        }),
        case("an order's trigger without its id", 4, 23, "no order is named", |history| {
            history.append(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, None));
        }),
        case("an order's id with another trigger", 4, 23, "the trigger is ADMIN_UPDATE", |history| {
            history.append(stock_event(product(2), 8, 7, Trigger::AdminUpdate, Some(order(8))));
        }),
        case("lines not merged", 4, 24, "twice in one batch", |history| {
            history.publish(order(8), &[(product(2), 2)]);
            history.pending.push(stock_event(product(2), 8, 7, Trigger::OrderConfirmed, Some(order(8))));
            history.append(stock_event(product(2), 7, 6, Trigger::OrderConfirmed, Some(order(8))));
        }),
        case("refused though all was there", 4, 23, "all it wants was there", |history| {
            history.edit(20, "/payload/active", json!(true));
            history.publish(order(8), &[(product(2), 1)]);
            history.append(refusal(order(8), FailureReason::InsufficientStock, Vec::new()));
        }),
        case("the wrong reason", 4, 16, "where UNKNOWN_PRODUCT was due", |history| {
            history.edit(16, "/payload/reason", json!("INSUFFICIENT_STOCK"));
        }),
        case("an untrue figure", 4, 15, "available 1; true was", |history| {
            history.edit(15, "/payload/items/0/available", json!(1));
        }),
        case("a failing line is not named", 4, 15, "of nothing; true was", |history| {
            history.edit(15, "/payload/items", json!([]));
        }),
        // 5
        case("an order took more than it wants", 5, 13, "allocated 10 is 0, the stock is 1", |history| {
            history.edit(13, "/payload/newQuantity", json!(1));
        }),
        Corruption {
            sequence: None,
            ..case("the total is off", 5, 0, "in total the changes add up", |history| {
                history.edit(13, "/payload/newQuantity", json!(1));
            })
        },
        // 6
        case("a sequence is missing", 6, 21, "sequence 21 is missing", |history| {
            history.messages.retain(|message| message.sequence != 21);
        }),
        case("the stream does not start at 1", 6, 1, "sequences 1 to 3 are missing", |history| {
            history.messages.retain(|message| message.sequence > 3);
        }),
        case("a sequence comes twice", 6, 22, "comes after sequence 22", |history| {
            let again = history.message(22).clone();
            history.messages.push(again);
        }),
        Corruption {
            source: "configuration",
            sequence: None,
            ..case("the stream is configured otherwise", 6, 0, "deny_purge", |history| {
                history.configuration.push("INVENTORY: deny_purge is false, its definition says true".to_owned());
            })
        },
        // 10
        case("sold out and not announced", 10, 13, "no product-updated of the batch names it", |history| {
            history.edit(14, "/payload/changedFields", json!(["stockQuantity"]));
        }),
        case("announced without a change", 10, 21, "did not change in this batch", |history| {
            history.edit(21, "/payload/changedFields", json!(["stockQuantity", "isAvailable"]));
        }),
        case("announced in another batch", 10, 13, "no product-updated of the batch", |history| {
            history.message(13).batch.as_mut().unwrap().commit = true;
        }),
        case("announced without the quantity", 10, 14, "without stockQuantity", |history| {
            history.edit(14, "/payload/changedFields", json!(["isAvailable"]));
        }),
    ];
    let mut missed = Vec::new();
    for Corruption { what, corrupt, invariant, source, sequence, says } in cases {
        let mut history = history();
        corrupt(&mut history);
        let report = history.report();
        let found = report.invariant(invariant).unwrap();
        let named = found.first.iter().any(|violation| {
            violation.source == source && violation.sequence == sequence && violation.problem.contains(says)
        });
        if !named || found.status != Status::Violated || report.is_clean() {
            missed.push(format!("{what}: {source} {sequence:?} \"{says}\" is not among\n{}", show(&report)));
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn violations_beyond_the_first_are_counted_and_not_named() {
    let mut history = history();
    for _ in 0..50 {
        history.append(stock_event(product(9), 0, 7, Trigger::AdminUpdate, None));
    }
    let report = history.report();
    let three = report.invariant(3).unwrap();
    assert_eq!((three.violations, three.first.len()), (50, lomash::audit::MAX_NAMED));
    assert_eq!(three.first[0].sequence, Some(23));
}

// ── The projection ──────────────────────────────────────────────────────────────────────────────────────────────

/// What an honest projector would have written up to a checkpoint.
#[derive(Clone, Default)]
struct Rows {
    products: Vec<ProductRow>,
    movements: Vec<MovementRow>,
    counts: Vec<CountRow>,
    decisions: Vec<DecisionRow>,
}

fn rows(history: &History, checkpoint: u64) -> (Rows, Audit) {
    let mut rows = Rows::default();
    let mut audit = Audit::new(history.floor);
    for message in history.messages.iter().filter(|message| message.sequence <= checkpoint) {
        let projected = audit.observe(message);
        rows.movements.extend(projected.movement);
        rows.counts.extend(projected.count);
        rows.decisions.extend(projected.decision);
    }
    rows.products = audit.product_rows().collect();
    (rows, audit)
}

/// Compares in trips of two rows, as a portal brings them.
fn compare<R: Row + Clone>(fold: &[R], stored: &[R]) -> TableReport {
    let mut trips = stored.chunks(2);
    let mut comparison = TableComparison::default();
    let fetch = |comparison: &mut TableComparison<R>, trips: &mut std::slice::Chunks<'_, R>| match trips.next() {
        Some(rows) => comparison.push_projection(rows.iter().cloned()),
        None => comparison.end_projection(),
    };
    for row in fold {
        let mut row = row.clone();
        while let Some(back) = comparison.push_fold(row) {
            row = back;
            fetch(&mut comparison, &mut trips);
        }
    }
    while !comparison.is_projection_ended() {
        comparison.drain_projection();
        fetch(&mut comparison, &mut trips);
    }
    comparison.report()
}

fn projection_report(corrupt: fn(&mut Rows), skipped: u64) -> Report {
    let history = history();
    let (fold, audit) = rows(&history, 22);
    let mut stored = fold.clone();
    corrupt(&mut stored);
    let projection = Projection::Compared {
        checkpoint: 22,
        skipped,
        skipped_by_fold: audit.skipped(),
        tables: vec![
            compare(&fold.products, &stored.products),
            compare(&fold.movements, &stored.movements),
            compare(&fold.counts, &stored.counts),
            compare(&fold.decisions, &stored.decisions),
        ],
    };
    history.observed().finish(history.evidence(projection))
}

#[test]
fn an_equal_projection_is_clean() {
    let report = projection_report(|_| {}, 0);
    assert!(report.is_clean(), "{}", show(&report));
    let seven = report.invariant(7).unwrap();
    let counts: Vec<u64> = seven.checked.iter().map(|count| count.count).collect();
    assert_eq!((seven.status, counts), (Status::Holds, vec![4, 8, 1, 5]));
}

#[test]
fn every_difference_of_the_projection_is_named() {
    type Case = (&'static str, fn(&mut Rows), &'static str, u64, &'static str);
    let cases: [Case; 11] = [
        ("a stock is off", |rows| rows.products[0].quantity += 1, "products", 13, "the fold has"),
        ("isAvailable is off", |rows| rows.products[0].is_available = true, "products", 13, "the fold has"),
        ("a product is missing", |rows| drop(rows.products.remove(2)), "products", 7, "the projection lacks"),
        ("a movement is missing", |rows| drop(rows.movements.pop()), "movements", 19, "the projection lacks"),
        (
            "a movement is too much",
            |rows| {
                let mut row = rows.movements[7].clone();
                row.sequence = 21;
                rows.movements.push(row);
            },
            "movements",
            21,
            "does not tell",
        ),
        ("an instant is off", |rows| rows.movements[3].stored_at += 1, "movements", 11, "the fold has"),
        ("a count is off", |rows| rows.counts[0].quantity += 1, "counts", 22, "the fold has"),
        (
            "who counted is off",
            |rows| rows.counts[0].counted_by = Some(Uuid::from_u128(7)),
            "counts",
            22,
            "the fold has",
        ),
        ("a count is missing", |rows| rows.counts.clear(), "counts", 22, "the projection lacks"),
        (
            "an order is decided otherwise",
            |rows| rows.decisions[2].outcome = "allocated".into(),
            "order_decisions",
            15,
            "the fold has",
        ),
        ("a decision is missing", |rows| drop(rows.decisions.remove(0)), "order_decisions", 11, "the projection lacks"),
    ];
    for (what, corrupt, table, sequence, says) in cases {
        let report = projection_report(corrupt, 0);
        let seven = report.invariant(7).unwrap();
        assert_eq!(seven.violations, 1, "{what}: {}", show(&report));
        let first = &seven.first[0];
        assert_eq!((first.source, first.sequence), (table, Some(sequence)), "{what}");
        assert!(first.problem.contains(says), "{what}: {first}");
    }
}

#[test]
fn skipped_messages_are_compared() {
    let report = projection_report(|_| {}, 2);
    let first = &report.invariant(7).unwrap().first[0];
    assert!(first.problem.contains("skipped 2 messages, 0 are not ours"), "{first}");
}

#[test]
fn a_checkpoint_beyond_the_stream_is_a_violation() {
    let history = history();
    let report = history.observed().finish(history.evidence(Projection::AheadOfStream { checkpoint: 40 }));
    let first = &report.invariant(7).unwrap().first[0];
    assert_eq!(first.sequence, Some(40));
    assert!(first.problem.contains("the stream went backwards"), "{first}");
}

#[test]
fn an_unreadable_projection_is_a_violation_and_a_missing_url_is_not() {
    let history = history();
    let report = history.observed().finish(history.evidence(Projection::Unreadable("no route".to_owned())));
    assert!(!report.is_clean());
    assert_eq!(history.report().invariant(7).unwrap().status, Status::NotChecked);
}

#[test]
fn rows_hold_what_both_sides_can_keep() {
    let at = OffsetDateTime::UNIX_EPOCH + Duration::nanoseconds(1_999);
    assert_eq!(micros(at), 1, "cut, as Postgres cuts it");
    // The order of jsonb's keys is Postgres's own.
    let stored = json!([{ "available": 0, "sku": null, "requested": 1, "productId": product(9) }]);
    let item = FailedItem { product_id: product(9), sku: None, requested: 1, available: 0 };
    assert_eq!(canonical_items(stored), serde_json::to_value([item]).unwrap());
}
