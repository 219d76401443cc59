//! Reconciliation: what a count of the warehouse says about the stock of the ledger, row by row.
//!
//! A count describes the moment it was taken. The correction is `counted - stock at the count`, added to today's stock,
//! so that what was sold since the count stays sold. The stock at the count is what the ledger said at that moment and
//! the corrections stored since: they came of older counts, and their error was there already when this one was taken.
//!
//! This file is pure: figures, the catalogue and the time come in, rows come out. Around it: [`schedule`] starts runs,
//! [`run`] carries them out, [`reports`] keeps what they came to, `crate::warehouse` brings the figures.

use std::cmp::Ordering;

use hashbrown::HashMap;
use lomash_contract::limits::MAX_STOCK;
use lomash_contract::text;
use lomash_contract::{CountedBy, ProductId, Sku, Timestamp, UpdatedBy};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::inventory::MAX_COUNT_SKEW;

mod books;
pub mod reports;
pub mod run;
pub mod schedule;

/// Share of the catalogue's products, in percent, that a run may change without asking.
pub const DEFAULT_APPROVAL_THRESHOLD_PERCENT: u32 = 20;

/// Most figures of one run. All of them are in memory while it is planned, some 300 bytes each.
pub const MAX_FIGURES: usize = 250_000;

// ── What is asked for ───────────────────────────────────────────────────────────────────────────────────────────

/// Which figures a run takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationFigures)]
pub enum Figures {
    /// The warehouse's, if one is configured, and the confirmed counts.
    #[default]
    All,
    /// The warehouse's only.
    Warehouse,
    /// The confirmed counts only.
    Counts,
}

/// What a run is asked to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[schema(as = ReconciliationRequest)]
pub struct Request {
    /// Which figures it takes.
    pub figures: Figures,
    /// Report only; write nothing.
    pub dry_run: bool,
    /// Ask for approval before more than this share of the catalogue's products is changed, in percent.
    #[schema(minimum = 0, maximum = 100)]
    pub approval_threshold_percent: u32,
}

impl Default for Request {
    fn default() -> Self {
        Self { figures: Figures::All, dry_run: false, approval_threshold_percent: DEFAULT_APPROVAL_THRESHOLD_PERCENT }
    }
}

// ── What comes in ───────────────────────────────────────────────────────────────────────────────────────────────

/// Where a figure comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationSource)]
pub enum Source {
    /// The warehouse's interface.
    Warehouse,
    /// A confirmed count in the ledger.
    Counts,
}

impl Source {
    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Warehouse => "warehouse",
            Self::Counts => "counts",
        }
    }
}

/// How many of a product were counted, and when. Names the product by its sku, its id or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figure {
    /// Where it comes from.
    pub source: Source,
    /// Its place there: the row of the warehouse's answer, from 1, or the sequence of the count.
    pub position: u64,
    /// The unit, as far as given.
    pub sku: Option<Sku>,
    /// The product, as far as given.
    pub product_id: Option<ProductId>,
    /// How many there were; at most [`MAX_STOCK`].
    pub quantity: u32,
    /// When they were counted.
    pub counted_at: Timestamp,
    /// Who counted.
    pub counted_by: CountedBy,
}

/// A row of the source that is no figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Where it comes from.
    pub source: Source,
    /// Its place there.
    pub position: u64,
    /// The unit, when at least that could be read.
    pub sku: Option<String>,
    /// What is wrong with it, as a sentence.
    pub problem: String,
}

/// A product as the projection knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownProduct {
    /// The product.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: Sku,
    /// Its stock today.
    pub quantity: u32,
    /// When it joined the catalogue, by the server's clock.
    pub registered_at: Timestamp,
    /// Its newest count on record.
    pub newest_count: Option<RecordedCount>,
}

/// A count that the ledger holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedCount {
    /// How many there were.
    pub quantity: u32,
    /// When they were counted.
    pub counted_at: Timestamp,
    /// Whether the stock was corrected by it.
    pub corrected: bool,
}

/// The products that a run's figures name, and the size of the whole catalogue.
#[derive(Clone, Debug, Default)]
pub struct Catalogue {
    size: u64,
    products: HashMap<ProductId, KnownProduct>,
    /// By the composed form of the sku: some were kept before there was one form.
    by_sku: HashMap<String, Vec<ProductId>>,
}

fn composed(sku: &Sku) -> String {
    text::composed(sku.as_str()).into_owned()
}

impl Catalogue {
    /// A catalogue of `size` products, of which these are known.
    #[must_use]
    pub fn new(size: u64, known: impl IntoIterator<Item = KnownProduct>) -> Self {
        let mut catalogue = Self { size, ..Self::default() };
        for product in known {
            let id = product.product_id;
            if let Some(previous) = catalogue.products.insert(id, product.clone()) {
                catalogue.by_sku.entry(composed(&previous.sku)).or_default().retain(|other| *other != id);
            }
            catalogue.by_sku.entry(composed(&product.sku)).or_default().push(id);
        }
        catalogue
    }

    /// How many products there are in all.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// A product, if it is known.
    #[must_use]
    pub fn product(&self, id: ProductId) -> Option<&KnownProduct> {
        self.products.get(&id)
    }

    /// The product that a figure is about.
    fn find(&self, figure: &Figure) -> Result<&KnownProduct, Refusal> {
        let unknown = || Refusal::new(RefusalReason::UnknownProduct, "no such product in the catalogue");
        let by_sku = match &figure.sku {
            None => None,
            Some(sku) => match self.by_sku.get(&composed(sku)).map(Vec::as_slice) {
                None | Some([]) => return Err(unknown()),
                Some([one]) => Some(one),
                Some(several) => {
                    let detail = format!("{} products have the sku {sku}; name the product by its id", several.len());
                    return Err(Refusal::new(RefusalReason::Ambiguous, detail));
                }
            },
        };
        match (by_sku, figure.product_id) {
            (Some(id), Some(given)) if *id != given => {
                let detail = format!("the sku belongs to product {id}, the row names {given}");
                Err(Refusal::new(RefusalReason::Ambiguous, detail))
            }
            (Some(id), _) => self.products.get(id).ok_or_else(unknown),
            (None, Some(given)) => self.products.get(&given).ok_or_else(unknown),
            (None, None) => Err(unknown()),
        }
    }
}

// ── What comes out ──────────────────────────────────────────────────────────────────────────────────────────────

/// Why a row was refused, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationRefusalReason)]
pub enum RefusalReason {
    /// It is no figure.
    Unreadable,
    /// The catalogue has no such product.
    UnknownProduct,
    /// It cannot be told which product or which figure is meant.
    Ambiguous,
    /// Counted later than now.
    CountedInFuture,
    /// Counted before the product joined the catalogue.
    CountedBeforeRegistration,
    /// The run has a newer figure, or the same one again.
    Duplicate,
    /// The ledger has a newer count.
    Superseded,
    /// The correction is not what it was when the report was made.
    ChangedSinceReport,
    /// The product service refused the correction.
    NotAccepted,
}

impl RefusalReason {
    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::UnknownProduct => "unknownProduct",
            Self::Ambiguous => "ambiguous",
            Self::CountedInFuture => "countedInFuture",
            Self::CountedBeforeRegistration => "countedBeforeRegistration",
            Self::Duplicate => "duplicate",
            Self::Superseded => "superseded",
            Self::ChangedSinceReport => "changedSinceReport",
            Self::NotAccepted => "notAccepted",
        }
    }
}

/// Why a row was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationRefusal)]
pub struct Refusal {
    /// For programs.
    pub reason: RefusalReason,
    /// For people, as a sentence.
    pub detail: String,
}

impl Refusal {
    /// A refusal.
    #[must_use]
    pub fn new(reason: RefusalReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationRowResult)]
pub enum RowResult {
    /// To be applied.
    Planned,
    /// The stock was changed.
    Corrected,
    /// The stock is right already, or was corrected by this count before, or has nothing left to take away.
    Unchanged,
    /// Not applied; see `refusal`.
    Refused,
}

impl RowResult {
    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Corrected => "corrected",
            Self::Unchanged => "unchanged",
            Self::Refused => "refused",
        }
    }
}

/// A row of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationRow)]
pub struct Row {
    /// Its place in the report, from 1.
    pub number: u32,
    /// Where the figure comes from.
    pub source: Source,
    /// Its place there: the row of the warehouse's answer, from 1, or the sequence of the count.
    pub position: u64,
    /// The product, when it is known.
    #[schema(value_type = Option<Uuid>)]
    pub product_id: Option<ProductId>,
    /// Its unit, or the one that the row names.
    pub sku: Option<String>,
    /// How many were counted.
    pub counted: Option<u32>,
    /// When they were counted.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub counted_at: Option<Timestamp>,
    /// Who counted: a user's id, or `warehouse`.
    #[schema(value_type = Option<String>)]
    pub counted_by: Option<CountedBy>,
    /// The stock at the moment of the count, with the corrections stored since.
    pub stock_at_count: Option<u32>,
    /// The stock before the correction; while it is only planned, as the report was made.
    pub before: Option<u32>,
    /// What the count adds to the stock: `counted - stockAtCount`.
    pub correction: Option<i64>,
    /// The stock after the correction; never below zero.
    pub after: Option<u32>,
    /// By how much the correction would have gone below zero.
    pub shortfall: u32,
    /// What became of it.
    pub result: RowResult,
    /// Why it was refused.
    pub refusal: Option<Refusal>,
}

/// The sums of a report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationTotals)]
pub struct Totals {
    /// Rows that stand: changed, to be changed or unchanged.
    pub counted: u64,
    /// Products whose stock changes or changed.
    pub changed: u64,
    /// Products whose stock stays.
    pub unchanged: u64,
    /// Rows that were refused.
    pub refused: u64,
    /// Units added.
    pub units_up: u64,
    /// Units taken away.
    pub units_down: u64,
    /// Units that corrections would have taken away below zero.
    pub shortfall: u64,
}

impl Totals {
    /// The sums of these rows.
    #[must_use]
    pub fn of(rows: &[Row]) -> Self {
        let mut totals = Self::default();
        for row in rows {
            if row.result == RowResult::Refused {
                totals.refused += 1;
                continue;
            }
            let (before, after) = (row.before.unwrap_or(0), row.after.unwrap_or(0));
            totals.counted += 1;
            totals.changed += u64::from(before != after);
            totals.unchanged += u64::from(before == after);
            totals.units_up += u64::from(after.saturating_sub(before));
            totals.units_down += u64::from(before.saturating_sub(after));
            totals.shortfall += u64::from(row.shortfall);
        }
        totals
    }
}

/// Where a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationStatus)]
pub enum Status {
    /// Asked for; no replica has begun.
    Queued,
    /// Figures are being fetched and compared.
    Planning,
    /// Corrections are being stored.
    Applying,
    /// Reported only, as asked for.
    DryRun,
    /// Reported; changes too much to go on without approval.
    AwaitingApproval,
    /// Corrections are stored.
    Completed,
    /// Came to nothing; see `problem`.
    Failed,
    /// Not approved.
    Rejected,
    /// A newer run took its place before it was approved.
    Superseded,
}

impl Status {
    /// Its word in reports.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Planning => "planning",
            Self::Applying => "applying",
            Self::DryRun => "dryRun",
            Self::AwaitingApproval => "awaitingApproval",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Rejected => "rejected",
            Self::Superseded => "superseded",
        }
    }

    /// Whether nothing more happens to the run by itself.
    #[must_use]
    pub const fn is_settled(self) -> bool {
        !matches!(self, Self::Queued | Self::Planning | Self::Applying)
    }
}

/// What started a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationStartedBy)]
pub enum StartedBy {
    /// The schedule.
    Schedule,
    /// Somebody's request.
    Request,
}

/// The report of a run, without its rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationReport)]
pub struct Report {
    /// The run.
    pub id: Uuid,
    /// Where it stands.
    pub status: Status,
    /// What started it.
    pub started_by: StartedBy,
    /// Who asked for it: a user's id, or `system`.
    #[schema(value_type = String)]
    pub requested_by: UpdatedBy,
    /// What it was asked to do.
    pub request: Request,
    /// When it was asked for.
    #[schema(value_type = String, format = DateTime)]
    pub requested_at: Timestamp,
    /// When a replica began.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started_at: Option<Timestamp>,
    /// When it came to its end, or to where it waits for approval.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub finished_at: Option<Timestamp>,
    /// How often a replica took it up: more than once after a crash or a failure.
    pub attempts: u32,
    /// The sequence of the ledger that the plan was made at.
    pub sequence: Option<u64>,
    /// Products in the catalogue at that sequence.
    pub catalogue_products: Option<u64>,
    /// Its sums.
    pub totals: Totals,
    /// Who approved or rejected it.
    #[schema(value_type = Option<String>)]
    pub decided_by: Option<UpdatedBy>,
    /// When.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub decided_at: Option<Timestamp>,
    /// What went wrong, as a sentence.
    pub problem: Option<String>,
}

// ── Planning ────────────────────────────────────────────────────────────────────────────────────────────────────

/// The figures that stand, one a product, and the rows that were refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// By product: the newest figure.
    pub chosen: Vec<(Figure, KnownProduct)>,
    /// The others.
    pub refused: Vec<Row>,
}

/// Chooses one figure for each product. `now` is the server's clock when the run was asked for.
#[must_use]
pub fn select(given: Vec<Result<Figure, Unreadable>>, catalogue: &Catalogue, now: Timestamp) -> Selection {
    let mut refused = Vec::new();
    let mut chosen: HashMap<ProductId, Contest> = HashMap::new();
    for given in given {
        let figure = match given {
            Ok(figure) => figure,
            Err(unreadable) => {
                refused.push(unreadable.refused());
                continue;
            }
        };
        match acceptable(&figure, catalogue, now) {
            Err(refusal) => refused.push(figure.refused(None, refusal)),
            Ok(product) => match chosen.get_mut(&product.product_id) {
                None => {
                    chosen.insert(product.product_id, Contest { leader: figure, product, is_tied: false });
                }
                Some(contest) => contest.enter(figure, &mut refused),
            },
        }
    }
    let mut selection = Selection { chosen: Vec::with_capacity(chosen.len()), refused };
    for Contest { leader, product, is_tied } in chosen.into_values() {
        if is_tied {
            let refusal = contradiction(&leader);
            selection.refused.push(leader.refused(Some(product), refusal));
        } else if let Some(refusal) = on_record(&leader, product) {
            selection.refused.push(leader.refused(Some(product), refusal));
        } else {
            selection.chosen.push((leader, product.clone()));
        }
    }
    selection
}

/// The figures of one product on their way to one.
struct Contest<'c> {
    leader: Figure,
    product: &'c KnownProduct,
    /// Another figure of the very same moment says something else.
    is_tied: bool,
}

impl Contest<'_> {
    fn enter(&mut self, mut figure: Figure, refused: &mut Vec<Row>) {
        match figure.counted_at.cmp(&self.leader.counted_at) {
            Ordering::Greater => {
                std::mem::swap(&mut figure, &mut self.leader);
                let refusal = if std::mem::take(&mut self.is_tied) { contradiction(&figure) } else { self.outdone() };
                refused.push(figure.refused(Some(self.product), refusal));
            }
            Ordering::Less => refused.push(figure.refused(Some(self.product), self.outdone())),
            Ordering::Equal if figure.quantity == self.leader.quantity => {
                let refusal = Refusal::new(RefusalReason::Duplicate, "the run has the same figure already");
                refused.push(figure.refused(Some(self.product), refusal));
            }
            Ordering::Equal => {
                self.is_tied = true;
                let refusal = contradiction(&figure);
                refused.push(figure.refused(Some(self.product), refusal));
            }
        }
    }

    fn outdone(&self) -> Refusal {
        let newer = self.leader.counted_at;
        Refusal::new(RefusalReason::Duplicate, format!("the run has a newer figure of the product, counted at {newer}"))
    }
}

fn contradiction(figure: &Figure) -> Refusal {
    let at = figure.counted_at;
    Refusal::new(RefusalReason::Ambiguous, format!("the run has another figure of the product, counted at {at} too"))
}

/// The product of a figure that can stand for itself.
fn acceptable<'c>(figure: &Figure, catalogue: &'c Catalogue, now: Timestamp) -> Result<&'c KnownProduct, Refusal> {
    let product = catalogue.find(figure)?;
    if figure.counted_at.get() > now.get() + MAX_COUNT_SKEW {
        let detail = format!("counted at {}, and it is {now}", figure.counted_at);
        return Err(Refusal::new(RefusalReason::CountedInFuture, detail));
    }
    if figure.counted_at < product.registered_at {
        let detail = format!(
            "counted at {}, and the product is in the catalogue since {}",
            figure.counted_at, product.registered_at
        );
        return Err(Refusal::new(RefusalReason::CountedBeforeRegistration, detail));
    }
    Ok(product)
}

/// Why the ledger's own newest count forbids this one.
fn on_record(figure: &Figure, product: &KnownProduct) -> Option<Refusal> {
    let newest = product.newest_count?;
    match newest.counted_at.cmp(&figure.counted_at) {
        Ordering::Less => None,
        Ordering::Equal if newest.quantity == figure.quantity => None,
        Ordering::Equal => Some(Refusal::new(
            RefusalReason::Ambiguous,
            format!("a count of the same moment is on record with {}; count again", newest.quantity),
        )),
        Ordering::Greater => Some(Refusal::new(
            RefusalReason::Superseded,
            format!("a newer count is on record, of {}", newest.counted_at),
        )),
    }
}

/// What a run is going to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Its rows, in the order of the source.
    pub rows: Vec<Row>,
    /// Their sums.
    pub totals: Totals,
    /// Whether it changes more products than it may without asking.
    pub needs_approval: bool,
}

/// Plans a run. `stock_at_count` tells the stock of each chosen product at its count, with the corrections stored since;
/// a product that it does not tell had none.
#[must_use]
pub fn plan(
    selection: Selection,
    stock_at_count: &HashMap<ProductId, i64>,
    catalogue_size: u64,
    threshold_percent: u32,
) -> Plan {
    let mut rows = selection.refused;
    rows.reserve(selection.chosen.len());
    for (figure, product) in selection.chosen {
        let at_count = stock_at_count.get(&product.product_id).copied().unwrap_or(0);
        rows.push(planned(&figure, &product, at_count));
    }
    rows.sort_by_key(|row| (row.source, row.position));
    for (row, number) in rows.iter_mut().zip(1..) {
        row.number = number;
    }
    let totals = Totals::of(&rows);
    let needs_approval = u128::from(totals.changed) * 100 > u128::from(threshold_percent) * u128::from(catalogue_size);
    Plan { rows, totals, needs_approval }
}

fn planned(figure: &Figure, product: &KnownProduct, stock_at_count: i64) -> Row {
    let Ok(at_count) = u32::try_from(stock_at_count) else {
        // Corrections since the count took more than there was at the count: one of the two counts is wrong.
        let detail = "corrections since the count do not agree with it; count again";
        return figure.refused(Some(product), Refusal::new(RefusalReason::Ambiguous, detail));
    };
    let recorded =
        product.newest_count.filter(|count| count.counted_at == figure.counted_at && count.quantity == figure.quantity);
    let is_applied = recorded.is_some_and(|count| count.corrected);
    let correction = if is_applied { 0 } else { i64::from(figure.quantity) - stock_at_count };
    // A count that is not on record yet is recorded even if it changes nothing: it forbids older ones.
    let result = if correction == 0 && recorded.is_some() { RowResult::Unchanged } else { RowResult::Planned };
    let target = i64::from(product.quantity) + correction;
    let after = u32::try_from(target.max(0)).unwrap_or(u32::MAX);
    if after > MAX_STOCK {
        let detail = format!("the stock would become {target}; it can be at most {MAX_STOCK}");
        return figure.refused(Some(product), Refusal::new(RefusalReason::NotAccepted, detail));
    }
    Row {
        stock_at_count: Some(at_count),
        before: Some(product.quantity),
        correction: Some(correction),
        after: Some(after),
        shortfall: u32::try_from(-target).unwrap_or(0),
        result,
        ..figure.row(Some(product))
    }
}

impl Figure {
    fn row(&self, product: Option<&KnownProduct>) -> Row {
        Row {
            number: 0,
            source: self.source,
            position: self.position,
            product_id: product.map(|product| product.product_id).or(self.product_id),
            sku: product.map(|product| &product.sku).or(self.sku.as_ref()).map(ToString::to_string),
            counted: Some(self.quantity),
            counted_at: Some(self.counted_at),
            counted_by: Some(self.counted_by),
            stock_at_count: None,
            before: None,
            correction: None,
            after: None,
            shortfall: 0,
            result: RowResult::Refused,
            refusal: None,
        }
    }

    fn refused(&self, product: Option<&KnownProduct>, refusal: Refusal) -> Row {
        Row { refusal: Some(refusal), ..self.row(product) }
    }
}

impl Unreadable {
    fn refused(self) -> Row {
        Row {
            number: 0,
            source: self.source,
            position: self.position,
            product_id: None,
            sku: self.sku,
            counted: None,
            counted_at: None,
            counted_by: None,
            stock_at_count: None,
            before: None,
            correction: None,
            after: None,
            shortfall: 0,
            result: RowResult::Refused,
            refusal: Some(Refusal::new(RefusalReason::Unreadable, self.problem)),
        }
    }
}

#[cfg(test)]
#[path = "reconciliation_tests.rs"]
mod tests;
