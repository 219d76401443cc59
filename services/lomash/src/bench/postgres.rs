//! The rivals in Postgres, and the check of their books.
//!
//! Both keep what we keep: an order is decided once for ever (`decided`), all lines or none, stock never negative, and one
//! durable message an order for the outside (`outbox`) in the same transaction. Both get every advantage that leaves these
//! promises whole: statements prepared once, products locked in sorted order so that nothing deadlocks, one statement for
//! all lines, no index but the primary keys, free space in the pages of `products` for in-place updates, statistics and a
//! checkpoint before each run, and orders that are in memory and decoded already: they neither read nor acknowledge a
//! stream. How many connections, how many orders a transaction, and whether statements are pipelined is tried out for each
//! scenario before it is measured; the best is what is measured.
//!
//! - [`Rival::Transactions`], the usual design: a transaction an order.
//! - [`Rival::Sets`], the strongest one we know: one transaction for several hundred orders. Its stock is decided one order
//!   after the other in memory, between locking the products and writing all results set by set.
//!
//! Tables are logged, and the server is as `stack` starts it: `fsync` and `synchronous_commit` are looked at and must be on.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use futures::future::{try_join, try_join3};
use hashbrown::{HashMap, HashSet};
use lomash_platform::Secret;
use tokio::task::JoinSet;
use tokio_postgres::{Client, Statement};
use uuid::Uuid;

use super::books::{Books, Decision};
use super::rivals::watch;
use super::workload::PlainOrder;
use crate::stack::Postgres;
use crate::verify::Show;

/// Rows of the outbox that are checked at once.
const AUDIT_PAGE: i64 = 10_000;

/// Pages of `products` are left half empty: a new version of a row then stays on its page and no index is touched.
const SCHEMA: &str = "
    DROP TABLE IF EXISTS products, decided, outbox;
    CREATE TABLE products (id uuid PRIMARY KEY, quantity bigint NOT NULL CHECK (quantity >= 0)) WITH (fillfactor = 50);
    CREATE TABLE decided (order_id uuid PRIMARY KEY);
    CREATE TABLE outbox (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, payload text NOT NULL)";

/// Who runs in Postgres.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rival {
    /// An order a transaction.
    Transactions,
    /// Several hundred orders a transaction.
    Sets,
}

/// How a rival is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    rival: Rival,
    connections: usize,
    orders_a_transaction: usize,
    pipelined: bool,
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { connections, orders_a_transaction, pipelined, .. } = self;
        let pipelined = if *pipelined { "pipelined" } else { "one statement at a time" };
        write!(f, "{connections} × {orders_a_transaction}, {pipelined}")
    }
}

impl Rival {
    /// What is tried out: connections × orders a transaction.
    pub fn variants(self) -> Vec<Variant> {
        let variant = |connections, orders_a_transaction, pipelined| Variant {
            rival: self,
            connections,
            orders_a_transaction,
            pipelined,
        };
        match self {
            Self::Transactions => [1, 8, 32]
                .into_iter()
                .flat_map(|connections| [false, true].map(|pipelined| variant(connections, 1, pipelined)))
                .collect(),
            // Always pipelined: with two waits a transaction of hundreds of orders there is nothing to lose by it.
            Self::Sets => [(1, 32), (4, 32), (1, 256), (4, 256), (1, 1_024), (2, 1_024)]
                .into_iter()
                .map(|(connections, orders)| variant(connections, orders, true))
                .collect(),
        }
    }
}

/// The rivals' server. It idles while ours runs; ours is not there at all while a rival runs.
pub(super) struct Arena {
    server: Postgres,
    url: Secret,
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub version: String,
    pub fsync: String,
    pub synchronous_commit: String,
    pub wal_sync_method: String,
    pub shared_buffers: String,
    pub max_wal_size: String,
}

impl Arena {
    /// Starts the server and looks whether it keeps what it commits.
    pub async fn start(folder: &Path) -> anyhow::Result<(Self, Facts)> {
        let server = Postgres::start(folder).await?;
        let url = Secret::from(server.url());
        let client = lomash_platform::postgres::connect(&url).await?;
        let mut values = Vec::new();
        for setting in
            ["server_version", "fsync", "synchronous_commit", "wal_sync_method", "shared_buffers", "max_wal_size"]
        {
            let row = client.query_one(&format!("SHOW {setting}"), &[]).await.with_context(|| setting.to_owned())?;
            values.push(row.get::<_, String>(0));
        }
        let [version, fsync, synchronous_commit, wal_sync_method, shared_buffers, max_wal_size] =
            <[String; 6]>::try_from(values).map_err(|_| anyhow!("Postgres did not show its settings"))?;
        ensure!(
            fsync == "on" && synchronous_commit == "on",
            "Postgres runs with fsync {fsync} and synchronous_commit {synchronous_commit}; figures of a server that may \
             forget are of no use, so let both be on"
        );
        Ok((
            Self { server, url },
            Facts { version, fsync, synchronous_commit, wal_sync_method, shared_buffers, max_wal_size },
        ))
    }

    /// Ends the server in order.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.server.stop().await
    }

    /// Sets the tables up, runs the orders, and checks the books: orders allocated and refused, or what is wrong.
    pub async fn race(
        &self,
        stock: &HashMap<Uuid, i64>,
        orders: Arc<Vec<PlainOrder>>,
        variant: Variant,
        what: &str,
        show: Show,
    ) -> anyhow::Result<(Duration, Result<(u64, u64), String>)> {
        let admin = lomash_platform::postgres::connect(&self.url).await?;
        admin.batch_execute(SCHEMA).await.context("the rival's tables could not be made")?;
        let (ids, quantities): (Vec<Uuid>, Vec<i64>) = stock.iter().unzip();
        admin
            .execute("INSERT INTO products SELECT * FROM unnest($1::uuid[], $2::bigint[])", &[&ids, &quantities])
            .await
            .context("the rival's products could not be stored")?;
        admin.batch_execute("VACUUM ANALYZE products").await.context("statistics could not be made")?;
        admin.batch_execute("CHECKPOINT").await.context("a checkpoint could not be made")?;

        let mut workers = Vec::with_capacity(variant.connections);
        for _ in 0..variant.connections {
            workers.push(Worker::connect(&self.url, variant).await?);
        }
        let next = Arc::new(AtomicUsize::new(0));
        let started = Instant::now();
        let mut running = JoinSet::new();
        for worker in workers {
            running.spawn(worker.run(orders.clone(), next.clone()));
        }
        let taken = watch(running, started, &next, orders.len(), show.progress(what, orders.len() as u64)).await?;
        Ok((taken, audit(&admin, stock, &orders).await?))
    }
}

/// One connection with its prepared statements.
struct Worker {
    client: Client,
    variant: Variant,
    claim: Statement,
    lock: Statement,
    update: Statement,
    publish: Statement,
}

impl Worker {
    async fn connect(url: &Secret, variant: Variant) -> anyhow::Result<Self> {
        let client = lomash_platform::postgres::connect(url).await?;
        let lock = "SELECT id, quantity FROM products WHERE id = ANY($1) ORDER BY id FOR UPDATE";
        let (claim, update, publish) = match variant.rival {
            Rival::Transactions => (
                "INSERT INTO decided VALUES ($1) ON CONFLICT DO NOTHING",
                "UPDATE products SET quantity = products.quantity - line.quantity \
                 FROM unnest($1::uuid[], $2::bigint[]) AS line (id, quantity) WHERE products.id = line.id",
                "INSERT INTO outbox (payload) VALUES ($1)",
            ),
            Rival::Sets => (
                "INSERT INTO decided SELECT unnest($1::uuid[]) ON CONFLICT DO NOTHING RETURNING order_id",
                "UPDATE products SET quantity = new.quantity \
                 FROM unnest($1::uuid[], $2::bigint[]) AS new (id, quantity) WHERE products.id = new.id",
                "INSERT INTO outbox (payload) SELECT unnest($1::text[])",
            ),
        };
        Ok(Self {
            claim: client.prepare(claim).await?,
            lock: client.prepare(lock).await?,
            update: client.prepare(update).await?,
            publish: client.prepare(publish).await?,
            client,
            variant,
        })
    }

    async fn run(self, orders: Arc<Vec<PlainOrder>>, next: Arc<AtomicUsize>) -> anyhow::Result<()> {
        let size = self.variant.orders_a_transaction;
        loop {
            let from = next.fetch_add(size, Ordering::Relaxed);
            let Some(mine) = orders.get(from..orders.len().min(from + size)).filter(|mine| !mine.is_empty()) else {
                return Ok(());
            };
            match self.variant.rival {
                Rival::Transactions => {
                    for order in mine {
                        self.one(order).await?;
                    }
                }
                Rival::Sets => self.set(mine).await?,
            }
        }
    }

    /// One order, one transaction. Pipelined, it waits twice: for what it locked and for the commit.
    async fn one(&self, order: &PlainOrder) -> anyhow::Result<()> {
        let client = &self.client;
        // Joined futures are polled in their order, and a statement is on its way with the first poll.
        let (claimed, locked) = if self.variant.pipelined {
            let (_, claimed, locked) = try_join3(
                client.batch_execute("BEGIN"),
                client.execute(&self.claim, &[&order.id]),
                client.query(&self.lock, &[&order.products]),
            )
            .await?;
            (claimed, locked)
        } else {
            client.batch_execute("BEGIN").await?;
            let claimed = client.execute(&self.claim, &[&order.id]).await?;
            // A repeat needs no locks.
            let locked = if claimed == 0 { Vec::new() } else { client.query(&self.lock, &[&order.products]).await? };
            (claimed, locked)
        };
        if claimed == 0 {
            client.batch_execute("ROLLBACK").await?;
            return Ok(());
        }
        let mut stock: HashMap<Uuid, i64> = locked.iter().map(|row| (row.get(0), row.get(1))).collect();
        let decision = Decision::of(order, &mut stock);
        let payload = decision.to_json()?;
        let update = async {
            if decision.allocated {
                client.execute(&self.update, &[&order.products, &order.quantities]).await?;
            }
            Ok(())
        };
        let publish = async { client.execute(&self.publish, &[&payload]).await };
        if self.variant.pipelined {
            try_join3(update, publish, client.batch_execute("COMMIT")).await?;
        } else {
            update.await?;
            publish.await?;
            client.batch_execute("COMMIT").await?;
        }
        Ok(())
    }

    /// Several hundred orders, one transaction.
    async fn set(&self, orders: &[PlainOrder]) -> anyhow::Result<()> {
        let client = &self.client;
        let mut ids: Vec<Uuid> = orders.iter().map(|order| order.id).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut products: Vec<Uuid> = orders.iter().flat_map(|order| order.products.iter().copied()).collect();
        products.sort_unstable();
        products.dedup();
        let (_, (claimed, locked)) = try_join(
            client.batch_execute("BEGIN"),
            try_join(client.query(&self.claim, &[&ids]), client.query(&self.lock, &[&products])),
        )
        .await?;
        let mut open: HashSet<Uuid> = claimed.iter().map(|row| row.get(0)).collect();
        let mut stock: HashMap<Uuid, i64> = locked.iter().map(|row| (row.get(0), row.get(1))).collect();
        let mut touched: HashSet<Uuid> = HashSet::new();
        let mut payloads = Vec::with_capacity(orders.len());
        for order in orders {
            // Decided by an earlier transaction, or earlier in this one.
            if !open.remove(&order.id) {
                continue;
            }
            let decision = Decision::of(order, &mut stock);
            if decision.allocated {
                touched.extend(order.products.iter().copied());
            }
            payloads.push(decision.to_json()?);
        }
        let (changed, quantities): (Vec<Uuid>, Vec<i64>) =
            touched.iter().filter_map(|product| Some((*product, *stock.get(product)?))).unzip();
        try_join3(
            client.execute(&self.update, &[&changed, &quantities]),
            client.execute(&self.publish, &[&payloads]),
            client.batch_execute("COMMIT"),
        )
        .await?;
        Ok(())
    }
}

/// Reads the outbox in its order and lets the books judge it.
///
/// A row gets its number while its products are locked, so the numbers order the decisions about each product.
async fn audit(
    client: &Client,
    initial: &HashMap<Uuid, i64>,
    orders: &[PlainOrder],
) -> anyhow::Result<Result<(u64, u64), String>> {
    let mut books = Books::new(initial, orders);
    let page = client.prepare("SELECT id, payload FROM outbox WHERE id > $1 ORDER BY id LIMIT $2").await?;
    let mut last = 0_i64;
    loop {
        let rows = client.query(&page, &[&last, &AUDIT_PAGE]).await.context("the rival's outbox cannot be read")?;
        let Some(end) = rows.last() else { break };
        last = end.get(0);
        for row in &rows {
            let found: Decision = serde_json::from_str(row.get(1)).context("the rival's outbox holds no decision")?;
            if let Err(problem) = books.judge(&found) {
                return Ok(Err(problem));
            }
        }
    }
    let decided: i64 = client.query_one("SELECT count(*) FROM decided", &[]).await?.get(0);
    let rows = client.query("SELECT id, quantity FROM products", &[]).await.context("the stock cannot be read")?;
    let held = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    Ok(books.close(decided.unsigned_abs(), &held))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is wrong with a rival's books, it is noticed.
    #[tokio::test(flavor = "multi_thread")]
    async fn wrong_books_are_noticed() {
        let folder = crate::stack::scratch().expect("a folder");
        let (arena, _) = Arena::start(folder.path()).await.expect("Postgres starts; `./just setup` installs it");
        let products: Vec<Uuid> = (0..5).map(Uuid::from_u128).collect();
        let stock: HashMap<Uuid, i64> = products.iter().map(|product| (*product, 100)).collect();
        let order = |id| PlainOrder { id: Uuid::from_u128(id), products: products.clone(), quantities: vec![1; 5] };
        let orders = Arc::new((0..20).map(order).collect::<Vec<_>>());
        let client = lomash_platform::postgres::connect(&arena.url).await.expect("connected");
        let variant = Rival::Sets.variants()[0];
        for (corruption, complaint) in [
            ("UPDATE products SET quantity = 99 WHERE quantity = (SELECT min(quantity) FROM products)", "the stock"),
            ("DELETE FROM outbox WHERE id = 20", "were not decided"),
            ("DELETE FROM outbox WHERE id = 7", "decided wrongly"),
            ("INSERT INTO outbox (payload) SELECT payload FROM outbox WHERE id = 7", "decided twice"),
            ("UPDATE outbox SET payload = replace(payload, 'true', 'false') WHERE id = 3", "decided wrongly"),
            ("DELETE FROM decided WHERE order_id = (SELECT order_id FROM decided LIMIT 1)", "noted as decided"),
        ] {
            let race = arena.race(&stock, orders.clone(), variant, "", Show::Nothing).await.expect("it runs");
            assert_eq!(race.1, Ok((20, 0)));
            client.batch_execute(corruption).await.expect("corrupted");
            let problem = audit(&client, &stock, &orders).await.expect("it is read").expect_err(corruption);
            assert!(problem.contains(complaint), "{corruption}: {problem}");
        }
        drop(client);
        arena.stop().await.expect("Postgres stops");
    }
}
