//! What the notification service shows of itself: its metrics, and the spans on the way from a cause to its mail.
//!
//! In the trace of an order, each span the child of the one before: `process lomash.inventory.updated` (the receive loop's,
//! kept with the alert), and under it `publish lomash.notifications.low-stock` and `send mail`, whenever these happen.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Instant;

use lomash_contract::Topic;
use lomash_platform::metrics::{Counter, Family, Histogram, Labels, Metrics, seconds};
use lomash_platform::trace::{self, Reference, TraceContext};
use tracing::{Span, info_span};

use crate::alerts::{Mail, Unpublished, Waiting};
use crate::mailer::Outcome;

static RECORDED: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Low-stock alerts, and recoveries under the policy `edge`, that this replica recorded";
    Metrics::of_process().register("lomash_alerts_recorded", help, Counter::default())
});

static PUBLISHED: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Low-stock notifications that this replica published";
    Metrics::of_process().register("lomash_alerts_published", help, Counter::default())
});

static MAILS: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help = "Attempts to send a mail, by what became of them: sent, refused (for good), deferred (tried again)";
    let mails = Metrics::of_process().register("lomash_mails", help, Family::<Labels<1>, Counter>::default());
    for outcome in ["sent", "refused", "deferred"] {
        drop(mails.get_or_create(&[("outcome", outcome)]));
    }
    mails
});

static SEND_SECONDS: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "From the first command about a mail until the server's last word about it";
    Metrics::of_process().register("lomash_mail_send_duration_seconds", help, seconds())
});

static WAITING: LazyLock<Mutex<Option<Waiting>>> = LazyLock::new(|| {
    let metrics = Metrics::of_process();
    let help = "Low-stock alerts that are recorded and wait, for their publication or for their mail";
    metrics.gauges("lomash_alerts_waiting", help, || -> Vec<(Labels<1>, f64)> {
        let waiting = *WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        let each = waiting.map(|waiting| [("publication", waiting.to_publish), ("mail", waiting.to_mail)]);
        each.into_iter().flatten().map(|(what, count)| ([("for", what)], count as f64)).collect()
    });
    let help = "Mails that the mail server refused for good";
    metrics.gauges("lomash_mails_refused", help, || -> Option<(Labels<0>, f64)> {
        let waiting = *WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.map(|waiting| ([], waiting.failed as f64))
    });
    Mutex::default()
});

/// Shows every metric from the start, at zero.
pub fn register() {
    LazyLock::force(&RECORDED);
    LazyLock::force(&PUBLISHED);
    LazyLock::force(&MAILS);
    LazyLock::force(&SEND_SECONDS);
    LazyLock::force(&WAITING);
}

/// So many alerts were recorded.
pub(crate) fn recorded(alerts: usize) {
    RECORDED.inc_by(alerts as u64);
}

/// What Postgres says waits; None when it does not say, for a stale figure would pass for a true one.
pub(crate) fn waiting(waiting: Option<Waiting>) {
    *WAITING.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
}

/// An alert was published and confirmed.
pub(crate) fn published() {
    PUBLISHED.inc();
}

/// The trace context to keep with an alert: this task's span, or what the cause brought along.
pub(crate) fn context_to_keep(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<TraceContext> {
    match Reference::current() {
        Some(current) => current.trace_context(),
        None => TraceContext::parse(traceparent, tracestate),
    }
}

/// Around the publication of a notification; continues what was kept with the alert.
pub(crate) fn publish_span(alert: &Unpublished) -> Span {
    let Some(continued) = trace::begin(alert.traceparent.as_deref(), alert.tracestate.as_deref()) else {
        return Span::none();
    };
    let topic = Topic::NotificationsLowStock.as_str();
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "publish",
        otel.name = format!("publish {topic}"),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "publish",
        messaging.operation.type = "send",
        messaging.destination.name = topic,
        messaging.message.id = %alert.event_id,
        event.id = %alert.event_id,
        product.id = %alert.product_id,
    );
    continued.adopt(&span);
    span
}

/// A mail on its way to the server.
pub(crate) struct Send {
    span: Span,
    since: Instant,
}

impl Send {
    /// Begins, in the trace of the cause; of a digest, in that of its newest one.
    pub(crate) fn begin(mail: &Mail, message_id: &str, server: &str) -> Self {
        let told = match mail {
            Mail::Alert(told) => Some(told),
            Mail::Digest { alerts, .. } => alerts.first(),
        };
        let kept = told.and_then(|told| {
            trace::begin(told.traceparent.as_deref(), told.tracestate.as_deref()).map(|continued| (told, continued))
        });
        let Some((told, continued)) = kept else { return Self { span: Span::none(), since: Instant::now() } };
        let span = info_span!(
            target: trace::TARGET,
            parent: None,
            "send mail",
            otel.kind = "client",
            network.protocol.name = "smtp",
            server.address = server,
            mail.message_id = message_id,
            event.id = %told.caused_by,
            product.id = %told.product_id,
            order.id = tracing::field::Empty,
        );
        continued.adopt(&span);
        if let Some(order_id) = told.order_id {
            span.record("order.id", tracing::field::display(order_id));
        }
        Self { span, since: Instant::now() }
    }

    /// Its span.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// What became of it.
    pub(crate) fn end(self, outcome: &Outcome) {
        SEND_SECONDS.observe(self.since.elapsed().as_secs_f64());
        let word = match outcome {
            Outcome::Accepted { .. } => "sent",
            Outcome::Refused(problem) => {
                trace::fail(&self.span, problem);
                "refused"
            }
            Outcome::Deferred(problem) => {
                trace::fail(&self.span, problem);
                "deferred"
            }
        };
        MAILS.get_or_create(&[("outcome", word)]).inc();
    }
}
