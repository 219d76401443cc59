//! The limit of the server: as many messages, as large, in as many atomic batches as the product service stored, written
//! to a stream of the same configuration on the same server, without reading, deciding or acknowledging anything.
//!
//! Given an advantage where the two cannot be equal: nothing is republished, no message id is looked up (its bytes are
//! payload here), no sequence is expected, and every message is made before the clock starts. One batch is in flight at a
//! time, as with the committer.

use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use async_nats::header::{NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL, NATS_BATCH_ID, NATS_BATCH_SEQUENCE};
use async_nats::jetstream::Context;
use async_nats::{HeaderMap, Request, Subject};
use bytes::Bytes;
use futures::StreamExt;
use lomash_ledger::{APPEND_TIMEOUT, JetStreamLedger, Ledger, StoredMessage, streams};
use serde_json::{Value, json};

/// The stream that is written to.
const STREAM: &str = "BENCH";

/// What its subjects begin with, as long as what it stands for.
const PREFIX: &str = "bench0.";
const PREFIX_OF_OURS: &str = "lomash.";
const _: () = assert!(PREFIX.len() == PREFIX_OF_OURS.len(), "messages are to be equally large");

/// What a message of ours was, as far as the server's work goes.
#[derive(Debug)]
pub(super) struct Shape {
    subject: Subject,
    /// Payload, and the headers that the bare message goes without.
    bytes: usize,
    /// Whether its batch ends with it.
    pub ends_batch: bool,
}

impl Shape {
    fn of(message: &StoredMessage) -> Self {
        let line = |name: &str, value: usize| name.len() + ": \r\n".len() + value;
        let id = message.message_id.as_ref().map_or(0, |id| line("Nats-Msg-Id", id.len()));
        let expected = message
            .expected_last_sequence
            .map_or(0, |expected| line("Nats-Expected-Last-Sequence", expected.to_string().len()));
        let rest = message.subject.strip_prefix(PREFIX_OF_OURS).unwrap_or(&message.subject);
        Self {
            subject: format!("{PREFIX}{rest}").into(),
            bytes: message.payload.len() + id + expected,
            ends_batch: message.ends_batch(),
        }
    }
}

/// The shapes of what the ledger holds after `after`.
pub(super) async fn shapes(ledger: &JetStreamLedger, after: u64) -> anyhow::Result<Vec<Shape>> {
    let mut messages = ledger.read(after).await?;
    let mut shapes = Vec::new();
    while let Some(message) = messages.next().await {
        shapes.push(Shape::of(&message?));
    }
    Ok(shapes)
}

/// Writes as many messages of those shapes; how long it took from the first to the last confirmation.
pub(super) async fn run(context: &Context, shapes: &[Shape]) -> anyhow::Result<Duration> {
    create_stream(context).await?;
    let largest = shapes.iter().map(|shape| shape.bytes).max().unwrap_or(0);
    let payload = Bytes::from(vec![b'x'; largest]);
    let mut batches: Vec<Vec<(Subject, HeaderMap, Bytes)>> = vec![Vec::new()];
    for shape in shapes {
        let id = format!("bench-{}", batches.len());
        let Some(batch) = batches.last_mut() else { break };
        let mut headers = HeaderMap::new();
        headers.insert(NATS_BATCH_ID, id);
        headers.insert(NATS_BATCH_SEQUENCE, (batch.len() + 1).to_string());
        if shape.ends_batch {
            headers.insert(NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL);
        }
        batch.push((shape.subject.clone(), headers, payload.slice(..shape.bytes)));
        if shape.ends_batch {
            batches.push(Vec::new());
        }
    }
    ensure!(batches.pop().is_some_and(|rest| rest.is_empty()), "the ledger ends in the middle of a batch");

    let client = context.client();
    let started = Instant::now();
    let mut stored = 0;
    for mut batch in batches {
        let size = batch.len() as u64;
        let Some((subject, headers, payload)) = batch.pop() else { continue };
        for (subject, headers, payload) in batch {
            client.publish_with_headers(subject, headers, payload).await.context("a bare batch could not be sent")?;
        }
        let commit = Request::new().headers(headers).payload(payload).timeout(Some(APPEND_TIMEOUT));
        let answer = client.send_request(subject, commit).await.context("a bare batch was not confirmed")?;
        let answer: Value = serde_json::from_slice(&answer.payload).context("a bare batch was answered strangely")?;
        stored += size;
        if answer.get("seq").and_then(Value::as_u64) != Some(stored) {
            bail!("a bare batch was not stored as it should be: {answer}");
        }
    }
    Ok(started.elapsed())
}

/// `INVENTORY` under another name, without what is no part of writing.
async fn create_stream(context: &Context) -> anyhow::Result<()> {
    let ours = streams::definitions().into_iter().find(|definition| definition.name == streams::INVENTORY);
    let mut config = ours.context("INVENTORY has no definition")?.config;
    config.insert("name".to_owned(), json!(STREAM));
    config.insert("subjects".to_owned(), json!([format!("{PREFIX}>")]));
    for field in ["republish", "metadata", "description"] {
        config.remove(field);
    }
    let answer: Value = context
        .request(format!("STREAM.CREATE.{STREAM}"), &config)
        .await
        .map_err(|problem| anyhow!("the stream {STREAM} could not be made: {problem}"))?;
    match answer.get("error") {
        None => Ok(()),
        Some(error) => bail!("the server refused the stream {STREAM}: {error}"),
    }
}
