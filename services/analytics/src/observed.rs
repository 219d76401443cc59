//! What the analytics service shows of itself: its metrics, and the span of the transaction that applies events. How far the
//! consumer is behind and what became of deliveries is told by the receive loop.

use std::sync::LazyLock;
use std::time::Instant;

use lomash_ledger::StoredMessage;
use lomash_platform::metrics::{Counter, Gauge, Histogram, Metrics, seconds};
use lomash_platform::postgres::ANALYTICS;
use lomash_platform::trace::{self, Reference};
use time::OffsetDateTime;
use tracing::{Span, info_span};

use crate::projection::Applied;

/// Upper bounds in milliseconds, as of `inventory_update_lag_ms`.
const LAG_MS: [f64; 12] =
    [10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0, 60_000.0, 300_000.0];

static APPLIED: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Messages of the ledger that this replica applied to the stock metrics";
    Metrics::of_process().register("lomash_analytics_events_applied", help, Counter::default())
});

static SKIPPED: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Of those, messages that were not events of ours";
    Metrics::of_process().register("lomash_analytics_messages_skipped", help, Counter::default())
});

static CAUGHT_UP: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Times that events were read from the stream because they were not delivered in order";
    Metrics::of_process().register("lomash_analytics_catch_ups", help, Counter::default())
});

static FAILURES: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Times that applying had to begin again";
    Metrics::of_process().register("lomash_analytics_failures", help, Counter::default())
});

static TRANSACTION_SECONDS: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "Of one transaction that applies events";
    Metrics::of_process().register("lomash_analytics_transaction_duration_seconds", help, seconds())
});

static LAG: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "From when the server stored an event until the stock metrics reflected it, in milliseconds";
    Metrics::of_process().register("lomash_analytics_lag_ms", help, Histogram::new(LAG_MS))
});

static CHECKPOINT: LazyLock<Gauge> = LazyLock::new(|| {
    let help = "Sequence that the stock metrics reflect, as this replica saw it last";
    Metrics::of_process().register("lomash_analytics_checkpoint", help, Gauge::default())
});

/// Shows everything from the start, so that the first failure is an increase.
pub(crate) fn begin() {
    for counter in [&APPLIED, &SKIPPED, &CAUGHT_UP, &FAILURES] {
        LazyLock::force(counter);
    }
    LazyLock::force(&TRANSACTION_SECONDS);
    LazyLock::force(&LAG);
    LazyLock::force(&CHECKPOINT);
}

/// The rows were seen at `checkpoint`.
pub(crate) fn saw(checkpoint: u64) {
    CHECKPOINT.set(i64::try_from(checkpoint).unwrap_or(i64::MAX));
}

/// Applying begins again.
pub(crate) fn failed() {
    FAILURES.inc();
}

/// Events are read from the stream.
pub(crate) fn catches_up() {
    CAUGHT_UP.inc();
}

/// Around the transaction that applies `batch`: linked with what its events come of.
pub(crate) fn transaction_span(batch: &[StoredMessage]) -> Span {
    if !trace::has_room() {
        return Span::none();
    }
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "transaction",
        otel.name = "COMMIT analytics",
        otel.kind = "client",
        db.system.name = "postgresql",
        db.namespace = ANALYTICS.live,
        db.operation.name = "COMMIT",
        db.query.summary = "COMMIT analytics",
        db.operation.batch.size = batch.len(),
    );
    trace::Beginning::of_a_trace().adopt(&span);
    let causes = batch
        .iter()
        .filter_map(|message| Reference::parse(message.carried.traceparent(), message.carried.tracestate()));
    trace::link_all(&span, causes);
    span
}

/// A batch was applied, as far as its events followed.
pub(crate) fn applied(batch: &[StoredMessage], Applied { events, skipped, .. }: Applied, since: Instant) {
    TRANSACTION_SECONDS.observe(since.elapsed().as_secs_f64());
    APPLIED.inc_by(events);
    SKIPPED.inc_by(skipped);
    let now = OffsetDateTime::now_utc();
    let known = batch.len().saturating_sub(usize::try_from(events).unwrap_or(usize::MAX));
    for message in &batch[known..] {
        // The clocks of two machines may disagree a little.
        LAG.observe(((now - message.stored_at).as_seconds_f64() * 1000.0).max(0.0));
    }
}
