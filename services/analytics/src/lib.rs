//! The analytics service: stock metrics from the ledger, in a schema of its own, and over HTTP.
//!
//! [`projection`] receives events and applies them in batches, [`stock_metrics`] says what they amount to, [`rebuild`] makes
//! the tables anew, and [`reads`] answers from them.

pub mod http;
mod observed;
pub mod projection;
pub mod reads;
pub mod rebuild;
mod rows;
pub mod service;
pub mod stock_metrics;
