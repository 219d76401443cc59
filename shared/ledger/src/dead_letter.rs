//! Dead letters: messages that cannot be handled, kept with their reason so that nothing is swallowed.
//!
//! A letter is the original message (payload and headers) under `lomash.dlq.{consumer}` with headers that say where
//! it came from and why it is here. Its `Nats-Msg-Id` is made of consumer, stream and sequence, so a message that
//! dies twice is one letter.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use bytes::Bytes;

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
/// How often it was delivered.
pub const DELIVERIES: &str = "Lomash-Dead-Deliveries";
/// Why, as a sentence.
pub const REASON: &str = "Lomash-Dead-Reason";

/// Longest reason that is kept, in characters.
pub const MAX_REASON_CHARS: usize = 1_000;

/// How long the stream may take to confirm a letter; the original is kept until it has.
pub const STORE_TIMEOUT: Duration = Duration::from_secs(5);

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
    /// How often it was delivered.
    pub deliveries: u64,
    /// Why, as a sentence.
    pub reason: &'a str,
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
        let mut headers = HeaderMap::new();
        if let Some(original) = self.headers {
            for (name, values) in original.iter() {
                let name_text: &str = name.as_ref();
                // The server acts on its own headers; on a copy they would mean something else.
                if !name_text.starts_with("Nats-") && !name_text.starts_with("Lomash-Dead-") {
                    for value in values {
                        headers.append(name.clone(), value.clone());
                    }
                }
            }
            if let Some(id) = original.get(async_nats::header::NATS_MESSAGE_ID) {
                headers.insert(ORIGIN_MESSAGE_ID, id.clone());
            }
        }
        let reason: String = header_text(self.reason).chars().take(MAX_REASON_CHARS).collect();
        let id = format!("dead.{}.{}.{}", self.consumer, self.stream, self.sequence);
        headers.insert(async_nats::header::NATS_MESSAGE_ID, id);
        headers.insert(ORIGIN_STREAM, self.stream);
        headers.insert(ORIGIN_SUBJECT, self.subject);
        headers.insert(ORIGIN_SEQUENCE, self.sequence.to_string());
        headers.insert(CONSUMER, self.consumer);
        headers.insert(DELIVERIES, self.deliveries.to_string());
        headers.insert(REASON, reason.as_str());
        let subject = lomash_contract::subject::dead_letter(self.consumer);
        let stored = async {
            let ack = context.publish_with_headers(subject, headers, self.payload).await.map_err(|e| e.to_string())?;
            ack.await.map_err(|e| e.to_string())
        };
        match tokio::time::timeout(STORE_TIMEOUT, stored).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(StoreError(error)),
            Err(_) => Err(StoreError(format!("no answer within {} s", STORE_TIMEOUT.as_secs()))),
        }
    }
}
