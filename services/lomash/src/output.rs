//! How every command shows things: text, tables, progress and numbers.
//!
//! Results go to standard output, progress and problems to standard error, so that `--json` and pipes stay clean. A terminal
//! gets a bar; anything else (a log, CI) gets a counted line every few seconds.
//!
//! All that this program prints goes through here, never through `println!`, which panics when whoever reads has gone away:
//! `lomash status --json | head -1` is no failure. What is printed after that is dropped, and [`closed`] says so to commands that
//! go on for long. Whatever else keeps a result from being written (a full disk) is kept for [`problem`].
//!
//! Text is wrapped at blanks to the width of the terminal (`COLUMNS` if that is set, 80 if it does not say). What is no terminal
//! has no width: each line of a log is one line, whoever watches.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

mod table;

pub use table::{Cell, Table, wrapped};

/// Columns of a terminal that does not say how many it has.
const USUAL_COLUMNS: usize = 80;

/// Fewer are taken for so many.
const LEAST_COLUMNS: usize = 20;

/// How often progress is reported where there is no terminal.
pub const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How often a bar is drawn, at most: drawing must not slow down what it shows.
const DRAWS_A_SECOND: u8 = 10;

/// A line with a bar and figures of ten million has so many columns.
const BAR_COLUMNS: usize = 110;

/// How many units pass between two looks at the clock.
const UNITS_BETWEEN_LOOKS: u64 = 256;

/// A digest as text.
#[must_use]
pub fn hex(digest: impl AsRef<[u8]>) -> String {
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

// ── Where it goes ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Cancelled when whoever reads standard output has gone away.
static CLOSED: LazyLock<CancellationToken> = LazyLock::new(CancellationToken::new);

/// Why standard output could not be written, for another reason than that.
static PROBLEM: Mutex<Option<io::Error>> = Mutex::new(None);

/// Completes when whoever reads standard output has gone away; seen at the first write after that.
pub async fn closed() {
    CLOSED.cancelled().await;
}

/// Whether that has happened.
#[must_use]
pub fn is_closed() -> bool {
    CLOSED.is_cancelled()
}

/// Why not all that was printed has arrived, unless nobody wanted it any more.
///
/// # Errors
/// The first problem there was.
pub fn problem() -> anyhow::Result<()> {
    match PROBLEM.lock().unwrap_or_else(PoisonError::into_inner).take() {
        None => Ok(()),
        Some(problem) => Err(problem).context("standard output cannot be written"),
    }
}

/// Standard output for writers of much: a command that is told that nobody reads any more should end.
#[derive(Debug)]
pub struct Output(io::Stdout);

impl Output {
    /// The one there is.
    #[must_use]
    pub fn new() -> Self {
        Self(io::stdout())
    }
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).inspect_err(noted)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().inspect_err(noted)
    }
}

fn noted(problem: &io::Error) {
    if problem.kind() == io::ErrorKind::BrokenPipe {
        CLOSED.cancel();
    }
}

/// Whether a command failed by nothing but that nobody reads its output any more.
#[must_use]
pub fn is_unread(error: &anyhow::Error) -> bool {
    let is_broken_pipe = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
    };
    is_closed() && error.chain().any(is_broken_pipe)
}

fn put(text: &str) {
    if is_closed() {
        return;
    }
    let mut output = Output::new();
    if let Err(problem) = output.write_all(text.as_bytes()).and_then(|()| output.flush())
        && problem.kind() != io::ErrorKind::BrokenPipe
    {
        PROBLEM.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(problem);
    }
}

/// Prints a result, wrapped to the terminal, and ends the line.
pub fn say(text: impl Display) {
    print(format_args!("{text}\n"));
}

/// The same for text that ends its lines itself.
pub fn print(text: impl Display) {
    put(&fitted(&text.to_string(), width()));
}

/// Prints text for programs, as it is.
pub fn print_whole(text: impl Display) {
    put(&text.to_string());
}

/// Prints a line that is copied from here to elsewhere: never broken.
pub fn say_whole(text: impl Display) {
    put(&format!("{text}\n"));
}

/// Says on standard error how it goes, or what is wrong. Nobody may be reading: that is no reason to stop.
pub fn tell(text: impl Display) {
    static WIDTH: OnceLock<Option<usize>> = OnceLock::new();
    let width = *WIDTH.get_or_init(|| width_of(&io::stderr()));
    let _ = io::stderr().lock().write_all(fitted(&format!("{text}\n"), width).as_bytes());
}

/// The same for what programs read.
pub fn tell_whole(text: impl Display) {
    let _ = io::stderr().lock().write_all(format!("{text}\n").as_bytes());
}

fn fitted(text: &str, width: Option<usize>) -> String {
    let Some(width) = width else { return text.to_owned() };
    let lines = text.split('\n').flat_map(|line| wrapped(line, width));
    lines.collect::<Vec<_>>().join("\n")
}

/// How many columns standard output has, if that is limited.
#[must_use]
pub fn width() -> Option<usize> {
    static WIDTH: OnceLock<Option<usize>> = OnceLock::new();
    *WIDTH.get_or_init(|| width_of(&io::stdout()))
}

fn width_of(stream: &(impl AsFd + IsTerminal)) -> Option<usize> {
    let size = terminal_size::terminal_size_of(stream).map(|(width, _)| usize::from(width.0));
    columns(std::env::var("COLUMNS").ok().as_deref(), stream.is_terminal(), size)
}

/// As `COLUMNS` says, as the terminal says, or as terminals are.
fn columns(variable: Option<&str>, is_terminal: bool, size: Option<usize>) -> Option<usize> {
    let asked = variable.and_then(|text| text.trim().parse().ok()).filter(|columns| *columns > 0);
    let found = || is_terminal.then(|| size.filter(|columns| *columns > 0).unwrap_or(USUAL_COLUMNS));
    asked.or_else(found).map(|columns: usize| columns.max(LEAST_COLUMNS))
}

// ── What it looks like ──────────────────────────────────────────────────────────────────────────────────────────────

/// An empty table in the one style of this program.
#[must_use]
pub fn table(header: &[&str]) -> Table {
    Table::new(header)
}

/// A cell with a number: thousands separated, on the right.
#[must_use]
pub fn number_cell(number: u64) -> Cell {
    Cell::right(thousands(number))
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
    say_whole(text);
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
        } else if io::stderr().is_terminal() {
            let is_wide = width_of(&io::stderr()).is_some_and(|columns| columns > BAR_COLUMNS);
            let (bar, template) = match total {
                Some(total) if is_wide => {
                    (ProgressBar::new(total), "{msg:24} {bar:32} {human_pos} of {human_len}  {per_sec}  {eta}")
                }
                Some(total) => (ProgressBar::new(total), "{human_pos} of {human_len}  {eta}"),
                None if is_wide => (ProgressBar::no_length(), "{msg:24} {human_pos}  {per_sec}"),
                None => (ProgressBar::no_length(), "{human_pos}  {per_sec}"),
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
                tell(line(&self.what, self.done, self.total, self.started.elapsed()));
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
                tell(format_args!("{}: done", line(&self.what, self.done, self.total, self.started.elapsed())));
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
    fn a_terminal_has_the_width_that_it_is_said_to_have() {
        for (variable, is_terminal, size, expected) in [
            (None, true, Some(132), Some(132)),
            (None, true, None, Some(80)),
            (None, true, Some(0), Some(80)),
            (None, true, Some(7), Some(20)),
            (None, false, None, None),
            (None, false, Some(132), None),
            (Some("40"), true, Some(132), Some(40)),
            (Some("100"), false, None, Some(100)),
            (Some("0"), true, None, Some(80)),
            (Some("wide"), false, None, None),
            (Some(""), false, None, None),
        ] {
            assert_eq!(columns(variable, is_terminal, size), expected, "{variable:?} {is_terminal} {size:?}");
        }
    }

    #[test]
    fn text_is_broken_at_blanks_and_a_log_is_not_broken() {
        let text = "violates 1: the events 7 and 8 share an id\n\n  noted here\n";
        assert_eq!(fitted(text, None), text);
        assert_eq!(fitted(text, Some(80)), text);
        let broken = "violates 1: the events 7\nand 8 share an id\n\n  noted here\n";
        assert_eq!(fitted(text, Some(24)), broken);
    }

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
