//! Reconciliation on real servers with a warehouse of the test's own: schedule, runs, approval, crashes, replicas.
//!
//! Owns what a run does to the ledger and to its report; which figure stands and what it comes to is tested with
//! `reconciliation.rs` itself. Every test ends with a clean `lomash verify`.
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use lomash_contract::{CountedBy, LedgerEvent, ProductId, Timestamp, Trigger, UpdatedBy};
use lomash_ledger::receive::{self, Settle};
use lomash_platform::{Secret, postgres};
use lomash_tests::{PATIENCE, World, eventually, order, token};
use lomash_web::Role;
use product_service::inventory::{Action, Count};
use product_service::reconciliation::reports::{KEPT_REPORTS, NewRun, Reports};
use product_service::reconciliation::run::Reconciliation;
use product_service::reconciliation::schedule;
use product_service::reconciliation::{Figures, RefusalReason, Report, Request, Row, RowResult, StartedBy, Status};
use product_service::schedule::Schedule;
use product_service::service::Config;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Rows of a report that a test asks for at once.
const ALL_ROWS: u32 = 10_000;

/// A warehouse that tells what it was told last.
#[derive(Clone)]
struct Warehouse {
    url: String,
    answer: Arc<Mutex<Result<Value, StatusCode>>>,
    asked: Arc<AtomicU64>,
}

impl Warehouse {
    async fn start() -> Result<Self> {
        let answer = Arc::new(Mutex::new(Ok(json!([]))));
        let asked = Arc::new(AtomicU64::new(0));
        let (told, counter) = (answer.clone(), asked.clone());
        let app = Router::new().fallback(move || {
            counter.fetch_add(1, Ordering::SeqCst);
            let answer: Result<Value, StatusCode> = told.lock().unwrap().clone();
            async move {
                match answer {
                    Ok(rows) => axum::Json(rows).into_response(),
                    Err(status) => status.into_response(),
                }
            }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("http://{}/counts", listener.local_addr()?);
        tokio::spawn(async move { axum::serve(listener, app).await });
        Ok(Self { url, answer, asked })
    }

    fn tells(&self, rows: impl IntoIterator<Item = Value>) {
        *self.answer.lock().unwrap() = Ok(Value::Array(rows.into_iter().collect()));
    }

    fn fails(&self, status: StatusCode) {
        *self.answer.lock().unwrap() = Err(status);
    }
}

fn counted(product: ProductId, quantity: u32, at: Timestamp) -> Value {
    json!({ "productId": product, "quantity": quantity, "countedAt": at })
}

/// A moment that is later than what the ledger has stored and earlier than what it stores next.
async fn between_two_events() -> Timestamp {
    // Instants have milliseconds: what is stored next must not share this one.
    tokio::time::sleep(Duration::from_millis(5)).await;
    let at = Timestamp::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    at
}

fn config(world: &World, warehouse: &Warehouse) -> Config {
    Config { warehouse_url: Some(Secret::from(warehouse.url.clone())), ..world.config() }
}

fn desk(world: &World) -> Result<Reconciliation> {
    let url = world.database_url();
    Ok(Reconciliation::new(world.context.clone(), Reports::new(postgres::pool(&url)?, url), true))
}

/// Nobody is asked, however much changes.
fn unasked() -> Request {
    Request { approval_threshold_percent: 100, ..Request::default() }
}

/// Waits until nothing more happens to the run by itself.
async fn settled(desk: &Reconciliation, id: Uuid) -> Result<Report> {
    eventually("the run to come to a rest", PATIENCE, async || {
        let report = desk.get(id).await?.context("no report")?;
        Ok(report.status.is_settled().then_some(report))
    })
    .await
}

/// Has a run carried out; its report and rows.
async fn run(desk: &Reconciliation, request: Request) -> Result<(Report, Vec<Row>)> {
    let id = desk.start(Uuid::new_v4(), request, UpdatedBy::System).await?.report.id;
    let report = settled(desk, id).await?;
    Ok((report, desk.rows(id, 0, ALL_ROWS).await?))
}

/// Sells units of a product, and waits until they are sold.
async fn sell(world: &World, product: ProductId, quantity: u32) -> Result<()> {
    let order = order(&[(product, quantity)]);
    world.publish(&order).await?;
    world.decided([order.payload.order_id]).await?;
    Ok(())
}

/// How often each product was corrected.
async fn corrections(world: &World) -> Result<HashMap<ProductId, u32>> {
    let mut corrections = HashMap::new();
    for (_, event) in world.events().await? {
        if let LedgerEvent::InventoryUpdated(updated) = event
            && updated.trigger == Trigger::ScheduledSync
        {
            *corrections.entry(updated.product_id).or_default() += 1;
        }
    }
    Ok(corrections)
}

fn brief(row: &Row) -> (RowResult, Option<u32>, Option<i64>, Option<u32>, u32) {
    (row.result, row.before, row.correction, row.after, row.shortfall)
}

#[tokio::test]
async fn a_count_corrects_the_past_and_leaves_the_orders_since_alone() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    let desk = desk(&world)?;
    let (oak, ash, elm) =
        (world.register("OAK", 50).await?, world.register("ASH", 20).await?, world.register("ELM", 9).await?);
    let then = between_two_events().await;
    sell(&world, oak, 20).await?;
    sell(&world, ash, 19).await?;

    // At the count 40 of 50 oaks were there, 5 of 20 ashes, and all elms.
    let sku = json!({ "sku": "OAK", "quantity": 40, "countedAt": then });
    let nonsense = json!({ "sku": "BIRCH", "quantity": 1, "countedAt": then });
    let unreadable = json!({ "sku": "OAK", "quantity": -1, "countedAt": then });
    warehouse.tells([sku, counted(ash, 5, then), counted(elm, 9, then), nonsense, unreadable]);
    let (report, rows) = run(&desk, unasked()).await?;
    assert_eq!((report.status, report.problem.as_deref()), (Status::Completed, None));
    assert_eq!(brief(&rows[0]), (RowResult::Corrected, Some(30), Some(-10), Some(20), 0));
    assert_eq!(brief(&rows[1]), (RowResult::Corrected, Some(1), Some(-15), Some(0), 14), "never below zero");
    assert_eq!(brief(&rows[2]), (RowResult::Unchanged, Some(9), Some(0), Some(9), 0));
    let reasons: Vec<_> = rows[3..].iter().map(|row| row.refusal.as_ref().unwrap().reason).collect();
    assert_eq!(reasons, [RefusalReason::UnknownProduct, RefusalReason::Unreadable]);
    let totals = report.totals;
    assert_eq!((totals.counted, totals.changed, totals.unchanged, totals.refused), (3, 2, 1, 2));
    assert_eq!((totals.units_up, totals.units_down, totals.shortfall), (0, 11, 14));
    assert_eq!((world.stock(oak).await?, world.stock(ash).await?, world.stock(elm).await?), (20, 0, 9));

    // The same figures again: all is on record, and nothing is written.
    let before = world.last_sequence().await?;
    let (again, rows) = run(&desk, unasked()).await?;
    assert_eq!((again.status, again.totals.changed, again.totals.unchanged), (Status::Completed, 0, 3), "{rows:?}");
    assert_eq!(world.last_sequence().await?, before);

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_count_taken_before_an_older_one_was_corrected_is_not_corrected_for_it_again() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    let desk = desk(&world)?;
    let oak = world.register("OAK", 50).await?;
    // Ten are missing on the shelf, at both counts.
    let first = between_two_events().await;
    sell(&world, oak, 5).await?;
    let second = between_two_events().await;
    warehouse.tells([counted(oak, 40, first)]);
    run(&desk, unasked()).await?;
    assert_eq!(world.stock(oak).await?, 35);
    warehouse.tells([counted(oak, 35, second)]);
    let (_, rows) = run(&desk, unasked()).await?;
    assert_eq!(brief(&rows[0]), (RowResult::Unchanged, Some(35), Some(0), Some(35), 0));
    assert_eq!((rows[0].stock_at_count, world.stock(oak).await?), (Some(35), 35));

    // And now the first one comes again.
    warehouse.tells([counted(oak, 40, first)]);
    let (_, rows) = run(&desk, unasked()).await?;
    assert_eq!(rows[0].refusal.as_ref().unwrap().reason, RefusalReason::Superseded);

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn confirmed_counts_are_taken_once() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let desk = desk(&world)?;
    let (oak, ash) = (world.register("OAK", 50).await?, world.register("ASH", 20).await?);
    let then = between_two_events().await;
    let clerk = Uuid::new_v4();
    let count =
        |quantity| Action::RecordCount(Count { quantity, counted_at: then, counted_by: CountedBy::User(clerk) });
    world.act(oak, count(45)).await?;
    world.act(ash, count(20)).await?;
    let request = Request { figures: Figures::Counts, ..unasked() };
    let (report, rows) = run(&desk, request.clone()).await?;
    assert_eq!((report.status, rows.len()), (Status::Completed, 2));
    assert_eq!(brief(&rows[0]), (RowResult::Corrected, Some(50), Some(-5), Some(45), 0));
    assert_eq!(rows[0].counted_by, Some(CountedBy::User(clerk)));
    assert_eq!(rows[1].result, RowResult::Unchanged);
    let (_, rows) = run(&desk, request).await?;
    assert_eq!(rows, [], "they are dealt with");
    assert_eq!(world.stock(oak).await?, 45);

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_dry_run_writes_nothing_and_a_large_run_waits_for_approval() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    let desk = desk(&world)?;
    let products = world.register_many(10, 10).await?;
    let then = between_two_events().await;
    warehouse.tells(products[..3].iter().map(|product| counted(*product, 7, then)));
    let before = world.last_sequence().await?;

    let (report, rows) = run(&desk, Request { dry_run: true, ..Request::default() }).await?;
    assert_eq!((report.status, report.totals.changed, rows.len()), (Status::DryRun, 3, 3));
    assert!(rows.iter().all(|row| brief(row) == (RowResult::Planned, Some(10), Some(-3), Some(7), 0)), "{rows:?}");
    let no = desk.approve(report.id, UpdatedBy::System).await.unwrap_err();
    assert!(no.to_string().contains("dryRun"), "{no}");

    let again = desk.start(report.id, report.request.clone(), UpdatedBy::System).await?;
    assert_eq!((again.is_new, again.report.status), (false, Status::DryRun), "the same run");
    assert!(desk.start(report.id, Request::default(), UpdatedBy::System).await.is_err(), "asked to do something else");

    // Three of ten are more than 20 %.
    let (waiting, _) = run(&desk, Request::default()).await?;
    assert_eq!(waiting.status, Status::AwaitingApproval);
    assert_eq!(world.last_sequence().await?, before, "nothing is written");
    // A newer plan of the same figures takes its place, and is rejected.
    let (newer, _) = run(&desk, Request::default()).await?;
    assert_eq!(desk.get(waiting.id).await?.unwrap().status, Status::Superseded);
    assert_eq!(desk.reject(newer.id, UpdatedBy::System).await?.status, Status::Rejected);
    assert!(desk.approve(newer.id, UpdatedBy::System).await.is_err());

    let (third, _) = run(&desk, Request::default()).await?;
    sell(&world, products[0], 2).await?;
    let admin = UpdatedBy::User(Uuid::new_v4());
    desk.approve(third.id, admin).await?;
    let done = settled(&desk, third.id).await?;
    assert_eq!((done.status, done.decided_by, done.totals.changed), (Status::Completed, Some(admin), 3));
    let rows = desk.rows(third.id, 0, ALL_ROWS).await?;
    assert_eq!(brief(&rows[0]), (RowResult::Corrected, Some(8), Some(-3), Some(5), 0), "sold since the report");
    assert_eq!(desk.approve(third.id, admin).await?.status, Status::Completed, "approving again is harmless");
    assert!(corrections(&world).await?.values().all(|times| *times == 1));
    let list = desk.list(None, 2).await?;
    assert_eq!(list.iter().map(|report| report.id).collect::<Vec<_>>(), [third.id, newer.id]);
    let older = desk.list(Some((list[1].requested_at, list[1].id)), 2).await?;
    assert_eq!(older.iter().map(|report| report.id).collect::<Vec<_>>(), [waiting.id, report.id]);

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn an_approved_correction_that_is_no_longer_true_is_not_made() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    let desk = desk(&world)?;
    let (oak, ash) = (world.register("OAK", 50).await?, world.register("ASH", 50).await?);
    let first = between_two_events().await;
    sell(&world, oak, 1).await?;
    let second = between_two_events().await;
    warehouse.tells([counted(oak, 39, second), counted(ash, 40, first)]);
    let (waiting, _) = run(&desk, Request::default()).await?;
    assert_eq!(waiting.status, Status::AwaitingApproval);
    // Meanwhile a count older than the one and newer than the other is corrected by hand.
    let by_hand = |counted_at, quantity, stock_at_count| {
        let count = Count { quantity, counted_at, counted_by: CountedBy::Warehouse };
        Action::CorrectCount { count, stock_at_count }
    };
    world.act(oak, by_hand(first, 40, 50)).await?;
    world.act(ash, by_hand(second, 40, 50)).await?;
    desk.approve(waiting.id, UpdatedBy::System).await?;
    let done = settled(&desk, waiting.id).await?;
    let rows = desk.rows(waiting.id, 0, ALL_ROWS).await?;
    let reasons: Vec<_> = rows.iter().map(|row| row.refusal.as_ref().map(|refusal| refusal.reason)).collect();
    assert_eq!(reasons, [Some(RefusalReason::ChangedSinceReport), Some(RefusalReason::Superseded)], "{rows:?}");
    assert_eq!((done.totals.changed, world.stock(oak).await?, world.stock(ash).await?), (0, 39, 40));

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_warehouse_that_is_down_fails_the_run_with_its_reason() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    let desk = desk(&world)?;
    let oak = world.register("OAK", 50).await?;
    let then = between_two_events().await;
    let before = world.last_sequence().await?;
    warehouse.fails(StatusCode::SERVICE_UNAVAILABLE);
    let (failed, rows) = run(&desk, unasked()).await?;
    assert_eq!((failed.status, rows), (Status::Failed, vec![]));
    let problem = failed.problem.unwrap();
    assert!(problem.contains("5 times") && problem.contains("503"), "{problem}");
    assert_eq!(world.last_sequence().await?, before);
    // The next run finds it well again.
    warehouse.tells([counted(oak, 49, then)]);
    assert_eq!(run(&desk, unasked()).await?.0.status, Status::Completed);
    assert_eq!(world.stock(oak).await?, 49);

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Kills the replica that carries a run out between two corrections; another one goes on with the same run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_that_is_killed_goes_on_without_correcting_twice() -> Result<()> {
    /// Products of the run, and how many answers to corrections pass before the process aborts.
    const PRODUCTS: usize = 600;
    const PASSES: u32 = 250;

    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let mut service =
        world.service("killed")?.env("WAREHOUSE_URL", &warehouse.url).env("RECONCILIATION_SCHEDULE", "off");
    service.set_env("FAILPOINTS", format!("reconcile-between-corrections={PASSES}*off->return"));
    lomash_tests::start_until_ready(&mut service).await?;
    let desk = desk(&world)?;
    let products = world.register_many(PRODUCTS, 10).await?;
    let then = between_two_events().await;
    warehouse.tells(products.iter().map(|product| counted(*product, 7, then)));
    let id = desk.start(Uuid::new_v4(), unasked(), UpdatedBy::System).await?.report.id;
    let died = tokio::time::timeout(PATIENCE, service.ended()).await.context("it came through alive")?;
    assert!(!died.success(), "it aborts, not ends: {died}");
    let stored = corrections(&world).await?.len();
    assert!(stored >= PASSES as usize, "{stored} corrections were stored before");
    let told = desk.get(id).await?.unwrap();
    assert_eq!((told.status, told.attempts), (Status::Applying, 1));

    // Orders meanwhile, by the replica that takes over.
    let other = world.run_service_as(config(&world, &warehouse)).await?;
    sell(&world, products[0], 1).await?;
    let done = settled(&desk, id).await?;
    assert_eq!((done.status, done.attempts, done.totals.changed), (Status::Completed, 2, PRODUCTS as u64));
    assert_eq!((done.totals.units_down, done.totals.refused), (3 * PRODUCTS as u64, 0));
    let corrections = corrections(&world).await?;
    assert_eq!(corrections.len(), PRODUCTS);
    assert!(corrections.values().all(|times| *times == 1), "each product once");
    let rows = desk.rows(id, 0, ALL_ROWS).await?;
    assert!(rows.iter().all(|row| row.result == RowResult::Corrected && row.shortfall == 0));
    assert_eq!(warehouse.asked.load(Ordering::SeqCst), 1, "the figures are those of the plan");
    assert_eq!(world.stock(products[0]).await?, 6);

    world.verified().await?;
    other.stop().await?;
    world.close();
    Ok(())
}

/// Receives jobs like a replica, and notes which ticks it got.
fn receiver(world: &World, ticks: Arc<Mutex<Vec<(u8, u64)>>>, me: u8, stop: CancellationToken) {
    let context = world.context.clone();
    tokio::spawn(receive::run(context, schedule::receive(), stop, move |delivery| {
        ticks.lock().unwrap().push((me, delivery.sequence));
        async { Settle::Done }
    }));
}

#[tokio::test]
async fn each_tick_of_the_schedule_reaches_one_of_two_receivers() -> Result<()> {
    let world = World::without_postgres().await?;
    let (ticks, stop) = (Arc::new(Mutex::new(Vec::new())), CancellationToken::new());
    for me in [1, 2] {
        receiver(&world, ticks.clone(), me, stop.clone());
    }
    let every_second = Schedule::At("* * * * * *".to_owned());
    // Both replicas set it up, and the second one finds it there.
    schedule::set_up(&world.context, &every_second).await?;
    let stored = |world: &World| {
        let context = world.context.clone();
        async move {
            let stream = context.get_stream("JOBS").await?;
            let found = stream.get_last_raw_message_by_subject(schedule::SCHEDULE_SUBJECT).await;
            anyhow::Ok(found.ok().map(|message| message.sequence))
        }
    };
    let first = stored(&world).await?;
    schedule::set_up(&world.context, &every_second).await?;
    assert_eq!(stored(&world).await?, first, "it is left alone");
    eventually("four ticks", PATIENCE, async || Ok((ticks.lock().unwrap().len() >= 4).then_some(()))).await?;
    let mut sequences: Vec<u64> = ticks.lock().unwrap().iter().map(|(_, sequence)| *sequence).collect();
    let all = sequences.len();
    sequences.sort_unstable();
    sequences.dedup();
    assert_eq!(sequences.len(), all, "each once: {ticks:?}");

    // Another expression takes its place; `off` takes it away.
    schedule::set_up(&world.context, &Schedule::At(schedule::DEFAULT_SCHEDULE.to_owned())).await?;
    assert!(stored(&world).await? > first);
    schedule::set_up(&world.context, &Schedule::Off).await?;
    assert_eq!(stored(&world).await?, None);
    schedule::set_up(&world.context, &Schedule::Off).await?;
    let refused = schedule::set_up(&world.context, &Schedule::At("61 * * * * *".to_owned())).await.unwrap_err();
    assert!(refused.to_string().contains("RECONCILIATION_SCHEDULE"), "{refused}");
    stop.cancel();
    world.close();
    Ok(())
}

#[tokio::test]
async fn ticks_that_nobody_heard_are_made_up_for_by_one_run_and_what_is_no_job_is_a_dead_letter() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    for payload in ["{}", "{}", "reconcile!", "{}"] {
        world.context.publish(schedule::SUBJECT, payload.into()).await?.await?;
    }
    let unknown = json!({ "runId": Uuid::new_v4() }).to_string();
    world.context.publish(schedule::SUBJECT, unknown.into()).await?.await?;
    let service = world.run_service_as(config(&world, &warehouse)).await?;
    eventually("an empty queue", PATIENCE, async || {
        let info = world.context.get_stream("JOBS").await?.get_info().await?;
        Ok((info.state.messages == 0).then_some(()))
    })
    .await?;
    let reports = desk(&world)?.list(None, 100).await?;
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert_eq!((reports[0].status, warehouse.asked.load(Ordering::SeqCst)), (Status::Completed, 1));
    let letters = world.context.get_stream("DEAD_LETTERS").await?.get_info().await?.state.messages;
    assert_eq!(letters, 2, "the one that is no job, and the one of a run that nobody asked for");
    service.stop().await?;
    world.close();
    Ok(())
}

/// A consumer with a short `ack_wait` in the place of the one of runs.
async fn impatient_consumer(world: &World) -> Result<()> {
    let stream = world.context.get_stream("JOBS").await?;
    stream.delete_consumer("reconciliation").await?;
    let config = async_nats::jetstream::consumer::pull::Config {
        durable_name: Some("reconciliation".to_owned()),
        filter_subject: schedule::SUBJECT.to_owned(),
        ack_wait: Duration::from_secs(1),
        ..Default::default()
    };
    stream.create_consumer(config).await?;
    Ok(())
}

#[tokio::test]
async fn a_run_that_takes_long_stays_with_its_replica() -> Result<()> {
    let world = World::without_postgres().await?;
    impatient_consumer(&world).await?;
    let mut deliveries = Vec::new();
    for in_progress_every in [Some(Duration::from_millis(250)), None] {
        let (stop, seen) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let receive = receive::Receive { in_progress_every, ..schedule::receive() };
        let (noting, until) = (seen.clone(), stop.clone());
        // Two replicas; the handler takes three times the consumer's patience, the first time.
        let tasks: Vec<_> = (0..2)
            .map(|_| {
                let (context, receive, until, seen) =
                    (world.context.clone(), receive.clone(), until.clone(), noting.clone());
                tokio::spawn(receive::run(context, receive, until, move |delivery| {
                    seen.fetch_max(delivery.deliveries, Ordering::SeqCst);
                    async move {
                        if delivery.deliveries == 1 {
                            tokio::time::sleep(Duration::from_secs(3)).await;
                        }
                        Settle::Done
                    }
                }))
            })
            .collect();
        world.context.publish(schedule::SUBJECT, "{}".into()).await?.await?;
        eventually("an empty queue", PATIENCE, async || {
            let info = world.context.get_stream("JOBS").await?.get_info().await?;
            Ok((info.state.messages == 0).then_some(()))
        })
        .await?;
        stop.cancel();
        for task in tasks {
            task.await?;
        }
        deliveries.push(seen.load(Ordering::SeqCst));
    }
    assert_eq!(deliveries, [1, 2], "once when it says that it is at work, and again when it does not");
    world.close();
    Ok(())
}

#[tokio::test]
async fn the_oldest_reports_go_and_a_dropped_schema_is_made_again() -> Result<()> {
    let world = World::start().await?;
    let url = world.database_url();
    let reports = Reports::new(postgres::pool(&url)?, url);
    let new = |minute: i64| NewRun {
        id: Uuid::new_v4(),
        started_by: StartedBy::Request,
        requested_by: UpdatedBy::System,
        request: Request::default(),
        requested_at: Timestamp::new(time::OffsetDateTime::UNIX_EPOCH + time::Duration::minutes(minute)),
    };
    let oldest = new(0);
    reports.insert(&oldest).await?;
    let unfinished = new(1);
    reports.insert(&unfinished).await?;
    reports.settle(oldest.id, Status::Failed, Some("no warehouse")).await?;
    for minute in 2..=KEPT_REPORTS {
        reports.insert(&new(minute)).await?;
    }
    let last = new(KEPT_REPORTS + 1);
    reports.insert(&last).await?;
    assert_eq!(reports.get(oldest.id).await?.unwrap().problem.as_deref(), Some("no warehouse"));
    reports.settle(last.id, Status::Completed, None).await?;
    assert_eq!(reports.get(oldest.id).await?, None, "it is one too many");
    assert!(reports.get(unfinished.id).await?.is_some(), "it is needed yet");

    world.database().await?.batch_execute("DROP SCHEMA reconciliation CASCADE").await?;
    assert!(reports.get(last.id).await.is_err());
    assert_eq!(reports.get(last.id).await?, None, "the schema is there again");
    world.close();
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_replicas_carry_a_tick_out_once() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let scheduled = Config { reconciliation_schedule: "*/2 * * * * *".parse()?, ..config(&world, &warehouse) };
    let one = world.run_service_as(scheduled.clone()).await?;
    let products = world.register_many(20, 10).await?;
    let then = between_two_events().await;
    // Below the threshold: nobody is asked.
    warehouse.tells(products[..4].iter().map(|product| counted(*product, 7, then)));
    let two = world.run_service_as(scheduled).await?;
    let desk = desk(&world)?;
    let reports = eventually("three runs", PATIENCE, async || {
        let reports = desk.list(None, 100).await?;
        let completed = reports.iter().filter(|report| report.status == Status::Completed).count();
        if let Some(failed) = reports.iter().find(|report| report.status == Status::Failed) {
            bail!("{failed:?}");
        }
        Ok((completed >= 3).then_some(reports))
    })
    .await?;
    let mut ticks: Vec<_> = reports.iter().map(|report| report.requested_at).collect();
    let all = ticks.len();
    ticks.dedup();
    assert_eq!(ticks.len(), all, "a run a tick: {reports:?}");
    assert!(reports.iter().all(|report| report.attempts <= 1), "{reports:?}");
    assert!(warehouse.asked.load(Ordering::SeqCst) >= 3);
    let corrections = corrections(&world).await?;
    assert_eq!((corrections.len(), corrections.values().max()), (4, Some(&1)));

    // Stopped before the check: the schedule would write reports on.
    two.stop().await?;
    world.verified().await?;
    one.stop().await?;
    world.close();
    Ok(())
}

/// A caller of the HTTP interface.
struct Http {
    client: reqwest::Client,
    url: String,
    token: String,
}

impl Http {
    fn new(url: &str, role: Role) -> Result<Self> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE).build()?;
        Ok(Self { client, url: url.to_owned(), token: token(role, Uuid::new_v4())? })
    }

    async fn get(&self, path: &str) -> Result<(u16, Value)> {
        let sent = self.client.get(format!("{}{path}", self.url)).bearer_auth(&self.token).send().await?;
        Ok((sent.status().as_u16(), sent.json().await?))
    }

    async fn post(&self, path: &str, body: Value, key: &str) -> Result<reqwest::Response> {
        let request = self.client.post(format!("{}{path}", self.url)).bearer_auth(&self.token).json(&body);
        Ok(request.header("idempotency-key", key).send().await?)
    }

    /// What a request that must not succeed is answered: status and type.
    async fn refused(&self, path: &str, body: Value, key: &str) -> Result<(u16, String)> {
        let answer = self.post(path, body, key).await?;
        let (status, problem) = (answer.status().as_u16(), answer.json::<Value>().await?);
        let kind = problem["type"].as_str().unwrap_or_default();
        Ok((status, kind.rsplit('/').next().unwrap_or_default().to_owned()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runs_are_started_shown_and_decided_over_http() -> Result<()> {
    const RUNS: &str = "/v1/reconciliations";
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.service("http")?.env("WAREHOUSE_URL", &warehouse.url).env("RECONCILIATION_SCHEDULE", "off");
    let mut service = service;
    lomash_tests::start_until_ready(&mut service).await?;
    let url = world.url("http");
    let (admin, viewer) = (Http::new(&url, Role::Admin)?, Http::new(&url, Role::Viewer)?);
    let products = world.register_many(3, 10).await?;
    let then = between_two_events().await;
    warehouse.tells(products.iter().map(|product| counted(*product, 7, then)));

    assert_eq!(viewer.refused(RUNS, json!({}), "a").await?, (403, "forbidden".to_owned()));
    assert_eq!(admin.refused(RUNS, json!({ "approvalThresholdPercent": 101 }), "a").await?.0, 400);
    assert_eq!(admin.refused(RUNS, json!({ "dryrun": true }), "a").await?.0, 400);
    let started = admin.post(RUNS, json!({}), "a").await?;
    assert_eq!(started.status(), 202);
    let location = started.headers()["location"].to_str()?.to_owned();
    let id: Uuid = started.json::<Value>().await?["id"].as_str().unwrap().parse()?;
    assert_eq!(location, format!("{RUNS}/{id}"));
    let waiting = settled(&desk(&world)?, id).await?;
    assert_eq!(waiting.status, Status::AwaitingApproval);

    // The same key: the same run, and only for the same request.
    let again = admin.post(RUNS, json!({}), "a").await?;
    assert_eq!(again.headers()["idempotent-replayed"], "true");
    assert_eq!(again.json::<Value>().await?["id"], json!(id));
    let other = admin.refused(RUNS, json!({ "dryRun": true }), "a").await?;
    assert_eq!(other, (422, "idempotency-key-reused".to_owned()));

    // Page by page.
    let (mut rows, mut cursor) = (Vec::new(), String::new());
    loop {
        let (status, page) = viewer.get(&format!("{location}?limit=2{cursor}")).await?;
        assert_eq!(status, 200, "{page}");
        rows.extend(page["rows"].as_array().unwrap().iter().map(|row| row["number"].as_u64().unwrap()));
        match page["nextCursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => break,
        }
    }
    assert_eq!(rows, [1, 2, 3]);
    assert_eq!(viewer.get(&format!("{RUNS}?limit=2{cursor}")).await?.0, 400, "a cursor of another list");
    assert_eq!(viewer.get(&format!("{RUNS}?limit=0")).await?.0, 400);
    assert_eq!(viewer.get(&format!("{RUNS}/{}", Uuid::new_v4())).await?.0, 404);
    assert_eq!(viewer.get(&format!("{RUNS}/seven")).await?.0, 400);

    let approval = format!("{location}/approval");
    assert_eq!(viewer.refused(&approval, json!({ "approved": true }), "b").await?.0, 403);
    let nowhere = format!("{RUNS}/{}/approval", Uuid::new_v4());
    let unknown = admin.refused(&nowhere, json!({ "approved": true }), "b").await?;
    assert_eq!(unknown, (404, "reconciliation-not-found".to_owned()));
    assert_eq!(admin.post(&approval, json!({ "approved": true }), "b").await?.status(), 202);
    assert_eq!(settled(&desk(&world)?, id).await?.status, Status::Completed);
    let late = admin.refused(&approval, json!({ "approved": false }), "c").await?;
    assert_eq!(late, (409, "reconciliation-not-waiting".to_owned()));
    let (_, list) = viewer.get(RUNS).await?;
    assert_eq!((list["items"].as_array().unwrap().len(), &list["nextCursor"]), (1, &Value::Null));
    assert_eq!(list["items"][0]["totals"]["unitsDown"], 9);
    for product in &products {
        assert_eq!(world.stock(*product).await?, 7);
    }

    world.verified().await?;
    let log = std::fs::read_to_string(service.log())?;
    let finished = |line: &&str| line.contains("status=\"completed\"") && line.contains(&id.to_string());
    let told: Vec<&str> = log.lines().filter(finished).collect();
    assert!(matches!(told[..], [one] if one.contains("units_down=9")), "one record of the finished run: {log}");
    service.stop().await?;
    world.close();
    Ok(())
}

/// What `lomash reconcile` prints, and whether it succeeded.
async fn reconcile(url: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let program = lomash::up::program("lomash-under-test")?;
    let output = tokio::process::Command::new(program)
        .arg("reconcile")
        .args(arguments)
        .env("PRODUCT_URL", url)
        .env("ADMIN_TOKEN", token(Role::Admin, Uuid::new_v4())?)
        .output()
        .await?;
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok((output.status.success(), text))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_starts_a_run_and_shows_its_report() -> Result<()> {
    let (world, warehouse) = tokio::try_join!(World::start(), Warehouse::start())?;
    let service = world.service("cli")?.env("WAREHOUSE_URL", &warehouse.url).env("RECONCILIATION_SCHEDULE", "off");
    let mut service = service;
    lomash_tests::start_until_ready(&mut service).await?;
    let url = world.url("cli");
    let oak = world.register("OAK", 50).await?;
    let then = between_two_events().await;
    warehouse.tells([counted(oak, 45, then), counted(ProductId(Uuid::new_v4()), 1, then)]);

    let (is_well, text) = reconcile(&url, &["--dry-run"]).await?;
    assert!(is_well && text.contains("OAK") && text.contains("no such product"), "{text}");
    assert!(text.contains("dryRun: 1 counted, 1 changed, 0 unchanged, 1 refused; 0 units up, 5 down"), "{text}");
    assert_eq!(world.stock(oak).await?, 50);

    let (is_well, text) = reconcile(&url, &["--json", "--threshold", "0"]).await?;
    assert!(!is_well, "it waits: {text}");
    let report: Value = serde_json::Deserializer::from_str(&text).into_iter().next().context("no JSON")??;
    let id = report["id"].as_str().unwrap();
    assert_eq!((&report["status"], report["rows"].as_array().unwrap().len()), (&json!("awaitingApproval"), 2));
    let (is_well, text) = reconcile(&url, &["--approve", id]).await?;
    assert!(is_well && text.contains("completed"), "{text}");
    assert_eq!(world.stock(oak).await?, 45);
    let (is_well, text) = reconcile(&url, &["--reject", id]).await?;
    assert!(!is_well && text.contains("409"), "{text}");

    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}
