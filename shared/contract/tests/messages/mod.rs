//! The golden messages, and decoding by topic: what the contract's tests share.
//!
//! The files of `../golden` are written for people, one message of every event with all its optional fields.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use lomash_contract::codec::{decode, encode};
use lomash_contract::{
    CommandAnswered, ContentType, DecodeError, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LowStock,
    OrderCreated, Payload, ProductRegistered, ProductRevised, ProductUpdated, Topic,
};

/// The golden message of each topic, in the order of [`Topic::ALL`].
pub const GOLDEN: [(Topic, &str); 9] = [
    (Topic::OrdersCreated, include_str!("../golden/order-created.json")),
    (Topic::InventoryUpdated, include_str!("../golden/inventory-updated.json")),
    (Topic::InventoryUpdateFailed, include_str!("../golden/inventory-update-failed.json")),
    (Topic::InventoryCounted, include_str!("../golden/inventory-counted.json")),
    (Topic::ProductsRegistered, include_str!("../golden/product-registered.json")),
    (Topic::ProductsRevised, include_str!("../golden/product-revised.json")),
    (Topic::ProductsUpdated, include_str!("../golden/product-updated.json")),
    (Topic::NotificationsLowStock, include_str!("../golden/low-stock.json")),
    (Topic::InventoryCommandAnswered, include_str!("../golden/command-answered.json")),
];

/// The golden message of one topic.
pub fn golden(topic: Topic) -> &'static str {
    GOLDEN.iter().find(|(of, _)| *of == topic).expect("every topic has a golden message").1
}

/// The golden message of one topic as a JSON value.
pub fn golden_value(topic: Topic) -> serde_json::Value {
    serde_json::from_str(golden(topic)).expect("golden messages are JSON")
}

/// The same JSON text without the white space between its tokens: what a program writes, fields in the same order.
pub fn compact(json: &str) -> String {
    let mut compact = String::with_capacity(json.len());
    let (mut quoted, mut escaped) = (false, false);
    for c in json.chars() {
        if quoted || !c.is_ascii_whitespace() {
            compact.push(c);
        }
        quoted ^= c == '"' && !escaped;
        escaped = c == '\\' && !escaped;
    }
    compact
}

/// Decodes a message as what `topic` carries, and writes what was understood as JSON.
pub fn decode_as(topic: Topic, content_type: ContentType, bytes: &[u8]) -> Result<String, DecodeError> {
    fn through<P: Payload>(content_type: ContentType, bytes: &[u8]) -> Result<String, DecodeError> {
        let envelope = decode::<P>(content_type, bytes)?;
        Ok(String::from_utf8(encode(ContentType::Json, &envelope)).expect("JSON is UTF-8"))
    }
    let through = match topic {
        Topic::OrdersCreated => through::<OrderCreated>,
        Topic::InventoryUpdated => through::<InventoryUpdated>,
        Topic::InventoryUpdateFailed => through::<InventoryUpdateFailed>,
        Topic::InventoryCounted => through::<InventoryCounted>,
        Topic::ProductsRegistered => through::<ProductRegistered>,
        Topic::ProductsRevised => through::<ProductRevised>,
        Topic::ProductsUpdated => through::<ProductUpdated>,
        Topic::NotificationsLowStock => through::<LowStock>,
        Topic::InventoryCommandAnswered => through::<CommandAnswered>,
    };
    through(content_type, bytes)
}
