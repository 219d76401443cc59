//! The study of latency, open loop: orders arrive by a fixed schedule, however the system is doing, and every time is
//! measured from the scheduled arrival. So an order that waits because others wait counts its waiting (no coordinated
//! omission).
//!
//! **Capacity** is what the whole system does here and now: as many orders as a race has, published in batches as fast as
//! `ORDERS` takes them, decided meanwhile; orders divided by the time from the first publish to the last decision heard.
//! The levels are parts of it: 10, 50 and 80 %, and 120 %, which must wait somewhere: in the stream, not in our memory.
//!
//! **What is measured** at each level, all at once:
//! - an order's scheduled arrival → its decision heard by a subscriber of the exact topics;
//! - a scheduled `PATCH` of a stock → its answer, [`PATCHES_A_SECOND`] by an admin over HTTP, on top of the orders;
//! - an event heard on its exact topic → the projection's checkpoint has reached its sequence, seen by polling Postgres
//!   every [`CHECKPOINT_EVERY`]; what that adds is to our disadvantage.
//!
//! **Arrivals.** The server syncs every single publish, so one by one a stream on one node takes a few thousand orders a
//! second at best. How many it takes here is measured first; a level of up to half of that arrives one by one. Beyond, what
//! is due is published as one batch, and the next when it is stored, as a busy publisher would. Waiting for the batch
//! counts.
//!
//! **Growth at 120 %** is the service's memory late in the level, less its memory early in it, when its buffers were full
//! already: medians of the samples of the second and of the last quarter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_nats::{Client, ConnectOptions, HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures::stream::SelectAll;
use futures::{FutureExt, StreamExt};
use hashbrown::HashMap;
use lomash_contract::{OrderId, Topic};
use lomash_ledger::MAX_BATCH_MESSAGES;
use lomash_platform::Secret;
use lomash_platform::postgres::{self, INVENTORY};
use lomash_platform::schemas::checkpoint;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::batches::{self, Message as Batched};
use super::bed::{Bed, encoded, send, subject};
use super::cost::megabytes;
use super::report::{Row, Study};
use super::scenario::Scenario;
use super::studies::{Effort, per_second, percentile_ms, percentiles};
use super::usage::Usage;
use super::workload::{Orders, Source};
use crate::api::Api;
use crate::output;

/// The levels, in percent of capacity. The last one is more than there is.
const LEVELS: [u32; 4] = [10, 50, 80, OVERLOAD];
const OVERLOAD: u32 = 120;

/// Of the rate that `ORDERS` takes one by one: up to which part orders arrive so. At more, what is measured would be how
/// publishers wait for each other.
const ONE_BY_ONE_SHARE: f64 = 0.5;

/// Orders of a batch when capacity is measured, and orders before that, so that nothing is cold.
const CAPACITY_BATCH: usize = 1_000;
const WARM_UP: usize = 300;

/// Orders by which publishing one by one is measured: so many that the last one's decision, some 20 ms, is a small part.
const ONE_BY_ONE_ORDERS: usize = 3_000;

/// Changes of stock over HTTP, and how many products they are spread over.
const PATCHES_A_SECOND: f64 = 20.0;
const PATCHED_PRODUCTS: usize = 50;

/// What a stock is set to, less the number of the change: plenty, as it was before.
const PATCHED_TO: usize = 890_000;

/// How often the checkpoint is looked at, and memory with what waits.
const CHECKPOINT_EVERY: Duration = Duration::from_millis(3);
const SAMPLE_EVERY: Duration = Duration::from_millis(100);

/// Fewest samples of memory: one for each quarter. A machine that is at something else may get to few in a short level.
const MIN_SAMPLES: usize = 4;

/// Until the first arrival of a level, so that everybody is ready.
const LEAD: Duration = Duration::from_millis(100);

/// How long the last decision, and the projection, may take after the last arrival.
const LATE: Duration = Duration::from_secs(180);

/// Events that wait to be heard in this process: all of a level's, for one that is dropped is never heard.
const EVENTS_HELD: usize = 1 << 20;

/// Measures on the bed.
pub(super) async fn run(bed: &mut Bed, source: &mut Source, effort: Effort) -> anyhow::Result<Study> {
    batches::let_orders_take_batches(&bed.context).await?;
    bed.start_service().await?;
    let admin = bed.admin(&bed.service)?;
    let mut ears = Ears::open(&bed.stack.nats.url()).await?;
    hasten(bed, source, &mut ears, WARM_UP, Way::Batches).await?;
    let singles = ONE_BY_ONE_ORDERS.min(effort.extent.one_line);
    let taken = hasten(bed, source, &mut ears, singles, Way::OneByOne).await?;
    let one_by_one = per_second(singles as u64, taken);
    let taken = hasten(bed, source, &mut ears, effort.extent.one_line, Way::Batches).await?;
    let capacity = per_second(effort.extent.one_line as u64, taken);
    let title = format!(
        "latency: open loop, {} s each, of a capacity of {} orders/s",
        effort.level.as_secs_f64(),
        output::thousands(capacity.round() as i64)
    );
    let mut study = Study::new(Scenario::Latency, title);
    study.ratio("capacity_orders_per_second", capacity);
    study.notes.push(format!(
        "Published one by one, {} orders a second were stored and decided; a level of more than half of that arrives in \
         batches.",
        output::thousands(one_by_one.round() as i64)
    ));
    for percent in LEVELS {
        // What the projection has not done of the level before would count against this one.
        bed.quiet().await?;
        let rate = capacity * f64::from(percent) / 100.0;
        let way = if rate <= one_by_one * ONE_BY_ONE_SHARE { Way::OneByOne } else { Way::Batches };
        let found = level(bed, source, &mut ears, &admin, Level { percent, rate, way }, effort).await?;
        let at = format!("at {percent} % ({}/s, {way})", output::thousands(rate.round() as i64));
        for (what, name, taken) in [
            ("order → decision", "decision", found.decided),
            ("PATCH → answer", "patch", found.answered.taken),
            ("event → projected", "projection_lag", found.projected),
        ] {
            let mut sorted = taken.clone();
            sorted.sort_unstable();
            for (percentile, name_of_it) in [(50.0, "p50"), (99.0, "p99"), (99.9, "p99_9")] {
                // Beyond capacity it is as long as the level.
                if percent != OVERLOAD {
                    let name = format!("{name}_{name_of_it}_ms_at_{percent}_percent");
                    study.ratio(&name, percentile_ms(&sorted, percentile));
                }
            }
            study.rows.push(Row::new(format!("{what}, {at}"), percentiles(taken)));
        }
        if let Some(first) = found.answered.failed.first() {
            let failed = found.answered.failed.len();
            study.notes.push(format!("At {percent} % {failed} PATCHes failed, the first with {first}."));
        }
        if percent == OVERLOAD {
            let growth = found.growth_mb.context("memory was not looked at")?;
            study.ratio("memory_growth_mb_at_120_percent", growth.max(0.0));
            study.notes.push(format!(
                "At {percent} % the service's memory grew by {growth:.1} MB while up to {} orders waited in the stream.",
                output::thousands(found.most_waiting)
            ));
        }
    }
    bed.quiet().await?;
    bed.stop_service().await?;
    Ok(study)
}

/// How orders are published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    OneByOne,
    Batches,
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::OneByOne => "one by one",
            Self::Batches => "in batches",
        })
    }
}

/// A rate of arrival.
#[derive(Clone, Copy, Debug)]
struct Level {
    /// Of capacity.
    percent: u32,
    /// Orders a second.
    rate: f64,
    way: Way,
}

/// Publishes orders as fast as `ORDERS` takes them; how long it took until the last decision was heard.
async fn hasten(
    bed: &mut Bed,
    source: &mut Source,
    ears: &mut Ears,
    count: usize,
    way: Way,
) -> anyhow::Result<Duration> {
    let Orders { orders, refused } = source.take(count)?;
    bed.expect(orders.len() as u64, refused);
    let started = Instant::now();
    let due = orders.iter().map(|order| (order.payload.order_id, started)).collect();
    let made: Vec<Batched> = orders.iter().map(|order| (subject(), HeaderMap::new(), encoded(order))).collect();
    let client = bed.client.clone();
    let publishing = async move {
        if way == Way::OneByOne {
            for (subject, _, order) in made {
                client.publish(subject, order).await.context("an order could not be sent")?;
            }
            return Ok(());
        }
        for (number, batch) in made.chunks(CAPACITY_BATCH).enumerate() {
            send(&client, batch.to_vec(), &format!("hasten-{count}-{number}")).await?;
        }
        Ok(())
    };
    let until = started + LATE;
    bed.while_running(async { tokio::try_join!(publishing, ears.hear(due, until)) }).await?;
    Ok(started.elapsed())
}

/// What was found at a level.
struct Found {
    decided: Vec<Duration>,
    answered: Answers,
    projected: Vec<Duration>,
    /// Of the service, when it was looked at.
    growth_mb: Option<f64>,
    most_waiting: u64,
}

async fn level(
    bed: &mut Bed,
    source: &mut Source,
    ears: &mut Ears,
    admin: &Api,
    Level { percent, rate, way }: Level,
    effort: Effort,
) -> anyhow::Result<Found> {
    let Effort { level, show, .. } = effort;
    let count = (rate * level.as_secs_f64()).ceil() as usize;
    let Orders { orders, refused } = source.take(count)?;
    bed.expect(orders.len() as u64, refused);
    let payloads: Vec<Bytes> = orders.iter().map(encoded).collect();
    let patched: Vec<String> =
        source.products.iter().take(PATCHED_PRODUCTS).map(|product| product.id.to_string()).collect();

    let first = Instant::now() + LEAD;
    let schedule = Schedule { first, rate };
    let due: HashMap<OrderId, Instant> =
        orders.iter().enumerate().map(|(number, order)| (order.payload.order_id, schedule.of(number))).collect();
    drop(orders);
    let goal = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let looking = tokio::spawn(look(bed.database.clone(), goal.clone(), first + level + LATE));
    tasks.spawn(arrive(bed.client.clone(), payloads, schedule, way));
    let patches = Schedule { first, rate: PATCHES_A_SECOND };
    let patching =
        tokio::spawn(patch(admin.clone(), patched, patches, (PATCHES_A_SECOND * level.as_secs_f64()) as usize));

    let arriving = async {
        while let Some(ended) = tasks.join_next().await {
            ended.context("publishing panicked")??;
        }
        Ok(())
    };
    let sampling = async { if percent == OVERLOAD { sample(bed, first, level).await.map(Some) } else { Ok(None) } };
    let mut progress = show.progress(&format!("latency: at {percent} %"), count as u64);
    let all = async { tokio::try_join!(arriving, sampling, ears.hear(due, first + level + LATE)) };
    let ((), samples, heard) = bed.while_running(all).await?;
    progress.inc(count as u64);
    progress.finish();
    let answered = patching.await.context("patching panicked")??;
    goal.store(heard.events.iter().map(|(sequence, _)| *sequence).max().unwrap_or(1), Ordering::Relaxed);
    let looks = bed.while_running(async { looking.await.context("looking panicked")? }).await?;
    let (growth_mb, most_waiting) = samples.map_or((None, 0), |samples| (growth(&samples), most_waiting(&samples)));
    Ok(Found { decided: heard.decided, answered, projected: lags(&heard.events, &looks), growth_mb, most_waiting })
}

/// When what is due.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    first: Instant,
    rate: f64,
}

impl Schedule {
    fn of(self, number: usize) -> Instant {
        self.first + Duration::from_secs_f64(number as f64 / self.rate)
    }

    /// How many are due at `now`.
    fn due(self, now: Instant) -> usize {
        match now.checked_duration_since(self.first) {
            None => 0,
            Some(since) => (since.as_secs_f64() * self.rate) as usize + 1,
        }
    }
}

/// Publishes the orders by the schedule.
async fn arrive(client: Client, orders: Vec<Bytes>, schedule: Schedule, way: Way) -> anyhow::Result<()> {
    let mut sent = 0;
    while sent < orders.len() {
        let due = schedule.due(Instant::now()).min(orders.len());
        if due <= sent {
            sleep_until(schedule.of(sent)).await;
            continue;
        }
        if way == Way::OneByOne {
            // One that is lost is missed by who waits for its decision.
            for order in &orders[sent..due] {
                client.publish(subject(), order.clone()).await.context("an order could not be sent")?;
            }
            sent = due;
        } else {
            let until = due.min(sent + MAX_BATCH_MESSAGES);
            let batch = orders[sent..until].iter().map(|order| (subject(), HeaderMap::new(), order.clone()));
            send(&client, batch.collect(), &format!("arriving-{sent}")).await?;
            sent = until;
        }
    }
    Ok(())
}

/// What changes over HTTP came to.
struct Answers {
    /// How long after its scheduled time each was answered.
    taken: Vec<Duration>,
    /// What the others were answered, for those that did not succeed.
    failed: Vec<String>,
}

/// Changes stocks by the schedule.
async fn patch(admin: Api, products: Vec<String>, schedule: Schedule, count: usize) -> anyhow::Result<Answers> {
    let mut under_way = JoinSet::new();
    for number in 0..count.max(1) {
        sleep_until(schedule.of(number)).await;
        let (admin, due) = (admin.clone(), schedule.of(number));
        let path = format!("/v1/products/{}/inventory", products[number % products.len()]);
        under_way.spawn(async move {
            let body = json!({ "quantity": PATCHED_TO - number });
            let answer = admin.send(Method::PATCH, &path, &[], Some(body)).await;
            (due.elapsed(), answer)
        });
    }
    let mut answers = Answers { taken: Vec::with_capacity(count), failed: Vec::new() };
    while let Some(done) = under_way.join_next().await {
        match done.context("a PATCH panicked")? {
            (taken, Ok(answer)) if answer.status.is_success() => answers.taken.push(taken),
            (_, Ok(answer)) => answers.failed.push(format!("{}: {}", answer.status, answer.body)),
            (_, Err(problem)) => answers.failed.push(format!("{problem:#}")),
        }
    }
    Ok(answers)
}

/// A look at the checkpoint: what it was, and when.
type Look = (u64, Instant);

/// Looks at the checkpoint until it has reached the goal, which is 0 while it is not known.
async fn look(database: Secret, goal: Arc<AtomicU64>, deadline: Instant) -> anyhow::Result<Vec<Look>> {
    let client = postgres::connect(&database).await?;
    let mut looks: Vec<Look> = Vec::new();
    loop {
        let reached = checkpoint(&client, &INVENTORY, INVENTORY.live).await?.unwrap_or(0);
        let now = Instant::now();
        if looks.last().is_none_or(|(last, _)| reached > *last) {
            looks.push((reached, now));
        }
        let goal = goal.load(Ordering::Relaxed);
        if goal > 0 && reached >= goal {
            return Ok(looks);
        }
        ensure!(now < deadline, "the projection is at {reached} and did not reach {goal} in time");
        sleep(CHECKPOINT_EVERY).await;
    }
}

/// How long after it was heard each event was first seen projected.
fn lags(events: &[(u64, Instant)], looks: &[Look]) -> Vec<Duration> {
    events
        .iter()
        .filter_map(|(sequence, heard)| {
            let (_, seen) = looks.get(looks.partition_point(|(reached, _)| reached < sequence))?;
            Some(seen.saturating_duration_since(*heard))
        })
        .collect()
}

/// Memory of the service and orders that waited in the stream, at a moment of a level.
struct Sample {
    resident: u64,
    waiting: u64,
}

async fn sample(bed: &Bed, first: Instant, level: Duration) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let pid = bed.service.pid().context("the service does not run")?;
    sleep_until(first).await;
    while first.elapsed() < level || samples.len() < MIN_SAMPLES {
        let resident = Usage::of(pid)?.resident_bytes;
        let waiting = bed.deliveries().await?.waiting;
        samples.push(Sample { resident, waiting });
        sleep(SAMPLE_EVERY.min(level / 20)).await;
    }
    Ok(samples)
}

/// In megabytes, from the second quarter of the samples to the last.
fn growth(samples: &[Sample]) -> Option<f64> {
    let quarter = |number: usize| {
        let of = samples.get(samples.len() * number / 4..samples.len() * (number + 1) / 4)?;
        let mut found: Vec<u64> = of.iter().map(|sample| sample.resident).collect();
        found.sort_unstable();
        found.get(found.len() / 2).copied().map(megabytes)
    };
    Some(quarter(3)? - quarter(1)?)
}

fn most_waiting(samples: &[Sample]) -> u64 {
    samples.iter().map(|sample| sample.waiting).max().unwrap_or(0)
}

/// A subscriber of the exact topics of decisions.
struct Ears {
    messages: SelectAll<Subscriber>,
}

/// What was heard.
struct Heard {
    /// How long after its scheduled arrival each order's decision was.
    decided: Vec<Duration>,
    /// The sequence of each event, and when it was heard.
    events: Vec<(u64, Instant)>,
}

#[derive(Deserialize)]
struct Told {
    payload: ToldOrder,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ToldOrder {
    #[serde(default)]
    order_id: Option<OrderId>,
}

impl Ears {
    /// On a connection of its own: what is published does not hold up what is heard.
    async fn open(url: &str) -> anyhow::Result<Self> {
        let options = ConnectOptions::new().name("lomash bench, listening").subscription_capacity(EVENTS_HELD);
        let client = options.connect(url).await.context("NATS cannot be reached")?;
        let mut messages = SelectAll::new();
        for topic in [Topic::InventoryUpdated, Topic::InventoryUpdateFailed] {
            messages.push(client.subscribe(topic.as_str()).await.context("decisions cannot be listened to")?);
        }
        client.flush().await.context("NATS does not answer")?;
        Ok(Self { messages })
    }

    /// Listens until every order was decided.
    async fn hear(&mut self, mut due: HashMap<OrderId, Instant>, until: Instant) -> anyhow::Result<Heard> {
        // What was told after the last decision of the time before is nobody's.
        while self.messages.next().now_or_never().flatten().is_some() {}
        let mut heard = Heard { decided: Vec::with_capacity(due.len()), events: Vec::with_capacity(due.len()) };
        while !due.is_empty() {
            let message = tokio::time::timeout_at(until, self.messages.next()).await;
            let Ok(Some(message)) = message else {
                bail!("{} orders had no decision that was heard", due.len());
            };
            let now = Instant::now();
            heard.events.push((sequence(&message)?, now));
            let told: Told = serde_json::from_slice(&message.payload).context("a decision is no JSON")?;
            if let Some(scheduled) = told.payload.order_id.and_then(|order| due.remove(&order)) {
                heard.decided.push(now.saturating_duration_since(scheduled));
            }
        }
        Ok(heard)
    }
}

/// The sequence of an event, as the server tells it with what it republishes.
fn sequence(message: &Message) -> anyhow::Result<u64> {
    let header = message.headers.as_ref().and_then(|headers| headers.get(async_nats::header::NATS_SEQUENCE));
    header.and_then(|value| value.as_str().parse().ok()).context("an event was told without its sequence")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_due_follows_the_schedule() {
        let first = Instant::now();
        let schedule = Schedule { first, rate: 1_000.0 };
        assert_eq!(schedule.due(first), 1);
        assert_eq!(schedule.due(schedule.of(100) + Duration::from_micros(10)), 101);
        assert_eq!(schedule.of(1_000), first + Duration::from_secs(1));
    }

    #[test]
    fn a_lag_ends_with_the_first_look_that_shows_the_event() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let looks = [(3, at(0)), (5, at(40)), (9, at(80))];
        let events = [(4, at(10)), (5, at(15)), (6, at(50)), (9, at(81)), (10, at(90))];
        let lags: Vec<u128> = lags(&events, &looks).iter().map(Duration::as_millis).collect();
        assert_eq!(lags, [30, 25, 30, 0]);
    }

    #[test]
    fn growth_is_late_memory_less_early_memory() {
        let samples: Vec<Sample> =
            (0..8).map(|second| Sample { resident: 100_000_000 + second * 1_000_000, waiting: second }).collect();
        assert_eq!(growth(&samples), Some(4.0));
        assert_eq!(growth(&samples[..MIN_SAMPLES]), Some(2.0));
        assert_eq!(most_waiting(&samples), 7);
    }
}
