//! The frame of a service's process: logs and traces, signals, and the tasks it consists of.

use std::future::Future;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::metrics;
use crate::shutdown;
use crate::telemetry::{self, LogFormat};

/// What a service's `main` does: starts logs and traces as `name`, runs `service` until a signal or its own end, says how it
/// ended, and sends the last spans.
pub async fn main<F>(
    name: &'static str,
    log_format: LogFormat,
    service: impl FnOnce(CancellationToken) -> F,
) -> ExitCode
where
    F: Future<Output = anyhow::Result<()>>,
{
    let telemetry = telemetry::start(name, log_format, telemetry::SERVICE_FILTER);
    metrics::tell_build(name);
    let ended = match shutdown::token() {
        Ok(stop) => service(stop).await,
        Err(error) => Err(error.into()),
    };
    let code = match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    };
    telemetry.stop().await;
    code
}

/// The tasks of a service, none of which may end before it is told to: the first one that does ends the process, and a
/// supervisor starts it again.
#[derive(Debug, Default)]
pub struct Tasks(JoinSet<anyhow::Result<()>>);

impl Tasks {
    /// No tasks yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task that cannot fail.
    pub fn run(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(async {
            task.await;
            Ok(())
        });
    }

    /// Adds a task.
    pub fn spawn(&mut self, task: impl Future<Output = anyhow::Result<()>> + Send + 'static) {
        self.0.spawn(task);
    }

    /// Returns when `stop` is cancelled, or with an error when a task ends before.
    ///
    /// # Errors
    /// How the task ended.
    pub async fn until(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            Some(ended) = self.0.join_next() => {
                flat(ended)?;
                bail!("a task ended by itself")
            }
        }
    }

    /// Waits until all have ended; they must have been told to. Returns `outcome`, or the first error among them.
    ///
    /// # Errors
    /// As said.
    pub async fn join(mut self, mut outcome: anyhow::Result<()>) -> anyhow::Result<()> {
        while let Some(ended) = self.0.join_next().await {
            outcome = outcome.and(flat(ended));
        }
        outcome
    }
}

fn flat(ended: Result<anyhow::Result<()>, JoinError>) -> anyhow::Result<()> {
    ended.context("a task panicked").and_then(|ended| ended)
}
