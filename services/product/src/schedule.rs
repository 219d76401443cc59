//! Clocks in `JOBS`: jobs that the server starts by itself, so that no replica owns the clock.
//!
//! A clock is one message whose headers tell the server when to put a copy of it on the subject of a job. Every replica
//! sets it when it starts and finds it as it should be. Exactly one replica carries a tick out, because the job's consumer
//! lets one message be at work at a time.

use std::fmt;
use std::str::FromStr;

use async_nats::HeaderMap;
use async_nats::header::{NATS_SCHEDULE, NATS_SCHEDULE_TARGET};
use async_nats::jetstream::Context;
use async_nats::jetstream::context::PublishError;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::LastRawMessageErrorKind;
use bytes::Bytes;
use lomash_ledger::streams;

/// Longest expression of a schedule.
const MAX_SCHEDULE_CHARS: usize = 100;

/// Fields of a cron expression as the server reads it.
const CRON_FIELDS: usize = 6;

/// When a job starts by itself.
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
    "a schedule is `off`, six cron fields with seconds first such as `0 0 */6 * * *`, or `@daily`, `@every 1h` and the like"
)]
pub struct InvalidSchedule;

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

/// Why a schedule or a job could not be put into `JOBS`.
#[derive(Debug, thiserror::Error)]
pub enum JobsError {
    /// JetStream did not answer.
    #[error("the stream JOBS cannot be reached just now: {0}")]
    Unavailable(String),
    /// The server did not take the schedule.
    #[error("the server did not take the schedule `{schedule}`: {problem}; check {variable}")]
    Refused {
        /// The expression.
        schedule: String,
        /// The server's words.
        problem: String,
        /// Where the expression comes from.
        variable: &'static str,
    },
}

/// A job's clock.
#[derive(Clone, Debug)]
pub struct Clock {
    /// Where its message is. A new one replaces the old one.
    pub subject: &'static str,
    /// Where the ticks go.
    pub target: &'static str,
    /// What a tick says.
    pub payload: Bytes,
    /// The variable that sets it, for whoever has to mend it.
    pub variable: &'static str,
}

impl Clock {
    /// Makes the server's schedule the one given. What is as it should be is left alone, so that a replica that starts
    /// does not shift the clock of the others.
    ///
    /// # Errors
    /// [`JobsError`].
    pub async fn set(&self, context: &Context, schedule: &Schedule) -> Result<(), JobsError> {
        let unavailable = |problem: String| JobsError::Unavailable(problem);
        let stream =
            context.get_stream_no_info(streams::JOBS).await.map_err(|problem| unavailable(problem.to_string()))?;
        let present = match stream.get_last_raw_message_by_subject(self.subject).await {
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
        if present.is_some_and(|present| self.is_set(&present, expression)) {
            return Ok(());
        }
        let mut headers = HeaderMap::new();
        headers.insert(NATS_SCHEDULE, expression.as_str());
        headers.insert(NATS_SCHEDULE_TARGET, self.target);
        let refused = |problem: PublishError| JobsError::Refused {
            schedule: expression.clone(),
            problem: std::error::Error::source(&problem).map_or_else(|| problem.to_string(), ToString::to_string),
            variable: self.variable,
        };
        let sent = context.publish_with_headers(self.subject, headers, self.payload.clone()).await;
        sent.map_err(refused)?.await.map_err(refused)?;
        Ok(())
    }

    fn is_set(&self, present: &StreamMessage, expression: &str) -> bool {
        let header = |name: async_nats::HeaderName| present.headers.get(name).map(|value| value.as_str().to_owned());
        header(NATS_SCHEDULE).as_deref() == Some(expression)
            && header(NATS_SCHEDULE_TARGET).as_deref() == Some(self.target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_are_read() {
        for text in ["0 0 */6 * * *", "@daily", "@every 90m", " */2 * * * * * "] {
            assert_eq!(text.parse(), Ok(Schedule::At(text.trim().to_owned())));
        }
        assert_eq!("OFF".parse(), Ok(Schedule::Off));
        for text in ["", "* * * * *", "hourly", "@daily\r\nNats-Rollup: all", "@é"] {
            assert_eq!(text.parse::<Schedule>(), Err(InvalidSchedule), "{text:?}");
        }
    }
}
