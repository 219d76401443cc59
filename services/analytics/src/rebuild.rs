//! Rebuilding the stock metrics: the same tables anew from sequence 1, in a schema beside the live one, and the swap.
//!
//! Owns filling the shadow, by the very transactions that fill the live tables; the names of the schemas and the swap are
//! `lomash_platform::schemas`'. Nothing here touches the live rows. The shadow can stop at any sequence, so it can be
//! compared with the live rows wherever those stand.

use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt;
use lomash_ledger::{Ledger, ReadError, StoredMessage};
use lomash_platform::postgres::ANALYTICS;
use lomash_platform::schemas::{self, Swap, Swapped};
use lomash_platform::{Secret, postgres};
use tokio::sync::mpsc;
use tokio_postgres::Client;

use crate::projection::apply;
use crate::rows;

/// Events that one transaction of the load applies: more than live ones, for each reads the rows that it touches.
pub const LOAD_EVENTS: usize = 20_000;
/// Bytes of payload after which it is cut, too.
pub const LOAD_BYTES: usize = 32 << 20;
/// Batches that wait to be applied, besides the one that is being read and the one that is being applied.
const BATCHES_WAITING: usize = 1;

/// How often a read that was interrupted is taken up again without having moved, and after which pause.
const MAX_INTERRUPTIONS: u32 = 5;
const INTERRUPTION_PAUSE: Duration = Duration::from_millis(500);

/// Stock metrics that are being built.
pub struct Rebuild<L> {
    ledger: L,
    url: Secret,
    /// Writes the shadow and holds the place of the one rebuild.
    client: Client,
    checkpoint: u64,
}

impl<L: Ledger> Rebuild<L> {
    /// Takes the place of the one rebuild, refuses a stream that went backwards, and makes an empty shadow.
    ///
    /// # Errors
    /// When another rebuild is at work, the stream ends before the live checkpoint, or a server does not answer.
    pub async fn begin(ledger: L, url: &Secret) -> anyhow::Result<Self> {
        let client = schemas::take_place(url).await?;
        let seen = schemas::checkpoint(&client, &ANALYTICS, ANALYTICS.live).await?.unwrap_or(0);
        reaches(&ledger, seen, ANALYTICS.live).await?;
        schemas::make_shadow(&client, &ANALYTICS, url).await?;
        // What is not on disk yet when a transaction returns is so at the latest when the swap commits.
        client.batch_execute("SET synchronous_commit = off").await.context("the connection cannot be set up")?;
        Ok(Self { ledger, url: url.clone(), client, checkpoint: 0 })
    }

    /// The sequence that the shadow reflects.
    #[must_use]
    pub const fn checkpoint(&self) -> u64 {
        self.checkpoint
    }

    /// Loads on, up to `upto`. `loaded` hears how many more are written.
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
                    None => break None,
                    Some(Err(problem)) => break Some(problem),
                    Some(Ok(batch)) => {
                        let applied = apply(&mut self.client, ANALYTICS.shadow, &batch).await;
                        let applied =
                            applied.with_context(|| format!("the shadow cannot go on after {}", self.checkpoint))?;
                        self.checkpoint = applied.reached;
                        loaded(applied.events);
                    }
                }
            };
            interruptions = if self.checkpoint > before { 0 } else { interruptions + 1 };
            if let Some(problem) = interrupted
                && (!problem.is_transient() || interruptions > MAX_INTERRUPTIONS)
            {
                return Err(problem).with_context(|| format!("INVENTORY cannot be read on after {before}"));
            }
            if self.checkpoint < upto {
                anyhow::ensure!(interruptions <= MAX_INTERRUPTIONS, "INVENTORY ends before {upto}");
                tokio::time::sleep(INTERRUPTION_PAUSE).await;
            }
        }
        Ok(())
    }

    /// Lets the planner know the new tables, so that the first readers get the plans of the later ones.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn analyze(&self) -> anyhow::Result<()> {
        let tables = ["products", "stock", "product_days", "days"];
        let statement = format!("ANALYZE {}", tables.map(|table| format!("{}.{table}", ANALYTICS.shadow)).join(", "));
        self.client.batch_execute(&statement).await.context("the shadow cannot be analysed")
    }

    /// Makes the shadow live and keeps what was live as the previous one, in one transaction. Appliers wait meanwhile, so
    /// come close first; readers do not wait.
    ///
    /// # Errors
    /// When a server fails or a lock is not to be had; the live schema is then as it was.
    pub async fn swap(mut self) -> anyhow::Result<Swapped> {
        let mut client = schemas::connect(&self.url).await?;
        let swap = Swap::begin(&mut client, &ANALYTICS).await?;
        let last = self.ledger.last_sequence().await?;
        self.load(last, &mut |_| {}).await?;
        swap.commit(&self.client, self.checkpoint).await
    }

    /// Drops the shadow.
    ///
    /// # Errors
    /// When Postgres fails.
    pub async fn discard(self) -> anyhow::Result<()> {
        schemas::drop_schema(&self.client, ANALYTICS.shadow).await
    }
}

/// Makes the previous metrics live again, and what was live the previous ones; see [`schemas::roll_back`].
///
/// # Errors
/// As [`schemas::roll_back`].
pub async fn roll_back<L: Ledger>(ledger: &L, url: &Secret) -> anyhow::Result<Swapped> {
    schemas::roll_back(&ANALYTICS, url, async |seen| reaches(ledger, seen, ANALYTICS.previous).await).await
}

/// Where the live metrics stand.
///
/// # Errors
/// When they cannot be read.
pub async fn live_checkpoint(url: &Secret) -> anyhow::Result<u64> {
    let client = postgres::connect(url).await?;
    Ok(rows::checkpoint(&client, ANALYTICS.live).await?)
}

/// The checkpoint is read before the stream's end, so only a stream that lost messages is found to be behind it.
async fn reaches<L: Ledger>(ledger: &L, seen: u64, schema: &str) -> anyhow::Result<()> {
    ledger.reaches(seen).await.map_err(|problem| problem.with_remedy(schema))?;
    Ok(())
}

/// Reads ahead of the writer, on a task of its own.
fn read_batches<L: Ledger>(ledger: L, after: u64, upto: u64) -> mpsc::Receiver<Result<Vec<StoredMessage>, ReadError>> {
    let (sender, receiver) = mpsc::channel(BATCHES_WAITING);
    tokio::spawn(async move {
        let read = async {
            let mut messages = ledger.read(after).await?;
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some(message) = messages.next().await {
                let message = message?;
                let is_end = message.sequence >= upto;
                bytes += message.bytes();
                batch.push(message);
                if is_end || batch.len() >= LOAD_EVENTS || bytes >= LOAD_BYTES {
                    bytes = 0;
                    if sender.send(Ok(std::mem::take(&mut batch))).await.is_err() || is_end {
                        return Ok(());
                    }
                }
            }
            if !batch.is_empty() {
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
