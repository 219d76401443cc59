//! The contract with other services: ids, envelope, events, subjects and codecs.
//!
//! Everything here is pure: no I/O, no clock, no randomness. The shapes are fixed (`docs/asyncapi.yaml` describes
//! them for other teams, `tests/golden` holds one message of each); a change that is not backwards compatible
//! raises [`Version::major`].

pub mod admission;
pub mod codec;
pub mod envelope;
pub mod event;
pub mod id;
pub mod limits;
pub mod objects;
pub mod subject;
pub mod text;
pub mod timestamp;

pub use admission::{Foreign, chains, parse_stored};
pub use codec::{ContentType, DecodeError};
pub use envelope::{Envelope, EventType, Payload, Version};
pub use event::{
    ChangedField, CommandAnswered, CountedBy, FailedItem, FailureReason, Fingerprint, InventoryCounted,
    InventoryUpdateFailed, InventoryUpdated, LedgerEvent, LowStock, OrderCreated, OrderItem, OrderItems,
    ProductDetails, ProductRegistered, ProductRevised, ProductUpdated, Trigger, UpdatedBy,
};
pub use id::{Cause, CustomerId, EventId, LineQuantity, OrderId, ProductId, Sku};
pub use subject::{KeyedSubject, Topic};
pub use timestamp::Timestamp;
