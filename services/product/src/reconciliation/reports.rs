//! The reports of runs in Postgres, schema `reconciliation`.
//!
//! Owns every statement on it. A run's rows are stored with its plan before anything is corrected, so that a run that was
//! interrupted goes on with the very same rows. The schema is made when it is first needed; it is no projection and a
//! rebuild leaves it alone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use deadpool_postgres::{Object, Pool};
use lomash_contract::{ProductId, Timestamp, UpdatedBy};
use lomash_platform::{Secret, postgres};
use serde::Deserialize;
use serde::de::IntoDeserializer;
use serde::de::value::{Error as ValueError, StrDeserializer};
use time::OffsetDateTime;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql};
use uuid::Uuid;

use super::{Figures, Plan, Report, Request, Row, RowResult, StartedBy, Status, Totals};

/// Reports that are kept: those of a month and more at four runs a day, and all that were asked for among them.
pub const KEPT_REPORTS: i64 = 200;

/// Rows that one statement writes.
const ROWS_AT_ONCE: usize = 5_000;

/// Longest problem that is kept, in characters.
const MAX_PROBLEM_CHARS: usize = 1_000;

/// Why reports could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ReportsError {
    /// Postgres is away or refused.
    #[error("the reports of reconciliation runs cannot be reached just now: {0}")]
    Unavailable(String),
    /// What is stored is not what this version writes.
    #[error("a report of reconciliation cannot be read: {0}")]
    Unreadable(String),
}

impl From<tokio_postgres::Error> for ReportsError {
    fn from(problem: tokio_postgres::Error) -> Self {
        Self::Unavailable(problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string))
    }
}

/// Why a waiting run was not approved or rejected.
#[derive(Debug, thiserror::Error)]
pub enum DecideError {
    /// There is no such run.
    #[error("there is no reconciliation run {0}")]
    Unknown(Uuid),
    /// It does not wait.
    #[error("the run is {}, and only one that is awaitingApproval can be approved or rejected", .0.as_str())]
    NotWaiting(Status),
    /// Postgres is away.
    #[error(transparent)]
    Reports(#[from] ReportsError),
}

/// A run that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewRun {
    /// Its id.
    pub id: Uuid,
    /// What starts it.
    pub started_by: StartedBy,
    /// Who asks.
    pub requested_by: UpdatedBy,
    /// What for.
    pub request: Request,
    /// When.
    pub requested_at: Timestamp,
}

/// Where a plan was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basis {
    /// The projection's sequence.
    pub sequence: u64,
    /// Products in the catalogue.
    pub catalogue_products: u64,
    /// Confirmed counts up to this sequence are in the plan; `None` when the run does not take them.
    pub counts_through: Option<u64>,
}

/// The reports. Clones are the same.
#[derive(Clone)]
pub struct Reports {
    pool: Pool,
    url: Secret,
    is_ready: Arc<AtomicBool>,
}

const RUN_COLUMNS: &str = "run_id, status, started_by, requested_by, figures, dry_run, threshold_percent, requested_at, \
     started_at, finished_at, attempts, sequence, catalogue_products, counted, changed, unchanged, refused, units_up, \
     units_down, shortfall, decided_by, decided_at, problem";

const ROW_COLUMNS: &str = "number, source, position, product_id, sku, counted, counted_at, counted_by, stock_at_count, \
     before, correction, after, shortfall, result, refusal";

impl Reports {
    /// Reports in the database of `pool`; `url` leads there too, for the migrations.
    #[must_use]
    pub fn new(pool: Pool, url: Secret) -> Self {
        Self { pool, url, is_ready: Arc::new(AtomicBool::new(false)) }
    }

    /// A connection, once the schema is there.
    async fn client(&self) -> Result<Object, ReportsError> {
        if !self.is_ready.load(Ordering::Relaxed) {
            let made = postgres::migrate_reconciliation(&self.url).await;
            made.map_err(|problem| ReportsError::Unavailable(format!("{problem:#}")))?;
            self.is_ready.store(true, Ordering::Relaxed);
        }
        self.pool.get().await.map_err(|problem| ReportsError::Unavailable(problem.to_string()))
    }

    /// A schema that somebody dropped is made again the next time.
    fn noticed(&self, problem: tokio_postgres::Error) -> ReportsError {
        if matches!(problem.code(), Some(code) if *code == SqlState::UNDEFINED_TABLE) {
            self.is_ready.store(false, Ordering::Relaxed);
        }
        problem.into()
    }

    async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<tokio_postgres::Row>, ReportsError> {
        let client = self.client().await?;
        client.query(sql, parameters).await.map_err(|problem| self.noticed(problem))
    }

    /// Puts a run on record, unless it is; whether it is new.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn insert(&self, run: &NewRun) -> Result<bool, ReportsError> {
        let threshold = i32::try_from(run.request.approval_threshold_percent).unwrap_or(100);
        let inserted = self
            .query(
                "INSERT INTO reconciliation.runs
                     (run_id, status, started_by, requested_by, figures, dry_run, threshold_percent, requested_at)
                 VALUES ($1, 'queued', $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING RETURNING run_id",
                &[
                    &run.id,
                    &run.started_by.as_str(),
                    &user(run.requested_by),
                    &run.request.figures.as_str(),
                    &run.request.dry_run,
                    &threshold,
                    &run.requested_at.get(),
                ],
            )
            .await?;
        Ok(!inserted.is_empty())
    }

    /// Takes a run off the record that no replica has begun; whether there was one.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn forget(&self, id: Uuid) -> Result<bool, ReportsError> {
        let sql = "DELETE FROM reconciliation.runs WHERE run_id = $1 AND status = 'queued' RETURNING run_id";
        Ok(!self.query(sql, &[&id]).await?.is_empty())
    }

    /// The report of a run.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn get(&self, id: Uuid) -> Result<Option<Report>, ReportsError> {
        let sql = format!("SELECT {RUN_COLUMNS} FROM reconciliation.runs WHERE run_id = $1");
        self.query(&sql, &[&id]).await?.first().map(report).transpose()
    }

    /// Reports from the newest on, those older than `before` (when it was asked for, and its id).
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn list(&self, before: Option<(Timestamp, Uuid)>, limit: u32) -> Result<Vec<Report>, ReportsError> {
        let limit = i64::from(limit);
        let order = "ORDER BY requested_at DESC, run_id DESC LIMIT";
        let rows = match before {
            None => {
                let sql = format!("SELECT {RUN_COLUMNS} FROM reconciliation.runs {order} $1");
                self.query(&sql, &[&limit]).await?
            }
            Some((at, id)) => {
                let older = "WHERE (requested_at, run_id) < ($2, $3)";
                let sql = format!("SELECT {RUN_COLUMNS} FROM reconciliation.runs {older} {order} $1");
                self.query(&sql, &[&limit, &at.get(), &id]).await?
            }
        };
        rows.iter().map(report).collect()
    }

    /// Rows of a report, those with numbers above `after`.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn rows(&self, id: Uuid, after: u32, limit: u32) -> Result<Vec<Row>, ReportsError> {
        let sql = format!(
            "SELECT {ROW_COLUMNS} FROM reconciliation.run_rows WHERE run_id = $1 AND number > $2 ORDER BY number LIMIT $3"
        );
        let after = i32::try_from(after).unwrap_or(i32::MAX);
        self.query(&sql, &[&id, &after, &i64::from(limit)]).await?.iter().map(row).collect()
    }

    /// Rows of a run that are still to be applied.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn planned(&self, id: Uuid) -> Result<Vec<Row>, ReportsError> {
        let sql = format!(
            "SELECT {ROW_COLUMNS} FROM reconciliation.run_rows WHERE run_id = $1 AND result = 'planned' ORDER BY number"
        );
        self.query(&sql, &[&id]).await?.iter().map(row).collect()
    }

    /// A replica takes a run up. `None` when there is no such run.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn begin(&self, id: Uuid) -> Result<Option<Report>, ReportsError> {
        let sql = format!(
            "UPDATE reconciliation.runs SET
                 attempts = attempts + CASE WHEN status IN ('queued', 'planning', 'applying') THEN 1 ELSE 0 END,
                 started_at = COALESCE(started_at, now()),
                 status = CASE status WHEN 'queued' THEN 'planning' ELSE status END
             WHERE run_id = $1 RETURNING {RUN_COLUMNS}"
        );
        self.query(&sql, &[&id]).await?.first().map(report).transpose()
    }

    /// Whether another run that wrote began after `stored_at`: a tick of before then has nothing left to do.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn has_run_since(&self, stored_at: OffsetDateTime, tick: Uuid) -> Result<bool, ReportsError> {
        let rows = self
            .query(
                "SELECT FROM reconciliation.runs
                 WHERE started_at > $1 AND run_id <> $2 AND NOT dry_run AND started_by = 'schedule' AND status <> 'failed'
                   AND NOT EXISTS (SELECT FROM reconciliation.runs WHERE run_id = $2) LIMIT 1",
                &[&stored_at, &tick],
            )
            .await?;
        Ok(!rows.is_empty())
    }

    /// Up to which sequence confirmed counts are dealt with.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn counts_through(&self) -> Result<u64, ReportsError> {
        let rows = self
            .query(
                "SELECT COALESCE(max(counts_through), 0) FROM reconciliation.runs WHERE status IN ('completed', 'rejected')",
                &[],
            )
            .await?;
        Ok(rows.first().map_or(0, |row| row.get::<_, i64>(0).unsigned_abs()))
    }

    /// Stores a plan with its rows, and where the run stands then. A plan that is not a dry run takes the place of those
    /// that still wait for approval: it was made of the same counts, or of newer ones.
    ///
    /// # Errors
    /// [`ReportsError`]; then nothing was stored.
    pub async fn store_plan(&self, id: Uuid, plan: &Plan, basis: Basis, status: Status) -> Result<(), ReportsError> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        transaction.execute("DELETE FROM reconciliation.run_rows WHERE run_id = $1", &[&id]).await?;
        for rows in plan.rows.chunks(ROWS_AT_ONCE) {
            transaction
                .execute(
                    &format!(
                        "INSERT INTO reconciliation.run_rows (run_id, {ROW_COLUMNS})
                         SELECT $1, number, source, position, \"productId\", sku, counted, \"countedAt\", \"countedBy\",
                                \"stockAtCount\", before, correction, after, shortfall, result, refusal
                         FROM jsonb_to_recordset($2) AS r(number integer, source text, position bigint,
                             \"productId\" uuid, sku text, counted bigint, \"countedAt\" timestamptz, \"countedBy\" text,
                             \"stockAtCount\" bigint, before bigint, correction bigint, after bigint, shortfall bigint,
                             result text, refusal jsonb)"
                    ),
                    &[&id, &Json(rows)],
                )
                .await
                .map_err(|problem| self.noticed(problem))?;
        }
        transaction
            .execute(
                "UPDATE reconciliation.runs SET status = $2, sequence = $3, catalogue_products = $4, counts_through = $5,
                     problem = NULL WHERE run_id = $1",
                &[
                    &id,
                    &status.as_str(),
                    &whole(basis.sequence),
                    &whole(basis.catalogue_products),
                    &basis.counts_through.map(whole),
                ],
            )
            .await?;
        transaction.execute(SUM_UP, &[&id]).await?;
        if status != Status::DryRun {
            transaction
                .execute(
                    "UPDATE reconciliation.runs SET status = 'superseded', finished_at = now()
                     WHERE status = 'awaitingApproval' AND run_id <> $1",
                    &[&id],
                )
                .await?;
        }
        Ok(transaction.commit().await?)
    }

    /// Stores what became of rows.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn record(&self, id: Uuid, rows: &[Row]) -> Result<(), ReportsError> {
        for rows in rows.chunks(ROWS_AT_ONCE) {
            self.query(
                "UPDATE reconciliation.run_rows AS r SET before = u.before, after = u.after, shortfall = u.shortfall,
                     result = u.result, refusal = u.refusal
                 FROM jsonb_to_recordset($2) AS u(number integer, before bigint, after bigint, shortfall bigint, result text,
                     refusal jsonb)
                 WHERE r.run_id = $1 AND r.number = u.number",
                &[&id, &Json(rows)],
            )
            .await?;
        }
        Ok(())
    }

    /// Brings a run to where nothing more happens by itself, and drops the oldest reports. Returns its report, or None when
    /// somebody has decided meanwhile what it was to wait for.
    ///
    /// # Errors
    /// [`ReportsError`].
    pub async fn settle(
        &self,
        id: Uuid,
        status: Status,
        problem: Option<&str>,
    ) -> Result<Option<Report>, ReportsError> {
        let problem: Option<String> = problem.map(|problem| problem.chars().take(MAX_PROBLEM_CHARS).collect());
        let sql = format!(
            "UPDATE reconciliation.runs SET status = $2, problem = $3, finished_at = now()
             WHERE run_id = $1 AND ($2 <> 'awaitingApproval' OR decided_at IS NULL) RETURNING {RUN_COLUMNS}"
        );
        self.query(SUM_UP, &[&id]).await?;
        let settled = self.query(&sql, &[&id, &status.as_str(), &problem]).await?;
        self.query(
            "DELETE FROM reconciliation.runs WHERE status NOT IN ('queued', 'planning', 'applying') AND run_id IN
                 (SELECT run_id FROM reconciliation.runs ORDER BY requested_at DESC, run_id DESC OFFSET $1)",
            &[&KEPT_REPORTS],
        )
        .await?;
        settled.first().map(report).transpose()
    }

    /// Approves or rejects a run that waits. Decided again in the same way, it stays as it is: the message that continues
    /// it may have been lost.
    ///
    /// # Errors
    /// [`DecideError`].
    pub async fn decide(&self, id: Uuid, by: UpdatedBy, is_approved: bool) -> Result<Report, DecideError> {
        let status = if is_approved { Status::Applying } else { Status::Rejected };
        let sql = format!(
            "UPDATE reconciliation.runs SET status = $2, decided_by = $3, decided_at = now(),
                 finished_at = CASE $2 WHEN 'rejected' THEN now() END
             WHERE run_id = $1 AND status = 'awaitingApproval' RETURNING {RUN_COLUMNS}"
        );
        let decided = self.query(&sql, &[&id, &status.as_str(), &user(by)]).await?;
        if let Some(decided) = decided.first() {
            return Ok(report(decided)?);
        }
        match self.get(id).await? {
            None => Err(DecideError::Unknown(id)),
            Some(report) if report.decided_at.is_some() && is_approved == (report.status != Status::Rejected) => {
                Ok(report)
            }
            Some(report) => Err(DecideError::NotWaiting(report.status)),
        }
    }
}

/// Makes a run's sums those of its rows.
const SUM_UP: &str = "UPDATE reconciliation.runs AS run SET
         counted = s.counted, changed = s.changed, unchanged = s.counted - s.changed, refused = s.refused,
         units_up = s.units_up, units_down = s.units_down, shortfall = s.shortfall
     FROM (SELECT count(*) FILTER (WHERE result <> 'refused') AS counted,
                  count(*) FILTER (WHERE result <> 'refused' AND before <> after) AS changed,
                  count(*) FILTER (WHERE result = 'refused') AS refused,
                  COALESCE(sum(greatest(after - before, 0)) FILTER (WHERE result <> 'refused'), 0) AS units_up,
                  COALESCE(sum(greatest(before - after, 0)) FILTER (WHERE result <> 'refused'), 0) AS units_down,
                  COALESCE(sum(shortfall) FILTER (WHERE result <> 'refused'), 0) AS shortfall
           FROM reconciliation.run_rows WHERE run_id = $1) AS s
     WHERE run.run_id = $1";

fn user(by: UpdatedBy) -> Option<Uuid> {
    match by {
        UpdatedBy::System => None,
        UpdatedBy::User(id) => Some(id),
    }
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

impl Figures {
    const fn as_str(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Warehouse => "warehouse",
            Self::Counts => "counts",
        }
    }
}

impl StartedBy {
    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Schedule => "schedule",
            Self::Request => "request",
        }
    }
}

/// A word of ours as what it stands for.
fn word<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, ReportsError> {
    let deserializer: StrDeserializer<'de, ValueError> = text.into_deserializer();
    T::deserialize(deserializer).map_err(|problem| ReportsError::Unreadable(problem.to_string()))
}

fn natural<T: TryFrom<i64>>(number: i64) -> Result<T, ReportsError> {
    T::try_from(number).map_err(|_| ReportsError::Unreadable(format!("{number} is out of range")))
}

fn report(row: &tokio_postgres::Row) -> Result<Report, ReportsError> {
    let instant = |column: &str| row.get::<_, Option<OffsetDateTime>>(column).map(Timestamp::new);
    let sum = |column: &str| row.get::<_, i64>(column).unsigned_abs();
    let by = |id: Option<Uuid>| id.map_or(UpdatedBy::System, UpdatedBy::User);
    let decided_at = instant("decided_at");
    Ok(Report {
        id: row.get("run_id"),
        status: word(row.get("status"))?,
        started_by: word(row.get("started_by"))?,
        requested_by: by(row.get("requested_by")),
        request: Request {
            figures: word(row.get("figures"))?,
            dry_run: row.get("dry_run"),
            approval_threshold_percent: natural(row.get::<_, i32>("threshold_percent").into())?,
        },
        requested_at: Timestamp::new(row.get("requested_at")),
        started_at: instant("started_at"),
        finished_at: instant("finished_at"),
        attempts: natural(row.get::<_, i32>("attempts").into())?,
        sequence: row.get::<_, Option<i64>>("sequence").map(i64::unsigned_abs),
        catalogue_products: row.get::<_, Option<i64>>("catalogue_products").map(i64::unsigned_abs),
        totals: Totals {
            counted: sum("counted"),
            changed: sum("changed"),
            unchanged: sum("unchanged"),
            refused: sum("refused"),
            units_up: sum("units_up"),
            units_down: sum("units_down"),
            shortfall: sum("shortfall"),
        },
        decided_by: decided_at.map(|_| by(row.get("decided_by"))),
        decided_at,
        problem: row.get("problem"),
    })
}

fn row(row: &tokio_postgres::Row) -> Result<Row, ReportsError> {
    let quantity = |column: &str| row.get::<_, Option<i64>>(column).map(natural::<u32>).transpose();
    let refusal: Option<Json<super::Refusal>> = row.get("refusal");
    Ok(Row {
        number: natural(row.get::<_, i32>("number").into())?,
        source: word(row.get("source"))?,
        position: row.get::<_, i64>("position").unsigned_abs(),
        product_id: row.get::<_, Option<Uuid>>("product_id").map(ProductId),
        sku: row.get("sku"),
        counted: quantity("counted")?,
        counted_at: row.get::<_, Option<OffsetDateTime>>("counted_at").map(Timestamp::new),
        counted_by: row.get::<_, Option<&str>>("counted_by").map(word).transpose()?,
        stock_at_count: quantity("stock_at_count")?,
        before: quantity("before")?,
        correction: row.get("correction"),
        after: quantity("after")?,
        shortfall: natural(row.get::<_, i64>("shortfall"))?,
        result: word::<RowResult>(row.get("result"))?,
        refusal: refusal.map(|Json(refusal)| refusal),
    })
}
