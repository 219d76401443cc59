//! Suspects: messages that were delivered again and again and never settled. Each is tried alone, and becomes a dead letter
//! only when that was not survived either.
//!
//! A message whose handling ends the process takes its neighbours down with it: whatever was in flight is delivered again,
//! and the server counts that for all alike. So a count convicts nobody. A suspect goes into the stream `ADVISORIES`, put
//! there by the loop that met it ([`Case::summon`], confirmed before the original is acknowledged) or by the server, whose
//! advisory of a consumer's `max_deliver` is caught there. The consumer of the same name in that stream lets one suspect be
//! at work at a time over all replicas. An innocent one is handled as ever; a culprit ends the process once more, alone, and
//! the count of its *case* says so.
//!
//! That servers are down is no evidence: a case that could not be heard is adjourned, and its count begins anew.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::Info;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::DirectGetErrorKind;
use async_nats::jetstream::{AckKind, Context};
use futures::{FutureExt, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::dead_letter::{DeadLetter, Past};
use crate::deliveries::Deliveries;
use crate::raw::{self, Raw};
use crate::receive::{Delivery, PANIC_RETRY, Receive, Settle, Told, call, describe, panic_text};
use crate::streams;
pub use crate::streams::ADVISORIES as STREAM;

/// Trials after which a message that ended each of them without an answer is dead. Two: one may be a coincidence, such as an
/// operator's `kill` in that very moment.
pub const MAX_TRIALS: u64 = 2;

/// How long a trial may take. A handler that is always fast (it never says that it is in progress) has failed by then; of
/// one that may wait for a server, the case is adjourned.
pub const TRIAL_PATIENCE: Duration = Duration::from_secs(10);

/// How often a trial says that it is in progress: a third of the `ack_wait` of the consumers in `ADVISORIES`.
const IN_PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Pause before a case comes back that could not be heard, or whose letter could not be stored: others go first meanwhile.
pub const ADJOURNMENT: Duration = Duration::from_millis(250);

/// How often it is looked whether the connection was lost, after which what cannot be delivered is looked for.
const UNDELIVERABLE_LOOK: Duration = Duration::from_millis(250);

/// How long the stream may take to confirm a case.
pub const SUMMON_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a message is looked for that a replica of its stream does not have; it may be behind.
const BEHIND_PATIENCE: Duration = Duration::from_secs(2);

/// The subject of the cases of a consumer.
#[must_use]
pub fn subject(stream: &str, consumer: &str) -> String {
    format!("lomash.suspects.{stream}.{consumer}")
}

/// What suspects of `receive` are received by.
pub(crate) const fn receive(receive: &Receive) -> Receive {
    Receive {
        stream: STREAM,
        consumer: receive.consumer,
        group: None,
        max_in_flight: 1,
        max_in_flight_bytes: 1,
        max_panics: receive.max_panics,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

/// Which message is suspect. The fields that the server's advisory has are named as in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    /// The stream of the message.
    pub stream: String,
    /// The consumer that did not settle it.
    pub consumer: String,
    /// Its sequence in the stream.
    pub stream_seq: u64,
    /// How often it was delivered.
    pub deliveries: u64,
    /// Its former deaths, when an operator brought it back.
    #[serde(flatten)]
    pub past: Past,
    /// Keeps a case from being stored twice.
    #[serde(skip)]
    message_id: String,
}

impl Case {
    /// The case of a message that was delivered too often.
    #[must_use]
    pub fn new(stream: &str, consumer: &str, stream_seq: u64, deliveries: u64) -> Self {
        Self {
            stream: stream.to_owned(),
            consumer: consumer.to_owned(),
            stream_seq,
            deliveries,
            past: Past::default(),
            message_id: format!("suspect.{stream}.{consumer}.{stream_seq}"),
        }
    }

    /// The case of a message whose letter an operator sends back to its consumer.
    #[must_use]
    pub fn redriven(self, past: Past, message_id: String) -> Self {
        Self { past, message_id, ..self }
    }

    /// Stores the case and waits until the stream has it.
    ///
    /// # Errors
    /// Why the stream did not confirm it; storing it again is harmless.
    pub async fn summon(&self, context: &Context) -> Result<(), String> {
        let mut headers = HeaderMap::new();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, self.message_id.as_str());
        let payload = serde_json::to_vec(self).map_err(|problem| problem.to_string())?;
        let summoning = async {
            let subject = subject(&self.stream, &self.consumer);
            let ack =
                context.publish_with_headers(subject, headers, payload.into()).await.map_err(|e| e.to_string())?;
            ack.await.map_err(|e| e.to_string())
        };
        match tokio::time::timeout(SUMMON_TIMEOUT, summoning).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(problem)) => Err(format!("{STREAM} did not take it: {problem}")),
            Err(_) => Err(format!("{STREAM} did not answer within {} s", SUMMON_TIMEOUT.as_secs())),
        }
    }
}

/// Tries the suspects of one consumer with its own handler.
pub(crate) struct Court<'a, H> {
    pub(crate) context: &'a Context,
    pub(crate) receive: &'a Receive,
    pub(crate) handler: &'a H,
    pub(crate) told: Told,
}

/// How a hearing ended.
enum Verdict {
    /// Handled like any other.
    Innocent,
    /// It cannot be handled; the reason.
    Guilty(String),
    /// Nothing was found out.
    Unheard(Duration),
}

impl<H, F> Court<'_, H>
where
    H: Fn(Delivery) -> F + Sync,
    F: Future<Output = Settle> + Send,
{
    /// Hears one case.
    pub(crate) async fn hear(&self, advisory: Delivery) -> Settle {
        let case: Case = match serde_json::from_slice(&advisory.payload) {
            Ok(case) => case,
            Err(problem) => return Settle::Dead(format!("it does not say which message is suspect: {problem}")),
        };
        if case.stream != self.receive.stream || case.consumer != self.receive.consumer {
            return Settle::Dead(format!("it is about {}/{} and not about this consumer", case.stream, case.consumer));
        }
        let (original, unreadable) = match self.original(case.stream_seq).await {
            Ok(Some(Raw { message, unreadable })) => (Some(message), unreadable),
            Ok(None) => (None, None),
            Err(problem) => {
                warn!(consumer = case.consumer, sequence = case.stream_seq, problem, "cannot read a suspect yet");
                return Settle::Retry(PANIC_RETRY);
            }
        };
        let trials = advisory.deliveries.saturating_sub(1);
        let times = case.deliveries;
        let verdict = match (&original, unreadable) {
            (Some(_), Some(why)) => Verdict::Guilty(format!(
                "it cannot be delivered, for its headers cannot be read: {why}; they are left out of this letter"
            )),
            (None, _) => Verdict::Guilty(format!(
                "it was delivered {times} times and never settled; its payload is lost, for {} does not have it any more",
                case.stream
            )),
            // Each of its deliveries was a trial: nothing else was at work.
            (Some(_), None) if self.receive.max_in_flight == 1 => Verdict::Guilty(format!(
                "it was delivered {times} times and never settled: handling it did not end, or ended the process"
            )),
            (Some(_), None) if trials >= MAX_TRIALS => Verdict::Guilty(format!(
                "handling it ends the process: it was delivered {times} times, then tried {trials} times alone, and never \
                 settled"
            )),
            (Some(original), None) => self.try_alone(original, times + trials + 1).await,
        };
        match verdict {
            Verdict::Innocent => {
                info!(consumer = case.consumer, sequence = case.stream_seq, "a suspect was handled alone");
                Settle::Done
            }
            Verdict::Guilty(reason) => {
                let letter = self.letter(&case, original.as_ref(), times + trials, &reason);
                let stored = letter.store(self.context).await;
                self.told.letter(&case.consumer, case.stream_seq, &reason, stored.as_ref().err());
                match stored {
                    Ok(()) => self.clear(case.stream_seq).await,
                    Err(_) => self.adjourn(case, advisory.sequence, ADJOURNMENT).await,
                }
            }
            Verdict::Unheard(pause) => self.adjourn(case, advisory.sequence, pause).await,
        }
    }

    async fn try_alone(&self, original: &StreamMessage, deliveries: u64) -> Verdict {
        let mut panics = 0;
        loop {
            let handled = call(self.handler, delivery(original, deliveries));
            let outcome = match handled {
                Ok(future) => tokio::time::timeout(TRIAL_PATIENCE, AssertUnwindSafe(future).catch_unwind()).await,
                Err(panic) => Ok(Err(panic)),
            };
            match outcome {
                Ok(Ok(Settle::Done)) => return Verdict::Innocent,
                Ok(Ok(Settle::Dead(reason))) => return Verdict::Guilty(reason),
                Ok(Ok(Settle::Retry(pause))) => return Verdict::Unheard(pause),
                Ok(Err(panic)) => {
                    panics += 1;
                    let what = panic_text(&*panic);
                    let (consumer, sequence) = (self.receive.consumer, original.sequence);
                    error!(consumer, sequence, panics, panic = what, "handler panicked");
                    if panics >= self.receive.max_panics {
                        return Verdict::Guilty(format!("the handler panicked {panics} times, last with: {what}"));
                    }
                    tokio::time::sleep(PANIC_RETRY).await;
                }
                Err(_) if self.receive.in_progress_every.is_some() => return Verdict::Unheard(ADJOURNMENT),
                Err(_) => {
                    let seconds = TRIAL_PATIENCE.as_secs();
                    return Verdict::Guilty(format!(
                        "handling it does not end: tried alone, it took more than {seconds} s"
                    ));
                }
            }
        }
    }

    /// Puts the case behind the others, with a count of its own.
    async fn adjourn(&self, case: Case, sequence: u64, pause: Duration) -> Settle {
        tokio::time::sleep(pause).await;
        let again = Case { message_id: format!("adjourned.{sequence}"), ..case };
        match again.summon(self.context).await {
            Ok(()) => Settle::Done,
            Err(problem) => {
                warn!(consumer = again.consumer, sequence = again.stream_seq, problem, "cannot adjourn yet");
                Settle::Retry(PANIC_RETRY)
            }
        }
    }

    /// A message that was given up stays in a work queue for ever; its letter has taken its place.
    async fn clear(&self, sequence: u64) -> Settle {
        if streams::is_work_queue(self.receive.stream)
            && let Ok(stream) = self.context.get_stream_no_info(self.receive.stream).await
            && let Err(problem) = stream.delete_message(sequence).await
        {
            info!(stream = self.receive.stream, sequence, %problem, "a message that has its letter stays in its queue");
        }
        Settle::Done
    }

    /// The message, or none when its stream does not have it any more. What others publish is read from the leader, whatever its
    /// headers are; the ledger by direct get, which services may use; a replica that
    /// does not have it is asked again, for it may be behind.
    async fn original(&self, sequence: u64) -> Result<Option<Raw>, String> {
        if self.receive.stream != streams::INVENTORY {
            return raw::get(self.context, self.receive.stream, sequence).await;
        }
        let stream =
            self.context.get_stream_no_info(self.receive.stream).await.map_err(|problem| problem.to_string())?;
        for pause in [BEHIND_PATIENCE, Duration::ZERO] {
            match stream.direct_get(sequence).await {
                Ok(message) => return Ok(Some(Raw { message, unreadable: None })),
                Err(problem) if problem.kind() == DirectGetErrorKind::NotFound => tokio::time::sleep(pause).await,
                Err(problem) => return Err(problem.to_string()),
            }
        }
        Ok(None)
    }

    fn letter<'l>(
        &'l self,
        case: &'l Case,
        original: Option<&'l StreamMessage>,
        deliveries: u64,
        reason: &'l str,
    ) -> DeadLetter<'l> {
        let headers = original.map(|original| &original.headers);
        let past = if case.past.redrives > 0 { case.past.clone() } else { Past::of(headers) };
        DeadLetter {
            stream: self.receive.stream,
            consumer: self.receive.consumer,
            subject: original.map_or("", |original| original.subject.as_str()),
            sequence: case.stream_seq,
            deliveries,
            reason,
            past,
            headers,
            payload: original.map(|original| original.payload.clone()).unwrap_or_default(),
        }
    }
}

/// Summons messages that cannot be delivered, until `stop`: over headers that it cannot read the client library cuts its connection, so
/// nobody is ever given them. Looked for when the connection was lost, for that is all that shows.
pub(crate) async fn find_undeliverable(deliveries: &Deliveries, receive: &Receive, stop: &CancellationToken) {
    let mut seen = (0, 0);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(UNDELIVERABLE_LOOK) => {}
        }
        let now = deliveries.losses();
        if now == seen {
            continue;
        }
        match summon_undeliverable(deliveries, receive).await {
            Ok(()) => seen = now,
            Err(problem) => {
                debug!(consumer = receive.consumer, problem, "cannot look yet for what cannot be delivered")
            }
        }
    }
}

async fn summon_undeliverable(deliveries: &Deliveries, receive: &Receive) -> Result<(), String> {
    let context = deliveries.context();
    let (_, info) = describe(context, receive).await?;
    let Looked { readable, unreadable } = look(deliveries, receive, &info, info.delivered.stream_sequence).await?;
    let Some(&first) = unreadable.first() else { return Ok(()) };
    // An acknowledgement may cover everything before it, so only what follows on the last one that is settled is settled.
    let first_readable = readable.first().copied().unwrap_or(u64::MAX);
    for (sequence, delivery) in unreadable.iter().zip(info.ack_floor.consumer_sequence + 1..) {
        if *sequence < first_readable {
            settle_undelivered(context, receive, AckKind::Ack, *sequence, delivery).await?;
        }
    }
    // What was delivered behind them was lost with the connection, and would come back after its `ack_wait`, together with
    // those that could not be settled.
    for sequence in readable.iter().filter(|sequence| **sequence > first) {
        settle_undelivered(context, receive, AckKind::Nak(None), *sequence, info.delivered.consumer_sequence).await?;
    }
    context.client().flush().await.map_err(|problem| problem.to_string())
}

/// What was delivered and is not settled.
pub(crate) struct Looked {
    /// What can be delivered again.
    pub(crate) readable: Vec<u64>,
    /// What cannot; it was summoned.
    pub(crate) unreadable: Vec<u64>,
}

/// Looks at what was delivered up to `upto` and is not settled, and summons what cannot be delivered. Asks the leader, which tells of
/// every message: an answer in the usual form has the headers that cut the connection.
pub(crate) async fn look(deliveries: &Deliveries, receive: &Receive, info: &Info, upto: u64) -> Result<Looked, String> {
    let (context, floor) = (deliveries.context(), info.ack_floor.stream_sequence);
    let filter = Some(info.config.filter_subject.as_str()).filter(|filter| !filter.is_empty()).unwrap_or(">");
    let mut messages = raw::read(context, receive.stream, filter, floor, upto);
    let mut looked = Looked { readable: Vec::new(), unreadable: Vec::new() };
    while let Some(Raw { message, unreadable }) = messages.try_next().await? {
        let Some(why) = unreadable else {
            looked.readable.push(message.sequence);
            continue;
        };
        let sequence = message.sequence;
        if !deliveries.is_handed_over(sequence) {
            info!(consumer = receive.consumer, sequence, why, "a message that cannot be delivered");
            Case::new(receive.stream, receive.consumer, sequence, 1).summon(context).await?;
            deliveries.note_handed_over(sequence, floor);
        }
        looked.unreadable.push(sequence);
    }
    Ok(looked)
}

/// Says what becomes of a message that was never received and so has no reply subject. While one that cannot be delivered is
/// delivered again and again, what is delivered behind it is lost with the connection each time.
async fn settle_undelivered(
    context: &Context,
    receive: &Receive,
    kind: AckKind,
    sequence: u64,
    delivery: u64,
) -> Result<(), String> {
    let Receive { stream, consumer, .. } = receive;
    // Of its fields the server looks at the two sequences: that in the stream, and that of the delivery, which must be later
    // than what is settled.
    let reply = format!("$JS.ACK.{stream}.{consumer}.1.{sequence}.{delivery}.0.0");
    context.client().publish(reply, kind.into()).await.map_err(|problem| problem.to_string())
}

fn delivery(original: &StreamMessage, deliveries: u64) -> Delivery {
    Delivery {
        subject: original.subject.clone(),
        headers: Some(Arc::new(original.headers.clone())),
        payload: original.payload.clone(),
        sequence: original.sequence,
        deliveries,
        stored_at: original.time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_s_advisory_is_a_case() {
        let advisory = r#"{"type":"io.nats.jetstream.advisory.v1.max_deliver","id":"x","timestamp":"2026-01-31T09:30:00Z",
            "stream":"ORDERS","consumer":"product-orders","stream_seq":7,"deliveries":10}"#;
        let case: Case = serde_json::from_str(advisory).expect("a case");
        assert_eq!((case.stream.as_str(), case.stream_seq, case.deliveries), ("ORDERS", 7, 10));
        assert_eq!(case.past, Past::default());
    }

    #[test]
    fn a_case_comes_back_as_it_was_but_for_its_message_id() {
        let past = Past { redrives: 2, history: vec!["once".to_owned()] };
        let case = Case::new("INVENTORY", "analytics", 9, 3).redriven(past, "redrive.1".to_owned());
        let json = serde_json::to_vec(&case).expect("JSON");
        let read: Case = serde_json::from_slice(&json).expect("a case");
        assert_eq!(read, Case { message_id: String::new(), ..case });
    }
}
