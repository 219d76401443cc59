//! The `lomash` binary; what it can do is in `cli.rs`.

#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::process::ExitCode;

use clap::Parser;
use lomash::cli::{self, Cli};

/// As in the product service: reading a whole ledger is what this program does for long (ADR 0029).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    cli::main(cli)
}
