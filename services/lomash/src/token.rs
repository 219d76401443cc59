//! `lomash token`: bearer tokens for development, and the secret they are minted with.
//!
//! `lomash up` makes the secret on its first start and keeps it in the data folder, readable by its owner only; the
//! services that it starts are told it. Whoever can read the file can be any administrator of that stack. In production
//! tokens come from an identity provider (`JWT_JWKS`), and nothing here is used.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use lomash_platform::Secret;
use lomash_web::Role;
use lomash_web::auth::{Mint, mint};
use lomash_web::config::{DEVELOPMENT_AUDIENCE, DEVELOPMENT_ISSUER};
use uuid::Uuid;

use crate::output;

/// The file with the secret, in the data folder.
const SECRET_FILE: &str = "jwt-secret";
/// Random bytes of the secret: as many as the hash of HS256 has. They are written as hex.
const SECRET_BYTES: usize = 32;
/// Longest life of a token: nobody remembers a development token for longer.
const MAX_LIFETIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// Who changes stock on a laptop, where nobody says who they are.
pub const DEVELOPMENT_ADMIN: Uuid = Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_0ad1);
/// Who reads it.
pub const DEVELOPMENT_VIEWER: Uuid = Uuid::from_u128(0x0000_0000_0000_4000_8000_0000_0000_071e);

/// Mint a bearer token for development and print it.
#[derive(Clone, Debug, Args)]
pub struct TokenArgs {
    /// What the token allows.
    #[arg(long, value_enum, ignore_case = true, default_value_t = TokenRole::Viewer)]
    pub role: TokenRole,
    /// Whose token it is: becomes `updatedBy` of what is changed with it [default: a fixed id for each role].
    #[arg(long, value_name = "UUID")]
    pub subject: Option<Uuid>,
    /// How long it is valid, such as 90s, 30m, 12h or 7d.
    #[arg(long, default_value = "12h", value_name = "TIME")]
    pub expires: Lifetime,
    /// The token's `iss`.
    #[arg(long, env = "JWT_ISSUER", default_value = DEVELOPMENT_ISSUER)]
    pub issuer: String,
    /// The token's `aud`.
    #[arg(long, env = "JWT_AUDIENCE", default_value = DEVELOPMENT_AUDIENCE)]
    pub audience: String,
    /// The secret of the services that are to take it [default: the one in the data folder].
    #[arg(long, env = "JWT_HS256_SECRET", hide_env_values = true)]
    pub secret: Option<Secret>,
    /// Folder of the stack whose secret is used; `lomash up` makes it.
    #[arg(long, env = "LOMASH_DATA", default_value = ".data", value_name = "DIR")]
    pub data: PathBuf,
}

/// A role, as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// Reads and writes.
    #[value(name = "ADMIN")]
    Admin,
    /// Reads.
    #[value(name = "VIEWER")]
    Viewer,
}

impl From<TokenRole> for Role {
    fn from(role: TokenRole) -> Self {
        match role {
            TokenRole::Admin => Self::Admin,
            TokenRole::Viewer => Self::Viewer,
        }
    }
}

/// How long a token is valid: a whole number with its unit, one of `s`, `m`, `h` and `d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime(Duration);

/// Why a text is no [`Lifetime`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be a whole number with s, m, h or d after it, more than nothing and at most 366d")]
pub struct LifetimeError;

impl FromStr for Lifetime {
    type Err = LifetimeError;

    fn from_str(text: &str) -> Result<Self, LifetimeError> {
        let seconds = match text.chars().last() {
            Some('s') => 1,
            Some('m') => 60,
            Some('h') => 3600,
            Some('d') => 24 * 3600,
            _ => return Err(LifetimeError),
        };
        // The unit is one ASCII character.
        let number = text[..text.len() - 1].parse::<u64>().map_err(|_| LifetimeError)?;
        let lifetime = Duration::from_secs(number.checked_mul(seconds).ok_or(LifetimeError)?);
        if lifetime.is_zero() || lifetime > MAX_LIFETIME { Err(LifetimeError) } else { Ok(Self(lifetime)) }
    }
}

/// Prints a token, and nothing else, so that `$(lomash token)` is one.
///
/// # Errors
/// When there is no secret.
pub fn run(args: &TokenArgs) -> Result<()> {
    let secret = match &args.secret {
        Some(secret) => secret.clone(),
        None => stored_secret(&args.data)?,
    };
    let role = Role::from(args.role);
    let token = Mint {
        issuer: &args.issuer,
        audience: &args.audience,
        subject: args.subject.unwrap_or_else(|| development_subject(role)),
        role,
        lifetime: args.expires.0,
    };
    output::say_whole(mint(&secret, &token)?);
    Ok(())
}

/// A token that the services of the stack take which has this secret.
pub(crate) fn stack_token(secret: &Secret, role: Role, lifetime: Duration) -> Result<String> {
    let subject = development_subject(role);
    mint(secret, &Mint { issuer: DEVELOPMENT_ISSUER, audience: DEVELOPMENT_AUDIENCE, subject, role, lifetime })
}

fn development_subject(role: Role) -> Uuid {
    match role {
        Role::Admin => DEVELOPMENT_ADMIN,
        Role::Viewer => DEVELOPMENT_VIEWER,
    }
}

fn stored_secret(data: &Path) -> Result<Secret> {
    let file = data.join(SECRET_FILE);
    match fs::read_to_string(&file) {
        Ok(text) => Ok(Secret::from(text.trim_end().to_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no secret to sign with: {} is not there. `lomash up` makes it, or set JWT_HS256_SECRET",
            file.display()
        ),
        Err(error) => Err(error).with_context(|| format!("could not read {}", file.display())),
    }
}

/// The secret of the stack in this folder, made on its first start. The caller holds the folder's lock.
pub(crate) fn stack_secret(data: &Path) -> Result<Secret> {
    let file = data.join(SECRET_FILE);
    if !file.exists() {
        let mut bytes = [0; SECRET_BYTES];
        fs::File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut bytes))
            .context("could not get random bytes for the secret of development tokens")?;
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        write_private(&file, &text)?;
    }
    stored_secret(data)
}

/// Writes a whole file that only its owner may read, or leaves the one before.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension("new");
    // A run that was killed leaves files behind: made anew, so that the mode is ours.
    let _ = fs::remove_file(&unfinished);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&unfinished, path))
        .with_context(|| format!("could not write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use lomash_web::{Health, HttpConfig, Verifier};

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Process {
        #[command(flatten)]
        http: HttpConfig,
    }

    #[test]
    fn lifetimes_have_a_unit_and_an_end() {
        assert_eq!("90s".parse(), Ok(Lifetime(Duration::from_secs(90))));
        assert_eq!("12h".parse(), Ok(Lifetime(Duration::from_secs(12 * 3600))));
        assert_eq!("366d".parse(), Ok(Lifetime(MAX_LIFETIME)));
        for bad in ["", "h", "12", "0s", "367d", "-1h", "1.5h", "12ü", "99999999999999999999d", "9999999999999999999d"]
        {
            assert_eq!(bad.parse::<Lifetime>(), Err(LifetimeError), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn a_service_with_the_secret_of_the_stack_takes_its_tokens() {
        let data = tempfile::tempdir().expect("a folder");
        assert!(stored_secret(data.path()).is_err());
        let secret = stack_secret(data.path()).expect("made");
        assert_eq!(stack_secret(data.path()).expect("kept"), secret);
        assert_eq!(secret.expose().len(), SECRET_BYTES * 2);
        let mode = fs::metadata(data.path().join(SECRET_FILE)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        let mut tokens = <Process as clap::Parser>::parse_from(["test"]).http.tokens;
        tokens.jwt_issuer = DEVELOPMENT_ISSUER.to_owned();
        tokens.jwt_audience = DEVELOPMENT_AUDIENCE.to_owned();
        tokens.jwt_jwks = None;
        tokens.jwt_hs256_secret = Some(secret.clone());
        let verifier = Verifier::start(&tokens, &Health::new(), tokio_util::sync::CancellationToken::new()).await;
        let verifier = verifier.expect("a verifier");
        for (role, subject) in [(Role::Admin, DEVELOPMENT_ADMIN), (Role::Viewer, DEVELOPMENT_VIEWER)] {
            let token = stack_token(&secret, role, Duration::from_secs(60)).expect("minted");
            let caller = verifier.verify(&token).await.expect("taken");
            assert_eq!((caller.role, caller.subject), (role, subject));
        }
    }
}
