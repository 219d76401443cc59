//! What a sender is told about a message that is not one: every sentence names the field and what was expected.
//!
//! The sentences end up in dead letters, where the sender's team reads them; so they are held to the letter here.

#![allow(clippy::unwrap_used)]

mod messages;

use lomash_contract::{ContentType, Topic};
use messages::{decode_as, golden, golden_value};
use serde_json::{Value, json};

/// The error that `topic`'s reader gives for `bytes`.
#[track_caller]
fn refused(topic: Topic, content_type: ContentType, bytes: &[u8]) -> String {
    match decode_as(topic, content_type, bytes) {
        Ok(understood) => panic!("decoded: {understood}"),
        Err(error) => error.to_string(),
    }
}

/// The golden order with the value at `path` replaced (or, with `None`, its field removed).
fn order_with(path: &str, value: Option<Value>) -> Value {
    let mut order = golden_value(Topic::OrdersCreated);
    match value {
        Some(value) => *order.pointer_mut(path).unwrap() = value,
        None => {
            let (parent, field) = path.rsplit_once('/').unwrap();
            order.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(field).unwrap();
        }
    }
    order
}

/// A JSON error without its position, which depends on the layout of the text and is tested on its own.
fn without_position(sentence: &str) -> &str {
    sentence.split_once(" at line ").map_or(sentence, |(before, _)| before)
}

#[test]
fn a_bad_field_is_named_in_both_encodings() {
    let item = json!({ "productId": "2c7e43a4-9d0b-5b52-8f7a-6b1d3f5c0e11", "quantity": 1 });
    let integer = "expected an integer from 1 to 1000000";
    let list = "expected a list of 1 to 1000 items";
    let instant = "expected an RFC 3339 instant such as 2026-01-31T09:30:00.123Z";
    let version = "expected a version as major.minor, for example \"1.0\"";
    let cases: Vec<(&str, Option<Value>, String)> = vec![
        // A field that is not there.
        ("/eventId", None, "message: missing field `eventId`".into()),
        ("/eventType", None, "message: missing field `eventType`".into()),
        ("/timestamp", None, "message: missing field `timestamp`".into()),
        ("/version", None, "message: missing field `version`".into()),
        ("/payload", None, "message: missing field `payload`".into()),
        ("/payload/orderId", None, "payload: missing field `orderId`".into()),
        ("/payload/items", None, "payload: missing field `items`".into()),
        ("/payload/items/1/productId", None, "payload.items[1]: missing field `productId`".into()),
        ("/payload/items/1/quantity", None, "payload.items[1]: missing field `quantity`".into()),
        // Quantities.
        (
            "/payload/items/0/quantity",
            Some(json!(0)),
            format!("payload.items[0].quantity: invalid value: integer `0`, {integer}"),
        ),
        (
            "/payload/items/0/quantity",
            Some(json!(1_000_001)),
            format!("payload.items[0].quantity: invalid value: integer `1000001`, {integer}"),
        ),
        (
            "/payload/items/0/quantity",
            Some(json!(u64::MAX)),
            format!("payload.items[0].quantity: invalid value: integer `18446744073709551615`, {integer}"),
        ),
        (
            "/payload/items/0/quantity",
            Some(json!(-1)),
            format!("payload.items[0].quantity: invalid value: integer `-1`, {integer}"),
        ),
        (
            "/payload/items/0/quantity",
            Some(json!(1.5)),
            format!("payload.items[0].quantity: invalid type: floating point `1.5`, {integer}"),
        ),
        (
            "/payload/items/0/quantity",
            Some(json!("2")),
            format!("payload.items[0].quantity: invalid type: string \"2\", {integer}"),
        ),
        // Lists.
        ("/payload/items", Some(json!([])), format!("payload.items: invalid length 0, {list}")),
        (
            "/payload/items",
            Some(Value::Array(vec![item; 1_001])),
            format!("payload.items: invalid length 1001, {list}"),
        ),
        ("/payload/items", Some(json!("none")), format!("payload.items: invalid type: string \"none\", {list}")),
        // Ids.
        ("/eventId", Some(json!("42")), "eventId: invalid value: string \"42\", expected an event id as a UUID".into()),
        (
            "/payload/orderId",
            Some(json!(42)),
            "payload.orderId: invalid type: integer `42`, expected an order id as a UUID".into(),
        ),
        (
            "/payload/customerId",
            Some(json!("")),
            "payload.customerId: invalid value: string \"\", expected a customer id as a UUID".into(),
        ),
        (
            "/payload/items/1/productId",
            Some(json!("KIT-CAB-600-OAK")),
            "payload.items[1].productId: invalid value: string \"KIT-CAB-600-OAK\", expected a product id as a UUID"
                .into(),
        ),
        (
            "/payload/items/1/sku",
            Some(json!(" padded ")),
            "payload.items[1].sku: invalid value: string \" padded \", expected a sku of 1 to 64 characters".into(),
        ),
        (
            "/payload/items/1/sku",
            Some(json!("x".repeat(65))),
            format!(
                "payload.items[1].sku: invalid value: string \"{}\", expected a sku of 1 to 64 characters",
                "x".repeat(65)
            ),
        ),
        // Instants.
        ("/timestamp", Some(json!("yesterday")), format!("timestamp: invalid value: string \"yesterday\", {instant}")),
        (
            "/timestamp",
            Some(json!("2026-01-31T09:30:00")),
            format!("timestamp: invalid value: string \"2026-01-31T09:30:00\", {instant}"),
        ),
        (
            "/timestamp",
            Some(json!("2026-02-30T09:30:00Z")),
            format!("timestamp: invalid value: string \"2026-02-30T09:30:00Z\", {instant}"),
        ),
        (
            "/timestamp",
            Some(json!("9999-12-31T23:59:59-01:00")),
            format!("timestamp: invalid value: string \"9999-12-31T23:59:59-01:00\", {instant}"),
        ),
        ("/timestamp", Some(json!(1_769_851_800)), format!("timestamp: invalid type: integer `1769851800`, {instant}")),
        // Versions.
        ("/version", Some(json!("x")), format!("version: invalid value: string \"x\", {version}")),
        ("/version", Some(json!("1")), format!("version: invalid value: string \"1\", {version}")),
        ("/version", Some(json!("1.0.0")), format!("version: invalid value: string \"1.0.0\", {version}")),
        ("/version", Some(json!("+1.0")), format!("version: invalid value: string \"+1.0\", {version}")),
    ];
    for (path, value, expected) in cases {
        let order = order_with(path, value);
        let text = serde_json::to_vec_pretty(&order).unwrap();
        let sentence = refused(Topic::OrdersCreated, ContentType::Json, &text);
        let in_json = format!("not a valid order-created as application/json: {expected}");
        assert_eq!(without_position(&sentence), in_json);

        let sentence =
            refused(Topic::OrdersCreated, ContentType::MessagePack, &rmp_serde::to_vec_named(&order).unwrap());
        assert_eq!(sentence, format!("not a valid order-created as application/msgpack: {expected}"));
    }
}

#[test]
fn a_json_error_says_where_it_is() {
    let text = golden(Topic::OrdersCreated).replace("\"quantity\": 1 ", "\"quantity\": 0 ");
    assert_eq!(
        refused(Topic::OrdersCreated, ContentType::Json, text.as_bytes()),
        "not a valid order-created as application/json: payload.items[1].quantity: \
         invalid value: integer `0`, expected an integer from 1 to 1000000 at line 11 column 100"
    );
}

#[test]
fn another_version_or_event_is_said_before_any_field() {
    let cases = [
        (json!({ "version": "2.0" }), "version 2.0 is not supported; this reader understands major version 1"),
        (json!({ "version": "0.9" }), "version 0.9 is not supported; this reader understands major version 1"),
        (
            json!({ "eventType": "inventory-updated" }),
            "eventType is `inventory-updated`, this topic carries `order-created`",
        ),
        (
            json!({ "eventType": "order-cancelled" }),
            "eventType is `order-cancelled`, this topic carries `order-created`",
        ),
        // The new major moved its payload: its missing fields are not the news.
        (
            json!({ "version": "2.1", "payload": { "order": [] } }),
            "version 2.1 is not supported; this reader understands major version 1",
        ),
        (
            json!({ "eventType": "low-stock", "payload": null }),
            "eventType is `low-stock`, this topic carries `order-created`",
        ),
        (
            json!({ "version": "2.0", "eventType": "low-stock" }),
            "version 2.0 is not supported; this reader understands major version 1",
        ),
    ];
    for (changes, expected) in cases {
        let mut order = golden_value(Topic::OrdersCreated);
        for (field, value) in changes.as_object().unwrap() {
            order[field] = value.clone();
        }
        let text = serde_json::to_vec(&order).unwrap();
        assert_eq!(refused(Topic::OrdersCreated, ContentType::Json, &text), expected);
        let packed = rmp_serde::to_vec_named(&order).unwrap();
        assert_eq!(refused(Topic::OrdersCreated, ContentType::MessagePack, &packed), expected);
    }
}

#[test]
fn values_of_other_events_are_named_too() {
    let cases = [
        (
            Topic::InventoryUpdated,
            "/payload/trigger",
            json!("REFUND"),
            "payload.trigger: unknown variant `REFUND`, expected one of `ORDER_CONFIRMED`, `ADMIN_UPDATE`, `SCHEDULED_SYNC`",
        ),
        (
            Topic::InventoryUpdated,
            "/payload/newQuantity",
            json!(-1),
            "payload.newQuantity: invalid value: integer `-1`, expected u32",
        ),
        (
            Topic::InventoryUpdated,
            "/payload/updatedBy",
            json!("root"),
            "payload.updatedBy: invalid value: string \"root\", expected a UUID or \"system\"",
        ),
        (
            Topic::InventoryUpdateFailed,
            "/payload/reason",
            json!("BROKEN"),
            "payload.reason: unknown variant `BROKEN`, expected one of `INSUFFICIENT_STOCK`, `UNKNOWN_PRODUCT`, `PRODUCT_INACTIVE`",
        ),
        (
            Topic::InventoryCounted,
            "/payload/countedBy",
            json!("system"),
            "payload.countedBy: invalid value: string \"system\", expected a UUID or \"warehouse\"",
        ),
        (
            Topic::ProductsRegistered,
            "/payload/active",
            json!("yes"),
            "payload.active: invalid type: string \"yes\", expected a boolean",
        ),
        (
            Topic::ProductsUpdated,
            "/payload/changedFields/1",
            json!("price"),
            "payload.changedFields[1]: unknown variant `price`, expected one of `stockQuantity`, `isAvailable`, `sku`, `name`, `category`, `lowStockThreshold`, `active`",
        ),
        (
            Topic::NotificationsLowStock,
            "/payload/causedBy",
            json!(true),
            "payload.causedBy: invalid type: boolean `true`, expected an event id as a UUID",
        ),
    ];
    for (topic, path, value, expected) in cases {
        let mut message = golden_value(topic);
        *message.pointer_mut(path).unwrap() = value;
        let sentence = refused(topic, ContentType::Json, &serde_json::to_vec(&message).unwrap());
        let expected = format!("not a valid {} as application/json: {expected}", topic.event_type());
        assert_eq!(without_position(&sentence), expected);
    }
}

#[test]
fn a_damaged_json_message_says_how() {
    let whole = golden(Topic::OrdersCreated);
    let repeated = whole.replace("\"version\"", "\"timestamp\": \"2026-01-31T09:30:00Z\",\n  \"version\"");
    let mut latin1 = whole.as_bytes().to_vec();
    latin1[whole.find("KIT").unwrap()] = 0xd6;
    let envelope = "expected an envelope with eventId, eventType, timestamp, version and payload";
    let cases: Vec<(Vec<u8>, String)> = vec![
        (b"".into(), "message: EOF while parsing a value at line 1 column 0".into()),
        (b" \n".into(), "message: EOF while parsing a value at line 2 column 0".into()),
        (b"null".into(), format!("message: invalid type: null, {envelope} at line 1 column 4")),
        (b"[]".into(), format!("message: invalid type: sequence, {envelope} at line 1 column 2")),
        (b"hello".into(), "message: expected value at line 1 column 1".into()),
        (
            whole.as_bytes()[..whole.find("3b7d-").unwrap()].into(),
            "payload.orderId: EOF while parsing a string at line 7 column 25".into(),
        ),
        (format!("{whole}{{}}").into(), "message: trailing characters at line 15 column 1".into()),
        (format!("{whole}\0").into(), "message: trailing characters at line 15 column 1".into()),
        (["\u{feff}", whole].concat().into(), "message: expected value at line 1 column 1".into()),
        (repeated.into(), "message: duplicate field `timestamp` at line 5 column 13".into()),
        (latin1, "payload.items[0].sku: invalid unicode code point at line 10 column 70".into()),
    ];
    for (bytes, expected) in cases {
        let sentence = refused(Topic::OrdersCreated, ContentType::Json, &bytes);
        assert_eq!(sentence, format!("not a valid order-created as application/json: {expected}"));
    }
}

#[test]
fn a_damaged_messagepack_message_says_how() {
    let whole = rmp_serde::to_vec_named(&golden_value(Topic::OrdersCreated)).unwrap();
    let sku = whole.windows(3).position(|window| window == b"KIT").unwrap();
    let mut latin1 = whole.clone();
    latin1[sku] = 0xd6;
    let envelope = "expected an envelope with eventId, eventType, timestamp, version and payload";
    let cases: Vec<(Vec<u8>, String)> = vec![
        (b"".into(), "message: the message ends in the middle".into()),
        (b"\xc0".into(), format!("message: invalid type: unit value, {envelope}")),
        (b"\xc1".into(), "message: wrong msgpack marker Reserved".into()),
        (b"\x90".into(), format!("message: invalid type: sequence, {envelope}")),
        (whole[..sku + 1].into(), "payload.items[0].sku: the message ends in the middle".into()),
        ([&whole[..], b"\x00"].concat(), "message: there are bytes after the end of the message".into()),
        ([&whole[..], b"\x91"].concat(), "message: there are bytes after the end of the message".into()),
        ([&whole[..], &whole[..]].concat(), "message: there are bytes after the end of the message".into()),
        (golden(Topic::OrdersCreated).into(), format!("message: invalid type: integer `123`, {envelope}")),
        // Lengths that promise four thousand million elements.
        (
            b"\x81\xa7payload\xdd\xff\xff\xff\xff".into(),
            "payload: invalid type: sequence, expected struct OrderCreated".into(),
        ),
        (
            b"\x81\xa7payload\x81\xa5items\xdd\xff\xff\xff\xff".into(),
            "payload.items[0]: the message ends in the middle".into(),
        ),
        (
            latin1,
            "payload.items[0].sku: string found to be invalid utf8: invalid utf-8 sequence of 1 bytes from index 0"
                .into(),
        ),
    ];
    for (bytes, expected) in cases {
        let sentence = refused(Topic::OrdersCreated, ContentType::MessagePack, &bytes);
        assert_eq!(sentence, format!("not a valid order-created as application/msgpack: {expected}"));
    }
}

/// A list of the fields in their order is no object, neither of the envelope nor within it, in either encoding.
#[test]
fn an_order_as_a_list_is_no_order() {
    let whole = golden_value(Topic::OrdersCreated);
    let listed =
        |object: &Value, order: &[&str]| Value::Array(order.iter().map(|field| object[*field].clone()).collect());
    let envelope = listed(&whole, &["eventId", "eventType", "timestamp", "version", "payload"]);
    let mut payload = whole.clone();
    payload["payload"] = listed(&whole["payload"], &["orderId", "customerId", "items"]);
    let mut item = whole.clone();
    item["payload"]["items"][0] = listed(&whole["payload"]["items"][0], &["productId", "sku", "quantity"]);
    for (place, order) in [("message", envelope), ("payload", payload), ("payload.items[0]", item)] {
        let json = refused(Topic::OrdersCreated, ContentType::Json, &serde_json::to_vec(&order).unwrap());
        let packed = refused(Topic::OrdersCreated, ContentType::MessagePack, &rmp_serde::to_vec_named(&order).unwrap());
        for sentence in [json, packed] {
            assert!(sentence.contains(&format!(": {place}: invalid type: sequence, expected ")), "{place}: {sentence}");
        }
    }
}

/// Nesting a million levels deep ends in an error of bounded length, not in a stack overflow.
#[test]
fn a_nesting_bomb_is_refused() {
    const DEPTH: usize = 1_000_000;
    let bombs = [
        (ContentType::Json, "[".repeat(DEPTH).into_bytes()),
        (ContentType::Json, "{\"payload\":".repeat(DEPTH).into_bytes()),
        (ContentType::Json, format!("{{\"extra\":{}", "[".repeat(DEPTH)).into_bytes()),
        (ContentType::Json, format!("{{\"payload\":{{\"items\":{}", "[".repeat(DEPTH)).into_bytes()),
        (ContentType::MessagePack, vec![0x91; DEPTH]),
        (ContentType::MessagePack, [b"\x81\xa5extra".to_vec(), vec![0x91; DEPTH]].concat()),
        (ContentType::MessagePack, [b"\x81\xa7payload".to_vec(), b"\x81\xa1x".repeat(DEPTH)].concat()),
    ];
    for (content_type, bomb) in bombs {
        for topic in Topic::ALL {
            let sentence = refused(topic, content_type, &bomb);
            assert!(sentence.starts_with("not a valid "), "{sentence}");
            assert!(sentence.chars().count() < 600, "{sentence}");
        }
    }
}

/// Foreign text in an error is cut, and loses what could break a log line.
#[test]
fn an_error_repeats_little_of_a_message() {
    let order = order_with("/eventType", Some(json!(format!("low\nstock\u{1b}[31m{}", "x".repeat(10_000)))));
    let sentence = refused(Topic::OrdersCreated, ContentType::Json, &serde_json::to_vec(&order).unwrap());
    assert!(sentence.starts_with("eventType is `lowstock[31mxxx"), "{sentence}");
    assert!(sentence.ends_with("x…`, this topic carries `order-created`"), "{sentence}");
    assert!(sentence.chars().count() < 300);
}

#[test]
fn the_content_type_header_chooses_the_codec() {
    let known = [
        (None, ContentType::Json),
        (Some("application/json"), ContentType::Json),
        (Some("Application/JSON; charset=utf-8"), ContentType::Json),
        (Some("application/msgpack"), ContentType::MessagePack),
        (Some(" application/MsgPack ;v=1"), ContentType::MessagePack),
        (Some("application/x-msgpack"), ContentType::MessagePack),
        (Some("application/vnd.msgpack"), ContentType::MessagePack),
    ];
    for (header, expected) in known {
        assert_eq!(ContentType::from_header(header), Ok(expected), "{header:?}");
    }
    for header in ["application/protobuf", "text/json", "json", "", "application/jsonx"] {
        assert_eq!(
            ContentType::from_header(Some(header)).unwrap_err().to_string(),
            format!("content type `{header}` is not supported; send application/json or application/msgpack")
        );
    }
    for content_type in [ContentType::Json, ContentType::MessagePack] {
        assert_eq!(ContentType::from_header(Some(&content_type.to_string())), Ok(content_type));
    }
}
