//! The ledger's events as rows of `sql/analytics/`: received by the consumer `analytics`, applied in batches.
//!
//! The checkpoint decides what is applied, and nothing else. A transaction locks it first, takes only the events that
//! follow it without a gap, and moves it with their rows. So an event that comes again, by a redelivery, a restart, another
//! replica or a consumer that was made anew, changes nothing. Two replicas may apply at once: one waits for the other's
//! lock and then finds its events known.
//!
//! Deliveries say that something is there. A handler puts its message into one queue and waits; the applier takes what has
//! queued up, applies it in one transaction, and answers all of them after the commit. What is missing between the
//! checkpoint and the first delivery (a dead replica holds it, or the rows went back) is not waited for: it is read from the
//! stream, which has it. Its own delivery, when it comes, is known.
//!
//! A transaction may end after any event, unlike the inventory projection's (`docs/adr/0018`).

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use deadpool_postgres::{Client, Pool};
use futures::StreamExt;
use lomash_ledger::receive::{Delivery, Receive, Settle};
use lomash_ledger::{Ledger, ReadError, StoredMessage, crash_point, streams};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, ANALYTICS};
use lomash_platform::projected::Projected;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, debug, error, info, warn};

use crate::stock_metrics::{Folded, Parsed, StockMetrics};
use crate::{observed, rows};

/// Events that one transaction applies at most.
pub const BATCH_EVENTS: usize = 4_000;

/// Events that wait at most: the next transaction's beside those of the one that is under way.
pub const MAX_EVENTS_IN_FLIGHT: usize = 2 * BATCH_EVENTS;

/// Bytes of them.
pub const MAX_BYTES_IN_FLIGHT: usize = 64 << 20;

/// Bytes of payload after which a transaction of what is read from the stream is cut.
const BATCH_BYTES: usize = 16 << 20;

/// How often the server is told that an event waits, while Postgres is down: a third of the consumer's `ack_wait`.
const IN_PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// Pause before an event comes back that this process could not apply, for it is stopping.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// Deliveries after which an event whose handling panics is given up.
const MAX_PANICS: u64 = 3;

/// Pauses between tries after Postgres or the stream failed: from the first to the last, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How often an idle applier looks whether the checkpoint is where it was, and whether the stream has more.
pub const IDLE_CHECK: Duration = Duration::from_secs(2);

/// Longest that one statement may take; a slow database must not hold the checkpoint's lock for ever.
const STATEMENT_TIMEOUT_MS: u32 = 30_000;

/// Longest that the service may do nothing within a transaction: one that is frozen must not hold the checkpoint's lock.
const IDLE_TIMEOUT_MS: u32 = 10_000;

/// What the analytics service receives events by.
#[must_use]
pub const fn receive() -> Receive {
    Receive {
        stream: streams::INVENTORY,
        consumer: streams::ANALYTICS,
        group: Some(streams::ANALYTICS_GROUP),
        max_in_flight: MAX_EVENTS_IN_FLIGHT,
        max_in_flight_bytes: MAX_BYTES_IN_FLIGHT,
        max_panics: MAX_PANICS,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

/// Why applying stopped.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Postgres cannot be reached or refused.
    #[error("Postgres: {0}")]
    Postgres(String),
    /// The rows are not those of a fold.
    #[error("{0}; `lomash rebuild analytics` makes the rows anew")]
    Damaged(String),
}

impl From<tokio_postgres::Error> for ProjectionError {
    fn from(error: tokio_postgres::Error) -> Self {
        let detail = error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string);
        Self::Postgres(detail)
    }
}

/// An event that waits to be applied, and who waits for that.
struct Waiting {
    message: StoredMessage,
    applied: oneshot::Sender<()>,
}

/// Where handlers put their events.
#[derive(Clone)]
pub struct Queue(mpsc::Sender<Waiting>);

/// Where the applier takes them from.
pub struct Queued(mpsc::Receiver<Waiting>);

/// The queue between the receive loop and the applier. It holds all that the loop has in flight.
#[must_use]
pub fn queue() -> (Queue, Queued) {
    let (sender, receiver) = mpsc::channel(MAX_EVENTS_IN_FLIGHT);
    (Queue(sender), Queued(receiver))
}

impl Queue {
    /// Has an event applied. What is done before the first `await` happens in the order of the stream.
    pub fn handle(&self, delivery: Delivery) -> impl Future<Output = Settle> + Send + use<> {
        let (applied, is_applied) = oneshot::channel();
        let queued = self.0.try_send(Waiting { message: delivery.into_stored(), applied });
        async move {
            // The applier lets go of what it has when it ends; then the process does, too.
            if queued.is_err() || is_applied.await.is_err() {
                return Settle::Retry(RETRY_PAUSE);
            }
            crash_point!("analytics-before-ack");
            Settle::Done
        }
    }
}

/// Applies until `stop`; only a stream that went backwards or has a gap ends it otherwise.
///
/// # Errors
/// What trying again cannot mend, with what to do.
pub async fn run<L: Ledger>(
    ledger: L,
    pool: Pool,
    url: Secret,
    projected: Projected,
    Queued(queue): Queued,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut applier = Applier { ledger, pool, url, projected, queue, waiting: BTreeMap::new(), pause: FIRST_PAUSE };
    while !stop.is_cancelled() {
        let outcome = tokio::select! {
            () = stop.cancelled() => break,
            outcome = applier.apply_all() => outcome,
        };
        match outcome {
            Ok(never) => match never {},
            Err(ProjectionError::Read(problem @ (ReadError::WentBackwards { .. } | ReadError::Replaced { .. }))) => {
                return Err(problem.with_remedy(ANALYTICS.live).context(format!(
                    "the stock metrics cannot go on; after that `{}` makes them anew",
                    ANALYTICS.rebuild_command
                )));
            }
            Err(ProjectionError::Read(problem)) if !problem.is_transient() => {
                error!(%problem, "the stock metrics cannot go on");
                return Err(problem.into());
            }
            Err(problem) => {
                observed::failed();
                warn!(
                    %problem,
                    waiting = applier.waiting.len(),
                    pause_ms = applier.pause.as_millis(),
                    "no metrics just now, the events wait; trying again"
                );
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(applier.pause) => {}
        }
        applier.pause = (applier.pause * 2).min(LAST_PAUSE);
    }
    Ok(())
}

/// The one task that writes rows.
struct Applier<L> {
    ledger: L,
    pool: Pool,
    url: Secret,
    projected: Projected,
    queue: mpsc::Receiver<Waiting>,
    /// What was taken from the queue and is not applied, by sequence. It survives a failure: nobody delivers it again
    /// while its handler waits. More than one handler may wait for the same event.
    waiting: BTreeMap<u64, (StoredMessage, Vec<oneshot::Sender<()>>)>,
    pause: Duration,
}

impl<L: Ledger> Applier<L> {
    async fn apply_all(&mut self) -> Result<Infallible, ProjectionError> {
        // Every time: a schema that was dropped while we ran is made again and filled from the stream.
        let migrated = postgres::migrate_schema(&self.url, &ANALYTICS, ANALYTICS.live).await;
        migrated.map_err(|error| ProjectionError::Postgres(format!("{error:#}")))?;
        let client = self.pool.get().await.map_err(|error| ProjectionError::Postgres(error.to_string()))?;
        // Taken out of the pool: it has settings of its own.
        let mut client = Client::take(client);
        let settings = format!(
            "SET statement_timeout = {STATEMENT_TIMEOUT_MS}; SET idle_in_transaction_session_timeout = {IDLE_TIMEOUT_MS}"
        );
        client.batch_execute(&settings).await?;
        let mut checkpoint = rows::checkpoint(&client, ANALYTICS.live).await?;
        let last = self.ledger.reaches(checkpoint).await?;
        if checkpoint > 0 {
            self.ledger.remembers(checkpoint, rows::clock(&client, ANALYTICS.live).await?).await?;
        }
        info!(checkpoint, last, "applying");
        // Where the rows were when there was nothing to do.
        let mut stood_at = None;
        loop {
            self.saw(checkpoint);
            if !self.take_queued().await {
                let found = rows::checkpoint(&client, ANALYTICS.live).await?;
                let last = self.ledger.reaches(found).await?;
                // Nobody moved it, and there is more: what was delivered for it is lost or held by a replica that died.
                if found < last && stood_at == Some(found) {
                    checkpoint = self.catch_up(&mut client, found, last).await?;
                } else {
                    checkpoint = found;
                }
                stood_at = Some(checkpoint);
                continue;
            }
            stood_at = None;
            let batch = self.next_batch(checkpoint);
            if batch.is_empty() {
                let first = self.waiting.first_key_value().map_or(0, |(sequence, _)| *sequence);
                if first > checkpoint + 1 {
                    debug!(checkpoint, first, "reading from the stream what was not delivered in between");
                    checkpoint = self.catch_up(&mut client, checkpoint, first - 1).await?;
                }
                continue;
            }
            checkpoint = self.apply(&mut client, &batch).await?;
        }
    }

    /// Takes what has queued up, or waits for it; false when nothing came for [`IDLE_CHECK`] and nothing waits.
    async fn take_queued(&mut self) -> bool {
        if self.waiting.is_empty() {
            match tokio::time::timeout(IDLE_CHECK, self.queue.recv()).await {
                Ok(Some(waiting)) => self.keep(waiting),
                // The receive loop has ended; so will this.
                Ok(None) => return std::future::pending().await,
                Err(_) => return false,
            }
        }
        while let Ok(waiting) = self.queue.try_recv() {
            self.keep(waiting);
        }
        true
    }

    fn keep(&mut self, Waiting { message, applied }: Waiting) {
        self.waiting.entry(message.sequence).or_insert_with(|| (message, Vec::new())).1.push(applied);
    }

    /// Tells everybody who waits for what the rows reflect.
    fn saw(&mut self, checkpoint: u64) {
        observed::saw(checkpoint);
        self.projected.saw(checkpoint);
        self.answer_known(checkpoint);
    }

    fn answer_known(&mut self, checkpoint: u64) {
        let later = self.waiting.split_off(&(checkpoint + 1));
        for (_, (_, waiting)) in std::mem::replace(&mut self.waiting, later) {
            for applied in waiting {
                // A handler that is gone will see its event again.
                let _ = applied.send(());
            }
        }
    }

    /// The events that follow the checkpoint without a gap. They stay waiting until they are applied.
    fn next_batch(&self, checkpoint: u64) -> Vec<StoredMessage> {
        let following = self.waiting.iter().zip(checkpoint + 1..);
        let following = following.take_while(|((sequence, _), expected)| *sequence == expected);
        following.take(BATCH_EVENTS).map(|((_, (message, _)), _)| message.clone()).collect()
    }

    /// Applies what the stream has after `checkpoint` up to `upto`; returns where the rows are then.
    async fn catch_up(
        &mut self,
        client: &mut tokio_postgres::Client,
        checkpoint: u64,
        upto: u64,
    ) -> Result<u64, ProjectionError> {
        observed::catches_up();
        let mut messages = self.ledger.read(checkpoint).await?;
        let (mut reached, mut batch, mut bytes) = (checkpoint, Vec::new(), 0);
        loop {
            let next = match messages.next().await {
                Some(next) => Some(next?),
                None => None,
            };
            let is_end = next.as_ref().is_none_or(|message| message.sequence >= upto);
            if let Some(message) = next.filter(|message| message.sequence <= upto) {
                bytes += message.bytes();
                batch.push(message);
            }
            let is_full = batch.len() >= BATCH_EVENTS || bytes >= BATCH_BYTES;
            if !batch.is_empty() && (is_end || is_full) {
                let (first, last) = (batch[0].sequence, batch[batch.len() - 1].sequence);
                reached = self.apply(client, &batch).await?;
                self.saw(reached);
                // Another replica is further, or the rows went back: begin again from where they are.
                if reached > last || reached < first {
                    return Ok(reached);
                }
                batch.clear();
                bytes = 0;
            }
            if is_end {
                return Ok(reached);
            }
        }
    }

    async fn apply(
        &mut self,
        client: &mut tokio_postgres::Client,
        batch: &[StoredMessage],
    ) -> Result<u64, ProjectionError> {
        let since = Instant::now();
        let span = observed::transaction_span(batch);
        let applied = apply(client, ANALYTICS.live, batch).instrument(span).await?;
        observed::applied(batch, applied, since);
        crash_point!("analytics-after-commit");
        let Applied { reached, events, .. } = applied;
        debug!(reached, events, elapsed_ms = since.elapsed().as_millis(), "applied");
        self.pause = FIRST_PAUSE;
        Ok(reached)
    }
}

/// What a transaction did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Applied {
    /// Where the rows are now.
    pub(crate) reached: u64,
    /// Events of the batch that it applied.
    pub(crate) events: u64,
    /// Of those, messages that were not ours.
    pub(crate) skipped: u64,
}

/// Applies those of a batch that follow the checkpoint of `schema`, and moves it, in one transaction. When the batch begins
/// beyond what follows, or ends before, nothing is applied: the answer says where the rows are.
pub(crate) async fn apply(
    client: &mut tokio_postgres::Client,
    schema: &str,
    batch: &[StoredMessage],
) -> Result<Applied, ProjectionError> {
    // Parsed before anything is locked.
    let parsed: Vec<Parsed> = batch.iter().map(StoredMessage::parse).collect();
    let transaction = client.transaction().await?;
    // First of all, and with a lock on the table too: who swaps schemas waits for this transaction, and this one finds
    // either the tables from before the swap or those from after it, never some of each.
    let position = rows::lock_position(&transaction, schema).await?;
    let (found, skipped_before) = (position.sequence, position.skipped);
    let known = batch.partition_point(|message| message.sequence <= found);
    let follows = batch.get(known).is_some_and(|message| message.sequence == found + 1);
    if !follows {
        return Ok(Applied { reached: found, events: 0, skipped: 0 });
    }
    let fresh = || batch[known..].iter();
    let mut metrics = rows::load(&transaction, schema, position, fresh().zip(&parsed[known..])).await?;
    for (message, parsed) in fresh().zip(parsed.into_iter().skip(known)) {
        if let Folded::Skipped(foreign) = metrics.fold(message.sequence, message.stored_at, parsed) {
            error!(sequence = message.sequence, subject = message.subject, reason = %foreign, "skipped: not ours");
        }
    }
    rows::write(&transaction, schema, found, &metrics).await?;
    crash_point!("analytics-before-commit");
    transaction.commit().await?;
    let StockMetrics { position, .. } = metrics;
    let (events, skipped) = (position.sequence - found, position.skipped - skipped_before);
    Ok(Applied { reached: position.sequence, events, skipped })
}
