//! The analytics service on real servers: what it counts equals arithmetic on what was published, once, whatever dies or is
//! delivered again; and what it answers over HTTP, to whom.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use analytics_service::reads::{LevelKey, QueryError, Reads, StockLevelFilter, StockLevelQuery};
use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use futures::StreamExt;
use lomash::rebuild::{Comparison, Options, Outcome, Projection, rebuild_of, rollback_of};
use lomash::stack::{Postgres, Service, free_port, log_tail, scratch};
use lomash::verify::Show;
use lomash_contract::{
    ContentType, Envelope, EventId, InventoryUpdated, LedgerEvent, OrderId, ProductDetails, ProductId,
    ProductRegistered, Sku, Timestamp, Topic, Trigger, UpdatedBy, Version, codec,
};
use lomash_ledger::{Ledger, NewMessage, streams};
use lomash_platform::Secret;
use lomash_platform::postgres::{ANALYTICS, migrate_schema};
use lomash_tests::http::Caller;
use lomash_tests::{Dice, Fate, JWT_SECRET, PATIENCE, World, count, eventually, order, start_until_ready, token};
use lomash_web::Role;
use product_service::inventory::{Action, Amendment};
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::reads::{Done, WATCHED, plans};

/// The service as this package builds it, with crash points.
const PROGRAM: &str = "analytics-service-under-test";

/// An analytics service of a world, and where it answers.
struct Analytics {
    service: Service,
    url: String,
    health_url: String,
}

impl Analytics {
    fn new(world: &World, name: &str) -> Result<Self> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let health = format!("127.0.0.1:{}", free_port()?);
        let log = world.dir().join(format!("{name}.log"));
        let service = Service::new(name, &lomash::up::program(PROGRAM)?, &log)
            .env("NATS_URL", world.nats.url())
            .env("DATABASE_URL", world.database_url().expose())
            .env("HTTP_LISTEN", &address)
            .env("HEALTH_LISTEN", &health)
            .env("JWT_HS256_SECRET", JWT_SECRET);
        Ok(Self { service, url: format!("http://{address}"), health_url: format!("http://{health}") })
    }

    async fn start(world: &World, name: &str) -> Result<Self> {
        let mut analytics = Self::new(world, name)?;
        start_until_ready(&mut analytics.service).await?;
        Ok(analytics)
    }

    fn caller(&self) -> Result<Caller> {
        Caller::new(&self.url, Role::Viewer)
    }
}

/// Waits until the rows reflect the whole ledger; its last sequence.
async fn caught_up(world: &World) -> Result<u64> {
    caught_up_within(world, PATIENCE).await
}

async fn caught_up_within(world: &World, patience: Duration) -> Result<u64> {
    let last = world.last_sequence().await?;
    eventually("the metrics to be at the end of the ledger", patience, async || {
        let database = world.database().await?;
        let at = count(&database, "SELECT sequence FROM analytics.checkpoint").await?;
        ensure!(at >= last.cast_signed(), "they are at {at} of {last}");
        Ok(Some(()))
    })
    .await?;
    Ok(last)
}

/// Waits until nothing is delivered and unsettled.
async fn settled(world: &World) -> Result<()> {
    eventually("the consumer to have everything acknowledged", PATIENCE, async || {
        let stream = world.context.get_stream(streams::INVENTORY).await?;
        let info = stream.consumer_info(streams::ANALYTICS).await?;
        ensure!(info.num_pending == 0 && info.num_ack_pending == 0, "{info:?}");
        Ok(Some(()))
    })
    .await
}

/// All rows but when they were written, as one text.
async fn rows(world: &World, schema: &str) -> Result<String> {
    let database = world.database().await?;
    let mut all = String::new();
    for (table, but) in
        [("products", ""), ("stock", ""), ("product_days", ""), ("days", ""), ("checkpoint", " - 'updated_at'")]
    {
        let query = format!(
            "SELECT COALESCE(string_agg((to_jsonb(t){but})::text, E'\n' ORDER BY to_jsonb(t)::text), '')
                     FROM {schema}.{table} t"
        );
        all.push_str(&database.query_one(&query, &[]).await?.get::<_, String>(0));
        all.push('\n');
    }
    Ok(all)
}

/// Tells in one place how often transactions changed rows: a row that is written the same again shows here.
async fn row_versions(world: &World) -> Result<String> {
    let database = world.database().await?;
    let mut all = String::new();
    for table in ["products", "stock", "product_days", "days", "checkpoint"] {
        let query =
            format!("SELECT COALESCE(string_agg(t.xmin::text, ',' ORDER BY t.ctid), '') FROM analytics.{table} t");
        all.push_str(&database.query_one(&query, &[]).await?.get::<_, String>(0));
    }
    Ok(all)
}

/// What orders and admins did, counted from what was published and from nothing that the analytics service made.
#[derive(Debug, Default, PartialEq, Eq)]
struct Expected {
    sold: BTreeMap<Uuid, i64>,
    refused: BTreeMap<Uuid, i64>,
    allocated: i64,
    refused_orders: i64,
}

impl Expected {
    fn add(&mut self, more: Self) {
        self.allocated += more.allocated;
        self.refused_orders += more.refused_orders;
        for (sum, add) in [(&mut self.sold, more.sold), (&mut self.refused, more.refused)] {
            for (product, units) in add {
                *sum.entry(product).or_default() += units;
            }
        }
    }
}

/// Publishes orders of which many ask for more than there is, and waits until all are decided.
async fn short_stock(world: &World, dice: &mut Dice, products: &[ProductId], orders: usize) -> Result<Expected> {
    let orders: Vec<_> = (0..orders).map(|_| dice.order(products, 3, 6)).collect();
    world.publish_all(&orders).await?;
    let fates = world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    let mut expected = Expected::default();
    for order in &orders {
        match fates[&order.payload.order_id] {
            Fate::Allocated => {
                expected.allocated += 1;
                for item in order.payload.items.as_slice() {
                    *expected.sold.entry(item.product_id.0).or_default() += i64::from(item.quantity.get());
                }
            }
            Fate::Refused(_) => expected.refused_orders += 1,
        }
    }
    // Which lines an order was refused for is the ledger's to say.
    let ours: BTreeSet<OrderId> = orders.iter().map(|order| order.payload.order_id).collect();
    for (_, event) in world.events().await? {
        if let LedgerEvent::InventoryUpdateFailed(failed) = event
            && ours.contains(&failed.order_id)
        {
            for item in failed.items {
                *expected.refused.entry(item.product_id.0).or_default() += i64::from(item.requested);
            }
        }
    }
    Ok(expected)
}

async fn assert_counted(world: &World, expected: &Expected) -> Result<()> {
    let database = world.database().await?;
    let by_product = async |column: &str| -> Result<BTreeMap<Uuid, i64>> {
        let query = format!(
            "SELECT product_id, sum({column})::bigint FROM analytics.product_days GROUP BY 1 HAVING sum({column}) <> 0"
        );
        Ok(database.query(&query, &[]).await?.iter().map(|row| (row.get(0), row.get(1))).collect())
    };
    assert_eq!(by_product("units_sold").await?, expected.sold);
    assert_eq!(by_product("units_refused_insufficient").await?, expected.refused);
    let of_days =
        async |column: &str| count(&database, &format!("SELECT sum({column})::bigint FROM analytics.days")).await;
    assert_eq!(of_days("orders_allocated").await?, expected.allocated);
    assert_eq!(of_days("orders_refused_insufficient").await?, expected.refused_orders);
    assert_eq!(of_days("units_sold").await?, expected.sold.values().sum::<i64>());
    Ok(())
}

#[tokio::test]
async fn totals_equal_arithmetic_on_orders_with_short_stock() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(12, 120).await?;
    let expected = short_stock(&world, &mut dice, &products, 600).await?;
    assert!(expected.allocated > 50 && expected.refused_orders > 50, "{expected:?}");
    caught_up(&world).await?;
    assert_counted(&world, &expected).await?;
    // Stock levels are those of the ledger and of the read model.
    let database = world.database().await?;
    world.quiet().await?;
    let differ = "SELECT count(*) FROM analytics.stock a FULL JOIN inventory.stock i USING (product_id)
                  WHERE (a.quantity, a.low_stock_threshold, a.sequence, a.updated_at)
                        IS DISTINCT FROM (i.quantity, i.low_stock_threshold, i.sequence, i.updated_at)";
    assert_eq!(count(&database, differ).await?, 0);
    let stock = i64::from(12 * 120_u32) - expected.sold.values().sum::<i64>();
    assert_eq!(count(&database, "SELECT units_in_stock FROM analytics.checkpoint").await?, stock);
    drop(analytics);
    service.stop().await?;
    world.close();
    Ok(())
}

/// Dies at `point` for the time after `passes` while orders come in, is started again, and has counted everything once.
async fn dies_and_recovers(point: &str, passes: u32) -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut analytics = Analytics::new(&world, "analytics")?;
    analytics.service.set_env("FAILPOINTS", format!("{point}={passes}*off->return"));
    analytics.service.start()?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 200).await?;
    let mut expected = Expected::default();
    // However few transactions take up what is there: each round needs another one.
    while analytics.service.exit().is_none() {
        expected.add(short_stock(&world, &mut dice, &products, 60).await?);
        ensure!(expected.allocated + expected.refused_orders < 10_000, "it came through {point} alive");
        let database = world.database().await?;
        let last = world.last_sequence().await?.cast_signed();
        eventually("the metrics to be at the end of the ledger, or the service to die", PATIENCE, async || {
            let dead = analytics.service.exit().is_some();
            Ok((dead || count(&database, "SELECT sequence FROM analytics.checkpoint").await? >= last).then_some(()))
        })
        .await?;
    }
    let died = analytics.service.exit().context("it ended")?;
    assert!(!died.success(), "it aborts at {point}, not ends: {died}; {}", log_tail(analytics.service.log()));
    analytics.service.remove_env("FAILPOINTS");
    analytics.service.restart()?;
    expected.add(short_stock(&world, &mut dice, &products, 60).await?);
    caught_up(&world).await?;
    assert_counted(&world, &expected).await?;
    let equal = rebuild(&world, DRY_RUN).await?;
    assert!(equal.comparison.is_equal(), "{equal:?}");
    // What was handled and not acknowledged comes back, and is known.
    let before = row_versions(&world).await?;
    settled(&world).await?;
    assert_eq!(row_versions(&world).await?, before);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn it_dies_before_the_commit() -> Result<()> {
    dies_and_recovers("analytics-before-commit", 2).await
}

#[tokio::test]
async fn it_dies_after_the_commit_and_before_anything_is_answered() -> Result<()> {
    dies_and_recovers("analytics-after-commit", 2).await
}

#[tokio::test]
async fn it_dies_between_the_acknowledgements_of_one_transaction() -> Result<()> {
    dies_and_recovers("analytics-before-ack", 25).await
}

#[tokio::test]
async fn the_whole_stream_delivered_again_changes_nothing() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut analytics = Analytics::start(&world, "analytics").await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 200).await?;
    let expected = short_stock(&world, &mut dice, &products, 300).await?;
    let last = caught_up(&world).await?;
    settled(&world).await?;
    let before = (rows(&world, "analytics").await?, row_versions(&world).await?);

    for stopped in [false, true] {
        if stopped {
            analytics.service.stop().await?;
        }
        let ledger = world.context.get_stream(streams::INVENTORY).await?;
        ledger.delete_consumer(streams::ANALYTICS).await?;
        if stopped {
            start_until_ready(&mut analytics.service).await?;
        }
        eventually("the consumer to be made again and to deliver everything", PATIENCE, async || {
            let info = world.context.get_stream(streams::INVENTORY).await?.consumer_info(streams::ANALYTICS).await?;
            ensure!(info.ack_floor.stream_sequence >= last, "{info:?}");
            Ok(Some(()))
        })
        .await?;
        settled(&world).await?;
        assert_eq!((rows(&world, "analytics").await?, row_versions(&world).await?), before);
    }
    assert_counted(&world, &expected).await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// The schema is dropped while everything is acknowledged: no delivery will bring it back, the stream does.
#[tokio::test]
async fn dropped_rows_come_back_from_the_stream() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 200).await?;
    let expected = short_stock(&world, &mut dice, &products, 300).await?;
    caught_up(&world).await?;
    settled(&world).await?;
    let before = rows(&world, "analytics").await?;
    world.database().await?.batch_execute("DROP SCHEMA analytics CASCADE").await?;
    caught_up(&world).await?;
    assert_eq!(rows(&world, "analytics").await?, before);
    assert_counted(&world, &expected).await?;
    drop(analytics);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn of_two_replicas_each_takes_over_and_nothing_is_counted_twice() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut replicas = [Analytics::start(&world, "first").await?, Analytics::start(&world, "second").await?];
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 400).await?;
    let mut expected = short_stock(&world, &mut dice, &products, 100).await?;
    // Not while one of them makes the tables: all wait for that.
    caught_up(&world).await?;
    // Frozen in the middle of it, killed, and stopped in order: whoever has the pin, the other one goes on.
    for round in 0..6 {
        let victim = round % 2;
        match round {
            0 | 1 => replicas[victim].service.pause()?,
            2 | 3 => replicas[victim].service.kill(),
            _ => replicas[victim].service.stop().await?,
        }
        expected.add(short_stock(&world, &mut dice, &products, 60).await?);
        caught_up(&world).await?;
        match round {
            0 | 1 => replicas[victim].service.resume()?,
            _ => replicas[victim].service.start()?,
        }
        // Each answers what the other applied.
        for replica in &replicas {
            let last = world.last_sequence().await?;
            let answer = eventually("an answer as of the last sequence", PATIENCE, async || {
                let asked = replica.caller()?.get("/v1/analytics/summary").header("Lomash-Min-Sequence", last);
                let answer = asked.send().await?;
                Ok((answer.status == 200).then_some(answer))
            })
            .await?;
            assert!(answer.sequence() >= last);
        }
    }
    assert_counted(&world, &expected).await?;
    settled(&world).await?;
    assert!(rebuild(&world, DRY_RUN).await?.comparison.is_equal());
    service.stop().await?;
    world.close();
    Ok(())
}

/// What a replica took and did not settle is neither waited for nor applied over: the stream has it.
#[tokio::test]
async fn what_a_dead_replica_holds_is_read_from_the_stream() -> Result<()> {
    const HELD: usize = 5;
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 50).await?;
    let expected = short_stock(&world, &mut dice, &products, 100).await?;
    let inbox = world.client.new_inbox();
    let mut held = world.client.subscribe(inbox.clone()).await?;
    let asked = json!({ "batch": HELD, "no_wait": true, "group": streams::ANALYTICS_GROUP }).to_string();
    let next = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{}", streams::INVENTORY, streams::ANALYTICS);
    world.client.publish_with_reply(next, inbox, asked.into()).await?;
    for _ in 0..HELD {
        let message = tokio::time::timeout(PATIENCE, held.next()).await?.context("no message")?;
        ensure!(message.status.is_none(), "{message:?}");
    }

    let analytics = Analytics::start(&world, "analytics").await?;
    caught_up(&world).await?;
    let info = world.context.get_stream(streams::INVENTORY).await?.consumer_info(streams::ANALYTICS).await?;
    assert!(info.num_ack_pending >= HELD, "they are held still: {info:?}");
    assert_counted(&world, &expected).await?;
    let metrics = analytics.caller()?.at(&analytics.health_url).get("/metrics").send().await?.text;
    let caught = metrics.lines().find_map(|line| line.strip_prefix("lomash_analytics_catch_ups_total "));
    assert!(caught.is_some_and(|times| times != "0"), "{metrics}");
    // They come, and are known.
    let before = row_versions(&world).await?;
    settled(&world).await?;
    assert_eq!(row_versions(&world).await?, before);
    assert!(rebuild(&world, DRY_RUN).await?.comparison.is_equal());
    service.stop().await?;
    world.close();
    Ok(())
}

/// How fast it catches up, for `docs/performance.md`: `cargo test … -- --ignored --nocapture catching_up`.
#[tokio::test]
#[ignore = "a measurement"]
async fn measure_catching_up() -> Result<()> {
    const PRODUCTS: u32 = 2_000;
    const EVENTS: u32 = 200_000;
    let world = World::start().await?;
    let ledger = world.ledger();
    let id = |number: u32| ProductId(Uuid::from_u128((u128::from(number) << 64) | 7));
    let mut last = 0;
    let mut append = async |events: Vec<LedgerEvent>| -> Result<()> {
        for events in events.chunks(1_000) {
            let messages: Vec<_> = events
                .iter()
                .map(|event| {
                    let event_id = EventId(Uuid::new_v4());
                    let envelope = Envelope {
                        event_id,
                        event_type: event.topic().event_type(),
                        timestamp: Timestamp::now(),
                        version: Version::CURRENT,
                        payload: event,
                    };
                    let payload = codec::encode(ContentType::Json, &envelope).into();
                    let subject = format!("{}.{}", event.topic().as_str(), event.key());
                    NewMessage { subject, event_id, payload, carried: None }
                })
                .collect();
            last = ledger.append(&messages, last).await?;
        }
        Ok(())
    };
    let sku = |number: u32| -> Sku { format!("KIT-{number}").parse().unwrap() };
    let registrations = (0..PRODUCTS).map(|number| {
        LedgerEvent::ProductRegistered(ProductRegistered(ProductDetails {
            product_id: id(number),
            sku: sku(number),
            name: "Oak worktop".into(),
            category: None,
            low_stock_threshold: None,
            active: true,
        }))
    });
    append(registrations.collect()).await?;
    let mut stock = vec![0_u32; PRODUCTS as usize];
    let mut dice = Dice::new(7);
    let updates = (0..EVENTS).map(|number| {
        let product = if number < PRODUCTS { number } else { dice.below(PRODUCTS) };
        let stock = &mut stock[product as usize];
        let previous = *stock;
        let is_order = previous > 0;
        *stock = if is_order { previous - 1 } else { 1_000_000 };
        LedgerEvent::InventoryUpdated(InventoryUpdated {
            product_id: id(product),
            sku: sku(product),
            previous_quantity: previous,
            new_quantity: *stock,
            trigger: if is_order { Trigger::OrderConfirmed } else { Trigger::AdminUpdate },
            order_id: is_order.then(|| OrderId(Uuid::new_v4())),
            updated_by: UpdatedBy::System,
        })
    });
    append(updates.collect()).await?;
    let began = std::time::Instant::now();
    let analytics = Analytics::start(&world, "analytics").await?;
    caught_up_within(&world, 10 * PATIENCE).await?;
    let took = began.elapsed().as_secs_f64();
    println!(
        "{} events by the consumer in {took:.1} s, {:.0}/s",
        EVENTS + PRODUCTS,
        f64::from(EVENTS + PRODUCTS) / took
    );
    let outcome = rebuild(&world, Options::default()).await?;
    println!("{} events a second by a rebuild; equal: {}", outcome.events_per_second, outcome.comparison.is_equal());
    drop(analytics);
    world.close();
    Ok(())
}

#[tokio::test]
async fn postgres_goes_and_comes_back() -> Result<()> {
    let mut world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 200).await?;
    caught_up(&world).await?;
    let caller = analytics.caller()?;
    eventually("it to be ready", PATIENCE, async || {
        Ok((caller.get("/readyz").send().await?.status == 200).then_some(()))
    })
    .await?;

    world.postgres.as_mut().unwrap().kill();
    let expected = short_stock(&world, &mut dice, &products, 300).await?;
    eventually("it to say that it is not ready", PATIENCE, async || {
        let answer = caller.get("/readyz").send().await?;
        let named = answer.json["checks"]
            .as_array()
            .is_some_and(|checks| checks.iter().any(|check| check["name"] == "metrics" && check["ready"] == false));
        Ok((answer.status == 503 && named).then_some(()))
    })
    .await?;
    let refused = caller.get("/v1/analytics/summary").send().await?;
    assert_eq!((refused.status, refused.problem()), (503, "unavailable"), "{refused:?}");
    assert!(refused.header("retry-after").is_some());
    world.postgres.as_mut().unwrap().restart().await?;
    caught_up(&world).await?;
    assert_counted(&world, &expected).await?;
    settled(&world).await?;
    eventually("it to be ready again", PATIENCE, async || {
        Ok((caller.get("/readyz").send().await?.status == 200).then_some(()))
    })
    .await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_stream_that_went_backwards_is_refused_with_the_remedy() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let mut analytics = Analytics::start(&world, "analytics").await?;
    world.register("BACK-1", 5).await?;
    caught_up(&world).await?;
    settled(&world).await?;
    analytics.service.stop().await?;
    let database = world.database().await?;
    database.batch_execute("UPDATE analytics.checkpoint SET sequence = sequence + 1000").await?;
    analytics.service.start()?;
    let ended = tokio::time::timeout(PATIENCE, analytics.service.ended()).await?;
    assert!(!ended.success());
    let log = std::fs::read_to_string(analytics.service.log())?;
    for said in ["went backwards", "lomash rebuild analytics", "DROP SCHEMA analytics CASCADE"] {
        assert!(log.contains(said), "{said} is not said: {log}");
    }
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn what_is_not_ours_is_skipped_counted_and_told() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let product = world.register("MINE-1", 5).await?;
    let subject = format!("{}.{product}", Topic::InventoryUpdated.as_str());
    world.context.publish_with_headers(subject, HeaderMap::new(), "{}".into()).await?.await?;
    let sold = order(&[(product, 2)]);
    world.publish(&sold).await?;
    world.decided([sold.payload.order_id]).await?;
    caught_up(&world).await?;
    let summary = analytics.caller()?.get("/v1/analytics/summary").send().await?;
    assert_eq!(summary.json["skippedMessages"], 1, "{summary:?}");
    assert_eq!(summary.json["totals"]["unitsSold"], 2);
    service.stop().await?;
    world.close();
    Ok(())
}

// ── Rebuilding ──────────────────────────────────────────────────────────────────────────────────────────────────

const DRY_RUN: Options = Options { dry_run: true, only_if_equal: false };

async fn rebuild(world: &World, options: Options) -> Result<Outcome> {
    rebuild_of(Projection::Analytics, &world.context, &world.database_url(), options, Show::Nothing).await
}

#[tokio::test]
async fn a_rebuild_equals_the_live_metrics_while_orders_and_reads_go_on() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let mut dice = Dice::thrown();
    let products = world.register_many(10, 100_000).await?;
    let mut sold = short_stock(&world, &mut dice, &products, 200).await?.allocated;
    caught_up(&world).await?;
    let caller = analytics.caller()?;
    let rebuilding = std::sync::atomic::AtomicBool::new(true);
    let rebuilds = async {
        for _ in 0..4 {
            let outcome = rebuild(&world, Options::default()).await?;
            ensure!(outcome.comparison.is_equal(), "{outcome:?}");
            ensure!(matches!(outcome.comparison, Comparison::Compared { .. }), "{outcome:?}");
            ensure!(outcome.swap.as_ref().is_some_and(|swap| swap.can_be_undone), "{outcome:?}");
        }
        rebuilding.store(false, std::sync::atomic::Ordering::Relaxed);
        Ok::<(), anyhow::Error>(())
    };
    let traffic = async {
        let mut sold = 0;
        for _ in 0..10 {
            sold += short_stock(&world, &mut dice, &products, 60).await?.allocated;
        }
        Ok::<i64, anyhow::Error>(sold)
    };
    let reads = async {
        let mut seen = 0;
        while rebuilding.load(std::sync::atomic::Ordering::Relaxed) {
            let answer = caller.get("/v1/analytics/summary").send().await?;
            ensure!(answer.status == 200, "{answer:?}");
            ensure!(answer.sequence() >= seen, "the metrics went back from {seen}: {answer:?}");
            seen = answer.sequence();
        }
        Ok::<(), anyhow::Error>(())
    };
    let ((), more, ()) = tokio::try_join!(rebuilds, traffic, reads)?;
    sold += more;
    caught_up(&world).await?;
    let database = world.database().await?;
    assert_eq!(count(&database, "SELECT sum(orders_allocated)::bigint FROM analytics.days").await?, sold);

    // Damage is named, and healed.
    let damage = format!(
        "UPDATE analytics.product_days SET units_sold = units_sold + 1 WHERE product_id = '{}';
         DELETE FROM analytics.stock WHERE product_id = '{}'; UPDATE analytics.checkpoint SET units_in_stock = 0",
        products[1], products[2]
    );
    database.batch_execute(&damage).await?;
    let outcome = rebuild(&world, Options { dry_run: false, only_if_equal: true }).await?;
    assert!(outcome.swap.is_none() && !outcome.comparison.is_equal());
    let Comparison::Compared { tables, .. } = &outcome.comparison else { panic!("{outcome:?}") };
    let differences: Vec<_> = tables.iter().map(|table| (table.table, table.differences)).collect();
    assert_eq!(
        differences,
        [("products", 0), ("stock", 1), ("product_days", 1), ("days", 0), ("checkpoint", 1)],
        "{tables:?}"
    );
    let swapped = rebuild(&world, Options::default()).await?;
    assert!(swapped.swap.is_some());
    assert!(rebuild(&world, DRY_RUN).await?.comparison.is_equal());

    // And back to what was damaged, and forth again; the service goes on from either.
    rollback_of(Projection::Analytics, &world.context, &world.database_url()).await?;
    short_stock(&world, &mut dice, &products, 20).await?;
    caught_up(&world).await?;
    assert!(!rebuild(&world, DRY_RUN).await?.comparison.is_equal(), "the damage is back");
    rollback_of(Projection::Analytics, &world.context, &world.database_url()).await?;
    caught_up(&world).await?;
    assert!(rebuild(&world, DRY_RUN).await?.comparison.is_equal());
    // The other projection was left alone.
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname IN ('inventory', 'inventory_previous')";
    assert_eq!(count(&database, schemas).await?, 1);
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn status_tells_of_consumer_and_checkpoint() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    world.register_many(3, 10).await?;
    let last = caught_up(&world).await?;
    settled(&world).await?;
    let status = lomash::status::status(&world.context, Some(&world.database_url())).await;
    let shown = serde_json::to_value(&status)?;
    assert_eq!(shown["analytics"]["found"]["checkpoint"], last, "{shown}");
    assert_eq!(shown["analytics"]["found"]["lagEvents"], 0);
    assert_eq!(shown["analytics"]["found"]["products"], 3);
    let text = lomash::status::render(&status);
    assert!(text.contains("INVENTORY/analytics") && text.contains("│ analytics"), "{text}");
    drop(analytics);
    service.stop().await?;
    world.close();
    Ok(())
}

// ── HTTP ────────────────────────────────────────────────────────────────────────────────────────────────────────

const ROUTES: [&str; 4] = [
    "/v1/analytics/stock-levels",
    "/v1/analytics/low-stock",
    "/v1/analytics/products/{id}/daily",
    "/v1/analytics/summary",
];

#[tokio::test]
async fn every_route_for_every_role_and_every_problem() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let product = world.register("ROLE-1", 5).await?;
    let last = caught_up(&world).await?;
    let viewer = analytics.caller()?;
    for route in ROUTES {
        let path = route.replace("{id}", &product.to_string());
        for role in [Role::Viewer, Role::Admin] {
            let answer = viewer.with_token(Some(token(role, Uuid::new_v4())?)).get(&path).send().await?;
            assert_eq!(answer.status, 200, "{path} {role:?}: {answer:?}");
            assert!(answer.sequence() >= last, "{path}: {answer:?}");
        }
        for nobody in [None, Some("not.a.token".to_owned())] {
            let answer = viewer.with_token(nobody).get(&path).send().await?;
            assert_eq!((answer.status, answer.problem()), (401, "unauthorized"), "{path}");
        }
        let answer = viewer.post(&path, &json!({})).send().await?;
        assert_eq!((answer.status, answer.problem()), (405, "method-not-allowed"), "{path}");
        let answer = viewer.get(&format!("{path}?nonsense=1")).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path}");
        for bad in ["-1", "x", "", "99999999999999999999"] {
            let answer = viewer.get(&path).header("Lomash-Min-Sequence", bad).send().await?;
            assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path} {bad}");
        }
        let answer = viewer.get(&path).header("Lomash-Min-Sequence", last + 1_000).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path}");
        assert_eq!(answer.json["end"], last);
    }
    let daily = format!("/v1/analytics/products/{product}/daily");
    let bad = [
        "/v1/analytics/stock-levels?limit=0".to_owned(),
        "/v1/analytics/stock-levels?limit=201".to_owned(),
        "/v1/analytics/stock-levels?sort=price".to_owned(),
        "/v1/analytics/stock-levels?windowDays=0".to_owned(),
        "/v1/analytics/stock-levels?windowDays=366".to_owned(),
        "/v1/analytics/stock-levels?sku=%00".to_owned(),
        format!("/v1/analytics/stock-levels?category={}", "x".repeat(201)),
        "/v1/analytics/low-stock?limit=0".to_owned(),
        "/v1/analytics/low-stock?windowDays=4000".to_owned(),
        format!("{daily}?from=yesterday"),
        format!("{daily}?from=2026-02-30"),
        format!("{daily}?to=%2B12026-01-01"),
        format!("{daily}?from=2026-03-02&to=2026-03-01"),
        format!("{daily}?from=1990-01-01&to=2026-03-01"),
        "/v1/analytics/summary?from=2020-01-01".to_owned(),
        "/v1/analytics/summary?to=31.01.2026".to_owned(),
        "/v1/analytics/products/nonsense/daily".to_owned(),
    ];
    for path in bad {
        let answer = viewer.get(&path).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path}: {answer:?}");
    }
    for path in [
        "/v1/analytics/stock-levels?cursor=x".to_owned(),
        "/v1/analytics/low-stock?cursor=x".to_owned(),
        format!("{daily}?cursor=x"),
    ] {
        let answer = viewer.get(&path).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "invalid-cursor"), "{path}");
    }
    let nobody = viewer.get(&format!("/v1/analytics/products/{}/daily", Uuid::new_v4())).send().await?;
    assert_eq!((nobody.status, nobody.problem()), (404, "product-not-found"));
    assert_eq!(nobody.json["sequence"], last);
    let nowhere = viewer.get("/v1/analytics/everything").send().await?;
    assert_eq!((nowhere.status, nowhere.problem()), (404, "not-found"));
    let document = viewer.with_token(None).get("/openapi.json").send().await?;
    assert_eq!(document.json["info"]["title"], "Lomash Inventory: analytics");
    service.stop().await?;
    world.close();
    Ok(())
}

/// All items of a list, by pages of two.
async fn paged(caller: &Caller, path: &str) -> Result<Vec<Value>> {
    let mut items = Vec::new();
    let mut cursor: Option<String> = None;
    loop {
        let separator = if path.contains('?') { '&' } else { '?' };
        let next = cursor.as_ref().map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
        let answer = caller.get(&format!("{path}{separator}limit=2{next}")).send().await?;
        ensure!(answer.status == 200, "{path}: {answer:?}");
        let page = answer.json["items"].as_array().context("items")?;
        assert!(page.len() <= 2);
        items.extend(page.clone());
        match answer.json["nextCursor"].as_str() {
            Some(next) => cursor = Some(next.to_owned()),
            None => return Ok(items),
        }
    }
}

fn of<'v>(items: &'v [Value], member: &str) -> Vec<&'v Value> {
    items.iter().map(|item| &item[member]).collect()
}

#[tokio::test]
async fn the_lists_the_days_and_the_summary() -> Result<()> {
    let world = World::start().await?;
    // A process of its own: metrics are of a process.
    let mut service = world.service("product")?;
    start_until_ready(&mut service).await?;
    let product_service = Caller::new(&world.url("product"), Role::Viewer)?;
    let analytics = Analytics::start(&world, "analytics").await?;
    let caller = analytics.caller()?;
    let today = OffsetDateTime::now_utc().date().to_string();
    let [slow, fast, gone, _, plenty, idle] = {
        let mut ids = Vec::new();
        for (sku, quantity) in [("A-1", 10), ("B-2", 30), ("C-3", 6), ("D-4", 2), ("E-5", 50), ("F-6", 0)] {
            ids.push(world.register(sku, quantity).await?);
        }
        <[ProductId; 6]>::try_from(ids).unwrap()
    };
    let threshold = Amendment { low_stock_threshold: Some(Some(9)), ..Amendment::default() };
    world.act(fast, Action::Amend(threshold)).await?;
    let inactive = Amendment { active: Some(false), ..Amendment::default() };
    world.act(idle, Action::Amend(inactive)).await?;
    let orders =
        [order(&[(slow, 7)]), order(&[(fast, 12), (gone, 6)]), order(&[(fast, 9)]), order(&[(gone, 4), (plenty, 1)])];
    for each in &orders {
        world.publish(each).await?;
        world.decided([each.payload.order_id]).await?;
    }
    let last = caught_up(&world).await?;

    let levels = paged(&caller, "/v1/analytics/stock-levels").await?;
    assert_eq!(of(&levels, "sku"), ["A-1", "B-2", "C-3", "D-4", "E-5", "F-6"]);
    assert_eq!(of(&levels, "quantity"), [3, 9, 0, 2, 50, 0]);
    assert_eq!(levels[1]["unitsSoldInWindow"], 21);
    assert_eq!(levels[1]["velocityDays"], 1, "it joined today");
    assert_eq!((&levels[1]["unitsPerDay"], &levels[1]["daysOfCover"]), (&json!(21.0), &json!(0.429)));
    assert_eq!((&levels[3]["unitsPerDay"], &levels[3]["daysOfCover"]), (&json!(0.0), &Value::Null));
    assert!(levels[2]["outOfStockSince"].is_string() && levels[1]["outOfStockSince"].is_null());
    assert_eq!(levels[1]["lowStockThreshold"], 9);
    let skus = async |query: &str| -> Result<Vec<String>> {
        let items = paged(&caller, &format!("/v1/analytics/stock-levels?{query}")).await?;
        Ok(items.iter().map(|item| item["sku"].as_str().unwrap().to_owned()).collect())
    };
    let by_quantity = skus("sort=-quantity").await?;
    assert_eq!(by_quantity[..4], ["E-5", "B-2", "A-1", "D-4"]);
    assert_eq!(by_quantity[4..].iter().collect::<BTreeSet<_>>().len(), 2, "the two without any, by their ids");
    assert_eq!(skus("available=false&active=true").await?, ["C-3"]);
    assert_eq!(skus("belowThreshold=true&sort=name").await?, ["A-1", "B-2", "C-3", "D-4", "F-6"]);
    assert_eq!(skus("active=false").await?, ["F-6"]);
    assert_eq!(skus("sku=E-5").await?, ["E-5"]);
    assert_eq!(skus("category=bedroom").await?, Vec::<String>::new());
    // Either form of Unicode is looked for in both.
    assert_eq!(skus("category=ku%CC%88che").await?, Vec::<String>::new());

    // The most urgent first: nothing left of what sells; of equal cover, what sells faster; and last what does not sell.
    let low = paged(&caller, "/v1/analytics/low-stock").await?;
    assert_eq!(of(&low, "sku"), ["C-3", "B-2", "A-1", "D-4"]);

    let daily = paged(&caller, &format!("/v1/analytics/products/{gone}/daily?from=2020-01-01")).await?;
    assert_eq!(daily.len(), 1, "none before it joined: {daily:?}");
    let day = &daily[0];
    assert_eq!((&day["day"], &day["unitsSold"], &day["ordersAllocated"]), (&json!(today), &json!(6), &json!(1)));
    assert_eq!(day["adjustments"], json!({ "count": 1, "unitsUp": 6, "unitsDown": 0 }));
    assert_eq!(day["unitsRefused"], json!({ "insufficientStock": 4, "productInactive": 0, "unknownProduct": 0 }));
    assert_eq!((&day["ordersRefused"], &day["stockOuts"], &day["closingQuantity"]), (&json!(1), &json!(1), &json!(0)));
    assert!(day["outOfStockSeconds"].as_f64().unwrap() > 0.0, "{day}");

    let summary = caller.get("/v1/analytics/summary").send().await?.json;
    assert_eq!(summary["sequence"], last);
    assert_eq!(
        summary["now"],
        json!({ "products": 6, "activeProducts": 5, "outOfStockProducts": 1, "lowStockProducts": 4, "unitsInStock": 64 })
    );
    // The product service's gauge counts the same products: those for sale.
    let summarised = summary["now"]["outOfStockProducts"].as_f64();
    eventually("the gauge to be what the summary says", PATIENCE, async || {
        let page = product_service.at(&world.health_url("product")).get("/metrics").send().await?.text;
        let told = page.lines().find_map(|line| line.strip_prefix("out_of_stock_products_total "));
        ensure!(told.and_then(|value| value.parse().ok()) == summarised, "{told:?}, not {summarised:?}");
        Ok(Some(()))
    })
    .await?;
    assert_eq!((&summary["totals"]["unitsSold"], &summary["totals"]["ordersAllocated"]), (&json!(34), &json!(3)));
    assert_eq!(summary["totals"]["ordersRefused"]["insufficientStock"], 1);
    assert_eq!(summary["totals"]["productsRegistered"], 6);
    assert_eq!(summary["days"].as_array().unwrap().len(), 1);
    assert_eq!(summary["days"][0]["day"], json!(today));
    service.stop().await?;
    world.close();
    Ok(())
}

// ── Indexes ─────────────────────────────────────────────────────────────────────────────────────────────────────

/// A hundred thousand products, of which one in fifty is out of stock and one in forty has sold on each of forty days.
async fn fill(database: &tokio_postgres::Client) -> Result<()> {
    let statements = "
        INSERT INTO analytics.products
        SELECT md5(n::text)::uuid, 'KIT-' || lpad(n::text, 6, '0'), 'Oak worktop ' || n % 997,
               CASE WHEN n % 10 > 0 THEN 'category ' || n % 47 END, n % 33 > 0, now() - interval '50 days'
        FROM generate_series(1, 100000) n;
        INSERT INTO analytics.stock
        SELECT md5(n::text)::uuid, CASE WHEN n % 50 = 0 THEN 0 ELSE 1 + n % 5000 END, CASE WHEN n % 70 = 0 THEN 20 END,
               CASE WHEN n % 50 = 0 THEN now() END, n, now()
        FROM generate_series(1, 100000) n;
        INSERT INTO analytics.product_days
        SELECT md5(n::text)::uuid, CURRENT_DATE - d, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, NULL, 9
        FROM generate_series(1, 100000) n, generate_series(0, 40) d WHERE n % 40 = 0 OR d = 40;
        INSERT INTO analytics.days
        SELECT CURRENT_DATE - d, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 FROM generate_series(0, 3000) d;
        UPDATE analytics.checkpoint SET sequence = 1000000;";
    database.batch_execute(statements).await.context("the products cannot be made")?;
    database.batch_execute("VACUUM ANALYZE").await.context("they cannot be analysed")?;
    Ok(())
}

#[tokio::test]
async fn every_read_of_a_hundred_thousand_products_comes_by_an_index() -> Result<()> {
    let dir = scratch()?;
    let postgres = Postgres::start(&dir.path().join("postgres")).await?;
    let url = Secret::from(postgres.url());
    migrate_schema(&url, &ANALYTICS, ANALYTICS.live).await?;
    let database = lomash_platform::postgres::connect(&url).await?;
    fill(&database).await?;
    let busy = "SELECT product_id FROM analytics.products WHERE sku = 'KIT-000200'";
    let busy = ProductId(database.query_one(busy, &[]).await?.get(0));
    database.batch_execute(WATCHED).await?;
    let reads = Reads::new(&url)?;
    let log = postgres.log();
    let now = OffsetDateTime::now_utc();
    let today = now.date();
    let since = today - time::Duration::days(39);

    let query = |sort: &str, filter: StockLevelFilter| StockLevelQuery {
        sort: sort.parse().unwrap(),
        filter,
        limit: 50,
        window_days: 28,
        ..StockLevelQuery::default()
    };
    let all = StockLevelFilter::default;
    let category = || StockLevelFilter { category: Some("category 11".to_owned()), ..all() };
    let low = || StockLevelFilter { below_threshold: Some(true), ..all() };
    let none = || StockLevelFilter { available: Some(false), active: Some(true), ..all() };
    let inactive = || StockLevelFilter { active: Some(false), ..all() };
    let after = LevelKey { text: "KIT-050000".to_owned(), number: 2_500, product_id: busy };
    // A page of fifty, each with the days of its window.
    let page = 51.0 * (2.0 + 28.0) + 60.0;
    let lists: Vec<(&str, StockLevelQuery, &[&str], f64)> = vec![
        ("all by sku", query("sku", all()), &["products_sku"], page),
        (
            "all by -sku, in the middle",
            StockLevelQuery { after: Some(after.clone()), ..query("-sku", all()) },
            &["products_sku"],
            page,
        ),
        ("all by name", query("name", all()), &["products_name"], page),
        ("all by -quantity", query("-quantity", all()), &["stock_quantity"], page),
        (
            "all by quantity, in the middle",
            StockLevelQuery { after: Some(after), ..query("quantity", all()) },
            &["stock_quantity"],
            page,
        ),
        ("a category", query("sku", category()), &["products_category"], page),
        ("low by quantity", query("quantity", low()), &["stock_low", "stock_quantity"], page + 5_000.0),
        ("low by sku", query("sku", low()), &["stock_low", "products_sku"], 15_000.0),
        ("none left", query("sku", none()), &["stock_low", "stock_quantity", "products_sku"], 15_000.0),
        ("inactive", query("sku", inactive()), &["products_inactive"], page),
    ];
    let mut problems = Vec::new();
    let mut judge = |what: &str, from: usize, indexes: &[&str], most: f64| -> Result<()> {
        let text = std::fs::read_to_string(&log)?;
        let plans = plans(&text[from..]);
        ensure!(!plans.is_empty(), "auto_explain logged nothing; is it installed (postgresql-contrib)?");
        let done = Done::of(&plans.last().unwrap()["Plan"]);
        if !done.read_whole().is_empty() || done.rows > most || !indexes.iter().any(|index| done.uses(index)) {
            problems.push(format!("{what}: {done:?}; it should use one of {indexes:?} and look at {most} rows"));
        }
        Ok(())
    };
    let logged = || std::fs::read_to_string(&log).map(|text| text.len());
    for (what, query, indexes, most) in &lists {
        let from = logged()?;
        assert_eq!(reads.stock_levels(query, now).await?.value.items.len(), 50, "{what}");
        judge(what, from, indexes, *most)?;
    }

    // Of the 2,000 that it looks at, one in four with a window full of sales, each row of which is counted as it is found and
    // as it is read.
    let from = logged()?;
    let first = reads.low_stock(28, None, 50, now).await?.value;
    assert_eq!(first.items.len(), 50);
    judge("the most urgent", from, &["stock_low"], 45_000.0)?;
    let began = std::time::Instant::now();
    reads.low_stock(28, None, 50, now).await?;
    println!("the most urgent, with auto_explain: {:?}", began.elapsed());
    let from = logged()?;
    let next = reads.low_stock(28, first.next.as_ref(), 50, now).await?.value;
    assert!(first.items.iter().all(|item| !next.items.contains(item)));
    judge("the next most urgent", from, &["stock_low"], 45_000.0)?;

    // Prepared statements may get a plan for all values: after five executions at the earliest.
    let ten = async || {
        for _ in 0..10 {
            assert_eq!(reads.daily(busy, (since, today), 200, now).await?.value.items.len(), 40);
        }
        Ok::<(), QueryError>(())
    };
    let from = logged()?;
    ten().await?;
    judge("the days of a product", from, &["product_days_pkey"], 300.0)?;
    let from = logged()?;
    for _ in 0..10 {
        assert_eq!(reads.summary((since, today)).await?.value.days.len(), 40);
    }
    judge("the summary", from, &["days_pkey"], 60.0)?;
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    Ok(())
}
