//! The rival in Redis: one script decides an order, and the append-only file is synced before anything is answered.
//!
//! It keeps what we keep: an order is decided once for ever (a set), all lines or none, stock never negative (a hash), and
//! one message an order for the outside (`XADD`), all by one script, which nothing else can interleave. `appendfsync` is
//! `always`: Redis syncs once for all that a round of its loop took in, before it answers any of it.
//!
//! Its advantages: scripts are called by their digest; ids and quantities travel and are kept as bytes, an order as one
//! argument; all lines of an order are read by one command and written by one; many calls are under way on each
//! connection, and one call may bring many orders; the file is never rewritten meanwhile; and the orders are in memory and
//! encoded already. How many connections and orders a call is tried out for each scenario; the best is measured.
//!
//! What it does not keep: everything is in memory, and a script that fails halfway is not undone.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, ensure};
use bytes::Bytes;
use fred::interfaces::{ClientLike, LuaInterface};
use fred::prelude::{Builder, Client, Config, Value};
use fred::types::{ClusterHash, CustomCommand};
use futures::{StreamExt, TryStreamExt, stream};
use hashbrown::HashMap;
use tokio::task::JoinSet;
use uuid::Uuid;

use super::books::{Books, DecidedLine, Decision};
use super::rivals::watch;
use super::workload::PlainOrder;
use crate::stack::Redis;
use crate::verify::Show;

/// Where the orders that are decided, the stock and the outbox are.
const DECIDED: &str = "decided";
const STOCK: &str = "stock";
const OUTBOX: &str = "outbox";

/// Calls under way on a connection: more than Redis takes from one in a round of its loop.
const CALLS_IN_FLIGHT: usize = 512;

/// Products of one command when the stock is set up, and messages of the outbox that are checked at once.
const PRODUCTS_A_COMMAND: usize = 1_000;
const AUDIT_PAGE: u64 = 10_000;

/// Bytes of an id, of an order's line (a product and how many), and of a decided one (a product, before and after).
const ID: usize = 16;
const LINE: usize = ID + 4;
const DECIDED_LINE: usize = ID + 8;

/// Decides the orders of its arguments, one after the other.
const SCRIPT: &str = "
for _, order in ipairs(ARGV) do
  local id = order:sub(1, 16)
  if redis.call('SADD', KEYS[1], id) == 1 then
    local ids, wanted = {}, {}
    for at = 17, #order, 20 do
      ids[#ids + 1] = order:sub(at, at + 15)
      wanted[#wanted + 1] = struct.unpack('>I4', order, at + 16)
    end
    local stock = redis.call('HMGET', KEYS[2], unpack(ids))
    local allocated = true
    for line = 1, #ids do
      stock[line] = tonumber(stock[line] or 0)
      if stock[line] < wanted[line] then allocated = false end
    end
    local lines, changed = {}, {}
    for line = 1, #ids do
      local left = stock[line]
      if allocated then left = left - wanted[line] end
      lines[line] = ids[line] .. struct.pack('>I4I4', stock[line], left)
      changed[2 * line - 1], changed[2 * line] = ids[line], left
    end
    if allocated then redis.call('HSET', KEYS[2], unpack(changed)) end
    redis.call('XADD', KEYS[3], '*', 'o', id, 'a', allocated and '1' or '0', 'l', table.concat(lines))
  end
end
return #ARGV";

/// How it is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Variant {
    connections: usize,
    orders_a_call: usize,
}

/// What is tried out.
pub(super) const VARIANTS: [Variant; 6] =
    [variant(1, 1), variant(8, 1), variant(32, 1), variant(8, 16), variant(1, 64), variant(8, 64)];

const fn variant(connections: usize, orders_a_call: usize) -> Variant {
    Variant { connections, orders_a_call }
}

impl std::fmt::Display for Variant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} × {}, pipelined", self.connections, self.orders_a_call)
    }
}

/// The rival's server.
pub(super) struct Arena {
    server: Redis,
    url: String,
}

/// What the server says of itself.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub version: String,
    pub appendfsync: String,
}

impl Arena {
    /// Starts the server, has it sync everything, and looks whether it does.
    pub async fn start(folder: &Path) -> anyhow::Result<(Self, Facts)> {
        let server = Redis::start(folder).await?;
        let url = server.url();
        let client = connect(&url).await?;
        // The stack's Redis is a cache and syncs every second.
        for (setting, value) in [("appendfsync", "always"), ("auto-aof-rewrite-percentage", "0")] {
            let _: Value = command(&client, "CONFIG", vec!["SET".into(), setting.into(), value.into()]).await?;
        }
        let appendfsync = setting(&client, "appendfsync").await?;
        ensure!(
            appendfsync == "always" && setting(&client, "appendonly").await? == "yes",
            "Redis runs with appendfsync {appendfsync}; figures of a server that may forget are of no use"
        );
        let info: String = client.info(None).await.context("Redis does not tell its version")?;
        let version = info.lines().find_map(|line| line.strip_prefix("redis_version:")).unwrap_or("unknown").to_owned();
        close(client).await;
        Ok((Self { server, url }, Facts { version, appendfsync }))
    }

    /// Ends the server in order.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.server.stop().await
    }

    /// Sets the stock up, runs the orders, and checks the books: orders allocated and refused, or what is wrong.
    pub async fn race(
        &self,
        stock: &HashMap<Uuid, i64>,
        orders: Arc<Vec<PlainOrder>>,
        variant: Variant,
        what: &str,
        show: Show,
    ) -> anyhow::Result<(Duration, Result<(u64, u64), String>)> {
        let admin = connect(&self.url).await?;
        let _: Value = command(&admin, "FLUSHALL", vec!["SYNC".into()]).await?;
        let products: Vec<(&Uuid, &i64)> = stock.iter().collect();
        for products in products.chunks(PRODUCTS_A_COMMAND) {
            let pairs = products.iter().flat_map(|(id, quantity)| [bytes(id.as_bytes()), Value::from(**quantity)]);
            let arguments = std::iter::once(Value::from(STOCK)).chain(pairs).collect();
            let _: Value = command(&admin, "HSET", arguments).await?;
        }
        let digest: String = admin.script_load(SCRIPT).await.context("Redis does not take the script")?;
        let mut clients = Vec::with_capacity(variant.connections);
        for _ in 0..variant.connections {
            clients.push(connect(&self.url).await?);
        }
        let encoded: Arc<Vec<Value>> = Arc::new(orders.iter().map(encode).collect::<anyhow::Result<_>>()?);
        let next = Arc::new(AtomicUsize::new(0));

        let started = Instant::now();
        let mut running = JoinSet::new();
        for client in &clients {
            running.spawn(run(client.clone(), digest.clone(), encoded.clone(), next.clone(), variant.orders_a_call));
        }
        let taken = watch(running, started, &next, orders.len(), show.progress(what, orders.len() as u64)).await?;
        let books = audit(&admin, stock, &orders).await?;
        for client in clients.into_iter().chain([admin]) {
            close(client).await;
        }
        Ok((taken, books))
    }
}

/// Takes orders and has them decided, with [`CALLS_IN_FLIGHT`] calls under way.
async fn run(
    client: Client,
    digest: String,
    orders: Arc<Vec<Value>>,
    next: Arc<AtomicUsize>,
    orders_a_call: usize,
) -> anyhow::Result<()> {
    let calls = stream::iter(std::iter::from_fn(|| {
        let from = next.fetch_add(orders_a_call, Ordering::Relaxed);
        let mine = orders.get(from..orders.len().min(from + orders_a_call))?;
        (!mine.is_empty()).then(|| mine.to_vec())
    }));
    calls
        .map(|arguments| async {
            let due = arguments.len() as u64;
            let done: u64 = client.evalsha(digest.as_str(), vec![DECIDED, STOCK, OUTBOX], arguments).await?;
            ensure!(done == due, "the script decided {done} of {due} orders");
            Ok(())
        })
        .buffer_unordered(CALLS_IN_FLIGHT)
        .try_for_each(|()| async { Ok(()) })
        .await
}

/// An order as the script takes it: its id, then each line's product and quantity.
fn encode(order: &PlainOrder) -> anyhow::Result<Value> {
    let mut encoded = Vec::with_capacity(ID + order.products.len() * LINE);
    encoded.extend_from_slice(order.id.as_bytes());
    for (product, quantity) in order.lines() {
        encoded.extend_from_slice(product.as_bytes());
        encoded.extend_from_slice(&u32::try_from(quantity).context("a quantity is out of range")?.to_be_bytes());
    }
    Ok(Value::Bytes(encoded.into()))
}

/// Reads the outbox in its order, in which the script decided, and lets the books judge it.
async fn audit(
    client: &Client,
    initial: &HashMap<Uuid, i64>,
    orders: &[PlainOrder],
) -> anyhow::Result<Result<(u64, u64), String>> {
    let mut books = Books::new(initial, orders);
    let mut from = "-".to_owned();
    loop {
        let arguments =
            vec![OUTBOX.into(), from.as_str().into(), "+".into(), "COUNT".into(), Value::from(AUDIT_PAGE as i64)];
        let page: Value = command(client, "XRANGE", arguments).await?;
        let page = page.into_array();
        let Some(last) = page.last().cloned() else { break };
        for entry in page {
            let fields = entry.into_array().pop().map(Value::into_array).unwrap_or_default();
            let found = decision(&fields).context("the rival's outbox holds no decision")?;
            if let Err(problem) = books.judge(&found) {
                return Ok(Err(problem));
            }
        }
        let id = last.into_array().into_iter().next().and_then(Value::into_string);
        from = format!("({}", id.context("a message of the rival's outbox has no id")?);
    }
    let decided: u64 = command(client, "SCARD", vec![DECIDED.into()]).await?;
    let all: Value = command(client, "HGETALL", vec![STOCK.into()]).await?;
    let held = held(all).context("the rival's stock cannot be read")?;
    Ok(books.close(decided, &held))
}

fn decision(fields: &[Value]) -> Option<Decision> {
    let [_, id, _, allocated, _, lines] = fields else { return None };
    let lines = lines.as_bytes()?.chunks(DECIDED_LINE).map(|line| {
        let number = |at: usize| Some(i64::from(u32::from_be_bytes(line.get(at..at + 4)?.try_into().ok()?)));
        Some(DecidedLine {
            product_id: Uuid::from_slice(line.get(..ID)?).ok()?,
            previous_quantity: number(ID)?,
            new_quantity: number(ID + 4)?,
        })
    });
    Some(Decision {
        order_id: Uuid::from_slice(id.as_bytes()?).ok()?,
        allocated: allocated.as_bytes()? == b"1",
        lines: lines.collect::<Option<_>>()?,
    })
}

/// The hash of the stock, as a list of fields and values.
fn held(all: Value) -> Option<HashMap<Uuid, i64>> {
    let all = all.into_array();
    let pairs = all.chunks_exact(2).map(|pair| {
        let quantity = std::str::from_utf8(pair[1].as_bytes()?).ok()?.parse().ok()?;
        Some((Uuid::from_slice(pair[0].as_bytes()?).ok()?, quantity))
    });
    pairs.collect()
}

fn bytes(of: &[u8]) -> Value {
    Value::Bytes(Bytes::copy_from_slice(of))
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let config = Config::from_url(url).with_context(|| format!("`{url}` is no address of a Redis"))?;
    let mut builder = Builder::from_config(config);
    builder.with_connection_config(|connection| {
        connection.tcp.nodelay = Some(true);
        // A call that was lost must not be made twice unnoticed.
        connection.max_command_attempts = 1;
    });
    let client = builder.build().context("a client of Redis cannot be made")?;
    client.init().await.context("Redis cannot be reached")?;
    Ok(client)
}

/// Best effort: the server is ours and ends with us.
async fn close(client: Client) {
    let _ = client.quit().await;
}

async fn setting(client: &Client, name: &str) -> anyhow::Result<String> {
    let found: Value = command(client, "CONFIG", vec!["GET".into(), name.into()]).await?;
    let value = found.into_array().pop().and_then(Value::into_string);
    value.with_context(|| format!("Redis does not show its setting {name}"))
}

async fn command<R: fred::types::FromValue>(
    client: &Client,
    name: &'static str,
    arguments: Vec<Value>,
) -> anyhow::Result<R> {
    let command = CustomCommand::new_static(name, ClusterHash::FirstKey, false);
    client.custom(command, arguments).await.map_err(|problem| anyhow!("Redis refuses {name}: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever is wrong with the rival's books, it is noticed.
    #[tokio::test(flavor = "multi_thread")]
    async fn wrong_books_are_noticed() {
        let folder = crate::stack::scratch().expect("a folder");
        let (arena, _) = Arena::start(folder.path()).await.expect("Redis starts; `./just setup` installs it");
        let products: Vec<Uuid> = (0..5).map(Uuid::from_u128).collect();
        let stock: HashMap<Uuid, i64> = products.iter().map(|product| (*product, 100)).collect();
        let order = |id| PlainOrder { id: Uuid::from_u128(id), products: products.clone(), quantities: vec![1; 5] };
        let orders = Arc::new((0..20).map(order).collect::<Vec<_>>());
        let client = connect(&arena.url).await.expect("connected");
        for (corruption, complaint) in [
            ("redis.call('HSET', KEYS[2], redis.call('HKEYS', KEYS[2])[1], 99)", "the stock"),
            ("redis.call('XDEL', KEYS[3], redis.call('XREVRANGE', KEYS[3], '+', '-')[1][1])", "were not decided"),
            ("redis.call('XDEL', KEYS[3], redis.call('XRANGE', KEYS[3], '-', '+')[7][1])", "decided wrongly"),
            (
                "redis.call('XADD', KEYS[3], '*', unpack(redis.call('XRANGE', KEYS[3], '-', '+')[7][2]))",
                "decided twice",
            ),
            ("redis.call('SPOP', KEYS[1])", "noted as decided"),
        ] {
            let race = arena.race(&stock, orders.clone(), VARIANTS[3], "", Show::Nothing).await.expect("it runs");
            assert_eq!(race.1, Ok((20, 0)));
            let none: Vec<Value> = Vec::new();
            let _: Value = client.eval(corruption, vec![DECIDED, STOCK, OUTBOX], none).await.expect("corrupted");
            let problem = audit(&client, &stock, &orders).await.expect("it is read").expect_err(corruption);
            assert!(problem.contains(complaint), "{corruption}: {problem}");
        }
        close(client).await;
        arena.stop().await.expect("Redis stops");
    }
}
