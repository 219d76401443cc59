//! A run, from the message that starts it to its report.
//!
//! Every step can be repeated: a run whose replica died is delivered again and goes on from what its report says. Until
//! its plan is stored it plans again; after that its rows are settled, and those without a result are corrected. A count
//! corrects once however often it is tried (`inventory::Action::CorrectCount`), so nothing is corrected twice.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use deadpool_postgres::Pool;
use futures::{StreamExt, stream};
use lomash_contract::id::EventRole;
use lomash_contract::{Cause, EventId, ProductId, Timestamp, UpdatedBy};
use lomash_ledger::receive::{Delivery, Settle};
use lomash_ledger::{Carried, JetStreamLedger, Ledger, ReadError, crash_point};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use uuid::Uuid;

use super::books::{Books, BooksError, Snapshot};
use super::reports::{Basis, DecideError, NewRun, Reports, ReportsError};
use super::schedule::{Job, run_of_tick};
use super::{
    Figure, Figures, MAX_FIGURES, Plan, RecordedCount, Refusal, RefusalReason, Report, Request, Row, RowResult, Source,
    StartedBy, Status, plan, select,
};
use crate::commands::Writer;
use crate::committer::CommandError;
use crate::inventory::{Action, Count, Outcome, ProductCommand, Rejection};
use crate::observed;
use crate::schedule::JobsError;
use crate::warehouse::Warehouse;

/// Corrections under way at once: enough to fill a batch while one is being stored, few enough to leave room for orders.
pub const MAX_CORRECTIONS_IN_FLIGHT: usize = 500;

/// Results that are written to the report at once.
const RESULTS_AT_ONCE: usize = 500;

/// Pause before a run comes back that was interrupted because a server was away.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// Pause before a run comes back whose replica is stopping: another one takes it.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(250);

/// The id of the command that corrects a product by a count: always the same, so that the events repeat their ids, and a
/// correction is found again in the ledger.
#[must_use]
pub fn correction_id(product_id: ProductId, count: &Count) -> Uuid {
    let name = format!("correction/{}/{}", count.counted_at, count.quantity);
    Uuid::new_v5(&product_id.0, name.as_bytes())
}

/// Why something about runs could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ReconciliationError {
    /// The threshold is no percentage.
    #[error("the approval threshold is {0} %; it must be from 0 to 100")]
    BadThreshold(u32),
    /// The id was used for another request.
    #[error("the run {0} was asked to do something else; use a new key")]
    IdReused(Uuid),
    /// Figures of the warehouse are asked for, and there is none.
    #[error("no warehouse is configured; set WAREHOUSE_URL, or reconcile the confirmed counts")]
    NoWarehouse,
    /// The reports cannot be reached.
    #[error(transparent)]
    Reports(#[from] ReportsError),
    /// A decision that is not possible.
    #[error(transparent)]
    Decide(#[from] DecideError),
    /// The message that starts or continues the run could not be stored.
    #[error(transparent)]
    Jobs(#[from] JobsError),
}

/// A run that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its report as it stands.
    pub report: Report,
    /// Whether it was asked for just now, and not before.
    pub is_new: bool,
}

/// Where runs are asked for, watched, approved and rejected; on any replica. Clones are the same.
#[derive(Clone)]
pub struct Reconciliation {
    context: Context,
    reports: Reports,
    has_warehouse: bool,
}

/// What carries runs out, one at a time over all replicas. Clones are the same.
#[derive(Clone)]
pub struct Runner {
    parts: Arc<Parts>,
}

/// What a run works with.
pub struct Parts {
    /// The reports.
    pub reports: Reports,
    /// The ledger, to know where it ends.
    pub ledger: JetStreamLedger,
    /// The database of the projection.
    pub pool: Pool,
    /// Where corrections go.
    pub writer: Writer,
    /// The warehouse, if there is one.
    pub warehouse: Option<Warehouse>,
    /// A run stops between two corrections when this is cancelled, and another replica continues it.
    pub stop: CancellationToken,
}

/// Why a run did not come to its end this time.
enum Interruption {
    /// Worth another try.
    Passing(String),
    /// This replica is stopping.
    Stopping,
    /// The run cannot succeed.
    Final(String),
    /// The message is none of ours.
    Alien(String),
}

impl From<ReportsError> for Interruption {
    fn from(problem: ReportsError) -> Self {
        Self::Passing(problem.to_string())
    }
}

impl From<BooksError> for Interruption {
    fn from(problem: BooksError) -> Self {
        Self::Passing(problem.to_string())
    }
}

impl From<ReadError> for Interruption {
    fn from(problem: ReadError) -> Self {
        Self::Passing(problem.to_string())
    }
}

impl Reconciliation {
    /// Runs started by messages in the `JOBS` of `context`, with these reports.
    #[must_use]
    pub const fn new(context: Context, reports: Reports, has_warehouse: bool) -> Self {
        Self { context, reports, has_warehouse }
    }

    /// Starts a run under an id of the caller's, on whichever replica. The same id and request again are the same run.
    ///
    /// # Errors
    /// [`ReconciliationError`].
    pub async fn start(&self, id: Uuid, request: Request, by: UpdatedBy) -> Result<Started, ReconciliationError> {
        let threshold = request.approval_threshold_percent;
        if threshold > 100 {
            return Err(ReconciliationError::BadThreshold(threshold));
        }
        if request.figures == Figures::Warehouse && !self.has_warehouse {
            return Err(ReconciliationError::NoWarehouse);
        }
        let (started_by, requested_at) = (StartedBy::Request, Timestamp::now());
        let run = NewRun { id, started_by, requested_by: by, request, requested_at };
        let is_new = self.reports.insert(&run).await?;
        let vanished = || ReportsError::Unreadable(format!("the run {id} vanished"));
        let report = self.reports.get(id).await?.ok_or_else(vanished)?;
        if report.request != run.request {
            return Err(ReconciliationError::IdReused(id));
        }
        if report.status == Status::Queued
            && let Err(problem) = (Job { run_id: Some(id) }).publish(&self.context, id.to_string()).await
        {
            // Unless it was stored after all, and a replica has begun.
            if self.reports.forget(id).await? {
                return Err(problem.into());
            }
        }
        Ok(Started { report, is_new })
    }

    /// The report of a run.
    ///
    /// # Errors
    /// [`ReconciliationError::Reports`].
    pub async fn get(&self, id: Uuid) -> Result<Option<Report>, ReconciliationError> {
        Ok(self.reports.get(id).await?)
    }

    /// Rows of a report in their order, those with numbers above `after`, at most `limit`.
    ///
    /// # Errors
    /// [`ReconciliationError::Reports`].
    pub async fn rows(&self, id: Uuid, after: u32, limit: u32) -> Result<Vec<Row>, ReconciliationError> {
        Ok(self.reports.rows(id, after, limit).await?)
    }

    /// Reports from the newest on, those older than `before` (its `requestedAt` and id), at most `limit`.
    ///
    /// # Errors
    /// [`ReconciliationError::Reports`].
    pub async fn list(
        &self,
        before: Option<(Timestamp, Uuid)>,
        limit: u32,
    ) -> Result<Vec<Report>, ReconciliationError> {
        Ok(self.reports.list(before, limit).await?)
    }

    /// Approves a run that waits: its rows are applied as they were reported. Approving again is harmless.
    ///
    /// # Errors
    /// [`ReconciliationError`]; when the job could not be stored, approve again.
    pub async fn approve(&self, id: Uuid, by: UpdatedBy) -> Result<Report, ReconciliationError> {
        let report = self.reports.decide(id, by, true).await?;
        if report.status == Status::Applying {
            (Job { run_id: Some(id) }).publish(&self.context, format!("{id}/approved")).await?;
        }
        Ok(report)
    }

    /// Rejects a run that waits: nothing of it is applied, and its confirmed counts are dealt with.
    ///
    /// # Errors
    /// [`ReconciliationError`].
    pub async fn reject(&self, id: Uuid, by: UpdatedBy) -> Result<Report, ReconciliationError> {
        let report = self.reports.decide(id, by, false).await?;
        tell(&report);
        Ok(report)
    }
}

impl Runner {
    /// A runner with these parts.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self { parts: Arc::new(parts) }
    }

    /// Handles one message of `JOBS`.
    pub async fn handle(self, delivery: Delivery) -> Settle {
        match self.carry_out(&delivery).await {
            Ok(()) => Settle::Done,
            Err(Interruption::Stopping) => Settle::Retry(HAND_OVER_PAUSE),
            Err(Interruption::Alien(reason)) => Settle::Dead(reason),
            Err(Interruption::Passing(problem) | Interruption::Final(problem)) => {
                warn!(problem, deliveries = delivery.deliveries, "a reconciliation run was interrupted and comes back");
                Settle::Retry(RETRY_PAUSE)
            }
        }
    }

    async fn carry_out(&self, delivery: &Delivery) -> Result<(), Interruption> {
        let reports = &self.parts.reports;
        let job = Job::parse(&delivery.payload).map_err(Interruption::Alien)?;
        let id = match job.run_id {
            Some(id) => id,
            None => {
                let id = run_of_tick(delivery);
                // Ticks that came while nobody was there are made up for by one run, not by one each.
                if reports.has_run_since(delivery.stored_at, id).await? {
                    info!(tick = delivery.sequence, "a tick is late, and a run has begun since: nothing to do");
                    return Ok(());
                }
                let (started_by, requested_by) = (StartedBy::Schedule, UpdatedBy::System);
                let requested_at = Timestamp::new(delivery.stored_at);
                let request = Request::default();
                reports.insert(&NewRun { id, started_by, requested_by, request, requested_at }).await?;
                id
            }
        };
        let Some(report) = reports.begin(id).await? else {
            return Err(Interruption::Alien(format!("there is no report of the reconciliation run {id}")));
        };
        let carried_out = match report.status {
            Status::Queued | Status::Planning => self.plan(&report).await,
            Status::Applying => self.apply(&report).await,
            _ => return Ok(()),
        };
        match carried_out {
            Err(Interruption::Final(problem)) => self.settle(id, Status::Failed, Some(&problem)).await,
            other => other,
        }
    }

    async fn settle(&self, id: Uuid, status: Status, problem: Option<&str>) -> Result<(), Interruption> {
        if let Some(report) = self.parts.reports.settle(id, status, problem).await? {
            tell(&report);
        }
        Ok(())
    }

    /// Makes the plan, stores it, and goes on with it if that needs nobody.
    async fn plan(&self, report: &Report) -> Result<(), Interruption> {
        let (plan, basis) = tokio::select! {
            // Planning can be given up anywhere; corrections stop by themselves and note how far they came.
            () = self.parts.stop.cancelled() => return Err(Interruption::Stopping),
            made = self.make_plan(report) => made?,
        };
        let status = if report.request.dry_run {
            Status::DryRun
        } else if plan.needs_approval {
            Status::AwaitingApproval
        } else {
            Status::Applying
        };
        self.parts.reports.store_plan(report.id, &plan, basis, status).await?;
        if status == Status::Applying {
            return self.apply(report).await;
        }
        self.settle(report.id, status, None).await
    }

    async fn make_plan(&self, report: &Report) -> Result<(Plan, Basis), Interruption> {
        let Parts { ledger, pool, warehouse, reports, .. } = &*self.parts;
        let mut figures = match (report.request.figures, warehouse) {
            (Figures::All | Figures::Warehouse, Some(warehouse)) => {
                warehouse.figures().await.map_err(|problem| Interruption::Final(problem.to_string()))?
            }
            (Figures::Warehouse, None) => {
                return Err(Interruption::Final(ReconciliationError::NoWarehouse.to_string()));
            }
            _ => Vec::new(),
        };
        // After the figures: what was counted is not newer than what is compared with it.
        let end = ledger.last_sequence().await?;
        let mut books = Books::open(pool).await?;
        let snapshot = books.snapshot(end).await?;
        let mut counts_through = None;
        if report.request.figures != Figures::Warehouse {
            figures.extend(snapshot.counts_since(reports.counts_through().await?).await?);
            counts_through = Some(snapshot.sequence);
        }
        if figures.len() > MAX_FIGURES {
            let problem = format!("there are more than {MAX_FIGURES} figures, which is the most that one run takes");
            return Err(Interruption::Final(problem));
        }
        let catalogue = snapshot.catalogue(&figures).await?;
        let selection = select(figures, &catalogue, report.requested_at.max(Timestamp::now()));
        let counts: Vec<_> =
            selection.chosen.iter().map(|(figure, product)| (product.product_id, figure.counted_at)).collect();
        let stocks = snapshot.stock_at_counts(&counts).await?;
        let plan = plan(selection, &stocks, catalogue.size(), report.request.approval_threshold_percent);
        let basis = Basis { sequence: snapshot.sequence, catalogue_products: catalogue.size(), counts_through };
        Ok((plan, basis))
    }

    /// Applies the rows of the stored plan that have no result yet.
    async fn apply(&self, report: &Report) -> Result<(), Interruption> {
        let Parts { ledger, pool, reports, stop, .. } = &*self.parts;
        let planned = reports.planned(report.id).await?;
        let end = ledger.last_sequence().await?;
        let mut books = Books::open(pool).await?;
        let snapshot = books.snapshot(end).await?;
        let (due, settled) = still_due(&snapshot, planned).await?;
        drop(snapshot);
        drop(books);
        reports.record(report.id, &settled).await?;

        let corrections = stream::iter(due)
            .take_while(|_| std::future::ready(!stop.is_cancelled()))
            .map(|row| self.correct(report.id, row))
            .buffer_unordered(MAX_CORRECTIONS_IN_FLIGHT);
        let mut chunks = std::pin::pin!(corrections.ready_chunks(RESULTS_AT_ONCE));
        let mut is_stopping = false;
        while let Some(chunk) = chunks.next().await {
            is_stopping |= chunk.iter().any(Option::is_none);
            let results: Vec<Row> = chunk.into_iter().flatten().collect();
            reports.record(report.id, &results).await?;
        }
        if is_stopping || stop.is_cancelled() {
            return Err(Interruption::Stopping);
        }
        self.settle(report.id, Status::Completed, None).await
    }

    /// Has one row corrected; `None` when this process is stopping and it is unknown what became of it.
    async fn correct(&self, run: Uuid, row: Row) -> Option<Row> {
        let (Some((product_id, count)), Some(stock_at_count)) = (count_of(&row), row.stock_at_count) else {
            let refusal = Refusal::new(RefusalReason::NotAccepted, "the row of the plan is incomplete");
            return Some(refused(row, refusal));
        };
        let action = Action::CorrectCount { count, stock_at_count };
        let command = ProductCommand::new(correction_id(product_id, &count), product_id, UpdatedBy::System, action);
        let carried = Carried { reason: Some(format!("reconciliation {run}")), ..Carried::default() };
        let answer = self.parts.writer.submit(command, Some(Arc::new(carried))).await;
        crash_point!("reconcile-between-corrections");
        Some(match answer {
            Ok(committed) => match committed.outcome {
                Outcome::StockChanged { previous_quantity, new_quantity, shortfall } => Row {
                    before: Some(previous_quantity),
                    after: Some(new_quantity),
                    shortfall,
                    result: if previous_quantity == new_quantity { RowResult::Unchanged } else { RowResult::Corrected },
                    ..row
                },
                _ => Row { after: row.before, shortfall: 0, result: RowResult::Unchanged, ..row },
            },
            Err(CommandError::Stopping | CommandError::Undecided) => return None,
            Err(CommandError::Rejected(rejection)) => {
                let reason = match rejection {
                    Rejection::UnknownProduct => RefusalReason::UnknownProduct,
                    Rejection::CountSuperseded { .. } => RefusalReason::Superseded,
                    Rejection::CountInFuture { .. } => RefusalReason::CountedInFuture,
                    _ => RefusalReason::NotAccepted,
                };
                refused(row, Refusal::new(reason, rejection.to_string()))
            }
            Err(
                problem @ (CommandError::TooLarge { .. }
                | CommandError::Unstorable { .. }
                | CommandError::IdentityTaken { .. }),
            ) => refused(row, Refusal::new(RefusalReason::NotAccepted, problem.to_string())),
        })
    }
}

/// Parts planned rows into those that are due and those that came to a result before or since: the plan may have waited
/// for approval, and this run may have been interrupted.
async fn still_due(snapshot: &Snapshot<'_>, planned: Vec<Row>) -> Result<(Vec<Row>, Vec<Row>), BooksError> {
    let named: Vec<_> = planned.iter().map(|row| Ok(figure_of(row))).collect();
    let catalogue = snapshot.catalogue(&named).await?;
    let counts: Vec<_> = planned.iter().filter_map(count_of).collect();
    let instants: Vec<_> = counts.iter().map(|(product_id, count)| (*product_id, count.counted_at)).collect();
    let stocks = snapshot.stock_at_counts(&instants).await?;
    let corrections: Vec<_> = counts
        .iter()
        .flat_map(|(product_id, count)| {
            correction_events(*product_id, count, EventRole::Stock).map(|event| (*product_id, event))
        })
        .collect();
    let made = snapshot.corrections(&corrections).await?;

    let (mut due, mut settled) = (Vec::with_capacity(planned.len()), Vec::new());
    for row in planned {
        let Some((product_id, count)) = count_of(&row) else {
            due.push(row);
            continue;
        };
        if let Some((before, after)) = made.get(&product_id).copied() {
            // By this run, whose report did not hear of it.
            let target = i64::from(before) + row.correction.unwrap_or(0);
            let shortfall = u32::try_from(-target).unwrap_or(0);
            settled.push(Row {
                before: Some(before),
                after: Some(after),
                shortfall,
                result: RowResult::Corrected,
                ..row
            });
            continue;
        }
        let newest = catalogue.product(product_id).and_then(|product| product.newest_count);
        if let Some(newest) = newest.filter(|newest| newest.counted_at > count.counted_at) {
            let detail = format!("a newer count is on record, of {}", newest.counted_at);
            settled.push(refused(row, Refusal::new(RefusalReason::Superseded, detail)));
            continue;
        }
        let stock_at_count = stocks.get(&product_id).copied().unwrap_or(0);
        if is_corrected(newest, &count) || row.stock_at_count.map(i64::from) == Some(stock_at_count) {
            due.push(row);
        } else {
            let detail = format!("the stock at the count is {stock_at_count} by now; the plan had another correction");
            settled.push(refused(row, Refusal::new(RefusalReason::ChangedSinceReport, detail)));
        }
    }
    Ok((due, settled))
}

fn is_corrected(newest: Option<RecordedCount>, count: &Count) -> bool {
    newest.is_some_and(|newest| {
        newest.corrected && newest.counted_at == count.counted_at && newest.quantity == count.quantity
    })
}

/// The ids that the event in this role may have by which a count corrects: the one it is given, and the one it was given before
/// corrections had a space of their own.
pub(super) fn correction_events(product_id: ProductId, count: &Count, role: EventRole) -> [EventId; 2] {
    let id = correction_id(product_id, count);
    [EventId::derive(&Cause::Correction(id), role, &product_id.0), EventId::derive_by_order(&id, role, &product_id.0)]
}

fn count_of(row: &Row) -> Option<(ProductId, Count)> {
    let (quantity, counted_at, counted_by) = (row.counted?, row.counted_at?, row.counted_by?);
    Some((row.product_id?, Count { quantity, counted_at, counted_by }))
}

fn figure_of(row: &Row) -> Figure {
    let (quantity, counted_at) = (row.counted.unwrap_or(0), row.counted_at.unwrap_or_else(Timestamp::now));
    let counted_by = row.counted_by.unwrap_or(lomash_contract::CountedBy::Warehouse);
    let (source, position): (Source, u64) = (row.source, row.position);
    Figure { source, position, sku: None, product_id: row.product_id, quantity, counted_at, counted_by }
}

fn refused(row: Row, refusal: Refusal) -> Row {
    Row { shortfall: 0, result: RowResult::Refused, refusal: Some(refusal), ..row }
}

/// One record for each run that came to a rest.
fn tell(report: &Report) {
    observed::reconciled(report.status.as_str());
    let Report { id, status, started_by, requested_by, request, totals, sequence, attempts, .. } = report;
    let duration = match (report.started_at, report.finished_at) {
        (Some(from), Some(to)) => (to.get() - from.get()).whole_milliseconds(),
        _ => 0,
    };
    info!(
        target: "lomash::reconciliation",
        status = status.as_str(),
        run.id = %id,
        started_by = started_by.as_str(),
        requested_by = %requested_by,
        figures = ?request.figures,
        dry_run = request.dry_run,
        approval_threshold_percent = request.approval_threshold_percent,
        sequence,
        catalogue_products = report.catalogue_products,
        counted = totals.counted,
        changed = totals.changed,
        unchanged = totals.unchanged,
        refused = totals.refused,
        units_up = totals.units_up,
        units_down = totals.units_down,
        shortfall = totals.shortfall,
        attempts,
        duration_ms = duration,
        problem = report.problem,
        "reconciliation"
    );
}
