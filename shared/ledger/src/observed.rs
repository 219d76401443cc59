//! What the receive loop shows of itself: metrics of each durable consumer, and a span for each message.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{self, Context};
use lomash_contract::subject::{KeyedSubject, Topic};
use lomash_platform::metrics::{Counter, Family, Gauge, Histogram, Histograms, Labels, Metrics, seconds};
use lomash_platform::trace;
use time::OffsetDateTime;
use tokio::task::AbortHandle;
use tracing::{Span, debug};

use crate::receive::{Receive, Settle};
use crate::{header, raw, streams};

/// How often a consumer is asked how far behind it is.
pub const LAG_EVERY: Duration = Duration::from_secs(5);

/// How long the answer may take; a server that is too busy to give it has no fresh figure.
const LAG_TIMEOUT: Duration = Duration::from_secs(2);

type ByConsumer<M> = Family<Labels<2>, M>;

static SETTLED: LazyLock<Family<Labels<3>, Counter>> = LazyLock::new(|| {
    let help = "Messages settled, by what became of them: done, retry, or dead (a dead letter)";
    Metrics::of_process().register("lomash_messages_settled", help, Family::default())
});
static HANDLING: LazyLock<Histograms<2>> = LazyLock::new(|| {
    let help = "From a message's delivery to what its handler made of it";
    let family = Family::new_with_constructor(seconds as fn() -> Histogram);
    Metrics::of_process().register("lomash_message_handling_seconds", help, family)
});
static PENDING: LazyLock<ByConsumer<Gauge>> = LazyLock::new(|| {
    let help = "Messages of the stream that the consumer has yet to deliver";
    Metrics::of_process().register("lomash_consumer_pending_messages", help, Family::default())
});
static ACK_PENDING: LazyLock<ByConsumer<Gauge>> = LazyLock::new(|| {
    let help = "Messages that are delivered and not settled";
    Metrics::of_process().register("lomash_consumer_ack_pending_messages", help, Family::default())
});
static REDELIVERED: LazyLock<ByConsumer<Gauge>> = LazyLock::new(|| {
    let help = "Messages that are delivered more than once and not settled";
    Metrics::of_process().register("lomash_consumer_redelivered_messages", help, Family::default())
});

/// The metrics of one consumer.
#[derive(Debug)]
pub(crate) struct Observed {
    done: Counter,
    retry: Counter,
    dead: Counter,
    handling: Histogram,
}

impl Observed {
    pub(crate) fn new(receive: &Receive) -> Self {
        let (stream, consumer) = (("stream", receive.stream), ("consumer", receive.consumer));
        let settled = |outcome| SETTLED.get_or_create_owned(&[stream, consumer, ("outcome", outcome)]);
        Self {
            done: settled("done"),
            retry: settled("retry"),
            dead: settled("dead"),
            handling: HANDLING.get_or_create_owned(&[stream, consumer]),
        }
    }

    /// A message that was delivered at `since` is settled so.
    pub(crate) fn settled(&self, settle: &Settle, since: Instant) {
        match settle {
            Settle::Done => self.done.inc(),
            Settle::Retry(_) => self.retry.inc(),
            Settle::Dead(_) => self.dead.inc(),
        };
        self.handling.observe(since.elapsed().as_secs_f64());
    }
}

/// Asks the server now and then how far behind the consumer is, until it is dropped.
pub(crate) struct LagWatch(AbortHandle);

impl LagWatch {
    pub(crate) fn start(context: Context, receive: &Receive) -> Self {
        let (stream, consumer) = (receive.stream, receive.consumer);
        let task = tokio::spawn(async move {
            let labels = [("stream", stream), ("consumer", consumer)];
            loop {
                match tokio::time::timeout(LAG_TIMEOUT, consumer_info(&context, stream, consumer)).await {
                    Ok(Ok(info)) => {
                        PENDING.get_or_create(&labels).set(i64::try_from(info.num_pending).unwrap_or(i64::MAX));
                        ACK_PENDING.get_or_create(&labels).set(i64::try_from(info.num_ack_pending).unwrap_or(i64::MAX));
                        REDELIVERED.get_or_create(&labels).set(i64::try_from(info.num_redelivered).unwrap_or(i64::MAX));
                    }
                    Ok(Err(problem)) => debug!(consumer, problem, "the lag is not known"),
                    Err(_) => debug!(consumer, "the lag is not known in time"),
                }
                tokio::time::sleep(LAG_EVERY).await;
            }
        });
        Self(task.abort_handle())
    }
}

impl Drop for LagWatch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How long the oldest message of a consumer's has been in its stream without being settled, whoever has it or nobody; zero when
/// there is none.
///
/// # Errors
/// Why the server does not tell.
pub async fn oldest_unsettled(context: &Context, stream: &str, consumer: &str) -> Result<Duration, String> {
    let info = consumer_info(context, stream, consumer).await?;
    if info.num_pending + info.num_ack_pending == 0 {
        return Ok(Duration::ZERO);
    }
    let filter = Some(info.config.filter_subject).filter(|filter| !filter.is_empty());
    let filter = filter.unwrap_or_else(|| ">".to_owned());
    let from = info.ack_floor.stream_seq + 1;
    // The clocks of two machines may disagree a little.
    let age = |since: OffsetDateTime| (OffsetDateTime::now_utc() - since).try_into().unwrap_or_default();
    if stream != streams::INVENTORY {
        // Whatever its headers are: over some, the client library would cut or lose this connection.
        return Ok(raw::next(context, stream, &filter, from)
            .await?
            .map_or(Duration::ZERO, |oldest| age(oldest.message.time)));
    }
    let handle = context.get_stream_no_info(stream).await.map_err(|problem| problem.to_string())?;
    match handle.direct_get_next_for_subject(filter, Some(from)).await {
        Ok(message) => Ok(age(message.time)),
        Err(problem) if problem.kind() == DirectGetErrorKind::NotFound => Ok(Duration::ZERO),
        Err(problem) => Err(problem.to_string()),
    }
}

/// How much of a stream is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamUse {
    /// Messages in it.
    pub messages: u64,
    /// Bytes in it.
    pub bytes: u64,
    /// Bytes that it takes before it refuses more; none when it never does.
    pub max_bytes: Option<u64>,
}

/// How much of a stream is used; nothing when the server does not say.
pub async fn stream_use(context: &Context, stream: &str) -> Option<StreamUse> {
    let answer: Result<serde_json::Value, _> = context.request(format!("STREAM.INFO.{stream}"), &()).await;
    let answer = answer.ok()?;
    let number = |pointer| answer.pointer(pointer).and_then(serde_json::Value::as_u64);
    let refuses = answer.pointer("/config/discard").and_then(serde_json::Value::as_str) == Some("new");
    let max_bytes = number("/config/max_bytes").filter(|_| refuses);
    Some(StreamUse { messages: number("/state/messages")?, bytes: number("/state/bytes")?, max_bytes })
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Floor {
    stream_seq: u64,
}

#[derive(Default, serde::Deserialize)]
#[serde(default)]
struct Filtered {
    filter_subject: String,
}

#[derive(serde::Deserialize)]
struct ConsumerInfo {
    #[serde(default)]
    ack_floor: Floor,
    #[serde(default)]
    config: Filtered,
    #[serde(default)]
    num_pending: u64,
    #[serde(default)]
    num_ack_pending: u64,
    #[serde(default)]
    num_redelivered: u64,
}

async fn consumer_info(context: &Context, stream: &str, consumer: &str) -> Result<ConsumerInfo, String> {
    // The server wants no request, or an empty one; nothing at all would be sent as `null`.
    let request = serde_json::json!({});
    let answer = context.request(format!("CONSUMER.INFO.{stream}.{consumer}"), &request).await;
    let answer: serde_json::Value = answer.map_err(|error: jetstream::context::RequestError| error.to_string())?;
    match answer.pointer("/error/description").and_then(serde_json::Value::as_str) {
        Some(problem) => Err(problem.to_owned()),
        None => serde_json::from_value(answer).map_err(|error| error.to_string()),
    }
}

fn text<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    headers?.get(name).map(async_nats::HeaderValue::as_str)
}

/// The span of handling one message: a consumer span that continues what published the message. A span that is not exported,
/// and costs nothing, when there is no need for one.
pub(crate) fn process_span(receive: &Receive, message: &jetstream::Message, sequence: u64, deliveries: u64) -> Span {
    if !trace::is_on() {
        return Span::none();
    }
    let headers = message.headers.as_ref();
    let continued = trace::begin(text(headers, header::TRACEPARENT), text(headers, header::TRACESTATE));
    let Some(continued) = continued else {
        return Span::none();
    };
    let subject = message.subject.as_str();
    // Anybody may have published on any subject of the stream: a name is one of a few.
    let topic = topic_of(subject).map_or(receive.stream, Topic::as_str);
    let message_id = text(headers, "Nats-Msg-Id");
    let span = tracing::info_span!(
        target: trace::TARGET,
        parent: None,
        "process",
        otel.name = format!("process {topic}"),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = subject,
        messaging.destination.template = topic,
        messaging.destination.subscription.name = receive.consumer,
        messaging.consumer.group.name = receive.consumer,
        messaging.message.id = message_id,
        messaging.message.body.size = message.payload.len(),
        messaging.nats.stream = receive.stream,
        messaging.nats.sequence = sequence,
        messaging.nats.deliveries = deliveries,
        event.id = message_id,
        order.id = tracing::field::Empty,
        product.id = tracing::field::Empty,
    );
    continued.adopt(&span);
    if let Ok(KeyedSubject { topic, key }) = subject.parse() {
        let field = if topic == Topic::InventoryUpdateFailed { "order.id" } else { "product.id" };
        span.record(field, tracing::field::display(key));
    }
    span
}

/// The topic of the contract that a subject belongs to, as published or with the key that a stream stores.
fn topic_of(subject: &str) -> Option<Topic> {
    let belongs = |topic: &Topic| {
        let rest = subject.strip_prefix(topic.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    Topic::ALL.into_iter().find(belongs)
}

/// Says in the message's span what became of it, when that is not that it was handled.
pub(crate) fn tell_settled(span: &Span, settle: &Settle) {
    match settle {
        Settle::Done => {}
        Settle::Retry(_) => trace::fail(span, "not now, to be delivered again"),
        Settle::Dead(reason) => trace::fail(span, reason),
    }
}
