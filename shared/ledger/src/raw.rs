//! A message of a stream as its leader tells it, with its headers as bytes.
//!
//! The server stores and delivers whatever bytes a publisher sends as headers. The client library cuts its connection over
//! headers that it cannot parse, and takes those with a status line for the server's own word; so one such message would be
//! delivered for ever and handled never. Here it can be looked at. The answer is JSON and comes from the leader, which is slower:
//! only what cannot be read otherwise is read like this, and what is suspect.

use std::str::FromStr as _;

use async_nats::jetstream::Context;
use async_nats::jetstream::message::StreamMessage;
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use serde::Deserialize;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::streams;

const NO_MESSAGE: u64 = 10_037;

/// Messages that the leader is asked for at the same time: each at most the server's `max_payload`, mostly a thousandth of it.
const AT_ONCE: usize = 64;

/// A message, and what is the matter with its headers, of which then it has none.
pub(crate) struct Raw {
    pub(crate) message: StreamMessage,
    pub(crate) unreadable: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    message: Option<Told>,
    error: Option<Problem>,
}

#[derive(Deserialize)]
struct Told {
    subject: String,
    seq: u64,
    #[serde(default)]
    hdrs: String,
    #[serde(default)]
    data: String,
    time: String,
}

#[derive(Deserialize)]
struct Problem {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

/// The message of this sequence.
///
/// # Errors
/// Why the leader does not tell.
pub(crate) async fn get(context: &Context, stream: &str, sequence: u64) -> Result<Option<Raw>, String> {
    ask(context, stream, &json!({ "seq": sequence })).await
}

/// The first message of this sequence or a later one, on a subject that the filter admits.
///
/// # Errors
/// Why the leader does not tell.
pub(crate) async fn next(context: &Context, stream: &str, filter: &str, from: u64) -> Result<Option<Raw>, String> {
    ask(context, stream, &json!({ "seq": from, "next_by_subj": filter })).await
}

/// Every message after `after` up to `upto` on a subject that the filter admits, in the stream's order.
///
/// Items are errors when the leader does not tell; then there is nothing more.
pub(crate) fn read<'r>(
    context: &'r Context,
    stream: &'r str,
    filter: &'r str,
    after: u64,
    upto: u64,
) -> BoxStream<'r, Result<Raw, String>> {
    let chunks = stream::try_unfold(after, move |after| async move {
        if after >= upto {
            return Ok::<_, String>(None);
        }
        // Over a gap, whatever its width.
        let first = next(context, stream, filter, after + 1).await?.filter(|first| first.message.sequence <= upto);
        let Some(first) = first else { return Ok(None) };
        let last = first.message.sequence.saturating_add(AT_ONCE as u64).min(upto);
        let others: Vec<Option<Raw>> = stream::iter(first.message.sequence + 1..=last)
            .map(|sequence| get(context, stream, sequence))
            .buffered(AT_ONCE)
            .try_collect()
            .await?;
        let mut after = first.message.sequence;
        let mut chunk = vec![Ok(first)];
        for other in others.into_iter().flatten() {
            // What is missing behind the last one is asked for again: an end is only the leader's word of what comes next.
            after = other.message.sequence;
            if streams::matches(filter, &other.message.subject) {
                chunk.push(Ok(other));
            }
        }
        Ok(Some((stream::iter(chunk), after)))
    });
    chunks.try_flatten().boxed()
}

async fn ask(context: &Context, stream: &str, request: &Value) -> Result<Option<Raw>, String> {
    let answer = context.request(format!("STREAM.MSG.GET.{stream}"), request).await;
    let answer: Answer = answer.map_err(|problem: async_nats::jetstream::context::RequestError| problem.to_string())?;
    match (answer.message, answer.error) {
        (Some(told), _) => told.read().map(Some),
        (None, Some(problem)) if problem.err_code == NO_MESSAGE => Ok(None),
        (None, Some(problem)) => Err(problem.description),
        (None, None) => Err("the answer has no message in it".to_owned()),
    }
}

impl Told {
    fn read(self) -> Result<Raw, String> {
        let bytes = |text: &str| STANDARD.decode(text).map_err(|problem| problem.to_string());
        let (headers, unreadable) = match parse(&bytes(&self.hdrs)?) {
            Ok(headers) => (headers, None),
            Err(why) => (HeaderMap::new(), Some(why)),
        };
        let message = StreamMessage {
            subject: self.subject.into(),
            sequence: self.seq,
            headers,
            payload: Bytes::from(bytes(&self.data)?),
            time: OffsetDateTime::parse(&self.time, &Rfc3339).map_err(|problem| problem.to_string())?,
        };
        Ok(Raw { message, unreadable })
    }
}

/// The headers as the client library reads them, or why it would not.
fn parse(bytes: &[u8]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    if bytes.is_empty() {
        return Ok(headers);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "they are not UTF-8".to_owned())?;
    let mut lines = text.lines().peekable();
    let status = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")).map(str::trim);
    match status {
        Some("") => {}
        Some(_) => return Err("they claim to be the server's own word, with a status".to_owned()),
        None => return Err("they do not begin with NATS/1.0".to_owned()),
    }
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| "a line of them has no colon".to_owned())?;
        let name = HeaderName::from_str(name).map_err(|problem| format!("a name in them is none: {problem}"))?;
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        let value = HeaderValue::from_str(value.trim_end())
            .map_err(|_| format!("the value of {name} has a line break in it"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_the_client_library_does_or_said_to_be_none() {
        let read = parse(b"NATS/1.0\r\nContent-Type: application/json\r\nx: a\r\n b\r\nx: c\r\n\r\n").expect("headers");
        assert_eq!(read.get("Content-Type").map(async_nats::HeaderValue::as_str), Some("application/json"));
        assert_eq!(read.get_all("x").map(async_nats::HeaderValue::as_str).collect::<Vec<_>>(), ["a b", "c"]);
        assert!(parse(b"").expect("none").is_empty());
        for (bad, why) in [
            (&b"NATS/1.0\r\nx: k\xfcche\r\n\r\n"[..], "UTF-8"),
            (b"NATS/1.0\r\nno colon\r\n\r\n", "colon"),
            (b"NATS/1.0 503\r\n\r\n", "status"),
            (b"NATS/1.0 404 Not Found\r\n\r\n", "status"),
            (b"HTTP/1.1\r\n\r\n", "NATS/1.0"),
            (b"NATS/1.0\r\na b: c\r\n\r\n", "name"),
            (b"NATS/1.0\r\na: b\rc\r\n\r\n", "line break"),
        ] {
            let said = parse(bad).expect_err("no headers");
            assert!(said.contains(why), "{said}");
        }
    }
}
