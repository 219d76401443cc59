//! What the OpenAPI document says of all operations alike: headers of answers, and the types of problems.
//!
//! By rule and not beside each handler, so that a new operation cannot be forgotten.

use lomash_web::problem::{MEDIA_TYPE, SHARED_TYPES};
use serde_json::{Value, json};
use utoipa::openapi::header::Header;
use utoipa::openapi::path::{Operation, Parameter};
use utoipa::openapi::schema::Type;
use utoipa::openapi::{Object, OpenApi, RefOr, Response};

use super::problems::TYPES;

/// Where the document lists every problem type: its `type`, `status`, `title` and what it means.
pub(super) const PROBLEM_TYPES_MEMBER: &str = "x-problem-types";

/// Completes the document.
pub(super) fn complete(document: &mut OpenApi) {
    let types: Vec<Value> = SHARED_TYPES
        .iter()
        .chain(TYPES)
        .map(|kind| {
            let (status, title, meaning) = (kind.status().as_u16(), kind.title(), kind.meaning());
            json!({ "type": kind.uri(), "status": status, "title": title, "meaning": meaning })
        })
        .collect();
    document.extensions.get_or_insert_default().insert(PROBLEM_TYPES_MEMBER.to_owned(), types.into());
    for (path, item) in &mut document.paths.paths {
        for operation in [&mut item.get, &mut item.post, &mut item.patch].into_iter().flatten() {
            headers_of(path, operation);
        }
    }
}

fn headers_of(path: &str, operation: &mut Operation) {
    // Of the operations about products, stock and orders; an import tells sequences in its lines, a stream as ids.
    let tells_sequence = !["/v1/reconciliations", "/v1/dead-letters"].iter().any(|other| path.starts_with(other))
        && !path.ends_with(":import")
        && !path.ends_with("/stream");
    let is_versioned = path.contains("{productId}") || path == "/v1/products" && operation.request_body.is_some();
    let tells_version = is_versioned && !path.ends_with("/history") && !path.ends_with("/counts");
    let takes_key = parameters(operation).any(|parameter| parameter.name == "Idempotency-Key");
    for (status, response) in &mut operation.responses.responses {
        let RefOr::T(response) = response else { continue };
        if !response.content.contains_key(MEDIA_TYPE) {
            if tells_sequence {
                let told =
                    "The sequence of the ledger as of which this is; send it as Lomash-Min-Sequence to read no older";
                add(response, "Lomash-Sequence", Type::Integer, told);
            }
            if tells_version {
                let told = "The product's version, when the answer is about it; send it as If-Match or If-None-Match";
                add(response, "ETag", Type::String, told);
            }
            if takes_key {
                let told = "`true` when this is the answer to an earlier request with the same key";
                add(response, "Idempotent-Replayed", Type::String, told);
            }
        }
        match status.as_str() {
            "401" | "403" => add(response, "WWW-Authenticate", Type::String, "What a token needs"),
            "429" | "503" => add(response, "Retry-After", Type::Integer, "Seconds after which to try again"),
            _ => {}
        }
        add(response, "X-Request-Id", Type::String, "The request's id, as in the log and in problems");
    }
}

fn parameters(operation: &Operation) -> impl Iterator<Item = &Parameter> {
    operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
        RefOr::T(parameter) => Some(parameter),
        RefOr::Ref(_) => None,
    })
}

fn add(response: &mut Response, name: &str, kind: Type, description: &str) {
    let mut header = Header::new(Object::with_type(kind));
    header.description = Some(description.to_owned());
    response.headers.entry(name.to_owned()).or_insert(RefOr::T(header));
}
