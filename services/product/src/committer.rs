//! The group committer: the one task of a process that writes to the ledger, and the one place where a conflict is
//! met.
//!
//! Owns the [`State`]. While a commit is in flight the next commands are decided already, in order, on top of what is being
//! stored, so that they are ready when it is; they become one atomic batch that names the sequence it was decided on. One
//! batch is in flight at a time: what was decided ahead counts when the one before is stored, and is forgotten when it is not. A
//! full one is staged with the server meanwhile, all but the message that makes it count. Whatever goes wrong (conflict,
//! duplicate, timeout, lost connection), the committer does one thing: it catches up with the stream and decides again what is
//! still undecided. A stale or paused writer can therefore only fail.
//!
//! A batch that the server refuses for what is in it would be refused for ever. So the command that it is refused for is looked for
//! ([`isolation`]) and answered with that, and the others go on.

mod isolation;
mod progress;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use hashbrown::HashMap;
use lomash_contract::{
    ContentType, Envelope, EventId, LedgerEvent, ProductId, ProductUpdated, Timestamp, Version, codec,
};
use lomash_ledger::{
    AppendError, BATCH_INCOMPLETE, Carried, Cause, Ledger, MAX_BATCH_MESSAGES, NewMessage, ReadError, STAGED_KEPT,
    StoredMessage, crash_point,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument as _, Span, debug, error, info, warn};

use crate::inventory::frozen::Frozen;
use crate::inventory::{Command, CommandMark, Decision, Draft, Fact, Outcome, Rejection, State, decide};
use crate::observed;

use self::isolation::{Evidence, Isolation, Refusal, SERVER_PATIENCE, TRY_AGAIN_AFTER, is_given_up};
use self::progress::Progress;
pub use self::progress::STALLED_AFTER;

/// Commands that may wait for the committer; more must wait with their sender, orders in their stream.
pub const MAX_QUEUED_COMMANDS: usize = 4 * MAX_BATCH_MESSAGES;

/// Commands taken into one batch at most, when their messages do not fill it earlier.
const MAX_GROUP_COMMANDS: usize = MAX_BATCH_MESSAGES;

/// Bytes of a batch, payloads and headers, after which nothing more is decided for it: the refusals of long orders are some hundred
/// kilobytes each, and the server holds a whole batch in memory. Three times the largest batch of ordinary events. One command
/// may go over it.
pub const MAX_BATCH_BYTES: usize = 8 << 20;

/// Commands or events at which the committer works before it looks again after the batch in flight: some 0.2 ms.
const AHEAD_AT_ONCE: usize = 64;

/// How often an idle committer looks whether another writer moved the stream, to stay warm.
pub const IDLE_CATCH_UP: Duration = Duration::from_secs(1);

/// Pauses between tries to reach the stream: from the first to the last, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Batches in a row of which the server says that they are incomplete, until it is believed that one of their commands is to blame:
/// the server says so of messages that it lost, and of one that it would not take.
const INCOMPLETE_PATIENCE: u32 = 3;

/// How far beyond the end of the ledger the sequence is that a probe expects: it can only be refused.
const PROBE_BEYOND: u64 = 1 << 40;

/// The fewest messages that a server's batch limit is believed to be; below it the server is broken, not small.
const MIN_BATCH_MESSAGES: usize = 100;

/// What was decided and stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    /// What the command came to.
    pub outcome: Outcome,
    /// The sequence of the stream that shows it: of the command's last event, or of the state it was settled on.
    pub sequence: u64,
    /// What a product command stored, but for the record of its answer. Empty for orders, and for what was found in the stream
    /// after its answer was lost: `sequence` is then that of its first event, from where it can be read back.
    pub events: Vec<Envelope<LedgerEvent>>,
}

/// Why a command was not carried out.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CommandError {
    /// It is not acceptable.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// Its events do not fit into one atomic batch.
    #[error(
        "the command needs {messages} messages in one atomic batch and the server takes {limit}; \
         raise jetstream.limits.batch.max_msgs on the server"
    )]
    TooLarge {
        /// How many it needs.
        messages: usize,
        /// How many there may be.
        limit: usize,
    },
    /// The process is stopping. Whether the command was carried out is unknown; an order may be sent again at any time,
    /// another command within the stream's de-duplication window.
    #[error("the service is stopping; send the command again")]
    Stopping,
    /// The server does not store what it comes to, and it is not for the server's sake.
    #[error("the ledger's server refuses what the command would store ({code}): {description}")]
    Unstorable {
        /// The server's error code.
        code: u64,
        /// The server's words.
        description: String,
    },
    /// The ledger holds an event under an id that only this command's events may have, and the command was not carried out.
    #[error(
        "an event with an id of this command's is in the ledger already and is not this command's, so it can never be \
         carried out under this id: {description}"
    )]
    IdentityTaken {
        /// The server's words.
        description: String,
    },
    /// Another replica may carry the command out yet, and this one would not: whether it will be is unknown. It may be
    /// sent again under the same id, which tells.
    #[error("the command was not decided in time and may yet be carried out; send it again under the same id")]
    Undecided,
}

/// The answer to a command.
pub type Answer = Result<Committed, CommandError>;

/// What a command came to: an outcome, or a refusal that is on record.
type Settled = Result<Outcome, Rejection>;

#[derive(Debug)]
struct Submission {
    command: Command,
    carried: Option<Arc<Carried>>,
    reply: oneshot::Sender<Answer>,
    /// The first event id of each try whose outcome is unknown, by which a later look at the stream shows that it was
    /// stored. Ids are deterministic, so there is one for each way in which the command could be decided, and of a command
    /// under a key one for each sequence that it was decided on.
    tried: Vec<(EventId, Settled)>,
    /// Of deciding it, when it is traced.
    span: Span,
    /// What it was refused for alone.
    refused: Option<Box<Refused>>,
}

/// That a command was refused alone.
#[derive(Debug)]
struct Refused {
    refusal: Refusal,
    times: u32,
    since: Instant,
    /// Batches that had been stored before.
    stored_before: u64,
    /// Others go first until then.
    again_at: Instant,
}

impl Submission {
    fn note_try(&mut self, first_event: EventId, settled: &Settled) {
        self.tried.retain(|(event, _)| *event != first_event);
        self.tried.push((first_event, settled.clone()));
    }

    /// What the command came to, now that an event of one of its tries was found in the stream. The event says more than
    /// the try: an earlier try may be the one that was stored, and it had seen another stock.
    fn outcome_of(&self, envelope: &Envelope<LedgerEvent>, sequence: u64) -> Settled {
        let tried = self.tried.iter().find(|(event, _)| *event == envelope.event_id).map(|(_, settled)| settled);
        match (&envelope.payload, tried) {
            (LedgerEvent::InventoryUpdateFailed(failed), _) => Ok(Outcome::Refused { reason: failed.reason }),
            (LedgerEvent::InventoryUpdated(updated), Some(Ok(Outcome::StockChanged { shortfall, .. }))) => {
                Ok(Outcome::StockChanged {
                    previous_quantity: updated.previous_quantity,
                    new_quantity: updated.new_quantity,
                    shortfall: *shortfall,
                })
            }
            // Another replica may have answered it at the very sequence that a try of ours was decided for, on another state.
            (LedgerEvent::CommandAnswered(answered), tried) => match (&answered.refusal, tried) {
                (Some(refusal), _) => Err(Rejection::of_refusal(refusal).unwrap_or(Rejection::Repeated)),
                (None, _) if answered.events == 0 => Ok(Outcome::Unchanged),
                (None, Some(Ok(outcome))) if *outcome != Outcome::Unchanged => Ok(outcome.clone()),
                (None, _) => Ok(Outcome::Replayed { first_sequence: sequence }),
            },
            (_, Some(settled)) => settled.clone(),
            (_, None) => Ok(Outcome::Unchanged),
        }
    }

    /// Whether a batch of this command alone, refused as a duplicate, shows that it was carried out long ago: not when
    /// a try of ours may be on its way, and never for an order, whose id says for ever whether it is decided.
    fn is_repeated_command(&self) -> bool {
        self.tried.is_empty() && matches!(self.command, Command::Product(_))
    }

    /// Whether nobody waits for the answer any more and nothing was tried: then it need not be carried out. An order
    /// comes back by itself, and who sent another command was told that its outcome is unknown.
    fn is_abandoned(&self) -> bool {
        self.tried.is_empty() && self.reply.is_closed()
    }

    fn answer(self, answer: Answer) {
        observed::answered(&answer);
        // A caller that went away has no use for the answer; the ledger has it.
        let _ = self.reply.send(answer);
    }
}

/// A handle by which commands are submitted.
#[derive(Clone, Debug)]
pub struct Committer {
    queue: mpsc::Sender<Submission>,
    sequence: watch::Receiver<u64>,
    copies: mpsc::Sender<oneshot::Sender<Frozen>>,
    progress: Arc<Progress>,
}

impl Committer {
    /// Submits a command and waits for what it came to. Commands are decided in the order of submission.
    ///
    /// # Errors
    /// [`CommandError`].
    pub async fn submit(&self, command: Command, carried: Option<Arc<Carried>>) -> Answer {
        let (reply, answer) = oneshot::channel();
        let (span, carried) = observed::decide_span(&command, carried);
        let submission = Submission { command, carried, reply, tried: Vec::new(), span: span.clone(), refused: None };
        let deciding = async {
            // Not `send`, whose future holds what is sent once more: as many wait as orders are handled at once.
            self.queue.reserve().await.map_err(|_| CommandError::Stopping)?.send(submission);
            answer.await.unwrap_or(Err(CommandError::Stopping))
        };
        deciding.instrument(span).await
    }

    /// A copy of the state, made between two commits without holding them up. None when the committer is stopping.
    pub async fn freeze(&self) -> Option<Frozen> {
        let (reply, copy) = oneshot::channel();
        self.copies.send(reply).await.ok()?;
        copy.await.ok()
    }

    /// Why nothing is decided any more although something waits, or why nothing could be, when that is so for
    /// [`STALLED_AFTER`].
    #[must_use]
    pub fn stall(&self) -> Option<String> {
        self.progress.stall()
    }

    /// The sequence up to which this process knows the ledger.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        *self.sequence.borrow()
    }
}

/// Folds the ledger from where `state` ends to where the stream ends now. `observe` sees every message, and whether it
/// was taken in.
///
/// # Errors
/// [`ReadError`]; the state then holds what was read before.
pub async fn catch_up<L: Ledger>(
    ledger: &L,
    state: &mut State,
    mut observe: impl FnMut(&StoredMessage, Option<&Envelope<LedgerEvent>>),
) -> Result<(), ReadError> {
    let mut messages = ledger.read(state.sequence()).await?;
    while let Some(message) = messages.next().await {
        let message = message?;
        let admitted = message.parse().and_then(|envelope| state.admits(&envelope.payload).map(|()| envelope));
        match admitted {
            Ok(envelope) => {
                let mark = message.carried.command.as_deref().and_then(CommandMark::parse);
                state.evolve(message.sequence, envelope.timestamp, &envelope.payload, mark);
                observe(&message, Some(&envelope));
            }
            Err(foreign) => {
                error!(
                    sequence = message.sequence,
                    subject = message.subject,
                    reason = %foreign,
                    "a message in the ledger was not written by us and is skipped; find out who may publish there"
                );
                state.skip(message.sequence);
                observe(&message, None);
            }
        }
    }
    Ok(())
}

/// Makes a committer for `ledger`, whose state is folded up to some sequence, and the future that is its loop.
///
/// The loop ends when `stop` is cancelled and what is in flight is known, or with an error that trying again cannot
/// mend (a gap in the stream, a stream that went backwards).
pub fn committer<L: Ledger>(
    ledger: L,
    state: State,
    clock: fn() -> Timestamp,
    stop: CancellationToken,
) -> (Committer, impl Future<Output = Result<State, ReadError>> + Send) {
    let (queue, submissions) = mpsc::channel(MAX_QUEUED_COMMANDS);
    let (known, sequence) = watch::channel(state.sequence());
    let (copies, asked) = mpsc::channel(1);
    let progress = Arc::new(Progress::default());
    let running = Running {
        ledger,
        state,
        clock,
        stop,
        known,
        asked,
        progress: progress.clone(),
        max_batch_messages: MAX_BATCH_MESSAGES,
        isolation: Isolation::default(),
        stored: 0,
        incomplete: 0,
        refused_pause: FIRST_PAUSE,
        fell: None,
    };
    (Committer { queue, sequence, copies, progress }, running.run(submissions))
}

struct Running<L> {
    ledger: L,
    state: State,
    clock: fn() -> Timestamp,
    stop: CancellationToken,
    known: watch::Sender<u64>,
    /// Whoever wants a copy of the state.
    asked: mpsc::Receiver<oneshot::Sender<Frozen>>,
    progress: Arc<Progress>,
    max_batch_messages: usize,
    isolation: Isolation,
    /// Batches that were stored.
    stored: u64,
    /// Batches in a row that the server called incomplete.
    incomplete: u32,
    /// Pause after a refusal, while nothing is stored.
    refused_pause: Duration,
    /// When a staged batch fell with the one before it: the server has to forget it before another is staged.
    fell: Option<Instant>,
}

/// A batch that is decided and not yet stored: which submissions it settles, and how.
struct Batch {
    decided_at: Timestamp,
    facts: Vec<Fact>,
    messages: Vec<NewMessage>,
    encoder: Encoder,
    /// Of the messages.
    bytes: usize,
    /// One for each submission taken, in order. `last_message` is the position after its last event in the batch.
    verdicts: Vec<Verdict>,
}

impl Batch {
    fn at(now: Timestamp) -> Self {
        let encoder = Encoder::default();
        Self { decided_at: now, facts: Vec::new(), messages: Vec::new(), encoder, bytes: 0, verdicts: Vec::new() }
    }

    /// Decides one more command; false when it does not fit any more.
    fn add(&mut self, draft: &mut Draft<'_>, submission: &Submission, max_messages: usize) -> bool {
        if self.bytes >= MAX_BATCH_BYTES {
            return false;
        }
        let verdict = match decide(draft, &submission.command, self.decided_at) {
            Decision::Settled(outcome) => Verdict::Settled(outcome),
            Decision::Reject(rejection) => Verdict::Reject(rejection.into()),
            Decision::Store(facts, _) if facts.len() > max_messages => {
                Verdict::Reject(CommandError::TooLarge { messages: facts.len(), limit: max_messages })
            }
            Decision::Store(facts, _) if self.facts.len() + facts.len() > max_messages => return false,
            Decision::Refuse(..) if self.facts.len() == max_messages => return false,
            Decision::Store(facts, outcome) => self.store(draft, submission, facts, Ok(outcome)),
            Decision::Refuse(fact, rejection) => self.store(draft, submission, vec![*fact], Err(rejection)),
        };
        self.verdicts.push(verdict);
        true
    }

    fn store(&mut self, draft: &mut Draft<'_>, submission: &Submission, facts: Vec<Fact>, settled: Settled) -> Verdict {
        draft.apply(&facts, self.decided_at);
        let first_event = facts.first().map(|fact| fact.event_id).expect("a decision stores something");
        for fact in &facts {
            let payload = self.encoder.encode(&envelope(fact, self.decided_at));
            let message = message(fact, payload, submission.carried.clone());
            self.bytes += message.bytes();
            self.messages.push(message);
        }
        self.facts.extend(facts);
        Verdict::Store { settled, first_event, last_message: self.facts.len() }
    }
}

/// A batch on its way to the server; it is stored once it is told to go. Dropped before that, it is never stored.
struct Sending {
    go: oneshot::Sender<()>,
    answer: AbortOnDropHandle<Result<u64, AppendError>>,
}

impl Sending {
    fn begin<L: Ledger>(ledger: &L, messages: Vec<NewMessage>, expected: u64) -> Self {
        let (go, gone) = oneshot::channel();
        // Sending goes as far as the connection takes it; tokio's budget would give way after every 128 messages.
        let sending = tokio::task::unconstrained(ledger.stage(messages, expected, gone));
        Self { go, answer: AbortOnDropHandle::new(tokio::spawn(sending.in_current_span())) }
    }
}

/// What is stored next; it may have been begun while another batch was in flight.
struct Next {
    batch: Batch,
    sending: Option<Sending>,
}

impl From<Batch> for Next {
    fn from(batch: Batch) -> Self {
        Self { batch, sending: None }
    }
}

/// The batch after the one in flight, decided as if that were stored already.
struct Ahead<'a> {
    in_flight: &'a Batch,
    draft: Draft<'a>,
    /// How many facts of the batch in flight the draft has taken in.
    applied: usize,
    next: Next,
    max_messages: usize,
    /// Whether nothing more is to be decided.
    is_full: bool,
}

impl<'a> Ahead<'a> {
    fn of(state: &'a State, in_flight: &'a Batch, now: Timestamp, max_messages: usize) -> Self {
        let next = Batch::at(now).into();
        Self { in_flight, draft: Draft::new(state), applied: 0, next, max_messages, is_full: false }
    }

    /// How many of those that wait have a verdict, in flight or ahead.
    const fn decided(&self) -> usize {
        self.in_flight.verdicts.len() + self.next.batch.verdicts.len()
    }

    const fn has_work(&self, waiting: usize) -> bool {
        !self.is_full && (self.decided() < waiting || self.applied < self.in_flight.facts.len())
    }

    /// Does a little of what there is to do.
    fn go_on(&mut self, waiting: &VecDeque<Submission>) {
        let facts = &self.in_flight.facts[self.applied..];
        if !facts.is_empty() {
            let facts = &facts[..facts.len().min(AHEAD_AT_ONCE)];
            self.draft.apply(facts, self.in_flight.decided_at);
            self.applied += facts.len();
            return;
        }
        for submission in waiting.iter().skip(self.decided()).take(AHEAD_AT_ONCE) {
            // What was refused alone is tried alone.
            if submission.refused.is_some() || !self.next.batch.add(&mut self.draft, submission, self.max_messages) {
                self.is_full = true;
                return;
            }
        }
        self.is_full |= self.next.batch.verdicts.len() >= MAX_GROUP_COMMANDS;
    }

    /// Whether the batch will not change any more and can be sent.
    const fn is_ready(&self) -> bool {
        self.is_full && self.next.sending.is_none() && !self.next.batch.messages.is_empty()
    }
}

enum Verdict {
    Store { settled: Settled, first_event: EventId, last_message: usize },
    Settled(Outcome),
    Reject(CommandError),
}

impl<L: Ledger> Running<L> {
    async fn run(mut self, mut submissions: mpsc::Receiver<Submission>) -> Result<State, ReadError> {
        let mut waiting: VecDeque<Submission> = VecDeque::new();
        let mut taken = Vec::new();
        // Of the first of those that wait.
        let mut next: Option<Next> = None;
        loop {
            while let Ok(reply) = self.asked.try_recv() {
                let _ = reply.send(self.state.freeze());
            }
            let later = if next.is_none() { self.put_behind_until_due(&mut waiting) } else { None };
            if waiting.is_empty() || later.is_some() {
                if waiting.is_empty() {
                    self.progress.rests();
                }
                let idle = later.map_or(IDLE_CATCH_UP, |due| due.saturating_duration_since(Instant::now()));
                tokio::select! {
                    biased;
                    () = self.stop.cancelled() => break,
                    Some(reply) = self.asked.recv() => {
                        let _ = reply.send(self.state.freeze());
                        continue;
                    }
                    count = submissions.recv_many(&mut taken, MAX_GROUP_COMMANDS) => {
                        if count == 0 {
                            break;
                        }
                    }
                    () = tokio::time::sleep(idle) => {
                        observed::catches_up("idle");
                        self.catch_up(&mut waiting).await?;
                        if waiting.is_empty() && self.progress.is_failing() {
                            self.probe().await;
                        }
                        continue;
                    }
                }
            } else if let Some(room) = MAX_GROUP_COMMANDS.checked_sub(waiting.len()).filter(|room| *room > 0) {
                // What did not fit into the last batch goes first; the queue fills up behind it.
                while taken.len() < room {
                    match submissions.try_recv() {
                        Ok(submission) => taken.push(submission),
                        Err(_) => break,
                    }
                }
            }
            waiting.extend(taken.drain(..).filter(|submission| !submission.is_abandoned()));
            if self.stop.is_cancelled() {
                break;
            }
            if waiting.is_empty() {
                continue;
            }
            self.progress.waits();
            next = self.commit(next, &mut waiting, &mut submissions).await?;
        }
        submissions.close();
        for submission in waiting {
            submission.answer(Err(CommandError::Stopping));
        }
        while let Ok(submission) = submissions.try_recv() {
            submission.answer(Err(CommandError::Stopping));
        }
        Ok(self.state)
    }

    /// Stores `next`, or else decides the first of the waiting commands, as many as fit into a batch, and stores those.
    /// Whatever the outcome, the commands it settled are answered and the others are still waiting. Returns what was
    /// decided ahead meanwhile, of the first of those.
    async fn commit(
        &mut self,
        next: Option<Next>,
        waiting: &mut VecDeque<Submission>,
        submissions: &mut mpsc::Receiver<Submission>,
    ) -> Result<Option<Next>, ReadError> {
        let Next { mut batch, sending } = next.unwrap_or_else(|| self.decide(waiting).into());
        if batch.facts.is_empty() {
            // Saying no, or that all is so already, needs a fresh look: another writer may have changed it.
            let before = self.state.sequence();
            let mut fresh = true;
            if batch.verdicts.iter().any(Verdict::depends_on_freshness) {
                observed::catches_up("look");
                fresh = self.catch_up(waiting).await?;
            }
            if fresh && self.state.sequence() == before {
                self.isolation.settled(batch.verdicts.len());
                self.settle(batch, waiting, before);
                self.progress.moved(!waiting.is_empty());
            }
            return Ok(None);
        }
        let expected = self.state.sequence();
        let decisions = waiting.iter().take(batch.verdicts.len()).map(|submission| &submission.span);
        let observed = observed::Commit::begin(decisions, batch.facts.len(), batch.verdicts.len());
        let messages = std::mem::take(&mut batch.messages);
        let sending =
            sending.unwrap_or_else(|| observed.span().in_scope(|| Sending::begin(&self.ledger, messages, expected)));
        let (stored, ahead) = self.store(sending, &batch, waiting, submissions).instrument(observed.span()).await;
        observed.end(&stored);
        match stored {
            Ok(last) => {
                crash_point!("commit-after-ack");
                debug!(messages = batch.facts.len(), commands = batch.verdicts.len(), last, "committed");
                for (offset, fact) in batch.facts.iter().enumerate() {
                    self.state.evolve(expected + 1 + offset as u64, batch.decided_at, &fact.event, None);
                }
                self.known.send_replace(last);
                self.isolation.settled(batch.verdicts.len());
                self.settle(batch, waiting, expected);
                self.is_stored(waiting);
                Ok(ahead)
            }
            Err(problem) => {
                // What was decided ahead rests on what may not be there.
                if ahead.is_some_and(|ahead| ahead.sending.is_some()) {
                    self.fell = Some(Instant::now());
                }
                info!(%problem, expected, messages = batch.facts.len(), "not committed; catching up");
                if matches!(problem, AppendError::Unknown(_) | AppendError::Incomplete(_)) {
                    for (submission, verdict) in waiting.iter_mut().zip(&batch.verdicts) {
                        if let Verdict::Store { settled, first_event, .. } = verdict {
                            submission.note_try(*first_event, settled);
                        }
                    }
                }
                self.recover(problem, batch.verdicts.len(), waiting).await?;
                Ok(None)
            }
        }
    }

    /// Stores the batch, and meanwhile takes further commands in and decides them ahead.
    async fn store(
        &mut self,
        sending: Sending,
        batch: &Batch,
        waiting: &mut VecDeque<Submission>,
        submissions: &mut mpsc::Receiver<Submission>,
    ) -> (Result<u64, AppendError>, Option<Next>) {
        let Sending { go, mut answer } = sending;
        // Where nobody listens any more, the answer is there and says why.
        let _ = go.send(());
        let may_stage = self.fell.is_none_or(|fell| fell.elapsed() > STAGED_KEPT);
        let after = self.state.sequence() + batch.facts.len() as u64;
        let mut ahead = Ahead::of(&self.state, batch, (self.clock)(), self.max_batch_messages);
        ahead.is_full |= self.isolation.is_on();
        let mut taken = Vec::new();
        let mut open = true;
        let stored = loop {
            let room = MAX_GROUP_COMMANDS.saturating_sub(waiting.len() - batch.verdicts.len()).min(AHEAD_AT_ONCE);
            let takes = open && room > 0 && !ahead.is_full;
            tokio::select! {
                biased;
                stored = &mut answer => {
                    break stored.unwrap_or_else(|problem| Err(AppendError::Unknown(format!("sending failed: {problem}"))));
                }
                () = std::future::ready(()), if ahead.has_work(waiting.len()) => ahead.go_on(waiting),
                () = std::future::ready(()), if may_stage && ahead.is_ready() => {
                    let messages = std::mem::take(&mut ahead.next.batch.messages);
                    ahead.next.sending = Some(Sending::begin(&self.ledger, messages, after));
                }
                Some(reply) = self.asked.recv() => {
                    let _ = reply.send(self.state.freeze());
                }
                count = submissions.recv_many(&mut taken, room), if takes => {
                    open = count > 0;
                    waiting.extend(taken.drain(..).filter(|submission| !submission.is_abandoned()));
                }
            }
        };
        (stored, Some(ahead.next).filter(|next| !next.batch.verdicts.is_empty()))
    }

    async fn recover(
        &mut self,
        problem: AppendError,
        commands: usize,
        waiting: &mut VecDeque<Submission>,
    ) -> Result<(), ReadError> {
        let unanswered = waiting.len();
        if !matches!(problem, AppendError::Conflict(_)) {
            self.progress.failed(problem.to_string());
        }
        self.incomplete = if matches!(problem, AppendError::Incomplete(_)) { self.incomplete + 1 } else { 0 };
        observed::catches_up("retry");
        let caught_up = self.catch_up(waiting).await?;
        // Where some turned out to be stored, or nothing was learnt, the first ones are decided anew.
        let says_more = caught_up && waiting.len() == unanswered;
        match problem {
            AppendError::TooLarge { messages, .. } => {
                let smaller = (messages / 2).max(MIN_BATCH_MESSAGES);
                warn!(from = self.max_batch_messages, to = smaller, "the server takes smaller batches than configured");
                self.max_batch_messages = smaller;
            }
            AppendError::Refused { code, description } if says_more => {
                self.isolate(Refusal::Refused { code, description }, commands, waiting).await;
            }
            AppendError::Incomplete(description) if says_more && self.incomplete >= INCOMPLETE_PATIENCE => {
                let refusal = Refusal::Refused { code: BATCH_INCOMPLETE, description };
                self.isolate(refusal, commands, waiting).await;
            }
            // An id of the batch is stored, and not by a try of ours: a repeated admin command, for a repeated order is
            // known, or an id that two have. The server does not say which, so it is looked for.
            AppendError::Duplicate(description) if says_more => match waiting.front() {
                // Another replica stored it under the same key at the same time: now it is known, and its answer.
                Some(Submission { command: Command::Product(command), .. })
                    if command.fingerprint.is_some() && self.state.remembers(&command.command_id) => {}
                Some(first) if commands == 1 && first.is_repeated_command() => {
                    let repeated = waiting.pop_front().expect("there is a first");
                    repeated.answer(Err(Rejection::Repeated.into()));
                    self.isolation.settled(1);
                    self.progress.moved(!waiting.is_empty());
                }
                _ => self.isolate(Refusal::Identity { description }, commands, waiting).await,
            },
            AppendError::Refused { .. }
            | AppendError::Incomplete(_)
            | AppendError::Duplicate(_)
            | AppendError::Conflict(_)
            | AppendError::Unknown(_) => {}
        }
        Ok(())
    }

    /// Looks for the command that a batch of the first `commands` ones was refused for. Where it stands alone already, it is given
    /// up, or put behind the others, which show whether it is the command or the server.
    async fn isolate(&mut self, refusal: Refusal, commands: usize, waiting: &mut VecDeque<Submission>) {
        let cause = refusal.cause();
        if commands > 1 {
            self.isolation.refused(commands);
        } else {
            let now = Instant::now();
            let mut first = waiting.pop_front().expect("a batch settles somebody");
            let others_are_refused = waiting
                .iter()
                .any(|other| other.refused.as_ref().is_some_and(|refused| refused.refusal.is_like(&refusal)));
            let stored = self.stored;
            let refused = first.refused.get_or_insert_with(|| {
                let refusal = refusal.clone();
                Box::new(Refused { refusal, times: 0, since: now, stored_before: stored, again_at: now })
            });
            refused.times += 1;
            refused.again_at = now + TRY_AGAIN_AFTER;
            let others_are_stored = stored > refused.stored_before;
            let evidence = Evidence {
                times: refused.times,
                refused_for: now - refused.since,
                others_are_stored,
                others_are_refused,
                batches_are_taken: others_are_stored || cause == Cause::Unclear && self.takes_batches().await.is_ok(),
            };
            if is_given_up(&refusal, evidence) {
                error!(?refusal, ?evidence, command = %id_of(&first.command), "the ledger never takes what a command comes to");
                self.isolation.settled(1);
                first.answer(Err(refusal.into()));
                self.progress.moved(!waiting.is_empty());
                return;
            }
            self.isolation.put_behind();
            if cause == Cause::Server && evidence.times < SERVER_PATIENCE {
                waiting.push_front(first);
            } else {
                refused.refusal = refusal;
                waiting.push_back(first);
            }
        }
        if cause != Cause::Content {
            tokio::select! {
                () = self.stop.cancelled() => {}
                () = tokio::time::sleep(self.refused_pause) => {}
            }
            self.refused_pause = (self.refused_pause * 2).min(LAST_PAUSE);
        }
    }

    /// A batch was stored: the server takes what it is given.
    fn is_stored(&mut self, waiting: &mut VecDeque<Submission>) {
        self.stored += 1;
        self.incomplete = 0;
        self.progress.moved(!waiting.is_empty());
        if self.refused_pause > FIRST_PAUSE {
            self.refused_pause = FIRST_PAUSE;
            // Who was refused for the server's sake goes with the others again, but for those of whom that has been said often.
            let is_over =
                |refused: &Refused| refused.refusal.cause() == Cause::Server && refused.times <= SERVER_PATIENCE;
            for submission in waiting {
                submission.refused.take_if(|refused| is_over(refused));
            }
        }
    }

    /// Puts those of the first that were refused alone, and whose time has not come, behind the others. Returns when the first
    /// comes when there are no others.
    fn put_behind_until_due(&self, waiting: &mut VecDeque<Submission>) -> Option<Instant> {
        waiting.front()?.refused.as_ref()?;
        waiting.retain(|submission| submission.refused.is_none() || !submission.is_abandoned());
        let now = Instant::now();
        let not_due = |submission: &Submission| {
            submission.refused.as_ref().map(|refused| refused.again_at).filter(|at| *at > now)
        };
        let count = waiting.iter().take_while(|submission| not_due(submission).is_some()).count();
        if count == waiting.len() {
            return waiting.iter().filter_map(not_due).min();
        }
        waiting.rotate_left(count);
        None
    }

    /// Looks whether what went wrong is over.
    async fn probe(&self) {
        match self.takes_batches().await {
            Ok(()) => self.progress.moved(false),
            Err(problem) => self.progress.failed(problem),
        }
    }

    /// Asks the server to store what it cannot store, for it is expected far beyond the end of the ledger: that it says so, and
    /// nothing else, shows that it takes batches.
    async fn takes_batches(&self) -> Result<(), String> {
        let product_id = ProductId(uuid::Uuid::nil());
        let event = LedgerEvent::ProductUpdated(ProductUpdated {
            product_id,
            changed_fields: Vec::new(),
            updated_at: (self.clock)(),
        });
        let fact = Fact { event_id: EventId(uuid::Uuid::new_v4()), event };
        let payload = Encoder::default().encode(&envelope(&fact, (self.clock)()));
        let probe = message(&fact, payload, None);
        match self.ledger.append(&[probe], self.state.sequence() + PROBE_BEYOND).await {
            Err(AppendError::Conflict(_)) => Ok(()),
            Err(problem) => Err(problem.to_string()),
            Ok(last) => {
                error!(last, "the ledger stored what was expected beyond its end; run `lomash verify`");
                Ok(())
            }
        }
    }

    /// Decides the first of the waiting commands, as many as fit into a batch.
    fn decide(&mut self, waiting: &VecDeque<Submission>) -> Batch {
        let is_refused = |submission: &Submission| submission.refused.is_some();
        let most = if waiting.front().is_some_and(is_refused) { 1 } else { self.isolation.at_once() };
        let mut draft = Draft::new(&self.state);
        let mut batch = Batch::at((self.clock)());
        for (place, submission) in waiting.iter().take(most).enumerate() {
            if place > 0 && is_refused(submission) || !batch.add(&mut draft, submission, self.max_batch_messages) {
                break;
            }
        }
        batch
    }

    /// Answers the commands of a batch that is stored from `expected + 1` on, or needed no storing.
    fn settle(&self, batch: Batch, waiting: &mut VecDeque<Submission>, expected: u64) {
        let mut taken = 0;
        for verdict in batch.verdicts {
            let submission = waiting.pop_front().expect("there is a submission for each verdict");
            let answer = match verdict {
                Verdict::Store { settled, last_message, .. } => {
                    let facts = &batch.facts[std::mem::replace(&mut taken, last_message)..last_message];
                    let told = |fact: &&Fact| !matches!(fact.event, LedgerEvent::CommandAnswered(_));
                    let events = match submission.command {
                        Command::Order(_) => Vec::new(),
                        Command::Product(_) => facts
                            .iter()
                            .filter(told)
                            .map(|fact| envelope(fact, batch.decided_at).map(Clone::clone))
                            .collect(),
                    };
                    settled.map_err(Into::into).map(|outcome| {
                        let sequence = expected + last_message as u64;
                        Committed { outcome, sequence, events }
                    })
                }
                Verdict::Settled(outcome) => {
                    Ok(Committed { outcome, sequence: self.state.sequence(), events: Vec::new() })
                }
                Verdict::Reject(error) => Err(error),
            };
            submission.answer(answer);
        }
    }

    /// Catches up with the stream, however long the servers need to be reachable again, and answers the commands that
    /// turn out to be stored after all. False when it was stopped before it got there.
    async fn catch_up(&mut self, waiting: &mut VecDeque<Submission>) -> Result<bool, ReadError> {
        let mut tried: HashMap<EventId, usize> = HashMap::new();
        for (position, submission) in waiting.iter().enumerate() {
            tried.extend(submission.tried.iter().map(|(event, _)| (*event, position)));
        }
        let mut found: HashMap<usize, (Envelope<LedgerEvent>, u64)> = HashMap::new();
        let mut pause = FIRST_PAUSE;
        loop {
            let caught_up = catch_up(&self.ledger, &mut self.state, |message, envelope| {
                if let Some(envelope) = envelope
                    && let Some(position) = tried.get(&envelope.event_id)
                {
                    found.insert(*position, (envelope.clone(), message.sequence));
                }
            });
            match caught_up.await {
                Ok(()) => break,
                Err(problem) if problem.is_transient() => {
                    warn!(%problem, pause_ms = pause.as_millis(), "cannot catch up yet, trying again");
                    self.progress.failed(problem.to_string());
                    tokio::select! {
                        () = self.stop.cancelled() => return Ok(false),
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(LAST_PAUSE);
                }
                Err(problem) => return Err(problem),
            }
        }
        self.known.send_replace(self.state.sequence());
        self.progress.answered();
        if !found.is_empty() {
            let all = std::mem::take(waiting);
            for (position, submission) in all.into_iter().enumerate() {
                match found.remove(&position) {
                    None => waiting.push_back(submission),
                    Some((envelope, sequence)) => {
                        let answer = submission.outcome_of(&envelope, sequence).map_err(CommandError::from);
                        submission.answer(answer.map(|outcome| Committed { outcome, sequence, events: Vec::new() }));
                    }
                }
            }
        }
        Ok(true)
    }
}

impl From<Refusal> for CommandError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Refused { code, description } => Self::Unstorable { code, description },
            Refusal::Identity { description } => Self::IdentityTaken { description },
        }
    }
}

impl Verdict {
    /// An order decided before stays decided; every other answer without an event rests on the state being current.
    const fn depends_on_freshness(&self) -> bool {
        !matches!(
            self,
            Self::Settled(Outcome::AlreadyDecided | Outcome::Replayed { .. })
                | Self::Reject(CommandError::TooLarge { .. } | CommandError::Rejected(Rejection::KeyReused))
        )
    }
}

fn id_of(command: &Command) -> uuid::Uuid {
    match command {
        Command::Order(order) => order.order_id.0,
        Command::Product(command) => command.command_id,
    }
}

fn envelope(fact: &Fact, now: Timestamp) -> Envelope<&LedgerEvent> {
    Envelope {
        event_id: fact.event_id,
        event_type: fact.event.topic().event_type(),
        timestamp: now,
        version: Version::CURRENT,
        payload: &fact.event,
    }
}

fn message(fact: &Fact, payload: Bytes, carried: Option<Arc<Carried>>) -> NewMessage {
    NewMessage { subject: fact.event.subject().to_string(), event_id: fact.event_id, payload, carried }
}

/// Makes the payloads of a batch without an allocation for each: they share pages.
#[derive(Default)]
struct Encoder {
    one: Vec<u8>,
    page: BytesMut,
}

impl Encoder {
    /// Some 180 events.
    const PAGE_BYTES: usize = 64 << 10;

    fn encode(&mut self, envelope: &Envelope<&LedgerEvent>) -> Bytes {
        self.one.clear();
        codec::encode_into(ContentType::Json, envelope, &mut self.one);
        if self.page.capacity() < self.one.len() {
            self.page = BytesMut::with_capacity(Self::PAGE_BYTES.max(self.one.len()));
        }
        self.page.extend_from_slice(&self.one);
        self.page.split().freeze()
    }
}

#[cfg(test)]
#[path = "committer_tests.rs"]
mod tests;
