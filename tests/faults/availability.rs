//! Two product services on the same servers: one decides the orders, and whatever happens to it the other takes over,
//! with every order decided once. Both are restarted in turn, and nobody notices.
//!
//! Owns failover and rolling restarts. Tells writers apart by the ids of their batches, which begin with a mark that each
//! process draws, and who decides is always looked at: the server pins another client when the pinned one does not pull for some
//! seconds, which happens on a busy machine. Assumes the definition of `product-orders`: a pinned client, `priority_timeout`, and `ack_wait` after which
//! what a dead one had in hand comes back. `LOMASH_TEST_SEED` repeats the faults of a run.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures::StreamExt;
use lomash::stack::Service;
use lomash_contract::{OrderId, ProductId};
use lomash_ledger::Ledger;
use lomash_tests::http::Caller;
use lomash_tests::{Dice, PATIENCE, World, eventually, fate, order, start_until_ready, writer};
use lomash_web::Role;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::link::{Link, Wire};

/// Within this the other replica must be deciding: `priority_timeout`, the pull that is waiting, and a busy machine.
const TAKEOVER_BOUND: Duration = Duration::from_secs(20);

/// Within this every order must be decided: `ack_wait` of what the dead replica had in hand comes on top.
const SETTLE_BOUND: Duration = Duration::from_secs(90);

/// Pause between two orders of the load: several hundred a second, so that some are always in flight.
const LOAD_PAUSE: Duration = Duration::from_millis(3);

/// Who decided orders after this sequence.
async fn deciders(world: &World, after: u64) -> Result<BTreeSet<String>> {
    let mut messages = world.ledger().read(after).await?;
    let mut marks = BTreeSet::new();
    while let Some(message) = messages.next().await.transpose()? {
        if fate(&message).is_some() {
            marks.extend(writer(&message).map(str::to_owned));
        }
    }
    Ok(marks)
}

/// Orders published one after the other until told to end.
struct Load {
    stop: CancellationToken,
    task: JoinHandle<Result<Vec<OrderId>>>,
}

impl Load {
    fn start(world: &World, mut dice: Dice, products: Vec<ProductId>) -> Self {
        let (stop, context) = (CancellationToken::new(), world.context.clone());
        let until = stop.clone();
        let task = tokio::spawn(async move {
            let mut published = Vec::new();
            while !until.is_cancelled() {
                let order = dice.order(&products, 4, 2);
                published.push(order.payload.order_id);
                lomash::orders::publish(&context, order).await?;
                tokio::time::sleep(LOAD_PAUSE).await;
            }
            Ok(published)
        });
        Self { stop, task }
    }

    /// Ends it; which orders were published.
    async fn end(self) -> Result<Vec<OrderId>> {
        self.stop.cancel();
        self.task.await?
    }
}

/// Waits until orders are decided after now, by somebody who is not `than` (or by anybody); who it is, and how long
/// that took.
async fn decided_by_another(world: &World, than: Option<&str>) -> Result<(String, Duration)> {
    let (after, since) = (world.last_sequence().await?, Instant::now());
    let what = format!("orders to be decided by another than {than:?}");
    let mark = eventually(&what, TAKEOVER_BOUND, async || {
        Ok(deciders(world, after).await?.into_iter().find(|mark| Some(mark.as_str()) != than))
    })
    .await?;
    Ok((mark, since.elapsed()))
}

/// Who decides an order that is published now. Only for a moment in which no dead replica can have it in hand.
async fn decider_of_a_new_order(world: &World, product: ProductId) -> Result<(String, Duration)> {
    let (after, since) = (world.last_sequence().await?, Instant::now());
    let order = order(&[(product, 1)]);
    let id = order.payload.order_id;
    world.publish(&order).await?;
    world.decided_within(TAKEOVER_BOUND, [id]).await?;
    let took = since.elapsed();
    let mut messages = world.ledger().read(after).await?;
    while let Some(message) = messages.next().await.transpose()? {
        if fate(&message).is_some_and(|(order, _)| order == id) {
            return Ok((writer(&message).context("it is in a batch")?.to_owned(), took));
        }
    }
    bail!("the decision is not where it was seen")
}

/// How often something is tried again because the server pinned another client meanwhile.
const PIN_TRIES: usize = 10;

/// Does something while orders are delivered to one client all the time; who that was, as the server names it.
async fn while_pinned<T>(world: &World, mut work: impl AsyncFnMut() -> Result<T>) -> Result<(String, T)> {
    for _ in 0..PIN_TRIES {
        let before = world.pinned().await?;
        let done = work().await?;
        match before {
            Some(pin) if world.pinned().await?.as_ref() == Some(&pin) => return Ok((pin, done)),
            _ => println!("the pin went over by itself, on a busy machine"),
        }
    }
    bail!("no client kept the pin in {PIN_TRIES} tries")
}

/// Which of two replicas decides orders, of which the first one's mark is known, and its mark.
async fn deciding(world: &World, mark_of_first: &str) -> Result<(usize, String)> {
    let (mark, _) = decided_by_another(world, None).await?;
    Ok((usize::from(mark != mark_of_first), mark))
}

/// Two replicas; the mark of the first.
async fn two_replicas(world: &World) -> Result<([Service; 2], String)> {
    let first = world.start_service("first").await?;
    let product = world.register("PIN-1", 1).await?;
    let order = order(&[(product, 1)]);
    world.publish(&order).await?;
    world.decided([order.payload.order_id]).await?;
    let marks = deciders(world, 0).await?;
    assert_eq!(marks.len(), 1);
    let second = world.start_service("second").await?;
    Ok(([first, second], marks.into_iter().next().unwrap()))
}

#[tokio::test]
async fn one_replica_decides_and_the_other_takes_over_when_it_is_killed() -> Result<()> {
    let world = World::start().await?;
    let (mut replicas, mark_of_first) = two_replicas(&world).await?;
    let dice = Dice::thrown();
    let products = world.register_many(20, 200_000).await?;

    // Both run, one is pinned: whatever is published, one decides.
    let mut quiet_dice = dice.clone();
    let (_, marks) = while_pinned(&world, async || {
        let before = world.last_sequence().await?;
        let orders: Vec<_> = (0..300).map(|_| quiet_dice.order(&products, 4, 2)).collect();
        world.publish_all(&orders).await?;
        world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
        deciders(&world, before).await
    })
    .await?;
    assert_eq!(marks.len(), 1, "the standby decided orders: {marks:?}");

    let load = Load::start(&world, Dice::new(dice.seed.wrapping_add(1)), products);
    let (victim, mark) = deciding(&world, &mark_of_first).await?;
    replicas[victim].kill();
    let (heir, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was killed", took.as_millis());
    let heirs_pin = world.pinned().await?;

    // The killed one comes back as standby: nobody has to do anything.
    start_until_ready(&mut replicas[victim]).await?;
    let (pin, marks) = while_pinned(&world, async || {
        let resumed = world.last_sequence().await?;
        for _ in 0..10 {
            decided_by_another(&world, None).await?;
        }
        deciders(&world, resumed).await
    })
    .await?;
    assert_eq!(marks.len(), 1, "one decides: {marks:?}");
    if heirs_pin.as_ref() == Some(&pin) {
        assert_eq!(marks, BTreeSet::from([heir]), "who has the pin decides");
    }
    let published = load.end().await?;
    world.decided_within(SETTLE_BOUND, published).await?;
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    for mut replica in replicas {
        replica.stop().await?;
    }
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_replica_that_was_frozen_doubles_nothing() -> Result<()> {
    let world = World::start().await?;
    let (mut replicas, mark_of_first) = two_replicas(&world).await?;
    let products = world.register_many(20, 200_000).await?;
    let product = products[0];
    let load = Load::start(&world, Dice::thrown(), products);
    let (victim, mark) = deciding(&world, &mark_of_first).await?;

    // With orders in hand, and for as long as it takes the other to have the pin and to have decided orders.
    replicas[victim].pause()?;
    let (heir, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was frozen", took.as_millis());
    decided_by_another(&world, None).await?;
    replicas[victim].resume()?;
    // It believes for a moment that nothing happened; its orders are decided or known, its batches are refused.
    decided_by_another(&world, None).await?;

    // It is a good standby again: when the heir is gone, it is back.
    replicas[1 - victim].kill();
    let (back, took) = decider_of_a_new_order(&world, product).await?;
    println!("orders resumed {} ms after the heir was killed", took.as_millis());
    assert_eq!(back, mark);
    assert_ne!(back, heir);
    let published = load.end().await?;
    world.decided_within(SETTLE_BOUND, published).await?;
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    replicas[victim].stop().await?;
    world.close();
    Ok(())
}

/// Stopping in order hands over without waiting for what was in hand to come back.
#[tokio::test]
async fn a_replica_that_stops_in_order_leaves_nothing_behind() -> Result<()> {
    let world = World::without_postgres().await?;
    let (mut replicas, mark_of_first) = two_replicas(&world).await?;
    let products = world.register_many(20, 200_000).await?;
    let load = Load::start(&world, Dice::thrown(), products);
    let (leaving, mark) = deciding(&world, &mark_of_first).await?;
    replicas[leaving].stop().await?;
    let (_, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was stopped", took.as_millis());
    let published = load.end().await?;
    world.decided_within(TAKEOVER_BOUND, published).await?;
    world.verified().await?;
    replicas[1 - leaving].stop().await?;
    world.close();
    Ok(())
}

// ── One fault after the other ───────────────────────────────────────────────────────────────────────────────────

/// Faults in a row; each kind comes once before any comes again.
const FAULTS: usize = 6;

/// Longest that a fault lasts once the other replica has taken over.
const MOST_MS_LONGER: u32 = 6_000;

/// Within this the projection must follow the orders again while a replica is gone, frozen or cut off: after the time in which
/// Postgres gives up on a silent projector (15 s), a try of the other, and a busy machine.
const PROJECTION_BOUND: Duration = Duration::from_secs(45);

/// Within this a replica that is cut off must say that it does not know.
const CUT_OFF_BOUND: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Killed,
    Frozen,
    /// What lies between the replica and NATS.
    Wire(Wire),
}

const KINDS: [Fault; 5] =
    [Fault::Killed, Fault::Frozen, Fault::Wire(Wire::Cut), Fault::Wire(Wire::Mute), Fault::Wire(Wire::Deaf)];

/// A product service behind a wire of its own.
struct Replica {
    service: Service,
    wire: Link,
    /// That of its process, once it was seen to decide.
    mark: Option<String>,
}

impl Replica {
    async fn start(world: &World, name: &str) -> Result<Self> {
        let wire = Link::lay(world.nats.port()).await;
        let mut service = world.service(name)?.env("NATS_URL", format!("nats://127.0.0.1:{}", wire.port));
        start_until_ready(&mut service).await?;
        Ok(Self { service, wire, mark: None })
    }

    fn suffer(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Killed => {
                self.mark = None;
                self.service.kill();
            }
            Fault::Frozen => self.service.pause()?,
            Fault::Wire(wire) => self.wire.set(wire),
        }
        Ok(())
    }

    async fn heal(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Killed => start_until_ready(&mut self.service).await?,
            Fault::Frozen => self.service.resume()?,
            Fault::Wire(_) => self.wire.set(Wire::Whole),
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_one_replica_the_other_goes_on() -> Result<()> {
    let (world, mut dice) = (World::start().await?, Dice::thrown());
    let mut replicas = [Replica::start(&world, "one").await?, Replica::start(&world, "two").await?];
    let products = world.register_many(20, 20_000).await?;
    let load = Load::start(&world, Dice::new(dice.seed.wrapping_add(1)), products);
    // Who decides is found out by stopping one: the other then does, and keeps the pin.
    decided_by_another(&world, None).await?;
    replicas[0].service.stop().await?;
    let (mark, _) = decided_by_another(&world, None).await?;
    start_until_ready(&mut replicas[0].service).await?;
    let admin = Caller::new(&world.url("two"), Role::Admin)?;
    let stock = format!("/v1/products/{}/inventory", admin.register(0).await?);
    let mut active = 1;
    replicas[active].mark = Some(mark);

    let mut kinds = Vec::new();
    for round in 0..FAULTS {
        if kinds.is_empty() {
            kinds = KINDS.to_vec();
        }
        let fault = kinds.swap_remove(usize::try_from(dice.below(u32::try_from(kinds.len())?))?);
        // Mostly the one that decides; the standby must not matter.
        let hits_standby = dice.below(4) == 0;
        let (mark, _) = decided_by_another(&world, None).await?;
        if replicas[active].mark.as_ref() != Some(&mark) {
            println!("the pin went over by itself, on a busy machine");
            active = 1 - active;
            ensure!(replicas[active].mark.as_ref().is_none_or(|known| *known == mark), "a third one decides");
            replicas[active].mark = Some(mark.clone());
        }
        let victim = if hits_standby { 1 - active } else { active };
        let role = if victim == active { "the active" } else { "the standby" };

        replicas[victim].suffer(fault)?;
        if victim == active {
            let (heir, took) = decided_by_another(&world, Some(&mark)).await?;
            println!("round {round}: {role} replica {fault:?}, orders went on after {} ms", took.as_millis());
            active = 1 - active;
            ensure!(replicas[active].mark.as_ref().is_none_or(|known| *known == heir), "a third one decides");
            replicas[active].mark = Some(heir);
        } else {
            let (same, took) = decided_by_another(&world, None).await?;
            println!(
                "round {round}: {role} replica {fault:?}, the next order was decided after {} ms",
                took.as_millis()
            );
            assert_eq!(same, mark);
        }
        let (decided, since) = (world.last_sequence().await?, Instant::now());
        let database = world.database().await?;
        eventually("the projection to go on without the replica", PROJECTION_BOUND, async || {
            let row = database.query_one("SELECT sequence FROM inventory.checkpoint", &[]).await?;
            Ok((row.get::<_, i64>(0).unsigned_abs() >= decided).then_some(()))
        })
        .await?;
        println!("round {round}: the projection had it {} ms later", since.elapsed().as_millis());
        let there = admin.at(&world.url(replicas[victim].service.name()));
        let change = || {
            let body = json!({ "quantity": round + 1 });
            there.patch(&stock, &body).header("Idempotency-Key", format!("round-{round}")).send()
        };
        if let Fault::Wire(_) = fault {
            // It may be stored all the same, where only the answer is lost: that nobody knows is all that may be said.
            let answer = change().await?;
            assert_eq!(answer.status, 503, "{answer:?}");
            assert!(matches!(answer.problem(), "outcome-unknown" | "unavailable"), "{answer:?}");
            assert!(answer.took < CUT_OFF_BOUND, "{answer:?}");
        }
        tokio::time::sleep(Duration::from_millis(dice.below(MOST_MS_LONGER).into())).await;
        replicas[victim].heal(fault).await?;
        let told = eventually("the outcome under the key", PATIENCE, async || {
            let answer = change().await?;
            Ok((answer.status != 503).then_some(answer))
        })
        .await?;
        assert_eq!((told.status, &told.json["quantity"]), (200, &json!(round + 1)), "{told:?}");
        // What it had in hand, or on the wire, arrives now.
        decided_by_another(&world, None).await?;
    }
    let published = load.end().await?;
    println!("{} orders", published.len());
    world.decided_within(SETTLE_BOUND, published).await?;
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    for mut replica in replicas {
        replica.service.stop().await?;
    }
    world.close();
    Ok(())
}

// ── Rolling restarts ────────────────────────────────────────────────────────────────────────────────────────────

/// How often each replica is restarted.
const ROUNDS: usize = 2;

/// How long a replica that is asked to stop goes on while it says that it is not ready.
const STOP_DELAY_SECONDS: u64 = 2;

/// How often a client looks which replicas are ready: often enough to notice within the delay.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Clients that change stock, each a product of its own, and the pause between two changes of one.
const ADMINS: usize = 4;
const ADMIN_PAUSE: Duration = Duration::from_millis(10);

/// A load balancer in front of two replicas, as its clients see it.
struct Balancer {
    urls: [String; 2],
    ready: [AtomicBool; 2],
    turns: AtomicU64,
}

impl Balancer {
    /// A replica that was ready when it was last asked.
    async fn choose(&self) -> Result<&str> {
        eventually("a replica that is ready", PATIENCE, async || {
            let turn = self.turns.fetch_add(1, Ordering::Relaxed);
            let places = [turn % 2, (turn + 1) % 2].map(|place| usize::try_from(place).unwrap());
            let ready = places.into_iter().find(|place| self.ready[*place].load(Ordering::Relaxed));
            Ok(ready.map(|place| self.urls[place].as_str()))
        })
        .await
    }

    async fn look(&self, caller: &Caller, stop: &CancellationToken) {
        while !stop.is_cancelled() {
            for (url, ready) in self.urls.iter().zip(&self.ready) {
                let answer = caller.at(url).get("/readyz").send().await;
                ready.store(answer.is_ok_and(|answer| answer.status == 200), Ordering::Relaxed);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Sets the stock of a product to one number after the other until told to end; the last one. Every request must go well.
async fn change_stock(balancer: &Balancer, admin: Caller, product: Uuid, stop: &CancellationToken) -> Result<u32> {
    let path = format!("/v1/products/{product}/inventory");
    let mut quantity = 0;
    while !stop.is_cancelled() {
        quantity += 1;
        let url = balancer.choose().await?;
        let answer = admin.at(url).patch(&path, &json!({ "quantity": quantity })).send().await;
        let answer = answer.with_context(|| format!("change {quantity} at {url} got no answer"))?;
        ensure!(answer.status == 200, "change {quantity} at {url}: {answer:?}");
        tokio::time::sleep(ADMIN_PAUSE).await;
    }
    Ok(quantity)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_replicas_are_restarted_in_turn_and_nobody_notices() -> Result<()> {
    let world = World::start().await?;
    let mut replicas = Vec::new();
    for name in ["one", "two"] {
        let delay = STOP_DELAY_SECONDS.to_string();
        let mut service = world.service(name)?.env("HTTP_STOP_DELAY_SECONDS", delay).env("HTTP_WRITES_PER_SECOND", "0");
        start_until_ready(&mut service).await?;
        replicas.push(service);
    }
    let products = world.register_many(20, 20_000).await?;
    let balancer =
        Balancer { urls: [world.url("one"), world.url("two")], ready: Default::default(), turns: AtomicU64::default() };
    let admin = Caller::new(&balancer.urls[0], Role::Admin)?;
    let mut held = Vec::new();
    for _ in 0..ADMINS {
        held.push(admin.register(0).await?);
    }
    let load = Load::start(&world, Dice::thrown(), products);
    let stop = CancellationToken::new();
    let changing = futures::future::try_join_all(
        held.iter().map(|product| change_stock(&balancer, admin.clone(), *product, &stop)),
    );
    let restarting = async {
        let outcome = async {
            for round in 0..ROUNDS {
                for service in &mut replicas {
                    decided_by_another(&world, None).await?;
                    println!("round {round}: {}", service.name());
                    let there = admin.at(&world.url(service.name()));
                    restart(service, &there).await?;
                }
            }
            decided_by_another(&world, None).await
        };
        let outcome = outcome.await;
        stop.cancel();
        outcome
    };
    let (changed, restarted, ()) = tokio::join!(changing, restarting, balancer.look(&admin, &stop));
    restarted?;
    let changed = changed?;
    println!("{} changes of stock over HTTP, all answered with 200", changed.iter().sum::<u32>());
    let published = load.end().await?;
    println!("{} orders", published.len());
    world.decided_within(SETTLE_BOUND, published).await?;
    for (product, quantity) in held.into_iter().zip(changed) {
        assert_eq!(world.stock(ProductId(product)).await?, quantity, "the last change of {product}");
    }
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    for mut service in replicas {
        service.stop().await?;
    }
    world.close();
    Ok(())
}

/// SIGTERM, and again. It must say that it is not ready, and serve for as long as the delay is, before it takes no more.
async fn restart(service: &mut Service, there: &Caller) -> Result<()> {
    let product = there.register(1).await?;
    let path = format!("/v1/products/{product}/inventory");
    let watching = async {
        let asked = Instant::now();
        let (mut dropped, mut served) = (None, 0);
        loop {
            // A connection each time: that new ones are taken is what matters.
            let Ok(ready) = there.get("/readyz").header("Connection", "close").send().await else { break };
            if ready.status == 503 {
                assert_eq!(ready.json["stopping"], true, "{ready:?}");
                dropped.get_or_insert_with(|| asked.elapsed());
                if asked.elapsed() < Duration::from_secs(STOP_DELAY_SECONDS) / 2 {
                    served += 1;
                    let change = there.patch(&path, &json!({ "quantity": served + 1 }));
                    let written = change.header("Connection", "close").send().await?;
                    ensure!(written.status == 200, "a stopping replica within its delay: {written:?}");
                }
            }
            tokio::time::sleep(LOAD_PAUSE).await;
        }
        Ok::<_, anyhow::Error>((dropped, served, asked.elapsed()))
    };
    let (watched, stopped) = tokio::join!(watching, service.stop());
    stopped?;
    let (dropped, served, refused) = watched?;
    let dropped = dropped.context("it took no more before it said that it is not ready")?;
    println!(
        "not ready after {} ms, {served} changes served since, no connection taken after {} ms",
        dropped.as_millis(),
        refused.as_millis()
    );
    assert!(served > 0 && refused >= Duration::from_secs(STOP_DELAY_SECONDS), "it went on for its delay");
    start_until_ready(service).await
}
