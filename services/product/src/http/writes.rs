//! What every write does: key, condition, command, and an answer that a repetition gives again.
//!
//! An answer is made of what the command stored and of nothing else, so that it is the same when it is read back from the
//! stream, by any replica and after any restart: of its events, or of the record that it changed nothing or was refused.

use std::sync::Arc;

use axum::Json;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use lomash_contract::id::EventRole;
use lomash_contract::limits::KEYS_KEPT;
use lomash_contract::text;
use lomash_contract::{Envelope, EventId, LedgerEvent, ProductId, UpdatedBy};
use lomash_ledger::{Carried, Ledger, StoredMessage, header};
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
use crate::committer::{CommandError, Committed};
use crate::inventory::{Action, CommandMark, Outcome, ProductCommand, Rejection};

pub(super) static IDEMPOTENT_REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");
const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// What the document says of the parameter, on every write of products and stock.
pub(super) const KEY_DESCRIPTION: &str = "1 to 128 visible ASCII characters, the caller's own; a UUID is best. The same request under the same key is carried out \
     once and answered as at first, with `Idempotent-Replayed: true`, on every replica and after restarts: also when it \
     changed nothing, and when a rule refused it (404, 409, 412). Another body, route, product or `If-Match` under the key \
     is refused with 422. A key holds for at least 24 hours; after that it is as good as new. What is wrong by itself (400, \
     415), not permitted (401, 403, 429) or not decided (503, 504) leaves the key free.";

const _: () = assert!(KEYS_KEPT.as_secs() >= 24 * 3_600, "as the document says");

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
    let key = idempotency_key(headers)?;
    let if_version = preconditions::if_match(headers)?;
    let command_id = match key {
        Some(key) => Uuid::new_v5(&caller.subject, key.as_bytes()),
        None => Uuid::new_v4(),
    };
    let fingerprint = key.map(|_| fingerprint(address, product_id, &if_version, request)).transpose()?;
    let by = UpdatedBy::User(caller.subject);
    let command = ProductCommand { if_version, fingerprint, ..ProductCommand::new(command_id, product_id, by, action) };
    // From where on its events are, should another replica store them and its answer be lost.
    let before = api.writer.committer().sequence();
    let own = Own::of(&command);
    let carried = Carried { trace: trace_context(headers), reason, command: None };
    let deciding = async {
        let Committed { outcome, sequence, events } = match api.writer.submit(command, Some(Arc::new(carried))).await {
            Ok(committed) => committed,
            // The id is nobody else's: another replica was asked, stored it, and did not say so in time.
            Err(CommandError::Rejected(Rejection::Repeated)) if key.is_none() => {
                return find(api, before, &own).await;
            }
            Err(error) => return Err(refused(&error)),
        };
        match outcome {
            Outcome::Replayed { first_sequence } => read_back(api, first_sequence, &own, key.is_some()).await,
            // Its answer was lost and it was found in the stream: `sequence` is that of its first event.
            Outcome::Registered | Outcome::Revised { .. } | Outcome::StockChanged { .. } | Outcome::CountRecorded
                if events.is_empty() =>
            {
                read_back(api, sequence, &own, false).await
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

/// By what the events of a command are known, where no record before them says how many they are.
struct Own {
    /// The ids that they have without a key.
    ids: [EventId; 4],
    /// Their mark, in an older ledger.
    mark: Option<CommandMark>,
}

impl Own {
    fn of(command: &ProductCommand) -> Self {
        let ProductCommand { command_id, product_id, fingerprint, .. } = command;
        let roles = [EventRole::Details, EventRole::Count, EventRole::Stock, EventRole::ChangedFields];
        Self {
            ids: roles.map(|role| EventId::derive(&command.cause(0), role, &product_id.0)),
            mark: fingerprint.map(|fingerprint| CommandMark { command_id: *command_id, fingerprint }),
        }
    }

    fn has(&self, message: &StoredMessage) -> bool {
        let mark = message.carried.command.as_deref().and_then(CommandMark::parse);
        (mark.is_some() && mark == self.mark)
            || message.message_id.as_deref().and_then(|id| id.parse().ok()).is_some_and(|id| self.ids.contains(&id))
    }
}

/// Reads back what a command came to, from the record of its answer or from its first event on.
async fn read_back(api: &Api, first_sequence: u64, own: &Own, replayed: bool) -> Result<Written, Problem> {
    let gone = |problem: &dyn std::fmt::Display| {
        tracing::warn!(%problem, first_sequence, "an earlier answer cannot be read back just now");
        Problem::unavailable("The earlier answer cannot be read back just now; ask again.", 1)
    };
    let mut messages = api.ledger.follow(first_sequence - 1).await.map_err(|problem| gone(&problem))?;
    let (mut events, mut sequence) = (Vec::new(), first_sequence);
    // How many events there are, where a record says so.
    let mut recorded = None;
    while recorded.is_none_or(|recorded| events.len() < recorded) {
        let Some(message) = messages.next().await else { break };
        let message = message.map_err(|problem| gone(&problem))?;
        let event: Envelope<LedgerEvent> = message.parse().map_err(|foreign| gone(&foreign))?;
        match event.payload {
            LedgerEvent::CommandAnswered(answered) if message.sequence == first_sequence => {
                if let Some(refusal) = &answered.refusal {
                    let rejection = Rejection::of_refusal(refusal).map_err(|problem| gone(&problem))?;
                    let problem = refused(&CommandError::Rejected(rejection));
                    return Err(if replayed {
                        problem.with_header(IDEMPOTENT_REPLAYED.clone(), "true")
                    } else {
                        problem
                    });
                }
                recorded = Some(answered.events as usize);
            }
            _ if recorded.is_some() || own.has(&message) => {
                sequence = message.sequence;
                events.push(event);
                if recorded.is_none() && (message.ends_batch() || events.len() == MAX_EVENTS) {
                    break;
                }
            }
            _ => break,
        }
    }
    Ok(Written { events, sequence, replayed })
}

/// Finds what a command without a key stored, after `before`. Takes as long as there is something to read; whoever waits
/// has a limit.
async fn find(api: &Api, before: u64, own: &Own) -> Result<Written, Problem> {
    let gone = |problem: &dyn std::fmt::Display| {
        tracing::warn!(%problem, "what another replica stored cannot be read back just now");
        Problem::new(&OUTCOME_UNKNOWN, "The write was carried out, and what it came to cannot be read just now.")
            .with_retry_after(1)
    };
    let mut messages = api.ledger.follow(before).await.map_err(|problem| gone(&problem))?;
    while let Some(message) = messages.next().await {
        let message = message.map_err(|problem| gone(&problem))?;
        if own.has(&message) {
            return read_back(api, message.sequence, own, false).await;
        }
    }
    Err(gone(&"the ledger ended"))
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

/// Of all that a request asks for. Under another condition it is another request: who was told 412, reads again and asks for
/// the version of then does not want to hear the 412 again.
fn fingerprint(
    address: &str,
    product_id: ProductId,
    if_version: &[u64],
    request: &impl Serialize,
) -> Result<u64, Problem> {
    let mut hash = Sha256::new();
    hash.update(address);
    hash.update(product_id.0);
    hash.update(serde_json::to_vec(request).map_err(Problem::internal)?);
    for version in if_version {
        hash.update(version.to_be_bytes());
    }
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    Ok(u64::from_be_bytes(first))
}
