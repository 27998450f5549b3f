//! Why a restore cannot go on while its server runs, and what can be done about it.
//! What refuses it at the beginning is found before anything is written; what fails later leaves a directory that no
//! server starts on, and that `--resume` mounts again.

use std::error::Error as StdError;
use std::path::PathBuf;

use crate::control;
use crate::disk::{self, Owner};
use crate::instance::lazy_uppers::MountFailure;
use crate::instance::programs::ProgramsError;
use crate::instance::server::ServerError;
use crate::mount::MountError;
use crate::mount::lower::LowerError;
use crate::mount::upper::OpenError;
use crate::mount::upper::file_system::Unsuitable;
use crate::repo;
use crate::restore;

/// What failed.
#[derive(Debug, thiserror::Error)]
pub enum InstantError {
    /// Planning, or a file of the target.
    #[error(transparent)]
    Restore(#[from] restore::Error),
    /// A file of Walden's own.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// The mounts; what the repository had against them is an error of the repository.
    #[error(transparent)]
    Mount(MountFailure),
    /// A file system that cannot hold what is filled while it is used.
    #[error(transparent)]
    FileSystem(#[from] Unsuitable),
    /// PostgreSQL's programs.
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    /// PostgreSQL.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The socket.
    #[error(transparent)]
    Control(#[from] control::Error),
    /// Nothing can be mounted.
    #[error("this host cannot mount: {detail}")]
    NoFuse { detail: String },
    /// There is no configuration to start the server with.
    #[error("the source's configuration is outside its data directory, and no server starts without")]
    NoConfiguration,
    /// The server would run as root.
    #[error("PostgreSQL does not run as root, and \"{}\" would belong to root", .0.display())]
    RootOwner(PathBuf),
    /// A tablespace is not where it was.
    #[error("\"{}\" has nothing of the tablespace that was being restored there", .0.display())]
    NotThere(PathBuf),
    /// A directory of the restore belongs to somebody else.
    #[error(
        "\"{}\" belongs to user {}, and the server runs as user {}",
        path.display(), found.user(), owner.user()
    )]
    NotItsOwn { path: PathBuf, found: Owner, owner: Owner },
    /// Another process serves it.
    #[error("the restore in \"{}\" is being served already", .0.display())]
    Served(PathBuf),
    /// A step of making it plain.
    #[error("could not {action} \"{}\": {source}", path.display())]
    Ending { action: &'static str, path: PathBuf, source: std::io::Error },
    /// A task of ours ended without an answer.
    #[error("internal error: {0}")]
    Internal(String),
}

impl From<MountFailure> for InstantError {
    fn from(error: MountFailure) -> Self {
        match error {
            MountFailure::Repository(error) => error.into(),
            error => Self::Mount(error),
        }
    }
}

impl InstantError {
    /// Tells what kept the mounts from what is in the repository, if that did.
    pub fn kind_of_lower(&self) -> Option<repo::ErrorKind> {
        let Self::Mount(MountFailure::Upper(OpenError::Lower(error))) = self else { return None };
        Some(match error {
            LowerError::Unreachable { .. } => repo::ErrorKind::Retry,
            LowerError::Damaged { .. } | LowerError::Untrusted { .. } | LowerError::Missing { .. } => {
                repo::ErrorKind::Damaged
            }
            LowerError::Contract { .. } => repo::ErrorKind::Bug,
        })
    }

    /// Returns what it says, with every cause said once.
    pub(super) fn told(&self) -> String {
        let mut message = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let said = error.to_string();
            if !message.contains(&said) {
                message = format!("{message}: {said}");
            }
            cause = error.source();
        }
        message
    }

    /// Returns what the user should do.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Restore(error) => return error.hint().map(str::to_owned),
            Self::Disk(error) => return error.hint().map(str::to_owned),
            Self::Repository(error) => return error.hint().map(str::to_owned),
            Self::Mount(MountFailure::Mount(MountError::Busy { .. })) => {
                "What has files of the dead mount open can still write to them: end it, then go on with --resume."
                    .to_owned()
            }
            Self::Mount(_) | Self::Server(_) | Self::Control(_) | Self::Ending { .. } | Self::Internal(_) => {
                return None;
            }
            Self::FileSystem(_) => {
                "Choose a directory on ext4, xfs or btrfs, or restore without --instant.".to_owned()
            }
            Self::Programs(error) => return error.hint(),
            Self::NoFuse { .. } => {
                "Load the kernel module fuse, and install fuse3 where walden does not run as root; or restore \
                 without --instant."
                    .to_owned()
            }
            Self::NoConfiguration => "Restore it as well with --config-dir.".to_owned(),
            Self::RootOwner(_) => {
                "Make the directory, and give it to the user that is to run PostgreSQL.".to_owned()
            }
            Self::NotThere(_) => "Is its disk mounted? Mount it, then go on with --resume.".to_owned(),
            Self::NotItsOwn { .. } => {
                "Look who has put it there; give it to the server's user, then go on with --resume.".to_owned()
            }
            Self::Served(_) => "\"walden restore --resume\" follows it.".to_owned(),
        })
    }
}
