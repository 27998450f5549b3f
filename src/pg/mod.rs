//! PostgreSQL's vocabulary and file formats, pure: no file is opened here, no clock is read.

mod lsn;
mod system_identifier;
mod timeline;
mod wal_segment;

pub use lsn::{Lsn, ParseLsnError};
pub use system_identifier::SystemIdentifier;
pub use timeline::{TimelineId, TimelineZero};
pub use wal_segment::{
    InvalidSegmentName, InvalidSegmentSize, WalSegmentName, WalSegmentNumber, WalSegmentSize,
};
