//! What a benchmark came to: figures, ratios and where they are from; as a table and as JSON.
//!
//! Owns the names of the races' ratios. They are stable, and `docs/performance.md` lists them:
//! `<scenario>_over_<contestant>`, our median rate divided by that of the contestant. Studies name theirs themselves. A
//! contestant whose books were wrong in any run has no figure at all, no ratio is made with it, and a study whose books were
//! wrong has none.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::machine::Machine;
use super::scenario::Scenario;
use super::targets::{TARGETS, Target};
use crate::output::{self, Cell};

/// Who takes part in the races.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Contestant {
    /// The product service.
    Ours,
    /// The same messages in the same batches, on a stream like `INVENTORY`.
    Limit,
    /// The same without ids, on a stream that republishes nothing.
    Bare,
    /// Postgres, an order a transaction.
    Rival1,
    /// Postgres, several hundred orders a transaction.
    Rival2,
    /// Redis, a script.
    Rival3,
}

impl Contestant {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 6] = [Self::Ours, Self::Limit, Self::Bare, Self::Rival1, Self::Rival2, Self::Rival3];

    /// Those that are another design.
    pub const RIVALS: [Self; 3] = [Self::Rival1, Self::Rival2, Self::Rival3];

    /// Those that take part in a race.
    #[must_use]
    pub fn of(scenario: Scenario) -> Vec<Self> {
        let takes_part = |contestant: &Self| scenario.has_rivals() || !Self::RIVALS.contains(contestant);
        Self::ALL.into_iter().filter(takes_part).collect()
    }

    /// As tables and pictures call it.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Ours => "product service",
            Self::Limit => "limit: same batches, no service",
            Self::Bare => "bare: no ids, no republishing",
            Self::Rival1 => "rival 1: Postgres, order a transaction",
            Self::Rival2 => "rival 2: Postgres, sets of orders",
            Self::Rival3 => "rival 3: Redis, synced always",
        }
    }

    /// Its name in the ratios; ours is over all others and has none.
    #[must_use]
    pub const fn key(self) -> Option<&'static str> {
        match self {
            Self::Ours => None,
            Self::Limit => Some("limit"),
            Self::Bare => Some("bare"),
            Self::Rival1 => Some("rival_1"),
            Self::Rival2 => Some("rival_2"),
            Self::Rival3 => Some("rival_3"),
        }
    }
}

/// The whole benchmark. `ratios` is flat: what a script compares from run to run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// One number for each name: ratios of medians, and what a target is about in milliseconds, seconds or megabytes, as
    /// its name says.
    pub ratios: BTreeMap<String, f64>,
    /// What is aimed at, measured now or not.
    pub targets: BTreeMap<&'static str, Target>,
    /// The figures that the races' ratios are made of.
    pub scenarios: Vec<ScenarioReport>,
    /// What else was measured.
    pub studies: Vec<Study>,
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

/// A study: a table, and what of it is compared from run to run.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Study {
    /// Which.
    pub scenario: Scenario,
    /// As the report calls it.
    pub title: String,
    /// The figures, none when the books were wrong.
    pub rows: Vec<Row>,
    /// What a reader of the figures should know.
    pub notes: Vec<String>,
    /// Its part of the report's `ratios`.
    pub ratios: BTreeMap<String, f64>,
    /// Why there are no figures.
    pub withheld: Option<String>,
}

/// A row of a study.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// Its figures, each with its name and unit.
    #[serde(serialize_with = "as_object")]
    pub figures: Vec<(&'static str, f64)>,
}

fn as_object<S: Serializer>(figures: &[(&'static str, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(figures.iter().map(|(name, figure)| (name, figure)))
}

impl Row {
    /// A row.
    pub(super) fn new(what: impl Into<String>, figures: Vec<(&'static str, f64)>) -> Self {
        Self { what: what.into(), figures }
    }

    /// Median and extremes of a rate.
    pub(super) fn of_rates(what: impl Into<String>, unit: &'static str, spread: Spread) -> Self {
        Self::new(what, vec![(unit, spread.median), ("min", spread.min), ("max", spread.max)])
    }
}

impl Study {
    /// One without figures yet.
    pub(super) fn new(scenario: Scenario, title: impl Into<String>) -> Self {
        let title = title.into();
        Self { scenario, title, rows: Vec::new(), notes: Vec::new(), ratios: BTreeMap::new(), withheld: None }
    }

    /// Adds a number that is compared from run to run.
    pub(super) fn ratio(&mut self, name: &str, value: f64) {
        self.ratios.insert(name.to_owned(), value);
    }

    /// The study, or what is left of it when the books are wrong: the reason.
    pub(super) fn checked(self, problem: Option<String>) -> Self {
        match problem {
            None => self,
            Some(problem) => Self { withheld: Some(problem), ..Self::new(self.scenario, self.title) },
        }
    }

    fn render(&self) -> String {
        let mut columns: Vec<&str> = Vec::new();
        for (name, _) in self.rows.iter().flat_map(|row| &row.figures) {
            if !columns.contains(name) {
                columns.push(name);
            }
        }
        let header: Vec<&str> = std::iter::once("").chain(columns.iter().copied()).collect();
        let mut table = output::table(&header);
        for row in &self.rows {
            let figure = |column: &&str| {
                let found = row.figures.iter().find(|(name, _)| name == column);
                let text = found.map_or_else(|| "-".to_owned(), |(_, figure)| number(*figure));
                Cell::right(text)
            };
            table.add_row(std::iter::once(Cell::new(&row.what)).chain(columns.iter().map(figure)).collect::<Vec<_>>());
        }
        let mut text = format!("{}\n", self.title);
        if !self.rows.is_empty() {
            let _ = writeln!(text, "{table}");
        }
        for note in &self.notes {
            let _ = writeln!(text, "{note}");
        }
        text
    }
}

/// A figure with as many digits as are worth reading.
fn number(figure: f64) -> String {
    match figure.abs() {
        100.0.. => output::thousands(figure.round() as i64),
        10.0.. => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
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

    /// Our median rate.
    fn ours(&self) -> Option<f64> {
        Some(self.result(Contestant::Ours)?.orders_per_second?.median)
    }

    /// The ratios of this scenario.
    fn ratios(&self) -> impl Iterator<Item = (String, f64)> + '_ {
        let ours = self.ours();
        Contestant::ALL.into_iter().filter_map(move |contestant| {
            let name = format!("{}_over_{}", self.scenario.key(), contestant.key()?);
            Some((name, ours? / self.result(contestant)?.orders_per_second?.median))
        })
    }
}

impl Report {
    /// The report of these races and studies, with its ratios.
    pub(super) fn new(
        scenarios: Vec<ScenarioReport>,
        studies: Vec<Study>,
        machine: Machine,
        versions: BTreeMap<&'static str, String>,
        settings: BTreeMap<&'static str, String>,
    ) -> Self {
        let mut ratios: BTreeMap<String, f64> = scenarios.iter().flat_map(ScenarioReport::ratios).collect();
        let ours = |scenario| scenarios.iter().find(|race| race.scenario == scenario).and_then(ScenarioReport::ours);
        if let (Some(million), Some(uniform)) = (ours(Scenario::Million), ours(Scenario::Uniform)) {
            ratios.insert("million_over_uniform".to_owned(), million / uniform);
        }
        ratios.extend(studies.iter().flat_map(|study| study.ratios.clone()));
        Self { ratios, targets: TARGETS.into(), scenarios, studies, machine, versions, settings }
    }

    /// Why figures are missing: one sentence for each contestant or study whose books were wrong.
    pub fn withheld(&self) -> impl Iterator<Item = String> + '_ {
        let of_races = self.scenarios.iter().flat_map(|scenario| {
            scenario.results.iter().filter_map(|result| {
                let why = result.withheld.as_ref()?;
                Some(format!("{}, {}: no figure, because {why}", scenario.title, result.contestant.title()))
            })
        });
        let of_studies = self.studies.iter().filter_map(|study| {
            let why = study.withheld.as_ref()?;
            Some(format!("{}: no figure, because {why}", study.title))
        });
        of_races.chain(of_studies)
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
                    None => Cell::right("-"),
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
                    Cell::right(range),
                    rate(result.lines_per_second),
                    rate(result.messages_per_second),
                    Cell::right(ratio),
                    Cell::new(&result.setting),
                ]);
            }
            let _ = writeln!(text, "{table}\n");
        }
        for study in &self.studies {
            let _ = writeln!(text, "{}", study.render());
        }
        let mut table = output::table(&["", "measured", "target", ""]);
        let right = |text: String| Cell::right(text);
        for (name, target) in TARGETS {
            let (measured, verdict) = match self.ratios.get(name) {
                Some(ratio) => (number(*ratio), if target.is_met_by(*ratio) { "met" } else { "missed" }),
                None => ("-".to_owned(), "not measured"),
            };
            table.add_row(vec![Cell::new(name), right(measured), right(target.to_string()), Cell::new(verdict)]);
        }
        // The others of the races and the latencies stand in their tables.
        let stands_above = |name: &str| {
            name.contains("_ms_at_") || self.scenarios.iter().any(|race| race.ratios().any(|(known, _)| known == name))
        };
        let others = self.ratios.iter().filter(|(name, _)| !self.targets.contains_key(name.as_str()));
        for (name, ratio) in others.filter(|(name, _)| !stands_above(name)) {
            table.add_row(vec![Cell::new(name), right(number(*ratio)), right("-".to_owned()), Cell::new("")]);
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
        let report = Report::new(vec![scenario], Vec::new(), Machine::here(), BTreeMap::new(), BTreeMap::new());
        assert_eq!(report.ratios, BTreeMap::from([("hot_over_rival_1".to_owned(), 2.0)]));
        assert_eq!(report.withheld().count(), 1);
        assert!(report.render().contains("WITHHELD"));
    }

    #[test]
    fn a_study_with_wrong_books_has_no_figure() {
        let mut study = Study::new(Scenario::Latency, "latency");
        study.rows.push(Row::new("at 10 %", vec![("p50 ms", 3.0)]));
        study.ratio("decision_p50_ms_at_10_percent", 3.0);
        let report = |problem: Option<&str>| {
            let study = study.clone().checked(problem.map(str::to_owned));
            Report::new(Vec::new(), vec![study], Machine::here(), BTreeMap::new(), BTreeMap::new())
        };
        let fine = report(None);
        assert_eq!(fine.ratios.len(), 1);
        let line = |report: &Report| {
            let text = report.render();
            let line = text.lines().find(|line| line.contains("decision_p50_ms_at_10")).map(str::to_owned);
            line.expect("every target has a line")
        };
        assert!(line(&fine).contains(" met"), "{}", line(&fine));
        let wrong = report(Some("an order was decided twice"));
        assert!(wrong.ratios.is_empty() && wrong.studies[0].rows.is_empty());
        assert!(line(&wrong).contains("not measured"), "{}", line(&wrong));
        assert_eq!(wrong.withheld().count(), 1);
    }
}
