//! What every process needs and none should write again: logs, traces, metrics, connections, migrations, shutdown.

pub mod metrics;
pub mod nats;
pub mod places;
pub mod postgres;
pub mod process;
pub mod projected;
pub mod reader;
pub mod schemas;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
pub mod trace;
pub mod waiting;

pub use secret::Secret;
