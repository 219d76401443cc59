//! What the OpenAPI document says of all operations alike: headers of answers, and the types of problems.
//!
//! By rule and not beside each handler, so that a new operation cannot be forgotten.

use lomash_web::openapi::{tell_header as add, tell_problem_types, tell_sequence, tell_usual_headers};
use lomash_web::problem::MEDIA_TYPE;
use utoipa::openapi::path::{Operation, Parameter};
use utoipa::openapi::schema::Type;
use utoipa::openapi::{OpenApi, RefOr};

use super::problems::TYPES;

/// Completes the document.
pub(super) fn complete(document: &mut OpenApi) {
    tell_problem_types(document, TYPES);
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
                tell_sequence(response);
            }
            if tells_version {
                let told = "The product's version, when the answer is about it; send it as If-Match or If-None-Match";
                add(response, "ETag", Type::String, told);
            }
        }
        // Refusals by a rule are remembered under a key like what was carried out.
        if takes_key && (!response.content.contains_key(MEDIA_TYPE) || matches!(status.as_str(), "404" | "409" | "412"))
        {
            let told = "`true` when this is the answer to an earlier request with the same key";
            add(response, "Idempotent-Replayed", Type::String, told);
        }
        tell_usual_headers(status, response);
    }
}

fn parameters(operation: &Operation) -> impl Iterator<Item = &Parameter> {
    operation.parameters.iter().flatten().filter_map(|parameter| match parameter {
        RefOr::T(parameter) => Some(parameter),
        RefOr::Ref(_) => None,
    })
}
