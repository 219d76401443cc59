//! The product service over HTTP, as far as commands need it: a request with a token, and its answer.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use lomash_platform::Secret;
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{Body, Client, Method, Response, StatusCode, Url};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// How long the service may take for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A caller of the product service.
#[derive(Clone, Debug)]
pub struct Api {
    client: Client,
    url: String,
    token: Secret,
}

/// What the service answered.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body; null when it is not JSON.
    pub body: Value,
}

impl Answer {
    /// A header's text, empty when there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

impl Api {
    /// Calls the service at `url` with `token`.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(url: &str, token: Secret) -> anyhow::Result<Self> {
        // Another part of the process may have chosen already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().timeout(ANSWER_TIMEOUT).build().context("the HTTP client cannot be made")?;
        Ok(Self { client, url: url.trim_end_matches('/').to_owned(), token })
    }

    /// Sends a request and takes whatever the service answers.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Value>,
    ) -> anyhow::Result<Answer> {
        let mut request = self.client.request(method, format!("{}{path}", self.url)).bearer_auth(self.token.expose());
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request
            .send()
            .await
            .with_context(|| format!("the product service does not answer at PRODUCT_URL={}; is it up?", self.url))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = response.bytes().await.context("the answer of the product service broke off")?;
        Ok(Answer { status, headers, body: serde_json::from_slice(&bytes).unwrap_or_default() })
    }

    /// Sends a body of any length, which must be taken; the answer can be read as it comes, within `timeout` from now.
    ///
    /// # Errors
    /// When there is no answer, or a problem: its sentence is the error.
    pub async fn upload(
        &self,
        path: &str,
        query: &[(&str, String)],
        media_type: &str,
        body: Body,
        timeout: Duration,
    ) -> anyhow::Result<Response> {
        let mut url = Url::parse(&format!("{}{path}", self.url))
            .with_context(|| format!("PRODUCT_URL={} is no URL", self.url))?;
        url.query_pairs_mut().extend_pairs(query);
        let request = self.client.post(url).bearer_auth(self.token.expose()).timeout(timeout);
        let response = request.header(CONTENT_TYPE, media_type).body(body).send().await;
        let response = response.map_err(|error| {
            let what = if error.is_connect() || error.is_timeout() {
                format!("the product service does not answer at PRODUCT_URL={}; is it up?", self.url)
            } else {
                "the product service closed the connection before it had the whole body, as it does with a large one that \
                 it refuses; send a small one to hear why"
                    .to_owned()
            };
            anyhow::Error::new(error).context(what)
        })?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = response.bytes().await.context("the answer of the product service broke off")?;
        Err(refusal(status, &serde_json::from_slice(&bytes).unwrap_or_default()))
    }

    /// Sends a request that must succeed, and reads its answer.
    ///
    /// # Errors
    /// When there is no answer, or a problem: its sentence is the error.
    pub async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> anyhow::Result<T> {
        let Answer { status, body, .. } = self.send(method, path, &[], body).await?;
        if status.is_success() {
            return serde_json::from_value(body).context("the product service answered something else than expected");
        }
        Err(refusal(status, &body))
    }
}

/// A problem document (RFC 9457) by its sentence; anything else is told by its status.
fn refusal(status: StatusCode, body: &Value) -> anyhow::Error {
    match body.get("detail").and_then(Value::as_str) {
        Some(detail) => anyhow!("{detail} ({status})"),
        None => anyhow!("the product service answered {status}"),
    }
}
