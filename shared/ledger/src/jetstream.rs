//! The ledger on a JetStream stream.
//!
//! Owns the headers of an atomic batch and what the server's error codes mean. Assumes a stream with `allow_atomic`
//! (checked at start by [`crate::streams`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::{PublishErrorKind, RequestErrorKind};
use async_nats::header::{
    NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL, NATS_BATCH_ID, NATS_BATCH_SEQUENCE, NATS_EXPECTED_LAST_SEQUENCE,
    NATS_MESSAGE_ID,
};
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap, HeaderValue, Request};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use lomash_platform::trace::TraceContext;
use serde::Deserialize;
use time::OffsetDateTime;
use tokio::sync::oneshot;
use tracing::info;

use crate::direct::{self, Answered, Held};
use crate::refusal::{BATCH_INCOMPLETE, MESSAGE_TOO_LARGE};
use crate::{
    AppendError, BatchPosition, Carried, Ledger, MAX_BATCH_MESSAGES, Messages, NewMessage, ReadError, StoredMessage,
    crash_point, header,
};

/// How long an append waits for the server's answer before its outcome is unknown.
///
/// A three-node cluster that lost its leader acknowledges again after some 7 s; waiting longer than that would only
/// delay the recovery, which is safe at any time.
pub const APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a read with messages outstanding may stand still before it is given up and started again.
pub const READ_STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the stream's leader may take to say where the stream ends. One that just died does not answer, and every moment
/// waited for it is a moment without decisions; whoever asks asks again.
pub const LAST_SEQUENCE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the servers may take to open a reader. It takes the leader of them all to make one; async-nats would wait 10 s for an
/// answer of one that is gone.
pub const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// Messages that are read by direct gets when a reader for more of them would be faster but has to be made first, by a leader
/// that may be gone: two of the largest batches.
const FEW_MESSAGES: u64 = 2 * MAX_BATCH_MESSAGES as u64;

/// Messages that a reader of a range asks for at once. It asks again when half of them came, so that the server need not wait for
/// its question; an ordered consumer asks for 500.
const READ_AT_ONCE: usize = 5_000;

/// And bytes of them: refusals of long orders are hundreds of times as large as most events.
const READ_AT_ONCE_BYTES: usize = 16 * 1024 * 1024;

/// How long the server keeps the reader of a range that nobody asks any more.
const READER_KEPT: Duration = Duration::from_secs(30);

/// How often an append that waits for its answer looks whether the connection is still the one that it was sent on.
const CONNECTION_LOOK: Duration = Duration::from_millis(50);

/// Why a batch that was staged was not stored.
pub(crate) const NEVER_TOLD_TO_GO: &str = "it was staged and not wanted any more";

const WRONG_LAST_SEQUENCE: u64 = 10_071;
const BATCH_IN_FLIGHT: u64 = 10_164;
const DUPLICATE_IN_BATCH: u64 = 10_201;
const BATCH_TOO_LARGE: u64 = 10_199;
const DUPLICATE_IN_PROCESS: u64 = 10_158;
const TOO_MANY_BATCHES: u64 = 10_210;

/// A [`Ledger`] on one JetStream stream.
#[derive(Clone, Debug)]
pub struct JetStreamLedger {
    context: Context,
    stream: Arc<str>,
    /// Batch ids are this prefix and a counter: unique across processes, short on the wire.
    batch_prefix: Arc<str>,
    batches: Arc<AtomicU64>,
    reading: Reading,
}

/// How a long range is read.
#[derive(Clone, Debug)]
enum Reading {
    /// By a consumer that is made for it.
    OwnConsumer,
    /// By direct gets.
    DirectGets,
    /// By a durable consumer that is there already, as long as nothing went wrong with it; by direct gets from then on.
    Through { consumer: &'static str, failed: Arc<AtomicBool> },
}

#[derive(Deserialize)]
struct PublishAnswer {
    #[serde(default)]
    seq: u64,
    error: Option<ServerError>,
}

#[derive(Deserialize)]
pub(crate) struct ServerError {
    #[serde(default)]
    pub(crate) err_code: u64,
    #[serde(default)]
    pub(crate) description: String,
}

#[derive(Deserialize)]
struct StreamInfoAnswer {
    state: Option<StreamState>,
    error: Option<ServerError>,
}

#[derive(Deserialize)]
struct StreamState {
    last_seq: u64,
}

impl JetStreamLedger {
    /// The ledger on stream `stream`.
    #[must_use]
    pub fn new(mut context: Context, stream: &str) -> Self {
        context.set_timeout(OPEN_TIMEOUT);
        let unique = uuid::Uuid::new_v4().simple().to_string();
        Self {
            context,
            stream: stream.into(),
            batch_prefix: unique[..12].into(),
            batches: Arc::new(AtomicU64::new(1)),
            reading: Reading::OwnConsumer,
        }
    }

    /// The same for whoever may only look: reads by direct gets (see [`crate::direct`]) and makes no consumer. It cannot be
    /// followed.
    #[must_use]
    pub fn read_only(context: Context, stream: &str) -> Self {
        Self { reading: Reading::DirectGets, ..Self::new(context, stream) }
    }

    /// The same, reading long ranges through a durable consumer without acknowledgements, which is set back to where the
    /// range begins: the server hands out a message for less than half of what a direct get costs it.
    ///
    /// Whoever else does so at the same time takes messages away. That is seen, ends the range, and is no gap; from then on, and
    /// when there is no such consumer, this reads by direct gets.
    #[must_use]
    pub fn through(self, consumer: &'static str) -> Self {
        Self { reading: Reading::Through { consumer, failed: Arc::default() }, ..self }
    }

    async fn open(&self, after: u64) -> Result<jetstream::consumer::pull::Ordered, ReadError> {
        let stream = self.context.get_stream_no_info(&*self.stream).await.map_err(unavailable)?;
        let consumer = stream
            .create_consumer(pull::OrderedConfig {
                deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: after + 1 },
                ..Default::default()
            })
            .await
            .map_err(unavailable)?;
        consumer.messages().await.map_err(unavailable)
    }

    /// What is stored after `after`, in pulls of this size by a consumer of its own.
    async fn range(&self, after: u64, at_once: usize, bytes_at_once: usize) -> Result<Messages, ReadError> {
        let stream = self.context.get_stream_no_info(&*self.stream).await.map_err(unavailable)?;
        let consumer = stream
            .create_consumer(pull::Config {
                deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: after + 1 },
                ack_policy: AckPolicy::None,
                memory_storage: true,
                num_replicas: 1,
                inactive_threshold: READER_KEPT,
                ..Default::default()
            })
            .await
            .map_err(unavailable)?;
        pull_all(&consumer, after, at_once, bytes_at_once).await
    }

    /// What is stored after `after` and comes later, with at most so much on its way at once. Unlike [`Ledger::follow`] it ends
    /// when a delivery is lost.
    ///
    /// # Errors
    /// [`ReadError`], also as an item when it happens on the way.
    pub async fn tail(&self, after: u64, at_once: usize, bytes_at_once: usize) -> Result<Messages, ReadError> {
        self.range(after, at_once, bytes_at_once).await
    }

    /// What is stored after `after` up to `upto`, some `max_bytes` of it: one question, and nothing is asked for ahead.
    ///
    /// # Errors
    /// [`ReadError`]; also when nothing comes although something must be there.
    pub async fn pull(&self, after: u64, upto: u64, max_bytes: usize) -> Result<Vec<StoredMessage>, ReadError> {
        let pulled: Vec<StoredMessage> = direct::pull(&self.context, &self.stream, after, upto, max_bytes).await?;
        if pulled.is_empty() && after < upto {
            return Err(ReadError::Unavailable(format!("nothing comes after {after}, before {upto}")));
        }
        for (due, message) in (after + 1..).zip(&pulled) {
            if message.sequence != due {
                return Err(ReadError::Gap { after: due - 1, found: message.sequence });
            }
        }
        Ok(pulled)
    }

    /// The same by the durable consumer `name`.
    async fn range_through(&self, name: &str, after: u64) -> Result<Messages, ReadError> {
        let stream = self.context.get_stream_no_info(&*self.stream).await.map_err(unavailable)?;
        let consumer = stream.get_consumer::<pull::Config>(name).await;
        let consumer = consumer.map_err(|problem| ReadError::Unavailable(problem.to_string()))?;
        if consumer.cached_info().config.ack_policy != AckPolicy::None {
            return Err(ReadError::Unavailable(format!("the consumer {name} keeps somebody's place")));
        }
        stream.reset_consumer(name, Some(after + 1)).await.map_err(unavailable)?;
        pull_all(&consumer, after, READ_AT_ONCE, READ_AT_ONCE_BYTES).await
    }
}

/// What a consumer delivers that begins after `after`. Unlike an ordered consumer it is not made anew when a delivery is lost:
/// the range ends there, and whoever reads it begins another where this one ended.
async fn pull_all(
    consumer: &PullConsumer,
    after: u64,
    at_once: usize,
    bytes_at_once: usize,
) -> Result<Messages, ReadError> {
    let pulls = consumer.stream().max_messages_per_batch(at_once).max_bytes_per_batch(bytes_at_once);
    let messages = pulls.messages().await.map_err(unavailable)?;
    let due = messages.enumerate().map(|(before, item)| due(before as u64 + 1, delivered(item.map_err(unavailable)?)?));
    Ok(contiguous(after, due))
}

fn unavailable(error: impl std::error::Error) -> ReadError {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    ReadError::Unavailable(text)
}

/// Returns once there is another connection than the one that was the `connects`th: what was asked on that is answered by
/// nobody, and the answer need not be waited for.
async fn reconnected(client: &Client, connects: u64) {
    let statistics = client.statistics();
    while statistics.connects.load(Ordering::Relaxed) == connects {
        tokio::time::sleep(CONNECTION_LOOK).await;
    }
}

pub(crate) fn append_error(error: ServerError, messages: usize) -> AppendError {
    let ServerError { err_code, description } = error;
    match err_code {
        WRONG_LAST_SEQUENCE | BATCH_IN_FLIGHT | DUPLICATE_IN_PROCESS => AppendError::Conflict(description),
        DUPLICATE_IN_BATCH => AppendError::Duplicate(description),
        BATCH_TOO_LARGE => AppendError::TooLarge { messages, description },
        BATCH_INCOMPLETE => AppendError::Incomplete(description),
        TOO_MANY_BATCHES => AppendError::Unknown(description),
        code => AppendError::Refused { code, description },
    }
}

/// What the client did not even send, for the server would have cut the connection.
fn too_large_to_send(error: &impl std::fmt::Display) -> AppendError {
    AppendError::Refused { code: MESSAGE_TOO_LARGE, description: error.to_string() }
}

fn headers(message: &NewMessage, batch_id: &str, position: usize, of: usize, expected: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(NATS_MESSAGE_ID, message.event_id.to_string());
    headers.insert(NATS_BATCH_ID, batch_id);
    headers.insert(NATS_BATCH_SEQUENCE, position.to_string());
    if position == 1 {
        headers.insert(NATS_EXPECTED_LAST_SEQUENCE, expected.to_string());
    }
    if position == of {
        headers.insert(NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL);
    }
    if let Some(carried) = &message.carried {
        let named = [
            (header::TRACEPARENT, carried.traceparent()),
            (header::TRACESTATE, carried.tracestate()),
            (header::REASON, carried.reason.as_deref()),
            (header::COMMAND, carried.command.as_deref()),
        ];
        for (name, value) in named {
            if let Some(value) = value {
                headers.insert(name, header_text(value).as_str());
            }
        }
    }
    headers
}

/// A header value cannot hold line breaks; everything else of a text goes through.
pub(crate) fn header_text(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Sends an atomic batch, the last message of it when `go` is said, and waits for the answer.
async fn send(
    client: Client,
    batch_id: String,
    messages: Vec<NewMessage>,
    expected_last_sequence: u64,
    go: oneshot::Receiver<()>,
) -> Result<u64, AppendError> {
    let count = messages.len();
    let connects = client.statistics().connects.load(Ordering::Relaxed);
    let mut last = None;
    crash_point!("commit-before-batch");
    for (index, message) in messages.into_iter().enumerate() {
        let headers = headers(&message, &batch_id, index + 1, count, expected_last_sequence);
        let NewMessage { subject, payload, .. } = message;
        if index + 1 == count {
            last = Some((subject, headers, payload));
            break;
        }
        let sent = client.publish_with_headers(subject, headers, payload).await;
        sent.map_err(|error| match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => too_large_to_send(&error),
            _ => AppendError::Unknown(error.to_string()),
        })?;
        crash_point!("commit-between-messages");
    }
    go.await.map_err(|_| AppendError::Unknown(NEVER_TOLD_TO_GO.to_owned()))?;
    let Some((subject, headers, payload)) = last else { return Ok(expected_last_sequence) };
    crash_point!("commit-before-last-message");
    let request = Request::new().headers(headers).payload(payload).timeout(Some(APPEND_TIMEOUT));
    let answered = tokio::select! {
        biased;
        answered = client.send_request(subject, request) => answered,
        () = reconnected(&client, connects) => {
            return Err(AppendError::Unknown("the connection was lost before the answer came".to_owned()));
        }
    };
    let answer = answered.map_err(|error| {
        let reason = match error.kind() {
            RequestErrorKind::MaxPayloadExceeded => return too_large_to_send(&error),
            RequestErrorKind::TimedOut => format!("no answer within {} s", APPEND_TIMEOUT.as_secs()),
            RequestErrorKind::NoResponders => "no server answers for the stream".to_owned(),
            _ => error.to_string(),
        };
        AppendError::Unknown(reason)
    })?;
    let answer: PublishAnswer = serde_json::from_slice(&answer.payload)
        .map_err(|error| AppendError::Unknown(format!("the answer is not a publish acknowledgement: {error}")))?;
    match answer.error {
        Some(error) => Err(append_error(error, count)),
        None if answer.seq == expected_last_sequence + count as u64 => Ok(answer.seq),
        None => Err(AppendError::Unknown(format!(
            "the acknowledgement is for sequence {} where {} was due",
            answer.seq,
            expected_last_sequence + count as u64
        ))),
    }
}

impl Ledger for JetStreamLedger {
    fn stage(
        &self,
        messages: Vec<NewMessage>,
        expected_last_sequence: u64,
        go: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static {
        let client = self.context.client();
        let batch_id = format!("{}-{}", self.batch_prefix, self.batches.fetch_add(1, Ordering::Relaxed));
        send(client, batch_id, messages, expected_last_sequence, go)
    }

    async fn last_sequence(&self) -> Result<u64, ReadError> {
        let subject = format!("STREAM.INFO.{}", self.stream);
        let answer = tokio::time::timeout(LAST_SEQUENCE_TIMEOUT, self.context.request(subject, &())).await;
        let answer: StreamInfoAnswer = answer.map_err(unavailable)?.map_err(unavailable)?;
        match (answer.state, answer.error) {
            (Some(state), None) => Ok(state.last_seq),
            (_, Some(error)) => Err(ReadError::Unavailable(error.description)),
            (None, None) => Err(ReadError::Unavailable("the stream's state is missing in the answer".to_owned())),
        }
    }

    async fn read(&self, after: u64) -> Result<Messages, ReadError> {
        let last = self.reaches(after).await?;
        if last == after {
            return Ok(stream::empty().boxed());
        }
        let is_long = last - after > FEW_MESSAGES;
        let mut shared = None;
        let by_consumer = match &self.reading {
            Reading::OwnConsumer if is_long => Some(self.range(after, READ_AT_ONCE, READ_AT_ONCE_BYTES).await?),
            Reading::Through { consumer, failed } if is_long && !failed.load(Ordering::Relaxed) => {
                let opened = self.range_through(consumer, after).await;
                if let Err(problem) = &opened {
                    info!(consumer, %problem, "reading by direct gets, which takes longer");
                    failed.store(true, Ordering::Relaxed);
                }
                shared = Some(Arc::clone(failed));
                opened.ok()
            }
            _ => None,
        };
        let messages = by_consumer
            .unwrap_or_else(|| contiguous(after, direct::read_as(&self.context, &self.stream, None, after, last)));
        // The end of the range is known, so silence before it is a fault and not an idle stream.
        let guarded = stream::unfold((messages, after), move |(mut messages, seen)| async move {
            if seen >= last {
                return None;
            }
            let item = match tokio::time::timeout(READ_STALL_TIMEOUT, messages.next()).await {
                Ok(Some(item)) => item,
                Ok(None) => Err(ReadError::Unavailable(format!("the reader ended after {seen}, before {last}"))),
                Err(_) => {
                    let stalled = format!("nothing came within {} s after {seen}", READ_STALL_TIMEOUT.as_secs());
                    Err(ReadError::Unavailable(stalled))
                }
            };
            let seen = item.as_ref().map_or(u64::MAX, |message| message.sequence);
            Some((item, (messages, seen)))
        });
        let noted = guarded.inspect_err(move |_| {
            if let Some(failed) = &shared {
                failed.store(true, Ordering::Relaxed);
            }
        });
        Ok(noted.boxed())
    }

    async fn follow(&self, after: u64) -> Result<Messages, ReadError> {
        let messages = self.open(after).await?;
        Ok(contiguous(after, messages.map(|item| delivered(item.map_err(unavailable)?).map(|(_, message)| message))))
    }
}

/// Passes messages on as long as none is missing, and ends with the first fault.
fn contiguous(after: u64, messages: impl Stream<Item = Result<StoredMessage, ReadError>> + Send + 'static) -> Messages {
    let contiguous = messages.scan((after, false), |(seen, failed), item| {
        if *failed {
            return futures::future::ready(None);
        }
        let checked = match item {
            Ok(message) if message.sequence <= *seen => None, // a recreated consumer may repeat
            Ok(message) if message.sequence == *seen + 1 => {
                *seen = message.sequence;
                Some(Ok(message))
            }
            Ok(message) => Some(Err(ReadError::Gap { after: *seen, found: message.sequence })),
            Err(error) => Some(Err(error)),
        };
        *failed = matches!(checked, Some(Err(_)));
        futures::future::ready(Some(checked))
    });
    contiguous.filter_map(futures::future::ready).boxed()
}

/// A message and which delivery of its consumer it was, the first being 1.
fn delivered(message: jetstream::Message) -> Result<(u64, StoredMessage), ReadError> {
    let (number, sequence, stored_at) = {
        let info = message.info().map_err(|error| ReadError::Unavailable(error.to_string()))?;
        (info.consumer_sequence, info.stream_sequence, info.published)
    };
    let message = message.message;
    let subject = message.subject.into_string();
    Ok((number, with_headers(sequence, stored_at, subject, message.headers.as_ref(), message.payload)))
}

/// The message, when it is the delivery that is due. That one was lost on the way is no gap in the stream.
fn due(due: u64, (number, message): (u64, StoredMessage)) -> Result<StoredMessage, ReadError> {
    if number == due {
        return Ok(message);
    }
    let sequence = message.sequence;
    Err(ReadError::Unavailable(format!("delivery {due} was lost: sequence {sequence} came as delivery {number}")))
}

impl From<Held> for StoredMessage {
    fn from(Held { sequence, stored_at, subject, headers, payload, .. }: Held) -> Self {
        with_headers(sequence, stored_at, subject, Some(&headers), payload)
    }
}

impl From<Answered> for StoredMessage {
    fn from(Answered { sequence, stored_at, subject, stamps, payload, .. }: Answered) -> Self {
        with_headers(sequence, stored_at, subject, Some(&stamps), payload)
    }
}

/// A stored message with what its headers say.
pub(crate) fn with_headers(
    sequence: u64,
    stored_at: OffsetDateTime,
    subject: String,
    headers: Option<&HeaderMap>,
    payload: Bytes,
) -> StoredMessage {
    let (mut message_id, mut expected_last_sequence) = (None, None);
    let (mut batch_id, mut batch_sequence, mut commit) = (None, None, false);
    let mut carried = Carried::default();
    let (mut traceparent, mut tracestate) = (None, None);
    // One pass: a look for each name by its text costs as much as parsing the payload.
    for (name, values) in headers.into_iter().flat_map(HeaderMap::iter) {
        let Some(value) = values.first().map(HeaderValue::as_str) else { continue };
        match name.as_ref() {
            "Nats-Msg-Id" => message_id = Some(value.to_owned()),
            "Nats-Expected-Last-Sequence" => expected_last_sequence = value.parse().ok(),
            "Nats-Batch-Id" => batch_id = Some(value.to_owned()),
            "Nats-Batch-Sequence" => batch_sequence = value.parse().ok(),
            "Nats-Batch-Commit" => commit = true,
            header::TRACEPARENT => traceparent = Some(value),
            header::TRACESTATE => tracestate = Some(value),
            // A foreign writer may have put in what a text column cannot hold.
            header::REASON => carried.reason = Some(header_text(value)),
            header::COMMAND => carried.command = Some(value.to_owned()),
            _ => {}
        }
    }
    carried.trace = TraceContext::parse(traceparent, tracestate);
    let batch = batch_id.map(|id| BatchPosition { id, sequence: batch_sequence.unwrap_or(0), commit });
    StoredMessage { sequence, stored_at, message_id, expected_last_sequence, batch, carried, subject, payload }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(number: u64, sequence: u64) -> (u64, StoredMessage) {
        let subject = "lomash.inventory.updated.1".to_owned();
        (number, with_headers(sequence, OffsetDateTime::UNIX_EPOCH, subject, None, Bytes::new()))
    }

    #[tokio::test]
    async fn a_lost_delivery_can_be_read_again_and_a_lost_message_cannot() {
        let read = async |deliveries: [(u64, StoredMessage); 2]| {
            let read = deliveries.into_iter().enumerate().map(|(before, delivery)| due(before as u64 + 1, delivery));
            contiguous(6, stream::iter(read)).collect::<Vec<_>>().await
        };
        assert!(matches!(read([delivery(1, 7), delivery(2, 8)]).await[..], [Ok(_), Ok(_)]));
        assert!(matches!(read([delivery(1, 7), delivery(3, 9)]).await[..], [Ok(_), Err(ReadError::Unavailable(_))]));
        let gap = read([delivery(1, 7), delivery(2, 9)]).await;
        assert!(matches!(gap[..], [Ok(_), Err(ReadError::Gap { after: 7, found: 9 })]));
    }
}
