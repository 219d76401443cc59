//! The cache on a real Redis under everything that may befall it: slow readers, restarts, a frozen server, a projector
//! that dies, two of them at once.
//!
//! Owns what the cache promises: a read that begins after an invalidation never sees what was before it, whatever fails
//! meanwhile; once quiet, an entry equals the source or is absent; nobody waits long; nothing grows. A source of its own
//! stands for Postgres and remembers every state, so that what a reader gets can be judged exactly.
use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fred::interfaces::{ClientLike, KeysInterface};
use fred::prelude::{Builder, Client, Config, Expiration};
use fred::types::InfoKind;
use lomash::stack::{Redis, scratch};
use lomash_contract::ProductId;
use lomash_platform::Secret;
use lomash_tests::{Dice, PATIENCE, eventually};
use product_service::cache::{Cache, ENTRY_TTL, HOOK_TIMEOUT, Key, MAX_ENTRY_BYTES, OPERATION_TIMEOUT, WATERMARK_TTL};
use product_service::projection::AfterCommit;
use product_service::reads::At;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use uuid::Uuid;

/// The key under which the watermark is, as the tests see it from outside.
const WATERMARK: &str = "inventory:watermark";

/// How much longer than its bound an operation may take here: the machine is busy with other tests.
const GENEROUS: u32 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Row {
    name: String,
    version: u64,
}

fn row(version: u64) -> Row {
    Row { name: "Cup".to_owned(), version }
}

/// A Redis of the test's own, and a connection to look at it from outside.
struct Kit {
    raw: Client,
    redis: Redis,
    _dir: tempfile::TempDir,
}

impl Kit {
    async fn start() -> Result<Self> {
        let dir = scratch()?;
        let redis = Redis::start(&dir.path().join("redis")).await?;
        let mut builder = Builder::from_config(Config::from_url(&redis.url())?);
        builder.set_policy(fred::prelude::ReconnectPolicy::new_constant(0, 50));
        let raw = builder.build()?;
        raw.init().await?;
        Ok(Self { raw, redis, _dir: dir })
    }

    /// A cache as one replica has it, in use.
    async fn cache(&self) -> Result<Cache> {
        let cache = Cache::connect(Some(&Secret::from(self.redis.url())))?;
        in_use(&cache).await?;
        Ok(cache)
    }

    async fn keys(&self) -> Result<Vec<String>> {
        let mut cursor = "0".to_owned();
        let mut all = Vec::new();
        loop {
            let (next, keys): (String, Vec<String>) = self.raw.scan_page(cursor, "*", Some(1_000), None).await?;
            all.extend(keys);
            if next == "0" {
                return Ok(all);
            }
            cursor = next;
        }
    }

    async fn watermark(&self) -> Result<Option<u64>> {
        Ok(self.raw.get(WATERMARK).await?)
    }
}

async fn in_use(cache: &Cache) -> Result<()> {
    eventually("the cache to be in use", PATIENCE, async || Ok((!cache.counters().fallback).then_some(()))).await
}

/// Fills until it is stored; a busy machine may miss a deadline.
async fn filled(cache: &Cache, key: &Key, sequence: u64, value: &Row) -> Result<()> {
    eventually("a fill", PATIENCE, async || Ok(cache.fill(key, sequence, value).await.then_some(()))).await
}

/// The hook until Redis has taken it in.
async fn settled(cache: &Cache, sequence: u64) -> Result<()> {
    eventually("a settled cache", PATIENCE, async || {
        cache.idle(sequence).await;
        Ok((!cache.counters().dirty).then_some(()))
    })
    .await
}

fn product() -> ProductId {
    ProductId(Uuid::new_v4())
}

#[tokio::test]
async fn a_slow_reader_cannot_put_an_old_value_back() -> Result<()> {
    let kit = Kit::start().await?;
    let (projector, reader) = (kit.cache().await?, kit.cache().await?);
    let product = product();
    let keys = [Key::product(product), Key::list("sort=sku"), Key::filter("category=kitchen")];
    projector.became_active(10).await;
    settled(&projector, 10).await?;
    for key in &keys {
        filled(&reader, key, 10, &row(10)).await?;
        assert_eq!(reader.get::<Row>(key).await, Some(At { sequence: 10, value: row(10) }));
    }
    // The reader reads its snapshot at 10 again and is slow; the projector commits 11 and invalidates.
    projector.committed(11, &[product]).await;
    ensure!(!projector.counters().dirty, "the invalidation failed: {:?}", projector.counters());
    for key in &keys {
        assert_eq!(reader.get::<Row>(key).await, None, "{}", key.as_str());
        assert!(!reader.fill(key, 10, &row(10)).await, "an old value was put back under {}", key.as_str());
        assert_eq!(reader.get::<Row>(key).await, None);
        filled(&reader, key, 11, &row(11)).await?;
    }
    // Nor may an old one replace a newer one that another reader filled meanwhile.
    filled(&reader, &keys[0], 15, &row(15)).await?;
    assert!(!reader.fill(&keys[0], 12, &row(12)).await);
    assert_eq!(reader.get(&keys[0]).await, Some(At { sequence: 15, value: row(15) }));
    // Beyond 32 bits too: the script reads the sequence from the entry's bytes.
    let (high, higher) = (1 << 40, (1 << 40) + 1);
    filled(&reader, &keys[0], higher, &row(higher)).await?;
    assert!(!reader.fill(&keys[0], high, &row(high)).await);
    filled(&reader, &keys[0], higher, &row(1)).await?;
    Ok(())
}

#[tokio::test]
async fn without_a_watermark_nothing_counts_and_nothing_is_filled() -> Result<()> {
    let kit = Kit::start().await?;
    let (projector, reader) = (kit.cache().await?, kit.cache().await?);
    let key = Key::product(product());
    assert!(!reader.fill(&key, 1, &row(1)).await, "filled before there was a projector");
    projector.became_active(5).await;
    settled(&projector, 5).await?;
    filled(&reader, &key, 5, &row(5)).await?;
    let left: i64 = kit.raw.pttl(WATERMARK).await?;
    assert!(left > 0 && left <= i64::try_from(WATERMARK_TTL.as_millis())?, "{left} ms");

    // It runs out: sooner than it would, to save the time.
    kit.raw.expire::<i64, _>(WATERMARK, 0, None).await?;
    assert_eq!(reader.get::<Row>(&key).await, None);
    assert!(!reader.fill(&key, 6, &row(6)).await);
    // The projector comes back: what was there is deleted before anything counts again.
    settled(&projector, 6).await?;
    assert_eq!(kit.watermark().await?, Some(6));
    assert_eq!(kit.raw.exists::<i64, _>(key.as_str()).await?, 0);
    assert!(projector.counters().clears >= 2);
    // A watermark never goes backwards.
    projector.idle(3).await;
    assert_eq!(kit.watermark().await?, Some(6));
    Ok(())
}

#[tokio::test]
async fn becoming_active_deletes_what_is_ours_and_only_that() -> Result<()> {
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    // As a projector left it that died between its commit and its invalidation.
    for key in ["product:old", "products:list:old", "products:filter:old", "products:else", "productive", "session:1"] {
        kit.raw.set::<(), _, _>(key, "x", Some(Expiration::EX(60)), None, false).await?;
    }
    kit.raw.set::<(), _, _>(WATERMARK, "7", Some(Expiration::EX(10)), None, false).await?;
    cache.became_active(8).await;
    settled(&cache, 8).await?;
    let mut left = kit.keys().await?;
    left.retain(|key| !key.starts_with("inventory:"));
    left.sort();
    assert_eq!(left, ["productive", "products:else", "session:1"]);
    assert_eq!(kit.watermark().await?, Some(8));
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_read_is_a_miss_and_is_deleted_and_what_is_too_large_is_not_stored() -> Result<()> {
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    cache.became_active(1).await;
    settled(&cache, 1).await?;
    let key = Key::product(product());
    for garbage in [
        &b""[..],
        b"garbage",
        b"\x92\xcf\0\0\0\0\0\0\0\x01",
        b"\x92\xcf\0\0\0\0\0\0\0\x01\xc0",
        b"\xdd\xff\xff\xff\xff",
    ] {
        kit.raw.set::<(), _, _>(key.as_str(), garbage, Some(Expiration::EX(60)), None, false).await?;
        assert_eq!(cache.get::<Row>(&key).await, None);
        assert_eq!(kit.raw.exists::<i64, _>(key.as_str()).await?, 0, "{garbage:?} is still there");
    }
    let large = Row { name: "x".repeat(MAX_ENTRY_BYTES), version: 1 };
    assert!(!cache.fill(&key, 1, &large).await);
    let largest = Row { name: "x".repeat(MAX_ENTRY_BYTES - 100), version: 1 };
    filled(&cache, &key, 1, &largest).await?;
    assert_eq!(cache.get(&key).await, Some(At { sequence: 1, value: largest }));
    Ok(())
}

#[tokio::test]
async fn every_key_expires_and_keys_are_never_listed_at_once() -> Result<()> {
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    cache.became_active(1).await;
    settled(&cache, 1).await?;
    for number in 0..50 {
        filled(&cache, &Key::list(&format!("page {number}")), 1, &row(1)).await?;
        filled(&cache, &Key::product(product()), 1, &row(1)).await?;
    }
    let _ = cache.get::<Row>(&Key::list("page 0")).await;
    let keys = kit.keys().await?;
    assert!(keys.len() > 100);
    for key in keys {
        let left: i64 = kit.raw.pttl(key.as_str()).await?;
        assert!(left > 0, "{key} would stay for ever");
        if key.starts_with("product") {
            assert!(left <= i64::try_from(ENTRY_TTL.as_millis())?);
        }
    }
    cache.committed(2, &[product()]).await;
    let left = kit.keys().await?;
    assert!(!left.iter().any(|key| key.starts_with("products:")), "{left:?}");
    // With no list left there is nothing to look for.
    let scans = async || {
        let stats: String = kit.raw.info(Some(InfoKind::CommandStats)).await?;
        let scans = stats.lines().find(|line| line.starts_with("cmdstat_scan:")).map(str::to_owned);
        anyhow::Ok(scans.map(|line| line.split(',').next().unwrap_or_default().to_owned()))
    };
    let before = scans().await?;
    cache.committed(3, &[product()]).await;
    ensure!(!cache.counters().dirty);
    assert_eq!(scans().await?, before, "lists were looked for that cannot be there");
    let stats: String = kit.raw.info(Some(InfoKind::CommandStats)).await?;
    for used in ["cmdstat_scan:", "cmdstat_unlink:", "cmdstat_evalsha:", "cmdstat_mget:"] {
        assert!(stats.contains(used), "{used} {stats}");
    }
    for unused in ["cmdstat_keys:", "cmdstat_eval:", "cmdstat_flushall:", "cmdstat_flushdb:"] {
        assert!(!stats.contains(unused), "{stats}");
    }
    Ok(())
}

#[tokio::test]
async fn a_failed_invalidation_makes_the_next_one_clear_everything() -> Result<()> {
    let kit = Kit::start().await?;
    let (projector, reader) = (kit.cache().await?, kit.cache().await?);
    let (changed, other) = (product(), product());
    projector.became_active(1).await;
    settled(&projector, 1).await?;
    for product in [changed, other] {
        filled(&reader, &Key::product(product), 1, &row(1)).await?;
    }
    kit.redis.pause()?;
    for sequence in 2..8 {
        let started = Instant::now();
        projector.committed(sequence, &[changed]).await;
        assert!(started.elapsed() < HOOK_TIMEOUT * GENEROUS, "held up for {:?}", started.elapsed());
        assert!(projector.counters().dirty);
    }
    // By now nobody waits for Redis any more.
    eventually("the fallback", PATIENCE, async || Ok(projector.counters().fallback.then_some(()))).await?;
    let started = Instant::now();
    projector.committed(8, &[changed]).await;
    assert!(started.elapsed() < OPERATION_TIMEOUT * GENEROUS);
    kit.redis.resume()?;
    in_use(&projector).await?;
    settled(&projector, 8).await?;
    in_use(&reader).await?;
    for product in [changed, other] {
        assert_eq!(reader.get::<Row>(&Key::product(product)).await, None);
        assert!(!reader.fill(&Key::product(product), 7, &row(1)).await);
    }
    assert_eq!(kit.watermark().await?, Some(8));
    Ok(())
}

#[tokio::test]
async fn a_zombie_neither_lowers_the_watermark_nor_keeps_the_other_from_it() -> Result<()> {
    let kit = Kit::start().await?;
    let (zombie, active, reader) = (kit.cache().await?, kit.cache().await?, kit.cache().await?);
    let product = product();
    let key = Key::product(product);
    zombie.became_active(10).await;
    settled(&zombie, 10).await?;
    active.became_active(20).await;
    settled(&active, 20).await?;
    filled(&reader, &key, 20, &row(20)).await?;
    // Its last invalidation, late. It finds that it lost its claim, claims again, and is held by the floor.
    zombie.committed(11, &[product]).await;
    assert!(kit.watermark().await?.is_none_or(|watermark| watermark >= 20));
    assert!(!reader.fill(&key, 15, &row(15)).await, "a value from before 20 was taken");
    eventually("its claim to take the watermark away", PATIENCE, async || {
        zombie.became_active(12).await;
        Ok(kit.watermark().await?.is_none().then_some(()))
    })
    .await?;
    assert!(!reader.fill(&key, 15, &row(15)).await, "a value from before 20 was taken");
    // The active one goes on and clears, for it cannot know what the other did.
    settled(&active, 21).await?;
    assert_eq!(kit.watermark().await?, Some(21));
    filled(&reader, &key, 21, &row(21)).await?;
    Ok(())
}

#[tokio::test]
async fn a_restarted_redis_is_cleared_whether_it_remembers_or_not() -> Result<()> {
    let mut kit = Kit::start().await?;
    let (projector, reader) = (kit.cache().await?, kit.cache().await?);
    let key = Key::product(product());
    projector.became_active(1).await;
    settled(&projector, 1).await?;
    filled(&reader, &key, 1, &row(1)).await?;
    let clears = projector.counters().clears;
    let mut before = Vec::new();
    for key in kit.keys().await? {
        before.push((key.clone(), kit.raw.get::<bytes::Bytes, _>(key).await?));
    }
    kit.redis.restart().await?;
    in_use(&projector).await?;
    // Long enough for a connection that would be made again by itself.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    // Its append-only file brings back what was there a moment ago, or a moment before that: the watermark, whose it
    // is, and entries whose deletion was not written yet.
    for (key, value) in before {
        kit.raw.set::<(), _, _>(key, value, Some(Expiration::EX(10)), None, false).await?;
    }
    settled(&projector, 2).await?;
    assert!(projector.counters().clears > clears, "{:?}", projector.counters());
    assert_eq!(kit.raw.exists::<i64, _>(key.as_str()).await?, 0);
    // Empty, with the connections as they were, and the scripts gone.
    in_use(&reader).await?;
    filled(&reader, &key, 2, &row(2)).await?;
    kit.raw.flushall::<()>(false).await?;
    fred::interfaces::LuaInterface::script_flush(&kit.raw, false).await?;
    assert_eq!(reader.get::<Row>(&key).await, None);
    settled(&projector, 3).await?;
    filled(&reader, &key, 3, &row(3)).await?;
    Ok(())
}

#[tokio::test]
async fn a_redis_that_was_frozen_wakes_up_with_nothing_that_counts() -> Result<()> {
    let kit = Kit::start().await?;
    let (projector, reader) = (kit.cache().await?, kit.cache().await?);
    let product = product();
    let key = Key::product(product);
    projector.became_active(1).await;
    settled(&projector, 1).await?;
    filled(&reader, &key, 1, &row(1)).await?;
    kit.redis.pause()?;
    // Sent into a frozen server's buffers; it will carry them out when it wakes.
    projector.committed(2, &[product]).await;
    let _ = reader.fill(&key, 1, &row(1)).await;
    // The projector dies here; nobody goes on in its place.
    drop(projector);
    tokio::time::sleep(WATERMARK_TTL + Duration::from_millis(500)).await;
    kit.redis.resume()?;
    in_use(&reader).await?;
    assert_eq!(reader.get::<Row>(&key).await, None, "an entry outlived its watermark");
    assert_eq!(kit.watermark().await?, None, "a late renewal brought the watermark back");
    assert!(!reader.fill(&key, 2, &row(2)).await);
    Ok(())
}

#[tokio::test]
async fn without_redis_or_with_one_that_never_answers_reads_come_from_the_source_at_once() -> Result<()> {
    // Accepts and says nothing: half open.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let silent = Secret::from(format!("redis://127.0.0.1:{}", silent.local_addr()?.port()));
    let nobody = Secret::from("redis://127.0.0.1:9".to_owned());
    for url in [None, Some(&silent), Some(&nobody)] {
        let started = Instant::now();
        let cache = Cache::connect(url)?;
        assert!(started.elapsed() < OPERATION_TIMEOUT * GENEROUS);
        let key = Key::product(product());
        let until = Instant::now() + Duration::from_secs(2);
        let mut reads = 0;
        while Instant::now() < until {
            let started = Instant::now();
            let loaded = async { Ok::<_, Infallible>(At { sequence: 7, value: row(7) }) };
            assert_eq!(cache.read_through(&key, Some(7), loaded).await?.value, row(7));
            assert!(started.elapsed() < OPERATION_TIMEOUT * GENEROUS, "{:?}", started.elapsed());
            reads += 1;
            tokio::task::yield_now().await;
        }
        assert!(reads > 100);
        let started = Instant::now();
        cache.became_active(7).await;
        cache.committed(8, &[product()]).await;
        cache.idle(8).await;
        assert!(started.elapsed() < HOOK_TIMEOUT * GENEROUS);
        assert!(cache.counters().fallback && cache.counters().hits == 0);
    }
    Ok(())
}

#[tokio::test]
async fn a_wrong_address_is_told_without_its_password() {
    let urls = ["redis://u:hunter2@", "redis://u:hunter2@:6379", "redis://u:hunter2@host:x", "hunter2"];
    let schemes = ["rediss", "http", "redis-cluster"].map(|scheme| format!("{scheme}://u:hunter2@host:1"));
    for wrong in urls.map(str::to_owned).into_iter().chain(schemes) {
        let problem = Cache::connect(Some(&Secret::from(wrong.clone()))).expect_err(&wrong);
        let said = format!("{problem} {problem:?}");
        assert!(said.contains("REDIS_URL") && !said.contains("hunter2"), "{said}");
    }
}

#[tokio::test]
async fn the_fallback_goes_on_and_off_again() -> Result<()> {
    let mut kit = Kit::start().await?;
    let cache = kit.cache().await?;
    let key = Key::product(product());
    for fault in ["killed", "paused"] {
        cache.became_active(1).await;
        settled(&cache, 1).await?;
        filled(&cache, &key, 1, &row(1)).await?;
        if fault == "killed" {
            kit.redis.kill();
        } else {
            kit.redis.pause()?;
        }
        eventually("the fallback", PATIENCE, async || {
            let started = Instant::now();
            let _ = cache.get::<Row>(&key).await;
            assert!(started.elapsed() < OPERATION_TIMEOUT * GENEROUS, "{fault}: {:?}", started.elapsed());
            Ok(cache.counters().fallback.then_some(()))
        })
        .await?;
        // Longer than until the monitor takes another connection: it must come back after that too.
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert!(cache.counters().fallback);
        if fault == "killed" {
            kit.redis.restart().await?;
        } else {
            kit.redis.resume()?;
        }
        in_use(&cache).await?;
    }
    Ok(())
}

#[tokio::test]
async fn nothing_piles_up_while_redis_is_frozen() -> Result<()> {
    const CALLS: usize = 3_000;
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    cache.became_active(1).await;
    settled(&cache, 1).await?;
    kit.redis.pause()?;
    let value = Row { name: "x".repeat(20_000), version: 1 };
    let started = Instant::now();
    let calls = (0..CALLS).map(|number| {
        let (cache, value) = (cache.clone(), value.clone());
        tokio::spawn(async move { cache.fill(&Key::list(&number.to_string()), 1, &value).await })
    });
    for stored in futures::future::join_all(calls).await {
        assert!(!stored?, "stored by a frozen Redis");
    }
    assert!(started.elapsed() < OPERATION_TIMEOUT * GENEROUS * 10, "{:?}", started.elapsed());
    kit.redis.resume()?;
    in_use(&cache).await?;
    // What was on its way arrives late, if at all; what waited in the queue was dropped when nobody waited any more.
    let arrived = kit.keys().await?.iter().filter(|key| key.starts_with("products:list:")).count();
    assert!(arrived < CALLS / 2, "{arrived} of {CALLS} fills were still carried out");
    Ok(())
}

#[tokio::test]
async fn one_load_answers_all_who_miss_at_once_but_nobody_who_asked_after_an_invalidation() -> Result<()> {
    let kit = Kit::start().await?;
    let (projector, cache) = (kit.cache().await?, kit.cache().await?);
    let product = product();
    let key = Key::product(product);
    projector.became_active(10).await;
    settled(&projector, 10).await?;
    let loads = Arc::new(AtomicU64::new(0));
    let herd = (0..200).map(|_| {
        let (cache, key, loads) = (cache.clone(), key.clone(), loads.clone());
        tokio::spawn(async move {
            let load = async {
                loads.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok::<_, Infallible>(At { sequence: 10, value: row(10) })
            };
            cache.read_through(&key, None, load).await
        })
    });
    for read in futures::future::join_all(herd).await {
        assert_eq!(read??.value, row(10));
    }
    // More than one only where a deadline was missed on a busy machine.
    let (loads, counters) = (loads.load(Ordering::Relaxed), cache.counters());
    assert!(loads <= 1 + counters.failures && counters.shared + counters.hits + loads >= 200, "{loads} {counters:?}");

    // A leader took its snapshot at 11 and is slow; then 12 is committed and invalidated.
    projector.committed(11, &[product]).await;
    let (go, wait) = oneshot::channel::<()>();
    let (took, taken) = oneshot::channel::<()>();
    let leader = tokio::spawn({
        let (cache, key) = (cache.clone(), key.clone());
        async move {
            let load = async {
                took.send(()).unwrap();
                wait.await.unwrap();
                Ok::<_, Infallible>(At { sequence: 11, value: row(11) })
            };
            cache.read_through(&key, None, load).await
        }
    });
    taken.await?;
    projector.committed(12, &[product]).await;
    ensure!(!projector.counters().dirty);
    let follower = tokio::spawn({
        let (cache, key) = (cache.clone(), key.clone());
        async move {
            let load = async { Ok::<_, Infallible>(At { sequence: 12, value: row(12) }) };
            cache.read_through(&key, None, load).await
        }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    go.send(()).unwrap();
    assert_eq!(leader.await??.value, row(11));
    assert_eq!(follower.await??.value, row(12), "a reader saw what was before the invalidation that it came after");
    // A leader that is dropped leaves nobody waiting.
    let other = Key::list("dropped");
    let never = cache.read_through(&other, None, std::future::pending::<Result<At<Row>, Infallible>>());
    assert!(tokio::time::timeout(Duration::from_millis(200), never).await.is_err());
    let load = async { Ok::<_, Infallible>(At { sequence: 12, value: row(12) }) };
    assert_eq!(cache.read_through(&other, None, load).await?.value, row(12));
    Ok(())
}

#[tokio::test]
async fn a_sequence_that_was_asked_for_is_honoured() -> Result<()> {
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    let key = Key::product(product());
    cache.became_active(10).await;
    settled(&cache, 10).await?;
    filled(&cache, &key, 10, &row(10)).await?;
    let load = |sequence| async move { Ok::<_, Infallible>(At { sequence, value: row(sequence) }) };
    assert_eq!(cache.read_through(&key, Some(11), load(12)).await?.sequence, 12);
    // The newer one took its place.
    eventually("the fill", PATIENCE, async || Ok(cache.get::<Row>(&key).await.filter(|at| at.sequence == 12))).await?;
    assert!(cache.read_through(&key, Some(12), load(99)).await?.sequence >= 12);
    let refused = async { Err::<At<Row>, _>("no") };
    assert_eq!(cache.read_through(&key, Some(100), refused).await, Err("no"));
    Ok(())
}

/// Stands for Postgres: every state of every product.
#[derive(Default)]
struct Source {
    checkpoint: u64,
    /// Per product the sequences at which it changed, from the first on.
    changes: HashMap<ProductId, Vec<u64>>,
}

impl Source {
    fn commit(&mut self, changed: &[ProductId]) -> u64 {
        self.checkpoint += 1;
        for product in changed {
            let changes = self.changes.entry(*product).or_default();
            changes.push(self.checkpoint);
        }
        self.checkpoint
    }

    /// The version of a product in the state at `sequence`.
    fn version(&self, product: ProductId, sequence: u64) -> u64 {
        let changes = self.changes.get(&product).map_or(&[][..], Vec::as_slice);
        changes.iter().copied().take_while(|change| *change <= sequence).last().unwrap_or(0)
    }

    fn read(&self, product: ProductId) -> At<Row> {
        At { sequence: self.checkpoint, value: row(self.version(product, self.checkpoint)) }
    }

    /// What must be true of anything read: it was so at its sequence, and is not from before `promised`.
    fn judge(&self, product: ProductId, at: &At<Row>, promised: u64) {
        let (version, sequence) = (at.value.version, at.sequence);
        assert_eq!(version, self.version(product, sequence), "{product} was never {version} at {sequence}");
        let oldest = self.version(product, promised);
        assert!(version >= oldest, "{product} is {version}, but {oldest} was invalidated as of {promised}");
    }
}

/// One step at a time, in any order: commits, invalidations, readers between snapshot and fill, a zombie, a Redis that
/// forgets. The seed replays it.
#[tokio::test]
async fn whatever_the_order_no_read_sees_what_was_before_an_invalidation() -> Result<()> {
    const STEPS: u32 = 3_000;
    let kit = Kit::start().await?;
    let (active, zombie, reader) = (kit.cache().await?, kit.cache().await?, kit.cache().await?);
    let mut dice = Dice::thrown();
    let products: Vec<ProductId> = (0..4).map(|_| ProductId(dice.uuid())).collect();
    let mut source = Source::default();
    let mut unheard: Vec<ProductId> = Vec::new();
    let mut readers: Vec<(ProductId, At<Row>)> = Vec::new();
    // What the last invalidation promised.
    let mut promised = 0;
    let (mut hits, mut stored, mut refused) = (0, 0, 0);
    active.became_active(0).await;
    for _ in 0..STEPS {
        let product = *dice.pick(&products);
        let key = Key::product(product);
        match dice.below(100) {
            0..15 => {
                source.commit(&[product]);
                unheard.push(product);
            }
            15..30 => {
                active.committed(source.checkpoint, &unheard).await;
                unheard.clear();
                if !active.counters().dirty {
                    promised = source.checkpoint;
                }
            }
            30..55 => readers.push((product, source.read(product))),
            55..75 if !readers.is_empty() => {
                // Mostly one of the latest; the others get older and older.
                let latest = if dice.below(4) == 0 { readers.len() } else { readers.len().min(3) };
                let some = readers.len() - 1 - dice.below(u32::try_from(latest)?) as usize;
                let (product, at) = readers.remove(some);
                let watermark = kit.watermark().await?;
                let done = reader.fill(&Key::product(product), at.sequence, &at.value).await;
                assert!(!done || watermark.is_some_and(|watermark| at.sequence >= watermark), "{at:?} {watermark:?}");
                if done { stored += 1 } else { refused += 1 }
            }
            96 => zombie.became_active(dice.below(u32::try_from(source.checkpoint)? + 1).into()).await,
            97 => zombie.committed(dice.below(u32::try_from(source.checkpoint)? + 1).into(), &[product]).await,
            98 => kit.raw.del::<(), _>(WATERMARK).await?,
            99 => {
                // With the floor forgotten a zombie is believed until the active one speaks again.
                kit.raw.flushall::<()>(false).await?;
                promised = 0;
            }
            _ => {
                if let Some(at) = reader.get::<Row>(&key).await {
                    source.judge(product, &at, promised);
                    hits += 1;
                }
            }
        }
    }
    println!("{hits} hits, {stored} fills stored, {refused} refused, {:?}", active.counters());
    assert!(hits > 10 && stored > 10 && refused > 10, "too little happened to prove anything");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_load_and_every_fault_reads_never_go_behind_an_invalidation_and_end_equal() -> Result<()> {
    let mut kit = Kit::start().await?;
    let (projector, replicas) = (kit.cache().await?, [kit.cache().await?, kit.cache().await?]);
    let mut dice = Dice::thrown();
    let products: Arc<Vec<ProductId>> = Arc::new((0..20).map(|_| ProductId(dice.uuid())).collect());
    let source = Arc::new(Mutex::new(Source::default()));
    let (stop, promised) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    projector.became_active(0).await;

    let projecting = tokio::spawn({
        let (projector, products, source) = (projector.clone(), products.clone(), source.clone());
        let (stop, promised, mut dice) = (stop.clone(), promised.clone(), Dice::new(dice.seed ^ 1));
        async move {
            let mut longest = Duration::ZERO;
            while !stop.load(Ordering::Relaxed) {
                let changed: Vec<ProductId> = (0..=dice.below(3)).map(|_| *dice.pick(&products)).collect();
                let reached = source.lock().unwrap().commit(&changed);
                let started = Instant::now();
                projector.committed(reached, &changed).await;
                longest = longest.max(started.elapsed());
                if !projector.counters().dirty {
                    promised.store(reached, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(dice.below(20).into())).await;
            }
            longest
        }
    });
    let reading: Vec<_> = (0..8)
        .map(|number| {
            let cache = replicas[number % replicas.len()].clone();
            let (products, source, stop, promised) = (products.clone(), source.clone(), stop.clone(), promised.clone());
            let mut dice = Dice::new(dice.seed ^ (number as u64 + 2));
            tokio::spawn(async move {
                let (mut reads, mut longest) = (0_u64, Duration::ZERO);
                while !stop.load(Ordering::Relaxed) {
                    let product = *dice.pick(&products);
                    // A slow reader now and then: what it read is old when it fills.
                    let delay = Duration::from_millis(if dice.below(10) == 0 { 30 } else { 1 });
                    let load = async {
                        let at = source.lock().unwrap().read(product);
                        tokio::time::sleep(delay).await;
                        Ok::<_, Infallible>(at)
                    };
                    let before = promised.load(Ordering::SeqCst);
                    let started = Instant::now();
                    let at = cache.read_through(&Key::product(product), None, load).await.unwrap();
                    longest = longest.max(started.elapsed());
                    source.lock().unwrap().judge(product, &at, before);
                    reads += 1;
                }
                (reads, longest)
            })
        })
        .collect();

    for fault in 0..6 {
        let hits: u64 = replicas.iter().map(|cache| cache.counters().hits).sum();
        eventually("hits", PATIENCE, async || {
            let now: u64 = replicas.iter().map(|cache| cache.counters().hits).sum();
            Ok((now > hits + 50).then_some(()))
        })
        .await?;
        match fault % 3 {
            0 => {
                kit.redis.pause()?;
                tokio::time::sleep(Duration::from_millis(dice.below(3_000).into())).await;
                kit.redis.resume()?;
            }
            1 => {
                kit.redis.kill();
                tokio::time::sleep(Duration::from_millis(dice.below(1_500).into())).await;
                kit.redis.restart().await?;
            }
            _ => {
                // So short that nobody falls back: only some operations are late.
                for _ in 0..10 {
                    kit.redis.pause()?;
                    tokio::time::sleep(Duration::from_millis(dice.below(200).into())).await;
                    kit.redis.resume()?;
                    tokio::time::sleep(Duration::from_millis(dice.below(100).into())).await;
                }
            }
        }
        for cache in replicas.iter().chain([&projector]) {
            in_use(cache).await?;
        }
    }
    stop.store(true, Ordering::Relaxed);
    let longest = projecting.await?;
    assert!(longest < HOOK_TIMEOUT * GENEROUS, "the projector was held up for {longest:?}");
    for reader in reading {
        let (reads, longest) = reader.await?;
        assert!(reads > 100);
        assert!(longest < OPERATION_TIMEOUT * GENEROUS + Duration::from_secs(1), "a read took {longest:?}");
    }
    // Once quiet.
    let checkpoint = source.lock().unwrap().checkpoint;
    settled(&projector, checkpoint).await?;
    for cache in &replicas {
        for product in products.iter() {
            let truth = source.lock().unwrap().version(*product, checkpoint);
            if let Some(at) = cache.get::<Row>(&Key::product(*product)).await {
                assert_eq!(at.value.version, truth);
            }
        }
        println!("{:?}", cache.counters());
    }
    println!("{:?}; {checkpoint} commits", projector.counters());
    Ok(())
}

/// Not a test but a measurement: `cargo test --workspace --test integration cache::measure -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn measure_reads_and_invalidations() -> Result<()> {
    let kit = Kit::start().await?;
    let cache = kit.cache().await?;
    cache.became_active(1).await;
    settled(&cache, 1).await?;
    let middle = |mut times: Vec<Duration>| {
        times.sort();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    };
    let mut cached = 0_u32;
    for target in [0_u32, 10_000, 100_000] {
        for lists in [0, 1_000] {
            settled(&cache, 1).await?;
            while cached < target {
                let some = 50.min(target - cached);
                let fills = (0..some).map(|_| {
                    let cache = cache.clone();
                    async move { cache.fill(&Key::product(product()), u64::MAX >> 12, &row(1)).await }
                });
                let stored = futures::future::join_all(fills).await.into_iter().filter(|stored| *stored).count();
                cached += u32::try_from(stored)?;
                if stored == 0 {
                    settled(&cache, 1).await?;
                }
            }
            let changed: Vec<ProductId> = (0..50).map(|_| product()).collect();
            let (mut times, mut sequence) = (Vec::new(), cache.counters().invalidations + 1);
            for _ in 0..20 {
                for number in 0..lists {
                    cache.fill(&Key::list(&number.to_string()), u64::MAX >> 12, &row(1)).await;
                }
                sequence += 1;
                let started = Instant::now();
                cache.committed(sequence, &changed).await;
                times.push(started.elapsed());
                ensure!(!cache.counters().dirty);
            }
            let keys = kit.keys().await?.len();
            println!("{keys} keys, and {lists} lists: an invalidation (p50, p99) {:?}", middle(times));
        }
        let key = Key::product(product());
        filled(&cache, &key, u64::MAX >> 12, &row(1)).await?;
        let mut times = Vec::new();
        for _ in 0..5_000 {
            let started = Instant::now();
            let hit = cache.get::<Row>(&key).await.is_some();
            times.push(started.elapsed());
            if !hit {
                settled(&cache, 1).await?;
                filled(&cache, &key, u64::MAX >> 12, &row(1)).await?;
            }
        }
        println!("{target} keys: a hit (p50, p99) {:?}", middle(times));
        let mut times = Vec::new();
        for _ in 0..2_000 {
            let started = Instant::now();
            cache.fill(&key, u64::MAX >> 12, &row(1)).await;
            times.push(started.elapsed());
        }
        println!("{target} keys: a fill (p50, p99) {:?}", middle(times));
    }
    Ok(())
}
