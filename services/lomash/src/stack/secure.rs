//! Secured NATS servers as children: `deploy/nats/secure.conf` and `cluster.conf` with keys and certificates of their own.
//!
//! Owns making the keys and certificates of a folder, once, and the variables that the shipped
//! configuration takes from the environment. Everything lies in that folder, for its owner only, and is for this machine: the certificates are
//! made for the loopback address. In production keys come from where the platform keeps its secrets.

use std::{
    collections::BTreeMap,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lomash_platform::nats::Identity;
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{FolderLock, Kind, Server, nats, port::free_port, programs};
use crate::token::write_private;

/// The shipped files; a node has a copy of each, because the server includes by relative paths only.
const SHIPPED: [(&str, &str); 3] = [
    ("accounts.conf", include_str!("../../../../deploy/nats/accounts.conf")),
    ("secure.conf", include_str!("../../../../deploy/nats/secure.conf")),
    ("cluster.conf", include_str!("../../../../deploy/nats/cluster.conf")),
];
/// The variables of a node, one a line, and which of the shipped files it is started with.
const NODE_FILE: &str = "node.json";
/// The variable with its monitoring address.
const MONITOR_VARIABLE: &str = "NATS_MONITOR";
/// The server's name: the copies of streams are assigned to it, so it must stay the same.
const NAME_FILE: &str = "name";
/// How long certificates are valid: longer than a laptop's cluster is kept.
const LIFETIME: Duration = Duration::from_secs(366 * 24 * 3600);
/// What `nats-server --signal ldm` sends, and how long the node may take: it gives its clients 10 s by itself, and then sends
/// one away each second.
const LAME_DUCK_SIGNAL: Signal = Signal::SIGUSR2;
const LAME_DUCK_TIMEOUT: Duration = Duration::from_secs(60);
/// Clocks of two machines differ.
const BACKDATED: Duration = Duration::from_secs(3600);

/// Who may connect: the identities of `deploy/nats/accounts.conf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Who {
    /// The product service.
    Product,
    /// Who makes and changes streams.
    Administrator,
    /// A service that publishes orders.
    Orders,
    /// The analytics service.
    Analytics,
    /// The notification service.
    Notification,
    /// Who looks, reads and replays.
    Operator,
    /// The servers' own account.
    System,
}

impl Who {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Product,
        Self::Administrator,
        Self::Orders,
        Self::Analytics,
        Self::Notification,
        Self::Operator,
        Self::System,
    ];

    /// The name in files, variables and inboxes.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Product => "product",
            Self::Administrator => "administrator",
            Self::Orders => "orders",
            Self::Analytics => "analytics",
            Self::Notification => "notification",
            Self::Operator => "operator",
            Self::System => "system",
        }
    }
}

/// The keys and certificates of one installation, in a folder of its own.
#[derive(Clone, Debug)]
pub struct Credentials {
    folder: PathBuf,
}

impl Credentials {
    /// Those in `folder`; made on the first call.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn open(folder: &Path) -> Result<Self> {
        super::private_folder(folder)?;
        let credentials = Self { folder: folder.to_owned() };
        for who in Who::ALL {
            let file = credentials.seed_file(who);
            if !file.exists() {
                let seed = nkeys::KeyPair::new_user().seed().context("an NKey could not be made")?;
                write_private(&file, &format!("{seed}\n"))?;
            }
        }
        if !credentials.ca_file().exists() {
            credentials.make_authority()?;
        }
        Ok(credentials)
    }

    /// The file with an identity's seed.
    #[must_use]
    pub fn seed_file(&self, who: Who) -> PathBuf {
        self.folder.join(format!("{}.nk", who.name()))
    }

    /// The certificate of the authority that signs all others.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// The settings by which a program is this identity.
    #[must_use]
    pub fn identity(&self, who: Who) -> Identity {
        Identity {
            nats_nkey_file: Some(self.seed_file(who)),
            nats_ca_file: Some(self.ca_file()),
            nats_inbox_prefix: Some(format!("_INBOX_{}", who.name())),
            ..Identity::default()
        }
    }

    /// The same as environment variables.
    #[must_use]
    pub fn variables(&self, who: Who) -> Vec<(&'static str, String)> {
        vec![
            ("NATS_NKEY_FILE", self.seed_file(who).display().to_string()),
            ("NATS_CA_FILE", self.ca_file().display().to_string()),
            ("NATS_INBOX_PREFIX", format!("_INBOX_{}", who.name())),
        ]
    }

    /// The public half of an identity's key, as the servers' configuration has it.
    ///
    /// # Errors
    /// When its seed cannot be read.
    pub fn public_key(&self, who: Who) -> Result<String> {
        let file = self.seed_file(who);
        let seed = fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
        let pair =
            nkeys::KeyPair::from_seed(seed.trim()).ok().with_context(|| format!("{} is no seed", file.display()))?;
        Ok(pair.public_key())
    }

    fn make_authority(&self) -> Result<()> {
        let key = KeyPair::generate().context("a key could not be made")?;
        let certificate = authority()?.self_signed(&key).context("the authority could not be signed")?;
        // The key first: a certificate without one would be taken for a complete authority.
        write_private(&self.folder.join("ca-key.pem"), &key.serialize_pem())?;
        write_private(&self.ca_file(), &certificate.pem())
    }

    /// A certificate for a node on the loopback address, valid until `until`, in files named after it.
    ///
    /// # Errors
    /// When the authority cannot be read or the files not written.
    pub fn certify(&self, name: &str, until: OffsetDateTime) -> Result<(PathBuf, PathBuf)> {
        let file = self.folder.join("ca-key.pem");
        let pem = fs::read_to_string(&file).with_context(|| format!("could not read {}", file.display()))?;
        let authority_key = KeyPair::from_pem(&pem).with_context(|| format!("{} is no key", file.display()))?;
        // Its name and its key are all that a signature takes of the authority; both are the same each time.
        let issuer = Issuer::new(authority()?, authority_key);
        let key = KeyPair::generate().context("a key could not be made")?;
        let mut node = params(&["127.0.0.1", "localhost"], until)?;
        node.distinguished_name = DistinguishedName::new();
        node.distinguished_name.push(DnType::CommonName, name);
        node.use_authority_key_identifier_extension = true;
        // A node is the server of its clients, and both ends of its routes.
        node.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = node.signed_by(&key, &issuer).context("a certificate could not be signed")?;
        let (certificate_file, key_file) =
            (self.folder.join(format!("{name}.pem")), self.folder.join(format!("{name}-key.pem")));
        write_private(&certificate_file, &certificate.pem())?;
        write_private(&key_file, &key.serialize_pem())?;
        Ok((certificate_file, key_file))
    }
}

fn authority() -> Result<CertificateParams> {
    let mut authority = params(&[], OffsetDateTime::now_utc() + LIFETIME)?;
    authority.distinguished_name = DistinguishedName::new();
    authority.distinguished_name.push(DnType::CommonName, "Lomash authority of this machine");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(authority)
}

fn params(names: &[&str], until: OffsetDateTime) -> Result<CertificateParams> {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).context("a certificate's names are not valid")?;
    params.not_before = OffsetDateTime::now_utc() - BACKDATED;
    if until < params.not_before {
        params.not_before = until - BACKDATED;
    }
    params.not_after = until;
    Ok(params)
}

/// What a node is started with.
#[derive(Debug, Serialize, Deserialize)]
struct Node {
    /// Which of the shipped files.
    config: String,
    /// What that file takes from the environment.
    variables: BTreeMap<String, String>,
}

/// How a node reaches the others.
#[derive(Clone, Debug)]
pub struct Routes {
    /// The port where the others connect.
    pub listen: u16,
    /// The port under which it is told to them: another one when something stands between.
    pub advertise: u16,
    /// Where this node finds the others.
    pub others: Vec<u16>,
}

/// A NATS server with identities and TLS: one by itself, or a node of a cluster.
pub type SecureNats = Server<SecureNatsServer>;

/// What starts one.
#[derive(Debug)]
pub struct SecureNatsServer {
    program: PathBuf,
    dir: PathBuf,
    name: String,
    node: Node,
}

/// Lays out a server in `dir`: its certificate, valid until then, and its configuration. [`SecureNats::start`] on the
/// same folder then starts it.
///
/// # Errors
/// When the folder cannot be written.
pub fn lay_out(
    dir: &Path,
    name: &str,
    credentials: &Credentials,
    routes: Option<&Routes>,
    until: Option<OffsetDateTime>,
) -> Result<()> {
    super::private_folder(dir)?;
    let until = until.unwrap_or_else(|| OffsetDateTime::now_utc() + LIFETIME);
    let (certificate, key) = credentials.certify(name, until)?;
    let name_file = dir.join(NAME_FILE);
    // Unique, so that a probe can tell it from a stranger; kept, for the copies of streams are assigned to it.
    if !name_file.exists() {
        write_private(&name_file, &format!("{name}-{}", &uuid::Uuid::new_v4().simple().to_string()[..12]))?;
    }
    let mut node = Node {
        config: "secure.conf".to_owned(),
        variables: BTreeMap::from([
            // Address and port are given as flags, which win.
            ("NATS_LISTEN".to_owned(), quoted("127.0.0.1:4222")?),
            (MONITOR_VARIABLE.to_owned(), quoted(&format!("127.0.0.1:{}", free_port()?))?),
            ("NATS_STORE".to_owned(), quoted(path(&dir.join("data"))?)?),
            ("NATS_CERT".to_owned(), quoted(path(&certificate)?)?),
            ("NATS_KEY".to_owned(), quoted(path(&key)?)?),
            ("NATS_CA".to_owned(), quoted(path(&credentials.ca_file())?)?),
        ]),
    };
    for who in Who::ALL {
        node.variables.insert(format!("NKEY_{}", who.name().to_uppercase()), quoted(&credentials.public_key(who)?)?);
    }
    if let Some(Routes { listen, advertise, others }) = routes {
        let others: Vec<String> = others.iter().map(|port| format!("nats-route://127.0.0.1:{port}")).collect();
        let others = serde_json::to_string(&others).context("the routes cannot be written")?;
        node.config = "cluster.conf".to_owned();
        node.variables.extend([
            ("CLUSTER_LISTEN".to_owned(), quoted(&format!("127.0.0.1:{listen}"))?),
            ("CLUSTER_ADVERTISE".to_owned(), quoted(&format!("127.0.0.1:{advertise}"))?),
            ("CLUSTER_ROUTES".to_owned(), others),
        ]);
    }
    for (file, text) in SHIPPED {
        write_private(&dir.join(file), text)?;
    }
    let text = serde_json::to_string_pretty(&node).context("the node cannot be written")?;
    write_private(&dir.join(NODE_FILE), &text)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8, as NATS needs it", path.display()))
}

/// A JSON string is read as one by NATS, escapes included.
fn quoted(text: &str) -> Result<String> {
    serde_json::to_string(text).context("a value of the configuration cannot be quoted")
}

impl Kind for SecureNatsServer {
    const NAME: &'static str = "nats";
    const DEATH_SIGNAL: Signal = nats::NatsServer::DEATH_SIGNAL;
    const STOP_SIGNAL: Signal = nats::NatsServer::STOP_SIGNAL;
    const DROP_SIGNAL: Option<Signal> = nats::NatsServer::DROP_SIGNAL;
    const START_TIMEOUT: Duration = nats::NatsServer::START_TIMEOUT;
    const STOP_TIMEOUT: Duration = nats::NatsServer::STOP_TIMEOUT;

    async fn prepare(dir: &Path, _lock: &FolderLock) -> Result<Self> {
        let program = programs::nats_server().await?;
        let laid_out = || format!("{} was not laid out for a server", dir.display());
        let name = fs::read_to_string(dir.join(NAME_FILE)).with_context(laid_out)?;
        let node = fs::read_to_string(dir.join(NODE_FILE)).with_context(laid_out)?;
        let node = serde_json::from_str(&node).with_context(laid_out)?;
        Ok(Self { program, dir: dir.to_owned(), name, node })
    }

    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["--addr", "127.0.0.1", "--port", &port.to_string(), "--name", &self.name])
            .arg("--config")
            .arg(self.dir.join(&self.node.config))
            .envs(&self.node.variables);
        command
    }

    async fn probe(&self, port: u16, _pid: u32) -> Result<()> {
        nats::greets(port, &self.name).await
    }

    fn url(&self, port: u16) -> String {
        format!("tls://{}:{port}", Ipv4Addr::LOCALHOST)
    }
}

impl SecureNats {
    /// The name by which the other nodes and the streams' leaders call it.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.kind().name
    }

    /// Where it tells of itself.
    #[must_use]
    pub fn monitor_url(&self) -> String {
        let address = self.kind().node.variables.get(MONITOR_VARIABLE).map(String::as_str).unwrap_or_default();
        format!("http://{}", address.trim_matches('"'))
    }

    /// Ends it as an operator does before an upgrade, in lame duck mode: its leaders move to the other nodes and its clients are
    /// sent there before it ends.
    ///
    /// # Errors
    /// When it did not end in order; it is gone all the same.
    pub async fn retire(&mut self) -> Result<()> {
        self.stop_by(LAME_DUCK_SIGNAL, LAME_DUCK_TIMEOUT).await
    }
}

/// Three nodes that hold every stream three times.
// Fields are dropped from the first to the last.
#[derive(Debug)]
pub struct NatsCluster {
    /// The nodes.
    pub nodes: Vec<SecureNats>,
    /// Their keys and certificates.
    pub credentials: Credentials,
}

/// Nodes of a cluster: the fewest of which one may die.
pub const NODES: usize = 3;

impl NatsCluster {
    /// Starts three nodes with their data, keys and certificates under `dir`, and waits until each takes connections.
    ///
    /// # Errors
    /// When one does not start.
    pub async fn start(dir: &Path) -> Result<Self> {
        let listen = [free_port()?, free_port()?, free_port()?];
        let others =
            |node: usize| listen.iter().enumerate().filter(|(n, _)| *n != node).map(|(_, port)| *port).collect();
        let routes = |node: usize| Routes { listen: listen[node], advertise: listen[node], others: others(node) };
        Self::start_with(dir, [routes(0), routes(1), routes(2)]).await
    }

    /// The same over routes of the caller's: a test puts something between the nodes.
    ///
    /// # Errors
    /// As for [`NatsCluster::start`].
    pub async fn start_with(dir: &Path, routes: [Routes; NODES]) -> Result<Self> {
        super::private_folder(dir)?;
        let dir = dir.canonicalize().with_context(|| format!("could not resolve {}", dir.display()))?;
        let credentials = Credentials::open(&dir.join("keys"))?;
        let mut folders = Vec::new();
        for (number, routes) in routes.iter().enumerate() {
            let name = format!("n{}", number + 1);
            let folder = dir.join(&name);
            lay_out(&folder, &name, &credentials, Some(routes), None)?;
            folders.push(folder);
        }
        let starting = folders.iter().map(|folder| SecureNats::start(folder));
        let nodes = futures::future::try_join_all(starting).await?;
        Ok(Self { nodes, credentials })
    }

    /// Where clients find the nodes.
    #[must_use]
    pub fn url(&self) -> String {
        let urls: Vec<String> = self.nodes.iter().map(Server::url).collect();
        urls.join(",")
    }

    /// The node of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn node(&mut self, name: &str) -> Result<&mut SecureNats> {
        match self.nodes.iter_mut().find(|node| node.kind().name == name) {
            Some(node) => Ok(node),
            None => bail!("{name} is no node of this cluster"),
        }
    }
}
