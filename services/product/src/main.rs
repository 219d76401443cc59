//! The `product-service` binary.

use std::process::ExitCode;

use clap::Parser;
use lomash_platform::process;
use product_service::service::{Config, run};

/// Of the processor time of deciding an order, glibc's allocator took a third (ADR 0029).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let config = Config::parse();
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    process::main("product-service", config.service.log_format, |stop| run(config, stop))
}
