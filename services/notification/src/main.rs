//! The `notification-service` binary.

use std::process::ExitCode;

use clap::Parser;
use lomash_platform::process;
use notification_service::service::{Config, run};

fn main() -> ExitCode {
    let config = Config::parse();
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    process::main("notification-service", config.service.log_format, |stop| run(config, stop))
}
