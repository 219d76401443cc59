//! The study of the projection: events a second into Postgres, live and in a rebuild, beside what the two servers can do.
//!
//! - *catching up*: the real service finds its schema gone and fills it from the stream. From the last look that still saw
//!   nothing projected to the first that sees everything.
//! - *rebuild*: what `lomash rebuild` says of itself: loading, indexes, statistics. The rows are compared with the live
//!   ones, and if they differ there is no figure.
//! - *bare read*: the same messages from a consumer that acknowledges nothing; nobody looks at them.
//! - *bare COPY*: the same rows, in memory already, in large pieces and one transaction into tables without keys, indexes or
//!   checks. Both leave syncing to the server's next checkpoint (`synchronous_commit` off), as a rebuild does.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt, TryStreamExt};
use lomash_ledger::{Ledger, READ_STALL_TIMEOUT, streams};
use lomash_platform::Secret;
use lomash_platform::postgres::{self, INVENTORY, Schema};
use lomash_platform::schemas::checkpoint;
use tokio_postgres::Client;

use super::bed::{Bed, POLL_EVERY};
use super::report::{Row, Spread, Study};
use super::scenario::Scenario;
use super::studies::{Effort, per_second};
use super::workload::Source;
use crate::output;
use crate::rebuild::{self, Options};
use crate::verify::Show;

/// Orders of the study for one of a race: events are written faster than orders are decided.
const ORDERS_FACTOR: usize = 2;

/// Messages of one pull of the bare read, and pieces of the bare COPY.
const READ_AT_ONCE: usize = 5_000;
const PIECE_BYTES: usize = 256 * 1024;

/// How long catching up may take.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(1_800);

/// The tables of the projection that hold rows.
const TABLES: [&str; 5] = ["products", "stock", "movements", "order_decisions", "counts"];

/// Measures on the bed; its stream grows by the orders of the study.
pub(super) async fn run(bed: &mut Bed, source: &mut Source, effort: Effort) -> anyhow::Result<Study> {
    let Effort { extent, rounds, show, .. } = effort;
    bed.put(source, ORDERS_FACTOR * extent.one_line, "projection", show).await?;
    bed.start_service().await?;
    bed.quiet().await?;
    bed.stop_service().await?;
    let events = bed.ledger.last_sequence().await?;
    let mut study =
        Study::new(Scenario::Projection, format!("projection: {} events, events a second", output::thousands(events)));
    let [mut read, mut copied, mut caught_up, mut rebuilt] = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        read.push(per_second(events, bare_read(&bed.context, events).await?));
        copied.push(per_second(events, bare_copy(&bed.database).await?));
        caught_up.push(per_second(events, catch_up(bed, events, show).await?));
        let options = Options { dry_run: true, ..Options::default() };
        let outcome = rebuild::rebuild(&bed.context, &bed.database, options, Show::Nothing).await?;
        if !outcome.comparison.is_equal() {
            let problem = format!("the rebuilt rows are not the live ones: {:?}", outcome.comparison);
            return Ok(study.checked(Some(problem)));
        }
        rebuilt.push(outcome.loaded_events as f64 / (outcome.load_seconds + outcome.index_seconds));
    }
    let mut medians = Vec::new();
    for (what, rates) in [
        ("live, catching up", caught_up),
        ("rebuild", rebuilt),
        ("bare read of the stream", read),
        ("bare binary COPY of the same rows", copied),
    ] {
        let spread = Spread::of(rates).context("nothing was measured")?;
        medians.push(spread.median);
        study.rows.push(Row::of_rates(what, "events/s", spread));
    }
    if let [caught_up, rebuilt, read, copied] = medians[..] {
        study.ratio("catching_up_over_slower_of_read_and_copy", caught_up / read.min(copied));
        study.ratio("rebuild_over_slower_of_read_and_copy", rebuilt / read.min(copied));
    }
    Ok(study)
}

/// Reads the stream's first `events` messages and looks at none.
pub(super) async fn bare_read(context: &Context, events: u64) -> anyhow::Result<Duration> {
    let stream = context.get_stream(streams::INVENTORY).await.context("INVENTORY cannot be read")?;
    let config = pull::Config { ack_policy: AckPolicy::None, memory_storage: true, ..pull::Config::default() };
    let mut consumer: PullConsumer = stream.create_consumer(config).await.context("no consumer can be made")?;
    let started = Instant::now();
    let mut messages = consumer
        .stream()
        .max_messages_per_batch(READ_AT_ONCE)
        .messages()
        .await
        .context("the bare read cannot begin")?;
    for seen in 0..events {
        match tokio::time::timeout(READ_STALL_TIMEOUT, messages.next()).await {
            Ok(Some(message)) => message.context("the bare read broke off").map(drop)?,
            Ok(None) | Err(_) => bail!("the bare read stopped at {seen} of {events} messages"),
        }
    }
    let taken = started.elapsed();
    drop(messages);
    let name = consumer.info().await.context("the consumer cannot be found")?.name.clone();
    stream.delete_consumer(&name).await.context("the consumer cannot be removed")?;
    Ok(taken)
}

/// Writes the live rows once more, into tables beside them.
async fn bare_copy(database: &Secret) -> anyhow::Result<Duration> {
    let client = postgres::connect(database).await?;
    client.batch_execute("DROP SCHEMA IF EXISTS bench_copy CASCADE; CREATE SCHEMA bench_copy").await?;
    let mut pieces = Vec::with_capacity(TABLES.len());
    for table in TABLES {
        let live = Schema::Live;
        client.batch_execute(&format!("CREATE TABLE bench_copy.{table} AS TABLE {live}.{table} WITH NO DATA")).await?;
        pieces.push((table, rows_of(&client, &format!("SELECT * FROM {live}.{table}")).await?));
    }
    client.batch_execute("SET synchronous_commit = off; CHECKPOINT").await?;
    let started = Instant::now();
    client.batch_execute("BEGIN").await?;
    for (table, pieces) in pieces {
        let sink = client.copy_in::<_, Bytes>(&format!("COPY bench_copy.{table} FROM STDIN BINARY")).await?;
        let mut sink = std::pin::pin!(sink);
        for piece in pieces {
            sink.feed(piece).await.context("a bare COPY broke off")?;
        }
        sink.finish().await.context("a bare COPY was refused")?;
    }
    client.batch_execute("COMMIT").await?;
    let taken = started.elapsed();
    client.batch_execute("DROP SCHEMA bench_copy CASCADE").await?;
    Ok(taken)
}

/// The rows in the form that `COPY` takes, in large pieces.
async fn rows_of(client: &Client, query: &str) -> anyhow::Result<Vec<Bytes>> {
    let rows = client.copy_out(&format!("COPY ({query}) TO STDOUT BINARY")).await?;
    let mut rows = std::pin::pin!(rows);
    let mut pieces = Vec::new();
    let mut piece = BytesMut::new();
    while let Some(row) = rows.try_next().await.context("the live rows cannot be read")? {
        piece.extend_from_slice(&row);
        if piece.len() >= PIECE_BYTES {
            pieces.push(piece.split().freeze());
        }
    }
    pieces.push(piece.freeze());
    Ok(pieces)
}

/// Takes the projection away from the service, starts it, and waits until it is there again.
async fn catch_up(bed: &mut Bed, events: u64, show: Show) -> anyhow::Result<Duration> {
    let client = postgres::connect(&bed.database).await?;
    let drop_live = format!("DROP SCHEMA {} CASCADE", Schema::Live);
    client.batch_execute(&drop_live).await.context("the projection cannot be dropped")?;
    bed.service.start()?;
    let mut progress = show.progress("projection: catching up", events);
    let projected = async {
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        let mut before_first = Instant::now();
        let mut seen = false;
        loop {
            let asked = Instant::now();
            let reached = checkpoint(&client, &INVENTORY, INVENTORY.live).await?.unwrap_or(0);
            seen |= reached > 0;
            if !seen {
                before_first = asked;
            }
            progress.inc(reached.saturating_sub(progress.done()));
            if reached >= events {
                return Ok(before_first.elapsed());
            }
            if asked >= deadline {
                bail!("{reached} of {events} events were projected within {} s", CATCH_UP_TIMEOUT.as_secs());
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    };
    let taken = bed.while_running(projected).await?;
    progress.finish();
    bed.stop_service().await?;
    Ok(taken)
}
