//! The product service: decides orders and admin commands, commits them to the ledger, projects the ledger into
//! Postgres.
//!
//! The way of an order: [`orders`] parses it, [`inventory`] decides it, [`committer`] stores the decision, and only then
//! is the order acknowledged. [`projection`] follows behind, on its own; [`rebuild`] makes its tables
//! anew, [`reads`] answers from them, [`cache`] keeps the answers for a while, and [`projected`] waits for them.

pub mod cache;
pub mod catalogue;
pub mod commands;
pub mod committer;
pub mod csv_file;
pub mod feed;
pub mod http;
pub mod inventory;
pub mod monitoring;
pub mod observed;
pub mod orders;
pub mod projection;
pub mod readiness;
pub mod reads;
pub mod rebuild;
pub mod reconciliation;
pub mod schedule;
pub mod service;
pub mod snapshots;
pub mod warehouse;

pub use lomash_platform::projected;
