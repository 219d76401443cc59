//! The studies: everything that is no race. Those of the same size share servers, and each ends with `lomash verify`.

use std::path::Path;
use std::time::Duration;

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
    let chosen: Vec<Scenario> = chosen.iter().copied().filter(|scenario| !scenario.is_race()).collect();
    let mut studies = Vec::new();
    let mut versions = None;
    let mut costs = cost::Costs::default();
    if chosen.iter().any(|scenario| scenario.is_small()) {
        let products = effort.extent.products;
        let (mut bed, mut source) = prepare(&folder.join("small"), products, effort).await?;
        versions = Some(bed.versions().await?);
        for scenario in chosen.iter().filter(|scenario| scenario.is_small()) {
            let study = match scenario {
                Scenario::Projection => projection::run(&mut bed, &mut source, effort).await?,
                Scenario::Latency => latency::run(&mut bed, &mut source, effort).await?,
                Scenario::Reads => reads::run(&mut bed, &source, effort).await?,
                _ => {
                    costs.measure(&mut bed, &mut source, 0, effort).await?;
                    continue;
                }
            };
            studies.push(study.checked(bed.problem().await?));
        }
        bed.stop().await?;
    }
    if chosen.iter().any(|scenario| scenario.is_large()) {
        let products = effort.extent.many_products;
        let (mut bed, mut source) = prepare(&folder.join("large"), products, effort).await?;
        versions = Some(bed.versions().await?);
        if chosen.contains(&Scenario::Cost) {
            costs.measure(&mut bed, &mut source, effort.extent.history, effort).await?;
            studies.push(costs.into_study());
        }
        if chosen.contains(&Scenario::Start) {
            let study = start::run(&mut bed, &mut source, effort).await?;
            studies.push(study.checked(bed.problem().await?));
        }
        bed.stop().await?;
    }
    Ok((studies, versions))
}

async fn prepare(folder: &Path, products: usize, effort: Effort) -> anyhow::Result<(Bed, Source)> {
    let bed = Bed::start(folder).await?;
    let source = Source::new(products, effort.seed)?;
    bed.fill(&source.products, "studies", effort.show).await?;
    Ok((bed, source))
}

/// A count or a duration as figures have it.
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
