//! Traces as a collector gets them, and metrics as Prometheus scrapes them, of programs that run as they do in production.
//!
//! Owns what must be seen from outside: that the way of an order is one trace by parents and links, that figures agree with
//! what `lomash verify` counts, and that a collector that is down or hangs is nobody's problem.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use lomash::stack::{Mail, Redis, Service};
use lomash_contract::{ContentType, Envelope, OrderCreated, ProductId, codec};
use lomash_ledger::{StoredMessage, header};
use lomash_tests::http::Caller;
use lomash_tests::traces::{Collector, Span, Trace};
use lomash_tests::{PATIENCE, World, count, eventually, order, ready_at, start_until_ready};
use lomash_web::Role;
use product_service::inventory::{Action, Amendment};
use tokio::net::TcpListener;
use tokio::time::Instant;
use uuid::Uuid;

/// The operator's program as this package builds it.
const LOMASH: &str = "lomash-under-test";

const CREATED: &str = "lomash.orders.created";

// As OTLP numbers them.
const SERVER: i32 = 2;
const PRODUCER: i32 = 4;
const CONSUMER: i32 = 5;

/// What a hanging collector may add to the end of a service.
const STOP_ALLOWANCE: Duration = Duration::from_secs(2);

/// On top of it, what a busy machine may add to anything.
const NOISE: Duration = Duration::from_millis(1_500);

/// A product service that exports its traces there.
fn traced(world: &World, name: &str, collector: &str) -> Result<Service> {
    Ok(exporting(world.service(name)?, collector))
}

/// The service, told to export its traces there.
fn exporting(service: Service, collector: &str) -> Service {
    service.env("OTEL_EXPORTER_OTLP_ENDPOINT", collector).env("OTEL_BSP_SCHEDULE_DELAY", "50")
}

/// Publishes orders as the order service does, in a process of its own that exports its traces there.
async fn publish_traced(world: &World, collector: &str, orders: &[Envelope<OrderCreated>]) -> Result<()> {
    let file = world.dir().join(format!("{}.ndjson", Uuid::new_v4()));
    let mut lines = Vec::new();
    for order in orders {
        lines.extend(codec::encode(ContentType::Json, order));
        lines.push(b'\n');
    }
    std::fs::write(&file, lines)?;
    let output = tokio::process::Command::new(lomash::up::program(LOMASH)?)
        .args(["orders", "replay"])
        .arg(&file)
        .env("NATS_URL", world.nats.url())
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        .output()
        .await?;
    ensure!(output.status.success(), "not published: {output:?}");
    Ok(())
}

/// The way of an order through the product service, once all of it has been exported.
struct OrderTrace {
    publish: Span,
    process: Span,
    decide: Span,
    commit: Span,
    /// The projector's, in the order's trace.
    projected: Span,
    project: Span,
    transaction: Span,
    invalidate: Span,
}

impl OrderTrace {
    /// What is there of it: by parents from the publisher to the projection, and by links to what was done for many at once.
    /// What other services make of the event are further children of `decide`, see [`Trace::chain`].
    fn of(trace: &Trace, order: &Envelope<OrderCreated>) -> Option<Self> {
        let id = order.payload.order_id.to_string();
        let product = "product-service";
        let publish = trace.with("lomash", &format!("send {CREATED}"), ("order.id", &id))?.clone();
        let process = trace.child(&publish, product, &format!("process {CREATED}"))?.clone();
        let decide = trace.child(&process, product, "decide")?.clone();
        let commit = trace.named(product, "send INVENTORY").find(|commit| commit.links_to(&decide))?.clone();
        let projected = trace.named(product, "process lomash.inventory.updated");
        let refused = trace.named(product, "process lomash.inventory.update-failed");
        let projected = projected.chain(refused).find(|span| span.parent_id == decide.span_id)?.clone();
        let project = trace.named(product, "project").find(|project| projected.links_to(project))?.clone();
        let transaction = trace.child(&project, product, "COMMIT inventory")?.clone();
        let invalidate = trace.child(&project, product, "invalidate")?.clone();
        Some(Self { publish, process, decide, commit, projected, project, transaction, invalidate })
    }
}

#[tokio::test]
async fn the_way_of_an_order_is_one_trace() -> Result<()> {
    let world = World::start().await?;
    let collector = Collector::start().await?;
    let redis = Redis::start(&world.dir().join("redis")).await?;
    let mut service = traced(&world, "product", collector.url())?.env("REDIS_URL", redis.url());
    start_until_ready(&mut service).await?;
    let product = world.register("KIT-1", 2).await?;
    // The projector must have found Redis, or there is nothing to invalidate.
    eventually("the cache to be in use", PATIENCE, async || {
        let metrics = scrape(&world, "product").await?;
        Ok((metrics.value("lomash_cache_clears_total", &[]) >= Some(1.0)).then_some(()))
    })
    .await?;

    let [sold, refused] = [order(&[(product, 1)]), order(&[(product, 5)])];
    publish_traced(&world, collector.url(), &[sold.clone(), refused.clone()]).await?;
    world.decided([sold.payload.order_id, refused.payload.order_id]).await?;

    for order in [&sold, &refused] {
        let order_id = order.payload.order_id.to_string();
        let way = collector.until("the order's whole trace", PATIENCE, |trace| OrderTrace::of(trace, order)).await?;
        // One trace from the publisher to the projection, and nobody before the publisher.
        assert_eq!(way.publish.parent_id, "", "{:?}", way.publish);
        for span in [&way.process, &way.decide, &way.projected] {
            assert_eq!(span.trace_id, way.publish.trace_id, "{span:?}");
            assert_eq!(span.attribute("order.id"), Some(order_id.as_str()), "{span:?}");
        }
        assert_eq!((way.publish.kind, way.process.kind, way.projected.kind), (PRODUCER, CONSUMER, CONSUMER));
        // What is done for many has traces of its own, and both sides say so.
        for batch in [&way.commit, &way.project] {
            assert_eq!(batch.parent_id, "", "{batch:?}");
            assert_ne!(batch.trace_id, way.publish.trace_id, "{batch:?}");
            assert!(batch.links_to(&way.decide), "{batch:?}");
        }
        assert!(way.decide.links_to(&way.commit), "{:?}", way.decide);
        assert_eq!(way.transaction.attribute("db.system.name"), Some("postgresql"));
        assert_eq!(way.invalidate.attribute("db.system.name"), Some("redis"));
        // By the messaging conventions.
        let event_id = order.event_id.to_string();
        for (name, value) in [
            ("messaging.system", "nats"),
            ("messaging.operation.type", "process"),
            ("messaging.destination.name", CREATED),
            ("messaging.consumer.group.name", "product-orders"),
            ("messaging.message.id", event_id.as_str()),
            ("event.id", event_id.as_str()),
        ] {
            assert_eq!(way.process.attribute(name), Some(value), "{name} of {:?}", way.process);
        }
        // What is stored names its decision as its cause: by that, other services continue the trace.
        let stored = world.messages().await?;
        let about: Vec<_> = stored
            .iter()
            .filter(|message| lomash_tests::fate(message).is_some_and(|(id, _)| id == order.payload.order_id))
            .collect();
        assert!(!about.is_empty());
        for message in about {
            assert_eq!(message.carried.traceparent(), Some(way.decide.traceparent().as_str()));
        }
    }
    let trace = collector.trace();
    let projected =
        trace.with("product-service", "process lomash.inventory.updated", ("product.id", &product.to_string()));
    assert!(projected.is_some(), "the product's changes are told by its id");

    // A trace that nobody wants to see is not exported, and still handed on.
    let unwanted = order(&[(product, 1)]);
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    let (mut headers, body) = lomash_tests::encoded(ContentType::Json, &unwanted);
    headers.insert(header::TRACEPARENT, traceparent);
    world.publish_raw(headers, body).await?;
    let last = order(&[(product, 1)]);
    publish_traced(&world, collector.url(), std::slice::from_ref(&last)).await?;
    world.decided([unwanted.payload.order_id, last.payload.order_id]).await?;
    collector.until("the last order's trace", PATIENCE, |trace| OrderTrace::of(trace, &last)).await?;
    let spans = collector.trace();
    assert!(!spans.0.iter().any(|span| span.trace_id == "4bf92f3577b34da6a3ce929d0e0e4736"), "{spans:?}");
    let handed_on = world.messages().await?.into_iter().filter(|message| {
        lomash_tests::fate(message).is_some_and(|(id, _)| id == unwanted.payload.order_id)
            && message.carried.traceparent() == Some(traceparent)
    });
    assert_eq!(handed_on.count(), 1);

    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn the_trace_of_an_order_goes_on_to_the_metrics_and_to_the_mail() -> Result<()> {
    let world = World::start().await?;
    let collector = Collector::start().await?;
    let (redis_dir, mail_dir) = (world.dir().join("redis"), world.dir().join("mail"));
    let (redis, mail) = tokio::try_join!(Redis::start(&redis_dir), Mail::start(&mail_dir))?;
    let mut services = [
        exporting(world.service("product")?, collector.url()).env("REDIS_URL", redis.url()),
        exporting(world.service_of("analytics-service-under-test", "analytics")?, collector.url()),
        exporting(world.service_of("notification-service-under-test", "notification")?, collector.url())
            .env("SMTP_URL", mail.url()),
    ];
    for service in &mut services {
        start_until_ready(service).await?;
    }
    let product = world.register("KIT-1", 5).await?;
    let order = order(&[(product, 3)]);
    publish_traced(&world, collector.url(), std::slice::from_ref(&order)).await?;

    let order_id = order.payload.order_id.to_string();
    let (way, downstream) = collector
        .until("the order's trace through all services", PATIENCE, |trace| {
            let way = OrderTrace::of(trace, &order)?;
            let updated = "process lomash.inventory.updated";
            let counted = trace.chain(&way.decide, &[("analytics-service", updated)])?;
            let mut metrics = trace.named("analytics-service", "COMMIT analytics");
            metrics.find(|transaction| transaction.links_to(&way.decide))?;
            let notification = "notification-service";
            let told = [(notification, updated), (notification, "publish lomash.notifications.low-stock")];
            let mailed = [(notification, updated), (notification, "send mail")];
            let downstream = [counted, trace.chain(&way.decide, &told)?, trace.chain(&way.decide, &mailed)?];
            Some((way, downstream))
        })
        .await?;
    for span in &downstream {
        assert_eq!(span.trace_id, way.publish.trace_id, "{span:?}");
    }
    assert_eq!(downstream[2].attribute("order.id"), Some(order_id.as_str()), "{:?}", downstream[2]);

    for service in &mut services {
        service.stop().await?;
    }
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_request_continues_its_callers_trace_up_to_the_commit() -> Result<()> {
    let world = World::start().await?;
    let collector = Collector::start().await?;
    let mut service = traced(&world, "product", collector.url())?
        .env("LOG_FORMAT", "json")
        .env("OTEL_SERVICE_NAME", "inventory")
        .env("RUST_LOG", "warn,product_service=info,lomash_ledger=info");
    // JSON has no line that ends with the word that the others wait for.
    service.start()?;
    ready_at(&world.url("product")).await?;
    let caller = Caller::new(&world.url("product"), Role::Admin)?;
    let product = caller.register(7).await?;

    let (trace_id, span_id) = (Uuid::new_v4().simple().to_string(), "00f067aa0ba902b7");
    let path = format!("/v1/products/{product}/inventory");
    let body = serde_json::json!({ "quantity": 3 });
    let traceparent = format!("00-{trace_id}-{span_id}-01");
    let answer = caller.patch(&path, &body).header("traceparent", &traceparent).send().await?;
    assert_eq!(answer.status, 200, "{answer:?}");

    let name = "PATCH /v1/products/{productId}/inventory";
    let (request, commit) = collector
        .until("the request's trace", PATIENCE, |trace| {
            let request = trace.0.iter().find(|span| span.trace_id == trace_id && span.kind == SERVER)?;
            let decide = trace.child(request, "inventory", "decide")?;
            let commit = trace.named("inventory", "send INVENTORY").find(|commit| commit.links_to(decide))?;
            Some((request.clone(), commit.clone()))
        })
        .await?;
    assert_eq!((request.name.as_str(), request.parent_id.as_str()), (name, span_id), "{request:?}");
    assert_eq!(request.attribute("http.response.status_code"), Some("200"));
    assert_eq!(request.attribute("http.route"), Some("/v1/products/{productId}/inventory"));
    assert_eq!(request.attribute("product.id"), Some(product.to_string().as_str()));
    assert!(!commit.failed);

    // A line of the log says in which trace it was written.
    let poison_trace = Uuid::new_v4().simple().to_string();
    let mut headers = HeaderMap::new();
    headers.insert(header::TRACEPARENT, format!("00-{poison_trace}-{span_id}-01"));
    world.publish_raw(headers, "no order").await?;
    let line = eventually("the dead letter to be logged", PATIENCE, async || {
        let log = std::fs::read_to_string(service.log())?;
        Ok(log.lines().find(|line| line.contains("dead letter")).map(str::to_owned))
    })
    .await?;
    let line: serde_json::Value = serde_json::from_str(&line).with_context(|| line.clone())?;
    assert_eq!(line["trace_id"], poison_trace, "{line}");
    let poisoned = collector
        .until("the poison message's span", PATIENCE, |trace| {
            trace.0.iter().find(|span| span.trace_id == poison_trace).cloned()
        })
        .await?;
    assert_eq!(line["span_id"], poisoned.span_id, "{line}");
    assert!(poisoned.failed, "{poisoned:?}");

    service.stop().await?;
    world.close();
    Ok(())
}

/// What a service does that exports to `collector`: decides orders, and ends; how long that took.
async fn decides_and_ends(world: &World, name: &str, collector: Option<&str>) -> Result<Duration> {
    let mut service = match collector {
        Some(collector) => traced(world, name, collector)?,
        None => world.service(name)?,
    };
    start_until_ready(&mut service).await?;
    let product = world.register(&format!("KIT-{name}"), 10_000).await?;
    // Many times as many spans as may wait for the collector.
    let orders: Vec<_> = (0..3_000).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&orders).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    let metrics = scrape(world, name).await?;
    let spans = |outcome| metrics.value("lomash_trace_spans_total", &[("outcome", outcome)]).unwrap_or(0.0);
    if collector.is_some() {
        assert!(spans("skipped") > 0.0, "what has no room is not begun:\n{}", metrics.text);
        assert_eq!(spans("exported"), 0.0, "{}", metrics.text);
    } else {
        assert!(!metrics.text.contains("lomash_trace_spans"), "{}", metrics.text);
    }
    let since = Instant::now();
    service.stop().await?;
    Ok(since.elapsed())
}

#[tokio::test]
async fn a_collector_that_is_down_or_hangs_is_nobodys_problem() -> Result<()> {
    let world = World::without_postgres().await?;
    let without = decides_and_ends(&world, "untraced", None).await?;
    // Nobody listens on the port of discard.
    let down = decides_and_ends(&world, "down", Some("http://127.0.0.1:9")).await?;
    // Takes connections, and never says a word.
    let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let url = format!("http://{}", silent.local_addr()?);
    let taking = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((connection, _)) = silent.accept().await {
            taken.push(connection);
        }
    });
    let hanging = decides_and_ends(&world, "hanging", Some(&url)).await?;
    taking.abort();
    println!("stopped without export in {without:?}, with a collector down in {down:?}, hanging in {hanging:?}");
    for (what, took) in [("down", down), ("hanging", hanging)] {
        assert!(took <= without + STOP_ALLOWANCE + NOISE, "{what}: {took:?}, without export {without:?}");
    }
    world.verified().await?;
    world.close();
    Ok(())
}

/// A page of metrics.
struct Page {
    text: String,
    values: BTreeMap<String, f64>,
}

impl Page {
    /// The value of the one series of that name with exactly these labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let labels: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let series = if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) };
        self.values.get(&series).copied()
    }
}

/// Asks the service `name` for its metrics, without a token.
async fn scrape(world: &World, name: &str) -> Result<Page> {
    let caller = Caller::new(&world.health_url(name), Role::Viewer)?;
    let answer = caller.with_token(None).get("/metrics").send().await?;
    ensure!(answer.status == 200, "{answer:?}");
    ensure!(answer.header("content-type") == Some("text/plain; version=0.0.4; charset=utf-8"), "{answer:?}");
    let samples = answer.text.lines().filter(|line| !line.starts_with('#'));
    let values = samples.filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        Some((series.to_owned(), value.parse().ok()?))
    });
    Ok(Page { values: values.collect(), text: answer.text })
}

/// What is wrong with a page in the eyes of promtool, where that is installed; nothing where it is not.
async fn promtool(page: &str) -> Result<Vec<String>> {
    let mut command = tokio::process::Command::new("promtool");
    command.args(["check", "metrics"]).stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let Ok(mut checking) = command.stdout(std::process::Stdio::piped()).spawn() else {
        println!("promtool is not installed; `./just alerts` installs it");
        return Ok(Vec::new());
    };
    let mut stdin = checking.stdin.take().context("it reads")?;
    tokio::io::AsyncWriteExt::write_all(&mut stdin, page.as_bytes()).await?;
    drop(stdin);
    let output = checking.wait_with_output().await?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).lines().map(str::to_owned).collect())
}

#[tokio::test]
async fn metrics_agree_with_what_verify_counts() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.start_service("product").await?;
    // There from the start, at zero: the first refusal is an increase.
    let page = scrape(&world, "product").await?;
    for reason in ["INSUFFICIENT_STOCK", "UNKNOWN_PRODUCT", "PRODUCT_INACTIVE"] {
        assert_eq!(page.value("inventory_update_failures_total", &[("reason", reason)]), Some(0.0), "{}", page.text);
    }

    // 2 of 5 products run out, one is taken off sale; orders are refused for each reason; two messages are no orders.
    let mut products = world.register_many(3, 2).await?;
    let [inactive, empty] = [world.register("OFF-1", 5).await?, world.register("NIL-1", 0).await?];
    let mut details = lomash_tests::details("OFF-1")?;
    details.active = false;
    world.act(inactive, Action::Revise { details }).await?;
    // What is not for sale is not missed when it is gone.
    let idle = world.register("OFF-2", 0).await?;
    world.act(idle, Action::Amend(Amendment::activate(false))).await?;
    products.push(empty);
    let unknown = ProductId(Uuid::new_v4());
    let mut orders = vec![order(&[(products[0], 2)]), order(&[(products[1], 1)])];
    orders.extend((0..4).map(|_| order(&[(products[0], 1)])));
    orders.extend((0..3).map(|_| order(&[(unknown, 1), (products[1], 1)])));
    orders.extend((0..2).map(|_| order(&[(inactive, 1)])));
    world.publish_all(&orders).await?;
    for poison in ["no order", "{}"] {
        world.publish_raw(HeaderMap::new(), poison).await?;
    }
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    // The same orders again are no new refusals.
    for order in &orders {
        let (_, body) = lomash_tests::encoded(ContentType::Json, order);
        world.publish_raw(HeaderMap::new(), body).await?;
    }
    let report = world.verified().await?;
    let database = world.database().await?;
    let of_those_for_sale = "SELECT count(*) FROM inventory.stock JOIN inventory.products USING (product_id)
         WHERE NOT is_available AND active";
    let out_of_stock = count(&database, of_those_for_sale).await? as f64;
    assert_eq!(out_of_stock, 2.0);
    assert_eq!(count(&database, "SELECT count(*) FROM inventory.stock WHERE NOT is_available").await?, 3);
    let totals = &report.totals;
    assert_eq!((totals.orders_refused(), totals.dead_letters), (9, 2), "{totals:?}");

    let told = eventually("the gauges to be read", PATIENCE, async || {
        let page = scrape(&world, "product").await?;
        let told = page.value("dlq_message_count", &[]) == Some(2.0)
            && page.value("out_of_stock_products_total", &[]) == Some(out_of_stock)
            && page.value("lomash_projection_lag_messages", &[]) == Some(0.0);
        ensure!(told, "{}", page.text);
        Ok(Some(page))
    });
    let page = told.await?;
    for (reason, refused) in [
        ("INSUFFICIENT_STOCK", totals.refused_insufficient_stock),
        ("UNKNOWN_PRODUCT", totals.refused_unknown_product),
        ("PRODUCT_INACTIVE", totals.refused_product_inactive),
    ] {
        let told = page.value("inventory_update_failures_total", &[("reason", reason)]);
        assert_eq!(told, Some(refused as f64), "{reason}\n{}", page.text);
    }
    assert_eq!(page.value("inventory_update_lag_ms_count", &[]), Some(totals.movements as f64), "{}", page.text);
    assert_eq!(page.value("lomash_projected_messages_total", &[]), Some(totals.messages as f64));
    assert_eq!(page.value("lomash_projection_checkpoint_sequence", &[]), Some(totals.messages as f64));
    assert_eq!(page.value("lomash_ledger_sequence", &[]), Some(totals.messages as f64));
    // The products came by the test's own writer; the batches of the service are those of whoever wrote last.
    let stored = world.messages().await?;
    let writer =
        |message: &StoredMessage| message.batch.as_ref()?.id.rsplit_once('-').map(|(writer, _)| writer.to_owned());
    let service_s = stored.last().and_then(writer).context("who wrote the last message")?;
    let by_service: Vec<_> = stored.iter().filter(|message| writer(message).as_ref() == Some(&service_s)).collect();
    let batches = by_service.iter().filter(|message| message.ends_batch()).count();
    assert!(batches > 0 && by_service.len() < stored.len(), "{batches} batches of {} messages", by_service.len());
    assert_eq!(page.value("lomash_commits_total", &[("outcome", "stored")]), Some(batches as f64));
    assert_eq!(page.value("lomash_commit_batch_messages_sum", &[]), Some(by_service.len() as f64));
    let settled = |outcome| {
        let labels = [("stream", "ORDERS"), ("consumer", "product-orders"), ("outcome", outcome)];
        page.value("lomash_messages_settled_total", &labels)
    };
    assert_eq!(settled("done"), Some(2.0 * orders.len() as f64), "{}", page.text);
    assert_eq!(settled("dead"), Some(2.0), "{}", page.text);
    for (name, labels) in [
        ("lomash_consumer_pending_messages", &[("stream", "ORDERS"), ("consumer", "product-orders")][..]),
        ("lomash_postgres_pool_max_connections", &[("pool", "reads")]),
        ("lomash_build_info", &[("service", "product-service"), ("version", env!("CARGO_PKG_VERSION"))]),
    ] {
        assert!(page.value(name, labels).is_some(), "{name}\n{}", page.text);
    }

    // What alerts and dashboard ask for is there; spans are counted only where they are exported, and what is told and mailed is
    // the notification service's, see `notification.rs`.
    let elsewhere =
        ["lomash_trace_spans_total", "lomash_alerts_waiting", "lomash_alerts_published_total", "lomash_mails_total"];
    let sources = [
        include_str!("../../deploy/prometheus/alerts.yml"),
        include_str!("../../deploy/grafana/lomash-inventory.json"),
    ];
    let named = sources.iter().flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'));
    let prefixes = ["lomash_", "inventory_update_", "out_of_stock_", "dlq_message_"];
    let mut asked = 0;
    for name in named.filter(|word| prefixes.iter().any(|prefix| word.starts_with(prefix))) {
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end));
        let is_there = |name: &str| page.text.contains(&format!("# TYPE {name} "));
        let known = is_there(name) || family.is_some_and(is_there);
        assert!(known || elsewhere.contains(&name), "{name} is not among\n{}", page.text);
        asked += 1;
    }
    assert!(asked > 40, "{asked} names are no dashboard");

    // promtool reads it, and minds nothing but the names that the contract fixes: milliseconds instead of seconds, and
    // gauges that end like counters.
    let minded = promtool(&page.text).await?;
    let fixed = ["inventory_update_lag_ms", "out_of_stock_products_total", "dlq_message_count"];
    let others: Vec<_> = minded.iter().filter(|line| !fixed.iter().any(|name| line.starts_with(name))).collect();
    assert!(others.is_empty(), "{others:?}");

    // After a restart the counters begin anew, and the gauges are what they were.
    service.stop().await?;
    start_until_ready(&mut service).await?;
    eventually("the gauges to be read again", PATIENCE, async || {
        let page = scrape(&world, "product").await?;
        let same = page.value("dlq_message_count", &[]) == Some(2.0)
            && page.value("out_of_stock_products_total", &[]) == Some(out_of_stock);
        Ok(same.then_some(()))
    })
    .await?;
    service.stop().await?;
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_client_cannot_make_up_labels() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.start_service("product").await?;
    let caller = Caller::new(&world.url("product"), Role::Admin)?;
    let product = caller.register(1).await?;
    // Reads answer 503 until the projection is there.
    world.quiet().await?;
    for _ in 0..3 {
        caller.get(&format!("/v1/products/{}", Uuid::new_v4())).send().await?;
        caller.get(&format!("/no/such/{}", Uuid::new_v4())).send().await?;
        caller.request(reqwest::Method::from_bytes(b"BREW")?, "/healthz").send().await?;
        caller.request(reqwest::Method::DELETE, &format!("/v1/products/{product}")).send().await?;
    }
    let page = scrape(&world, "product").await?;
    let requests = |method, route, status| {
        page.value("lomash_http_requests_total", &[("method", method), ("route", route), ("status", status)])
    };
    assert_eq!(requests("POST", "/v1/products", "201"), Some(1.0), "{}", page.text);
    assert_eq!(requests("GET", "/v1/products/{productId}", "404"), Some(3.0), "{}", page.text);
    assert_eq!(requests("GET", "none", "404"), Some(3.0), "{}", page.text);
    assert_eq!(requests("DELETE", "/v1/products/{productId}", "405"), Some(3.0), "{}", page.text);
    assert_eq!(requests("_OTHER", "/healthz", "405"), Some(3.0), "{}", page.text);
    // Without the bounds, each id would be a series of its own.
    let series = page.values.keys().filter(|series| series.starts_with("lomash_http_requests_total")).count();
    assert!(series <= 6, "{}", page.text);
    service.stop().await?;
    world.close();
    Ok(())
}
