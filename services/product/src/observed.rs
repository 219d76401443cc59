//! What the product service shows of itself: its metrics, and the spans on the way of an order.
//!
//! In the trace of an order, each span the child of the one before: its publisher's, `process lomash.orders.created` (the
//! receive loop's), `decide` (from the queue to the answer; what is stored names it as its cause), and then
//! `process lomash.inventory.updated` of the projection. What is done for many orders at once has a span of its own, linked
//! with those of the orders in it: `commit`, and `project` with the transaction and `invalidate` in it.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::Context;
use deadpool_postgres::Pool;
use hashbrown::HashSet;
use lomash_contract::{FailureReason, LedgerEvent};
use lomash_ledger::streams::{ORDERS, PRODUCT_ORDERS};
use lomash_ledger::{
    AppendError, Carried, StoredMessage, StreamUse, dead_letter, oldest_unsettled, stream_use, suspects,
};
use lomash_platform::metrics::{Counter, Family, Gauge, Histogram, Labels, Metrics, seconds};
use lomash_platform::postgres::Schema;
use lomash_platform::trace::{self, Reference};
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{Span, debug, info_span};

use crate::cache::{Cache, CacheCounters};
use crate::committer::{Answer, Committed, Committer};
use crate::inventory::{Command, Outcome};
use crate::projection::PROJECTION;
use crate::reconciliation::Status;

/// How often the gauges are read that somebody else knows: Postgres and the server.
const EVERY: Duration = Duration::from_secs(2);

/// How long each of them may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Upper bounds of `inventory_update_lag_ms`; the contract's threshold of 2,000 must be one.
const LAG_MS: [f64; 14] =
    [5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0, 30_000.0, 60_000.0, 300_000.0];

/// Upper bounds for what is counted in a batch, up to the largest one.
const BATCH: [f64; 12] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 4_000.0];

// ── Metrics ─────────────────────────────────────────────────────────────────────────────────────────────────────

static LAG: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "From the time of an inventory-updated event until it was projected, in milliseconds";
    Metrics::of_process().register("inventory_update_lag_ms", help, Histogram::new(LAG_MS))
});

static REFUSED: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help = "Orders that this replica refused, by reason";
    let refused =
        Metrics::of_process().register("inventory_update_failures", help, Family::<Labels<1>, Counter>::default());
    // There from the start, so that the first refusal is an increase.
    for reason in [FailureReason::InsufficientStock, FailureReason::UnknownProduct, FailureReason::ProductInactive] {
        drop(refused.get_or_create(&[("reason", reason.as_str())]));
    }
    refused
});

static COMMITS: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help =
        "Batches sent to the ledger, by what was answered: stored, conflict, duplicate, too_large, refused, unknown";
    let commits = Metrics::of_process().register("lomash_commits", help, Family::<Labels<1>, Counter>::default());
    for outcome in ["stored", "conflict", "duplicate", "too_large", "refused", "unknown"] {
        drop(commits.get_or_create(&[("outcome", outcome)]));
    }
    commits
});

static COMMIT_SECONDS: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "From sending a batch to the ledger until it answered";
    Metrics::of_process().register("lomash_commit_duration_seconds", help, seconds())
});

static COMMIT_MESSAGES: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "Messages of a batch that was stored";
    Metrics::of_process().register("lomash_commit_batch_messages", help, Histogram::new(BATCH))
});

static COMMIT_COMMANDS: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "Orders and other commands that a batch which was stored settled";
    Metrics::of_process().register("lomash_commit_batch_commands", help, Histogram::new(BATCH))
});

static CATCH_UPS: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help = "Times that the committer read what others wrote, by why: after a batch that was not stored (retry), before \
                an answer that needs a fresh look (look), or having nothing to do (idle)";
    let catch_ups = Metrics::of_process().register("lomash_catch_ups", help, Family::<Labels<1>, Counter>::default());
    for why in ["retry", "look", "idle"] {
        drop(catch_ups.get_or_create(&[("why", why)]));
    }
    catch_ups
});

static PROJECTED: LazyLock<Counter> = LazyLock::new(|| {
    Metrics::of_process().register(
        "lomash_projected_messages",
        "Messages of the ledger that this replica projected",
        Counter::default(),
    )
});

static PROJECT_SECONDS: LazyLock<Histogram> = LazyLock::new(|| {
    let help = "Of one transaction of the projector";
    Metrics::of_process().register("lomash_project_duration_seconds", help, seconds())
});

static PROJECTION_FAILURES: LazyLock<Counter> = LazyLock::new(|| {
    let help = "Times that the projector had to begin again";
    Metrics::of_process().register("lomash_projection_failures", help, Counter::default())
});

static LEDGER_SEQUENCE: LazyLock<Gauge> = LazyLock::new(|| {
    let help = "The sequence up to which this replica knows the ledger";
    Metrics::of_process().register("lomash_ledger_sequence", help, Gauge::default())
});

static RECONCILIATIONS: LazyLock<Family<Labels<1>, Counter>> = LazyLock::new(|| {
    let help = "Reconciliation runs that this replica brought to a rest, by how they ended";
    let runs =
        Metrics::of_process().register("lomash_reconciliation_runs", help, Family::<Labels<1>, Counter>::default());
    for ended in [Status::Completed, Status::DryRun, Status::AwaitingApproval, Status::Failed] {
        drop(runs.get_or_create(&[("outcome", ended.as_str())]));
    }
    runs
});

/// What somebody else knows, as it was when they were asked last; nothing where they did not answer, for a stale figure
/// would pass for a true one.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    checkpoint: Option<u64>,
    ledger: u64,
    out_of_stock: Option<i64>,
    dead_letters: Option<u64>,
    oldest_order: Option<Duration>,
    /// Of [`STREAMS`], in their order.
    streams: [Option<StreamUse>; STREAMS.len()],
}

/// Streams of which it is shown how full they are: those that somebody else writes to, or that have a limit.
const STREAMS: [&str; 6] = [
    lomash_ledger::streams::INVENTORY,
    lomash_ledger::streams::ORDERS,
    lomash_ledger::streams::JOBS,
    dead_letter::STREAM,
    suspects::STREAM,
    "OBJ_SNAPSHOTS",
];

static ASKED: LazyLock<Mutex<Asked>> = LazyLock::new(|| {
    fn one(value: impl Fn(Asked) -> Option<f64> + Send + Sync + 'static) -> impl Fn() -> Option<(Labels<0>, f64)> {
        move || {
            let asked = *ASKED.lock().unwrap_or_else(PoisonError::into_inner);
            value(asked).map(|value| ([], value))
        }
    }
    let metrics = Metrics::of_process();
    let help = "Products for sale whose stock is 0, in the projection";
    metrics.gauges(
        "out_of_stock_products_total",
        help,
        one(|asked| asked.out_of_stock.map(|products| products as f64)),
    );
    let help = "Dead letters that wait to be redriven or discarded, of all services";
    metrics.gauges("dlq_message_count", help, one(|asked| asked.dead_letters.map(|letters| letters as f64)));
    let help = "How long the oldest order that is not decided has been in ORDERS, whoever has it or nobody; 0 when there is none";
    metrics.gauges(
        "lomash_oldest_undecided_order_seconds",
        help,
        one(|asked| asked.oldest_order.map(|age| age.as_secs_f64())),
    );
    fn each(value: impl Fn(StreamUse) -> Option<u64> + Send + Sync + 'static) -> impl Fn() -> Vec<(Labels<1>, f64)> {
        move || {
            let asked = *ASKED.lock().unwrap_or_else(PoisonError::into_inner);
            let streams = STREAMS.into_iter().zip(asked.streams);
            streams.filter_map(|(stream, used)| Some(([("stream", stream)], value(used?)? as f64))).collect()
        }
    }
    metrics.gauges("lomash_stream_messages", "Messages in the stream", each(|used| Some(used.messages)));
    metrics.gauges("lomash_stream_bytes", "Bytes in the stream", each(|used| Some(used.bytes)));
    let help = "Bytes that the stream takes before it refuses more; not there for a stream that never does";
    metrics.gauges("lomash_stream_max_bytes", help, each(|used| used.max_bytes));
    let help = "The sequence of the ledger up to which it is projected";
    metrics.gauges("lomash_projection_checkpoint_sequence", help, one(|asked| asked.checkpoint.map(|at| at as f64)));
    let help = "Messages of the ledger that are not projected yet";
    let behind = |asked: Asked| asked.checkpoint.map(|at| asked.ledger.saturating_sub(at) as f64);
    metrics.gauges("lomash_projection_lag_messages", help, one(behind));
    Mutex::default()
});

/// Asks the cache of this process what it counted.
type AskCache = Box<dyn Fn() -> Option<CacheCounters> + Send + Sync>;

static CACHE: LazyLock<Mutex<Option<AskCache>>> = LazyLock::new(|| {
    fn read<const N: usize>(
        of: impl Fn(CacheCounters) -> [(&'static str, u64); N] + Send + Sync + 'static,
    ) -> impl Fn() -> Vec<(Vec<(&'static str, &'static str)>, f64)> {
        move || {
            let cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
            let counters = cache.as_ref().and_then(|ask| ask());
            let labels = |result: &'static str| if result.is_empty() { Vec::new() } else { vec![("result", result)] };
            counters.into_iter().flat_map(&of).map(|(result, count)| (labels(result), count as f64)).collect()
        }
    }
    let metrics = Metrics::of_process();
    let help = "Reads through the cache: hit, miss, or shared (another read of the same loaded it)";
    let reads =
        |counters: CacheCounters| [("hit", counters.hits), ("miss", counters.misses), ("shared", counters.shared)];
    metrics.counts("lomash_cache_reads", help, read(reads));
    let help = "Values offered to the cache: stored, or lost (older than what is known, too large, no answer)";
    metrics.counts(
        "lomash_cache_fills",
        help,
        read(|counters| [("stored", counters.fills), ("lost", counters.fills_lost)]),
    );
    let help = "Batches of the projector whose products and lists are gone from the cache";
    metrics.counts("lomash_cache_invalidations", help, read(|counters| [("", counters.invalidations)]));
    let help = "Times that the whole cache was deleted, to begin again";
    metrics.counts("lomash_cache_clears", help, read(|counters| [("", counters.clears)]));
    let help = "Operations that Redis did not carry out, or not in time";
    metrics.counts("lomash_cache_failures", help, read(|counters| [("", counters.failures)]));
    let help = "1 while reads go past Redis, for it does not answer in time";
    metrics.gauges("lomash_cache_fallback", help, read(|counters| [("", u64::from(counters.fallback))]));
    Mutex::default()
});

/// Shows from now on what is there to be shown, at zero where nothing has happened yet.
pub fn begin(cache: Option<&Cache>) {
    LazyLock::force(&LAG);
    LazyLock::force(&REFUSED);
    LazyLock::force(&COMMITS);
    LazyLock::force(&COMMIT_SECONDS);
    LazyLock::force(&COMMIT_MESSAGES);
    LazyLock::force(&COMMIT_COMMANDS);
    LazyLock::force(&CATCH_UPS);
    LazyLock::force(&PROJECTED);
    LazyLock::force(&PROJECT_SECONDS);
    LazyLock::force(&PROJECTION_FAILURES);
    LazyLock::force(&LEDGER_SEQUENCE);
    LazyLock::force(&RECONCILIATIONS);
    LazyLock::force(&ASKED);
    LazyLock::force(&CACHE);
    if let Some(cache) = cache {
        *CACHE.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(cache.observer()));
    }
}

/// Asks again and again for what the projection and the server know, until `stop`.
///
/// # Errors
/// Never; it is a task of the process like the others.
pub async fn watch(context: Context, pool: Pool, committer: Committer, stop: CancellationToken) -> anyhow::Result<()> {
    loop {
        let (rows, dead_letters, oldest_order, streams) = tokio::join!(
            tokio::time::timeout(TIMEOUT, look(&pool)),
            tokio::time::timeout(TIMEOUT, dead_letter::count(&context)),
            tokio::time::timeout(TIMEOUT, oldest_unsettled(&context, ORDERS, PRODUCT_ORDERS)),
            futures::future::join_all(STREAMS.map(|name| tokio::time::timeout(TIMEOUT, stream_use(&context, name)))),
        );
        let oldest_order = oldest_order.ok().and_then(|oldest| {
            oldest.inspect_err(|problem| debug!(problem, "the age of the oldest order is not known")).ok()
        });
        let mut uses = [None; STREAMS.len()];
        uses.iter_mut().zip(streams).for_each(|(used, found)| *used = found.ok().flatten());
        let rows = rows.ok().flatten();
        let asked = Asked {
            checkpoint: rows.map(|(checkpoint, _)| checkpoint),
            out_of_stock: rows.map(|(_, out_of_stock)| out_of_stock),
            dead_letters: dead_letters.ok().flatten(),
            oldest_order,
            streams: uses,
            ledger: committer.sequence(),
        };
        *ASKED.lock().unwrap_or_else(PoisonError::into_inner) = asked;
        LEDGER_SEQUENCE.set(i64::try_from(asked.ledger).unwrap_or(i64::MAX));
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// The checkpoint and the number of products for sale without stock, in one snapshot. What is not for sale alarms nobody; the
/// summary of analytics counts so, too.
async fn look(pool: &Pool) -> Option<(u64, i64)> {
    let query = format!(
        "SELECT sequence, (SELECT count(*) FROM {schema}.stock JOIN {schema}.products USING (product_id)
             WHERE quantity = 0 AND active)
         FROM {schema}.checkpoint WHERE projection = $1",
        schema = Schema::Live
    );
    let client = pool.get().await.ok()?;
    match client.query_opt(&query, &[&PROJECTION]).await {
        Ok(row) => row.map(|row| (row.get::<_, i64>(0).unsigned_abs(), row.get(1))),
        Err(problem) => {
            debug!(%problem, "the projection does not tell its figures");
            None
        }
    }
}

/// A command was answered so.
pub(crate) fn answered(answer: &Answer) {
    if let Ok(Committed { outcome: Outcome::Refused { reason }, .. }) = answer {
        REFUSED.get_or_create(&[("reason", reason.as_str())]).inc();
    }
}

/// The committer reads what others wrote.
pub(crate) fn catches_up(why: &'static str) {
    CATCH_UPS.get_or_create(&[("why", why)]).inc();
}

/// The projector has to begin again.
pub(crate) fn projection_failed() {
    PROJECTION_FAILURES.inc();
}

/// A reconciliation run came to a rest.
pub(crate) fn reconciled(outcome: &'static str) {
    RECONCILIATIONS.get_or_create(&[("outcome", outcome)]).inc();
}

// ── The way of a command ────────────────────────────────────────────────────────────────────────────────────────

/// What is carried, with the current span as what caused it when there is one; else it hands on what it came with.
pub(crate) fn caused_here(carried: Option<Arc<Carried>>) -> Option<Arc<Carried>> {
    match Reference::current() {
        None => carried,
        Some(current) => Some(caused_by(&current, carried.as_deref())),
    }
}

fn caused_by(cause: &Reference, carried: Option<&Carried>) -> Arc<Carried> {
    let beside = carried.cloned().unwrap_or_default();
    Arc::new(Carried { trace: cause.trace_context(), ..beside })
}

/// The span of deciding a command, when it came in one: from here until the answer. What it stores names it as its cause.
pub(crate) fn decide_span(command: &Command, carried: Option<Arc<Carried>>) -> (Span, Option<Arc<Carried>>) {
    if !Reference::is_current() {
        return (Span::none(), caused_here(carried));
    }
    let span = info_span!(
        target: trace::TARGET,
        "decide",
        order.id = tracing::field::Empty,
        product.id = tracing::field::Empty,
        command.id = tracing::field::Empty,
        order.lines = tracing::field::Empty,
    );
    // What came in is about the same; its own span was made before anybody knew.
    let received = Span::current();
    match command {
        Command::Order(order) => {
            span.record("order.lines", order.lines.len());
            for span in [&span, &received] {
                span.record("order.id", tracing::field::display(order.order_id));
            }
        }
        Command::Product(command) => {
            span.record("command.id", tracing::field::display(command.command_id));
            for span in [&span, &received] {
                span.record("product.id", tracing::field::display(command.product_id));
            }
        }
    }
    let carried = match Reference::of(&span) {
        Some(cause) => Some(caused_by(&cause, carried.as_deref())),
        None => carried,
    };
    (span, carried)
}

/// One try to store a batch.
pub(crate) struct Commit {
    span: Span,
    since: Instant,
    messages: usize,
    commands: usize,
}

impl Commit {
    /// Begins it; `decisions` are the spans of the commands in it.
    pub(crate) fn begin<'s>(decisions: impl Iterator<Item = &'s Span>, messages: usize, commands: usize) -> Self {
        let span = if trace::is_on() { commit_span(decisions, messages, commands) } else { Span::none() };
        Self { span, since: Instant::now(), messages, commands }
    }

    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// The server has answered.
    pub(crate) fn end(self, answer: &Result<u64, AppendError>) {
        COMMIT_SECONDS.observe(self.since.elapsed().as_secs_f64());
        let outcome = match answer {
            Ok(last) => {
                COMMIT_MESSAGES.observe(self.messages as f64);
                COMMIT_COMMANDS.observe(self.commands as f64);
                self.span.record("messaging.nats.sequence", last);
                "stored"
            }
            Err(AppendError::Conflict(_)) => "conflict",
            Err(AppendError::Duplicate(_)) => "duplicate",
            Err(AppendError::TooLarge { .. }) => "too_large",
            Err(AppendError::Refused { .. }) => "refused",
            Err(AppendError::Unknown(_) | AppendError::Incomplete(_)) => "unknown",
        };
        COMMITS.get_or_create(&[("outcome", outcome)]).inc();
        if let Err(problem) = answer {
            self.span.record("error.type", outcome);
            trace::fail(&self.span, problem);
        }
    }
}

fn commit_span<'s>(decisions: impl Iterator<Item = &'s Span>, messages: usize, commands: usize) -> Span {
    let mut traced = decisions.filter(|span| !span.is_disabled()).take(trace::MAX_LINKS).peekable();
    if traced.peek().is_none() {
        return Span::none();
    }
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "commit",
        otel.name = "send INVENTORY",
        otel.kind = "producer",
        messaging.system = "nats",
        messaging.operation.name = "commit",
        messaging.operation.type = "send",
        messaging.destination.name = lomash_ledger::streams::INVENTORY,
        messaging.batch.message_count = messages,
        messaging.nats.sequence = tracing::field::Empty,
        commands = commands,
        error.type = tracing::field::Empty,
    );
    trace::Beginning::of_a_trace().adopt(&span);
    let decisions: Vec<&Span> = traced.collect();
    trace::link_all(&span, decisions.iter().filter_map(|decision| Reference::of(decision)));
    if let Some(commit) = Reference::of(&span) {
        for decision in decisions {
            commit.link(decision);
        }
    }
    span
}

/// The span of answering a command that came by NATS request.
pub(crate) fn request_span(subject: &str, traceparent: Option<&str>, tracestate: Option<&str>) -> Span {
    let Some(continued) = trace::begin(traceparent, tracestate) else {
        return Span::none();
    };
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "process",
        otel.name = format!("process {subject}"),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = subject,
        order.id = tracing::field::Empty,
        product.id = tracing::field::Empty,
    );
    continued.adopt(&span);
    span
}

// ── The projection ──────────────────────────────────────────────────────────────────────────────────────────────

/// One transaction of the projector and what follows it.
pub(crate) struct Projecting {
    span: Span,
    /// In the traces of what is projected, the first of them.
    each: Vec<Span>,
    since: Instant,
    messages: usize,
}

impl Projecting {
    pub(crate) fn begin(batch: &[StoredMessage]) -> Self {
        let (span, each) = if trace::is_on() { project_spans(batch) } else { (Span::none(), Vec::new()) };
        Self { span, each, since: Instant::now(), messages: batch.len() }
    }

    /// Around the transaction.
    pub(crate) fn transaction_span(&self) -> Span {
        if self.span.is_disabled() {
            return Span::none();
        }
        info_span!(
            target: trace::TARGET,
            parent: &self.span,
            "transaction",
            otel.name = "COMMIT inventory",
            otel.kind = "client",
            db.system.name = "postgresql",
            db.namespace = Schema::Live.name(),
            db.operation.name = "COMMIT",
            db.query.summary = "COMMIT inventory",
            db.operation.batch.size = self.messages,
        )
    }

    /// Around what follows the transaction.
    pub(crate) fn span(&self) -> Span {
        self.span.clone()
    }

    /// The rows are there; these are the times of the stock changes among what was projected.
    pub(crate) fn committed(&mut self, occurred: &[OffsetDateTime]) {
        PROJECT_SECONDS.observe(self.since.elapsed().as_secs_f64());
        PROJECTED.inc_by(self.messages as u64);
        let now = OffsetDateTime::now_utc();
        for occurred in occurred {
            // The clocks of two machines may disagree a little.
            LAG.observe(((now - *occurred).as_seconds_f64() * 1_000.0).max(0.0));
        }
        self.each.clear();
    }

    pub(crate) fn failed(&self, problem: impl std::fmt::Display) {
        for span in self.each.iter().chain([&self.span]) {
            trace::fail(span, &problem);
        }
    }
}

/// Around the invalidation of the cache, when the batch that it follows is traced.
pub(crate) fn invalidate_span(products: usize) -> Span {
    trace::step(|| {
        info_span!(
            target: trace::TARGET,
            "invalidate",
            otel.kind = "client",
            db.system.name = "redis",
            db.operation.name = "UNLINK",
            db.operation.batch.size = products,
        )
    })
}

/// The span of the batch, and one in the trace of each order or command in it, up to as many as a span has links.
fn project_spans(batch: &[StoredMessage]) -> (Span, Vec<Span>) {
    let mut seen = HashSet::new();
    let mut causes = Vec::new();
    for message in batch {
        let Some(traceparent) = message.carried.traceparent() else { continue };
        if causes.len() == trace::MAX_LINKS || !seen.insert(traceparent) {
            continue;
        }
        let cause = Reference::parse(Some(traceparent), message.carried.tracestate());
        causes.extend(cause.filter(Reference::is_sampled).map(|cause| (cause, message)));
    }
    if causes.is_empty() || !trace::has_room() {
        return (Span::none(), Vec::new());
    }
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "project",
        messaging.system = "nats",
        messaging.destination.name = lomash_ledger::streams::INVENTORY,
        messaging.batch.message_count = batch.len(),
        messaging.nats.sequence = batch.last().map(|message| message.sequence),
    );
    trace::Beginning::of_a_trace().adopt(&span);
    trace::link_all(&span, causes.iter().map(|(cause, _)| cause.clone()));
    let whole = Reference::of(&span);
    let each = causes.into_iter().map(|(cause, message)| {
        let each = project_one_span(message);
        cause.adopt(&each);
        if let Some(whole) = &whole {
            whole.link(&each);
        }
        each
    });
    let each = each.collect();
    (span, each)
}

fn project_one_span(message: &StoredMessage) -> Span {
    let parsed = message.parse().ok();
    let topic = parsed.as_ref().map_or(lomash_ledger::streams::INVENTORY, |event| event.payload.topic().as_str());
    let span = info_span!(
        target: trace::TARGET,
        parent: None,
        "process",
        otel.name = format!("process {topic}"),
        otel.kind = "consumer",
        messaging.system = "nats",
        messaging.operation.name = "process",
        messaging.operation.type = "process",
        messaging.destination.name = message.subject,
        messaging.destination.template = topic,
        messaging.destination.subscription.name = "projector",
        messaging.message.id = message.message_id,
        messaging.nats.stream = lomash_ledger::streams::INVENTORY,
        messaging.nats.sequence = message.sequence,
        event.id = message.message_id,
        order.id = tracing::field::Empty,
        product.id = tracing::field::Empty,
    );
    match parsed.map(|event| event.payload) {
        Some(LedgerEvent::InventoryUpdateFailed(failed)) => {
            span.record("order.id", tracing::field::display(failed.order_id));
        }
        Some(LedgerEvent::InventoryUpdated(updated)) => {
            span.record("product.id", tracing::field::display(updated.product_id));
            if let Some(order_id) = updated.order_id {
                span.record("order.id", tracing::field::display(order_id));
            }
        }
        Some(other) => {
            span.record("product.id", tracing::field::display(other.key()));
        }
        None => {}
    }
    span
}
