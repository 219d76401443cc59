//! Dead letters: messages that cannot be handled, kept with their reason so that nothing is swallowed.
//!
//! A letter is the original message (payload and headers) under `lomash.dlq.{consumer}` with headers that say where
//! it came from and why it is here. Its `Nats-Msg-Id` is made of consumer, stream, sequence and the number of redrives, so a
//! message that dies twice is one letter, and one that dies again after a redrive is another.
//!
//! A letter always fits: of a message whose headers or payload are larger than a letter's may be, the letter holds what fits, and says
//! how large they were ([`HEADER_BYTES`], [`PAYLOAD_BYTES`]). The original stays in its stream, from which it is redriven.
//!
//! What operators do with letters (list, redrive, discard) is in `letters.rs`, for the command line and HTTP alike.

mod letters;

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::letters::{
    Cut, Filter, Letter, Letters, LettersError, MAX_SCANNED, MAX_SCANNED_BYTES, Origin, Page, Redriven, Way, Whole,
};
use crate::jetstream::header_text;

/// The stream that holds the letters.
pub const STREAM: &str = "DEAD_LETTERS";
/// Stream the message died in.
pub const ORIGIN_STREAM: &str = "Lomash-Dead-Stream";
/// Subject it was published on.
pub const ORIGIN_SUBJECT: &str = "Lomash-Dead-Subject";
/// Its sequence in that stream.
pub const ORIGIN_SEQUENCE: &str = "Lomash-Dead-Sequence";
/// Its own `Nats-Msg-Id`, kept apart from the letter's.
pub const ORIGIN_MESSAGE_ID: &str = "Lomash-Dead-Message-Id";
/// The consumer that gave it up.
pub const CONSUMER: &str = "Lomash-Dead-Consumer";
/// How often it was tried: deliveries, and tries of the loop itself within one.
pub const DELIVERIES: &str = "Lomash-Dead-Deliveries";
/// Why, as a sentence.
pub const REASON: &str = "Lomash-Dead-Reason";
/// How often it was brought back before it died this time; not there when never. Travels with the redriven message.
pub const REDRIVES: &str = "Lomash-Dead-Redrives";
/// Its former deaths, a header each, the oldest first. Travels with the redriven message.
pub const HISTORY: &str = "Lomash-Dead-History";

/// How many bytes the headers of the original have, where the letter does not hold all of them; not there otherwise.
pub const HEADER_BYTES: &str = "Lomash-Dead-Header-Bytes";
/// How many bytes the payload of the original has, where the letter holds only its beginning; not there otherwise.
pub const PAYLOAD_BYTES: &str = "Lomash-Dead-Payload-Bytes";

/// All headers that a letter has beside those of its original.
pub const HEADERS: [&str; 11] = [
    ORIGIN_STREAM,
    ORIGIN_SUBJECT,
    ORIGIN_SEQUENCE,
    ORIGIN_MESSAGE_ID,
    CONSUMER,
    DELIVERIES,
    REASON,
    REDRIVES,
    HISTORY,
    HEADER_BYTES,
    PAYLOAD_BYTES,
];

/// What all of them begin with.
const PREFIX: &str = "Lomash-Dead-";

/// Longest reason that is kept, in characters.
pub const MAX_REASON_CHARS: usize = 1_000;

/// Former deaths that are kept; of more, the last ones.
pub const MAX_HISTORY: usize = 5;

/// Longest record of a former death, in characters.
pub const MAX_HISTORY_CHARS: usize = 300;

/// Longest `Nats-Msg-Id` of an original that is kept, in characters: a UUID has 36.
pub const MAX_MESSAGE_ID_CHARS: usize = 256;

/// Longest subject of an original that is kept, in characters. The server takes up to 4 KiB in a line of its protocol.
pub const MAX_SUBJECT_CHARS: usize = 4_096;

/// Bytes of the original's headers that a letter holds.
pub const MAX_HEADER_BYTES: usize = 16 << 10;

/// Bytes of the original's payload that a letter holds: all of the largest message that one of our streams takes.
pub const MAX_PAYLOAD_BYTES: usize = 512 << 10;

/// Bytes of one header line beside name and value.
const LINE_BYTES: usize = ": \r\n".len();

/// Most bytes of the headers that a letter has of its own: the long texts with up to four bytes a character, and room for the
/// names, the numbers, and what we know to be short.
const OWN_HEADER_BYTES: usize =
    4 * (MAX_REASON_CHARS + MAX_HISTORY * MAX_HISTORY_CHARS + MAX_MESSAGE_ID_CHARS + MAX_SUBJECT_CHARS) + 2_048;

/// What the server takes as headers of a stored message (error 10097).
const SERVER_HEADER_BYTES: usize = u16::MAX as usize;

/// `max_msg_size` of the stream, and `max_payload` of a server.
const STREAM_MESSAGE_BYTES: usize = 1 << 20;

const _: () = assert!(MAX_HEADER_BYTES + OWN_HEADER_BYTES <= SERVER_HEADER_BYTES, "a letter's headers always fit");
const _: () = assert!(
    MAX_HEADER_BYTES + OWN_HEADER_BYTES + MAX_PAYLOAD_BYTES <= STREAM_MESSAGE_BYTES,
    "a letter always fits into its stream"
);

/// How long the stream may take to confirm a letter; the original is kept until it has.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of a message before it came back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Past {
    /// How often it was brought back.
    pub redrives: u32,
    /// Its former deaths, the oldest first.
    pub history: Vec<String>,
}

impl Past {
    /// What a message's headers say of it. They come from outside: what is there is bounded and never trusted further than
    /// to be shown.
    #[must_use]
    pub fn of(headers: Option<&HeaderMap>) -> Self {
        let Some(headers) = headers else { return Self::default() };
        let redrives = headers.get(REDRIVES).and_then(|text| text.as_str().parse().ok()).unwrap_or(0);
        let history = headers.get_all(HISTORY).map(|entry| bounded(entry.as_str(), MAX_HISTORY_CHARS)).collect();
        Self { redrives, history }.trimmed()
    }

    /// With one more death, to be brought back once more.
    #[must_use]
    fn and_redriven_after(mut self, death: &str) -> Self {
        self.redrives = self.redrives.saturating_add(1);
        self.history.push(bounded(death, MAX_HISTORY_CHARS));
        self.trimmed()
    }

    fn trimmed(mut self) -> Self {
        self.history.drain(..self.history.len().saturating_sub(MAX_HISTORY));
        self
    }

    fn write(&self, headers: &mut HeaderMap) {
        if self.redrives > 0 {
            headers.insert(REDRIVES, self.redrives.to_string());
        }
        for death in &self.history {
            headers.append(HISTORY, death.as_str());
        }
    }
}

fn bounded(text: &str, chars: usize) -> String {
    header_text(text).chars().take(chars).collect()
}

/// The headers of a message that are its publisher's: the server acts on its own, and on a copy they would mean something
/// else; ours are written anew.
fn publisher_headers(original: &HeaderMap) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, values) in original.iter() {
        let text: &str = name.as_ref();
        if !text.starts_with("Nats-") && !text.starts_with(PREFIX) {
            for value in values {
                headers.append(name.clone(), value.clone());
            }
        }
    }
    headers
}

/// Bytes of the lines that these headers take.
fn header_bytes(headers: &HeaderMap) -> usize {
    let lines =
        headers.iter().flat_map(|(name, values)| values.iter().map(|value| line_bytes(name.as_ref(), value.as_str())));
    lines.sum()
}

const fn line_bytes(name: &str, value: &str) -> usize {
    name.len() + value.len() + LINE_BYTES
}

/// As many of these headers as a letter may hold, and the bytes of all of them when that is not all.
fn fitting(headers: HeaderMap) -> (HeaderMap, Option<usize>) {
    let all = header_bytes(&headers);
    if all <= MAX_HEADER_BYTES {
        return (headers, None);
    }
    let (mut kept, mut room) = (HeaderMap::new(), MAX_HEADER_BYTES);
    for (name, values) in headers.iter() {
        for value in values {
            // The smaller ones say more than the one that is too large.
            if let Some(left) = room.checked_sub(line_bytes(name.as_ref(), value.as_str())) {
                room = left;
                kept.append(name.clone(), value.clone());
            }
        }
    }
    (kept, Some(all))
}

/// How many letters wait to be redriven or discarded; nothing when the server does not say.
pub async fn count(context: &Context) -> Option<u64> {
    let answer: Result<serde_json::Value, _> = context.request(format!("STREAM.INFO.{STREAM}"), &()).await;
    answer.ok()?.pointer("/state/messages")?.as_u64()
}

/// A message and why it died.
#[derive(Debug)]
pub struct DeadLetter<'a> {
    /// The stream it came from.
    pub stream: &'a str,
    /// The consumer that gave it up.
    pub consumer: &'a str,
    /// Its subject.
    pub subject: &'a str,
    /// Its sequence in the stream.
    pub sequence: u64,
    /// How often it was tried.
    pub deliveries: u64,
    /// Why, as a sentence.
    pub reason: &'a str,
    /// What became of it before.
    pub past: Past,
    /// Its headers.
    pub headers: Option<&'a HeaderMap>,
    /// Its payload.
    pub payload: Bytes,
}

/// Why a letter could not be stored. The original stays where it is and comes back.
#[derive(Debug, thiserror::Error)]
#[error("the dead letter could not be stored in {STREAM}: {0}")]
pub struct StoreError(String);

impl DeadLetter<'_> {
    /// Stores the letter and waits until the stream has it.
    ///
    /// # Errors
    /// [`StoreError`] when the stream did not confirm it; storing it again is harmless.
    pub async fn store(self, context: &Context) -> Result<(), StoreError> {
        let subject = lomash_contract::subject::dead_letter(self.consumer);
        let (headers, payload) = self.written();
        let stored = async {
            let ack = context.publish_with_headers(subject, headers, payload).await.map_err(|e| e.to_string())?;
            ack.await.map_err(|e| e.to_string())
        };
        match tokio::time::timeout(STORE_TIMEOUT, stored).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StoreError(error)),
            Err(_) => Err(StoreError(format!("no answer within {} s", STORE_TIMEOUT.as_secs()))),
        }
    }

    /// The letter as it is stored. It fits whatever the message was.
    fn written(self) -> (HeaderMap, Bytes) {
        let (mut headers, cut) = fitting(self.headers.map(publisher_headers).unwrap_or_default());
        if let Some(bytes) = cut {
            headers.insert(HEADER_BYTES, bytes.to_string());
        }
        let mut payload = self.payload;
        if payload.len() > MAX_PAYLOAD_BYTES {
            headers.insert(PAYLOAD_BYTES, payload.len().to_string());
            payload.truncate(MAX_PAYLOAD_BYTES);
        }
        if let Some(original) = self.headers {
            // Of a message that was brought back, the id under which it came first.
            let id = original.get(ORIGIN_MESSAGE_ID).or_else(|| original.get(async_nats::header::NATS_MESSAGE_ID));
            if let Some(id) = id {
                headers.insert(ORIGIN_MESSAGE_ID, bounded(id.as_str(), MAX_MESSAGE_ID_CHARS));
            }
        }
        let mut id = format!("dead.{}.{}.{}", self.consumer, self.stream, self.sequence);
        if self.past.redrives > 0 {
            id.push_str(&format!(".{}", self.past.redrives));
        }
        headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
        headers.insert(ORIGIN_STREAM, self.stream);
        headers.insert(ORIGIN_SUBJECT, bounded(self.subject, MAX_SUBJECT_CHARS));
        headers.insert(ORIGIN_SEQUENCE, self.sequence.to_string());
        headers.insert(CONSUMER, self.consumer);
        headers.insert(DELIVERIES, self.deliveries.to_string());
        headers.insert(REASON, bounded(self.reason, MAX_REASON_CHARS));
        self.past.write(&mut headers);
        (headers, payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(headers: &HeaderMap) -> usize {
        "NATS/1.0\r\n\r\n".len() + header_bytes(headers)
    }

    fn letter<'l>(headers: &'l HeaderMap, text: &'l str, payload: Bytes) -> DeadLetter<'l> {
        DeadLetter {
            stream: "ORDERS",
            consumer: "product-orders",
            subject: text,
            sequence: u64::MAX,
            deliveries: u64::MAX,
            reason: text,
            past: Past::of(Some(headers)),
            headers: Some(headers),
            payload,
        }
    }

    proptest::proptest! {
        /// Whatever headers and payload a message has, its letter is one that the server takes, and says what it leaves out.
        #[test]
        fn a_letter_always_fits(
            lengths in proptest::collection::vec(0_usize..70_000, 0..12),
            reason in 0_usize..3_000,
            payload in 0_usize..(1 << 20),
        ) {
            // The longest character, in each place where we count characters.
            let text = "\u{10348}".repeat(reason);
            let mut headers = HeaderMap::new();
            for (n, length) in lengths.iter().enumerate() {
                headers.insert(format!("X-{n}").as_str(), "v".repeat(*length));
                headers.append(HISTORY, text.as_str());
            }
            headers.insert("Nats-Msg-Id", text.as_str());
            let whole = bytes(&publisher_headers(&headers));
            let (written, kept) = letter(&headers, &text, vec![b'x'; payload].into()).written();
            let size = bytes(&written);
            proptest::prop_assert!(size <= SERVER_HEADER_BYTES, "{} bytes of headers", size);
            proptest::prop_assert!(size + kept.len() <= STREAM_MESSAGE_BYTES);
            proptest::prop_assert_eq!(written.get(PAYLOAD_BYTES).is_some(), payload > MAX_PAYLOAD_BYTES);
            let frame = "NATS/1.0\r\n\r\n".len();
            proptest::prop_assert_eq!(written.get(HEADER_BYTES).is_some(), whole - frame > MAX_HEADER_BYTES);
        }
    }

    #[test]
    fn of_headers_that_do_not_fit_the_small_ones_are_kept() {
        let mut headers = HeaderMap::new();
        headers.insert("a", "v".repeat(65_000));
        headers.insert("Content-Type", "application/json");
        let (written, payload) = letter(&headers, "no order", Bytes::from_static(b"{}")).written();
        assert_eq!(written.get("Content-Type").map(async_nats::HeaderValue::as_str), Some("application/json"));
        assert!(written.get("a").is_none());
        let all = 1 + 65_000 + LINE_BYTES + "Content-Type".len() + "application/json".len() + LINE_BYTES;
        assert_eq!(written.get(HEADER_BYTES).map(async_nats::HeaderValue::as_str), Some(all.to_string().as_str()));
        assert_eq!(&payload[..], b"{}");
    }

    /// Other teams read their letters by that file.
    #[test]
    fn docs_asyncapi_names_every_header_and_no_other() {
        let text = include_str!("../../../docs/asyncapi.yaml");
        let document: serde_json::Value = serde_norway::from_str(text).expect("YAML");
        let schema = &document["components"]["schemas"]["DeadLetterHeaders"];
        let mut named: Vec<&str> =
            schema["properties"].as_object().expect("properties").keys().map(String::as_str).collect();
        let mut ours = [&HEADERS[..], &["Nats-Msg-Id"]].concat();
        named.sort_unstable();
        ours.sort_unstable();
        assert_eq!(named, ours);
        let not_always = [ORIGIN_MESSAGE_ID, REDRIVES, HISTORY, HEADER_BYTES, PAYLOAD_BYTES];
        let mut required: Vec<_> =
            schema["required"].as_array().expect("a list").iter().filter_map(|name| name.as_str()).collect();
        ours.retain(|name| !not_always.contains(name));
        required.sort_unstable();
        assert_eq!(required, ours);
        let example = &document["components"]["messages"]["DeadLetter"]["examples"][0]["headers"];
        for name in example.as_object().expect("headers").keys() {
            assert!(named.contains(&name.as_str()) || name == crate::header::TRACEPARENT, "{name}");
        }
        let kept = format!("the last {}", ["none", "one", "two", "three", "four", "five"][MAX_HISTORY]);
        let history = schema["properties"][HISTORY]["description"].as_str().expect("a description");
        assert!(history.contains(&kept), "{history}");
    }
}
