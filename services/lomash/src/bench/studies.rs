//! The studies: everything that is no race. Those of the same size share servers, and each ends with `lomash verify`.

use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;

use super::bed::{Bed, Versions};
use super::report::Study;
use super::scenario::Scenario;
use super::workload::{Extent, Source};
use super::{cost, latency, projection, reads, start};
use crate::verify::Show;

/// How long and how often a study measures.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    pub extent: Extent,
    /// How often what can be repeated is.
    pub rounds: u32,
    /// How long a rate of arrival is kept up, and how long reads go on.
    pub level: Duration,
    pub seed: u64,
    pub show: Show,
}

/// Runs those of `chosen` that are studies; in `folder` they may leave what they like.
pub(super) async fn run(
    chosen: &[Scenario],
    folder: &Path,
    effort: Effort,
) -> anyhow::Result<(Vec<Study>, Option<Versions>)> {
    let mut studies = Vec::new();
    let mut versions = None;
    let mut costs = cost::Costs::default();
    // Servers are shared until a study fails: what it left behind is nobody's to go on with.
    let mut ready: Option<(Size, Bed, Source)> = None;
    let mut folders = (1..).map(|number| folder.join(format!("studies-{number}")));
    for (scenario, size) in steps(chosen) {
        let (bed, source) = match &mut ready {
            Some((there, bed, source)) if *there == size => (bed, source),
            _ => {
                if let Some((_, bed, _)) = ready.take() {
                    bed.stop().await?;
                }
                let folder = folders.next().context("there are no more numbers")?;
                let (bed, source) = size.prepare(&folder, effort).await?;
                versions = Some(bed.versions().await?);
                let (_, bed, source) = ready.insert((size, bed, source));
                (bed, source)
            }
        };
        let study = match (scenario, size) {
            (Scenario::Projection, _) => projection::run(bed, source, effort).await,
            (Scenario::Latency, _) => latency::run(bed, source, effort).await,
            (Scenario::Reads, _) => reads::run(bed, source, effort).await,
            (Scenario::Cost, Size::Small) => match costs.measure(bed, source, 0, effort).await {
                Ok(()) => continue,
                Err(problem) => Err(problem),
            },
            (Scenario::Cost, Size::Large) => costs
                .measure(bed, source, effort.extent.history, effort)
                .await
                .map(|()| std::mem::take(&mut costs).into_study()),
            (_, _) => start::run(bed, source, effort).await,
        };
        match study {
            Ok(study) => studies.push(study.checked(bed.problem().await?)),
            Err(problem) => {
                ready = None;
                let study = Study::new(scenario, format!("{} ({} products)", scenario.key(), size.products(effort)));
                studies.push(study.checked(Some(format!("it did not come to an end: {problem:#}"))));
            }
        }
    }
    if let Some((_, bed, _)) = ready {
        bed.stop().await?;
    }
    Ok((studies, versions))
}

/// How many products a study has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    Small,
    Large,
}

/// The chosen studies in an order in which those of one size follow each other; one of both sizes is done in two steps.
fn steps(chosen: &[Scenario]) -> Vec<(Scenario, Size)> {
    let of = |size, is_it: fn(Scenario) -> bool| {
        chosen.iter().copied().filter(move |scenario| is_it(*scenario)).map(move |scenario| (scenario, size))
    };
    of(Size::Small, Scenario::is_small).chain(of(Size::Large, Scenario::is_large)).collect()
}

impl Size {
    fn products(self, effort: Effort) -> usize {
        match self {
            Self::Small => effort.extent.products,
            Self::Large => effort.extent.many_products,
        }
    }

    async fn prepare(self, folder: &Path, effort: Effort) -> anyhow::Result<(Bed, Source)> {
        let bed = Bed::start(folder).await?;
        let source = Source::new(self.products(effort), effort.seed)?;
        bed.fill(&source.products, "studies", effort.show).await?;
        Ok((bed, source))
    }
}

/// A rate.
pub(super) fn per_second(count: u64, taken: Duration) -> f64 {
    count as f64 / taken.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// The value that so many of a hundred do not exceed, in milliseconds; `sorted` is.
pub(super) fn percentile_ms(sorted: &[Duration], percent: f64) -> f64 {
    let rank = (sorted.len() as f64 * percent / 100.0).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).map_or(f64::NAN, |value| value.as_secs_f64() * 1_000.0)
}

/// The usual percentiles of how long something took.
pub(super) fn percentiles(mut taken: Vec<Duration>) -> Vec<(&'static str, f64)> {
    taken.sort_unstable();
    vec![
        ("p50 ms", percentile_ms(&taken, 50.0)),
        ("p99 ms", percentile_ms(&taken, 99.0)),
        ("p99.9 ms", percentile_ms(&taken, 99.9)),
        ("max ms", percentile_ms(&taken, 100.0)),
        ("count", taken.len() as f64),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_a_value_that_was_measured() {
        let taken: Vec<Duration> = (1..=200).map(Duration::from_millis).collect();
        assert_eq!(percentile_ms(&taken, 50.0), 100.0);
        assert_eq!(percentile_ms(&taken, 99.0), 198.0);
        assert_eq!(percentile_ms(&taken, 99.9), 200.0);
        assert_eq!(percentile_ms(&taken[..1], 50.0), 1.0);
        assert!(percentile_ms(&[], 50.0).is_nan());
    }
}
