//! A wire that a test can cut: what lies between a program and a server, or between two servers.
//!
//! Owns what passes. A wire that is cut keeps its connections, as a network that loses everything does: nobody is told, what
//! was said waits, and arrives when the wire is mended. Only a broken one ends them.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Bytes that are on the wire when it is cut, at most.
const ON_THE_WIRE: usize = 16 * 1024;

/// What passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Everything.
    Whole,
    /// Nothing, in neither direction.
    Cut,
    /// What the server says. The client is heard by nobody.
    Mute,
    /// What the client says. It hears nothing.
    Deaf,
    /// Nothing, and whoever is connected is told.
    Broken,
}

impl Wire {
    const fn carries_what_the_client_says(self) -> bool {
        matches!(self, Self::Whole | Self::Deaf)
    }

    const fn carries_what_the_server_says(self) -> bool {
        matches!(self, Self::Whole | Self::Mute)
    }
}

/// A port whose connections go on to another one, over a wire.
#[derive(Debug)]
pub struct Link {
    /// Where to connect.
    pub port: u16,
    wire: watch::Sender<Wire>,
}

impl Link {
    /// Lays a whole wire to a port of this machine. It is there until the test ends.
    pub async fn lay(to: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (wire, _) = watch::channel(Wire::Whole);
        let watched = wire.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connected(client, to, watched.subscribe()));
            }
        });
        Self { port, wire }
    }

    /// Makes it so from now on.
    pub fn set(&self, wire: Wire) {
        self.wire.send_replace(wire);
    }
}

async fn connected(client: TcpStream, to: u16, mut wire: watch::Receiver<Wire>) {
    let (there, back) = (wire.clone(), wire.clone());
    let passing = async {
        let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        tokio::join!(
            carry(from_client, to_server, there, Wire::carries_what_the_client_says),
            carry(from_server, to_client, back, Wire::carries_what_the_server_says),
        );
    };
    tokio::select! {
        biased;
        // An error means that the test is over.
        _ = wire.wait_for(|wire| *wire == Wire::Broken) => {}
        () = passing => {}
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut wire: watch::Receiver<Wire>,
    passes: impl Fn(Wire) -> bool,
) {
    let mut said = vec![0; ON_THE_WIRE];
    while let Ok(count @ 1..) = from.read(&mut said).await {
        if wire.wait_for(|wire| passes(*wire)).await.is_err() || to.write_all(&said[..count]).await.is_err() {
            return;
        }
    }
    // What is heard of an end is heard in order, too.
    if wire.wait_for(|wire| passes(*wire)).await.is_ok() {
        let _ = to.shutdown().await;
    }
}
