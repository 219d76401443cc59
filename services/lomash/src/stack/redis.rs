//! Redis (or Valkey). What it holds is a cache and may be lost; it keeps an append-only file all the same, so that
//! a restart comes back as it does in production.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{FolderLock, Kind, programs};

/// What starts redis-server.
#[derive(Debug)]
pub struct RedisServer {
    program: PathBuf,
    data: PathBuf,
}

impl Kind for RedisServer {
    const NAME: &'static str = "redis";
    /// Not SIGKILL: a rewrite of the file under way is a process of its own, which Redis ends on SIGTERM.
    const DEATH_SIGNAL: Signal = Signal::SIGTERM;
    const STOP_SIGNAL: Signal = Signal::SIGTERM;
    const DROP_SIGNAL: Option<Signal> = None;
    const START_TIMEOUT: Duration = Duration::from_secs(30);
    const STOP_TIMEOUT: Duration = Duration::from_secs(10);

    async fn prepare(dir: &Path, _lock: &FolderLock) -> Result<Self> {
        let program = programs::redis_server().await?;
        let data = dir.join("data");
        super::private_folder(&data)?;
        Ok(Self { program, data })
    }

    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--bind", "127.0.0.1", "--port", &port.to_string(), "--daemonize", "no", "--logfile", ""])
            .args(["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"])
            .arg("--dir")
            .arg(&self.data);
        command
    }

    async fn probe(&self, port: u16, pid: u32) -> Result<()> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.context("could not connect")?;
        stream.write_all(b"PING\r\nINFO server\r\nQUIT\r\n").await.context("could not ask")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.context("it did not answer")?;
        let answer = String::from_utf8_lossy(&answer);
        if !answer.starts_with("+PONG\r\n") {
            bail!("it answers {:?} to PING", answer.lines().next().unwrap_or_default());
        }
        if !answer.lines().any(|line| line.trim_end() == format!("process_id:{pid}")) {
            bail!("another Redis answers on its port");
        }
        Ok(())
    }

    fn url(&self, port: u16) -> String {
        format!("redis://127.0.0.1:{port}")
    }
}
