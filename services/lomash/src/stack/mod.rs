//! Real servers as children: what `lomash up`, `lomash demo`, the tests and the benchmarks run on.
//!
//! [`Nats`], [`Postgres`], [`Redis`] and [`Mail`] each keep their data and their log in one folder, listen on a free
//! loopback port, and can be killed, paused, stopped and started again on the same port and data. [`Service`]
//! does the same for a program of ours. Nothing here touches a server that it did not start.
//!
//! What is assumed, and where it is kept true:
//! - **No child outlives its parent**, however the parent ends (`process.rs`: the kernel's parent-death signal).
//! - **One server a folder.** The server holds a lock on its folder for as long as any of its processes lives
//!   (`lock.rs`), so a second start waits for the remains of a killed first one and refuses a living one.
//! - **A port is ours only when the server that answers on it is.** Every probe checks who answers.

mod lock;
mod mail;
mod nats;
mod port;
mod postgres;
mod process;
mod programs;
mod redis;
mod secure;
mod server;
mod service;

use std::{
    io::{Read, Seek, SeekFrom},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use anyhow::Context as _;
pub use lock::FolderLock;
pub use mail::MailServer;
pub use nats::NatsServer;
pub use port::free_port;
pub use postgres::PostgresServer;
pub use process::Process;
pub use redis::RedisServer;
pub use secure::{Credentials, NODES, NatsCluster, Routes, SecureNats, SecureNatsServer, Who, lay_out};
pub use server::{Kind, Server};
pub use service::Service;

/// A NATS server with JetStream, configured by `deploy/nats/single.conf`.
pub type Nats = Server<NatsServer>;
/// A PostgreSQL server with the database and the user `lomash`; never runs as root.
pub type Postgres = Server<PostgresServer>;
/// A Redis or Valkey server.
pub type Redis = Server<RedisServer>;
/// A mail server that keeps mails as files in its folder.
pub type Mail = Server<MailServer>;

/// Lines of a server's log that an error shows: enough for a stack of start-up messages, one screen at most.
const LOG_TAIL_LINES: usize = 20;
/// Bytes of the end of a log that are looked at for those lines.
const LOG_TAIL_BYTES: u64 = 16 * 1024;

/// A temporary folder that servers under other users can reach, removed when dropped.
///
/// [`tempfile::tempdir`] makes one that only its owner may enter; Postgres started by root runs as another
/// user and would have to keep its data elsewhere.
pub fn scratch() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new().prefix("lomash-").permissions(std::fs::Permissions::from_mode(0o711)).tempdir()
}

/// The folder of a stack: its owner's alone, for tokens, mails and logs are in it. Where an earlier run as root has left
/// Postgres's data inside, whose user must get there, others may still pass through, and see nothing.
pub(crate) fn data_folder(folder: &Path) -> anyhow::Result<()> {
    private_folder(folder)?;
    let holds_postgres = std::fs::symlink_metadata(folder.join("postgres/data")).is_ok_and(|data| data.is_dir());
    if nix::unistd::geteuid().is_root() && holds_postgres {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o711))
            .with_context(|| format!("could not make {} enterable", folder.display()))?;
    }
    Ok(())
}

/// Opens a log for its owner alone, also one that an earlier version left open to others.
pub(crate) fn append_to_log(path: &Path) -> std::io::Result<std::fs::File> {
    let log = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    log.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    Ok(log)
}

/// Makes a folder that only its owner may enter, or makes it so.
pub(crate) fn private_folder(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)))
        .with_context(|| format!("could not make the private folder {}", folder.display()))
}

/// The last lines of a log, indented for an error message.
pub fn log_tail(log: &Path) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    match read() {
        Ok(text) if text.trim().is_empty() => format!("its log {} is empty", log.display()),
        Ok(text) => {
            let lines: Vec<&str> = text.lines().collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            format!("the end of its log {}:\n    {}", log.display(), tail.join("\n    "))
        }
        Err(error) => format!("its log {} cannot be read: {error}", log.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_a_log_is_its_last_lines() {
        let dir = scratch().expect("a scratch folder");
        let log = dir.path().join("x.log");
        assert!(log_tail(&log).contains("cannot be read"));
        std::fs::write(&log, "").expect("written");
        assert!(log_tail(&log).ends_with("is empty"));
        let text: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        std::fs::write(&log, text).expect("written");
        let tail = log_tail(&log);
        assert!(tail.ends_with("line 4999"), "{tail}");
        assert_eq!(tail.lines().count(), LOG_TAIL_LINES + 1);
    }
}
