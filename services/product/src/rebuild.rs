//! Rebuilding the projection: the same tables anew from sequence 1, in a schema beside the live one, and the swap.
//!
//! Owns the shadow schema and the names of all schemas. Nothing here touches the live rows: until the swap commits,
//! whatever fails leaves only a shadow behind, which the next rebuild drops. Events are folded by the very rule of the
//! projector (`Changes::fold`); nothing is published, so no side effect is replayed.
//!
//! The swap fences the projector by a lock on the live checkpoint's *table*, which readers do not notice: a projector
//! takes its own lock on it before anything else, waits, and then finds the checkpoint of the new schema. Renaming a
//! schema locks no table, and the server makes every prepared statement look its tables up again.
//!
//! # Memory
//! The products (some 400 bytes each), and [`BATCHES_HELD`] batches of [`LOAD_MESSAGES`] messages or [`LOAD_BYTES`].
//! Orders are not held: that each is decided once is settled by the database when it builds the key.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use futures::StreamExt;
use hashbrown::HashMap;
use lomash_contract::ProductId;
use lomash_ledger::{Ledger, ReadError, StoredMessage};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, SCHEMAS_LOCK, Schema};
use tokio::sync::mpsc;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};
use tracing::warn;

use crate::projection::{
    Changes, PROJECTION, Parsed, ProductRow, ProjectionError, copy_decisions, move_checkpoint, write_counts,
    write_decisions, write_movements, write_products,
};

/// Messages after which a transaction of the load is cut at the next end of a batch.
pub const LOAD_MESSAGES: usize = 20_000;
/// Bytes of payload after which it is, too.
pub const LOAD_BYTES: usize = 32 * 1024 * 1024;
/// Batches in memory at most: one being read, one waiting, one being written.
pub const BATCHES_HELD: usize = 3;

/// Messages behind the end at which the rest is brought in by the swap itself, while the projector waits.
pub const CLOSE: u64 = 2_000;

/// How often a read that was interrupted is taken up again without having moved, and after which pause.
const MAX_INTERRUPTIONS: u32 = 5;
const INTERRUPTION_PAUSE: Duration = Duration::from_millis(500);

/// How long the swap waits for a lock. Projectors hold theirs for one transaction, readers do not matter.
const LOCK_TIMEOUT_SECONDS: u32 = 30;

/// Memory of the server for building an index.
const INDEX_MEMORY: &str = "256MB";

/// Key of the advisory lock that a rebuild holds from its beginning to its end.
const REBUILD_LOCK: i64 = 0x6c6f_6d61_7368_0003;

/// The tables that are loaded without indexes.
const BULK_TABLES: [&str; 3] = ["movements", "order_decisions", "counts"];

/// A shadow projection that is being built.
pub struct Rebuild<L> {
    ledger: L,
    url: Secret,
    /// Writes the shadow and holds the lock.
    client: Client,
    /// Every product, as of `checkpoint`.
    products: HashMap<ProductId, ProductRow>,
    /// What is folded and written, but for `products`.
    checkpoint: u64,
    /// What the shadow's table says.
    settled: u64,
    /// Messages that were not ours, since the table was told.
    skipped: u64,
    /// Statements that make the indexes that are left out meanwhile.
    indexes: Vec<String>,
}

/// What a swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swapped {
    /// Where the projection that is live now stands.
    pub checkpoint: u64,
    /// Where the one stood that was live before; none when there was none.
    pub replaced: Option<u64>,
    /// Whether something is kept that [`roll_back`] can go back to.
    pub kept: bool,
}

/// Messages up to the end of an atomic batch, parsed.
#[derive(Default)]
struct Batch {
    messages: Vec<StoredMessage>,
    parsed: Vec<Parsed>,
    bytes: usize,
}

impl<L: Ledger> Rebuild<L> {
    /// Takes the place of the one rebuild, refuses a stream that went backwards, and makes an empty shadow.
    ///
    /// # Errors
    /// When another rebuild is at work, the stream ends before the live checkpoint, or a server does not answer.
    pub async fn begin(ledger: L, url: &Secret) -> anyhow::Result<Self> {
        let client = take_place(url).await?;
        refuse_backwards(&ledger, &client, Schema::Live).await?;
        for left_over in [Schema::Discarded, Schema::Shadow] {
            drop_schema(&client, left_over).await?;
        }
        postgres::migrate_into(url, Schema::Shadow).await?;
        // What is not on disk yet when a transaction returns is so at the latest when the swap commits.
        let settings = format!("SET synchronous_commit = off; SET maintenance_work_mem = '{INDEX_MEMORY}'");
        client.batch_execute(&settings).await.context("the connection cannot be set up")?;
        let indexes = leave_out_indexes(&client).await.context("the indexes of the shadow cannot be left out")?;
        let (products, checkpoint, settled, skipped) = (HashMap::new(), 0, 0, 0);
        Ok(Self { ledger, url: url.clone(), client, products, checkpoint, settled, skipped, indexes })
    }

    /// The sequence up to which the shadow is loaded: always the end of an atomic batch.
    #[must_use]
    pub const fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Loads on, up to the last end of a batch that is not beyond `upto`. `loaded` hears how many more are written.
    ///
    /// # Errors
    /// When the stream has a gap or stays silent, or Postgres fails.
    pub async fn load(&mut self, upto: u64, loaded: &mut impl FnMut(u64)) -> anyhow::Result<()> {
        let mut interruptions = 0;
        while self.checkpoint < upto {
            let before = self.checkpoint;
            let mut batches = read_batches(self.ledger.clone(), before, upto);
            let interrupted = loop {
                match batches.recv().await {
                    None => return Ok(()),
                    Some(Err(problem)) => break problem,
                    Some(Ok(batch)) => {
                        let count = batch.messages.len() as u64;
                        self.write(batch).await?;
                        loaded(count);
                    }
                }
            };
            interruptions = if self.checkpoint > before { 0 } else { interruptions + 1 };
            if !interrupted.is_transient() || interruptions > MAX_INTERRUPTIONS {
                return Err(interrupted).with_context(|| format!("INVENTORY cannot be read on after {before}"));
            }
            tokio::time::sleep(INTERRUPTION_PAUSE).await;
        }
        Ok(())
    }

    /// Folds a batch over all products, and writes what is added. Products change too often to be written each time.
    async fn write(&mut self, batch: Batch) -> anyhow::Result<()> {
        let Batch { messages, parsed, .. } = batch;
        let Some(reached) = messages.last().map(|message| message.sequence) else { return Ok(()) };
        let mut changes = Changes::over(std::mem::take(&mut self.products));
        for (message, parsed) in messages.iter().zip(parsed) {
            changes.fold(message, parsed);
        }
        let has_keys = self.indexes.is_empty();
        let written = async {
            let transaction = self.client.transaction().await?;
            write_movements(&transaction, Schema::Shadow, &changes.movements).await?;
            write_counts(&transaction, Schema::Shadow, &changes.counts).await?;
            if has_keys {
                write_decisions(&transaction, Schema::Shadow, &changes.decisions).await?;
            } else {
                copy_decisions(&transaction, Schema::Shadow, &changes.decisions).await?;
            }
            transaction.commit().await?;
            Ok::<(), ProjectionError>(())
        };
        written.await.with_context(|| format!("the shadow cannot take the events up to {reached}"))?;
        self.skipped += changes.skipped;
        self.products = changes.products;
        self.checkpoint = reached;
        Ok(())
    }

    /// Builds the indexes that the load left out, once: faster than keeping them during the load.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn index(&mut self) -> anyhow::Result<()> {
        for statement in &self.indexes {
            let mut built = self.client.batch_execute(statement).await;
            if built.as_ref().is_err_and(|problem| problem.code() == Some(&SqlState::UNIQUE_VIOLATION)) {
                // Only in a ledger that decides an order twice, which is never ours; the first decision counts.
                let first_only = format!(
                    "DELETE FROM {schema}.order_decisions AS late USING {schema}.order_decisions AS first
                     WHERE late.order_id = first.order_id AND late.sequence > first.sequence",
                    schema = Schema::Shadow
                );
                self.client.batch_execute(&first_only).await.context("second decisions cannot be left out")?;
                built = self.client.batch_execute(statement).await;
            }
            built.with_context(|| format!("an index of the shadow cannot be built by `{statement}`"))?;
        }
        self.indexes.clear();
        Ok(())
    }

    /// Writes products and checkpoint, so that the shadow's tables are the projection at [`Rebuild::checkpoint`].
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn settle(&mut self) -> anyhow::Result<()> {
        let written = async {
            let transaction = self.client.transaction().await?;
            write_products(&transaction, Schema::Shadow, self.products.values()).await?;
            move_checkpoint(&transaction, Schema::Shadow, self.settled, self.checkpoint, self.skipped).await?;
            transaction.commit().await?;
            Ok::<(), ProjectionError>(())
        };
        written.await.context("the products of the shadow cannot be written")?;
        for row in self.products.values_mut() {
            (row.changed, row.details_changed) = (false, false);
        }
        (self.settled, self.skipped) = (self.checkpoint, 0);
        Ok(())
    }

    /// Lets the planner know the new tables, so that the first readers get the plans of the later ones.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn analyze(&self) -> anyhow::Result<()> {
        let schema = Schema::Shadow;
        let tables = ["products", "stock", "movements", "order_decisions", "counts"];
        let statement = format!("ANALYZE {}", tables.map(|table| format!("{schema}.{table}")).join(", "));
        self.client.batch_execute(&statement).await.context("the shadow cannot be analysed")
    }

    /// Makes the shadow live and keeps what was live as the previous one, in one transaction.
    ///
    /// The projector waits meanwhile, so come close first ([`CLOSE`]); readers do not wait.
    ///
    /// # Errors
    /// When a server fails or a lock is not to be had; the live schema is then as it was.
    pub async fn swap(mut self) -> anyhow::Result<Swapped> {
        ensure!(self.indexes.is_empty(), "the shadow has no indexes yet");
        let mut client = connect(&self.url).await?;
        let transaction = begin_renaming(&mut client).await?;
        let replaced = fence(&transaction).await?;
        let last = self.ledger.last_sequence().await?;
        self.load(last, &mut |_| {}).await?;
        self.settle().await?;
        if let Some(live) = replaced
            && self.checkpoint < live
        {
            bail!("the shadow ends at {} and the live projection at {live}: not swapped", self.checkpoint);
        }
        if exists(&transaction, Schema::Live).await? {
            if exists(&transaction, Schema::Previous).await? {
                rename(&transaction, Schema::Previous, Schema::Discarded).await?;
            }
            rename(&transaction, Schema::Live, Schema::Previous).await?;
        }
        rename(&transaction, Schema::Shadow, Schema::Live).await?;
        let kept = exists(&transaction, Schema::Previous).await?;
        commit_renaming(transaction).await?;
        forget_discarded(&self.client).await;
        Ok(Swapped { checkpoint: self.checkpoint, replaced, kept })
    }

    /// Drops the shadow.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn discard(self) -> anyhow::Result<()> {
        drop_schema(&self.client, Schema::Shadow).await
    }
}

/// Makes the previous schema live again, and what was live the previous one, in one transaction: doing it twice undoes
/// it. The projector catches up from the older checkpoint by itself.
///
/// # Errors
/// When there is no previous schema, another rebuild is at work, the stream ends before it, or a server fails; the live
/// schema is then as it was.
pub async fn roll_back<L: Ledger>(ledger: &L, url: &Secret) -> anyhow::Result<Swapped> {
    let place = take_place(url).await?;
    drop_schema(&place, Schema::Discarded).await?;
    let nothing = "there is no previous projection to go back to: only a rebuild that replaced one leaves it";
    let previous = checkpoint(&place, Schema::Previous).await?.context(nothing)?;
    refuse_backwards(ledger, &place, Schema::Previous).await?;
    // It may be of an older version than the programs that will read it.
    postgres::migrate_into(url, Schema::Previous).await?;
    let still = checkpoint(&place, Schema::Previous).await?.context(nothing)?;
    if still < previous {
        drop_schema(&place, Schema::Previous).await?;
        bail!(
            "the previous projection is of an older version, of which this one cannot make use: it is dropped, and the \
             live one is as it was; `lomash rebuild` makes it anew"
        );
    }
    let mut client = connect(url).await?;
    let transaction = begin_renaming(&mut client).await?;
    let replaced = fence(&transaction).await?;
    let kept = exists(&transaction, Schema::Live).await?;
    if kept {
        rename(&transaction, Schema::Live, Schema::Discarded).await?;
    }
    rename(&transaction, Schema::Previous, Schema::Live).await?;
    if kept {
        rename(&transaction, Schema::Discarded, Schema::Previous).await?;
    }
    commit_renaming(transaction).await?;
    Ok(Swapped { checkpoint: previous, replaced, kept })
}

/// Where `schema` stands; none when it has no checkpoint.
///
/// # Errors
/// When Postgres does not answer.
pub async fn checkpoint(client: &Client, schema: Schema) -> anyhow::Result<Option<u64>> {
    let table = format!("{schema}.checkpoint");
    let there = "SELECT to_regclass($1) IS NOT NULL";
    if !client.query_one(there, &[&table]).await.context("Postgres does not answer")?.get::<_, bool>(0) {
        return Ok(None);
    }
    let query = format!("SELECT sequence FROM {table} WHERE projection = $1");
    let row = client.query_opt(&query, &[&PROJECTION]).await.with_context(|| format!("{table} cannot be read"))?;
    Ok(row.map(|row| row.get::<_, i64>(0).unsigned_abs()))
}

/// A connection whose statement the server ends soon after we have died, however long it would have taken.
async fn connect(url: &Secret) -> anyhow::Result<Client> {
    let client = postgres::connect(url).await?;
    let check = "SET client_connection_check_interval = '1s'";
    client.batch_execute(check).await.context("the connection cannot be set up")?;
    Ok(client)
}

/// A connection that holds the place of the one rebuild.
async fn take_place(url: &Secret) -> anyhow::Result<Client> {
    let client = connect(url).await?;
    let lock = "SELECT pg_try_advisory_lock($1)";
    let free: bool = client.query_one(lock, &[&REBUILD_LOCK]).await.context("Postgres does not answer")?.get(0);
    ensure!(
        free,
        "another `lomash rebuild` is at work on this database; wait until it has ended (of one that was killed \
         nothing is left after a few seconds)"
    );
    Ok(client)
}

/// The checkpoint is read before the stream's end, so only a stream that lost messages is found to be behind it.
async fn refuse_backwards<L: Ledger>(ledger: &L, client: &Client, schema: Schema) -> anyhow::Result<()> {
    let seen = checkpoint(client, schema).await?.unwrap_or(0);
    match ledger.reaches(seen).await {
        Ok(_) => Ok(()),
        Err(ReadError::WentBackwards { last, .. }) => bail!(
            "the stream INVENTORY ends at {last}, but {schema} has read it up to {seen}: the stream went backwards. \
             Restore the newer stream; if the older one is the truth from now on, say so by `DROP SCHEMA {schema} CASCADE`"
        ),
        Err(problem) => Err(problem.into()),
    }
}

async fn drop_schema(client: &Client, schema: Schema) -> anyhow::Result<()> {
    let statement = format!(
        "SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'; DROP SCHEMA IF EXISTS {schema} CASCADE; RESET lock_timeout"
    );
    client.batch_execute(&statement).await.with_context(|| {
        format!("{schema}, which nothing needs any more, cannot be dropped; does something still read from it?")
    })
}

/// Drops what no name leads to any more. Outside the swap: a reader from before may still be at it.
async fn forget_discarded(client: &Client) {
    if let Err(problem) = drop_schema(client, Schema::Discarded).await {
        warn!("{problem:#}; the next rebuild drops it");
    }
}

/// Drops indexes and keys of the big tables; returns the statements that make them.
async fn leave_out_indexes(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let query = "
        SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', k.conrelid::regclass, k.conname),
               format('ALTER TABLE %s ADD CONSTRAINT %I %s', k.conrelid::regclass, k.conname,
                      pg_get_constraintdef(k.oid))
        FROM pg_constraint k JOIN pg_class t ON t.oid = k.conrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = ANY($2) AND k.contype IN ('p', 'u')
        UNION ALL
        SELECT format('DROP INDEX %s', i.indexrelid::regclass), pg_get_indexdef(i.indexrelid)
        FROM pg_index i JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = ANY($2)
          AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)";
    let rows = client.query(query, &[&Schema::Shadow.name(), &BULK_TABLES.as_slice()]).await?;
    let mut later = Vec::with_capacity(rows.len());
    for row in rows {
        client.batch_execute(row.get(0)).await?;
        later.push(row.get(1));
    }
    Ok(later)
}

/// Reads and parses ahead of the writer, on a task of its own, up to the last end of a batch that is not beyond `upto`.
fn read_batches<L: Ledger>(ledger: L, after: u64, upto: u64) -> mpsc::Receiver<Result<Batch, ReadError>> {
    let (sender, receiver) = mpsc::channel(BATCHES_HELD - 2);
    tokio::spawn(async move {
        let read = async {
            let mut messages = ledger.read(after).await?;
            let mut batch = Batch::default();
            // What is read after the last end of a batch.
            let mut open = Batch::default();
            while let Some(message) = messages.next().await {
                let message = message?;
                let (ends, end) = (message.ends_batch(), message.sequence >= upto);
                open.push(message);
                if ends {
                    batch.append(&mut open);
                }
                let full = batch.messages.len() >= LOAD_MESSAGES || batch.bytes >= LOAD_BYTES;
                if full && sender.send(Ok(std::mem::take(&mut batch))).await.is_err() {
                    return Ok(());
                }
                if end {
                    break;
                }
            }
            if !batch.messages.is_empty() {
                let _ = sender.send(Ok(batch)).await;
            }
            Ok(())
        };
        if let Err(problem) = read.await {
            let _ = sender.send(Err(problem)).await;
        }
    });
    receiver
}

impl Batch {
    fn push(&mut self, message: StoredMessage) {
        self.bytes += message.payload.len();
        self.parsed.push(message.parse());
        self.messages.push(message);
    }

    fn append(&mut self, other: &mut Self) {
        self.bytes += std::mem::take(&mut other.bytes);
        self.parsed.append(&mut other.parsed);
        self.messages.append(&mut other.messages);
    }
}

async fn begin_renaming(client: &mut Client) -> anyhow::Result<Transaction<'_>> {
    let transaction = client.transaction().await.context("Postgres does not begin a transaction")?;
    let wait = format!("SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'");
    transaction.batch_execute(&wait).await.context("the transaction cannot be set up")?;
    let lock = "SELECT pg_advisory_xact_lock($1)";
    transaction
        .execute(lock, &[&SCHEMAS_LOCK])
        .await
        .context("the names of the schemas cannot be locked; is a migration or a `lomash verify` stuck? Try again")?;
    Ok(transaction)
}

/// Stops projectors until the transaction ends; returns the live checkpoint, if there is one.
async fn fence(transaction: &Transaction<'_>) -> anyhow::Result<Option<u64>> {
    let there = "SELECT to_regclass($1) IS NOT NULL";
    let table = format!("{}.checkpoint", Schema::Live);
    if !transaction.query_one(there, &[&table]).await.context("Postgres does not answer")?.get::<_, bool>(0) {
        return Ok(None);
    }
    // EXCLUSIVE: in the way of whoever writes or locks rows, and of no reader.
    transaction.batch_execute(&format!("LOCK TABLE {table} IN EXCLUSIVE MODE")).await.with_context(|| {
        format!(
            "{table} cannot be locked within {LOCK_TIMEOUT_SECONDS} s: a projector is stuck in a transaction; try again"
        )
    })?;
    let query = format!("SELECT sequence FROM {table} WHERE projection = $1");
    let row = transaction.query_opt(&query, &[&PROJECTION]).await.with_context(|| format!("{table} cannot be read"))?;
    Ok(row.map(|row| row.get::<_, i64>(0).unsigned_abs()))
}

async fn exists(transaction: &Transaction<'_>, schema: Schema) -> anyhow::Result<bool> {
    let query = "SELECT to_regnamespace($1) IS NOT NULL";
    Ok(transaction.query_one(query, &[&schema.name()]).await.context("Postgres does not answer")?.get(0))
}

async fn rename(transaction: &Transaction<'_>, from: Schema, to: Schema) -> anyhow::Result<()> {
    let statement = format!("ALTER SCHEMA {from} RENAME TO {to}");
    transaction.batch_execute(&statement).await.with_context(|| format!("`{statement}` failed; nothing is swapped"))
}

async fn commit_renaming(transaction: Transaction<'_>) -> anyhow::Result<()> {
    transaction.commit().await.map_err(|problem| {
        anyhow!(problem).context("it is not known whether the swap was committed; `lomash status` shows what is live")
    })
}
