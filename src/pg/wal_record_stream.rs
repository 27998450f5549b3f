//! Puts WAL records together from the bytes of segments.
//!
//! The caller pushes bytes in the order of the log, a segment or a piece of one at a time, and takes records until
//! more bytes are wanted or the valid log ends. Records span pages and segments; every one's CRC-32C is checked. The
//! end of the log is a value: beyond the last record there is always something, zeros, a recycled page or half a
//! record, and what stands there is told as the reason.
//!
//! Rules are those of the server's `xlogreader.c`. A record may have a gigabyte; of longer ones only the beginning is
//! kept, so memory is bounded by what the caller has pushed and `RECORD_BYTES_KEPT_MAX`. Pages of several timelines
//! follow each other as their history says: which segment to push after a switch is the caller's to know.

use std::collections::VecDeque;

use bytes::Bytes;

use super::crc32c::{Crc32c, Crc32cDigest};
use super::lsn::Lsn;
use super::resource_manager::ResourceManager;
use super::timeline::TimelineId;
use super::version::MajorVersion;
use super::wal_page::{WalPageError, WalPageHeader};
use super::wal_payload::INFO_SWITCH;
use super::wal_record::{
    CHECKED_HEADER_LEN, RECORD_HEADER_LEN, RecordBody, WalRecord, WalRecordError, WalRecordHeader,
};
use super::wal_segment::{WalSegmentNumber, WalSegmentSize};

/// Of a longer record only so many bytes are kept. All page headers, images and data of one record come to less than
/// half of it, so the main data's beginning is always there.
pub const RECORD_BYTES_KEPT_MAX: usize = 8 << 20;
/// The longest record a server writes or reads (`XLogRecordMaxSize`).
const RECORD_BYTES_MAX: u32 = 1020 << 20;
/// Records begin at multiples of this (`MAXALIGN`).
const ALIGNMENT: usize = 8;

/// Turns pushed bytes into records.
#[derive(Debug)]
pub struct WalRecordStream {
    segment_size: WalSegmentSize,
    page_bytes: usize,
    /// Where the first record is looked for.
    start: Lsn,
    /// The next page to look at; everything before it is done with.
    next_page: Lsn,
    /// Pushed bytes from `next_page` on.
    input: VecDeque<Bytes>,
    input_bytes: usize,
    page: Option<Page>,
    /// Bytes still to come of a record that began before `start`.
    skip: usize,
    record: Option<OpenRecord>,
    /// The last record returned.
    previous: Option<Lsn>,
    version: Option<MajorVersion>,
    end: Option<EndOfWal>,
}

/// What the stream has to give.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalStep {
    Record(WalRecord),
    /// Push what follows `WalRecordStream::wanted`.
    NeedBytes,
    /// There is no valid record here.
    End(EndOfWal),
}

/// Where the valid log ends, and what stands there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndOfWal {
    /// Where the next record would begin, or where the one began that is not whole.
    pub lsn: Lsn,
    pub reason: EndReason,
}

/// What stands where a record would.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    #[error("zeros follow the last record")]
    Zeros,
    #[error("{0}")]
    PageHeader(#[from] WalPageError),
    #[error("the page at {expected} is one of {found}")]
    OtherAddress { expected: Lsn, found: Lsn },
    #[error("the page at {page} is of another cluster")]
    OtherFormat { page: Lsn },
    #[error("the page at {page} does not continue the record")]
    NoContinuation { page: Lsn },
    #[error("the page at {page} continues a record that has no beginning")]
    NoBeginning { page: Lsn },
    #[error("a record of {length} bytes is none")]
    Length { length: u32 },
    #[error("no resource manager has the record")]
    ResourceManager,
    #[error("the record follows {found}, not {expected}")]
    PreviousRecord { found: Lsn, expected: Lsn },
    #[error("the record's checksum is wrong")]
    Checksum,
}

/// Tells that pushed bytes do not follow those before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("WAL from {wanted} on is wanted, not from {found}")]
pub struct WalGapError {
    pub wanted: Lsn,
    pub found: Lsn,
}

#[derive(Debug)]
struct Page {
    address: Lsn,
    timeline: TimelineId,
    bytes: Bytes,
    /// How far it is read.
    at: usize,
}

/// A record that is being put together.
#[derive(Debug)]
struct OpenRecord {
    lsn: Lsn,
    timeline: TimelineId,
    length: usize,
    /// Bytes seen so far.
    seen: usize,
    kept: Vec<u8>,
    header: Option<WalRecordHeader>,
    /// Over the bytes after the header, once they are more than is kept.
    long_crc: Option<Box<Crc32cDigest>>,
}

impl WalRecordStream {
    /// Looks for records from `start` on, which is where a record begins, or a page.
    ///
    /// `page_bytes` is the cluster's WAL block size, from 1 to 64 KiB.
    pub fn new(start: Lsn, segment_size: WalSegmentSize, page_bytes: u32) -> Self {
        let page_bytes = page_bytes.clamp(1 << 10, 1 << 16) as usize;
        Self {
            segment_size,
            page_bytes,
            start,
            next_page: Lsn(start.0 - start.0 % page_bytes as u64),
            input: VecDeque::new(),
            input_bytes: 0,
            page: None,
            skip: 0,
            record: None,
            previous: None,
            version: None,
            end: None,
        }
    }

    /// Returns the position of the first byte that is wanted next; bytes before it may be pushed with it.
    pub fn wanted(&self) -> Lsn {
        Lsn(self.next_page.0.saturating_add(self.input_bytes as u64))
    }

    /// Adds bytes that stand at `at` in the log.
    pub fn push(&mut self, at: Lsn, mut bytes: Bytes) -> Result<(), WalGapError> {
        let wanted = self.wanted();
        let known = wanted.checked_sub(at).ok_or(WalGapError { wanted, found: at })?;
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len());
        let new = bytes.split_off(known);
        if !new.is_empty() {
            self.input_bytes += new.len();
            self.input.push_back(new);
        }
        Ok(())
    }

    /// Returns the next record, if it is there.
    ///
    /// An error is a record with a right checksum that is not understood; the stream goes on behind it.
    pub fn next_record(&mut self) -> Result<WalStep, WalRecordError> {
        if let Some(end) = &self.end {
            return Ok(WalStep::End(end.clone()));
        }
        loop {
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::NeedBytes) => return Ok(WalStep::NeedBytes),
                Ok(Step::Whole) => return self.finish_record(),
                Err(end) => {
                    self.end = Some(end.clone());
                    return Ok(WalStep::End(end));
                }
            }
        }
    }

    /// Moves on by a page's header, or by as much of a record as its page holds.
    fn step(&mut self) -> Result<Step, EndOfWal> {
        let Some(page) = &mut self.page else {
            return self.open_page();
        };
        let left = page.bytes.len() - page.at;
        let skipped = self.skip.min(left);
        self.skip -= skipped;
        page.at += skipped;
        if self.record.is_none() && self.skip == 0 {
            page.at = page.at.next_multiple_of(ALIGNMENT);
        }
        if page.at >= page.bytes.len() {
            self.page = None;
            return Ok(Step::Again);
        }
        if self.record.is_none() {
            self.begin_record()?;
        }
        self.continue_record()
    }

    /// Takes the next page from the input and checks that it is what follows.
    fn open_page(&mut self) -> Result<Step, EndOfWal> {
        let Some(bytes) = self.take_page() else { return Ok(Step::NeedBytes) };
        let expected = self.next_page;
        self.next_page = Lsn(expected.0.saturating_add(self.page_bytes as u64));
        let end = |stream: &Self, reason| {
            let lsn = stream.record.as_ref().map_or(expected, |open| open.lsn);
            EndOfWal { lsn, reason }
        };
        let header = match WalPageHeader::parse(&bytes) {
            Ok(header) => header,
            Err(error) => return Err(end(self, error.into())),
        };
        if header.address != expected {
            return Err(end(self, EndReason::OtherAddress { expected, found: header.address }));
        }
        if !self.fits(&header) {
            return Err(end(self, EndReason::OtherFormat { page: expected }));
        }
        self.version = Some(header.version);
        if let Err(reason) = self.join(&header) {
            return Err(end(self, reason));
        }
        let mut at = header.header_len();
        if expected < self.start {
            at = at.max((self.start.0 - expected.0) as usize);
        }
        self.page = Some(Page { address: expected, timeline: header.timeline, bytes, at });
        Ok(Step::Again)
    }

    /// Tells whether a page is of this cluster: same version and sizes, and the long header exactly where a segment
    /// begins.
    fn fits(&self, header: &WalPageHeader) -> bool {
        let first = self.segment_size.offset_of(header.address) == 0;
        let sizes = header.long.is_none_or(|long| {
            long.segment_size == self.segment_size && long.page_bytes as usize == self.page_bytes
        });
        let same_version = self.version.is_none_or(|version| version == header.version);
        first == header.long.is_some() && sizes && same_version
    }

    /// Checks that a page goes on where the one before it stopped.
    fn join(&mut self, header: &WalPageHeader) -> Result<(), EndReason> {
        let page = header.address;
        let begun = self.record.as_ref().map(|open| open.length - open.seen);
        match (begun, header.continuation) {
            (Some(left), Some(continued)) if left == continued as usize => {}
            (Some(_), None) if header.overwrites_continuation => self.record = None,
            (Some(_), _) => return Err(EndReason::NoContinuation { page }),
            // What the page begins with is before the record the caller asked for.
            (None, _) if page < self.start => {}
            (None, Some(continued)) if page == self.start => self.skip = continued as usize,
            (None, None) if header.overwrites_continuation => self.skip = 0,
            (None, continued) if self.skip == continued.unwrap_or(0) as usize => {}
            (None, Some(_)) => return Err(EndReason::NoBeginning { page }),
            (None, None) => return Err(EndReason::NoContinuation { page }),
        }
        Ok(())
    }

    fn begin_record(&mut self) -> Result<(), EndOfWal> {
        let page = self.page.as_ref().expect("step found a page with bytes left");
        let lsn = page.address + page.at as u64;
        let end = |reason| Err(EndOfWal { lsn, reason });
        // Records begin aligned, so the length is never cut by the end of a page.
        let Some(length) = page.bytes[page.at..].first_chunk().map(|bytes| u32::from_le_bytes(*bytes)) else {
            return end(EndReason::Zeros);
        };
        if length == 0 {
            return end(EndReason::Zeros);
        }
        if !(RECORD_HEADER_LEN as u32..=RECORD_BYTES_MAX).contains(&length) {
            return end(EndReason::Length { length });
        }
        self.record = Some(OpenRecord {
            lsn,
            timeline: page.timeline,
            length: length as usize,
            seen: 0,
            kept: Vec::with_capacity((length as usize).min(self.page_bytes) + CHECKED_HEADER_LEN),
            header: None,
            long_crc: None,
        });
        Ok(())
    }

    /// Adds what the page holds of the record.
    fn continue_record(&mut self) -> Result<Step, EndOfWal> {
        let page = self.page.as_mut().expect("step found a page with bytes left");
        let open = self.record.as_mut().expect("step began a record");
        let part = (open.length - open.seen).min(page.bytes.len() - page.at);
        open.add(&page.bytes[page.at..page.at + part]);
        page.at += part;
        let lsn = open.lsn;
        let end = |reason| EndOfWal { lsn, reason };
        if open.header.is_none()
            && let Some(bytes) = open.kept.first_chunk()
        {
            let version = self.version.expect("a page was opened");
            open.header = Some(check_header(bytes, lsn, version, self.previous).map_err(end)?);
        }
        if open.seen < open.length {
            return Ok(Step::Again);
        }
        if open.checksum_is_right() { Ok(Step::Whole) } else { Err(end(EndReason::Checksum)) }
    }

    fn finish_record(&mut self) -> Result<WalStep, WalRecordError> {
        let open = self.record.take().expect("step completed a record");
        let lsn = open.lsn;
        let header = open.header.expect("a whole record has a header, which was checked");
        let version = self.version.expect("a page was opened");
        self.previous = Some(lsn);
        let page = self.page.as_ref().expect("the record ended on it");
        // A file may claim to be the last page there can be.
        let at = page.at.next_multiple_of(ALIGNMENT) as u64;
        let mut end = Lsn(page.address.0.saturating_add(at));
        if header.resource_manager == ResourceManager::Xlog && header.info & 0xF0 == INFO_SWITCH {
            end = self.skip_segment(end);
        }
        let body =
            RecordBody::parse(&open.kept[RECORD_HEADER_LEN..], open.length - RECORD_HEADER_LEN, version)
                .map_err(|what| WalRecordError { lsn, what })?;
        Ok(WalStep::Record(WalRecord {
            lsn,
            end,
            timeline: open.timeline,
            version,
            header,
            blocks: body.blocks,
            main_data: body.main_data,
            main_data_is_whole: body.main_data_is_whole,
        }))
    }

    /// Passes over what a switch record left of its segment, and returns where the next one begins.
    fn skip_segment(&mut self, end: Lsn) -> Lsn {
        let number = WalSegmentNumber::ending_at(end, self.segment_size);
        let next = number.next().start_lsn(self.segment_size);
        self.page = None;
        while self.next_page < next && self.input_bytes > 0 {
            let wanted = usize::try_from(next - self.next_page).unwrap_or(usize::MAX);
            let taken = self.drop_input(wanted);
            self.next_page = Lsn(self.next_page.0.saturating_add(taken as u64));
        }
        self.next_page = self.next_page.max(next);
        next
    }

    /// Drops bytes of the first pushed piece, and returns how many.
    fn drop_input(&mut self, count: usize) -> usize {
        let Some(mut piece) = self.input.pop_front() else { return 0 };
        let taken = count.min(piece.len());
        let rest = piece.split_off(taken);
        if !rest.is_empty() {
            self.input.push_front(rest);
        }
        self.input_bytes -= taken;
        taken
    }

    /// Takes a page from the input, copied only where it spans pieces.
    fn take_page(&mut self) -> Option<Bytes> {
        if self.input_bytes < self.page_bytes {
            return None;
        }
        self.input_bytes -= self.page_bytes;
        let mut first = self.input.pop_front()?;
        if first.len() >= self.page_bytes {
            let rest = first.split_off(self.page_bytes);
            if !rest.is_empty() {
                self.input.push_front(rest);
            }
            return Some(first);
        }
        let mut page = Vec::with_capacity(self.page_bytes);
        page.extend_from_slice(&first);
        while page.len() < self.page_bytes {
            let mut piece = self.input.pop_front()?;
            let rest = piece.split_off(piece.len().min(self.page_bytes - page.len()));
            page.extend_from_slice(&piece);
            if !rest.is_empty() {
                self.input.push_front(rest);
            }
        }
        Some(page.into())
    }
}

enum Step {
    Again,
    NeedBytes,
    /// The open record is complete and its checksum right.
    Whole,
}

/// Checks a header as soon as it is there, so that no page is read for the sake of a length that is garbage.
fn check_header(
    bytes: &[u8; RECORD_HEADER_LEN],
    lsn: Lsn,
    version: MajorVersion,
    previous: Option<Lsn>,
) -> Result<WalRecordHeader, EndReason> {
    let header = WalRecordHeader::parse(bytes, version).ok_or(EndReason::ResourceManager)?;
    let found = header.previous;
    match previous {
        Some(expected) if found != expected => Err(EndReason::PreviousRecord { found, expected }),
        None if found >= lsn => Err(EndReason::PreviousRecord { found, expected: lsn }),
        _ => Ok(header),
    }
}

impl OpenRecord {
    fn add(&mut self, part: &[u8]) {
        self.seen += part.len();
        let (part, beyond) = part.split_at(part.len().min(RECORD_BYTES_KEPT_MAX - self.kept.len()));
        self.kept.extend_from_slice(part);
        if !beyond.is_empty() {
            let crc = self.long_crc.get_or_insert_with(|| {
                let mut crc = Box::new(Crc32cDigest::new());
                crc.update(&self.kept[RECORD_HEADER_LEN..]);
                crc
            });
            crc.update(beyond);
        }
    }

    /// Checks the sum over everything after the header, then the header.
    fn checksum_is_right(&mut self) -> bool {
        let Some(header) = self.header else { return false };
        let crc = match self.long_crc.take() {
            Some(mut crc) => {
                crc.update(&self.kept[..CHECKED_HEADER_LEN]);
                crc.finish()
            }
            // One call over one run of bytes is several times faster, and nearly all records are short.
            None => {
                let length = self.kept.len();
                self.kept.extend_from_within(..CHECKED_HEADER_LEN);
                let crc = Crc32c::of(&self.kept[RECORD_HEADER_LEN..]);
                self.kept.truncate(length);
                crc
            }
        };
        crc == Crc32c(header.crc)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::wal_samples::{
        BORDER, BORDER_END, BORDER_RECORDS, PAGE_BYTES, SEGMENT_BYTES, STARTS, border_bytes, line, read,
        segment_size,
    };
    use super::*;

    /// The records before `end`, one line each.
    fn lines(records: &[WalRecord], end: Lsn) -> Vec<String> {
        records.iter().take_while(|record| record.lsn < end).map(line).collect()
    }

    #[test]
    fn the_records_are_those_of_the_servers_own_tools() {
        for start in STARTS {
            let (records, _) = read(start.lsn, start.bytes, SEGMENT_BYTES);
            let read = lines(&records, start.end);
            assert!(read.len() > 40, "{}: {} records", start.version, read.len());
            assert!(records.iter().any(|record| record.end == start.end), "{}", start.version);
            if let Some(expected) = start.records {
                assert_eq!(read, expected.lines().collect::<Vec<_>>(), "{}", start.version);
            }
        }
    }

    #[test]
    fn records_cross_pages_segments_and_a_switch() {
        let (lsn, bytes) = border_bytes();
        let (records, _) = read(lsn, &bytes, SEGMENT_BYTES);
        assert_eq!(lines(&records, BORDER_END), BORDER_RECORDS.lines().collect::<Vec<_>>());
        let crossing = records.iter().find(|record| record.lsn < BORDER[1].0 && record.end > BORDER[1].0);
        assert!(crossing.unwrap().main_data.windows(17).any(|text| text == b"across the border"));
    }

    #[test]
    fn the_size_of_the_pieces_does_not_matter() {
        let (lsn, bytes) = border_bytes();
        let (whole, end) = read(lsn, &bytes, usize::MAX);
        for piece in [333, 8191, 8192, 100_000] {
            assert_eq!(read(lsn, &bytes, piece), (whole.clone(), end.clone()), "{piece}");
        }
    }

    #[test]
    fn after_a_switch_the_next_segment_is_wanted() {
        let mut stream = WalRecordStream::new(BORDER[0].0, segment_size(), PAGE_BYTES);
        for (lsn, piece) in &BORDER[..2] {
            stream.push(*lsn, Bytes::from_static(piece)).unwrap();
        }
        let mut last = Lsn::ZERO;
        while let WalStep::Record(record) = stream.next_record().unwrap() {
            last = record.end;
        }
        assert_eq!((last, stream.wanted()), (BORDER[2].0, BORDER[2].0));
        // What is left of the old segment may come, and is passed over.
        stream.push(Lsn(0xD0_6000), Bytes::from_static(&[7; 8192])).unwrap();
        assert_eq!(stream.next_record(), Ok(WalStep::NeedBytes));
        stream.push(BORDER[2].0, Bytes::from_static(BORDER[2].1)).unwrap();
        assert!(matches!(stream.next_record(), Ok(WalStep::Record(record)) if record.lsn == Lsn(0xE0_0028)));
    }

    #[test]
    fn reading_begins_at_any_record() {
        let (lsn, bytes) = border_bytes();
        let (records, _) = read(lsn, &bytes, SEGMENT_BYTES);
        for first in records.iter().step_by(7) {
            let mut stream = WalRecordStream::new(first.lsn, segment_size(), PAGE_BYTES);
            // The caller pushes whole segments; what lies before is passed over.
            stream.push(lsn, Bytes::copy_from_slice(&bytes)).unwrap();
            assert_eq!(stream.next_record(), Ok(WalStep::Record(first.clone())));
        }
    }

    #[test]
    fn a_gap_is_an_error() {
        let mut stream = WalRecordStream::new(Lsn(0x90_0028), segment_size(), PAGE_BYTES);
        assert_eq!(stream.wanted(), Lsn(0x90_0000));
        let found = Lsn(0x90_0008);
        assert_eq!(
            stream.push(found, Bytes::from_static(b"x")),
            Err(WalGapError { wanted: Lsn(0x90_0000), found })
        );
    }

    #[test]
    fn the_end_of_the_log_is_a_value() {
        let start = &STARTS[2];
        let (records, _) = read(start.lsn, start.bytes, SEGMENT_BYTES);
        let last = records.iter().position(|record| record.end == start.end).unwrap();
        let end = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = start.bytes.to_vec();
            change(&mut bytes);
            let (read, end) = read(start.lsn, &bytes, SEGMENT_BYTES);
            assert_eq!(read, records[..=last], "the records before the end");
            end.unwrap()
        };
        let at = (start.end - start.lsn) as usize;
        let lsn = start.end;
        assert_eq!(end(&|b| b[at..].fill(0)), EndOfWal { lsn, reason: EndReason::Zeros });
        assert_eq!(end(&|b| b[at + 25] ^= 1), EndOfWal { lsn, reason: EndReason::Checksum });
        assert_eq!(
            end(&|b| b[at..at + 4].copy_from_slice(&23u32.to_le_bytes())),
            EndOfWal { lsn, reason: EndReason::Length { length: 23 } }
        );
        assert_eq!(
            end(&|b| b[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes())),
            EndOfWal { lsn, reason: EndReason::Length { length: u32::MAX } }
        );
        assert_eq!(end(&|b| b[at + 17] = 99), EndOfWal { lsn, reason: EndReason::ResourceManager });
        assert!(matches!(end(&|b| b[at + 8] ^= 8).reason, EndReason::PreviousRecord { .. }));
    }

    #[test]
    fn a_page_of_a_recycled_segment_ends_the_log() {
        let start = &STARTS[2];
        let mut bytes = start.bytes.to_vec();
        let page = bytes.len() - 8192;
        let expected = start.lsn + page as u64;
        bytes[page + 10] ^= 0x10;
        let (_, end) = read(start.lsn, &bytes, SEGMENT_BYTES);
        let reason = EndReason::OtherAddress { expected, found: Lsn(expected.0 ^ 0x10_0000) };
        assert_eq!(end.unwrap().reason, reason);
        bytes[page..].fill(0);
        let (_, end) = read(start.lsn, &bytes, SEGMENT_BYTES);
        assert_eq!(end.unwrap().reason, EndReason::PageHeader(WalPageError::NoHeader));
    }

    #[test]
    fn bytes_of_another_version_do_not_continue() {
        let (v15, v16) = (&STARTS[2], &STARTS[3]);
        let bytes = [&v15.bytes[..8192], &v16.bytes[8192..]].concat();
        let (_, end) = read(v15.lsn, &bytes, SEGMENT_BYTES);
        assert_eq!(end.unwrap().reason, EndReason::OtherFormat { page: v15.lsn + 8192 });
    }

    /// Writes records into pages as a server does, from the beginning of a segment on.
    fn write_wal(lsn: Lsn, records: &[Vec<u8>]) -> Vec<u8> {
        let long_header = &STARTS[5].bytes[..40];
        let mut bytes = Vec::new();
        for record in records {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            let mut left = record.as_slice();
            while !left.is_empty() {
                let in_page = bytes.len() % 8192;
                if in_page == 0 {
                    let first = bytes.len() % SEGMENT_BYTES == 0;
                    let mut header = long_header[..if first { 40 } else { 24 }].to_vec();
                    let continued = left.len() < record.len();
                    header[2] = u8::from(continued) | if first { 2 } else { 0 };
                    header[8..16].copy_from_slice(&(lsn.0 + bytes.len() as u64).to_le_bytes());
                    let rest = if continued { left.len() as u32 } else { 0 };
                    header[16..20].copy_from_slice(&rest.to_le_bytes());
                    bytes.extend_from_slice(&header);
                    continue;
                }
                let (part, rest) = left.split_at(left.len().min(8192 - in_page));
                bytes.extend_from_slice(part);
                left = rest;
            }
        }
        bytes.resize(bytes.len().next_multiple_of(8192), 0);
        bytes
    }

    fn message(previous: Lsn, text_len: usize) -> Vec<u8> {
        let mut record = vec![0; 24];
        record[8..16].copy_from_slice(&previous.0.to_le_bytes());
        record[17] = 21;
        record.push(254);
        record.extend_from_slice(&(text_len as u32).to_le_bytes());
        record.extend((0..text_len).map(|i| (i % 251) as u8));
        let length = record.len() as u32;
        record[..4].copy_from_slice(&length.to_le_bytes());
        let crc = Crc32c::of(&[&record[24..], &record[..20]].concat());
        record[20..24].copy_from_slice(&crc.0.to_le_bytes());
        record
    }

    #[test]
    fn of_a_very_long_record_only_the_beginning_is_kept() {
        let lsn = Lsn(0x4000_0000);
        let first = message(Lsn::ZERO, RECORD_BYTES_KEPT_MAX + (2 << 20));
        let bytes = write_wal(lsn, &[first, message(lsn + 40, 10)]);
        let (records, end) = read(lsn, &bytes, 100_000);
        let [long, short] = records.as_slice() else { panic!("{} records, {end:?}", records.len()) };
        assert_eq!(long.main_data.len() + 24 + 5, RECORD_BYTES_KEPT_MAX);
        assert!(long.main_data.starts_with(&[0, 1, 2, 3]) && !long.main_data_is_whole);
        assert!(short.lsn >= long.end && short.main_data_is_whole);
        assert_eq!(end.unwrap().reason, EndReason::Zeros);
        let mut damaged = bytes;
        damaged[(9 << 20) + 100] ^= 1;
        let reason = EndReason::Checksum;
        assert_eq!(read(lsn, &damaged, 100_000), (Vec::new(), Some(EndOfWal { lsn: lsn + 40, reason })));
    }

    /// A record of a page and more is given up by a crash; the next server writes another in its place.
    #[test]
    fn a_record_that_was_never_completed_is_overwritten() {
        let (lsn, bytes) = border_bytes();
        let (records, _) = read(lsn, &bytes, SEGMENT_BYTES);
        let crossing = records.iter().position(|record| record.lsn < BORDER[1].0 && record.end > BORDER[1].0);
        let crossing = crossing.unwrap();
        let follows = records[crossing + 1].clone();
        // Its second page says that it overwrites, and holds the record that follows the crossing one.
        let page = (records[crossing].lsn.0 / 8192 + 1) * 8192;
        let mut overwritten = bytes[..(page - lsn.0) as usize].to_vec();
        let mut header = bytes[(page - lsn.0) as usize..][..24].to_vec();
        header[2] = header[2] & !1 | 8;
        header[16..20].fill(0);
        overwritten.extend_from_slice(&header);
        let from = (follows.lsn - lsn) as usize;
        let mut record = bytes[from..from + follows.header.length as usize].to_vec();
        record[8..16].copy_from_slice(&records[crossing - 1].lsn.0.to_le_bytes());
        let mut crc = Crc32cDigest::new();
        crc.update(&record[24..]);
        crc.update(&record[..20]);
        record[20..24].copy_from_slice(&crc.finish().0.to_le_bytes());
        overwritten.extend_from_slice(&record);
        overwritten.resize((page - lsn.0) as usize + 8192, 0);
        let (read, end) = read(lsn, &overwritten, SEGMENT_BYTES);
        assert_eq!(read[..crossing], records[..crossing]);
        assert_eq!((read.len(), read[crossing].lsn), (crossing + 1, Lsn(page + 24)));
        assert_eq!(read[crossing].main_data, follows.main_data);
        assert_eq!(end.unwrap().reason, EndReason::Zeros);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn damage_never_makes_another_record(at in 0usize..72 << 10, mask in 1u8.., piece in 1usize..70_000) {
            let (lsn, bytes) = border_bytes();
            let (whole, _) = read(lsn, &bytes, SEGMENT_BYTES);
            let mut damaged = bytes;
            let at = at % damaged.len();
            damaged[at] ^= mask;
            let (read, _) = read(lsn, &damaged, piece);
            prop_assert!(read.len() <= whole.len());
            for (read, whole) in read.iter().zip(&whole) {
                // A page's timeline has no checksum.
                prop_assert_eq!(&WalRecord { timeline: whole.timeline, ..read.clone() }, whole);
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(page in prop::collection::vec(any::<u8>(), 0..200), length in 24u32..400) {
            // A real header, then anything: a length, a checksum that fits, and noise.
            let start = &STARTS[5];
            let mut bytes = start.bytes[..40].to_vec();
            let mut record = page;
            record.resize(length as usize, 0);
            record[..4].copy_from_slice(&length.to_le_bytes());
            record[8..16].fill(0);
            record[17] %= 22;
            let mut crc = Crc32cDigest::new();
            crc.update(&record[24..]);
            crc.update(&record[..20]);
            record[20..24].copy_from_slice(&crc.finish().0.to_le_bytes());
            bytes.extend_from_slice(&record);
            bytes.resize(8192, 0);
            let mut stream = WalRecordStream::new(start.lsn, segment_size(), PAGE_BYTES);
            stream.push(start.lsn, Bytes::from(bytes)).unwrap();
            if let Ok(WalStep::Record(record)) = stream.next_record() {
                let _ = record.payload();
            }
            prop_assert!(matches!(stream.next_record(), Ok(WalStep::End(_) | WalStep::NeedBytes)));
        }
    }
}
