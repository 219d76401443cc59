//! Instants on the wire: RFC 3339, UTC, `Z`, milliseconds. Any offset and precision is read.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::format_description::well_known::Rfc3339;
use time::{OffsetDateTime, UtcOffset};

/// An instant in UTC with millisecond precision, the precision that the contract shows.
///
/// The envelope's timestamp is its producer's clock and orders nothing; order is the stream's sequence.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(OffsetDateTime);

/// Why a text is not a [`Timestamp`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an instant is written as RFC 3339, for example 2026-01-31T09:30:00.123Z")]
pub struct InvalidTimestamp;

impl Timestamp {
    /// The instant `at`, cut to milliseconds. Years outside 0 to 9999 cannot be written and become the Unix epoch.
    #[must_use]
    pub fn new(at: OffsetDateTime) -> Self {
        let at = at.checked_to_offset(UtcOffset::UTC).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let at = if (0..=9999).contains(&at.year()) { at } else { OffsetDateTime::UNIX_EPOCH };
        Self(at.replace_millisecond(at.millisecond()).unwrap_or(at))
    }

    /// The wall clock. The one place where a process of this project reads it for an envelope.
    #[must_use]
    pub fn now() -> Self {
        Self::new(OffsetDateTime::now_utc())
    }

    /// The instant as the `time` crate's type.
    #[must_use]
    pub const fn get(self) -> OffsetDateTime {
        self.0
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(at: OffsetDateTime) -> Self {
        Self::new(at)
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        let at = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| InvalidTimestamp)?;
        let utc = at.checked_to_offset(UtcOffset::UTC).ok_or(InvalidTimestamp)?;
        if (0..=9999).contains(&utc.year()) { Ok(Self::new(utc)) } else { Err(InvalidTimestamp) }
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (date, time) = (self.0.date(), self.0.time());
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            date.year(),
            u8::from(date.month()),
            date.day(),
            time.hour(),
            time.minute(),
            time.second(),
            time.millisecond()
        )
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Timestamp({self})")
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TimestampVisitor;
        impl Visitor<'_> for TimestampVisitor {
            type Value = Timestamp;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an RFC 3339 instant such as 2026-01-31T09:30:00.123Z")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Timestamp, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(TimestampVisitor)
    }
}
