//! What the fault tests share: a whole stack in a folder of its own, a load of orders whose result is known by
//! arithmetic, and the check at the end.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use futures::{StreamExt, stream};
use lomash::catalogue::Row;
use lomash::import::{import, product};
use lomash::orders::{publish, wait_until_decided};
use lomash::up::Stack;
use lomash::verify::{self, Show};
use lomash_contract::{Envelope, LedgerEvent, LineQuantity, OrderCreated, OrderItem, OrderItems, ProductId, Timestamp};
use lomash_ledger::{JetStreamLedger, Ledger, streams};
use lomash_platform::{Secret, nats};
use tokio::sync::Semaphore;
use uuid::Uuid;

/// How long anything awaited may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Orders published and not yet confirmed.
const IN_FLIGHT: usize = 200;

/// A whole stack in a temporary folder.
pub struct World {
    pub stack: Stack,
    pub context: Context,
    _folder: tempfile::TempDir,
}

/// Starts NATS, Postgres, Redis and the product service.
pub async fn world() -> World {
    let folder = lomash::stack::scratch().unwrap();
    // Built with this crate, so never stale and with the crash points in it.
    let product_service = Path::new(env!("CARGO_BIN_EXE_product-service-under-test"));
    let stack = Stack::start_with(folder.path(), product_service).await.unwrap();
    let client = nats::connect(&stack.nats.url(), "fault test").await.unwrap();
    World { stack, context: async_nats::jetstream::new(client), _folder: folder }
}

impl World {
    /// The last sequence of the ledger; waits out a server that is down.
    pub async fn last_sequence(&self) -> u64 {
        let ledger = JetStreamLedger::new(self.context.clone(), streams::INVENTORY);
        let patient = async {
            loop {
                if let Ok(last) = ledger.last_sequence().await {
                    return last;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, patient).await.expect("the ledger can be read again")
    }

    /// Waits until the ledger has more than `sequence`.
    pub async fn advanced_beyond(&self, sequence: u64) {
        let advanced = async {
            while self.last_sequence().await <= sequence {
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(PATIENCE, advanced).await.expect("orders are decided again");
    }
}

/// Products and orders, with stock enough for all of them: then the result is arithmetic.
#[derive(Clone)]
pub struct Load {
    pub rows: Vec<Row>,
    pub orders: Arc<Vec<Envelope<OrderCreated>>>,
}

impl Load {
    /// `count` orders of one to three lines over twenty products.
    pub fn kitchen(count: u64) -> Self {
        let rows: Vec<Row> = (0..20_u32)
            .map(|n| Row {
                line: u64::from(n) + 2,
                sku: format!("KIT-{n}").parse().unwrap(),
                name: format!("Kitchen unit {n}").into(),
                category: None,
                quantity: 1_000_000,
                threshold: None,
            })
            .collect();
        let order = |n: u64| {
            let item = |line: u64| OrderItem {
                product_id: lomash::catalogue::product_id(&rows[usize::try_from((n + 7 * line) % 20).unwrap()].sku),
                sku: None,
                quantity: LineQuantity::new(1 + u32::try_from((n + line) % 5).unwrap()).unwrap(),
            };
            let items = OrderItems::new((0..=n % 3).map(item).collect()).unwrap();
            let payload = OrderCreated { order_id: Uuid::new_v4().into(), customer_id: None, items };
            Envelope::new(Uuid::new_v4().into(), Timestamp::now(), payload)
        };
        let orders = Arc::new((0..count).map(order).collect());
        Self { rows, orders }
    }

    /// The orders of a retail file and its products, each with as much stock as its orders want and 1,000 more.
    pub fn retail(file: &std::path::Path) -> Self {
        let orders: Vec<_> = lomash::retail::open(file).unwrap().collect::<Result<_, _>>().unwrap();
        let stock = |ordered: u64| u32::try_from(ordered).unwrap() + 1_000;
        let products = lomash::retail::catalogue_of(file, stock).unwrap().products;
        Self { rows: products.into_iter().map(|product| product.row).collect(), orders: Arc::new(orders) }
    }

    /// Registers the products.
    pub async fn import(&self, world: &World) {
        let report = import(&world.stack.admin().unwrap(), self.rows.iter().map(product)).await.unwrap();
        assert_eq!(report.registered, self.rows.len() as u64, "{report:?}");
    }

    /// Publishes the first order, and waits until it is decided.
    pub async fn publish_first(&self, world: &World) {
        publish(&world.context, self.orders[0].clone()).await.unwrap();
        tokio::time::timeout(PATIENCE, wait_until_decided(&world.context)).await.expect("it is decided").unwrap();
    }

    /// Publishes every order until the stream confirms it.
    pub async fn publish(self, context: Context) {
        self.publish_with(context, Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))).await;
    }

    /// The same, each order as soon as there is a permit for it.
    pub async fn publish_with(self, context: Context, permits: Arc<Semaphore>) {
        let published = stream::iter(self.orders.iter().cloned()).map(|order| {
            let (context, permits) = (context.clone(), permits.clone());
            async move {
                permits.acquire().await.unwrap().forget();
                publish(&context, order).await.unwrap();
            }
        });
        published.buffered(IN_FLIGHT).for_each(|()| async {}).await;
    }

    /// Waits until all is decided and projected, and checks it: by the verifier, and by arithmetic of its own.
    pub async fn settle(&self, world: &World) {
        tokio::time::timeout(PATIENCE, wait_until_decided(&world.context)).await.expect("all is decided").unwrap();
        let url = Secret::from(world.stack.postgres.url());
        verify::wait_until_quiet(&world.context, Some(&url), PATIENCE).await.unwrap();
        let report = verify::verify(&world.context, Some(&url), Show::Nothing).await.unwrap();
        assert!(report.is_clean(), "{}", verify::render(&report));

        let mut expected: BTreeMap<ProductId, i64> = BTreeMap::new();
        for row in &self.rows {
            expected.insert(lomash::catalogue::product_id(&row.sku), i64::from(row.quantity));
        }
        for order in self.orders.iter() {
            for item in order.payload.items.as_slice() {
                *expected.entry(item.product_id).or_default() -= i64::from(item.quantity.get());
            }
        }
        let ledger = JetStreamLedger::new(world.context.clone(), streams::INVENTORY);
        let mut found: BTreeMap<ProductId, i64> = expected.keys().map(|product| (*product, 0)).collect();
        let mut messages = ledger.read(0).await.unwrap();
        while let Some(message) = messages.next().await {
            if let LedgerEvent::InventoryUpdated(updated) = message.unwrap().parse().unwrap().payload {
                found.insert(updated.product_id, i64::from(updated.new_quantity));
            }
        }
        assert_eq!(found, expected, "stock is what arithmetic on the orders says");
    }
}
