//! PostgreSQL's vocabulary and file formats, pure: no file is opened here, no clock is read.
//!
//! Words first (positions, timelines, segments, names, versions), then the files that are read by their bytes, by
//! the rules of the server's own source for versions 13 to 18. What another version wrote is refused by name, and
//! no decoder panics or allocates by a number it read.

mod lsn;
mod oid;
mod system_identifier;
mod timeline;
mod transaction;
mod version;
mod wal_segment;

mod archive_file_name;
mod timeline_history;

mod backup_rule;
mod data_path;
mod relation_file;

mod crc32c;
mod field_reader;

mod backup_label;
mod backup_manifest;
mod control_file;
pub mod page;
mod postmaster_pid;
mod relation_map;
mod signal_file;
mod tablespace_map;

mod resource_manager;
mod wal_page;
mod wal_payload;
mod wal_record;
mod wal_record_stream;
#[cfg(test)]
mod wal_samples;

pub use archive_file_name::{ArchiveFileName, ParseArchiveFileNameError};
pub use backup_label::{BackupFrom, BackupLabel, BackupLabelError};
pub use backup_manifest::{BackupManifest, ManifestChecksum, ManifestDigest, ManifestWalRange};
pub use backup_rule::{BackupRule, BackupRules, InitForks};
pub use control_file::{
    CONTROL_FILE_SIZE, ClusterState, ControlFile, ControlFileError, RecoveryLimits, WalLevel,
};
pub use crc32c::{Crc32c, Crc32cDigest};
pub use data_path::{DATA_PATH_BYTES_MAX, DataPath, DataPathError};
pub use lsn::{Lsn, ParseLsnError};
pub use oid::Oid;
pub use page::{PAGE_HEADER_BYTES, PageHeader, PageVerdict};
pub use postmaster_pid::{NoPostmasterPid, PostmasterPid, PostmasterStatus};
pub use relation_file::{Fork, RelationFile};
pub use relation_map::{RelationMap, RelationMapError};
pub use resource_manager::ResourceManager;
pub use signal_file::{RECOVERY_SIGNAL, STANDBY_SIGNAL};
pub use system_identifier::{ParseSystemIdentifierError, SystemIdentifier};
pub use tablespace_map::{TablespaceLink, TablespaceMapError, parse_tablespace_map};
pub use timeline::{ParseTimelineError, TimelineId};
pub use timeline_history::{HistoryError, TimelineHistory, TimelineSwitch};
pub use transaction::{FullTransactionId, TransactionId};
pub use version::{MajorVersion, VersionError};
pub use wal_page::{
    SEGMENT_HEADER_LEN, SegmentError, SegmentHeader, WalLongHeader, WalPageError, WalPageHeader,
    check_segment_header,
};
pub use wal_payload::{CheckpointRecord, ParameterChange, TransactionEnd, WalPayload};
pub use wal_record::{
    BlockReference, PageImage, RelationLocator, WalRecord, WalRecordError, WalRecordHeader,
};
pub use wal_record_stream::{
    EndOfWal, EndReason, RECORD_BYTES_KEPT_MAX, WalGapError, WalRecordStream, WalStep,
};
pub use wal_segment::{WalSegmentError, WalSegmentName, WalSegmentNumber, WalSegmentSize};
