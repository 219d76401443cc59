//! `lomash backup`: the streams in an archive, consistent as of one sequence of the ledger, while traffic goes on.
//!
//! Owns what is kept and the order in which it is cut. Kept are `INVENTORY`, `ORDERS`, `DEAD_LETTERS` and `NOTIFICATIONS` with
//! their definitions and durable consumers. `ADVISORIES`, `JOBS` and `OBJ_SNAPSHOTS` are not: clocks and snapshots are made
//! anew by the services, and what suspects are concerned see step 3. Reads by direct gets, so the operator's key is enough.
//!
//! The order of the cut:
//!
//! 1. Checkpoints of the projections, if a database is named. They are for people: what they stand for is in the ledger.
//! 2. Up to where each consumer has acknowledged.
//! 3. Suspects (`ADVISORIES`): a message is handed over to be tried alone *before* it is acknowledged, so every suspect among
//!    what step 2 counts as acknowledged is there now, or is settled. The floor is kept below the first that is there.
//! 4. The end of the ledger, S, where an atomic batch ends.
//! 5. The ends of the other streams.
//!
//! Why the whole is consistent at S: an order is acknowledged after it is decided, so every order at or below the floor of
//! step 2 has its decision at or before S, or its dead letter before step 5, or is above the floor by step 3. An order is
//! stored before it is decided, so every decision at or before S finds its order before the end of step 5. An order above
//! the floor is delivered again after a restore: one that was decided is recognised, in the ledger, and one that was not is
//! decided. The same holds for the consumers of the ledger and what their services hold in Postgres.
//!
//! A second run reads only what came since. What a segment holds is not read again, but whether the stream still has as many
//! messages there: letters are removed when they are redriven, and then the (small) stream is read anew. What a stream lost
//! at its beginning, by its limits, stays in the archive until `--prune`.
//!
//! Memory: a batch of messages, a segment being filled and one being compressed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::{self, Context};
use clap::Args;
use futures::StreamExt;
use lomash_ledger::{StoredMessage, crash_point, dead_letter, direct, streams, suspects};
use lomash_platform::postgres::{ANALYTICS, INVENTORY};
use lomash_platform::{Secret, nats, postgres, schemas};
use serde::Serialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::archive::{
    Archive, ConsumerEntry, FORMAT, Floor, LastMessage, Manifest, Open, Record, Segment, StreamEntry,
};
use crate::output::{self, Cell};
use crate::verify::Show;

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash backup";

/// The streams that are kept. The ledger is restored first and the orders last: orders without the ledger would all be
/// decided again.
pub const KEPT: [&str; 4] = [streams::INVENTORY, dead_letter::STREAM, "NOTIFICATIONS", streams::ORDERS];

/// How often a read that was interrupted is taken up again without having moved.
const MAX_INTERRUPTIONS: u32 = 5;

/// Pause before it is.
const INTERRUPTION_PAUSE: Duration = Duration::from_millis(500);

/// How often the rest of an atomic batch is looked for in which the ledger ended, a [`REST_PAUSE`] apart.
const MAX_LOOKS_FOR_REST: u32 = 50;
const REST_PAUSE: Duration = Duration::from_millis(100);

/// The server's code for what does not exist.
const NOT_FOUND: u64 = 404;

/// Write the streams into an archive, or what came since it was last written.
#[derive(Clone, Debug, Args)]
pub struct BackupArgs {
    /// Folder of the archive; made when it is missing.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Prove the hashes of what is in the folder, and read no server.
    #[arg(long, conflicts_with = "prune")]
    pub check: bool,
    /// Drop segments of which the stream has no message any more.
    #[arg(long)]
    pub prune: bool,
    /// Who asks: the operator.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// The Postgres database of the projections: then it is kept where they stood.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<Secret>,
    /// Print what was done as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What became of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Copied {
    /// The stream.
    pub stream: String,
    /// Where it ended.
    pub last_sequence: u64,
    /// Messages in the archive.
    pub messages: u64,
    /// Segments in the archive.
    pub segments: usize,
    /// Their length.
    pub bytes: u64,
    /// Messages that were read this time.
    pub new_messages: u64,
    /// Segments that were written this time.
    pub new_segments: usize,
    /// Their length.
    pub new_bytes: u64,
    /// Segments that were dropped because the stream has no message of them any more.
    pub pruned_segments: usize,
    /// Messages in the archive that the stream lost to its limits.
    pub kept_beyond: u64,
    /// Whether it was read from its beginning because messages within what was kept are gone.
    pub anew: bool,
}

/// What a backup came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The archive.
    pub archive: PathBuf,
    /// The sequence of the ledger as of which it is consistent.
    pub ledger_sequence: u64,
    /// By stream.
    pub streams: Vec<Copied>,
    /// Where the projections stood.
    pub checkpoints: Option<BTreeMap<String, u64>>,
    /// Files that an interrupted backup had left.
    pub strays_removed: u64,
    /// How long it took.
    pub seconds: f64,
}

/// Runs the command.
///
/// # Errors
/// When a stream cannot be read or the archive not written; what the archive held before is then still valid.
pub async fn run(args: BackupArgs) -> Result<ExitCode> {
    if args.check {
        let checked = check(&args.dir, Show::Progress).await?;
        if args.json {
            output::print_json(&checked)?;
        } else {
            output::print(render_checked(&checked));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (client, refusals) = args.servers.connect(CLIENT_NAME).await?;
    let context = jetstream::new(client);
    let options = Options { prune: args.prune, show: Show::Progress };
    let summary = refusals.guard(backup(&context, &args.dir, args.database_url.as_ref(), options)).await??;
    if args.json {
        output::print_json(&summary)?;
    } else {
        output::print(render(&summary));
    }
    Ok(ExitCode::SUCCESS)
}

/// How a backup is made.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether segments are dropped of which the stream has no message any more.
    pub prune: bool,
    /// Whether progress is shown.
    pub show: Show,
}

/// Brings the archive in `dir` up to what the servers hold now.
///
/// # Errors
/// When a stream cannot be read, is not the one of the archive, or the archive cannot be written.
pub async fn backup(
    context: &Context,
    dir: &Path,
    database_url: Option<&Secret>,
    Options { prune, show }: Options,
) -> Result<Summary> {
    let started = Instant::now();
    let archive = Archive::lock(dir).await?;
    let before = archive.manifest()?;
    let strays_removed = archive.remove_strays(before.as_ref())?;

    let checkpoints = match database_url {
        Some(url) => Some(checkpoints(url).await?),
        None => None,
    };
    let taken_at = OffsetDateTime::now_utc().format(&Rfc3339).context("the time cannot be written")?;
    let cuts = cut(context).await?;
    let ledger_sequence = cuts.iter().find(|cut| cut.name == streams::INVENTORY).map_or(0, |cut| cut.last_sequence);
    // All of them, before a byte is written: an archive is of one system.
    for cut in &cuts {
        if let Some(entry) = before.as_ref().and_then(|manifest| manifest.stream(&cut.name)) {
            is_the_same(context, entry, cut, dir).await?;
        }
    }

    let (mut entries, mut copied) = (Vec::new(), Vec::new());
    for cut in cuts {
        let entry = before.as_ref().and_then(|manifest| manifest.stream(&cut.name));
        let copying = Copying { context, archive: &archive, cut, prune, show };
        let (entry, copy) = copying.copy(entry).await?;
        entries.push(entry);
        copied.push(copy);
    }
    let manifest = Manifest {
        format: FORMAT,
        program: concat!("lomash ", env!("CARGO_PKG_VERSION")).to_owned(),
        taken_at,
        ledger_sequence,
        streams: entries,
        checkpoints: checkpoints.clone(),
    };
    crash_point!("backup-before-manifest");
    archive.replace_manifest(&manifest)?;
    crash_point!("backup-after-manifest");
    archive.remove_strays(Some(&manifest))?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Summary { archive: dir.to_owned(), ledger_sequence, streams: copied, checkpoints, strays_removed, seconds })
}

// ── The cut ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// A stream up to where it is kept.
#[derive(Clone, Debug)]
struct Cut {
    name: String,
    created: String,
    config: Map<String, Value>,
    first_sequence: u64,
    last_sequence: u64,
    /// What the server held up to its end; the ledger may have grown beyond `last_sequence`.
    messages: u64,
    consumers: Vec<ConsumerEntry>,
}

/// Where everything is cut; see the module for the order.
async fn cut(context: &Context) -> Result<Vec<Cut>> {
    let mut consumers: BTreeMap<&str, Vec<ConsumerEntry>> = BTreeMap::new();
    for definition in streams::definitions() {
        let Some(stream) = KEPT.into_iter().find(|kept| *kept == definition.name) else { continue };
        for (name, _) in definition.consumers.into_iter().filter(|(_, config)| streams::keeps_a_place(config)) {
            if let Some(consumer) = consumer(context, stream, &name).await? {
                consumers.entry(stream).or_default().push(consumer);
            }
        }
    }
    for case in open_cases(context).await? {
        for consumer in consumers.get_mut(case.stream.as_str()).into_iter().flatten() {
            let floor = &mut consumer.ack_floor;
            if consumer.name == case.consumer && floor.stream_sequence >= case.stream_seq {
                floor.stream_sequence = case.stream_seq.saturating_sub(1);
            }
        }
    }
    let mut cuts = Vec::new();
    for stream in KEPT {
        let mut cut = stream_now(context, stream).await?;
        cut.consumers = consumers.remove(stream).unwrap_or_default();
        if stream == streams::INVENTORY {
            ensure!(
                cut.first_sequence <= 1 && cut.messages == cut.last_sequence,
                "INVENTORY has {} messages and ends at {}: messages are missing, and such a ledger is not backed up over a \
                 good one; run `lomash verify`",
                cut.messages,
                cut.last_sequence
            );
            cut.last_sequence = end_of_batch(context, cut.last_sequence).await?;
            cut.messages = cut.last_sequence;
        }
        for consumer in &cut.consumers {
            // A leader that was frozen and wakes answers from its past.
            ensure!(
                consumer.ack_floor.stream_sequence <= cut.last_sequence,
                "{stream} ends at {} and {} has acknowledged up to {}: the cluster is changing leaders; run the backup again",
                cut.last_sequence,
                consumer.name,
                consumer.ack_floor.stream_sequence
            );
        }
        cuts.push(cut);
    }
    Ok(cuts)
}

async fn ask(context: &Context, subject: String) -> Result<Option<Value>> {
    let answer: Value = context
        .request(subject.clone(), &json!({}))
        .await
        .with_context(|| format!("{subject} is not answered; is JetStream there, and may this identity look at it?"))?;
    match answer.pointer("/error/code").and_then(Value::as_u64) {
        None => Ok(Some(answer)),
        Some(NOT_FOUND) => Ok(None),
        Some(_) => bail!("{subject}: {}", answer["error"]),
    }
}

fn text(answer: &Value, pointer: &str) -> Result<String> {
    let text = answer.pointer(pointer).and_then(Value::as_str);
    text.map(str::to_owned).with_context(|| format!("an answer has no {pointer}"))
}

fn number(answer: &Value, pointer: &str) -> Result<u64> {
    answer.pointer(pointer).and_then(Value::as_u64).with_context(|| format!("an answer has no {pointer}"))
}

fn object(answer: &Value, pointer: &str) -> Result<Map<String, Value>> {
    let object = answer.pointer(pointer).and_then(Value::as_object);
    object.cloned().with_context(|| format!("an answer has no {pointer}"))
}

async fn stream_now(context: &Context, name: &str) -> Result<Cut> {
    let info = ask(context, format!("STREAM.INFO.{name}")).await?;
    let info = info.with_context(|| format!("the stream {name} does not exist; is this the right server?"))?;
    Ok(Cut {
        name: name.to_owned(),
        created: text(&info, "/created")?,
        config: object(&info, "/config")?,
        first_sequence: number(&info, "/state/first_seq")?,
        last_sequence: number(&info, "/state/last_seq")?,
        messages: number(&info, "/state/messages")?,
        consumers: Vec::new(),
    })
}

/// A durable consumer as the server has it now; none when it does not exist.
///
/// # Errors
/// When the server does not answer.
pub(crate) async fn consumer(context: &Context, stream: &str, name: &str) -> Result<Option<ConsumerEntry>> {
    let Some(info) = ask(context, format!("CONSUMER.INFO.{stream}.{name}")).await? else { return Ok(None) };
    let ack_floor = Floor {
        consumer_sequence: number(&info, "/ack_floor/consumer_seq")?,
        stream_sequence: number(&info, "/ack_floor/stream_seq")?,
    };
    let (created, config) = (text(&info, "/created")?, object(&info, "/config")?);
    Ok(Some(ConsumerEntry { name: name.to_owned(), created, config, ack_floor }))
}

/// Messages that wait to be tried alone.
async fn open_cases(context: &Context) -> Result<Vec<suspects::Case>> {
    let Some(info) = ask(context, format!("STREAM.INFO.{}", suspects::STREAM)).await? else { return Ok(Vec::new()) };
    let last = number(&info, "/state/last_seq")?;
    let mut messages = direct::read(context, suspects::STREAM, None, 0, last);
    let mut found = Vec::new();
    while let Some(held) = messages.next().await.transpose()? {
        // The server's advisories are of any consumer, and have the same fields.
        found.extend(serde_json::from_slice::<suspects::Case>(&held.payload));
    }
    Ok(found)
}

/// The end of the atomic batch that `last` is in: its rest may be stored just now.
async fn end_of_batch(context: &Context, last: u64) -> Result<u64> {
    let mut sequence = last;
    let mut looks = 0;
    while sequence > 0 {
        let mut there = direct::read(context, streams::INVENTORY, None, sequence - 1, sequence);
        let ends = there.next().await.transpose()?.map(|held| StoredMessage::from(held).ends_batch());
        match ends {
            Some(true) => break,
            Some(false) => sequence += 1,
            None if looks < MAX_LOOKS_FOR_REST => {
                looks += 1;
                tokio::time::sleep(REST_PAUSE).await;
            }
            None => bail!("INVENTORY ends within an atomic batch, before {sequence}; run `lomash verify`"),
        }
    }
    Ok(sequence)
}

/// Where the projections stand that there are.
///
/// # Errors
/// When the database cannot be asked.
pub(crate) async fn checkpoints(url: &Secret) -> Result<BTreeMap<String, u64>> {
    let client = postgres::connect(url).await?;
    let mut found = BTreeMap::new();
    for family in [&INVENTORY, &ANALYTICS] {
        if let Some(sequence) = schemas::checkpoint(&client, family, family.live).await? {
            found.insert(family.live.to_owned(), sequence);
        }
    }
    let table = format!("{}.checkpoint", postgres::NOTIFICATION);
    let there = "SELECT to_regclass($1) IS NOT NULL";
    if client.query_one(there, &[&table]).await.context("Postgres does not answer")?.get(0) {
        let row = client.query_one(&format!("SELECT sequence FROM {table}"), &[]).await;
        let sequence: i64 = row.with_context(|| format!("{table} cannot be read"))?.get(0);
        found.insert(postgres::NOTIFICATION.to_owned(), sequence.unsigned_abs());
    }
    Ok(found)
}

/// Refuses a stream that is not the one of the archive.
async fn is_the_same(context: &Context, entry: &StreamEntry, cut: &Cut, dir: &Path) -> Result<()> {
    let (name, dir) = (&cut.name, dir.display());
    let another = "take the backup into another folder, and keep this one until you know which is wanted";
    ensure!(
        cut.last_sequence >= entry.last_sequence,
        "{name} ends at {} on the server, and {dir} has it up to {}: the stream went backwards or is another one; {another}",
        cut.last_sequence,
        entry.last_sequence
    );
    if let Some(last) = &entry.last_message {
        let mut there = direct::read(context, name, None, last.sequence - 1, last.sequence);
        if let Some(held) = there.next().await.transpose()? {
            ensure!(
                Record::of(held)?.sha256() == last.sha256,
                "message {} of {name} on the server is not the one in {dir}: it is another stream; {another}",
                last.sequence
            );
            return Ok(());
        }
    }
    // Of an empty one there is nothing to mix up.
    ensure!(
        cut.created == entry.created || entry.last_sequence == 0,
        "{name} on the server was made at {}, and the one in {dir} at {}: it is another stream; {another}",
        cut.created,
        entry.created
    );
    Ok(())
}

// ── Copying ─────────────────────────────────────────────────────────────────────────────────────────────────────

struct Copying<'c> {
    context: &'c Context,
    archive: &'c Archive,
    cut: Cut,
    prune: bool,
    show: Show,
}

/// Segments that were written.
#[derive(Default)]
struct Written {
    segments: Vec<Segment>,
    last_message: Option<LastMessage>,
}

impl Copying<'_> {
    async fn copy(self, before: Option<&StreamEntry>) -> Result<(StreamEntry, Copied)> {
        let mut kept: Vec<Segment> = before.map(|entry| entry.segments.clone()).unwrap_or_default();
        let had = kept.len();
        if self.prune {
            kept.retain(|segment| segment.last >= self.cut.first_sequence);
        }
        let pruned_segments = had - kept.len();
        let after = before.map_or(0, |entry| entry.last_sequence);
        let mut last_message = before.and_then(|entry| entry.last_message.clone());
        let mut written = self.read(after).await?;
        let new = written.segments.iter().map(|segment| segment.messages).sum::<u64>();
        let (beyond, still) = self.count(&kept).await?;
        // Messages may go while they are read; then the next backup reads anew what is left.
        let anew = !kept.is_empty() && still + new != self.cut.messages;
        let mut kept_beyond = beyond;
        if anew {
            written = self.read(0).await?;
            kept.clear();
            last_message = None;
            kept_beyond = 0;
        }
        let new_messages = written.segments.iter().map(|segment| segment.messages).sum();
        let (new_segments, new_bytes) =
            (written.segments.len(), written.segments.iter().map(|segment| segment.bytes).sum());
        kept.extend(written.segments);
        let last_message = written.last_message.or(last_message).filter(|_| !kept.is_empty());
        let Cut { name, created, config, last_sequence, consumers, .. } = self.cut;
        let messages = kept.iter().map(|segment| segment.messages).sum();
        let entry =
            StreamEntry { name, created, config, last_sequence, messages, last_message, consumers, segments: kept };
        let copied = Copied {
            stream: entry.name.clone(),
            last_sequence,
            messages,
            segments: entry.segments.len(),
            bytes: entry.bytes(),
            new_messages,
            new_segments,
            new_bytes,
            pruned_segments,
            kept_beyond,
            anew,
        };
        Ok((entry, copied))
    }

    /// Of the messages in these segments: how many lie before the stream's beginning, and how many do not.
    async fn count(&self, segments: &[Segment]) -> Result<(u64, u64)> {
        let first = self.cut.first_sequence;
        let (mut beyond, mut still) = (0, 0);
        for segment in segments {
            if segment.last < first {
                beyond += segment.messages;
            } else if segment.first >= first {
                still += segment.messages;
            } else {
                for record in self.archive.segment(&self.cut.name, segment)? {
                    let counted = if record?.sequence < first { &mut beyond } else { &mut still };
                    *counted += 1;
                }
            }
        }
        Ok((beyond, still))
    }

    /// Reads the messages after sequence `after` into segments, up to where the stream is cut.
    async fn read(&self, after: u64) -> Result<Written> {
        let Cut { name, first_sequence, last_sequence, .. } = &self.cut;
        let mut seen = after.max(first_sequence.saturating_sub(1));
        let folder = self.archive.stream_folder(name)?;
        let mut progress = self.show.progress(&format!("reading {name}"), last_sequence.saturating_sub(seen));
        let mut writing = Writing { folder, open: Open::default(), closing: None, written: Written::default() };
        let mut interruptions = 0;
        while seen < *last_sequence {
            let before = seen;
            let mut messages = direct::read(self.context, name, None, seen, *last_sequence);
            let interrupted = loop {
                match messages.next().await {
                    Some(Ok(held)) => {
                        let sequence = held.sequence;
                        ensure!(
                            name != streams::INVENTORY || sequence == seen + 1,
                            "INVENTORY has a gap after {seen}: such a ledger is not backed up over a good one; run `lomash \
                             verify`"
                        );
                        writing.push(&Record::of(held)?).await?;
                        progress.inc(sequence - seen);
                        seen = sequence;
                    }
                    Some(Err(problem)) => break Some(problem),
                    None => break None,
                }
            };
            let Some(problem) = interrupted else { break };
            interruptions = if seen == before { interruptions + 1 } else { 0 };
            ensure!(interruptions <= MAX_INTERRUPTIONS, "{name} cannot be read on after sequence {seen}: {problem}");
            tokio::time::sleep(INTERRUPTION_PAUSE).await;
        }
        progress.finish();
        ensure!(
            name != streams::INVENTORY || seen == *last_sequence,
            "INVENTORY has nothing after {seen}, and it should end at {last_sequence}; run `lomash verify`"
        );
        writing.finish().await
    }
}

/// A segment while it is compressed and written; none where nothing was in it.
type Closing = JoinHandle<Result<Option<(Segment, LastMessage)>>>;

/// Segments while they are written: one is filled while the one before is compressed.
struct Writing {
    folder: PathBuf,
    open: Open,
    closing: Option<Closing>,
    written: Written,
}

impl Writing {
    async fn push(&mut self, record: &Record) -> Result<()> {
        if self.open.push(record) { self.close().await } else { Ok(()) }
    }

    async fn close(&mut self) -> Result<()> {
        self.wait().await?;
        let (open, folder) = (std::mem::take(&mut self.open), self.folder.clone());
        self.closing = Some(tokio::task::spawn_blocking(move || open.close(&folder)));
        Ok(())
    }

    async fn wait(&mut self) -> Result<()> {
        let Some(closing) = self.closing.take() else { return Ok(()) };
        if let Some((segment, last)) = closing.await.map_err(|problem| anyhow!(problem))?? {
            self.written.segments.push(segment);
            self.written.last_message = Some(last);
        }
        Ok(())
    }

    async fn finish(mut self) -> Result<Written> {
        self.close().await?;
        self.wait().await?;
        Ok(self.written)
    }
}

// ── Checking ────────────────────────────────────────────────────────────────────────────────────────────────────

/// A stream of an archive that was proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Proved {
    /// The stream.
    pub stream: String,
    /// Where it ended.
    pub last_sequence: u64,
    /// Its messages.
    pub messages: u64,
    /// Its segments.
    pub segments: usize,
    /// Their length.
    pub bytes: u64,
}

/// An archive that was proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Checked {
    /// The archive.
    pub archive: PathBuf,
    /// When it was cut.
    pub taken_at: String,
    /// The sequence of the ledger as of which it is consistent.
    pub ledger_sequence: u64,
    /// By stream.
    pub streams: Vec<Proved>,
}

/// Proves every hash of the archive in `dir`, without a server.
///
/// # Errors
/// What is wrong with it.
pub async fn check(dir: &Path, show: Show) -> Result<Checked> {
    let archive = Archive::open(dir).await?;
    let manifest = archive.manifest()?.context("nothing was finished in it")?;
    tokio::task::spawn_blocking(move || prove(&archive, &manifest, show)).await.map_err(|problem| anyhow!(problem))?
}

/// Proves every hash; takes its time, so it is not for a task.
///
/// # Errors
/// What is wrong.
pub(crate) fn prove(archive: &Archive, manifest: &Manifest, show: Show) -> Result<Checked> {
    let mut streams = Vec::new();
    for stream in &manifest.streams {
        let mut progress = show.progress(&format!("checking {}", stream.name), stream.messages);
        archive.check(stream, || progress.inc(1))?;
        progress.finish();
        streams.push(Proved {
            stream: stream.name.clone(),
            last_sequence: stream.last_sequence,
            messages: stream.messages,
            segments: stream.segments.len(),
            bytes: stream.bytes(),
        });
    }
    Ok(Checked {
        archive: archive.dir().to_owned(),
        taken_at: manifest.taken_at.clone(),
        ledger_sequence: manifest.ledger_sequence,
        streams,
    })
}

// ── Printing ────────────────────────────────────────────────────────────────────────────────────────────────────

/// What was done, as a person reads it.
#[must_use]
pub fn render(summary: &Summary) -> String {
    let mut table = output::table(&["stream", "up to", "messages", "segments", "bytes", "of these new", "bytes"]);
    let mut notes = String::new();
    for copied in &summary.streams {
        table.add_row([
            Cell::new(&copied.stream),
            output::number_cell(copied.last_sequence),
            output::number_cell(copied.messages),
            output::number_cell(copied.segments as u64),
            Cell::new(output::bytes(copied.bytes)),
            output::number_cell(copied.new_messages),
            Cell::new(output::bytes(copied.new_bytes)),
        ]);
        if copied.anew {
            notes
                .push_str(&format!("{}: messages are gone from it since the last backup; read anew.\n", copied.stream));
        }
        if copied.kept_beyond > 0 {
            notes.push_str(&format!(
                "{}: {} messages are kept that the stream has no more; --prune drops segments that hold nothing else.\n",
                copied.stream,
                output::thousands(copied.kept_beyond)
            ));
        }
    }
    if summary.strays_removed > 0 {
        notes.push_str(&format!("{} files of an interrupted backup were removed.\n", summary.strays_removed));
    }
    for (projection, checkpoint) in summary.checkpoints.iter().flatten() {
        notes.push_str(&format!("The projection {projection} stood at {}.\n", output::thousands(*checkpoint)));
    }
    format!(
        "{table}\n{notes}{} is consistent as of sequence {} of INVENTORY; {:.1} s.\n",
        summary.archive.display(),
        output::thousands(summary.ledger_sequence),
        summary.seconds
    )
}

fn render_checked(checked: &Checked) -> String {
    let mut table = output::table(&["stream", "up to", "messages", "segments", "bytes"]);
    for proved in &checked.streams {
        table.add_row([
            Cell::new(&proved.stream),
            output::number_cell(proved.last_sequence),
            output::number_cell(proved.messages),
            output::number_cell(proved.segments as u64),
            Cell::new(output::bytes(proved.bytes)),
        ]);
    }
    format!(
        "{table}\nEvery hash of {} is right; taken at {}, as of sequence {} of INVENTORY.\n",
        checked.archive.display(),
        checked.taken_at,
        output::thousands(checked.ledger_sequence)
    )
}
