//! How every command shows things: tables, progress and numbers.
//!
//! Results go to standard output, progress to standard error, so that `--json` and pipes stay clean. A terminal gets a
//! bar; anything else (a log, CI) gets a counted line every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Context;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Cell, CellAlignment, ContentArrangement, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// How often progress is reported where there is no terminal.
pub const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How often a bar is drawn, at most: drawing must not slow down what it shows.
const DRAWS_A_SECOND: u8 = 10;

/// How many units pass between two looks at the clock.
const UNITS_BETWEEN_LOOKS: u64 = 256;

/// A digest as text.
#[must_use]
pub fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An empty table in the one style of this program.
#[must_use]
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header.iter().map(|title| Cell::new(*title)).collect::<Vec<_>>());
    table
}

/// A cell with a number: thousands separated, on the right.
#[must_use]
pub fn number_cell(number: u64) -> Cell {
    Cell::new(thousands(number)).set_alignment(CellAlignment::Right)
}

/// A number as people read it: `1234567` is `1,234,567`.
#[must_use]
pub fn thousands(number: impl Into<i128>) -> String {
    let number: i128 = number.into();
    let digits = number.unsigned_abs().to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 + 1);
    if number < 0 {
        text.push('-');
    }
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes as people read them, in binary units.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut tenths = u128::from(count) * 10 / 1024;
    let mut unit = 0;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Prints `value` as indented JSON on standard output.
///
/// # Errors
/// When the value cannot be written as JSON.
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value).context("the result cannot be written as JSON")?;
    println!("{text}");
    Ok(())
}

/// How far a long piece of work is.
#[derive(Debug)]
pub struct Progress {
    what: String,
    total: Option<u64>,
    done: u64,
    looked_at: u64,
    started: Instant,
    last_line: Instant,
    show: Show,
}

#[derive(Debug)]
enum Show {
    Bar(ProgressBar),
    Lines { printed: bool },
    Nothing,
}

impl Progress {
    /// Progress of `what` towards `total`.
    #[must_use]
    pub fn new(what: impl Into<String>, total: u64) -> Self {
        Self::start(what.into(), Some(total), true)
    }

    /// Progress of `what`, whose end is not known.
    #[must_use]
    pub fn counting(what: impl Into<String>) -> Self {
        Self::start(what.into(), None, true)
    }

    /// Counts and shows nothing: for callers that are part of something else.
    #[must_use]
    pub fn hidden() -> Self {
        Self::start(String::new(), None, false)
    }

    fn start(what: String, total: Option<u64>, visible: bool) -> Self {
        let show = if !visible {
            Show::Nothing
        } else if std::io::stderr().is_terminal() {
            let (bar, template) = match total {
                Some(total) => {
                    (ProgressBar::new(total), "{msg:24} {bar:32} {human_pos} of {human_len}  {per_sec}  {eta}")
                }
                None => (ProgressBar::no_length(), "{msg:24} {human_pos}  {per_sec}"),
            };
            bar.set_draw_target(indicatif::ProgressDrawTarget::stderr_with_hz(DRAWS_A_SECOND));
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(what.clone());
            Show::Bar(bar)
        } else {
            Show::Lines { printed: false }
        };
        let now = Instant::now();
        Self { what, total, done: 0, looked_at: 0, started: now, last_line: now, show }
    }

    /// `count` more are done.
    pub fn inc(&mut self, count: u64) {
        self.done += count;
        if self.done - self.looked_at < UNITS_BETWEEN_LOOKS {
            return;
        }
        self.looked_at = self.done;
        match &mut self.show {
            Show::Bar(bar) => bar.set_position(self.done),
            Show::Lines { printed } if self.last_line.elapsed() >= LINE_INTERVAL => {
                self.last_line = Instant::now();
                *printed = true;
                eprintln!("{}", line(&self.what, self.done, self.total, self.started.elapsed()));
            }
            Show::Lines { .. } | Show::Nothing => {}
        }
    }

    /// How many are done.
    #[must_use]
    pub const fn done(&self) -> u64 {
        self.done
    }

    /// Since when.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends it: the bar goes away, a log that saw lines gets a last one.
    pub fn finish(self) {
        match self.show {
            Show::Bar(bar) => bar.finish_and_clear(),
            Show::Lines { printed: true } => {
                eprintln!("{}: done", line(&self.what, self.done, self.total, self.started.elapsed()));
            }
            Show::Lines { printed: false } | Show::Nothing => {}
        }
    }
}

fn line(what: &str, done: u64, total: Option<u64>, elapsed: Duration) -> String {
    let of = total.map(|total| format!(" of {}", thousands(total))).unwrap_or_default();
    format!("{what}: {}{of} ({}/s)", thousands(done), thousands(rate(done, elapsed)))
}

/// How many a second.
#[must_use]
pub fn rate(done: u64, elapsed: Duration) -> u64 {
    let millis = elapsed.as_millis().max(1);
    u64::try_from(u128::from(done) * 1000 / millis).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let cases: [(i128, &str); 6] =
            [(0, "0"), (999, "999"), (1_000, "1,000"), (22_103, "22,103"), (-1_234_567, "-1,234,567"), (-12, "-12")];
        for (number, text) in cases {
            assert_eq!(thousands(number), text);
        }
    }

    #[test]
    fn bytes_use_the_unit_that_fits() {
        for (count, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(bytes(count), text);
        }
    }

    #[test]
    fn a_rate_needs_no_whole_second() {
        assert_eq!(rate(50, Duration::from_millis(100)), 500);
        assert_eq!(rate(50, Duration::ZERO), 50_000);
    }
}
