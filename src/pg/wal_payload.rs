//! What the few WAL records mean that Walden decides by.
//!
//! Ends of transactions and restore points are recovery targets; a parameter change says what a hot standby needs; a
//! tablespace's absolute path is where replay would write, outside of a clone; the others tell where recovery stands.
//! Layouts are those of `xact.h`, `xlog_internal.h`, `pg_control.h`, `tablespace.h` and `dbcommands_xlog.h`.
//!
//! Deliberately absent: every record that only changes pages.

use jiff::Timestamp;

use super::control_file::{RecoveryLimits, WalLevel};
use super::field_reader::FieldReader;
use super::lsn::Lsn;
use super::oid::Oid;
use super::resource_manager::ResourceManager;
use super::timeline::TimelineId;
use super::transaction::{FullTransactionId, TransactionId, timestamp_from_microseconds};
use super::version::MajorVersion;
use super::wal_record::{RelationLocator, WalRecord, WalRecordError};

/// What a record means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalPayload {
    Commit(TransactionEnd),
    Abort(TransactionEnd),
    RestorePoint {
        name: String,
        time: Timestamp,
    },
    ParameterChange(ParameterChange),
    Checkpoint(CheckpointRecord),
    EndOfRecovery {
        time: Timestamp,
        timeline: TimelineId,
        previous_timeline: TimelineId,
    },
    /// The rest of the segment is empty.
    Switch,
    /// A backup ended that started at `start`.
    BackupEnd {
        start: Lsn,
    },
    /// Replay makes a link to `path` and writes there; a tablespace inside PGDATA has an empty path.
    CreateTablespace {
        tablespace: Oid,
        path: Vec<u8>,
    },
    DropTablespace {
        tablespace: Oid,
    },
    /// `source` is the database whose files replay copies, none where the pages follow in the WAL (15 and later).
    CreateDatabase {
        database: Oid,
        tablespace: Oid,
        source: Option<(Oid, Oid)>,
    },
    /// A record of an extension's resource manager, which only the extension's library can replay.
    Extension {
        manager: u8,
    },
    /// Anything else.
    Other,
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionEnd {
    /// The transaction; of a prepared one that which was prepared, not the one that ended it.
    pub transaction: TransactionId,
    /// The time that `recovery_target_time` is compared with.
    pub time: Timestamp,
    pub subtransactions: u32,
    /// Relations whose files go with it.
    pub dropped: Vec<RelationLocator>,
}

/// Settings the server started with, written when they differ from those in `pg_control`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterChange {
    pub limits: RecoveryLimits,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub track_commit_timestamp: bool,
}

/// A checkpoint, at shutdown or while running.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointRecord {
    pub at_shutdown: bool,
    pub redo: Lsn,
    pub timeline: TimelineId,
    pub previous_timeline: TimelineId,
    pub full_page_writes: bool,
    pub next_transaction: FullTransactionId,
    pub time: Timestamp,
}

const INFO_MASK: u8 = 0xF0;

const INFO_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const INFO_CHECKPOINT_ONLINE: u8 = 0x10;
/// A switch record, after which the stream goes on in the next segment.
pub(super) const INFO_SWITCH: u8 = 0x40;
const INFO_BACKUP_END: u8 = 0x50;
const INFO_PARAMETER_CHANGE: u8 = 0x60;
const INFO_RESTORE_POINT: u8 = 0x70;
const INFO_END_OF_RECOVERY: u8 = 0x90;
/// Bytes of a restore point's name, NUL included (`MAXFNAMELEN`).
const RESTORE_POINT_NAME_LEN: usize = 64;

const TRANSACTION_MASK: u8 = 0x70;
const TRANSACTION_HAS_INFO: u8 = 0x80;
const COMMIT: u8 = 0x00;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;

const HAS_DATABASE: u32 = 1 << 0;
const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_TWO_PHASE: u32 = 1 << 4;
const HAS_DROPPED_STATISTICS: u32 = 1 << 8;
const RELATION_LOCATOR_LEN: usize = 12;
const INVALIDATION_LEN: usize = 16;

impl WalRecord {
    /// Reads what the record means.
    pub fn payload(&self) -> Result<WalPayload, WalRecordError> {
        let fields = FieldReader::new(&self.main_data);
        let info = self.header.info & INFO_MASK;
        let payload = match self.header.resource_manager {
            ResourceManager::Xlog => xlog(info, fields).ok_or("XLOG record"),
            ResourceManager::Transaction => self.transaction(fields).ok_or("transaction record"),
            ResourceManager::Tablespace => tablespace(info, fields).ok_or("tablespace record"),
            ResourceManager::Database => database(info, self.version, fields).ok_or("database record"),
            ResourceManager::Custom(manager) => Ok(WalPayload::Extension { manager }),
            _ => Ok(WalPayload::Other),
        };
        payload.map_err(|what| WalRecordError { lsn: self.lsn, what })
    }

    fn transaction(&self, mut fields: FieldReader<'_>) -> Option<WalPayload> {
        let operation = self.header.info & TRANSACTION_MASK;
        let (committed, prepared) = match operation {
            COMMIT => (true, false),
            ABORT => (false, false),
            COMMIT_PREPARED => (true, true),
            ABORT_PREPARED => (false, true),
            _ => return Some(WalPayload::Other),
        };
        let time = timestamp_from_microseconds(fields.i64()?)?;
        let mut end = TransactionEnd {
            transaction: self.header.transaction,
            time,
            subtransactions: 0,
            dropped: Vec::new(),
        };
        if self.header.info & TRANSACTION_HAS_INFO != 0 {
            let two_phase = transaction_info(&mut end, committed, self.version, &mut fields)?;
            end.transaction = if prepared { two_phase? } else { end.transaction };
        }
        Some(if committed { WalPayload::Commit(end) } else { WalPayload::Abort(end) })
    }
}

/// Reads what follows the time; returns the prepared transaction, if one is named.
fn transaction_info(
    end: &mut TransactionEnd,
    committed: bool,
    version: MajorVersion,
    fields: &mut FieldReader<'_>,
) -> Option<Option<TransactionId>> {
    let info = fields.u32()?;
    if info & HAS_DATABASE != 0 {
        fields.skip(8)?;
    }
    if info & HAS_SUBTRANSACTIONS != 0 {
        end.subtransactions = fields.u32()?;
        fields.skip((end.subtransactions as usize).checked_mul(4)?)?;
    }
    if info & HAS_RELATIONS != 0 {
        let count = fields.u32()? as usize;
        let mut relations = FieldReader::new(fields.bytes(count.checked_mul(RELATION_LOCATOR_LEN)?)?);
        end.dropped.extend(std::iter::from_fn(|| RelationLocator::read(&mut relations)));
    }
    if version >= MajorVersion::V15 && info & HAS_DROPPED_STATISTICS != 0 {
        let item = if version >= MajorVersion::V18 { 16 } else { 12 };
        let count = fields.u32()? as usize;
        fields.skip(count.checked_mul(item)?)?;
    }
    if committed && info & HAS_INVALIDATIONS != 0 {
        let count = fields.u32()? as usize;
        fields.skip(count.checked_mul(INVALIDATION_LEN)?)?;
    }
    Some(if info & HAS_TWO_PHASE != 0 { Some(TransactionId(fields.u32()?)) } else { None })
}

fn xlog(info: u8, mut fields: FieldReader<'_>) -> Option<WalPayload> {
    Some(match info {
        INFO_CHECKPOINT_SHUTDOWN | INFO_CHECKPOINT_ONLINE => {
            WalPayload::Checkpoint(checkpoint(info == INFO_CHECKPOINT_SHUTDOWN, fields)?)
        }
        INFO_SWITCH => WalPayload::Switch,
        INFO_BACKUP_END => WalPayload::BackupEnd { start: Lsn(fields.u64()?) },
        INFO_PARAMETER_CHANGE => WalPayload::ParameterChange(parameter_change(fields)?),
        INFO_RESTORE_POINT => {
            let time = timestamp_from_microseconds(fields.i64()?)?;
            let name = FieldReader::new(fields.bytes(RESTORE_POINT_NAME_LEN)?).c_string()?;
            WalPayload::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time }
        }
        INFO_END_OF_RECOVERY => WalPayload::EndOfRecovery {
            time: timestamp_from_microseconds(fields.i64()?)?,
            timeline: TimelineId::new(fields.u32()?)?,
            previous_timeline: TimelineId::new(fields.u32()?)?,
        },
        _ => WalPayload::Other,
    })
}

/// Reads a `CheckPoint`, whose layout is that of the copy in `pg_control`.
fn checkpoint(at_shutdown: bool, mut fields: FieldReader<'_>) -> Option<CheckpointRecord> {
    let (redo, timeline, previous_timeline) = (Lsn(fields.u64()?), fields.u32()?, fields.u32()?);
    let full_page_writes = fields.u8()? != 0;
    fields.skip(7)?;
    let next_transaction = FullTransactionId(fields.u64()?);
    fields.skip(32)?;
    Some(CheckpointRecord {
        at_shutdown,
        redo,
        timeline: TimelineId::new(timeline)?,
        previous_timeline: TimelineId::new(previous_timeline)?,
        full_page_writes,
        next_transaction,
        time: Timestamp::from_second(fields.i64()?).ok()?,
    })
}

fn parameter_change(mut fields: FieldReader<'_>) -> Option<ParameterChange> {
    Some(ParameterChange {
        limits: RecoveryLimits {
            max_connections: fields.u32()?,
            max_worker_processes: fields.u32()?,
            max_wal_senders: fields.u32()?,
            max_prepared_transactions: fields.u32()?,
            max_locks_per_transaction: fields.u32()?,
        },
        wal_level: WalLevel::from_number(fields.u32()?)?,
        wal_log_hints: fields.u8()? != 0,
        track_commit_timestamp: fields.u8()? != 0,
    })
}

fn tablespace(info: u8, mut fields: FieldReader<'_>) -> Option<WalPayload> {
    let tablespace = Oid(fields.u32()?);
    Some(match info {
        0x00 => WalPayload::CreateTablespace { tablespace, path: fields.c_string()?.to_vec() },
        0x10 => WalPayload::DropTablespace { tablespace },
        _ => WalPayload::Other,
    })
}

fn database(info: u8, version: MajorVersion, mut fields: FieldReader<'_>) -> Option<WalPayload> {
    let (database, tablespace) = (Oid(fields.u32()?), Oid(fields.u32()?));
    let source = match (info, version >= MajorVersion::V15) {
        (0x00, _) => Some((Oid(fields.u32()?), Oid(fields.u32()?))),
        (0x10, true) => None,
        _ => return Some(WalPayload::Other),
    };
    Some(WalPayload::CreateDatabase { database, tablespace, source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::transaction::TransactionId;
    use super::super::wal_record::WalRecordHeader;
    use super::super::wal_samples::{BORDER_END, SEGMENT_BYTES, STARTS, border_bytes, read};
    use super::*;

    fn payloads(lsn: Lsn, bytes: &[u8], end: Lsn) -> Vec<WalPayload> {
        let (records, _) = read(lsn, bytes, SEGMENT_BYTES);
        let records = records.iter().take_while(|record| record.lsn < end);
        records.map(|record| record.payload().unwrap()).filter(|p| *p != WalPayload::Other).collect()
    }

    /// What was done to each server is the same; see the README of the samples.
    #[test]
    fn every_version_tells_what_was_done() {
        for start in STARTS {
            let payloads = payloads(start.lsn, start.bytes, start.end);
            let WalPayload::Checkpoint(checkpoint) = &payloads[0] else { panic!("{:?}", payloads[0]) };
            assert!(checkpoint.at_shutdown && checkpoint.full_page_writes);
            assert_eq!(checkpoint.redo, start.lsn + 40);
            assert_eq!(
                (checkpoint.timeline, checkpoint.previous_timeline),
                (TimelineId::FIRST, TimelineId::FIRST)
            );
            let WalPayload::ParameterChange(change) = &payloads[1] else { panic!("{:?}", payloads[1]) };
            assert_eq!(
                (change.wal_level, change.wal_log_hints, change.track_commit_timestamp),
                (WalLevel::Replica, false, false)
            );
            assert_eq!(
                change.limits,
                RecoveryLimits {
                    max_connections: 44,
                    max_worker_processes: 8,
                    max_wal_senders: 10,
                    max_prepared_transactions: 4,
                    max_locks_per_transaction: 64,
                }
            );
            let [commit, point, prepared, abort, sub, message, tablespace, moved, dropped] = &payloads[2..]
            else {
                panic!("{payloads:?}")
            };
            let WalPayload::Commit(commit) = commit else { panic!("{commit:?}") };
            let next = |by: u32| TransactionId(commit.transaction.0 + by);
            let ends = |payload: &WalPayload, transaction, subtransactions, dropped: usize| match payload {
                WalPayload::Commit(end) => {
                    end.transaction == transaction
                        && end.subtransactions == subtransactions
                        && end.dropped.len() == dropped
                        && end.time >= commit.time
                        && end.time.to_string().starts_with("2026-11-21T03:")
                }
                _ => false,
            };
            assert!(matches!(point, WalPayload::RestorePoint { name, .. } if name == "named by walden"));
            assert!(ends(prepared, next(1), 0, 0), "{prepared:?}");
            assert!(matches!(abort, WalPayload::Abort(end) if end.transaction == next(2)), "{abort:?}");
            assert!(ends(sub, next(3), 1, 0), "{sub:?}");
            assert!(ends(message, next(5), 0, 0), "{message:?}");
            assert!(
                matches!(tablespace, WalPayload::CreateTablespace { path, .. } if path == start.tablespace_path.as_bytes()),
                "{tablespace:?}"
            );
            assert!(ends(moved, next(6), 0, 0), "{moved:?}");
            assert!(ends(dropped, next(7), 0, 1), "{dropped:?}");
        }
    }

    /// As `pg_waldump` tells it.
    #[test]
    fn times_names_and_dropped_relations_are_those_of_pg_waldump() {
        let (lsn, bytes) = border_bytes();
        let end = |transaction, time: &str, subtransactions, dropped: &[u32]| TransactionEnd {
            transaction: TransactionId(transaction),
            time: format!("2026-11-21T03:20:{time}Z").parse().unwrap(),
            subtransactions,
            dropped: dropped
                .iter()
                .map(|file| RelationLocator {
                    tablespace: Oid::DEFAULT_TABLESPACE,
                    database: Oid(5),
                    relfilenode: Oid(*file),
                })
                .collect(),
        };
        let payloads = payloads(lsn, &bytes, BORDER_END);
        let points: Vec<(usize, &str)> = (0..)
            .zip(&payloads)
            .filter_map(|(index, payload)| match payload {
                WalPayload::RestorePoint { name, .. } => Some((index, name.as_str())),
                _ => None,
            })
            .collect();
        assert_eq!(points, [(2, "before the border"), (10, "before the switch")]);
        let others: Vec<_> =
            payloads.into_iter().filter(|p| !matches!(p, WalPayload::RestorePoint { .. })).collect();
        let expected = [
            WalPayload::Commit(end(741, "46.945649", 0, &[])),
            WalPayload::Commit(end(742, "46.946452", 0, &[])),
            WalPayload::Commit(end(743, "47.024913", 2, &[])),
            WalPayload::Commit(end(746, "47.114928", 0, &[])),
            WalPayload::Abort(end(747, "47.168836", 0, &[])),
            WalPayload::CreateTablespace {
                tablespace: Oid(16415),
                path: b"/tmp/walden-pg-xLtz/ts2".to_vec(),
            },
            WalPayload::Commit(end(748, "47.216768", 0, &[])),
            WalPayload::Commit(end(749, "47.289710", 0, &[])),
            WalPayload::Commit(end(750, "47.357153", 0, &[16408, 16411, 16412, 16413])),
            WalPayload::Switch,
            WalPayload::Commit(end(751, "47.472842", 0, &[])),
        ];
        assert_eq!(others, expected);
    }

    fn record(version: MajorVersion, manager: ResourceManager, info: u8, main_data: Vec<u8>) -> WalRecord {
        WalRecord {
            lsn: Lsn(40),
            end: Lsn(80),
            timeline: TimelineId::FIRST,
            version,
            header: WalRecordHeader {
                length: 0,
                transaction: TransactionId(7),
                previous: Lsn::ZERO,
                info,
                resource_manager: manager,
                crc: 0,
            },
            blocks: Vec::new(),
            main_data,
            main_data_is_whole: true,
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn databases_are_copied_or_logged() {
        let create = |version, info, data: &[u32]| {
            record(version, ResourceManager::Database, info, words(data)).payload()
        };
        let (database, tablespace) = (Oid(16500), Oid(1663));
        let copied =
            Ok(WalPayload::CreateDatabase { database, tablespace, source: Some((Oid(1), Oid(1664))) });
        assert_eq!(create(MajorVersion::V13, 0x00, &[16500, 1663, 1, 1664]), copied);
        assert_eq!(create(MajorVersion::V15, 0x00, &[16500, 1663, 1, 1664]), copied);
        let logged = Ok(WalPayload::CreateDatabase { database, tablespace, source: None });
        assert_eq!(create(MajorVersion::V15, 0x10, &[16500, 1663]), logged);
        // In 14 that number is the end of a database.
        assert_eq!(create(MajorVersion::V14, 0x10, &[16500, 1663]), Ok(WalPayload::Other));
        assert_eq!(create(MajorVersion::V18, 0x20, &[16500, 1, 1663]), Ok(WalPayload::Other));
        assert!(create(MajorVersion::V15, 0x00, &[16500, 1663]).is_err());
    }

    #[test]
    fn the_end_of_recovery_and_of_a_backup_are_read() {
        let xlog = |info, data| record(MajorVersion::V17, ResourceManager::Xlog, info, data).payload();
        let end = [&0i64.to_le_bytes()[..], &words(&[2, 1, 1])].concat();
        let (timeline, previous_timeline) = (TimelineId::new(2).unwrap(), TimelineId::FIRST);
        let time = "2000-01-01T00:00:00Z".parse().unwrap();
        assert_eq!(xlog(0x90, end), Ok(WalPayload::EndOfRecovery { time, timeline, previous_timeline }));
        assert_eq!(xlog(0x50, words(&[0x28, 1])), Ok(WalPayload::BackupEnd { start: Lsn(1 << 32 | 0x28) }));
        assert_eq!(xlog(0xE0, words(&[1])), Ok(WalPayload::Other));
        let extension = record(MajorVersion::V17, ResourceManager::Custom(140), 0, words(&[1])).payload();
        assert_eq!(extension, Ok(WalPayload::Extension { manager: 140 }));
        let dropped = record(MajorVersion::V17, ResourceManager::Tablespace, 0x10, words(&[16401])).payload();
        assert_eq!(dropped, Ok(WalPayload::DropTablespace { tablespace: Oid(16401) }));
    }

    proptest! {
        #[test]
        fn any_main_data_is_read_or_refused(
            version in prop::sample::select(&MajorVersion::ALL[..]),
            manager in 0u8..6,
            info: u8,
            data in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let manager = ResourceManager::from_number(manager, version).unwrap();
            let _ = record(version, manager, info, data).payload();
        }
    }
}
