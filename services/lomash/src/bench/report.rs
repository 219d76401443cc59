//! What a benchmark came to: figures, ratios and where they are from; as a table and as JSON.
//!
//! Owns the names of the ratios. They are stable, and `docs/performance.md` lists them: `<scenario>_over_<contestant>`,
//! our median rate divided by that of the contestant. A contestant whose books were wrong in any run has no figure at all,
//! and no ratio is made with it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use comfy_table::{Cell, CellAlignment};
use serde::Serialize;

use super::machine::Machine;
use super::workload::Scenario;
use crate::output;

/// Who takes part in the scenarios of orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Contestant {
    /// The product service.
    Ours,
    /// Bare batches of the same messages on the same server.
    Limit,
    /// Postgres, an order a transaction.
    Rival1,
    /// Postgres, several hundred orders a transaction.
    Rival2,
}

impl Contestant {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 4] = [Self::Ours, Self::Limit, Self::Rival1, Self::Rival2];

    /// As tables and pictures call it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Ours => "product service",
            Self::Limit => "limit: bare batches",
            Self::Rival1 => "rival 1: Postgres, order a transaction",
            Self::Rival2 => "rival 2: Postgres, sets of orders",
        }
    }

    /// Its name in the ratios; ours is over all others and has none.
    #[must_use]
    pub const fn key(self) -> Option<&'static str> {
        match self {
            Self::Ours => None,
            Self::Limit => Some("limit"),
            Self::Rival1 => Some("rival_1"),
            Self::Rival2 => Some("rival_2"),
        }
    }
}

/// What a ratio is to be at least, where there is a target.
#[must_use]
pub const fn target(scenario: Scenario, contestant: Contestant) -> Option<f64> {
    match (scenario, contestant) {
        (_, Contestant::Limit) => Some(0.7),
        (Scenario::Uniform, Contestant::Rival1) => Some(5.0),
        (Scenario::Uniform, Contestant::Rival2) => Some(1.2),
        (Scenario::Hot, Contestant::Rival1) => Some(8.0),
        (Scenario::Hot, Contestant::Rival2) => Some(0.8),
        (Scenario::Real, Contestant::Rival1) => Some(1.3),
        (Scenario::Real, Contestant::Rival2) => Some(1.5),
        (Scenario::Lines14, Contestant::Rival1 | Contestant::Rival2) | (_, Contestant::Ours) => None,
    }
}

/// The whole benchmark. `ratios` is flat: what a script compares from run to run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Our median rate over that of another, by `<scenario>_over_<contestant>`.
    pub ratios: BTreeMap<String, f64>,
    /// What they are to be at least, for those that have a target.
    pub targets: BTreeMap<String, f64>,
    /// The figures that the ratios are made of.
    pub scenarios: Vec<ScenarioReport>,
    /// Where it ran.
    pub machine: Machine,
    /// Of what.
    pub versions: BTreeMap<&'static str, String>,
    /// How it was set.
    pub settings: BTreeMap<&'static str, String>,
}

/// One scenario.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ScenarioReport {
    /// Which.
    pub scenario: Scenario,
    /// As tables call it.
    pub title: String,
    /// Orders of a run, repeats included.
    pub orders: u64,
    /// Their lines.
    pub lines: u64,
    /// Everybody's results.
    pub results: Vec<ContestantReport>,
}

/// One contestant in one scenario.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContestantReport {
    /// Who.
    pub contestant: Contestant,
    /// How it was run.
    pub setting: String,
    /// Orders a second; none when the books were wrong.
    pub orders_per_second: Option<Spread>,
    /// Lines a second.
    pub lines_per_second: Option<Spread>,
    /// Messages stored a second, for those that write to a stream.
    pub messages_per_second: Option<Spread>,
    /// Why there are no figures.
    pub withheld: Option<String>,
    /// What was tried out before, and how many orders a second it reached.
    pub tried: Vec<(String, f64)>,
}

/// Median and extremes of the repeats.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one; of an even number the mean of the middle two.
    pub median: f64,
    /// The slowest.
    pub min: f64,
    /// The fastest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len().is_multiple_of(2) {
            f64::midpoint(values[middle - 1], values[middle])
        } else {
            values[middle]
        };
        Some(Self { median, min, max })
    }
}

/// What is gathered of one contestant in one scenario while the benchmark runs.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub setting: String,
    pub runs: Vec<Duration>,
    /// Messages stored in each run, for those that write to a stream.
    pub messages: Option<u64>,
    pub withheld: Option<String>,
    pub tried: Vec<(String, f64)>,
}

impl Record {
    pub fn into_report(self, contestant: Contestant, orders: u64, lines: u64) -> ContestantReport {
        let Self { setting, runs, messages, withheld, tried } = self;
        let rate = |count: u64| {
            if withheld.is_some() {
                return None;
            }
            Spread::of(runs.iter().map(|run| count as f64 / run.as_secs_f64().max(f64::MIN_POSITIVE)).collect())
        };
        ContestantReport {
            contestant,
            orders_per_second: rate(orders),
            lines_per_second: rate(lines),
            messages_per_second: messages.and_then(rate),
            setting,
            tried,
            withheld,
        }
    }
}

impl ScenarioReport {
    /// The contestant's results.
    #[must_use]
    pub fn result(&self, contestant: Contestant) -> Option<&ContestantReport> {
        self.results.iter().find(|result| result.contestant == contestant)
    }

    /// The ratios of this scenario: name, value, target.
    fn ratios(&self) -> impl Iterator<Item = (String, f64, Option<f64>)> + '_ {
        let rate = |contestant| Some(self.result(contestant)?.orders_per_second?.median);
        let ours = rate(Contestant::Ours);
        Contestant::ALL.into_iter().filter_map(move |contestant| {
            let name = format!("{}_over_{}", self.scenario.key(), contestant.key()?);
            Some((name, ours? / rate(contestant)?, target(self.scenario, contestant)))
        })
    }
}

impl Report {
    /// The report of these scenarios, with its ratios.
    pub(super) fn new(
        scenarios: Vec<ScenarioReport>,
        machine: Machine,
        versions: BTreeMap<&'static str, String>,
        settings: BTreeMap<&'static str, String>,
    ) -> Self {
        let mut ratios = BTreeMap::new();
        let mut targets = BTreeMap::new();
        for (name, ratio, target) in scenarios.iter().flat_map(ScenarioReport::ratios) {
            targets.extend(target.map(|target| (name.clone(), target)));
            ratios.insert(name, ratio);
        }
        Self { ratios, targets, scenarios, machine, versions, settings }
    }

    /// Why figures are missing: one sentence for each contestant whose books were wrong.
    pub fn withheld(&self) -> impl Iterator<Item = String> + '_ {
        self.scenarios.iter().flat_map(|scenario| {
            scenario.results.iter().filter_map(|result| {
                let why = result.withheld.as_ref()?;
                Some(format!("{}, {}: no figure, because {why}", scenario.title, result.contestant.title()))
            })
        })
    }

    /// The report for a terminal.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        for scenario in &self.scenarios {
            let (orders, lines) = (output::thousands(scenario.orders), output::thousands(scenario.lines));
            let _ = writeln!(text, "{}: {orders} orders, {lines} lines", scenario.title);
            let mut table = output::table(&["", "orders/s", "min – max", "lines/s", "messages/s", "ours ÷", "run as"]);
            let ours = scenario.result(Contestant::Ours).and_then(|result| result.orders_per_second);
            for result in &scenario.results {
                let rate = |spread: Option<Spread>| match spread {
                    Some(spread) => output::number_cell(spread.median.round() as u64),
                    None => Cell::new("-").set_alignment(CellAlignment::Right),
                };
                let range = result.orders_per_second.map_or_else(
                    || "-".to_owned(),
                    |Spread { min, max, .. }| {
                        format!("{} – {}", output::thousands(min.round() as u64), output::thousands(max.round() as u64))
                    },
                );
                let ratio = match (ours, result.orders_per_second, result.contestant) {
                    (_, _, Contestant::Ours) => String::new(),
                    (Some(ours), Some(theirs), _) => format!("{:.2}", ours.median / theirs.median),
                    _ => "-".to_owned(),
                };
                table.add_row(vec![
                    Cell::new(result.contestant.title()),
                    rate(result.orders_per_second),
                    Cell::new(range).set_alignment(CellAlignment::Right),
                    rate(result.lines_per_second),
                    rate(result.messages_per_second),
                    Cell::new(ratio).set_alignment(CellAlignment::Right),
                    Cell::new(&result.setting),
                ]);
            }
            let _ = writeln!(text, "{table}\n");
        }
        let mut table = output::table(&["ratio", "measured", "at least", ""]);
        for (name, ratio) in &self.ratios {
            let target = self.targets.get(name);
            let met = target.map_or("", |target| if ratio >= target { "met" } else { "falls short" });
            let target = target.map_or_else(|| "-".to_owned(), f64::to_string);
            let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
            table.add_row(vec![Cell::new(name), right(format!("{ratio:.2}")), right(target), Cell::new(met)]);
        }
        let _ = writeln!(text, "{table}\n\nmachine: {}", self.machine);
        for (what, values) in [("versions", &self.versions), ("settings", &self.settings)] {
            let values: Vec<String> = values.iter().map(|(name, value)| format!("{name} {value}")).collect();
            let _ = writeln!(text, "{what}: {}", values.join("; "));
        }
        for sentence in self.withheld() {
            let _ = writeln!(text, "WITHHELD: {sentence}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_middle_two() {
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, min: 1.0, max: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of(Vec::new()), None);
    }

    #[test]
    fn wrong_books_make_no_figure_and_no_ratio() {
        let record = |millis, withheld: Option<&str>| Record {
            runs: vec![Duration::from_millis(millis)],
            withheld: withheld.map(str::to_owned),
            ..Record::default()
        };
        let scenario = ScenarioReport {
            scenario: Scenario::Hot,
            title: "hot".to_owned(),
            orders: 1_000,
            lines: 1_000,
            results: vec![
                record(500, None).into_report(Contestant::Ours, 1_000, 1_000),
                record(1_000, None).into_report(Contestant::Rival1, 1_000, 1_000),
                record(100, Some("two orders were decided twice")).into_report(Contestant::Rival2, 1_000, 1_000),
            ],
        };
        let report = Report::new(vec![scenario], Machine::here(), BTreeMap::new(), BTreeMap::new());
        assert_eq!(report.ratios, BTreeMap::from([("hot_over_rival_1".to_owned(), 2.0)]));
        assert_eq!(report.withheld().count(), 1);
        assert!(report.render().contains("WITHHELD"));
    }
}
