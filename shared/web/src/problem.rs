//! Problems: every refusal and failure that a client sees, as RFC 9457 `application/problem+json`.
//!
//! Owns the shape and the types that every service shares. A [`ProblemType`] is a promise: its URI and status never
//! change, so that programs may branch on them; title and detail are for people. A service defines its own types
//! beside these, and lists both in its OpenAPI.
//!
//! Details are sentences for the client. What went wrong inside goes to the log, with the id of the request.

use std::borrow::Cow;
use std::fmt;

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use uuid::Uuid;

/// What the URI of every problem type begins with. It names; nothing needs to be there.
pub const TYPE_BASE: &str = "https://lomash.example/problems/";

/// The media type of a problem.
pub const MEDIA_TYPE: &str = "application/problem+json";

/// Most field errors that one problem lists: enough for a form, and an answer stays small whatever is sent.
pub const MAX_FIELD_ERRORS: usize = 50;

/// A kind of problem.
#[derive(Debug, PartialEq, Eq)]
pub struct ProblemType {
    slug: &'static str,
    status: StatusCode,
    title: &'static str,
    meaning: &'static str,
}

impl ProblemType {
    /// A type with the last part of its URI, its status, its title, and what it means and what a client should do.
    #[must_use]
    pub const fn new(slug: &'static str, status: StatusCode, title: &'static str, meaning: &'static str) -> Self {
        Self { slug, status, title, meaning }
    }

    /// The last part of the URI.
    #[must_use]
    pub const fn slug(&self) -> &'static str {
        self.slug
    }

    /// The URI, as it stands in `type`.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("{TYPE_BASE}{}", self.slug)
    }

    /// The HTTP status of every problem of this type.
    #[must_use]
    pub const fn status(&self) -> StatusCode {
        self.status
    }

    /// The same for every problem of this type.
    #[must_use]
    pub const fn title(&self) -> &'static str {
        self.title
    }

    /// What it means and what a client should do: for documentation.
    #[must_use]
    pub const fn meaning(&self) -> &'static str {
        self.meaning
    }
}

/// Declares the shared types and the list of all of them.
macro_rules! problem_types {
    ($($(#[$doc:meta])* $name:ident = ($slug:literal, $status:ident, $title:literal, $meaning:literal);)*) => {
        $($(#[$doc])* pub static $name: ProblemType = ProblemType::new($slug, StatusCode::$status, $title, $meaning);)*

        /// Every shared type, for OpenAPI and the documentation.
        pub static SHARED_TYPES: &[&ProblemType] = &[$(&$name),*];
    };
}

problem_types! {
    /// 400: the request is not one.
    BAD_REQUEST = ("bad-request", BAD_REQUEST, "Bad request",
        "The request could not be understood. The same request will be refused again.");
    /// 400: fields, parameters or headers have values that they may not have.
    VALIDATION_FAILED = ("validation-failed", BAD_REQUEST, "Invalid values",
        "Fields, parameters or headers named in `errors` are missing, unknown, or have values they may not have.");
    /// 400: a cursor that this list did not give out.
    INVALID_CURSOR = ("invalid-cursor", BAD_REQUEST, "Invalid cursor",
        "The cursor was altered, or belongs to another list, filter or sort. Begin again without a cursor.");
    /// 401: no token, or one that is not valid.
    UNAUTHORIZED = ("unauthorized", UNAUTHORIZED, "Unauthorized",
        "The request carries no bearer token, or one that is not valid (any more). Get a new token.");
    /// 403: a valid token that does not allow this.
    FORBIDDEN = ("forbidden", FORBIDDEN, "Forbidden",
        "The token is valid, but its role does not allow this.");
    /// 404: there is no such resource.
    NOT_FOUND = ("not-found", NOT_FOUND, "Not found", "There is no such resource.");
    /// 405: the resource has no such method.
    METHOD_NOT_ALLOWED = ("method-not-allowed", METHOD_NOT_ALLOWED, "Method not allowed",
        "The resource is there, but not with this method; `Allow` lists those it has.");
    /// 409: the state of the resource does not allow it.
    CONFLICT = ("conflict", CONFLICT, "Conflict",
        "The state of the resource does not allow the request. Read it and decide again.");
    /// 412: the resource is not as the client expected it.
    PRECONDITION_FAILED = ("precondition-failed", PRECONDITION_FAILED, "Precondition failed",
        "The resource is not as `If-Match` or an expected value says. Read it and decide again.");
    /// 413: the body is larger than this resource takes.
    PAYLOAD_TOO_LARGE = ("payload-too-large", PAYLOAD_TOO_LARGE, "Payload too large",
        "The body is larger than this resource takes.");
    /// 415: the body is not of a media type that this resource takes.
    UNSUPPORTED_MEDIA_TYPE = ("unsupported-media-type", UNSUPPORTED_MEDIA_TYPE, "Unsupported media type",
        "The body is of a media type, or compressed in a way, that this resource does not take.");
    /// 422: well-formed, and cannot be done as it is.
    UNPROCESSABLE = ("unprocessable", UNPROCESSABLE_ENTITY, "Unprocessable",
        "The request is well-formed and cannot be carried out as it is.");
    /// 429: too many requests of this caller.
    TOO_MANY_REQUESTS = ("too-many-requests", TOO_MANY_REQUESTS, "Too many requests",
        "The caller sent more requests than its share. Wait for `Retry-After` seconds.");
    /// 500: a fault of ours.
    INTERNAL = ("internal", INTERNAL_SERVER_ERROR, "Internal error",
        "A fault of the service, on record under the id in `instance`. Whether a write took place is not known.");
    /// 503: not possible at this moment.
    UNAVAILABLE = ("unavailable", SERVICE_UNAVAILABLE, "Unavailable",
        "Something that the service needs is not there at the moment. Try again after `Retry-After` seconds.");
    /// 503: the projection is not there yet.
    NOT_YET_PROJECTED = ("not-yet-projected", SERVICE_UNAVAILABLE, "Not yet projected",
        "The read model has not reached the sequence asked for; `reached` is where it is. Try again after `Retry-After`.");
    /// 503: the keys that tokens are checked with could not be fetched yet.
    KEYS_UNAVAILABLE = ("keys-unavailable", SERVICE_UNAVAILABLE, "Keys unavailable",
        "The keys to check tokens with could not be fetched yet. Try again after `Retry-After` seconds.");
    /// 504: it took longer than a request may take.
    TIMEOUT = ("timeout", GATEWAY_TIMEOUT, "Timeout",
        "The request took too long and was given up. A write may or may not have taken place: repeat it under the same `Idempotency-Key`.");
}

/// One thing that is wrong in a request: where, and what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct FieldError {
    /// JSON Pointer (RFC 6901) into the body; empty for the whole body.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pointer: Option<String>,
    /// Name of the path or query parameter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameter: Option<String>,
    /// Name of the header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<String>,
    /// What is wrong with it.
    pub detail: String,
}

impl FieldError {
    /// An error in the body, at a JSON Pointer such as `/items/0/quantity`.
    #[must_use]
    pub fn at(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: Some(pointer.into()), parameter: None, header: None, detail: detail.into() }
    }

    /// An error in a path or query parameter.
    #[must_use]
    pub fn parameter(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: None, parameter: Some(name.into()), header: None, detail: detail.into() }
    }

    /// An error in a header.
    #[must_use]
    pub fn header(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self { pointer: None, parameter: None, header: Some(name.into()), detail: detail.into() }
    }
}

/// The body of a problem, as it is sent.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemDocument {
    /// URI of the type: programs branch on it.
    #[serde(rename = "type")]
    #[schema(example = "https://lomash.example/problems/validation-failed")]
    pub type_uri: String,
    /// The same for every problem of the type.
    pub title: Cow<'static, str>,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What is wrong this time, for people.
    pub detail: String,
    /// `urn:uuid:` and the id of the request, which is also in the log and in the header `X-Request-Id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// What is wrong where.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    pub errors: Vec<FieldError>,
    /// Further members that the type has, such as `expected`, `actual` or `retryAfterSeconds`.
    #[serde(flatten)]
    pub members: Map<String, Value>,
}

/// A problem on its way to the client.
#[derive(Debug, Clone)]
pub struct Problem(Box<Parts>);

#[derive(Debug, Clone)]
struct Parts {
    kind: &'static ProblemType,
    detail: Cow<'static, str>,
    errors: Vec<FieldError>,
    members: Map<String, Value>,
    headers: HeaderMap,
    instance: Option<Uuid>,
}

impl Problem {
    /// A problem of a type, with what is wrong this time.
    #[must_use]
    pub fn new(kind: &'static ProblemType, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Parts {
            kind,
            detail: detail.into(),
            errors: Vec::new(),
            members: Map::new(),
            headers: HeaderMap::new(),
            instance: None,
        }))
    }

    /// 400, the request as a whole.
    #[must_use]
    pub fn bad_request(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&BAD_REQUEST, detail)
    }

    /// 400, with each field, parameter or header that is wrong; at most [`MAX_FIELD_ERRORS`] are told.
    #[must_use]
    pub fn invalid(errors: impl IntoIterator<Item = FieldError>) -> Self {
        let mut all = errors.into_iter();
        let errors: Vec<FieldError> = all.by_ref().take(MAX_FIELD_ERRORS).collect();
        let detail = match (errors.as_slice(), all.next()) {
            ([only], None) => only.detail.clone(),
            (_, None) => format!("{} values are not as they must be.", errors.len()),
            (_, Some(_)) => format!("More than {MAX_FIELD_ERRORS} values are not as they must be."),
        };
        let mut problem = Self::new(&VALIDATION_FAILED, detail);
        problem.0.errors = errors;
        problem
    }

    /// 400, one field of the body at a JSON Pointer.
    #[must_use]
    pub fn invalid_field(pointer: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::invalid([FieldError::at(pointer, detail)])
    }

    /// 400, one path or query parameter.
    #[must_use]
    pub fn invalid_parameter(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::invalid([FieldError::parameter(name, detail)])
    }

    /// 400, one header.
    #[must_use]
    pub fn invalid_header(name: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::invalid([FieldError::header(name, detail)])
    }

    /// 401 without a token: `WWW-Authenticate: Bearer`, and nothing more, as RFC 6750 has it.
    #[must_use]
    pub fn no_token() -> Self {
        Self::new(&UNAUTHORIZED, "The request carries no bearer token in the header Authorization.")
            .with_header(WWW_AUTHENTICATE, "Bearer")
    }

    /// 401 with a token that is not valid; `why` holds nothing of the token.
    #[must_use]
    pub fn invalid_token(why: &'static str) -> Self {
        Self::new(&UNAUTHORIZED, why)
            .with_header(WWW_AUTHENTICATE, &format!("Bearer error=\"invalid_token\", error_description=\"{why}\""))
    }

    /// 403.
    #[must_use]
    pub fn forbidden(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&FORBIDDEN, detail).with_header(WWW_AUTHENTICATE, "Bearer error=\"insufficient_scope\"")
    }

    /// 404.
    #[must_use]
    pub fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&NOT_FOUND, detail)
    }

    /// 405; the router adds `Allow`.
    #[must_use]
    pub fn method_not_allowed() -> Self {
        Self::new(&METHOD_NOT_ALLOWED, "This resource does not have this method; the header Allow lists its methods.")
    }

    /// 409.
    #[must_use]
    pub fn conflict(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&CONFLICT, detail)
    }

    /// 412.
    #[must_use]
    pub fn precondition_failed(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&PRECONDITION_FAILED, detail)
    }

    /// 413, with the limit in bytes if it is known.
    #[must_use]
    pub fn payload_too_large(limit: Option<usize>) -> Self {
        match limit {
            Some(bytes) => Self::new(&PAYLOAD_TOO_LARGE, format!("The body may have {bytes} bytes at most."))
                .with("limitBytes", bytes),
            None => Self::new(&PAYLOAD_TOO_LARGE, "The body is larger than this resource takes."),
        }
    }

    /// 415.
    #[must_use]
    pub fn unsupported_media_type(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&UNSUPPORTED_MEDIA_TYPE, detail)
    }

    /// 422.
    #[must_use]
    pub fn unprocessable(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(&UNPROCESSABLE, detail)
    }

    /// 429, to be tried again after so many seconds.
    #[must_use]
    pub fn too_many_requests(detail: impl Into<Cow<'static, str>>, retry_after_seconds: u64) -> Self {
        Self::new(&TOO_MANY_REQUESTS, detail).with_retry_after(retry_after_seconds)
    }

    /// 500: `cause` goes to the log with the id of the request, and nothing of it to the client.
    #[must_use]
    pub fn internal(cause: impl fmt::Display) -> Self {
        let mut problem =
            Self::new(&INTERNAL, "The service failed in a way that is not the client's fault. It is on record.");
        let request = crate::server::request_id().unwrap_or_else(Uuid::new_v4);
        // The alternate form shows the causes of an error too, when it has them.
        tracing::error!(request.id = %request, "a request failed: {cause:#}");
        problem.0.instance = Some(request);
        problem
    }

    /// 503, to be tried again after so many seconds.
    #[must_use]
    pub fn unavailable(detail: impl Into<Cow<'static, str>>, retry_after_seconds: u64) -> Self {
        Self::new(&UNAVAILABLE, detail).with_retry_after(retry_after_seconds)
    }

    /// 504.
    #[must_use]
    pub fn timeout() -> Self {
        Self::new(&TIMEOUT, "The request took too long and was given up. A write may or may not have taken place.")
    }

    /// Adds a member to the document, such as `expected` or `actual`.
    #[must_use]
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Self {
        debug_assert!(!RESERVED_MEMBERS.contains(&member), "{member} is a member of every problem");
        self.0.members.insert(member.to_owned(), value.into());
        self
    }

    /// Adds what is wrong where.
    #[must_use]
    pub fn with_error(mut self, error: FieldError) -> Self {
        if self.0.errors.len() < MAX_FIELD_ERRORS {
            self.0.errors.push(error);
        }
        self
    }

    /// Adds the header `Retry-After` and the member `retryAfterSeconds`.
    #[must_use]
    pub fn with_retry_after(self, seconds: u64) -> Self {
        self.with_header(RETRY_AFTER, &seconds.to_string()).with("retryAfterSeconds", seconds)
    }

    /// Adds a header; a value that a header cannot hold is left out.
    #[must_use]
    pub fn with_header(mut self, name: HeaderName, value: &str) -> Self {
        match HeaderValue::from_str(value) {
            Ok(value) => drop(self.0.headers.insert(name, value)),
            Err(_) => debug_assert!(false, "{value:?} is no header value"),
        }
        self
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> &'static ProblemType {
        self.0.kind
    }

    /// Its HTTP status.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.0.kind.status
    }

    /// What is wrong this time.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// What is sent, for an answer that holds problems inside (a row of an import).
    #[must_use]
    pub fn document(&self) -> ProblemDocument {
        let Parts { kind, detail, errors, members, instance, .. } = &*self.0;
        ProblemDocument {
            type_uri: kind.uri(),
            title: Cow::Borrowed(kind.title),
            status: kind.status.as_u16(),
            detail: detail.clone().into_owned(),
            instance: instance.or_else(crate::server::request_id).map(|id| format!("urn:uuid:{id}")),
            errors: errors.clone(),
            members: members.clone(),
        }
    }
}

/// Members that every problem has, which an extension may not replace.
const RESERVED_MEMBERS: [&str; 6] = ["type", "title", "status", "detail", "instance", "errors"];

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.0.kind.status.as_u16(), self.0.kind.slug, self.0.detail)
    }
}

impl std::error::Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        // Strings, numbers and a map with string keys: this cannot fail, and an empty body would still carry the status.
        let body = serde_json::to_vec(&self.document()).unwrap_or_default();
        let mut response = (self.status(), body).into_response();
        let headers = response.headers_mut();
        headers.extend(self.0.headers);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        response
    }
}

/// As people write sentences.
#[must_use]
pub fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", letters.as_str().trim_end_matches('.'))
}

/// The fallback of a router: 404.
pub async fn no_such_route() -> Problem {
    Problem::not_found("There is nothing at this path.")
}

/// The fallback of a path that has other methods: 405.
pub async fn no_such_method() -> Problem {
    Problem::method_not_allowed()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    async fn sent(problem: Problem) -> (HeaderMap, Value) {
        let response = problem.into_response();
        let headers = response.headers().clone();
        let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.expect("a body");
        (headers, serde_json::from_slice(&body).expect("JSON"))
    }

    #[tokio::test]
    async fn a_problem_is_sent_as_rfc_9457_has_it() {
        static STALE: ProblemType = ProblemType::new("stale", StatusCode::PRECONDITION_FAILED, "Stale", "Read again.");
        let problem = Problem::new(&STALE, "It is at 7.")
            .with("expected", 6)
            .with("actual", 7)
            .with_error(FieldError::header("If-Match", "is \"6\""));
        let (headers, body) = sent(problem).await;
        assert_eq!(headers[CONTENT_TYPE], MEDIA_TYPE);
        let expected = serde_json::json!({
            "type": "https://lomash.example/problems/stale", "title": "Stale", "status": 412, "detail": "It is at 7.",
            "errors": [{ "header": "If-Match", "detail": "is \"6\"" }], "expected": 6, "actual": 7,
        });
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn waiting_is_told_twice_and_internals_are_not_told() {
        let (headers, body) = sent(Problem::unavailable("The ledger does not answer.", 3)).await;
        assert_eq!((&headers[RETRY_AFTER], &body["retryAfterSeconds"]), (&HeaderValue::from_static("3"), &3.into()));
        let (_, body) = sent(Problem::internal("password=hunter2")).await;
        assert!(!body.to_string().contains("hunter2"), "{body}");
        assert!(body["instance"].as_str().is_some_and(|id| id.starts_with("urn:uuid:")), "{body}");
    }

    #[test]
    fn types_are_told_apart_by_their_uri_and_errors_are_bounded() {
        let uris: HashSet<String> = SHARED_TYPES.iter().map(|kind| kind.uri()).collect();
        assert_eq!(uris.len(), SHARED_TYPES.len());
        let many = Problem::invalid((0..1000).map(|row| FieldError::at(format!("/{row}"), "is wrong")));
        assert_eq!(many.document().errors.len(), MAX_FIELD_ERRORS);
    }

    #[test]
    fn the_schema_has_what_is_sent() {
        let schema = <ProblemDocument as utoipa::PartialSchema>::schema();
        let schema = serde_json::to_value(schema).expect("JSON").to_string();
        for member in ["type", "title", "status", "detail", "instance", "errors"] {
            assert!(schema.contains(&format!("\"{member}\"")), "{member}: {schema}");
        }
    }
}
