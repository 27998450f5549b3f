//! What can go wrong with a store, in the words the layers above decide by.
//!
//! The distinction that matters most is between *absent* and *cannot tell*: only [`Error::NotFound`] says
//! that an object is not there. Whatever stands between us and the answer (a dead peer, a refused
//! permission, a missing bucket) is another kind, so that nobody takes a failing store for the end of the
//! archive.
//!
//! Deliberately absent: exit statuses and errnos. The layers above choose them by [`ErrorKind`].

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::disk;

use super::refusal::{Refusal, Unheard, find, is_about_a_certificate};
use super::s3::credentials::NoCredentials;

/// What a store, a library or the kernel said; shared, so that an error can be given to every waiter of one
/// read.
pub type Source = Arc<dyn StdError + Send + Sync>;

/// Says which call failed, on which object, and how.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The store answered that there is no such object.
    #[error("object {key} does not exist")]
    NotFound {
        /// The object asked for.
        key: String,
    },
    /// A create found the key taken.
    #[error("object {key} already exists")]
    AlreadyExists {
        /// The object to be created.
        key: String,
    },
    /// The store did not answer, or answered that it cannot now; nothing is known about the object.
    #[error("could not {verb} {key}: the store did not answer{}", .reason.as_deref().map(|r| format!(": {r}")).unwrap_or_default())]
    Unreachable {
        /// What was asked.
        verb: Verb,
        /// The object or prefix asked for.
        key: String,
        /// What is known beyond the source, such as how often it was tried.
        reason: Option<String>,
        /// The last failure.
        source: Option<Source>,
    },
    /// The store refused the credentials or the permission.
    #[error("could not {verb} {key}: the store denied it")]
    Denied {
        /// What was asked.
        verb: Verb,
        /// The object or prefix asked for.
        key: String,
        /// The refusal.
        source: Option<Source>,
    },
    /// The object ends before the last byte asked for.
    #[error("object {key} is truncated: {received} bytes of {expected}")]
    Truncated {
        /// The object read.
        key: String,
        /// Bytes asked for.
        expected: u64,
        /// Bytes there.
        received: u64,
    },
    /// The object, or a folder's listing, is larger than the caller allows.
    #[error("{key} is too large: {size} is more than {size_max}")]
    TooLarge {
        /// The object or prefix read.
        key: String,
        /// Its size, or the least it can be.
        size: u64,
        /// The caller's bound.
        size_max: u64,
    },
    /// A create was sent and its answer lost; the object may exist or come to exist.
    #[error("could not learn whether {key} was created")]
    OutcomeUnknown {
        /// The object to be created.
        key: String,
        /// What was heard last.
        source: Option<Source>,
    },
    /// No space, quota or inode is left.
    #[error("could not {verb} {key}: no space is left in the store")]
    Full {
        /// What was asked.
        verb: Verb,
        /// The object to be written.
        key: String,
        /// What the kernel or the store said.
        source: Option<Source>,
    },
    /// The location, an option or the call itself is wrong; trying again does not help.
    #[error("{reason}")]
    Invalid {
        /// The location, object or prefix concerned.
        key: String,
        /// What is wrong, naming `key`.
        reason: String,
        /// What a library said.
        source: Option<Source>,
    },
    /// Anything else.
    #[error("could not {verb} {key}")]
    Other {
        /// What was asked.
        verb: Verb,
        /// The object or prefix concerned.
        key: String,
        /// What was said.
        source: Source,
    },
}

/// Sorts errors by what the caller can do about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The object is proven absent.
    NotFound,
    /// The key is taken.
    AlreadyExists,
    /// Try again, later.
    Unreachable,
    /// Fix credentials or permissions.
    Denied,
    /// The object is damaged, or the range asked for is wrong.
    Truncated,
    /// The object is not what the caller takes it for.
    TooLarge,
    /// Read the object to learn what happened.
    OutcomeUnknown,
    /// Make room.
    Full,
    /// Fix the configuration, or the calling code.
    Invalid,
    /// Read the source.
    Other,
}

/// Names what is asked of a store, one for each method of `Store`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Verb {
    /// `Store::create`.
    Create,
    /// `Store::get`.
    Get,
    /// `Store::get_range`.
    GetRange,
    /// `Store::head`.
    Head,
    /// `Store::list`.
    List,
    /// `Store::list_folder`.
    ListFolder,
    /// `Store::delete`.
    Delete,
}

impl Verb {
    /// Every verb, in the order of the trait.
    pub const ALL: [Self; 7] =
        [Self::Create, Self::Get, Self::GetRange, Self::Head, Self::List, Self::ListFolder, Self::Delete];

    /// Returns the word used in messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Get => "read",
            Self::GetRange => "read a range of",
            Self::Head => "look up",
            Self::List => "list",
            Self::ListFolder => "list the folder",
            Self::Delete => "delete",
        }
    }
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Error {
    /// Returns what the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } => ErrorKind::AlreadyExists,
            Self::Unreachable { .. } => ErrorKind::Unreachable,
            Self::Denied { .. } => ErrorKind::Denied,
            Self::Truncated { .. } => ErrorKind::Truncated,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::OutcomeUnknown { .. } => ErrorKind::OutcomeUnknown,
            Self::Full { .. } => ErrorKind::Full,
            Self::Invalid { .. } => ErrorKind::Invalid,
            Self::Other { .. } => ErrorKind::Other,
        }
    }

    /// Returns the object, prefix or location concerned.
    pub fn key(&self) -> &str {
        match self {
            Self::NotFound { key }
            | Self::AlreadyExists { key }
            | Self::Unreachable { key, .. }
            | Self::Denied { key, .. }
            | Self::Truncated { key, .. }
            | Self::TooLarge { key, .. }
            | Self::OutcomeUnknown { key, .. }
            | Self::Full { key, .. }
            | Self::Invalid { key, .. }
            | Self::Other { key, .. } => key,
        }
    }

    /// Returns what to do about it, where that follows from the store's answer.
    pub fn hint(&self) -> Option<&'static str> {
        let source = StdError::source(self)?;
        if let Some(none) = find::<NoCredentials>(source) {
            return Some(none.hint());
        }
        match (self, find::<Refusal>(source)) {
            (_, Some(refusal)) => refusal.hint(),
            (Self::Invalid { .. }, None) if is_about_a_certificate(source) => {
                Some("Set ca_file to the certificates of the authority that signed it.")
            }
            // A folder says what any folder does.
            (Self::Denied { .. } | Self::Full { .. }, None) => {
                find::<io::Error>(source).and_then(disk::hint_of)
            }
            (_, None) => None,
        }
    }

    /// Returns how long the store asked to be left alone.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        find::<Refusal>(StdError::source(self)?)?.retry_after
    }

    /// Says whether nobody was reached, or nobody answered: the time it took was no transfer of anything.
    pub(super) fn carried_nothing(&self) -> bool {
        StdError::source(self).is_some_and(|source| find::<Unheard>(source).is_some())
    }

    /// Says whether the store answered that the object does not exist; every other error leaves that open.
    pub fn is_absent(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }

    /// Says whether the same call may succeed a moment later.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind(), ErrorKind::Unreachable | ErrorKind::OutcomeUnknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_proves_absence() {
        let key = || "main/site.json".to_owned();
        assert!(Error::NotFound { key: key() }.is_absent());
        let unreachable = Error::Unreachable { verb: Verb::Get, key: key(), reason: None, source: None };
        let denied = Error::Denied { verb: Verb::Get, key: key(), source: None };
        for error in [&unreachable, &denied] {
            assert!(!error.is_absent(), "{error}");
            assert_eq!(error.key(), "main/site.json");
        }
        assert!(unreachable.is_retryable() && !denied.is_retryable());
    }

    #[test]
    fn a_message_says_what_and_which() {
        let source: Source = Arc::new(std::io::Error::other("connection reset"));
        let error = Error::Unreachable {
            verb: Verb::GetRange,
            key: "a/b".to_owned(),
            reason: Some("given up after 3 attempts".to_owned()),
            source: Some(source),
        };
        assert_eq!(
            error.to_string(),
            "could not read a range of a/b: the store did not answer: given up after 3 attempts"
        );
        assert_eq!(StdError::source(&error).unwrap().to_string(), "connection reset");
    }
}
