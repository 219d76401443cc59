//! The projector: the `INVENTORY` stream as rows in Postgres.
//!
//! Rows and checkpoint move in one transaction, and only from the checkpoint that was read, so a projector that was
//! believed dead cannot write again. It cuts where an atomic batch ends, so readers never see half an order. Nothing on
//! the write path waits for it: with Postgres down, orders are still decided, and it catches up later.
//!
//! Owns the loop; what is read until the next transaction is `gathered`, what a batch changes is `changes`, how that is written
//! `tables`.

pub(crate) mod changes;
mod gathered;
pub(crate) mod tables;

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::Pool;
use lomash_contract::ProductId;
use lomash_ledger::{LAST_SEQUENCE_TIMEOUT, Ledger, ReadError, StoredMessage, crash_point};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, Schema};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, warn};

use self::changes::{Changes, Parsed, Products};
pub use self::gathered::{BATCH_BYTES, BATCH_MESSAGES};
use self::gathered::{Gathered, REST_TIMEOUT};
pub(crate) use self::tables::unfolded_words;
use self::tables::{load_stock, move_checkpoint, write_counts, write_decisions, write_movements, write_products};
use crate::observed::{self, Projecting};
use crate::projected::Projected;

/// Pauses between tries after Postgres or the stream failed: from the first to the last, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How often an idle projector looks whether its checkpoint is still there.
pub const IDLE_CHECK: Duration = Duration::from_secs(2);

/// How often a standby asks whether the place of the active projector is free.
const STANDBY_PAUSE: Duration = Duration::from_secs(1);

/// Longest that one transaction may take; a slow database must not hold the checkpoint's lock for ever.
const STATEMENT_TIMEOUT_MS: u32 = 30_000;

/// The projector touches rows by their keys, some thousands at once. For so many the planner may prefer to go through a whole
/// table, with helpers that are processes to be started, or to compile the statement; each is dearer than what it saves.
const BY_KEYS_ONLY: &str = "SET enable_seqscan = off; SET max_parallel_workers_per_gather = 0; SET jit = off";

/// A commit does not wait until it is on disk: what a crash of Postgres takes with it, rows and checkpoint together, is read
/// from the stream again.
const NOT_WAITING_FOR_THE_DISK: &str = "SET synchronous_commit = off";

/// How long the active projector may leave Postgres alone, also within a transaction or a `COPY`, before its place goes to
/// another: one that was frozen holds its connection, and with it the place and its locks.
const PLACE_TIMEOUT: Duration = Duration::from_secs(15);

// Between two statements: the rest of a batch, both calls of who hears, and a look at the ledger that the leader does not answer.
const _: () = assert!(
    REST_TIMEOUT.as_secs()
        + 2 * AFTER_COMMIT_TIMEOUT.as_secs()
        + LAST_SEQUENCE_TIMEOUT.as_secs()
        + IDLE_CHECK.as_secs()
        < PLACE_TIMEOUT.as_secs(),
    "a healthy projector must keep its place"
);

/// Longest that [`AfterCommit`] may hold up the projection, each time.
pub const AFTER_COMMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Key of the advisory lock that the active projector holds; the checkpoint protects the rows even without it.
const PROJECTOR_LOCK: i64 = 0x6c6f_6d61_7368_0002;

/// Name of this projection in the table `checkpoint`.
pub const PROJECTION: &str = "inventory";

/// Why projecting stopped.
#[derive(Debug, thiserror::Error)]
pub enum ProjectionError {
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Postgres cannot be reached or refused.
    #[error("Postgres: {0}")]
    Postgres(String),
    /// Another projector moved the checkpoint.
    #[error("another projector moved the checkpoint from {expected}")]
    Fenced {
        /// The checkpoint that this projector was at.
        expected: u64,
    },
    /// The rest of a batch did not come.
    #[error("the stream stands still within a batch after sequence {0}")]
    Stalled(u64),
}

impl ProjectionError {
    /// The same with what to run, where trying again cannot mend it.
    #[must_use]
    pub fn with_remedy(self) -> anyhow::Error {
        match self {
            Self::Read(problem) => problem.with_remedy(Schema::Live.name()),
            other => other.into(),
        }
    }
}

impl From<tokio_postgres::Error> for ProjectionError {
    fn from(error: tokio_postgres::Error) -> Self {
        let detail = error.as_db_error().map_or_else(|| error.to_string(), ToString::to_string);
        Self::Postgres(detail)
    }
}

/// What wants to hear of the active projector's progress, for instance a cache of its rows.
///
/// Each call is awaited before the projection goes on, but for [`AFTER_COMMIT_TIMEOUT`] at most: then its future is
/// dropped, and it must know by itself that it did not finish. A failure is its own affair; the rows are committed.
pub trait AfterCommit: Send + Sync + 'static {
    /// The projector of this process is the active one now and its rows are those at `checkpoint`. Said again when another
    /// schema took the place of the live one (`lomash rebuild`), so anything may have changed.
    fn became_active(&self, checkpoint: u64) -> impl Future<Output = ()> + Send;

    /// The rows are at `reached` now; of the products, these changed.
    fn committed(&self, reached: u64, changed: &[ProductId]) -> impl Future<Output = ()> + Send;

    /// Nothing happened for [`IDLE_CHECK`]; the rows are still those at `checkpoint`.
    fn idle(&self, checkpoint: u64) -> impl Future<Output = ()> + Send;
}

/// Nobody wants to hear.
impl AfterCommit for () {
    async fn became_active(&self, _: u64) {}

    async fn committed(&self, _: u64, _: &[ProductId]) {}

    async fn idle(&self, _: u64) {}
}

/// Projects until `stop`; only a stream that went backwards or has a gap ends it otherwise.
///
/// # Errors
/// [`ProjectionError::Read`] for what trying again cannot mend.
pub async fn run<L: Ledger, A: AfterCommit>(
    ledger: L,
    url: Secret,
    projected: Projected,
    after_commit: A,
    stop: CancellationToken,
) -> Result<(), ProjectionError> {
    let mut pause = FIRST_PAUSE;
    let hears = Hears { projected, after_commit };
    while !stop.is_cancelled() {
        let outcome = tokio::select! {
            () = stop.cancelled() => break,
            outcome = project(&ledger, &url, &hears, &mut pause) => outcome,
        };
        match outcome {
            Ok(never) => match never {},
            Err(ProjectionError::Read(problem)) if !problem.is_transient() => {
                error!(%problem, "the projection cannot go on");
                return Err(problem.into());
            }
            Err(problem) => {
                observed::projection_failed();
                warn!(%problem, pause_ms = pause.as_millis(), "no projection just now, orders are decided meanwhile; trying again")
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
    Ok(())
}

/// Who hears of progress.
struct Hears<A> {
    projected: Projected,
    after_commit: A,
}

/// Waits for what hears of progress, but not for long.
async fn told(what: &str, hearing: impl Future<Output = ()>) {
    if tokio::time::timeout(AFTER_COMMIT_TIMEOUT, hearing).await.is_err() {
        warn!(bound_ms = AFTER_COMMIT_TIMEOUT.as_millis(), "the projection goes on without waiting for {what}");
    }
}

/// Ends the session of the active projector when it has left a statement without its rows for [`PLACE_TIMEOUT`]; whether it had.
///
/// Postgres does so by itself between statements. Within a `COPY` it does not: there it is neither idle, nor does it look at
/// `statement_timeout` before the next row comes.
async fn end_silent_copy(client: &tokio_postgres::Client) -> Result<bool, ProjectionError> {
    let end = "SELECT pg_terminate_backend(pid)
               FROM pg_stat_activity JOIN pg_locks USING (pid)
               WHERE locktype = 'advisory' AND granted AND objsubid = 1
                 AND (classid::bigint << 32 | objid::bigint) = $1 AND datname = current_database()
                 AND state = 'active' AND wait_event = 'ClientRead'
                 AND query_start < clock_timestamp() - $2 * interval '1 ms'";
    let ended = client.query(end, &[&PROJECTOR_LOCK, &(PLACE_TIMEOUT.as_millis() as f64)]).await?;
    Ok(!ended.is_empty())
}

/// Becomes the active projector and projects until something fails.
async fn project<L: Ledger, A: AfterCommit>(
    ledger: &L,
    url: &Secret,
    Hears { projected, after_commit }: &Hears<A>,
    pause: &mut Duration,
) -> Result<std::convert::Infallible, ProjectionError> {
    // Every time: a schema that was dropped while we ran is made again and filled from the stream.
    let unreachable = |error: anyhow::Error| ProjectionError::Postgres(format!("{error:#}"));
    postgres::migrate(url).await.map_err(unreachable)?;
    // Outside any pool: the lock lives and dies with this connection, and what serves it is served where this runs.
    let mut client = postgres::connect(url).await.map_err(unreachable)?;
    let idle_ms = PLACE_TIMEOUT.as_millis();
    client
        .batch_execute(&format!(
            "SET statement_timeout = {STATEMENT_TIMEOUT_MS}; SET idle_session_timeout = {idle_ms}; SET idle_in_transaction_session_timeout = {idle_ms}; {BY_KEYS_ONLY}; {NOT_WAITING_FOR_THE_DISK}"
        ))
        .await?;
    // Whoever cannot see the ledger must not take the place of one that can.
    ledger.last_sequence().await?;
    let lock = "SELECT pg_try_advisory_lock($1)";
    while !client.query_one(lock, &[&PROJECTOR_LOCK]).await?.get::<_, bool>(0) {
        if end_silent_copy(&client).await? {
            warn!("the active projector stopped in the middle of a COPY; its session is ended");
        }
        tokio::time::sleep(STANDBY_PAUSE).await;
    }
    let Checkpoint { sequence: mut checkpoint, mut table } = read_checkpoint(&client, Schema::Live).await?;
    let last = ledger.reaches(checkpoint).await?;
    if let Some((sequence, stored_at)) = newest_movement(&client).await? {
        ledger.remembers(sequence, stored_at).await?;
    }
    info!(checkpoint, last, "projecting");
    let announcer = projected.announce(checkpoint);
    told("what begins with it", after_commit.became_active(checkpoint)).await;
    let mut gathered = Gathered::of(ledger.follow(checkpoint).await?);
    let mut products = Products::default();
    loop {
        let batch = gathered.batch().await?;
        let Some(reached) = batch.last().map(|message| message.sequence) else {
            // An idle projector would not notice that its rows are gone or that it was replaced.
            let found = read_checkpoint(&client, Schema::Live).await?;
            if found.sequence != checkpoint {
                return Err(ProjectionError::Fenced { expected: checkpoint });
            }
            if std::mem::replace(&mut table, found.table) != found.table {
                told("what begins with another schema", after_commit.became_active(checkpoint)).await;
            }
            told("what is renewed while it is idle", after_commit.idle(checkpoint)).await;
            // Silence is all that one hears who is cut off, and another may not be.
            ledger.last_sequence().await?;
            continue;
        };
        let mut observed = Projecting::begin(&batch);
        let applying = apply(&mut client, Schema::Live, &mut products, &batch, checkpoint, reached);
        let applying = applying.instrument(observed.transaction_span());
        let applied = gathered.meanwhile(applying).await;
        let applied = applied.inspect_err(|problem| observed.failed(problem))?;
        observed.committed(&applied.occurred);
        crash_point!("project-after-commit");
        debug!(from = checkpoint + 1, to = reached, "projected");
        checkpoint = reached;
        *pause = FIRST_PAUSE;
        announcer.reached(checkpoint);
        if std::mem::replace(&mut table, applied.table) != applied.table {
            told("what begins with another schema", after_commit.became_active(checkpoint)).await;
        }
        let following = told("what follows a commit", after_commit.committed(checkpoint, &applied.changed));
        following.instrument(observed.span()).await;
    }
}

/// Where the rows of a schema stand.
struct Checkpoint {
    sequence: u64,
    /// The identity of its table: another one when `lomash rebuild` put another schema in its place.
    table: u32,
}

impl Checkpoint {
    fn of(row: &tokio_postgres::Row) -> Self {
        Self { sequence: row.get::<_, i64>(0).unsigned_abs(), table: row.get(1) }
    }
}

/// Where the live rows stand.
///
/// # Errors
/// When Postgres cannot be asked.
pub async fn look(pool: &Pool) -> Result<u64, ProjectionError> {
    let client = pool.get().await.map_err(|error| ProjectionError::Postgres(error.to_string()))?;
    Ok(read_checkpoint(&client, Schema::Live).await?.sequence)
}

async fn read_checkpoint(client: &tokio_postgres::Client, schema: Schema) -> Result<Checkpoint, ProjectionError> {
    let query = format!("SELECT sequence, tableoid FROM {schema}.checkpoint WHERE projection = $1");
    Ok(Checkpoint::of(&client.query_one(&query, &[&PROJECTION]).await?))
}

/// The last change of stock that the live rows hold, and when the server stored it.
async fn newest_movement(client: &tokio_postgres::Client) -> Result<Option<(u64, OffsetDateTime)>, ProjectionError> {
    let schema = Schema::Live;
    let query = format!("SELECT sequence, stored_at FROM {schema}.movements ORDER BY sequence DESC LIMIT 1");
    let row = client.query_opt(&query, &[]).await?;
    Ok(row.map(|row| (row.get::<_, i64>(0).unsigned_abs(), row.get(1))))
}

/// What applying a batch did.
struct Applied {
    /// The products whose rows changed.
    changed: Vec<ProductId>,
    /// When the stock changed that it holds.
    occurred: Vec<OffsetDateTime>,
    /// See [`Checkpoint::table`].
    table: u32,
}

/// Applies a batch and moves the checkpoint from `expected` to `reached`, in one transaction. `products` is what is remembered
/// of the tables, and is nothing when that fails.
async fn apply(
    client: &mut tokio_postgres::Client,
    schema: Schema,
    products: &mut Products,
    batch: &[StoredMessage],
    expected: u64,
    reached: u64,
) -> Result<Applied, ProjectionError> {
    let parsed: Vec<Parsed> = batch.iter().map(StoredMessage::parse).collect();
    let mut transaction = client.transaction().await?;
    // First of all, and with a lock on the table too: who swaps schemas waits for this transaction, and this one finds
    // either the tables from before the swap or those from after it, never some of each.
    let lock = format!("SELECT sequence, tableoid FROM {schema}.checkpoint WHERE projection = $1 FOR UPDATE");
    let found = Checkpoint::of(&transaction.query_one(&lock, &[&PROJECTION]).await?);
    if found.sequence != expected {
        return Err(ProjectionError::Fenced { expected });
    }
    let mut known = std::mem::take(products).of_table(found.table);
    let unknown = known.unknown(&parsed);
    known.learn(load_stock(&transaction, schema, &unknown).await?);
    let mut changes = Changes::over(known);
    for (message, parsed) in batch.iter().zip(parsed) {
        changes.fold(message, parsed);
    }
    write_products(&transaction, schema, &changes.products).await?;
    write_movements(&transaction, schema, &changes.movements).await?;
    write_counts(&transaction, schema, &changes.counts).await?;
    write_decisions(&mut transaction, schema, &changes.decisions).await?;
    move_checkpoint(&transaction, schema, expected, reached, changes.skipped).await?;
    transaction.commit().await?;
    let changed = changes.products.stock.keys().copied().collect();
    let occurred = changes.movements.iter().map(|movement| movement.occurred_at).collect();
    *products = changes.products;
    products.written();
    products.bound();
    Ok(Applied { changed, occurred, table: found.table })
}
