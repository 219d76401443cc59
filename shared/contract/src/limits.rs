//! The numbers of the contract: what a message may hold and the stock thresholds.

use std::time::Duration;

/// Most lines one order may have (before duplicate products are merged). Real orders reach 674.
pub const MAX_ORDER_ITEMS: usize = 1_000;

/// Largest quantity of one order line.
pub const MAX_LINE_QUANTITY: u32 = 1_000_000;

/// Largest stock one product may have; an order's merged line can ask for at most as much.
pub const MAX_STOCK: u32 = MAX_LINE_QUANTITY * MAX_ORDER_ITEMS as u32;

/// Stock at or below which a sale or an admin's change raises a low-stock alert, unless the product has its own.
pub const LOW_STOCK_THRESHOLD: u32 = 3;

/// Stock at or below which a product is not available.
pub const OUT_OF_STOCK_THRESHOLD: u32 = 0;

/// Longest stock-keeping unit, in characters.
pub const MAX_SKU_CHARS: usize = 64;

/// Longest product name or category, in characters.
pub const MAX_NAME_CHARS: usize = 200;

/// Most bytes of one character in the JSON that we write. None that JSON writes as `\\u0000` is in a text of an event: control
/// characters are refused.
const MAX_CHAR_BYTES: usize = 4;

/// Most bytes of one failing item of a refusal in JSON: an id, a sku, two numbers and their names.
const MAX_FAILED_ITEM_BYTES: usize =
    r#"{"productId":"","sku":"","requested":,"available":},"#.len() + 36 + MAX_CHAR_BYTES * MAX_SKU_CHARS + 2 * 10;

/// Most bytes of an envelope without its payload's lists and texts.
const MAX_ENVELOPE_BYTES: usize = 1_024;

/// Most bytes of an event in JSON: the refusal of the longest order, every line of which fails.
pub const MAX_EVENT_BYTES: usize = MAX_ENVELOPE_BYTES + MAX_ORDER_ITEMS * MAX_FAILED_ITEM_BYTES;

const _: () = assert!(MAX_ENVELOPE_BYTES + MAX_CHAR_BYTES * (MAX_SKU_CHARS + 2 * MAX_NAME_CHARS) <= MAX_EVENT_BYTES);

/// How long the answer to a command under a key is kept: the 24 hours that are promised, and one more for clocks that differ.
pub const KEYS_KEPT: Duration = Duration::from_secs(25 * 3_600);
