//! Where the servers' programs are, and whether they are new enough.
//!
//! `deploy/dev/setup.sh` installs what is found here: it looks in the same places, in the same order, and asks for
//! the same versions.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use tokio::process::Command;

/// Atomic batches with de-duplication, and cron schedules.
const NATS_OLDEST: Version = Version(2, 14);
/// What Debian 12 has; older ones are not tested.
const POSTGRES_OLDEST: Version = Version(15, 0);
/// Redis 7, or any Valkey.
const REDIS_OLDEST: Version = Version(7, 0);
/// A program that does not even print its version in this time is not usable.
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);
/// How a person mends a missing program.
const FIX: &str = "run `./just setup`, which installs it";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// The nats-server to use: `NATS_SERVER`, the one on the PATH, or the one in `.tools/`.
pub(super) async fn nats_server() -> Result<PathBuf> {
    let tools = tool_folders().map(|tools| tools.join("nats-server"));
    one_program("nats-server", "NATS_SERVER", NATS_OLDEST, "nats-server: v", on_path("nats-server").chain(tools)).await
}

/// The redis-server to use: `REDIS_SERVER`, or Redis or Valkey on the PATH or in Debian's folder.
pub(super) async fn redis_server() -> Result<PathBuf> {
    let debian = ["/usr/bin/redis-server", "/usr/bin/valkey-server"].map(PathBuf::from);
    let candidates = on_path("redis-server").chain(on_path("valkey-server")).chain(debian);
    one_program("redis-server", "REDIS_SERVER", REDIS_OLDEST, " v=", candidates).await
}

/// The folder with `initdb` and `postgres`: `POSTGRES_BIN`, the PATH's, or one of the usual folders.
///
/// `major` is the version that made the data, when there is data already: no other can read it.
pub(super) async fn postgres_bin(major: Option<u32>) -> Result<PathBuf> {
    if let Some(folder) = env::var_os("POSTGRES_BIN").map(PathBuf::from) {
        return match postgres_version(&folder).await {
            Ok(version) if version >= POSTGRES_OLDEST => Ok(folder),
            Ok(version) => {
                bail!("POSTGRES_BIN={} is version {version}; {POSTGRES_OLDEST} or newer is needed", folder.display())
            }
            Err(error) => Err(error.context(format!("POSTGRES_BIN={} is not usable", folder.display()))),
        };
    }
    // The PATH may hold links to single programs; the folder meant is the one they live in.
    let from_path = on_path("initdb").filter_map(|initdb| Some(initdb.canonicalize().ok()?.parent()?.to_owned()));
    let mut seen = Vec::new();
    for folder in from_path.chain(usual_postgres_folders()) {
        if let Ok(version) = postgres_version(&folder).await {
            if version >= POSTGRES_OLDEST && major.is_none_or(|major| major == version.0) {
                return Ok(folder);
            }
            seen.push(format!("{} is {version}", folder.display()));
        }
    }
    let seen = if seen.is_empty() { String::new() } else { format!(" ({})", seen.join(", ")) };
    match major {
        Some(major) => bail!(
            "the data was made by PostgreSQL {major}, which is not installed{seen}: install it, or delete the data, \
             which is rebuilt from the stream"
        ),
        None => bail!(
            "PostgreSQL {} or newer was not found{seen}: {FIX}, or name its folder in POSTGRES_BIN",
            POSTGRES_OLDEST.0
        ),
    }
}

async fn postgres_version(folder: &Path) -> Result<Version> {
    if !folder.join("initdb").is_file() {
        bail!("there is no initdb in {}", folder.display());
    }
    version_of(&folder.join("postgres"), "(PostgreSQL) ").await
}

/// Debian's folders, those of PostgreSQL's own packages for Red Hat, and what its sources install to.
fn usual_postgres_folders() -> Vec<PathBuf> {
    let newest_first = |parent: &str, prefix: &str| {
        let mut folders: Vec<PathBuf> = std::fs::read_dir(parent)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|folder| folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
            .map(|folder| folder.join("bin"))
            .collect();
        folders.sort();
        folders.reverse();
        folders
    };
    let mut folders = newest_first("/usr/lib/postgresql", "");
    folders.extend(newest_first("/usr", "pgsql-"));
    folders.push("/usr/local/pgsql/bin".into());
    folders
}

async fn one_program(
    name: &str,
    variable: &str,
    oldest: Version,
    before_version: &str,
    candidates: impl Iterator<Item = PathBuf>,
) -> Result<PathBuf> {
    if let Some(program) = env::var_os(variable).map(PathBuf::from) {
        return match version_of(&program, before_version).await {
            Ok(version) if version >= oldest => Ok(program),
            Ok(version) => bail!("{variable}={} is version {version}; {oldest} or newer is needed", program.display()),
            Err(error) => Err(error.context(format!("{variable}={} is not usable", program.display()))),
        };
    }
    let mut seen = Vec::new();
    for program in candidates.filter(|program| program.is_file()) {
        match version_of(&program, before_version).await {
            Ok(version) if version >= oldest => return Ok(program),
            Ok(version) => seen.push(format!("{} is {version}", program.display())),
            Err(error) => seen.push(format!("{error:#}")),
        }
    }
    let seen = if seen.is_empty() { String::new() } else { format!(" ({})", seen.join(", ")) };
    bail!("{name} {oldest} or newer was not found{seen}: {FIX}, or name it in {variable}")
}

async fn version_of(program: &Path, before: &str) -> Result<Version> {
    let run = Command::new(program).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_TIMEOUT, run)
        .await
        .with_context(|| format!("{} does not print its version", program.display()))?
        .with_context(|| format!("{} cannot be run", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text, before)
        .with_context(|| format!("{} printed no version that is understood: {:?}", program.display(), text.trim()))
}

fn parse_version(text: &str, before: &str) -> Option<Version> {
    let (_, version) = text.split_once(before)?;
    let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some(Version(numbers.next()??, numbers.next().flatten().unwrap_or(0)))
}

fn on_path(program: &'static str) -> impl Iterator<Item = PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path).filter(|folder| folder.is_absolute()).collect();
    folders.into_iter().map(move |folder| folder.join(OsStr::new(program))).filter(|program| program.is_file())
}

/// `.tools` of the clone that we run in or were built in: every folder upward of both.
fn tool_folders() -> impl Iterator<Item = PathBuf> {
    let starts = [env::current_dir().ok(), env::current_exe().ok()];
    starts.into_iter().flatten().flat_map(|start| {
        let upward: Vec<PathBuf> = start.ancestors().map(|folder| folder.join(".tools")).collect();
        upward
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_programs_print_them() {
        for (text, before, expected) in [
            ("nats-server: v2.15.1\n", "nats-server: v", Some(Version(2, 15))),
            ("nats-server: v2.9.10\n", "nats-server: v", Some(Version(2, 9))),
            ("Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64\n", " v=", Some(Version(7, 0))),
            ("Valkey server v=8.1.1 sha=00000000:0\n", " v=", Some(Version(8, 1))),
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", "(PostgreSQL) ", Some(Version(15, 14))),
            ("postgres (PostgreSQL) 18beta1\n", "(PostgreSQL) ", Some(Version(18, 0))),
            ("something else", "v", None),
        ] {
            assert_eq!(parse_version(text, before), expected, "{text}");
        }
        assert!(Version(2, 9) < NATS_OLDEST && NATS_OLDEST <= Version(2, 14) && Version(3, 0) > NATS_OLDEST);
    }
}
