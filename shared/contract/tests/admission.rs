//! The rule that tells our events from what is not ours, one line for each way to break it.

#![allow(clippy::unwrap_used)]

mod messages;

use lomash_contract::codec::decode;
use lomash_contract::limits::MAX_STOCK;
use lomash_contract::subject::InvalidSubject;
use lomash_contract::{
    ContentType, DecodeError, Foreign, InventoryUpdated, LedgerEvent, ProductRegistered, Topic, chains, parse_stored,
};
use messages::{GOLDEN, golden, golden_value};
use serde_json::{Value, json};

/// The topics that the `INVENTORY` stream stores.
const STORED: [Topic; 7] = [
    Topic::InventoryUpdated,
    Topic::InventoryUpdateFailed,
    Topic::InventoryCounted,
    Topic::ProductsRegistered,
    Topic::ProductsRevised,
    Topic::ProductsUpdated,
    Topic::InventoryCommandAnswered,
];

/// The key token and the message id that belong to a golden message.
fn key_and_id(topic: Topic) -> (String, String) {
    let value = golden_value(topic);
    let key = if topic == Topic::InventoryUpdateFailed { "orderId" } else { "productId" };
    (value["payload"][key].as_str().unwrap().to_owned(), value["eventId"].as_str().unwrap().to_owned())
}

/// What `parse_stored` makes of a golden message after `change`.
fn stored(topic: Topic, change: impl FnOnce(&mut Value)) -> Result<LedgerEvent, Foreign> {
    let mut value = golden_value(topic);
    change(&mut value);
    let (key, id) = key_and_id(topic);
    parse_stored(&format!("{topic}.{key}"), Some(&id), &serde_json::to_vec(&value).unwrap()).map(|event| event.payload)
}

#[test]
fn what_we_store_is_ours() {
    for topic in STORED {
        let (key, id) = key_and_id(topic);
        let subject = format!("{topic}.{key}");
        let envelope = parse_stored(&subject, Some(&id), golden(topic).as_bytes()).unwrap();
        assert_eq!(envelope.event_id.to_string(), id);
        assert_eq!(envelope.event_type, topic.event_type());
        assert_eq!(envelope.payload.topic(), topic);
        assert_eq!(envelope.payload.subject().to_string(), subject);
        assert_eq!(serde_json::to_value(&envelope).unwrap(), golden_value(topic));
    }
}

#[test]
fn a_subject_that_the_ledger_does_not_store_is_foreign() {
    let key = key_and_id(Topic::InventoryUpdated).0;
    let subjects = [
        "lomash.inventory.updated".to_owned(),
        format!("lomash.inventory.updated.{}", key.to_uppercase()),
        format!("lomash.inventory.stolen.{key}"),
        format!("lomash.orders.created.{key}"),
        format!("lomash.notifications.low-stock.{key}"),
        "_INBOX.x.y".to_owned(),
    ];
    for subject in subjects {
        // The subject is looked at first: no message makes a foreign subject ours.
        for (topic, text) in GOLDEN {
            let id = golden_value(topic)["eventId"].as_str().unwrap().to_owned();
            let outcome = parse_stored(&subject, Some(&id), text.as_bytes());
            assert_eq!(outcome, Err(Foreign::Subject(InvalidSubject(subject.clone()))));
        }
    }
}

#[test]
fn what_does_not_decode_is_foreign() {
    for topic in STORED {
        let (key, id) = key_and_id(topic);
        let subject = format!("{topic}.{key}");
        for bytes in ["", "{}", r#"{"type":"io.nats.jetstream.api.v1.stream_info_response"}"#] {
            let outcome = parse_stored(&subject, Some(&id), bytes.as_bytes());
            assert!(matches!(outcome, Err(Foreign::Undecodable(DecodeError::Field { .. }))), "{outcome:?}");
        }
        let outcome = stored(topic, |value| value["version"] = json!("2.0"));
        assert!(matches!(outcome, Err(Foreign::Undecodable(DecodeError::Version { .. }))), "{outcome:?}");
        let outcome = stored(topic, |value| value["eventType"] = json!("low-stock"));
        assert!(matches!(outcome, Err(Foreign::Undecodable(DecodeError::EventType { .. }))), "{outcome:?}");

        // What we store is JSON, whatever else could be read.
        let packed = rmp_serde::to_vec_named(&golden_value(topic)).unwrap();
        let outcome = parse_stored(&subject, Some(&id), &packed);
        assert!(matches!(outcome, Err(Foreign::Undecodable(DecodeError::Field { .. }))), "{outcome:?}");
    }
}

#[test]
fn another_key_is_foreign() {
    let other = "00000000-0000-4000-8000-000000000000";
    for topic in STORED {
        let (key, id) = key_and_id(topic);
        let outcome = parse_stored(&format!("{topic}.{other}"), Some(&id), golden(topic).as_bytes());
        let expected = Foreign::Key { subject: other.parse().unwrap(), payload: key.parse().unwrap() };
        assert_eq!(outcome, Err(expected.clone()));
        assert_eq!(expected.to_string(), format!("the subject's key is {other}, the payload's is {key}"));
    }
    // An order's refusal is keyed by the order; one of its products will not do.
    let (_, id) = key_and_id(Topic::InventoryUpdateFailed);
    let product = key_and_id(Topic::ProductsUpdated).0;
    let subject = format!("lomash.inventory.update-failed.{product}");
    let outcome = parse_stored(&subject, Some(&id), golden(Topic::InventoryUpdateFailed).as_bytes());
    assert!(matches!(outcome, Err(Foreign::Key { .. })), "{outcome:?}");
}

#[test]
fn another_message_id_is_foreign() {
    for topic in STORED {
        let (key, id) = key_and_id(topic);
        let others = [
            None,
            Some(String::new()),
            Some("00000000-0000-4000-8000-000000000000".to_owned()),
            Some(format!("{id} ")),
            // The server de-duplicates by text: these are other ids to it.
            Some(id.to_uppercase()),
            Some(format!("{{{id}}}")),
            Some(id.replace('-', "")),
        ];
        for message_id in others {
            let outcome = parse_stored(&format!("{topic}.{key}"), message_id.as_deref(), golden(topic).as_bytes());
            let expected = Foreign::MessageId { message_id: message_id.clone(), event_id: id.parse().unwrap() };
            assert_eq!(outcome, Err(expected.clone()));
            let found = message_id.as_deref().unwrap_or("missing");
            assert_eq!(expected.to_string(), format!("Nats-Msg-Id is `{found}`, eventId is {id}"));
        }
    }
}

/// The golden update, from `previous` to `new`.
fn updated(previous: u32, new: u32) -> LedgerEvent {
    stored(Topic::InventoryUpdated, |value| {
        value["payload"]["previousQuantity"] = json!(previous);
        value["payload"]["newQuantity"] = json!(new);
    })
    .unwrap()
}

#[test]
fn an_event_continues_the_history_of_its_product_or_is_foreign() {
    let event = |topic| stored(topic, |_| {}).unwrap();
    let broken = |expected, found| Err(Foreign::BrokenChain { expected, found });
    let cases = [
        // A product begins with its registration, once.
        (event(Topic::ProductsRegistered), None, Ok(())),
        (event(Topic::ProductsRegistered), Some(0), Err(Foreign::RegisteredTwice)),
        (event(Topic::ProductsRegistered), Some(9), Err(Foreign::RegisteredTwice)),
        // Nothing is said of a product before that.
        (event(Topic::InventoryUpdated), None, Err(Foreign::UnknownProduct)),
        (event(Topic::InventoryCounted), None, Err(Foreign::UnknownProduct)),
        (event(Topic::ProductsRevised), None, Err(Foreign::UnknownProduct)),
        (event(Topic::ProductsUpdated), None, Err(Foreign::UnknownProduct)),
        // Words and counts change no stock, whatever it is.
        (event(Topic::InventoryCounted), Some(7), Ok(())),
        (event(Topic::ProductsRevised), Some(0), Ok(())),
        (event(Topic::ProductsUpdated), Some(7), Ok(())),
        // A refusal is about an order; its products may be unknown.
        (event(Topic::InventoryUpdateFailed), None, Ok(())),
        (event(Topic::InventoryUpdateFailed), Some(3), Ok(())),
        // Stock goes on from where it was.
        (updated(14, 12), Some(14), Ok(())),
        (updated(0, 5), Some(0), Ok(())),
        (updated(5, 0), Some(5), Ok(())),
        (updated(14, 12), Some(13), broken(13, 14)),
        (updated(14, 12), Some(12), broken(12, 14)),
        (updated(14, 14), Some(14), Err(Foreign::Quantity(14))),
        (updated(0, MAX_STOCK), Some(0), Ok(())),
        (updated(0, MAX_STOCK + 1), Some(0), Err(Foreign::Quantity(MAX_STOCK + 1))),
        (updated(3, u32::MAX), Some(2), broken(2, 3)),
    ];
    for (event, stock, expected) in cases {
        assert_eq!(chains(&event, stock), expected, "{event:?} on {stock:?}");
    }
}

#[test]
fn every_refusal_is_a_sentence() {
    let undecodable = decode::<InventoryUpdated>(ContentType::Json, b"{}").unwrap_err();
    let wrong_topic = decode::<ProductRegistered>(ContentType::Json, golden(Topic::InventoryUpdated).as_bytes());
    let cases = [
        (
            Foreign::Undecodable(undecodable),
            "not a valid inventory-updated as application/json: message: missing field `eventId` at line 1 column 2",
        ),
        (
            Foreign::Undecodable(wrong_topic.unwrap_err()),
            "eventType is `inventory-updated`, this topic carries `product-registered`",
        ),
        (Foreign::UnknownProduct, "the product was never registered"),
        (Foreign::RegisteredTwice, "the product is registered already"),
        (Foreign::BrokenChain { expected: 3, found: 4 }, "the chain is broken: previousQuantity is 4, the stock was 3"),
        (Foreign::Quantity(7), "newQuantity 7 is no change or beyond the largest stock"),
    ];
    for (foreign, sentence) in cases {
        assert_eq!(foreign.to_string(), sentence);
    }
}
