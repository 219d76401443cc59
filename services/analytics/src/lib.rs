//! The analytics service: stock metrics from the ledger, in a schema of its own.

pub mod service;
