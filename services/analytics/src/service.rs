//! The process: configuration, start-up, the tasks and their end.

use std::sync::Arc;
use std::time::Duration;

use async_nats::Client;
use async_nats::connection::State;
use clap::Parser;
use deadpool_postgres::Pool;
use lomash_ledger::{JetStreamLedger, Ledger, receive, streams};
use lomash_platform::postgres::ANALYTICS;
use lomash_platform::process::Tasks;
use lomash_platform::projected::{AskEnd, Projected, Waiting};
use lomash_platform::{nats, postgres, shutdown};
use lomash_web::health::Check;
use lomash_web::{Health, Routes, ServiceConfig, Verifier};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::http::Api;
use crate::projection::ProjectionError;
use crate::reads::Reads;
use crate::{http, observed, projection, rows};

/// How often `/readyz` looks at its parts, and how long Postgres may take to answer.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// The analytics service of Lomash Inventory.
#[derive(Clone, Debug, Parser)]
#[command(name = "analytics-service", version)]
pub struct Config {
    /// What every service has.
    #[command(flatten)]
    pub service: ServiceConfig,
}

/// Runs the service until some time after `asked` is cancelled, which asks it to stop; see `HTTP_STOP_DELAY_SECONDS`.
///
/// # Errors
/// When it cannot start, or finds something that trying again cannot mend.
pub async fn run(config: Config, asked: CancellationToken) -> anyhow::Result<()> {
    let Config { service } = config;
    let pool = postgres::pool(&service.database_url)?;
    observed::begin();
    let mut tasks = Tasks::new();
    let health = Health::new();
    let stop = health.drop_first(asked.clone(), service.http.stop_delay());
    let checks = Checks { stream: health.check("stream", true), metrics: health.check("metrics", true) };
    let starting = async {
        let verifier = Verifier::start(&service.http.tokens, &health, stop.clone()).await?;
        let routes = Routes::serve(&service.http, &health, stop.clone(), &mut tasks).await?;
        let (client, refusals) =
            nats::connect_as(service.nats_url.expose(), &service.nats_identity, "analytics-service").await?;
        let context = async_nats::jetstream::new(client.clone());
        refusals.guard(streams::prepare(&context, service.stream_replicas, service.nats_identity.is_known())).await??;
        Ok((verifier, routes, client, context))
    };
    // Nothing was taken in yet, and nobody was told that this is ready.
    let Some((verifier, routes, client, context)) = shutdown::unless(&asked, starting).await? else {
        return Ok(());
    };

    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY);
    let projected = Projected::new(pool.clone(), &ANALYTICS);
    let ask_end: AskEnd = {
        let ledger = ledger.clone();
        Arc::new(move || {
            let ledger = ledger.clone();
            Box::pin(async move { ledger.last_sequence().await.map_err(|problem| problem.to_string()) })
        })
    };
    let waiting = Waiting::new(projected.clone(), ask_end);
    let (queue, queued) = projection::queue();
    let url = service.database_url.clone();
    tasks.spawn(projection::run(ledger, pool.clone(), url, projected.clone(), queued, stop.clone()));
    tasks.run(receive::run(context, projection::receive(), stop.clone(), move |delivery| queue.handle(delivery)));
    tasks.run(streams::leave_a_lonely_server(client.clone(), streams::INVENTORY, streams::ANALYTICS, stop.clone()));
    let api = Api { reads: Reads::new(&service.database_url)?, waiting };
    routes.open(http::routes(api, verifier, &service.http));
    // Last: whoever is told that this is ready sends requests.
    tasks.spawn(checks.watch(client.clone(), pool, stop.clone()));
    info!("ready");

    let outcome = tasks.until(&stop).await;
    stop.cancel();
    let outcome = tasks.join(outcome).await;
    nats::flush_last(&client).await;
    outcome
}

/// What `/readyz` says: without Postgres there is neither anything to answer from nor to write into, so both parts are
/// required.
struct Checks {
    stream: Check,
    metrics: Check,
}

impl Checks {
    async fn watch(self, client: Client, pool: Pool, stop: CancellationToken) -> anyhow::Result<()> {
        loop {
            match client.connection_state() {
                State::Connected => self.stream.ready("connected"),
                state => self.stream.not_ready(format!("no connection to NATS ({state})")),
            }
            match tokio::time::timeout(LOOK_TIMEOUT, look(&pool)).await {
                Ok(Ok(checkpoint)) => self.metrics.ready(format!("at {checkpoint}")),
                Ok(Err(problem)) => self.metrics.not_ready(problem.to_string()),
                Err(_) => self.metrics.not_ready("Postgres does not answer"),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}

async fn look(pool: &Pool) -> Result<u64, ProjectionError> {
    let client = pool.get().await.map_err(|error| ProjectionError::Postgres(error.to_string()))?;
    rows::checkpoint(&client, ANALYTICS.live).await
}
