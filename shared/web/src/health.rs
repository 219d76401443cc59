//! Health: `/healthz` says that the process runs, `/readyz` says whether it should be given work, and why not.
//!
//! Each part of the process registers a [`Check`] and reports to it when its state changes; asking costs nothing and
//! waits for nobody. A part that has not reported yet is not ready. Details are for operators and hold no secrets:
//! both routes are open.

use std::sync::{Arc, RwLock};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

/// The state of all parts; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Health {
    shared: Arc<RwLock<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    stopping: bool,
    checks: Vec<CheckState>,
}

/// Whether the process should be given work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Readiness {
    /// Every required part is ready, and the process is not stopping.
    pub ready: bool,
    /// The process is stopping.
    pub stopping: bool,
    /// Each part.
    pub checks: Vec<CheckState>,
}

/// The state of one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct CheckState {
    /// Which part.
    pub name: String,
    /// Whether it does its work.
    pub ready: bool,
    /// Whether the process is of no use without it.
    pub required: bool,
    /// What there is to know.
    pub detail: String,
}

/// Where one part reports.
#[derive(Debug, Clone)]
pub struct Check {
    shared: Arc<RwLock<Shared>>,
    index: usize,
}

impl Health {
    /// No parts yet: ready.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Registers a part, which is not ready until it says so. Without a `required` one the process is not ready.
    #[must_use]
    pub fn check(&self, name: impl Into<String>, required: bool) -> Check {
        let mut shared = self.shared.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        shared.checks.push(CheckState { name: name.into(), ready: false, required, detail: "starting".to_owned() });
        Check { shared: self.shared.clone(), index: shared.checks.len() - 1 }
    }

    /// A token that is cancelled `delay` after `asked` is. From `asked` on the process says that it is not ready, and does all
    /// it did: whoever gives it work looks away before it stops.
    #[must_use]
    pub fn drop_first(&self, asked: CancellationToken, delay: Duration) -> CancellationToken {
        let stop = CancellationToken::new();
        let (health, stopping) = (self.clone(), stop.clone());
        tokio::spawn(async move {
            let ends = async {
                asked.cancelled().await;
                health.stopping();
                tokio::time::sleep(delay).await;
            };
            // The process may stop for a reason of its own, and that is no time to be patient.
            tokio::select! {
                () = ends => stopping.cancel(),
                () = stopping.cancelled() => health.stopping(),
            }
        });
        stop
    }

    /// From now on not ready, whatever the parts say.
    pub fn stopping(&self) {
        self.shared.write().unwrap_or_else(std::sync::PoisonError::into_inner).stopping = true;
    }

    /// The state of all parts at this moment.
    #[must_use]
    pub fn readiness(&self) -> Readiness {
        let shared = self.shared.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let parts_ready = shared.checks.iter().all(|check| check.ready || !check.required);
        Readiness { ready: parts_ready && !shared.stopping, stopping: shared.stopping, checks: shared.checks.clone() }
    }

    /// `GET /healthz` and `GET /readyz`, open to all.
    pub fn routes<S: Clone + Send + Sync + 'static>(&self) -> axum::Router<S> {
        axum::Router::new().route("/healthz", get(healthz)).route("/readyz", get(readyz)).with_state(self.clone())
    }
}

impl Check {
    /// The part does its work.
    pub fn ready(&self, detail: impl Into<String>) {
        self.report(true, detail.into());
    }

    /// The part does not do its work, and why.
    pub fn not_ready(&self, detail: impl Into<String>) {
        self.report(false, detail.into());
    }

    fn report(&self, ready: bool, detail: String) {
        let mut shared = self.shared.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(check) = shared.checks.get_mut(self.index) {
            check.ready = ready;
            check.detail = detail;
        }
    }
}

async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(health): State<Health>) -> Response {
    let readiness = health.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_that_every_required_part_is() {
        let health = Health::new();
        assert!(health.readiness().ready);
        let (ledger, cache) = (health.check("ledger", true), health.check("cache", false));
        assert!(!health.readiness().ready, "the ledger has not reported");
        ledger.ready("at 7");
        assert!(health.readiness().ready, "the cache is not required");
        cache.not_ready("redis does not answer");
        ledger.not_ready("nats does not answer");
        let readiness = health.readiness();
        assert!(!readiness.ready);
        assert_eq!(readiness.checks[1].detail, "redis does not answer");
        ledger.ready("at 8");
        health.stopping();
        assert!(!health.readiness().ready, "stopping comes first");
    }

    #[tokio::test(start_paused = true)]
    async fn ready_drops_before_anything_stops() {
        let delay = Duration::from_secs(7);
        let (health, asked) = (Health::new(), CancellationToken::new());
        let stop = health.drop_first(asked.clone(), delay);
        tokio::time::sleep(delay * 2).await;
        assert!(health.readiness().ready && !stop.is_cancelled(), "nobody asked");
        asked.cancel();
        tokio::time::sleep(delay - Duration::from_millis(1)).await;
        assert!(!health.readiness().ready && !stop.is_cancelled(), "it goes on");
        tokio::time::sleep(Duration::from_millis(2)).await;
        assert!(stop.is_cancelled());

        let (health, asked) = (Health::new(), CancellationToken::new());
        let stop = health.drop_first(asked, delay);
        stop.cancel();
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert!(!health.readiness().ready, "a process that ends by itself is not ready either");
    }
}
