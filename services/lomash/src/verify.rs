//! `lomash verify`: reads the stream, the orders, the dead letters and the projection, and lets the auditor judge.
//!
//! Owns the order of the reads and nothing else; what must hold is in `audit.rs`.
//!
//! Traffic may go on meanwhile. The order of the reads makes every verdict sound all the same:
//!
//! 1. The acknowledgement floor of `product-orders`. Orders are acknowledged last, so whatever is at or below the floor
//!    was decided, or written as a dead letter, before this moment; everything that is read later contains it.
//!    Or it is a suspect, handed over to be tried alone before it was acknowledged: those are read right after the floor.
//! 2. A snapshot of Postgres (one repeatable-read transaction). Its checkpoint is a sequence that the stream had then,
//!    so a checkpoint beyond what step 3 finds means that the stream went backwards.
//! 3. The last sequence of `INVENTORY`: the fold ends there, or where the atomic batch ends that it falls into.
//! 4. `DEAD_LETTERS`, then `ORDERS` to its end. An order is stored before it is decided, so every decision of the fold
//!    finds its order. Orders that came after step 1 are above the floor and owe nothing yet.
//! 5. `INVENTORY` from 1 to the checkpoint, comparing rows on the way, then to the end.
//!
//! No table and no stream is held in memory; `snapshot.rs` reads the rows.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::HeaderMap;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::context::{GetStreamError, GetStreamErrorKind};
use async_nats::jetstream::stream::RawMessageErrorKind;
use async_nats::jetstream::{Context, ErrorCode};
use clap::Args;
use futures::StreamExt;
use lomash_contract::{ContentType, OrderCreated, Topic, codec, subject};
use lomash_ledger::{JetStreamLedger, Ledger, ReadError, dead_letter, direct, header, streams, suspects};
use lomash_platform::Secret;
use lomash_platform::postgres::Schema;
use lomash_platform::waiting::Waiting;
use product_service::projection::PROJECTION;

use crate::audit::{Audit, Evidence, Projection, Report, Status};
use crate::output::{self, Cell, Progress};
use crate::snapshot::{Snapshot, unsigned};

/// How long `--wait` waits when no number is given.
pub const DEFAULT_WAIT_SECONDS: u64 = 60;

/// How often a read that was interrupted is taken up again without having moved.
const MAX_INTERRUPTIONS: u32 = 5;

/// Pause before it is.
const INTERRUPTION_PAUSE: Duration = Duration::from_millis(500);

/// Pause between two looks while waiting for quiet.
const WAIT_PAUSE: Duration = Duration::from_millis(100);

/// How often the rest of a batch is looked for that the fold ended in, a [`WAIT_PAUSE`] apart.
const MAX_LOOKS_FOR_REST: u32 = 20;

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash verify";

/// Checks the ledger and its projection against the invariants.
#[derive(Clone, Debug, Args)]
pub struct VerifyArgs {
    /// The NATS server or servers.
    #[arg(long, env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// Who asks.
    #[command(flatten)]
    pub nats_identity: lomash_platform::nats::Identity,
    /// The Postgres database of the projection; without it the projection is not checked.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<Secret>,
    /// First wait until no order is pending and the projection has reached the end of the stream, at most so long.
    #[arg(
        long,
        value_name = "SECONDS",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "60"
    )]
    pub wait: Option<u64>,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command. Success is a clean report; what was not checked is shown and is no failure.
///
/// # Errors
/// When the stream or the orders cannot be read, or `--wait` waited in vain.
pub async fn run(args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let (client, _) = lomash_platform::nats::connect_as(&args.nats_url, &args.nats_identity, CLIENT_NAME).await?;
    let context = async_nats::jetstream::new(client);
    if let Some(seconds) = args.wait {
        wait_until_quiet(&context, args.database_url.as_ref(), Duration::from_secs(seconds)).await?;
    }
    let report = verify(&context, args.database_url.as_ref(), Show::Progress).await?;
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(render(&report));
    }
    Ok(if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether reading shows how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Show {
    /// On standard error.
    Progress,
    /// Not at all.
    Nothing,
}

impl Show {
    pub(crate) fn progress(self, what: &str, total: u64) -> Progress {
        match self {
            Self::Progress => Progress::new(what, total),
            Self::Nothing => Progress::hidden(),
        }
    }
}

/// Audits the ledger that `context` reaches, and the projection at `database_url` when there is one.
///
/// # Errors
/// When a stream cannot be read. A projection that cannot be read is a finding of the report.
pub async fn verify(context: &Context, database_url: Option<&Secret>, show: Show) -> anyhow::Result<Report> {
    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY);
    let configuration = match streams::compare(context, streams::INVENTORY, 1).await {
        Ok(differences) => Ok(differences.iter().map(ToString::to_string).collect()),
        Err(missing @ streams::StreamsError::Missing(_)) => return Err(missing.into()),
        Err(problem) => Err(format!("the configuration of INVENTORY cannot be read: {problem}")),
    };
    let mut audit = Audit::new(ack_floor(context).await?);
    for suspect in read_suspects(context).await? {
        audit.observe_suspect(suspect);
    }

    let mut database = match database_url {
        None => None,
        Some(url) => Some(lomash_platform::postgres::connect(url).await),
    };
    let mut comparing = match &mut database {
        None => Err(Projection::NotChecked("no DATABASE_URL".to_owned())),
        Some(Err(problem)) => Err(Projection::Unreadable(format!("{problem:#}"))),
        Some(Ok(client)) => {
            Snapshot::open(client, Schema::Live).await.map_err(|problem| Projection::Unreadable(format!("{problem:#}")))
        }
    };
    let last = ledger.last_sequence().await?;
    if let Ok(snapshot) = &comparing
        && snapshot.checkpoint > last
    {
        let checkpoint = snapshot.checkpoint;
        comparing = Err(Projection::AheadOfStream { checkpoint });
    }

    let letters_removed = read_letters(context, &mut audit, show).await?;
    let orders_sequence = read_orders(context, &mut audit, show).await?;

    let mut progress = show.progress("reading INVENTORY", last);
    let mut fold = Fold { context, ledger: &ledger, audit: &mut audit, progress: &mut progress };
    let projection = match comparing {
        Err(projection) => projection,
        Ok(mut snapshot) => {
            let checkpoint = snapshot.checkpoint;
            fold.run(checkpoint, Some(&mut snapshot)).await?;
            snapshot.finish(fold.audit).await
        }
    };
    fold.run(last, None).await?;
    fold.run_to_end_of_batch().await?;
    progress.finish();
    Ok(audit.finish(Evidence { orders_sequence, letters_removed, configuration, projection }))
}

// ── Waiting ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// Waits until no order is pending or being decided and the projection (when there is one) is at the stream's end.
///
/// # Errors
/// After `timeout`, saying what was still open.
pub async fn wait_until_quiet(
    context: &Context,
    database_url: Option<&Secret>,
    timeout: Duration,
) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + timeout;
    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY);
    let database = match database_url {
        None => None,
        Some(url) => Some(lomash_platform::postgres::connect(url).await?),
    };
    let mut waiting = Waiting::on("all orders to be decided and projected");
    loop {
        let open = match waiting.during(still_open(context, &ledger, database.as_ref())).await {
            Ok(None) => return Ok(()),
            Ok(Some(open)) => open,
            Err(problem) => format!("{problem:#}"),
        };
        if tokio::time::Instant::now() >= deadline {
            bail!("waited {} s in vain: {open}; is the product service running?", timeout.as_secs());
        }
        waiting.still(open);
        tokio::time::sleep(WAIT_PAUSE).await;
    }
}

async fn still_open(
    context: &Context,
    ledger: &JetStreamLedger,
    database: Option<&tokio_postgres::Client>,
) -> anyhow::Result<Option<String>> {
    let consumer: PullConsumer = context
        .get_consumer_from_stream(streams::PRODUCT_ORDERS, streams::ORDERS)
        .await
        .map_err(|problem| anyhow!("the consumer product-orders cannot be read: {problem}"))?;
    let info = consumer.cached_info();
    if info.num_pending > 0 || info.num_ack_pending > 0 {
        return Ok(Some(format!(
            "{} orders are pending, {} are being decided",
            output::thousands(info.num_pending),
            output::thousands(info.num_ack_pending as u64)
        )));
    }
    // A consumer that was just restored in a cluster may say for a while that nothing is pending.
    let orders =
        context.get_stream(streams::ORDERS).await.map_err(|problem| anyhow!("ORDERS cannot be read: {problem}"))?;
    let (state, settled) = (&orders.cached_info().state, info.ack_floor.stream_sequence);
    if state.messages > 0 && settled < state.last_sequence {
        return Ok(Some(format!("ORDERS ends at {}, and its consumer is at {settled}", state.last_sequence)));
    }
    let suspects = read_suspects(context).await?.len() as u64;
    if suspects > 0 {
        return Ok(Some(format!("{} orders wait to be tried alone", output::thousands(suspects))));
    }
    let Some(database) = database else { return Ok(None) };
    let last = ledger.last_sequence().await?;
    let checkpoint = database
        .query_opt("SELECT sequence FROM inventory.checkpoint WHERE projection = $1", &[&PROJECTION])
        .await
        .context("the checkpoint cannot be read")?
        .map_or(0, |row| unsigned(row.get(0)));
    if checkpoint < last {
        let behind = output::thousands(last - checkpoint);
        return Ok(Some(format!("the projection is {behind} events behind")));
    }
    Ok(None)
}

// ── ORDERS and DEAD_LETTERS ─────────────────────────────────────────────────────────────────────────────────────

async fn ack_floor(context: &Context) -> anyhow::Result<Option<u64>> {
    // The subject is asked directly: a missing consumer is an answer here, and a missing stream too.
    let subject = format!("CONSUMER.INFO.{}.{}", streams::ORDERS, streams::PRODUCT_ORDERS);
    let answer: serde_json::Value =
        context.request(subject, &serde_json::json!({})).await.context("the consumer product-orders cannot be read")?;
    match answer.pointer("/ack_floor/stream_seq").and_then(serde_json::Value::as_u64) {
        Some(floor) => Ok(Some(floor)),
        None if answer.pointer("/error/code").and_then(serde_json::Value::as_u64) == Some(404) => Ok(None),
        None => bail!("the consumer product-orders cannot be read: {answer}"),
    }
}

/// The sequences in `ORDERS` of the messages that wait to be tried alone. None where an older service made the streams.
async fn read_suspects(context: &Context) -> anyhow::Result<Vec<u64>> {
    let cannot = || format!("{} cannot be read", suspects::STREAM);
    let stream = match context.get_stream(suspects::STREAM).await {
        Ok(stream) => stream,
        Err(problem) if is_missing(&problem) => return Ok(Vec::new()),
        Err(problem) => return Err(problem).with_context(cannot),
    };
    let mut found = Vec::new();
    let mut sequence = stream.cached_info().state.first_sequence;
    while sequence <= stream.cached_info().state.last_sequence {
        // A work queue has one consumer for each subject, so it is read message by message; it is nearly always empty.
        let asked = stream.raw_message_builder().sequence(sequence).next_by_subject(">");
        let message = match asked.send().await {
            Ok(message) => message,
            Err(problem) if problem.kind() == RawMessageErrorKind::NoMessageFound => break,
            Err(problem) => return Err(problem).with_context(cannot),
        };
        sequence = message.sequence + 1;
        let case: Option<suspects::Case> = serde_json::from_slice(&message.payload).ok();
        let ours = |case: &suspects::Case| case.stream == streams::ORDERS && case.consumer == streams::PRODUCT_ORDERS;
        found.extend(case.filter(ours).map(|case| case.stream_seq));
    }
    Ok(found)
}

fn is_missing(problem: &GetStreamError) -> bool {
    matches!(problem.kind(), GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND)
}

/// Reads the letters of `product-orders`; returns how many letters the stream lost, whosever they were.
async fn read_letters(context: &Context, audit: &mut Audit, show: Show) -> anyhow::Result<u64> {
    let filter = subject::dead_letter(streams::PRODUCT_ORDERS);
    let state = read_subject(context, dead_letter::STREAM, &filter, show, |letter| {
        let of_orders = text(&letter.headers, dead_letter::ORIGIN_STREAM) == Some(streams::ORDERS);
        let origin = text(&letter.headers, dead_letter::ORIGIN_SEQUENCE).and_then(|text| text.parse().ok());
        audit.observe_letter(letter.sequence, origin.filter(|_| of_orders));
    })
    .await?;
    Ok(state.last_sequence.saturating_sub(state.messages))
}

/// Reads the orders; returns the last sequence of their stream.
async fn read_orders(context: &Context, audit: &mut Audit, show: Show) -> anyhow::Result<u64> {
    let filter = Topic::OrdersCreated.as_str();
    let state = read_subject(context, streams::ORDERS, filter, show, |message| {
        let sequence = message.sequence;
        // Nobody is given it, whatever its payload is.
        if let Some(why) = &message.unreadable {
            return audit.observe_malformed_order(sequence, &format!("its headers cannot be read: {why}"));
        }
        let decoded = ContentType::from_header(text(&message.headers, header::CONTENT_TYPE))
            .and_then(|content_type| codec::decode::<OrderCreated>(content_type, &message.payload));
        match decoded {
            Ok(envelope) => audit.observe_order(sequence, &envelope.payload),
            Err(problem) => audit.observe_malformed_order(sequence, &problem.to_string()),
        }
    })
    .await?;
    Ok(state.last_sequence)
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).map(async_nats::HeaderValue::as_str)
}

/// Reads all messages of `stream` on `filter` that are there now. Gaps are allowed: both streams may be cleaned up.
async fn read_subject(
    context: &Context,
    stream: &str,
    filter: &str,
    show: Show,
    mut each: impl FnMut(&direct::Held),
) -> anyhow::Result<async_nats::jetstream::stream::State> {
    let cannot = || format!("{stream} cannot be read; does it exist? `lomash status` shows");
    let handle = context.get_stream(stream).await.with_context(cannot)?;
    let state = handle.cached_info().state.clone();
    let mut progress = show.progress(&format!("reading {stream}"), state.messages);
    let mut seen = 0;
    let mut interruptions = 0;
    while seen < state.last_sequence {
        let before = seen;
        let mut messages = direct::read(context, stream, Some(filter), seen, state.last_sequence);
        let interrupted = loop {
            match messages.next().await {
                Some(Ok(message)) => {
                    each(&message);
                    seen = message.sequence;
                    progress.inc(1);
                }
                Some(Err(problem)) => break problem,
                None => {
                    progress.finish();
                    return Ok(state);
                }
            }
        };
        interruptions = if seen == before { interruptions + 1 } else { 0 };
        if interruptions > MAX_INTERRUPTIONS {
            bail!("{stream} cannot be read on after sequence {seen}: {interrupted}");
        }
        tokio::time::sleep(INTERRUPTION_PAUSE).await;
    }
    progress.finish();
    Ok(state)
}

// ── INVENTORY ───────────────────────────────────────────────────────────────────────────────────────────────────

/// Feeds the auditor from the stream.
struct Fold<'f> {
    context: &'f Context,
    ledger: &'f JetStreamLedger,
    audit: &'f mut Audit,
    progress: &'f mut Progress,
}

impl Fold<'_> {
    /// Folds on up to and including `upto`, comparing rows when there is a snapshot.
    async fn run(&mut self, upto: u64, mut snapshot: Option<&mut Snapshot<'_>>) -> anyhow::Result<()> {
        let mut interruptions = 0;
        while self.audit.sequence() < upto {
            let before = self.audit.sequence();
            let problem = match self.pass(upto, &mut snapshot).await {
                Ok(()) => continue,
                Err(ReadError::Gap { after, found }) => {
                    self.audit.observe_gap(after, found.min(upto + 1));
                    continue;
                }
                Err(ReadError::Unavailable(problem)) => problem,
                Err(problem @ (ReadError::WentBackwards { .. } | ReadError::Replaced { .. })) => {
                    return Err(problem.into());
                }
            };
            let at = self.audit.sequence();
            if at == before {
                // Silence may also mean that the end of the stream was taken away.
                if self.is_gone(at + 1).await {
                    self.audit.observe_gap(at, upto + 1);
                    continue;
                }
                interruptions += 1;
            } else {
                interruptions = 0;
            }
            if interruptions > MAX_INTERRUPTIONS {
                bail!("INVENTORY cannot be read on after sequence {at}: {problem}");
            }
            tokio::time::sleep(INTERRUPTION_PAUSE).await;
        }
        Ok(())
    }

    async fn pass(&mut self, upto: u64, snapshot: &mut Option<&mut Snapshot<'_>>) -> Result<(), ReadError> {
        let mut messages = self.ledger.read(self.audit.sequence()).await?;
        while let Some(message) = messages.next().await {
            let message = message?;
            let projected = self.audit.observe(&message);
            self.progress.inc(1);
            if let Some(snapshot) = snapshot {
                snapshot.compare(projected).await;
            }
            if message.sequence == upto {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn is_gone(&self, sequence: u64) -> bool {
        let Ok(stream) = self.context.get_stream_no_info(streams::INVENTORY).await else {
            return false;
        };
        let answer = stream.get_raw_message(sequence).await;
        answer.is_err_and(|error| matches!(error.kind(), RawMessageErrorKind::NoMessageFound))
    }

    /// The last sequence may be looked up while a batch is being stored; its rest is there in a moment.
    async fn run_to_end_of_batch(&mut self) -> anyhow::Result<()> {
        let mut looks = 0;
        while self.audit.in_batch() && looks < MAX_LOOKS_FOR_REST {
            let next = self.audit.sequence() + 1;
            if self.ledger.last_sequence().await? >= next {
                self.run(next, None).await?;
            } else {
                looks += 1;
                tokio::time::sleep(WAIT_PAUSE).await;
            }
        }
        Ok(())
    }
}

// ── Printing ────────────────────────────────────────────────────────────────────────────────────────────────────

/// The report as a person reads it.
#[must_use]
pub fn render(report: &Report) -> String {
    let as_of = &report.as_of;
    let floor = as_of.orders_ack_floor.map_or_else(|| "none".to_owned(), output::thousands);
    let checkpoint = as_of
        .projection_checkpoint
        .map_or_else(String::new, |checkpoint| format!(", the projection at {}", output::thousands(checkpoint)));
    let mut text = format!(
        "Read from the streams: INVENTORY up to sequence {}, ORDERS up to {} (acknowledged up to {floor}){checkpoint}.\n",
        output::thousands(as_of.inventory_sequence),
        output::thousands(as_of.orders_sequence),
    );
    let mut table = output::table(&["", "what must hold", "", "checked", "violations"]);
    for invariant in &report.invariants {
        let checked: Vec<String> = invariant
            .checked
            .iter()
            .map(|count| format!("{} {}", output::thousands(count.count), count.what))
            .collect();
        table.add_row([
            output::number_cell(u64::from(invariant.number)),
            Cell::new(invariant.holds),
            Cell::new(invariant.status),
            Cell::new(checked.join(", ")),
            output::number_cell(invariant.violations),
        ]);
    }
    text.push_str(&format!("{table}\n"));
    for invariant in &report.invariants {
        for violation in &invariant.first {
            text.push_str(&format!("violates {}: {violation}\n", invariant.number));
        }
        let more = invariant.violations.saturating_sub(invariant.first.len() as u64);
        if more > 0 {
            text.push_str(&format!("violates {}: and {} more\n", invariant.number, output::thousands(more)));
        }
        for note in &invariant.notes {
            text.push_str(&format!("note on {}: {note}\n", invariant.number));
        }
    }
    let unchecked: Vec<String> =
        report.unchecked().map(|invariant| format!("invariant {}", invariant.number)).collect();
    let violated = report.invariants.iter().filter(|invariant| invariant.status == Status::Violated).count();
    text.push_str(&match (violated, unchecked.is_empty()) {
        (0, true) => "Clean: every invariant holds.\n".to_owned(),
        (0, false) => format!("Clean as far as it was checked; {} was not.\n", unchecked.join(", ")),
        (violated, _) => format!("NOT clean: {violated} of {} invariants are violated.\n", report.invariants.len()),
    });
    text
}
