//! The envelope that every message of the contract travels in.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, DeserializeOwned, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::id::EventId;
use crate::subject::Topic;
use crate::timestamp::Timestamp;

/// What every message carries around its payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", expecting = "an envelope with eventId, eventType, timestamp, version and payload")]
pub struct Envelope<P> {
    /// Identity of the event; also `Nats-Msg-Id`.
    pub event_id: EventId,
    /// Which event this is; must be the payload's.
    pub event_type: EventType,
    /// The producer's clock when the event was made.
    pub timestamp: Timestamp,
    /// Version of the contract.
    pub version: Version,
    /// The event itself.
    pub payload: P,
}

impl<P: Payload> Envelope<P> {
    /// An envelope of the current version around `payload`.
    pub fn new(event_id: EventId, timestamp: Timestamp, payload: P) -> Self {
        Self { event_id, event_type: P::EVENT_TYPE, timestamp, version: Version::CURRENT, payload }
    }
}

impl<P> Envelope<P> {
    /// The same envelope around another payload.
    pub fn map<Q>(self, f: impl FnOnce(P) -> Q) -> Envelope<Q> {
        Envelope {
            event_id: self.event_id,
            event_type: self.event_type,
            timestamp: self.timestamp,
            version: self.version,
            payload: f(self.payload),
        }
    }
}

/// A payload of the contract: knows its event type and its topic.
pub trait Payload: Serialize + DeserializeOwned {
    /// The `eventType` of its envelopes.
    const EVENT_TYPE: EventType;
    /// The exact topic it is published on.
    const TOPIC: Topic;
}

/// The event types of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventType {
    /// A customer ordered.
    OrderCreated,
    /// A product's stock changed.
    InventoryUpdated,
    /// An order was refused.
    InventoryUpdateFailed,
    /// A count of the warehouse was recorded.
    InventoryCounted,
    /// A product joined the catalogue.
    ProductRegistered,
    /// A product's details changed.
    ProductRevised,
    /// Names of the fields that changed.
    ProductUpdated,
    /// Stock is low.
    LowStock,
    /// A command under a key was answered.
    CommandAnswered,
}

impl EventType {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OrderCreated => "order-created",
            Self::InventoryUpdated => "inventory-updated",
            Self::InventoryUpdateFailed => "inventory-update-failed",
            Self::InventoryCounted => "inventory-counted",
            Self::ProductRegistered => "product-registered",
            Self::ProductRevised => "product-revised",
            Self::ProductUpdated => "product-updated",
            Self::LowStock => "low-stock",
            Self::CommandAnswered => "command-answered",
        }
    }
}

impl fmt::Display for EventType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// The version of the contract a message was written to, as `major.minor`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Readers refuse a major that they do not know.
    pub major: u16,
    /// Readers ignore what a newer minor added.
    pub minor: u16,
}

impl Version {
    /// What this crate writes, and the major it reads.
    pub const CURRENT: Self = Self { major: 1, minor: 0 };
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (major, minor) = text.split_once('.').ok_or(())?;
        let number = |digits: &str| {
            let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            if plain { digits.parse().map_err(|_| ()) } else { Err(()) }
        };
        Ok(Self { major: number(major)?, minor: number(minor)? })
    }
}

impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct VersionVisitor;
        impl Visitor<'_> for VersionVisitor {
            type Value = Version;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a version as major.minor, for example \"1.0\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Version, E> {
                text.parse().map_err(|()| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(VersionVisitor)
    }
}
