//! The study of reads: the same GET from the cache and from Postgres, as fast as a few connections ask one after the other.
//!
//! Two replicas of the service run side by side, one with Redis and one without; one of them is asked at a time, in turns.
//! What is asked for is warm in both: in Redis, and in Postgres' own memory. The client is this process, on the same
//! machine, so rates are those of client and server together; their ratio says less than the server alone would.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use lomash_platform::Secret;
use lomash_web::Role;
use reqwest::{Client, StatusCode};
use tokio::task::JoinSet;

use super::bed::Bed;
use super::report::{Row, Spread, Study};
use super::scenario::Scenario;
use super::studies::{Effort, per_second, percentiles};
use super::workload::Source;
use crate::dice::Dice;
use crate::stack::Service;

/// Connections that ask one after the other.
const CONNECTIONS: usize = 16;

/// Products that are asked for.
const PRODUCTS: usize = 1_000;

/// Of a level's duration: how long each turn lasts.
const TURNS_A_LEVEL: u32 = 4;

/// How long a replica may take to answer its first read.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
const READY_PAUSE: Duration = Duration::from_millis(50);

/// Measures on the bed; no order is under way meanwhile.
pub(super) async fn run(bed: &mut Bed, source: &Source, effort: Effort) -> anyhow::Result<Study> {
    let mut study = Study::new(Scenario::Reads, format!("reads: GET, {CONNECTIONS} connections, closed loop"));
    bed.start_service().await?;
    let mut without = bed.replica()?;
    without.remove_env("REDIS_URL");
    without.start()?;
    let token = Secret::from(bed.stack.token(Role::Viewer)?);
    let products: Vec<String> =
        source.products.iter().take(PRODUCTS).map(|product| format!("/v1/products/{}", product.id)).collect();
    let pages = vec!["/v1/products?limit=50".to_owned()];
    let turn = effort.level / TURNS_A_LEVEL;
    for (name, what, paths) in [("product", "a product", products), ("page", "a page of 50 products", pages)] {
        let cached = Reader::new(&bed.service, &token, &paths)?;
        let plain = Reader::new(&without, &token, &paths)?;
        let mut progress = effort.show.progress(&format!("reads: {what}"), u64::from(effort.rounds) * 2);
        let [mut from_cache, mut from_postgres] = [const { (Vec::new(), Vec::new()) }; 2];
        for reader in [&cached, &plain] {
            reader.warm_up().await?;
        }
        for _ in 0..effort.rounds {
            for (reader, (rates, taken)) in [(&cached, &mut from_cache), (&plain, &mut from_postgres)] {
                let reads = reader.read_for(turn).await?;
                rates.push(per_second(reads.len() as u64, turn));
                taken.extend(reads);
                progress.inc(1);
            }
        }
        progress.finish();
        let mut medians = Vec::new();
        for (whence, (rates, taken)) in [("cache on", from_cache), ("Postgres only", from_postgres)] {
            let spread = Spread::of(rates).context("nothing was measured")?;
            medians.push(spread.median);
            let mut row = Row::of_rates(format!("{what}, {whence}"), "reads/s", spread);
            row.figures.extend(percentiles(taken));
            study.rows.push(row);
        }
        if let [cached, plain] = medians[..] {
            study.ratio(&format!("{name}_reads_cached_over_postgres"), cached / plain);
        }
    }
    without.stop().await?;
    bed.quiet().await?;
    bed.stop_service().await?;
    Ok(study)
}

/// Reads paths of one replica.
struct Reader {
    client: Client,
    token: String,
    urls: Arc<Vec<String>>,
}

impl Reader {
    fn new(service: &Service, token: &Secret, paths: &[String]) -> anyhow::Result<Self> {
        let address = service.address().context("the service was not told where to listen")?;
        // Another part of the process may have chosen already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder().no_proxy().build().context("the HTTP client cannot be made")?;
        let urls = paths.iter().map(|path| format!("http://{address}{path}")).collect();
        Ok(Self { client, token: token.expose().to_owned(), urls: Arc::new(urls) })
    }

    /// Waits until the replica answers, and asks for everything once.
    async fn warm_up(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        let first = self.urls.first().context("nothing is to be read")?;
        while let Err(problem) = read(&self.client, &self.token, first).await {
            if Instant::now() >= deadline {
                return Err(problem);
            }
            tokio::time::sleep(READY_PAUSE).await;
        }
        for url in self.urls.iter() {
            read(&self.client, &self.token, url).await?;
        }
        Ok(())
    }

    /// How long each read took that [`CONNECTIONS`] connections made for so long.
    async fn read_for(&self, turn: Duration) -> anyhow::Result<Vec<Duration>> {
        let until = Instant::now() + turn;
        let mut readers = JoinSet::new();
        for number in 0..CONNECTIONS {
            let (client, token, urls) = (self.client.clone(), self.token.clone(), self.urls.clone());
            readers.spawn(async move {
                let mut dice = Dice(number as u64);
                let mut taken = Vec::new();
                while Instant::now() < until {
                    let asked = Instant::now();
                    read(&client, &token, &urls[dice.index(urls.len())]).await?;
                    taken.push(asked.elapsed());
                }
                anyhow::Ok(taken)
            });
        }
        let mut all = Vec::new();
        while let Some(taken) = readers.join_next().await {
            all.extend(taken.context("a reader panicked")??);
        }
        Ok(all)
    }
}

async fn read(client: &Client, token: &str, url: &str) -> anyhow::Result<()> {
    let answer = client.get(url).bearer_auth(token).send().await.context("a read was not answered")?;
    let status = answer.status();
    let body = answer.bytes().await.context("the answer of a read broke off")?;
    ensure!(status == StatusCode::OK, "a read was answered {status}: {}", String::from_utf8_lossy(&body));
    Ok(())
}
