//! The process: configuration, start-up, the tasks and their end.

use std::time::Duration;

use clap::Parser;
use lomash_ledger::streams;
use lomash_platform::process::Tasks;
use lomash_platform::telemetry::LogFormat;
use lomash_platform::{Secret, nats};
use lomash_web::{Health, HttpConfig, Routes, Server, Verifier};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How long the last acknowledgements may take to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The notification service of Lomash Inventory.
#[derive(Clone, Debug, Parser)]
#[command(name = "notification-service", version)]
pub struct Config {
    /// NATS server or servers, comma-separated.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true)]
    pub nats_url: Secret,

    /// Who the service is to NATS.
    #[command(flatten)]
    pub nats_identity: nats::Identity,

    /// Postgres for what was sent.
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

/// Runs the service until `stop` is cancelled.
///
/// # Errors
/// When it cannot start, or finds something that trying again cannot mend.
pub async fn run(config: Config, stop: CancellationToken) -> anyhow::Result<()> {
    let mut tasks = Tasks::new();
    let health = Health::new();
    let stream = health.check("stream", true);
    let _verifier = Verifier::start(&config.http.tokens, &health, stop.clone()).await?;
    let routes = Routes::default();
    let server = Server::bind(&config.http).await?;
    let serving = server.serve(routes.application(&config.http, &health), health.clone(), stop.clone());
    tasks.spawn(async {
        serving.await;
        Ok(())
    });
    let (client, _refusals) =
        nats::connect_as(config.nats_url.expose(), &config.nats_identity, "notification-service").await?;
    let context = async_nats::jetstream::new(client.clone());
    // Streams are the administrator's where there are identities; on a laptop's server the first service makes them.
    if !config.nats_identity.is_known() {
        streams::wait_until_ready(&context).await?;
        for difference in streams::apply(&context, config.stream_replicas).await? {
            warn!(%difference, "the server differs from streams/");
        }
    }
    stream.ready("connected");
    routes.open(axum::Router::new());
    info!("ready");

    let outcome = tasks.until(&stop).await;
    stop.cancel();
    let outcome = tasks.join(outcome).await;
    // What was settled last must be on the wire before the process goes.
    if !matches!(tokio::time::timeout(FLUSH_TIMEOUT, client.flush()).await, Ok(Ok(()))) {
        warn!("the last acknowledgements may be lost; their messages come back and are known");
    }
    outcome
}
