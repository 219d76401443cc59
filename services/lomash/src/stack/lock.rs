//! A lock on a folder, held by whoever uses what is in it.
//!
//! It is an open-file-description lock: children that inherit the file hold it too, and it is free once the last
//! of them has ended. After a crash, a new server thus waits exactly until the remains of the old one are gone.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    libc,
};

/// How often a taken lock is tried again.
const RETRY_EVERY: Duration = Duration::from_millis(20);

/// An exclusive lock on a folder: the file `lock` in it, which names the process that took it.
#[derive(Debug)]
pub struct FolderLock {
    file: File,
    folder: PathBuf,
}

impl FolderLock {
    /// Takes the lock, or says who has it; a lock that is taken is waited for as long as `patience`.
    pub async fn acquire(folder: &Path, patience: Duration) -> Result<Self> {
        let started = Instant::now();
        loop {
            if let Some(lock) = Self::try_acquire(folder)? {
                return Ok(lock);
            }
            if started.elapsed() >= patience {
                bail!(
                    "{} is in use by process {}: stop it, or use another folder",
                    folder.display(),
                    Self::holder(folder).unwrap_or_else(|| "(unknown)".to_owned())
                );
            }
            tokio::time::sleep(RETRY_EVERY).await;
        }
    }

    /// The same without a runtime, for a folder whose processes have just been killed; None if they do not end.
    pub(super) fn acquire_blocking(folder: &Path, patience: Duration) -> Result<Option<Self>> {
        let started = Instant::now();
        loop {
            if let Some(lock) = Self::try_acquire(folder)? {
                return Ok(Some(lock));
            }
            if started.elapsed() >= patience {
                return Ok(None);
            }
            std::thread::sleep(RETRY_EVERY);
        }
    }

    fn try_acquire(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("could not open the lock file {}", path.display()))?;
        let whole_file = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole_file)) {
            Ok(_) => {}
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(None),
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("could not lock {}: its file system must support locks", path.display()));
            }
        }
        file.set_len(0)
            .and_then(|()| file.seek(SeekFrom::Start(0)))
            .and_then(|_| writeln!(file, "{}", std::process::id()))
            .with_context(|| format!("could not write the lock file {}", path.display()))?;
        Ok(Some(Self { file, folder: folder.to_owned() }))
    }

    fn holder(folder: &Path) -> Option<String> {
        let mut text = String::new();
        File::open(folder.join("lock")).ok()?.take(20).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned()).filter(|pid| !pid.is_empty())
    }

    /// A copy of the lock for a child to inherit.
    pub(super) fn share(&self) -> Result<File> {
        self.file.try_clone().with_context(|| format!("could not share the lock on {}", self.folder.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_folder_is_locked_once() {
        let dir = crate::stack::scratch().expect("a scratch folder");
        let first = FolderLock::acquire(dir.path(), Duration::ZERO).await.expect("free");
        let refused = FolderLock::acquire(dir.path(), Duration::from_millis(50)).await.expect_err("taken");
        assert!(refused.to_string().contains(&format!("in use by process {}", std::process::id())), "{refused}");

        let inherited = first.share().expect("shared");
        drop(first);
        FolderLock::acquire(dir.path(), Duration::ZERO).await.expect_err("held by the copy");
        drop(inherited);
        FolderLock::acquire(dir.path(), Duration::ZERO).await.expect("free again");
    }
}
