//! WAL of real servers for tests: the bytes, and what the servers' own tools say is in them.
//!
//! How the files in `tests/data/wal` were made stands in the README beside them. `<major>-start` is the beginning of a
//! segment; the rest of each segment counts as zeros.

use std::fmt::Write as _;

use bytes::Bytes;

use super::lsn::Lsn;
use super::version::MajorVersion;
use super::wal_record::{BlockReference, WalRecord};
use super::wal_record_stream::{EndOfWal, WalRecordStream, WalStep};
use super::wal_segment::WalSegmentSize;

/// All samples have segments of 1 MiB.
pub const SEGMENT_BYTES: usize = 1 << 20;
pub const PAGE_BYTES: u32 = 8192;

/// The beginning of one segment of each major version.
pub struct Start {
    pub version: MajorVersion,
    pub lsn: Lsn,
    pub bytes: &'static [u8],
    /// Where the records asked for end.
    pub end: Lsn,
    /// One line a record, as `line` writes them; none where no tool can tell.
    pub records: Option<&'static str>,
    pub tablespace_path: &'static str,
}

macro_rules! start {
    ($version:ident, $file:literal, $lsn:literal, $end:literal, $records:expr, $path:literal) => {
        Start {
            version: MajorVersion::$version,
            lsn: Lsn($lsn),
            bytes: include_bytes!(concat!("../../tests/data/wal/", $file)),
            end: Lsn($end),
            records: $records,
            tablespace_path: concat!("/tmp/walden-pg-xLtz/", $path),
        }
    };
}

macro_rules! records {
    ($file:literal) => {
        Some(include_str!(concat!("../../tests/data/wal/", $file, ".records")))
    };
}

pub const STARTS: [Start; 6] = [
    start!(V13, "13-start", 0xA0_0000, 0xA0_59E8, None, "ts13"),
    start!(V14, "14-start", 0xB0_0000, 0xB0_5E10, None, "ts14"),
    start!(V15, "15-start", 0x90_0000, 0x90_5F10, records!("15-start"), "tsn15"),
    start!(V16, "16-start", 0x90_0000, 0x90_62B0, records!("16-start"), "ts16"),
    start!(V17, "17-start", 0x90_0000, 0x90_6050, records!("17-start"), "ts17"),
    start!(V18, "18-start", 0x90_0000, 0x90_63C8, records!("18-start"), "ts18"),
];

/// Three pieces of neighbouring segments of 15: the first begins within a record, a record crosses from the first
/// to the second, and the second ends with a switch.
pub const BORDER: [(Lsn, &[u8]); 3] = [
    (Lsn(0xCF_6000), include_bytes!("../../tests/data/wal/15-border-0CF6000")),
    (Lsn(0xD0_0000), include_bytes!("../../tests/data/wal/15-border-0D00000")),
    (Lsn(0xE0_0000), include_bytes!("../../tests/data/wal/15-border-0E00000")),
];
pub const BORDER_END: Lsn = Lsn(0xE0_0118);
pub const BORDER_RECORDS: &str = include_str!("../../tests/data/wal/15-border.records");

pub fn segment_size() -> WalSegmentSize {
    WalSegmentSize::new(SEGMENT_BYTES as u32).unwrap()
}

/// The border sample as one run of bytes.
pub fn border_bytes() -> (Lsn, Vec<u8>) {
    let (start, _) = BORDER[0];
    let mut bytes = Vec::new();
    for (lsn, piece) in BORDER {
        bytes.resize((lsn - start) as usize, 0);
        bytes.extend_from_slice(piece);
    }
    (start, bytes)
}

/// Reads all records of bytes that stand at `lsn`, pushed in pieces of `piece` bytes.
pub fn read(lsn: Lsn, bytes: &[u8], piece: usize) -> (Vec<WalRecord>, Option<EndOfWal>) {
    let mut stream = WalRecordStream::new(lsn, segment_size(), PAGE_BYTES);
    let mut pieces = bytes.chunks(piece);
    let mut at = lsn;
    let mut records = Vec::new();
    loop {
        match stream.next_record() {
            Ok(WalStep::Record(record)) => records.push(record),
            Ok(WalStep::End(end)) => return (records, Some(end)),
            Ok(WalStep::NeedBytes) => {
                let Some(piece) = pieces.next() else { return (records, None) };
                stream.push(at, Bytes::copy_from_slice(piece)).unwrap();
                at = at + piece.len() as u64;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Writes a record as the files of expectations have it: where it is, where the one before it is, resource manager,
/// length, transaction, and the pages, those with an image marked.
pub fn line(record: &WalRecord) -> String {
    let header = record.header;
    let mut line = format!(
        "{} {} {} {} {}",
        record.lsn, header.previous, header.resource_manager, header.length, header.transaction
    );
    for block in &record.blocks {
        let BlockReference { id, relation, fork, block, image, .. } = block;
        let image = if image.is_some() { "*" } else { "" };
        let (tablespace, database, file) = (relation.tablespace, relation.database, relation.relfilenode);
        write!(line, " {id}:{tablespace}/{database}/{file}:{}:{block}{image}", fork.name()).unwrap();
    }
    line
}
