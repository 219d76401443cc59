//! What one caller, one peer or one reader can take, taken: places, bytes, connections. Each bound is met on a real service, and
//! where it protects orders their latency is looked at meanwhile.
//!
//! Latencies are compared with quiet ones of the same run, because the machine may be busy with something else.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use futures::StreamExt;
use futures::future::try_join_all;
use lomash::stack::Service;
use lomash_contract::{FailureReason, ProductId, Topic};
use lomash_platform::Secret;
use lomash_platform::projected::{MAX_WAITING_OF_ONE, WAIT_TIMEOUT};
use lomash_tests::http::Caller;
use lomash_tests::{Fate, JWT_SECRET, PATIENCE, World, eventually, order, start_until_ready};
use lomash_web::Role;
use lomash_web::auth::{Mint, mint};
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use product_service::feed::{MAX_STREAMS, MAX_STREAMS_OF_ONE};
use product_service::http::MAX_IMPORTS_OF_ONE;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use uuid::Uuid;

const STREAM: &str = "/v1/inventory/stream";

/// A world with one service whose reads are possible.
async fn world(variables: &[(&str, &str)]) -> Result<(World, Service, Caller)> {
    let world = World::start().await?;
    let mut service = world.service("one")?.env("HTTP_WRITES_PER_SECOND", "0").env("HTTP_READS_PER_SECOND", "0");
    for (variable, value) in variables {
        service = service.env(variable, value);
    }
    start_until_ready(&mut service).await?;
    world.quiet().await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    Ok((world, service, admin))
}

async fn finish(world: World, mut service: Service) -> Result<()> {
    service.stop().await?;
    world.close();
    Ok(())
}

/// From the publication of an order to its decision on the live topic, one order after the other, the fastest first.
async fn latencies(world: &World, product: ProductId, orders: usize) -> Result<Vec<Duration>> {
    let mut live = world.client.subscribe(Topic::InventoryUpdated.as_str()).await?;
    world.client.flush().await?;
    let mut took = Vec::new();
    for _ in 0..orders {
        let placed = order(&[(product, 1)]);
        let id = placed.payload.order_id.to_string();
        let began = Instant::now();
        world.publish(&placed).await?;
        loop {
            let heard = tokio::time::timeout(PATIENCE, live.next()).await?.context("the connection is closed")?;
            if String::from_utf8_lossy(&heard.payload).contains(&id) {
                break;
            }
        }
        took.push(began.elapsed());
    }
    took.sort_unstable();
    Ok(took)
}

/// Orders keep their time: p50 and p99 within twice their quiet values, and what a busy machine adds to anything.
fn assert_unmoved(what: &str, quiet: &[Duration], now: &[Duration]) {
    /// A few turns of a scheduler that has more to do than processors.
    const NOISE: Duration = Duration::from_millis(60);
    let at = |sorted: &[Duration], percent: usize| sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)];
    for percent in [50, 99] {
        let (before, with) = (at(quiet, percent), at(now, percent));
        println!("{what}: p{percent} {before:?} quiet, {with:?} now");
        assert!(with <= before * 2 + NOISE, "{what}: p{percent} of orders is {with:?}, {before:?} when it is quiet");
    }
}

/// Ten readers from the beginning of a ledger of long refusals, and orders beside them.
#[tokio::test]
async fn readers_of_the_past_are_not_felt_by_orders() -> Result<()> {
    const REFUSALS: usize = 120;
    const ORDERS: usize = 100;
    let (world, service, _) = world(&[]).await?;
    let product = world.register("KIT-1", 1_000_000).await?;
    let unknown: Vec<_> =
        (0..REFUSALS).map(|_| order(&(0..1_000).map(|_| (ProductId(Uuid::new_v4()), 1)).collect::<Vec<_>>())).collect();
    world.publish_all(&unknown).await?;
    let fates = world.decided(unknown.iter().map(|order| order.payload.order_id)).await?;
    assert!(fates.values().all(|fate| *fate == Fate::Refused(FailureReason::UnknownProduct)));
    world.quiet().await?;
    let quiet = latencies(&world, product, ORDERS).await?;

    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    let end = world.last_sequence().await?;
    let mut readers = Vec::new();
    for _ in 0..MAX_STREAMS_OF_ONE {
        let response = viewer.get(STREAM).header("Last-Event-ID", 0).open().await?;
        ensure!(response.status() == 200, "{response:?}");
        readers.push(tokio::spawn(async move { read_upto(response, end).await }));
    }
    let beside = latencies(&world, product, ORDERS).await?;
    let still = readers.iter().filter(|reader| !reader.is_finished()).count();
    println!("{still} of {MAX_STREAMS_OF_ONE} readers were still reading when the last order was decided");
    assert_unmoved("beside readers", &quiet, &beside);
    // Each hears everything, in order.
    for reader in readers {
        let heard = tokio::time::timeout(PATIENCE * 3, reader).await???;
        assert_eq!(heard, (1..=end).collect::<Vec<_>>());
    }
    // Nor does the server cut anybody off.
    let log = std::fs::read_to_string(service.log())?;
    assert!(!log.to_lowercase().contains("slow consumer"), "{log}");
    world.verified().await?;
    finish(world, service).await
}

/// The ids that a stream has up to `end`.
async fn read_upto(response: reqwest::Response, end: u64) -> Result<Vec<u64>> {
    let mut bytes = response.bytes_stream();
    let (mut heard, mut rest) = (Vec::new(), Vec::new());
    while heard.last().is_none_or(|last| *last < end) {
        rest.extend_from_slice(&bytes.next().await.context("the stream ended")??);
        while let Some(line) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=line).collect();
            if let Some(id) = std::str::from_utf8(&line)?.strip_prefix("id: ") {
                heard.push(id.trim().parse()?);
            }
        }
    }
    Ok(heard)
}

#[tokio::test]
async fn streams_are_bounded_for_each_caller_and_in_all() -> Result<()> {
    let (world, service, _) = world(&[]).await?;
    let url = world.url("one");
    let greedy = Caller::new(&url, Role::Viewer)?;
    let mut open = try_join_all((0..MAX_STREAMS_OF_ONE).map(|_| greedy.get(STREAM).open())).await?;
    let refused = greedy.get(STREAM).send().await?;
    assert_eq!((refused.status, refused.problem()), (429, "too-many-requests"), "{refused:?}");
    assert!(refused.header("retry-after").is_some());
    while open.len() < MAX_STREAMS {
        let other = Caller::new(&url, Role::Viewer)?;
        let more = MAX_STREAMS_OF_ONE.min(MAX_STREAMS - open.len());
        open.extend(try_join_all((0..more).map(|_| other.get(STREAM).open())).await?);
    }
    assert!(open.iter().all(|stream| stream.status() == 200), "{open:?}");
    let late = Caller::new(&url, Role::Viewer)?;
    let refused = late.get(STREAM).send().await?;
    assert_eq!((refused.status, refused.problem()), (503, "unavailable"), "{refused:?}");
    // A place that is given back is free.
    drop(open.pop());
    eventually("a place", PATIENCE, async || Ok((late.get(STREAM).open().await?.status() == 200).then_some(())))
        .await?;
    drop(open);
    finish(world, service).await
}

#[tokio::test]
async fn a_stream_ends_with_its_token() -> Result<()> {
    const LIFETIME: Duration = Duration::from_secs(3);
    let (world, service, admin) = world(&[]).await?;
    let product = admin.register(5).await?;
    let secret = Secret::from(JWT_SECRET.to_owned());
    let (issuer, audience, subject) = (DEVELOPMENT_ISSUER, DEVELOPMENT_AUDIENCE, Uuid::new_v4());
    let token = mint(&secret, &Mint { issuer, audience, subject, role: Role::Viewer, lifetime: LIFETIME })?;
    let began = Instant::now();
    let stream = admin.with_token(Some(token)).get(STREAM).open().await?;
    ensure!(stream.status() == 200, "{stream:?}");
    let text = tokio::time::timeout(PATIENCE, stream.text()).await.context("the stream goes on")??;
    // The token's times are in whole seconds.
    assert!(began.elapsed() <= LIFETIME + Duration::from_secs(5), "it ended after {:?}", began.elapsed());
    assert!(text.ends_with("event: stream-ended\ndata: {\"reason\":\"token-expired\"}\n\n"), "{text:?}");
    // Another of the same kind with a valid token hears what comes then.
    let quantity = json!({ "quantity": 6 });
    let written = admin.patch(&format!("/v1/products/{product}/inventory"), &quantity).send().await?;
    assert_eq!(written.status, 200);
    assert!(!text.contains("\"newQuantity\":6"));
    finish(world, service).await
}

#[tokio::test]
async fn what_the_ledger_does_not_have_is_refused_at_once() -> Result<()> {
    const READS: usize = 300;
    let (world, service, admin) = world(&[]).await?;
    let product = admin.register(5).await?;
    world.quiet().await?;
    let end = world.last_sequence().await?;
    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    let paths = [
        "/v1/products".to_owned(),
        format!("/v1/products/{product}"),
        format!("/v1/products/{product}/inventory"),
        format!("/v1/products/{product}/inventory/history"),
        format!("/v1/orders/{}/decision", Uuid::new_v4()),
    ];
    for path in &paths {
        let answer = viewer.get(path).header("Lomash-Min-Sequence", end + 1).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path}: {answer:?}");
        assert_eq!(
            (&answer.json["end"], &answer.json["errors"][0]["header"]),
            (&json!(end), &json!("lomash-min-sequence"))
        );
        assert!(answer.took < WAIT_TIMEOUT, "{path} took {:?}", answer.took);
    }
    let future = viewer.get(&format!("{}?asOf={}", paths[2], end + 1_000_000)).send().await?;
    assert_eq!((future.status, &future.json["end"]), (400, &json!(end)), "{future:?}");
    // What is there is waited for and answered.
    assert_eq!(viewer.get(&paths[1]).header("Lomash-Min-Sequence", end).send().await?.status, 200);

    // Very many of them hold nobody up: each caller beside them is answered as ever.
    let flood =
        (0..READS).map(|read| viewer.get(&paths[read % 4]).header("Lomash-Min-Sequence", end + 1_000_000).send());
    let others = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            let answer = admin.get(&paths[1]).send().await?;
            ensure!(answer.status == 200, "{answer:?}");
            slowest = slowest.max(answer.took);
        }
        Ok(slowest)
    };
    let (answers, slowest) = tokio::try_join!(try_join_all(flood), others)?;
    for answer in &answers {
        // Beyond what one may have wait, which is while the end of the ledger is asked for.
        assert!(matches!(answer.status, 400 | 429), "{answer:?}");
    }
    assert!(answers.iter().filter(|answer| answer.status == 400).count() >= MAX_WAITING_OF_ONE, "{answers:?}");
    println!("{READS} reads beyond the end; others were answered within {slowest:?}");
    assert!(slowest < WAIT_TIMEOUT, "{slowest:?}");
    finish(world, service).await
}

#[tokio::test]
async fn one_caller_does_not_hold_every_place_for_imports() -> Result<()> {
    let (world, service, admin) = world(&[]).await?;
    // A body that is begun and does not go on.
    let begun = || {
        let first = futures::stream::iter([Ok::<_, std::io::Error>("sku,name,quantity\n")]);
        reqwest::Body::wrap_stream(first.chain(futures::stream::pending()))
    };
    let path = "/v1/products:import?dryRun=true";
    let held: Vec<_> = (0..MAX_IMPORTS_OF_ONE)
        .map(|_| {
            let admin = admin.clone();
            tokio::spawn(async move {
                // One of the looks below may have the place just then.
                loop {
                    let import = admin.request(reqwest::Method::POST, path).header("Content-Type", "text/csv");
                    let answer = import.bytes(begun()).open().await?;
                    if answer.status() != 429 {
                        return anyhow::Ok(answer);
                    }
                }
            })
        })
        .collect();
    let row = || "sku,name,quantity\nKIT-7,Seven,7\n";
    let import = |caller: &Caller| {
        caller.request(reqwest::Method::POST, path).header("Content-Type", "text/csv").bytes(row()).send()
    };
    eventually("the place to be taken", PATIENCE, async || {
        let refused = import(&admin).await?;
        Ok((refused.status == 429).then(|| assert_eq!(refused.problem(), "too-many-requests")))
    })
    .await?;
    let other = Caller::new(&world.url("one"), Role::Admin)?;
    assert_eq!(import(&other).await?.status, 200, "there is a place for others");
    // The slow one is let go.
    for held in held {
        let answer = tokio::time::timeout(PATIENCE, held).await???;
        assert_eq!(answer.status(), 400);
    }
    assert_eq!(import(&admin).await?.status, 200);
    finish(world, service).await
}

/// Thousands of connections that send half a header: probes and orders do not notice, other peers neither.
#[tokio::test]
async fn half_headers_hold_up_neither_probes_nor_orders() -> Result<()> {
    const CONNECTIONS: usize = 2_500;
    const ORDERS: usize = 60;
    /// What a probe may take at most when nothing else is going on.
    const PROBE: Duration = Duration::from_millis(100);
    let (world, service, _) = world(&[]).await?;
    let product = world.register("KIT-1", 1_000_000).await?;
    let quiet = latencies(&world, product, ORDERS).await?;
    let health = world.health_url("one");
    let probes = async || -> Result<Vec<Duration>> {
        let mut took = Vec::new();
        for path in ["/healthz", "/readyz", "/metrics"].repeat(10) {
            // Each on a connection of its own, as a supervisor does.
            let caller = Caller::new(&health, Role::Viewer)?.with_token(None);
            let answer = caller.get(path).header("Connection", "close").send().await?;
            ensure!(answer.status == 200, "{path}: {answer:?}");
            took.push(answer.took);
        }
        took.sort_unstable();
        Ok(took)
    };
    let usual = probes().await?;
    let address = world.url("one").split_once("://").context("a URL")?.1.to_owned();
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(&address).await?;
        // One that is refused is closed already.
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: ").await;
        held.push(stream);
    }
    let now = probes().await?;
    let beside = latencies(&world, product, ORDERS).await?;
    // Whoever is one too many hears why.
    let mut said = String::new();
    held.last_mut().context("a connection")?.read_to_string(&mut said).await.unwrap_or_default();
    assert!(said.is_empty() || said.starts_with("HTTP/1.1 429 "), "{said}");
    let metrics = Caller::new(&health, Role::Viewer)?.get("/metrics").send().await?.text;
    let refused = metrics.lines().find_map(|line| line.strip_prefix("lomash_http_connections_refused_total "));
    let refused: f64 = refused.context("they are counted")?.parse()?;
    assert!(refused >= 1.0 && held.len() == CONNECTIONS, "{refused}");
    // Another peer has places.
    let other = reqwest::Client::builder().local_address(std::net::IpAddr::from([127, 0, 0, 2])).build()?;
    assert_eq!(other.get(format!("http://{address}/healthz")).send().await?.status(), 200);

    let (before, with) = (usual[usual.len() / 2], now[now.len() / 2]);
    println!("a probe took {before:?} before and {with:?} beside {CONNECTIONS} half headers, at most {:?}", now.last());
    assert!(with <= before + PROBE, "{with:?}, {before:?} before");
    assert_unmoved("beside half headers", &quiet, &beside);
    finish(world, service).await
}

/// The public port tells nobody how the business goes.
#[tokio::test]
async fn metrics_are_on_the_listener_of_health_alone() -> Result<()> {
    let (world, service, admin) = world(&[]).await?;
    for path in ["/healthz", "/readyz"] {
        assert_eq!(
            admin.with_token(None).get(path).send().await?.status,
            200,
            "a balancer asks the port that it balances"
        );
    }
    assert_eq!(admin.get("/metrics").send().await?.status, 404);
    let health = admin.at(&world.health_url("one")).with_token(None);
    for path in ["/healthz", "/readyz", "/metrics"] {
        assert_eq!(health.get(path).send().await?.status, 200, "{path}");
    }
    assert_eq!(health.get("/v1/products").send().await?.status, 404, "and nothing else is there");
    finish(world, service).await
}
