//! `lomash bench`: this system, the designs one would otherwise have built, and the limit of the server, side by side in
//! one run on one machine.
//!
//! Owns the plan: what runs, in which order, how often. Everything runs on servers that are started here, with `fsync` on,
//! in a folder that is removed afterwards. Contestants are interleaved and change places from round to round, so that a
//! machine that slows down slows all of them. Nothing of another run is at work while one is timed.
//!
//! A further scenario is a variant of [`Scenario`]; a further contestant one of [`Contestant`] with an arm in
//! `Plan::contest`. Measurements of another kind (projection, latency, reads, cost) get a section of their own in
//! [`Report`] and add to its `ratios`.
//!
//! Assumes that `./just setup` has run and that the product service's program lies beside this one, in the same profile.

mod limit;
mod machine;
mod ours;
mod picture;
mod postgres;
mod report;
mod workload;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use clap::Args;

pub use self::machine::Machine;
pub use self::picture::draw;
pub use self::report::{Contestant, ContestantReport, Report, ScenarioReport, Spread, target};
pub use self::workload::{MAX_ORDERS, Scenario};

use self::postgres::{Arena, Rival, Variant};
use self::report::Record;
use self::workload::{Extent, Workload};
use crate::output;
use crate::stack;
use crate::verify::Show;

/// Products of the scenarios that spread their orders.
const PRODUCTS: usize = 10_000;

/// Orders of many lines are so many times fewer.
const MANY_LINES_DIVISOR: usize = 10;

/// `--tiny`: products and orders of one line; of many lines a third.
const TINY_PRODUCTS: usize = 100;
const TINY_ORDERS: usize = 300;

/// A rival's variants are tried out with this part of the orders.
const TRIAL_DIVISOR: usize = 5;

/// Most repeats.
const MAX_REPEATS: u32 = 25;

/// Places that change from round to round: ours with its limit, and two rivals.
const STARTERS: [Starter; 3] = [Starter::Ours, Starter::Rival(Rival::Transactions), Starter::Rival(Rival::Sets)];

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
    #[arg(long, conflicts_with_all = ["orders_count", "repeat"])]
    pub tiny: bool,
}

/// Fewest orders of one line: with fewer there is no tenth.
const MIN_ORDERS: u32 = 1_000;

impl BenchArgs {
    fn extent(&self) -> Extent {
        if self.tiny {
            return Extent { products: TINY_PRODUCTS, one_line: TINY_ORDERS, many_lines: TINY_ORDERS / 3 };
        }
        let one_line = self.orders_count as usize;
        Extent { products: PRODUCTS, one_line, many_lines: one_line / MANY_LINES_DIVISOR }
    }

    fn rounds(&self) -> u32 {
        if self.tiny { 1 } else { self.repeat }
    }

    fn scenarios(&self) -> Vec<Scenario> {
        let mut chosen = self.scenario.clone();
        if chosen.is_empty() {
            chosen = vec![Scenario::Uniform, Scenario::Hot, Scenario::Lines14];
            chosen.extend(self.orders.is_some().then_some(Scenario::Real));
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
    let stop = lomash_platform::shutdown::token()?;
    let report = tokio::select! {
        // Dropping what is under way ends its servers.
        () = stop.cancelled() => bail!("interrupted; there is no report, and its servers are stopped"),
        report = bench(&args, Show::Progress) => report?,
    };
    if let Some(path) = &args.svg {
        std::fs::write(path, draw(&report)).with_context(|| format!("could not write {}", path.display()))?;
    }
    if args.json {
        output::print_json(&report)?;
    } else {
        print!("{}", report.render());
    }
    Ok(if report.withheld().next().is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Measures everything that `args` ask for.
///
/// # Errors
/// When a server does not start or a run takes too long. Wrong books are no error but part of the report.
pub async fn bench(args: &BenchArgs, show: Show) -> anyhow::Result<Report> {
    let machine = Machine::here();
    let workloads: Vec<Workload> = args
        .scenarios()
        .into_iter()
        .map(|scenario| Workload::of(scenario, args.extent(), args.seed, args.orders.as_deref()))
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
    let (arena, facts) = Arena::start(&scratch.path().join("rivals")).await?;
    let mut plan = Plan {
        folder: scratch.path(),
        arena,
        rounds: args.rounds(),
        show,
        entries: workloads.into_iter().map(Entry::new).collect(),
        nats_version: String::new(),
        runs: 0,
    };
    plan.examine().await?;
    plan.try_variants().await?;
    for round in 0..plan.rounds {
        for entry in 0..plan.entries.len() {
            for place in 0..STARTERS.len() {
                let starter = STARTERS[(place + round as usize) % STARTERS.len()];
                plan.contest(entry, starter, round).await?;
            }
        }
    }
    let versions = BTreeMap::from([
        ("lomash", env!("CARGO_PKG_VERSION").to_owned()),
        ("NATS", plan.nats_version),
        ("Postgres", facts.version),
    ]);
    let settings = BTreeMap::from([
        ("build", PROFILE.to_owned()),
        ("rounds", plan.rounds.to_string()),
        ("seed", args.seed.to_string()),
        ("NATS sync_interval", "always, one node".to_owned()),
        ("Postgres fsync", facts.fsync),
        ("synchronous_commit", facts.synchronous_commit),
        ("wal_sync_method", facts.wal_sync_method),
        ("shared_buffers", facts.shared_buffers),
        ("projection", "Postgres projects while ours is timed; no order waits for it".to_owned()),
    ]);
    plan.arena.stop().await?;
    let scenarios = plan.entries.into_iter().map(Entry::into_report).collect();
    Ok(Report::new(scenarios, machine, versions, settings))
}

/// The profile of this program, and so of the product service beside it.
const PROFILE: &str = if cfg!(debug_assertions) { "debug: figures of ours are too low" } else { "release" };

/// Who starts at a place. The limit runs right after ours, on ours' server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starter {
    Ours,
    Rival(Rival),
}

/// A scenario with what was gathered of everybody.
struct Entry {
    workload: Workload,
    records: BTreeMap<Contestant, Record>,
    /// The variant of each rival that was the fastest in the trial.
    chosen: Vec<Variant>,
}

impl Entry {
    fn new(workload: Workload) -> Self {
        let records = Contestant::ALL.into_iter().map(|contestant| (contestant, Record::default())).collect();
        Self { workload, records, chosen: Vec::new() }
    }

    fn record(&mut self, contestant: Contestant) -> &mut Record {
        self.records.entry(contestant).or_default()
    }

    fn into_report(self) -> ScenarioReport {
        let Workload { scenario, title, orders, lines, .. } = self.workload;
        let orders = orders.len() as u64;
        let results = self
            .records
            .into_iter()
            .map(|(contestant, record)| record.into_report(contestant, orders, lines))
            .collect();
        ScenarioReport { scenario, title, orders, lines, results }
    }
}

/// The benchmark while it runs.
struct Plan<'p> {
    folder: &'p Path,
    arena: Arena,
    rounds: u32,
    show: Show,
    entries: Vec<Entry>,
    nats_version: String,
    /// Runs of ours so far; each has a folder of its own.
    runs: u32,
}

const RIVALS: [(Rival, Contestant); 2] = [(Rival::Transactions, Contestant::Rival1), (Rival::Sets, Contestant::Rival2)];

impl Plan<'_> {
    /// A rival that sells what it does not have, or twice, has no figures anywhere.
    async fn examine(&mut self) -> anyhow::Result<()> {
        for (rival, contestant) in RIVALS {
            for variant in rival.variants() {
                if let Err(problem) = self.arena.exam(variant).await? {
                    for entry in &mut self.entries {
                        entry.record(contestant).withheld = Some(format!("it failed the exam as {variant}: {problem}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds the fastest variant of each rival for each scenario.
    async fn try_variants(&mut self) -> anyhow::Result<()> {
        for entry in &mut self.entries {
            for (rival, contestant) in RIVALS {
                let limit = entry.workload.orders.len().div_ceil(TRIAL_DIVISOR);
                let mut best: Option<(f64, Variant)> = None;
                for variant in rival.variants() {
                    let what = format!("{}: trying {}", entry.workload.scenario.key(), contestant.title());
                    let rate = match self.arena.run(&entry.workload, variant, limit, &what, self.show).await? {
                        Ok(taken) => limit as f64 / taken.as_secs_f64(),
                        Err(problem) => {
                            entry.record(contestant).withheld = Some(format!("{variant}: {problem}"));
                            continue;
                        }
                    };
                    entry.record(contestant).tried.push((variant.to_string(), rate));
                    if best.is_none_or(|(fastest, _)| rate > fastest) {
                        best = Some((rate, variant));
                    }
                }
                if let Some((_, variant)) = best {
                    entry.record(contestant).setting = variant.to_string();
                    entry.chosen.push(variant);
                }
            }
        }
        Ok(())
    }

    /// One run of one starter.
    async fn contest(&mut self, entry: usize, starter: Starter, round: u32) -> anyhow::Result<()> {
        let entry = &mut self.entries[entry];
        let key = entry.workload.scenario.key();
        let what = format!("{key} {}/{}", round + 1, self.rounds);
        match starter {
            Starter::Ours => {
                self.runs += 1;
                let folder = self.folder.join(format!("ours-{}", self.runs));
                let measured = ours::run(&entry.workload, &folder, &what, self.show).await?;
                // What is left behind goes with the whole folder at the end.
                let _ = std::fs::remove_dir_all(&folder);
                self.nats_version = measured.nats_version;
                match measured.figures {
                    Ok(ours::Figures { ours, limit, messages, batches }) => {
                        let setting = format!(
                            "{} messages in {} batches",
                            output::thousands(messages),
                            output::thousands(batches)
                        );
                        for (contestant, taken) in [(Contestant::Ours, ours), (Contestant::Limit, limit)] {
                            let record = entry.record(contestant);
                            record.runs.push(taken);
                            record.messages = Some(messages);
                            record.setting.clone_from(&setting);
                        }
                    }
                    Err(problem) => {
                        entry.record(Contestant::Limit).withheld = Some("ours has no figure".to_owned());
                        entry.record(Contestant::Ours).withheld = Some(problem);
                    }
                }
            }
            Starter::Rival(rival) => {
                let Some((_, contestant)) = RIVALS.into_iter().find(|(known, _)| *known == rival) else {
                    return Ok(());
                };
                let Some(variant) = entry.chosen.iter().copied().find(|variant| variant.is_of(rival)) else {
                    return Ok(());
                };
                let what = format!("{what}: {}", contestant.title());
                let orders = entry.workload.orders.len();
                match self.arena.run(&entry.workload, variant, orders, &what, self.show).await? {
                    Ok(taken) => entry.record(contestant).runs.push(taken),
                    Err(problem) => entry.record(contestant).withheld = Some(problem),
                }
            }
        }
        Ok(())
    }
}
