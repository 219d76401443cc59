//! The HTTP adapter on real servers: who may do what, what every answer says, and what a repeated, raced or abusive
//! request comes to.
//!
//! Owns what a client sees while all servers are up; `http_faults.rs` owns what it sees when they are not. Routes are
//! taken from the service's own OpenAPI document and problem types from the lists in the code, so that a new one cannot
//! be forgotten here.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use async_nats::HeaderMap;
use futures::StreamExt;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use lomash::stack::{Service, free_port};
use lomash_contract::id::EventRole;
use lomash_contract::{
    ContentType, Envelope, EventId, InventoryUpdated, LedgerEvent, ProductId, Timestamp, Trigger, UpdatedBy, codec,
};
use lomash_ledger::{Carried, Ledger as _, NewMessage, streams};
use lomash_tests::http::{Answer, Caller, Request};
use lomash_tests::{JWT_SECRET, PATIENCE, World, eventually, order, order_as, start_until_ready};
use lomash_web::Role;
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use lomash_web::problem::SHARED_TYPES;
use product_service::http::PROBLEM_TYPES;
use product_service::inventory::Action;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::dead_letters::write_letter;

/// Rounds of each race.
const ROUNDS: usize = 40;

/// What a service logs when a handler or a task panics.
const PANIC: &str = "panicked";

/// A world with one service.
async fn world() -> Result<(World, Service, Caller)> {
    let world = World::start().await?;
    let service = started(&world, "one", &[]).await?;
    let admin = Caller::new(&world.url("one"), Role::Admin)?;
    Ok((world, service, admin))
}

/// A service without limits on rates, with these variables besides.
async fn started(world: &World, name: &str, variables: &[(&str, &str)]) -> Result<Service> {
    let mut service = world.service(name)?.env("HTTP_WRITES_PER_SECOND", "0").env("HTTP_READS_PER_SECOND", "0");
    for (variable, value) in variables {
        service = service.env(variable, value);
    }
    start_until_ready(&mut service).await?;
    projecting(&Caller::new(&world.url(name), Role::Viewer)?).await?;
    Ok(service)
}

/// Waits until reads are possible: orders and writes do not wait for Postgres, so that a service is ready before.
async fn projecting(caller: &Caller) -> Result<()> {
    eventually("the projection", PATIENCE, async || {
        let ready = caller.get("/readyz").send().await?;
        let checks = ready.json["checks"].as_array().context("checks")?;
        Ok(checks.iter().any(|check| check["name"] == "projection" && check["ready"] == true).then_some(()))
    })
    .await
}

/// Stops the services in order and sees that none of them panicked.
async fn finish(world: World, services: impl IntoIterator<Item = Service>) -> Result<()> {
    for mut service in services {
        service.stop().await?;
        assert_no_panic(&service)?;
    }
    world.close();
    Ok(())
}

fn assert_no_panic(service: &Service) -> Result<()> {
    let log = std::fs::read_to_string(service.log())?;
    assert!(!log.contains(PANIC), "a panic in {}:\n{log}", service.name());
    Ok(())
}

/// Reads until the projection shows what was written: every read here asks for that.
async fn read(caller: &Caller, path: &str, min_sequence: u64) -> Result<Answer> {
    let answer = caller.get(path).header("Lomash-Min-Sequence", min_sequence).send().await?;
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    assert!(answer.sequence() >= min_sequence, "{path}: {answer:?}");
    Ok(answer)
}

fn inventory(product: Uuid) -> String {
    format!("/v1/products/{product}/inventory")
}

// ── What may be sent ────────────────────────────────────────────────────────────────────────────────────────────

/// Objects are objects, text is seen as it is, tags are tags, and a moment is one of the ledger.
#[tokio::test]
async fn what_is_sent_is_taken_by_the_letter() -> Result<()> {
    let (world, service, admin) = world().await?;
    let product = admin.register(40).await?;
    let stock = inventory(product);
    let before = world.last_sequence().await?;

    let pointer = |answer: &Answer| answer.json["errors"][0]["pointer"].as_str().unwrap_or_default().to_owned();
    let detail = |answer: &Answer| answer.json["errors"][0]["detail"].as_str().unwrap_or_default().to_owned();
    for (path, body) in
        [(&stock, json!([7, null, null])), (&format!("/v1/products/{product}"), json!(["x", null, null, null, null]))]
    {
        let answer = admin.patch(path, &body).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{answer:?}");
    }
    let registration = |sku: &str, name: &str| json!({ "sku": sku, "name": name });
    for (body, field, code_point) in [
        (registration("A\u{200b}", "a"), "/sku", "U+200B"),
        (registration("A", "\u{202e}a"), "/name", "U+202E"),
        (registration("A", "a\u{feff}"), "/name", "U+FEFF"),
        (registration("A", "\u{a0}\u{3000}"), "/name", "is empty"),
        (registration(" A", "a"), "/sku", "begins with U+0020"),
        (json!({ "sku": "A", "name": "a", "category": "\u{ad}b" }), "/category", "U+00AD"),
        (json!({ "sku": "A", "name": "a", "reason": "one\u{2028}two" }), "/reason", "U+2028"),
        (json!({ "sku": "A", "name": "a", "reason": "\u{202e}owt" }), "/reason", "U+202E"),
    ] {
        let answer = admin.post("/v1/products", &body).send().await?;
        assert_eq!((answer.status, pointer(&answer).as_str()), (400, field), "{body}: {answer:?}");
        assert!(detail(&answer).contains(code_point), "{body}: {answer:?}");
    }
    for (tags, status) in [("\"a,b\"", 412), ("\"a,b\", W/\"1\"", 412), ("\"a,b", 400)] {
        let answer = admin.patch(&stock, &json!({ "quantity": 1 })).header("If-Match", tags).send().await?;
        assert_eq!(answer.status, status, "{tags}: {answer:?}");
    }
    assert_eq!(world.last_sequence().await?, before, "nothing of it was written");

    for as_of in ["2026", "20261130", "1796000000", "2026-11-30", "9223372036854775807"] {
        let answer = admin.get(&format!("{stock}?asOf={as_of}")).send().await?;
        assert_eq!(answer.status, 400, "{as_of}: {answer:?}");
        assert!(detail(&answer).contains("RFC 3339"), "{as_of}: {answer:?}");
    }
    let now = admin.get(&format!("{stock}?asOf={before}")).send().await?;
    assert_eq!((now.status, &now.json["quantity"]), (200, &json!(40)), "{now:?}");

    // Either form of Unicode is the same text: it is kept composed, and found by both.
    let body = json!({ "sku": "KU\u{308}-1", "name": "Ku\u{308}chenzeile", "category": "Ku\u{308}chen" });
    let registered = admin.post("/v1/products", &body).send().await?;
    assert_eq!((registered.status, &registered.json["details"]["sku"]), (201, &json!("KÜ-1")), "{registered:?}");
    assert_eq!(registered.json["details"]["name"], "Küchenzeile");
    let taken =
        admin.post("/v1/products", &json!({ "productId": Uuid::new_v4(), "sku": "KÜ-1", "name": "x" })).send().await?;
    assert_eq!(taken.problem(), "sku-taken");
    // A row as it was written before texts were composed and words folded.
    world
        .act(
            ProductId(Uuid::new_v4()),
            Action::Register { details: lomash_tests::details("OLD-1")?, initial_quantity: 0 },
        )
        .await?;
    let last = world.last_sequence().await?;
    read(&admin, "/v1/products", last).await?;
    let database = world.database().await?;
    database
        .execute(
            "UPDATE inventory.products SET name = U&'Ku\\0308che alt', words = ARRAY['1', 'alt', 'che', 'ku', 'old']
             WHERE sku = 'OLD-1'",
            &[],
        )
        .await?;
    let search = async |query: &str| -> Result<Vec<String>> {
        let answer = admin.get(&format!("/v1/products?{query}")).send().await?;
        assert_eq!(answer.status, 200, "{query}: {answer:?}");
        let items = answer.json["items"].as_array().unwrap().clone();
        Ok(items.iter().map(|item| item["sku"].as_str().unwrap().to_owned()).collect())
    };
    for word in ["k%C3%BCche", "ku%CC%88che", "K%C3%9CCHE", "KU%CC%88CHE"] {
        assert_eq!(search(&format!("q={word}")).await?, ["KÜ-1", "OLD-1"], "{word}");
    }
    assert_eq!(search("q=k%C3%BCche%20alt").await?, ["OLD-1"]);
    for query in ["sku=K%C3%9C-1", "sku=KU%CC%88-1", "category=K%C3%BCchen", "category=Ku%CC%88chen"] {
        assert_eq!(search(query).await?, ["KÜ-1"], "{query}");
    }
    // Words beyond the eighth are not looked for.
    let nine = "old%201%20alt%20ol%20al%20o%20a%20k%C3%BC%20nothing";
    assert_eq!(search(&format!("q={nine}")).await?, ["OLD-1"]);
    assert_eq!(admin.get("/v1/products?q=%E2%80%94").send().await?.status, 400);
    finish(world, [service]).await
}

// ── Who may do what ─────────────────────────────────────────────────────────────────────────────────────────────

/// A token with these claims over good ones, signed with `secret`.
fn forged(claims: &Value, secret: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut all = json!({
        "iss": DEVELOPMENT_ISSUER, "aud": DEVELOPMENT_AUDIENCE, "sub": Uuid::new_v4(), "role": "ADMIN",
        "nbf": now - 60, "exp": now + 600,
    });
    for (name, value) in claims.as_object().unwrap() {
        if value.is_null() {
            all.as_object_mut().unwrap().remove(name);
        } else {
            all[name] = value.clone();
        }
    }
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), &all, &EncodingKey::from_secret(secret.as_bytes())).unwrap()
}

/// Every operation of the document, with a path in which every parameter is some id.
fn operations(document: &Value) -> Vec<(Method, String, Value)> {
    let mut operations = Vec::new();
    for (template, item) in document["paths"].as_object().unwrap() {
        let parts = template.split('/').map(|part| match part {
            "{sequence}" => "1".to_owned(),
            id if id.starts_with('{') => Uuid::new_v4().to_string(),
            word => word.to_owned(),
        });
        let path = parts.collect::<Vec<_>>().join("/");
        for method in [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE] {
            if let Some(operation) = item.get(method.as_str().to_lowercase()) {
                operations.push((method, path.clone(), operation.clone()));
            }
        }
    }
    operations
}

/// The first of the types that an operation takes and that `{}` is one of.
fn media_type_of(operation: &Value) -> Option<&'static str> {
    let takes = |media_type: &&str| operation["requestBody"]["content"].get(*media_type).is_some();
    ["application/json", "application/x-ndjson"].into_iter().find(takes)
}

#[tokio::test]
async fn every_route_asks_for_a_token_and_a_role() -> Result<()> {
    let (world, service, admin) = world().await?;
    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    let document = admin.with_token(None).get("/openapi.json").send().await?;
    assert_eq!(document.status, 200, "{document:?}");
    assert!(document.json["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")), "{document:?}");
    let operations = operations(&document.json);
    assert!(operations.len() >= 15, "{} operations", operations.len());

    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let bad_tokens = [
        ("no token", None),
        ("expired", Some(forged(&json!({ "exp": now - 60 }), JWT_SECRET))),
        ("not valid yet", Some(forged(&json!({ "nbf": now + 600 }), JWT_SECRET))),
        ("wrong key", Some(forged(&json!({}), "another secret that is long enough for HS256"))),
        ("wrong audience", Some(forged(&json!({ "aud": "somebody else" }), JWT_SECRET))),
        ("wrong issuer", Some(forged(&json!({ "iss": "somebody else" }), JWT_SECRET))),
        ("exp as text", Some(forged(&json!({ "exp": (now + 600).to_string() }), JWT_SECRET))),
        ("no exp", Some(forged(&json!({ "exp": null }), JWT_SECRET))),
        ("nonsense", Some("e30.e30.".to_owned())),
    ];
    let no_role = admin.with_token(Some(forged(&json!({ "role": null }), JWT_SECRET)));
    for (method, path, operation) in operations {
        let send = async |caller: &Caller| -> Result<(u16, Option<Answer>)> {
            let request = caller.request(method.clone(), &path);
            let request = match media_type_of(&operation) {
                Some(media_type) => request.header("Content-Type", media_type).bytes("{}"),
                None => request,
            };
            // An event stream has no end: its status is all there is to see.
            let is_stream = operation.pointer("/responses/200/content/text~1event-stream").is_some();
            if is_stream && std::ptr::eq(caller, &admin) | std::ptr::eq(caller, &viewer) {
                return Ok((request.open().await?.status().as_u16(), None));
            }
            let answer = request.send().await?;
            Ok((answer.status, Some(answer)))
        };
        for (what, token) in &bad_tokens {
            let (status, answer) = send(&admin.with_token(token.clone())).await?;
            assert_eq!(status, 401, "{method} {path} with {what}");
            let answer = answer.unwrap();
            assert_eq!(answer.problem(), "unauthorized", "{method} {path} with {what}");
            let challenge = answer.header("www-authenticate").context("a challenge")?;
            assert_eq!(challenge == "Bearer", token.is_none(), "{method} {path} with {what}: {challenge}");
        }
        assert_eq!(send(&no_role).await?.0, 403, "{method} {path} without a role");
        let reads = method == Method::GET;
        let (status, answer) = send(&viewer).await?;
        if reads {
            assert!(matches!(status, 200 | 404), "{method} {path} as a viewer: {status}");
        } else {
            assert_eq!(status, 403, "{method} {path} as a viewer");
            assert_eq!(answer.unwrap().problem(), "forbidden", "{method} {path} as a viewer");
        }
        let (status, answer) = send(&admin).await?;
        // An import tells of its bad row in the answer.
        let expected: &[u16] = match media_type_of(&operation) {
            _ if reads => &[200, 404],
            Some(_) => &[200, 202, 400],
            // What takes no body cannot find fault with it.
            None => &[404],
        };
        assert!(expected.contains(&status), "{method} {path} as an admin: {status} {answer:?}");
        assert!(
            operation["responses"].get(status.to_string()).is_some(),
            "{method} {path}: {status} is not documented"
        );
    }
    finish(world, [service]).await
}

// ── What answers say ────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_write_says_what_changed_and_is_on_record_with_who_and_why() -> Result<()> {
    let (world, service, admin) = world().await?;
    let product = Uuid::new_v4();
    let body = json!({
        "productId": product, "sku": "OAK-1", "name": "Oak worktop", "category": "kitchens", "initialQuantity": 12,
        "reason": "opening",
    });
    let registered = admin.post("/v1/products", &body).send().await?;
    assert_eq!(registered.status, 201, "{registered:?}");
    assert_eq!(registered.header("location"), Some(format!("/v1/products/{product}").as_str()));
    // product-registered, inventory-updated, product-updated: the version is that of the second.
    let version = registered.sequence() - 1;
    assert_eq!(registered.header("etag"), Some(format!("\"{version}\"").as_str()));
    assert_eq!(registered.json["sequence"], registered.sequence());
    assert_eq!(registered.json["quantity"], 12);
    assert_eq!(registered.json["isAvailable"], true);
    assert_eq!(registered.json["details"]["sku"], "OAK-1");
    assert_eq!(registered.json["details"]["active"], true);
    let seen = read(&admin, &format!("/v1/products/{product}"), registered.sequence()).await?;
    assert_eq!(seen.header("etag"), registered.header("etag"), "a read has the version that the write told");
    for (field, value) in [
        ("sku", json!("OAK-1")),
        ("quantity", json!(12)),
        ("category", json!("kitchens")),
        ("lowStockThreshold", Value::Null),
        ("version", json!(version)),
    ] {
        assert_eq!(seen.json[field], value, "{field}: {seen:?}");
    }

    let again = admin.post("/v1/products", &body).send().await?;
    assert_eq!((again.status, &again.json["changed"]), (200, &json!(false)), "{again:?}");

    let set = admin.patch(&inventory(product), &json!({ "quantity": 5, "reason": "stocktaking" })).send().await?;
    assert_eq!(set.status, 200, "{set:?}");
    assert_eq!(set.header("etag"), Some(format!("\"{}\"", set.sequence()).as_str()));
    for (field, value) in [
        ("previousQuantity", json!(12)),
        ("quantity", json!(5)),
        ("isAvailable", json!(true)),
        ("changed", json!(true)),
        ("updatedBy", json!(admin.subject)),
        ("reason", json!("stocktaking")),
        ("sku", json!("OAK-1")),
        ("productId", json!(product)),
        ("sequence", json!(set.sequence())),
    ] {
        assert_eq!(set.json[field], value, "{field}: {set:?}");
    }
    assert!(set.header("idempotent-replayed").is_none());

    let unchanged = admin.patch(&inventory(product), &json!({ "quantity": 5 })).send().await?;
    assert_eq!((unchanged.status, &unchanged.json["changed"]), (200, &json!(false)), "{unchanged:?}");
    assert_eq!(unchanged.json["quantity"], 5);
    assert_eq!(unchanged.sequence(), set.sequence(), "nothing was stored");

    let adjustments = format!("{}/adjustments", inventory(product));
    let adjusted = admin.post(&adjustments, &json!({ "delta": -5, "reason": "broken" })).send().await?;
    assert_eq!((adjusted.status, &adjusted.json["quantity"]), (200, &json!(0)), "{adjusted:?}");
    assert_eq!(adjusted.json["isAvailable"], false);
    // inventory-updated and product-updated: the version is that of the first.
    assert_eq!(adjusted.header("etag"), Some(format!("\"{}\"", adjusted.sequence() - 1).as_str()));

    let before = world.last_sequence().await?;
    let counts = format!("{}/counts", inventory(product));
    let counted = json!({ "quantity": 3, "countedAt": "2026-01-31T09:30:00Z", "reason": "shelf 7" });
    let recorded = admin.post(&counts, &counted).send().await?;
    assert_eq!((recorded.status, &recorded.json["changed"]), (201, &json!(true)), "{recorded:?}");
    assert_eq!(recorded.json["countedBy"], json!(admin.subject));
    assert_eq!(recorded.sequence(), before + 1);
    let twice = admin.post(&counts, &counted).send().await?;
    assert_eq!((twice.status, &twice.json["changed"]), (201, &json!(false)), "{twice:?}");

    let path = format!("/v1/products/{product}");
    let amended =
        admin.patch(&path, &json!({ "category": null, "lowStockThreshold": 7, "active": false })).send().await?;
    assert_eq!(amended.status, 200, "{amended:?}");
    assert_eq!(amended.json["changedFields"], json!(["category", "lowStockThreshold", "active"]));
    assert_eq!(amended.json["details"]["category"], Value::Null);
    let seen = read(&admin, &path, amended.sequence()).await?;
    assert_eq!(seen.header("etag"), amended.header("etag"));
    assert_eq!((&seen.json["active"], &seen.json["lowStockThreshold"]), (&json!(false), &json!(7)));
    let known = admin.get(&path).header("If-None-Match", amended.header("etag").unwrap()).send().await?;
    assert_eq!((known.status, known.text.as_str()), (304, ""), "{known:?}");

    let history = read(&admin, &format!("{}/history?oldestFirst=true", inventory(product)), amended.sequence()).await?;
    let items = history.json["items"].as_array().unwrap();
    let told: Vec<_> = items.iter().map(|item| (&item["newQuantity"], item["reason"].as_str())).collect();
    assert_eq!(told, [(&json!(12), Some("opening")), (&json!(5), Some("stocktaking")), (&json!(0), Some("broken"))]);
    for item in items {
        assert_eq!(item["updatedBy"], json!(admin.subject), "{item}");
        assert_eq!(item["trigger"], "ADMIN_UPDATE", "{item}");
    }
    assert_eq!(items[1]["eventId"], set.json["eventId"]);
    assert_eq!(items[1]["sequence"], set.json["sequence"]);

    // The ledger says the same as the answers.
    let events = world.events().await?;
    let stored = events.iter().filter(|(message, _)| message.carried.reason.as_deref() == Some("stocktaking"));
    let [(_, LedgerEvent::InventoryUpdated(updated))] = stored.collect::<Vec<_>>()[..] else { panic!("one event") };
    assert_eq!(updated.updated_by, UpdatedBy::User(admin.subject));

    // No product id: the one of the sku, whoever registers it.
    let derived = admin.post("/v1/products", &json!({ "sku": "OAK-2", "name": "Oak worktop" })).send().await?;
    let id = product_service::catalogue::product_id(&"OAK-2".parse()?);
    assert_eq!((derived.status, &derived.json["productId"]), (201, &json!(id.0)), "{derived:?}");
    world.verified().await?;
    finish(world, [service]).await
}

/// Types that no request to this service can be answered with, and why.
const NOT_REACHED: [(&str, &str); 4] = [
    (
        "already-carried-out",
        "of an id that another command had: over HTTP each is new, or the caller's own under a key",
    ),
    ("conflict", "this service has a type of its own for each conflict"),
    ("unprocessable", "of a command whose events do not fit into a batch; those of HTTP have four events at most"),
    ("internal", "a fault of ours: whatever reached it would be a bug to mend"),
];

/// A row of the table: what is sent, what it must be called, and a pointer, parameter or header in `errors`.
struct Row {
    request: Request,
    slug: &'static str,
    at: Option<&'static str>,
}

fn row(slug: &'static str, request: Request) -> Row {
    Row { request, slug, at: None }
}

fn at(slug: &'static str, at: &'static str, request: Request) -> Row {
    Row { request, slug, at: Some(at) }
}

#[tokio::test]
async fn every_problem_type_is_reached() -> Result<()> {
    let (world, service, admin) = world().await?;
    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    let product = admin.register(5).await?;
    let other = admin.register(0).await?;
    let (stock, path) = (inventory(product), format!("/v1/products/{product}"));
    let (nobody, unknown) = (Uuid::new_v4(), inventory(Uuid::new_v4()));
    let last = world.last_sequence().await?;
    let counts = format!("{stock}/counts");
    admin.post(&counts, &json!({ "quantity": 3, "countedAt": "2026-02-01T00:00:00Z" })).send().await?;
    admin.patch(&stock, &json!({ "quantity": 6 })).header("Idempotency-Key", "used").send().await?;
    let dry = json!({ "figures": "counts", "dryRun": true });
    let run = admin.post("/v1/reconciliations", &dry).send().await?;
    assert_eq!(run.status, 202, "{run:?}");
    let run = format!("/v1/reconciliations/{}", run.json["id"].as_str().unwrap());
    eventually("the run to be done", PATIENCE, async || {
        let report = admin.get(&run).send().await?;
        Ok((report.json["status"] == "dryRun").then_some(()))
    })
    .await?;
    let limited =
        started(&world, "limited", &[("HTTP_WRITES_PER_SECOND", "1"), ("HTTP_MAX_BODY_BYTES", "1024")]).await?;
    let greedy = admin.at(&world.url("limited"));
    for _ in 0..3 {
        greedy.patch(&stock, &json!({ "quantity": 6 })).send().await?;
    }
    // An event of the ledger whose consumer cannot take it back.
    let letter = write_letter(&world, streams::INVENTORY, "nobody", "lomash.inventory.updated.x", 2).await?;
    let nowhere = format!("http://127.0.0.1:{}/jwks.json", free_port()?);
    let keyless = started(&world, "keyless", &[("JWT_JWKS", nowhere.as_str())]).await?;
    let mut header = Header::new(Algorithm::RS256);
    header.kid = Some("some".to_owned());
    let pem = include_bytes!("../../shared/web/tests/keys/test-only-rsa-ours.pem");
    let asymmetric = jsonwebtoken::encode(&header, &json!({}), &EncodingKey::from_rsa_pem(pem)?)?;

    let json = "application/json";
    let rows = [
        row("bad-request", admin.request(Method::PATCH, &stock).header("Content-Type", json).bytes("{")),
        at("validation-failed", "/quantity", admin.patch(&stock, &json!({ "quantity": -1 }))),
        at("validation-failed", "/quantity", admin.patch(&stock, &json!({ "quantity": 1_000_000_001 }))),
        at("validation-failed", "/quantity", admin.patch(&stock, &json!({}))),
        at("validation-failed", "/updatedBy", admin.patch(&stock, &json!({ "quantity": 1, "updatedBy": nobody }))),
        at("validation-failed", "/reason", admin.patch(&stock, &json!({ "quantity": 1, "reason": " " }))),
        at("validation-failed", "/reason", admin.patch(&stock, &json!({ "quantity": 1, "reason": "a".repeat(501) }))),
        at(
            "validation-failed",
            "/delta",
            admin.post(&format!("{stock}/adjustments"), &json!({ "delta": 0, "reason": "x" })),
        ),
        at("validation-failed", "/reason", admin.post(&format!("{stock}/adjustments"), &json!({ "delta": 1 }))),
        at("validation-failed", "", admin.patch(&path, &json!({}))),
        at("validation-failed", "/name", admin.patch(&path, &json!({ "name": "" }))),
        at(
            "validation-failed",
            "/lowStockThreshold",
            admin.patch(&path, &json!({ "lowStockThreshold": 2_000_000_000_u32 })),
        ),
        at("validation-failed", "/sku", admin.post("/v1/products", &json!({ "sku": "", "name": "x" }))),
        at(
            "validation-failed",
            "/initialQuantity",
            admin.post("/v1/products", &json!({ "sku": "X-1", "name": "x", "initialQuantity": 1_000_000_001 })),
        ),
        at(
            "validation-failed",
            "/countedAt",
            admin.post(&counts, &json!({ "quantity": 1, "countedAt": "2999-01-01T00:00:00Z" })),
        ),
        at("validation-failed", "/countedAt", admin.post(&counts, &json!({ "quantity": 1, "countedAt": "yesterday" }))),
        at(
            "validation-failed",
            "/approvalThresholdPercent",
            admin.post("/v1/reconciliations", &json!({ "approvalThresholdPercent": 101 })),
        ),
        at(
            "validation-failed",
            "idempotency-key",
            admin.patch(&stock, &json!({ "quantity": 1 })).header("Idempotency-Key", ""),
        ),
        at("validation-failed", "if-match", admin.patch(&stock, &json!({ "quantity": 1 })).header("If-Match", "17")),
        at("validation-failed", "lomash-min-sequence", admin.get(&path).header("Lomash-Min-Sequence", "-1")),
        at("validation-failed", "last-event-id", admin.get("/v1/inventory/stream").header("Last-Event-ID", "999999")),
        at("validation-failed", "limit", admin.get("/v1/products?limit=0")),
        at("validation-failed", "sort", admin.get("/v1/products?sort=price")),
        at("validation-failed", "available", admin.get("/v1/products?available=maybe")),
        at("validation-failed", "asOf", admin.get(&format!("{stock}?asOf=never"))),
        at("validation-failed", "productId", admin.get("/v1/products/not-an-id")),
        at("invalid-cursor", "cursor", admin.get("/v1/products?cursor=abc")),
        at("invalid-cursor", "cursor", admin.get("/v1/reconciliations?cursor=abc")),
        at("invalid-cursor", "cursor", admin.get(&format!("{stock}/history?cursor=abc"))),
        row("unauthorized", admin.with_token(None).get("/v1/products")),
        row("forbidden", viewer.patch(&stock, &json!({ "quantity": 1 }))),
        row("not-found", admin.get("/v1/nothing")),
        row("not-found", admin.get("/")),
        row("method-not-allowed", admin.request(Method::DELETE, &path)),
        row("precondition-failed", admin.patch(&stock, &json!({ "quantity": 1 })).header("If-Match", "\"1\"")),
        row("payload-too-large", admin.patch(&stock, &json!({ "quantity": 1, "reason": "a".repeat(100_000) }))),
        row(
            "unsupported-media-type",
            admin.request(Method::PATCH, &stock).header("Content-Type", "text/plain").bytes("{}"),
        ),
        row("too-many-requests", greedy.patch(&stock, &json!({ "quantity": 6 }))),
        row("keys-unavailable", admin.at(&world.url("keyless")).with_token(Some(asymmetric)).get("/v1/products")),
        row("product-not-found", admin.get(&format!("/v1/products/{nobody}"))),
        row("product-not-found", admin.get(&unknown)),
        row("product-not-found", admin.get(&format!("{unknown}/history"))),
        row("product-not-found", admin.get(&format!("{unknown}?asOf={last}"))),
        row("product-not-found", admin.patch(&unknown, &json!({ "quantity": 1 }))),
        row(
            "product-not-found",
            admin.post(&format!("{unknown}/counts"), &json!({ "quantity": 1, "countedAt": "2026-02-01T00:00:00Z" })),
        ),
        row("order-not-decided", admin.get(&format!("/v1/orders/{nobody}/decision"))),
        row("not-yet-registered", admin.get(&format!("{}?asOf=1", inventory(other)))),
        row(
            "product-already-registered",
            admin.post("/v1/products", &json!({ "productId": product, "sku": "Y-1", "name": "another" })),
        ),
        row(
            "sku-taken",
            admin.post(
                "/v1/products",
                &json!({ "productId": nobody, "sku": format!("T-{}", product.simple()), "name": "another" }),
            ),
        ),
        row("below-zero", admin.post(&format!("{stock}/adjustments"), &json!({ "delta": -100, "reason": "x" }))),
        row("unexpected-quantity", admin.patch(&stock, &json!({ "quantity": 1, "expectedQuantity": 77 }))),
        row("count-superseded", admin.post(&counts, &json!({ "quantity": 1, "countedAt": "2026-01-01T00:00:00Z" }))),
        row("reconciliation-not-found", admin.get(&format!("/v1/reconciliations/{nobody}"))),
        row(
            "reconciliation-not-found",
            admin.post(&format!("/v1/reconciliations/{nobody}/approval"), &json!({ "approved": true })),
        ),
        row("reconciliation-not-waiting", admin.post(&format!("{run}/approval"), &json!({ "approved": true }))),
        row("dead-letter-not-found", admin.get("/v1/dead-letters/99")),
        row("no-way-back", admin.request(Method::POST, &format!("/v1/dead-letters/{}/redrive", letter.sequence))),
        row("no-warehouse", admin.post("/v1/reconciliations", &json!({ "figures": "warehouse" }))),
        row("idempotency-key-reused", admin.patch(&stock, &json!({ "quantity": 7 })).header("Idempotency-Key", "used")),
        at("validation-failed", "lomash-min-sequence", admin.get(&path).header("Lomash-Min-Sequence", 1_000_000)),
    ];
    let types: BTreeMap<&str, u16> =
        SHARED_TYPES.iter().chain(PROBLEM_TYPES).map(|kind| (kind.slug(), kind.status().as_u16())).collect();
    let mut reached = BTreeSet::new();
    for Row { request, slug, at } in rows {
        let request_text = format!("{request:?}");
        let answer = request.send().await?;
        assert_eq!((answer.status, answer.problem()), (types[slug], slug), "{request_text}\n{answer:?}");
        let errors = answer.json["errors"].as_array().cloned().unwrap_or_default();
        match at {
            Some(at) => {
                let named = |error: &Value| ["pointer", "parameter", "header"].iter().any(|kind| error[kind] == at);
                assert!(errors.iter().any(named), "{at:?} is not named: {}", answer.text);
            }
            None => assert!(errors.is_empty(), "{}", answer.text),
        }
        if answer.status == 503 || answer.status == 429 {
            let wait: u64 = answer.header("retry-after").context("Retry-After")?.parse()?;
            assert!((1..=10).contains(&wait), "{answer:?}");
            assert_eq!(answer.json["retryAfterSeconds"], wait, "{answer:?}");
        }
        reached.insert(slug);
    }
    // The four that need a server that does not answer.
    let hasty = started(&world, "hasty", &[("HTTP_REQUEST_TIMEOUT_SECONDS", "1")]).await?;
    world.nats.pause()?;
    let mut starting = world.service("starting")?;
    starting.start()?;
    let timeout = admin.at(&world.url("hasty")).patch(&stock, &json!({ "quantity": 1 })).send();
    let unknown = admin.patch(&stock, &json!({ "quantity": 1 })).send();
    let starting_admin = admin.at(&world.url("starting"));
    let unavailable = eventually("an answer of a service that cannot start", PATIENCE, async || {
        Ok(Some(starting_admin.get("/v1/products").send().await?))
    });
    // Whether the ledger has it cannot be known, so it is waited for.
    let not_yet = admin.get(&path).header("Lomash-Min-Sequence", 1_000_000).send();
    let (timeout, unknown, unavailable, not_yet) = tokio::join!(timeout, unknown, unavailable, not_yet);
    world.nats.resume()?;
    for (slug, answer) in [
        ("timeout", timeout?),
        ("outcome-unknown", unknown?),
        ("unavailable", unavailable?),
        ("not-yet-projected", not_yet?),
    ] {
        assert_eq!((answer.status, answer.problem()), (types[slug], slug), "{answer:?}");
        reached.insert(slug);
    }
    starting.kill();

    let excused: BTreeSet<&str> = NOT_REACHED.iter().map(|(slug, _)| *slug).collect();
    let expected: BTreeSet<&str> = types.keys().copied().filter(|slug| !excused.contains(slug)).collect();
    assert_eq!(reached, expected, "types that no row reaches, or that an excuse names");
    finish(world, [service, limited, keyless, hasty]).await
}

// ── Races and repetitions ───────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn of_two_admins_with_the_same_version_one_wins() -> Result<()> {
    let (world, first, admin) = world().await?;
    let second = started(&world, "two", &[]).await?;
    let product = admin.register(0).await?;
    let mut etag = read(&admin, &format!("/v1/products/{product}"), world.last_sequence().await?)
        .await?
        .header("etag")
        .unwrap()
        .to_owned();
    let (one, two) = (&admin, Caller::new(&world.url("two"), Role::Admin)?);
    let mut quantity = 0;
    for round in 1..=ROUNDS {
        // In turn both at one replica, where they are decided in one batch, and at two, where the stream decides.
        let other = if round % 2 == 0 { two.clone() } else { two.at(&world.url("one")) };
        let (mine, theirs) = (round * 2, round * 2 + 1);
        let change = |caller: &Caller, to: usize| {
            caller.patch(&inventory(product), &json!({ "quantity": to })).header("If-Match", &etag).send()
        };
        let (a, b) = tokio::try_join!(change(one, mine), change(&other, theirs))?;
        let (won, lost, is) = if a.status == 200 { (a, b, mine) } else { (b, a, theirs) };
        assert_eq!((won.status, lost.status), (200, 412), "round {round}: {won:?} {lost:?}");
        assert_eq!(lost.problem(), "precondition-failed");
        assert_eq!(won.json["previousQuantity"], quantity, "round {round}");
        assert_eq!(lost.json["version"].as_str(), won.header("etag"), "the loser is told what to look at");
        quantity = is;

        let (mine, theirs) = (1_000 + round * 2, 1_001 + round * 2);
        let change = |caller: &Caller, to: usize| {
            let body = json!({ "quantity": to, "expectedQuantity": quantity });
            caller.patch(&inventory(product), &body).send()
        };
        let (a, b) = tokio::try_join!(change(one, mine), change(&other, theirs))?;
        let (won, lost, is) = if a.status == 200 { (a, b, mine) } else { (b, a, theirs) };
        assert_eq!((won.status, lost.status, lost.problem()), (200, 409, "unexpected-quantity"), "{won:?} {lost:?}");
        assert_eq!((&lost.json["expected"], &lost.json["actual"]), (&json!(quantity), &json!(is)));
        (etag, quantity) = (won.header("etag").unwrap().to_owned(), is);
    }
    assert_eq!(world.stock(ProductId(product)).await? as usize, quantity);
    world.verified().await?;
    finish(world, [first, second]).await
}

/// What must be the same in the answer to a repeated request.
fn essence(answer: &Answer) -> (u16, &str, Option<&str>, Option<&str>) {
    (answer.status, &answer.text, answer.header("etag"), answer.header("lomash-sequence"))
}

#[tokio::test]
async fn a_key_gives_the_same_answer_for_ever_and_everywhere() -> Result<()> {
    let world = World::start().await?;
    // Only what the replicas remember may tell a repetition.
    forget_duplicates_soon(&world).await?;
    let weaker = [("LEDGER_ALLOW_WEAKER", "duplicate_window")];
    let mut first = started(&world, "one", &weaker).await?;
    let mut second = started(&world, "two", &weaker).await?;
    let one = Caller::new(&world.url("one"), Role::Admin)?;
    let two = one.at(&world.url("two"));
    let product = one.register(10).await?;
    let stock = inventory(product);
    let key = |request: Request, key: &str| request.header("Idempotency-Key", key);
    let requests = |caller: &Caller| {
        vec![
            key(caller.patch(&stock, &json!({ "quantity": 40, "reason": "stocktaking" })), "set"),
            key(caller.post(&format!("{stock}/adjustments"), &json!({ "delta": -40, "reason": "sold" })), "adjust"),
            key(
                caller.post(&format!("{stock}/counts"), &json!({ "quantity": 3, "countedAt": "2026-01-31T09:30:00Z" })),
                "count",
            ),
            key(caller.patch(&format!("/v1/products/{product}"), &json!({ "name": "Beech" })), "amend"),
            key(
                caller.post("/v1/products", &json!({ "sku": "KEY-1", "name": "Key", "initialQuantity": 4 })),
                "register",
            ),
        ]
    };
    let mut answers = Vec::new();
    for request in requests(&one) {
        let answer = request.send().await?;
        assert!(matches!(answer.status, 200 | 201), "{answer:?}");
        assert!(answer.header("idempotent-replayed").is_none(), "{answer:?}");
        answers.push(answer);
    }
    let events = world.last_sequence().await?;
    let repeated = async |caller: &Caller, when: &str| -> Result<()> {
        for (request, answer) in requests(caller).into_iter().zip(&answers) {
            let again = request.send().await?;
            assert_eq!(essence(&again), essence(answer), "{when}");
            assert_eq!(again.header("location"), answer.header("location"), "{when}");
            assert_eq!(again.header("idempotent-replayed"), Some("true"), "{when}: {again:?}");
        }
        assert_eq!(world.last_sequence().await?, events, "{when}: something was stored");
        Ok(())
    };
    repeated(&one, "at the same replica").await?;
    repeated(&two, "at the other replica").await?;
    wait_until_forgotten(&world).await?;
    repeated(&one, "after the window of the stream").await?;
    first.stop().await?;
    second.kill();
    for service in [&mut first, &mut second] {
        start_until_ready(service).await?;
    }
    repeated(&two, "after a restart").await?;

    // The key in quotes, as the draft has it, is the same key.
    let quoted = key(one.patch(&stock, &json!({ "quantity": 40, "reason": "stocktaking" })), "\"set\"").send().await?;
    assert_eq!(essence(&quoted), essence(&answers[0]));
    // Another body, route or product under the key is another request.
    let other = one.register(0).await?;
    for request in [
        key(two.patch(&stock, &json!({ "quantity": 41, "reason": "stocktaking" })), "set"),
        key(two.patch(&stock, &json!({ "quantity": 40 })), "set"),
        key(two.patch(&inventory(other), &json!({ "quantity": 40, "reason": "stocktaking" })), "set"),
        key(two.post(&format!("{stock}/adjustments"), &json!({ "delta": 40, "reason": "stocktaking" })), "set"),
    ] {
        let answer = request.send().await?;
        assert_eq!((answer.status, answer.problem()), (422, "idempotency-key-reused"), "{answer:?}");
    }
    // The key is the caller's own.
    let somebody = Caller::new(&world.url("one"), Role::Admin)?;
    let theirs = key(somebody.patch(&stock, &json!({ "quantity": 41 })), "set").send().await?;
    assert_eq!((theirs.status, &theirs.json["changed"]), (200, &json!(true)), "{theirs:?}");
    assert!(theirs.header("idempotent-replayed").is_none());

    finish(world, [first, second]).await
}

/// An order after an answer that changed nothing, and what else moves the stock, must not make a repetition act.
#[tokio::test]
async fn a_key_holds_also_when_nothing_changed_or_a_rule_refused() -> Result<()> {
    let world = World::start().await?;
    // Only what the replicas remember may tell a repetition.
    forget_duplicates_soon(&world).await?;
    let weaker = [("LEDGER_ALLOW_WEAKER", "duplicate_window")];
    let mut first = started(&world, "one", &weaker).await?;
    let mut second = started(&world, "two", &weaker).await?;
    let one = Caller::new(&world.url("one"), Role::Admin)?;
    let two = one.at(&world.url("two"));
    let product = one.register(40).await?;
    let (stock, absent) = (inventory(product), inventory(Uuid::new_v4()));
    let key = |request: Request, key: &str| request.header("Idempotency-Key", key);
    let requests = |caller: &Caller| {
        [
            (200, key(caller.patch(&stock, &json!({ "quantity": 40 })), "nothing")),
            (409, key(caller.post(&format!("{stock}/adjustments"), &json!({ "delta": -41, "reason": "x" })), "below")),
            (409, key(caller.patch(&stock, &json!({ "quantity": 9, "expectedQuantity": 41 })), "expected")),
            (412, key(caller.patch(&stock, &json!({ "quantity": 9 })), "version").header("If-Match", "\"999999\"")),
            (404, key(caller.patch(&absent, &json!({ "quantity": 9 })), "absent")),
        ]
    };
    let mut answers = Vec::new();
    for (status, request) in requests(&one) {
        let answer = request.send().await?;
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(answer.header("idempotent-replayed").is_none(), "{answer:?}");
        answers.push(answer);
    }
    let sold = order(&[(ProductId(product), 5)]);
    world.publish(&sold).await?;
    world.decided([sold.payload.order_id]).await?;
    let repeated = async |caller: &Caller, when: &str| -> Result<()> {
        let before = world.last_sequence().await?;
        for ((_, request), answer) in requests(caller).into_iter().zip(&answers) {
            let again = request.send().await?;
            assert_eq!(again.status, answer.status, "{when}: {again:?}");
            assert_eq!(again.header("idempotent-replayed"), Some("true"), "{when}: {again:?}");
            assert_eq!(again.header("lomash-sequence"), answer.header("lomash-sequence"), "{when}");
            for field in ["changed", "quantity", "sequence", "type", "detail", "version", "expected", "actual"] {
                assert_eq!(again.json[field], answer.json[field], "{when}: {field} of {again:?}");
            }
        }
        assert_eq!(world.last_sequence().await?, before, "{when}: something was stored");
        Ok(())
    };
    repeated(&one, "at the same replica").await?;
    assert_eq!(world.stock(ProductId(product)).await?, 35);
    repeated(&two, "at the other replica").await?;
    // There is more now than any of them wanted.
    assert_eq!(two.patch(&stock, &json!({ "quantity": 41 })).send().await?.status, 200);
    wait_until_forgotten(&world).await?;
    first.stop().await?;
    second.kill();
    for service in [&mut first, &mut second] {
        start_until_ready(service).await?;
    }
    repeated(&one, "after a restart").await?;
    assert_eq!(world.stock(ProductId(product)).await?, 41);

    for request in [
        key(one.patch(&stock, &json!({ "quantity": 39 })), "nothing"),
        key(two.post(&format!("{stock}/adjustments"), &json!({ "delta": -40, "reason": "x" })), "below"),
        key(one.patch(&stock, &json!({ "quantity": 9, "expectedQuantity": 35 })), "expected"),
        // Whoever read again and asks for the version of now wants no answer of then: it is another request.
        key(two.patch(&stock, &json!({ "quantity": 9 })), "version").header("If-Match", "\"1\""),
        key(one.patch(&stock, &json!({ "quantity": 9 })), "absent"),
    ] {
        let answer = request.send().await?;
        assert_eq!((answer.status, answer.problem()), (422, "idempotency-key-reused"), "{answer:?}");
    }
    // What was wrong by itself left its key free.
    let wrong = key(one.patch(&stock, &json!({ "quantity": 1_000_000_001 })), "mended").send().await?;
    assert_eq!(wrong.status, 400, "{wrong:?}");
    let mended = key(one.patch(&stock, &json!({ "quantity": 7 })), "mended").send().await?;
    assert_eq!((mended.status, &mended.json["changed"]), (200, &json!(true)), "{mended:?}");
    world.quiet().await?;
    // All but the window that this test has shortened.
    let report = world.report().await?;
    assert!(report.invariants.iter().all(|is| is.number == 6 || is.violations == 0), "{report:?}");
    assert_eq!(report.totals.commands_answered, 6);
    finish(world, [first, second]).await
}

/// Whoever publishes orders chooses their ids: also those of commands, and of events that were heard.
#[tokio::test]
async fn an_order_under_the_id_of_a_command_is_decided_beside_it() -> Result<()> {
    let (world, service, admin) = world().await?;
    let product = admin.register(40).await?;
    let mut heard = world.client.subscribe("lomash.>").await?;
    world.client.flush().await?;
    let request = admin.patch(&inventory(product), &json!({ "quantity": 30 })).header("Idempotency-Key", "seen");
    let set = request.send().await?;
    assert_eq!(set.status, 200, "{set:?}");
    let live = loop {
        let message = heard.next().await.context("a live event")?;
        if message.subject.as_str() == "lomash.inventory.updated" {
            break message;
        }
    };
    let headers = live.headers.context("headers")?;
    assert!(headers.iter().all(|(name, _)| name.to_string().to_lowercase() != "lomash-command"), "{headers:?}");

    let command = Uuid::new_v5(&admin.subject, b"seen");
    let event: Uuid = set.json["eventId"].as_str().context("an event id")?.parse()?;
    let mut ids = BTreeSet::new();
    for chosen in [command, event] {
        let order = order_as(Uuid::new_v4().into(), chosen.into(), &[(ProductId(product), 30)]);
        world.publish(&order).await?;
        world.decided([order.payload.order_id]).await?;
        admin.patch(&inventory(product), &json!({ "quantity": 30 })).send().await?;
    }
    for message in world.messages().await? {
        assert!(ids.insert(message.message_id.clone()), "{message:?} has the id of another");
    }
    assert!(set.json["changed"] == true && world.stock(ProductId(product)).await? == 30);
    world.quiet().await?;
    world.verified().await?;
    finish(world, [service]).await
}

/// A key that was used on a ledger whose events told their command in a header holds after the upgrade.
#[tokio::test]
async fn a_key_of_an_older_ledger_holds() -> Result<()> {
    let (world, service, admin) = world().await?;
    let product = ProductId(admin.register(10).await?);
    let command = Uuid::new_v5(&admin.subject, b"then");
    // What the service made of `{"quantity": 4}` then.
    let mut request = Sha256::new();
    request.update("setQuantity");
    request.update(product.0);
    request.update(r#"{"quantity":4,"expectedQuantity":null,"reason":null}"#);
    let fingerprint: String = request.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let updated = InventoryUpdated {
        product_id: product,
        sku: format!("T-{}", product.0.simple()).parse()?,
        previous_quantity: 10,
        new_quantity: 4,
        trigger: Trigger::AdminUpdate,
        order_id: None,
        updated_by: UpdatedBy::User(admin.subject),
    };
    let event_id = EventId::derive_by_order(&command, EventRole::Stock, &product.0);
    let envelope = Envelope::new(event_id, Timestamp::now(), updated);
    let message = NewMessage {
        subject: format!("lomash.inventory.updated.{product}"),
        event_id,
        payload: codec::encode(ContentType::Json, &envelope).into(),
        carried: Some(Arc::new(Carried { command: Some(format!("{command} {fingerprint}")), ..Carried::default() })),
    };
    let last = world.last_sequence().await?;
    world.ledger().append(&[message], last).await?;
    let set = |quantity: u32| {
        admin.patch(&inventory(product.0), &json!({ "quantity": quantity })).header("Idempotency-Key", "then").send()
    };
    let again = set(4).await?;
    assert_eq!((again.status, again.header("idempotent-replayed")), (200, Some("true")), "{again:?}");
    assert_eq!(again.json["eventId"], json!(event_id), "{again:?}");
    assert_eq!(again.sequence(), last + 1);
    let other = set(5).await?;
    assert_eq!((other.status, other.problem()), (422, "idempotency-key-reused"), "{other:?}");
    world.verified().await?;
    finish(world, [service]).await
}

/// Makes the de-duplication window of the ledger as short as the server takes.
async fn forget_duplicates_soon(world: &World) -> Result<()> {
    let mut stream = world.context.get_stream("INVENTORY").await?;
    let mut config = stream.info().await?.config.clone();
    config.duplicate_window = Duration::from_millis(100);
    world.context.update_stream(config).await?;
    Ok(())
}

/// Waits until the server has forgotten the message ids of what is in the ledger. A message is sent under the last one's
/// id that can never be stored: as long as the id is known it is a duplicate, and then it is at a wrong sequence.
async fn wait_until_forgotten(world: &World) -> Result<()> {
    let last = world.messages().await?.pop().context("a message")?;
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_MESSAGE_ID, last.parse().unwrap().event_id.to_string());
    headers.insert(async_nats::header::NATS_EXPECTED_LAST_SEQUENCE, u64::from(u32::MAX).to_string());
    eventually("forgotten message ids", PATIENCE, async || {
        let sent = world.context.publish_with_headers(last.subject.clone(), headers.clone(), "".into()).await?;
        match sent.await {
            Ok(ack) if ack.duplicate => Ok(None),
            Ok(ack) => panic!("a message for the far future was stored: {ack:?}"),
            Err(_) => Ok(Some(())),
        }
    })
    .await
}

#[tokio::test]
async fn sixty_four_at_once_under_one_key_change_stock_once() -> Result<()> {
    let (world, first, one) = world().await?;
    let second = started(&world, "two", &[]).await?;
    let two = one.at(&world.url("two"));
    let product = one.register(1_000).await?;
    let adjustments = format!("{}/adjustments", inventory(product));
    for round in 0..5 {
        let before = world.last_sequence().await?;
        let requests = (0..64).map(|number| {
            let caller = if number % 2 == 0 { &one } else { &two };
            let body = json!({ "delta": -7, "reason": "sold" });
            caller.post(&adjustments, &body).header("Idempotency-Key", format!("round-{round}")).send()
        });
        let answers = futures::future::try_join_all(requests).await?;
        let first = &answers[0];
        for answer in &answers {
            assert_eq!(essence(answer), essence(first), "round {round}");
        }
        assert_eq!(first.status, 200, "{first:?}");
        let new = answers.iter().filter(|answer| answer.header("idempotent-replayed").is_none()).count();
        assert_eq!(new, 1, "one of them did it, the others heard of it");
        assert_eq!(world.last_sequence().await?, before + 2, "round {round}: the answer and the change");
    }
    assert_eq!(world.stock(ProductId(product)).await?, 1_000 - 5 * 7);
    world.verified().await?;
    finish(world, [first, second]).await
}

// ── Reads ───────────────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn a_reader_sees_its_write_on_either_replica() -> Result<()> {
    let (world, first, one) = world().await?;
    let second = started(&world, "two", &[]).await?;
    let two = one.at(&world.url("two"));
    let product = one.register(0).await?;
    for quantity in 1..=30 {
        let (writer, reader) = if quantity % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let written = writer.patch(&inventory(product), &json!({ "quantity": quantity })).send().await?;
        assert_eq!(written.status, 200, "{written:?}");
        for path in [inventory(product), format!("/v1/products/{product}")] {
            let seen = read(reader, &path, written.sequence()).await?;
            assert_eq!(seen.json["quantity"], quantity, "{seen:?}");
            assert_eq!(seen.header("etag"), written.header("etag"));
        }
        let sku = format!("/v1/products?sku=T-{}", product.simple());
        let listed = read(reader, &sku, written.sequence()).await?;
        assert_eq!(listed.json["items"][0]["quantity"], quantity, "{listed:?}");
    }

    // Beyond the ledger: told at once, with where it ends.
    let last = world.last_sequence().await?;
    for path in [
        inventory(product),
        "/v1/products".to_owned(),
        format!("{}/history", inventory(product)),
        format!("/v1/orders/{}/decision", Uuid::new_v4()),
        format!("{}?asOf={}", inventory(product), last + 1),
    ] {
        let answer = two.get(&path).header("Lomash-Min-Sequence", last + 1).send().await?;
        assert_eq!((answer.status, answer.problem()), (400, "validation-failed"), "{path}: {answer:?}");
        assert_eq!(answer.json["end"], last, "{path}");
        assert!(answer.took < Duration::from_secs(2), "{path} took {:?}", answer.took);
    }

    // As of a sequence and of an instant, through every change.
    let events = world.events().await?;
    for (message, event) in events {
        let LedgerEvent::InventoryUpdated(updated) = event else { continue };
        let then = read(&one, &format!("{}?asOf={}", inventory(product), message.sequence), last).await?;
        assert_eq!(then.json["quantity"], updated.new_quantity, "{then:?}");
        assert_eq!(then.json["version"], message.sequence);
        let instant = then.json["updatedAt"].as_str().unwrap();
        let then = read(&two, &format!("{}?asOf={instant}", inventory(product)), last).await?;
        assert!(then.json["version"].as_u64().unwrap() >= message.sequence, "{then:?}");
    }
    let offset = "2026-01-31T09:30:00%2B01:00";
    let before = one.get(&format!("{}?asOf={offset}", inventory(product))).send().await?;
    assert_eq!(before.problem(), "not-yet-registered", "{before:?}");

    // A decision, with who got what.
    let order = order(&[(ProductId(product), 4)]);
    let id = order.payload.order_id;
    world.publish(&order).await?;
    world.decided([id]).await?;
    let decision = read(&two, &format!("/v1/orders/{id}/decision"), world.last_sequence().await?).await?;
    assert_eq!(decision.json["outcome"], "allocated", "{decision:?}");
    assert_eq!(decision.json["allocated"][0]["quantity"], 4);
    let history = read(&two, &format!("{}/history?limit=1", inventory(product)), world.last_sequence().await?).await?;
    assert_eq!(history.json["items"][0]["orderId"], json!(id), "{history:?}");
    finish(world, [first, second]).await
}

#[tokio::test]
async fn pages_meet_without_gaps_and_altered_cursors_are_refused() -> Result<()> {
    let (world, service, admin) = world().await?;
    let mut skus = BTreeSet::new();
    for _ in 0..7 {
        skus.insert(format!("T-{}", admin.register(1).await?.simple()));
    }
    let product = admin.register(0).await?;
    skus.insert(format!("T-{}", product.simple()));
    for quantity in 1..=5 {
        admin.patch(&inventory(product), &json!({ "quantity": quantity })).send().await?;
    }
    let last = world.last_sequence().await?;
    let walk = async |path: &str| -> Result<Vec<Value>> {
        let (mut items, mut cursor) = (Vec::new(), None::<String>);
        loop {
            let after = cursor.map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
            let page = read(&admin, &format!("{path}{after}"), last).await?;
            items.extend(page.json["items"].as_array().unwrap().clone());
            match page.json["nextCursor"].as_str() {
                Some(next) => cursor = Some(next.to_owned()),
                None => return Ok(items),
            }
        }
    };
    for sort in ["sku", "-sku", "name", "-name", "quantity", "-quantity", "updated", "-updated"] {
        let items = walk(&format!("/v1/products?limit=3&sort={sort}")).await?;
        let found: BTreeSet<String> = items.iter().map(|item| item["sku"].as_str().unwrap().to_owned()).collect();
        assert_eq!((items.len(), found), (8, skus.clone()), "{sort}");
    }
    let history = walk(&format!("{}/history?limit=2&oldestFirst=true", inventory(product))).await?;
    let quantities: Vec<_> = history.iter().map(|item| item["newQuantity"].as_u64().unwrap()).collect();
    assert_eq!(quantities, [1, 2, 3, 4, 5]);

    let page = admin.get("/v1/products?limit=3").send().await?;
    let cursor = page.json["nextCursor"].as_str().unwrap().to_owned();
    let mut altered = cursor.clone().into_bytes();
    altered[20] = if altered[20] == b'A' { b'B' } else { b'A' };
    let altered = String::from_utf8(altered)?;
    for path in [
        format!("/v1/products?limit=3&cursor={altered}"),
        format!("/v1/products?limit=3&cursor={}", &cursor[..10]),
        format!("/v1/products?limit=3&cursor={cursor}AAAA"),
        format!("/v1/products?limit=3&cursor={}", "A".repeat(5_000)),
        "/v1/products?limit=3&cursor=".to_owned(),
        "/v1/products?limit=3&cursor=%00%ff%27".to_owned(),
        format!("/v1/products?limit=3&sort=name&cursor={cursor}"),
        format!("/v1/products?limit=3&available=true&cursor={cursor}"),
        format!("{}/history?cursor={cursor}", inventory(product)),
        format!("/v1/reconciliations?cursor={cursor}"),
    ] {
        let answer = admin.get(&path).send().await?;
        let shown = (answer.status, answer.problem());
        assert!(
            shown == (400, "invalid-cursor") || (path.contains("%ff") && answer.status == 400),
            "{path}: {answer:?}"
        );
    }
    finish(world, [service]).await
}

// ── The live stream ─────────────────────────────────────────────────────────────────────────────────────────────

/// One event as a client reads it.
#[derive(Debug, Default, PartialEq, Eq, Clone)]
struct Heard {
    id: u64,
    event: String,
    data: String,
}

/// Reads events until `enough`, or until the answer ends.
async fn hear(response: reqwest::Response, mut enough: impl FnMut(&[Heard]) -> bool) -> Result<Vec<Heard>> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut bytes = response.bytes_stream();
    let (mut text, mut heard) = (String::new(), Vec::new());
    while !enough(&heard)
        && let Some(Ok(piece)) = bytes.next().await
    {
        text.push_str(std::str::from_utf8(&piece)?);
        while let Some((block, rest)) = text.split_once("\n\n") {
            let mut one = Heard::default();
            for line in block.lines() {
                match line.split_once(": ") {
                    Some(("id", id)) => one.id = id.parse()?,
                    Some(("event", event)) => one.event = event.to_owned(),
                    Some(("data", data)) => one.data = data.to_owned(),
                    _ => {}
                }
            }
            if one.id > 0 {
                heard.push(one);
            }
            text = rest.to_owned();
        }
    }
    Ok(heard)
}

#[tokio::test]
async fn the_stream_goes_on_where_it_ended_across_a_restart() -> Result<()> {
    let (world, mut service, admin) = world().await?;
    let mut second = started(&world, "two", &[]).await?;
    let writer = admin.at(&world.url("two"));
    let product = writer.register(0).await?;
    let other = writer.register(0).await?;
    let start = world.last_sequence().await?;
    let open = async |last: u64| admin.get("/v1/inventory/stream").header("Last-Event-ID", last).open().await;
    let (live, filtered) = tokio::try_join!(
        admin.get("/v1/inventory/stream").open(),
        admin.get(&format!("/v1/inventory/stream?productId={other}")).open()
    )?;
    let writing = async {
        for quantity in 1..=20 {
            writer.patch(&inventory(product), &json!({ "quantity": quantity })).send().await?;
            writer.patch(&inventory(other), &json!({ "quantity": quantity })).send().await?;
        }
        Ok::<_, anyhow::Error>(())
    };
    // Both streams were open before the first write: they hear all from there on, until the service stops.
    let stopping = async {
        writing.await?;
        let last = world.last_sequence().await?;
        Ok::<u64, anyhow::Error>(last)
    };
    let (heard, of_other, last) =
        tokio::try_join!(hear(live, |heard| heard.len() >= 10), hear(filtered, |heard| heard.len() >= 21), stopping)?;
    assert_eq!(heard[0].id, start + 1, "it begins with what comes next");
    assert!(
        of_other.iter().all(|one| one.data.contains(&other.to_string()) && !one.data.contains(&product.to_string()))
    );
    assert!(of_other.iter().any(|one| one.event == "inventory-updated"), "{of_other:?}");
    let mut all = heard;

    // It ends when the service stops, and at once.
    let running = open(last).await?;
    let before = tokio::time::Instant::now();
    let (rest, stopped) = tokio::join!(hear(running, |_| false), service.stop());
    stopped?;
    assert_eq!(rest?, [], "nothing was stored meanwhile");
    assert!(before.elapsed() < Duration::from_secs(4), "the end took {:?}", before.elapsed());
    writer.patch(&inventory(product), &json!({ "quantity": 99 })).send().await?;
    start_until_ready(&mut service).await?;

    let end = world.last_sequence().await?;
    let resumed = open(all.last().unwrap().id).await?;
    all.extend(hear(resumed, |heard| heard.last().is_some_and(|one| one.id >= end)).await?);
    let ids: Vec<u64> = all.iter().map(|one| one.id).collect();
    assert_eq!(ids, (start + 1..=end).collect::<Vec<_>>(), "each once, in order");
    for (message, one) in world.messages().await?.iter().filter(|message| message.sequence > start).zip(&all) {
        let envelope = message.parse().unwrap();
        let data: Value = serde_json::from_str(&one.data)?;
        assert_eq!(one.event, envelope.event_type.as_str());
        assert_eq!(data["eventId"], envelope.event_id.to_string(), "the envelope of the contract");
    }
    second.stop().await?;
    finish(world, [service]).await
}

// ── Abuse ───────────────────────────────────────────────────────────────────────────────────────────────────────

#[tokio::test]
async fn nothing_that_is_sent_breaks_the_service() -> Result<()> {
    let (world, service, admin) = world().await?;
    let product = admin.register(5).await?;
    let (stock, path) = (inventory(product), format!("/v1/products/{product}"));
    let last = world.last_sequence().await?;
    let ids = [
        "'",
        "%27%20OR%201=1--",
        "*",
        "%2A",
        "%3E",
        ">",
        ".",
        "..",
        "%2E%2E",
        "%0d%0aX-Evil:%201",
        "%0D%0A",
        "%00",
        "%ff",
        "%F0%9F%98%80",
        "a%2Fb",
        "null",
        "-1",
        "0",
        "%7B%22%24ne%22%3A1%7D",
        "%252e%252e",
    ];
    let long = "a".repeat(10_000);
    let mut requests: Vec<(String, Request)> = Vec::new();
    for id in ids.into_iter().chain([long.as_str()]) {
        let shown = &id[..id.len().min(30)];
        for (method, path) in [
            (Method::GET, format!("/v1/products/{id}")),
            (Method::GET, format!("/v1/products/{id}/inventory")),
            (Method::GET, format!("/v1/products/{id}/inventory/history")),
            (Method::GET, format!("/v1/orders/{id}/decision")),
            (Method::GET, format!("/v1/reconciliations/{id}")),
            (Method::GET, format!("/v1/inventory/stream?productId={id}")),
            (Method::GET, format!("/v1/products/{product}/inventory?asOf={id}")),
            (Method::GET, format!("/v1/products?limit={id}")),
        ] {
            // An id that vanishes from the path (`..`) makes another path of it, which may be a list.
            requests
                .push((format!("{method} {shown} in {}", &path[..path.len().min(60)]), admin.request(method, &path)));
        }
        let body = r#"{"quantity":1}"#;
        let request = admin.request(Method::PATCH, &format!("/v1/products/{id}/inventory"));
        requests.push((format!("PATCH {shown}"), request.header("Content-Type", "application/json").bytes(body)));
    }
    let queries = [
        format!("q={long}"),
        format!("sku={long}"),
        format!("category={long}"),
        "q=%00".to_owned(),
        "sku=%00".to_owned(),
        "category=%00".to_owned(),
        "q=%ff".to_owned(),
        "q=%25%25%25".to_owned(),
        "q=%27%29%3B%20DROP%20TABLE".to_owned(),
        "q=".to_owned(),
        "q=:*%20%26%20!".to_owned(),
        "limit=99999999999999999999".to_owned(),
        "limit=-1".to_owned(),
        "limit=1&limit=2".to_owned(),
        "available=1".to_owned(),
        "unknown=1".to_owned(),
        "&&&===".to_owned(),
        (0..2_000).map(|number| format!("q{number}=1&")).collect(),
    ];
    for query in &queries {
        requests.push((format!("GET ?{}", &query[..query.len().min(40)]), admin.get(&format!("/v1/products?{query}"))));
    }
    for as_of in [
        "9999-12-31T23:59:60Z",
        "-1",
        "99999999999999999999",
        "0000-01-01T00:00:00Z",
        "+1",
        "1e3",
        "%00",
        "-9999-01-01T00:00:00Z",
    ] {
        requests.push((format!("asOf={as_of}"), admin.get(&format!("{stock}?asOf={as_of}"))));
    }
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let deep_field = format!(r#"{{"quantity":{deep}}}"#);
    let many = format!("{{{}}}", (0..4_000).map(|number| format!("\"f{number}\":1")).collect::<Vec<_>>().join(","));
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        ("empty", Vec::new()),
        ("null", b"null".to_vec()),
        ("array", b"[]".to_vec()),
        ("deep", deep.into_bytes()),
        ("deep field", deep_field.into_bytes()),
        ("many fields", many.into_bytes()),
        ("twice", br#"{"quantity":1,"quantity":2}"#.to_vec()),
        ("mass assignment", br#"{"quantity":1,"updatedBy":"system","trigger":"ORDER_CONFIRMED"}"#.to_vec()),
        ("prototype", br#"{"quantity":1,"__proto__":{"role":"ADMIN"}}"#.to_vec()),
        ("negative", br#"{"quantity":-1}"#.to_vec()),
        ("overflow", br#"{"quantity":99999999999999999999999999}"#.to_vec()),
        ("exponent", br#"{"quantity":1e400}"#.to_vec()),
        ("fraction", br#"{"quantity":1.5}"#.to_vec()),
        ("text", br#"{"quantity":"1"}"#.to_vec()),
        ("boolean", br#"{"quantity":true}"#.to_vec()),
        ("NUL in a reason", br#"{"quantity":1,"reason":"a\u0000b"}"#.to_vec()),
        ("CR LF in a reason", br#"{"quantity":1,"reason":"a\r\nNats-Rollup: all"}"#.to_vec()),
        ("half a surrogate", br#"{"quantity":1,"reason":"\ud800"}"#.to_vec()),
        ("not UTF-8", b"{\"quantity\":1,\"reason\":\"\xff\"}".to_vec()),
        ("a byte order mark", b"\xef\xbb\xbf{\"quantity\":1}".to_vec()),
        ("two documents", br#"{"quantity":1}{"quantity":2}"#.to_vec()),
        ("NaN", br#"{"quantity":NaN}"#.to_vec()),
        ("10 MB", vec![b' '; 10 << 20]),
    ];
    for (what, body) in &bodies {
        for (method, path) in [(Method::PATCH, &stock), (Method::PATCH, &path)] {
            let request = admin.request(method, path).header("Content-Type", "application/json");
            requests.push((format!("{what} to {path}"), request.bytes(body.clone())));
        }
        let request = admin.request(Method::POST, "/v1/products").header("Content-Type", "application/json");
        requests.push((format!("{what} to /v1/products"), request.bytes(body.clone())));
    }
    for content_type in
        ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp"]
    {
        let request = admin.request(Method::PATCH, &stock).header("Content-Type", content_type);
        requests.push((format!("type {content_type}"), request.bytes(r#"{"quantity":1}"#)));
    }
    let compressed = admin
        .request(Method::PATCH, &stock)
        .header("Content-Type", "application/json")
        .header("Content-Encoding", "gzip");
    requests.push(("gzip".to_owned(), compressed.bytes(vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0])));
    for sku in ["A\u{0}B", "A\nB", "ä".repeat(65).as_str(), " "] {
        requests.push((format!("sku {sku:?}"), admin.post("/v1/products", &json!({ "sku": sku, "name": "x" }))));
        requests.push((
            format!("name {sku:?}"),
            admin.post("/v1/products", &json!({ "sku": "OK-1", "name": format!("{sku}\u{0}") })),
        ));
    }
    for (name, value) in [
        ("If-Match", "garbage"),
        ("If-Match", "\"1\", \"2\", W/"),
        ("Idempotency-Key", "a b"),
        ("Idempotency-Key", "\""),
        ("Lomash-Min-Sequence", "99999999999999999999"),
        ("Lomash-Min-Sequence", "1.5"),
    ] {
        let request =
            if name.starts_with("Lomash") { admin.get(&path) } else { admin.patch(&stock, &json!({ "quantity": 1 })) };
        requests.push((format!("{name}: {value}"), request.header(name, value)));
    }
    for key in ["a".repeat(129), "ä".to_owned()] {
        let request = admin.patch(&stock, &json!({ "quantity": 1 })).header("Idempotency-Key", &key);
        requests.push((format!("key {key}"), request));
    }
    for last_event in ["-1", "+1", "a", "99999999999999999999"] {
        requests.push((
            format!("Last-Event-ID {last_event}"),
            admin.get("/v1/inventory/stream").header("Last-Event-ID", last_event),
        ));
    }
    for method in [Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE, Method::from_bytes(b"BREW")?] {
        for path in [&path, &stock, &"/v1/products".to_owned(), &"/".to_owned(), &"/readyz".to_owned()] {
            requests.push((format!("{method} {path}"), admin.request(method.clone(), path)));
        }
    }
    requests.push((
        "many headers".to_owned(),
        (0..200).fold(admin.get(&path), |request, number| request.header(&format!("x-{number}"), "1")),
    ));
    requests.push(("a huge header".to_owned(), admin.get(&path).header("x-huge", "a".repeat(40_000))));

    let mut wrong = Vec::new();
    for (what, request) in requests {
        // A server may close the connection on a body that it does not want: then there is no answer, and no 5xx.
        match tokio::time::timeout(PATIENCE, request.open()).await? {
            Ok(response) => {
                let status = response.status().as_u16();
                let harmless = what.starts_with("GET") && matches!(status, 200..=399);
                if !(harmless || (400..500).contains(&status)) {
                    wrong.push(format!("{what}: {status} {}", response.text().await.unwrap_or_default()));
                }
            }
            Err(_) if what.contains("10 MB") || what.contains("huge") => {}
            Err(problem) => wrong.push(format!("{what}: {problem:#}")),
        }
    }
    assert!(wrong.is_empty(), "{} answers are not as they must be:\n{}", wrong.len(), wrong.join("\n"));

    // HEAD is GET without its body.
    let (head, get) = (admin.request(Method::HEAD, &path).send().await?, admin.get(&path).send().await?);
    assert_eq!((head.status, head.text.as_str(), head.header("etag")), (200, "", get.header("etag")), "{head:?}");
    assert_eq!(world.last_sequence().await?, last, "something was stored");
    let after = admin.patch(&stock, &json!({ "quantity": 1 })).send().await?;
    assert_eq!(after.status, 200, "the service is as good as before: {after:?}");
    world.verified().await?;
    finish(world, [service]).await
}
