//! What can be wrong with what a server sends as a basebackup.
//!
//! A basebackup of which any of this is true is given up: nothing of it counts.

use crate::backup::stream::tar_reader::TarError;
use crate::pg::{ControlFileError, Lsn, Oid};

/// Why a received basebackup is none.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// An archive cannot be read.
    #[error("the archive of {archive}: {source}")]
    Archive { archive: String, source: TarError },
    /// A name that leaves the data directory, or is too long.
    #[error("the archive of {archive} names \"{path}\"")]
    Name { archive: String, path: String },
    /// A file the server writes in place was caught half written; nobody reads it again for us.
    #[error("\"{path}\" cannot be used: {detail}")]
    Torn { path: String, detail: String },
    /// `pg_control` was caught half written, or is none of ours.
    #[error("pg_control cannot be used: {0}")]
    ControlFile(ControlFileError),
    /// A file without which nothing starts did not come.
    #[error("\"{0}\" did not come")]
    Missing(&'static str),
    /// A file that has to be in memory is larger than any of its kind.
    #[error("\"{path}\" has {bytes} bytes")]
    TooLarge { path: String, bytes: u64 },
    /// A tablespace the server knows has no archive.
    #[error("tablespace {oid} is not part of it")]
    Tablespace { oid: Oid },
    /// The manifest cannot be read.
    #[error("its manifest, line {line}: {detail}")]
    Manifest { line: u64, detail: String },
    /// Of a file only changes came, and what they change is not known here.
    #[error("of \"{path}\" only what has changed came, and what was there before is not known")]
    NotKnown { path: String },
    /// A file of which only changes came cannot be read.
    #[error("\"{path}\" {detail}")]
    Partial { path: String, detail: &'static str },
    /// What came is not what the server has summed up.
    #[error("\"{path}\" {detail}")]
    Different { path: String, detail: String },
    /// The manifest is about other WAL.
    #[error("its manifest is about WAL from {from} to {to}, which is not that of the backup")]
    Wal { from: Lsn, to: Lsn },
    /// The server lets the role in, and not for this.
    #[error("role \"{role}\" may not have the server send its files: {message}")]
    MayNotReplicate { role: String, message: String },
    /// The connection that carries it does not lead to the server of the session.
    #[error("the replication connection does not lead to the server of the session, at {address}")]
    OtherServer { address: String },
}

impl StreamError {
    /// Returns whether the next attempt may do better.
    pub(in crate::backup) fn is_passing(&self) -> bool {
        match self {
            Self::Torn { .. } | Self::Tablespace { .. } => true,
            Self::ControlFile(error) => *error == ControlFileError::Checksum,
            _ => false,
        }
    }

    /// Returns whether the server may be asked for everything instead: what it sent of changes cannot be put together.
    pub(in crate::backup) fn is_of_changes(&self) -> bool {
        matches!(self, Self::NotKnown { .. } | Self::Partial { .. })
    }

    /// Returns whether something has to be set up first; a name that cannot be taken this way can the other.
    pub(in crate::backup) fn is_input(&self) -> bool {
        matches!(self, Self::MayNotReplicate { .. } | Self::OtherServer { .. } | Self::Name { .. })
    }

    /// Returns a sentence that says what to do.
    pub(in crate::backup) fn hint(&self) -> &'static str {
        match self {
            Self::MayNotReplicate { .. } => {
                "Give the role REPLICATION, and pg_hba.conf a line `host replication ROLE ADDRESS METHOD`."
            }
            Self::OtherServer { .. } => {
                "Connect to the server itself: one address, without a balancer, that pg_hba.conf lets both in by."
            }
            Self::Tablespace { .. } => {
                "It was created at this moment, or in place on a server that leaves such out (15): take the \
                 basebackup again, or from the data directory."
            }
            _ if self.is_passing() => "The server was writing it; take the basebackup again.",
            Self::Name { .. } => {
                "Take the basebackup from the data directory, on the server's host (backup_source = \"data-directory\")."
            }
            Self::ControlFile(_) => {
                "pg_controldata on the server's host says whether it is the server's own that is wrong."
            }
            // What no server of PostgreSQL's sends.
            Self::Archive { .. }
            | Self::Missing(_)
            | Self::TooLarge { .. }
            | Self::Manifest { .. }
            | Self::Partial { .. }
            | Self::Different { .. }
            | Self::Wal { .. }
            | Self::Torn { .. }
            | Self::NotKnown { .. } => {
                "Take it again; if it stays, look at what stands between this host and the server, and take it from \
                 the data directory meanwhile."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::backup::error::{Error, ErrorKind};

    use super::*;

    #[test]
    fn what_can_be_done_about_it_is_what_the_hint_says() {
        let path = || "base/5/16384".to_owned();
        let kind = |error: StreamError| Error::from(error).kind();
        let name = StreamError::Name { archive: "the data directory".to_owned(), path: path() };
        assert!(name.hint().contains("backup_source"), "{}", name.hint());
        assert_eq!(kind(name), ErrorKind::Input);
        assert_eq!(kind(StreamError::Tablespace { oid: Oid(7) }), ErrorKind::Retry);
        // Everything is asked for then; if it comes up all the same, the server was not writing anything.
        let not_known = StreamError::NotKnown { path: path() };
        assert!(
            not_known.is_of_changes() && !not_known.hint().contains("was writing"),
            "{}",
            not_known.hint()
        );
        assert_eq!(kind(not_known), ErrorKind::Damaged);
    }
}
