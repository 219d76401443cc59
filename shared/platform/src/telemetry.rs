//! Logs: to standard error, pretty or JSON, filtered by `RUST_LOG`.

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Pretty,
    /// For programs: one JSON object a line.
    Json,
}

/// What a service logs when `RUST_LOG` does not say: our own crates' progress and everybody's warnings.
pub const SERVICE_FILTER: &str = "warn,product_service=info,analytics_service=info,notification_service=info,lomash_ledger=info,lomash_platform=info,lomash::reconciliation=info";

/// What a command logs when `RUST_LOG` does not say: its output tells the rest.
pub const COMMAND_FILTER: &str = "warn";

/// Starts logging, by `default_filter` when `RUST_LOG` does not say; to be called once, first thing in `main`. Later calls do nothing.
pub fn init(format: LogFormat, default_filter: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default_filter));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    // An error means that logging is set up already, as in tests.
    let _ = match format {
        LogFormat::Pretty => logs.with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).try_init(),
    };
}
