//! As of which sequence of the ledger an answer is, and how old it may be: `Lomash-Sequence` and `Lomash-Min-Sequence`.

use axum::Json;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use lomash_platform::places::Full;
use lomash_platform::projected::{NotYetProjected, Unreached};
use serde::Serialize;

use crate::extract::single_header;
use crate::problem::{NOT_YET_PROJECTED, Problem, sentence};

/// The sequence that an answer shows.
pub static LOMASH_SEQUENCE: HeaderName = HeaderName::from_static("lomash-sequence");

/// The sequence that an answer must not be older than.
pub const LOMASH_MIN_SEQUENCE: &str = "lomash-min-sequence";

/// Seconds after which a read is worth trying again.
pub const RETRY_AFTER_SECONDS: u64 = 1;

/// The sequence that the answer must not be older than.
///
/// # Errors
/// 400 when it is none.
pub fn min_sequence(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(text) = single_header(headers, LOMASH_MIN_SEQUENCE)? else { return Ok(None) };
    let bad =
        || Problem::invalid_header(LOMASH_MIN_SEQUENCE, "must be a sequence of the ledger, as in Lomash-Sequence");
    sequence(text).map(Some).ok_or_else(bad)
}

/// A sequence of the ledger, in digits alone; those beyond what is stored as a signed number are none.
#[must_use]
pub fn sequence(text: &str) -> Option<u64> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|sequence| digits && i64::try_from(*sequence).is_ok())
}

/// An answer as of a sequence.
pub fn told(sequence: u64, body: &impl Serialize) -> Response {
    let mut response = Json(body).into_response();
    response.headers_mut().insert(LOMASH_SEQUENCE.clone(), HeaderValue::from(sequence));
    response
}

/// How many entries a page has: what was asked for, or `default`.
///
/// # Errors
/// 400 beyond `most`.
pub fn page_limit(limit: Option<u16>, default: u16, most: u16) -> Result<u16, Problem> {
    let limit = limit.unwrap_or(default);
    let fits = (1..=most).contains(&limit);
    if fits { Ok(limit) } else { Err(Problem::invalid_parameter("limit", format!("must be from 1 to {most}"))) }
}

/// 503: the projection is not where it was asked to be.
#[must_use]
pub fn not_yet_projected(not_yet: NotYetProjected) -> Problem {
    Problem::new(&NOT_YET_PROJECTED, sentence(&not_yet.to_string()))
        .with("wanted", not_yet.wanted)
        .with("reached", not_yet.reached)
        .with_retry_after(RETRY_AFTER_SECONDS)
}

/// What a reader is told that does not get what it waits for.
#[must_use]
pub fn unreached(why: Unreached) -> Problem {
    match why {
        Unreached::NotYet(not_yet) => not_yet_projected(not_yet),
        Unreached::BeyondTheEnd(beyond) => {
            let end = beyond.end;
            let detail = format!("is beyond the end of the ledger, which is at {end}: nothing is stored there");
            Problem::invalid_header(LOMASH_MIN_SEQUENCE, detail).with("end", end)
        }
        Unreached::Full(full) => no_place(full, "readers that wait for the projection", RETRY_AFTER_SECONDS),
    }
}

/// 429 when the caller has all the places that one may have, 503 when there are none; `what` takes them.
#[must_use]
pub fn no_place(full: Full, what: &str, retry_after_seconds: u64) -> Problem {
    match full {
        Full::One(most) => {
            Problem::too_many_requests(format!("A caller may have {most} {what} at once."), retry_after_seconds)
        }
        Full::All(most) => {
            Problem::unavailable(format!("There are {most} {what} already; try again later."), retry_after_seconds)
        }
    }
}
