//! What every write does: key, condition, command, and an answer that a repetition gives again.
//!
//! An answer is made of the events that the command stored and of nothing else, so that it is the same when it is read
//! back from the stream, by any replica and after any restart.

use std::sync::Arc;

use axum::Json;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use lomash_contract::text;
use lomash_contract::{Envelope, LedgerEvent, ProductId, UpdatedBy};
use lomash_ledger::{Carried, Ledger, header};
use lomash_platform::trace::TraceContext;
use lomash_web::extract::single_header;
use lomash_web::sequences::LOMASH_SEQUENCE;
use lomash_web::{Caller, Problem};
use serde::Serialize;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::problems::{OUTCOME_UNKNOWN, refused};
use super::{Api, WRITE_TIMEOUT, preconditions};
use crate::commands::MAX_REASON_CHARS;
use crate::committer::Committed;
use crate::inventory::{Action, CommandMark, Outcome, ProductCommand};

pub(super) static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// Longest `Idempotency-Key`. A UUID has 36 characters.
const MAX_KEY_CHARS: usize = 128;

/// Events of one command: details, count, stock, names of changed fields.
const MAX_EVENTS: usize = 4;

/// A command as a handler wants it.
pub(super) struct Write {
    pub(super) product_id: ProductId,
    pub(super) action: Action,
    pub(super) reason: Option<String>,
}

/// What a write came to.
pub(super) struct Written {
    /// The events that it stored, in order; none when nothing changed.
    pub(super) events: Vec<Envelope<LedgerEvent>>,
    /// Of the last of them, or of the state in which there was nothing to change.
    pub(super) sequence: u64,
    /// Whether this is the answer to an earlier request.
    replayed: bool,
}

impl Written {
    /// The product's version after it: the sequence of the last event that is about details or stock.
    pub(super) fn version(&self) -> Option<u64> {
        let changes = |event: &Envelope<LedgerEvent>| {
            matches!(
                event.payload,
                LedgerEvent::InventoryUpdated(_) | LedgerEvent::ProductRegistered(_) | LedgerEvent::ProductRevised(_)
            )
        };
        let behind = self.events.iter().rev().position(changes)?;
        Some(self.sequence - behind as u64)
    }

    /// The answer with its headers.
    pub(super) fn answer(&self, status: StatusCode, body: impl Serialize) -> Response {
        let mut response = (status, Json(body)).into_response();
        let headers = response.headers_mut();
        headers.insert(LOMASH_SEQUENCE.clone(), HeaderValue::from(self.sequence));
        if let Some(version) = self.version() {
            headers.insert(ETAG, preconditions::etag(version));
        }
        if self.replayed {
            headers.insert(IDEMPOTENT_REPLAYED.clone(), HeaderValue::from_static("true"));
        }
        response
    }
}

/// Has a write carried out. `request` is the body as it was understood: with the action's address it makes the
/// fingerprint by which a key that is used for something else is noticed.
pub(super) async fn carry_out(
    api: &Api,
    caller: Caller,
    headers: &HeaderMap,
    address: &str,
    request: &impl Serialize,
    Write { product_id, action, reason }: Write,
) -> Result<Written, Problem> {
    let reason = reason.map(checked_reason).transpose()?;
    let command_id = match idempotency_key(headers)? {
        Some(key) => Uuid::new_v5(&caller.subject, key.as_bytes()),
        None => Uuid::new_v4(),
    };
    let command = ProductCommand {
        command_id,
        product_id,
        by: UpdatedBy::User(caller.subject),
        if_version: preconditions::if_match(headers)?,
        fingerprint: Some(fingerprint(address, product_id, request)?),
        action,
    };
    let mark = command.mark();
    let carried = Carried { trace: trace_context(headers), reason, command: None };
    let deciding = async {
        let Committed { outcome, sequence, events } = match api.writer.submit(command, Some(Arc::new(carried))).await {
            Ok(committed) => committed,
            Err(error) => return Err(refused(&error)),
        };
        match outcome {
            Outcome::Replayed { first_sequence } => read_back(api, first_sequence, mark, true).await,
            // Its answer was lost and it was found in the stream: `sequence` is that of its first event.
            Outcome::Registered | Outcome::Revised { .. } | Outcome::StockChanged { .. } | Outcome::CountRecorded
                if events.is_empty() =>
            {
                read_back(api, sequence, mark, false).await
            }
            _ => Ok(Written { events, sequence, replayed: false }),
        }
    };
    match tokio::time::timeout(WRITE_TIMEOUT, deciding).await {
        Ok(written) => written,
        Err(_) => {
            let detail = "The write was not decided in time and may yet be carried out. Repeat it under the same Idempotency-Key.";
            Err(Problem::new(&OUTCOME_UNKNOWN, detail).with_retry_after(1))
        }
    }
}

/// The trace context of a request, as far as it has one.
pub(super) fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name: &'static str| headers.get(name)?.to_str().ok();
    TraceContext::parse(text(header::TRACEPARENT), text(header::TRACESTATE))
}

/// Reads the events of a command from the stream, from its first one on.
async fn read_back(
    api: &Api,
    first_sequence: u64,
    mark: Option<CommandMark>,
    replayed: bool,
) -> Result<Written, Problem> {
    let gone = |problem: &dyn std::fmt::Display| {
        tracing::warn!(%problem, first_sequence, "an earlier answer cannot be read back just now");
        Problem::unavailable("The earlier answer cannot be read back just now; ask again.", 1)
    };
    let mut messages = api.ledger.follow(first_sequence - 1).await.map_err(|problem| gone(&problem))?;
    let (mut events, mut sequence) = (Vec::new(), first_sequence);
    while let Some(message) = messages.next().await {
        let message = message.map_err(|problem| gone(&problem))?;
        if message.carried.command.as_deref().and_then(CommandMark::parse) != mark {
            break;
        }
        sequence = message.sequence;
        events.push(message.parse().map_err(|foreign| gone(&foreign))?);
        if message.ends_batch() || events.len() == MAX_EVENTS {
            break;
        }
    }
    Ok(Written { events, sequence, replayed })
}

pub(super) fn checked_reason(reason: String) -> Result<String, Problem> {
    match text::check_prose(&reason, MAX_REASON_CHARS) {
        Ok(()) => Ok(reason),
        Err(problem) => Err(Problem::invalid_field("/reason", problem.to_string())),
    }
}

/// The key, with or without the quotes that the draft asks for.
pub(super) fn idempotency_key(headers: &HeaderMap) -> Result<Option<&str>, Problem> {
    let Some(text) = single_header(headers, IDEMPOTENCY_KEY)? else { return Ok(None) };
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    let fits = (1..=MAX_KEY_CHARS).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic());
    if fits && !key.contains('"') {
        return Ok(Some(key));
    }
    let detail = format!("must be 1 to {MAX_KEY_CHARS} visible ASCII characters without quotes inside; a UUID is best");
    Err(Problem::invalid_header(IDEMPOTENCY_KEY, detail))
}

fn fingerprint(address: &str, product_id: ProductId, request: &impl Serialize) -> Result<u64, Problem> {
    let mut hash = Sha256::new();
    hash.update(address);
    hash.update(product_id.0);
    hash.update(serde_json::to_vec(request).map_err(Problem::internal)?);
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    Ok(u64::from_be_bytes(first))
}
