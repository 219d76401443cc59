//! `lomash import` as a program, against a real service: one door for admin commands, and by whom is on record.
use std::path::Path;
use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use lomash_contract::{LedgerEvent, UpdatedBy};
use lomash_tests::http::Caller;
use lomash_tests::{PATIENCE, World, eventually, token};
use lomash_web::Role;
use serde_json::Value;
use tokio::process::Command;
use uuid::Uuid;

/// The operator's program as this package builds it.
const PROGRAM: &str = "lomash-under-test";

/// Where a command is sent, and as whom.
struct Shell {
    url: String,
    token: String,
}

impl Shell {
    async fn import(&self, arguments: &[&str], file: &Path) -> Result<Output> {
        let mut command = Command::new(lomash::up::program(PROGRAM)?);
        command.arg("import").args(arguments).arg(file);
        command.env("PRODUCT_URL", &self.url).env("ADMIN_TOKEN", &self.token).env_remove("NATS_URL");
        let ended = tokio::time::timeout(PATIENCE, command.kill_on_drop(true).output()).await;
        Ok(ended.context("the import does not end")??)
    }
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The number in the row of the table that begins with `what`.
fn counted(output: &Output, what: &str) -> Result<u64> {
    let shown = out(output);
    let row = shown.lines().find(|line| line.trim_start_matches(['│', ' ']).starts_with(what));
    let row = row.with_context(|| format!("no {what} in\n{shown}{}", err(output)))?;
    let digits: String = row.chars().filter(char::is_ascii_digit).collect();
    digits.parse().with_context(|| row.to_owned())
}

#[tokio::test]
async fn a_file_goes_to_the_service_with_a_token_and_each_row_is_told() -> Result<()> {
    let world = World::start().await?;
    let mut service = world.start_service("one").await?;
    // Ready is who decides; a check reads the projection besides.
    let viewer = Caller::new(&world.url("one"), Role::Viewer)?;
    eventually("the tables of the projection", PATIENCE, async || {
        Ok((viewer.get("/v1/products").send().await?.status == 200).then_some(()))
    })
    .await?;
    let subject = Uuid::new_v4();
    let shell = Shell { url: world.url("one"), token: token(Role::Admin, subject)? };
    let file = world.dir().join("catalogue.csv");
    let good = "sku,name,category,quantity,threshold\nOAK-1,Oak,Worktops,5,\nOAK-2,Oak,Worktops,0,\n";
    let bad = "OAK-3,Oak,Worktops,many,\n";

    // One bad row of three, all or nothing, then on its own.
    std::fs::write(&file, format!("{good}{bad}"))?;
    let nothing = shell.import(&["--policy", "all-or-nothing"], &file).await?;
    ensure!(nothing.status.code() == Some(1), "{nothing:?}");
    assert_eq!((counted(&nothing, "refused")?, counted(&nothing, "not carried out")?), (1, 2));
    assert_eq!(world.last_sequence().await?, 0, "nothing was written");
    let dry = shell.import(&["--dry-run"], &file).await?;
    assert_eq!((counted(&dry, "registered")?, counted(&dry, "refused")?), (2, 1));
    assert!(out(&dry).contains("a dry run: nothing was written"), "{}", out(&dry));
    assert_eq!(world.last_sequence().await?, 0, "nothing was written");
    let some = shell.import(&[], &file).await?;
    ensure!(some.status.code() == Some(1), "a row was refused: {some:?}");
    assert_eq!((counted(&some, "registered")?, counted(&some, "refused")?), (2, 1));
    let told = out(&some);
    assert!(told.lines().any(|line| line.starts_with("line 4: ") && line.contains("many")), "{told}");

    // By whom is the token's word.
    for (_, event) in world.events().await? {
        if let LedgerEvent::InventoryUpdated(updated) = event {
            assert_eq!(updated.updated_by, UpdatedBy::User(subject));
        }
    }

    // Again, as NDJSON and for a program: one JSON document, a row each, the summary last.
    let ndjson = world.dir().join("catalogue.ndjson");
    let rows =
        ["OAK-1", "OAK-2", "OAK-4"].map(|sku| format!(r#"{{"sku":"{sku}","name":"Beech","category":"Worktops"}}"#));
    std::fs::write(&ndjson, rows.join("\n"))?;
    let json = shell.import(&["--json", "--reason", "spring catalogue"], &ndjson).await?;
    ensure!(json.status.success(), "{json:?}");
    let told: Value = serde_json::from_slice(&json.stdout).with_context(|| out(&json))?;
    let statuses: Vec<&str> =
        told["rows"].as_array().context("rows")?.iter().filter_map(|row| row["status"].as_str()).collect();
    assert_eq!(statuses, ["revised", "revised", "registered"]);
    assert_eq!((&told["summary"]["revised"], &told["summary"]["complete"]), (&2.into(), &true.into()));
    assert_eq!(told["rows"][0]["changes"][0]["after"], "Beech");
    let reasons = world.messages().await?;
    assert_eq!(reasons.last().context("an event")?.carried.reason.as_deref(), Some("spring catalogue"));
    // A person is told what changes, field by field.
    std::fs::write(&file, "sku,name\nOAK-1,Elm\n")?;
    let changed = shell.import(&["--dry-run"], &file).await?;
    ensure!(changed.status.success(), "{changed:?}");
    let shown = out(&changed);
    assert!(shown.contains(r#"line 2: OAK-1 changes; name: "Beech" → "Elm""#), "{shown}");
    let again = shell.import(&[], &ndjson).await?;
    ensure!(again.status.success(), "{again:?}");
    assert_eq!((counted(&again, "unchanged")?, counted(&again, "refused")?), (3, 0));

    // Who may not, and what is no service, is told in a sentence, and nothing is written.
    let last = world.last_sequence().await?;
    let viewer = Shell { token: token(Role::Viewer, subject)?, url: shell.url.clone() };
    let refused = viewer.import(&[], &ndjson).await?;
    assert!(refused.status.code() == Some(1) && err(&refused).contains("403"), "{refused:?}");
    service.stop().await?;
    let away = shell.import(&[], &ndjson).await?;
    assert!(away.status.code() == Some(1) && err(&away).contains("is it up?"), "{away:?}");
    assert_eq!(world.last_sequence().await?, last);
    world.close();
    Ok(())
}
