//! `kill -9` of nats-server, Postgres and the product service, over and over, while orders come in.
//!
//! `LOMASH_KILLS` says how often each is killed (2 by itself), `LOMASH_RETAIL_CSV` names a retail file whose orders to
//! use instead of made-up ones, `LOMASH_SEED` repeats the order of the victims that a run has printed.

use std::sync::Arc;

use crate::support::{Load, world};
use lomash::dice::Dice;
use tokio::sync::Semaphore;

/// Made-up orders, when there is no file.
const ORDERS: u64 = 3_000;

#[derive(Clone, Copy, Debug)]
enum Victim {
    Nats,
    Postgres,
    ProductService,
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_again_and_again_nothing_is_lost_and_nothing_is_done_twice() {
    let times = setting("LOMASH_KILLS").unwrap_or(2);
    let seed = setting("LOMASH_SEED").unwrap_or_else(|| uuid::Uuid::new_v4().as_u64_pair().0);
    println!("LOMASH_SEED={seed} LOMASH_KILLS={times}");
    let mut dice = Dice(seed);
    let load = match std::env::var_os("LOMASH_RETAIL_CSV") {
        Some(file) => Load::retail(file.as_ref()),
        None => Load::kitchen(ORDERS),
    };
    let mut victims = Vec::new();
    for _ in 0..times {
        victims.extend([Victim::Nats, Victim::Postgres, Victim::ProductService]);
    }
    for index in (1..victims.len()).rev() {
        victims.swap(index, dice.index(index + 1));
    }

    let mut world = world().await;
    load.import(&world).await;
    let permits = Arc::new(Semaphore::new(0));
    let publishing = tokio::spawn(load.clone().publish_with(world.context.clone(), permits.clone()));
    let chunk = load.orders.len() / (victims.len() + 1);
    for (round, victim) in victims.into_iter().enumerate() {
        let before = world.last_sequence().await;
        permits.add_permits(chunk);
        // Somewhere among the decisions of this chunk, at another place each time.
        world.advanced_beyond(before + dice.below(chunk as u64 / 2)).await;
        println!("kill {round}: {victim:?} after sequence {}", world.last_sequence().await);
        match victim {
            Victim::Nats => {
                world.stack.nats.kill();
                world.stack.nats.restart().await.unwrap();
            }
            Victim::Postgres => {
                world.stack.postgres.kill();
                world.stack.postgres.restart().await.unwrap();
            }
            Victim::ProductService => world.stack.services()[0].restart().unwrap(),
        }
    }
    permits.add_permits(load.orders.len());
    publishing.await.unwrap();
    load.settle(&world).await;
    world.stack.stop().await.unwrap();
}
