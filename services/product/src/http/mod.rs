//! The HTTP adapter: routes under `/v1`, thin over the writer, the read model and reconciliation.
//!
//! Owns what a request must look like and which answer says what. Decides nothing: a write becomes a command that is
//! committed like any order, a read is a row of the projection. Tokens, limits and the form of problems are
//! `lomash_web`'s. The OpenAPI document is made from the handlers ([`document`]); the copy in `docs/openapi.json` is
//! kept equal by a test.

mod inventory;
mod preconditions;
mod problems;
mod products;
mod reconciliations;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use axum::{Json, Router};
use lomash_ledger::JetStreamLedger;
use lomash_web::{Gate, Health, HttpConfig, Verifier, limits, server};
use tokio_util::sync::CancellationToken;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::commands::Writer;
use crate::reconciliation::run::Reconciliation;

/// Longest that a write waits for its decision. Beyond it its outcome is unknown, and the answer says so: within the 5 s
/// in which a service that is cut off from NATS must answer.
pub const WRITE_TIMEOUT: Duration = Duration::from_millis(4_500);

/// What the handlers work with.
#[derive(Clone)]
pub struct Api {
    /// Where commands go.
    pub writer: Writer,
    /// Where answers to repeated requests are read back from.
    pub ledger: JetStreamLedger,
    /// Where reconciliation runs are asked for.
    pub reconciliation: Reconciliation,
    /// Cancelled when the process stops: what has no end ends then.
    pub stop: CancellationToken,
}

/// All routes with what stands before them.
///
/// # Errors
/// When the configuration of tokens is bad.
pub async fn application(
    api: Api,
    config: &HttpConfig,
    health: &Health,
    stop: CancellationToken,
) -> anyhow::Result<Router> {
    let verifier = Verifier::start(&config.tokens, health, stop).await?;
    Ok(assemble(api, config, health, verifier))
}

fn assemble(api: Api, config: &HttpConfig, health: &Health, verifier: Arc<Verifier>) -> Router {
    let (ordinary, document) = ordinary_routes().split_for_parts();
    let ordinary = limits::time_limited(ordinary, config.request_timeout());
    let gate = Gate::new(verifier, &config.rates);
    let open =
        Router::new().route("/openapi.json", axum::routing::get(move || std::future::ready(Json(document.clone()))));
    server::application(gate.guard(ordinary).with_state(api).merge(open).merge(health.routes()), config)
}

/// Routes that answer within the ordinary time.
fn ordinary_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(products::register))
        .routes(routes!(products::amend))
        .routes(routes!(inventory::set_quantity))
        .routes(routes!(inventory::adjust))
        .routes(routes!(inventory::record_count))
        .routes(routes!(reconciliations::start, reconciliations::list))
        .routes(routes!(reconciliations::show))
        .routes(routes!(reconciliations::decide))
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    ordinary_routes().split_for_parts().1
}

/// The frame of the OpenAPI document.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Lomash Inventory",
        description = "Stock of kitchens and bedrooms: what there is, why, and how it came to be. \
                       Errors are RFC 9457 problems; branch on `type`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(lomash_web::problem::ProblemDocument)),
    security(("bearer" = [])),
    modifiers(&Bearer)
)]
struct Document;

struct Bearer;

impl Modify for Bearer {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.bearer_format = Some("JWT".to_owned());
        bearer.description = Some("Role VIEWER reads, role ADMIN writes too.".to_owned());
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}
