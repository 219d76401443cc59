//! The process: configuration, start-up, the tasks and their end.
//!
//! Needs NATS to start. While Postgres or the mail server is away messages wait in the stream and mails in Postgres.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use async_nats::connection::State;
use clap::Parser;
use lettre::message::{Mailbox, Mailboxes};
use lomash_contract::limits::{LOW_STOCK_THRESHOLD, MAX_STOCK};
use lomash_ledger::{JetStreamLedger, Ledger, receive, streams};
use lomash_platform::process::Tasks;
use lomash_platform::waiting::Waiting;
use lomash_platform::{Secret, nats, postgres, schemas, shutdown};
use lomash_web::health::Check;
use lomash_web::{Health, Routes, ServiceConfig, Verifier};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::Url;

use crate::alerts::{Alerts, AlertsError};
use crate::books::Rules;
use crate::http::{self, Api};
use crate::low_stock::Policy;
use crate::mail::Letterhead;
use crate::mailer::Mailer;
use crate::sending::{MAX_CONNECTIONS, MAX_RATE, Sending};
use crate::{observed, publishing, recorder};

/// How often `/readyz` is brought up to date.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// How long Postgres may take to answer then.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Most recipients: the team, not a list.
const MAX_RECIPIENTS: usize = 50;

/// The notification service of Lomash Inventory.
#[derive(Clone, Debug, Parser)]
#[command(name = "notification-service", version)]
pub struct Config {
    /// What every service has.
    #[command(flatten)]
    pub service: ServiceConfig,

    /// The mail server: smtp://host, smtp://user:password@host:port?tls=required (STARTTLS), or smtps://user:password@host.
    /// A path is the name to greet with.
    #[arg(long, env = "SMTP_URL", default_value = "smtp://127.0.0.1:25", hide_env_values = true)]
    pub smtp_url: Secret,

    /// Authorities to trust for the mail server instead of the system's, as PEM.
    #[arg(long, env = "SMTP_CA_FILE", value_name = "FILE")]
    pub smtp_ca_file: Option<PathBuf>,

    /// Who sends.
    #[arg(long, env = "MAIL_FROM", default_value = "Lomash Inventory <inventory@localhost.localdomain>")]
    pub mail_from: Mailbox,

    /// Whom to tell: the admin team, comma-separated.
    #[arg(long, env = "MAIL_TO", default_value = "Admin team <admins@localhost.localdomain>")]
    pub mail_to: Mailboxes,

    /// What a product's id is put behind to make the link in a mail.
    #[arg(long, env = "MAIL_LINK_BASE", default_value = "http://127.0.0.1:8080/v1/products/")]
    pub mail_link_base: Url,

    /// Which alerts are mailed.
    #[arg(long, env = "MAIL_POLICY", value_enum, default_value_t)]
    pub mail_policy: Policy,

    /// Seconds of a digest's period; periods are counted from midnight UTC of 1970-01-01.
    #[arg(long, env = "MAIL_DIGEST_SECONDS", default_value_t = 24 * 3600, value_parser = clap::value_parser!(u32).range(1..=31 * 24 * 3600))]
    pub mail_digest_seconds: u32,

    /// A cause that was stored more than so many seconds before this service first sees it is recorded and not mailed.
    #[arg(long, env = "MAIL_MAX_AGE_SECONDS", default_value_t = 24 * 3600)]
    pub mail_max_age_seconds: u32,

    /// Connections to the mail server. With one, mails go out in the order of their causes, and at most one is sent twice
    /// when a process or server dies.
    #[arg(long, env = "MAIL_CONNECTIONS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CONNECTIONS)))]
    pub mail_connections: u32,

    /// Mails a second that this process sends at most.
    #[arg(long, env = "MAIL_PER_SECOND", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RATE)))]
    pub mail_per_second: u32,

    /// The threshold of products that have none of their own.
    #[arg(long, env = "LOW_STOCK_THRESHOLD", default_value_t = LOW_STOCK_THRESHOLD, value_parser = clap::value_parser!(u32).range(0..=i64::from(MAX_STOCK)))]
    pub low_stock_threshold: u32,
}

/// Runs the service until some time after `asked` is cancelled, which asks it to stop; see `HTTP_STOP_DELAY_SECONDS`.
///
/// # Errors
/// When it cannot start, or finds something that trying again cannot mend.
pub async fn run(config: Config, asked: CancellationToken) -> anyhow::Result<()> {
    let service = &config.service;
    observed::register();
    let letterhead = letterhead(&config)?;
    let mailer = Mailer::new(&config.smtp_url, config.smtp_ca_file.as_ref())?;
    let pool = postgres::pool(&service.database_url)?;
    let digest_period = Duration::from_secs(config.mail_digest_seconds.into());
    let alerts = Alerts::new(pool, service.database_url.clone(), digest_period);
    let mut tasks = Tasks::new();
    let health = Health::new();
    let stop = health.drop_first(asked.clone(), service.http.stop_delay());
    let checks = Checks::register(&health);
    let starting = async {
        let verifier = Verifier::start(&service.http.tokens, &health, stop.clone()).await?;
        let routes = Routes::serve(&service.http, &health, stop.clone(), &mut tasks).await?;
        let (client, refusals) =
            nats::connect_as(service.nats_url.expose(), &service.nats_identity, "notification-service").await?;
        let context = async_nats::jetstream::new(client.clone());
        refusals.guard(streams::prepare(&context, service.stream_replicas, service.nats_identity.is_known())).await??;
        Waiting::on("Postgres, with what was recorded before")
            .during(refuse_a_shorter_ledger(&context, &alerts))
            .await?;
        Ok((verifier, routes, client, context))
    };
    // Nothing was taken in yet, and nobody was told that this is ready.
    let Some((verifier, routes, client, context)) = shutdown::unless(&asked, starting).await? else {
        return Ok(());
    };

    let rules = Rules {
        policy: config.mail_policy,
        threshold: config.low_stock_threshold,
        max_age: Duration::from_secs(config.mail_max_age_seconds.into()),
    };
    // The recorder outlives the receiver: what was taken in is still recorded.
    let recording = CancellationToken::new();
    let (intake, recorder) = recorder::recorder(context.clone(), alerts.clone(), rules);
    tasks.spawn(recorder.run(recording.clone()));
    tasks.run({
        let (context, stop) = (context.clone(), stop.clone());
        async move {
            receive::run(context, recorder::receive(), stop, |delivery| intake.handle(delivery)).await;
            recording.cancel();
        }
    });
    tasks.spawn(publishing::run(context, alerts.clone(), stop.clone()));
    let sending = Sending::new(alerts.clone(), mailer, letterhead, config.mail_per_second);
    for _ in 0..config.mail_connections {
        tasks.spawn(sending.clone().run(stop.clone()));
    }
    tasks.run(streams::leave_a_lonely_server(client.clone(), streams::INVENTORY, streams::NOTIFICATION, stop.clone()));
    routes.open(http::routes(Api { alerts: alerts.clone() }, verifier, &service.http));
    // Last: whoever is told that this is ready sends requests.
    tasks.spawn(checks.watch(client.clone(), alerts, sending, stop.clone()));
    info!("ready");

    let outcome = tasks.until(&stop).await;
    stop.cancel();
    let outcome = tasks.join(outcome).await;
    nats::flush_last(&client).await;
    outcome
}

fn letterhead(config: &Config) -> anyhow::Result<Letterhead> {
    let recipients = config.mail_to.iter().count();
    ensure!(
        (1..=MAX_RECIPIENTS).contains(&recipients),
        "MAIL_TO names 1 to {MAX_RECIPIENTS} recipients, not {recipients}"
    );
    for mailbox in config.mail_to.iter().chain([&config.mail_from]) {
        let address: &str = mailbox.email.as_ref();
        ensure!(address.is_ascii(), "MAIL_FROM and MAIL_TO: write the domain of {address} in its ASCII form (xn--…)");
    }
    let base = &config.mail_link_base;
    ensure!(matches!(base.scheme(), "http" | "https"), "MAIL_LINK_BASE is an http or https URL, not {base}");
    Ok(Letterhead { from: config.mail_from.clone(), to: config.mail_to.clone(), link_base: base.to_string() })
}

/// A ledger that ends before what was recorded of it, or was replaced meanwhile, is another one: its events would be taken for
/// replays and never told.
async fn refuse_a_shorter_ledger(context: &async_nats::jetstream::Context, alerts: &Alerts) -> anyhow::Result<()> {
    let known = async { Ok::<_, AlertsError>((alerts.checkpoint().await?, alerts.newest().await?)) };
    let (recorded, newest) = match known.await {
        Ok(known) => known,
        Err(problem) => {
            warn!(%problem, "starting without it");
            return Ok(());
        }
    };
    let ledger = JetStreamLedger::read_only(context.clone(), streams::INVENTORY);
    let last = ledger.last_sequence().await.context("the end of the ledger cannot be read")?;
    if recorded > last {
        return Err(schemas::went_backwards(last, recorded, postgres::NOTIFICATION));
    }
    if let Some((sequence, stored_at)) = newest {
        let remembered = ledger.remembers(sequence, stored_at).await;
        remembered.map_err(|problem| problem.with_remedy(postgres::NOTIFICATION))?;
    }
    Ok(())
}

/// The parts of `/readyz`. Without Postgres or the mail server nothing is lost, so only the stream is required.
struct Checks {
    stream: Check,
    postgres: Check,
    smtp: Check,
}

impl Checks {
    fn register(health: &Health) -> Self {
        Self {
            stream: health.check("stream", true),
            postgres: health.check("postgres", false),
            smtp: health.check("smtp", false),
        }
    }

    async fn watch(
        self,
        client: async_nats::Client,
        alerts: Alerts,
        sending: Sending,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        loop {
            match client.connection_state() {
                State::Connected => self.stream.ready("connected"),
                state => self.stream.not_ready(format!("no connection to NATS ({state})")),
            }
            let waiting = tokio::time::timeout(CHECK_TIMEOUT, alerts.waiting()).await;
            observed::waiting(waiting.as_ref().ok().and_then(|waiting| waiting.as_ref().ok()).copied());
            match waiting {
                Ok(Ok(waiting)) => self.postgres.ready(format!(
                    "{} to be published, {} to be mailed, {} refused",
                    waiting.to_publish, waiting.to_mail, waiting.failed
                )),
                Ok(Err(problem)) => self.postgres.not_ready(problem.to_string()),
                Err(_) => self.postgres.not_ready("Postgres does not answer"),
            }
            match sending.condition() {
                None => self.smtp.not_ready("not connected yet"),
                Some(Ok(())) => self.smtp.ready("connected when it was last needed"),
                Some(Err(problem)) => self.smtp.not_ready(problem),
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(CHECK_EVERY) => {}
            }
        }
    }
}
