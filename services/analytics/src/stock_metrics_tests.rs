//! The fold by tables and by properties: what counts as what, totals that equal arithmetic, cuts that do not matter.

use lomash_contract::{EventId, FailedItem, Timestamp, UpdatedBy};
use proptest::prelude::*;
use time::macros::{date, datetime};
use uuid::Uuid;

use super::*;

const KITCHEN: u128 = 1;
const BEDROOM: u128 = 2;

fn product(number: u128) -> ProductId {
    ProductId(Uuid::from_u128(number))
}

fn details(number: u128) -> ProductDetails {
    ProductDetails {
        product_id: product(number),
        sku: format!("KIT-{number}").parse().expect("a sku"),
        name: "Oak".into(),
        category: None,
        low_stock_threshold: None,
        active: true,
    }
}

fn updated(number: u128, (previous, new): (u32, u32), trigger: Trigger, order: Option<u128>) -> LedgerEvent {
    LedgerEvent::InventoryUpdated(InventoryUpdated {
        product_id: product(number),
        sku: format!("KIT-{number}").parse().expect("a sku"),
        previous_quantity: previous,
        new_quantity: new,
        trigger,
        order_id: order.map(|order| OrderId(Uuid::from_u128(order))),
        updated_by: UpdatedBy::System,
    })
}

fn refused(order: u128, reason: FailureReason, items: &[(u128, u32)]) -> LedgerEvent {
    let item = |&(number, requested): &(u128, u32)| FailedItem {
        product_id: product(number),
        sku: None,
        requested,
        available: 0,
    };
    let (order_id, items) = (OrderId(Uuid::from_u128(order)), items.iter().map(item).collect());
    LedgerEvent::InventoryUpdateFailed(InventoryUpdateFailed { order_id, reason, items })
}

fn registered(number: u128) -> LedgerEvent {
    LedgerEvent::ProductRegistered(ProductRegistered(details(number)))
}

fn parsed(sequence: u64, event: LedgerEvent) -> Parsed {
    // The producer's clock, which must not matter.
    let clock = Timestamp::new(datetime!(1999-01-01 0:00 UTC) - Duration::days(sequence.cast_signed()));
    let any = ProductRegistered(details(KITCHEN));
    Ok(Envelope::new(EventId(Uuid::from_u128(sequence.into())), clock, any).map(|_| event))
}

trait Fold {
    fn add(&mut self, at: OffsetDateTime, event: LedgerEvent) -> Folded;
}

impl Fold for StockMetrics {
    fn add(&mut self, at: OffsetDateTime, event: LedgerEvent) -> Folded {
        let sequence = self.position.sequence + 1;
        self.fold(sequence, at, parsed(sequence, event))
    }
}

fn on(metrics: &StockMetrics, number: u128, day: Date) -> ProductDay {
    let rows = metrics.product_days.iter().filter(|((id, of), _)| *id == product(number) && *of <= day);
    let ((_, of), row) = rows.max_by_key(|((_, of), _)| *of).expect("a product that joined");
    if *of == day { row.row.clone() } else { row.row.carried_to(day) }
}

/// A kitchen with ten units since the first of March.
fn stocked() -> StockMetrics {
    let mut metrics = StockMetrics::default();
    let at = datetime!(2026-03-01 9:00 UTC);
    metrics.add(at, registered(KITCHEN));
    metrics.add(at, updated(KITCHEN, (0, 10), Trigger::AdminUpdate, None));
    metrics
}

const MONDAY: Date = date!(2026 - 03 - 02);

#[test]
fn each_event_counts_as_what_it_is() {
    type Row = (&'static str, LedgerEvent, ProductDay);
    let day = || ProductDay { closing_quantity: 10, ..ProductDay::default() };
    let table: Vec<Row> = vec![
        (
            "a sale",
            updated(KITCHEN, (10, 7), Trigger::OrderConfirmed, Some(50)),
            ProductDay { units_sold: 3, orders_allocated: 1, closing_quantity: 7, ..day() },
        ),
        (
            "an admin adds",
            updated(KITCHEN, (10, 12), Trigger::AdminUpdate, None),
            ProductDay { adjusted: Changes { count: 1, up: 2, down: 0 }, closing_quantity: 12, ..day() },
        ),
        (
            "an admin takes",
            updated(KITCHEN, (10, 4), Trigger::AdminUpdate, None),
            ProductDay { adjusted: Changes { count: 1, up: 0, down: 6 }, closing_quantity: 4, ..day() },
        ),
        (
            "a correction",
            updated(KITCHEN, (10, 11), Trigger::ScheduledSync, None),
            ProductDay { corrected: Changes { count: 1, up: 1, down: 0 }, closing_quantity: 11, ..day() },
        ),
        (
            "short stock",
            refused(60, FailureReason::InsufficientStock, &[(KITCHEN, 40)]),
            ProductDay {
                orders_refused: 1,
                units_refused: ByReason { insufficient_stock: 40, ..ByReason::default() },
                ..day()
            },
        ),
        (
            "an inactive product",
            refused(60, FailureReason::ProductInactive, &[(KITCHEN, 2)]),
            ProductDay {
                orders_refused: 1,
                units_refused: ByReason { product_inactive: 2, ..ByReason::default() },
                ..day()
            },
        ),
        ("an unknown product", refused(60, FailureReason::UnknownProduct, &[(99, 5)]), ProductDay::default()),
        (
            "a known one that is said to be unknown",
            refused(60, FailureReason::UnknownProduct, &[(KITCHEN, 5)]),
            ProductDay::default(),
        ),
    ];
    for (what, event, expected) in table {
        let mut metrics = stocked();
        assert_eq!(metrics.add(datetime!(2026-03-02 12:00 UTC), event), Folded::Taken, "{what}");
        let found = metrics.product_days.get(&(product(KITCHEN), MONDAY)).map(|day| day.row.clone());
        assert_eq!(found.unwrap_or_default(), expected, "{what}");
        assert!(!metrics.product_days.contains_key(&(product(99), MONDAY)), "{what}: no row for an invented id");
    }
}

#[test]
fn what_is_not_ours_is_counted_and_changes_nothing() {
    let foreign: Vec<(&str, LedgerEvent)> = vec![
        ("a broken chain", updated(KITCHEN, (9, 7), Trigger::OrderConfirmed, Some(50))),
        ("no change", updated(KITCHEN, (10, 10), Trigger::AdminUpdate, None)),
        ("an unknown product", updated(BEDROOM, (0, 1), Trigger::AdminUpdate, None)),
        ("registered twice", registered(KITCHEN)),
    ];
    for (what, event) in foreign {
        let mut metrics = stocked();
        let before = metrics.clone();
        assert!(matches!(metrics.add(datetime!(2026-03-02 12:00 UTC), event), Folded::Skipped(_)), "{what}");
        assert_eq!(metrics.position.skipped, 1, "{what}");
        assert_eq!(metrics.position.totals, before.position.totals, "{what}");
        assert_eq!((metrics.products, metrics.product_days), (before.products, before.product_days), "{what}");
    }
}

#[test]
fn an_order_is_one_however_many_lines_it_has() {
    let mut metrics = stocked();
    let at = datetime!(2026-03-02 12:00 UTC);
    metrics.add(at, registered(BEDROOM));
    metrics.add(at, updated(BEDROOM, (0, 5), Trigger::AdminUpdate, None));
    metrics.add(at, updated(KITCHEN, (10, 9), Trigger::OrderConfirmed, Some(50)));
    metrics.add(at, updated(BEDROOM, (5, 4), Trigger::OrderConfirmed, Some(50)));
    metrics.add(at, updated(KITCHEN, (9, 8), Trigger::OrderConfirmed, Some(51)));
    let day = &metrics.days[&MONDAY].row;
    assert_eq!((day.orders_allocated, day.units_sold), (2, 3));
    assert_eq!(on(&metrics, KITCHEN, MONDAY).orders_allocated, 2);
    assert_eq!(on(&metrics, BEDROOM, MONDAY).orders_allocated, 1);
}

#[test]
fn time_without_stock_belongs_to_the_days_in_which_it_lies() {
    let mut metrics = stocked();
    metrics.add(datetime!(2026-03-02 18:00 UTC), updated(KITCHEN, (10, 0), Trigger::OrderConfirmed, Some(50)));
    // Somebody asks on the second day of it: a row, and no change of stock.
    metrics.add(datetime!(2026-03-03 8:00 UTC), refused(51, FailureReason::InsufficientStock, &[(KITCHEN, 1)]));
    let hours = |day: Date, now: OffsetDateTime| on(&metrics, KITCHEN, day).out_of_stock(day, now).whole_hours();
    let later = datetime!(2026-03-05 6:00 UTC);
    assert_eq!(hours(date!(2026 - 03 - 02), later), 6);
    assert_eq!(hours(date!(2026 - 03 - 03), later), 24);
    assert_eq!(hours(date!(2026 - 03 - 04), later), 24, "a day on which nothing happened");
    assert_eq!(hours(date!(2026 - 03 - 05), later), 6, "up to now");
    assert_eq!(hours(date!(2026 - 03 - 05), datetime!(2026-03-04 23:00 UTC)), 0, "a day to come");

    metrics.add(datetime!(2026-03-05 9:00 UTC), updated(KITCHEN, (0, 5), Trigger::AdminUpdate, None));
    metrics.add(datetime!(2026-03-05 12:00 UTC), updated(KITCHEN, (5, 0), Trigger::OrderConfirmed, Some(52)));
    metrics.add(datetime!(2026-03-05 13:00 UTC), updated(KITCHEN, (0, 1), Trigger::AdminUpdate, None));
    let row = on(&metrics, KITCHEN, date!(2026 - 03 - 05));
    let now = datetime!(2026-03-07 0:00 UTC);
    assert_eq!(row.out_of_stock(date!(2026 - 03 - 05), now).whole_hours(), 9 + 1);
    assert_eq!((row.stock_outs, row.closing_quantity), (1, 1));
    assert_eq!(on(&metrics, KITCHEN, date!(2026 - 03 - 06)).out_of_stock(date!(2026 - 03 - 06), now).whole_hours(), 0);
    assert_eq!(metrics.products[&product(KITCHEN)].row.out_of_stock_since, None);
}

#[test]
fn a_product_that_joins_without_stock_is_out_of_it_and_had_no_stock_out() {
    let mut metrics = StockMetrics::default();
    metrics.add(datetime!(2026-03-02 12:00 UTC), registered(KITCHEN));
    let row = on(&metrics, KITCHEN, MONDAY);
    assert_eq!(row.stock_outs, 0);
    assert_eq!(row.out_of_stock(MONDAY, datetime!(2026-03-02 15:00 UTC)).whole_hours(), 3);
}

#[test]
fn the_totals_follow_stock_threshold_and_activity() {
    let mut metrics = stocked();
    let totals = |metrics: &StockMetrics| {
        let Totals { products, active_products, out_of_stock_products, low_stock_products, units_in_stock } =
            metrics.position.totals;
        [products, active_products, out_of_stock_products, low_stock_products, units_in_stock]
    };
    let at = datetime!(2026-03-02 12:00 UTC);
    assert_eq!(totals(&metrics), [1, 1, 0, 0, 10]);
    metrics.add(at, updated(KITCHEN, (10, 3), Trigger::OrderConfirmed, Some(50)));
    assert_eq!(totals(&metrics), [1, 1, 0, 1, 3]);
    metrics.add(at, updated(KITCHEN, (3, 0), Trigger::OrderConfirmed, Some(51)));
    assert_eq!(totals(&metrics), [1, 1, 1, 1, 0]);
    let inactive = ProductDetails { active: false, ..details(KITCHEN) };
    metrics.add(at, LedgerEvent::ProductRevised(ProductRevised(inactive)));
    assert_eq!(totals(&metrics), [1, 0, 0, 0, 0]);
    let eager = ProductDetails { low_stock_threshold: Some(0), ..details(KITCHEN) };
    metrics.add(at, LedgerEvent::ProductRevised(ProductRevised(eager)));
    metrics.add(at, updated(KITCHEN, (0, 1), Trigger::AdminUpdate, None));
    assert_eq!(totals(&metrics), [1, 1, 0, 0, 1]);
}

#[test]
fn velocity_counts_days_without_sales_and_cover_is_none_when_nothing_sells() {
    let velocity = Velocity { units: 14, days: 28 };
    assert!((velocity.units_per_day() - 0.5).abs() < 1e-9);
    assert_eq!(velocity.days_of_cover(3), Some(6.0));
    assert_eq!(velocity.days_of_cover(0), Some(0.0));
    assert_eq!(Velocity { units: 0, days: 28 }.days_of_cover(3), None);
    assert_eq!(Velocity { units: -2, days: 28 }.days_of_cover(3), None, "more came back than went");
}

#[test]
fn a_clock_that_goes_back_does_not_take_the_day_with_it() {
    let mut metrics = stocked();
    metrics.add(datetime!(2026-03-02 0:10 UTC), updated(KITCHEN, (10, 0), Trigger::OrderConfirmed, Some(50)));
    metrics.add(datetime!(2026-03-01 23:50 UTC), updated(KITCHEN, (0, 4), Trigger::AdminUpdate, None));
    let row = on(&metrics, KITCHEN, MONDAY);
    assert_eq!((row.units_sold, row.adjusted.up, row.out_of_stock_us), (10, 4, 0));
    assert_eq!(metrics.position.clock, datetime!(2026-03-02 0:10 UTC));
}

#[test]
#[should_panic(expected = "without a gap")]
fn a_gap_is_not_folded_over() {
    let mut metrics = stocked();
    let at = datetime!(2026-03-02 0:10 UTC);
    metrics.fold(4, at, parsed(4, updated(KITCHEN, (10, 9), Trigger::OrderConfirmed, Some(50))));
}

// ── Properties ──────────────────────────────────────────────────────────────────────────────────────────────────

/// Something that may happen to one of four products.
#[derive(Clone, Debug)]
enum Happening {
    Sold { product: u8, units: u32, order: u8 },
    Set { product: u8, quantity: u32 },
    Corrected { product: u8, quantity: u32 },
    Refused { product: u8, units: u32, reason: u8 },
    Revised { product: u8, active: bool, threshold: Option<u32> },
    Forged { product: u8, quantity: u32 },
}

fn happening() -> impl Strategy<Value = Happening> {
    let product = 0_u8..4;
    prop_oneof![
        4 => (product.clone(), 1_u32..6, 0_u8..200)
            .prop_map(|(product, units, order)| Happening::Sold { product, units, order }),
        2 => (product.clone(), 0_u32..8).prop_map(|(product, quantity)| Happening::Set { product, quantity }),
        1 => (product.clone(), 0_u32..8).prop_map(|(product, quantity)| Happening::Corrected { product, quantity }),
        1 => (product.clone(), 1_u32..9, 0_u8..3)
            .prop_map(|(product, units, reason)| Happening::Refused { product, units, reason }),
        1 => (product.clone(), any::<bool>(), prop::option::of(0_u32..8))
            .prop_map(|(product, active, threshold)| Happening::Revised { product, active, threshold }),
        1 => (product, 0_u32..8).prop_map(|(product, quantity)| Happening::Forged { product, quantity }),
    ]
}

/// A stream of events that is written as ours is, with what is not ours among it, and its store times.
fn stream() -> impl Strategy<Value = Vec<(OffsetDateTime, LedgerEvent)>> {
    // Microseconds, hours and days, so that intervals lie within days, over midnights and over whole days.
    let step = prop_oneof![0_i64..5_000_000, 0_i64..7_200_000_000, 0_i64..260_000_000_000];
    prop::collection::vec((step, happening()), 0..60).prop_map(|happenings| {
        let mut at = datetime!(2026-02-27 22:00 UTC);
        let mut stock = [0_u32; 4];
        let mut events = Vec::new();
        for number in 0..4_u8 {
            events.push((at, registered(number.into())));
        }
        for (step, happening) in happenings {
            at += Duration::microseconds(step);
            let mut change = |product: u8, new: fn(u32, u32) -> u32, by: u32, trigger, order| {
                let stock = &mut stock[usize::from(product)];
                let previous = std::mem::replace(stock, new(*stock, by));
                (previous != *stock).then(|| updated(product.into(), (previous, *stock), trigger, order))
            };
            let set: fn(u32, u32) -> u32 = |_, quantity| quantity;
            let event = match happening {
                Happening::Sold { product, units, order } => {
                    let order = Some(1_000 + u128::from(order));
                    change(product, u32::saturating_sub, units, Trigger::OrderConfirmed, order)
                }
                Happening::Set { product, quantity } => change(product, set, quantity, Trigger::AdminUpdate, None),
                Happening::Corrected { product, quantity } => {
                    change(product, set, quantity, Trigger::ScheduledSync, None)
                }
                Happening::Refused { product, units, reason } => {
                    let reason = [
                        FailureReason::InsufficientStock,
                        FailureReason::ProductInactive,
                        FailureReason::UnknownProduct,
                    ][usize::from(reason)];
                    Some(refused(9_000, reason, &[(product.into(), units)]))
                }
                Happening::Revised { product, active, threshold } => {
                    let details = ProductDetails { active, low_stock_threshold: threshold, ..details(product.into()) };
                    Some(LedgerEvent::ProductRevised(ProductRevised(details)))
                }
                Happening::Forged { product, quantity } => {
                    let had = stock[usize::from(product)];
                    Some(updated(product.into(), (had + 1, quantity), Trigger::AdminUpdate, None))
                }
            };
            events.extend(event.map(|event| (at, event)));
        }
        events
    })
}

fn folded(events: &[(OffsetDateTime, LedgerEvent)]) -> StockMetrics {
    let mut metrics = StockMetrics::default();
    for (at, event) in events {
        metrics.add(*at, event.clone());
    }
    metrics
}

/// What the tables would give back: rows without the marks of what changed.
fn stored(metrics: StockMetrics) -> StockMetrics {
    let StockMetrics { position, products, product_days, days } = metrics;
    StockMetrics {
        position,
        products: products.into_iter().map(|(key, tracked)| (key, Tracked::stored(tracked.row))).collect(),
        product_days: product_days.into_iter().map(|(key, tracked)| (key, Tracked::stored(tracked.row))).collect(),
        days: days.into_iter().map(|(key, tracked)| (key, Tracked::stored(tracked.row))).collect(),
    }
}

proptest! {
    /// Cut anywhere, and loading only the rows that [`touched`] names, as the projection does.
    #[test]
    fn folding_in_two_parts_is_folding_the_whole(events in stream(), cut in 0_usize..64) {
        let whole = stored(folded(&events));
        let (first, second) = events.split_at(cut.min(events.len()));
        let tables = stored(folded(first));
        let mut needed = std::collections::BTreeSet::new();
        for (_, event) in second {
            needed.extend(touched(&parsed(1, event.clone())));
        }
        let mut metrics = StockMetrics {
            position: tables.position.clone(),
            products: tables.products.clone().into_iter().filter(|(key, _)| needed.contains(key)).collect(),
            product_days:
                tables.product_days.clone().into_iter().filter(|((key, _), _)| needed.contains(key)).collect(),
            days: tables.days.clone(),
        };
        for (at, event) in second {
            metrics.add(*at, event.clone());
        }
        // Only what is marked as changed is written.
        let mut written = tables;
        written.position = metrics.position;
        written.products.extend(metrics.products.into_iter().filter(|(_, row)| row.changed));
        written.product_days.extend(metrics.product_days.into_iter().filter(|(_, row)| row.changed));
        written.days.extend(metrics.days.into_iter().filter(|(_, row)| row.changed));
        prop_assert_eq!(stored(written), whole);
    }

    #[test]
    fn the_same_events_again_change_nothing(events in stream(), from in 0_usize..64) {
        let mut metrics = folded(&events);
        let before = metrics.clone();
        for (index, (at, event)) in events.iter().enumerate().skip(from) {
            let sequence = index as u64 + 1;
            prop_assert_eq!(metrics.fold(sequence, *at, parsed(sequence, event.clone())), Folded::Known);
        }
        prop_assert_eq!(metrics, before);
    }

    #[test]
    fn totals_equal_arithmetic(events in stream()) {
        let metrics = folded(&events);
        for number in 0..4_u128 {
            let mut rows: Vec<_> =
                metrics.product_days.iter().filter(|((id, _), _)| *id == product(number)).collect();
            rows.sort_by_key(|((_, day), _)| *day);
            let mut stock = 0;
            for (_, Tracked { row, .. }) in &rows {
                stock += row.adjusted.up - row.adjusted.down + row.corrected.up - row.corrected.down - row.units_sold;
                prop_assert_eq!(stock, i64::from(row.closing_quantity));
            }
            prop_assert_eq!(stock, i64::from(metrics.products[&product(number)].row.quantity));
        }
        let sum = |of: fn(&ProductDay) -> i64| metrics.product_days.values().map(|day| of(&day.row)).sum::<i64>();
        let total = |of: fn(&Day) -> i64| metrics.days.values().map(|day| of(&day.row)).sum::<i64>();
        prop_assert_eq!(sum(|day| day.units_sold), total(|day| day.units_sold));
        prop_assert_eq!(sum(|day| day.stock_outs), total(|day| day.stock_outs));
        prop_assert_eq!(sum(|day| day.adjusted.up), total(|day| day.adjusted.up));
        prop_assert_eq!(sum(|day| day.corrected.down), total(|day| day.corrected.down));
        prop_assert_eq!(
            sum(|day| day.units_refused.insufficient_stock),
            total(|day| day.units_refused.insufficient_stock)
        );
        let mut totals = Totals::default();
        for product in metrics.products.values() {
            totals.add(Totals::of(&product.row), 1);
        }
        prop_assert_eq!(metrics.position.totals, totals);
        let counted = total(|day| day.events) + i64::try_from(metrics.position.skipped).expect("few");
        prop_assert_eq!(counted, i64::try_from(events.len()).expect("few"));
    }

    /// Over all days together it is the time between the events, as one walks along them.
    #[test]
    fn time_without_stock_adds_up_over_days(events in stream(), after in 0_i64..200_000_000_000) {
        let metrics = folded(&events);
        let now = metrics.position.clock + Duration::microseconds(after);
        for number in 0..4_u128 {
            let mut expected = Duration::ZERO;
            let mut stock = 0_u32;
            let mut since = events.first().map(|(at, _)| *at);
            for (at, event) in &events {
                let LedgerEvent::InventoryUpdated(updated) = event else { continue };
                if updated.product_id != product(number) || updated.previous_quantity != stock {
                    continue;
                }
                stock = updated.new_quantity;
                match (stock, since) {
                    (0, None) => since = Some(*at),
                    (1.., Some(began)) => {
                        expected += *at - began;
                        since = None;
                    }
                    _ => {}
                }
            }
            expected += since.map_or(Duration::ZERO, |began| now - began);
            let mut found = Duration::ZERO;
            let mut day = day_of(events[0].0);
            while day <= day_of(now) {
                let of_day = on(&metrics, number, day).out_of_stock(day, now);
                prop_assert!(of_day <= Duration::DAY, "{of_day}");
                found += of_day;
                day = day.next_day().expect("not the last of days");
            }
            prop_assert_eq!(found, expected);
        }
    }
}
