//! What starts a run: a message in `JOBS`, put there by the server's own clock or by whoever asks for a run.
//!
//! The schedule is one message on [`SCHEDULE_SUBJECT`] whose headers tell the server when to put a copy of it on
//! [`SUBJECT`]. Every replica sets it up when it starts and finds it as it should be; no replica owns the clock. The
//! consumer lets one message be at work at a time, so exactly one replica carries a tick out.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::header::{NATS_MESSAGE_ID, NATS_SCHEDULE, NATS_SCHEDULE_TARGET};
use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use lomash_ledger::receive::{Delivery, Receive};
use lomash_ledger::streams;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

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

/// Longest expression of a schedule.
const MAX_SCHEDULE_CHARS: usize = 100;

/// Fields of a cron expression as the server reads it.
const CRON_FIELDS: usize = 6;

/// Runs that ticks start have ids in this namespace: `lomash.jobs.reconciliation` among the DNS names.
fn tick_namespace() -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_DNS, SUBJECT.as_bytes())
}

/// When runs start by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// Never.
    Off,
    /// By this expression: six cron fields, or one of the server's words such as `@daily` or `@every 1h`.
    At(String),
}

/// Why a text is no [`Schedule`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a schedule is `off`, six cron fields with seconds first such as `{DEFAULT_SCHEDULE}`, or `@daily`, `@every 1h` and the like"
)]
pub struct InvalidSchedule;

impl Default for Schedule {
    fn default() -> Self {
        Self::At(DEFAULT_SCHEDULE.to_owned())
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::At(expression) => expression,
        })
    }
}

impl FromStr for Schedule {
    type Err = InvalidSchedule;

    /// Only what could not travel in a header or is clearly something else is refused here; the server reads the fields.
    fn from_str(text: &str) -> Result<Self, InvalidSchedule> {
        let text = text.trim();
        if text.eq_ignore_ascii_case("off") {
            return Ok(Self::Off);
        }
        let is_plain = text.len() <= MAX_SCHEDULE_CHARS && text.chars().all(|letter| matches!(letter, ' '..='~'));
        let is_known = text.starts_with('@') || text.split_ascii_whitespace().count() == CRON_FIELDS;
        if is_plain && is_known { Ok(Self::At(text.to_owned())) } else { Err(InvalidSchedule) }
    }
}

/// Why the schedule or a run could not be put into `JOBS`.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    /// JetStream did not answer.
    #[error("the stream JOBS cannot be reached just now: {0}")]
    Unavailable(String),
    /// The server did not take the schedule.
    #[error("the server did not take the schedule `{schedule}`: {problem}; check RECONCILIATION_SCHEDULE")]
    Refused {
        /// The expression.
        schedule: String,
        /// The server's words.
        problem: String,
    },
}

/// Makes the server's schedule the one given. What is as it should be is left alone, so that a replica that starts does
/// not shift the clock of the others.
///
/// # Errors
/// [`JobsError`].
pub async fn set_up(context: &Context, schedule: &Schedule) -> Result<(), JobsError> {
    let unavailable = |problem: String| JobsError::Unavailable(problem);
    let stream = context.get_stream_no_info(streams::JOBS).await.map_err(|problem| unavailable(problem.to_string()))?;
    let present = match stream.get_last_raw_message_by_subject(SCHEDULE_SUBJECT).await {
        Ok(message) => Some(message),
        Err(problem) if problem.kind() == LastRawMessageErrorKind::NoMessageFound => None,
        Err(problem) => return Err(unavailable(problem.to_string())),
    };
    let expression = match schedule {
        // As the message that it is, by its sequence: the service may not purge, which could take more than it means.
        Schedule::Off => {
            let Some(present) = present else { return Ok(()) };
            let deleted = stream.delete_message(present.sequence).await;
            return deleted.map(|_| ()).map_err(|problem| unavailable(problem.to_string()));
        }
        Schedule::At(expression) => expression,
    };
    if present.is_some_and(|present| is_set(&present, expression)) {
        return Ok(());
    }
    let mut headers = HeaderMap::new();
    headers.insert(NATS_SCHEDULE, expression.as_str());
    headers.insert(NATS_SCHEDULE_TARGET, SUBJECT);
    let refused = |problem: async_nats::jetstream::context::PublishError| JobsError::Refused {
        schedule: expression.clone(),
        problem: std::error::Error::source(&problem).map_or_else(|| problem.to_string(), ToString::to_string),
    };
    let sent = context.publish_with_headers(SCHEDULE_SUBJECT, headers, Job::default().encode()).await;
    sent.map_err(refused)?.await.map_err(refused)?;
    Ok(())
}

fn is_set(present: &StreamMessage, expression: &str) -> bool {
    let header = |name: async_nats::HeaderName| present.headers.get(name).map(|value| value.as_str().to_owned());
    header(NATS_SCHEDULE).as_deref() == Some(expression) && header(NATS_SCHEDULE_TARGET).as_deref() == Some(SUBJECT)
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
        serde_json::from_slice(payload).map_err(|problem| format!("the message is no job of ours: {problem}"))
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
    fn schedules_are_read() {
        for text in [DEFAULT_SCHEDULE, "@daily", "@every 90m", " */2 * * * * * "] {
            assert_eq!(text.parse(), Ok(Schedule::At(text.trim().to_owned())));
        }
        assert_eq!("OFF".parse(), Ok(Schedule::Off));
        for text in ["", "* * * * *", "hourly", "@daily\r\nNats-Rollup: all", "@é"] {
            assert_eq!(text.parse::<Schedule>(), Err(InvalidSchedule), "{text:?}");
        }
    }

    #[test]
    fn a_tick_is_the_same_run_whenever_it_is_delivered() {
        let tick = |sequence, deliveries| Delivery {
            subject: SUBJECT.to_owned(),
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
