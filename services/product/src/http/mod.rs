//! The HTTP adapter: routes under `/v1`, thin over the writer, the read model and reconciliation.
//!
//! Owns what a request must look like and which answer says what. Decides nothing: a write becomes a command that is
//! committed like any order, a read is a row of the projection. Tokens, limits and the form of problems are
//! `lomash_web`'s. The OpenAPI document is made from the handlers ([`document`]); the copy in `docs/openapi.json` is
//! kept equal by a test.

mod dead_letters;
mod imports;
mod inventory;
mod openapi;
mod preconditions;
mod problems;
mod products;
mod queries;
mod reconciliations;
mod stream;
mod writes;

use std::sync::Arc;
use std::time::Duration;

use axum::routing::get;
use axum::{Json, Router};
use lomash_ledger::JetStreamLedger;
use lomash_ledger::dead_letter::Letters;
use lomash_web::routes::BearerScheme;
use lomash_web::{Gate, HttpConfig, Verifier, limits};
use tokio_util::sync::CancellationToken;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub use self::imports::{IMPORT_TIMEOUT, Imports, MAX_BODY_BYTES, MAX_IMPORTS, MAX_IMPORTS_OF_ONE, MAX_ROWS};
pub use self::problems::TYPES as PROBLEM_TYPES;
pub use self::stream::STREAM_LIFETIME;
use crate::cache::Cache;
use crate::commands::Writer;
use crate::feed::Feed;
use crate::projected::{Projected, Waiting};
use crate::reads::Reads;
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
    /// The read model.
    pub reads: Reads,
    /// How far it is.
    pub projected: Projected,
    /// What was asked of it before.
    pub cache: Cache,
    /// Who waits for the projection.
    pub waiting: Waiting,
    /// The live stream.
    pub feed: Feed,
    /// Places of imports.
    pub imports: Imports,
    /// Where reconciliation runs are asked for.
    pub reconciliation: Reconciliation,
    /// Messages that could not be handled.
    pub dead_letters: Letters,
    /// Cancelled when the process stops: what has no end ends then.
    pub stop: CancellationToken,
}

/// All routes but those of health, which are there before.
pub fn routes(api: Api, verifier: Arc<Verifier>, config: &HttpConfig) -> Router {
    let (ordinary, _) = ordinary_routes().split_for_parts();
    let ordinary = limits::time_limited(ordinary, config.request_timeout());
    let (imports, _) = import_routes().split_for_parts();
    let gate = Gate::new(verifier, &config.rates);
    let document = document();
    let open = Router::new().route("/openapi.json", get(move || std::future::ready(Json(document.clone()))));
    gate.guard(ordinary.merge(imports)).with_state(api).merge(open)
}

/// Routes that answer within the ordinary time.
fn ordinary_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(queries::products, products::register))
        .routes(routes!(queries::product, products::amend))
        .routes(routes!(queries::inventory, inventory::set_quantity))
        .routes(routes!(queries::history))
        .routes(routes!(queries::decision))
        .routes(routes!(stream::stream))
        .routes(routes!(inventory::adjust))
        .routes(routes!(inventory::record_count))
        .routes(routes!(reconciliations::start, reconciliations::list))
        .routes(routes!(reconciliations::show))
        .routes(routes!(reconciliations::decide))
        .routes(routes!(dead_letters::list))
        .routes(routes!(dead_letters::show))
        .routes(routes!(dead_letters::redrive))
}

/// Routes with limits of their own.
fn import_routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(imports::import_products)).routes(routes!(imports::import_counts))
}

/// The OpenAPI document of all routes.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    let mut document = ordinary_routes().merge(import_routes()).split_for_parts().1;
    openapi::complete(&mut document);
    document
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
    servers((url = "/", description = "Where this document was read")),
    tags(
        (name = "products", description = "The catalogue: what there is to sell, and imports of it"),
        (name = "inventory", description = "Stock: what there is, what changed it, and changing it"),
        (name = "orders", description = "What became of orders"),
        (name = "reconciliation", description = "Counts, and the runs that correct the stock by them"),
        (name = "dead letters", description = "Messages that could not be handled, and bringing them back")
    ),
    components(schemas(lomash_web::problem::ProblemDocument)),
    security(("bearer" = [])),
    modifiers(&BearerScheme)
)]
struct Document;
