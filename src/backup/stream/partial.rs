//! Files of which the server sends only what has changed (17 and later): `INCREMENTAL.16384` instead of `16384`.
//!
//! ```text
//! magic · how many pages follow · pages below which the others are as they were · numbers of the pages
//!                                                                              ── to a page ── pages
//! ```
//! As `pg_combinebackup` has it: a page is sent, or it is that of the basebackup that is built upon, or it is all zero,
//! because the relation was extended and nothing has been done with it. What cannot be put together is an error, and then
//! the server is asked for everything. Numbers in a header are believed only within a relation's segment.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use crate::backup::stream::error::StreamError;
use crate::backup::stream::work::{LargeReceived, Work};
use crate::repo::page_map::{MAP_BLOCK_PAGES, PAGE_SIZE};

/// What stands before the name of such a file.
pub const PREFIX: &[u8] = b"INCREMENTAL.";
const MAGIC: u32 = 0xd3ae_1f0d;
/// Magic, count and limit.
const FIXED_BYTES: usize = 12;
const PAGE: usize = PAGE_SIZE as usize;

/// What the header of such a file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartialHeader {
    /// The pages that follow, ascending.
    pub sent: Vec<u32>,
    /// How many pages the file has at least.
    pub length: u32,
    /// Pages from here on that do not follow are all zero; below, they are as they were. The server says the length of
    /// the file, also where it was shorter in between (`cut_at`).
    pub kept_below: u32,
}

/// Gathers a header.
#[derive(Debug)]
pub struct HeaderReader {
    bytes: Vec<u8>,
    /// Bytes of the whole file, as the archive says.
    size: u64,
    segment_pages: u32,
}

/// A file whose changed pages come.
#[derive(Debug)]
pub struct PartialFile {
    file: Arc<LargeReceived>,
    header: PartialHeader,
    /// How many of the sent pages are in work already.
    worked: usize,
    /// The first page that is not.
    next: u32,
    raw: Vec<u8>,
}

impl PartialHeader {
    /// Returns the pages of the whole file.
    pub fn pages(&self) -> u32 {
        self.sent.last().map_or(0, |last| last + 1).max(self.length)
    }

    /// Returns it for a file that was cut to so many pages: what was behind them is gone, however long it is now.
    pub fn cut_at(self, pages: u32) -> Self {
        Self { kept_below: self.kept_below.min(pages), ..self }
    }

    /// Returns whether the file is as one was that had so many pages.
    pub fn keeps_all(&self, known_pages: u64) -> bool {
        self.sent.is_empty() && self.kept_below == self.length && u64::from(self.length) == known_pages
    }
}

impl HeaderReader {
    /// Prepares for a file of `size` bytes, of a cluster whose segments have so many pages.
    pub fn new(size: u64, segment_pages: u32) -> Self {
        Self { bytes: Vec::new(), size, segment_pages }
    }

    /// Takes bytes off the front of `bytes`; returns the header once it is whole.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<PartialHeader>, &'static str> {
        loop {
            let wanted = self.wanted()?;
            let (now, later) = bytes.split_at((wanted - self.bytes.len()).min(bytes.len()));
            self.bytes.extend_from_slice(now);
            *bytes = later;
            if self.bytes.len() < wanted {
                return Ok(None);
            }
            // Once the first words are there, they tell whether there are more.
            if self.wanted()? == wanted {
                return self.header().map(Some);
            }
        }
    }

    fn word(&self, at: usize) -> u32 {
        let word = |n: usize| self.bytes.get(at + n).copied().unwrap_or(0);
        u32::from_le_bytes([word(0), word(1), word(2), word(3)])
    }

    fn count(&self) -> u32 {
        self.word(4)
    }

    /// Returns the length of the header, as far as it is known.
    fn wanted(&self) -> Result<usize, &'static str> {
        if self.bytes.len() < FIXED_BYTES {
            return Ok(FIXED_BYTES);
        }
        if self.word(0) != MAGIC {
            return Err("does not begin as one");
        }
        let count = self.count();
        if count > self.segment_pages {
            return Err("has more pages than a segment");
        }
        let bytes = FIXED_BYTES + count as usize * 4;
        let wanted = if count == 0 { FIXED_BYTES } else { bytes.next_multiple_of(PAGE) };
        let whole = wanted as u64 + u64::from(count) * PAGE_SIZE;
        if whole == self.size { Ok(wanted) } else { Err("has not the size of its pages") }
    }

    fn header(&self) -> Result<PartialHeader, &'static str> {
        let sent: Vec<u32> = (0..self.count() as usize).map(|n| self.word(FIXED_BYTES + n * 4)).collect();
        let ascends = sent.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascends || sent.last().is_some_and(|last| *last >= self.segment_pages) {
            return Err("has its pages in no order");
        }
        // Of a relation that was cut within a later segment, a server before the minor releases of 2026 says where in
        // the relation. No segment is longer than one.
        let length = self.word(8).min(self.segment_pages);
        Ok(PartialHeader { sent, length, kept_below: length })
    }
}

impl PartialFile {
    /// Begins a file.
    pub fn new(file: Arc<LargeReceived>, header: PartialHeader) -> Self {
        Self { file, header, worked: 0, next: 0, raw: Vec::new() }
    }

    /// Takes bytes of sent pages; what makes `piece_bytes` of them becomes work.
    pub fn take(&mut self, mut bytes: &[u8], piece_bytes: u64, ready: &mut VecDeque<Work>) {
        while !bytes.is_empty() {
            let room = (piece_bytes as usize).saturating_sub(self.raw.len()).max(1);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.raw.extend_from_slice(now);
            bytes = later;
            if self.raw.len() as u64 >= piece_bytes {
                let sent = self.worked + self.raw.len() / PAGE;
                if let Some(last) = self.header.sent.get(sent - 1) {
                    self.work_until(last + 1, ready);
                }
            }
        }
    }

    /// Makes work of what is left, once all pages have come.
    pub fn finish(mut self, ready: &mut VecDeque<Work>) {
        self.work_until(self.header.pages(), ready);
    }

    /// Makes work of the pages up to `end`, block after block of the file's map.
    fn work_until(&mut self, end: u32, ready: &mut VecDeque<Work>) {
        while self.next < end {
            let block_end = (u64::from(self.next) / MAP_BLOCK_PAGES + 1) * MAP_BLOCK_PAGES;
            let until = u64::from(end).min(block_end) as u32;
            let left = &self.header.sent[self.worked..];
            let count = left.partition_point(|page| *page < until);
            let sent = left[..count].to_vec();
            let rest = self.raw.split_off((count * PAGE).min(self.raw.len()));
            let raw = std::mem::replace(&mut self.raw, rest);
            let pages: Range<u32> = self.next..until;
            (self.next, self.worked) = (until, self.worked + count);
            let (file, kept_below) = (self.file.clone(), self.header.kept_below);
            let last = until == self.header.pages();
            ready.push_back(Work::Changed { file, pages, sent, raw, kept_below, last });
        }
    }
}

/// Returns a label as a basebackup has it that is whole: without the lines by which a server refuses one that is not.
pub fn whole_label(text: &[u8]) -> Result<Vec<u8>, StreamError> {
    let text = std::str::from_utf8(text)
        .map_err(|error| StreamError::Torn { path: "backup_label".to_owned(), detail: error.to_string() })?;
    let is_ours = |line: &&str| !line.starts_with("INCREMENTAL FROM ");
    Ok(text.split_inclusive('\n').filter(is_ours).collect::<String>().into_bytes())
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use crate::backup::data_directory::SourceFile;
    use crate::backup::stream::work::Lane;
    use crate::repo::entry::TreePath;

    use super::*;

    const SEGMENT: u32 = 131_072;

    /// As a server writes it.
    fn written(sent: &[u32], kept_below: u32) -> Vec<u8> {
        let mut bytes = MAGIC.to_le_bytes().to_vec();
        bytes.extend((sent.len() as u32).to_le_bytes());
        bytes.extend(kept_below.to_le_bytes());
        sent.iter().for_each(|page| bytes.extend(page.to_le_bytes()));
        if !sent.is_empty() {
            bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        }
        for page in sent {
            bytes.extend([(*page % 251) as u8; PAGE]);
        }
        bytes
    }

    fn file() -> Arc<LargeReceived> {
        let file = SourceFile {
            path: TreePath::new("data/base/5/16384").unwrap(),
            root: 0,
            size: 0,
            mode: 0o600,
            modified: Timestamp::UNIX_EPOCH,
            identity: None,
        };
        Arc::new(LargeReceived::new(1, Lane::Rest, file))
    }

    /// Reads a file in pieces of any size: its header, and the work it makes.
    fn read(bytes: &[u8], cut: usize, piece: u64) -> Result<(PartialHeader, VecDeque<Work>), &'static str> {
        let mut reader = HeaderReader::new(bytes.len() as u64, SEGMENT);
        let (mut partial, mut ready): (Option<PartialFile>, _) = (None, VecDeque::new());
        for mut part in bytes.chunks(cut) {
            if partial.is_none() {
                partial = reader.take(&mut part)?.map(|header| PartialFile::new(file(), header));
            }
            if let Some(partial) = &mut partial {
                partial.take(part, piece, &mut ready);
            }
        }
        let partial = partial.ok_or("is cut")?;
        let header = partial.header.clone();
        partial.finish(&mut ready);
        Ok((header, ready))
    }

    #[test]
    fn pages_are_sent_kept_or_zero() {
        let (header, ready) = read(&written(&[3, 20_000], 30_000), 1000, 1 << 20).unwrap();
        let expected = PartialHeader { sent: vec![3, 20_000], length: 30_000, kept_below: 30_000 };
        assert_eq!(header, expected);
        let pieces: Vec<(Range<u32>, Vec<u32>, usize, bool)> = ready
            .into_iter()
            .map(|work| match work {
                Work::Changed { pages, sent, raw, last, .. } => (pages, sent, raw.len(), last),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(pieces, [(0..16_384, vec![3], PAGE, false), (16_384..30_000, vec![20_000], PAGE, true)]);
        let (header, ready) = read(&written(&[], 5), 3, 1 << 20).unwrap();
        assert_eq!((header.pages(), ready.len()), (5, 1));
        // A page behind all that are kept: between them are zeros.
        assert_eq!(read(&written(&[9], 5), 3, 1 << 20).unwrap().0.pages(), 10);
    }

    #[test]
    fn hostile_headers_are_refused_before_room_is_made() {
        let with = |at: usize, word: u32| {
            let mut bytes = written(&[3, 5], 9);
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
            read(&bytes, 4096, 1 << 20).unwrap_err()
        };
        assert!(with(0, 7).contains("does not begin"));
        assert!(with(4, u32::MAX).contains("more pages"));
        assert!(with(4, 1).contains("size") && with(4, SEGMENT).contains("size"));
        assert!(with(12, 5).contains("order") && with(16, SEGMENT).contains("order"));
        assert_eq!(read(&written(&[3], 9)[..100], 10, 1 << 20).unwrap_err(), "has not the size of its pages");
        assert_eq!(read(&[1; 5], 10, 1 << 20).unwrap_err(), "is cut");
    }

    #[test]
    fn a_file_of_a_relation_that_was_cut_behind_it_is_a_segment_long() {
        for said in [SEGMENT, SEGMENT + 1, u32::MAX] {
            let (header, ready) = read(&written(&[3], said), 4096, 1 << 20).unwrap();
            assert_eq!((header.pages(), header.kept_below), (SEGMENT, SEGMENT), "{said}");
            assert_eq!(ready.len() as u64, u64::from(SEGMENT) / MAP_BLOCK_PAGES);
        }
    }

    #[test]
    fn what_was_cut_off_does_not_come_back() {
        let header = |sent: &[u32]| PartialHeader { sent: sent.to_vec(), length: 70, kept_below: 70 };
        assert!(header(&[]).keeps_all(70) && !header(&[3]).keeps_all(70) && !header(&[]).keeps_all(60));
        let cut = header(&[]).cut_at(50);
        assert_eq!((cut.pages(), cut.kept_below, cut.keeps_all(70)), (70, 50, false));
        assert_eq!(header(&[]).cut_at(80), header(&[]));
        let mut ready = VecDeque::new();
        PartialFile::new(file(), cut).finish(&mut ready);
        let [Work::Changed { pages, kept_below: 50, .. }] = ready.make_contiguous() else {
            panic!("{ready:?}")
        };
        assert_eq!(*pages, 0..70);
    }

    #[test]
    fn a_label_becomes_that_of_a_whole_basebackup() {
        let label =
            b"START WAL LOCATION: 0/2000028\nLABEL: x\nINCREMENTAL FROM LSN: 0/1\nINCREMENTAL FROM TLI: 1\n";
        assert_eq!(whole_label(label).unwrap(), b"START WAL LOCATION: 0/2000028\nLABEL: x\n");
    }

    proptest! {
        #[test]
        fn every_page_is_worked_on_once_and_in_order(
            sent in proptest::collection::btree_set(0u32..40_000, 0..60),
            kept_below in 0u32..40_000, cut in 1usize..20_000, piece in 1u64..8,
        ) {
            let sent: Vec<u32> = sent.into_iter().collect();
            let (header, ready) = read(&written(&sent, kept_below), cut, piece * PAGE_SIZE).unwrap();
            let (mut next, mut found) = (0, Vec::new());
            for work in ready {
                let Work::Changed { pages, sent, raw, last, .. } = work else { panic!("other work") };
                prop_assert_eq!(pages.start, next);
                prop_assert_eq!(raw.len(), sent.len() * PAGE);
                prop_assert!(raw.len() as u64 <= piece * PAGE_SIZE);
                prop_assert!(sent.iter().all(|page| pages.contains(page)));
                prop_assert!(sent.iter().zip(raw.chunks(PAGE)).all(|(page, raw)| raw == [(*page % 251) as u8; PAGE]));
                next = pages.end;
                prop_assert_eq!(last, next == header.pages());
                found.extend(sent);
            }
            prop_assert_eq!((next, found), (header.pages(), sent));
        }

        #[test]
        fn any_bytes_are_a_file_or_refused(bytes: Vec<u8>, cut in 1usize..100) {
            let _ = read(&bytes, cut, 1 << 20);
            let mut begun = MAGIC.to_le_bytes().to_vec();
            begun.extend(bytes);
            let _ = read(&begun, cut, 1 << 20);
        }
    }
}
