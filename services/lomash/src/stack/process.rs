//! One child process: started so that it cannot outlive us, signalled without ever hitting a stranger, reaped once.
//!
//! The kernel sends a child its parent-death signal when the *thread* that forked it ends. All children are
//! therefore forked by one thread that lives as long as the process; a worker thread of a runtime that a test
//! drops would take its servers with it.
//!
//! Every child leads a process group of its own. Ctrl-C at a terminal then reaches only us, and we stop the
//! children in order.

use std::{
    fs::File,
    io,
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus},
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        prctl,
        signal::{SigHandler, Signal, kill, killpg, signal},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, getpid, getppid},
};
use tokio::sync::watch;

/// How long a killed process may take to be gone. Only one that is stuck inside the kernel (a dead disk) takes longer.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a paused process may take to stand still: until each of its threads was run once more by a busy machine.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause between two looks whether it does.
const PAUSE_LOOK: Duration = Duration::from_millis(1);

/// What an exit status reads as when the kernel would not tell us.
const UNKNOWN_EXIT: i32 = 0xff00;

/// A running or ended child process. Dropping it kills it and its process group.
#[derive(Debug)]
pub struct Process {
    name: String,
    pid: Pid,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Set once the child is reaped. Held while signalling: until it is set, the pid cannot have become another's.
    exit: Mutex<Option<ExitStatus>>,
    reaped: Condvar,
    ended: watch::Sender<Option<ExitStatus>>,
}

impl Shared {
    fn exit(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Process {
    /// Starts `command` as a child that gets `death_signal` when this process ends, whatever ends it.
    ///
    /// `held` is a lock that the child inherits, and passes on to its own children: it is released when the
    /// last of them is gone.
    pub fn spawn(name: &str, mut command: Command, death_signal: Signal, held: Option<File>) -> Result<Self> {
        let program = command.get_program().to_owned();
        command.process_group(0);
        tie_to_us(&mut command, death_signal, held);

        let (reply, answer) = mpsc::sync_channel(1);
        spawner()
            .send((command, reply))
            .ok()
            .and_then(|()| answer.recv().ok())
            .context("the thread that starts children is gone")?
            .with_context(|| format!("could not start {name} ({})", program.display()))
            .and_then(|child| Self::watch(name, child))
    }

    fn watch(name: &str, child: Child) -> Result<Self> {
        let pid = Pid::from_raw(child.id().cast_signed());
        let shared =
            Arc::new(Shared { exit: Mutex::new(None), reaped: Condvar::new(), ended: watch::Sender::new(None) });
        let process = Self { name: name.to_owned(), pid, shared: shared.clone() };
        thread::Builder::new()
            .name(format!("reap {name}"))
            .spawn(move || reap(pid, child, &shared))
            .inspect_err(|_| {
                let _ = kill(pid, Signal::SIGKILL);
            })
            .with_context(|| format!("could not start a thread that waits for {name}"))?;
        Ok(process)
    }

    /// The process id; it names this process only until it has ended.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw().cast_unsigned()
    }

    /// How the process ended, if it has.
    pub fn exit(&self) -> Option<ExitStatus> {
        *self.shared.exit()
    }

    /// Sends a signal to the process alone; false if it has ended already.
    pub fn signal(&self, signal: Signal) -> bool {
        let exit = self.shared.exit();
        exit.is_none() && kill(self.pid, signal).is_ok()
    }

    /// Sends a signal to the process and what it forked in its group; false if it has ended already.
    pub fn signal_group(&self, signal: Signal) -> bool {
        let exit = self.shared.exit();
        exit.is_none() && killpg(self.pid, signal).is_ok()
    }

    /// SIGSTOP to the process and what it forked in its group; returns when all threads of the process stand still. False if
    /// it has ended already.
    pub fn pause(&self) -> bool {
        self.signal_group(Signal::SIGSTOP) && stands_still(self.pid)
    }

    /// Waits until the process has ended.
    pub async fn ended(&self) -> ExitStatus {
        let mut ended = self.shared.ended.subscribe();
        // The sender lives in `self.shared`, so that the wait cannot fail while `self` is borrowed.
        let status = ended.wait_for(Option::is_some).await.ok().and_then(|status| *status);
        status.unwrap_or_else(|| ExitStatus::from_raw(UNKNOWN_EXIT))
    }

    /// SIGKILL, now, to the whole group; returns when the process is reaped.
    pub fn kill(&self) {
        self.signal_group(Signal::SIGKILL);
        if !self.wait_blocking(KILL_TIMEOUT) {
            tracing::error!(name = self.name, pid = self.pid(), "the process does not end after SIGKILL");
        }
    }

    /// Blocks until the process has ended, or the time is over (false).
    pub(super) fn wait_blocking(&self, timeout: Duration) -> bool {
        let exit = self.shared.exit();
        let (exit, _) = self
            .shared
            .reaped
            .wait_timeout_while(exit, timeout, |exit| exit.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        exit.is_some()
    }

    /// Asks the process to end and waits; after `timeout` it is killed, and that is an error.
    pub async fn stop(&self, signal: Signal, timeout: Duration) -> Result<ExitStatus> {
        self.signal(signal);
        // A paused process receives the signal only once it runs again.
        self.signal(Signal::SIGCONT);
        match tokio::time::timeout(timeout, self.ended()).await {
            Ok(status) => Ok(status),
            Err(_) => {
                self.kill();
                anyhow::bail!("{} did not stop within {} s after {signal} and was killed", self.name, timeout.as_secs())
            }
        }
    }
}

/// Blocks until every thread of a process that was sent SIGSTOP is stopped; false if the process is gone, or does not stop.
///
/// The signal stops nobody by itself: the thread that takes it must be run first, and until then the others go on. Beside a
/// busy machine's other work that is long enough to answer a request.
pub(super) fn stands_still(pid: Pid) -> bool {
    let deadline = Instant::now() + PAUSE_TIMEOUT;
    loop {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
        let mut states = threads.flatten().filter_map(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            // After the name, which is in brackets and may hold any.
            stat.rsplit_once(") ")?.1.chars().next()
        });
        // A zombie's threads do nothing any more, either.
        if states.all(|state| matches!(state, 'T' | 't' | 'Z' | 'X')) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(PAUSE_LOOK);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit().is_none() {
            self.kill();
        }
    }
}

type Request = (Command, mpsc::SyncSender<io::Result<Child>>);

/// The one thread that forks; it ends with the process.
fn spawner() -> &'static mpsc::Sender<Request> {
    static SPAWNER: OnceLock<mpsc::Sender<Request>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (requests, inbox) = mpsc::channel::<Request>();
        thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(move || {
                for (mut command, reply) in inbox {
                    // Whoever asked may have been cancelled meanwhile: the child then has no owner.
                    if let Err(mpsc::SendError(Ok(mut child))) = reply.send(command.spawn()) {
                        let _ = child.kill();
                        let _ = child.wait();
                    }
                }
            })
            .expect("a process that cannot start a thread cannot start servers either");
        requests
    })
}

#[allow(unsafe_code)]
fn tie_to_us(command: &mut Command, death_signal: Signal, held: Option<File>) {
    let us = getpid();
    let tie = move || {
        // A shell that starts us in the background has us ignore SIGINT and SIGQUIT, and children inherit that: a
        // server that has not set up its own handling yet would throw the parent-death signal away.
        for ignored in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
            // SAFETY: the default action runs no code of ours.
            unsafe { signal(ignored, SigHandler::SigDfl) }?;
        }
        // After any change of user, which clears the setting; the standard library changes it before this.
        prctl::set_pdeathsig(death_signal)?;
        // If we died before the line above, nobody will ever send the signal.
        if getppid() != us {
            return Err(io::Error::from(Errno::ESRCH));
        }
        if let Some(held) = &held {
            fcntl(held, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes async-signal-safe system calls only
    // (sigaction, prctl, getppid, fcntl). It takes no lock and allocates nothing: errors are bare numbers.
    unsafe { command.pre_exec(tie) };
}

fn reap(pid: Pid, mut child: Child, shared: &Shared) {
    // Waits without reaping: until `exit` is set under its lock the pid stays taken, and signals go where they should.
    while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
    let mut exit = shared.exit();
    // Whatever it forked into its group ends with it; fails if nothing is left, which is the usual case.
    let _ = killpg(pid, Signal::SIGKILL);
    let status = child.wait().unwrap_or_else(|_| ExitStatus::from_raw(UNKNOWN_EXIT));
    *exit = Some(status);
    shared.reaped.notify_all();
    shared.ended.send_replace(Some(status));
}
