//! The live stream of the ledger's events, as server-sent events.
//!
//! What a client may cost is [`crate::feed`]'s. Events that are not ours by form are left out; whether each continues the
//! history of its product is for readers that keep one. Nothing is read for a client before it has taken what came before.
//! An answer ends with its token, or after [`STREAM_LIFETIME`], and says why by a last event, which has no id: the client
//! comes again with `Last-Event-ID` as it was, and a token that is valid still.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures::future::BoxFuture;
use futures::{FutureExt, stream};
use lomash_contract::ProductId;
use lomash_ledger::ReadError;
use lomash_web::extract::single_header;
use lomash_web::sequences::{no_place, sequence};
use lomash_web::{Problem, Query, Viewer};
use serde::Deserialize;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use utoipa::IntoParams;
use uuid::Uuid;

use super::Api;
use super::problems::ReadProblems;
use crate::feed::{Line, Listener};

/// How long one answer lasts. Then the client comes again by itself, with `Last-Event-ID` and a token that is valid still.
pub const STREAM_LIFETIME: Duration = Duration::from_secs(900);

/// How often a silent stream says that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What it says then: a comment.
const ALIVE: Bytes = Bytes::from_static(b":\n\n");

/// The last event of an answer; its data say why it ends.
const ENDED: &str = "stream-ended";

const LAST_EVENT_ID: &str = "last-event-id";

/// Seconds after which a place may be free.
const RETRY_AFTER_SECONDS: u64 = 5;

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
                   Without Last-Event-ID it begins with what comes next. The answer ends with its token, after 15 minutes, \
                   when the service stops, or when the ledger cannot be read: the last event is `stream-ended`, without an \
                   id, with data such as {\"reason\":\"token-expired\"} (or lifetime-over, stopping, unavailable). Come again \
                   with Last-Event-ID. A caller may have 10 streams at once, there are 100 in all, and whoever catches up \
                   with the past is given it at a bounded rate.",
    params(
        StreamParameters,
        ("Last-Event-ID" = Option<u64>, Header, description = "Goes on after this sequence"),
    ),
    responses((status = 200, description = "Events", body = String, content_type = "text/event-stream"), ReadProblems)
)]
pub(super) async fn stream(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(StreamParameters { product_id }): Query<StreamParameters>,
) -> Result<Response, Problem> {
    let full = |full| no_place(full, "live streams", RETRY_AFTER_SECONDS);
    let listener = api.feed.listen(caller.subject).map_err(full)?;
    let last = api.waiting.end().await.map_err(|problem| {
        tracing::warn!(problem, "a stream could not begin");
        Problem::unavailable("The ledger cannot be read just now.", 1)
    })?;
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
    let now = Instant::now();
    let valid_for = caller.expires.duration_since(SystemTime::now()).unwrap_or_default();
    let (lasts, why) =
        if valid_for < STREAM_LIFETIME { (valid_for, End::TokenExpired) } else { (STREAM_LIFETIME, End::LifetimeOver) };
    let client = Client {
        seen: after,
        key: product_id.map(|id| id.0),
        ready: VecDeque::new(),
        asked: Some(Asked::begin(listener, after)),
        ends: (now + lasts, why),
        spoke: now,
        stop: api.stop,
    };
    let events = stream::unfold(Some(client), |client| async {
        let mut client = client?;
        Some(match client.next().await {
            Ok(text) => (Ok::<_, Infallible>(text), Some(client)),
            Err(end) => (Ok(end.told()), None),
        })
    });
    let mut response = Response::new(Body::from_stream(events));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// Why an answer ends.
#[derive(Clone, Copy, Debug)]
enum End {
    TokenExpired,
    LifetimeOver,
    Stopping,
    Unavailable,
}

impl End {
    fn told(self) -> Bytes {
        let reason = match self {
            Self::TokenExpired => "token-expired",
            Self::LifetimeOver => "lifetime-over",
            Self::Stopping => "stopping",
            Self::Unavailable => "unavailable",
        };
        format!("event: {ENDED}\ndata: {{\"reason\":\"{reason}\"}}\n\n").into()
    }
}

/// What a listener was answered.
type Answered = (Listener, Result<Vec<Arc<Line>>, ReadError>);

/// A question for what comes next, which goes on while nobody looks at it.
struct Asked(BoxFuture<'static, Answered>);

impl Asked {
    fn begin(mut listener: Listener, seen: u64) -> Self {
        let asking = async move {
            let found = listener.after(seen).await;
            (listener, found)
        };
        Self(asking.boxed())
    }
}

/// One client of the stream.
struct Client {
    seen: u64,
    /// The product it asked for.
    key: Option<Uuid>,
    /// What it has not taken yet.
    ready: VecDeque<Bytes>,
    /// What it waits for; none only while it is looked at.
    asked: Option<Asked>,
    ends: (Instant, End),
    /// When it was told anything last.
    spoke: Instant,
    stop: CancellationToken,
}

impl Client {
    /// What is sent next. The client has taken what was sent before, or this is not asked for.
    async fn next(&mut self) -> Result<Bytes, End> {
        loop {
            let (deadline, why) = self.ends;
            if self.stop.is_cancelled() {
                return Err(End::Stopping);
            }
            if Instant::now() >= deadline {
                return Err(why);
            }
            if let Some(text) = self.ready.pop_front() {
                self.spoke = Instant::now();
                return Ok(text);
            }
            let Some(mut asked) = self.asked.take() else { return Err(End::Unavailable) };
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Err(End::Stopping),
                () = sleep_until(deadline) => return Err(why),
                (listener, found) = &mut asked.0 => {
                    let lines = found.map_err(|problem| {
                        tracing::warn!(%problem, "a stream could not go on");
                        End::Unavailable
                    })?;
                    self.seen = lines.last().map_or(self.seen, |line| line.sequence);
                    self.ready.extend(lines.iter().filter_map(|line| line.told(self.key)));
                    self.asked = Some(Asked::begin(listener, self.seen));
                }
                () = sleep_until(self.spoke + KEEP_ALIVE) => {
                    self.asked = Some(asked);
                    self.spoke = Instant::now();
                    return Ok(ALIVE);
                }
            }
        }
    }
}
