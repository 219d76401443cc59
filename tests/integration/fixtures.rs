//! Ledgers that earlier versions wrote: whatever this version changes, it restores, verifies, projects and rebuilds them, and
//! goes on with them. How they were made is told in `tests/fixtures/README.md`.

use std::path::Path;

use anyhow::{Context as _, Result};
use lomash::audit::{Report, Status};
use lomash::rebuild::{Comparison, Options, Projection, rebuild_of};
use lomash::restore::{self, Outcome};
use lomash::stack::Mail;
use lomash::verify::{self, Show};
use lomash_contract::ProductId;
use lomash_ledger::streams;
use lomash_tests::{Fate, World, count, order};
use uuid::Uuid;

use crate::backup::{Services, caught_up, lose_the_server, restored};

/// A world on an empty server into which an archive of `tests/fixtures` was restored.
async fn world_of(archive: &str) -> Result<(World, Outcome)> {
    let mut world = World::start().await?;
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(archive);
    // An archive is locked while it is read, and what is committed is not written to.
    let to = world.dir().join("archive");
    copy(&from, &to)?;
    lose_the_server(&mut world, "restored").await?;
    let outcome = restored(&world, &to).await?;
    let differing: u64 = outcome.streams.iter().map(|stream| stream.differing).sum();
    assert!(differing == 0 && outcome.consumers_off.is_empty(), "{}", restore::render(&outcome));
    Ok((world, outcome))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from).with_context(|| format!("no fixture at {}", from.display()))? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &to)?;
        } else {
            std::fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}

/// The three services project all of it, each projection is what a rebuild makes of the stream, and orders go on.
async fn goes_on(world: &World, sold: ProductId, alerts: i64) -> Result<()> {
    let mail = Mail::start(&world.dir().join("mail")).await?;
    let mut services = Services::of(world, &mail)?;
    // The archive has how far alerts were recorded; here they are all recorded anew, by a consumer that begins at the beginning.
    world.context.get_stream(streams::INVENTORY).await?.delete_consumer(streams::NOTIFICATION).await?;
    services.start().await?;
    caught_up(world).await?;
    let database = world.database().await?;
    assert_eq!(count(&database, "SELECT count(*) FROM notification.alerts").await?, alerts);
    for projection in [Projection::Inventory, Projection::Analytics] {
        let url = world.database_url();
        let outcome = rebuild_of(projection, &world.context, &url, Options::default(), Show::Nothing).await?;
        assert!(matches!(outcome.comparison, Comparison::Compared { .. }), "{outcome:?}");
        assert!(outcome.comparison.is_equal(), "{outcome:?}");
        assert!(outcome.swap.is_some(), "{outcome:?}");
    }
    let next = order(&[(sold, 1)]);
    world.publish(&next).await?;
    let fates = world.decided([next.payload.order_id]).await?;
    assert_eq!(fates[&next.payload.order_id], Fate::Allocated);
    caught_up(world).await?;
    services.stop().await
}

/// A product of a fixture.
fn product(number: u128) -> ProductId {
    ProductId(Uuid::from_u128((0xa0 << 96) | (0x4000 << 64) | (0x8000 << 48) | number))
}

fn statuses(report: &Report) -> Vec<(u8, Status)> {
    report.invariants.iter().map(|invariant| (invariant.number, invariant.status)).collect()
}

#[tokio::test]
async fn a_ledger_of_commit_9a84801_is_restored_verified_projected_and_rebuilt() -> Result<()> {
    let (world, outcome) = world_of("9a84801-whole").await?;
    assert_eq!(outcome.ledger_sequence, 46);
    assert!(outcome.verified.is_clean(), "{}", verify::render(&outcome.verified));
    let oak = product(1);
    assert_eq!(world.stock(oak).await?, 20);
    goes_on(&world, oak, 7).await?;
    let report = world.verified().await?;
    let totals = &report.totals;
    assert_eq!(
        (totals.products, totals.malformed_orders, totals.dead_letters, totals.foreign),
        (7, 3, 3, 0),
        "{totals:?}"
    );
    assert_eq!(totals.orders_allocated, 6 + 1, "{totals:?}");
    let refused = (totals.refused_insufficient_stock, totals.refused_unknown_product, totals.refused_product_inactive);
    assert_eq!(refused, (2, 1, 1), "{totals:?}");
    assert!(totals.sync_units != 0, "the count corrected something: {totals:?}");
    world.close();
    Ok(())
}

/// The damage that equal ids of an order and a command once did. It cannot be undone; everything else goes on, and it is told.
#[tokio::test]
async fn two_stored_events_of_one_id_are_named_and_everything_else_goes_on() -> Result<()> {
    let (world, outcome) = world_of("9a84801-shared-id").await?;
    assert!(!outcome.is_equal(), "a restore tells that it was not right: {}", restore::render(&outcome));
    goes_on(&world, product(1), 1).await?;
    world.quiet().await?;
    let report = world.report().await?;
    let text = verify::render(&report);
    let expected: Vec<(u8, Status)> = [1, 2, 3, 4, 5, 6, 7, 10]
        .into_iter()
        .map(|number| (number, if number == 1 { Status::Violated } else { Status::Holds }))
        .collect();
    assert_eq!(statuses(&report), expected, "{text}");
    let first = report.invariant(1).context("the first")?;
    assert_eq!(first.violations, 1, "{text}");
    let told = first.first[0].to_string();
    assert!(
        told.starts_with("INVENTORY 8: it and 7 share the event id 739e4dc2-2524-537e-b4b3-5d0b73bcdcc0")
            && told.contains("docs/operations.md"),
        "{told}"
    );
    let manual = include_str!("../../docs/operations.md");
    assert!(manual.contains("Two events with one id"), "the verdict is documented where it says so");
    world.close();
    Ok(())
}
