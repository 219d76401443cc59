//! `lomash streams diff|apply` on a real server: what is missing is made, what does no harm is changed, and what would lose a
//! message is left alone with the reason.
use anyhow::{Result, ensure};
use lomash::streams::render;
use lomash_ledger::streams;
use lomash_ledger::upkeep::{self, Action, Step};
use lomash_tests::World;
use serde_json::{Map, Value, json};

async fn ask(world: &World, subject: String, body: Value) -> Result<Value> {
    let answer = world.client.request(format!("$JS.API.{subject}"), body.to_string().into()).await?;
    let answer: Value = serde_json::from_slice(&answer.payload)?;
    ensure!(answer.get("error").is_none(), "{subject}: {answer}");
    Ok(answer)
}

/// Makes a stream anew with some fields of its definition changed.
async fn make(world: &World, name: &str, changes: Value) -> Result<()> {
    let definition = streams::definitions().into_iter().find(|definition| definition.name == name).unwrap();
    let mut config: Map<String, Value> = definition.config;
    config.extend(changes.as_object().unwrap().clone());
    world.context.delete_stream(name).await?;
    ask(world, format!("STREAM.CREATE.{name}"), config.into()).await?;
    for (consumer, config) in definition.consumers {
        let filter = config.get("filter_subject").and_then(Value::as_str).map(|filter| format!(".{filter}"));
        let subject = format!("CONSUMER.CREATE.{name}.{consumer}{}", filter.unwrap_or_default());
        ask(world, subject, json!({ "stream_name": name, "config": config, "action": "create" })).await?;
    }
    Ok(())
}

async fn config(world: &World, name: &str) -> Result<Value> {
    Ok(ask(world, format!("STREAM.INFO.{name}"), json!({})).await?["config"].clone())
}

async fn plan(world: &World) -> Result<Vec<Step>> {
    Ok(upkeep::plan(&world.context, 1).await?)
}

async fn apply(world: &World) -> Result<Vec<Step>> {
    let steps = plan(world).await?;
    for step in &steps {
        upkeep::carry_out(&world.context, step).await?;
    }
    Ok(steps)
}

#[tokio::test]
async fn what_does_no_harm_is_changed_and_nothing_is_lost() -> Result<()> {
    let world = World::without_postgres().await?;
    make(&world, streams::INVENTORY, json!({ "deny_purge": false, "max_msgs": 5, "discard": "old" })).await?;
    for number in 0..5 {
        let subject = format!("lomash.inventory.updated.{number}");
        world.context.publish(subject, "{}".into()).await?.await?;
    }
    let letters = "DEAD_LETTERS";
    world.context.delete_stream(letters).await?;

    let planned = plan(&world).await?;
    let shown = render(&planned, false);
    assert!(shown.contains("max_msgs") && shown.contains("can be changed") && shown.contains("to be made"), "{shown}");
    assert_eq!(config(&world, streams::INVENTORY).await?["max_msgs"], 5, "a plan changes nothing");

    let steps = apply(&world).await?;
    assert_eq!(steps, planned);
    let action = |name: &str| steps.iter().find(|step| step.name == name).map(|step| step.action);
    assert_eq!(action(streams::INVENTORY), Some(Action::Update));
    assert_eq!(action(letters), Some(Action::Create));
    assert_eq!(action(streams::ORDERS), Some(Action::Leave));
    assert_eq!(streams::compare(&world.context, streams::INVENTORY, 1).await?, []);
    assert_eq!(streams::compare(&world.context, letters, 1).await?, []);
    let info = ask(&world, "STREAM.INFO.INVENTORY".to_owned(), json!({})).await?;
    assert_eq!((&info["state"]["messages"], &info["state"]["first_seq"]), (&json!(5), &json!(1)));
    assert!(plan(&world).await?.iter().all(|step| step.action == Action::Leave && step.refused.is_empty()));
    world.close();
    Ok(())
}

#[tokio::test]
async fn what_would_lose_a_message_is_left_alone_with_the_reason() -> Result<()> {
    let world = World::without_postgres().await?;
    // Wider than defined: bringing it to the definition would delete what is over the limit.
    make(&world, "NOTIFICATIONS", json!({ "max_bytes": -1, "max_age": 0 })).await?;
    make(&world, streams::ORDERS, json!({ "subjects": ["lomash.orders.*", "lomash.legacy.*"] })).await?;
    // A consumer that skips orders, and one that waits for another time.
    world.context.get_stream(streams::ORDERS).await?.delete_consumer(streams::PRODUCT_ORDERS).await?;
    let skips = json!({ "durable_name": streams::PRODUCT_ORDERS, "ack_policy": "explicit", "filter_subject": "lomash.legacy.x" });
    let body = json!({ "stream_name": streams::ORDERS, "config": skips, "action": "create" });
    ask(&world, "CONSUMER.CREATE.ORDERS.product-orders.lomash.legacy.x".to_owned(), body).await?;

    let steps = apply(&world).await?;
    let refused: Vec<(&str, &str)> = steps
        .iter()
        .flat_map(|step| step.refused.iter().map(|refused| (step.name.as_str(), refused.difference.field.as_str())))
        .collect();
    for expected in [
        ("NOTIFICATIONS", "max_bytes"),
        ("NOTIFICATIONS", "max_age"),
        ("ORDERS", "subjects"),
        ("ORDERS/product-orders", "filter_subject"),
    ] {
        assert!(refused.contains(&expected), "{expected:?} is not refused: {refused:?}");
    }
    let shown = render(&steps, true);
    for words in [
        "would delete what is over the new limit",
        "nats stream edit NOTIFICATIONS",
        "nats consumer rm ORDERS product-orders",
    ] {
        assert!(shown.contains(words), "{words}\n{shown}");
    }
    assert_eq!(config(&world, "NOTIFICATIONS").await?["max_bytes"], -1);
    assert_eq!(config(&world, streams::ORDERS).await?["subjects"], json!(["lomash.orders.*", "lomash.legacy.*"]));
    world.close();
    Ok(())
}
