//! What operators do with dead letters: look through them, redrive them, discard them.
//!
//! A letter is removed only after the stream confirmed what takes its place. Redriving the same one twice is harmless: the
//! second copy has the same message id, and beyond the window of de-duplication whoever handles it knows it.
//!
//! A message is brought back in one of two ways. What came from outside (`ORDERS`, `JOBS`) is published again on its original
//! subject. The ledger is never written to: an event of `INVENTORY` that one consumer could not handle is put before that
//! consumer's handler again as a suspect (see [`crate::suspects`]), read from the ledger where it has been all the time.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::{NATS_EXPECTED_STREAM, NATS_MESSAGE_ID};
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::{RawMessageErrorKind, Stream};
use async_nats::jetstream::{Context, ErrorCode};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::StreamExt;
use lomash_contract::{Timestamp, subject};
use lomash_platform::trace::TraceContext;
use serde::Serialize;

use super::{
    DELIVERIES, HEADER_BYTES, MAX_MESSAGE_ID_CHARS, ORIGIN_MESSAGE_ID, ORIGIN_SEQUENCE, ORIGIN_STREAM, ORIGIN_SUBJECT,
    OWN_HEADER_BYTES, PAYLOAD_BYTES, Past, REASON, SERVER_HEADER_BYTES, STREAM, bounded, header_bytes,
    publisher_headers,
};
use crate::direct::{self, Held};
use crate::header;
use crate::raw;
use crate::streams::{self, INVENTORY};
use crate::suspects::{self, Case};

/// Letters that one page looks at, whether they fit its filter or not. A page may therefore be short, or empty, and not the
/// last one.
pub const MAX_SCANNED: usize = 2_000;

/// And bytes of their payloads, the largest of which have half a megabyte.
pub const MAX_SCANNED_BYTES: usize = 64 * 1024 * 1024;

/// How long a republication may take to be confirmed.
pub const REPUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// Which letters.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Filter {
    /// Of this consumer.
    pub consumer: Option<String>,
    /// With this in the reason, in whatever case.
    pub reason: Option<String>,
    /// Published on this subject.
    pub subject: Option<String>,
    /// That died at this moment or later.
    pub since: Option<Timestamp>,
    /// That died before this moment.
    pub until: Option<Timestamp>,
}

impl Filter {
    /// Whether the letter is one of them.
    #[must_use]
    pub fn fits(&self, letter: &Letter) -> bool {
        let same = |wanted: &Option<String>, found: &str| wanted.as_deref().is_none_or(|wanted| wanted == found);
        let origin = letter.origin.as_ref();
        same(&self.consumer, &letter.consumer)
            && same(&self.subject, origin.map_or("", |origin| &origin.subject))
            && self.since.is_none_or(|since| letter.died_at >= since)
            && self.until.is_none_or(|until| letter.died_at < until)
            && self.reason.as_deref().is_none_or(|part| letter.reason.to_lowercase().contains(&part.to_lowercase()))
    }
}

/// Where a message was before it died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    /// The stream.
    pub stream: String,
    /// The subject it was published on.
    pub subject: String,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// The `Nats-Msg-Id` under which it came first.
    pub message_id: Option<String>,
}

/// That a letter does not hold all of its message, which was too large for it. The message itself is in its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cut {
    /// Bytes of the message's headers, where not all of them are in the letter.
    pub header_bytes: Option<u64>,
    /// Bytes of the message's payload, where only its beginning is in the letter.
    pub payload_bytes: Option<u64>,
}

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts = [("headers", self.header_bytes), ("payload", self.payload_bytes)];
        let parts = parts.into_iter().filter_map(|(what, bytes)| Some(format!("{what} of {} bytes", bytes?)));
        f.write_str(&parts.collect::<Vec<_>>().join(", "))
    }
}

/// A dead letter, without its content.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Letter {
    /// Its sequence in `DEAD_LETTERS`: its name.
    pub sequence: u64,
    /// When it was written.
    pub died_at: Timestamp,
    /// The consumer that gave the message up.
    pub consumer: String,
    /// Why.
    pub reason: String,
    /// How often it was tried.
    pub attempts: u64,
    /// Its former deaths, when it was brought back before.
    #[serde(flatten)]
    pub past: Past,
    /// Where it came from; none when the letter does not say, for then it was not written by us.
    pub origin: Option<Origin>,
    /// W3C trace context of the original.
    pub traceparent: Option<String>,
    /// Bytes of the payload that the letter holds.
    pub bytes: usize,
    /// What the letter does not hold of its message; none when it is whole.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cut: Option<Cut>,
    /// The headers of the original.
    #[serde(skip)]
    pub headers: HeaderMap,
    /// The payload of the original.
    #[serde(skip)]
    pub payload: Bytes,
}

/// A letter with its content.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Whole {
    /// The letter.
    #[serde(flatten)]
    pub letter: Letter,
    /// The headers of the original.
    pub headers: BTreeMap<String, Vec<String>>,
    /// The payload of the original, when it is text.
    pub payload: Option<String>,
    /// The payload of the original in base64, when it is no text.
    pub payload_base64: Option<String>,
}

impl From<Letter> for Whole {
    fn from(letter: Letter) -> Self {
        let headers = letter.headers.iter().map(|(name, values)| {
            (name.to_string(), values.iter().map(|value| value.as_str().to_owned()).collect::<Vec<_>>())
        });
        let headers = headers.collect();
        let (payload, payload_base64) = match std::str::from_utf8(&letter.payload) {
            Ok(text) => (Some(text.to_owned()), None),
            Err(_) => (None, Some(STANDARD.encode(&letter.payload))),
        };
        Self { letter, headers, payload, payload_base64 }
    }
}

impl Letter {
    fn of(message: StreamMessage) -> Self {
        let StreamMessage { subject, sequence, headers, payload, time } = message;
        let text = |name: &str| headers.get(name).map(|value| value.as_str().to_owned());
        let number = |name: &str| text(name).and_then(|text| text.parse().ok());
        // Whoever wrote it may publish on this subject; the header is only its word.
        let consumer = subject.rsplit('.').next().unwrap_or_default().to_owned();
        let origin = match (text(ORIGIN_STREAM), text(ORIGIN_SUBJECT), number(ORIGIN_SEQUENCE)) {
            (Some(stream), Some(subject), Some(sequence)) => {
                Some(Origin { stream, subject, sequence, message_id: text(ORIGIN_MESSAGE_ID) })
            }
            _ => None,
        };
        let (header_bytes, payload_bytes) = (number(HEADER_BYTES), number(PAYLOAD_BYTES));
        let is_cut = header_bytes.is_some() || payload_bytes.is_some();
        Self {
            cut: is_cut.then_some(Cut { header_bytes, payload_bytes }),
            sequence,
            died_at: Timestamp::new(time),
            consumer,
            reason: text(REASON).unwrap_or_else(|| "the letter does not say why it is here".to_owned()),
            attempts: number(DELIVERIES).unwrap_or(0),
            past: Past::of(Some(&headers)),
            origin,
            traceparent: TraceContext::parse(text(header::TRACEPARENT).as_deref(), None)
                .map(|trace| trace.traceparent().to_owned()),
            bytes: payload.len(),
            headers: publisher_headers(&headers),
            payload,
        }
    }

    /// What its next life will know of this death.
    fn obituary(&self) -> String {
        let origin = self.origin.as_ref().map_or_else(String::new, |o| format!("{} {}, ", o.stream, o.sequence));
        format!("{} {origin}{} attempts: {}", self.died_at, self.attempts, self.reason)
    }

    /// The same for every redrive of this letter, and of no other.
    fn redrive_id(&self) -> String {
        format!("redrive.{}.{}", self.sequence, self.died_at.get().unix_timestamp_nanos())
    }
}

/// Some letters.
#[derive(Clone, Debug)]
pub struct Page {
    /// The letters, the oldest first.
    pub letters: Vec<Letter>,
    /// After which sequence to go on; none when there are no more.
    pub next: Option<u64>,
    /// The last sequence of the stream when it was read.
    pub as_of: u64,
    /// Letters in the stream then.
    pub total: u64,
}

/// In which way a message was brought back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "way", rename_all_fields = "camelCase")]
pub enum Way {
    /// Published again.
    Republished {
        /// On this subject.
        subject: String,
        /// Stored in this stream.
        stream: String,
        /// Under this sequence.
        sequence: u64,
        /// Whether it had been there already, from an earlier redrive of the letter.
        duplicate: bool,
    },
    /// Put before its consumer again, with nothing published on its subject.
    ToConsumer {
        /// The stream that has it.
        stream: String,
        /// The consumer whose handler gets it.
        consumer: String,
    },
}

/// A letter that was brought back.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Redriven {
    /// The letter's sequence. It is removed.
    pub letter: u64,
    /// How often its message has been brought back now.
    pub redrives: u32,
    /// How.
    #[serde(flatten)]
    pub way: Way,
}

/// Why something could not be done with letters.
#[derive(Debug, thiserror::Error)]
pub enum LettersError {
    /// JetStream did not answer; worth another try.
    #[error("{STREAM} cannot be reached just now: {0}")]
    Unavailable(String),
    /// The stream is not there.
    #[error("the stream {STREAM} does not exist; the product service creates it at start")]
    NoStream,
    /// No such letter.
    #[error("there is no dead letter {0}: it was redriven or discarded, or never was")]
    NotFound(u64),
    /// It has no way back; the letter stays.
    #[error("the dead letter {letter} cannot be redriven: {why}")]
    NoWayBack {
        /// The letter.
        letter: u64,
        /// Why, and what to do instead.
        why: String,
    },
    /// Its stream did not take it; the letter stays.
    #[error("the dead letter {letter} was not redriven, its stream did not confirm it: {why}")]
    NotConfirmed {
        /// The letter.
        letter: u64,
        /// What was said.
        why: String,
    },
    /// It was brought back, and the letter could not be removed.
    #[error("the dead letter {letter} was redriven and could not be removed: {why}; discard it")]
    NotRemoved {
        /// The letter.
        letter: u64,
        /// What was said.
        why: String,
    },
}

/// The letters in `DEAD_LETTERS`. Pages are read by batched direct gets, which may be a moment behind the leader; what is done to
/// a letter is done to the leader's.
#[derive(Clone, Debug)]
pub struct Letters {
    context: Context,
}

impl Letters {
    /// Over this connection.
    #[must_use]
    pub const fn new(context: Context) -> Self {
        Self { context }
    }

    async fn stream(&self) -> Result<Stream, LettersError> {
        self.context.get_stream(STREAM).await.map_err(|problem| match problem.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                LettersError::NoStream
            }
            _ => LettersError::Unavailable(problem.to_string()),
        })
    }

    /// At most `limit` letters after the sequence `after` that fit the filter; looks at [`MAX_SCANNED`] at most.
    ///
    /// # Errors
    /// When the stream cannot be read.
    pub async fn page(&self, filter: &Filter, after: u64, limit: usize) -> Result<Page, LettersError> {
        let stream = self.stream().await?;
        let state = &stream.cached_info().state;
        let mut page = Page { letters: Vec::new(), next: None, as_of: state.last_sequence, total: state.messages };
        // A consumer's name is one token; anything else is nobody's.
        let subject = match filter.consumer.as_deref() {
            None => subject::dead_letter("*"),
            Some(name) if is_token(name) => subject::dead_letter(name),
            Some(_) => return Ok(page),
        };
        let is_searched = filter.reason.is_some() || filter.subject.is_some() || filter.since.is_some();
        // One more tells whether there are more.
        let at_once = if is_searched { MAX_SCANNED } else { limit.saturating_add(1) };
        let at_once = u64::try_from(at_once).unwrap_or(u64::MAX);
        let mut found = direct::read_some(&self.context, STREAM, &subject, after, page.as_of, at_once);
        let (mut after, mut scanned, mut bytes) = (after, 0, 0);
        while let Some(held) = found.next().await {
            let held = held.map_err(|problem| LettersError::Unavailable(problem.to_string()))?;
            if page.letters.len() == limit || scanned == MAX_SCANNED || bytes >= MAX_SCANNED_BYTES {
                page.next = Some(after);
                return Ok(page);
            }
            (after, scanned, bytes) = (held.sequence, scanned + 1, bytes + held.payload.len());
            let Held { sequence, stored_at: time, subject, headers, payload, .. } = held;
            let letter = Letter::of(StreamMessage { subject: subject.into(), sequence, headers, payload, time });
            if filter.fits(&letter) {
                page.letters.push(letter);
            }
        }
        Ok(page)
    }

    /// The letter of this sequence.
    ///
    /// # Errors
    /// [`LettersError::NotFound`], or when the stream cannot be read.
    pub async fn get(&self, sequence: u64) -> Result<Letter, LettersError> {
        // The server takes 0 for no sequence at all.
        if sequence == 0 {
            return Err(LettersError::NotFound(sequence));
        }
        match self.stream().await?.get_raw_message(sequence).await {
            Ok(message) => Ok(Letter::of(message)),
            Err(problem) if problem.kind() == RawMessageErrorKind::NoMessageFound => {
                Err(LettersError::NotFound(sequence))
            }
            Err(problem) => Err(LettersError::Unavailable(problem.to_string())),
        }
    }

    /// Brings the message of a letter back, and removes the letter once that is confirmed.
    ///
    /// # Errors
    /// [`LettersError`]; but for [`LettersError::NotRemoved`] nothing happened, or it may have and doing it again is harmless.
    pub async fn redrive(&self, sequence: u64) -> Result<Redriven, LettersError> {
        let letter = self.get(sequence).await?;
        let past = letter.past.clone().and_redriven_after(&letter.obituary());
        let redrives = past.redrives;
        let way = match way_back(&letter)? {
            WayBack::Republish(origin) => self.republish(&letter, origin, &past).await?,
            WayBack::ToConsumer(origin) => {
                let case = Case::new(&origin.stream, &letter.consumer, origin.sequence, letter.attempts);
                let case = case.redriven(past, letter.redrive_id());
                let not_confirmed = |why| LettersError::NotConfirmed { letter: sequence, why };
                case.summon(&self.context).await.map_err(not_confirmed)?;
                Way::ToConsumer { stream: origin.stream.clone(), consumer: letter.consumer.clone() }
            }
        };
        match self.discard(sequence).await {
            // Somebody else redrove it in the same moment: under the same id, so it is there once.
            Ok(()) | Err(LettersError::NotFound(_)) => Ok(Redriven { letter: sequence, redrives, way }),
            Err(problem) => Err(LettersError::NotRemoved { letter: sequence, why: problem.to_string() }),
        }
    }

    /// The headers and the payload of a letter's message: the letter's own, or of one that is cut those in its stream.
    async fn content(&self, letter: &Letter, origin: &Origin) -> Result<(HeaderMap, Bytes), LettersError> {
        let Some(cut) = letter.cut else { return Ok((letter.headers.clone(), letter.payload.clone())) };
        let none = |why: String| LettersError::NoWayBack { letter: letter.sequence, why };
        let Origin { stream: name, sequence, .. } = origin;
        let message = match raw::get(&self.context, name, *sequence).await {
            Ok(Some(raw)) => raw.message,
            Ok(None) => {
                return Err(none(format!(
                    "it holds only a part of its message ({cut}), and {name} does not have the message {sequence} any more; \
                     ask its publisher for it, then discard the letter"
                )));
            }
            Err(problem) => return Err(LettersError::Unavailable(problem)),
        };
        // A stream that was made anew has another message there.
        let id = message.headers.get(ORIGIN_MESSAGE_ID).or_else(|| message.headers.get(NATS_MESSAGE_ID));
        let id = id.map(|id| bounded(id.as_str(), MAX_MESSAGE_ID_CHARS));
        let is_it = message.subject.as_str() == origin.subject
            && id == origin.message_id
            && message.payload.starts_with(&letter.payload)
            && cut.payload_bytes.is_none_or(|bytes| bytes == message.payload.len() as u64);
        if !is_it {
            return Err(none(format!(
                "it holds only a part of its message ({cut}), and message {sequence} of {name} is another one; ask its \
                 publisher for it, then discard the letter"
            )));
        }
        // With ours beside them the largest would be refused: of those the letter has what fits.
        let headers = publisher_headers(&message.headers);
        let fits = header_bytes(&headers) + OWN_HEADER_BYTES <= SERVER_HEADER_BYTES;
        Ok((if fits { headers } else { letter.headers.clone() }, message.payload))
    }

    async fn republish(&self, letter: &Letter, origin: &Origin, past: &Past) -> Result<Way, LettersError> {
        let (mut headers, payload) = self.content(letter, origin).await?;
        headers.insert(NATS_MESSAGE_ID, letter.redrive_id());
        // Whatever a letter claims of its subject: it goes back into that stream, or nowhere.
        headers.insert(NATS_EXPECTED_STREAM, origin.stream.as_str());
        if let Some(id) = &origin.message_id {
            headers.insert(ORIGIN_MESSAGE_ID, id.as_str());
        }
        past.write(&mut headers);
        let publishing = async {
            let sent = self.context.publish_with_headers(origin.subject.clone(), headers, payload);
            sent.await.map_err(|e| e.to_string())?.await.map_err(|e| e.to_string())
        };
        let why = match tokio::time::timeout(REPUBLISH_TIMEOUT, publishing).await {
            Ok(Ok(ack)) => {
                let subject = origin.subject.clone();
                let (stream, sequence, duplicate) = (ack.stream, ack.sequence, ack.duplicate);
                return Ok(Way::Republished { subject, stream, sequence, duplicate });
            }
            Ok(Err(problem)) => problem,
            Err(_) => format!("no answer within {} s", REPUBLISH_TIMEOUT.as_secs()),
        };
        Err(LettersError::NotConfirmed { letter: letter.sequence, why })
    }

    /// What [`Letters::redrive`] would do, as a sentence.
    ///
    /// # Errors
    /// [`LettersError::NoWayBack`].
    pub fn preview(letter: &Letter) -> Result<String, LettersError> {
        Ok(match way_back(letter)? {
            WayBack::Republish(origin) => match letter.cut {
                None => format!("would be published again on {}", origin.subject),
                Some(_) => format!(
                    "would be published again on {}, whole, from {} {}",
                    origin.subject, origin.stream, origin.sequence
                ),
            },
            WayBack::ToConsumer(origin) => {
                format!("would be put before {} again, from {} {}", letter.consumer, origin.stream, origin.sequence)
            }
        })
    }

    /// Removes a letter for good.
    ///
    /// # Errors
    /// [`LettersError::NotFound`], or when the stream cannot be reached.
    pub async fn discard(&self, sequence: u64) -> Result<(), LettersError> {
        let Err(problem) = self.stream().await?.delete_message(sequence).await else { return Ok(()) };
        // The server has no code of its own for a message that is not there.
        self.get(sequence).await?;
        Err(LettersError::Unavailable(problem.to_string()))
    }
}

enum WayBack<'l> {
    Republish(&'l Origin),
    ToConsumer(&'l Origin),
}

/// How a letter's message can come back. A letter is only bytes, so what it says is held against what is defined.
fn way_back(letter: &Letter) -> Result<WayBack<'_>, LettersError> {
    let none = |why: String| Err(LettersError::NoWayBack { letter: letter.sequence, why });
    let Some(origin) = &letter.origin else {
        return none("it does not say where it came from; discard it".to_owned());
    };
    let (stream, consumer) = (origin.stream.as_str(), letter.consumer.as_str());
    if stream == INVENTORY {
        return if streams::is_defined(INVENTORY, consumer) && streams::is_defined(suspects::STREAM, consumer) {
            Ok(WayBack::ToConsumer(origin))
        } else {
            none(format!(
                "it is an event of the ledger, which is never written to again, and {consumer} is not a consumer that \
                 takes it back; rebuild what {consumer} derives from the ledger (`lomash rebuild`), then discard it"
            ))
        };
    }
    // Whoever may write letters of one consumer must not have a say in what another is given to do.
    if streams::is_read_by_another(stream, consumer) {
        none(format!("{consumer} does not read {stream}: the letter is not what it says; discard it"))
    } else if streams::takes(stream, &origin.subject) {
        Ok(WayBack::Republish(origin))
    } else {
        none(format!("{stream} takes nothing on the subject `{}`; discard it", origin.subject))
    }
}

fn is_token(name: &str) -> bool {
    !name.is_empty() && !name.contains(['.', '*', '>']) && !name.contains(char::is_whitespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    use crate::dead_letter::{CONSUMER, HISTORY, MAX_HISTORY, MAX_HISTORY_CHARS, REDRIVES};

    fn letter(headers: &[(&str, &str)]) -> Letter {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, *value);
        }
        let consumer = map.get(CONSUMER).map_or("product-orders", |consumer| consumer.as_str());
        Letter::of(StreamMessage {
            subject: format!("lomash.dlq.{consumer}").into(),
            sequence: 4,
            headers: map,
            payload: Bytes::from_static(b"\xff{}"),
            time: time::OffsetDateTime::UNIX_EPOCH,
        })
    }

    fn from(stream: &str, subject: &str, consumer: &str) -> Letter {
        letter(&[
            (ORIGIN_STREAM, stream),
            (ORIGIN_SUBJECT, subject),
            (ORIGIN_SEQUENCE, "7"),
            (CONSUMER, consumer),
            (DELIVERIES, "3"),
            (REASON, "No Payload"),
            ("traceparent", TRACEPARENT),
        ])
    }

    #[test]
    fn a_letter_is_read_whatever_it_says() {
        let bare = letter(&[]);
        assert_eq!((bare.consumer.as_str(), bare.attempts, &bare.origin), ("product-orders", 0, &None));
        let whole = Whole::from(from("ORDERS", "lomash.orders.created", "product-orders"));
        assert_eq!(whole.letter.traceparent.as_deref(), Some(TRACEPARENT));
        assert_eq!((whole.payload, whole.payload_base64.as_deref()), (None, Some("/3t9")));
        assert_eq!(whole.headers.keys().collect::<Vec<_>>(), ["traceparent"], "ours are not the original's");
    }

    #[test]
    fn the_way_back_is_into_the_stream_it_came_from_and_never_into_the_ledger() {
        let way = |stream, subject, consumer| Letters::preview(&from(stream, subject, consumer));
        let orders = way("ORDERS", "lomash.orders.created", "product-orders").expect("a way");
        assert!(orders.contains("published again on lomash.orders.created"), "{orders}");
        way("JOBS", "lomash.jobs.reconciliation", "reconciliation").expect("a way");
        for (stream, subject, consumer) in [
            ("ORDERS", "lomash.inventory.updated.x", "product-orders"),
            ("ORDERS", "lomash.orders.*", "product-orders"),
            ("ORDERS", "lomash.orders.>", "product-orders"),
            ("ORDERS", "", "product-orders"),
            ("INVENTORY", "lomash.inventory.updated.x", "somebody"),
            ("ELSEWHERE", "lomash.orders.created", "product-orders"),
            // A letter of one service that would become an order.
            ("ORDERS", "lomash.orders.created", "analytics"),
            ("JOBS", "lomash.jobs.reconciliation", "notification"),
        ] {
            let problem = way(stream, subject, consumer).expect_err("no way back");
            assert!(matches!(problem, LettersError::NoWayBack { letter: 4, .. }), "{problem}");
        }
        let none = Letters::preview(&letter(&[])).expect_err("no way back").to_string();
        assert!(none.contains("does not say where it came from"), "{none}");
    }

    #[test]
    fn a_letter_is_of_the_consumer_that_may_write_it() {
        let mut headers = HeaderMap::new();
        headers.insert(CONSUMER, "product-orders");
        let (subject, payload) = ("lomash.dlq.analytics".into(), Bytes::new());
        let time = time::OffsetDateTime::UNIX_EPOCH;
        let letter = Letter::of(StreamMessage { subject, sequence: 4, headers, payload, time });
        assert_eq!(letter.consumer, "analytics");
    }

    #[test]
    fn filters_hold_what_they_say() {
        let letter = from("ORDERS", "lomash.orders.created", "product-orders");
        let text = |text: &str| Some(text.to_owned());
        let filter = Filter { consumer: text("product-orders"), reason: text("no pay"), ..Filter::default() };
        assert!(filter.fits(&letter));
        assert!(!Filter { consumer: text("product"), ..filter.clone() }.fits(&letter));
        assert!(!Filter { reason: text("no order"), ..filter.clone() }.fits(&letter));
        assert!(!Filter { subject: text("lomash.jobs.reconciliation"), ..filter.clone() }.fits(&letter));
        let at = Some(letter.died_at);
        assert!(Filter { since: at, ..filter.clone() }.fits(&letter));
        assert!(!Filter { until: at, ..filter }.fits(&letter));
    }

    #[test]
    fn the_past_is_kept_and_bounded() {
        let mut past = Past::default();
        for number in 0..9 {
            past = past.and_redriven_after(&format!("{number}{}", "\r\n".repeat(MAX_HISTORY_CHARS)));
        }
        assert_eq!((past.redrives, past.history.len()), (9, MAX_HISTORY));
        assert!(past.history[0].starts_with('4') && past.history[0].len() == MAX_HISTORY_CHARS);
        let mut headers = HeaderMap::new();
        past.write(&mut headers);
        assert_eq!(Past::of(Some(&headers)), past);
        assert_eq!((headers.get_all(HISTORY).count(), headers.get_all(REDRIVES).count()), (MAX_HISTORY, 1));
    }
}
