//! The connection on which deliveries come.
//!
//! The server stores whatever bytes are sent as headers. Over some the client library cuts its connection, and over others the task of
//! its connection panics, after which the client is of no use any more. So what others publish is delivered on a connection of its own: it
//! is made anew when it is gone, and acknowledgements, the ledger and callers over HTTP have theirs.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::Client;
use async_nats::jetstream::{self, Context};
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::receive::Receive;
use crate::streams;

/// Makes a connection.
pub type Connect = Arc<dyn Fn() -> BoxFuture<'static, Result<Client, String>> + Send + Sync>;

/// See the module.
#[derive(Clone)]
pub struct Deliveries(Arc<Inner>);

struct Inner {
    /// Of the connection for everything else.
    context: Context,
    connect: Option<Connect>,
    current: Mutex<Current>,
}

#[derive(Default)]
struct Current {
    own: Option<Own>,
    /// Connections of its own that were made.
    made: u64,
    /// Messages that cannot be delivered and were handed over; those behind what is settled are forgotten.
    handed_over: BTreeSet<u64>,
}

struct Own {
    client: Client,
    /// Leaves a server that has lost the others.
    _watch: AbortOnDropHandle<()>,
}

impl fmt::Debug for Deliveries {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Deliveries").field("has_its_own", &self.0.connect.is_some()).finish_non_exhaustive()
    }
}

impl From<Context> for Deliveries {
    /// Deliveries on the connection for everything: right for what nobody but us publishes.
    fn from(context: Context) -> Self {
        Self::new(context, None)
    }
}

impl Deliveries {
    /// Deliveries on connections that `connect` makes; everything else goes by `context`.
    #[must_use]
    pub fn apart(context: Context, connect: Connect) -> Self {
        Self::new(context, Some(connect))
    }

    fn new(context: Context, connect: Option<Connect>) -> Self {
        Self(Arc::new(Inner { context, connect, current: Mutex::default() }))
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.0.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For everything but deliveries.
    pub(crate) fn context(&self) -> &Context {
        &self.0.context
    }

    /// For deliveries; a connection is made when there is none.
    pub(crate) async fn open(&self, receive: &Receive, stop: &CancellationToken) -> Result<Context, String> {
        let Some(connect) = &self.0.connect else { return Ok(self.0.context.clone()) };
        let known = self.current().own.as_ref().map(|own| own.client.clone());
        let client = match known {
            Some(client) => client,
            None => {
                let client = connect().await?;
                let watch =
                    streams::leave_a_lonely_server(client.clone(), receive.stream, receive.consumer, stop.clone());
                let watch = AbortOnDropHandle::new(tokio::spawn(watch));
                let mut current = self.current();
                current.made += 1;
                current.own = Some(Own { client: client.clone(), _watch: watch });
                client
            }
        };
        Ok(jetstream::new(client))
    }

    /// Gives up a connection that is of no use any more: the next one is made when it is needed.
    pub(crate) fn close(&self) {
        self.current().own = None;
    }

    /// Changes whenever deliveries may have been lost with a connection.
    pub(crate) fn losses(&self) -> (u64, u64) {
        let connects = |client: &Client| client.statistics().connects.load(Ordering::Relaxed);
        if self.0.connect.is_none() {
            return (0, connects(&self.0.context.client()));
        }
        let current = self.current();
        (current.made, current.own.as_ref().map_or(0, |own| connects(&own.client)))
    }

    /// Whether a message that cannot be delivered was handed over already.
    pub(crate) fn is_handed_over(&self, sequence: u64) -> bool {
        self.current().handed_over.contains(&sequence)
    }

    /// Notes that it was; what is at or below `floor` is settled.
    pub(crate) fn note_handed_over(&self, sequence: u64, floor: u64) {
        let mut current = self.current();
        current.handed_over = current.handed_over.split_off(&(floor + 1));
        current.handed_over.insert(sequence);
    }
}
