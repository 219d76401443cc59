//! How far a projection is, and waiting until it is far enough: what lets a reader see its own write.
//!
//! Owns one number in this process. The projector announces it when it is active here; when it is active in another
//! replica, one of those who wait asks Postgres, for all of them, and nobody asks while nobody waits.
//!
//! The number is about the live schema as it was when somebody looked. A projection that was dropped or rolled back
//! stands lower than it did: whoever has waited still compares the sequence of the snapshot that it read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_postgres::Pool;
use tokio::sync::{Mutex, watch};
use tracing::debug;

use crate::postgres::Family;

/// Longest that a reader waits for the projection; beyond it "not yet" is the better answer.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause between two looks at the checkpoint while somebody waits and the projector is in another replica.
const POLL_PAUSE: Duration = Duration::from_millis(20);

/// Longest that one look may take: a Postgres that hangs must not keep the next waiter from trying.
const POLL_TIMEOUT: Duration = Duration::from_millis(500);

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
