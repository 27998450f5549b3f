//! From the error of every module to the failure of a command.
//!
//! Each `From` maps its module's own kinds exhaustively, so that a new kind below is a compile error here and never a
//! wrong exit status.

use crate::backup;
use crate::catalog;
use crate::codec;
use crate::config;
use crate::control;
use crate::disk;
use crate::instance::adoption::AdoptionError;
use crate::instance::create::CreateError;
use crate::instance::finalize::FinalizeError;
use crate::instance::instant::InstantError;
use crate::replication;
use crate::repo;
use crate::restore;
use crate::storage;

use super::error::CommandError;
use super::exit::ExitKind;

impl From<config::Error> for CommandError {
    fn from(error: config::Error) -> Self {
        let kind = match error.kind() {
            config::ErrorKind::Configuration => ExitKind::Configuration,
            config::ErrorKind::Disk => ExitKind::Failed,
            config::ErrorKind::Store(kind) => of_store(kind),
        };
        let hint = error.hint();
        Self::of_module(kind, error, hint)
    }
}

impl From<codec::Error> for CommandError {
    fn from(error: codec::Error) -> Self {
        let kind = match error.kind() {
            codec::ErrorKind::Damaged => ExitKind::Damaged,
            codec::ErrorKind::WrongKey | codec::ErrorKind::FixInput => ExitKind::Configuration,
            codec::ErrorKind::Bug => ExitKind::Bug,
        };
        let hint = error.hint();
        Self::of_module(kind, error, hint)
    }
}

impl From<disk::Error> for CommandError {
    fn from(error: disk::Error) -> Self {
        let kind = match error.kind() {
            disk::ErrorKind::Retry | disk::ErrorKind::Input => ExitKind::Failed,
            disk::ErrorKind::Damaged => ExitKind::Damaged,
        };
        let hint = error.hint().map(str::to_owned);
        Self::of_module(kind, error, hint)
    }
}

impl From<CreateError> for CommandError {
    fn from(error: CreateError) -> Self {
        let hint = error.hint();
        match error {
            CreateError::Repository(error) => error.into(),
            CreateError::Recovery(error) => error.into(),
            CreateError::Disk(error) => Self { hint, ..error.into() },
            CreateError::Programs(_)
            | CreateError::Architecture(_)
            | CreateError::InTheMaking { .. }
            | CreateError::RootOwner
            | CreateError::ResourceManagers(_)
            | CreateError::SocketPath(_) => Self::of_module(ExitKind::Failed, error, hint),
        }
    }
}

impl From<FinalizeError> for CommandError {
    fn from(error: FinalizeError) -> Self {
        let hint = error.hint();
        match error {
            FinalizeError::Disk(error) => error.into(),
            FinalizeError::Space(error) => error.into(),
            FinalizeError::Missing { .. }
            | FinalizeError::Taken { .. }
            | FinalizeError::Inside { .. }
            | FinalizeError::NotPrivate { .. }
            | FinalizeError::Strange { .. }
            | FinalizeError::Author { .. }
            | FinalizeError::SocketPath(_) => Self::of_module(ExitKind::Failed, error, hint),
        }
    }
}

impl From<InstantError> for CommandError {
    fn from(error: InstantError) -> Self {
        let hint = error.hint();
        match error {
            InstantError::Restore(error) => error.into(),
            InstantError::Disk(error) => error.into(),
            InstantError::Repository(error) => error.into(),
            InstantError::Control(error) => error.into(),
            InstantError::Internal(_) => Self::of_module(ExitKind::Bug, error, hint),
            InstantError::Mount(_) => {
                let kind = match error.kind_of_lower() {
                    Some(repo::ErrorKind::Retry) => ExitKind::Unreachable,
                    Some(repo::ErrorKind::Damaged) => ExitKind::Damaged,
                    Some(repo::ErrorKind::Bug) => ExitKind::Bug,
                    Some(repo::ErrorKind::Absent | repo::ErrorKind::Input) | None => ExitKind::Failed,
                };
                Self::of_module(kind, error, hint)
            }
            InstantError::FileSystem(_)
            | InstantError::Programs(_)
            | InstantError::Server(_)
            | InstantError::NoFuse { .. }
            | InstantError::NoConfiguration
            | InstantError::RootOwner(_)
            | InstantError::NotThere(_)
            | InstantError::NotItsOwn { .. }
            | InstantError::Served(_)
            | InstantError::Ending { .. } => Self::of_module(ExitKind::Failed, error, hint),
        }
    }
}

impl From<AdoptionError> for CommandError {
    fn from(error: AdoptionError) -> Self {
        let hint = error.hint().map(str::to_owned);
        match error {
            AdoptionError::Repository(error) => error.into(),
            AdoptionError::Disk(error) => error.into(),
            AdoptionError::History(_)
            | AdoptionError::NoHistory { .. }
            | AdoptionError::Taken { .. }
            | AdoptionError::OtherBranch { .. } => Self::of_module(ExitKind::Failed, error, hint),
        }
    }
}

impl From<storage::Error> for CommandError {
    fn from(error: storage::Error) -> Self {
        let kind = of_store(error.kind());
        let hint = error.hint().map(str::to_owned);
        Self::of_module(kind, error, hint)
    }
}

impl From<replication::Error> for CommandError {
    fn from(error: replication::Error) -> Self {
        let kind = match (error.kind(), &error) {
            (replication::ErrorKind::Retry, _) => ExitKind::Unreachable,
            (replication::ErrorKind::Input, replication::Error::Sql { .. }) => ExitKind::Failed,
            (replication::ErrorKind::Input, _) => ExitKind::Configuration,
            (replication::ErrorKind::Bug, _) => ExitKind::Bug,
        };
        let hint = error.hint();
        Self::of_module(kind, error, hint)
    }
}

impl From<repo::Error> for CommandError {
    fn from(error: repo::Error) -> Self {
        let kind = match (error.kind(), &error) {
            (_, repo::Error::Store(error)) => of_store(error.kind()),
            (repo::ErrorKind::Absent, _) => ExitKind::Failed,
            (repo::ErrorKind::Retry, _) => ExitKind::Unreachable,
            (repo::ErrorKind::Damaged, _) => ExitKind::Damaged,
            (repo::ErrorKind::Bug, _) => ExitKind::Bug,
            (repo::ErrorKind::Input, repo::Error::NoPrivateKey { .. } | repo::Error::WrongKey { .. }) => {
                ExitKind::Configuration
            }
            (repo::ErrorKind::Input, _) => ExitKind::Failed,
        };
        let hint = error.hint().map(str::to_owned);
        Self::of_module(kind, error, hint)
    }
}

fn of_store(kind: storage::ErrorKind) -> ExitKind {
    match kind {
        storage::ErrorKind::NotFound | storage::ErrorKind::AlreadyExists => ExitKind::Failed,
        storage::ErrorKind::Unreachable | storage::ErrorKind::OutcomeUnknown => ExitKind::Unreachable,
        storage::ErrorKind::Denied | storage::ErrorKind::Invalid => ExitKind::Configuration,
        storage::ErrorKind::Truncated | storage::ErrorKind::TooLarge => ExitKind::Damaged,
        storage::ErrorKind::Full | storage::ErrorKind::Other => ExitKind::Failed,
    }
}

impl From<backup::Error> for CommandError {
    fn from(error: backup::Error) -> Self {
        let kind = match error {
            backup::Error::Repository(error) => return error.into(),
            backup::Error::Disk(error) => return error.into(),
            backup::Error::Source(backup::SourceError::Session(error)) => return error.into(),
            // The server's session all the same, however it is told.
            backup::Error::WalHolderLost { .. } => ExitKind::Unreachable,
            _ => match error.kind() {
                backup::ErrorKind::Retry => ExitKind::Failed,
                backup::ErrorKind::Input => ExitKind::Configuration,
                backup::ErrorKind::Damaged => ExitKind::Damaged,
                backup::ErrorKind::Bug => ExitKind::Bug,
            },
        };
        let hint = error.hint();
        Self::of_module(kind, error, hint)
    }
}

impl From<restore::Error> for CommandError {
    fn from(error: restore::Error) -> Self {
        let kind = match error {
            restore::Error::Repository(error) => return error.into(),
            restore::Error::Disk(error) => return error.into(),
            _ => match error.kind() {
                restore::ErrorKind::Input => ExitKind::Failed,
                restore::ErrorKind::Damaged => ExitKind::Damaged,
                restore::ErrorKind::Bug => ExitKind::Bug,
            },
        };
        let hint = error.hint().map(str::to_owned);
        Self::of_module(kind, error, hint)
    }
}

impl From<catalog::ResolveError> for CommandError {
    fn from(error: catalog::ResolveError) -> Self {
        let kind = match &error {
            catalog::ResolveError::NoBasebackup
            | catalog::ResolveError::NotFound { .. }
            | catalog::ResolveError::TooFarBack { .. } => ExitKind::Failed,
            catalog::ResolveError::Ambiguous { .. } => ExitKind::Usage,
            catalog::ResolveError::Unreadable { .. } => ExitKind::Damaged,
        };
        let hint = error.hint().map(str::to_owned);
        Self::of_module(kind, error, hint)
    }
}

impl From<catalog::RecoveryError> for CommandError {
    fn from(error: catalog::RecoveryError) -> Self {
        let hint = error.hint().map(str::to_owned);
        match error {
            catalog::RecoveryError::Repository(error) => error.into(),
            catalog::RecoveryError::Basebackup(error) => error.into(),
            catalog::RecoveryError::Plan(_)
            | catalog::RecoveryError::NoneBefore { .. }
            | catalog::RecoveryError::NoneOnTimeline { .. } => Self::of_module(ExitKind::Failed, error, hint),
        }
    }
}

impl From<control::Error> for CommandError {
    fn from(error: control::Error) -> Self {
        let kind = match &error {
            control::Error::NotRunning { .. }
            | control::Error::Io { .. }
            | control::Error::Stranger { .. } => ExitKind::Failed,
            control::Error::Malformed { .. } => ExitKind::Bug,
        };
        Self::of_module(kind, error, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_does_not_answer_is_not_damaged_data() {
        let key = || "a/b".to_owned();
        let verb = storage::error::Verb::Get;
        let unreachable = storage::Error::Unreachable { verb, key: key(), reason: None, source: None };
        let truncated = storage::Error::Truncated { key: key(), expected: 2, received: 1 };
        assert_eq!(CommandError::from(unreachable).kind, ExitKind::Unreachable);
        assert_eq!(CommandError::from(truncated).kind, ExitKind::Damaged);
    }
}
