//! What became of the orders further down: mails in the sink, the analytics' low-stock list, and the metrics.
//!
//! Each service has it a moment later than the ledger, so everything is looked at until it is as it must be, or until the
//! demo's patience is over and the checks say what was found last.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;
use async_nats::jetstream::Context;
use lomash_contract::FailureReason;
use lomash_platform::Secret;
use lomash_web::Role;
use reqwest::Method;
use serde_json::Value;
use tokio::time::{Duration, Instant};

use crate::api::Api;
use crate::output::{self, Cell};
use crate::up::{PRODUCT_SERVICE, Stack};

/// The stream of the notifications.
const NOTIFICATIONS: &str = "NOTIFICATIONS";

/// How long the services may take to follow.
const PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Mails and products that are shown; there are more.
const SHOWN: usize = 8;

/// The metrics whose names are in the contract.
const CONTRACT_METRICS: [&str; 4] =
    ["inventory_update_lag_ms", "inventory_update_failures_total", "out_of_stock_products_total", "dlq_message_count"];

/// What the ledger and the dead letters say must be found.
pub(super) struct Expected {
    /// The last sequence of the ledger.
    pub(super) sequence: u64,
    /// Events that are a cause for an alert.
    pub(super) alerts: u64,
    /// Units that orders took.
    pub(super) units_sold: u64,
    /// Products without stock.
    pub(super) out_of_stock: u64,
    /// Orders refused for want of stock, as one of the reasons.
    pub(super) short: u64,
    /// Dead letters.
    pub(super) letters: u64,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    mails: u64,
    notifications: u64,
    units_sold: u64,
    out_of_stock: f64,
    short: f64,
    letters: f64,
}

/// What must be and what is, by name.
pub(super) type Checks = Vec<(&'static str, String, String)>;

/// Looks until all is as expected; shows it, unless nobody reads it.
pub(super) async fn tour(
    stack: &Stack,
    context: &Context,
    expected: &Expected,
    is_shown: bool,
) -> anyhow::Result<Checks> {
    let token = Secret::from(stack.token(Role::Viewer)?);
    let analytics = Api::new(&stack.url("analytics-service").context("the analytics service runs")?, token)?;
    let metrics_url = format!("{}/metrics", stack.health_url(PRODUCT_SERVICE).context("the product service runs")?);
    let deadline = Instant::now() + PATIENCE;
    let (found, metrics) = loop {
        let metrics = scrape(&metrics_url).await?;
        let found = look(stack, context, &analytics, expected.sequence, &metrics).await?;
        if found == expected.found() || Instant::now() >= deadline {
            break (found, metrics);
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    };
    if is_shown {
        show_mails(&mail_files(stack.mail.dir())?, found.mails);
        show_low_stock(&analytics).await?;
        show_metrics(&metrics);
    }
    let expected = expected.found();
    Ok(vec![
        (
            "low-stock notifications, one for each cause",
            expected.notifications.to_string(),
            found.notifications.to_string(),
        ),
        ("mails in the sink", expected.mails.to_string(), found.mails.to_string()),
        ("units sold, by the analytics", expected.units_sold.to_string(), found.units_sold.to_string()),
        ("out_of_stock_products_total", expected.out_of_stock.to_string(), found.out_of_stock.to_string()),
        ("inventory_update_failures_total, short of stock", expected.short.to_string(), found.short.to_string()),
        ("dlq_message_count", expected.letters.to_string(), found.letters.to_string()),
    ])
}

impl Expected {
    fn found(&self) -> Found {
        Found {
            mails: self.alerts,
            notifications: self.alerts,
            units_sold: self.units_sold,
            out_of_stock: self.out_of_stock as f64,
            short: self.short as f64,
            letters: self.letters as f64,
        }
    }
}

async fn look(
    stack: &Stack,
    context: &Context,
    analytics: &Api,
    sequence: u64,
    metrics: &BTreeMap<String, f64>,
) -> anyhow::Result<Found> {
    let metric = |name: &str| metrics.get(name).copied().unwrap_or_default();
    let newest = [("Lomash-Min-Sequence", &*sequence.to_string())];
    let summary = analytics.send(Method::GET, "/v1/analytics/summary", &newest, None).await?;
    let notifications = context.get_stream(NOTIFICATIONS).await?.get_info().await?.state.messages;
    let short = format!("inventory_update_failures_total{{reason=\"{}\"}}", FailureReason::InsufficientStock);
    Ok(Found {
        mails: mail_files(stack.mail.dir())?.len() as u64,
        notifications,
        units_sold: summary.body["totals"]["unitsSold"].as_u64().unwrap_or_default(),
        out_of_stock: metric("out_of_stock_products_total"),
        short: metric(&short),
        letters: metric("dlq_message_count"),
    })
}

/// The samples of `/metrics`, each by its name and labels.
async fn scrape(url: &str) -> anyhow::Result<BTreeMap<String, f64>> {
    let answer = reqwest::get(url).await.context("the product service shows no metrics")?;
    let text = answer.text().await.context("the metrics broke off")?;
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let sample = |line: &str| {
        let (name, value) = line.rsplit_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(samples.filter_map(sample).collect())
}

/// The mails' files, the oldest first.
fn mail_files(dir: &Path) -> anyhow::Result<Vec<std::path::PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("the mails in {} cannot be read", dir.display()))?;
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut mails: Vec<_> = files.filter(|file| file.extension().is_some_and(|kind| kind == "eml")).collect();
    mails.sort();
    Ok(mails)
}

fn show_mails(files: &[std::path::PathBuf], total: u64) {
    let mut table = output::table(&["mail", "subject"]);
    for file in files.iter().rev().take(SHOWN) {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let subject = text.lines().find_map(|line| line.strip_prefix("Subject: ")).unwrap_or_default();
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        table.add_row(vec![Cell::new(name), Cell::new(subject)]);
    }
    output::say(format_args!("\nThe newest of {total} low-stock mails that the SMTP sink took:\n{table}"));
}

async fn show_low_stock(analytics: &Api) -> anyhow::Result<()> {
    let path = format!("/v1/analytics/low-stock?limit={SHOWN}");
    let list: Value = analytics.call(Method::GET, &path, None).await?;
    let mut table = output::table(&["sku", "quantity", "threshold", "sold a day", "days of cover"]);
    for item in list["items"].as_array().into_iter().flatten() {
        let text = |name: &str| item[name].as_str().map_or_else(|| item[name].to_string(), str::to_owned);
        let figure = |name: &str| item[name].as_f64().map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        table.add_row(vec![
            text("sku"),
            text("quantity"),
            text("lowStockThreshold"),
            figure("unitsPerDay"),
            figure("daysOfCover"),
        ]);
    }
    output::say(format_args!("\nWhat runs out first, by the analytics service:\n{table}"));
    Ok(())
}

fn show_metrics(metrics: &BTreeMap<String, f64>) {
    let mut table = output::table(&["metric of the product service", "value"]);
    let is_shown =
        |name: &str| !name.contains("_bucket{") && CONTRACT_METRICS.iter().any(|known| name.starts_with(known));
    for (name, value) in metrics.iter().filter(|(name, _)| is_shown(name)) {
        table.add_row(vec![Cell::new(name), Cell::new(value)]);
    }
    output::say(format_args!("\n{table}"));
}
