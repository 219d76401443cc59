//! The ledger on JetStream: atomic append against an expected sequence, reading back, the one receive loop,
//! dead letters and the stream definitions.
//!
//! Nothing here knows what an event means; that is the contract's and the services' part. [`Ledger`] has two
//! implementations with the same semantics, held to the same tests: [`JetStreamLedger`] and [`MemoryLedger`], on which
//! faults happen on demand.

mod cumulative;
pub mod dead_letter;
pub mod deliveries;
pub mod direct;
mod in_hand;
mod jetstream;
mod memory;
mod observed;
mod raw;
pub mod receive;
mod refusal;
pub mod streams;
pub mod suspects;
pub mod upkeep;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, StreamExt};
use lomash_contract::{Envelope, EventId, Foreign, LedgerEvent};
use lomash_platform::schemas;
use lomash_platform::trace::{MAX_TRACE_BYTES, TraceContext};
use time::OffsetDateTime;
use tokio::sync::oneshot;
use tokio::time::Instant;

pub use jetstream::{APPEND_TIMEOUT, JetStreamLedger, LAST_SEQUENCE_TIMEOUT, READ_STALL_TIMEOUT};
pub use memory::{Fault, FullDisk, MemoryLedger};
pub use observed::{StreamUse, oldest_unsettled, stream_use};
pub use refusal::{BATCH_INCOMPLETE, Cause};

/// Most messages of one atomic batch, as every configuration we ship allows (`limits { batch { max_msgs } }`).
///
/// A server left at its own default takes 1,000; the committer adapts when it is told so.
pub const MAX_BATCH_MESSAGES: usize = 4_000;

/// Atomic batches that a server keeps of a stream which were begun and not ended (2.15.1). It refuses further ones.
pub const MAX_STAGED_BATCHES: usize = 50;

/// How long a server keeps an atomic batch that was begun and not ended (2.15.1). It has room for [`MAX_STAGED_BATCHES`].
pub const STAGED_KEPT: Duration = Duration::from_secs(10);

/// How long a leader may claim that the stream ends before what was seen already, until it is believed.
pub const STALE_LEADER_PATIENCE: Duration = Duration::from_secs(3);

/// Bytes of the headers that every event has: its id, its batch, what is expected.
const FRAME_BYTES: usize = 256;

/// Longest reason of a change, in characters. It is a header of each event of a command.
pub const MAX_REASON_CHARS: usize = 500;

/// Longest mark of a command: an id and a fingerprint.
pub const MAX_COMMAND_BYTES: usize = 128;

/// Names of the headers that are carried, and what stands around them and their values.
const HEADER_NAMES_BYTES: usize = 128;

/// Most bytes of all headers of one event.
pub const MAX_EVENT_HEADER_BYTES: usize =
    FRAME_BYTES + MAX_TRACE_BYTES + 4 * MAX_REASON_CHARS + MAX_COMMAND_BYTES + HEADER_NAMES_BYTES;

/// What the server takes as headers of a stored message (error 10097).
pub const SERVER_HEADER_BYTES: usize = u16::MAX as usize;

/// `max_msg_size` of `INVENTORY` and `ORDERS`: headers and payload of one message (error 10054).
pub const MAX_MESSAGE_BYTES: usize = 512 << 10;

/// `max_payload` of a server as it comes: headers and payload of what one client sends at once.
pub const SERVER_PAYLOAD_BYTES: usize = 1 << 20;

const _: () = assert!(MAX_EVENT_HEADER_BYTES <= SERVER_HEADER_BYTES, "the headers of an event always fit");
const _: () = assert!(
    MAX_EVENT_HEADER_BYTES + lomash_contract::limits::MAX_EVENT_BYTES <= MAX_MESSAGE_BYTES,
    "an event always fits into the ledger"
);
const _: () = assert!(MAX_MESSAGE_BYTES <= SERVER_PAYLOAD_BYTES, "what a stream takes can be sent");

const STALE_LEADER_PAUSE: Duration = Duration::from_millis(200);

/// How exactly times of messages are remembered: databases keep microseconds.
const REMEMBERED: Duration = Duration::from_micros(2);

/// Header names of ours and of the server's that are not constants of the client library.
pub mod header {
    /// Why an admin changed something, in the admin's words.
    pub const REASON: &str = "Lomash-Reason";
    /// Which command an event comes of and a fingerprint of its request: in older ledgers. Nothing writes it any more, for it was
    /// republished to everybody who listens.
    pub const COMMAND: &str = "Lomash-Command";
    /// W3C trace context.
    pub const TRACEPARENT: &str = "traceparent";
    /// W3C trace state.
    pub const TRACESTATE: &str = "tracestate";
    /// Encoding of the payload.
    pub const CONTENT_TYPE: &str = "Content-Type";
}

/// What travels beside an event in headers: small, and the same for every message of one command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// W3C trace context of what caused the event; its type bounds it.
    pub trace: Option<TraceContext>,
    /// Why an admin did it.
    pub reason: Option<String>,
    /// The command it comes of, in an older ledger; see `header::COMMAND`.
    pub command: Option<String>,
}

impl Carried {
    /// W3C `traceparent` of what caused the event.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.trace.as_ref().map(TraceContext::traceparent)
    }

    /// Bytes of it, as it is kept and sent.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let trace = self.traceparent().map_or(0, str::len) + self.tracestate().map_or(0, str::len);
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        trace + text(&self.reason) + text(&self.command)
    }

    /// W3C `tracestate` of what caused the event.
    #[must_use]
    pub fn tracestate(&self) -> Option<&str> {
        self.trace.as_ref().and_then(TraceContext::tracestate)
    }
}

/// A message to append.
#[derive(Clone, Debug)]
pub struct NewMessage {
    /// The subject, topic and key.
    pub subject: String,
    /// Becomes `Nats-Msg-Id`.
    pub event_id: EventId,
    /// The envelope, encoded.
    pub payload: Bytes,
    /// Headers, if any.
    pub carried: Option<Arc<Carried>>,
}

impl NewMessage {
    /// Bytes of subject, headers and payload, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let carried = self.carried.as_ref().map_or(0, |carried| carried.bytes());
        self.subject.len() + self.payload.len() + carried + FRAME_BYTES
    }
}

/// Where a stored message stood in its atomic batch, from the headers that the server keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPosition {
    /// The batch.
    pub id: String,
    /// 1 for its first message.
    pub sequence: u64,
    /// Whether it is the batch's last.
    pub commit: bool,
}

/// A message as the stream holds it.
#[derive(Clone, Debug)]
pub struct StoredMessage {
    /// Its sequence in the stream.
    pub sequence: u64,
    /// The server's clock when it stored it; never goes backwards with the sequence.
    pub stored_at: OffsetDateTime,
    /// The subject, topic and key.
    pub subject: String,
    /// `Nats-Msg-Id`.
    pub message_id: Option<String>,
    /// `Nats-Expected-Last-Sequence`, on the first message of a batch.
    pub expected_last_sequence: Option<u64>,
    /// Its place in a batch, when it came in one.
    pub batch: Option<BatchPosition>,
    /// The other headers that we write.
    pub carried: Carried,
    /// The envelope, encoded.
    pub payload: Bytes,
}

impl StoredMessage {
    /// The event, by the stateless half of the rule that every reader applies.
    ///
    /// # Errors
    /// [`Foreign`] when the message was not written by us.
    pub fn parse(&self) -> Result<Envelope<LedgerEvent>, Foreign> {
        lomash_contract::parse_stored(&self.subject, self.message_id.as_deref(), &self.payload)
    }

    /// Bytes of what is kept of it, about: headers count as the payload does.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.subject.len() + self.payload.len() + self.carried.bytes() + FRAME_BYTES
    }

    /// Whether an atomic batch (or a message outside any) ends here: readers that cut here never show half an order.
    #[must_use]
    pub fn ends_batch(&self) -> bool {
        self.batch.as_ref().is_none_or(|batch| batch.commit)
    }
}

/// Why an append was not acknowledged. Whatever it says, the writer does one thing: catch up and decide again.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Something else was written since the expected sequence (10071), or a batch is in flight (10164).
    #[error("the stream moved on: {0}")]
    Conflict(String),
    /// An event id of the batch was stored before, within the de-duplication window (10201).
    #[error("an event id of the batch is stored already: {0}")]
    Duplicate(String),
    /// More messages than the server takes in one batch (10199).
    #[error("the batch of {messages} messages is larger than the server allows: {description}")]
    TooLarge {
        /// How many were sent.
        messages: usize,
        /// The server's words.
        description: String,
    },
    /// The server refused for another reason.
    #[error("the server refused the batch ({code}): {description}")]
    Refused {
        /// The server's error code.
        code: u64,
        /// The server's words.
        description: String,
    },
    /// The server does not have all of the batch (10176): it lost some of it, or would not take it. It was not stored as it was sent;
    /// whoever is not sure that it was sent once treats that as unknown.
    #[error("the server does not have all of the batch: {0}")]
    Incomplete(String),
    /// No answer: the batch may have been stored, may yet be, or may never be.
    #[error("it is unknown whether the batch was stored: {0}")]
    Unknown(String),
}

/// Why the stream could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The server did not answer or the connection broke; worth another try.
    #[error("the stream cannot be read just now: {0}")]
    Unavailable(String),
    /// A sequence is missing: the ledger was tampered with or restored from an incomplete copy. Not worth another try.
    #[error("the stream has a gap: after sequence {after} comes {found}; run `lomash verify`")]
    Gap {
        /// The last good sequence.
        after: u64,
        /// The one that came next.
        found: u64,
    },
    /// The stream ends before what was read or written already: it went backwards. Not worth another try.
    #[error(
        "the stream ends at {last} but {seen} was already seen: it was replaced by an older copy; \
         restore the newer one or rebuild what was derived from it"
    )]
    WentBackwards {
        /// Where the stream ends now.
        last: u64,
        /// What was seen before.
        seen: u64,
    },
    /// A message is not the one that was read there before: the stream was replaced by an older copy and has grown since.
    /// Not worth another try.
    #[error(
        "message {sequence} was stored after it had been read: the stream was replaced by an older copy that has grown \
         since; restore the newer one or rebuild what was derived from it"
    )]
    Replaced {
        /// Its sequence.
        sequence: u64,
    },
}

impl ReadError {
    /// The same for whoever keeps what was read in the Postgres schema `schema`: with what to run, where trying again cannot
    /// mend it.
    #[must_use]
    pub fn with_remedy(self, schema: &str) -> anyhow::Error {
        match self {
            Self::WentBackwards { last, seen } => schemas::went_backwards(last, seen, schema),
            Self::Replaced { sequence } => schemas::was_replaced(sequence, schema),
            other => other.into(),
        }
    }

    /// Whether trying again can help.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// Stored messages in sequence without gaps.
pub type Messages = BoxStream<'static, Result<StoredMessage, ReadError>>;

/// An append-only log with optimistic concurrency over the whole stream.
pub trait Ledger: Clone + Send + Sync + 'static {
    /// Stores all of `messages` or none, and only if the last stored sequence is `expected_last_sequence`.
    ///
    /// Returns the sequence of the last message; the others precede it without gaps.
    ///
    /// # Errors
    /// See [`AppendError`]; only `Ok` says anything about what is stored.
    fn append(
        &self,
        messages: &[NewMessage],
        expected_last_sequence: u64,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send {
        let (go, gone) = oneshot::channel();
        let _ = go.send(());
        self.stage(messages.to_vec(), expected_last_sequence, gone)
    }

    /// The same in two steps: the messages are on their way when `go` is said, all but the last, which makes them count. If it is
    /// not said, or if this is dropped before, nothing is stored.
    ///
    /// A server keeps what was begun and not ended for [`STAGED_KEPT`], and only so much of it: who lets a batch fall begins no other
    /// ahead of time for so long.
    ///
    /// # Errors
    /// As [`Self::append`].
    fn stage(
        &self,
        messages: Vec<NewMessage>,
        expected_last_sequence: u64,
        go: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static;

    /// The last stored sequence, as the stream's leader knows it.
    ///
    /// # Errors
    /// [`ReadError::Unavailable`].
    fn last_sequence(&self) -> impl Future<Output = Result<u64, ReadError>> + Send;

    /// The last stored sequence, when it is not below `seen`, a sequence that was read or written before.
    ///
    /// A leader that was frozen and wakes answers from its past until it hears of its successor, so it is asked again for
    /// [`STALE_LEADER_PATIENCE`] before the stream is said to have gone backwards.
    ///
    /// # Errors
    /// [`ReadError`].
    fn reaches(&self, seen: u64) -> impl Future<Output = Result<u64, ReadError>> + Send {
        async move {
            let deadline = Instant::now() + STALE_LEADER_PATIENCE;
            loop {
                let last = self.last_sequence().await?;
                if last >= seen {
                    return Ok(last);
                }
                if Instant::now() >= deadline {
                    return Err(ReadError::WentBackwards { last, seen });
                }
                tokio::time::sleep(STALE_LEADER_PAUSE).await;
            }
        }
    }

    /// Refuses a stream whose message at `sequence` was stored later than `stored_at`, its time when it was read: where an
    /// older copy has grown beyond what was read, its length says nothing. A clock that was set back is no reason.
    ///
    /// # Errors
    /// [`ReadError::Replaced`], or why it cannot be read.
    fn remembers(
        &self,
        sequence: u64,
        stored_at: OffsetDateTime,
    ) -> impl Future<Output = Result<(), ReadError>> + Send {
        async move {
            let first = self.read(sequence.saturating_sub(1)).await?.next().await.transpose()?;
            let is_later = |message: &StoredMessage| message.stored_at > stored_at + REMEMBERED;
            match first.filter(|message| message.sequence == sequence) {
                Some(message) if is_later(&message) => Err(ReadError::Replaced { sequence }),
                _ => Ok(()),
            }
        }
    }

    /// The messages after sequence `after`, up to what the leader holds now; then it ends.
    ///
    /// # Errors
    /// [`ReadError`], also as an item when it happens on the way.
    fn read(&self, after: u64) -> impl Future<Output = Result<Messages, ReadError>> + Send;

    /// The messages after sequence `after` and all that come later; it ends only by an error.
    ///
    /// # Errors
    /// [`ReadError`], also as an item when it happens on the way.
    fn follow(&self, after: u64) -> impl Future<Output = Result<Messages, ReadError>> + Send;
}

/// A named place where a test may abort the process, to show that dying right there loses and doubles nothing.
///
/// Inert unless the `failpoints` feature is compiled in and `FAILPOINTS` names the place, for example
/// `FAILPOINTS='commit-after-ack=20*off->return'`. Must stand in a function, at statement level.
#[macro_export]
macro_rules! crash_point {
    ($name:literal) => {
        $crate::fail::fail_point!($name, |_| ::std::process::abort());
    };
    // Only when the condition holds, for example of one message among many.
    ($name:literal, $condition:expr) => {
        $crate::fail::fail_point!($name, $condition, |_| ::std::process::abort());
    };
}

#[doc(hidden)]
pub use fail;

#[cfg(test)]
mod tests {
    use super::*;

    /// A ledger whose leader says one end until it wakes, and another from then on.
    #[derive(Clone)]
    struct Frozen {
        wakes: Instant,
        before: u64,
        after: u64,
    }

    impl Ledger for Frozen {
        fn stage(
            &self,
            _: Vec<NewMessage>,
            _: u64,
            _: oneshot::Receiver<()>,
        ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static {
            std::future::ready(Err(AppendError::Unknown("it is only read".to_owned())))
        }

        async fn last_sequence(&self) -> Result<u64, ReadError> {
            Ok(if Instant::now() < self.wakes { self.before } else { self.after })
        }

        async fn read(&self, _: u64) -> Result<Messages, ReadError> {
            Err(ReadError::Unavailable("nothing is in it".to_owned()))
        }

        async fn follow(&self, _: u64) -> Result<Messages, ReadError> {
            Err(ReadError::Unavailable("nothing is in it".to_owned()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_is_behind_is_given_time_and_not_for_ever() {
        let in_time = STALE_LEADER_PATIENCE - Duration::from_millis(500);
        let ledger = Frozen { wakes: Instant::now() + in_time, before: 5, after: 9 };
        assert!(matches!(ledger.reaches(7).await, Ok(9)), "it woke");
        let late = Frozen { wakes: Instant::now() + 2 * STALE_LEADER_PATIENCE, before: 5, after: 9 };
        let said = late.reaches(7).await;
        assert!(matches!(said, Err(ReadError::WentBackwards { last: 5, seen: 7 })), "{said:?}");
    }
}
