//! Alerts and mails in Postgres, schema `notification`: owns every statement on it.
//!
//! An alert is recorded before it is published and mailed, and each of these is recorded after it was done. So a crash at any
//! point leaves an alert that is published or mailed once more, and never one that is not. While a mail is on its way its row
//! is locked by a transaction: no other replica sends it, and when the replica dies the lock goes with its connection.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use deadpool_postgres::{Object, Pool, Transaction};
use lomash_contract::{EventId, OrderId, ProductId, Timestamp};
use lomash_platform::trace::TraceContext;
use lomash_platform::{Secret, postgres};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio_postgres::Row;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::books::{AlertKind, Arrival, Books, Changes, Details, Known, NewAlert, NotMailed, Rules, Stock, Verdict};
use crate::low_stock::MailKind;
use crate::observed;

/// Alerts that a digest tells at most; it says how many more there are.
pub const MAX_DIGEST_ALERTS: i64 = 1_000;

/// Longest problem that is kept, in characters.
const MAX_PROBLEM_CHARS: usize = 500;

/// Postgres ends a transaction of ours that does nothing for so long: its replica is gone, and a mail must not stay locked.
/// Longer than a mail may take to send.
pub const IDLE_LIMIT: Duration = Duration::from_secs(90);

/// Digests that may be closed while alerts for them are recorded: two periods meet, not more.
const MAX_DIGEST_TRIES: u32 = 3;

/// Digests have ids in this namespace.
fn digest_namespace() -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_DNS, b"digests.notifications.lomash")
}

/// Why alerts could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("the alerts in Postgres cannot be reached just now: {0}")]
pub struct AlertsError(String);

impl From<tokio_postgres::Error> for AlertsError {
    fn from(problem: tokio_postgres::Error) -> Self {
        Self(problem.as_db_error().map_or_else(|| problem.to_string(), ToString::to_string))
    }
}

/// The alerts. Clones are the same.
#[derive(Clone)]
pub struct Alerts {
    pool: Pool,
    url: Secret,
    is_ready: Arc<AtomicBool>,
    digest_period: Duration,
    news: Arc<News>,
}

/// Wakes whoever has something to do now; what another replica records is found by looking now and then.
#[derive(Debug, Default)]
pub struct News {
    /// There are alerts to publish.
    pub recorded: Notify,
    /// There are mails to send.
    pub published: Notify,
}

/// An alert that is not published yet.
#[derive(Clone, Debug)]
pub struct Unpublished {
    /// The cause.
    pub caused_by: EventId,
    /// Id of the notification.
    pub event_id: EventId,
    /// The product.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: String,
    /// What is left.
    pub quantity: u32,
    /// The threshold it met.
    pub threshold: u32,
    /// The cause's timestamp.
    pub occurred_at: OffsetDateTime,
    /// W3C trace context of the cause.
    pub traceparent: Option<String>,
    /// See `traceparent`.
    pub tracestate: Option<String>,
}

/// A mail on its way: its row stays locked until it is settled, or this is dropped.
pub struct Claimed<'c> {
    transaction: Transaction<'c>,
    /// Its id.
    pub mail_id: Uuid,
    /// Failed attempts before.
    pub attempts: u32,
    /// What it is.
    pub mail: Mail,
}

/// What a mail tells.
#[derive(Clone, Debug)]
pub enum Mail {
    /// One alert.
    Alert(Told),
    /// Those of a period, from the newest to the oldest, and how many there are in all.
    Digest {
        /// The newest ones.
        alerts: Vec<Told>,
        /// All of them.
        total: u64,
        /// When the period was over.
        closed_at: OffsetDateTime,
    },
}

/// An alert as a mail tells it.
#[derive(Clone, Debug)]
pub struct Told {
    /// The cause.
    pub caused_by: EventId,
    /// Low, or above the threshold again.
    pub is_low: bool,
    /// The product.
    pub product_id: ProductId,
    /// Its unit.
    pub sku: String,
    /// Its name.
    pub name: String,
    /// Stock before.
    pub previous_quantity: u32,
    /// Stock after.
    pub quantity: u32,
    /// The threshold.
    pub threshold: u32,
    /// Why the stock changed: the name on the wire.
    pub trigger: String,
    /// The order that took the stock.
    pub order_id: Option<OrderId>,
    /// Who changed it.
    pub updated_by: String,
    /// The timestamp of the cause.
    pub occurred_at: OffsetDateTime,
    /// W3C trace context of the cause.
    pub traceparent: Option<String>,
    /// See `traceparent`.
    pub tracestate: Option<String>,
}

/// What became of an attempt to send a mail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The server has it; it may have refused some recipients.
    Sent(Option<String>),
    /// The server will never take it.
    Failed(String),
    /// Again after a pause.
    Later(Duration, String),
}

/// How much waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Alerts that are not published.
    pub to_publish: u64,
    /// Mails that are not sent.
    pub to_mail: u64,
    /// Mails that were refused for good.
    pub failed: u64,
}

/// An alert as an operator sees it.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct Notification {
    /// The event that caused it.
    caused_by: Uuid,
    /// `lowStock`, or `recovered` under the policy `edge`.
    kind: String,
    /// Sequence of the cause in the ledger.
    #[serde(skip)]
    pub sequence: u64,
    /// See above.
    #[serde(rename = "sequence")]
    cause_sequence: u64,
    /// The product.
    product_id: Uuid,
    /// Its stock-keeping unit.
    sku: String,
    /// Its name when it happened.
    name: String,
    /// Stock before.
    previous_quantity: u32,
    /// Stock after.
    quantity: u32,
    /// The threshold in force.
    threshold: u32,
    /// Why the stock changed.
    trigger: String,
    /// The order, when one took the stock.
    #[schema(required)]
    order_id: Option<Uuid>,
    /// Who changed it: a person's id, or `system`.
    updated_by: String,
    /// When it happened, by the clock of whoever did it.
    #[schema(value_type = String, format = DateTime)]
    occurred_at: Timestamp,
    /// When this service recorded it.
    #[schema(value_type = String, format = DateTime)]
    recorded_at: Timestamp,
    /// The notification's event id; null for a recovery, which is not published.
    #[schema(required)]
    event_id: Option<Uuid>,
    /// When it was published; null while it waits.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    published_at: Option<Timestamp>,
    /// What became of its mail.
    mail: MailState,
}

/// Where the mail of an alert stands.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub struct MailState {
    /// `waiting`, `sent`, `failed`, or `none`.
    state: String,
    /// Why there is none: `old` or `edge`.
    #[schema(required)]
    reason: Option<String>,
    /// Its id, of which its Message-ID is made; alerts of one digest share it.
    #[schema(required)]
    mail_id: Option<Uuid>,
    /// Attempts that did not succeed.
    failed_attempts: u32,
    /// When the server took it.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    sent_at: Option<Timestamp>,
    /// When it is tried next.
    #[schema(value_type = Option<String>, format = DateTime, required)]
    due_at: Option<Timestamp>,
    /// What went wrong last.
    #[schema(required)]
    problem: Option<String>,
}

/// Which alerts a list shows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "camelCase")]
pub enum MailFilter {
    /// Their mail waits.
    Waiting,
    /// Their mail is sent.
    Sent,
    /// Their mail was refused for good.
    Failed,
    /// They have no mail.
    None,
}

impl Alerts {
    /// Alerts in the database of `pool`; `url` leads there too, for the migrations.
    #[must_use]
    pub fn new(pool: Pool, url: Secret, digest_period: Duration) -> Self {
        Self { pool, url, is_ready: Arc::default(), digest_period, news: Arc::default() }
    }

    /// What there is to wait for.
    #[must_use]
    pub fn news(&self) -> &News {
        &self.news
    }

    /// A connection, once the schema is there.
    ///
    /// # Errors
    /// When there is none.
    pub async fn client(&self) -> Result<Object, AlertsError> {
        if !self.is_ready.load(Ordering::Relaxed) {
            let made = postgres::migrate_notification(&self.url).await;
            made.map_err(|problem| AlertsError(format!("{problem:#}")))?;
            self.is_ready.store(true, Ordering::Relaxed);
        }
        self.pool.get().await.map_err(|problem| AlertsError(problem.to_string()))
    }

    /// After a failure: the schema may have been dropped, and statements remember tables that are gone.
    fn doubt(&self, client: &Object) {
        self.is_ready.store(false, Ordering::Relaxed);
        client.statement_cache.clear();
    }

    /// The sequence up to which everything is recorded.
    ///
    /// # Errors
    /// [`AlertsError`].
    pub async fn checkpoint(&self) -> Result<u64, AlertsError> {
        let client = self.client().await?;
        let row = client.query_one("SELECT sequence FROM notification.checkpoint", &[]).await;
        row.map(|row| unsigned(&row, 0)).map_err(|problem| {
            self.doubt(&client);
            problem.into()
        })
    }

    /// The last alert that is recorded: the sequence of its cause, and when the server stored that.
    ///
    /// # Errors
    /// [`AlertsError`].
    pub async fn newest(&self) -> Result<Option<(u64, OffsetDateTime)>, AlertsError> {
        let client = self.client().await?;
        let query = "SELECT sequence, stored_at FROM notification.alerts ORDER BY sequence DESC LIMIT 1";
        let row = client.query_opt(query, &[]).await.inspect_err(|_| self.doubt(&client))?;
        Ok(row.map(|row| (unsigned(&row, 0), row.get(1))))
    }

    // ── Recording ───────────────────────────────────────────────────────────────────────────────────────────────

    /// Records what messages, in the order of the stream, change and cause: all of it or nothing.
    ///
    /// # Errors
    /// [`AlertsError`]; recording them again is harmless.
    pub async fn record(&self, arrivals: &[Arrival], rules: Rules) -> Result<Vec<Verdict>, AlertsError> {
        let mut client = self.client().await?;
        let recorded = self.record_with(&mut client, arrivals, rules).await;
        match recorded {
            Ok((verdicts, alerts)) => {
                if alerts > 0 {
                    observed::recorded(alerts);
                    self.news.recorded.notify_one();
                }
                Ok(verdicts)
            }
            Err(problem) => {
                self.doubt(&client);
                Err(problem)
            }
        }
    }

    async fn record_with(
        &self,
        client: &mut Object,
        arrivals: &[Arrival],
        rules: Rules,
    ) -> Result<(Vec<Verdict>, usize), AlertsError> {
        let transaction = client.transaction().await?;
        // The lock makes a second recorder, which believes to be the only one as well, wait and then see what this one did.
        let row = transaction.query_one("SELECT sequence, now() FROM notification.checkpoint FOR UPDATE", &[]).await?;
        let (checkpoint, now) = (unsigned(&row, 0), row.get(1));
        let mut products: Vec<Uuid> = arrivals.iter().filter_map(Arrival::product_id).map(|id| id.0).collect();
        products.sort_unstable();
        products.dedup();
        let mut books = Books::open(checkpoint, known(&transaction, &products).await?);
        let verdicts = arrivals.iter().map(|arrival| books.take(arrival, rules, now)).collect();
        let changes = books.close();
        let alerts = changes.alerts.len();
        if changes.checkpoint > checkpoint || alerts > 0 {
            self.write(&transaction, &changes).await?;
            lomash_ledger::crash_point!("notify-before-record");
            transaction.commit().await?;
        }
        Ok((verdicts, alerts))
    }

    async fn write(&self, transaction: &Transaction<'_>, changes: &Changes) -> Result<(), AlertsError> {
        let move_on = "UPDATE notification.checkpoint SET sequence = $1";
        transaction.execute_cached(move_on, &[&signed(changes.checkpoint)]).await?;
        if !changes.details.is_empty() {
            let rows = &changes.details;
            let insert = "INSERT INTO notification.details (product_id, sequence, name, threshold)
                SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::bigint[]) ON CONFLICT DO NOTHING";
            let ids: Vec<Uuid> = rows.iter().map(|(product, ..)| product.0).collect();
            let sequences: Vec<i64> = rows.iter().map(|(_, sequence, _)| signed(*sequence)).collect();
            let names: Vec<&str> = rows.iter().map(|(.., details)| details.name.as_str()).collect();
            let thresholds: Vec<Option<i64>> =
                rows.iter().map(|(.., details)| details.threshold.map(i64::from)).collect();
            transaction.execute_cached(insert, &[&ids, &sequences, &names, &thresholds]).await?;
        }
        if !changes.stock.is_empty() {
            let insert = "INSERT INTO notification.products AS p (product_id, quantity, sequence, is_low)
                SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::boolean[])
                ON CONFLICT (product_id) DO UPDATE
                SET quantity = excluded.quantity, sequence = excluded.sequence, is_low = excluded.is_low
                WHERE p.sequence < excluded.sequence";
            let ids: Vec<Uuid> = changes.stock.keys().map(|product| product.0).collect();
            let quantities: Vec<i64> = changes.stock.values().map(|stock| stock.quantity.into()).collect();
            let sequences: Vec<i64> = changes.stock.values().map(|stock| signed(stock.sequence)).collect();
            let lows: Vec<bool> = changes.stock.values().map(|stock| stock.is_low).collect();
            transaction.execute_cached(insert, &[&ids, &quantities, &sequences, &lows]).await?;
        }
        if !changes.alerts.is_empty() {
            self.write_alerts(transaction, &changes.alerts).await?;
        }
        Ok(())
    }

    async fn write_alerts(&self, transaction: &Transaction<'_>, alerts: &[NewAlert]) -> Result<(), AlertsError> {
        let needs_digest = alerts.iter().any(|alert| alert.mail == Ok(MailKind::Digest));
        let digest = if needs_digest { Some(self.digest(transaction, alerts[0].sequence).await?) } else { None };
        let insert =
            "INSERT INTO notification.alerts (caused_by, kind, sequence, product_id, sku, name, previous_quantity,
                quantity, threshold, trigger, order_id, updated_by, occurred_at, stored_at, traceparent, tracestate,
                event_id, mail_id, not_mailed)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
            ON CONFLICT DO NOTHING";
        let mail = "INSERT INTO notification.mails (mail_id, kind, sequence)
            VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
        for alert in alerts {
            let (mail_id, not_mailed) = match alert.mail {
                Ok(MailKind::Digest) => (digest, None),
                Ok(MailKind::LowStock | MailKind::Recovered) => (Some(alert.caused_by.0), None),
                Err(NotMailed::Old) => (None, Some("old")),
                Err(NotMailed::Edge) => (None, Some("edge")),
            };
            let change = &alert.change;
            let kind = match alert.kind {
                AlertKind::LowStock => "lowStock",
                AlertKind::Recovered => "recovered",
            };
            let inserted = transaction
                .execute_cached(
                    insert,
                    &[
                        &alert.caused_by.0,
                        &kind,
                        &signed(alert.sequence),
                        &change.product_id.0,
                        &change.sku.as_str(),
                        &alert.name,
                        &i64::from(change.previous_quantity),
                        &i64::from(change.new_quantity),
                        &i64::from(alert.threshold),
                        &change.trigger.as_str(),
                        &change.order_id.map(|order| order.0),
                        &change.updated_by.to_string(),
                        &alert.occurred_at,
                        &alert.stored_at,
                        &alert.trace.as_ref().map(TraceContext::traceparent),
                        &alert.trace.as_ref().and_then(TraceContext::tracestate),
                        &alert.event_id.0,
                        &mail_id,
                        &not_mailed,
                    ],
                )
                .await?;
            if inserted == 1
                && let (Some(mail_id), Ok(MailKind::LowStock | MailKind::Recovered)) = (mail_id, alert.mail)
            {
                transaction.execute_cached(mail, &[&mail_id, &kind, &signed(alert.sequence)]).await?;
            }
        }
        Ok(())
    }

    /// The digest of the current period, or of the next one when that was closed meanwhile. Its row is locked until the
    /// transaction ends, so it is not sent without what is recorded now.
    async fn digest(&self, transaction: &Transaction<'_>, sequence: u64) -> Result<Uuid, AlertsError> {
        let open = "INSERT INTO notification.mails AS m (mail_id, kind, sequence, due_at) VALUES ($1, 'digest', $2, $3)
            ON CONFLICT (mail_id) DO UPDATE SET due_at = m.due_at
            WHERE m.state = 'waiting' AND m.attempts = 0 AND m.due_at > now() RETURNING mail_id";
        let seconds = i64::try_from(self.digest_period.as_secs()).unwrap_or(i64::MAX).max(1);
        let now: OffsetDateTime = transaction.query_one("SELECT now()", &[]).await?.get(0);
        let current = now.unix_timestamp().div_euclid(seconds);
        for next in 1..=i64::from(MAX_DIGEST_TRIES) {
            let ends = (current + next).saturating_mul(seconds);
            let due_at = OffsetDateTime::from_unix_timestamp(ends).unwrap_or(now);
            let id = Uuid::new_v5(&digest_namespace(), ends.to_string().as_bytes());
            if transaction.query_opt(open, &[&id, &signed(sequence), &due_at]).await?.is_some() {
                return Ok(id);
            }
        }
        Err(AlertsError("no digest is open".to_owned()))
    }

    // ── Publishing ──────────────────────────────────────────────────────────────────────────────────────────────

    /// Hands up to `limit` alerts that are not published to `publish`, in the order of the stream, and records those that it
    /// gives back as published. Another replica takes others meanwhile. How many there were.
    ///
    /// # Errors
    /// [`AlertsError`]; what was published is published again, under the same id.
    pub async fn publish_next(
        &self,
        limit: u32,
        publish: impl AsyncFnOnce(&[Unpublished]) -> Vec<EventId>,
    ) -> Result<(usize, usize), AlertsError> {
        let mut client = self.client().await?;
        let transaction = claiming(&mut client).await?;
        let next =
            "SELECT caused_by, event_id, product_id, sku, quantity, threshold, occurred_at, traceparent, tracestate, kind
            FROM notification.alerts WHERE published_at IS NULL
            ORDER BY sequence LIMIT $1 FOR UPDATE SKIP LOCKED";
        let rows = transaction.query(next, &[&i64::from(limit)]).await?;
        if rows.is_empty() {
            return Ok((0, 0));
        }
        // A recovery is not published; it takes its turn all the same, so that its mail follows those before it.
        let (low, recovered): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.get::<_, &str>(9) == "lowStock");
        let alerts: Vec<_> = low.into_iter().map(unpublished).collect();
        let mut published: Vec<Uuid> = publish(&alerts).await.into_iter().map(|id| id.0).collect();
        published.extend(recovered.into_iter().map(|row| row.get::<_, Uuid>(0)));
        let record = "UPDATE notification.alerts SET published_at = now() WHERE caused_by = ANY($1)";
        transaction.execute(record, &[&published]).await?;
        let due = "UPDATE notification.mails SET due_at = now()
            WHERE mail_id = ANY($1) AND state = 'waiting' AND due_at IS NULL";
        transaction.execute(due, &[&published]).await?;
        transaction.commit().await?;
        self.news.published.notify_one();
        Ok((rows.len(), published.len()))
    }

    // ── Mailing ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// The next mail that is due, locked until it is settled; None when none is.
    ///
    /// # Errors
    /// [`AlertsError`].
    pub async fn next_mail<'c>(&self, client: &'c mut Object) -> Result<Option<Claimed<'c>>, AlertsError> {
        let transaction = claiming(client).await?;
        let next = "SELECT mail_id, kind, attempts, coalesce(due_at, created_at) FROM notification.mails
            WHERE state = 'waiting' AND due_at <= now() ORDER BY due_at, sequence LIMIT 1 FOR UPDATE SKIP LOCKED";
        let Some(row) = transaction.query_opt_cached(next, &[]).await? else { return Ok(None) };
        let (mail_id, kind): (Uuid, &str) = (row.get(0), row.get(1));
        let told =
            "SELECT caused_by, kind, product_id, sku, name, previous_quantity, quantity, threshold, trigger, order_id,
                updated_by, occurred_at, traceparent, tracestate, count(*) OVER ()
            FROM notification.alerts WHERE mail_id = $1 ORDER BY sequence DESC LIMIT $2";
        let rows = transaction.query_cached(told, &[&mail_id, &MAX_DIGEST_ALERTS]).await?;
        let total = rows.first().map_or(0, |row| unsigned(row, 14));
        let mut alerts: Vec<_> = rows.iter().map(as_told).collect();
        let mail = match (kind, alerts.len()) {
            (_, 0) => return Err(AlertsError(format!("the mail {mail_id} tells nothing"))),
            ("digest", _) => Mail::Digest { alerts, total, closed_at: row.get(3) },
            _ => Mail::Alert(alerts.swap_remove(0)),
        };
        let attempts = u32::try_from(row.get::<_, i32>(2)).unwrap_or(0);
        Ok(Some(Claimed { transaction, mail_id, attempts, mail }))
    }

    // ── Looking ─────────────────────────────────────────────────────────────────────────────────────────────────

    /// How much waits.
    ///
    /// # Errors
    /// [`AlertsError`].
    pub async fn waiting(&self) -> Result<Waiting, AlertsError> {
        let client = self.client().await?;
        let count = "SELECT (SELECT count(*) FROM notification.alerts WHERE published_at IS NULL),
            (SELECT count(*) FROM notification.mails WHERE state = 'waiting'),
            (SELECT count(*) FROM notification.mails WHERE state = 'failed')";
        match client.query_one(count, &[]).await {
            Ok(row) => {
                Ok(Waiting { to_publish: unsigned(&row, 0), to_mail: unsigned(&row, 1), failed: unsigned(&row, 2) })
            }
            Err(problem) => {
                self.doubt(&client);
                Err(problem.into())
            }
        }
    }

    /// Alerts from the newest on, below the sequence `before`.
    ///
    /// # Errors
    /// [`AlertsError`].
    pub async fn list(
        &self,
        mail: Option<MailFilter>,
        product: Option<Uuid>,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Vec<Notification>, AlertsError> {
        let client = self.client().await?;
        let state = mail.map(|mail| match mail {
            MailFilter::Waiting => "waiting",
            MailFilter::Sent => "sent",
            MailFilter::Failed => "failed",
            MailFilter::None => "none",
        });
        let select = "SELECT a.caused_by, a.kind, a.sequence, a.product_id, a.sku, a.name, a.previous_quantity, a.quantity,
                a.threshold, a.trigger, a.order_id, a.updated_by, a.occurred_at, a.recorded_at, a.event_id, a.published_at,
                coalesce(m.state, 'none') AS state, a.not_mailed, a.mail_id, coalesce(m.attempts, 0), m.sent_at,
                CASE m.state WHEN 'waiting' THEN m.due_at END, m.problem
            FROM notification.alerts a LEFT JOIN notification.mails m USING (mail_id)
            WHERE ($1::bigint IS NULL OR a.sequence < $1) AND ($2::uuid IS NULL OR a.product_id = $2)
              AND ($3::text IS NULL OR coalesce(m.state, 'none') = $3)
            ORDER BY a.sequence DESC LIMIT $4";
        let rows = client.query(select, &[&before.map(signed), &product, &state, &i64::from(limit)]).await;
        match rows {
            Ok(rows) => Ok(rows.iter().map(as_listed).collect()),
            Err(problem) => {
                self.doubt(&client);
                Err(problem.into())
            }
        }
    }
}

impl Claimed<'_> {
    /// Records what became of it, and lets go of it.
    ///
    /// # Errors
    /// [`AlertsError`]; then it is sent again, under the same Message-ID.
    pub async fn settle(self, attempt: &Attempt) -> Result<(), AlertsError> {
        let Self { transaction, mail_id, .. } = self;
        match attempt {
            Attempt::Sent(problem) => {
                let sent =
                    "UPDATE notification.mails SET state = 'sent', sent_at = now(), problem = $2 WHERE mail_id = $1";
                transaction.execute_cached(sent, &[&mail_id, &problem.as_deref().map(excerpt)]).await?;
            }
            Attempt::Failed(problem) => {
                let failed = "UPDATE notification.mails SET state = 'failed', attempts = attempts + 1, problem = $2
                    WHERE mail_id = $1";
                transaction.execute_cached(failed, &[&mail_id, &excerpt(problem)]).await?;
            }
            Attempt::Later(pause, problem) => {
                let later = "UPDATE notification.mails SET attempts = attempts + 1, problem = $2,
                    due_at = clock_timestamp() + make_interval(secs => $3) WHERE mail_id = $1";
                transaction.execute_cached(later, &[&mail_id, &excerpt(problem), &pause.as_secs_f64()]).await?;
            }
        }
        transaction.commit().await?;
        Ok(())
    }
}

/// A transaction for rows that are locked while something outside is done.
async fn claiming(client: &mut Object) -> Result<Transaction<'_>, AlertsError> {
    let transaction = client.transaction().await?;
    let limit = format!("SET LOCAL idle_in_transaction_session_timeout = {}", IDLE_LIMIT.as_millis());
    transaction.batch_execute(&limit).await?;
    Ok(transaction)
}

/// Statements that are used again and again are prepared once a connection.
trait Cached {
    async fn execute_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<u64, tokio_postgres::Error>;
    async fn query_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error>;
    async fn query_opt_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Option<Row>, tokio_postgres::Error>;
}

impl Cached for Transaction<'_> {
    async fn execute_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<u64, tokio_postgres::Error> {
        self.execute(&self.prepare_cached(statement).await?, values).await
    }

    async fn query_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        self.query(&self.prepare_cached(statement).await?, values).await
    }

    async fn query_opt_cached(
        &self,
        statement: &str,
        values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Option<Row>, tokio_postgres::Error> {
        self.query_opt(&self.prepare_cached(statement).await?, values).await
    }
}

/// What is known of these products.
async fn known(transaction: &Transaction<'_>, products: &[Uuid]) -> Result<HashMap<ProductId, Known>, AlertsError> {
    let mut known: HashMap<ProductId, Known> = HashMap::with_capacity(products.len());
    if products.is_empty() {
        return Ok(known);
    }
    let stock = "SELECT product_id, quantity, sequence, is_low FROM notification.products WHERE product_id = ANY($1)";
    for row in transaction.query_cached(stock, &[&products]).await? {
        let stock = Stock { quantity: quantity(&row, 1), sequence: unsigned(&row, 2), is_low: row.get(3) };
        known.entry(ProductId(row.get(0))).or_default().stock = Some(stock);
    }
    let details = "SELECT product_id, sequence, name, threshold FROM notification.details WHERE product_id = ANY($1)";
    for row in transaction.query_cached(details, &[&products]).await? {
        let threshold = row.get::<_, Option<i64>>(3).map(|threshold| u32::try_from(threshold).unwrap_or(u32::MAX));
        let details = Details { name: row.get(2), threshold };
        known.entry(ProductId(row.get(0))).or_default().details.insert(unsigned(&row, 1), details);
    }
    Ok(known)
}

/// Sequences fit: the server counts them in steps of one.
fn signed(sequence: u64) -> i64 {
    i64::try_from(sequence).unwrap_or(i64::MAX)
}

fn unsigned(row: &Row, column: usize) -> u64 {
    u64::try_from(row.get::<_, i64>(column)).unwrap_or(0)
}

fn quantity(row: &Row, column: usize) -> u32 {
    u32::try_from(row.get::<_, i64>(column)).unwrap_or(u32::MAX)
}

/// What a foreign server said, as much of it as is kept: Postgres takes no NUL.
fn excerpt(problem: &str) -> String {
    problem.chars().filter(|letter| !letter.is_control()).take(MAX_PROBLEM_CHARS).collect()
}

fn unpublished(row: &Row) -> Unpublished {
    Unpublished {
        caused_by: EventId(row.get(0)),
        event_id: EventId(row.get(1)),
        product_id: ProductId(row.get(2)),
        sku: row.get(3),
        quantity: quantity(row, 4),
        threshold: quantity(row, 5),
        occurred_at: row.get(6),
        traceparent: row.get(7),
        tracestate: row.get(8),
    }
}

fn as_told(row: &Row) -> Told {
    Told {
        caused_by: EventId(row.get(0)),
        is_low: row.get::<_, &str>(1) == "lowStock",
        product_id: ProductId(row.get(2)),
        sku: row.get(3),
        name: row.get(4),
        previous_quantity: quantity(row, 5),
        quantity: quantity(row, 6),
        threshold: quantity(row, 7),
        trigger: row.get(8),
        order_id: row.get::<_, Option<Uuid>>(9).map(OrderId),
        updated_by: row.get(10),
        occurred_at: row.get(11),
        traceparent: row.get(12),
        tracestate: row.get(13),
    }
}

fn as_listed(row: &Row) -> Notification {
    let instant = |column| row.get::<_, Option<OffsetDateTime>>(column).map(Timestamp::new);
    let kind: String = row.get(1);
    let is_published = kind == "lowStock";
    Notification {
        caused_by: row.get(0),
        sequence: unsigned(row, 2),
        cause_sequence: unsigned(row, 2),
        product_id: row.get(3),
        sku: row.get(4),
        name: row.get(5),
        previous_quantity: quantity(row, 6),
        quantity: quantity(row, 7),
        threshold: quantity(row, 8),
        trigger: row.get(9),
        order_id: row.get(10),
        updated_by: row.get(11),
        occurred_at: Timestamp::new(row.get(12)),
        recorded_at: Timestamp::new(row.get(13)),
        event_id: is_published.then(|| row.get(14)),
        kind,
        published_at: instant(15).filter(|_| is_published),
        mail: MailState {
            state: row.get(16),
            reason: row.get(17),
            mail_id: row.get(18),
            failed_attempts: u32::try_from(row.get::<_, i32>(19)).unwrap_or(0),
            sent_at: instant(20),
            due_at: instant(21),
            problem: row.get(22),
        },
    }
}
