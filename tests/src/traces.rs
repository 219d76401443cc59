//! A collector of the tests: takes spans by OTLP over HTTP as Jaeger does, and answers who is whose parent.
//!
//! Owns reading the wire format. What the trace of an order must look like is said by the tests, in the words of
//! [`Trace`]: a span by service and name, its parent, its links, its attributes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use bytes::Bytes;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as SpanStatus;
use prost::Message as _;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;

use crate::eventually;

/// A span as it was exported.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// `service.name` of whoever made it.
    pub service: String,
    /// Its name.
    pub name: String,
    /// 1 internal, 2 server, 3 client, 4 producer, 5 consumer.
    pub kind: i32,
    /// Its trace, in hexadecimal.
    pub trace_id: String,
    /// Its own id.
    pub span_id: String,
    /// Its parent's; empty for the first of a trace.
    pub parent_id: String,
    /// Trace and span of each link.
    pub links: Vec<(String, String)>,
    /// Attributes, as texts.
    pub attributes: BTreeMap<String, String>,
    /// Whether it says that something failed.
    pub failed: bool,
}

impl Span {
    /// Whether it is of that service and name.
    #[must_use]
    pub fn is(&self, service: &str, name: &str) -> bool {
        self.service == service && self.name == name
    }

    /// An attribute.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name).map(String::as_str)
    }

    /// Whether it is linked to that span.
    #[must_use]
    pub fn links_to(&self, other: &Self) -> bool {
        self.links.iter().any(|(trace, span)| *trace == other.trace_id && *span == other.span_id)
    }

    /// Its W3C `traceparent`.
    #[must_use]
    pub fn traceparent(&self) -> String {
        format!("00-{}-{}-01", self.trace_id, self.span_id)
    }
}

/// Spans that were exported, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Trace(pub Vec<Span>);

impl Trace {
    /// The spans of that service and name.
    pub fn named<'t>(&'t self, service: &'t str, name: &'t str) -> impl Iterator<Item = &'t Span> {
        self.0.iter().filter(move |span| span.is(service, name))
    }

    /// The one span of that service and name which has this attribute.
    #[must_use]
    pub fn with(&self, service: &str, name: &str, attribute: (&str, &str)) -> Option<&Span> {
        self.0.iter().find(|span| span.is(service, name) && span.attribute(attribute.0) == Some(attribute.1))
    }

    /// The children of `parent` of that service and name.
    #[must_use]
    pub fn child(&self, parent: &Span, service: &str, name: &str) -> Option<&Span> {
        let of_parent = |span: &&Span| span.trace_id == parent.trace_id && span.parent_id == parent.span_id;
        self.0.iter().filter(|span| span.is(service, name)).find(of_parent)
    }

    /// Follows a chain of children from `first`; the last one, once all are there.
    #[must_use]
    pub fn chain(&self, first: &Span, steps: &[(&str, &str)]) -> Option<Span> {
        let mut span = first.clone();
        for (service, name) in steps {
            span = self.child(&span, service, name)?.clone();
        }
        Some(span)
    }
}

/// The collector; it ends with the test.
#[derive(Debug)]
pub struct Collector {
    url: String,
    spans: Arc<Mutex<Vec<Span>>>,
    task: AbortHandle,
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Collector {
    /// Listens on a free port.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let url = format!("http://{}", listener.local_addr()?);
        let spans = Arc::new(Mutex::new(Vec::new()));
        let app = Router::new().route("/v1/traces", post(take)).with_state(spans.clone());
        let task = tokio::spawn(async move { axum::serve(listener, app).await }).abort_handle();
        Ok(Self { url, spans, task })
    }

    /// For `OTEL_EXPORTER_OTLP_ENDPOINT`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What has come so far.
    #[must_use]
    pub fn trace(&self) -> Trace {
        Trace(self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Waits until `look` finds what it looks for among the spans.
    ///
    /// # Errors
    /// After `within`, with the names of all spans that came.
    pub async fn until<T>(&self, what: &str, within: Duration, mut look: impl FnMut(&Trace) -> Option<T>) -> Result<T> {
        eventually(what, within, async || {
            let trace = self.trace();
            let found = look(&trace);
            anyhow::ensure!(
                found.is_some(),
                "there are {:#?}",
                trace
                    .0
                    .iter()
                    .map(|span| format!("{}: {} < {}", span.service, span.name, span.parent_id))
                    .collect::<Vec<_>>()
            );
            Ok(found)
        })
        .await
    }
}

async fn take(State(spans): State<Arc<Mutex<Vec<Span>>>>, body: Bytes) -> StatusCode {
    let Ok(request) = ExportTraceServiceRequest::decode(body) else {
        return StatusCode::BAD_REQUEST;
    };
    let mut all = spans.lock().unwrap_or_else(PoisonError::into_inner);
    for of_resource in request.resource_spans {
        let resource = attributes(of_resource.resource.map(|resource| resource.attributes).unwrap_or_default());
        let service = resource.get("service.name").cloned().unwrap_or_default();
        for span in of_resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
            all.push(Span {
                service: service.clone(),
                name: span.name,
                kind: span.kind,
                trace_id: hex(&span.trace_id),
                span_id: hex(&span.span_id),
                parent_id: hex(&span.parent_span_id),
                links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
                attributes: attributes(span.attributes),
                failed: span.status.is_some_and(|status| status.code == SpanStatus::Error as i32),
            });
        }
    }
    StatusCode::OK
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn attributes(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<AnyValue>| match value.and_then(|value| value.value) {
        Some(Value::StringValue(text)) => text,
        Some(Value::BoolValue(flag)) => flag.to_string(),
        Some(Value::IntValue(number)) => number.to_string(),
        Some(Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|attribute| (attribute.key, text(attribute.value))).collect()
}
