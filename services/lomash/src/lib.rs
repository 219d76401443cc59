//! The operator's command line, as a library: the servers of a laptop, files of products and orders, the verifier.
//!
//! Tests and the demo use the same parts as the commands do.

// What prints goes through `output`: the macros of the standard library panic when nobody reads.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

pub mod api;
pub mod archive;
pub mod audit;
pub mod backup;
pub mod bench;
pub mod cli;
pub mod cluster;
pub mod demo;
pub mod dice;
pub mod dlq;
pub mod import;
pub mod mail_sink;
pub mod orders;
pub mod output;
pub mod rebuild;
pub mod reconcile;
pub mod replay;
pub mod restore;
pub mod retail;
mod snapshot;
pub mod stack;
pub mod status;
pub mod streams;
pub mod token;
pub mod up;
pub mod verify;

pub use product_service::catalogue;
