//! The rule by which every reader of the ledger tells our events from what is not ours.
//!
//! The stream cannot keep every foreign message out: whoever may ask JetStream a question can name a ledger subject
//! as the reply. So each reader (committer, projector, `verify`, consumers) applies this one rule, skips what breaks
//! it, counts it and raises the alarm. All readers skip the same messages because they call the same functions.

use uuid::Uuid;

use crate::codec::{self, ContentType, DecodeError};
use crate::envelope::Envelope;
use crate::event::{
    CommandAnswered, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LedgerEvent, ProductRegistered,
    ProductRevised, ProductUpdated,
};
use crate::id::EventId;
use crate::limits::MAX_STOCK;
use crate::subject::{InvalidSubject, KeyedSubject, Topic};

/// Why a stored message was not written by us.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Foreign {
    /// Not a subject of the ledger.
    #[error(transparent)]
    Subject(#[from] InvalidSubject),
    /// Not an event.
    #[error(transparent)]
    Undecodable(#[from] DecodeError),
    /// The key token of the subject is not the payload's.
    #[error("the subject's key is {subject}, the payload's is {payload}")]
    Key {
        /// From the subject.
        subject: Uuid,
        /// From the payload.
        payload: Uuid,
    },
    /// `Nats-Msg-Id` is missing or is not the event's id.
    #[error("Nats-Msg-Id is `{}`, eventId is {event_id}", .message_id.as_deref().unwrap_or("missing"))]
    MessageId {
        /// From the header.
        message_id: Option<String>,
        /// From the envelope.
        event_id: EventId,
    },
    /// An event about a product that was never registered.
    #[error("the product was never registered")]
    UnknownProduct,
    /// A second registration of the same product.
    #[error("the product is registered already")]
    RegisteredTwice,
    /// The quantities do not continue the product's chain.
    #[error("the chain is broken: previousQuantity is {found}, the stock was {expected}")]
    BrokenChain {
        /// The stock before.
        expected: u32,
        /// What the event says it was.
        found: u32,
    },
    /// A stock that no product can have, or a change to the same quantity.
    #[error("newQuantity {0} is no change or beyond the largest stock")]
    Quantity(u32),
}

/// Reads a stored message: the half of the rule that needs no state.
///
/// # Errors
/// [`Foreign`] when the message was not written by us.
pub fn parse_stored(subject: &str, message_id: Option<&str>, bytes: &[u8]) -> Result<Envelope<LedgerEvent>, Foreign> {
    let KeyedSubject { topic, key } = subject.parse()?;
    let json = ContentType::Json;
    let envelope = match topic {
        Topic::InventoryUpdated => codec::decode::<InventoryUpdated>(json, bytes)?.map(LedgerEvent::InventoryUpdated),
        Topic::InventoryUpdateFailed => {
            codec::decode::<InventoryUpdateFailed>(json, bytes)?.map(LedgerEvent::InventoryUpdateFailed)
        }
        Topic::InventoryCounted => codec::decode::<InventoryCounted>(json, bytes)?.map(LedgerEvent::InventoryCounted),
        Topic::ProductsRegistered => {
            codec::decode::<ProductRegistered>(json, bytes)?.map(LedgerEvent::ProductRegistered)
        }
        Topic::ProductsRevised => codec::decode::<ProductRevised>(json, bytes)?.map(LedgerEvent::ProductRevised),
        Topic::ProductsUpdated => codec::decode::<ProductUpdated>(json, bytes)?.map(LedgerEvent::ProductUpdated),
        Topic::InventoryCommandAnswered => {
            codec::decode::<CommandAnswered>(json, bytes)?.map(LedgerEvent::CommandAnswered)
        }
        Topic::OrdersCreated | Topic::NotificationsLowStock => {
            return Err(InvalidSubject(subject.to_owned()).into());
        }
    };
    if envelope.payload.key() != key {
        return Err(Foreign::Key { subject: key, payload: envelope.payload.key() });
    }
    // JetStream compares message ids as text, so another spelling of the same UUID is another id.
    let mut canonical = [0_u8; uuid::fmt::Hyphenated::LENGTH];
    let event_id: &str = envelope.event_id.0.hyphenated().encode_lower(&mut canonical);
    if message_id != Some(event_id) {
        return Err(Foreign::MessageId { message_id: message_id.map(str::to_owned), event_id: envelope.event_id });
    }
    Ok(envelope)
}

/// Whether `event` continues the history of its product: the half of the rule that needs state.
///
/// `stock` is the product's quantity before the event, `None` while it is not registered.
///
/// # Errors
/// [`Foreign`] when the event cannot have been written by us.
pub fn chains(event: &LedgerEvent, stock: Option<u32>) -> Result<(), Foreign> {
    match (event, stock) {
        // Neither needs a product that is there: an unknown one is refused, too.
        (LedgerEvent::InventoryUpdateFailed(_) | LedgerEvent::CommandAnswered(_), _)
        | (LedgerEvent::ProductRegistered(_), None) => Ok(()),
        (LedgerEvent::ProductRegistered(_), Some(_)) => Err(Foreign::RegisteredTwice),
        (_, None) => Err(Foreign::UnknownProduct),
        (LedgerEvent::InventoryUpdated(updated), Some(stock)) => {
            if updated.previous_quantity != stock {
                Err(Foreign::BrokenChain { expected: stock, found: updated.previous_quantity })
            } else if updated.new_quantity == stock || updated.new_quantity > MAX_STOCK {
                Err(Foreign::Quantity(updated.new_quantity))
            } else {
                Ok(())
            }
        }
        (_, Some(_)) => Ok(()),
    }
}
