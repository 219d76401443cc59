//! Our side of a run: the real product service as a process, on servers of its own.
//!
//! Orders are put into `ORDERS` while the service is stopped; then it is started, and finds them waiting. Postgres projects
//! meanwhile, as in production, and takes its share of the machine; but no order waits for it: nothing between an order and
//! its acknowledgement touches Postgres or Redis.
//!
//! **What is timed.** From the first order delivered to the last acknowledgement, seen from outside, in the state that the
//! server keeps of the consumer `product-orders`. Start-up, folding the stream and the wait for the pin (up to 5 s) all
//! come before the first delivery and are not counted. The state is polled every [`POLL_EVERY`]: the clock starts at the
//! last look that still saw nothing delivered and stops after the first that sees everything acknowledged, so the error,
//! at most two looks, is always to our disadvantage. The first decision would be a later beginning, but what is seen of it
//! from outside is a whole batch.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream::Context;
use futures::{StreamExt, TryStreamExt, stream};
use lomash_contract::UpdatedBy;
use lomash_ledger::{JetStreamLedger, Ledger, streams};
use lomash_platform::{Secret, nats};
use product_service::client::ProductClient;
use product_service::inventory::{Action, Details, ProductCommand};
use serde_json::Value;
use uuid::Uuid;

use super::limit;
use super::workload::Workload;
use crate::audit::Report;
use crate::orders::publish;
use crate::stack::{Service, log_tail};
use crate::up::Stack;
use crate::verify::{self, Show};

/// How often the consumer's state is looked at while the clock runs.
const POLL_EVERY: Duration = Duration::from_millis(10);

/// How long deciding all orders of a run may take.
const DECIDE_TIMEOUT: Duration = Duration::from_secs(900);

/// How long the projection may take to catch up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(900);

/// Commands and orders under way at once while a run is prepared.
const IN_FLIGHT: usize = 1_000;

/// Name under which we connect.
const CLIENT_NAME: &str = "lomash bench";

/// The product service's program.
const SERVICE: &str = "product-service";

/// What came of a run of ours.
pub(super) struct Measured {
    /// The figures, or why there are none.
    pub figures: Result<Figures, String>,
    /// Version of the NATS server.
    pub nats_version: String,
}

/// The figures of a run whose books are in order.
pub(super) struct Figures {
    /// From the first delivery to the last acknowledgement.
    pub ours: Duration,
    /// For bare batches of the same messages.
    pub limit: Duration,
    /// Events stored.
    pub messages: u64,
    /// In so many atomic batches.
    pub batches: u64,
}

/// Runs the workload once, then the limit on the same server.
pub(super) async fn run(workload: &Workload, folder: &Path, what: &str, show: Show) -> anyhow::Result<Measured> {
    let stack = Stack::start_servers(folder).await?;
    // Connections end before their server does: one that is left would go on looking for it during the next run.
    let measured = on(&stack, workload, what, show).await?;
    stack.stop().await?;
    Ok(measured)
}

async fn on(stack: &Stack, workload: &Workload, what: &str, show: Show) -> anyhow::Result<Measured> {
    let client = nats::connect(&stack.nats.url(), CLIENT_NAME).await?;
    let nats_version = client.server_info().version;
    let context = async_nats::jetstream::new(client.clone());
    let database = Secret::from(stack.postgres.url());
    let ledger = JetStreamLedger::new(context.clone(), streams::INVENTORY);
    let mut service = stack.service(SERVICE)?;

    service.start()?;
    while_running(&service, register(&ProductClient::new(client), workload)).await?;
    while_running(&service, verify::wait_until_quiet(&context, Some(&database), SETTLE_TIMEOUT)).await?;
    service.stop().await?;
    let prepared = ledger.last_sequence().await?;
    let last_order = put(&context, workload, what, show).await?;
    unpin(&context).await;

    service.start()?;
    let ours = while_running(&service, until_acknowledged(&context, last_order, what, show)).await?;
    while_running(&service, verify::wait_until_quiet(&context, Some(&database), SETTLE_TIMEOUT)).await?;
    service.stop().await?;

    let report = verify::verify(&context, Some(&database), Show::Nothing).await?;
    if let Some(problem) = problem_of(&report, workload) {
        return Ok(Measured { figures: Err(problem), nats_version });
    }
    let shapes = limit::shapes(&ledger, prepared).await?;
    let figures = Figures {
        ours,
        limit: limit::run(&context, &shapes).await?,
        messages: shapes.len() as u64,
        batches: shapes.iter().filter(|shape| shape.ends_batch).count() as u64,
    };
    Ok(Measured { figures: Ok(figures), nats_version })
}

/// The work, unless the service ends meanwhile.
async fn while_running<T>(service: &Service, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        done = work => done,
        status = service.ended() => bail!("{SERVICE} ended during the run ({status}); {}", log_tail(service.log())),
    }
}

/// Registers the products, as `lomash import` does.
async fn register(client: &ProductClient, workload: &Workload) -> anyhow::Result<()> {
    stream::iter(&workload.products)
        .map(|product| async move {
            let details = Details {
                sku: product.sku.clone(),
                name: product.sku.as_str().into(),
                category: None,
                low_stock_threshold: None,
                active: true,
            };
            let action = Action::Register { details, initial_quantity: product.stock };
            let command = ProductCommand::new(Uuid::new_v4(), product.id, UpdatedBy::System, action);
            client.send(command, None).await.with_context(|| format!("{} was not registered", product.sku))
        })
        .buffer_unordered(IN_FLIGHT)
        .try_for_each(|_| async { Ok(()) })
        .await
}

/// Publishes the orders; the sequence of the last.
async fn put(context: &Context, workload: &Workload, what: &str, show: Show) -> anyhow::Result<u64> {
    let mut progress = show.progress(&format!("{what}: putting orders"), workload.orders.len() as u64);
    let mut published =
        stream::iter(&workload.orders).map(|order| publish(context, order.clone())).buffer_unordered(IN_FLIGHT);
    while let Some(duplicate) = published.next().await {
        ensure!(!duplicate?, "the stream ORDERS had an order of this run already; an event id was used twice");
        progress.inc(1);
    }
    progress.finish();
    let orders = context.get_stream(streams::ORDERS).await.context("ORDERS cannot be read")?;
    Ok(orders.cached_info().state.last_sequence)
}

/// Takes the pin from the service that was stopped without ever having had an order, which therefore does not know that
/// it has one. Best effort: it runs out by itself, and waiting for that is not timed.
async fn unpin(context: &Context) {
    if let Ok(stream) = context.get_stream_no_info(streams::ORDERS).await {
        let _ = stream.unpin_consumer(streams::PRODUCT_ORDERS, streams::PRODUCT_ORDERS_GROUP).await;
    }
}

/// What the server knows of the consumer.
struct Deliveries {
    delivered: u64,
    acknowledged: u64,
    open: u64,
}

async fn deliveries(context: &Context) -> anyhow::Result<Deliveries> {
    let subject = format!("CONSUMER.INFO.{}.{}", streams::ORDERS, streams::PRODUCT_ORDERS);
    let info: Value =
        context.request(subject, &serde_json::json!({})).await.context("the consumer product-orders cannot be read")?;
    let number = |path: &str| info.pointer(path).and_then(Value::as_u64);
    match (number("/delivered/stream_seq"), number("/ack_floor/stream_seq"), number("/num_ack_pending")) {
        (Some(delivered), Some(acknowledged), Some(open)) => Ok(Deliveries { delivered, acknowledged, open }),
        _ => bail!("the consumer product-orders cannot be read: {info}"),
    }
}

/// How long it took from the first delivery until everything up to `last` was acknowledged.
async fn until_acknowledged(context: &Context, last: u64, what: &str, show: Show) -> anyhow::Result<Duration> {
    let mut progress = show.progress(&format!("{what}: deciding"), last);
    let deadline = Instant::now() + DECIDE_TIMEOUT;
    let mut before_first = Instant::now();
    let mut seen = false;
    loop {
        let asked = Instant::now();
        let now = deliveries(context).await?;
        seen |= now.delivered > 0;
        if !seen {
            before_first = asked;
        }
        progress.inc(now.acknowledged.saturating_sub(progress.done()));
        if now.acknowledged >= last && now.open == 0 {
            let taken = before_first.elapsed();
            progress.finish();
            return Ok(taken);
        }
        if asked >= deadline {
            bail!(
                "{} of {last} orders were acknowledged within {} s; take fewer with --orders-count",
                now.acknowledged,
                DECIDE_TIMEOUT.as_secs()
            );
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// What is wrong with our books, if anything is.
fn problem_of(report: &Report, workload: &Workload) -> Option<String> {
    if !report.is_clean() {
        let violated = report.invariants.iter().filter(|invariant| invariant.violations > 0);
        let violated: Vec<String> = violated
            .map(|invariant| {
                let first = invariant.first.first().map(ToString::to_string).unwrap_or_default();
                format!("{} is violated {} times, first: {first}", invariant.holds, invariant.violations)
            })
            .collect();
        return Some(format!("`lomash verify` is not clean: {}", violated.join("; ")));
    }
    let totals = &report.totals;
    let (allocated, refused, undecided) = (totals.orders_allocated, totals.orders_refused(), totals.orders_undecided);
    if (allocated, refused, undecided, totals.dead_letters) != (workload.allocated, workload.refused, 0, 0) {
        return Some(format!(
            "{allocated} orders were allocated and {refused} refused where {} and {} were due ({undecided} undecided, \
             {} dead letters)",
            workload.allocated, workload.refused, totals.dead_letters
        ));
    }
    None
}
