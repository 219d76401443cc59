//! Faults under load: processes die, servers are killed, and nothing is lost or doubled.
#![allow(clippy::unwrap_used)]

mod cluster;
mod crash;
mod kills;
mod support;
