//! Bytes to types and back, JSON or MessagePack by `Content-Type`, with errors that name the field.
//!
//! An object is an object in both: a list of a type's fields in their order, which MessagePack calls compact, is refused.
//!
//! Decoding is done twice only when it fails: the second pass tracks the path, which the good case need not pay for.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::envelope::{Envelope, EventType, Payload, Version};
use crate::objects::{self, Objects};

/// How a message is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ContentType {
    /// `application/json`, also when no header says otherwise.
    #[default]
    Json,
    /// `application/msgpack`.
    MessagePack,
}

impl ContentType {
    /// The media type.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::MessagePack => "application/msgpack",
        }
    }

    /// Reads the `Content-Type` header; parameters such as `charset` are ignored, no header means JSON.
    ///
    /// # Errors
    /// A media type that is neither JSON nor MessagePack.
    pub fn from_header(value: Option<&str>) -> Result<Self, DecodeError> {
        let Some(value) = value else { return Ok(Self::Json) };
        let media_type = value.split(';').next().unwrap_or_default().trim();
        match () {
            () if media_type.eq_ignore_ascii_case("application/json") => Ok(Self::Json),
            () if media_type.eq_ignore_ascii_case("application/msgpack")
                || media_type.eq_ignore_ascii_case("application/x-msgpack")
                || media_type.eq_ignore_ascii_case("application/vnd.msgpack") =>
            {
                Ok(Self::MessagePack)
            }
            () => Err(DecodeError::ContentType { found: excerpt(value) }),
        }
    }
}

impl fmt::Display for ContentType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why bytes are not the message they should be. A sentence that the sender can act on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The header names an encoding we do not read.
    #[error("content type `{found}` is not supported; send application/json or application/msgpack")]
    ContentType {
        /// What the header said.
        found: String,
    },
    /// The bytes do not parse, or a field is missing or has a bad value.
    #[error("not a valid {expected} as {content_type}: {field}: {problem}")]
    Field {
        /// What the message should have been.
        expected: EventType,
        /// How it was read.
        content_type: ContentType,
        /// Path of the field, for example `payload.items[2].quantity`, or `message`.
        field: String,
        /// What is wrong with it and what was expected.
        problem: String,
    },
    /// Written to a major version of the contract that this reader does not know.
    #[error("version {found} is not supported; this reader understands major version {}", Version::CURRENT.major)]
    Version {
        /// The version of the message.
        found: Version,
    },
    /// A valid envelope of another event.
    #[error("eventType is `{found}`, this topic carries `{expected}`")]
    EventType {
        /// What the topic carries.
        expected: EventType,
        /// What came.
        found: String,
    },
}

/// Most characters of foreign text that an error repeats.
const EXCERPT_CHARS: usize = 200;

fn excerpt(text: &str) -> String {
    let mut chars = text.chars();
    let mut short: String = chars.by_ref().take(EXCERPT_CHARS).filter(|c| !c.is_control()).collect();
    if chars.next().is_some() {
        short.push('…');
    }
    short
}

/// Levels of nesting that are read in MessagePack: as many as in JSON, where `serde_json` has the limit. A level costs stack.
const MAX_DEPTH: usize = 128;

/// What decides whether the rest can be read at all. Read on its own only to explain a failure.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    event_type: Option<String>,
    version: Option<Version>,
    #[serde(default, rename = "payload")]
    _payload: IgnoredAny,
}

fn read<T: DeserializeOwned>(content_type: ContentType, bytes: &[u8]) -> Option<T> {
    match content_type {
        ContentType::Json => objects::from_json(bytes).ok(),
        ContentType::MessagePack => {
            // Read through a shrinking slice: a deserializer made with `from_read_ref` cannot say what is left.
            let mut rest = bytes;
            let mut deserializer = rmp_serde::Deserializer::new(&mut rest);
            deserializer.set_max_depth(MAX_DEPTH);
            let value = T::deserialize(Objects(&mut deserializer)).ok()?;
            drop(deserializer);
            rest.is_empty().then_some(value)
        }
    }
}

/// Reads one message of the contract.
///
/// # Errors
/// [`DecodeError`] says which field, what was found and what was expected.
pub fn decode<P: Payload>(content_type: ContentType, bytes: &[u8]) -> Result<Envelope<P>, DecodeError> {
    match read::<Envelope<P>>(content_type, bytes) {
        Some(envelope) if envelope.version.major != Version::CURRENT.major => {
            Err(DecodeError::Version { found: envelope.version })
        }
        Some(envelope) if envelope.event_type != P::EVENT_TYPE => {
            Err(DecodeError::EventType { expected: P::EVENT_TYPE, found: envelope.event_type.as_str().to_owned() })
        }
        Some(envelope) => Ok(envelope),
        None => Err(explain::<P>(content_type, bytes)),
    }
}

/// The slow path: why the bytes did not decode. A foreign version or event type explains more than a missing field.
fn explain<P: Payload>(content_type: ContentType, bytes: &[u8]) -> DecodeError {
    if let Some(Head { event_type, version, .. }) = read::<Head>(content_type, bytes) {
        if let Some(found) = version.filter(|version| version.major != Version::CURRENT.major) {
            return DecodeError::Version { found };
        }
        if let Some(found) = event_type.filter(|found| found != P::EVENT_TYPE.as_str()) {
            return DecodeError::EventType { expected: P::EVENT_TYPE, found: excerpt(&found) };
        }
    }
    let (path, problem) = match content_type {
        ContentType::Json => {
            let mut deserializer = serde_json::Deserializer::from_slice(bytes);
            let outcome = serde_path_to_error::deserialize::<_, Envelope<P>>(Objects(&mut deserializer));
            match outcome {
                Ok(_) => match deserializer.end() {
                    Err(trailing) => (String::new(), trailing.to_string()),
                    Ok(()) => (String::new(), "it decodes only at the second try".to_owned()),
                },
                Err(error) => (error.path().to_string(), error.inner().to_string()),
            }
        }
        ContentType::MessagePack => {
            let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
            deserializer.set_max_depth(MAX_DEPTH);
            match serde_path_to_error::deserialize::<_, Envelope<P>>(Objects(&mut deserializer)) {
                Ok(_) => (String::new(), "there are bytes after the end of the message".to_owned()),
                Err(error) => {
                    use rmp_serde::decode::Error::{InvalidDataRead, InvalidMarkerRead};
                    let problem = match error.inner() {
                        // A slice fails to be read only at its end.
                        InvalidDataRead(_) | InvalidMarkerRead(_) => "the message ends in the middle".to_owned(),
                        other => other.to_string(),
                    };
                    (error.path().to_string(), problem)
                }
            }
        }
    };
    let field = if path.is_empty() || path == "." { "message".to_owned() } else { excerpt(&path) };
    DecodeError::Field { expected: P::EVENT_TYPE, content_type, field, problem: excerpt(&problem) }
}

/// Writes one message of the contract.
///
/// # Panics
/// Never for the types of this crate: they hold nothing that JSON or MessagePack cannot carry.
#[must_use]
pub fn encode<P: serde::Serialize>(content_type: ContentType, envelope: &Envelope<P>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_into(content_type, envelope, &mut bytes);
    bytes
}

/// Writes one message of the contract behind what `bytes` holds, whose room is used again and again by whoever writes many.
///
/// # Panics
/// Never, as [`encode`].
pub fn encode_into<P: serde::Serialize>(content_type: ContentType, envelope: &Envelope<P>, bytes: &mut Vec<u8>) {
    match content_type {
        ContentType::Json => serde_json::to_writer(bytes, envelope).expect("a contract type is always JSON"),
        ContentType::MessagePack => {
            rmp_serde::encode::write_named(bytes, envelope).expect("a contract type is always MessagePack");
        }
    }
}
