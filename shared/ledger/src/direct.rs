//! Reading a stream by direct gets: for whoever may look at it and change nothing, and for a few messages while there is no
//! leader that could make a consumer.
//!
//! A consumer is made inside the account of its stream and delivers wherever its maker says, so whoever may make one can
//! write into the ledger. A direct get is only ever answered to the asker's account, and one request brings a batch.
//!
//! Any replica may answer, also one that is behind. Where an answer ends, the leader is asked what comes next; only its
//! word is an end.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_nats::header::{NATS_SEQUENCE, NATS_STREAM, NATS_SUBJECT, NATS_TIME_STAMP};
use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::{HeaderMap, Message, StatusCode};
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use futures::{FutureExt as _, TryStreamExt};
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;

use crate::ReadError;
use crate::raw::{self, Raw};
use crate::receive::panic_text;
use crate::streams::ORDERS;

/// How long a server may leave one waiting for the next part of an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Messages of one answer.
const BATCH_MESSAGES: u64 = 1_000;
/// Bytes of one answer; a message may go over it.
const BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Answers that wait to be looked at. Three are in memory: one being looked at, this one, and one on its way.
const ANSWERS_AHEAD: usize = 1;
/// Where the server takes direct gets.
const API: &str = "$JS.API.DIRECT.GET";
/// What the server adds to a message that it hands out so. On a message's own headers they would mean something else.
const ADDED: [&str; 4] = ["Nats-Num-Pending", "Nats-Last-Sequence", "Nats-UpTo-Sequence", "Nats-Time-Stamp"];

/// A message as a stream holds it.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its sequence.
    pub sequence: u64,
    /// The server's clock when it stored it.
    pub stored_at: OffsetDateTime,
    /// Its subject.
    pub subject: String,
    /// Its headers, as they were published.
    pub headers: HeaderMap,
    /// Why its headers cannot be read; then they are left out.
    pub unreadable: Option<String>,
    /// Its payload.
    pub payload: Bytes,
}

/// The messages of `stream` after sequence `after` up to `upto`, those on `filter` (with wildcards) or all. Messages that
/// were deleted are left out: who needs to know of gaps looks at the sequences.
#[must_use]
pub fn read(
    context: &Context,
    stream: &str,
    filter: Option<&str>,
    after: u64,
    upto: u64,
) -> BoxStream<'static, Result<Held, ReadError>> {
    read_as(context, stream, filter, after, upto)
}

/// The same in answers of `at_once` messages: for whoever wants a few, and may go on.
#[must_use]
pub fn read_some(
    context: &Context,
    stream: &str,
    filter: &str,
    after: u64,
    upto: u64,
    at_once: u64,
) -> BoxStream<'static, Result<Held, ReadError>> {
    read_in(context, stream, Some(filter), after, upto, at_once.clamp(1, BATCH_MESSAGES))
}

/// One answer of at most some `max_bytes`: what comes after `after`, up to `upto`. Nothing is asked for ahead of it.
pub(crate) async fn pull<T: From<Answered>>(
    context: &Context,
    stream: &str,
    after: u64,
    upto: u64,
    max_bytes: usize,
) -> Result<Vec<T>, ReadError> {
    let over = after >= upto;
    let (context, messages) = (context.clone(), BATCH_MESSAGES);
    let mut reader =
        Reader { context, stream: stream.into(), filter: None, seen: after, upto, messages, max_bytes, over };
    if over {
        return Ok(Vec::new());
    }
    Ok(reader.next().await?.into_iter().map(T::from).collect())
}

/// The same in the form that the reader wants.
pub(crate) fn read_as<T: From<Answered> + Send + 'static>(
    context: &Context,
    stream: &str,
    filter: Option<&str>,
    after: u64,
    upto: u64,
) -> BoxStream<'static, Result<T, ReadError>> {
    read_in(context, stream, filter, after, upto, BATCH_MESSAGES)
}

fn read_in<T: From<Answered> + Send + 'static>(
    context: &Context,
    stream: &str,
    filter: Option<&str>,
    after: u64,
    upto: u64,
    messages: u64,
) -> BoxStream<'static, Result<T, ReadError>> {
    let reader = Reader {
        context: context.clone(),
        stream: stream.into(),
        filter: filter.map(Into::into),
        seen: after,
        upto,
        messages,
        max_bytes: BATCH_BYTES,
        over: after >= upto,
    };
    let (sender, answers) = mpsc::channel(ANSWERS_AHEAD);
    let unfinished = sender.clone();
    tokio::spawn(async move {
        // An end without a word would pass for the end of the stream.
        if let Err(panic) = AssertUnwindSafe(reader.run(sender)).catch_unwind().await {
            let what = panic_text(&*panic);
            let _ = unfinished.send(Err(unavailable(format!("reading it panicked: {what}")))).await;
        }
    });
    let answers =
        stream::unfold(answers, |mut answers| async move { answers.recv().await.map(|next| (next, answers)) });
    answers.map_ok(|answer| stream::iter(answer.into_iter().map(|message| Ok(T::from(message))))).try_flatten().boxed()
}

/// The first sequence of `stream` that was stored at `instant` or later; `None` when all are older.
///
/// # Errors
/// [`ReadError::Unavailable`].
pub async fn first_since(context: &Context, stream: &str, instant: OffsetDateTime) -> Result<Option<u64>, ReadError> {
    let start_time = instant.format(&Rfc3339).map_err(|problem| ReadError::Unavailable(problem.to_string()))?;
    let first = ask(context, stream, &json!({ "start_time": start_time, "batch": 1 })).await?;
    Ok(first.first().map(|held| held.sequence))
}

/// A message as the server hands it out, its own headers among those of the message.
pub(crate) struct Answered {
    pub(crate) sequence: u64,
    pub(crate) stored_at: OffsetDateTime,
    pub(crate) subject: String,
    pub(crate) stamps: HeaderMap,
    pub(crate) unreadable: Option<String>,
    pub(crate) payload: Bytes,
}

impl From<Raw> for Answered {
    fn from(Raw { message, unreadable }: Raw) -> Self {
        let StreamMessage { subject, sequence, headers, payload, time, .. } = message;
        Self { sequence, stored_at: time, subject: subject.to_string(), stamps: headers, unreadable, payload }
    }
}

impl From<Answered> for Held {
    fn from(Answered { sequence, stored_at, subject, stamps, unreadable, payload }: Answered) -> Self {
        let mut headers = HeaderMap::new();
        for (name, values) in stamps.iter() {
            let added = [NATS_SEQUENCE, NATS_SUBJECT, NATS_STREAM].contains(name) || ADDED.contains(&name.as_ref());
            if !added {
                for value in values {
                    headers.append(name.clone(), value.clone());
                }
            }
        }
        Self { sequence, stored_at, subject, headers, unreadable, payload }
    }
}

struct Reader {
    context: Context,
    stream: Arc<str>,
    filter: Option<Arc<str>>,
    /// Nothing at or below it is wanted any more.
    seen: u64,
    upto: u64,
    /// Messages of one answer.
    messages: u64,
    /// Bytes of one answer; a message may go over it.
    max_bytes: usize,
    over: bool,
}

impl Reader {
    /// Hands out answers, and asks for the next one while the last is looked at, until there are none or nobody wants them.
    async fn run(mut self, answers: mpsc::Sender<Result<Vec<Answered>, ReadError>>) {
        while !self.over {
            let answer = self.next().await;
            self.over |= answer.is_err();
            if answers.send(answer).await.is_err() {
                return;
            }
        }
    }

    /// The messages of one answer that are wanted.
    async fn next(&mut self) -> Result<Vec<Answered>, ReadError> {
        let batch = (self.upto - self.seen).min(self.messages);
        let mut request = json!({ "seq": self.seen + 1, "batch": batch, "max_bytes": self.max_bytes });
        if let Some(filter) = &self.filter {
            request["next_by_subj"] = json!(&**filter);
        }
        // What others publish may have headers over which the client library cuts its connection, or panics.
        let mut answer = if &*self.stream == ORDERS {
            self.by_the_leader(batch).await.map_err(unavailable)?
        } else {
            ask(&self.context, &self.stream, &request).await?
        };
        if answer.is_empty() {
            answer.extend(self.ask_the_leader().await?);
        }
        let Some(last) = answer.last().map(|held| held.sequence) else {
            self.over = true;
            return Ok(answer);
        };
        // An answer that was asked for twice, by a lost connection, repeats.
        let wanted = self.seen + 1..=self.upto;
        answer.retain(|held| wanted.contains(&held.sequence));
        self.seen = self.seen.max(last);
        self.over = self.seen >= self.upto;
        Ok(answer)
    }

    /// What comes next by the leader's word.
    async fn ask_the_leader(&self) -> Result<Option<Answered>, ReadError> {
        let filter = self.filter.as_deref().unwrap_or(">");
        let next = raw::next(&self.context, &self.stream, filter, self.seen + 1).await;
        Ok(next.map_err(unavailable)?.map(Answered::from))
    }

    /// So many messages by the leader's word, whatever their headers are.
    async fn by_the_leader(&self, batch: u64) -> Result<Vec<Answered>, String> {
        let filter = self.filter.as_deref().unwrap_or(">");
        let mut messages = raw::read(&self.context, &self.stream, filter, self.seen, self.upto);
        let (mut answer, mut bytes) = (Vec::new(), 0);
        while (answer.len() as u64) < batch && bytes < self.max_bytes {
            let Some(found) = messages.try_next().await? else { break };
            bytes += found.message.payload.len();
            answer.push(found.into());
        }
        Ok(answer)
    }
}

fn unavailable(problem: impl std::fmt::Display) -> ReadError {
    ReadError::Unavailable(problem.to_string())
}

/// Asks once and collects the whole answer.
async fn ask(context: &Context, stream: &str, request: &serde_json::Value) -> Result<Vec<Answered>, ReadError> {
    let mut held = Vec::new();
    let client = context.client();
    let inbox = client.new_inbox();
    let mut answers = client.subscribe(inbox.clone()).await.map_err(unavailable)?;
    let body = Bytes::from(request.to_string());
    client.publish_with_reply(format!("{API}.{stream}"), inbox, body).await.map_err(unavailable)?;
    loop {
        let answer = match tokio::time::timeout(ANSWER_TIMEOUT, answers.next()).await {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(unavailable("the connection was closed")),
            Err(_) => {
                return Err(unavailable(format!("{stream} does not answer within {} s", ANSWER_TIMEOUT.as_secs())));
            }
        };
        match answer.status {
            None | Some(StatusCode::OK) => held.push(parse(answer)?),
            // The end of the batch, or nothing there from this sequence on.
            Some(status) if status.as_u16() == 204 || status == StatusCode::NOT_FOUND => return Ok(held),
            Some(StatusCode::NO_RESPONDERS) => return Err(unavailable(format!("no server answers for {stream}"))),
            Some(status) => {
                let why = answer.description.unwrap_or_default();
                return Err(unavailable(format!("{stream} cannot be read ({status}): {why}")));
            }
        }
    }
}

fn parse(answer: Message) -> Result<Answered, ReadError> {
    let stamps = answer.headers.unwrap_or_default();
    // The server's own come last, after those of the message.
    let stamp = |name: async_nats::HeaderName| {
        let value = stamps.get_last(name.clone());
        value.map(|value| value.as_str().to_owned()).ok_or_else(|| unavailable(format!("an answer has no {name}")))
    };
    let sequence = stamp(NATS_SEQUENCE)?.parse().map_err(unavailable)?;
    let stored_at = OffsetDateTime::parse(&stamp(NATS_TIME_STAMP)?, &Rfc3339).map_err(unavailable)?;
    let subject = stamp(NATS_SUBJECT)?;
    Ok(Answered { sequence, stored_at, subject, stamps, unreadable: None, payload: answer.payload })
}
