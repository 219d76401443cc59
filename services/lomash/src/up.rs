//! `lomash up`: the whole system on one machine, from nothing to ready, and back to nothing.
//!
//! Owns the order: servers side by side, then streams and schema, then services; and down again the other way
//! round. [`Stack`] is that without a terminal: the demo and the tests use it as it is.
//!
//! Assumes that `./just setup` has run, and that the services' programs lie beside this one.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use futures::FutureExt;
use lomash_platform::waiting::Waiting;
use lomash_platform::{Secret, shutdown};
use lomash_web::Role;
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use serde::Serialize;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::api::Api;
use crate::output;
use crate::stack::{FolderLock, Kind, Mail, Nats, Postgres, Redis, Server, Service, free_port, log_tail};
use crate::token::{stack_secret, stack_token, write_private};

/// How long a service may take to be ready: minutes, for the product service folds tens of millions of events.
const SERVICE_START_TIMEOUT: Duration = Duration::from_secs(600);
/// How often it is asked.
const READY_PAUSE: Duration = Duration::from_millis(100);
/// How long it may take to say whether it is ready.
const READY_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// One server of each kind: there is nobody to replicate to.
const REPLICAS: u32 = 1;
/// The name under which we connect.
const CLIENT_NAME: &str = "lomash up";
/// How long the tokens in `stack.env` are valid: longer than a stack on a laptop runs. Each start writes new ones.
pub(crate) const TOKEN_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);
/// The file with the URLs and tokens, for a shell or another program to read.
const ENV_FILE: &str = "stack.env";

/// Name of the product service, and of its program.
pub(crate) const PRODUCT_SERVICE: &str = "product-service";
/// The services that read what the product service wrote.
pub(crate) const DOWNSTREAM_SERVICES: [&str; 2] = ["analytics-service", "notification-service"];
/// Under which names `stack.env` tells where the services answer HTTP.
pub(crate) const URL_VARIABLES: [(&str, &str); 3] = [
    (PRODUCT_SERVICE, "PRODUCT_URL"),
    ("analytics-service", "ANALYTICS_URL"),
    ("notification-service", "NOTIFICATION_URL"),
];
/// And where they tell their health and metrics.
const HEALTH_URL_VARIABLES: [(&str, &str); 3] = [
    (PRODUCT_SERVICE, "PRODUCT_HEALTH_URL"),
    ("analytics-service", "ANALYTICS_HEALTH_URL"),
    ("notification-service", "NOTIFICATION_HEALTH_URL"),
];

/// Start everything on this machine and keep it running until Ctrl-C.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Folder for data, logs and `stack.env`; kept over restarts.
    #[arg(long, env = "LOMASH_DATA", default_value = ".data", value_name = "DIR")]
    pub data: PathBuf,
    /// Show the parts as JSON once they are ready.
    #[arg(long)]
    pub json: bool,
}

/// Starts everything, shows one line a part, and waits: for Ctrl-C or SIGTERM, or for a part that ends by itself.
///
/// # Errors
/// When a part does not start, ends by itself, or does not stop in order.
pub async fn run(args: UpArgs) -> Result<()> {
    let stop = shutdown::token().context("could not listen for signals")?;
    let stack = tokio::select! {
        // Dropping a start that is under way ends what it has started.
        interrupted = shutdown::interruption(&stop) => bail!("{interrupted}; what had started is stopped"),
        stack = Stack::start(&args.data) => stack?,
    };
    show(&stack, args.json)?;
    let ended = tokio::select! {
        () = stop.cancelled() => None,
        ended = stack.part_ended() => Some(ended),
    };
    if let Some(ended) = &ended {
        output::tell(format_args!("{ended:#}"));
        output::tell("Stopping the rest.");
    } else if !args.json {
        output::say("Stopping.");
    }
    let stopped = stack.stop().await;
    match ended {
        Some(ended) => {
            if let Err(error) = stopped {
                warn!("{error:#}");
            }
            // Its story, with the end of the log, was told above.
            Err(anyhow!("{} ended by itself", ended.name))
        }
        None => stopped,
    }
}

/// The running system. Dropping it ends every process; [`Stack::stop`] does so in order.
// Fields are dropped from the first to the last: in the order in which things must end.
#[derive(Debug)]
pub struct Stack {
    env_file: EnvFile,
    services: Vec<Service>,
    /// Where mails land.
    pub mail: Mail,
    /// The cache.
    pub redis: Redis,
    /// The projection.
    pub postgres: Postgres,
    /// The source of truth.
    pub nats: Nats,
    data: PathBuf,
    secret: Secret,
    _lock: FolderLock,
}

/// One part of the system, as it is shown.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// What it is.
    pub name: String,
    /// `running` or `ended`.
    pub state: &'static str,
    /// Where it listens, without secrets; None for what only talks to NATS.
    pub address: Option<String>,
    /// Its process id while it runs.
    pub pid: Option<u32>,
    /// Where it logs.
    pub log: PathBuf,
    /// What else there is to know.
    pub note: Option<String>,
}

/// A part that ended by itself; displayed with the end of its log.
#[derive(Debug)]
pub struct Ended {
    /// Which part.
    pub name: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Where it logged.
    pub log: PathBuf,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended by itself ({}); {}", self.name, self.status, log_tail(&self.log))
    }
}

impl Stack {
    /// Starts the servers and the services with their data under `data`, and returns when all of it is ready.
    ///
    /// # Errors
    /// When another one runs on `data`, or a part does not start: what had started is ended.
    pub async fn start(data: &Path) -> Result<Self> {
        Self::start_with(data, &program(PRODUCT_SERVICE)?).await
    }

    /// The same with another build of the product service: tests bring the one that has crash points.
    ///
    /// # Errors
    /// As for [`Stack::start`].
    pub async fn start_with(data: &Path, product_service: &Path) -> Result<Self> {
        let mut stack = Self::start_servers(data).await?;
        stack.start_services(product_service).await?;
        Ok(stack)
    }

    /// The same without services: the servers, with streams and schema applied.
    ///
    /// # Errors
    /// When another one runs on `data`, or a server does not start.
    pub async fn start_servers(data: &Path) -> Result<Self> {
        crate::stack::data_folder(data)?;
        let data = data.canonicalize().with_context(|| format!("could not resolve {}", data.display()))?;
        // No patience: whoever holds it runs a whole stack.
        let lock = FolderLock::acquire(&data, Duration::ZERO).await?;
        let (nats_dir, postgres_dir, redis_dir) = (data.join("nats"), data.join("postgres"), data.join("redis"));
        let mail_dir = data.join("mail");
        let (nats, postgres, redis, mail) = tokio::try_join!(
            Nats::start(&nats_dir),
            Postgres::start(&postgres_dir),
            Redis::start(&redis_dir),
            Mail::start(&mail_dir)
        )?;
        tokio::try_join!(apply_streams(&nats), apply_sql(&postgres))?;
        let secret = stack_secret(&data)?;
        let env_file = EnvFile(data.join(ENV_FILE));
        let stack = Self { env_file, services: Vec::new(), mail, redis, postgres, nats, data, secret, _lock: lock };
        stack.write_env_file()?;
        Ok(stack)
    }

    async fn start_services(&mut self, product_service: &Path) -> Result<()> {
        let mut services = vec![self.service_at(PRODUCT_SERVICE, product_service)?];
        let products = services[0].address().context("the service was not told where to listen")?;
        for name in DOWNSTREAM_SERVICES {
            services.push(self.service(name)?.env("MAIL_LINK_BASE", format!("http://{products}/v1/products/")));
        }
        for service in &mut services {
            service.start()?;
        }
        // From here on the stack owns them.
        self.services = services;
        for service in &self.services {
            is_ready(service).await?;
        }
        self.write_env_file()
    }

    /// A service of ours that is told where the servers are, whose tokens to take, and to listen on a port of its own;
    /// not started.
    ///
    /// # Errors
    /// When its program is not built, or no port is free.
    pub fn service(&self, name: &str) -> Result<Service> {
        self.service_at(name, &program(name)?)
    }

    fn service_at(&self, name: &str, program: &Path) -> Result<Service> {
        let log = self.data.join(format!("{name}.log"));
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        Ok(Service::new(name, program, &log)
            .listen(address)
            .listen_for_health(health)
            .env("JWT_ISSUER", DEVELOPMENT_ISSUER)
            .env("JWT_AUDIENCE", DEVELOPMENT_AUDIENCE)
            .env("JWT_HS256_SECRET", self.secret.expose())
            .env("NATS_URL", self.nats.url())
            .env("DATABASE_URL", self.postgres.url())
            .env("REDIS_URL", self.redis.url())
            .env("SMTP_URL", self.mail.url()))
    }

    /// The running services, to be killed and restarted by tests.
    pub fn services(&mut self) -> &mut [Service] {
        &mut self.services
    }

    /// The data folder, resolved.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The file with the URLs and tokens.
    #[must_use]
    pub fn env_file(&self) -> &Path {
        &self.env_file.0
    }

    /// Where the product service takes HTTP requests; None until it is started.
    #[must_use]
    pub fn product_url(&self) -> Option<String> {
        self.url(PRODUCT_SERVICE)
    }

    /// Where a service takes HTTP requests; None until it is started.
    #[must_use]
    pub fn url(&self, name: &str) -> Option<String> {
        let service = self.services.iter().find(|service| service.name() == name)?;
        service.address().map(|address| format!("http://{address}"))
    }

    /// The product service, called by an admin.
    ///
    /// # Errors
    /// When it is not started, or no token can be made.
    pub fn admin(&self) -> Result<Api> {
        let url = self.product_url().context("the product service is not started")?;
        Api::new(&url, Secret::from(self.token(Role::Admin)?))
    }

    /// Where a service tells its health and metrics; None until it is started.
    #[must_use]
    pub fn health_url(&self, name: &str) -> Option<String> {
        let service = self.services.iter().find(|service| service.name() == name)?;
        service.health_address().map(|address| format!("http://{address}"))
    }

    /// A token that the services of this stack take.
    ///
    /// # Errors
    /// When the secret in the data folder cannot be used.
    pub fn token(&self, role: Role) -> Result<String> {
        stack_token(&self.secret, role, TOKEN_LIFETIME)
    }

    /// Writes what is known at this moment: servers first, services once they are ready.
    fn write_env_file(&self) -> Result<()> {
        let mut variables = vec![
            ("NATS_URL", self.nats.url()),
            ("DATABASE_URL", self.postgres.url()),
            ("REDIS_URL", self.redis.url()),
            ("SMTP_URL", self.mail.url()),
            ("MAIL_DIR", self.mail.dir().display().to_string()),
            ("ADMIN_TOKEN", self.token(Role::Admin)?),
            ("VIEWER_TOKEN", self.token(Role::Viewer)?),
        ];
        variables.extend(URL_VARIABLES.iter().filter_map(|(name, variable)| Some((*variable, self.url(name)?))));
        let health = HEALTH_URL_VARIABLES.iter();
        variables.extend(health.filter_map(|(name, variable)| Some((*variable, self.health_url(name)?))));
        let text: String = variables.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
        write_private(&self.env_file.0, &text)
    }

    /// Everything that was started, in that order.
    #[must_use]
    pub fn parts(&self) -> Vec<Part> {
        let servers =
            [server_part(&self.nats), server_part(&self.postgres), server_part(&self.redis), server_part(&self.mail)];
        let services = self.services.iter().map(|service| Part {
            name: service.name().to_owned(),
            state: state(service.pid()),
            address: service.address().map(|address| address.to_string()),
            pid: service.pid(),
            log: service.log().to_owned(),
            note: None,
        });
        servers.into_iter().chain(services).collect()
    }

    /// Completes when a part ends that was not told to.
    pub async fn part_ended(&self) -> Ended {
        let services = self.services.iter().map(|service| {
            async move { (service.name().to_owned(), service.ended().await, service.log().to_owned()) }.boxed()
        });
        let parts = [
            server_ended(&self.nats).boxed(),
            server_ended(&self.postgres).boxed(),
            server_ended(&self.redis).boxed(),
            server_ended(&self.mail).boxed(),
        ];
        let ((name, status, log), _, _) = futures::future::select_all(parts.into_iter().chain(services)).await;
        Ended { name, status, log }
    }

    /// Stops services, then the mail server, Redis, Postgres and NATS, each in order and within its own bound.
    ///
    /// # Errors
    /// When a part did not end in order; all of them are gone all the same.
    pub async fn stop(mut self) -> Result<()> {
        let mut problems = Vec::new();
        // What ended by itself was told by `part_ended`; it cannot be stopped any more.
        for service in self.services.iter_mut().filter(|service| service.pid().is_some()) {
            problems.extend(service.stop().await.err());
        }
        if self.mail.pid().is_some() {
            problems.extend(self.mail.stop().await.err());
        }
        if self.redis.pid().is_some() {
            problems.extend(self.redis.stop().await.err());
        }
        if self.postgres.pid().is_some() {
            problems.extend(self.postgres.stop().await.err());
        }
        if self.nats.pid().is_some() {
            problems.extend(self.nats.stop().await.err());
        }
        let problems: Vec<String> = problems.iter().map(|problem| format!("{problem:#}")).collect();
        if problems.is_empty() { Ok(()) } else { Err(anyhow!("{}", problems.join("\n"))) }
    }
}

/// Creates the streams and consumers that are missing; what exists and differs is said, not changed.
async fn apply_streams(nats: &Nats) -> Result<()> {
    let client = lomash_platform::nats::connect(&nats.url(), CLIENT_NAME).await?;
    let context = async_nats::jetstream::new(client);
    lomash_ledger::streams::wait_until_ready(&context).await?;
    for difference in lomash_ledger::streams::apply(&context, REPLICAS).await.context("could not apply streams/")? {
        warn!(%difference, "a stream on the server is not as it is defined");
    }
    Ok(())
}

/// Brings the schema up to date.
async fn apply_sql(postgres: &Postgres) -> Result<()> {
    lomash_platform::postgres::migrate(&Secret::from(postgres.url())).await.context("could not apply sql/")
}

/// Waits until `/readyz` says so.
pub(crate) async fn is_ready(service: &Service) -> Result<()> {
    let readiness = Readiness::of(service)?;
    let started = Instant::now();
    let mut waiting = Waiting::on(format!("{} to be ready", service.name()));
    loop {
        let problem = tokio::select! {
            biased;
            status = service.ended() => {
                bail!("{} ended while it was starting ({status}); {}", service.name(), log_tail(service.log()))
            }
            answer = waiting.during(readiness.ask()) => match answer {
                Ok(()) => {
                    info!(service = service.name(), "ready");
                    return Ok(());
                }
                Err(problem) => problem,
            },
        };
        if started.elapsed() >= SERVICE_START_TIMEOUT {
            let seconds = SERVICE_START_TIMEOUT.as_secs();
            bail!("{} was not ready after {seconds} s ({problem}); {}", service.name(), log_tail(service.log()));
        }
        waiting.still(problem);
        tokio::time::sleep(READY_PAUSE).await;
    }
}

/// Where a service says whether it is ready.
pub(crate) struct Readiness {
    client: reqwest::Client,
    url: String,
}

impl Readiness {
    /// Of this service.
    pub(crate) fn of(service: &Service) -> Result<Self> {
        // The public port answers too, for services that were not told of another.
        let address = service.health_address().or_else(|| service.address());
        let address = address.context("the service was not told where to listen")?;
        let url = format!("http://{address}/readyz");
        // Nothing here speaks TLS, but the client is not made without a provider; a second one is refused, as it should.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(READY_ANSWER_TIMEOUT)
            .build()
            .context("the HTTP client cannot be made")?;
        Ok(Self { client, url })
    }

    /// An error is what the service says it waits for, or why it cannot be asked.
    pub(crate) async fn ask(&self) -> Result<(), String> {
        let answer = self.client.get(&self.url).send().await.map_err(|problem| problem.to_string())?;
        if answer.status().is_success() {
            return Ok(());
        }
        Err(answer.text().await.unwrap_or_else(|problem| problem.to_string()))
    }
}

/// The program `name` beside this one; for a test, which cargo puts one folder deeper, beside that folder.
///
/// # Errors
/// When there is none.
pub fn program(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("could not find out where this program is")?;
    let folder = exe.parent().context("this program has no folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let program = folder.join(name);
    if !program.is_file() {
        bail!(
            "{} is not there: build it with `cargo build --workspace --bins`, in the profile of this program",
            program.display()
        );
    }
    Ok(program)
}

/// `stack.env`: for its owner only, since it holds passwords and tokens; removed when dropped.
#[derive(Debug)]
struct EnvFile(PathBuf);

impl Drop for EnvFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn server_part<K: Kind>(server: &Server<K>) -> Part {
    Part {
        name: K::NAME.to_owned(),
        state: state(server.pid()),
        address: Some(format!("127.0.0.1:{}", server.port())),
        pid: server.pid(),
        log: server.log(),
        note: server.note(),
    }
}

async fn server_ended<K: Kind>(server: &Server<K>) -> (String, ExitStatus, PathBuf) {
    (K::NAME.to_owned(), server.ended().await, server.log())
}

fn state(pid: Option<u32>) -> &'static str {
    if pid.is_some() { "running" } else { "ended" }
}

fn show(stack: &Stack, json: bool) -> Result<()> {
    let parts = stack.parts();
    let text = if json {
        let shown = serde_json::json!({ "data": stack.data(), "env": stack.env_file(), "parts": parts });
        serde_json::to_string_pretty(&shown).context("could not show the parts as JSON")?
    } else {
        let mut lines = Vec::new();
        for part in &parts {
            let address = part.address.as_deref().unwrap_or("-");
            let pid = part.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
            let log = part.log.strip_prefix(stack.data()).unwrap_or(&part.log);
            lines.push(format!(
                "{:<16} {:<8} {:<16} pid {:<8} log {}",
                part.name,
                part.state,
                address,
                pid,
                log.display()
            ));
        }
        for part in &parts {
            if let Some(note) = &part.note {
                lines.push(format!("Note on {}: {note}.", part.name));
            }
        }
        lines.push(format!(
            "Data and logs are in {}; URLs and tokens in {}.",
            stack.data().display(),
            stack.env_file().display()
        ));
        lines.push("Ready. Ctrl-C stops everything.".to_owned());
        lines.join("\n")
    };
    // Whoever started us may have closed its end: that is no reason to stop.
    if json {
        output::say_whole(text)
    } else {
        output::say(text)
    }
    Ok(())
}
