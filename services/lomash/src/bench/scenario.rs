//! The scenarios and their names.
//!
//! A *race* is a kind of orders that several contestants get; everything else is a *study*, which measures one property of
//! ours and, where there is one, against its own limit.

use clap::ValueEnum;
use serde::Serialize;

/// What is measured. The order is that of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Scenario {
    /// Orders of one line, spread over 10,000 products.
    Uniform,
    /// Orders of one line, always of the same product.
    Hot,
    /// Orders of one line, spread over as many products as --products says.
    Million,
    /// Orders of fourteen lines, spread over 10,000 products.
    #[value(name = "lines-14")]
    #[serde(rename = "lines_14")]
    Lines14,
    /// The orders of a file.
    Real,
    /// Events into Postgres, live and in a rebuild, beside bare reading and bare COPY.
    Projection,
    /// From a scheduled arrival to the decision, to the answer over HTTP and to the projection, under fixed rates.
    Latency,
    /// GET from the cache and from Postgres.
    Reads,
    /// Processor time, bytes written and memory.
    Cost,
    /// Starting on a long stream.
    Start,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Uniform,
        Self::Hot,
        Self::Million,
        Self::Lines14,
        Self::Real,
        Self::Projection,
        Self::Latency,
        Self::Reads,
        Self::Cost,
        Self::Start,
    ];

    /// Its name in the ratios; stable.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Hot => "hot",
            Self::Million => "million",
            Self::Lines14 => "lines_14",
            Self::Real => "real",
            Self::Projection => "projection",
            Self::Latency => "latency",
            Self::Reads => "reads",
            Self::Cost => "cost",
            Self::Start => "start",
        }
    }

    /// Whether contestants race in it.
    #[must_use]
    pub const fn is_race(self) -> bool {
        matches!(self, Self::Uniform | Self::Hot | Self::Million | Self::Lines14 | Self::Real)
    }

    /// Whether the rivals take part in the race. Of a million products only our own growth is asked.
    #[must_use]
    pub const fn has_rivals(self) -> bool {
        self.is_race() && !matches!(self, Self::Million)
    }

    /// Whether the study needs as many products as `--products` says, beside or instead of the usual number.
    #[must_use]
    pub const fn is_large(self) -> bool {
        matches!(self, Self::Cost | Self::Start)
    }

    /// Whether the study needs the usual number of products.
    #[must_use]
    pub const fn is_small(self) -> bool {
        matches!(self, Self::Projection | Self::Latency | Self::Reads | Self::Cost)
    }
}
