//! Why a basebackup could not be taken, in terms of what can be done about it.
//!
//! Whatever the error, nothing of the attempt counts: the outcome is created last or not at all.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::codec;
use crate::repo;

/// What failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The source cannot be read.
    #[error("could not {action} \"{}\": {source}", path.display())]
    Source { action: &'static str, path: PathBuf, source: io::Error },
    /// A name of the source cannot stand in a basebackup: the path is too long.
    #[error("cannot back up a file with this name: {0}")]
    Name(#[from] repo::entry::InvalidPath),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// A job on the CPU pool failed.
    #[error("cannot compress: {0}")]
    Codec(#[from] codec::Error),
}

impl Error {
    /// Returns a closure for `map_err` that names the action and the path.
    pub(crate) fn reading(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Source { action, path: path.to_owned(), source }
    }
}
