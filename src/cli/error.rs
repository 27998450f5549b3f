//! What a command returns when it fails: what to tell the user and what to tell the script.
//!
//! Every module's error comes in through a `From` that maps its own `kind()` exhaustively, so that a new kind
//! below is a compile error here and never a wrong exit status. Commands add context with [`CommandError::context`].

use std::error::Error as StdError;

use crate::codec;
use crate::config;
use crate::disk;
use crate::replication;
use crate::repo;
use crate::storage;

use super::exit::ExitKind;

/// The failure of a command.
#[derive(Debug)]
pub struct CommandError {
    /// What it means to the caller.
    pub kind: ExitKind,
    /// What went wrong, with its causes.
    pub error: anyhow::Error,
    /// What to do about it, as a sentence.
    pub hint: Option<String>,
}

impl CommandError {
    /// Creates an error that has no module behind it.
    pub fn new(kind: ExitKind, message: impl Into<String>) -> Self {
        Self { kind, error: anyhow::Error::msg(message.into()), hint: None }
    }

    /// Creates an error of the command line's own making.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ExitKind::Usage, message)
    }

    /// Creates a failure that nothing more is known of.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(ExitKind::Failed, message)
    }

    /// Creates the error of a command that panicked.
    pub(super) fn panicked() -> Self {
        Self::new(ExitKind::Bug, "internal error: the command panicked")
    }

    /// Says what was being done.
    #[must_use]
    pub fn context(self, what: impl Into<String>) -> Self {
        Self { error: self.error.context(what.into()), ..self }
    }

    /// Says what to do, in place of an earlier hint.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Returns the message with its causes, each said once.
    pub fn message(&self) -> String {
        let mut message = String::new();
        for cause in self.error.chain().map(ToString::to_string) {
            // Many errors quote their source already.
            if message.is_empty() {
                message = cause;
            } else if !message.contains(&cause) {
                message = format!("{message}: {cause}");
            }
        }
        message
    }

    fn from_module<E>(kind: ExitKind, error: E, hint: Option<String>) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        Self { kind, error: error.into(), hint }
    }
}

impl From<config::Error> for CommandError {
    fn from(error: config::Error) -> Self {
        let kind = match error.kind() {
            config::ErrorKind::Configuration => ExitKind::Configuration,
            config::ErrorKind::Disk => ExitKind::Failed,
            config::ErrorKind::Store(kind) => of_store(kind),
        };
        let hint = error.hint();
        Self::from_module(kind, error, hint)
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
        Self::from_module(kind, error, hint)
    }
}

impl From<disk::Error> for CommandError {
    fn from(error: disk::Error) -> Self {
        let kind = match error.kind() {
            disk::ErrorKind::Retry | disk::ErrorKind::Input => ExitKind::Failed,
            disk::ErrorKind::Damaged => ExitKind::Damaged,
        };
        Self::from_module(kind, error, None)
    }
}

impl From<storage::Error> for CommandError {
    fn from(error: storage::Error) -> Self {
        let kind = of_store(error.kind());
        Self::from_module(kind, error, None)
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
        Self::from_module(kind, error, hint)
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
        Self::from_module(kind, error, hint)
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

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn causes_are_said_once() {
        let source = io::Error::from_raw_os_error(2);
        let disk = disk::Error::Io { action: "open", path: PathBuf::from("/x"), source };
        let error = CommandError::from(disk).context("could not take the lock").hint("Wait.");
        assert_eq!(
            error.message(),
            "could not take the lock: could not open \"/x\": No such file or directory (os error 2)"
        );
        assert_eq!((error.kind, error.hint.as_deref()), (ExitKind::Failed, Some("Wait.")));
    }

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
