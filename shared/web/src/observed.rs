//! What the HTTP adapter shows of itself: `/metrics`, requests by route and status, and a span for each request.
//!
//! Routes are told by their template (`/v1/products/{id}`), and methods only when they are well-known: a client cannot make
//! up labels.

use std::sync::LazyLock;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use lomash_platform::metrics::{self, Counter, Family, Histogram, Metrics, seconds};
use lomash_platform::trace;
use tracing::Span;
use uuid::Uuid;

/// The route of what was not found.
const NO_ROUTE: &str = "none";

type Requests = Family<[(&'static str, String); 3], Counter>;
type Durations = Family<[(&'static str, String); 2], Histogram, fn() -> Histogram>;

static REQUESTS: LazyLock<Requests> = LazyLock::new(|| {
    let help = "HTTP requests answered, by method, route and status";
    Metrics::of_process().register("lomash_http_requests", help, Family::default())
});
static DURATIONS: LazyLock<Durations> = LazyLock::new(|| {
    let help = "From an HTTP request's headers to the headers of its answer, by method and route";
    let family = Family::new_with_constructor(seconds as fn() -> Histogram);
    Metrics::of_process().register("lomash_http_request_duration_seconds", help, family)
});

static REFUSED: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Connections closed at once because their peer had all its places";
    Metrics::of_process().register("lomash_http_connections_refused", help, Counter::default())
});

/// A connection was refused.
pub(crate) fn refused_connection() {
    REFUSED.inc();
}

/// `GET /metrics`, open to all: it holds no secrets and no business data beyond totals.
pub(crate) fn routes() -> Router {
    Router::new().route("/metrics", get(page))
}

async fn page() -> impl IntoResponse {
    ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], Metrics::of_process().text())
}

fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        // The word of OpenTelemetry's conventions.
        _ => "_OTHER",
    }
}

fn text<'a>(request: &'a Request, name: &HeaderName) -> Option<&'a str> {
    request.headers().get(name)?.to_str().ok()
}

static TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
static TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The server span of a request, which continues its caller's; one that is not exported for health and metrics.
pub(crate) fn server_span(request: &Request, id: Uuid) -> Span {
    let path = request.uri().path();
    if !trace::is_on() || matches!(path, "/healthz" | "/readyz" | "/metrics") {
        return Span::none();
    }
    let Some(continued) = trace::begin(text(request, &TRACEPARENT), text(request, &TRACESTATE)) else {
        return Span::none();
    };
    let method = known(request.method());
    let span = tracing::info_span!(
        target: trace::TARGET,
        parent: None,
        "request",
        otel.name = method,
        otel.kind = "server",
        http.request.method = method,
        http.route = tracing::field::Empty,
        http.response.status_code = tracing::field::Empty,
        url.scheme = "http",
        url.path = path,
        user_agent.original = text(request, &header::USER_AGENT),
        request.id = %id,
        order.id = tracing::field::Empty,
        product.id = tracing::field::Empty,
    );
    continued.adopt(&span);
    span
}

/// A request is answered.
pub(crate) fn answered(span: &Span, method: &Method, route: Option<&str>, status: StatusCode, took: Duration) {
    let method = known(method);
    let route_label = route.unwrap_or(NO_ROUTE);
    let labels = [("method", method.to_owned()), ("route", route_label.to_owned())];
    DURATIONS.get_or_create(&labels).observe(took.as_secs_f64());
    let [method_label, route_label] = labels;
    REQUESTS.get_or_create(&[method_label, route_label, ("status", status.as_str().to_owned())]).inc();
    if span.is_disabled() {
        return;
    }
    span.record("http.response.status_code", status.as_u16());
    if let Some(route) = route {
        span.record("http.route", route);
        trace::rename(span, format!("{method} {route}"));
    }
    if status.is_server_error() {
        trace::fail(span, status.as_str());
    }
}
