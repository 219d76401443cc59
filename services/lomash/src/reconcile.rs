//! `lomash reconcile`: starts a reconciliation run over HTTP, waits for it, and shows its report.
//!
//! Talks to the product service like any admin, with `PRODUCT_URL` and `ADMIN_TOKEN`; decides nothing. A run that waits
//! for approval is shown, and approved or rejected by its id.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use lomash_platform::Secret;
use product_service::reconciliation::{Figures, Report, Request, Row, RowResult, Status};
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::Instant;
use uuid::Uuid;

use crate::api::Api;
use crate::output::{self, Cell};

/// Pause between two looks at the run.
const LOOK_PAUSE: Duration = Duration::from_millis(250);

/// How often a run that takes long is said to be at work.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Rows of a page of the report.
const ROWS_AT_ONCE: u32 = 200;

/// Rows that are shown as a table; `--json` shows all.
const ROWS_SHOWN: usize = 50;

/// Arguments of `lomash reconcile`.
#[derive(Clone, Debug, Args)]
pub struct ReconcileArgs {
    /// Report only; write nothing.
    #[arg(long, conflicts_with_all = ["approve", "reject"])]
    pub dry_run: bool,
    /// Which figures are taken.
    #[arg(long, value_enum, default_value_t = FiguresArg::All, conflicts_with_all = ["approve", "reject"])]
    pub figures: FiguresArg,
    /// Ask for approval before more than this share of the products is changed, in percent [default: 20].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(0..=100))]
    #[arg(conflicts_with_all = ["approve", "reject"])]
    pub threshold: Option<u32>,
    /// Approve the run that waits under this id.
    #[arg(long, value_name = "ID", conflicts_with = "reject")]
    pub approve: Option<Uuid>,
    /// Reject the run that waits under this id.
    #[arg(long, value_name = "ID")]
    pub reject: Option<Uuid>,
    /// Print the report with all its rows as JSON.
    #[arg(long)]
    pub json: bool,
    /// The product service; `just up` writes its address to `.data/stack.env`.
    #[arg(long, env = "PRODUCT_URL", value_name = "URL")]
    pub product_url: String,
    /// A token with the role ADMIN; `just up` writes one there, too.
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Secret,
}

/// Which figures are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FiguresArg {
    /// The warehouse's, if one is configured, and the confirmed counts.
    All,
    /// The warehouse's only.
    Warehouse,
    /// The confirmed counts only.
    Counts,
}

impl From<FiguresArg> for Figures {
    fn from(figures: FiguresArg) -> Self {
        match figures {
            FiguresArg::All => Self::All,
            FiguresArg::Warehouse => Self::Warehouse,
            FiguresArg::Counts => Self::Counts,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Page {
    #[serde(flatten)]
    report: Report,
    rows: Vec<Row>,
    next_cursor: Option<String>,
}

#[derive(Serialize)]
struct Whole {
    #[serde(flatten)]
    report: Report,
    rows: Vec<Row>,
}

/// Runs the command; it succeeds when the run came to what it was asked for. A run that waits for approval has not.
///
/// # Errors
/// When the service does not answer or refuses.
pub async fn run(args: ReconcileArgs) -> anyhow::Result<ExitCode> {
    let api = Api::new(&args.product_url, args.admin_token)?;
    let started: Report = match (args.approve, args.reject) {
        (Some(id), _) => decide(&api, id, true).await?,
        (_, Some(id)) => decide(&api, id, false).await?,
        (None, None) => {
            let default = Request::default();
            let request = Request {
                figures: args.figures.into(),
                dry_run: args.dry_run,
                approval_threshold_percent: args.threshold.unwrap_or(default.approval_threshold_percent),
            };
            api.call(Method::POST, "/v1/reconciliations", Some(json!(request))).await?
        }
    };
    output::tell(format_args!("reconciliation run {}", started.id));
    let (report, rows) = wait(&api, started.id).await?;
    let is_well = matches!(report.status, Status::Completed | Status::DryRun)
        || (report.status == Status::Rejected && args.reject.is_some());
    if args.json {
        output::print_json(&Whole { report, rows })?;
    } else {
        show(&report, &rows);
    }
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn decide(api: &Api, id: Uuid, approved: bool) -> anyhow::Result<Report> {
    let path = format!("/v1/reconciliations/{id}/approval");
    api.call(Method::POST, &path, Some(json!({ "approved": approved }))).await
}

/// Waits until nothing more happens to the run by itself; its report and all rows.
pub(crate) async fn wait(api: &Api, id: Uuid) -> anyhow::Result<(Report, Vec<Row>)> {
    let mut said = Instant::now();
    let report = loop {
        let page: Page = api.call(Method::GET, &format!("/v1/reconciliations/{id}?limit=1"), None).await?;
        if page.report.status.is_settled() {
            break page.report;
        }
        if said.elapsed() >= SAY_EVERY {
            said = Instant::now();
            let totals = page.report.totals;
            let counted = output::thousands(i128::from(totals.counted));
            output::tell(format_args!("{}: {counted} counted", page.report.status.as_str()));
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    };
    let mut rows = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/v1/reconciliations/{id}?limit={ROWS_AT_ONCE}{cursor}");
        let page: Page = api.call(Method::GET, &path, None).await?;
        rows.extend(page.rows);
        match page.next_cursor {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return Ok((report, rows)),
        }
    }
}

fn show(report: &Report, rows: &[Row]) {
    let mut table =
        output::table(&["sku", "counted", "stock then", "before", "correction", "after", "shortfall", "result"]);
    let number = |number: Option<i128>| match number {
        Some(number) => Cell::right(output::thousands(number)),
        None => Cell::new(""),
    };
    let quantity = |quantity: Option<u32>| number(quantity.map(i128::from));
    // What nobody need look at is counted below.
    let telling = |row: &&Row| row.result != RowResult::Unchanged || row.shortfall > 0;
    for row in rows.iter().filter(telling).take(ROWS_SHOWN) {
        let name = row.sku.clone().or_else(|| row.product_id.map(|id| id.to_string()));
        let result = match &row.refusal {
            Some(refusal) => format!("refused: {}", refusal.detail),
            None => row.result.as_str().to_owned(),
        };
        table.add_row(vec![
            Cell::new(name.unwrap_or_else(|| format!("row {}", row.position))),
            quantity(row.counted),
            quantity(row.stock_at_count),
            quantity(row.before),
            number(row.correction.map(i128::from)),
            quantity(row.after),
            number((row.shortfall > 0).then(|| row.shortfall.into())),
            Cell::new(result),
        ]);
    }
    if rows.iter().any(|row| telling(&row)) {
        output::say(table);
    }
    if let Some(more) = rows.iter().filter(telling).count().checked_sub(ROWS_SHOWN).filter(|more| *more > 0) {
        output::say(format_args!("and {} more; --json lists them all", output::thousands(more as i128)));
    }
    let totals = &report.totals;
    output::say(format_args!(
        "{}: {} counted, {} changed, {} unchanged, {} refused; {} units up, {} down, shortfall {}",
        report.status.as_str(),
        output::thousands(totals.counted),
        output::thousands(totals.changed),
        output::thousands(totals.unchanged),
        output::thousands(totals.refused),
        output::thousands(totals.units_up),
        output::thousands(totals.units_down),
        output::thousands(totals.shortfall),
    ));
    if let Some(problem) = &report.problem {
        output::say(problem);
    }
    if report.status == Status::AwaitingApproval {
        let threshold = report.request.approval_threshold_percent;
        output::say(format_args!(
            "more than {threshold} % of the products would change: lomash reconcile --approve {}",
            report.id
        ));
    }
}
