//! The `product-service` binary.

use std::process::ExitCode;

use clap::Parser;
use lomash_platform::telemetry;
use product_service::service::{Config, run};

#[tokio::main]
async fn main() -> ExitCode {
    let config = Config::parse();
    telemetry::init(config.log_format, telemetry::SERVICE_FILTER);
    #[cfg(feature = "failpoints")]
    let _crash_points = lomash_ledger::fail::FailScenario::setup();
    let ended = match lomash_platform::shutdown::token() {
        Ok(stop) => run(config, stop).await,
        Err(error) => Err(error.into()),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
