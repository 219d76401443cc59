//! Given figures and a catalogue, then these rows: one line per outcome, and the laws that hold for all.

use proptest::prelude::*;
use time::OffsetDateTime;

use super::*;

fn id(n: u128) -> ProductId {
    ProductId(Uuid::from_u128(n))
}

fn sku(n: u128) -> Sku {
    format!("SKU-{n}").parse().expect("a valid sku")
}

/// The instant `minute` minutes after the beginning of the tests' day.
fn at(minute: i64) -> Timestamp {
    Timestamp::new(OffsetDateTime::UNIX_EPOCH + time::Duration::minutes(minute))
}

/// When the runs of these tests are asked for.
fn now() -> Timestamp {
    at(600)
}

fn known(n: u128, quantity: u32) -> KnownProduct {
    KnownProduct { product_id: id(n), sku: sku(n), quantity, registered_at: at(0), newest_count: None }
}

fn counted(n: u128, quantity: u32, minute: i64) -> KnownProduct {
    let newest_count = Some(RecordedCount { quantity, counted_at: at(minute), corrected: false });
    KnownProduct { newest_count, ..known(n, 50) }
}

fn figure(n: u128, quantity: u32, minute: i64) -> Figure {
    Figure {
        source: Source::Warehouse,
        position: 1,
        sku: None,
        product_id: Some(id(n)),
        quantity,
        counted_at: at(minute),
        counted_by: CountedBy::Warehouse,
    }
}

/// The plan for these figures, placed in this order, when the products had these stocks at their counts.
fn planned_for(figures: Vec<Figure>, known: Vec<KnownProduct>, stocks: &[(u128, i64)]) -> Plan {
    let figures = figures.into_iter().zip(1..).map(|(figure, position)| Ok(Figure { position, ..figure }));
    let catalogue = Catalogue::new(100, known);
    let selection = select(figures.collect(), &catalogue, now());
    let stocks = stocks.iter().map(|(n, stock)| (id(*n), *stock)).collect();
    plan(selection, &stocks, catalogue.size(), DEFAULT_APPROVAL_THRESHOLD_PERCENT)
}

/// The one row of a plan for one figure.
fn row_for(figure: Figure, known: KnownProduct, stock_at_count: i64) -> Row {
    let n = known.product_id.0.as_u128();
    let mut plan = planned_for(vec![figure], vec![known], &[(n, stock_at_count)]);
    assert_eq!(plan.rows.len(), 1);
    plan.rows.remove(0)
}

fn reason(row: &Row) -> Option<RefusalReason> {
    assert_eq!(row.refusal.is_some(), row.result == RowResult::Refused, "{row:?}");
    row.refusal.as_ref().map(|refusal| refusal.reason)
}

#[test]
fn a_count_corrects_the_moment_it_was_taken_and_what_was_sold_since_stays_sold() {
    // Counted 40 when the ledger said 50; 20 were sold since, so 30 are left in the ledger and 20 on the shelf.
    let row = row_for(figure(1, 40, 500), known(1, 30), 50);
    assert_eq!((row.before, row.correction, row.after, row.shortfall), (Some(30), Some(-10), Some(20), 0));
    assert_eq!((row.stock_at_count, row.counted, row.result), (Some(50), Some(40), RowResult::Planned));
}

#[test]
fn what_is_missing_beyond_today_s_stock_is_a_shortfall() {
    let row = row_for(figure(1, 0, 500), known(1, 4), 10);
    assert_eq!((row.before, row.correction, row.after, row.shortfall), (Some(4), Some(-10), Some(0), 6));
}

#[test]
fn a_count_on_record_that_says_what_the_ledger_says_needs_no_command() {
    let on_record = counted(1, 40, 500);
    assert_eq!(row_for(figure(1, 40, 500), on_record, 40).result, RowResult::Unchanged);
    assert_eq!(row_for(figure(1, 40, 500), known(1, 50), 40).result, RowResult::Planned, "a new one is put on record");
}

#[test]
fn a_count_that_corrected_already_corrects_nothing_more() {
    let newest_count = Some(RecordedCount { quantity: 40, counted_at: at(500), corrected: true });
    // Its shortfall left a difference behind, which is not to be taken from what has come in since.
    let row = row_for(figure(1, 40, 500), KnownProduct { newest_count, ..known(1, 7) }, 45);
    assert_eq!((row.correction, row.after, row.result), (Some(0), Some(7), RowResult::Unchanged));
}

#[test]
fn refusals() {
    use RefusalReason::*;
    let seconds_ahead = |seconds| Figure {
        counted_at: Timestamp::new(now().get() + std::time::Duration::from_secs(seconds)),
        ..figure(1, 5, 0)
    };
    let by_sku = |n| Figure { product_id: None, sku: Some(sku(n)), ..figure(n, 5, 500) };
    let same_sku = |n| KnownProduct { sku: sku(1), ..known(n, 5) };
    let late = KnownProduct { registered_at: at(550), ..known(1, 5) };
    type Case = (&'static str, Figure, Vec<KnownProduct>, i64, Option<RefusalReason>);
    let cases: Vec<Case> = vec![
        ("known by id", figure(1, 5, 500), vec![known(1, 5)], 5, None),
        ("known by sku", by_sku(1), vec![known(1, 5)], 5, None),
        ("known by both", Figure { sku: Some(sku(1)), ..figure(1, 5, 500) }, vec![known(1, 5)], 5, None),
        ("unknown id", figure(2, 5, 500), vec![known(1, 5)], 5, Some(UnknownProduct)),
        ("unknown sku", by_sku(2), vec![known(1, 5)], 5, Some(UnknownProduct)),
        (
            "named by nothing",
            Figure { product_id: None, ..figure(1, 5, 500) },
            vec![known(1, 5)],
            5,
            Some(UnknownProduct),
        ),
        (
            "id and sku differ",
            Figure { sku: Some(sku(2)), ..figure(1, 5, 500) },
            vec![known(1, 5), known(2, 5)],
            5,
            Some(Ambiguous),
        ),
        ("sku of two", by_sku(1), vec![same_sku(1), same_sku(2)], 5, Some(Ambiguous)),
        ("just within the skew", seconds_ahead(MAX_COUNT_SKEW.as_secs()), vec![known(1, 5)], 5, None),
        ("in the future", seconds_ahead(MAX_COUNT_SKEW.as_secs() + 1), vec![known(1, 5)], 5, Some(CountedInFuture)),
        ("before registration", figure(1, 5, 500), vec![late], 5, Some(CountedBeforeRegistration)),
        ("newer on record", figure(1, 5, 500), vec![counted(1, 6, 501)], 5, Some(Superseded)),
        ("older on record", figure(1, 5, 500), vec![counted(1, 6, 499)], 5, None),
        ("same moment on record, other figure", figure(1, 5, 500), vec![counted(1, 6, 500)], 5, Some(Ambiguous)),
        ("corrections that contradict it", figure(1, 5, 500), vec![known(1, 5)], -1, Some(Ambiguous)),
        ("more than there can be", figure(1, MAX_STOCK, 500), vec![known(1, 5)], 4, Some(NotAccepted)),
    ];
    for (case, figure, known, stock_at_count, expected) in cases {
        let stocks: Vec<_> = known.iter().map(|product| (product.product_id.0.as_u128(), stock_at_count)).collect();
        let plan = planned_for(vec![figure], known, &stocks);
        assert_eq!(plan.rows.iter().map(reason).collect::<Vec<_>>(), [expected], "{case}");
    }
}

#[test]
fn of_several_figures_of_a_product_the_newest_stands() {
    let reasons = |figures: Vec<Figure>| -> Vec<Option<RefusalReason>> {
        planned_for(figures, vec![known(1, 50)], &[(1, 50)]).rows.iter().map(reason).collect()
    };
    let duplicate = Some(RefusalReason::Duplicate);
    let ambiguous = Some(RefusalReason::Ambiguous);
    assert_eq!(reasons(vec![figure(1, 5, 500), figure(1, 6, 501)]), [duplicate, None]);
    assert_eq!(reasons(vec![figure(1, 6, 501), figure(1, 5, 500)]), [None, duplicate]);
    assert_eq!(reasons(vec![figure(1, 5, 500), figure(1, 5, 500)]), [None, duplicate], "the same again");
    assert_eq!(reasons(vec![figure(1, 5, 500), figure(1, 6, 500)]), [ambiguous, ambiguous], "which one?");
    assert_eq!(
        reasons(vec![figure(1, 5, 500), figure(1, 6, 500), figure(1, 7, 501)]),
        [ambiguous, ambiguous, None],
        "a newer one settles it"
    );
}

#[test]
fn unreadable_rows_keep_their_place() {
    let unreadable = Unreadable {
        source: Source::Warehouse,
        position: 2,
        sku: Some("SKU-9".to_owned()),
        problem: "the quantity is missing".to_owned(),
    };
    let figures = vec![Err(unreadable), Ok(Figure { position: 3, ..figure(1, 5, 500) }), Ok(figure(2, 5, 500))];
    let selection = select(figures, &Catalogue::new(2, [known(1, 5), known(2, 5)]), now());
    let plan = plan(selection, &HashMap::from([(id(1), 5), (id(2), 5)]), 2, 20);
    let places: Vec<_> = plan.rows.iter().map(|row| (row.number, row.position, reason(row))).collect();
    assert_eq!(places, [(1, 1, None), (2, 2, Some(RefusalReason::Unreadable)), (3, 3, None)]);
    assert_eq!((plan.totals.counted, plan.totals.refused), (2, 1));
}

#[test]
fn approval_is_needed_above_the_threshold_and_not_at_it() {
    let needs_approval = |changed: u128, of: u64, percent| {
        let products: Vec<_> = (1..=changed).map(|n| known(n, 10)).collect();
        let figures = (1..=changed).map(|n| Ok(Figure { position: n as u64, ..figure(n, 9, 500) })).collect();
        let stocks = (1..=changed).map(|n| (id(n), 10)).collect();
        plan(select(figures, &Catalogue::new(of, products), now()), &stocks, of, percent).needs_approval
    };
    assert!(!needs_approval(20, 100, 20));
    assert!(needs_approval(21, 100, 20));
    assert!(!needs_approval(0, 0, 0), "nothing to change needs nobody");
    assert!(needs_approval(1, 100, 0));
    assert!(!needs_approval(3, 3, 100));
}

#[test]
fn totals_add_up() {
    let figures = vec![figure(1, 15, 500), figure(2, 8, 500), figure(3, 0, 500), figure(4, 7, 500), figure(9, 1, 500)];
    let products = vec![known(1, 10), known(2, 10), known(3, 4), known(4, 7)];
    let plan = planned_for(figures, products, &[(1, 10), (2, 10), (3, 9), (4, 7)]);
    let expected =
        Totals { counted: 4, changed: 3, unchanged: 1, refused: 1, units_up: 5, units_down: 6, shortfall: 5 };
    assert_eq!(plan.totals, expected);
}

// ── Laws ────────────────────────────────────────────────────────────────────────────────────────────────────────

/// What happens to one product, minute by minute, in the ledger and on the shelf.
#[derive(Clone, Debug)]
enum Happening {
    /// Bought or delivered: both know.
    Movement(i64),
    /// Stolen, broken or found: only the shelf knows.
    Drift(i64),
    /// Somebody counts the shelf; the figure waits.
    Count,
    /// The newest waiting figure is reconciled, and older ones have lost.
    Reconcile,
    /// The last figure that was reconciled comes again.
    Again,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        4 => (-20_i64..20).prop_map(Happening::Movement),
        2 => (-20_i64..20).prop_map(Happening::Drift),
        3 => Just(Happening::Count),
        2 => Just(Happening::Reconcile),
        1 => Just(Happening::Again),
    ]
}

/// The ledger's side: its changes of stock by minute, and which of them were corrections.
#[derive(Default)]
struct History(Vec<(i64, i64, bool)>);

impl History {
    fn stock(&self) -> i64 {
        self.0.iter().map(|(_, delta, _)| delta).sum()
    }

    /// By the definition at the top of the file.
    fn stock_at_count(&self, minute: i64) -> i64 {
        self.0.iter().filter(|(at, _, is_correction)| *at <= minute || *is_correction).map(|(_, delta, _)| delta).sum()
    }
}

proptest! {
    /// Counts may wait while orders, losses, other counts and corrections go on: once one is reconciled, the ledger
    /// differs from the shelf by no more than what went wrong after that count.
    #[test]
    fn the_ledger_follows_the_shelf(happenings in proptest::collection::vec(happening(), 1..60)) {
        let mut history = History(vec![(0, 10_000, false)]);
        let mut shelf = 10_000_i64;
        // Minute, figure, and the drift up to then.
        let mut waiting: Option<(i64, u32, i64)> = None;
        let mut last: Option<(i64, u32, i64)> = None;
        let mut drift = 0;
        for (happening, minute) in happenings.iter().zip(1_i64..) {
            match happening {
                Happening::Movement(delta) => {
                    history.0.push((minute, *delta, false));
                    shelf += delta;
                }
                Happening::Drift(delta) => {
                    shelf += delta;
                    drift += delta;
                }
                Happening::Count => waiting = Some((minute, u32::try_from(shelf).expect("not negative"), drift)),
                Happening::Reconcile | Happening::Again => {
                    let is_again = matches!(happening, Happening::Again);
                    let Some((counted_at, quantity, drift_then)) = (if is_again { last } else { waiting.take() }) else {
                        continue;
                    };
                    let stock = history.stock();
                    let newest_count = last.map(|(minute, quantity, _)| RecordedCount {
                        quantity,
                        counted_at: at(minute),
                        corrected: false,
                    });
                    let product = KnownProduct { newest_count, ..known(1, u32::try_from(stock).expect("not negative")) };
                    let row = row_for(figure(1, quantity, counted_at), product, history.stock_at_count(counted_at));
                    let correction = row.correction.expect("an accepted figure");
                    prop_assert!(!is_again || correction == 0, "{row:?}");
                    history.0.push((minute, correction, true));
                    last = Some((counted_at, quantity, drift_then));
                    prop_assert_eq!(shelf - history.stock(), drift - drift_then);
                }
            }
        }
    }

    /// Never below zero, and what is missing is told; totals are those of the rows; numbers go up from 1.
    #[test]
    fn rows_are_sound(
        given in proptest::collection::vec((0_u128..6, 0_u32..40, 400_i64..620), 0..30),
        stocks in proptest::collection::vec((0_u32..40, 0_i64..40), 5),
    ) {
        let products: Vec<_> = stocks.iter().zip(1..).map(|((stock, _), n)| known(n, *stock)).collect();
        let at_count: Vec<_> = stocks.iter().zip(1..).map(|((_, at_count), n)| (n, *at_count)).collect();
        let figures = given.iter().map(|(n, quantity, minute)| figure(*n, *quantity, *minute)).collect();
        let plan = planned_for(figures, products, &at_count);
        prop_assert_eq!(plan.rows.len(), given.len(), "every row is answered");
        prop_assert_eq!(plan.totals, Totals::of(&plan.rows));
        let mut seen = std::collections::HashSet::new();
        for (row, number) in plan.rows.iter().zip(1..) {
            prop_assert_eq!(row.number, number);
            if let Some(correction) = row.correction {
                let target = i64::from(row.before.unwrap_or(0)) + correction;
                prop_assert_eq!(i64::from(row.after.unwrap_or(0)) - i64::from(row.shortfall), target);
                prop_assert!(seen.insert(row.product_id), "one figure a product");
            }
        }
    }
}
