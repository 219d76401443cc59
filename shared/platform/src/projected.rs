//! How far a projection is, and waiting until it is far enough: what lets a reader see its own write.
//!
//! Owns one number in this process. The projector announces it when it is active here; when it is active in another
//! replica, one of those who wait asks Postgres, for all of them, and nobody asks while nobody waits.
//!
//! Whoever asks for a sequence that the ledger does not have is not let wait ([`Waiting`]): it would take a place for nothing.
//!
//! The number is about the live schema as it was when somebody looked. A projection that was dropped or rolled back
//! stands lower than it did: whoever has waited still compares the sequence of the snapshot that it read.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use deadpool_postgres::Pool;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tracing::debug;
use uuid::Uuid;

use crate::places::{Full, Places};
use crate::postgres::Family;

/// Longest that a reader waits for the projection; beyond it "not yet" is the better answer.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two looks at the checkpoint while somebody waits and the projector is in another replica.
const POLL_PAUSE: Duration = Duration::from_millis(20);

/// Longest that one look may take: a Postgres that hangs must not keep the next waiter from trying.
const POLL_TIMEOUT: Duration = Duration::from_millis(500);

/// Readers that wait at once, each with a connection and a request.
pub const MAX_WAITING: usize = 256;

/// Those of one caller.
pub const MAX_WAITING_OF_ONE: usize = 64;

const _: () = assert!(MAX_WAITING_OF_ONE < MAX_WAITING, "one caller must not take all places");

/// Longest that the leader of the ledger may take to say where it ends. Without its word a reader waits like any other.
const END_TIMEOUT: Duration = Duration::from_millis(500);

const _: () = assert!(END_TIMEOUT.as_millis() < WAIT_TIMEOUT.as_millis(), "there must be time to wait");

/// The projection did not get there in time; it will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the projection is at sequence {reached} and not yet at {wanted}; try again in a moment")]
pub struct NotYetProjected {
    /// What was waited for.
    pub wanted: u64,
    /// How far the projection is, as far as this process knows.
    pub reached: u64,
}

/// How far the projection is. Clones are the same number.
#[derive(Clone)]
pub struct Projected {
    shared: Arc<Shared>,
}

struct Shared {
    pool: Pool,
    family: &'static Family,
    reached: watch::Sender<u64>,
    /// Whether the projector of this process is the active one.
    announced: AtomicBool,
    /// Held by the one waiter that asks Postgres for all.
    polling: Mutex<()>,
}

impl Projected {
    /// Nothing is known yet; `pool` leads to the live schema of `family`.
    #[must_use]
    pub fn new(pool: Pool, family: &'static Family) -> Self {
        let (reached, announced, polling) = (watch::Sender::new(0), AtomicBool::new(false), Mutex::new(()));
        Self { shared: Arc::new(Shared { pool, family, reached, announced, polling }) }
    }

    /// The highest checkpoint that this process has heard of; 0 when it has not heard of any.
    #[must_use]
    pub fn reached(&self) -> u64 {
        *self.shared.reached.borrow()
    }

    /// Waits until the projection is at `sequence` or beyond, at most [`WAIT_TIMEOUT`]. Returns how far it is.
    ///
    /// # Errors
    /// [`NotYetProjected`] when it does not get there in time, for whatever reason.
    pub async fn wait_for(&self, sequence: u64) -> Result<u64, NotYetProjected> {
        let mut reached = self.shared.reached.subscribe();
        let there = async {
            tokio::select! {
                biased;
                there = reached.wait_for(|reached| *reached >= sequence) => there.map(|reached| *reached).ok(),
                never = self.shared.poll() => match never {},
            }
        };
        match tokio::time::timeout(WAIT_TIMEOUT, there).await {
            Ok(Some(reached)) => Ok(reached),
            _ => Err(NotYetProjected { wanted: sequence, reached: self.reached() }),
        }
    }

    /// The live rows were seen at `checkpoint`, by a projector that is not the only one.
    pub fn saw(&self, checkpoint: u64) {
        self.shared.saw(checkpoint);
    }

    /// The projector of this process is the active one and stands at `checkpoint`, until the answer is dropped.
    #[must_use]
    pub fn announce(&self, checkpoint: u64) -> Announcer<'_> {
        // It may be lower than before: the schema was dropped or rolled back.
        self.shared.reached.send_replace(checkpoint);
        self.shared.announced.store(true, Ordering::Relaxed);
        Announcer(&self.shared)
    }
}

impl Shared {
    /// Looks at the checkpoint again and again, one caller at a time; the others wait for their turn in here.
    async fn poll(&self) -> std::convert::Infallible {
        let _turn = self.polling.lock().await;
        loop {
            if !self.announced.load(Ordering::Relaxed) {
                match tokio::time::timeout(POLL_TIMEOUT, self.checkpoint()).await {
                    // Only upwards: the projector of this process may have begun to announce meanwhile.
                    Ok(Ok(checkpoint)) => self.saw(checkpoint),
                    Ok(Err(problem)) => debug!(%problem, "the checkpoint cannot be read just now"),
                    Err(_) => debug!("Postgres does not tell the checkpoint in time"),
                }
            }
            tokio::time::sleep(POLL_PAUSE).await;
        }
    }

    fn saw(&self, checkpoint: u64) {
        self.reached.send_if_modified(|reached| {
            let further = checkpoint > *reached;
            *reached = (*reached).max(checkpoint);
            further
        });
    }

    async fn checkpoint(&self) -> Result<u64, String> {
        let client = self.pool.get().await.map_err(|problem| problem.to_string())?;
        let query = format!("SELECT sequence FROM {}.checkpoint WHERE projection = $1", self.family.live);
        let statement = client.prepare_cached(&query).await.map_err(|problem| problem.to_string())?;
        let row =
            client.query_one(&statement, &[&self.family.projection]).await.map_err(|problem| problem.to_string())?;
        Ok(row.get::<_, i64>(0).unsigned_abs())
    }
}

/// The active projector's end of [`Projected`].
pub struct Announcer<'p>(&'p Shared);

impl Announcer<'_> {
    /// The projection reached `checkpoint`.
    pub fn reached(&self, checkpoint: u64) {
        self.0.reached.send_replace(checkpoint);
    }
}

impl Drop for Announcer<'_> {
    fn drop(&mut self) {
        self.0.announced.store(false, Ordering::Relaxed);
    }
}

/// A sequence was asked for that the ledger does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("sequence {wanted} is beyond the end of the ledger, which is at {end}")]
pub struct BeyondTheEnd {
    /// What was asked for.
    pub wanted: u64,
    /// The last sequence of the ledger.
    pub end: u64,
}

/// Why a reader does not get what it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreached {
    /// Not yet.
    #[error(transparent)]
    NotYet(#[from] NotYetProjected),
    /// Nobody knows when: nothing is stored there.
    #[error(transparent)]
    BeyondTheEnd(#[from] BeyondTheEnd),
    /// Too many wait already.
    #[error("too many readers wait for the projection: {0}")]
    Full(#[from] Full),
}

/// Asks the leader of the ledger where it ends.
pub type AskEnd = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<u64, String>> + Send>> + Send + Sync>;

/// Readers that wait for the projection: so many in all and of one caller, and only for what the ledger has.
#[derive(Clone)]
pub struct Waiting {
    projected: Projected,
    places: Places<Uuid>,
    ledger: Arc<LedgerEnd>,
}

/// Where the ledger ends, as far as this process knows, and who may ask.
struct LedgerEnd {
    ask: AskEnd,
    known: AtomicU64,
    /// When the last question that was answered was asked; held while one is asked.
    asked: Mutex<Option<Instant>>,
}

impl Waiting {
    /// Nobody waits.
    #[must_use]
    pub fn new(projected: Projected, ask: AskEnd) -> Self {
        let ledger = LedgerEnd { ask, known: AtomicU64::new(0), asked: Mutex::new(None) };
        let places = Places::new(MAX_WAITING, MAX_WAITING_OF_ONE);
        Self { projected, places, ledger: Arc::new(ledger) }
    }

    /// The ledger is known to reach `sequence`: nobody needs to ask for that.
    pub fn saw_end(&self, sequence: u64) {
        self.ledger.known.fetch_max(sequence, Ordering::Relaxed);
    }

    /// Waits for `caller` until the projection is at `sequence`, at most [`WAIT_TIMEOUT`].
    ///
    /// # Errors
    /// [`Unreached`]; at once when the ledger does not reach so far, or there is no place.
    pub async fn reach(&self, caller: Uuid, sequence: u64) -> Result<u64, Unreached> {
        let reached = self.projected.reached();
        if reached >= sequence {
            return Ok(reached);
        }
        let _place = self.places.take(caller)?;
        if self.ledger.known.load(Ordering::Relaxed) < sequence {
            match self.end().await {
                Ok(end) if end < sequence => return Err(BeyondTheEnd { wanted: sequence, end }.into()),
                Ok(_) => {}
                // It may be there: whether the projection gets so far is the answer then.
                Err(problem) => debug!(problem, "the end of the ledger is not known just now"),
            }
        }
        Ok(self.projected.wait_for(sequence).await?)
    }

    /// The last sequence of the ledger, asked for after this was called. Many who ask at once share a question.
    ///
    /// # Errors
    /// Why the leader does not say.
    pub async fn end(&self) -> Result<u64, String> {
        let came = Instant::now();
        let mut asked = self.ledger.asked.lock().await;
        // What was asked for before this reader came may be older than what it was told of.
        if asked.is_some_and(|asked| asked >= came) {
            return Ok(self.ledger.known.load(Ordering::Relaxed));
        }
        let asks = Instant::now();
        let end = match tokio::time::timeout(END_TIMEOUT, (self.ledger.ask)()).await {
            Ok(answered) => answered?,
            Err(_) => return Err(format!("no answer within {} ms", END_TIMEOUT.as_millis())),
        };
        *asked = Some(asks);
        // A leader that was replaced may answer from its past; what was seen is there.
        Ok(self.ledger.known.fetch_max(end, Ordering::Relaxed).max(end))
    }
}

#[cfg(test)]
mod tests {
    use tokio::task::JoinSet;

    use super::*;
    use crate::Secret;

    /// Readers of a ledger that ends at `end`, of which nothing is projected; and how often its end was asked for.
    fn waiting(end: Option<u64>) -> (Waiting, Arc<AtomicU64>) {
        let pool = crate::postgres::pool(&Secret::from("postgres://nobody@127.0.0.1:1/nothing".to_owned()))
            .expect("a pool that connects to nothing yet");
        let questions = Arc::new(AtomicU64::new(0));
        let counted = questions.clone();
        let ask: AskEnd = Arc::new(move || {
            let counted = counted.clone();
            Box::pin(async move {
                counted.fetch_add(1, Ordering::Relaxed);
                // Long enough for others to come meanwhile.
                tokio::time::sleep(Duration::from_millis(10)).await;
                end.ok_or_else(|| "nobody answers".to_owned())
            })
        });
        (Waiting::new(Projected::new(pool, &crate::postgres::INVENTORY), ask), questions)
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_ledger_does_not_have_is_not_waited_for_and_questions_are_shared() {
        let (waiting, questions) = waiting(Some(7));
        let began = Instant::now();
        let mut readers = JoinSet::new();
        for caller in 0..MAX_WAITING as u128 {
            let waiting = waiting.clone();
            readers.spawn(async move { waiting.reach(Uuid::from_u128(caller), 8).await });
        }
        for outcome in readers.join_all().await {
            assert_eq!(outcome, Err(BeyondTheEnd { wanted: 8, end: 7 }.into()));
        }
        assert!(began.elapsed() < END_TIMEOUT, "{:?}", began.elapsed());
        // Those who came before the first question was asked, and those who came while it was.
        assert!(questions.load(Ordering::Relaxed) <= 2, "{questions:?}");
        assert_eq!(waiting.places.taken(), 0);
        // What is known of the ledger is not asked for.
        let asked = questions.load(Ordering::Relaxed);
        waiting.saw_end(8);
        assert!(matches!(waiting.reach(Uuid::nil(), 8).await, Err(Unreached::NotYet(_))));
        assert_eq!(questions.load(Ordering::Relaxed), asked);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_of_before_is_no_answer() {
        let (waiting, questions) = waiting(Some(7));
        for asked in 1..=3 {
            assert_eq!(waiting.end().await, Ok(7));
            assert_eq!(questions.load(Ordering::Relaxed), asked);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_takes_all_places_and_without_an_answer_it_is_not_yet() {
        let (waiting, _) = waiting(None);
        let greedy = Uuid::from_u128(1);
        let held: Vec<_> =
            (0..MAX_WAITING_OF_ONE).map(|_| waiting.places.take(greedy).expect("there is room")).collect();
        assert_eq!(waiting.reach(greedy, 1).await, Err(Full::One(MAX_WAITING_OF_ONE).into()));
        assert!(matches!(waiting.reach(Uuid::from_u128(2), 1).await, Err(Unreached::NotYet(_))));
        let others: Vec<_> = (MAX_WAITING_OF_ONE..MAX_WAITING)
            .map(|caller| waiting.places.take(Uuid::from_u128(100 + caller as u128)).expect("there is room"))
            .collect();
        assert_eq!(waiting.reach(Uuid::from_u128(3), 1).await, Err(Full::All(MAX_WAITING).into()));
        assert_eq!(waiting.reach(Uuid::from_u128(3), 0).await, Ok(0), "what is there takes no place");
        drop((held, others));
    }
}
