//! The fold's state as rows of `sql/analytics/`: loaded before events are folded over them, written after.
//!
//! Owns the statements that write. A transaction reads and writes only the products, and the days of products, that its
//! events touch: memory is bounded by the batch, not by the catalogue.

use std::collections::BTreeSet;

use futures::TryFutureExt;
use lomash_contract::{OrderId, ProductDetails, ProductId};
use lomash_ledger::StoredMessage;
use lomash_platform::postgres::ANALYTICS;
use time::{Date, OffsetDateTime};
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Transaction};
use uuid::Uuid;

use crate::projection::ProjectionError;
use crate::stock_metrics::{
    ByReason, Changes, Day, Parsed, Position, Product, ProductDay, StockMetrics, Totals, Tracked, day_of, touched,
};

/// Rows that one statement writes.
const ROWS_A_STATEMENT: usize = 10_000;

/// The columns of a product's day, as [`product_day`] reads them.
pub(crate) const PRODUCT_DAY_COLUMNS: &str = "units_sold, orders_allocated, adjustments, units_adjusted_up,
     units_adjusted_down, corrections, units_corrected_up, units_corrected_down, orders_refused,
     units_refused_insufficient, units_refused_inactive, stock_outs, out_of_stock_us, out_of_stock_since,
     closing_quantity";

/// The columns of a day, as [`day`] reads them.
pub(crate) const DAY_COLUMNS: &str = "events, products_registered, units_sold, orders_allocated, adjustments,
     units_adjusted_up, units_adjusted_down, corrections, units_corrected_up, units_corrected_down,
     orders_refused_insufficient, orders_refused_inactive, orders_refused_unknown, units_refused_insufficient,
     units_refused_inactive, units_refused_unknown, stock_outs";

/// The columns of the checkpoint, as [`position`] reads them.
pub(crate) const POSITION_COLUMNS: &str = "sequence, skipped, clock, last_order, products, active_products,
     out_of_stock_products, low_stock_products, units_in_stock";

/// Where the rows of a schema stand.
///
/// # Errors
/// When Postgres cannot be asked.
pub async fn checkpoint(client: &Client, schema: &str) -> Result<u64, ProjectionError> {
    let query = format!("SELECT sequence FROM {schema}.checkpoint WHERE projection = $1");
    Ok(client.query_one(&query, &[&ANALYTICS.projection]).await?.get::<_, i64>(0).unsigned_abs())
}

/// The server's time of the last event that the rows reflect.
pub(crate) async fn clock(client: &Client, schema: &str) -> Result<OffsetDateTime, ProjectionError> {
    let query = format!("SELECT clock FROM {schema}.checkpoint WHERE projection = $1");
    Ok(client.query_one(&query, &[&ANALYTICS.projection]).await?.get(0))
}

/// Where the rows stand, locked until the transaction ends.
pub(crate) async fn lock_position(transaction: &Transaction<'_>, schema: &str) -> Result<Position, ProjectionError> {
    let lock = format!("SELECT {POSITION_COLUMNS} FROM {schema}.checkpoint WHERE projection = $1 FOR UPDATE");
    Ok(position(&transaction.query_one(&lock, &[&ANALYTICS.projection]).await?, 0))
}

/// Reads [`POSITION_COLUMNS`], of which the first is column `at`.
pub(crate) fn position(row: &Row, at: usize) -> Position {
    Position {
        sequence: row.get::<_, i64>(at).unsigned_abs(),
        skipped: row.get::<_, i64>(at + 1).unsigned_abs(),
        clock: row.get(at + 2),
        last_order: row.get::<_, Option<Uuid>>(at + 3).map(OrderId),
        totals: Totals {
            products: row.get(at + 4),
            active_products: row.get(at + 5),
            out_of_stock_products: row.get(at + 6),
            low_stock_products: row.get(at + 7),
            units_in_stock: row.get(at + 8),
        },
    }
}

/// Reads [`PRODUCT_DAY_COLUMNS`], of which the first is column `at`.
pub(crate) fn product_day(row: &Row, at: usize) -> ProductDay {
    ProductDay {
        units_sold: row.get(at),
        orders_allocated: row.get(at + 1),
        adjusted: changes(row, at + 2),
        corrected: changes(row, at + 5),
        orders_refused: row.get(at + 8),
        units_refused: ByReason {
            insufficient_stock: row.get(at + 9),
            product_inactive: row.get(at + 10),
            unknown_product: 0,
        },
        stock_outs: row.get(at + 11),
        out_of_stock_us: row.get(at + 12),
        out_of_stock_since: row.get(at + 13),
        closing_quantity: row.get::<_, i32>(at + 14).unsigned_abs(),
    }
}

/// Reads [`DAY_COLUMNS`], of which the first is column `at`.
pub(crate) fn day(row: &Row, at: usize) -> Day {
    Day {
        events: row.get(at),
        products_registered: row.get(at + 1),
        units_sold: row.get(at + 2),
        orders_allocated: row.get(at + 3),
        adjusted: changes(row, at + 4),
        corrected: changes(row, at + 7),
        orders_refused: by_reason(row, at + 10),
        units_refused: by_reason(row, at + 13),
        stock_outs: row.get(at + 16),
    }
}

fn changes(row: &Row, at: usize) -> Changes {
    Changes { count: row.get(at), up: row.get(at + 1), down: row.get(at + 2) }
}

fn by_reason(row: &Row, at: usize) -> ByReason {
    ByReason { insufficient_stock: row.get(at), product_inactive: row.get(at + 1), unknown_product: row.get(at + 2) }
}

/// The rows that these messages may touch, as they are.
pub(crate) async fn load<'m>(
    transaction: &Transaction<'_>,
    schema: &str,
    position: Position,
    messages: impl Iterator<Item = (&'m StoredMessage, &'m Parsed)>,
) -> Result<StockMetrics, ProjectionError> {
    let mut keys = BTreeSet::new();
    let mut dates = BTreeSet::new();
    let mut clock = position.clock;
    for (message, parsed) in messages {
        clock = clock.max(message.stored_at);
        dates.insert(day_of(clock));
        keys.extend(touched(parsed).map(|product| product.0));
    }
    let (keys, dates): (Vec<Uuid>, Vec<Date>) = (keys.into_iter().collect(), dates.into_iter().collect());
    let products = format!(
        "SELECT product_id, sku, name, category, low_stock_threshold, active, quantity, out_of_stock_since,
                registered_at, updated_at, sequence
         FROM {schema}.products JOIN {schema}.stock USING (product_id) WHERE product_id = ANY($1)"
    );
    let product_days = format!(
        "SELECT product_id, day, {PRODUCT_DAY_COLUMNS} FROM {schema}.product_days
         WHERE product_id = ANY($1) AND day = ANY($2)"
    );
    let days = format!("SELECT day, {DAY_COLUMNS} FROM {schema}.days WHERE day = ANY($1)");
    let by_product: [&(dyn ToSql + Sync); 1] = [&keys];
    let by_both: [&(dyn ToSql + Sync); 2] = [&keys, &dates];
    let by_day: [&(dyn ToSql + Sync); 1] = [&dates];
    // All three are on the way at once.
    let (products, product_days, days) = tokio::try_join!(
        transaction.query(&products, &by_product).map_err(ProjectionError::from),
        transaction.query(&product_days, &by_both).map_err(ProjectionError::from),
        transaction.query(&days, &by_day).map_err(ProjectionError::from),
    )?;
    let mut metrics = StockMetrics { position, ..StockMetrics::default() };
    for row in &products {
        let product = product(row)?;
        metrics.products.insert(product.details.product_id, Tracked::stored(product));
    }
    for row in &product_days {
        metrics.product_days.insert((ProductId(row.get(0)), row.get(1)), Tracked::stored(product_day(row, 2)));
    }
    for row in &days {
        metrics.days.insert(row.get(0), Tracked::stored(day(row, 1)));
    }
    Ok(metrics)
}

fn product(row: &Row) -> Result<Product, ProjectionError> {
    let product_id = ProductId(row.get(0));
    let sku: String = row.get(1);
    let sku = sku
        .parse()
        .map_err(|_| ProjectionError::Damaged(format!("product {product_id} has the impossible sku `{sku}`")))?;
    let details = ProductDetails {
        product_id,
        sku,
        name: row.get::<_, String>(2).into(),
        category: row.get::<_, Option<String>>(3).map(Into::into),
        low_stock_threshold: row.get::<_, Option<i32>>(4).map(i32::unsigned_abs),
        active: row.get(5),
    };
    Ok(Product {
        details,
        quantity: row.get::<_, i32>(6).unsigned_abs(),
        out_of_stock_since: row.get(7),
        registered_at: row.get(8),
        updated_at: row.get(9),
        sequence: row.get::<_, i64>(10).unsigned_abs(),
    })
}

/// Writes what changed, and moves the checkpoint from `expected`.
pub(crate) async fn write(
    transaction: &Transaction<'_>,
    schema: &str,
    expected: u64,
    metrics: &StockMetrics,
) -> Result<(), ProjectionError> {
    let StockMetrics { position, products, product_days, days } = metrics;
    let changed: Vec<&Tracked<Product>> = products.values().filter(|product| product.changed).collect();
    for rows in changed.chunks(ROWS_A_STATEMENT) {
        write_stock(transaction, schema, rows).await?;
    }
    let changed: Vec<&Tracked<Product>> = changed.into_iter().filter(|product| product.details_changed).collect();
    for rows in changed.chunks(ROWS_A_STATEMENT) {
        write_details(transaction, schema, rows).await?;
    }
    let changed = product_days.iter().filter(|(_, day)| day.changed);
    let changed: Vec<(Uuid, Date, &ProductDay)> =
        changed.map(|((product, day), tracked)| (product.0, *day, &tracked.row)).collect();
    for rows in changed.chunks(ROWS_A_STATEMENT) {
        write_product_days(transaction, schema, rows).await?;
    }
    let changed: Vec<(Date, &Day)> =
        days.iter().filter(|(_, day)| day.changed).map(|(day, tracked)| (*day, &tracked.row)).collect();
    write_days(transaction, schema, &changed).await?;
    move_checkpoint(transaction, schema, expected, position).await
}

async fn move_checkpoint(
    transaction: &Transaction<'_>,
    schema: &str,
    expected: u64,
    position: &Position,
) -> Result<(), ProjectionError> {
    let Position { sequence, skipped, clock, last_order, totals } = position;
    let update = format!(
        "UPDATE {schema}.checkpoint SET sequence = $1, skipped = $2, clock = $3, last_order = $4, products = $5,
                active_products = $6, out_of_stock_products = $7, low_stock_products = $8, units_in_stock = $9,
                updated_at = now()
         WHERE projection = $10 AND sequence = $11"
    );
    let values: [&(dyn ToSql + Sync); 11] = [
        &bigint(*sequence),
        &bigint(*skipped),
        clock,
        &last_order.map(|order| order.0),
        &totals.products,
        &totals.active_products,
        &totals.out_of_stock_products,
        &totals.low_stock_products,
        &totals.units_in_stock,
        &ANALYTICS.projection,
        &bigint(expected),
    ];
    let moved = transaction.execute(&update, &values).await?;
    // The row was locked and read in this transaction.
    if moved == 1 { Ok(()) } else { Err(ProjectionError::Postgres(format!("the checkpoint left {expected} unseen"))) }
}

async fn write_stock(
    transaction: &Transaction<'_>,
    schema: &str,
    rows: &[&Tracked<Product>],
) -> Result<(), ProjectionError> {
    let ids: Vec<Uuid> = of(rows, |product| product.details.product_id.0);
    let quantities: Vec<i32> = of(rows, |product| integer(product.quantity));
    let thresholds: Vec<Option<i32>> = of(rows, |product| product.details.low_stock_threshold.map(integer));
    let since: Vec<Option<OffsetDateTime>> = of(rows, |product| product.out_of_stock_since);
    let sequences: Vec<i64> = of(rows, |product| bigint(product.sequence));
    let updated: Vec<OffsetDateTime> = of(rows, |product| product.updated_at);
    let upsert = format!(
        "INSERT INTO {schema}.stock
                (product_id, quantity, low_stock_threshold, out_of_stock_since, sequence, updated_at)
         SELECT * FROM UNNEST($1::uuid[], $2::int[], $3::int[], $4::timestamptz[], $5::bigint[], $6::timestamptz[])
         ON CONFLICT (product_id) DO UPDATE SET
             quantity = excluded.quantity, low_stock_threshold = excluded.low_stock_threshold,
             out_of_stock_since = excluded.out_of_stock_since, sequence = excluded.sequence,
             updated_at = excluded.updated_at"
    );
    transaction.execute(&upsert, &[&ids, &quantities, &thresholds, &since, &sequences, &updated]).await?;
    Ok(())
}

async fn write_details(
    transaction: &Transaction<'_>,
    schema: &str,
    rows: &[&Tracked<Product>],
) -> Result<(), ProjectionError> {
    let ids: Vec<Uuid> = of(rows, |product| product.details.product_id.0);
    let skus: Vec<String> = of(rows, |product| product.details.sku.as_str().to_owned());
    let names: Vec<String> = of(rows, |product| product.details.name.to_string());
    let categories: Vec<Option<String>> = of(rows, |product| product.details.category.as_deref().map(str::to_owned));
    let actives: Vec<bool> = of(rows, |product| product.details.active);
    let registered: Vec<OffsetDateTime> = of(rows, |product| product.registered_at);
    let upsert = format!(
        "INSERT INTO {schema}.products (product_id, sku, name, category, active, registered_at)
         SELECT * FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::timestamptz[])
         ON CONFLICT (product_id) DO UPDATE SET
             sku = excluded.sku, name = excluded.name, category = excluded.category, active = excluded.active"
    );
    transaction.execute(&upsert, &[&ids, &skus, &names, &categories, &actives, &registered]).await?;
    Ok(())
}

fn of<T>(rows: &[&Tracked<Product>], column: impl Fn(&Product) -> T) -> Vec<T> {
    rows.iter().map(|tracked| column(&tracked.row)).collect()
}

/// The columns of [`PRODUCT_DAY_COLUMNS`] and [`DAY_COLUMNS`] that are numbers, as those lists name them.
type Numbers<R> = Vec<(&'static str, fn(&R) -> i64)>;

async fn write_product_days(
    transaction: &Transaction<'_>,
    schema: &str,
    rows: &[(Uuid, Date, &ProductDay)],
) -> Result<(), ProjectionError> {
    let numbers: Numbers<ProductDay> = vec![
        ("units_sold", |day| day.units_sold),
        ("orders_allocated", |day| day.orders_allocated),
        ("adjustments", |day| day.adjusted.count),
        ("units_adjusted_up", |day| day.adjusted.up),
        ("units_adjusted_down", |day| day.adjusted.down),
        ("corrections", |day| day.corrected.count),
        ("units_corrected_up", |day| day.corrected.up),
        ("units_corrected_down", |day| day.corrected.down),
        ("orders_refused", |day| day.orders_refused),
        ("units_refused_insufficient", |day| day.units_refused.insufficient_stock),
        ("units_refused_inactive", |day| day.units_refused.product_inactive),
        ("stock_outs", |day| day.stock_outs),
        ("out_of_stock_us", |day| day.out_of_stock_us),
    ];
    let ids: Vec<Uuid> = rows.iter().map(|(product, _, _)| *product).collect();
    let dates: Vec<Date> = rows.iter().map(|(_, day, _)| *day).collect();
    let since: Vec<Option<OffsetDateTime>> = rows.iter().map(|(_, _, row)| row.out_of_stock_since).collect();
    let closing: Vec<i32> = rows.iter().map(|(_, _, row)| integer(row.closing_quantity)).collect();
    let columns = columns(&numbers, || rows.iter().map(|(_, _, row)| *row));
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&ids, &dates, &since, &closing];
    values.extend(columns.iter().map(|column| column as &(dyn ToSql + Sync)));
    let keys = [("product_id", "uuid"), ("day", "date")];
    let others = [("out_of_stock_since", "timestamptz"), ("closing_quantity", "int")];
    let upsert = upsert(&format!("{schema}.product_days"), &keys, &others, &numbers);
    transaction.execute(&upsert, &values).await?;
    Ok(())
}

async fn write_days(transaction: &Transaction<'_>, schema: &str, rows: &[(Date, &Day)]) -> Result<(), ProjectionError> {
    if rows.is_empty() {
        return Ok(());
    }
    let numbers: Numbers<Day> = vec![
        ("events", |day| day.events),
        ("products_registered", |day| day.products_registered),
        ("units_sold", |day| day.units_sold),
        ("orders_allocated", |day| day.orders_allocated),
        ("adjustments", |day| day.adjusted.count),
        ("units_adjusted_up", |day| day.adjusted.up),
        ("units_adjusted_down", |day| day.adjusted.down),
        ("corrections", |day| day.corrected.count),
        ("units_corrected_up", |day| day.corrected.up),
        ("units_corrected_down", |day| day.corrected.down),
        ("orders_refused_insufficient", |day| day.orders_refused.insufficient_stock),
        ("orders_refused_inactive", |day| day.orders_refused.product_inactive),
        ("orders_refused_unknown", |day| day.orders_refused.unknown_product),
        ("units_refused_insufficient", |day| day.units_refused.insufficient_stock),
        ("units_refused_inactive", |day| day.units_refused.product_inactive),
        ("units_refused_unknown", |day| day.units_refused.unknown_product),
        ("stock_outs", |day| day.stock_outs),
    ];
    let dates: Vec<Date> = rows.iter().map(|(day, _)| *day).collect();
    let columns = columns(&numbers, || rows.iter().map(|(_, row)| *row));
    let mut values: Vec<&(dyn ToSql + Sync)> = vec![&dates];
    values.extend(columns.iter().map(|column| column as &(dyn ToSql + Sync)));
    let upsert = upsert(&format!("{schema}.days"), &[("day", "date")], &[], &numbers);
    transaction.execute(&upsert, &values).await?;
    Ok(())
}

/// Each number of all rows, as an array that is a value of a statement.
fn columns<'r, R: 'r, I: Iterator<Item = &'r R>>(numbers: &Numbers<R>, rows: impl Fn() -> I) -> Vec<Vec<i64>> {
    numbers.iter().map(|(_, number)| rows().map(number).collect()).collect()
}

/// The statement that writes rows of keys, other columns and numbers, in this order.
fn upsert<R>(table: &str, keys: &[(&str, &str)], others: &[(&str, &str)], numbers: &Numbers<R>) -> String {
    let numbers = numbers.iter().map(|(name, _)| (*name, "bigint"));
    let columns: Vec<(&str, &str)> = keys.iter().chain(others).copied().chain(numbers).collect();
    let list = |each: &dyn Fn(usize, &str, &str) -> String, of: &[(&str, &str)]| {
        let items = of.iter().enumerate().map(|(index, (name, kind))| each(index, name, kind));
        items.collect::<Vec<_>>().join(", ")
    };
    let name = |_: usize, name: &str, _: &str| name.to_owned();
    format!(
        "INSERT INTO {table} ({columns_named}) SELECT * FROM UNNEST({arrays})
         ON CONFLICT ({keys_named}) DO UPDATE SET {replaced}",
        columns_named = list(&name, &columns),
        arrays = list(&|index, _, kind| format!("${}::{kind}[]", index + 1), &columns),
        keys_named = list(&name, keys),
        replaced = list(&|_, name, _| format!("{name} = excluded.{name}"), &columns[keys.len()..]),
    )
}

/// Sequences and counts stay far below 2^63; quantities are checked by the ledger to fit.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn integer(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}
