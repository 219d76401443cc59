//! Reconciliation runs: start, watch, approve, reject.

use axum::Json;
use axum::extract::State;
use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use lomash_contract::{Timestamp, UpdatedBy};
use lomash_web::{Admin, Body, Path, Problem, Query, Viewer, cursor};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use super::Api;
use super::problems::{
    IDEMPOTENCY_KEY_REUSED, NO_WAREHOUSE, RECONCILIATION_NOT_FOUND, RECONCILIATION_NOT_WAITING, ReadProblems,
    WriteProblems, sentence,
};
use super::writes::{IDEMPOTENT_REPLAYED, idempotency_key};
use crate::reconciliation::reports::DecideError;
use crate::reconciliation::run::ReconciliationError;
use crate::reconciliation::{Report, Request, Row};

/// Most items of a page.
const MAX_LIMIT: u32 = 200;

/// Items of a page that does not say.
const DEFAULT_LIMIT: u32 = 50;

/// Seconds after which it is worth asking again while Postgres or NATS is away.
const RETRY_AFTER_SECONDS: u64 = 5;

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// Items of the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<u32>,
    /// Where it goes on: `nextCursor` of the page before.
    cursor: Option<String>,
}

impl Page {
    fn limit(&self) -> Result<u32, Problem> {
        let limit = self.limit.unwrap_or(DEFAULT_LIMIT);
        if (1..=MAX_LIMIT).contains(&limit) {
            Ok(limit)
        } else {
            Err(Problem::invalid_parameter("limit", format!("must be from 1 to {MAX_LIMIT}")))
        }
    }

    fn position<P: serde::de::DeserializeOwned>(&self, list: &impl Serialize) -> Result<Option<P>, Problem> {
        self.cursor.as_deref().map(|cursor| cursor::open(list, cursor)).transpose()
    }
}

/// A page of reports, from the newest on.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationPage)]
pub(super) struct ReportPage {
    /// The reports.
    items: Vec<Report>,
    /// Where the next page begins; null on the last one.
    next_cursor: Option<String>,
}

/// A report with a page of its rows.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
#[schema(as = ReconciliationReportWithRows)]
pub(super) struct ReportWithRows {
    /// The report.
    #[serde(flatten)]
    report: Report,
    /// Rows, in the order of the figures' source.
    rows: Vec<Row>,
    /// Where the next page of rows begins; null on the last one.
    next_cursor: Option<String>,
}

/// Whether a waiting run goes on.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[schema(as = ReconciliationApproval)]
pub(super) struct Approval {
    /// True applies its rows as they were reported; false ends it.
    approved: bool,
}

#[utoipa::path(
    post, path = "/v1/reconciliations", tag = "reconciliation", operation_id = "startReconciliation",
    summary = "Start a reconciliation run",
    description = "Compares counts with the stock at the moment of each count, and corrects today's stock by the \
                   difference. One run is at work at a time; this one begins when those before it are done.",
    params(("Idempotency-Key" = Option<String>, Header, description = "The same request under the same key is the same run, as long as its report is kept; another request under it is refused with 422")),
    request_body = Request,
    responses((status = 202, description = "Asked for; watch it at Location", body = Report), WriteProblems)
)]
pub(super) async fn start(
    Admin(caller): Admin,
    State(api): State<Api>,
    headers: HeaderMap,
    Body(request): Body<Request>,
) -> Result<Response, Problem> {
    let id = match idempotency_key(&headers)? {
        Some(key) => Uuid::new_v5(&caller.subject, key.as_bytes()),
        None => Uuid::new_v4(),
    };
    let started = api.reconciliation.start(id, request, UpdatedBy::User(caller.subject)).await.map_err(problem)?;
    let mut response = accepted(started.report);
    if !started.is_new {
        response.headers_mut().insert(IDEMPOTENT_REPLAYED.clone(), HeaderValue::from_static("true"));
    }
    Ok(response)
}

#[utoipa::path(
    get, path = "/v1/reconciliations", tag = "reconciliation", operation_id = "listReconciliations",
    summary = "Reports of reconciliation runs, from the newest on",
    params(Page),
    responses((status = 200, description = "A page", body = ReportPage), ReadProblems)
)]
pub(super) async fn list(
    _: Viewer,
    State(api): State<Api>,
    Query(page): Query<Page>,
) -> Result<Json<ReportPage>, Problem> {
    const LIST: &str = "reconciliations";
    let (limit, before) = (page.limit()?, page.position::<(Timestamp, Uuid)>(&LIST)?);
    let mut items = api.reconciliation.list(before, limit + 1).await.map_err(problem)?;
    let next_cursor = more(&mut items, limit).map(|last| cursor::seal(&LIST, &(last.requested_at, last.id)));
    Ok(Json(ReportPage { next_cursor: next_cursor.transpose()?, items }))
}

#[utoipa::path(
    get, path = "/v1/reconciliations/{runId}", tag = "reconciliation", operation_id = "getReconciliation",
    summary = "The report of a reconciliation run, with its rows",
    params(("runId" = Uuid, Path, description = "The run"), Page),
    responses((status = 200, description = "The report and a page of its rows", body = ReportWithRows), ReadProblems)
)]
pub(super) async fn show(
    _: Viewer,
    State(api): State<Api>,
    Path(run_id): Path<Uuid>,
    Query(page): Query<Page>,
) -> Result<Json<ReportWithRows>, Problem> {
    let list = ("reconciliation rows", run_id);
    let (limit, after) = (page.limit()?, page.position::<u32>(&list)?);
    let report = api.reconciliation.get(run_id).await.map_err(problem)?.ok_or_else(|| unknown(run_id))?;
    let mut rows = api.reconciliation.rows(run_id, after.unwrap_or(0), limit + 1).await.map_err(problem)?;
    let next_cursor = more(&mut rows, limit).map(|last| cursor::seal(&list, &last.number));
    Ok(Json(ReportWithRows { report, next_cursor: next_cursor.transpose()?, rows }))
}

#[utoipa::path(
    post, path = "/v1/reconciliations/{runId}/approval", tag = "reconciliation", operation_id = "decideReconciliation",
    summary = "Approve or reject a run that changes much",
    description = "A run that would change more products than its threshold waits. Decided again in the same way, the \
                   answer is the same.",
    params(("runId" = Uuid, Path, description = "The run")),
    request_body = Approval,
    responses((status = 202, description = "Decided; an approved run goes on", body = Report), WriteProblems)
)]
pub(super) async fn decide(
    Admin(caller): Admin,
    State(api): State<Api>,
    Path(run_id): Path<Uuid>,
    Body(Approval { approved }): Body<Approval>,
) -> Result<Response, Problem> {
    let by = UpdatedBy::User(caller.subject);
    let decided = if approved {
        api.reconciliation.approve(run_id, by).await
    } else {
        api.reconciliation.reject(run_id, by).await
    };
    Ok(accepted(decided.map_err(problem)?))
}

fn accepted(report: Report) -> Response {
    let mut headers = HeaderMap::new();
    if let Ok(location) = HeaderValue::try_from(format!("/v1/reconciliations/{}", report.id)) {
        headers.insert(LOCATION, location);
    }
    (StatusCode::ACCEPTED, headers, Json(report)).into_response()
}

/// Cuts a list that was read one item beyond the page; the last item of the page, if there is a next one.
fn more<T>(items: &mut Vec<T>, limit: u32) -> Option<&T> {
    if items.len() <= limit as usize {
        return None;
    }
    items.truncate(limit as usize);
    items.last()
}

fn unknown(run: Uuid) -> Problem {
    problem(ReconciliationError::Decide(DecideError::Unknown(run)))
}

fn problem(error: ReconciliationError) -> Problem {
    let detail = sentence(&error.to_string());
    match error {
        ReconciliationError::BadThreshold(_) => Problem::invalid_field("/approvalThresholdPercent", detail),
        ReconciliationError::IdReused(_) => Problem::new(&IDEMPOTENCY_KEY_REUSED, detail),
        ReconciliationError::NoWarehouse => Problem::new(&NO_WAREHOUSE, detail),
        ReconciliationError::Decide(DecideError::Unknown(_)) => Problem::new(&RECONCILIATION_NOT_FOUND, detail),
        ReconciliationError::Decide(DecideError::NotWaiting(status)) => {
            Problem::new(&RECONCILIATION_NOT_WAITING, detail).with("runStatus", json!(status))
        }
        ReconciliationError::Reports(_) | ReconciliationError::Decide(DecideError::Reports(_)) => {
            // What Postgres says is for the log.
            tracing::warn!(%error, "a request about reconciliation could not be answered");
            Problem::unavailable("The reports of reconciliation runs cannot be reached just now.", RETRY_AFTER_SECONDS)
        }
        ReconciliationError::Jobs(_) => {
            tracing::warn!(%error, "a reconciliation run could not be started");
            Problem::unavailable("The run cannot be started just now.", RETRY_AFTER_SECONDS)
        }
    }
}
