//! The commands that were answered under a key and are remembered: the newest, each for [`KEYS_KEPT`].
//!
//! What is forgotten is forgotten by the instants of the ledger's own events and never by a clock, so that every fold of the
//! same stream remembers the same. Like the ids of orders the commands stand one behind the other in pages, in the order of
//! the stream; a full page never changes, so a copy for a snapshot shares it. Beside them an index of their places. That is
//! 56 bytes a command and 6 to 12 for its place: 130 MB for the most there may be.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashMap, HashTable};
use lomash_contract::limits::KEYS_KEPT;
use lomash_contract::{Timestamp, UpdatedBy};
use uuid::Uuid;

/// Most commands that are remembered: 22 a second, day and night. When there are so many within [`KEYS_KEPT`], no further
/// one is taken under a key until the oldest are forgotten; writes without a key go on.
pub const MAX_REMEMBERED_COMMANDS: usize = 2_000_000;

/// Most of them by one caller, so that one alone cannot take the keys from all others.
pub const MAX_REMEMBERED_OF_ONE: u32 = 1_000_000;

const _: () = assert!((MAX_REMEMBERED_OF_ONE as usize) < MAX_REMEMBERED_COMMANDS, "others find room");

/// Commands of a page: less than 1 MiB, the most that a copy has to copy.
pub(super) const PAGE_COMMANDS: usize = 16_384;

/// A shard of the index holds at most some 31,000 places, which move in a few milliseconds when it grows.
const SHARDS: usize = 64;

/// A command that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RememberedCommand {
    pub(super) command_id: Uuid,
    pub(super) fingerprint: u64,
    /// Where its answer is: of the event that tells it, or in an older ledger of the first event that it brought about.
    pub(super) sequence: u64,
    /// When it was answered, in milliseconds since 1970.
    pub(super) at_ms: i64,
    /// By whom; nil is the system.
    pub(super) by: Uuid,
}

const _: () = assert!(size_of::<RememberedCommand>() == 56, "as the top of the file says");

impl RememberedCommand {
    /// Whether it is older than a key is kept.
    pub(super) const fn is_over(&self, now_ms: i64) -> bool {
        now_ms - self.at_ms > KEYS_KEPT.as_millis() as i64
    }
}

/// An instant as commands have it.
pub(super) fn millis(at: Timestamp) -> i64 {
    let at = at.get();
    at.unix_timestamp() * 1_000 + i64::from(at.millisecond())
}

/// Whose share a command takes.
pub(super) const fn caller(by: UpdatedBy) -> Uuid {
    match by {
        UpdatedBy::System => Uuid::nil(),
        UpdatedBy::User(user) => user,
    }
}

/// Remembered commands.
#[derive(Clone, Debug)]
pub(super) struct Remembered {
    full: VecDeque<Arc<Vec<RememberedCommand>>>,
    open: Vec<RememberedCommand>,
    /// How many at the front of the first page are forgotten already.
    forgotten: usize,
    /// The place of the first command of the first page. Places go on beyond the largest number from 0.
    base: u32,
    index: Box<[HashTable<u32>]>,
    by_caller: HashMap<Uuid, u32>,
    hasher: DefaultHashBuilder,
}

impl Default for Remembered {
    fn default() -> Self {
        Self {
            full: VecDeque::new(),
            open: Vec::new(),
            forgotten: 0,
            base: 0,
            index: std::iter::repeat_with(HashTable::new).take(SHARDS).collect(),
            by_caller: HashMap::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }
}

/// The same commands in the same order.
impl PartialEq for Remembered {
    fn eq(&self, other: &Self) -> bool {
        self.len() == other.len() && self.iter().eq(other.iter())
    }
}

fn hash_of(hasher: &DefaultHashBuilder, command_id: &Uuid) -> u64 {
    hasher.hash_one(command_id.as_u128())
}

const fn shard_of(hash: u64) -> usize {
    (hash >> 32) as usize % SHARDS
}

fn at<'a>(
    full: &'a VecDeque<Arc<Vec<RememberedCommand>>>,
    open: &'a [RememberedCommand],
    offset: u32,
) -> &'a RememberedCommand {
    let (page, slot) = (offset as usize / PAGE_COMMANDS, offset as usize % PAGE_COMMANDS);
    full.get(page).map_or_else(|| &open[slot], |page| &page[slot])
}

impl Remembered {
    pub(super) fn len(&self) -> usize {
        self.full.len() * PAGE_COMMANDS + self.open.len() - self.forgotten
    }

    pub(super) fn is_empty(&self) -> bool {
        self.oldest().is_none()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &RememberedCommand> {
        self.full.iter().flat_map(|page| page.iter()).chain(&self.open).skip(self.forgotten)
    }

    /// How many of them are by this caller.
    pub(super) fn of(&self, caller: &Uuid) -> u32 {
        self.by_caller.get(caller).copied().unwrap_or(0)
    }

    pub(super) fn get(&self, command_id: &Uuid) -> Option<RememberedCommand> {
        let hash = hash_of(&self.hasher, command_id);
        let command = |place: &u32| at(&self.full, &self.open, place.wrapping_sub(self.base));
        let place = self.index[shard_of(hash)].find(hash, |place| command(place).command_id == *command_id)?;
        Some(*command(place))
    }

    pub(super) fn oldest(&self) -> Option<&RememberedCommand> {
        self.full.front().map_or_else(|| self.open.get(self.forgotten), |page| page.get(self.forgotten))
    }

    /// Takes a command in. What was remembered under the same id is no longer found.
    pub(super) fn note(&mut self, command: RememberedCommand) {
        let place = u32::try_from(self.full.len() * PAGE_COMMANDS + self.open.len())
            .expect("fewer than four billion commands are remembered")
            .wrapping_add(self.base);
        let Self { full, open, base, index, hasher, .. } = self;
        let hash = hash_of(hasher, &command.command_id);
        let id_at = |place: &u32| at(full, open, place.wrapping_sub(*base)).command_id;
        match index[shard_of(hash)].entry(
            hash,
            |place| id_at(place) == command.command_id,
            |place| hash_of(hasher, &id_at(place)),
        ) {
            Entry::Occupied(mut known) => *known.get_mut() = place,
            Entry::Vacant(free) => {
                free.insert(place);
            }
        }
        *self.by_caller.entry(command.by).or_default() += 1;
        self.open.push(command);
        if self.open.len() == PAGE_COMMANDS {
            self.full.push_back(Arc::new(std::mem::replace(&mut self.open, Vec::with_capacity(PAGE_COMMANDS))));
        }
        while self.len() > MAX_REMEMBERED_COMMANDS {
            self.forget_oldest();
        }
    }

    /// Forgets what is older than a key is kept, as of the instant of an event of the ledger.
    pub(super) fn forget_before(&mut self, now_ms: i64) {
        while self.oldest().is_some_and(|oldest| oldest.is_over(now_ms)) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some(command) = self.oldest().copied() else { return };
        let Self { index, hasher, base, forgotten, .. } = self;
        let hash = hash_of(hasher, &command.command_id);
        let place = base.wrapping_add(u32::try_from(*forgotten).expect("a page is small"));
        // Another place of the same id is a later answer under the same key.
        if let Ok(known) = index[shard_of(hash)].find_entry(hash, |known| *known == place) {
            known.remove();
        }
        if let Some(left) = self.by_caller.get_mut(&command.by) {
            *left -= 1;
            if *left == 0 {
                self.by_caller.remove(&command.by);
            }
        }
        self.forgotten += 1;
        if self.forgotten == PAGE_COMMANDS {
            self.full.pop_front();
            self.forgotten = 0;
            self.base = self.base.wrapping_add(u32::try_from(PAGE_COMMANDS).expect("a page is small"));
        }
    }

    /// The pages, oldest command first, and how many of the first are forgotten. Only the last one is copied.
    pub(super) fn pages(&self) -> (Vec<Arc<Vec<RememberedCommand>>>, usize) {
        let open = (!self.open.is_empty()).then(|| Arc::new(self.open.clone()));
        (self.full.iter().cloned().chain(open).collect(), self.forgotten)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(n: usize) -> RememberedCommand {
        let at_ms = n as i64;
        let command_id = Uuid::from_u128(n as u128 * 7);
        RememberedCommand { command_id, fingerprint: 1, sequence: n as u64, at_ms, by: Uuid::from_u128(n as u128 % 2) }
    }

    #[test]
    fn what_is_too_old_is_forgotten_across_pages_and_nothing_else() {
        // Places begin shortly before the largest number and go on from 0.
        let mut remembered = Remembered { base: u32::MAX - 10, ..Remembered::default() };
        let all = 3 * PAGE_COMMANDS + 5;
        (0..all).for_each(|n| remembered.note(command(n)));
        let kept_ms = KEYS_KEPT.as_millis() as i64;
        let (pages, _) = remembered.pages();
        for oldest in [0, 1, PAGE_COMMANDS - 1, PAGE_COMMANDS, 2 * PAGE_COMMANDS + 7, all - 1] {
            // Exactly as old as it is kept: still there.
            remembered.forget_before(oldest as i64 + kept_ms);
            assert_eq!(remembered.len(), all - oldest);
            assert_eq!(remembered.oldest(), Some(&command(oldest)));
            assert!((0..oldest).all(|n| remembered.get(&command(n).command_id).is_none()));
            assert!((oldest..all).all(|n| remembered.get(&command(n).command_id) == Some(command(n))));
            let of_both = [0, 1].map(|n| remembered.of(&Uuid::from_u128(n)) as usize);
            assert_eq!(of_both.iter().sum::<usize>(), all - oldest);
        }
        remembered.forget_before(i64::MAX / 2);
        assert_eq!((remembered.len(), remembered.oldest(), remembered.by_caller.len()), (0, None, 0));
        assert!(remembered.index.iter().all(HashTable::is_empty), "no place is left behind");
        assert_eq!(pages.iter().map(|page| page.len()).sum::<usize>(), all, "a copy stays as it was");
    }

    #[test]
    fn a_later_answer_under_the_same_key_outlives_the_earlier_one() {
        let mut remembered = Remembered::default();
        let kept_ms = KEYS_KEPT.as_millis() as i64;
        let again = RememberedCommand { at_ms: kept_ms + 1, sequence: 9, ..command(0) };
        remembered.note(command(0));
        remembered.note(again);
        assert_eq!(remembered.get(&again.command_id), Some(again));
        remembered.forget_before(kept_ms + 1);
        assert_eq!((remembered.len(), remembered.get(&again.command_id)), (1, Some(again)));
    }

    #[test]
    fn there_are_never_more_than_there_may_be() {
        let mut remembered = Remembered::default();
        (0..MAX_REMEMBERED_COMMANDS + 3).for_each(|n| remembered.note(command(n)));
        assert_eq!(remembered.len(), MAX_REMEMBERED_COMMANDS);
        assert_eq!(remembered.oldest(), Some(&command(3)));
    }
}
