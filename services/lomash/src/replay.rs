//! `lomash replay`: stored messages once more, to standard output, a file or a subject, at the speed of then or any other.
//!
//! Reads by direct gets, so the operator's key is enough and no consumer is left behind. Owns which messages are meant and
//! where they may go: never into the ledger, nor where live listeners would take them for new.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};
use futures::StreamExt;
use lomash_contract::{ContentType, LedgerEvent, OrderCreated, OrderId, ProductId, Topic, Trigger, codec};
use lomash_ledger::direct::{self, Held};
use lomash_ledger::{JetStreamLedger, Ledger, StoredMessage, header, streams};
use lomash_platform::nats;
use serde::Serialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::time::Instant;
use uuid::Uuid;

use crate::output::{self, Output, Progress};

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash replay";
/// Messages published between two looks whether the server has taken them.
const FLUSH_EVERY: u64 = 500;
/// What a replayed message says about itself, so that nobody takes it for the first one.
const REPLAY_STREAM: &str = "Lomash-Replay-Stream";
const REPLAY_SEQUENCE: &str = "Lomash-Replay-Sequence";
const REPLAY_SUBJECT: &str = "Lomash-Replay-Subject";
const REPLAY_TIME: &str = "Lomash-Replay-Time";

/// Which of the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Source {
    /// Orders as they were published.
    #[value(name = "ORDERS")]
    Orders,
    /// The ledger.
    #[value(name = "INVENTORY")]
    Inventory,
    /// Messages that could not be handled.
    #[value(name = "DEAD_LETTERS")]
    DeadLetters,
    /// Low-stock notifications.
    #[value(name = "NOTIFICATIONS")]
    Notifications,
}

impl Source {
    const fn stream(self) -> &'static str {
        match self {
            Self::Orders => streams::ORDERS,
            Self::Inventory => streams::INVENTORY,
            Self::DeadLetters => lomash_ledger::dead_letter::STREAM,
            Self::Notifications => "NOTIFICATIONS",
        }
    }
}

/// Replay stored messages to standard output, a file or a subject.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// The stream.
    #[arg(value_enum)]
    pub stream: Source,
    /// From this sequence on.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub from: u64,
    /// Up to this sequence; to where the stream ends now otherwise.
    #[arg(long)]
    pub to: Option<u64>,
    /// Only what was stored at this moment or later (RFC 3339, by the server's clock).
    #[arg(long, value_name = "TIME")]
    pub since: Option<Moment>,
    /// Only what was stored before this moment.
    #[arg(long, value_name = "TIME")]
    pub until: Option<Moment>,
    /// Only what is about this product.
    #[arg(long, value_name = "UUID")]
    pub product: Option<Uuid>,
    /// Only what is about this order.
    #[arg(long, value_name = "UUID")]
    pub order: Option<Uuid>,
    /// Only changes of stock by this trigger: ORDER_CONFIRMED, ADMIN_UPDATE or SCHEDULED_SYNC.
    #[arg(long, value_parser = trigger)]
    pub trigger: Option<Trigger>,
    /// At most so many messages.
    #[arg(long)]
    pub limit: Option<u64>,
    /// `max`, `original`, or a factor of the original speed such as `60`.
    #[arg(long, default_value = "max")]
    pub speed: Speed,
    /// Write NDJSON to this file instead of standard output.
    #[arg(long, value_name = "FILE", conflicts_with = "subject")]
    pub file: Option<PathBuf>,
    /// Publish to this subject instead, such as `lomash.replay.orders`.
    #[arg(long)]
    pub subject: Option<String>,
    /// The subject is one that a stream stores, and that is meant: orders that were decided once are not decided again.
    #[arg(long, requires = "subject")]
    pub store: bool,
    /// The servers.
    #[command(flatten)]
    pub servers: nats::Servers,
    /// Print the summary as JSON, on standard error.
    #[arg(long)]
    pub json: bool,
}

fn trigger(text: &str) -> Result<Trigger, String> {
    serde_json::from_value(Value::String(text.to_owned()))
        .map_err(|_| "it is ORDER_CONFIRMED, ADMIN_UPDATE or SCHEDULED_SYNC".to_owned())
}

/// A moment, as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(OffsetDateTime);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        OffsetDateTime::parse(text, &Rfc3339)
            .map(Self)
            .map_err(|_| "it is no moment such as 2026-01-31T09:30:00Z".to_owned())
    }
}

/// How fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// As fast as it goes.
    Max,
    /// So many times as fast as it was.
    Times(f64),
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            "original" => Ok(Self::Times(1.0)),
            factor => match factor.strip_suffix('x').unwrap_or(factor).parse::<f64>() {
                Ok(factor) if factor.is_finite() && factor > 0.0 => Ok(Self::Times(factor)),
                _ => Err("it is `max`, `original`, or a factor above 0 such as 60".to_owned()),
            },
        }
    }
}

/// What a replay came to.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    /// The stream.
    pub stream: String,
    /// Messages looked at.
    pub read: u64,
    /// Messages replayed.
    pub replayed: u64,
    /// The first of these.
    pub first_sequence: Option<u64>,
    /// The last of these.
    pub last_sequence: Option<u64>,
    /// How long it took.
    pub seconds: f64,
}

/// Runs the command.
///
/// # Errors
/// When the stream cannot be read, or the target cannot be written.
pub async fn run(args: ReplayArgs) -> Result<ExitCode> {
    if let Some(subject) = &args.subject {
        may_be_published_on(subject, args.store)?;
    }
    let (client, refusals) = args.servers.connect(CLIENT_NAME).await?;
    let mut target = match (&args.subject, &args.file) {
        (Some(subject), _) => {
            Target::Subject { client: client.clone(), subject: subject.clone(), store: args.store, sent: 0 }
        }
        (None, Some(file)) => {
            let created = File::create(file).with_context(|| format!("could not create {}", file.display()))?;
            Target::Lines(Box::new(BufWriter::new(created)))
        }
        (None, None) => Target::Lines(Box::new(BufWriter::new(Output::new()))),
    };
    let context = jetstream::new(client);
    let replaying = refusals.guard(replay(&context, &args, &mut target)).await?;
    let summary = match replaying {
        Err(problem) if output::is_unread(&problem) => return Ok(ExitCode::SUCCESS),
        replayed => replayed?,
    };
    if args.json {
        output::tell_whole(serde_json::to_string_pretty(&summary).context("the summary cannot be written")?);
    } else {
        let (read, replayed) = (output::thousands(summary.read), output::thousands(summary.replayed));
        output::tell(format_args!(
            "{replayed} of {read} messages of {} replayed in {:.1} s",
            summary.stream, summary.seconds
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Replays to `target`.
///
/// # Errors
/// When the stream cannot be read, or the target cannot be written.
pub async fn replay(context: &Context, args: &ReplayArgs, target: &mut Target) -> Result<Summary> {
    let stream = args.stream.stream();
    let mut summary = Summary { stream: stream.to_owned(), ..Summary::default() };
    let replayed = replay_into(context, args, target, &mut summary).await;
    replayed.with_context(|| match summary.last_sequence {
        Some(last) => format!(
            "stopped after {} messages of {stream}, the last of them {last}; --from {} goes on",
            output::thousands(summary.replayed),
            last + 1
        ),
        None => format!("no message of {stream} was replayed"),
    })?;
    Ok(summary)
}

async fn replay_into(context: &Context, args: &ReplayArgs, target: &mut Target, summary: &mut Summary) -> Result<()> {
    let stream = args.stream.stream();
    let wanted = Wanted::of(args)?;
    let end = JetStreamLedger::read_only(context.clone(), stream).last_sequence().await?;
    let to = args.to.unwrap_or(end).min(end);
    let mut from = args.from;
    if let Some(Moment(since)) = args.since {
        // All are older: nothing to read.
        from = from.max(direct::first_since(context, stream, since).await?.unwrap_or(end + 1));
    }
    let mut progress = Progress::new(format!("replaying {stream}"), (to + 1).saturating_sub(from));
    let started = Instant::now();
    let mut first_stored: Option<OffsetDateTime> = None;
    let mut messages = direct::read(context, stream, wanted.filter.as_deref(), from - 1, to);
    while summary.replayed < args.limit.unwrap_or(u64::MAX) {
        let Some(held) = messages.next().await.transpose()? else { break };
        if args.until.is_some_and(|Moment(until)| held.stored_at >= until) {
            break;
        }
        summary.read += 1;
        progress.inc(1);
        if !wanted.includes(&held) {
            continue;
        }
        if let Speed::Times(factor) = args.speed {
            let since_first = held.stored_at - *first_stored.get_or_insert(held.stored_at);
            let offset = Duration::from_secs_f64((since_first.as_seconds_f64() / factor).max(0.0));
            tokio::time::sleep_until(started + offset).await;
        }
        target.put(context, stream, &held).await?;
        summary.replayed += 1;
        summary.first_sequence.get_or_insert(held.sequence);
        summary.last_sequence = Some(held.sequence);
    }
    target.finish().await?;
    progress.finish();
    summary.seconds = started.elapsed().as_secs_f64();
    Ok(())
}

/// Refuses a subject where a replayed message would be taken for a new one.
///
/// # Errors
/// Why it may not.
pub fn may_be_published_on(subject: &str, store: bool) -> Result<()> {
    let is_plain =
        |token: &str| !token.is_empty() && token.chars().all(|c| !c.is_whitespace() && !matches!(c, '*' | '>'));
    ensure!(subject.split('.').all(is_plain), "`{subject}` is no subject to publish on");
    let is_live = |topic: &Topic| topic.as_str() == subject && *topic != Topic::OrdersCreated;
    if Topic::ALL.iter().any(is_live) {
        bail!(
            "live listeners would take a replay on {subject} for what happens now; choose another, such as lomash.replay.x"
        );
    }
    for definition in streams::definitions() {
        if !streams::takes(&definition.name, subject) {
            continue;
        }
        if definition.name == streams::INVENTORY {
            bail!("{subject} is a subject of the ledger, and nothing is replayed into the ledger");
        }
        ensure!(
            store,
            "{subject} is stored by {}; if that is meant, say --store. Orders that were decided once are not decided again",
            definition.name
        );
    }
    Ok(())
}

/// Which messages are meant.
#[derive(Debug)]
struct Wanted {
    source: Source,
    /// What the server can tell by the subject.
    filter: Option<String>,
    product: Option<ProductId>,
    order: Option<OrderId>,
    trigger: Option<Trigger>,
}

impl Wanted {
    fn of(args: &ReplayArgs) -> Result<Self> {
        let (product, order) = (args.product.map(ProductId), args.order.map(OrderId));
        let knows = matches!(args.stream, Source::Orders | Source::Inventory);
        ensure!(
            knows || (product.is_none() && order.is_none()),
            "--product and --order need ORDERS or INVENTORY: what is in {} is not looked into",
            args.stream.stream()
        );
        ensure!(args.trigger.is_none() || args.stream == Source::Inventory, "--trigger needs INVENTORY");
        let filter = match (args.stream, product, args.trigger) {
            (Source::Inventory, _, Some(_)) => {
                let key = product.map_or_else(|| "*".to_owned(), |product| product.to_string());
                Some(format!("{}.{key}", Topic::InventoryUpdated.as_str()))
            }
            (Source::Inventory, Some(product), None) => Some(format!("lomash.*.*.{product}")),
            _ => None,
        };
        Ok(Self { source: args.stream, filter, product, order, trigger: args.trigger })
    }

    fn includes(&self, held: &Held) -> bool {
        if self.product.is_none() && self.order.is_none() && self.trigger.is_none() {
            return true;
        }
        match self.source {
            Source::Orders => {
                let content_type = held.headers.get(header::CONTENT_TYPE).map(|value| value.as_str());
                let decoded = ContentType::from_header(content_type)
                    .and_then(|content_type| codec::decode::<OrderCreated>(content_type, &held.payload));
                decoded.is_ok_and(|envelope| {
                    let order = envelope.payload;
                    self.order.is_none_or(|wanted| wanted == order.order_id)
                        && self
                            .product
                            .is_none_or(|wanted| order.items.as_slice().iter().any(|item| item.product_id == wanted))
                })
            }
            Source::Inventory => {
                let Ok(event) = StoredMessage::from(held.clone()).parse() else { return false };
                match event.payload {
                    LedgerEvent::InventoryUpdated(updated) => {
                        self.product.is_none_or(|wanted| wanted == updated.product_id)
                            && self.order.is_none_or(|wanted| Some(wanted) == updated.order_id)
                            && self.trigger.is_none_or(|wanted| wanted == updated.trigger)
                    }
                    LedgerEvent::InventoryUpdateFailed(failed) => {
                        self.trigger.is_none()
                            && self.order.is_none_or(|wanted| wanted == failed.order_id)
                            && self
                                .product
                                .is_none_or(|wanted| failed.items.iter().any(|item| item.product_id == wanted))
                    }
                    other => {
                        self.order.is_none()
                            && self.trigger.is_none()
                            && self.product.is_none_or(|wanted| wanted == ProductId(other.key()))
                    }
                }
            }
            Source::DeadLetters | Source::Notifications => true,
        }
    }
}

/// Where messages go.
pub enum Target {
    /// A line of JSON for each.
    Lines(Box<dyn Write + Send>),
    /// A subject.
    Subject {
        /// The connection.
        client: Client,
        /// The subject.
        subject: String,
        /// Whether a stream confirms each.
        store: bool,
        /// How many were sent.
        sent: u64,
    },
}

impl Target {
    async fn put(&mut self, context: &Context, stream: &str, held: &Held) -> Result<()> {
        match self {
            Self::Lines(writer) => {
                let line = line(stream, held)?;
                writeln!(writer, "{line}").context("the replay cannot be written")
            }
            Self::Subject { client, subject, store, sent } => {
                let (headers, payload) = (headers(stream, held)?, held.payload.clone());
                if *store {
                    let stored = context.publish_with_headers(subject.clone(), headers, payload).await;
                    stored
                        .map_err(|problem| anyhow!(problem))?
                        .await
                        .with_context(|| format!("{subject} was not stored"))?;
                } else {
                    client.publish_with_headers(subject.clone(), headers, payload).await?;
                }
                *sent += 1;
                if sent.is_multiple_of(FLUSH_EVERY) {
                    client.flush().await?;
                }
                Ok(())
            }
        }
    }

    async fn finish(&mut self) -> Result<()> {
        match self {
            Self::Lines(writer) => writer.flush().context("the replay cannot be written"),
            Self::Subject { client, .. } => client.flush().await.context("the replay cannot be sent"),
        }
    }
}

/// The headers of then, without what the server would act on.
fn headers(stream: &str, held: &Held) -> Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (name, values) in held.headers.iter() {
        let text: &str = name.as_ref();
        if !text.starts_with("Nats-") {
            for value in values {
                headers.append(name.clone(), value.clone());
            }
        }
    }
    headers.insert(REPLAY_STREAM, stream);
    headers.insert(REPLAY_SEQUENCE, held.sequence.to_string());
    headers.insert(REPLAY_SUBJECT, held.subject.as_str());
    headers.insert(REPLAY_TIME, held.stored_at.format(&Rfc3339)?);
    Ok(headers)
}

fn line(stream: &str, held: &Held) -> Result<Value> {
    let headers: Map<String, Value> = held
        .headers
        .iter()
        .map(|(name, values)| {
            let last = values.last().map(|value| value.as_str().to_owned()).unwrap_or_default();
            (name.to_string(), Value::String(last))
        })
        .collect();
    let mut line = json!({
        "stream": stream,
        "sequence": held.sequence,
        "time": held.stored_at.format(&Rfc3339)?,
        "subject": held.subject,
        "headers": headers,
    });
    match serde_json::from_slice::<Value>(&held.payload) {
        Ok(payload) => line["payload"] = payload,
        Err(_) => line["payloadBase64"] = STANDARD.encode(&held.payload).into(),
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_replayed_into_the_ledger_or_as_if_it_were_new() {
        for (subject, store, refused) in [
            ("lomash.replay.orders", false, None),
            ("test.orders", false, None),
            ("lomash.orders.created", true, None),
            ("lomash.orders.created", false, Some("say --store")),
            ("lomash.jobs.reconciliation", false, Some("say --store")),
            ("lomash.inventory.updated.x", true, Some("nothing is replayed into the ledger")),
            ("lomash.products.anything.x", true, Some("nothing is replayed into the ledger")),
            ("lomash.inventory.updated", true, Some("live listeners")),
            ("lomash.notifications.low-stock", true, Some("live listeners")),
            ("lomash.*.updated", true, Some("no subject")),
            ("lomash..x", true, Some("no subject")),
            ("a b", true, Some("no subject")),
        ] {
            match (may_be_published_on(subject, store), refused) {
                (Ok(()), None) => {}
                (Err(error), Some(words)) => assert!(error.to_string().contains(words), "{subject}: {error}"),
                (outcome, refused) => panic!("{subject}: {outcome:?}, not {refused:?}"),
            }
        }
    }

    #[test]
    fn speeds_are_read() {
        for (text, speed) in [
            ("max", Ok(Speed::Max)),
            ("original", Ok(Speed::Times(1.0))),
            ("60", Ok(Speed::Times(60.0))),
            ("0.5x", Ok(Speed::Times(0.5))),
        ] {
            assert_eq!(text.parse(), speed);
        }
        for text in ["", "0", "-1", "NaN", "inf", "fast"] {
            assert!(text.parse::<Speed>().is_err(), "{text}");
        }
    }
}
