//! The HTTP adapter: routes under `/v1/analytics`, thin over [`crate::reads`].
//!
//! Owns what a request must look like and which answer says what. Tokens, limits and the form of problems are
//! `lomash_web`'s. Every answer says as of which sequence of the ledger it is (`Lomash-Sequence`), and none is older than
//! `Lomash-Min-Sequence` asks for. The OpenAPI document is made from the handlers ([`document`]); the copy in
//! `docs/openapi-analytics.json` is kept equal by a test.

mod queries;

use std::sync::Arc;

use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use lomash_platform::projected::Waiting;
use lomash_web::openapi::{tell_problem_types, tell_sequence, tell_usual_headers};
use lomash_web::problem::{MEDIA_TYPE, ProblemDocument, ProblemType};
use lomash_web::routes::BearerScheme;
use lomash_web::{Gate, HttpConfig, Verifier, limits};
use utoipa::OpenApi;
use utoipa::openapi::RefOr;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::reads::Reads;

pub use self::queries::{MAX_DAILY_RANGE_DAYS, MAX_SUMMARY_RANGE_DAYS};

/// 404: no such product.
pub static PRODUCT_NOT_FOUND: ProblemType = ProblemType::new(
    "product-not-found",
    StatusCode::NOT_FOUND,
    "No such product",
    "No product is registered under the id, as of `sequence`.",
);

/// Every problem type of this service.
pub static PROBLEM_TYPES: &[&ProblemType] = &[&PRODUCT_NOT_FOUND];

/// What the handlers work with.
#[derive(Clone)]
pub struct Api {
    /// The metrics.
    pub reads: Reads,
    /// Who waits for them.
    pub waiting: Waiting,
}

/// All routes but those of health, which are there before.
pub fn routes(api: Api, verifier: Arc<Verifier>, config: &HttpConfig) -> Router {
    let (routes, _) = documented_routes().split_for_parts();
    let routes = limits::time_limited(routes, config.request_timeout());
    let gate = Gate::new(verifier, &config.rates);
    let document = document();
    let open = Router::new().route("/openapi.json", get(move || std::future::ready(Json(document.clone()))));
    gate.guard(routes).with_state(api).merge(open)
}

fn documented_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(queries::stock_levels))
        .routes(routes!(queries::low_stock))
        .routes(routes!(queries::daily))
        .routes(routes!(queries::summary))
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = documented_routes().split_for_parts().1;
    tell_problem_types(&mut document, PROBLEM_TYPES);
    for operation in document.paths.paths.values_mut().filter_map(|item| item.get.as_mut()) {
        for (status, response) in &mut operation.responses.responses {
            let RefOr::T(response) = response else { continue };
            if !response.content.contains_key(MEDIA_TYPE) {
                tell_sequence(response);
            }
            tell_usual_headers(status, response);
        }
    }
    document
}

/// The frame of the OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lomash Inventory: analytics",
        description = "Stock metrics folded from the ledger. A day is a UTC day of the ledger's store time. \
                       Errors are RFC 9457 problems; branch on `type`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "/", description = "Where this document was read")),
    tags((name = "analytics", description = "Stock levels, low stock, and what happened day by day")),
    components(schemas(ProblemDocument)),
    security(("bearer" = [])),
    modifiers(&BearerScheme)
)]
struct Document;
