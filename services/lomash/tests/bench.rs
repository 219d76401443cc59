//! The benchmark in its tiny form: that it works, that everybody's books are in order, and that the ratios are there.
//!
//! No figure is asserted: this build is not optimised and the machine is not quiet. Assumes that `./just setup` has run and
//! that the product service's program is built beside the tests.

use std::path::PathBuf;

use clap::Parser;
use lomash::bench::{BenchArgs, Contestant, Scenario, TARGETS, bench, draw};
use lomash::verify::Show;

/// Ratios are made of these, in every race but that of a million products, which the rivals sit out.
const OTHERS: [&str; 5] = ["limit", "bare", "rival_1", "rival_2", "rival_3"];

/// Numbers of the studies.
const OF_STUDIES: [&str; 16] = [
    "capacity_orders_per_second",
    "catching_up_over_slower_of_read_and_copy",
    "cost_cpu_many_products_over_few",
    "decision_p50_ms_at_10_percent",
    "decision_p99_ms_at_50_percent",
    "decision_p99_9_ms_at_80_percent",
    "memory_growth_mb_at_120_percent",
    "million_over_bare",
    "million_over_limit",
    "million_over_uniform",
    "page_reads_cached_over_postgres",
    "patch_p99_ms_at_50_percent",
    "product_reads_cached_over_postgres",
    "projection_lag_p99_ms_at_50_percent",
    "rebuild_over_slower_of_read_and_copy",
    "start_folding_over_bare_read",
];

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: BenchArgs,
}

fn arguments(words: &[&str]) -> Result<BenchArgs, clap::Error> {
    Command::try_parse_from(std::iter::once("bench").chain(words.iter().copied())).map(|command| command.args)
}

/// A few invoices as a web shop exports them: several lines, a product twice, a cancelled one.
fn order_file(folder: &std::path::Path) -> PathBuf {
    let mut text = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,CustomerID\n".to_owned();
    for invoice in 0..30 {
        for line in 0..=invoice % 5 {
            let product = (invoice + line * 3) % 11;
            let row = format!("{},P{product},THING {product},{},", 500_000 + invoice, 1 + line);
            text.push_str(&format!("{row}2010-12-01 08:26:00,1.25,17850\n"));
        }
    }
    text.push_str("500000,P0,THING 0,2,2010-12-01 08:26:00,1.25,17850\n");
    text.push_str("C500001,P0,THING 0,-2,2010-12-01 08:26:00,1.25,17850\n");
    let file = folder.join("orders.csv");
    std::fs::write(&file, text).expect("written");
    file
}

#[test]
fn nonsense_is_refused_before_anything_starts() {
    for words in [
        &["--orders-count", "5"][..],
        &["--repeat", "0"],
        &["--history", "1000000000"],
        &["--tiny", "--repeat", "2"],
        &["--tiny", "--products", "2000"],
        &["--scenario", "no"],
    ] {
        assert!(arguments(words).is_err(), "{words:?}");
    }
    assert!(arguments(&["--scenario", "hot,lines-14,start"]).is_ok());
}

#[tokio::test]
async fn real_orders_need_their_file() {
    let args = arguments(&["--tiny", "--scenario", "real"]).expect("parsed");
    let problem = bench(&args, Show::Nothing).await.expect_err("there is no file");
    assert!(problem.to_string().contains("--orders FILE"), "{problem:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tiny_benchmark_works_and_all_books_are_in_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = order_file(folder.path());
    let args = arguments(&["--tiny", "--orders", file.to_str().expect("UTF-8")]).expect("parsed");
    let report = bench(&args, Show::Nothing).await.expect("the benchmark ends");

    // Ours has a figure only when `lomash verify` was clean, a rival only when its own books were right.
    let withheld: Vec<String> = report.withheld().collect();
    assert!(withheld.is_empty(), "{withheld:?}");
    let scenarios: Vec<Scenario> = report.scenarios.iter().map(|scenario| scenario.scenario).collect();
    let studies = report.studies.iter().map(|study| study.scenario);
    assert_eq!(scenarios.iter().copied().chain(studies).collect::<Vec<_>>(), Scenario::ALL);
    for scenario in &report.scenarios {
        let contestants: Vec<Contestant> = scenario.results.iter().map(|result| result.contestant).collect();
        assert_eq!(contestants, Contestant::of(scenario.scenario), "{}", scenario.title);
    }
    for study in &report.studies {
        let figures: Vec<_> = study.rows.iter().flat_map(|row| &row.figures).collect();
        assert!(!figures.is_empty() && figures.iter().all(|(_, figure)| figure.is_finite()), "{study:?}");
    }

    let json = serde_json::to_value(&report).expect("JSON");
    let ratios = json["ratios"].as_object().expect("a flat object");
    for scenario in ["uniform", "hot", "lines_14", "real"] {
        for other in OTHERS {
            let name = format!("{scenario}_over_{other}");
            assert!(ratios.get(&name).and_then(serde_json::Value::as_f64).is_some_and(|ratio| ratio > 0.0), "{name}");
        }
    }
    for name in OF_STUDIES {
        assert!(ratios.get(name).and_then(serde_json::Value::as_f64).is_some_and(|ratio| ratio >= 0.0), "{name}");
    }
    // Every target is about a number of that name. Two are about sizes that only a large run reaches.
    let missing: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).filter(|name| !ratios.contains_key(*name)).collect();
    assert_eq!(missing, ["product_memory_mb", "start_from_snapshot_seconds"]);
    for part in ["machine", "versions", "settings", "targets"] {
        assert!(json[part].as_object().is_some_and(|part| !part.is_empty()), "{part}");
    }

    let table = report.render();
    assert!(table.contains("uniform_over_rival_1") && table.contains("min – max"), "{table}");
    let picture = draw(&report);
    assert!(picture.starts_with("<svg ") && picture.trim_end().ends_with("</svg>"), "{picture}");
    assert_eq!(picture.matches("<rect x=").count(), 4 * 6 + 3, "a bar for each contestant of each race");
}
