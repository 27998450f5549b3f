//! What can be wrong with a repository, in terms of what its reader can do about it.
//!
//! *Damaged* and *untrusted* data is never served; *wrong key* is told apart from damage by the commitment;
//! *not there* is told apart from *can't tell* by the store's answer.

use thiserror::Error;

use crate::codec;
use crate::disk;
use crate::repo::id::{BasebackupId, ClusterId, InvalidName, PackId};
use crate::storage;

/// What failed in a repository.
#[derive(Debug, Error)]
pub enum Error {
    /// The store failed or does not have the object.
    #[error(transparent)]
    Store(#[from] storage::Error),
    /// The bytes are not what was written.
    #[error("{object} is damaged: {detail}")]
    Damaged { object: String, detail: String },
    /// No trusted signer vouches for the object.
    #[error("{object} is not trusted: {detail}")]
    Untrusted { object: String, detail: String },
    /// The private key for the object's recipients is not configured here.
    #[error("{object} is encrypted for {recipients}, and none of these private keys is here")]
    NoPrivateKey { object: String, recipients: String },
    /// The key that was unwrapped is not the key that the object was sealed with.
    #[error("{object} was sealed with another key than the one it names")]
    WrongKey { object: String },
    /// The object is not encrypted, and this reader is configured to accept only what is.
    #[error("{object} is not encrypted, and this configuration expects encryption")]
    Unencrypted { object: String },
    /// The object needs features that this release does not have.
    #[error("{object} needs repository features {features:#x} that this release does not know")]
    NewerFormat { object: String, features: u32 },
    /// The basebackup has no outcome yet.
    #[error("basebackup {0} is not complete")]
    Incomplete(BasebackupId),
    /// The attempt was given up.
    #[error("basebackup {0} was abandoned")]
    Abandoned(BasebackupId),
    /// Retention has marked the basebackup.
    #[error("basebackup {0} has expired")]
    Expired(BasebackupId),
    /// Packs of earlier basebackups that this one was to name are gone, or not as long as they were.
    #[error("packs that were to be reused are missing or cut: {}", list(.0))]
    PacksMissing(Vec<PackId>),
    /// Something else stands where this object was to be created.
    #[error("{object} already exists with different content")]
    Different { object: String },
    /// A cluster that the site is not of was about to write into it.
    #[error("cluster {cluster} is not of this site, which is of {}", clusters(.known))]
    ForeignCluster { cluster: ClusterId, known: Vec<ClusterId> },
    /// The store does not keep what the repository's safety rests on.
    #[error("the store does not {lacks}, which it has to")]
    UnsuitableStore { lacks: &'static str },
    /// Something is larger than the format allows.
    #[error("{what} of {size} bytes is larger than the {max} that are supported")]
    TooLarge { what: String, size: u64, max: u64 },
    /// What was to be archived could not be read.
    #[error(transparent)]
    Content(#[from] disk::Error),
    /// A text is not a name of this format.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// Sealing or opening failed for a reason that is not the object's.
    #[error("cannot seal or open an object: {0}")]
    Codec(#[from] codec::Error),
    /// A task of ours ended without an answer.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What the reader of an error can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The store answered that the object is not there.
    Absent,
    /// The store cannot tell now; a later attempt may.
    Retry,
    /// The configuration or the request is wrong.
    Input,
    /// The data is damaged or untrusted.
    Damaged,
    /// It is our fault.
    Bug,
}

impl Error {
    /// What to do about damage, whoever met it.
    pub const DAMAGED_HINT: &str =
        "Use another basebackup, or repair the object from a copy of the repository.";

    /// Returns what can be done.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Store(error) if error.is_absent() => ErrorKind::Absent,
            Self::Store(error) => match error.kind() {
                storage::ErrorKind::Denied | storage::ErrorKind::Invalid | storage::ErrorKind::Full => {
                    ErrorKind::Input
                }
                storage::ErrorKind::Truncated | storage::ErrorKind::TooLarge => ErrorKind::Damaged,
                _ => ErrorKind::Retry,
            },
            Self::Damaged { .. }
            | Self::Untrusted { .. }
            | Self::Unencrypted { .. }
            | Self::PacksMissing(_) => ErrorKind::Damaged,
            Self::NoPrivateKey { .. }
            | Self::WrongKey { .. }
            | Self::NewerFormat { .. }
            | Self::Incomplete(_)
            | Self::Abandoned(_)
            | Self::Expired(_)
            | Self::Different { .. }
            | Self::ForeignCluster { .. }
            | Self::UnsuitableStore { .. }
            | Self::TooLarge { .. }
            | Self::InvalidName(_) => ErrorKind::Input,
            Self::Content(error) => match error.kind() {
                disk::ErrorKind::Retry => ErrorKind::Retry,
                disk::ErrorKind::Input => ErrorKind::Input,
                disk::ErrorKind::Damaged => ErrorKind::Damaged,
            },
            Self::Codec(_) | Self::Internal(_) => ErrorKind::Bug,
        }
    }

    /// Returns whether the store answered that the object is not there.
    pub fn is_absent(&self) -> bool {
        self.kind() == ErrorKind::Absent
    }

    /// Returns whether the object it is said of can be used by nobody here. What seems to be of a later release may be one
    /// bit that flipped.
    pub fn is_unusable(&self) -> bool {
        matches!(self, Self::NewerFormat { .. }) || self.kind() == ErrorKind::Damaged
    }

    /// Returns whether nobody answered who could tell: the same call may succeed a moment later, whatever the object is.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_retryable())
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Damaged { .. } => Self::DAMAGED_HINT,
            Self::Untrusted { .. } => {
                "If the object is yours, add its signer to trusted_signers; otherwise somebody else wrote it."
            }
            Self::NoPrivateKey { .. } => {
                "Set private_key_file of one of these keys on hosts that read backups."
            }
            Self::WrongKey { .. } => "The private key file does not belong to the public key of that id.",
            Self::Unencrypted { .. } => {
                "Remove recipients and private keys from the configuration to read it all the same."
            }
            Self::NewerFormat { .. } => "Use the release of walden that wrote it, or a newer one.",
            Self::Incomplete(_) => "It is still running, or it was killed; take another basebackup.",
            Self::PacksMissing(_) => "Take another basebackup: what is missing by then is stored again.",
            Self::UnsuitableStore { .. } => {
                "Two writers would overwrite each other; use a store with conditional puts, or switch them on there."
            }
            Self::ForeignCluster { .. } => {
                "After pg_upgrade or a new initdb run `walden site upgrade`; otherwise give this server a site of its own."
            }
            Self::Store(error) => return error.hint(),
            Self::Content(error) => return error.hint(),
            Self::Different { .. } => {
                "Another cluster or another host archives into this site; see `walden wal push --force`."
            }
            _ => return None,
        })
    }

    pub(crate) fn damaged(object: impl ToString, detail: impl ToString) -> Self {
        Self::Damaged { object: object.to_string(), detail: detail.to_string() }
    }

    pub(crate) fn untrusted(object: impl ToString, detail: impl ToString) -> Self {
        Self::Untrusted { object: object.to_string(), detail: detail.to_string() }
    }
}

/// Names a few of many packs.
fn list(packs: &[PackId]) -> String {
    const NAMED_MAX: usize = 3;
    let named: Vec<String> = packs.iter().take(NAMED_MAX).map(ToString::to_string).collect();
    match packs.len().saturating_sub(NAMED_MAX) {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

fn clusters(known: &[ClusterId]) -> String {
    let names: Vec<String> = known.iter().map(ToString::to_string).collect();
    names.join(", ")
}
