//! Connections to Redis and the scripts that run there: nothing here waits long, queues much or tries twice.

use std::sync::OnceLock;
use std::time::Duration;

use fred::interfaces::{ClientLike, FredResult, LuaInterface};
use fred::prelude::{Builder, Client, Config, Error, FromValue, ReconnectPolicy, Value};
use fred::types::ConnectHandle;
use fred::types::config::UnresponsiveConfig;

/// Pauses between tries to connect again, in milliseconds: from the first to the last, doubling, for ever.
const FIRST_PAUSE_MS: u32 = 100;
const LAST_PAUSE_MS: u32 = 2_000;

/// Longest that a connection may take to be made. Redis is near, or it is no help.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);

/// A connection on which something waits for an answer for so long is closed and made anew.
const UNRESPONSIVE_AFTER: Duration = Duration::from_secs(1);
const UNRESPONSIVE_CHECK: Duration = Duration::from_millis(250);

/// Whether a lost connection is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// By itself, with growing pauses.
    MadeAgain,
    /// Never: whoever uses it must know that it is another one.
    StaysLost,
}

/// A connection. Dropping it closes it.
pub(super) struct Connection {
    pub(super) client: Client,
    /// Ends when the connection is lost for good.
    pub(super) task: ConnectHandle,
}

impl Connection {
    /// Begins to connect; commands sent before it is done wait for it, within `timeout`. At most `queue` commands wait,
    /// the next one fails at once.
    pub(super) fn open(config: &Config, lost: Lost, timeout: Duration, queue: usize) -> FredResult<Self> {
        let mut config = config.clone();
        config.fail_fast = lost == Lost::StaysLost;
        let mut builder = Builder::from_config(config);
        builder
            .with_performance_config(|performance| performance.default_command_timeout = timeout)
            .with_connection_config(|connection| {
                connection.connection_timeout = CONNECT_TIMEOUT;
                connection.internal_command_timeout = CONNECT_TIMEOUT;
                // A command that was sent once is never sent again: nobody waits for it any more.
                connection.max_command_attempts = 1;
                connection.max_command_buffer_len = queue;
                connection.tcp.nodelay = Some(true);
                connection.unresponsive =
                    UnresponsiveConfig { max_timeout: Some(UNRESPONSIVE_AFTER), interval: UNRESPONSIVE_CHECK };
            });
        if lost == Lost::MadeAgain {
            builder.set_policy(ReconnectPolicy::new_exponential(0, FIRST_PAUSE_MS, LAST_PAUSE_MS, 2));
        }
        let client = builder.build()?;
        let task = client.connect();
        Ok(Self { client, task })
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A script of ours, called by its digest.
pub(super) struct Script {
    text: &'static str,
    /// As Redis computed it; the same on every Redis.
    digest: OnceLock<String>,
}

impl Script {
    pub(super) const fn new(text: &'static str) -> Self {
        Self { text, digest: OnceLock::new() }
    }

    /// Runs it; loads it first where it is not known, as after a restart of Redis.
    pub(super) async fn run<R: FromValue>(&self, client: &Client, keys: &[&str], args: Vec<Value>) -> FredResult<R> {
        if let Some(digest) = self.digest.get() {
            match client.evalsha(digest.as_str(), keys.to_vec(), args.clone()).await {
                Err(error) if is_unknown_script(&error) => {}
                done => return done,
            }
        }
        let digest: String = client.script_load(self.text).await?;
        let digest = self.digest.get_or_init(|| digest);
        client.evalsha(digest.as_str(), keys.to_vec(), args).await
    }
}

fn is_unknown_script(error: &Error) -> bool {
    error.details().starts_with("NOSCRIPT")
}
