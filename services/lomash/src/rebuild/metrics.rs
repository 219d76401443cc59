//! The stock metrics as they are rebuilt: loading is the analytics service's, comparing is here.
//!
//! Rows are compared as the text that Postgres makes of them, so that a column that is added is compared without a word
//! here. Both snapshots are read side by side in the order of their keys; no table is held in memory.

use analytics_service::rebuild::Rebuild;
use anyhow::{Context as _, anyhow};
use futures::{Stream, StreamExt, TryStreamExt};
use lomash_ledger::{JetStreamLedger, Ledger};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, ANALYTICS};
use lomash_platform::schemas::Swapped;
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, IsolationLevel, Transaction};

use super::{Comparison, Shadow};
use crate::audit::{MAX_NAMED, TableReport, Violation};
use crate::verify::Show;

/// The tables, what their rows are told apart and ordered by, and what is compared.
const TABLES: [(&str, &str, &str); 5] = [
    ("products", "product_id", "to_jsonb(t)"),
    ("stock", "product_id", "to_jsonb(t)"),
    ("product_days", "(product_id, day)", "to_jsonb(t)"),
    ("days", "day", "to_jsonb(t)"),
    // But for when it was written.
    ("checkpoint", "projection", "to_jsonb(t) - 'updated_at'"),
];

/// Stock metrics that are being built.
pub(super) struct AnalyticsShadow<L>(Rebuild<L>);

impl AnalyticsShadow<JetStreamLedger> {
    pub(super) async fn begin(ledger: JetStreamLedger, url: &Secret) -> anyhow::Result<Self> {
        Rebuild::begin(ledger, url).await.map(Self)
    }
}

impl<L: Ledger> Shadow for AnalyticsShadow<L> {
    fn checkpoint(&self) -> u64 {
        self.0.checkpoint()
    }

    async fn load(&mut self, upto: u64, loaded: &mut impl FnMut(u64)) -> anyhow::Result<()> {
        self.0.load(upto, loaded).await
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        self.0.analyze().await
    }

    async fn settle(&mut self) -> anyhow::Result<()> {
        Ok(())
    }

    async fn compare(&mut self, url: &Secret, show: Show) -> anyhow::Result<anyhow::Result<Comparison>> {
        let mut live_client = postgres::connect(url).await?;
        let live = match Snapshot::open(&mut live_client, ANALYTICS.live).await {
            Ok(live) => live,
            Err(problem) => return Ok(Err(problem)),
        };
        let sequence = live.checkpoint;
        self.0.load(sequence, &mut |_| {}).await?;
        let reached = self.0.checkpoint();
        if reached != sequence {
            return Ok(Err(anyhow!(
                "its checkpoint went back to {sequence} meanwhile; was its schema dropped or restored?"
            )));
        }
        let mut shadow_client = postgres::connect(url).await?;
        let built = Snapshot::open(&mut shadow_client, ANALYTICS.shadow).await.context("the shadow cannot be read")?;
        anyhow::ensure!(
            built.checkpoint == sequence,
            "the shadow stands at {} and not at {sequence}: something else writes to it",
            built.checkpoint
        );
        let mut progress = show.progress("comparing tables", TABLES.len() as u64);
        let mut tables = Vec::with_capacity(TABLES.len());
        for (table, key, row) in TABLES {
            let (live, built) = (live.rows(table, key, row).await, built.rows(table, key, row).await?);
            match compare(table, live, built).await {
                Ok(report) => tables.push(report),
                Err(problem) => return Ok(Err(problem.context(format!("{table} could not be read to its end")))),
            }
            progress.inc(1);
        }
        progress.finish();
        Ok(Ok(Comparison::Compared { sequence, skipped: [live.skipped, built.skipped], tables }))
    }

    async fn swap(self) -> anyhow::Result<Swapped> {
        self.0.swap().await
    }

    async fn discard(self) -> anyhow::Result<()> {
        self.0.discard().await
    }
}

/// The metrics of a schema at one moment.
struct Snapshot<'c> {
    transaction: Transaction<'c>,
    schema: &'static str,
    checkpoint: u64,
    skipped: u64,
}

impl<'c> Snapshot<'c> {
    async fn open(client: &'c mut Client, schema: &'static str) -> anyhow::Result<Self> {
        // Its name leads to the same schema all the while: only a rebuild renames schemas, and this is the only one.
        let transaction = client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await
            .context("Postgres does not begin a transaction")?;
        let query = format!("SELECT sequence, skipped FROM {schema}.checkpoint WHERE projection = $1");
        let row = transaction
            .query_opt(&query, &[&ANALYTICS.projection])
            .await
            .context("the checkpoint of the metrics cannot be read; start the analytics service to build them")?
            .context("the metrics have no checkpoint; start the analytics service to build them")?;
        let unsigned = |column| row.get::<_, i64>(column).unsigned_abs();
        Ok(Self { schema, checkpoint: unsigned(0), skipped: unsigned(1), transaction })
    }

    /// The rows of a table, as key and text, in the order of their keys.
    async fn rows(&self, table: &str, key: &str, row: &str) -> anyhow::Result<impl Rows> {
        let query =
            format!("SELECT {key}::text COLLATE \"C\", ({row})::text FROM {}.{table} t ORDER BY 1", self.schema);
        let none: [&str; 0] = [];
        let rows = self.transaction.query_raw(&query, none).await?;
        Ok(rows.map_ok(|row| (row.get(0), row.get(1))).map_err(anyhow::Error::from))
    }
}

/// Rows as key and text.
trait Rows: Stream<Item = anyhow::Result<(String, String)>> {}

impl<S: Stream<Item = anyhow::Result<(String, String)>>> Rows for S {}

async fn compare(
    table: &'static str,
    live: anyhow::Result<impl Rows>,
    built: impl Rows,
) -> anyhow::Result<TableReport> {
    let (mut live, mut built) = (std::pin::pin!(live?), std::pin::pin!(built));
    let (mut live_side, mut built_side) = (Side::default(), Side::default());
    let mut first: Vec<Violation> = Vec::new();
    let mut differences = 0;
    let mut differ = |problem: String| {
        differences += 1;
        if first.len() < MAX_NAMED {
            first.push(Violation { source: table, sequence: None, problem });
        }
    };
    let (mut ours, mut theirs) = (built_side.next(&mut built).await?, live_side.next(&mut live).await?);
    loop {
        match (&ours, &theirs) {
            (None, None) => break,
            (Some((key, built_row)), Some((live_key, live_row))) if key == live_key => {
                if built_row != live_row {
                    differ(format!("{key} is {live_row}, the stream says {built_row}"));
                }
                ours = built_side.next(&mut built).await?;
                theirs = live_side.next(&mut live).await?;
            }
            (Some((key, row)), Some((live_key, _))) if key < live_key => {
                differ(format!("the metrics lack {key}: {row}"));
                ours = built_side.next(&mut built).await?;
            }
            (Some((key, row)), None) => {
                differ(format!("the metrics lack {key}: {row}"));
                ours = built_side.next(&mut built).await?;
            }
            (_, Some((key, row))) => {
                differ(format!("the metrics have {key}, which the stream does not tell: {row}"));
                theirs = live_side.next(&mut live).await?;
            }
        }
    }
    Ok(TableReport {
        table,
        fold_rows: built_side.rows,
        projection_rows: live_side.rows,
        fold_sha256: built_side.digest(),
        projection_sha256: live_side.digest(),
        differences,
        first,
    })
}

/// What was read of one of the two.
#[derive(Default)]
struct Side {
    rows: u64,
    digest: Sha256,
}

impl Side {
    async fn next(&mut self, rows: &mut (impl Rows + Unpin)) -> anyhow::Result<Option<(String, String)>> {
        let Some(row) = rows.next().await else { return Ok(None) };
        let (key, text) = row?;
        self.rows += 1;
        self.digest.update(key.as_bytes());
        self.digest.update(text.as_bytes());
        self.digest.update(b"\n");
        Ok(Some((key, text)))
    }

    fn digest(self) -> String {
        self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
