//! Snapshots of the state in a JetStream object store, so that a start need not read the whole ledger.
//!
//! Owns when one is written, where, and which one is believed. Written upon a tick of the clock in `JOBS`, by whichever
//! replica gets it, from a copy that the committer makes between two commits ([`Committer::freeze`]); the committer has no
//! other part in it. There are [`KEPT_SNAPSHOTS`] places and the oldest is written over, so nothing has to be removed.
//!
//! A snapshot is only a shortcut. One that is damaged, unfinished, of another format or of another ledger is passed over
//! with a line that says why; without a usable one the ledger is read from its beginning, and the state is the same.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use async_nats::jetstream::object_store::{Object, ObjectInfo, ObjectMetadata, ObjectStore};
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use bytes::Bytes;
use futures::TryStreamExt;
use lomash_ledger::receive::{Delivery, Receive, Settle};
use lomash_ledger::{crash_point, streams};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::committer::Committer;
use crate::inventory::State;
use crate::inventory::frozen::{Damaged, Frozen, Head, MAX_PART_BYTES, Thawing};
use crate::schedule::{Clock, JobsError, Schedule};

/// Where ticks are.
pub const SUBJECT: &str = "lomash.jobs.snapshot";

/// Where the clock is.
pub const SCHEDULE_SUBJECT: &str = "lomash.jobs.schedules.snapshot";

/// Every hour, a quarter past: not at the minute when reconciliations start.
pub const DEFAULT_SCHEDULE: &str = "0 15 * * * *";

/// Events since the newest snapshot that make another one worth writing: a start folds so many in a second.
pub const DEFAULT_AFTER_EVENTS: u64 = 100_000;

/// Snapshots that are kept. Three, so that with the newest damaged and one being written there is still one.
pub const KEPT_SNAPSHOTS: usize = 3;

/// What bytes mean. Another number is another layout: such a snapshot is not read.
pub const FORMAT: u32 = 2;

/// How often a writer says that it is at work; a third of the consumer's `ack_wait`.
const IN_PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// Deliveries of a tick after which writing is left to the next tick, also when each ended its process.
const MAX_TRIES: u64 = 3;

/// Pause before another try.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Pause before a tick comes back whose replica is stopping: another one takes it.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(250);

/// How long writing may take. Ten million orders take some seconds.
const SAVE_TIMEOUT: Duration = Duration::from_secs(600);

/// How long reading one may take. Beyond that the whole ledger is not much slower.
const LOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a read may stand still: the bytes of an object may be gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes between the encoder and the store.
const PIPE_BYTES: usize = 256 << 10;

/// Parts that are read before they are put together; each of [`MAX_PART_BYTES`] at most.
const PARTS_AHEAD: usize = 4;

/// Description of an object that holds its label, so that places can be compared without reading them.
const LABEL: &str = "label";

/// What a snapshot says of itself, before its parts and once more beside the object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Label {
    format: u32,
    ledger: Ledger,
    #[serde(flatten)]
    head: Head,
}

/// Which ledger a snapshot is of. The same orders decided again in a new stream have the same event ids, and a stream that
/// was restored from an older copy has the same beginning: it takes both to tell them apart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ledger {
    /// When the stream was made, in the server's words.
    stream_created: String,
    /// `Nats-Msg-Id` of the message at the snapshot's sequence.
    last_message_id: Option<String>,
}

/// Only what tells whether the rest can be read.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// Why a snapshot is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it is of format {found} and this program reads format {FORMAT}")]
    Format { found: u32 },
    #[error("it is of another ledger: of a stream made at {found} where this one was made at {present}")]
    OtherStream { found: String, present: String },
    #[error("it is of another ledger: the message at its sequence {sequence} is {found:?} there and {present:?} here")]
    OtherMessage { sequence: u64, found: Option<String>, present: Option<String> },
    #[error(
        "it was taken at sequence {sequence} and the ledger ends at {last}: the ledger was replaced by an older copy; \
         restore the newer one"
    )]
    Ahead { sequence: u64, last: u64 },
    #[error("its label cannot be read: {0}")]
    Label(String),
    #[error("the label in it is not the one beside it")]
    OtherLabel,
    #[error("it has no digest")]
    NoDigest,
    #[error(transparent)]
    Damaged(#[from] Damaged),
    #[error("a part of {0} bytes is larger than any part of ours")]
    PartTooLarge(usize),
    #[error("it cannot be read to its end: {0}")]
    Read(#[from] std::io::Error),
    #[error("nothing more came within {} s", STALL_TIMEOUT.as_secs())]
    Stalled,
    #[error("it could not be read within {} s", LOAD_TIMEOUT.as_secs())]
    TooSlow,
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why the store cannot be used just now.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The server did not answer, or not as it should.
    #[error("{what}: {problem}")]
    Unavailable {
        /// What was attempted.
        what: &'static str,
        /// The server's or the client's words.
        problem: String,
    },
    /// Writing took too long.
    #[error("the snapshot was not written within {} s", SAVE_TIMEOUT.as_secs())]
    TooSlow,
}

fn unavailable<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> StoreError {
    move |problem| StoreError::Unavailable { what, problem: problem.to_string() }
}

/// A snapshot that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its sequence.
    pub sequence: u64,
    /// Its size.
    pub bytes: usize,
}

/// The snapshots of one ledger.
#[derive(Clone, Debug)]
pub struct Snapshots {
    context: Context,
}

/// A place and what is in it, if that can be told.
struct Slot {
    info: ObjectInfo,
    label: Result<Label, Unusable>,
}

impl Slot {
    fn of(info: ObjectInfo) -> Self {
        let text = info.metadata.get(LABEL).map_or("", String::as_str);
        let parsed = || {
            let unreadable = |problem: serde_json::Error| Unusable::Label(problem.to_string());
            match serde_json::from_str::<Format>(text).map_err(unreadable)? {
                Format { format: FORMAT } => serde_json::from_str(text).map_err(unreadable),
                Format { format: found } => Err(Unusable::Format { found }),
            }
        };
        Self { label: parsed(), info }
    }

    /// How new it is among those of the stream; nothing for what is of no use.
    fn sequence(&self, stream_created: &str) -> Option<u64> {
        let label = self.label.as_ref().ok()?;
        (label.ledger.stream_created == stream_created).then_some(label.head.sequence)
    }
}

impl Snapshots {
    /// Those that are reached by `context`.
    #[must_use]
    pub const fn new(context: Context) -> Self {
        Self { context }
    }

    // ── Writing ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// Writes a snapshot, unless one of less than `after_events` events ago is there.
    ///
    /// # Errors
    /// [`StoreError`]; what was there before is still there.
    pub async fn save(&self, frozen: Frozen, after_events: u64) -> Result<Option<Saved>, StoreError> {
        let saving = self.save_in_time(frozen, after_events);
        tokio::time::timeout(SAVE_TIMEOUT, saving).await.unwrap_or(Err(StoreError::TooSlow))
    }

    async fn save_in_time(&self, frozen: Frozen, after_events: u64) -> Result<Option<Saved>, StoreError> {
        let head = frozen.head();
        let sequence = head.sequence;
        let store = self.store().await?;
        let (stream_created, _) = self.ledger().await?;
        let slots = slots(&store).await?;
        let newest = slots.iter().filter_map(|slot| slot.sequence(&stream_created)).max().unwrap_or(0);
        if sequence < newest.saturating_add(after_events.max(1)) {
            return Ok(None);
        }
        let last_message_id = self.message_id(sequence).await?;
        let label = Label { format: FORMAT, ledger: Ledger { stream_created, last_message_id }, head };
        self.clear_away(&slots).await?;

        let text = serde_json::to_string(&label).map_err(unavailable("the snapshot's label cannot be written"))?;
        let object = ObjectMetadata {
            name: self.place(&slots, &label.ledger.stream_created),
            description: Some(format!("The product service's state at sequence {sequence}")),
            metadata: HashMap::from([(LABEL.to_owned(), text)]),
            ..ObjectMetadata::default()
        };
        let (sink, mut source) = tokio::io::duplex(PIPE_BYTES);
        let writing = write(label, frozen, BufWriter::with_capacity(PIPE_BYTES, sink));
        // The store reads to the end of the pipe, which is where the writer drops it; should the writer fail, nothing is
        // put into place.
        let putting =
            async { store.put(object, &mut source).await.map_err(unavailable("a snapshot cannot be stored")) };
        let writing = async { writing.await.map_err(unavailable("a snapshot cannot be encoded")) };
        let ((), stored) = tokio::try_join!(writing, putting)?;
        Ok(Some(Saved { sequence, bytes: stored.size }))
    }

    /// The name of a place that is free, or holds nothing of use, or the oldest.
    fn place(&self, slots: &[Slot], stream_created: &str) -> String {
        let names = (0..KEPT_SNAPSHOTS).map(|place| format!("state-{place}"));
        let in_use = |name: &String| slots.iter().find(|slot| slot.info.name == *name);
        // An empty or useless place comes before sequence 1.
        names.min_by_key(|name| in_use(name).and_then(|slot| slot.sequence(stream_created))).unwrap_or_default()
    }

    /// Removes chunks that no object refers to: what a writer leaves that dies.
    async fn clear_away(&self, slots: &[Slot]) -> Result<(), StoreError> {
        let chunks = format!("$O.{}.C.", streams::SNAPSHOTS_BUCKET);
        let stream = self.context.get_stream_no_info(streams::SNAPSHOTS).await;
        let stream = stream.map_err(unavailable("the snapshots' stream cannot be reached"))?;
        let present = stream.info_with_subjects(format!("{chunks}>")).await;
        let present: Vec<String> = present
            .map_err(unavailable("the snapshots' chunks cannot be listed"))?
            .map_ok(|(subject, _)| subject)
            .try_collect()
            .await
            .map_err(unavailable("the snapshots' chunks cannot be listed"))?;
        for subject in present {
            let id = subject.strip_prefix(&chunks).unwrap_or_default();
            if !slots.iter().any(|slot| slot.info.nuid == id) {
                info!(subject, "clearing an unfinished snapshot away");
                let purged = stream.purge().filter(&subject).await;
                purged.map_err(unavailable("an unfinished snapshot cannot be cleared away"))?;
            }
        }
        Ok(())
    }

    // ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// The state of the newest snapshot that is usable, if there is one. What is not usable is told in the log.
    pub async fn newest(&self) -> Option<State> {
        let listed = async {
            let (ledger, store) = tokio::try_join!(self.ledger(), self.store())?;
            let slots = slots(&store).await?;
            Ok::<_, StoreError>((ledger, store, slots))
        };
        let ((stream_created, last), store, mut slots) = match listed.await {
            Ok(listed) => listed,
            Err(problem) => {
                warn!(%problem, "snapshots cannot be looked at; the whole ledger is folded");
                return None;
            }
        };
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.sequence(&stream_created)));
        for slot in slots {
            let (name, bytes, started) = (slot.info.name.clone(), slot.info.size, Instant::now());
            let loading = self.load(&store, slot, &stream_created, last);
            match tokio::time::timeout(LOAD_TIMEOUT, loading).await.unwrap_or(Err(Unusable::TooSlow)) {
                Ok(state) => {
                    let (sequence, elapsed_ms) = (state.sequence(), started.elapsed().as_millis());
                    info!(snapshot = name, sequence, bytes, elapsed_ms, "starting from a snapshot");
                    return Some(state);
                }
                Err(reason) => warn!(snapshot = name, %reason, "a snapshot is not used"),
            }
        }
        None
    }

    async fn load(&self, store: &ObjectStore, slot: Slot, created: &str, last: u64) -> Result<State, Unusable> {
        let label = slot.label?;
        let sequence = label.head.sequence;
        if label.ledger.stream_created != created {
            return Err(Unusable::OtherStream { found: label.ledger.stream_created, present: created.to_owned() });
        }
        if sequence > last {
            return Err(Unusable::Ahead { sequence, last });
        }
        let present = self.message_id(sequence).await?;
        if present != label.ledger.last_message_id {
            let found = label.ledger.last_message_id;
            return Err(Unusable::OtherMessage { sequence, found, present });
        }
        // The store compares the digest when the last byte is read.
        if slot.info.digest.is_none() {
            return Err(Unusable::NoDigest);
        }
        let mut object = store.get(&slot.info.name).await.map_err(unavailable("a snapshot cannot be read"))?;
        let Some(part) = next_part(&mut object).await? else {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        };
        let inside: Label = rmp_serde::from_slice(&part).map_err(|problem| Unusable::Label(problem.to_string()))?;
        if inside != label {
            return Err(Unusable::OtherLabel);
        }
        // Reading is as much work as putting together: each has a thread.
        let (parts, read) = mpsc::channel(PARTS_AHEAD);
        let thawing = tokio::task::spawn_blocking(move || thaw(label.head, slot.info.size, read));
        while let Some(part) = next_part(&mut object).await? {
            // Whoever takes no more has found damage, and says which.
            if parts.send(part).await.is_err() {
                break;
            }
        }
        drop(parts);
        Ok(thawing.await.map_err(std::io::Error::from)??)
    }

    // ── The ledger ──────────────────────────────────────────────────────────────────────────────────────────────

    async fn store(&self) -> Result<ObjectStore, StoreError> {
        let store = self.context.get_object_store(streams::SNAPSHOTS_BUCKET).await;
        store.map_err(unavailable("the object store of the snapshots cannot be opened"))
    }

    /// When the ledger was made, and where it ends.
    async fn ledger(&self) -> Result<(String, u64), StoreError> {
        const WHAT: &str = "the ledger's stream cannot be looked at";
        let subject = format!("STREAM.INFO.{}", streams::INVENTORY);
        let info: Value = self
            .context
            .request(subject, &())
            .await
            .map_err(|problem: async_nats::jetstream::context::RequestError| unavailable(WHAT)(problem))?;
        let created = info.get("created").and_then(Value::as_str);
        let last = info.pointer("/state/last_seq").and_then(Value::as_u64);
        created.map(str::to_owned).zip(last).ok_or_else(|| unavailable(WHAT)(&info))
    }

    /// `Nats-Msg-Id` of a message of the ledger, from the leader. None too when the message is not there.
    async fn message_id(&self, sequence: u64) -> Result<Option<String>, StoreError> {
        const WHAT: &str = "a message of the ledger cannot be read";
        let stream = self.context.get_stream_no_info(streams::INVENTORY).await.map_err(unavailable(WHAT))?;
        match stream.get_raw_message(sequence).await {
            Ok(message) => {
                let id = message.headers.get(async_nats::header::NATS_MESSAGE_ID);
                Ok(id.map(|id| id.as_str().to_owned()))
            }
            Err(problem) if problem.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(problem) => Err(unavailable(WHAT)(problem)),
        }
    }
}

async fn slots(store: &ObjectStore) -> Result<Vec<Slot>, StoreError> {
    const WHAT: &str = "the snapshots cannot be listed";
    let listed = async {
        let list = store.list().await.map_err(unavailable(WHAT))?;
        list.map_ok(Slot::of).try_collect().await.map_err(unavailable(WHAT))
    };
    let late = |_| unavailable(WHAT)("the server does not answer");
    tokio::time::timeout(STALL_TIMEOUT, listed).await.map_err(late)?
}

/// The label and the parts, each behind its length.
async fn write(label: Label, frozen: Frozen, mut sink: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let label = rmp_serde::to_vec_named(&label).map_err(std::io::Error::other)?;
    for part in std::iter::once(label).chain(frozen.into_parts()) {
        let length = u32::try_from(part.len()).map_err(std::io::Error::other)?;
        sink.write_u32(length).await?;
        sink.write_all(&part).await?;
        crash_point!("snapshot-between-parts");
    }
    sink.shutdown().await
}

/// Reads the next part; none at the end.
async fn next_part(object: &mut Object) -> Result<Option<Vec<u8>>, Unusable> {
    let mut length = [0; size_of::<u32>()];
    // The end may come instead of the first byte of a length, and nowhere else.
    if in_time(object.read(&mut length[..1])).await? == 0 {
        return Ok(None);
    }
    in_time(object.read_exact(&mut length[1..])).await?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_PART_BYTES {
        return Err(Unusable::PartTooLarge(length));
    }
    let mut part = vec![0; length];
    in_time(object.read_exact(&mut part)).await?;
    Ok(Some(part))
}

/// The state that the parts of a snapshot are of.
fn thaw(head: Head, bytes: usize, mut parts: mpsc::Receiver<Vec<u8>>) -> Result<State, Damaged> {
    let mut thawing = Thawing::begin(head, bytes);
    while let Some(part) = parts.blocking_recv() {
        thawing.take(&part)?;
    }
    thawing.finish()
}

async fn in_time<T>(reading: impl Future<Output = std::io::Result<T>>) -> Result<T, Unusable> {
    Ok(tokio::time::timeout(STALL_TIMEOUT, reading).await.map_err(|_| Unusable::Stalled)??)
}

// ── The clock ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Sets the clock.
///
/// # Errors
/// [`JobsError`].
pub async fn set_up(context: &Context, schedule: &Schedule) -> Result<(), JobsError> {
    let (subject, target, variable) = (SCHEDULE_SUBJECT, SUBJECT, "SNAPSHOT_SCHEDULE");
    Clock { subject, target, payload: Bytes::from_static(b"{}"), variable }.set(context, schedule).await
}

/// What ticks are received by.
#[must_use]
pub const fn receive() -> Receive {
    Receive {
        stream: streams::JOBS,
        consumer: streams::SNAPSHOT_TICKS,
        group: None,
        max_in_flight: 1,
        max_in_flight_bytes: 1,
        max_panics: MAX_TRIES,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

/// Handles a tick: writes a snapshot, if there is enough that is new.
pub async fn handle(
    snapshots: Snapshots,
    committer: Committer,
    after_events: u64,
    stop: CancellationToken,
    tick: Delivery,
) -> Settle {
    if tick.deliveries > MAX_TRIES {
        error!(deliveries = tick.deliveries, "a tick was not survived; it is dropped, and the next one tries again");
        return Settle::Done;
    }
    let started = Instant::now();
    let saving = async {
        let Some(frozen) = committer.freeze().await else { return Ok(None) };
        debug!(copy_us = started.elapsed().as_micros(), "the state is copied");
        snapshots.save(frozen, after_events).await
    };
    let saved = tokio::select! {
        () = stop.cancelled() => return Settle::Retry(HAND_OVER_PAUSE),
        saved = saving => saved,
    };
    match saved {
        Ok(Some(Saved { sequence, bytes })) => {
            info!(sequence, bytes, elapsed_ms = started.elapsed().as_millis(), "wrote a snapshot");
            Settle::Done
        }
        Ok(None) => {
            debug!("too little is new for a snapshot");
            Settle::Done
        }
        Err(problem) if tick.deliveries < MAX_TRIES => {
            warn!(%problem, "no snapshot was written, trying again");
            Settle::Retry(RETRY_PAUSE)
        }
        Err(problem) => {
            warn!(%problem, "no snapshot was written; the next tick tries again, and starting takes longer meanwhile");
            Settle::Done
        }
    }
}
