//! One load for all who miss the same key at the same time.
//!
//! The first one leads and loads; the others wait for what it brings. They take it only if it is as new as they would
//! have had to load it, see [`super::Cache::read_through`]. A leader that fails or is dropped lets them load themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use super::Key;

/// Keys that may be loaded for several at once; further ones are loaded by each for itself.
const MAX_FLIGHTS: usize = 1_024;

/// What a leader brought, encoded, or nothing yet.
pub(super) type Landing = watch::Receiver<Option<Bytes>>;

#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<Key, Landing>>>);

/// What a reader that missed does.
pub(super) enum Role {
    /// Load, and tell the others.
    Lead(Flight),
    /// Wait for the one that loads.
    Follow(Landing),
    /// Load for itself.
    Alone,
}

/// A load under way. Dropping it ends it.
pub(super) struct Flight {
    key: Key,
    landing: watch::Sender<Option<Bytes>>,
    flights: Flights,
}

impl Flights {
    pub(super) fn join(&self, key: &Key) -> Role {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(landing) = flights.get(key) {
            return Role::Follow(landing.clone());
        }
        if flights.len() >= MAX_FLIGHTS {
            return Role::Alone;
        }
        let (landing, follow) = watch::channel(None);
        flights.insert(key.clone(), follow);
        Role::Lead(Flight { key: key.clone(), landing, flights: self.clone() })
    }
}

impl Flight {
    /// Gives the others what was loaded; it stays to be had until the flight is dropped.
    pub(super) fn land(&self, entry: Bytes) {
        self.landing.send_replace(Some(entry));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.flights.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}
