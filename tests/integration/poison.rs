//! Whatever an order's headers and payload are, it is decided or a dead letter, soon, and the orders beside it are decided.
//!
//! Owns what is large or broken beyond a message's form; `orders.rs` owns what makes a message no order, and `dead_letters.rs`
//! what becomes of a letter.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use lomash_contract::{ContentType, Envelope, LedgerEvent, OrderCreated, ProductId};
use lomash_ledger::dead_letter::{self, Filter, Letter, Letters, LettersError, Way};
use lomash_ledger::receive::{self, Delivery, Receive, Settle};
use lomash_ledger::{Ledger, MAX_EVENT_HEADER_BYTES, header, streams, suspects};
use lomash_tests::http::Caller;
use lomash_tests::{Dice, Fate, PATIENCE, World, encoded, eventually, order};
use lomash_web::Role;
use product_service::committer::STALLED_AFTER;
use product_service::orders::{self, MAX_ORDER_BYTES_IN_FLIGHT};
use tokio_util::sync::CancellationToken;

/// Within this a message that can never be handled is a dead letter, and the others are decided.
const BOUND: Duration = Duration::from_secs(10);

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// An order's headers, with these beside them.
fn with(order: &Envelope<OrderCreated>, more: &[(&str, &str)]) -> (HeaderMap, bytes::Bytes) {
    let (mut headers, body) = encoded(ContentType::Json, order);
    for (name, value) in more {
        headers.insert(*name, *value);
    }
    (headers, body)
}

async fn letters(world: &World) -> Result<Vec<Letter>> {
    Ok(Letters::new(world.context.clone()).page(&Filter::default(), 0, usize::MAX).await?.letters)
}

async fn ledger_bytes(world: &World) -> Result<u64> {
    Ok(world.context.get_stream(streams::INVENTORY).await?.cached_info().state.bytes)
}

/// Orders with headers that reach the server's limit are decided, their trace context is dropped, and the ledger grows by their
/// lines. A batch with such an event was refused for ever, and each line of an order had the headers anew.
#[tokio::test]
async fn large_headers_of_an_order_stop_no_other_and_reach_no_event() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let products = world.register_many(150, 10_000).await?;
    let lines: Vec<(ProductId, u32)> = products.iter().map(|product| (*product, 1)).collect();
    let full = format!("vendor={}", "x".repeat(65_330 - "vendor=".len()));
    let large = format!("vendor={}", "x".repeat(60_000));
    let before = ledger_bytes(&world).await?;
    let since = Instant::now();
    let orders: Vec<_> = [
        (1, vec![(header::TRACEPARENT, TRACEPARENT), (header::TRACESTATE, full.as_str())]),
        (150, vec![(header::TRACEPARENT, TRACEPARENT), (header::TRACESTATE, large.as_str())]),
        (1, vec![(header::TRACEPARENT, "garbage")]),
        (1, vec![(header::TRACEPARENT, large.as_str())]),
        (1, vec![("x-anything", full.as_str())]),
        (1, vec![]),
    ]
    .into_iter()
    .map(|(count, headers)| (order(&lines[..count]), headers))
    .collect();
    for (order, more) in &orders {
        let (headers, body) = with(order, more);
        world.publish_raw(headers, body).await?;
    }
    let fates = world.decided_within(BOUND, orders.iter().map(|(order, _)| order.payload.order_id)).await?;
    assert!(since.elapsed() < BOUND, "{:?}", since.elapsed());
    assert!(fates.values().all(|fate| *fate == Fate::Allocated), "{fates:?}");
    let grown = ledger_bytes(&world).await? - before;
    assert!(grown < 155 * 1_024, "154 lines took {grown} bytes of the ledger");
    let traced = |number: usize| orders[number].0.payload.order_id;
    for (message, event) in world.events().await? {
        let LedgerEvent::InventoryUpdated(updated) = event else { continue };
        let Some(order) = updated.order_id else { continue };
        let expected = (order == traced(0) || order == traced(1)).then_some(TRACEPARENT);
        assert_eq!((message.carried.traceparent(), message.carried.tracestate()), (expected, None));
    }
    assert!(letters(&world).await?.is_empty());
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Sixteen orders of a thousand lines and 64 kB of trace state cost the ledger their lines, and a good order behind them waits no
/// longer than those take.
#[tokio::test]
async fn the_longest_orders_with_the_largest_headers_cost_their_lines() -> Result<()> {
    const ORDERS: usize = 16;
    const LINES: usize = 1_000;
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let products = world.register_many(LINES, 1_000).await?;
    let lines: Vec<(ProductId, u32)> = products.iter().map(|product| (*product, 1)).collect();
    let state = format!("vendor={}", "x".repeat(64_000));
    let before = ledger_bytes(&world).await?;
    let mut orders = Vec::new();
    for _ in 0..ORDERS {
        let order = order(&lines);
        let (headers, body) = with(&order, &[(header::TRACEPARENT, TRACEPARENT), (header::TRACESTATE, state.as_str())]);
        world.publish_raw(headers, body).await?;
        orders.push(order.payload.order_id);
    }
    let good = order(&lines[..1]);
    world.publish(&good).await?;
    orders.push(good.payload.order_id);
    let fates = world.decided_within(PATIENCE, orders).await?;
    assert!(fates.values().all(|fate| *fate == Fate::Allocated));
    let grown = ledger_bytes(&world).await? - before;
    let line = grown / (ORDERS * LINES) as u64;
    assert!(line < 1_024, "each line took {line} bytes");
    service.stop().await?;
    world.close();
    Ok(())
}

/// A message that is no order and has the largest headers is a dead letter that says what it leaves out. Redriven it comes from its
/// stream; when that does not have it any more, the letter says so and stays.
#[tokio::test]
async fn a_letter_of_the_largest_headers_is_cut_and_redriven_whole() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("POISON-1", 10).await?;
    let mut headers = HeaderMap::new();
    headers.insert("x-large", "x".repeat(65_400).as_str());
    headers.insert("x-small", "kept");
    let poison = world.publish_raw(headers, "no order").await?;
    let good = order(&[(product, 1)]);
    world.publish(&good).await?;
    world.decided_within(BOUND, [good.payload.order_id]).await?;
    let letter = eventually("a letter", BOUND, async || Ok(letters(&world).await?.pop())).await?;
    let cut = letter.cut.context("it says that it is cut")?;
    assert!(cut.header_bytes.is_some_and(|bytes| bytes > 65_400) && cut.payload_bytes.is_none(), "{cut:?}");
    assert_eq!(letter.headers.get("x-small").map(async_nats::HeaderValue::as_str), Some("kept"));
    assert!(letter.headers.get("x-large").is_none());
    assert_eq!(letter.payload, "no order");
    world.quiet().await?;
    world.verified().await?;

    // It is what it was, so it dies again, and is found in its stream as large as it was.
    let all = Letters::new(world.context.clone());
    let redriven = all.redrive(letter.sequence).await?;
    ensure!(matches!(&redriven.way, Way::Republished { sequence, .. } if *sequence > poison), "{redriven:?}");
    let again = eventually("its next letter", BOUND, async || Ok(letters(&world).await?.pop())).await?;
    assert_eq!(again.past.redrives, 1);
    let origin = again.origin.clone().context("its origin")?;
    world.context.get_stream(streams::ORDERS).await?.delete_message(origin.sequence).await?;
    match all.redrive(again.sequence).await {
        // As much of its headers as fitted was published, so that letter may be whole.
        Ok(_) if again.cut.is_none() => {}
        Err(LettersError::NoWayBack { why, .. }) => {
            assert!(why.contains("does not have the message"), "{why}");
            assert_eq!(letters(&world).await?.len(), 1, "the letter stays");
        }
        other => panic!("{other:?}"),
    }
    service.stop().await?;
    world.close();
    Ok(())
}

/// Any bytes as headers and payload, among good orders: those are decided, and each bad message is decided or a dead letter in
/// time.
#[tokio::test]
async fn any_message_beside_good_orders_is_decided_or_dead_in_time() -> Result<()> {
    const BAD: usize = 60;
    let world = World::start().await?;
    let service = world.run_service().await?;
    let products = world.register_many(20, 100_000).await?;
    let mut dice = Dice::thrown();
    let (mut good, mut odd) = (Vec::new(), Vec::new());
    let since = Instant::now();
    for _ in 0..BAD {
        for _ in 0..5 {
            good.push(dice.order(&products, 4, 3));
        }
        let (mut headers, mut body) = encoded(ContentType::Json, &dice.order(&products, 4, 3));
        let mut room = 60_000_u32;
        for number in 0..dice.below(12) {
            let length = dice.below(room.min(30_000) + 1);
            room -= length;
            // What the client library lets through: anything but line breaks. Others publish without it, see below.
            let value: String = (0..length)
                .map(|_| char::from_u32(dice.below(0x3ff)).filter(|c| !matches!(c, '\r' | '\n')).unwrap_or('?'))
                .take_while({
                    let mut bytes = 0;
                    move |c| {
                        bytes += c.len_utf8();
                        bytes <= length as usize
                    }
                })
                .collect();
            let other = format!("x-{number}");
            let name = *dice.pick(&[
                header::TRACEPARENT,
                header::TRACESTATE,
                header::CONTENT_TYPE,
                header::REASON,
                header::COMMAND,
                dead_letter::REDRIVES,
                dead_letter::HISTORY,
                dead_letter::ORIGIN_MESSAGE_ID,
                other.as_str(),
            ]);
            headers.insert(name, value.as_str());
        }
        if dice.below(2) == 0 {
            let bytes = dice.below(2_000);
            body = (0..bytes).map(|_| dice.below(256) as u8).collect::<Vec<_>>().into();
        }
        odd.push(if dice.below(6) == 0 {
            let of = *dice.pick(&[256, 128]);
            let mut headers: Vec<u8> = (0..dice.below(200)).map(|_| dice.below(of) as u8).collect();
            if dice.below(2) == 0 {
                headers.splice(0..0, *b"x: ");
                headers = [b"NATS/1.0\r\n", headers.as_slice(), b"\r\n\r\n"].concat();
            }
            publish_bytes(&world, &headers, &body).await?
        } else {
            world.publish_raw(headers, body).await?
        });
        world.publish_all(&good[good.len() - 5..]).await?;
    }
    world.decided_within(BOUND + since.elapsed(), good.iter().map(|order| order.payload.order_id)).await?;
    world.quiet_within(BOUND).await?;
    let dead: Vec<u64> =
        letters(&world).await?.iter().filter_map(|letter| Some(letter.origin.as_ref()?.sequence)).collect();
    assert!(dead.iter().all(|sequence| odd.contains(sequence)), "no good order is a letter");
    assert!(!dead.is_empty() && dead.len() < BAD, "some of both kinds: {} of {BAD} are letters", dead.len());
    // Every message of ORDERS is decided or a letter, and nothing else happened.
    world.verified().await?;
    service.stop().await?;
    for message in world.messages().await? {
        assert!(message.carried.bytes() <= MAX_EVENT_HEADER_BYTES);
    }
    world.close();
    Ok(())
}

/// An order under whose event id the ledger holds something else already is a dead letter that says so; the others are decided.
#[tokio::test]
async fn an_order_whose_event_id_is_taken_is_a_letter_and_stops_no_other() -> Result<()> {
    let world = World::without_postgres().await?;
    let service = world.run_service().await?;
    let product = world.register("POISON-2", 1_000).await?;
    // What the order comes to is decided once on another ledger, to learn the id.
    let clashes = order(&[(product, 1)]);
    let events = world.events().await?;
    let id = {
        use lomash_contract::EventId;
        use lomash_contract::id::EventRole;
        let cause = lomash_contract::Cause::Order(clashes.payload.order_id);
        EventId::derive(&cause, EventRole::Stock, &product.0)
    };
    let (_, last) = events.last().context("a registration")?;
    let mut updated = events
        .iter()
        .rev()
        .find_map(|(_, event)| match event {
            LedgerEvent::InventoryUpdated(updated) => Some(updated.clone()),
            _ => None,
        })
        .with_context(|| format!("the first stock, before {last:?}"))?;
    (updated.previous_quantity, updated.new_quantity) = (1_000, 2_000);
    let envelope = Envelope::new(id, lomash_contract::Timestamp::now(), updated);
    let foreign = lomash_ledger::NewMessage {
        subject: format!("{}.{product}", lomash_contract::Topic::InventoryUpdated.as_str()),
        event_id: id,
        payload: lomash_contract::codec::encode(ContentType::Json, &envelope).into(),
        carried: None,
    };
    world.ledger().append(&[foreign], world.last_sequence().await?).await?;
    let good: Vec<_> = (0..200).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&good[..100]).await?;
    world.publish(&clashes).await?;
    world.publish_all(&good[100..]).await?;
    world.decided_within(BOUND, good.iter().map(|order| order.payload.order_id)).await?;
    let letter = eventually("a letter", BOUND, async || Ok(letters(&world).await?.pop())).await?;
    assert!(letter.reason.contains("is in the ledger already"), "{}", letter.reason);
    assert!(letter.payload.windows(36).any(|part| part == clashes.payload.order_id.to_string().as_bytes()));
    service.stop().await?;
    world.close();
    Ok(())
}

/// While the ledger's server is frozen nothing is decided, and readiness says so and why; afterwards it is ready by itself.
#[tokio::test]
async fn a_writer_that_decides_nothing_is_not_ready_and_says_why() -> Result<()> {
    let world = World::without_postgres().await?;
    let _service = world.start_service("product").await?;
    let caller = Caller::new(&world.url("product"), Role::Admin)?;
    let product = world.register("POISON-3", 9).await?;
    let ready = async || -> Result<(u16, serde_json::Value)> {
        let answer = caller.with_token(None).get("/readyz").send().await?;
        Ok((answer.status, answer.json))
    };
    assert_eq!(ready().await?.0, 200);
    // The ledger takes nothing more, as with a full disk: the stream may not grow.
    let stream = world.context.get_stream(streams::INVENTORY).await?;
    let mut config = stream.cached_info().config.clone();
    let max_bytes = config.max_bytes;
    config.max_bytes = i64::try_from(stream.cached_info().state.bytes)?;
    world.context.update_stream(&config).await?;
    let waits = order(&[(product, 1)]);
    world.publish(&waits).await?;
    let (_, body) =
        eventually("503", STALLED_AFTER * 3, async || Ok(Some(ready().await?).filter(|(status, _)| *status == 503)))
            .await?;
    let ledger = body["checks"].as_array().and_then(|checks| checks.iter().find(|check| check["name"] == "ledger"));
    let detail = ledger.and_then(|check| check["detail"].as_str()).context("what the ledger's check says")?;
    assert!(detail.contains("nothing was decided for") && detail.contains("maximum bytes exceeded"), "{detail}");
    assert!(letters(&world).await?.is_empty(), "the order is a good one");
    let health = Caller::new(&world.health_url("product"), Role::Viewer)?;
    let metrics = health.with_token(None).get("/metrics").send().await?;
    let age = metrics.text.lines().find_map(|line| line.strip_prefix("lomash_oldest_undecided_order_seconds "));
    let age: f64 = age.context("the gauge")?.trim().parse()?;
    assert!(age > STALLED_AFTER.as_secs_f64() - 5.0, "{age}");
    config.max_bytes = max_bytes;
    world.context.update_stream(&config).await?;
    world.decided_within(PATIENCE, [waits.payload.order_id]).await?;
    eventually("ready", PATIENCE, async || Ok((ready().await?.0 == 200).then_some(()))).await?;
    world.close();
    Ok(())
}

/// Bytes as headers that no client library would send: they are not UTF-8, have no colon, or claim to be the server's word. Whoever
/// receives such a message loses its connection over it. It is a letter in time all the same, and the others are decided.
#[tokio::test]
async fn headers_that_cannot_be_read_cost_only_their_message() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.run_service().await?;
    let product = world.register("POISON-4", 1_000).await?;
    let bad: [&[u8]; 6] = [
        // The client library panics over it.
        b"NATS/1.0\r\nA: b\rC\r\n\r\n",
        b"NATS/1.0\r\nx: k\xfcche\r\n\r\n",
        b"NATS/1.0\r\nno colon\r\n\r\n",
        b"NATS/1.0 503\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
    ];
    let mut good = Vec::new();
    for headers in bad {
        publish_bytes(&world, headers, b"no order").await?;
        good.extend((0..20).map(|_| order(&[(product, 1)])));
        world.publish_all(&good[good.len() - 20..]).await?;
    }
    world.decided_within(BOUND, good.iter().map(|order| order.payload.order_id)).await?;
    let found = eventually("the letters", BOUND, async || {
        let found = letters(&world).await?;
        Ok((found.len() == bad.len()).then_some(found))
    })
    .await?;
    for letter in &found {
        assert_eq!(letter.payload, "no order", "{letter:?}");
    }
    assert!(found.iter().any(|letter| letter.reason.contains("headers cannot be read")), "{found:?}");
    // One with nothing behind it.
    publish_bytes(&world, bad[0], b"no order").await?;
    eventually("its letter", 2 * BOUND, async || Ok((letters(&world).await?.len() == bad.len() + 1).then_some(())))
        .await?;
    let late = order(&[(product, 1)]);
    world.publish(&late).await?;
    world.decided_within(BOUND, [late.payload.order_id]).await?;

    // All at once, and nothing after them: what is lost with the connection is asked for, and not waited for.
    service.stop().await?;
    let mut good = Vec::new();
    for headers in bad {
        publish_bytes(&world, headers, b"no order").await?;
        good.extend((0..20).map(|_| order(&[(product, 1)])));
        world.publish_all(&good[good.len() - 20..]).await?;
    }
    service = world.run_service().await?;
    world.decided_within(BOUND, good.iter().map(|order| order.payload.order_id)).await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// Publishes an order with these bytes as its headers, while nobody else publishes, and gives its sequence.
async fn publish_bytes(world: &World, headers: &[u8], payload: &[u8]) -> Result<u64> {
    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    let address = world.nats.url().replace("nats://", "");
    let mut server = BufReader::new(tokio::net::TcpStream::connect(address).await?);
    let before = world.context.get_stream(streams::ORDERS).await?.cached_info().state.last_sequence;
    let (all, only) = (headers.len() + payload.len(), headers.len());
    let mut line = String::new();
    server.read_line(&mut line).await?;
    ensure!(line.starts_with("INFO"), "{line}");
    let mut bytes = b"CONNECT {\"verbose\":false,\"headers\":true}\r\n".to_vec();
    bytes.extend(format!("HPUB lomash.orders.created {only} {all}\r\n").bytes());
    bytes.extend([headers, payload, b"\r\nPING\r\n"].concat());
    server.write_all(&bytes).await?;
    line.clear();
    while !line.starts_with("PONG") {
        line.clear();
        ensure!(server.read_line(&mut line).await? > 0, "the server closed the connection: {line}");
        ensure!(!line.starts_with("-ERR"), "{line}");
    }
    eventually("the message in its stream", PATIENCE, async || {
        let last = world.context.get_stream(streams::ORDERS).await?.cached_info().state.last_sequence;
        Ok((last > before).then_some(last))
    })
    .await
}

/// Neither the dead letters nor the suspects have room. A malformed order is not lost over it: it is a letter when there is room
/// again, and the orders behind it are decided meanwhile.
#[tokio::test]
async fn without_room_for_a_letter_the_others_go_on_and_it_comes_later() -> Result<()> {
    let world = World::start().await?;
    let service = world.run_service().await?;
    let product = world.register("POISON-5", 1_000).await?;
    let mut limits = Vec::new();
    for (name, subject) in [
        (dead_letter::STREAM, lomash_contract::subject::dead_letter("nobody")),
        (suspects::STREAM, suspects::subject("NOTHING", "nobody")),
    ] {
        world.context.publish(subject, "it is full".into()).await?.await?;
        let mut config = world.context.get_stream(name).await?.cached_info().config.clone();
        limits.push((name, config.max_messages));
        config.max_messages = 1;
        world.context.update_stream(&config).await?;
    }
    world.publish_raw(HeaderMap::new(), "no order").await?;
    let good: Vec<_> = (0..300).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&good).await?;
    world.decided_within(BOUND, good.iter().map(|order| order.payload.order_id)).await?;
    assert_eq!(letters(&world).await?.len(), 1, "only what filled it");
    for (name, max_messages) in limits {
        let mut config = world.context.get_stream(name).await?.cached_info().config.clone();
        config.max_messages = max_messages;
        world.context.update_stream(&config).await?;
    }
    let letter = eventually("the letter", PATIENCE, async || {
        Ok(letters(&world).await?.into_iter().find(|letter| letter.payload == "no order"))
    })
    .await?;
    assert_eq!(letter.consumer, streams::PRODUCT_ORDERS);
    world.quiet().await?;
    world.verified().await?;
    service.stop().await?;
    world.close();
    Ok(())
}

/// What is handled at once is bounded by its bytes, and headers are bytes.
#[tokio::test]
async fn headers_count_among_the_bytes_that_are_handled_at_once() -> Result<()> {
    const FIT: usize = 3;
    let mut headers = HeaderMap::new();
    headers.insert("x-large", "x".repeat(20_000).as_str());
    let receive = Receive { max_in_flight_bytes: FIT * 20_000, ..orders::receive() };
    handled_at_once(receive, 10, &headers, "{}", FIT).await
}

/// Whatever number of orders may be in hand, the large ones are bounded by what they take.
#[tokio::test]
async fn the_largest_orders_are_bounded_by_their_bytes_and_not_their_number() -> Result<()> {
    let payload = "x".repeat(500 << 10);
    let fit = MAX_ORDER_BYTES_IN_FLIGHT.div_ceil(payload.len());
    handled_at_once(orders::receive(), fit + 20, &HeaderMap::new(), &payload, fit).await
}

/// Of `messages` that were all delivered, `fit` are handled at once; the last of them may go over the bound.
async fn handled_at_once(
    receive: Receive,
    messages: usize,
    headers: &HeaderMap,
    payload: &str,
    fit: usize,
) -> Result<()> {
    let world = World::without_postgres().await?;
    for _ in 0..messages {
        world.publish_raw(headers.clone(), payload.to_owned()).await?;
    }
    let begun = Arc::new(AtomicUsize::new(0));
    let stop = CancellationToken::new();
    let handler = {
        let begun = begun.clone();
        move |_: Delivery| {
            begun.fetch_add(1, Ordering::Relaxed);
            std::future::pending::<Settle>()
        }
    };
    let receiving = tokio::spawn(receive::run(world.context.clone(), receive, stop.clone(), handler));
    eventually("all are delivered", PATIENCE, async || {
        Ok((world.product_orders().await?.num_ack_pending == messages).then_some(()))
    })
    .await?;
    eventually("as many are handled as fit", PATIENCE, async || {
        Ok((begun.load(Ordering::Relaxed) >= fit).then_some(()))
    })
    .await?;
    assert_eq!(begun.load(Ordering::Relaxed), fit, "of {messages} that were delivered");
    receiving.abort();
    world.close();
    Ok(())
}
