//! NATS: `deploy/nats/single.conf` with its store replaced, and address, port and name given as flags.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    net::TcpStream,
};

use super::{FolderLock, Kind, programs};

/// The configuration that is shipped for one node. Flags win over its address; its store must not be given twice.
const CONFIG: &str = include_str!("../../../../deploy/nats/single.conf");
/// The store in it.
const SHIPPED_STORE: &str = r#"store_dir: ".data/nats/data""#;
/// The first line a server sends is well below this.
const INFO_LIMIT_BYTES: u64 = 64 * 1024;

/// What starts nats-server.
#[derive(Debug)]
pub struct NatsServer {
    program: PathBuf,
    dir: PathBuf,
    /// Unique to this server, so that a probe can tell it from a stranger on the same port.
    name: String,
}

impl Kind for NatsServer {
    const NAME: &'static str = "nats";
    /// It syncs before it acknowledges, so nothing is lost, and nothing may keep it from ending.
    const DEATH_SIGNAL: Signal = Signal::SIGKILL;
    const STOP_SIGNAL: Signal = Signal::SIGTERM;
    const DROP_SIGNAL: Option<Signal> = None;
    /// Recovery reads the streams' blocks: seconds for millions of messages, on a slow disk many.
    const START_TIMEOUT: Duration = Duration::from_secs(120);
    const STOP_TIMEOUT: Duration = Duration::from_secs(20);

    async fn prepare(dir: &Path, _lock: &FolderLock) -> Result<Self> {
        let program = programs::nats_server().await?;
        let config = dir.join("nats.conf");
        crate::token::write_private(&config, &config_with_store(&dir.join("data"))?)?;
        Ok(Self { program, dir: dir.to_owned(), name: format!("lomash-{}", uuid::Uuid::new_v4().simple()) })
    }

    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--name", &self.name])
            .arg("--config")
            .arg(self.dir.join("nats.conf"));
        command
    }

    async fn probe(&self, port: u16, _pid: u32) -> Result<()> {
        greets(port, &self.name).await
    }

    fn url(&self, port: u16) -> String {
        format!("nats://127.0.0.1:{port}")
    }
}

/// Succeeds when the server `name` greets on `port` and has JetStream. The greeting comes before any TLS.
pub(super) async fn greets(port: u16, name: &str) -> Result<()> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.context("could not connect")?;
    let mut line = String::new();
    BufReader::new(stream.take(INFO_LIMIT_BYTES)).read_line(&mut line).await.context("it sent no greeting")?;
    let info: serde_json::Value = line
        .strip_prefix("INFO ")
        .and_then(|json| serde_json::from_str(json).ok())
        .with_context(|| format!("its greeting is not that of a NATS server: {line:?}"))?;
    if info["server_name"] != name {
        bail!("another NATS server answers on its port: {}", info["server_name"]);
    }
    if info["jetstream"] != true {
        bail!("JetStream is not ready");
    }
    Ok(())
}

fn config_with_store(store: &Path) -> Result<String> {
    let store = store.to_str().with_context(|| format!("{} is not UTF-8, as NATS needs it", store.display()))?;
    // A JSON string is read as one by NATS, escapes included.
    let store = serde_json::to_string(store).context("could not quote the path of the store")?;
    Ok(CONFIG.replace(SHIPPED_STORE, &format!("store_dir: {store}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_store_is_the_only_difference() {
        assert_eq!(CONFIG.matches(SHIPPED_STORE).count(), 1);
        let config = config_with_store(Path::new("/a \"b\"/c")).expect("quoted");
        assert!(config.contains(r#"store_dir: "/a \"b\"/c""#), "{config}");
        assert_eq!(config.lines().count(), CONFIG.lines().count());
    }
}
