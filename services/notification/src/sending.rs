//! Sending the mails that are due: a few tasks, each with a connection of its own.
//!
//! A mail that the server does not take now is put off with growing pauses, and the others go on. When the server itself cannot
//! be used no mail is touched; the task waits with growing pauses. Nothing is given up but what the server refuses for good.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, warn};

use crate::alerts::{Alerts, Attempt};
use crate::mail::{self, Letterhead};
use crate::mailer::{Connection, Mailer, Outcome};
use crate::observed;

/// Most tasks: mail servers limit the connections of one client.
pub const MAX_CONNECTIONS: u32 = 16;

/// Most mails a second that can be asked for.
pub const MAX_RATE: u32 = 10_000;

/// Pause before a mail is tried again after its first failure; doubles with each.
pub const FIRST_RETRY: Duration = Duration::from_secs(1);
/// The longest.
pub const LAST_RETRY: Duration = Duration::from_secs(15 * 60);

/// Pauses while the server or Postgres cannot be used, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(30);

/// How often mails are looked for that became due by themselves, or that another replica recorded.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a mail that is on its way may take once the service stops: a supervisor's patience is limited.
const STOP_PATIENCE: Duration = Duration::from_secs(5);

/// A connection that had nothing to do for so long is closed.
const IDLE_CLOSE: Duration = Duration::from_secs(20);

/// A connection that had nothing to do for so long is asked whether it still works.
const IDLE_CHECK: Duration = Duration::from_secs(1);

/// What all the tasks share. Clones are the same.
#[derive(Clone)]
pub struct Sending {
    alerts: Alerts,
    mailer: Arc<Mailer>,
    letterhead: Arc<Letterhead>,
    pace: Arc<tokio::sync::Mutex<Interval>>,
    condition: Arc<Mutex<Option<Result<(), String>>>>,
}

struct Worker {
    shared: Sending,
    connection: Option<(Connection, Instant)>,
}

/// What one turn came to.
enum Turn {
    /// A mail was settled.
    Sent,
    /// None is due.
    Idle,
}

impl Sending {
    /// Sends what `alerts` has due through `mailer`, at most `rate` mails a second.
    #[must_use]
    pub fn new(alerts: Alerts, mailer: Mailer, letterhead: Letterhead, rate: u32) -> Self {
        let mut pace = tokio::time::interval(Duration::from_secs(1) / rate.clamp(1, MAX_RATE));
        // A quiet time earns no burst.
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            alerts,
            mailer: Arc::new(mailer),
            letterhead: Arc::new(letterhead),
            pace: Arc::new(tokio::sync::Mutex::new(pace)),
            condition: Arc::default(),
        }
    }

    /// Whether the mail server could be used the last time: None before the first time.
    #[must_use]
    pub fn condition(&self) -> Option<Result<(), String>> {
        self.condition.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn found(&self, condition: Result<(), String>) {
        *self.condition.lock().unwrap_or_else(PoisonError::into_inner) = Some(condition);
    }

    /// Sends until `stop`. A mail that is on its way then is finished, if the server is not slow.
    ///
    /// # Errors
    /// Never; it is a task of the process like the others.
    pub async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut worker = Worker { shared: self, connection: None };
        let mut pause = FIRST_PAUSE;
        // To know at start whether the server can be used.
        let mut outcome = worker.greet().await;
        while !stop.is_cancelled() {
            match outcome {
                Ok(Turn::Sent) => pause = FIRST_PAUSE,
                Ok(Turn::Idle) => {
                    pause = FIRST_PAUSE;
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(LOOK_EVERY) => {}
                        () = worker.shared.alerts.news().published.notified() => {}
                    }
                }
                Err(problem) => {
                    warn!("{problem:#}; trying again in {} ms", pause.as_millis());
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(pause) => {}
                    }
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
            let patience = async {
                stop.cancelled().await;
                tokio::time::sleep(STOP_PATIENCE).await;
            };
            outcome = tokio::select! {
                outcome = worker.turn() => outcome,
                () = patience => {
                    warn!("a mail that was on its way is given up and may be sent twice");
                    break;
                }
            };
        }
        if let Some((connection, _)) = worker.connection.take() {
            connection.quit().await;
        }
        Ok(())
    }
}

impl Worker {
    /// The connection, made if there is none that works.
    async fn connected(&mut self) -> anyhow::Result<Connection> {
        if let Some((mut connection, since)) = self.connection.take()
            && (since.elapsed() < IDLE_CHECK || connection.is_alive().await)
        {
            return Ok(connection);
        }
        let connected = self.shared.mailer.connect().await;
        self.shared.found(connected.as_ref().map(|_| ()).map_err(Clone::clone));
        connected.map_err(anyhow::Error::msg)
    }

    /// Connects without having anything to send.
    async fn greet(&mut self) -> anyhow::Result<Turn> {
        let connection = self.connected().await?;
        self.connection = Some((connection, Instant::now()));
        Ok(Turn::Idle)
    }

    /// Sends the next mail that is due.
    async fn turn(&mut self) -> anyhow::Result<Turn> {
        let alerts = self.shared.alerts.clone();
        let mut client = alerts.client().await?;
        let Some(claimed) = alerts.next_mail(&mut client).await? else {
            if let Some((connection, since)) = self.connection.take() {
                if since.elapsed() < IDLE_CLOSE {
                    self.connection = Some((connection, since));
                } else {
                    connection.quit().await;
                }
            }
            return Ok(Turn::Idle);
        };
        let attempt = match mail::write(&self.shared.letterhead, claimed.mail_id, &claimed.mail) {
            Err(problem) => Attempt::Failed(format!("the mail cannot be written: {problem}")),
            Ok(written) => {
                let mut connection = self.connected().await?;
                self.shared.pace.lock().await.tick().await;
                lomash_ledger::crash_point!("notify-before-send");
                let sending =
                    observed::Send::begin(&claimed.mail, &written.message_id, &self.shared.mailer.to_string());
                let outcome = connection.send(&written).instrument(sending.span()).await;
                sending.end(&outcome);
                lomash_ledger::crash_point!("notify-after-send");
                match outcome {
                    Outcome::Accepted { refused } => {
                        self.connection = Some((connection, Instant::now()));
                        Attempt::Sent(refused)
                    }
                    Outcome::Refused(problem) => Attempt::Failed(problem),
                    Outcome::Deferred(problem) => Attempt::Later(retry_after(claimed.attempts), problem),
                }
            }
        };
        let mail_id = claimed.mail_id;
        match &attempt {
            Attempt::Sent(None) => debug!(mail.id = %mail_id, "sent"),
            Attempt::Sent(Some(refused)) => warn!(mail.id = %mail_id, refused, "sent, but not to all"),
            Attempt::Failed(problem) => warn!(mail.id = %mail_id, problem, "refused for good"),
            Attempt::Later(pause, problem) => {
                info!(mail.id = %mail_id, problem, again_in_seconds = pause.as_secs(), "put off");
            }
        }
        claimed.settle(&attempt).await.context("a mail was sent and that could not be recorded; it is sent again")?;
        lomash_ledger::crash_point!("notify-after-mail-recorded");
        Ok(Turn::Sent)
    }
}

/// How long a mail waits that has failed `attempts` times before this one.
fn retry_after(attempts: u32) -> Duration {
    FIRST_RETRY.saturating_mul(2_u32.saturating_pow(attempts)).min(LAST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end_growing() {
        let seconds: Vec<u64> =
            [0, 1, 2, 9, 10, 31, 32, u32::MAX].map(|attempts| retry_after(attempts).as_secs()).into();
        assert_eq!(seconds, [1, 2, 4, 512, 900, 900, 900, 900]);
    }
}
