//! `lomash status`: where everything stands, and where each figure comes from.
//!
//! A part that cannot be reached is shown as such with the reason and is no failure; only NATS itself is one, because
//! without it there is nothing to show.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::anyhow;
use async_nats::jetstream::Context;
use async_nats::jetstream::consumer;
use clap::Args;
use futures::TryStreamExt;
use lomash_ledger::{dead_letter, streams};
use lomash_platform::Secret;
use lomash_platform::postgres::{ANALYTICS, Family, INVENTORY};
use serde::Serialize;

use crate::output::{self, Cell};

/// How long NATS may take to answer: a status that hangs is no status.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Name under which the program connects.
const CLIENT_NAME: &str = "lomash status";

/// Shows streams, consumers and the projection.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// The NATS server or servers.
    #[arg(long, env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    pub nats_url: String,
    /// Who asks.
    #[command(flatten)]
    pub nats_identity: lomash_platform::nats::Identity,
    /// The Postgres database of the projection; without it the projection is not shown.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<Secret>,
    /// Print it as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A part that was asked: what it said, or why it did not.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Answer<T> {
    /// What it said.
    Found(T),
    /// Why it did not.
    Unavailable(String),
}

impl<T> Answer<T> {
    fn of(asked: anyhow::Result<T>) -> Self {
        asked.map_or_else(|problem| Self::Unavailable(format!("{problem:#}")), Self::Found)
    }
}

/// Where everything stands.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// The streams, by the names of `streams/`.
    pub streams: Vec<Part<StreamStatus>>,
    /// Their durable consumers.
    pub consumers: Vec<Part<ConsumerStatus>>,
    /// The projection in Postgres.
    pub projection: Answer<ProjectionStatus>,
    /// The stock metrics in Postgres.
    pub analytics: Answer<ProjectionStatus>,
    /// Low-stock alerts, in Postgres.
    pub alerts: Answer<AlertStatus>,
}

/// A named part.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Part<T> {
    /// Its name; a consumer's is `stream/consumer`.
    pub name: String,
    /// What it said.
    pub answer: Answer<T>,
}

/// A stream, as its leader describes it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StreamStatus {
    /// Messages in it.
    pub messages: u64,
    /// Their size.
    pub bytes: u64,
    /// Its first sequence.
    pub first_sequence: u64,
    /// Its last sequence.
    pub last_sequence: u64,
    /// Copies.
    pub replicas: usize,
}

/// A durable consumer, as its leader describes it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerStatus {
    /// Messages not delivered yet.
    pub pending: u64,
    /// Delivered and not acknowledged.
    pub ack_pending: u64,
    /// Delivered more than once and not acknowledged.
    pub redelivered: u64,
    /// Stream sequence up to which all is acknowledged.
    pub ack_floor: u64,
    /// The pinned client, in consumers that pin one.
    pub pinned_client: Option<String>,
}

/// The projection, as Postgres holds it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ProjectionStatus {
    /// Last sequence that its rows reflect.
    pub checkpoint: u64,
    /// Events that it is behind the end of `INVENTORY`; none when the stream's end is not known.
    pub lag_events: Option<u64>,
    /// Products in it.
    pub products: u64,
    /// Messages that were not ours. Not zero is an alarm.
    pub skipped: u64,
}

/// Low-stock alerts, as the notification service keeps them.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AlertStatus {
    /// Sequence of the ledger up to which they are recorded.
    pub checkpoint: u64,
    /// All of them.
    pub recorded: u64,
    /// Not published yet.
    pub to_publish: u64,
    /// Mails that wait to be sent.
    pub to_mail: u64,
    /// Mails that were refused for good. Not zero is worth a look at `GET /v1/notifications?mail=failed`.
    pub refused: u64,
}

/// Runs the command.
///
/// # Errors
/// When NATS cannot be reached.
pub async fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let connecting = lomash_platform::nats::connect_as(&args.nats_url, &args.nats_identity, CLIENT_NAME);
    let (client, _) = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.map_err(|_| {
        anyhow!("NATS does not answer within {} s; is it running, and is NATS_URL right?", CONNECT_TIMEOUT.as_secs())
    })??;
    let status = status(&async_nats::jetstream::new(client), args.database_url.as_ref()).await;
    if args.json {
        output::print_json(&status)?;
    } else {
        output::print(render(&status));
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks every part.
pub async fn status(context: &Context, database_url: Option<&Secret>) -> Snapshot {
    let mut streams = Vec::new();
    let mut consumers = Vec::new();
    let mut ledger_end = None;
    for streams::Definition { name, consumers: defined, .. } in streams::definitions() {
        let answer = match context.get_stream(&name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                if name == streams::INVENTORY {
                    ledger_end = Some(info.state.last_sequence);
                }
                let found: Result<Vec<consumer::Info>, _> = stream.consumers().try_collect().await;
                consumers.extend(consumer_parts(&name, &defined, found));
                Answer::Found(StreamStatus {
                    messages: info.state.messages,
                    bytes: info.state.bytes,
                    first_sequence: info.state.first_sequence,
                    last_sequence: info.state.last_sequence,
                    replicas: info.config.num_replicas,
                })
            }
            Err(problem) => Answer::Unavailable(problem.to_string()),
        };
        streams.push(Part { name, answer });
    }
    let projection = async |family| match database_url {
        None => Answer::Unavailable("no DATABASE_URL".to_owned()),
        Some(url) => Answer::of(projection(url, family, ledger_end).await),
    };
    let (projection, analytics) = (projection(&INVENTORY).await, projection(&ANALYTICS).await);
    let alerts = match database_url {
        None => Answer::Unavailable("no DATABASE_URL".to_owned()),
        Some(url) => Answer::of(alerts(url).await),
    };
    Snapshot { streams, consumers, projection, analytics, alerts }
}

/// The durable consumers that are there, and those that are defined and are not; only those that keep a place.
fn consumer_parts<E: std::fmt::Display>(
    stream: &str,
    defined: &[(String, serde_json::Map<String, serde_json::Value>)],
    found: Result<Vec<consumer::Info>, E>,
) -> Vec<Part<ConsumerStatus>> {
    let (found, problem) = match found {
        Ok(found) => (found, "it does not exist; the services create it at start".to_owned()),
        Err(problem) => (Vec::new(), problem.to_string()),
    };
    let mut parts: Vec<_> = found
        .into_iter()
        .filter(|info| info.config.durable_name.is_some() && info.config.ack_policy != consumer::AckPolicy::None)
        .map(|info| Part {
            name: format!("{stream}/{}", info.name),
            answer: Answer::Found(ConsumerStatus {
                pending: info.num_pending,
                ack_pending: info.num_ack_pending as u64,
                redelivered: info.num_redelivered as u64,
                ack_floor: info.ack_floor.stream_sequence,
                pinned_client: info.priority_groups.into_iter().find_map(|group| group.pinned_client_id),
            }),
        })
        .collect();
    for (name, _) in defined.iter().filter(|(_, config)| streams::keeps_a_place(config)) {
        let name = format!("{stream}/{name}");
        if !parts.iter().any(|part| part.name == name) {
            parts.push(Part { name, answer: Answer::Unavailable(problem.clone()) });
        }
    }
    parts
}

async fn projection(url: &Secret, family: &Family, ledger_end: Option<u64>) -> anyhow::Result<ProjectionStatus> {
    let client = lomash_platform::postgres::connect(url).await?;
    let query = format!(
        "SELECT sequence, skipped, (SELECT count(*) FROM {live}.products) FROM {live}.checkpoint WHERE projection = $1",
        live = family.live
    );
    let row = client
        .query_opt(&query, &[&family.projection])
        .await
        .map_err(|problem| anyhow!(problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string)))?
        .ok_or_else(|| anyhow!("there is no checkpoint; its service creates it at start"))?;
    let unsigned = |column| u64::try_from(row.get::<_, i64>(column)).unwrap_or(0);
    let checkpoint = unsigned(0);
    Ok(ProjectionStatus {
        checkpoint,
        // Postgres was asked after the stream and may be ahead of what the stream said then.
        lag_events: ledger_end.map(|end| end.saturating_sub(checkpoint)),
        products: unsigned(2),
        skipped: unsigned(1),
    })
}

async fn alerts(url: &Secret) -> anyhow::Result<AlertStatus> {
    let client = lomash_platform::postgres::connect(url).await?;
    let query = "SELECT (SELECT sequence FROM notification.checkpoint),
                        (SELECT count(*) FROM notification.alerts),
                        (SELECT count(*) FROM notification.alerts WHERE published_at IS NULL),
                        (SELECT count(*) FROM notification.mails WHERE state = 'waiting'),
                        (SELECT count(*) FROM notification.mails WHERE state = 'failed')";
    let row = client
        .query_one(query, &[])
        .await
        .map_err(|problem| anyhow!(problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string)))?;
    let unsigned = |column| u64::try_from(row.get::<_, Option<i64>>(column).unwrap_or(0)).unwrap_or(0);
    let (checkpoint, recorded) = (unsigned(0), unsigned(1));
    Ok(AlertStatus { checkpoint, recorded, to_publish: unsigned(2), to_mail: unsigned(3), refused: unsigned(4) })
}

/// The status as a person reads it.
#[must_use]
pub fn render(status: &Snapshot) -> String {
    let mut streams = output::table(&["stream", "messages", "size", "first", "last", "replicas"]);
    let mut unavailable = Vec::new();
    for Part { name, answer } in &status.streams {
        match answer {
            Answer::Found(stream) => {
                streams.add_row([
                    Cell::new(name),
                    output::number_cell(stream.messages),
                    Cell::new(output::bytes(stream.bytes)),
                    output::number_cell(stream.first_sequence),
                    output::number_cell(stream.last_sequence),
                    output::number_cell(stream.replicas as u64),
                ]);
            }
            Answer::Unavailable(why) => unavailable.push(format!("stream {name}: {why}")),
        }
    }
    let mut consumers = output::table(&["consumer", "pending", "in work", "redelivered", "acknowledged to", "pinned"]);
    for Part { name, answer } in &status.consumers {
        match answer {
            Answer::Found(consumer) => {
                consumers.add_row([
                    Cell::new(name),
                    output::number_cell(consumer.pending),
                    output::number_cell(consumer.ack_pending),
                    output::number_cell(consumer.redelivered),
                    output::number_cell(consumer.ack_floor),
                    Cell::new(consumer.pinned_client.as_deref().unwrap_or("-")),
                ]);
            }
            Answer::Unavailable(why) => unavailable.push(format!("consumer {name}: {why}")),
        }
    }
    let mut projections = output::table(&["projection", "checkpoint", "events behind", "products", "skipped"]);
    for (family, answer) in [(&INVENTORY, &status.projection), (&ANALYTICS, &status.analytics)] {
        match answer {
            Answer::Found(projection) => {
                projections.add_row([
                    Cell::new(family.projection),
                    output::number_cell(projection.checkpoint),
                    projection.lag_events.map_or_else(|| Cell::new("unknown"), output::number_cell),
                    output::number_cell(projection.products),
                    output::number_cell(projection.skipped),
                ]);
            }
            Answer::Unavailable(why) => unavailable.push(format!("projection {}: {why}", family.projection)),
        }
    }
    let mut alerts = output::table(&["low-stock alerts", "recorded to", "to publish", "to mail", "mails refused"]);
    match &status.alerts {
        Answer::Found(found) => {
            let figures = [found.recorded, found.checkpoint, found.to_publish, found.to_mail, found.refused];
            alerts.add_row(figures.map(output::number_cell));
        }
        Answer::Unavailable(why) => unavailable.push(format!("low-stock alerts: {why}")),
    }
    let mut text = String::new();
    let parts = [
        ("From NATS, as the leaders say:", &streams),
        ("", &consumers),
        ("From Postgres:", &projections),
        ("", &alerts),
    ];
    for (source, table) in parts {
        if !table.is_empty() {
            if !source.is_empty() {
                text.push_str(&format!("{source}\n"));
            }
            text.push_str(&format!("{table}\n"));
        }
    }
    let letters = messages_in(status, dead_letter::STREAM);
    if letters > 0 {
        let letters = output::thousands(letters);
        text.push_str(&format!("{letters} dead letters wait for somebody to look at them: `lomash dlq list`\n"));
    }
    let suspects = messages_in(status, streams::ADVISORIES);
    if suspects > 0 {
        let suspects = output::thousands(suspects);
        text.push_str(&format!("{suspects} messages were delivered too often and wait to be tried alone\n"));
    }
    for why in unavailable {
        text.push_str(&format!("not available: {why}\n"));
    }
    text
}

/// Messages in a stream; 0 when that is not known, which is told elsewhere.
fn messages_in(status: &Snapshot, stream: &str) -> u64 {
    let found = status.streams.iter().find(|part| part.name == stream);
    found.map_or(0, |part| match &part.answer {
        Answer::Found(stream) => stream.messages,
        Answer::Unavailable(_) => 0,
    })
}
