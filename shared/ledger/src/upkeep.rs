//! Bringing a server to the definitions of `streams/`: what is missing is made, what can be changed without harm is
//! changed, and what could lose a message or weaken the ledger is refused with the way to do it by hand.
//!
//! For an administrator; services only look (`streams::check`). Whether a change is harmless is decided field by field by
//! [`harm`], which knows each field that may be changed. What it does not know is refused.

use async_nats::jetstream::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::streams::{
    Definition, Difference, INVENTORY, StreamsError, actual, call, config_of, consumer_create_subject, definitions,
    differences, refusal,
};

/// What is to be done about one stream or consumer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// The stream, or `stream/consumer`.
    pub name: String,
    /// What is to be done.
    pub action: Action,
    /// The fields that are changed.
    pub changes: Vec<Difference>,
    /// The fields that are not, and why.
    pub refused: Vec<Refused>,
    /// What is sent to the server.
    #[serde(skip)]
    config: Map<String, Value>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Action {
    /// Nothing: it is as it is defined, or all that differs is refused.
    Leave,
    /// It is missing.
    Create,
    /// Some fields differ.
    Update,
}

/// A field that is left as it is.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// In what it differs.
    pub difference: Difference,
    /// What the change would do, and how to do it if it is meant.
    pub why: String,
}

/// Compares the server with the definitions, for streams with `replicas` copies.
///
/// # Errors
/// [`StreamsError`].
pub async fn plan(context: &Context, replicas: u32) -> Result<Vec<Step>, StreamsError> {
    let mut steps = Vec::new();
    for Definition { name, mut config, consumers } in definitions() {
        config.insert("num_replicas".to_owned(), replicas.into());
        let found = found(context, format!("STREAM.INFO.{name}"), &name).await?;
        let has_stream = found.is_some();
        let (found, held) = found.unzip();
        steps.push(step(name.clone(), config, found, held.flatten()));
        for (consumer, config) in consumers {
            let label = format!("{name}/{consumer}");
            let found = match has_stream {
                true => actual(context, format!("CONSUMER.INFO.{name}.{consumer}"), &label).await?,
                false => None,
            };
            steps.push(step(label, config, found, None));
        }
    }
    Ok(steps)
}

/// How a stream is configured, and what it holds; nothing when there is none.
async fn found(
    context: &Context,
    subject: String,
    name: &str,
) -> Result<Option<(Map<String, Value>, Option<Held>)>, StreamsError> {
    let answer = call(context, subject, &json!({})).await?;
    let held = answer.get("state").and_then(|state| Held::deserialize(state).ok());
    Ok(config_of(name, &answer)?.map(|config| (config, held)))
}

/// What a stream holds now.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Held {
    messages: u64,
    bytes: u64,
}

impl Held {
    /// Whether the stream is within a limit of this field, so that setting it deletes nothing.
    fn fits(self, field: &str, limit: u64) -> bool {
        match field {
            // None of its subjects can have more than all.
            "max_msgs" | "max_msgs_per_subject" => self.messages <= limit,
            "max_bytes" => self.bytes <= limit,
            _ => false,
        }
    }
}

fn step(name: String, defined: Map<String, Value>, found: Option<Map<String, Value>>, held: Option<Held>) -> Step {
    let Some(found) = found else {
        return Step { name, action: Action::Create, changes: Vec::new(), refused: Vec::new(), config: defined };
    };
    let (mut changes, mut refused) = (Vec::new(), Vec::new());
    for difference in differences(&name, &defined, &found) {
        match harm(&difference, &defined, held) {
            None => changes.push(difference),
            Some(why) => refused.push(Refused { difference, why }),
        }
    }
    // Fields of a consumer belong together: half of a new definition may be one that the server does not take.
    if name.contains('/') && !refused.is_empty() {
        changes.clear();
    }
    // What the server has, with nothing but the harmless changes over it.
    let mut config = found;
    for Difference { field, defined, .. } in &changes {
        match defined {
            Value::Null => config.remove(field),
            defined => config.insert(field.clone(), defined.clone()),
        };
    }
    let action = if changes.is_empty() { Action::Leave } else { Action::Update };
    Step { name, action, changes, refused, config }
}

/// Carries a step out.
///
/// # Errors
/// [`StreamsError`]; the server keeps what it had.
pub async fn carry_out(context: &Context, step: &Step) -> Result<(), StreamsError> {
    let config = &step.config;
    let (subject, request) = match (step.name.split_once('/'), step.action) {
        (_, Action::Leave) => return Ok(()),
        (None, Action::Create) => (format!("STREAM.CREATE.{}", step.name), json!(config)),
        (None, Action::Update) => (format!("STREAM.UPDATE.{}", step.name), json!(config)),
        (Some((stream, consumer)), action) => {
            let action = if action == Action::Create { "create" } else { "update" };
            let request = json!({ "stream_name": stream, "config": config, "action": action });
            (consumer_create_subject(stream, consumer, config), request)
        }
    };
    let answer = call(context, subject, &request).await?;
    refusal(&step.name, &answer).map_or(Ok(()), Err)
}

/// What a change would do that nobody does by the way, or `None` when it does no harm.
fn harm(difference: &Difference, definition: &Map<String, Value>, held: Option<Held>) -> Option<String> {
    let Difference { name, field, defined, actual } = difference;
    match name.split_once('/') {
        None => harm_to_stream(name, field, defined, actual, definition, held),
        Some((stream, consumer)) => harm_to_consumer(stream, consumer, field),
    }
}

fn harm_to_stream(
    name: &str,
    field: &str,
    defined: &Value,
    actual: &Value,
    definition: &Map<String, Value>,
    held: Option<Held>,
) -> Option<String> {
    let by_hand =
        format!("if you mean it, back the stream up and run `nats stream edit {name} --config streams/{name}.json`");
    let set = |value: &Value| value.as_bool() == Some(true);
    match field {
        // More copies; fewer are no difference.
        "num_replicas" => None,
        // How long it keeps messages, and how many. Widening takes nothing away.
        "max_age" | "max_msgs" | "max_bytes" | "max_msgs_per_subject" if limit(defined) >= limit(actual) => None,
        // Nor does a limit that a stream is within which refuses what is over it; one that forgets would forget more.
        "max_msgs" | "max_bytes" | "max_msgs_per_subject"
            if definition.get("discard").is_some_and(|discard| discard == "new")
                && held.is_some_and(|held| held.fits(field, limit(defined))) =>
        {
            None
        }
        "max_age" | "max_msgs" | "max_bytes" | "max_msgs_per_subject" => {
            Some(format!("the server would delete what is over the new limit at once; {by_hand}"))
        }
        // Concerns what is published from now on, and is answered with an error.
        "max_msg_size" | "max_consumers" => None,
        "duplicate_window" | "compression" | "republish" => None,
        "allow_direct" | "allow_atomic" => None,
        // Concerns what is published from now on: it is refused, or makes room.
        "discard_new_per_subject" if set(defined) => None,
        // A stream that is full refuses instead of forgetting.
        "discard" if defined == "new" => None,
        "discard" => {
            let is_limited = ["max_age", "max_msgs", "max_bytes"]
                .iter()
                .any(|name| definition.get(*name).is_some_and(|value| limit(value) < u64::MAX));
            is_limited.then(|| format!("a full stream would drop its oldest messages from now on; {by_hand}"))
        }
        "deny_delete" | "deny_purge" if set(defined) => None,
        "deny_delete" | "deny_purge" => Some(format!("what is denied once stays denied on this server; {by_hand}")),
        // What lets a message take others away, or vanish by itself: switching it off keeps more.
        "allow_rollup_hdrs" | "allow_msg_ttl" | "allow_msg_schedules" | "subject_delete_marker_ttl"
            if !set(defined) =>
        {
            None
        }
        "allow_rollup_hdrs" | "allow_msg_ttl" | "allow_msg_schedules" if name != INVENTORY => None,
        "subjects" if covers(defined, actual) => None,
        "subjects" => {
            Some(format!("messages on a subject that is left out would be stored nowhere any more; {by_hand}"))
        }
        "retention" | "storage" | "mirror" | "sources" | "sealed" => Some(format!(
            "it decides what the stream is and cannot be changed in place: back it up, make it anew, restore; see \
             docs/operations.md. Now it is {actual}"
        )),
        _ => Some(format!("what this change does is not known here; {by_hand}")),
    }
}

fn harm_to_consumer(stream: &str, consumer: &str, field: &str) -> Option<String> {
    match field {
        "ack_wait" | "max_deliver" | "max_ack_pending" | "max_waiting" | "backoff" | "inactive_threshold"
        | "priority_timeout" | "num_replicas" => None,
        _ => Some(format!(
            "it decides what is delivered and cannot be changed under a running consumer: stop its service, run \
             `nats consumer rm {stream} {consumer}` and then this again. The new one delivers from the beginning, which \
             its service bears"
        )),
    }
}

/// A limit as the server means it: nothing, zero and negative are none.
fn limit(value: &Value) -> u64 {
    match value.as_i64() {
        Some(limit) if limit > 0 => limit.cast_unsigned(),
        _ => u64::MAX,
    }
}

/// Whether each subject of `narrow` is one of `wide`'s.
fn covers(wide: &Value, narrow: &Value) -> bool {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let wide = list(wide);
    list(narrow).iter().all(|subject| wide.contains(subject))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defined() -> Map<String, Value> {
        definitions()
            .into_iter()
            .find(|definition| definition.name == INVENTORY)
            .map(|found| found.config)
            .expect("there")
    }

    #[test]
    fn a_change_is_harmless_or_refused_with_the_reason() {
        for (field, actual, refused) in [
            // The server is stricter than the definition in what it keeps: widening is harmless.
            ("max_msgs", json!(10), None),
            ("max_age", json!(3600), None),
            ("max_bytes", json!(1 << 30), None),
            ("deny_purge", json!(false), None),
            ("deny_delete", Value::Null, None),
            ("allow_rollup_hdrs", json!(true), None),
            ("allow_msg_ttl", json!(true), None),
            ("discard", json!("old"), None),
            ("subjects", json!(["lomash.inventory.*.*"]), None),
            ("republish", Value::Null, None),
            ("num_replicas", json!(0), None),
            (
                "subjects",
                json!(["lomash.inventory.*.*", "lomash.products.*.*", "lomash.more.>"]),
                Some("stored nowhere"),
            ),
            ("retention", json!("interest"), Some("make it anew")),
            ("storage", json!("memory"), Some("make it anew")),
            ("sealed", json!(true), Some("make it anew")),
            ("mirror", json!({ "name": "X" }), Some("make it anew")),
            ("first_seq", json!(7), Some("not known here")),
        ] {
            let mut found = defined();
            found.insert(field.to_owned(), actual.clone());
            let step = step(INVENTORY.to_owned(), defined(), Some(found), None);
            match refused {
                None => {
                    assert_eq!((step.action, step.refused.len()), (Action::Update, 0), "{field} {actual}: {step:?}");
                    assert_eq!(step.changes[0].field, field);
                    let wanted = defined().remove(field).unwrap_or(Value::Null);
                    assert_eq!(step.config.get(field).unwrap_or(&Value::Null), &wanted, "{field}");
                }
                Some(why) => {
                    assert_eq!((step.action, step.changes.len()), (Action::Leave, 0), "{field} {actual}: {step:?}");
                    assert!(step.refused[0].why.contains(why), "{field}: {}", step.refused[0].why);
                    assert_eq!(step.config.get(field), Some(&actual), "{field} is left alone");
                }
            }
        }
    }

    #[test]
    fn a_limit_that_would_delete_is_refused() {
        let letters = definitions().into_iter().find(|definition| definition.name == "DEAD_LETTERS").expect("there");
        for (field, held, refused) in [
            ("max_bytes", None, true),
            ("max_bytes", Some(Held { messages: 1, bytes: u64::MAX }), true),
            ("max_bytes", Some(Held { messages: u64::MAX, bytes: 1_000 }), false),
            ("max_msgs_per_subject", Some(Held { messages: 4_001, bytes: 1_000 }), true),
            // Whatever the letters are about, none has more.
            ("max_msgs_per_subject", Some(Held { messages: 4_000, bytes: u64::MAX }), false),
        ] {
            let mut found = letters.config.clone();
            found.insert(field.to_owned(), json!(-1));
            let step = step(letters.name.clone(), letters.config.clone(), Some(found), held);
            if refused {
                assert_eq!(step.action, Action::Leave, "{field} {held:?}");
                assert!(step.refused[0].why.starts_with("the server would delete"), "{:?}", step.refused);
            } else {
                assert_eq!((step.action, step.refused.len()), (Action::Update, 0), "{field} {held:?}: {step:?}");
            }
        }
    }
}
