//! `lomash import`: a catalogue file becomes registered products.
//!
//! Every row is a command to the product service, decided and stored like any other. New units are registered with
//! their stock; known units get the file's details and keep the stock they have, for a file knows nothing of what was
//! sold since. A bad row is told with its line and the others go through.

use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use comfy_table::Cell;
use futures::{StreamExt, stream};
use lomash_contract::UpdatedBy;
use lomash_platform::nats;
use product_service::client::{ClientError, ProductClient};
use product_service::inventory::{Action, Details, Outcome, ProductCommand, Rejection};
use serde::Serialize;
use uuid::Uuid;

use crate::catalogue::{self, Row, RowError};
use crate::output::{self, Progress};

/// Commands under way at once: enough to fill a batch while one is being stored.
const IN_FLIGHT: usize = 1_000;

/// Row errors that are shown in full; the others are counted.
const ERRORS_SHOWN: usize = 20;

/// Arguments of `lomash import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// The catalogue: CSV with the columns sku, name, category, quantity, threshold.
    pub file: PathBuf,
    /// The servers.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// Print the report as JSON.
    #[arg(long)]
    pub json: bool,
}

/// What an import came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImportReport {
    /// Products that are new.
    pub registered: u64,
    /// Products whose details changed.
    pub revised: u64,
    /// Products that were as the file says.
    pub unchanged: u64,
    /// Rows that did not go through, in the order in which they were refused.
    pub errors: Vec<RowFailure>,
}

/// A row that did not go through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RowFailure {
    /// Its line.
    pub line: u64,
    /// Why.
    pub problem: String,
}

enum RowOutcome {
    Registered,
    Revised,
    Unchanged,
}

/// Runs the command; it succeeds when every row went through.
///
/// # Errors
/// When the file cannot be read at all or the product service does not answer.
pub async fn run(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let file = File::open(&args.file).with_context(|| format!("cannot open {}", args.file.display()))?;
    let rows = catalogue::read(BufReader::new(file)).with_context(|| args.file.display().to_string())?;
    let (client, _) = args.servers.connect("lomash import").await?;
    let client = ProductClient::new(client);
    let report = import(&client, rows, Progress::counting("importing")).await?;
    if args.json {
        output::print_json(&report)?;
    } else {
        show(&report);
    }
    Ok(if report.errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Imports the rows.
///
/// # Errors
/// When the product service does not answer; what went through before stays.
pub async fn import(
    client: &ProductClient,
    rows: impl Iterator<Item = Result<Row, RowError>>,
    mut progress: Progress,
) -> anyhow::Result<ImportReport> {
    let mut report = ImportReport::default();
    let work = stream::iter(rows).map(|row| async move {
        match row {
            Ok(row) => (row.line, put(client, row).await),
            Err(error) => (error.line, Ok(Err(error.problem))),
        }
    });
    let mut work = std::pin::pin!(work.buffer_unordered(IN_FLIGHT));
    while let Some((line, outcome)) = work.next().await {
        progress.inc(1);
        match outcome {
            Ok(Ok(RowOutcome::Registered)) => report.registered += 1,
            Ok(Ok(RowOutcome::Revised)) => report.revised += 1,
            Ok(Ok(RowOutcome::Unchanged)) => report.unchanged += 1,
            Ok(Err(problem)) => report.errors.push(RowFailure { line, problem }),
            Err(problem) => {
                let so_far = report.registered + report.revised + report.unchanged;
                return Err(problem).with_context(|| {
                    format!("stopped at line {line} after {so_far} rows; import the file again to go on")
                });
            }
        }
    }
    progress.finish();
    report.errors.sort_by_key(|failure| failure.line);
    Ok(report)
}

/// Registers the row's product, or revises it when it is known. `Ok(Err)` is a refusal of this row.
async fn put(client: &ProductClient, row: Row) -> anyhow::Result<Result<RowOutcome, String>> {
    let product_id = catalogue::product_id(&row.sku);
    let details = Details {
        sku: row.sku,
        name: row.name,
        category: row.category,
        low_stock_threshold: row.threshold,
        active: true,
    };
    let command = |action| ProductCommand::new(Uuid::new_v4(), product_id, UpdatedBy::System, action);
    let register = Action::Register { details: details.clone(), initial_quantity: row.quantity };
    let mut tried = RowOutcome::Registered;
    let mut answer = client.send(command(register), None).await;
    if let Err(ClientError::Rejected(Rejection::AlreadyRegistered)) = answer {
        tried = RowOutcome::Revised;
        answer = client.send(command(Action::Revise { details }), None).await;
    }
    match answer {
        Ok(done) => match done.outcome {
            Outcome::Registered => Ok(Ok(RowOutcome::Registered)),
            Outcome::Revised { .. } => Ok(Ok(RowOutcome::Revised)),
            Outcome::Unchanged => Ok(Ok(RowOutcome::Unchanged)),
            other => bail!("the product service answered a registration with {other:?}"),
        },
        // An earlier try went through and only its answer was lost.
        Err(ClientError::Rejected(Rejection::Repeated)) => Ok(Ok(tried)),
        Err(problem @ (ClientError::Rejected(_) | ClientError::BadRequest(_))) => Ok(Err(problem.to_string())),
        Err(problem @ ClientError::Unavailable(_)) => Err(problem.into()),
    }
}

fn show(report: &ImportReport) {
    let mut table = output::table(&["rows", "count"]);
    for (what, count) in [
        ("registered", report.registered),
        ("revised", report.revised),
        ("unchanged", report.unchanged),
        ("refused", report.errors.len() as u64),
    ] {
        table.add_row(vec![Cell::new(what), output::number_cell(count)]);
    }
    println!("{table}");
    for failure in report.errors.iter().take(ERRORS_SHOWN) {
        println!("line {}: {}", failure.line, failure.problem);
    }
    if let Some(more) = report.errors.len().checked_sub(ERRORS_SHOWN).filter(|more| *more > 0) {
        println!("and {} more; --json lists them all", output::thousands(more as u64));
    }
}
