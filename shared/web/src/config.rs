//! Configuration that every service has, to be flattened into its own:
//!
//! ```ignore
//! #[command(flatten)]
//! pub service: ServiceConfig,
//! ```
//!
//! Every value has its variable and a default for a laptop. What clap can check it checks, and names the variable;
//! what depends on more than one value is checked by [`crate::Verifier::start`] and [`crate::Server::bind`]. A secret is
//! never checked by clap, which would print it.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;
use lomash_platform::telemetry::LogFormat;
use lomash_platform::{Secret, nats};

use crate::jwks::KeySource;

/// Issuer and audience on a laptop: what `lomash token` mints by default.
pub const DEVELOPMENT_ISSUER: &str = "lomash";
/// See [`DEVELOPMENT_ISSUER`].
pub const DEVELOPMENT_AUDIENCE: &str = "lomash-inventory";

/// Where the servers of a service are, who it is to them, how it answers HTTP and how it logs.
#[derive(Clone, Debug, Args)]
pub struct ServiceConfig {
    /// NATS server or servers, comma-separated.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true)]
    pub nats_url: Secret,

    /// Who the service is to NATS.
    #[command(flatten)]
    pub nats_identity: nats::Identity,

    /// Postgres, with what the service writes and reads there.
    #[arg(
        long,
        env = "DATABASE_URL",
        default_value = "postgres://lomash@127.0.0.1:5432/lomash",
        hide_env_values = true
    )]
    pub database_url: Secret,

    /// Copies of each stream that is created: 1 on a laptop, 3 in a cluster.
    #[arg(long, env = "STREAM_REPLICAS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub stream_replicas: u32,

    /// The HTTP adapter.
    #[command(flatten)]
    pub http: HttpConfig,

    /// How log lines look.
    #[arg(long, env = "LOG_FORMAT", value_enum, default_value_t = LogFormat::Pretty)]
    pub log_format: LogFormat,
}

/// The HTTP adapter: where it listens, whom it believes, what it bears.
#[derive(Clone, Debug, Args)]
pub struct HttpConfig {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, env = "HTTP_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS:PORT")]
    pub http_listen: SocketAddr,

    /// Address of the listener for health and metrics (`/healthz`, `/readyz`, `/metrics`); port 0 takes a free one. It has
    /// places of its own, so that probes are answered whatever is done to the other. Open to all who reach it: keep it inside
    /// your network.
    #[arg(long, env = "HEALTH_LISTEN", default_value = "127.0.0.1:8081", value_name = "ADDRESS:PORT")]
    pub health_listen: SocketAddr,

    /// Connections that are open at once; more wait until one is closed.
    #[arg(long, env = "HTTP_MAX_CONNECTIONS", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub http_max_connections: u32,

    /// Connections of one peer address (of one /64 with IPv6) that are open at once; one more is answered 429 and closed. 0
    /// for no limit: behind a proxy, which is one peer for all.
    #[arg(long, env = "HTTP_MAX_CONNECTIONS_PER_PEER", default_value_t = 512, value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub http_max_connections_per_peer: u32,

    /// Bytes that a request's body may have, where a route does not say otherwise.
    #[arg(long, env = "HTTP_MAX_BODY_BYTES", default_value_t = 64 * 1024, value_parser = clap::value_parser!(u32).range(1024..=16 * 1024 * 1024))]
    pub http_max_body_bytes: u32,

    /// Seconds until a client must have sent the headers of its (next) request.
    #[arg(long, env = "HTTP_HEADER_TIMEOUT_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub http_header_timeout_seconds: u32,

    /// Seconds that a client may let a body rest, sending or receiving it.
    #[arg(long, env = "HTTP_STALL_TIMEOUT_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub http_stall_timeout_seconds: u32,

    /// Seconds that an ordinary request may take; imports and event streams have limits of their own.
    #[arg(long, env = "HTTP_REQUEST_TIMEOUT_SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub http_request_timeout_seconds: u32,

    /// Seconds that a service which is asked to stop goes on as before while /readyz says that it is not ready, so that a
    /// load balancer looks away first: longer than the balancer takes to notice.
    #[arg(long, env = "HTTP_STOP_DELAY_SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=300))]
    pub http_stop_delay_seconds: u32,

    /// Seconds that requests in flight may take to finish once the service stops.
    #[arg(long, env = "HTTP_DRAIN_SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=300))]
    pub http_drain_seconds: u32,

    /// Requests per caller.
    #[command(flatten)]
    pub rates: RateConfig,

    /// Whose tokens are believed.
    #[command(flatten)]
    pub tokens: TokenConfig,
}

impl HttpConfig {
    /// See `HTTP_HEADER_TIMEOUT_SECONDS`.
    #[must_use]
    pub fn header_timeout(&self) -> Duration {
        Duration::from_secs(self.http_header_timeout_seconds.into())
    }

    /// See `HTTP_STALL_TIMEOUT_SECONDS`.
    #[must_use]
    pub fn stall_timeout(&self) -> Duration {
        Duration::from_secs(self.http_stall_timeout_seconds.into())
    }

    /// See `HTTP_REQUEST_TIMEOUT_SECONDS`.
    #[must_use]
    pub fn request_timeout(&self) -> Duration {
        Duration::from_secs(self.http_request_timeout_seconds.into())
    }

    /// See `HTTP_STOP_DELAY_SECONDS`.
    #[must_use]
    pub fn stop_delay(&self) -> Duration {
        Duration::from_secs(self.http_stop_delay_seconds.into())
    }

    /// See `HTTP_DRAIN_SECONDS`.
    #[must_use]
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.http_drain_seconds.into())
    }

    /// See `HTTP_MAX_BODY_BYTES`.
    #[must_use]
    pub fn max_body_bytes(&self) -> usize {
        usize::try_from(self.http_max_body_bytes).unwrap_or(usize::MAX)
    }
}

/// How many requests one caller (a token's subject) may send.
#[derive(Clone, Debug, Args)]
pub struct RateConfig {
    /// Reads (GET and HEAD) of one caller in a second, and twice as many at once; 0 for no limit.
    #[arg(long, env = "HTTP_READS_PER_SECOND", default_value_t = 2000)]
    pub http_reads_per_second: u32,

    /// Writes of one caller in a second, and twice as many at once; 0 for no limit.
    #[arg(long, env = "HTTP_WRITES_PER_SECOND", default_value_t = 200)]
    pub http_writes_per_second: u32,
}

/// Whose tokens are believed. `JWT_JWKS`, `JWT_HS256_SECRET` or both must be set.
#[derive(Clone, Debug, Args)]
pub struct TokenConfig {
    /// What a token's `iss` must be.
    #[arg(long, env = "JWT_ISSUER", default_value = DEVELOPMENT_ISSUER)]
    pub jwt_issuer: String,

    /// What a token's `aud` must be or contain.
    #[arg(long, env = "JWT_AUDIENCE", default_value = DEVELOPMENT_AUDIENCE)]
    pub jwt_audience: String,

    /// Public keys (RS256, EdDSA): a JWKS file, or its URL (https, or http on this machine).
    #[arg(long, env = "JWT_JWKS", value_name = "FILE|URL")]
    pub jwt_jwks: Option<KeySource>,

    /// Seconds between two looks at the JWKS; an unknown key is looked for at once.
    #[arg(long, env = "JWT_JWKS_REFRESH_SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub jwt_jwks_refresh_seconds: u32,

    /// Secret of HS256 tokens, at least 32 bytes; for development only: whoever checks such tokens can mint them.
    #[arg(long, env = "JWT_HS256_SECRET", hide_env_values = true)]
    pub jwt_hs256_secret: Option<Secret>,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Process {
        #[command(flatten)]
        http: HttpConfig,
    }

    #[test]
    fn defaults_are_for_a_laptop() {
        let process = Process::try_parse_from(["service"]).expect("parsed");
        assert!(process.http.http_listen.ip().is_loopback() && process.http.health_listen.ip().is_loopback());
        assert_ne!(process.http.http_listen, process.http.health_listen);
        assert!(
            process.http.http_max_connections_per_peer < process.http.http_max_connections,
            "one peer must not be able to take all places"
        );
        assert!(process.http.tokens.jwt_hs256_secret.is_none() && process.http.tokens.jwt_jwks.is_none());
    }

    #[test]
    fn bad_values_name_their_setting_and_no_secret_is_shown() {
        for (flag, value) in [
            ("--http-listen", "here"),
            ("--health-listen", "there"),
            ("--http-max-connections", "0"),
            ("--http-max-body-bytes", "12"),
            ("--jwt-jwks", "http://keys.example/jwks.json"),
            ("--http-drain-seconds", "soon"),
        ] {
            let error = Process::try_parse_from(["service", flag, value]).expect_err("refused").to_string();
            assert!(error.contains(flag), "{error}");
        }
        let process = Process::try_parse_from(["service", "--jwt-hs256-secret", "hunter2"]).expect("checked later");
        assert!(!format!("{process:?}").contains("hunter2"));
    }
}
