//! What every HTTP adapter of the platform needs and none should write again: problems (RFC 9457), bearer tokens and
//! roles, limits, cursors, health, and the server loop.
//!
//! Knows nothing of products or orders. A service brings its routes and gets back an application that refuses what
//! it should, always as a problem:
//!
//! ```ignore
//! let verifier = Verifier::start(&config.service.http.tokens, stop.clone()).await?;
//! let gate = Gate::new(verifier, &config.service.http.rates);
//! let v1 = limits::time_limited(routes(), config.service.http.request_timeout());
//! let app = server::application(gate.guard(v1).merge(health.routes()), &config.service.http);
//! let server = Server::bind(&config.service.http).await?;
//! server.serve(app, health.drop_first(asked, config.service.http.stop_delay())).await;
//! ```

pub mod auth;
pub mod config;
pub mod cursor;
pub mod extract;
pub mod health;
mod jwks;
pub mod limits;
mod observed;
pub mod openapi;
pub mod problem;
pub mod routes;
pub mod sequences;
pub mod server;

pub use auth::{Admin, Caller, Gate, Role, Verifier, Viewer};
pub use config::{HttpConfig, RateConfig, ServiceConfig, TokenConfig};
pub use extract::{Body, Path, Query};
pub use health::Health;
pub use problem::{Problem, ProblemType};
pub use routes::Routes;
pub use server::Server;
