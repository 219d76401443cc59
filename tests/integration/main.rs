//! Tests on real servers, each with a world of its own. One program, so that what they share is compiled and linked once.
#![allow(clippy::unwrap_used)]

mod analytics;
mod backup;
mod cache;
mod dead_letters;
mod fixtures;
mod http;
mod http_faults;
mod identities;
mod import_command;
mod imports;
mod ledger_suite;
mod limits;
mod notification;
mod openapi;
mod operations;
mod orders;
mod orders_command;
mod poison;
mod projection;
mod reads;
mod rebuild;
mod receive;
mod reconciliation;
mod rust_version;
mod snapshots;
mod streams_files;
mod telemetry;
mod terminal;
mod upkeep;
