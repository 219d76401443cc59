//! `lomash backup` and `lomash restore` on real servers: an archive that is taken while traffic goes on is consistent, a second
//! run reads only what is new, damage is found before a server is touched, and what is restored is equal, message by message
//! with the server's times, and goes on where it was.
//!
//! The server's file store is compared with what we make of it byte by byte, from a server of its own.
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use async_nats::jetstream::{self, Context, consumer::PullConsumer};
use bytes::Bytes;
use futures::StreamExt;
use lomash::archive::{Archive, ConsumerEntry, Floor, Record};
use lomash::backup::{self, KEPT, Options, backup};
use lomash::restore::file_store::{self, Block};
use lomash::restore::{self, Outcome};
use lomash::stack::{Mail, Nats, NatsCluster, Service, Who, free_port, scratch};
use lomash::verify::{self, Show};
use lomash_contract::{OrderId, ProductId};
use lomash_ledger::suspects::Case;
use lomash_ledger::{dead_letter, direct, streams, upkeep};
use lomash_platform::nats;
use lomash_tests::{Dice, JWT_SECRET, PATIENCE, World, count, encoded, eventually, nowhere, order, start_until_ready};
use product_service::inventory::Action;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const QUIETLY: Options = Options { prune: false, show: Show::Nothing };
const PRUNING: Options = Options { prune: true, show: Show::Nothing };

/// The operator's program as this package builds it.
const PROGRAM: &str = "lomash-under-test";

/// Everything that a stream holds.
async fn held(context: &Context, stream: &str, upto: u64) -> Result<Vec<Record>> {
    let messages = direct::read(context, stream, None, 0, upto);
    messages.map(|held| Record::of(held?)).collect::<Vec<_>>().await.into_iter().collect()
}

fn sha256(records: &[Record]) -> String {
    let mut digest = Sha256::new();
    records.iter().for_each(|record| digest.update(record.encoded()));
    lomash::output::hex(digest.finalize())
}

/// The server of this world is lost with all that it held; an empty one takes its place.
pub async fn lose_the_server(world: &mut World, name: &str) -> Result<()> {
    let nats = Nats::start(&world.dir().join(name)).await?;
    let client = nats::connect(&nats.url(), "test").await?;
    world.move_to(nats, client);
    streams::wait_until_ready(&world.context).await?;
    Ok(())
}

pub async fn restored(world: &World, dir: &Path) -> Result<Outcome> {
    let prepared = restore::prepare(Archive::open(dir).await?, Show::Nothing).await?;
    let database_url = world.postgres.as_ref().map(|_| world.database_url());
    restore::restore(&world.context, prepared, None, database_url.as_ref(), Show::Nothing).await
}

fn assert_equal(outcome: &Outcome) {
    assert!(outcome.is_equal(), "{}", restore::render(outcome));
    for stream in &outcome.streams {
        assert_eq!(stream.equal, stream.messages, "{stream:?}");
        assert_eq!(stream.archive_sha256, stream.restored_sha256, "{stream:?}");
    }
}

/// Files of an archive with their lengths and times: what was not written again is the same.
fn segments(dir: &Path) -> Result<BTreeMap<PathBuf, std::time::SystemTime>> {
    let mut found = BTreeMap::new();
    for stream in KEPT {
        for entry in std::fs::read_dir(dir.join(stream))? {
            let entry = entry?;
            found.insert(entry.path(), entry.metadata()?.modified()?);
        }
    }
    Ok(found)
}

/// Orders and changes by admins, on and on until it is told to stop.
async fn traffic(
    world: &World,
    products: Vec<ProductId>,
    stop: Arc<AtomicBool>,
) -> tokio::task::JoinHandle<Result<usize>> {
    let (context, desk) = (world.context.clone(), world.desk().await.clone());
    let mut dice = Dice::thrown();
    tokio::spawn(async move {
        let mut published = 0;
        while !stop.load(Ordering::Relaxed) {
            let orders: Vec<_> = (0..20).map(|_| dice.order(&products, 4, 3)).collect();
            for order in orders {
                lomash::orders::publish(&context, order).await?;
                published += 1;
            }
            let set = Action::SetQuantity { quantity: 1_000 + dice.below(50), expected_quantity: None };
            let by = lomash_contract::UpdatedBy::System;
            let id = uuid::Uuid::new_v4();
            let product = *dice.pick(&products);
            desk.send(product_service::inventory::ProductCommand::new(id, product, by, set), None).await?;
        }
        Ok(published)
    })
}

// ── The server's file store ─────────────────────────────────────────────────────────────────────────────────────

fn find(dir: &Path, end: &str) -> Result<PathBuf> {
    let mut open = vec![dir.to_owned()];
    while let Some(folder) = open.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.ends_with(end) {
                return Ok(path);
            }
            if path.is_dir() {
                open.push(path);
            }
        }
    }
    anyhow::bail!("there is no {end} in {}", dir.display())
}

#[tokio::test]
async fn a_stream_is_laid_out_as_the_server_does_it() -> Result<()> {
    let mut world = World::without_postgres().await?;
    for number in 0..6 {
        // One name: the order of several is not told by the client library.
        let mut headers = HeaderMap::new();
        if number % 2 == 1 {
            headers.insert("Nats-Msg-Id", format!("message-{number}"));
        }
        if number == 3 {
            headers.append("Nats-Msg-Id", "another value");
        }
        world.publish_raw(headers, vec![b'x'; number * 300]).await?;
    }
    let consumer: PullConsumer =
        world.context.get_consumer_from_stream(streams::PRODUCT_ORDERS, streams::ORDERS).await?;
    let mut messages = consumer.stream().group("orders").expires(Duration::from_secs(2)).messages().await?;
    for _ in 0..6 {
        let message = messages.next().await.context("a message")??;
        message.double_ack().await.map_err(|problem| anyhow::anyhow!(problem))?;
    }
    let info = consumer.get_info().await?;
    assert_eq!(info.ack_floor.stream_sequence, 6);
    drop(messages);

    let records = held(&world.context, streams::ORDERS, 6).await?;
    let mut block = Block::new(streams::ORDERS, 1);
    records.iter().try_for_each(|record| block.push(record))?;
    // What was delivered and acknowledged is written when the server stops.
    world.nats.stop().await?;
    let dir = world.dir().join("nats");
    assert_eq!(std::fs::read(find(&dir, "ORDERS/msgs/1.blk")?)?, block.bytes());

    for (folder, key) in
        [("ORDERS", "ORDERS"), ("ORDERS/obs/product-orders", "ORDERS/product-orders"), ("JOBS", "JOBS")]
    {
        let text = std::fs::read(find(&dir, &format!("{folder}/meta.inf"))?)?;
        let sum = std::fs::read_to_string(find(&dir, &format!("{folder}/meta.sum"))?)?;
        assert_eq!(file_store::checksum(&text, key), sum, "{folder}");
    }
    let entry = ConsumerEntry {
        name: streams::PRODUCT_ORDERS.to_owned(),
        created: String::new(),
        config: serde_json::Map::new(),
        ack_floor: Floor { consumer_sequence: info.ack_floor.consumer_sequence, stream_sequence: 6 },
    };
    assert_eq!(std::fs::read(find(&dir, "ORDERS/obs/product-orders/o.dat")?)?, file_store::consumer_state(&entry));
    world.close();
    Ok(())
}

// ── The whole way ───────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_backup_under_traffic_is_restored_equal_and_goes_on() -> Result<()> {
    let mut world = World::start().await?;
    let dir = world.dir().join("archive");
    let service = world.run_service().await?;
    let products = world.register_many(30, 1_000).await?;

    // While orders and changes go on: the first backup, and a second that reads only what is new.
    let stop = Arc::new(AtomicBool::new(false));
    let busy = traffic(&world, products.clone(), stop.clone()).await;
    eventually("some traffic", PATIENCE, async || Ok((world.last_sequence().await? > 300).then_some(()))).await?;
    let first = backup(&world.context, &dir, None, QUIETLY).await?;
    let written = segments(&dir)?;
    eventually("more traffic", PATIENCE, async || {
        Ok((world.last_sequence().await? > first.ledger_sequence + 300).then_some(()))
    })
    .await?;
    let second = backup(&world.context, &dir, None, QUIETLY).await?;
    assert!(second.ledger_sequence > first.ledger_sequence);
    let after = segments(&dir)?;
    for (path, modified) in &written {
        assert_eq!(after.get(path), Some(modified), "{} was written again", path.display());
    }
    for (one, other) in first.streams.iter().zip(&second.streams) {
        assert_eq!(other.new_messages, other.messages - one.messages, "{other:?}");
        assert!(!other.anew, "{other:?}");
    }
    stop.store(true, Ordering::Relaxed);
    let published = busy.await??;
    println!("{published} orders published, cut at {} and {}", first.ledger_sequence, second.ledger_sequence);
    // An archive that was cut in the middle of it is whole: every order that it counts as decided is.
    let mut inner = World::without_postgres().await?;
    lose_the_server(&mut inner, "copy").await?;
    let outcome = restored(&inner, &dir).await?;
    assert_equal(&outcome);
    assert_eq!(outcome.ledger_sequence, second.ledger_sequence);
    let ahead_of_it = held(&world.context, streams::INVENTORY, second.ledger_sequence).await?;
    let copy = outcome.streams.iter().find(|stream| stream.stream == streams::INVENTORY).context("the ledger")?;
    assert_eq!(copy.restored_sha256, sha256(&ahead_of_it), "the ledger as it was at the cut");
    let inner_service = inner.run_service().await?;
    let report = inner.verified().await?;
    assert!(report.totals.orders_published > 0);
    inner_service.stop().await?;
    inner.close();

    // The last one, with orders that nobody has decided yet.
    world.quiet().await?;
    service.stop().await?;
    let open: Vec<_> = (0..5).map(|_| order(&[(products[0], 1), (products[1], 2)])).collect();
    world.publish_all(&open).await?;
    let last = backup(&world.context, &dir, Some(&world.database_url()), QUIETLY).await?;
    assert_eq!(last.checkpoints, Some([("inventory".to_owned(), last.ledger_sequence)].into()));
    let checked = backup::check(&dir, Show::Nothing).await?;
    assert_eq!(checked.ledger_sequence, world.last_sequence().await?);
    let mut before = BTreeMap::new();
    for stream in KEPT {
        before.insert(stream, held(&world.context, stream, u64::MAX).await?);
    }

    // Everything is lost.
    lose_the_server(&mut world, "elsewhere").await?;
    let outcome = restored(&world, &dir).await?;
    assert_equal(&outcome);
    assert_eq!(outcome.ahead, []);
    for (stream, messages) in before {
        assert_eq!(held(&world.context, stream, u64::MAX).await?, messages, "{stream}");
    }
    assert!(upkeep::plan(&world.context, 1).await?.iter().all(|step| step.action == upkeep::Action::Leave));
    let info = world.product_orders().await?;
    assert_eq!((info.num_pending, info.num_ack_pending), (5, 0), "{info:?}");

    // The server believes it after a restart, too.
    world.nats.restart().await?;
    streams::wait_until_ready(&world.context).await?;
    let info = world.product_orders().await?;
    assert_eq!(info.num_pending, 5, "{info:?}");

    // Orders go on: those that waited are decided, and none that was decided is decided again.
    let service = world.run_service().await?;
    world.decided(open.iter().map(|order| order.payload.order_id)).await?;
    let next = order(&[(products[2], 1)]);
    world.publish(&next).await?;
    world.decided([next.payload.order_id]).await?;
    let report = world.verified().await?;
    assert_eq!(world.last_sequence().await?, last.ledger_sequence + 11, "two lines each, and one");
    assert_eq!(report.totals.orders_published, published as u64 + 6);
    // And so do backups: the restored stream is the one of the archive.
    let on = backup(&world.context, &dir, None, QUIETLY).await?;
    let ledger = on.streams.iter().find(|copied| copied.stream == streams::INVENTORY).context("the ledger")?;
    assert_eq!((ledger.new_messages, ledger.anew), (11, false));
    service.stop().await?;
    world.close();
    Ok(())
}

/// A suspect is acknowledged in its stream before it is decided. An archive without the stream of the suspects must not lose it.
#[tokio::test]
async fn an_order_that_waits_to_be_tried_alone_is_delivered_again() -> Result<()> {
    let mut world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    let service = world.run_service().await?;
    let product = world.register("KIT-1", 100).await?;
    let orders: Vec<_> = (0..4).map(|_| order(&[(product, 1)])).collect();
    for order in &orders[..3] {
        world.publish(order).await?;
    }
    world.quiet().await?;
    service.stop().await?;
    // The fourth is handed over and acknowledged, and then everything stops.
    world.publish(&orders[3]).await?;
    Case::new(streams::ORDERS, streams::PRODUCT_ORDERS, 4, 3)
        .summon(&world.context)
        .await
        .map_err(|problem| anyhow::anyhow!(problem))?;
    let consumer: PullConsumer =
        world.context.get_consumer_from_stream(streams::PRODUCT_ORDERS, streams::ORDERS).await?;
    let mut messages = consumer.stream().group("orders").expires(Duration::from_secs(2)).messages().await?;
    let message = messages.next().await.context("the fourth")??;
    message.double_ack().await.map_err(|problem| anyhow::anyhow!(problem))?;
    drop(messages);
    assert_eq!(world.product_orders().await?.ack_floor.stream_sequence, 4);

    backup(&world.context, &dir, None, QUIETLY).await?;
    lose_the_server(&mut world, "elsewhere").await?;
    assert_equal(&restored(&world, &dir).await?);
    assert_eq!(world.product_orders().await?.ack_floor.stream_sequence, 3);
    let service = world.run_service().await?;
    world.decided([orders[3].payload.order_id]).await?;
    world.verified().await?;
    assert_eq!(world.stock(product).await?, 96);
    service.stop().await?;
    world.close();
    Ok(())
}

// ── What is gone ────────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn letters_that_were_removed_are_not_restored_and_their_sequences_not_given_again() -> Result<()> {
    let mut world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    let letter = async |world: &World| -> Result<u64> {
        Ok(world.context.publish("lomash.dlq.notification", "{}".into()).await?.await?.sequence)
    };
    for _ in 0..5 {
        letter(&world).await?;
    }
    let first = backup(&world.context, &dir, None, QUIETLY).await?;
    assert_eq!(first.streams.iter().map(|copied| copied.messages).sum::<u64>(), 5);
    let letters = world.context.get_stream(dead_letter::STREAM).await?;
    // In the middle, at the beginning, and at the end.
    for sequence in [1, 3, 5] {
        letters.delete_message(sequence).await?;
    }
    let second = backup(&world.context, &dir, None, QUIETLY).await?;
    let copied = second.streams.iter().find(|copied| copied.stream == dead_letter::STREAM).context("letters")?;
    assert_eq!((copied.anew, copied.messages, copied.last_sequence), (true, 2, 5));
    // Nothing changed: nothing is read again.
    let third = backup(&world.context, &dir, None, QUIETLY).await?;
    let copied = third.streams.iter().find(|copied| copied.stream == dead_letter::STREAM).context("letters")?;
    assert_eq!((copied.anew, copied.new_messages, copied.segments), (false, 0, 1));

    lose_the_server(&mut world, "elsewhere").await?;
    assert_equal(&restored(&world, &dir).await?);
    let there: Vec<u64> =
        held(&world.context, dead_letter::STREAM, u64::MAX).await?.iter().map(|record| record.sequence).collect();
    assert_eq!(there, [2, 4]);
    world.nats.restart().await?;
    streams::wait_until_ready(&world.context).await?;
    assert_eq!(letter(&world).await?, 6, "the fifth was one once");

    // All of them gone: the stream is empty and still knows where it was.
    let mut letters = world.context.get_stream(dead_letter::STREAM).await?;
    letters.purge().await?;
    assert_eq!(letters.info().await?.state.messages, 0);
    backup(&world.context, &dir, None, PRUNING).await?;
    lose_the_server(&mut world, "once-more").await?;
    assert_equal(&restored(&world, &dir).await?);
    world.nats.restart().await?;
    streams::wait_until_ready(&world.context).await?;
    assert_eq!(letter(&world).await?, 7);
    world.close();
    Ok(())
}

#[tokio::test]
async fn what_the_orders_lost_at_their_beginning_stays_until_it_is_pruned() -> Result<()> {
    let world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    for part in 0..3 {
        for _ in 0..4 {
            world.publish_raw(HeaderMap::new(), format!("{part}")).await?;
        }
        backup(&world.context, &dir, None, QUIETLY).await?;
    }
    let orders = |summary: &backup::Summary| {
        summary.streams.iter().find(|copied| copied.stream == streams::ORDERS).cloned().context("orders")
    };
    let stream = world.context.get_stream(streams::ORDERS).await?;
    // All of the first segment, and half of the second.
    stream.purge().sequence(7).await?;
    let kept = orders(&backup(&world.context, &dir, None, QUIETLY).await?)?;
    assert_eq!((kept.segments, kept.messages, kept.kept_beyond, kept.anew), (3, 12, 6, false));
    let pruned = orders(&backup(&world.context, &dir, None, PRUNING).await?)?;
    assert_eq!((pruned.segments, pruned.pruned_segments, pruned.kept_beyond), (2, 1, 2));
    assert_eq!(std::fs::read_dir(dir.join(streams::ORDERS))?.count(), 2, "the file is gone");
    backup::check(&dir, Show::Nothing).await?;
    world.close();
    Ok(())
}

// ── Refusals ────────────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn damage_is_found_before_a_server_is_touched() -> Result<()> {
    let mut world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    for number in 0..20 {
        world.publish_raw(HeaderMap::new(), format!("order {number}")).await?;
    }
    backup(&world.context, &dir, None, QUIETLY).await?;
    // The streams are there: refused, with what to do.
    let refused = restored(&world, &dir).await.expect_err("they exist").to_string();
    assert!(refused.contains("these streams exist: ") && refused.contains("nats stream rm NAME"), "{refused}");

    lose_the_server(&mut world, "elsewhere").await?;
    let segment = segments(&dir)?.into_keys().next().context("a segment")?;
    for path in [segment, dir.join("manifest.json")] {
        let good = std::fs::read(&path)?;
        let mut bad = good.clone();
        bad[good.len() / 2] ^= 1;
        std::fs::write(&path, &bad)?;
        let lomash = |words: &[&str]| {
            let program = lomash::up::program(PROGRAM)?;
            let output = std::process::Command::new(program)
                .args(words)
                .arg(&dir)
                .env("NATS_URL", world.nats.url())
                .output()
                .context("the program does not start")?;
            ensure!(!output.status.success(), "{words:?} takes a damaged {}", path.display());
            Ok(String::from_utf8_lossy(&output.stderr).into_owned())
        };
        for words in [["backup", "--check"].as_slice(), &["restore"]] {
            let said = lomash(words)?;
            assert!(said.contains("is damaged") && said.contains("another copy"), "{words:?}: {said}");
        }
        let names: Value = world.context.request("STREAM.NAMES", &json!({})).await?;
        assert_eq!(names["total"], 0, "{names}");
        std::fs::write(&path, &good)?;
    }
    assert_equal(&restored(&world, &dir).await?);
    world.close();
    Ok(())
}

#[tokio::test]
async fn another_stream_is_not_added_to_an_archive() -> Result<()> {
    let mut world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    for number in 0..3 {
        world.publish_raw(HeaderMap::new(), format!("order {number}")).await?;
    }
    backup(&world.context, &dir, None, QUIETLY).await?;
    let manifest = std::fs::read(dir.join("manifest.json"))?;
    let refusal = async |world: &World| match backup(&world.context, &dir, None, QUIETLY).await {
        Ok(_) => anyhow::bail!("it was taken"),
        Err(problem) => Ok(format!("{problem:#}")),
    };

    // The same subjects, longer, other messages; then shorter.
    lose_the_server(&mut world, "another").await?;
    streams::apply(&world.context, 1).await?;
    let said = refusal(&world).await?;
    assert!(said.contains("went backwards or is another one") && said.contains("another folder"), "{said}");
    for number in 0..5 {
        world.publish_raw(HeaderMap::new(), format!("order {number}")).await?;
    }
    let said = refusal(&world).await?;
    assert!(said.contains("is another stream") && said.contains("another folder"), "{said}");
    assert_eq!(std::fs::read(dir.join("manifest.json"))?, manifest, "the archive is as it was");

    // Two at once.
    let held = Archive::lock(&dir).await?;
    let said = refusal(&world).await?;
    assert!(said.contains("is in use by process"), "{said}");
    drop(held);
    world.close();
    Ok(())
}

#[tokio::test]
async fn a_backup_that_dies_leaves_the_archive_of_before() -> Result<()> {
    let world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    let publish = async |number: usize| world.publish_raw(HeaderMap::new(), format!("order {number}")).await;
    let dies = |point: &str| {
        let output = std::process::Command::new(lomash::up::program(PROGRAM)?)
            .arg("backup")
            .arg(&dir)
            .env("NATS_URL", world.nats.url())
            .env("FAILPOINTS", format!("{point}=return"))
            .output()?;
        ensure!(output.status.code().is_none(), "{point}: it did not die: {}", String::from_utf8_lossy(&output.stderr));
        anyhow::Ok(())
    };
    let orders = async || {
        let manifest = Archive::open(&dir).await?.manifest()?.context("a manifest")?;
        backup::check(&dir, Show::Nothing).await?;
        Ok::<_, anyhow::Error>(manifest.stream(streams::ORDERS).context("orders")?.messages)
    };
    // Nothing was finished: nothing is there, and says so.
    publish(1).await?;
    dies("backup-before-manifest")?;
    let said = Archive::open(&dir).await.expect_err("no archive").to_string();
    assert!(said.contains("is no archive"), "{said}");
    let summary = backup(&world.context, &dir, None, QUIETLY).await?;
    assert_eq!(summary.strays_removed, 1, "what the dead one had written");
    assert_eq!(orders().await?, 1);
    for number in 2..=3 {
        publish(number).await?;
    }
    dies("backup-before-manifest")?;
    assert_eq!(orders().await?, 1, "the one of before");
    dies("backup-after-manifest")?;
    assert_eq!(orders().await?, 3, "the new one");
    backup(&world.context, &dir, None, QUIETLY).await?;
    assert_eq!(orders().await?, 3);
    world.close();
    Ok(())
}

// ── Services on what is restored ────────────────────────────────────────────────────────────────────────────────

/// The three services of a world, as children.
pub struct Services {
    product: Service,
    analytics: Service,
    notification: Service,
}

impl Services {
    pub fn of(world: &World, mail: &Mail) -> Result<Self> {
        let notification = world
            .service_of("notification-service-under-test", "notification")?
            .env("SMTP_URL", mail.url())
            .env("MAIL_FROM", "inventory@lomash.example")
            .env("MAIL_TO", "team@lomash.example")
            .env("MAIL_LINK_BASE", "https://shop.example/products/");
        Ok(Self {
            product: world.service("product")?,
            analytics: world.service_of("analytics-service-under-test", "analytics")?,
            notification,
        })
    }

    fn each(&mut self) -> [&mut Service; 3] {
        [&mut self.product, &mut self.analytics, &mut self.notification]
    }

    pub async fn start(&mut self) -> Result<()> {
        for service in self.each() {
            start_until_ready(service).await?;
        }
        Ok(())
    }

    pub async fn stop(&mut self) -> Result<()> {
        for service in self.each() {
            service.stop().await?;
        }
        Ok(())
    }

    fn move_to(&mut self, world: &World) {
        for service in self.each() {
            service.set_env("NATS_URL", world.nats.url());
        }
    }
}

/// Waits until each projection has read the whole ledger and every alert is told.
pub async fn caught_up(world: &World) -> Result<()> {
    world.quiet().await?;
    let last = world.last_sequence().await?.cast_signed();
    eventually("the services to have read everything", PATIENCE, async || {
        let database = world.database().await?;
        for schema in ["inventory", "analytics"] {
            let at = count(&database, &format!("SELECT sequence FROM {schema}.checkpoint")).await?;
            ensure!(at == last, "{schema} is at {at} of {last}");
        }
        let waiting = "SELECT (SELECT count(*) FROM notification.alerts WHERE published_at IS NULL)
                            + (SELECT count(*) FROM notification.mails WHERE state = 'waiting')";
        let waiting = count(&database, waiting).await?;
        ensure!(waiting == 0, "{waiting} alerts wait");
        let info = world.context.get_stream(streams::INVENTORY).await?.consumer_info(streams::NOTIFICATION).await?;
        ensure!(info.num_pending == 0 && info.num_ack_pending == 0, "{info:?}");
        Ok(Some(()))
    })
    .await
}

/// Message-IDs of all mails.
fn mails(mail: &Mail) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(mail.dir())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "eml") {
            let text = std::fs::read_to_string(path)?;
            let id = text.lines().find_map(|line| line.strip_prefix("Message-ID: ")).context("a Message-ID")?;
            found.push(id.to_owned());
        }
    }
    Ok(found)
}

async fn sell(world: &World, product: ProductId, many: usize) -> Result<Vec<OrderId>> {
    let orders: Vec<_> = (0..many).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&orders).await?;
    let ids: Vec<OrderId> = orders.iter().map(|order| order.payload.order_id).collect();
    world.decided(ids.iter().copied()).await?;
    Ok(ids)
}

#[tokio::test]
async fn projections_go_on_with_what_they_know_and_refuse_what_is_older() -> Result<()> {
    let mut world = World::start().await?;
    let mail = Mail::start(&world.dir().join("mail")).await?;
    let mut services = Services::of(&world, &mail)?;
    services.start().await?;
    let product = world.register("KIT-1", 10).await?;
    let (older, newer) = (world.dir().join("older"), world.dir().join("newer"));

    // Three alerts, and the older backup; then one more, and the newer one.
    sell(&world, product, 9).await?;
    caught_up(&world).await?;
    backup(&world.context, &older, None, QUIETLY).await?;
    let before = mails(&mail)?.len();
    assert_eq!(before, 3, "at 3, 2 and 1");
    sell(&world, product, 1).await?;
    caught_up(&world).await?;
    services.stop().await?;
    backup(&world.context, &newer, Some(&world.database_url()), QUIETLY).await?;
    let at_newer = world.last_sequence().await?;

    // The newer one: everybody goes on, and nothing is mailed twice.
    lose_the_server(&mut world, "newer-server").await?;
    let outcome = restored(&world, &newer).await?;
    assert_equal(&outcome);
    assert_eq!(outcome.ahead, []);
    services.move_to(&world);
    services.start().await?;
    let second = world.register("KIT-2", 4).await?;
    sell(&world, second, 1).await?;
    caught_up(&world).await?;
    let told = mails(&mail)?;
    assert_eq!(told.len(), 5);
    assert_eq!(told.iter().collect::<BTreeSet<_>>().len(), 5, "none twice: {told:?}");
    world.verified().await?;
    services.stop().await?;

    // The older one: each refuses, and says what to run. So does the restore itself.
    lose_the_server(&mut world, "older-server").await?;
    let outcome = restored(&world, &older).await?;
    assert_equal(&outcome);
    let ahead: Vec<&str> = outcome.ahead.iter().map(|ahead| ahead.schema.as_str()).collect();
    assert_eq!(ahead, ["analytics", "inventory", "notification"]);
    services.move_to(&world);
    for (service, schema) in services.each().into_iter().zip(["inventory", "analytics", "notification"]) {
        refuses(service, schema).await?;
    }
    // Grown beyond what the projections have read: the lengths say nothing any more, and they refuse all the same.
    let bare = {
        let mut config = world.config();
        config.service.database_url = nowhere();
        world.run_service_as(config).await?
    };
    for number in 0..10 {
        world.register(&format!("LATER-{number}"), 10).await?;
    }
    assert!(world.last_sequence().await? > at_newer + 10);
    bare.stop().await?;
    for (service, schema) in services.each().into_iter().zip(["inventory", "analytics", "notification"]) {
        refuses(service, schema).await?;
    }

    // What they say works.
    let database = world.database().await?;
    for schema in ["inventory", "analytics", "notification"] {
        database.batch_execute(&format!("DROP SCHEMA {schema} CASCADE")).await?;
    }
    services.notification.set_env("MAIL_MAX_AGE_SECONDS", "0");
    services.start().await?;
    caught_up(&world).await?;
    world.verified().await?;
    assert_eq!(mails(&mail)?.len(), 5, "nothing of the past is mailed again");
    services.stop().await?;
    world.close();
    Ok(())
}

/// Starts a service that must end, and looks what it says.
async fn refuses(service: &mut Service, schema: &str) -> Result<()> {
    let said = std::fs::read_to_string(service.log()).unwrap_or_default().len();
    service.start()?;
    let status = tokio::time::timeout(PATIENCE, service.ended()).await;
    let log = std::fs::read_to_string(service.log())?;
    let log = &log[said..];
    let status = status.with_context(|| format!("{schema} runs on: {log}"))?;
    assert!(!status.success());
    for words in ["INVENTORY", "older", &format!("DROP SCHEMA {schema} CASCADE")] {
        assert!(log.contains(words), "{schema} does not say {words}: {log}");
    }
    Ok(())
}

// ── A cluster, with identities ──────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn three_nodes_take_it_with_three_copies_each_program_under_its_own_key() -> Result<()> {
    // Taken from a laptop's single server.
    let world = World::without_postgres().await?;
    let dir = world.dir().join("archive");
    let service = world.run_service().await?;
    let product = world.register("KIT-1", 100).await?;
    sell(&world, product, 5).await?;
    world.quiet().await?;
    service.stop().await?;
    let open = order(&[(product, 1)]);
    world.publish(&open).await?;
    backup(&world.context, &dir, None, QUIETLY).await?;

    let folder = scratch()?;
    let cluster = NatsCluster::start(&folder.path().join("nats")).await?;
    let connect = async |who: Who| -> Result<Context> {
        let (client, _) = nats::connect_as(&cluster.url(), &cluster.credentials.identity(who), who.name()).await?;
        Ok(jetstream::new(client))
    };
    let administrator = connect(Who::Administrator).await?;
    streams::wait_until_ready(&administrator).await?;
    let prepared = restore::prepare(Archive::open(&dir).await?, Show::Nothing).await?;
    let outcome = restore::restore(&administrator, prepared, Some(3), None, Show::Nothing).await?;
    assert_equal(&outcome);
    assert!(upkeep::plan(&administrator, 3).await?.iter().all(|step| step.action == upkeep::Action::Leave));
    let info: Value = administrator.request("STREAM.INFO.INVENTORY", &json!({})).await?;
    assert_eq!(info["config"]["num_replicas"], 3);
    assert_eq!(info["cluster"]["replicas"].as_array().map(Vec::len), Some(2), "{info}");

    // The product service under its key decides what was open.
    let mut service = Service::new(
        "product",
        &lomash::up::program("product-service-under-test")?,
        &folder.path().join("product.log"),
    )
    .env("NATS_URL", cluster.url())
    .env("STREAM_REPLICAS", "3")
    .env("DATABASE_URL", nowhere().expose())
    .env("HTTP_LISTEN", format!("127.0.0.1:{}", free_port()?))
    .env("JWT_HS256_SECRET", JWT_SECRET);
    for (name, value) in cluster.credentials.variables(Who::Product) {
        service = service.env(name, value);
    }
    start_until_ready(&mut service).await?;
    let operator = connect(Who::Operator).await?;
    verify::wait_until_quiet(&operator, None, PATIENCE).await?;
    let report = verify::verify(&operator, None, Show::Nothing).await?;
    assert!(report.is_clean() && report.totals.orders_undecided == 0, "{}", verify::render(&report));
    assert_eq!(report.totals.orders_published, 6);

    // The operator's key is enough for a backup, into the same archive; and not for a restore.
    let summary = backup(&operator, &dir, None, QUIETLY).await?;
    let ledger = summary.streams.iter().find(|copied| copied.stream == streams::INVENTORY).context("the ledger")?;
    assert_eq!((ledger.new_messages, ledger.anew), (1, false));
    let body = json!({ "config": { "name": "NEW" }, "state": {} });
    let answer = operator.client().request("$JS.API.STREAM.RESTORE.NEW", Bytes::from(body.to_string())).await;
    assert!(answer.is_err() || answer.is_ok_and(|answer| answer.payload.is_empty()), "the operator may not");
    service.stop().await?;
    world.close();
    Ok(())
}

#[test]
fn an_order_is_encoded_for_the_archive_in_one_way() {
    // Headers in any order are one record; values of one name keep theirs.
    let (headers, payload) = encoded(lomash_contract::ContentType::Json, &order(&[(ProductId(uuid::Uuid::nil()), 1)]));
    let stored = |headers: HeaderMap| {
        let stored_at = time::OffsetDateTime::UNIX_EPOCH;
        let subject = "lomash.orders.created".to_owned();
        Record::of(direct::Held {
            sequence: 1,
            stored_at,
            subject,
            headers,
            unreadable: None,
            payload: payload.clone(),
        })
        .unwrap()
    };
    let names: Vec<_> = headers.iter().map(|(name, values)| (name.clone(), values.clone())).collect();
    let mut backwards = HeaderMap::new();
    for (name, values) in names.into_iter().rev() {
        values.into_iter().for_each(|value| backwards.append(name.clone(), value));
    }
    assert_eq!(stored(headers).encoded(), stored(backwards).encoded());
}
