//! Identifiers as types of their own, so that a product's id cannot be passed where an order's belongs.
//!
//! On the wire an id is a string in JSON and either a string or 16 bytes in MessagePack; both are read in both.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::{Uuid, uuid};

use crate::limits::{MAX_LINE_QUANTITY, MAX_SKU_CHARS};

struct UuidVisitor(&'static str);

impl Visitor<'_> for UuidVisitor {
    type Value = Uuid;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as a UUID", self.0)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Uuid, E> {
        Uuid::parse_str(text).map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Uuid, E> {
        Uuid::from_slice(bytes).map_err(|_| E::invalid_value(de::Unexpected::Bytes(bytes), &self))
    }
}

/// Reads the id of a command, which is of no use outside of its event and so has no type of its own, in both forms of an id.
pub(crate) fn deserialize_command_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
    deserializer.deserialize_any(UuidVisitor("a command id"))
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub Uuid);

        impl $name {
            /// The id as its 16 bytes in network order.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;

            fn from_str(text: &str) -> Result<Self, uuid::Error> {
                Uuid::parse_str(text).map(Self)
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(UuidVisitor($what)).map(Self)
            }
        }
    };
}

uuid_id!(
    /// A product: the aggregate of the ledger.
    ProductId,
    "a product id"
);
uuid_id!(
    /// An order, decided exactly once whatever events carry it.
    OrderId,
    "an order id"
);
uuid_id!(
    /// The customer of an order; carried, never interpreted.
    CustomerId,
    "a customer id"
);
uuid_id!(
    /// An event; `Nats-Msg-Id` of its message, by which JetStream de-duplicates.
    EventId,
    "an event id"
);

impl EventId {
    /// The id of the event that `cause` brings about in `subject`, in the role `role`.
    ///
    /// A UUIDv5, so that a retry of the same cause repeats the same ids. Two causes never share an id, not even when their
    /// own ids are the same or one was chosen to meet the other: of an order 33 bytes are hashed (its id, role, subject), of
    /// every other cause 58, which begin with [`EVENTS`] and name the kind.
    #[must_use]
    pub fn derive(cause: &Cause, role: EventRole, subject: &Uuid) -> Self {
        let (kind, id, sequence) = match cause {
            Cause::Order(order) => return Self::derive_by_order(&order.0, role, subject),
            Cause::Command(command) => (1, command, 0),
            Cause::KeyedCommand { command_id, sequence } => (2, command_id, *sequence),
            Cause::Correction(correction) => (3, correction, 0),
            Cause::Event(event) => (4, &event.0, 0),
        };
        let mut name = [0_u8; 42];
        name[0] = kind;
        name[1..17].copy_from_slice(id.as_bytes());
        name[17..25].copy_from_slice(&sequence.to_be_bytes());
        name[25] = role as u8;
        name[26..].copy_from_slice(subject.as_bytes());
        Self(Uuid::new_v5(&EVENTS, &name))
    }

    /// How the ids of an order's events are derived, and how those of every other cause were before they had a space of
    /// their own: for finding those again in a ledger of then.
    #[must_use]
    pub fn derive_by_order(cause: &Uuid, role: EventRole, subject: &Uuid) -> Self {
        let mut name = [0_u8; 17];
        name[0] = role as u8;
        name[1..].copy_from_slice(subject.as_bytes());
        Self(Uuid::new_v5(cause, &name))
    }
}

/// The namespace of the events of all causes but orders: the UUIDv5 of `lomash-events` among object ids. Never changes.
pub const EVENTS: Uuid = uuid!("96b8fdf8-291f-5451-b84d-c7013fd4d8af");

/// What brings an event about. Ids of different kinds come from different places, and some of them from outside: so each kind
/// has a space of its own, and a further kind takes a further number in [`EventId::derive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// An order, by the id that its publisher chose.
    Order(OrderId),
    /// A command whose id is used once.
    Command(Uuid),
    /// A command under a key, and the sequence of the ledger that it was decided on: a key that was forgotten may be used
    /// again, and must not repeat the ids of then.
    KeyedCommand {
        /// The command.
        command_id: Uuid,
        /// The last sequence before its events.
        sequence: u64,
    },
    /// The correction of a product by a count.
    Correction(Uuid),
    /// An event that others follow from, such as an alert.
    Event(EventId),
}

/// What an event is to its cause: keeps the ids apart of several events of one cause about one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EventRole {
    /// The stock changed.
    Stock = 1,
    /// The order was refused.
    Refusal = 2,
    /// Names of changed fields.
    ChangedFields = 3,
    /// The product's details.
    Details = 4,
    /// A count was recorded.
    Count = 5,
    /// A low-stock alert.
    Alert = 6,
    /// A command was answered.
    Answer = 7,
}

/// A stock-keeping unit: 1 to 64 visible characters, no white space at either end, as the warehouse prints it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sku(Box<str>);

/// Why a text is not a [`Sku`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a sku has 1 to {MAX_SKU_CHARS} characters, none of them a control character, and no white space at its ends")]
pub struct InvalidSku;

impl Sku {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Sku {
    type Err = InvalidSku;

    fn from_str(text: &str) -> Result<Self, InvalidSku> {
        let fits = !text.is_empty()
            && text.chars().count() <= MAX_SKU_CHARS
            && text.trim() == text
            && !text.chars().any(char::is_control);
        if fits { Ok(Self(text.into())) } else { Err(InvalidSku) }
    }
}

impl fmt::Display for Sku {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Sku {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sku({})", self.0)
    }
}

impl Serialize for Sku {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Sku {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SkuVisitor;
        impl Visitor<'_> for SkuVisitor {
            type Value = Sku;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a sku of 1 to {MAX_SKU_CHARS} characters")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Sku, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(SkuVisitor)
    }
}

/// The quantity of an order line: 1 to 1,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineQuantity(NonZeroU32);

impl LineQuantity {
    /// A quantity, if it is in range.
    #[must_use]
    pub fn new(quantity: u32) -> Option<Self> {
        NonZeroU32::new(quantity).filter(|quantity| quantity.get() <= MAX_LINE_QUANTITY).map(Self)
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl Serialize for LineQuantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.get())
    }
}

impl<'de> Deserialize<'de> for LineQuantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct QuantityVisitor;
        impl Visitor<'_> for QuantityVisitor {
            type Value = LineQuantity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "an integer from 1 to {MAX_LINE_QUANTITY}")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<LineQuantity, E> {
                u32::try_from(value)
                    .ok()
                    .and_then(LineQuantity::new)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(value), &self))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<LineQuantity, E> {
                match u64::try_from(value) {
                    Ok(value) => self.visit_u64(value),
                    Err(_) => Err(E::invalid_value(de::Unexpected::Signed(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(QuantityVisitor)
    }
}
