//! The server behind a copy: PostgreSQL runs a restore_command in its data directory, which `/proc` shows.
//!
//! A mount without a plan knows nothing else of who asks. What it may hand out depends on that where the archive ends
//! within a segment: PostgreSQL moves what it restores over its own copy of the segment, which may hold more. What
//! cannot be seen, as from another pid namespace, is nobody. Looks go through the caller's file systems and may hang,
//! so they have a thread of their own.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::catalog::ending_segment::end_of_records;
use crate::mount::caller::Caller;
use crate::pg::{RECOVERY_SIGNAL, SEGMENT_HEADER_LEN, STANDBY_SIGNAL, WalSegmentName, check_segment_header};
use crate::repo::ClusterId;

/// A server that recovers to an end, and is no standby.
#[derive(Debug, Clone)]
pub(super) struct RestoringServer {
    data_directory: PathBuf,
    identity: ServerIdentity,
}

/// What tells a server from others: device and inode of its data directory.
pub(super) type ServerIdentity = (u64, u64);

impl RestoringServer {
    /// Returns the server that a caller works for.
    pub(super) async fn of(caller: &Caller) -> Option<Self> {
        let data_directory = PathBuf::from(format!("/proc/{}/cwd", caller.pid?));
        let looked = tokio::task::spawn_blocking(move || {
            let has = |name| data_directory.join(name).try_exists();
            let recovers = has(RECOVERY_SIGNAL)? && !has(STANDBY_SIGNAL)?;
            let found = fs::metadata(&data_directory)?;
            let identity = (found.dev(), found.ino());
            Ok::<_, io::Error>(recovers.then_some(Self { data_directory, identity }))
        });
        looked.await.ok()?.ok()?
    }

    /// Returns what tells it from other servers.
    pub(super) fn identity(&self) -> ServerIdentity {
        self.identity
    }

    /// Tells whether the server's own segment holds more WAL than the archive's beginning of it.
    ///
    /// # Errors
    /// Where its `pg_wal` or the segment cannot be read.
    pub(super) async fn has_more_than(
        &self,
        beginning: &Bytes,
        segment: WalSegmentName,
        cluster: ClusterId,
    ) -> io::Result<bool> {
        let (folder, beginning) = (self.data_directory.join("pg_wal"), beginning.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let Some(own) = own_segment(&folder, segment, cluster)? else { return Ok(false) };
            let size = cluster.segment_size;
            let Ok(start) = segment.start_lsn(size) else { return Ok(false) };
            Ok(end_of_records(start, &own, size) > end_of_records(start, &beginning, size))
        });
        looked.await.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

/// Reads a segment of a server, if it is the one that its name says and not one that waits to be used again.
fn own_segment(folder: &Path, segment: WalSegmentName, cluster: ClusterId) -> io::Result<Option<Bytes>> {
    // A link that leads nowhere from here may lead somewhere from there.
    if !fs::metadata(folder)?.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let path = folder.join(segment.to_string());
    let size = u64::from(cluster.segment_size.bytes());
    match fs::metadata(&path) {
        Ok(found) if found.is_file() && found.len() == size => {}
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    }
    let own = fs::read(&path)?;
    let front = &own[..own.len().min(SEGMENT_HEADER_LEN)];
    let expected = (cluster.system_identifier, cluster.segment_size);
    let is_this_one = check_segment_header(front, own.len() as u64, segment, expected).is_ok();
    Ok(is_this_one.then(|| own.into()))
}

/// A process that looks like a restore_command.
#[cfg(test)]
pub(super) mod tests {
    use std::process::{Child, Command};

    use super::*;

    pub struct RestoreCommand {
        child: Child,
        pub folder: tempfile::TempDir,
    }

    impl RestoreCommand {
        pub fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            fs::create_dir(folder.path().join("pg_wal")).unwrap();
            fs::write(folder.path().join(RECOVERY_SIGNAL), "").unwrap();
            let child = Command::new("sleep").arg("60").current_dir(&folder).spawn().unwrap();
            Self { child, folder }
        }

        pub fn caller(&self) -> Caller {
            Caller { pid: Some(self.child.id()), ..Caller::internal() }
        }

        pub fn end(&mut self) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }

    impl Drop for RestoreCommand {
        fn drop(&mut self) {
            // It may have been ended.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    #[tokio::test]
    async fn a_recovery_is_known_by_the_signal_file_in_its_directory() {
        let mut command = RestoreCommand::new();
        let (caller, folder) = (command.caller(), command.folder.path().to_owned());
        let is_known = async || RestoringServer::of(&caller).await.is_some();
        assert!(is_known().await);
        assert!(RestoringServer::of(&Caller::internal()).await.is_none());
        fs::write(folder.join(STANDBY_SIGNAL), "").unwrap();
        assert!(!is_known().await);
        fs::remove_file(folder.join(STANDBY_SIGNAL)).unwrap();
        fs::remove_file(folder.join(RECOVERY_SIGNAL)).unwrap();
        assert!(!is_known().await);
        fs::write(folder.join(RECOVERY_SIGNAL), "").unwrap();
        command.end();
        assert!(!is_known().await, "it is gone");
    }
}
