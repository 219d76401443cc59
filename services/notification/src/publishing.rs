//! Publishing what is recorded: `low-stock` on its topic, into the stream `NOTIFICATIONS`.
//!
//! The event id is derived from the cause and is the message id too, so that publishing again within the stream's window is
//! one message; beyond it readers know the id.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use bytes::Bytes;
use lomash_contract::{ContentType, Envelope, EventId, LowStock, Timestamp, Topic, codec};
use lomash_ledger::header;
use lomash_platform::trace::{self, Reference, TraceContext};
use tokio_util::sync::CancellationToken;
use tracing::{Span, info, warn};

use crate::alerts::{Alerts, Unpublished};
use crate::observed;

/// Alerts that are on their way at once.
const MAX_IN_FLIGHT: u32 = 200;

/// How long the stream may take to confirm them.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How often another replica's alerts are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Pauses after a failure, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Publishes until `stop`.
///
/// # Errors
/// Never; it is a task of the process like the others.
pub async fn run(context: Context, alerts: Alerts, stop: CancellationToken) -> anyhow::Result<()> {
    let mut pause = FIRST_PAUSE;
    loop {
        let outcome = alerts.publish_next(MAX_IN_FLIGHT, async |next| publish(&context, next).await).await;
        let wait = match outcome {
            Ok((found, published)) if found == published => {
                if pause > FIRST_PAUSE {
                    info!("publishing again");
                }
                pause = FIRST_PAUSE;
                if found > 0 { Duration::ZERO } else { LOOK_EVERY }
            }
            Ok((found, published)) => {
                warn!(missing = found - published, "NOTIFICATIONS did not confirm all alerts; trying again");
                pause = (pause * 2).min(LAST_PAUSE);
                pause
            }
            Err(problem) => {
                warn!(%problem, "alerts cannot be published yet, trying again");
                pause = (pause * 2).min(LAST_PAUSE);
                pause
            }
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(wait) => {}
            () = alerts.news().recorded.notified(), if pause == FIRST_PAUSE => {}
        }
    }
}

/// Publishes these; gives back the causes of those that the stream has confirmed.
async fn publish(context: &Context, alerts: &[Unpublished]) -> Vec<EventId> {
    lomash_ledger::crash_point!("notify-before-publish");
    let mut confirmed = Vec::with_capacity(alerts.len());
    let publishing = async {
        let mut confirmations = Vec::with_capacity(alerts.len());
        for alert in alerts {
            let span = observed::publish_span(alert);
            let (headers, payload) = message(alert, &span)?;
            let sent = context.publish_with_headers(Topic::NotificationsLowStock.as_str(), headers, payload).await;
            confirmations.push((alert.caused_by, span, sent.map_err(|problem| problem.to_string())?));
        }
        for (caused_by, span, confirmation) in confirmations {
            confirmation
                .await
                .map_err(|problem| problem.to_string())
                .inspect_err(|problem| trace::fail(&span, problem))?;
            observed::published();
            confirmed.push(caused_by);
        }
        Ok::<(), String>(())
    };
    match tokio::time::timeout(PUBLISH_TIMEOUT, publishing).await {
        Ok(Ok(())) => {}
        Ok(Err(problem)) => warn!(problem, "a notification was not confirmed"),
        Err(_) => warn!("notifications were not confirmed within {} s", PUBLISH_TIMEOUT.as_secs()),
    }
    lomash_ledger::crash_point!("notify-after-publish");
    confirmed
}

fn message(alert: &Unpublished, span: &Span) -> Result<(HeaderMap, Bytes), String> {
    let payload = LowStock {
        product_id: alert.product_id,
        sku: alert.sku.parse().map_err(|problem| format!("the sku of {}: {problem}", alert.caused_by))?,
        quantity: alert.quantity,
        threshold: alert.threshold,
        caused_by: alert.caused_by,
    };
    // The same bytes whenever it is published: the timestamp is the cause's.
    let envelope = Envelope::new(alert.event_id, Timestamp::new(alert.occurred_at), payload);
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, alert.event_id.to_string());
    // Whoever reads it continues the publication or, when that is not traced, the cause.
    let trace = match Reference::of(span) {
        Some(published) => published.trace_context(),
        None => TraceContext::parse(alert.traceparent.as_deref(), alert.tracestate.as_deref()),
    };
    if let Some(trace) = &trace {
        headers.insert(header::TRACEPARENT, trace.traceparent());
        if let Some(state) = trace.tracestate() {
            headers.insert(header::TRACESTATE, state);
        }
    }
    Ok((headers, codec::encode(ContentType::Json, &envelope).into()))
}
