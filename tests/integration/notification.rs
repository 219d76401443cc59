//! Low-stock alerts end to end: from the ledger to the stream `NOTIFICATIONS` and to a real mail server, whatever dies on the
//! way. One alert a cause, none missing, and at most one mail twice.
//!
//! What must be told is worked out here from the ledger alone (`causes`), by other code than the service's. Mails are read from
//! the files of the mail server.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use async_nats::HeaderMap;
use lomash::mail_sink::{Behaviour, MailSinkArgs, Tls};
use lomash::stack::{Mail, Service, free_port};
use lomash_contract::event::ProductDetails;
use lomash_contract::limits::LOW_STOCK_THRESHOLD;
use lomash_contract::{
    ContentType, CountedBy, EventId, LedgerEvent, LowStock, ProductId, Timestamp, Topic, Trigger, codec, subject,
};
use lomash_ledger::{dead_letter, header, streams};
use lomash_tests::http::Caller;
use lomash_tests::{Dice, InProcess, PATIENCE, World, count, details, eventually, order, start_until_ready};
use lomash_web::Role;
use product_service::inventory::{Action, Amendment, Count, Details};
use uuid::Uuid;

const PROGRAM: &str = "notification-service-under-test";

/// `ack_wait` of the consumer, the time until another replica is pinned, and a busy machine.
const TAKEOVER_BOUND: Duration = Duration::from_secs(90);

/// A world with a mail server, a product service and a notification service that is described and not started.
struct Scene {
    world: World,
    mail: Mail,
    product: InProcess,
    service: Service,
}

impl Scene {
    async fn set() -> Result<Self> {
        let world = World::start().await?;
        let mail = Mail::start(&world.dir().join("mail")).await?;
        let product = world.run_service().await?;
        let service = notification(&world, "notification", &mail.url())?;
        Ok(Self { world, mail, product, service })
    }

    async fn start() -> Result<Self> {
        let mut scene = Self::set().await?;
        start_until_ready(&mut scene.service).await?;
        Ok(scene)
    }

    async fn end(mut self) -> Result<()> {
        self.service.stop().await?;
        self.product.stop().await?;
        self.world.close();
        Ok(())
    }

    fn mails(&self) -> Result<Vec<Letter>> {
        letters(self.mail.dir())
    }

    /// Waits until everything is recorded, published and mailed.
    async fn settled(&self) -> Result<()> {
        settled(&self.world, TAKEOVER_BOUND).await
    }

    /// What was told is what had to be told: every cause once on NATS and by mail; `twice` mails may have come twice.
    async fn check(&self, twice: usize) -> Result<Vec<Cause>> {
        let causes = causes(&self.world).await?;
        let expected: BTreeSet<EventId> = causes.iter().map(|cause| cause.event_id).collect();
        let published = published(&self.world).await?;
        let told: BTreeSet<EventId> = published.iter().map(|alert| alert.payload.caused_by).collect();
        assert_eq!(told, expected, "on NATS");
        assert_eq!(published.len(), expected.len(), "on NATS, once each");
        let mails = self.mails()?;
        let mut seen: BTreeMap<EventId, usize> = BTreeMap::new();
        for mail in &mails {
            *seen.entry(mail.cause()?).or_default() += 1;
        }
        assert_eq!(seen.keys().copied().collect::<BTreeSet<_>>(), expected, "by mail");
        let repeated: Vec<_> = seen.iter().filter(|(_, times)| **times > 1).collect();
        assert!(seen.values().all(|times| *times <= 2) && repeated.len() <= twice, "mailed twice: {repeated:?}");
        Ok(causes)
    }
}

fn notification(world: &World, name: &str, smtp_url: &str) -> Result<Service> {
    let service = world.service_of(PROGRAM, name)?;
    Ok(service
        .env("SMTP_URL", smtp_url)
        .env("MAIL_FROM", "Lomash Inventory <inventory@lomash.example>")
        .env("MAIL_TO", "Team <team@lomash.example>, boss@lomash.example")
        .env("MAIL_LINK_BASE", "https://shop.example/products/"))
}

/// A file of the mail server.
#[derive(Debug)]
struct Letter {
    headers: Vec<(String, String)>,
    text: String,
}

impl Letter {
    fn header(&self, name: &str) -> &str {
        let mut found = self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        let (Some((_, value)), None) = (found.next(), found.next()) else {
            panic!("{name} is not there once: {self:?}")
        };
        value
    }

    /// The event that it is about, by its Message-ID.
    fn cause(&self) -> Result<EventId> {
        let id = self.header("Message-ID").trim_start_matches('<').split('@').next().unwrap_or_default();
        id.parse().with_context(|| format!("no Message-ID of ours: {id}"))
    }
}

fn letters(dir: &Path) -> Result<Vec<Letter>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "eml"));
    files.sort();
    let letter = |path: PathBuf| {
        let text = std::fs::read_to_string(&path)?;
        let (head, _) = text.split_once("\r\n\r\n").with_context(|| format!("{} has no body", path.display()))?;
        ensure!(text.is_ascii() && text.lines().all(|line| line.len() < 1000), "{} is no mail", path.display());
        let head = head.replace("\r\n ", " ");
        let headers = head.split("\r\n").filter_map(|line| line.split_once(": "));
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        // Quoted-printable, as far as ASCII needs it.
        Ok(Letter { headers, text: text.replace("=\r\n", "").replace("=3D", "=") })
    };
    files.into_iter().map(letter).collect()
}

/// A change of stock that must be told.
#[derive(Clone, Debug)]
struct Cause {
    event_id: EventId,
    product: ProductDetails,
    quantity: u32,
    threshold: u32,
}

/// What must be told, in the order of the ledger: by the contract's words, and by nothing of the service.
async fn causes(world: &World) -> Result<Vec<Cause>> {
    let mut products: HashMap<ProductId, ProductDetails> = HashMap::new();
    let mut causes = Vec::new();
    for (message, event) in world.events().await? {
        match event {
            LedgerEvent::ProductRegistered(registered) => {
                products.insert(registered.0.product_id, registered.0);
            }
            LedgerEvent::ProductRevised(revised) => {
                products.insert(revised.0.product_id, revised.0);
            }
            LedgerEvent::InventoryUpdated(updated) => {
                let product = products[&updated.product_id].clone();
                let threshold = product.low_stock_threshold.unwrap_or(LOW_STOCK_THRESHOLD);
                if updated.new_quantity <= threshold && updated.trigger != Trigger::ScheduledSync {
                    let event_id = message.parse()?.event_id;
                    causes.push(Cause { event_id, product, quantity: updated.new_quantity, threshold });
                }
            }
            _ => {}
        }
    }
    Ok(causes)
}

/// Everything in `NOTIFICATIONS`.
async fn published(world: &World) -> Result<Vec<lomash_contract::Envelope<LowStock>>> {
    let stream = world.context.get_stream("NOTIFICATIONS").await?;
    let last = stream.cached_info().state.last_sequence;
    let mut found = Vec::new();
    for sequence in 1..=last {
        let message = stream.get_raw_message(sequence).await?;
        assert_eq!(message.subject.as_str(), Topic::NotificationsLowStock.as_str());
        let envelope = codec::decode::<LowStock>(ContentType::Json, &message.payload)?;
        let id = message.headers.get(async_nats::header::NATS_MESSAGE_ID).map(|id| id.as_str().to_owned());
        assert_eq!(id, Some(envelope.event_id.to_string()));
        found.push(envelope);
    }
    Ok(found)
}

async fn consumer(world: &World) -> Result<async_nats::jetstream::consumer::Info> {
    let consumer: async_nats::jetstream::consumer::PullConsumer =
        world.context.get_consumer_from_stream(streams::NOTIFICATION, streams::INVENTORY).await?;
    Ok(consumer.cached_info().clone())
}

async fn settled(world: &World, within: Duration) -> Result<()> {
    received(world, within).await?;
    let database = world.database().await?;
    eventually("everything to be published and mailed", within, async || {
        let open = "SELECT (SELECT count(*) FROM notification.alerts WHERE published_at IS NULL)
                         + (SELECT count(*) FROM notification.mails WHERE state = 'waiting')";
        let open = count(&database, open).await?;
        ensure!(open == 0, "{open} wait");
        Ok(Some(()))
    })
    .await
}

/// Waits until the consumer has nothing left.
async fn received(world: &World, within: Duration) -> Result<()> {
    eventually("the consumer to have nothing left", within, async || {
        let info = consumer(world).await?;
        ensure!(
            info.num_pending == 0 && info.num_ack_pending == 0,
            "{} and {}",
            info.num_pending,
            info.num_ack_pending
        );
        Ok(Some(()))
    })
    .await
}

/// Sells one unit at a time until nothing is left, in orders of their own.
async fn sell_out(world: &World, product: ProductId, stock: u32) -> Result<()> {
    let orders: Vec<_> = (0..stock).map(|_| order(&[(product, 1)])).collect();
    world.publish_all(&orders).await?;
    world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    Ok(())
}

async fn set(world: &World, product: ProductId, quantity: u32) -> Result<()> {
    world.act(product, Action::SetQuantity { quantity, expected_quantity: None }).await?;
    Ok(())
}

async fn amend(world: &World, product: ProductId, threshold: Option<u32>) -> Result<()> {
    let amendment = Amendment { low_stock_threshold: Some(threshold), ..Amendment::default() };
    world.act(product, Action::Amend(amendment)).await?;
    Ok(())
}

#[tokio::test]
async fn each_qualifying_change_is_told_once_on_nats_and_by_mail() -> Result<()> {
    let mut scene = Scene::start().await?;
    let world = &scene.world;
    let sink = world.register("SINK-1", 6).await?;
    sell_out(world, sink, 6).await?;
    // A threshold of its own, raised and taken away again.
    let oven = world.register("OVEN-60", 50).await?;
    amend(world, oven, Some(40)).await?;
    for quantity in [41, 40, 39] {
        set(world, oven, quantity).await?;
    }
    amend(world, oven, None).await?;
    set(world, oven, 20).await?;
    // A correction by reconciliation raises no alert, neither does what is above the threshold.
    let lamp = world.register("LAMP-9", 9).await?;
    let at = Count { quantity: 1, counted_at: Timestamp::now(), counted_by: CountedBy::Warehouse };
    world.act(lamp, Action::CorrectCount { count: at, stock_at_count: 9 }).await?;
    set(world, lamp, 100).await?;
    scene.settled().await?;
    let causes = scene.check(0).await?;
    assert_eq!(causes.len(), 6, "4 sales at or below 3 and 2 changes below 40: {causes:?}");

    // What is said is what happened.
    let alerts = published(world).await?;
    for (cause, alert) in causes.iter().zip(&alerts) {
        let LowStock { product_id, sku, quantity, threshold, caused_by } = &alert.payload;
        let said = (*product_id, sku, *quantity, *threshold, *caused_by);
        let product = &cause.product;
        assert_eq!(said, (product.product_id, &product.sku, cause.quantity, cause.threshold, cause.event_id));
    }
    for (cause, mail) in causes.iter().zip(scene.mails()?) {
        let ProductDetails { product_id, sku, name, .. } = &cause.product;
        let left = if cause.quantity == 0 {
            format!("Out of stock: {name} ({sku})")
        } else {
            format!("Low stock: {name} ({sku}), {} left", cause.quantity)
        };
        assert_eq!(
            (mail.header("Subject"), mail.cause()?),
            (left.as_str(), cause.event_id),
            "in the order of the ledger"
        );
        assert_eq!(mail.header("To"), "Team <team@lomash.example>, boss@lomash.example");
        assert_eq!(mail.header("Auto-Submitted"), "auto-generated");
        assert!(mail.text.contains(&format!("https://shop.example/products/{product_id}")), "{}", mail.text);
        let recipients = mail.headers.iter().filter(|(name, _)| name == "Delivered-To").count();
        assert_eq!(recipients, 2, "{}", mail.text);
    }

    // An operator sees it, a page at a time; whoever has no token does not.
    let viewer = Caller::new(&world.url("notification"), Role::Viewer)?;
    let first = viewer.get("/v1/notifications?mail=sent&limit=4").send().await?;
    let cursor = first.json["nextCursor"].as_str().context("a second page")?.to_owned();
    let rest = viewer.get(&format!("/v1/notifications?mail=sent&limit=4&cursor={cursor}")).send().await?;
    let listed: Vec<String> = [&first, &rest]
        .iter()
        .flat_map(|page| page.json["items"].as_array().unwrap())
        .map(|item| {
            assert_eq!(item["mail"]["state"], "sent");
            assert!(item["publishedAt"].is_string() && item["mail"]["sentAt"].is_string(), "{item}");
            item["causedBy"].as_str().unwrap().to_owned()
        })
        .collect();
    let newest_first: Vec<String> = causes.iter().rev().map(|cause| cause.event_id.to_string()).collect();
    assert_eq!((listed, rest.json["nextCursor"].is_null()), (newest_first, true));
    let of_product = viewer.get(&format!("/v1/notifications?productId={oven}")).send().await?;
    assert_eq!(of_product.json["items"].as_array().unwrap().len(), 2);
    assert_eq!(viewer.get("/v1/notifications?mail=failed").send().await?.json["items"].as_array().unwrap().len(), 0);
    assert_eq!(viewer.get("/v1/notifications?limit=0").send().await?.problem(), "validation-failed");
    assert_eq!(viewer.get("/v1/notifications?limit=1&cursor=x").send().await?.problem(), "invalid-cursor");
    assert_eq!(viewer.with_token(None).get("/v1/notifications").send().await?.status, 401);
    let ready = eventually("every part to be ready", PATIENCE, async || {
        let ready = viewer.get("/readyz").send().await?;
        let all = ready.json["checks"].as_array().context("no checks")?.iter().all(|check| check["ready"] == true);
        ensure!(all, "{}", ready.text);
        Ok(Some(ready))
    });
    assert_eq!(ready.await?.status, 200);
    let metrics = viewer.at(&world.health_url("notification")).get("/metrics").send().await?.text;
    for line in [
        "lomash_alerts_recorded_total 6",
        "lomash_alerts_published_total 6",
        "lomash_mails_total{outcome=\"sent\"} 6",
        // An alert asks for it.
        "# TYPE lomash_alerts_waiting gauge",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    let status = lomash::status::status(&world.context, Some(&world.database_url())).await;
    let lomash::status::Answer::Found(alerts) = &status.alerts else { panic!("{status:?}") };
    assert_eq!((alerts.recorded, alerts.to_publish, alerts.to_mail), (6, 0, 0));
    assert!(status.consumers.iter().any(|part| part.name == "INVENTORY/notification"), "{status:?}");

    // The whole stream again, by an operator's hand and by rules that would find more: nothing.
    scene.service.stop().await?;
    let ledger = world.context.get_stream(streams::INVENTORY).await?;
    ledger.delete_consumer(streams::NOTIFICATION).await?;
    scene.service.set_env("LOW_STOCK_THRESHOLD", "1000");
    start_until_ready(&mut scene.service).await?;
    scene.settled().await?;
    assert_eq!(consumer(world).await?.delivered.stream_sequence, ledger_end(world).await?, "all of it was read again");
    assert_eq!((scene.mails()?.len(), published(world).await?.len()), (6, 6));
    scene.end().await
}

async fn ledger_end(world: &World) -> Result<u64> {
    let events = world.events().await?;
    let read = |event: &LedgerEvent| {
        matches!(
            event,
            LedgerEvent::InventoryUpdated(_) | LedgerEvent::ProductRegistered(_) | LedgerEvent::ProductRevised(_)
        )
    };
    Ok(events.iter().filter(|(_, event)| read(event)).map(|(message, _)| message.sequence).max().unwrap_or(0))
}

/// The service dies at each point between hearing of a cause and having recorded its mail.
async fn dies_and_recovers(point: &str) -> Result<()> {
    let mut scene = Scene::set().await?;
    scene.service.set_env("FAILPOINTS", format!("{point}=3*off->return"));
    start_until_ready(&mut scene.service).await?;
    let products = scene.world.register_many(4, 5).await?;
    // One product after the other is through, so that each passes the point once at least, however much is taken at once.
    for product in products {
        sell_out(&scene.world, product, 5).await?;
        tokio::select! {
            _ = scene.service.ended() => {}
            through = scene.settled() => through?,
        }
    }
    let died = tokio::time::timeout(PATIENCE, scene.service.ended()).await;
    let died = died.with_context(|| format!("the service came through {point} alive"))?;
    assert!(!died.success(), "it aborts at {point}: {died}");
    scene.service.remove_env("FAILPOINTS");
    scene.service.kill();
    start_until_ready(&mut scene.service).await?;
    scene.settled().await?;
    // Wherever it dies, another mail may just be on its way.
    let causes = scene.check(1).await?;
    assert_eq!(causes.len(), 4 * 4);
    if point == "notify-after-send" {
        assert_eq!(scene.mails()?.len(), 17, "the point is behind the server's answer, so exactly one comes twice");
    }
    scene.end().await
}

macro_rules! crash_points {
    ($($name:ident at $point:literal;)*) => {
        $(#[tokio::test]
        async fn $name() -> Result<()> {
            dies_and_recovers($point).await
        })*
    };
}

crash_points! {
    dying_before_an_alert_is_recorded at "notify-before-record";
    dying_before_the_cause_is_acknowledged at "notify-after-record";
    dying_before_the_notification_is_published at "notify-before-publish";
    dying_before_the_publication_is_recorded at "notify-after-publish";
    dying_before_the_mail_is_sent at "notify-before-send";
    dying_before_the_mail_is_recorded_as_sent at "notify-after-send";
    dying_after_the_mail_is_recorded_as_sent at "notify-after-mail-recorded";
}

/// While there is no mail server, alerts are published and recorded; then all are mailed.
#[tokio::test]
async fn a_mail_server_that_is_away_holds_up_nothing_but_mails() -> Result<()> {
    let mut scene = Scene::start().await?;
    scene.mail.kill();
    let products = scene.world.register_many(3, 4).await?;
    for product in &products {
        sell_out(&scene.world, *product, 4).await?;
    }
    received(&scene.world, PATIENCE).await?;
    eventually("all to be published without a mail server", PATIENCE, async || {
        Ok((published(&scene.world).await?.len() == 12).then_some(()))
    })
    .await?;
    let caller = Caller::new(&scene.world.url("notification"), Role::Viewer)?;
    let waiting = caller.get("/v1/notifications?mail=waiting").send().await?;
    assert_eq!(waiting.json["items"].as_array().unwrap().len(), 12);
    eventually("the mail server to be missed", PATIENCE, async || {
        let ready = caller.get("/readyz").send().await?;
        assert_eq!(ready.status, 200, "it is not required");
        let smtp =
            ready.json["checks"].as_array().and_then(|checks| checks.iter().find(|check| check["name"] == "smtp"));
        Ok(smtp.filter(|smtp| smtp["ready"] == false).map(|_| ()))
    })
    .await?;
    scene.mail.restart().await?;
    scene.settled().await?;
    scene.check(0).await?;
    scene.end().await
}

/// Killed when it has a mail and has not said so, again and again: each kill costs one mail twice at most.
#[tokio::test]
async fn a_mail_server_killed_after_data_costs_one_mail_twice() -> Result<()> {
    const KILLS: usize = 3;
    let mut scene = Scene::start().await?;
    let product = scene.world.register("SINK-1", 12).await?;
    let slow = Behaviour { delay_ms: 60_000, ..Behaviour::default() };
    for kill in 0..KILLS {
        Behaviour::set(scene.mail.dir(), Some(&slow))?;
        let before = scene.mails()?.len();
        set(&scene.world, product, u32::try_from(kill % 2)?).await?;
        eventually("the server to have a mail", PATIENCE, async || Ok((scene.mails()?.len() > before).then_some(())))
            .await?;
        scene.mail.kill();
        Behaviour::set(scene.mail.dir(), None)?;
        scene.mail.restart().await?;
        scene.settled().await?;
    }
    scene.check(KILLS).await?;
    assert_eq!(scene.mails()?.len(), 2 * KILLS, "each was taken twice, under one Message-ID");
    // The same without dying: it takes a mail and closes the connection instead of saying so.
    let rude = Behaviour { drop_after_data: true, ..Behaviour::default() };
    Behaviour::set(scene.mail.dir(), Some(&rude))?;
    set(&scene.world, product, 2).await?;
    eventually("the server to have it", PATIENCE, async || Ok((scene.mails()?.len() > 2 * KILLS).then_some(())))
        .await?;
    Behaviour::set(scene.mail.dir(), None)?;
    scene.settled().await?;
    let causes = causes(&scene.world).await?;
    let told: BTreeSet<_> = scene.mails()?.iter().map(Letter::cause).collect::<Result<_>>()?;
    assert_eq!(told, causes.iter().map(|cause| cause.event_id).collect());
    scene.end().await
}

/// A mail that is not taken now, one that never is, and a recipient who has left: the others are not held up.
#[tokio::test]
async fn mails_that_are_refused_hold_up_no_others() -> Result<()> {
    let scene = Scene::start().await?;
    let world = &scene.world;
    let (greylisted, good) = (world.register("GREY-1", 9).await?, world.register("GOOD-1", 9).await?);
    let refuse = |matching: &str, code| Behaviour {
        matching: matching.to_owned(),
        refuse: Some((code, "4.7.1 not \x07like this".to_owned())),
        ..Behaviour::default()
    };
    Behaviour::set(scene.mail.dir(), Some(&refuse("GREY-1", 451)))?;
    set(world, greylisted, 1).await?;
    let caller = Caller::new(&world.url("notification"), Role::Viewer)?;
    let of = async |product: ProductId| -> Result<serde_json::Value> {
        let listed = caller.get(&format!("/v1/notifications?productId={product}")).send().await?;
        Ok(listed.json["items"][0]["mail"].clone())
    };
    let put_off = eventually("the mail to be put off twice", PATIENCE, async || {
        let mail = of(greylisted).await?;
        ensure!(mail["failedAttempts"].as_u64().unwrap_or(0) >= 2, "{mail}");
        Ok(Some(mail))
    });
    let put_off = put_off.await?;
    assert_eq!(put_off["state"], "waiting");
    assert!(put_off["problem"].as_str().unwrap().contains("451"), "{put_off}");
    set(world, good, 2).await?;
    let sent = |what: &'static str, product| {
        let of = &of;
        eventually(what, PATIENCE, async move || Ok((of(product).await?["state"] == "sent").then_some(())))
    };
    sent("another mail to overtake it", good).await?;
    assert_eq!(scene.mails()?.len(), 1);
    Behaviour::set(scene.mail.dir(), None)?;
    sent("the first one to follow", greylisted).await?;

    // Refused for good: said so, and not tried again.
    let bad = world.register("BAD-1", 9).await?;
    Behaviour::set(scene.mail.dir(), Some(&refuse("BAD-1", 554)))?;
    set(world, bad, 1).await?;
    let failed = eventually("the refusal to be recorded", PATIENCE, async || {
        let mail = of(bad).await?;
        Ok((mail["state"] == "failed").then_some(mail))
    });
    let failed = failed.await?;
    assert!(failed["problem"].as_str().unwrap().contains("554"), "{failed}");
    assert_eq!(failed["failedAttempts"], 1);
    Behaviour::set(scene.mail.dir(), None)?;
    set(world, good, 1).await?;
    scene.settled().await?;
    assert_eq!(published(world).await?.len(), 4, "all were told on NATS");
    assert_eq!(scene.mails()?.len(), 3, "and all but one by mail");

    // One recipient has left, the other one is told.
    let gone = Behaviour { unknown_recipient: Some("boss@lomash.example".to_owned()), ..Behaviour::default() };
    Behaviour::set(scene.mail.dir(), Some(&gone))?;
    set(world, good, 0).await?;
    scene.settled().await?;
    let mail = of(good).await?;
    assert_eq!(mail["state"], "sent");
    assert!(mail["problem"].as_str().unwrap().contains("boss@lomash.example"), "{mail}");
    let last = scene.mails()?.pop().context("a mail")?;
    assert_eq!(last.headers.iter().filter(|(name, _)| name == "Delivered-To").count(), 1);
    scene.end().await
}

/// A mail server of its own, not the stack's: with a user, and encrypted.
async fn start_sink(world: &World, tls: &str) -> Result<(Service, u16, PathBuf)> {
    let dir = world.dir().join(format!("sink-{tls}"));
    let port = free_port()?;
    let mut sink = Service::new("mail-sink", &lomash::up::program("lomash-under-test")?, &world.dir().join("sink.log"))
        .args(["mail-sink", "--tls", tls, "--user", "us@er", "--listen", &format!("127.0.0.1:{port}"), "--dir"])
        .args([&dir])
        .env("MAIL_SINK_PASSWORD", "p/w: hunter2");
    sink.start()?;
    let (ca, address) = (dir.join("tls").join("ca.pem"), ("127.0.0.1", port));
    eventually("the mail server to listen", PATIENCE, async || {
        tokio::net::TcpStream::connect(address).await?;
        Ok(Some(()))
    })
    .await?;
    Ok((sink, port, ca))
}

#[tokio::test]
async fn mails_are_encrypted_and_authenticated_or_not_sent() -> Result<()> {
    let world = World::start().await?;
    let product = world.run_service().await?;
    let sku = world.register("SINK-1", 9).await?;
    let mut quantity = 3;
    for tls in ["starttls", "implicit"] {
        let (mut sink, port, ca) = start_sink(&world, tls).await?;
        let mails = || letters(&world.dir().join(format!("sink-{tls}")));
        let url = |password: &str| match tls {
            "starttls" => format!("smtp://us%40er:{password}@127.0.0.1:{port}?tls=required"),
            _ => format!("smtps://us%40er:{password}@127.0.0.1:{port}/client.example"),
        };
        let mut service = notification(&world, "notification", &url("p%2Fw%3A%20hunter2"))?;
        start_until_ready(&mut service).await?;
        quantity -= 1;
        set(&world, sku, quantity).await?;
        let complains = async |service: &Service, of: &str, what: &'static str| {
            let log = || std::fs::read_to_string(service.log()).unwrap_or_default();
            eventually(what, PATIENCE, async || Ok(log().contains(of).then_some(()))).await
        };
        // Nobody has told it to trust this authority.
        complains(&service, "certificate", "the certificate to be refused").await?;
        received(&world, TAKEOVER_BOUND).await?;
        assert_eq!(mails()?.len(), 0);
        service.stop().await?;
        // The wrong password: no mail either, and it is no fault of the mail.
        service.set_env("SMTP_CA_FILE", &ca);
        service.set_env("SMTP_URL", url("wrong"));
        start_until_ready(&mut service).await?;
        complains(&service, "535", "the password to be refused").await?;
        service.stop().await?;
        assert_eq!(mails()?.len(), 0);
        // All is well, and what waited is sent.
        service.set_env("SMTP_URL", url("p%2Fw%3A%20hunter2"));
        start_until_ready(&mut service).await?;
        settled(&world, TAKEOVER_BOUND).await?;
        assert_eq!(mails()?.len(), 1);
        service.stop().await?;
        let log = std::fs::read_to_string(service.log())?;
        assert!(!log.contains("hunter2"), "{log}");
        sink.kill();
    }
    product.stop().await?;
    world.close();
    Ok(())
}

/// Two replicas share the mails, whichever of them is killed, and whatever it has in hand.
#[tokio::test]
async fn two_replicas_tell_everything_once() -> Result<()> {
    let mut scene = Scene::start().await?;
    let mut second = notification(&scene.world, "notification-2", &scene.mail.url())?;
    start_until_ready(&mut second).await?;
    // Both have the same mails to send, and at the same time.
    scene.mail.kill();
    for product in scene.world.register_many(60, 2).await? {
        set(&scene.world, product, 1).await?;
    }
    received(&scene.world, PATIENCE).await?;
    scene.mail.restart().await?;
    scene.settled().await?;
    assert_eq!(scene.check(0).await?.len(), 120);
    let mut dice = Dice::thrown();
    let skus: Vec<String> = (0..12).map(|number| format!("OVEN-{number}")).collect();
    let products = futures::future::try_join_all(skus.iter().map(|sku| scene.world.register(sku, 30))).await?;
    let orders: Vec<_> = (0..150).map(|_| dice.order(&products, 4, 3)).collect();
    scene.world.publish_all(&orders[..70]).await?;
    scene.world.decided(orders[..70].iter().map(|order| order.payload.order_id)).await?;
    eventually("the first mails", PATIENCE, async || Ok((scene.mails()?.len() > 121).then_some(()))).await?;
    scene.service.kill();
    scene.world.publish_all(&orders[70..]).await?;
    scene.world.decided(orders.iter().map(|order| order.payload.order_id)).await?;
    settled(&scene.world, TAKEOVER_BOUND).await?;
    let causes = scene.check(1).await?;
    assert!(causes.len() > 126, "{}", causes.len());
    start_until_ready(&mut scene.service).await?;
    second.stop().await?;
    // The other one is pinned now.
    set(&scene.world, products[0], 500).await?;
    set(&scene.world, products[0], 1).await?;
    scene.settled().await?;
    scene.check(1).await?;
    scene.end().await
}

/// A replica dies with a raised threshold in hand that nobody has recorded. The next change is judged by it all the same.
#[tokio::test]
async fn a_change_is_judged_by_the_threshold_before_it_whoever_had_that_in_hand() -> Result<()> {
    let mut scene = Scene::start().await?;
    let product = scene.world.register("SINK-1", 50).await?;
    scene.settled().await?;
    // With Postgres paused the first replica gets the revision and cannot record it.
    let postgres = scene.world.postgres.as_ref().context("a Postgres")?;
    postgres.pause()?;
    amend(&scene.world, product, Some(20)).await?;
    eventually("the first replica to have the revision in hand", PATIENCE, async || {
        Ok((consumer(&scene.world).await?.num_ack_pending > 0).then_some(()))
    })
    .await?;
    scene.service.kill();
    scene.world.postgres.as_ref().context("a Postgres")?.resume()?;
    // The second one is there and hears of the change long before the revision comes back.
    start_until_ready(&mut scene.service).await?;
    set(&scene.world, product, 15).await?;
    scene.settled().await?;
    let causes = scene.check(0).await?;
    assert_eq!(causes.iter().map(|cause| (cause.quantity, cause.threshold)).collect::<Vec<_>>(), [(15, 20)]);
    scene.end().await
}

#[tokio::test]
async fn names_are_only_names_in_a_mail() -> Result<()> {
    let scene = Scene::start().await?;
    let world = &scene.world;
    let names = [
        "</td><script>alert(1)</script>",
        "=?utf-8?q?=0d=0aBcc:_victim@example.com?=",
        "Spüle \"Ünal\" \u{202e}gnp.exe",
        &"é".repeat(200),
    ];
    for (number, name) in names.iter().enumerate() {
        let product_id = ProductId(Uuid::new_v4());
        let details = Details { name: (*name).into(), ..details(&format!("<b>&\"'{number}"))? };
        world.act(product_id, Action::Register { details, initial_quantity: 2 }).await?;
    }
    scene.settled().await?;
    scene.check(0).await?;
    let mut readable = 0;
    for mail in scene.mails()? {
        let known = [
            "Return-Path",
            "Delivered-To",
            "From",
            "To",
            "Subject",
            "Date",
            "Message-ID",
            "Auto-Submitted",
            "MIME-Version",
            "Content-Type",
        ];
        for (name, _) in &mail.headers {
            assert!(known.contains(&name.as_str()), "{name} in\n{}", mail.text);
        }
        // What looks like an encoded word is encoded itself, so that a reader shows it as it is.
        assert!(!mail.text.to_ascii_lowercase().contains("subject: low stock: =?utf-8?q?"), "{}", mail.text);
        // Much that is not ASCII makes it base64; what is in there is checked where mails are written.
        if let Some((_, html)) = mail.text.split_once("<!doctype html>") {
            assert!(!html.contains("<script>") && !html.contains("<b>&"), "{html}");
            readable += 1;
        }
        assert!(mail.text.contains("From: \"Lomash Inventory\" <inventory@lomash.example>"), "{}", mail.text);
    }
    assert!(readable >= 2, "{readable}");
    scene.end().await
}

#[tokio::test]
async fn the_edge_is_mailed_and_the_recovery() -> Result<()> {
    let mut scene = Scene::set().await?;
    scene.service.set_env("MAIL_POLICY", "edge");
    start_until_ready(&mut scene.service).await?;
    let world = &scene.world;
    let product = world.register("SINK-1", 9).await?;
    for quantity in [3, 2, 1, 5, 4, 2, 8] {
        set(world, product, quantity).await?;
    }
    // A correction makes it low and says nothing; the next sale does.
    let at = Count { quantity: 2, counted_at: Timestamp::now(), counted_by: CountedBy::Warehouse };
    world.act(product, Action::CorrectCount { count: at, stock_at_count: 8 }).await?;
    set(world, product, 1).await?;
    scene.settled().await?;
    let subjects: Vec<String> = scene.mails()?.iter().map(|mail| mail.header("Subject").to_owned()).collect();
    let expected = [
        "Low stock: Product SINK-1 (SINK-1), 3 left",
        "Stock recovered: Product SINK-1 (SINK-1), 5 in stock",
        "Low stock: Product SINK-1 (SINK-1), 2 left",
        "Stock recovered: Product SINK-1 (SINK-1), 8 in stock",
        "Low stock: Product SINK-1 (SINK-1), 1 left",
    ];
    assert_eq!(subjects, expected);
    assert_eq!(published(world).await?.len(), causes(world).await?.len(), "on NATS every qualifying change is told");
    let viewer = Caller::new(&world.url("notification"), Role::Viewer)?;
    let silent = viewer.get("/v1/notifications?mail=none").send().await?;
    let silent = silent.json["items"].as_array().unwrap();
    assert!(silent.len() == 2 && silent.iter().all(|item| item["mail"]["reason"] == "edge"), "{silent:?}");
    scene.end().await
}

#[tokio::test]
async fn a_digest_is_one_mail_a_period() -> Result<()> {
    let mut scene = Scene::set().await?;
    scene.service.set_env("MAIL_POLICY", "digest");
    scene.service.set_env("MAIL_DIGEST_SECONDS", "4");
    start_until_ready(&mut scene.service).await?;
    let world = &scene.world;
    let products = world.register_many(3, 5).await?;
    for product in &products {
        sell_out(world, *product, 5).await?;
    }
    scene.settled().await?;
    let causes = causes(world).await?;
    assert_eq!((causes.len(), published(world).await?.len()), (12, 12));
    let mails = scene.mails()?;
    // The changes may lie on both sides of a period's end, or of two.
    assert!((1..=4).contains(&mails.len()), "{mails:?}");
    let ids: BTreeSet<_> = mails.iter().map(|mail| mail.header("Message-ID").to_owned()).collect();
    assert_eq!(ids.len(), mails.len());
    for product in causes.iter().map(|cause| cause.product.sku.as_str()) {
        assert!(mails.iter().any(|mail| mail.text.contains(&format!("({product})"))), "{product}: {mails:?}");
    }
    let told: i64 = count(&world.database().await?, "SELECT count(DISTINCT mail_id) FROM notification.alerts").await?;
    assert_eq!(usize::try_from(told)?, mails.len());
    scene.end().await
}

/// An old ledger, seen for the first time: recorded and published, and no mail about the past.
#[tokio::test]
async fn the_past_is_not_mailed() -> Result<()> {
    let mut scene = Scene::set().await?;
    let product = scene.world.register("SINK-1", 6).await?;
    sell_out(&scene.world, product, 6).await?;
    scene.service.set_env("MAIL_MAX_AGE_SECONDS", "0");
    start_until_ready(&mut scene.service).await?;
    scene.settled().await?;
    assert_eq!((published(&scene.world).await?.len(), scene.mails()?.len()), (4, 0));
    let viewer = Caller::new(&scene.world.url("notification"), Role::Viewer)?;
    let listed = viewer.get("/v1/notifications?mail=none").send().await?;
    let items = listed.json["items"].as_array().unwrap();
    assert!(items.len() == 4 && items.iter().all(|item| item["mail"]["reason"] == "old"), "{listed:?}");

    // The schema is dropped under the running service: the ledger is read again, and its alerts are there again.
    let database = scene.world.database().await?;
    database.batch_execute("DROP SCHEMA notification CASCADE").await?;
    scene.service.restart()?;
    eventually("the alerts to be found again", TAKEOVER_BOUND, async || {
        Ok((count(&database, "SELECT count(*) FROM notification.alerts").await? == 4).then_some(()))
    })
    .await?;
    scene.settled().await?;
    assert_eq!(scene.mails()?.len(), 0);
    let again = published(&scene.world).await?;
    assert!(
        again.iter().map(|alert| alert.event_id).collect::<BTreeSet<_>>().len() == 4,
        "the ids are the same: {again:?}"
    );
    scene.end().await
}

#[tokio::test]
async fn what_is_no_event_becomes_a_dead_letter_and_holds_up_nothing() -> Result<()> {
    let scene = Scene::start().await?;
    let world = &scene.world;
    let product = world.register("SINK-1", 9).await?;
    let keyed = format!("{}.{product}", Topic::InventoryUpdated.as_str());
    let mut headers = HeaderMap::new();
    headers.insert(header::TRACEPARENT, "00-nonsense\u{1}");
    let poison = world.context.publish_with_headers(keyed.clone(), headers, "no event at all".into()).await?.await?;
    // An event by form, and not by what it continues.
    let event = world.events().await?.into_iter().find_map(|(message, event)| match event {
        LedgerEvent::InventoryUpdated(updated) => Some((message, updated)),
        _ => None,
    });
    let (message, updated) = event.context("the first stock")?;
    let mut forged = message.parse()?.map(|_| updated);
    forged.event_id = EventId(Uuid::new_v4());
    forged.payload.new_quantity = 1;
    forged.payload.previous_quantity = 2;
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, forged.event_id.to_string());
    let payload = codec::encode(ContentType::Json, &forged).into();
    let forged = world.context.publish_with_headers(keyed, headers, payload).await?.await?;
    set(world, product, 3).await?;
    scene.settled().await?;
    assert_eq!(scene.mails()?.len(), 1);
    let letters = world.context.get_stream(dead_letter::STREAM).await?;
    assert_eq!(letters.cached_info().state.messages, 2);
    for (number, sequence, why) in [(1, poison.sequence, "not a valid"), (2, forged.sequence, "the chain is broken")] {
        let letter = letters.get_raw_message(number).await?;
        let text = |name: &str| letter.headers.get(name).map(|value| value.as_str().to_owned()).unwrap_or_default();
        assert_eq!(letter.subject.as_str(), subject::dead_letter(streams::NOTIFICATION));
        assert_eq!(text(dead_letter::ORIGIN_SEQUENCE), sequence.to_string());
        assert!(text(dead_letter::REASON).contains(why), "{}", text(dead_letter::REASON));
    }
    scene.end().await
}

/// The arguments of the mail server are what this file and the stack pass.
#[test]
fn the_mail_server_takes_these_arguments() {
    #[derive(Debug, clap::Parser)]
    struct Process {
        #[command(flatten)]
        sink: MailSinkArgs,
    }
    let process = <Process as clap::Parser>::try_parse_from(["sink", "--listen", "127.0.0.1:0", "--dir", "."]).unwrap();
    assert!(process.sink.tls == Tls::Starttls && process.sink.user.is_none());
}
