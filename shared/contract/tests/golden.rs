//! Every event of the contract against its golden file: what is written is what other teams were promised.
//!
//! A change of a golden file is a change of the contract. Assumes one file for each topic (`messages`).

#![allow(clippy::unwrap_used)]

mod messages;

use std::collections::HashMap;
use std::fmt::Debug;

use lomash_contract::codec::{decode, encode};
use lomash_contract::id::{EVENTS, EventRole};
use lomash_contract::{
    Cause, ChangedField, CommandAnswered, ContentType, CountedBy, CustomerId, Envelope, EventId, FailedItem,
    FailureReason, Fingerprint, InventoryCounted, InventoryUpdateFailed, InventoryUpdated, LineQuantity, LowStock,
    OrderCreated, OrderId, OrderItem, OrderItems, Payload, ProductDetails, ProductId, ProductRegistered,
    ProductRevised, ProductUpdated, Timestamp, Topic, Trigger, UpdatedBy,
};
use messages::{GOLDEN, compact, golden, golden_value};
use serde_json::{Value, json};
use uuid::Uuid;

fn cabinet() -> ProductId {
    "2c7e43a4-9d0b-5b52-8f7a-6b1d3f5c0e11".parse().unwrap()
}

fn bed() -> ProductId {
    "8f14e45f-ceea-567e-9c1d-4a0f7b2d9e32".parse().unwrap()
}

fn order() -> OrderId {
    "6f1c2a9e-3b7d-4c58-9a10-d2f4e6b8c0a1".parse().unwrap()
}

fn event<P: Payload>(event_id: &str, payload: P) -> Envelope<P> {
    Envelope::new(event_id.parse().unwrap(), "2026-01-31T09:30:00.123Z".parse().unwrap(), payload)
}

fn item(product_id: ProductId, sku: Option<&str>, quantity: u32) -> OrderItem {
    let sku = sku.map(|sku| sku.parse().unwrap());
    OrderItem { product_id, sku, quantity: LineQuantity::new(quantity).unwrap() }
}

fn order_created(customer_id: Option<CustomerId>, items: Vec<OrderItem>) -> Envelope<OrderCreated> {
    let items = OrderItems::new(items).unwrap();
    event("3e23e816-0039-494a-b389-4f6564e1b134", OrderCreated { order_id: order(), customer_id, items })
}

fn details(active: bool) -> ProductDetails {
    ProductDetails {
        product_id: cabinet(),
        sku: "KIT-CAB-600-OAK".parse().unwrap(),
        name: "Base cabinet 600 mm, natural oak".into(),
        category: Some("kitchen/cabinets".into()),
        low_stock_threshold: Some(5),
        active,
    }
}

/// The file decodes to `expected`, `expected` is written as the file, field by field in its order; and the same goes
/// for MessagePack, ours (16-byte ids) and that of programs which write ids as text.
#[track_caller]
fn is_golden<P: Payload + PartialEq + Debug + Clone>(expected: &Envelope<P>) {
    let file = golden(P::TOPIC);
    assert_eq!(decode::<P>(ContentType::Json, file.as_bytes()).as_ref(), Ok(expected));

    let written = encode(ContentType::Json, expected);
    assert_eq!(serde_json::from_slice::<Value>(&written).unwrap(), golden_value(P::TOPIC));
    assert_eq!(String::from_utf8(written).unwrap(), compact(file), "the order of the fields");

    let packed = encode(ContentType::MessagePack, expected);
    assert_eq!(decode::<P>(ContentType::MessagePack, &packed).as_ref(), Ok(expected));

    let foreign = rmp_serde::to_vec_named(&golden_value(P::TOPIC)).unwrap();
    assert_ne!(foreign, packed, "ids are 16 bytes in ours and text in theirs");
    assert_eq!(decode::<P>(ContentType::MessagePack, &foreign).as_ref(), Ok(expected));
}

#[test]
fn order_created_is_golden() {
    let customer = "0b9d8c7e-1a2f-4e3d-8c5b-6a79f8e0d1c2".parse().unwrap();
    let items = vec![item(cabinet(), Some("KIT-CAB-600-OAK"), 2), item(bed(), Some("BED-FRM-150-WAL"), 1)];
    is_golden(&order_created(Some(customer), items));
}

#[test]
fn inventory_updated_is_golden() {
    is_golden(&event(
        "b17ef6d1-9c7a-5b45-af59-8e6d1c9d4a70",
        InventoryUpdated {
            product_id: cabinet(),
            sku: "KIT-CAB-600-OAK".parse().unwrap(),
            previous_quantity: 14,
            new_quantity: 12,
            trigger: Trigger::OrderConfirmed,
            order_id: Some(order()),
            updated_by: UpdatedBy::System,
        },
    ));
}

#[test]
fn inventory_update_failed_is_golden() {
    let missing =
        FailedItem { product_id: bed(), sku: Some("BED-FRM-150-WAL".parse().unwrap()), requested: 1, available: 0 };
    is_golden(&event(
        "5feceb66-ffc8-5f38-9d95-2786c6d696c7",
        InventoryUpdateFailed { order_id: order(), reason: FailureReason::InsufficientStock, items: vec![missing] },
    ));
}

#[test]
fn inventory_counted_is_golden() {
    is_golden(&event(
        "4e074085-62be-5d8b-8c60-ce05c1decfe3",
        InventoryCounted {
            product_id: cabinet(),
            sku: "KIT-CAB-600-OAK".parse().unwrap(),
            quantity: 11,
            counted_at: "2026-01-31T06:00:00Z".parse().unwrap(),
            counted_by: CountedBy::Warehouse,
        },
    ));
}

#[test]
fn product_registered_is_golden() {
    is_golden(&event("4b227777-d4dd-5fc6-9f71-4f43b4c94acb", ProductRegistered(details(true))));
}

#[test]
fn product_revised_is_golden() {
    is_golden(&event("ef2d127d-e37b-542b-aad0-6145e54b0c61", ProductRevised(details(false))));
}

#[test]
fn product_updated_is_golden() {
    is_golden(&event(
        "e7f6c011-776e-5db7-8d33-0b54174fd76f",
        ProductUpdated {
            product_id: bed(),
            changed_fields: vec![ChangedField::StockQuantity, ChangedField::IsAvailable],
            updated_at: "2026-01-31T09:30:00.123Z".parse().unwrap(),
        },
    ));
}

#[test]
fn low_stock_is_golden() {
    is_golden(&event(
        "7902699b-e42c-5a8e-86fb-bb4501726517",
        LowStock {
            product_id: bed(),
            sku: "BED-FRM-150-WAL".parse().unwrap(),
            quantity: 1,
            threshold: 3,
            caused_by: "b17ef6d1-9c7a-5b45-af59-8e6d1c9d4a70".parse().unwrap(),
        },
    ));
}

#[test]
fn command_answered_is_golden() {
    is_golden(&event(
        "9f2d7b1c-5a3e-5c4f-8d60-2b7e9a1c3d5f",
        CommandAnswered {
            command_id: "c3a9e1d7-4b2f-5e68-9d0c-7f1b3a5c8e24".parse().unwrap(),
            fingerprint: Fingerprint(0x00c0_ffee_1234_5678),
            product_id: cabinet(),
            requested_by: UpdatedBy::User("d4735e3a-265e-46ee-a03f-59718b9b5d03".parse().unwrap()),
            events: 2,
            refusal: None,
        },
    ));
    for bad in ["", "c0ffee", "00c0ffee1234567g", "00c0ffee123456789", "+0c0ffee12345678"] {
        assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
    }
}

#[test]
fn there_is_one_golden_file_for_each_event_and_no_other() {
    let mut files: Vec<String> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let mut expected: Vec<String> = Topic::ALL.iter().map(|topic| format!("{}.json", topic.event_type())).collect();
    expected.sort();
    assert_eq!(files, expected);
    assert_eq!(GOLDEN.map(|(topic, _)| topic), Topic::ALL);
    for (topic, _) in GOLDEN {
        assert_eq!(golden_value(topic)["eventType"], topic.event_type().as_str());
    }
}

/// Adds a field nobody knows to every object of `value`.
fn add_unknown_fields(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.values_mut().for_each(add_unknown_fields);
            fields.insert("addedByALaterMinor".into(), json!({ "deep": [1, "two", { "three": null }] }));
        }
        Value::Array(items) => items.iter_mut().for_each(add_unknown_fields),
        _ => {}
    }
}

#[test]
fn unknown_fields_are_ignored_at_every_level() {
    for (topic, file) in GOLDEN {
        let mut value = golden_value(topic);
        add_unknown_fields(&mut value);
        value["version"] = json!("1.7");
        let expected = compact(file).replace(r#""version":"1.0""#, r#""version":"1.7""#);
        let as_json = serde_json::to_vec(&value).unwrap();
        assert_eq!(messages::decode_as(topic, ContentType::Json, &as_json), Ok(expected.clone()));
        let as_msgpack = rmp_serde::to_vec_named(&value).unwrap();
        assert_eq!(messages::decode_as(topic, ContentType::MessagePack, &as_msgpack), Ok(expected));
    }
}

/// `value` in both encodings, decoded.
#[track_caller]
fn read_both<P: Payload + PartialEq + Debug>(value: &Value) -> Envelope<P> {
    let json = decode::<P>(ContentType::Json, &serde_json::to_vec(value).unwrap()).unwrap();
    let packed = decode::<P>(ContentType::MessagePack, &rmp_serde::to_vec_named(value).unwrap()).unwrap();
    assert_eq!(json, packed);
    json
}

/// Null and missing are the same to a reader.
#[test]
fn null_and_missing_read_alike() {
    let cases = [
        (Topic::OrdersCreated, "/payload", "customerId"),
        (Topic::OrdersCreated, "/payload/items/1", "sku"),
        (Topic::InventoryUpdated, "/payload", "orderId"),
        (Topic::InventoryUpdateFailed, "/payload/items/0", "sku"),
        (Topic::ProductsRegistered, "/payload", "category"),
        (Topic::ProductsRegistered, "/payload", "lowStockThreshold"),
        (Topic::ProductsRevised, "/payload", "category"),
        (Topic::ProductsRevised, "/payload", "lowStockThreshold"),
    ];
    for (topic, parent, field) in cases {
        let mut null = golden_value(topic);
        null.pointer_mut(parent).unwrap()[field] = Value::Null;
        let mut missing = golden_value(topic);
        missing.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(field).expect("the golden has the field");

        let read = |value: &Value| messages::decode_as(topic, ContentType::Json, &serde_json::to_vec(value).unwrap());
        let understood = read(&null).unwrap();
        assert_eq!(read(&missing), Ok(understood.clone()), "{topic} {parent}/{field}");

        // An order's optional fields are left out; what the platform says of stock and products is always explicit.
        let written: Value = serde_json::from_str(&understood).unwrap();
        let written = written.pointer(parent).unwrap().get(field);
        let expected = (topic != Topic::OrdersCreated).then_some(&Value::Null);
        assert_eq!(written, expected, "{topic} {parent}/{field}");
    }
}

#[test]
fn an_order_without_customer_and_skus_is_an_order() {
    let mut value = golden_value(Topic::OrdersCreated);
    value["payload"]["customerId"] = Value::Null;
    value["payload"]["items"][0]["sku"] = Value::Null;
    value["payload"]["items"][1].as_object_mut().unwrap().remove("sku");
    let expected = order_created(None, vec![item(cabinet(), None, 2), item(bed(), None, 1)]);
    assert_eq!(read_both::<OrderCreated>(&value), expected);
}

#[test]
fn people_are_named_by_their_id() {
    let admin = "d4735e3a-265e-46ee-a03f-59718b9b5d03";
    let mut value = golden_value(Topic::InventoryUpdated);
    value["payload"]["trigger"] = json!("ADMIN_UPDATE");
    value["payload"]["orderId"] = Value::Null;
    value["payload"]["updatedBy"] = json!(admin);
    let updated = read_both::<InventoryUpdated>(&value);
    assert_eq!(updated.payload.updated_by, UpdatedBy::User(admin.parse().unwrap()));
    assert_eq!(serde_json::to_value(&updated).unwrap(), value);

    let mut value = golden_value(Topic::InventoryCounted);
    value["payload"]["countedBy"] = json!(admin);
    let counted = read_both::<InventoryCounted>(&value);
    assert_eq!(counted.payload.counted_by, CountedBy::User(admin.parse().unwrap()));
    assert_eq!(serde_json::to_value(&counted).unwrap(), value);
}

#[test]
fn instants_are_read_with_any_offset_and_precision_and_written_as_utc_milliseconds() {
    let cases = [
        ("2026-01-31T09:30:00Z", "2026-01-31T09:30:00.000Z"),
        ("2026-01-31T15:00:00.1234567+05:30", "2026-01-31T09:30:00.123Z"),
        ("2026-01-31T00:30:00.9999-09:00", "2026-01-31T09:30:00.999Z"),
        ("0000-01-01T00:00:00Z", "0000-01-01T00:00:00.000Z"),
        ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999Z"),
    ];
    for (sent, expected) in cases {
        let mut value = golden_value(Topic::ProductsUpdated);
        value["payload"]["updatedAt"] = json!(sent);
        assert_eq!(read_both::<ProductUpdated>(&value).payload.updated_at.to_string(), expected);
        // What is not written is not kept either: an event equals itself once it has been through the wire.
        let (sent, written): (Timestamp, Timestamp) = (sent.parse().unwrap(), expected.parse().unwrap());
        assert_eq!(sent, written);
    }
    let before_year_0 = time::OffsetDateTime::new_utc(time::Date::MIN, time::Time::MIDNIGHT);
    assert_eq!(Timestamp::new(before_year_0).to_string(), "1970-01-01T00:00:00.000Z");
}

#[test]
fn ids_derived_from_a_cause_never_change() {
    let derived = |role| EventId::derive(&Cause::Order(order()), role, &cabinet().0).to_string();
    // Written down once: a retry after an upgrade must still name the same events.
    let written_down = [
        (EventRole::Stock, "a224c01e-b093-56c8-bf5a-85045ef5f66c"),
        (EventRole::Refusal, "032179eb-7d4a-5929-bf64-9cffaa497dea"),
        (EventRole::ChangedFields, "566bc7bb-9141-5750-9089-a31693a98f10"),
        (EventRole::Details, "18fe7c19-38d6-5c99-97cb-a9fdb756186e"),
        (EventRole::Count, "24dd3b7f-4b5b-5d8e-be7e-d5eaff252858"),
        (EventRole::Alert, "3c3c1262-f97c-566d-a564-5d79250f6f57"),
    ];
    for (role, expected) in written_down {
        assert_eq!(derived(role), expected, "{role:?}");
    }
}

/// Causes of every kind, whose own ids are all `id`.
fn causes(id: Uuid) -> [Cause; 6] {
    [
        Cause::Order(OrderId(id)),
        Cause::Command(id),
        Cause::KeyedCommand { command_id: id, sequence: 0 },
        Cause::KeyedCommand { command_id: id, sequence: 41 },
        Cause::Correction(id),
        Cause::Event(EventId(id)),
    ]
}

const ROLES: [EventRole; 7] = [
    EventRole::Stock,
    EventRole::Refusal,
    EventRole::ChangedFields,
    EventRole::Details,
    EventRole::Count,
    EventRole::Alert,
    EventRole::Answer,
];

/// Whoever publishes an order chooses its id: also that of a command, of an event, or of a namespace.
#[test]
fn no_two_causes_share_an_event_id_whatever_their_own_ids_are() {
    let mut chosen = vec![order().0, Uuid::nil(), Uuid::max(), EVENTS, cabinet().0];
    for cause in causes(order().0) {
        chosen.extend(ROLES.map(|role| EventId::derive(&cause, role, &cabinet().0).0));
    }
    let mut ids = HashMap::new();
    for (cause, role) in chosen.iter().flat_map(|id| causes(*id)).flat_map(|cause| ROLES.map(|role| (cause, role))) {
        for subject in [cabinet().0, bed().0, order().0, EVENTS] {
            let id = EventId::derive(&cause, role, &subject);
            let earlier = ids.insert(id, (cause, role, subject));
            assert!(earlier.is_none_or(|earlier| earlier == (cause, role, subject)), "{cause:?} {role:?}: {earlier:?}");
        }
    }
    assert!(ids.len() > 6_000, "{}", ids.len());
}

#[test]
fn ids_of_other_causes_never_change_either() {
    assert_eq!(EVENTS, Uuid::new_v5(&Uuid::NAMESPACE_OID, b"lomash-events"));
    let derived = causes(order().0).map(|cause| EventId::derive(&cause, EventRole::Stock, &cabinet().0).to_string());
    let written_down = [
        "a224c01e-b093-56c8-bf5a-85045ef5f66c",
        "e80b2796-e429-59d7-96fa-ede6d399f017",
        "2e49ec15-0678-5020-a0a9-33f5f034a134",
        "aeaa9c4f-328e-5a35-ba5e-3ea557ada3a4",
        "263ee076-dc2a-555d-af32-6727ac7d343e",
        "eacdf191-ce25-5fe7-bd24-e12b6afba3ed",
    ];
    assert_eq!(derived, written_down);
}
