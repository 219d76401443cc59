//! The demo's admin: changes stock over HTTP, is refused where that must be, looks at the past, and reconciles with a
//! count.

use lomash_contract::{ProductId, Timestamp};
use lomash_platform::Secret;
use lomash_web::Role;
use product_service::reconciliation::{Report, Row as ReportRow, Status};
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::api::Api;
use crate::reconcile;
use crate::up::Stack;

/// What the admin makes the stock; the demo's orders leave less than that of everything.
const SET_TO: u32 = 7_500;

/// How many fewer the warehouse counts.
const MISSING: u32 = 3;

/// What happened, as pairs of what must be and what is.
pub(super) struct Tour {
    /// What was checked, what it must be, and what it is.
    pub(super) checks: Vec<(&'static str, String, String)>,
    /// What there is in the end, by arithmetic.
    pub(super) stock: u32,
}

/// Goes through it all with one product whose stock is `before`.
pub(super) async fn tour(stack: &Stack, product: ProductId, before: u32) -> anyhow::Result<Tour> {
    let url = stack.product_url().unwrap_or_default();
    let admin = Api::new(&url, Secret::from(stack.token(Role::Admin)?))?;
    let viewer = Api::new(&url, Secret::from(stack.token(Role::Viewer)?))?;
    let nobody = Api::new(&url, Secret::from("no token at all".to_owned()))?;
    let path = format!("/v1/products/{product}/inventory");
    let mut checks = Vec::new();

    let body = || Some(json!({ "quantity": SET_TO, "expectedQuantity": before, "reason": "stocktaking" }));
    let keyed = [("Idempotency-Key", "demo-1")];
    let set = admin.send(Method::PATCH, &path, &keyed, body()).await?;
    checks.push(("PATCH of an admin", "200 OK".to_owned(), set.status.to_string()));
    let again = admin.send(Method::PATCH, &path, &keyed, body()).await?;
    let same = again.body == set.body && again.header("idempotent-replayed") == "true";
    checks.push(("the same again under its key: the same answer", true.to_string(), same.to_string()));
    let stale = admin.send(Method::PATCH, &path, &[("If-Match", "\"1\"")], body()).await?;
    checks.push((
        "PATCH of a version that is gone",
        StatusCode::PRECONDITION_FAILED.to_string(),
        stale.status.to_string(),
    ));
    for (who, api, expected) in [
        ("PATCH of a viewer", &viewer, StatusCode::FORBIDDEN),
        ("PATCH without a token", &nobody, StatusCode::UNAUTHORIZED),
    ] {
        let refused = api.send(Method::PATCH, &path, &[], body()).await?;
        checks.push((who, expected.to_string(), refused.status.to_string()));
    }

    // What was written is read, by whoever says so.
    let sequence = set.header("lomash-sequence").to_owned();
    let now = viewer.send(Method::GET, &path, &[("Lomash-Min-Sequence", &sequence)], None).await?;
    checks.push(("stock read after the write", SET_TO.to_string(), now.body["quantity"].to_string()));
    let earlier = sequence.parse::<u64>().unwrap_or_default().saturating_sub(1);
    let then = viewer.send(Method::GET, &format!("{path}?asOf={earlier}"), &[], None).await?;
    checks.push(("stock one event earlier", before.to_string(), then.body["quantity"].to_string()));
    let history = viewer.send(Method::GET, &format!("{path}/history?limit=1"), &[], None).await?;
    let why = history.body["items"][0]["reason"].as_str().unwrap_or_default().to_owned();
    checks.push(("why, by the history", "stocktaking".to_owned(), why));

    // The warehouse has counted a few less.
    let counted = SET_TO - MISSING;
    let count = json!({ "quantity": counted, "countedAt": Timestamp::now() });
    admin.call::<serde_json::Value>(Method::POST, &format!("{path}/counts"), Some(count)).await?;
    let started: Report = admin.call(Method::POST, "/v1/reconciliations", Some(json!({}))).await?;
    let (report, rows) = reconcile::wait(&admin, started.id).await?;
    checks.push(("reconciliation", Status::Completed.as_str().to_owned(), report.status.as_str().to_owned()));
    let corrections: Vec<i64> = rows.iter().filter_map(|row: &ReportRow| row.correction).collect();
    checks.push(("corrections", format!("[-{MISSING}]"), format!("{corrections:?}")));
    Ok(Tour { checks, stock: counted })
}
