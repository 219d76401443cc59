//! Free loopback ports that stay free while a server is down.
//!
//! The kernel's own choice (port 0) lies in the range that it also gives to outgoing connections. A server that
//! is killed and started again on such a port can find it taken by any client, even by one that was trying to
//! reach it: a loopback connection attempt may be given its own target as source and connect to itself. So ports
//! are taken from below that range.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result};

/// Lower end of the ports that are tried: above the well-known ones.
const LOWEST: u16 = 15_000;
/// How many random ports are tried before the kernel is asked.
const TRIES: usize = 64;

/// A port on which nobody listens at this moment.
///
/// # Errors
/// When there is none.
pub fn free_port() -> Result<u16> {
    if let Some(above) = first_ephemeral_port().filter(|above| *above > LOWEST) {
        let free = (0..TRIES)
            .map(|_| LOWEST + (uuid::Uuid::new_v4().as_u128() % u128::from(above - LOWEST)) as u16)
            .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok());
        if let Some(port) = free {
            return Ok(port);
        }
    }
    let listener =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("there is no free port on the loopback address")?;
    Ok(listener.local_addr().context("a listener without an address")?.port())
}

/// The first port that outgoing connections may be given.
fn first_ephemeral_port() -> Option<u16> {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    range.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_free_and_not_ephemeral() {
        for _ in 0..20 {
            let port = free_port().expect("a port");
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("free");
            assert!(first_ephemeral_port().is_none_or(|above| port < above || above <= LOWEST), "{port}");
        }
    }
}
