//! The receive loop before a server that this file plays: what a real one does only when its leaders die.

use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream;
use futures::StreamExt;
use lomash_ledger::receive::{self, Receive, Settle};
use lomash_ledger::streams;
use lomash_tests::World;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

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
