//! Places that are bounded in all and for each one who takes them, so that nobody takes them all.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// So many places in all, so many of one. Clones share them. Whoever has none is not remembered.
#[derive(Debug)]
pub struct Places<K: Eq + Hash> {
    taken: Arc<Mutex<Taken<K>>>,
    most: usize,
    most_of_one: usize,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    of: HashMap<K, usize>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// All are taken.
    #[error("all {0} places are taken")]
    All(usize),
    /// The one who asks has all that it may have.
    #[error("one may have {0} places at once, and this one has them")]
    One(usize),
}

impl<K: Eq + Hash + Clone> Places<K> {
    /// None is taken.
    #[must_use]
    pub fn new(most: usize, most_of_one: usize) -> Self {
        Self { taken: Arc::new(Mutex::new(Taken { all: 0, of: HashMap::new() })), most, most_of_one }
    }

    /// A place for `who`, until it is dropped.
    ///
    /// # Errors
    /// [`Full`].
    pub fn take(&self, who: K) -> Result<Place<K>, Full> {
        let mut taken = lock(&self.taken);
        // First what the one who asks can do something about.
        if taken.of.get(&who).is_some_and(|of_one| *of_one >= self.most_of_one) {
            return Err(Full::One(self.most_of_one));
        }
        if taken.all >= self.most {
            return Err(Full::All(self.most));
        }
        taken.all += 1;
        *taken.of.entry(who.clone()).or_insert(0) += 1;
        Ok(Place { taken: self.taken.clone(), who })
    }

    /// How many are taken.
    #[must_use]
    pub fn taken(&self) -> usize {
        lock(&self.taken).all
    }
}

impl<K: Eq + Hash> Clone for Places<K> {
    fn clone(&self) -> Self {
        Self { taken: self.taken.clone(), most: self.most, most_of_one: self.most_of_one }
    }
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Place<K: Eq + Hash + Clone> {
    taken: Arc<Mutex<Taken<K>>>,
    who: K,
}

impl<K: Eq + Hash + Clone> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = lock(&self.taken);
        taken.all -= 1;
        if let Entry::Occupied(mut of_one) = taken.of.entry(self.who.clone()) {
            *of_one.get_mut() -= 1;
            if *of_one.get() == 0 {
                of_one.remove();
            }
        }
    }
}

fn lock<K>(taken: &Mutex<Taken<K>>) -> MutexGuard<'_, Taken<K>> {
    taken.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_and_what_is_given_back_is_free() {
        let places = Places::new(3, 2);
        let (first, second) =
            (places.take("greedy").expect("there is room"), places.take("greedy").expect("there is room"));
        assert_eq!(places.take("greedy").expect_err("there is no room"), Full::One(2));
        let third = places.take("modest").expect("there is room");
        assert_eq!(places.take("late").expect_err("there is no room"), Full::All(3));
        drop(first);
        let fourth = places.take("late").expect("there is room");
        assert_eq!(places.take("greedy").expect_err("there is no room"), Full::All(3), "its own room does not help");
        drop((second, third, fourth));
        assert_eq!(places.taken(), 0);
        assert!(lock(&places.taken).of.is_empty(), "nobody is remembered");
    }
}
