//! Which command the server refuses a batch for, and when it is given up. Pure.
//!
//! The server refuses a batch as a whole. So it is halved until the command that causes it stands alone, while the others are
//! stored: some twelve tries for one among four thousand. What then becomes of it depends on what the refusal is due to
//! ([`Cause`]): a good command must never be given up for the state of a server, and a bad one must not hold up the others for
//! ever. A command that is neither is put behind the others, which tell: where they are stored, it is the command.

use std::time::Duration;

use lomash_ledger::{Cause, STALE_LEADER_PATIENCE};

use super::MAX_GROUP_COMMANDS;

/// Refusals alone after which a command may be given up that is not refused for what is in it for certain.
pub(super) const MIN_REFUSALS: u32 = 3;

/// For how long a command is refused alone before that convicts it when there is no other one to compare it with, and before an
/// id of its is believed to be another's: a leader that was frozen and wakes is behind for [`STALE_LEADER_PATIENCE`]. With the
/// halving before it, it stays below the ten seconds in which a poison order must be a dead letter.
pub(super) const MIN_REFUSED_FOR: Duration = Duration::from_secs(4);

const _: () = assert!(STALE_LEADER_PATIENCE.as_millis() < MIN_REFUSED_FOR.as_millis());

/// Refusals alone for the server's sake after which the others are tried before it: until then the order of the queue is kept.
pub(super) const SERVER_PATIENCE: u32 = 3;

/// Pause before a command is tried again that was refused alone.
pub(super) const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// Why commands cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The server refused the batch, with its code and words.
    Refused { code: u64, description: String },
    /// An event id is stored already, and the state does not know the command.
    Identity { description: String },
}

impl Refusal {
    pub(super) const fn cause(&self) -> Cause {
        match self {
            Self::Refused { code, .. } => Cause::of(*code),
            Self::Identity { .. } => Cause::Unclear,
        }
    }

    /// Whether both are refusals of one kind.
    pub(super) const fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Refused { code, .. }, Self::Refused { code: other, .. }) => *code == *other,
            (Self::Identity { .. }, Self::Identity { .. }) => true,
            _ => false,
        }
    }
}

/// What is known when a command was refused alone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Evidence {
    /// How often it was refused alone, this time included.
    pub(super) times: u32,
    /// Since the first of these.
    pub(super) refused_for: Duration,
    /// Whether others were stored since.
    pub(super) others_are_stored: bool,
    /// Whether others wait that were refused alone in the same way.
    pub(super) others_are_refused: bool,
    /// Whether the server was seen to take another batch just now, whatever it does with it.
    pub(super) batches_are_taken: bool,
}

/// Whether a command that was refused alone is given up.
pub(super) fn is_given_up(refusal: &Refusal, evidence: Evidence) -> bool {
    let Evidence { times, refused_for, others_are_stored, others_are_refused, batches_are_taken } = evidence;
    match (refusal, refusal.cause()) {
        (_, Cause::Content) => true,
        (_, Cause::Server) => false,
        // Its ids say it of this command alone, whatever becomes of others; but a leader may be behind.
        (Refusal::Identity { .. }, Cause::Unclear) => times >= MIN_REFUSALS && refused_for >= MIN_REFUSED_FOR,
        (Refusal::Refused { .. }, Cause::Unclear) => {
            // A server whose disk is full calls every batch incomplete, and there may be no other command to show it.
            let alone_in_it = batches_are_taken && !others_are_refused && refused_for >= MIN_REFUSED_FOR;
            times >= MIN_REFUSALS && (others_are_stored || alone_in_it)
        }
    }
}

/// How many of the first commands that wait go into the next batch.
#[derive(Debug)]
pub(super) struct Isolation {
    /// Among so many of the first ones is one that the server refuses.
    suspects: usize,
    at_once: usize,
}

impl Default for Isolation {
    fn default() -> Self {
        Self { suspects: 0, at_once: MAX_GROUP_COMMANDS }
    }
}

impl Isolation {
    pub(super) const fn at_once(&self) -> usize {
        self.at_once
    }

    /// Whether batches are smaller than they could be: then nothing is decided ahead.
    pub(super) const fn is_on(&self) -> bool {
        self.at_once < MAX_GROUP_COMMANDS
    }

    /// A batch of so many commands was refused.
    pub(super) fn refused(&mut self, commands: usize) {
        self.suspects = commands;
        self.at_once = (commands / 2).max(1);
    }

    /// The first commands are settled, so many of them.
    pub(super) fn settled(&mut self, commands: usize) {
        if !self.is_on() {
            return;
        }
        self.suspects = self.suspects.saturating_sub(commands);
        let most = if self.suspects > 0 { (self.suspects / 2).max(1) } else { MAX_GROUP_COMMANDS };
        self.at_once = (self.at_once * 2).min(most);
    }

    /// The first command is put behind the others. Whether those are stored shows one of them, alone.
    pub(super) fn put_behind(&mut self) {
        *self = Self { suspects: 0, at_once: 1 };
    }
}

#[cfg(test)]
mod tests {
    use lomash_ledger::BATCH_INCOMPLETE;
    use proptest::prelude::*;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    fn refused(code: u64) -> Refusal {
        Refusal::Refused { code, description: String::new() }
    }

    #[test]
    fn a_command_is_given_up_only_when_it_is_the_command() {
        let identity = Refusal::Identity { description: String::new() };
        let first = Evidence {
            times: 1,
            refused_for: SHORT,
            others_are_stored: false,
            others_are_refused: false,
            batches_are_taken: true,
        };
        let often = Evidence { times: MIN_REFUSALS, ..first };
        let long = Evidence { refused_for: MIN_REFUSED_FOR, ..often };
        for (what, refusal, evidence, given_up) in [
            ("a header that never fits", refused(10_097), first, true),
            ("a full disk", refused(10_047), Evidence { times: 1_000, others_are_stored: true, ..long }, false),
            ("an unknown code, once", refused(1), first, false),
            ("an unknown code, and others are stored", refused(1), Evidence { others_are_stored: true, ..often }, true),
            ("once, and others are stored", refused(1), Evidence { others_are_stored: true, ..first }, false),
            ("an unknown code, nobody to compare", refused(1), long, true),
            ("nobody to compare, too early", refused(1), often, false),
            (
                "a full disk under a batch",
                refused(BATCH_INCOMPLETE),
                Evidence { batches_are_taken: false, ..long },
                false,
            ),
            ("an unknown code that meets all", refused(1), Evidence { others_are_refused: true, ..long }, false),
            ("an id of another's, at once", identity.clone(), often, false),
            ("an id of another's, for long", identity.clone(), Evidence { others_are_refused: true, ..long }, true),
        ] {
            assert_eq!(is_given_up(&refusal, evidence), given_up, "{what}");
        }
    }

    proptest! {
        /// Whatever commands the server refuses, each is found alone, all others are stored, and that takes few tries.
        #[test]
        fn every_bad_command_is_found_alone(bad in proptest::collection::vec(any::<bool>(), 1..300), rare in any::<bool>()) {
            let bad: Vec<bool> = bad.iter().enumerate().map(|(n, bad)| *bad && (!rare || n % 97 == 0)).collect();
            let count = bad.iter().filter(|bad| **bad).count();
            let (mut isolation, mut waiting, mut found, mut tries) = (Isolation::default(), &bad[..], 0, 0);
            while !waiting.is_empty() {
                tries += 1;
                let batch = &waiting[..isolation.at_once().min(waiting.len())];
                if !batch.contains(&true) {
                    isolation.settled(batch.len());
                    waiting = &waiting[batch.len()..];
                } else if batch.len() > 1 {
                    isolation.refused(batch.len());
                } else {
                    found += 1;
                    isolation.settled(1);
                    waiting = &waiting[1..];
                }
            }
            prop_assert_eq!(found, count);
            prop_assert!(tries <= 1 + 24 * count, "{} tries for {} bad ones", tries, count);
            while isolation.is_on() {
                isolation.settled(1);
            }
        }
    }
}
