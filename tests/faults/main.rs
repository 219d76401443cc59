//! Faults under load: processes die, servers are killed, and nothing is lost or doubled.
#![allow(clippy::unwrap_used)]

mod availability;
mod cluster;
mod crash;
mod kills;
mod link;
mod support;
