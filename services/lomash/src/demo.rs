//! `lomash demo`: the whole way of orders on real servers, told and checked.
//!
//! Starts a stack of its own, imports the catalogue of `demo/`, publishes orders of every kind, good and bad, and
//! compares what the ledger says of each with what a model of a few lines says should happen. Ends by itself, and
//! well only if every number is as it must be.

mod admin;
mod downstream;

use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;

use anyhow::{Context as _, bail, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use bytes::Bytes;
use clap::Args;
use futures::StreamExt;
use lomash_contract::limits::LOW_STOCK_THRESHOLD;
use lomash_contract::{
    ContentType, Envelope, FailureReason, LedgerEvent, LineQuantity, OrderCreated, OrderId, OrderItem, OrderItems,
    ProductId, ProductRegistered, ProductRevised, Timestamp, Topic, Trigger, codec, subject,
};
use lomash_ledger::{JetStreamLedger, Ledger, StoredMessage, dead_letter, header, streams};
use lomash_platform::{Secret, nats, shutdown};
use reqwest::Method;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant, timeout};

use crate::api::Api;
use crate::catalogue::{self, Row};
use crate::dice::Dice;
use crate::import::{import, product};
use crate::orders::wait_until_decided;
use crate::output::{self, Cell};
use crate::up::Stack;
use crate::verify::{self, Show};

const CATALOGUE: &str = include_str!("../demo/catalogue.csv");

/// Orders of the ordinary kind; the special ones come on top.
const ORDINARY_ORDERS: u64 = 400;

/// How long deciding and projecting all of it may take.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Arguments of `lomash demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Makes other orders; the same seed makes the same ones.
    #[arg(long, default_value_t = 2026)]
    pub seed: u64,
    /// Print the checks as JSON instead of the tour.
    #[arg(long)]
    pub json: bool,
}

/// What must become of a message that is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Fate {
    Allocated,
    Refused(FailureReason),
    DeadLetter,
}

/// A kind of message that the demo publishes, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Kind {
    OneLine,
    ManyLines,
    MoreThanThereIs,
    UnknownProduct,
    OffSale,
    MessagePack,
    OtherEventId,
    SameEvent,
    Malformed,
}

impl Kind {
    const fn told(self) -> &'static str {
        match self {
            Self::OneLine => "one line",
            Self::ManyLines => "several lines",
            Self::MoreThanThereIs => "more than there is",
            Self::UnknownProduct => "a product nobody knows",
            Self::OffSale => "a product taken off sale",
            Self::MessagePack => "sent as MessagePack",
            Self::OtherEventId => "an order again, as another event",
            Self::SameEvent => "an event again",
            Self::Malformed => "malformed",
        }
    }
}

struct Published {
    kind: Kind,
    /// `None` for what is no order.
    order: Option<OrderId>,
    /// The stream had the event already and did not store it again.
    duplicate: bool,
}

/// One comparison.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Check {
    what: String,
    expected: String,
    found: String,
    ok: bool,
}

/// Stock as arithmetic says it must be: what the ledger is compared with.
#[derive(Default)]
struct Model {
    stock: HashMap<ProductId, (u32, bool)>,
    fates: HashMap<OrderId, Fate>,
    units_sold: u64,
}

impl Model {
    fn place(&mut self, order: &OrderCreated) {
        if self.fates.contains_key(&order.order_id) {
            return;
        }
        let mut wanted: BTreeMap<ProductId, u32> = BTreeMap::new();
        for item in order.items.as_slice() {
            *wanted.entry(item.product_id).or_default() += item.quantity.get();
        }
        let problem = |product: &ProductId, quantity: u32| match self.stock.get(product) {
            None => Some(FailureReason::UnknownProduct),
            Some((_, false)) => Some(FailureReason::ProductInactive),
            Some((stock, true)) => (*stock < quantity).then_some(FailureReason::InsufficientStock),
        };
        let problems: Vec<_> = wanted.iter().filter_map(|(product, quantity)| problem(product, *quantity)).collect();
        let gravest = [FailureReason::UnknownProduct, FailureReason::ProductInactive, FailureReason::InsufficientStock];
        let fate = match gravest.into_iter().find(|reason| problems.contains(reason)) {
            Some(reason) => Fate::Refused(reason),
            None => {
                for (product, quantity) in wanted {
                    self.stock.entry(product).and_modify(|(stock, _)| *stock -= quantity);
                    self.units_sold += u64::from(quantity);
                }
                Fate::Allocated
            }
        };
        self.fates.insert(order.order_id, fate);
    }
}

/// Runs the demo.
///
/// # Errors
/// When a server does not start or does not answer; a number that is off is no error but the exit code.
pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    let stop = shutdown::token()?;
    let folder = tempfile::Builder::new().prefix("lomash-demo-").tempdir()?;
    let started = Instant::now();
    let tell = |text: &str| {
        if !args.json {
            output::say(text);
        }
    };
    tell(&format!("Starting NATS, Postgres, Redis, a mail server and the services (seed {}) …", args.seed));
    let stack = tokio::select! {
        interrupted = shutdown::interruption(&stop) => bail!("{interrupted}; what had started is stopped"),
        stack = Stack::start(folder.path()) => stack?,
    };
    for part in stack.parts() {
        let address = part.address.unwrap_or_default();
        tell(&format!("  {:16} {} {address}", part.name, part.state));
    }
    let checks = tokio::select! {
        interrupted = shutdown::interruption(&stop) => {
            output::tell(interrupted);
            None
        }
        // There is nobody to show it to any more.
        () = output::closed() => None,
        ended = stack.part_ended() => anyhow::bail!("{ended:#}"),
        checks = show(&stack, &args) => Some(checks?),
    };
    stack.stop().await?;
    let Some(checks) = checks else {
        return Ok(if output::is_closed() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    };
    let failed = checks.iter().filter(|check| !check.ok).count();
    if args.json {
        output::print_json(&checks)?;
    } else {
        let seconds = started.elapsed().as_secs_f64();
        match failed {
            0 => output::say(format_args!("Every number is as it must be ({} checks, {seconds:.1} s).", checks.len())),
            failed => output::say(format_args!("{failed} of {} checks failed; see above.", checks.len())),
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn show(stack: &Stack, args: &DemoArgs) -> anyhow::Result<Vec<Check>> {
    let tell = |text: &str| {
        if !args.json {
            output::say(text);
        }
    };
    let client = nats::connect(&stack.nats.url(), "lomash demo").await?;
    let context = async_nats::jetstream::new(client.clone());
    let heard = client.subscribe(Topic::InventoryUpdated.as_str()).await?;
    client.flush().await?;

    let mut dice = Dice(args.seed);
    let rows: Vec<Row> = catalogue::read(CATALOGUE.as_bytes())?.collect::<Result<_, _>>()?;
    let admin = stack.admin()?;
    let imported = import(&admin, rows.iter().map(product)).await?;
    ensure!(imported.is_good(), "the demo's catalogue was refused: {imported:?}");
    tell(&format!("\nImported {} products of kitchens and bedrooms.", imported.registered));
    let mut model = Model::default();
    for row in &rows {
        model.stock.insert(catalogue::product_id(&row.sku), (row.quantity, true));
    }
    let off_sale = take_off_sale(&admin, &rows, &mut model).await?;

    tell("Publishing orders of every kind to lomash.orders.created …");
    let published = publish_all(&context, &rows, off_sale, &mut dice, &mut model).await?;
    let malformed = published.iter().filter(|message| message.kind == Kind::Malformed).count();

    timeout(SETTLE_TIMEOUT, wait_until_decided(&context)).await.context("the orders were not decided in time")??;
    let database_url = Secret::from(stack.postgres.url());
    verify::wait_until_quiet(&context, Some(&database_url), SETTLE_TIMEOUT).await?;

    tell("An admin changes stock over HTTP, and reconciles with a count …");
    let admins = rows.iter().map(|row| catalogue::product_id(&row.sku)).find(|product| *product != off_sale);
    let admins = admins.context("the catalogue has a second product")?;
    let before = model.stock.get(&admins).map_or(0, |(stock, _)| *stock);
    let tour = admin::tour(stack, admins, before).await?;
    model.stock.entry(admins).and_modify(|(stock, _)| *stock = tour.stock);
    verify::wait_until_quiet(&context, Some(&database_url), SETTLE_TIMEOUT).await?;

    let ledger = read_ledger(&context).await?;
    let letters = read_dead_letters(&context).await?;
    let heard = count_heard(heard, ledger.updates).await;
    if !args.json {
        show_fates(&published, &ledger.fates);
        show_letters(&letters);
        show_history(&ledger, &rows);
    }
    tell("Looking at what became of it in the mails, the analytics and the metrics …");
    let refused = |reason| ledger.fates.values().filter(|fate| **fate == Fate::Refused(reason)).count() as u64;
    let expected = downstream::Expected {
        sequence: ledger.sequence,
        alerts: ledger.alerts,
        units_sold: model.units_sold,
        out_of_stock: model.stock.values().filter(|(stock, active)| *stock == 0 && *active).count() as u64,
        short: refused(FailureReason::InsufficientStock),
        letters: malformed as u64,
    };
    let followed = downstream::tour(stack, &context, &expected, !args.json).await?;
    let report = verify::verify(&context, Some(&database_url), Show::Nothing).await?;
    if !args.json {
        output::say(format_args!("\n{}", verify::render(&report)));
    }

    let mut checks = Vec::new();
    let mut check = |what: &str, expected: String, found: String| {
        checks.push(Check { what: what.to_owned(), ok: expected == found, expected, found });
    };
    let count = |fates: &HashMap<OrderId, Fate>, wanted: fn(&Fate) -> bool| {
        fates.values().filter(|fate| wanted(fate)).count().to_string()
    };
    check("orders decided", model.fates.len().to_string(), ledger.fates.len().to_string());
    let allocated = |fate: &Fate| *fate == Fate::Allocated;
    check("orders allocated", count(&model.fates, allocated), count(&ledger.fates, allocated));
    for reason in [FailureReason::InsufficientStock, FailureReason::UnknownProduct, FailureReason::ProductInactive] {
        let of = |fates: &HashMap<OrderId, Fate>| {
            fates.values().filter(|fate| **fate == Fate::Refused(reason)).count().to_string()
        };
        check(&format!("orders refused: {reason}"), of(&model.fates), of(&ledger.fates));
    }
    let differing = model.fates.iter().filter(|(order, fate)| ledger.fates.get(*order) != Some(fate)).count();
    check("orders with another fate than the model says", "0".to_owned(), differing.to_string());
    check("units sold", model.units_sold.to_string(), ledger.units_sold.to_string());
    let stock_off =
        model.stock.iter().filter(|(product, (stock, _))| ledger.stock.get(*product).unwrap_or(&0) != stock).count();
    check("products with another stock than the model says", "0".to_owned(), stock_off.to_string());
    let duplicates = published.iter().filter(|message| message.duplicate).count();
    let same_event = published.iter().filter(|message| message.kind == Kind::SameEvent).count();
    check("events the stream knew already", same_event.to_string(), duplicates.to_string());
    check("dead letters", malformed.to_string(), letters.len().to_string());
    let without_reason = letters.iter().filter(|(_, reason)| reason.is_empty()).count();
    check("dead letters without a reason", "0".to_owned(), without_reason.to_string());
    check("changes heard live on lomash.inventory.updated", ledger.updates.to_string(), heard.to_string());
    for (what, expected, found) in tour.checks.into_iter().chain(followed) {
        check(what, expected, found);
    }
    check("verify", "clean".to_owned(), if report.is_clean() { "clean" } else { "violated" }.to_owned());
    if !args.json {
        show_checks(&checks);
    }
    Ok(checks)
}

/// Takes one product off sale, as an admin would.
async fn take_off_sale(admin: &Api, rows: &[Row], model: &mut Model) -> anyhow::Result<ProductId> {
    let row = rows.iter().find(|row| row.quantity > 10).context("the catalogue has a product in stock")?;
    let product_id = catalogue::product_id(&row.sku);
    let body = json!({ "active": false, "reason": "discontinued" });
    admin.call::<Value>(Method::PATCH, &format!("/v1/products/{product_id}"), Some(body)).await?;
    model.stock.entry(product_id).and_modify(|(_, active)| *active = false);
    Ok(product_id)
}

async fn publish_all(
    context: &Context,
    rows: &[Row],
    off_sale: ProductId,
    dice: &mut Dice,
    model: &mut Model,
) -> anyhow::Result<Vec<Published>> {
    let product = |dice: &mut Dice| loop {
        let index = dice.index(rows.len());
        let product = catalogue::product_id(&rows[index].sku);
        if product != off_sale {
            return product;
        }
    };
    let mut published = Vec::new();
    let mut earlier: Option<Envelope<OrderCreated>> = None;
    for number in 0..ORDINARY_ORDERS {
        let kind = match number % 20 {
            3 => Kind::MoreThanThereIs,
            7 => Kind::UnknownProduct,
            9 => Kind::MessagePack,
            11 => Kind::OtherEventId,
            13 => Kind::SameEvent,
            17 => Kind::OffSale,
            even if even % 2 == 0 => Kind::ManyLines,
            _ => Kind::OneLine,
        };
        let mut lines = Vec::new();
        let count = if kind == Kind::ManyLines { 2 + dice.below(3) } else { 1 };
        for _ in 0..count {
            let quantity = 1 + dice.below(2);
            lines.push((product(dice), quantity));
        }
        match kind {
            Kind::MoreThanThereIs => lines.push((product(dice), 5_000)),
            Kind::UnknownProduct => lines.push((ProductId(dice.uuid()), 1)),
            Kind::OffSale => lines.push((off_sale, 1)),
            _ => {}
        }
        let mut envelope = order(dice, &lines)?;
        match (kind, &earlier) {
            (Kind::SameEvent, Some(before)) => envelope = before.clone(),
            (Kind::OtherEventId, Some(before)) => envelope.payload = before.payload.clone(),
            _ => {}
        }
        model.place(&envelope.payload);
        let content_type = if kind == Kind::MessagePack { ContentType::MessagePack } else { ContentType::Json };
        let body = codec::encode(content_type, &envelope);
        let duplicate = publish(context, &envelope.event_id.to_string(), content_type.as_str(), body).await?;
        published.push(Published { kind, order: Some(envelope.payload.order_id), duplicate });
        if matches!(kind, Kind::OneLine | Kind::ManyLines) {
            earlier = Some(envelope);
        }
    }
    for (content_type, body) in malformed(dice)? {
        publish(context, &dice.uuid().to_string(), content_type, body).await?;
        published.push(Published { kind: Kind::Malformed, order: None, duplicate: false });
    }
    Ok(published)
}

fn order(dice: &mut Dice, lines: &[(ProductId, u64)]) -> anyhow::Result<Envelope<OrderCreated>> {
    let items = lines
        .iter()
        .map(|(product_id, quantity)| {
            let quantity = u32::try_from(*quantity).ok().and_then(LineQuantity::new);
            Ok(OrderItem { product_id: *product_id, sku: None, quantity: quantity.context("a quantity in range")? })
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let items = OrderItems::new(items).context("an order has lines")?;
    let payload = OrderCreated { order_id: dice.uuid().into(), customer_id: Some(dice.uuid().into()), items };
    Ok(Envelope::new(dice.uuid().into(), Timestamp::now(), payload))
}

/// Messages that are no orders, each in its own way.
fn malformed(dice: &mut Dice) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let (json, msgpack) = (ContentType::Json.as_str(), ContentType::MessagePack.as_str());
    let product = ProductId(dice.uuid());
    let good = codec::encode(ContentType::Json, &order(dice, &[(product, 1)])?);
    let text = String::from_utf8(good.clone())?;
    Ok(vec![
        (json, good[..good.len() / 2].to_vec()),
        (json, text.replace("\"quantity\":1", "\"quantity\":0").into_bytes()),
        (json, text.replace("\"version\":\"1.0\"", "\"version\":\"2.0\"").into_bytes()),
        (json, text.replace("order-created", "order-cancelled").into_bytes()),
        (json, text.replace("\"orderId\":\"", "\"orderId\":\"no-").into_bytes()),
        (msgpack, vec![0xc1, 0x00, 0xff]),
        ("application/xml", b"<order/>".to_vec()),
    ])
}

/// Publishes one message and waits until it is stored; whether the stream had it already.
async fn publish(context: &Context, event_id: &str, content_type: &str, body: Vec<u8>) -> anyhow::Result<bool> {
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, event_id);
    if content_type != ContentType::Json.as_str() {
        headers.insert(header::CONTENT_TYPE, content_type);
    }
    let sent = context.publish_with_headers(Topic::OrdersCreated.as_str(), headers, Bytes::from(body)).await?;
    Ok(sent.await?.duplicate)
}

/// What the ledger says.
#[derive(Default)]
struct Told {
    fates: HashMap<OrderId, Fate>,
    stock: HashMap<ProductId, u32>,
    units_sold: u64,
    updates: u64,
    /// Events that are a cause for a low-stock alert.
    alerts: u64,
    /// The last one read.
    sequence: u64,
    history: HashMap<ProductId, Vec<(StoredMessage, LedgerEvent)>>,
}

async fn read_ledger(context: &Context) -> anyhow::Result<Told> {
    let ledger = JetStreamLedger::new(context.clone(), streams::INVENTORY);
    let mut messages = ledger.read(0).await?;
    let mut told = Told::default();
    let mut thresholds = HashMap::new();
    while let Some(message) = messages.next().await {
        let message = message?;
        let event = message.parse()?.payload;
        told.sequence = message.sequence;
        match &event {
            LedgerEvent::InventoryUpdated(updated) => {
                told.updates += 1;
                let threshold = thresholds.get(&updated.product_id).copied().flatten().unwrap_or(LOW_STOCK_THRESHOLD);
                let is_cause = updated.new_quantity <= threshold && updated.trigger != Trigger::ScheduledSync;
                told.alerts += u64::from(is_cause);
                told.stock.insert(updated.product_id, updated.new_quantity);
                if let Some(order) = updated.order_id {
                    told.fates.insert(order, Fate::Allocated);
                    told.units_sold += u64::from(updated.previous_quantity - updated.new_quantity);
                }
                told.history.entry(updated.product_id).or_default().push((message, event));
            }
            LedgerEvent::InventoryUpdateFailed(failed) => {
                told.fates.insert(failed.order_id, Fate::Refused(failed.reason));
            }
            LedgerEvent::ProductRegistered(_) | LedgerEvent::ProductRevised(_) | LedgerEvent::ProductUpdated(_) => {
                if let LedgerEvent::ProductRegistered(ProductRegistered(details))
                | LedgerEvent::ProductRevised(ProductRevised(details)) = &event
                {
                    thresholds.insert(details.product_id, details.low_stock_threshold);
                }
                told.history.entry(ProductId(event.key())).or_default().push((message, event));
            }
            LedgerEvent::InventoryCounted(_) | LedgerEvent::CommandAnswered(_) => {}
        }
    }
    Ok(told)
}

/// Sequence and reason of every letter of the order consumer.
async fn read_dead_letters(context: &Context) -> anyhow::Result<Vec<(String, String)>> {
    let stream = context.get_stream(dead_letter::STREAM).await?;
    let filter = subject::dead_letter(streams::PRODUCT_ORDERS);
    let mut letters = Vec::new();
    for sequence in 1..=stream.cached_info().state.last_sequence {
        let letter = stream.get_raw_message(sequence).await?;
        if letter.subject.as_str() == filter {
            let header =
                |name: &str| letter.headers.get(name).map(|value| value.as_str().to_owned()).unwrap_or_default();
            letters.push((header(dead_letter::ORIGIN_SEQUENCE), header(dead_letter::REASON)));
        }
    }
    Ok(letters)
}

/// How many live messages came, of the `expected`; gives up when none comes for a while.
async fn count_heard(mut heard: async_nats::Subscriber, expected: u64) -> u64 {
    const SILENCE: Duration = Duration::from_secs(2);
    let mut count = 0;
    while count < expected {
        match timeout(SILENCE, heard.next()).await {
            Ok(Some(_)) => count += 1,
            Ok(None) | Err(_) => break,
        }
    }
    count
}

fn show_fates(published: &[Published], fates: &HashMap<OrderId, Fate>) {
    let mut rows: BTreeMap<Kind, BTreeMap<Fate, u64>> = BTreeMap::new();
    for message in published {
        let fate = message.order.and_then(|order| fates.get(&order).copied()).unwrap_or(Fate::DeadLetter);
        *rows.entry(message.kind).or_default().entry(fate).or_default() += 1;
    }
    let mut table = output::table(&["what was published", "messages", "what happened", "why"]);
    for (kind, fates) in rows {
        for (fate, count) in fates {
            let (what, why) = match (fate, kind) {
                (Fate::Allocated, Kind::OtherEventId | Kind::SameEvent) => {
                    ("nothing", "the order was allocated before".to_owned())
                }
                (Fate::Refused(_), Kind::OtherEventId | Kind::SameEvent) => {
                    ("nothing", "the order was refused before".to_owned())
                }
                (Fate::Allocated, _) => ("allocated, all lines", String::new()),
                (Fate::Refused(reason), _) => ("refused, all lines", reason.to_string()),
                (Fate::DeadLetter, _) => ("dead letter", "see below".to_owned()),
            };
            table.add_row(vec![Cell::new(kind.told()), output::number_cell(count), Cell::new(what), Cell::new(why)]);
        }
    }
    output::say(format_args!("\n{table}"));
}

fn show_letters(letters: &[(String, String)]) {
    let mut table = output::table(&["sequence in ORDERS", "why it is a dead letter"]);
    for (sequence, reason) in letters {
        table.add_row(vec![sequence, reason]);
    }
    output::say(format_args!("\n{table}"));
}

/// The history of the product that was sold out with the fewest events, so that it fits a screen.
fn show_history(told: &Told, rows: &[Row]) {
    let sold_out = |row: &&Row| {
        let product = catalogue::product_id(&row.sku);
        row.quantity > 0 && told.stock.get(&product) == Some(&0)
    };
    let length = |row: &&Row| told.history.get(&catalogue::product_id(&row.sku)).map_or(usize::MAX, Vec::len);
    let chosen = rows.iter().filter(sold_out).min_by_key(length).or_else(|| rows.iter().min_by_key(length));
    let Some(row) = chosen else { return };
    let product_id = catalogue::product_id(&row.sku);
    output::say(format_args!("\nThe history of {} ({}), from the stream:", row.sku, row.name));
    output::say_whole(format_args!("nats stream view INVENTORY --subject 'lomash.*.*.{product_id}'"));
    let mut table = output::table(&["sequence", "stored at", "event", "stock", "cause"]);
    for (message, event) in told.history.get(&product_id).map(Vec::as_slice).unwrap_or_default() {
        let (stock, cause) = match event {
            LedgerEvent::InventoryUpdated(updated) => (
                format!("{} → {}", updated.previous_quantity, updated.new_quantity),
                match updated.order_id {
                    Some(order) => format!("{} {order}", updated.trigger),
                    None => format!("{} by {}", updated.trigger, updated.updated_by),
                },
            ),
            LedgerEvent::ProductUpdated(updated) => {
                let fields: Vec<String> = updated.changed_fields.iter().map(|field| format!("{field:?}")).collect();
                (String::new(), fields.join(", "))
            }
            _ => (String::new(), String::new()),
        };
        table.add_row(vec![
            Cell::new(message.sequence),
            Cell::new(Timestamp::from(message.stored_at)),
            Cell::new(event.topic().event_type()),
            Cell::new(stock),
            Cell::new(cause),
        ]);
    }
    output::say(format_args!("{table}\n"));
}

fn show_checks(checks: &[Check]) {
    let mut table = output::table(&["check", "must be", "is", ""]);
    for check in checks {
        let mark = if check.ok { "ok" } else { "WRONG" };
        table.add_row(vec![&*check.what, &check.expected, &check.found, mark]);
    }
    output::say(table);
}
