//! What holds for every message, not only for the golden ones.
//!
//! A failing case is printed with its seed; put it into a table test of its own.

#![allow(clippy::unwrap_used)]

mod messages;

use lomash_contract::codec::{decode, encode};
use lomash_contract::limits::{MAX_LINE_QUANTITY, MAX_ORDER_ITEMS, MAX_STOCK};
use lomash_contract::{
    ContentType, Envelope, InventoryUpdated, KeyedSubject, LineQuantity, OrderCreated, OrderItem, OrderItems, Sku,
    Timestamp, Topic, Trigger, UpdatedBy, parse_stored,
};
use messages::{GOLDEN, decode_as, golden_value};
use proptest::prelude::*;
use time::OffsetDateTime;
use uuid::Uuid;

const BOTH: [ContentType; 2] = [ContentType::Json, ContentType::MessagePack];

fn id<T: From<Uuid> + std::fmt::Debug>() -> impl Strategy<Value = T> {
    any::<[u8; 16]>().prop_map(|bytes| Uuid::from_bytes(bytes).into())
}

/// Every instant that the wire can carry, from year 0 to 9999.
fn instant() -> impl Strategy<Value = Timestamp> {
    (-62_167_219_200_000_i64..=253_402_300_799_999).prop_map(|milliseconds| {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(milliseconds) * 1_000_000).unwrap().into()
    })
}

/// Visible text with what JSON must escape and what takes several bytes.
fn sku() -> impl Strategy<Value = Sku> {
    "[A-Z0-9\"\\\\/é€🛏]([A-Za-z0-9 _\"\\\\/é€🛏-]{0,62}[A-Z0-9\"\\\\/é€🛏])?".prop_map(|text| text.parse().unwrap())
}

fn item() -> impl Strategy<Value = OrderItem> {
    (id(), proptest::option::of(sku()), 1..=MAX_LINE_QUANTITY).prop_map(|(product_id, sku, quantity)| OrderItem {
        product_id,
        sku,
        quantity: LineQuantity::new(quantity).unwrap(),
    })
}

fn order_created() -> impl Strategy<Value = Envelope<OrderCreated>> {
    let items = prop_oneof![
        20 => proptest::collection::vec(item(), 1..30),
        1 => (item(), 1..=MAX_ORDER_ITEMS).prop_map(|(item, lines)| vec![item; lines]),
    ];
    (id(), instant(), id(), proptest::option::of(id()), items).prop_map(
        |(event_id, at, order_id, customer_id, items)| {
            let items = OrderItems::new(items).unwrap();
            Envelope::new(event_id, at, OrderCreated { order_id, customer_id, items })
        },
    )
}

fn inventory_updated() -> impl Strategy<Value = Envelope<InventoryUpdated>> {
    let trigger = prop_oneof![Just(Trigger::OrderConfirmed), Just(Trigger::AdminUpdate), Just(Trigger::ScheduledSync)];
    let updated_by = prop_oneof![Just(UpdatedBy::System), id().prop_map(UpdatedBy::User)];
    let quantities = (0..=MAX_STOCK, 0..=MAX_STOCK);
    (id(), instant(), id(), sku(), quantities, trigger, proptest::option::of(id()), updated_by).prop_map(
        |(event_id, at, product_id, sku, (previous_quantity, new_quantity), trigger, order_id, updated_by)| {
            let updated =
                InventoryUpdated { product_id, sku, previous_quantity, new_quantity, trigger, order_id, updated_by };
            Envelope::new(event_id, at, updated)
        },
    )
}

/// A golden message, in either encoding, with a few bytes changed, put in or taken out.
fn mutated() -> impl Strategy<Value = (Topic, ContentType, Vec<u8>)> {
    let edit = (any::<prop::sample::Index>(), 0..3_u8, any::<u8>());
    (0..GOLDEN.len(), any::<bool>(), proptest::collection::vec(edit, 1..6)).prop_map(|(which, packed, edits)| {
        let (topic, text) = GOLDEN[which];
        let content_type = BOTH[usize::from(packed)];
        let mut bytes = match content_type {
            ContentType::Json => text.as_bytes().to_vec(),
            ContentType::MessagePack => rmp_serde::to_vec_named(&golden_value(topic)).unwrap(),
        };
        for (at, kind, byte) in edits {
            let at = at.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        (topic, content_type, bytes)
    })
}

/// Decodes without panicking; and what was understood means the same when it is read again.
fn is_stable(topic: Topic, content_type: ContentType, bytes: &[u8]) {
    match decode_as(topic, content_type, bytes) {
        Ok(understood) => {
            assert_eq!(decode_as(topic, ContentType::Json, understood.as_bytes()), Ok(understood));
        }
        Err(error) => {
            let sentence = error.to_string();
            assert!(!sentence.contains("only at the second try"), "{sentence}");
            assert!(sentence.chars().count() < 600, "{sentence}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_order_round_trips(order in order_created()) {
        for content_type in BOTH {
            let read = decode(content_type, &encode(content_type, &order));
            prop_assert_eq!(read.as_ref(), Ok(&order));
        }
    }

    #[test]
    fn every_update_round_trips(updated in inventory_updated()) {
        for content_type in BOTH {
            let read = decode(content_type, &encode(content_type, &updated));
            prop_assert_eq!(read.as_ref(), Ok(&updated));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        for topic in Topic::ALL {
            for content_type in BOTH {
                is_stable(topic, content_type, &bytes);
            }
            let subject = KeyedSubject { topic, key: Uuid::nil() };
            prop_assert!(parse_stored(&subject.to_string(), None, &bytes).is_err());
        }
    }

    #[test]
    fn mutated_messages_never_panic((topic, content_type, bytes) in mutated()) {
        is_stable(topic, content_type, &bytes);
    }

    #[test]
    fn a_keyed_subject_round_trips(which in 0..Topic::ALL.len(), key in id::<Uuid>()) {
        let subject = KeyedSubject { topic: Topic::ALL[which], key };
        prop_assert_eq!(subject.to_string().parse(), Ok(subject));
    }

    /// One spelling, one subject: nothing but what `Display` writes is read.
    #[test]
    fn no_other_spelling_of_a_keyed_subject_is_read(
        which in 0..Topic::ALL.len(),
        key in id::<Uuid>(),
        at in any::<prop::sample::Index>(),
        other in prop_oneof![any::<char>(), "[A-F0-9.*>{}-]".prop_map(|text| text.chars().next().unwrap())],
        insert in any::<bool>(),
    ) {
        let subject = KeyedSubject { topic: Topic::ALL[which], key };
        let mut spelling: Vec<char> = subject.to_string().chars().collect();
        let at = at.index(spelling.len());
        if insert { spelling.insert(at, other) } else { spelling[at] = other }
        let spelling: String = spelling.into_iter().collect();
        if let Ok(read) = spelling.parse::<KeyedSubject>() {
            prop_assert_eq!(read.to_string(), spelling);
        }
    }

    #[test]
    fn an_arbitrary_subject_never_panics(text in any::<String>()) {
        prop_assert!(text.parse::<KeyedSubject>().is_err());
    }
}

#[test]
fn a_keyed_subject_is_read_as_it_is_written_or_not_at_all() {
    let key = "2c7e43a4-9d0b-5b52-8f7a-6b1d3f5c0e11";
    let written = format!("lomash.inventory.updated.{key}");
    let expected = KeyedSubject { topic: Topic::InventoryUpdated, key: Uuid::parse_str(key).unwrap() };
    assert_eq!(written.parse(), Ok(expected));
    assert_eq!(expected.to_string(), written);

    let refused = [
        "".to_owned(),
        key.to_owned(),
        "lomash.inventory.updated".to_owned(),
        "lomash.inventory.updated.".to_owned(),
        format!("lomash.inventory.updated.{}", key.to_uppercase()),
        format!("lomash.inventory.updated.{{{key}}}"),
        format!("lomash.inventory.updated.urn:uuid:{key}"),
        format!("lomash.inventory.updated.{}", key.replace('-', "")),
        format!("lomash.inventory.updated.{key}.{key}"),
        format!("lomash.inventory.updated.{key}."),
        format!("lomash.inventory.updated..{key}"),
        format!("lomash.inventory.updated. {key}"),
        format!("lomash.inventory.updated.{key} "),
        format!("lomash.inventory.updated.{key}\r\n"),
        format!("x.lomash.inventory.updated.{key}"),
        format!("lomash.inventory.{key}"),
        format!("lomash.inventory.removed.{key}"),
        format!("LOMASH.inventory.updated.{key}"),
        "lomash.inventory.updated.*".to_owned(),
        "lomash.inventory.updated.>".to_owned(),
        format!("lomash.inventory.*.{key}"),
        format!("lomash.*.updated.{key}"),
        format!("*.inventory.updated.{key}"),
        "lomash.>".to_owned(),
    ];
    for subject in refused {
        let error = subject.parse::<KeyedSubject>().unwrap_err().to_string();
        let why = "is not a topic of the contract followed by one key in lower-case UUID form";
        assert_eq!(error, format!("`{subject}` {why}"));
    }
}
