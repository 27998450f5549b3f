//! Why the state cannot be read or written, in terms of what a basebackup does about it.
//!
//! None of it has to fail a basebackup but a lock that another holds: without a state to compare with it is a full one,
//! without a state of its own the next one compares with the old state or is a full one.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::backup::state::format::Flaw;
use crate::disk;

/// What failed.
#[derive(Debug, Error)]
pub enum StateError {
    /// Another process takes a basebackup of this site on this host.
    #[error("another basebackup of this site is being taken on this host, by {}", disk::lock::describe_holder(*holder))]
    Busy { path: PathBuf, holder: Option<i32> },
    /// What is on the disk is not what was written.
    #[error("the state \"{}\" is damaged: {detail}", path.display())]
    Damaged { path: PathBuf, detail: String },
    /// A newer release wrote it.
    #[error("the state \"{}\" has version {version}, this release reads version {supported}", path.display())]
    Unsupported { path: PathBuf, version: u32, supported: u32 },
    /// A call of the system failed.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Something was to be written after an error that left the file in parts.
    #[error("the state \"{}\" was given up after an error", path.display())]
    GivenUp { path: PathBuf },
    /// What was to be written does not fit together.
    #[error("cannot note what is known of \"{file}\": {what}")]
    Refused { file: String, what: &'static str },
}

/// What the caller can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateErrorKind {
    /// The same call may succeed later.
    Retry,
    /// A path or a right has to change first.
    Input,
    /// Data is damaged: the next basebackup is a full one.
    Damaged,
    /// Another release is needed to read it: the next basebackup is a full one.
    Unsupported,
    /// It is our fault.
    Bug,
}

impl StateError {
    /// Returns what the caller can do.
    pub fn kind(&self) -> StateErrorKind {
        match self {
            Self::Busy { .. } | Self::GivenUp { .. } => StateErrorKind::Retry,
            Self::Damaged { .. } => StateErrorKind::Damaged,
            Self::Unsupported { .. } => StateErrorKind::Unsupported,
            Self::Disk(error) => match error.kind() {
                disk::ErrorKind::Retry => StateErrorKind::Retry,
                disk::ErrorKind::Input => StateErrorKind::Input,
                disk::ErrorKind::Damaged => StateErrorKind::Damaged,
            },
            Self::Refused { .. } => StateErrorKind::Bug,
        }
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Busy { .. } => Some("Wait until it has ended."),
            Self::Disk(error) => error.hint(),
            Self::Damaged { .. } | Self::Unsupported { .. } | Self::GivenUp { .. } | Self::Refused { .. } => {
                None
            }
        }
    }

    /// Says of a state what is wrong with one part of it.
    pub(super) fn damaged(path: &Path, part: &str, flaw: &Flaw) -> Self {
        Self::Damaged { path: path.to_owned(), detail: format!("its {part} {flaw}") }
    }
}
