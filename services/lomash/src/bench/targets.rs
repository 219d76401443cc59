//! What is aimed at, on a machine with two processors and one NATS node: one number for each name, stable like the names of
//! the ratios.

use serde::Serialize;

/// On which side of the number a figure is to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    /// Not below.
    AtLeast(f64),
    /// Not above.
    AtMost(f64),
}

impl Target {
    /// Whether `figure` meets it.
    #[must_use]
    pub fn is_met_by(self, figure: f64) -> bool {
        match self {
            Self::AtLeast(bound) => figure >= bound,
            Self::AtMost(bound) => figure <= bound,
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bound) => write!(f, "≥ {bound}"),
            Self::AtMost(bound) => write!(f, "≤ {bound}"),
        }
    }
}

/// How large a stream and how many products the targets of memory and start-up are about.
pub(super) const FULL_PRODUCTS: usize = 1_000_000;
/// Decided orders of the target of memory, and events of that of start-up.
pub(super) const FULL_HISTORY: u64 = 10_000_000;

/// Memory at 120 % of capacity is to grow by nothing that grows with what waits. What it may grow by is the ids of the
/// orders decided meanwhile, and their table when it doubles.
const GROWTH_MB: f64 = 32.0;

/// All of them, in the order of the report.
pub const TARGETS: [(&str, Target); 20] = [
    ("uniform_over_rival_1", Target::AtLeast(5.0)),
    ("uniform_over_rival_2", Target::AtLeast(1.2)),
    ("hot_over_rival_1", Target::AtLeast(8.0)),
    ("hot_over_rival_2", Target::AtLeast(0.8)),
    ("real_over_rival_1", Target::AtLeast(1.3)),
    ("real_over_rival_2", Target::AtLeast(1.5)),
    ("uniform_over_limit", Target::AtLeast(0.7)),
    ("hot_over_limit", Target::AtLeast(0.7)),
    ("million_over_limit", Target::AtLeast(0.7)),
    ("lines_14_over_limit", Target::AtLeast(0.7)),
    ("real_over_limit", Target::AtLeast(0.7)),
    ("million_over_uniform", Target::AtLeast(0.8)),
    ("rebuild_over_slower_of_read_and_copy", Target::AtLeast(0.6)),
    ("projection_lag_p99_ms_at_50_percent", Target::AtMost(250.0)),
    ("decision_p50_ms_at_10_percent", Target::AtMost(20.0)),
    ("decision_p99_ms_at_50_percent", Target::AtMost(150.0)),
    ("memory_growth_mb_at_120_percent", Target::AtMost(GROWTH_MB)),
    ("product_memory_mb", Target::AtMost(700.0)),
    ("start_from_snapshot_seconds", Target::AtMost(5.0)),
    ("start_folding_over_bare_read", Target::AtLeast(0.7)),
];
