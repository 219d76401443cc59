//! Who calls, and what they may do: bearer tokens (JWT), roles, and the gate in front of the routes.
//!
//! - The algorithm is fixed by the key (see `jwks.rs`) and never taken from the token.
//! - `exp`, `nbf`, `aud`, `iss` and `sub` must be there and right; `sub` is a UUID, since it becomes `updatedBy`.
//! - No token, or one that is not valid: 401. A valid one without a role we know, or with one that does not suffice: 403.
//!   A token whose keys were never fetched: 503, because it may be a good one.
//!
//! Nothing of a token is logged or sent back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use axum::Router;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use lomash_contract::objects::AsObject;
use lomash_platform::Secret;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::warn;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::config::{RateConfig, TokenConfig};
use crate::health::Health;
use crate::jwks::{Keys, Selected, Timing};
use crate::limits::{RateLimits, is_read};
use crate::problem::{KEYS_UNAVAILABLE, Problem};

/// Longest token that is looked at: real ones have one or two KiB.
pub const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// How far clocks may be apart.
pub const LEEWAY: Duration = Duration::from_secs(5);
/// Shortest HS256 secret: as long as the hash, as RFC 7518 demands.
pub const MIN_SECRET_BYTES: usize = 32;
/// What a client is told to wait while keys are missing.
const KEYS_RETRY_AFTER_SECONDS: u64 = 5;
/// Length of a UUID with its hyphens: no other form is taken.
const UUID_CHARS: usize = 36;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads and writes.
    Admin,
}

impl Role {
    /// As it stands in a token.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "VIEWER",
            Self::Admin => "ADMIN",
        }
    }
}

/// Whoever sent the request, as its token says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The token's `sub`.
    pub subject: Uuid,
    /// The token's `role`.
    pub role: Role,
    /// The token's `exp`: an answer that goes on for long should end then.
    pub expires: SystemTime,
}

/// Checks tokens.
pub struct Verifier {
    keys: Option<Keys>,
    secret: Option<DecodingKey>,
    rs256: Validation,
    eddsa: Validation,
    hs256: Validation,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier")
            .field("keys", &self.keys.is_some())
            .field("secret", &self.secret.is_some())
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Claims {
    exp: f64,
    /// Looked at by jsonwebtoken, which would also take a list of issuers that contains ours: a token has one.
    #[serde(rename = "iss")]
    _iss: String,
    sub: String,
    #[serde(default)]
    role: serde_json::Value,
}

impl Verifier {
    /// Sets up the keys, and a task that keeps them fresh until `stop`. A JWKS URL that cannot be reached is no reason
    /// not to start: its tokens are answered 503 until it can be, and `health` says so.
    ///
    /// # Errors
    /// When neither `JWT_JWKS` nor `JWT_HS256_SECRET` is set, a value is bad, or the JWKS file cannot be used.
    pub async fn start(config: &TokenConfig, health: &Health, stop: CancellationToken) -> anyhow::Result<Arc<Self>> {
        let every = Duration::from_secs(config.jwt_jwks_refresh_seconds.into());
        Self::start_with(config, Timing::every(every), health, stop).await
    }

    pub(crate) async fn start_with(
        config: &TokenConfig,
        timing: Timing,
        health: &Health,
        stop: CancellationToken,
    ) -> anyhow::Result<Arc<Self>> {
        if config.jwt_issuer.is_empty() {
            bail!("JWT_ISSUER is empty: set it to the `iss` of the tokens");
        }
        if config.jwt_audience.is_empty() {
            bail!("JWT_AUDIENCE is empty: set it to the `aud` of the tokens");
        }
        if config.jwt_jwks.is_none() && config.jwt_hs256_secret.is_none() {
            bail!("there is nothing to check tokens with: set JWT_JWKS, or JWT_HS256_SECRET for development");
        }
        let secret = match &config.jwt_hs256_secret {
            Some(secret) => {
                refuse_a_short_secret(secret)?;
                warn!(
                    "JWT_HS256_SECRET is set: tokens are taken that anyone with this secret can mint; for development only"
                );
                Some(DecodingKey::from_secret(secret.expose().as_bytes()))
            }
            None => None,
        };
        let keys = match &config.jwt_jwks {
            Some(source) => {
                let check = health.check("token-keys", true);
                Some(Keys::start(source.clone(), timing, check, stop).await.context("JWT_JWKS cannot be used")?)
            }
            None => None,
        };
        let validation = |algorithm| validation(algorithm, config);
        Ok(Arc::new(Self {
            keys,
            secret,
            rs256: validation(Algorithm::RS256),
            eddsa: validation(Algorithm::EdDSA),
            hs256: validation(Algorithm::HS256),
        }))
    }

    /// The caller of a request with these headers.
    ///
    /// # Errors
    /// 401, 403 or 503, as told at the top of this file.
    pub async fn caller(&self, headers: &HeaderMap) -> Result<Caller, Problem> {
        self.verify(bearer_token(headers)?).await
    }

    /// The caller that a token speaks of.
    ///
    /// # Errors
    /// As for [`Verifier::caller`].
    pub async fn verify(&self, token: &str) -> Result<Caller, Problem> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Problem::invalid_token("The token is too long."));
        }
        // `alg: none` and algorithms that nobody knows end here.
        let header =
            jsonwebtoken::decode_header(token).map_err(|_| Problem::invalid_token("The token is not valid."))?;
        if header.crit.is_some() {
            return Err(Problem::invalid_token("The token has critical headers, which are not supported."));
        }
        match header.alg {
            Algorithm::HS256 => {
                let secret = self.secret.as_ref().ok_or_else(unsupported_algorithm)?;
                self.check(token, secret, &self.hs256)
            }
            Algorithm::RS256 | Algorithm::EdDSA => {
                let keys = self.keys.as_ref().ok_or_else(unsupported_algorithm)?;
                let key = select(keys, &header).await?;
                let validation = if key.algorithm == Algorithm::RS256 { &self.rs256 } else { &self.eddsa };
                self.check(token, &key.decoding, validation)
            }
            _ => Err(unsupported_algorithm()),
        }
    }

    fn check(&self, token: &str, key: &DecodingKey, validation: &Validation) -> Result<Caller, Problem> {
        let decoded = jsonwebtoken::decode::<AsObject<Claims>>(token, key, validation);
        let AsObject(claims) = decoded.map_err(|error| refusal(error.kind()))?.claims;
        let expires = Duration::try_from_secs_f64(claims.exp).ok().and_then(|exp| UNIX_EPOCH.checked_add(exp));
        let expires = expires.ok_or_else(|| Problem::invalid_token("The token expires at no time that there is."))?;
        let subject = Uuid::try_parse(&claims.sub).ok().filter(|_| claims.sub.len() == UUID_CHARS);
        let subject = subject.ok_or_else(|| Problem::invalid_token("The token's sub is not a UUID."))?;
        let role = match claims.role.as_str() {
            Some("ADMIN") => Role::Admin,
            Some("VIEWER") => Role::Viewer,
            _ => return Err(Problem::forbidden("The token has no role that is known here: ADMIN or VIEWER.")),
        };
        Ok(Caller { subject, role, expires })
    }
}

async fn select(keys: &Keys, header: &Header) -> Result<crate::jwks::Key, Problem> {
    let mut refreshed = false;
    loop {
        let Some(known) = keys.current() else {
            let detail = "The keys to check the token with could not be fetched yet.";
            return Err(Problem::new(&KEYS_UNAVAILABLE, detail).with_retry_after(KEYS_RETRY_AFTER_SECONDS));
        };
        match known.select(header) {
            Selected::Key(key) => return Ok(key),
            Selected::UnknownKid if !refreshed && keys.refreshed().await => refreshed = true,
            Selected::UnknownKid | Selected::None => {
                return Err(Problem::invalid_token("The token is signed with a key that is not known."));
            }
        }
    }
}

fn validation(algorithm: Algorithm, config: &TokenConfig) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.leeway = LEEWAY.as_secs();
    validation.validate_exp = true;
    validation.validate_nbf = true;
    validation.validate_aud = true;
    validation.aud = Some(HashSet::from([config.jwt_audience.clone()]));
    validation.iss = Some(HashSet::from([config.jwt_issuer.clone()]));
    validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
    validation
}

/// The reason, where it helps an honest client and is known of a signed token only.
fn refusal(kind: &ErrorKind) -> Problem {
    Problem::invalid_token(match kind {
        ErrorKind::ExpiredSignature => "The token has expired.",
        ErrorKind::ImmatureSignature => "The token is not valid yet.",
        ErrorKind::InvalidAudience => "The token is for another audience.",
        ErrorKind::InvalidIssuer => "The token is of another issuer.",
        ErrorKind::MissingRequiredClaim(_) | ErrorKind::InvalidClaimFormat(_) => {
            "The token must have exp, nbf, aud, iss and sub, the times as numbers."
        }
        _ => "The token is not valid.",
    })
}

fn unsupported_algorithm() -> Problem {
    Problem::invalid_token("The token is signed in a way that is not taken here.")
}

/// The token in `Authorization: Bearer …`.
fn bearer_token(headers: &HeaderMap) -> Result<&str, Problem> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = match (values.next(), values.next()) {
        (None, _) => return Err(Problem::no_token()),
        (Some(_), Some(_)) => return Err(Problem::invalid_token("There is more than one header Authorization.")),
        (Some(value), None) => value.to_str().map_err(|_| Problem::invalid_token("The token is not valid."))?,
    };
    match value.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() => Ok(token.trim()),
        _ => Err(Problem::no_token()),
    }
}

fn refuse_a_short_secret(secret: &Secret) -> anyhow::Result<()> {
    if secret.expose().len() < MIN_SECRET_BYTES {
        bail!(
            "JWT_HS256_SECRET has less than {MIN_SECRET_BYTES} bytes and could be guessed: make one with `openssl rand -hex 32`"
        );
    }
    Ok(())
}

/// A development token to be minted.
#[derive(Debug, Clone)]
pub struct Mint<'a> {
    /// `iss`.
    pub issuer: &'a str,
    /// `aud`.
    pub audience: &'a str,
    /// `sub`.
    pub subject: Uuid,
    /// `role`.
    pub role: Role,
    /// How long it is valid, from now on.
    pub lifetime: Duration,
}

/// Mints an HS256 token that a service with the same secret takes; for development.
///
/// # Errors
/// When the secret is too short, or the token would expire at no time that there is.
pub fn mint(secret: &Secret, token: &Mint<'_>) -> anyhow::Result<String> {
    refuse_a_short_secret(secret)?;
    let now =
        SystemTime::now().duration_since(UNIX_EPOCH).context("the clock of this machine is before 1970")?.as_secs();
    let exp = now.checked_add(token.lifetime.as_secs()).context("the token would never expire")?;
    let claims = serde_json::json!({
        "iss": token.issuer, "aud": token.audience, "sub": token.subject, "role": token.role.as_str(),
        "iat": now, "nbf": now, "exp": exp,
    });
    let key = EncodingKey::from_secret(secret.expose().as_bytes());
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &key).context("could not sign the token")
}

/// What stands before the routes: tokens, and the rates of their subjects.
#[derive(Debug, Clone)]
pub struct Gate {
    verifier: Arc<Verifier>,
    rates: Arc<RateLimits>,
}

impl Gate {
    /// A gate with rates of its own.
    #[must_use]
    pub fn new(verifier: Arc<Verifier>, rates: &RateConfig) -> Self {
        Self { verifier, rates: Arc::new(RateLimits::new(rates)) }
    }

    /// Puts the gate before every route of `router`: a request reaches it with a [`Caller`], at least a viewer, or not
    /// at all. What a route needs beyond that it says with [`Admin`]. Unknown paths stay 404.
    ///
    /// # Panics
    /// When the router has no routes.
    pub fn guard<S: Clone + Send + Sync + 'static>(&self, router: Router<S>) -> Router<S> {
        router.route_layer(middleware::from_fn_with_state(self.clone(), admit))
    }
}

async fn admit(State(gate): State<Gate>, mut request: Request, next: Next) -> Response {
    let admitted = match gate.verifier.caller(request.headers()).await {
        Ok(caller) => gate.rates.check(caller.subject, is_read(request.method())).map(|()| caller),
        Err(problem) => Err(problem),
    };
    match admitted {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(problem) => problem.into_response(),
    }
}

/// The caller of a route that any role may use.
#[derive(Debug, Clone, Copy)]
pub struct Viewer(pub Caller);

/// The caller of a route that only an ADMIN may use; others get 403. Put it first, so that it is asked first.
#[derive(Debug, Clone, Copy)]
pub struct Admin(pub Caller);

impl<S: Send + Sync> FromRequestParts<S> for Viewer {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        admitted(parts, Role::Viewer).map(Self)
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        admitted(parts, Role::Admin).map(Self)
    }
}

fn admitted(parts: &Parts, needed: Role) -> Result<Caller, Problem> {
    // Closed by default: a route that was forgotten outside the gate is a fault of ours, not an open door.
    let Some(caller) = parts.extensions.get::<Caller>() else {
        return Err(Problem::internal("a route that needs a caller is not behind the gate"));
    };
    if caller.role < needed {
        return Err(Problem::forbidden(format!("This needs the role {}.", needed.as_str())));
    }
    Ok(*caller)
}

#[cfg(test)]
#[path = "auth_tests.rs"]
mod tests;
