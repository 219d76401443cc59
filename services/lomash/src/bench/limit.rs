//! The limit of the server: as many messages, as large, in as many atomic batches as the product service stored, written
//! to the same server without reading, deciding or acknowledging anything.
//!
//! There are two, for "as large" and "the same server" can be read in two ways:
//! - [`Contestant::Limit`]: a stream of the very configuration of `INVENTORY`, so it republishes what it stores and looks
//!   message ids up, and messages that carry an id each. It holds the same history before: the server looks up what it
//!   stored last of each product, and finding that in a long stream is its work, not the service's. That is what the
//!   contract asks of the server for these messages, whoever writes them.
//! - [`Contestant::Bare`]: the least that the server can be asked: nothing is republished, no message has an id (its bytes
//!   are payload), and the stream is empty before.
//!
//! In both no sequence is expected (its header's bytes are payload), batches end where those of ours ended in the stream,
//! one batch is in flight at a time, as with the committer, and every message is made before the clock starts. What the
//! server then holds must be as large as what it holds of ours.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Context;
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use futures::StreamExt;
use lomash_ledger::{JetStreamLedger, Ledger, StoredMessage, header, streams};
use serde_json::{Value, json};
use uuid::Uuid;

use super::batches::{self, Message};
use super::bed::Bed;
use super::report::Contestant;

/// What its subjects begin with, as long as what it stands for.
const PREFIX_OF_OURS: &str = "lomash.";
const PREFIX_OF_LIMIT: &str = "limit0.";
const PREFIX_OF_BARE: &str = "bench0.";
const _: () = assert!(
    PREFIX_OF_LIMIT.len() == PREFIX_OF_OURS.len() && PREFIX_OF_BARE.len() == PREFIX_OF_OURS.len(),
    "messages are to be equally large"
);

/// Of how many bytes one may be missing or too many: numbers in headers are not equally long.
const SIZE_TOLERANCE: u64 = 100;

/// What a message of ours was, as far as the server's work goes.
#[derive(Debug)]
pub(super) struct Shape {
    /// Without its prefix.
    subject: String,
    /// Payload, and the headers that no bare message has.
    bytes: usize,
    /// Bytes of its id; 0 when it had none.
    id_bytes: usize,
    /// Whether its batch ends with it.
    pub ends_batch: bool,
}

/// Bytes of a header line.
fn line(name: &str, value: usize) -> usize {
    name.len() + ": \r\n".len() + value
}

impl Shape {
    fn of(message: &StoredMessage) -> Self {
        let expected = message.expected_last_sequence.map(|expected| expected.to_string().len());
        let text = |value: Option<&str>| value.map(str::len);
        let carried = [
            ("Nats-Expected-Last-Sequence", expected),
            (header::TRACEPARENT, text(message.carried.traceparent())),
            (header::TRACESTATE, text(message.carried.tracestate())),
            (header::REASON, text(message.carried.reason.as_deref())),
            (header::COMMAND, text(message.carried.command.as_deref())),
        ];
        let carried: usize = carried.into_iter().filter_map(|(name, value)| Some(line(name, value?))).sum();
        Self {
            subject: message.subject.strip_prefix(PREFIX_OF_OURS).unwrap_or(&message.subject).to_owned(),
            bytes: message.payload.len() + carried,
            id_bytes: message.message_id.as_ref().map_or(0, String::len),
            ends_batch: message.ends_batch(),
        }
    }

    /// Bytes of the header that holds its id.
    fn id_line(&self) -> usize {
        if self.id_bytes == 0 { 0 } else { line("Nats-Msg-Id", self.id_bytes) }
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

/// Writes to the limit's stream what the ledger holds up to `upto`, the end of a batch, with payloads of as many bytes. Ids
/// are left out: ours are forgotten too before a race.
async fn write_history(context: &Context, ledger: &JetStreamLedger, upto: u64) -> anyhow::Result<()> {
    let client = context.client();
    let mut messages = ledger.read(0).await?.take(usize::try_from(upto)?);
    let mut batch: Vec<Message> = Vec::new();
    let mut stored = 0;
    while let Some(message) = messages.next().await {
        let message = message?;
        let shape = Shape::of(&message);
        let payload = Bytes::from(vec![b'x'; shape.bytes + shape.id_line()]);
        batch.push((Subject::from(format!("{PREFIX_OF_LIMIT}{}", shape.subject)), HeaderMap::new(), payload));
        if shape.ends_batch {
            stored += batch.len() as u64;
            batches::mark(&mut batch, &format!("history-{stored}"));
            batches::send(&client, std::mem::take(&mut batch)).await?;
        }
    }
    ensure!(stored == upto, "{stored} of {upto} messages of the history could be written");
    Ok(())
}

/// Writes as many messages of those shapes as the ledger holds after `prepared`; how long it took from the first to the last
/// confirmation. Ours took `ours_bytes` of the server's storage; as large is what is written here, or there is no figure.
pub(super) async fn run(
    bed: &Bed,
    contestant: Contestant,
    shapes: &[Shape],
    prepared: u64,
    ours_bytes: u64,
) -> anyhow::Result<Duration> {
    let context = &bed.context;
    let bare = contestant == Contestant::Bare;
    let prefix = if bare { PREFIX_OF_BARE } else { PREFIX_OF_LIMIT };
    batches::configure(context, "CREATE", &stream(prefix, bare)?).await?;
    let (mut stored, mut stored_before) = (0, 0);
    if !bare {
        write_history(context, &bed.ledger, prepared).await?;
        (stored, stored_before) = (prepared, stored_bytes(context, name(bare)).await?);
    }
    let largest = shapes.iter().map(|shape| shape.bytes + shape.id_line()).max().unwrap_or(0);
    let payload = Bytes::from(vec![b'x'; largest]);
    let mut made: Vec<Vec<Message>> = vec![Vec::new()];
    for shape in shapes {
        // As long as the ids of our batches.
        let id = format!("{prefix}batch-{}", made.len());
        let Some(batch) = made.last_mut() else { break };
        let mut headers = HeaderMap::new();
        let mut bytes = shape.bytes;
        if bare {
            bytes += shape.id_line();
        } else if shape.id_bytes > 0 {
            // Ids of ours are UUIDs; another length would be another message's.
            headers.insert(NATS_MESSAGE_ID, Uuid::new_v4().to_string());
        }
        batch.push((Subject::from(format!("{prefix}{}", shape.subject)), headers, payload.slice(..bytes)));
        if shape.ends_batch {
            batches::mark(batch, &id);
            made.push(Vec::new());
        }
    }
    ensure!(made.pop().is_some_and(|rest| rest.is_empty()), "the ledger ends in the middle of a batch");

    let client = context.client();
    let started = Instant::now();
    for batch in made {
        stored += batch.len() as u64;
        let sequence = batches::send(&client, batch).await?;
        ensure!(sequence == stored, "a bare batch ends at {sequence} where {stored} was due");
    }
    let taken = started.elapsed();
    let bytes = stored_bytes(context, name(bare)).await? - stored_before;
    ensure!(
        bytes.abs_diff(ours_bytes) <= ours_bytes / SIZE_TOLERANCE,
        "the same messages took {bytes} bytes here and {ours_bytes} in the ledger: they are not equally large"
    );
    Ok(taken)
}

/// What a stream's messages take on the server.
pub(super) async fn stored_bytes(context: &Context, stream: &str) -> anyhow::Result<u64> {
    let stream = context.get_stream(stream).await.with_context(|| format!("{stream} cannot be read"))?;
    Ok(stream.cached_info().state.bytes)
}

fn name(bare: bool) -> &'static str {
    if bare { "BARE" } else { "LIMIT" }
}

/// `INVENTORY` under another name; the bare one without what is no part of writing.
fn stream(prefix: &str, bare: bool) -> anyhow::Result<Value> {
    let mut config = batches::definition(streams::INVENTORY)?;
    config.insert("name".to_owned(), json!(name(bare)));
    // As many tokens as ours have, so that what is republished is not stored again.
    config.insert("subjects".to_owned(), json!([format!("{prefix}*.*.*")]));
    let (source, destination) = (format!("{prefix}*.*.*"), format!("{prefix}{{{{wildcard(1)}}}}.{{{{wildcard(2)}}}}"));
    config.insert("republish".to_owned(), json!({ "src": source, "dest": destination }));
    for field in ["metadata", "description"] {
        config.remove(field);
    }
    if bare {
        config.remove("republish");
    }
    Ok(Value::Object(config))
}
