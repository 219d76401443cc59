//! What starts a run: a message in `JOBS`, put there by the server's own clock or by whoever asks for a run.
//!
//! The schedule is one message on [`SCHEDULE_SUBJECT`], see [`crate::schedule`]. The consumer lets one message be at work
//! at a time, so exactly one replica carries a tick out.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::NATS_MESSAGE_ID;
use async_nats::jetstream::Context;
use lomash_ledger::receive::{Delivery, Receive};
use lomash_ledger::streams;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::schedule::{Clock, JobsError, Schedule};

/// Where messages that start or continue a run are.
pub const SUBJECT: &str = "lomash.jobs.reconciliation";

/// Where the schedule is. A new one replaces the old one.
pub const SCHEDULE_SUBJECT: &str = "lomash.jobs.schedules.reconciliation";

/// Every six hours: seconds, minutes, hours, day of the month, month, day of the week; in UTC.
pub const DEFAULT_SCHEDULE: &str = "0 0 */6 * * *";

/// How often a run says that it is at work; a third of the consumer's `ack_wait`.
pub const IN_PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// Panics after which a run that panics is given up.
const MAX_PANICS: u64 = 3;

/// Runs that ticks start have ids in this namespace: `lomash.jobs.reconciliation` among the DNS names.
fn tick_namespace() -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_DNS, SUBJECT.as_bytes())
}

/// Makes the server's schedule the one given.
///
/// # Errors
/// [`JobsError`].
pub async fn set_up(context: &Context, schedule: &Schedule) -> Result<(), JobsError> {
    let clock = Clock {
        subject: SCHEDULE_SUBJECT,
        target: SUBJECT,
        payload: Job::default().encode(),
        variable: "RECONCILIATION_SCHEDULE",
    };
    clock.set(context, schedule).await
}

/// A message that starts or continues a run. What the run is asked to do is in its report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Job {
    /// The run; none in a tick of the schedule, which starts one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_id: Option<Uuid>,
}

impl Job {
    fn encode(&self) -> bytes::Bytes {
        serde_json::to_vec(self).unwrap_or_default().into()
    }

    /// Reads one.
    ///
    /// # Errors
    /// A sentence when it is none.
    pub fn parse(payload: &[u8]) -> Result<Self, String> {
        lomash_contract::objects::from_json(payload)
            .map_err(|problem| format!("the message is no job of ours: {problem}"))
    }

    /// Puts it into `JOBS`, and waits until it is stored. Twice under the same message id within the stream's window is
    /// once.
    ///
    /// # Errors
    /// [`JobsError::Unavailable`]; it may have been stored all the same.
    pub async fn publish(&self, context: &Context, message_id: String) -> Result<(), JobsError> {
        let mut headers = HeaderMap::new();
        headers.insert(NATS_MESSAGE_ID, message_id);
        let sent = context.publish_with_headers(SUBJECT, headers, self.encode()).await;
        let unavailable =
            |problem: async_nats::jetstream::context::PublishError| JobsError::Unavailable(problem.to_string());
        sent.map_err(unavailable)?.await.map_err(unavailable)?;
        Ok(())
    }
}

/// The run that a tick starts: the same one however often the tick is delivered.
#[must_use]
pub fn run_of_tick(tick: &Delivery) -> Uuid {
    let name = format!("{}/{}", tick.sequence, tick.stored_at.unix_timestamp_nanos());
    Uuid::new_v5(&tick_namespace(), name.as_bytes())
}

/// What runs are received by.
#[must_use]
pub const fn receive() -> Receive {
    Receive {
        stream: streams::JOBS,
        consumer: streams::RECONCILIATION,
        group: None,
        max_in_flight: 1,
        max_in_flight_bytes: 1,
        max_panics: MAX_PANICS,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tick_is_the_same_run_whenever_it_is_delivered() {
        let tick = |sequence, deliveries| Delivery {
            subject: SUBJECT.into(),
            headers: None,
            payload: Job::default().encode(),
            sequence,
            deliveries,
            stored_at: time::OffsetDateTime::UNIX_EPOCH,
        };
        assert_eq!(run_of_tick(&tick(7, 1)), run_of_tick(&tick(7, 2)));
        assert_ne!(run_of_tick(&tick(7, 1)), run_of_tick(&tick(8, 1)));
        assert_eq!(Job::parse(&tick(7, 1).payload), Ok(Job { run_id: None }));
        assert!(Job::parse(b"").is_err());
    }
}
