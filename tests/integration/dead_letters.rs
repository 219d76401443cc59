//! Dead letters on real servers: every way in which a message can fail ends in one letter, nothing innocent does, and an
//! operator can bring letters back.
//!
//! Owns failing and coming back; `orders.rs` owns what makes a message no order. Latency is measured by events: whoever must
//! not wait for something is shown to be done while that something cannot happen.
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{AckPolicy, Info, PullConsumer, pull};
use futures::StreamExt;
use lomash::stack::Service;
use lomash_contract::{Envelope, OrderCreated, ProductId};
use lomash_ledger::dead_letter::{self, DeadLetter, Filter, Letter, Letters, LettersError, MAX_SCANNED, Past, Way};
use lomash_ledger::receive::{self, Delivery, Receive, Settle};
use lomash_ledger::{header, streams, suspects};
use lomash_tests::http::Caller;
use lomash_tests::{Fate, PATIENCE, World, eventually, order};
use lomash_web::Role;
use product_service::orders;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Within this a message that panics or cannot be read must be a dead letter.
const DEAD_LETTER_BOUND: Duration = Duration::from_secs(10);

/// Within this a message that ends the process must be one: two deliveries among others and two alone, each of which is
/// noticed after an `ack_wait` (10 s and 6 s) and the start of a service, on a busy machine.
const ABORT_BOUND: Duration = Duration::from_secs(180);

/// Orders around a culprit.
const NEIGHBOURS: usize = 120;

fn letters(world: &World) -> Letters {
    Letters::new(world.context.clone())
}

async fn all_letters(world: &World) -> Result<Vec<Letter>> {
    Ok(letters(world).page(&Filter::default(), 0, usize::MAX).await?.letters)
}

/// Waits until there are so many letters.
async fn lettered(world: &World, count: usize, within: Duration) -> Result<Vec<Letter>> {
    eventually(&format!("{count} dead letters"), within, async || {
        let letters = all_letters(world).await?;
        Ok((letters.len() == count).then_some(letters))
    })
    .await
}

/// How many suspects wait.
async fn suspects_waiting(world: &World) -> Result<u64> {
    Ok(world.context.get_stream(suspects::STREAM).await?.cached_info().state.messages)
}

/// A consumer with other limits in the place of `product-orders`, and without its pin.
async fn product_orders_with(world: &World, ack_wait: Duration, max_deliver: i64) -> Result<PullConsumer> {
    let stream = world.context.get_stream(streams::ORDERS).await?;
    stream.delete_consumer(streams::PRODUCT_ORDERS).await?;
    let config = pull::Config {
        durable_name: Some(streams::PRODUCT_ORDERS.to_owned()),
        filter_subject: "lomash.orders.created".to_owned(),
        ack_policy: AckPolicy::Explicit,
        ack_wait,
        max_deliver,
        ..Default::default()
    };
    Ok(stream.create_consumer(config).await?)
}

/// The receive loop with a handler of the test's.
struct Running {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn start<H, F>(world: &World, receive: Receive, handler: H) -> Self
    where
        H: Fn(Delivery) -> F + Send + Sync + 'static,
        F: Future<Output = Settle> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let task = tokio::spawn(receive::run(world.context.clone(), receive, stop.clone(), handler));
        Self { stop, task }
    }

    async fn stop(self) -> Result<()> {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.task).await.context("the loop does not end")??;
        Ok(())
    }
}

/// Without a pin, so that a test's loops need not wait for the one of the test before.
fn unpinned() -> Receive {
    Receive { group: None, ..orders::receive() }
}

async fn info(world: &World) -> Result<Info> {
    world.product_orders().await
}

fn says(delivery: &Delivery, text: &str) -> bool {
    delivery.payload.windows(text.len()).any(|window| window == text.as_bytes())
}

// ── Ways to fail ────────────────────────────────────────────────────────────────────────────────────────────────

/// Starts the service again whenever it has ended, as a supervisor does, until `done` says so. How often it aborted.
async fn supervised(service: &mut Service, mut done: impl AsyncFnMut() -> Result<bool>) -> Result<u32> {
    let mut aborts = 0;
    let deadline = tokio::time::Instant::now() + ABORT_BOUND;
    service.start()?;
    while !done().await? {
        if let Some(status) = service.exit() {
            anyhow::ensure!(!status.success(), "it ended by itself: {status}");
            aborts += 1;
            service.restart()?;
        }
        if tokio::time::Instant::now() > deadline {
            bail!("not within {} s, after {aborts} aborts", ABORT_BOUND.as_secs());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(aborts)
}

#[tokio::test]
async fn an_order_that_ends_the_process_is_a_letter_and_its_neighbours_are_decided() -> Result<()> {
    let world = World::without_postgres().await?;
    let mut service = world.start_service("one").await?;
    let product = world.register("SAFE-1", 100_000).await?;
    service.stop().await?;

    // All of them are in flight together when the culprit is handled.
    let culprit = order(&[(product, 1)]);
    let neighbours: Vec<_> = (0..NEIGHBOURS).map(|_| order(&[(product, 1)])).collect();
    let (before, after) = neighbours.split_at(NEIGHBOURS / 2);
    world.publish_all(before).await?;
    world.publish(&culprit).await?;
    world.publish_all(after).await?;
    service.set_env("FAILPOINTS", "order-handling=return");
    service.set_env("FAILPOINTS_ORDER", culprit.payload.order_id.to_string());
    let aborts = supervised(&mut service, async || Ok(!all_letters(&world).await?.is_empty())).await?;
    assert!((4..=6).contains(&aborts), "two among others, two alone, and no more than a few: {aborts}");

    let fates = world.decided(neighbours.iter().map(|order| order.payload.order_id)).await?;
    assert!(fates.values().all(|fate| *fate == Fate::Allocated), "{fates:?}");
    let letters = all_letters(&world).await?;
    let [letter] = letters.as_slice() else { panic!("{letters:?}") };
    let origin = letter.origin.as_ref().context("an origin")?;
    assert_eq!((origin.stream.as_str(), origin.subject.as_str()), (streams::ORDERS, "lomash.orders.created"));
    assert_eq!(letter.payload, serde_json::to_vec(&culprit)?, "its payload");
    assert_eq!(origin.message_id, Some(culprit.event_id.to_string()));
    assert!(letter.reason.contains("ends the process"), "{}", letter.reason);
    assert!(letter.attempts >= 4, "{}", letter.attempts);
    // The service lives on, and the ledger is whole.
    let next = order(&[(product, 1)]);
    world.publish(&next).await?;
    world.decided([next.payload.order_id]).await?;
    world.quiet().await?;
    let report = world.report().await?;
    assert!(report.is_clean(), "\n{}", lomash::verify::render(&report));
    assert_eq!(report.totals.orders_allocated, NEIGHBOURS as u64 + 1);
    service.stop().await?;
    world.close();
    Ok(())
}

/// Delivers all messages of the consumer so often, to nobody who settles them.
async fn deliver_in_vain(consumer: &PullConsumer, times: i64, messages: usize) -> Result<()> {
    for time in 1..=times {
        let mut batch = consumer.batch().max_messages(messages).expires(PATIENCE).messages().await?;
        for _ in 0..messages {
            let message = batch.next().await.context("no message")?.map_err(anyhow::Error::from_boxed)?;
            assert_eq!(message.info().map_err(anyhow::Error::from_boxed)?.delivered, time);
        }
    }
    // The server gives up when somebody asks for more than it may deliver, and not before.
    let mut nothing = consumer.batch().max_messages(messages).expires(Duration::from_secs(3)).messages().await?;
    assert!(nothing.next().await.is_none(), "given up");
    Ok(())
}

/// Nobody is there when the server gives up: the advisory waits, over a restart of the server too.
#[tokio::test]
async fn what_the_server_gave_up_is_heard_later_and_only_the_guilty_become_letters() -> Result<()> {
    let mut world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("LATE-1", 10).await?;
    service.stop().await?;
    let consumer = product_orders_with(&world, Duration::from_secs(1), 3).await?;
    let innocent = order(&[(product, 4)]);
    world.publish(&innocent).await?;
    let mut headers = HeaderMap::new();
    headers.insert(header::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    let poison = world.publish_raw(headers, "no order").await?;
    let gone = world.publish_raw(HeaderMap::new(), "to be deleted").await?;
    deliver_in_vain(&consumer, 3, 3).await?;
    eventually("three advisories", PATIENCE, async || {
        let waiting = suspects_waiting(&world).await?;
        anyhow::ensure!(waiting == 3, "{waiting} are there");
        Ok(Some(()))
    })
    .await?;
    assert!(all_letters(&world).await?.is_empty(), "an advisory convicts nobody");
    world.context.get_stream(streams::ORDERS).await?.delete_message(gone).await?;
    world.nats.restart().await?;
    streams::wait_until_ready(&world.context).await?;
    assert_eq!(suspects_waiting(&world).await?, 3, "over the restart");

    let service = world.run_service().await?;
    assert_eq!(world.decided([innocent.payload.order_id]).await?[&innocent.payload.order_id], Fate::Allocated);
    let letters = lettered(&world, 2, DEAD_LETTER_BOUND).await?;
    let of = |sequence| letters.iter().find(|letter| letter.origin.as_ref().is_some_and(|o| o.sequence == sequence));
    let letter = of(poison).context("a letter of the poison")?;
    assert!(letter.reason.contains("order-created"), "what its handler says: {}", letter.reason);
    assert_eq!((letter.attempts, &letter.payload[..]), (3, &b"no order"[..]));
    assert!(letter.traceparent.as_ref().is_some_and(|trace| trace.contains("0af7651916cd43dd8448eb211c80319c")));
    let letter = of(gone).context("a letter of what is gone")?;
    assert!(letter.reason.contains("lost"), "{}", letter.reason);
    eventually("no suspects", PATIENCE, async || Ok((suspects_waiting(&world).await? == 0).then_some(()))).await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_handler_that_does_not_end_is_tried_alone_and_becomes_a_letter() -> Result<()> {
    let world = World::without_postgres().await?;
    product_orders_with(&world, Duration::from_secs(1), 10).await?;
    for text in ["good 1", "hangs", "good 2"] {
        world.publish_raw(HeaderMap::new(), text).await?;
    }
    let done = Arc::new(Mutex::new(Vec::new()));
    let running = Running::start(&world, Receive { in_progress_every: None, ..unpinned() }, {
        let done = done.clone();
        move |delivery: Delivery| {
            let done = done.clone();
            async move {
                if says(&delivery, "hangs") {
                    std::future::pending::<()>().await;
                }
                done.lock().unwrap().push((delivery.sequence, delivery.deliveries));
                Settle::Done
            }
        }
    });
    let letters = lettered(&world, 1, PATIENCE).await?;
    assert!(letters[0].reason.contains("does not end"), "{}", letters[0].reason);
    assert_eq!(letters[0].origin.as_ref().map(|origin| origin.sequence), Some(2));
    assert_eq!(letters[0].attempts, 3, "twice among others and once alone");
    assert_eq!(*done.lock().unwrap(), [(1, 1), (3, 1)], "the others are handled at once");
    running.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_handler_that_panics_is_tried_thrice_and_harms_nobody() -> Result<()> {
    let world = World::without_postgres().await?;
    product_orders_with(&world, Duration::from_secs(5), 10).await?;
    for number in 0..30 {
        world.publish_raw(HeaderMap::new(), if number % 10 == 5 { "panics" } else { "good" }).await?;
    }
    let (good, tries) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let running = Running::start(&world, unpinned(), {
        let (good, tries) = (good.clone(), tries.clone());
        move |delivery: Delivery| {
            let (good, tries) = (good.clone(), tries.clone());
            async move {
                if says(&delivery, "panics") {
                    panic!("try {} of all", tries.fetch_add(1, Ordering::SeqCst));
                }
                good.fetch_add(1, Ordering::SeqCst);
                Settle::Done
            }
        }
    });
    let letters = lettered(&world, 3, DEAD_LETTER_BOUND).await?;
    for letter in &letters {
        assert!(letter.reason.contains("panicked 3 times, last with: try "), "{}", letter.reason);
        assert_eq!(letter.attempts, 3);
    }
    assert_eq!((good.load(Ordering::SeqCst), tries.load(Ordering::SeqCst)), (27, 9));
    eventually("nothing in work", PATIENCE, async || Ok((info(&world).await?.num_ack_pending == 0).then_some(())))
        .await?;
    assert_eq!(info(&world).await?.num_redelivered, 0, "the loop tries by itself");
    running.stop().await?;
    world.close();
    Ok(())
}

/// However long servers are away and however often services stop meanwhile, what waits for them is no dead letter.
#[tokio::test]
async fn that_servers_are_down_convicts_nobody() -> Result<()> {
    const MESSAGES: u64 = 20;
    let world = World::without_postgres().await?;
    product_orders_with(&world, Duration::from_secs(1), 4).await?;
    for number in 0..MESSAGES {
        world.publish_raw(HeaderMap::new(), format!("order {number}")).await?;
    }
    let (down, tries) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let (done, most) = (Arc::new(Mutex::new(HashSet::new())), Arc::new(AtomicU64::new(0)));
    let start = || {
        let (down, done, tries, most) = (down.clone(), done.clone(), tries.clone(), most.clone());
        Running::start(&world, unpinned(), move |delivery: Delivery| {
            let (down, done, tries, most) = (down.clone(), done.clone(), tries.clone(), most.clone());
            async move {
                tries.fetch_add(1, Ordering::SeqCst);
                most.fetch_max(delivery.deliveries, Ordering::SeqCst);
                if down.load(Ordering::SeqCst) {
                    return Settle::Retry(Duration::from_millis(50));
                }
                done.lock().unwrap().insert(delivery.sequence);
                Settle::Done
            }
        })
    };
    // Longer than all deliveries take together: the first one is still the only one.
    let running = start();
    let enough = 100 * MESSAGES;
    let tried = async || Ok((tries.load(Ordering::SeqCst) > enough).then_some(()));
    eventually("many tries", PATIENCE, tried).await?;
    assert_eq!(most.load(Ordering::SeqCst), 1, "tries are no deliveries");
    running.stop().await?;
    // Services that stop give back, and are started again: more often than a consumer delivers.
    for _ in 0..8 {
        let running = start();
        let before = tries.load(Ordering::SeqCst);
        let tried = async || Ok((tries.load(Ordering::SeqCst) > before).then_some(()));
        eventually("a try", PATIENCE, tried).await?;
        running.stop().await?;
    }
    assert!(done.lock().unwrap().is_empty());
    down.store(false, Ordering::SeqCst);
    let running = start();
    let all = async || Ok((done.lock().unwrap().len() as u64 == MESSAGES).then_some(()));
    eventually("all of them", PATIENCE, all).await?;
    eventually("no suspects", PATIENCE, async || Ok((suspects_waiting(&world).await? == 0).then_some(()))).await?;
    assert!(all_letters(&world).await?.is_empty(), "{:?}", all_letters(&world).await?);
    running.stop().await?;
    world.close();
    Ok(())
}

/// Letters cannot be stored: the originals are kept, good orders go on, and all letters are there when there is room again.
#[tokio::test]
async fn a_flood_that_fills_the_dead_letters_stops_no_good_order_and_loses_nothing() -> Result<()> {
    const POISONS: usize = 300;
    let world = World::without_postgres().await?;
    let limit = async |bytes: i64| -> Result<()> {
        let mut config = world.context.get_stream(dead_letter::STREAM).await?.cached_info().config.clone();
        config.max_bytes = bytes;
        world.context.update_stream(config).await?;
        Ok(())
    };
    limit(20_000).await?;
    let mut service = world.start_service("one").await?;
    let product = world.register("ROOM-1", 1_000).await?;
    let poison = "x".repeat(1_000);
    futures::future::try_join_all((0..POISONS).map(|_| world.publish_raw(HeaderMap::new(), poison.clone()))).await?;
    let good: Vec<_> = (0..50).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&good).await?;
    world.decided(good.iter().map(|order| order.payload.order_id)).await?;
    let stored = all_letters(&world).await?.len();
    assert!(stored < POISONS / 10, "the flood is not settled, and the good orders are: {stored}");
    let log = std::fs::read_to_string(service.log())?;
    assert!(log.contains("the message stays in its stream"), "it is told");

    limit(1 << 30).await?;
    let letters = lettered(&world, POISONS, PATIENCE).await?;
    let origins: HashSet<_> = letters.iter().filter_map(|letter| Some(letter.origin.as_ref()?.sequence)).collect();
    assert_eq!(origins.len(), POISONS, "one letter each");
    world.verified().await?;
    let log = std::fs::read_to_string(service.log())?;
    let lines = log.lines().filter(|line| line.contains("dead letter") || line.contains("stays in its stream")).count();
    assert!(lines < POISONS, "a flood is counted, not listed: {lines} lines");
    service.stop().await?;
    world.close();
    Ok(())
}

// ── Coming back ─────────────────────────────────────────────────────────────────────────────────────────────────

/// Writes a letter as the loop of `consumer` does.
pub(crate) async fn write_letter(
    world: &World,
    stream: &str,
    consumer: &str,
    subject: &str,
    sequence: u64,
) -> Result<Letter> {
    let letter = DeadLetter {
        stream,
        consumer,
        subject,
        sequence,
        deliveries: 1,
        reason: "for a test",
        past: Past::default(),
        headers: None,
        payload: "{}".into(),
    };
    let before = all_letters(world).await?.len();
    letter.store(&world.context).await?;
    lettered(world, before + 1, PATIENCE).await?.pop().context("a letter")
}

/// An order of a version that only a newer service can read.
fn of_version(order: &Envelope<OrderCreated>, version: &str) -> Result<Vec<u8>> {
    let mut value = serde_json::to_value(order)?;
    value["version"] = version.into();
    Ok(serde_json::to_vec(&value)?)
}

/// Reads version 2 too, once it is told to: what a newer release of a service does.
fn reader(
    version_2: Arc<AtomicBool>,
    done: Arc<Mutex<Vec<Delivery>>>,
) -> impl Fn(Delivery) -> futures::future::BoxFuture<'static, Settle> {
    move |delivery: Delivery| {
        let (version_2, done) = (version_2.clone(), done.clone());
        Box::pin(async move {
            match orders::parse(None, &delivery.payload) {
                Err(problem) if !version_2.load(Ordering::SeqCst) => Settle::Dead(problem.to_string()),
                _ => {
                    done.lock().unwrap().push(delivery);
                    Settle::Done
                }
            }
        })
    }
}

#[tokio::test]
async fn a_letter_is_redriven_once_however_often_and_says_when_it_comes_back() -> Result<()> {
    let world = World::without_postgres().await?;
    let letters = letters(&world);
    let (version_2, done) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    product_orders_with(&world, Duration::from_secs(5), 10).await?;
    let running = Running::start(&world, unpinned(), reader(version_2.clone(), done.clone()));
    let order = order(&[(ProductId(Uuid::new_v4()), 1)]);
    let payload = of_version(&order, "2.0")?;
    let mut headers = HeaderMap::new();
    headers.insert(header::TRACEPARENT, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
    headers.insert(async_nats::header::NATS_MESSAGE_ID, order.event_id.to_string());
    let first = world.publish_raw(headers, payload.clone()).await?;
    let letter = lettered(&world, 1, DEAD_LETTER_BOUND).await?.remove(0);
    assert!(letter.reason.contains("version 2.0"), "{}", letter.reason);
    assert_eq!((letter.past.redrives, letter.past.history.len()), (0, 0));

    // Too early: it dies again, and says so.
    let redriven = letters.redrive(letter.sequence).await?;
    let Way::Republished { ref subject, ref stream, sequence, duplicate } = redriven.way else { bail!("{redriven:?}") };
    assert_eq!((subject.as_str(), stream.as_str(), duplicate), ("lomash.orders.created", streams::ORDERS, false));
    assert!(sequence > first);
    let again = eventually("the letter of its second death", DEAD_LETTER_BOUND, async || {
        Ok(all_letters(&world).await?.into_iter().find(|again| again.sequence != letter.sequence))
    })
    .await?;
    assert_eq!(all_letters(&world).await?.len(), 1, "the first letter is removed");
    assert_eq!(again.past.redrives, 1);
    let [death] = again.past.history.as_slice() else { panic!("{again:?}") };
    assert!(death.contains("version 2.0") && death.contains(&format!("ORDERS {first}, 1 attempts")), "{death}");
    assert_eq!(again.payload, payload);
    assert_eq!(again.traceparent, letter.traceparent, "the trace goes on");
    assert_eq!(
        again.origin.as_ref().and_then(|o| o.message_id.clone()),
        Some(order.event_id.to_string()),
        "its first id"
    );
    let missing = letters.redrive(letter.sequence).await.expect_err("it is gone");
    assert!(matches!(missing, LettersError::NotFound(sequence) if sequence == letter.sequence), "{missing}");

    // Ten operators at once, and now it can be read: it is there once.
    version_2.store(true, Ordering::SeqCst);
    let ten = futures::future::join_all((0..10).map(|_| letters.redrive(again.sequence))).await;
    let mut sequences = HashSet::new();
    for redriven in ten {
        match redriven {
            Ok(redriven) => match redriven.way {
                Way::Republished { sequence, .. } => _ = sequences.insert(sequence),
                way => bail!("{way:?}"),
            },
            Err(LettersError::NotFound(_)) => {}
            Err(other) => bail!("{other}"),
        }
    }
    assert_eq!(sequences.len(), 1, "one copy: {sequences:?}");
    let handled = async || Ok((!done.lock().unwrap().is_empty()).then_some(()));
    eventually("it to be handled", PATIENCE, handled).await?;
    eventually("nothing in work", PATIENCE, async || Ok((info(&world).await?.num_pending == 0).then_some(()))).await?;
    let done = done.lock().unwrap().clone();
    assert_eq!(done.len(), 1, "{done:?}");
    assert_eq!(done[0].header(dead_letter::REDRIVES), Some("2"));
    assert_eq!(done[0].header(header::TRACEPARENT), letter.traceparent.as_deref());
    assert!(all_letters(&world).await?.is_empty());
    running.stop().await?;
    world.close();
    Ok(())
}

/// The window of de-duplication is over, and a removal got lost: the copy is stored twice, and the order is decided once.
#[tokio::test]
async fn beyond_the_window_the_order_id_decides() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("TWICE-1", 10).await?;
    let order = order(&[(product, 3)]);
    let mut copies = HashSet::new();
    for _ in 0..2 {
        // The same message dies twice, as when the first letter had not been removed.
        let letter = DeadLetter {
            stream: streams::ORDERS,
            consumer: streams::PRODUCT_ORDERS,
            subject: "lomash.orders.created",
            sequence: 1_000 + copies.len() as u64,
            deliveries: 1,
            reason: "for a test",
            past: Past::default(),
            headers: None,
            payload: serde_json::to_vec(&order)?.into(),
        };
        letter.store(&world.context).await?;
        let letter = lettered(&world, 1, PATIENCE).await?.remove(0);
        match letters(&world).redrive(letter.sequence).await?.way {
            Way::Republished { sequence, duplicate: false, .. } => _ = copies.insert(sequence),
            way => bail!("{way:?}"),
        }
    }
    assert_eq!(copies.len(), 2);
    world.quiet().await?;
    assert_eq!(world.stock(product).await?, 7, "decided once");
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// A search looks at so many letters and no more, and says where to go on.
#[tokio::test]
async fn a_search_is_bounded_and_goes_on_where_it_ended() -> Result<()> {
    let world = World::without_postgres().await?;
    let write = async |reason: &str| {
        let mut headers = HeaderMap::new();
        headers.insert(dead_letter::REASON, reason);
        let sent = world.context.publish_with_headers("lomash.dlq.somebody", headers, "".into());
        anyhow::Ok(sent.await?.await?.sequence)
    };
    let mut others = futures::stream::iter(0..MAX_SCANNED).map(|_| write("another")).buffer_unordered(500);
    while let Some(written) = others.next().await {
        written?;
    }
    drop(others);
    let last = write("wanted").await?;
    let letters = letters(&world);
    let filter = Filter { reason: Some("wanted".to_owned()), ..Filter::default() };
    let first = letters.page(&filter, 0, 10).await?;
    assert_eq!((first.letters.len(), first.next, first.as_of), (0, Some(last - 1), last), "it looked at {MAX_SCANNED}");
    let second = letters.page(&filter, first.next.unwrap(), 10).await?;
    assert_eq!((second.letters.len(), second.letters[0].sequence, second.next), (1, last, None));
    // A page without a search is as long as it was asked to be, and knows whether there are more.
    let page = letters.page(&Filter::default(), 0, 10).await?;
    assert_eq!((page.letters.len(), page.next), (10, Some(page.letters[9].sequence)));
    let rest = letters.page(&Filter::default(), last - 3, 3).await?;
    assert_eq!((rest.letters.len(), rest.next), (3, None));
    world.close();
    Ok(())
}

/// No letter leads into the ledger, whatever it claims.
#[tokio::test]
async fn the_ledger_is_never_written_to_by_a_redrive() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("SAFE-2", 10).await?;
    let subject = format!("lomash.inventory.updated.{product}");
    let last = world.last_sequence().await?;
    let event = write_letter(&world, streams::INVENTORY, "somebody", &subject, 2).await?;
    let refused = letters(&world).redrive(event.sequence).await.expect_err("no way back").to_string();
    assert!(refused.contains("never written to again") && refused.contains("lomash rebuild"), "{refused}");
    let forged = write_letter(&world, streams::ORDERS, streams::PRODUCT_ORDERS, &subject, 3).await?;
    let refused = letters(&world).redrive(forged.sequence).await.expect_err("no way back").to_string();
    assert!(refused.contains("ORDERS takes nothing on the subject"), "{refused}");
    assert_eq!(all_letters(&world).await?.len(), 2, "they stay");
    assert_eq!(world.last_sequence().await?, last);
    letters(&world).discard(event.sequence).await?;
    let gone = letters(&world).discard(event.sequence).await.expect_err("it is gone");
    assert!(matches!(gone, LettersError::NotFound(_)), "{gone}");
    service.stop().await?;
    world.close();
    Ok(())
}

/// What goes to one consumer again goes to its handler alone, from where it has been all the time.
#[tokio::test]
async fn a_case_puts_a_message_before_its_own_consumer_and_nobody_else() -> Result<()> {
    let world = World::without_postgres().await?;
    product_orders_with(&world, Duration::from_secs(5), 10).await?;
    let sequence = world.publish_raw(HeaderMap::new(), "an event").await?;
    let (bad, seen) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
    let running = Running::start(&world, unpinned(), {
        let (bad, seen) = (bad.clone(), seen.clone());
        move |_| {
            let (bad, seen) = (bad.clone(), seen.clone());
            async move {
                seen.fetch_add(1, Ordering::SeqCst);
                if bad.load(Ordering::SeqCst) { Settle::Dead("not yet".to_owned()) } else { Settle::Done }
            }
        }
    });
    let first = lettered(&world, 1, DEAD_LETTER_BOUND).await?.remove(0);
    let bring_back = async |redrives: u32| -> Result<()> {
        let past = Past { redrives, history: vec!["not yet".to_owned()] };
        let case = suspects::Case::new(streams::ORDERS, streams::PRODUCT_ORDERS, sequence, 1);
        case.redriven(past, format!("redrive.test.{redrives}")).summon(&world.context).await.map_err(anyhow::Error::msg)
    };
    bring_back(1).await?;
    // Of the same message, within a day, and yet another letter: it was brought back in between.
    let both = lettered(&world, 2, DEAD_LETTER_BOUND).await?;
    let again = both.iter().find(|letter| letter.sequence != first.sequence).context("another letter")?;
    assert_eq!((again.past.redrives, again.past.history.as_slice()), (1, &["not yet".to_owned()][..]));
    bad.store(false, Ordering::SeqCst);
    bring_back(2).await?;
    bring_back(2).await?;
    eventually("no suspects", PATIENCE, async || Ok((suspects_waiting(&world).await? == 0).then_some(()))).await?;
    assert_eq!(seen.load(Ordering::SeqCst), 3, "the same case twice is one");
    assert_eq!(world.context.get_stream(streams::ORDERS).await?.cached_info().state.last_sequence, sequence);
    running.stop().await?;
    world.close();
    Ok(())
}

// ── By command and over HTTP ────────────────────────────────────────────────────────────────────────────────────

/// What `lomash dlq` prints on standard output and standard error, and whether it succeeded.
async fn dlq(world: &World, arguments: &[&str]) -> Result<(bool, Vec<u8>, String)> {
    let program = lomash::up::program("lomash-under-test")?;
    let mut command = tokio::process::Command::new(program);
    let output = command.arg("dlq").args(arguments).env("NATS_URL", world.nats.url()).output().await?;
    Ok((output.status.success(), output.stdout, String::from_utf8(output.stderr)?))
}

/// The same, of a command that succeeds, as text.
async fn dlq_says(world: &World, arguments: &[&str]) -> Result<String> {
    let (is_well, out, error) = dlq(world, arguments).await?;
    anyhow::ensure!(is_well, "{arguments:?}: {}{error}", String::from_utf8_lossy(&out));
    Ok(String::from_utf8(out)?)
}

#[tokio::test]
async fn the_command_lists_shows_redrives_and_discards() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let none = dlq_says(&world, &["list"]).await?;
    assert!(none.contains("0 dead letters, from DEAD_LETTERS as of sequence 0"), "{none}");
    let began = lomash_contract::Timestamp::now().to_string();
    let product = world.register("CLI-1", 10).await?;
    let order = order(&[(product, 1)]);
    let nasty = b"\x1b[2J\xe2\x80\xaegnp.exe\xff".to_vec();
    let mut headers = HeaderMap::new();
    headers.insert("X-Shop", "north");
    for (headers, payload) in [
        (HeaderMap::new(), of_version(&order, "2.0")?),
        (headers, nasty.clone()),
        (HeaderMap::new(), vec![b'x'; 5_000]),
    ] {
        let before = all_letters(&world).await?.len();
        world.publish_raw(headers, payload).await?;
        lettered(&world, before + 1, DEAD_LETTER_BOUND).await?;
    }
    write_letter(&world, streams::INVENTORY, "analytics-of-old", "lomash.inventory.updated.x", 2).await?;

    // Looking.
    let list = dlq_says(&world, &["list"]).await?;
    assert!(list.contains("version 2.0") && list.contains("product-orders") && list.contains("ORDERS 1"), "{list}");
    assert!(list.contains("4 dead letters, from DEAD_LETTERS as of sequence 4"), "{list}");
    let some = dlq_says(&world, &["list", "--limit", "1"]).await?;
    assert!(some.contains("analytics-of-old") && some.contains("and 3 older ones"), "{some}");
    let listed = async |arguments: &[&str]| -> Result<Vec<u64>> {
        let json: Value = serde_json::from_str(&dlq_says(&world, &[&["list", "--json"], arguments].concat()).await?)?;
        Ok(json["letters"]
            .as_array()
            .context("letters")?
            .iter()
            .filter_map(|letter| letter["sequence"].as_u64())
            .collect())
    };
    assert_eq!(listed(&["--consumer", "product-orders"]).await?, [1, 2, 3]);
    assert_eq!(listed(&["--consumer", "product-*"]).await?, [0_u64; 0]);
    assert_eq!(listed(&["--reason", "VERSION 2.0"]).await?, [1]);
    assert_eq!(listed(&["--subject", "lomash.inventory.updated.x"]).await?, [4]);
    assert_eq!(listed(&["--since", &began]).await?, [1, 2, 3, 4]);
    assert_eq!(listed(&["--until", &began]).await?, [0_u64; 0]);
    assert_eq!(listed(&["--since", "1h", "--until", "0s", "--consumer", "product-orders"]).await?, [1, 2, 3]);
    let shown = dlq_says(&world, &["show", "2"]).await?;
    assert!(shown.contains("\\u{1b}[2J\\u{202e}gnp.exe") && !shown.contains('\u{1b}'), "{shown:?}");
    assert!(shown.contains("X-Shop") && shown.contains("north") && shown.contains("no text"), "{shown}");
    let (is_well, raw, _) = dlq(&world, &["show", "2", "--raw"]).await?;
    assert!(is_well && raw == nasty, "{raw:?}");
    let long = dlq_says(&world, &["show", "3"]).await?;
    assert!(long.contains("4.8 KiB") && long.contains("--raw writes all of it") && long.len() < 5_000, "{long}");
    let json: Value = serde_json::from_str(&dlq_says(&world, &["show", "2", "--json"]).await?)?;
    assert_eq!((&json["headers"]["X-Shop"], &json["payload"]), (&json!(["north"]), &Value::Null));
    assert!(json["payloadBase64"].is_string(), "{json}");
    let (is_well, _, error) = dlq(&world, &["show", "77"]).await?;
    assert!(!is_well && error.contains("no dead letter 77"), "{error}");

    // Saying what would be done does nothing.
    let orders =
        async || Ok::<_, anyhow::Error>(world.context.get_stream(streams::ORDERS).await?.cached_info().state.messages);
    let before = orders().await?;
    for verb in ["redrive", "discard"] {
        let (is_well, _, error) = dlq(&world, &[verb]).await?;
        assert!(!is_well && error.contains("say which letters"), "{error}");
        let (is_well, out, _) = dlq(&world, &[verb, "1", "2"]).await?;
        let out = String::from_utf8(out)?;
        assert!(!is_well && out.contains("Nothing was done: add --yes"), "{out}");
        let dry = dlq_says(&world, &[verb, "--consumer", "product-orders", "--dry-run"]).await?;
        assert!(dry.contains("letter 1 would be") && dry.contains("3 would be"), "{dry}");
        let (is_well, _, error) = dlq(&world, &[verb, "1", "--all", "--yes"]).await?;
        assert!(!is_well, "a list and --all contradict each other: {error}");
    }
    assert_eq!((all_letters(&world).await?.len(), orders().await?), (4, before));

    // Doing it. What has no way back is told, and the others go through.
    let (is_well, out, error) = dlq(&world, &["redrive", "--all", "--yes"]).await?;
    let out = String::from_utf8(out)?;
    assert!(!is_well && out.contains("3 redriven, 1 failed"), "{out}{error}");
    assert!(error.contains("letter 4: ") && error.contains("never written to again"), "{error}");
    // They die again, all of them once.
    let again = eventually("the three to be back", DEAD_LETTER_BOUND, async || {
        let letters = all_letters(&world).await?;
        Ok((letters.len() == 4 && letters[0].sequence == 4).then_some(letters))
    })
    .await?;
    assert!(again[1..].iter().all(|letter| letter.past.redrives == 1), "{again:?}");
    assert_eq!(orders().await?, before + 3);
    let shown = dlq_says(&world, &["show", &again[1].sequence.to_string()]).await?;
    assert!(shown.contains("redriven") && shown.contains("1 times") && shown.contains("died before"), "{shown}");

    let gone = dlq_says(&world, &["discard", "4", "--yes"]).await?;
    assert!(gone.contains("1 discarded, 0 failed"), "{gone}");
    let (is_well, _, error) = dlq(&world, &["discard", "4", "--yes"]).await?;
    assert!(!is_well && error.contains("no dead letter 4"), "{error}");
    let json: Value = serde_json::from_str(&dlq_says(&world, &["discard", "--all", "--yes", "--json"]).await?)?;
    assert_eq!((&json["done"], &json["failed"], &json["dryRun"]), (&json!(3), &json!(0), &json!(false)));
    assert!(all_letters(&world).await?.is_empty());
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn letters_over_http() -> Result<()> {
    let world = World::without_postgres().await?;
    let mut service = world.start_service("one").await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    for number in 0..5 {
        let mut headers = HeaderMap::new();
        headers.insert("X-Number", number.to_string());
        world.publish_raw(headers, format!("poison {number}")).await?;
        lettered(&world, number + 1, DEAD_LETTER_BOUND).await?;
    }
    write_letter(&world, streams::INVENTORY, "nobody", "lomash.inventory.updated.x", 2).await?;

    let whole = viewer.get("/v1/dead-letters").send().await?;
    assert_eq!((whole.status, &whole.json["total"], &whole.json["asOf"]), (200, &json!(6), &json!(6)), "{whole:?}");
    assert_eq!(whole.json["items"].as_array().map(Vec::len), Some(6));
    assert_eq!(whole.json["nextCursor"], Value::Null);
    let item = &whole.json["items"][0];
    assert_eq!((&item["attempts"], &item["redrives"], &item["bytes"]), (&json!(1), &json!(0), &json!(8)));
    assert_eq!(item["origin"]["subject"], "lomash.orders.created");
    // Page by page, with a filter.
    let (mut seen, mut path) = (Vec::new(), "/v1/dead-letters?limit=2&consumer=product-orders".to_owned());
    loop {
        let page = viewer.get(&path).send().await?;
        assert_eq!(page.status, 200, "{page:?}");
        seen.extend(
            page.json["items"].as_array().context("items")?.iter().filter_map(|item| item["sequence"].as_u64()),
        );
        let Some(cursor) = page.json["nextCursor"].as_str() else { break };
        path = format!("/v1/dead-letters?limit=2&consumer=product-orders&cursor={cursor}");
    }
    assert_eq!(seen, [1, 2, 3, 4, 5]);
    for bad in
        ["limit=0", "limit=201", "since=yesterday", "colour=red", "cursor=abc", &format!("reason={}", "x".repeat(201))]
    {
        assert_eq!(viewer.get(&format!("/v1/dead-letters?{bad}")).send().await?.status, 400, "{bad}");
    }

    let shown = viewer.get("/v1/dead-letters/2").send().await?;
    assert_eq!((shown.status, &shown.json["payload"]), (200, &json!("poison 1")), "{shown:?}");
    assert_eq!(shown.json["headers"]["X-Number"], json!(["1"]));
    for path in ["/v1/dead-letters/0", "/v1/dead-letters/99", "/v1/dead-letters/18446744073709551615"] {
        let missing = viewer.get(path).send().await?;
        assert_eq!((missing.status, missing.problem()), (404, "dead-letter-not-found"), "{path}: {missing:?}");
    }
    assert_eq!(viewer.get("/v1/dead-letters/first").send().await?.status, 400);

    let redrive = async |caller: &Caller, letter: u64| {
        caller.request(Method::POST, &format!("/v1/dead-letters/{letter}/redrive")).send().await
    };
    let refused = redrive(&viewer, 1).await?;
    assert_eq!((refused.status, refused.problem()), (403, "forbidden"), "{refused:?}");
    assert!(all_letters(&world).await?.iter().any(|letter| letter.sequence == 1));
    let redriven = redrive(&admin, 1).await?;
    assert_eq!(redriven.status, 200, "{redriven:?}");
    assert_eq!((&redriven.json["stream"], &redriven.json["redrives"]), (&json!("ORDERS"), &json!(1)), "{redriven:?}");
    let twice = redrive(&admin, 1).await?;
    assert_eq!((twice.status, twice.problem()), (404, "dead-letter-not-found"), "{twice:?}");
    let none = redrive(&admin, 6).await?;
    assert_eq!((none.status, none.problem()), (409, "no-way-back"), "{none:?}");
    let back = eventually("it to be back", DEAD_LETTER_BOUND, async || {
        let page = viewer.get("/v1/dead-letters?consumer=product-orders").send().await?;
        Ok(page.json["items"].as_array().and_then(|items| items.iter().find(|item| item["redrives"] == 1).cloned()))
    })
    .await?;
    assert!(back["history"][0].as_str().is_some_and(|death| death.contains("1 attempts")), "{back}");
    service.stop().await?;
    world.close();
    Ok(())
}
