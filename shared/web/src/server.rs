//! The server loop, and what every request passes through.
//!
//! HTTP/1.1 without TLS: a proxy in front has that. Health and metrics have a listener of their own. Nothing that a client does or leaves undone keeps a
//! connection, a request or memory for longer than the limits say. Requests get an id, which is in the log, in the
//! header `X-Request-Id` and in problems; the path is logged, the query and the headers are not.
//!
//! What hyper refuses before there is a request (431 for headers that are too many or too large, 400 for what is not
//! HTTP) is answered without a body.

use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request};
use axum::http::header::X_CONTENT_TYPE_OPTIONS;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use lomash_platform::places::{Place, Places};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::{Instrument as _, debug, debug_span, info, warn};
use uuid::Uuid;

use crate::config::HttpConfig;
use crate::limits::{
    self, HEALTH_HEADER_TIMEOUT, MAX_BUFFER_BYTES, MAX_HEADER_BYTES, MAX_HEADERS, MAX_HEALTH_CONNECTIONS,
    MAX_HEALTH_CONNECTIONS_PER_PEER,
};
use crate::observed;
use crate::problem::{Problem, no_such_method, no_such_route};

/// Pause after a connection could not be accepted: mostly there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a peer hears whose places are taken, before anything of its request is read.
const TOO_MANY_OF_ONE_PEER: &str = "HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\nconnection: close\r\n\
     content-length: 0\r\n\r\n";

static REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// What the request that a task is about is known by.
struct Known {
    id: Uuid,
    /// The template of its route, once that is found.
    route: OnceLock<MatchedPath>,
}

tokio::task_local! {
    static REQUEST: Known;
}

/// The id of the request that this task is about; None outside of one.
#[must_use]
pub fn request_id() -> Option<Uuid> {
    REQUEST.try_with(|known| known.id).ok()
}

/// Notes which route a request took, for metrics and traces; to be put around the routes themselves.
pub(crate) fn with_known_routes(routes: Router) -> Router {
    routes.layer(middleware::from_fn(note_route))
}

async fn note_route(request: Request, next: Next) -> Response {
    if let Some(path) = request.extensions().get::<MatchedPath>() {
        // Outside of a request there is nobody to know it; and the first one found is the route.
        let _ = REQUEST.try_with(|known| known.route.set(path.clone()));
    }
    next.run(request).await
}

/// Puts around the routes of a service what every request passes through: its id and log line, panics as 500, body
/// limits, and problems for what is not there. To be called last, with all routes.
pub fn application(routes: Router, config: &HttpConfig) -> Router {
    framed(with_known_routes(routes.fallback(no_such_route).method_not_allowed_fallback(no_such_method)), config)
}

/// The same for routes that have their own answer to unknown paths and methods.
pub fn framed(routes: Router, config: &HttpConfig) -> Router {
    routes
        .layer(DefaultBodyLimit::max(config.max_body_bytes()))
        .layer(RequestBodyTimeoutLayer::new(config.stall_timeout()))
        .layer(middleware::map_request(limits::paced))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(limits::discarding))
        .layer(middleware::from_fn(in_context))
}

fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    Problem::internal(format!("a handler panicked: {message}")).into_response()
}

async fn in_context(request: Request, next: Next) -> Response {
    let id = Uuid::new_v4();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = debug_span!("request", request.id = %id);
    let traced = observed::server_span(&request, id);
    let started = Instant::now();
    let answering = async {
        let response = next.run(request).await;
        (response, REQUEST.with(|known| known.route.get().cloned()))
    };
    let known = Known { id, route: OnceLock::new() };
    let answering = REQUEST.scope(known, answering).instrument(span).instrument(traced.clone());
    let (mut response, route) = answering.await;
    observed::answered(&traced, &method, route.as_ref().map(MatchedPath::as_str), response.status(), started.elapsed());
    debug!(request.id = %id, %method, path, status = response.status().as_u16(),
        duration_ms = started.elapsed().as_millis(), "answered");
    let headers = response.headers_mut();
    if let Ok(id) = HeaderValue::from_str(&id.to_string()) {
        headers.insert(REQUEST_ID_HEADER.clone(), id);
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A listener that is bound and not serving yet.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    /// What is served, for the log.
    what: &'static str,
    options: Options,
}

#[derive(Debug, Clone)]
struct Options {
    max_connections: usize,
    /// None: no limit.
    max_connections_per_peer: Option<usize>,
    header_timeout: Duration,
    stall_timeout: Duration,
    drain_timeout: Duration,
}

impl Server {
    /// Binds `HTTP_LISTEN`.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind(config: &HttpConfig) -> anyhow::Result<Self> {
        let per_peer = usize::try_from(config.http_max_connections_per_peer).unwrap_or(usize::MAX);
        let options = Options {
            max_connections: usize::try_from(config.http_max_connections).unwrap_or(Semaphore::MAX_PERMITS),
            max_connections_per_peer: (per_peer > 0).then_some(per_peer),
            header_timeout: config.header_timeout(),
            stall_timeout: config.stall_timeout(),
            drain_timeout: config.drain_timeout(),
        };
        Self::listen(config.http_listen, "HTTP_LISTEN", "HTTP", options).await
    }

    /// Binds `HEALTH_LISTEN`, which has places of its own: nothing that happens to the other listener takes one of them.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn bind_health(config: &HttpConfig) -> anyhow::Result<Self> {
        let options = Options {
            max_connections: MAX_HEALTH_CONNECTIONS,
            max_connections_per_peer: Some(MAX_HEALTH_CONNECTIONS_PER_PEER),
            header_timeout: HEALTH_HEADER_TIMEOUT,
            stall_timeout: config.stall_timeout(),
            drain_timeout: config.drain_timeout(),
        };
        Self::listen(config.health_listen, "HEALTH_LISTEN", "health and metrics", options).await
    }

    async fn listen(
        wanted: SocketAddr,
        setting: &'static str,
        what: &'static str,
        options: Options,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(wanted)
            .await
            .with_context(|| format!("could not listen on {wanted}; set {setting} to a free address"))?;
        let address = listener.local_addr().context("a listener without an address")?;
        Ok(Self { listener, address, what, options })
    }

    /// Where it listens; with the port that port 0 became.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled, and then until what is in flight is answered or the drain timeout is over.
    ///
    /// Whoever cancels `stop` has said before that the process is not ready ([`crate::Health::drop_first`]). Answers without
    /// an end, such as event streams, should end themselves when `stop` is cancelled, or they are cut off at the drain timeout.
    pub async fn serve(self, app: Router, stop: CancellationToken) {
        let Self { listener, address, what, options } = self;
        info!(%address, "serving {what}");
        let permits = Arc::new(Semaphore::new(options.max_connections));
        // Those in all are waited for, and none waits for those of its peer.
        let of_peers = Places::new(usize::MAX, options.max_connections_per_peer.unwrap_or(usize::MAX));
        let connections = TaskTracker::new();
        // If this future is dropped, no connection outlives it.
        let closing = CancellationToken::new();
        let _close = closing.clone().drop_guard();
        let finishing = closing.child_token();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = accept(&listener, &permits, &of_peers) => accepted,
            };
            match accepted {
                Ok((stream, place)) => {
                    let (app, options) = (app.clone(), options.clone());
                    let (finishing, closing) = (finishing.clone(), closing.clone());
                    connections.spawn(async move {
                        serve_connection(stream, app, &options, finishing, closing).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!("could not accept a connection: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        finishing.cancel();
        connections.close();
        if tokio::time::timeout(options.drain_timeout, connections.wait()).await.is_err() {
            warn!(connections = connections.len(), "requests in flight took too long to finish and are cut off");
            closing.cancel();
            connections.wait().await;
        }
        debug!("{what} has ended");
    }
}

/// Who shares places: an address, of IPv6 its /64, which is what one customer of a network has.
fn peer(address: SocketAddr) -> IpAddr {
    match address.ip().to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64))),
        v4 => v4,
    }
}

/// The next connection, once there is room for it; those beyond wait in the kernel's queue. Those of a peer that has its share
/// are answered and closed on the way.
async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
    of_peers: &Places<IpAddr>,
) -> io::Result<(TcpStream, (OwnedSemaphorePermit, Place<IpAddr>))> {
    let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
    loop {
        let (stream, address) = listener.accept().await?;
        match of_peers.take(peer(address)) {
            Ok(place) => return Ok((stream, (permit, place))),
            Err(_) => {
                observed::refused_connection();
                // Whether it is heard does not matter, and nobody waits for it.
                let _ = stream.into_std().and_then(|mut stream| stream.write(TOO_MANY_OF_ONE_PEER.as_bytes()));
            }
        }
    }
}

async fn serve_connection(
    stream: TcpStream,
    app: Router,
    options: &Options,
    finishing: CancellationToken,
    closing: CancellationToken,
) {
    // An answer is written in one piece: there is nothing to wait for.
    let _ = stream.set_nodelay(true);
    let stream = Unstalled::new(stream, options.stall_timeout);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_timeout)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEADER_BYTES)
        .max_buf_size(MAX_BUFFER_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    tokio::pin!(connection);
    let mut ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = finishing.cancelled() => None,
    };
    if ended.is_none() {
        connection.as_mut().graceful_shutdown();
        ended = tokio::select! {
            ended = connection.as_mut() => Some(ended),
            () = closing.cancelled() => None,
        };
    }
    if let Some(Err(error)) = ended {
        // Clients go away and are slow all the time.
        debug!("a connection ended: {error}");
    }
}

/// A connection that fails when its client does not take what is written to it.
///
/// hyper bounds the wait for headers, and the body layer that for a body; this is the other direction.
struct Unstalled {
    stream: TcpStream,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl Unstalled {
    fn new(stream: TcpStream, limit: Duration) -> Self {
        Self { stream, limit, waiting: None }
    }

    /// Any progress begins the wait anew.
    fn bounded<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.waiting = None;
            return outcome;
        }
        let limit = self.limit;
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        match waiting.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Unstalled {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Unstalled {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, outcome)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, outcome)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.bounded(cx, outcome)
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
