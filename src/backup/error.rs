//! Why a basebackup could not be taken, in terms of what can be done about it.
//!
//! Whatever the error, nothing of the attempt counts: the outcome is created last or not at all.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use crate::backup::source::SourceError;
use crate::backup::state::{StateError, StateErrorKind};
use crate::backup::stream::StreamError;
use crate::codec;
use crate::disk;
use crate::pg::{ControlFileError, TimelineId, WalSegmentName};
use crate::repo;

/// What failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or directory of the source cannot be read.
    #[error("could not {action} \"{}\": {source}", path.display())]
    Read { action: &'static str, path: PathBuf, source: io::Error },
    /// A tablespace is there for the server and not for this process.
    #[error("could not find the directory of tablespace {oid}, \"{}\": {source}", path.display())]
    Tablespace { oid: u32, path: PathBuf, source: io::Error },
    /// `pg_control` is not one that Walden understands.
    #[error("\"{}\" cannot be used: {source}", path.display())]
    ControlFile { path: PathBuf, source: ControlFileError },
    /// A name of the source cannot stand in a basebackup: the path is too long.
    #[error("cannot back up a file with this name: {0}")]
    Name(#[from] repo::entry::InvalidPath),
    /// The server's side failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// What the server sent is no basebackup.
    #[error("the server sent a basebackup that cannot be used: {0}")]
    Received(#[from] StreamError),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// Another basebackup of the site is being taken on this host.
    #[error(transparent)]
    State(#[from] StateError),
    /// A local file of Walden's failed.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// A job on the CPU pool failed.
    #[error("cannot compress: {0}")]
    Codec(#[from] codec::Error),
    /// The data directory is a clone's.
    #[error("\"{}\" is the data directory of clone \"{clone}\"", path.display())]
    Clone { path: PathBuf, clone: String },
    /// The server's pages have another size than PostgreSQL's usual one.
    #[error("the server has pages of {0} bytes, only 8192 are supported")]
    BlockSize(u32),
    /// No server is named.
    #[error("there is no server to take a basebackup from")]
    NoNode,
    /// The server archives no WAL.
    #[error("the server does not archive WAL: {reason}")]
    NotArchiving { reason: &'static str },
    /// WAL that the basebackup needs did not come.
    #[error("WAL segment {segment} did not arrive in the archive within {} s", waited.as_secs())]
    WalMissing { segment: WalSegmentName, waited: Duration },
    /// What was asked for takes the data directory.
    #[error("{what} takes the data directory, and this site's basebackups come through the server")]
    NeedsDirectory { what: &'static str },
    /// The server does not keep its WAL for a standalone basebackup.
    #[error("the server does not keep WAL for a standalone basebackup: {message}")]
    WalNotHeld { message: String },
    /// WAL that a standalone basebackup was to carry is gone.
    #[error("WAL segment {segment} was removed or recycled before it could be copied")]
    WalLost { segment: WalSegmentName },
    /// The session is gone that kept WAL for a standalone basebackup: by that the server also takes its slot away.
    #[error("the session that kept WAL for the standalone basebackup was lost: {detail}")]
    WalHolderLost { detail: String },
    /// The history file without which recovery cannot follow the timeline is nowhere.
    #[error("the history file of timeline {timeline} is neither in pg_wal nor in the archive")]
    HistoryMissing { timeline: TimelineId },
}

/// What the caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Something on this host, of the server or of the store failed; a later attempt may work.
    Retry,
    /// The configuration of Walden or of the server has to change first.
    Input,
    /// Data is damaged or not trusted.
    Damaged,
    /// It is our fault.
    Bug,
}

impl Error {
    /// Returns what the caller can do.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::InvalidData => ErrorKind::Damaged,
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => ErrorKind::Input,
            Self::Read { .. }
            | Self::WalMissing { .. }
            | Self::WalLost { .. }
            | Self::WalHolderLost { .. }
            | Self::HistoryMissing { .. } => ErrorKind::Retry,
            Self::ControlFile { source: ControlFileError::Checksum, .. } => ErrorKind::Damaged,
            Self::ControlFile { .. }
            | Self::Name(_)
            | Self::Tablespace { .. }
            | Self::Clone { .. }
            | Self::NoNode
            | Self::WalNotHeld { .. }
            | Self::NeedsDirectory { .. }
            | Self::BlockSize(_)
            | Self::NotArchiving { .. } => ErrorKind::Input,
            Self::Source(SourceError::Session(_) | SourceError::ServerChanged { .. }) => ErrorKind::Retry,
            Self::Source(_) => ErrorKind::Input,
            Self::Received(error) if error.is_input() => ErrorKind::Input,
            Self::Received(error) if error.is_passing() => ErrorKind::Retry,
            Self::Received(_) => ErrorKind::Damaged,
            Self::Repository(error) => match error.kind() {
                repo::ErrorKind::Absent | repo::ErrorKind::Retry => ErrorKind::Retry,
                repo::ErrorKind::Input => ErrorKind::Input,
                repo::ErrorKind::Damaged => ErrorKind::Damaged,
                repo::ErrorKind::Bug => ErrorKind::Bug,
            },
            Self::Disk(error) => match error.kind() {
                disk::ErrorKind::Retry => ErrorKind::Retry,
                disk::ErrorKind::Input => ErrorKind::Input,
                disk::ErrorKind::Damaged => ErrorKind::Damaged,
            },
            Self::State(error) => match error.kind() {
                StateErrorKind::Retry => ErrorKind::Retry,
                StateErrorKind::Input | StateErrorKind::Unsupported => ErrorKind::Input,
                StateErrorKind::Damaged => ErrorKind::Damaged,
                StateErrorKind::Bug => ErrorKind::Bug,
            },
            Self::Codec(_) => ErrorKind::Bug,
        }
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "Run walden as the owner of the data directory, or as root."
            }
            Self::Tablespace { .. } => {
                "A backup without it would be none. Run walden where it sees what the server sees (mind containers, \
                 and ProtectHome in its unit); drop the tablespace if its directory is lost."
            }
            Self::Clone { .. } => "A clone is no server to back up; see \"walden clone finalize --adopt\".",
            Self::NotArchiving { .. } => {
                "Set archive_mode = on and archive_command = 'walden wal push %p' in postgresql.conf."
            }
            Self::WalMissing { .. } => {
                "pg_stat_archiver and the server's log say why archiving fails; on a standby the primary has to \
                 finish the segment (SELECT pg_switch_wal())."
            }
            Self::NeedsDirectory { .. } => {
                "Run it on the server's host, with backup_source = \"data-directory\" or without that line."
            }
            Self::WalNotHeld { .. } => {
                "It is kept by a temporary replication slot: the role needs the REPLICATION attribute, and the server a \
                 free slot (max_replication_slots)."
            }
            Self::WalLost { .. } => {
                "Take another basebackup; raise max_slot_wal_keep_size where the server writes more WAL than that while \
                 one is taken."
            }
            Self::WalHolderLost { .. } => {
                "Take another basebackup. If the server's log says that a replication slot was invalidated, raise \
                 max_slot_wal_keep_size: it writes more WAL than that while one is taken."
            }
            Self::HistoryMissing { .. } => "Archive it with \"walden wal push\" from a server that has it.",
            Self::Source(error) => return error.hint(),
            Self::Received(error) => error.hint(),
            Self::State(error) => return error.hint().map(str::to_owned),
            Self::Repository(error) => return error.hint().map(str::to_owned),
            _ => return None,
        };
        Some(hint.to_owned())
    }

    /// Returns a closure for `map_err` that names the action and the path.
    pub(crate) fn reading(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { action, path: path.to_owned(), source }
    }
}
