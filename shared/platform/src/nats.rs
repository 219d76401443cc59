//! Connecting to NATS, as whom, and staying connected.
//!
//! Owns what an identity is made of (an NKey's seed in a file, the authority that signs the servers' certificates) and
//! what a refusal means. A laptop's server asks for none of it; `deploy/nats/accounts.conf` says what each identity may
//! do on one that does.

use std::error::Error as _;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use async_nats::{Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerError};
use clap::Args;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::Secret;
use crate::waiting::Waiting;

/// How long a process waits at start for a server to take its connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest pause between two tries to reconnect: a server that is back must not wait for us.
pub const RECONNECT_PAUSE: Duration = Duration::from_millis(500);

/// How often a server that says nothing is asked whether it lives. At the third time in vain, after [`FROZEN_AFTER`], the
/// client looks for another one: a server that is frozen or cut off keeps its connections.
const PING_EVERY: Duration = Duration::from_millis(1_500);

/// After so long without a word from its server a client leaves it. Shorter than what a cluster takes to elect a leader in the
/// place of a frozen one, so that its clients are there when it has one.
pub const FROZEN_AFTER: Duration = Duration::from_millis(4_500);

const _: () =
    assert!(FROZEN_AFTER.as_millis() == 3 * PING_EVERY.as_millis(), "async-nats bears two pings without an answer");

/// Messages that one subscription holds in memory before the client drops some; pulls are bounded well below.
const SUBSCRIPTION_CAPACITY: usize = 65_536;

/// A seed is 58 characters; what is much longer is another file.
const MAX_SEED_BYTES: u64 = 1024;

/// The permission bits that let anybody on the machine read or change a file.
const FOR_OTHERS: u32 = 0o007;

/// Who a process is to the servers, and whose servers it believes. Nothing of it is needed for a server without users.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct Identity {
    /// File with the seed of this process's NKey (`SU…`). Readable by its owner, at most by its group.
    #[arg(long, env = "NATS_NKEY_FILE", value_name = "FILE")]
    pub nats_nkey_file: Option<PathBuf>,

    /// Certificates (PEM) of the authority that signed the servers' certificates; those of the system otherwise.
    #[arg(long, env = "NATS_CA_FILE", value_name = "FILE")]
    pub nats_ca_file: Option<PathBuf>,

    /// A client certificate (PEM), for servers that ask for one.
    #[arg(long, env = "NATS_CERT_FILE", value_name = "FILE", requires = "nats_key_file")]
    pub nats_cert_file: Option<PathBuf>,

    /// The key of the client certificate (PEM).
    #[arg(long, env = "NATS_KEY_FILE", value_name = "FILE", requires = "nats_cert_file")]
    pub nats_key_file: Option<PathBuf>,

    /// Beginning of the subjects on which answers are heard, such as `_INBOX_product`: the servers let each identity
    /// listen on its own only.
    #[arg(long, env = "NATS_INBOX_PREFIX", value_name = "PREFIX")]
    pub nats_inbox_prefix: Option<String>,
}

/// Which servers, and who asks them: the same options for every program that connects once and ends.
#[derive(Clone, Debug, Args)]
pub struct Servers {
    /// NATS server or servers, comma-separated.
    #[arg(long, env = "NATS_URL", default_value = "nats://127.0.0.1:4222", hide_env_values = true)]
    pub nats_url: Secret,
    /// Who asks.
    #[command(flatten)]
    pub nats_identity: Identity,
}

impl Servers {
    /// Connects as `name`.
    ///
    /// # Errors
    /// As [`connect_as`].
    pub async fn connect(&self, name: &str) -> anyhow::Result<(Client, Refusals)> {
        connect_as(self.nats_url.expose(), &self.nats_identity, name).await
    }
}

impl Identity {
    /// Whether there is a key, so that a server with accounts is meant.
    #[must_use]
    pub const fn is_known(&self) -> bool {
        self.nats_nkey_file.is_some()
    }

    fn apply(&self, mut options: ConnectOptions) -> anyhow::Result<ConnectOptions> {
        if let Some(file) = &self.nats_nkey_file {
            options = options.nkey(read_seed(file)?);
        }
        if let Some(file) = &self.nats_ca_file {
            readable("NATS_CA_FILE", file)?;
            // Whoever names the authority wants no connection that it did not sign for.
            options = options.add_root_certificates(file.clone()).require_tls(true);
        }
        if let (Some(certificate), Some(key)) = (&self.nats_cert_file, &self.nats_key_file) {
            readable("NATS_CERT_FILE", certificate)?;
            private("NATS_KEY_FILE", key)?;
            options = options.add_client_certificate(certificate.clone(), key.clone());
        }
        if let Some(prefix) = &self.nats_inbox_prefix {
            let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-' | '.');
            if prefix.is_empty() || !prefix.chars().all(is_plain) || prefix.split('.').any(str::is_empty) {
                bail!(
                    "NATS_INBOX_PREFIX: `{prefix}` cannot begin a subject; use letters, digits and _, such as _INBOX_product"
                );
            }
            options = options.custom_inbox_prefix(prefix);
        }
        Ok(options)
    }
}

fn readable(setting: &str, file: &Path) -> anyhow::Result<std::fs::Metadata> {
    std::fs::File::open(file)
        .and_then(|file| file.metadata())
        .with_context(|| format!("{setting}: {} cannot be read", file.display()))
}

/// A file with a secret that everybody on the machine may read is one no longer.
fn private(setting: &str, file: &Path) -> anyhow::Result<std::fs::Metadata> {
    let metadata = readable(setting, file)?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & FOR_OTHERS != 0 {
        let file = file.display();
        bail!(
            "{setting}: {file} is open to everybody on this machine (mode {mode:03o}); replace the key, it may be known, \
             and run `chmod 600 {file}`"
        );
    }
    Ok(metadata)
}

/// The seed in a file of the form that `nk -gen user` and `lomash cluster` write.
fn read_seed(file: &Path) -> anyhow::Result<String> {
    let metadata = private("NATS_NKEY_FILE", file)?;
    // The seed itself never becomes part of an error.
    let no_seed = || anyhow!("NATS_NKEY_FILE: {} holds no seed of a user's NKey, which begins with SU", file.display());
    if metadata.len() > MAX_SEED_BYTES {
        return Err(no_seed());
    }
    let text = std::fs::read_to_string(file).map_err(|_| no_seed())?;
    let seed = text.lines().map(str::trim).find(|line| !line.is_empty()).ok_or_else(no_seed)?;
    let pair = nkeys::KeyPair::from_seed(seed).map_err(|_| no_seed())?;
    if !matches!(pair.key_pair_type(), nkeys::KeyPairType::User) {
        return Err(no_seed());
    }
    Ok(seed.to_owned())
}

/// What the servers have refused a connection since it was made.
#[derive(Clone, Debug)]
pub struct Refusals(watch::Receiver<Option<String>>);

impl Refusals {
    /// Does `work`, unless the server refuses something meanwhile: a request that may not be sent is never answered, and
    /// would be waited for in vain.
    ///
    /// # Errors
    /// What was refused, and where to mend it.
    pub async fn guard<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        let mut refused = self.0.clone();
        let refusal = async {
            let refusal = refused.wait_for(Option::is_some).await.map(|refusal| refusal.clone());
            match refusal {
                Ok(refusal) => refusal.unwrap_or_default(),
                // The connection is closed; the work will notice.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            refusal = refusal => bail!(
                "the NATS server does not allow this process what it needs ({refusal}); is NATS_NKEY_FILE the key of this \
                 service, NATS_INBOX_PREFIX its own, and deploy/nats/accounts.conf the servers' newest?"
            ),
            done = work => Ok(done),
        }
    }
}

/// Connects as `name` to the server or servers of `url` (a comma-separated list) that ask for no identity, and reconnects
/// for ever.
///
/// # Errors
/// As [`connect_as`].
pub async fn connect(url: &str, name: &str) -> anyhow::Result<Client> {
    Ok(connect_as(url, &Identity::default(), name).await?.0)
}

/// The same with an identity; and what the servers refuse it.
///
/// # Errors
/// When no server takes the connection within [`CONNECT_TIMEOUT`], or refuses it for good; when a file of the identity
/// cannot be used.
pub async fn connect_as(url: &str, identity: &Identity, name: &str) -> anyhow::Result<(Client, Refusals)> {
    let addresses: Vec<async_nats::ServerAddr> = url
        .split(',')
        .map(|address| address.trim().parse().with_context(|| format!("NATS_URL: `{address}` is not an address")))
        .collect::<anyhow::Result<_>>()?;
    let (refused, refusals) = watch::channel(None);
    let deadline = tokio::time::Instant::now() + CONNECT_TIMEOUT;
    let mut waiting = Waiting::on(format!("NATS at {}", plain(&addresses)));
    loop {
        let options = identity.apply(options(name, refused.clone()))?;
        match waiting.during(options.connect(&addresses[..])).await {
            Ok(client) => return Ok((client, Refusals(refusals))),
            Err(error) if passes(&error) && tokio::time::Instant::now() < deadline => {
                waiting.still(&error);
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
            Err(error) => {
                let problem = what_is_wrong(&error, identity);
                return Err(error)
                    .with_context(|| format!("cannot connect to NATS at {}; {problem}", plain(&addresses)));
            }
        }
    }
}

/// Whether trying again may help: a server that is not there yet or is frozen, or a connection that broke. One that does not pass the
/// check of its certificate does not get better.
fn passes(error: &ConnectError) -> bool {
    matches!(error.kind(), ConnectErrorKind::Io | ConnectErrorKind::TimedOut) && !is_handshake(error)
}

fn is_handshake(error: &ConnectError) -> bool {
    error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|source| source.kind() == io::ErrorKind::InvalidData)
}

/// Where to look, as a sentence.
fn what_is_wrong(error: &ConnectError, identity: &Identity) -> &'static str {
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation if identity.is_known() => {
            "it does not know the key in NATS_NKEY_FILE: is it the one whose public half is in the servers' configuration?"
        }
        ConnectErrorKind::AuthorizationViolation => "it lets nobody in without a key: NATS_NKEY_FILE names none",
        ConnectErrorKind::Tls => "TLS cannot be used: check NATS_CA_FILE, NATS_CERT_FILE and NATS_KEY_FILE",
        _ if is_handshake(error) => {
            "no encrypted connection came about: is the server's certificate still valid, made for this address, and \
             signed by the authority in NATS_CA_FILE?"
        }
        _ => "is it running?",
    }
}

/// How often a server is asked whether it still has JetStream behind it, and how long it may take to say so.
const ASK_EVERY: Duration = Duration::from_secs(2);
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may not answer: longer than a cluster takes to find another leader, which is some 7 s.
const LONELY_AFTER: Duration = Duration::from_secs(10);

/// Leaves a server that has lost the others for another one, until `stop`.
///
/// A node that is cut off from a cluster keeps its clients, and answers nothing that needs a leader. Nobody tells them; a
/// client that is not answered for [`LONELY_AFTER`] looks for another server. `answers` asks something that such a node cannot
/// answer; it can describe streams.
pub async fn leave_a_lonely_server<F>(client: Client, stop: CancellationToken, answers: impl Fn() -> F)
where
    F: Future<Output = bool>,
{
    let mut answered = tokio::time::Instant::now();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
        // A connection that is broken looks for another server by itself.
        let connected = client.connection_state() == async_nats::connection::State::Connected;
        if !connected || tokio::time::timeout(ASK_TIMEOUT, answers()).await == Ok(true) {
            answered = tokio::time::Instant::now();
        } else if answered.elapsed() >= LONELY_AFTER {
            warn!(seconds = LONELY_AFTER.as_secs(), "JetStream does not answer on this server; trying another one");
            if let Err(problem) = client.force_reconnect().await {
                debug!(%problem, "the connection cannot be made anew");
            }
            answered = tokio::time::Instant::now();
        }
    }
}

/// How long the last acknowledgements of a stopping process may take to leave.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Brings what was settled last onto the wire before the process goes, for at most [`FLUSH_TIMEOUT`].
pub async fn flush_last(client: &Client) {
    if !matches!(tokio::time::timeout(FLUSH_TIMEOUT, client.flush()).await, Ok(Ok(()))) {
        warn!("the last acknowledgements may be lost; their messages come back and are known");
    }
}

/// The addresses without any user or password.
fn plain(addresses: &[async_nats::ServerAddr]) -> String {
    let plain: Vec<_> = addresses.iter().map(|address| format!("{}:{}", address.host(), address.port())).collect();
    plain.join(", ")
}

fn options(name: &str, refused: watch::Sender<Option<String>>) -> ConnectOptions {
    ConnectOptions::new()
        .name(name)
        .subscription_capacity(SUBSCRIPTION_CAPACITY)
        .ping_interval(PING_EVERY)
        .max_reconnects(None)
        .reconnect_delay_callback(|attempts| {
            let steps = u32::try_from(attempts).unwrap_or(u32::MAX);
            Duration::from_millis(50).saturating_mul(steps).min(RECONNECT_PAUSE)
        })
        .event_callback(move |event| {
            let refused = refused.clone();
            async move {
                match event {
                    Event::Connected => info!("connected to NATS"),
                    Event::Closed => debug!("connection to NATS closed"),
                    Event::ServerError(ServerError::Other(refusal))
                        if refusal.to_lowercase().contains("permissions violation") =>
                    {
                        error!(refusal, "the NATS server does not allow it");
                        refused.send_replace(Some(refusal));
                    }
                    other => warn!(event = %other, "NATS connection"),
                }
            }
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a file of this mode in a folder of its own.
    fn file(content: &str, mode: u32) -> (PathBuf, impl Drop) {
        struct Remove(PathBuf);
        impl Drop for Remove {
            fn drop(&mut self) {
                let _ = std::fs::remove_file(&self.0);
            }
        }
        let unique = nkeys::KeyPair::new_user().public_key();
        let path = std::env::temp_dir().join(format!("lomash-nats-{unique}"));
        std::fs::write(&path, content).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("changed");
        (path.clone(), Remove(path))
    }

    #[test]
    fn a_seed_is_read_from_a_private_file_only() {
        let seed = nkeys::KeyPair::new_user().seed().expect("a new pair has its seed");
        for (content, mode, problem) in [
            (format!("{seed}\n"), 0o600, None),
            (format!("\n  {seed}  \nUPUBLIC\n"), 0o440, None),
            (seed.clone(), 0o644, Some("is open to everybody on this machine (mode 644)")),
            (seed.clone(), 0o602, Some("is open to everybody")),
            (String::new(), 0o600, Some("holds no seed")),
            ("SUANOTASEED".to_owned(), 0o600, Some("holds no seed")),
            (nkeys::KeyPair::new_account().seed().expect("its seed"), 0o600, Some("holds no seed of a user's NKey")),
            (seed.repeat(100), 0o600, Some("holds no seed")),
        ] {
            let (path, _remove) = file(&content, mode);
            match (read_seed(&path), problem) {
                (Ok(read), None) => assert_eq!(read, seed),
                (Err(error), Some(problem)) => {
                    let error = format!("{error:#}");
                    assert!(error.contains(problem) && error.contains("NATS_NKEY_FILE"), "{error}");
                    assert!(!error.contains(&seed), "the seed is in the error");
                }
                (read, problem) => panic!("{problem:?}, but {:?}", read.map(|_| "a seed")),
            }
        }
        let error = read_seed(Path::new("/nowhere/seed")).expect_err("there is none");
        assert!(error.to_string().starts_with("NATS_NKEY_FILE: /nowhere/seed cannot be read"), "{error}");
    }

    #[test]
    fn an_inbox_prefix_is_the_beginning_of_a_subject() {
        let of = |prefix: &str| Identity { nats_inbox_prefix: Some(prefix.to_owned()), ..Identity::default() };
        assert!(of("_INBOX_product").apply(ConnectOptions::new()).is_ok());
        for prefix in ["", "a b", "a.>", "a.", "*", ".a"] {
            assert!(of(prefix).apply(ConnectOptions::new()).is_err(), "{prefix:?}");
        }
    }
}
