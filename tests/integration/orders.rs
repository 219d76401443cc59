//! Orders end to end: published as an order service does, decided by a real product service on real servers, and told
//! from the ledger, the dead letters and the projection.
//!
//! Owns what becomes of every kind of order. Each test ends with a clean `lomash verify`, which checks on its own what
//! a test did not think of. Crashes and restarts are tested elsewhere.
use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use lomash_contract::{
    ContentType, Envelope, EventId, FailureReason, LedgerEvent, OrderCreated, OrderId, ProductId, Trigger, UpdatedBy,
    subject,
};
use lomash_ledger::{StoredMessage, dead_letter, header, streams};
use lomash_tests::http::Caller;
use lomash_tests::{Dice, Fate, World, details, encoded, eventually, order, order_as};
use lomash_web::Role;
use product_service::inventory::{Action, Amendment, Outcome, ProductCommand};
use serde_json::{Value, json};
use uuid::Uuid;

/// Within this a poison message must be a dead letter.
const DEAD_LETTER_BOUND: Duration = Duration::from_secs(10);

const SHORT: Fate = Fate::Refused(FailureReason::InsufficientStock);

/// What an allocated order took: product, before, after, in the order of the ledger.
async fn movements(world: &World, order: OrderId) -> Result<Vec<(ProductId, u32, u32)>> {
    let events = world.events().await?.into_iter();
    Ok(events
        .filter_map(|(_, event)| match event {
            LedgerEvent::InventoryUpdated(updated) if updated.order_id == Some(order) => {
                assert_eq!(updated.trigger, Trigger::OrderConfirmed);
                assert_eq!(updated.updated_by, UpdatedBy::System);
                Some((updated.product_id, updated.previous_quantity, updated.new_quantity))
            }
            _ => None,
        })
        .collect())
}

/// What a refused order failed for: reason, and of each failing line product, requested and available.
async fn refusals(world: &World, order: OrderId) -> Result<Vec<(FailureReason, Vec<(ProductId, u32, u32)>)>> {
    let events = world.events().await?.into_iter();
    Ok(events
        .filter_map(|(_, event)| match event {
            LedgerEvent::InventoryUpdateFailed(failed) if failed.order_id == order => {
                let items = failed.items.iter();
                let items = items.map(|item| (item.product_id, item.requested, item.available));
                Some((failed.reason, items.collect()))
            }
            _ => None,
        })
        .collect())
}

async fn decide(world: &World, order: &Envelope<OrderCreated>) -> Result<Fate> {
    let id = order.payload.order_id;
    world.publish(order).await?;
    Ok(world.decided([id]).await?[&id])
}

#[tokio::test]
async fn every_kind_of_order_gets_its_answer() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let oven = world.register("OVEN-60", 10).await?;
    let sink = world.register("SINK-1", 5).await?;
    let door = world.register("DOOR-X", 3).await?;
    let lamp = world.register("LAMP-9", 7).await?;
    let unknown = ProductId(Uuid::new_v4());
    world.act(lamp, Action::Amend(Amendment::activate(false))).await?;

    // One line.
    let one = order(&[(oven, 2)]);
    assert_eq!(decide(&world, &one).await?, Fate::Allocated);
    assert_eq!(movements(&world, one.payload.order_id).await?, [(oven, 10, 8)]);

    // Several lines, in the order of the order; the last of a product says that it is out of stock.
    let several = order(&[(sink, 1), (oven, 3), (door, 3)]);
    assert_eq!(decide(&world, &several).await?, Fate::Allocated);
    let taken = movements(&world, several.payload.order_id).await?;
    assert_eq!(taken, [(sink, 5, 4), (oven, 8, 5), (door, 3, 0)]);
    let sold_out = world.events().await?.into_iter().any(|(message, event)| {
        matches!(&event, LedgerEvent::ProductUpdated(updated) if updated.product_id == door)
            && message.batch.is_some_and(|batch| batch.sequence > 3)
    });
    assert!(sold_out, "the door's end is told in the batch that sold it out");

    // The same product on several lines is one line with the sum.
    let merged = order(&[(oven, 1), (sink, 2), (oven, 2)]);
    assert_eq!(decide(&world, &merged).await?, Fate::Allocated);
    let taken = movements(&world, merged.payload.order_id).await?;
    assert_eq!(taken, [(oven, 5, 2), (sink, 4, 2)]);
    // Each line alone would fit; together they do not.
    let too_many = order(&[(oven, 1), (oven, 2)]);
    assert_eq!(decide(&world, &too_many).await?, SHORT);

    // Short of one of three: nothing is taken of the others, and what failed is said.
    let short = order(&[(sink, 1), (oven, 3), (door, 1)]);
    assert_eq!(decide(&world, &short).await?, SHORT);
    assert_eq!(movements(&world, short.payload.order_id).await?, []);
    let failed = vec![(oven, 3, 2), (door, 1, 0)];
    let told = refusals(&world, short.payload.order_id).await?;
    assert_eq!(told, [(FailureReason::InsufficientStock, failed)]);

    let never_heard_of = order(&[(sink, 1), (unknown, 4)]);
    let expected = Fate::Refused(FailureReason::UnknownProduct);
    assert_eq!(decide(&world, &never_heard_of).await?, expected);
    let told = refusals(&world, never_heard_of.payload.order_id).await?;
    assert_eq!(told, [(FailureReason::UnknownProduct, vec![(unknown, 4, 0)])]);

    let off_sale = order(&[(sink, 1), (lamp, 1)]);
    let expected = Fate::Refused(FailureReason::ProductInactive);
    assert_eq!(decide(&world, &off_sale).await?, expected);
    let told = refusals(&world, off_sale.payload.order_id).await?;
    assert_eq!(told, [(FailureReason::ProductInactive, vec![(lamp, 1, 7)])]);

    // Back on sale, the next order is served.
    world.act(lamp, Action::Amend(Amendment::activate(true))).await?;
    assert_eq!(decide(&world, &order(&[(lamp, 7)])).await?, Fate::Allocated);

    for (product, left) in [(oven, 2), (sink, 2), (door, 0), (lamp, 0)] {
        assert_eq!(world.stock(product).await?, left);
    }
    let report = world.verified().await?;
    assert_eq!(report.totals.orders_allocated, 4);
    assert_eq!(report.totals.orders_refused(), 4);

    // What the projection shows is the same, availability included.
    let database = world.database().await?;
    let query = "SELECT quantity, is_available, active
                 FROM inventory.products JOIN inventory.stock USING (product_id)
                 WHERE product_id = $1";
    for (product, quantity, available) in [(oven, 2, true), (door, 0, false), (lamp, 0, false)] {
        let row = database.query_one(query, &[&product.0]).await?;
        let shown: (i32, bool, bool) = (row.get(0), row.get(1), row.get(2));
        assert_eq!(shown, (quantity, available, true));
    }
    service.stop().await?;
    world.close();
    Ok(())
}

/// The order id decides, whatever carries it and however often it comes.
#[tokio::test]
async fn an_order_is_decided_once_however_often_it_comes() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("TILE-1", 1_000).await?;
    let good = order(&[(product, 10)]);
    let bad = order(&[(product, 100_000)]);
    assert_eq!(decide(&world, &good).await?, Fate::Allocated);
    assert_eq!(decide(&world, &bad).await?, SHORT);
    world.quiet().await?;
    let decided = world.last_sequence().await?;

    // The same event: the stream of orders has it already.
    assert!(world.publish(&good).await?, "ORDERS knows the event id");
    // The same order as another event, ten times; as other lines even; and 64 at once.
    for _ in 0..10 {
        let again = order_as(EventId(Uuid::new_v4()), good.payload.order_id, &[(product, 10)]);
        assert!(!world.publish(&again).await?, "another event is another message");
    }
    let changed = order_as(EventId(Uuid::new_v4()), good.payload.order_id, &[(product, 11)]);
    // The verifier holds an order's lines to those of its first message, so the changed one goes last.
    let refused_again: Vec<_> =
        (0..64).map(|_| order_as(EventId(Uuid::new_v4()), bad.payload.order_id, &[(product, 100_000)])).collect();
    world.publish_all(&refused_again).await?;
    world.publish(&changed).await?;
    world.quiet().await?;
    assert_eq!(world.last_sequence().await?, decided, "0 new events");

    // More stock does not reopen a refused order.
    world.act(product, Action::Adjust { delta: 1_000_000 }).await?;
    let decided = world.last_sequence().await?;
    world.publish(&order_as(EventId(Uuid::new_v4()), bad.payload.order_id, &[(product, 100_000)])).await?;
    world.quiet().await?;
    assert_eq!(world.last_sequence().await?, decided, "0 new events");

    // 64 at once of an order that is not decided yet: one of them counts.
    let id = OrderId(Uuid::new_v4());
    let at_once: Vec<_> = (0..64).map(|_| order_as(EventId(Uuid::new_v4()), id, &[(product, 7)])).collect();
    world.publish_all(&at_once).await?;
    world.quiet().await?;
    assert_eq!(movements(&world, id).await?.len(), 1);
    assert_eq!(world.last_sequence().await?, decided + 1);
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// What an operator does to replay everything, while the service runs.
#[tokio::test]
async fn a_replay_of_all_orders_adds_nothing() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(20, 60).await?;
    let orders: Vec<_> = (0..300).map(|_| dice.order(&products, 5, 4)).collect();
    world.publish_all(&orders).await?;
    world.publish_raw(HeaderMap::new(), "no order at all").await?;
    let fates = world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    assert!(fates.values().any(|fate| *fate == Fate::Allocated), "some are served");
    assert!(fates.values().any(|fate| *fate == SHORT), "some are not");
    let before = world.verified().await?;

    let made = world.product_orders().await?.created;
    let orders_stream = world.context.get_stream(streams::ORDERS).await?;
    orders_stream.delete_consumer(streams::PRODUCT_ORDERS).await?;
    assert_eq!(streams::apply(&world.context, 1).await?, []);
    // A new consumer, to which all 301 messages are delivered again.
    world.quiet().await?;
    let replayed = world.product_orders().await?;
    assert_ne!(replayed.created, made);
    assert_eq!(replayed.ack_floor.stream_sequence, 301);

    let after = world.verified().await?;
    assert_eq!(after.as_of.inventory_sequence, before.as_of.inventory_sequence, "0 new events");
    assert_eq!(after.totals.stock_units, before.totals.stock_units);
    assert_eq!(after.totals.dead_letters, 1, "the letter is not written twice");

    // Deleted by accident, with nobody there to apply the file: the service makes it again and goes on.
    orders_stream.delete_consumer(streams::PRODUCT_ORDERS).await?;
    let next = dice.order(&products, 5, 4);
    world.publish(&next).await?;
    world.decided([next.payload.order_id]).await?;
    let healed = world.verified().await?;
    assert_eq!(healed.totals.orders_published, after.totals.orders_published + 1);
    assert_eq!(healed.totals.orders_allocated + healed.totals.orders_refused(), 301);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn messagepack_is_read_with_ids_as_bytes_and_as_strings() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("PACK-1", 100).await?;

    let as_bytes = order(&[(product, 3)]);
    let (headers, body) = encoded(ContentType::MessagePack, &as_bytes);
    assert!(body.windows(16).any(|window| window == product.as_bytes()), "the id is in there as its 16 bytes");
    world.publish_raw(headers, body).await?;

    let as_strings = order(&[(product, 4)]);
    let (headers, _) = encoded(ContentType::MessagePack, &as_strings);
    let body = rmp_serde::to_vec_named(&serde_json::to_value(&as_strings)?)?;
    let text = product.to_string();
    assert!(body.windows(text.len()).any(|window| window == text.as_bytes()), "the id is in there as text");
    world.publish_raw(headers, body).await?;

    // JSON in so many words, and JSON with a parameter.
    let json = order(&[(product, 5)]);
    let (mut headers, body) = encoded(ContentType::Json, &json);
    headers.insert(header::CONTENT_TYPE, "Application/JSON; charset=utf-8");
    world.publish_raw(headers, body).await?;

    let ids = [&as_bytes, &as_strings, &json].map(|order| order.payload.order_id);
    let fates = world.decided(ids).await?;
    assert!(fates.values().all(|fate| *fate == Fate::Allocated), "{fates:?}");
    assert_eq!(world.stock(product).await?, 100 - 12);
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// A message that is no order, what is wrong with it, and what its letter must say about it.
struct Poison {
    content_type: Option<&'static str>,
    payload: Vec<u8>,
    says: &'static [&'static str],
}

fn poisons(product: ProductId) -> Result<Vec<Poison>> {
    let good = serde_json::to_value(order(&[(product, 1)]))?;
    let with = |pointer: &str, value: Value| {
        let mut changed = good.clone();
        *changed.pointer_mut(pointer).unwrap() = value;
        changed.to_string().into_bytes()
    };
    let without = |field: &str| {
        let mut changed = good.clone();
        changed.as_object_mut().unwrap().remove(field);
        changed.to_string().into_bytes()
    };
    let line = json!({ "productId": product, "quantity": 1 });
    let json = |payload: Vec<u8>, says| Poison { content_type: None, payload, says };
    let (_, packed) = encoded(ContentType::MessagePack, &order(&[(product, 1)]));
    Ok(vec![
        json(b"not even JSON".to_vec(), &["order-created"]),
        json(Vec::new(), &["order-created"]),
        json(b"{\"eventId\":\"\xff\xfe\"}".to_vec(), &["order-created"]),
        json(without("payload"), &["payload"]),
        json(with("/payload/items", json!([])), &["payload.items", "1 to 1000"]),
        json(with("/payload/items", vec![line; 1_001].into()), &["payload.items", "1 to 1000"]),
        json(with("/payload/items/0/quantity", json!(0)), &["payload.items[0].quantity", "1 to 1000000"]),
        json(with("/payload/items/0/quantity", json!(-3)), &["payload.items[0].quantity"]),
        json(with("/payload/items/0/quantity", json!("2")), &["payload.items[0].quantity"]),
        json(with("/payload/items/0/productId", json!("oven")), &["payload.items[0].productId", "UUID"]),
        json(with("/version", json!("2.0")), &["version 2.0"]),
        json(with("/eventType", json!("inventory-updated")), &["inventory-updated", "order-created"]),
        Poison {
            content_type: Some("text/xml"),
            payload: b"<order/>".to_vec(),
            says: &["text/xml", "application/msgpack"],
        },
        Poison {
            content_type: Some("application/msgpack"),
            payload: packed[..packed.len() / 2].to_vec(),
            says: &["application/msgpack", "ends in the middle"],
        },
        Poison { content_type: Some("application/msgpack"), payload: b"{}".to_vec(), says: &["application/msgpack"] },
    ])
}

#[tokio::test]
async fn what_is_no_order_becomes_a_dead_letter_and_harms_nobody() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("GOOD-1", 10_000).await?;

    // Good ones before, between and after.
    let poisons = poisons(product)?;
    let mut good = Vec::new();
    let mut origins = HashMap::new();
    for (number, poison) in poisons.iter().enumerate() {
        let order = order(&[(product, 1)]);
        world.publish(&order).await?;
        good.push(order.payload.order_id);
        let mut headers = HeaderMap::new();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, format!("poison-{number}"));
        headers.insert(header::TRACEPARENT, format!("00-{number:032x}-{number:016x}-01"));
        if let Some(content_type) = poison.content_type {
            headers.insert(header::CONTENT_TYPE, content_type);
        }
        let sequence = world.publish_raw(headers, poison.payload.clone()).await?;
        origins.insert(sequence, number);
    }
    let last = order(&[(product, 1)]);
    world.publish(&last).await?;
    good.push(last.payload.order_id);

    let letters = world.context.get_stream(dead_letter::STREAM).await?;
    eventually("every poison message to be a dead letter", DEAD_LETTER_BOUND, async || {
        Ok((letters.get_info().await?.state.messages == poisons.len() as u64).then_some(()))
    })
    .await?;
    for sequence in 1..=poisons.len() as u64 {
        let letter = letters.get_raw_message(sequence).await?;
        let text = |name: &str| letter.headers.get(name).map(|value| value.as_str().to_owned());
        let origin: u64 = text(dead_letter::ORIGIN_SEQUENCE).context("no origin")?.parse()?;
        let number = origins.remove(&origin).context("the origin is no poison, or died twice")?;
        let poison = &poisons[number];
        assert_eq!(letter.payload, poison.payload, "the payload is kept as it came");
        assert_eq!(letter.subject.as_str(), subject::dead_letter(streams::PRODUCT_ORDERS));
        assert_eq!(text(dead_letter::ORIGIN_STREAM).as_deref(), Some(streams::ORDERS));
        assert_eq!(text(dead_letter::ORIGIN_SUBJECT).as_deref(), Some("lomash.orders.created"));
        assert_eq!(text(dead_letter::CONSUMER).as_deref(), Some(streams::PRODUCT_ORDERS));
        assert_eq!(text(dead_letter::DELIVERIES).as_deref(), Some("1"));
        assert_eq!(text(dead_letter::ORIGIN_MESSAGE_ID), Some(format!("poison-{number}")));
        assert_eq!(text(header::CONTENT_TYPE).as_deref(), poison.content_type);
        assert_eq!(text(header::TRACEPARENT), Some(format!("00-{number:032x}-{number:016x}-01")));
        let reason = text(dead_letter::REASON).context("no reason")?;
        for word in poison.says {
            assert!(reason.contains(word), "poison {number}: `{word}` is not in the reason: {reason}");
        }
    }

    let fates = world.decided(good.iter().copied()).await?;
    assert!(fates.values().all(|fate| *fate == Fate::Allocated), "{fates:?}");
    world.quiet().await?;
    let consumer = world.product_orders().await?;
    assert_eq!(consumer.ack_floor.stream_sequence, (2 * poisons.len() + 1) as u64);
    assert_eq!((consumer.num_ack_pending, consumer.num_redelivered), (0, 0), "the originals are settled");
    assert_eq!(world.stock(product).await?, 10_000 - good.len() as u32);
    let report = world.verified().await?;
    assert_eq!(report.totals.malformed_orders, poisons.len() as u64);
    assert_eq!(report.totals.dead_letters, poisons.len() as u64);
    service.stop().await?;
    world.close();
    Ok(())
}

/// The largest order of the contract is one batch: 1,000 lines, and as many products that it sells out.
#[tokio::test]
async fn an_order_of_a_thousand_lines_is_one_batch() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let products = world.register_many(1_000, 3).await?;
    let lines: Vec<_> = products.iter().map(|product| (*product, 3)).collect();
    let too_much: Vec<_> = products.iter().map(|product| (*product, 4)).collect();

    let refused = order(&too_much);
    assert_eq!(decide(&world, &refused).await?, SHORT);
    assert_eq!(refusals(&world, refused.payload.order_id).await?[0].1.len(), 1_000);

    let largest = order(&lines);
    assert_eq!(decide(&world, &largest).await?, Fate::Allocated);
    let events = world.events().await?;
    let id = Some(largest.payload.order_id);
    let taken: Vec<&StoredMessage> = events
        .iter()
        .filter(|(_, event)| matches!(event, LedgerEvent::InventoryUpdated(updated) if updated.order_id == id))
        .map(|(message, _)| message)
        .collect();
    assert_eq!(taken.len(), 1_000);
    let batch = &taken[0].batch.as_ref().unwrap().id;
    assert!(taken.iter().all(|message| message.batch.as_ref().unwrap().id == *batch));
    let in_batch = events.iter().filter(|(message, _)| message.batch.as_ref().unwrap().id == *batch);
    assert_eq!(in_batch.count(), 2_000, "each line and each product that is out of stock now");
    let report = world.verified().await?;
    assert_eq!(report.totals.stock_units, 0);
    service.stop().await?;
    world.close();
    Ok(())
}

/// The race that the whole design is about: many customers, one product, too little of it.
#[tokio::test]
async fn a_hot_product_is_sold_exactly_as_often_as_there_is() -> Result<()> {
    const ORDERS: u32 = 600;
    const STOCK: u32 = ORDERS / 3;
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("HOT-1", STOCK).await?;
    let orders: Vec<_> = (0..ORDERS).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&orders).await?;
    let fates = world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    let served = fates.values().filter(|fate| **fate == Fate::Allocated).count();
    let refused = fates.values().filter(|fate| **fate == SHORT).count();
    assert_eq!((served, refused), (STOCK as usize, (ORDERS - STOCK) as usize));
    assert_eq!(world.stock(product).await?, 0);
    let report = world.verified().await?;
    assert_eq!(report.totals.allocated_units, i128::from(STOCK));
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn trace_and_reason_travel_with_the_events() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let (one, other) = (world.register("TRACE-1", 5).await?, world.register("TRACE-2", 5).await?);

    // Each order's events carry its own trace, also when they share a batch.
    let mut expected = HashMap::new();
    let mut publishing = Vec::new();
    for number in 1..=20_u32 {
        // The later ones are refused, and a refusal carries its trace too.
        let order = order(&[(one, 1), (other, 1)]);
        let trace = format!("00-{number:032x}-{number:016x}-01");
        let (mut headers, body) = encoded(ContentType::Json, &order);
        headers.insert(header::TRACEPARENT, trace.as_str());
        if number % 2 == 0 {
            headers.insert(header::TRACESTATE, format!("shop={number}"));
        }
        expected.insert(order.payload.order_id, (trace, (number % 2 == 0).then(|| format!("shop={number}"))));
        publishing.push(world.publish_raw(headers, body));
    }
    futures::future::try_join_all(publishing).await?;
    let fates = world.decided(expected.keys().copied()).await?;
    assert_eq!(fates.values().filter(|fate| **fate == Fate::Allocated).count(), 5);
    let mut seen = 0;
    for (message, event) in world.events().await? {
        let order = match &event {
            LedgerEvent::InventoryUpdated(updated) => updated.order_id,
            LedgerEvent::InventoryUpdateFailed(failed) => Some(failed.order_id),
            _ => None,
        };
        let Some(order) = order else { continue };
        let (trace, state) = &expected[&order];
        assert_eq!(message.carried.traceparent(), Some(trace.as_str()));
        assert_eq!(message.carried.tracestate(), state.as_deref());
        assert_eq!(message.carried.reason, None);
        seen += 1;
    }
    assert_eq!(seen, 5 * 2 + 15);

    // An admin's words, to the ledger and to the projection.
    let words = "water damage: 5 pcs, see ticket №7";
    let action = Action::SetQuantity { quantity: 12, expected_quantity: Some(0) };
    let command = ProductCommand::new(Uuid::new_v4(), one, UpdatedBy::User(Uuid::new_v4()), action);
    let done = world.desk().await.send(command, Some(words.to_owned())).await?;
    let expected = Outcome::StockChanged { previous_quantity: 0, new_quantity: 12, shortfall: 0 };
    assert_eq!(done.outcome, expected);
    let with_reason: Vec<_> = world
        .events()
        .await?
        .into_iter()
        .filter(|(message, _)| message.carried.reason.as_deref() == Some(words))
        .collect();
    assert_eq!(with_reason.len(), 2, "the change, and that it is available again");
    assert_eq!(with_reason[1].0.sequence, done.sequence);
    world.verified().await?;
    let database = world.database().await?;
    let query = "SELECT reason FROM inventory.movements WHERE product_id = $1 ORDER BY sequence DESC LIMIT 1";
    let shown: Option<String> = database.query_one(query, &[&one.0]).await?.get(0);
    assert_eq!(shown.as_deref(), Some(words));
    service.stop().await?;
    world.close();
    Ok(())
}

/// Admin commands race with orders and with each other, in one process and from another; what is refused changes nothing.
#[tokio::test]
async fn admin_commands_and_orders_share_one_chain() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("MIX-1", 300).await?;
    let orders: Vec<_> = (0..200).map(|_| order(&[(product, 1)])).collect();
    let admin = Caller::new(&service.url, Role::Admin)?;
    let adjustments = format!("/v1/products/{product}/inventory/adjustments");
    let adjust = |delta: i64| admin.post(&adjustments, &json!({ "delta": delta, "reason": "delivery" })).send();
    let adjusting = futures::future::join_all((0..50).map(|_| adjust(2)));
    let taking = futures::future::join_all((0..10).map(|_| adjust(-10_000)));
    let elsewhere = futures::future::join_all((0..20).map(|_| world.act(product, Action::Adjust { delta: 1 })));
    let (published, adjusted, taken, elsewhere) =
        tokio::join!(world.publish_all(&orders), adjusting, taking, elsewhere);
    published?;
    for done in adjusted {
        let done = done?;
        assert_eq!(done.status, 200, "{done:?}");
    }
    for refused in taken {
        let refused = refused?;
        assert_eq!((refused.status, refused.problem()), (409, "below-zero"), "{refused:?}");
    }
    for done in elsewhere {
        done?;
    }
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    assert_eq!(world.stock(product).await?, 300 - 200 + 100 + 20);

    // The same sku cannot be taken twice, and the same registration again is nothing new.
    let taken = world.register("MIX-1", 1).await.expect_err("the sku has an owner");
    assert!(format!("{taken:#}").contains(&product.to_string()), "{taken:#}");
    let last = world.last_sequence().await?;
    let again = Action::Register { details: details("MIX-1")?, initial_quantity: 300 };
    assert_eq!(world.act(product, again).await?.outcome, Outcome::Unchanged);
    assert_eq!(world.last_sequence().await?, last);
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}
