//! PostgreSQL: a cluster of its own, with one user and a random password, on loopback TCP only.
//!
//! Postgres refuses to run as root. Started by root it runs as the user `postgres`, or `nobody` where there is
//! none. Such a user often cannot enter the folder that the data belongs in (a clone under a private home): the
//! data is then kept in a private folder under /var/tmp, and a link in its place says where.
//!
//! Durability is left as it is by default (`fsync` on): what is measured on this server is the real thing.

use std::{
    fs::{self, DirBuilder, OpenOptions, Permissions},
    io::{self, Write},
    net::Ipv4Addr,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, User, geteuid},
};
use sha2::{Digest, Sha256};
use tokio_postgres::{Client, NoTls, error::SqlState};

use super::{FolderLock, Kind, Process, Server, log_tail, programs};

/// The user, and the name of the database.
const NAME: &str = "lomash";
/// Where data is kept that cannot be kept in its place: survives a reboot, unlike /tmp.
const PRIVATE_FOLDERS: &str = "/var/tmp";
/// The beginning of the name of each such folder.
const PRIVATE_PREFIX: &str = "lomash-postgres-";
/// Creating a cluster takes a second or two; a slow disk may take a while to sync it.
const INITDB_TIMEOUT: Duration = Duration::from_secs(120);

/// Room for the log between two checkpoints. Rows of movements and decisions are indexed by random ids, so nearly each of them changes
/// another page of an index, which goes into the log as a whole the first time after a checkpoint. With the 1 GB that
/// is the default one checkpoint follows the other under load, and most rows pay that.
const MAX_WAL_SIZE: &str = "max_wal_size=8GB";

/// What starts postgres.
#[derive(Debug)]
pub struct PostgresServer {
    bin: PathBuf,
    data: PathBuf,
    account: Option<Account>,
    password: String,
    elsewhere: bool,
}

/// The user a server of root's runs as.
#[derive(Debug, Clone, Copy)]
struct Account {
    uid: u32,
    gid: u32,
}

impl Kind for PostgresServer {
    const NAME: &'static str = "postgres";
    /// Immediate shutdown: it takes its own children and shared memory with it, and recovers at the next start.
    const DEATH_SIGNAL: Signal = Signal::SIGQUIT;
    /// Fast shutdown: open transactions are rolled back, nobody is waited for.
    const STOP_SIGNAL: Signal = Signal::SIGINT;
    const DROP_SIGNAL: Option<Signal> = Some(Signal::SIGQUIT);
    /// Recovery after a kill replays the log since the last checkpoint.
    const START_TIMEOUT: Duration = Duration::from_secs(60);
    const STOP_TIMEOUT: Duration = Duration::from_secs(30);

    async fn prepare(dir: &Path, lock: &FolderLock) -> Result<Self> {
        let account = account_for(dir)?;
        let base = base_folder(dir, account)?;
        let data = base.join("data");
        let made_by = fs::read_to_string(data.join("PG_VERSION")).ok();
        let major = made_by.as_deref().and_then(|version| version.trim().parse().ok());
        let bin = programs::postgres_bin(major).await?;
        let password = password(dir, made_by.is_some())?;
        let server = Self { bin, data, account, password, elsewhere: base != dir };
        if made_by.is_none() {
            server.create_cluster(dir, &base, lock).await?;
        }
        Ok(server)
    }

    fn command(&self, port: u16) -> Command {
        let mut command = self.program("postgres");
        command
            .arg("-D")
            .arg(&self.data)
            .args(["-p", &port.to_string()])
            .args(["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="])
            .args(["-c", "logging_collector=off", "-c", "log_destination=stderr"])
            .args(["-c", "cluster_name=lomash"])
            .args(["-c", MAX_WAL_SIZE]);
        command
    }

    async fn probe(&self, port: u16, _pid: u32) -> Result<()> {
        // Only our server knows our password, and it proves it: the login is mutual (SCRAM).
        match self.connect(port, NAME).await {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {
                let admin = self.connect(port, "postgres").await?;
                admin.batch_execute(&format!("CREATE DATABASE {NAME}")).await?;
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn url(&self, port: u16) -> String {
        self.database_url(port, NAME)
    }

    fn note(&self) -> Option<String> {
        self.elsewhere.then(|| {
            format!(
                "its data is in {}, for it does not run as root and its user cannot enter the data folder's path",
                self.data.display()
            )
        })
    }

    /// Every backend leads a session of its own, out of reach of a signal to the group.
    fn strays(pid: u32) -> Vec<Pid> {
        let parent_of = |pid: i32| -> Option<u32> {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in parentheses may hold anything; after it come the state and the parent.
            stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
        };
        let processes = fs::read_dir("/proc").into_iter().flatten();
        processes
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|candidate| parent_of(*candidate) == Some(pid))
            .map(Pid::from_raw)
            .collect()
    }
}

impl Server<PostgresServer> {
    /// Creates an empty database beside `lomash` and gives its URL: one server then serves many tests.
    pub async fn create_database(&self, name: &str) -> Result<String> {
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_') {
            bail!("a database is named with a-z, 0-9 and _ here, not {name:?}");
        }
        let admin = self.kind().connect(self.port(), "postgres").await.context("could not log in to postgres")?;
        admin
            .batch_execute(&format!("CREATE DATABASE \"{name}\""))
            .await
            .with_context(|| format!("could not create the database {name}"))?;
        Ok(self.kind().database_url(self.port(), name))
    }
}

impl PostgresServer {
    fn database_url(&self, port: u16, database: &str) -> String {
        format!("postgres://{NAME}:{}@127.0.0.1:{port}/{database}", self.password)
    }

    async fn connect(&self, port: u16, database: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::Config::new()
            .host(Ipv4Addr::LOCALHOST.to_string())
            .port(port)
            .user(NAME)
            .password(&self.password)
            .dbname(database)
            .connect(NoTls)
            .await?;
        // Ends when the client is dropped.
        tokio::spawn(connection);
        Ok(client)
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.bin.join(name));
        // Its user may not be able to enter our folder; and settings meant for other clusters stay out.
        command.current_dir("/").env("LC_ALL", "C");
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("PG") {
                command.env_remove(variable);
            }
        }
        if let Some(account) = self.account {
            // The standard library drops root's supplementary groups along with the user.
            command.gid(account.gid).uid(account.uid);
        }
        command
    }

    /// Makes the cluster beside its place and moves it there when it is complete: an interrupted start leaves none.
    async fn create_cluster(&self, dir: &Path, base: &Path, lock: &FolderLock) -> Result<()> {
        let unfinished = base.join("data.new");
        let password_file = base.join("password.initdb");
        remove_all(&unfinished)?;
        self.private_folder(&unfinished)?;
        self.write_for_account(&password_file, &self.password)?;

        let log = dir.join("initdb.log");
        let output = super::append_to_log(&log).with_context(|| format!("could not create {}", log.display()))?;
        let mut command = self.program("initdb");
        command
            .arg("-D")
            .arg(&unfinished)
            .arg("--pwfile")
            .arg(&password_file)
            .args(["--username", NAME, "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C"])
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("could not share the log of initdb")?)
            .stderr(output);
        let initdb = Process::spawn("initdb", command, Signal::SIGTERM, Some(lock.share()?))?;
        let status = tokio::time::timeout(INITDB_TIMEOUT, initdb.ended()).await;
        drop(initdb);
        remove_all(&password_file)?;
        match status {
            Ok(status) if status.success() => fs::rename(&unfinished, &self.data)
                .with_context(|| format!("could not move the new cluster to {}", self.data.display())),
            Ok(status) => bail!("initdb failed ({status}); {}", log_tail(&log)),
            Err(_) => bail!("initdb did not end within {} s; {}", INITDB_TIMEOUT.as_secs(), log_tail(&log)),
        }
    }

    fn private_folder(&self, path: &Path) -> Result<()> {
        private_folder(path, self.account)
    }

    fn write_for_account(&self, path: &Path, text: &str) -> Result<()> {
        remove_all(path)?;
        write_private(path, text)?;
        give(path, self.account)
    }
}

/// Whom to run as: nobody else unless we are root; the owner of the data where there is data.
fn account_for(dir: &Path) -> Result<Option<Account>> {
    let data = fs::metadata(dir.join("data")).ok();
    if !geteuid().is_root() {
        if let Some(data) = data.filter(|data| data.uid() != geteuid().as_raw()) {
            bail!(
                "the data in {} belongs to user {}, for it was made by a run as root: run as root again, or delete \
                 the folder; its contents are rebuilt from the stream",
                dir.display(),
                data.uid()
            );
        }
        return Ok(None);
    }
    if let Some(data) = data.filter(|data| data.uid() != 0) {
        return Ok(Some(Account { uid: data.uid(), gid: data.gid() }));
    }
    for name in ["postgres", "nobody"] {
        if let Some(user) = User::from_name(name).with_context(|| format!("could not look up the user {name}"))? {
            return Ok(Some(Account { uid: user.uid.as_raw(), gid: user.gid.as_raw() }));
        }
    }
    bail!("Postgres does not run as root, and there is neither a user postgres nor nobody to run it as: create one")
}

/// The folder that holds `data`: `dir`, or a private one under /var/tmp that `dir/data` is a link into.
fn base_folder(dir: &Path, account: Option<Account>) -> Result<PathBuf> {
    let place = dir.join("data");
    let Some(account) = account else {
        return Ok(dir.to_owned());
    };
    // The folder itself is ours to open; those above it are not.
    let mode = fs::metadata(dir).with_context(|| format!("could not read {}", dir.display()))?.permissions().mode();
    fs::set_permissions(dir, Permissions::from_mode(mode | 0o011))
        .with_context(|| format!("could not make {} enterable", dir.display()))?;

    match fs::symlink_metadata(&place) {
        Ok(found) if found.is_symlink() => {
            let target = fs::read_link(&place).with_context(|| format!("could not read {}", place.display()))?;
            let base = target.parent().unwrap_or(Path::new("/")).to_owned();
            if base.exists() {
                check_private(&base, account)?;
                return Ok(base);
            }
            // Cleaned away by the system: what it held is rebuilt from the stream.
            remove_all(&place)?;
        }
        Ok(_) => {
            if let Some(closed) = closed_to(dir, account) {
                bail!(
                    "{} is not open to user {}, who must reach the data in {}: open it (chmod o+x), or delete the \
                     data, which is rebuilt from the stream",
                    closed.display(),
                    account.uid,
                    dir.display()
                );
            }
            return Ok(dir.to_owned());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if closed_to(dir, account).is_none() {
                return Ok(dir.to_owned());
            }
        }
        Err(error) => return Err(error).with_context(|| format!("could not read {}", place.display())),
    }

    sweep(account);
    let hash = Sha256::digest(dir.as_os_str().as_encoded_bytes());
    let hash: String = hash.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let base = Path::new(PRIVATE_FOLDERS).join(format!("{PRIVATE_PREFIX}{hash}"));
    if fs::symlink_metadata(&base).is_ok() {
        // From an earlier folder of this name, which was deleted and its password with it.
        check_private(&base, account)?;
        if let Some(pid) = living_postmaster(&base) {
            bail!("{} is in use by process {pid}, a Postgres of an earlier start: stop it", base.display());
        }
        remove_all(&base)?;
    }
    private_folder(&base, Some(account))?;
    fs::write(base.join("origin"), dir.as_os_str().as_encoded_bytes())
        .with_context(|| format!("could not write into {}", base.display()))?;
    std::os::unix::fs::symlink(base.join("data"), &place)
        .with_context(|| format!("could not link {} to {}", place.display(), base.display()))?;
    Ok(base)
}

/// Removes private folders whose origin was deleted, as tests and thrown-away clones leave them. Best effort.
fn sweep(account: Account) {
    for entry in fs::read_dir(PRIVATE_FOLDERS).into_iter().flatten().flatten() {
        let base = entry.path();
        let ours =
            entry.file_name().to_string_lossy().starts_with(PRIVATE_PREFIX) && check_private(&base, account).is_ok();
        if !ours || living_postmaster(&base).is_some() {
            continue;
        }
        let Ok(origin) = fs::read_to_string(base.join("origin")) else {
            continue;
        };
        if matches!(fs::symlink_metadata(&origin), Err(error) if error.kind() == io::ErrorKind::NotFound) {
            let _ = fs::remove_dir_all(&base);
        }
    }
}

/// The process that a cluster's own lock file names, if it lives.
fn living_postmaster(base: &Path) -> Option<i32> {
    let text = fs::read_to_string(base.join("data/postmaster.pid")).ok()?;
    let pid = text.lines().next()?.trim().parse().ok().filter(|pid| *pid > 0)?;
    kill(Pid::from_raw(pid), None).is_ok().then_some(pid)
}

/// The first folder on the way to `dir` that `account` may not enter.
fn closed_to(dir: &Path, account: Account) -> Option<&Path> {
    dir.ancestors().find(|folder| {
        fs::metadata(folder).map_or(true, |found| {
            let bit = if found.uid() == account.uid {
                0o100
            } else if found.gid() == account.gid {
                0o010
            } else {
                0o001
            };
            found.mode() & bit == 0
        })
    })
}

/// /var/tmp is open to all: a folder there is used only if nobody else can have made it or can look into it.
fn check_private(base: &Path, account: Account) -> Result<()> {
    let found = fs::symlink_metadata(base).with_context(|| format!("could not read {}", base.display()))?;
    if !found.is_dir() || found.uid() != account.uid || found.mode() & 0o077 != 0 {
        bail!("{} is not a private folder of user {}: remove it, it is not ours", base.display(), account.uid);
    }
    Ok(())
}

fn private_folder(path: &Path, account: Option<Account>) -> Result<()> {
    DirBuilder::new().mode(0o700).create(path).with_context(|| format!("could not create {}", path.display()))?;
    give(path, account)
}

fn give(path: &Path, account: Option<Account>) -> Result<()> {
    let Some(account) = account else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(account.uid), Some(account.gid))
        .with_context(|| format!("could not give {} to user {}", path.display(), account.uid))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("could not write {}", path.display()))
}

fn remove_all(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(anyhow!(error).context(format!("could not remove {}", path.display())))
        }
        _ => Ok(()),
    }
}

/// The password of the cluster: kept in a file only we can read, made at the first start.
fn password(dir: &Path, cluster_exists: bool) -> Result<String> {
    let path = dir.join("password");
    match fs::read_to_string(&path) {
        Ok(password) if !password.trim().is_empty() => Ok(password.trim().to_owned()),
        Ok(_) | Err(_) if cluster_exists => bail!(
            "{} is missing, and with it the password of the data in {}: delete that folder, its contents are rebuilt \
             from the stream",
            path.display(),
            dir.display()
        ),
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("could not read {}", path.display()))
        }
        _ => {
            let password = uuid::Uuid::new_v4().simple().to_string();
            remove_all(&path)?;
            write_private(&path, &password)?;
            Ok(password)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_folder_on_the_way_is_found() {
        let dir = crate::stack::scratch().expect("a scratch folder");
        let (open, closed) = (dir.path().join("open"), dir.path().join("closed"));
        for (folder, mode) in [(&open, 0o711), (&closed, 0o700)] {
            fs::create_dir_all(folder.join("inside")).expect("created");
            fs::set_permissions(folder.join("inside"), Permissions::from_mode(0o755)).expect("set");
            fs::set_permissions(folder, Permissions::from_mode(mode)).expect("set");
        }
        let stranger = Account { uid: 64_000, gid: 64_000 };
        assert_eq!(closed_to(&open.join("inside"), stranger), None);
        assert_eq!(closed_to(&closed.join("inside"), stranger), Some(closed.as_path()));
        let ours = Account { uid: geteuid().as_raw(), gid: 64_000 };
        assert_eq!(closed_to(&closed.join("inside"), ours), None);
    }

    #[test]
    fn a_password_is_made_once_and_asked_for_when_it_is_lost() {
        let dir = crate::stack::scratch().expect("a scratch folder");
        let first = password(dir.path(), false).expect("made");
        assert_eq!(password(dir.path(), true).expect("read"), first);
        let mode = fs::metadata(dir.path().join("password")).expect("there").mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_file(dir.path().join("password")).expect("removed");
        let lost = password(dir.path(), true).expect_err("lost");
        assert!(lost.to_string().contains("delete that folder"), "{lost}");
    }
}
