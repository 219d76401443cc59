//! Every identity of `deploy/nats/accounts.conf` on a real server: what it needs works, and everything else is refused,
//! with raw clients that do what a thief of its key would.
//!
//! Owns the table of identity × operation. The ledger's last sequence and every stream's configuration are looked at after
//! each attempt: a refusal that comes too late would be none.
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, ServerError};
use futures::StreamExt;
use lomash::stack::{Credentials, SecureNats, Service, Who, free_port, lay_out, log_tail, scratch};
use lomash_contract::Topic;
use lomash_ledger::upkeep::{self, Action as Step};
use lomash_ledger::{JetStreamLedger, Ledger, dead_letter, streams};
use lomash_platform::nats::{self, Refusals};
use lomash_tests::http::Caller;
use lomash_tests::{JWT_SECRET, PATIENCE, eventually, nowhere, order, ready_at};
use lomash_web::Role;
use product_service::commands::WRITER_SUBJECT;
use serde_json::{Value, json};
use time::OffsetDateTime;
use uuid::Uuid;

/// How long an answer or a refusal may take to come.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a service that must not start may take to say why.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(45);

/// The consumers of the other services, as their definitions will have them.
const CONSUMERS: [&str; 2] = ["analytics", "notification"];

/// A secured server of its own, with the streams made by the administrator.
struct Secured {
    admin: Context,
    nats: SecureNats,
    credentials: Credentials,
    dir: tempfile::TempDir,
}

impl Secured {
    async fn start() -> Result<Self> {
        let dir = scratch()?;
        let credentials = Credentials::open(&dir.path().join("keys"))?;
        let folder = dir.path().join("nats");
        lay_out(&folder, "single", &credentials, None, None)?;
        let nats = SecureNats::start(&folder).await?;
        let (client, _) = connect(&nats, &credentials, Who::Administrator).await?;
        let admin = jetstream::new(client);
        streams::wait_until_ready(&admin).await?;
        for step in upkeep::plan(&admin, 1).await? {
            assert_eq!(step.action, Step::Create, "a fresh server has {}", step.name);
            upkeep::carry_out(&admin, &step).await?;
        }
        let secured = Self { admin, nats, credentials, dir };
        for consumer in CONSUMERS.into_iter().filter(|consumer| !streams::is_defined(streams::INVENTORY, consumer)) {
            let config = json!({ "durable_name": consumer, "ack_policy": "explicit", "ack_wait": 30_000_000_000_u64 });
            let body = json!({ "stream_name": streams::INVENTORY, "config": config });
            let made: Value = secured.admin.request(format!("CONSUMER.CREATE.INVENTORY.{consumer}"), &body).await?;
            assert_eq!(made.get("error"), None, "{consumer}");
        }
        Ok(secured)
    }

    async fn connect(&self, who: Who) -> Result<(Client, Refusals)> {
        connect(&self.nats, &self.credentials, who).await
    }

    async fn client(&self, who: Who) -> Result<Client> {
        Ok(self.connect(who).await?.0)
    }

    /// A service as a child that is told to be `who`; not started.
    fn service(&self, name: &str, who: Who) -> Result<Service> {
        let service = Service::new(
            name,
            &lomash::up::program("product-service-under-test")?,
            &self.dir.path().join(format!("{name}.log")),
        )
        .env("NATS_URL", self.nats.url())
        .env("DATABASE_URL", nowhere().expose())
        .listen(([127, 0, 0, 1], free_port()?).into())
        .env("JWT_HS256_SECRET", JWT_SECRET);
        Ok(self.credentials.variables(who).into_iter().fold(service, |service, (name, value)| service.env(name, value)))
    }

    async fn last_sequence(&self) -> Result<u64> {
        Ok(JetStreamLedger::new(self.admin.clone(), streams::INVENTORY).last_sequence().await?)
    }

    /// Everything that a thief could have changed about streams and consumers.
    async fn look(&self) -> Result<Value> {
        let mut seen = Vec::new();
        for definition in streams::definitions() {
            let info: Value = self.admin.request(format!("STREAM.INFO.{}", definition.name), &json!({})).await?;
            let consumers: Value = self.admin.request(format!("CONSUMER.LIST.{}", definition.name), &json!({})).await?;
            let consumers: Vec<Value> = consumers["consumers"]
                .as_array()
                .context("a list of consumers")?
                .iter()
                .map(|consumer| {
                    json!([consumer["config"], consumer["ack_floor"], consumer["paused"], consumer["created"]])
                })
                .collect();
            seen.push(json!([info["config"], info["created"], info["state"]["messages"], consumers]));
        }
        Ok(seen.into())
    }
}

async fn connect(server: &SecureNats, credentials: &Credentials, who: Who) -> Result<(Client, Refusals)> {
    nats::connect_as(&server.url(), &credentials.identity(who), who.name()).await
}

/// What came of an attempt.
#[derive(Debug)]
enum Outcome {
    /// Somebody answered.
    Answered(bytes::Bytes),
    /// The server refused, or nobody is there for it in this account.
    Refused(String),
}

/// Sends a request and waits for the first answer, on an inbox of the sender's: a message that is pulled keeps its subject.
async fn request(secured: &Secured, who: Who, subject: &str, body: &str) -> Result<Outcome> {
    let (client, refusals) = secured.connect(who).await?;
    let asking = async {
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await?;
        client.publish_with_reply(subject.to_owned(), inbox, body.to_owned().into()).await?;
        let answer = tokio::time::timeout(ANSWER, answers.next()).await;
        let case = format!("{} on {subject}: neither an answer nor a refusal", who.name());
        anyhow::Ok(answer.with_context(|| case)?.context("the connection is closed")?)
    };
    match refusals.guard(asking).await {
        Err(refusal) => Ok(Outcome::Refused(format!("{refusal:#}"))),
        Ok(Ok(answer)) if answer.status == Some(async_nats::StatusCode::NO_RESPONDERS) => {
            Ok(Outcome::Refused("nobody is there for it".to_owned()))
        }
        Ok(answer) => Ok(Outcome::Answered(answer?.payload)),
    }
}

/// Sends a request whose answer is to go to a subject of the ledger, and waits until the server has dealt with it.
async fn inject(secured: &Secured, who: Who, subject: &str, body: &str) -> Result<()> {
    let client = secured.client(who).await?;
    let target = format!("lomash.inventory.updated.{}", Uuid::new_v4());
    client.publish_with_reply(subject.to_owned(), target, body.to_owned().into()).await?;
    client.flush().await?;
    // What answers in order after it was asked has had the time to answer wrongly.
    let _: Value = secured.admin.request("INFO", &json!({})).await.context("the administrator is answered")?;
    Ok(())
}

fn ledger_subject() -> String {
    format!("{}.{}", Topic::InventoryUpdated.as_str(), Uuid::new_v4())
}

/// One row of the table.
struct Row {
    subject: String,
    body: String,
    /// Who may. The administrator is not tried where it would do harm.
    allowed: Vec<Who>,
    harmful: bool,
}

fn row(subject: impl Into<String>, body: impl ToString, allowed: &[Who]) -> Row {
    Row { subject: subject.into(), body: body.to_string(), allowed: allowed.to_vec(), harmful: false }
}

/// What only the administrator may, and what it does not try.
fn harmful(subject: impl Into<String>, body: impl ToString) -> Row {
    Row { harmful: true, ..row(subject, body, &[Who::Administrator]) }
}

/// Who may look at a stream.
fn looks(stream: &str) -> &'static [Who] {
    if matches!(stream, "NOTIFICATIONS" | "ADVISORIES") { reads("ORDERS") } else { reads(stream) }
}

/// Who may read a stream.
fn reads(stream: &str) -> &'static [Who] {
    use Who::{Administrator, Analytics, Notification, Operator, Product};
    match stream {
        "INVENTORY" => &[Product, Administrator, Operator, Analytics, Notification],
        // The product service looks at it and has nothing to read there.
        "NOTIFICATIONS" | "ADVISORIES" => &[Administrator, Operator],
        _ => &[Product, Administrator, Operator],
    }
}

/// Who may empty a stream: of the ledger nobody, of what is disposable its writer.
fn empties(stream: &str) -> &'static [Who] {
    if stream == "OBJ_SNAPSHOTS" { &[Who::Administrator, Who::Product] } else { &[Who::Administrator] }
}

/// Who may have a consumer deliver again from a sequence: its service, whose database may have been lost, and who rebuilds.
fn begins_anew(consumer: &str) -> &'static [Who] {
    match consumer {
        "analytics" => &[Who::Administrator, Who::Analytics],
        "notification" => &[Who::Administrator, Who::Notification],
        "rebuild" => &[Who::Administrator, Who::Operator],
        _ => &[Who::Administrator],
    }
}

fn table() -> Vec<Row> {
    use Who::{Administrator, Analytics, Notification, Operator, Orders, Product};
    let mut rows = vec![
        // Publishing into a stream: who owns the topic.
        row("lomash.orders.created", "{}", &[Orders, Operator, Product]),
        row("lomash.notifications.low-stock", "{}", &[Notification]),
        row("lomash.dlq.product-orders", "{}", &[Product]),
        row("lomash.dlq.analytics", "{}", &[Analytics]),
        row("lomash.dlq.notification", "{}", &[Notification]),
        row("lomash.jobs.reconciliation", "{}", &[Product]),
        row("lomash.dlq.reconciliation", "{}", &[Product]),
        row("lomash.dlq.invented", "{}", &[]),
        // Suspects, to be tried alone: those of whoever hears them.
        row("lomash.suspects.ORDERS.product-orders", "{}", &[Product]),
        row("lomash.suspects.JOBS.reconciliation", "{}", &[Product]),
        row("lomash.suspects.INVENTORY.analytics", "{}", &[]),
        row("lomash.suspects.INVENTORY.notification", "{}", &[]),
        row("lomash.suspects.ORDERS.invented", "{}", &[]),
        row("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.ORDERS.product-orders", "{}", &[]),
        row("$JS.API.CONSUMER.MSG.NEXT.ADVISORIES.analytics", r#"{"batch":1,"no_wait":true}"#, &[]),
        // Nobody may say live what only the stream may say.
        row("lomash.inventory.updated", "{}", &[]),
        row("lomash.products.updated", "{}", &[]),
        // Subjects that no topic has.
        row("lomash.inventory.invented.x", "{}", &[]),
        row("lomash.orders.cancelled", "{}", &[]),
        row("lomash.jobs.invented", "{}", &[]),
        // Looking.
        row("$JS.API.INFO", "", &[Product, Administrator, Operator, Analytics, Notification]),
        row("$JS.API.STREAM.NAMES", "", &[Administrator, Operator]),
        row("$JS.API.STREAM.LIST", "", &[Administrator, Operator]),
        row("$JS.API.CONSUMER.LIST.INVENTORY", "", &[Administrator, Operator]),
        row("$JS.API.CONSUMER.INFO.INVENTORY.analytics", "", &[Product, Administrator, Operator, Analytics]),
        row("$JS.API.CONSUMER.INFO.INVENTORY.notification", "", &[Product, Administrator, Operator, Notification]),
        row("$JS.API.CONSUMER.INFO.ORDERS.product-orders", "", &[Product, Administrator, Operator]),
        // Pulling another's messages, and acknowledging what another has in hand.
        row(
            "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.analytics",
            r#"{"batch":1,"no_wait":true}"#,
            &[Administrator, Analytics],
        ),
        row(
            "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.notification",
            r#"{"batch":1,"no_wait":true}"#,
            &[Administrator, Notification],
        ),
        row("$JS.API.CONSUMER.MSG.NEXT.INVENTORY.rebuild", r#"{"batch":1,"no_wait":true}"#, &[Administrator, Operator]),
        row("$JS.API.CONSUMER.MSG.NEXT.JOBS.snapshots", r#"{"batch":1,"no_wait":true}"#, &[Administrator, Product]),
        // Snapshots, an object store: the product service writes and clears it, and reads it by consumers of its own.
        row("$O.SNAPSHOTS.C.x", "{}", &[Product]),
        row("$O.SNAPSHOTS.M.x", "{}", &[Product]),
        row("$O.SNAPSHOTS.invented", "{}", &[]),
        row("$JS.API.STREAM.MSG.GET.OBJ_SNAPSHOTS", r#"{"seq":1}"#, &[Administrator, Operator, Product]),
        // What is restored is sent to a subject that the server names in its answer to whoever may ask for a restore.
        harmful("$JS.SNAPSHOT.RESTORE.INVENTORY.x", ""),
    ];
    for consumer in ["", ".reader", ".reader.$O.SNAPSHOTS.C.>"] {
        let body = json!({ "stream_name": "OBJ_SNAPSHOTS", "config": { "name": "reader", "ack_policy": "none" } });
        let create = row(format!("$JS.API.CONSUMER.CREATE.OBJ_SNAPSHOTS{consumer}"), body, &[Administrator, Product]);
        rows.push(Row { harmful: true, ..create });
    }
    let delete = row("$JS.API.CONSUMER.DELETE.OBJ_SNAPSHOTS.reader", "", &[Administrator, Product]);
    rows.push(Row { harmful: true, ..delete });
    for stream in ["INVENTORY", "ORDERS", "JOBS", "DEAD_LETTERS", "NOTIFICATIONS", "ADVISORIES", "OBJ_SNAPSHOTS"] {
        rows.extend([
            row(format!("$JS.API.STREAM.INFO.{stream}"), "", looks(stream)),
            row(format!("$JS.API.DIRECT.GET.{stream}"), r#"{"seq":1}"#, reads(stream)),
            harmful(format!("$JS.API.STREAM.CREATE.{stream}"), json!({ "name": stream, "subjects": ["lomash.>"] })),
            harmful(format!("$JS.API.STREAM.UPDATE.{stream}"), json!({ "name": stream, "max_msgs": 1 })),
            harmful(format!("$JS.API.STREAM.DELETE.{stream}"), ""),
            Row { harmful: true, ..row(format!("$JS.API.STREAM.PURGE.{stream}"), "", empties(stream)) },
            harmful(format!("$JS.API.STREAM.RESTORE.{stream}"), json!({ "config": { "name": stream }, "state": {} })),
            harmful(
                format!("$JS.API.STREAM.SNAPSHOT.{stream}"),
                json!({ "deliver_subject": ledger_subject(), "chunk_size": 1024 }),
            ),
            harmful(format!("$JS.API.STREAM.LEADER.STEPDOWN.{stream}"), ""),
            harmful(format!("$JS.API.STREAM.PEER.REMOVE.{stream}"), json!({ "peer": "n1" })),
        ]);
    }
    // Letters and scheduled jobs are no history. The ledger is: the server refuses even the administrator.
    for (stream, allowed) in [
        ("INVENTORY", [].as_slice()),
        ("ORDERS", &[Administrator]),
        ("NOTIFICATIONS", &[Administrator]),
        ("JOBS", &[Administrator, Product]),
        ("DEAD_LETTERS", &[Administrator, Product, Operator]),
        ("OBJ_SNAPSHOTS", &[Administrator]),
    ] {
        let delete = row(format!("$JS.API.STREAM.MSG.DELETE.{stream}"), json!({ "seq": 1 }), allowed);
        rows.push(Row { harmful: true, ..delete });
    }
    rows.push(row("$JS.API.STREAM.PURGE.INVENTORY", "", &[]));
    for (stream, consumer) in [
        ("ORDERS", "product-orders"),
        ("JOBS", "reconciliation"),
        ("JOBS", "snapshots"),
        ("INVENTORY", "analytics"),
        ("INVENTORY", "notification"),
        ("INVENTORY", "rebuild"),
    ] {
        let push =
            json!({ "stream_name": stream, "config": { "name": consumer, "deliver_subject": ledger_subject() } });
        rows.extend([
            harmful(format!("$JS.API.CONSUMER.CREATE.{stream}.{consumer}"), push.clone()),
            harmful(format!("$JS.API.CONSUMER.CREATE.{stream}.{consumer}.lomash.inventory.updated.*"), push.clone()),
            harmful(format!("$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{consumer}"), push),
            harmful(format!("$JS.API.CONSUMER.DELETE.{stream}.{consumer}"), ""),
            harmful(
                format!("$JS.API.CONSUMER.PAUSE.{stream}.{consumer}"),
                json!({ "pause_until": "2100-01-01T00:00:00Z" }),
            ),
            Row {
                harmful: true,
                ..row(format!("$JS.API.CONSUMER.RESET.{stream}.{consumer}"), json!({ "seq": 1 }), begins_anew(consumer))
            },
            harmful(format!("$JS.API.CONSUMER.LEADER.STEPDOWN.{stream}.{consumer}"), ""),
        ]);
    }
    // A consumer of one's own delivers where its maker says.
    for stream in ["ORDERS", "JOBS", "DEAD_LETTERS", "NOTIFICATIONS"] {
        let push = json!({ "stream_name": stream, "config": { "name": "mine", "deliver_subject": ledger_subject() } });
        rows.push(harmful(format!("$JS.API.CONSUMER.CREATE.{stream}.mine"), push.clone()));
        rows.push(harmful(format!("$JS.API.CONSUMER.CREATE.{stream}"), push));
    }
    rows
}

fn is_error(answer: &[u8]) -> bool {
    serde_json::from_slice::<Value>(answer).is_ok_and(|answer| answer.get("error").is_some())
}

#[tokio::test]
async fn each_identity_may_do_what_it_needs_and_nothing_else() -> Result<()> {
    let secured = Secured::start().await?;
    let product = JetStreamLedger::new(jetstream::new(secured.client(Who::Product).await?), streams::INVENTORY);
    let event = lomash_ledger::NewMessage {
        subject: ledger_subject(),
        event_id: lomash_contract::EventId(Uuid::new_v4()),
        payload: "{}".into(),
        carried: None,
    };
    assert_eq!(product.append(&[event], 0).await?, 1, "the product service writes the ledger");
    let mut attempts = 0;
    for row in table() {
        for who in Who::ALL {
            let may = row.allowed.contains(&who);
            if (may && row.harmful) || who == Who::System {
                continue;
            }
            attempts += 1;
            let before = if may { Value::Null } else { secured.look().await? };
            let outcome = request(&secured, who, &row.subject, &row.body).await?;
            let case = format!("{} on {}", who.name(), row.subject);
            match outcome {
                Outcome::Answered(answer) if may => {
                    assert!(!is_error(&answer), "{case} works: {}", String::from_utf8_lossy(&answer));
                }
                Outcome::Refused(why) if !may => {
                    assert_eq!(secured.look().await?, before, "{case}, {why}, changes nothing");
                }
                // The server's own word, for the administrator too.
                Outcome::Answered(answer) if who == Who::Administrator && is_error(&answer) => {
                    assert_eq!(secured.look().await?, before, "{case} changes nothing");
                }
                other => panic!("{case}: {} and {other:?}", if may { "needed" } else { "forbidden" }),
            }
            assert_eq!(secured.last_sequence().await?, 1, "{case} leaves the ledger alone");
        }
    }
    println!("{attempts} attempts");

    // The ledger's topics, each by everybody but its owner.
    let is_stored = |topic: &&str| ["lomash.inventory.", "lomash.products."].iter().any(|of| topic.starts_with(of));
    for topic in Topic::ALL.iter().map(|topic| topic.as_str()).filter(is_stored) {
        for who in Who::ALL.into_iter().filter(|who| *who != Who::Product) {
            let outcome = request(&secured, who, &format!("{topic}.{}", Uuid::new_v4()), "{}").await?;
            assert!(matches!(outcome, Outcome::Refused(_)), "{} on {topic}: {outcome:?}", who.name());
            assert_eq!(secured.last_sequence().await?, 1, "{} on {topic}", who.name());
        }
    }
    Ok(())
}

/// What each can fill, filled: the column *can fill* of SECURITY.md.
#[tokio::test]
async fn what_each_can_fill_is_bounded_and_takes_nobody_elses_room() -> Result<()> {
    /// Messages that are on their way at once.
    const AT_ONCE: usize = 500;
    let secured = Secured::start().await?;
    let defined = |stream: &str, field: &str| {
        let definition = streams::definitions().into_iter().find(|definition| definition.name == stream);
        definition.and_then(|found| found.config[field].as_u64()).with_context(|| format!("{field} of {stream}"))
    };
    let letters = async |subject: &str| -> Result<u64> {
        let asked = json!({ "subjects_filter": subject });
        let info: Value = secured.admin.request(format!("STREAM.INFO.{}", dead_letter::STREAM), &asked).await?;
        Ok(info["state"]["subjects"][subject].as_u64().unwrap_or(0))
    };
    // A letter of the product service is there before, and after.
    let product = jetstream::new(secured.client(Who::Product).await?);
    product.publish("lomash.dlq.product-orders", "a letter".into()).await?.await?;
    let room = defined(dead_letter::STREAM, "max_msgs_per_subject")?;
    for (who, subject) in [(Who::Analytics, "lomash.dlq.analytics"), (Who::Notification, "lomash.dlq.notification")] {
        let context = jetstream::new(secured.client(who).await?);
        let mut confirmed = futures::stream::iter(0..room + 100)
            .map(|number| {
                let context = context.clone();
                async move { anyhow::Ok(context.publish(subject, format!("letter {number}").into()).await?.await?) }
            })
            .buffer_unordered(AT_ONCE);
        while let Some(confirmed) = confirmed.next().await {
            confirmed?;
        }
        assert_eq!(letters(subject).await?, room, "{}: its oldest make room for its newest", who.name());
    }
    assert_eq!(letters("lomash.dlq.product-orders").await?, 1, "nothing of another's room is taken");
    product.publish("lomash.dlq.product-orders", "another letter".into()).await?.await?;

    // Sizes. The server cuts off whoever sends more than its account may; a stream refuses what it is not defined for.
    let stored = async || -> Result<u64> {
        let info: Value = secured.admin.request(format!("STREAM.INFO.{}", dead_letter::STREAM), &json!({})).await?;
        info["state"]["last_seq"].as_u64().context("where it ends")
    };
    for who in [Who::Analytics, Who::Notification] {
        let most = 256 << 10;
        let subject = format!("lomash.dlq.{}", who.name());
        let before = stored().await?;
        let context = jetstream::new(secured.client(who).await?);
        context.publish(subject.clone(), vec![0; most].into()).await?.await.context("the largest is taken")?;
        assert_eq!(stored().await?, before + 1, "{}", who.name());
        let larger = async { anyhow::Ok(context.publish(subject, vec![0; most + 1].into()).await?.await?) };
        larger.await.expect_err("more than its account may send");
        assert_eq!(stored().await?, before + 1, "{}", who.name());
    }
    let shop = jetstream::new(secured.client(Who::Orders).await?);
    let most = usize::try_from(defined(streams::ORDERS, "max_msg_size")?)?;
    shop.publish("lomash.orders.created", vec![b' '; most].into()).await?.await.context("the largest is taken")?;
    let refused = shop.publish("lomash.orders.created", vec![b' '; most + 1].into()).await?.await;
    assert!(refused.is_err_and(|problem| problem.to_string().contains("message size exceeds")), "one byte more");
    // How many: until the stream is full. Then publishers are refused, and the ledger has room.
    let config: Value = secured.admin.request(format!("STREAM.INFO.{}", streams::ORDERS), &json!({})).await?;
    assert_eq!(
        (&config["config"]["max_bytes"], &config["config"]["discard"]),
        (&json!(defined(streams::ORDERS, "max_bytes")?), &json!("new"))
    );
    let full = json!({ "max_bytes": (most as u64) * 3 });
    let mut smaller = config["config"].clone();
    smaller.as_object_mut().context("a configuration")?.extend(full.as_object().cloned().unwrap_or_default());
    let _: Value = secured.admin.request(format!("STREAM.UPDATE.{}", streams::ORDERS), &smaller).await?;
    let mut taken = 0;
    let refused = loop {
        match shop.publish("lomash.orders.created", vec![b' '; most].into()).await?.await {
            Ok(_) => taken += 1,
            Err(problem) => break problem.to_string(),
        }
        assert!(taken < 10, "it is never full");
    };
    assert!(refused.contains("maximum bytes exceeded"), "{refused}");
    let before = secured.last_sequence().await?;
    let event = lomash_ledger::NewMessage {
        subject: ledger_subject(),
        event_id: lomash_contract::EventId(Uuid::new_v4()),
        payload: "{}".into(),
        carried: None,
    };
    JetStreamLedger::new(product, streams::INVENTORY).append(&[event], before).await.context("the ledger goes on")?;

    // Connections: as many as an account has, and then no more of it; the others come in.
    let (mut held, mut refused) = (Vec::new(), None);
    for _ in 0..=64 {
        match secured.client(Who::Analytics).await {
            Ok(client) => held.push(client),
            Err(problem) => refused = Some(format!("{problem:#}")),
        }
    }
    assert!(held.len() <= 64 && refused.is_some(), "{} connections: {refused:?}", held.len());
    secured.client(Who::Product).await.context("the product service comes in")?;
    secured.client(Who::Orders).await.context("and a shop")?;
    Ok(())
}

/// Whatever may be asked, with a subject of the ledger as the place for the answer. The product service is left out: what it
/// could inject it may as well publish. So is the administrator, whose key no process has.
#[tokio::test]
async fn no_answer_can_be_sent_into_the_ledger() -> Result<()> {
    let secured = Secured::start().await?;
    let (orders, _) = secured.connect(Who::Orders).await?;
    // Something to be copied, in each stream that can be read.
    for _ in 0..3 {
        jetstream::new(orders.clone()).publish("lomash.orders.created", "{}".into()).await?.await?;
    }
    let before = secured.last_sequence().await?;
    // The administrator can: this is what the accounts are for, and shows that the attempts below would be stored.
    inject(&secured, Who::Administrator, "$JS.API.STREAM.INFO.INVENTORY", "").await?;
    eventually("the administrator's answer in the ledger", PATIENCE, async || {
        Ok((secured.last_sequence().await? == before + 1).then_some(()))
    })
    .await?;

    let after = secured.last_sequence().await?;
    let pull = r#"{"batch":3,"no_wait":true}"#;
    for (who, subject, body) in [
        (Who::Orders, "lomash.orders.created", "{}"),
        (Who::Analytics, "$JS.API.CONSUMER.INFO.INVENTORY.analytics", ""),
        (Who::Analytics, "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.analytics", pull),
        (Who::Analytics, "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.analytics", r#"{"batch":1,"expires":100000000}"#),
        (Who::Analytics, "$JS.ACK.INVENTORY.analytics.1.1.1.1795742613483792957.0", "+NXT"),
        (Who::Analytics, "$JS.ACK._.hash.INVENTORY.analytics.1.1.1.1795742613483792957.0.x", "+ACK"),
        (Who::Analytics, "lomash.dlq.analytics", "{}"),
        (Who::Notification, "$JS.API.CONSUMER.INFO.INVENTORY.notification", ""),
        (Who::Notification, "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.notification", pull),
        (Who::Notification, "lomash.notifications.low-stock", "{}"),
        (Who::Notification, "lomash.dlq.notification", "{}"),
        (Who::Operator, "$JS.API.INFO", ""),
        (Who::Operator, "$JS.API.STREAM.INFO.INVENTORY", ""),
        (Who::Operator, "$JS.API.STREAM.NAMES", ""),
        (Who::Operator, "$JS.API.STREAM.LIST", ""),
        (Who::Operator, "$JS.API.CONSUMER.INFO.ORDERS.product-orders", ""),
        (Who::Operator, "$JS.API.CONSUMER.LIST.INVENTORY", ""),
        (Who::Operator, "$JS.API.CONSUMER.NAMES.INVENTORY", ""),
        (Who::Operator, "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.rebuild", pull),
        (Who::Operator, "$JS.API.CONSUMER.MSG.NEXT.INVENTORY.rebuild", r#"{"batch":1,"expires":100000000}"#),
        (Who::Operator, "$JS.API.CONSUMER.RESET.INVENTORY.rebuild", r#"{"seq":1}"#),
        (Who::Operator, "$JS.API.STREAM.MSG.GET.ORDERS", r#"{"seq":1}"#),
        (Who::Operator, "$JS.API.DIRECT.GET.ORDERS", r#"{"seq":1}"#),
        (Who::Operator, "$JS.API.DIRECT.GET.ORDERS", r#"{"seq":1,"batch":3}"#),
        (Who::Operator, "$JS.API.DIRECT.GET.ORDERS.lomash.orders.created", ""),
        (Who::Operator, "$JS.API.STREAM.MSG.DELETE.DEAD_LETTERS", r#"{"seq":1}"#),
        (Who::Operator, "lomash.orders.created", "{}"),
        (Who::Operator, "lomash.replay.x", "{}"),
    ] {
        inject(&secured, who, subject, body).await?;
        assert_eq!(secured.last_sequence().await?, after, "{} on {subject}", who.name());
    }
    Ok(())
}

/// A command between replicas says itself by whom it is, and is believed. So no key but the product service's brings one, the
/// operator's as little as a shop's: an admin's door is HTTP, where a token says who it is.
#[tokio::test]
async fn commands_come_from_replicas_alone() -> Result<()> {
    let secured = Secured::start().await?;
    // What a replica that is writing hears.
    let writer = secured.client(Who::Product).await?;
    let mut heard = writer.subscribe(WRITER_SUBJECT).await?;
    writer.flush().await?;
    let forged = json!({ "request": "command", "command": {
        "commandId": Uuid::new_v4(), "productId": Uuid::new_v4(), "by": Uuid::new_v4(),
        "action": { "type": "setQuantity", "quantity": 1 } } });
    for who in Who::ALL.into_iter().filter(|who| !matches!(who, Who::Product | Who::System)) {
        for subject in [WRITER_SUBJECT, "lomash.commands.product", "lomash.commands.product.other"] {
            let came = request(&secured, who, subject, &forged.to_string()).await?;
            assert!(matches!(came, Outcome::Refused(_)), "{} on {subject}: {came:?}", who.name());
        }
    }
    let other = secured.client(Who::Product).await?;
    other.publish(WRITER_SUBJECT, "from a replica".into()).await?;
    other.flush().await?;
    let first = tokio::time::timeout(PATIENCE, heard.next()).await?.context("a command")?;
    assert_eq!(first.payload, "from a replica", "the first that arrives is the first that may");
    Ok(())
}

/// Each may listen on its own inbox and on what is said live; on nothing that is said to another.
#[tokio::test]
async fn nobody_hears_what_is_not_for_it() -> Result<()> {
    let secured = Secured::start().await?;
    let live: Vec<&str> = vec!["lomash.inventory.updated", "lomash.inventory.update-failed", "lomash.products.updated"];
    let mut subjects = vec![
        (">", vec![]),
        ("lomash.inventory.updated.*", vec![]),
        ("lomash.inventory.*.*", vec![]),
        ("lomash.inventory.command-answered", vec![]),
        ("lomash.orders.created", vec![]),
        ("$JS.API.>", vec![]),
        ("$JS.ACK.>", vec![]),
        ("$JS.EVENT.>", vec![Who::Administrator]),
        ("_INBOX.>", vec![]),
        ("_R_.>", vec![]),
        ("lomash.commands.>", vec![]),
        ("lomash.commands.product.writer", vec![Who::Product]),
        ("lomash.replay.>", vec![Who::Operator]),
    ];
    subjects.extend(live.into_iter().map(|topic| (topic, vec![Who::Orders, Who::Operator])));
    let inboxes: Vec<(String, Vec<Who>)> =
        Who::ALL.iter().map(|who| (format!("_INBOX_{}.>", who.name()), vec![*who])).collect();
    let subjects = subjects.into_iter().map(|(subject, who)| (subject.to_owned(), who)).chain(inboxes);
    for (subject, allowed) in subjects {
        for who in Who::ALL.into_iter().filter(|who| *who != Who::System) {
            let (client, refusals) = secured.connect(who).await?;
            let _heard = client.subscribe(subject.clone()).await?;
            client.flush().await?;
            let may = allowed.contains(&who);
            // A refusal comes before the answer to the flush; the wait is for our own task to pass it on.
            let wait = if may { Duration::from_millis(50) } else { ANSWER };
            let refused = refusals.guard(tokio::time::sleep(wait)).await.is_err();
            assert_eq!(refused, !may, "{} listening on {subject}", who.name());
        }
    }
    Ok(())
}

#[tokio::test]
async fn nobody_comes_in_without_a_key_that_is_known() -> Result<()> {
    let secured = Secured::start().await?;
    let stranger = Credentials::open(&secured.dir.path().join("stranger"))?;
    let known = secured.credentials.identity(Who::Product);
    let with = |change: &dyn Fn(&mut nats::Identity)| {
        let mut identity = known.clone();
        change(&mut identity);
        identity
    };
    let open = secured.dir.path().join("open.nk");
    std::fs::copy(secured.credentials.seed_file(Who::Product), &open)?;
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    for (case, identity, says) in [
        ("no key", with(&|identity| identity.nats_nkey_file = None), "NATS_NKEY_FILE names none"),
        (
            "an unknown key",
            with(&|identity| identity.nats_nkey_file = Some(stranger.seed_file(Who::Product))),
            "it does not know the key in NATS_NKEY_FILE",
        ),
        (
            "another authority",
            with(&|identity| identity.nats_ca_file = Some(stranger.ca_file())),
            "signed by the authority in NATS_CA_FILE?",
        ),
        ("the system's authorities", with(&|identity| identity.nats_ca_file = None), "in NATS_CA_FILE?"),
        ("an open file", with(&|identity| identity.nats_nkey_file = Some(open.clone())), "is open to everybody"),
    ] {
        let error = nats::connect_as(&secured.nats.url(), &identity, "test").await.map(|_| ()).expect_err(case);
        let error = format!("{error:#}");
        assert!(error.contains(says), "{case}: {error}");
    }
    Ok(())
}

/// What a service that cannot work says, and that it ends.
async fn last_words(service: &mut Service) -> Result<String> {
    service.start()?;
    let status = tokio::time::timeout(REFUSAL_TIMEOUT, service.ended())
        .await
        .with_context(|| format!("{} runs on; {}", service.name(), log_tail(service.log())))?;
    assert!(!status.success(), "{}: {status}", service.name());
    let log = std::fs::read_to_string(service.log())?;
    Ok(log.lines().rfind(|line| line.contains("ERROR")).context("it says why")?.to_owned())
}

#[tokio::test]
async fn a_service_that_cannot_work_says_why_and_ends() -> Result<()> {
    let secured = Secured::start().await?;
    let stranger = Credentials::open(&secured.dir.path().join("stranger"))?;

    let mut wrong_key = secured.service("wrong-key", Who::Product)?;
    wrong_key.set_env("NATS_NKEY_FILE", stranger.seed_file(Who::Product));
    let said = last_words(&mut wrong_key).await?;
    assert!(said.contains("it does not know the key in NATS_NKEY_FILE"), "{said}");

    // A key that is known, but of another service: connected, and then not allowed a thing.
    let mut wrong_account = secured.service("wrong-account", Who::Analytics)?;
    let said = last_words(&mut wrong_account).await?;
    assert!(said.contains("does not allow this process what it needs") && said.contains("STREAM.INFO."), "{said}");

    let mut wrong_inbox = secured.service("wrong-inbox", Who::Product)?;
    wrong_inbox.remove_env("NATS_INBOX_PREFIX");
    let said = last_words(&mut wrong_inbox).await?;
    assert!(said.contains("_INBOX.") && said.contains("NATS_INBOX_PREFIX its own"), "{said}");

    // The certificate of the server has run out.
    let folder = secured.dir.path().join("expired");
    let yesterday = OffsetDateTime::now_utc() - Duration::from_secs(24 * 3600);
    lay_out(&folder, "expired", &secured.credentials, None, Some(yesterday))?;
    let expired = SecureNats::start(&folder).await?;
    let mut late = secured.service("expired", Who::Product)?;
    late.set_env("NATS_URL", expired.url());
    let said = last_words(&mut late).await?;
    assert!(
        said.contains("is the server's certificate still valid") && said.to_lowercase().contains("expired"),
        "{said}"
    );

    // Nobody made the streams there: the service may not, and says who does.
    let folder = secured.dir.path().join("bare");
    lay_out(&folder, "bare", &secured.credentials, None, None)?;
    let bare = SecureNats::start(&folder).await?;
    let mut without = secured.service("bare", Who::Product)?;
    without.set_env("NATS_URL", bare.url());
    let said = last_words(&mut without).await?;
    assert!(said.contains("does not exist; an administrator makes it with `lomash streams apply`"), "{said}");
    Ok(())
}

/// The whole way of an order with each program under its own key, and no server refused anything on it.
#[tokio::test]
async fn orders_are_decided_with_every_program_under_its_own_key() -> Result<()> {
    let secured = Secured::start().await?;
    let mut service = secured.service("product", Who::Product)?;
    lomash_tests::start_until_ready(&mut service).await?;

    // An admin registers a product over HTTP: the operator's key is no way to.
    let url = format!("http://{}", service.address().context("an address")?);
    ready_at(&url).await?;
    let admin = Caller::new(&url, Role::Admin)?;
    let product = lomash_contract::ProductId(admin.register(10).await?);
    let (operator, operator_refusals) = secured.connect(Who::Operator).await?;

    // A shop orders, and hears what became of it.
    let (shop, shop_refusals) = secured.connect(Who::Orders).await?;
    let mut heard = shop.subscribe(Topic::InventoryUpdated.as_str()).await?;
    shop.flush().await?;
    let placed = order(&[(product, 3)]);
    lomash::orders::publish(&jetstream::new(shop.clone()), placed.clone()).await?;
    let told = tokio::time::timeout(PATIENCE, heard.next()).await?.context("it is told")?;
    let told: Value = serde_json::from_slice(&told.payload)?;
    assert_eq!(told["payload"]["orderId"], placed.payload.order_id.to_string());
    assert_eq!(told["payload"]["newQuantity"], 7);

    // Poison becomes a letter, and the good one behind it goes through.
    let poison = jetstream::new(shop.clone()).publish("lomash.orders.created", "poison".into()).await?.await?;
    let next = order(&[(product, 1)]);
    lomash::orders::publish(&jetstream::new(shop), next).await?;
    tokio::time::timeout(PATIENCE, heard.next()).await?.context("it is told")?;

    // The operator reads all of it, makes no consumer for that, and has it verified.
    let reading = jetstream::new(operator);
    lomash::verify::wait_until_quiet(&reading, None, PATIENCE).await?;
    let report = lomash::verify::verify(&reading, None, lomash::verify::Show::Nothing).await?;
    assert!(report.is_clean(), "{}", lomash::verify::render(&report));
    assert_eq!((report.totals.orders_undecided, report.totals.dead_letters), (0, 1));
    let status = lomash::status::status(&reading, None).await;
    let shown = lomash::status::render(&status);
    assert!(!shown.contains("not available: stream"), "{shown}");
    let letter =
        lomash_ledger::direct::read(&reading, dead_letter::STREAM, None, 0, 1).next().await.context("a letter")??;
    let origin = letter.headers.get(dead_letter::ORIGIN_SEQUENCE).context("its origin")?;
    assert_eq!(origin.as_str(), poison.sequence.to_string());

    // And through the consumer that is there for rebuilding, from its beginning and once more from another place.
    let (client, refusals) = secured.connect(Who::Operator).await?;
    let rebuilding = jetstream::new(client).get_stream_no_info(streams::INVENTORY).await?;
    let reading = async {
        for first in [1, 3] {
            rebuilding.reset_consumer(streams::REBUILD, Some(first)).await?;
            let consumer: jetstream::consumer::PullConsumer =
                rebuilding.get_consumer(streams::REBUILD).await.map_err(|problem| anyhow::anyhow!(problem))?;
            let message = consumer.stream().messages().await?.next().await.context("a message")??;
            assert_eq!(message.info().map_err(|problem| anyhow::anyhow!(problem))?.stream_sequence, first);
        }
        anyhow::Ok(())
    };
    tokio::time::timeout(PATIENCE, refusals.guard(reading)).await???;

    // The other services pull from their consumers across the accounts, and acknowledge.
    let sequences = [1, 2, 3, 4, 5].as_slice();
    for (who, consumer) in [(Who::Analytics, "analytics"), (Who::Notification, "notification")] {
        let (client, refusals) = secured.connect(who).await?;
        let context = jetstream::new(client);
        let pulling = async {
            let consumer: jetstream::consumer::PullConsumer =
                context.get_consumer_from_stream(consumer, streams::INVENTORY).await?;
            let group = consumer.cached_info().config.priority_groups.first().cloned();
            let mut pull = consumer.stream().expires(Duration::from_secs(2));
            if let Some(group) = group {
                pull = pull.group(group);
            }
            let mut messages = pull.messages().await?;
            for sequence in sequences {
                let message = messages.next().await.context("a message")??;
                assert_eq!(message.info().map_err(|problem| anyhow::anyhow!(problem))?.stream_sequence, *sequence);
                message.double_ack().await.map_err(|problem| anyhow::anyhow!(problem))?;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, refusals.guard(pulling)).await??.with_context(|| consumer.to_owned())?;
        let info: Value = secured.admin.request(format!("CONSUMER.INFO.INVENTORY.{consumer}"), &json!({})).await?;
        assert_eq!(info["ack_floor"]["stream_seq"], 5, "{consumer}: {info}");
        // Its database is lost: it begins anew by itself.
        let stream = jetstream::new(secured.client(who).await?).get_stream_no_info(streams::INVENTORY).await?;
        stream.reset_consumer(consumer, Some(1)).await?;
        let info: Value = secured.admin.request(format!("CONSUMER.INFO.INVENTORY.{consumer}"), &json!({})).await?;
        assert_eq!(info["num_pending"], sequences.len(), "{consumer}: {info}");
    }

    service.stop().await?;
    let log = std::fs::read_to_string(service.log())?;
    assert!(!log.to_lowercase().contains("violation"), "the product service was refused something:\n{log}");
    for refusals in [operator_refusals, shop_refusals] {
        refusals.guard(async {}).await?;
    }
    Ok(())
}

// The name of what the client library tells when it is refused something: should it change, `Refusals` would hear nothing.
const _: fn(String) -> ServerError = ServerError::Other;
