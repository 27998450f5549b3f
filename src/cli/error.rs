//! What a command returns when it fails: what to tell the user and what to tell the script.
//!
//! The errors of modules come in through the `From`s of `module_errors`. Commands add what they were doing with
//! [`CommandError::context`] and what to do about it with [`CommandError::hint`].

use std::error::Error as StdError;

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

    pub(super) fn of_module<E>(kind: ExitKind, error: E, hint: Option<String>) -> Self
    where
        E: StdError + Send + Sync + 'static,
    {
        Self { kind, error: error.into(), hint }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::PathBuf;

    use super::*;
    use crate::disk;

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
}
