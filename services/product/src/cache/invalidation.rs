//! The active projector's side: the watermark, and the deletion of what a batch changed.
//!
//! Owns the session. A session is one TCP connection, never made again by itself, and one clear at its beginning: so a
//! restart or a change of the Redis behind it, which may forget deletions or invalidate a `SCAN`'s cursor, ends the
//! session, and the next one begins with a clear. Whatever fails, takes too long or is dropped half-way ends it too:
//! the session is taken out of its place for each step and put back only when the step is complete.

use std::time::Duration;

use fred::interfaces::{FredResult, KeysInterface};
use fred::prelude::{Client, Error, ErrorKind, Key as RedisKey, Value};
use lomash_contract::ProductId;
use tokio::time::Instant;
use tracing::{Instrument as _, debug, info, warn};
use uuid::Uuid;

use super::health::count;
use super::redis::{Connection, Lost, Script};
use super::{
    FILTER_PREFIX, Key, LIST_PREFIX, LISTS_MARK, PRODUCT_PREFIX, Shared, WATERMARK, WATERMARK_TTL, milliseconds,
};
use crate::observed;
use crate::projection::AfterCommit;

/// Longest that the projection is held up, whatever Redis does.
pub const HOOK_TIMEOUT: Duration = Duration::from_millis(500);

/// How much of it a `SCAN` may take; the rest is for what must follow it.
const SWEEP_TIMEOUT: Duration = Duration::from_millis(350);

/// Longest that one command of a session may take, connecting included.
const COMMAND_TIMEOUT: Duration = Duration::from_millis(250);

const _: () = assert!(SWEEP_TIMEOUT.as_millis() < HOOK_TIMEOUT.as_millis(), "a sweep must leave time to withdraw");
const _: () =
    assert!(HOOK_TIMEOUT.as_millis() < crate::projection::AFTER_COMMIT_TIMEOUT.as_millis(), "ours comes first");

/// Commands of a session that may wait: it sends one after the other.
const QUEUE: usize = 16;

/// Keys that one `SCAN` looks at: about 0.2 ms of Redis' time, in which it serves nobody else.
const KEYS_A_PAGE: u32 = 1_000;

/// Keys that one `UNLINK` names.
const KEYS_AN_UNLINK: usize = 1_000;

/// Who cleared last, and may set the watermark.
const OWNER: &str = "inventory:watermark:owner";

/// The highest watermark of late: a projector that was believed dead cannot set a lower one.
const FLOOR: &str = "inventory:watermark:floor";

/// How long owner and floor are remembered without being renewed. Longer than a projector that was replaced goes on by
/// mistake (a statement, see `projection`); short enough that a ledger begun anew soon has a cache.
const FLOOR_TTL: Duration = Duration::from_secs(120);

/// Begins a clear: nothing is a hit and nothing is filled until [`ESTABLISH`].
static BEGIN: Script = Script::new(
    "redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
     redis.call('DEL', KEYS[1])
     return 1",
);

/// Ends a clear: sets the watermark, if nobody else began one meanwhile (0) and it stood no further before (-1).
static ESTABLISH: Script = Script::new(
    "if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
     local floor = redis.call('GET', KEYS[3])
     if floor and tonumber(floor) > tonumber(ARGV[2]) then return -1 end
     redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
     redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[4])
     redis.call('PEXPIRE', KEYS[2], ARGV[4])
     return 1",
);

/// Moves the watermark on and renews it, never backwards; 0 where it ran out or is another's: then all must be cleared.
/// 2 when products changed and there may be lists: whoever hears that must delete them or clear, for the mark is gone.
static ADVANCE: Script = Script::new(
    "local watermark = redis.call('GET', KEYS[1])
     if not watermark or redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
     if tonumber(ARGV[2]) > tonumber(watermark) then watermark = ARGV[2] end
     redis.call('SET', KEYS[1], watermark, 'PX', ARGV[3])
     redis.call('SET', KEYS[3], watermark, 'PX', ARGV[4])
     redis.call('PEXPIRE', KEYS[2], ARGV[4])
     if ARGV[5] == 'changed' and redis.call('DEL', KEYS[4]) == 1 then return 2 end
     return 1",
);

/// What the projector tells.
#[derive(Clone, Copy)]
enum News<'n> {
    /// Anything may have changed.
    BecameActive,
    /// These products changed.
    Committed(&'n [ProductId]),
    Idle,
}

/// How far the projector of this process has come with Redis.
#[derive(Default)]
pub(super) enum Progress {
    /// Nothing is known of what Redis holds; the watermark there is not renewed and runs out.
    #[default]
    Unknown,
    /// There is no watermark; what is behind the cursor is deleted.
    Clearing { session: Session, cursor: Cursor },
    /// The watermark is ours and everything below it is invalidated.
    Settled(Session),
}

/// Where a sweep is.
pub(super) enum Cursor {
    At(String),
    End,
}

impl Cursor {
    /// Redis begins and ends a `SCAN` with this one.
    const BEGINNING: &'static str = "0";

    fn beginning() -> Self {
        Self::At(Self::BEGINNING.to_owned())
    }
}

/// What became of the watermark.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Advanced {
    /// It is there and ours, and no list is to be deleted.
    NoLists,
    /// It is, and there may be lists to be deleted.
    Lists,
    /// It ran out or is another's.
    No,
}

/// One connection and one claim to the watermark.
pub(super) struct Session {
    connection: Connection,
    token: String,
}

impl Session {
    /// One command, or the end of the connection.
    async fn run<R>(&mut self, command: impl Future<Output = FredResult<R>>) -> FredResult<R> {
        tokio::select! {
            biased;
            done = command => done,
            _ = &mut self.connection.task => Err(Error::new(ErrorKind::IO, "the connection was lost")),
        }
    }

    fn client(&self) -> Client {
        self.connection.client.clone()
    }

    async fn script(&mut self, script: &Script, keys: &[&str], args: Vec<Value>) -> FredResult<i64> {
        let client = self.client();
        self.run(script.run(&client, keys, args)).await
    }

    /// Claims the watermark and takes it away.
    async fn begin(&mut self) -> FredResult<()> {
        self.token = Uuid::new_v4().to_string();
        let args = vec![self.token.as_str().into(), milliseconds(FLOOR_TTL)];
        self.script(&BEGIN, &[WATERMARK, OWNER], args).await.map(drop)
    }

    async fn establish(&mut self, sequence: u64) -> FredResult<i64> {
        let args = self.watermark(sequence);
        self.script(&ESTABLISH, &[WATERMARK, OWNER, FLOOR], args).await
    }

    /// Moves the watermark to `sequence`, where it is still ours.
    async fn advance(&mut self, sequence: u64, changed: bool) -> FredResult<Advanced> {
        let mut args = self.watermark(sequence);
        args.push(if changed { "changed" } else { "" }.into());
        Ok(match self.script(&ADVANCE, &[WATERMARK, OWNER, FLOOR, LISTS_MARK], args).await? {
            1 => Advanced::NoLists,
            2 => Advanced::Lists,
            _ => Advanced::No,
        })
    }

    fn watermark(&self, sequence: u64) -> Vec<Value> {
        let token = self.token.as_str().into();
        vec![token, sequence.to_string().into(), milliseconds(WATERMARK_TTL), milliseconds(FLOOR_TTL)]
    }

    async fn unlink<K: Into<RedisKey> + Send>(&mut self, keys: Vec<K>) -> FredResult<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let client = self.client();
        self.run(client.unlink::<i64, _>(keys)).await.map(drop)
    }

    /// Deletes what matches `pattern` and begins with one of `prefixes`, until `deadline`; how far it came.
    async fn sweep(
        &mut self,
        pattern: &'static str,
        prefixes: &[&str],
        mut cursor: Cursor,
        deadline: Instant,
    ) -> FredResult<Cursor> {
        while let Cursor::At(position) = cursor {
            if Instant::now() >= deadline {
                return Ok(Cursor::At(position));
            }
            let client = self.client();
            let page = client.scan_page::<(String, Vec<RedisKey>), _, _>(position, pattern, Some(KEYS_A_PAGE), None);
            let (next, keys) = self.run(page).await?;
            let ours = |key: &RedisKey| prefixes.iter().any(|prefix| key.as_bytes().starts_with(prefix.as_bytes()));
            self.unlink(keys.into_iter().filter(ours).collect()).await?;
            cursor = if next == Cursor::BEGINNING { Cursor::End } else { Cursor::At(next) };
        }
        Ok(cursor)
    }
}

impl Shared {
    /// One step of the projector, within [`HOOK_TIMEOUT`].
    async fn hear(&self, sequence: u64, news: News<'_>) {
        let deadline = Instant::now() + HOOK_TIMEOUT;
        // There is one projector, which waits for each call: the lock is free, or held by one that is being dropped.
        let Ok(mut place) = tokio::time::timeout_at(deadline, self.progress.lock()).await else { return };
        let progress = std::mem::take(&mut *place);
        self.health.dirty.store(true, std::sync::atomic::Ordering::Relaxed);
        let unknown = matches!(progress, Progress::Unknown);
        // With no session to lose there is no hurry: the monitor finds out when Redis is back.
        if unknown && self.health.fallback() && !matches!(news, News::BecameActive) {
            return;
        }
        let problem = match tokio::time::timeout_at(deadline, self.step(progress, sequence, news)).await {
            Ok(Ok(progress)) => {
                let settled = matches!(progress, Progress::Settled(_));
                *place = progress;
                self.health.succeeded();
                self.health.dirty.store(!settled, std::sync::atomic::Ordering::Relaxed);
                return;
            }
            Ok(Err(problem)) => problem,
            Err(_) => Error::new(ErrorKind::Timeout, "the time for one invalidation is over"),
        };
        if !unknown {
            warn!(sequence, %problem, "an invalidation failed; the cache runs out, and is cleared before it is used again");
        }
        self.health.failed("invalidation", &problem);
    }

    async fn step(&self, progress: Progress, sequence: u64, news: News<'_>) -> FredResult<Progress> {
        let sweep_deadline = Instant::now() + SWEEP_TIMEOUT;
        let (mut session, mut cursor) = match (progress, news) {
            (Progress::Settled(mut session), News::Committed(_) | News::Idle) => {
                let changed = if let News::Committed(changed) = news { changed } else { &[] };
                let advanced = session.advance(sequence, !changed.is_empty()).await?;
                if advanced == Advanced::No {
                    info!(sequence, "the cache's watermark ran out or is another's; clearing");
                } else if invalidate(&mut session, changed, advanced == Advanced::Lists, sweep_deadline).await? {
                    if matches!(news, News::Committed(_)) {
                        count(&self.health.invalidations);
                    }
                    return Ok(Progress::Settled(session));
                } else {
                    info!(sequence, "Redis holds too many keys for one invalidation; clearing the cache instead");
                }
                session.begin().await?;
                (session, Cursor::beginning())
            }
            (Progress::Clearing { session, cursor }, News::Committed(_) | News::Idle) => (session, cursor),
            (Progress::Unknown, _) | (_, News::BecameActive) => {
                let Some(config) = &self.config else { return Ok(Progress::Unknown) };
                let connection = Connection::open(config, Lost::StaysLost, COMMAND_TIMEOUT, QUEUE)?;
                let mut session = Session { connection, token: String::new() };
                session.begin().await?;
                (session, Cursor::beginning())
            }
        };
        let all = [PRODUCT_PREFIX, LIST_PREFIX, FILTER_PREFIX];
        cursor = session.sweep("product*", &all, cursor, sweep_deadline).await?;
        if let Cursor::At(_) = cursor {
            return Ok(Progress::Clearing { session, cursor });
        }
        match session.establish(sequence).await? {
            1 => {
                count(&self.health.clears);
                Ok(Progress::Settled(session))
            }
            -1 => {
                debug!(sequence, "the cache waits: of late there was a projection that had come further");
                Ok(Progress::Clearing { session, cursor: Cursor::End })
            }
            _ => Err(Error::new(ErrorKind::Canceled, "another projector claimed the watermark")),
        }
    }
}

/// Deletes the products, and all lists where there may be any; false when there are too many keys for it.
async fn invalidate(session: &mut Session, changed: &[ProductId], lists: bool, deadline: Instant) -> FredResult<bool> {
    for some in changed.chunks(KEYS_AN_UNLINK) {
        session.unlink(some.iter().map(|product_id| Key::product(*product_id).text).collect()).await?;
    }
    if !lists {
        return Ok(true);
    }
    let reached = session.sweep("products:*", &[LIST_PREFIX, FILTER_PREFIX], Cursor::beginning(), deadline).await?;
    Ok(matches!(reached, Cursor::End))
}

impl AfterCommit for super::Cache {
    async fn became_active(&self, checkpoint: u64) {
        if self.shared.config.is_some() {
            self.shared.hear(checkpoint, News::BecameActive).await;
        }
    }

    async fn committed(&self, reached: u64, changed: &[ProductId]) {
        if self.shared.config.is_some() {
            let span = observed::invalidate_span(changed.len());
            self.shared.hear(reached, News::Committed(changed)).instrument(span).await;
        }
    }

    async fn idle(&self, checkpoint: u64) {
        if self.shared.config.is_some() {
            self.shared.hear(checkpoint, News::Idle).await;
        }
    }
}
