//! `lomash mail-sink`: an SMTP server that keeps what it is sent as files, for `lomash up`, the demo and the tests.
//!
//! Speaks SMTP by the library `mailin`, which knows nothing of sockets: this file owns connections, TLS and files. Offers
//! STARTTLS always, with a certificate of its own that `tls/ca.pem` vouches for. A mail is a file as soon as it is accepted,
//! never half of one. Delivers nothing anywhere.
//!
//! A file `behaviour.json` beside the mails makes it misbehave ([`Behaviour`]); it is read anew for every mail.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use lomash_platform::Secret;
use mailin::{Action, AuthMechanism, Handler, Response, Session, SessionBuilder, response};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use crate::token::write_private;

/// Connections at once; more wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 256;
/// Largest mail.
const MAX_MAIL_BYTES: usize = 1024 * 1024;
/// Longest line; SMTP allows 1,000 bytes.
const MAX_LINE_BYTES: u64 = 8 * 1024;
/// Most recipients of a mail.
const MAX_RECIPIENTS: usize = 100;
/// How long a client may say nothing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a TLS handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The file that makes it misbehave.
pub const BEHAVIOUR_FILE: &str = "behaviour.json";
/// The folder with certificate and key, beside the mails.
pub const TLS_DIR: &str = "tls";
/// In it, whom a client must trust.
pub const CA_FILE: &str = "ca.pem";

/// Keep mails as files instead of delivering them.
#[derive(Clone, Debug, Args)]
pub struct MailSinkArgs {
    /// Where to listen.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    /// Folder for the mails.
    #[arg(long)]
    pub dir: PathBuf,
    /// Name to greet with.
    #[arg(long, default_value = "lomash-mail-sink")]
    pub name: String,
    /// When connections are encrypted.
    #[arg(long, value_enum, default_value_t)]
    pub tls: Tls,
    /// Take mails only from this user, with the password in MAIL_SINK_PASSWORD.
    #[arg(long, requires = "password")]
    pub user: Option<String>,
    /// See `--user`.
    #[arg(long, env = "MAIL_SINK_PASSWORD", hide_env_values = true)]
    pub password: Option<Secret>,
}

/// When connections are encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Tls {
    /// When the client asks for it.
    #[default]
    Starttls,
    /// From the first byte.
    Implicit,
}

/// How it misbehaves, for tests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Behaviour {
    /// Only towards mails that contain this; towards all when it is empty.
    pub matching: String,
    /// Does not take them, with this code and text.
    pub refuse: Option<(u16, String)>,
    /// Does not take any mail for this recipient, with code 550.
    pub unknown_recipient: Option<String>,
    /// Takes them and closes the connection without saying so.
    pub drop_after_data: bool,
    /// Milliseconds before it says that it has taken them; it has.
    pub delay_ms: u64,
}

impl Behaviour {
    fn read(dir: &Path) -> Self {
        let text = std::fs::read(dir.join(BEHAVIOUR_FILE)).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Behaves so from the next mail on, or well again.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn set(dir: &Path, behaviour: Option<&Self>) -> Result<()> {
        let (path, new) = (dir.join(BEHAVIOUR_FILE), dir.join("behaviour.new"));
        match behaviour {
            Some(behaviour) => {
                std::fs::write(&new, serde_json::to_vec(behaviour)?).context("the behaviour cannot be written")?;
                std::fs::rename(&new, &path).context("the behaviour cannot be put in place")
            }
            None if path.exists() => std::fs::remove_file(&path).context("the behaviour cannot be removed"),
            None => Ok(()),
        }
    }
}

/// Runs the command until it is killed.
///
/// # Errors
/// When it cannot listen, or has no place for mails.
pub async fn run(args: MailSinkArgs) -> Result<()> {
    let stop = lomash_platform::shutdown::token().context("could not listen for signals")?;
    // Whatever somebody is told is for them.
    crate::stack::private_folder(&args.dir)?;
    let acceptor = acceptor(&args.dir.join(TLS_DIR))?;
    let listener =
        TcpListener::bind(args.listen).await.with_context(|| format!("could not listen on {}", args.listen))?;
    let sink = Arc::new(Sink { args, acceptor, taken: AtomicU64::new(0) });
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await?;
            anyhow::Ok((place, listener.accept().await?))
        };
        let accepted = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = next => accepted,
        };
        let Ok((place, (stream, peer))) = accepted else { continue };
        let sink = sink.clone();
        tokio::spawn(async move {
            if let Err(problem) = sink.serve(stream, peer.ip()).await {
                debug!(%peer, %problem, "the connection ended");
            }
            drop(place);
        });
    }
}

#[derive(Debug)]
struct Sink {
    args: MailSinkArgs,
    acceptor: Acceptor,
    taken: AtomicU64,
}

/// [`TlsAcceptor`] does not show itself.
struct Acceptor(TlsAcceptor);

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Acceptor")
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Sink {
    async fn serve(self: &Arc<Self>, stream: TcpStream, peer: IpAddr) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut builder = SessionBuilder::new(&self.args.name);
        if self.args.tls == Tls::Starttls {
            builder.enable_start_tls();
        }
        if self.args.user.is_some() {
            builder.enable_auth(AuthMechanism::Plain).enable_auth(AuthMechanism::Login);
        }
        let after = Arc::<Mutex<After>>::default();
        let mailbox = Mailbox { sink: self.clone(), after: after.clone(), mail: Incoming::default() };
        let mut session = builder.build(peer, mailbox);
        let greeting = session.greeting().buffer()?;
        if self.args.tls == Tls::Implicit {
            let mut stream = self.encrypted(stream).await?;
            session.tls_active();
            stream.write_all(&greeting).await?;
            return talk(BufReader::new(stream), &mut session, &after).await.map(|_| ());
        }
        let mut stream = stream;
        stream.write_all(&greeting).await?;
        let Some(stream) = talk(BufReader::new(stream), &mut session, &after).await? else { return Ok(()) };
        // What the client sent in the clear behind STARTTLS must not be taken for what it says under encryption.
        anyhow::ensure!(stream.buffer().is_empty(), "the client did not wait for the answer to STARTTLS");
        let stream = self.encrypted(stream.into_inner()).await?;
        session.tls_active();
        talk(BufReader::new(stream), &mut session, &after).await.map(|_| ())
    }

    async fn encrypted(&self, stream: TcpStream) -> Result<impl Stream + use<>> {
        Ok(tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.0.accept(stream)).await??)
    }

    /// Makes a file of a mail, at once and whole.
    fn keep(&self, mail: &Incoming) -> io::Result<()> {
        let number = self.taken.fetch_add(1, Ordering::Relaxed);
        let millis = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        // In the order in which they came; the process makes names of another start differ.
        let name = format!("{millis:013}-{number:06}-{}", std::process::id());
        let mut text = format!("Return-Path: <{}>\r\n", mail.from).into_bytes();
        for recipient in &mail.to {
            text.extend_from_slice(format!("Delivered-To: {recipient}\r\n").as_bytes());
        }
        text.extend_from_slice(&mail.data);
        let unfinished = self.args.dir.join(format!(".{name}"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
        file.write_all(&text)?;
        std::fs::rename(&unfinished, self.args.dir.join(format!("{name}.eml")))
    }
}

/// Talks until the end; gives the stream back when the client asks for encryption.
async fn talk<S: Stream>(
    mut stream: BufReader<S>,
    session: &mut Session<Mailbox>,
    after: &Mutex<After>,
) -> Result<Option<BufReader<S>>> {
    let mut line = Vec::new();
    loop {
        line.clear();
        let mut bounded = (&mut stream).take(MAX_LINE_BYTES);
        let read = tokio::time::timeout(IDLE_TIMEOUT, bounded.read_until(b'\n', &mut line)).await??;
        if read == 0 {
            return Ok(None);
        }
        anyhow::ensure!(line.ends_with(b"\n"), "a line is too long");
        let answer = session.process(&line);
        let after = std::mem::take(&mut *after.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(pause) = after.pause {
            tokio::time::sleep(pause).await;
        }
        if after.hang_up {
            return Ok(None);
        }
        if answer.action != Action::NoReply {
            stream.write_all(&answer.buffer()?).await?;
        }
        // The library stays in the middle of a mail that was refused at its end.
        let is_over = answer.action == Action::Close || (answer.is_error && line == b".\r\n");
        if is_over {
            stream.shutdown().await?;
            return Ok(None);
        }
        if answer.action == Action::UpgradeTls {
            stream.flush().await?;
            return Ok(Some(stream));
        }
    }
}

/// What the library's handler, which can only answer, wants done besides.
#[derive(Debug, Default)]
struct After {
    pause: Option<Duration>,
    hang_up: bool,
}

/// A mail that is coming in.
#[derive(Debug, Default)]
struct Incoming {
    from: String,
    to: Vec<String>,
    data: Vec<u8>,
    is_too_large: bool,
}

struct Mailbox {
    sink: Arc<Sink>,
    after: Arc<Mutex<After>>,
    mail: Incoming,
}

impl Mailbox {
    fn knows(&self, user: &str, password: &str) -> Response {
        let args = &self.sink.args;
        let is_known = args.user.as_deref() == Some(user)
            && args.password.as_ref().is_some_and(|expected| expected.expose() == password);
        if is_known { response::AUTH_OK } else { response::INVALID_CREDENTIALS }
    }
}

impl Handler for Mailbox {
    fn mail(&mut self, _: IpAddr, _: &str, from: &str) -> Response {
        self.mail = Incoming { from: from.to_owned(), ..Incoming::default() };
        response::OK
    }

    fn rcpt(&mut self, to: &str) -> Response {
        if Behaviour::read(&self.sink.args.dir).unknown_recipient.as_deref() == Some(to) {
            return response::NO_MAILBOX;
        }
        if self.mail.to.len() >= MAX_RECIPIENTS {
            return Response::custom(452, "Too many recipients".to_owned());
        }
        self.mail.to.push(to.to_owned());
        response::OK
    }

    fn data(&mut self, line: &[u8]) -> io::Result<()> {
        if self.mail.data.len() + line.len() > MAX_MAIL_BYTES {
            self.mail.is_too_large = true;
        } else {
            self.mail.data.extend_from_slice(line);
        }
        Ok(())
    }

    fn data_end(&mut self) -> Response {
        let mail = std::mem::take(&mut self.mail);
        if mail.is_too_large {
            return response::NO_STORAGE;
        }
        let behaviour = Behaviour::read(&self.sink.args.dir);
        let matches = behaviour.matching.is_empty()
            || mail.data.windows(behaviour.matching.len()).any(|part| part == behaviour.matching.as_bytes());
        if let (true, Some((code, text))) = (matches, behaviour.refuse) {
            return Response::custom(code, text);
        }
        if let Err(problem) = self.sink.keep(&mail) {
            return Response::custom(451, format!("The mail cannot be kept: {}", problem.kind()));
        }
        if matches {
            let pause = (behaviour.delay_ms > 0).then(|| Duration::from_millis(behaviour.delay_ms));
            let hang_up = behaviour.drop_after_data;
            *self.after.lock().unwrap_or_else(PoisonError::into_inner) = After { pause, hang_up };
        }
        response::OK
    }

    fn auth_plain(&mut self, _: &str, user: &str, password: &str) -> Response {
        self.knows(user, password)
    }

    fn auth_login(&mut self, user: &str, password: &str) -> Response {
        self.knows(user, password)
    }
}

/// TLS with the certificate in `dir`, which is made when there is none.
fn acceptor(dir: &Path) -> Result<Acceptor> {
    let (ca, certificate, key) = (dir.join(CA_FILE), dir.join("certificate.pem"), dir.join("key.pem"));
    if !key.is_file() {
        crate::stack::private_folder(dir)?;
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.distinguished_name.push(DnType::CommonName, "Lomash mail sink");
        let authority_key = KeyPair::generate()?;
        let made = authority.self_signed(&authority_key)?;
        let issuer = Issuer::new(authority, authority_key);
        let own_key = KeyPair::generate()?;
        let own = CertificateParams::new(vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
        let own = own.signed_by(&own_key, &issuer)?;
        write_private(&ca, &made.pem())?;
        write_private(&certificate, &own.pem())?;
        // Last: with it, all of it is there.
        write_private(&key, &own_key.serialize_pem())?;
    }
    let chain = vec![CertificateDer::from_pem_file(&certificate).context("the certificate cannot be read")?];
    let key = PrivateKeyDer::from_pem_file(&key).context("the key cannot be read")?;
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?;
    Ok(Acceptor(TlsAcceptor::from(Arc::new(config))))
}
