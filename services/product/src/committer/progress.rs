//! Whether commands come to a decision: what `/readyz` says of the writer.
//!
//! Owns two moments. Since when something waits of which nothing was settled, and when the ledger answered last. A command that
//! nobody waits for any more is forgotten, but what kept it from being settled is not: only that the ledger takes something
//! again ends that.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long nothing may be settled while something waits, and how long the ledger may be silent, until this process says that it
/// is not ready: twice the time an append may take, so that one lost answer is no stall.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);

const _: () = assert!(STALLED_AFTER.as_millis() >= 2 * lomash_ledger::APPEND_TIMEOUT.as_millis());

/// See the module. Written once for each batch, not for each command.
#[derive(Debug)]
pub(super) struct Progress(Mutex<Standing>);

#[derive(Debug)]
struct Standing {
    waits_since: Option<Instant>,
    answered_at: Instant,
    problem: Option<String>,
}

impl Default for Progress {
    fn default() -> Self {
        Self(Mutex::new(Standing { waits_since: None, answered_at: Instant::now(), problem: None }))
    }
}

impl Progress {
    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something waits to be settled.
    pub(super) fn waits(&self) {
        let mut standing = self.standing();
        standing.waits_since.get_or_insert_with(Instant::now);
    }

    /// The ledger answered a read.
    pub(super) fn answered(&self) {
        self.standing().answered_at = Instant::now();
    }

    /// Commands were settled, or the ledger was seen to take what is sent.
    pub(super) fn moved(&self, something_waits: bool) {
        let now = Instant::now();
        *self.standing() = Standing { waits_since: something_waits.then_some(now), answered_at: now, problem: None };
    }

    /// Nothing waits any more, and nothing went wrong with what waited.
    pub(super) fn rests(&self) {
        let mut standing = self.standing();
        if standing.problem.is_none() {
            standing.waits_since = None;
        }
    }

    /// Something went wrong.
    pub(super) fn failed(&self, problem: String) {
        let mut standing = self.standing();
        standing.waits_since.get_or_insert_with(Instant::now);
        standing.problem = Some(problem);
    }

    /// Whether something went wrong since commands were settled last.
    pub(super) fn is_failing(&self) -> bool {
        self.standing().problem.is_some()
    }

    /// Why this process decides nothing, when that is so for [`STALLED_AFTER`].
    pub(super) fn stall(&self) -> Option<String> {
        let standing = self.standing();
        let waited = standing.waits_since.map(|since| since.elapsed()).filter(|waited| *waited >= STALLED_AFTER);
        let silent = Some(standing.answered_at.elapsed()).filter(|silent| *silent >= STALLED_AFTER);
        let why = standing.problem.as_deref().unwrap_or("the ledger does not answer");
        match (waited, silent) {
            (Some(waited), _) => Some(format!("nothing was decided for {} s: {why}", waited.as_secs())),
            (None, Some(silent)) => Some(format!("the ledger has not answered for {} s: {why}", silent.as_secs())),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn after(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_stall_is_ten_seconds_without_a_decision_or_an_answer() {
        let progress = Progress::default();
        after(9).await;
        assert_eq!(progress.stall(), None);
        after(1).await;
        assert!(progress.stall().is_some_and(|why| why.contains("not answered for 10 s")));
        progress.answered();
        assert_eq!(progress.stall(), None, "nothing waits, and the ledger answers");
        progress.waits();
        after(5).await;
        progress.failed("the disk is full".to_owned());
        progress.waits();
        after(5).await;
        progress.answered();
        assert_eq!(progress.stall().as_deref(), Some("nothing was decided for 10 s: the disk is full"));
        progress.rests();
        assert!(progress.stall().is_some(), "whoever waited went away, and the disk is full still");
        progress.moved(true);
        after(9).await;
        progress.moved(false);
        after(5).await;
        assert_eq!(progress.stall(), None);
    }
}
