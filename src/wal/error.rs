//! Why a WAL file was not archived or not restored.
//!
//! *Absent* is no error but an answer, and not in here: whatever is, keeps the archiver trying and stops recovery.

use std::path::PathBuf;

use thiserror::Error;

use crate::disk;
use crate::pg::{
    ControlFileError, HistoryError, Lsn, ParseArchiveFileNameError, SegmentError, TimelineId,
    WalSegmentError, WalSegmentName,
};
use crate::replication;
use crate::repo::{self, ClusterId};

/// What went wrong with one file.
#[derive(Debug, Error)]
pub enum Error {
    /// The name is none that PostgreSQL archives.
    #[error(transparent)]
    Name(#[from] ParseArchiveFileNameError),
    /// The name is not one of a cluster with segments of this size.
    #[error(transparent)]
    SegmentName(#[from] WalSegmentError),
    /// The path does not end in a file in a folder of a data directory.
    #[error("\"{}\" is not a file in pg_wal of a data directory", path.display())]
    Path { path: PathBuf },
    /// A local file could not be read.
    #[error("could not read \"{}\": {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// A local file became another one while it was read.
    #[error("\"{}\" changed while it was read", path.display())]
    Changed { path: PathBuf },
    /// The control file of the data directory says nothing.
    #[error("\"{}\": {error}", path.display())]
    ControlFile { path: PathBuf, error: ControlFileError },
    /// The data directory is a clone's.
    #[error("the data directory \"{}\" is that of clone \"{name}\", which must not archive", path.display())]
    Clone { path: PathBuf, name: String },
    /// The file is not what its name claims.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The segment was written on a timeline that came after its name's.
    #[error("{name} was written on timeline {found}, which is later than that of its name")]
    LaterTimeline { name: String, found: TimelineId },
    /// A file that is text and small is neither.
    #[error("\"{}\" is not a file of the kind its name says: {detail}", path.display())]
    Malformed { path: PathBuf, detail: String },
    /// The history file does not describe its timeline.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The recovery plan cannot be used.
    #[error("the recovery plan \"{}\" cannot be used: {detail}", path.display())]
    Plan { path: PathBuf, detail: String },
    /// Nothing of the cluster was ever archived into this site.
    #[error("there is no WAL of cluster {cluster} in this site")]
    NoArchive { cluster: ClusterId },
    /// A file that recovery needs is not there.
    #[error("{name} is missing from the archive, and recovery needs it")]
    Missing { name: String },
    /// WAL came that does not follow what is spooled.
    #[error("WAL at byte {offset} of segment {segment} does not follow the {known} bytes that are spooled")]
    SpoolGap { segment: WalSegmentName, known: u32, offset: u32 },
    /// A server cannot be received from.
    #[error("the server at {address} cannot be received from: {detail}")]
    UnfitServer { address: String, detail: String },
    /// A primary has less WAL than was received from it, on the same timeline: what it writes next is another.
    #[error(
        "the server at {address} was set back: its WAL ends at {flushed} on timeline {timeline}, before {here}, which is \
         received already"
    )]
    SetBack { address: String, timeline: TimelineId, flushed: Lsn, here: Lsn },
    /// A server cannot say how it came to its timeline, and nobody else does.
    #[error(
        "the server at {address} cannot be received from: it has no history file of its timeline {timeline}, without which \
         it sends nothing of those before, and what follows here is not known to be its WAL"
    )]
    NoHistory { address: String, timeline: TimelineId },
    /// The replication slot cannot be used.
    #[error("replication slot \"{slot}\" cannot be used: {detail}")]
    Slot { slot: String, detail: String },
    /// The server is of another cluster than the spool's WAL.
    #[error("the server is of cluster {found}, and the spool holds WAL of {expected}")]
    OtherCluster { expected: ClusterId, found: ClusterId },
    /// A server failed.
    #[error(transparent)]
    Session(#[from] replication::Error),
    /// What stands in the place of a segment that was to be archived cannot be read.
    #[error("it cannot be told whether the segment is archived: {0}")]
    InPlace(repo::Error),
    /// The repository failed.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// A local file could not be written.
    #[error(transparent)]
    Disk(#[from] disk::Error),
}

/// What the reader of an error can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A later attempt may succeed.
    Retry,
    /// The command line, the configuration or the data directory has to change.
    Input,
    /// A file is not what it should be.
    Damaged,
    /// It is our fault.
    Bug,
}

impl Error {
    /// Returns what can be done.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Changed { .. } => ErrorKind::Retry,
            Self::Name(_)
            | Self::SegmentName(_)
            | Self::Path { .. }
            | Self::Unreadable { .. }
            | Self::Clone { .. }
            | Self::Slot { .. }
            | Self::OtherCluster { .. }
            | Self::NoArchive { .. } => ErrorKind::Input,
            Self::UnfitServer { .. } | Self::SetBack { .. } | Self::NoHistory { .. } => ErrorKind::Retry,
            Self::SpoolGap { .. } => ErrorKind::Bug,
            Self::Session(error) => match error.kind() {
                replication::ErrorKind::Retry => ErrorKind::Retry,
                replication::ErrorKind::Input => ErrorKind::Input,
                replication::ErrorKind::Bug => ErrorKind::Bug,
            },
            Self::ControlFile { .. }
            | Self::Segment(_)
            | Self::LaterTimeline { .. }
            | Self::Malformed { .. }
            | Self::History(_)
            | Self::Plan { .. }
            | Self::InPlace(_)
            | Self::Missing { .. } => ErrorKind::Damaged,
            Self::Repository(error) => match error.kind() {
                repo::ErrorKind::Retry => ErrorKind::Retry,
                repo::ErrorKind::Absent | repo::ErrorKind::Input => ErrorKind::Input,
                repo::ErrorKind::Damaged => ErrorKind::Damaged,
                repo::ErrorKind::Bug => ErrorKind::Bug,
            },
            Self::Disk(error) => match error.kind() {
                disk::ErrorKind::Retry => ErrorKind::Retry,
                disk::ErrorKind::Input => ErrorKind::Input,
                disk::ErrorKind::Damaged => ErrorKind::Damaged,
            },
        }
    }

    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Name(_) => "PostgreSQL fills in %p and %f; by hand, give a file of pg_wal.",
            Self::Path { .. } => {
                "Run it as archive_command = 'walden wal push %p', or in the data directory."
            }
            Self::ControlFile { .. } => {
                "walden looks for global/pg_control beside pg_wal; run it in the data directory."
            }
            Self::Clone { .. } => {
                "A clone never archives; clone finalize --adopt makes it a cluster of its own."
            }
            Self::Segment(SegmentError::OtherCluster { .. }) => {
                "The file was copied from another cluster; archive only what this server wrote."
            }
            Self::InPlace(_) => {
                "walden wal push --force archives this segment beside it, and readers take this one."
            }
            Self::Plan { .. } => "Remove the file to let walden make a new plan from the archive.",
            Self::NoArchive { .. } => {
                "Check --site and the storage url: recovery would end at once if this were believed."
            }
            Self::Missing { .. } => {
                "Push it again from pg_wal of the server that wrote it, or recover to a point before it."
            }
            Self::NoHistory { .. } => {
                "Copy the file into pg_wal of that server: from another one, or from the archive by walden wal fetch."
            }
            Self::OtherCluster { .. } => {
                "Let the spool be stored first: start the receiver with the old server's store reachable."
            }
            Self::Repository(error) => return error.hint(),
            _ => return None,
        })
    }
}
