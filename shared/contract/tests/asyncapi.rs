//! `docs/asyncapi.yaml` and the code say the same: topics, event types, enums, limits, fields, examples.
//!
//! Other teams build from that file and never see this crate, so neither side may change alone.

#![allow(clippy::unwrap_used)]

mod messages;

use std::collections::BTreeSet;

use jsonschema::{Draft, Validator};
use lomash_contract::limits::{
    LOW_STOCK_THRESHOLD, MAX_LINE_QUANTITY, MAX_NAME_CHARS, MAX_ORDER_ITEMS, MAX_SKU_CHARS, MAX_STOCK,
};
use lomash_contract::{ChangedField, ContentType, EventType, FailureReason, Topic, Trigger, Version, subject};
use messages::{GOLDEN, decode_as, golden_value};
use serde::de::value::Error as AnyError;
use serde::de::{DeserializeOwned, Deserializer, Error, Visitor};
use serde_json::{Value, json};

fn document() -> Value {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/asyncapi.yaml")).unwrap();
    serde_norway::from_str(&text).unwrap()
}

/// `value`, or what it refers to.
fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let mut value = value;
    while let Some(reference) = value.get("$ref") {
        let pointer = reference.as_str().unwrap().strip_prefix('#').unwrap();
        value = document.pointer(pointer).unwrap_or_else(|| panic!("{reference} leads nowhere"));
    }
    value
}

/// The message of the channel whose address is `topic`.
fn message_of(document: &Value, topic: Topic) -> &Value {
    let channels = document["channels"].as_object().unwrap();
    let channel = channels.values().find(|channel| channel["address"] == topic.as_str()).unwrap();
    let messages = channel["messages"].as_object().unwrap();
    assert_eq!(messages.len(), 1, "one event travels on {topic}");
    resolve(document, messages.values().next().unwrap())
}

fn schema_of(document: &Value, topic: Topic) -> &Value {
    resolve(document, &message_of(document, topic)["payload"])
}

/// Checks messages against a schema of the document, with the document's components to refer to.
fn validator(document: &Value, schema: &Value, draft: Draft) -> Validator {
    let root = json!({ "allOf": [schema], "components": document["components"] });
    jsonschema::options().with_draft(draft).should_validate_formats(true).build(&root).unwrap()
}

/// The names by which serde knows the variants of `T`: all of them, without a list to forget one in.
fn variants_of<T: DeserializeOwned>() -> BTreeSet<String> {
    struct Variants<'a>(&'a mut BTreeSet<String>);
    impl<'de> Deserializer<'de> for Variants<'_> {
        type Error = AnyError;

        fn deserialize_any<V: Visitor<'de>>(self, _visitor: V) -> Result<V::Value, AnyError> {
            panic!("not an enum")
        }

        fn deserialize_enum<V: Visitor<'de>>(
            self,
            _name: &'static str,
            variants: &'static [&'static str],
            _visitor: V,
        ) -> Result<V::Value, AnyError> {
            self.0.extend(variants.iter().map(|&variant| variant.to_owned()));
            Err(AnyError::custom("only the names are wanted"))
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
        }
    }
    let mut names = BTreeSet::new();
    let outcome = T::deserialize(Variants(&mut names));
    assert!(outcome.is_err() && !names.is_empty());
    names
}

fn texts(values: &Value) -> BTreeSet<String> {
    values.as_array().unwrap().iter().map(|value| value.as_str().unwrap().to_owned()).collect()
}

#[test]
fn it_is_an_asyncapi_3_document_whose_references_resolve() {
    fn walk(document: &Value, value: &Value, path: &str) {
        if let Some(fields) = value.as_object() {
            if fields.contains_key("$ref") {
                // Draft 7, the dialect of AsyncAPI, ignores whatever stands beside a reference.
                assert_eq!(fields.len(), 1, "{path} has keywords beside its $ref");
                resolve(document, value);
            }
            fields.iter().for_each(|(field, inner)| walk(document, inner, &format!("{path}/{field}")));
        }
        for (index, inner) in value.as_array().into_iter().flatten().enumerate() {
            walk(document, inner, &format!("{path}/{index}"));
        }
    }
    let document = document();
    assert_eq!(document["asyncapi"], "3.0.0");
    assert_eq!(document["info"]["version"], Version::CURRENT.to_string());
    walk(&document, &document, "");
}

#[test]
fn channels_are_the_topics_and_carry_their_event() {
    let document = document();
    let addresses: BTreeSet<_> = document["channels"]
        .as_object()
        .unwrap()
        .values()
        .map(|channel| channel["address"].as_str().unwrap())
        .collect();
    let letters = subject::dead_letter("{consumer}");
    let topics = Topic::ALL.iter().map(|topic| topic.as_str());
    assert_eq!(addresses, topics.chain([letters.as_str()]).collect());
    for topic in Topic::ALL {
        let message = message_of(&document, topic);
        assert_eq!(message["name"], topic.event_type().as_str());
        assert_eq!(schema_of(&document, topic)["properties"]["eventType"]["const"], topic.event_type().as_str());
    }
}

#[test]
fn stored_topics_name_their_keyed_subject() {
    let document = document();
    for channel in document["channels"].as_object().unwrap().values() {
        let address = channel["address"].as_str().unwrap();
        let key = match address {
            "lomash.orders.created" | "lomash.notifications.low-stock" | "lomash.dlq.{consumer}" => continue,
            "lomash.inventory.update-failed" => "{orderId}",
            _ => "{productId}",
        };
        let description = channel["description"].as_str().unwrap();
        assert!(description.contains(&format!("`{address}.{key}`")), "{address}: {description}");
    }
}

/// From the platform's point of view: orders come in, everything else goes out.
#[test]
fn every_channel_has_its_operation() {
    let document = document();
    let mut seen = BTreeSet::new();
    for operation in document["operations"].as_object().unwrap().values() {
        let address = resolve(&document, &operation["channel"])["address"].as_str().unwrap();
        let expected = if address == "lomash.orders.created" { "receive" } else { "send" };
        assert_eq!(operation["action"], expected, "{address}");
        let channel = operation["channel"]["$ref"].as_str().unwrap();
        for message in operation["messages"].as_array().unwrap() {
            assert!(message["$ref"].as_str().unwrap().starts_with(&format!("{channel}/messages/")), "{address}");
        }
        assert!(seen.insert(address), "{address} has two operations");
    }
    assert_eq!(seen.len(), Topic::ALL.len() + 1, "the topics and the dead letters");
}

#[test]
fn enums_are_the_code_s() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    assert_eq!(texts(&schemas["Trigger"]["enum"]), variants_of::<Trigger>());
    assert_eq!(texts(&schemas["FailureReason"]["enum"]), variants_of::<FailureReason>());
    assert_eq!(texts(&schemas["ChangedField"]["enum"]), variants_of::<ChangedField>());
    let event_types: BTreeSet<String> = Topic::ALL
        .iter()
        .map(|topic| schema_of(&document, *topic)["properties"]["eventType"]["const"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(event_types, variants_of::<EventType>());
    let encodings = [ContentType::Json, ContentType::MessagePack].map(|encoding| encoding.as_str().to_owned());
    assert_eq!(texts(&schemas["ContentType"]["enum"]), encodings.into());
}

#[test]
fn limits_are_the_code_s() {
    let document = document();
    let limits = [
        ("Sku/minLength", 1),
        ("Sku/maxLength", MAX_SKU_CHARS as u64),
        ("ProductName/minLength", 1),
        ("ProductName/maxLength", MAX_NAME_CHARS as u64),
        ("ProductDetails/properties/category/minLength", 1),
        ("ProductDetails/properties/category/maxLength", MAX_NAME_CHARS as u64),
        ("Stock/minimum", 0),
        ("Stock/maximum", u64::from(MAX_STOCK)),
        ("Threshold/minimum", 0),
        ("Threshold/maximum", u64::from(MAX_STOCK)),
        ("OrderCreatedPayload/properties/items/minItems", 1),
        ("OrderCreatedPayload/properties/items/maxItems", MAX_ORDER_ITEMS as u64),
        ("OrderItem/properties/quantity/minimum", 1),
        ("OrderItem/properties/quantity/maximum", u64::from(MAX_LINE_QUANTITY)),
        ("CommandAnsweredPayload/properties/events/minimum", 0),
        ("CommandAnsweredPayload/properties/events/maximum", u64::from(u32::MAX)),
        ("FailedItem/properties/requested/minimum", 1),
        ("FailedItem/properties/requested/maximum", u64::from(MAX_STOCK)),
    ];
    for (path, expected) in limits {
        let found = document.pointer(&format!("/components/schemas/{path}"));
        assert_eq!(found, Some(&json!(expected)), "{path}");
    }
    // No limit stands in the document that is not held to the code above.
    fn count(value: &Value) -> usize {
        let own = ["minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"];
        let own = own.iter().filter(|keyword| value.get(**keyword).is_some_and(Value::is_number)).count();
        let fields = value.as_object().into_iter().flat_map(serde_json::Map::values);
        own + fields.chain(value.as_array().into_iter().flatten()).map(count).sum::<usize>()
    }
    assert_eq!(count(&document["components"]["schemas"]), limits.len());

    let threshold = &document["components"]["schemas"]["ProductDetails"]["properties"]["lowStockThreshold"];
    let shop_s = format!("null for the shop's, which is {LOW_STOCK_THRESHOLD}");
    assert!(threshold["description"].as_str().unwrap().contains(&shop_s));
}

#[test]
fn headers_are_those_of_the_design() {
    let document = document();
    let trace = ["Nats-Msg-Id", "traceparent", "tracestate"];
    for topic in Topic::ALL {
        let mut expected = BTreeSet::from(trace);
        match topic {
            Topic::OrdersCreated => expected.extend(["Content-Type"]),
            Topic::NotificationsLowStock => {}
            _ => expected.extend(["Lomash-Reason", "Nats-Sequence", "Nats-Last-Sequence"]),
        }
        let message = message_of(&document, topic);
        let schema = resolve(&document, &message["headers"]);
        let names: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, expected, "{topic}");

        for example in message["examples"].as_array().unwrap() {
            let headers = &example["headers"];
            validator(&document, schema, Draft::Draft202012).validate(headers).unwrap();
            assert!(headers.as_object().unwrap().keys().all(|name| names.contains(name.as_str())), "{topic}");
            assert_eq!(headers["Nats-Msg-Id"], example["payload"]["eventId"], "{topic}");
        }
    }
}

#[test]
fn the_examples_are_the_golden_messages() {
    let document = document();
    for (topic, _) in GOLDEN {
        let examples = message_of(&document, topic)["examples"].as_array().unwrap();
        assert_eq!(examples.len(), 1);
        assert_eq!(examples[0]["payload"], golden_value(topic), "{topic}");
    }
}

/// Asserts that `value` has exactly the fields that `schema` names, at every level.
fn same_fields(document: &Value, schema: &Value, value: &Value, path: &str) {
    let schema = resolve(document, schema);
    match value {
        Value::Object(fields) => {
            let properties = schema["properties"].as_object().unwrap_or_else(|| panic!("{path} is no object"));
            let named: BTreeSet<_> = properties.keys().collect();
            assert_eq!(named, fields.keys().collect(), "{path}");
            for (field, inner) in fields {
                same_fields(document, &properties[field], inner, &format!("{path}/{field}"));
            }
        }
        Value::Array(items) => {
            assert!(!items.is_empty(), "{path} shows nothing");
            for (index, item) in items.iter().enumerate() {
                same_fields(document, &schema["items"], item, &format!("{path}/{index}"));
            }
        }
        _ => assert!(schema.get("properties").is_none() && schema.get("items").is_none(), "{path}"),
    }
}

#[test]
fn golden_messages_are_valid_and_show_every_field() {
    let document = document();
    for (topic, _) in GOLDEN {
        let (schema, value) = (schema_of(&document, topic), golden_value(topic));
        for draft in [Draft::Draft7, Draft::Draft202012] {
            if let Err(problem) = validator(&document, schema, draft).validate(&value) {
                panic!("{topic}: {problem} at {}", problem.instance_path());
            }
        }
        same_fields(&document, schema, &value, topic.as_str());
    }
}

/// Every path in `value`, of fields and items alike.
fn paths(value: &Value, path: String, found: &mut Vec<String>) {
    for (field, inner) in value.as_object().into_iter().flatten() {
        paths(inner, format!("{path}/{field}"), found);
    }
    for (index, inner) in value.as_array().into_iter().flatten().enumerate() {
        paths(inner, format!("{path}/{index}"), found);
    }
    found.push(path);
}

/// Asserts that the schema accepts `value` exactly if the code does.
#[track_caller]
fn agree(topic: Topic, validator: &Validator, value: &Value, change: &str) -> bool {
    let decoded = decode_as(topic, ContentType::Json, &serde_json::to_vec(value).unwrap());
    match (validator.validate(value), decoded) {
        (Ok(()), Ok(_)) => true,
        (Err(_), Err(_)) => false,
        (Err(problem), Ok(_)) => panic!("{topic}, {change}: decodes, but not by the schema: {problem}"),
        (Ok(()), Err(error)) => panic!("{topic}, {change}: valid by the schema, but: {error}"),
    }
}

#[test]
fn required_fields_are_those_that_the_code_needs() {
    let document = document();
    let mut optional = BTreeSet::new();
    for (topic, _) in GOLDEN {
        let validator = validator(&document, schema_of(&document, topic), Draft::Draft202012);
        let whole = golden_value(topic);
        let mut found = Vec::new();
        paths(&whole, String::new(), &mut found);
        for path in found {
            let mut value = whole.clone();
            let (parent, field) = path.rsplit_once('/').unwrap_or_default();
            let Some(fields) = value.pointer_mut(parent).and_then(Value::as_object_mut) else {
                continue;
            };
            if fields.remove(field).is_some() && agree(topic, &validator, &value, &format!("without {path}")) {
                optional.insert(format!("{}{path}", topic.event_type()));
            }
        }
    }
    let expected = [
        "order-created/payload/customerId",
        "order-created/payload/items/0/sku",
        "order-created/payload/items/1/sku",
        "inventory-updated/payload/orderId",
        "inventory-update-failed/payload/items/0/sku",
        "product-registered/payload/category",
        "product-registered/payload/lowStockThreshold",
        "product-revised/payload/category",
        "product-revised/payload/lowStockThreshold",
        "command-answered/payload/refusal",
    ];
    assert_eq!(optional, expected.map(str::to_owned).into());
}

#[test]
fn schema_and_code_agree_on_wrong_values() {
    let document = document();
    let long = |chars: usize| json!("x".repeat(chars));
    let replacements = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(1.5),
        json!(MAX_LINE_QUANTITY),
        json!(u64::from(u32::MAX) + 1),
        json!(i64::MIN),
        json!(""),
        json!("x"),
        json!(" x"),
        json!("x\n"),
        json!("\u{7}x"),
        json!("a\u{85}b"),
        json!(" "),
        json!("a b"),
        long(MAX_SKU_CHARS),
        long(MAX_NAME_CHARS + 1),
        json!("system"),
        json!("warehouse"),
        json!("1.7"),
        json!("2.0"),
        json!("2026-01-31T09:30:00Z"),
        json!("3e23e816-0039-494a-b389-4f6564e1b134"),
        json!("3E23E816-0039-494A-B389-4F6564E1B134"),
        json!([[]]),
        json!({ "x": 1 }),
    ];
    // What the platform promises to write within limits it does not check again when it reads its own events.
    let looser_in_code = ["/payload/items/0/requested"];
    let (mut accepted, mut refused) = (0, 0);
    for (topic, _) in GOLDEN {
        let validator = validator(&document, schema_of(&document, topic), Draft::Draft202012);
        let whole = golden_value(topic);
        let mut found = Vec::new();
        paths(&whole, String::new(), &mut found);
        for path in found.iter().filter(|path| !looser_in_code.contains(&path.as_str())) {
            for replacement in &replacements {
                let mut value = whole.clone();
                *value.pointer_mut(path).unwrap() = replacement.clone();
                match agree(topic, &validator, &value, &format!("{path} = {replacement}")) {
                    true => accepted += 1,
                    false => refused += 1,
                }
            }
        }
    }
    assert!(accepted > 100 && refused > 1_000, "accepted {accepted}, refused {refused}");
}
