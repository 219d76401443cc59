//! An HTTP client of the tests: one caller with a token, and answers that can be looked at.
//!
//! Owns how a request is sent and an answer taken apart. Follows no redirect and repeats nothing: a test says itself
//! what it sends, and sees what came of it.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use lomash_web::Role;
use lomash_web::problem::{MEDIA_TYPE, TYPE_BASE};
use reqwest::Method;
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

/// Longest that any request may take: beyond every bound of the service.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Whoever sends requests to one service.
#[derive(Clone, Debug)]
pub struct Caller {
    client: reqwest::Client,
    base: String,
    token: Option<String>,
    /// The token's subject.
    pub subject: Uuid,
}

impl Caller {
    /// A caller with a role and a subject of its own, at the service that answers at `url`.
    ///
    /// # Errors
    /// When no token or client can be made.
    pub fn new(url: &str, role: Role) -> anyhow::Result<Self> {
        Self::of(url, role, Uuid::new_v4())
    }

    /// The same with this subject.
    ///
    /// # Errors
    /// When no token or client can be made.
    pub fn of(url: &str, role: Role, subject: Uuid) -> anyhow::Result<Self> {
        // Nothing here speaks TLS, and the client is not made without a provider; a second one is refused, as it should.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(TIMEOUT).redirect(reqwest::redirect::Policy::none()).build()?;
        Ok(Self { client, base: url.to_owned(), token: Some(crate::token(role, subject)?), subject })
    }

    /// The same caller at another service.
    #[must_use]
    pub fn at(&self, url: &str) -> Self {
        Self { base: url.to_owned(), ..self.clone() }
    }

    /// The same client with this token, or none.
    #[must_use]
    pub fn with_token(&self, token: Option<String>) -> Self {
        Self { token, ..self.clone() }
    }

    /// A request to a path of the service, sent as it is written.
    #[must_use]
    pub fn request(&self, method: Method, path: &str) -> Request {
        let builder = self.client.request(method, format!("{}{path}", self.base));
        Request(match &self.token {
            Some(token) => builder.bearer_auth(token),
            None => builder,
        })
    }

    /// GET.
    #[must_use]
    pub fn get(&self, path: &str) -> Request {
        self.request(Method::GET, path)
    }

    /// POST of JSON.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Request {
        Request(self.request(Method::POST, path).0.json(body))
    }

    /// PATCH of JSON.
    #[must_use]
    pub fn patch(&self, path: &str, body: &Value) -> Request {
        Request(self.request(Method::PATCH, path).0.json(body))
    }

    /// Registers a product under an id and a sku of its own; its id.
    ///
    /// # Errors
    /// When it is not registered.
    pub async fn register(&self, quantity: u32) -> anyhow::Result<Uuid> {
        let product = Uuid::new_v4();
        let sku = format!("T-{}", product.simple());
        let body = serde_json::json!({ "productId": product, "sku": sku, "name": sku, "initialQuantity": quantity });
        let answer = self.post("/v1/products", &body).send().await?;
        ensure!(answer.status == 201, "expected 201 for a registration, got {}: {answer:?}", answer.status);
        Ok(product)
    }
}

/// A request that is not sent yet.
#[derive(Debug)]
pub struct Request(reqwest::RequestBuilder);

impl Request {
    /// Adds a header.
    #[must_use]
    pub fn header(self, name: &str, value: impl ToString) -> Self {
        Self(self.0.header(name, value.to_string()))
    }

    /// Sends these bytes.
    #[must_use]
    pub fn bytes(self, body: impl Into<reqwest::Body>) -> Self {
        Self(self.0.body(body))
    }

    /// Sends it and reads the answer to its end.
    ///
    /// # Errors
    /// When there is no whole answer.
    pub async fn send(self) -> anyhow::Result<Answer> {
        let started = Instant::now();
        let response = self.open().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.context("the answer was cut off")?;
        let json = serde_json::from_str(&text).unwrap_or_default();
        Ok(Answer { status, headers, json, text, took: started.elapsed() })
    }

    /// Sends it; the answer can be read as it comes.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn open(self) -> anyhow::Result<reqwest::Response> {
        self.0.send().await.context("no answer")
    }
}

/// An answer that was read to its end.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The headers.
    pub headers: reqwest::header::HeaderMap,
    /// The body, if it is JSON, or null.
    pub json: Value,
    /// The body.
    pub text: String,
    /// How long it took.
    pub took: Duration,
}

impl Answer {
    /// A header, if it is there once and is text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok(),
            _ => None,
        }
    }

    /// The sequence of the ledger that the answer shows.
    ///
    /// # Panics
    /// When it does not say.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        let sequence = self.header("lomash-sequence").and_then(|text| text.parse().ok());
        sequence.unwrap_or_else(|| panic!("expected a Lomash-Sequence, got {}: {self:?}", self.status))
    }

    /// The last part of its problem type, when it is a problem that is all that a problem must be; empty when it is no
    /// problem.
    ///
    /// # Panics
    /// When it is a problem that is not as it must be.
    #[must_use]
    pub fn problem(&self) -> &str {
        if self.status < 400 {
            return "";
        }
        let expect = |what: &str, expected: &str, found: &str| {
            assert!(found == expected, "expected {what} {expected:?} of a problem, got {found:?}: {self:?}");
        };
        expect("the type", MEDIA_TYPE, self.header("content-type").unwrap_or_default());
        expect("the status", &self.status.to_string(), &self.json["status"].to_string());
        for member in ["title", "detail"] {
            let is_there = self.json[member].as_str().is_some_and(|text| !text.is_empty());
            assert!(is_there, "expected a {member} of a problem, got {}: {self:?}", self.json[member]);
        }
        let id = self.header("x-request-id").unwrap_or_default();
        expect("the instance", &format!("urn:uuid:{id}"), self.json["instance"].as_str().unwrap_or_default());
        let slug = self.json["type"].as_str().and_then(|uri| uri.strip_prefix(TYPE_BASE));
        slug.unwrap_or_else(|| panic!("expected a problem of a type of ours, got {}: {self:?}", self.json["type"]))
    }
}
