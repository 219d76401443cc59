//! `lomash restore`: an archive of `lomash backup` into servers that have none of our streams.
//!
//! Owns the order and the proof:
//!
//! 1. Every hash of the archive, and that none of our streams is there. Until then no server is touched.
//! 2. The ledger first and the orders last, each by the server's own `$JS.API.STREAM.RESTORE`: sequences, times, headers and
//!    payloads come back as they were, and each durable consumer goes on from its floor (`file_store.rs`).
//! 3. The streams and consumers that are missing yet are made as `streams/` defines them.
//! 4. Every message is read back and compared with the archive, then the whole ledger is verified.
//! 5. Projections that are ahead of the restored ledger are named, if a database is: their services will refuse to start, and
//!    what to run is said here before.
//!
//! For an administrator, with all services stopped. When it dies half-way, the streams that are there are to be deleted, and
//! it is run again; it says so itself.
//!
//! Memory: a segment, a block, and a few chunks on their way.

pub mod file_store;

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, Message, Subscriber};
use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use lomash_ledger::upkeep::{self, Action};
use lomash_ledger::{direct, streams};
use lomash_platform::{Secret, nats, schemas};
use serde::Serialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::time::Instant;

use self::file_store::Image;
use crate::archive::{Archive, Manifest, Record, StreamEntry};
use crate::audit::Report;
use crate::backup::{self, KEPT};
use crate::output::{self, Cell, hex};
use crate::verify::{self, Show};

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash restore";

/// Bytes of a message to the server; far below its `max_payload`.
const CHUNK_BYTES: usize = 256 << 10;

/// Chunks that are sent and not confirmed.
const MAX_CHUNKS_IN_FLIGHT: usize = 8;

/// Chunks that are made and not sent.
const MAX_CHUNKS_MADE: usize = 4;

/// How long the server may take to confirm a chunk.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to unpack a stream and read its blocks, in a cluster until each copy is there.
const UNPACK_TIMEOUT: Duration = Duration::from_secs(1_800);

/// How long consumers may take to appear, in a cluster.
const CONSUMERS_TIMEOUT: Duration = Duration::from_secs(30);
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Differences that are told one by one, for each stream.
const MAX_TOLD: usize = 3;

/// Restore an archive into servers that have none of the streams, and prove it.
#[derive(Clone, Debug, Args)]
pub struct RestoreArgs {
    /// Folder of the archive.
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Copies of each stream, instead of as many as they had.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub replicas: Option<u32>,
    /// Who asks: the administrator.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// The Postgres database of the projections: then it is said which of them are ahead of what is restored.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<Secret>,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A stream after it was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Restored {
    /// The stream.
    pub stream: String,
    /// Where it ends.
    pub last_sequence: u64,
    /// Messages in the archive.
    pub messages: u64,
    /// Messages that its own limits removed as soon as it was there: they were past them.
    pub expired: u64,
    /// Messages that are equal, in sequence, time, subject, headers and payload.
    pub equal: u64,
    /// What differs, the first few.
    pub differences: Vec<String>,
    /// How many differences there are.
    pub differing: u64,
    /// SHA-256 over the messages of the archive.
    pub archive_sha256: String,
    /// SHA-256 over what was read back.
    pub restored_sha256: String,
}

/// A projection that knows more than what was restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ahead {
    /// Its schema.
    pub schema: String,
    /// Up to where it has read.
    pub checkpoint: u64,
    /// What its service will say, with what to run.
    pub remedy: String,
}

/// What a restore came to.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The archive.
    pub archive: PathBuf,
    /// When it was cut.
    pub taken_at: String,
    /// The end of the ledger.
    pub ledger_sequence: u64,
    /// By stream.
    pub streams: Vec<Restored>,
    /// Streams and consumers that were made as they are defined.
    pub made: Vec<String>,
    /// In what the servers differ from `streams/` now.
    pub differences: Vec<String>,
    /// Consumers that do not stand where the archive says.
    pub consumers_off: Vec<String>,
    /// Projections ahead; none if no database was named.
    pub ahead: Vec<Ahead>,
    /// What `lomash verify` says.
    pub verified: Report,
    /// Seconds for checking, sending, and reading back with verifying.
    pub seconds: Seconds,
}

/// How long each part took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Seconds {
    /// The hashes of the archive.
    pub checking: f64,
    /// Sending and unpacking.
    pub restoring: f64,
    /// Reading back and comparing.
    pub comparing: f64,
    /// Verifying.
    pub verifying: f64,
}

impl Outcome {
    /// Whether what was restored is what the archive holds, is defined as it should be, and verifies.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        self.is_as_archived() && self.differences.is_empty() && self.verified.is_clean()
    }

    /// Whether messages and consumers are those of the archive, right or wrong.
    fn is_as_archived(&self) -> bool {
        self.streams.iter().all(|stream| stream.differing == 0) && self.consumers_off.is_empty()
    }
}

/// Runs the command. Success is a restored system that is equal and verifies.
///
/// # Errors
/// When the archive is damaged, a stream is there already, or the servers refuse.
pub async fn run(args: RestoreArgs) -> Result<ExitCode> {
    let archive = Archive::open(&args.dir).await?;
    let prepared = prepare(archive, Show::Progress).await?;
    let (client, refusals) = args.servers.connect(CLIENT_NAME).await?;
    let context = jetstream::new(client);
    let restoring = restore(&context, prepared, args.replicas, args.database_url.as_ref(), Show::Progress);
    let outcome = refusals.guard(restoring).await??;
    if args.json {
        output::print_json(&outcome)?;
    } else {
        output::print(render(&outcome));
    }
    Ok(if outcome.is_equal() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// An archive of which every hash is proved.
#[derive(Debug)]
pub struct Prepared {
    archive: Archive,
    manifest: Manifest,
    seconds: f64,
}

/// Proves every hash of an archive.
///
/// # Errors
/// What is wrong with it; no server was touched.
pub async fn prepare(archive: Archive, show: Show) -> Result<Prepared> {
    let started = Instant::now();
    let manifest = archive.manifest()?.context("nothing was finished in the archive")?;
    let proving = tokio::task::spawn_blocking(move || {
        backup::prove(&archive, &manifest, show)?;
        anyhow::Ok((archive, manifest))
    });
    let (archive, manifest) = proving.await.map_err(|problem| anyhow!(problem))??;
    Ok(Prepared { archive, manifest, seconds: started.elapsed().as_secs_f64() })
}

/// Restores what was proved.
///
/// # Errors
/// When a stream is there already, or the servers refuse or do not answer.
pub async fn restore(
    context: &Context,
    Prepared { archive, manifest, seconds }: Prepared,
    replicas: Option<u32>,
    database_url: Option<&Secret>,
    show: Show,
) -> Result<Outcome> {
    streams::wait_until_ready(context).await?;
    refuse_what_is_there(context, replicas.unwrap_or(1)).await?;
    let mut took = Seconds { checking: seconds, ..Seconds::default() };
    let archive = Arc::new(archive);

    let started = Instant::now();
    let mut done: Vec<&str> = Vec::new();
    for name in KEPT {
        let Some(stream) = manifest.stream(name) else { continue };
        send(context, &archive, stream, replicas, show).await.with_context(|| {
            let there = if done.is_empty() { "none".to_owned() } else { done.join(", ") };
            format!(
                "{name} was not restored (there so far: {there}). Do not start the services: what is there is not the whole. \
                 Delete what is there (`nats stream rm NAME`) and restore again"
            )
        })?;
        done.push(name);
    }
    let (made, differences) = make_the_rest(context, &manifest, replicas).await?;
    took.restoring = started.elapsed().as_secs_f64();

    let started = Instant::now();
    let consumers_off = compare_consumers(context, &manifest).await?;
    let mut compared = Vec::new();
    for stream in &manifest.streams {
        compared.push(compare(context, &archive, stream, show).await?);
    }
    took.comparing = started.elapsed().as_secs_f64();

    let started = Instant::now();
    let verified = verify::verify(context, None, show).await?;
    let ahead = match database_url {
        Some(url) => ahead(backup::checkpoints(url).await?, manifest.ledger_sequence),
        None => Vec::new(),
    };
    took.verifying = started.elapsed().as_secs_f64();
    Ok(Outcome {
        archive: archive.dir().to_owned(),
        taken_at: manifest.taken_at,
        ledger_sequence: manifest.ledger_sequence,
        streams: compared,
        made,
        differences,
        consumers_off,
        ahead,
        verified,
        seconds: took,
    })
}

async fn refuse_what_is_there(context: &Context, replicas: u32) -> Result<()> {
    let steps = upkeep::plan(context, replicas).await?;
    let there: Vec<&str> = steps
        .iter()
        .filter(|step| step.action != Action::Create && !step.name.contains('/'))
        .map(|step| step.name.as_str())
        .collect();
    ensure!(
        there.is_empty(),
        "these streams exist: {}. A restore needs servers that have none of them. If what they hold is to be replaced: stop \
         all services, take a backup of it if there is anything in it that you may want, delete them (`nats stream rm NAME`), \
         and restore again",
        there.join(", ")
    );
    Ok(())
}

/// Makes the streams and consumers that no archive has; what differs from the definitions then is returned, too.
async fn make_the_rest(
    context: &Context,
    manifest: &Manifest,
    replicas: Option<u32>,
) -> Result<(Vec<String>, Vec<String>)> {
    let ledger = manifest.stream(streams::INVENTORY);
    let had = ledger.and_then(|stream| stream.config.get("num_replicas")).and_then(Value::as_u64).unwrap_or(1);
    let replicas = replicas.unwrap_or_else(|| u32::try_from(had).unwrap_or(1));
    await_consumers(context, manifest).await;
    let mut made = Vec::new();
    for step in upkeep::plan(context, replicas).await? {
        if step.action == Action::Create {
            upkeep::carry_out(context, &step).await.with_context(|| format!("{} could not be made", step.name))?;
            made.push(step.name);
        }
    }
    let steps = upkeep::plan(context, replicas).await?;
    let differing = steps.iter().flat_map(|step| {
        step.changes.iter().chain(step.refused.iter().map(|refused| &refused.difference)).map(ToString::to_string)
    });
    Ok((made, differing.collect()))
}

// ── Sending ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// Restores one stream with its consumers.
async fn send(
    context: &Context,
    archive: &Arc<Archive>,
    stream: &StreamEntry,
    replicas: Option<u32>,
    show: Show,
) -> Result<()> {
    let mut config = stream.config.clone();
    if let Some(replicas) = replicas {
        config.insert("num_replicas".to_owned(), replicas.into());
    }
    let request = json!({ "config": config, "state": state(stream) });
    let answer: Value = context.request(format!("STREAM.RESTORE.{}", stream.name), &request).await?;
    refuse_error(&answer)?;
    let target =
        answer.get("deliver_subject").and_then(Value::as_str).context("the server says no place to send it to")?;

    let (chunks, mut made) = mpsc::channel(MAX_CHUNKS_MADE);
    let packing = tokio::task::spawn_blocking({
        let (archive, stream) = (archive.clone(), stream.clone());
        move || pack(&archive, &stream, &config, chunks, show)
    });
    let client = context.client();
    let mut sending = Sending::begin(&client, target).await?;
    while let Some(chunk) = made.recv().await {
        sending.send(chunk).await?;
    }
    packing.await.map_err(|problem| anyhow!(problem))??;
    let restored = sending.finish().await?;
    let (last, messages) = (&restored["state"]["last_seq"], &restored["state"]["messages"]);
    ensure!(
        last.as_u64() == Some(stream.last_sequence),
        "the server has it up to {last} with {messages} messages, and not up to {}",
        stream.last_sequence
    );
    Ok(())
}

/// What the server wants to know of a stream before it has it.
fn state(stream: &StreamEntry) -> Value {
    let first = stream.segments.first().map_or(stream.last_sequence + 1, |segment| segment.first);
    json!({
        "messages": stream.messages,
        "bytes": stream.bytes(),
        "first_seq": first,
        "last_seq": stream.last_sequence,
        "consumer_count": stream.consumers.len(),
    })
}

fn refuse_error(answer: &Value) -> Result<()> {
    let Some(error) = answer.get("error") else { return Ok(()) };
    bail!("the server refuses: {} ({})", error["description"].as_str().unwrap_or("no reason"), error["err_code"]);
}

/// Makes the chunks of a stream; ends when nobody takes them any more.
fn pack(
    archive: &Archive,
    stream: &StreamEntry,
    config: &Map<String, Value>,
    chunks: mpsc::Sender<Bytes>,
    show: Show,
) -> Result<()> {
    let mut progress = show.progress(&format!("restoring {}", stream.name), stream.messages);
    let mut image = Image::begin(stream, config, Chunks { chunks, filling: Vec::with_capacity(CHUNK_BYTES) })?;
    let mut seen = 0;
    for segment in &stream.segments {
        for record in archive.segment(&stream.name, segment)? {
            let record = record?;
            image.push(&record)?;
            seen = record.sequence;
            progress.inc(1);
        }
    }
    image.finish(seen, stream.last_sequence)?;
    progress.finish();
    Ok(())
}

/// Cuts what is written into chunks.
struct Chunks {
    chunks: mpsc::Sender<Bytes>,
    filling: Vec<u8>,
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK_BYTES - self.filling.len();
        let taken = &bytes[..bytes.len().min(room)];
        self.filling.extend_from_slice(taken);
        if self.filling.len() == CHUNK_BYTES {
            self.flush()?;
        }
        Ok(taken.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.filling.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut self.filling, Vec::with_capacity(CHUNK_BYTES));
        self.chunks.blocking_send(chunk.into()).map_err(|_| io::Error::other("the server takes no more"))
    }
}

/// Chunks on their way to the server, which confirms each.
struct Sending {
    client: Client,
    target: String,
    inbox: String,
    confirmations: Subscriber,
    in_flight: usize,
}

impl Sending {
    async fn begin(client: &Client, target: &str) -> Result<Self> {
        let inbox = client.new_inbox();
        let confirmations = client.subscribe(inbox.clone()).await?;
        Ok(Self { client: client.clone(), target: target.to_owned(), inbox, confirmations, in_flight: 0 })
    }

    async fn send(&mut self, chunk: Bytes) -> Result<()> {
        while self.in_flight >= MAX_CHUNKS_IN_FLIGHT {
            self.confirmed().await?;
        }
        self.client.publish_with_reply(self.target.clone(), self.inbox.clone(), chunk).await?;
        self.in_flight += 1;
        Ok(())
    }

    async fn confirmed(&mut self) -> Result<()> {
        let answer = self.answer(CHUNK_TIMEOUT, "a chunk is not confirmed").await?;
        self.in_flight -= 1;
        // Empty, unless it says what is wrong.
        ensure!(answer.payload.is_empty(), "the server says: {}", String::from_utf8_lossy(&answer.payload));
        Ok(())
    }

    async fn answer(&mut self, within: Duration, what: &str) -> Result<Message> {
        let answer = tokio::time::timeout(within, self.confirmations.next()).await;
        let answer = answer.with_context(|| format!("{what} within {} s", within.as_secs()))?;
        let answer = answer.context("the connection was closed")?;
        ensure!(answer.status != Some(async_nats::StatusCode::NO_RESPONDERS), "{what}: the server has given it up");
        Ok(answer)
    }

    /// Says that it is all, and waits until the stream is there.
    async fn finish(mut self) -> Result<Value> {
        while self.in_flight > 0 {
            self.confirmed().await?;
        }
        self.client.publish_with_reply(self.target.clone(), self.inbox.clone(), Bytes::new()).await?;
        let answer = self.answer(UNPACK_TIMEOUT, "the server has not unpacked it").await?;
        let answer: Value = serde_json::from_slice(&answer.payload).context("the server's answer is no JSON")?;
        refuse_error(&answer)?;
        Ok(answer)
    }
}

// ── Comparing ───────────────────────────────────────────────────────────────────────────────────────────────────

/// In a cluster consumers come a moment after their stream.
async fn await_consumers(context: &Context, manifest: &Manifest) {
    let deadline = Instant::now() + CONSUMERS_TIMEOUT;
    for stream in &manifest.streams {
        for consumer in &stream.consumers {
            while !matches!(backup::consumer(context, &stream.name, &consumer.name).await, Ok(Some(_)))
                && Instant::now() < deadline
            {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        }
    }
}

/// Which consumers do not stand where they should.
async fn compare_consumers(context: &Context, manifest: &Manifest) -> Result<Vec<String>> {
    let mut off = Vec::new();
    for stream in &manifest.streams {
        for consumer in &stream.consumers {
            let name = format!("{}/{}", stream.name, consumer.name);
            let floor = consumer.ack_floor.stream_sequence;
            match backup::consumer(context, &stream.name, &consumer.name).await? {
                None => off.push(format!("{name} is missing")),
                Some(found) if found.ack_floor.stream_sequence != floor => {
                    off.push(format!("{name} stands at {} and not at {floor}", found.ack_floor.stream_sequence));
                }
                Some(_) => {}
            }
        }
    }
    Ok(off)
}

/// Reads a stream back and compares it with the archive, message by message.
async fn compare(context: &Context, archive: &Archive, stream: &StreamEntry, show: Show) -> Result<Restored> {
    let mut progress = show.progress(&format!("comparing {}", stream.name), stream.messages);
    let mut restored = Restored {
        stream: stream.name.clone(),
        last_sequence: stream.last_sequence,
        messages: stream.messages,
        expired: 0,
        equal: 0,
        differences: Vec::new(),
        differing: 0,
        archive_sha256: String::new(),
        restored_sha256: String::new(),
    };
    let (mut archived, mut read_back) = (Sha256::new(), Sha256::new());
    let limits = Limits::of(stream);
    let mut held = direct::read(context, &stream.name, None, 0, stream.last_sequence);
    let mut next = held.next().await.transpose()?.map(Record::of).transpose()?;
    for segment in &stream.segments {
        for record in archive.segment(&stream.name, segment)? {
            let record = record?;
            progress.inc(1);
            while let Some(found) = next.take_if(|found| found.sequence < record.sequence) {
                read_back.update(found.encoded());
                restored.differs(format!("message {} is there and not in the archive", found.sequence));
                next = held.next().await.transpose()?.map(Record::of).transpose()?;
            }
            let encoded = record.encoded();
            match next.take_if(|found| found.sequence == record.sequence) {
                Some(found) => {
                    let found_encoded = found.encoded();
                    if encoded == found_encoded {
                        restored.equal += 1;
                    } else {
                        restored.differs(difference(&record, &found));
                    }
                    archived.update(&encoded);
                    read_back.update(found_encoded);
                    next = held.next().await.transpose()?.map(Record::of).transpose()?;
                }
                // Only at the beginning: limits take the oldest.
                None if restored.equal + restored.differing == 0 && limits.may_take(&record) => restored.expired += 1,
                None => {
                    archived.update(&encoded);
                    restored.differs(format!("message {} is missing", record.sequence));
                }
            }
        }
    }
    while let Some(found) = next {
        read_back.update(found.encoded());
        restored.differs(format!("message {} is there and not in the archive", found.sequence));
        next = held.next().await.transpose()?.map(Record::of).transpose()?;
    }
    progress.finish();
    (restored.archive_sha256, restored.restored_sha256) = (hex(archived.finalize()), hex(read_back.finalize()));
    Ok(restored)
}

/// What a stream's own limits take away as soon as it is restored: the archive may hold more than they allow.
struct Limits {
    max_age_nanos: Option<u64>,
    drops_oldest: bool,
}

impl Limits {
    fn of(stream: &StreamEntry) -> Self {
        let limit = |name: &str| stream.config.get(name).and_then(Value::as_u64).filter(|limit| *limit > 0);
        let is_bounded = limit("max_bytes").or_else(|| limit("max_msgs")).is_some();
        let drops_oldest = is_bounded && stream.config.get("discard").is_none_or(|discard| discard == "old");
        Self { max_age_nanos: limit("max_age"), drops_oldest }
    }

    fn may_take(&self, record: &Record) -> bool {
        let now = OffsetDateTime::now_utc().unix_timestamp_nanos();
        let is_old = |age: u64| i128::from(record.stored_at) + i128::from(age) < now;
        self.drops_oldest || self.max_age_nanos.is_some_and(is_old)
    }
}

impl Restored {
    fn differs(&mut self, what: String) {
        self.differing += 1;
        if self.differences.len() < MAX_TOLD {
            self.differences.push(what);
        }
    }
}

fn difference(archived: &Record, found: &Record) -> String {
    let what = if archived.stored_at != found.stored_at {
        "time"
    } else if archived.subject != found.subject {
        "subject"
    } else if archived.headers != found.headers {
        "headers"
    } else {
        "payload"
    };
    format!("message {} has another {what}", archived.sequence)
}

/// Which projections know more than the ledger now has, and what to run.
fn ahead(checkpoints: BTreeMap<String, u64>, last: u64) -> Vec<Ahead> {
    let ahead = checkpoints.into_iter().filter(|(_, checkpoint)| *checkpoint > last);
    ahead
        .map(|(schema, checkpoint)| {
            let remedy = schemas::went_backwards(last, checkpoint, &schema).to_string();
            Ahead { schema, checkpoint, remedy }
        })
        .collect()
}

// ── Printing ────────────────────────────────────────────────────────────────────────────────────────────────────

/// The report as a person reads it.
#[must_use]
pub fn render(outcome: &Outcome) -> String {
    let mut table = output::table(&["stream", "up to", "in the archive", "equal", "expired", "differing", "SHA-256"]);
    let mut told = String::new();
    for stream in &outcome.streams {
        table.add_row([
            Cell::new(&stream.stream),
            output::number_cell(stream.last_sequence),
            output::number_cell(stream.messages),
            output::number_cell(stream.equal),
            output::number_cell(stream.expired),
            output::number_cell(stream.differing),
            Cell::new(stream.restored_sha256.chars().take(16).collect::<String>()),
        ]);
        for difference in &stream.differences {
            told.push_str(&format!("{}: {difference}\n", stream.stream));
        }
    }
    for made in &outcome.made {
        told.push_str(&format!("{made} was made as it is defined.\n"));
    }
    for off in outcome.consumers_off.iter().chain(&outcome.differences) {
        told.push_str(&format!("{off}\n"));
    }
    told.push_str(&verify::render(&outcome.verified));
    for ahead in &outcome.ahead {
        told.push_str(&format!("BEFORE its service starts: {}.\n", ahead.remedy));
    }
    let Seconds { checking, restoring, comparing, verifying } = outcome.seconds;
    let verdict = match (outcome.is_as_archived(), outcome.is_equal()) {
        (true, true) => "Restored, and equal to the archive",
        (true, false) => "Restored as the archive has it, but it was not right when it was taken: see above",
        (false, _) => "NOT as the archive: do not start the services",
    };
    format!(
        "{table}\n{told}{verdict}; as of sequence {} of INVENTORY, taken at {}. Checked in {checking:.1} s, restored in \
         {restoring:.1} s, compared in {comparing:.1} s, verified in {verifying:.1} s.\n",
        output::thousands(outcome.ledger_sequence),
        outcome.taken_at
    )
}
