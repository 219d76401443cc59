//! Topics and subjects, built and parsed in this one place.
//!
//! What other services see is the exact topic. What a stream stores has one more token, the key of the aggregate:
//! `lomash.inventory.updated.{productId}`. The stream republishes to the topic by dropping the key.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::envelope::EventType;

/// A topic of the contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Topic {
    /// Orders come in.
    OrdersCreated,
    /// Stock changed.
    InventoryUpdated,
    /// An order was refused.
    InventoryUpdateFailed,
    /// A count was recorded.
    InventoryCounted,
    /// A product joined.
    ProductsRegistered,
    /// A product's details changed.
    ProductsRevised,
    /// Names of changed fields.
    ProductsUpdated,
    /// Stock is low.
    NotificationsLowStock,
    /// A command under a key was answered: for the product service itself, readers pass over it.
    InventoryCommandAnswered,
}

impl Topic {
    /// Every topic.
    pub const ALL: [Self; 9] = [
        Self::OrdersCreated,
        Self::InventoryUpdated,
        Self::InventoryUpdateFailed,
        Self::InventoryCounted,
        Self::ProductsRegistered,
        Self::ProductsRevised,
        Self::ProductsUpdated,
        Self::NotificationsLowStock,
        Self::InventoryCommandAnswered,
    ];

    /// The topic as services publish and subscribe it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OrdersCreated => "lomash.orders.created",
            Self::InventoryUpdated => "lomash.inventory.updated",
            Self::InventoryUpdateFailed => "lomash.inventory.update-failed",
            Self::InventoryCounted => "lomash.inventory.counted",
            Self::ProductsRegistered => "lomash.products.registered",
            Self::ProductsRevised => "lomash.products.revised",
            Self::ProductsUpdated => "lomash.products.updated",
            Self::NotificationsLowStock => "lomash.notifications.low-stock",
            Self::InventoryCommandAnswered => "lomash.inventory.command-answered",
        }
    }

    /// The one event type that travels on this topic.
    #[must_use]
    pub const fn event_type(self) -> EventType {
        match self {
            Self::OrdersCreated => EventType::OrderCreated,
            Self::InventoryUpdated => EventType::InventoryUpdated,
            Self::InventoryUpdateFailed => EventType::InventoryUpdateFailed,
            Self::InventoryCounted => EventType::InventoryCounted,
            Self::ProductsRegistered => EventType::ProductRegistered,
            Self::ProductsRevised => EventType::ProductRevised,
            Self::ProductsUpdated => EventType::ProductUpdated,
            Self::NotificationsLowStock => EventType::LowStock,
            Self::InventoryCommandAnswered => EventType::CommandAnswered,
        }
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A subject as the ledger stores it: topic and key token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyedSubject {
    /// The topic.
    pub topic: Topic,
    /// The aggregate: a product, or an order for refusals.
    pub key: Uuid,
}

/// Why a subject is not one that the ledger stores.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a topic of the contract followed by one key in lower-case UUID form")]
pub struct InvalidSubject(pub String);

impl fmt::Display for KeyedSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.topic.as_str(), self.key.hyphenated())
    }
}

impl FromStr for KeyedSubject {
    type Err = InvalidSubject;

    /// Reads exactly what `Display` writes; another spelling of the same UUID is another subject and refused.
    fn from_str(text: &str) -> Result<Self, InvalidSubject> {
        let invalid = || InvalidSubject(text.to_owned());
        let (topic, key) = text.rsplit_once('.').ok_or_else(invalid)?;
        let topic = Topic::ALL.into_iter().find(|known| known.as_str() == topic).ok_or_else(invalid)?;
        let id = Uuid::parse_str(key).map_err(|_| invalid())?;
        let mut canonical = [0_u8; uuid::fmt::Hyphenated::LENGTH];
        if *id.hyphenated().encode_lower(&mut canonical) != *key {
            return Err(invalid());
        }
        Ok(Self { topic, key: id })
    }
}

/// The subject that letters of `consumer` are stored under in `DEAD_LETTERS`.
#[must_use]
pub fn dead_letter(consumer: &str) -> String {
    format!("lomash.dlq.{consumer}")
}
