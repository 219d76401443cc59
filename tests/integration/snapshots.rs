//! Snapshots on a real server: what was written comes back, and what cannot be trusted is passed over.
//!
//! Owns the object store and the start of the service. That a snapshot and its tail are the whole fold, wherever it was
//! taken, is a property in `inventory_tests.rs`.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use async_nats::jetstream::object_store::{ObjectInfo, ObjectStore};
use bytes::Bytes;
use futures::TryStreamExt;
use lomash_contract::{
    EventId, FailureReason, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, ProductDetails, ProductId,
    ProductRegistered, Timestamp, Trigger, UpdatedBy,
};
use lomash_ledger::{Ledger, NewMessage, streams};
use lomash_tests::http::Caller;
use lomash_tests::{Fate, PATIENCE, World, eventually, order, start_until_ready};
use lomash_web::Role;
use product_service::committer::catch_up;
use product_service::inventory::State;
use product_service::snapshots::{FORMAT, KEPT_SNAPSHOTS, SUBJECT, Snapshots};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use uuid::Uuid;

/// The whole ledger, folded.
async fn whole(world: &World) -> Result<State> {
    let mut state = State::default();
    catch_up(&world.ledger(), &mut state, |_, _| {}).await?;
    Ok(state)
}

/// Writes a snapshot of the whole ledger, whatever is there.
async fn save(world: &World) -> Result<State> {
    let state = whole(world).await?;
    let saved = Snapshots::new(world.context.clone()).save(state.freeze(), 1).await?;
    assert_eq!(saved.map(|saved| saved.sequence), Some(state.sequence()));
    Ok(state)
}

async fn newest(world: &World) -> Option<State> {
    Snapshots::new(world.context.clone()).newest().await
}

async fn store(world: &World) -> Result<ObjectStore> {
    Ok(world.context.get_object_store(streams::SNAPSHOTS_BUCKET).await?)
}

/// What is stored, the newest first.
async fn stored(world: &World) -> Result<Vec<ObjectInfo>> {
    let mut infos: Vec<_> = store(world).await?.list().await?.try_collect().await?;
    infos.sort_by_key(|info| std::cmp::Reverse(label(info)["sequence"].as_u64()));
    Ok(infos)
}

fn label(info: &ObjectInfo) -> Value {
    serde_json::from_str(&info.metadata["label"]).unwrap()
}

/// Subjects of the chunks that the stream holds.
async fn chunks(world: &World) -> Result<BTreeMap<String, usize>> {
    let stream = world.context.get_stream(streams::SNAPSHOTS).await?;
    Ok(stream.info_with_subjects("$O.SNAPSHOTS.C.>").await?.try_collect().await?)
}

/// Writes a description anew, as the store does.
async fn describe(world: &World, info: &ObjectInfo) -> Result<()> {
    let meta = world.context.get_stream(streams::SNAPSHOTS).await?.info_with_subjects("$O.SNAPSHOTS.M.>").await?;
    for (subject, _) in meta.try_collect::<Vec<_>>().await? {
        let stream = world.context.get_stream(streams::SNAPSHOTS).await?;
        let present = stream.get_last_raw_message_by_subject(&subject).await?;
        let present: ObjectInfo = serde_json::from_slice(&present.payload)?;
        if present.name == info.name {
            let mut headers = HeaderMap::new();
            headers.insert("Nats-Rollup", "sub");
            world.context.publish_with_headers(subject, headers, serde_json::to_vec(info)?.into()).await?.await?;
        }
    }
    Ok(())
}

/// The bytes of a snapshot.
async fn content(world: &World, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    store(world).await?.get(name).await?.read_to_end(&mut bytes).await?;
    Ok(bytes)
}

/// Puts other bytes into the place of a snapshot, with a digest that fits them.
async fn replace(world: &World, info: &ObjectInfo, bytes: &[u8]) -> Result<()> {
    let mut meta: async_nats::jetstream::object_store::ObjectMetadata = info.name.as_str().into();
    meta.metadata = info.metadata.clone();
    store(world).await?.put(meta, &mut &*bytes).await?;
    Ok(())
}

/// The same parts behind another label.
fn relabelled(bytes: &[u8], label: &Value) -> Vec<u8> {
    let (length, rest) = bytes.split_first_chunk::<4>().unwrap();
    let label = rmp_serde::to_vec_named(label).unwrap();
    let parts = &rest[u32::from_be_bytes(*length) as usize..];
    [&u32::try_from(label.len()).unwrap().to_be_bytes(), label.as_slice(), parts].concat()
}

/// A world with a product, in which the service has decided an order and is stopped again.
async fn traded() -> Result<(World, ProductId)> {
    let world = World::without_postgres().await?;
    let mut service = world.start_service("first").await?;
    let oak = world.register("OAK", 50).await?;
    trade(&world, oak).await?;
    service.stop().await?;
    Ok((world, oak))
}

/// Has an order decided.
async fn trade(world: &World, product: ProductId) -> Result<()> {
    let order = order(&[(product, 1)]);
    world.publish(&order).await?;
    world.decided([order.payload.order_id]).await?;
    Ok(())
}

#[tokio::test]
async fn a_service_starts_from_its_snapshot_and_knows_what_it_knew() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.service("writer")?.env("SNAPSHOT_AFTER_EVENTS", "1").env("RUST_LOG", "info");
    start_until_ready(&mut service).await?;
    let oak = world.register("OAK", 50).await?;
    let before = order(&[(oak, 3)]);
    world.publish(&before).await?;
    world.decided([before.payload.order_id]).await?;
    // The order is in the ledger before the service knows so; what the service answers after it was decided on top of it.
    Caller::new(&world.url("writer"), Role::Admin)?.register(1).await?;
    world.context.publish(SUBJECT, "{}".into()).await?.await?;
    eventually("a snapshot", PATIENCE, async || Ok((!stored(&world).await?.is_empty()).then_some(()))).await?;
    let snapshot = newest(&world).await.context("it is usable")?;
    assert_eq!(snapshot, whole(&world).await?);
    let after = order(&[(oak, 5)]);
    world.publish(&after).await?;
    world.decided([after.payload.order_id]).await?;
    service.stop().await?;

    let mut reader = world.start_service("reader").await?;
    let log = std::fs::read_to_string(reader.log())?;
    assert!(log.contains("starting from a snapshot"), "{log}");
    // What was decided before the snapshot and after it is known, and an order as the rest of the ledger wants it.
    for known in [&before, &after] {
        let mut again = known.clone();
        again.event_id = EventId(Uuid::new_v4());
        world.publish(&again).await?;
    }
    let next = order(&[(oak, 42)]);
    world.publish(&next).await?;
    assert_eq!(world.decided([next.payload.order_id]).await?[&next.payload.order_id], Fate::Allocated);
    assert_eq!(world.stock(oak).await?, 0);
    world.verified().await?;
    reader.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_damaged_snapshot_is_passed_over_for_an_older_one_and_that_for_the_whole_ledger() -> Result<()> {
    let (world, oak) = traded().await?;
    let older = save(&world).await?;
    let mut service = world.start_service("second").await?;
    trade(&world, oak).await?;
    service.stop().await?;
    let newer = save(&world).await?;
    let good = stored(&world).await?;
    let bytes = content(&world, &good[0].name).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&newer));

    // A byte in the middle is another one, and the digest is still that of the bytes before.
    let flipped: Vec<u8> = bytes.iter().enumerate().map(|(at, byte)| byte ^ u8::from(at == bytes.len() / 2)).collect();
    replace(&world, &good[0], &flipped).await?;
    let lying = ObjectInfo { digest: good[0].digest.clone(), ..stored(&world).await?[0].clone() };
    describe(&world, &lying).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&older), "a flipped byte");

    // Bytes with a digest of their own that are no snapshot, or not all of one, or more than one.
    let longer = [bytes.as_slice(), &[0, 0, 0, 0]].concat();
    let huge = [&u32::MAX.to_be_bytes(), bytes.as_slice()].concat();
    for (what, other) in [("empty", &[][..]), ("cut", &bytes[..bytes.len() - 1]), ("longer", &longer), ("huge", &huge)]
    {
        replace(&world, &good[0], other).await?;
        assert_eq!(newest(&world).await.as_ref(), Some(&older), "{what}");
    }
    replace(&world, &good[0], &bytes).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&newer), "whole again");

    // The chunks are gone, as when a disk lost them; the reader does not wait for ever.
    let stream = world.context.get_stream(streams::SNAPSHOTS).await?;
    stream.purge().filter(format!("$O.SNAPSHOTS.C.{}", stored(&world).await?[0].nuid)).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&older), "chunks gone");
    stream.purge().filter("$O.SNAPSHOTS.C.>").await?;
    assert_eq!(newest(&world).await, None);
    stream.purge().await?;
    assert_eq!(newest(&world).await, None, "an empty store");

    // And a service starts all the same.
    let mut service = world.start_service("third").await?;
    trade(&world, oak).await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_snapshot_of_another_format_or_another_ledger_is_not_used() -> Result<()> {
    let (world, _) = traded().await?;
    let state = save(&world).await?;
    let good = stored(&world).await?.remove(0);
    let bytes = content(&world, &good.name).await?;
    let (sequence, skipped) = (state.sequence(), 7);
    let ledger = |created: Value, id: Value| json!({ "streamCreated": created, "lastMessageId": id });
    let of = &label(&good)["ledger"];
    let (created, id) = (of["streamCreated"].clone(), of["lastMessageId"].clone());
    for (what, change) in [
        ("an older format", json!({ "format": FORMAT - 1 })),
        ("a newer format", json!({ "format": FORMAT + 1, "unheardOf": true })),
        ("another stream", json!({ "ledger": ledger(json!("2020-01-01T00:00:00Z"), id) })),
        ("another message", json!({ "ledger": ledger(created.clone(), json!(Uuid::new_v4())) })),
        ("beyond the end", json!({ "sequence": sequence + 1, "ledger": ledger(created, json!(null)) })),
    ] {
        // The same in the snapshot and beside it, so that only what is named can be the reason.
        let mut text = label(&good);
        text.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let mut info = good.clone();
        info.metadata.insert("label".to_owned(), text.to_string());
        replace(&world, &info, &relabelled(&bytes, &text)).await?;
        assert_eq!(newest(&world).await, None, "{what}");
    }
    let mut other = label(&good);
    other["skipped"] = json!(skipped);
    for (what, beside) in [("another label than in it", other.to_string()), ("no label", String::new())] {
        let mut info = good.clone();
        info.metadata.insert("label".to_owned(), beside);
        replace(&world, &info, &bytes).await?;
        assert_eq!(newest(&world).await, None, "{what}");
    }
    // Written anew as it was it is used: what is refused above is refused for its label.
    replace(&world, &good, &relabelled(&bytes, &label(&good))).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&state));
    replace(&world, &good, &bytes).await?;
    assert_eq!(newest(&world).await.as_ref(), Some(&state));

    // The same messages in a new stream, by the same names: only the stream itself is another one.
    let messages = world.messages().await?;
    let copies: Vec<NewMessage> = messages
        .iter()
        .map(|message| NewMessage {
            subject: message.subject.clone(),
            event_id: EventId(message.message_id.as_deref().unwrap().parse().unwrap()),
            payload: message.payload.clone(),
            carried: None,
        })
        .collect();
    let definition = streams::definitions().into_iter().find(|definition| definition.name == streams::INVENTORY);
    world.context.delete_stream(streams::INVENTORY).await?;
    let config = definition.context("INVENTORY")?.config;
    let _: Value = world.context.request(format!("STREAM.CREATE.{}", streams::INVENTORY), &config).await?;
    world.ledger().append(&copies, 0).await?;
    assert_eq!(whole(&world).await?, state, "the same state");
    assert_eq!(newest(&world).await, None, "and yet another ledger");
    // A snapshot of this one takes the place of that of no use, not a further one.
    save(&world).await?;
    assert_eq!(stored(&world).await?.len(), 1);
    assert_eq!(newest(&world).await, Some(state));
    world.close();
    Ok(())
}

#[tokio::test]
async fn the_last_few_are_kept_and_an_unfinished_one_is_cleared_away() -> Result<()> {
    let (world, oak) = traded().await?;
    let mut service = world.start_service("second").await?;
    let mut sequences = Vec::new();
    for _ in 0..KEPT_SNAPSHOTS + 2 {
        trade(&world, oak).await?;
        sequences.insert(0, save(&world).await?.sequence());
    }
    let kept: Vec<u64> = stored(&world).await?.iter().filter_map(|info| label(info)["sequence"].as_u64()).collect();
    assert_eq!(kept, sequences[..KEPT_SNAPSHOTS]);
    // Too little is new: nothing is written.
    let state = whole(&world).await?;
    let snapshots = Snapshots::new(world.context.clone());
    assert_eq!(snapshots.save(state.freeze(), 1).await?, None);
    assert_eq!(stored(&world).await?.len(), KEPT_SNAPSHOTS);
    assert_eq!(chunks(&world).await?.len(), KEPT_SNAPSHOTS, "nothing else is left of the older ones");
    service.stop().await?;

    // A service that dies while it writes leaves what was there, and chunks that the next writer clears away.
    let newest_before = newest(&world).await;
    let mut dying = world.service("dying")?.env("SNAPSHOT_AFTER_EVENTS", "1");
    dying.set_env("FAILPOINTS", "snapshot-between-parts=1*off->return");
    start_until_ready(&mut dying).await?;
    trade(&world, oak).await?;
    world.context.publish(SUBJECT, "{}".into()).await?.await?;
    tokio::time::timeout(PATIENCE, dying.ended()).await.context("it dies while it writes")?;
    assert_eq!(newest(&world).await, newest_before);
    world.context.publish("$O.SNAPSHOTS.C.unfinished", Bytes::from_static(b"a chunk")).await?.await?;
    save(&world).await?;
    let infos = stored(&world).await?;
    let expected: Vec<String> = infos.iter().map(|info| format!("$O.SNAPSHOTS.C.{}", info.nuid)).collect();
    let mut found: Vec<String> = chunks(&world).await?.into_keys().collect();
    found.sort();
    let mut expected = expected;
    expected.sort();
    assert_eq!(found, expected);
    world.close();
    Ok(())
}

#[tokio::test]
async fn of_two_replicas_one_writes_upon_a_tick() -> Result<()> {
    let world = World::without_postgres().await?;
    let mut replicas = Vec::new();
    for name in ["one", "two"] {
        let mut service = world.service(name)?.env("SNAPSHOT_AFTER_EVENTS", "1");
        start_until_ready(&mut service).await?;
        replicas.push(service);
    }
    let oak = world.register("OAK", 50).await?;
    trade(&world, oak).await?;
    for tick in 1..=3 {
        trade(&world, oak).await?;
        // A standby writes what it knows, and it looks once a second; then there is something new for either.
        let last = world.last_sequence().await?;
        eventually("a snapshot", PATIENCE, async || {
            if stored(&world).await?.first().is_some_and(|info| label(info)["sequence"].as_u64() >= Some(last)) {
                return Ok(Some(()));
            }
            let info = world.context.get_stream(streams::JOBS).await?.get_info().await?;
            // The clocks of both schedules stay in the stream; ticks do not.
            if info.state.messages <= 2 {
                world.context.publish(SUBJECT, "{}".into()).await?.await?;
            }
            Ok(None)
        })
        .await
        .with_context(|| format!("tick {tick}"))?;
    }
    let mut sequences = Vec::new();
    for replica in &replicas {
        let log = std::fs::read_to_string(replica.log())?;
        sequences.extend(log.lines().filter(|line| line.contains("wrote a snapshot")).map(str::to_owned));
    }
    let written: std::collections::BTreeSet<&str> = sequences
        .iter()
        .filter_map(|line| line.split("sequence=").nth(1)?.split(|c: char| !c.is_ascii_digit()).next())
        .collect();
    assert_eq!(written.len(), sequences.len(), "each once: {sequences:?}");
    assert_eq!(chunks(&world).await?.len(), stored(&world).await?.len());
    assert_eq!(newest(&world).await, Some(whole(&world).await?));
    world.verified().await?;
    for mut replica in replicas {
        replica.stop().await?;
    }
    world.close();
    Ok(())
}

/// Resident memory of this process, in MB.
fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1_024
}

/// What a large state costs, for docs/performance.md: in a build that is optimised,
/// `cargo test --release -p lomash-tests --test integration -- --ignored --nocapture large_state`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement of a minute, not a test"]
async fn a_large_state_is_small_quickly_copied_and_quickly_read() -> Result<()> {
    const PRODUCTS: u64 = 1_000_000;
    const ORDERS: u64 = 10_000_000;
    let world = World::without_postgres().await?;
    // A ledger that ends where this state does, without its events.
    let definition = streams::definitions().into_iter().find(|definition| definition.name == streams::INVENTORY);
    let mut config = definition.context("INVENTORY")?.config;
    config.insert("first_seq".to_owned(), json!(PRODUCTS + ORDERS + 1));
    world.context.delete_stream(streams::INVENTORY).await?;
    let _: Value = world.context.request(format!("STREAM.CREATE.{}", streams::INVENTORY), &config).await?;
    let before = resident_mb();
    let mut state = State::default();
    let registered = |n: u64| {
        LedgerEvent::ProductRegistered(ProductRegistered(ProductDetails {
            product_id: ProductId(Uuid::from_u128(u128::from(n) << 64)),
            sku: format!("KIT-{n:08}").parse().unwrap(),
            name: format!("Oak base unit, {n} mm").into(),
            category: Some("Kitchens".into()),
            low_stock_threshold: None,
            active: true,
        }))
    };
    for n in 0..PRODUCTS {
        state.evolve(state.sequence() + 1, Timestamp::now(), &registered(n), None);
    }
    println!("{PRODUCTS} products: {} MB", resident_mb() - before);
    let mut slowest = Duration::ZERO;
    let folding = Instant::now();
    for n in 0..ORDERS {
        let refused = InventoryUpdateFailed {
            order_id: OrderId(Uuid::from_u128(u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835))),
            reason: FailureReason::InsufficientStock,
            items: Vec::new(),
        };
        let event = LedgerEvent::InventoryUpdateFailed(refused);
        let one = Instant::now();
        state.evolve(state.sequence() + 1, Timestamp::now(), &event, None);
        slowest = slowest.max(one.elapsed());
    }
    println!(
        "and {ORDERS} orders: {} MB; folded in {:?}, the slowest event {slowest:?}",
        resident_mb() - before,
        folding.elapsed()
    );
    let copying = Instant::now();
    let frozen = state.freeze();
    println!("copied in {:?}", copying.elapsed());
    let saving = Instant::now();
    let sequence = state.sequence();
    let snapshots = Snapshots::new(world.context.clone());
    let changing = tokio::spawn(async move {
        // Meanwhile the committer goes on: the first change of each page copies it.
        let mut slowest = Duration::ZERO;
        for n in 0..PRODUCTS {
            let updated = InventoryUpdated {
                product_id: ProductId(Uuid::from_u128(u128::from(n) << 64)),
                sku: "ANY".parse().unwrap(),
                previous_quantity: 0,
                new_quantity: 1,
                trigger: Trigger::AdminUpdate,
                order_id: None,
                updated_by: UpdatedBy::System,
            };
            let event = LedgerEvent::InventoryUpdated(updated);
            let one = Instant::now();
            state.evolve(state.sequence() + 1, Timestamp::now(), &event, None);
            slowest = slowest.max(one.elapsed());
            tokio::task::yield_now().await;
        }
        println!("the slowest change meanwhile {slowest:?}");
        state
    });
    let saved = snapshots.save(frozen, 1).await?.context("written")?;
    println!("written in {:?}, {} MB; resident {} MB", saving.elapsed(), saved.bytes >> 20, resident_mb() - before);
    drop(changing.await?);
    println!("resident {} MB without it", resident_mb() - before);
    let loading = Instant::now();
    let loaded = snapshots.newest().await.context("readable")?;
    println!("read in {:?}, resident {} MB", loading.elapsed(), resident_mb() - before);
    assert_eq!(loaded.sequence(), sequence);
    world.close();
    Ok(())
}
