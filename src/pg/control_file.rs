//! `global/pg_control`: what the cluster is and where its last checkpoint stands.
//!
//! Offsets are those of a 64-bit little-endian build (`pg_control.h`); they are the same from 13 to 18, except that
//! 18 moves the checksum. A file of another architecture is refused by name, as the server would refuse the whole
//! directory. The CRC-32C tells a torn read, after which the file is simply read again.
//!
//! Deliberately absent: fields nobody above asks for (multixacts, the authentication nonce).

use jiff::Timestamp;

use super::crc32c::Crc32c;
use super::lsn::Lsn;
use super::system_identifier::SystemIdentifier;
use super::timeline::TimelineId;
use super::transaction::FullTransactionId;
use super::version::MajorVersion;
use super::wal_segment::WalSegmentSize;

/// What a control file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    pub system_identifier: SystemIdentifier,
    /// The format of the file: 1300 up to 16, 1700, 1800.
    pub control_version: u32,
    /// One for each major version; see `major`.
    pub catalog_version: u32,
    /// What the server was doing when it wrote the file.
    pub state: ClusterState,
    /// When it wrote it.
    pub modified: Timestamp,
    /// The last checkpoint record.
    pub checkpoint: Lsn,
    /// Where redo begins after a crash now.
    pub redo: Lsn,
    /// The timeline of the last checkpoint.
    pub timeline: TimelineId,
    /// The timeline before it, another one only if the checkpoint ended a recovery.
    pub previous_timeline: TimelineId,
    pub full_page_writes: bool,
    pub next_transaction: FullTransactionId,
    /// When the last checkpoint was taken.
    pub checkpoint_time: Timestamp,
    /// Of a standby: WAL up to here must be replayed before it is consistent; zero otherwise.
    pub min_recovery_point: Lsn,
    /// The timeline of that point, none where the point is zero.
    pub min_recovery_timeline: Option<TimelineId>,
    /// Where the backup started that is being recovered, zero if none is.
    pub backup_start_point: Lsn,
    /// Where the backup ended that a standby took, zero if that is not known.
    pub backup_end_point: Lsn,
    /// Whether recovery must reach the backup's end record.
    pub backup_end_required: bool,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    /// Settings that a hot standby must not undercut.
    pub limits: RecoveryLimits,
    pub track_commit_timestamp: bool,
    /// What the architecture aligns to, 8.
    pub maximum_alignment: u32,
    /// Bytes of a page.
    pub block_size: u32,
    /// Pages of a relation's segment file (`relseg_size`).
    pub relation_segment_pages: u32,
    /// Bytes of a page of WAL.
    pub wal_block_size: u32,
    pub wal_segment_size: WalSegmentSize,
    /// Bytes of a name in the catalogs.
    pub name_data_length: u32,
    pub index_keys_max: u32,
    /// Bytes of a TOAST chunk.
    pub toast_chunk_bytes_max: u32,
    /// Bytes of a large object's chunk.
    pub large_object_chunk_bytes: u32,
    pub float8_by_value: bool,
    /// Version of page checksums, 0 for none.
    pub data_checksum_version: u32,
    /// Whether the architecture's `char` is signed; known from 18.
    pub default_char_signed: Option<bool>,
}

/// Settings that hot standby requires to be at least the primary's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct RecoveryLimits {
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
}

/// The state of a cluster (`DBState`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

/// How much the cluster writes to its log (`WalLevel`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

/// Why bytes are not a control file that Walden understands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    #[error("pg_control has {bytes} bytes, at least {CONTROL_DATA_BYTES} are needed")]
    Short { bytes: usize },
    #[error("pg_control was written on a big-endian machine")]
    BigEndian,
    #[error("pg_control has version {found}, which PostgreSQL 13 to 18 do not write")]
    Version { found: u32 },
    /// A torn read, or damage.
    #[error("pg_control has a wrong checksum")]
    Checksum,
    #[error("pg_control was written on another architecture: {what}")]
    Architecture { what: &'static str },
    /// A field holds what no server writes.
    #[error("pg_control has an invalid {what}")]
    Field { what: &'static str },
    #[error("the catalog version {found} is of no release of PostgreSQL 13 to 18")]
    CatalogVersion { found: u32 },
}

/// The size of the file, most of it zeros.
pub const CONTROL_FILE_SIZE: usize = 8192;
/// Bytes that hold everything, in every version.
const CONTROL_DATA_BYTES: usize = 296;
/// A number whose bits tell the format of floating point.
const FLOAT_FORMAT: f64 = 1_234_567.0;
const MAXIMUM_ALIGNMENT: u32 = 8;

impl ControlFile {
    /// Reads a control file, which may lack the zeros at its end.
    pub fn parse(bytes: &[u8]) -> Result<Self, ControlFileError> {
        let short = ControlFileError::Short { bytes: bytes.len() };
        let fields = Fields(bytes.first_chunk().ok_or(short)?);
        let control_version = fields.u32(8);
        let signedness_known = control_version == MajorVersion::V18.control_version();
        fields.check(control_version, if signedness_known { 292 } else { 288 })?;
        Ok(Self {
            system_identifier: SystemIdentifier(fields.u64(0)),
            control_version,
            catalog_version: fields.u32(12),
            state: ClusterState::from_number(fields.u32(16))
                .ok_or(ControlFileError::Field { what: "cluster state" })?,
            modified: fields.time(24, "time")?,
            checkpoint: Lsn(fields.u64(32)),
            redo: Lsn(fields.u64(40)),
            timeline: fields.timeline(48, "timeline")?,
            previous_timeline: fields.timeline(52, "previous timeline")?,
            full_page_writes: fields.flag(56),
            next_transaction: FullTransactionId(fields.u64(64)),
            checkpoint_time: fields.time(104, "checkpoint time")?,
            min_recovery_point: Lsn(fields.u64(136)),
            min_recovery_timeline: TimelineId::new(fields.u32(144)),
            backup_start_point: Lsn(fields.u64(152)),
            backup_end_point: Lsn(fields.u64(160)),
            backup_end_required: fields.flag(168),
            wal_level: WalLevel::from_number(fields.u32(172))
                .ok_or(ControlFileError::Field { what: "wal_level" })?,
            wal_log_hints: fields.flag(176),
            limits: RecoveryLimits {
                max_connections: fields.u32(180),
                max_worker_processes: fields.u32(184),
                max_wal_senders: fields.u32(188),
                max_prepared_transactions: fields.u32(192),
                max_locks_per_transaction: fields.u32(196),
            },
            track_commit_timestamp: fields.flag(200),
            maximum_alignment: fields.u32(204),
            block_size: fields.page_size(216, "block size")?,
            relation_segment_pages: fields.u32(220),
            wal_block_size: fields.page_size(224, "WAL block size")?,
            wal_segment_size: WalSegmentSize::new(fields.u32(228))
                .map_err(|_| ControlFileError::Field { what: "WAL segment size" })?,
            name_data_length: fields.u32(232),
            index_keys_max: fields.u32(236),
            toast_chunk_bytes_max: fields.u32(240),
            large_object_chunk_bytes: fields.u32(244),
            float8_by_value: fields.flag(248),
            data_checksum_version: fields.u32(252),
            default_char_signed: signedness_known.then(|| fields.flag(256)),
        })
    }

    /// Returns the major version, by the catalog version.
    pub fn major(&self) -> Result<MajorVersion, ControlFileError> {
        let found = self.catalog_version;
        MajorVersion::from_catalog_version(found).ok_or(ControlFileError::CatalogVersion { found })
    }

    /// Tells whether pages carry checksums.
    pub fn has_data_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }
}

impl ClusterState {
    fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::StartingUp,
            1 => Self::ShutDown,
            2 => Self::ShutDownInRecovery,
            3 => Self::ShuttingDown,
            4 => Self::InCrashRecovery,
            5 => Self::InArchiveRecovery,
            6 => Self::InProduction,
            _ => return None,
        })
    }
}

impl WalLevel {
    pub(super) fn from_number(number: u32) -> Option<Self> {
        [Self::Minimal, Self::Replica, Self::Logical].get(usize::try_from(number).ok()?).copied()
    }
}

/// The bytes of the file; every offset asked for is a constant below their number.
struct Fields<'a>(&'a [u8; CONTROL_DATA_BYTES]);

impl Fields<'_> {
    fn check(&self, control_version: u32, checksum_offset: usize) -> Result<(), ControlFileError> {
        let known = |number: u32| MajorVersion::ALL.iter().any(|major| major.control_version() == number);
        if known(control_version.swap_bytes()) {
            return Err(ControlFileError::BigEndian);
        }
        if !known(control_version) {
            return Err(ControlFileError::Version { found: control_version });
        }
        if Crc32c::of(&self.0[..checksum_offset]) != Crc32c(self.u32(checksum_offset)) {
            return Err(ControlFileError::Checksum);
        }
        if self.u32(204) != MAXIMUM_ALIGNMENT {
            return Err(ControlFileError::Architecture { what: "data is not aligned to 8 bytes" });
        }
        if f64::from_bits(self.u64(208)) != FLOAT_FORMAT {
            return Err(ControlFileError::Architecture { what: "floating point numbers are not IEEE 754" });
        }
        Ok(())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(*self.0[at..].first_chunk().expect("the offset is a constant below the length"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.0[at..].first_chunk().expect("the offset is a constant below the length"))
    }

    fn flag(&self, at: usize) -> bool {
        self.0[at] != 0
    }

    fn time(&self, at: usize, what: &'static str) -> Result<Timestamp, ControlFileError> {
        Timestamp::from_second(self.u64(at) as i64).map_err(|_| ControlFileError::Field { what })
    }

    fn timeline(&self, at: usize, what: &'static str) -> Result<TimelineId, ControlFileError> {
        TimelineId::new(self.u32(at)).ok_or(ControlFileError::Field { what })
    }

    /// Reads the size of a page: a power of two from 1 to 64 KiB.
    fn page_size(&self, at: usize, what: &'static str) -> Result<u32, ControlFileError> {
        let bytes = self.u32(at);
        let valid = bytes.is_power_of_two() && (1 << 10..=1 << 16).contains(&bytes);
        valid.then_some(bytes).ok_or(ControlFileError::Field { what })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The beginnings of control files of real servers; what they must say is from `pg_controldata` or
    /// `pg_control_*()` of the server that wrote them.
    const SAMPLES: [(MajorVersion, &[u8], u64, &str, &str); 6] = [
        (
            MajorVersion::V13,
            include_bytes!("../../tests/data/pg_control/13"),
            7_710_459_045_871_027_846,
            "0/A05A48",
            "0:497",
        ),
        (
            MajorVersion::V14,
            include_bytes!("../../tests/data/pg_control/14"),
            7_710_459_051_480_549_145,
            "0/B05E70",
            "0:745",
        ),
        (
            MajorVersion::V15,
            include_bytes!("../../tests/data/pg_control/15"),
            7_710_459_600_104_976_879,
            "0/9113A8",
            "0:737",
        ),
        (
            MajorVersion::V16,
            include_bytes!("../../tests/data/pg_control/16"),
            7_710_459_057_953_347_419,
            "0/915238",
            "0:743",
        ),
        (
            MajorVersion::V17,
            include_bytes!("../../tests/data/pg_control/17"),
            7_710_459_064_200_173_505,
            "0/913B90",
            "0:751",
        ),
        (
            MajorVersion::V18,
            include_bytes!("../../tests/data/pg_control/18"),
            7_710_459_070_518_171_791,
            "0/918E28",
            "0:765",
        ),
    ];
    /// Of a standby that replays.
    const STANDBY: &[u8] = include_bytes!("../../tests/data/pg_control/15-standby");

    #[test]
    fn every_major_version_is_read() {
        for (major, bytes, identifier, checkpoint, next) in SAMPLES {
            let control = ControlFile::parse(bytes).unwrap();
            assert_eq!(control.major(), Ok(major));
            assert_eq!(control.control_version, major.control_version());
            assert_eq!(control.system_identifier, SystemIdentifier(identifier));
            assert_eq!(control.state, ClusterState::InProduction);
            assert_eq!(control.checkpoint.to_string(), checkpoint);
            assert!(control.redo < control.checkpoint);
            assert_eq!((control.timeline.get(), control.previous_timeline.get()), (1, 1));
            assert_eq!(control.next_transaction.to_string(), next);
            assert!(control.full_page_writes && control.has_data_checksums() && control.float8_by_value);
            assert_eq!((control.min_recovery_point, control.min_recovery_timeline), (Lsn::ZERO, None));
            assert_eq!((control.backup_start_point, control.backup_end_point), (Lsn::ZERO, Lsn::ZERO));
            assert!(
                !control.backup_end_required && !control.wal_log_hints && !control.track_commit_timestamp
            );
            assert_eq!(control.wal_level, WalLevel::Replica);
            assert_eq!(
                control.limits,
                RecoveryLimits {
                    max_connections: 44,
                    max_worker_processes: 8,
                    max_wal_senders: 10,
                    max_prepared_transactions: 4,
                    max_locks_per_transaction: 64,
                }
            );
            assert_eq!((control.block_size, control.wal_block_size), (8192, 8192));
            assert_eq!(
                (control.relation_segment_pages, control.wal_segment_size.bytes()),
                (131_072, 1 << 20)
            );
            assert_eq!(
                (control.maximum_alignment, control.name_data_length, control.index_keys_max),
                (8, 64, 32)
            );
            assert_eq!((control.toast_chunk_bytes_max, control.large_object_chunk_bytes), (1996, 2048));
            assert_eq!(control.default_char_signed, (major == MajorVersion::V18).then_some(true));
        }
    }

    #[test]
    fn times_are_those_of_the_server() {
        let (_, bytes, ..) = SAMPLES[5];
        let control = ControlFile::parse(bytes).unwrap();
        assert_eq!(control.modified.to_string(), "2026-11-21T03:19:09Z");
        assert_eq!(control.checkpoint_time.to_string(), "2026-11-21T03:19:09Z");
    }

    #[test]
    fn a_standby_says_how_far_it_must_replay() {
        let control = ControlFile::parse(STANDBY).unwrap();
        assert_eq!(control.state, ClusterState::InArchiveRecovery);
        assert_eq!(control.checkpoint.to_string(), "0/130B8D8");
        assert_eq!(control.redo.to_string(), "0/130B8A0");
        assert_eq!(control.min_recovery_point.to_string(), "0/130B950");
        assert_eq!(control.min_recovery_timeline, Some(TimelineId::FIRST));
        assert_eq!(control.wal_level, WalLevel::Logical);
        assert!(control.track_commit_timestamp);
    }

    #[test]
    fn a_torn_control_file_is_told_by_its_checksum() {
        for (_, bytes, ..) in SAMPLES {
            for at in [0, 16, 100, 255, 260, 287] {
                let mut torn = bytes.to_vec();
                torn[at] ^= 1;
                assert_eq!(ControlFile::parse(&torn), Err(ControlFileError::Checksum), "{at}");
            }
            assert_eq!(ControlFile::parse(&bytes[..100]), Err(ControlFileError::Short { bytes: 100 }));
        }
    }

    /// Rewrites four bytes and the checksum of the sample of 15.
    fn altered(at: usize, value: u32) -> Result<ControlFile, ControlFileError> {
        let mut bytes = SAMPLES[2].1.to_vec();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let crc = Crc32c::of(&bytes[..288]).0;
        bytes[288..292].copy_from_slice(&crc.to_le_bytes());
        ControlFile::parse(&bytes)
    }

    #[test]
    fn other_versions_and_architectures_are_named() {
        assert_eq!(altered(8, 1201), Err(ControlFileError::Version { found: 1201 }));
        assert_eq!(altered(8, 1300u32.swap_bytes()), Err(ControlFileError::BigEndian));
        assert!(matches!(altered(204, 4), Err(ControlFileError::Architecture { .. })));
        assert!(matches!(altered(212, 0), Err(ControlFileError::Architecture { .. })));
        assert_eq!(
            altered(12, 202_209_060).unwrap().major(),
            Err(ControlFileError::CatalogVersion { found: 202_209_060 })
        );
    }

    #[test]
    fn fields_no_server_writes_are_named() {
        for (at, value, what) in [
            (16, 7, "cluster state"),
            (48, 0, "timeline"),
            (108, u32::MAX >> 1, "checkpoint time"),
            (172, 3, "wal_level"),
            (216, 8191, "block size"),
            (228, 3 << 20, "WAL segment size"),
        ] {
            assert_eq!(altered(at, value), Err(ControlFileError::Field { what }));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = ControlFile::parse(&bytes);
        }

        #[test]
        fn any_field_is_read_or_refused(at in (0usize..280).prop_filter("format", |at| !(5..12).contains(at)), value: u32) {
            let _ = altered(at, value);
        }
    }
}
