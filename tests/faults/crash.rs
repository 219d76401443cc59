//! The product service dies at each named point of the commit path, under load, and is started again: nothing is lost,
//! nothing is done twice.
//!
//! The process really aborts: the points are compiled in by the `failpoints` feature, which this crate turns on.

use crate::support::{Load, PATIENCE, world};

/// Orders of each run.
const ORDERS: u64 = 1_500;

/// Lets the service abort when it comes to `point` for the time after `passes`, while orders come in.
async fn dies_and_recovers(point: &str, passes: u32) {
    let mut world = world().await;
    let load = Load::kitchen(ORDERS);
    load.import(&world).await;
    let service = &mut world.stack.services()[0];
    service.set_env("FAILPOINTS", format!("{point}={passes}*off->return"));
    service.restart().unwrap();
    // Not before the new process has the pin of the old one: else all orders wait and are decided in one batch.
    load.publish_first(&world).await;
    let publishing = tokio::spawn(load.clone().publish(world.context.clone()));
    let died = tokio::time::timeout(PATIENCE, world.stack.services()[0].ended()).await;
    let died = died.unwrap_or_else(|_| panic!("the service came through {point} alive"));
    assert!(!died.success(), "it aborts at {point}, not ends: {died}");
    let service = &mut world.stack.services()[0];
    service.remove_env("FAILPOINTS");
    service.restart().unwrap();
    publishing.await.unwrap();
    load.settle(&world).await;
    world.stack.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_the_batch() {
    dies_and_recovers("commit-before-batch", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn between_the_messages_of_a_batch() {
    dies_and_recovers("commit-between-messages", 300).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_the_message_that_commits() {
    dies_and_recovers("commit-before-last-message", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_commit_and_before_the_orders_are_acknowledged() {
    dies_and_recovers("commit-after-ack", 3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_projection_committed() {
    dies_and_recovers("project-after-commit", 2).await;
}
