//! The receive loop: before a server that this file plays, for what a real one does only when its leaders die, and before a
//! real one, when a replica takes over from one that died.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use async_nats::jetstream::consumer::{AckPolicy, PriorityPolicy, pull};
use futures::StreamExt;
use lomash_contract::ProductId;
use lomash_ledger::receive::{self, Delivery, Receive, Settle};
use lomash_ledger::streams;
use lomash_tests::{World, eventually, order};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// What the played server's API begins with.
const API: &str = "played.API";

/// How often the first leader is named to whoever asks after the first pull.
const LOOKS_AT_THE_FIRST: u32 = 3;

/// How long the loop may take to notice.
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn a_silent_consumer_is_opened_anew_when_it_has_another_leader_and_not_before() -> Result<()> {
    let world = World::without_postgres().await?;
    let (stream, consumer) = (streams::INVENTORY, streams::ANALYTICS);
    let asked = format!("$JS.API.CONSUMER.INFO.{stream}.{consumer}");
    let mut info: Value = serde_json::from_slice(&world.client.request(asked, "".into()).await?.payload)?;

    let mut requests = world.client.subscribe(format!("{API}.>")).await?;
    let context = jetstream::with_prefix(world.client.clone(), API);
    let what = Receive {
        stream,
        consumer,
        group: None,
        max_in_flight: 1,
        max_in_flight_bytes: 1_000,
        max_panics: 1,
        in_progress_every: None,
    };
    let (handled, mut received) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    let receiving = tokio::spawn(receive::run(context, what, stop.clone(), move |delivery| {
        let _ = handled.send(delivery.payload);
        std::future::ready(Settle::Done)
    }));

    // Pulls are heard and answered by nobody, as by a leader that froze.
    let (mut first_pull, mut looks) = (None, 0);
    let second_pull = async {
        loop {
            let request = requests.next().await.context("the connection is gone")?;
            let reply = request.reply.context("nobody waits for an answer")?;
            if request.subject.contains("CONSUMER.MSG.NEXT") {
                if *first_pull.get_or_insert_with(|| reply.clone()) != reply {
                    return anyhow::Ok(reply);
                }
                continue;
            }
            looks += u32::from(first_pull.is_some());
            let leader = if looks > LOOKS_AT_THE_FIRST { "second" } else { "first" };
            info["cluster"] = json!({ "name": "played", "leader": leader });
            world.client.publish(reply, info.to_string().into()).await?;
        }
    };
    let second_pull = tokio::time::timeout(PATIENCE, second_pull).await.context("it does not pull anew")??;
    assert!(looks > LOOKS_AT_THE_FIRST, "it had the same leader all the time");

    // Nobody but a server may name where an acknowledgement goes, so this one cannot be acknowledged.
    world.client.publish(second_pull, "for the second".into()).await?;
    let handled = tokio::time::timeout(PATIENCE, received.recv()).await.context("what came then was not handled")?;
    assert_eq!(handled.context("the loop ended")?, "for the second");
    stop.cancel();
    receiving.await?;
    world.close();
    Ok(())
}

/// A consumer in the place of `product-orders`, with other limits.
async fn product_orders_with(world: &World, ack_wait: Duration, max_deliver: i64) -> Result<()> {
    let stream = world.context.get_stream(streams::ORDERS).await?;
    stream.delete_consumer(streams::PRODUCT_ORDERS).await?;
    let config = pull::Config {
        durable_name: Some(streams::PRODUCT_ORDERS.to_owned()),
        ack_policy: AckPolicy::All,
        ack_wait,
        max_deliver,
        priority_policy: PriorityPolicy::PinnedClient,
        priority_groups: vec![streams::PRODUCT_ORDERS_GROUP.to_owned()],
        priority_timeout: Duration::from_secs(60),
        ..Default::default()
    };
    stream.create_consumer(config).await?;
    Ok(())
}

/// Orders, whose sequences in their stream are 1, 2, 3, …
async fn publish(world: &World, count: usize) -> Result<()> {
    for _ in 0..count {
        world.publish(&order(&[(ProductId(Uuid::nil()), 1)])).await?;
    }
    Ok(())
}

/// A replica: which sequences it was given, and in which of them it hangs until it is let go on.
struct Replica {
    given: mpsc::UnboundedReceiver<u64>,
    go_on: watch::Sender<bool>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Replica {
    fn start(world: &World, hangs_in: impl Fn(u64) -> bool + Send + Sync + 'static) -> Self {
        let (told, given) = mpsc::unbounded_channel();
        let (go_on, may_go_on) = watch::channel(false);
        let stop = CancellationToken::new();
        let handler = move |Delivery { sequence, .. }| {
            let _ = told.send(sequence);
            let (hangs, mut may_go_on) = (hangs_in(sequence), may_go_on.clone());
            async move {
                if hangs && may_go_on.wait_for(|may| *may).await.is_err() {
                    return Settle::Retry(Duration::ZERO);
                }
                Settle::Done
            }
        };
        let receiving = receive::run(world.context.clone(), product_service::orders::receive(), stop.clone(), handler);
        Self { given, go_on, stop, task: tokio::spawn(receiving) }
    }

    /// The next sequences that it is given, sorted.
    async fn is_given(&mut self, count: usize) -> Result<Vec<u64>> {
        let mut given = Vec::new();
        while given.len() < count {
            let next = tokio::time::timeout(PATIENCE, self.given.recv()).await;
            given.push(next.with_context(|| format!("given {given:?} and no more"))?.context("the loop ended")?);
        }
        given.sort_unstable();
        Ok(given)
    }

    /// It gives nothing back and says nothing more, as a process that was killed.
    async fn dies(self, world: &World) -> Result<()> {
        self.task.abort();
        let _ = self.task.await;
        let stream = world.context.get_stream_no_info(streams::ORDERS).await?;
        Ok(stream.unpin_consumer(streams::PRODUCT_ORDERS, streams::PRODUCT_ORDERS_GROUP).await?)
    }

    async fn stop(self) -> Result<()> {
        self.stop.cancel();
        Ok(self.task.await?)
    }
}

/// Waits until everything up to `floor` is acknowledged and `open` messages are not.
async fn acknowledged(world: &World, floor: u64, open: usize) -> Result<()> {
    eventually(&format!("{floor} acknowledged, {open} open"), PATIENCE, async || {
        let info = world.product_orders().await?;
        ensure!((info.ack_floor.stream_sequence, info.num_ack_pending) == (floor, open), "{info:?}");
        Ok(Some(()))
    })
    .await
}

#[tokio::test]
async fn who_takes_over_acknowledges_nothing_past_what_the_dead_one_had_in_hand() -> Result<()> {
    let world = World::without_postgres().await?;
    // Nothing comes back by itself while this test lasts.
    product_orders_with(&world, 10 * PATIENCE, -1).await?;
    publish(&world, 6).await?;
    let mut first = Replica::start(&world, |sequence| [3, 5, 6].contains(&sequence));
    assert_eq!(first.is_given(6).await?, [1, 2, 3, 4, 5, 6]);
    acknowledged(&world, 2, 4).await?;
    first.dies(&world).await?;

    publish(&world, 3).await?;
    let mut second = Replica::start(&world, |sequence| sequence == 5);
    // What is new, and all that was not acknowledged: nobody knows that 4 was settled.
    assert_eq!(second.is_given(7).await?, [3, 4, 5, 6, 7, 8, 9]);
    // Acknowledging goes before what comes next, so it has thought about all these when that is there.
    publish(&world, 1).await?;
    assert_eq!(second.is_given(1).await?, [10]);
    acknowledged(&world, 2, 8).await.context("5 is at work, and nothing before it came for the first time")?;
    second.go_on.send_replace(true);
    acknowledged(&world, 10, 0).await?;
    second.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn what_the_server_gave_up_is_tried_alone_and_holds_nothing_up() -> Result<()> {
    let world = World::without_postgres().await?;
    product_orders_with(&world, Duration::from_secs(1), 1).await?;
    publish(&world, 2).await?;
    let mut first = Replica::start(&world, |sequence| sequence == 1);
    assert_eq!(first.is_given(2).await?, [1, 2]);
    first.dies(&world).await?;

    publish(&world, 1).await?;
    let mut second = Replica::start(&world, |_| false);
    // By the server's word that it gave them up, all of which are tried alone.
    let mut given = BTreeSet::new();
    while !(1..=3).all(|sequence| given.contains(&sequence)) {
        given.extend(second.is_given(1).await?);
    }
    // The loop does not know that. It waits for them, and then lets them be tried.
    publish(&world, 1).await?;
    acknowledged(&world, 4, 0).await?;
    second.stop().await?;
    world.close();
    Ok(())
}
