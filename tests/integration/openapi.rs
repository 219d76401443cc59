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
