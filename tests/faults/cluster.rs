//! Three nodes under load: each is killed, one is frozen, all are killed, each is restarted, and one is cut off from the others.
//! Nothing acknowledged is lost, nothing is done twice, and orders flow again by themselves.
//!
//! How long that took is printed beside its target and fails nothing: the machine may be busy. Every program connects under
//! its own key, as in `just cluster`.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use lomash::cluster::{self, ClusterStack, Load, Orders, TROUBLES, leader, wait_until_healthy};
use lomash::stack::{NODES, NatsCluster, Routes, Who, free_port, scratch};
use lomash::verify::{self, Show};
use lomash_ledger::{JetStreamLedger, Ledger, streams};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::link::{Link, Wire};
use crate::support::PATIENCE;

/// Pause between two looks.
const LOOK_PAUSE: Duration = Duration::from_millis(50);

/// Held while a test runs three nodes: twice three and their services at once are more than a small machine elects leaders
/// for in time.
static THREE_NODES: Mutex<()> = Mutex::const_new(());

/// The port of the discard service: nobody listens there.
const NOWHERE: u16 = 9;

fn product_service() -> &'static Path {
    // Built with this crate, so never stale.
    Path::new(env!("CARGO_BIN_EXE_product-service-under-test"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_trouble_of_the_nodes() {
    let _alone = THREE_NODES.lock().await;
    let folder = scratch().unwrap();
    let nats = NatsCluster::start(&folder.path().join("nats")).await.unwrap();
    let mut stack = ClusterStack::start_with(folder.path(), nats, product_service()).await.unwrap();
    let report = cluster::check(&mut stack, Orders::thrown(), |line| println!("{line}")).await.unwrap();
    println!("{}", cluster::render(&report));
    assert!(report.is_good(), "{}", cluster::render(&report));
    assert_eq!(report.faults.len(), TROUBLES);
    stack.stop().await.unwrap();
}

/// Three nodes that reach each other over links only, and the links of each: in both directions.
async fn linked(dir: &Path) -> (NatsCluster, [Vec<Arc<Link>>; NODES]) {
    let listen = [free_port().unwrap(), free_port().unwrap(), free_port().unwrap()];
    let mut links: [Vec<Arc<Link>>; NODES] = Default::default();
    let mut routes = Vec::new();
    for from in 0..NODES {
        let mut others = Vec::new();
        for to in (0..NODES).filter(|to| *to != from) {
            let link = Arc::new(Link::lay(listen[to]).await);
            others.push(link.port);
            links[from].push(link.clone());
            links[to].push(link);
        }
        // What nodes tell each other of their addresses leads nowhere.
        routes.push(Routes { listen: listen[from], advertise: NOWHERE, others });
    }
    let routes: [Routes; NODES] = routes.try_into().unwrap();
    (NatsCluster::start_with(dir, routes).await.unwrap(), links)
}

/// Waits until analytics and notification have settled what the ledger holds now.
async fn downstream_has_what_is_there_now(operator: &Context) {
    let ledger = JetStreamLedger::read_only(operator.clone(), streams::INVENTORY);
    let waiting = async {
        let mut last = ledger.last_sequence().await;
        while last.is_err() {
            tokio::time::sleep(LOOK_PAUSE).await;
            last = ledger.last_sequence().await;
        }
        for consumer in [streams::ANALYTICS, streams::NOTIFICATION] {
            while settled(operator, consumer).await < last.as_ref().ok().copied() {
                tokio::time::sleep(LOOK_PAUSE).await;
            }
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect("the services downstream follow the ledger");
}

/// Up to where a consumer of the ledger has settled everything; None when nobody says.
async fn settled(operator: &Context, consumer: &str) -> Option<u64> {
    let subject = format!("CONSUMER.INFO.{}.{consumer}", streams::INVENTORY);
    let info: Value = operator.request(subject, &json!({})).await.ok()?;
    info["ack_floor"]["stream_seq"].as_u64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_from_the_others() {
    let _alone = THREE_NODES.lock().await;
    let folder = scratch().unwrap();
    let (nats, links) = linked(&folder.path().join("nats")).await;
    let mut stack = ClusterStack::start_with(folder.path(), nats, product_service()).await.unwrap();
    let admin = stack.context(Who::Administrator).await.unwrap();
    wait_until_healthy(&admin).await.unwrap();
    let load = Load::start(&stack, &Orders::MadeUp(7)).await.unwrap();
    load.flows().await.unwrap();

    let leads = leader(&admin, streams::INVENTORY).await.unwrap().expect("it has a leader");
    let cut_off = stack.nats.nodes.iter().position(|node| node.node() == leads).unwrap();
    // The services downstream are connected to it, and not by chance.
    let url = stack.nats.nodes[cut_off].url();
    for service in &mut stack.services()[1..] {
        service.set_env("NATS_URL", &url);
        service.restart().unwrap();
    }
    let operator = stack.client(Who::Operator).await.unwrap();
    let until_the_end = CancellationToken::new();
    tokio::spawn(streams::leave_a_lonely_server(
        operator.clone(),
        streams::ORDERS,
        streams::PRODUCT_ORDERS,
        until_the_end.clone(),
    ));
    let operator = async_nats::jetstream::new(operator);
    downstream_has_what_is_there_now(&operator).await;

    println!("cutting {leads} off, which leads the ledger");
    let since = Instant::now();
    for link in &links[cut_off] {
        link.set(Wire::Broken);
    }
    // Whoever is connected to the node that was cut off must find the others by itself.
    load.flows().await.unwrap();
    let (acknowledged, decided) = load.gaps(since);
    println!("no order acknowledged for {} ms, none decided for {} ms", acknowledged.as_millis(), decided.as_millis());
    downstream_has_what_is_there_now(&operator).await;
    println!("the services downstream had found the others after {} ms", since.elapsed().as_millis());

    for link in &links[cut_off] {
        link.set(Wire::Whole);
    }
    // A copy that was away for so long need not catch up at full load.
    let orders = load.end().await.unwrap();
    println!("{orders} orders");
    wait_until_healthy(&admin).await.unwrap();
    until_the_end.cancel();
    let database_url = stack.database_url();
    verify::wait_until_quiet(&operator, Some(&database_url), PATIENCE).await.unwrap();
    for node in &stack.nats.nodes {
        cluster::make_leader(&admin, streams::INVENTORY, node.node()).await.unwrap();
        let report = verify::verify(&operator, Some(&database_url), Show::Nothing).await.unwrap();
        assert!(report.is_clean(), "{} as leader\n{}", node.node(), verify::render(&report));
    }
    stack.stop().await.unwrap();
}
