//! Atomic batches without anything else: what the limit is made of, and how a study's orders get into `ORDERS` faster than
//! one by one, each of which the server syncs.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::header::{NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL, NATS_BATCH_ID, NATS_BATCH_SEQUENCE};
use async_nats::jetstream::Context;
use async_nats::{Client, HeaderMap, Request, Subject};
use bytes::Bytes;
use lomash_ledger::streams;
use serde_json::{Value, json};

/// How long a batch may take: the disk of a busy machine may be far behind.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(30);

/// A message that waits to be sent.
pub(super) type Message = (Subject, HeaderMap, Bytes);

/// Makes one atomic batch of the messages.
pub(super) fn mark(batch: &mut [Message], id: &str) {
    let last = batch.len();
    for (index, (_, headers, _)) in batch.iter_mut().enumerate() {
        headers.insert(NATS_BATCH_ID, id);
        headers.insert(NATS_BATCH_SEQUENCE, (index + 1).to_string());
        if index + 1 == last {
            headers.insert(NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL);
        }
    }
}

/// Sends a marked batch and waits until it is stored; the sequence of its last message.
pub(super) async fn send(client: &Client, mut batch: Vec<Message>) -> anyhow::Result<u64> {
    let Some((subject, headers, payload)) = batch.pop() else { bail!("a batch of nothing cannot be sent") };
    for (subject, headers, payload) in batch {
        client.publish_with_headers(subject, headers, payload).await.context("a bare batch could not be sent")?;
    }
    let commit = Request::new().headers(headers).payload(payload).timeout(Some(CONFIRM_TIMEOUT));
    let answer = client.send_request(subject, commit).await.context("a bare batch was not confirmed")?;
    let answer: Value = serde_json::from_slice(&answer.payload).context("a bare batch was answered strangely")?;
    let sequence = answer.get("seq").and_then(Value::as_u64).filter(|_| answer.get("error").is_none());
    sequence.with_context(|| format!("a bare batch was not stored: {answer}"))
}

/// Makes or changes a stream: `verb` is `CREATE` or `UPDATE`.
pub(super) async fn configure(context: &Context, verb: &str, config: &Value) -> anyhow::Result<()> {
    let name = config.get("name").and_then(Value::as_str).unwrap_or_default();
    let answer: Value = context
        .request(format!("STREAM.{verb}.{name}"), config)
        .await
        .map_err(|problem| anyhow!("the stream {name} could not be set up: {problem}"))?;
    match answer.get("error") {
        None => Ok(()),
        Some(error) => bail!("the server refused the stream {name}: {error}"),
    }
}

/// Lets `ORDERS` take batches, on a server of the benchmark's own.
pub(super) async fn let_orders_take_batches(context: &Context) -> anyhow::Result<()> {
    let mut config = Value::Object(definition(streams::ORDERS)?);
    config["allow_atomic"] = json!(true);
    configure(context, "UPDATE", &config).await
}

/// Has the server forget the ids of the ledger's messages after this time; after what the definition says without one.
pub(super) async fn forget_ids_after(context: &Context, time: Option<Duration>) -> anyhow::Result<()> {
    let mut config = Value::Object(definition(streams::INVENTORY)?);
    if let Some(time) = time {
        config["duplicate_window"] = json!(u64::try_from(time.as_nanos()).context("a time for ids that is too long")?);
    }
    configure(context, "UPDATE", &config).await
}

/// The definition of one of our streams.
pub(super) fn definition(stream: &str) -> anyhow::Result<serde_json::Map<String, Value>> {
    let found = streams::definitions().into_iter().find(|definition| definition.name == stream);
    Ok(found.with_context(|| format!("{stream} has no definition"))?.config)
}
