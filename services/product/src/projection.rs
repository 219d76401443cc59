//! The projector: the `INVENTORY` stream as rows in Postgres.
//!
//! Rows and checkpoint move in one transaction, and only from the checkpoint that was read, so a projector that was
//! believed dead cannot write again. It cuts where an atomic batch ends, so readers never see half an order. Nothing on
//! the write path waits for it: with Postgres down, orders are still decided, and it catches up later.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use deadpool_postgres::{Client, Pool};
use futures::{FutureExt, StreamExt};
use hashbrown::HashMap;
use lomash_contract::{
    CountedBy, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, OrderId, ProductDetails,
    ProductId, ProductRegistered, ProductRevised, UpdatedBy, chains,
};
use lomash_ledger::{LAST_SEQUENCE_TIMEOUT, Ledger, Messages, ReadError, StoredMessage, crash_point};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, Schema};
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::Transaction;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::types::{Json, Type};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, error, info, warn};
use uuid::Uuid;

use crate::observed::{self, Projecting};
use crate::projected::Projected;

/// Messages after which a transaction is cut at the next end of a batch.
pub const BATCH_MESSAGES: usize = 2_000;

/// How long the rest of a batch whose beginning was read may take to arrive.
const REST_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between tries after Postgres or the stream failed: from the first to the last, doubling.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// How often an idle projector looks whether its checkpoint is still there.
pub const IDLE_CHECK: Duration = Duration::from_secs(2);

/// How often a standby asks whether the place of the active projector is free.
const STANDBY_PAUSE: Duration = Duration::from_secs(1);

/// Longest that one transaction may take; a slow database must not hold the checkpoint's lock for ever.
const STATEMENT_TIMEOUT_MS: u32 = 30_000;

/// How long the active projector may leave Postgres alone, also within a transaction, before Postgres gives its place to
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

/// Products that one statement writes.
const PRODUCTS_A_STATEMENT: usize = 10_000;

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
    pool: Pool,
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
            outcome = project(&ledger, &pool, &url, &hears, &mut pause) => outcome,
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

/// Becomes the active projector and projects until something fails.
async fn project<L: Ledger, A: AfterCommit>(
    ledger: &L,
    pool: &Pool,
    url: &Secret,
    Hears { projected, after_commit }: &Hears<A>,
    pause: &mut Duration,
) -> Result<std::convert::Infallible, ProjectionError> {
    // Every time: a schema that was dropped while we ran is made again and filled from the stream.
    postgres::migrate(url).await.map_err(|error| ProjectionError::Postgres(format!("{error:#}")))?;
    let client = pool.get().await.map_err(|error| ProjectionError::Postgres(error.to_string()))?;
    // Taken out of the pool: the lock lives and dies with this connection.
    let mut client = Client::take(client);
    let idle_ms = PLACE_TIMEOUT.as_millis();
    client
        .batch_execute(&format!(
            "SET statement_timeout = {STATEMENT_TIMEOUT_MS}; SET idle_session_timeout = {idle_ms}; SET idle_in_transaction_session_timeout = {idle_ms}"
        ))
        .await?;
    // Whoever cannot see the ledger must not take the place of one that can.
    ledger.last_sequence().await?;
    let lock = "SELECT pg_try_advisory_lock($1)";
    while !client.query_one(lock, &[&PROJECTOR_LOCK]).await?.get::<_, bool>(0) {
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
    let mut messages = ledger.follow(checkpoint).await?;
    loop {
        let batch = next_batch(&mut messages, checkpoint).await?;
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
        let applying = apply(&mut client, Schema::Live, &batch, checkpoint, reached);
        let applied =
            applying.instrument(observed.transaction_span()).await.inspect_err(|problem| observed.failed(problem))?;
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

/// The messages that are there, up to where an atomic batch ends; none when none came for [`IDLE_CHECK`].
async fn next_batch(messages: &mut Messages, after: u64) -> Result<Vec<StoredMessage>, ProjectionError> {
    let mut batch: Vec<StoredMessage> = Vec::new();
    loop {
        let whole = batch.last().is_some_and(StoredMessage::ends_batch);
        if whole && batch.len() >= BATCH_MESSAGES {
            return Ok(batch);
        }
        let next = if batch.is_empty() {
            match tokio::time::timeout(IDLE_CHECK, messages.next()).await {
                Ok(next) => next,
                Err(_) => return Ok(batch),
            }
        } else if whole {
            match messages.next().now_or_never() {
                Some(next) => next,
                None => return Ok(batch),
            }
        } else {
            let seen = batch.last().map_or(after, |message| message.sequence);
            let rest = tokio::time::timeout(REST_TIMEOUT, messages.next()).await;
            rest.map_err(|_| ProjectionError::Stalled(seen))?
        };
        match next {
            Some(Ok(message)) => batch.push(message),
            Some(Err(problem)) => return Err(problem.into()),
            None => return Err(ReadError::Unavailable("the stream's reader ended".to_owned()).into()),
        }
    }
}

/// A product's row while a batch is folded over it.
pub(crate) struct ProductRow {
    details: ProductDetails,
    quantity: u32,
    sequence: u64,
    registered_sequence: u64,
    registered_at: OffsetDateTime,
    updated_at: OffsetDateTime,
    /// Whether the tables do not have it so yet.
    pub(crate) changed: bool,
    /// Whether that is so of its details, too. They change rarely, and their indexes are dear.
    pub(crate) details_changed: bool,
}

/// One change of stock, and with which message it came.
pub(crate) struct Movement<'m> {
    message: &'m StoredMessage,
    event_id: Uuid,
    occurred_at: OffsetDateTime,
    updated: InventoryUpdated,
}

/// A count, and with which message it came.
pub(crate) struct Count<'m> {
    message: &'m StoredMessage,
    event_id: Uuid,
    counted: InventoryCounted,
}

pub(crate) enum OrderDecision {
    Allocated,
    Refused(InventoryUpdateFailed),
}

/// The decisions of a batch by the sequence of the order's first event.
pub(crate) type Decisions = BTreeMap<u64, (OrderId, OffsetDateTime, OrderDecision)>;

/// What a batch of messages changes: the pure part of projecting, the same for the projector and for a rebuild.
#[derive(Default)]
pub(crate) struct Changes<'m> {
    pub(crate) products: HashMap<ProductId, ProductRow>,
    pub(crate) movements: Vec<Movement<'m>>,
    pub(crate) counts: Vec<Count<'m>>,
    pub(crate) decisions: Decisions,
    decided: HashMap<OrderId, u64>,
    pub(crate) skipped: u64,
}

impl<'m> Changes<'m> {
    /// Nothing yet, over these products as they are.
    pub(crate) fn over(products: HashMap<ProductId, ProductRow>) -> Self {
        Self { products, ..Self::default() }
    }

    /// Takes one message in, or skips it by the rule that every reader applies.
    pub(crate) fn fold(&mut self, message: &'m StoredMessage, parsed: Parsed) {
        let admitted = parsed.and_then(|envelope| {
            let stock = self.products.get(&ProductId(envelope.payload.key())).map(|row| row.quantity);
            chains(&envelope.payload, stock).map(|()| envelope)
        });
        let envelope = match admitted {
            Ok(envelope) => envelope,
            Err(foreign) => {
                error!(sequence = message.sequence, subject = message.subject, reason = %foreign, "skipped: not ours");
                self.skipped += 1;
                return;
            }
        };
        let (sequence, stored_at) = (message.sequence, message.stored_at);
        match envelope.payload {
            LedgerEvent::ProductRegistered(ProductRegistered(details)) => {
                let row = ProductRow {
                    quantity: 0,
                    sequence,
                    registered_sequence: sequence,
                    registered_at: stored_at,
                    updated_at: stored_at,
                    changed: true,
                    details_changed: true,
                    details,
                };
                self.products.insert(row.details.product_id, row);
            }
            LedgerEvent::ProductRevised(ProductRevised(details)) => {
                if let Some(row) = self.touch(details.product_id, message) {
                    row.details = details;
                    row.details_changed = true;
                }
            }
            LedgerEvent::InventoryUpdated(updated) => {
                if let Some(row) = self.touch(updated.product_id, message) {
                    row.quantity = updated.new_quantity;
                }
                if let Some(order_id) = updated.order_id {
                    self.decide(order_id, message, OrderDecision::Allocated);
                }
                let (event_id, occurred_at) = (envelope.event_id.0, envelope.timestamp.get());
                self.movements.push(Movement { message, event_id, occurred_at, updated });
            }
            LedgerEvent::InventoryUpdateFailed(failed) => {
                self.decide(failed.order_id, message, OrderDecision::Refused(failed));
            }
            LedgerEvent::InventoryCounted(counted) => {
                self.counts.push(Count { message, event_id: envelope.event_id.0, counted });
            }
            LedgerEvent::ProductUpdated(_) => {}
        }
    }

    fn touch(&mut self, product_id: ProductId, message: &StoredMessage) -> Option<&mut ProductRow> {
        let row = self.products.get_mut(&product_id)?;
        row.sequence = message.sequence;
        row.updated_at = message.stored_at;
        row.changed = true;
        Some(row)
    }

    /// The first event of an order is its decision; the others are its further lines.
    fn decide(&mut self, order_id: OrderId, message: &StoredMessage, decision: OrderDecision) {
        let first = *self.decided.entry(order_id).or_insert(message.sequence);
        if first == message.sequence {
            self.decisions.insert(first, (order_id, message.stored_at, decision));
        }
    }
}

/// A message by the stateless half of the rule that every reader applies.
pub(crate) type Parsed = Result<lomash_contract::Envelope<LedgerEvent>, lomash_contract::Foreign>;

/// What applying a batch did.
struct Applied {
    /// The products whose rows changed.
    changed: Vec<ProductId>,
    /// When the stock changed that it holds.
    occurred: Vec<OffsetDateTime>,
    /// See [`Checkpoint::table`].
    table: u32,
}

/// Applies a batch and moves the checkpoint from `expected` to `reached`, in one transaction.
async fn apply(
    client: &mut tokio_postgres::Client,
    schema: Schema,
    batch: &[StoredMessage],
    expected: u64,
    reached: u64,
) -> Result<Applied, ProjectionError> {
    let parsed: Vec<Parsed> = batch.iter().map(StoredMessage::parse).collect();
    let transaction = client.transaction().await?;
    // First of all, and with a lock on the table too: who swaps schemas waits for this transaction, and this one finds
    // either the tables from before the swap or those from after it, never some of each.
    let lock = format!("SELECT sequence, tableoid FROM {schema}.checkpoint WHERE projection = $1 FOR UPDATE");
    let found = Checkpoint::of(&transaction.query_one(&lock, &[&PROJECTION]).await?);
    if found.sequence != expected {
        return Err(ProjectionError::Fenced { expected });
    }
    let keys: Vec<Uuid> = parsed.iter().flatten().map(|envelope| envelope.payload.key()).collect();
    let mut changes = Changes::over(load_products(&transaction, schema, &keys).await?);
    for (message, parsed) in batch.iter().zip(parsed) {
        changes.fold(message, parsed);
    }
    write_products(&transaction, schema, changes.products.values()).await?;
    write_movements(&transaction, schema, &changes.movements).await?;
    write_counts(&transaction, schema, &changes.counts).await?;
    write_decisions(&transaction, schema, &changes.decisions).await?;
    move_checkpoint(&transaction, schema, expected, reached, changes.skipped).await?;
    transaction.commit().await?;
    let changed = changes.products.values().filter(|row| row.changed).map(|row| row.details.product_id).collect();
    let occurred = changes.movements.iter().map(|movement| movement.occurred_at).collect();
    Ok(Applied { changed, occurred, table: found.table })
}

/// Moves the checkpoint from `expected` to `reached`; `skipped` more messages were not ours.
pub(crate) async fn move_checkpoint(
    transaction: &Transaction<'_>,
    schema: Schema,
    expected: u64,
    reached: u64,
    skipped: u64,
) -> Result<(), ProjectionError> {
    let update = format!(
        "UPDATE {schema}.checkpoint SET sequence = $1, skipped = skipped + $2, updated_at = now()
         WHERE projection = $3 AND sequence = $4"
    );
    let moved =
        transaction.execute(&update, &[&bigint(reached), &bigint(skipped), &PROJECTION, &bigint(expected)]).await?;
    if moved == 1 { Ok(()) } else { Err(ProjectionError::Fenced { expected }) }
}

/// Sequences and counts stay far below 2^63; quantities are checked by the ledger to fit.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn integer(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

async fn load_products(
    transaction: &Transaction<'_>,
    schema: Schema,
    keys: &[Uuid],
) -> Result<HashMap<ProductId, ProductRow>, ProjectionError> {
    let query = format!(
        "SELECT product_id, sku, name, category, low_stock_threshold, active, quantity, sequence, registered_sequence,
                registered_at, updated_at
         FROM {schema}.products JOIN {schema}.stock USING (product_id) WHERE product_id = ANY($1)"
    );
    let rows = transaction.query(&query, &[&keys]).await?;
    rows.into_iter()
        .map(|row| {
            let product_id = ProductId(row.get(0));
            let sku: String = row.get(1);
            let details = ProductDetails {
                product_id,
                sku: sku.parse().map_err(|_| {
                    ProjectionError::Postgres(format!("product {product_id} has the impossible sku `{sku}`; rebuild"))
                })?,
                name: row.get::<_, String>(2).into(),
                category: row.get::<_, Option<String>>(3).map(Into::into),
                low_stock_threshold: row.get::<_, Option<i32>>(4).map(i32::unsigned_abs),
                active: row.get(5),
            };
            let row = ProductRow {
                details,
                quantity: row.get::<_, i32>(6).unsigned_abs(),
                sequence: row.get::<_, i64>(7).unsigned_abs(),
                registered_sequence: row.get::<_, i64>(8).unsigned_abs(),
                registered_at: row.get(9),
                updated_at: row.get(10),
                changed: false,
                details_changed: false,
            };
            Ok((product_id, row))
        })
        .collect()
}

/// Writes those of `rows` that changed.
pub(crate) async fn write_products(
    transaction: &Transaction<'_>,
    schema: Schema,
    rows: impl Iterator<Item = &ProductRow>,
) -> Result<(), ProjectionError> {
    let changed: Vec<&ProductRow> = rows.filter(|row| row.changed).collect();
    for rows in changed.chunks(PRODUCTS_A_STATEMENT) {
        upsert_stock(transaction, schema, rows).await?;
    }
    let changed: Vec<&ProductRow> = changed.into_iter().filter(|row| row.details_changed).collect();
    for rows in changed.chunks(PRODUCTS_A_STATEMENT) {
        upsert_products(transaction, schema, rows).await?;
    }
    Ok(())
}

async fn upsert_stock(
    transaction: &Transaction<'_>,
    schema: Schema,
    rows: &[&ProductRow],
) -> Result<(), ProjectionError> {
    let ids: Vec<Uuid> = rows.iter().map(|row| row.details.product_id.0).collect();
    let quantities: Vec<i32> = rows.iter().map(|row| integer(row.quantity)).collect();
    let thresholds: Vec<Option<i32>> = rows.iter().map(|row| row.details.low_stock_threshold.map(integer)).collect();
    let sequences: Vec<i64> = rows.iter().map(|row| bigint(row.sequence)).collect();
    let updated: Vec<OffsetDateTime> = rows.iter().map(|row| row.updated_at).collect();
    let upsert = format!(
        "INSERT INTO {schema}.stock (product_id, quantity, low_stock_threshold, sequence, updated_at)
             SELECT * FROM UNNEST($1::uuid[], $2::int[], $3::int[], $4::bigint[], $5::timestamptz[])
             ON CONFLICT (product_id) DO UPDATE SET
                 quantity = excluded.quantity, low_stock_threshold = excluded.low_stock_threshold,
                 sequence = excluded.sequence, updated_at = excluded.updated_at"
    );
    transaction.execute(&upsert, &[&ids, &quantities, &thresholds, &sequences, &updated]).await?;
    Ok(())
}

async fn upsert_products(
    transaction: &Transaction<'_>,
    schema: Schema,
    rows: &[&ProductRow],
) -> Result<(), ProjectionError> {
    let ids: Vec<Uuid> = rows.iter().map(|row| row.details.product_id.0).collect();
    let skus: Vec<&str> = rows.iter().map(|row| row.details.sku.as_str()).collect();
    let names: Vec<&str> = rows.iter().map(|row| &*row.details.name).collect();
    let categories: Vec<Option<&str>> = rows.iter().map(|row| row.details.category.as_deref()).collect();
    let actives: Vec<bool> = rows.iter().map(|row| row.details.active).collect();
    // An array of arrays would have to be rectangular, so the words travel as one text; they hold no space.
    let words: Vec<String> = rows.iter().map(|row| searchable_words(&row.details).join(" ")).collect();
    let registered_sequences: Vec<i64> = rows.iter().map(|row| bigint(row.registered_sequence)).collect();
    let registered: Vec<OffsetDateTime> = rows.iter().map(|row| row.registered_at).collect();
    let upsert = format!(
        "INSERT INTO {schema}.products
                 (product_id, sku, name, category, active, words, registered_sequence, registered_at)
             SELECT product_id, sku, name, category, active, string_to_array(words, ' '), sequence, registered_at
             FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::text[], $7::bigint[],
                         $8::timestamptz[])
                  AS new (product_id, sku, name, category, active, words, sequence, registered_at)
             ON CONFLICT (product_id) DO UPDATE SET
                 sku = excluded.sku, name = excluded.name, category = excluded.category, active = excluded.active,
                 words = excluded.words"
    );
    transaction
        .execute(&upsert, &[&ids, &skus, &names, &categories, &actives, &words, &registered_sequences, &registered])
        .await?;
    Ok(())
}

/// The words of its sku and its name, by which a product is found.
fn searchable_words(details: &ProductDetails) -> Vec<String> {
    let mut words: Vec<String> = split_words(details.sku.as_str()).chain(split_words(&details.name)).collect();
    words.sort_unstable();
    words.dedup();
    words
}

/// The words of a text: what stands between characters that are neither letters nor digits, in lower case. Both what is
/// found and what is looked for are split by this.
pub fn split_words(text: &str) -> impl Iterator<Item = String> {
    // Lower case first: a letter may become several characters of which not all are letters.
    let lower = text.to_lowercase();
    let words: Vec<String> = lower
        .split(|letter: char| !letter.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    words.into_iter()
}

/// Adds movements by binary `COPY`.
pub(crate) async fn write_movements(
    transaction: &Transaction<'_>,
    schema: Schema,
    movements: &[Movement<'_>],
) -> Result<(), ProjectionError> {
    if movements.is_empty() {
        return Ok(());
    }
    let copy = format!(
        "COPY {schema}.movements (sequence, product_id, previous_quantity, new_quantity, trigger, order_id, updated_by,
                                  reason, event_id, occurred_at, stored_at)
         FROM STDIN BINARY"
    );
    let sink = transaction.copy_in(&copy).await?;
    let types = [
        Type::INT8,
        Type::UUID,
        Type::INT4,
        Type::INT4,
        Type::TEXT,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::UUID,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
    ];
    let writer = BinaryCopyInWriter::new(sink, &types);
    let mut writer = std::pin::pin!(writer);
    for Movement { message, event_id, occurred_at, updated } in movements {
        let by = match updated.updated_by {
            UpdatedBy::System => None,
            UpdatedBy::User(id) => Some(id),
        };
        writer
            .as_mut()
            .write(&[
                &bigint(message.sequence),
                &updated.product_id.0,
                &integer(updated.previous_quantity),
                &integer(updated.new_quantity),
                &updated.trigger.as_str(),
                &updated.order_id.map(|order| order.0),
                &by,
                &message.carried.reason,
                event_id,
                occurred_at,
                &message.stored_at,
            ])
            .await?;
    }
    writer.finish().await?;
    Ok(())
}

/// Adds counts by binary `COPY`.
pub(crate) async fn write_counts(
    transaction: &Transaction<'_>,
    schema: Schema,
    counts: &[Count<'_>],
) -> Result<(), ProjectionError> {
    if counts.is_empty() {
        return Ok(());
    }
    let copy = format!(
        "COPY {schema}.counts (sequence, product_id, quantity, counted_at, counted_by, event_id, stored_at)
         FROM STDIN BINARY"
    );
    let sink = transaction.copy_in(&copy).await?;
    let types = [Type::INT8, Type::UUID, Type::INT8, Type::TIMESTAMPTZ, Type::UUID, Type::UUID, Type::TIMESTAMPTZ];
    let writer = BinaryCopyInWriter::new(sink, &types);
    let mut writer = std::pin::pin!(writer);
    for Count { message, event_id, counted } in counts {
        let by = match counted.counted_by {
            CountedBy::Warehouse => None,
            CountedBy::User(id) => Some(id),
        };
        writer
            .as_mut()
            .write(&[
                &bigint(message.sequence),
                &counted.product_id.0,
                &i64::from(counted.quantity),
                &counted.counted_at.get(),
                &by,
                event_id,
                &message.stored_at,
            ])
            .await?;
    }
    writer.finish().await?;
    Ok(())
}

/// A decision as the columns `outcome`, `reason` and `items` hold it.
fn decision_columns(decision: &OrderDecision) -> (&'static str, Option<&str>, Option<Json<Value>>) {
    match decision {
        OrderDecision::Allocated => ("allocated", None, None),
        OrderDecision::Refused(failed) => {
            let items = serde_json::to_value(&failed.items).unwrap_or_default();
            ("refused", Some(failed.reason.as_str()), Some(Json(items)))
        }
    }
}

/// Adds the decisions of orders that have none yet.
pub(crate) async fn write_decisions(
    transaction: &Transaction<'_>,
    schema: Schema,
    decisions: &Decisions,
) -> Result<(), ProjectionError> {
    if decisions.is_empty() {
        return Ok(());
    }
    let mut orders: Vec<Uuid> = Vec::with_capacity(decisions.len());
    let mut outcomes: Vec<&str> = Vec::with_capacity(decisions.len());
    let mut reasons: Vec<Option<&str>> = Vec::with_capacity(decisions.len());
    let mut items: Vec<Option<Json<Value>>> = Vec::with_capacity(decisions.len());
    let mut sequences: Vec<i64> = Vec::with_capacity(decisions.len());
    let mut instants: Vec<OffsetDateTime> = Vec::with_capacity(decisions.len());
    for (sequence, (order_id, decided_at, decision)) in decisions {
        let (outcome, reason, failing) = decision_columns(decision);
        orders.push(order_id.0);
        outcomes.push(outcome);
        reasons.push(reason);
        items.push(failing);
        sequences.push(bigint(*sequence));
        instants.push(*decided_at);
    }
    let insert = format!(
        "INSERT INTO {schema}.order_decisions (order_id, outcome, reason, items, sequence, decided_at)
         SELECT * FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::jsonb[], $5::bigint[], $6::timestamptz[])
         ON CONFLICT (order_id) DO NOTHING"
    );
    transaction.execute(&insert, &[&orders, &outcomes, &reasons, &items, &sequences, &instants]).await?;
    Ok(())
}

/// Adds decisions by binary `COPY` to a table that has no key yet: an order of several batches gets several rows, of
/// which its first is its decision.
pub(crate) async fn copy_decisions(
    transaction: &Transaction<'_>,
    schema: Schema,
    decisions: &Decisions,
) -> Result<(), ProjectionError> {
    if decisions.is_empty() {
        return Ok(());
    }
    let copy = format!(
        "COPY {schema}.order_decisions (order_id, outcome, reason, items, sequence, decided_at) FROM STDIN BINARY"
    );
    let sink = transaction.copy_in(&copy).await?;
    let types = [Type::UUID, Type::TEXT, Type::TEXT, Type::JSONB, Type::INT8, Type::TIMESTAMPTZ];
    let writer = BinaryCopyInWriter::new(sink, &types);
    let mut writer = std::pin::pin!(writer);
    for (sequence, (order_id, decided_at, decision)) in decisions {
        let (outcome, reason, items) = decision_columns(decision);
        writer.as_mut().write(&[&order_id.0, &outcome, &reason, &items, &bigint(*sequence), decided_at]).await?;
    }
    writer.finish().await?;
    Ok(())
}
