//! The events of the contract, one type each, with the fields and names that other services read.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::envelope::{EventType, Payload};
use crate::id::{CustomerId, EventId, LineQuantity, OrderId, ProductId, Sku};
use crate::limits::{MAX_NAME_CHARS, MAX_ORDER_ITEMS, MAX_STOCK};
use crate::subject::{KeyedSubject, Topic};
use crate::timestamp::Timestamp;

/// A customer ordered: the input of the whole system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderCreated {
    /// The order, decided once however often it is published.
    pub order_id: OrderId,
    /// Who ordered, when it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub customer_id: Option<CustomerId>,
    /// What was ordered.
    pub items: OrderItems,
}

/// One line of an order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrderItem {
    /// What is wanted.
    pub product_id: ProductId,
    /// The unit as the shop knew it; carried, never used to find the product.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sku: Option<Sku>,
    /// How many.
    pub quantity: LineQuantity,
}

/// The lines of an order: 1 to 1,000, enforced while reading so that a longer list is never held in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrderItems(Vec<OrderItem>);

impl OrderItems {
    /// The lines, if there are 1 to 1,000 of them.
    #[must_use]
    pub fn new(items: Vec<OrderItem>) -> Option<Self> {
        (1..=MAX_ORDER_ITEMS).contains(&items.len()).then_some(Self(items))
    }

    /// The lines in the order's own sequence.
    #[must_use]
    pub fn as_slice(&self) -> &[OrderItem] {
        &self.0
    }
}

impl Serialize for OrderItems {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for OrderItems {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemsVisitor;
        impl<'de> Visitor<'de> for ItemsVisitor {
            type Value = OrderItems;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of 1 to {MAX_ORDER_ITEMS} items")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<OrderItems, A::Error> {
                let mut items = Vec::with_capacity(seq.size_hint().unwrap_or(0).min(MAX_ORDER_ITEMS));
                while let Some(item) = seq.next_element()? {
                    if items.len() == MAX_ORDER_ITEMS {
                        return Err(de::Error::invalid_length(items.len() + 1, &self));
                    }
                    items.push(item);
                }
                OrderItems::new(items).ok_or_else(|| de::Error::invalid_length(0, &self))
            }
        }
        deserializer.deserialize_seq(ItemsVisitor)
    }
}

/// Why stock changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Trigger {
    /// An order was allocated.
    OrderConfirmed,
    /// An admin set or adjusted the stock, or registered the product with some.
    AdminUpdate,
    /// Reconciliation against the warehouse.
    ScheduledSync,
}

impl Trigger {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OrderConfirmed => "ORDER_CONFIRMED",
            Self::AdminUpdate => "ADMIN_UPDATE",
            Self::ScheduledSync => "SCHEDULED_SYNC",
        }
    }
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

macro_rules! actor {
    ($(#[$doc:meta])* $name:ident, $variant:ident, $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name {
            #[doc = concat!("The literal `\"", $word, "\"`.")]
            $variant,
            /// A person, by the id in their token.
            User(Uuid),
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    Self::$variant => f.pad($word),
                    Self::User(id) => id.hyphenated().fmt(f),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct ActorVisitor;
                impl Visitor<'_> for ActorVisitor {
                    type Value = $name;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str(concat!("a UUID or \"", $word, "\""))
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        if text == $word {
                            return Ok($name::$variant);
                        }
                        Uuid::parse_str(text)
                            .map($name::User)
                            .map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
                    }
                }
                deserializer.deserialize_str(ActorVisitor)
            }
        }
    };
}

actor!(
    /// Who changed the stock.
    UpdatedBy,
    System,
    "system"
);
actor!(
    /// Who counted.
    CountedBy,
    Warehouse,
    "warehouse"
);

/// A product's stock changed. Carries both quantities: the events of a product form a chain that anyone can audit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InventoryUpdated {
    /// Whose stock.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: Sku,
    /// Stock before; equals `newQuantity` of the product's previous event, 0 before the first.
    pub previous_quantity: u32,
    /// Stock after; never negative.
    pub new_quantity: u32,
    /// Why.
    pub trigger: Trigger,
    /// The order, when the trigger is one.
    pub order_id: Option<OrderId>,
    /// Who.
    pub updated_by: UpdatedBy,
}

/// Why an order was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum FailureReason {
    /// Less stock than asked for.
    InsufficientStock,
    /// No such product.
    UnknownProduct,
    /// The product is not for sale.
    ProductInactive,
}

impl FailureReason {
    /// The name on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InsufficientStock => "INSUFFICIENT_STOCK",
            Self::UnknownProduct => "UNKNOWN_PRODUCT",
            Self::ProductInactive => "PRODUCT_INACTIVE",
        }
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// An order was refused as a whole; a fact, not an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InventoryUpdateFailed {
    /// The order.
    pub order_id: OrderId,
    /// The gravest reason among its items.
    pub reason: FailureReason,
    /// The lines that failed for that reason.
    pub items: Vec<FailedItem>,
}

/// A line that could not be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailedItem {
    /// The product asked for.
    pub product_id: ProductId,
    /// Its unit, null when the product is unknown.
    pub sku: Option<Sku>,
    /// How many the order wants in all.
    pub requested: u32,
    /// How many there were.
    pub available: u32,
}

/// A count of the warehouse; changes no stock by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InventoryCounted {
    /// The product counted.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: Sku,
    /// How many were there.
    pub quantity: u32,
    /// When they were counted.
    pub counted_at: Timestamp,
    /// Who counted.
    pub counted_by: CountedBy,
}

/// All details of a product, with values: what rebuilding needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductDetails {
    /// The product.
    pub product_id: ProductId,
    /// Its unit; unique in the catalogue.
    pub sku: Sku,
    /// Its name; see [`is_name`].
    #[serde(deserialize_with = "name")]
    pub name: Box<str>,
    /// Its category, if it has one; see [`is_name`].
    #[serde(default, deserialize_with = "optional_name")]
    pub category: Option<Box<str>>,
    /// Its own low-stock threshold, if it has one; at most [`MAX_STOCK`].
    #[serde(default, deserialize_with = "optional_stock")]
    pub low_stock_threshold: Option<u32>,
    /// Whether it is for sale.
    pub active: bool,
}

/// Whether a text can be the name of a product or category: 1 to 200 characters, something to see, no control
/// characters. Checked where messages are read, too: a NUL that got into the ledger would stop the projection.
#[must_use]
pub fn is_name(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().count() <= MAX_NAME_CHARS && !text.chars().any(char::is_control)
}

fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Box<str>, D::Error> {
    let text = Box::<str>::deserialize(deserializer)?;
    if is_name(&text) { Ok(text) } else { Err(de::Error::invalid_value(de::Unexpected::Str(&text), &NAME)) }
}

fn optional_name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Box<str>>, D::Error> {
    match Option::<Box<str>>::deserialize(deserializer)? {
        Some(text) if !is_name(&text) => Err(de::Error::invalid_value(de::Unexpected::Str(&text), &NAME)),
        text => Ok(text),
    }
}

fn optional_stock<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    match Option::<u32>::deserialize(deserializer)? {
        Some(stock) if stock > MAX_STOCK => {
            Err(de::Error::invalid_value(de::Unexpected::Unsigned(stock.into()), &STOCK))
        }
        stock => Ok(stock),
    }
}

const NAME: &str = "1 to 200 characters, none of them a control character";
const STOCK: &str = "an integer from 0 to 1000000000";
const _: () = assert!(MAX_NAME_CHARS == 200 && MAX_STOCK == 1_000_000_000, "as the two sentences say");

macro_rules! details_payload {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub ProductDetails);
    };
}

details_payload!(
    /// A product joined the catalogue.
    ProductRegistered
);
details_payload!(
    /// A product's details changed: all fields with their new values.
    ProductRevised
);

/// A field that `product-updated` can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ChangedField {
    /// The quantity in stock.
    StockQuantity,
    /// Whether it can be bought: stock above the out-of-stock threshold.
    IsAvailable,
    /// The stock-keeping unit.
    Sku,
    /// The name.
    Name,
    /// The category.
    Category,
    /// The low-stock threshold.
    LowStockThreshold,
    /// Whether it is for sale.
    Active,
}

/// Names the fields of a product that changed, for services that read values elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProductUpdated {
    /// The product.
    pub product_id: ProductId,
    /// Which fields.
    pub changed_fields: Vec<ChangedField>,
    /// When.
    pub updated_at: Timestamp,
}

/// Stock is at or below its threshold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LowStock {
    /// The product.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: Sku,
    /// What is left.
    pub quantity: u32,
    /// The threshold it met.
    pub threshold: u32,
    /// The `inventory-updated` that caused the alert.
    pub caused_by: EventId,
}

/// A command under an `Idempotency-Key` was answered: stored right before the events that it brought about, in their batch,
/// so that the same request under the same key is answered again and not carried out again, also when it brought about
/// none. Changes nothing for readers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CommandAnswered {
    /// The command, which the caller and the key make.
    #[serde(deserialize_with = "crate::id::deserialize_command_id")]
    pub command_id: Uuid,
    /// Of its request: the same command with another one is another request under a used key.
    pub fingerprint: Fingerprint,
    /// The product that it is about, registered or not.
    pub product_id: ProductId,
    /// Who asked.
    pub requested_by: UpdatedBy,
    /// How many events it brought about: those that follow in its batch.
    pub events: u32,
    /// Why it was refused, in the product service's own words; null when it was not.
    #[serde(default)]
    pub refusal: Option<Box<Map<String, Value>>>,
}

/// A fingerprint of a request: 16 hexadecimal digits on the wire, for a number of 64 bits is not safe in every JSON reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !digits {
            return Err(InvalidFingerprint);
        }
        u64::from_str_radix(text, 16).map(Self).map_err(|_| InvalidFingerprint)
    }
}

/// Why a text is not a [`Fingerprint`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint has 16 hexadecimal digits")]
pub struct InvalidFingerprint;

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FingerprintVisitor;
        impl Visitor<'_> for FingerprintVisitor {
            type Value = Fingerprint;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("16 hexadecimal digits")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Fingerprint, E> {
                text.parse().map_err(|_| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(FingerprintVisitor)
    }
}

macro_rules! payload {
    ($($name:ident => $topic:ident),* $(,)?) => {
        $(impl Payload for $name {
            const EVENT_TYPE: EventType = Topic::$topic.event_type();
            const TOPIC: Topic = Topic::$topic;
        })*
    };
}

payload! {
    OrderCreated => OrdersCreated,
    InventoryUpdated => InventoryUpdated,
    InventoryUpdateFailed => InventoryUpdateFailed,
    InventoryCounted => InventoryCounted,
    ProductRegistered => ProductsRegistered,
    ProductRevised => ProductsRevised,
    ProductUpdated => ProductsUpdated,
    LowStock => NotificationsLowStock,
    CommandAnswered => InventoryCommandAnswered,
}

/// An event of the `INVENTORY` stream: everything that the ledger holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum LedgerEvent {
    /// Stock changed.
    InventoryUpdated(InventoryUpdated),
    /// An order was refused.
    InventoryUpdateFailed(InventoryUpdateFailed),
    /// A count was recorded.
    InventoryCounted(InventoryCounted),
    /// A product joined.
    ProductRegistered(ProductRegistered),
    /// A product changed.
    ProductRevised(ProductRevised),
    /// Names of changed fields.
    ProductUpdated(ProductUpdated),
    /// A command under a key was answered.
    CommandAnswered(CommandAnswered),
}

impl LedgerEvent {
    /// The exact topic.
    #[must_use]
    pub const fn topic(&self) -> Topic {
        match self {
            Self::InventoryUpdated(_) => Topic::InventoryUpdated,
            Self::InventoryUpdateFailed(_) => Topic::InventoryUpdateFailed,
            Self::InventoryCounted(_) => Topic::InventoryCounted,
            Self::ProductRegistered(_) => Topic::ProductsRegistered,
            Self::ProductRevised(_) => Topic::ProductsRevised,
            Self::ProductUpdated(_) => Topic::ProductsUpdated,
            Self::CommandAnswered(_) => Topic::InventoryCommandAnswered,
        }
    }

    /// The key token of its stored subject: the order for a refusal, the product for all else.
    #[must_use]
    pub const fn key(&self) -> Uuid {
        match self {
            Self::InventoryUpdateFailed(failed) => failed.order_id.0,
            Self::InventoryUpdated(InventoryUpdated { product_id, .. })
            | Self::InventoryCounted(InventoryCounted { product_id, .. })
            | Self::ProductRegistered(ProductRegistered(ProductDetails { product_id, .. }))
            | Self::ProductRevised(ProductRevised(ProductDetails { product_id, .. }))
            | Self::ProductUpdated(ProductUpdated { product_id, .. })
            | Self::CommandAnswered(CommandAnswered { product_id, .. }) => product_id.0,
        }
    }

    /// The subject it is stored under: topic and key.
    #[must_use]
    pub const fn subject(&self) -> KeyedSubject {
        KeyedSubject { topic: self.topic(), key: self.key() }
    }
}
