//! `lomash rebuild`: the projection anew from the stream beside the live one, compared with it, and put in its place.
//!
//! Owns the order of the steps and what is told about them; the shadow and the swap are `product_service::rebuild`'s.
//!
//! 1. Load from sequence 1 to where the live projection stands (to the end of the stream, if there is none), build the
//!    indexes, and come close again.
//! 2. Compare: a repeatable-read snapshot holds the live rows at their checkpoint n; the shadow is brought to exactly n.
//!    The shadow never gets beyond a live checkpoint that was seen before, so n can be reached. What differs is told; it
//!    is the reason to rebuild, so it prevents the swap only when asked to.
//! 3. Load on to the end of the stream, and swap.

mod metrics;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, bail};
use async_nats::jetstream::Context;
use clap::{Args, ValueEnum};
use lomash_ledger::{JetStreamLedger, Ledger, streams};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, ANALYTICS, Family, INVENTORY, Schema};
use lomash_platform::schemas::{self, Swapped};
use product_service::rebuild::{CLOSE, Rebuild, roll_back};
use serde::Serialize;

use self::metrics::AnalyticsShadow;
use crate::audit::TableReport;
use crate::output::{self, Cell};
use crate::snapshot::Snapshot;
use crate::verify::Show;

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash rebuild";

/// How often the shadow is brought to the end of a stream that grows meanwhile before the rest is left to the swap.
const MAX_APPROACHES: u32 = 20;

/// Which projection is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Projection {
    /// The read model of the product service.
    #[default]
    Inventory,
    /// The stock metrics of the analytics service.
    Analytics,
}

impl Projection {
    const fn family(self) -> &'static Family {
        match self {
            Self::Inventory => &INVENTORY,
            Self::Analytics => &ANALYTICS,
        }
    }
}

/// Builds the projection anew from the stream beside the live one, compares them, and swaps them. Reads and writes go on.
#[derive(Clone, Debug, Args)]
pub struct RebuildArgs {
    /// Which projection.
    #[arg(value_enum, default_value_t)]
    pub projection: Projection,
    /// The NATS server or servers.
    #[arg(long, env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// Who asks.
    #[command(flatten)]
    pub nats_identity: lomash_platform::nats::Identity,
    /// The Postgres database of the projection.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Secret,
    /// What else is wished.
    #[command(flatten)]
    pub options: Options,
    /// Go back to the projection that the last rebuild replaced; again, to come forth.
    #[arg(long, conflicts_with_all = ["dry_run", "only_if_equal"])]
    pub rollback: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// How far a rebuild goes.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Options {
    /// Build and compare, then drop what was built. Fails if they differ.
    #[arg(long, conflicts_with = "only_if_equal")]
    pub dry_run: bool,
    /// Do not swap, and fail, if the live projection differs from the one that was built.
    #[arg(long)]
    pub only_if_equal: bool,
}

/// What a rebuild found and did.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Events loaded in bulk.
    pub loaded_events: u64,
    /// How long that took.
    pub load_seconds: f64,
    /// How long it took to build indexes and statistics.
    pub index_seconds: f64,
    /// Events a second over load, indexes and statistics.
    pub events_per_second: u64,
    /// What came of comparing it with the live one.
    pub comparison: Comparison,
    /// The swap, if there was one.
    pub swap: Option<Swap>,
}

/// What came of comparing the live projection with the one that was built.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "result")]
pub enum Comparison {
    /// There is no live projection, or an empty one.
    NothingLive,
    /// The live one cannot be read.
    Unreadable {
        /// Why.
        problem: String,
    },
    /// They were compared row by row.
    Compared {
        /// At this sequence.
        sequence: u64,
        /// Messages that were not ours: as the live one counted them, and as they were counted now.
        skipped: [u64; 2],
        /// The tables; `fold` is the projection that was built.
        tables: Vec<TableReport>,
    },
}

/// A swap of schemas.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Swap {
    /// Where the projection stands that is live now.
    pub checkpoint: u64,
    /// Where the one stood that was live before.
    pub replaced_checkpoint: Option<u64>,
    /// Where the stream ended a moment later.
    pub stream_sequence: u64,
    /// Whether `--rollback` can undo it.
    pub can_be_undone: bool,
}

impl Comparison {
    /// Whether nothing speaks against the live projection.
    #[must_use]
    pub fn is_equal(&self) -> bool {
        match self {
            Self::NothingLive => true,
            Self::Unreadable { .. } => false,
            Self::Compared { skipped: [live, built], tables, .. } => {
                live == built
                    && tables.iter().all(|table| table.differences == 0 && table.fold_sha256 == table.projection_sha256)
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When it cannot be carried out; the live projection is then as it was.
pub async fn run(args: RebuildArgs) -> anyhow::Result<ExitCode> {
    let (client, _) = lomash_platform::nats::connect_as(&args.nats_url, &args.nats_identity, CLIENT_NAME).await?;
    let context = async_nats::jetstream::new(client);
    let family = args.projection.family();
    if args.rollback {
        let swap = rollback_of(args.projection, &context, &args.database_url).await?;
        if args.json {
            output::print_json(&swap)?;
        } else {
            output::print(render_swap(&swap, "the projection that the last rebuild replaced", family));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let outcome = rebuild_of(args.projection, &context, &args.database_url, args.options, Show::Progress).await?;
    if args.json {
        output::print_json(&outcome)?;
    } else {
        output::print(render_of(&outcome, family));
    }
    let Options { dry_run, only_if_equal } = args.options;
    let fine = outcome.comparison.is_equal() || !(dry_run || only_if_equal);
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A projection that is being built beside the live one, as the steps of a rebuild see it.
trait Shadow: Sized {
    /// Where it stands.
    fn checkpoint(&self) -> u64;

    /// Loads on, up to `upto` or as near to it as it can stop.
    async fn load(&mut self, upto: u64, loaded: &mut impl FnMut(u64)) -> anyhow::Result<()>;

    /// Makes what was loaded fit to be read: indexes, statistics.
    async fn finish(&mut self) -> anyhow::Result<()>;

    /// Writes all that can be written before a swap: the projector waits during it.
    async fn settle(&mut self) -> anyhow::Result<()>;

    /// Compares it with the live one, at the checkpoint of that. The inner error is about the live one and is told; the
    /// outer one ends the rebuild.
    async fn compare(&mut self, database_url: &Secret, show: Show) -> anyhow::Result<anyhow::Result<Comparison>>;

    /// Puts it in the place of the live one.
    async fn swap(self) -> anyhow::Result<Swapped>;

    /// Drops it.
    async fn discard(self) -> anyhow::Result<()>;
}

impl<L: Ledger> Shadow for Rebuild<L> {
    fn checkpoint(&self) -> u64 {
        Self::checkpoint(self)
    }

    async fn load(&mut self, upto: u64, loaded: &mut impl FnMut(u64)) -> anyhow::Result<()> {
        Self::load(self, upto, loaded).await
    }

    async fn finish(&mut self) -> anyhow::Result<()> {
        Self::finish(self).await
    }

    async fn settle(&mut self) -> anyhow::Result<()> {
        Self::settle(self).await
    }

    async fn compare(&mut self, database_url: &Secret, show: Show) -> anyhow::Result<anyhow::Result<Comparison>> {
        compare(self, database_url, show).await
    }

    async fn swap(self) -> anyhow::Result<Swapped> {
        Self::swap(self).await
    }

    async fn discard(self) -> anyhow::Result<()> {
        Self::discard(self).await
    }
}

/// Builds the inventory projection, compares it and, if `options` have nothing against it, swaps it.
///
/// # Errors
/// When it cannot be carried out; the live projection is then as it was.
pub async fn rebuild(
    context: &Context,
    database_url: &Secret,
    options: Options,
    show: Show,
) -> anyhow::Result<Outcome> {
    rebuild_of(Projection::Inventory, context, database_url, options, show).await
}

/// The same for any projection.
///
/// # Errors
/// When it cannot be carried out; the live projection is then as it was.
pub async fn rebuild_of(
    projection: Projection,
    context: &Context,
    database_url: &Secret,
    options: Options,
    show: Show,
) -> anyhow::Result<Outcome> {
    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY).through(streams::REBUILD);
    let family = projection.family();
    match projection {
        Projection::Inventory => {
            let shadow = Rebuild::begin(ledger.clone(), database_url).await?;
            carry_out(shadow, family, &ledger, database_url, options, show).await
        }
        Projection::Analytics => {
            let shadow = AnalyticsShadow::begin(ledger.clone(), database_url).await?;
            carry_out(shadow, family, &ledger, database_url, options, show).await
        }
    }
}

async fn carry_out<S: Shadow>(
    mut shadow: S,
    family: &'static Family,
    ledger: &JetStreamLedger,
    database_url: &Secret,
    options: Options,
    show: Show,
) -> anyhow::Result<Outcome> {
    let database = postgres::connect(database_url).await?;
    let live_checkpoint = async || schemas::checkpoint(&database, family, family.live).await;
    let started = Instant::now();
    let live = live_checkpoint().await?.unwrap_or(0);
    let goal = if live == 0 { ledger.last_sequence().await? } else { live };
    load(&mut shadow, "loading events", goal, show).await?;
    let loaded_events = shadow.checkpoint();
    let load_time = started.elapsed();
    tell(show, &format!("{} events loaded; building indexes", output::thousands(loaded_events)));
    shadow.finish().await?;
    let ready_time = started.elapsed();

    let comparison = if live == 0 {
        Comparison::NothingLive
    } else {
        for _ in 0..MAX_APPROACHES {
            let live = live_checkpoint().await?.unwrap_or(0);
            if live <= shadow.checkpoint() + CLOSE {
                break;
            }
            load(&mut shadow, "loading what came since", live, show).await?;
        }
        match shadow.compare(database_url, show).await? {
            Ok(comparison) => comparison,
            Err(problem) => Comparison::Unreadable { problem: format!("{problem:#}") },
        }
    };
    let mut outcome = Outcome {
        loaded_events,
        load_seconds: load_time.as_secs_f64(),
        index_seconds: (ready_time - load_time).as_secs_f64(),
        events_per_second: output::rate(loaded_events, ready_time),
        comparison,
        swap: None,
    };
    if options.dry_run || (options.only_if_equal && !outcome.comparison.is_equal()) {
        shadow.discard().await?;
        return Ok(outcome);
    }

    for _ in 0..MAX_APPROACHES {
        let last = ledger.last_sequence().await?;
        if last <= shadow.checkpoint() + CLOSE {
            break;
        }
        load(&mut shadow, "loading what came since", last, show).await?;
    }
    shadow.settle().await?;
    outcome.swap = Some(told(shadow.swap().await?, ledger).await?);
    Ok(outcome)
}

/// Makes the previous inventory projection live again, and the live one the previous.
///
/// # Errors
/// When it cannot be carried out; the live projection is then as it was.
pub async fn rollback(context: &Context, database_url: &Secret) -> anyhow::Result<Swap> {
    rollback_of(Projection::Inventory, context, database_url).await
}

/// The same for any projection.
///
/// # Errors
/// When it cannot be carried out; the live projection is then as it was.
pub async fn rollback_of(projection: Projection, context: &Context, database_url: &Secret) -> anyhow::Result<Swap> {
    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY);
    let swapped = match projection {
        Projection::Inventory => roll_back(&ledger, database_url).await?,
        Projection::Analytics => analytics_service::rebuild::roll_back(&ledger, database_url).await?,
    };
    told(swapped, &ledger).await
}

async fn told(swapped: Swapped, ledger: &JetStreamLedger) -> anyhow::Result<Swap> {
    Ok(Swap {
        checkpoint: swapped.checkpoint,
        replaced_checkpoint: swapped.replaced,
        stream_sequence: ledger.last_sequence().await?,
        can_be_undone: swapped.kept,
    })
}

async fn load<S: Shadow>(shadow: &mut S, what: &str, upto: u64, show: Show) -> anyhow::Result<()> {
    let mut progress = show.progress(what, upto.saturating_sub(shadow.checkpoint()));
    shadow.load(upto, &mut |loaded| progress.inc(loaded)).await?;
    progress.finish();
    Ok(())
}

/// See [`Shadow::compare`].
async fn compare<L: Ledger>(
    shadow: &mut Rebuild<L>,
    database_url: &Secret,
    show: Show,
) -> anyhow::Result<anyhow::Result<Comparison>> {
    let mut live_client = postgres::connect(database_url).await?;
    let live = match Snapshot::open(&mut live_client, Schema::Live).await {
        Ok(live) => live,
        Err(problem) => return Ok(Err(problem)),
    };
    let sequence = live.checkpoint;
    shadow.load(sequence, &mut |_| {}).await?;
    shadow.settle().await?;
    let reached = shadow.checkpoint();
    if reached > sequence {
        return Ok(Err(anyhow::anyhow!(
            "its checkpoint went back to {sequence} meanwhile; was its schema dropped or restored?"
        )));
    }
    if reached < sequence {
        return Ok(Err(anyhow::anyhow!(
            "its checkpoint {sequence} is not the end of an atomic batch; the last one before it is {reached}"
        )));
    }
    let mut shadow_client = postgres::connect(database_url).await?;
    let built = Snapshot::open(&mut shadow_client, Schema::Shadow).await.context("the shadow cannot be read")?;
    if built.checkpoint != sequence {
        bail!("the shadow stands at {} and not at {sequence}: something else writes to it", built.checkpoint);
    }
    let skipped = [live.skipped, built.skipped];
    let mut progress = show.progress(&format!("comparing at {}", output::thousands(sequence)), sequence);
    let tables = live.compare_with(&built, &mut || progress.inc(1)).await;
    progress.finish();
    Ok(tables.map(|tables| Comparison::Compared { sequence, skipped, tables }).map_err(|problem| {
        let detail = problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string);
        anyhow::anyhow!("it could not be read to its end: {detail}")
    }))
}

fn tell(show: Show, sentence: &str) {
    if show == Show::Progress {
        output::tell(sentence);
    }
}

/// The outcome of rebuilding the inventory projection, as a person reads it.
#[must_use]
pub fn render(outcome: &Outcome) -> String {
    render_of(outcome, &INVENTORY)
}

/// The outcome as a person reads it.
fn render_of(outcome: &Outcome, family: &Family) -> String {
    let Outcome { loaded_events, load_seconds, index_seconds, events_per_second, comparison, swap } = outcome;
    let mut text = format!(
        "Loaded from the stream: {} events in {load_seconds:.1} s, indexes and statistics in {index_seconds:.1} s; {} events \
         a second.\n",
        output::thousands(*loaded_events),
        output::thousands(*events_per_second),
    );
    match comparison {
        Comparison::NothingLive => text.push_str("There is no live projection to compare it with.\n"),
        Comparison::Unreadable { problem } => {
            text.push_str(&format!("The live projection cannot be compared: {problem}\n"));
        }
        Comparison::Compared { sequence, skipped: [live, built], tables } => {
            text.push_str(&format!("Compared at sequence {}:\n", output::thousands(*sequence)));
            let mut shown = output::table(&["table", "rows built", "rows live", "differences", "sha256 built", "live"]);
            for table in tables {
                shown.add_row([
                    Cell::new(table.table),
                    output::number_cell(table.fold_rows),
                    output::number_cell(table.projection_rows),
                    output::number_cell(table.differences),
                    Cell::new(short(&table.fold_sha256)),
                    Cell::new(short(&table.projection_sha256)),
                ]);
            }
            text.push_str(&format!("{shown}\n"));
            for table in tables {
                for difference in &table.first {
                    text.push_str(&format!("differs: {difference}\n"));
                }
                let more = table.differences.saturating_sub(table.first.len() as u64);
                if more > 0 {
                    text.push_str(&format!("differs: {} more rows of {}\n", output::thousands(more), table.table));
                }
            }
            if live != built {
                text.push_str(&format!("differs: the live projection skipped {live} messages, {built} are not ours\n"));
            }
            let verdict = if comparison.is_equal() {
                "The live projection equals the stream."
            } else {
                "The live projection does NOT equal the stream."
            };
            text.push_str(&format!("{verdict}\n"));
        }
    }
    match swap {
        Some(swap) => text.push_str(&render_swap(swap, "the one that was built", family)),
        None => text.push_str("Not swapped; what was built is dropped, the live projection is as it was.\n"),
    }
    text
}

fn render_swap(swap: &Swap, what: &str, family: &Family) -> String {
    let mut text = format!("Live now: {what}, at sequence {}", output::thousands(swap.checkpoint));
    let behind = swap.stream_sequence.saturating_sub(swap.checkpoint);
    if behind > 0 {
        text.push_str(&format!(", {} events behind; a running service catches up", output::thousands(behind)));
    }
    text.push_str(".\n");
    if swap.can_be_undone {
        text.push_str(&format!(
            "Kept as {}: what was live before. `{} --rollback` swaps them.\n",
            family.previous, family.rebuild_command
        ));
    }
    text
}

/// Enough of a digest to see that two are the same; the whole is in the JSON.
fn short(digest: &str) -> &str {
    digest.get(..16).unwrap_or(digest)
}
