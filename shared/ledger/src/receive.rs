//! The one receive loop: pull, hand to the handler, settle.
//!
//! A handler says what happened ([`Settle`]); the loop acknowledges, tries again or writes a dead letter. Acknowledging
//! comes last, so every handler must bear seeing a message twice. The loop survives a lost connection, a restarted server
//! and a panicking handler.
//!
//! A consumer acknowledges each message by itself or, with `ack_policy: all`, everything up to one: then one acknowledgement
//! is sent for all that was settled at once, and only when nothing before it is in anybody's hands any more, see
//! [`crate::in_hand`].
//!
//! The server counts deliveries, and only what a process did not survive may count against a message. So the loop tries
//! again by itself, without giving the message back; and a message that was delivered often is not handled among others
//! any more but alone, see [`crate::suspects`].

use std::convert::Infallible;
use std::future::Future;
use std::ops::ControlFlow;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{AckPolicy, Info, PriorityGroupState, PullConsumer, pull};
use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, AckKind, Context};
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, OptionFuture};
use futures::stream::{FuturesUnordered, StreamExt};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, warn};

use crate::cumulative::Cumulative;
use crate::dead_letter::{DeadLetter, Past, StoreError};
use crate::deliveries::Deliveries;
use crate::in_hand::Place;
use crate::jetstream::with_headers;
use crate::observed::{LagWatch, Observed, process_span, tell_settled};
use crate::suspects::{self, Case, Court};
use crate::{StoredMessage, streams};

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
/// How long the leader of a consumer may take to describe it. After each lost connection async-nats asks it before it pulls
/// again, and would wait 10 s for one that is gone, while its heir is there.
pub const DESCRIBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long handing the pin over may take when the loop stops.
pub const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause before the loop opens its consumer again after a failure.
pub const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// How long a stopping loop waits for the handlers that are at work; what is not settled comes back.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a message comes back whose dead letter could not be stored.
pub const DEAD_LETTER_RETRY: Duration = Duration::from_secs(2);
/// Pause before a message is tried again whose handler panicked.
pub const PANIC_RETRY: Duration = Duration::from_secs(1);
/// Deliveries after which a message is not handled among others any more: twice, because once is any failover. Whatever was
/// in flight when a process died, twice in a row, is tried alone from then on.
pub const MAX_DELIVERIES_AMONG_OTHERS: u64 = 2;
/// How often, in an `ack_wait`, the server is told that a message is being kept for its next try.
pub const KEEP_SHARE: u32 = 3;
/// How long after the start suspects wait: a process that dies of what it received first dies before, and not of a suspect
/// that was unlucky to be tried in that moment.
pub const COURT_OPENS_AFTER: Duration = Duration::from_secs(3);
/// Letters that are logged one by one in a window; the rest of it is counted. A flood must not fill the disk by its log.
pub const LETTERS_LOGGED: u64 = 20;
/// The window of [`LETTERS_LOGGED`].
pub const LETTERS_LOGGED_IN: Duration = Duration::from_secs(10);

const _: () = assert!(PULL_HEARTBEAT.as_millis() * 2 <= PULL_EXPIRES.as_millis(), "the server requires it");

/// What a handler made of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settle {
    /// Handled: acknowledge.
    Done,
    /// Not now: a server is away, or the process stops. The loop keeps the message and tries again after the pause, for as
    /// long as it takes; a process that stops gives it back.
    Retry(Duration),
    /// Never: write a dead letter with this reason, then drop the message.
    Dead(String),
}

/// A message as a handler sees it.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The subject it was published on.
    pub subject: Subject,
    /// Its headers; shared, for the loop keeps them until the message is settled.
    pub headers: Option<Arc<HeaderMap>>,
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

    /// The message as any reader of the stream gets it.
    #[must_use]
    pub fn into_stored(self) -> StoredMessage {
        with_headers(self.sequence, self.stored_at, self.subject.into_string(), self.headers.as_deref(), self.payload)
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
    /// Most bytes handled at once, headers and payload; one message may go over it.
    pub max_in_flight_bytes: usize,
    /// Panics of its handler after which a message is given up.
    pub max_panics: u64,
    /// How often the server is told that a handler is still at work, when one may rightly take longer than the consumer's
    /// `ack_wait`; a third of that is right. `None` for handlers that are always faster: one that is not has failed, is
    /// ended, and its message comes back.
    pub in_progress_every: Option<Duration>,
}

/// Receives until `stop`, then lets the handlers at work finish.
///
/// Handlers are started in the order of the stream; what they do before their first `await` happens in that order.
///
/// Beside it, what became suspect is tried alone, when `streams/consumers` has a consumer of that name in `ADVISORIES`.
pub async fn run<H, F>(deliveries: impl Into<Deliveries>, receive: Receive, stop: CancellationToken, handler: H)
where
    H: Fn(Delivery) -> F + Sync,
    F: Future<Output = Settle> + Send,
{
    let deliveries = deliveries.into();
    if !streams::is_defined(suspects::STREAM, receive.consumer) {
        return receive_on(&deliveries, &receive, &stop, &handler, false).await;
    }
    let court = Court { context: deliveries.context(), receive: &receive, handler: &handler, told: Told::default() };
    let (court, suspects) = (&court, suspects::receive(&receive));
    let hearing = |advisory| court.hear(advisory);
    // Where one message is at work at a time, each was alone all along.
    let moves_suspects = receive.max_in_flight > 1;
    let undeliverable = async {
        // Nobody but us writes the ledger.
        if receive.stream != streams::INVENTORY {
            suspects::find_undeliverable(&deliveries, &receive, &stop).await;
        }
    };
    // Cases are our own.
    let cases = Deliveries::from(deliveries.context().clone());
    tokio::join!(receive_on(&deliveries, &receive, &stop, &handler, moves_suspects), undeliverable, async {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(COURT_OPENS_AFTER) => receive_on(&cases, &suspects, &stop, &hearing, false).await,
        }
    },);
}

async fn receive_on<H, F>(
    deliveries: &Deliveries,
    receive: &Receive,
    stop: &CancellationToken,
    handler: &H,
    moves_suspects: bool,
) where
    H: Fn(Delivery) -> F + Sync,
    F: Future<Output = Settle> + Send,
{
    let context = deliveries.context();
    let told = Told::default();
    let observed = Observed::new(receive);
    let _lag = LagWatch::start(context.clone(), receive);
    while !stop.is_cancelled() {
        let opened = tokio::select! {
            () = stop.cancelled() => break,
            opened = open(deliveries, receive, stop) => opened,
        };
        match opened {
            Ok(opened) => {
                info!(stream = receive.stream, consumer = receive.consumer, "receiving");
                let work = Work {
                    context,
                    deliveries,
                    receive,
                    stop,
                    handler,
                    moves_suspects,
                    ack_wait: opened.ack_wait,
                    acks_all: opened.acks_all,
                    told: &told,
                    observed: &observed,
                };
                pump(&work, opened).await;
            }
            Err(problem) => {
                deliveries.close();
                warn!(consumer = receive.consumer, problem, "cannot receive yet, trying again");
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(REOPEN_PAUSE) => {}
        }
    }
}

/// What a loop works with.
pub(crate) struct Work<'a, H> {
    pub(crate) context: &'a Context,
    pub(crate) deliveries: &'a Deliveries,
    pub(crate) receive: &'a Receive,
    stop: &'a CancellationToken,
    handler: &'a H,
    /// Whether what was delivered too often is handed over to be tried alone.
    moves_suspects: bool,
    /// The consumer's: a message that is silent for so long is delivered again.
    pub(crate) ack_wait: Duration,
    /// Whether an acknowledgement settles everything before it.
    pub(crate) acks_all: bool,
    told: &'a Told,
    observed: &'a Observed,
}

/// A consumer that is pulled from.
struct Opened {
    messages: pull::Stream,
    ack_wait: Duration,
    acks_all: bool,
    /// The node that leads it, on a cluster: it has our pulls, and they go with it.
    leader: Option<String>,
}

async fn open(deliveries: &Deliveries, receive: &Receive, stop: &CancellationToken) -> Result<Opened, String> {
    let mut context = deliveries.context().clone();
    context.set_timeout(DESCRIBE_TIMEOUT);
    streams::ensure_consumer(&context, receive.stream, receive.consumer).await.map_err(|error| error.to_string())?;
    let mut context = deliveries.open(receive, stop).await?;
    context.set_timeout(DESCRIBE_TIMEOUT);
    let consumer: PullConsumer =
        context.get_consumer_from_stream(receive.consumer, receive.stream).await.map_err(|error| error.to_string())?;
    let ack_wait = consumer.cached_info().config.ack_wait;
    let acks_all = consumer.cached_info().config.ack_policy == AckPolicy::All;
    let leader = leader(consumer.cached_info());
    let mut builder = consumer
        .stream()
        .max_messages_per_batch(PREFETCH_MESSAGES.min(receive.max_in_flight))
        .expires(PULL_EXPIRES)
        .heartbeat(PULL_HEARTBEAT);
    if let Some(group) = receive.group {
        builder = builder.group(group);
    }
    let messages = builder.messages().await.map_err(|error| error.to_string())?;
    Ok(Opened { messages, ack_wait, acks_all, leader })
}

fn leader(info: &Info) -> Option<String> {
    info.cluster.as_ref()?.leader.clone()
}

/// The stream, and what the leader of its consumer says of that one.
pub(crate) async fn describe(context: &Context, receive: &Receive) -> Result<(Stream<()>, Info), String> {
    let described = async {
        let stream = context.get_stream_no_info(receive.stream).await.map_err(|error| error.to_string())?;
        let info = stream.consumer_info(receive.consumer).await.map_err(|error| error.to_string())?;
        Ok((stream, info))
    };
    let in_time = tokio::time::timeout(DESCRIBE_TIMEOUT, described).await;
    in_time.unwrap_or_else(|_| Err(format!("no answer within {} s", DESCRIBE_TIMEOUT.as_secs())))
}

/// Opens the consumer anew when it has another leader than `known`; nothing when that one still leads it, late as it may be.
///
/// A pull that waits with a leader that died or froze is lost, and async-nats asks again only seven seconds after it asked.
async fn open_with_another_leader(
    deliveries: &Deliveries,
    receive: &Receive,
    stop: &CancellationToken,
    known: Option<String>,
) -> Option<Opened> {
    loop {
        let problem = match describe(deliveries.context(), receive).await {
            Ok((_, info)) if leader(&info) == known => return None,
            Ok(_) => match open(deliveries, receive, stop).await {
                Ok(opened) => {
                    info!(consumer = receive.consumer, leader = opened.leader, "the consumer has another leader");
                    return Some(opened);
                }
                Err(problem) => problem,
            },
            Err(problem) => problem,
        };
        debug!(consumer = receive.consumer, problem, "nobody leads the consumer yet");
        tokio::time::sleep(REOPEN_PAUSE).await;
    }
}

async fn pump<H, F>(work: &Work<'_, H>, opened: Opened)
where
    H: Fn(Delivery) -> F + Sync,
    F: Future<Output = Settle> + Send,
{
    let Work { context, deliveries, receive, stop, .. } = *work;
    let Opened { mut messages, mut leader, .. } = opened;
    // While the consumer is silent, until it is heard again.
    let mut reopening: Option<BoxFuture<'_, Option<Opened>>> = None;
    let mut at_work = FuturesUnordered::new();
    let mut bytes_at_work = 0;
    let mut pin: Option<String> = None;
    let mut is_cut = false;
    let mut cumulative = Cumulative::new(work);
    loop {
        let has_room = at_work.len() < receive.max_in_flight && bytes_at_work < receive.max_in_flight_bytes;
        let may_acknowledge = cumulative.may_acknowledge();
        tokio::select! {
            // Settling frees places, so it goes first, and then what is settled is acknowledged, all at once; stopping is
            // looked at before new work.
            biased;
            Some(done @ Done { bytes, .. }) = at_work.next(), if !at_work.is_empty() => {
                bytes_at_work -= bytes;
                cumulative.done(&done);
            }
            () = std::future::ready(()), if may_acknowledge => cumulative.acknowledge().await,
            () = stop.cancelled() => break,
            () = cumulative.look() => {}
            Some(found) = OptionFuture::from(reopening.as_mut()) => {
                reopening = None;
                if let Some(opened) = found {
                    (messages, leader) = (opened.messages, opened.leader);
                }
            }
            next = messages.next(), if has_room => match next {
                Some(Ok(message)) => {
                    reopening = None;
                    let bytes = message.length;
                    let headers = message.headers.as_ref().filter(|_| receive.group.is_some());
                    let given = headers.and_then(|headers| headers.get_last(async_nats::header::NATS_PIN_ID));
                    if let Some(given) = given.filter(|given| pin.as_deref() != Some(given.as_str())) {
                        pin = Some(given.to_string());
                    }
                    let stamp = stamp(&message);
                    if stamp.is_some_and(|(place, _)| !cumulative.given(place, message.reply.clone())) {
                        continue;
                    }
                    bytes_at_work += bytes;
                    at_work.push(handle(work, message, stamp, bytes));
                }
                Some(Err(problem)) => {
                    debug!(consumer = receive.consumer, %problem, "pull interrupted");
                    if problem.kind() != pull::MessagesErrorKind::MissingHeartbeat {
                        break;
                    }
                    // It is said again and again as long as the consumer is silent.
                    if reopening.is_none() {
                        reopening = Some(open_with_another_leader(deliveries, receive, stop, leader.clone()).boxed());
                    }
                }
                None => {
                    // Its client is no more.
                    deliveries.close();
                    is_cut = true;
                    break;
                }
            },
        }
    }
    drop(messages);
    let drained = tokio::time::timeout(DRAIN_TIMEOUT, async {
        while let Some(done) = at_work.next().await {
            cumulative.done(&done);
        }
    })
    .await;
    cumulative.acknowledge().await;
    if drained.is_err() {
        warn!(
            consumer = receive.consumer,
            left = at_work.len(),
            "handlers did not finish in time; their messages come back"
        );
    }
    if let (Some(group), true) = (receive.group, is_cut || stop.is_cancelled() && pin.is_some()) {
        hand_over(context, receive, group, pin.as_deref()).await;
    }
}

/// A delivery that the loop is done with.
pub(crate) struct Done {
    pub(crate) sequence: u64,
    bytes: usize,
    /// Whether the message is settled; it comes again otherwise.
    pub(crate) is_settled: bool,
}

/// Gives up the pin, if we have it, so that a standby need not wait until it runs out. Best effort. Where nothing was received under it,
/// which is so when the very first message cut the connection, nobody says whose it is: to take it from another replica costs
/// that one a pull.
async fn hand_over(context: &Context, receive: &Receive, group: &str, pin: Option<&str>) {
    let handing_over = async {
        let (stream, info) = describe(context, receive).await?;
        let ours = |state: &PriorityGroupState| {
            let pinned = state.pinned_client_id.as_deref();
            state.group == group && pinned.is_some() && (pin.is_none() || pinned == pin)
        };
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

/// Where a delivery stands and when its message was stored; none when its reply does not say, and then it cannot be settled either.
fn stamp(message: &jetstream::Message) -> Option<(Place, OffsetDateTime)> {
    let info = message.info().ok()?;
    let deliveries = u64::try_from(info.delivered).unwrap_or(1);
    Some((Place { sequence: info.stream_sequence, number: info.consumer_sequence, deliveries }, info.published))
}

/// What a delivery goes through. There is one for each message at work, and it is moved once: what is rare in it is boxed.
fn handle<'a, H, F>(
    work: &'a Work<'a, H>,
    message: jetstream::Message,
    stamp: Option<(Place, OffsetDateTime)>,
    bytes: usize,
) -> impl Future<Output = Done> + 'a + use<'a, H, F>
where
    H: Fn(Delivery) -> F + Sync,
    F: Future<Output = Settle> + Send + 'a,
{
    let Work { context, receive, .. } = *work;
    let (sequence, deliveries, stored_at) = match stamp {
        Some((place, stored_at)) => (place.sequence, place.deliveries, stored_at),
        None => (0, 1, OffsetDateTime::UNIX_EPOCH),
    };
    let since = Instant::now();
    let span = process_span(receive, &message, sequence, deliveries);
    let (async_nats::Message { subject, payload, headers, .. }, acker) = message.split();
    let delivery = Delivery { subject, headers: headers.map(Arc::new), payload, sequence, deliveries, stored_at };
    let is_suspect = work.moves_suspects && deliveries > MAX_DELIVERIES_AMONG_OTHERS;
    let handled = (!is_suspect).then(|| span.in_scope(|| call(work.handler, delivery.clone())));
    let told = span.clone();
    async move {
        let mut keeping = Keeping { acker: &acker, stop: work.stop, every: work.ack_wait / KEEP_SHARE, told: since };
        let case = || Case::new(receive.stream, receive.consumer, sequence, deliveries);
        let Some(mut handled) = handled else {
            let kind = loop {
                match Box::pin(case().summon(context)).await {
                    Ok(()) => break Some(AckKind::Ack),
                    Err(problem) => {
                        debug!(consumer = receive.consumer, sequence, problem, "cannot hand a suspect over yet");
                        if Box::pin(keeping.pause(DEAD_LETTER_RETRY)).await.is_break() {
                            break Some(AckKind::Nak(None));
                        }
                    }
                }
            };
            info!(consumer = receive.consumer, sequence, deliveries, "delivered too often, to be tried alone");
            return Done { sequence, bytes, is_settled: settle(work, &acker, sequence, kind).await };
        };
        let (mut tries, mut panics) = (0, 0);
        let kind = loop {
            let outcome = match (handled, receive.in_progress_every) {
                (Ok(future), None) => {
                    match tokio::time::timeout(work.ack_wait, AssertUnwindSafe(future).catch_unwind()).await {
                        Ok(outcome) => outcome,
                        Err(_) => {
                            let seconds = work.ack_wait.as_secs_f64();
                            error!(consumer = receive.consumer, sequence, deliveries, seconds, "handler does not end");
                            break None;
                        }
                    }
                }
                (Ok(future), Some(every)) => tokio::select! {
                    outcome = AssertUnwindSafe(future).catch_unwind() => outcome,
                    never = stay_in_progress(&acker, every) => match never {},
                },
                (Err(panic), _) => Err(panic),
            };
            let settle = outcome.unwrap_or_else(|panic| {
                panics += 1;
                let what = panic_text(&*panic);
                error!(consumer = receive.consumer, sequence, deliveries, panics, panic = what, "handler panicked");
                if panics >= receive.max_panics {
                    Settle::Dead(format!("the handler panicked {panics} times, last with: {what}"))
                } else {
                    Settle::Retry(PANIC_RETRY)
                }
            });
            work.observed.settled(&settle, since);
            tell_settled(&told, &settle);
            match settle {
                Settle::Done => break Some(AckKind::Ack),
                Settle::Retry(pause) => {
                    if Box::pin(keeping.pause(pause)).await.is_break() {
                        break Some(AckKind::Nak(Some(pause)));
                    }
                    tries += 1;
                    handled = call(work.handler, delivery.clone());
                }
                Settle::Dead(reason) => {
                    let letter = DeadLetter {
                        stream: receive.stream,
                        consumer: receive.consumer,
                        subject: &delivery.subject,
                        sequence,
                        deliveries: deliveries + tries,
                        reason: &reason,
                        past: Past::of(delivery.headers.as_deref()),
                        headers: delivery.headers.as_deref(),
                        payload: delivery.payload.clone(),
                    };
                    let stored = Box::pin(letter.store(context)).await;
                    work.told.letter(receive.consumer, sequence, &reason, stored.as_ref().err());
                    // The original stays where it is until its letter is stored. Where that would hold up the others, it is tried
                    // alone until then.
                    break Some(match stored {
                        Ok(()) => AckKind::Term,
                        Err(_) if work.acks_all && Box::pin(case().summon(context)).await.is_ok() => AckKind::Ack,
                        Err(_) => AckKind::Nak(Some(DEAD_LETTER_RETRY)),
                    });
                }
            }
        };
        Done { sequence, bytes, is_settled: settle(work, &acker, sequence, kind).await }
    }
    .instrument(span)
}

/// Calls a handler, which may panic before it returns its future. That is large, and is not moved again.
pub(crate) fn call<H, F>(handler: &H, delivery: Delivery) -> std::thread::Result<Pin<Box<F>>>
where
    H: Fn(Delivery) -> F,
{
    std::panic::catch_unwind(AssertUnwindSafe(|| Box::pin(handler(delivery))))
}

/// The last that is said about a delivery; nothing, when it is not ours any more, or when one acknowledgement will say it of
/// many. Returns whether the message is settled.
async fn settle<H>(
    work: &Work<'_, H>,
    acker: &jetstream::message::Acker,
    sequence: u64,
    kind: Option<AckKind>,
) -> bool {
    let Some(kind) = kind else { return false };
    let is_settled = matches!(kind, AckKind::Ack | AckKind::Term);
    if is_settled && work.acks_all {
        return true;
    }
    if let Err(problem) = acker.ack_with(kind).await {
        debug!(consumer = work.receive.consumer, sequence, %problem, "could not settle; the message comes back");
    }
    is_settled
}

/// A message that is kept for its next try: the server hears that it is in progress, and does not count.
struct Keeping<'a> {
    acker: &'a jetstream::message::Acker,
    stop: &'a CancellationToken,
    every: Duration,
    told: Instant,
}

impl Keeping<'_> {
    /// Breaks when the loop stops and the message must be given back.
    async fn pause(&mut self, pause: Duration) -> ControlFlow<()> {
        let end = Instant::now() + pause;
        loop {
            // Also before the first pause: short ones would add up to more than the server's patience.
            if self.told.elapsed() >= self.every {
                self.told = Instant::now();
                if let Err(problem) = self.acker.ack_with(AckKind::Progress).await {
                    debug!(%problem, "could not say that a message is kept");
                }
            }
            let next = end.min(self.told + self.every);
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return ControlFlow::Break(()),
                () = tokio::time::sleep_until(next.into()) => {}
            }
            if next == end {
                return ControlFlow::Continue(());
            }
        }
    }
}

/// Tells of dead letters: the first of a window one by one, the rest by their number.
#[derive(Debug, Default)]
pub(crate) struct Told(Mutex<Window>);

#[derive(Debug, Default)]
struct Window {
    began: Option<Instant>,
    letters: u64,
    unstored: u64,
}

impl Told {
    pub(crate) fn letter(&self, consumer: &str, sequence: u64, reason: &str, problem: Option<&StoreError>) {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.is_none_or(|began| began.elapsed() >= LETTERS_LOGGED_IN) {
            let more = window.letters.saturating_sub(LETTERS_LOGGED);
            if more > 0 {
                warn!(consumer, more, unstored = window.unstored, "dead letters that were not logged one by one");
            }
            *window = Window { began: Some(Instant::now()), ..Window::default() };
        }
        window.letters += 1;
        window.unstored += u64::from(problem.is_some());
        if window.letters > LETTERS_LOGGED {
            return;
        }
        match problem {
            None => warn!(consumer, sequence, reason, "dead letter"),
            Some(problem) => {
                error!(consumer, sequence, reason, %problem, "the message stays in its stream and comes back")
            }
        }
    }
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

pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
