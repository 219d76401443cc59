//! `lomash import`: a catalogue file becomes registered products, by the HTTP import of the product service.
//!
//! Talks to the service like any admin, with `PRODUCT_URL` and `ADMIN_TOKEN`. What a row means, which rows are good and
//! what is written is the service's to say: this sends the file as it is, and shows what became of each row while the
//! answer comes in. Owns only how the answer is read, and nothing of it is kept but what is shown.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use lomash_platform::Secret;
use product_service::http::{IMPORT_TIMEOUT, MAX_BODY_BYTES};
use reqwest::Body;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::fs::File;

use crate::api::Api;
use crate::catalogue::{self, Row};
use crate::output::{self, Cell, Progress};

/// Rows that are told one by one, of those refused and of those that change a product; the others are counted.
const ROWS_SHOWN: usize = 20;

/// Longest line of an answer. A row has a sku, a name before and after, and a sentence or two.
const MAX_LINE_BYTES: usize = 64 * 1024;

/// How long the whole import may take: the service itself ends it with a reason before that.
const TIMEOUT: Duration = Duration::from_secs(IMPORT_TIMEOUT.as_secs() + 30);

const PATH: &str = "/v1/products:import";

/// Arguments of `lomash import`.
#[derive(Clone, Debug, Args)]
pub struct ImportArgs {
    /// The catalogue: CSV with the columns sku, name, category, quantity, threshold, active, or NDJSON (`.ndjson`, `.jsonl`).
    pub file: PathBuf,
    /// Only say what would become of each row; write nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// What one refused row does to the others.
    #[arg(long, value_enum, default_value_t = Policy::GoodRows)]
    pub policy: Policy,
    /// Why, for the record, of rows that do not say.
    #[arg(long)]
    pub reason: Option<String>,
    /// Print the result of every row, and the summary, as JSON.
    #[arg(long)]
    pub json: bool,
    /// The product service; `just up` writes its address to `.data/stack.env`.
    #[arg(long, env = "PRODUCT_URL", value_name = "URL")]
    pub product_url: String,
    /// A token with the role ADMIN; `just up` writes one there, too.
    #[arg(long, env = "ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Secret,
}

/// What one refused row does to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Nothing: every row that can be is carried out.
    #[default]
    GoodRows,
    /// None is carried out: all are checked before the first is written.
    AllOrNothing,
}

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Csv,
    Ndjson,
}

impl Form {
    fn of(file: &Path) -> Self {
        let ends_as = |end: &str| file.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(end));
        if ends_as("ndjson") || ends_as("jsonl") { Self::Ndjson } else { Self::Csv }
    }

    const fn media_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv",
            Self::Ndjson => "application/x-ndjson",
        }
    }
}

/// The result of a row, as far as this program shows it.
#[derive(Clone, Debug, Deserialize)]
struct RowResult {
    line: u64,
    status: String,
    sku: Option<String>,
    /// What the row changes of a known product.
    #[serde(default)]
    changes: Vec<FieldChange>,
    problem: Option<Problem>,
}

#[derive(Clone, Debug, Deserialize)]
struct FieldChange {
    field: String,
    before: Value,
    after: Value,
}

impl FieldChange {
    fn told(&self) -> String {
        let side = |value: &Value| if value.is_null() { "nothing".to_owned() } else { value.to_string() };
        format!("{}: {} → {}", self.field, side(&self.before), side(&self.after))
    }
}

#[derive(Clone, Debug, Deserialize)]
struct Problem {
    title: Option<String>,
    detail: Option<String>,
}

impl Problem {
    fn told(self) -> String {
        self.detail.or(self.title).unwrap_or_else(|| "the service does not say why".to_owned())
    }
}

#[derive(Clone, Debug, Deserialize)]
struct Summary {
    #[serde(default)]
    registered: u64,
    #[serde(default)]
    revised: u64,
    #[serde(default)]
    unchanged: u64,
    #[serde(default)]
    refused: u64,
    #[serde(default)]
    skipped: u64,
    complete: bool,
    problem: Option<Problem>,
}

/// What an import came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImportReport {
    /// Products that are new.
    pub registered: u64,
    /// Products whose details changed.
    pub revised: u64,
    /// Products that were as the file says.
    pub unchanged: u64,
    /// Rows that were not carried out because another one was refused.
    pub skipped: u64,
    /// Rows that did not go through.
    pub refused: u64,
    /// The first of them, in the order of the file.
    pub errors: Vec<RowFailure>,
    /// The first rows that change a known product, and in what.
    pub changes: Vec<RowChange>,
    /// Why not every row of the file has a result.
    pub broken_off: Option<String>,
}

/// A row that did not go through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowFailure {
    /// Its line.
    pub line: u64,
    /// Why.
    pub problem: String,
}

/// A row that changes a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowChange {
    /// Its line.
    pub line: u64,
    /// The product.
    pub sku: String,
    /// Its fields, each with what it was and what it becomes.
    pub fields: Vec<String>,
}

impl ImportReport {
    /// Whether every row went through.
    #[must_use]
    pub const fn is_good(&self) -> bool {
        self.refused == 0 && self.skipped == 0 && self.broken_off.is_none()
    }

    fn note(&mut self, row: RowResult) {
        match row.status.as_str() {
            "refused" if self.errors.len() < ROWS_SHOWN => {
                let problem = row.problem.map_or_else(|| "the service does not say why".to_owned(), Problem::told);
                self.errors.push(RowFailure { line: row.line, problem });
            }
            "revised" if self.changes.len() < ROWS_SHOWN => {
                let sku = row.sku.unwrap_or_default();
                self.changes.push(RowChange {
                    line: row.line,
                    sku,
                    fields: row.changes.iter().map(FieldChange::told).collect(),
                });
            }
            _ => {}
        }
    }

    fn close(&mut self, summary: Summary) {
        let Summary { registered, revised, unchanged, refused, skipped, complete, problem } = summary;
        (self.registered, self.revised, self.unchanged) = (registered, revised, unchanged);
        (self.refused, self.skipped) = (refused, skipped);
        if !complete {
            let why = problem.map_or_else(|| "the service does not say why".to_owned(), Problem::told);
            self.broken_off = Some(why);
        }
    }
}

/// Runs the command; it succeeds when every row went through.
///
/// # Errors
/// When the file cannot be read, or the service does not answer or refuses the file as a whole.
pub async fn run(args: ImportArgs) -> anyhow::Result<ExitCode> {
    let path = &args.file;
    let file = File::open(path).await.with_context(|| format!("cannot open {}", path.display()))?;
    let length = file.metadata().await.with_context(|| format!("cannot read {}", path.display()))?.len();
    ensure!(
        length <= MAX_BODY_BYTES as u64,
        "{} has {}, the product service takes at most {} at once: split it",
        path.display(),
        output::bytes(length),
        output::bytes(MAX_BODY_BYTES as u64),
    );
    let api = Api::new(&args.product_url, args.admin_token)?;
    let request = Request {
        form: Form::of(path),
        dry_run: args.dry_run,
        policy: args.policy,
        reason: args.reason.as_deref(),
        body: file.into(),
    };
    let mut progress = Progress::counting(if args.dry_run { "checking" } else { "importing" });
    let mut told = args.json.then(JsonRows::default);
    let mut report = ImportReport::default();
    let summary = send(&api, request, |row| {
        progress.inc(1);
        if let Some(told) = &mut told {
            told.tell(&row);
        }
        report.note(serde_json::from_value(row).context(NOT_A_RESULT)?);
        Ok(())
    })
    .await
    .with_context(|| path.display().to_string())?;
    progress.finish();
    report.close(serde_json::from_value(summary.clone()).context(NOT_A_RESULT)?);
    match told {
        Some(told) => told.end(&summary),
        None => show(&report, args.dry_run),
    }
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Imports products that are at hand, each as a body of `POST /v1/products`.
///
/// # Errors
/// When the service does not answer.
pub async fn import(api: &Api, products: impl IntoIterator<Item = Value>) -> anyhow::Result<ImportReport> {
    let body: String = products.into_iter().map(|product| format!("{product}\n")).collect();
    let (form, policy) = (Form::Ndjson, Policy::GoodRows);
    let request = Request { form, dry_run: false, policy, reason: None, body: body.into() };
    let mut report = ImportReport::default();
    let summary = send(api, request, |row| {
        report.note(serde_json::from_value(row).context(NOT_A_RESULT)?);
        Ok(())
    })
    .await?;
    report.close(serde_json::from_value(summary).context(NOT_A_RESULT)?);
    Ok(report)
}

/// The body of `POST /v1/products` that registers what a row of a catalogue says.
#[must_use]
pub fn product(row: &Row) -> Value {
    let mut product = Map::new();
    product.insert("productId".to_owned(), json!(catalogue::product_id(&row.sku)));
    product.insert("sku".to_owned(), json!(row.sku));
    product.insert("name".to_owned(), json!(row.name));
    if let Some(category) = &row.category {
        product.insert("category".to_owned(), json!(category));
    }
    if let Some(threshold) = row.threshold {
        product.insert("lowStockThreshold".to_owned(), json!(threshold));
    }
    product.insert("initialQuantity".to_owned(), json!(row.quantity));
    Value::Object(product)
}

// ── Asking, and reading the answer ──────────────────────────────────────────────────────────────────────────────

const NOT_A_RESULT: &str = "the product service answered something else than results of rows";

struct Request<'r> {
    form: Form,
    dry_run: bool,
    policy: Policy,
    reason: Option<&'r str>,
    body: Body,
}

/// Sends the rows, gives each result to `told` as it comes, and returns the summary.
async fn send(
    api: &Api,
    request: Request<'_>,
    mut told: impl FnMut(Value) -> anyhow::Result<()>,
) -> anyhow::Result<Value> {
    let Request { form, dry_run, policy, reason, body } = request;
    let policy = match policy {
        Policy::GoodRows => "goodRows",
        Policy::AllOrNothing => "allOrNothing",
    };
    let mut query = vec![("dryRun", dry_run.to_string()), ("policy", policy.to_owned())];
    query.extend(reason.map(|reason| ("reason", reason.to_owned())));
    let mut answer = api.upload(PATH, &query, form.media_type(), body, TIMEOUT).await?;
    let mut lines = Lines::default();
    let mut summary = None;
    while let Some(bytes) = answer.chunk().await.context("the answer of the product service broke off")? {
        lines.add(&bytes);
        while let Some(line) = lines.next()? {
            let mut line: Value = serde_json::from_slice(&line).context(NOT_A_RESULT)?;
            match line.get_mut("summary").map(Value::take) {
                Some(last) => summary = Some(last),
                None => told(line)?,
            }
        }
    }
    // Without its last line the answer was cut off, whatever the connection says.
    match summary {
        Some(summary) => Ok(summary),
        None => bail!("the answer of the product service broke off; import the file again to see what was done"),
    }
}

/// The lines of an answer that comes in pieces.
#[derive(Default)]
struct Lines {
    held: Vec<u8>,
}

impl Lines {
    fn add(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
    }

    /// The next whole line; None until there is one.
    fn next(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        let Some(end) = self.held.iter().position(|byte| *byte == b'\n') else {
            ensure!(self.held.len() <= MAX_LINE_BYTES, "{NOT_A_RESULT}: a line of more than {MAX_LINE_BYTES} bytes");
            return Ok(None);
        };
        let rest = self.held.split_off(end + 1);
        let mut line = std::mem::replace(&mut self.held, rest);
        line.pop();
        Ok(Some(line))
    }
}

// ── Showing ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// One JSON document of all results, written as they come: there may be a million.
#[derive(Default)]
struct JsonRows {
    any: bool,
}

impl JsonRows {
    fn tell(&mut self, row: &Value) {
        let before = if std::mem::replace(&mut self.any, true) { ",\n    " } else { "{\n  \"rows\": [\n    " };
        output::print_whole(format_args!("{before}{row}"));
    }

    fn end(self, summary: &Value) {
        let before = if self.any { "\n  ]" } else { "{\n  \"rows\": []" };
        output::say_whole(format_args!("{before},\n  \"summary\": {summary}\n}}"));
    }
}

fn show(report: &ImportReport, dry_run: bool) {
    let mut table = output::table(&["rows", "count"]);
    for (what, count) in [
        ("registered", report.registered),
        ("changed", report.revised),
        ("unchanged", report.unchanged),
        ("refused", report.refused),
    ] {
        table.add_row(vec![Cell::new(what), output::number_cell(count)]);
    }
    if report.skipped > 0 {
        table.add_row(vec![Cell::new("not carried out"), output::number_cell(report.skipped)]);
    }
    output::say(table);
    for RowChange { line, sku, fields } in &report.changes {
        output::say(format_args!(
            "line {line}: {sku} changes{}",
            fields.iter().map(|field| format!("; {field}")).collect::<String>()
        ));
    }
    more(report.revised, report.changes.len());
    for RowFailure { line, problem } in &report.errors {
        output::say(format_args!("line {line}: {problem}"));
    }
    more(report.refused, report.errors.len());
    if let Some(why) = &report.broken_off {
        output::say(format_args!("not every row was read: {why}"));
    }
    if dry_run {
        output::say("a dry run: nothing was written");
    }
}

fn more(all: u64, shown: usize) {
    if let Some(more) = all.checked_sub(shown as u64).filter(|more| *more > 0) {
        output::say(format_args!("and {} more; --json lists them all", output::thousands(more)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_however_they_come() {
        let mut lines = Lines::default();
        lines.add(b"{\"a\":1}\n{\"b\"");
        assert_eq!(lines.next().expect("a line"), Some(b"{\"a\":1}".to_vec()));
        assert_eq!(lines.next().expect("none yet"), None);
        lines.add(b":2}\n\n");
        assert_eq!(lines.next().expect("a line"), Some(b"{\"b\":2}".to_vec()));
        assert_eq!(lines.next().expect("a line"), Some(Vec::new()));
        lines.add(&vec![b'x'; MAX_LINE_BYTES + 1]);
        assert!(lines.next().is_err(), "what has no end is no answer of ours");
    }

    #[test]
    fn changes_are_told_by_field() {
        let change: FieldChange =
            serde_json::from_value(json!({ "field": "name", "before": "Oak", "after": null })).expect("a change");
        assert_eq!(change.told(), "name: \"Oak\" → nothing");
    }

    #[test]
    fn a_form_shows_in_the_name() {
        assert_eq!(Form::of(Path::new("a/b.JSONL")), Form::Ndjson);
        assert_eq!(Form::of(Path::new("a.ndjson")), Form::Ndjson);
        assert_eq!(Form::of(Path::new("a.csv")), Form::Csv);
        assert_eq!(Form::of(Path::new("ndjson")), Form::Csv);
    }
}
