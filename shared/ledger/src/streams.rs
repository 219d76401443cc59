//! Stream and consumer definitions: the very files of `streams/`, which the stock `nats` CLI reads too.
//!
//! The files are sent to the server as they are, so operators and code cannot disagree. What the deployment decides
//! (replicas) is the only thing put over them.

use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream::Context;
use lomash_platform::nats;
use lomash_platform::waiting::Waiting;
use serde_json::{Map, Value, json};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The stream of incoming orders.
pub const ORDERS: &str = "ORDERS";
/// The ledger.
pub const INVENTORY: &str = "INVENTORY";
/// The durable consumer by which the product service receives orders.
pub const PRODUCT_ORDERS: &str = "product-orders";
/// Its priority group.
pub const PRODUCT_ORDERS_GROUP: &str = "orders";

/// The durable consumer by which the analytics service receives the events of the ledger.
pub const ANALYTICS: &str = "analytics";
/// Its priority group.
pub const ANALYTICS_GROUP: &str = "analytics";
/// The durable consumer by which the notification service receives changes of stock and thresholds.
pub const NOTIFICATION: &str = "notification";
/// Its priority group.
pub const NOTIFICATION_GROUP: &str = "notification";

/// The durable consumer by which a projection that is built anew reads the ledger, see [`crate::JetStreamLedger::through`].
pub const REBUILD: &str = "rebuild";

/// The work queue: schedules and what they start.
pub const JOBS: &str = "JOBS";
/// The durable consumer by which reconciliation runs are received, one at a time.
pub const RECONCILIATION: &str = "reconciliation";

/// The durable consumer by which ticks for snapshots are received, one at a time.
pub const SNAPSHOT_TICKS: &str = "snapshots";
/// The object store of the snapshots.
pub const SNAPSHOTS_BUCKET: &str = "SNAPSHOTS";
/// Its stream, whose name and subjects an object store prescribes.
pub const SNAPSHOTS: &str = "OBJ_SNAPSHOTS";

/// Messages that were delivered too often: what the server gave up, and what is to be tried alone. Its consumers are named
/// after those whose messages they are, see [`crate::suspects`].
pub const ADVISORIES: &str = "ADVISORIES";

/// How long to wait for JetStream to answer while it starts or elects a leader.
pub const READY_TIMEOUT: Duration = Duration::from_secs(30);

const READY_PAUSE: Duration = Duration::from_millis(100);
const NOT_FOUND: u64 = 404;
const UNAVAILABLE: u64 = 503;

/// A stream and its durable consumers, as the files define them.
#[derive(Clone, Debug)]
pub struct Definition {
    /// Name of the stream.
    pub name: String,
    /// Its configuration.
    pub config: Map<String, Value>,
    /// Its durable consumers by name.
    pub consumers: Vec<(String, Map<String, Value>)>,
}

/// A field in which a server differs from its definition.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// The stream, or `stream/consumer`.
    pub name: String,
    /// The field.
    pub field: String,
    /// What the definition says.
    pub defined: Value,
    /// What the server has; null when it has none.
    pub actual: Value,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} is {}, its definition says {}", self.name, self.field, self.actual, self.defined)
    }
}

/// Why definitions could not be applied or compared.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    /// JetStream did not answer.
    #[error("JetStream does not answer ({0}); is the server up and started with JetStream enabled?")]
    Unavailable(String),
    /// The server refused a definition.
    #[error("the server refused {name} ({code}): {description}")]
    Refused {
        /// The stream, or `stream/consumer`.
        name: String,
        /// The server's error code.
        code: u64,
        /// The server's words.
        description: String,
    },
    /// A stream that must exist does not.
    #[error(
        "{0} does not exist; an administrator makes it with `lomash streams apply`. A product service without a key of its \
         own creates it when it starts"
    )]
    Missing(String),
}

/// The definitions, in the order in which they are applied.
///
/// # Panics
/// Never: the files are part of the program and a test reads them.
#[must_use]
pub fn definitions() -> Vec<Definition> {
    fn object(text: &str) -> Map<String, Value> {
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => object,
            other => panic!("a file of streams/ is not a JSON object: {other:?}"),
        }
    }
    let stream = |name: &str, config: &str, consumers: &[(&str, &str)]| Definition {
        name: name.to_owned(),
        config: object(config),
        consumers: consumers.iter().map(|(name, text)| ((*name).to_owned(), object(text))).collect(),
    };
    vec![
        stream(
            ADVISORIES,
            include_str!("../../../streams/ADVISORIES.json"),
            &[
                (PRODUCT_ORDERS, include_str!("../../../streams/consumers/ADVISORIES.product-orders.json")),
                (RECONCILIATION, include_str!("../../../streams/consumers/ADVISORIES.reconciliation.json")),
            ],
        ),
        stream("DEAD_LETTERS", include_str!("../../../streams/DEAD_LETTERS.json"), &[]),
        stream(
            INVENTORY,
            include_str!("../../../streams/INVENTORY.json"),
            &[
                (ANALYTICS, include_str!("../../../streams/consumers/INVENTORY.analytics.json")),
                (NOTIFICATION, include_str!("../../../streams/consumers/INVENTORY.notification.json")),
                (REBUILD, include_str!("../../../streams/consumers/INVENTORY.rebuild.json")),
            ],
        ),
        stream(
            JOBS,
            include_str!("../../../streams/JOBS.json"),
            &[
                (RECONCILIATION, include_str!("../../../streams/consumers/JOBS.reconciliation.json")),
                (SNAPSHOT_TICKS, include_str!("../../../streams/consumers/JOBS.snapshots.json")),
            ],
        ),
        stream("NOTIFICATIONS", include_str!("../../../streams/NOTIFICATIONS.json"), &[]),
        stream(SNAPSHOTS, include_str!("../../../streams/OBJ_SNAPSHOTS.json"), &[]),
        stream(
            ORDERS,
            include_str!("../../../streams/ORDERS.json"),
            &[(PRODUCT_ORDERS, include_str!("../../../streams/consumers/ORDERS.product-orders.json"))],
        ),
    ]
}

/// Whether the files define this durable consumer.
#[must_use]
pub fn is_defined(stream: &str, consumer: &str) -> bool {
    let mut defined = definitions().into_iter().filter(|definition| definition.name == stream);
    defined.any(|definition| definition.consumers.iter().any(|(name, _)| name == consumer))
}

/// Whether a consumer's definition keeps somebody's place. One without acknowledgements only reads, for whoever sets it to
/// where they begin: how far it got says nothing.
#[must_use]
pub fn keeps_a_place(consumer: &Map<String, Value>) -> bool {
    consumer.get("ack_policy").and_then(Value::as_str) != Some("none")
}

/// Whether the files define a stream of this name that takes messages on this very subject.
#[must_use]
pub fn takes(stream: &str, subject: &str) -> bool {
    let defined = definitions().into_iter().find(|definition| definition.name == stream);
    let patterns = defined.as_ref().and_then(|defined| defined.config.get("subjects")).and_then(Value::as_array);
    let mut patterns = patterns.into_iter().flatten().filter_map(Value::as_str);
    let is_literal = subject.split('.').all(|token| !token.is_empty() && !token.contains(['*', '>', ' ']));
    is_literal && patterns.any(|pattern| matches(pattern, subject))
}

/// NATS' own rule: `*` is one token, `>` all that follow.
pub(crate) fn matches(pattern: &str, subject: &str) -> bool {
    let mut tokens = subject.split('.');
    for wanted in pattern.split('.') {
        match (wanted, tokens.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (wanted, Some(token)) if wanted == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

/// Whether the files define `consumer`, and not as one of this stream. Consumers that they do not define may be anybody's.
#[must_use]
pub fn is_read_by_another(stream: &str, consumer: &str) -> bool {
    let readers =
        definitions().into_iter().filter(|definition| definition.consumers.iter().any(|(name, _)| name == consumer));
    let streams: Vec<String> = readers.map(|definition| definition.name).collect();
    !streams.is_empty() && !streams.iter().any(|name| name == stream)
}

/// Whether the files define this stream as a work queue: what is settled is gone from it.
#[must_use]
pub fn is_work_queue(stream: &str) -> bool {
    let mut defined = definitions().into_iter().filter(|definition| definition.name == stream);
    defined.any(|definition| definition.config.get("retention").and_then(Value::as_str) == Some("workqueue"))
}

pub(crate) async fn call(context: &Context, subject: String, body: &Value) -> Result<Value, StreamsError> {
    context
        .request(subject, body)
        .await
        .map_err(|error: async_nats::jetstream::context::RequestError| StreamsError::Unavailable(error.to_string()))
}

pub(crate) fn refusal(name: &str, answer: &Value) -> Option<StreamsError> {
    let error = answer.get("error")?;
    Some(StreamsError::Refused {
        name: name.to_owned(),
        code: error.get("err_code").and_then(Value::as_u64).unwrap_or_default(),
        description: error.get("description").and_then(Value::as_str).unwrap_or("no description").to_owned(),
    })
}

/// The configuration the server holds, or `None` when there is no such stream or consumer.
pub(crate) async fn actual(
    context: &Context,
    subject: String,
    name: &str,
) -> Result<Option<Map<String, Value>>, StreamsError> {
    let answer = call(context, subject, &json!({})).await?;
    config_of(name, &answer)
}

/// The configuration in what the server says of a stream or consumer; nothing when there is none.
pub(crate) fn config_of(name: &str, answer: &Value) -> Result<Option<Map<String, Value>>, StreamsError> {
    if answer.pointer("/error/code").and_then(Value::as_u64) == Some(NOT_FOUND) {
        return Ok(None);
    }
    if let Some(error) = refusal(name, answer) {
        return Err(error);
    }
    Ok(answer.get("config").and_then(Value::as_object).cloned())
}

/// Waits until JetStream answers, as a server that just started or a cluster without a leader does not yet.
///
/// # Errors
/// [`StreamsError::Unavailable`] after [`READY_TIMEOUT`].
pub async fn wait_until_ready(context: &Context) -> Result<(), StreamsError> {
    let deadline = tokio::time::Instant::now() + READY_TIMEOUT;
    let mut waiting = Waiting::on("JetStream to answer");
    loop {
        match waiting.during(call(context, "INFO".to_owned(), &json!({}))).await {
            Ok(answer) if answer.get("error").is_none() => return Ok(()),
            Ok(answer) if tokio::time::Instant::now() >= deadline => {
                return Err(StreamsError::Unavailable(answer["error"].to_string()));
            }
            Err(error) if tokio::time::Instant::now() >= deadline => return Err(error),
            Ok(answer) => waiting.still(&answer["error"]),
            Err(error) => waiting.still(&error),
        }
        tokio::time::sleep(READY_PAUSE).await;
    }
}

/// For a service that starts: waits until JetStream answers and, on a server without users, makes what is missing with
/// `replicas` copies. Where the service has an identity, streams are the administrator's. What differs is logged.
///
/// # Errors
/// [`StreamsError`].
pub async fn prepare(context: &Context, replicas: u32, has_identity: bool) -> Result<(), StreamsError> {
    wait_until_ready(context).await?;
    if !has_identity {
        tell(&apply(context, replicas).await?);
    }
    Ok(())
}

/// Logs what differs.
pub fn tell(differences: &[Difference]) {
    for difference in differences {
        warn!(%difference, "the server differs from streams/");
    }
}

/// Whether the server that we are connected to still has a cluster behind it, judged by a consumer.
///
/// A node that was cut off goes on describing streams for as long as it is alone, also their ends, as they were (2.15.1).
/// Of consumers it says that JetStream is unavailable.
pub async fn is_answered(context: &Context, stream: &str, consumer: &str) -> bool {
    match call(context, format!("CONSUMER.INFO.{stream}.{consumer}"), &json!({})).await {
        Ok(answer) => answer.pointer("/error/code").and_then(Value::as_u64) != Some(UNAVAILABLE),
        Err(_) => false,
    }
}

/// Leaves a server that has lost the others, see [`nats::leave_a_lonely_server`], judged by a consumer that the caller may
/// describe; until `stop`.
pub async fn leave_a_lonely_server(client: Client, stream: &str, consumer: &str, stop: CancellationToken) {
    let context = async_nats::jetstream::new(client.clone());
    nats::leave_a_lonely_server(client, stop, || is_answered(&context, stream, consumer)).await;
}

/// Creates every stream and consumer that is missing, with `replicas` copies. What exists is left as it is and
/// compared: the differences are returned.
///
/// # Errors
/// [`StreamsError`].
pub async fn apply(context: &Context, replicas: u32) -> Result<Vec<Difference>, StreamsError> {
    let mut found = Vec::new();
    for Definition { name, mut config, consumers } in definitions() {
        config.insert("num_replicas".to_owned(), replicas.into());
        match actual(context, format!("STREAM.INFO.{name}"), &name).await? {
            Some(actual) => found.extend(differences(&name, &config, &actual)),
            None => {
                let answer = call(context, format!("STREAM.CREATE.{name}"), &Value::Object(config)).await?;
                if let Some(error) = refusal(&name, &answer) {
                    return Err(error);
                }
            }
        }
        for (consumer, config) in consumers {
            found.extend(ensure(context, &name, &consumer, config).await?);
        }
    }
    Ok(found)
}

/// Compares every stream and consumer with its definition with `replicas` copies, and makes nothing: for a service whose
/// identity may only look.
///
/// # Errors
/// [`StreamsError`]; [`StreamsError::Missing`] when one does not exist.
pub async fn check(context: &Context, replicas: u32) -> Result<Vec<Difference>, StreamsError> {
    let mut found = Vec::new();
    for Definition { name, consumers, .. } in definitions() {
        found.extend(compare(context, &name, replicas).await?);
        for (consumer, config) in consumers {
            let label = format!("{name}/{consumer}");
            let subject = format!("CONSUMER.INFO.{name}.{consumer}");
            let Some(actual) = actual(context, subject, &label).await? else {
                return Err(StreamsError::Missing(label));
            };
            found.extend(differences(&label, &config, &actual));
        }
    }
    Ok(found)
}

/// Creates the durable consumer `consumer` of `stream` from its definition if it is missing. One that was deleted comes
/// back as new and delivers from the stream's beginning; whoever handles messages bears seeing them again.
///
/// # Errors
/// [`StreamsError`]; [`StreamsError::Missing`] when there is no such definition.
pub async fn ensure_consumer(context: &Context, stream: &str, consumer: &str) -> Result<(), StreamsError> {
    let defined = definitions().into_iter().find(|definition| definition.name == stream);
    let config = defined.and_then(|defined| defined.consumers.into_iter().find(|(name, _)| name == consumer));
    let (_, config) = config.ok_or_else(|| StreamsError::Missing(format!("{stream}/{consumer}")))?;
    ensure(context, stream, consumer, config).await.map(|_| ())
}

/// Creates the consumer if it is missing, else tells in what it differs.
async fn ensure(
    context: &Context,
    stream: &str,
    consumer: &str,
    config: Map<String, Value>,
) -> Result<Vec<Difference>, StreamsError> {
    let label = format!("{stream}/{consumer}");
    if let Some(actual) = actual(context, format!("CONSUMER.INFO.{stream}.{consumer}"), &label).await? {
        return Ok(differences(&label, &config, &actual));
    }
    let subject = consumer_create_subject(stream, consumer, &config);
    let request = json!({ "stream_name": stream, "config": config, "action": "create" });
    let answer = call(context, subject, &request).await?;
    refusal(&label, &answer).map_or(Ok(Vec::new()), Err)
}

/// The subject by which the `nats` CLI creates a consumer: its filter is part of it, so that permissions can name it. With
/// several filters there is none in the subject; the server requires that.
pub(crate) fn consumer_create_subject(stream: &str, consumer: &str, config: &Map<String, Value>) -> String {
    match config.get("filter_subject").and_then(Value::as_str) {
        Some(filter) if !filter.is_empty() => format!("CONSUMER.CREATE.{stream}.{consumer}.{filter}"),
        _ => format!("CONSUMER.CREATE.{stream}.{consumer}"),
    }
}

/// In which fields the stream `name` on the server is not what its definition says with `replicas` copies. More copies
/// are no difference.
///
/// # Errors
/// [`StreamsError::Missing`] when there is no such stream.
pub async fn compare(context: &Context, name: &str, replicas: u32) -> Result<Vec<Difference>, StreamsError> {
    let missing = || StreamsError::Missing(name.to_owned());
    let mut definition = definitions().into_iter().find(|definition| definition.name == name).ok_or_else(missing)?;
    definition.config.insert("num_replicas".to_owned(), replicas.into());
    let actual = actual(context, format!("STREAM.INFO.{name}"), name).await?.ok_or_else(missing)?;
    Ok(differences(name, &definition.config, &actual))
}

/// Fields that say nothing about what a stream keeps, and those that the deployment decides.
const FREE_FIELDS: [&str; 4] = ["description", "metadata", "placement", "consumer_limits"];

/// What the server leaves out because it is zero, false or empty.
fn is_absent(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_i64() == Some(0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
    }
}

/// Compares both ways: a field that the definition does not name (a mirror, a subject transform, a seal) must not be
/// set on the server either. Consumers are compared only in what their definition names.
pub(crate) fn differences(name: &str, defined: &Map<String, Value>, actual: &Map<String, Value>) -> Vec<Difference> {
    let is_stream = !name.contains('/');
    let unnamed = actual.keys().filter(|field| is_stream && !defined.contains_key(*field));
    defined
        .keys()
        .chain(unnamed)
        .filter(|field| !FREE_FIELDS.contains(&field.as_str()))
        .filter_map(|field| {
            let defined = defined.get(field).unwrap_or(&Value::Null);
            let found = actual.get(field).unwrap_or(&Value::Null);
            let same = match field.as_str() {
                "num_replicas" => found.as_u64() >= defined.as_u64(),
                _ => found == defined || (is_absent(found) && is_absent(defined)),
            };
            (!same).then(|| Difference {
                name: name.to_owned(),
                field: field.clone(),
                defined: defined.clone(),
                actual: found.clone(),
            })
        })
        .collect()
}
