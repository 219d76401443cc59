//! What this process waits for: said every few seconds while it waits, and once more when it is told to end meanwhile.
//!
//! A process that waits in silence looks like one that hangs. Whoever waits for something that may be away for long (a
//! server at start, a queue that drains) makes a [`Waiting`] of it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

/// How long is waited before it is said for the first time: what is there within a moment is not worth a word.
const FIRST_AFTER: Duration = Duration::from_secs(1);

/// How often it is said from then on.
pub const SAY_EVERY: Duration = Duration::from_secs(3);

/// What is waited for now, the oldest first.
static OPEN: Mutex<BTreeMap<u64, Open>> = Mutex::new(BTreeMap::new());

/// Numbers the waits of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

struct Open {
    what: String,
    why: String,
    since: Instant,
}

impl Open {
    fn told(&self) -> String {
        let (what, why, seconds) = (&self.what, &self.why, self.since.elapsed().as_secs());
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        format!("{what}, for {seconds} s{why}")
    }
}

/// One wait; over when it is dropped.
#[derive(Debug)]
pub struct Waiting {
    number: u64,
    next: Instant,
}

impl Waiting {
    /// Begins to wait for `what`: a thing, such as `NATS at 127.0.0.1:4222`.
    #[must_use]
    pub fn on(what: impl Into<String>) -> Self {
        let (number, since) = (NEXT.fetch_add(1, Ordering::Relaxed), Instant::now());
        let open = Open { what: what.into(), why: String::new(), since };
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).insert(number, open);
        Self { number, next: since + FIRST_AFTER }
    }

    /// It is not there yet, and why as far as that is known. Says so when it is time to.
    pub fn still(&mut self, why: impl Display) {
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(open) = open.get_mut(&self.number) else { return };
        open.why = why.to_string();
        self.say(open);
    }

    /// Does `work`, which is (a part of) what is waited for, and says so while it lasts.
    pub async fn during<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                () = tokio::time::sleep_until(self.next) => {
                    if let Some(open) = OPEN.lock().unwrap_or_else(PoisonError::into_inner).get(&self.number) {
                        self.say(open);
                    }
                }
            }
        }
    }

    fn say(&mut self, open: &Open) {
        if Instant::now() >= self.next {
            self.next = Instant::now() + SAY_EVERY;
            warn!("waiting for {}", open.told());
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        OPEN.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.number);
    }
}

/// What is waited for at this moment, if anything is: for whoever is told to end meanwhile.
#[must_use]
pub fn told() -> Option<String> {
    let open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    (!open.is_empty()).then(|| open.values().map(Open::told).collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One test, since what is open belongs to the whole process.
    #[tokio::test(start_paused = true)]
    async fn what_is_waited_for_is_told_until_the_wait_is_over() {
        assert_eq!(told(), None);
        let mut nats = Waiting::on("NATS at here");
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(told().as_deref(), Some("NATS at here, for 4 s"));
        nats.still("connection refused");
        assert_eq!(nats.next - Instant::now(), SAY_EVERY, "it was time to say it");
        let next = nats.next;
        tokio::time::advance(Duration::from_secs(1)).await;
        nats.still("connection reset");
        assert_eq!(nats.next, next, "it was said a moment ago");
        let second = Waiting::on("a lock");
        assert_eq!(told().as_deref(), Some("NATS at here, for 5 s (connection reset); a lock, for 0 s"));
        drop(nats);
        assert_eq!(told().as_deref(), Some("a lock, for 0 s"));
        drop(second);
        assert_eq!(told(), None);

        let mut slow = Waiting::on("something slow");
        let begun = Instant::now();
        slow.during(tokio::time::sleep(3 * SAY_EVERY)).await;
        assert_eq!(begun.elapsed(), 3 * SAY_EVERY);
        assert!(slow.next > Instant::now(), "it was said meanwhile");
    }
}
