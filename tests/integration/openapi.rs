//! The OpenAPI document: the committed copy is the one that the code makes, and it holds together.
use std::collections::BTreeSet;
use std::path::Path;

use lomash_web::problem::SHARED_TYPES;
use serde_json::Value;

/// Set, the test writes the copy anew instead of comparing it.
const UPDATE_VARIABLE: &str = "UPDATE_OPENAPI";

fn document() -> Value {
    serde_json::to_value(product_service::http::document()).unwrap()
}

/// Every operation, with its path and method.
fn operations(document: &Value) -> Vec<(String, &Value)> {
    let paths = document["paths"].as_object().unwrap().iter();
    let of = |(path, item): (&String, &Value)| -> Vec<String> {
        item.as_object().unwrap().keys().map(|method| format!("{method} {path}")).collect()
    };
    let names: Vec<String> = paths.flat_map(of).collect();
    let operation = |name: String| {
        let (method, path) = name.split_once(' ').unwrap();
        let operation = &document["paths"][path][method];
        (name, operation)
    };
    names.into_iter().map(operation).collect()
}

/// What each service says of itself, and where its copy is.
fn documents() -> [(&'static str, Value); 3] {
    let analytics = serde_json::to_value(analytics_service::http::document()).unwrap();
    let notification = serde_json::to_value(notification_service::http::document()).unwrap();
    [("openapi.json", document()), ("openapi-analytics.json", analytics), ("openapi-notification.json", notification)]
}

#[test]
fn the_committed_copy_is_what_the_code_says() {
    for (file, document) in documents() {
        compare_with_copy(file, &document);
    }
}

#[test]
fn every_operation_of_the_notification_service_tells_its_answers() {
    let document = serde_json::to_value(notification_service::http::document()).unwrap();
    for (name, operation) in operations(&document) {
        for needed in ["200", "400", "401", "403", "429", "503"] {
            assert!(operation["responses"][needed]["headers"]["X-Request-Id"].is_object(), "{name} {needed}");
        }
    }
    assert_eq!(document["security"], serde_json::json!([{ "bearer": [] }]));
}

fn compare_with_copy(file: &str, document: &Value) {
    let copy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(file);
    let made = format!("{}\n", serde_json::to_string_pretty(document).unwrap());
    if std::env::var_os(UPDATE_VARIABLE).is_some() {
        std::fs::write(&copy, &made).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&copy).unwrap_or_default();
    let differs = committed.lines().zip(made.lines()).position(|(ours, made)| ours != made);
    let line = differs.unwrap_or_else(|| committed.lines().count().min(made.lines().count())) + 1;
    assert!(committed == made, "docs/{file} is not what the code says, from line {line} on; renew it: just openapi");
}

#[test]
fn it_is_openapi_3_1_and_every_reference_leads_somewhere() {
    fn references<'v>(value: &'v Value, found: &mut BTreeSet<&'v str>) {
        match value {
            Value::Object(members) => {
                found.extend(members.get("$ref").and_then(Value::as_str));
                members.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    for (_, document) in documents() {
        assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
        assert!(document["info"]["title"].is_string() && document["info"]["version"].is_string());
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
    }
}

#[test]
fn every_operation_says_who_it_is_and_what_it_refuses() {
    for ((_, document), least) in documents().iter().zip([16, 4]) {
        say_who_they_are(document, least);
    }
}

fn say_who_they_are(document: &Value, least: usize) {
    let operations = operations(document);
    assert!(operations.len() >= least, "{}", operations.len());
    let mut ids = BTreeSet::new();
    for (name, operation) in operations {
        let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{name} has no operationId"));
        assert!(ids.insert(id.to_owned()), "{name}: {id} is there twice");
        assert!(operation["tags"].as_array().is_some_and(|tags| tags.len() == 1), "{name} has no tag");
        assert!(operation["summary"].is_string(), "{name} has no summary");
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{name} has no good answer");
        for needed in ["400", "401", "403", "429", "503"] {
            assert!(responses.contains_key(needed), "{name} has no {needed}");
        }
        for (status, response) in responses {
            let content = response["content"].as_object();
            if status.starts_with(['4', '5']) {
                let problem = &response["content"]["application/problem+json"]["schema"]["$ref"];
                assert_eq!(problem, "#/components/schemas/Problem", "{name} {status}");
            } else if status != "304" {
                assert!(content.is_some_and(|content| !content.is_empty()), "{name} {status} has no content");
            }
            assert!(response["headers"]["X-Request-Id"].is_object(), "{name} {status}");
        }
        // Every path parameter is declared, and none that the path does not have.
        let path = name.split_once(' ').unwrap().1;
        let in_path: BTreeSet<&str> = path.split(['{', '}']).skip(1).step_by(2).collect();
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let declared: BTreeSet<&str> = parameters
            .filter(|parameter| parameter["in"] == "path")
            .map(|parameter| parameter["name"].as_str().unwrap())
            .collect();
        assert_eq!(in_path, declared, "{name}");
    }
}

#[test]
fn every_operation_needs_a_token() {
    for (_, document) in documents() {
        assert_eq!(document["security"], serde_json::json!([{ "bearer": [] }]));
        assert_eq!(document["components"]["securitySchemes"]["bearer"]["scheme"], "bearer");
        for (name, operation) in operations(&document) {
            assert!(operation.get("security").is_none(), "{name} has a security of its own");
        }
    }
}

#[test]
fn problem_types_and_headers_are_told() {
    let document = document();
    let types = document["x-problem-types"].as_array().unwrap();
    let uris: BTreeSet<&str> = types.iter().map(|kind| kind["type"].as_str().unwrap()).collect();
    assert_eq!(uris.len(), types.len(), "a type is there twice");
    for kind in SHARED_TYPES.iter().chain(product_service::http::PROBLEM_TYPES) {
        assert!(uris.contains(kind.uri().as_str()), "{} is missing", kind.slug());
    }
    let headers = |path: &str, method: &str, status: &str| -> BTreeSet<String> {
        let headers = &document["paths"][path][method]["responses"][status]["headers"];
        headers.as_object().unwrap().keys().cloned().collect()
    };
    let has = |path: &str, method: &str, status: &str, names: &[&str]| {
        let there = headers(path, method, status);
        for name in names {
            assert!(there.contains(*name), "{method} {path} {status} has no {name}: {there:?}");
        }
    };
    has("/v1/products/{productId}", "get", "200", &["Lomash-Sequence", "ETag"]);
    has("/v1/products/{productId}", "get", "304", &["Lomash-Sequence", "ETag"]);
    has("/v1/products", "get", "200", &["Lomash-Sequence"]);
    has("/v1/products", "post", "201", &["Lomash-Sequence", "ETag", "Idempotent-Replayed"]);
    has("/v1/products/{productId}/inventory", "patch", "200", &["Lomash-Sequence", "ETag", "Idempotent-Replayed"]);
    has("/v1/reconciliations", "post", "202", &["Idempotent-Replayed"]);
    has("/v1/products:import", "post", "503", &["Retry-After"]);
    has("/v1/products", "get", "401", &["WWW-Authenticate"]);
    assert!(!headers("/v1/products", "get", "200").contains("ETag"), "a list has no version");
}

// ── Schemas that something satisfies ────────────────────────────────────────────────────────────────────────────

const JSON_TYPES: [&str; 7] = ["object", "array", "string", "number", "integer", "boolean", "null"];

/// References that may follow each other: more of them go in a circle, which says nothing of types.
const MAX_REFERENCES: usize = 20;

fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// The types that a value may have to satisfy a schema, by all that the schema says of types at once.
fn types_of(document: &Value, schema: &Value, depth: usize) -> BTreeSet<&'static str> {
    let mut types: BTreeSet<&str> = match &schema["type"] {
        Value::String(only) => JSON_TYPES.into_iter().filter(|known| known == only).collect(),
        Value::Array(some) => JSON_TYPES.into_iter().filter(|known| some.iter().any(|one| one == known)).collect(),
        _ => JSON_TYPES.into(),
    };
    if types.contains("number") {
        types.insert("integer");
    }
    let mut must = |others: BTreeSet<&'static str>| types.retain(|one| others.contains(one));
    if let Some(reference) = schema["$ref"].as_str().filter(|_| depth < MAX_REFERENCES) {
        let target = document.pointer(reference.trim_start_matches('#')).expect("a reference leads somewhere");
        must(types_of(document, target, depth + 1));
    }
    for part in schema["allOf"].as_array().into_iter().flatten() {
        must(types_of(document, part, depth));
    }
    for any in ["oneOf", "anyOf"] {
        if let Some(parts) = schema[any].as_array() {
            must(parts.iter().flat_map(|part| types_of(document, part, depth)).collect());
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        must(values.iter().map(type_of).collect());
    }
    types
}

/// What is wrong with a schema by itself and with those inside it.
fn contradictions(document: &Value, at: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            let is_schema = matches!(value["type"], Value::String(_) | Value::Array(_))
                || value["$ref"].is_string()
                || ["allOf", "oneOf", "anyOf", "enum"].iter().any(|name| value[name].is_array());
            if is_schema {
                let types = types_of(document, value, 0);
                if types.is_empty() {
                    found.push(format!("{at}: nothing satisfies {value}"));
                }
                if let Some(default) = members.get("default") {
                    let is_listed = value["enum"].as_array().is_none_or(|values| values.contains(default));
                    if !types.contains(type_of(default)) || !is_listed {
                        found.push(format!("{at}: its default is none of its values: {value}"));
                    }
                }
                for (least, most) in [("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems")] {
                    if let (Some(least), Some(most)) = (value[least].as_f64(), value[most].as_f64())
                        && least > most
                    {
                        found.push(format!("{at}: from {least} to {most} there is nothing"));
                    }
                }
                for name in value["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
                    if value["properties"].get(name).is_none() {
                        found.push(format!("{at}: {name} is required and not described"));
                    }
                }
            }
            for (name, member) in members {
                contradictions(document, &format!("{at}/{name}"), member, found);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                contradictions(document, &format!("{at}/{index}"), item, found);
            }
        }
        _ => {}
    }
}

#[test]
fn every_schema_can_be_satisfied() {
    for (file, document) in documents() {
        let mut found = Vec::new();
        for part in ["paths", "components/schemas"] {
            let value = document.pointer(&format!("/{part}")).unwrap();
            contradictions(&document, part, value, &mut found);
        }
        assert!(found.is_empty(), "docs/{file}:\n{}", found.join("\n"));
    }

    // What the check is for: an enumeration that is an object at once, and smaller things.
    let nobody = serde_json::json!({});
    for bad in [
        serde_json::json!({ "allOf": [{ "type": "string", "enum": ["a"] }, { "default": "a", "type": "object" }] }),
        serde_json::json!({ "type": "integer", "enum": ["a"] }),
        serde_json::json!({ "type": "string", "default": 1 }),
        serde_json::json!({ "type": "string", "enum": ["a"], "default": "b" }),
        serde_json::json!({ "type": "integer", "minimum": 2, "maximum": 1 }),
        serde_json::json!({ "type": "object", "required": ["a"], "properties": { "b": { "type": "string" } } }),
    ] {
        let mut found = Vec::new();
        contradictions(&nobody, "bad", &bad, &mut found);
        assert!(!found.is_empty(), "nothing was found in {bad}");
    }
}
