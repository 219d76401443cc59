//! `lomash cluster`: three NATS nodes with TLS and identities on this machine, every stream three times, and the services
//! against them. `--check` kills, freezes and restarts the nodes under load and says how long nothing was acknowledged.
//!
//! Owns the order of starting, the load and what is measured. The nodes are `stack::NatsCluster`, their configuration is
//! `deploy/nats/cluster.conf`; each program connects under its own key, so that what is tried here is what is shipped.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use async_nats::Client;
use async_nats::jetstream::{self, Context};
use clap::Args;
use futures::StreamExt;
use lomash_contract::{
    Envelope, LedgerEvent, LineQuantity, OrderCreated, OrderId, OrderItem, OrderItems, ProductId, Timestamp,
};
use lomash_ledger::{JetStreamLedger, Ledger, direct, streams, upkeep};
use lomash_platform::{Secret, nats, shutdown};
use lomash_web::Role;
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use serde::Serialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::debug;
use uuid::Uuid;

use crate::api::Api;
use crate::dice::Dice;
use crate::import::import;
use crate::output::{self, Cell};
use crate::retail;
use crate::stack::{FolderLock, NODES, NatsCluster, Postgres, Redis, Service, Who, free_port, scratch};
use crate::token::{stack_secret, stack_token, write_private};
use crate::up::{DOWNSTREAM_SERVICES, PRODUCT_SERVICE, TOKEN_LIFETIME, URL_VARIABLES, is_ready, program};
use crate::verify::{self, Show};

/// Copies of each stream.
const REPLICAS: u32 = 3;
/// Products of the check, each with more stock than it can sell.
const PRODUCTS: usize = 20;
const STOCK: u32 = 1_000_000;
/// Pause between two orders of the load: a hundred a second, so that a gap of a tenth of a second shows.
const LOAD_PAUSE: Duration = Duration::from_millis(10);
/// Orders on the way at once. More wait while nothing is acknowledged.
const IN_FLIGHT: usize = 2_000;
/// How long without an acknowledgement a shop takes for silence.
const SILENT_AFTER: Duration = Duration::from_secs(3);
/// How long a look at the ledger may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between two looks at the ledger.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Load before the first fault, and after the last.
const CALM: Duration = Duration::from_secs(2);
/// How long the nodes may take to agree again, and orders to be decided. What they take is measured, not limited by this.
const PATIENCE: Duration = Duration::from_secs(120);
/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash cluster";
/// The file with the URLs and settings of the operator.
const ENV_FILE: &str = "cluster.env";

/// Start three NATS nodes with TLS and identities on this machine, and the services against them.
#[derive(Clone, Debug, Args)]
pub struct ClusterArgs {
    /// Folder for data, logs, keys and `cluster.env`; kept over restarts. `--check` uses a temporary one without it.
    #[arg(long, env = "LOMASH_CLUSTER_DATA", value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Run orders through it; kill each node once, freeze one, kill all, restart each; verify, print the gaps, and end.
    #[arg(long)]
    pub check: bool,
    /// The orders of the check: NDJSON envelopes or a retail CSV, gzip or plain. All of them go through while the nodes are in
    /// trouble, evenly spread. Made-up ones without it.
    #[arg(long, requires = "check", value_name = "FILE")]
    pub orders: Option<PathBuf>,
    /// Print the result of the check as JSON.
    #[arg(long, requires = "check")]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// When a part does not start, ends by itself, or does not recover.
pub async fn run(args: ClusterArgs) -> Result<ExitCode> {
    let stop = shutdown::token().context("could not listen for signals")?;
    let work = async {
        if !args.check {
            let data = args.data.clone().unwrap_or_else(|| PathBuf::from(".data/cluster"));
            let stack = ClusterStack::start(&data).await?;
            output::say(stack.shown());
            return Ok(Some(stack));
        }
        let temporary = scratch().context("a temporary folder could not be made")?;
        let data = args.data.clone().unwrap_or_else(|| temporary.path().to_owned());
        let mut stack = ClusterStack::start(&data).await?;
        let orders = match args.orders.clone() {
            Some(file) => Orders::Of(file),
            None => Orders::thrown(),
        };
        let report = check(&mut stack, orders, |line| output::tell(line)).await?;
        stack.stop().await?;
        if args.json {
            output::print_json(&report)?
        } else {
            output::print(render(&report))
        }
        ensure!(report.is_good(), "the cluster did not keep what it promises");
        Ok(None)
    };
    let stack = tokio::select! {
        interrupted = shutdown::interruption(&stop) => bail!("{interrupted}; what had started is stopped"),
        worked = work => worked?,
    };
    if let Some(stack) = stack {
        stop.cancelled().await;
        output::say("Stopping.");
        stack.stop().await?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The running cluster. Dropping it ends every process.
// Fields are dropped from the first to the last: in the order in which things must end.
#[derive(Debug)]
pub struct ClusterStack {
    services: Vec<Service>,
    /// The cache.
    pub redis: Redis,
    /// The projection.
    pub postgres: Postgres,
    /// The nodes.
    pub nats: NatsCluster,
    data: PathBuf,
    _lock: FolderLock,
}

impl ClusterStack {
    /// Starts everything with its data under `data`, and returns when all of it is ready.
    ///
    /// # Errors
    /// When another one runs on `data`, or a part does not start.
    pub async fn start(data: &Path) -> Result<Self> {
        Self::start_with(data, NatsCluster::start(&data.join("nats")).await?, &program(PRODUCT_SERVICE)?).await
    }

    /// The same on nodes of the caller's, with another build of the product service.
    ///
    /// # Errors
    /// As for [`ClusterStack::start`].
    pub async fn start_with(data: &Path, cluster: NatsCluster, product_service: &Path) -> Result<Self> {
        crate::stack::data_folder(data)?;
        let data = data.canonicalize().with_context(|| format!("could not resolve {}", data.display()))?;
        let lock = FolderLock::acquire(&data, Duration::ZERO).await?;
        let (postgres_dir, redis_dir) = (data.join("postgres"), data.join("redis"));
        let (postgres, redis) = tokio::try_join!(Postgres::start(&postgres_dir), Redis::start(&redis_dir))?;
        let mut stack = Self { services: Vec::new(), redis, postgres, nats: cluster, data, _lock: lock };
        let admin = stack.context(Who::Administrator).await?;
        streams::wait_until_ready(&admin).await?;
        apply_streams(&admin).await?;
        let secret = stack_secret(&stack.data)?;
        let product = stack.service(PRODUCT_SERVICE, product_service, Who::Product, &secret)?;
        stack.services.push(product);
        for (name, who) in DOWNSTREAM_SERVICES.into_iter().zip([Who::Analytics, Who::Notification]) {
            let service = stack.service(name, &program(name)?, who, &secret)?;
            stack.services.push(service);
        }
        for service in &mut stack.services {
            service.start()?;
        }
        for service in &stack.services {
            is_ready(service).await?;
        }
        stack.write_env_file(&secret)?;
        Ok(stack)
    }

    fn service(&self, name: &str, program: &Path, who: Who, secret: &Secret) -> Result<Service> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let health = SocketAddr::from((Ipv4Addr::LOCALHOST, free_port()?));
        let service = Service::new(name, program, &self.data.join(format!("{name}.log")))
            .listen(address)
            .listen_for_health(health)
            .env("JWT_ISSUER", DEVELOPMENT_ISSUER)
            .env("JWT_AUDIENCE", DEVELOPMENT_AUDIENCE)
            .env("JWT_HS256_SECRET", secret.expose())
            .env("NATS_URL", self.nats.url())
            .env("STREAM_REPLICAS", REPLICAS.to_string())
            .env("DATABASE_URL", self.postgres.url())
            .env("REDIS_URL", self.redis.url());
        let variables = self.nats.credentials.variables(who);
        Ok(variables.into_iter().fold(service, |service, (name, value)| service.env(name, value)))
    }

    /// A connection as one of the identities.
    ///
    /// # Errors
    /// When no node takes it.
    pub async fn client(&self, who: Who) -> Result<Client> {
        let identity = self.nats.credentials.identity(who);
        Ok(nats::connect_as(&self.nats.url(), &identity, CLIENT_NAME).await?.0)
    }

    /// JetStream as one of the identities.
    ///
    /// # Errors
    /// When no node takes the connection.
    pub async fn context(&self, who: Who) -> Result<Context> {
        Ok(jetstream::new(self.client(who).await?))
    }

    /// The product service, called by an admin.
    ///
    /// # Errors
    /// When it is not started, or no token can be made.
    pub fn admin(&self) -> Result<Api> {
        let service = self.services.iter().find(|service| service.name() == PRODUCT_SERVICE);
        let address = service.and_then(Service::address).context("the product service is not started")?;
        let token = stack_token(&stack_secret(&self.data)?, Role::Admin, TOKEN_LIFETIME)?;
        Api::new(&format!("http://{address}"), Secret::from(token))
    }

    /// The services, to be killed and restarted by tests.
    pub fn services(&mut self) -> &mut [Service] {
        &mut self.services
    }

    /// Where the projection is.
    #[must_use]
    pub fn database_url(&self) -> Secret {
        Secret::from(self.postgres.url())
    }

    fn write_env_file(&self, secret: &Secret) -> Result<()> {
        let mut lines = vec![
            format!("NATS_URL={}", self.nats.url()),
            format!("STREAM_REPLICAS={REPLICAS}"),
            format!("DATABASE_URL={}", self.postgres.url()),
            format!("ADMIN_TOKEN={}", stack_token(secret, Role::Admin, TOKEN_LIFETIME)?),
            format!("VIEWER_TOKEN={}", stack_token(secret, Role::Viewer, TOKEN_LIFETIME)?),
        ];
        for (name, variable) in URL_VARIABLES {
            let service = self.services.iter().find(|service| service.name() == name);
            lines.extend(service.and_then(Service::address).map(|address| format!("{variable}=http://{address}")));
        }
        let operator = self.nats.credentials.variables(Who::Operator);
        lines.extend(operator.into_iter().map(|(name, value)| format!("{name}={value}")));
        write_private(&self.data.join(ENV_FILE), &format!("{}\n", lines.join("\n")))
    }

    fn shown(&self) -> String {
        let mut lines: Vec<String> =
            self.nats.nodes.iter().map(|node| format!("{:<24} {}", node.node(), node.url())).collect();
        lines.extend(
            self.services.iter().filter_map(|service| Some(format!("{:<24} {}", service.name(), service.address()?))),
        );
        lines.push(format!(
            "Data, logs and keys are in {}; the operator's settings in {}, other keys in nats/keys.",
            self.data.display(),
            self.data.join(ENV_FILE).display()
        ));
        lines.push("Ready. Ctrl-C stops everything.".to_owned());
        lines.join("\n")
    }

    /// Stops services, then the servers.
    ///
    /// # Errors
    /// When a part did not end in order; all of them are gone all the same.
    pub async fn stop(mut self) -> Result<()> {
        let mut outcome = Ok(());
        for service in &mut self.services {
            outcome = outcome.and(service.stop().await);
        }
        outcome = outcome.and(self.redis.stop().await).and(self.postgres.stop().await);
        for node in &mut self.nats.nodes {
            outcome = outcome.and(node.stop().await);
        }
        outcome
    }
}

/// Makes the streams, three times each. A cluster that has just found its leader may still refuse to place them.
async fn apply_streams(admin: &Context) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let applied = async {
            for step in upkeep::plan(admin, REPLICAS).await? {
                upkeep::carry_out(admin, &step).await?;
            }
            Ok::<(), streams::StreamsError>(())
        };
        match applied.await {
            Ok(()) => return Ok(()),
            Err(problem) if Instant::now() >= deadline => return Err(problem).context("could not apply streams/"),
            Err(problem) => debug!(%problem, "the streams cannot be made yet"),
        }
        tokio::time::sleep(LOOK_PAUSE * 10).await;
    }
}

// ── The nodes as the streams see them ───────────────────────────────────────────────────────────────────────────

/// What has a leader of its own and must have one for orders to be taken and decided. A consumer is called `STREAM/CONSUMER`.
const LED: [&str; 3] = [streams::ORDERS, streams::INVENTORY, "ORDERS/product-orders"];

/// What to ask of the servers about a stream or consumer.
fn call(verb: &str, name: &str) -> String {
    match name.split_once('/') {
        Some((stream, consumer)) => format!("CONSUMER.{verb}.{stream}.{consumer}"),
        None => format!("STREAM.{verb}.{name}"),
    }
}

/// Which node leads a stream or consumer; none while there is none.
///
/// # Errors
/// When nobody answers.
pub async fn leader(admin: &Context, name: &str) -> Result<Option<String>> {
    let info: Value = admin.request(call("INFO", name), &json!({})).await?;
    Ok(info["cluster"]["leader"].as_str().map(ToOwned::to_owned))
}

/// What of [`LED`] a node leads.
async fn led_by(admin: &Context, node: &str) -> Result<Vec<String>> {
    let mut led = Vec::new();
    for name in LED {
        if leader(admin, name).await?.as_deref() == Some(node) {
            led.push(name.to_owned());
        }
    }
    Ok(led)
}

/// How many entries a copy may be behind and still be up to date: while orders go on, a few are always on their way.
const ON_THEIR_WAY: u64 = 100;

/// Waits until every copy of every stream and its consumers is there and up to date.
///
/// # Errors
/// After [`PATIENCE`].
pub async fn wait_until_healthy(admin: &Context) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let ill = match ailments(admin).await {
            Ok(ill) if ill.is_empty() => return Ok(()),
            Ok(ill) => ill.join("; "),
            Err(problem) => format!("{problem:#}"),
        };
        ensure!(Instant::now() < deadline, "the nodes do not agree again: {ill}");
        tokio::time::sleep(LOOK_PAUSE * 5).await;
    }
}

async fn ailments(admin: &Context) -> Result<Vec<String>> {
    let mut ill = Vec::new();
    for definition in streams::definitions() {
        let name = definition.name;
        let consumers =
            definition.consumers.into_iter().map(|(consumer, _)| format!("CONSUMER.INFO.{name}.{consumer}"));
        for subject in consumers.chain([format!("STREAM.INFO.{name}")]) {
            let info: Value = admin.request(subject.clone(), &json!({})).await?;
            let cluster = &info["cluster"];
            let others = cluster["replicas"].as_array().map(Vec::as_slice).unwrap_or_default();
            let follows = |other: &Value| other["lag"].as_u64().is_some_and(|lag| lag <= ON_THEIR_WAY);
            let good = |other: &Value| (other["current"] == true || follows(other)) && other["offline"] != true;
            if cluster["leader"].as_str().is_none_or(str::is_empty)
                || others.len() + 1 < NODES
                || !others.iter().all(good)
            {
                ill.push(format!("{subject} says {cluster}"));
            }
        }
    }
    Ok(ill)
}

/// Has a node lead a stream or consumer.
///
/// # Errors
/// When it does not in time.
pub async fn make_leader(admin: &Context, name: &str, node: &str) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let subject = call("LEADER.STEPDOWN", name);
    while leader(admin, name).await.ok().flatten().as_deref() != Some(node) {
        ensure!(Instant::now() < deadline, "{node} does not become the leader of {name}");
        let wish = json!({ "placement": { "preferred": node } });
        if let Err(problem) = admin.request::<_, _, Value>(subject.clone(), &wish).await {
            debug!(%problem, "the leader does not step down yet");
        }
        tokio::time::sleep(LOOK_PAUSE * 10).await;
    }
    Ok(())
}

// ── The load ────────────────────────────────────────────────────────────────────────────────────────────────────

/// The orders of a load.
#[derive(Clone, Debug)]
pub enum Orders {
    /// Made up from this seed, without an end.
    MadeUp(u64),
    /// Those of a file, once each.
    Of(PathBuf),
}

impl Orders {
    /// Made up from a seed that nobody knows yet.
    #[must_use]
    pub fn thrown() -> Self {
        Self::MadeUp(Uuid::new_v4().as_u64_pair().0)
    }
}

impl std::fmt::Display for Orders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::MadeUp(seed) => write!(f, "seed {seed}"),
            Self::Of(file) => write!(f, "those of {}", file.display()),
        }
    }
}

type Source = Box<dyn Iterator<Item = Result<Envelope<OrderCreated>>> + Send>;

/// Orders published steadily, by a shop, until told to end; and when each was acknowledged and decided.
#[derive(Debug)]
pub struct Load {
    /// How many there are, when that is known.
    total: Option<usize>,
    is_endless: bool,
    stop: CancellationToken,
    _leaving: DropGuard,
    publishing: JoinHandle<Result<()>>,
    watching: JoinHandle<()>,
    seen: Arc<Mutex<Seen>>,
}

#[derive(Debug, Default)]
struct Seen {
    published: HashMap<OrderId, Instant>,
    acknowledged: Vec<Instant>,
    decided: Vec<Instant>,
    undecided: HashMap<OrderId, Instant>,
    twice: u64,
    /// Whether there are no more orders.
    is_over: bool,
}

fn locked(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Load {
    /// Registers products and begins.
    ///
    /// # Errors
    /// When the products cannot be registered.
    pub async fn start(stack: &ClusterStack, orders: &Orders) -> Result<Self> {
        let admin = stack.admin()?;
        let (total, source) = match orders {
            Orders::MadeUp(seed) => (None, made_up(&admin, Dice(*seed)).await?),
            Orders::Of(file) => of_file(&admin, file).await?,
        };
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = CancellationToken::new();
        let operator = stack.context(Who::Operator).await?;
        // Before the first order: its decision must not be missed.
        let from = JetStreamLedger::read_only(operator.clone(), streams::INVENTORY).last_sequence().await?;
        let shop = stack.context(Who::Orders).await?;
        // Whoever is connected to a node that is cut off finds another by itself.
        let (asked, told) = (operator.clone(), seen.clone());
        let leaving = CancellationToken::new();
        tokio::spawn(nats::leave_a_lonely_server(shop.client(), leaving.clone(), move || {
            let last = locked(&told).acknowledged.last().copied();
            async move { last.is_some_and(|last| last.elapsed() < SILENT_AFTER) }
        }));
        tokio::spawn(nats::leave_a_lonely_server(operator.client(), leaving.clone(), move || {
            let asked = asked.clone();
            async move { streams::is_answered(&asked, streams::ORDERS, streams::PRODUCT_ORDERS).await }
        }));
        let publishing = tokio::spawn(publish(shop, source, seen.clone(), stop.clone()));
        let watching = tokio::spawn(watch(operator, from, seen.clone()));
        let is_endless = matches!(orders, Orders::MadeUp(_));
        Ok(Self { total, is_endless, stop, _leaving: leaving.drop_guard(), publishing, watching, seen })
    }

    /// Waits until so many of `of` parts of the orders are published; not at all where nobody knows how many there are.
    async fn published(&self, parts: usize, of: usize) {
        let due = self.total.unwrap_or_default() * parts / of;
        while locked(&self.seen).published.len() < due && !self.publishing.is_finished() {
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// Waits until an order that is published from now on is decided, if any is left, and every order published before now.
    ///
    /// # Errors
    /// After [`PATIENCE`].
    pub async fn flows(&self) -> Result<()> {
        let from = Instant::now();
        let deadline = from + PATIENCE;
        loop {
            {
                let seen = locked(&self.seen);
                let open = seen.undecided.values().filter(|published| **published <= from).count();
                let flows = seen.is_over
                    || seen.decided.last().is_some_and(|decided| *decided > from)
                        && seen.published.values().filter(|published| **published > from).count()
                            > seen.undecided.len();
                if open == 0 && flows {
                    return Ok(());
                }
                let waited = PATIENCE.as_secs();
                ensure!(Instant::now() < deadline, "after {waited} s {open} orders of before are not decided");
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }

    /// The longest time since `from` in which nothing was acknowledged, and in which nothing was decided.
    #[must_use]
    pub fn gaps(&self, from: Instant) -> (Duration, Duration) {
        let seen = locked(&self.seen);
        (longest_gap(&seen.acknowledged, from), longest_gap(&seen.decided, from))
    }

    /// Ends it, and waits until everything is acknowledged and decided; how many orders there were. Those of a file are
    /// published to the last.
    ///
    /// # Errors
    /// When an order is not decided in time, or one was decided twice.
    pub async fn end(self) -> Result<usize> {
        if self.is_endless {
            self.stop.cancel();
        }
        self.publishing.await.context("the load panicked")??;
        let deadline = Instant::now() + PATIENCE;
        loop {
            {
                let seen = locked(&self.seen);
                ensure!(seen.twice == 0, "{} orders were decided twice", seen.twice);
                if seen.undecided.is_empty() {
                    self.watching.abort();
                    return Ok(seen.published.len());
                }
                ensure!(Instant::now() < deadline, "{} orders are not decided", seen.undecided.len());
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

fn longest_gap(times: &[Instant], from: Instant) -> Duration {
    let before = times.iter().rev().find(|time| **time <= from).copied();
    let after = times.iter().copied().filter(|time| *time > from);
    let points: Vec<Instant> = before.into_iter().chain(after).collect();
    points.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
}

/// Registers products, and makes up orders of them.
async fn made_up(admin: &Api, mut dice: Dice) -> Result<Source> {
    let ids: Vec<ProductId> = std::iter::repeat_with(|| ProductId(Uuid::new_v4())).take(PRODUCTS).collect();
    let products = ids.iter().enumerate().map(|(number, product)| {
        let sku = format!("CLUSTER-{number}-{}", &product.0.simple().to_string()[..6]);
        json!({ "productId": product, "sku": sku, "name": format!("Unit {number}"), "initialQuantity": STOCK })
    });
    register(admin, products).await?;
    Ok(Box::new(std::iter::repeat_with(move || order(&mut dice, &ids))))
}

async fn register(admin: &Api, products: impl Iterator<Item = Value>) -> Result<()> {
    let report = import(admin, products).await?;
    ensure!(report.is_good(), "products were not registered: {report:?}");
    Ok(())
}

/// Registers the products of a retail file, each with as much stock as its orders want, and opens its orders. Envelopes name no
/// products: those must be there.
async fn of_file(admin: &Api, file: &Path) -> Result<(Option<usize>, Source)> {
    let orders = retail::open(file)?;
    let total = orders.total();
    if total.is_some() {
        let stock = |ordered: u64| u32::try_from(ordered).unwrap_or(u32::MAX);
        let products = retail::catalogue_of(file, stock)?.products;
        register(admin, products.iter().map(|product| crate::import::product(&product.row))).await?;
    }
    Ok((total, Box::new(orders.fit().map(|order| order.map_err(Into::into)))))
}

async fn publish(shop: Context, mut orders: Source, seen: Arc<Mutex<Seen>>, stop: CancellationToken) -> Result<()> {
    let mut on_the_way = futures::stream::FuturesUnordered::new();
    let mut due = tokio::time::interval(LOAD_PAUSE);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            Some(published) = on_the_way.next(), if !on_the_way.is_empty() => {
                let _: bool = published?;
                locked(&seen).acknowledged.push(Instant::now());
            }
            () = stop.cancelled() => break,
            _ = due.tick(), if on_the_way.len() < IN_FLIGHT => {
                let Some(order) = orders.next().transpose()? else { break };
                let now = Instant::now();
                {
                    let mut seen = locked(&seen);
                    seen.published.insert(order.payload.order_id, now);
                    seen.undecided.insert(order.payload.order_id, now);
                }
                on_the_way.push(crate::orders::publish(&shop, order));
            }
        }
    }
    while let Some(published) = on_the_way.next().await {
        let _: bool = published?;
        locked(&seen).acknowledged.push(Instant::now());
    }
    locked(&seen).is_over = true;
    Ok(())
}

fn order(dice: &mut Dice, products: &[ProductId]) -> Result<Envelope<OrderCreated>> {
    let lines = 1 + dice.below(3);
    let items = (0..lines).map(|_| {
        let quantity = LineQuantity::new(1 + u32::try_from(dice.below(3)).unwrap_or_default()).context("a quantity")?;
        Ok(OrderItem { product_id: products[dice.index(products.len())], sku: None, quantity })
    });
    let items = OrderItems::new(items.collect::<Result<Vec<_>>>()?).context("an order has lines")?;
    let payload = OrderCreated { order_id: dice.uuid().into(), customer_id: None, items };
    Ok(Envelope::new(dice.uuid().into(), Timestamp::now(), payload))
}

/// Reads what is decided as soon as it is there.
async fn watch(operator: Context, mut read: u64, seen: Arc<Mutex<Seen>>) {
    let ledger = JetStreamLedger::read_only(operator.clone(), streams::INVENTORY);
    let mut last_of_batch: Option<OrderId> = None;
    loop {
        tokio::time::sleep(LOOK_PAUSE).await;
        // A request that was lost with its node is answered by nobody.
        let Ok(Ok(last)) = tokio::time::timeout(LOOK_TIMEOUT, ledger.last_sequence()).await else { continue };
        let mut messages = direct::read(&operator, streams::INVENTORY, None, read, last);
        while let Ok(Some(Ok(held))) = tokio::time::timeout(LOOK_TIMEOUT, messages.next()).await {
            read = held.sequence;
            // By the server's clock, which is this machine's: when it was decided, not when it was seen.
            let ago = Duration::try_from(OffsetDateTime::now_utc() - held.stored_at).unwrap_or_default();
            let decided = Instant::now() - ago;
            let Ok(event) = lomash_ledger::StoredMessage::from(held).parse() else { continue };
            let order = match event.payload {
                LedgerEvent::InventoryUpdated(updated) => updated.order_id,
                LedgerEvent::InventoryUpdateFailed(failed) => Some(failed.order_id),
                _ => None,
            };
            // The lines of one order follow each other.
            let Some(order) = order.filter(|order| last_of_batch != Some(*order)) else { continue };
            last_of_batch = Some(order);
            let mut seen = locked(&seen);
            seen.decided.push(decided);
            if seen.undecided.remove(&order).is_none() {
                seen.twice += 1;
            }
        }
    }
}

// ── The check ───────────────────────────────────────────────────────────────────────────────────────────────────

/// What a check saw.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The faults, in their order.
    pub faults: Vec<Fault>,
    /// Orders published, all of them acknowledged and decided.
    pub orders: usize,
    /// Events of the ledger.
    pub events: u64,
    /// Whether the verifier found nothing, with each node as the leader in turn.
    pub clean: bool,
    /// What the verifier's fold came to under each leader.
    pub hashes: Vec<(String, String)>,
}

impl Report {
    /// Whether every promise was kept. How long a gap was is shown and decides nothing: the machine may be busy.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.clean && self.hashes.iter().all(|(_, hash)| !hash.is_empty() && *hash == self.hashes[0].1)
    }
}

/// A fault and what it cost.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fault {
    /// What happened to which node.
    pub what: String,
    /// What it led at that moment.
    pub led: Vec<String>,
    /// Longest time in which no order was acknowledged.
    pub without_acknowledgement_ms: u64,
    /// Longest time in which no order was decided.
    pub without_decision_ms: u64,
    /// How long no order should go unacknowledged.
    pub target_ms: u64,
}

/// Within this acknowledgements should be back, by what happened: a leader or a follower killed, a leader frozen, all three
/// killed and started again, each restarted in order.
const LEADER_TARGET: Duration = Duration::from_secs(8);
const FOLLOWER_TARGET: Duration = Duration::from_secs(1);
const FROZEN_TARGET: Duration = Duration::from_secs(6);
const ALL_TARGET: Duration = Duration::from_secs(7);
const RESTART_TARGET: Duration = Duration::from_secs(1);

/// How long a node is frozen.
const FREEZE: Duration = Duration::from_secs(15);

/// Troubles of the check: each node killed, one frozen, all killed, and each restarted.
pub const TROUBLES: usize = 2 * NODES + 2;

/// Runs orders through it while the nodes are in trouble, and verifies with each node as leader.
///
/// # Errors
/// When something does not recover.
pub async fn check(stack: &mut ClusterStack, orders: Orders, tell: impl Fn(&str)) -> Result<Report> {
    let admin = stack.context(Who::Administrator).await?;
    wait_until_healthy(&admin).await?;
    tell(&format!("orders flow, {orders}"));
    let load = Load::start(stack, &orders).await?;
    load.flows().await?;
    tokio::time::sleep(CALM).await;

    let names: Vec<String> = stack.nats.nodes.iter().map(|node| node.node().to_owned()).collect();
    let mut trouble = Trouble { admin, load, faults: Vec::new(), tell };
    // One leads nothing, one the ledger, one the orders: each role is lost once.
    for (victim, target) in [(2, FOLLOWER_TARGET), (0, LEADER_TARGET), (1, LEADER_TARGET)] {
        trouble.arrange([&names[1], &names[0], &names[1]]).await?;
        let since = trouble.begins("killed", &names[victim]).await?;
        stack.nats.nodes[victim].kill();
        trouble.load.flows().await?;
        trouble.ends(since, target);
        stack.nats.nodes[victim].restart().await?;
        wait_until_healthy(&trouble.admin).await?;
    }

    trouble.arrange([&names[0]; 3]).await?;
    let since = trouble.begins("frozen", &names[0]).await?;
    stack.nats.nodes[0].pause()?;
    let thawing = async {
        tokio::time::sleep(FREEZE).await;
        stack.nats.nodes[0].resume()
    };
    let (flows, thawed) = tokio::join!(trouble.load.flows(), thawing);
    flows.and(thawed)?;
    trouble.ends(since, FROZEN_TARGET);
    wait_until_healthy(&trouble.admin).await?;

    trouble.load.published(trouble.faults.len(), TROUBLES).await;
    (trouble.tell)("killing all three");
    for node in &mut stack.nats.nodes {
        node.kill();
    }
    // What counts is the time after their restart; the line before says nothing of leaders, for all are gone.
    let since = Begun { what: "all three killed".to_owned(), led: Vec::new(), at: Instant::now() };
    futures::future::try_join_all(stack.nats.nodes.iter_mut().map(|node| node.restart())).await?;
    trouble.load.flows().await?;
    trouble.ends(since, ALL_TARGET);
    wait_until_healthy(&trouble.admin).await?;

    for (node, name) in stack.nats.nodes.iter_mut().zip(&names) {
        let since = trouble.begins("restarted", name).await?;
        node.retire().await?;
        node.restart().await?;
        wait_until_healthy(&trouble.admin).await?;
        trouble.load.flows().await?;
        trouble.ends(since, RESTART_TARGET);
    }
    tokio::time::sleep(CALM).await;
    let Trouble { admin, load, faults, tell } = trouble;
    let orders = load.end().await?;

    tell("verifying with each node as the leader");
    let operator = stack.context(Who::Operator).await?;
    let database_url = stack.database_url();
    verify::wait_until_quiet(&operator, Some(&database_url), PATIENCE).await?;
    let events = JetStreamLedger::read_only(operator.clone(), streams::INVENTORY).last_sequence().await?;
    let (mut clean, mut hashes) = (true, Vec::new());
    for name in names {
        make_leader(&admin, streams::INVENTORY, &name).await?;
        let report = verify::verify(&operator, Some(&database_url), Show::Nothing).await?;
        if !report.is_clean() {
            tell(&verify::render(&report));
            clean = false;
        }
        hashes.push((name, digests(&report)));
    }
    Ok(Report { faults, orders, events, clean, hashes })
}

/// What a check does to the nodes, and what it cost so far.
struct Trouble<F> {
    admin: Context,
    load: Load,
    faults: Vec<Fault>,
    tell: F,
}

/// A fault that is not over.
struct Begun {
    what: String,
    led: Vec<String>,
    at: Instant,
}

impl<F: Fn(&str)> Trouble<F> {
    /// Has these nodes lead what is in [`LED`], in its order.
    async fn arrange(&self, nodes: [&String; LED.len()]) -> Result<()> {
        for (name, node) in LED.into_iter().zip(nodes) {
            make_leader(&self.admin, name, node).await?;
        }
        wait_until_healthy(&self.admin).await?;
        // A batch on its way to a leader that steps down is not answered; that is not to be counted with what follows.
        self.load.flows().await
    }

    /// Waits until it is time for the next fault, and notes what the node leads.
    async fn begins(&self, what: &str, node: &str) -> Result<Begun> {
        self.load.published(self.faults.len(), TROUBLES).await;
        let led = led_by(&self.admin, node).await?;
        let leads = if led.is_empty() { "nothing".to_owned() } else { led.join(", ") };
        (self.tell)(&format!("{node}, which leads {leads}, is {what}"));
        Ok(Begun { what: format!("{node} {what}"), led, at: Instant::now() })
    }

    fn ends(&mut self, Begun { what, led, at }: Begun, target: Duration) {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (acknowledged, decided) = self.load.gaps(at);
        let fault = Fault {
            what,
            led,
            without_acknowledgement_ms: ms(acknowledged),
            without_decision_ms: ms(decided),
            target_ms: ms(target),
        };
        (self.tell)(&format!(
            "no order acknowledged for {} ms, none decided for {} ms",
            fault.without_acknowledgement_ms, fault.without_decision_ms
        ));
        self.faults.push(fault);
    }
}

/// What the fold came to: the digest of each table, as the verifier notes them.
fn digests(report: &crate::audit::Report) -> String {
    let notes = report.invariants.iter().flat_map(|invariant| &invariant.notes);
    let digests: Vec<&str> = notes.filter_map(|note| note.split_once("sha256 ")).map(|(_, digest)| digest).collect();
    let short = |digest: &&str| digest.get(..16).unwrap_or(digest).to_owned();
    digests.iter().map(short).collect::<Vec<_>>().join(" ")
}

/// The report as a person reads it.
#[must_use]
pub fn render(report: &Report) -> String {
    let mut table = output::table(&["what happened", "led", "no order acknowledged for", "none decided for", "target"]);
    let seconds = |ms: u64| Cell::new(format!("{}.{} s", ms / 1000, ms % 1000 / 100));
    for fault in &report.faults {
        table.add_row([
            Cell::new(&fault.what),
            Cell::new(fault.led.join(", ")),
            seconds(fault.without_acknowledgement_ms),
            seconds(fault.without_decision_ms),
            seconds(fault.target_ms),
        ]);
    }
    let verdict = if report.is_good() { "clean, the same fold under each leader" } else { "VIOLATED" };
    let hashes: String = report.hashes.iter().map(|(node, hash)| format!("  {node}: {hash}\n")).collect();
    let (orders, events) = (output::thousands(report.orders as u64), output::thousands(report.events));
    format!(
        "{table}\n{orders} orders, each acknowledged and decided once; {events} events. Verify: {verdict}\n{hashes}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_begins_before_the_fault() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let times = [at(0), at(10), at(20), at(900), at(910)];
        assert_eq!(longest_gap(&times, at(25)), Duration::from_millis(880), "from the last one before it");
        assert_eq!(longest_gap(&times, at(905)), Duration::from_millis(10));
        assert_eq!(longest_gap(&times, at(2_000)), Duration::ZERO);
    }
}
