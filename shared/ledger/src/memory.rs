//! A ledger in memory with the semantics of the real one, for tests and simulation.
//!
//! Faults happen on demand, the unknown outcomes above all: an append whose answer is lost may have been stored,
//! may not, or may be stored later.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use futures::stream::{self, StreamExt};
use lomash_contract::EventId;
use time::OffsetDateTime;
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::jetstream::{NEVER_TOLD_TO_GO, ServerError, append_error, header_text};
use crate::{
    AppendError, BatchPosition, Carried, Ledger, MAX_BATCH_MESSAGES, MAX_STAGED_BATCHES, Messages, NewMessage,
    ReadError, STAGED_KEPT, StoredMessage,
};

/// How often an append gives way before it is looked at.
const ROUND_TRIP_YIELDS: usize = 8;

/// What goes wrong with one append.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No answer, but it was stored.
    UnknownStored,
    /// No answer, and it was not stored.
    UnknownLost,
    /// No answer; it is stored right before the next append is looked at, if it still fits.
    UnknownLater,
    /// The server refuses, for its disk is full.
    Refused,
}

/// Says with which code the server refuses a message, if it does.
type Refuses = Arc<dyn Fn(&NewMessage) -> Option<u64> + Send + Sync>;

#[derive(Default)]
struct Inner {
    messages: Vec<StoredMessage>,
    ids: HashSet<EventId>,
    batches: u64,
    /// Batches that were begun, and those that were answered.
    begun: u64,
    answered: u64,
    faults: VecDeque<Fault>,
    later: Vec<(Vec<NewMessage>, u64)>,
    unreadable: u32,
    max_batch_messages: usize,
    /// Batches that were begun ahead of time, by their number, and until when the server keeps each.
    staged: HashMap<u64, Instant>,
    /// Batches for which there was no place among those.
    unplaced: u64,
    refuses: Option<Refuses>,
    /// Whether nothing can be stored, and messages and bytes of the largest batch that was sent.
    full: Option<FullDisk>,
    largest: (usize, usize),
}

/// What a server says whose disk is full; which of the two depends on what it wrote last before that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FullDisk {
    /// That the stream cannot be written.
    Stream,
    /// That the batch is incomplete: it could not write what it keeps of one until its end.
    Staged,
}

/// The server's words of a batch of which it does not have every message.
const INCOMPLETE: &str = "atomic publish batch is incomplete";

/// A [`Ledger`] in memory.
#[derive(Clone)]
pub struct MemoryLedger {
    inner: Arc<Mutex<Inner>>,
    last: Arc<watch::Sender<u64>>,
    answers: Arc<watch::Sender<bool>>,
}

impl Default for MemoryLedger {
    fn default() -> Self {
        let inner = Inner { max_batch_messages: MAX_BATCH_MESSAGES, ..Inner::default() };
        let answers = Arc::new(watch::Sender::new(true));
        Self { inner: Arc::new(Mutex::new(inner)), last: Arc::new(watch::Sender::new(0)), answers }
    }
}

impl Inner {
    fn store(&mut self, messages: &[NewMessage], expected: u64) -> Result<u64, AppendError> {
        if messages.len() > self.max_batch_messages {
            let description = format!("at most {} messages", self.max_batch_messages);
            return Err(AppendError::TooLarge { messages: messages.len(), description });
        }
        // The server looks at the ids before the sequence: a repeated batch is a duplicate, not a conflict. An id twice
        // in one batch is one too.
        let mut in_batch = HashSet::with_capacity(messages.len());
        let known = |message: &&NewMessage| !in_batch.insert(message.event_id) || self.ids.contains(&message.event_id);
        if let Some(message) = messages.iter().find(known) {
            return Err(AppendError::Duplicate(message.event_id.to_string()));
        }
        let last = self.messages.len() as u64;
        if last != expected {
            return Err(AppendError::Conflict(format!("wrong last sequence: {last}")));
        }
        self.batches += 1;
        let batch_id = format!("memory-{}", self.batches);
        for (index, message) in messages.iter().enumerate() {
            self.ids.insert(message.event_id);
            self.messages.push(StoredMessage {
                sequence: expected + 1 + index as u64,
                stored_at: OffsetDateTime::now_utc(),
                subject: message.subject.clone(),
                message_id: Some(message.event_id.to_string()),
                expected_last_sequence: (index == 0).then_some(expected),
                batch: Some(BatchPosition {
                    id: batch_id.clone(),
                    sequence: index as u64 + 1,
                    commit: index + 1 == messages.len(),
                }),
                carried: message.carried.as_deref().map(as_headers).unwrap_or_default(),
                payload: message.payload.clone(),
            });
        }
        Ok(self.messages.len() as u64)
    }

    /// Stores a batch, or does what is to go wrong.
    fn answer(&mut self, messages: Vec<NewMessage>, expected: u64) -> Result<u64, AppendError> {
        self.answered += 1;
        self.store_later_ones();
        let bytes = messages.iter().map(NewMessage::bytes).sum();
        self.largest = (self.largest.0.max(messages.len()), self.largest.1.max(bytes));
        match self.full {
            Some(FullDisk::Stream) => return Err(refused(10_077, "no space left on device")),
            Some(FullDisk::Staged) => return Err(AppendError::Incomplete(INCOMPLETE.to_owned())),
            None => {}
        }
        // Before the ids and the sequence, as the server does.
        let refuses = self.refuses.clone();
        if let Some(code) = refuses.and_then(|refuses| messages.iter().find_map(|message| refuses(message))) {
            return Err(refused(code, "it is refused"));
        }

        let lost = || Err(AppendError::Unknown("the answer was lost".to_owned()));
        match self.faults.pop_front() {
            None => self.store(&messages, expected),
            Some(Fault::UnknownStored) => self.store(&messages, expected).and_then(|_| lost()),
            Some(Fault::UnknownLost) => lost(),
            Some(Fault::UnknownLater) => {
                self.later.push((messages, expected));
                lost()
            }
            Some(Fault::Refused) => Err(refused(10_023, "insufficient resources")),
        }
    }

    /// A place for a batch that is begun ahead of time; false when the server has none.
    fn place(&mut self, batch: u64) -> bool {
        let now = Instant::now();
        self.staged.retain(|_, until| *until > now);
        let has_room = self.staged.len() < MAX_STAGED_BATCHES;
        if has_room {
            self.staged.insert(batch, now + STAGED_KEPT);
        } else {
            self.unplaced += 1;
        }
        has_room
    }

    fn store_later_ones(&mut self) {
        for (messages, expected) in std::mem::take(&mut self.later) {
            // Whether it still fits is exactly what the sender cannot know.
            let _ = self.store(&messages, expected);
        }
    }
}

impl MemoryLedger {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Makes the next appends go wrong, one fault each.
    pub fn inject(&self, faults: impl IntoIterator<Item = Fault>) {
        self.lock().faults.extend(faults);
    }

    /// Makes the next `times` reads fail as if no server answered.
    pub fn make_unreadable(&self, times: u32) {
        self.lock().unreadable = times;
    }

    /// Lowers the batch limit, as a server left at its own default would.
    pub fn limit_batches(&self, max_batch_messages: usize) {
        self.lock().max_batch_messages = max_batch_messages;
    }

    /// Refuses each batch with a message of which `refuses` says a code, until it is told otherwise.
    pub fn refuse(&self, refuses: impl Fn(&NewMessage) -> Option<u64> + Send + Sync + 'static) {
        self.lock().refuses = Some(Arc::new(refuses));
    }

    /// Whether the disk is full, and what the server says then: nothing is stored, and what is there can be read.
    pub fn fill(&self, full: Option<FullDisk>) {
        self.lock().full = full;
    }

    /// Messages of the batch that had most of them, and bytes of the one that had most of those.
    #[must_use]
    pub fn largest_batch(&self) -> (usize, usize) {
        self.lock().largest
    }

    /// How many batches the server had no place for, for it keeps [`MAX_STAGED_BATCHES`] of those that were begun and not ended.
    #[must_use]
    pub fn unplaced(&self) -> u64 {
        self.lock().unplaced
    }

    /// How many batches were begun and not answered: they are in flight, staged, or were let fall.
    #[must_use]
    pub fn unanswered(&self) -> u64 {
        let inner = self.lock();
        inner.begun - inner.answered
    }

    /// Answers no append until it is told to again.
    pub fn answer_appends(&self, answers: bool) {
        self.answers.send_replace(answers);
    }

    /// A copy of everything stored.
    #[must_use]
    pub fn messages(&self) -> Vec<StoredMessage> {
        self.lock().messages.clone()
    }
}

impl Ledger for MemoryLedger {
    fn stage(
        &self,
        messages: Vec<NewMessage>,
        expected_last_sequence: u64,
        go: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static {
        let ledger = self.clone();
        let (batch, has_place) = {
            let mut inner = ledger.lock();
            inner.begun += 1;
            let batch = inner.begun;
            // What has only one message is begun with the message that ends it.
            (batch, messages.len() < 2 || inner.place(batch))
        };
        async move {
            go.await.map_err(|_| AppendError::Unknown(NEVER_TOLD_TO_GO.to_owned()))?;
            if messages.is_empty() {
                return Ok(expected_last_sequence);
            }
            // Give way like a network round trip does, so that two writers in one test interleave and a writer has time to
            // prepare its next batch.
            for _ in 0..ROUND_TRIP_YIELDS {
                tokio::task::yield_now().await;
            }
            let _ = ledger.answers.subscribe().wait_for(|answers| *answers).await;
            let outcome = {
                let mut inner = ledger.lock();
                inner.staged.remove(&batch);
                if has_place {
                    inner.answer(messages, expected_last_sequence)
                } else {
                    inner.answered += 1;
                    Err(AppendError::Incomplete(INCOMPLETE.to_owned()))
                }
            };
            let last = ledger.lock().messages.len() as u64;
            ledger.last.send_replace(last);
            outcome
        }
    }

    async fn last_sequence(&self) -> Result<u64, ReadError> {
        let mut inner = self.lock();
        if let Some(left) = inner.unreadable.checked_sub(1) {
            inner.unreadable = left;
            return Err(ReadError::Unavailable("no server answers".to_owned()));
        }
        Ok(inner.messages.len() as u64)
    }

    async fn read(&self, after: u64) -> Result<Messages, ReadError> {
        self.reaches(after).await?;
        let rest: Vec<_> = self.lock().messages.iter().skip(index(after)).cloned().map(Ok).collect();
        Ok(stream::iter(rest).boxed())
    }

    async fn follow(&self, after: u64) -> Result<Messages, ReadError> {
        let changes = self.last.subscribe();
        let messages = stream::unfold((self.clone(), changes, after), |(ledger, mut changes, seen)| async move {
            loop {
                changes.borrow_and_update();
                let next = ledger.lock().messages.get(index(seen)).cloned();
                if let Some(message) = next {
                    return Some((Ok(message), (ledger, changes, seen + 1)));
                }
                if changes.changed().await.is_err() {
                    return None;
                }
            }
        });
        Ok(messages.boxed())
    }
}

fn refused(code: u64, description: &str) -> AppendError {
    append_error(ServerError { err_code: code, description: description.to_owned() }, 1)
}

/// What is left of texts that went through headers.
fn as_headers(carried: &Carried) -> Carried {
    let text = |text: &Option<String>| text.as_deref().map(header_text);
    Carried { trace: carried.trace.clone(), reason: text(&carried.reason), command: text(&carried.command) }
}

/// The position in the vector of the message after sequence `after`.
fn index(after: u64) -> usize {
    usize::try_from(after).unwrap_or(usize::MAX)
}
