//! The tables of a projection at one moment, row by row in the order of their keys, compared with a fold or with another
//! projection.
//!
//! Owns reading rows; what they must be is told by `audit.rs`. No table is held in memory: rows come through portals, a
//! few hundred at a time.

use std::borrow::Cow;

use anyhow::Context as _;
use lomash_platform::postgres::{SCHEMAS_LOCK, Schema};
use product_service::projection::PROJECTION;
use time::OffsetDateTime;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, IsolationLevel, Portal, Row as PostgresRow, Transaction};
use uuid::Uuid;

use crate::audit::{
    Audit, CountRow, DecisionRow, MovementRow, ProductRow, Projected, Projection, Row, TableComparison, TableReport,
    canonical_items, micros,
};

/// Rows that one trip to Postgres brings.
const ROWS_A_TRIP: i32 = 512;

/// A table of the snapshot and what the fold says about it.
struct Table<R: Row> {
    portal: Portal,
    read: fn(&PostgresRow) -> R,
    comparison: TableComparison<R>,
}

/// The projection at one moment.
///
/// Portals and not one query after the other: two tables are read side by side, in the order of the stream.
pub(crate) struct Snapshot<'c> {
    transaction: Transaction<'c>,
    /// The sequence that the rows reflect.
    pub(crate) checkpoint: u64,
    /// Messages up to there that were not ours.
    pub(crate) skipped: u64,
    products: Table<ProductRow>,
    movements: Table<MovementRow>,
    counts: Table<CountRow>,
    decisions: Table<DecisionRow>,
    /// The first failure of Postgres; after it nothing is compared.
    failure: Option<tokio_postgres::Error>,
}

impl<'c> Snapshot<'c> {
    /// Opens the tables of `schema`, all of one and the same, whatever is renamed meanwhile.
    pub(crate) async fn open(client: &'c mut Client, schema: Schema) -> anyhow::Result<Self> {
        let cannot = "the names of the schemas cannot be held";
        client.execute("SELECT pg_advisory_lock_shared($1)", &[&SCHEMAS_LOCK]).await.context(cannot)?;
        // Open portals do not mind a renaming; the lock is given back before anything is read. Should that not be
        // reached, it goes with the connection.
        let snapshot = Self::open_tables(client, schema).await?;
        let unlock = "SELECT pg_advisory_unlock_shared($1)";
        snapshot.transaction.execute(unlock, &[&SCHEMAS_LOCK]).await.context(cannot)?;
        Ok(snapshot)
    }

    async fn open_tables(client: &'c mut Client, schema: Schema) -> anyhow::Result<Self> {
        let transaction = client
            .build_transaction()
            .isolation_level(IsolationLevel::RepeatableRead)
            .read_only(true)
            .start()
            .await
            .context("Postgres does not begin a transaction")?;
        let query = format!("SELECT sequence, skipped FROM {schema}.checkpoint WHERE projection = $1");
        let row = transaction
            .query_opt(&query, &[&PROJECTION])
            .await
            .context("the checkpoint of the projection cannot be read; start the product service to build it")?
            .context("the projection has no checkpoint; start the product service to build it")?;
        let cannot = "the projection's tables cannot be read; start the product service to build them";
        // A product of which one half is missing is read with values that no product has, so that it is named.
        let products = format!(
            "SELECT product_id, COALESCE(sku, ''), COALESCE(name, ''), category, low_stock_threshold,
                    COALESCE(active, false), COALESCE(quantity, -1), COALESCE(is_available, false),
                    COALESCE(sequence, 0), COALESCE(registered_sequence, 0), COALESCE(registered_at, 'epoch'),
                    COALESCE(updated_at, 'epoch')
             FROM {schema}.products FULL JOIN {schema}.stock USING (product_id) ORDER BY product_id"
        );
        let movements = format!(
            "SELECT sequence, product_id, previous_quantity, new_quantity, trigger, order_id, updated_by, reason,
                    event_id, occurred_at, stored_at
             FROM {schema}.movements ORDER BY sequence"
        );
        let counts = format!(
            "SELECT sequence, product_id, quantity, counted_at, counted_by, event_id, stored_at
             FROM {schema}.counts ORDER BY sequence"
        );
        let decisions = format!(
            "SELECT sequence, order_id, outcome, reason, items, decided_at
             FROM {schema}.order_decisions ORDER BY sequence, order_id"
        );
        Ok(Self {
            checkpoint: unsigned(row.get(0)),
            skipped: unsigned(row.get(1)),
            products: Table::open(&transaction, &products, product_row).await.context(cannot)?,
            movements: Table::open(&transaction, &movements, movement_row).await.context(cannot)?,
            counts: Table::open(&transaction, &counts, count_row).await.context(cannot)?,
            decisions: Table::open(&transaction, &decisions, decision_row).await.context(cannot)?,
            transaction,
            failure: None,
        })
    }

    /// Compares what one message adds.
    pub(crate) async fn compare(&mut self, projected: Projected) {
        if self.failure.is_some() {
            return;
        }
        let Projected { movement, count, decision } = projected;
        let compared = async {
            if let Some(row) = movement {
                self.movements.compare(&self.transaction, row).await?;
            }
            if let Some(row) = count {
                self.counts.compare(&self.transaction, row).await?;
            }
            if let Some(row) = decision {
                self.decisions.compare(&self.transaction, row).await?;
            }
            Ok(())
        };
        self.failure = compared.await.err();
    }

    /// Compares the products as the fold has them at the checkpoint and ends the tables.
    pub(crate) async fn finish(mut self, audit: &Audit) -> Projection {
        let compared = async {
            if let Some(failure) = self.failure.take() {
                return Err(failure);
            }
            for row in audit.product_rows() {
                self.products.compare(&self.transaction, row).await?;
            }
            self.products.drain(&self.transaction).await?;
            self.movements.drain(&self.transaction).await?;
            self.counts.drain(&self.transaction).await?;
            self.decisions.drain(&self.transaction).await
        };
        if let Err(problem) = compared.await {
            let detail = problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string);
            return Projection::Unreadable(format!("the projection could not be read to its end: {detail}"));
        }
        Projection::Compared {
            checkpoint: self.checkpoint,
            skipped: self.skipped,
            skipped_by_fold: audit.skipped(),
            tables: vec![
                self.products.comparison.report(),
                self.movements.comparison.report(),
                self.counts.comparison.report(),
                self.decisions.comparison.report(),
            ],
        }
    }
}

impl Snapshot<'_> {
    /// Compares with a snapshot of another schema at the same sequence, which stands for the fold here; `compared` hears of
    /// each row.
    pub(crate) async fn compare_with(
        mut self,
        fold: &Snapshot<'_>,
        compared: &mut impl FnMut(),
    ) -> Result<Vec<TableReport>, tokio_postgres::Error> {
        let (transaction, other) = (&self.transaction, &fold.transaction);
        self.products.compare_all(transaction, &fold.products, other, compared).await?;
        self.movements.compare_all(transaction, &fold.movements, other, compared).await?;
        self.counts.compare_all(transaction, &fold.counts, other, compared).await?;
        self.decisions.compare_all(transaction, &fold.decisions, other, compared).await?;
        Ok(vec![
            self.products.comparison.report(),
            self.movements.comparison.report(),
            self.counts.comparison.report(),
            self.decisions.comparison.report(),
        ])
    }
}

impl<R: Row> Table<R> {
    async fn open(
        transaction: &Transaction<'_>,
        query: &str,
        read: fn(&PostgresRow) -> R,
    ) -> Result<Self, tokio_postgres::Error> {
        let none: &[&(dyn ToSql + Sync)] = &[];
        let portal = transaction.bind(query, none).await?;
        Ok(Self { portal, read, comparison: TableComparison::default() })
    }

    async fn compare(&mut self, transaction: &Transaction<'_>, row: R) -> Result<(), tokio_postgres::Error> {
        let mut row = row;
        while let Some(back) = self.comparison.push_fold(row) {
            row = back;
            self.fetch(transaction).await?;
        }
        Ok(())
    }

    async fn drain(&mut self, transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
        loop {
            self.comparison.drain_projection();
            if self.comparison.is_projection_ended() {
                return Ok(());
            }
            self.fetch(transaction).await?;
        }
    }

    async fn compare_all(
        &mut self,
        transaction: &Transaction<'_>,
        fold: &Self,
        fold_transaction: &Transaction<'_>,
        compared: &mut impl FnMut(),
    ) -> Result<(), tokio_postgres::Error> {
        loop {
            let rows = fold.rows(fold_transaction).await?;
            if rows.is_empty() {
                return self.drain(transaction).await;
            }
            for row in rows {
                self.compare(transaction, row).await?;
                compared();
            }
        }
    }

    async fn fetch(&mut self, transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
        let rows = self.rows(transaction).await?;
        if rows.is_empty() {
            self.comparison.end_projection();
        }
        self.comparison.push_projection(rows);
        Ok(())
    }

    async fn rows(&self, transaction: &Transaction<'_>) -> Result<Vec<R>, tokio_postgres::Error> {
        let rows = transaction.query_portal(&self.portal, ROWS_A_TRIP).await?;
        Ok(rows.iter().map(self.read).collect())
    }
}

pub(crate) fn unsigned(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

fn instant(row: &PostgresRow, column: usize) -> i64 {
    micros(row.get::<_, OffsetDateTime>(column))
}

fn product_row(row: &PostgresRow) -> ProductRow {
    ProductRow {
        product_id: row.get(0),
        sku: row.get(1),
        name: row.get(2),
        category: row.get(3),
        low_stock_threshold: row.get::<_, Option<i32>>(4).map(i64::from),
        active: row.get(5),
        quantity: i64::from(row.get::<_, i32>(6)),
        is_available: row.get(7),
        sequence: unsigned(row.get(8)),
        registered_sequence: unsigned(row.get(9)),
        registered_at: instant(row, 10),
        updated_at: instant(row, 11),
    }
}

fn movement_row(row: &PostgresRow) -> MovementRow {
    MovementRow {
        sequence: unsigned(row.get(0)),
        product_id: row.get(1),
        previous_quantity: i64::from(row.get::<_, i32>(2)),
        new_quantity: i64::from(row.get::<_, i32>(3)),
        trigger: Cow::Owned(row.get(4)),
        order_id: row.get::<_, Option<Uuid>>(5),
        updated_by: row.get::<_, Option<Uuid>>(6),
        reason: row.get(7),
        event_id: row.get(8),
        occurred_at: instant(row, 9),
        stored_at: instant(row, 10),
    }
}

fn count_row(row: &PostgresRow) -> CountRow {
    CountRow {
        sequence: unsigned(row.get(0)),
        product_id: row.get(1),
        quantity: row.get(2),
        counted_at: instant(row, 3),
        counted_by: row.get(4),
        event_id: row.get(5),
        stored_at: instant(row, 6),
    }
}

fn decision_row(row: &PostgresRow) -> DecisionRow {
    DecisionRow {
        sequence: unsigned(row.get(0)),
        order_id: row.get(1),
        outcome: Cow::Owned(row.get(2)),
        reason: row.get::<_, Option<String>>(3).map(Cow::Owned),
        items: row.get::<_, Option<serde_json::Value>>(4).map(canonical_items),
        decided_at: instant(row, 5),
    }
}
