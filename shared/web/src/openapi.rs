//! What the OpenAPI documents of all services say alike, by rule and not beside each handler: the types of problems, and
//! the headers that every answer may have.

use serde_json::{Value, json};
use utoipa::openapi::header::Header;
use utoipa::openapi::schema::Type;
use utoipa::openapi::{Object, OpenApi, RefOr, Response};

use crate::problem::{ProblemType, SHARED_TYPES};

/// Where a document lists every problem type: its `type`, `status`, `title` and what it means.
pub const PROBLEM_TYPES_MEMBER: &str = "x-problem-types";

/// Lists the problem types that all services have, and those of one.
pub fn tell_problem_types(document: &mut OpenApi, of_service: &[&'static ProblemType]) {
    let types: Vec<Value> = SHARED_TYPES
        .iter()
        .chain(of_service)
        .map(|kind| {
            let (status, title, meaning) = (kind.status().as_u16(), kind.title(), kind.meaning());
            json!({ "type": kind.uri(), "status": status, "title": title, "meaning": meaning })
        })
        .collect();
    document.extensions.get_or_insert_default().insert(PROBLEM_TYPES_MEMBER.to_owned(), types.into());
}

/// Names the headers that an answer of this status has in every service.
pub fn tell_usual_headers(status: &str, response: &mut Response) {
    match status {
        "401" | "403" => tell_header(response, "WWW-Authenticate", Type::String, "What a token needs"),
        "429" | "503" => tell_header(response, "Retry-After", Type::Integer, "Seconds after which to try again"),
        _ => {}
    }
    tell_header(response, "X-Request-Id", Type::String, "The request's id, as in the log and in problems");
}

/// Names the header with the sequence that an answer shows.
pub fn tell_sequence(response: &mut Response) {
    let told = "The sequence of the ledger as of which this is; send it as Lomash-Min-Sequence to read no older";
    tell_header(response, "Lomash-Sequence", Type::Integer, told);
}

/// Names a header of an answer, once.
pub fn tell_header(response: &mut Response, name: &str, kind: Type, description: &str) {
    let mut header = Header::new(Object::with_type(kind));
    header.description = Some(description.to_owned());
    response.headers.entry(name.to_owned()).or_insert(RefOr::T(header));
}

/// Describes what an operation can be refused with, status by status; read by the document alone.
#[macro_export]
macro_rules! problem_responses {
    ($(#[$doc:meta])* $visibility:vis $name:ident { $($variant:ident = $status:literal, $description:literal;)* }) => {
        $(#[$doc])*
        #[derive(::utoipa::IntoResponses)]
        #[allow(dead_code, missing_docs, reason = "read by the document alone")]
        $visibility enum $name {
            $(
                #[response(status = $status, description = $description, content_type = "application/problem+json")]
                $variant($crate::problem::ProblemDocument),
            )*
        }
    };
}

problem_responses! {
    /// What a read of what is always there, such as a list, can be refused with.
    pub ListProblems {
        BadRequest = 400, "Parameters are not as they must be";
        Unauthorized = 401, "No token, or none that is believed";
        Forbidden = 403, "The token's role does not reach";
        TooManyRequests = 429, "The caller's share is used up";
        Unavailable = 503, "Not now, or not yet projected";
        Timeout = 504, "It took too long";
    }
}
