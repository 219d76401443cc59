//! The `analytics-service` binary.

use std::process::ExitCode;

use analytics_service::service::{Config, run};
use clap::Parser;
use lomash_platform::process;

fn main() -> ExitCode {
    let config = Config::parse();
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    process::main("analytics-service", config.service.log_format, |stop| run(config, stop))
}
