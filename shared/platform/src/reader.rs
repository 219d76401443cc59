//! Asking a projection: one statement an answer, bounded in time, and asked again when only the connection was at fault.
//!
//! Every statement selects the projection's checkpoint first, so its rows and the sequence that they are true at come from
//! one snapshot; a rebuild that swaps the schemas meanwhile can make rows newer than they say, never older.

use std::future::Future;
use std::time::Duration;

use deadpool_postgres::{Object, Pool};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{FromSql, ToSql, Type};
use tokio_postgres::{Error, Row};
use tracing::debug;

use crate::{Secret, postgres};

/// Longest that Postgres may work on one read; then it gives up.
pub const STATEMENT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest that a read may take in all, with the wait for a connection and the second try.
pub const READ_TIMEOUT: Duration = Duration::from_secs(3);

const _: () = assert!(STATEMENT_TIMEOUT.as_millis() < READ_TIMEOUT.as_millis(), "Postgres gives up before we do");

/// Tries of one read: what a schema that is replaced or a connection that breaks just then can spoil is spoilt once.
const TRIES: u32 = 2;

/// Postgres is down, too slow, or has no projection just now.
#[derive(Debug, thiserror::Error)]
#[error("{what} cannot be read just now: {cause}")]
pub struct Unreadable {
    /// What was to be read.
    pub what: &'static str,
    /// Why not, for the log.
    pub cause: String,
}

/// One statement, with its values and their types.
#[derive(Debug)]
pub struct Query<'q> {
    /// What it reads, for errors.
    pub what: &'static str,
    /// The statement; it selects the checkpoint first.
    pub text: &'q str,
    /// Its values.
    pub values: &'q [(&'q (dyn ToSql + Sync), Type)],
    /// Whether it is planned once a connection, and not anew for its values.
    pub prepared: bool,
}

/// Connections for reads. Clones share them.
#[derive(Clone)]
pub struct Reader {
    pool: Pool,
}

impl Reader {
    /// Connections of its own, so that readers and the projector do not take each other's. Does not need the server to be
    /// there.
    ///
    /// # Errors
    /// When `url` is not a Postgres URL.
    pub fn new(url: &Secret) -> anyhow::Result<Self> {
        Ok(Self { pool: postgres::pool_for_reads(url, STATEMENT_TIMEOUT)? })
    }

    /// The checkpoint, which every statement selects first, and the rows that have something behind it.
    ///
    /// # Errors
    /// [`Unreadable`].
    pub async fn ask(&self, query: Query<'_>) -> Result<(u64, Vec<Row>), Unreadable> {
        let deadline = Instant::now() + READ_TIMEOUT;
        let mut rows = self.rows(&query, deadline).await?;
        let Some(sequence) = rows.first().map(|row| row.get::<_, i64>(0).unsigned_abs()) else {
            let cause = "the projection has no checkpoint: it is being made".to_owned();
            return Err(Unreadable { what: query.what, cause });
        };
        // An outer join answers with the checkpoint alone when it finds nothing.
        rows.retain(|row| row.len() < 2 || !is_null(row, 1));
        Ok((sequence, rows))
    }

    async fn rows(&self, query: &Query<'_>, deadline: Instant) -> Result<Vec<Row>, Unreadable> {
        let unavailable = |cause: String| Unreadable { what: query.what, cause };
        let late = || unavailable(format!("Postgres did not answer within {} s", READ_TIMEOUT.as_secs()));
        let mut tries = 0;
        loop {
            tries += 1;
            let connected = bounded(deadline, self.pool.get()).await.ok_or_else(late)?;
            let client = connected.map_err(|problem| unavailable(problem.to_string()))?;
            let Some(answer) = bounded(deadline, query.send(&client)).await else {
                // Whoever got this connection next would wait for the answer that we did not wait for.
                drop(Object::take(client));
                return Err(late());
            };
            let problem = match answer {
                Ok(rows) => return Ok(rows),
                Err(problem) => problem,
            };
            let cause = problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string);
            if tries == TRIES || !is_passing(&problem) {
                return Err(unavailable(cause));
            }
            debug!(what = query.what, cause, "reading again");
            client.statement_cache.clear();
            if problem.as_db_error().is_none() {
                drop(Object::take(client));
            }
        }
    }
}

impl Query<'_> {
    async fn send(&self, client: &deadpool_postgres::Client) -> Result<Vec<Row>, Error> {
        if !self.prepared {
            return client.query_typed(self.text, self.values).await;
        }
        let types: Vec<Type> = self.values.iter().map(|(_, kind)| kind.clone()).collect();
        let statement = client.prepare_typed_cached(self.text, &types).await?;
        let values: Vec<&(dyn ToSql + Sync)> = self.values.iter().map(|(value, _)| *value).collect();
        client.query(&statement, &values).await
    }
}

/// What `work` says, if it says it in time.
async fn bounded<T>(deadline: Instant, work: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout_at(deadline, work).await.ok()
}

/// Whether the same statement on another connection may well succeed: this one broke, or was prepared on tables that were
/// replaced.
fn is_passing(problem: &Error) -> bool {
    const PASSING: [SqlState; 6] = [
        SqlState::FEATURE_NOT_SUPPORTED, // "cached plan must not change result type"
        SqlState::UNDEFINED_TABLE,
        SqlState::UNDEFINED_COLUMN,
        SqlState::INVALID_SCHEMA_NAME,
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
    ];
    problem.code().is_none_or(|code| PASSING.contains(code))
}

/// Leaves `limit` of the entries; returns the last of them if there were more.
pub fn cut<T>(items: &mut Vec<T>, limit: usize) -> Option<&T> {
    if items.len() <= limit {
        return None;
    }
    items.truncate(limit);
    items.last()
}

/// A type that takes any value that is not null, to see whether one is there.
struct Anything;

impl<'a> FromSql<'a> for Anything {
    fn from_sql(_: &Type, _: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self)
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

fn is_null(row: &Row, column: usize) -> bool {
    row.get::<_, Option<Anything>>(column).is_none()
}
