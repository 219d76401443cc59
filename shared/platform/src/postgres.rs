//! Connecting to Postgres, and the migrations of `sql/`.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Status, WeakPool};
use tokio_postgres::NoTls;

use crate::Secret;
use crate::metrics::{Labels, Metrics};

/// Connections of one process.
pub const MAX_CONNECTIONS: usize = 16;
/// How long to wait for a connection to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a free connection of the pool.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(5);

mod analytics {
    refinery::embed_migrations!("../../sql/analytics");
}

mod inventory {
    refinery::embed_migrations!("../../sql/inventory");
}

mod notification {
    refinery::embed_migrations!("../../sql/notification");
}

mod reconciliation {
    refinery::embed_migrations!("../../sql/reconciliation");
}

/// The schema with the alerts of the notification service, and its outbox.
pub const NOTIFICATION: &str = "notification";

/// The schema with the reports of reconciliation runs. They are no projection: a rebuild leaves them alone.
pub const RECONCILIATION: &str = "reconciliation";

fn config(url: &Secret) -> anyhow::Result<tokio_postgres::Config> {
    // The parser's error could repeat the password, so it is not shown.
    let mut config: tokio_postgres::Config = url.expose().parse().map_err(|_| {
        anyhow::anyhow!("DATABASE_URL is not a Postgres URL such as postgres://user:password@host:5432/database")
    })?;
    config.connect_timeout(CONNECT_TIMEOUT);
    Ok(config)
}

/// A pool of lazily made connections; making it does not need the server.
///
/// # Errors
/// When `url` is not a Postgres URL.
pub fn pool(url: &Secret) -> anyhow::Result<Pool> {
    pool_of("main", config(url)?)
}

/// A pool for reads only, whose statements the server ends after `statement_timeout`.
///
/// # Errors
/// When `url` is not a Postgres URL.
pub fn pool_for_reads(url: &Secret, statement_timeout: Duration) -> anyhow::Result<Pool> {
    let mut config = config(url)?;
    // Besides what the URL may set itself.
    let options = config.get_options().unwrap_or_default();
    let options =
        format!("{options} -c statement_timeout={} -c default_transaction_read_only=on", statement_timeout.as_millis());
    config.options(options);
    pool_of("reads", config)
}

fn pool_of(name: &'static str, config: tokio_postgres::Config) -> anyhow::Result<Pool> {
    let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    let pool = Pool::builder(manager)
        .max_size(MAX_CONNECTIONS)
        .runtime(Runtime::Tokio1)
        .create_timeout(Some(CONNECT_TIMEOUT))
        .wait_timeout(Some(WAIT_TIMEOUT))
        .build()
        .context("the Postgres pool cannot be built")?;
    observe(name, &pool);
    Ok(pool)
}

/// The pools of this process by name; several of one name are added up.
static POOLS: LazyLock<Mutex<Vec<(&'static str, WeakPool)>>> = LazyLock::new(|| {
    let metrics = Metrics::of_process();
    let help = "Connections of a Postgres pool, by whether they are in use";
    metrics.gauges("lomash_postgres_pool_connections", help, || {
        pool_use().into_iter().flat_map(|(pool, status)| -> [(Labels<2>, f64); 2] {
            [
                ([("pool", pool), ("state", "idle")], status.available as f64),
                ([("pool", pool), ("state", "in_use")], status.size.saturating_sub(status.available) as f64),
            ]
        })
    });
    let help = "Most connections that a Postgres pool may have";
    metrics.gauges("lomash_postgres_pool_max_connections", help, || {
        pool_use().into_iter().map(|(pool, status)| ([("pool", pool)], status.max_size as f64))
    });
    let help = "Tasks that wait for a connection of a Postgres pool";
    metrics.gauges("lomash_postgres_pool_waiting", help, || {
        pool_use().into_iter().map(|(pool, status)| ([("pool", pool)], status.waiting as f64))
    });
    Mutex::default()
});

fn observe(name: &'static str, pool: &Pool) {
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    pools.retain(|(_, pool)| pool.upgrade().is_some());
    pools.push((name, pool.weak()));
}

fn pool_use() -> BTreeMap<&'static str, Status> {
    let mut by_name: BTreeMap<&'static str, Status> = BTreeMap::new();
    for (name, pool) in POOLS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let Some(status) = pool.upgrade().map(|pool| pool.status()) else { continue };
        by_name
            .entry(name)
            .and_modify(|sum| {
                sum.max_size += status.max_size;
                sum.size += status.size;
                sum.available += status.available;
                sum.waiting += status.waiting;
            })
            .or_insert(status);
    }
    by_name
}

/// A single connection, outside any pool.
///
/// # Errors
/// When `url` is bad or the server cannot be reached within [`CONNECT_TIMEOUT`].
pub async fn connect(url: &Secret) -> anyhow::Result<tokio_postgres::Client> {
    let config = config(url)?;
    // The configuration's own limit ends with the socket; one that is frozen opens that and says nothing.
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, config.connect(NoTls)).await;
    let connected = connected.with_context(|| {
        format!("Postgres at DATABASE_URL does not answer within {} s; is it frozen?", CONNECT_TIMEOUT.as_secs())
    })?;
    let (client, connection) = connected.context("cannot connect to Postgres at DATABASE_URL; is it running?")?;
    // Ends with the client; what breaks it is an error of the client's next call.
    tokio::spawn(connection);
    Ok(client)
}

/// Key of the advisory lock around the schemas themselves. Exclusive for whoever makes or renames one; shared for a reader
/// that opens several tables one after the other and must get all of them from one schema.
pub const SCHEMAS_LOCK: i64 = 0x6c6f_6d61_7368_0001;

/// The schemas of one projection: the same tables under several names, of which one is read. A name is never anything else
/// than one of these, so it can stand in a statement.
#[derive(Debug)]
pub struct Family {
    /// Its name in the table `checkpoint`, and for operators.
    pub projection: &'static str,
    /// What is read, and what a service projects into.
    pub live: &'static str,
    /// What a rebuild fills beside it.
    pub shadow: &'static str,
    /// What was live before the last rebuild, kept to go back to.
    pub previous: &'static str,
    /// What was previous before that: to be dropped as soon as nobody reads it any more.
    pub discarded: &'static str,
    /// What makes it anew.
    pub rebuild_command: &'static str,
    migrations: fn() -> refinery::Runner,
}

/// The read model of the product service, `sql/inventory/`.
pub static INVENTORY: Family = Family {
    projection: "inventory",
    live: "inventory",
    shadow: "inventory_rebuild",
    previous: "inventory_previous",
    discarded: "inventory_discarded",
    rebuild_command: "lomash rebuild",
    migrations: inventory::migrations::runner,
};

/// The stock metrics of the analytics service, `sql/analytics/`.
pub static ANALYTICS: Family = Family {
    projection: "analytics",
    live: "analytics",
    shadow: "analytics_rebuild",
    previous: "analytics_previous",
    discarded: "analytics_discarded",
    rebuild_command: "lomash rebuild analytics",
    migrations: analytics::migrations::runner,
};

/// One of the schemas of [`INVENTORY`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schema {
    /// See [`Family::live`].
    Live,
    /// See [`Family::shadow`].
    Shadow,
    /// See [`Family::previous`].
    Previous,
    /// See [`Family::discarded`].
    Discarded,
}

impl Schema {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => INVENTORY.live,
            Self::Shadow => INVENTORY.shadow,
            Self::Previous => INVENTORY.previous,
            Self::Discarded => INVENTORY.discarded,
        }
    }
}

impl std::fmt::Display for Schema {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Brings the live schema to the newest version. Several processes may do so at once.
///
/// # Errors
/// When the server cannot be reached or a migration fails.
pub async fn migrate(url: &Secret) -> anyhow::Result<()> {
    migrate_into(url, Schema::Live).await
}

/// The same for any of the schemas; one that is not there is made.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_into(url: &Secret, schema: Schema) -> anyhow::Result<()> {
    migrate_schema(url, &INVENTORY, schema.name()).await
}

/// Brings one of the schemas of `family` to the newest version, and makes it if it is not there. Several processes may do
/// so at once.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_schema(url: &Secret, family: &Family, schema: &'static str) -> anyhow::Result<()> {
    let remedy = format!("`{}` makes the projection anew from the stream", family.rebuild_command);
    migrate_with(url, schema, (family.migrations)(), &remedy).await
}

/// Brings the schema of the reconciliation reports to the newest version, and makes it if it is not there. Several
/// processes may do so at once.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_reconciliation(url: &Secret) -> anyhow::Result<()> {
    let remedy = "dropping the schema loses the reports and nothing else";
    migrate_with(url, RECONCILIATION, reconciliation::migrations::runner(), remedy).await
}

/// Brings the schema of the notification service to the newest version, and makes it if it is not there. Several processes
/// may do so at once.
///
/// # Errors
/// As [`migrate`].
pub async fn migrate_notification(url: &Secret) -> anyhow::Result<()> {
    let remedy = "without the schema the service reads the ledger again, and mails what is younger than a day again";
    migrate_with(url, NOTIFICATION, notification::migrations::runner(), remedy).await
}

async fn migrate_with(
    url: &Secret,
    schema: &'static str,
    runner: refinery::Runner,
    remedy: &str,
) -> anyhow::Result<()> {
    let mut client = connect(url).await?;
    client.execute("SELECT pg_advisory_lock($1)", &[&SCHEMAS_LOCK]).await.context("cannot lock the schema")?;
    // The files of sql/ name no schema: the path decides. The history lives in the schema it is about: whoever drops the
    // schema drops it too, and the next start makes both anew. The lock goes with the connection.
    client
        .batch_execute(&format!("CREATE SCHEMA IF NOT EXISTS {schema}; SET search_path TO {schema}"))
        .await
        .with_context(|| format!("cannot create the schema {schema}"))?;
    // All of them or none: a reader must not meet the tables of a version in between.
    let mut runner = runner.set_grouped(true);
    runner.set_migration_table_name(format!("{schema}.schema_history"));
    runner.run_async(&mut client).await.with_context(|| format!("a migration of sql/ failed in {schema}; {remedy}"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn who_is_reached_and_says_nothing_is_not_waited_for_for_ever() {
        let frozen = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = frozen.local_addr().expect("an address");
        let url = Secret::from(format!("postgres://somebody@{address}/something"));
        let connected = tokio::time::timeout(3 * CONNECT_TIMEOUT, connect(&url)).await.expect("it gives up");
        let problem = connected.expect_err("nobody answers").to_string();
        assert!(problem.contains("does not answer within 5 s"), "{problem}");
    }
}
