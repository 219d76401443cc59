//! The study of start-up: how long the service takes to be there on a long stream, folding all of it or from a snapshot, and
//! how much memory it holds then.
//!
//! A start is timed from outside, from the start of the process to its first answer, so the fold's rate has everything else
//! of a start in it. The projection is up to date before, and has nothing to do.
//!
//! Snapshots are an object store that the service makes and fills upon a tick in `JOBS`. A service that makes none has no
//! figure of a start from one. Whatever object stores there are is taken away before a start that is to fold.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use async_nats::jetstream::Context;
use bytes::Bytes;
use futures::TryStreamExt;
use lomash_ledger::{Ledger, streams};

use super::bed::Bed;
use super::cost::megabytes;
use super::projection::bare_read;
use super::report::{Row, Spread, Study};
use super::scenario::Scenario;
use super::studies::{Effort, per_second};
use super::targets::{FULL_HISTORY, FULL_PRODUCTS};
use super::usage::Usage;
use super::workload::Source;
use crate::output;

/// What the server calls the stream of an object store, before its name.
const OBJECT_STORE: &str = "OBJ_";

/// The tick upon which the service writes a snapshot, and how few events make one worth it here.
const SNAPSHOT_TICK: &str = "lomash.jobs.snapshot";
const SNAPSHOT_AFTER: (&str, &str) = ("SNAPSHOT_AFTER_EVENTS", "1");

/// How long writing a snapshot may take, and how often it is looked whether it is written.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);
const SNAPSHOT_PAUSE: Duration = Duration::from_millis(50);

/// Measures on the bed after the orders of the history were decided, as far as they are missing.
pub(super) async fn run(bed: &mut Bed, source: &mut Source, effort: Effort) -> anyhow::Result<Study> {
    let Effort { extent, rounds, show, .. } = effort;
    let missing = extent.history.saturating_sub((bed.due.0 + bed.due.1) as usize);
    bed.service.set_env(SNAPSHOT_AFTER.0, SNAPSHOT_AFTER.1);
    bed.start_service().await?;
    bed.put(source, missing, "start", show).await?;
    bed.quiet().await?;
    let has_snapshot = write_snapshot(bed).await?;
    let mut memory = resident(bed)?;
    bed.stop_service().await?;
    let events = bed.ledger.last_sequence().await?;
    let orders = bed.due.0 + bed.due.1;
    let title = format!(
        "start: {} events, of {} products and {} orders",
        output::thousands(events),
        output::thousands(extent.many_products as u64),
        output::thousands(orders)
    );
    let mut study = Study::new(Scenario::Start, title);
    study.rows.push(Row::new("after deciding", vec![("product MB", memory)]));

    let seconds = |started: &[Duration]| Spread::of(started.iter().map(Duration::as_secs_f64).collect());
    let mut row = |what: &str, started: &[Duration], memory: f64| {
        let spread = seconds(started).context("nothing was measured")?;
        let rate = events as f64 / spread.median;
        let figures = vec![
            ("seconds", spread.median),
            ("min", spread.min),
            ("max", spread.max),
            ("events/s", rate),
            ("product MB", memory),
        ];
        study.rows.push(Row::new(what, figures));
        anyhow::Ok(spread.median)
    };
    let mut from_snapshot = None;
    if has_snapshot {
        let mut started = Vec::new();
        for _ in 0..rounds {
            started.push(bed.start_service().await?);
            memory = memory.max(resident(bed)?);
            bed.stop_service().await?;
        }
        from_snapshot = Some(row("from a snapshot", &started, memory)?);
    }
    let (mut read, mut folded) = (Vec::new(), Vec::new());
    let mut memory_after_fold: f64 = 0.0;
    for _ in 0..rounds {
        read.push(bare_read(&bed.context, events).await?);
        for store in object_stores(&bed.context).await? {
            bed.context.delete_stream(&store).await.with_context(|| format!("{store} cannot be taken away"))?;
        }
        folded.push(bed.start_service().await?);
        memory_after_fold = memory_after_fold.max(resident(bed)?);
        bed.stop_service().await?;
    }
    let fold_seconds = row("folding the whole stream", &folded, memory_after_fold)?;
    let read = Spread::of(read.into_iter().map(|taken| per_second(events, taken)).collect());
    let read = read.context("nothing was read")?;
    study.rows.push(Row::new("bare read of the stream", vec![("events/s", read.median)]));
    study.ratio("start_folding_over_bare_read", events as f64 / fold_seconds / read.median);

    let memory = memory.max(memory_after_fold);
    if extent.many_products >= FULL_PRODUCTS && orders >= FULL_HISTORY {
        study.ratio("product_memory_mb", memory);
    } else {
        study
            .notes
            .push(format!("Its memory is a target with {FULL_PRODUCTS} products and {FULL_HISTORY} orders only."));
    }
    match from_snapshot {
        Some(seconds) if events >= FULL_HISTORY => study.ratio("start_from_snapshot_seconds", seconds),
        Some(_) => study.notes.push(format!("A start from a snapshot is a target with {FULL_HISTORY} events only.")),
        None => study.notes.push("The service keeps no snapshots.".to_owned()),
    }
    Ok(study)
}

fn resident(bed: &Bed) -> anyhow::Result<f64> {
    let pid = bed.service.pid().context("the service does not run")?;
    Ok(megabytes(Usage::of(pid)?.resident_bytes))
}

/// Has the service write a snapshot, if it writes any: its tick is gone when it has.
async fn write_snapshot(bed: &Bed) -> anyhow::Result<bool> {
    if object_stores(&bed.context).await?.is_empty() {
        return Ok(false);
    }
    let tick = bed.context.publish(SNAPSHOT_TICK, Bytes::new()).await.context("the tick cannot be sent")?;
    tick.await.context("the stream JOBS does not take the tick")?;
    let jobs = bed.context.get_stream(streams::JOBS).await.context("JOBS cannot be read")?;
    let deadline = Instant::now() + SNAPSHOT_TIMEOUT;
    let written = async {
        while jobs.get_last_raw_message_by_subject(SNAPSHOT_TICK).await.is_ok() {
            ensure!(Instant::now() < deadline, "no snapshot within {} s", SNAPSHOT_TIMEOUT.as_secs());
            tokio::time::sleep(SNAPSHOT_PAUSE).await;
        }
        Ok(true)
    };
    bed.while_running(written).await
}

async fn object_stores(context: &Context) -> anyhow::Result<Vec<String>> {
    let names: Vec<String> = context.stream_names().try_collect().await.context("the streams cannot be listed")?;
    Ok(names.into_iter().filter(|name| name.starts_with(OBJECT_STORE)).collect())
}
