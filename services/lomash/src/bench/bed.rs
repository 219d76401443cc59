//! What ours is measured on: servers of its own, the product service as a process, and the books that must be right after.
//!
//! Owns how products and orders get there. Products are registered by the very committer of the service, run in this
//! process while no service is: a million of them in half a minute, through the real write path. Their rows are then built
//! by a rebuild.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use async_nats::jetstream::Context;
use async_nats::{Client, HeaderMap, Subject};
use futures::{StreamExt, TryStreamExt, stream};
use lomash_contract::{ContentType, Envelope, OrderCreated, Timestamp, Topic, UpdatedBy, codec};
use lomash_ledger::{JetStreamLedger, MAX_BATCH_MESSAGES, streams};
use lomash_platform::{Secret, nats, postgres};
use lomash_web::Role;
use product_service::committer::committer;
use product_service::inventory::{Action, Command, Details, ProductCommand, State};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::batches;
use super::usage::Usage;
use super::workload::{Orders, Source, Stocked};
use crate::api::Api;
use crate::rebuild::{self, Options};
use crate::stack::{Service, log_tail};
use crate::up::{Readiness, Stack};
use crate::verify::{self, Show};

/// How long deciding all orders of a run may take.
const DECIDE_TIMEOUT: Duration = Duration::from_secs(1_800);

/// How long the projection may take to catch up.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(1_800);

/// How long the service may take to be there: it may fold ten million events.
const START_TIMEOUT: Duration = Duration::from_secs(600);

/// How often something that changes soon is looked at, while a clock runs.
pub(super) const POLL_EVERY: Duration = Duration::from_millis(10);

/// Commands under way at once while products are registered: two batches.
const COMMANDS_IN_FLIGHT: usize = 2 * MAX_BATCH_MESSAGES;

/// How long the server remembers ids while products are registered.
const SHORT_MEMORY: Duration = Duration::from_secs(1);

/// Orders made, and put into `ORDERS`, at a time.
const ORDERS_A_PIECE: usize = 50_000;

/// Name under which we connect.
const CLIENT_NAME: &str = "lomash bench";

/// The product service's program.
pub(super) const SERVICE: &str = "product-service";

/// Names of servers and their versions.
pub(super) type Versions = [(&'static str, String); 2];

/// The servers, the service and what is expected of its books.
pub(super) struct Bed {
    /// Of the service's servers.
    pub client: Client,
    pub context: Context,
    pub database: Secret,
    pub ledger: JetStreamLedger,
    pub service: Service,
    pub stack: Stack,
    /// Orders that were put and must be allocated, and refused.
    pub due: (u64, u64),
}

impl Bed {
    /// Starts the servers in `folder`. The service is not started.
    pub async fn start(folder: &Path) -> anyhow::Result<Self> {
        let stack = Stack::start_servers(folder).await?;
        let client = nats::connect(&stack.nats.url(), CLIENT_NAME).await?;
        let context = async_nats::jetstream::new(client.clone());
        let ledger = JetStreamLedger::new(context.clone(), streams::INVENTORY);
        let database = Secret::from(stack.postgres.url());
        let service = Self::service_of(&stack)?;
        Ok(Self { client, context, database, ledger, service, stack, due: (0, 0) })
    }

    /// A further replica of the service, not started.
    pub fn replica(&self) -> anyhow::Result<Service> {
        Self::service_of(&self.stack)
    }

    /// What one caller may send is not what is measured, and nothing that goes by the clock may begin meanwhile.
    fn service_of(stack: &Stack) -> anyhow::Result<Service> {
        let without = [
            ("HTTP_READS_PER_SECOND", "0"),
            ("HTTP_WRITES_PER_SECOND", "0"),
            ("RECONCILIATION_SCHEDULE", "off"),
            ("SNAPSHOT_SCHEDULE", "off"),
        ];
        Ok(without.into_iter().fold(stack.service(SERVICE)?, |service, (name, value)| service.env(name, value)))
    }

    /// Ends everything. Connections end before their server does: one that is left would go on looking for it.
    pub async fn stop(self) -> anyhow::Result<()> {
        let Self { client, context, ledger, mut service, stack, .. } = self;
        service.stop().await?;
        drop((client, context, ledger));
        stack.stop().await
    }

    /// What runs here, with its version.
    pub async fn versions(&self) -> anyhow::Result<Versions> {
        let client = postgres::connect(&self.database).await?;
        let row = client.query_one("SHOW server_version", &[]).await.context("Postgres does not tell its version")?;
        Ok([("NATS", self.client.server_info().version), ("Postgres", row.get(0))])
    }

    /// Registers the products and builds their rows.
    ///
    /// The server then knows no id of a registration any more, as it would after a while: those of a million products at
    /// once keep its garbage collector busier than the orders that are measured.
    pub async fn fill(&self, products: &[Stocked], what: &str, show: Show) -> anyhow::Result<()> {
        batches::forget_ids_after(&self.context, Some(SHORT_MEMORY)).await?;
        let mut progress = show.progress(&format!("{what}: registering products"), products.len() as u64);
        let done = CancellationToken::new();
        let (committer, committing) = committer(self.ledger.clone(), State::default(), Timestamp::now, done.clone());
        let committing = tokio::spawn(committing);
        stream::iter(products)
            .map(|product| {
                let details = Details {
                    sku: product.sku.clone(),
                    name: product.sku.as_str().into(),
                    category: None,
                    low_stock_threshold: None,
                    active: true,
                };
                let action = Action::Register { details, initial_quantity: product.stock };
                let command = ProductCommand::new(Uuid::new_v4(), product.id, UpdatedBy::System, action);
                let submitted = committer.submit(Command::Product(command), None);
                async move { submitted.await.with_context(|| format!("{} was not registered", product.sku)) }
            })
            .buffer_unordered(COMMANDS_IN_FLIGHT)
            .try_for_each(|_| {
                progress.inc(1);
                std::future::ready(Ok(()))
            })
            .await?;
        progress.finish();
        done.cancel();
        committing.await.context("the committer panicked")?.context("the committer ended")?;
        rebuild::rebuild(&self.context, &self.database, Options::default(), Show::Nothing).await?;
        // Ids go when a timer of that length finds them older.
        tokio::time::sleep(2 * SHORT_MEMORY).await;
        batches::forget_ids_after(&self.context, None).await
    }

    /// Makes orders and puts them into `ORDERS`, batch by batch.
    pub async fn put(&mut self, source: &mut Source, count: usize, what: &str, show: Show) -> anyhow::Result<()> {
        batches::let_orders_take_batches(&self.context).await?;
        let mut progress = show.progress(&format!("{what}: putting orders"), count as u64);
        let mut left = count;
        while left > 0 {
            let Orders { orders, refused } = source.take(left.min(ORDERS_A_PIECE))?;
            self.expect(orders.len() as u64, refused);
            for (number, orders) in orders.chunks(MAX_BATCH_MESSAGES).enumerate() {
                let batch = orders.iter().map(|order| (subject(), HeaderMap::new(), encoded(order)));
                let id = format!("orders-{left}-{number}");
                send(&self.client, batch.collect(), &id).await?;
                progress.inc(orders.len() as u64);
            }
            left -= orders.len();
        }
        progress.finish();
        Ok(())
    }

    /// Notes orders that are put in another way.
    pub fn expect(&mut self, orders: u64, refused: u64) {
        self.due = (self.due.0 + orders - refused, self.due.1 + refused);
    }

    /// Starts the service and waits until it takes commands; how long it took.
    pub async fn start_service(&mut self) -> anyhow::Result<Duration> {
        let started = Instant::now();
        self.service.start()?;
        // Asked more often than `up` asks: how long it took is a figure of the report.
        let readiness = Readiness::of(&self.service)?;
        let answers = async {
            loop {
                match readiness.ask().await {
                    Ok(()) => return Ok(started.elapsed()),
                    Err(problem) if started.elapsed() > START_TIMEOUT => {
                        bail!("the product service was not there in time: {problem}");
                    }
                    Err(_) => tokio::time::sleep(POLL_EVERY).await,
                }
            }
        };
        self.while_running(answers).await
    }

    /// Ends the service in order. It may have the pin of the orders without ever having had one, and then does not know;
    /// so it is taken from it. Best effort: it runs out by itself.
    pub async fn stop_service(&mut self) -> anyhow::Result<()> {
        self.service.stop().await?;
        if let Ok(stream) = self.context.get_stream_no_info(streams::ORDERS).await {
            let _ = stream.unpin_consumer(streams::PRODUCT_ORDERS, streams::PRODUCT_ORDERS_GROUP).await;
        }
        Ok(())
    }

    /// Waits until every order is decided and every event projected.
    pub async fn quiet(&self) -> anyhow::Result<()> {
        let quiet = verify::wait_until_quiet(&self.context, Some(&self.database), SETTLE_TIMEOUT);
        self.while_running(quiet).await
    }

    /// The work, unless the service ends meanwhile.
    pub async fn while_running<T>(&self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            done = work => done,
            status = self.service.ended() => {
                bail!("{SERVICE} ended during the run ({status}); {}", log_tail(self.service.log()))
            }
        }
    }

    /// How long it took from the first delivery until everything up to `last` was acknowledged.
    pub async fn until_acknowledged(&self, last: u64, what: &str, show: Show) -> anyhow::Result<Duration> {
        let mut progress = show.progress(&format!("{what}: deciding"), last);
        let deadline = Instant::now() + DECIDE_TIMEOUT;
        let mut before_first = Instant::now();
        let mut seen = false;
        loop {
            let asked = Instant::now();
            let now = self.deliveries().await?;
            seen |= now.delivered > 0;
            if !seen {
                before_first = asked;
            }
            progress.inc(now.acknowledged.saturating_sub(progress.done()));
            if now.acknowledged >= last && now.open == 0 {
                let taken = before_first.elapsed();
                progress.finish();
                return Ok(taken);
            }
            if asked >= deadline {
                bail!(
                    "{} of {last} orders were acknowledged within {} s; take fewer with --orders-count",
                    now.acknowledged,
                    DECIDE_TIMEOUT.as_secs()
                );
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// What the server knows of the consumer.
    pub async fn deliveries(&self) -> anyhow::Result<Deliveries> {
        let subject = format!("CONSUMER.INFO.{}.{}", streams::ORDERS, streams::PRODUCT_ORDERS);
        let answer: Value = self.context.request(subject, &json!({})).await.context("product-orders cannot be read")?;
        let number = |pointer: &str| {
            let value = answer.pointer(pointer).and_then(Value::as_u64);
            value.with_context(|| format!("the server does not tell {pointer} of product-orders: {answer}"))
        };
        Ok(Deliveries {
            delivered: number("/delivered/stream_seq")?,
            acknowledged: number("/ack_floor/stream_seq")?,
            open: number("/num_ack_pending")?,
            waiting: number("/num_pending")?,
        })
    }

    /// What each process used so far, and holds now.
    pub fn usage(&self) -> anyhow::Result<[(&'static str, Usage); 4]> {
        let of = |name, pid: Option<u32>| {
            let pid = pid.with_context(|| format!("{name} does not run"))?;
            anyhow::Ok((name, Usage::of(pid).with_context(|| format!("what {name} uses cannot be read"))?))
        };
        Ok([
            of("product", self.service.pid())?,
            of("NATS", self.stack.nats.pid())?,
            of("Postgres", self.stack.postgres.pid())?,
            of("Redis", self.stack.redis.pid())?,
        ])
    }

    /// An admin who calls the service over HTTP.
    pub fn admin(&self, service: &Service) -> anyhow::Result<Api> {
        let address = service.address().context("the service was not told where to listen")?;
        Api::new(&format!("http://{address}"), self.stack.token(Role::Admin)?.into())
    }

    /// What is wrong with our books, if anything is.
    pub async fn problem(&self) -> anyhow::Result<Option<String>> {
        let report = verify::verify(&self.context, Some(&self.database), Show::Nothing).await?;
        if !report.is_clean() {
            let violated = report.invariants.iter().filter(|invariant| invariant.violations > 0);
            let violated: Vec<String> = violated
                .map(|invariant| {
                    let first = invariant.first.first().map(ToString::to_string).unwrap_or_default();
                    format!("{} is violated {} times, first: {first}", invariant.holds, invariant.violations)
                })
                .collect();
            return Ok(Some(format!("`lomash verify` is not clean: {}", violated.join("; "))));
        }
        let totals = &report.totals;
        let (allocated, refused, undecided) =
            (totals.orders_allocated, totals.orders_refused(), totals.orders_undecided);
        if (allocated, refused, undecided, totals.dead_letters) != (self.due.0, self.due.1, 0, 0) {
            return Ok(Some(format!(
                "{allocated} orders were allocated and {refused} refused where {} and {} were due ({undecided} \
                 undecided, {} dead letters)",
                self.due.0, self.due.1, totals.dead_letters
            )));
        }
        Ok(None)
    }
}

/// The state of the consumer of the orders.
pub(super) struct Deliveries {
    pub delivered: u64,
    pub acknowledged: u64,
    /// Delivered and not yet acknowledged.
    pub open: u64,
    /// Not yet delivered.
    pub waiting: u64,
}

/// The topic of orders.
pub(super) fn subject() -> Subject {
    Topic::OrdersCreated.as_str().into()
}

/// An order as its service publishes it.
pub(super) fn encoded(order: &Envelope<OrderCreated>) -> bytes::Bytes {
    codec::encode(ContentType::Json, order).into()
}

/// Stores a batch of orders.
pub(super) async fn send(client: &Client, mut batch: Vec<batches::Message>, id: &str) -> anyhow::Result<u64> {
    batches::mark(&mut batch, id);
    batches::send(client, batch).await.context("the stream ORDERS did not take orders")
}
