//! `lomash dlq`: looks through the dead letters, brings their messages back, or removes them.
//!
//! Works on `DEAD_LETTERS` itself, as an administrator, and does nothing of its own: what redriving means is in
//! `lomash_ledger::dead_letter`, as for HTTP. Letters are bytes from outside: they are shown with control characters
//! escaped, and cut. Whatever changes something needs `--yes`; without it, it says what it would do.

use std::collections::VecDeque;
use std::io::Write;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use futures::{StreamExt, stream};
use lomash_contract::Timestamp;
use lomash_ledger::dead_letter::{Filter, Letter, Letters, LettersError, Redriven, STREAM, Way, Whole};
use lomash_platform::nats;
use serde::Serialize;

use crate::output::{self, Cell, Progress};

/// How long NATS may take to answer.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Letters read at once.
const PAGE: usize = 500;

/// Letters redriven or discarded at once.
const IN_FLIGHT: usize = 16;

/// Letters that a list shows when it is not told how many.
const SHOWN: usize = 50;

/// Failures that are shown one by one.
const FAILURES_SHOWN: usize = 20;

/// Characters of a reason in a list.
const REASON_CHARS: usize = 100;

/// Characters of a payload that are shown.
const PAYLOAD_CHARS: usize = 2_000;

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash dlq";

/// What to do with dead letters.
#[derive(Clone, Debug, Subcommand)]
pub enum DlqCommand {
    /// List them, the newest last.
    List(ListArgs),
    /// Show one with its headers and payload.
    Show(ShowArgs),
    /// Bring messages back: on their original subject, or before the consumer that gave them up.
    Redrive(ChangeArgs),
    /// Remove letters for good.
    Discard(ChangeArgs),
}

/// Where the letters are.
#[derive(Clone, Debug, Args)]
pub struct Server {
    /// The servers.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Which letters.
#[derive(Clone, Debug, Default, Args)]
pub struct Which {
    /// Of this consumer.
    #[arg(long, value_name = "NAME")]
    pub consumer: Option<String>,
    /// With this text in the reason.
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Whose message was published on this subject.
    #[arg(long, value_name = "SUBJECT")]
    pub subject: Option<String>,
    /// That died at this moment or later: RFC 3339, or how long ago (`90s`, `30m`, `2h`, `7d`).
    #[arg(long, value_name = "WHEN")]
    pub since: Option<Moment>,
    /// That died before this moment.
    #[arg(long, value_name = "WHEN")]
    pub until: Option<Moment>,
}

impl Which {
    fn filter(&self) -> Filter {
        Filter {
            consumer: self.consumer.clone(),
            reason: self.reason.clone(),
            subject: self.subject.clone(),
            since: self.since.map(|moment| moment.0),
            until: self.until.map(|moment| moment.0),
        }
    }

    fn says_nothing(&self) -> bool {
        let texts = [&self.consumer, &self.reason, &self.subject];
        texts.iter().all(|text| text.is_none()) && self.since.is_none() && self.until.is_none()
    }
}

/// A moment on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(pub Timestamp);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ago = text.char_indices().last().and_then(|(at, unit)| {
            let seconds = [('s', 1), ('m', 60), ('h', 3_600), ('d', 86_400)].iter().find(|(name, _)| *name == unit)?.1;
            let count: u32 = text[..at].parse().ok()?;
            Timestamp::now().get().checked_sub(time::Duration::seconds(i64::from(count) * seconds))
        });
        match ago {
            Some(moment) => Ok(Self(Timestamp::new(moment))),
            None => text
                .parse()
                .map(Self)
                .map_err(|_| format!("`{text}` is no moment: write 2026-01-31T09:30:00Z, or 2h for two hours ago")),
        }
    }
}

/// Arguments of `lomash dlq list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    which: Which,
    /// How many, of the newest.
    #[arg(long, default_value_t = SHOWN, conflicts_with = "all")]
    limit: usize,
    /// All of them.
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    server: Server,
}

/// Arguments of `lomash dlq show`.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// The letter: its sequence in the list.
    sequence: u64,
    /// Write the payload to standard output as it is, and nothing else.
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    server: Server,
}

/// Arguments of `lomash dlq redrive` and `lomash dlq discard`.
#[derive(Clone, Debug, Args)]
pub struct ChangeArgs {
    /// The letters: their sequences in the list.
    sequences: Vec<u64>,
    #[command(flatten)]
    which: Which,
    /// All letters that are there now, when nothing else says which.
    #[arg(long, conflicts_with = "sequences")]
    all: bool,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Do it.
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    #[command(flatten)]
    server: Server,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Redrive,
    Discard,
}

/// Runs the command. It succeeds when all that was asked for was done, or shown.
///
/// # Errors
/// When the letters cannot be read.
pub async fn run(command: DlqCommand) -> anyhow::Result<ExitCode> {
    match command {
        DlqCommand::List(args) => list(args).await,
        DlqCommand::Show(args) => show(args).await,
        DlqCommand::Redrive(args) => change(Change::Redrive, args).await,
        DlqCommand::Discard(args) => change(Change::Discard, args).await,
    }
}

async fn letters(server: &Server) -> anyhow::Result<Letters> {
    let connecting = server.servers.connect(CLIENT_NAME);
    let (client, _) = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| {
        anyhow!("NATS does not answer within {} s; is it running, and is NATS_URL right?", CONNECT_TIMEOUT.as_secs())
    })??;
    Ok(Letters::new(async_nats::jetstream::new(client)))
}

/// The letters that are there now and fit, page by page; what comes meanwhile is left for the next time.
struct Walk<'l> {
    letters: &'l Letters,
    filter: Filter,
    after: u64,
    end: Option<u64>,
    is_done: bool,
    progress: Progress,
}

impl<'l> Walk<'l> {
    fn new(letters: &'l Letters, filter: Filter) -> Self {
        Self { letters, filter, after: 0, end: None, is_done: false, progress: Progress::counting("reading letters") }
    }

    async fn next(&mut self) -> anyhow::Result<Option<Vec<Letter>>> {
        if self.is_done {
            return Ok(None);
        }
        let page = self.letters.page(&self.filter, self.after, PAGE).await?;
        let end = *self.end.get_or_insert(page.as_of);
        self.after = page.next.unwrap_or(end);
        self.is_done = page.next.is_none() || self.after >= end;
        self.progress.inc(page.letters.len() as u64);
        Ok(Some(page.letters.into_iter().filter(|letter| letter.sequence <= end).collect()))
    }
}

// ── Looking ─────────────────────────────────────────────────────────────────────────────────────────────────────

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    letters: Vec<Letter>,
    /// Letters that fit, shown or not.
    fitting: u64,
    /// The last sequence of `DEAD_LETTERS`.
    as_of: u64,
}

async fn list(args: ListArgs) -> anyhow::Result<ExitCode> {
    let letters = letters(&args.server).await?;
    let limit = if args.all { usize::MAX } else { args.limit };
    let mut walk = Walk::new(&letters, args.which.filter());
    let (mut newest, mut fitting) = (VecDeque::new(), 0);
    while let Some(page) = walk.next().await? {
        fitting += page.len() as u64;
        newest.extend(page.into_iter().map(without_content));
        newest.drain(..newest.len().saturating_sub(limit));
    }
    let as_of = walk.end.unwrap_or(0);
    walk.progress.finish();
    let listed = Listed { letters: newest.into(), fitting, as_of };
    if args.server.json {
        output::print_json(&listed)?;
    } else {
        output::print(render(&listed));
    }
    Ok(ExitCode::SUCCESS)
}

/// A list may be long; payloads are not shown in it.
fn without_content(letter: Letter) -> Letter {
    Letter { payload: bytes::Bytes::new(), headers: async_nats::HeaderMap::new(), ..letter }
}

fn render(listed: &Listed) -> String {
    let mut text = String::new();
    if !listed.letters.is_empty() {
        text.push_str(&format!("{}\n", table(&listed.letters)));
    }
    let hidden = listed.fitting - listed.letters.len() as u64;
    if hidden > 0 {
        text.push_str(&format!("and {} older ones; --all lists them\n", output::thousands(hidden)));
    }
    let (fitting, as_of) = (output::thousands(listed.fitting), output::thousands(listed.as_of));
    text.push_str(&format!("{fitting} dead letters, from {STREAM} as of sequence {as_of}.\n"));
    text
}

fn table(letters: &[Letter]) -> output::Table {
    let mut table = output::table(&["letter", "died", "consumer", "tries", "redriven", "from", "why"]);
    for letter in letters {
        let from = letter.origin.as_ref().map_or_else(
            || "unknown".to_owned(),
            |origin| format!("{} {}", shown(&origin.stream, 40).0, output::thousands(origin.sequence)),
        );
        let (reason, is_cut) = shown(&letter.reason, REASON_CHARS);
        table.add_row([
            // Not with thousands separated: it is typed in again.
            Cell::new(letter.sequence),
            Cell::new(letter.died_at),
            Cell::new(shown(&letter.consumer, 40).0),
            output::number_cell(letter.attempts),
            output::number_cell(u64::from(letter.past.redrives)),
            Cell::new(from),
            Cell::new(if is_cut { format!("{reason}…") } else { reason }),
        ]);
    }
    table
}

async fn show(args: ShowArgs) -> anyhow::Result<ExitCode> {
    let letter = letters(&args.server).await?.get(args.sequence).await?;
    if args.raw {
        let mut output = output::Output::new();
        output.write_all(&letter.payload).and_then(|()| output.flush()).context("the payload cannot be written")?;
        if let Some(bytes) = letter.cut.and_then(|cut| cut.payload_bytes) {
            output::tell(format_args!("The letter holds only the beginning of a payload of {}.", output::bytes(bytes)));
        }
    } else if args.server.json {
        output::print_json(&Whole::from(letter))?;
    } else {
        output::print(whole(&letter));
    }
    Ok(ExitCode::SUCCESS)
}

fn whole(letter: &Letter) -> String {
    let mut table = output::table(&["", &format!("dead letter {}", letter.sequence)]);
    let mut row = |name: &str, value: &str| {
        if !value.is_empty() {
            table.add_row([Cell::new(name), Cell::new(shown(value, PAYLOAD_CHARS).0)]);
        }
    };
    row("why", &letter.reason);
    row("died", &letter.died_at.to_string());
    row("consumer", &letter.consumer);
    row("tries", &output::thousands(letter.attempts));
    if let Some(origin) = &letter.origin {
        row("from", &format!("{} {}", origin.stream, origin.sequence));
        row("subject", &origin.subject);
        row("message id", origin.message_id.as_deref().unwrap_or_default());
    }
    if letter.past.redrives > 0 {
        row("redriven", &format!("{} times", letter.past.redrives));
    }
    for death in &letter.past.history {
        row("died before", death);
    }
    for (name, values) in letter.headers.iter() {
        for value in values {
            row(&format!("header {}", shown(name.as_ref(), 100).0), value.as_str());
        }
    }
    if let Some(cut) = letter.cut {
        row("cut", &format!("holds only what fits of its message's {cut}; all of it is in the stream it came from"));
    }
    row("redriving", &Letters::preview(letter).unwrap_or_else(|problem| problem.to_string()));
    let (payload, is_cut) = shown(&String::from_utf8_lossy(&letter.payload), PAYLOAD_CHARS);
    let size = output::bytes(letter.bytes as u64);
    let mut text = format!("{table}\nPayload, {size}");
    if is_cut {
        text.push_str(&format!(
            ", the first {} characters; --raw writes all of it",
            output::thousands(PAYLOAD_CHARS as u64)
        ));
    }
    if std::str::from_utf8(&letter.payload).is_err() {
        text.push_str(", no text: what is unreadable is shown as �");
    }
    text.push_str(&format!(":\n{payload}\n"));
    text
}

/// A text from outside as it may be shown in a terminal, and whether it was cut: no control characters, and none that turn
/// the direction of what follows.
fn shown(text: &str, chars: usize) -> (String, bool) {
    let mut safe = String::new();
    for letter in text.chars().take(chars) {
        let is_deceptive =
            matches!(letter, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}');
        if letter.is_control() || is_deceptive {
            safe.extend(letter.escape_default());
        } else {
            safe.push(letter);
        }
    }
    (safe, text.chars().nth(chars).is_some())
}

// ── Changing ────────────────────────────────────────────────────────────────────────────────────────────────────

/// What became, or would become, of a letter.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    letter: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    done: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    redriven: Option<Redriven>,
    #[serde(skip_serializing_if = "Option::is_none")]
    would: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Changed {
    /// Whether anything was done at all.
    dry_run: bool,
    done: u64,
    failed: u64,
    /// In JSON all, for people the first failures.
    outcomes: Vec<Outcome>,
}

async fn change(change: Change, args: ChangeArgs) -> anyhow::Result<ExitCode> {
    let verb = if change == Change::Redrive { "redrive" } else { "discard" };
    if args.sequences.is_empty() && args.which.says_nothing() && !args.all {
        bail!("say which letters to {verb}: their sequences, a filter such as --consumer, or --all");
    }
    let letters = letters(&args.server).await?;
    let mut changed = Changed { dry_run: !args.yes, ..Changed::default() };
    let keeps_all = args.server.json;
    let mut take = |outcome: Outcome| {
        let failed = outcome.problem.is_some();
        changed.done += u64::from(!failed);
        changed.failed += u64::from(failed);
        if keeps_all || ((failed || outcome.would.is_some()) && changed.outcomes.len() < FAILURES_SHOWN) {
            changed.outcomes.push(outcome);
        }
    };
    let filter = args.which.filter();
    let one = async |found: Result<Letter, LettersError>, sequence: u64| {
        let outcome = Outcome { letter: sequence, done: None, redriven: None, would: None, problem: None };
        let letter = match found {
            Ok(letter) if filter.fits(&letter) => letter,
            Ok(_) => return Outcome { problem: Some("it does not fit the filter".to_owned()), ..outcome },
            Err(problem) => return Outcome { problem: Some(problem.to_string()), ..outcome },
        };
        match do_one(&letters, change, args.yes, &letter).await {
            Ok(done) => Outcome { letter: sequence, ..done },
            Err(problem) => Outcome { problem: Some(problem.to_string()), ..outcome },
        }
    };
    if args.sequences.is_empty() {
        let mut walk = Walk::new(&letters, filter.clone());
        loop {
            let page = match walk.next().await {
                Ok(None) => break,
                Ok(Some(page)) => page.into_iter().map(without_content),
                Err(problem) => {
                    let (done, failed) = (output::thousands(changed.done), output::thousands(changed.failed));
                    return Err(problem).with_context(|| {
                        format!(
                            "stopped after letter {}: {done} done, {failed} failed before; the same command goes on with the \
                             letters that are left",
                            walk.after
                        )
                    });
                }
            };
            let mut outcomes = stream::iter(page.map(|letter| {
                let sequence = letter.sequence;
                one(Ok(letter), sequence)
            }))
            .buffered(IN_FLIGHT);
            while let Some(outcome) = outcomes.next().await {
                take(outcome);
            }
        }
        walk.progress.finish();
    } else {
        let mut sequences = args.sequences.clone();
        sequences.sort_unstable();
        sequences.dedup();
        let of = async |sequence| one(letters.get(sequence).await, sequence).await;
        let mut outcomes = stream::iter(sequences.into_iter().map(of)).buffered(IN_FLIGHT);
        while let Some(outcome) = outcomes.next().await {
            take(outcome);
        }
    }
    if args.server.json {
        output::print_json(&changed)?;
    } else {
        tell(verb, &changed);
        if !args.yes && !args.dry_run {
            output::say(format_args!("Nothing was done: add --yes to {verb} them."));
        }
    }
    let is_well = changed.failed == 0 && (args.yes || args.dry_run);
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn do_one(letters: &Letters, change: Change, yes: bool, letter: &Letter) -> Result<Outcome, LettersError> {
    let mut outcome = Outcome { letter: letter.sequence, done: None, redriven: None, would: None, problem: None };
    match (change, yes) {
        (Change::Redrive, false) => outcome.would = Some(Letters::preview(letter)?),
        (Change::Discard, false) => outcome.would = Some("would be removed for good".to_owned()),
        (Change::Redrive, true) => {
            let redriven = letters.redrive(letter.sequence).await?;
            outcome.done = Some(match &redriven.way {
                Way::Republished { stream, sequence, .. } => format!("is in {stream} again, as {sequence}"),
                Way::ToConsumer { consumer, .. } => format!("is put before {consumer} again"),
            });
            outcome.redriven = Some(redriven);
        }
        (Change::Discard, true) => {
            letters.discard(letter.sequence).await?;
            outcome.done = Some("is removed".to_owned());
        }
    }
    Ok(outcome)
}

fn tell(verb: &str, changed: &Changed) {
    for Outcome { letter, would, problem, .. } in &changed.outcomes {
        if let Some(problem) = problem {
            output::tell(format_args!("letter {letter}: {}", shown(problem, 1_000).0));
        } else if let Some(would) = would {
            output::say(format_args!("letter {letter} {}", shown(would, 1_000).0));
        }
    }
    let more =
        (changed.failed + if changed.dry_run { changed.done } else { 0 }).saturating_sub(changed.outcomes.len() as u64);
    if more > 0 {
        output::say(format_args!("and {} more; --json lists them all", output::thousands(more)));
    }
    let (done, failed) = (output::thousands(changed.done), output::thousands(changed.failed));
    let did = match (verb, changed.dry_run) {
        ("redrive", false) => "redriven",
        ("redrive", true) => "would be redriven",
        (_, false) => "discarded",
        (_, true) => "would be discarded",
    };
    output::say(format_args!("{done} {did}, {failed} failed."));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_does_nothing_to_a_terminal() {
        let (text, is_cut) = shown("a\u{1b}[2J\r\nb\u{202e}c ü", 100);
        assert_eq!((text.as_str(), is_cut), ("a\\u{1b}[2J\\r\\nb\\u{202e}c ü", false));
        assert_eq!(shown("äöü", 2), ("äö".to_owned(), true));
        assert_eq!(shown("äö", 2), ("äö".to_owned(), false));
    }

    #[test]
    fn moments_are_read() {
        let exact: Moment = "2026-01-31T09:30:00Z".parse().expect("a moment");
        assert_eq!(exact.0.to_string(), "2026-01-31T09:30:00.000Z");
        let ago: Moment = "2h".parse().expect("a moment");
        let off = Timestamp::now().get() - ago.0.get() - time::Duration::hours(2);
        assert!(off.abs() < time::Duration::minutes(1), "{off}");
        for text in ["", "h", "2", "yesterday", "-1h", "99999999999d", "2026-01-31", "é"] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }
}
