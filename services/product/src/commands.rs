//! Commands about products by NATS request: how the command line, and later the other replicas, reach the writer.
//!
//! One JSON request, one JSON reply with the outcome. Not part of the contract with other services; permissions keep
//! the subject to the platform's own tools. A command carries its own id, so that asking again after a lost reply does
//! not act twice (within the stream's de-duplication window).

use std::sync::Arc;

use async_nats::{Client, Message, SubscribeError};
use futures::StreamExt;
use lomash_ledger::{Carried, header};
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::debug;

use crate::committer::{CommandError, Committed, Committer};
use crate::inventory::{Command, Outcome, ProductCommand, Rejection};

/// The subject commands are sent to.
pub const SUBJECT: &str = "lomash.commands.product";

/// The queue group of the replicas: one of them answers.
pub const QUEUE: &str = "product-service";

/// Commands worked on at once; further ones wait in the subscription.
pub const MAX_IN_FLIGHT: usize = lomash_ledger::MAX_BATCH_MESSAGES;

/// Largest request. A product's details take some hundred bytes.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024;

/// Longest reason, in characters; it is stored in a header of each event.
pub const MAX_REASON_CHARS: usize = 500;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Request {
    /// Are you there, and up to which sequence do you know the ledger?
    Ping,
    /// Carry this out.
    Command {
        /// What.
        command: ProductCommand,
        /// Why, for the record.
        #[serde(default)]
        reason: Option<String>,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Reply {
    /// To a ping.
    Pong {
        /// Up to where the replica knows the ledger.
        sequence: u64,
    },
    /// Done and stored.
    Committed {
        /// What it came to.
        #[serde(flatten)]
        outcome: Outcome,
        /// The sequence that shows it.
        sequence: u64,
    },
    /// Not acceptable.
    Rejected {
        /// Why, for programs.
        rejection: Rejection,
        /// Why, for people.
        detail: String,
    },
    /// The request itself is bad.
    BadRequest {
        /// Why.
        detail: String,
    },
    /// Not now; ask again with the same command id.
    Unavailable {
        /// Why.
        detail: String,
    },
}

impl From<Result<Committed, CommandError>> for Reply {
    fn from(answer: Result<Committed, CommandError>) -> Self {
        match answer {
            Ok(Committed { outcome, sequence }) => Self::Committed { outcome, sequence },
            Err(CommandError::Rejected(rejection)) => {
                let detail = rejection.to_string();
                Self::Rejected { rejection, detail }
            }
            Err(problem @ CommandError::TooLarge { .. }) => Self::BadRequest { detail: problem.to_string() },
            Err(problem @ CommandError::Stopping) => Self::Unavailable { detail: problem.to_string() },
        }
    }
}

/// Answers commands until `stop`, then finishes those at work.
///
/// # Errors
/// When the subject cannot be subscribed.
pub async fn serve(client: Client, committer: Committer, stop: CancellationToken) -> Result<(), SubscribeError> {
    let mut requests = client.queue_subscribe(SUBJECT, QUEUE.to_owned()).await?;
    let places = Arc::new(Semaphore::new(MAX_IN_FLIGHT));
    let at_work = TaskTracker::new();
    loop {
        let message = tokio::select! {
            () = stop.cancelled() => break,
            message = requests.next() => match message {
                Some(message) => message,
                None => break,
            },
        };
        let Ok(place) = places.clone().acquire_owned().await else {
            break;
        };
        let (client, committer) = (client.clone(), committer.clone());
        at_work.spawn(async move {
            answer(&client, &committer, message).await;
            drop(place);
        });
    }
    // Ends in bounded time: the committer answers everything when it is stopped.
    at_work.close();
    at_work.wait().await;
    Ok(())
}

async fn answer(client: &Client, committer: &Committer, message: Message) {
    let Some(inbox) = message.reply.clone() else {
        debug!(subject = SUBJECT, "a command without a reply subject was ignored");
        return;
    };
    let reply = match parse(&message) {
        Err(detail) => Reply::BadRequest { detail },
        Ok(Request::Ping) => Reply::Pong { sequence: committer.sequence() },
        Ok(Request::Command { command, reason }) => {
            let text = |name: &str| Some(message.headers.as_ref()?.get(name)?.as_str().to_owned());
            let carried =
                Carried { traceparent: text(header::TRACEPARENT), tracestate: text(header::TRACESTATE), reason };
            let carried = (carried != Carried::default()).then(|| Arc::new(carried));
            committer.submit(Command::Product(command), carried).await.into()
        }
    };
    let body = serde_json::to_vec(&reply).expect("a reply is always JSON");
    if let Err(problem) = client.publish(inbox, body.into()).await {
        debug!(%problem, "the answer to a command could not be sent");
    }
}

fn parse(message: &Message) -> Result<Request, String> {
    if message.payload.len() > MAX_REQUEST_BYTES {
        return Err(format!("the request has {} bytes, at most {MAX_REQUEST_BYTES} are read", message.payload.len()));
    }
    let request: Request =
        serde_json::from_slice(&message.payload).map_err(|problem| format!("not a command: {problem}"))?;
    match &request {
        Request::Command { reason: Some(reason), .. } if reason.chars().count() > MAX_REASON_CHARS => {
            Err(format!("the reason is longer than {MAX_REASON_CHARS} characters"))
        }
        _ => Ok(request),
    }
}
