//! `ETag`, `If-Match` and `If-None-Match` (RFC 9110): the version of a product is its entity tag.

use axum::http::header::{IF_MATCH, IF_NONE_MATCH};
use axum::http::{HeaderMap, HeaderValue};
use lomash_web::Problem;

/// Tags of one `If-Match` or `If-None-Match`; who knows a product knows one version of it.
const MAX_TAGS: usize = 16;

/// The entity tag of a version.
pub(super) fn etag(version: u64) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{version}\"")).expect("digits in quotes are a header value")
}

/// The versions of which one must be the present one; empty when the request does not ask, or for any (`*`).
///
/// # Errors
/// 400 when it is no list of tags; 412 when no version of ours has such a tag.
pub(super) fn if_match(headers: &HeaderMap) -> Result<Vec<u64>, Problem> {
    let Some(tags) = tags(headers, IF_MATCH.as_str())? else { return Ok(Vec::new()) };
    // A weak tag never matches here.
    let versions: Vec<u64> = tags.iter().filter(|tag| !tag.weak).filter_map(|tag| tag.version).collect();
    if versions.is_empty() {
        return Err(Problem::precondition_failed("No tag of If-Match is one of this service; read the product again."));
    }
    Ok(versions)
}

/// Whether the client has this version already.
///
/// # Errors
/// 400 when it is no list of tags.
pub(super) fn is_known(headers: &HeaderMap, version: u64) -> Result<bool, Problem> {
    if !headers.contains_key(IF_NONE_MATCH) {
        return Ok(false);
    }
    Ok(tags(headers, IF_NONE_MATCH.as_str())?.is_none_or(|tags| tags.iter().any(|tag| tag.version == Some(version))))
}

struct Tag {
    weak: bool,
    version: Option<u64>,
}

/// None for no header and for `*`.
fn tags(headers: &HeaderMap, name: &'static str) -> Result<Option<Vec<Tag>>, Problem> {
    let mut found = Vec::new();
    let bad = || Problem::invalid_header(name, "must be `*` or a list of entity tags such as \"17\"");
    let mut any = false;
    for value in headers.get_all(name) {
        if value.as_bytes().trim_ascii() == b"*" {
            any = true;
            continue;
        }
        let mut rest = value.as_bytes();
        while let Some((tag, after)) = next_tag(rest).ok_or_else(bad)? {
            found.push(tag);
            if found.len() > MAX_TAGS {
                return Err(Problem::invalid_header(name, format!("has more than {MAX_TAGS} tags")));
            }
            rest = after;
        }
    }
    match (any, found.is_empty(), headers.contains_key(name)) {
        (true, true, _) | (false, true, false) => Ok(None),
        (true, false, _) | (false, true, true) => Err(bad()),
        (false, false, _) => Ok(Some(found)),
    }
}

/// The first entity tag of a list and what follows it (RFC 9110, 8.8.3 and 5.6.1): between its quotes a tag has any visible
/// character but a quote, a comma too, and bytes beyond ASCII. `Some(None)` at the end of the list; none when it is no list.
fn next_tag(list: &[u8]) -> Option<Option<(Tag, &[u8])>> {
    let is_between = |byte: &u8| matches!(byte, b',' | b' ' | b'\t');
    let begin = list.iter().position(|byte| !is_between(byte));
    let Some(begin) = begin else { return Some(None) };
    let tag = &list[begin..];
    let (weak, quoted) = tag.strip_prefix(b"W/").map_or((false, tag), |strong| (true, strong));
    let opaque = quoted.strip_prefix(b"\"")?;
    let end = opaque.iter().position(|byte| *byte == b'"')?;
    let (opaque, rest) = (&opaque[..end], opaque[end + 1..].trim_ascii_start());
    let is_opaque = |byte: &u8| matches!(byte, 0x21 | 0x23..=0x7e | 0x80..);
    if !opaque.iter().all(is_opaque) || !(rest.is_empty() || rest.starts_with(b",")) {
        return None;
    }
    let digits = !opaque.is_empty() && opaque.iter().all(u8::is_ascii_digit);
    let version = std::str::from_utf8(opaque).ok().filter(|_| digits).and_then(|digits| digits.parse().ok());
    Some(Some((Tag { weak, version }, rest)))
}

#[cfg(test)]
mod tests {
    use axum::http::StatusCode;

    use super::*;

    fn headers(name: &'static str, values: &[&str]) -> HeaderMap {
        let value = |text: &&str| HeaderValue::from_bytes(text.as_bytes()).expect("a value");
        values.iter().map(|text| (name.parse().expect("a name"), value(text))).collect()
    }

    #[test]
    fn if_match_by_the_book() {
        type Row = (&'static [&'static str], Result<&'static [u64], u16>);
        let table: &[Row] = &[
            (&[], Ok(&[])),
            (&["*"], Ok(&[])),
            (&["\"17\""], Ok(&[17])),
            (&["\"17\", \"18\"", "\"19\""], Ok(&[17, 18, 19])),
            (&["W/\"17\""], Err(412)),
            (&["W/\"17\", \"18\""], Ok(&[18])),
            (&["\"abc\""], Err(412)),
            (&["\"+17\""], Err(412)),
            (&["\"99999999999999999999999\""], Err(412)),
            // A comma, or anything else that can be seen, within quotes is of the tag.
            (&["\"a,b\""], Err(412)),
            (&["\"a,b\", \"17\""], Ok(&[17])),
            (&["\"17\",W/\"a,\",\"18\""], Ok(&[17, 18])),
            (&["\"\""], Err(412)),
            (&["\"*\""], Err(412)),
            (&["\"\\\""], Err(412)),
            (&["\"ü\""], Err(412)),
            (&[",, \"17\" ,\t,\"18\","], Ok(&[17, 18])),
            (&["\"17\" \"18\""], Err(400)),
            (&["\"17\"x"], Err(400)),
            (&["\"17"], Err(400)),
            (&["\"a b\""], Err(400)),
            (&["w/\"17\""], Err(400)),
            (&["W/ \"17\""], Err(400)),
            (&["W/17"], Err(400)),
            (&[","], Err(400)),
            (&["17"], Err(400)),
            (&[""], Err(400)),
            (&["*, \"17\""], Err(400)),
            (&["*", "\"17\""], Err(400)),
        ];
        for (values, expected) in table {
            let found = if_match(&headers("if-match", values)).map_err(|problem| problem.status());
            let expected = expected.map(<[u64]>::to_vec).map_err(|code| StatusCode::from_u16(code).expect("a status"));
            assert_eq!(found, expected, "{values:?}");
        }
        let many = vec!["\"1\""; MAX_TAGS + 1];
        assert!(if_match(&headers("if-match", &many)).is_err());
    }

    #[test]
    fn if_none_match_by_the_book() {
        for (values, expected) in [
            (&[][..], false),
            (&["*"], true),
            (&["\"17\""], true),
            (&["W/\"17\""], true),
            (&["\"16\""], false),
            (&["\"a,b\""], false),
            (&["\"a,b\",W/\"17\""], true),
            (&["\"a,17\""], false),
        ] {
            let found = is_known(&headers("if-none-match", values), 17).map_err(|problem| problem.status());
            assert_eq!(found, Ok(expected), "{values:?}");
        }
        for bad in ["17", "\"a", "\"17\" \"18\""] {
            assert!(is_known(&headers("if-none-match", &[bad]), 17).is_err(), "{bad}");
        }
    }
}
