//! Writes of stock: set, adjust, count.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use lomash_contract::{CountedBy, InventoryUpdated, LedgerEvent, ProductId, Timestamp};
use lomash_web::{Admin, Body, Path, Problem};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Api;
use super::problems::WriteProblems;
use super::writes::{KEY_DESCRIPTION, Write, Written, carry_out};
use crate::inventory::{Action, Count, is_available};

/// Set the stock of a product to a figure.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SetQuantity {
    /// The new stock.
    #[schema(maximum = 1_000_000_000)]
    quantity: u32,
    /// Refuse with 409 unless the stock is this now.
    #[schema(maximum = 1_000_000_000)]
    expected_quantity: Option<u32>,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

/// Add to the stock of a product, or take away.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Adjust {
    /// How many; negative takes away, and never more than there is. Not 0.
    #[schema(minimum = -1_000_000_000, maximum = 1_000_000_000)]
    delta: i64,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: String,
}

/// Put a count of a product on record. It changes no stock by itself; the next reconciliation corrects by it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RecordCount {
    /// How many were there.
    #[schema(maximum = 1_000_000_000)]
    quantity: u32,
    /// When they were counted: orders since then are not undone by the correction.
    #[schema(value_type = String, format = DateTime)]
    counted_at: Timestamp,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

/// What became of a write of stock.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct StockWritten {
    /// The product.
    product_id: Uuid,
    /// Its unit; null when nothing changed.
    sku: Option<String>,
    /// The stock before; null when nothing changed.
    previous_quantity: Option<u32>,
    /// The stock after; null when nothing changed and the request did not name it.
    quantity: Option<u32>,
    /// Whether there is any left.
    is_available: Option<bool>,
    /// Whether anything changed. A change to the same figure is none.
    changed: bool,
    /// Who.
    #[schema(value_type = String)]
    updated_by: Uuid,
    /// Why.
    reason: Option<String>,
    /// The event that tells it; null when nothing changed.
    event_id: Option<Uuid>,
    /// When; null when nothing changed.
    #[schema(value_type = Option<String>, format = DateTime)]
    updated_at: Option<Timestamp>,
    /// The sequence of the ledger that shows it; send it as `Lomash-Min-Sequence` to read your write.
    sequence: u64,
}

/// A count on record.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct CountRecorded {
    /// The product.
    product_id: Uuid,
    /// How many were there.
    quantity: u32,
    /// When they were counted.
    #[schema(value_type = String, format = DateTime)]
    counted_at: Timestamp,
    /// Who counted.
    counted_by: Uuid,
    /// Whether it was not on record before.
    changed: bool,
    /// The sequence of the ledger that shows it.
    sequence: u64,
}

#[utoipa::path(
    patch, path = "/v1/products/{productId}/inventory", tag = "inventory", operation_id = "setQuantity",
    summary = "Set the stock of a product",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        ("Idempotency-Key" = Option<String>, Header, description = KEY_DESCRIPTION),
        ("If-Match" = Option<String>, Header, description = "Only if the product is at this version"),
    ),
    request_body = SetQuantity,
    responses((status = 200, description = "Set, or so already", body = StockWritten), WriteProblems)
)]
pub(super) async fn set_quantity(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Body(request): Body<SetQuantity>,
) -> Result<Response, Problem> {
    let SetQuantity { quantity, expected_quantity, ref reason } = request;
    let action = Action::SetQuantity { quantity, expected_quantity };
    let write = Write { product_id, action, reason: reason.clone() };
    let written = carry_out(&api, caller, &headers, "setQuantity", &request, write).await?;
    let body = stock_written(&written, product_id, caller.subject, request.reason, Some(quantity));
    Ok(written.answer(StatusCode::OK, body))
}

#[utoipa::path(
    post, path = "/v1/products/{productId}/inventory/adjustments", tag = "inventory", operation_id = "adjust",
    summary = "Add to the stock of a product, or take away",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        ("Idempotency-Key" = Option<String>, Header, description = KEY_DESCRIPTION),
        ("If-Match" = Option<String>, Header, description = "Only if the product is at this version"),
    ),
    request_body = Adjust,
    responses((status = 200, description = "Adjusted", body = StockWritten), WriteProblems)
)]
pub(super) async fn adjust(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Body(request): Body<Adjust>,
) -> Result<Response, Problem> {
    if request.delta == 0 {
        return Err(Problem::invalid_field("/delta", "must not be 0"));
    }
    let write =
        Write { product_id, action: Action::Adjust { delta: request.delta }, reason: Some(request.reason.clone()) };
    let written = carry_out(&api, caller, &headers, "adjust", &request, write).await?;
    let body = stock_written(&written, product_id, caller.subject, Some(request.reason), None);
    Ok(written.answer(StatusCode::OK, body))
}

#[utoipa::path(
    post, path = "/v1/products/{productId}/inventory/counts", tag = "reconciliation", operation_id = "recordCount",
    summary = "Put a count of a product on record",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        ("Idempotency-Key" = Option<String>, Header, description = KEY_DESCRIPTION),
    ),
    request_body = RecordCount,
    responses((status = 201, description = "On record", body = CountRecorded), WriteProblems)
)]
pub(super) async fn record_count(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Body(request): Body<RecordCount>,
) -> Result<Response, Problem> {
    let RecordCount { quantity, counted_at, ref reason } = request;
    let action = Action::RecordCount(Count { quantity, counted_at, counted_by: CountedBy::User(caller.subject) });
    let write = Write { product_id, action, reason: reason.clone() };
    let written = carry_out(&api, caller, &headers, "recordCount", &request, write).await?;
    let body = CountRecorded {
        product_id: product_id.0,
        quantity,
        counted_at,
        counted_by: caller.subject,
        changed: !written.events.is_empty(),
        sequence: written.sequence,
    };
    Ok(written.answer(StatusCode::CREATED, body))
}

fn stock_written(
    written: &Written,
    product_id: ProductId,
    by: Uuid,
    reason: Option<String>,
    asked: Option<u32>,
) -> StockWritten {
    let change = written.events.iter().find_map(|event| match &event.payload {
        LedgerEvent::InventoryUpdated(updated) => Some((event, updated)),
        _ => None,
    });
    let updated = change.map(|(_, updated): (_, &InventoryUpdated)| updated);
    let quantity = updated.map(|updated| updated.new_quantity).or(asked);
    StockWritten {
        product_id: product_id.0,
        sku: updated.map(|updated| updated.sku.to_string()),
        previous_quantity: updated.map(|updated| updated.previous_quantity),
        quantity,
        is_available: quantity.map(is_available),
        changed: change.is_some(),
        updated_by: by,
        reason,
        event_id: change.map(|(event, _)| event.event_id.0),
        updated_at: change.map(|(event, _)| event.timestamp),
        sequence: written.sequence,
    }
}
