//! Imports over HTTP on real servers: what each row comes to, what a bad one does to the others, and what a client that
//! is slow, goes away or sends too much costs.
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use lomash::stack::Service;
use lomash_contract::LedgerEvent;
use lomash_tests::{PATIENCE, World, eventually, start_until_ready, token};
use lomash_web::Role;
use product_service::catalogue;
use product_service::http::{MAX_BODY_BYTES, MAX_IMPORTS};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use uuid::Uuid;

/// Products of an ordinary import: several chunks, and more than are at work at once.
const PRODUCTS: usize = 3_000;

/// Products of the one that is measured.
const MANY_PRODUCTS: usize = 100_000;

const PRODUCTS_PATH: &str = "/v1/products:import";
const COUNTS_PATH: &str = "/v1/inventory/counts:import";

/// A world with one service, and a client of it.
struct Importing {
    world: World,
    service: Service,
    client: reqwest::Client,
    url: String,
    token: String,
    admin: Uuid,
}

/// Lines of an answer, and the summary behind them.
#[derive(Debug)]
struct Imported {
    rows: Vec<Value>,
    summary: Value,
}

impl Imported {
    /// Reads a body; every line is JSON and the last one is the summary.
    fn read(text: &str) -> Result<Self> {
        let mut rows = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        let summary = rows.pop().unwrap_or_default()["summary"].clone();
        ensure!(summary.is_object(), "no summary at the end of {text}");
        ensure!(summary["rows"] == rows.len(), "{} rows are told: {summary}", rows.len());
        for status in ["registered", "revised", "recorded", "unchanged", "refused", "skipped"] {
            let told = rows.iter().filter(|row| row["status"] == status).count();
            ensure!(summary[status] == told, "{told} rows are {status}: {summary}");
        }
        Ok(Self { rows, summary })
    }

    /// The lines with this status.
    fn lines(&self, status: &str) -> Vec<u64> {
        let rows = self.rows.iter().filter(|row| row["status"] == status);
        rows.map(|row| row["line"].as_u64().unwrap()).collect()
    }
}

impl Importing {
    async fn start() -> Result<Self> {
        Self::start_with(&[]).await
    }

    async fn start_with(variables: &[(&str, &str)]) -> Result<Self> {
        let world = World::start().await?;
        let mut service = world.service("one")?.env("RECONCILIATION_SCHEDULE", "off");
        for (name, value) in variables {
            service = service.env(*name, *value);
        }
        start_until_ready(&mut service).await?;
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder().timeout(PATIENCE * 5).no_proxy().build()?;
        let (url, admin) = (world.url("one"), Uuid::new_v4());
        Ok(Self { world, service, client, url, token: token(Role::Admin, admin)?, admin })
    }

    async fn send(&self, path: &str, media_type: &str, body: impl Into<reqwest::Body>) -> Result<reqwest::Response> {
        let request = self.client.post(format!("{}{path}", self.url)).bearer_auth(&self.token);
        Ok(request.header("content-type", media_type).body(body).send().await?)
    }

    async fn import(&self, path: &str, media_type: &str, body: impl Into<reqwest::Body>) -> Result<Imported> {
        let answer = self.send(path, media_type, body).await?;
        ensure!(answer.status() == 200, "{}: {}", answer.status(), answer.text().await?);
        ensure!(answer.headers()["content-type"] == "application/x-ndjson");
        Imported::read(&answer.text().await?)
    }

    /// Sends what is to be refused as a whole; the type and detail of the problem.
    async fn refused(&self, path: &str, media_type: &str, body: impl Into<reqwest::Body>) -> Result<(u16, String)> {
        let answer = self.send(path, media_type, body).await?;
        let status = answer.status().as_u16();
        ensure!(answer.headers()["content-type"] == "application/problem+json");
        let problem: Value = answer.json().await?;
        Ok((status, format!("{} {}", problem["type"].as_str().unwrap(), problem["detail"].as_str().unwrap())))
    }

    async fn get(&self, path: &str, min_sequence: &Value) -> Result<Value> {
        let request = self.client.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        Ok(request.header("lomash-min-sequence", min_sequence.to_string()).send().await?.json().await?)
    }

    /// A connection on which the headers of an import are sent, and nothing of its body.
    async fn begin(&self, length: usize) -> Result<TcpStream> {
        let address = self.url.strip_prefix("http://").unwrap();
        let mut stream = TcpStream::connect(address).await?;
        let head = format!(
            "POST {PRODUCTS_PATH} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {}\r\ncontent-type: text/csv\r\n\
             content-length: {length}\r\n\r\n",
            self.token
        );
        stream.write_all(head.as_bytes()).await?;
        Ok(stream)
    }

    /// Waits until so many imports find a place.
    async fn places_are_free(&self) -> Result<()> {
        eventually("all places of imports to be free", PATIENCE, async || {
            let mut all = Vec::new();
            for _ in 0..MAX_IMPORTS {
                // Each holds a place until its body is there.
                let mut stream = self.begin(2).await?;
                stream.write_all(b"s").await?;
                all.push(stream);
            }
            for stream in &mut all {
                stream.write_all(b"k").await?;
                let mut head = [0; 12];
                stream.read_exact(&mut head).await?;
                // A header without columns is refused once it has a place; 503 is for those without one.
                if &head != b"HTTP/1.1 400" {
                    return Ok(None);
                }
            }
            Ok(Some(()))
        })
        .await
    }
}

fn catalogue_of(products: usize) -> String {
    let mut csv = String::from("sku,name,category,quantity,threshold\n");
    for number in 1..=products {
        writeln!(csv, "IMP-{number:06},\"Worktop, oak {number}\",worktops,{},{}", number % 50, number % 5).unwrap();
    }
    csv
}

#[tokio::test]
async fn a_catalogue_is_imported_row_by_row_and_again_without_a_change() -> Result<()> {
    let importing = Importing::start().await?;
    let mut csv = catalogue_of(PRODUCTS).into_bytes();
    // Lines 3002 to 3006 are bad, each in its way, and 3007 is good again.
    csv.extend_from_slice(b"IMP-000001,Twice,,1,\n,No sku,,1,\nBAD-1,Negative,,-1,\nBAD-2,\"tab\there\",,1,\n");
    csv.extend_from_slice(b"BAD-3,not UTF-8 \xff,,1,\nLAST-1,The last one,,7,\n");
    let first =
        importing.import(&format!("{PRODUCTS_PATH}?reason=spring%20catalogue"), "text/csv", csv.clone()).await?;
    assert_eq!(first.summary["registered"], PRODUCTS + 1);
    assert_eq!(first.lines("refused"), [3002, 3003, 3004, 3005, 3006]);
    assert_eq!(first.summary["complete"], true);
    let lines: Vec<u64> = first.rows.iter().map(|row| row["line"].as_u64().unwrap()).collect();
    assert!(lines.is_sorted(), "results come in the order of the rows");
    let refused = first.rows.iter().find(|row| row["status"] == "refused").unwrap();
    assert_eq!(refused["problem"]["status"], 400);
    assert!(refused["problem"]["detail"].as_str().unwrap().contains("line 2"), "{refused}");

    // What was written can be read, and who and why is on record.
    let sku = "LAST-1".parse()?;
    let product =
        importing.get(&format!("/v1/products/{}", catalogue::product_id(&sku)), &first.summary["sequence"]).await?;
    assert_eq!((&product["name"], &product["quantity"]), (&json!("The last one"), &json!(7)), "{product}");
    let messages = importing.world.messages().await?;
    let last = messages.last().unwrap();
    assert_eq!(last.carried.reason.as_deref(), Some("spring catalogue"));
    let mut by = messages.iter().filter_map(|message| match message.parse().ok()?.payload {
        LedgerEvent::InventoryUpdated(updated) => Some(updated.updated_by.to_string()),
        _ => None,
    });
    assert!(by.all(|by| by == importing.admin.to_string()));

    let before = importing.world.last_sequence().await?;
    let again = importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    assert_eq!((&again.summary["unchanged"], &again.summary["refused"]), (&json!(PRODUCTS + 1), &json!(5)));
    assert_eq!(importing.world.last_sequence().await?, before, "a repeated import writes nothing");

    // Known products get the details and keep their stock.
    let revised = "sku,name,quantity\nLAST-1,Another name,99\n";
    let revised = importing.import(PRODUCTS_PATH, "text/csv", revised).await?;
    assert_eq!(revised.lines("revised"), [2]);
    let renamed = json!([{ "field": "name", "before": "The last one", "after": "Another name" }]);
    assert_eq!(revised.rows[0]["changes"], renamed);
    let product =
        importing.get(&format!("/v1/products/{}", catalogue::product_id(&sku)), &revised.summary["sequence"]).await?;
    assert_eq!((&product["name"], &product["quantity"]), (&json!("Another name"), &json!(7)), "{product}");
    importing.world.verified().await?;
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn ndjson_rows_are_registrations_and_bad_ones_say_where() -> Result<()> {
    let importing = Importing::start().await?;
    let id = Uuid::new_v4();
    let mut body = String::new();
    for number in 0..2_000 {
        writeln!(body, "{}", json!({ "sku": format!("ND-{number}"), "name": "n", "initialQuantity": 1 }))?;
    }
    writeln!(body, "{}", json!({ "sku": "OWN-ID", "productId": id, "name": "n", "reason": "sample" }))?;
    writeln!(body, "{}", json!({ "sku": "BAD", "name": "n", "price": 1 }))?;
    writeln!(body, "{}", json!({ "sku": "BAD", "name": "n", "initialQuantity": 1_000_000_001 }))?;
    writeln!(body, "not JSON")?;
    writeln!(body, "{}", json!({ "sku": "LONG", "name": "x".repeat(100_000) }))?;
    writeln!(body)?;
    write!(body, "{}", json!({ "sku": "OWN-ID", "productId": Uuid::new_v4(), "name": "the sku again" }))?;
    let imported = importing.import(PRODUCTS_PATH, "application/x-ndjson; charset=utf-8", body).await?;
    assert_eq!(imported.summary["registered"], 2_001);
    assert_eq!(imported.lines("refused"), [2002, 2003, 2004, 2005, 2007]);
    let of = |line: u64| imported.rows.iter().find(|row| row["line"] == line).unwrap();
    assert_eq!(of(2001)["productId"], id.to_string());
    let pointer = |line: u64| &of(line)["problem"]["errors"][0]["pointer"];
    assert_eq!((pointer(2002), pointer(2003)), (&json!("/price"), &json!("/initialQuantity")));
    assert_eq!(pointer(2007), "/sku");
    // The sku of another product: decided by the ledger, and told as elsewhere.
    let taken = json!({ "sku": "OWN-ID", "name": "n" }).to_string();
    let taken = importing.import(PRODUCTS_PATH, "application/x-ndjson", taken).await?;
    assert_eq!(taken.rows[0]["problem"]["owner"], id.to_string());
    assert_eq!(taken.rows[0]["problem"]["status"], 409);
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn a_dry_run_says_what_would_happen_and_writes_nothing() -> Result<()> {
    let importing = Importing::start().await?;
    let csv = "sku,name,quantity\nA-1,one,1\nA-2,two,2\n";
    importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    let before = importing.world.last_sequence().await?;
    let csv = "sku,name,quantity\nA-1,one,1\nA-2,two and a half,2\nA-3,three,3\nA-4,four,none\n";
    for policy in ["goodRows", "allOrNothing"] {
        let path = format!("{PRODUCTS_PATH}?dryRun=true&policy={policy}");
        let imported = importing.import(&path, "text/csv", csv).await?;
        let statuses: Vec<&str> = imported.rows.iter().map(|row| row["status"].as_str().unwrap()).collect();
        assert_eq!(statuses, ["unchanged", "revised", "registered", "refused"]);
        assert_eq!((&imported.summary["dryRun"], &imported.summary["policy"]), (&json!(true), &json!(policy)));
        assert_eq!(importing.world.last_sequence().await?, before);
    }
    // Then what was foretold comes to pass.
    let imported = importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    let statuses: Vec<&str> = imported.rows.iter().map(|row| row["status"].as_str().unwrap()).collect();
    assert_eq!(statuses, ["unchanged", "revised", "registered", "refused"]);
    importing.world.close();
    Ok(())
}

/// What a file does not name stays; what it names changes, and is told before and after, in a dry run as well.
#[tokio::test]
async fn an_import_changes_what_the_file_names_and_nothing_else() -> Result<()> {
    let importing = Importing::start().await?;
    let id = catalogue::product_id(&"A-1".parse()?);
    let path = format!("/v1/products/{id}");
    let csv = "sku,name,category,quantity,threshold\nA-1,one,worktops,5,7\n";
    importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    let patch = importing.client.patch(format!("{}{path}", importing.url)).bearer_auth(&importing.token);
    ensure!(patch.json(&json!({ "active": false })).send().await?.status() == 200);

    let ndjson = "application/x-ndjson";
    let steps: [(&str, &str, Value, Value); 9] = [
        ("text/csv", csv, json!(null), json!(["one", "worktops", 7, false])),
        ("text/csv", "sku,name,quantity\nA-1,one,99\n", json!(null), json!(["one", "worktops", 7, false])),
        (
            ndjson,
            r#"{"sku":"A-1","name":"one","initialQuantity":99}"#,
            json!(null),
            json!(["one", "worktops", 7, false]),
        ),
        (
            "text/csv",
            "sku,category\nA-1,\n",
            json!([{ "field": "category", "before": "worktops", "after": null }]),
            json!(["one", null, 7, false]),
        ),
        (
            ndjson,
            r#"{"sku":"A-1","lowStockThreshold":null}"#,
            json!([{ "field": "lowStockThreshold", "before": 7, "after": null }]),
            json!(["one", null, null, false]),
        ),
        (
            "text/csv",
            "sku,threshold,name\nA-1,0,two\n",
            json!([
                { "field": "name", "before": "one", "after": "two" },
                { "field": "lowStockThreshold", "before": null, "after": 0 },
            ]),
            json!(["two", null, 0, false]),
        ),
        (
            "text/csv",
            "sku,active\nA-1,TRUE\n",
            json!([{ "field": "active", "before": false, "after": true }]),
            json!(["two", null, 0, true]),
        ),
        (
            ndjson,
            r#"{"sku":"A-1","category":"sinks"}"#,
            json!([{ "field": "category", "before": null, "after": "sinks" }]),
            json!(["two", "sinks", 0, true]),
        ),
        ("text/csv", "sku,active\nA-1,yes\n", json!(null), json!(["two", "sinks", 0, true])),
    ];
    for (form, body, changes, after) in steps {
        let before = importing.world.last_sequence().await?;
        let foretold = importing.import(&format!("{PRODUCTS_PATH}?dryRun=true"), form, body).await?;
        assert_eq!(importing.world.last_sequence().await?, before, "a dry run writes nothing");
        let done = importing.import(PRODUCTS_PATH, form, body).await?;
        for imported in [&foretold, &done] {
            let status = if changes.is_null() { "unchanged" } else { "revised" };
            assert_eq!(imported.rows[0]["status"], status, "{body}: {imported:?}");
            assert_eq!(imported.rows[0]["changes"], changes, "{body}: {imported:?}");
        }
        let last = json!(importing.world.last_sequence().await?);
        let product = importing.get(&path, &last).await?;
        let found = json!([product["name"], product["category"], product["lowStockThreshold"], product["active"]]);
        assert_eq!(found, after, "{body}");
        assert_eq!(product["quantity"], 5, "{body}");
    }

    // A new product needs a name, and what cannot be taken away is not.
    let refused = [
        ("text/csv", "sku,active\nNEW-1,true\n", "needs a name"),
        (ndjson, r#"{"sku":"NEW-1","active":true}"#, "needs a name"),
        ("text/csv", "sku,name\nA-1,\n", "Name is empty"),
        ("text/csv", "sku,active\nA-1,\n", "Active is empty"),
        (ndjson, r#"{"sku":"A-1","name":null}"#, "/name"),
        (ndjson, r#"{"sku":"A-1","active":null}"#, "/active"),
        (ndjson, r#"["A-1","one"]"#, "expected struct"),
    ];
    for (form, body, expected) in refused {
        for query in ["?dryRun=true", ""] {
            let imported = importing.import(&format!("{PRODUCTS_PATH}{query}"), form, body).await?;
            assert_eq!(imported.rows[0]["status"], "refused", "{body}: {imported:?}");
            assert!(imported.rows[0]["problem"].to_string().contains(expected), "{body}: {imported:?}");
        }
    }
    importing.world.verified().await?;
    importing.world.close();
    Ok(())
}

/// What a spreadsheet or a missing quote made of a row is refused with its reason; it becomes no stock, no sku, no count.
#[tokio::test]
async fn damaged_rows_are_refused_with_their_reason() -> Result<()> {
    let importing = Importing::start().await?;
    let rows = [
        ("C4-z,thing,1,800", "The row has 4 cells, the header has 3"),
        ("C4-y,\"19\" rack, black\",5", "The row has 4 cells, the header has 3"),
        ("C4-x,thing,\"1,800\"", "without a separator between its digits"),
        ("C4-w,thing,1 800", "without a separator between its digits"),
        ("#N/A,thing,1", "is an error of a spreadsheet"),
        ("\"=\"\"00123\"\"\",thing,1", "is a formula of a spreadsheet"),
        ("1.2E+12,thing,1", "whose digits are lost"),
        ("C4-v,#REF!,1", "is an error of a spreadsheet"),
        ("C4-u,th\u{200b}ing,1", "contains U+200B, an invisible character, at position 3"),
        ("C4-t\u{202e},thing,1", "contains U+202E"),
        ("C4-s,\u{a0}\u{2003},1", "Name is empty"),
        ("C4-r,a\u{0}b,1", "contains U+0000, a control character, at position 2"),
        ("C4-q,thing", "there is no `quantity`"),
    ];
    let mut csv = "\u{feff}sku,name,quantity\n".to_owned();
    rows.iter().for_each(|(row, _)| writeln!(csv, "{row}").unwrap());
    csv.push_str("GOOD-1,ku\u{308}che,3,,\n");
    let imported = importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    for (row, (text, reason)) in imported.rows.iter().zip(rows) {
        assert_eq!(row["status"], "refused", "{text}");
        assert!(row["problem"]["detail"].as_str().unwrap().contains(reason), "{text}: {row}");
    }
    assert_eq!(imported.lines("registered"), [rows.len() as u64 + 2]);
    let id = catalogue::product_id(&"GOOD-1".parse()?);
    let product = importing.get(&format!("/v1/products/{id}"), &imported.summary["sequence"]).await?;
    assert_eq!((&product["name"], &product["quantity"]), (&json!("küche"), &json!(3)));

    let counts = "sku,quantity,countedAt\nGOOD-1,1,795,2026-01-31T09:30:00Z\nGOOD-1,\"1,795\",2026-01-31T09:30:00Z\n";
    let imported = importing.import(COUNTS_PATH, "text/csv", counts).await?;
    assert_eq!(imported.lines("refused"), [2, 3]);
    assert!(imported.rows[0]["problem"]["detail"].as_str().unwrap().contains("4 cells, the header has 3"));

    // CR alone ends lines, and only the bad row is called bad.
    let mac = "sku,name,quantity,price\rK,one,5,\rL,two,bad,\rM,three,5,\r";
    let imported = importing.import(&format!("{PRODUCTS_PATH}?policy=allOrNothing"), "text/csv", mac).await?;
    assert_eq!((imported.lines("refused"), imported.lines("skipped")), (vec![3], vec![2, 4]));
    assert_eq!(imported.summary["ignoredColumns"], json!(["price"]));
    let lines = "{\"sku\":\"K\",\"name\":\"k\"}\r{\"sku\":\"L\"}\r\r{\"sku\":\"M\",\"name\":\"m\"}\r\n";
    let imported =
        importing.import(&format!("{PRODUCTS_PATH}?policy=allOrNothing"), "application/x-ndjson", lines).await?;
    assert_eq!((imported.lines("refused"), imported.lines("skipped")), (vec![2], vec![1, 4]));
    let (status, problem) = importing.refused(PRODUCTS_PATH, "text/csv", "sku;name;quantity\nA;b;1\n").await?;
    assert!(status == 400 && problem.contains("semicolons"), "{problem}");
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn all_or_nothing_writes_nothing_when_one_row_is_refused() -> Result<()> {
    let importing = Importing::start().await?;
    let owner = Uuid::new_v4();
    let taken = json!({ "sku": "TAKEN", "productId": owner, "name": "n" }).to_string();
    importing.import(PRODUCTS_PATH, "application/x-ndjson", taken).await?;
    let before = importing.world.last_sequence().await?;
    let path = format!("{PRODUCTS_PATH}?policy=allOrNothing");
    let good = catalogue_of(PRODUCTS);
    // One is refused for what it says, another for what is in the ledger.
    for bad in ["X-1,name,,many,\n", "TAKEN,name,,1,\n"] {
        let imported = importing.import(&path, "text/csv", format!("{good}{bad}")).await?;
        assert_eq!(imported.lines("refused"), [PRODUCTS as u64 + 2]);
        assert_eq!((&imported.summary["skipped"], &imported.summary["complete"]), (&json!(PRODUCTS), &json!(true)));
        assert_eq!(importing.world.last_sequence().await?, before, "{bad}");
    }
    let hopeless = format!("sku,name,quantity\n{}", ",,\nX,,\n".repeat(2_000));
    let imported = importing.import(&path, "text/csv", hopeless).await?;
    assert_eq!((&imported.summary["refused"], &imported.summary["complete"]), (&json!(1_000), &json!(false)));
    assert_eq!(imported.summary["problem"]["status"], 422);
    let imported = importing.import(&path, "text/csv", good).await?;
    assert_eq!(imported.summary["registered"], PRODUCTS);
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn counts_are_put_on_record_by_sku_and_by_id() -> Result<()> {
    let importing = Importing::start().await?;
    importing.import(PRODUCTS_PATH, "text/csv", catalogue_of(1_000)).await?;
    let id = |number: usize| catalogue::product_id(&format!("IMP-{number:06}").parse().unwrap());
    let mut csv = String::from("sku,productId,quantity,countedAt,reason\n");
    for number in 1..=500 {
        writeln!(csv, "IMP-{number:06},,{number},2026-01-31T09:30:00Z,stocktaking")?;
    }
    for number in 501..=1_000 {
        writeln!(csv, ",{},{number},2026-01-31T09:30:00Z,", id(number))?;
    }
    csv.push_str("NOBODY,,1,2026-01-31T09:30:00Z,\n,,1,2026-01-31T09:30:00Z,\nIMP-000001,,1,2026-02-01T09:30:00Z,\n");
    let before = importing.world.last_sequence().await?;
    let dry = importing.import(&format!("{COUNTS_PATH}?dryRun=true"), "text/csv", csv.clone()).await?;
    assert_eq!((&dry.summary["recorded"], dry.lines("refused")), (&json!(1_000), vec![1002, 1003, 1004]));
    assert_eq!(importing.world.last_sequence().await?, before);
    let imported = importing.import(COUNTS_PATH, "text/csv", csv.clone()).await?;
    assert_eq!((&imported.summary["recorded"], imported.lines("refused")), (&json!(1_000), vec![1002, 1003, 1004]));
    assert_eq!(imported.rows[1000]["problem"]["type"], "https://lomash.example/problems/product-not-found");
    let counted: Vec<_> = importing
        .world
        .events()
        .await?
        .into_iter()
        .filter_map(|(_, event)| match event {
            LedgerEvent::InventoryCounted(counted) => Some(counted),
            _ => None,
        })
        .collect();
    assert_eq!(counted.len(), 1_000);
    assert!(counted.iter().all(|counted| counted.counted_by.to_string() == importing.admin.to_string()));
    assert_eq!(importing.import(COUNTS_PATH, "text/csv", csv).await?.summary["unchanged"], 1_000);
    // An older count than the one on record is refused by the ledger, and only that row.
    let older = format!(
        "{}\n{}\n",
        json!({ "sku": "IMP-000002", "quantity": 1, "countedAt": "2026-01-30T09:30:00Z" }),
        json!({ "productId": id(3), "quantity": 1, "countedAt": "2026-02-01T09:30:00Z" })
    );
    let older = importing.import(COUNTS_PATH, "application/x-ndjson", older).await?;
    assert_eq!((older.lines("refused"), older.lines("recorded")), (vec![1], vec![2]));
    assert_eq!(older.rows[0]["problem"]["type"], "https://lomash.example/problems/count-superseded");
    importing.world.verified().await?;
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn what_is_no_import_is_refused_before_the_answer_begins() -> Result<()> {
    let importing = Importing::start().await?;
    for (path, media_type, body, expected, told) in [
        (PRODUCTS_PATH, "application/json", "{}", 415, "unsupported-media-type"),
        (PRODUCTS_PATH, "text/csv", "", 400, "the file is empty"),
        (PRODUCTS_PATH, "text/csv", "name,quantity\nA,1\n", 400, "`sku`"),
        (PRODUCTS_PATH, "text/csv", "sku,price\nA,1\n", 400, "`name`"),
        (COUNTS_PATH, "text/csv", "sku,quantity\nA,1\n", 400, "countedAt"),
        ("/v1/products:import?policy=some", "text/csv", "", 400, "allOrNothing"),
        ("/v1/products:import?dryrun=true", "text/csv", "", 400, "dryrun"),
        ("/v1/products:import?reason=%20", "text/csv", "", 400, "is empty"),
        ("/v1/products:import?reason=a%E2%80%AEb", "text/csv", "", 400, "U+202E"),
        // The colon is part of the name: none of these is the product `:import`, nor is an import a product.
        ("/v1/products:imports", "text/csv", "", 404, "nothing at this path"),
        ("/v1/products/:import", "text/csv", "", 405, "method"),
    ] {
        let (status, problem) = importing.refused(path, media_type, body).await?;
        let found = problem.to_lowercase().contains(&told.to_lowercase());
        assert!(status == expected && found, "{path} {media_type} {body:?}: {status} {problem}");
    }
    let answer =
        importing.client.get(format!("{}{PRODUCTS_PATH}", importing.url)).bearer_auth(&importing.token).send().await?;
    assert_eq!(answer.status(), 405);
    let viewer = token(Role::Viewer, Uuid::new_v4())?;
    for path in [PRODUCTS_PATH, COUNTS_PATH] {
        let request = importing.client.post(format!("{}{path}", importing.url)).header("content-type", "text/csv");
        assert_eq!(request.try_clone().unwrap().body("x").send().await?.status(), 401);
        assert_eq!(request.bearer_auth(&viewer).body("x").send().await?.status(), 403);
    }
    // A length beyond the limit is refused before anything of the body comes.
    let mut stream = importing.begin(MAX_BODY_BYTES + 1).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    assert_eq!(&head, b"HTTP/1.1 413");
    assert_eq!(importing.world.last_sequence().await?, 0);
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn a_body_that_stops_or_breaks_off_imports_nothing() -> Result<()> {
    let importing = Importing::start_with(&[("HTTP_STALL_TIMEOUT_SECONDS", "1")]).await?;
    let csv = catalogue_of(PRODUCTS);
    let half = &csv.as_bytes()[..csv.len() / 2];
    // It stops.
    let mut stream = importing.begin(csv.len()).await?;
    stream.write_all(half).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await??;
    let answer = String::from_utf8(answer)?;
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("came too slowly"), "{answer}");
    // It breaks off, as often as there are places and more.
    for _ in 0..MAX_IMPORTS * 2 {
        let mut stream = importing.begin(csv.len()).await?;
        stream.write_all(half).await?;
        drop(stream);
    }
    importing.places_are_free().await?;
    assert_eq!(importing.world.last_sequence().await?, 0);
    importing.world.close();
    Ok(())
}

#[tokio::test]
async fn a_client_that_goes_away_stops_its_import() -> Result<()> {
    /// Enough that neither the import nor its results can be over before the client is gone.
    const ROWS: usize = 60_000;
    let importing = Importing::start_with(&[("HTTP_STALL_TIMEOUT_SECONDS", "3")]).await?;
    let csv = catalogue_of(ROWS);
    for is_silent in [false, true] {
        let mut stream = importing.begin(csv.len()).await?;
        stream.write_all(csv.as_bytes()).await?;
        let mut head = [0; 12];
        stream.read_exact(&mut head).await?;
        assert_eq!(&head, b"HTTP/1.1 200");
        // Some products are registered when the first row has its result.
        let mut told = Vec::new();
        while !String::from_utf8_lossy(&told).contains("\"status\"") {
            ensure!(stream.read_buf(&mut told).await? > 0, "it ended without a result");
        }
        if is_silent {
            // It takes nothing more, and the service gives up on it.
            importing.places_are_free().await?;
        }
        drop(stream);
        importing.places_are_free().await?;
    }
    // Once no import has a place, nothing is with the committer for longer than a batch takes.
    let products = importing.world.events().await?.into_iter();
    let registered = products.filter(|(_, event)| matches!(event, LedgerEvent::ProductRegistered(_))).count();
    assert!((1..ROWS).contains(&registered), "{registered} of {ROWS} are registered");
    // The same file again goes on where it was left.
    let imported = importing.import(PRODUCTS_PATH, "text/csv", csv).await?;
    let (unchanged, new) = (&imported.summary["unchanged"], &imported.summary["registered"]);
    assert_eq!(unchanged.as_u64().unwrap() + new.as_u64().unwrap(), ROWS as u64);
    assert!(unchanged.as_u64().unwrap() >= registered as u64, "{}", imported.summary);
    importing.world.verified().await?;
    importing.world.close();
    Ok(())
}

/// Measures: `cargo test --test integration imports:: -- --ignored --nocapture`.
#[tokio::test]
#[ignore = "a measurement of some minutes"]
async fn a_hundred_thousand_products() -> Result<()> {
    let importing = Importing::start().await?;
    let memory = |name: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", importing.service.pid().unwrap())).unwrap();
        status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned()
    };
    let csv = catalogue_of(MANY_PRODUCTS);
    println!("before: {} in memory", memory("VmRSS:"));
    for what in ["new", "again"] {
        let bytes = csv.len();
        let started = Instant::now();
        let imported = importing.import(PRODUCTS_PATH, "text/csv", csv.clone()).await?;
        let seconds = started.elapsed().as_secs_f64();
        assert_eq!(imported.rows.len(), MANY_PRODUCTS);
        let rate = MANY_PRODUCTS as f64 / seconds;
        println!(
            "{what}: {bytes} bytes, {seconds:.1} s, {rate:.0} rows/s, {} in memory, at most {}",
            memory("VmRSS:"),
            memory("VmHWM:")
        );
    }
    let started = Instant::now();
    let path = format!("{PRODUCTS_PATH}?dryRun=true&policy=allOrNothing");
    importing.import(&path, "text/csv", csv).await?;
    println!("dry: {:.1} s, {} in memory", started.elapsed().as_secs_f64(), memory("VmRSS:"));
    importing.world.quiet_within(Duration::from_secs(300)).await?;
    importing.world.close();
    Ok(())
}
