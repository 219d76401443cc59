//! Dead letters: look through them, and bring a message back.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use lomash_contract::Timestamp;
use lomash_ledger::dead_letter::{Filter, Letter, LettersError, MAX_SCANNED, Redriven, Way, Whole};
use lomash_web::{Admin, Path, Problem, Query, Viewer, cursor};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};

use super::Api;
use super::problems::{DEAD_LETTER_NOT_FOUND, NO_WAY_BACK, ReadProblems, WriteProblems, sentence};

/// Most letters of a page.
const MAX_LIMIT: u32 = 200;

/// Letters of a page that does not say.
const DEFAULT_LIMIT: u32 = 50;

/// Longest text of a filter, in characters.
const MAX_FILTER_CHARS: usize = 200;

/// Seconds after which it is worth asking again while NATS is away.
const RETRY_AFTER_SECONDS: u64 = 5;

/// Which letters, and which page of them.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Wanted {
    /// Of this consumer.
    #[param(max_length = 200)]
    consumer: Option<String>,
    /// With this text in the reason, in whatever case.
    #[param(max_length = 200)]
    reason: Option<String>,
    /// Whose message was published on this subject.
    #[param(max_length = 200)]
    subject: Option<String>,
    /// That died at this moment or later.
    #[param(value_type = Option<String>, format = DateTime)]
    since: Option<Timestamp>,
    /// That died before this moment.
    #[param(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
    /// Letters of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// A page of dead letters, from the oldest on.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeadLetterPage {
    /// The letters. With a filter there may be none, and yet a next page: a request looks at a bounded number.
    items: Vec<DeadLetter>,
    /// Where the next page begins; null on the last one.
    next_cursor: Option<String>,
    /// Letters in all, whatever the filter.
    total: u64,
    /// The last sequence of `DEAD_LETTERS` as of which this is.
    as_of: u64,
}

/// A message that could not be handled.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeadLetter {
    /// Its sequence in `DEAD_LETTERS`: its name.
    sequence: u64,
    /// When it was written.
    #[schema(value_type = String, format = DateTime)]
    died_at: Timestamp,
    /// The consumer that gave the message up.
    consumer: String,
    /// Why.
    reason: String,
    /// How often it was tried.
    attempts: u64,
    /// How often it was brought back before it died this time.
    redrives: u32,
    /// Its former deaths, the oldest first.
    history: Vec<String>,
    /// Where it came from; null when the letter does not say.
    origin: Option<DeadLetterOrigin>,
    /// W3C trace context of the original.
    traceparent: Option<String>,
    /// Bytes of the payload, as far as the letter holds it.
    bytes: usize,
    /// What the letter does not hold of its message, which was too large for it; null when it is whole.
    cut: Option<DeadLetterCut>,
}

/// That a letter holds only a part of its message. Redriving takes the whole one from its stream.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeadLetterCut {
    /// Bytes of the message's headers, where not all of them are in the letter.
    header_bytes: Option<u64>,
    /// Bytes of the message's payload, where only its beginning is in the letter.
    payload_bytes: Option<u64>,
}

/// Where a message was before it died.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeadLetterOrigin {
    /// The stream.
    stream: String,
    /// The subject it was published on.
    subject: String,
    /// Its sequence in the stream.
    sequence: u64,
    /// Its message id.
    message_id: Option<String>,
}

/// A dead letter with its content.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DeadLetterWithContent {
    /// The letter.
    #[serde(flatten)]
    letter: DeadLetter,
    /// The headers of the original.
    headers: BTreeMap<String, Vec<String>>,
    /// The payload of the original, when it is text.
    payload: Option<String>,
    /// The payload of the original in base64, when it is no text.
    payload_base64: Option<String>,
}

/// A message that was brought back; its letter is removed.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RedrivenLetter {
    /// The letter.
    letter: u64,
    /// How often the message has been brought back now.
    redrives: u32,
    /// The stream that has it.
    stream: String,
    /// Its sequence there when it was published again; null when it was put before its consumer with nothing published.
    sequence: Option<u64>,
    /// Whether an earlier redrive of the letter had published it already.
    duplicate: bool,
}

impl From<Letter> for DeadLetter {
    fn from(letter: Letter) -> Self {
        let Letter { sequence, died_at, consumer, reason, attempts, past, origin, traceparent, bytes, cut, .. } =
            letter;
        let cut = cut.map(|cut| DeadLetterCut { header_bytes: cut.header_bytes, payload_bytes: cut.payload_bytes });
        let origin = origin.map(|origin| DeadLetterOrigin {
            stream: origin.stream,
            subject: origin.subject,
            sequence: origin.sequence,
            message_id: origin.message_id,
        });
        let (redrives, history) = (past.redrives, past.history);
        Self { sequence, died_at, consumer, reason, attempts, redrives, history, origin, traceparent, bytes, cut }
    }
}

#[utoipa::path(
    get, path = "/v1/dead-letters", tag = "dead letters", operation_id = "listDeadLetters",
    summary = "Messages that could not be handled, from the oldest on",
    params(Wanted),
    responses((status = 200, description = "A page", body = DeadLetterPage), ReadProblems)
)]
pub(super) async fn list(
    _: Viewer,
    State(api): State<Api>,
    Query(wanted): Query<Wanted>,
) -> Result<Json<DeadLetterPage>, Problem> {
    let limit = wanted.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Problem::invalid_parameter("limit", format!("must be from 1 to {MAX_LIMIT}")));
    }
    for (name, text) in [("consumer", &wanted.consumer), ("reason", &wanted.reason), ("subject", &wanted.subject)] {
        if text.as_ref().is_some_and(|text| text.chars().count() > MAX_FILTER_CHARS) {
            return Err(Problem::invalid_parameter(name, format!("must be at most {MAX_FILTER_CHARS} characters")));
        }
    }
    let Wanted { consumer, reason, subject, since, until, .. } = wanted;
    let filter = Filter { consumer, reason, subject, since, until };
    let list = ("dead letters", &filter);
    let after = wanted.cursor.as_deref().map(|cursor| cursor::open(&list, cursor)).transpose()?;
    let page = api.dead_letters.page(&filter, after.unwrap_or(0), limit as usize).await.map_err(problem)?;
    let next_cursor = page.next.map(|after| cursor::seal(&list, &after)).transpose()?;
    let items = page.letters.into_iter().map(DeadLetter::from).collect();
    Ok(Json(DeadLetterPage { items, next_cursor, total: page.total, as_of: page.as_of }))
}

#[utoipa::path(
    get, path = "/v1/dead-letters/{sequence}", tag = "dead letters", operation_id = "getDeadLetter",
    summary = "A message that could not be handled, with its headers and payload",
    params(("sequence" = u64, Path, description = "The letter's sequence in `DEAD_LETTERS`")),
    responses((status = 200, description = "The letter", body = DeadLetterWithContent), ReadProblems)
)]
pub(super) async fn show(
    _: Viewer,
    State(api): State<Api>,
    Path(sequence): Path<u64>,
) -> Result<Json<DeadLetterWithContent>, Problem> {
    let letter = api.dead_letters.get(sequence).await.map_err(problem)?;
    let Whole { letter, headers, payload, payload_base64 } = Whole::from(letter);
    Ok(Json(DeadLetterWithContent { letter: letter.into(), headers, payload, payload_base64 }))
}

#[utoipa::path(
    post, path = "/v1/dead-letters/{sequence}/redrive", tag = "dead letters", operation_id = "redriveDeadLetter",
    summary = "Bring a message back",
    description = "Publishes the message again on its original subject, or, when it is an event of the ledger, puts it \
                   before the consumer that gave it up. The letter is removed once that is confirmed. Safe to repeat: \
                   the message is not there twice.",
    params(("sequence" = u64, Path, description = "The letter's sequence in `DEAD_LETTERS`")),
    responses((status = 200, description = "Brought back", body = RedrivenLetter), WriteProblems)
)]
pub(super) async fn redrive(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(sequence): Path<u64>,
) -> Result<Json<RedrivenLetter>, Problem> {
    let Redriven { letter, redrives, way } = api.dead_letters.redrive(sequence).await.map_err(problem)?;
    tracing::info!(letter, redrives, by = %caller.subject, "a dead letter was redriven");
    let (stream, sequence, duplicate) = match way {
        Way::Republished { stream, sequence, duplicate, .. } => (stream, Some(sequence), duplicate),
        Way::ToConsumer { stream, .. } => (stream, None, false),
    };
    Ok(Json(RedrivenLetter { letter, redrives, stream, sequence, duplicate }))
}

/// Ordinary requests are answered in time: a page looks at a bounded number of letters.
const _: () = assert!(MAX_SCANNED >= MAX_LIMIT as usize, "a full page can be found");

fn problem(error: LettersError) -> Problem {
    let detail = sentence(&error.to_string());
    match error {
        LettersError::NotFound(_) => Problem::new(&DEAD_LETTER_NOT_FOUND, detail),
        LettersError::NoWayBack { letter, .. } => Problem::new(&NO_WAY_BACK, detail).with("letter", json!(letter)),
        LettersError::Unavailable(_) | LettersError::NoStream => {
            tracing::warn!(%error, "dead letters cannot be reached");
            Problem::unavailable("The dead letters cannot be reached just now.", RETRY_AFTER_SECONDS)
        }
        LettersError::NotConfirmed { .. } | LettersError::NotRemoved { .. } => {
            tracing::warn!(%error, "a dead letter was not redriven to the end");
            let detail = "It is not known whether the message was brought back. Do it again: it is not there twice.";
            Problem::unavailable(detail, RETRY_AFTER_SECONDS)
        }
    }
}
