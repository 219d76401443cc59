//! The body of an import on disk: received whole before its first row is read.
//!
//! A client may therefore send all of its rows before it reads any result, a body that breaks off or is too large
//! imports nothing, and rows can be read twice. The file has no name: it goes with its last reader, or with the process,
//! however that ends.

use std::fs::{File, Permissions};
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;

use axum::body::Body;
use futures::StreamExt;
use lomash_web::Problem;
use tokio::io::AsyncWriteExt;

/// Bytes that are read from the file at a time.
const READ_BYTES: usize = 64 * 1024;

/// Seconds after which there may be room on the disk again.
const RETRY_AFTER_SECONDS: u64 = 30;

/// A body on disk.
#[derive(Clone, Debug)]
pub(super) struct Spool(Arc<File>);

impl Spool {
    /// Receives a body of at most `limit` bytes.
    ///
    /// # Errors
    /// 413 beyond the limit, 400 when the body breaks off or rests for too long, 503 when it cannot be kept.
    pub(super) async fn receive(body: Body, limit: usize) -> Result<Self, Problem> {
        let created = tokio::task::spawn_blocking(create).await.map_err(Problem::internal)?;
        let mut file = tokio::fs::File::from_std(created.map_err(|problem| full(&problem))?);
        let (mut body, mut received) = (body.into_data_stream(), 0_usize);
        while let Some(bytes) = body.next().await {
            let bytes = bytes.map_err(|_| {
                Problem::bad_request("The body could not be read to its end: it was cut off, or came too slowly.")
            })?;
            received = received.saturating_add(bytes.len());
            if received > limit {
                return Err(Problem::payload_too_large(Some(limit)));
            }
            file.write_all(&bytes).await.map_err(|problem| full(&problem))?;
        }
        file.flush().await.map_err(|problem| full(&problem))?;
        Ok(Self(Arc::new(file.into_std().await)))
    }

    /// Reads it from its beginning, beside other readers.
    pub(super) fn reader(&self) -> BufReader<SpoolReader> {
        BufReader::with_capacity(READ_BYTES, SpoolReader { file: self.0.clone(), offset: 0 })
    }
}

/// A file without a name from the first moment on, readable by its owner alone.
fn create() -> io::Result<File> {
    let file = tempfile::tempfile()?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

fn full(problem: &io::Error) -> Problem {
    tracing::warn!(%problem, "an import could not be kept on disk");
    Problem::unavailable("The body cannot be kept on disk just now.", RETRY_AFTER_SECONDS)
}

/// A reader with a place of its own in the file.
#[derive(Debug)]
pub(super) struct SpoolReader {
    file: Arc<File>,
    offset: u64,
}

impl Read for SpoolReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[tokio::test]
    async fn a_body_is_kept_without_a_name_for_its_owner_alone_and_read_twice() {
        let spool = Spool::receive(Body::from("one\ntwo\n"), 8).await.expect("received");
        for _ in 0..2 {
            let mut text = String::new();
            spool.reader().read_to_string(&mut text).expect("read");
            assert_eq!(text, "one\ntwo\n");
        }
        let metadata = spool.0.metadata().expect("there");
        assert_eq!((metadata.nlink(), metadata.mode() & 0o077), (0, 0));
    }

    #[tokio::test]
    async fn a_body_beyond_the_limit_is_refused() {
        let problem = Spool::receive(Body::from("123456789"), 8).await.expect_err("too large");
        assert_eq!(problem.status().as_u16(), 413);
    }
}
