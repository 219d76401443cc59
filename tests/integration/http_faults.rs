//! The HTTP adapter while servers are slow, frozen, dead and back again, and while everything else is busy.
//!
//! Owns what a client may rely on then: an answer that says "done" is true, one that cannot know says so in time, a key
//! tells afterwards, and reads heal by themselves. Which of two replicas orders are delivered to is the server's choice, and on
//! a busy machine it chooses anew: tests look who it is, by the mark of who decided.
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt;
use lomash::stack::{Redis, Service};
use lomash_contract::ProductId;
use lomash_ledger::StoredMessage;
use lomash_tests::http::{Answer, Caller};
use lomash_tests::{Dice, PATIENCE, World, eventually, fate, order, start_until_ready, writer};
use lomash_web::Role;
use product_service::commands::{WRITER_SUBJECT, WRITING_FOR};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Within this an admin's change must be stored while the product is sold at full speed elsewhere.
const ADMIN_BOUND: Duration = Duration::from_secs(1);

/// Changes that must all keep within it.
const ADMIN_CHANGES: u32 = 30;

/// Orders on the way at once: more than the pinned replica can decide meanwhile, so that it is always busy.
const ORDERS_IN_FLIGHT: usize = 1_000;

/// Within this a service that is cut off from NATS must answer.
const CUT_OFF_BOUND: Duration = Duration::from_secs(5);

/// Within this reads must be answered again when Postgres is back.
const HEAL_BOUND: Duration = Duration::from_secs(10);

/// Longest pause between two changes.
const MOST_MS_BETWEEN: u32 = 100;

/// Events of the product's sale that must fall between the first change and the last; more changes are made until then.
const SALES_MEANWHILE: u64 = 3_000;

/// Pause between two requests of steady traffic.
const TRAFFIC_PAUSE: Duration = Duration::from_millis(10);

/// Requests of steady traffic that must go well before the next thing happens.
const SOME: u64 = 30;

/// A service without limits on rates, with these variables besides.
async fn started(world: &World, name: &str, variables: &[(&str, &str)]) -> Result<Service> {
    let mut service = world.service(name)?.env("HTTP_WRITES_PER_SECOND", "0").env("HTTP_READS_PER_SECOND", "0");
    for (variable, value) in variables {
        service = service.env(variable, value);
    }
    start_until_ready(&mut service).await?;
    Ok(service)
}

async fn finish(world: World, services: impl IntoIterator<Item = Service>) -> Result<()> {
    for mut service in services {
        service.stop().await?;
        let log = std::fs::read_to_string(service.log())?;
        assert!(!log.contains("panicked"), "a panic in {}:\n{log}", service.name());
    }
    world.close();
    Ok(())
}

fn inventory(product: Uuid) -> String {
    format!("/v1/products/{product}/inventory")
}

/// The ids of all events in the ledger.
async fn event_ids(world: &World) -> Result<HashSet<String>> {
    let messages = world.messages().await?;
    Ok(messages.iter().filter_map(|message| Some(message.parse().ok()?.event_id.to_string())).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admin_wins_within_a_second_while_the_product_is_sold_at_full_speed() -> Result<()> {
    let (world, mut dice) = (World::start().await?, Dice::thrown());
    let pinned = started(&world, "pinned", &[]).await?;
    let admin = Caller::new(&world.url("pinned"), Role::Admin)?;
    let product = admin.register(1_000_000_000).await?;
    let first = order(&[(ProductId(product), 1)]);
    world.publish(&first).await?;
    world.decided([first.payload.order_id]).await?;
    let other = started(&world, "other", &[]).await?;

    let (stop, context) = (CancellationToken::new(), world.context.clone());
    let until = stop.clone();
    let selling: JoinHandle<Result<()>> = tokio::spawn(async move {
        let orders = futures::stream::repeat_with(|| order(&[(ProductId(product), 1)])).take_until(until.cancelled());
        let mut sent = std::pin::pin!(
            orders.map(|order| lomash::orders::publish(&context, order)).buffer_unordered(ORDERS_IN_FLIGHT)
        );
        while let Some(outcome) = sent.next().await {
            outcome?;
        }
        Ok(())
    });
    let before = world.last_sequence().await?;
    eventually("many sales", PATIENCE, async || Ok((world.last_sequence().await? > before + 2_000).then_some(())))
        .await?;

    let admin = admin.at(&world.url("other"));
    let (started_at, sold_before) = (Instant::now(), world.last_sequence().await?);
    let (mut slowest, mut refused, mut stored) = (Duration::ZERO, Vec::new(), HashSet::new());
    let mut changes = 0;
    while changes < ADMIN_CHANGES || world.last_sequence().await? < sold_before + SALES_MEANWHILE {
        ensure!(started_at.elapsed() < PATIENCE, "the product is hardly sold");
        // At any moment of the writer's batches, and not where a look at the ledger would put it.
        tokio::time::sleep(Duration::from_millis(dice.below(MOST_MS_BETWEEN).into())).await;
        let body = json!({ "quantity": 900_000_000 + changes, "reason": "an admin's word" });
        let answer = admin.patch(&inventory(product), &body).send().await?;
        slowest = slowest.max(answer.took);
        stored.extend(answer.json["sequence"].as_u64());
        if answer.status != 200 || answer.took >= ADMIN_BOUND {
            refused.push(format!("change {changes}: {} after {:?} {}", answer.status, answer.took, answer.text));
        }
        changes += 1;
    }
    let rate = (world.last_sequence().await? - sold_before) as f64 / started_at.elapsed().as_secs_f64();
    println!("slowest of {changes} changes: {slowest:?}, at {rate:.0} events/s on the product");
    stop.cancel();
    selling.await??;
    assert!(
        refused.is_empty(),
        "{} of {changes} changes did not win within {ADMIN_BOUND:?} at {rate:.0} events/s (slowest {slowest:?}):\n{}",
        refused.len(),
        refused.join("\n")
    );
    // The replica that sells at that moment stored the changes too, between its sales: what made them win. Where no order
    // came for long, the other may have stored one itself.
    let messages = world.messages().await?;
    let (mut seller, mut by_seller) = (None, 0);
    for message in &messages {
        if fate(message).is_some() {
            seller = writer(message);
        } else if stored.contains(&message.sequence) && writer(message) == seller {
            by_seller += 1;
        }
    }
    println!("{by_seller} of {} changes were stored by the replica that sells", stored.len());
    assert!(
        by_seller * 2 > stored.len(),
        "only {by_seller} of {} changes went to the replica that sells",
        stored.len()
    );
    world.verified().await?;
    finish(world, [pinned, other]).await
}

/// How long after another's last decision a replica is taken for the only one that believes that it writes.
const ALONE_AFTER: Duration = WRITING_FOR.saturating_add(Duration::from_secs(1));

/// Waits until one of the replicas writes, alone, knows it and takes the commands of others; its mark. What `sell_one` sells
/// is decided by it.
async fn writing_alone(world: &World, sell_one: impl AsyncFn() -> Result<()>) -> Result<String> {
    eventually("one replica that writes", PATIENCE, async || {
        let asked = Instant::now();
        sell_one().await?;
        let decisions: Vec<StoredMessage> =
            world.messages().await?.into_iter().filter(|message| fate(message).is_some()).collect();
        let last = decisions.last().context("a decision")?;
        let mark = writer(last).context("it is in a batch")?;
        let others = decisions.iter().filter(|message| writer(message) != Some(mark)).map(|message| message.stored_at);
        let is_alone = others.max().is_none_or(|at| last.stored_at - at > ALONE_AFTER);
        // Whatever is no command is answered, too, by whoever takes commands; it is told when nobody does.
        world.client.request(WRITER_SUBJECT, "".into()).await.context("nobody takes commands")?;
        // And it does so for a while yet.
        Ok((is_alone && asked.elapsed() < WRITING_FOR / 2).then(|| mark.to_owned()))
    })
    .await
}

/// A writer that has a command and does not answer may get to it when the stock admits it. Whoever says until then that it was
/// refused, or that there was nothing to do, puts that on record, and it holds.
#[tokio::test]
async fn a_frozen_writer_makes_no_false_refusal() -> Result<()> {
    let world = World::start().await?;
    let one = started(&world, "one", &[]).await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let (product, sold) = (admin.register(5).await?, admin.register(1_000_000).await?);
    let sell_one = async || {
        let one = order(&[(ProductId(sold), 1)]);
        world.publish(&one).await?;
        world.decided([one.payload.order_id]).await.map(drop)
    };
    let mark_of_one = writing_alone(&world, &sell_one).await?;
    let two = started(&world, "two", &[]).await?;
    let (frozen, other) = if writing_alone(&world, &sell_one).await? == mark_of_one { (one, two) } else { (two, one) };
    frozen.pause()?;
    let admin = admin.at(&world.url(other.name()));
    let take_ten = || {
        let body = json!({ "delta": -10, "reason": "sold" });
        admin.post(&format!("{}/adjustments", inventory(product)), &body).header("Idempotency-Key", "ten").send()
    };
    // The refusal is on record, so the writer knows it when it gets to the request after all: it holds.
    let refused = take_ten().await?;
    assert_eq!((refused.status, refused.problem()), (409, "below-zero"), "{refused:?}");
    assert!(refused.took < CUT_OFF_BOUND, "{refused:?}");
    // What the other stores by itself is true whatever the writer does.
    let set = admin.patch(&inventory(product), &json!({ "quantity": 100 })).send().await?;
    assert_eq!((set.status, &set.json["quantity"]), (200, &json!(100)), "{set:?}");
    // Nor does a write without a key that changed nothing change something later.
    let nothing = admin.patch(&inventory(product), &json!({ "quantity": 100 })).send().await?;
    assert_eq!((nothing.status, &nothing.json["changed"]), (200, &json!(false)), "{nothing:?}");
    let less = admin.patch(&inventory(product), &json!({ "quantity": 90 })).send().await?;
    assert_eq!(less.status, 200, "{less:?}");
    frozen.resume()?;
    let told = eventually("the outcome under the key", PATIENCE, async || {
        let answer = take_ten().await?;
        Ok((!admits(&answer)).then_some(answer))
    })
    .await?;
    assert_eq!((told.status, told.problem()), (409, "below-zero"), "{told:?}");
    assert_eq!(told.header("idempotent-replayed"), Some("true"), "{told:?}");
    // The writer has answered what it was asked before it was frozen.
    sell_one().await?;
    world.verified().await?;
    assert_eq!(world.stock(ProductId(product)).await?, 90, "what was told holds");
    finish(world, [frozen, other]).await
}

/// Whether the answer admits that it does not know, or that nothing can be done now.
fn admits(answer: &Answer) -> bool {
    answer.status == 503 && matches!(answer.problem(), "outcome-unknown" | "unavailable")
}

/// Sends adjustments under keys of their own while `cut` happens, checks what is answered, has it healed, and finds out
/// under the same keys that each was carried out once.
async fn nothing_is_told_done_that_is_not(
    cut: impl FnOnce(&mut World) -> Result<()>,
    heal: impl AsyncFnOnce(&mut World) -> Result<()>,
) -> Result<()> {
    const WRITES: u32 = 40;
    let mut world = World::start().await?;
    let one = started(&world, "one", &[]).await?;
    let two = started(&world, "two", &[]).await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let product = admin.register(0).await?;
    let path = format!("{}/adjustments", inventory(product));
    let send = |number: u32| {
        let url = world_url(number);
        let (admin, path) = (admin.clone(), path.clone());
        let url = world.url(url);
        async move {
            let body = json!({ "delta": 1, "reason": "delivery" });
            admin.at(&url).post(&path, &body).header("Idempotency-Key", format!("delivery-{number}")).send().await
        }
    };
    // The first ones are on their way when it happens, the others find it so.
    let mut early: Vec<_> = (0..WRITES / 2).map(&send).collect();
    let late: Vec<_> = (WRITES / 2..WRITES).map(&send).collect();
    let again: Vec<_> = (0..WRITES).map(&send).collect();
    let ahead = world.last_sequence().await?;
    let early: Vec<_> = early.drain(..).map(tokio::spawn).collect();
    eventually("the first writes", PATIENCE, async || Ok((world.last_sequence().await? > ahead).then_some(()))).await?;
    cut(&mut world)?;
    let late: Vec<_> = late.into_iter().map(tokio::spawn).collect();
    let (mut done, mut unknown) = (0, 0);
    for (number, answer) in early.into_iter().chain(late).enumerate() {
        let answer = answer.await??;
        assert!(answer.took < CUT_OFF_BOUND, "write {number} was answered after {:?}: {answer:?}", answer.took);
        match answer.status {
            200 => done += 1,
            _ if admits(&answer) => unknown += 1,
            _ => bail!("write {number}: {answer:?}"),
        }
    }
    assert!(unknown >= WRITES / 2, "{unknown} were not done: was it cut off at all?");
    heal(&mut world).await?;

    let (mut replayed, mut anew) = (0, 0);
    let healed = Instant::now();
    for (number, first) in again.into_iter().enumerate() {
        let mut answer = first.await?;
        while admits(&answer) && healed.elapsed() < PATIENCE {
            answer = admin
                .post(&path, &json!({ "delta": 1, "reason": "delivery" }))
                .header("Idempotency-Key", format!("delivery-{number}"))
                .send()
                .await?;
        }
        assert_eq!(answer.status, 200, "write {number}: {answer:?}");
        if answer.header("idempotent-replayed").is_some() { replayed += 1 } else { anew += 1 }
    }
    println!("{done} done, {unknown} unknown; under the same keys {replayed} had been done and {anew} had not");
    assert!(replayed >= done, "an answer told done what was not");
    let stock = world.stock(ProductId(product)).await?;
    assert_eq!(stock, WRITES, "each was carried out once");
    world.verified().await?;
    finish(world, [one, two]).await
}

/// Which replica a write is sent to.
const fn world_url(number: u32) -> &'static str {
    if number.is_multiple_of(2) { "one" } else { "two" }
}

#[tokio::test]
async fn a_frozen_nats_makes_no_false_success() -> Result<()> {
    nothing_is_told_done_that_is_not(|world| world.nats.pause(), async |world| world.nats.resume()).await
}

#[tokio::test]
async fn a_killed_nats_makes_no_false_success() -> Result<()> {
    let kill = |world: &mut World| {
        world.nats.kill();
        Ok(())
    };
    nothing_is_told_done_that_is_not(kill, async |world| world.nats.restart().await).await
}

#[tokio::test]
async fn writes_go_on_without_postgres_and_reads_heal() -> Result<()> {
    let mut world = World::start().await?;
    let service = started(&world, "one", &[]).await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let product = admin.register(0).await?;
    let stock = inventory(product);
    let before = admin.get(&stock).header("Lomash-Min-Sequence", world.last_sequence().await?).send().await?;
    assert_eq!(before.status, 200, "{before:?}");
    world.postgres.as_mut().context("Postgres")?.kill();
    let written = admin.patch(&stock, &json!({ "quantity": 7 })).send().await?;
    assert_eq!((written.status, &written.json["quantity"]), (200, &json!(7)), "{written:?}");
    for path in [
        stock.clone(),
        format!("/v1/products/{product}"),
        "/v1/products".to_owned(),
        format!("{stock}/history"),
        format!("/v1/orders/{product}/decision"),
        "/v1/reconciliations".to_owned(),
    ] {
        let read = admin.get(&path).send().await?;
        assert_eq!((read.status, read.problem()), (503, "unavailable"), "{path}: {read:?}");
        assert!(read.header("retry-after").is_some() && read.took < Duration::from_secs(5), "{path}: {read:?}");
    }
    let read = admin.get(&stock).header("Lomash-Min-Sequence", written.sequence()).send().await?;
    assert_eq!((read.status, read.problem()), (503, "not-yet-projected"), "{read:?}");
    let ready = admin.get("/readyz").send().await?;
    assert_eq!(ready.status, 200, "orders and writes go on: {ready:?}");

    world.postgres.as_mut().context("Postgres")?.restart().await?;
    let since = Instant::now();
    let read = eventually("a read", HEAL_BOUND, async || {
        let read = admin.get(&stock).header("Lomash-Min-Sequence", written.sequence()).send().await?;
        Ok((read.status == 200).then_some(read))
    })
    .await?;
    println!("reads were back {:?} after Postgres", since.elapsed());
    assert_eq!(read.json["quantity"], 7, "{read:?}");
    world.verified().await?;
    finish(world, [service]).await
}

/// Steady traffic: what went well, and every answer that the design does not name.
#[derive(Default)]
struct Traffic {
    reads: AtomicU64,
    reads_later: AtomicU64,
    writes: AtomicU64,
    writes_later: AtomicU64,
}

/// Writes one product's stock up by one, again and again; the ids of the events that were told to be stored.
async fn write_steadily(
    admin: Caller,
    product: Uuid,
    traffic: Arc<Traffic>,
    stop: CancellationToken,
) -> Result<Vec<String>> {
    let mut stored = Vec::new();
    while !stop.is_cancelled() {
        let body = json!({ "delta": 1, "reason": "steady" });
        let answer = admin.post(&format!("{}/adjustments", inventory(product)), &body).send().await?;
        match answer.status {
            200 => {
                traffic.writes.fetch_add(1, Ordering::Relaxed);
                stored.push(answer.json["eventId"].as_str().context("an event")?.to_owned());
            }
            _ if admits(&answer) => drop(traffic.writes_later.fetch_add(1, Ordering::Relaxed)),
            _ => bail!("a write was answered {answer:?}"),
        }
        tokio::time::sleep(TRAFFIC_PAUSE).await;
    }
    Ok(stored)
}

async fn read_steadily(
    viewer: Caller,
    paths: Vec<String>,
    traffic: Arc<Traffic>,
    stop: CancellationToken,
) -> Result<()> {
    for path in paths.iter().cycle() {
        if stop.is_cancelled() {
            break;
        }
        let answer = viewer.get(path).send().await?;
        match answer.status {
            200 => drop(traffic.reads.fetch_add(1, Ordering::Relaxed)),
            503 if matches!(answer.problem(), "unavailable" | "not-yet-projected") => {
                ensure!(answer.header("retry-after").is_some(), "{path}: {answer:?}");
                traffic.reads_later.fetch_add(1, Ordering::Relaxed);
            }
            _ => bail!("{path} was answered {answer:?}"),
        }
        ensure!(answer.took < CUT_OFF_BOUND, "{path} was answered after {:?}", answer.took);
        tokio::time::sleep(TRAFFIC_PAUSE).await;
    }
    Ok(())
}

/// Waits until a counter went on by [`SOME`].
async fn goes_on(what: &str, counter: &AtomicU64) -> Result<()> {
    let before = counter.load(Ordering::Relaxed);
    eventually(what, PATIENCE, async || Ok((counter.load(Ordering::Relaxed) >= before + SOME).then_some(()))).await
}

/// Waits until a service says of its cache that it is used, or that it is not.
async fn cache_is(caller: &Caller, used: bool) -> Result<()> {
    eventually(&format!("a cache that is used: {used}"), PATIENCE, async || {
        let ready = caller.get("/readyz").send().await?;
        let checks = ready.json["checks"].as_array().context("checks")?;
        let cache = checks.iter().find(|check| check["name"] == "cache").context("a cache")?;
        Ok((cache["ready"] == used).then_some(()))
    })
    .await
}

#[tokio::test]
async fn redis_and_postgres_come_and_go_and_no_write_is_lost() -> Result<()> {
    let mut world = World::start().await?;
    let mut redis = Redis::start(&world.dir().join("redis")).await?;
    let url = redis.url();
    let services =
        [started(&world, "one", &[("REDIS_URL", &url)]).await?, started(&world, "two", &[("REDIS_URL", &url)]).await?];
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let callers = [admin.clone(), admin.at(&world.url("two"))];
    let mut products = Vec::new();
    for _ in 0..4 {
        products.push(admin.register(0).await?);
    }
    for caller in &callers {
        cache_is(caller, true).await?;
    }
    let (traffic, stop) = (Arc::new(Traffic::default()), CancellationToken::new());
    let mut paths: Vec<String> = products.iter().map(|product| format!("/v1/products/{product}")).collect();
    paths.extend(["/v1/products".to_owned(), "/v1/products?available=true&sort=-quantity".to_owned()]);
    let mut writing = Vec::new();
    for (number, product) in products.iter().enumerate() {
        let caller = callers[number % 2].clone();
        writing.push(tokio::spawn(write_steadily(caller, *product, traffic.clone(), stop.clone())));
    }
    let reading: Vec<_> = callers
        .iter()
        .map(|caller| tokio::spawn(read_steadily(caller.clone(), paths.clone(), traffic.clone(), stop.clone())))
        .collect();
    goes_on("reads", &traffic.reads).await?;
    let later = traffic.reads_later.load(Ordering::Relaxed);

    redis.kill();
    for caller in &callers {
        cache_is(caller, false).await?;
    }
    goes_on("reads without Redis", &traffic.reads).await?;
    goes_on("writes without Redis", &traffic.writes).await?;
    redis.restart().await?;
    for caller in &callers {
        cache_is(caller, true).await?;
    }
    redis.pause()?;
    for caller in &callers {
        cache_is(caller, false).await?;
    }
    goes_on("reads with a Redis that hangs", &traffic.reads).await?;
    redis.resume()?;
    for caller in &callers {
        cache_is(caller, true).await?;
    }
    assert_eq!(traffic.reads_later.load(Ordering::Relaxed), later, "a read was not answered for want of Redis");

    for _ in 0..2 {
        let postgres = world.postgres.as_mut().context("Postgres")?;
        postgres.kill();
        goes_on("writes without Postgres", &traffic.writes).await?;
        goes_on("reads told to come later", &traffic.reads_later).await?;
        postgres.restart().await?;
        let since = Instant::now();
        goes_on("reads with Postgres back", &traffic.reads).await?;
        assert!(since.elapsed() < HEAL_BOUND, "reads were back after {:?}", since.elapsed());
    }
    stop.cancel();
    let mut told = Vec::new();
    for writer in writing {
        told.extend(writer.await??);
    }
    for reader in reading {
        reader.await??;
    }
    let Traffic { reads, reads_later, writes, writes_later } = &*traffic;
    println!("reads {reads:?}, told later {reads_later:?}; writes {writes:?}, told later {writes_later:?}");
    let stored = event_ids(&world).await?;
    assert!(told.iter().all(|id| stored.contains(id)), "a write that was answered 200 is not in the ledger");
    assert_eq!(writes_later.load(Ordering::Relaxed), 0, "writes need neither Redis nor Postgres");

    // Once quiet, what is cached is what Postgres has.
    world.verified().await?;
    let database = world.database().await?;
    let mut truth = BTreeMap::new();
    for row in database.query("SELECT product_id, quantity::bigint, sequence FROM inventory.stock", &[]).await? {
        truth.insert(row.get::<_, Uuid>(0).to_string(), (row.get::<_, i64>(1), row.get::<_, i64>(2)));
    }
    let seen = |item: &Value| {
        let id = item["productId"].as_str().unwrap().to_owned();
        (id, (item["quantity"].as_i64().unwrap(), item["version"].as_i64().unwrap()))
    };
    for caller in callers.iter().chain(&callers) {
        for path in &paths {
            let answer = caller.get(path).send().await?;
            assert_eq!(answer.status, 200, "{path}: {answer:?}");
            let items = answer.json["items"].as_array().cloned().unwrap_or_else(|| vec![answer.json.clone()]);
            for (id, found) in items.iter().map(seen) {
                assert_eq!(found, truth[&id], "{path}");
            }
        }
    }
    finish(world, services).await
}

#[tokio::test]
async fn a_stopping_service_says_so_and_finishes_what_it_took() -> Result<()> {
    let world = World::start().await?;
    let mut service = started(&world, "one", &[("HTTP_STOP_DELAY_SECONDS", "1")]).await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    let product = admin.register(0).await?;
    assert_eq!(admin.get("/readyz").send().await?.status, 200);
    // The write is in flight as long as NATS does not answer.
    world.nats.pause()?;
    let mut writing = {
        let (admin, path) = (admin.clone(), inventory(product));
        tokio::spawn(async move { admin.patch(&path, &json!({ "quantity": 5 })).send().await })
    };
    let still = tokio::time::timeout(Duration::from_millis(300), &mut writing).await;
    assert!(still.is_err(), "it was answered while NATS was frozen: {still:?}");
    let looking = async {
        eventually("a service that is not ready", PATIENCE, async || {
            let ready = admin.get("/readyz").send().await?;
            Ok((ready.status == 503 && ready.json["stopping"] == true).then_some(()))
        })
        .await?;
        world.nats.resume()?;
        Ok::<_, anyhow::Error>(())
    };
    let (looked, stopped) = tokio::join!(looking, service.stop());
    looked?;
    stopped?;
    let written = writing.await??;
    assert_eq!((written.status, &written.json["quantity"]), (200, &json!(5)), "{written:?}");
    assert_eq!(world.stock(ProductId(product)).await?, 5);
    assert!(admin.get("/readyz").send().await.is_err(), "it has stopped");
    finish(world, [service]).await
}
