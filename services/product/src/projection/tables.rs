//! The tables of the projection: each statement that writes them, for the projector and for a rebuild.
//!
//! Assumes a transaction in which nobody else writes: the checkpoint is locked, or the schema is a shadow. Stock and decisions go
//! in the order of their keys: an index is then gone through once, which saves Postgres a tenth of its work.

use std::pin::Pin;

use lomash_contract::text;
use lomash_contract::{CountedBy, ProductDetails, ProductId, UpdatedBy};
use lomash_platform::postgres::Schema;
use serde_json::Value;
use time::OffsetDateTime;
use tokio_postgres::Transaction;
use tokio_postgres::binary_copy::BinaryCopyInWriter;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql, Type};
use uuid::Uuid;

use super::changes::{Count, DetailsRow, Known, Movement, OrderDecided, OrderDecision, Products, StockRow};
use super::{PROJECTION, ProjectionError};

/// Products that one statement writes.
const PRODUCTS_A_STATEMENT: usize = 10_000;

/// Rows of `stock` as parameters.
const STOCK_ROWS: &str = "UNNEST($1::uuid[], $2::int[], $3::int[], $4::bigint[], $5::timestamptz[])";

/// Moves the checkpoint from `expected` to `reached`; `skipped` more messages were not ours.
pub(crate) async fn move_checkpoint(
    transaction: &Transaction<'_>,
    schema: Schema,
    expected: u64,
    reached: u64,
    skipped: u64,
) -> Result<(), ProjectionError> {
    let update = format!(
        "UPDATE {schema}.checkpoint SET sequence = $1, skipped = skipped + $2, updated_at = now()
         WHERE projection = $3 AND sequence = $4"
    );
    let moved =
        transaction.execute(&update, &[&bigint(reached), &bigint(skipped), &PROJECTION, &bigint(expected)]).await?;
    if moved == 1 { Ok(()) } else { Err(ProjectionError::Fenced { expected }) }
}

/// Sequences and counts stay far below 2^63; quantities are checked by the ledger to fit.
fn bigint(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn integer(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

/// What `stock` says of these products; nothing of those that are not registered yet. Refuses when it has no row of one that
/// `products` has: somebody removed it, and its events would be taken for somebody else's.
pub(crate) async fn load_stock(
    transaction: &Transaction<'_>,
    schema: Schema,
    products: &[Uuid],
) -> Result<Vec<(ProductId, Known)>, ProjectionError> {
    if products.is_empty() {
        return Ok(Vec::new());
    }
    let query =
        format!("SELECT product_id, quantity, low_stock_threshold FROM {schema}.stock WHERE product_id = ANY($1)");
    let rows = transaction.query(&query, &[&products]).await?;
    let known = rows.into_iter().map(|row| {
        let (quantity, threshold) = (row.get::<_, i32>(1), row.get::<_, Option<i32>>(2));
        let known = Known { quantity: quantity.unsigned_abs(), threshold: threshold.map(i32::unsigned_abs) };
        (ProductId(row.get(0)), known)
    });
    let known: Vec<_> = known.collect();
    if known.len() < products.len() {
        let query = format!("SELECT count(*) FROM {schema}.products WHERE product_id = ANY($1)");
        let registered: i64 = transaction.query_one(&query, &[&products]).await?.get(0);
        found_all(schema, "stock", usize::try_from(registered).unwrap_or(0), known.len() as u64)?;
    }
    Ok(known)
}

/// Writes what the tables do not have yet.
pub(crate) async fn write_products(
    transaction: &Transaction<'_>,
    schema: Schema,
    products: &Products,
) -> Result<(), ProjectionError> {
    let mut stock: Vec<_> = products.stock.iter().collect();
    stock.sort_unstable_by_key(|(product_id, _)| **product_id);
    let (new, changed): (Vec<_>, Vec<_>) = stock.into_iter().partition(|(_, row)| row.is_new);
    for rows in new.chunks(PRODUCTS_A_STATEMENT) {
        let insert = format!(
            "INSERT INTO {schema}.stock (product_id, quantity, low_stock_threshold, sequence, updated_at)
             SELECT * FROM {STOCK_ROWS}"
        );
        write_stock(transaction, &insert, rows).await?;
    }
    for rows in changed.chunks(PRODUCTS_A_STATEMENT) {
        let update = format!(
            "UPDATE {schema}.stock AS old SET quantity = new.quantity, low_stock_threshold = new.low_stock_threshold,
                 sequence = new.sequence, updated_at = new.updated_at
             FROM {STOCK_ROWS} AS new (product_id, quantity, low_stock_threshold, sequence, updated_at)
             WHERE old.product_id = new.product_id"
        );
        let updated = write_stock(transaction, &update, rows).await?;
        found_all(schema, "stock", rows.len(), updated)?;
    }
    let (new, revised): (Vec<_>, Vec<_>) = products.details.values().partition(|row| row.registered.is_some());
    for rows in new.chunks(PRODUCTS_A_STATEMENT) {
        insert_details(transaction, schema, rows).await?;
    }
    for rows in revised.chunks(PRODUCTS_A_STATEMENT) {
        update_details(transaction, schema, rows).await?;
    }
    Ok(())
}

/// Refuses an update that did not find each of its `rows` in `table`: somebody else removed some.
fn found_all(schema: Schema, table: &str, rows: usize, updated: u64) -> Result<(), ProjectionError> {
    if updated == rows as u64 {
        return Ok(());
    }
    Err(ProjectionError::Postgres(format!(
        "of {rows} products that {schema}.{table} had, {updated} are left; run `lomash rebuild`"
    )))
}

/// Runs `statement`, whose parameters are [`STOCK_ROWS`]; returns how many rows it wrote.
async fn write_stock(
    transaction: &Transaction<'_>,
    statement: &str,
    rows: &[(&ProductId, &StockRow)],
) -> Result<u64, ProjectionError> {
    let ids: Vec<Uuid> = rows.iter().map(|(product_id, _)| product_id.0).collect();
    let quantities: Vec<i32> = rows.iter().map(|(_, row)| integer(row.now.quantity)).collect();
    let thresholds: Vec<Option<i32>> = rows.iter().map(|(_, row)| row.now.threshold.map(integer)).collect();
    let sequences: Vec<i64> = rows.iter().map(|(_, row)| bigint(row.sequence)).collect();
    let updated: Vec<OffsetDateTime> = rows.iter().map(|(_, row)| row.updated_at).collect();
    Ok(transaction.execute(statement, &[&ids, &quantities, &thresholds, &sequences, &updated]).await?)
}

/// The columns of `products` that a revision changes. An array of arrays would have to be rectangular, so the words travel as
/// one text; they hold no space.
struct Details<'a> {
    ids: Vec<Uuid>,
    skus: Vec<&'a str>,
    names: Vec<&'a str>,
    categories: Vec<Option<&'a str>>,
    actives: Vec<bool>,
    words: Vec<String>,
}

impl<'a> Details<'a> {
    fn of(rows: &[&'a DetailsRow]) -> Self {
        let details = || rows.iter().map(|row| &row.details);
        Self {
            ids: details().map(|details| details.product_id.0).collect(),
            skus: details().map(|details| details.sku.as_str()).collect(),
            names: details().map(|details| &*details.name).collect(),
            categories: details().map(|details| details.category.as_deref()).collect(),
            actives: details().map(|details| details.active).collect(),
            words: details().map(|details| searchable_words(details).join(" ")).collect(),
        }
    }
}

async fn insert_details(
    transaction: &Transaction<'_>,
    schema: Schema,
    rows: &[&DetailsRow],
) -> Result<(), ProjectionError> {
    let Details { ids, skus, names, categories, actives, words } = Details::of(rows);
    let (sequences, instants): (Vec<i64>, Vec<OffsetDateTime>) =
        rows.iter().filter_map(|row| row.registered).map(|(sequence, at)| (bigint(sequence), at)).unzip();
    let insert = format!(
        "INSERT INTO {schema}.products
                (product_id, sku, name, category, active, words, registered_sequence, registered_at)
         SELECT product_id, sku, name, category, active, string_to_array(words, ' '), sequence, registered_at
         FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::text[], $7::bigint[],
                     $8::timestamptz[])
              AS new (product_id, sku, name, category, active, words, sequence, registered_at)"
    );
    let parameters: [&(dyn ToSql + Sync); 8] =
        [&ids, &skus, &names, &categories, &actives, &words, &sequences, &instants];
    transaction.execute(&insert, &parameters).await?;
    Ok(())
}

async fn update_details(
    transaction: &Transaction<'_>,
    schema: Schema,
    rows: &[&DetailsRow],
) -> Result<(), ProjectionError> {
    let Details { ids, skus, names, categories, actives, words } = Details::of(rows);
    let update = format!(
        "UPDATE {schema}.products AS old SET sku = new.sku, name = new.name, category = new.category,
             active = new.active, words = string_to_array(new.words, ' ')
         FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::text[], $5::bool[], $6::text[])
              AS new (product_id, sku, name, category, active, words)
         WHERE old.product_id = new.product_id"
    );
    let updated = transaction.execute(&update, &[&ids, &skus, &names, &categories, &actives, &words]).await?;
    found_all(schema, "products", rows.len(), updated)
}

/// The words of its sku and its name, by which a product is found.
fn searchable_words(details: &ProductDetails) -> Vec<String> {
    let mut words: Vec<String> = text::words(details.sku.as_str()).chain(text::words(&details.name)).collect();
    words.sort_unstable();
    words.dedup();
    words
}

/// The words of a text as they were told apart before texts were folded: in lower case, and a mark that is set on a letter was
/// between words. Rows that were written so are found by these until they are written again.
pub(crate) fn unfolded_words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    let words = lower.split(|letter: char| !letter.is_alphanumeric());
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Begins a binary `COPY` into a table, which is named with its columns; `types` are theirs.
async fn copy(
    transaction: &Transaction<'_>,
    schema: Schema,
    columns: &str,
    types: &[Type],
) -> Result<Pin<Box<BinaryCopyInWriter>>, tokio_postgres::Error> {
    let sink = transaction.copy_in(&format!("COPY {schema}.{columns} FROM STDIN BINARY")).await?;
    Ok(Box::pin(BinaryCopyInWriter::new(sink, types)))
}

/// Adds movements by binary `COPY`.
pub(crate) async fn write_movements(
    transaction: &Transaction<'_>,
    schema: Schema,
    movements: &[Movement<'_>],
) -> Result<(), ProjectionError> {
    if movements.is_empty() {
        return Ok(());
    }
    let columns =
        "movements (sequence, product_id, previous_quantity, new_quantity, trigger, order_id, updated_by, reason,
                              event_id, occurred_at, stored_at)";
    let types = [
        Type::INT8,
        Type::UUID,
        Type::INT4,
        Type::INT4,
        Type::TEXT,
        Type::UUID,
        Type::UUID,
        Type::TEXT,
        Type::UUID,
        Type::TIMESTAMPTZ,
        Type::TIMESTAMPTZ,
    ];
    let mut writer = copy(transaction, schema, columns, &types).await?;
    for Movement { message, event_id, occurred_at, updated } in movements {
        let by = match updated.updated_by {
            UpdatedBy::System => None,
            UpdatedBy::User(id) => Some(id),
        };
        writer
            .as_mut()
            .write(&[
                &bigint(message.sequence),
                &updated.product_id.0,
                &integer(updated.previous_quantity),
                &integer(updated.new_quantity),
                &updated.trigger.as_str(),
                &updated.order_id.map(|order| order.0),
                &by,
                &message.carried.reason,
                event_id,
                occurred_at,
                &message.stored_at,
            ])
            .await?;
    }
    writer.as_mut().finish().await?;
    Ok(())
}

/// Adds counts by binary `COPY`.
pub(crate) async fn write_counts(
    transaction: &Transaction<'_>,
    schema: Schema,
    counts: &[Count<'_>],
) -> Result<(), ProjectionError> {
    if counts.is_empty() {
        return Ok(());
    }
    let columns = "counts (sequence, product_id, quantity, counted_at, counted_by, event_id, stored_at)";
    let types = [Type::INT8, Type::UUID, Type::INT8, Type::TIMESTAMPTZ, Type::UUID, Type::UUID, Type::TIMESTAMPTZ];
    let mut writer = copy(transaction, schema, columns, &types).await?;
    for Count { message, event_id, counted } in counts {
        let by = match counted.counted_by {
            CountedBy::Warehouse => None,
            CountedBy::User(id) => Some(id),
        };
        writer
            .as_mut()
            .write(&[
                &bigint(message.sequence),
                &counted.product_id.0,
                &i64::from(counted.quantity),
                &counted.counted_at.get(),
                &by,
                event_id,
                &message.stored_at,
            ])
            .await?;
    }
    writer.as_mut().finish().await?;
    Ok(())
}

/// A decision as the columns `outcome`, `reason` and `items` hold it.
fn decision_columns(decision: &OrderDecision) -> (&'static str, Option<&str>, Option<Json<Value>>) {
    match decision {
        OrderDecision::Allocated => ("allocated", None, None),
        OrderDecision::Refused(failed) => {
            let items = serde_json::to_value(&failed.items).unwrap_or_default();
            ("refused", Some(failed.reason.as_str()), Some(Json(items)))
        }
    }
}

/// Adds the decisions of orders that have none yet.
pub(crate) async fn write_decisions(
    transaction: &mut Transaction<'_>,
    schema: Schema,
    decisions: &[OrderDecided],
) -> Result<(), ProjectionError> {
    if decisions.is_empty() {
        return Ok(());
    }
    let copying = transaction.savepoint("decisions").await?;
    match copy_decisions(&copying, schema, decisions).await {
        Ok(()) => return Ok(copying.commit().await?),
        // Only in a ledger that decides an order twice, which is never ours; the first decision counts.
        Err(problem) if problem.code() == Some(&SqlState::UNIQUE_VIOLATION) => copying.rollback().await?,
        Err(problem) => return Err(problem.into()),
    }
    let mut orders: Vec<Uuid> = Vec::with_capacity(decisions.len());
    let mut outcomes: Vec<&str> = Vec::with_capacity(decisions.len());
    let mut reasons: Vec<Option<&str>> = Vec::with_capacity(decisions.len());
    let mut items: Vec<Option<Json<Value>>> = Vec::with_capacity(decisions.len());
    let mut sequences: Vec<i64> = Vec::with_capacity(decisions.len());
    let mut instants: Vec<OffsetDateTime> = Vec::with_capacity(decisions.len());
    for OrderDecided { order_id, sequence, decided_at, decision } in decisions {
        let (outcome, reason, failing) = decision_columns(decision);
        orders.push(order_id.0);
        outcomes.push(outcome);
        reasons.push(reason);
        items.push(failing);
        sequences.push(bigint(*sequence));
        instants.push(*decided_at);
    }
    let insert = format!(
        "INSERT INTO {schema}.order_decisions (order_id, outcome, reason, items, sequence, decided_at)
         SELECT * FROM UNNEST($1::uuid[], $2::text[], $3::text[], $4::jsonb[], $5::bigint[], $6::timestamptz[])
         ON CONFLICT (order_id) DO NOTHING"
    );
    transaction.execute(&insert, &[&orders, &outcomes, &reasons, &items, &sequences, &instants]).await?;
    Ok(())
}

/// Adds decisions by binary `COPY`. The key of the table refuses an order that has one; a table without its key takes them all.
async fn copy_decisions(
    transaction: &Transaction<'_>,
    schema: Schema,
    decisions: &[OrderDecided],
) -> Result<(), tokio_postgres::Error> {
    let columns = "order_decisions (order_id, outcome, reason, items, sequence, decided_at)";
    let types = [Type::UUID, Type::TEXT, Type::TEXT, Type::JSONB, Type::INT8, Type::TIMESTAMPTZ];
    let mut writer = copy(transaction, schema, columns, &types).await?;
    let mut decisions: Vec<_> = decisions.iter().collect();
    decisions.sort_unstable_by_key(|decided| decided.order_id);
    for OrderDecided { order_id, sequence, decided_at, decision } in decisions {
        let (outcome, reason, items) = decision_columns(decision);
        writer.as_mut().write(&[&order_id.0, &outcome, &reason, &items, &bigint(*sequence), decided_at]).await?;
    }
    writer.as_mut().finish().await?;
    Ok(())
}
