//! The one receive loop: pull, hand to the handler, settle.
//!
//! A handler says what happened ([`Settle`]); the loop acknowledges, asks for redelivery or writes a dead letter.
//! Acknowledging comes last, so every handler must bear seeing a message twice. The loop survives a lost connection,
//! a restarted server and a panicking handler.

use std::convert::Infallible;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::{PriorityGroupState, PullConsumer, pull};
use async_nats::jetstream::{self, AckKind, Context};
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::{FuturesUnordered, StreamExt};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, warn};

use crate::dead_letter::DeadLetter;
use crate::observed::{LagWatch, Observed, process_span, tell_settled};
use crate::streams;

/// How long one pull request waits at the server.
///
/// Well below the `priority_timeout` of the consumers (see `streams/consumers`), or a pinned client would lose its pin
/// between two pulls.
pub const PULL_EXPIRES: Duration = Duration::from_secs(2);
/// How often the server says that a waiting pull is alive.
pub const PULL_HEARTBEAT: Duration = Duration::from_secs(1);
/// Messages asked for ahead of those that are handled: enough to hide the way to the server, few enough that the largest
/// ones do not fill the memory.
pub const PREFETCH_MESSAGES: usize = 500;
/// How long handing the pin over may take when the loop stops.
pub const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before the loop opens its consumer again after a failure.
pub const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// How long a stopping loop waits for the handlers that are at work; what is not settled comes back.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a message comes back whose dead letter could not be stored.
pub const DEAD_LETTER_RETRY: Duration = Duration::from_secs(2);
/// Pause before a message comes back whose handler panicked.
pub const PANIC_RETRY: Duration = Duration::from_secs(1);

const _: () = assert!(PULL_HEARTBEAT.as_millis() * 2 <= PULL_EXPIRES.as_millis(), "the server requires it");

/// What a handler made of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Handled: acknowledge.
    Done,
    /// Not now: deliver again after the pause.
    Retry(Duration),
    /// Never: write a dead letter with this reason, then drop the message.
    Dead(String),
}

/// A message as a handler sees it.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The subject it was published on.
    pub subject: String,
    /// Its headers.
    pub headers: Option<HeaderMap>,
    /// Its payload.
    pub payload: Bytes,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// 1 the first time.
    pub deliveries: u64,
    /// When the server stored it.
    pub stored_at: OffsetDateTime,
}

impl Delivery {
    /// A header's text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str)
    }
}

/// What to receive and within which bounds.
#[derive(Clone, Debug)]
pub struct Receive {
    /// The stream.
    pub stream: &'static str,
    /// Its durable consumer; made from its definition when it is missing, also when it was deleted meanwhile.
    pub consumer: &'static str,
    /// The priority group, for a consumer that pins one client.
    pub group: Option<&'static str>,
    /// Most messages handled at once. Messages wait in the stream, not in memory.
    pub max_in_flight: usize,
    /// Most bytes of payload handled at once; one message may go over it.
    pub max_in_flight_bytes: usize,
    /// Deliveries after which a message whose handler panics is given up.
    pub max_panics: u64,
    /// How often the server is told that a handler is still at work, when one may take longer than the consumer's
    /// `ack_wait`; a third of that is right. `None` for handlers that are always faster.
    pub in_progress_every: Option<Duration>,
}

/// Receives until `stop`, then lets the handlers at work finish.
///
/// Handlers are started in the order of the stream; what they do before their first `await` happens in that order.
pub async fn run<H, F>(context: Context, receive: Receive, stop: CancellationToken, handler: H)
where
    H: Fn(Delivery) -> F,
    F: Future<Output = Settle> + Send,
{
    let observed = Observed::new(&receive);
    let _lag = LagWatch::start(context.clone(), &receive);
    while !stop.is_cancelled() {
        let opened = tokio::select! {
            () = stop.cancelled() => break,
            opened = open(&context, &receive) => opened,
        };
        match opened {
            Ok(messages) => {
                info!(stream = receive.stream, consumer = receive.consumer, "receiving");
                pump(&context, &receive, &observed, messages, &stop, &handler).await;
            }
            Err(problem) => warn!(consumer = receive.consumer, problem, "cannot receive yet, trying again"),
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(REOPEN_PAUSE) => {}
        }
    }
}

async fn open(context: &Context, receive: &Receive) -> Result<pull::Stream, String> {
    streams::ensure_consumer(context, receive.stream, receive.consumer).await.map_err(|error| error.to_string())?;
    let consumer: PullConsumer =
        context.get_consumer_from_stream(receive.consumer, receive.stream).await.map_err(|error| error.to_string())?;
    let mut builder = consumer
        .stream()
        .max_messages_per_batch(PREFETCH_MESSAGES.min(receive.max_in_flight))
        .expires(PULL_EXPIRES)
        .heartbeat(PULL_HEARTBEAT);
    if let Some(group) = receive.group {
        builder = builder.group(group);
    }
    builder.messages().await.map_err(|error| error.to_string())
}

async fn pump<H, F>(
    context: &Context,
    receive: &Receive,
    observed: &Observed,
    mut messages: pull::Stream,
    stop: &CancellationToken,
    handler: &H,
) where
    H: Fn(Delivery) -> F,
    F: Future<Output = Settle> + Send,
{
    let mut at_work = FuturesUnordered::new();
    let mut bytes_at_work = 0;
    let mut pin: Option<String> = None;
    loop {
        let has_room = at_work.len() < receive.max_in_flight && bytes_at_work < receive.max_in_flight_bytes;
        tokio::select! {
            // Settling frees places, so it goes first; stopping is looked at before new work.
            biased;
            Some(bytes) = at_work.next(), if !at_work.is_empty() => bytes_at_work -= bytes,
            () = stop.cancelled() => break,
            next = messages.next(), if has_room => match next {
                Some(Ok(message)) => {
                    let bytes = message.payload.len();
                    let headers = message.headers.as_ref().filter(|_| receive.group.is_some());
                    let given = headers.and_then(|headers| headers.get_last(async_nats::header::NATS_PIN_ID));
                    if let Some(given) = given.filter(|given| pin.as_deref() != Some(given.as_str())) {
                        pin = Some(given.to_string());
                    }
                    bytes_at_work += bytes;
                    at_work.push(handle(context, receive, observed, message, handler).map(move |()| bytes));
                }
                Some(Err(problem)) => {
                    debug!(consumer = receive.consumer, %problem, "pull interrupted");
                    if problem.kind() != pull::MessagesErrorKind::MissingHeartbeat {
                        break;
                    }
                }
                None => break,
            },
        }
    }
    drop(messages);
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, async { while at_work.next().await.is_some() {} }).await;
    if drained.is_err() {
        warn!(
            consumer = receive.consumer,
            left = at_work.len(),
            "handlers did not finish in time; their messages come back"
        );
    }
    if let (true, Some(group), Some(pin)) = (stop.is_cancelled(), receive.group, pin) {
        hand_over(context, receive, group, &pin).await;
    }
}

/// Gives up the pin, if we have it, so that a standby need not wait until it runs out. Best effort.
async fn hand_over(context: &Context, receive: &Receive, group: &str, pin: &str) {
    let handing_over = async {
        let stream = context.get_stream_no_info(receive.stream).await.map_err(|error| error.to_string())?;
        let info = stream.consumer_info(receive.consumer).await.map_err(|error| error.to_string())?;
        let ours = |state: &PriorityGroupState| state.group == group && state.pinned_client_id.as_deref() == Some(pin);
        if info.priority_groups.iter().any(ours) {
            stream.unpin_consumer(receive.consumer, group).await.map_err(|error| error.to_string())?;
        }
        Ok::<(), String>(())
    };
    match tokio::time::timeout(HAND_OVER_TIMEOUT, handing_over).await {
        Ok(Ok(())) => {}
        Ok(Err(problem)) => debug!(consumer = receive.consumer, problem, "the pin was not handed over and runs out"),
        Err(_) => debug!(consumer = receive.consumer, "the pin was not handed over in time and runs out"),
    }
}

fn handle<'a, H, F>(
    context: &'a Context,
    receive: &'a Receive,
    observed: &'a Observed,
    message: jetstream::Message,
    handler: &H,
) -> impl Future<Output = ()> + 'a + use<'a, H, F>
where
    H: Fn(Delivery) -> F,
    F: Future<Output = Settle> + Send + 'a,
{
    let (sequence, deliveries, stored_at) = match message.info() {
        Ok(info) => (info.stream_sequence, u64::try_from(info.delivered).unwrap_or(1), info.published),
        Err(_) => (0, 1, OffsetDateTime::UNIX_EPOCH),
    };
    let since = Instant::now();
    let span = process_span(receive, &message, sequence, deliveries);
    let (message, acker) = message.split();
    let delivery = Delivery {
        subject: message.subject.to_string(),
        headers: message.headers.clone(),
        payload: message.payload.clone(),
        sequence,
        deliveries,
        stored_at,
    };
    let handled = std::panic::catch_unwind(AssertUnwindSafe(|| span.in_scope(|| handler(delivery))));
    let told = span.clone();
    async move {
        let outcome = match (handled, receive.in_progress_every) {
            (Ok(future), None) => AssertUnwindSafe(future).catch_unwind().await,
            (Ok(future), Some(every)) => tokio::select! {
                outcome = AssertUnwindSafe(future).catch_unwind() => outcome,
                never = stay_in_progress(&acker, every) => match never {},
            },
            (Err(panic), _) => Err(panic),
        };
        let settle = outcome.unwrap_or_else(|panic| {
            let what = panic_text(&*panic);
            error!(consumer = receive.consumer, sequence, deliveries, panic = what, "handler panicked");
            if deliveries >= receive.max_panics {
                Settle::Dead(format!("the handler panicked {deliveries} times, last with: {what}"))
            } else {
                Settle::Retry(PANIC_RETRY)
            }
        });
        observed.settled(&settle, since);
        tell_settled(&told, &settle);
        let kind = match settle {
            Settle::Done => AckKind::Ack,
            Settle::Retry(pause) => AckKind::Nak(Some(pause)),
            Settle::Dead(reason) => {
                let letter = DeadLetter {
                    stream: receive.stream,
                    consumer: receive.consumer,
                    subject: &message.subject,
                    sequence,
                    deliveries,
                    reason: &reason,
                    headers: message.headers.as_ref(),
                    payload: message.payload,
                };
                match letter.store(context).await {
                    Ok(()) => {
                        warn!(consumer = receive.consumer, sequence, reason, "dead letter");
                        AckKind::Term
                    }
                    Err(problem) => {
                        error!(consumer = receive.consumer, sequence, reason, %problem, "the message comes back");
                        AckKind::Nak(Some(DEAD_LETTER_RETRY))
                    }
                }
            }
        };
        if let Err(problem) = acker.ack_with(kind).await {
            debug!(consumer = receive.consumer, sequence, %problem, "could not settle; the message comes back");
        }
    }
    .instrument(span)
}

/// Tells the server again and again that the message is being handled, so that it is not delivered to another replica
/// meanwhile. What cannot be told is told the next time.
async fn stay_in_progress(acker: &jetstream::message::Acker, every: Duration) -> Infallible {
    loop {
        tokio::time::sleep(every).await;
        if let Err(problem) = acker.ack_with(AckKind::Progress).await {
            debug!(%problem, "could not say that a message is in progress");
        }
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
