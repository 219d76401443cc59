//! `lomash rebuild` while orders come in and readers read: nobody sees a missing table, half an order or an older stock;
//! what was damaged is named and healed; whatever goes wrong, the live projection is as it was.
//!
//! Owns what the rebuild promises besides its rows; the rows are compared by `lomash verify` (invariant 7).
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use lomash::rebuild::{self, Comparison, Options};
use lomash::stack::Service;
use lomash::verify::Show;
use lomash_contract::{
    ContentType, Envelope, EventId, InventoryUpdated, OrderId, ProductId, Timestamp, Topic, Trigger, UpdatedBy, codec,
};
use lomash_tests::{Dice, PATIENCE, World, count, eventually, order};
use product_service::rebuild::Rebuild;
use tokio::task::JoinHandle;
use uuid::Uuid;

/// The operator's program as this package builds it.
const PROGRAM: &str = "lomash-under-test";

/// Lines of every order here, each of another product: an order of fewer movements is half an order.
const LINES: usize = 3;

const DRY_RUN: Options = Options { dry_run: true, only_if_equal: false };
const ONLY_IF_EQUAL: Options = Options { dry_run: false, only_if_equal: true };

async fn rebuild(world: &World, options: Options) -> Result<rebuild::Outcome> {
    rebuild::rebuild(&world.context, &world.database_url(), options, Show::Nothing).await
}

/// Which schema the name of the live one leads to.
async fn live_schema(database: &tokio_postgres::Client) -> Result<i64> {
    count(database, "SELECT to_regnamespace('inventory')::oid::bigint").await
}

async fn schemas(database: &tokio_postgres::Client) -> Result<Vec<String>> {
    let query = "SELECT nspname::text FROM pg_namespace WHERE nspname LIKE 'inventory%' ORDER BY nspname";
    Ok(database.query(query, &[]).await?.iter().map(|row| row.get(0)).collect())
}

/// Publishes orders of [`LINES`] lines and waits until all are decided.
async fn some_orders(world: &World, dice: &mut Dice, products: &[ProductId], many: usize) -> Result<()> {
    let orders: Vec<_> = (0..many)
        .map(|_| {
            let first = dice.below(u32::try_from(products.len()).unwrap()) as usize;
            let lines: Vec<_> = (0..LINES).map(|line| (products[(first + line) % products.len()], 1)).collect();
            order(&lines)
        })
        .collect();
    world.publish_all(&orders).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    Ok(())
}

// ── A reader ────────────────────────────────────────────────────────────────────────────────────────────────────

/// Reads without a pause, by statements that are prepared once and by new ones.
struct Reader {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    task: JoinHandle<Result<()>>,
}

impl Reader {
    async fn start(world: &World) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let looks = Arc::new(AtomicU64::new(0));
        let database = world.database().await?;
        let task = tokio::spawn({
            let (stop, looks) = (Arc::clone(&stop), Arc::clone(&looks));
            async move {
                let checkpoint = "SELECT sequence FROM inventory.checkpoint WHERE projection = 'inventory'";
                let half = "SELECT count(*) FROM (SELECT FROM inventory.movements WHERE order_id IS NOT NULL
                            GROUP BY order_id HAVING count(*) <> 3) half";
                let products = "SELECT count(*) FROM inventory.products";
                let prepared = database.prepare(checkpoint).await?;
                let prepared_half = database.prepare(half).await?;
                let there = count(&database, products).await?;
                let mut seen = 0_i64;
                while !stop.load(Ordering::Relaxed) {
                    for now in [
                        database.query_one(&prepared, &[]).await?.get::<_, i64>(0),
                        count(&database, checkpoint).await?,
                    ] {
                        ensure!(now >= seen, "the projection went back from {seen} to {now}");
                        seen = now;
                    }
                    let halves: i64 = database.query_one(&prepared_half, &[]).await?.get(0);
                    ensure!(halves == 0, "{halves} orders are there by half");
                    ensure!(count(&database, half).await? == 0, "an order is there by half");
                    ensure!(count(&database, products).await? >= there, "a product is missing");
                    looks.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }
        });
        Ok(Self { stop, looks, task })
    }

    async fn stop(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await?.context("a reader was disturbed")?;
        assert!(self.looks.load(Ordering::Relaxed) > 0, "the reader looked");
        Ok(())
    }
}

#[tokio::test]
async fn orders_and_reads_go_on_while_it_is_rebuilt() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(20, 1_000_000).await?;
    some_orders(&world, &mut dice, &products, 1_000).await?;
    world.quiet().await?;
    let database = world.database().await?;
    let first = live_schema(&database).await?;

    let reader = Reader::start(&world).await?;
    let traffic = async {
        for _ in 0..20 {
            some_orders(&world, &mut dice, &products, 200).await?;
        }
        Ok::<(), anyhow::Error>(())
    };
    let rebuilding = AtomicBool::new(true);
    let rebuilds = async {
        let mut outcomes = Vec::new();
        for _ in 0..4 {
            outcomes.push(rebuild(&world, Options::default()).await?);
        }
        rebuilding.store(false, Ordering::Relaxed);
        Ok::<_, anyhow::Error>(outcomes)
    };
    // The verifier opens several tables, one after the other: all of one projection.
    let verifying = async {
        while rebuilding.load(Ordering::Relaxed) {
            let report = world.report().await?;
            ensure!(report.is_clean(), "{}", lomash::verify::render(&report));
        }
        Ok::<_, anyhow::Error>(())
    };
    let ((), outcomes, ()) = tokio::try_join!(traffic, rebuilds, verifying)?;
    world.quiet().await?;
    reader.stop().await?;
    for outcome in &outcomes {
        assert!(outcome.comparison.is_equal(), "{}", rebuild::render(outcome));
        assert!(matches!(outcome.comparison, Comparison::Compared { .. }), "{}", rebuild::render(outcome));
        let swap = outcome.swap.as_ref().context("it was swapped")?;
        assert!(Some(swap.checkpoint) >= swap.replaced_checkpoint && swap.can_be_undone);
    }
    assert_ne!(live_schema(&database).await?, first);
    assert_eq!(schemas(&database).await?, ["inventory", "inventory_previous"], "the older ones are gone");
    // The service that ran all the while goes on from where the last rebuild ended.
    some_orders(&world, &mut dice, &products, 50).await?;
    let report = world.verified().await?;
    assert_eq!(report.totals.orders_allocated, 5_050);

    // What was built is what the migrations make, to the last index.
    let shape = async |schema: &str| -> Result<Vec<String>> {
        let query = "SELECT replace(indexdef, $1 || '.', '') FROM pg_indexes WHERE schemaname = $1
                     UNION ALL
                     SELECT conname || ' ' || pg_get_constraintdef(c.oid) FROM pg_constraint c
                     JOIN pg_namespace n ON n.oid = c.connamespace WHERE n.nspname = $1
                     ORDER BY 1";
        Ok(database.query(query, &[&schema]).await?.iter().map(|row| row.get(0)).collect())
    };
    lomash_platform::postgres::migrate_into(&world.database_url(), lomash_platform::postgres::Schema::Shadow).await?;
    let migrated = shape("inventory_rebuild").await?;
    assert!(migrated.len() >= 8, "{migrated:?}");
    assert_eq!(shape("inventory").await?, migrated);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_rebuild_is_undone_and_done_again() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 100_000).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet().await?;
    let database = world.database().await?;
    let url = world.database_url();
    let original = live_schema(&database).await?;
    let refused = rebuild::rollback(&world.context, &url).await.unwrap_err().to_string();
    assert!(refused.contains("no previous projection"), "{refused}");

    rebuild(&world, Options::default()).await?;
    let rebuilt = live_schema(&database).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet().await?;
    let swap = rebuild::rollback(&world.context, &url).await?;
    assert_eq!(live_schema(&database).await?, original);
    assert!(Some(swap.checkpoint) < swap.replaced_checkpoint, "{swap:?}");
    // The projector catches up by itself, in the older rows.
    world.verified().await?;

    rebuild::rollback(&world.context, &url).await?;
    assert_eq!(live_schema(&database).await?, rebuilt);
    some_orders(&world, &mut dice, &products, 100).await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn damaged_rows_are_named_and_healed() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 100_000).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet().await?;
    let database = world.database().await?;
    assert!(rebuild(&world, DRY_RUN).await?.comparison.is_equal());

    let damaged = products[3];
    let damage = format!(
        "UPDATE inventory.stock SET quantity = quantity + 7 WHERE product_id = '{damaged}';
         DELETE FROM inventory.movements WHERE sequence = (SELECT max(sequence) FROM inventory.movements);
         INSERT INTO inventory.order_decisions VALUES (gen_random_uuid(), 'allocated', NULL, NULL, 1, now())"
    );
    database.batch_execute(&damage).await?;
    let before = live_schema(&database).await?;
    for options in [DRY_RUN, ONLY_IF_EQUAL] {
        let outcome = rebuild(&world, options).await?;
        assert!(!outcome.comparison.is_equal() && outcome.swap.is_none());
        assert_eq!((live_schema(&database).await?, schemas(&database).await?), (before, vec!["inventory".to_owned()]));
    }
    let outcome = rebuild(&world, Options::default()).await?;
    let Comparison::Compared { tables, .. } = &outcome.comparison else { panic!("{}", rebuild::render(&outcome)) };
    let differences: Vec<_> = tables.iter().map(|table| (table.table, table.differences)).collect();
    assert_eq!(differences, [("products", 1), ("movements", 1), ("counts", 0), ("order_decisions", 1)]);
    let shown = rebuild::render(&outcome);
    assert!(shown.contains(&damaged.to_string()) && shown.contains("NOT equal"), "{shown}");
    assert!(outcome.swap.is_some(), "differences are the reason to rebuild");
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Nobody projects here but the rebuild.
#[tokio::test]
async fn a_dropped_schema_is_rebuilt_and_a_shorter_stream_is_refused() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 20).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet().await?;
    service.stop().await?;
    let database = world.database().await?;
    database.batch_execute("DROP SCHEMA inventory CASCADE").await?;
    let outcome = rebuild(&world, Options::default()).await?;
    assert!(matches!(outcome.comparison, Comparison::NothingLive));
    assert!(!outcome.swap.as_ref().unwrap().can_be_undone);
    world.verified().await?;

    // A schema of which a table is gone cannot be compared, and is replaced.
    database.batch_execute("DROP TABLE inventory.movements").await?;
    let outcome = rebuild(&world, Options::default()).await?;
    assert!(matches!(outcome.comparison, Comparison::Unreadable { .. }), "{}", rebuild::render(&outcome));
    world.verified().await?;

    let before = live_schema(&database).await?;
    database.batch_execute("UPDATE inventory.checkpoint SET sequence = sequence + 1000").await?;
    let refused = rebuild(&world, Options::default()).await.unwrap_err().to_string();
    assert!(refused.contains("went backwards"), "{refused}");
    assert_eq!(live_schema(&database).await?, before);
    world.close();
    Ok(())
}

/// `lomash rebuild` as an operator runs it.
fn operator(world: &World) -> Result<Service> {
    let program = lomash::up::program(PROGRAM)?;
    let log = world.dir().join("rebuild.log");
    Ok(Service::new("rebuild", &program, &log)
        .args(["rebuild"])
        .env("NATS_URL", world.nats.url())
        .env("DATABASE_URL", world.database_url().expose()))
}

#[tokio::test]
async fn a_killed_rebuild_leaves_the_live_one_untouched_and_a_second_one_is_refused() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 100_000).await?;
    some_orders(&world, &mut dice, &products, 1_000).await?;
    world.quiet().await?;
    let database = world.database().await?;
    let before = live_schema(&database).await?;

    // Held at the swap, with all the rest done, by a lock that is not in the way of the projector.
    let mut holder = world.database().await?;
    let held = holder.transaction().await?;
    held.batch_execute("LOCK TABLE inventory.checkpoint IN ROW EXCLUSIVE MODE").await?;
    let mut first = operator(&world)?;
    first.start()?;
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'ExclusiveLock'
                   AND relation = 'inventory.checkpoint'::regclass";
    eventually("the rebuild to come to the swap", PATIENCE, async || {
        ensure!(first.pid().is_some(), "it ended: {}", lomash::stack::log_tail(first.log()));
        Ok((count(&database, waiting).await? > 0).then_some(()))
    })
    .await?;
    let refused = rebuild(&world, Options::default()).await.unwrap_err().to_string();
    assert!(refused.contains("another `lomash rebuild` is at work"), "{refused}");
    first.kill();
    held.rollback().await?;
    assert_eq!(live_schema(&database).await?, before);
    some_orders(&world, &mut dice, &products, 100).await?;
    world.verified().await?;

    // At any moment.
    for _ in 0..8 {
        let mut killed = operator(&world)?;
        killed.start()?;
        tokio::time::sleep(Duration::from_millis(u64::from(dice.below(250)))).await;
        killed.kill();
        some_orders(&world, &mut dice, &products, 20).await?;
        world.verified().await?;
    }
    // The next one starts over.
    eventually("the place of the killed rebuild", PATIENCE, async || Ok(Some(rebuild(&world, ONLY_IF_EQUAL).await?)))
        .await?;
    assert_ne!(live_schema(&database).await?, before);
    assert_eq!(schemas(&database).await?, ["inventory", "inventory_previous"]);
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Never ours; but every reader must make the same of it.
#[tokio::test]
async fn of_two_decisions_of_one_order_the_first_counts() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("TWICE-1", 100).await?;
    let sold = order(&[(product, 10)]);
    world.publish(&sold).await?;
    world.decided([sold.payload.order_id]).await?;
    let decided_at = world.last_sequence().await?;
    let again = InventoryUpdated {
        product_id: product,
        sku: "TWICE-1".parse()?,
        previous_quantity: 90,
        new_quantity: 80,
        trigger: Trigger::OrderConfirmed,
        order_id: Some(OrderId(sold.payload.order_id.0)),
        updated_by: UpdatedBy::System,
    };
    let id = Uuid::new_v4();
    let forged = codec::encode(ContentType::Json, &Envelope::new(EventId(id), Timestamp::now(), again));
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, id.to_string());
    let subject = format!("{}.{product}", Topic::InventoryUpdated.as_str());
    world.context.publish_with_headers(subject, headers, forged.into()).await?.await?;
    world.quiet().await?;

    // Two loads, as if the two were far from each other.
    let database = world.database().await?;
    let mut shadow = Rebuild::begin(world.ledger(), &world.database_url()).await?;
    shadow.load(decided_at, &mut |_| {}).await?;
    shadow.load(decided_at + 1, &mut |_| {}).await?;
    assert_eq!(shadow.checkpoint(), decided_at + 1);
    assert_eq!(count(&database, "SELECT count(*) FROM inventory_rebuild.order_decisions").await?, 2);
    shadow.finish().await?;
    let sequences = "SELECT sum(sequence)::bigint FROM inventory_rebuild.order_decisions";
    let first = count(&database, "SELECT sum(sequence)::bigint FROM inventory.order_decisions").await?;
    assert_eq!(count(&database, sequences).await?, first);
    shadow.discard().await?;
    assert!(rebuild(&world, ONLY_IF_EQUAL).await?.comparison.is_equal());
    service.stop().await?;
    world.close();
    Ok(())
}
