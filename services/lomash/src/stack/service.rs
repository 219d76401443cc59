//! A program of ours as a child: the product service and its like.

use std::{
    ffi::{OsStr, OsString},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{Process, append_to_log, log_tail};

/// How long a service may take to end in order: it finishes the commit it is in, and no more.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// A service that runs as our child. Dropping it kills it: services are made to be killed at any moment.
#[derive(Debug)]
pub struct Service {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    address: Option<SocketAddr>,
    health_address: Option<SocketAddr>,
    log: PathBuf,
    process: Option<Process>,
}

impl Service {
    /// Describes a service; [`Service::start`] runs it. Both of its output streams are appended to `log`.
    pub fn new(name: &str, program: &Path, log: &Path) -> Self {
        Self {
            name: name.to_owned(),
            program: program.to_owned(),
            arguments: Vec::new(),
            // Several run side by side here, and the default is one port.
            variables: vec![("HEALTH_LISTEN".into(), "127.0.0.1:0".into())],
            address: None,
            health_address: None,
            log: log.to_owned(),
            process: None,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Adds an environment variable; it wins over an inherited one.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.set_env(name, value);
        self
    }

    /// Has the service listen here, by `HTTP_LISTEN`, over all its starts.
    #[must_use]
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.address = Some(address);
        self.env("HTTP_LISTEN", address.to_string())
    }

    /// Has the service tell its health and metrics here, by `HEALTH_LISTEN`, over all its starts; otherwise on whatever port
    /// is free.
    #[must_use]
    pub fn listen_for_health(mut self, address: SocketAddr) -> Self {
        self.health_address = Some(address);
        self.env("HEALTH_LISTEN", address.to_string())
    }

    /// Sets an environment variable for the next start.
    pub fn set_env(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) {
        self.remove_env(name.as_ref());
        self.variables.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
    }

    /// Takes back a variable that was set here, from the next start on.
    pub fn remove_env(&mut self, name: impl AsRef<OsStr>) {
        self.variables.retain(|(known, _)| known != name.as_ref());
    }

    /// Starts the service. Whether it is ready is for the caller to ask: it knows the service's protocol.
    pub fn start(&mut self) -> Result<()> {
        if self.pid().is_some() {
            bail!("{} runs already", self.name);
        }
        let log = append_to_log(&self.log).with_context(|| format!("could not open the log {}", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("could not share the log file")?)
            .stderr(log);
        // SIGKILL, for nothing may keep it from ending when we are gone; it recovers from that like from a crash.
        self.process = Some(Process::spawn(&self.name, command, Signal::SIGKILL, None)?);
        Ok(())
    }

    /// Kills the service if it runs, and starts it.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.start()
    }

    /// The name given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it listens, if it was told to.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Where it tells its health and metrics, if it was told to.
    pub fn health_address(&self) -> Option<SocketAddr> {
        self.health_address
    }

    /// The log of all its starts.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().filter(|process| process.exit().is_none()).map(Process::pid)
    }

    /// How it ended, if it was started and has ended by itself.
    pub fn exit(&self) -> Option<ExitStatus> {
        self.process.as_ref().and_then(Process::exit)
    }

    /// Completes when the service ends by itself; never, if it was not started or we have ended it.
    pub async fn ended(&self) -> ExitStatus {
        match &self.process {
            Some(process) => process.ended().await,
            None => std::future::pending().await,
        }
    }

    /// SIGKILL; returns when the process is gone.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    /// SIGTERM and a bounded wait; one that does not end in time is killed, and one that fails says how: both are
    /// errors.
    pub async fn stop(&mut self) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        let status = process.stop(Signal::SIGTERM, STOP_TIMEOUT).await;
        self.process = None;
        let status = status.with_context(|| log_tail(&self.log))?;
        if !status.success() {
            bail!("{} did not end in order ({status}); {}", self.name, log_tail(&self.log));
        }
        Ok(())
    }

    /// SIGSTOP: the service keeps its connections and does nothing, from when this returns.
    pub fn pause(&self) -> Result<()> {
        match &self.process {
            Some(process) if process.pause() => Ok(()),
            _ => bail!("{} does not run; {}", self.name, log_tail(&self.log)),
        }
    }

    /// SIGCONT: the end of a pause.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        match &self.process {
            Some(process) if process.signal_group(signal) => Ok(()),
            _ => bail!("{} does not run; {}", self.name, log_tail(&self.log)),
        }
    }
}
