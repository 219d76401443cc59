//! The races: who runs when, and what becomes of it.
//!
//! Contestants are interleaved and change places from round to round, so that a machine that slows down slows all of them.
//! Nothing of another run is at work while one is timed.

use std::collections::BTreeMap;
use std::path::Path;

use super::bed::Versions;
use super::ours;
use super::report::{Contestant, ContestantReport, Record, ScenarioReport};
use super::rivals::{self, Arena, Facts, Variant};
use super::workload::Workload;
use crate::output;
use crate::verify::Show;

/// A rival's variants are tried out with this part of the orders.
const TRIAL_DIVISOR: usize = 5;

/// Places that change from round to round. The limits run right after ours, on ours' server.
const STARTERS: [Contestant; 4] = [Contestant::Ours, Contestant::Rival1, Contestant::Rival2, Contestant::Rival3];

/// What the races came to.
pub(super) struct Outcome {
    pub reports: Vec<ScenarioReport>,
    pub versions: Option<Versions>,
    pub facts: Facts,
}

/// How often, and in how many ways, rivals run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pains {
    pub rounds: u32,
    /// Most variants of a rival that are tried.
    pub variants: usize,
}

/// Runs all workloads.
pub(super) async fn run(workloads: Vec<Workload>, folder: &Path, pains: Pains, show: Show) -> anyhow::Result<Outcome> {
    let (arena, facts) = Arena::start(&folder.join("rivals")).await?;
    let entries = workloads.into_iter().map(Entry::new).collect();
    let mut plan = Plan { folder, arena, pains, show, entries, versions: None, runs: 0 };
    plan.examine().await?;
    plan.try_variants().await?;
    for round in 0..pains.rounds {
        for entry in 0..plan.entries.len() {
            for place in 0..STARTERS.len() {
                let starter = STARTERS[(place + round as usize) % STARTERS.len()];
                plan.contest(entry, starter, round).await?;
            }
        }
    }
    let Plan { arena, entries, versions, .. } = plan;
    arena.stop().await?;
    Ok(Outcome { reports: entries.into_iter().map(Entry::into_report).collect(), versions, facts })
}

/// A scenario with what was gathered of everybody.
struct Entry {
    workload: Workload,
    records: BTreeMap<Contestant, Record>,
    /// The variant of each rival that was the fastest in the trial.
    chosen: BTreeMap<Contestant, Variant>,
}

impl Entry {
    fn new(workload: Workload) -> Self {
        let contestants = Contestant::of(workload.scenario).into_iter();
        let records = contestants.map(|contestant| (contestant, Record::default())).collect();
        Self { workload, records, chosen: BTreeMap::new() }
    }

    fn record(&mut self, contestant: Contestant) -> &mut Record {
        self.records.entry(contestant).or_default()
    }

    /// Its rivals with the ways in which they may be run, so many of each at most.
    fn variants(&self, most: usize) -> Vec<(Contestant, Variant)> {
        let variants =
            |contestant| rivals::variants(contestant).into_iter().take(most).map(move |variant| (contestant, variant));
        self.records.keys().copied().flat_map(variants).collect()
    }

    fn into_report(self) -> ScenarioReport {
        let Workload { scenario, title, orders, lines, .. } = self.workload;
        let orders = orders.len() as u64;
        let results: Vec<ContestantReport> = self
            .records
            .into_iter()
            .map(|(contestant, record)| record.into_report(contestant, orders, lines))
            .collect();
        ScenarioReport { scenario, title, orders, lines, results }
    }
}

/// The races while they run.
struct Plan<'p> {
    folder: &'p Path,
    arena: Arena,
    pains: Pains,
    show: Show,
    entries: Vec<Entry>,
    versions: Option<Versions>,
    /// Runs of ours so far; each has a folder of its own.
    runs: u32,
}

impl Plan<'_> {
    /// A rival that sells what it does not have, or twice, has no figures anywhere.
    async fn examine(&mut self) -> anyhow::Result<()> {
        if !self.entries.iter().any(|entry| entry.workload.scenario.has_rivals()) {
            return Ok(());
        }
        for contestant in Contestant::RIVALS {
            for variant in rivals::variants(contestant).into_iter().take(self.pains.variants) {
                if let Err(problem) = self.arena.exam(variant).await? {
                    for entry in self.entries.iter_mut().filter(|entry| entry.workload.scenario.has_rivals()) {
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
            let limit = entry.workload.orders.len().div_ceil(TRIAL_DIVISOR);
            let mut fastest: BTreeMap<Contestant, f64> = BTreeMap::new();
            for (contestant, variant) in entry.variants(self.pains.variants) {
                let what = format!("{}: trying {}", entry.workload.scenario.key(), contestant.title());
                let rate = match self.arena.run(&entry.workload, variant, limit, &what, self.show).await? {
                    Ok(taken) => limit as f64 / taken.as_secs_f64(),
                    Err(problem) => {
                        entry.record(contestant).withheld = Some(format!("{variant}: {problem}"));
                        continue;
                    }
                };
                entry.record(contestant).tried.push((variant.to_string(), rate));
                if fastest.get(&contestant).is_none_or(|fastest| rate > *fastest) {
                    fastest.insert(contestant, rate);
                    entry.record(contestant).setting = variant.to_string();
                    entry.chosen.insert(contestant, variant);
                }
            }
        }
        Ok(())
    }

    /// One run of one starter.
    async fn contest(&mut self, entry: usize, starter: Contestant, round: u32) -> anyhow::Result<()> {
        let entry = &mut self.entries[entry];
        let what = format!("{} {}/{}", entry.workload.scenario.key(), round + 1, self.pains.rounds);
        if starter != Contestant::Ours {
            // None when it takes no part, or its books were wrong in every trial.
            let Some(variant) = entry.chosen.get(&starter).copied() else { return Ok(()) };
            let what = format!("{what}: {}", starter.title());
            let orders = entry.workload.orders.len();
            match self.arena.run(&entry.workload, variant, orders, &what, self.show).await? {
                Ok(taken) => entry.record(starter).runs.push(taken),
                Err(problem) => entry.record(starter).withheld = Some(problem),
            }
            return Ok(());
        }
        self.runs += 1;
        let folder = self.folder.join(format!("ours-{}", self.runs));
        let measured = ours::run(&entry.workload, &folder, round, &what, self.show).await?;
        // What is left behind goes with the whole folder at the end.
        let _ = std::fs::remove_dir_all(&folder);
        self.versions = Some(measured.versions);
        match measured.figures {
            Ok(ours::Figures { ours, limits, messages, batches }) => {
                let (count, of) = (output::thousands(messages), output::thousands(batches));
                for (contestant, taken) in limits.into_iter().chain([(Contestant::Ours, ours)]) {
                    let record = entry.record(contestant);
                    record.runs.push(taken);
                    record.messages = Some(messages);
                    record.setting = format!("{count} messages in {of} batches");
                }
            }
            Err(problem) => {
                for limit in [Contestant::Limit, Contestant::Bare] {
                    entry.record(limit).withheld = Some("ours has no figure".to_owned());
                }
                entry.record(Contestant::Ours).withheld = Some(problem);
            }
        }
        Ok(())
    }
}
