//! What the projection says about the products that figures name: who they are, what stock they have, what stock they had
//! when they were counted.
//!
//! Everything of one plan is read in one snapshot, so that the stock of today and of the counts fit together.

use std::time::Duration;

use deadpool_postgres::{Object, Pool, Transaction};
use hashbrown::{HashMap, HashSet};
use lomash_contract::id::EventRole;
use lomash_contract::text;
use lomash_contract::{CountedBy, EventId, ProductId, Sku, Timestamp};
use time::OffsetDateTime;
use tokio::time::Instant;
use tokio_postgres::IsolationLevel;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;
use uuid::Uuid;

use super::run::correction_events;
use super::{Catalogue, Figure, KnownProduct, MAX_FIGURES, RecordedCount, Source, Unreadable};
use crate::inventory::Count;
use crate::projection::PROJECTION;

/// How long a run waits for the projection to get to where the ledger ended when it began.
pub const PROJECTION_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks at the checkpoint.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Keys that one statement asks for.
const KEYS_AT_ONCE: usize = 5_000;

/// Why the projection could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum BooksError {
    /// Postgres is away or refused.
    #[error("the projection cannot be read just now: {0}")]
    Unavailable(String),
    /// It is not there yet.
    #[error("the projection is at sequence {reached} and not yet at {wanted} after {} s", PROJECTION_PATIENCE.as_secs())]
    Behind {
        /// Where it must be.
        wanted: u64,
        /// Where it is.
        reached: u64,
    },
}

impl From<tokio_postgres::Error> for BooksError {
    fn from(problem: tokio_postgres::Error) -> Self {
        Self::Unavailable(problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string))
    }
}

/// A connection to the projection.
pub struct Books {
    connection: Object,
}

/// One snapshot of it.
pub struct Snapshot<'b> {
    transaction: Transaction<'b>,
    /// The sequence that the projection stands at in it.
    pub sequence: u64,
}

impl Books {
    /// A connection of `pool`.
    ///
    /// # Errors
    /// [`BooksError::Unavailable`].
    pub async fn open(pool: &Pool) -> Result<Self, BooksError> {
        let connection = pool.get().await.map_err(|problem| BooksError::Unavailable(problem.to_string()))?;
        Ok(Self { connection })
    }

    /// A snapshot that shows the ledger up to `wanted` at least.
    ///
    /// # Errors
    /// [`BooksError`].
    pub async fn snapshot(&mut self, wanted: u64) -> Result<Snapshot<'_>, BooksError> {
        let deadline = Instant::now() + PROJECTION_PATIENCE;
        let sql = "SELECT sequence FROM inventory.checkpoint WHERE projection = $1";
        loop {
            let reached = match self.connection.query_opt(sql, &[&PROJECTION]).await {
                Ok(row) => Some(row.map_or(0, |row| row.get::<_, i64>(0).unsigned_abs())),
                // The projector has not made its schema yet: a run may be due the moment a replica starts.
                Err(problem) if problem.code() == Some(&SqlState::UNDEFINED_TABLE) => None,
                Err(problem) => return Err(problem.into()),
            };
            if reached.is_some_and(|reached| reached >= wanted) {
                break;
            }
            if Instant::now() >= deadline {
                return Err(BooksError::Behind { wanted, reached: reached.unwrap_or_default() });
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
        let building =
            self.connection.build_transaction().isolation_level(IsolationLevel::RepeatableRead).read_only(true);
        let transaction = building.start().await?;
        let sequence = transaction.query_one(sql, &[&PROJECTION]).await?.get::<_, i64>(0).unsigned_abs();
        // The projection may have been swapped for one that stands lower.
        if sequence < wanted {
            return Err(BooksError::Behind { wanted, reached: sequence });
        }
        Ok(Snapshot { transaction, sequence })
    }
}

impl Snapshot<'_> {
    /// The products that these figures name, by id and by sku.
    ///
    /// # Errors
    /// [`BooksError`].
    pub async fn catalogue(&self, figures: &[Result<Figure, Unreadable>]) -> Result<Catalogue, BooksError> {
        let size = self.transaction.query_one("SELECT count(*) FROM inventory.products", &[]).await?;
        let ids: HashSet<Uuid> =
            figures.iter().flatten().filter_map(|figure| figure.product_id).map(|id| id.0).collect();
        let skus = figures.iter().flatten().filter_map(|figure| figure.sku.as_ref());
        // In each form in which it may have been registered before there was one.
        let skus: HashSet<String> = skus.flat_map(|sku| text::forms(sku.as_str())).collect();
        let (ids, skus): (Vec<_>, Vec<_>) = (ids.into_iter().collect(), skus.into_iter().collect());
        let mut known = Vec::with_capacity(ids.len() + skus.len());
        for ids in ids.chunks(KEYS_AT_ONCE) {
            self.known("p.product_id = ANY($1)", &ids, &mut known).await?;
        }
        for skus in skus.chunks(KEYS_AT_ONCE) {
            self.known("p.sku = ANY($1)", &skus, &mut known).await?;
        }
        Ok(Catalogue::new(size.get::<_, i64>(0).unsigned_abs(), known))
    }

    async fn known(
        &self,
        condition: &str,
        keys: &(dyn ToSql + Sync),
        known: &mut Vec<KnownProduct>,
    ) -> Result<(), BooksError> {
        let sql = format!(
            "SELECT p.product_id, p.sku, s.quantity, p.registered_at, c.quantity, c.counted_at, EXISTS (
                 SELECT FROM inventory.movements AS m
                 WHERE m.product_id = p.product_id AND m.trigger <> 'ORDER_CONFIRMED' AND m.trigger = 'SCHEDULED_SYNC'
                   AND m.stored_at >= c.stored_at AND m.sequence > c.sequence)
             FROM inventory.products AS p
             JOIN inventory.stock AS s ON s.product_id = p.product_id
             LEFT JOIN LATERAL (
                 SELECT quantity, counted_at, stored_at, sequence FROM inventory.counts
                 WHERE product_id = p.product_id ORDER BY counted_at DESC, sequence LIMIT 1) AS c ON true
             WHERE {condition}"
        );
        for row in self.transaction.query(&sql, &[keys]).await? {
            // What the projection holds came through the ledger, where a sku is one.
            let Ok(sku) = row.get::<_, &str>(1).parse::<Sku>() else { continue };
            let counted_at: Option<OffsetDateTime> = row.get(5);
            known.push(KnownProduct {
                product_id: ProductId(row.get(0)),
                sku,
                quantity: row.get::<_, i32>(2).unsigned_abs(),
                registered_at: Timestamp::new(row.get(3)),
                newest_count: counted_at.map(|counted_at| RecordedCount {
                    quantity: u32::try_from(row.get::<_, Option<i64>>(4).unwrap_or(0)).unwrap_or(u32::MAX),
                    counted_at: Timestamp::new(counted_at),
                    corrected: row.get(6),
                }),
            });
        }
        Ok(())
    }

    /// The stock of each product at its count, with the corrections stored since: they came of older counts.
    ///
    /// # Errors
    /// [`BooksError`].
    pub async fn stock_at_counts(
        &self,
        counts: &[(ProductId, Timestamp)],
    ) -> Result<HashMap<ProductId, i64>, BooksError> {
        let mut stocks = HashMap::with_capacity(counts.len());
        for counts in counts.chunks(KEYS_AT_ONCE) {
            let (products, instants): (Vec<Uuid>, Vec<OffsetDateTime>) =
                counts.iter().map(|(product, at)| (product.0, at.get())).unzip();
            let sql = "SELECT w.product_id, COALESCE((
                     SELECT new_quantity FROM inventory.movements
                     WHERE product_id = w.product_id AND stored_at <= w.counted_at
                     ORDER BY stored_at DESC, sequence DESC LIMIT 1), 0)::bigint
                 + COALESCE((
                     SELECT sum(new_quantity::bigint - previous_quantity) FROM inventory.movements
                     WHERE product_id = w.product_id AND stored_at > w.counted_at
                       AND trigger <> 'ORDER_CONFIRMED' AND trigger = 'SCHEDULED_SYNC'), 0)::bigint
                 FROM unnest($1::uuid[], $2::timestamptz[]) AS w (product_id, counted_at)";
            for row in self.transaction.query(sql, &[&products, &instants]).await? {
                stocks.insert(ProductId(row.get(0)), row.get(1));
            }
        }
        Ok(stocks)
    }

    /// Confirmed counts after sequence `after`, as figures. Counts that a run put on record itself are none.
    ///
    /// # Errors
    /// [`BooksError`].
    pub async fn counts_since(&self, after: u64) -> Result<Vec<Result<Figure, Unreadable>>, BooksError> {
        // One more than there may be, so that too many are noticed.
        let most = i64::try_from(MAX_FIGURES + 1).unwrap_or(i64::MAX);
        let after = i64::try_from(after).unwrap_or(i64::MAX);
        let sql = "SELECT sequence, product_id, quantity, counted_at, counted_by, event_id FROM inventory.counts
             WHERE sequence > $1 ORDER BY sequence LIMIT $2";
        let rows = self.transaction.query(sql, &[&after, &most]).await?;
        let counts = rows.iter().filter_map(|row| {
            let product_id = ProductId(row.get(1));
            let by: Option<Uuid> = row.get(4);
            let position = row.get::<_, i64>(0).unsigned_abs();
            let Ok(quantity) = u32::try_from(row.get::<_, i64>(2)) else {
                let problem = "more was counted than a stock can be".to_owned();
                return Some(Err(Unreadable { source: Source::Counts, position, sku: None, problem }));
            };
            let count = Count {
                quantity,
                counted_at: Timestamp::new(row.get(3)),
                counted_by: by.map_or(CountedBy::Warehouse, CountedBy::User),
            };
            let of_a_run = correction_events(product_id, &count, EventRole::Count);
            (!of_a_run.contains(&EventId(row.get(5)))).then_some(Ok(Figure {
                source: Source::Counts,
                position,
                sku: None,
                product_id: Some(product_id),
                quantity,
                counted_at: count.counted_at,
                counted_by: count.counted_by,
            }))
        });
        Ok(counts.collect())
    }

    /// The changes of stock that these corrections made: previous and new quantity by product. What is not there yet or
    /// never was is left out.
    ///
    /// # Errors
    /// [`BooksError`].
    pub async fn corrections(
        &self,
        corrections: &[(ProductId, EventId)],
    ) -> Result<HashMap<ProductId, (u32, u32)>, BooksError> {
        let mut found = HashMap::with_capacity(corrections.len());
        for corrections in corrections.chunks(KEYS_AT_ONCE) {
            let (products, events): (Vec<Uuid>, Vec<Uuid>) =
                corrections.iter().map(|(product, event)| (product.0, event.0)).unzip();
            let sql = "SELECT m.product_id, m.previous_quantity, m.new_quantity
                 FROM unnest($1::uuid[], $2::uuid[]) AS w (product_id, event_id)
                 JOIN inventory.movements AS m ON m.product_id = w.product_id AND m.event_id = w.event_id
                  AND m.trigger <> 'ORDER_CONFIRMED'";
            for row in self.transaction.query(sql, &[&products, &events]).await? {
                let (previous, new) = (row.get::<_, i32>(1).unsigned_abs(), row.get::<_, i32>(2).unsigned_abs());
                found.insert(ProductId(row.get(0)), (previous, new));
            }
        }
        Ok(found)
    }
}
