//! Why there are no credentials: of one source, and of the chain.
//!
//! Only a source without any lets the next one be asked; the others end the chain (decision 0304).

/// Why one source gave nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SourceError {
    /// It has none to give; the next source is asked.
    Absent(String),
    /// It is set up and refuses, or what it gives is of no use.
    Refused(String),
    /// It does not answer, or cannot now.
    Unreachable(String),
}

/// Why a request could not be signed; it was not sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(in crate::storage) enum NoCredentials {
    /// No source has any.
    #[error("no source has credentials: {}", .said.join("; "))]
    Nowhere {
        /// Each source with its reason.
        said: Vec<String>,
        /// Whether there were some before, so that asking again may help.
        had: bool,
    },
    /// A source that is set up has none to give.
    #[error("no credentials from {source_name}: {why}")]
    Refused {
        /// The source.
        source_name: String,
        /// What it said.
        why: String,
    },
    /// A source that is set up does not answer.
    #[error("no credentials from {source_name}, which does not answer: {why}")]
    Unreachable {
        /// The source.
        source_name: String,
        /// What is known.
        why: String,
    },
    /// What a source gives is what the store has refused already.
    #[error("{source_name} has no other credentials than those that the store no longer accepts")]
    NoOthers {
        /// The source.
        source_name: String,
    },
}

impl NoCredentials {
    /// Says whether asking again may help.
    pub(in crate::storage) fn is_retryable(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Nowhere { had: true, .. })
    }

    /// Returns what to do about it.
    pub(in crate::storage) fn hint(&self) -> &'static str {
        match self {
            Self::Nowhere { .. } => {
                "Set access_key_id and secret_access_key_file, or one of the sources that are named."
            }
            Self::Refused { .. } | Self::Unreachable { .. } => {
                "Correct that source, or set access_key_id and secret_access_key_file, which come before it."
            }
            Self::NoOthers { .. } => "Renew the credentials where that source gets them.",
        }
    }
}
