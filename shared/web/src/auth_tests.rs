//! Tokens that must be taken, and every attack that must not be.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;

use axum::http::{HeaderValue, StatusCode};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::Parser;
use jsonwebtoken::jwk::Jwk;
use serde_json::{Value, json};

use super::*;
use crate::Server;
use crate::config::HttpConfig;

const SECRET: &str = "a development secret of 32 bytes or more";
const OUR_RSA: &[u8] = include_bytes!("../tests/keys/test-only-rsa-ours.pem");
const FOREIGN_RSA: &[u8] = include_bytes!("../tests/keys/test-only-rsa-foreign.pem");
const SUBJECT: &str = "5f0c1d1e-90a4-4bb3-8b4f-6d6a3f2f7c01";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Parser)]
struct Process {
    #[command(flatten)]
    http: HttpConfig,
}

fn config(jwks: Option<&str>, secret: Option<&str>) -> TokenConfig {
    let mut tokens = Process::parse_from(["test"]).http.tokens;
    tokens.jwt_issuer = "issuer".to_owned();
    tokens.jwt_audience = "audience".to_owned();
    tokens.jwt_jwks = jwks.map(|place| place.parse().expect("a place"));
    tokens.jwt_hs256_secret = secret.map(|secret| Secret::from(secret.to_owned()));
    tokens
}

fn rsa(pem: &[u8]) -> EncodingKey {
    EncodingKey::from_rsa_pem(pem).expect("an RSA key")
}

/// An Ed25519 key from its seed: PKCS #8 is a fixed beginning and the seed.
fn ed25519(seed: u8) -> EncodingKey {
    let mut der = vec![0x30, 0x2e, 0x02, 0x01, 0, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
    der.extend([seed; 32]);
    EncodingKey::from_ed_der(&der)
}

fn public(key: &EncodingKey, algorithm: Algorithm, kid: &str) -> Value {
    let mut jwk = serde_json::to_value(Jwk::from_encoding_key(key, algorithm).expect("a JWK")).expect("JSON");
    jwk["kid"] = kid.into();
    jwk
}

/// The keys that our provider publishes: one RSA, one Ed25519, and a symmetric one that must not be used.
fn jwks() -> Value {
    json!({ "keys": [
        public(&rsa(OUR_RSA), Algorithm::RS256, "rsa-1"),
        public(&ed25519(1), Algorithm::EdDSA, "ed-1"),
        { "kty": "oct", "kid": "oct-1", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(SECRET) },
        { "kty": "EC", "kid": "ec-1", "crv": "P-256", "x": "AA", "y": "AA" },
        "not even a key",
    ] })
}

fn now() -> u64 {
    jsonwebtoken::get_current_timestamp()
}

fn claims() -> Value {
    json!({ "iss": "issuer", "aud": "audience", "sub": SUBJECT, "role": "ADMIN", "nbf": now() - 1, "exp": now() + 60 })
}

/// Good claims with one changed; null takes it away.
fn claims_with(name: &str, value: Value) -> Value {
    let mut claims = claims();
    claims[name] = value;
    claims.as_object_mut().expect("an object").retain(|_, value| !value.is_null());
    claims
}

fn header(algorithm: Algorithm, kid: Option<&str>) -> Header {
    Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) }
}

fn sign(header: &Header, claims: &Value, key: &EncodingKey) -> String {
    jsonwebtoken::encode(header, claims, key).expect("signed")
}

fn hs256(claims: &Value) -> String {
    sign(&header(Algorithm::HS256, None), claims, &EncodingKey::from_secret(SECRET.as_bytes()))
}

fn rs256(claims: &Value) -> String {
    sign(&header(Algorithm::RS256, Some("rsa-1")), claims, &rsa(OUR_RSA))
}

fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.", part(header), part(claims))
}

/// A verifier with our keys in a file, and with the secret or without.
async fn verifier(folder: &Path, secret: Option<&str>) -> Arc<Verifier> {
    let file = folder.join("jwks.json");
    std::fs::write(&file, jwks().to_string()).expect("written");
    let config = config(file.to_str(), secret);
    Verifier::start(&config, &Health::new(), CancellationToken::new()).await.expect("a verifier")
}

async fn status(verifier: &Verifier, token: &str) -> u16 {
    match verifier.verify(token).await {
        Ok(_) => 200,
        Err(problem) => problem.status().as_u16(),
    }
}

#[tokio::test]
async fn good_tokens_are_taken() {
    let folder = tempfile::tempdir().expect("a folder");
    let verifier = verifier(folder.path(), Some(SECRET)).await;
    let good = [
        ("HS256", hs256(&claims())),
        ("RS256", rs256(&claims())),
        ("RS256 without kid", sign(&header(Algorithm::RS256, None), &claims(), &rsa(OUR_RSA))),
        ("EdDSA", sign(&header(Algorithm::EdDSA, Some("ed-1")), &claims(), &ed25519(1))),
        ("EdDSA without kid", sign(&header(Algorithm::EdDSA, None), &claims(), &ed25519(1))),
        ("one audience of many", rs256(&claims_with("aud", json!(["other", "audience"])))),
        ("expired within the leeway", rs256(&claims_with("exp", json!(now() - 1)))),
        ("minted", {
            let subject = Uuid::try_parse(SUBJECT).expect("a UUID");
            let lifetime = Duration::from_secs(60);
            let token = Mint { issuer: "issuer", audience: "audience", subject, role: Role::Admin, lifetime };
            mint(&Secret::from(SECRET.to_owned()), &token).expect("minted")
        }),
    ];
    for (name, token) in good {
        let caller = verifier.verify(&token).await.unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert_eq!((caller.subject.to_string().as_str(), caller.role), (SUBJECT, Role::Admin), "{name}");
        assert!(caller.expires > SystemTime::now() - LEEWAY, "{name}");
    }
    let viewer = verifier.verify(&hs256(&claims_with("role", json!("VIEWER")))).await.expect("a viewer");
    assert_eq!(viewer.role, Role::Viewer);
    assert!(Role::Viewer < Role::Admin);
}

#[tokio::test]
async fn bad_claims_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let verifier = verifier(folder.path(), Some(SECRET)).await;
    let cases = [
        ("exp", json!(now() - 3600), 401),
        ("exp", json!((now() + 60).to_string()), 401),
        ("exp", json!(null), 401),
        ("exp", json!(1e300), 401),
        ("exp", json!(-1), 401),
        ("exp", json!({}), 401),
        ("nbf", json!(now() + 3600), 401),
        ("nbf", json!("0"), 401),
        ("nbf", json!(null), 401),
        ("aud", json!("someone else"), 401),
        ("aud", json!(["someone", "else"]), 401),
        ("aud", json!([]), 401),
        ("aud", json!("audienc"), 401),
        ("aud", json!(null), 401),
        ("iss", json!("someone else"), 401),
        ("iss", json!(["issuer", "someone else"]), 401),
        ("iss", json!(null), 401),
        ("sub", json!("admin"), 401),
        ("sub", json!(SUBJECT.replace('-', "")), 401),
        ("sub", json!(format!("{{{SUBJECT}}}")), 401),
        ("sub", json!(42), 401),
        ("sub", json!(null), 401),
        ("role", json!(null), 403),
        ("role", json!("admin"), 403),
        ("role", json!("ADMIN "), 403),
        ("role", json!(["ADMIN"]), 403),
        ("role", json!({ "ADMIN": true }), 403),
        ("role", json!(true), 403),
    ];
    for (name, value, expected) in cases {
        let claims = claims_with(name, value.clone());
        for token in [hs256(&claims), rs256(&claims)] {
            assert_eq!(status(&verifier, &token).await, expected, "{name}: {value}");
        }
    }
}

#[tokio::test]
async fn forged_tokens_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let public_pem = {
        // What an attacker has: the public key, in every form that a careless program might take as a secret.
        let jwk = public(&rsa(OUR_RSA), Algorithm::RS256, "rsa-1");
        let modulus = jwk["n"].as_str().expect("a modulus").to_owned();
        [
            jwk.to_string(),
            URL_SAFE_NO_PAD.decode(&modulus).map(|n| n.iter().map(|b| format!("{b:02x}")).collect()).expect("hex"),
            modulus,
        ]
    };
    let mut forged: Vec<(String, String)> = Vec::new();
    for algorithm in ["none", "None", "NONE", "nOnE", "", "HS1"] {
        forged.push((format!("alg {algorithm:?}"), unsigned(&json!({ "alg": algorithm, "typ": "JWT" }), &claims())));
    }
    forged.push(("no alg".to_owned(), unsigned(&json!({ "typ": "JWT" }), &claims())));
    for secret in &public_pem {
        for kid in [None, Some("rsa-1")] {
            let key = EncodingKey::from_secret(secret.as_bytes());
            forged.push(("RS/HS confusion".to_owned(), sign(&header(Algorithm::HS256, kid), &claims(), &key)));
        }
    }
    let raw = URL_SAFE_NO_PAD.decode(&public_pem[2]).expect("bytes");
    let raw = EncodingKey::from_secret(&raw);
    forged.push(("RS/HS confusion, raw".to_owned(), sign(&header(Algorithm::HS256, Some("rsa-1")), &claims(), &raw)));
    for kid in ["oct-1", "../../../dev/null", "' OR 1=1 --", "ed-1", "no-such-key", "", "ec-1"] {
        let empty = EncodingKey::from_secret(b"");
        forged.push((
            format!("kid {kid:?}, empty secret"),
            sign(&header(Algorithm::HS256, Some(kid)), &claims(), &empty),
        ));
        let right = sign(&header(Algorithm::RS256, Some(kid)), &claims(), &rsa(OUR_RSA));
        forged.push((format!("kid {kid:?}, another key's signature"), right));
    }
    for algorithm in [Algorithm::RS384, Algorithm::RS512, Algorithm::PS256] {
        let token = sign(&header(algorithm, Some("rsa-1")), &claims(), &rsa(OUR_RSA));
        forged.push((format!("{algorithm:?} with an RS256 key"), token));
    }
    let secret = EncodingKey::from_secret(SECRET.as_bytes());
    for algorithm in [Algorithm::HS384, Algorithm::HS512] {
        forged.push((format!("{algorithm:?} with the secret"), sign(&header(algorithm, None), &claims(), &secret)));
    }
    forged.push((
        "a foreign RSA key".to_owned(),
        sign(&header(Algorithm::RS256, Some("rsa-1")), &claims(), &rsa(FOREIGN_RSA)),
    ));
    forged.push((
        "a foreign RSA key, no kid".to_owned(),
        sign(&header(Algorithm::RS256, None), &claims(), &rsa(FOREIGN_RSA)),
    ));
    forged.push((
        "a foreign Ed25519 key".to_owned(),
        sign(&header(Algorithm::EdDSA, Some("ed-1")), &claims(), &ed25519(2)),
    ));
    let brought = Header {
        jwk: Some(Jwk::from_encoding_key(&rsa(FOREIGN_RSA), Algorithm::RS256).expect("a JWK")),
        jku: Some("https://attacker.example/jwks.json".to_owned()),
        x5u: Some("https://attacker.example/cert.pem".to_owned()),
        ..header(Algorithm::RS256, Some("rsa-1"))
    };
    forged.push(("a key that it brings along".to_owned(), sign(&brought, &claims(), &rsa(FOREIGN_RSA))));
    let critical = Header { crit: Some(vec!["b64".to_owned()]), ..header(Algorithm::RS256, Some("rsa-1")) };
    forged.push(("critical headers".to_owned(), sign(&critical, &claims(), &rsa(OUR_RSA))));
    let good = rs256(&claims());
    let parts: Vec<&str> = good.split('.').collect();
    let promoted = URL_SAFE_NO_PAD.encode(claims_with("role", json!("ADMIN")).to_string());
    let viewer = rs256(&claims_with("role", json!("VIEWER")));
    let viewer: Vec<&str> = viewer.split('.').collect();
    forged.push(("an altered role".to_owned(), format!("{}.{promoted}.{}", viewer[0], viewer[2])));
    forged.push(("no signature".to_owned(), format!("{}.{}.", parts[0], parts[1])));
    forged.push(("two parts".to_owned(), format!("{}.{}", parts[0], parts[1])));
    forged.push(("four parts".to_owned(), format!("{good}.{}", parts[2])));
    forged.push(("HS256 header on an RS256 token".to_owned(), {
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        format!("{header}.{}.{}", parts[1], parts[2])
    }));
    forged.push(("no token at all".to_owned(), "ADMIN".to_owned()));
    forged.push(("huge, and signed".to_owned(), hs256(&claims_with("more", json!("x".repeat(1 << 20))))));

    for secret in [Some(SECRET), None] {
        let verifier = verifier(folder.path(), secret).await;
        assert_eq!(status(&verifier, &good).await, 200, "the keys themselves are good");
        for (name, token) in &forged {
            assert_eq!(status(&verifier, token).await, 401, "{name}, secret: {}", secret.is_some());
        }
    }
    // The key of the JWKS that is no secret, where there is no other secret.
    let verifier = verifier(folder.path(), None).await;
    let published = sign(&header(Algorithm::HS256, Some("oct-1")), &claims(), &secret);
    assert_eq!(status(&verifier, &published).await, 401, "a symmetric key of a JWKS");
}

#[tokio::test]
async fn without_kid_only_a_single_key_fits() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("jwks.json");
    let two = [public(&rsa(OUR_RSA), Algorithm::RS256, "a"), public(&rsa(FOREIGN_RSA), Algorithm::RS256, "b")];
    std::fs::write(&file, json!({ "keys": two }).to_string()).expect("written");
    let config = config(file.to_str(), None);
    let verifier = Verifier::start(&config, &Health::new(), CancellationToken::new()).await.expect("a verifier");
    assert_eq!(status(&verifier, &sign(&header(Algorithm::RS256, None), &claims(), &rsa(OUR_RSA))).await, 401);
    assert_eq!(status(&verifier, &sign(&header(Algorithm::RS256, Some("a")), &claims(), &rsa(OUR_RSA))).await, 200);
    assert_eq!(status(&verifier, &sign(&header(Algorithm::RS256, Some("b")), &claims(), &rsa(OUR_RSA))).await, 401);
}

#[tokio::test]
async fn bad_configurations_name_their_variable() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, text: String| {
        let file = folder.path().join(name);
        std::fs::write(&file, text).expect("written");
        file.to_str().expect("UTF-8").to_owned()
    };
    let weak = json!({ "keys": [{ "kty": "RSA", "n": URL_SAFE_NO_PAD.encode([255; 128]), "e": "AQAB" }] });
    let only_oct = json!({ "keys": [{ "kty": "oct", "k": URL_SAFE_NO_PAD.encode(SECRET) }] });
    let cases = [
        (config(None, None), "JWT_JWKS"),
        (config(None, Some("too short")), "JWT_HS256_SECRET"),
        (config(Some("/no/such/file"), None), "JWT_JWKS"),
        (config(Some(&write("nonsense", "nonsense".to_owned())), None), "JWT_JWKS"),
        (config(Some(&write("weak", weak.to_string())), None), "JWT_JWKS"),
        (config(Some(&write("oct", only_oct.to_string())), None), "JWT_JWKS"),
        (config(Some(&write("large", " ".repeat(1 << 20))), None), "JWT_JWKS"),
        (TokenConfig { jwt_issuer: String::new(), ..config(None, Some(SECRET)) }, "JWT_ISSUER"),
        (TokenConfig { jwt_audience: String::new(), ..config(None, Some(SECRET)) }, "JWT_AUDIENCE"),
    ];
    for (config, variable) in cases {
        let error = Verifier::start(&config, &Health::new(), CancellationToken::new()).await.expect_err("refused");
        let error = format!("{error:#}");
        assert!(error.contains(variable) && !error.contains("too short"), "{error}");
    }
}

#[tokio::test]
async fn headers_carry_at_most_one_bearer_token() {
    let folder = tempfile::tempdir().expect("a folder");
    let verifier = verifier(folder.path(), Some(SECRET)).await;
    let good = hs256(&claims());
    let challenge = async |values: &[&str]| {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).expect("a header value"));
        }
        match verifier.caller(&headers).await {
            Ok(_) => None,
            Err(problem) => {
                assert_eq!(problem.status(), StatusCode::UNAUTHORIZED);
                let response = problem.into_response();
                Some(response.headers()["www-authenticate"].to_str().expect("ASCII").to_owned())
            }
        }
    };
    let bearer = format!("Bearer {good}");
    assert_eq!(challenge(&[&bearer]).await, None);
    assert_eq!(challenge(&[&format!("bearer  {good}")]).await, None);
    for none in [&[][..], &["Basic YTpi"], &[&good], &["Bearer"], &["Bearer "]] {
        assert_eq!(challenge(none).await.as_deref(), Some("Bearer"), "{none:?}");
    }
    for bad in [&[bearer.as_str(), bearer.as_str()][..], &["Bearer x"], &[&format!("Bearer {good} {good}")]] {
        let challenge = challenge(bad).await.expect("refused");
        assert!(challenge.starts_with("Bearer error=\"invalid_token\""), "{challenge}");
    }
}

/// A provider of keys that can be down, and counts who asks.
#[derive(Clone, Default)]
struct Provider(Arc<Mutex<(Option<Value>, u64)>>);

impl Provider {
    async fn start(&self, stop: &CancellationToken) -> String {
        let provider = self.clone();
        let routes = Router::new().route(
            "/jwks.json",
            axum::routing::get(async move || {
                let mut state = provider.0.lock().expect("not poisoned");
                state.1 += 1;
                match &state.0 {
                    Some(jwks) => (StatusCode::OK, jwks.to_string()),
                    None => (StatusCode::INTERNAL_SERVER_ERROR, "down".to_owned()),
                }
            }),
        );
        let http = Process::parse_from(["test", "--http-listen", "127.0.0.1:0"]).http;
        let server = Server::bind(&http).await.expect("bound");
        let url = format!("http://{}/jwks.json", server.local_addr());
        tokio::spawn(server.serve(routes, stop.clone()));
        url
    }

    fn set(&self, jwks: Option<Value>) {
        self.0.lock().expect("not poisoned").0 = jwks;
    }

    fn asked(&self) -> u64 {
        self.0.lock().expect("not poisoned").1
    }
}

fn impatient(interval: Duration, demand_gap: Duration) -> Timing {
    Timing { interval, demand_gap, first_retry: Duration::from_millis(10) }
}

#[tokio::test]
async fn a_provider_that_is_down_comes_back_and_rotates() {
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let provider = Provider::default();
    let config = config(Some(&provider.start(&stop).await), Some(SECRET));
    let health = Health::new();
    let timing = impatient(Duration::from_millis(50), Duration::ZERO);
    let verifier = Verifier::start_with(&config, timing, &health, stop.clone()).await.expect("starts all the same");
    let keys = verifier.keys.as_ref().expect("keys");
    let attempts = async |more: u64| {
        let until = keys.attempts() + more;
        tokio::time::timeout(PATIENCE, keys.attempted(until)).await.expect("in time");
    };

    // Down: tokens that may be good are to be tried again; others need no keys to be judged.
    attempts(1).await;
    assert!(!health.readiness().ready);
    assert_eq!(status(&verifier, &rs256(&claims())).await, 503);
    assert_eq!(status(&verifier, &unsigned(&json!({ "alg": "none" }), &claims())).await, 401);
    assert_eq!(status(&verifier, &hs256(&claims())).await, 200, "the secret needs no provider");

    // Up.
    provider.set(Some(jwks()));
    attempts(2).await;
    assert!(health.readiness().ready);
    assert_eq!(status(&verifier, &rs256(&claims())).await, 200);

    // Down again, or out of its mind: the last good keys stay.
    for bad in [None, Some(json!({ "keys": [] })), Some(json!("x".repeat(1 << 20)))] {
        provider.set(bad);
        attempts(2).await;
        assert_eq!(status(&verifier, &rs256(&claims())).await, 200);
        assert!(health.readiness().ready);
    }

    // Rotated: the new key counts and the old one no more.
    provider.set(Some(json!({ "keys": [public(&rsa(FOREIGN_RSA), Algorithm::RS256, "rsa-2")] })));
    attempts(2).await;
    assert_eq!(status(&verifier, &rs256(&claims())).await, 401);
    assert_eq!(
        status(&verifier, &sign(&header(Algorithm::RS256, Some("rsa-2")), &claims(), &rsa(FOREIGN_RSA))).await,
        200
    );
}

#[tokio::test]
async fn an_unknown_key_is_looked_for_once_and_not_for_everyone() {
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let provider = Provider::default();
    provider.set(Some(jwks()));
    let config = config(Some(&provider.start(&stop).await), None);
    // The interval never comes; after the fetch that a token brings about, the gap never ends.
    let hour = Duration::from_secs(3600);
    let start = async |gap: Duration| {
        let timing = impatient(hour, gap);
        let verifier = Verifier::start_with(&config, timing, &Health::new(), stop.clone()).await.expect("a verifier");
        let keys = verifier.keys.as_ref().expect("keys");
        tokio::time::timeout(PATIENCE, keys.attempted(1)).await.expect("in time");
        verifier
    };
    let new = sign(&header(Algorithm::RS256, Some("rsa-2")), &claims(), &rsa(FOREIGN_RSA));

    let verifier = start(Duration::ZERO).await;
    assert_eq!(status(&verifier, &new).await, 401, "not published yet");
    provider.set(Some(json!({ "keys": [public(&rsa(FOREIGN_RSA), Algorithm::RS256, "rsa-2")] })));
    assert_eq!(status(&verifier, &new).await, 200, "fetched because a token names it");

    let verifier = start(hour).await;
    let asked = provider.asked();
    let unknown: BTreeMap<u32, String> = (0..50)
        .map(|n| (n, sign(&header(Algorithm::RS256, Some(&format!("made-up-{n}"))), &claims(), &rsa(FOREIGN_RSA))))
        .collect();
    for token in unknown.values() {
        assert_eq!(status(&verifier, token).await, 401);
    }
    assert_eq!(provider.asked(), asked, "made-up keys do not reach the provider within the gap");
}

/// A redirect could lead from https to anywhere, and to keys that are anybody's.
#[tokio::test]
async fn a_redirect_to_other_keys_is_not_followed() {
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    let elsewhere = Provider::default();
    elsewhere.set(Some(jwks()));
    let there = elsewhere.start(&stop).await;
    for status_of_redirect in [StatusCode::FOUND, StatusCode::MOVED_PERMANENTLY, StatusCode::TEMPORARY_REDIRECT] {
        let to = there.clone();
        let redirecting = Router::new().route(
            "/jwks.json",
            axum::routing::get(async move || (status_of_redirect, [(axum::http::header::LOCATION, to)])),
        );
        let http = Process::parse_from(["test", "--http-listen", "127.0.0.1:0"]).http;
        let server = Server::bind(&http).await.expect("bound");
        let url = format!("http://{}/jwks.json", server.local_addr());
        tokio::spawn(server.serve(redirecting, stop.clone()));
        let timing = impatient(Duration::from_millis(10), Duration::ZERO);
        let health = Health::new();
        let verifier =
            Verifier::start_with(&config(Some(&url), None), timing, &health, stop.clone()).await.expect("starts");
        let keys = verifier.keys.as_ref().expect("keys");
        tokio::time::timeout(PATIENCE, keys.attempted(2)).await.expect("in time");
        assert_eq!(status(&verifier, &rs256(&claims())).await, 503, "{status_of_redirect}: there are no keys");
        assert!(!health.readiness().ready);
    }
    assert_eq!(elsewhere.asked(), 0, "nobody asks where it leads");
}
