//! The process: configuration, start-up, the tasks and their end.
//!
//! Start-up folds the stream into [`State`], from the newest usable snapshot on or from the beginning, see
//! [`initial_state`]. Postgres is not needed to start: orders are decided without it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Parser;
use futures::FutureExt as _;
use lomash_contract::Timestamp;
use lomash_ledger::dead_letter::Letters;
use lomash_ledger::deliveries::{Connect, Deliveries};
use lomash_ledger::streams::{self, Difference};
use lomash_ledger::{JetStreamLedger, Ledger, receive};
use lomash_platform::process::Tasks;
use lomash_platform::waiting::Waiting;
use lomash_platform::{Secret, nats, postgres, shutdown};
use lomash_web::{Health, Routes, ServiceConfig, Verifier};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::cache::Cache;
use crate::commands::{Writer, Writing};
use crate::committer::{catch_up, committer};
use crate::feed::Feed;
use crate::http::{Api, Imports};
use crate::inventory::State;
use crate::monitoring::Monitor;
use crate::projected::{self, AskEnd, Projected};
use crate::projection::ProjectionError;
use crate::readiness::{Checks, Watched};
use crate::reads::Reads;
use crate::reconciliation::reports::Reports;
use crate::reconciliation::run::{Parts, Reconciliation, Runner};
use crate::reconciliation::schedule as runs;
use crate::schedule::Schedule;
use crate::snapshots::{self, Snapshots};
use crate::warehouse::Warehouse;
use crate::{commands, http, observed, orders, projection};

/// How long a stopping service tries to bring what it took in to a decision; what is not decided comes back.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

const _: () =
    assert!(DRAIN_TIMEOUT.as_secs() < receive::DRAIN_TIMEOUT.as_secs(), "handlers must still hear the answer");

/// How often start-up says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// Pauses between tries to read the stream at start.
const START_PAUSE: Duration = Duration::from_millis(500);

/// The product service of Lomash Inventory.
#[derive(Clone, Debug, Parser)]
#[command(name = "product-service", version)]
pub struct Config {
    /// What every service has.
    #[command(flatten)]
    pub service: ServiceConfig,

    /// Redis for the cache; without it reads come from Postgres.
    #[arg(long, env = "REDIS_URL", hide_env_values = true)]
    pub redis_url: Option<Secret>,

    /// Fields of the INVENTORY stream that may be weaker than their definition, comma-separated. The service does not
    /// start on a weaker ledger otherwise.
    #[arg(long, env = "LEDGER_ALLOW_WEAKER", value_delimiter = ',')]
    pub ledger_allow_weaker: Vec<String>,

    /// Monitoring addresses of the NATS servers, such as `http://127.0.0.1:8222`, comma-separated, where this service can reach
    /// them: then it does not start on servers that acknowledge what is not on disk yet (`sync_always`).
    #[arg(long, env = "NATS_MONITOR_URL", value_delimiter = ',', value_name = "URL")]
    pub nats_monitor_url: Vec<String>,

    /// Where the warehouse tells its figures (JSON or NDJSON), if it does.
    #[arg(long, env = "WAREHOUSE_URL", hide_env_values = true)]
    pub warehouse_url: Option<Secret>,

    /// Bearer token for the warehouse.
    #[arg(long, env = "WAREHOUSE_TOKEN", hide_env_values = true)]
    pub warehouse_token: Option<Secret>,

    /// When the stock is reconciled with the counts: six cron fields with seconds first, in UTC; a word of the server's
    /// such as `@daily`; or `off`.
    #[arg(long, env = "RECONCILIATION_SCHEDULE", default_value = runs::DEFAULT_SCHEDULE)]
    pub reconciliation_schedule: Schedule,

    /// When a snapshot of the state is written, in the words of the reconciliation's schedule. Start-up reads the newest
    /// one and the ledger from there.
    #[arg(long, env = "SNAPSHOT_SCHEDULE", default_value = snapshots::DEFAULT_SCHEDULE)]
    pub snapshot_schedule: Schedule,

    /// Events since the newest snapshot that make another one worth writing.
    #[arg(long, env = "SNAPSHOT_AFTER_EVENTS", default_value_t = snapshots::DEFAULT_AFTER_EVENTS)]
    pub snapshot_after_events: u64,
}

/// Runs the service until some time after `asked` is cancelled, which asks it to stop; see `HTTP_STOP_DELAY_SECONDS`.
///
/// # Errors
/// When it cannot start, or finds something that trying again cannot mend.
pub async fn run(config: Config, asked: CancellationToken) -> anyhow::Result<()> {
    let service = &config.service;
    let pool = postgres::pool(&service.database_url)?;
    let cache = Cache::connect(config.redis_url.as_ref())?;
    let warehouse = config.warehouse_url.as_ref().map(|url| Warehouse::new(url, config.warehouse_token.clone()));
    let warehouse = warehouse.transpose()?;
    observed::begin(config.redis_url.is_some().then_some(&cache));
    let mut tasks = Tasks::new();
    let health = Health::new();
    let stop = health.drop_first(asked.clone(), service.http.stop_delay());
    let checks = Checks::register(&health);
    let starting = async {
        let verifier = Verifier::start(&service.http.tokens, &health, stop.clone()).await?;
        let routes = Routes::serve(&service.http, &health, stop.clone(), &mut tasks).await?;
        let (client, refusals) =
            nats::connect_as(service.nats_url.expose(), &service.nats_identity, "product-service").await?;
        // Whatever is read for clients comes over a connection of its own: the servers may cut it off as one that does not keep
        // up, and the ledger's stays.
        let (readers, _) =
            nats::connect_as(service.nats_url.expose(), &service.nats_identity, "product-service-readers").await?;
        let context = async_nats::jetstream::new(client.clone());
        let preparing = prepare_streams(&context, service.stream_replicas, service.nats_identity.is_known());
        let mut differences = refusals.guard(preparing).await??;
        differences.extend(hasty_servers(&config.nats_monitor_url).await?);
        refuse_a_weaker_ledger(differences, &config.ledger_allow_weaker)?;

        refusals.guard(runs::set_up(&context, &config.reconciliation_schedule)).await??;
        refusals.guard(snapshots::set_up(&context, &config.snapshot_schedule)).await??;

        let ledger = JetStreamLedger::new(context.clone(), streams::INVENTORY);
        let snapshots = Snapshots::new(context.clone());
        let state = initial_state(&ledger, &snapshots).await?;
        Ok((verifier, routes, client, readers, context, ledger, snapshots, state))
    };
    // Nothing was taken in yet that would have to be decided first, and nobody was told that this is ready.
    let Some((verifier, routes, client, readers, context, ledger, snapshots, state)) =
        shutdown::unless(&asked, starting).await?
    else {
        return Ok(());
    };

    // Whoever takes work in stops first, and what was taken is still decided; then the committer.
    let committing = CancellationToken::new();
    let (committer, commit_loop) = committer(ledger.clone(), state, Timestamp::now, committing.clone());
    let writing = Writing::default();
    let writer = Writer::new(client.clone(), committer.clone(), writing.clone());
    let mut commit_task = tokio::spawn(commit_loop);
    let projected = Projected::new(pool.clone(), &postgres::INVENTORY);
    let reports = Reports::new(pool.clone(), service.database_url.clone());
    let reconciliation = Reconciliation::new(context.clone(), reports.clone(), warehouse.is_some());
    let runner = Runner::new(Parts {
        reports,
        ledger: ledger.clone(),
        pool: pool.clone(),
        writer: writer.clone(),
        warehouse,
        stop: stop.clone(),
    });
    let projecting =
        projection::run(ledger.clone(), service.database_url.clone(), projected.clone(), cache.clone(), stop.clone());
    tasks.spawn_apart("projector", async {
        projecting.await.map_err(ProjectionError::with_remedy).context("the projector cannot go on")
    })?;
    let reconcile = move |delivery| runner.clone().handle(delivery);
    tasks.run(receive::run(context.clone(), runs::receive(), stop.clone(), reconcile));
    let write_snapshot = {
        let (committer, after, stop) = (committer.clone(), config.snapshot_after_events, stop.clone());
        move |tick| snapshots::handle(snapshots.clone(), committer.clone(), after, stop.clone(), tick)
    };
    tasks.run(receive::run(context.clone(), snapshots::receive(), stop.clone(), write_snapshot));
    tasks.spawn(observed::watch(context.clone(), pool.clone(), committer.clone(), stop.clone()));
    let decide = {
        let committer = committer.clone();
        move |delivery| orders::handle(committer.clone(), writing.clone(), delivery)
    };
    let connect: Connect = {
        let (url, identity) = (service.nats_url.clone(), service.nats_identity.clone());
        Arc::new(move || {
            let (url, identity) = (url.clone(), identity.clone());
            async move {
                let connected = nats::connect_as(url.expose(), &identity, "product-service-orders").await;
                connected.map(|(client, _)| client).map_err(|problem| format!("{problem:#}"))
            }
            .boxed()
        })
    };
    tasks.run(receive::run(Deliveries::apart(context, connect), orders::receive(), stop.clone(), decide));
    let watched = Watched { client: client.clone(), pool, committer, cache: config.redis_url.map(|_| cache.clone()) };
    tasks.run(streams::leave_a_lonely_server(client.clone(), streams::ORDERS, streams::PRODUCT_ORDERS, stop.clone()));
    let for_readers = async_nats::jetstream::new(readers.clone());
    tasks.run(streams::leave_a_lonely_server(readers, streams::ORDERS, streams::PRODUCT_ORDERS, stop.clone()));
    let feed = Feed::new(JetStreamLedger::new(for_readers.clone(), streams::INVENTORY));
    tasks.spawn(feed.clone().run(stop.clone()));
    let ask_end: AskEnd = {
        let ledger = ledger.clone();
        Arc::new(move || {
            let ledger = ledger.clone();
            Box::pin(async move { ledger.last_sequence().await.map_err(|problem| problem.to_string()) })
        })
    };
    let api = Api {
        waiting: projected::Waiting::new(projected.clone(), ask_end),
        feed,
        writer: writer.clone(),
        ledger,
        reads: Reads::new(&service.database_url)?,
        projected,
        cache,
        imports: Imports::default(),
        reconciliation,
        dead_letters: Letters::new(for_readers),
        stop: stop.clone(),
    };
    routes.open(http::routes(api, verifier, &service.http));
    let serving = commands::serve(client.clone(), writer, stop.clone());
    tasks.spawn(async { serving.await.context("commands cannot be taken") });
    // Last: whoever is told that this is ready sends requests.
    tasks.spawn(checks.watch(watched, stop.clone()));
    info!("ready");

    // The first task that ends early ends the process; a supervisor starts it again.
    let mut outcome = tokio::select! {
        biased;
        ended = tasks.until(&stop) => ended,
        ended = &mut commit_task => Err(match ended {
            Ok(Ok(_)) => anyhow::anyhow!("the committer ended by itself"),
            Ok(Err(problem)) => anyhow::Error::new(problem).context("the committer cannot go on"),
            Err(panic) => anyhow::Error::new(panic).context("the committer panicked"),
        }),
    };
    stop.cancel();
    // With the servers unreachable the committer cannot answer what was taken in; it is then told to let go.
    let letting_go = tokio::spawn({
        let committing = committing.clone();
        async move {
            tokio::time::sleep(DRAIN_TIMEOUT).await;
            committing.cancel();
        }
    });
    outcome = tasks.join(outcome).await;
    letting_go.abort();
    committing.cancel();
    if !commit_task.is_finished() {
        let ended = commit_task.await.context("the committer panicked")?;
        outcome = outcome.and(ended.map(|_| ()).context("the committer cannot go on"));
    }
    nats::flush_last(&client).await;
    if outcome.is_ok() {
        info!("stopped");
    }
    outcome
}

/// In what the ledger differs from its definition. On a server without users the streams are made here; an identity of
/// its own is not allowed to, for streams are the administrator's (`lomash streams apply`).
async fn prepare_streams(
    context: &async_nats::jetstream::Context,
    replicas: u32,
    has_identity: bool,
) -> Result<Vec<Difference>, streams::StreamsError> {
    streams::prepare(context, replicas, has_identity).await?;
    if has_identity {
        streams::tell(&streams::check(context, replicas).await?);
    }
    streams::compare(context, streams::INVENTORY, replicas).await
}

/// The servers among these that acknowledge what is not on disk yet. One that does not answer may be down, which is no reason
/// not to start.
async fn hasty_servers(addresses: &[String]) -> anyhow::Result<Vec<Difference>> {
    let mut found = Vec::new();
    if addresses.is_empty() {
        return Ok(found);
    }
    let monitor = Monitor::new()?;
    for address in addresses {
        match monitor.weakness(address).await {
            Ok(weakness) => found.extend(weakness),
            Err(problem) => warn!("whether a server acknowledges only what is on disk cannot be seen: {problem:#}"),
        }
    }
    Ok(found)
}

fn refuse_a_weaker_ledger(differences: Vec<Difference>, allowed: &[String]) -> anyhow::Result<()> {
    let (accepted, refused): (Vec<_>, Vec<_>) =
        differences.into_iter().partition(|difference| allowed.contains(&difference.field));
    for difference in accepted {
        warn!(%difference, "a weaker ledger was allowed by name");
    }
    if refused.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = refused.iter().map(ToString::to_string).collect();
    let fields: Vec<&str> = refused.iter().map(|difference| difference.field.as_str()).collect();
    bail!(
        "the ledger is not what its definition promises: {}. Bring the stream to streams/INVENTORY.json with `lomash streams \
         apply` and the servers to `sync_interval: always`, or start with LEDGER_ALLOW_WEAKER={} if you mean it",
        list.join("; "),
        fields.join(",")
    )
}

/// The state to start from, folded to where the stream ends now.
async fn initial_state(ledger: &JetStreamLedger, snapshots: &Snapshots) -> anyhow::Result<State> {
    let started = Instant::now();
    let mut waiting = Waiting::on("the ledger to be read");
    let total = loop {
        match waiting.during(ledger.last_sequence()).await {
            Ok(last) => break last,
            Err(problem) => waiting.still(problem),
        }
        tokio::time::sleep(START_PAUSE).await;
    };
    let mut state = waiting.during(snapshots.newest()).await.unwrap_or_default();
    info!(after = state.sequence(), events = total, "folding the ledger");
    let mut said = Instant::now();
    loop {
        let folded = catch_up(ledger, &mut state, |message, _| {
            if said.elapsed() >= PROGRESS_EVERY {
                said = Instant::now();
                info!(events = message.sequence, of = total, "folding the ledger");
            }
        })
        .await;
        match folded {
            Ok(()) => break,
            Err(problem) if problem.is_transient() => {
                waiting.still(problem);
                tokio::time::sleep(START_PAUSE).await;
            }
            Err(problem) => return Err(problem).context("the ledger cannot be folded"),
        }
    }
    info!(
        events = state.sequence(),
        orders = state.decided_orders(),
        products = state.products().count(),
        skipped = state.skipped(),
        elapsed_ms = started.elapsed().as_millis(),
        "folded the ledger"
    );
    Ok(state)
}
