//! The mail server of a laptop: `lomash mail-sink`, which keeps each mail as a file in its folder.

use std::{
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{FolderLock, Kind};

/// The program that has the command.
const PROGRAM: &str = "lomash";
/// A greeting is well below this.
const GREETING_LIMIT_BYTES: u64 = 1024;

/// What starts the mail server.
#[derive(Debug)]
pub struct MailServer {
    program: PathBuf,
    dir: PathBuf,
    /// Unique to this server, so that a probe can tell it from a stranger on the same port.
    name: String,
}

impl Kind for MailServer {
    const NAME: &'static str = "mail";
    /// A mail that it has accepted is a file already.
    const DEATH_SIGNAL: Signal = Signal::SIGKILL;
    const STOP_SIGNAL: Signal = Signal::SIGTERM;
    const DROP_SIGNAL: Option<Signal> = None;
    const START_TIMEOUT: Duration = Duration::from_secs(30);
    const STOP_TIMEOUT: Duration = Duration::from_secs(5);

    async fn prepare(dir: &Path, _lock: &FolderLock) -> Result<Self> {
        let us = std::env::current_exe().context("could not find out where this program is")?;
        let program =
            if us.file_name().is_some_and(|name| name == PROGRAM) { us } else { crate::up::program(PROGRAM)? };
        Ok(Self { program, dir: dir.to_owned(), name: format!("lomash-{}", uuid::Uuid::new_v4().simple()) })
    }

    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("mail-sink")
            .args(["--listen", &format!("127.0.0.1:{port}"), "--name", &self.name])
            .arg("--dir")
            .arg(&self.dir);
        command
    }

    async fn probe(&self, port: u16, _pid: u32) -> Result<()> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.context("could not connect")?;
        let mut greeting = String::new();
        let (read, mut write) = stream.split();
        let mut reader = BufReader::new(read.take(GREETING_LIMIT_BYTES));
        reader.read_line(&mut greeting).await.context("it sent no greeting")?;
        // A client that says goodbye is no error in the log.
        let _ = write.write_all(b"QUIT\r\n").await;
        if !greeting.starts_with(&format!("220 {} ", self.name)) {
            bail!("another server answers on its port: {greeting:?}");
        }
        Ok(())
    }

    fn url(&self, port: u16) -> String {
        format!("smtp://127.0.0.1:{port}")
    }

    fn note(&self) -> Option<String> {
        Some(format!("it delivers nothing: mails are files in {}", self.dir.display()))
    }
}
