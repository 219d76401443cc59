//! Logs, to standard error, pretty or JSON, filtered by `RUST_LOG`; and traces, by OTLP when the standard variables say
//! where to.
//!
//! Traces are off unless `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT` or `OTEL_EXPORTER_OTLP_ENDPOINT` is set. The SDK reads the rest
//! itself: `OTEL_EXPORTER_OTLP_HEADERS` and `_TIMEOUT`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_SERVICE_NAME`,
//! `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`. The protocol is `http/protobuf`. Export happens on a thread of its own behind a bounded
//! queue; a collector that is down or hangs costs spans and nothing else, see [`crate::trace`].
//!
//! A log line that is written in a span carries its trace and span id.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use opentelemetry::trace::{TraceContextExt as _, TracerProvider as _};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, SdkTracerProvider};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, filter_fn};
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use crate::trace;

/// How long a stopping process waits for the collector to take its last spans.
///
/// Together with what else a service does when it stops it stays within the 2 s that a hanging collector may cost.
pub const STOP_TIMEOUT: Duration = Duration::from_millis(1_500);

/// How long the collector may take for one batch, unless `OTEL_EXPORTER_OTLP_TIMEOUT` says otherwise.
pub const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Spans that wait for the collector, unless `OTEL_BSP_MAX_QUEUE_SIZE` says otherwise; the specification's default.
pub const QUEUED_SPANS: usize = 2_048;

/// How long a span waits for others to be sent with, unless `OTEL_BSP_SCHEDULE_DELAY` says otherwise. Less than the
/// specification's 5 s: whoever looks for the trace of an order that was just sold should find it.
pub const EXPORT_DELAY: Duration = Duration::from_secs(1);

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// For programs: one JSON object a line.
    Json,
}

/// What a service logs when `RUST_LOG` does not say: our own crates' progress and everybody's warnings.
pub const SERVICE_FILTER: &str = "warn,product_service=info,analytics_service=info,notification_service=info,lomash_ledger=info,lomash_platform=info,lomash::reconciliation=info";

/// What a command logs when `RUST_LOG` does not say: its output tells the rest.
pub const COMMAND_FILTER: &str = "warn";

/// What [`start`] started; to be [stopped](Self::stop) when the process ends, or its last spans are lost.
#[derive(Debug)]
#[must_use]
pub struct Telemetry(Option<SdkTracerProvider>);

/// Starts logging, by `default_filter` when `RUST_LOG` does not say, and the export of traces as `service`; to be called
/// once, first thing in `main`. Later calls do nothing.
pub fn start(service: &'static str, format: LogFormat, default_filter: &str) -> Telemetry {
    let (provider, problem) = match provider(service) {
        Ok(provider) => (provider, None),
        Err(problem) => (None, Some(problem)),
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    // The hints keep what nobody listens to as cheap as without these filters.
    let filter = filter.and(filter_fn(|metadata| !is_trace(metadata)).with_max_level_hint(LevelFilter::TRACE));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
    // Whoever read the logs may have gone away. To say so on the same standard error would be a panic, in whatever task logs next.
    let logs = logs.log_internal_errors(false);
    let logs = match format {
        LogFormat::Pretty => logs
            .event_format(WithTrace { line: Format::default().with_target(false).with_ansi(colours), format })
            .with_filter(filter)
            .boxed(),
        LogFormat::Json => logs
            .fmt_fields(tracing_subscriber::fmt::format::JsonFields::new())
            .event_format(WithTrace { line: Format::default().json().flatten_event(true), format })
            .with_filter(filter)
            .boxed(),
    };
    let traces = provider.as_ref().map(|provider| {
        tracing_opentelemetry::layer()
            .with_tracer(provider.tracer("lomash"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false)
            .with_filter(filter_fn(is_trace).with_max_level_hint(LevelFilter::INFO))
    });
    // An error means that logging is set up already, as in tests.
    let first = tracing_subscriber::registry().with(logs).with(traces).try_init().is_ok();
    if let Some(problem) = problem {
        tracing::error!(problem, "traces are not exported; correct the variables OTEL_EXPORTER_OTLP_*");
    }
    if first && provider.is_some() {
        let parent_decides = std::env::var("OTEL_TRACES_SAMPLER").map_or(true, |sampler| sampler.starts_with("parent"));
        // Half of the queue: what was begun before it was full still has room for its end.
        trace::turn_on(queued_spans() / 2, parent_decides);
    }
    Telemetry(provider)
}

impl Telemetry {
    /// Sends the last spans, within [`STOP_TIMEOUT`].
    pub async fn stop(self) {
        let Some(provider) = self.0 else { return };
        // The SDK waits without giving way. Whatever it comes to, there is nobody to tell: the logs say less than the metrics.
        let _ = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(STOP_TIMEOUT)).await;
    }
}

fn is_trace(metadata: &Metadata<'_>) -> bool {
    metadata.target() == trace::TARGET
}

/// The value of a variable that says something.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

fn queued_spans() -> usize {
    let configured = variable("OTEL_BSP_MAX_QUEUE_SIZE").and_then(|value| value.parse().ok());
    configured.filter(|spans| *spans > 0).unwrap_or(QUEUED_SPANS)
}

/// None when traces are off.
fn provider(service: &'static str) -> Result<Option<SdkTracerProvider>, String> {
    let disabled = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let elsewhere = variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value != "otlp");
    let endpoint = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"].into_iter().find_map(variable);
    if disabled || elsewhere || endpoint.is_none() {
        return Ok(None);
    }
    // For a collector behind TLS. An error means that the process has a provider already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut exporter = SpanExporter::builder().with_http();
    if variable("OTEL_EXPORTER_OTLP_TIMEOUT").or_else(|| variable("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")).is_none() {
        exporter = exporter.with_timeout(EXPORT_TIMEOUT);
    }
    let exporter = exporter.with_protocol(Protocol::HttpBinary).build().map_err(|problem| problem.to_string())?;
    let mut config = BatchConfigBuilder::default().with_max_queue_size(queued_spans());
    if variable("OTEL_BSP_SCHEDULE_DELAY").is_none() {
        config = config.with_scheduled_delay(EXPORT_DELAY);
    }
    let batches = BatchSpanProcessor::builder(trace::Settling(exporter)).with_batch_config(config.build()).build();
    // The resource's own detectors read OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; ours holds when they say nothing.
    let named = variable("OTEL_SERVICE_NAME").is_some()
        || variable("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| attributes.contains("service.name="));
    let mut resource = Resource::builder()
        .with_attribute(opentelemetry::KeyValue::new("service.namespace", "lomash"))
        .with_attribute(opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    if !named {
        resource = resource.with_service_name(service);
    }
    let provider = SdkTracerProvider::builder()
        .with_span_processor(trace::Counted { batches, capacity: queued_spans() })
        .with_resource(resource.build());
    Ok(Some(provider.build()))
}

/// A log line with the ids of the trace it was written in.
struct WithTrace<L> {
    line: L,
    format: LogFormat,
}

impl<S, N, L> FormatEvent<S, N> for WithTrace<L>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    L: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let current = opentelemetry::Context::current();
        let (trace_id, span_id) = {
            let span = current.span();
            let span = span.span_context();
            if !span.is_valid() {
                return self.line.format_event(context, writer, event);
            }
            (span.trace_id(), span.span_id())
        };
        let mut line = String::new();
        self.line.format_event(context, Writer::new(&mut line), event)?;
        match self.format {
            LogFormat::Pretty => writeln!(writer, "{} trace_id={trace_id} span_id={span_id}", line.trim_end()),
            LogFormat::Json => {
                let open = line.trim_end().strip_suffix('}').unwrap_or(&line);
                writeln!(writer, "{open},\"trace_id\":\"{trace_id}\",\"span_id\":\"{span_id}\"}}")
            }
        }
    }
}
