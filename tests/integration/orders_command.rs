//! `lomash orders` as a program: what cannot be an order is counted and named, the others are published, and with `--strict`
//! nothing is.

use std::path::Path;
use std::process::Output;

use anyhow::{Context as _, Result};
use lomash_contract::{ContentType, ProductId};
use lomash_ledger::streams;
use lomash_tests::{World, encoded, order};
use serde_json::Value;
use tokio::process::Command;
use uuid::Uuid;

const HEADER: &str = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,CustomerID\n";

async fn lomash(world: &World, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(lomash::up::program("lomash-under-test")?);
    command.args(arguments).current_dir(world.dir()).env("NATS_URL", world.nats.url()).env_remove("COLUMNS");
    Ok(command.kill_on_drop(true).output().await?)
}

async fn orders_held(world: &World) -> Result<u64> {
    Ok(world.context.get_stream(streams::ORDERS).await?.cached_info().state.messages)
}

/// Three invoices of which the second has more products than an order has lines.
fn retail(file: &Path) -> Result<()> {
    let line = |invoice: &str, code: &str| format!("{invoice},{code},Thing,1,2009-12-01 07:45:00,1,\n");
    let wide: String = (0..1_108).map(|number| line("581219", &format!("P{number}"))).collect();
    Ok(std::fs::write(file, format!("{HEADER}{}{wide}{}", line("581218", "A1"), line("581220", "A1")))?)
}

#[tokio::test]
async fn one_bad_invoice_or_line_does_not_end_a_replay() -> Result<()> {
    let world = World::without_postgres().await?;
    retail(&world.dir().join("retail.csv"))?;
    let envelope = || -> Result<String> {
        let (_, bytes) = encoded(ContentType::Json, &order(&[(ProductId(Uuid::new_v4()), 1)]));
        Ok(String::from_utf8(bytes.to_vec())?)
    };
    std::fs::write(
        world.dir().join("orders.ndjson"),
        format!("{}\n{{\"eventId\":7}}\n{}\n", envelope()?, envelope()?),
    )?;
    let mut held = 0;
    for (file, what, problem) in [
        (
            "retail.csv",
            "invoice 581219",
            "has 1108 lines even with those of one product added up; an order has at most 1000",
        ),
        ("orders.ndjson", "line 2", "is no order"),
    ] {
        // Strict: the one that is bad stands behind a good one, and nothing was published all the same.
        let strict = lomash(&world, &["orders", "replay", file, "--strict"]).await?;
        let said = String::from_utf8_lossy(&strict.stderr).into_owned();
        assert_eq!(strict.status.code(), Some(1), "{said}");
        assert!(said.starts_with(&format!("error: nothing was published: 1 of {file} cannot be orders")), "{said}");
        assert!(said.contains(&format!("skipped: {what} {problem}")), "{said}");
        assert_eq!(orders_held(&world).await?, held, "{said}");

        let report = lomash(&world, &["orders", "replay", file, "--json"]).await?;
        let said = String::from_utf8_lossy(&report.stderr).into_owned();
        assert!(report.status.success(), "{said}");
        let report: Value = serde_json::from_slice(&report.stdout)?;
        assert_eq!((&report["published"], &report["unfit"]), (&2.into(), &1.into()), "{report}");
        let named = report["unfitOrders"][0].as_object().context("one is named")?;
        assert_eq!(named["what"], what, "{report}");
        assert!(named["problem"].as_str().is_some_and(|told| told.starts_with(problem)), "{report}");
        held += 2;
        assert_eq!(orders_held(&world).await?, held);

        // Once more, for people: the same orders under the same ids.
        let shown = lomash(&world, &["orders", "replay", file]).await?;
        let shown = String::from_utf8(shown.stdout)?;
        assert!(shown.contains(&format!("skipped: {what} {problem}")), "{shown}");
        assert_eq!(orders_held(&world).await?, held);
    }
    // A catalogue names them as well, and what only they sell is wanted by nobody.
    let catalogue = lomash(&world, &["orders", "catalogue", "retail.csv"]).await?;
    let said = String::from_utf8_lossy(&catalogue.stderr).into_owned();
    assert!(catalogue.status.success() && said.contains("skipped: invoice 581219 has 1108 lines"), "{said}");
    let rows = String::from_utf8(catalogue.stdout)?;
    assert!(rows.contains("\nA1,Thing,,2,\n") && rows.contains("\nP7,Thing,,0,\n"), "{rows}");
    world.close();
    Ok(())
}
