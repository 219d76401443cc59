//! Routes of a service that answers from its first moment on: health and metrics at once, all else when the rest has
//! started.
//!
//! Health and metrics are on a listener of their own, which nothing that happens to the public one reaches. The public one
//! answers `/healthz` and `/readyz` too: a balancer asks the port that it balances. It has no `/metrics`.

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use lomash_platform::process::Tasks;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;
use utoipa::Modify;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};

use crate::problem::{no_such_method, no_such_route};
use crate::{Health, HttpConfig, Problem, Server, observed, server};

/// The routes of a service that is still starting: health is told at once, all else when it is [opened](Self::open).
#[derive(Clone, Debug, Default)]
pub struct Routes(Arc<OnceLock<Router>>);

impl Routes {
    /// Listens from now on, as one of `tasks` until `stop`, and tells what `health` says.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn serve(
        config: &HttpConfig,
        health: &Health,
        stop: CancellationToken,
        tasks: &mut Tasks,
    ) -> anyhow::Result<Self> {
        let routes = Self::default();
        let server = Server::bind(config).await?;
        let for_operators = Server::bind_health(config).await?;
        tasks.run(for_operators.serve(health_application(config, health), stop.clone()));
        tasks.run(server.serve(routes.application(config, health), stop));
        Ok(routes)
    }

    /// What the server serves from the first moment on.
    pub fn application(&self, config: &HttpConfig, health: &Health) -> Router {
        // As a fallback and not as a route for every path: what that captures would be a parameter of the routes behind.
        let later = any(later).with_state(self.clone());
        let open = server::with_known_routes(health.routes().method_not_allowed_fallback(no_such_method));
        server::framed(open.fallback_service(later), config)
    }

    /// From now on `routes` are there; what they do not know is answered with a problem.
    pub fn open(&self, routes: Router) {
        // A second opening would change nothing; there is none.
        let routes = routes.fallback(no_such_route).method_not_allowed_fallback(no_such_method);
        let _ = self.0.set(server::with_known_routes(routes));
    }
}

/// What the listener of health and metrics serves.
pub fn health_application(config: &HttpConfig, health: &Health) -> Router {
    server::application(health.routes().merge(observed::routes()), config)
}

async fn later(State(routes): State<Routes>, request: Request) -> Response {
    match routes.0.get() {
        Some(router) => match router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        },
        None => Problem::unavailable("The service is starting; /readyz says how far it is.", 1).into_response(),
    }
}

/// Puts the security scheme `bearer` into an OpenAPI document.
#[derive(Clone, Copy, Debug)]
pub struct BearerScheme;

impl Modify for BearerScheme {
    fn modify(&self, document: &mut OpenApi) {
        let mut bearer = Http::new(HttpAuthScheme::Bearer);
        bearer.bearer_format = Some("JWT".to_owned());
        bearer.description = Some("Role VIEWER reads, role ADMIN writes too.".to_owned());
        let components = document.components.get_or_insert_default();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    }
}
