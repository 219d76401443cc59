//! The files of `streams/` against a real server: accepted exactly as an operator's `nats` CLI would send them, kept as
//! they are written, and guarded, because a ledger that is weaker than its definition could lose history.
//!
//! Assumes that the server is strict about unknown fields, which a test of its own shows.
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures::StreamExt;
use lomash::stack::{Credentials, Nats, SecureNats, lay_out, log_tail, scratch};
use lomash_contract::{EventId, Topic};
use lomash_ledger::{AppendError, Ledger, NewMessage, streams, suspects};
use lomash_tests::{PATIENCE, World, start_until_ready};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// How long a service that must not start may take to say so.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(30);

fn folder() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "streams"].iter().collect()
}

/// The `.json` files of a folder: name without the ending, and content.
fn files(folder: PathBuf) -> Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("{} cannot be read", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            found.insert(name, std::fs::read_to_string(&path)?);
        }
    }
    Ok(found)
}

fn consumer_files() -> Result<BTreeMap<String, String>> {
    files(folder().join("consumers"))
}

async fn request(client: &async_nats::Client, subject: String, body: impl Into<bytes::Bytes>) -> Result<Value> {
    let answer = client.request(format!("$JS.API.{subject}"), body.into()).await?;
    Ok(serde_json::from_slice(&answer.payload)?)
}

/// A field as the file has it. The server leaves out what is zero, false or empty, and adds metadata of its own.
fn holds(defined: &Value, actual: Option<&Value>) -> bool {
    match (defined, actual) {
        (Value::Object(defined), Some(Value::Object(actual))) => {
            defined.iter().all(|(field, value)| holds(value, actual.get(field)))
        }
        (defined, Some(actual)) => defined == actual,
        (Value::Bool(false) | Value::Null, None) => true,
        (Value::Number(number), None) => number.as_i64() == Some(0),
        (Value::Array(list), None) => list.is_empty(),
        (_, None) => false,
    }
}

fn assert_kept(name: &str, file: &Map<String, Value>, actual: &Value) {
    for (field, defined) in file {
        let found = actual.get(field);
        assert!(holds(defined, found), "{name}: {field} is {found:?} on the server and {defined} in the file");
    }
}

/// What a test can do to a server on which nothing is applied yet.
async fn bare_server() -> Result<(tempfile::TempDir, Nats, async_nats::Client)> {
    let dir = scratch()?;
    let nats = Nats::start(dir.path()).await?;
    let client = lomash_platform::nats::connect(&nats.url(), "test").await?;
    streams::wait_until_ready(&async_nats::jetstream::new(client.clone())).await?;
    Ok((dir, nats, client))
}

#[tokio::test]
async fn the_server_takes_every_file_as_it_is_and_keeps_every_field() -> Result<()> {
    let (_dir, _nats, client) = bare_server().await?;

    for (name, text) in files(folder())? {
        let file: Map<String, Value> = serde_json::from_str(&text)?;
        assert_eq!(file["name"], *name, "the file is named after its stream");
        // The bytes of the file, as they are.
        let answer = request(&client, format!("STREAM.CREATE.{name}"), text).await?;
        assert_eq!(answer.get("error"), None, "{name} is refused");
        assert_eq!(answer["did_create"], true, "{name}: {answer}");
        let info = request(&client, format!("STREAM.INFO.{name}"), "").await?;
        assert_kept(&name, &file, &info["config"]);
    }

    for (name, text) in consumer_files()? {
        let file: Map<String, Value> = serde_json::from_str(&text)?;
        let (stream, consumer) = name.split_once('.').expect("STREAM.consumer.json");
        assert_eq!(file["durable_name"], *consumer, "the file is named after its consumer");
        // One filter is part of the subject, several are not.
        let filter = file.get("filter_subject").map(|filter| format!(".{}", filter.as_str().unwrap()));
        // The file in the place where the CLI puts it, not read and written again.
        let body = format!("{{\"stream_name\":\"{stream}\",\"config\":{text},\"action\":\"create\"}}");
        let subject = format!("CONSUMER.CREATE.{stream}.{consumer}{}", filter.unwrap_or_default());
        let answer = request(&client, subject, body).await?;
        assert_eq!(answer.get("error"), None, "{name} is refused");
        let info = request(&client, format!("CONSUMER.INFO.{stream}.{consumer}"), "").await?;
        assert_kept(&name, &file, &info["config"]);
    }

    // What an operator made by hand from the files is what the services want: nothing to create, nothing to say.
    let context = async_nats::jetstream::new(client);
    assert_eq!(streams::apply(&context, 1).await?, []);
    Ok(())
}

/// Without this the test above would also accept a misspelt field.
#[tokio::test]
async fn the_server_is_strict_about_fields_it_does_not_know() -> Result<()> {
    let (_dir, _nats, client) = bare_server().await?;
    let misspelt = json!({ "name": "X", "subjects": ["x"], "deny_purges": true });
    let answer = request(&client, "STREAM.CREATE.X".to_owned(), misspelt.to_string()).await?;
    assert!(answer.get("error").is_some(), "accepted: {answer}");
    Ok(())
}

#[test]
fn the_services_apply_exactly_the_files() -> Result<()> {
    let parsed = |files: BTreeMap<String, String>| -> Result<BTreeMap<String, Map<String, Value>>> {
        let parse = |(name, text): (String, String)| Ok((name, serde_json::from_str(&text)?));
        files.into_iter().map(parse).collect()
    };
    let definitions = streams::definitions();
    let applied_streams: BTreeMap<_, _> =
        definitions.iter().map(|definition| (definition.name.clone(), definition.config.clone())).collect();
    let applied_consumers: BTreeMap<_, _> = definitions
        .iter()
        .flat_map(|definition| {
            let label = |(name, config): &(String, _)| (format!("{}.{name}", definition.name), Clone::clone(config));
            definition.consumers.iter().map(label)
        })
        .collect();
    assert_eq!(applied_streams, parsed(files(folder())?)?);
    assert_eq!(applied_consumers, parsed(consumer_files()?)?);
    Ok(())
}

/// A stream of letters that is full stops orders. So the rooms of all who may write there must fit into it together.
#[test]
fn the_rooms_of_all_consumers_fit_into_the_stream_of_letters() {
    /// What an account may send at once, and the largest letter of the product service, see `dead_letter.rs`.
    const OF_ACCOUNTS: u64 = 256 << 10;
    const OF_ORDERS: u64 = 600 << 10;
    /// A job has 64 KiB at most, and a letter's own headers beside it.
    const OF_JOBS: u64 = 128 << 10;
    /// What the server keeps beside a message.
    const OVERHEAD: u64 = 256;
    let letters = streams::definitions().into_iter().find(|definition| definition.name == "DEAD_LETTERS").unwrap();
    let number = |field: &str| letters.config[field].as_u64().unwrap();
    let accounts = include_str!("../../deploy/nats/accounts.conf");
    let may_write: std::collections::BTreeSet<&str> =
        accounts.lines().filter_map(|line| line.trim().strip_prefix("\"lomash.dlq.")?.strip_suffix('"')).collect();
    assert_eq!(
        may_write.into_iter().collect::<Vec<_>>(),
        ["analytics", "notification", "product-orders", "reconciliation"]
    );
    assert_eq!(accounts.matches("max_payload: 256KB").count(), 2, "of analytics and notification");
    let most = number("max_msgs_per_subject") * (2 * OF_ACCOUNTS + OF_ORDERS + OF_JOBS + 4 * OVERHEAD);
    assert!(most < number("max_bytes"), "{most}");
    assert_eq!(letters.config.get("discard_new_per_subject"), None, "a room that is full stops nobody");
}

/// What a consumer gives up is told to nobody, unless the consumer of its name in `ADVISORIES` hears of it.
#[test]
fn whatever_can_be_given_up_is_heard() -> Result<()> {
    let consumers = consumer_files()?;
    let mut heard = 0;
    for (name, text) in &consumers {
        let file: Value = serde_json::from_str(text)?;
        let (stream, consumer) = name.split_once('.').unwrap();
        if stream == streams::ADVISORIES {
            assert_eq!((&file["max_deliver"], &file["max_ack_pending"]), (&json!(-1), &json!(1)), "{name}");
            continue;
        }
        if file["max_deliver"] == json!(-1) {
            continue;
        }
        assert!(file["max_deliver"].as_i64().is_some_and(|times| times > 2), "{name}: more than among others");
        let hears = consumers.get(&format!("{}.{consumer}", streams::ADVISORIES)).context(name.clone())?;
        let hears: Value = serde_json::from_str(hears)?;
        let advisory = format!("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{stream}.{consumer}");
        assert_eq!(hears["filter_subjects"], json!([advisory, suspects::subject(stream, consumer)]), "{name}");
        heard += 1;
    }
    assert!(heard >= 2, "{heard}");
    Ok(())
}

#[tokio::test]
async fn applying_again_changes_nothing() -> Result<()> {
    let world = World::without_postgres().await?;
    let names: BTreeSet<String> = files(folder())?.into_keys().collect();
    let look = async || -> Result<Vec<Value>> {
        let mut seen = Vec::new();
        for name in &names {
            let info = request(&world.client, format!("STREAM.INFO.{name}"), "").await?;
            seen.push(json!([info["config"], info["created"], info["state"]["consumer_count"]]));
        }
        let consumer = request(&world.client, "CONSUMER.INFO.ORDERS.product-orders".to_owned(), "").await?;
        seen.push(json!([consumer["config"], consumer["created"]]));
        Ok(seen)
    };
    let before = look().await?;
    assert_eq!(streams::apply(&world.context, 1).await?, []);
    assert_eq!(streams::apply(&world.context, 1).await?, []);
    assert_eq!(look().await?, before);
    for name in &names {
        assert_eq!(streams::compare(&world.context, name, 1).await?, [], "{name}");
    }
    world.close();
    Ok(())
}

/// Makes the ledger anew with some fields changed. `deny_purge` cannot be taken back on a living stream.
async fn weaken(world: &World, changes: Value) -> Result<()> {
    let mut config: Map<String, Value> = serde_json::from_str(&files(folder())?["INVENTORY"])?;
    config.extend(changes.as_object().unwrap().clone());
    world.context.delete_stream(streams::INVENTORY).await?;
    let body = Value::Object(config).to_string();
    let answer = request(&world.client, "STREAM.CREATE.INVENTORY".to_owned(), body).await?;
    assert_eq!(answer.get("error"), None);
    Ok(())
}

#[tokio::test]
async fn a_weaker_ledger_is_named_field_by_field() -> Result<()> {
    let world = World::without_postgres().await?;
    for (field, weaker) in [
        ("deny_purge", json!(false)),
        ("deny_delete", json!(false)),
        ("max_msgs", json!(10)),
        ("max_bytes", json!(1_000_000)),
        ("max_age", json!(3_600_000_000_000_u64)),
        ("max_msgs_per_subject", json!(1)),
        ("discard", json!("old")),
        ("allow_atomic", json!(false)),
        ("allow_rollup_hdrs", json!(true)),
        ("allow_msg_ttl", json!(true)),
        ("duplicate_window", json!(1_000_000_000)),
        ("storage", json!("memory")),
        ("subjects", json!(["lomash.inventory.*.*"])),
        ("republish", json!({ "src": ">", "dest": "elsewhere.>" })),
        ("retention", json!("interest")),
    ] {
        // The server does not allow rollups on a stream that denies purges.
        let changes = if field == "allow_rollup_hdrs" {
            json!({ field: weaker, "deny_purge": false })
        } else {
            json!({ field: weaker })
        };
        weaken(&world, changes).await.with_context(|| field.to_owned())?;
        let differences = streams::compare(&world.context, streams::INVENTORY, 1).await?;
        let found = differences.iter().find(|difference| difference.field == field);
        let found = found.unwrap_or_else(|| panic!("{field} is weaker and not named: {differences:?}"));
        assert!(found.to_string().starts_with(&format!("INVENTORY: {field} is ")), "{found}");
        let applied = streams::apply(&world.context, 1).await?;
        assert_eq!(applied, differences, "applying says the same and mends nothing");
    }
    world.close();
    Ok(())
}

/// A field that the definition does not name can be weaker too; whoever adds one to the server must be noticed.
#[tokio::test]
async fn the_service_does_not_start_on_a_weaker_ledger_unless_told_by_name() -> Result<()> {
    let world = World::without_postgres().await?;
    weaken(&world, json!({ "deny_purge": false, "max_msgs": 10 })).await?;

    for (case, allowed, named) in [
        ("nothing-allowed", None, ["deny_purge", "max_msgs"].as_slice()),
        ("one-allowed", Some("max_msgs"), ["deny_purge"].as_slice()),
        ("other-allowed", Some("max_age,deny_delete"), ["deny_purge", "max_msgs"].as_slice()),
    ] {
        let mut service = world.service(case)?;
        if let Some(allowed) = allowed {
            service.set_env("LEDGER_ALLOW_WEAKER", allowed);
        }
        service.start()?;
        let status = tokio::time::timeout(REFUSAL_TIMEOUT, service.ended())
            .await
            .with_context(|| format!("{case}: it runs on a weaker ledger; {}", log_tail(service.log())))?;
        assert!(!status.success(), "{case}: {status}");
        let log = std::fs::read_to_string(service.log())?;
        let error = log.lines().find(|line| line.contains("ERROR")).unwrap_or_default();
        for field in named {
            assert!(error.contains(&format!("{field} is ")), "{case}: {field} is not named: {error}");
        }
        let fix = format!("LEDGER_ALLOW_WEAKER={}", named.join(","));
        assert!(error.contains(&fix) && error.contains("streams/INVENTORY.json"), "{case}: no fix: {error}");
    }

    let mut told = world.service("told")?.env("LEDGER_ALLOW_WEAKER", "max_msgs,deny_purge");
    start_until_ready(&mut told).await?;
    let log = std::fs::read_to_string(told.log())?;
    assert!(log.contains("a weaker ledger was allowed by name"), "it says so: {log}");
    told.stop().await?;
    world.close();
    Ok(())
}

/// No stream says whether its server acknowledges what is not on disk; its monitoring address does, where it can be reached.
#[tokio::test]
async fn a_server_that_acknowledges_too_early_is_refused_where_it_can_be_seen() -> Result<()> {
    const SAFE: &str = "sync_interval: always";
    let world = World::without_postgres().await?;
    let credentials = Credentials::open(&world.dir().join("keys"))?;
    let mut servers = Vec::new();
    for name in ["safe", "hasty"] {
        let folder = world.dir().join(name);
        lay_out(&folder, name, &credentials, None, None)?;
        if name == "hasty" {
            let file = folder.join("secure.conf");
            let text = std::fs::read_to_string(&file)?;
            assert_eq!(text.matches(SAFE).count(), 1);
            std::fs::write(&file, text.replace(SAFE, "sync_interval: 2m"))?;
        }
        servers.push(SecureNats::start(&folder).await?);
    }
    let urls: Vec<String> = servers.iter().map(SecureNats::monitor_url).collect();
    let (safe, hasty) = (urls[0].clone(), urls[1].clone());
    assert_eq!(lomash::streams::hasty(&urls).await?, urls[1..]);
    assert!(lomash::streams::hasty(&["http://127.0.0.1:9".to_owned()]).await.is_err(), "nobody answers there");

    let mut refused = world.service("refused")?.env("NATS_MONITOR_URL", format!("{safe},{hasty}"));
    refused.start()?;
    let status = tokio::time::timeout(REFUSAL_TIMEOUT, refused.ended())
        .await
        .with_context(|| format!("it runs on a hasty server; {}", log_tail(refused.log())))?;
    assert!(!status.success(), "{status}");
    let log = std::fs::read_to_string(refused.log())?;
    let error = log.lines().find(|line| line.contains("ERROR")).unwrap_or_default();
    for words in [hasty.as_str(), "sync_always is false", "sync_interval: always", "LEDGER_ALLOW_WEAKER=sync_always"] {
        assert!(error.contains(words), "{words} is not said: {error}");
    }
    assert!(!error.contains(&safe), "{error}");

    for (case, urls, allowed) in
        [("allowed", hasty, "sync_always"), ("unseen", format!("{safe},http://127.0.0.1:9"), "")]
    {
        let mut service = world.service(case)?.env("NATS_MONITOR_URL", urls).env("LEDGER_ALLOW_WEAKER", allowed);
        start_until_ready(&mut service).await?;
        service.stop().await?;
    }
    world.close();
    Ok(())
}

#[tokio::test]
async fn live_listeners_hear_what_was_stored_on_the_exact_topic() -> Result<()> {
    let world = World::without_postgres().await?;
    let ledger = world.ledger();
    let mut updated = world.client.subscribe(Topic::InventoryUpdated.as_str()).await?;
    let mut changed = world.client.subscribe(Topic::ProductsUpdated.as_str()).await?;
    let mut failed = world.client.subscribe(Topic::InventoryUpdateFailed.as_str()).await?;
    world.client.flush().await?;

    let new = |topic: Topic, key: Uuid, payload: &str| NewMessage {
        subject: format!("{}.{key}", topic.as_str()),
        event_id: EventId(Uuid::new_v4()),
        payload: payload.to_owned().into(),
        carried: None,
    };
    let (kitchen, bedroom, order) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let stored = [
        new(Topic::InventoryUpdated, kitchen, "first"),
        new(Topic::ProductsUpdated, kitchen, "second"),
        new(Topic::InventoryUpdated, bedroom, "third"),
        new(Topic::InventoryUpdateFailed, order, "fourth"),
        new(Topic::InventoryUpdated, kitchen, "fifth"),
    ];
    let refused = [new(Topic::InventoryUpdated, kitchen, "never"), new(Topic::InventoryUpdated, bedroom, "never")];
    assert!(matches!(ledger.append(&refused, 99).await, Err(AppendError::Conflict(_))));
    ledger.append(&stored, 0).await?;
    assert!(matches!(ledger.append(&refused, 0).await, Err(AppendError::Conflict(_))));
    // Sent after the refused ones: once it is heard, they would have been.
    ledger.append(&[new(Topic::InventoryUpdated, bedroom, "last")], 5).await?;

    async fn hear(heard: &mut async_nats::Subscriber) -> Result<(String, String, String, u64, u64)> {
        let message = tokio::time::timeout(PATIENCE, heard.next()).await?.context("the listener ended")?;
        let headers = message.headers.context("no headers")?;
        let text = |name: &str| headers.get(name).map(|value| value.as_str().to_owned()).unwrap_or_default();
        assert_eq!(text("Nats-Stream"), streams::INVENTORY);
        Ok((
            message.subject.to_string(),
            String::from_utf8(message.payload.to_vec())?,
            text("Nats-Subject"),
            text("Nats-Sequence").parse()?,
            text("Nats-Last-Sequence").parse()?,
        ))
    }
    let expected = |topic: Topic, key: Uuid, payload: &str, sequence: u64, last_of_subject: u64| {
        let keyed = format!("{}.{key}", topic.as_str());
        (topic.as_str().to_owned(), payload.to_owned(), keyed, sequence, last_of_subject)
    };
    // The last sequence is that of the same product: a listener sees at once whether it missed one.
    assert_eq!(hear(&mut updated).await?, expected(Topic::InventoryUpdated, kitchen, "first", 1, 0));
    assert_eq!(hear(&mut updated).await?, expected(Topic::InventoryUpdated, bedroom, "third", 3, 0));
    assert_eq!(hear(&mut updated).await?, expected(Topic::InventoryUpdated, kitchen, "fifth", 5, 1));
    assert_eq!(hear(&mut updated).await?, expected(Topic::InventoryUpdated, bedroom, "last", 6, 3));
    assert_eq!(hear(&mut changed).await?, expected(Topic::ProductsUpdated, kitchen, "second", 2, 0));
    assert_eq!(hear(&mut failed).await?, expected(Topic::InventoryUpdateFailed, order, "fourth", 4, 0));
    world.close();
    Ok(())
}
