//! Orders: from a message on `lomash.orders.created` to a decided command.
//!
//! Parsing happens here and nowhere later. A message that cannot be an order is a dead letter with the reason; an
//! order that cannot be served is a business fact and decided like any other.

use std::sync::Arc;
use std::time::Duration;

use hashbrown::HashMap;
use lomash_contract::{ContentType, DecodeError, OrderCreated, OrderItem, codec};
use lomash_ledger::receive::{Delivery, Receive, Settle};
use lomash_ledger::{Carried, header, streams};
use lomash_platform::trace::TraceContext;

use crate::commands::Writing;
use crate::committer::{CommandError, Committer};
use crate::inventory::{Command, Order, OrderLine};

/// Orders handled at once. Three times the largest batch: one is being stored, the next one is decided, and the one after that
/// is on its way here or, stored already, acknowledged.
pub const MAX_ORDERS_IN_FLIGHT: usize = 3 * lomash_ledger::MAX_BATCH_MESSAGES;

/// Bytes of the orders handled at once: some 30,000 orders of the median size, or the 400 largest possible.
pub const MAX_ORDER_BYTES_IN_FLIGHT: usize = 64 << 20;

/// Pause before an order comes back that this process could not bring to a decision, for it is stopping.
const RETRY_PAUSE: Duration = Duration::from_millis(250);

/// Panics after which an order whose handling panics is given up.
const MAX_PANICS: u64 = 3;

/// How often an order that waits for its decision says so: an order is innocent of a ledger that is slow or away. A third of
/// the consumer's `ack_wait`; most are decided long before the first time.
const IN_PROGRESS_EVERY: Duration = Duration::from_secs(3);

/// What the product service receives orders by.
#[must_use]
pub const fn receive() -> Receive {
    Receive {
        stream: streams::ORDERS,
        consumer: streams::PRODUCT_ORDERS,
        group: Some(streams::PRODUCT_ORDERS_GROUP),
        max_in_flight: MAX_ORDERS_IN_FLIGHT,
        max_in_flight_bytes: MAX_ORDER_BYTES_IN_FLIGHT,
        max_panics: MAX_PANICS,
        in_progress_every: Some(IN_PROGRESS_EVERY),
    }
}

/// Reads an `order-created` message into an order whose products are distinct.
///
/// # Errors
/// [`DecodeError`] when it is not one.
pub fn parse(content_type: Option<&str>, payload: &[u8]) -> Result<Order, DecodeError> {
    let content_type = ContentType::from_header(content_type)?;
    let envelope = codec::decode::<OrderCreated>(content_type, payload)?;
    let OrderCreated { order_id, items, .. } = envelope.payload;
    Ok(Order { order_id, lines: merge(items.as_slice()) })
}

/// Lines for the same product become one, where the product first appears.
fn merge(items: &[OrderItem]) -> Vec<OrderLine> {
    let mut lines: Vec<OrderLine> = Vec::with_capacity(items.len());
    if let [item] = items {
        lines.push(OrderLine { product_id: item.product_id, quantity: item.quantity.get() });
        return lines;
    }
    let mut places = HashMap::with_capacity(items.len());
    for item in items {
        let place = *places.entry(item.product_id).or_insert_with(|| {
            lines.push(OrderLine { product_id: item.product_id, quantity: 0 });
            lines.len() - 1
        });
        // 1,000 lines of at most 1,000,000 fit: MAX_STOCK is their product.
        lines[place].quantity += item.quantity.get();
    }
    lines
}

/// Handles one delivery: parse, have it decided, say how to settle it.
pub async fn handle(committer: Committer, writing: Writing, delivery: Delivery) -> Settle {
    writing.note_order();
    let order = match parse(delivery.header(header::CONTENT_TYPE), &delivery.payload) {
        Ok(order) => order,
        Err(problem) => return Settle::Dead(problem.to_string()),
    };
    // The order that a test marks ends every process that handles it.
    lomash_ledger::crash_point!(
        "order-handling",
        std::env::var("FAILPOINTS_ORDER").is_ok_and(|marked| marked == order.order_id.to_string())
    );
    let trace = TraceContext::parse(delivery.header(header::TRACEPARENT), delivery.header(header::TRACESTATE));
    let carried = trace.map(|trace| Arc::new(Carried { trace: Some(trace), ..Carried::default() }));
    match committer.submit(Command::Order(order), carried).await {
        Ok(_) => Settle::Done,
        Err(
            problem @ (CommandError::TooLarge { .. }
            | CommandError::Unstorable { .. }
            | CommandError::IdentityTaken { .. }),
        ) => Settle::Dead(problem.to_string()),
        Err(CommandError::Rejected(rejection)) => Settle::Dead(rejection.to_string()),
        Err(CommandError::Stopping | CommandError::Undecided) => Settle::Retry(RETRY_PAUSE),
    }
}
