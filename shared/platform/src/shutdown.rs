//! Stopping on Ctrl-C and SIGTERM.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::waiting;

/// A token that is cancelled by the first SIGINT or SIGTERM.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn token() -> std::io::Result<CancellationToken> {
    let token = CancellationToken::new();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let cancel = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => info!("interrupted, stopping"),
            _ = terminate.recv() => info!("asked to stop"),
        }
        cancel.cancel();
    });
    Ok(token)
}

/// Does `work` unless `stop` is cancelled before it is done: then it is dropped where it stands, and `None` comes at once.
/// For what may take long at start, where nothing was taken in that would have to be brought to an end.
///
/// # Errors
/// What the work fails with.
pub async fn unless<T>(
    stop: &CancellationToken,
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<Option<T>> {
    tokio::select! {
        biased;
        interrupted = interruption(stop) => {
            info!("stopped before it was ready: {interrupted}");
            Ok(None)
        }
        done = work => done.map(Some),
    }
}

/// Waits until `stop` is cancelled, and says how to call it: with what this process waited for at that moment. To be one of the
/// futures of a `select!`, whose others are dropped before it goes on.
pub async fn interruption(stop: &CancellationToken) -> String {
    stop.cancelled().await;
    waiting::told().map_or_else(|| "interrupted".to_owned(), |what| format!("interrupted while waiting for {what}"))
}
