//! Putting a projection that was built beside the live one in its place, and back: the steps that every projection shares.
//!
//! Owns the names of the schemas of a [`Family`] while they are exchanged. What is in them is their services' own. Nothing
//! here touches live rows: until a swap commits, whatever fails leaves only a shadow behind, which the next rebuild drops.
//!
//! The swap fences projectors by a lock on the live checkpoint's *table*, which readers do not notice: a projector takes
//! its own lock on it before anything else, waits, and then finds the checkpoint of the new schema. Renaming a schema locks
//! no table, and the server makes every prepared statement look its tables up again.

use std::time::Duration;

use anyhow::{Context as _, anyhow, bail, ensure};
use tokio::time::Instant;
use tokio_postgres::{Client, Transaction};
use tracing::warn;

use crate::Secret;
use crate::postgres::{self, Family, SCHEMAS_LOCK};

/// How long a swap waits for a lock. Projectors hold theirs for one transaction, readers do not matter.
pub const LOCK_TIMEOUT_SECONDS: u32 = 30;

/// Key of the advisory lock that a rebuild holds from its beginning to its end; one at a time in a database.
const REBUILD_LOCK: i64 = 0x6c6f_6d61_7368_0003;

/// How long the place of a rebuild is waited for, and how often it is asked for: Postgres notices only after a moment that
/// whoever held it is gone.
const PLACE_TIMEOUT: Duration = Duration::from_secs(3);
const PLACE_PAUSE: Duration = Duration::from_millis(100);

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

/// Where `schema` stands; none when it has no checkpoint.
///
/// # Errors
/// When Postgres does not answer.
pub async fn checkpoint(client: &Client, family: &Family, schema: &str) -> anyhow::Result<Option<u64>> {
    let table = format!("{schema}.checkpoint");
    let there = "SELECT to_regclass($1) IS NOT NULL";
    if !client.query_one(there, &[&table]).await.context("Postgres does not answer")?.get::<_, bool>(0) {
        return Ok(None);
    }
    let query = format!("SELECT sequence FROM {table} WHERE projection = $1");
    let row =
        client.query_opt(&query, &[&family.projection]).await.with_context(|| format!("{table} cannot be read"))?;
    Ok(row.map(|row| row.get::<_, i64>(0).unsigned_abs()))
}

/// What to say, and to do, when the stream ends at `last` and `schema` reflects it up to `seen`.
#[must_use]
pub fn went_backwards(last: u64, seen: u64, schema: &str) -> anyhow::Error {
    anyhow!(
        "the stream INVENTORY ends at {last}, but {schema} has read it up to {seen}: the stream went backwards. {}",
        remedy(schema)
    )
}

/// What to say, and to do, when the stream's message at `sequence` is not the one that `schema` has read there.
#[must_use]
pub fn was_replaced(sequence: u64, schema: &str) -> anyhow::Error {
    anyhow!(
        "message {sequence} of the stream INVENTORY was stored after {schema} had read it: the stream was replaced by an \
         older copy that has grown since. {}",
        remedy(schema)
    )
}

fn remedy(schema: &str) -> String {
    let mails = if schema == postgres::NOTIFICATION {
        ". Mails about the time before are then sent again, as far back as MAIL_MAX_AGE_SECONDS says: give it as 0 until the \
         service has caught up if that is not wanted"
    } else {
        ""
    };
    format!(
        "Restore the newer stream; if the older one is the truth from now on, say so by `DROP SCHEMA {schema} CASCADE` and \
         start the service again: it reads the ledger from its beginning{mails}"
    )
}

/// A connection whose statement the server ends soon after we have died, however long it would have taken.
///
/// # Errors
/// When Postgres cannot be reached.
pub async fn connect(url: &Secret) -> anyhow::Result<Client> {
    let client = postgres::connect(url).await?;
    let check = "SET client_connection_check_interval = '1s'";
    client.batch_execute(check).await.context("the connection cannot be set up")?;
    Ok(client)
}

/// A connection that holds the place of the one rebuild.
///
/// # Errors
/// When another one holds it, or Postgres cannot be reached.
pub async fn take_place(url: &Secret) -> anyhow::Result<Client> {
    let client = connect(url).await?;
    let lock = "SELECT pg_try_advisory_lock($1)";
    let deadline = Instant::now() + PLACE_TIMEOUT;
    while !client.query_one(lock, &[&REBUILD_LOCK]).await.context("Postgres does not answer")?.get::<_, bool>(0) {
        ensure!(
            Instant::now() < deadline,
            "another `lomash rebuild` is at work on this database; wait until it has ended (of one that was killed \
             nothing is left after a few seconds)"
        );
        tokio::time::sleep(PLACE_PAUSE).await;
    }
    Ok(client)
}

/// Drops what an interrupted rebuild left, and makes the tables of an empty shadow.
///
/// # Errors
/// When Postgres fails.
pub async fn make_shadow(client: &Client, family: &Family, url: &Secret) -> anyhow::Result<()> {
    for left_over in [family.discarded, family.shadow] {
        drop_schema(client, left_over).await?;
    }
    postgres::migrate_schema(url, family, family.shadow).await
}

/// Drops a schema that nothing needs any more.
///
/// # Errors
/// When something still reads from it, or Postgres fails.
pub async fn drop_schema(client: &Client, schema: &str) -> anyhow::Result<()> {
    let statement = format!(
        "SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'; DROP SCHEMA IF EXISTS {schema} CASCADE; RESET lock_timeout"
    );
    client.batch_execute(&statement).await.with_context(|| {
        format!("{schema}, which nothing needs any more, cannot be dropped; does something still read from it?")
    })
}

/// A swap that is under way: projectors wait, readers do not, and nothing is renamed yet.
pub struct Swap<'c> {
    family: &'static Family,
    transaction: Transaction<'c>,
    /// Where the live schema stands; none when there is none.
    pub live: Option<u64>,
}

impl<'c> Swap<'c> {
    /// Stops the projectors of `family` until the swap ends, one way or the other.
    ///
    /// # Errors
    /// When a lock is not to be had in time, or Postgres fails.
    pub async fn begin(client: &'c mut Client, family: &'static Family) -> anyhow::Result<Self> {
        let transaction = begin_renaming(client).await?;
        let live = fence(&transaction, family).await?;
        Ok(Self { family, transaction, live })
    }

    /// Makes the shadow, which stands at `checkpoint`, live and what was live the previous one. `place` then drops what
    /// was the previous one: outside the swap, for a reader from before may still be at it.
    ///
    /// # Errors
    /// When the shadow is behind what is live, or Postgres fails; the live schema is then as it was.
    pub async fn commit(self, place: &Client, checkpoint: u64) -> anyhow::Result<Swapped> {
        let Self { family, transaction, live: replaced } = self;
        if let Some(live) = replaced
            && checkpoint < live
        {
            bail!("the shadow ends at {checkpoint} and the live projection at {live}: not swapped");
        }
        if exists(&transaction, family.live).await? {
            if exists(&transaction, family.previous).await? {
                rename(&transaction, family.previous, family.discarded).await?;
            }
            rename(&transaction, family.live, family.previous).await?;
        }
        rename(&transaction, family.shadow, family.live).await?;
        let kept = exists(&transaction, family.previous).await?;
        commit_renaming(transaction).await?;
        if let Err(problem) = drop_schema(place, family.discarded).await {
            warn!("{problem:#}; the next rebuild drops it");
        }
        Ok(Swapped { checkpoint, replaced, kept })
    }
}

/// Makes the previous schema live again, and what was live the previous one, in one transaction: doing it twice undoes
/// it. The projector catches up from the older checkpoint by itself. `reaches` refuses a stream that ends before what it is
/// given.
///
/// # Errors
/// When there is no previous schema, another rebuild is at work, the stream ends before it, or a server fails; the live
/// schema is then as it was.
pub async fn roll_back(
    family: &'static Family,
    url: &Secret,
    reaches: impl AsyncFn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<Swapped> {
    let place = take_place(url).await?;
    drop_schema(&place, family.discarded).await?;
    let nothing = "there is no previous projection to go back to: only a rebuild that replaced one leaves it";
    let previous = checkpoint(&place, family, family.previous).await?.context(nothing)?;
    reaches(previous).await?;
    // It may be of an older version than the programs that will read it.
    postgres::migrate_schema(url, family, family.previous).await?;
    let still = checkpoint(&place, family, family.previous).await?.context(nothing)?;
    if still < previous {
        drop_schema(&place, family.previous).await?;
        bail!(
            "the previous projection is of an older version, of which this one cannot make use: it is dropped, and the \
             live one is as it was; `{}` makes it anew",
            family.rebuild_command
        );
    }
    let mut client = connect(url).await?;
    let transaction = begin_renaming(&mut client).await?;
    let replaced = fence(&transaction, family).await?;
    let kept = exists(&transaction, family.live).await?;
    if kept {
        rename(&transaction, family.live, family.discarded).await?;
    }
    rename(&transaction, family.previous, family.live).await?;
    if kept {
        rename(&transaction, family.discarded, family.previous).await?;
    }
    commit_renaming(transaction).await?;
    Ok(Swapped { checkpoint: previous, replaced, kept })
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
async fn fence(transaction: &Transaction<'_>, family: &Family) -> anyhow::Result<Option<u64>> {
    let there = "SELECT to_regclass($1) IS NOT NULL";
    let table = format!("{}.checkpoint", family.live);
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
    let row = transaction
        .query_opt(&query, &[&family.projection])
        .await
        .with_context(|| format!("{table} cannot be read"))?;
    Ok(row.map(|row| row.get::<_, i64>(0).unsigned_abs()))
}

async fn exists(transaction: &Transaction<'_>, schema: &str) -> anyhow::Result<bool> {
    let query = "SELECT to_regnamespace($1) IS NOT NULL";
    Ok(transaction.query_one(query, &[&schema]).await.context("Postgres does not answer")?.get(0))
}

async fn rename(transaction: &Transaction<'_>, from: &str, to: &str) -> anyhow::Result<()> {
    let statement = format!("ALTER SCHEMA {from} RENAME TO {to}");
    transaction.batch_execute(&statement).await.with_context(|| format!("`{statement}` failed; nothing is swapped"))
}

async fn commit_renaming(transaction: Transaction<'_>) -> anyhow::Result<()> {
    transaction.commit().await.map_err(|problem| {
        anyhow!(problem).context("it is not known whether the swap was committed; `lomash status` shows what is live")
    })
}
