//! Traces: which spans are made, and how their context travels.
//!
//! A span of ours is a `tracing` span of the target [`TARGET`]; no log shows it and nothing else is exported. Whoever begins
//! one for something that came from outside asks [`begin`] first: it says no while export is off, so that a span costs one
//! atomic read then, and while the collector does not keep up, so that a hanging one costs no more. What is not traced still
//! hands on the context that it was given.
//!
//! A handler of the ledger's receive loop runs inside the span of its message. It names what the message is about by
//! `Span::current().record("order.id", display(id))` (`product.id`, `event.id` likewise), gives what it publishes the headers
//! of [`Reference::current`], and makes a span of its own around a step that takes time:
//!
//! ```ignore
//! let span = trace::step(|| info_span!(target: trace::TARGET, "send mail", otel.kind = "client", server.address = host));
//! let sent = mailer.send(mail).instrument(span.clone()).await;
//! if let Err(problem) = &sent {
//!     trace::fail(&span, problem);
//! }
//! ```
//!
//! With export off, or for a message that is not traced, none of this costs anything worth counting.

mod context;

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{SpanContext, Status, TraceContextExt as _, TraceFlags};
use opentelemetry::{Context, trace::Span as _};
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{BatchSpanProcessor, Span as SdkSpan, SpanData, SpanExporter, SpanProcessor};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

pub use self::context::{MAX_TRACE_BYTES, TraceContext};
use crate::metrics::{Counter, Family, Labels, Metrics};

/// The target of spans that are exported.
pub const TARGET: &str = "lomash::trace";

/// Most links of one span, as the specification's default has it; a batch of more orders is linked to its first ones.
pub const MAX_LINKS: usize = 128;

/// Export is on.
static ON: AtomicBool = AtomicBool::new(false);
/// Spans that were begun and have neither been exported nor dropped.
static OUTSTANDING: AtomicUsize = AtomicUsize::new(0);
/// More than this many outstanding, and nothing new is begun.
static ROOM: AtomicUsize = AtomicUsize::new(0);
/// Whether a caller's decision not to trace is ours too.
static PARENT_DECIDES: AtomicBool = AtomicBool::new(true);

/// Spans by what became of them.
struct Outcomes {
    exported: Counter,
    failed: Counter,
    dropped: Counter,
    skipped: Counter,
}

static SPANS: LazyLock<Outcomes> = LazyLock::new(|| {
    let help = "Spans by what became of them: exported, failed (the collector did not take them), dropped (the queue was \
                full), or skipped (a message or request was not traced, for the collector does not keep up)";
    let spans = Metrics::of_process().register("lomash_trace_spans", help, Family::<Labels<1>, Counter>::default());
    let of = |outcome| spans.get_or_create_owned(&[("outcome", outcome)]);
    Outcomes { exported: of("exported"), failed: of("failed"), dropped: of("dropped"), skipped: of("skipped") }
});

/// From now on spans are made, about `room` outstanding ones at most.
pub(crate) fn turn_on(room: usize, parent_decides: bool) {
    LazyLock::force(&SPANS);
    ROOM.store(room, Ordering::Relaxed);
    PARENT_DECIDES.store(parent_decides, Ordering::Relaxed);
    ON.store(true, Ordering::Relaxed);
}

/// Whether spans are exported at all.
#[must_use]
pub fn is_on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// A span somewhere, here or in another process, by its identity.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference(SpanContext);

struct Headers<'a> {
    traceparent: &'a str,
    tracestate: Option<&'a str>,
}

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => Some(self.traceparent),
            "tracestate" => self.tracestate,
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

impl Reference {
    /// From W3C headers; None when there are none or they are not of that form.
    #[must_use]
    pub fn parse(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Self> {
        let (traceparent, tracestate) = context::accepted(traceparent, tracestate)?;
        let headers = Headers { traceparent, tracestate };
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        Self::of_context(&context)
    }

    /// The span that the current task is in, if it is traced.
    #[must_use]
    pub fn current() -> Option<Self> {
        if !is_on() {
            return None;
        }
        Self::of_context(&Context::current())
    }

    /// That span, if it is traced.
    #[must_use]
    pub fn of(span: &Span) -> Option<Self> {
        if span.is_disabled() {
            return None;
        }
        Self::of_context(&span.context())
    }

    fn of_context(context: &Context) -> Option<Self> {
        let context = context.span().span_context().clone();
        context.is_valid().then_some(Self(context))
    }

    /// Its W3C `traceparent`.
    #[must_use]
    pub fn traceparent(&self) -> String {
        let flags = self.0.trace_flags() & TraceFlags::SAMPLED;
        format!("00-{}-{}-{flags:02x}", self.0.trace_id(), self.0.span_id())
    }

    /// Its W3C `tracestate`, when there is one.
    #[must_use]
    pub fn tracestate(&self) -> Option<String> {
        Some(self.0.trace_state().header()).filter(|state| !state.is_empty())
    }

    /// It as it travels in headers.
    #[must_use]
    pub fn trace_context(&self) -> Option<TraceContext> {
        TraceContext::parse(Some(&self.traceparent()), self.tracestate().as_deref())
    }

    /// Its trace, as in logs.
    #[must_use]
    pub fn trace_id(&self) -> String {
        self.0.trace_id().to_string()
    }

    /// Whether whoever began it wants to see it.
    #[must_use]
    pub fn is_sampled(&self) -> bool {
        self.0.is_sampled()
    }

    /// Whether the task is in a span that is exported; cheaper than [`current`](Self::current).
    #[must_use]
    pub fn is_current() -> bool {
        is_on() && Context::current().span().span_context().is_sampled()
    }

    /// Makes it the parent of `span`, which must not have been entered yet.
    pub fn adopt(&self, span: &Span) {
        // It fails for a span that is not exported, which has no use for a parent.
        let _ = span.set_parent(Context::new().with_remote_span_context(self.0.clone()));
    }

    /// Links `span` to it.
    pub fn link(&self, span: &Span) {
        span.add_link(self.0.clone());
    }
}

/// Links `span` to the first [`MAX_LINKS`] of `references`.
pub fn link_all(span: &Span, references: impl IntoIterator<Item = Reference>) {
    for reference in references.into_iter().take(MAX_LINKS) {
        reference.link(span);
    }
}

/// Gives a span that was begun another name, now that more is known.
pub fn rename(span: &Span, name: String) {
    if !span.is_disabled() {
        span.context().span().update_name(name);
    }
}

/// Says that what `span` is about failed, with a word or a sentence why.
pub fn fail(span: &Span, why: impl std::fmt::Display) {
    if !span.is_disabled() {
        span.set_status(Status::error(why.to_string()));
    }
}

/// The span of a step of what the task is at, made only when that is traced: without a parent it would begin a trace.
pub fn step(make: impl FnOnce() -> Span) -> Span {
    if Reference::is_current() { make() } else { Span::none() }
}

/// What the span of something that came from outside continues.
#[derive(Clone, Debug)]
pub struct Beginning(Option<Reference>);

impl Beginning {
    /// Nothing: a trace begins.
    #[must_use]
    pub const fn of_a_trace() -> Self {
        Self(None)
    }

    /// Makes what it continues the parent of `span`; with nothing to continue it begins a trace.
    pub fn adopt(&self, span: &Span) {
        match &self.0 {
            Some(reference) => reference.adopt(span),
            // Not what the task happens to be in.
            None => drop(span.set_parent(Context::new())),
        }
    }
}

/// Whether a span should be made for something that came from outside with these headers.
#[must_use]
pub fn begin(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Beginning> {
    if !has_room() {
        return None;
    }
    let reference = Reference::parse(traceparent, tracestate);
    let unwanted = reference.as_ref().is_some_and(|reference| !reference.is_sampled());
    (!unwanted || !PARENT_DECIDES.load(Ordering::Relaxed)).then_some(Beginning(reference))
}

/// Whether a span should be made that does not continue another: export is on and keeps up.
#[must_use]
pub fn has_room() -> bool {
    if !is_on() {
        return false;
    }
    let room = OUTSTANDING.load(Ordering::Relaxed) < ROOM.load(Ordering::Relaxed);
    if !room {
        SPANS.skipped.inc();
    }
    room
}

/// Between the SDK and its batch processor: knows how many spans are outstanding, so that the queue never overflows unseen.
#[derive(Debug)]
pub(crate) struct Counted {
    pub(crate) batches: BatchSpanProcessor,
    /// What the queue holds.
    pub(crate) capacity: usize,
}

impl SpanProcessor for Counted {
    fn on_start(&self, span: &mut SdkSpan, context: &Context) {
        if span.span_context().is_sampled() {
            OUTSTANDING.fetch_add(1, Ordering::Relaxed);
        }
        self.batches.on_start(span, context);
    }

    fn on_end(&self, span: SpanData) {
        if !span.span_context.is_sampled() {
            return;
        }
        if QUEUED.fetch_add(1, Ordering::Relaxed) >= self.capacity {
            let _ = QUEUED.fetch_sub(1, Ordering::Relaxed);
            OUTSTANDING.fetch_sub(1, Ordering::Relaxed);
            SPANS.dropped.inc();
            return;
        }
        self.batches.on_end(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.batches.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> OTelSdkResult {
        self.batches.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &opentelemetry_sdk::Resource) {
        self.batches.set_resource(resource);
    }
}

/// Spans that have ended and have neither been exported nor dropped.
static QUEUED: AtomicUsize = AtomicUsize::new(0);

/// Around the exporter: says what became of the spans, and that there is room again.
#[derive(Debug)]
pub(crate) struct Settling<E>(pub(crate) E);

impl<E: SpanExporter> SpanExporter for Settling<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let outcome = self.0.export(batch).await;
        QUEUED.fetch_sub(spans, Ordering::Relaxed);
        OUTSTANDING.fetch_sub(spans, Ordering::Relaxed);
        let outcomes = if outcome.is_ok() { &SPANS.exported } else { &SPANS.failed };
        outcomes.inc_by(spans as u64);
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: std::time::Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn shutdown(&self) -> OTelSdkResult {
        self.0.shutdown()
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &opentelemetry_sdk::Resource) {
        self.0.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_read_from_headers_and_written_back() {
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let reference = Reference::parse(Some(traceparent), Some("vendor=1")).expect("a reference");
        assert_eq!(reference.traceparent(), traceparent);
        assert_eq!(reference.tracestate().as_deref(), Some("vendor=1"));
        assert_eq!(reference.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(reference.is_sampled());
    }

    #[test]
    fn what_is_no_traceparent_is_no_reference() {
        for text in ["", "00", "nonsense", "00-4bf9-00f0-01", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"]
        {
            assert_eq!(Reference::parse(Some(text), None), None, "{text}");
        }
        assert_eq!(Reference::parse(None, Some("vendor=1")), None);
    }
}
