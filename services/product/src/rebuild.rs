//! Rebuilding the projection: the same tables anew from sequence 1, in a schema beside the live one, and the swap.
//!
//! Owns filling the shadow schema; the names of the schemas and the swap are `lomash_platform::schemas`'. Nothing here
//! touches the live rows. Events are folded by the very rule of the projector (`Changes::fold`); nothing is published, so
//! no side effect is replayed.
//!
//! # Memory
//! The products (some 400 bytes each), and [`BATCHES_HELD`] batches of [`LOAD_MESSAGES`] messages or [`LOAD_BYTES`].
//! Orders are not held: that each is decided once is settled by the database when it builds the key.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::StreamExt;
use lomash_ledger::{Ledger, ReadError, StoredMessage};
use lomash_platform::Secret;
use lomash_platform::postgres::{INVENTORY, Schema};
use lomash_platform::schemas::{self, Swap, Swapped};
use tokio::sync::mpsc;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use crate::projection::ProjectionError;
use crate::projection::changes::{Changes, Parsed, Products};
use crate::projection::tables::{move_checkpoint, write_counts, write_decisions, write_movements, write_products};

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

/// Memory of the server for building an index.
const INDEX_MEMORY: &str = "256MB";

/// The tables that are loaded without indexes.
const BULK_TABLES: [&str; 3] = [LARGEST_TABLE, "order_decisions", "counts"];
const LARGEST_TABLE: &str = "movements";
const OTHER_TABLES: [&str; 4] = ["products", "stock", "order_decisions", "counts"];

/// A shadow projection that is being built.
pub struct Rebuild<L> {
    ledger: L,
    url: Secret,
    /// Writes the shadow and holds the lock.
    client: Client,
    /// Every product, as of `checkpoint`.
    products: Products,
    /// What is folded and written, but for `products`.
    checkpoint: u64,
    /// What the shadow's table says.
    settled: u64,
    /// Messages that were not ours, since the table was told.
    skipped: u64,
    /// What is left out meanwhile.
    indexes: Vec<Index>,
}

/// An index or a key of a table, and the statement that makes it.
struct Index {
    table: String,
    statement: String,
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
        let client = schemas::take_place(url).await?;
        let seen = schemas::checkpoint(&client, &INVENTORY, INVENTORY.live).await?.unwrap_or(0);
        reaches(&ledger, seen, INVENTORY.live).await?;
        schemas::make_shadow(&client, &INVENTORY, url).await?;
        set_up(&client).await?;
        let indexes = leave_out_indexes(&client).await.context("the indexes of the shadow cannot be left out")?;
        let (products, checkpoint, settled, skipped) = (Products::default(), 0, 0, 0);
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
        let written = async {
            let mut transaction = self.client.transaction().await?;
            write_movements(&transaction, Schema::Shadow, &changes.movements).await?;
            write_counts(&transaction, Schema::Shadow, &changes.counts).await?;
            // Before the table has its key again, all that are decided twice are in it; `build` sees to them.
            write_decisions(&mut transaction, Schema::Shadow, &changes.decisions).await?;
            transaction.commit().await?;
            Ok::<(), ProjectionError>(())
        };
        written.await.with_context(|| format!("the shadow cannot take the events up to {reached}"))?;
        self.skipped += changes.skipped;
        self.products = changes.products;
        self.checkpoint = reached;
        Ok(())
    }

    /// Makes what was loaded fit to be read: builds the indexes that the load left out, faster than keeping them meanwhile;
    /// settles; and lets the planner know the new tables, so that the first readers get the plans of the later ones.
    ///
    /// `movements`, the largest by far, on one connection and all else on another.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn finish(&mut self) -> anyhow::Result<()> {
        let beside = schemas::connect(&self.url).await?;
        set_up(&beside).await?;
        let indexes = std::mem::take(&mut self.indexes);
        let (largest, others): (Vec<_>, Vec<_>) = indexes.iter().partition(|index| index.table == LARGEST_TABLE);
        let largest = async {
            build(&beside, &largest).await?;
            analyze(&beside, &[LARGEST_TABLE]).await
        };
        let others = async {
            build(&self.client, &others).await?;
            self.settle().await?;
            analyze(&self.client, &OTHER_TABLES).await
        };
        let finished = tokio::try_join!(largest, others).map(drop);
        if finished.is_err() {
            self.indexes = indexes;
        }
        finished
    }

    /// Writes products and checkpoint, so that the shadow's tables are the projection at [`Rebuild::checkpoint`].
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn settle(&mut self) -> anyhow::Result<()> {
        let written = async {
            let transaction = self.client.transaction().await?;
            write_products(&transaction, Schema::Shadow, &self.products).await?;
            move_checkpoint(&transaction, Schema::Shadow, self.settled, self.checkpoint, self.skipped).await?;
            transaction.commit().await?;
            Ok::<(), ProjectionError>(())
        };
        written.await.context("the products of the shadow cannot be written")?;
        self.products.written();
        (self.settled, self.skipped) = (self.checkpoint, 0);
        Ok(())
    }

    /// Makes the shadow live and keeps what was live as the previous one, in one transaction.
    ///
    /// The projector waits meanwhile, so come close first ([`CLOSE`]); readers do not wait.
    ///
    /// # Errors
    /// When a server fails or a lock is not to be had; the live schema is then as it was.
    pub async fn swap(mut self) -> anyhow::Result<Swapped> {
        ensure!(self.indexes.is_empty(), "the shadow has no indexes yet");
        let mut client = schemas::connect(&self.url).await?;
        let swap = Swap::begin(&mut client, &INVENTORY).await?;
        let last = self.ledger.last_sequence().await?;
        self.load(last, &mut |_| {}).await?;
        self.settle().await?;
        swap.commit(&self.client, self.checkpoint).await
    }

    /// Drops the shadow.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn discard(self) -> anyhow::Result<()> {
        schemas::drop_schema(&self.client, INVENTORY.shadow).await
    }
}

/// Makes the previous schema live again, and what was live the previous one; see [`schemas::roll_back`].
///
/// # Errors
/// As [`schemas::roll_back`].
pub async fn roll_back<L: Ledger>(ledger: &L, url: &Secret) -> anyhow::Result<Swapped> {
    schemas::roll_back(&INVENTORY, url, async |seen| reaches(ledger, seen, Schema::Previous.name()).await).await
}

/// The checkpoint is read before the stream's end, so only a stream that lost messages is found to be behind it.
async fn reaches<L: Ledger>(ledger: &L, seen: u64, schema: &str) -> anyhow::Result<()> {
    ledger.reaches(seen).await.map_err(|problem| problem.with_remedy(schema))?;
    Ok(())
}

async fn set_up(client: &Client) -> anyhow::Result<()> {
    // What is not on disk yet when a transaction returns is so at the latest when the swap commits.
    let settings = format!("SET synchronous_commit = off; SET maintenance_work_mem = '{INDEX_MEMORY}'");
    client.batch_execute(&settings).await.context("the connection cannot be set up")
}

async fn build(client: &Client, indexes: &[&Index]) -> anyhow::Result<()> {
    for Index { statement, .. } in indexes {
        let mut built = client.batch_execute(statement).await;
        if built.as_ref().is_err_and(|problem| problem.code() == Some(&SqlState::UNIQUE_VIOLATION)) {
            // Only in a ledger that decides an order twice, which is never ours; the first decision counts.
            let first_only = format!(
                "DELETE FROM {schema}.order_decisions AS late USING {schema}.order_decisions AS first
                 WHERE late.order_id = first.order_id AND late.sequence > first.sequence",
                schema = Schema::Shadow
            );
            client.batch_execute(&first_only).await.context("second decisions cannot be left out")?;
            built = client.batch_execute(statement).await;
        }
        built.with_context(|| format!("an index of the shadow cannot be built by `{statement}`"))?;
    }
    Ok(())
}

async fn analyze(client: &Client, tables: &[&str]) -> anyhow::Result<()> {
    let tables: Vec<String> = tables.iter().map(|table| format!("{}.{table}", Schema::Shadow)).collect();
    let statement = format!("ANALYZE {}", tables.join(", "));
    client.batch_execute(&statement).await.context("the shadow cannot be analysed")
}

/// Drops indexes and keys of the big tables; returns what was dropped.
async fn leave_out_indexes(client: &Client) -> Result<Vec<Index>, tokio_postgres::Error> {
    let query = "
        SELECT format('ALTER TABLE %s DROP CONSTRAINT %I', k.conrelid::regclass, k.conname),
               format('ALTER TABLE %s ADD CONSTRAINT %I %s', k.conrelid::regclass, k.conname,
                      pg_get_constraintdef(k.oid)), t.relname::text
        FROM pg_constraint k JOIN pg_class t ON t.oid = k.conrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = ANY($2) AND k.contype IN ('p', 'u')
        UNION ALL
        SELECT format('DROP INDEX %s', i.indexrelid::regclass), pg_get_indexdef(i.indexrelid), t.relname::text
        FROM pg_index i JOIN pg_class t ON t.oid = i.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
        WHERE n.nspname = $1 AND t.relname = ANY($2)
          AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid)";
    let rows = client.query(query, &[&Schema::Shadow.name(), &BULK_TABLES.as_slice()]).await?;
    let mut later = Vec::with_capacity(rows.len());
    for row in rows {
        client.batch_execute(row.get(0)).await?;
        later.push(Index { table: row.get(2), statement: row.get(1) });
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
        self.bytes += message.bytes();
        self.parsed.push(message.parse());
        self.messages.push(message);
    }

    fn append(&mut self, other: &mut Self) {
        self.bytes += std::mem::take(&mut other.bytes);
        self.parsed.append(&mut other.parsed);
        self.messages.append(&mut other.messages);
    }
}
