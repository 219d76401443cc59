//! Our side of a race: the real product service as a process, on servers of its own.
//!
//! Orders are put into `ORDERS` before the service is started, and then found waiting. Postgres projects meanwhile, as in
//! production, and takes its share of the machine; but no order waits for it: nothing between an order and its
//! acknowledgement touches Postgres or Redis.
//!
//! **What is timed.** From the first order delivered to the last acknowledgement, seen from outside, in the state that the
//! server keeps of the consumer `product-orders`. Start-up and folding the stream come before the first delivery and are
//! not counted. The state is polled every [`POLL_EVERY`](super::bed::POLL_EVERY): the clock starts at the last look that
//! still saw nothing delivered and stops after the first that sees everything acknowledged, so the error, at most two
//! looks, is always to our disadvantage. The first decision would be a later beginning, but what is seen of it from
//! outside is a whole batch.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::{StreamExt, stream};
use lomash_ledger::{Ledger, streams};

use super::bed::{Bed, Versions};
use super::limit;
use super::report::Contestant;
use super::workload::Workload;
use crate::orders::publish;
use crate::verify::Show;

/// Orders under way at once while they are published.
const IN_FLIGHT: usize = 1_000;

/// What came of a run of ours.
pub(super) struct Measured {
    /// The figures, or why there are none.
    pub figures: Result<Figures, String>,
    /// Of the servers.
    pub versions: Versions,
}

/// The figures of a run whose books are in order.
pub(super) struct Figures {
    /// From the first delivery to the last acknowledgement.
    pub ours: Duration,
    /// For the same messages without the service: as the contract has them, and bare.
    pub limits: [(Contestant, Duration); 2],
    /// Events stored.
    pub messages: u64,
    /// In so many atomic batches.
    pub batches: u64,
}

/// Runs the workload once, then the limits on the same server; which of them is first changes from `round` to round.
pub(super) async fn run(
    workload: &Workload,
    folder: &Path,
    round: u32,
    what: &str,
    show: Show,
) -> anyhow::Result<Measured> {
    let mut bed = Bed::start(folder).await?;
    let versions = bed.versions().await?;
    let figures = on(&mut bed, workload, round, what, show).await?;
    bed.stop().await?;
    Ok(Measured { figures, versions })
}

async fn on(
    bed: &mut Bed,
    workload: &Workload,
    round: u32,
    what: &str,
    show: Show,
) -> anyhow::Result<Result<Figures, String>> {
    bed.fill(&workload.products, what, show).await?;
    let prepared = bed.ledger.last_sequence().await?;
    let prepared_bytes = limit::stored_bytes(&bed.context, streams::INVENTORY).await?;
    let last_order = put(bed, workload, what, show).await?;

    bed.service.start()?;
    let ours = bed.while_running(bed.until_acknowledged(last_order, what, show)).await?;
    bed.quiet().await?;
    bed.stop_service().await?;

    if let Some(problem) = bed.problem().await? {
        return Ok(Err(problem));
    }
    let shapes = limit::shapes(&bed.ledger, prepared).await?;
    let bytes = limit::stored_bytes(&bed.context, streams::INVENTORY).await? - prepared_bytes;
    let mut limits = [(Contestant::Limit, Duration::ZERO), (Contestant::Bare, Duration::ZERO)];
    if round % 2 == 1 {
        limits.reverse();
    }
    for (contestant, taken) in &mut limits {
        *taken = limit::run(bed, *contestant, &shapes, prepared, bytes).await?;
    }
    Ok(Ok(Figures {
        ours,
        limits,
        messages: shapes.len() as u64,
        batches: shapes.iter().filter(|shape| shape.ends_batch).count() as u64,
    }))
}

/// Publishes the orders one by one, as their services do; the sequence of the last.
async fn put(bed: &mut Bed, workload: &Workload, what: &str, show: Show) -> anyhow::Result<u64> {
    let mut progress = show.progress(&format!("{what}: putting orders"), workload.orders.len() as u64);
    let mut published =
        stream::iter(&workload.orders).map(|order| publish(&bed.context, order.clone())).buffer_unordered(IN_FLIGHT);
    while let Some(duplicate) = published.next().await {
        ensure!(!duplicate?, "the stream ORDERS had an order of this run already; an event id was used twice");
        progress.inc(1);
    }
    progress.finish();
    drop(published);
    bed.expect(workload.allocated + workload.refused, workload.refused);
    let orders = bed.context.get_stream(streams::ORDERS).await.context("ORDERS cannot be read")?;
    Ok(orders.cached_info().state.last_sequence)
}
