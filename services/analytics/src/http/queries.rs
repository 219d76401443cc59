//! The four reads.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use lomash_contract::ProductId;
use lomash_contract::limits::{MAX_NAME_CHARS, MAX_SKU_CHARS};
use lomash_platform::projected::NotYetProjected;
use lomash_platform::reader::Unreadable;
use lomash_web::extract::check_text;
use lomash_web::openapi::ListProblems;
use lomash_web::problem::sentence;
use lomash_web::sequences::{RETRY_AFTER_SECONDS, min_sequence, not_yet_projected, page_limit, told, unreached};
use lomash_web::{Caller, Path, Problem, Query, Viewer, cursor};
use serde::{Deserialize, Serialize};
use time::macros::format_description;
use time::{Date, Duration, OffsetDateTime};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::{Api, PRODUCT_NOT_FOUND};
use crate::reads::{
    At, DEFAULT_PAGE, DayOfProduct, LevelKey, LowKey, MAX_PAGE, MAX_WINDOW_DAYS, Page, QueryError, StockLevel,
    StockLevelFilter, StockLevelQuery, Summary,
};
use crate::stock_metrics::{WINDOW_DAYS, day_of};

/// Longest range of days of one product: ten years.
pub const MAX_DAILY_RANGE_DAYS: i64 = 3_660;

/// Longest range of a summary, whose days are not paged: a year.
pub const MAX_SUMMARY_RANGE_DAYS: i64 = 366;

/// A page of stock levels.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct StockLevelPage {
    /// The products.
    items: Vec<StockLevel>,
    /// The `cursor` of the next page; null when this is the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// A page of days of a product.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct DailyPage {
    /// The product.
    product_id: Uuid,
    /// Its days, each one from the first to the last: also those on which nothing happened, none before it joined and none
    /// that is still to come.
    items: Vec<DayOfProduct>,
    /// The `cursor` of the next page; null when this is the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// Which products, in which order, and which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct StockLevelParameters {
    /// Of exactly this category.
    #[param(max_length = 200)]
    category: Option<String>,
    /// With exactly this stock-keeping unit.
    #[param(max_length = 64)]
    sku: Option<String>,
    /// With any stock, or with none.
    available: Option<bool>,
    /// With a stock at or below the low-stock threshold, or above.
    below_threshold: Option<bool>,
    /// For sale, or not.
    active: Option<bool>,
    /// `sku` (default), `name` or `quantity`; with a leading `-` from the largest to the smallest.
    sort: Option<String>,
    /// Days of the window over which velocity is measured, today included.
    #[param(minimum = 1, maximum = 365, default = 28)]
    window_days: Option<u16>,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u16>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LowStockParameters {
    /// Days of the window over which velocity is measured, today included.
    #[param(minimum = 1, maximum = 365, default = 28)]
    window_days: Option<u16>,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u16>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// Which days, and which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct DailyParameters {
    /// The first day, UTC; 27 days before the last one when it is left out. At most ten years before it.
    #[param(example = "2026-01-01", format = Date)]
    from: Option<String>,
    /// The last day, UTC; today when it is left out.
    #[param(example = "2026-01-31", format = Date)]
    to: Option<String>,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u16>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// Which days.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SummaryParameters {
    /// The first day, UTC; 27 days before the last one when it is left out. At most a year before it.
    #[param(example = "2026-01-01", format = Date)]
    from: Option<String>,
    /// The last day, UTC; today when it is left out.
    #[param(example = "2026-01-31", format = Date)]
    to: Option<String>,
}

#[utoipa::path(
    get, path = "/v1/analytics/stock-levels", tag = "analytics", operation_id = "listStockLevels",
    summary = "Stock of products, how fast they sell, and how long it lasts",
    params(
        StockLevelParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "A page", body = StockLevelPage), ListProblems)
)]
pub(super) async fn stock_levels(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(parameters): Query<StockLevelParameters>,
) -> Result<Response, Problem> {
    let StockLevelParameters { category, sku, available, below_threshold, active, sort, window_days, limit, cursor } =
        parameters;
    check_text("category", category.as_deref(), MAX_NAME_CHARS)?;
    check_text("sku", sku.as_deref(), MAX_SKU_CHARS)?;
    let filter = StockLevelFilter { category, sku, available, below_threshold, active };
    let sort = sort
        .map(|text| text.parse())
        .transpose()
        .map_err(|problem: crate::reads::InvalidSort| Problem::invalid_parameter("sort", problem.to_string()))?
        .unwrap_or_default();
    let window_days = window(window_days)?;
    let list = ("stock-levels", &filter, sort);
    let after: Option<LevelKey> = cursor.map(|cursor| cursor::open(&list, &cursor)).transpose()?;
    let limit = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)?;
    let query = StockLevelQuery { filter: filter.clone(), sort, after, limit, window_days };
    let min = reached(&api, caller, &headers).await?;
    let At { sequence, value } = at_least(api.reads.stock_levels(&query, OffsetDateTime::now_utc()).await, min)?;
    let Page { items, next } = value;
    let next_cursor = next.map(|next| cursor::seal(&list, &next)).transpose()?;
    Ok(told(sequence, &StockLevelPage { items, next_cursor }))
}

#[utoipa::path(
    get, path = "/v1/analytics/low-stock", tag = "analytics", operation_id = "listLowStock",
    summary = "Products for sale at or below their low-stock threshold, the most urgent first",
    description = "By days of cover, then by velocity from fast to slow, then by units in stock; what does not sell comes \
                   last. Of more than 2,000 products that are low, those with the fewest units are looked at.",
    params(
        LowStockParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "A page", body = StockLevelPage), ListProblems)
)]
pub(super) async fn low_stock(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(LowStockParameters { window_days, limit, cursor }): Query<LowStockParameters>,
) -> Result<Response, Problem> {
    let window_days = window(window_days)?;
    let list = ("low-stock", window_days);
    let after: Option<LowKey> = cursor.map(|cursor| cursor::open(&list, &cursor)).transpose()?;
    let limit = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)?;
    let min = reached(&api, caller, &headers).await?;
    let found = api.reads.low_stock(window_days, after.as_ref(), limit, OffsetDateTime::now_utc()).await;
    let At { sequence, value: Page { items, next } } = at_least(found, min)?;
    let next_cursor = next.map(|next| cursor::seal(&list, &next)).transpose()?;
    Ok(told(sequence, &StockLevelPage { items, next_cursor }))
}

#[utoipa::path(
    get, path = "/v1/analytics/products/{productId}/daily", tag = "analytics", operation_id = "getDaily",
    summary = "What happened to a product, day by day",
    params(
        ("productId" = Uuid, Path, description = "The product"),
        DailyParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses(
        (status = 200, description = "A page", body = DailyPage),
        (status = 404, description = "There is no such product", body = lomash_web::problem::ProblemDocument,
         content_type = "application/problem+json"),
        ListProblems
    )
)]
pub(super) async fn daily(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    Path(product_id): Path<ProductId>,
    headers: HeaderMap,
    Query(DailyParameters { from, to, limit, cursor }): Query<DailyParameters>,
) -> Result<Response, Problem> {
    let now = OffsetDateTime::now_utc();
    let (from, to) = range(from.as_deref(), to.as_deref(), day_of(now), MAX_DAILY_RANGE_DAYS)?;
    let list = ("daily", product_id);
    // The cursor holds the range, too: without one asked for, the next page could be of another day's range.
    let (first, last) = match cursor {
        Some(cursor) => {
            let (first, last): (i32, i32) = cursor::open(&list, &cursor)?;
            let day =
                |number| Date::from_julian_day(number).map_err(|_| Problem::invalid_parameter("cursor", "is none"));
            (day(first)?, day(last)?)
        }
        None => (from, to),
    };
    let limit = page_limit(limit, DEFAULT_PAGE, MAX_PAGE)?;
    let min = reached(&api, caller, &headers).await?;
    let found = api.reads.daily(product_id, (first, last.min(day_of(now))), limit, now).await;
    let At { sequence, value: Page { items, next } } = at_least(found, min)?;
    let next_cursor =
        next.map(|next| cursor::seal(&list, &(next.to_julian_day(), last.to_julian_day()))).transpose()?;
    Ok(told(sequence, &DailyPage { product_id: product_id.0, items, next_cursor }))
}

#[utoipa::path(
    get, path = "/v1/analytics/summary", tag = "analytics", operation_id = "getSummary",
    summary = "All products now, and what happened, in all and day by day",
    params(
        SummaryParameters,
        ("Lomash-Min-Sequence" = Option<u64>, Header, description = "Not older than this sequence of the ledger"),
    ),
    responses((status = 200, description = "The summary", body = Summary), ListProblems)
)]
pub(super) async fn summary(
    Viewer(caller): Viewer,
    State(api): State<Api>,
    headers: HeaderMap,
    Query(SummaryParameters { from, to }): Query<SummaryParameters>,
) -> Result<Response, Problem> {
    let today = day_of(OffsetDateTime::now_utc());
    let range = range(from.as_deref(), to.as_deref(), today, MAX_SUMMARY_RANGE_DAYS)?;
    let min = reached(&api, caller, &headers).await?;
    let At { sequence, value } = at_least(api.reads.summary(range).await, min)?;
    Ok(told(sequence, &value))
}

/// Waits until the metrics are where the request wants them; the sequence that the answer must not be older than.
async fn reached(api: &Api, caller: Caller, headers: &HeaderMap) -> Result<u64, Problem> {
    let min = min_sequence(headers)?;
    if let Some(min) = min {
        api.waiting.reach(caller.subject, min).await.map_err(unreached)?;
    }
    Ok(min.unwrap_or(0))
}

/// An answer of before what is asked for is none, and neither is "not found".
fn at_least<T>(found: Result<At<T>, QueryError>, wanted: u64) -> Result<At<T>, Problem> {
    let sequence = match &found {
        Ok(At { sequence, .. }) | Err(QueryError::NoProduct { sequence, .. }) => *sequence,
        Err(_) => u64::MAX,
    };
    if sequence < wanted {
        return Err(not_yet_projected(NotYetProjected { wanted, reached: sequence }));
    }
    found.map_err(|problem| {
        let detail = sentence(&problem.to_string());
        match problem {
            QueryError::NoProduct { sequence, .. } => {
                Problem::new(&PRODUCT_NOT_FOUND, detail).with("sequence", sequence)
            }
            QueryError::NotYet(not_yet) => not_yet_projected(not_yet),
            QueryError::Unreadable(Unreadable { what, cause }) => {
                tracing::warn!(what, cause, "a read was not answered");
                Problem::unavailable(sentence(&format!("{what} cannot be read just now")), RETRY_AFTER_SECONDS)
            }
        }
    })
}

fn window(days: Option<u16>) -> Result<u16, Problem> {
    let days = days.unwrap_or(WINDOW_DAYS);
    if (1..=MAX_WINDOW_DAYS).contains(&days) {
        return Ok(days);
    }
    Err(Problem::invalid_parameter("windowDays", format!("must be from 1 to {MAX_WINDOW_DAYS}")))
}

/// The days asked for: by default the last [`WINDOW_DAYS`], today included.
fn range(from: Option<&str>, to: Option<&str>, today: Date, most: i64) -> Result<(Date, Date), Problem> {
    let to = to.map(|text| day("to", text)).transpose()?.unwrap_or(today);
    let default = || to.checked_sub(Duration::days(i64::from(WINDOW_DAYS) - 1)).unwrap_or(to);
    let from = from.map(|text| day("from", text)).transpose()?.unwrap_or_else(default);
    if from > to {
        return Err(Problem::invalid_parameter("from", "must not be after `to`"));
    }
    if (to - from).whole_days() >= most {
        return Err(Problem::invalid_parameter("from", format!("must be less than {most} days before `to`")));
    }
    Ok((from, to))
}

fn day(name: &str, text: &str) -> Result<Date, Problem> {
    let parsed = Date::parse(text, format_description!("[year]-[month]-[day]")).ok();
    let parsed = parsed.filter(|day| (0..=9999).contains(&day.year()) && text.len() == "2026-01-31".len());
    parsed.ok_or_else(|| Problem::invalid_parameter(name, "must be a day such as 2026-01-31"))
}
