//! Limits on what one caller, one request and one connection may cost.
//!
//! Owns the rates of callers and the time limit of routes, and the constants of a connection; `server.rs` applies
//! those. Limits that an operator may want to change are in `config.rs`.

use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody as _};
use axum::extract::{Request, State};
use axum::http::header::CONNECTION;
use axum::http::{HeaderValue, Method};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::StreamExt as _;
use governor::clock::{Clock, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hyper::body::{Frame, SizeHint};
use tokio::sync::oneshot;
use tokio::time::{Instant, Sleep, sleep_until};
use uuid::Uuid;

use crate::config::RateConfig;
use crate::problem::Problem;

/// Bytes of a request's line and headers: a token and a few more. hyper answers 431 beyond it.
pub const MAX_HEADER_BYTES: usize = 16 * 1024;
/// Headers of a request: three times what browsers and proxies send. hyper answers 431 beyond it.
pub const MAX_HEADERS: usize = 64;
/// Bytes that are buffered for one connection in each direction.
pub const MAX_BUFFER_BYTES: usize = 64 * 1024;

/// Connections to the listener of health and metrics: a handful of probes and scrapers, and whoever looks by hand.
pub const MAX_HEALTH_CONNECTIONS: usize = 64;
/// Those of one peer of it.
pub const MAX_HEALTH_CONNECTIONS_PER_PEER: usize = 16;
/// How long a probe may take to send its headers: it sends them at once.
pub const HEALTH_HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes a second that a body must bring on average, of the time that we wait for it: an import of 256 MiB has ten minutes and
/// needs fifty times as many, and a body on the slowest line that is in use twice as many.
pub const MIN_BODY_BYTES_PER_SECOND: u32 = 8 * 1024;
/// How long we wait for any body in vain beyond that.
pub const BODY_GRACE: Duration = Duration::from_secs(10);

/// Bytes of a body that are still taken, and thrown away, after its request was answered: a connection that is closed before
/// costs a client that is still sending the answer, which says what was wrong. Catalogues are smaller, nearly all of them.
pub const MAX_DISCARDED_BYTES: usize = 8 * 1024 * 1024;
/// How long they may take.
pub const DISCARD_TIMEOUT: Duration = Duration::from_secs(5);

const _: () = assert!(MAX_HEALTH_CONNECTIONS_PER_PEER < MAX_HEALTH_CONNECTIONS, "one peer must not take all places");
const _: () = assert!(crate::auth::MAX_TOKEN_BYTES < MAX_HEADER_BYTES, "a token must fit into the headers");
const _: () = assert!(MAX_HEADER_BYTES < MAX_BUFFER_BYTES, "the headers must fit into the buffer");

/// How many requests are counted until callers that have been idle are forgotten.
const FORGET_EVERY: u32 = 4096;

/// How many requests each caller may send; reads and writes are counted apart.
#[derive(Debug)]
pub struct RateLimits {
    reads: Option<Rate>,
    writes: Option<Rate>,
}

#[derive(Debug)]
struct Rate {
    callers: DefaultKeyedRateLimiter<Uuid>,
    clock: DefaultClock,
    counted: AtomicU32,
}

impl RateLimits {
    /// Limits without history.
    #[must_use]
    pub fn new(config: &RateConfig) -> Self {
        Self { reads: Rate::new(config.http_reads_per_second), writes: Rate::new(config.http_writes_per_second) }
    }

    /// Counts a request of a caller.
    ///
    /// # Errors
    /// 429 with `Retry-After` when the caller has used its share up.
    pub fn check(&self, subject: Uuid, read: bool) -> Result<(), Problem> {
        match if read { &self.reads } else { &self.writes } {
            Some(rate) => rate.check(subject),
            None => Ok(()),
        }
    }
}

impl Rate {
    fn new(per_second: u32) -> Option<Self> {
        let per_second = NonZeroU32::new(per_second)?;
        let quota =
            Quota::per_second(per_second).allow_burst(per_second.saturating_mul(NonZeroU32::MIN.saturating_add(1)));
        Some(Self { callers: RateLimiter::dashmap(quota), clock: DefaultClock::default(), counted: AtomicU32::new(0) })
    }

    fn check(&self, subject: Uuid) -> Result<(), Problem> {
        // Whoever has a whole share again is as good as new: between two sweeps at most FORGET_EVERY callers are added.
        if self.counted.fetch_add(1, Ordering::Relaxed) % FORGET_EVERY == FORGET_EVERY - 1 {
            self.callers.retain_recent();
            self.callers.shrink_to_fit();
        }
        self.callers.check_key(&subject).map_err(|until| {
            let wait = until.wait_time_from(self.clock.now());
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            Problem::too_many_requests("This caller has sent more requests than its share.", seconds.max(1))
        })
    }
}

/// Whether a request of this method only reads.
#[must_use]
pub fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Gives every route of `router` a limit until its answer begins; beyond it the request is dropped and answered 504.
/// Routers with other limits are merged beside it.
///
/// # Panics
/// When the router has no routes.
pub fn time_limited<S: Clone + Send + Sync + 'static>(router: Router<S>, limit: Duration) -> Router<S> {
    router.route_layer(middleware::from_fn_with_state(limit, within))
}

async fn within(State(limit): State<Duration>, request: Request, next: Next) -> Response {
    match tokio::time::timeout(limit, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::timeout().into_response(),
    }
}

/// Puts the least rate on the body of a request, see [`MIN_BODY_BYTES_PER_SECOND`]. A body that rests for as long as it may
/// and then brings a byte would hold its place for hours.
pub(crate) async fn paced(request: Request) -> Request {
    request.map(|body| Body::new(Paced { body, brought: 0, waited: Duration::ZERO, since: None, until: None }))
}

/// Lets a client that is answered before it has sent its whole body send it, up to [`MAX_DISCARDED_BYTES`] and
/// [`DISCARD_TIMEOUT`]; beyond them the connection is closed. The answer does not wait for that.
pub(crate) async fn discarding(request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let is_small = request.body().size_hint().upper().is_some_and(|bytes| bytes <= MAX_DISCARDED_BYTES as u64);
    let (owner, mut returned) = oneshot::channel();
    let request = request.map(|body| Body::new(Lent { body, has_ended: false, owner: Some(owner) }));
    let mut response = next.run(request).await;
    // A handler that still reads, while its answer goes out, keeps the body.
    if let Ok(body) = returned.try_recv() {
        if !is_small {
            // So that no client sends its next request on it.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        tokio::spawn(tokio::time::timeout(DISCARD_TIMEOUT, async move {
            let mut rest = body.into_data_stream();
            let mut discarded = 0;
            while let Some(Ok(bytes)) = rest.next().await {
                discarded += bytes.len();
                if discarded > MAX_DISCARDED_BYTES {
                    break;
                }
            }
        }));
    }
    response
}

/// A body that goes back to its owner when it is dropped before its end.
struct Lent {
    body: Body,
    has_ended: bool,
    owner: Option<oneshot::Sender<Body>>,
}

impl hyper::body::Body for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        this.has_ended |= matches!(polled, Poll::Ready(None | Some(Err(_))));
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if self.has_ended || self.body.is_end_stream() {
            return;
        }
        if let Some(owner) = self.owner.take() {
            // An owner that has gone does not want it.
            let _ = owner.send(std::mem::take(&mut self.body));
        }
    }
}

/// A body that fails when it is too slow.
struct Paced {
    body: Body,
    brought: u64,
    /// How long it was waited for until it brought something last.
    waited: Duration,
    /// Since when it is waited for.
    since: Option<Instant>,
    /// Until when.
    until: Option<Pin<Box<Sleep>>>,
}

impl Paced {
    /// How long it may have been waited for.
    fn patience(&self) -> Duration {
        BODY_GRACE
            + Duration::from_micros(self.brought.saturating_mul(1_000_000) / u64::from(MIN_BODY_BYTES_PER_SECOND))
    }
}

impl hyper::body::Body for Paced {
    type Data = Bytes;
    type Error = axum::BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::BoxError>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some(since) = this.since.take() {
                this.waited += since.elapsed();
                this.until = None;
            }
            if let Some(Ok(data)) = frame.as_ref().map(|frame| frame.as_ref().map(Frame::data_ref)) {
                this.brought += data.map_or(0, |data| data.len() as u64);
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let since = *this.since.get_or_insert_with(Instant::now);
        let rest = this.patience().saturating_sub(this.waited);
        let until = this.until.get_or_insert_with(|| Box::pin(sleep_until(since + rest)));
        match until.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Some(Err("the body comes too slowly".into()))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(reads: u32, writes: u32) -> RateLimits {
        RateLimits::new(&RateConfig { http_reads_per_second: reads, http_writes_per_second: writes })
    }

    #[test]
    fn a_caller_that_sends_too_much_waits_and_others_do_not() {
        let limits = limits(0, 1);
        let (greedy, modest) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert!(limits.check(greedy, false).is_ok() && limits.check(greedy, false).is_ok());
        let problem = limits.check(greedy, false).expect_err("the third at once");
        assert_eq!(problem.document().members["retryAfterSeconds"], 1);
        assert!(limits.check(modest, false).is_ok());
        assert!((0..1000).all(|_| limits.check(greedy, true).is_ok()), "0 is no limit");
    }

    #[test]
    fn idle_callers_are_forgotten() {
        let limits = limits(1_000_000, 0);
        for caller in 0..u128::from(FORGET_EVERY) * 20 {
            assert!(limits.check(Uuid::from_u128(caller), true).is_ok());
        }
        let known = limits.reads.as_ref().map(|rate| rate.callers.len());
        assert!(known.is_some_and(|known| known <= FORGET_EVERY as usize * 2), "{known:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_trickles_is_given_up_and_one_that_keeps_the_rate_is_not() {
        /// `times` pieces of `bytes`, one every `pause`.
        fn body(times: u64, bytes: usize, pause: Duration) -> Body {
            Body::from_stream(futures::stream::unfold(0, move |sent| async move {
                if sent == times {
                    return None;
                }
                tokio::time::sleep(pause).await;
                Some((Ok::<_, std::convert::Infallible>(Bytes::from(vec![b'x'; bytes])), sent + 1))
            }))
        }
        async fn received(body: Body) -> Result<usize, axum::Error> {
            let request = paced(Request::new(body)).await;
            axum::body::to_bytes(request.into_body(), usize::MAX).await.map(|bytes| bytes.len())
        }
        let began = Instant::now();
        received(body(u64::MAX, 1, Duration::from_secs(1))).await.expect_err("a byte a second");
        assert!(began.elapsed() >= BODY_GRACE && began.elapsed() < BODY_GRACE * 2, "{:?}", began.elapsed());
        received(body(1, 1, Duration::from_secs(3600))).await.expect_err("nothing for an hour");
        let rate = MIN_BODY_BYTES_PER_SECOND as usize;
        assert_eq!(received(body(600, rate, Duration::from_secs(1))).await.expect("it keeps the rate"), 600 * rate);
        // Time in which nobody reads it is not the client's.
        let unread = paced(Request::new(body(2, 1, Duration::from_secs(1)))).await;
        tokio::time::sleep(BODY_GRACE * 100).await;
        assert_eq!(axum::body::to_bytes(unread.into_body(), 10).await.expect("read").len(), 2);
    }
}
