//! A small real HTTP server that is slow, flaky, paged, malformed or endless, and what becomes of it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{self, HeaderMap as Headers, Uri};
use axum::response::{IntoResponse, Response as Reply};
use futures::stream;

use super::*;

const ONE: &str = r#"{"sku":"A","quantity":1,"countedAt":"2026-01-31T09:30:00Z"}"#;

/// Limits within which a test ends soon.
fn brisk() -> Limits {
    Limits {
        page: Duration::from_millis(400),
        whole: Duration::from_secs(20),
        page_bytes: 4_000,
        rows: 50,
        pages: 20,
        attempts: 3,
        first_pause: Duration::from_millis(5),
        longest_pause: Duration::from_millis(50),
    }
}

/// A warehouse that answers the n-th request (from 1) by `answer`.
struct Fake {
    url: String,
    asked: Arc<AtomicU32>,
}

impl Fake {
    async fn start<F>(answer: F) -> Self
    where
        F: Fn(u32, &Uri, &Headers) -> Reply + Clone + Send + Sync + 'static,
    {
        let asked = Arc::new(AtomicU32::new(0));
        let counter = asked.clone();
        let app = Router::new().fallback(move |uri: Uri, headers: Headers| {
            let reply = answer(counter.fetch_add(1, Ordering::SeqCst) + 1, &uri, &headers);
            async move { reply }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/figures", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { url, asked }
    }

    fn warehouse(&self, limits: Limits) -> Warehouse {
        Warehouse::with_limits(&Secret::from(self.url.clone()), None, limits).expect("a warehouse")
    }

    async fn figures(&self) -> Result<Vec<Given>, WarehouseError> {
        self.warehouse(brisk()).figures().await
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

fn json(text: impl Into<String>) -> Reply {
    ([("content-type", "application/json")], text.into()).into_response()
}

fn page(rows: usize, next: Option<&str>) -> Reply {
    let next = next.map_or("null".to_owned(), |next| format!("\"{next}\""));
    json(format!(r#"{{"total":9,"items":[{}],"next":{next}}}"#, vec![ONE; rows].join(",")))
}

fn endless(chunk: &'static str) -> Reply {
    let chunks = stream::repeat_with(move || Ok::<_, Infallible>(Bytes::from_static(chunk.as_bytes())));
    Body::from_stream(chunks).into_response()
}

/// The problem of each row that could not be read, and `None` for the others.
fn problems(rows: &[Given]) -> Vec<Option<&str>> {
    rows.iter().map(|row| row.as_ref().err().map(|row| row.problem.as_str())).collect()
}

#[tokio::test]
async fn an_array_an_object_and_lines_are_read_alike() {
    let array = format!("[{ONE},{ONE}]");
    let object = format!(r#" {{"next":null,"items":[{ONE},{ONE}]}}"#);
    let lines = format!("{ONE}\n\n{ONE}\n");
    for (form, text) in [("array", array), ("object", object), ("lines", lines)] {
        let fake = Fake::start(move |_, _, _| json(text.clone())).await;
        let rows = fake.figures().await.unwrap_or_else(|problem| panic!("{form}: {problem}"));
        let positions: Vec<_> = rows.iter().map(|row| row.as_ref().map(|figure| figure.position)).collect();
        assert_eq!(positions, [Ok(1), Ok(2)], "{form}");
    }
}

#[tokio::test]
async fn nothing_counted_is_no_mistake() {
    let fake = Fake::start(|_, _, _| json("[]")).await;
    assert_eq!(fake.figures().await.expect("an empty list"), []);
    let fake = Fake::start(|_, _, _| json(r#"{"items":[],"error":null}"#)).await;
    assert_eq!(fake.figures().await.expect("an object with an empty list"), []);
}

#[tokio::test]
async fn bad_rows_are_told_with_their_place_and_the_others_stand() {
    let id = "4cc31838-422a-5a4b-b97d-3f5fe96b750f";
    let at = r#""countedAt":"2026-01-31T09:30:00+02:00""#;
    let rows = [
        format!(r#"{{"productId":"{id}","quantity":7,{at},"shelf":"B4"}}"#),
        format!(r#"{{"quantity":7,{at}}}"#),
        format!(r#"{{"productId":"seven","quantity":7,{at}}}"#),
        format!(r#"{{"sku":7,"quantity":7,{at}}}"#),
        format!(r#"{{"sku":" A","quantity":7,{at}}}"#),
        format!(r#"{{"sku":"A",{at}}}"#),
        format!(r#"{{"sku":"A","quantity":-1,{at}}}"#),
        format!(r#"{{"sku":"A","quantity":1.5,{at}}}"#),
        format!(r#"{{"sku":"A","quantity":1000000001,{at}}}"#),
        r#"{"sku":"A","quantity":1}"#.to_owned(),
        r#"{"sku":"A","quantity":1,"countedAt":"yesterday"}"#.to_owned(),
        "17".to_owned(),
    ];
    let text = format!("[{}]", rows.join(","));
    let read = Fake::start(move |_, _, _| json(text.clone())).await.figures().await.expect("a list");
    assert_eq!(read.len(), rows.len());
    let first = read[0].as_ref().expect("a figure");
    assert_eq!(first.product_id.map(|id| id.to_string()).as_deref(), Some(id));
    assert_eq!((first.quantity, first.counted_at.to_string().as_str()), (7, "2026-01-31T07:30:00.000Z"));
    assert!(problems(&read)[1..].iter().all(Option::is_some), "{read:?}");
    assert_eq!(read[9].as_ref().expect_err("no instant").problem, "`countedAt` is missing");
    assert_eq!(read[9].as_ref().expect_err("no instant").sku.as_deref(), Some("A"));
    let positions: Vec<_> = read[1..].iter().map(|row| row.as_ref().expect_err("bad").position).collect();
    assert_eq!(positions, (2..=12).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_line_that_is_no_json_is_a_bad_row() {
    let fake = Fake::start(|_, _, _| json(format!("{ONE}\n{{\"sku\":\n{ONE}"))).await;
    let rows = fake.figures().await.expect("lines");
    assert!(matches!(problems(&rows)[..], [None, Some(_), None]), "{rows:?}");
}

#[tokio::test]
async fn pages_are_followed_by_header_and_by_body() {
    let fake = Fake::start(|_, uri, _| match uri.query() {
        None => page(2, Some("?page=2")),
        Some("page=2") => {
            let link = r#"</figures?page=1>; rel="prev", </figures?page=3,x>; title="a, b"; rel="last next""#;
            ([("link", link)], json(format!("[{ONE}]"))).into_response()
        }
        Some("page=3,x") => page(3, None),
        Some(other) => panic!("{other}"),
    })
    .await;
    let rows = fake.figures().await.expect("three pages");
    assert_eq!(rows.iter().flatten().map(|figure| figure.position).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(fake.asked(), 3);
}

#[tokio::test]
async fn a_next_page_elsewhere_is_not_asked_for() {
    let elsewhere = Fake::start(|_, _, _| page(1, None)).await;
    let target = elsewhere.url.clone();
    let fake = Fake::start(move |_, _, _| page(1, Some(&target))).await;
    let problem = fake.figures().await.expect_err("another origin");
    assert!(problem.to_string().contains("another origin"), "{problem}");
    assert_eq!(elsewhere.asked(), 0);
}

#[tokio::test]
async fn a_redirection_elsewhere_is_not_followed() {
    let elsewhere = Fake::start(|_, _, _| page(1, None)).await;
    let target = elsewhere.url.clone();
    let fake =
        Fake::start(move |_, _, _| (http::StatusCode::FOUND, [("location", target.clone())]).into_response()).await;
    let problem = fake.figures().await.expect_err("another origin");
    assert!(problem.to_string().contains("another origin"), "{problem}");
    assert_eq!(elsewhere.asked(), 0);
}

#[tokio::test]
async fn pages_in_a_circle_end() {
    let fake = Fake::start(|_, uri, _| page(1, Some(if uri.query().is_none() { "?again" } else { "/figures" }))).await;
    let problem = fake.figures().await.expect_err("a circle");
    assert!(matches!(problem, WarehouseError::BadNext { page: 2, .. }), "{problem}");
}

#[tokio::test]
async fn a_warehouse_that_fails_for_a_while_is_asked_again() {
    let fake = Fake::start(|request, _, _| match request {
        1 => http::StatusCode::SERVICE_UNAVAILABLE.into_response(),
        // The connection breaks in the middle of the body.
        2 => {
            let chunks = [Ok(Bytes::from_static(b"[")), Err(std::io::Error::other("cut"))];
            Body::from_stream(stream::iter(chunks)).into_response()
        }
        _ => page(1, None),
    })
    .await;
    assert_eq!(fake.figures().await.expect("the third try").len(), 1);
    assert_eq!(fake.asked(), 3);
}

#[tokio::test]
async fn a_warehouse_that_is_busy_is_left_alone_for_as_long_as_it_asks_within_bounds() {
    let fake = Fake::start(|request, _, _| match request {
        1 => (http::StatusCode::TOO_MANY_REQUESTS, [("retry-after", "3600")]).into_response(),
        _ => page(1, None),
    })
    .await;
    let limits = Limits { longest_pause: Duration::from_millis(300), ..brisk() };
    let started = Instant::now();
    assert_eq!(fake.warehouse(limits).figures().await.expect("the second try").len(), 1);
    assert!(started.elapsed() >= Duration::from_millis(300), "it waited {:?}", started.elapsed());
}

#[tokio::test]
async fn a_warehouse_that_stays_down_is_told_with_what_it_answered_last() {
    let fake = Fake::start(|_, _, _| http::StatusCode::BAD_GATEWAY.into_response()).await;
    let problem = fake.figures().await.expect_err("down");
    assert!(matches!(problem, WarehouseError::Failing { attempts: 3, page: 1, .. }), "{problem}");
    assert!(problem.to_string().contains("502"), "{problem}");
    assert_eq!(fake.asked(), 3);
}

#[tokio::test]
async fn nobody_there_is_a_clear_sentence() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://user:pass@{}/figures?key=hidden", listener.local_addr().expect("an address"));
    drop(listener);
    let warehouse = Warehouse::with_limits(&Secret::from(url), None, brisk()).expect("a warehouse");
    let problem = warehouse.figures().await.expect_err("nobody there").to_string();
    assert!(problem.contains("no connection"), "{problem}");
    assert!(!problem.contains("hidden") && !problem.contains("pass"), "{problem}");
}

#[tokio::test]
async fn what_we_did_wrong_is_not_asked_again() {
    let fake = Fake::start(|_, _, _| http::StatusCode::UNAUTHORIZED.into_response()).await;
    let problem = fake.figures().await.expect_err("401");
    assert!(problem.to_string().contains("WAREHOUSE_TOKEN"), "{problem}");
    assert_eq!(fake.asked(), 1);
}

#[tokio::test]
async fn the_token_is_sent_and_not_shown() {
    let fake = Fake::start(|_, _, headers| match headers.get("authorization") {
        Some(value) if value == "Bearer open-sesame" => page(1, None),
        _ => http::StatusCode::UNAUTHORIZED.into_response(),
    })
    .await;
    let token = Some(Secret::from("open-sesame".to_owned()));
    let warehouse = Warehouse::with_limits(&Secret::from(fake.url.clone()), token, brisk()).expect("a warehouse");
    assert_eq!(warehouse.figures().await.expect("let in").len(), 1);
    assert!(!format!("{warehouse:?}").contains("sesame"));
}

#[tokio::test]
async fn a_slow_page_is_given_up_and_asked_for_again() {
    let fake = Fake::start(|request, _, _| {
        if request > 1 {
            return page(1, None);
        }
        // Half a page, and then nothing.
        let chunks = stream::iter([Ok::<_, Infallible>(Bytes::from_static(b"["))]);
        Body::from_stream(futures::StreamExt::chain(chunks, stream::pending())).into_response()
    })
    .await;
    assert_eq!(fake.figures().await.expect("the second try").len(), 1);
    assert_eq!(fake.asked(), 2);
}

#[tokio::test]
async fn all_together_has_an_end() {
    let fake = Fake::start(|_, _, _| http::StatusCode::BAD_GATEWAY.into_response()).await;
    let limits = Limits { attempts: u32::MAX, whole: Duration::from_millis(300), ..brisk() };
    let problem = fake.warehouse(limits).figures().await.expect_err("too slow");
    assert!(matches!(problem, WarehouseError::TooSlow { rows: 0, .. }), "{problem}");
}

#[tokio::test]
async fn what_has_no_end_is_left_at_its_limit() {
    type Case = (&'static str, fn(u32) -> Reply);
    let cases: [Case; 4] = [
        ("bytes in one page", |_| endless("                ")),
        ("bytes in one page", |_| json(" ".repeat(5_000))),
        ("rows", |request| page(20, Some(&format!("?{request}")))),
        ("pages", |request| page(0, Some(&format!("?{request}")))),
    ];
    for (what, answer) in cases {
        let fake = Fake::start(move |request, _, _| answer(request)).await;
        match fake.figures().await {
            Err(WarehouseError::TooMuch { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{what}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn what_is_no_list_is_named() {
    for text in
        ["", "<html>busy</html>", "null", "{\"error\":\n1}", "[1,", r#"{"items":[1],"next":7}"#, r#"{"items":[]}x"#]
    {
        let fake = Fake::start(move |_, _, _| json(text)).await;
        match fake.figures().await {
            Err(WarehouseError::Malformed { page: 1, .. }) => assert_eq!(fake.asked(), 1, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn what_is_something_else_ends_the_run_and_says_why() {
    let good = ONE;
    let cases = [
        ("application/json", r#"{"error":"internal"}"#.to_owned(), "internal"),
        ("application/json", r#"{"data":[]}"#.to_owned(), "an object without `items`"),
        ("application/json", r#"{"status":"ok"}"#.to_owned(), "an object without `items`"),
        ("application/json", r#"{"quantity":1,"total":7}"#.to_owned(), "an object without `items`"),
        ("application/json", r#"{"items":null}"#.to_owned(), "null"),
        ("application/json", r#"{"items":{"a":1}}"#.to_owned(), "an array of rows"),
        ("application/json", format!(r#"{{"items":[{good}],"error":"timeout"}}"#), "timeout"),
        ("application/json", format!(r#"{{"items":[{good}],"items":[]}}"#), "duplicate field `items`"),
        ("application/json", format!(r#"[{good},{{"error":"timeout"}}]"#), "row 2 is no figure, it has `error`"),
        ("application/json", "[{}]".to_owned(), "row 1 is no figure"),
        ("application/json", " ".to_owned(), "it is empty"),
        ("application/x-ndjson", String::new(), "it is empty"),
        ("application/x-ndjson", r#"{"error":"internal"}"#.to_owned(), "row 1 is no figure"),
        ("application/x-ndjson", format!("{good}\n{{\"error\":\"internal\"}}\n"), "row 2 is no figure"),
        ("text/html", format!("[{good}]"), "its content type is `text/html`"),
        ("text/csv", "sku,quantity\n".to_owned(), "its content type is `text/csv`"),
        ("text/plain", "busy".to_owned(), "neither `[` nor `{`"),
    ];
    for (media_type, text, expected) in cases {
        let body = text.clone();
        let fake = Fake::start(move |_, _, _| ([("content-type", media_type)], body.clone()).into_response()).await;
        match fake.figures().await {
            Err(problem @ WarehouseError::Malformed { page: 1, .. }) => {
                assert!(problem.to_string().contains(expected), "{text}: {problem}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    // What servers call a file that they know nothing of.
    for media_type in ["text/plain", "application/octet-stream", "application/vnd.wms+json; charset=utf-8"] {
        let fake =
            Fake::start(move |_, _, _| ([("content-type", media_type)], format!("[{ONE}]")).into_response()).await;
        assert_eq!(fake.figures().await.expect(media_type).len(), 1);
    }
}

#[tokio::test]
async fn a_row_that_is_no_figure_of_one_product_is_refused_by_itself() {
    let at = r#""countedAt":"2026-01-31T09:30:00Z""#;
    let rows = [
        format!(r#"{{"sku":"A","quantity":1,"quantity":2,{at}}}"#),
        format!(r#"{{"sku":"A","sku":"A","quantity":1,{at}}}"#),
        format!(r#"{{"sku":"A","quantity":5.0,{at}}}"#),
        format!(r#"{{"sku":"A","quantity":5e0,{at}}}"#),
        format!(r#"{{"sku":"A","quantity":"5",{at}}}"#),
        format!(r#"{{"sku":"A","quantity":[5],{at}}}"#),
        format!(r#"{{"sku":"A","quantity":99999999999999999999,{at}}}"#),
        r#"["A",5,"2026-01-31T09:30:00Z"]"#.to_owned(),
    ];
    let texts = [format!("[{},{ONE}]", rows.join(",")), format!("{ONE}\r{}\r", rows.join("\r"))];
    for text in texts {
        let fake = Fake::start(move |_, _, _| json(text.clone())).await;
        let read = fake.figures().await.expect("rows");
        assert_eq!(read.iter().filter(|row| row.is_ok()).count(), 1, "{read:?}");
        let told: Vec<_> = problems(&read).into_iter().flatten().collect();
        assert_eq!(told.len(), rows.len(), "{told:?}");
        assert_eq!(told[..2], ["`quantity` is there twice", "`sku` is there twice"]);
        assert_eq!(told[7], "the row is no object");
    }
}

#[test]
fn only_web_addresses_are_taken() {
    for url in ["", "warehouse", "ftp://warehouse/", "http://", "file:///etc/passwd"] {
        assert!(Warehouse::new(&Secret::from(url.to_owned()), None).is_err(), "{url}");
    }
}

#[test]
fn retry_after_is_seconds_or_a_date() {
    let now = OffsetDateTime::UNIX_EPOCH;
    let asked = |text: &'static str| {
        let headers = HeaderMap::from_iter([(RETRY_AFTER, http::HeaderValue::from_static(text))]);
        retry_after(&headers, now)
    };
    assert_eq!(asked("7"), Some(Duration::from_secs(7)));
    assert_eq!(asked("Thu, 01 Jan 1970 00:00:09 GMT"), Some(Duration::from_secs(9)));
    assert_eq!(asked("Wed, 31 Dec 1969 00:00:09 GMT"), Some(Duration::ZERO));
    assert_eq!(asked("soon"), None);
}
