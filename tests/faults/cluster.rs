//! Three nodes under load: each is killed, all are, and one is cut off from the others. Nothing acknowledged is lost, nothing
//! is done twice, and orders flow again by themselves.
//!
//! How long that took is printed beside its target and fails nothing: the machine may be busy. Every program connects under
//! its own key, as in `just cluster`.

use std::path::Path;
use std::sync::Arc;

use lomash::cluster::{self, ClusterStack, Load, leader, wait_until_healthy};
use lomash::stack::{NODES, NatsCluster, Routes, Who, free_port, scratch};
use lomash::verify::{self, Show};
use lomash_ledger::streams;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::support::PATIENCE;

/// The port of the discard service: nobody listens there.
const NOWHERE: u16 = 9;

fn product_service() -> &'static Path {
    // Built with this crate, so never stale.
    Path::new(env!("CARGO_BIN_EXE_product-service-under-test"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_node_is_killed_and_then_all() {
    let folder = scratch().unwrap();
    let nats = NatsCluster::start(&folder.path().join("nats")).await.unwrap();
    let mut stack = ClusterStack::start_with(folder.path(), nats, product_service()).await.unwrap();
    let report = cluster::check(&mut stack, |line| println!("{line}")).await.unwrap();
    println!("{}", cluster::render(&report));
    assert!(report.is_good(), "{}", cluster::render(&report));
    assert_eq!(report.faults.len(), NODES + 1);
    stack.stop().await.unwrap();
}

/// What lies between two nodes, in one direction: can be cut and mended.
struct Link {
    port: u16,
    whole: watch::Sender<bool>,
}

impl Link {
    async fn lay(to: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (whole, _) = watch::channel(true);
        let is_whole = whole.clone();
        tokio::spawn(async move {
            while let Ok((mut from, _)) = listener.accept().await {
                let mut state = is_whole.subscribe();
                tokio::spawn(async move {
                    let cut = async {
                        // An error means that the test is over.
                        let _ = state.wait_for(|whole| !whole).await;
                    };
                    let passing = async {
                        if let Ok(mut there) = TcpStream::connect(("127.0.0.1", to)).await {
                            let _ = copy_bidirectional(&mut from, &mut there).await;
                        }
                    };
                    tokio::select! {
                        biased;
                        () = cut => {}
                        () = passing => {}
                    }
                });
            }
        });
        Self { port, whole }
    }
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_from_the_others() {
    let folder = scratch().unwrap();
    let (nats, links) = linked(&folder.path().join("nats")).await;
    let stack = ClusterStack::start_with(folder.path(), nats, product_service()).await.unwrap();
    let admin = stack.context(Who::Administrator).await.unwrap();
    wait_until_healthy(&admin).await.unwrap();
    let load = Load::start(&stack, 7).await.unwrap();
    load.flows().await.unwrap();

    let leads = leader(&admin, streams::INVENTORY).await.unwrap().expect("it has a leader");
    let cut_off = stack.nats.nodes.iter().position(|node| node.node() == leads).unwrap();
    println!("cutting {leads} off, which leads the ledger");
    let since = Instant::now();
    for link in &links[cut_off] {
        link.whole.send_replace(false);
    }
    // Whoever is connected to the node that was cut off must find the others by itself.
    load.flows().await.unwrap();
    let (acknowledged, decided) = load.gaps(since);
    println!("no order acknowledged for {} ms, none decided for {} ms", acknowledged.as_millis(), decided.as_millis());

    for link in &links[cut_off] {
        link.whole.send_replace(true);
    }
    wait_until_healthy(&admin).await.unwrap();
    let orders = load.end().await.unwrap();
    println!("{orders} orders");
    let operator = stack.context(Who::Operator).await.unwrap();
    let database_url = stack.database_url();
    verify::wait_until_quiet(&operator, Some(&database_url), PATIENCE).await.unwrap();
    for node in &stack.nats.nodes {
        cluster::make_leader(&admin, streams::INVENTORY, node.node()).await.unwrap();
        let report = verify::verify(&operator, Some(&database_url), Show::Nothing).await.unwrap();
        assert!(report.is_clean(), "{} as leader\n{}", node.node(), verify::render(&report));
    }
    stack.stop().await.unwrap();
}
