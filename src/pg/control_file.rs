//! `global/pg_control`: what the cluster is and where its last checkpoint stands.
//!
//! Offsets are those of a 64-bit little-endian build (pg_control.h); a control file of another architecture has
//! another float format or alignment and is refused, as the server would refuse it. The CRC (CRC-32C over everything
//! before it) tells a torn read, after which the file is simply read again.

use crate::pg::lsn::Lsn;
use crate::pg::system_identifier::SystemIdentifier;
use crate::pg::timeline::TimelineId;
use crate::pg::wal_segment::WalSegmentSize;

/// What a control file says, as far as Walden needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    /// The cluster's identity.
    pub system_identifier: SystemIdentifier,
    /// 1300 up to 16, 1700, 1800.
    pub control_version: u32,
    /// Catalog version number.
    pub catalog_version: u32,
    /// What the server was doing when it wrote the file.
    pub state: ClusterState,
    /// The last checkpoint record.
    pub checkpoint: Lsn,
    /// Where redo begins after a crash now.
    pub redo: Lsn,
    /// The timeline of the last checkpoint.
    pub timeline: TimelineId,
    /// Of a standby: WAL up to here must be replayed before it is consistent.
    pub min_recovery_point: Lsn,
    /// Settings that a hot standby must not undercut.
    pub limits: RecoveryLimits,
    /// Bytes of a page.
    pub block_size: u32,
    /// Pages of a relation's segment file.
    pub relation_segment_pages: u32,
    /// Size of WAL segments.
    pub wal_segment_size: WalSegmentSize,
    /// Alignment of the architecture.
    pub maximum_alignment: u32,
    /// Version of page checksums, 0 for none.
    pub data_checksum_version: u32,
}

/// Settings that hot standby requires to be at least the primary's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecoveryLimits {
    /// max_connections
    pub max_connections: u32,
    /// max_worker_processes
    pub max_worker_processes: u32,
    /// max_wal_senders
    pub max_wal_senders: u32,
    /// max_prepared_transactions
    pub max_prepared_transactions: u32,
    /// max_locks_per_transaction
    pub max_locks_per_transaction: u32,
}

/// The state of a cluster, DBState of pg_control.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    /// Being initialised.
    StartingUp,
    /// Shut down cleanly.
    ShutDown,
    /// Shut down cleanly while in recovery.
    ShutDownInRecovery,
    /// Was shutting down.
    ShuttingDown,
    /// In crash recovery.
    InCrashRecovery,
    /// In archive recovery.
    InArchiveRecovery,
    /// Running.
    InProduction,
}

/// Why bytes are not a control file that we understand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Too short.
    #[error("pg_control has {0} bytes, at least 296 are needed")]
    Short(usize),
    /// No supported release writes this version.
    #[error("pg_control has version {0}, which PostgreSQL 13 to 18 do not write on this architecture")]
    Version(u32),
    /// A torn read, or damage.
    #[error("pg_control has a wrong checksum")]
    Checksum,
    /// A field holds what no server writes.
    #[error("pg_control has an invalid {0}")]
    Field(&'static str),
}

/// Bytes that must be there whatever the version.
const LENGTH_MIN: usize = 296;
/// The server writes the file with this size.
pub const CONTROL_FILE_SIZE: usize = 8192;
const FLOAT_FORMAT: f64 = 1_234_567.0;

impl ControlFile {
    /// Reads a control file.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlFileError> {
        if bytes.len() < LENGTH_MIN {
            return Err(ControlFileError::Short(bytes.len()));
        }
        let fields = Fields(bytes);
        let control_version = fields.u32(8);
        let crc_at = match control_version {
            1300 | 1700 => 288,
            1800 => 292,
            other => return Err(ControlFileError::Version(other)),
        };
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &bytes[..crc_at]) as u32;
        if crc != fields.u32(crc_at) {
            return Err(ControlFileError::Checksum);
        }
        if f64::from_le_bytes(*bytes[208..].first_chunk().expect("LENGTH_MIN is beyond")) != FLOAT_FORMAT {
            return Err(ControlFileError::Field("float format"));
        }
        Ok(Self {
            system_identifier: SystemIdentifier(fields.u64(0)),
            control_version,
            catalog_version: fields.u32(12),
            state: state(fields.u32(16)).ok_or(ControlFileError::Field("state"))?,
            checkpoint: Lsn(fields.u64(32)),
            redo: Lsn(fields.u64(40)),
            timeline: TimelineId::new(fields.u32(48)).ok_or(ControlFileError::Field("timeline"))?,
            min_recovery_point: Lsn(fields.u64(136)),
            limits: RecoveryLimits {
                max_connections: fields.u32(180),
                max_worker_processes: fields.u32(184),
                max_wal_senders: fields.u32(188),
                max_prepared_transactions: fields.u32(192),
                max_locks_per_transaction: fields.u32(196),
            },
            maximum_alignment: fields.u32(204),
            block_size: fields.u32(216),
            relation_segment_pages: fields.u32(220),
            wal_segment_size: WalSegmentSize::new(fields.u32(228))
                .map_err(|_| ControlFileError::Field("WAL segment size"))?,
            data_checksum_version: fields.u32(252),
        })
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(*self.0[at..].first_chunk().expect("LENGTH_MIN is beyond every field"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.0[at..].first_chunk().expect("LENGTH_MIN is beyond every field"))
    }
}

fn state(number: u32) -> Option<ClusterState> {
    Some(match number {
        0 => ClusterState::StartingUp,
        1 => ClusterState::ShutDown,
        2 => ClusterState::ShutDownInRecovery,
        3 => ClusterState::ShuttingDown,
        4 => ClusterState::InCrashRecovery,
        5 => ClusterState::InArchiveRecovery,
        6 => ClusterState::InProduction,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = ControlFile::parse(&bytes);
            if bytes.len() > 12 {
                bytes[8..12].copy_from_slice(&1300u32.to_le_bytes());
                let _ = ControlFile::parse(&bytes);
            }
        }
    }

    #[test]
    fn a_torn_control_file_is_told_by_its_checksum() {
        let mut bytes = vec![0; CONTROL_FILE_SIZE];
        bytes[8..12].copy_from_slice(&1300u32.to_le_bytes());
        assert_eq!(ControlFile::parse(&bytes), Err(ControlFileError::Checksum));
        assert_eq!(ControlFile::parse(&bytes[..100]), Err(ControlFileError::Short(100)));
        bytes[8..12].copy_from_slice(&1201u32.to_le_bytes());
        assert_eq!(ControlFile::parse(&bytes), Err(ControlFileError::Version(1201)));
    }
}
