//! Extractors that answer problems: [`Body`], [`Query`] and [`Path`].
//!
//! They decide about form only. Types refuse unknown fields themselves (`deny_unknown_fields`), and what values mean
//! is for the handler.

use std::error::Error as _;

use axum::extract::path::ErrorKind;
use axum::extract::rejection::{BytesRejection, FailedToBufferBody, PathRejection};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use bytes::Bytes;
use lomash_contract::objects::Objects;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use crate::problem::{FieldError, Problem};

/// A JSON body. 415 unless it says it is JSON and is not compressed, 413 beyond the body limit of the route, 400 with
/// a JSON Pointer when it is not as `T` must be.
#[derive(Debug, Clone, Copy)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        if !is_json(request.headers()) {
            return Err(Problem::unsupported_media_type("The body must be JSON: send Content-Type: application/json."));
        }
        refuse_compressed(request.headers())?;
        let bytes = Bytes::from_request(request, state).await.map_err(unreadable_body)?;
        parse_json(&bytes).map(Self)
    }
}

/// Refuses a body that says it is compressed: unpacked, it could be of any size.
///
/// # Errors
/// 415.
pub fn refuse_compressed(headers: &HeaderMap) -> Result<(), Problem> {
    let plain = headers.get_all(CONTENT_ENCODING).iter().all(|encoding| encoding.as_bytes() == b"identity");
    if plain { Ok(()) } else { Err(Problem::unsupported_media_type("The body must not be compressed.")) }
}

/// The media type of the body without its parameters, in lower case; None when there is none or more than one.
#[must_use]
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let essence = value.to_str().ok()?.split(';').next()?.trim();
    Some(essence.to_ascii_lowercase())
}

fn is_json(headers: &HeaderMap) -> bool {
    media_type(headers).is_some_and(|essence| {
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    })
}

/// A body that could not be read to its end: too large, too slow, or cut off.
#[must_use]
pub fn unreadable_body(rejection: BytesRejection) -> Problem {
    match rejection {
        BytesRejection::FailedToBufferBody(FailedToBufferBody::LengthLimitError(_)) => Problem::payload_too_large(None),
        other if other.status() == StatusCode::PAYLOAD_TOO_LARGE => Problem::payload_too_large(None),
        _ => Problem::bad_request("The body could not be read to its end: it was cut off, or came too slowly."),
    }
}

/// Parses JSON as a `T`, in which objects are objects and no lists.
///
/// # Errors
/// 400: `bad-request` when it is no JSON at all, `validation-failed` with a JSON Pointer when it is another JSON.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(Objects(&mut reader)).map_err(|error| {
        let cause = error.inner();
        if !cause.is_data() {
            return not_json(cause);
        }
        let detail = cause.to_string();
        Problem::invalid_field(pointer(error.path(), &detail), without_position(&detail))
    })?;
    reader.end().map_err(|error| not_json(&error))?;
    Ok(value)
}

fn not_json(error: &serde_json::Error) -> Problem {
    Problem::bad_request(format!("The body is not JSON: {error}."))
}

/// The JSON Pointer of a path; of a missing, unknown or repeated field, the pointer to that field.
fn pointer(path: &serde_path_to_error::Path, detail: &str) -> String {
    let mut pointer = String::new();
    let mut push = |segment: &str| {
        pointer.push('/');
        pointer.push_str(&segment.replace('~', "~0").replace('/', "~1"));
    };
    let mut last = None;
    for segment in path {
        match segment {
            Segment::Seq { index } => push(&index.to_string()),
            Segment::Map { key } => {
                push(key);
                last = Some(key.as_str());
            }
            // The name of a variant is a value or a tag; an unknown segment has no name.
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    let about = ["missing field `", "unknown field `", "duplicate field `"];
    let about = about.iter().find_map(|beginning| detail.strip_prefix(beginning));
    let field = about.and_then(|rest| rest.split('`').next());
    if let Some(field) = field.filter(|field| Some(*field) != last) {
        push(field);
    }
    pointer
}

/// serde_json's sentence without ` at line 1 column 7`: the pointer says where.
fn without_position(detail: &str) -> String {
    detail.split(" at line ").next().unwrap_or(detail).to_owned()
}

/// Query parameters as a `T`; 400 with the name of the parameter when they are not.
#[derive(Debug, Clone, Copy)]
pub struct Query<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        match axum::extract::Query::<T>::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(value)) => Ok(Self(value)),
            Err(rejection) => {
                let cause = rejection.source().map_or_else(|| rejection.body_text(), ToString::to_string);
                Err(invalid_query(&cause))
            }
        }
    }
}

/// The cause reads `name: what is wrong`, or names the parameter in backticks.
fn invalid_query(cause: &str) -> Problem {
    let named = cause.split_once(": ").filter(|(name, _)| !name.is_empty() && !name.contains([' ', '`', '"']));
    if let Some((name, detail)) = named {
        return Problem::invalid_parameter(name, detail);
    }
    let quoted = cause.split('`').nth(1).filter(|name| !name.is_empty());
    match quoted {
        Some(name) => Problem::invalid_parameter(name, cause),
        None => Problem::bad_request(format!("The query is not as it must be: {cause}.")),
    }
}

/// Path parameters as a `T`; 400 with the name of the parameter when they are not.
#[derive(Debug, Clone, Copy)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(rejection) => Err(invalid_path(&rejection)),
        }
    }
}

fn invalid_path(rejection: &PathRejection) -> Problem {
    let PathRejection::FailedToDeserializePathParams(failed) = rejection else {
        return Problem::internal(rejection);
    };
    match failed.kind() {
        ErrorKind::ParseErrorAtKey { key, expected_type, .. } => {
            Problem::invalid_parameter(key, format!("must be {}", described(expected_type)))
        }
        ErrorKind::DeserializeError { key, message, .. } => Problem::invalid_parameter(key, message),
        ErrorKind::InvalidUtf8InPathParam { key } => Problem::invalid_parameter(key, "is not UTF-8"),
        ErrorKind::ParseError { expected_type, .. } | ErrorKind::ParseErrorAtIndex { expected_type, .. } => {
            Problem::bad_request(format!("A part of the path must be {}.", described(expected_type)))
        }
        ErrorKind::Message(message) => Problem::bad_request(format!("The path is not as it must be: {message}.")),
        other => Problem::internal(other),
    }
}

/// A Rust type as a client may read it.
fn described(expected_type: &str) -> &str {
    match expected_type {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "bool" => "true or false",
        other => other,
    }
}

/// One header as text, at most once; None when it is not there.
///
/// # Errors
/// 400 when it is there more than once, or is not printable ASCII.
pub fn single_header<'a>(headers: &'a HeaderMap, name: &'static str) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            let text = value.to_str().map_err(|_| Problem::invalid_header(name, "must be printable ASCII"))?;
            Ok(Some(text))
        }
        (Some(_), Some(_)) => Err(Problem::invalid([FieldError::header(name, "must not be repeated")])),
    }
}

/// Checks the text of a query parameter that names a value: Postgres bears no NUL, and what is longer than any value is a
/// mistake.
///
/// # Errors
/// 400 when it has a NUL, or more than `most` characters.
pub fn check_text(name: &str, text: Option<&str>, most: usize) -> Result<(), Problem> {
    let text = text.unwrap_or_default();
    if text.contains('\0') {
        return Err(Problem::invalid_parameter(name, "must not contain NUL"));
    }
    if text.chars().count() > most {
        return Err(Problem::invalid_parameter(name, format!("must have at most {most} characters")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;
    use crate::problem::{BAD_REQUEST, VALIDATION_FAILED};

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    #[allow(dead_code, reason = "only whether it can be read is looked at")]
    struct Order {
        order_id: uuid::Uuid,
        lines: Vec<Line>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only whether it can be read is looked at")]
    struct Line {
        quantity: u32,
    }

    const ID: &str = "0b9f5c2e-7a34-4c0e-9a52-2f4f2f6f1a11";

    #[test]
    fn wrong_fields_are_pointed_at() {
        for (body, pointer) in [
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1}},{{"quantity":-1}}]}}"#), "/lines/1/quantity"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1e99}}]}}"#), "/lines/0/quantity"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{}}]}}"#), "/lines/0/quantity"),
            (format!(r#"{{"orderId":"{ID}","lines":[],"a/b~c":1}}"#), "/a~1b~0c"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1,"price":2}}]}}"#), "/lines/0/price"),
            (format!(r#"{{"orderId":"{ID}","orderId":"{ID}","lines":[]}}"#), "/orderId"),
            (r#"{"orderId":"'; DROP","lines":[]}"#.to_owned(), "/orderId"),
            (r#"{"lines":[]}"#.to_owned(), "/orderId"),
            ("[]".to_owned(), ""),
            (format!(r#"["{ID}",[]]"#), ""),
            (format!(r#"{{"orderId":"{ID}","lines":[[1]]}}"#), "/lines/0"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1.0}}]}}"#), "/lines/0/quantity"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1e2}}]}}"#), "/lines/0/quantity"),
            (format!(r#"{{"orderId":"{ID}","lines":[{{"quantity":1,"quantity":2}}]}}"#), "/lines/0/quantity"),
            ("null".to_owned(), ""),
        ] {
            let problem = parse_json::<Order>(body.as_bytes()).expect_err(&body);
            assert_eq!(problem.kind(), &VALIDATION_FAILED, "{body}: {problem}");
            assert_eq!(problem.document().errors[0].pointer.as_deref(), Some(pointer), "{body}: {problem}");
        }
    }

    #[test]
    fn what_is_no_json_is_a_bad_request() {
        let deep = "[".repeat(100_000);
        for body in ["", "{", "nonsense", "{} {}", "\u{1}", deep.as_str()] {
            let problem = parse_json::<serde_json::Value>(body.as_bytes()).expect_err("refused");
            assert_eq!(problem.kind(), &BAD_REQUEST, "{problem}");
        }
        assert_eq!(parse_json::<String>(b"\"\xff\"").expect_err("not UTF-8").status(), StatusCode::BAD_REQUEST);
    }

    #[test]
    fn media_types_are_read_without_their_parameters() {
        let json = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, value.parse().expect("a header value"));
            is_json(&headers)
        };
        for yes in ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"] {
            assert!(json(yes), "{yes}");
        }
        for no in ["text/json", "application/x-www-form-urlencoded", "application/jsonp", "json", ""] {
            assert!(!json(no), "{no}");
        }
    }
}
