//! `lomash orders`: publishes orders from a file, as the order service does.
//!
//! Every order is published to its topic with its event id as `Nats-Msg-Id` and counts once the stream confirmed it, so
//! a lost connection or a restarted server only makes it be published again under the same id.
//!
//! What cannot be an order is counted and named, and the others are published; with `--strict` nothing is published when there
//! is any such.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use clap::{Args, Subcommand};
use futures::stream::{FuturesUnordered, StreamExt};
use lomash_contract::{ContentType, Envelope, OrderCreated, Topic, codec};
use lomash_ledger::{header, streams};
use lomash_platform::nats;
use lomash_platform::trace::{self, Reference};
use lomash_platform::waiting::Waiting;
use serde::Serialize;
use tokio::time::Instant;
use tracing::{Instrument as _, Span};

use crate::output::{self, Cell, Progress};
use crate::retail::{self, Catalogue, NoOrder};

/// Orders published and not yet confirmed.
const IN_FLIGHT: usize = 1_000;

/// How long the stream may take to confirm an order before it is published again.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an order is published again and again before the replay gives up: longer than a server's restart.
const GIVE_UP_AFTER: Duration = Duration::from_secs(120);

const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// How often `--wait` looks whether all orders are decided.
const WAIT_PAUSE: Duration = Duration::from_millis(50);

/// What cannot be an order is named so often in a report, and so often on a terminal; the rest are counted.
const UNFIT_NAMED: usize = 1_000;
const UNFIT_SHOWN: usize = 20;

/// Subcommands of `lomash orders`.
#[derive(Clone, Debug, Subcommand)]
pub enum OrdersCommand {
    /// Publish the orders of a file: NDJSON envelopes, or a retail CSV (one order per invoice), gzip or plain.
    Replay(ReplayArgs),
    /// Print the products of a retail CSV as a catalogue for `lomash import`.
    Catalogue(CatalogueArgs),
}

/// Arguments of `lomash orders replay`.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// The file with the orders.
    pub file: PathBuf,
    /// Orders a second; as fast as the server takes them when not given.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: Option<u32>,
    /// Publish at most so many orders.
    #[arg(long)]
    pub limit: Option<u64>,
    /// Look through the whole file first, and publish nothing if anything in it cannot be an order.
    #[arg(long)]
    pub strict: bool,
    /// Wait until the product service has decided every order that is waiting.
    #[arg(long)]
    pub wait: bool,
    /// The servers.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `lomash orders catalogue`.
#[derive(Clone, Debug, Args)]
pub struct CatalogueArgs {
    /// The retail CSV, gzip or plain.
    pub file: PathBuf,
    /// Stock of each product, in percent of what the file's orders want of it.
    #[arg(long, default_value_t = 100)]
    pub percent: u32,
}

/// What a replay came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplayReport {
    /// Orders that the stream confirmed.
    pub published: u64,
    /// Of these, how many it had already, within its de-duplication window.
    pub duplicates: u64,
    /// Lines of these orders.
    pub lines: u64,
    /// Units of these orders.
    pub units: u64,
    /// Rows of the file that are no line of an order, by reason.
    pub skipped: Vec<(String, u64)>,
    /// Invoices or lines that cannot be orders, and were not published.
    pub unfit: u64,
    /// The first of these.
    pub unfit_orders: Vec<Unfit>,
    /// Seconds until the last order was confirmed.
    pub publish_seconds: f64,
    /// Seconds until the last order was decided, when waited for.
    pub decided_seconds: Option<f64>,
}

/// What cannot be an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Unfit {
    /// The invoice, or the line.
    pub what: String,
    /// Why.
    pub problem: String,
}

/// What cannot be an order, counted and named.
#[derive(Debug, Default)]
struct AllUnfit {
    count: u64,
    first: Vec<Unfit>,
}

impl AllUnfit {
    fn add(&mut self, what: String, problem: String) {
        self.count += 1;
        if self.first.len() < UNFIT_NAMED {
            self.first.push(Unfit { what, problem });
        }
    }
}

/// Some of these as lines, and how many more there are.
fn named(unfit: &[Unfit], count: u64) -> String {
    let mut text = String::new();
    for Unfit { what, problem } in unfit.iter().take(UNFIT_SHOWN) {
        text.push_str(&format!("skipped: {what} {problem}\n"));
    }
    let more = count.saturating_sub(unfit.len().min(UNFIT_SHOWN) as u64);
    if more > 0 {
        text.push_str(&format!("and {} more\n", output::thousands(more)));
    }
    text
}

/// Runs the command.
///
/// # Errors
/// When the file cannot be read or the servers do not answer.
pub async fn run(command: OrdersCommand) -> anyhow::Result<()> {
    match command {
        OrdersCommand::Catalogue(args) => print_catalogue(&args),
        OrdersCommand::Replay(args) => {
            if args.strict {
                refuse_unfit(&args)?;
            }
            let (client, _) = args.servers.connect("lomash orders replay").await?;
            let report = replay(&async_nats::jetstream::new(client), &args).await?;
            if args.json { output::print_json(&report) } else { show(&report) }
        }
    }
}

/// Reads the file to its end, or as far as `--limit` goes, and fails when anything in it cannot be an order.
fn refuse_unfit(args: &ReplayArgs) -> anyhow::Result<()> {
    let file = args.file.display();
    let is_file = std::fs::metadata(&args.file).is_ok_and(|metadata| metadata.is_file());
    ensure!(is_file, "--strict reads {file} twice, so it must be a file");
    let mut orders = retail::open(&args.file)?;
    let (mut unfit, mut fit) = (AllUnfit::default(), 0);
    while fit < args.limit.unwrap_or(u64::MAX) {
        match orders.next() {
            None => break,
            Some(Ok(_)) => fit += 1,
            Some(Err(NoOrder::Unfit { what, problem })) => unfit.add(what, problem),
            Some(Err(problem)) => return Err(problem).with_context(|| format!("{file}: nothing was published")),
        }
    }
    // Rows without an invoice belong to none.
    let unreadable = orders.skipped().first_unreadable.map(|line| format!("; the first unreadable line is {line}"));
    let unreadable = unreadable.unwrap_or_default();
    ensure!(
        unfit.count == 0 && unreadable.is_empty(),
        "nothing was published: {} of {file} cannot be orders{unreadable}\n{}Mend them, or leave out --strict to have the others \
         published",
        output::thousands(unfit.count),
        named(&unfit.first, unfit.count)
    );
    Ok(())
}

async fn replay(context: &Context, args: &ReplayArgs) -> anyhow::Result<ReplayReport> {
    let mut report = ReplayReport::default();
    // What the stream confirmed stays there, and is known again by its ids.
    publish_all(context, args, &mut report).await.with_context(|| {
        format!(
            "stopped after {} orders of {} were published; replay the file again to go on, no order is decided twice",
            output::thousands(report.published),
            args.file.display()
        )
    })?;
    Ok(report)
}

async fn publish_all(context: &Context, args: &ReplayArgs, report: &mut ReplayReport) -> anyhow::Result<()> {
    let mut orders = retail::open(&args.file)?;
    let limit = args.limit.unwrap_or(u64::MAX);
    let mut unfit = AllUnfit::default();
    let mut progress = Progress::counting("publishing orders");
    let mut in_flight = FuturesUnordered::new();
    let started = Instant::now();
    let mut taken = 0;
    while taken < limit {
        let Some(order) = orders.next() else { break };
        let order = match order {
            Ok(order) => order,
            Err(NoOrder::Unfit { what, problem }) => {
                unfit.add(what, problem);
                continue;
            }
            Err(problem) => {
                // Those that are on their way count: whoever goes on wants to know how far it got.
                while let Some(next) = in_flight.next().await {
                    confirmed(Some(next), report, &mut progress)?;
                }
                return Err(problem.into());
            }
        };
        if let Some(rate) = args.rate {
            let due = started + Duration::from_secs_f64(taken as f64 / f64::from(rate));
            tokio::time::sleep_until(due).await;
        }
        taken += 1;
        report.lines += order.payload.items.as_slice().len() as u64;
        report.units += order.payload.items.as_slice().iter().map(|item| u64::from(item.quantity.get())).sum::<u64>();
        in_flight.push(publish(context, order));
        while in_flight.len() >= IN_FLIGHT {
            confirmed(in_flight.next().await, report, &mut progress)?;
        }
        // Confirmations that are there already free places without waiting.
        while let Some(next) = futures::FutureExt::now_or_never(in_flight.next()).flatten() {
            confirmed(Some(next), report, &mut progress)?;
        }
    }
    while let Some(next) = in_flight.next().await {
        confirmed(Some(next), report, &mut progress)?;
    }
    progress.finish();
    report.publish_seconds = started.elapsed().as_secs_f64();
    report.skipped = orders.skipped().into_iter().collect();
    (report.unfit, report.unfit_orders) = (unfit.count, unfit.first);
    if args.wait {
        wait_until_decided(context).await?;
        report.decided_seconds = Some(started.elapsed().as_secs_f64());
    }
    Ok(())
}

fn confirmed(
    next: Option<anyhow::Result<bool>>,
    report: &mut ReplayReport,
    progress: &mut Progress,
) -> anyhow::Result<()> {
    if let Some(outcome) = next {
        report.duplicates += u64::from(outcome?);
        report.published += 1;
        progress.inc(1);
    }
    Ok(())
}

/// Publishes an order until the stream confirms it; whether the stream had it already.
///
/// # Errors
/// When it is refused, or nobody confirms it for long.
pub async fn publish(context: &Context, order: Envelope<OrderCreated>) -> anyhow::Result<bool> {
    let span = publish_span(&order);
    publish_until_confirmed(context, &order, Reference::of(&span)).instrument(span).await
}

/// The span that the trace of an order begins with.
fn publish_span(order: &Envelope<OrderCreated>) -> Span {
    if !trace::has_room() {
        return Span::none();
    }
    let topic = Topic::OrdersCreated.as_str();
    tracing::info_span!(
        target: trace::TARGET,
        "publish",
        otel.name = format!("send {topic}"),
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "send",
        messaging.operation.type = "send",
        messaging.destination.name = topic,
        messaging.message.id = %order.event_id,
        event.id = %order.event_id,
        order.id = %order.payload.order_id,
    )
}

async fn publish_until_confirmed(
    context: &Context,
    order: &Envelope<OrderCreated>,
    cause: Option<Reference>,
) -> anyhow::Result<bool> {
    let body = bytes::Bytes::from(codec::encode(ContentType::Json, order));
    let deadline = Instant::now() + GIVE_UP_AFTER;
    loop {
        let mut headers = HeaderMap::new();
        headers.insert(async_nats::header::NATS_MESSAGE_ID, order.event_id.to_string());
        if let Some(cause) = &cause {
            headers.insert(header::TRACEPARENT, cause.traceparent());
        }
        let attempt = async {
            let sent = context.publish_with_headers(Topic::OrdersCreated.as_str(), headers, body.clone()).await?;
            sent.await
        };
        let problem = match tokio::time::timeout(CONFIRM_TIMEOUT, attempt).await {
            Ok(Ok(confirmation)) => return Ok(confirmation.duplicate),
            Ok(Err(problem)) => problem.to_string(),
            Err(_) => format!("no confirmation within {} s", CONFIRM_TIMEOUT.as_secs()),
        };
        if Instant::now() >= deadline {
            bail!("order {} was not confirmed by the stream ORDERS: {problem}", order.payload.order_id);
        }
        tracing::debug!(order.id = %order.payload.order_id, problem, "publishing the order again");
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Waits until no order is waiting for a decision: all delivered, all acknowledged.
///
/// # Errors
/// When there is no such consumer.
pub async fn wait_until_decided(context: &Context) -> anyhow::Result<()> {
    let mut last_problem = Instant::now();
    let mut waiting = Waiting::on("the orders to be decided");
    loop {
        let consumer = context.get_consumer_from_stream::<async_nats::jetstream::consumer::pull::Config, _, _>(
            streams::PRODUCT_ORDERS,
            streams::ORDERS,
        );
        match waiting.during(consumer).await {
            Ok(consumer) => {
                let info = consumer.cached_info();
                if info.num_pending == 0 && info.num_ack_pending == 0 {
                    return Ok(());
                }
                let (pending, open) = (output::thousands(info.num_pending), info.num_ack_pending);
                waiting.still(format_args!("{pending} wait, {open} are being decided"));
                last_problem = Instant::now();
            }
            Err(problem) if last_problem.elapsed() > GIVE_UP_AFTER => return Err(problem.into()),
            Err(problem) => waiting.still(problem),
        }
        tokio::time::sleep(WAIT_PAUSE).await;
    }
}

fn show(report: &ReplayReport) -> anyhow::Result<()> {
    let mut table = output::table(&["orders", "count"]);
    let mut row = |what: String, count: u64| {
        table.add_row(vec![Cell::new(what), output::number_cell(count)]);
    };
    row("published".to_owned(), report.published);
    row("of these, already in the stream".to_owned(), report.duplicates);
    row("lines".to_owned(), report.lines);
    row("units".to_owned(), report.units);
    for (reason, count) in &report.skipped {
        row(format!("rows skipped: {reason}"), *count);
    }
    if report.unfit > 0 {
        row("skipped: cannot be an order".to_owned(), report.unfit);
    }
    output::say(table);
    let rate = |seconds: f64| {
        format!(
            "{seconds:.1} s: {} orders/s, {} lines/s",
            output::thousands((report.published as f64 / seconds) as i64),
            output::thousands((report.lines as f64 / seconds) as i64)
        )
    };
    output::print(named(&report.unfit_orders, report.unfit));
    output::say(format_args!("published in {}", rate(report.publish_seconds)));
    if let Some(seconds) = report.decided_seconds {
        output::say(format_args!("decided in   {}", rate(seconds)));
    }
    Ok(())
}

fn print_catalogue(args: &CatalogueArgs) -> anyhow::Result<()> {
    let percent = u64::from(args.percent);
    let stock = |ordered: u64| u32::try_from(ordered * percent / 100).unwrap_or(u32::MAX);
    let Catalogue { products, skipped, unfit } = retail::catalogue_of(&args.file, stock)?;
    for (reason, count) in skipped {
        output::tell(format_args!("rows skipped: {reason}: {}", output::thousands(count)));
    }
    let mut all_unfit = AllUnfit::default();
    for invoice in unfit {
        if let NoOrder::Unfit { what, problem } = invoice {
            all_unfit.add(what, problem);
        }
    }
    if all_unfit.count > 0 {
        let count = output::thousands(all_unfit.count);
        output::tell(format_args!(
            "{}{count} invoices are counted for no product",
            named(&all_unfit.first, all_unfit.count)
        ));
    }
    let mut writer = csv::Writer::from_writer(output::Output::new());
    writer.write_record(["sku", "name", "category", "quantity", "threshold"])?;
    for product in products {
        let row = product.row;
        let quantity = row.quantity.to_string();
        writer.write_record([row.sku.as_str(), &row.name, "", &quantity, ""])?;
    }
    writer.flush()?;
    Ok(())
}
