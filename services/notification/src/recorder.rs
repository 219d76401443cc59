//! From deliveries to recorded alerts: one task that takes what has arrived, in the order of the stream, and records it in one
//! transaction. Messages are settled after it has committed.
//!
//! Order matters because a change of stock is judged by the threshold in force at its sequence. The consumer pins one replica,
//! which gets new messages in order. When it gets the pin, another replica may have died with messages in hand that come back
//! later than newer ones arrive; so the recorder first waits until it holds everything that the server says is outstanding
//! (`gather`), and sorts.

use std::collections::HashSet;
use std::time::Duration;

use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{self, PullConsumer};
use lomash_contract::parse_stored;
use lomash_ledger::receive::{Delivery, Receive, Settle};
use lomash_ledger::{header, streams};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::alerts::Alerts;
use crate::books::{Arrival, Rules, Verdict};
use crate::observed;

/// Messages in hand at once: all that the consumer delivers without an acknowledgement (`max_ack_pending`), so that what
/// comes back finds room.
pub const MAX_IN_FLIGHT: usize = 2_000;

/// Their payloads: far more than they have.
const MAX_BYTES_IN_FLIGHT: usize = 64 * 1024 * 1024;

/// Messages of one transaction.
const MAX_BATCH: usize = 1_000;

/// How often the server hears that messages are being handled; a third of the consumer's `ack_wait`.
const IN_PROGRESS_EVERY: Duration = Duration::from_secs(5);

/// Longest that what another replica had in hand is waited for: it comes back after the consumer's `ack_wait` of 15 s. What is
/// later than this is judged by itself when it comes.
const GATHER_PATIENCE: Duration = Duration::from_secs(40);

/// Pause between two looks at what is outstanding.
const GATHER_PAUSE: Duration = Duration::from_millis(100);

/// How often a recorder with nothing to do looks whether the schema was dropped.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Pauses between tries while Postgres is away, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// Pause before a message comes back that could not be recorded because the service stops.
const STOPPING_RETRY: Duration = Duration::from_millis(100);

/// Deliveries after which a message whose handler panics is given up.
const MAX_PANICS: u64 = 3;

/// What is received.
#[must_use]
pub const fn receive() -> Receive {
    Receive {
        stream: streams::INVENTORY,
        consumer: streams::NOTIFICATION,
        group: Some(streams::NOTIFICATION_GROUP),
        max_in_flight: MAX_IN_FLIGHT,
        max_in_flight_bytes: MAX_BYTES_IN_FLIGHT,
        max_panics: MAX_PANICS,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

#[derive(Debug)]
struct Queued {
    arrival: Arrival,
    /// By which pin it was delivered.
    pin: Option<String>,
    answer: oneshot::Sender<Verdict>,
}

/// Where deliveries are handed in. Clones are the same.
#[derive(Clone, Debug)]
pub struct Intake(mpsc::UnboundedSender<Queued>);

/// The recording task's end of it.
pub struct Recorder {
    // Not bounded here: the receive loop has at most MAX_IN_FLIGHT deliveries at work.
    queue: mpsc::UnboundedReceiver<Queued>,
    context: Context,
    alerts: Alerts,
    rules: Rules,
    pin: Option<String>,
}

/// A recorder and where to hand deliveries in.
#[must_use]
pub fn recorder(context: Context, alerts: Alerts, rules: Rules) -> (Intake, Recorder) {
    let (sender, queue) = mpsc::unbounded_channel();
    (Intake(sender), Recorder { queue, context, alerts, rules, pin: None })
}

impl Intake {
    /// Handles a delivery. It is handed in at once, in the order in which this is called, and settled when it is recorded.
    pub fn handle(&self, delivery: Delivery) -> impl Future<Output = Settle> + Send + use<> {
        let message_id = delivery.header("Nats-Msg-Id");
        let event =
            parse_stored(&delivery.subject, message_id, &delivery.payload).map_err(|foreign| foreign.to_string());
        let trace =
            observed::context_to_keep(delivery.header(header::TRACEPARENT), delivery.header(header::TRACESTATE));
        let arrival = Arrival {
            sequence: delivery.sequence,
            deliveries: delivery.deliveries,
            stored_at: delivery.stored_at,
            trace,
            event,
        };
        let (answer, verdict) = oneshot::channel();
        // The recorder is gone only when the service stops; the answer then says so.
        let _ = self.0.send(Queued { arrival, pin: delivery.header("Nats-Pin-Id").map(str::to_owned), answer });
        async move {
            match verdict.await {
                Ok(Verdict::Recorded) => {
                    lomash_ledger::crash_point!("notify-after-record");
                    Settle::Done
                }
                Ok(Verdict::Foreign(reason)) => Settle::Dead(format!("not an event of the ledger: {reason}")),
                Err(_) => Settle::Retry(STOPPING_RETRY),
            }
        }
    }
}

impl Recorder {
    /// Records until `stop`.
    ///
    /// # Errors
    /// When the stream ends before what was recorded: it went backwards.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut queued = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                taken = self.queue.recv_many(&mut queued, MAX_IN_FLIGHT), if queued.is_empty() => if taken == 0 {
                    return Ok(());
                },
                () = std::future::ready(()), if !queued.is_empty() => {}
                () = tokio::time::sleep(LOOK_EVERY), if queued.is_empty() => {
                    tokio::select! {
                        () = stop.cancelled() => return Ok(()),
                        () = self.look_for_loss() => {}
                    }
                    continue;
                }
            }
            let newest = queued.iter().rev().find_map(|queued| queued.pin.clone());
            if newest != self.pin {
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    is_known = self.gather(&mut queued) => if !is_known {
                        queued.clear();
                        continue;
                    },
                }
                self.pin = newest;
            }
            queued.sort_by_key(|queued| queued.arrival.sequence);
            let rest = queued.split_off(queued.len().min(MAX_BATCH));
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = self.record(std::mem::replace(&mut queued, rest)) => {}
            }
        }
    }

    /// Waits until everything that is delivered and not settled is in hand. False when the consumer had to be made anew,
    /// because what it once delivered is not recorded any more.
    async fn gather(&mut self, queued: &mut Vec<Queued>) -> bool {
        let deadline = Instant::now() + GATHER_PATIENCE;
        loop {
            let pause = tokio::time::sleep(GATHER_PAUSE);
            match self.outstanding().await {
                Ok(info) => {
                    if self.has_lost_everything(&info).await {
                        self.forget_consumer().await;
                        return false;
                    }
                    let held: HashSet<u64> = queued.iter().map(|queued| queued.arrival.sequence).collect();
                    if held.len() >= info.num_ack_pending {
                        return true;
                    }
                    if Instant::now() >= deadline {
                        warn!(
                            held = held.len(),
                            outstanding = info.num_ack_pending,
                            "going on without what did not come back"
                        );
                        return true;
                    }
                }
                Err(problem) => warn!(problem, "what is outstanding is not known yet"),
            }
            tokio::pin!(pause);
            loop {
                let room = MAX_IN_FLIGHT.saturating_sub(queued.len()).max(1);
                tokio::select! {
                    () = &mut pause => break,
                    taken = self.queue.recv_many(queued, room) => if taken == 0 {
                        return true;
                    },
                }
            }
        }
    }

    async fn outstanding(&self) -> Result<consumer::Info, String> {
        let found = self.context.get_consumer_from_stream(streams::NOTIFICATION, streams::INVENTORY).await;
        let consumer: PullConsumer = found.map_err(|problem| problem.to_string())?;
        Ok(consumer.cached_info().clone())
    }

    /// While nothing comes in: a schema that was dropped is noticed by nobody else.
    async fn look_for_loss(&self) {
        if let Ok(info) = self.outstanding().await
            && self.has_lost_everything(&info).await
        {
            self.forget_consumer().await;
        }
    }

    /// Whether the schema was dropped: messages were acknowledged, which are recorded before, and none is recorded.
    async fn has_lost_everything(&self, info: &consumer::Info) -> bool {
        if info.ack_floor.consumer_sequence == 0 {
            return false;
        }
        let mut pause = FIRST_PAUSE;
        loop {
            match self.alerts.checkpoint().await {
                Ok(checkpoint) => return checkpoint == 0,
                Err(problem) => {
                    warn!(%problem, "trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
        }
    }

    /// Everything is delivered once more. The consumer is set back and not deleted: in production the service may not make it
    /// again.
    async fn forget_consumer(&self) {
        warn!("the schema is new and the consumer is not: reading the ledger again from its beginning");
        let set_back = async {
            let stream =
                self.context.get_stream_no_info(streams::INVENTORY).await.map_err(|problem| problem.to_string())?;
            stream.reset_consumer(streams::NOTIFICATION, Some(1)).await.map_err(|problem| problem.to_string())
        };
        if let Err(problem) = set_back.await {
            warn!(
                problem,
                "the consumer `notification` could not be set back; delete it and make it again: `nats consumer rm INVENTORY \
                 notification`, `lomash streams apply`"
            );
        }
    }

    /// Records a batch, however long Postgres is away.
    async fn record(&mut self, batch: Vec<Queued>) {
        let arrivals: Vec<Arrival> = batch.iter().map(|queued| queued.arrival.clone()).collect();
        let mut pause = FIRST_PAUSE;
        let verdicts = loop {
            match self.alerts.record(&arrivals, self.rules).await {
                Ok(verdicts) => break verdicts,
                Err(problem) => {
                    warn!(%problem, messages = arrivals.len(), "trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
        };
        if pause > FIRST_PAUSE {
            info!("recording again");
        }
        for (queued, verdict) in batch.into_iter().zip(verdicts) {
            // Nobody waits for it any more when the service stops.
            let _ = queued.answer.send(verdict);
        }
    }
}
