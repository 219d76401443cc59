//! Whether Redis is worth asking, and what is counted on the way.
//!
//! Failures in a row switch the fallback on: then nobody asks Redis but the monitor. Answers to the monitor in a row
//! switch it off. Each switch is one line in the log; single failures are counted and shown at the level `debug`.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use tracing::{debug, info, warn};

/// Failures in a row, of anybody, that switch the fallback on.
pub(super) const FAILURES_UNTIL_FALLBACK: u32 = 3;

/// Answers in time to the monitor, in a row, that switch it off: a Redis that flaps stays unasked.
pub(super) const ANSWERS_UNTIL_BACK: u32 = 3;

/// In the beginning it is neither: nobody asks Redis, and that it answers is news while its silence is not yet.
const FALLBACK: u8 = 1;
const IN_USE: u8 = 2;

/// What the cache did since this process started. Nothing in here is ever an error for a caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheCounters {
    /// Reads that were answered from Redis.
    pub hits: u64,
    /// Reads that were not, while Redis was asked: nothing there, too old, not readable, no watermark, no answer.
    pub misses: u64,
    /// Reads that another read's load answered.
    pub shared: u64,
    /// Values that were stored.
    pub fills: u64,
    /// Values that were not: older than the watermark or what is there, no watermark, too large, no answer.
    pub fills_lost: u64,
    /// Operations that Redis did not carry out or not in time, the monitor's included.
    pub failures: u64,
    /// Batches of the projector whose products and lists are gone from Redis.
    pub invalidations: u64,
    /// Times that everything of ours was deleted, to begin again.
    pub clears: u64,
    /// Whether reads go past Redis just now.
    pub fallback: bool,
    /// Whether the active projector runs here and has yet to clear Redis before anything in it counts again.
    pub dirty: bool,
}

#[derive(Default)]
pub(super) struct Health {
    pub(super) hits: AtomicU64,
    pub(super) misses: AtomicU64,
    pub(super) shared: AtomicU64,
    pub(super) fills: AtomicU64,
    pub(super) fills_lost: AtomicU64,
    pub(super) invalidations: AtomicU64,
    pub(super) clears: AtomicU64,
    pub(super) dirty: AtomicBool,
    failures: AtomicU64,
    failures_in_a_row: AtomicU32,
    state: AtomicU8,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Health {
    pub(super) fn fallback(&self) -> bool {
        self.state.load(Ordering::Relaxed) != IN_USE
    }

    pub(super) fn succeeded(&self) {
        self.failures_in_a_row.store(0, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, what: &str, problem: &dyn fmt::Display) {
        count(&self.failures);
        debug!(%problem, "Redis: no {what}");
        let in_a_row = self.failures_in_a_row.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if in_a_row >= FAILURES_UNTIL_FALLBACK && self.state.swap(FALLBACK, Ordering::Relaxed) != FALLBACK {
            warn!(%problem, "Redis does not answer in time; reads go to Postgres until it does");
        }
    }

    /// An operation found too many others waiting.
    pub(super) fn crowded(&self) {
        count(&self.failures);
    }

    /// The monitor was answered so many times in a row.
    pub(super) fn answered(&self, in_a_row: u32) {
        if in_a_row >= ANSWERS_UNTIL_BACK && self.state.swap(IN_USE, Ordering::Relaxed) != IN_USE {
            self.succeeded();
            info!("Redis answers; reads use the cache");
        }
    }

    pub(super) fn counters(&self) -> CacheCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CacheCounters {
            hits: of(&self.hits),
            misses: of(&self.misses),
            shared: of(&self.shared),
            fills: of(&self.fills),
            fills_lost: of(&self.fills_lost),
            failures: of(&self.failures),
            invalidations: of(&self.invalidations),
            clears: of(&self.clears),
            fallback: self.fallback(),
            dirty: self.dirty.load(Ordering::Relaxed),
        }
    }
}
