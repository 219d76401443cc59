//! W3C trace context, as far as it is believed: <https://www.w3.org/TR/trace-context/>.
//!
//! The one place where text from outside becomes trace context. It is copied to every event that a request causes, so what
//! is of another form, or larger than a caller can need, is dropped here, and nothing else happens to whoever sent it.

/// Most bytes of a `traceparent` and its `tracestate` together. W3C asks for at least 512 of `tracestate` to be handed on; what
/// is larger is dropped rather than cut, for half a member would be another one.
pub const MAX_TRACE_BYTES: usize = 512;

/// Most members of a `tracestate`, as W3C has it.
const MAX_MEMBERS: usize = 32;

/// Longest key and longest value of a member, as W3C has them.
const MAX_MEMBER_PART: usize = 256;

/// Bytes of a `traceparent` of version 00, and of what later versions begin with.
const TRACEPARENT_BYTES: usize = 55;

/// A `traceparent` of W3C's form, and the `tracestate` beside it when that has W3C's form too. One allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    /// The one and then the other.
    text: Box<str>,
    /// Where the former ends.
    state_from: u16,
}

const _: () = assert!(MAX_TRACE_BYTES <= u16::MAX as usize);

impl TraceContext {
    /// What two headers say: nothing without a valid `traceparent`; without a valid `tracestate`, only the former.
    #[must_use]
    pub fn parse(traceparent: Option<&str>, tracestate: Option<&str>) -> Option<Self> {
        let (traceparent, tracestate) = accepted(traceparent, tracestate)?;
        let state_from = u16::try_from(traceparent.len()).ok()?;
        let text = match tracestate {
            None => traceparent.into(),
            Some(tracestate) => [traceparent, tracestate].concat().into(),
        };
        Some(Self { text, state_from })
    }

    /// The `traceparent`.
    #[must_use]
    pub fn traceparent(&self) -> &str {
        &self.text[..usize::from(self.state_from)]
    }

    /// The `tracestate`.
    #[must_use]
    pub fn tracestate(&self) -> Option<&str> {
        Some(&self.text[usize::from(self.state_from)..]).filter(|state| !state.is_empty())
    }
}

/// What of two headers is trace context.
pub(super) fn accepted<'t>(
    traceparent: Option<&'t str>,
    tracestate: Option<&'t str>,
) -> Option<(&'t str, Option<&'t str>)> {
    let traceparent = traceparent.filter(|text| is_traceparent(text))?;
    let fits = |state: &&str| traceparent.len() + state.len() <= MAX_TRACE_BYTES && is_tracestate(state);
    Some((traceparent, tracestate.filter(fits)))
}

fn is_traceparent(text: &str) -> bool {
    let bytes = text.as_bytes();
    if bytes.len() < TRACEPARENT_BYTES || bytes.len() > MAX_TRACE_BYTES {
        return false;
    }
    let hex = |bytes: &[u8]| bytes.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let id = |bytes: &[u8]| hex(bytes) && bytes.iter().any(|byte| *byte != b'0');
    let (version, rest) = (&bytes[..2], &bytes[TRACEPARENT_BYTES..]);
    let ends = match version {
        b"00" => rest.is_empty(),
        b"ff" => false,
        // A later version may say more, of which nobody knows what.
        _ => rest.is_empty() || rest[0] == b'-' && rest.iter().all(|byte| byte.is_ascii_graphic()),
    };
    ends && hex(version)
        && [2, 35, 52].iter().all(|dash| bytes[*dash] == b'-')
        && id(&bytes[3..35])
        && id(&bytes[36..52])
        && hex(&bytes[53..55])
}

fn is_tracestate(text: &str) -> bool {
    let mut keys = [""; MAX_MEMBERS];
    for (at, member) in text.split(',').enumerate() {
        let member = member.trim_matches([' ', '\t']);
        if at == MAX_MEMBERS {
            return false;
        }
        if !member.is_empty() {
            let Some((key, value)) = member.split_once('=') else { return false };
            if !is_key(key) || !is_value(value) || keys[..at].contains(&key) {
                return false;
            }
            keys[at] = key;
        }
    }
    keys.iter().any(|key| !key.is_empty())
}

fn is_key(key: &str) -> bool {
    let begins = |byte: &u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9');
    let goes_on = |byte: &u8| begins(byte) || matches!(byte, b'_' | b'-' | b'*' | b'/' | b'@');
    let bytes = key.as_bytes();
    bytes.len() <= MAX_MEMBER_PART && bytes.first().is_some_and(begins) && bytes.iter().all(goes_on)
}

/// Blanks at its end are cut off before, with those around the member.
fn is_value(value: &str) -> bool {
    let fits = (1..=MAX_MEMBER_PART).contains(&value.len());
    fits && value.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b',' && byte != b'=')
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_traceparent_is_of_w3c_s_form_or_nothing() {
        let long = format!("01{}-{}", &PARENT[2..], "x".repeat(MAX_TRACE_BYTES - TRACEPARENT_BYTES - 1));
        for good in [
            PARENT.to_owned(),
            PARENT.replace("-01", "-ff"),
            format!("cc{}", &PARENT[2..]),
            format!("cc{}-what-will-be", &PARENT[2..]),
            long.clone(),
        ] {
            let read = TraceContext::parse(Some(&good), None).expect(&good);
            assert_eq!((read.traceparent(), read.tracestate()), (good.as_str(), None));
        }
        for bad in [
            String::new(),
            "garbage".to_owned(),
            "00-4bf9-00f0-01".to_owned(),
            PARENT.to_uppercase(),
            format!("ff{}", &PARENT[2..]),
            format!("0x{}", &PARENT[2..]),
            format!("{PARENT}-more"),
            format!("{PARENT} "),
            format!("cc{}.more", &PARENT[2..]),
            format!("cc{}-more\r\n", &PARENT[2..]),
            format!("{long}x"),
            PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
            PARENT.replace("-01", "-0g"),
            PARENT.replace('-', "_"),
            PARENT.replace('4', "\u{e9}"),
        ] {
            assert_eq!(TraceContext::parse(Some(&bad), Some("shop=7")), None, "{bad}");
        }
        assert_eq!(TraceContext::parse(None, Some("shop=7")), None);
    }

    #[test]
    fn a_tracestate_that_is_none_costs_only_itself() {
        let members = |count: usize| (0..count).map(|n| format!("k{n}=v")).collect::<Vec<_>>().join(",");
        // Exactly at the limit of both together, in members of a length that W3C allows.
        let full = {
            let state = format!("a={},b=", "v".repeat(200));
            let rest = MAX_TRACE_BYTES - TRACEPARENT_BYTES - state.len();
            format!("{state}{}", "w".repeat(rest))
        };
        for good in
            ["shop=7", "a=1, b=2\t,c=3", "1@x=y", "a/b*c-d_e=z", "a=x y", "a=1,,b=2", &full, &members(MAX_MEMBERS)]
        {
            let read = TraceContext::parse(Some(PARENT), Some(good)).expect("a context");
            assert_eq!((read.traceparent(), read.tracestate()), (PARENT, Some(good)), "{good}");
        }
        for bad in [
            "",
            " , ",
            "shop",
            "=7",
            "shop=",
            "Shop=7",
            "_shop=7",
            "shop=7=8",
            "shop=\u{1}",
            "shop=k\u{fc}che",
            "shop=7,shop=8",
            "a=1\r\nNats-Rollup: all",
            &format!("{full}w"),
            &format!("{}=1", "k".repeat(MAX_MEMBER_PART + 1)),
            &format!("a={}", "v".repeat(MAX_MEMBER_PART + 1)),
            &members(MAX_MEMBERS + 1),
            &"x".repeat(65_420),
        ] {
            let read = TraceContext::parse(Some(PARENT), Some(bad)).expect("a context");
            assert_eq!((read.traceparent(), read.tracestate()), (PARENT, None), "{bad}");
        }
    }
}
