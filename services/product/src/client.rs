//! The other end of [`crate::commands`]: sends a command and waits for what it came to.

use std::time::Duration;

use async_nats::client::RequestErrorKind;
use async_nats::{Client, HeaderMap, Request as NatsRequest};
use lomash_ledger::header;
use lomash_platform::trace::{self, Reference};
use tracing::{Instrument as _, Span};

use crate::commands::{Reply, Request, SUBJECT};
use crate::inventory::{Outcome, ProductCommand, Rejection};

/// How long one try waits for its answer.
pub const TRY_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a command is tried again while nobody answers: a failover takes some seconds. Half of the stream's
/// de-duplication window, within which no try acts twice.
pub const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

const PAUSE: Duration = Duration::from_millis(100);

/// Why a command has no good outcome.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It is not acceptable.
    #[error("{0}")]
    Rejected(Rejection),
    /// The service does not understand the request.
    #[error("the product service refused the request: {0}")]
    BadRequest(String),
    /// Nobody answered. The command may have been carried out; within the stream's de-duplication window it may be sent
    /// again with the same id, and is then not carried out twice.
    #[error("the product service did not answer ({0}); is it running?")]
    Unavailable(String),
}

/// What a command came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// The outcome.
    pub outcome: Outcome,
    /// The sequence that shows it.
    pub sequence: u64,
}

/// Sends commands to whichever replica of the product service answers.
#[derive(Clone, Debug)]
pub struct ProductClient {
    client: Client,
}

impl ProductClient {
    /// A client on this connection.
    #[must_use]
    pub const fn new(client: Client) -> Self {
        Self { client }
    }

    /// Asks whether a replica is there; answers up to which sequence it knows the ledger. Tries once.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`].
    pub async fn ping(&self) -> Result<u64, ClientError> {
        match self.ask(&Request::Ping).await.map_err(ClientError::Unavailable)? {
            Reply::Pong { sequence } => Ok(sequence),
            other => Err(ClientError::BadRequest(format!("unexpected reply to a ping: {other:?}"))),
        }
    }

    /// Has a command carried out, trying again for up to a minute while nobody answers. When the answer of a try was
    /// lost, the next one may hear [`Rejection::Repeated`]: it was carried out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn send(&self, command: ProductCommand, reason: Option<String>) -> Result<Done, ClientError> {
        let request = Request::Command { command, reason };
        let deadline = tokio::time::Instant::now() + GIVE_UP_AFTER;
        loop {
            let problem = match self.ask(&request).await {
                Ok(Reply::Committed { outcome, sequence, .. }) => return Ok(Done { outcome, sequence }),
                Ok(Reply::Rejected { rejection, .. }) => return Err(ClientError::Rejected(rejection)),
                Ok(Reply::BadRequest { detail }) => return Err(ClientError::BadRequest(detail)),
                Ok(Reply::Pong { .. }) => return Err(ClientError::BadRequest("a pong is no answer".to_owned())),
                Ok(Reply::Unavailable { detail }) | Err(detail) => detail,
            };
            if tokio::time::Instant::now() >= deadline {
                return Err(ClientError::Unavailable(problem));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn ask(&self, request: &Request) -> Result<Reply, String> {
        let body = serde_json::to_vec(request).map_err(|problem| problem.to_string())?;
        let span = send_span(request);
        let mut headers = HeaderMap::new();
        if let Some(cause) = Reference::of(&span) {
            headers.insert(header::TRACEPARENT, cause.traceparent());
        }
        let request = NatsRequest::new().payload(body.into()).headers(headers).timeout(Some(TRY_TIMEOUT));
        let asking = self.client.send_request(SUBJECT, request).instrument(span);
        let answer = asking.await.map_err(|problem| match problem.kind() {
            RequestErrorKind::TimedOut => format!("no answer within {} s", TRY_TIMEOUT.as_secs()),
            RequestErrorKind::NoResponders => "no replica is running".to_owned(),
            _ => problem.to_string(),
        })?;
        serde_json::from_slice(&answer.payload).map_err(|problem| format!("the answer is not a reply: {problem}"))
    }
}

/// The span that the trace of a command begins with, or goes on with when its sender has one.
fn send_span(request: &Request) -> Span {
    let Request::Command { command, .. } = request else {
        return Span::none();
    };
    if !trace::has_room() {
        return Span::none();
    }
    tracing::info_span!(
        target: trace::TARGET,
        "send",
        otel.name = format!("send {SUBJECT}"),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.type = "send",
        messaging.destination.name = SUBJECT,
        command.id = %command.command_id,
        product.id = %command.product_id,
    )
}
