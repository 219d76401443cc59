//! All rivals behind one door: their servers, their variants, and the exam that each variant must pass.
//!
//! A rival has a figure only when its books are in order ([`super::books`]) after each run. Those of a made-up workload
//! leave plenty of stock, so what would happen when everybody wants what is nearly sold out is found out in the exam.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use hashbrown::HashMap;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::report::Contestant;
use super::workload::{PlainOrder, Workload};
use super::{postgres, redis};
use crate::output::Progress;
use crate::verify::Show;

/// How long one run may take.
const RUN_TIMEOUT: Duration = Duration::from_secs(900);

/// How often progress is looked at.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Orders and stock of the exam: one unit each of too little.
const EXAM_ORDERS: usize = 300;
const EXAM_STOCK: i64 = 100;

/// How a rival is run.
#[derive(Clone, Copy, Debug)]
pub(super) enum Variant {
    Postgres(postgres::Variant),
    Redis(redis::Variant),
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Postgres(variant) => variant.fmt(f),
            Self::Redis(variant) => variant.fmt(f),
        }
    }
}

/// What is tried out for a contestant; nothing for those that are no rivals.
pub(super) fn variants(contestant: Contestant) -> Vec<Variant> {
    let of_postgres = |rival: postgres::Rival| rival.variants().into_iter().map(Variant::Postgres).collect();
    match contestant {
        Contestant::Rival1 => of_postgres(postgres::Rival::Transactions),
        Contestant::Rival2 => of_postgres(postgres::Rival::Sets),
        Contestant::Rival3 => redis::VARIANTS.map(Variant::Redis).to_vec(),
        Contestant::Ours | Contestant::Limit | Contestant::Bare => Vec::new(),
    }
}

/// What the rivals' servers say of themselves.
pub(super) struct Facts {
    pub postgres: postgres::Facts,
    pub redis: redis::Facts,
}

/// The rivals' servers. They idle while ours runs; ours is not there at all while a rival runs.
pub(super) struct Arena {
    postgres: postgres::Arena,
    redis: redis::Arena,
}

impl Arena {
    /// Starts the servers and looks whether they keep what they commit.
    pub async fn start(folder: &Path) -> anyhow::Result<(Self, Facts)> {
        let (postgres_dir, redis_dir) = (folder.join("postgres"), folder.join("redis"));
        let ((postgres, of_postgres), (redis, of_redis)) =
            tokio::try_join!(postgres::Arena::start(&postgres_dir), redis::Arena::start(&redis_dir))?;
        Ok((Self { postgres, redis }, Facts { postgres: of_postgres, redis: of_redis }))
    }

    /// Ends the servers in order.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.postgres.stop().await?;
        self.redis.stop().await
    }

    /// Runs the first `limit` orders of the workload once; how long it took, or what is wrong with the rival's books.
    pub async fn run(
        &self,
        workload: &Workload,
        variant: Variant,
        limit: usize,
        what: &str,
        show: Show,
    ) -> anyhow::Result<Result<Duration, String>> {
        let products = workload.products.iter().map(|product| (product.id.0, i64::from(product.stock))).collect();
        let mut orders = workload.as_rivals_see_it();
        orders.truncate(limit);
        let all = orders.len() == workload.orders.len();
        let (taken, books) = self.race(&products, Arc::new(orders), variant, what, show).await?;
        let due = (workload.allocated, workload.refused);
        Ok(match books {
            Err(problem) => Err(problem),
            Ok(books) if all && books != due => Err(format!(
                "{} orders were allocated and {} refused where {} and {} were due",
                books.0, books.1, due.0, due.1
            )),
            Ok(_) => Ok(taken),
        })
    }

    /// Whether the variant refuses short stock and repeats when everybody wants the same: what is left decides then.
    pub async fn exam(&self, variant: Variant) -> anyhow::Result<Result<(), String>> {
        let product = Uuid::from_u128(1);
        let plenty = Uuid::from_u128(2);
        // Every third order comes twice; every other one has a second line, which must not be taken when the first fails.
        let orders: Vec<PlainOrder> = (0..EXAM_ORDERS)
            .flat_map(|index| {
                let products = if index % 2 == 0 { vec![product] } else { vec![product, plenty] };
                let quantities = vec![1; products.len()];
                let order = PlainOrder { id: Uuid::from_u128(1_000 + index as u128), products, quantities };
                std::iter::repeat_n(order, if index % 3 == 0 { 2 } else { 1 })
            })
            .collect();
        let stock = HashMap::from([(product, EXAM_STOCK), (plenty, EXAM_ORDERS as i64)]);
        let (_, books) = self.race(&stock, Arc::new(orders), variant, "exam", Show::Nothing).await?;
        let due = (EXAM_STOCK as u64, EXAM_ORDERS as u64 - EXAM_STOCK as u64);
        Ok(match books {
            Err(problem) => Err(problem),
            Ok(books) if books != due => Err(format!("{books:?} orders were allocated and refused, not {due:?}")),
            Ok(_) => Ok(()),
        })
    }

    async fn race(
        &self,
        stock: &HashMap<Uuid, i64>,
        orders: Arc<Vec<PlainOrder>>,
        variant: Variant,
        what: &str,
        show: Show,
    ) -> anyhow::Result<(Duration, Result<(u64, u64), String>)> {
        match variant {
            Variant::Postgres(variant) => self.postgres.race(stock, orders, variant, what, show).await,
            Variant::Redis(variant) => self.redis.race(stock, orders, variant, what, show).await,
        }
    }
}

/// Waits for a rival's workers, which take their `orders` by `next`; how long they took since `started`.
pub(super) async fn watch(
    mut running: JoinSet<anyhow::Result<()>>,
    started: Instant,
    next: &AtomicUsize,
    orders: usize,
    mut progress: Progress,
) -> anyhow::Result<Duration> {
    let all_done = async {
        while let Some(ended) = running.join_next().await {
            ended.context("a rival's worker panicked")?.context("a rival's transaction failed")?;
        }
        anyhow::Ok(started.elapsed())
    };
    let watched = async {
        loop {
            tokio::time::sleep(PROGRESS_EVERY).await;
            let taken = next.load(Ordering::Relaxed).min(orders) as u64;
            progress.inc(taken.saturating_sub(progress.done()));
        }
    };
    let taken = tokio::select! {
        taken = tokio::time::timeout(RUN_TIMEOUT, all_done) => taken.map_err(|_| {
            anyhow!("a rival took longer than {} s; take fewer with --orders-count", RUN_TIMEOUT.as_secs())
        })??,
        () = watched => unreachable!("watching never ends"),
    };
    progress.finish();
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn every_variant_passes_the_exam() {
        let folder = crate::stack::scratch().expect("a folder");
        let (arena, _) = Arena::start(folder.path()).await.expect("the servers start; `./just setup` installs them");
        for variant in Contestant::ALL.into_iter().flat_map(variants) {
            assert_eq!(arena.exam(variant).await.expect("it runs"), Ok(()), "{variant}");
        }
        arena.stop().await.expect("the servers stop");
    }
}
