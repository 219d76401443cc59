//! What every HTTP adapter of the platform needs and none should write again: problems (RFC 9457), bearer tokens and
//! roles, limits, cursors, health, and the server loop.
//!
//! Knows nothing of products or orders. A service tells how it is from its first moment on, and brings its routes when
//! they can be answered; what it should refuse is refused, always as a problem:
//!
//! ```ignore
//! let health = Health::new();
//! let stop = health.drop_first(asked, http.stop_delay());
//! let verifier = Verifier::start(&http.tokens, &health, stop.clone()).await?;
//! let routes = Routes::serve(&http, &health, stop, &mut tasks).await?;
//! // … the rest of the service …
//! let v1 = limits::time_limited(v1_routes(), http.request_timeout());
//! routes.open(Gate::new(verifier, &http.rates).guard(v1));
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
