//! The manifest of the basebackup that is built upon, sent to the server so that it sends only what has changed since.
//!
//! Written from what this host remembers: paths and sizes are all that a server of 17 or later looks at, and the WAL of
//! that basebackup, from whose start on its summaries are read. It goes up as it is written, a piece at a time. What is
//! not in it is sent whole: visibility maps, whose changes no summary names (decision 2102), are left out.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::backup::data_directory::server_path;
use crate::backup::error::Error;
use crate::backup::known_parent::KnownParent;
use crate::backup::run::blocking;
use crate::backup::server_facts::ServerFacts;
use crate::backup::source::SourceError;
use crate::backup::state::StateError;
use crate::codec::Sha256;
use crate::pg::{BackupManifest, DataPath, ManifestChecksum, RelationFile};
use crate::replication::{ManifestUpload, ReplicationConnection};

/// Bytes of a piece, about.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces that are written before the server has taken the first.
const PIECES_AHEAD: usize = 4;

/// Sends the manifest of `parent`; returns the connection, for the backup.
///
/// # Errors
/// `Session` with the server's words where it takes it for none.
pub async fn upload(
    connection: ReplicationConnection,
    parent: Arc<KnownParent>,
    facts: &ServerFacts,
) -> Result<ReplicationConnection, Error> {
    let mut upload = ManifestUpload::start(connection).await.map_err(SourceError::from)?;
    let (pieces, mut written) = mpsc::channel::<Vec<u8>>(PIECES_AHEAD);
    let (version, system_identifier) = (facts.version, facts.identity.system_identifier);
    let writing = blocking(move || {
        // Where nobody takes it, whoever was to send it has failed, and says why.
        let give = |piece| pieces.blocking_send(piece).is_ok();
        Ok(write(&parent, BackupManifest::new(version, system_identifier, Sha256::new()), give)?)
    });
    let sending = async {
        while let Some(piece) = written.recv().await {
            upload.push(&piece).await.map_err(SourceError::from)?;
        }
        Ok::<_, Error>(())
    };
    tokio::try_join!(writing, sending)?;
    Ok(upload.finish().await.map_err(SourceError::from)?)
}

/// Writes the manifest a piece at a time, until all of it is given away or nobody takes it.
///
/// # Errors
/// Where what is remembered cannot be read: then no manifest is whole.
pub(super) fn write(
    parent: &KnownParent,
    mut manifest: BackupManifest<Sha256>,
    mut give: impl FnMut(Vec<u8>) -> bool,
) -> Result<(), StateError> {
    let of = parent.facts();
    let mut gathered = 0;
    for known in parent.files() {
        let known = known?;
        let Some(path) = server_path(&known.path).and_then(|path| DataPath::new(path).ok()) else {
            continue;
        };
        if !may_come_in_parts(&path) {
            continue;
        }
        gathered += path.as_bytes().len() + 100;
        manifest.file(&path, known.size, of.started_at, ManifestChecksum::None);
        if gathered >= PIECE_BYTES {
            gathered = 0;
            if !give(manifest.take()) {
                return Ok(());
            }
        }
    }
    manifest.wal_range(of.timeline, of.start_lsn, of.stop_lsn);
    give(manifest.finish());
    Ok(())
}

/// Tells whether the server may send what has changed of a file instead of all of it.
pub fn may_come_in_parts(path: &DataPath) -> bool {
    RelationFile::classify(path).is_none_or(|relation| relation.fork.is_logged())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_summary_speaks_for_comes_whole() {
        let may = |path: &str| may_come_in_parts(&DataPath::new(path.as_bytes().to_vec()).unwrap());
        for path in ["base/5/16384", "base/5/16384.1", "base/5/16384_init", "global/1262", "PG_VERSION"] {
            assert!(may(path), "{path}");
        }
        for path in ["base/5/16384_vm", "base/5/16384_vm.1", "base/5/16384_fsm", "global/1262_vm"] {
            assert!(!may(path), "{path}");
        }
    }
}
