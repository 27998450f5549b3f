//! PostgreSQL's vocabulary and file formats, pure: no file is opened here, no clock is read.
//! Words first (positions, timelines, segments, names), then the files that are read by their bytes.

mod lsn;
mod system_identifier;
mod timeline;
mod wal_segment;

mod archive_file_name;
mod control_file;
mod timeline_history;
mod wal_page;

pub use archive_file_name::{ArchiveFileName, InvalidArchiveFileName};
pub use control_file::{CONTROL_FILE_SIZE, ClusterState, ControlFile, ControlFileError, RecoveryLimits};
pub use lsn::{Lsn, ParseLsnError};
pub use system_identifier::SystemIdentifier;
pub use timeline::{TimelineId, TimelineZero};
pub use timeline_history::{HistoryError, TimelineHistory, TimelineSwitch};
pub use wal_page::{SEGMENT_HEADER_LEN, SegmentError, SegmentHeader};
pub use wal_segment::{
    InvalidSegmentName, InvalidSegmentSize, WalSegmentName, WalSegmentNumber, WalSegmentSize,
};
