//! Imports: many products or counts in one request, with a result for each row.
//!
//! A row is a command like any other, decided and stored by itself: a new unit is registered with its stock; of a known one
//! those details change that the row names, and it keeps the stock it has, for a file knows nothing of what was sold since.
//! What a file does not say is left alone. Repeated, an import changes nothing.
//!
//! The body goes to disk first ([`spool`]); then results are sent as the rows are decided, so that no more of either is
//! in memory than is at work. Nothing runs beside the answer: when its client goes away, rows that are with the committer
//! are still decided, and none after them.
//!
//! "All or nothing" is a check before the first write and not one transaction: every row is decided against the read
//! model, and only if none is refused the rows are carried out. A batch of the ledger is atomic up to 4,000 messages,
//! and a command is about one product. What another writer changes between check and write can therefore still have a
//! row refused; the import then stops there and says so.

mod rows;
mod spool;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue};
use axum::response::Response;
use futures::future::{BoxFuture, ready};
use futures::stream::FuturesOrdered;
use futures::{FutureExt, Stream, StreamExt, stream};
use hashbrown::{HashMap, HashSet};
use lomash_contract::text;
use lomash_contract::{
    ChangedField, CountedBy, LedgerEvent, ProductDetails, ProductId, ProductRegistered, Sku, Timestamp, UpdatedBy,
};
use lomash_ledger::{Carried, Ledger};
use lomash_platform::places::{Place, Places};
use lomash_web::extract::{media_type, refuse_compressed};
use lomash_web::problem::ProblemDocument;
use lomash_web::sequences::no_place;
use lomash_web::{Admin, Caller, Problem, Query};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use self::rows::{BadRow, Form, Kind, Named, ReadRow, Row, Wanted};
use self::spool::Spool;
use super::Api;
use super::problems::{ImportProblems, OUTCOME_UNKNOWN, PRODUCT_NOT_FOUND, refused};
use super::queries::unanswered;
use super::writes::{checked_reason, trace_context};
use crate::committer::{CommandError, Committed};
use crate::inventory::{
    self, Action, Amendment, Change, Command, Count, Decision, Details, Draft, Outcome, ProductCommand, Rejection,
};
use crate::reads::{At, Product, QueryError};

pub(super) use self::rows::{CountRow, ProductRow};

/// Largest body: a million rows of a catalogue take some 100 MB.
pub const MAX_BODY_BYTES: usize = 256 * 1024 * 1024;

/// Most rows. Of each row seen some 24 bytes stay in memory until the end, by which a repeated product is found.
pub const MAX_ROWS: usize = 1_000_000;

/// Longest that an import takes, from its headers to its last result.
pub const IMPORT_TIMEOUT: Duration = Duration::from_secs(600);

/// Imports at once in a process: each may have a file of [`MAX_BODY_BYTES`] on disk.
pub const MAX_IMPORTS: usize = 2;

/// Imports at once of one caller.
pub const MAX_IMPORTS_OF_ONE: usize = 1;

const _: () = assert!(MAX_IMPORTS_OF_ONE < MAX_IMPORTS, "one caller must not take all places");

/// Rows with the committer at once: enough to fill a batch while one is being stored, and few beside the orders.
const MAX_IN_FLIGHT: usize = 512;

/// Rows that are read, looked up or checked together.
const CHUNK_ROWS: usize = 256;

const _: () = assert!(CHUNK_ROWS <= MAX_IN_FLIGHT, "a chunk must find room among the rows in flight");

/// Chunks that are read ahead of their turn.
const CHUNKS_AHEAD: usize = 2;

/// Results that wait for a client that is slower than we are.
const RESULTS_AHEAD: usize = 256;

/// Refused rows after which an import of all or nothing is not checked any further. They are kept until they are told.
const MAX_REFUSALS_KEPT: usize = 1_000;

/// Longest that a row waits for its decision: others are before it. Then nothing is decided at all for some reason.
const ROW_TIMEOUT: Duration = Duration::from_secs(30);

/// Seconds after which a place for an import may be free again.
const RETRY_AFTER_SECONDS: u64 = 10;

const MEDIA_TYPE: &str = "application/x-ndjson";

/// Places for imports.
#[derive(Clone, Debug)]
pub struct Imports(Places<Uuid>);

impl Default for Imports {
    fn default() -> Self {
        Self(Places::new(MAX_IMPORTS, MAX_IMPORTS_OF_ONE))
    }
}

/// How to import.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportParameters {
    /// Only say what would become of each row, by the read model as it is now.
    #[serde(default)]
    #[param(default = false)]
    dry_run: bool,
    /// `goodRows` carries out every row that can be; `allOrNothing` checks all of them first, and carries none out when
    /// one is refused.
    #[serde(default)]
    // Its default is with the type: beside an inlined schema it would be a schema of its own, that of an object.
    #[param(inline)]
    policy: Policy,
    /// Why, for the record, of rows that do not say; 1 to 500 characters.
    #[param(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

/// What one refused row does to the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(default = "goodRows")]
pub(super) enum Policy {
    /// Nothing.
    #[default]
    GoodRows,
    /// None is carried out.
    AllOrNothing,
}

/// What became of a row, or would.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) enum Status {
    /// The product is new.
    Registered,
    /// The product has new details.
    Revised,
    /// The count is on record.
    Recorded,
    /// It was so already.
    Unchanged,
    /// See `problem`.
    Refused,
    /// Not carried out, because another row was refused.
    Skipped,
}

/// The result of a row.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RowResult {
    /// The line it begins on, counted from 1.
    line: u64,
    /// What became of it.
    status: Status,
    /// The product, if it is known.
    #[schema(value_type = Option<Uuid>, required)]
    product_id: Option<ProductId>,
    /// Its unit, if it is known.
    #[schema(value_type = Option<String>, required)]
    sku: Option<Sku>,
    /// Of a product that there was: each detail that changed, or would.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    changes: Vec<DetailChange>,
    /// The sequence of the ledger that shows it.
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    /// Why it was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ProblemDocument>,
}

/// A detail that a row changed, or would change.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DetailChange {
    /// Which: `sku`, `name`, `category`, `lowStockThreshold` or `active`.
    #[schema(value_type = String, example = "category")]
    field: ChangedField,
    /// What it was: a text, a number, true or false, or null for none.
    #[schema(example = "worktops")]
    before: Value,
    /// What it is now.
    #[schema(example = json!(null))]
    after: Value,
}

impl From<&Change> for DetailChange {
    fn from(change: &Change) -> Self {
        let (before, after) = match change {
            Change::Sku { before, after } => (json!(before), json!(after)),
            Change::Name { before, after } => (json!(before), json!(after)),
            Change::Category { before, after } => (json!(before), json!(after)),
            Change::LowStockThreshold { before, after } => (json!(before), json!(after)),
            Change::Active { before, after } => (json!(before), json!(after)),
        };
        Self { field: change.field(), before, after }
    }
}

/// What became of all rows.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Summary {
    /// Rows with a result.
    rows: u64,
    /// Products that are new.
    registered: u64,
    /// Products with new details.
    revised: u64,
    /// Counts that are on record now.
    recorded: u64,
    /// Rows that were so already.
    unchanged: u64,
    /// Rows that were refused.
    refused: u64,
    /// Rows that were not carried out because another was refused.
    skipped: u64,
    /// Whether nothing was to be written.
    dry_run: bool,
    /// What one refused row does to the others.
    policy: Policy,
    /// Whether every row of the body has a result.
    complete: bool,
    /// The highest sequence among the results; send it as `Lomash-Min-Sequence` to read what was written.
    #[serde(skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
    /// Columns of a CSV that are not read, by the names that its header gives them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ignored_columns: Vec<String>,
    /// Why it is not complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ProblemDocument>,
}

/// A line of the answer: a result for each row, in their order, and the summary last.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(super) enum ImportLine {
    /// The result of a row.
    Row(RowResult),
    /// The last line.
    Last {
        /// What became of all rows.
        summary: Summary,
    },
}

#[utoipa::path(
    post, path = "/v1/products:import", tag = "products", operation_id = "importProducts",
    summary = "Register many products, or give them new details",
    description = "CSV with the columns sku, name, category, quantity, threshold and active, or NDJSON with an object \
                   a line. A new product is registered with its stock, and needs a name. Of a known one only those \
                   details change that the file names, and it keeps its stock: a column or field that is not there \
                   leaves a detail as it is, an empty cell of category or threshold (null in NDJSON) takes it away, \
                   and is refused where there is nothing to be without. Each result, also of a dry run, names what \
                   changes, before and after. A CSV has commas between its cells and a header; a row with more cells \
                   than it is refused unless they are empty, and so is what a spreadsheet leaves in place of a value \
                   (#N/A, a formula, 1.2E+12). Columns of other names are not read; the summary names them. Text is \
                   UTF-8, lines end with LF, CR or both. Rows are decided one by one; allOrNothing is a check \
                   before the first write, not one transaction. Results follow when the whole body is there. To go on \
                   after an import that broke off, send it again: what is done is unchanged then.",
    params(ImportParameters),
    request_body(
        description = "At most 256 MiB and 1,000,000 rows, not compressed",
        content((String = "text/csv"), (ProductRow = "application/x-ndjson"))
    ),
    responses(
        (status = 200, description = "A result for each row, and a summary last", body = ImportLine, content_type = "application/x-ndjson"),
        ImportProblems
    )
)]
pub(super) async fn import_products(
    Admin(caller): Admin,
    State(api): State<Api>,
    Query(parameters): Query<ImportParameters>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    import(api, caller, Kind::Products, parameters, &headers, body).await
}

#[utoipa::path(
    post, path = "/v1/inventory/counts:import", tag = "reconciliation", operation_id = "importCounts",
    summary = "Put many counts on record",
    description = "CSV with the columns sku or productId, quantity, countedAt, and reason if there are any, or NDJSON. \
                   Counts change no stock by themselves; the next reconciliation corrects by them. A dry run and the \
                   check of allOrNothing do not know whether a newer count is on record; carrying out does.",
    params(ImportParameters),
    request_body(
        description = "At most 256 MiB and 1,000,000 rows, not compressed",
        content((String = "text/csv"), (CountRow = "application/x-ndjson"))
    ),
    responses(
        (status = 200, description = "A result for each row, and a summary last", body = ImportLine, content_type = "application/x-ndjson"),
        ImportProblems
    )
)]
pub(super) async fn import_counts(
    Admin(caller): Admin,
    State(api): State<Api>,
    Query(parameters): Query<ImportParameters>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    import(api, caller, Kind::Counts, parameters, &headers, body).await
}

async fn import(
    api: Api,
    caller: Caller,
    kind: Kind,
    parameters: ImportParameters,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let deadline = Instant::now() + IMPORT_TIMEOUT;
    let ImportParameters { dry_run, policy, reason } = parameters;
    let reason = reason
        .map(checked_reason)
        .transpose()
        .map_err(|problem| Problem::invalid_parameter("reason", problem.detail().to_owned()))?;
    refuse_compressed(headers)?;
    let form = match media_type(headers).as_deref() {
        Some("text/csv") => Form::Csv,
        Some(MEDIA_TYPE) => Form::Ndjson,
        _ => {
            let detail = "The body must be CSV or NDJSON: send Content-Type: text/csv or application/x-ndjson.";
            return Err(Problem::unsupported_media_type(detail));
        }
    };
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > MAX_BODY_BYTES) {
        return Err(Problem::payload_too_large(Some(MAX_BODY_BYTES)));
    }
    let full = |full| no_place(full, "imports at work", RETRY_AFTER_SECONDS);
    let place = api.imports.0.take(caller.subject).map_err(full)?;
    let received = timeout_at(deadline, Spool::receive(body, MAX_BODY_BYTES)).await;
    let spool = received.map_err(|_| Problem::timeout())??;
    // Whether the body can be read at all is known before the answer begins.
    let file = spool.reader();
    let opened = tokio::task::spawn_blocking(move || rows::read(kind, form, file).map(|rows| rows.ignored_columns));
    let ignored_columns = opened.await.map_err(Problem::internal)??;
    if dry_run || policy == Policy::AllOrNothing || kind == Kind::Counts {
        let unreadable = |problem| {
            tracing::warn!(%problem, "the end of the ledger is not known");
            Problem::unavailable("The end of the ledger is not known just now.", 1)
        };
        let last = api.ledger.last_sequence().await.map_err(unreadable)?;
        api.projected.wait_for(last).await.map_err(|not_yet| unanswered(not_yet.into()))?;
    }
    let carried = Arc::new(Carried { trace: trace_context(headers), reason, command: None });
    let import =
        Import { api, caller, kind, form, dry_run, policy, carried, spool, ignored_columns, deadline, _place: place };
    let mut response = Response::new(Body::from_stream(import.answer()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    Ok(response)
}

/// An import whose body is there.
struct Import {
    api: Api,
    caller: Caller,
    kind: Kind,
    form: Form,
    dry_run: bool,
    policy: Policy,
    /// What the events of rows without a reason of their own carry.
    carried: Arc<Carried>,
    spool: Spool,
    ignored_columns: Vec<String>,
    deadline: Instant,
    _place: Place<Uuid>,
}

/// Where results go, and what they come to.
struct Answer {
    lines: mpsc::Sender<Vec<u8>>,
    summary: Summary,
}

impl Answer {
    async fn tell(&mut self, result: RowResult) {
        let summary = &mut self.summary;
        summary.rows += 1;
        *match result.status {
            Status::Registered => &mut summary.registered,
            Status::Revised => &mut summary.revised,
            Status::Recorded => &mut summary.recorded,
            Status::Unchanged => &mut summary.unchanged,
            Status::Refused => &mut summary.refused,
            Status::Skipped => &mut summary.skipped,
        } += 1;
        summary.sequence = summary.sequence.max(result.sequence);
        self.send(&ImportLine::Row(result)).await;
    }

    async fn send(&mut self, line: &ImportLine) {
        // Strings, numbers and maps with string keys: this cannot fail.
        let mut line = serde_json::to_vec(line).unwrap_or_default();
        line.push(b'\n');
        // Whoever takes the lines is the one who runs this: when they are gone, so is this.
        let _ = self.lines.send(line).await;
    }
}

/// Where the results of a check go.
enum Findings<'f> {
    /// To the client: they are all it asked for.
    Told(&'f mut Answer),
    /// Nowhere yet, and only what is refused, by the place of the row among all.
    Kept(&'f mut BTreeMap<u64, RowResult>),
}

impl Findings<'_> {
    async fn add(&mut self, place: u64, result: RowResult) -> Result<(), Problem> {
        match self {
            Self::Told(answer) => answer.tell(result).await,
            Self::Kept(refusals) => {
                if result.status == Status::Refused {
                    refusals.insert(place, result);
                }
                if refusals.len() == MAX_REFUSALS_KEPT {
                    return Err(too_many_refusals());
                }
            }
        }
        Ok(())
    }
}

/// Rows on their way from disk.
struct Reading {
    chunks: mpsc::Receiver<Vec<ReadRow>>,
    reader: JoinHandle<Result<(), Problem>>,
}

impl Reading {
    /// Why it ended before the last row, if it did. To be asked when there are no more chunks.
    async fn end(self) -> Result<(), Problem> {
        self.reader.await.unwrap_or_else(|panic| Err(Problem::internal(panic)))
    }
}

impl Import {
    /// The lines of the answer. The work is done by whoever takes them, and ends with them.
    fn answer(self) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
        let (sender, lines) = mpsc::channel(RESULTS_AHEAD);
        let work = async move {
            let ignored_columns = self.ignored_columns.clone();
            let summary = Summary { dry_run: self.dry_run, policy: self.policy, ignored_columns, ..Summary::default() };
            let mut answer = Answer { lines: sender, summary };
            let ended = self.run(&mut answer).await;
            answer.summary.complete = ended.is_ok();
            answer.summary.problem = ended.err().map(|problem| problem.document());
            let Summary { rows, registered, revised, recorded, refused, dry_run, complete, .. } = answer.summary;
            let (kind, by) = (self.kind, self.caller.subject);
            tracing::info!(%kind, %by, rows, registered, revised, recorded, refused, dry_run, complete, "imported");
            let last = ImportLine::Last { summary: std::mem::take(&mut answer.summary) };
            answer.send(&last).await;
        };
        let told = stream::unfold(lines, |mut lines| async {
            let mut some = Vec::with_capacity(RESULTS_AHEAD);
            let any = lines.recv_many(&mut some, RESULTS_AHEAD).await > 0;
            any.then(|| (Bytes::from(some.concat()), lines))
        });
        let done = stream::once(work).map(|()| None);
        stream::select(told.map(Some), done).filter_map(|lines| ready(lines.map(Ok)))
    }

    /// An error says why not every row has a result.
    async fn run(&self, answer: &mut Answer) -> Result<(), Problem> {
        if self.dry_run {
            return self.check(Findings::Told(answer)).await;
        }
        if self.policy == Policy::AllOrNothing {
            let mut refusals = BTreeMap::new();
            let checked = self.check(Findings::Kept(&mut refusals)).await;
            if !refusals.is_empty() || checked.is_err() {
                let last = if checked.is_ok() { u64::MAX } else { refusals.keys().next_back().copied().unwrap_or(0) };
                return self.tell_why_nothing(refusals, last, answer).await.and(checked);
            }
        }
        self.carry_out(answer).await
    }

    // ── Reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// Reads the rows from the first one on, on a thread that ends when nobody takes them any more.
    fn read(&self) -> Reading {
        let (sender, chunks) = mpsc::channel(CHUNKS_AHEAD);
        let (kind, form, file) = (self.kind, self.form, self.spool.reader());
        let reader = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::with_capacity(CHUNK_ROWS);
            let mut ended = Ok(());
            for (read, row) in rows::read(kind, form, file)?.rows.enumerate() {
                if read == MAX_ROWS {
                    ended = Err(too_many_rows());
                    break;
                }
                chunk.push(row);
                if chunk.len() == CHUNK_ROWS && sender.blocking_send(std::mem::take(&mut chunk)).is_err() {
                    return Ok(());
                }
            }
            if !chunk.is_empty() {
                let _ = sender.blocking_send(chunk);
            }
            ended
        });
        Reading { chunks, reader }
    }

    /// The end of the time, or of the process.
    async fn over(&self) -> Problem {
        tokio::select! {
            () = tokio::time::sleep_until(self.deadline) => Problem::timeout(),
            () = self.api.stop.cancelled() => Problem::unavailable("The service is stopping; import the file again.", 1),
        }
    }

    // ── Checking ────────────────────────────────────────────────────────────────────────────────────────────────

    /// Decides every row by what the read model knows, and writes nothing.
    async fn check(&self, mut findings: Findings<'_>) -> Result<(), Problem> {
        let mut reading = self.read();
        let mut over = std::pin::pin!(self.over());
        let mut places = 0..;
        loop {
            let chunk = tokio::select! {
                problem = &mut over => return Err(problem),
                chunk = reading.chunks.recv() => chunk,
            };
            let Some(chunk) = chunk else { return reading.end().await };
            let known = Known::of(&self.api, Asked::by(&chunk, true)).await.map_err(unanswered)?;
            let state = known.state();
            let draft = Draft::new(&state);
            for (row, place) in chunk.into_iter().zip(&mut places) {
                let result = match row {
                    Ok(row) => self.checked(&draft, &known, row),
                    Err(bad) => bad.into(),
                };
                findings.add(place, result).await?;
            }
        }
    }

    fn checked(&self, draft: &Draft<'_>, known: &Known, row: Row) -> RowResult {
        let Some(product_id) = known.id_of(&row.product) else { return unknown_sku(&row) };
        let decided = self.commands(&row, product_id).map(|command| {
            match inventory::decide(draft, &Command::Product(command), Timestamp::now()) {
                Decision::Store(_, outcome) | Decision::Settled(outcome) => Ok((outcome, None)),
                Decision::Refuse(_, rejection) => Err(rejection.into()),
                Decision::Reject(rejection) => Err(CommandError::Rejected(rejection)),
            }
        });
        RowResult::of(&row, product_id, last_try(decided))
    }

    /// Tells of an import of all or nothing that nothing was written, up to the row to which it was checked.
    async fn tell_why_nothing(
        &self,
        mut refusals: BTreeMap<u64, RowResult>,
        last: u64,
        answer: &mut Answer,
    ) -> Result<(), Problem> {
        let mut reading = self.read();
        let mut places = 0..;
        while let Some(chunk) = reading.chunks.recv().await {
            for (row, place) in chunk.into_iter().zip(&mut places) {
                if place > last {
                    return Ok(());
                }
                let result = refusals.remove(&place).unwrap_or_else(|| match row {
                    Ok(row) => RowResult::new(&row, row.product_id(), Status::Skipped),
                    Err(bad) => bad.into(),
                });
                answer.tell(result).await;
            }
        }
        reading.end().await
    }

    // ── Carrying out ────────────────────────────────────────────────────────────────────────────────────────────

    async fn carry_out(&self, answer: &mut Answer) -> Result<(), Problem> {
        let mut reading = self.read();
        let mut at_work = FuturesOrdered::new();
        let mut over = std::pin::pin!(self.over());
        let mut ended = None;
        loop {
            let has_room = ended.is_none() && at_work.len() + CHUNK_ROWS <= MAX_IN_FLIGHT;
            tokio::select! {
                problem = &mut over, if ended.is_none() => ended = Some(Err(problem)),
                Some(result) = at_work.next() => {
                                        let halt = self.halts(&result);
                    answer.tell(result).await;
                    if let (Some(problem), None | Some(Ok(()))) = (halt, &ended) {
                        ended = Some(Err(problem));
                    }
                }
                chunk = reading.chunks.recv(), if has_room => match chunk {
                    Some(chunk) => match Known::of(&self.api, Asked::by(&chunk, false)).await {
                        Ok(known) => at_work.extend(chunk.into_iter().map(|row| self.carried_out(&known, row))),
                        Err(problem) => ended = Some(Err(unanswered(problem))),
                    },
                    None => ended = Some(Ok(())),
                },
                else => break,
            }
        }
        match ended {
            Some(Err(problem)) => Err(problem),
            _ => reading.end().await,
        }
    }

    /// Whether no further row is to be tried after this result, and why.
    fn halts(&self, result: &RowResult) -> Option<Problem> {
        let problem = result.problem.as_ref()?;
        let line = result.line;
        if problem.status >= 500 {
            let detail = format!(
                "Stopped after line {line}, which was not decided. Import the file again to go on: what is done is \
                 unchanged then."
            );
            return Some(Problem::unavailable(detail, RETRY_AFTER_SECONDS));
        }
        (self.policy == Policy::AllOrNothing).then(|| {
            Problem::conflict(format!(
                "Line {line} could be carried out when it was checked, and could not when its turn came: somebody \
                 changed its product meanwhile. The rows before it are carried out."
            ))
        })
    }

    fn carried_out(&self, known: &Known, row: ReadRow) -> BoxFuture<'_, RowResult> {
        match row {
            Ok(row) => match known.id_of(&row.product) {
                Some(product_id) => self.put(row, product_id).boxed(),
                None => ready(unknown_sku(&row)).boxed(),
            },
            Err(bad) => ready(bad.into()).boxed(),
        }
    }

    async fn put(&self, row: Row, product_id: ProductId) -> RowResult {
        let carried = match &row.reason {
            Some(reason) => Arc::new(Carried { reason: Some(reason.clone()), ..(*self.carried).clone() }),
            None => self.carried.clone(),
        };
        let mut tries = self.commands(&row, product_id);
        let deciding = async {
            loop {
                let Some(command) = tries.next() else { break None };
                let done = was_done(&command.action);
                let answer = match self.api.writer.submit(command, Some(carried.clone())).await {
                    Ok(Committed { outcome, sequence, .. }) => Ok((outcome, Some(sequence))),
                    // An earlier try went through and only its answer was lost.
                    Err(CommandError::Rejected(Rejection::Repeated)) => Ok((done, None)),
                    Err(CommandError::Rejected(Rejection::AlreadyRegistered)) if tries.len() > 0 => continue,
                    Err(problem) => Err(problem),
                };
                break Some(answer);
            }
        };
        match timeout(ROW_TIMEOUT, deciding).await {
            Ok(answer) => RowResult::of(&row, product_id, answer),
            Err(_) => {
                let detail = "The row was not decided in time and may yet be carried out. Import it again to see.";
                RowResult::refused(&row, Some(product_id), &Problem::new(&OUTCOME_UNKNOWN, detail))
            }
        }
    }

    /// What a row is tried as, in this order, until one is decided otherwise than as registered already.
    fn commands(&self, row: &Row, product_id: ProductId) -> impl ExactSizeIterator<Item = ProductCommand> + use<> {
        let actions = match &row.wanted {
            Wanted::Product { sku, details, initial_quantity } => {
                let register = registered_as(sku, details)
                    .map(|details| Action::Register { details, initial_quantity: initial_quantity.unwrap_or(0) });
                register.into_iter().chain([Action::Amend(details.clone())]).collect()
            }
            Wanted::Count { quantity, counted_at } => {
                let counted_by = CountedBy::User(self.caller.subject);
                let count = Count { quantity: *quantity, counted_at: *counted_at, counted_by };
                vec![Action::RecordCount(count)]
            }
        };
        let by = UpdatedBy::User(self.caller.subject);
        actions.into_iter().map(move |action| ProductCommand::new(Uuid::new_v4(), product_id, by, action))
    }
}

/// The details of a new product of which a row says this; none without a name.
fn registered_as(sku: &Sku, said: &Amendment) -> Option<Details> {
    let Amendment { name, category, low_stock_threshold, active, .. } = said.clone();
    Some(Details {
        sku: sku.clone(),
        name: name?,
        category: category.flatten(),
        low_stock_threshold: low_stock_threshold.flatten(),
        active: active.unwrap_or(true),
    })
}

/// An outcome and the sequence that shows it.
type Decided = Result<(Outcome, Option<u64>), CommandError>;

/// The first answer that is not "registered already", or else the last.
fn last_try(tries: impl ExactSizeIterator<Item = Decided>) -> Option<Decided> {
    let mut last = None;
    for decided in tries {
        let known = matches!(decided, Err(CommandError::Rejected(Rejection::AlreadyRegistered)));
        last = Some(decided);
        if !known {
            break;
        }
    }
    last
}

/// What an action comes to that was carried out and whose answer was lost.
fn was_done(action: &Action) -> Outcome {
    match action {
        Action::Register { .. } => Outcome::Registered,
        Action::RecordCount(_) => Outcome::CountRecorded,
        // Which of its details it changed is not known any more.
        _ => Outcome::Revised { changes: Vec::new() },
    }
}

/// Which products a chunk of rows asks for.
struct Asked {
    skus: Vec<Sku>,
    ids: Vec<ProductId>,
}

impl Asked {
    /// Those that are named by sku and, to check the rows, all others that they are about.
    fn by(chunk: &[ReadRow], to_check: bool) -> Self {
        let rows = chunk.iter().filter_map(|row| row.as_ref().ok());
        let rows = rows.filter(|row| to_check || matches!(row.product, Named::Sku(_)));
        let (skus, ids): (Vec<_>, Vec<_>) = rows.map(|row| (row.sku(), row.product_id())).unzip();
        // In each form in which it may have been registered before there was one.
        let forms = skus.into_iter().flatten().flat_map(|sku| text::forms(sku.as_str()));
        Self { skus: forms.filter_map(|form| form.parse().ok()).collect(), ids: ids.into_iter().flatten().collect() }
    }
}

/// Which of them there are.
#[derive(Default)]
struct Known {
    by_id: HashMap<ProductId, Product>,
    /// By the composed form of the sku.
    by_sku: HashMap<Sku, Product>,
}

impl Known {
    async fn of(api: &Api, asked: Asked) -> Result<Self, QueryError> {
        let mut known = Self::default();
        if !asked.skus.is_empty() {
            let At { value, .. } = api.reads.products_by_skus(&asked.skus).await?;
            for (sku, product) in value {
                match text::composed(sku.as_str()).parse() {
                    Ok(composed) if composed == sku => drop(known.by_sku.insert(composed, product)),
                    Ok(composed) => drop(known.by_sku.entry(composed).or_insert(product)),
                    Err(_) => {}
                }
            }
        }
        if !asked.ids.is_empty() {
            let At { value, .. } = api.reads.products_by_ids(&asked.ids).await?;
            known.by_id = value.into_iter().collect();
        }
        Ok(known)
    }

    fn id_of(&self, product: &Named) -> Option<ProductId> {
        match product {
            Named::Id(id) => Some(*id),
            Named::Sku(sku) => self.by_sku.get(sku).map(|product| product.product_id),
        }
    }

    /// A ledger in which these products are registered and nothing else happened: deciding a row needs no more.
    fn state(&self) -> inventory::State {
        let mut state = inventory::State::default();
        let mut told = HashSet::new();
        for product in self.by_id.values().chain(self.by_sku.values()) {
            if told.insert(product.product_id) {
                let details = ProductDetails {
                    product_id: product.product_id,
                    sku: product.sku.clone(),
                    name: product.name.as_str().into(),
                    category: product.category.as_deref().map(Into::into),
                    low_stock_threshold: product.low_stock_threshold,
                    active: product.active,
                };
                let event = LedgerEvent::ProductRegistered(ProductRegistered(details));
                state.evolve(state.sequence() + 1, Timestamp::now(), &event, None);
            }
        }
        state
    }
}

impl RowResult {
    fn new(row: &Row, product_id: Option<ProductId>, status: Status) -> Self {
        let sku = row.sku().cloned();
        Self { line: row.line, status, product_id, sku, changes: Vec::new(), sequence: None, problem: None }
    }

    fn refused(row: &Row, product_id: Option<ProductId>, problem: &Problem) -> Self {
        Self { problem: Some(problem.document()), ..Self::new(row, product_id, Status::Refused) }
    }

    fn of(row: &Row, product_id: ProductId, decided: Option<Decided>) -> Self {
        let product_id = Some(product_id);
        let (outcome, sequence) = match decided {
            Some(Ok(decided)) => decided,
            Some(Err(CommandError::Rejected(Rejection::UnknownProduct))) if row.needs_name() => {
                let detail = "No product has the sku, and a new one needs a name.";
                return Self::refused(row, product_id, &Problem::new(&PRODUCT_NOT_FOUND, detail));
            }
            Some(Err(problem)) => return Self::refused(row, product_id, &refused(&problem)),
            None => return Self::refused(row, product_id, &Problem::internal("a row without a command")),
        };
        let mut changes = Vec::new();
        let status = match outcome {
            Outcome::Registered => Status::Registered,
            Outcome::Revised { changes: found } => {
                changes = found.iter().map(Into::into).collect();
                Status::Revised
            }
            Outcome::CountRecorded => Status::Recorded,
            Outcome::Unchanged => Status::Unchanged,
            other => {
                let problem = Problem::internal(format!("a row of an import came to {other:?}"));
                return Self::refused(row, product_id, &problem);
            }
        };
        Self { changes, sequence, ..Self::new(row, product_id, status) }
    }
}

impl From<BadRow> for RowResult {
    fn from(BadRow { line, problem }: BadRow) -> Self {
        let problem = Some(problem.document());
        let (status, changes) = (Status::Refused, Vec::new());
        Self { line, status, product_id: None, sku: None, changes, sequence: None, problem }
    }
}

fn unknown_sku(row: &Row) -> RowResult {
    RowResult::refused(row, None, &Problem::new(&PRODUCT_NOT_FOUND, "No product has the sku."))
}

fn too_many_rows() -> Problem {
    Problem::unprocessable(format!("The body has more than {MAX_ROWS} rows; those after them were not read."))
}

fn too_many_refusals() -> Problem {
    Problem::unprocessable(format!("{MAX_REFUSALS_KEPT} rows were refused; those after them were not checked."))
}
