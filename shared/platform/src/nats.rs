//! Connecting to NATS, and staying connected.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::{Client, ConnectOptions, Event};
use tracing::{debug, info, warn};

/// How long a process waits at start for a server to take its connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest pause between two tries to reconnect: a server that is back must not wait for us.
pub const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// Messages that one subscription holds in memory before the client drops some; pulls are bounded well below.
const SUBSCRIPTION_CAPACITY: usize = 65_536;

/// Connects as `name` to the server or servers of `url` (a comma-separated list), and reconnects for ever.
///
/// # Errors
/// When no server takes the connection within [`CONNECT_TIMEOUT`], or refuses it for good.
pub async fn connect(url: &str, name: &str) -> anyhow::Result<Client> {
    let addresses: Vec<async_nats::ServerAddr> = url
        .split(',')
        .map(|address| address.trim().parse().with_context(|| format!("NATS_URL: `{address}` is not an address")))
        .collect::<anyhow::Result<_>>()?;
    let deadline = tokio::time::Instant::now() + CONNECT_TIMEOUT;
    loop {
        match options(name).connect(&addresses[..]).await {
            Ok(client) => return Ok(client),
            Err(error)
                if error.kind() == async_nats::ConnectErrorKind::Io && tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot connect to NATS at {}; is it running?", plain(&addresses)));
            }
        }
    }
}

/// The addresses without any user or password.
fn plain(addresses: &[async_nats::ServerAddr]) -> String {
    let plain: Vec<_> = addresses.iter().map(|address| format!("{}:{}", address.host(), address.port())).collect();
    plain.join(", ")
}

fn options(name: &str) -> ConnectOptions {
    ConnectOptions::new()
        .name(name)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .max_reconnects(None)
        .reconnect_delay_callback(|attempts| {
            let steps = u32::try_from(attempts).unwrap_or(u32::MAX);
            Duration::from_millis(50).saturating_mul(steps).min(RECONNECT_PAUSE)
        })
        .event_callback(|event| async move {
            match event {
                Event::Connected => info!("connected to NATS"),
                Event::Closed => debug!("connection to NATS closed"),
                other => warn!(event = %other, "NATS connection"),
            }
        })
}
