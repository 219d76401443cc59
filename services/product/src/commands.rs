//! Commands about products among the replicas: how each of them reaches the one that is writing, by NATS request.
//!
//! While orders arrive, one replica writes. A command that another replica commits would conflict with every batch of
//! the writer's, so each replica hands its commands to the writer ([`Writer`]), which decides them between its orders.
//!
//! One JSON request, one JSON reply with the outcome. Not a way in: an admin's only door is HTTP, where a token says who
//! it is (ADR 0039). Here the request itself says who, which is believed because the server lets nobody but the product
//! service publish on the subject. A command carries its own id, so that asking again after a lost reply does not act
//! twice (within the stream's de-duplication window, and beyond it when it has a fingerprint).

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::{Client, HeaderMap, Message, Request as NatsRequest, SubscribeError, Subscriber};
use futures::{FutureExt, StreamExt};
use lomash_contract::{ContentType, Envelope, LedgerEvent, codec, objects, parse_stored};
use lomash_ledger::{Carried, header};
use lomash_platform::trace::TraceContext;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, debug};

use crate::committer::{Answer, CommandError, Committed, Committer};
use crate::inventory::{Command, Outcome, ProductCommand, Rejection};
use crate::observed;

/// The subject on which the replica that is writing takes the commands of the others.
pub const WRITER_SUBJECT: &str = "lomash.commands.product.writer";

/// How long after its last order a replica counts as the one that is writing.
pub const WRITING_FOR: Duration = Duration::from_secs(5);

/// How long a replica waits for the writer's answer before it commits a command itself. Two batches of the largest size
/// take less; what the writer does after all is recognised by the command's id.
pub const WRITER_TIMEOUT: Duration = Duration::from_millis(1_500);

/// The queue group of the replicas: should two think that they are writing, one of them answers.
pub const QUEUE: &str = "product-service";

/// How long the rest of a subscription's messages may take to arrive after its end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Commands worked on at once; further ones wait in the subscription.
pub const MAX_IN_FLIGHT: usize = lomash_ledger::MAX_BATCH_MESSAGES;

/// Largest request. A product's details take some hundred bytes.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024;

/// Longest reason, in characters; it is stored in a header of each event.
pub use lomash_ledger::MAX_REASON_CHARS;

/// What can be asked.
// The tag is what replicas of an earlier version write and read: they run side by side while they are replaced.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Request {
    /// Carry this out.
    Command {
        /// What.
        command: ProductCommand,
        /// Why, for the record.
        #[serde(default)]
        reason: Option<String>,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Reply {
    /// Done and stored.
    Committed {
        /// What it came to.
        #[serde(flatten)]
        outcome: Outcome,
        /// The sequence that shows it.
        sequence: u64,
        /// What it stored, if that is known.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        events: Vec<StoredEvent>,
    },
    /// Not acceptable.
    Rejected {
        /// Why, for programs.
        rejection: Rejection,
        /// Why, for people.
        detail: String,
    },
    /// The request itself is bad.
    BadRequest {
        /// Why.
        detail: String,
    },
    /// Not now; ask again with the same command id.
    Unavailable {
        /// Why.
        detail: String,
    },
}

/// An event as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredEvent {
    subject: String,
    envelope: Value,
}

impl StoredEvent {
    fn new(envelope: &Envelope<LedgerEvent>) -> Self {
        let json = codec::encode(ContentType::Json, envelope);
        let value = serde_json::from_slice(&json).unwrap_or_default();
        Self { subject: envelope.payload.subject().to_string(), envelope: value }
    }

    fn parse(&self) -> Option<Envelope<LedgerEvent>> {
        let message_id = self.envelope.get("eventId")?.as_str()?;
        parse_stored(&self.subject, Some(message_id), self.envelope.to_string().as_bytes()).ok()
    }
}

impl From<Answer> for Reply {
    fn from(answer: Answer) -> Self {
        match answer {
            Ok(Committed { outcome, sequence, events }) => {
                Self::Committed { outcome, sequence, events: events.iter().map(StoredEvent::new).collect() }
            }
            Err(CommandError::Rejected(rejection)) => {
                let detail = rejection.to_string();
                Self::Rejected { rejection, detail }
            }
            Err(
                problem @ (CommandError::TooLarge { .. }
                | CommandError::Unstorable { .. }
                | CommandError::IdentityTaken { .. }),
            ) => Self::BadRequest { detail: problem.to_string() },
            Err(problem @ (CommandError::Stopping | CommandError::Undecided)) => {
                Self::Unavailable { detail: problem.to_string() }
            }
        }
    }
}

// ── Who is writing ──────────────────────────────────────────────────────────────────────────────────────────────

/// Whether this replica is the one that orders are delivered to.
#[derive(Clone, Debug)]
pub struct Writing(Arc<LastOrder>);

#[derive(Debug)]
struct LastOrder {
    epoch: Instant,
    /// Milliseconds from the epoch to the last order, and one; 0 before the first.
    at_ms: AtomicU64,
    begun: Notify,
}

impl Default for Writing {
    fn default() -> Self {
        Self(Arc::new(LastOrder { epoch: Instant::now(), at_ms: AtomicU64::new(0), begun: Notify::new() }))
    }
}

impl Writing {
    /// Notes that an order was delivered.
    pub fn note_order(&self) {
        let now = self.now_ms();
        if is_over(self.0.at_ms.swap(now, Ordering::Relaxed), now) {
            self.0.begun.notify_one();
        }
    }

    /// Whether orders were delivered within [`WRITING_FOR`].
    #[must_use]
    pub fn is_on(&self) -> bool {
        !is_over(self.0.at_ms.load(Ordering::Relaxed), self.now_ms())
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.epoch.elapsed().as_millis()).unwrap_or(u64::MAX - 1) + 1
    }

    async fn begins(&self) {
        while !self.is_on() {
            self.0.begun.notified().await;
        }
    }
}

fn is_over(last_order_ms: u64, now_ms: u64) -> bool {
    last_order_ms == 0 || u128::from(now_ms.saturating_sub(last_order_ms)) > WRITING_FOR.as_millis()
}

/// Where a replica brings the commands that it takes in.
#[derive(Clone, Debug)]
pub struct Writer {
    client: Client,
    committer: Committer,
    writing: Writing,
}

impl Writer {
    /// A way to the writer from the replica with this committer.
    #[must_use]
    pub const fn new(client: Client, committer: Committer, writing: Writing) -> Self {
        Self { client, committer, writing }
    }

    /// This replica's own committer.
    #[must_use]
    pub const fn committer(&self) -> &Committer {
        &self.committer
    }

    /// Has a command carried out by the replica that is writing, or by this one when that is the one, when there is none,
    /// and when it does not answer.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn submit(&self, mut command: ProductCommand, carried: Option<Arc<Carried>>) -> Answer {
        let carried = observed::caused_here(carried);
        let asked =
            if self.writing.is_on() { Asked::Nobody } else { self.ask_the_writer(&command, carried.as_deref()).await };
        if let Asked::Answered(answer) = asked {
            return answer;
        }
        // What it comes to is put on record here, also when it changes nothing: so the writer knows it when it gets to the
        // command after all. What is not on record it would decide by the state of then.
        command.is_second_try = matches!(asked, Asked::Silent);
        let is_on_record = command.is_on_record();
        let answer = self.committer.submit(Command::Product(command), carried).await;
        match (asked, answer) {
            (Asked::Silent, Ok(Committed { outcome: Outcome::Unchanged, .. })) if !is_on_record => {
                Err(CommandError::Undecided)
            }
            (Asked::Silent, Err(CommandError::Rejected(rejection))) if !rejection.is_final(is_on_record) => {
                Err(CommandError::Undecided)
            }
            (_, answer) => answer,
        }
    }

    async fn ask_the_writer(&self, command: &ProductCommand, carried: Option<&Carried>) -> Asked {
        let mut headers = HeaderMap::new();
        let trace = carried.map(|carried| [carried.traceparent(), carried.tracestate()]);
        for (name, value) in [header::TRACEPARENT, header::TRACESTATE].into_iter().zip(trace.into_iter().flatten()) {
            if let Some(value) = value {
                headers.insert(name, value);
            }
        }
        let reason = carried.and_then(|carried| carried.reason.clone());
        let Ok(body) = serde_json::to_vec(&Request::Command { command: command.clone(), reason }) else {
            return Asked::Nobody;
        };
        let request = NatsRequest::new().payload(body.into()).headers(headers).timeout(Some(WRITER_TIMEOUT));
        let reply = match self.client.send_request(WRITER_SUBJECT, request).await {
            Ok(reply) => reply,
            Err(problem) if problem.kind() == RequestErrorKind::NoResponders => {
                debug!("no other replica is writing; this one commits");
                return Asked::Nobody;
            }
            Err(problem) => {
                debug!(%problem, "the replica that is writing does not answer; this one commits");
                return Asked::Silent;
            }
        };
        match serde_json::from_slice(&reply.payload) {
            Ok(Reply::Committed { outcome, sequence, events }) => {
                let events = events.iter().filter_map(StoredEvent::parse).collect();
                Asked::Answered(Ok(Committed { outcome, sequence, events }))
            }
            Ok(Reply::Rejected { rejection, .. }) => Asked::Answered(Err(CommandError::Rejected(rejection))),
            // It has let go of the command; and what cannot be read says nothing.
            Ok(Reply::BadRequest { .. } | Reply::Unavailable { .. }) => Asked::Nobody,
            Err(_) => Asked::Silent,
        }
    }
}

/// What came of asking the writer.
enum Asked {
    /// It settled the command.
    Answered(Answer),
    /// Nobody has the command.
    Nobody,
    /// The writer may have the command and did not say.
    Silent,
}

// ── Serving ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// Answers the commands of other replicas whenever this one is writing, until `stop`, and then finishes those at work.
///
/// # Errors
/// When the subject cannot be subscribed.
pub async fn serve(client: Client, writer: Writer, stop: CancellationToken) -> Result<(), SubscribeError> {
    let Writer { committer, writing, .. } = writer;
    while !stop.is_cancelled() {
        tokio::select! {
            () = stop.cancelled() => break,
            () = writing.begins() => {}
        }
        let requests = client.queue_subscribe(WRITER_SUBJECT, QUEUE.to_owned()).await?;
        let over = async {
            while writing.is_on() {
                tokio::time::sleep(WRITING_FOR / 5).await;
            }
        };
        let ends = async {
            tokio::select! {
                () = stop.cancelled() => {}
                () = over => {}
            }
        };
        answer_all(&client, requests, &committer, ends).await;
    }
    Ok(())
}

/// Answers what comes in until `ends`, and then what has come in. Ends in bounded time: the committer answers everything
/// when it is stopped.
async fn answer_all(client: &Client, mut requests: Subscriber, committer: &Committer, ends: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let at_work = TaskTracker::new();
    let mut ends = std::pin::pin!(ends.fuse());
    let mut drained = std::pin::pin!(futures::future::Fuse::terminated());
    loop {
        let message = tokio::select! {
            () = &mut ends => {
                if requests.drain().await.is_err() {
                    break;
                }
                drained.set(tokio::time::sleep(DRAIN_TIMEOUT).fuse());
                continue;
            }
            () = &mut drained => break,
            message = requests.next() => match message {
                Some(message) => message,
                None => break,
            },
        };
        let Ok(place) = places.clone().acquire_owned().await else {
            break;
        };
        let (client, committer) = (client.clone(), committer.clone());
        at_work.spawn(async move {
            answer(&client, &committer, message).await;
            drop(place);
        });
    }
    at_work.close();
    at_work.wait().await;
}

async fn answer(client: &Client, committer: &Committer, message: Message) {
    let Some(inbox) = message.reply.clone() else {
        debug!(subject = %message.subject, "a command without a reply subject was ignored");
        return;
    };
    let reply = match parse(&message) {
        Err(detail) => Reply::BadRequest { detail },
        Ok(Request::Command { command, reason }) => {
            let text = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str());
            let (traceparent, tracestate) = (text(header::TRACEPARENT), text(header::TRACESTATE));
            let span = observed::request_span(&message.subject, traceparent, tracestate);
            let carried = Carried { trace: TraceContext::parse(traceparent, tracestate), reason, command: None };
            let carried = (carried != Carried::default()).then(|| Arc::new(carried));
            committer.submit(Command::Product(command), carried).instrument(span).await.into()
        }
    };
    let body = serde_json::to_vec(&reply).expect("a reply is always JSON");
    if let Err(problem) = client.publish(inbox, body.into()).await {
        debug!(%problem, "the answer to a command could not be sent");
    }
}

fn parse(message: &Message) -> Result<Request, String> {
    if message.payload.len() > MAX_REQUEST_BYTES {
        return Err(format!("the request has {} bytes, at most {MAX_REQUEST_BYTES} are read", message.payload.len()));
    }
    let request: Request =
        objects::from_json(&message.payload).map_err(|problem| format!("not a command: {problem}"))?;
    let Request::Command { reason, .. } = &request;
    match reason {
        Some(reason) if reason.chars().count() > MAX_REASON_CHARS => {
            Err(format!("the reason is longer than {MAX_REASON_CHARS} characters"))
        }
        _ => Ok(request),
    }
}
