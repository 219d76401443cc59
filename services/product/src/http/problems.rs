//! The problems of this service: what a rejected command is called over HTTP.

use axum::http::StatusCode;
use lomash_web::Problem;
use lomash_web::problem::ProblemType;
pub(super) use lomash_web::problem::sentence;
use lomash_web::problem_responses;
use serde_json::json;

use crate::committer::CommandError;
use crate::inventory::Rejection;

macro_rules! problem_types {
    ($($(#[$doc:meta])* $name:ident = ($slug:literal, $status:ident, $title:literal, $meaning:literal);)*) => {
        $($(#[$doc])* pub static $name: ProblemType = ProblemType::new($slug, StatusCode::$status, $title, $meaning);)*

        /// Every type of this service.
        pub static TYPES: &[&ProblemType] = &[$(&$name),*];
    };
}

problem_types! {
    /// 404: no such product.
    PRODUCT_NOT_FOUND = ("product-not-found", NOT_FOUND, "No such product",
        "No product is registered under the id.");
    /// 404: no such order, or not yet.
    ORDER_NOT_DECIDED = ("order-not-decided", NOT_FOUND, "Order not decided",
        "No decision about the order is on record: it was never published, or it is still on its way.");
    /// 404: not at that moment.
    NOT_YET_REGISTERED = ("not-yet-registered", NOT_FOUND, "Not yet registered",
        "The product was registered later than the moment asked for.");
    /// 409: it is there with other details.
    PRODUCT_ALREADY_REGISTERED = ("product-already-registered", CONFLICT, "Product already registered",
        "A product is registered under the id, with other details. Change it with PATCH.");
    /// 409: another product has the sku.
    SKU_TAKEN = ("sku-taken", CONFLICT, "Sku taken",
        "The sku belongs to the product in `owner`.");
    /// 409: more would be taken away than there is.
    BELOW_ZERO = ("below-zero", CONFLICT, "Not enough stock",
        "The adjustment would leave less than nothing; `quantity` is the stock.");
    /// 409: the stock is not what was expected.
    UNEXPECTED_QUANTITY = ("unexpected-quantity", CONFLICT, "Unexpected quantity",
        "The stock is `actual` and not the `expectedQuantity` of the request. Look at it again and decide anew.");
    /// 409: a newer count is on record.
    COUNT_SUPERSEDED = ("count-superseded", CONFLICT, "Count superseded",
        "A count of the product that is as new or newer is on record, taken at `newest`.");
    /// 409: carried out before, under an id that is not remembered any more.
    ALREADY_CARRIED_OUT = ("already-carried-out", CONFLICT, "Already carried out",
        "The same command was carried out before.");
    /// 404: no such run.
    RECONCILIATION_NOT_FOUND = ("reconciliation-not-found", NOT_FOUND, "No such reconciliation run",
        "No report of a reconciliation run is kept under the id.");
    /// 409: the run does not wait for approval.
    RECONCILIATION_NOT_WAITING = ("reconciliation-not-waiting", CONFLICT, "Reconciliation run not waiting",
        "The run does not wait for approval; `runStatus` is where it stands.");
    /// 409: there is no warehouse to ask.
    NO_WAREHOUSE = ("no-warehouse", CONFLICT, "No warehouse",
        "Figures of the warehouse were asked for, and the service is not told where it is (`WAREHOUSE_URL`).");
    /// 404: no such letter.
    DEAD_LETTER_NOT_FOUND = ("dead-letter-not-found", NOT_FOUND, "No such dead letter",
        "No dead letter is kept under the sequence: it was redriven or discarded, or never was.");
    /// 409: its message cannot be brought back.
    NO_WAY_BACK = ("no-way-back", CONFLICT, "No way back",
        "The message cannot be brought back where it came from; the letter stays. `detail` says what to do instead.");
    /// 422: the key was used for another request.
    IDEMPOTENCY_KEY_REUSED = ("idempotency-key-reused", UNPROCESSABLE_ENTITY, "Idempotency key reused",
        "The `Idempotency-Key` was used for another request (another body, route, product or `If-Match`) within the time that keys are kept, at least 24 hours. Use a new key for a new request.");
    /// 503: no decision in time.
    OUTCOME_UNKNOWN = ("outcome-unknown", SERVICE_UNAVAILABLE, "Outcome unknown",
        "The write was not decided in time. It may yet be carried out: repeat it under the same `Idempotency-Key`, which tells.");
}

/// Seconds after which keys may be forgotten and others taken: they are counted by the day.
const KEYS_RETRY_SECONDS: u64 = 600;

/// What a command that was not carried out is answered with.
pub(super) fn refused(error: &CommandError) -> Problem {
    let detail = sentence(&error.to_string());
    let rejection = match error {
        CommandError::Rejected(rejection) => rejection,
        CommandError::TooLarge { .. } | CommandError::Unstorable { .. } => return Problem::unprocessable(detail),
        CommandError::IdentityTaken { .. } => return Problem::new(&ALREADY_CARRIED_OUT, detail),
        CommandError::Stopping => return Problem::unavailable(detail, 1),
        CommandError::Undecided => return Problem::new(&OUTCOME_UNKNOWN, detail).with_retry_after(1),
    };
    match rejection {
        Rejection::UnknownProduct => Problem::new(&PRODUCT_NOT_FOUND, detail),
        Rejection::AlreadyRegistered => Problem::new(&PRODUCT_ALREADY_REGISTERED, detail),
        Rejection::SkuTaken { owner } => Problem::new(&SKU_TAKEN, detail).with("owner", owner.to_string()),
        Rejection::BadText { field } | Rejection::OutOfRange { field } => {
            Problem::invalid_field(pointer(field), detail)
        }
        Rejection::BelowZero { quantity, .. } => Problem::new(&BELOW_ZERO, detail).with("quantity", *quantity),
        Rejection::UnexpectedQuantity { expected, actual } => {
            Problem::new(&UNEXPECTED_QUANTITY, detail).with("expected", *expected).with("actual", *actual)
        }
        Rejection::VersionMismatch { actual } => {
            Problem::precondition_failed(detail).with("version", json!(format!("\"{actual}\"")))
        }
        Rejection::KeyReused => Problem::new(&IDEMPOTENCY_KEY_REUSED, detail),
        Rejection::CountSuperseded { newest } => {
            Problem::new(&COUNT_SUPERSEDED, detail).with("newest", newest.to_string())
        }
        Rejection::CountInFuture { .. } => Problem::invalid_field("/countedAt", detail),
        Rejection::TooManyKeys { of_caller: true } => Problem::too_many_requests(detail, KEYS_RETRY_SECONDS),
        Rejection::TooManyKeys { of_caller: false } => Problem::unavailable(detail, KEYS_RETRY_SECONDS),
        Rejection::Repeated => Problem::new(&ALREADY_CARRIED_OUT, detail),
    }
}

/// Fields as the aggregate calls them, where they are in a body.
fn pointer(field: &str) -> String {
    match field {
        "initial quantity" => "/initialQuantity".to_owned(),
        "low-stock threshold" => "/lowStockThreshold".to_owned(),
        other => format!("/{other}"),
    }
}

problem_responses! {
    /// What a read can be refused with.
    pub(super) ReadProblems {
        BadRequest = 400, "Parameters are not as they must be";
        Unauthorized = 401, "No token, or none that is believed";
        Forbidden = 403, "The token's role does not reach";
        NotFound = 404, "There is no such thing";
        TooManyRequests = 429, "The caller's share is used up";
        Unavailable = 503, "Not now, or not yet projected";
        Timeout = 504, "It took too long";
    }
}

problem_responses! {
    /// What a write can be refused with.
    pub(super) WriteProblems {
        BadRequest = 400, "The body or a header is not as it must be";
        Unauthorized = 401, "No token, or none that is believed";
        Forbidden = 403, "Needs the role ADMIN";
        NotFound = 404, "There is no such product";
        Conflict = 409, "What is there does not admit it";
        PreconditionFailed = 412, "The product is not at a version of If-Match";
        TooLarge = 413, "The body is too large";
        UnsupportedMediaType = 415, "The body is not of a type that is taken";
        Unprocessable = 422, "The Idempotency-Key was used for another request within the last 24 hours";
        TooManyRequests = 429, "The caller's share is used up";
        Unavailable = 503, "Not now; the outcome may be unknown";
        Timeout = 504, "It took too long";
    }
}

problem_responses! {
    /// What an import can be refused with as a whole.
    pub(super) ImportProblems {
        BadRequest = 400, "The body, its header line or a parameter is not as it must be, or the body was cut off";
        Unauthorized = 401, "No token, or none that is believed";
        Forbidden = 403, "Needs the role ADMIN";
        TooLarge = 413, "The body is too large";
        UnsupportedMediaType = 415, "The body is not of a type that is taken";
        TooManyRequests = 429, "The caller's share is used up";
        Unavailable = 503, "Not now, or too many imports at work";
        Timeout = 504, "It took too long to receive the body";
    }
}
