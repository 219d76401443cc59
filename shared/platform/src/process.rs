//! The frame of a service's process: logs and traces, signals, and the tasks it consists of.

use std::future::Future;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::metrics;
use crate::shutdown;
use crate::telemetry::{self, LogFormat};

/// What a service's `main` does: starts logs and traces as `name`, runs `service` until a signal or its own end, says how it
/// ended, and sends the last spans.
pub fn main<F>(name: &'static str, log_format: LogFormat, service: impl FnOnce(CancellationToken) -> F) -> ExitCode
where
    F: Future<Output = anyhow::Result<()>>,
{
    run(async {
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
    })
}

/// How long a process that is done waits for work that cannot be cancelled, such as the look-up of a name that no server
/// answers: it would keep the process for as long as the resolver is patient.
const LEFTOVERS_TIMEOUT: Duration = Duration::from_millis(200);

/// Runs a process's whole work on a runtime of its own, and ends with it.
pub fn run(work: impl Future<Output = ExitCode>) -> ExitCode {
    let runtime = match Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(problem) => {
            let _ = writeln!(std::io::stderr(), "error: no threads can be started: {problem}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(work);
    runtime.shutdown_timeout(LEFTOVERS_TIMEOUT);
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

    /// Adds a task that gets a thread of its own, for itself and what it spawns: so it does not wait for its turn among tasks that
    /// keep the threads of the process busy, which it would do each time that it waits for something.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn spawn_apart(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) -> anyhow::Result<()> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (mut ended, end) = oneshot::channel();
        let work = move || {
            runtime.block_on(async {
                tokio::select! {
                    outcome = task => drop(ended.send(outcome)),
                    // Nobody waits for it any more.
                    () = ended.closed() => {}
                }
            });
        };
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(work)
            .with_context(|| format!("no thread for {name}"))?;
        self.spawn(async move { end.await.unwrap_or_else(|_| bail!("{name} panicked")) });
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn name_of_its_thread() -> Option<String> {
        tokio::spawn(async { std::thread::current().name().map(str::to_owned) }).await.ok().flatten()
    }

    #[tokio::test]
    async fn a_task_apart_has_a_thread_of_its_own_and_its_end_is_heard() {
        let (name, named) = oneshot::channel();
        let mut tasks = Tasks::new();
        let task = async {
            let _ = name.send(name_of_its_thread().await);
            bail!("its reason")
        };
        tasks.spawn_apart("apart", task).expect("a thread");
        assert_eq!(named.await.expect("it runs").as_deref(), Some("apart"));
        assert_eq!(tasks.join(Ok(())).await.expect_err("it failed").to_string(), "its reason");
    }

    #[tokio::test]
    async fn a_task_apart_that_panics_is_heard_and_one_that_nobody_waits_for_ends() {
        let mut tasks = Tasks::new();
        tasks.spawn_apart("apart", async { panic!("on purpose") }).expect("a thread");
        assert_eq!(tasks.join(Ok(())).await.expect_err("it failed").to_string(), "apart panicked");

        let (held, dropped) = oneshot::channel::<()>();
        let mut tasks = Tasks::new();
        let task = async {
            std::future::pending::<()>().await;
            drop(held);
            Ok(())
        };
        tasks.spawn_apart("apart", task).expect("a thread");
        drop(tasks);
        assert!(dropped.await.is_err(), "what it held is dropped");
    }
}
