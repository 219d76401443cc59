//! The cache: what readers asked of the projection, in Redis, for a short while.
//!
//! It may lose anything and must never be wrong for long. Nobody ever gets an error from it: without Redis every read is
//! a miss, and reads come from Postgres. Owns the keys `product:{productId}`, `products:list:{hash}` and
//! `products:filter:{hash}`, and four of its own under `inventory:`. Assumes one Redis server, not a cluster: a script
//! takes an entry's key together with the watermark's.
//!
//! **The watermark** is the projection's sequence up to which Redis has been invalidated. An entry is the value and the
//! sequence of the snapshot that it was read in. Four rules carry everything:
//!
//! 1. A read is a hit only if the watermark is there; one `MGET` fetches both.
//! 2. A fill is stored only if the watermark is there and not above the fill's sequence, and never over an entry with a
//!    newer one. This is one script, so nothing comes between.
//! 3. The active projector sets the watermark after its commit and *before* it deletes. What a slow reader fills with an
//!    older sequence is refused from then on; what was filled before is deleted.
//! 4. The watermark runs out by itself. It is moved on or renewed only where it still is the projector's own; where it is
//!    gone, everything is deleted before it is set again, and meanwhile nothing is filled by rule 2.
//!
//! What may happen, and why it is no harm:
//!
//! - *The projector dies between commit and invalidation, or is cut off from Redis.* Nobody renews: within
//!   [`WATERMARK_TTL`] every reader of every replica reads from Postgres. Who becomes active clears first.
//! - *A command arrives late*, because Redis was frozen with it in a buffer: deletions and fills are harmless at any time
//!   (rule 2). A late renewal finds its watermark gone, or prolongs it once, so an entry outlives its truth by twice
//!   [`WATERMARK_TTL`] at worst. A late claim or its end belongs to a token that was replaced, see below.
//! - *Redis restarts, empty or with an older state.* The projector's session is one connection and ends with it; the next
//!   one clears. An old watermark that came back runs out or is taken away by that.
//! - *Two projectors overlap.* A clear begins with a claim: a token that replaces the former one and takes the watermark
//!   away. Only the last one who claimed can set or move the watermark, and who finds that it lost its claim clears
//!   again. A zombie that claims last still cannot set a watermark below the highest one of late (the floor), so no fill
//!   from before the other's commits is accepted.
//! - *The projection is rolled back or the ledger begun anew.* The floor keeps the cache off until the projection is past
//!   it again, or until nobody has renewed it for two minutes.
//! - *`lomash rebuild` swaps the tables.* The projector says `became_active` again, and everything is cleared.
//!
//! Sequences that were asked for (`Lomash-Min-Sequence`) are compared with the entry's own, never with the watermark:
//! between the two steps of rule 3 an entry may be older than the watermark says.

mod flights;
mod health;
mod invalidation;
mod redis;

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use fred::interfaces::{ClientLike, KeysInterface};
use fred::prelude::{Client, Config, Value};
use lomash_contract::ProductId;
use lomash_platform::Secret;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tracing::debug;

use self::flights::{Flights, Role};
pub use self::health::CacheCounters;
use self::health::{Health, count};
pub use self::invalidation::HOOK_TIMEOUT;
use self::invalidation::Progress;
use self::redis::{Connection, Lost, Script};
use crate::reads::At;

/// Longest that a read or a fill waits for Redis; Postgres answers in about as long.
pub const OPERATION_TIMEOUT: Duration = Duration::from_millis(50);

/// How long the watermark lives without being renewed. The projector renews it after every commit and every
/// [`IDLE_CHECK`](crate::projection::IDLE_CHECK); a commit that takes longer costs a clear.
pub const WATERMARK_TTL: Duration = Duration::from_secs(10);

const _: () = assert!(
    WATERMARK_TTL.as_millis() > 2 * (crate::projection::IDLE_CHECK.as_millis() + HOOK_TIMEOUT.as_millis()),
    "one renewal may fail"
);

/// How long an entry lives at most. The backstop for what none of the rules foresaw.
pub const ENTRY_TTL: Duration = Duration::from_secs(60);

/// Largest entry, in bytes; a page of 200 products takes about 70,000.
pub const MAX_ENTRY_BYTES: usize = 128 * 1024;

/// Commands that may wait for the connection; the next one fails at once. More than the requests that are served at once.
pub const MAX_QUEUED_COMMANDS: usize = 1_024;

/// Fills under way at once, 8 MiB if all were the largest; beyond, a value is not stored this time.
const MAX_FILLS: usize = 64;

/// How long a reader waits for what another one loads before it loads itself.
const SHARE_TIMEOUT: Duration = Duration::from_secs(1);

/// How often the monitor asks Redis.
const PING_EVERY: Duration = Duration::from_millis(200);

/// After so long without an answer the connection is given up and another one made, whatever its state is.
const REOPEN_AFTER: Duration = Duration::from_secs(5);

/// The sequence that everything in Redis is invalidated up to.
const WATERMARK: &str = "inventory:watermark";

const PRODUCT_PREFIX: &str = "product:";
const LIST_PREFIX: &str = "products:list:";
const FILTER_PREFIX: &str = "products:filter:";

/// Bytes of a query's digest that its key carries: enough that nobody finds two queries with the same one.
const DIGEST_BYTES: usize = 16;

/// There while a list may be cached: without it a batch need not look for lists. It outlives every list.
const LISTS_MARK: &str = "inventory:lists";
const LISTS_MARK_TTL: Duration = Duration::from_secs(2 * ENTRY_TTL.as_secs());

/// Stores an entry by rule 2, and the mark with a list; 0 when it loses.
static FILL: Script = Script::new(
    "local watermark = redis.call('GET', KEYS[2])
     if not watermark or tonumber(ARGV[1]) < tonumber(watermark) then return 0 end
     local header = redis.call('GETRANGE', KEYS[1], 0, 9)
     if #header == 10 and struct.unpack('>I8', header, 3) > tonumber(ARGV[1]) then return 0 end
     redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
     if KEYS[3] then redis.call('SET', KEYS[3], '', 'PX', ARGV[4]) end
     return 1",
);

/// The address is none of a single Redis server.
#[derive(Debug, thiserror::Error)]
#[error("REDIS_URL is not the address of one Redis server ({0}); write it as redis://user:password@host:6379/0")]
pub struct BadRedisUrl(&'static str);

/// Names an entry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    text: String,
}

impl Key {
    /// A product.
    #[must_use]
    pub fn product(product_id: ProductId) -> Self {
        Self { text: format!("{PRODUCT_PREFIX}{product_id}") }
    }

    /// A page of the list of all products. `query` is the request in its one normal form: sort, limit, cursor.
    #[must_use]
    pub fn list(query: &str) -> Self {
        Self { text: format!("{LIST_PREFIX}{}", digest(query)) }
    }

    /// A page of a filtered list. `query` is the request in its one normal form, filters included.
    #[must_use]
    pub fn filter(query: &str) -> Self {
        Self { text: format!("{FILTER_PREFIX}{}", digest(query)) }
    }

    /// Whether any product's change may change it.
    fn is_list(&self) -> bool {
        !self.text.starts_with(PRODUCT_PREFIX)
    }

    /// The key as Redis has it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

/// The same on every replica and in every release, unlike the standard library's hashes.
fn digest(query: &str) -> String {
    Sha256::digest(query).iter().take(DIGEST_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

/// An entry's bytes: the MessagePack array `[sequence, value]`, with the sequence always as nine bytes so that [`FILL`]
/// finds it. The value is written with the names of its fields: a replica of another release that has other fields then
/// reads what both know or finds it not readable, where an array would shift fields silently.
fn encode<T: Serialize>(sequence: u64, value: &T) -> Option<Bytes> {
    /// An array of two, whose first element is an unsigned integer of eight bytes.
    const HEADER: [u8; 2] = [0x92, 0xcf];
    let mut entry = Vec::with_capacity(256);
    entry.extend_from_slice(&HEADER);
    entry.extend_from_slice(&sequence.to_be_bytes());
    if let Err(problem) = rmp_serde::encode::write_named(&mut entry, value) {
        debug!(%problem, "a value cannot be encoded and is not cached");
        return None;
    }
    (entry.len() <= MAX_ENTRY_BYTES).then(|| entry.into())
}

fn decode<T: DeserializeOwned>(entry: &[u8]) -> Option<At<T>> {
    let (sequence, value) = rmp_serde::from_slice(entry).ok()?;
    Some(At { sequence, value })
}

fn milliseconds(duration: Duration) -> Value {
    duration.as_millis().to_string().into()
}

/// The cache. Clones are the same one; the last one dropped closes its connections.
#[derive(Clone)]
pub struct Cache {
    shared: Arc<Shared>,
    _monitor: Arc<Monitor>,
}

struct Shared {
    /// None without Redis.
    config: Option<Config>,
    connection: RwLock<Option<Connection>>,
    health: Health,
    fills: Semaphore,
    flights: Flights,
    /// The projector's side.
    progress: tokio::sync::Mutex<Progress>,
}

struct Monitor(Option<JoinHandle<()>>);

impl Drop for Monitor {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

/// What Redis said to a read.
enum Found<T> {
    /// A value that counts.
    Entry { at: At<T>, watermark: u64 },
    /// No value, and what a fill would have to reach.
    Nothing { watermark: u64 },
    /// Nothing that helps: no watermark, no answer, or nobody asked.
    Silence,
}

impl Cache {
    /// A cache on the Redis at `url`, or one that never has anything. Returns at once; Redis may come later, and go.
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`BadRedisUrl`] when `url` cannot be an address, whether or not anybody listens there.
    pub fn connect(url: Option<&Secret>) -> Result<Self, BadRedisUrl> {
        let config = url.map(parse).transpose()?;
        let unusable = |_| BadRedisUrl("it cannot be used");
        let connection = config.as_ref().map(readers).transpose().map_err(unusable)?;
        let shared = Arc::new(Shared {
            config,
            connection: RwLock::new(connection),
            health: Health::default(),
            fills: Semaphore::new(MAX_FILLS),
            flights: Flights::default(),
            progress: tokio::sync::Mutex::default(),
        });
        let task = shared.config.clone().map(|config| tokio::spawn(watch(shared.clone(), config)));
        Ok(Self { shared, _monitor: Arc::new(Monitor(task)) })
    }

    /// What was counted so far.
    #[must_use]
    pub fn counters(&self) -> CacheCounters {
        self.shared.health.counters()
    }

    /// Tells what was counted so far, as long as there is this cache; it does not keep it.
    pub(crate) fn observer(&self) -> impl Fn() -> Option<CacheCounters> + Send + Sync + 'static {
        let shared = Arc::downgrade(&self.shared);
        move || shared.upgrade().map(|shared| shared.health.counters())
    }

    /// What is cached under `key`, if anything that counts is. At most [`OPERATION_TIMEOUT`].
    pub async fn get<T: DeserializeOwned>(&self, key: &Key) -> Option<At<T>> {
        match self.shared.look_up(key).await {
            Found::Entry { at, .. } => {
                count(&self.shared.health.hits);
                Some(at)
            }
            Found::Nothing { .. } | Found::Silence => {
                count(&self.shared.health.misses);
                None
            }
        }
    }

    /// Caches what was read in a snapshot at `sequence`; whether it was stored. At most [`OPERATION_TIMEOUT`].
    pub async fn fill<T: Serialize>(&self, key: &Key, sequence: u64, value: &T) -> bool {
        match encode(sequence, value) {
            Some(entry) => self.shared.fill(key, sequence, entry).await,
            None => {
                count(&self.shared.health.fills_lost);
                false
            }
        }
    }

    /// The cached value, or what `load` brings, which is then cached behind the caller's back.
    ///
    /// With `min_sequence` a cached value counts only if it was read at that sequence or later; it is on `load` to wait
    /// until the projection is that far. `load` is not polled when the cache, or another read of the same key that
    /// loads just now, has the answer. What another read brings counts only if it could have been filled when this one
    /// asked, so no read sees a state from before an invalidation that preceded it.
    ///
    /// # Errors
    /// Only those of `load`.
    pub async fn read_through<T, E>(
        &self,
        key: &Key,
        min_sequence: Option<u64>,
        load: impl Future<Output = Result<At<T>, E>>,
    ) -> Result<At<T>, E>
    where
        T: Serialize + DeserializeOwned,
    {
        let health = &self.shared.health;
        let min_sequence = min_sequence.unwrap_or(0);
        let watermark = match self.shared.look_up::<T>(key).await {
            Found::Entry { at, .. } if at.sequence >= min_sequence => {
                count(&health.hits);
                return Ok(at);
            }
            Found::Entry { watermark, .. } | Found::Nothing { watermark } => watermark,
            Found::Silence => {
                count(&health.misses);
                return load.await;
            }
        };
        let flight = match self.shared.flights.join(key) {
            Role::Lead(flight) => Some(flight),
            Role::Alone => None,
            Role::Follow(mut landing) => {
                let landed = timeout(SHARE_TIMEOUT, landing.wait_for(Option::is_some)).await;
                let entry = landed.ok().and_then(Result::ok).and_then(|entry| entry.clone());
                if let Some(at) = entry.and_then(|entry| decode::<T>(&entry))
                    && at.sequence >= min_sequence.max(watermark)
                {
                    count(&health.shared);
                    return Ok(at);
                }
                None
            }
        };
        count(&health.misses);
        let at = load.await?;
        let entry = encode(at.sequence, &at.value);
        let Some(entry) = entry else {
            count(&health.fills_lost);
            return Ok(at);
        };
        if let Some(flight) = &flight {
            flight.land(entry.clone());
        }
        let (shared, key, sequence) = (self.shared.clone(), key.clone(), at.sequence);
        tokio::spawn(async move {
            shared.fill(&key, sequence, entry).await;
            // Until here the flight answers those who do not find the entry yet.
            drop(flight);
        });
        Ok(at)
    }
}

/// Reads an address. No error repeats it: there may be a password in it.
fn parse(url: &Secret) -> Result<Config, BadRedisUrl> {
    // The library takes any scheme, `rediss` too, and would speak without TLS.
    if !url.expose().starts_with("redis://") {
        return Err(BadRedisUrl("it does not begin with redis://; clusters, sentinels and TLS are not supported"));
    }
    let config = Config::from_url(url.expose()).map_err(|_| BadRedisUrl("it cannot be parsed"))?;
    if config.server.hosts().iter().any(|server| server.host.is_empty()) {
        return Err(BadRedisUrl("it names no host"));
    }
    Ok(config)
}

/// The connection that reads and fills go over.
fn readers(config: &Config) -> Result<Connection, fred::prelude::Error> {
    Connection::open(config, Lost::MadeAgain, OPERATION_TIMEOUT, MAX_QUEUED_COMMANDS)
}

impl Shared {
    /// The connection, if Redis is worth asking.
    fn client(&self) -> Option<Client> {
        if self.health.fallback() { None } else { self.any_client() }
    }

    fn any_client(&self) -> Option<Client> {
        let connection = self.connection.read().unwrap_or_else(PoisonError::into_inner);
        connection.as_ref().map(|connection| connection.client.clone())
    }

    async fn look_up<T: DeserializeOwned>(&self, key: &Key) -> Found<T> {
        let Some(client) = self.client() else { return Found::Silence };
        let both = client.mget::<(Option<Bytes>, Option<String>), _>(vec![key.as_str(), WATERMARK]);
        let (entry, watermark) = match timeout(OPERATION_TIMEOUT, both).await {
            Ok(Ok(both)) => both,
            Ok(Err(problem)) => {
                self.problem("answer to a read", &problem);
                return Found::Silence;
            }
            Err(late) => {
                self.health.failed("answer to a read", &late);
                return Found::Silence;
            }
        };
        self.health.succeeded();
        let Some(watermark) = watermark.and_then(|watermark| watermark.parse().ok()) else { return Found::Silence };
        let Some(entry) = entry else { return Found::Nothing { watermark } };
        match decode(&entry) {
            Some(at) => Found::Entry { at, watermark },
            None => {
                debug!(key = key.as_str(), "a cached value is not readable; deleting it");
                if let Ok(Err(problem)) = timeout(OPERATION_TIMEOUT, client.unlink::<i64, _>(key.as_str())).await {
                    self.problem("deletion", &problem);
                }
                Found::Nothing { watermark }
            }
        }
    }

    async fn fill(&self, key: &Key, sequence: u64, entry: Bytes) -> bool {
        let stored = self.try_fill(key, sequence, entry).await;
        count(if stored { &self.health.fills } else { &self.health.fills_lost });
        stored
    }

    async fn try_fill(&self, key: &Key, sequence: u64, entry: Bytes) -> bool {
        let (Some(client), Ok(_permit)) = (self.client(), self.fills.try_acquire()) else { return false };
        let (entry_ttl, mark_ttl) = (milliseconds(ENTRY_TTL), milliseconds(LISTS_MARK_TTL));
        let args = vec![sequence.to_string().into(), Value::Bytes(entry), entry_ttl, mark_ttl];
        let keys = [key.as_str(), WATERMARK, LISTS_MARK];
        let keys = if key.is_list() { &keys[..] } else { &keys[..2] };
        match timeout(OPERATION_TIMEOUT, FILL.run::<i64>(&client, keys, args)).await {
            Ok(Ok(stored)) => {
                self.health.succeeded();
                stored == 1
            }
            Ok(Err(problem)) => {
                self.problem("fill", &problem);
                false
            }
            Err(late) => {
                self.health.failed("fill", &late);
                false
            }
        }
    }

    /// A queue that is full says that we ask too much at once, not that Redis does not answer; the monitor finds out.
    fn problem(&self, what: &str, problem: &fred::prelude::Error) {
        if *problem.kind() == fred::prelude::ErrorKind::Backpressure {
            self.health.crowded();
        } else {
            self.health.failed(what, problem);
        }
    }

    /// Makes another connection in the place of the one there.
    fn reopen(&self, config: &Config) {
        match readers(config) {
            Ok(connection) => {
                *self.connection.write().unwrap_or_else(PoisonError::into_inner) = Some(connection);
            }
            Err(problem) => debug!(%problem, "no other connection to Redis"),
        }
    }
}

/// The health monitor: asks Redis again and again, and mends the connection where it does not mend itself.
async fn watch(shared: Arc<Shared>, config: Config) {
    let mut in_a_row = 0;
    let mut last_answer = Instant::now();
    loop {
        tokio::time::sleep(PING_EVERY).await;
        let ended = {
            let connection = shared.connection.read().unwrap_or_else(PoisonError::into_inner);
            connection.as_ref().is_none_or(|connection| connection.task.is_finished())
        };
        if ended || last_answer.elapsed() >= REOPEN_AFTER {
            shared.reopen(&config);
            last_answer = Instant::now();
        }
        let Some(client) = shared.any_client() else { continue };
        let problem: String = match timeout(OPERATION_TIMEOUT, client.ping::<()>(None)).await {
            Ok(Ok(())) => {
                (in_a_row, last_answer) = (in_a_row + 1, Instant::now());
                shared.health.answered(in_a_row);
                continue;
            }
            Ok(Err(problem)) => problem.to_string(),
            Err(late) => late.to_string(),
        };
        in_a_row = 0;
        shared.health.failed("answer to a ping", &problem);
    }
}
