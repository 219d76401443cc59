//! The public keys that tokens are checked with: where they come from, and how they stay fresh.
//!
//! A key of a JWKS decides its algorithm: RSA is RS256, Ed25519 is EdDSA, and nothing else is taken. A symmetric key in
//! a JWKS is no secret any more and is refused. The last good keys are kept for as long as nobody has better ones; a
//! provider that is down changes nothing for tokens whose keys are known.
//!
//! One task reads the source: at each interval, sooner after a failure, and when a token names a key that is unknown,
//! but then not more often than [`DEMAND_GAP`] allows, because anyone can make such tokens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Once};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, Header};
use lomash_contract::objects::{self, Objects};
use reqwest::Url;
use serde::Deserialize;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::health::Check;

/// Largest JWKS that is read: a provider has a handful of keys of at most a few KiB each.
const MAX_JWKS_BYTES: usize = 256 * 1024;
/// Most keys that are looked at.
const MAX_KEYS: usize = 100;
/// Weakest RSA key that is taken, in bits: the least that RFC 7518 allows for RS256.
const MIN_RSA_BITS: usize = 2048;
/// Strongest one: beyond it a check costs milliseconds.
const MAX_RSA_BITS: usize = 8192;
/// How long a fetch may take, and connecting within it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// See [`FETCH_TIMEOUT`].
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Least time between the end of a fetch and the next one that an unknown key brings about.
pub(crate) const DEMAND_GAP: Duration = Duration::from_secs(5);
/// How long a request waits for the keys to be fetched again.
const DEMAND_WAIT: Duration = Duration::from_secs(3);
/// First pause after a failed fetch, doubling up to the last (or the interval, if that is shorter).
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// See [`FIRST_RETRY`].
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Where the keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// A file, read again at each interval.
    File(PathBuf),
    /// A URL: https, or http on this machine.
    Url(Url),
}

/// Why a text is not a [`KeySource`].
#[derive(Debug, thiserror::Error)]
pub enum KeySourceError {
    /// Empty.
    #[error("is empty: give a JWKS file or its URL, or leave it out")]
    Empty,
    /// It begins as a URL and is none.
    #[error("is not a URL: {0}")]
    Url(String),
    /// Keys that come over the network unprotected can be anybody's.
    #[error("must be https: keys fetched over plain http from another machine can be replaced on the way")]
    Plain,
}

impl FromStr for KeySource {
    type Err = KeySourceError;

    fn from_str(text: &str) -> Result<Self, KeySourceError> {
        if text.is_empty() {
            return Err(KeySourceError::Empty);
        }
        if !text.contains("://") {
            return Ok(Self::File(PathBuf::from(text)));
        }
        let url = Url::parse(text).map_err(|error| KeySourceError::Url(error.to_string()))?;
        let here = matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]"));
        match url.scheme() {
            "https" => Ok(Self::Url(url)),
            "http" if here => Ok(Self::Url(url)),
            "http" => Err(KeySourceError::Plain),
            other => Err(KeySourceError::Url(format!("the scheme {other} is not supported"))),
        }
    }
}

impl fmt::Display for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            // Without user, password and query, which may be secret.
            Self::Url(url) => {
                write!(f, "{}://{}", url.scheme(), url.host_str().unwrap_or_default())?;
                if let Some(port) = url.port() {
                    write!(f, ":{port}")?;
                }
                f.write_str(url.path())
            }
        }
    }
}

/// Why keys could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeysError {
    #[error("could not read {path}: {cause}")]
    File { path: String, cause: std::io::Error },
    #[error("could not fetch {url}: {cause}")]
    Fetch { url: String, cause: String },
    #[error("{place} has more than {MAX_JWKS_BYTES} bytes: that is no JWKS")]
    TooLarge { place: String },
    #[error("{place} is no JWKS: {cause}")]
    Form { place: String, cause: serde_json::Error },
    #[error(
        "{place} has no key that can be used: RSA for RS256 ({MIN_RSA_BITS} to {MAX_RSA_BITS} bits) or Ed25519 for EdDSA"
    )]
    NoKeys { place: String },
}

/// A public key with the one algorithm that it is for.
#[derive(Clone)]
pub(crate) struct Key {
    kid: Option<String>,
    pub(crate) algorithm: Algorithm,
    pub(crate) decoding: DecodingKey,
}

/// The keys of one JWKS.
pub(crate) struct KeySet {
    keys: Vec<Key>,
}

/// Which key a token is to be checked with.
pub(crate) enum Selected {
    /// This one.
    Key(Key),
    /// It names a key that is not known: newer keys may have it.
    UnknownKid,
    /// No newer keys would help: several keys fit, none does, or the key is for another algorithm.
    None,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Member {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
}

impl KeySet {
    fn parse(bytes: &[u8], place: &KeySource) -> Result<Self, KeysError> {
        let document: Document =
            objects::from_json(bytes).map_err(|cause| KeysError::Form { place: place.to_string(), cause })?;
        let mut keys = Vec::new();
        for value in document.keys.into_iter().take(MAX_KEYS) {
            let member = match Member::deserialize(Objects(value)) {
                Ok(member) => member,
                Err(error) => {
                    warn!("a key of {place} is not used: {error}");
                    continue;
                }
            };
            let kid = member.kid.clone();
            match member.key() {
                Ok(key) => keys.push(key),
                Err(why) => warn!(kid, "a key of {place} is not used: {why}"),
            }
        }
        if keys.is_empty() { Err(KeysError::NoKeys { place: place.to_string() }) } else { Ok(Self { keys }) }
    }

    /// The key for a token. The header chooses among keys; it never changes what a key is for.
    pub(crate) fn select(&self, header: &Header) -> Selected {
        let fits = |key: &&Key| key.algorithm == header.alg;
        let found = match &header.kid {
            Some(kid) => {
                let mut named = self.keys.iter().filter(|key| key.kid.as_ref() == Some(kid)).peekable();
                if named.peek().is_none() {
                    return Selected::UnknownKid;
                }
                only(named.filter(fits))
            }
            None => only(self.keys.iter().filter(fits)),
        };
        found.map_or(Selected::None, |key| Selected::Key(key.clone()))
    }
}

fn only<'a>(mut keys: impl Iterator<Item = &'a Key>) -> Option<&'a Key> {
    let first = keys.next()?;
    keys.next().is_none().then_some(first)
}

impl Member {
    fn key(self) -> Result<Key, String> {
        if self.usage.as_deref().is_some_and(|usage| usage != "sig") {
            return Err("it is not for signatures".to_owned());
        }
        let (algorithm, names) = match (self.kty.as_str(), self.crv.as_deref()) {
            ("RSA", _) => (Algorithm::RS256, &["RS256"][..]),
            ("OKP", Some("Ed25519")) => (Algorithm::EdDSA, &["EdDSA", "Ed25519"][..]),
            ("oct", _) => return Err("a symmetric key in a JWKS is no secret".to_owned()),
            (kty, _) => return Err(format!("keys of type {kty:?} are not supported")),
        };
        if let Some(alg) = self.alg.as_deref().filter(|alg| !names.contains(alg)) {
            return Err(format!("the algorithm {alg:?} is not supported"));
        }
        let decoding = match (algorithm, &self.n, &self.e, &self.x) {
            (Algorithm::RS256, Some(modulus), Some(exponent), _) => {
                let bits = URL_SAFE_NO_PAD.decode(modulus).map_err(|_| "its modulus is not base64url")?;
                let bits = bits.iter().position(|byte| *byte != 0).map_or(0, |zeros| (bits.len() - zeros) * 8);
                if !(MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits) {
                    return Err(format!("an RSA key must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits, not {bits}"));
                }
                DecodingKey::from_rsa_components(modulus, exponent)
            }
            (Algorithm::EdDSA, _, _, Some(point)) => DecodingKey::from_ed_components(point),
            _ => return Err("a part of it is missing".to_owned()),
        };
        let decoding = decoding.map_err(|error| error.to_string())?;
        Ok(Key { kid: self.kid, algorithm, decoding })
    }
}

/// How often keys are looked for; tests are less patient.
#[derive(Debug, Clone)]
pub(crate) struct Timing {
    pub(crate) interval: Duration,
    pub(crate) demand_gap: Duration,
    pub(crate) first_retry: Duration,
}

impl Timing {
    pub(crate) fn every(interval: Duration) -> Self {
        Self { interval, demand_gap: DEMAND_GAP, first_retry: FIRST_RETRY }
    }

    fn retry(&self, failures: u32) -> Duration {
        self.first_retry
            .saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)))
            .min(LAST_RETRY)
            .min(self.interval)
    }
}

/// The keys as they are known at this moment, and the way to newer ones.
pub(crate) struct Keys {
    state: watch::Receiver<State>,
    wanted: Arc<Notify>,
    demand_gap: Duration,
}

#[derive(Default)]
struct State {
    keys: Option<Arc<KeySet>>,
    attempts: u64,
    fetching: bool,
    ended: Option<Instant>,
}

impl Keys {
    /// Reads a file once, and fails if that fails; a URL is fetched in the background, so that a provider that is down
    /// does not keep us from starting. From then on a task refreshes until `stop`.
    pub(crate) async fn start(
        source: KeySource,
        timing: Timing,
        check: Check,
        stop: CancellationToken,
    ) -> anyhow::Result<Self> {
        let client = http_client()?;
        let mut state = State::default();
        let mut first_pause = Duration::ZERO;
        if let KeySource::File(_) = &source {
            let keys = load(&source, &client).await?;
            check.ready(format!("{} keys of {source}", keys.keys.len()));
            state = State { keys: Some(Arc::new(keys)), attempts: 1, fetching: false, ended: Some(Instant::now()) };
            first_pause = timing.interval;
        } else {
            check.not_ready(format!("the keys of {source} are not fetched yet"));
        }
        let (sender, receiver) = watch::channel(state);
        let wanted = Arc::new(Notify::new());
        let demand_gap = timing.demand_gap;
        let refreshing = Refresher { source, client, timing, check, state: sender, wanted: wanted.clone() };
        tokio::spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = refreshing.run(first_pause) => {}
            }
        });
        Ok(Self { state: receiver, wanted, demand_gap })
    }

    /// The newest good keys; None until there were any.
    pub(crate) fn current(&self) -> Option<Arc<KeySet>> {
        self.state.borrow().keys.clone()
    }

    /// Has the keys fetched again, unless that was done a moment ago, and waits for it; false if there was no fetch.
    pub(crate) async fn refreshed(&self) -> bool {
        let mut state = self.state.clone();
        let attempts = {
            let seen = state.borrow_and_update();
            if !seen.fetching && seen.ended.is_some_and(|ended| ended.elapsed() < self.demand_gap) {
                return false;
            }
            if !seen.fetching {
                self.wanted.notify_one();
            }
            seen.attempts
        };
        let fetched = state.wait_for(|state| state.attempts > attempts);
        matches!(tokio::time::timeout(DEMAND_WAIT, fetched).await, Ok(Ok(_)))
    }
}

struct Refresher {
    source: KeySource,
    client: reqwest::Client,
    timing: Timing,
    check: Check,
    state: watch::Sender<State>,
    wanted: Arc<Notify>,
}

impl Refresher {
    async fn run(self, mut pause: Duration) {
        let mut failures = 0;
        loop {
            tokio::select! {
                () = self.wanted.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
            self.state.send_modify(|state| state.fetching = true);
            let loaded = load(&self.source, &self.client).await;
            let known = self.state.borrow().keys.as_ref().map(|keys| keys.keys.len());
            match &loaded {
                Ok(keys) => {
                    if failures > 0 || known.is_none() {
                        info!(keys = keys.keys.len(), "the keys of {} are there", self.source);
                    }
                    self.check.ready(format!("{} keys of {}", keys.keys.len(), self.source));
                    failures = 0;
                    pause = self.timing.interval;
                }
                Err(error) => {
                    failures += 1;
                    pause = self.timing.retry(failures);
                    match known {
                        Some(kept) => {
                            warn!(failures, "{error}; the {kept} keys known before stay in use");
                            self.check.ready(format!("{kept} keys known before, for now: {error}"));
                        }
                        None => {
                            warn!(failures, "{error}; no token can be checked with its keys");
                            self.check.not_ready(error.to_string());
                        }
                    }
                }
            }
            self.state.send_modify(|state| {
                state.fetching = false;
                state.attempts += 1;
                state.ended = Some(Instant::now());
                if let Ok(keys) = loaded {
                    state.keys = Some(Arc::new(keys));
                }
            });
        }
    }
}

async fn load(source: &KeySource, client: &reqwest::Client) -> Result<KeySet, KeysError> {
    let bytes = match source {
        KeySource::File(path) => {
            let failed = |cause| KeysError::File { path: path.display().to_string(), cause };
            let length = tokio::fs::metadata(path).await.map_err(failed)?.len();
            if length > MAX_JWKS_BYTES as u64 {
                return Err(KeysError::TooLarge { place: source.to_string() });
            }
            tokio::fs::read(path).await.map_err(failed)?
        }
        KeySource::Url(url) => fetch(url, source, client).await?,
    };
    KeySet::parse(&bytes, source)
}

async fn fetch(url: &Url, source: &KeySource, client: &reqwest::Client) -> Result<Vec<u8>, KeysError> {
    let failed = |error: reqwest::Error| {
        // The cause says more than the error, and the URL is named without its query.
        let error = error.without_url();
        let cause =
            std::error::Error::source(&error).map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"));
        KeysError::Fetch { url: source.to_string(), cause }
    };
    let mut response = client.get(url.clone()).send().await.map_err(failed)?;
    if response.status() != reqwest::StatusCode::OK {
        return Err(KeysError::Fetch { url: source.to_string(), cause: format!("it answers {}", response.status()) });
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        if bytes.len() + chunk.len() > MAX_JWKS_BYTES {
            return Err(KeysError::TooLarge { place: source.to_string() });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn http_client() -> anyhow::Result<reqwest::Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // Whoever was first may have chosen another one: that serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    // A redirect could lead from https to anywhere.
    reqwest::Client::builder()
        .timeout(FETCH_TIMEOUT)
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| anyhow::anyhow!("could not set up the client that fetches JWT_JWKS: {error}"))
}

#[cfg(test)]
impl Keys {
    /// Completes when so many attempts to read the source have ended, good or bad.
    pub(crate) async fn attempted(&self, attempts: u64) {
        let mut state = self.state.clone();
        state.wait_for(|state| state.attempts >= attempts).await.expect("the refresher runs");
    }

    /// Attempts that have ended.
    pub(crate) fn attempts(&self) -> u64 {
        self.state.borrow().attempts
    }
}
