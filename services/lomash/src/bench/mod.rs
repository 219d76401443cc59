//! `lomash bench`: this system, the designs one would otherwise have built, and the limit of the server, side by side in
//! one run on one machine.
//!
//! Owns the arguments, and what runs: first the races, in which contestants get the same orders (`races.rs`), then the
//! studies, each of one property (`studies.rs`). Everything runs on servers that are started here, with `fsync` on, in a
//! folder that is removed afterwards.
//!
//! A further kind of orders is a variant of [`Scenario`] and a workload; a further rival a variant of [`Contestant`] with its
//! variants in `rivals.rs`; a further study a variant of [`Scenario`] and a file that makes a [`Study`].
//!
//! Assumes that `./just setup` has run and that the product service's program lies beside this one, in the same profile.

mod batches;
mod bed;
mod books;
mod cost;
mod latency;
mod limit;
mod machine;
mod ours;
mod picture;
mod postgres;
mod projection;
mod races;
mod reads;
mod redis;
mod report;
mod rivals;
mod scenario;
mod start;
mod studies;
mod targets;
mod usage;
mod workload;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use lomash_platform::shutdown;

pub use self::machine::Machine;
pub use self::picture::draw;
pub use self::report::{Contestant, ContestantReport, Report, Row, ScenarioReport, Spread, Study};
pub use self::scenario::Scenario;
pub use self::targets::{TARGETS, Target};
pub use self::workload::{MAX_HISTORY, MAX_ORDERS};

use self::races::Pains;
use self::studies::Effort;
use self::targets::FULL_PRODUCTS;
use self::workload::{Extent, Workload};
use crate::output;
use crate::stack;
use crate::verify::Show;

/// Products of the scenarios that spread their orders.
const PRODUCTS: usize = 10_000;

/// Orders of many lines are so many times fewer.
const MANY_LINES_DIVISOR: usize = 10;

/// How long a rate of arrival is kept up, and how long reads go on.
const LEVEL: Duration = Duration::from_secs(10);

/// `--tiny`: products (many, and others), orders of one line (of many lines a third, as history twice), and a level.
const TINY_MANY_PRODUCTS: usize = 300;
const TINY_PRODUCTS: usize = 100;
const TINY_ORDERS: usize = 300;
const TINY_LEVEL: Duration = Duration::from_millis(400);
/// And variants of a rival: all of them pass the exam in a test of their own.
const TINY_VARIANTS: usize = 2;

/// Most repeats.
const MAX_REPEATS: u32 = 25;

/// Most products, where there are to be many.
const MAX_PRODUCTS: u32 = 5_000_000;

/// Arguments of `lomash bench`.
#[derive(Clone, Debug, Args)]
pub struct BenchArgs {
    /// Orders of the one-line scenarios; those of many lines and those of a file are a tenth.
    #[arg(
        long,
        default_value_t = 50_000,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(i64::from(MIN_ORDERS)..=i64::from(MAX_ORDERS))
    )]
    pub orders_count: u32,
    /// Products where there are to be many: in `million`, `cost` and `start`.
    #[arg(
        long,
        default_value_t = FULL_PRODUCTS as u32,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(i64::from(MIN_ORDERS)..=i64::from(MAX_PRODUCTS))
    )]
    pub products: u32,
    /// Orders decided before, where there are to be many: in `cost` and `start`. Ten million take half an hour and some
    /// 20 GB of disk.
    #[arg(
        long,
        default_value_t = 200_000,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(i64::from(MIN_ORDERS)..=i64::from(MAX_HISTORY))
    )]
    pub history: u32,
    /// How often everything is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_REPEATS)))]
    pub repeat: u32,
    /// Only these scenarios, comma-separated; all of them when not given (`real` only with `--orders`).
    #[arg(long, value_enum, value_delimiter = ',')]
    pub scenario: Vec<Scenario>,
    /// A file of real orders (as `lomash orders replay` reads) for the scenario `real`.
    #[arg(long, value_name = "FILE")]
    pub orders: Option<PathBuf>,
    /// Makes other orders; the same seed makes the same ones.
    #[arg(long, default_value_t = 2026)]
    pub seed: u64,
    /// Folder for the servers' data, on the disk to be measured; made if missing, its contents removed afterwards. The
    /// system's temporary folder when not given.
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Also draw a picture.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// A few hundred orders, once: whether everything works, not how fast.
    #[arg(long, conflicts_with_all = ["orders_count", "products", "history", "repeat"])]
    pub tiny: bool,
}

/// Fewest orders of one line: with fewer there is no tenth.
const MIN_ORDERS: u32 = 1_000;

impl BenchArgs {
    fn extent(&self) -> Extent {
        if self.tiny {
            return Extent {
                products: TINY_PRODUCTS,
                one_line: TINY_ORDERS,
                many_lines: TINY_ORDERS / 3,
                many_products: TINY_MANY_PRODUCTS,
                history: 2 * TINY_ORDERS,
            };
        }
        let one_line = self.orders_count as usize;
        Extent {
            products: PRODUCTS,
            one_line,
            many_lines: one_line / MANY_LINES_DIVISOR,
            many_products: self.products as usize,
            history: self.history as usize,
        }
    }

    fn rounds(&self) -> u32 {
        if self.tiny { 1 } else { self.repeat }
    }

    fn pains(&self) -> Pains {
        Pains { rounds: self.rounds(), variants: if self.tiny { TINY_VARIANTS } else { usize::MAX } }
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let mut chosen = self.scenario.clone();
        if chosen.is_empty() {
            chosen = Scenario::ALL.to_vec();
            chosen.retain(|scenario| *scenario != Scenario::Real || self.orders.is_some());
        }
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }
}

/// Runs the command. It fails when a contestant's books were wrong, after showing the figures of the others.
///
/// # Errors
/// When a server does not start or a run takes too long.
pub async fn run(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let stop = shutdown::token()?;
    let report = tokio::select! {
        // Dropping what is under way ends its servers.
        interrupted = shutdown::interruption(&stop) => bail!("{interrupted}; there is no report, and its servers are stopped"),
        report = bench(&args, Show::Progress) => report?,
    };
    if let Some(path) = &args.svg {
        std::fs::write(path, draw(&report)).with_context(|| format!("could not write {}", path.display()))?;
    }
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(report.render());
    }
    Ok(if report.withheld().next().is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Measures everything that `args` ask for.
///
/// # Errors
/// When a server does not start or a run takes too long. Wrong books are no error but part of the report.
pub async fn bench(args: &BenchArgs, show: Show) -> anyhow::Result<Report> {
    let machine = Machine::here();
    let chosen = args.scenarios();
    let workloads: Vec<Workload> = chosen
        .iter()
        .filter(|scenario| scenario.is_race())
        .map(|scenario| Workload::of(*scenario, args.extent(), args.seed, args.orders.as_deref()))
        .collect::<anyhow::Result<_>>()?;
    let scratch = match &args.data {
        None => stack::scratch().context("no temporary folder could be made")?,
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| format!("could not make {}", folder.display()))?;
            tempfile::Builder::new()
                .prefix("bench-")
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o711))
                .tempdir_in(folder)
                .with_context(|| format!("no folder could be made in {}", folder.display()))?
        }
    };
    ensure!(
        args.tiny || !machine::is_in_memory(scratch.path()),
        "{} is kept in memory, where syncing does nothing and figures mean nothing; name a folder on a disk with --data",
        scratch.path().display()
    );
    let mut versions = BTreeMap::from([("lomash", env!("CARGO_PKG_VERSION").to_owned())]);
    let mut settings = BTreeMap::from([
        ("build", PROFILE.to_owned()),
        ("rounds", args.rounds().to_string()),
        ("seed", args.seed.to_string()),
        ("NATS sync_interval", "always, one node".to_owned()),
        (
            "projection",
            "Postgres projects while ours is timed, not waiting for the disk; no order waits for it".to_owned(),
        ),
    ]);
    let mut scenarios = Vec::new();
    if !workloads.is_empty() {
        let outcome = races::run(workloads, scratch.path(), args.pains(), show).await?;
        let (postgres, redis) = (outcome.facts.postgres, outcome.facts.redis);
        versions.extend([("Postgres", postgres.version), ("Redis", redis.version)]);
        versions.extend(outcome.versions.into_iter().flatten());
        settings.extend([
            ("Postgres fsync", postgres.fsync),
            ("synchronous_commit", postgres.synchronous_commit),
            ("wal_sync_method", postgres.wal_sync_method),
            ("shared_buffers", postgres.shared_buffers),
            ("max_wal_size", postgres.max_wal_size),
            ("Redis appendfsync of rival 3", redis.appendfsync),
        ]);
        scenarios = outcome.reports;
    }
    let effort = Effort {
        extent: args.extent(),
        rounds: args.rounds(),
        level: if args.tiny { TINY_LEVEL } else { LEVEL },
        seed: args.seed,
        show,
    };
    let (studies, versions_of_studies) = studies::run(&chosen, scratch.path(), effort).await?;
    versions.extend(versions_of_studies.into_iter().flatten());
    Ok(Report::new(scenarios, studies, machine, versions, settings))
}

/// The profile of this program, and so of the product service beside it.
const PROFILE: &str = if cfg!(debug_assertions) { "debug: figures of ours are too low" } else { "release" };
