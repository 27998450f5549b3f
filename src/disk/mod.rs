//! Local files: durable write and rename, files without a name, reading up to a limit, locks, free space, Walden's
//! private area, the clone marker.
//!
//! Everything here is synchronous and small; a caller on an async thread hands the slow ones (whatever
//! fsyncs) to a blocking thread. A path that comes back from `durable` without error is on stable storage
//! with its directory entry: that is the promise the layers above build on. Deliberately absent: the data
//! path of restore and mount, which sync in bulk.

pub mod clone_marker;
pub mod durable;
pub mod lock;
pub mod owner;
pub mod private_area;
pub mod reading_rights;
pub mod space;
pub mod staged_file;
pub mod state_file;
pub mod steady_file;
pub mod unnamed_file;

use std::io;
use std::path::{Path, PathBuf};

pub use clone_marker::CloneMarker;
pub use lock::LockFile;
pub use owner::Owner;
pub use private_area::{Binding, PrivateArea};
pub use space::Space;
pub use staged_file::StagedFile;
pub use steady_file::SteadyFile;

/// What went wrong with a local file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("could not {action} \"{}\": {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// A file that must be new is there already.
    #[error("\"{}\" exists already", path.display())]
    Exists { path: PathBuf },
    /// Another process holds the lock.
    #[error("\"{}\" is locked by {}", path.display(), lock::describe_holder(*holder))]
    Locked { path: PathBuf, holder: Option<i32> },
    /// A private area belongs to another basebackup.
    #[error("\"{}\" belongs to basebackup {found}, not to {wanted}", path.display())]
    BoundElsewhere { path: PathBuf, found: String, wanted: String },
    /// A file became another one while it was read.
    #[error("\"{}\" changed while it was read", path.display())]
    Changed { path: PathBuf },
    /// A file of Walden's own cannot be read as what it should be.
    #[error("\"{}\" is not readable as {what}: {detail}", path.display())]
    Malformed { path: PathBuf, what: &'static str, detail: String },
}

/// What a caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The same call may succeed later.
    Retry,
    /// A path, a right or an option has to change first.
    Input,
    /// What is on the disk is not what was written.
    Damaged,
}

impl Error {
    /// Returns what a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => ErrorKind::Retry,
            Self::Io { .. } | Self::Exists { .. } | Self::BoundElsewhere { .. } => ErrorKind::Input,
            Self::Locked { .. } | Self::Changed { .. } => ErrorKind::Retry,
            Self::Malformed { .. } => ErrorKind::Damaged,
        }
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Io { source, .. } => hint_of(source),
            Self::Locked { .. } => Some("Wait until that process has ended."),
            Self::Exists { .. }
            | Self::BoundElsewhere { .. }
            | Self::Changed { .. }
            | Self::Malformed { .. } => None,
        }
    }

    /// Returns the system's error, where there is one.
    pub fn io(&self) -> Option<&io::Error> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Returns true when the path was not there.
    pub fn is_not_found(&self) -> bool {
        self.io().is_some_and(|source| source.kind() == io::ErrorKind::NotFound)
    }

    /// Returns a closure for `map_err` that names the action and the path.
    pub(crate) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// Returns what the user should do about a file or folder that the system refuses.
pub fn hint_of(error: &io::Error) -> Option<&'static str> {
    Some(match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "Let the user that walden runs as read and write there, or choose another place."
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "The file system is mounted read-only: mount it writable, or choose another place."
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "Make room there.",
        _ => return None,
    })
}
