//! Cursors: where a list goes on, as one opaque word for a URL.
//!
//! A cursor holds the position after the last row of a page (the values the list is sorted by, and a tie-breaker)
//! and a check over position and query. It is not secret and not signed: whoever builds one by hand gets another
//! position of a list that they may read anyway. The check tells an honest client that it mixed up two lists.
//!
//! Bytes: version, 8 bytes of SHA-256 over version, query and position, then the position as JSON; as base64url.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::problem::{FieldError, INVALID_CURSOR, Problem};

/// Longest cursor that is read, in characters. A name of 200 characters and an id fit in any script.
pub const MAX_CURSOR_CHARS: usize = 4096;

/// The first byte; another layout gets another one, and old cursors are refused.
const VERSION: u8 = 1;
/// Bytes of the check: it finds mistakes, not attacks.
const CHECK_BYTES: usize = 8;

/// The cursor for `position` in the list that `query` (filters and sort, without limit and cursor) selects.
///
/// Both must serialise the same way each time: no hash maps.
///
/// # Errors
/// An internal problem when they do not serialise, which is a fault of the caller.
pub fn seal(query: &impl Serialize, position: &impl Serialize) -> Result<String, Problem> {
    let position = serde_json::to_vec(position).map_err(Problem::internal)?;
    let mut bytes = Vec::with_capacity(1 + CHECK_BYTES + position.len());
    bytes.push(VERSION);
    bytes.extend_from_slice(&check(query, &position)?);
    bytes.extend_from_slice(&position);
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}

/// The position in a cursor that [`seal`] made for the same query.
///
/// # Errors
/// 400 `invalid-cursor` for anything else.
pub fn open<P: DeserializeOwned>(query: &impl Serialize, cursor: &str) -> Result<P, Problem> {
    if cursor.len() > MAX_CURSOR_CHARS {
        return Err(invalid());
    }
    let bytes = URL_SAFE_NO_PAD.decode(cursor).map_err(|_| invalid())?;
    let Some((VERSION, rest)) = bytes.split_first().map(|(version, rest)| (*version, rest)) else {
        return Err(invalid());
    };
    let (found, position) = rest.split_at_checked(CHECK_BYTES).ok_or_else(invalid)?;
    if found != check(query, position)? {
        return Err(invalid());
    }
    serde_json::from_slice(position).map_err(|_| invalid())
}

fn check(query: &impl Serialize, position: &[u8]) -> Result<[u8; CHECK_BYTES], Problem> {
    let query = serde_json::to_vec(query).map_err(Problem::internal)?;
    let mut hash = Sha256::new();
    hash.update([VERSION]);
    hash.update(u64::try_from(query.len()).unwrap_or(u64::MAX).to_be_bytes());
    hash.update(&query);
    hash.update(position);
    let mut check = [0; CHECK_BYTES];
    check.copy_from_slice(&hash.finalize()[..CHECK_BYTES]);
    Ok(check)
}

fn invalid() -> Problem {
    let detail = "The cursor was altered, or belongs to another list, filter or sort. Begin again without it.";
    Problem::new(&INVALID_CURSOR, detail).with_error(FieldError::parameter("cursor", "is not a cursor of this list"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_comes_back_as_it_was() {
        let query = ("category", Some("kitchens"), "-name");
        let position = ("Spüle \"Ünal\" ~/".to_owned(), 42_u64);
        let cursor = seal(&query, &position).expect("sealed");
        assert!(cursor.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'), "{cursor}");
        assert_eq!(open::<(String, u64)>(&query, &cursor).expect("opened"), position);
    }

    #[test]
    fn the_longest_names_fit() {
        let name = "\u{1}".repeat(200);
        let cursor = seal(&"q", &(name, uuid::Uuid::nil())).expect("sealed");
        assert!(cursor.len() <= MAX_CURSOR_CHARS, "{}", cursor.len());
    }

    #[test]
    fn whatever_is_not_a_cursor_of_this_list_is_refused() {
        let cursor = seal(&"one query", &("a", 1)).expect("sealed");
        let refused = |query: &str, cursor: &str| {
            let problem = open::<(String, u64)>(&query, cursor).expect_err("refused");
            assert_eq!(problem.kind(), &INVALID_CURSOR);
        };
        refused("another query", &cursor);
        refused("one query", "");
        refused("one query", "not base64!");
        refused("one query", &cursor[..8]);
        refused("one query", &format!("{cursor}AAAA"));
        refused("one query", &"A".repeat(MAX_CURSOR_CHARS + 1));
        for at in 0..cursor.len() - 1 {
            let mut altered = cursor.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            refused("one query", &String::from_utf8(altered).expect("ASCII"));
        }
        // The right form and another type inside.
        refused("one query", &seal(&"one query", &"only text").expect("sealed"));
    }
}
