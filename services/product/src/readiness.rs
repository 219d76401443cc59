//! What `/readyz` says of the product service: one task that looks at its parts again and again.
//!
//! The ledger is ready while commands that wait come to a decision, and while it answers when none do; a connection alone says
//! nothing of that. Only the ledger is required: without Postgres and Redis orders are decided and stock is changed, and reads say so.

use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use deadpool_postgres::Pool;
use lomash_web::Health;
use lomash_web::health::Check;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::committer::Committer;
use crate::projection;

/// How often the parts are looked at.
const EVERY: Duration = Duration::from_secs(1);

/// How long Postgres may take to answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The parts, as they are reported.
#[derive(Debug)]
pub struct Checks {
    ledger: Check,
    projection: Check,
    cache: Check,
}

/// The parts themselves.
pub struct Watched {
    /// The connection to the ledger.
    pub client: Client,
    /// Connections to the projection.
    pub pool: Pool,
    /// Whoever knows how far the ledger is.
    pub committer: Committer,
    /// The cache, if there is a Redis for it.
    pub cache: Option<Cache>,
}

impl Checks {
    /// Registers the parts; none is ready yet.
    #[must_use]
    pub fn register(health: &Health) -> Self {
        Self {
            ledger: health.check("ledger", true),
            projection: health.check("projection", false),
            cache: health.check("cache", false),
        }
    }

    /// Looks until `stop`.
    ///
    /// # Errors
    /// Never; it is a task of the process like the others.
    pub async fn watch(self, parts: Watched, stop: CancellationToken) -> anyhow::Result<()> {
        loop {
            self.look(&parts).await;
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(EVERY) => {}
            }
        }
    }

    async fn look(&self, Watched { client, pool, committer, cache }: &Watched) {
        match (client.connection_state(), committer.stall()) {
            (State::Connected, None) => self.ledger.ready(format!("at {}", committer.sequence())),
            (State::Connected, Some(why)) => self.ledger.not_ready(why),
            (state, _) => self.ledger.not_ready(format!("no connection to NATS ({state})")),
        }
        match tokio::time::timeout(TIMEOUT, projection::look(pool)).await {
            Ok(Ok(checkpoint)) => self.projection.ready(format!("at {checkpoint}")),
            Ok(Err(problem)) => self.projection.not_ready(problem.to_string()),
            Err(_) => self.projection.not_ready("Postgres does not answer"),
        }
        match cache.as_ref().map(|cache| cache.counters().fallback) {
            None => self.cache.not_ready("there is no REDIS_URL; reads come from Postgres"),
            Some(true) => self.cache.not_ready("Redis does not answer in time; reads come from Postgres"),
            Some(false) => self.cache.ready("Redis answers"),
        }
    }
}
