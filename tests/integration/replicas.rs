//! Two product services on the same servers: one decides the orders, and whatever happens to it the other takes over,
//! with every order decided once.
//!
//! Owns failover. Tells writers apart by the ids of their batches, which begin with a mark that each process draws.
//! Assumes the definition of `product-orders`: a pinned client, `priority_timeout`, and `ack_wait` after which what a
//! dead one had in hand comes back.
use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures::StreamExt;
use lomash_contract::{OrderId, ProductId};
use lomash_ledger::{Ledger, StoredMessage};
use lomash_tests::{Dice, PATIENCE, World, eventually, fate, order};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Within this the other replica must be deciding: `priority_timeout`, the pull that is waiting, and a busy machine.
const TAKEOVER_BOUND: Duration = Duration::from_secs(20);

/// Within this every order must be decided: `ack_wait` of what the dead replica had in hand comes on top.
const SETTLE_BOUND: Duration = Duration::from_secs(90);

/// Pause between two orders of the load: several hundred a second, so that some are always in flight.
const LOAD_PAUSE: Duration = Duration::from_millis(3);

/// The mark of the process that wrote a message.
fn writer(message: &StoredMessage) -> Option<String> {
    let batch = message.batch.as_ref()?;
    Some(batch.id.split_once('-')?.0.to_owned())
}

/// Who decided orders after this sequence.
async fn deciders(world: &World, after: u64) -> Result<BTreeSet<String>> {
    let mut messages = world.ledger().read(after).await?;
    let mut marks = BTreeSet::new();
    while let Some(message) = messages.next().await.transpose()? {
        if fate(&message).is_some() {
            marks.extend(writer(&message));
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
            return Ok((writer(&message).context("it is in a batch")?, took));
        }
    }
    bail!("the decision is not where it was seen")
}

/// Two replicas, of which the first is pinned; its mark.
async fn two_replicas(world: &World) -> Result<(lomash::stack::Service, lomash::stack::Service, String)> {
    let first = world.start_service("first").await?;
    let product = world.register("PIN-1", 1).await?;
    let order = order(&[(product, 1)]);
    world.publish(&order).await?;
    world.decided([order.payload.order_id]).await?;
    let marks = deciders(world, 0).await?;
    assert_eq!(marks.len(), 1);
    let second = world.start_service("second").await?;
    Ok((first, second, marks.into_iter().next().unwrap()))
}

#[tokio::test]
async fn one_replica_decides_and_the_other_takes_over_when_it_is_killed() -> Result<()> {
    let world = World::start().await?;
    let (mut first, mut second, mark) = two_replicas(&world).await?;
    let dice = Dice::thrown();
    let products = world.register_many(20, 2_000).await?;

    // Both run, one is pinned: whatever is published, one decides.
    let before = world.last_sequence().await?;
    let mut quiet_dice = dice.clone();
    let orders: Vec<_> = (0..300).map(|_| quiet_dice.order(&products, 4, 2)).collect();
    world.publish_all(&orders).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    assert_eq!(deciders(&world, before).await?, BTreeSet::from([mark.clone()]), "the standby decided orders");

    let load = Load::start(&world, Dice::new(dice.seed.wrapping_add(1)), products);
    decided_by_another(&world, None).await?;
    first.kill();
    let (heir, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was killed", took.as_millis());

    // The killed one comes back as standby: nobody has to do anything.
    lomash_tests::start_until_ready(&mut first).await?;
    let resumed = world.last_sequence().await?;
    decided_by_another(&world, None).await?;
    let published = load.end().await?;
    world.decided_within(SETTLE_BOUND, published).await?;
    assert_eq!(deciders(&world, resumed).await?, BTreeSet::from([heir]), "the heir keeps the pin");
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    first.stop().await?;
    second.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_replica_that_was_frozen_doubles_nothing() -> Result<()> {
    let world = World::start().await?;
    let (mut first, mut second, mark) = two_replicas(&world).await?;
    let products = world.register_many(20, 2_000).await?;
    let product = products[0];
    let load = Load::start(&world, Dice::thrown(), products);
    decided_by_another(&world, None).await?;

    // With orders in hand, and for as long as it takes the other to have the pin and to have decided orders.
    first.pause()?;
    let (heir, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was frozen", took.as_millis());
    decided_by_another(&world, None).await?;
    first.resume()?;
    // It believes for a moment that nothing happened; its orders are decided or known, its batches are refused.
    decided_by_another(&world, None).await?;

    // It is a good standby again: when the heir is gone, it is back.
    second.kill();
    let (back, took) = decider_of_a_new_order(&world, product).await?;
    println!("orders resumed {} ms after the second was killed", took.as_millis());
    assert_eq!(back, mark);
    assert_ne!(back, heir);
    let published = load.end().await?;
    world.decided_within(SETTLE_BOUND, published).await?;
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    first.stop().await?;
    world.close();
    Ok(())
}

/// Stopping in order hands over without waiting for what was in hand to come back.
#[tokio::test]
async fn a_replica_that_stops_in_order_leaves_nothing_behind() -> Result<()> {
    let world = World::without_postgres().await?;
    let (mut first, mut second, mark) = two_replicas(&world).await?;
    let products = world.register_many(20, 2_000).await?;
    let load = Load::start(&world, Dice::thrown(), products);
    decided_by_another(&world, None).await?;
    first.stop().await?;
    let (_, took) = decided_by_another(&world, Some(&mark)).await?;
    println!("orders resumed {} ms after the pinned replica was stopped", took.as_millis());
    let published = load.end().await?;
    world.decided_within(TAKEOVER_BOUND, published).await?;
    world.verified().await?;
    second.stop().await?;
    world.close();
    Ok(())
}
