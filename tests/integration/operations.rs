//! The recipes of `docs/operations.md`, through the very API calls that the stock `nats` command line makes for them.
//!
//! Owns that what the runbook promises comes true on a real server; the words of the command line itself are not tried.

use anyhow::{Context as _, Result, ensure};
use async_nats::jetstream;
use bytes::Bytes;
use futures::StreamExt;
use lomash::replay::{ReplayArgs, Speed, Target, replay};
use lomash::stack::Nats;
use lomash_contract::{OrderId, ProductId, Topic};
use lomash_ledger::{direct, streams};
use lomash_tests::{PATIENCE, World, order};
use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;

/// Bytes of a chunk of a backup: small, so that there are several.
const CHUNK_BYTES: usize = 1024;

async fn ask(client: &async_nats::Client, subject: &str, body: Value) -> Result<Value> {
    let answer = client.request(format!("$JS.API.{subject}"), body.to_string().into()).await?;
    let answer: Value = serde_json::from_slice(&answer.payload)?;
    ensure!(answer.get("error").is_none(), "{subject}: {answer}");
    Ok(answer)
}

/// A world with some orders decided: one refused, the others allocated.
async fn world_with_orders() -> Result<(World, ProductId, Vec<OrderId>, OrderId)> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let (kitchen, bedroom) = (world.register("KIT-1", 100).await?, world.register("BED-1", 100).await?);
    let orders: Vec<_> = (0..5).map(|_| order(&[(kitchen, 2), (bedroom, 1)])).collect();
    let refused = order(&[(kitchen, 1_000)]);
    world.publish_all(&orders).await?;
    world.publish(&refused).await?;
    let ids: Vec<OrderId> = orders.iter().map(|order| order.payload.order_id).collect();
    world.decided(ids.iter().copied().chain([refused.payload.order_id])).await?;
    world.quiet().await?;
    service.stop().await?;
    Ok((world, kitchen, ids, refused.payload.order_id))
}

fn args(words: &[&str]) -> ReplayArgs {
    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: ReplayArgs,
    }
    <Command as clap::Parser>::parse_from(std::iter::once(&"replay").chain(words)).args
}

/// What a replay writes, line by line.
async fn lines(world: &World, words: &[&str]) -> Result<Vec<Value>> {
    let file = world.dir().join("replay.ndjson");
    let mut target = Target::Lines(Box::new(std::fs::File::create(&file)?));
    replay(&world.context, &args(words), &mut target).await?;
    std::fs::read_to_string(&file)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[tokio::test]
async fn one_product_and_one_order_are_found_in_the_streams() -> Result<()> {
    let (world, kitchen, orders, refused) = world_with_orders().await?;
    // The history of a product: batched direct gets by its key.
    let mut history =
        direct::read(&world.context, streams::INVENTORY, Some(&format!("lomash.*.*.{kitchen}")), 0, u64::MAX);
    let mut seen = Vec::new();
    while let Some(held) = history.next().await.transpose()? {
        ensure!(held.subject.ends_with(&kitchen.to_string()), "{}", held.subject);
        seen.push(held.sequence);
    }
    assert_eq!(seen.len(), 8, "registered, first stock, available, five orders");
    assert!(seen.is_sorted());

    // The refusal of an order, by its key; of an order that was not refused there is none.
    let refusals = format!("$JS.API.DIRECT.GET.INVENTORY.{}", Topic::InventoryUpdateFailed.as_str());
    let found = world.client.request(format!("{refusals}.{refused}"), Bytes::new()).await?;
    let found: Value = serde_json::from_slice(&found.payload)?;
    assert_eq!(found["payload"]["orderId"], refused.to_string());
    let none = world.client.request(format!("{refusals}.{}", orders[0]), Bytes::new()).await?;
    assert_eq!(none.status, Some(async_nats::StatusCode::NOT_FOUND));

    let (order, product) = (orders[2].to_string(), kitchen.to_string());
    let decided = lines(&world, &["INVENTORY", "--order", &order]).await?;
    assert_eq!(decided.len(), 2, "its lines: {decided:?}");
    assert!(decided.iter().all(|line| line["payload"]["payload"]["orderId"] == *order));
    assert_eq!(lines(&world, &["ORDERS", "--order", &order]).await?.len(), 1);
    assert_eq!(
        lines(&world, &["INVENTORY", "--product", &product]).await?.len(),
        8,
        "its history; a refusal has the key of its order"
    );
    assert_eq!(lines(&world, &["INVENTORY", "--trigger", "ORDER_CONFIRMED"]).await?.len(), 10);
    assert_eq!(lines(&world, &["ORDERS", "--from", "2", "--to", "4"]).await?.len(), 3);
    assert_eq!(lines(&world, &["ORDERS", "--product", &product, "--limit", "2"]).await?.len(), 2);
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_span_of_orders_is_replayed_to_a_test_subject() -> Result<()> {
    let (world, ..) = world_with_orders().await?;
    let third = world.context.get_stream(streams::ORDERS).await?.get_raw_message(3).await?;
    let since = third.time.format(&Rfc3339)?;

    // As the stock command line does it: a consumer from that moment on, at the speed of then.
    let config = json!({
        "deliver_policy": "by_start_time", "opt_start_time": since, "ack_policy": "none", "replay_policy": "original",
        "filter_subject": "lomash.orders.created", "inactive_threshold": 600_000_000_000_u64, "name": "day",
    });
    let body = json!({ "stream_name": streams::ORDERS, "config": config, "action": "create" });
    ask(&world.client, "CONSUMER.CREATE.ORDERS.day.lomash.orders.created", body).await?;
    let consumer: jetstream::consumer::PullConsumer =
        world.context.get_consumer_from_stream("day", streams::ORDERS).await?;
    let mut messages = consumer.fetch().max_messages(4).expires(PATIENCE).messages().await?;
    let first = messages.next().await.context("a message")?.map_err(|problem| anyhow::anyhow!(problem))?;
    assert_eq!(first.info().map_err(|problem| anyhow::anyhow!(problem))?.stream_sequence, 3);

    // As `lomash replay` does it: published anew, and said to be a replay.
    let mut heard = world.client.subscribe("lomash.replay.orders").await?;
    world.client.flush().await?;
    let before = world.last_sequence().await?;
    let mut target = Target::Subject {
        client: world.client.clone(),
        subject: "lomash.replay.orders".to_owned(),
        store: false,
        sent: 0,
    };
    let args = args(&["ORDERS", "--since", &since, "--speed", "1000"]);
    assert_eq!(args.speed, Speed::Times(1000.0));
    let summary = replay(&world.context, &args, &mut target).await?;
    assert_eq!((summary.replayed, summary.first_sequence, summary.last_sequence), (4, Some(3), Some(6)));
    for sequence in 3..=6 {
        let message = tokio::time::timeout(PATIENCE, heard.next()).await?.context("a message")?;
        let headers = message.headers.context("headers")?;
        assert_eq!(headers.get("Lomash-Replay-Sequence").map(|value| value.as_str()), Some(&*sequence.to_string()));
        assert_eq!(headers.get("Nats-Msg-Id"), None, "the server would act on it");
    }
    assert_eq!(world.last_sequence().await?, before);
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_consumer_is_set_back_to_a_date() -> Result<()> {
    let (world, ..) = world_with_orders().await?;
    let config = json!({ "durable_name": "reader", "ack_policy": "explicit" });
    let body = json!({ "stream_name": streams::INVENTORY, "config": config, "action": "create" });
    ask(&world.client, "CONSUMER.CREATE.INVENTORY.reader", body).await?;
    let consumer: jetstream::consumer::PullConsumer =
        world.context.get_consumer_from_stream("reader", streams::INVENTORY).await?;
    let last = world.last_sequence().await?;
    let mut messages = consumer.fetch().max_messages(usize::try_from(last)?).messages().await?;
    while let Some(message) = messages.next().await {
        let message = message.map_err(|problem| anyhow::anyhow!(problem))?;
        message.double_ack().await.map_err(|problem| anyhow::anyhow!(problem))?;
    }

    let fifth = world.context.get_stream(streams::INVENTORY).await?.get_raw_message(5).await?;
    let sequence =
        direct::first_since(&world.context, streams::INVENTORY, fifth.time).await?.context("there is one")?;
    // A batch has one time for all of its messages.
    assert!(sequence <= 5, "{sequence}");
    ask(&world.client, "CONSUMER.RESET.INVENTORY.reader", json!({ "seq": sequence })).await?;
    let mut messages = consumer.fetch().max_messages(1).messages().await?;
    let first = messages.next().await.context("a message")?.map_err(|problem| anyhow::anyhow!(problem))?;
    assert_eq!(first.info().map_err(|problem| anyhow::anyhow!(problem))?.stream_sequence, sequence);
    world.close();
    Ok(())
}

/// `nats stream backup`: the stream's configuration and state, and its chunks.
async fn backup(client: &async_nats::Client, stream: &str) -> Result<(Value, Vec<Bytes>)> {
    let inbox = client.new_inbox();
    let mut incoming = client.subscribe(inbox.clone()).await?;
    let body = json!({ "deliver_subject": inbox, "no_consumers": false, "chunk_size": CHUNK_BYTES });
    let answer = ask(client, &format!("STREAM.SNAPSHOT.{stream}"), body).await?;
    let mut chunks = Vec::new();
    loop {
        let chunk = tokio::time::timeout(PATIENCE, incoming.next()).await?.context("a chunk")?;
        if chunk.payload.is_empty() {
            return Ok((answer, chunks));
        }
        if let Some(reply) = chunk.reply {
            client.publish(reply, Bytes::new()).await?;
        }
        chunks.push(chunk.payload);
    }
}

/// `nats stream restore`.
async fn restore(client: &async_nats::Client, stream: &str, taken: &Value, chunks: Vec<Bytes>) -> Result<()> {
    let body = json!({ "config": taken["config"], "state": taken["state"] });
    let answer = ask(client, &format!("STREAM.RESTORE.{stream}"), body).await?;
    let target = answer["deliver_subject"].as_str().context("where to send the chunks")?.to_owned();
    for chunk in chunks {
        let taken = client.request(target.clone(), chunk).await?;
        ensure!(!String::from_utf8_lossy(&taken.payload).contains("error"), "{:?}", taken.payload);
    }
    let done = client.request(target, Bytes::new()).await?;
    let done: Value = serde_json::from_slice(&done.payload)?;
    ensure!(done.get("error").is_none(), "{done}");
    Ok(())
}

#[tokio::test]
async fn a_ledger_that_was_backed_up_and_restored_verifies_like_the_original() -> Result<()> {
    let (world, kitchen, ..) = world_with_orders().await?;
    let before = world.messages().await?;
    let (ledger, ledger_chunks) = backup(&world.client, streams::INVENTORY).await?;
    let (orders, orders_chunks) = backup(&world.client, streams::ORDERS).await?;
    assert!(ledger_chunks.len() > 1, "several chunks");

    // Everything is lost; an empty server elsewhere.
    let elsewhere = world.dir().join("elsewhere");
    let nats = Nats::start(&elsewhere).await?;
    let client = lomash_platform::nats::connect(&nats.url(), "test").await?;
    let context = jetstream::new(client.clone());
    streams::wait_until_ready(&context).await?;
    restore(&client, streams::ORDERS, &orders, orders_chunks).await?;
    restore(&client, streams::INVENTORY, &ledger, ledger_chunks).await?;
    assert_eq!(streams::apply(&context, 1).await?, [], "what is restored is as it is defined");

    let mut restored = direct::read(&context, streams::INVENTORY, None, 0, u64::MAX);
    for message in &before {
        let held = restored.next().await.context("as many")??;
        assert_eq!((held.sequence, held.stored_at), (message.sequence, message.stored_at));
        assert_eq!((&held.subject, &held.payload), (&message.subject, &message.payload));
    }
    assert!(restored.next().await.is_none(), "and no more");
    let report = lomash::verify::verify(&context, None, lomash::verify::Show::Nothing).await?;
    assert!(report.is_clean(), "{}", lomash::verify::render(&report));
    assert_eq!(report.totals.orders_undecided, 0);

    // And orders go on.
    let mut config = world.config();
    config.service.nats_url = lomash_platform::Secret::from(nats.url());
    let stop = tokio_util::sync::CancellationToken::new();
    let service = tokio::spawn(product_service::service::run(config, stop.clone()));
    lomash::orders::publish(&context, order(&[(kitchen, 1)])).await?;
    lomash_tests::eventually("the next order to be decided", PATIENCE, async || {
        let last = context.get_stream(streams::INVENTORY).await?.cached_info().state.last_sequence;
        Ok((last == before.len() as u64 + 1).then_some(()))
    })
    .await?;
    stop.cancel();
    service.await??;
    world.close();
    Ok(())
}
