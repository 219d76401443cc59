//! SMTP: one connection, driven command by command.
//!
//! lettre's transport with its pool is not used: a mail whose time is over leaves its connection in the pool in the middle of
//! an answer, and the next mail would take that answer for its own. Here whoever sends owns the connection, and drops it
//! after anything but success. Driving it ourselves also tells what failed: the server as a whole, this mail, or one of its
//! recipients.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use lettre::transport::smtp::Error;
use lettre::transport::smtp::authentication::{Credentials, DEFAULT_MECHANISMS};
use lettre::transport::smtp::client::{AsyncSmtpConnection, Certificate, CertificateStore, TlsParameters};
use lettre::transport::smtp::commands::{Data, Mail, Rcpt};
use lettre::transport::smtp::extension::ClientId;
use lomash_platform::Secret;
use percent_encoding::percent_decode_str;
use url::Url;

use crate::mail::Written;

/// How long the server may take to be connected to, greet, encrypt and authenticate.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// How long it may take to take a mail.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it may take to say goodbye.
const QUIT_TIMEOUT: Duration = Duration::from_secs(1);

const SMTP_PORT: u16 = 25;
const SUBMISSION_PORT: u16 = 587;
const SUBMISSIONS_PORT: u16 = 465;

/// Answers to a command about a mail that speak of the connection, not of the mail: service not available, and those about
/// authentication. Trying later may help.
const NOT_ABOUT_THE_MAIL: [u16; 5] = [421, 530, 534, 535, 538];

const _: () = assert!(SEND_TIMEOUT.as_secs() + CONNECT_TIMEOUT.as_secs() < crate::alerts::IDLE_LIMIT.as_secs());

/// How the connection is encrypted.
#[derive(Clone)]
enum Encryption {
    None,
    /// STARTTLS, or no mail.
    Required(TlsParameters),
    /// From the first byte.
    Implicit(TlsParameters),
}

/// Where the server is and how it is spoken to.
#[derive(Clone)]
pub struct Mailer {
    host: String,
    port: u16,
    encryption: Encryption,
    hello: ClientId,
    credentials: Option<Credentials>,
}

impl fmt::Debug for Mailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mailer({self})")
    }
}

impl fmt::Display for Mailer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// A connection that is ready for a mail.
pub struct Connection(AsyncSmtpConnection);

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connection")
    }
}

/// What became of a mail.
#[derive(Debug)]
pub enum Outcome {
    /// The server took it for at least one recipient; the others it refused for good.
    Accepted {
        /// Which ones and why.
        refused: Option<String>,
    },
    /// The server will never take it.
    Refused(String),
    /// Not now, or nobody knows whether it did.
    Deferred(String),
}

impl Mailer {
    /// Reads `SMTP_URL`: `smtp://host`, `smtp://user:password@host:port?tls=required` or `smtps://user:password@host`; a path
    /// is the name to greet with.
    ///
    /// # Errors
    /// A sentence that names the variable and shows no password.
    pub fn new(url: &Secret, ca_file: Option<&PathBuf>) -> anyhow::Result<Self> {
        // The parser's words could repeat the password.
        let url = Url::parse(url.expose()).map_err(|_| {
            anyhow::anyhow!("SMTP_URL is not a URL such as smtp://user:password@mail.example:587?tls=required")
        })?;
        let Some(host) = url.host_str().filter(|host| !host.is_empty()) else {
            bail!("SMTP_URL names no server; it looks like smtp://mail.example:587?tls=required");
        };
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let mut tls = None;
        for (name, value) in url.query_pairs() {
            match (&*name, &*value) {
                ("tls", "required") => tls = Some("required"),
                ("tls", "none") => tls = Some("none"),
                _ => bail!("SMTP_URL: the parameters known are tls=required and tls=none"),
            }
        }
        let (encryption, default_port) = match (url.scheme(), tls) {
            ("smtps", None | Some("required")) => (Encryption::Implicit(trusted(&host, ca_file)?), SUBMISSIONS_PORT),
            ("smtp", Some("required")) => (Encryption::Required(trusted(&host, ca_file)?), SUBMISSION_PORT),
            ("smtp", _) => (Encryption::None, SMTP_PORT),
            _ => bail!("SMTP_URL begins with smtp:// (with ?tls=required for STARTTLS) or smtps://"),
        };
        let decoded = |text: &str| percent_decode_str(text).decode_utf8().map(|text| text.into_owned());
        let credentials = match url.password() {
            None if url.username().is_empty() => None,
            None => bail!("SMTP_URL names a user and no password"),
            Some(_) if matches!(encryption, Encryption::None) && !is_loopback(&host) => {
                bail!("SMTP_URL would send the password in the clear; use smtps:// or ?tls=required")
            }
            Some(password) => {
                let wrong = "SMTP_URL: user and password are percent-encoded UTF-8";
                Some(Credentials::new(decoded(url.username()).context(wrong)?, decoded(password).context(wrong)?))
            }
        };
        let name = url.path().trim_matches('/');
        let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        let hello = match name {
            "" => ClientId::default(),
            name if is_name => ClientId::Domain(name.to_owned()),
            _ => bail!("SMTP_URL: its path is the name to greet with, a host name"),
        };
        let port = url.port().unwrap_or(default_port);
        Ok(Self { host, port, encryption, hello, credentials })
    }

    /// Connects, encrypts and authenticates.
    ///
    /// # Errors
    /// A sentence; it is about the server, not about any mail.
    pub async fn connect(&self) -> Result<Connection, String> {
        let connecting = async {
            let tls = match &self.encryption {
                Encryption::Implicit(tls) => Some(tls.clone()),
                Encryption::None | Encryption::Required(_) => None,
            };
            let server = (self.host.as_str(), self.port);
            let mut connection =
                AsyncSmtpConnection::connect_tokio1(server, Some(CONNECT_TIMEOUT), &self.hello, tls, None).await?;
            if let Encryption::Required(tls) = &self.encryption {
                connection.starttls(tls.clone(), &self.hello).await?;
            }
            if let Some(credentials) = &self.credentials {
                connection.auth(DEFAULT_MECHANISMS, credentials).await?;
            }
            Ok::<_, Error>(connection)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(Connection(connection)),
            Ok(Err(problem)) => Err(format!("the mail server {self} cannot be used: {problem}")),
            Err(_) => Err(format!("the mail server {self} is not ready after {} s", CONNECT_TIMEOUT.as_secs())),
        }
    }
}

impl Connection {
    /// Whether it still works.
    pub async fn is_alive(&mut self) -> bool {
        tokio::time::timeout(QUIT_TIMEOUT, self.0.test_connected()).await.unwrap_or(false)
    }

    /// Sends a mail. After anything but [`Outcome::Accepted`] the connection must not be used again.
    pub async fn send(&mut self, written: &Written) -> Outcome {
        match tokio::time::timeout(SEND_TIMEOUT, self.converse(written)).await {
            Ok(Ok(refused)) => Outcome::Accepted { refused },
            Ok(Err(outcome)) => outcome,
            Err(_) => {
                Outcome::Deferred(format!("the server did not take the mail within {} s", SEND_TIMEOUT.as_secs()))
            }
        }
    }

    async fn converse(&mut self, written: &Written) -> Result<Option<String>, Outcome> {
        let envelope = &written.envelope;
        self.0
            .command(Mail::new(envelope.from().cloned(), Vec::new()))
            .await
            .map_err(|error| judged("MAIL", &error))?;
        let mut refused = Vec::new();
        for recipient in envelope.to() {
            match self.0.command(Rcpt::new(recipient.clone(), Vec::new())).await {
                Ok(_) => {}
                Err(error) => match judged(recipient.as_ref(), &error) {
                    // One who has left must not keep the others from being told.
                    Outcome::Refused(problem) => refused.push(problem),
                    other => return Err(other),
                },
            }
        }
        let problem = (!refused.is_empty()).then(|| refused.join("; "));
        if refused.len() == envelope.to().len() {
            return Err(Outcome::Refused(problem.unwrap_or_default()));
        }
        self.0.command(Data).await.map_err(|error| judged("DATA", &error))?;
        self.0.command(Content(&written.text)).await.map_err(|error| judged("the mail", &error))?;
        Ok(problem)
    }

    /// Says goodbye.
    pub async fn quit(mut self) {
        // A server that does not answer is left.
        let _ = tokio::time::timeout(QUIT_TIMEOUT, self.0.quit()).await;
    }
}

/// A mail as it goes over the wire, its end included. Sent as one command and so in one piece: lettre writes the end by itself,
/// and that waits for the acknowledgement of what went before, 40 ms on most systems (Nagle's algorithm).
struct Content<'m>(&'m str);

impl fmt::Display for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A line that begins with a dot gets another one, or it could be taken for the end.
        for line in self.0.split_inclusive("\r\n") {
            let dot = if line.starts_with('.') { "." } else { "" };
            write!(f, "{dot}{line}")?;
        }
        f.write_str(if self.0.ends_with("\r\n") { ".\r\n" } else { "\r\n.\r\n" })
    }
}

fn judged(what: &str, error: &Error) -> Outcome {
    let problem = format!("{what}: {error}");
    let code = error.status().map(u16::from);
    let is_about_the_mail = code.is_some_and(|code| !NOT_ABOUT_THE_MAIL.contains(&code));
    if error.is_permanent() && is_about_the_mail { Outcome::Refused(problem) } else { Outcome::Deferred(problem) }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Whom to trust: the system's authorities or, when there is a file, those in it and nobody else.
fn trusted(host: &str, ca_file: Option<&PathBuf>) -> anyhow::Result<TlsParameters> {
    let mut builder = TlsParameters::builder(host.to_owned());
    if let Some(path) = ca_file {
        let pem = std::fs::read(path).with_context(|| format!("SMTP_CA_FILE: {} cannot be read", path.display()))?;
        let certificate = Certificate::from_pem(&pem)
            .with_context(|| format!("SMTP_CA_FILE: {} holds no certificate in PEM", path.display()))?;
        builder = builder.certificate_store(CertificateStore::None).add_root_certificate(certificate);
    }
    builder.build().context("TLS for SMTP cannot be set up")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mailer(url: &str) -> anyhow::Result<Mailer> {
        Mailer::new(&Secret::from(url.to_owned()), None)
    }

    #[test]
    fn urls_are_read_as_they_are_documented() {
        for (url, shown) in [
            ("smtp://127.0.0.1", "127.0.0.1:25"),
            ("smtp://mail.example:2525", "mail.example:2525"),
            ("smtp://mail.example?tls=required", "mail.example:587"),
            ("smtps://us%40er:p%2Fw@mail.example/shop.example", "mail.example:465"),
            ("smtp://u:p@localhost:2525", "localhost:2525"),
            ("smtp://[::1]:2525", "::1:2525"),
        ] {
            assert_eq!(mailer(url).expect(url).to_string(), shown);
        }
    }

    #[test]
    fn no_line_of_a_mail_is_taken_for_its_end() {
        for (text, wire) in
            [("a\r\n", "a\r\n.\r\n"), ("a", "a\r\n.\r\n"), (".\r\nx\r\n.\r\n..y\r\n", "..\r\nx\r\n..\r\n...y\r\n.\r\n")]
        {
            assert_eq!(Content(text).to_string(), wire);
        }
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for url in [
            "hunter2",
            "http://user:hunter2@mail.example",
            "smtp://user:hunter2@mail.example",
            "smtp://user:hunter2@mail.example?tls=maybe",
            "smtp://hunter2@mail.example?tls=required",
            "smtps://user:hunter2@mail.example/a b",
            "smtps://user:hunter2@",
            "smtp:///hunter2",
        ] {
            let problem = format!("{:#}", mailer(url).expect_err(url));
            assert!(problem.contains("SMTP_URL") && !problem.contains("hunter2"), "{url}: {problem}");
        }
        let shown = format!("{:?}", mailer("smtps://user:hunter2@mail.example").expect("read"));
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
