//! What all servers have in common: start on a free port, wait until it is healthy, kill, pause, stop, start again.

use std::{
    fs::File,
    future::Future,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use lomash_platform::waiting::Waiting;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::{FolderLock, Process, append_to_log, log_tail, port::free_port, process::stands_still};

/// How long the remains of a killed server (its children, a flush under way) may hold its folder.
const REMAINS_TIMEOUT: Duration = Duration::from_secs(15);
/// Ports that are tried at a start, or times that the old port is tried at a restart, while others take them.
const PORT_TRIES: usize = 5;
/// Pause before an old port is tried again.
const PORT_PAUSE: Duration = Duration::from_millis(300);
/// How often a starting server is asked whether it is healthy.
const PROBE_EVERY: Duration = Duration::from_millis(20);
/// How long one such question may take: a server that is not ours may accept and never answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a server that is dropped may take to clean up before it is killed.
const DROP_TIMEOUT: Duration = Duration::from_secs(5);

/// What makes one kind of server different from another.
pub trait Kind: Send + Sync + Sized + 'static {
    /// The name in messages, and of the log file.
    const NAME: &'static str;
    /// What the kernel sends it when we die.
    const DEATH_SIGNAL: Signal;
    /// What asks it to end in order.
    const STOP_SIGNAL: Signal;
    /// What ends it at once but lets it clean up what would outlive it; None where nothing would.
    const DROP_SIGNAL: Option<Signal>;
    /// How long it may take to become healthy, recovery after a crash included.
    const START_TIMEOUT: Duration;
    /// How long it may take to end in order.
    const STOP_TIMEOUT: Duration;

    /// Finds the program and lays out its data under `dir`, or finds the data of an earlier start.
    /// `lock` is held on `dir`; programs that lay out the data inherit it.
    fn prepare(dir: &Path, lock: &FolderLock) -> impl Future<Output = Result<Self>> + Send;
    /// The command that serves on `port`. Standard output and error are taken care of.
    fn command(&self, port: u16) -> Command;
    /// Succeeds once the server is healthy and is the very process `pid`.
    fn probe(&self, port: u16, pid: u32) -> impl Future<Output = Result<()>> + Send;
    /// Where clients find it.
    fn url(&self, port: u16) -> String;
    /// What a person who looks for it should know, such as where its data really is.
    fn note(&self) -> Option<String> {
        None
    }
    /// Processes of it that are not in its process group.
    fn strays(_pid: u32) -> Vec<Pid> {
        Vec::new()
    }
}

/// A server that runs as our child. Dropping it ends it.
#[derive(Debug)]
pub struct Server<K: Kind> {
    kind: K,
    dir: PathBuf,
    port: u16,
    process: Option<Process>,
}

impl<K: Kind> Server<K> {
    /// Starts the server with its data and its log under `dir` and waits until it is healthy.
    pub async fn start(dir: &Path) -> Result<Self> {
        super::private_folder(dir)?;
        let dir = dir.canonicalize().with_context(|| format!("could not resolve {}", dir.display()))?;
        // Taken before the data is looked at: two starts at the same time must not both lay it out.
        let mut lock = FolderLock::acquire(&dir, REMAINS_TIMEOUT).await?;
        let kind = K::prepare(&dir, &lock).await?;
        let mut server = Self { kind, dir, port: 0, process: None };
        server.keep_last_log();
        let mut tries = 0;
        loop {
            tries += 1;
            server.port = free_port()?;
            match server.run(lock).await {
                Ok(()) => return Ok(server),
                Err(Failure::PortTaken(_)) if tries < PORT_TRIES => {}
                Err(failure) => return Err(failure.into()),
            }
            lock = FolderLock::acquire(&server.dir, REMAINS_TIMEOUT).await?;
        }
    }

    /// Starts the server again on the same port and data; kills it first if it runs.
    pub async fn restart(&mut self) -> Result<()> {
        self.kill();
        let mut tries = 0;
        loop {
            tries += 1;
            let lock = FolderLock::acquire(&self.dir, REMAINS_TIMEOUT).await?;
            match self.run(lock).await {
                Ok(()) => return Ok(()),
                Err(Failure::PortTaken(_)) if tries < PORT_TRIES => tokio::time::sleep(PORT_PAUSE).await,
                Err(failure) => return Err(failure.into()),
            }
        }
    }

    /// One try. The lock goes over to the server: we keep no copy, so that we can wait until it is free again.
    async fn run(&mut self, lock: FolderLock) -> Result<(), Failure> {
        let (log, written) = self.open_log()?;
        let mut command = self.kind.command(self.port);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("could not share the log file").map_err(Failure::Other)?)
            .stderr(log);
        let process = Process::spawn(K::NAME, command, K::DEATH_SIGNAL, Some(lock.share()?))?;
        drop(lock);
        let pid = process.pid();
        // From here on dropping `self` ends it, whether we fail or are cancelled.
        let process = self.process.insert(process);

        let started = Instant::now();
        let mut waiting = Waiting::on(format!("{} to be healthy", K::NAME));
        let mut answer = anyhow!("it was not asked yet");
        while started.elapsed() < K::START_TIMEOUT {
            let probe = tokio::time::timeout(PROBE_TIMEOUT, self.kind.probe(self.port, pid));
            tokio::select! {
                biased;
                status = process.ended() => {
                    self.process = None;
                    return Err(self.ended_at_start(status, written));
                }
                answered = probe => match answered {
                    Ok(Ok(())) => return Ok(()),
                    Ok(Err(error)) => answer = error,
                    Err(_) => answer = anyhow!("it did not answer within {} s", PROBE_TIMEOUT.as_secs()),
                },
            }
            waiting.still(format_args!("{answer:#}"));
            tokio::time::sleep(PROBE_EVERY).await;
        }
        self.kill();
        Err(Failure::Other(anyhow!(
            "{} was not healthy after {} s ({answer:#}); {}",
            K::NAME,
            K::START_TIMEOUT.as_secs(),
            log_tail(&self.log())
        )))
    }

    fn ended_at_start(&self, status: ExitStatus, written: u64) -> Failure {
        let log = std::fs::read(self.log()).unwrap_or_default();
        let said = log.get(usize::try_from(written).unwrap_or(usize::MAX)..).unwrap_or_default();
        let error = anyhow!("{} ended while it was starting ({status}); {}", K::NAME, log_tail(&self.log()));
        if String::from_utf8_lossy(said).to_lowercase().contains("address already in use") {
            Failure::PortTaken(error)
        } else {
            Failure::Other(error)
        }
    }

    /// The URL that clients use; it stays the same over restarts.
    pub fn url(&self) -> String {
        self.kind.url(self.port)
    }

    /// The loopback port; it stays the same over restarts.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder with the log, the lock and the data.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The log of this server since its first start; the one before is beside it as `.log.old`.
    pub fn log(&self) -> PathBuf {
        self.dir.join(format!("{}.log", K::NAME))
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().filter(|process| process.exit().is_none()).map(Process::pid)
    }

    /// What a person should know about this server besides its address, in one sentence.
    pub fn note(&self) -> Option<String> {
        self.kind.note()
    }

    pub(super) fn kind(&self) -> &K {
        &self.kind
    }

    /// Completes when the server ends by itself; never, once we have ended it.
    pub async fn ended(&self) -> ExitStatus {
        match &self.process {
            Some(process) => process.ended().await,
            None => std::future::pending().await,
        }
    }

    /// SIGKILL to the server and everything it forked; returns when none of it holds a file any more. As hard as it
    /// gets short of a power cut: what was written but not synced survives.
    pub fn kill(&mut self) {
        let Some(process) = self.process.take() else { return };
        // A stopped parent forks no more: the list of its children is then complete.
        process.signal(Signal::SIGSTOP);
        let strays = K::strays(process.pid());
        process.kill();
        for stray in strays {
            // Listed a moment ago: far too short for the kernel to give their numbers to others.
            let _ = kill(stray, Signal::SIGKILL);
        }
        drop(process);
        self.wait_for_remains();
    }

    /// Asks the server to end in order and waits; one that does not end in time is killed, and that is an error.
    pub async fn stop(&mut self) -> Result<()> {
        self.stop_by(K::STOP_SIGNAL, K::STOP_TIMEOUT).await
    }

    /// The same by another signal that asks a server of this kind to end.
    pub(super) async fn stop_by(&mut self, signal: Signal, timeout: Duration) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        for stray in K::strays(process.pid()) {
            let _ = kill(stray, Signal::SIGCONT);
        }
        let status = process.stop(signal, timeout).await;
        self.process = None;
        self.wait_for_remains();
        let status = status?;
        // Dying of the very signal that asked is how some end.
        if status.success() || std::os::unix::process::ExitStatusExt::signal(&status) == Some(signal as i32) {
            return Ok(());
        }
        bail!("{} did not end in order ({status}); {}", K::NAME, log_tail(&self.log()))
    }

    /// SIGSTOP: the server keeps its connections and answers nothing, from when this returns.
    pub fn pause(&self) -> Result<()> {
        let process = self.process.as_ref().with_context(|| format!("{} does not run", K::NAME))?;
        if !process.pause() {
            bail!("{} has ended, or does not stand still; {}", K::NAME, log_tail(&self.log()));
        }
        // A stopped parent forks no more: the list is complete. A child that has ended meanwhile stands still, too.
        for stray in K::strays(process.pid()) {
            let _ = kill(stray, Signal::SIGSTOP);
            stands_still(stray);
        }
        Ok(())
    }

    /// SIGCONT: the end of a pause.
    pub fn resume(&self) -> Result<()> {
        self.signal_all(Signal::SIGCONT)
    }

    fn signal_all(&self, signal: Signal) -> Result<()> {
        let process = self.process.as_ref().with_context(|| format!("{} does not run", K::NAME))?;
        if !process.signal_group(signal) {
            bail!("{} has ended; {}", K::NAME, log_tail(&self.log()));
        }
        for stray in K::strays(process.pid()) {
            let _ = kill(stray, signal);
        }
        Ok(())
    }

    fn wait_for_remains(&self) {
        match FolderLock::acquire_blocking(&self.dir, REMAINS_TIMEOUT) {
            Ok(Some(_)) => {}
            Ok(None) => tracing::error!(server = K::NAME, "processes of the server still run after it was ended"),
            // The folder itself may be gone by now: then nothing can be in the way of a restart.
            Err(error) => tracing::debug!(server = K::NAME, error = format!("{error:#}"), "no lock to wait for"),
        }
    }

    fn open_log(&self) -> Result<(File, u64)> {
        let path = self.log();
        let log = append_to_log(&path).with_context(|| format!("could not open the log {}", path.display()))?;
        let written = log.metadata().with_context(|| format!("could not read the size of {}", path.display()))?.len();
        Ok((log, written))
    }

    fn keep_last_log(&self) {
        // Best effort: without it the log only goes on where it ended.
        let old = self.dir.join(format!("{}.log.old", K::NAME));
        if std::fs::rename(self.log(), &old).is_ok() {
            let _ = append_to_log(&old);
        }
    }
}

impl<K: Kind> Drop for Server<K> {
    fn drop(&mut self) {
        if let (Some(process), Some(signal)) = (&self.process, K::DROP_SIGNAL) {
            for stray in K::strays(process.pid()) {
                let _ = kill(stray, Signal::SIGCONT);
            }
            process.signal(signal);
            process.signal(Signal::SIGCONT);
            process.wait_blocking(DROP_TIMEOUT);
        }
        self.kill();
    }
}

/// Why a start failed: another try on another port helps, or nothing does.
enum Failure {
    PortTaken(anyhow::Error),
    Other(anyhow::Error),
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::PortTaken(error) => error.context("its port was taken by another program"),
            Failure::Other(error) => error,
        }
    }
}
