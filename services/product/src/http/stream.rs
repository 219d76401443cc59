//! The live stream of the ledger's events, as server-sent events.
//!
//! Each client has a reader of the stream of its own, which reads no further than the client takes: a slow client costs
//! nobody anything. Events that are not ours by form are left out; whether each continues the history of its product is
//! for readers that keep one.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use futures::{Stream, StreamExt};
use lomash_contract::{ContentType, LedgerEvent, ProductId, codec};
use lomash_ledger::{Ledger, StoredMessage};
use lomash_web::extract::single_header;
use lomash_web::{Problem, Query, Viewer};
use serde::Deserialize;
use tokio::sync::Semaphore;
use utoipa::IntoParams;

use super::Api;
use super::problems::ReadProblems;
use lomash_web::sequences::sequence;

/// Clients at once: each has a consumer on the stream.
pub const MAX_STREAMS: usize = 100;

/// How long one answer lasts. Then the client comes again by itself, with `Last-Event-ID` and a token that is valid still.
pub const STREAM_LIFETIME: Duration = Duration::from_secs(900);

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const LAST_EVENT_ID: &str = "last-event-id";

/// Places for clients.
#[derive(Clone)]
pub struct Streams(Arc<Semaphore>);

impl Default for Streams {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_STREAMS)))
    }
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct StreamParameters {
    /// Only about this product.
    #[param(value_type = Option<Uuid>)]
    product_id: Option<ProductId>,
}

#[utoipa::path(
    get, path = "/v1/inventory/stream", tag = "inventory", operation_id = "streamInventory",
    summary = "Every event as it is stored, as server-sent events",
    description = "`id` is the sequence of the ledger, `event` the event's type, `data` the envelope of the contract. \
                   Without Last-Event-ID it begins with what comes next.",
    params(
        StreamParameters,
        ("Last-Event-ID" = Option<u64>, Header, description = "Goes on after this sequence"),
    ),
    responses((status = 200, description = "Events", body = String, content_type = "text/event-stream"), ReadProblems)
)]
pub(super) async fn stream(
    _: Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(StreamParameters { product_id }): Query<StreamParameters>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    let full = || Problem::unavailable(format!("There are {MAX_STREAMS} streams open; try again later."), 5);
    let place = api.streams.0.clone().try_acquire_owned().map_err(|_| full())?;
    let unreadable = |problem: lomash_ledger::ReadError| {
        tracing::warn!(%problem, "a stream could not begin");
        Problem::unavailable("The ledger cannot be read just now.", 1)
    };
    let last = api.ledger.last_sequence().await.map_err(unreadable)?;
    let after = match single_header(&headers, LAST_EVENT_ID)? {
        None => last,
        Some(text) => {
            let bad = |detail: String| Problem::invalid_header(LAST_EVENT_ID, detail);
            let after = sequence(text).ok_or_else(|| bad("must be a sequence of the ledger".to_owned()))?;
            if after > last {
                return Err(bad(format!("is beyond the end of the ledger, {last}")));
            }
            after
        }
    };
    let messages = api.ledger.follow(after).await.map_err(unreadable)?;
    let over = async move {
        let _place = place;
        tokio::select! {
            () = api.stop.cancelled() => {}
            () = tokio::time::sleep(STREAM_LIFETIME) => {}
        }
    };
    // A read that fails ends the answer, and the client comes again.
    let events = messages.take_while(|message| std::future::ready(message.is_ok()));
    let events =
        events.filter_map(move |message| std::future::ready(message.ok().and_then(|m| told(&m, product_id)).map(Ok)));
    Ok(Sse::new(events.take_until(over)).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)))
}

/// A stored message as an event for the client; none when it is not ours, or not about the product asked for.
fn told(message: &StoredMessage, product_id: Option<ProductId>) -> Option<Event> {
    let envelope = message.parse().ok()?;
    // For this service alone: it changes nothing.
    if matches!(envelope.payload, LedgerEvent::CommandAnswered(_)) {
        return None;
    }
    if product_id.is_some_and(|id| envelope.payload.key() != id.0) {
        return None;
    }
    let json = codec::encode(ContentType::Json, &envelope);
    let event = Event::default().id(message.sequence.to_string()).event(envelope.event_type.as_str());
    Some(event.data(String::from_utf8_lossy(&json)))
}
