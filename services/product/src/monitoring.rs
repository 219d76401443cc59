//! What only the monitoring address of a NATS server tells: whether it acknowledges before the disk has it.
//!
//! No answer of JetStream's own interface says so, to nobody. The address answers anybody and so is on the loopback of its
//! server: who can reach it may look, and who cannot has to trust the servers' configuration.

use std::time::Duration;

use anyhow::Context as _;
use lomash_ledger::streams::Difference;
use reqwest::Client;
use serde_json::Value;

/// How long a server may take to tell of itself.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Under which name `LEDGER_ALLOW_WEAKER` allows it.
pub const SYNC_ALWAYS: &str = "sync_always";

/// Looks at servers at their monitoring addresses.
#[derive(Clone, Debug)]
pub struct Monitor(Client);

impl Monitor {
    /// Looks at none yet.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new() -> anyhow::Result<Self> {
        // Nothing here speaks TLS, but the client is not made without a provider; a second one is refused, as it should.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().no_proxy().timeout(TIMEOUT).build().context("the HTTP client cannot be made")?;
        Ok(Self(client))
    }

    /// In what the server at this address, such as `http://127.0.0.1:8222`, is weaker than what `deploy/nats` ships; nothing when
    /// it acknowledges only what is on disk.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn weakness(&self, address: &str) -> anyhow::Result<Option<Difference>> {
        let url = format!("{}/varz", address.trim_end_matches('/'));
        let answer = self.0.get(&url).send().await.with_context(|| format!("{url} does not answer"))?;
        let answer: Value = answer.json().await.with_context(|| format!("{url} is no NATS server's"))?;
        // The server leaves out what is false.
        let is_safe = answer.pointer("/jetstream/config/sync_always") == Some(&Value::Bool(true));
        Ok((!is_safe).then(|| Difference {
            name: address.to_owned(),
            field: SYNC_ALWAYS.to_owned(),
            defined: Value::Bool(true),
            actual: Value::Bool(false),
        }))
    }
}
