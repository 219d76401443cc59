//! What clients of the live stream are given, and what they may cost.
//!
//! Readers must not be felt by whoever writes. They have a connection to NATS of their own: a server that cuts it off as a
//! slow consumer cuts off nobody else. Those who are up to date share one reader of the ledger ([`Feed::run`]), which parses
//! each event once and keeps the newest in a ring that is bounded in lines and bytes; it reads while somebody listens. Those
//! who are behind the ring pull what they lack by bounded questions ([`Feed::pull`]): one at a time of a caller, one at a time
//! in all, at a bounded rate, and none before the client has taken what came before.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use lomash_contract::{ContentType, LedgerEvent, codec};
use lomash_ledger::{JetStreamLedger, Ledger, ReadError, StoredMessage};
use lomash_platform::places::{Full, Place, Places};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::warn;
use uuid::Uuid;

/// Clients at once: each has a connection, and up to [`TAKE_BYTES`] and a pull in memory.
pub const MAX_STREAMS: usize = 100;

/// Clients of one caller: a few windows and programs of one person.
pub const MAX_STREAMS_OF_ONE: usize = 10;

const _: () = assert!(MAX_STREAMS_OF_ONE < MAX_STREAMS, "one caller must not take all places");

/// Events of the ring: some seconds of the most that is decided.
const RING_LINES: usize = 20_000;

/// And bytes of them: refusals of long orders have more than 100 kB each.
const RING_BYTES: usize = 16 * 1024 * 1024;

/// Messages that are on their way to the ring.
const TAIL_AT_ONCE: usize = 500;

/// And bytes of them. The largest message must fit, or nothing comes any more.
const TAIL_AT_ONCE_BYTES: usize = 1024 * 1024;

/// `max_msg_size` of `INVENTORY`, and its headers beside it.
const LARGEST_MESSAGE_BYTES: usize = 512 * 1024 + 64 * 1024;

const _: () =
    assert!(LARGEST_MESSAGE_BYTES < TAIL_AT_ONCE_BYTES, "the largest message must fit into a pull of the tail");
const _: () = assert!(LARGEST_MESSAGE_BYTES < RING_BYTES, "the ring must hold the newest message");

/// Bytes that a client takes from the ring at a time.
const TAKE_BYTES: usize = 256 * 1024;

/// Bytes of one pull of a client that catches up; a message may go over it.
const PULL_BYTES: usize = 256 * 1024;

/// Bytes a second that all who catch up read together: little enough that orders keep their time on two processors. A quarter of a
/// million small events a minute.
pub const CATCH_UP_BYTES_PER_SECOND: usize = 4 * 1024 * 1024;

/// What a message costs the servers beyond its payload.
const MESSAGE_OVERHEAD_BYTES: usize = 512;

/// Events that listeners are told of at once: each of them wakes all.
const LINES_AT_ONCE: usize = 128;

/// Pause before the tail is opened again.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);

/// An event as clients are sent it.
#[derive(Debug)]
pub struct Line {
    /// Its sequence in the ledger.
    pub sequence: u64,
    /// What it is about.
    key: Uuid,
    /// As it goes over the wire; empty when the message is not ours by form, or is for this service alone.
    text: Bytes,
    /// What it costs to keep or to read.
    bytes: usize,
}

impl Line {
    fn of(message: &StoredMessage) -> Self {
        let (sequence, bytes) = (message.sequence, message.payload.len() + MESSAGE_OVERHEAD_BYTES);
        let nothing = || Self { sequence, key: Uuid::nil(), text: Bytes::new(), bytes };
        let Ok(envelope) = message.parse() else { return nothing() };
        // For this service alone: it changes nothing.
        if matches!(envelope.payload, LedgerEvent::CommandAnswered(_)) {
            return nothing();
        }
        // Ours are on one line of text as they are stored.
        let is_one_line = !message.payload.iter().any(|byte| matches!(byte, b'\r' | b'\n'));
        let json = match std::str::from_utf8(&message.payload) {
            Ok(_) if is_one_line => message.payload.clone(),
            _ => codec::encode(ContentType::Json, &envelope).into(),
        };
        let head = format!("id: {sequence}\nevent: {}\ndata: ", envelope.event_type.as_str());
        let text = [head.as_bytes(), &json, b"\n\n"].concat().into();
        Self { sequence, key: envelope.payload.key(), text, bytes }
    }

    /// What is sent to a client that asked for this key, or for all; none when it is not for it.
    #[must_use]
    pub fn told(&self, key: Option<Uuid>) -> Option<Bytes> {
        let is_wanted = !self.text.is_empty() && key.is_none_or(|key| key == self.key);
        is_wanted.then(|| self.text.clone())
    }
}

/// The newest events, without gaps.
#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<Arc<Line>>,
    bytes: usize,
    /// The sequence before the first of them.
    after: u64,
}

/// What a client finds in the ring.
#[derive(Debug)]
pub enum Found {
    /// Its next events.
    Lines(Vec<Arc<Line>>),
    /// Nothing newer yet.
    Nothing,
    /// The ring begins after this sequence, beyond what the client has: it must catch up.
    Behind(u64),
}

impl Ring {
    fn end(&self) -> u64 {
        self.after + self.lines.len() as u64
    }

    fn begin_after(&mut self, sequence: u64) {
        *self = Self { after: sequence, ..Self::default() };
    }

    fn push(&mut self, line: Line) {
        debug_assert_eq!(line.sequence, self.end() + 1, "the tail has no gaps");
        self.bytes += line.bytes;
        self.lines.push_back(Arc::new(line));
        while self.lines.len() > RING_LINES || self.bytes > RING_BYTES {
            let Some(oldest) = self.lines.pop_front() else { break };
            self.bytes -= oldest.bytes;
            self.after += 1;
        }
    }

    fn after(&self, seen: u64) -> Found {
        if seen < self.after {
            return Found::Behind(self.after);
        }
        let known = usize::try_from(seen - self.after).unwrap_or(usize::MAX);
        let (mut taken, mut bytes) = (Vec::new(), 0);
        for line in self.lines.iter().skip(known) {
            taken.push(line.clone());
            bytes += line.bytes;
            if bytes >= TAKE_BYTES {
                break;
            }
        }
        if taken.is_empty() { Found::Nothing } else { Found::Lines(taken) }
    }
}

/// The live stream of this process. Clones are the same.
#[derive(Clone)]
pub struct Feed(Arc<Shared>);

struct Shared {
    /// On a connection of the readers' own.
    ledger: JetStreamLedger,
    places: Places<Uuid>,
    ring: Mutex<Ring>,
    /// The end of the ring.
    end: watch::Sender<u64>,
    /// How many listen.
    listeners: watch::Sender<usize>,
    /// Held by the pull that is under way, and on until its share of time is over.
    turn: Arc<Semaphore>,
    /// The same for each caller who catches up, so that each has one turn among the others.
    turns_of_callers: Mutex<HashMap<Uuid, Arc<Semaphore>>>,
}

/// Somebody who listens, until it is dropped.
pub struct Listener {
    feed: Feed,
    caller: Uuid,
    end: watch::Receiver<u64>,
    _place: Place<Uuid>,
}

impl Feed {
    /// Over `ledger`, which is on a connection of the readers' own. Nobody listens yet.
    #[must_use]
    pub fn new(ledger: JetStreamLedger) -> Self {
        Self(Arc::new(Shared {
            ledger,
            places: Places::new(MAX_STREAMS, MAX_STREAMS_OF_ONE),
            ring: Mutex::default(),
            end: watch::Sender::new(0),
            listeners: watch::Sender::new(0),
            turn: Arc::new(Semaphore::new(1)),
            turns_of_callers: Mutex::default(),
        }))
    }

    /// A place for `caller`.
    ///
    /// # Errors
    /// [`Full`].
    pub fn listen(&self, caller: Uuid) -> Result<Listener, Full> {
        let place = self.0.places.take(caller)?;
        let end = self.0.end.subscribe();
        self.0.listeners.send_modify(|listeners| *listeners += 1);
        Ok(Listener { feed: self.clone(), caller, end, _place: place })
    }

    /// Keeps the ring while somebody listens, until `stop`.
    ///
    /// # Errors
    /// Never; it is a task of the process like the others.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut listeners = self.0.listeners.subscribe();
        loop {
            let keeping = async {
                let _ = listeners.wait_for(|listeners| *listeners > 0).await;
                let mut left = listeners.clone();
                tokio::select! {
                    () = self.keep() => {}
                    _ = left.wait_for(|listeners| *listeners == 0) => {}
                }
                // What is not kept on would have a gap by the time somebody listens again.
                let mut ring = self.ring();
                let end = ring.end();
                ring.begin_after(end);
            };
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = keeping => {}
            }
        }
    }

    /// Keeps the ring, from the end of the ledger on.
    async fn keep(&self) {
        let begins = loop {
            match self.0.ledger.last_sequence().await {
                Ok(last) => break last,
                Err(problem) => warn!(%problem, "the live stream cannot begin, trying again"),
            }
            tokio::time::sleep(REOPEN_PAUSE).await;
        };
        self.ring().begin_after(begins);
        self.0.end.send_replace(begins);
        loop {
            let seen = self.ring().end();
            match self.0.ledger.tail(seen, TAIL_AT_ONCE, TAIL_AT_ONCE_BYTES).await {
                Ok(messages) => {
                    let mut messages = messages.ready_chunks(LINES_AT_ONCE);
                    while let Some(chunk) = messages.next().await {
                        for message in chunk {
                            match message.map(|message| Line::of(&message)) {
                                Ok(line) => self.ring().push(line),
                                Err(problem) => warn!(%problem, "the live stream broke off, going on where it did"),
                            }
                        }
                        let end = self.ring().end();
                        self.0.end.send_replace(end);
                    }
                }
                Err(problem) => warn!(%problem, "the live stream cannot go on, trying again"),
            }
            tokio::time::sleep(REOPEN_PAUSE).await;
        }
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.0.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn_of(&self, caller: Uuid) -> Arc<Semaphore> {
        let mut turns = self.0.turns_of_callers.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody else holds one that is of no use any more.
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(caller).or_insert_with(|| Arc::new(Semaphore::new(1))).clone()
    }

    /// Some of what comes after `after`, up to `upto`, when it is this caller's turn.
    ///
    /// # Errors
    /// [`ReadError`].
    async fn pull(&self, caller: Uuid, after: u64, upto: u64) -> Result<Vec<Line>, ReadError> {
        let (mine, turn, ledger) = (self.turn_of(caller), self.0.turn.clone(), self.0.ledger.clone());
        let (sender, pulled) = oneshot::channel();
        // A task of its own: a turn must not last until a client that takes nothing is looked after again.
        tokio::spawn(async move {
            let (Ok(_mine), Ok(_turn)) = (mine.acquire().await, turn.acquire().await) else { return };
            if sender.is_closed() {
                return;
            }
            let began = Instant::now();
            let lines = ledger.pull(after, upto, PULL_BYTES).await;
            let lines = match lines {
                // Aside: a refusal of a thousand lines takes longer to parse than anything that orders share a thread with.
                Ok(messages) => tokio::task::spawn_blocking(move || messages.iter().map(Line::of).collect::<Vec<_>>())
                    .await
                    .map_err(|problem| ReadError::Unavailable(problem.to_string())),
                Err(problem) => Err(problem),
            };
            let bytes: usize = lines.iter().flatten().map(|line| line.bytes).sum();
            let _ = sender.send(lines);
            tokio::time::sleep_until(began + time_for(bytes)).await;
        });
        pulled.await.unwrap_or_else(|_| Err(ReadError::Unavailable("the reader ended".to_owned())))
    }
}

/// How long those who catch up may take for so many bytes.
fn time_for(bytes: usize) -> Duration {
    Duration::from_secs(1).mul_f64(bytes as f64 / CATCH_UP_BYTES_PER_SECOND as f64)
}

impl Listener {
    /// What comes after `seen`; waits until there is something.
    ///
    /// # Errors
    /// [`ReadError`] when what it lacks cannot be read.
    pub async fn after(&mut self, seen: u64) -> Result<Vec<Arc<Line>>, ReadError> {
        loop {
            self.end.mark_unchanged();
            let found = self.feed.ring().after(seen);
            match found {
                Found::Lines(lines) => return Ok(lines),
                Found::Nothing => {
                    if self.end.changed().await.is_err() {
                        return Err(ReadError::Unavailable("the live stream has ended".to_owned()));
                    }
                }
                Found::Behind(upto) => {
                    let lines = self.feed.pull(self.caller, seen, upto).await?;
                    return Ok(lines.into_iter().map(Arc::new).collect());
                }
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.feed.0.listeners.send_modify(|listeners| *listeners -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(sequence: u64, bytes: usize) -> Line {
        Line { sequence, key: Uuid::from_u128(sequence.into()), text: Bytes::from_static(b"data: x\n\n"), bytes }
    }

    fn sequences(found: Found) -> Vec<u64> {
        match found {
            Found::Lines(lines) => lines.iter().map(|line| line.sequence).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_ring_is_bounded_and_whoever_falls_out_of_it_is_told() {
        let mut ring = Ring::default();
        ring.begin_after(10);
        assert!(matches!(ring.after(10), Found::Nothing));
        assert!(matches!(ring.after(12), Found::Nothing), "the ring is not there yet");
        assert!(matches!(ring.after(9), Found::Behind(10)));
        for sequence in 11..=14 {
            ring.push(line(sequence, 1));
        }
        assert_eq!(sequences(ring.after(10)), [11, 12, 13, 14]);
        assert_eq!(sequences(ring.after(13)), [14]);
        // Large ones push the oldest out, and are taken a few at a time.
        for sequence in 15..=40 {
            ring.push(line(sequence, RING_BYTES / 4));
        }
        assert!(ring.bytes <= RING_BYTES);
        assert_eq!((ring.after, ring.end()), (36, 40));
        assert!(matches!(ring.after(35), Found::Behind(36)));
        assert_eq!(sequences(ring.after(36)), [37], "one of them is more than a client takes at once");
        for sequence in 41..=41 + RING_LINES as u64 {
            ring.push(line(sequence, 0));
        }
        assert_eq!(ring.lines.len(), RING_LINES);
        ring.begin_after(ring.end());
        assert_eq!((ring.lines.len(), ring.bytes), (0, 0));
    }

    #[test]
    fn a_client_is_told_of_what_it_asked_for() {
        let one = line(7, 1);
        assert!(one.told(None).is_some() && one.told(Some(one.key)).is_some());
        assert!(one.told(Some(Uuid::from_u128(8))).is_none());
        let foreign = Line { text: Bytes::new(), ..line(8, 1) };
        assert!(foreign.told(None).is_none(), "what is not ours by form");
    }

    #[test]
    fn catching_up_takes_its_time() {
        assert_eq!(time_for(CATCH_UP_BYTES_PER_SECOND), Duration::from_secs(1));
        assert_eq!(time_for(0), Duration::ZERO);
    }
}
