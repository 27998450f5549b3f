//! Why a basebackup cannot be restored, and what can be done about it.
//!
//! What refuses a target is found before anything is written; what fails later leaves a directory that no server
//! starts on and that `--resume` completes.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::catalog::host::OtherArchitecture;
use crate::codec;
use crate::disk;
use crate::repo;
use crate::storage;

/// What failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// The basebackup is of another architecture.
    #[error(transparent)]
    Architecture(#[from] OtherArchitecture),
    /// A local file of Walden's.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The CPU pool.
    #[error("cannot decompress: {0}")]
    Codec(#[from] codec::Error),
    /// A file or directory of the target.
    #[error("could not {action} \"{}\": {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// Something is in the directory.
    #[error("\"{}\" is not empty", path.display())]
    NotEmpty { path: PathBuf },
    /// Something is in the directory, and Walden did not put it there.
    #[error("\"{}\" is not empty, and was not restored by walden", path.display())]
    NotRestored { path: PathBuf },
    /// Something is in the directory, and what a restore has left there does not speak of it.
    #[error("\"{}\" is not empty, and its walden.restore.json is of {of}", path.display())]
    StrangeMarker { path: PathBuf, of: String },
    /// A restore of this directory has not ended.
    #[error("\"{}\" holds an unfinished restore", path.display())]
    Unfinished { path: PathBuf },
    /// No restore of this directory is unfinished.
    #[error("\"{}\" holds no unfinished restore", path.display())]
    NothingToResume { path: PathBuf },
    /// The unfinished restore in the directory was begun in another.
    #[error("\"{}\" holds the unfinished restore of \"{}\"", path.display(), began.display())]
    Moved { path: PathBuf, began: PathBuf },
    /// A delta needs a data directory of the same cluster.
    #[error("\"{}\" is not a data directory of this cluster: {reason}", path.display())]
    OtherCluster { path: PathBuf, reason: String },
    /// A server runs there.
    #[error("a server is running in \"{}\" (process {pid})", path.display())]
    Running { path: PathBuf, pid: i32 },
    /// A server may run there, such as one in a container, whose processes have other numbers.
    #[error("\"{}\" {}, which may be a running server", path.display(), names(*pid))]
    MayRun { path: PathBuf, pid: Option<i32> },
    /// The place is no directory of a disk.
    #[error("\"{}\" is {what}", path.display())]
    Unfit { path: PathBuf, what: String },
    /// One place is in another that must stay apart.
    #[error("\"{}\" and {other} are in each other's way", path.display())]
    Overlap { path: PathBuf, other: String },
    /// The directory belongs to somebody else.
    #[error("\"{}\" belongs to user {owner}, and walden runs as user {user}", path.display())]
    Owner { path: PathBuf, owner: u32, user: u32 },
    /// The file system is too small.
    #[error("\"{}\" has {free} bytes free, and {needed} are needed", path.display())]
    NoSpace { path: PathBuf, needed: u64, free: u64 },
    /// No tablespace is called that.
    #[error("the basebackup has no tablespace \"{name}\"")]
    UnknownTablespace { name: String },
    /// A tablespace is mapped twice.
    #[error("tablespace \"{name}\" is mapped twice")]
    MappedTwice { name: String },
    /// The WAL creates a tablespace where something of this host is.
    #[error("recovery would create tablespace {oid} in \"{}\", which is not empty on this host", path.display())]
    ReplayedTablespace { oid: u32, path: PathBuf },
    /// A text that cannot stand in a configuration file.
    #[error("{what} has a line break in it")]
    LineBreak { what: &'static str },
    /// Root does not carry out what another user has decided.
    #[error("the unfinished restore in \"{}\" was begun by user {author}", path.display())]
    OthersPlan { path: PathBuf, author: String },
    /// The plan of an unfinished restore cannot be used.
    #[error("\"{}\" is not a plan of this release: {detail}", path.display())]
    State { path: PathBuf, detail: String },
    /// Bytes of a file never came, although nothing failed.
    #[error("{bytes} bytes of \"{}\" are in no chunk", path.display())]
    Missing { path: PathBuf, bytes: u64 },
    /// A task of ours ended without an answer.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What a caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A path, a right or an option has to change.
    Input,
    /// What is stored is damaged.
    Damaged,
    /// It is our fault.
    Bug,
}

impl Error {
    /// Returns what can be done, for what is not an error of a module below.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Missing { .. } => ErrorKind::Damaged,
            Self::Internal(_) | Self::Codec(_) => ErrorKind::Bug,
            _ => ErrorKind::Input,
        }
    }

    /// Returns whether it was a disk, an I/O call or the store: once that is put right, the same restore can go on.
    ///
    /// Damage needs another basebackup or a repair first, and to a fault of ours nothing can be done.
    pub fn may_be_resumed(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Disk(disk::Error::Io { .. }) => true,
            Self::Repository(repo::Error::Store(error)) => match error.kind() {
                storage::ErrorKind::Unreachable
                | storage::ErrorKind::OutcomeUnknown
                | storage::ErrorKind::Denied
                | storage::ErrorKind::Full
                | storage::ErrorKind::Invalid
                | storage::ErrorKind::Other => true,
                storage::ErrorKind::NotFound
                | storage::ErrorKind::AlreadyExists
                | storage::ErrorKind::Truncated
                | storage::ErrorKind::TooLarge => false,
            },
            _ => false,
        }
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Repository(error) => return error.hint(),
            Self::Disk(error) => return error.hint(),
            Self::Io { source, .. } => return disk::hint_of(source),
            Self::Architecture(error) => error.hint(),
            Self::NotEmpty { .. } => {
                "Give an empty directory; --force replaces what walden has restored there, --delta what differs."
            }
            Self::NotRestored { .. } | Self::StrangeMarker { .. } => {
                "Empty it yourself, or let --delta turn a data directory into this one."
            }
            Self::Unfinished { .. } => "Go on with --resume, or start again with --force.",
            Self::NothingToResume { .. } => "Leave --resume out.",
            Self::Moved { .. } => "Move it back there, or start again with --force.",
            Self::OtherCluster { .. } => "Restore into an empty directory.",
            Self::Running { .. } => "Stop it first.",
            Self::MayRun { .. } => {
                "Look in containers and at other users' processes; remove the file when it is certain that no server runs."
            }
            Self::Overlap { .. } => "Choose places of which none is within another.",
            Self::Owner { .. } => "Run walden as the owner of the directory, or as root.",
            Self::NoSpace { .. } => "Choose a larger file system, or map tablespaces to others.",
            Self::UnknownTablespace { .. } => "\"walden show\" lists the tablespaces.",
            Self::ReplayedTablespace { .. } => {
                "Choose an earlier target, restore on another host, or make a clone, which keeps replay inside."
            }
            Self::OthersPlan { .. } => {
                "Resume it as that user; root goes on only with what root has begun. Or start again with --force."
            }
            Self::State { .. } => "Resume it with the release that began it, or start again with --force.",
            _ => return None,
        })
    }

    pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

fn names(pid: Option<i32>) -> String {
    pid.map_or_else(|| "names no process".to_owned(), |pid| format!("names process {pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_put_right_outside_is_told_from_damage_and_from_our_faults() {
        let path = || PathBuf::from("/t");
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        let (key, verb) = (|| "main/packs/0".to_owned(), storage::error::Verb::GetRange);
        let store = |error| Error::Repository(repo::Error::Store(error));
        let damaged = repo::Error::Damaged { object: key(), detail: "cut".to_owned() };
        for (error, resumed) in [
            (Error::Io { action: "write", path: path(), source: denied() }, true),
            (Error::Disk(disk::Error::Io { action: "write", path: path(), source: denied() }), true),
            (store(storage::Error::Unreachable { verb, key: key(), reason: None, source: None }), true),
            (store(storage::Error::Denied { verb, key: key(), source: None }), true),
            (store(storage::Error::Full { verb, key: key(), source: None }), true),
            (store(storage::Error::NotFound { key: key() }), false),
            (store(storage::Error::Truncated { key: key(), expected: 2, received: 1 }), false),
            (Error::Repository(damaged), false),
            (Error::Disk(disk::Error::Locked { path: path(), holder: Some(7) }), false),
            (Error::NothingToResume { path: path() }, false),
            (Error::Missing { path: path(), bytes: 1 }, false),
            (Error::Internal("a task ended".to_owned()), false),
        ] {
            assert_eq!(error.may_be_resumed(), resumed, "{error}");
        }
    }
}
