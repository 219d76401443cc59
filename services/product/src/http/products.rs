//! Writes of the catalogue: register a product, change its details.

use axum::extract::State;
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;
use lomash_contract::text::given as text;
use lomash_contract::{
    ChangedField, LedgerEvent, ProductDetails, ProductId, ProductRegistered, ProductRevised, Sku, Timestamp,
};
use lomash_web::{Admin, Body, Path, Problem};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::Api;
use super::problems::WriteProblems;
use super::writes::{KEY_DESCRIPTION, Write, Written, carry_out};
use crate::catalogue;
use crate::inventory::{Action, Amendment, Details, given, is_available};

/// A product to register.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Register {
    /// Its id; when it is left out, the one that is derived from the sku.
    #[schema(value_type = Option<Uuid>)]
    product_id: Option<ProductId>,
    /// Its unit; unique. 1 to 64 visible characters; kept in Unicode's composed form (NFC), as all text is.
    #[serde(deserialize_with = "text::sku")]
    #[schema(value_type = String, min_length = 1, max_length = 64)]
    sku: Sku,
    /// Its name, 1 to 200 visible characters.
    #[serde(deserialize_with = "text::name")]
    #[schema(min_length = 1, max_length = 200)]
    name: Box<str>,
    /// Its category, if it has one, 1 to 200 visible characters.
    #[serde(default, deserialize_with = "text::optional_name")]
    #[schema(min_length = 1, max_length = 200)]
    category: Option<Box<str>>,
    /// Its own low-stock threshold; the platform's when it is left out.
    #[schema(maximum = 1_000_000_000)]
    low_stock_threshold: Option<u32>,
    /// Whether it is for sale.
    #[serde(default = "yes")]
    #[schema(default = true)]
    active: bool,
    /// Its first stock.
    #[serde(default)]
    #[schema(default = 0, maximum = 1_000_000_000)]
    initial_quantity: u32,
    /// Why, for the record; 1 to 500 characters.
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

impl Register {
    /// The product's id: the one given, or the one that its sku names.
    fn product_id(&self) -> ProductId {
        self.product_id.unwrap_or_else(|| catalogue::product_id(&self.sku))
    }

    fn details(&self) -> Details {
        Details {
            sku: self.sku.clone(),
            name: self.name.clone(),
            category: self.category.clone(),
            low_stock_threshold: self.low_stock_threshold,
            active: self.active,
        }
    }
}

const fn yes() -> bool {
    true
}

/// The details to change; what is left out stays. A null takes away.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Amend {
    /// Its name, 1 to 200 visible characters.
    #[serde(default, deserialize_with = "text::present_name", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = String, min_length = 1, max_length = 200)]
    name: Option<Box<str>>,
    /// Its category, 1 to 200 visible characters; null for none.
    #[serde(default, deserialize_with = "text::cleared_name", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 200)]
    category: Option<Option<Box<str>>>,
    /// Its own low-stock threshold; null for the platform's.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u32>, maximum = 1_000_000_000)]
    low_stock_threshold: Option<Option<u32>>,
    /// Whether it is for sale.
    #[serde(default, deserialize_with = "given", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = bool)]
    active: Option<bool>,
    /// Why, for the record; 1 to 500 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 500)]
    reason: Option<String>,
}

/// What became of a write of the catalogue.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProductWritten {
    /// The product.
    product_id: Uuid,
    /// Its details after the write; null when nothing changed.
    #[schema(value_type = Option<WrittenDetails>)]
    details: Option<WrittenDetails>,
    /// Its first stock, for a registration.
    quantity: Option<u32>,
    /// Whether there is any, for a registration.
    is_available: Option<bool>,
    /// Which of its fields changed; empty for a registration, and when nothing changed.
    #[schema(value_type = Vec<String>)]
    changed_fields: Vec<ChangedField>,
    /// Whether anything changed.
    changed: bool,
    /// When; null when nothing changed.
    #[schema(value_type = Option<String>, format = DateTime)]
    updated_at: Option<Timestamp>,
    /// The sequence of the ledger that shows it; send it as `Lomash-Min-Sequence` to read your write.
    sequence: u64,
}

/// Details of a product.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct WrittenDetails {
    /// Its unit.
    sku: String,
    /// Its name.
    name: Box<str>,
    /// Its category, if it has one.
    category: Option<Box<str>>,
    /// Its own low-stock threshold, if it has one.
    low_stock_threshold: Option<u32>,
    /// Whether it is for sale.
    active: bool,
}

#[utoipa::path(
    post, path = "/v1/products", tag = "products", operation_id = "registerProduct",
    summary = "Register a product, with stock if it has some",
    params(("Idempotency-Key" = Option<String>, Header, description = KEY_DESCRIPTION)),
    request_body = Register,
    responses(
        (status = 201, description = "Registered", body = ProductWritten),
        (status = 200, description = "It is registered so already", body = ProductWritten),
        WriteProblems
    )
)]
pub(super) async fn register(
    Admin(caller): Admin,
    State(api): State<Api>,
    headers: HeaderMap,
    Body(request): Body<Register>,
) -> Result<Response, Problem> {
    let product_id = request.product_id();
    let action = Action::Register { details: request.details(), initial_quantity: request.initial_quantity };
    let write = Write { product_id, action, reason: request.reason.clone() };
    let written = carry_out(&api, caller, &headers, "register", &request, write).await?;
    let status = if written.events.is_empty() { StatusCode::OK } else { StatusCode::CREATED };
    let mut response = written.answer(status, product_written(&written, product_id));
    if let Ok(location) = HeaderValue::from_str(&format!("/v1/products/{product_id}")) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

#[utoipa::path(
    patch, path = "/v1/products/{productId}", tag = "products", operation_id = "amendProduct",
    summary = "Change details of a product",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        ("Idempotency-Key" = Option<String>, Header, description = KEY_DESCRIPTION),
        ("If-Match" = Option<String>, Header, description = "Only if the product is at this version"),
    ),
    request_body = Amend,
    responses((status = 200, description = "Changed, or so already", body = ProductWritten), WriteProblems)
)]
pub(super) async fn amend(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Body(request): Body<Amend>,
) -> Result<Response, Problem> {
    let Amend { name, category, low_stock_threshold, active, .. } = &request;
    let amendment = Amendment {
        sku: None,
        name: name.clone(),
        category: category.clone(),
        low_stock_threshold: *low_stock_threshold,
        active: *active,
    };
    if amendment == Amendment::default() {
        let detail = "must have at least one of name, category, lowStockThreshold and active";
        return Err(Problem::invalid_field("", detail));
    }
    let write = Write { product_id, action: Action::Amend(amendment), reason: request.reason.clone() };
    let written = carry_out(&api, caller, &headers, "amend", &request, write).await?;
    Ok(written.answer(StatusCode::OK, product_written(&written, product_id)))
}

fn product_written(written: &Written, product_id: ProductId) -> ProductWritten {
    let mut answer = ProductWritten {
        product_id: product_id.0,
        details: None,
        quantity: None,
        is_available: None,
        changed_fields: Vec::new(),
        changed: !written.events.is_empty(),
        updated_at: written.events.first().map(|event| event.timestamp),
        sequence: written.sequence,
    };
    let registered =
        matches!(written.events.first().map(|event| &event.payload), Some(LedgerEvent::ProductRegistered(_)));
    if registered {
        answer.quantity = Some(0);
    }
    for event in &written.events {
        match &event.payload {
            LedgerEvent::ProductRegistered(ProductRegistered(details))
            | LedgerEvent::ProductRevised(ProductRevised(details)) => answer.details = Some(details.into()),
            LedgerEvent::InventoryUpdated(updated) => answer.quantity = Some(updated.new_quantity),
            LedgerEvent::ProductUpdated(updated) if !registered => {
                answer.changed_fields.clone_from(&updated.changed_fields);
            }
            _ => {}
        }
    }
    answer.is_available = answer.quantity.map(is_available);
    answer
}

impl From<&ProductDetails> for WrittenDetails {
    fn from(details: &ProductDetails) -> Self {
        Self {
            sku: details.sku.to_string(),
            name: details.name.clone(),
            category: details.category.clone(),
            low_stock_threshold: details.low_stock_threshold,
            active: details.active,
        }
    }
}
