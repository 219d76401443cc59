//! Reads of the projection: products, stock, history, decisions.
//!
//! Products and lists come through the cache; what is asked for rarely or has too many forms (a past moment, a history, a
//! decision) comes from Postgres. Every answer says at which sequence of the ledger it was so (`Lomash-Sequence`), and
//! none is older than `Lomash-Min-Sequence` asks for.

use std::future::Future;

use axum::extract::State;
use axum::http::header::ETAG;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use lomash_contract::limits::{MAX_NAME_CHARS, MAX_SKU_CHARS};
use lomash_contract::{OrderId, ProductId, Timestamp, Trigger};
use lomash_platform::reader::Unreadable;
use lomash_web::extract::check_text;
use lomash_web::sequences::{
    LOMASH_SEQUENCE, RETRY_AFTER_SECONDS, min_sequence, not_yet_projected, sequence, told, unreached,
};
use lomash_web::{Caller, Path, Problem, Query, Viewer, cursor, sequences};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::problems::{NOT_YET_REGISTERED, ORDER_NOT_DECIDED, PRODUCT_NOT_FOUND, ReadProblems, sentence};
use super::{Api, preconditions};
use crate::cache::Key;
use crate::projected::NotYetProjected;
use crate::reads::{
    AsOf, At, DEFAULT_PAGE, Decision, HistoryQuery, MAX_PAGE, Movement, NotFound, Page, Product, ProductFilter,
    ProductKey, ProductQuery, QueryError,
};

const NANOSECONDS_OF_A_MILLISECOND: u32 = 1_000_000;

/// A page of products.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProductPage {
    /// The products.
    items: Vec<Product>,
    /// The `cursor` of the next page; null when this is the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// A page of a product's history.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct HistoryPage {
    /// The changes.
    items: Vec<Movement>,
    /// The `cursor` of the next page; null when this is the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// The stock of a product, now or at a past moment.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct Stock {
    /// The product.
    product_id: Uuid,
    /// Its stock-keeping unit, as it is today.
    sku: String,
    /// Units in stock.
    quantity: u32,
    /// Whether there is any.
    is_available: bool,
    /// Now: the product's version. At a past moment: the sequence of the event that had made the stock so.
    version: u64,
    /// When the server stored the event of that sequence.
    #[schema(value_type = String, format = DateTime)]
    updated_at: Timestamp,
}

/// Which products, in which order, and which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListParameters {
    /// Of exactly this category.
    #[param(max_length = 200)]
    category: Option<String>,
    /// With any stock, or with none.
    available: Option<bool>,
    /// With a stock at or below the low-stock threshold, or above.
    below_threshold: Option<bool>,
    /// For sale, or not.
    active: Option<bool>,
    /// With exactly this stock-keeping unit.
    #[param(max_length = 64)]
    sku: Option<String>,
    /// With words that begin so in sku or name, all of them, whatever their case and in either form of Unicode. Words beyond
    /// the first 8 are not looked for; at least one must have a letter or digit.
    #[param(max_length = 200)]
    q: Option<String>,
    /// `sku` (default), `name`, `quantity` or `updated`; with a leading `-` from the largest to the smallest.
    sort: Option<String>,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u16>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// At which moment.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct AsOfParameter {
    /// An instant (RFC 3339, by the server's clock) or a sequence of the ledger; now when it is left out. One that is still to
    /// come, or beyond the end of the ledger, is refused.
    #[param(example = "2026-01-31T09:30:00Z")]
    as_of: Option<String>,
}

/// Which page of a history.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct HistoryParameters {
    /// Only of this trigger: `ORDER_CONFIRMED`, `ADMIN_UPDATE` or `SCHEDULED_SYNC`.
    #[param(value_type = Option<String>)]
    trigger: Option<Trigger>,
    /// From the first change to the last; otherwise from the last to the first.
    #[serde(default)]
    oldest_first: bool,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u16>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

#[utoipa::path(
    get, path = "/v1/products/{productId}", tag = "products", operation_id = "getProduct",
    summary = "A product with its stock",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
        ("If-None-Match" = Option<String>, Header, description = "304 when the product is at this version"),
    ),
    responses(
        (status = 200, description = "The product; its version is the ETag", body = Product),
        (status = 304, description = "It is at that version still"),
        ReadProblems
    )
)]
pub(super) async fn product(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let At { sequence, value } = cached_product(&api, caller, product_id, min_sequence(&headers)?).await?;
    tagged(&headers, sequence, value.version, &value)
}

#[utoipa::path(
    get, path = "/v1/products", tag = "products", operation_id = "listProducts",
    summary = "Products by category, availability, threshold, sku or words",
    params(
        ListParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "A page", body = ProductPage), ReadProblems)
)]
pub(super) async fn products(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(parameters): Query<ListParameters>,
) -> Result<Response, Problem> {
    let ListParameters { category, available, below_threshold, active, sku, q, sort, limit, cursor } = parameters;
    let words = q.map(|text| text.parse().map_err(|problem| invalid("q", &problem))).transpose()?;
    let filter = ProductFilter { category, available, below_threshold, active, sku, words };
    check_text("category", filter.category.as_deref(), MAX_NAME_CHARS)?;
    check_text("sku", filter.sku.as_deref(), MAX_SKU_CHARS)?;
    let sort =
        sort.map(|text| text.parse().map_err(|problem| invalid("sort", &problem))).transpose()?.unwrap_or_default();
    let list = ("products", &filter, sort);
    let after: Option<ProductKey> = cursor.map(|cursor| cursor::open(&list, &cursor)).transpose()?;
    let query = ProductQuery {
        limit: sequences::page_limit(limit, DEFAULT_PAGE, MAX_PAGE)?,
        after,
        sort,
        filter: filter.clone(),
    };
    let text = serde_json::to_string(&query).map_err(Problem::internal)?;
    let key = if filter.is_empty() { Key::list(&text) } else { Key::filter(&text) };
    let min = min_sequence(&headers)?;
    let load = async {
        wait(&api, caller, min).await?;
        at_least(api.reads.products(&query).await, min)
    };
    let At { sequence, value } = api.cache.read_through(&key, min, load).await.map_err(unanswered)?;
    let Page { items, next } = value;
    let next_cursor = next.map(|next| cursor::seal(&list, &next)).transpose()?;
    Ok(told(sequence, &ProductPage { items, next_cursor }))
}

#[utoipa::path(
    get, path = "/v1/products/{productId}/inventory", tag = "inventory", operation_id = "getInventory",
    summary = "The stock of a product, now or at a past moment",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        AsOfParameter,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
        ("If-None-Match" = Option<String>, Header, description = "304 when the product is at this version"),
    ),
    responses(
        (status = 200, description = "The stock; of now, the product's version is the ETag", body = Stock),
        (status = 304, description = "It is at that version still"),
        ReadProblems
    )
)]
pub(super) async fn inventory(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Query(AsOfParameter { as_of }): Query<AsOfParameter>,
) -> Result<Response, Problem> {
    let min = min_sequence(&headers)?;
    let Some(as_of) = as_of else {
        let At { sequence, value } = cached_product(&api, caller, product_id, min).await?;
        let Product { sku, quantity, is_available, version, updated_at, .. } = value;
        let stock =
            Stock { product_id: product_id.0, sku: sku.to_string(), quantity, is_available, version, updated_at };
        return tagged(&headers, sequence, version, &stock);
    };
    let as_of = moment(&as_of)?;
    let last = api.waiting.end().await.map_err(|problem| {
        tracing::warn!(problem, "the end of the ledger is not known");
        Problem::unavailable("The end of the ledger is not known just now.", RETRY_AFTER_SECONDS)
    })?;
    // What the answer rests on must be projected: at an instant, all that is stored by now.
    let rests_on = match as_of {
        AsOf::Sequence(sequence) => within("asOf", sequence, last)?,
        AsOf::Instant(_) => last,
    };
    let min = Some(rests_on.max(min.unwrap_or(0)));
    wait(&api, caller, min).await.map_err(unanswered)?;
    let found = at_least(api.reads.stock_as_of(product_id, as_of).await, min);
    let At { sequence, value } = found.map_err(unanswered)?;
    let stock = Stock {
        product_id: product_id.0,
        sku: value.sku.to_string(),
        quantity: value.quantity,
        is_available: value.is_available,
        version: value.sequence,
        updated_at: value.since,
    };
    Ok(told(sequence, &stock))
}

#[utoipa::path(
    get, path = "/v1/products/{productId}/inventory/history", tag = "inventory", operation_id = "getHistory",
    summary = "Every change of a product's stock: who, why, what triggered it",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        HistoryParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "A page", body = HistoryPage), ReadProblems)
)]
pub(super) async fn history(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Query(parameters): Query<HistoryParameters>,
) -> Result<Response, Problem> {
    let HistoryParameters { trigger, oldest_first, limit, cursor } = parameters;
    let list = ("history", product_id, trigger, oldest_first);
    let after: Option<u64> = cursor.map(|cursor| cursor::open(&list, &cursor)).transpose()?;
    let query =
        HistoryQuery { oldest_first, after, trigger, limit: sequences::page_limit(limit, DEFAULT_PAGE, MAX_PAGE)? };
    let min = min_sequence(&headers)?;
    let page = found(&api, caller, min, || api.reads.history(product_id, &query)).await;
    let At { sequence, value: Page { items, next } } = page.map_err(unanswered)?;
    let next_cursor = next.map(|next| cursor::seal(&list, &next)).transpose()?;
    Ok(told(sequence, &HistoryPage { items, next_cursor }))
}

#[utoipa::path(
    get, path = "/v1/orders/{orderId}/decision", tag = "orders", operation_id = "getDecision",
    summary = "What happened to an order, and why",
    params(
        ("orderId" = Uuid, Path, description = "The order"),
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "The decision", body = Decision), ReadProblems)
)]
pub(super) async fn decision(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    Path(order_id): Path<OrderId>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let min = min_sequence(&headers)?;
    let At { sequence, value } = found(&api, caller, min, || api.reads.decision(order_id)).await.map_err(unanswered)?;
    Ok(told(sequence, &value))
}

async fn cached_product(
    api: &Api,
    caller: Caller,
    product_id: ProductId,
    min: Option<u64>,
) -> Result<At<Product>, Problem> {
    let load = found(api, caller, min, || api.reads.product(product_id));
    api.cache.read_through(&Key::product(product_id), min, load).await.map_err(unanswered)
}

/// Waits until the projection has what is asked for.
async fn wait(api: &Api, caller: Caller, min: Option<u64>) -> Result<(), QueryError> {
    if let Some(min) = min {
        // Of what this replica knows nobody needs to be asked.
        api.waiting.saw_end(api.writer.committer().sequence());
        api.waiting.reach(caller.subject, min).await?;
    }
    Ok(())
}

/// Reads what may not be there. Only a projection that has seen all that this replica knows may say that it is not: one
/// that is behind, or is being filled anew, is waited for and asked again.
async fn found<T, F>(api: &Api, caller: Caller, min: Option<u64>, read: impl Fn() -> F) -> Result<At<T>, QueryError>
where
    F: Future<Output = Result<At<T>, QueryError>>,
{
    wait(api, caller, min).await?;
    let known = api.writer.committer().sequence();
    match read().await {
        Err(QueryError::NotFound { sequence, .. }) if sequence < known => {
            wait(api, caller, Some(known)).await?;
            at_least(read().await, Some(known.max(min.unwrap_or(0))))
        }
        read => at_least(read, min),
    }
}

/// An answer of before what is asked for is none, and neither is "not found".
fn at_least<T>(found: Result<At<T>, QueryError>, min: Option<u64>) -> Result<At<T>, QueryError> {
    let wanted = min.unwrap_or(0);
    match found {
        Ok(at) => Ok(at.at_least(wanted)?),
        Err(QueryError::NotFound { sequence, .. }) if sequence < wanted => {
            Err(NotYetProjected { wanted, reached: sequence }.into())
        }
        Err(problem) => Err(problem),
    }
}

pub(super) fn unanswered(problem: QueryError) -> Problem {
    match problem {
        QueryError::NotFound { what, .. } => {
            let kind = match what {
                NotFound::Product(_) => &PRODUCT_NOT_FOUND,
                NotFound::NotYetRegistered { .. } => &NOT_YET_REGISTERED,
                NotFound::Decision(_) => &ORDER_NOT_DECIDED,
            };
            Problem::new(kind, sentence(&what.to_string()))
        }
        QueryError::NotYet(not_yet) => not_yet_projected(not_yet),
        QueryError::Unreached(why) => unreached(why),
        QueryError::OtherSort => Problem::invalid_parameter("cursor", "continues a list that was sorted otherwise"),
        QueryError::Unavailable(Unreadable { what, cause }) => {
            tracing::warn!(what, cause, "a read was not answered");
            Problem::unavailable(sentence(&format!("{what} cannot be read just now")), RETRY_AFTER_SECONDS)
        }
    }
}

const MOMENTS: &str = "must be an RFC 3339 instant such as 2026-01-31T09:30:00Z, or a sequence of the ledger";

/// A sequence that the ledger has. One beyond its end is no moment to be waited for: nobody was told of it, and most are
/// dates that lack their time.
fn within(name: &'static str, sequence: u64, last: u64) -> Result<u64, Problem> {
    if sequence <= last {
        return Ok(sequence);
    }
    let date = if looks_like_a_date(sequence) { "looks like a date and " } else { "" };
    let detail = format!("{date}is beyond the end of the ledger, which is at sequence {last}; {MOMENTS}");
    Err(Problem::invalid_parameter(name, detail).with("end", last))
}

/// A year, a month or a day written as a number, or seconds or milliseconds since 1970.
fn looks_like_a_date(number: u64) -> bool {
    const YEARS: std::ops::RangeInclusive<u64> = 1900..=2999;
    let year_and_month = |number: u64| YEARS.contains(&(number / 100)) && (1..=12).contains(&(number % 100));
    YEARS.contains(&number)
        || year_and_month(number)
        || (year_and_month(number / 100) && (1..=31).contains(&(number % 100)))
        || (1_000_000_000..10_000_000_000).contains(&number)
        || (1_000_000_000_000..10_000_000_000_000).contains(&number)
}

fn moment(text: &str) -> Result<AsOf, Problem> {
    if let Some(sequence) = sequence(text) {
        return Ok(AsOf::Sequence(sequence));
    }
    let bad = |detail| Problem::invalid_parameter("asOf", detail);
    let instant = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| bad(MOMENTS))?;
    if instant > OffsetDateTime::now_utc() {
        return Err(bad("is still to come"));
    }
    if !(0..=9999).contains(&instant.year()) {
        return Err(bad("must be of the years 0 to 9999"));
    }
    // Answers tell instants in milliseconds: one in whole milliseconds means to the end of it, so that what an answer
    // told of can be asked for by the instant it told.
    let is_whole = instant.nanosecond() % NANOSECONDS_OF_A_MILLISECOND == 0;
    let rest = if is_whole {
        time::Duration::nanoseconds((NANOSECONDS_OF_A_MILLISECOND - 1).into())
    } else {
        time::Duration::ZERO
    };
    Ok(AsOf::Instant(instant.saturating_add(rest)))
}

fn invalid(name: &str, problem: &dyn std::fmt::Display) -> Problem {
    Problem::invalid_parameter(name, problem.to_string())
}

/// An answer about a product at a version.
fn tagged(headers: &HeaderMap, sequence: u64, version: u64, body: &impl Serialize) -> Result<Response, Problem> {
    let mut response = if preconditions::is_known(headers, version)? {
        let mut response = StatusCode::NOT_MODIFIED.into_response();
        response.headers_mut().insert(LOMASH_SEQUENCE.clone(), HeaderValue::from(sequence));
        response
    } else {
        told(sequence, body)
    };
    response.headers_mut().insert(ETAG, preconditions::etag(version));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_of_the_ledger_and_no_date() {
        assert_eq!(within("asOf", 2026, 2026).ok(), Some(2026));
        for (number, is_date) in [
            (2026, true),
            (202_611, true),
            (20_261_130, true),
            (1_796_000_000, true),
            (1_796_000_000_000, true),
            (5_000, false),
            (202_613, false),
            (20_261_132, false),
            (u64::MAX >> 1, false),
        ] {
            let problem = within("asOf", number, 17).expect_err("beyond the end");
            let told = problem.document().errors[0].detail.clone();
            assert_eq!(told.contains("looks like a date"), is_date, "{number}: {told}");
            assert!(told.contains("at sequence 17") && told.contains("RFC 3339"), "{told}");
        }
        for text in [
            "",
            "2026-11-30",
            "2026-11-30 09:30",
            "-1",
            "+5",
            "1e3",
            "now",
            "99999999999999999999",
            "2026-13-01T00:00:00Z",
        ] {
            assert!(moment(text).is_err(), "{text}");
        }
    }
}
