//! The HTTP adapter: what was told, to whom it concerns, and what became of it. Reads only.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use lomash_web::openapi::ListProblems;
use lomash_web::problem::ProblemDocument;
use lomash_web::routes::BearerScheme;
use lomash_web::{Gate, HttpConfig, Problem, Query, Verifier, Viewer, cursor, limits, openapi};
use serde::{Deserialize, Serialize};
use utoipa::openapi::RefOr;
use utoipa::{IntoParams, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use uuid::Uuid;

use crate::alerts::{Alerts, MailFilter, Notification};

/// Most items of a page.
const MAX_LIMIT: u32 = 200;

/// Items of a page that does not say.
const DEFAULT_LIMIT: u32 = 50;

/// Seconds after which it is worth asking again while Postgres is away.
const RETRY_AFTER_SECONDS: u64 = 5;

/// What the handlers work with.
#[derive(Clone)]
pub struct Api {
    /// The alerts.
    pub alerts: Alerts,
}

/// Which alerts, and which page of them.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListParameters {
    /// Only those whose mail is so: `waiting`, `sent`, `failed`, or `none` for those without one.
    #[param(inline)]
    mail: Option<MailFilter>,
    /// Only those of this product.
    product_id: Option<Uuid>,
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

/// A page of alerts.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct NotificationPage {
    /// The alerts.
    items: Vec<Notification>,
    /// The `cursor` of the next page; null when this is the last.
    #[schema(required)]
    next_cursor: Option<String>,
}

/// All routes but those of health, which are there before.
pub fn routes(api: Api, verifier: Arc<Verifier>, config: &HttpConfig) -> Router {
    let (routes, _) = api_routes().split_for_parts();
    let routes = limits::time_limited(routes, config.request_timeout());
    let gate = Gate::new(verifier, &config.rates);
    let document = document();
    let open = Router::new().route("/openapi.json", get(move || std::future::ready(Json(document.clone()))));
    gate.guard(routes).with_state(api).merge(open)
}

fn api_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi()).routes(routes!(list))
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = api_routes().split_for_parts().1;
    openapi::tell_problem_types(&mut document, &[]);
    for item in document.paths.paths.values_mut() {
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            for (status, response) in &mut operation.responses.responses {
                if let RefOr::T(response) = response {
                    openapi::tell_usual_headers(status, response);
                }
            }
        }
    }
    document
}

/// The frame of the OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lomash Inventory: notifications",
        description = "Low-stock alerts, and what became of their notifications and mails. \
                       Errors are RFC 9457 problems; branch on `type`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "Where this document was read")),
    tags((name = "notifications", description = "Low-stock alerts, and what became of them")),
    components(schemas(ProblemDocument)),
    security(("bearer" = [])),
    modifiers(&BearerScheme)
)]
struct Document;

#[utoipa::path(
    get, path = "/v1/notifications", tag = "notifications", operation_id = "listNotifications",
    summary = "Alerts, from the newest on, with what became of them",
    params(ListParameters),
    responses((status = 200, description = "A page", body = NotificationPage), ListProblems)
)]
async fn list(
    _: Viewer,
    State(api): State<Api>,
    Query(parameters): Query<ListParameters>,
) -> Result<Json<NotificationPage>, Problem> {
    let ListParameters { mail, product_id, limit, cursor } = parameters;
    let limit = limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Problem::invalid_parameter("limit", format!("must be from 1 to {MAX_LIMIT}")));
    }
    let list = ("notifications", mail, product_id);
    let before: Option<u64> = cursor.map(|cursor| cursor::open(&list, &cursor)).transpose()?;
    let mut items = api.alerts.list(mail, product_id, before, limit + 1).await.map_err(|problem| {
        // What Postgres says is for the log.
        tracing::warn!(%problem, "alerts could not be listed");
        Problem::unavailable("The alerts cannot be reached just now.", RETRY_AFTER_SECONDS)
    })?;
    let has_more = items.len() > limit as usize;
    items.truncate(limit as usize);
    let last = items.last().filter(|_| has_more);
    let next_cursor = last.map(|last| cursor::seal(&list, &last.sequence)).transpose()?;
    Ok(Json(NotificationPage { items, next_cursor }))
}
