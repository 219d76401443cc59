//! The world of a test: real servers of its own in a folder of its own, the product service on them, and the words in
//! which tests speak of orders and wait for what becomes of them.
//!
//! Owns starting, waiting and asking; what must hold is said by the tests and by `lomash verify`. Assumes that
//! `./just setup` has run. Every world has its own ports and data, so tests run side by side. Nothing here sleeps for
//! a time that it hopes is enough: it follows the stream, or looks again and again until a named deadline.
//!
//! Whatever fails here says in its first line what was expected and what was there instead.

pub mod http;
pub mod traces;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::jetstream::Context;
use async_nats::{Client, HeaderMap};
use clap::Parser;
use futures::StreamExt;
use lomash::audit::Report;
use lomash::stack::{Nats, Postgres, Service, free_port, log_tail, scratch};
use lomash::verify::{self, Show};
use lomash_contract::{
    ContentType, Envelope, EventId, FailureReason, LedgerEvent, LineQuantity, OrderCreated, OrderId, OrderItem,
    OrderItems, ProductId, Timestamp, Topic, UpdatedBy, codec,
};
use lomash_ledger::{Carried, JetStreamLedger, Ledger, StoredMessage, header, streams};
use lomash_platform::Secret;
use lomash_web::Role;
use lomash_web::auth::{Mint, mint};
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use product_service::committer::{CommandError, Committed, Committer, committer};
use product_service::inventory::{Action, Command, Details, ProductCommand, State};
use product_service::service::{Config, run};
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;

/// How long anything may take that needs no fault to heal. Far more than it takes: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// The product service as this package builds it, with crash points.
const PROGRAM: &str = "product-service-under-test";

/// What the product service logs last when it starts.
const READY_LINE: &str = " ready";

/// The variable that replays a seed.
const SEED_VARIABLE: &str = "LOMASH_TEST_SEED";

/// Looks until there is something to see, and returns it.
///
/// A look that fails is a look that saw nothing: servers may be down just now.
///
/// # Errors
/// After `within`, with what the last look said.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut look: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    let mut last = String::from("there was nothing to see");
    loop {
        match tokio::time::timeout_at(deadline, look()).await {
            Ok(Ok(Some(seen))) => return Ok(seen),
            Ok(Ok(None)) => {}
            Ok(Err(problem)) => last = format!("{problem:#}"),
            Err(_) => last = format!("the last look did not end; before it: {last}"),
        }
        if Instant::now() >= deadline {
            bail!("expected {what} within {} s, but: {last}", within.as_secs());
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
}

/// What the services of a world check HS256 tokens with.
pub const JWT_SECRET: &str = "a secret of tests, known to everybody";

/// A token of this world's services.
///
/// # Errors
/// Never, in practice.
pub fn token(role: Role, subject: Uuid) -> anyhow::Result<String> {
    let secret = Secret::from(JWT_SECRET.to_owned());
    let (issuer, audience, lifetime) = (DEVELOPMENT_ISSUER, DEVELOPMENT_AUDIENCE, Duration::from_secs(600));
    mint(&secret, &Mint { issuer, audience, subject, role, lifetime })
}

/// Carries out commands of the tests themselves by a committer in this process, beside the services and whether there are any:
/// another writer, as a further replica is. So tests can have done what no admin may ask for over HTTP, such as the correction
/// of a count, or under an id of their own; what an admin does is tested over HTTP.
#[derive(Clone, Debug)]
pub struct Desk {
    committer: Committer,
    _stop: Arc<DropGuard>,
}

impl Desk {
    fn at(ledger: JetStreamLedger) -> Self {
        let stop = CancellationToken::new();
        // It knows nothing yet, and finds out by the first conflict.
        let (committer, committing) = committer(ledger, State::default(), Timestamp::now, stop.clone());
        tokio::spawn(committing);
        Self { committer, _stop: Arc::new(stop.drop_guard()) }
    }

    /// Has a command carried out, and waits until it is stored.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn send(&self, command: ProductCommand, reason: Option<String>) -> Result<Committed, CommandError> {
        let carried = reason.map(|reason| Arc::new(Carried { reason: Some(reason), ..Carried::default() }));
        self.committer.submit(Command::Product(command), carried).await
    }
}

/// Waits until the service at `url` says that it is ready.
///
/// # Errors
/// When it does not within [`PATIENCE`].
pub async fn ready_at(url: &str) -> anyhow::Result<()> {
    let caller = http::Caller::new(url, Role::Viewer)?;
    eventually("the product service to be ready", PATIENCE, async || {
        let answer = caller.get("/readyz").send().await?;
        ensure!(answer.status == 200, "it says {}: {}", answer.status, answer.text);
        Ok(Some(()))
    })
    .await
}

/// Servers of one test. End a test with [`World::close`]; a world that is dropped before tells what its services
/// logged.
// Fields are dropped from the first to the last: servers before the folder they live in.
#[derive(Debug)]
pub struct World {
    /// Whoever carries out the test's own commands; made when there is one.
    desk: OnceCell<Desk>,
    /// JetStream, as an administrator.
    pub context: Context,
    /// A connection of the test's own.
    pub client: Client,
    /// The projection's server, if this world has one.
    pub postgres: Option<Postgres>,
    /// The server of the streams.
    pub nats: Nats,
    /// Where the services of this world answer HTTP, by name.
    addresses: Mutex<HashMap<String, String>>,
    /// Where they tell their health and metrics.
    health_addresses: Mutex<HashMap<String, String>>,
    dir: tempfile::TempDir,
    closed: bool,
}

impl World {
    /// NATS with the streams applied, and Postgres. No service runs yet.
    ///
    /// # Errors
    /// When a server does not start.
    pub async fn start() -> anyhow::Result<Self> {
        let dir = scratch()?;
        let postgres_dir = dir.path().join("postgres");
        let (nats, postgres) = tokio::try_join!(Self::start_nats(dir.path()), Postgres::start(&postgres_dir))?;
        Self::of(dir, nats, Some(postgres)).await
    }

    /// The same without Postgres: nothing listens where the services look for it.
    ///
    /// # Errors
    /// When NATS does not start.
    pub async fn without_postgres() -> anyhow::Result<Self> {
        let dir = scratch()?;
        let nats = Self::start_nats(dir.path()).await?;
        Self::of(dir, nats, None).await
    }

    async fn start_nats(dir: &Path) -> anyhow::Result<Nats> {
        Nats::start(&dir.join("nats")).await
    }

    async fn of(dir: tempfile::TempDir, nats: Nats, postgres: Option<Postgres>) -> anyhow::Result<Self> {
        let client = lomash_platform::nats::connect(&nats.url(), "test").await?;
        let context = async_nats::jetstream::new(client.clone());
        streams::wait_until_ready(&context).await?;
        let differences = streams::apply(&context, 1).await?;
        ensure!(differences.is_empty(), "expected a fresh server to be as defined, but: {differences:?}");
        Ok(Self {
            desk: OnceCell::new(),
            context,
            client,
            postgres,
            nats,
            addresses: Mutex::default(),
            health_addresses: Mutex::default(),
            dir,
            closed: false,
        })
    }

    /// The folder of this world; services log there, one `.log` file each.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Ends the test well.
    pub fn close(mut self) {
        self.closed = true;
    }

    /// Where the projection is, or would be.
    #[must_use]
    pub fn database_url(&self) -> Secret {
        self.postgres.as_ref().map_or_else(nowhere, |postgres| Secret::from(postgres.url()))
    }

    /// A connection to the projection.
    ///
    /// # Errors
    /// When Postgres cannot be reached.
    pub async fn database(&self) -> anyhow::Result<tokio_postgres::Client> {
        lomash_platform::postgres::connect(&self.database_url()).await
    }

    /// The ledger.
    #[must_use]
    pub fn ledger(&self) -> JetStreamLedger {
        JetStreamLedger::new(self.context.clone(), streams::INVENTORY)
    }

    // ── The product service ─────────────────────────────────────────────────────────────────────────────────────

    /// A product service as a child process, told where the servers are; not started. `name` names its log.
    ///
    /// # Errors
    /// When its program is not built.
    pub fn service(&self, name: &str) -> anyhow::Result<Service> {
        self.service_of(PROGRAM, name)
    }

    /// The same for another program of this package.
    ///
    /// # Errors
    /// When it is not built.
    pub fn service_of(&self, program: &str, name: &str) -> anyhow::Result<Service> {
        let program = lomash::up::program(program)?;
        let log = self.dir().join(format!("{name}.log"));
        let address = format!("127.0.0.1:{}", free_port()?);
        let health = format!("127.0.0.1:{}", free_port()?);
        let service = Service::new(name, &program, &log)
            .env("NATS_URL", self.nats.url())
            .env("DATABASE_URL", self.database_url().expose())
            .env("HTTP_LISTEN", &address)
            .env("HEALTH_LISTEN", &health)
            .env("JWT_HS256_SECRET", JWT_SECRET);
        self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(name.to_owned(), address);
        let mut known = self.health_addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.insert(name.to_owned(), health);
        drop(known);
        Ok(service)
    }

    /// Where the service `name` answers HTTP.
    ///
    /// # Panics
    /// When this world has no such service.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        let addresses = self.addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        format!("http://{}", addresses.get(name).expect("a service of this world"))
    }

    /// Where the service `name` tells its health and metrics.
    ///
    /// # Panics
    /// When this world has no such service.
    #[must_use]
    pub fn health_url(&self, name: &str) -> String {
        let addresses = self.health_addresses.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        format!("http://{}", addresses.get(name).expect("a service of this world"))
    }

    /// A product service as a child process, ready.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn start_service(&self, name: &str) -> anyhow::Result<Service> {
        let mut service = self.service(name)?;
        start_until_ready(&mut service).await?;
        Ok(service)
    }

    /// How a product service of this world is configured when it runs inside the test's process.
    #[must_use]
    pub fn config(&self) -> Config {
        let (nats_url, database_url) = (self.nats.url(), self.database_url());
        Config::parse_from([
            "product-service",
            "--nats-url",
            &nats_url,
            "--database-url",
            database_url.expose(),
            "--http-listen",
            "127.0.0.1:0",
            "--health-listen",
            "127.0.0.1:0",
            "--jwt-hs256-secret",
            JWT_SECRET,
            "--reconciliation-schedule",
            "off",
            "--snapshot-schedule",
            "off",
        ])
    }

    /// Runs a product service inside the test's process and waits until it answers. Faster to start than a child, but
    /// it cannot be killed.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn run_service(&self) -> anyhow::Result<InProcess> {
        self.run_service_as(self.config()).await
    }

    /// The same with another configuration.
    ///
    /// # Errors
    /// When it does not get ready.
    pub async fn run_service_as(&self, mut config: Config) -> anyhow::Result<InProcess> {
        let address = format!("127.0.0.1:{}", free_port()?);
        config.service.http.http_listen = address.parse()?;
        let url = format!("http://{address}");
        let stop = CancellationToken::new();
        let mut task = tokio::spawn(run(config, stop.clone()));
        tokio::select! {
            ended = &mut task => bail!("expected an answer of the product service, but it ended: {ended:?}"),
            answered = ready_at(&url) => answered?,
        }
        Ok(InProcess { url, stop, task })
    }

    /// The client that orders are delivered to, as the server names it; None while it is nobody.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn pinned(&self) -> anyhow::Result<Option<String>> {
        let subject = format!("CONSUMER.INFO.{}.{}", streams::ORDERS, streams::PRODUCT_ORDERS);
        let info: serde_json::Value = self.context.request(subject, &serde_json::json!({})).await?;
        Ok(info.pointer("/priority_groups/0/pinned_client_id").and_then(|id| id.as_str()).map(str::to_owned))
    }

    // ── Products ────────────────────────────────────────────────────────────────────────────────────────────────

    /// Whoever carries out the test's own commands on the servers as they are now.
    pub async fn desk(&self) -> &Desk {
        self.desk.get_or_init(async || Desk::at(self.ledger())).await
    }

    /// Has the test's own commands carried out on another server from now on.
    pub fn move_to(&mut self, nats: Nats, client: Client) {
        self.nats = nats;
        self.context = async_nats::jetstream::new(client.clone());
        self.client = client;
        self.desk = OnceCell::new();
    }

    /// Has an action carried out on a product, as the system.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn act(&self, product_id: ProductId, action: Action) -> anyhow::Result<Committed> {
        let command = ProductCommand::new(Uuid::new_v4(), product_id, UpdatedBy::System, action);
        Ok(self.desk().await.send(command, None).await?)
    }

    /// Registers a product with stock, on sale.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn register(&self, sku: &str, quantity: u32) -> anyhow::Result<ProductId> {
        let product_id = ProductId(Uuid::new_v4());
        let action = Action::Register { details: details(sku)?, initial_quantity: quantity };
        self.act(product_id, action).await.with_context(|| format!("{sku} cannot be registered"))?;
        Ok(product_id)
    }

    /// Registers `count` products with the same stock each, many at a time.
    ///
    /// # Errors
    /// When one is refused.
    pub async fn register_many(&self, count: usize, quantity: u32) -> anyhow::Result<Vec<ProductId>> {
        let skus: Vec<String> = (1..=count).map(|number| format!("KIT-{number:04}")).collect();
        futures::future::try_join_all(skus.iter().map(|sku| self.register(sku, quantity))).await
    }

    // ── Orders ──────────────────────────────────────────────────────────────────────────────────────────────────

    /// Publishes an order until the stream confirms it, over lost connections and restarted servers; whether the
    /// stream had its event already.
    ///
    /// # Errors
    /// When nobody confirms it for long.
    pub async fn publish(&self, order: &Envelope<OrderCreated>) -> anyhow::Result<bool> {
        lomash::orders::publish(&self.context, order.clone()).await
    }

    /// Publishes orders, many at a time.
    ///
    /// # Errors
    /// As [`World::publish`].
    pub async fn publish_all(&self, orders: &[Envelope<OrderCreated>]) -> anyhow::Result<()> {
        /// Orders on the way at once.
        const IN_FLIGHT: usize = 256;
        let mut outcomes = futures::stream::iter(orders).map(|order| self.publish(order)).buffer_unordered(IN_FLIGHT);
        while let Some(outcome) = outcomes.next().await {
            outcome?;
        }
        Ok(())
    }

    /// Publishes any bytes on the topic of orders, with any headers; returns their sequence in `ORDERS`.
    ///
    /// # Errors
    /// When the stream does not confirm them.
    pub async fn publish_raw(&self, headers: HeaderMap, payload: impl Into<bytes::Bytes>) -> anyhow::Result<u64> {
        let topic = Topic::OrdersCreated.as_str();
        let sent = self.context.publish_with_headers(topic, headers, payload.into());
        Ok(sent.await?.await?.sequence)
    }

    /// Waits until all of these orders are decided, and says how.
    ///
    /// # Errors
    /// When one is not within [`PATIENCE`].
    pub async fn decided(&self, orders: impl IntoIterator<Item = OrderId>) -> anyhow::Result<HashMap<OrderId, Fate>> {
        self.decided_within(PATIENCE, orders).await
    }

    /// The same with a bound of the caller's. Follows the stream, and survives that its server is restarted.
    ///
    /// # Errors
    /// When an order is not decided in time.
    pub async fn decided_within(
        &self,
        within: Duration,
        orders: impl IntoIterator<Item = OrderId>,
    ) -> anyhow::Result<HashMap<OrderId, Fate>> {
        let mut open: std::collections::HashSet<OrderId> = orders.into_iter().collect();
        let all = open.len();
        let mut fates = HashMap::with_capacity(open.len());
        let ledger = self.ledger();
        let mut seen = 0;
        let following = async {
            while !open.is_empty() {
                let Ok(mut messages) = ledger.follow(seen).await else {
                    tokio::time::sleep(LOOK_PAUSE).await;
                    continue;
                };
                while !open.is_empty()
                    && let Some(Ok(message)) = messages.next().await
                {
                    seen = message.sequence;
                    if let Some((order, fate)) = fate(&message)
                        && open.remove(&order)
                    {
                        fates.insert(order, fate);
                    }
                }
            }
        };
        if tokio::time::timeout(within, following).await.is_err() {
            let example = open.iter().next();
            bail!(
                "expected {all} orders to be decided within {} s, but {} are not, {example:?} for example; the ledger was read to \
                 {seen}",
                within.as_secs(),
                open.len()
            );
        }
        Ok(fates)
    }

    // ── Looking back ────────────────────────────────────────────────────────────────────────────────────────────

    /// Everything in the ledger.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn messages(&self) -> anyhow::Result<Vec<StoredMessage>> {
        let mut messages = self.ledger().read(0).await?;
        let mut all = Vec::new();
        while let Some(message) = messages.next().await {
            all.push(message?);
        }
        Ok(all)
    }

    /// Every event in the ledger that is ours by form, with its message.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn events(&self) -> anyhow::Result<Vec<(StoredMessage, LedgerEvent)>> {
        let messages = self.messages().await?.into_iter();
        let events = messages.filter_map(|message| {
            let event = message.parse().ok()?.payload;
            Some((message, event))
        });
        Ok(events.collect())
    }

    /// The ledger's last sequence.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn last_sequence(&self) -> anyhow::Result<u64> {
        Ok(self.ledger().last_sequence().await?)
    }

    /// The stock of a product as the ledger has it: its last `newQuantity` that continues its chain, 0 before any.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn stock(&self, product: ProductId) -> anyhow::Result<u32> {
        let mut stock = 0;
        for (_, event) in self.events().await? {
            if let LedgerEvent::InventoryUpdated(updated) = event
                && updated.product_id == product
                && updated.previous_quantity == stock
            {
                stock = updated.new_quantity;
            }
        }
        Ok(stock)
    }

    /// Where a consumer of `ORDERS` stands.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn product_orders(&self) -> anyhow::Result<async_nats::jetstream::consumer::Info> {
        let consumer: async_nats::jetstream::consumer::PullConsumer =
            self.context.get_consumer_from_stream(streams::PRODUCT_ORDERS, streams::ORDERS).await?;
        Ok(consumer.cached_info().clone())
    }

    /// Waits until no order is pending or being decided and the projection, if there is one, is at the stream's end.
    ///
    /// # Errors
    /// After [`PATIENCE`], saying what is still open.
    pub async fn quiet(&self) -> anyhow::Result<()> {
        self.quiet_within(PATIENCE).await
    }

    /// The same with a bound of the caller's.
    ///
    /// # Errors
    /// After `within`, saying what is still open.
    pub async fn quiet_within(&self, within: Duration) -> anyhow::Result<()> {
        let database_url = self.postgres.as_ref().map(|_| self.database_url());
        verify::wait_until_quiet(&self.context, database_url.as_ref(), within).await
    }

    /// What `lomash verify` says now.
    ///
    /// # Errors
    /// When it cannot read the streams.
    pub async fn report(&self) -> anyhow::Result<Report> {
        let database_url = self.postgres.as_ref().map(|_| self.database_url());
        verify::verify(&self.context, database_url.as_ref(), Show::Nothing).await
    }

    /// Waits for quiet and has everything verified; returns the report of a clean ledger in which every order is
    /// decided and nothing was left unchecked that this world could check.
    ///
    /// # Errors
    /// When it does not become quiet.
    ///
    /// # Panics
    /// When the report is not clean; it is shown as `lomash verify` shows it.
    pub async fn verified(&self) -> anyhow::Result<Report> {
        self.quiet().await?;
        let report = self.report().await?;
        let text = verify::render(&report);
        let violated = report.invariants.iter().filter(|invariant| invariant.violations > 0);
        let violated: Vec<u8> = violated.map(|invariant| invariant.number).collect();
        assert!(report.is_clean(), "expected every invariant to hold, but {violated:?} are violated\n{text}");
        let unchecked: Vec<u8> = report.unchecked().map(|invariant| invariant.number).collect();
        let expected: &[u8] = if self.postgres.is_some() { &[] } else { &[7] };
        assert!(unchecked == expected, "expected {expected:?} to be left unchecked, but {unchecked:?} were\n{text}");
        let undecided = report.totals.orders_undecided;
        assert!(undecided == 0, "expected every order to be decided, but {undecided} are not\n{text}");
        Ok(report)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.closed {
            return;
        }
        for entry in std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
            if entry.path().extension().is_some_and(|extension| extension == "log") {
                eprintln!("{}: {}", entry.file_name().display(), log_tail(&entry.path()));
            }
        }
    }
}

/// A database that nobody can reach. Port 9 (discard) is no port of ours: the kernel refuses at once.
#[must_use]
pub fn nowhere() -> Secret {
    Secret::from("postgres://nobody@127.0.0.1:9/nothing".to_owned())
}

/// Starts a service and waits until it has folded the ledger and takes orders and commands.
///
/// # Errors
/// When it ends before, or takes too long.
pub async fn start_until_ready(service: &mut Service) -> anyhow::Result<()> {
    let lines = |service: &Service| {
        let log = std::fs::read_to_string(service.log()).unwrap_or_default();
        log.lines().filter(|line| line.ends_with(READY_LINE)).count()
    };
    let before = lines(service);
    service.start()?;
    let what = format!("{} to be ready", service.name());
    let ready = eventually(&what, PATIENCE, async || Ok((lines(service) > before).then_some(())));
    tokio::select! {
        status = service.ended() => {
            bail!("expected {what}, but it ended ({status}); {}", log_tail(service.log()))
        }
        ready = ready => ready,
    }
}

/// A product service inside the test's process.
#[derive(Debug)]
pub struct InProcess {
    /// Where it answers HTTP.
    pub url: String,
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl InProcess {
    /// Stops it in order.
    ///
    /// # Errors
    /// What it ended with.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop.cancel();
        self.task.await?
    }
}

/// What became of an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It got all it asked for.
    Allocated,
    /// It got nothing.
    Refused(FailureReason),
}

/// The mark of the process that wrote a message: the ids of its batches begin with it.
#[must_use]
pub fn writer(message: &StoredMessage) -> Option<&str> {
    Some(message.batch.as_ref()?.id.split_once('-')?.0)
}

/// What a message says about an order, if it is about one.
#[must_use]
pub fn fate(message: &StoredMessage) -> Option<(OrderId, Fate)> {
    match message.parse().ok()?.payload {
        LedgerEvent::InventoryUpdated(updated) => Some((updated.order_id?, Fate::Allocated)),
        LedgerEvent::InventoryUpdateFailed(failed) => Some((failed.order_id, Fate::Refused(failed.reason))),
        _ => None,
    }
}

/// Details of a product on sale that has nothing special.
///
/// # Errors
/// When `sku` is none.
pub fn details(sku: &str) -> anyhow::Result<Details> {
    Ok(Details {
        sku: sku.parse()?,
        name: format!("Product {sku}").into(),
        category: Some("kitchen".into()),
        low_stock_threshold: None,
        active: true,
    })
}

/// A new order of these products and quantities, in this order.
///
/// # Panics
/// When there is no line or too many, or a quantity is out of range.
#[must_use]
pub fn order(lines: &[(ProductId, u32)]) -> Envelope<OrderCreated> {
    order_as(EventId(Uuid::new_v4()), OrderId(Uuid::new_v4()), lines)
}

/// The same under ids of the caller's.
///
/// # Panics
/// As [`order`].
#[must_use]
pub fn order_as(event_id: EventId, order_id: OrderId, lines: &[(ProductId, u32)]) -> Envelope<OrderCreated> {
    let items = lines.iter().map(|(product_id, quantity)| OrderItem {
        product_id: *product_id,
        sku: None,
        quantity: LineQuantity::new(*quantity).expect("a quantity in range"),
    });
    let payload = OrderCreated {
        order_id,
        customer_id: None,
        items: OrderItems::new(items.collect()).expect("1 to 1,000 lines"),
    };
    Envelope::new(event_id, Timestamp::now(), payload)
}

/// The headers and bytes of an order in an encoding, as an order service sends them.
#[must_use]
pub fn encoded(content_type: ContentType, order: &Envelope<OrderCreated>) -> (HeaderMap, bytes::Bytes) {
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, order.event_id.to_string());
    headers.insert(header::CONTENT_TYPE, content_type.as_str());
    (headers, codec::encode(content_type, order).into())
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
///
/// The seed of [`Dice::thrown`] is printed, and `LOMASH_TEST_SEED` replays it.
#[derive(Clone, Debug)]
pub struct Dice {
    /// Where it began.
    pub seed: u64,
    dice: lomash::dice::Dice,
}

impl Dice {
    /// With a seed of the environment's, or a new one.
    ///
    /// # Panics
    /// When the variable is set and is no number.
    #[must_use]
    pub fn thrown() -> Self {
        let seed = match std::env::var(SEED_VARIABLE) {
            Ok(text) => text.parse().expect("LOMASH_TEST_SEED is a number"),
            Err(_) => u64::from(Uuid::new_v4().as_fields().0),
        };
        println!("replay with {SEED_VARIABLE}={seed}");
        Self::new(seed)
    }

    /// With this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, dice: lomash::dice::Dice(seed) }
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        u32::try_from(self.dice.below(bound.into())).unwrap_or_default()
    }

    /// One of these.
    pub fn pick<'t, T>(&mut self, things: &'t [T]) -> &'t T {
        &things[self.below(u32::try_from(things.len()).unwrap_or(u32::MAX)) as usize]
    }

    /// An id.
    pub fn uuid(&mut self) -> Uuid {
        self.dice.uuid()
    }

    /// An order of 1 to `most_lines` lines over `products`, of 1 to `most_units` units each; products may repeat.
    pub fn order(&mut self, products: &[ProductId], most_lines: u32, most_units: u32) -> Envelope<OrderCreated> {
        let lines: Vec<_> =
            (0..=self.below(most_lines)).map(|_| (*self.pick(products), 1 + self.below(most_units))).collect();
        order_as(EventId(self.uuid()), OrderId(self.uuid()), &lines)
    }
}

/// The one number that `query` asks `database` for.
///
/// # Errors
/// When the query fails or gives no row.
pub async fn count(database: &tokio_postgres::Client, query: &str) -> anyhow::Result<i64> {
    Ok(database.query_one(query, &[]).await?.get(0))
}
