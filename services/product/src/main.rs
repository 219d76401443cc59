//! The `product-service` binary.

use clap::Parser;
use product_service::service::{Config, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    lomash_platform::telemetry::init(config.log_format);
    run(config, lomash_platform::shutdown::token()?).await
}
