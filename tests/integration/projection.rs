//! The projection under everything that may befall it: Postgres away, the schema dropped, two projectors, a zombie,
//! messages that are not ours. Orders are decided meanwhile, and in the end the rows equal the fold.
//!
//! Owns what the projector promises besides its rows; the rows themselves are compared by `lomash verify`
//! (invariant 7). Crashes between its steps are tested elsewhere.
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use futures::StreamExt;
use lomash::audit::Status;
use lomash::rebuild::{self, Options};
use lomash::verify::{self, Show};
use lomash_contract::{
    ContentType, Envelope, EventId, InventoryUpdated, OrderCreated, ProductId, Timestamp, Topic, Trigger, UpdatedBy,
    codec,
};
use lomash_ledger::{AppendError, JetStreamLedger, Ledger, Messages, NewMessage, ReadError};
use lomash_tests::{Dice, Fate, PATIENCE, World, count, eventually, nowhere, order, start_until_ready};
use product_service::inventory::Action;
use product_service::projected::Projected;
use product_service::projection;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Within this the projection must have caught up once it can.
const HEAL_BOUND: Duration = Duration::from_secs(30);

/// Key of the lock that the active projector holds, and its lower half, as `pg_locks` shows it.
const PROJECTOR_LOCK: i64 = 0x6c6f_6d61_7368_0002;
const PROJECTOR_LOCK_LOW: u32 = 0x7368_0002;

async fn checkpoint(database: &tokio_postgres::Client) -> Result<i64> {
    count(database, "SELECT sequence FROM inventory.checkpoint WHERE projection = 'inventory'").await
}

/// Publishes orders over `products` and waits until all are decided.
async fn some_orders(world: &World, dice: &mut Dice, products: &[ProductId], many: usize) -> Result<()> {
    let orders: Vec<Envelope<OrderCreated>> = (0..many).map(|_| dice.order(products, 4, 3)).collect();
    world.publish_all(&orders).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    Ok(())
}

#[tokio::test]
async fn orders_are_decided_without_postgres_and_the_projection_catches_up() -> Result<()> {
    let mut world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 400).await?;
    some_orders(&world, &mut dice, &products, 50).await?;
    world.quiet().await?;
    let projected = checkpoint(&world.database().await?).await?;

    world.postgres.as_mut().unwrap().stop().await?;
    some_orders(&world, &mut dice, &products, 200).await?;
    let (late, sold_out) = (world.register("LATE-1", 1).await?, dice.order(&products, 1, 1));
    world.publish(&sold_out).await?;
    assert_eq!(world.act(late, adjust(5)).await?.sequence, world.last_sequence().await?, "commands too");
    assert!(world.last_sequence().await? > u64::try_from(projected)? + 200);

    world.postgres.as_mut().unwrap().restart().await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;

    // Gone in the middle of a statement, and with its service under load.
    let orders: Vec<_> = (0..300).map(|_| dice.order(&products, 4, 1)).collect();
    let (head, tail) = orders.split_at(100);
    world.publish_all(head).await?;
    world.postgres.as_mut().unwrap().kill();
    world.publish_all(tail).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    world.postgres.as_mut().unwrap().restart().await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

fn adjust(delta: i64) -> Action {
    Action::Adjust { delta }
}

/// A service that starts while Postgres is away is a whole service all the same.
#[tokio::test]
async fn a_service_starts_without_postgres() -> Result<()> {
    let mut world = World::start().await?;
    world.postgres.as_mut().unwrap().stop().await?;
    let service = world.run_service().await?;
    let product = world.register("EARLY-1", 5).await?;
    let order = order(&[(product, 5)]);
    world.publish(&order).await?;
    assert_eq!(world.decided([order.payload.order_id]).await?[&order.payload.order_id], Fate::Allocated);
    world.postgres.as_mut().unwrap().restart().await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_dropped_schema_is_rebuilt_from_the_stream() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 400).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.verified().await?;

    let orders: Vec<_> = (0..300).map(|_| dice.order(&products, 4, 1)).collect();
    let (head, tail) = orders.split_at(150);
    world.publish_all(head).await?;
    world.database().await?.batch_execute("DROP SCHEMA inventory CASCADE").await?;
    world.publish_all(tail).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Readers must not wait for the next sale to have their tables back.
#[tokio::test]
async fn a_schema_dropped_in_a_quiet_hour_is_rebuilt_too() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let products = world.register_many(10, 400).await?;
    some_orders(&world, &mut Dice::thrown(), &products, 50).await?;
    let before = world.verified().await?;
    world.database().await?.batch_execute("DROP SCHEMA inventory CASCADE").await?;
    world.quiet_within(HEAL_BOUND).await?;
    let after = world.verified().await?;
    assert_eq!(after.as_of.inventory_sequence, before.as_of.inventory_sequence, "a rebuild writes no event");
    service.stop().await?;
    world.close();
    Ok(())
}

/// The connection that holds the active projector's place.
async fn active_projector(database: &tokio_postgres::Client) -> Result<Option<i32>> {
    let query = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = $1";
    let rows = database.query(query, &[&PROJECTOR_LOCK_LOW]).await?;
    assert!(rows.len() <= 1, "the place is taken once");
    Ok(rows.first().map(|row| row.get(0)))
}

#[tokio::test]
async fn of_two_services_one_projects_and_the_other_takes_over() -> Result<()> {
    let world = World::start().await?;
    let database = world.database().await?;
    let mut dice = Dice::thrown();
    let active = async || active_projector(&database).await;

    let mut first = world.start_service("first").await?;
    let place = eventually("an active projector", PATIENCE, active).await?;
    let mut second = world.start_service("second").await?;
    let products = world.register_many(10, 1_000).await?;
    some_orders(&world, &mut dice, &products, 200).await?;
    world.verified().await?;
    assert_eq!(active_projector(&database).await?, Some(place), "the second stands by");

    // Only its connection dies: whoever gets the place goes on from the checkpoint.
    database.execute("SELECT pg_terminate_backend($1)", &[&place]).await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;

    first.kill();
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet_within(HEAL_BOUND).await?;
    world.verified().await?;
    let place = eventually("the second to project", HEAL_BOUND, active).await?;

    // In order this time: a service that stops leaves its place.
    start_until_ready(&mut first).await?;
    second.stop().await?;
    some_orders(&world, &mut dice, &products, 100).await?;
    world.quiet_within(HEAL_BOUND).await?;
    let other = eventually("the first to project again", HEAL_BOUND, active).await?;
    assert_ne!(other, place);
    world.verified().await?;
    first.stop().await?;
    world.close();
    Ok(())
}

// ── A zombie ────────────────────────────────────────────────────────────────────────────────────────────────────

/// A ledger whose messages are held back until a gate opens: a projector on it is as slow as the test wants.
#[derive(Clone)]
struct Gated {
    ledger: JetStreamLedger,
    open: watch::Receiver<bool>,
    /// How often a projector began to follow.
    begun: Arc<watch::Sender<u32>>,
}

impl Ledger for Gated {
    fn stage(
        &self,
        messages: Vec<NewMessage>,
        expected_last_sequence: u64,
        go: oneshot::Receiver<()>,
    ) -> impl Future<Output = Result<u64, AppendError>> + Send + 'static {
        self.ledger.stage(messages, expected_last_sequence, go)
    }

    async fn last_sequence(&self) -> Result<u64, ReadError> {
        self.ledger.last_sequence().await
    }

    async fn read(&self, after: u64) -> Result<Messages, ReadError> {
        self.ledger.read(after).await
    }

    async fn follow(&self, after: u64) -> Result<Messages, ReadError> {
        let messages = self.ledger.follow(after).await?;
        self.begun.send_modify(|begun| *begun += 1);
        let open = self.open.clone();
        let gated = messages.then(move |message| {
            let mut open = open.clone();
            async move {
                let _ = open.wait_for(|open| *open).await;
                message
            }
        });
        Ok(gated.boxed())
    }
}

#[tokio::test]
async fn a_projector_that_was_believed_dead_writes_nothing() -> Result<()> {
    let world = World::start().await?;
    let mut config = world.config();
    // This service only decides; the projector is the test's own.
    config.service.database_url = nowhere();
    let service = world.run_service_as(config).await?;
    let product = world.register("ZOMBIE-1", 100).await?;
    let sell = async |units| -> Result<()> {
        let order = order(&[(product, units)]);
        world.publish(&order).await?;
        world.decided([order.payload.order_id]).await?;
        Ok(())
    };

    let (gate, open) = watch::channel(true);
    let begun = Arc::new(watch::Sender::new(0));
    let mut begins = begun.subscribe();
    let ledger = Gated { ledger: world.ledger(), open, begun };
    let stop = CancellationToken::new();
    let pool = lomash_platform::postgres::pool(&world.database_url())?;
    let projected = Projected::new(pool, &lomash_platform::postgres::INVENTORY);
    let projector = tokio::spawn(projection::run(ledger, world.database_url(), projected, (), stop.clone()));
    sell(1).await?;
    world.quiet().await?;
    assert_eq!(*begins.borrow_and_update(), 1);
    let database = world.database().await?;
    let reached = checkpoint(&database).await?;

    // It stalls with a message in its hands; meanwhile another projector is, as far as Postgres can tell, further on.
    gate.send_replace(false);
    sell(10).await?;
    sell(20).await?;
    let last = i64::try_from(world.last_sequence().await?)?;
    database.execute("UPDATE inventory.checkpoint SET sequence = $1", &[&last]).await?;
    gate.send_replace(true);
    tokio::time::timeout(PATIENCE, begins.wait_for(|begun| *begun == 2))
        .await
        .context("the zombie did not give up")??;
    assert_eq!(checkpoint(&database).await?, last, "the checkpoint is the other's");
    let written = format!("SELECT count(*) FROM inventory.movements WHERE sequence > {reached}");
    assert_eq!(count(&database, &written).await?, 0, "the zombie wrote no row");
    assert_eq!(count(&database, "SELECT sum(quantity) FROM inventory.stock").await?, 99);

    // The other was restored from a backup: what is missing is projected, from where the checkpoint is.
    database.execute("UPDATE inventory.checkpoint SET sequence = $1", &[&reached]).await?;
    sell(30).await?;
    world.quiet_within(HEAL_BOUND).await?;
    assert_eq!(count(&database, "SELECT sum(quantity) FROM inventory.stock").await?, 39);
    world.verified().await?;
    stop.cancel();
    projector.await??;
    service.stop().await?;
    world.close();
    Ok(())
}

/// The first try fails by what the projector remembers, later ones by what they find.
#[tokio::test]
async fn a_row_that_somebody_removed_is_told_of_and_a_rebuild_brings_it_back() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.start_service("product").await?;
    let product = world.register("GONE-1", 10).await?;
    world.quiet().await?;
    let database = world.database().await?;
    for (table, name) in [("products", "renamed once"), ("stock", "renamed twice")] {
        let before = checkpoint(&database).await?;
        database.execute(&format!("DELETE FROM inventory.{table}"), &[]).await?;
        let mut details = lomash_tests::details("GONE-1")?;
        details.name = name.into();
        world.act(product, Action::Revise { details }).await?;
        let told = format!("of 1 products that inventory.{table} had, 0 are left; run `lomash rebuild`");
        eventually("a word about it, twice", PATIENCE, async || {
            Ok((std::fs::read_to_string(service.log())?.matches(&told).count() >= 2).then_some(()))
        })
        .await?;
        assert_eq!(checkpoint(&database).await?, before, "nothing is passed over");

        rebuild::rebuild(&world.context, &world.database_url(), Options::default(), Show::Nothing).await?;
        world.quiet_within(HEAL_BOUND).await?;
        let renamed = format!("SELECT count(*) FROM inventory.products WHERE name = '{name}'");
        assert_eq!(count(&database, &renamed).await?, 1);
        world.verified().await?;
    }
    service.stop().await?;
    world.close();
    Ok(())
}

/// Postgres ends a session that is silent between two statements; whoever is silent within a `COPY` is its heir's affair.
#[tokio::test]
async fn a_projector_that_froze_within_a_copy_loses_its_place() -> Result<()> {
    let world = World::start().await?;
    let frozen = world.database().await?;
    let held: bool = frozen.query_one("SELECT pg_try_advisory_lock($1)", &[&PROJECTOR_LOCK]).await?.get(0);
    assert!(held);
    frozen.batch_execute("CREATE TEMPORARY TABLE rows (row text)").await?;
    let silent = frozen.copy_in::<_, bytes::Bytes>("COPY rows FROM STDIN").await?;

    let service = world.run_service().await?;
    world.register("COPY-1", 5).await?;
    world.quiet_within(PATIENCE).await?;
    world.verified().await?;
    drop(silent);
    assert!(frozen.batch_execute("SELECT 1").await.is_err(), "its session is ended");
    service.stop().await?;
    world.close();
    Ok(())
}

// ── What is not ours ────────────────────────────────────────────────────────────────────────────────────────────

/// An event as only we may write one, of the stock of a product.
fn forged(product: ProductId, sku: &str, previous: u32, new: u32) -> Result<(Uuid, Vec<u8>)> {
    let id = Uuid::new_v4();
    let payload = InventoryUpdated {
        product_id: product,
        sku: sku.parse()?,
        previous_quantity: previous,
        new_quantity: new,
        trigger: Trigger::AdminUpdate,
        order_id: None,
        updated_by: UpdatedBy::System,
    };
    let envelope = Envelope::new(EventId(id), Timestamp::now(), payload);
    Ok((id, codec::encode(ContentType::Json, &envelope)))
}

#[tokio::test]
async fn foreign_messages_are_skipped_by_every_reader_and_named() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("MINE-1", 100).await?;
    let other = world.register("MINE-2", 100).await?;
    let sell = async |units: u32| -> Result<Fate> {
        let order = order(&[(product, units), (other, 1)]);
        world.publish(&order).await?;
        Ok(world.decided([order.payload.order_id]).await?[&order.payload.order_id])
    };
    assert_eq!(sell(10).await?, Fate::Allocated);
    world.verified().await?;

    let plant = async |key: ProductId, id: Option<Uuid>, payload: Vec<u8>| -> Result<u64> {
        let mut headers = HeaderMap::new();
        if let Some(id) = id {
            headers.insert(async_nats::header::NATS_MESSAGE_ID, id.to_string());
        }
        let subject = format!("{}.{key}", Topic::InventoryUpdated.as_str());
        let sent = world.context.publish_with_headers(subject, headers, payload.into()).await?;
        Ok(sent.await?.sequence)
    };
    // Not an event; an event under no id; one that does not chain; one under the key of another product.
    let mut foreign = vec![plant(product, None, b"+OK".to_vec()).await?];
    let (_, chains) = forged(product, "MINE-1", 90, 1_000)?;
    foreign.push(plant(product, None, chains).await?);
    assert_eq!(sell(10).await?, Fate::Allocated, "orders go on");
    let (id, broken) = forged(product, "MINE-1", 55, 1_000)?;
    foreign.push(plant(product, Some(id), broken).await?);
    let (id, misplaced) = forged(product, "MINE-1", 80, 1_000)?;
    foreign.push(plant(other, Some(id), misplaced).await?);
    assert_eq!(sell(81).await?, Fate::Refused(lomash_contract::FailureReason::InsufficientStock));
    assert_eq!(sell(80).await?, Fate::Allocated, "what was forged was not believed");
    world.quiet().await?;

    let database = world.database().await?;
    assert_eq!(count(&database, "SELECT skipped FROM inventory.checkpoint").await?, 4);
    let stock = format!("SELECT quantity::bigint FROM inventory.stock WHERE product_id = '{product}'");
    assert_eq!(count(&database, &stock).await?, 0);

    let report = world.report().await?;
    let shown = verify::render(&report);
    assert_eq!(report.totals.foreign, 4, "{shown}");
    let violated: Vec<u8> = report
        .invariants
        .iter()
        .filter(|invariant| invariant.status == Status::Violated)
        .map(|invariant| invariant.number)
        .collect();
    // The first names the one that looks like an event of ours and was published without its id.
    assert_eq!(violated, [1, 2, 3], "{shown}");
    for number in [2, 3] {
        let named = &report.invariant(number).unwrap().first;
        let mut sequences: Vec<u64> = named.iter().filter_map(|violation| violation.sequence).collect();
        sequences.dedup();
        assert_eq!(sequences, foreign, "invariant {number} names each\n{shown}");
    }

    // A service that starts on such a ledger folds it to the same state.
    service.stop().await?;
    let service = world.run_service().await?;
    world.act(product, adjust(7)).await?;
    assert_eq!(sell(7).await?, Fate::Allocated);
    world.quiet().await?;
    assert_eq!(count(&database, "SELECT skipped FROM inventory.checkpoint").await?, 4);
    service.stop().await?;
    world.close();
    Ok(())
}
