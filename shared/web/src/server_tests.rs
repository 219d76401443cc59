//! The server on real sockets: what it refuses, what it bears, and how it ends.

use std::sync::Mutex;

use axum::Json;
use axum::http::StatusCode;
use axum::routing::{get, post};
use clap::Parser;
use lomash_platform::Secret;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::*;
use crate::auth::{Mint, mint};
use crate::limits::{MAX_DISCARDED_BYTES, time_limited};
use crate::{Admin, Body, Gate, Health, Path, Query, Role, Verifier, Viewer};

const SECRET: &str = "a development secret of 32 bytes or more";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Parser)]
struct Process {
    #[command(flatten)]
    http: HttpConfig,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Change {
    quantity: u32,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Filter {
    limit: Option<u8>,
    available: Option<bool>,
}

/// A server with a few routes, on a port of its own.
struct World {
    address: SocketAddr,
    stop: CancellationToken,
    health: Health,
    /// Told when a request has arrived at `/v1/held`, and lets it go.
    arrived: Arc<Notify>,
    release: Arc<Notify>,
    serving: Mutex<Option<JoinHandle<()>>>,
    client: reqwest::Client,
}

impl World {
    async fn start(arguments: &[&str]) -> Self {
        // Another test may have chosen already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let fixed = ["test", "--http-listen", "127.0.0.1:0", "--jwt-hs256-secret", SECRET];
        let http = Process::parse_from(fixed.iter().chain(arguments)).http;
        let (health, stop) = (Health::new(), CancellationToken::new());
        let verifier = Verifier::start(&http.tokens, &health, stop.clone()).await.expect("a verifier");
        let (arrived, release) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let held = {
            let (arrived, release) = (arrived.clone(), release.clone());
            async move |Viewer(_): Viewer| {
                arrived.notify_one();
                release.notified().await;
                "let go"
            }
        };
        let routes = Router::new()
            .route("/v1/read", get(async |Viewer(caller): Viewer| caller.subject.to_string()))
            .route("/v1/write", post(async |Admin(_): Admin, Body(change): Body<Change>| Json(change)))
            .route("/v1/items/{id}", get(async |Path(id): Path<Uuid>| id.to_string()))
            .route(
                "/v1/list",
                get(async |Query(filter): Query<Filter>| format!("{:?} {:?}", filter.limit, filter.available)),
            )
            .route("/v1/panics", get(async || -> &'static str { panic!("hunter2") }))
            .route("/v1/held", get(held))
            .route("/v1/large", get(async || vec![b'x'; 64 << 20]));
        let stuck = Router::new().route("/v1/stuck", get(async || std::future::pending::<()>().await));
        let gate = Gate::new(verifier, &http.rates);
        let guarded = gate.guard(routes.merge(time_limited(stuck, Duration::from_millis(50))));
        let forgotten = Router::new().route("/forgotten", get(async |Viewer(_): Viewer| "open"));
        let app = application(guarded.merge(forgotten).merge(health.routes()), &http);
        let server = Server::bind(&http).await.expect("bound");
        let address = server.local_addr();
        let serving =
            Mutex::new(Some(tokio::spawn(server.serve(app, health.drop_first(stop.clone(), http.stop_delay())))));
        let client = reqwest::Client::builder().no_proxy().timeout(PATIENCE * 2).build().expect("a client");
        Self { address, stop, health, arrived, release, serving, client }
    }

    fn request(&self, method: &str, path: &str, role: Option<Role>) -> reqwest::RequestBuilder {
        let method = method.parse().expect("a method");
        let request = self.client.request(method, format!("http://{}{path}", self.address));
        match role {
            Some(role) => request.bearer_auth(token(role)),
            None => request,
        }
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        self.request("GET", path, Some(Role::Viewer)).send().await.expect("an answer")
    }

    fn write(&self, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        self.request("POST", "/v1/write", Some(Role::Admin)).header("Content-Type", "application/json").body(body)
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connected")
    }

    /// Completes when the server has ended.
    async fn ended(&self) {
        let serving = self.serving.lock().expect("not poisoned").take().expect("asked once");
        tokio::time::timeout(PATIENCE, serving).await.expect("in time").expect("without a panic");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn token(role: Role) -> String {
    let subject = Uuid::from_u128(if role == Role::Admin { 1 } else { 2 });
    let lifetime = Duration::from_secs(600);
    let token = Mint { issuer: "lomash", audience: "lomash-inventory", subject, role, lifetime };
    mint(&Secret::from(SECRET.to_owned()), &token).expect("minted")
}

/// Asserts that an answer is the problem of this status and type, and gives its document.
async fn problem(response: reqwest::Response, status: u16, slug: &str) -> Value {
    assert_eq!(response.status().as_u16(), status, "{response:?}");
    assert_eq!(response.headers()["content-type"], "application/problem+json");
    let id = response.headers()["x-request-id"].to_str().expect("ASCII").to_owned();
    let document: Value = response.json().await.expect("JSON");
    assert_eq!(document["type"], format!("https://lomash.example/problems/{slug}"), "{document}");
    assert_eq!(document["status"], status);
    assert_eq!(document["instance"], format!("urn:uuid:{id}"));
    document
}

/// Everything that the server sends until it closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    // A reset is an end as well.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("closed in time");
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test]
async fn every_refusal_is_a_problem() {
    let world = World::start(&[]).await;
    let ask = |method: &str, path: &str, role| world.request(method, path, role).send();

    problem(ask("GET", "/v1/read", None).await.expect("an answer"), 401, "unauthorized").await;
    let bad = world.request("GET", "/v1/read", None).bearer_auth("x.y.z").send().await.expect("an answer");
    problem(bad, 401, "unauthorized").await;
    let viewer = world.request("POST", "/v1/write", Some(Role::Viewer)).json(&Change { quantity: 1 });
    problem(viewer.send().await.expect("an answer"), 403, "forbidden").await;
    problem(ask("GET", "/nowhere", None).await.expect("an answer"), 404, "not-found").await;
    problem(ask("GET", "/v1/nowhere", None).await.expect("an answer"), 404, "not-found").await;
    let method = ask("DELETE", "/v1/write", Some(Role::Admin)).await.expect("an answer");
    assert_eq!(method.headers()["allow"], "POST");
    problem(method, 405, "method-not-allowed").await;
    let forgotten = problem(world.get("/forgotten").await, 500, "internal").await;
    assert!(!forgotten.to_string().contains("gate"), "{forgotten}");
    let panicked = problem(world.get("/v1/panics").await, 500, "internal").await;
    assert!(!panicked.to_string().contains("hunter2"), "{panicked}");
    problem(world.get("/v1/stuck").await, 504, "timeout").await;

    let item = problem(world.get("/v1/items/'%20OR%201=1").await, 400, "validation-failed").await;
    assert!(item["errors"][0]["detail"].is_string(), "{item}");
    for odd in ["/v1/items/%FF", "/v1/items/*", "/v1/items/%0D%0A", "/v1/items/%3E", "/v1/items/."] {
        let status = world.get(odd).await.status();
        assert!(status.is_client_error(), "{odd}: {status}");
    }
    for (query, parameter) in [
        ("limit=1000", "limit"),
        ("limit=", "limit"),
        ("available=yes", "available"),
        ("x=1", "x"),
        ("limit=1&limit=2", "limit"),
    ] {
        let document = problem(world.get(&format!("/v1/list?{query}")).await, 400, "validation-failed").await;
        assert_eq!(document["errors"][0]["parameter"], parameter, "{query}: {document}");
    }

    let field =
        problem(world.write(r#"{"quantity":-1}"#).send().await.expect("an answer"), 400, "validation-failed").await;
    assert_eq!(field["errors"][0]["pointer"], "/quantity", "{field}");
    let assigned = world.write(r#"{"quantity":1,"role":"ADMIN"}"#).send().await.expect("an answer");
    assert_eq!(problem(assigned, 400, "validation-failed").await["errors"][0]["pointer"], "/role");
    problem(world.write("{").send().await.expect("an answer"), 400, "bad-request").await;
    let form = world.request("POST", "/v1/write", Some(Role::Admin)).body("quantity=1");
    problem(form.send().await.expect("an answer"), 415, "unsupported-media-type").await;
    let packed = world.write("x").header("Content-Encoding", "gzip");
    problem(packed.send().await.expect("an answer"), 415, "unsupported-media-type").await;
    let large = world.write("x".repeat(10 << 20)).send().await.expect("an answer before the body is read");
    problem(large, 413, "payload-too-large").await;

    // And all the same it works.
    let written = world.write(r#"{"quantity":7}"#).send().await.expect("an answer");
    assert_eq!(written.json::<Value>().await.expect("JSON"), json!({ "quantity": 7 }));
    assert_eq!(world.get("/v1/read").await.text().await.expect("text"), Uuid::from_u128(2).to_string());
}

#[tokio::test]
async fn a_body_of_unknown_length_is_bounded_too() {
    let world = World::start(&[]).await;
    let mut stream = world.connect().await;
    let head = format!(
        "POST /v1/write HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
        token(Role::Admin)
    );
    stream.write_all(head.as_bytes()).await.expect("written");
    let chunk = format!("1000\r\n{}\r\n", "1".repeat(0x1000));
    // Just beyond 64 KiB: the rest would be cut off by the answer.
    for _ in 0..17 {
        stream.write_all(chunk.as_bytes()).await.expect("written");
    }
    stream.shutdown().await.expect("shut down");
    let answer = rest(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn too_many_requests_wait() {
    let world = World::start(&["--http-writes-per-second", "1"]).await;
    let write = async || world.write(r#"{"quantity":7}"#).send().await.expect("an answer");
    assert_eq!((write().await.status(), write().await.status()), (StatusCode::OK, StatusCode::OK));
    let mut refused = write().await;
    // A second may have passed on a slow machine.
    for _ in 0..100 {
        if refused.status() == StatusCode::TOO_MANY_REQUESTS {
            break;
        }
        refused = write().await;
    }
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(problem(refused, 429, "too-many-requests").await["retryAfterSeconds"], 1);
    assert_eq!(world.get("/v1/read").await.status(), StatusCode::OK, "reads are counted apart, and other callers too");
}

#[tokio::test]
async fn slow_and_swollen_headers_are_cut_off() {
    let world = World::start(&["--http-header-timeout-seconds", "1", "--http-stall-timeout-seconds", "1"]).await;
    let started = Instant::now();
    let mut slow = world.connect().await;
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n").await.expect("written");
    let mut idle = world.connect().await;
    let mut slow_body = world.connect().await;
    let head = format!(
        "POST /v1/write HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{",
        token(Role::Admin)
    );
    slow_body.write_all(head.as_bytes()).await.expect("written");
    rest(&mut slow).await;
    rest(&mut idle).await;
    let answer = rest(&mut slow_body).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(started.elapsed() >= Duration::from_secs(1) && started.elapsed() < PATIENCE);

    let many: String = (0..200).map(|n| format!("X-{n}: 1\r\n")).collect();
    let large = format!("X-Large: {}\r\n", "x".repeat(MAX_HEADER_BYTES));
    for swollen in [many, large] {
        let mut stream = world.connect().await;
        stream
            .write_all(format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{swollen}\r\n").as_bytes())
            .await
            .expect("written");
        let answer = rest(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    let mut nonsense = world.connect().await;
    nonsense.write_all(b"\x16\x03\x01 this is not HTTP\r\n\r\n").await.expect("written");
    let answer = rest(&mut nonsense).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_let_go() {
    let world = World::start(&["--http-max-connections", "1", "--http-stall-timeout-seconds", "1"]).await;
    let mut greedy = world.connect().await;
    let head = format!("GET /v1/large HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", token(Role::Viewer));
    greedy.write_all(head.as_bytes()).await.expect("written");
    // There is one connection only: this is answered once the greedy one is gone.
    assert_eq!(world.get("/v1/read").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let world = World::start(&["--http-max-connections", "2"]).await;
    let (mut first, mut second) = (world.connect().await, world.connect().await);
    let ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut byte = [0; 1];
    for stream in [&mut first, &mut second] {
        stream.write_all(ask).await.expect("written");
        stream.read_exact(&mut byte).await.expect("answered");
    }
    let mut third = world.connect().await;
    third.write_all(ask).await.expect("written");
    let waited = tokio::time::timeout(Duration::from_millis(200), third.read_exact(&mut byte)).await;
    assert!(waited.is_err(), "two are open, and the third is not looked at");
    drop(first);
    tokio::time::timeout(PATIENCE, third.read_exact(&mut byte)).await.expect("in time").expect("answered");
}

#[tokio::test]
async fn one_peer_does_not_take_the_places_of_others() {
    let world = World::start(&["--http-max-connections", "4", "--http-max-connections-per-peer", "2"]).await;
    let ask = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let half = b"GET /healthz HTTP/1.1\r\nHost: x\r\n";
    let (mut first, mut second) = (world.connect().await, world.connect().await);
    for stream in [&mut first, &mut second] {
        stream.write_all(half).await.expect("written");
    }
    // However many more it opens: each is closed at once, and none waits.
    for _ in 0..20 {
        let answer = rest(&mut world.connect().await).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 429 "), "{answer}");
    }
    // Another address of this machine is another peer.
    let other = async || {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind("127.0.0.2:0".parse().expect("an address")).expect("bound");
        socket.connect(world.address).await.expect("connected")
    };
    let mut byte = [0; 1];
    let mut there = other().await;
    there.write_all(ask).await.expect("written");
    tokio::time::timeout(PATIENCE, there.read_exact(&mut byte)).await.expect("in time").expect("answered");
    // What is given back is free.
    drop((first, second));
    let answered = async {
        loop {
            let mut again = world.connect().await;
            let _ = again.write_all(ask).await;
            if again.read_exact(&mut byte).await.is_ok() && byte == *b"H" {
                let mut head = [0; 11];
                again.read_exact(&mut head).await.expect("the status line");
                if head == *b"TTP/1.1 200" {
                    break;
                }
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.expect("a place");

    // 0 is no limit.
    let proxied = World::start(&["--http-max-connections-per-peer", "0"]).await;
    let mut open = Vec::new();
    for _ in 0..50 {
        let mut stream = proxied.connect().await;
        stream.write_all(ask).await.expect("written");
        stream.read_exact(&mut byte).await.expect("answered");
        open.push(stream);
    }
}

#[test]
fn a_peer_is_an_address_or_a_network_of_one_customer() {
    let of = |address: &str| peer(address.parse().expect("an address"));
    assert_eq!(of("192.0.2.7:1"), of("192.0.2.7:2"));
    assert_ne!(of("192.0.2.7:1"), of("192.0.2.8:1"));
    assert_eq!(of("[::ffff:192.0.2.7]:1"), of("192.0.2.7:1"), "the same machine by another listener");
    assert_eq!(of("[2001:db8::1]:1"), of("[2001:db8::ffff:1]:1"), "one /64");
    assert_ne!(of("[2001:db8::1]:1"), of("[2001:db8:0:1::1]:1"));
}

#[tokio::test]
async fn health_has_a_listener_of_its_own_and_metrics_are_only_there() {
    let arguments = ["test", "--http-listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"];
    let http = Process::parse_from(arguments.into_iter().chain(["--http-max-connections", "1"])).http;
    let (health, stop) = (Health::new(), CancellationToken::new());
    let _stop = stop.clone().drop_guard();
    let (public, probed) =
        (Server::bind(&http).await.expect("bound"), Server::bind_health(&http).await.expect("bound"));
    let (address, at) = (public.local_addr(), probed.local_addr());
    let routes = crate::Routes::default();
    tokio::spawn(public.serve(routes.application(&http, &health), stop.clone()));
    tokio::spawn(probed.serve(crate::routes::health_application(&http, &health), stop.clone()));
    let client =
        reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(PATIENCE).build().expect("a client");
    let status = async |url: String| client.get(url).send().await.expect("an answer").status().as_u16();
    assert_eq!(
        status(format!("http://{address}/metrics")).await,
        503,
        "it is no route of this one: the service is starting"
    );
    // Its only place is taken.
    let mut held = TcpStream::connect(address).await.expect("connected");
    held.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n").await.expect("written");
    for (path, expected) in [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/read", 404)] {
        assert_eq!(status(format!("http://{at}{path}")).await, expected, "{path}");
    }
}

#[tokio::test]
async fn stopping_finishes_what_is_in_flight() {
    let world = World::start(&[]).await;
    assert_eq!(world.get("/readyz").await.status(), StatusCode::OK);
    let held = tokio::spawn(world.request("GET", "/v1/held", Some(Role::Viewer)).send());
    world.arrived.notified().await;
    world.stop.cancel();
    // No new connection is taken from now on, and the one in flight goes on.
    let refused = async {
        while let Ok(mut stream) = TcpStream::connect(world.address).await {
            let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").await;
            rest(&mut stream).await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.expect("the listener is closed");
    assert!(!world.health.readiness().ready);
    world.release.notify_one();
    let answer = held.await.expect("no panic").expect("an answer");
    assert_eq!(answer.text().await.expect("text"), "let go");
    world.ended().await;
}

#[tokio::test]
async fn stopping_says_not_ready_first_and_is_bounded() {
    let world = World::start(&["--http-stop-delay-seconds", "1", "--http-drain-seconds", "1"]).await;
    let _part = world.health.check("ledger", true);
    let readiness: Value = world.get("/readyz").await.json().await.expect("JSON");
    let check = json!({ "name": "ledger", "ready": false, "required": true, "detail": "starting" });
    assert_eq!(readiness, json!({ "ready": false, "stopping": false, "checks": [check] }));
    let held = tokio::spawn(world.request("GET", "/v1/held", Some(Role::Viewer)).send());
    world.arrived.notified().await;
    world.stop.cancel();
    // A new connection is still taken.
    let readiness = world.client.get(format!("http://{}/readyz", world.address)).send().await.expect("an answer");
    assert_eq!(readiness.status(), StatusCode::SERVICE_UNAVAILABLE);
    let alive = world.client.get(format!("http://{}/healthz", world.address)).send().await.expect("an answer");
    assert_eq!(alive.status(), StatusCode::OK);
    // The held request never ends by itself.
    world.ended().await;
    assert!(held.await.expect("no panic").is_err(), "cut off");
}

/// What is not taken when a connection is closed resets it, and a client that is still sending then reads no answer.
#[tokio::test]
async fn an_answer_that_comes_before_the_body_is_heard() {
    let world = World::start(&[]).await;
    let mut stream = world.connect().await;
    let body = vec![b'x'; MAX_DISCARDED_BYTES / 2];
    let head = format!(
        "POST /v1/write HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    // The answer is there before the body, and the connection is as good as ever after it.
    for _ in 0..2 {
        stream.write_all(head.as_bytes()).await.expect("sent");
        let answer = one(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
        stream.write_all(&body).await.expect("taken");
    }
    // One whose end nobody knows is taken as far, and the connection is closed, as the answer said.
    let unknown = "POST /v1/write HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(unknown.as_bytes()).await.expect("sent");
    let answer = one(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("connection: close"), "{answer}");
    stream.write_all(format!("{:x}\r\n", body.len()).as_bytes()).await.expect("taken");
    stream.write_all(&body).await.expect("taken");
    stream.write_all(b"\r\n0\r\n\r\n").await.expect("taken");
    assert_eq!(stream.read(&mut [0]).await.expect("an end without a reset"), 0);

    // One that does not end is not taken for ever.
    let mut stream = world.connect().await;
    let endless = format!("POST /v1/write HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", u64::MAX / 2);
    stream.write_all(endless.as_bytes()).await.expect("sent");
    let answer = one(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("connection: close"), "{answer}");
    let sending = async { while stream.write_all(&body).await.is_ok() {} };
    tokio::time::timeout(PATIENCE, sending).await.expect("the connection is closed");
}

/// One answer of a connection that stays open: a head, and as many bytes as it announces.
async fn one(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let reading = async {
        let head = loop {
            answer.push(stream.read_u8().await.expect("an answer"));
            if answer.ends_with(b"\r\n\r\n") {
                break String::from_utf8_lossy(&answer).to_ascii_lowercase();
            }
        };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
        let mut body = vec![0; length.parse().expect("a number")];
        stream.read_exact(&mut body).await.expect("the whole answer");
    };
    tokio::time::timeout(PATIENCE, reading).await.expect("an answer in time");
    String::from_utf8_lossy(&answer).into_owned()
}
