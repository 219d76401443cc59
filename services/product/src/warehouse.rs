//! The warehouse's figures, over HTTP.
//!
//! Reads `WAREHOUSE_URL` page by page: a JSON array, an object of `items` and `next`, or NDJSON. A row has `sku` or
//! `productId`, `quantity` and `countedAt`. The other side is not ours: it may be slow, down, wrong or endless, so every
//! page and the whole are bounded in time, bytes and rows, a page that fails is asked for again, and a row that cannot be
//! read is a refusal in the report and not the end of the run.
//!
//! What is no list of figures at all ends it: an error object that was answered with 200, a page of HTML, an empty body. That
//! nothing was counted must be said, by an empty list.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use lomash_contract::limits::MAX_STOCK;
use lomash_contract::text::unfit;
use lomash_contract::{CountedBy, ProductId, Sku, Timestamp};
use lomash_platform::Secret;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LINK, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::{debug, warn};

use crate::reconciliation::{Figure, MAX_FIGURES, Source, Unreadable};

/// How long the warehouse may take to take a connection.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Redirections that are followed, within the warehouse's origin.
const MAX_REDIRECTS: usize = 5;

/// Longest text of the warehouse's that is repeated in a report.
const MAX_QUOTED_CHARS: usize = 100;

/// What reading the warehouse may cost.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Time of one try at one page, from the request to the last byte.
    pub page: Duration,
    /// Time of everything together, pauses included.
    pub whole: Duration,
    /// Bytes of one page. 250,000 rows of NDJSON in one page take some 25 MB.
    pub page_bytes: usize,
    /// Rows in all.
    pub rows: usize,
    /// Pages in all: a chain of empty pages must end, too.
    pub pages: usize,
    /// Tries at one page.
    pub attempts: u32,
    /// Pause before the second try; it doubles with each further one.
    pub first_pause: Duration,
    /// Longest pause, also when the warehouse asks for more in `Retry-After`.
    pub longest_pause: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            page: Duration::from_secs(30),
            whole: Duration::from_secs(300),
            page_bytes: 32 << 20,
            rows: MAX_FIGURES,
            pages: 10_000,
            attempts: 5,
            first_pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(30),
        }
    }
}

/// Why the warehouse's figures could not be had. A sentence for the report; never shows the token or the query.
#[derive(Debug, thiserror::Error)]
pub enum WarehouseError {
    /// `WAREHOUSE_URL` is none.
    #[error("WAREHOUSE_URL is not an http or https URL: {0}")]
    BadUrl(String),
    /// The HTTP client cannot be made.
    #[error("the HTTP client for the warehouse cannot be made: {0}")]
    NoClient(String),
    /// It failed for too long.
    #[error("the warehouse at {place} failed {attempts} times for page {page}, last with: {problem}")]
    Failing {
        /// Where.
        place: String,
        /// The page, from 1.
        page: usize,
        /// Tries.
        attempts: u32,
        /// What happened last.
        problem: String,
    },
    /// It answered that we did something wrong.
    #[error("the warehouse at {place} answered {status}; check WAREHOUSE_URL and WAREHOUSE_TOKEN")]
    Refused {
        /// Where.
        place: String,
        /// Its answer.
        status: StatusCode,
    },
    /// All together took too long.
    #[error("the warehouse at {place} did not end within {} s; {rows} rows were read", .within.as_secs())]
    TooSlow {
        /// Where.
        place: String,
        /// The limit.
        within: Duration,
        /// What was read.
        rows: usize,
    },
    /// More than is read.
    #[error("the warehouse at {place} has more than {limit} {what}, which is the most that one run reads")]
    TooMuch {
        /// Where.
        place: String,
        /// The limit.
        limit: usize,
        /// Of what.
        what: &'static str,
    },
    /// An answer that has none of the forms.
    #[error("page {page} of the warehouse at {place} is no list of figures: {problem}")]
    Malformed {
        /// Where.
        place: String,
        /// The page, from 1.
        page: usize,
        /// What is wrong.
        problem: String,
    },
    /// The next page is somewhere else, or was read before.
    #[error("page {page} of the warehouse at {place} names a next page that is not followed: {problem}")]
    BadNext {
        /// Where.
        place: String,
        /// The page, from 1.
        page: usize,
        /// Why not.
        problem: String,
    },
}

/// A row that was read, or why it was not.
pub type Given = Result<Figure, Unreadable>;

/// The warehouse's interface.
#[derive(Clone)]
pub struct Warehouse {
    client: Client,
    url: Url,
    token: Option<Secret>,
    limits: Limits,
}

impl fmt::Debug for Warehouse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Warehouse").field("place", &self.place()).finish_non_exhaustive()
    }
}

impl Warehouse {
    /// The warehouse at `url`, asked with `token` as bearer if there is one.
    ///
    /// # Errors
    /// [`WarehouseError::BadUrl`], [`WarehouseError::NoClient`].
    pub fn new(url: &Secret, token: Option<Secret>) -> Result<Self, WarehouseError> {
        Self::with_limits(url, token, Limits::default())
    }

    /// The same within other limits.
    ///
    /// # Errors
    /// As [`Warehouse::new`].
    pub fn with_limits(url: &Secret, token: Option<Secret>, limits: Limits) -> Result<Self, WarehouseError> {
        let url = Url::parse(url.expose()).map_err(|problem| WarehouseError::BadUrl(problem.to_string()))?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(WarehouseError::BadUrl("it has no scheme of these or no host".to_owned()));
        }
        // Another part of the process may have chosen already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(redirect::Policy::custom(follow_within_the_origin))
            .user_agent(concat!("lomash-inventory/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|problem| WarehouseError::NoClient(sentence(&problem)))?;
        Ok(Self { client, url, token, limits })
    }

    /// Where it is, without user, password and query.
    #[must_use]
    pub fn place(&self) -> String {
        format!("{}{}", self.url.origin().ascii_serialization(), self.url.path())
    }

    /// Every row, in the order of the pages.
    ///
    /// # Errors
    /// [`WarehouseError`]; then nothing of it should be used, for figures may be missing.
    pub async fn figures(&self) -> Result<Vec<Given>, WarehouseError> {
        let deadline = Instant::now() + self.limits.whole;
        let mut rows = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(self.url.clone());
        while let Some(url) = next.take() {
            let page = seen.len() + 1;
            if page > self.limits.pages {
                return Err(self.too_much("pages", self.limits.pages));
            }
            if !seen.insert(url.clone()) {
                return Err(self.bad_next(page - 1, "it was read before"));
            }
            let answer = timeout_at(deadline, self.page(page, &url)).await;
            let answer = answer.map_err(|_| WarehouseError::TooSlow {
                place: self.place(),
                within: self.limits.whole,
                rows: rows.len(),
            })??;
            let in_body = self.read(page, &answer, &mut rows)?;
            next = match answer.next.or(in_body) {
                None => None,
                Some(target) => Some(self.next_page(page, &url, &target)?),
            };
        }
        debug!(rows = rows.len(), pages = seen.len(), "read the warehouse");
        Ok(rows)
    }

    fn next_page(&self, page: usize, base: &Url, target: &str) -> Result<Url, WarehouseError> {
        let next = base.join(target).map_err(|_| self.bad_next(page, "it is no URL"))?;
        if next.origin() != self.url.origin() {
            return Err(self.bad_next(page, "it is at another origin, which must not get the token"));
        }
        Ok(next)
    }

    /// One page, asked for until it comes.
    async fn page(&self, page: usize, url: &Url) -> Result<Answer, WarehouseError> {
        let mut pause = self.limits.first_pause;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let tried = timeout(self.limits.page, self.try_page(url)).await;
            let (problem, asked_for) = match tried {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(Failure::Final(problem))) => return Err(problem),
                Ok(Err(Failure::Passing { problem, retry_after })) => (problem, retry_after),
                Err(_) => (format!("it was not there after {} ms", self.limits.page.as_millis()), None),
            };
            if attempts >= self.limits.attempts {
                return Err(WarehouseError::Failing { place: self.place(), page, attempts, problem });
            }
            let wait = asked_for.unwrap_or(pause).min(self.limits.longest_pause);
            warn!(page, attempts, problem, wait_ms = wait.as_millis(), "the warehouse failed, asking again");
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(self.limits.longest_pause);
        }
    }

    async fn try_page(&self, url: &Url) -> Result<Answer, Failure> {
        let mut request = self.client.get(url.clone()).header(ACCEPT, "application/json, application/x-ndjson");
        if let Some(token) = &self.token {
            request = request.bearer_auth(token.expose());
        }
        let response = request.send().await.map_err(|problem| Failure::passing(&problem))?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            let retry_after = retry_after(response.headers(), OffsetDateTime::now_utc());
            return Err(Failure::Passing { problem: format!("it answered {status}"), retry_after });
        }
        if !status.is_success() {
            return Err(Failure::Final(WarehouseError::Refused { place: self.place(), status }));
        }
        let media_type = response.headers().get(CONTENT_TYPE).map(|value| {
            let text = String::from_utf8_lossy(value.as_bytes());
            text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
        });
        let links = response.headers().get_all(LINK).iter().filter_map(|value| value.to_str().ok());
        let next = links.into_iter().find_map(next_link).map(str::to_owned);
        let body = self.body(response).await?;
        Ok(Answer { body, media_type, next })
    }

    async fn body(&self, mut response: Response) -> Result<Vec<u8>, Failure> {
        let too_large = || Failure::Final(self.too_much("bytes in one page", self.limits.page_bytes));
        if response.content_length().is_some_and(|length| length > self.limits.page_bytes as u64) {
            return Err(too_large());
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|problem| Failure::passing(&problem))? {
            if body.len() + chunk.len() > self.limits.page_bytes {
                return Err(too_large());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    }

    /// Reads a page into `rows`; returns the next page that its body names.
    fn read(&self, page: usize, answer: &Answer, rows: &mut Vec<Given>) -> Result<Option<String>, WarehouseError> {
        let mut reader = Reader { rows, limit: self.limits.rows, is_over: false };
        match reader.page(answer) {
            _ if reader.is_over => Err(self.too_much("rows", self.limits.rows)),
            Ok(next) => Ok(next.filter(|next| !next.is_empty())),
            Err(problem) => Err(WarehouseError::Malformed { place: self.place(), page, problem: quoted(&problem) }),
        }
    }

    fn too_much(&self, what: &'static str, limit: usize) -> WarehouseError {
        WarehouseError::TooMuch { place: self.place(), limit, what }
    }

    fn bad_next(&self, page: usize, problem: &str) -> WarehouseError {
        WarehouseError::BadNext { place: self.place(), page, problem: problem.to_owned() }
    }
}

/// Redirections stay where the token may go.
fn follow_within_the_origin(attempt: redirect::Attempt<'_>) -> redirect::Action {
    let from = attempt.previous().first().map(Url::origin);
    if attempt.previous().len() > MAX_REDIRECTS {
        attempt.error("it redirects too often")
    } else if from.is_some_and(|origin| origin != attempt.url().origin()) {
        attempt.error("it redirects to another origin, which must not get the token")
    } else {
        attempt.follow()
    }
}

struct Answer {
    body: Vec<u8>,
    media_type: Option<String>,
    next: Option<String>,
}

impl Answer {
    fn is_ndjson(&self) -> bool {
        let media_type = self.media_type.as_deref().unwrap_or_default();
        ["ndjson", "jsonl", "jsonlines"].iter().any(|form| media_type.contains(form))
    }

    /// What the body says it is when that is not JSON. What servers call a file that they know nothing of is no such word.
    fn other_form(&self) -> Option<&str> {
        let media_type = self.media_type.as_deref()?;
        let may_be = ["", "text/plain", "application/octet-stream", "binary/octet-stream"].contains(&media_type);
        (!may_be && !media_type.contains("json")).then_some(media_type)
    }
}

enum Failure {
    /// Worth another try.
    Passing { problem: String, retry_after: Option<Duration> },
    /// Not worth another try.
    Final(WarehouseError),
}

impl Failure {
    fn passing(problem: &reqwest::Error) -> Self {
        Self::Passing { problem: sentence(problem), retry_after: None }
    }
}

/// What an error says with its causes, without the URL, whose query may be a secret.
fn sentence(error: &reqwest::Error) -> String {
    let mut text = if error.is_connect() {
        "no connection".to_owned()
    } else if error.is_redirect() {
        "a redirection that is not followed".to_owned()
    } else if error.is_body() || error.is_decode() {
        "the answer broke off".to_owned()
    } else {
        "the request failed".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    quoted(&text)
}

/// A foreign text, short enough to be repeated.
fn quoted(text: &str) -> String {
    let mut short: String = text.chars().filter(|letter| unfit(*letter).is_none()).take(MAX_QUOTED_CHARS).collect();
    if text.chars().count() > MAX_QUOTED_CHARS {
        short.push('…');
    }
    short
}

/// How long to wait as the server asks: seconds, or until a date.
fn retry_after(headers: &HeaderMap, now: OffsetDateTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => {
            let until = OffsetDateTime::parse(text, &Rfc2822).ok()?;
            Some(Duration::try_from(until - now).unwrap_or(Duration::ZERO))
        }
    }
}

/// The target with `rel="next"` of a `Link` header (RFC 8288).
fn next_link(header: &str) -> Option<&str> {
    let mut rest = header;
    while let Some(start) = rest.find('<') {
        let after = &rest[start + 1..];
        let end = after.find('>')?;
        let target = &after[..end];
        let (parameters, following) = split_at_comma(&after[end + 1..]);
        let is_next = parameters.split(';').any(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            name.trim().eq_ignore_ascii_case("rel")
                && value.trim().trim_matches('"').split_ascii_whitespace().any(|rel| rel.eq_ignore_ascii_case("next"))
        });
        if is_next {
            return Some(target);
        }
        rest = following;
    }
    None
}

/// What comes before the first comma outside of quotes, and what comes after it.
fn split_at_comma(text: &str) -> (&str, &str) {
    let mut is_quoted = false;
    for (place, letter) in text.char_indices() {
        match letter {
            '"' => is_quoted = !is_quoted,
            ',' if !is_quoted => return (&text[..place], &text[place + 1..]),
            _ => {}
        }
    }
    (text, "")
}

// ── Reading a page ──────────────────────────────────────────────────────────────────────────────────────────────

/// A row as it is given. An object must name each of its fields once: of two figures nobody knows which one is meant.
enum Raw {
    Object { fields: Map<String, Value>, repeated: Option<String> },
    Other,
}

impl Raw {
    /// Whether it has nothing that a figure has: then it is not a bad row, but something else.
    fn is_foreign(&self) -> bool {
        match self {
            Self::Object { fields, .. } => FIELDS.iter().all(|field| !fields.contains_key(*field)),
            Self::Other => false,
        }
    }

    /// Whether it is a row and no object with rows.
    fn names_a_product(&self) -> bool {
        matches!(self, Self::Object { fields, .. } if fields.contains_key("sku") || fields.contains_key("productId"))
    }

    fn names(&self) -> String {
        let Self::Object { fields, .. } = self else { return String::new() };
        let names: Vec<String> = fields.keys().take(MAX_NAMES).map(|name| format!("`{name}`")).collect();
        if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
    }
}

/// The fields of a figure.
const FIELDS: [&str; 4] = ["sku", "productId", "quantity", "countedAt"];

/// Fields of something else that are named.
const MAX_NAMES: usize = 3;

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(RawVisitor)
    }
}

struct RawVisitor;

impl<'de> Visitor<'de> for RawVisitor {
    type Value = Raw;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a row")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Raw, A::Error> {
        let (mut fields, mut repeated) = (Map::new(), None);
        while let Some((name, value)) = object.next_entry::<String, Value>()? {
            if fields.insert(name.clone(), value).is_some() {
                repeated.get_or_insert(name);
            }
        }
        Ok(Raw::Object { fields, repeated })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Raw, A::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Raw::Other)
    }

    fn visit_unit<E>(self) -> Result<Raw, E> {
        Ok(Raw::Other)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Raw, E> {
        Ok(Raw::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Raw, E> {
        Ok(Raw::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Raw, E> {
        Ok(Raw::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Raw, E> {
        Ok(Raw::Other)
    }

    fn visit_str<E>(self, _: &str) -> Result<Raw, E> {
        Ok(Raw::Other)
    }
}

/// Takes rows in until there are too many.
struct Reader<'r> {
    rows: &'r mut Vec<Given>,
    limit: usize,
    is_over: bool,
}

impl Reader<'_> {
    fn page(&mut self, answer: &Answer) -> Result<Option<String>, String> {
        if let Some(form) = answer.other_form() {
            return Err(format!("its content type is `{form}` and not JSON"));
        }
        let before = self.rows.len();
        let first = answer.body.iter().copied().find(|byte| !byte.is_ascii_whitespace());
        match first {
            None => Err("it is empty; that nothing was counted is said by an empty list, `[]`".to_owned()),
            Some(_) if answer.is_ndjson() => self.lines(&answer.body),
            Some(b'[') => {
                let mut json = serde_json::Deserializer::from_slice(&answer.body);
                Rows(self).deserialize(&mut json).and_then(|()| json.end()).map_err(|problem| problem.to_string())?;
                Ok(None)
            }
            Some(b'{') => {
                let mut json = serde_json::Deserializer::from_slice(&answer.body);
                let problem = match Object(self).deserialize(&mut json) {
                    Ok((true, next)) => match json.end() {
                        Ok(()) => return Ok(next),
                        Err(problem) => problem.to_string(),
                    },
                    Ok((false, _)) => "an object without `items`".to_owned(),
                    Err(problem) => problem.to_string(),
                };
                // One row a line begins in the same way.
                self.rows.truncate(before);
                let line = lines_of(&answer.body).next();
                let is_row = |line| serde_json::from_slice::<Raw>(line).is_ok_and(|row| row.names_a_product());
                if self.is_over || !line.is_some_and(is_row) {
                    return Err(problem);
                }
                self.lines(&answer.body)
            }
            Some(_) => Err("it begins with neither `[` nor `{`".to_owned()),
        }
    }

    fn lines(&mut self, body: &[u8]) -> Result<Option<String>, String> {
        for line in lines_of(body) {
            if self.is_over {
                break;
            }
            match serde_json::from_slice::<Raw>(line) {
                Ok(row) => self.push(row)?,
                Err(problem) => {
                    self.push_result(Err((None, format!("the line is no JSON: {}", quoted(&problem.to_string())))))
                }
            }
        }
        Ok(None)
    }

    /// An error is about the whole: what has no field of a figure says that something else was answered, or the rest.
    fn push(&mut self, row: Raw) -> Result<(), String> {
        if row.is_foreign() {
            return Err(format!("row {} is no figure, it has {}", self.rows.len() + 1, quoted(&row.names())));
        }
        let read = match &row {
            Raw::Other => Err("the row is no object".to_owned()),
            Raw::Object { repeated: Some(name), .. } => Err(format!("`{}` is there twice", quoted(name))),
            Raw::Object { fields, repeated: None } => figure(fields),
        };
        self.push_result(read.map_err(|problem| {
            let sku = match &row {
                Raw::Object { fields, .. } => fields.get("sku").and_then(Value::as_str).map(quoted),
                Raw::Other => None,
            };
            (sku, problem)
        }));
        Ok(())
    }

    fn push_result(&mut self, result: Result<Figure, (Option<String>, String)>) {
        if self.rows.len() >= self.limit {
            self.is_over = true;
            return;
        }
        let position = self.rows.len() as u64 + 1;
        self.rows.push(match result {
            Ok(figure) => Ok(Figure { position, ..figure }),
            Err((sku, problem)) => Err(Unreadable { source: Source::Warehouse, position, sku, problem }),
        });
    }
}

/// The lines that are not blank. No value of JSON has the end of a line in it, however that is written.
fn lines_of(body: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = body.split(|byte| matches!(byte, b'\n' | b'\r'));
    lines.map(<[u8]>::trim_ascii).filter(|line| !line.is_empty())
}

/// One row, without its position.
fn figure(row: &Map<String, Value>) -> Result<Figure, String> {
    let text = |field: &str| match row.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str())),
        Some(_) => Err(format!("`{field}` must be a text")),
    };
    let sku = text("sku")?.map(str::parse::<Sku>).transpose().map_err(|problem| problem.to_string())?;
    let product_id = text("productId")?
        .map(str::parse::<ProductId>)
        .transpose()
        .map_err(|_| "`productId` must be a UUID".to_owned())?;
    if sku.is_none() && product_id.is_none() {
        return Err("the row has neither `sku` nor `productId`".to_owned());
    }
    let quantity = match row.get("quantity") {
        None | Some(Value::Null) => return Err("`quantity` is missing".to_owned()),
        Some(quantity) => quantity
            .as_u64()
            .and_then(|quantity| u32::try_from(quantity).ok())
            .filter(|quantity| *quantity <= MAX_STOCK)
            .ok_or_else(|| format!("`quantity` must be a whole number from 0 to {MAX_STOCK}"))?,
    };
    let counted_at = text("countedAt")?.ok_or("`countedAt` is missing")?;
    let counted_at: Timestamp = counted_at.parse().map_err(|problem| format!("`countedAt`: {problem}"))?;
    Ok(Figure {
        source: Source::Warehouse,
        position: 0,
        sku,
        product_id,
        quantity,
        counted_at,
        counted_by: CountedBy::Warehouse,
    })
}

/// An array of rows, each dropped as soon as it is read.
struct Rows<'a, 'r>(&'a mut Reader<'r>);

impl<'de> DeserializeSeed<'de> for Rows<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Rows<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut rows: A) -> Result<(), A::Error> {
        while let Some(row) = rows.next_element::<Raw>()? {
            self.0.push(row).map_err(de::Error::custom)?;
            if self.0.is_over {
                return Err(de::Error::custom("too many rows"));
            }
        }
        Ok(())
    }
}

/// `{ "items": [...], "next": "..." }`; whether it had items, and what comes next.
struct Object<'a, 'r>(&'a mut Reader<'r>);

impl<'de> DeserializeSeed<'de> for Object<'_, '_> {
    type Value = (bool, Option<String>);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Object<'_, '_> {
    type Value = (bool, Option<String>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `items`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Self::Value, A::Error> {
        let mut has_items = false;
        let mut next = None;
        while let Some(field) = object.next_key::<String>()? {
            match field.as_str() {
                "items" if has_items => return Err(de::Error::duplicate_field("items")),
                "items" => {
                    object.next_value_seed(Rows(&mut *self.0))?;
                    has_items = true;
                }
                // Beside a list it says that some of it is missing.
                "error" | "errors" => {
                    let error = object.next_value::<Value>()?;
                    let is_none = matches!(&error, Value::Null | Value::Bool(false))
                        || error.as_array().is_some_and(Vec::is_empty)
                        || error.as_str().is_some_and(str::is_empty);
                    if !is_none {
                        return Err(de::Error::custom(format_args!(
                            "it says `{field}`: {}",
                            quoted(&error.to_string())
                        )));
                    }
                }
                "next" => next = object.next_value::<Option<String>>()?,
                _ => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok((has_items, next))
    }
}

#[cfg(test)]
#[path = "warehouse_tests.rs"]
mod tests;
