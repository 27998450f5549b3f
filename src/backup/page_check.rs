//! Page checksums on the way: is a page of the source what the server wrote?
//!
//! Only pages older than the backup's start can be judged. A mismatch may be a page that is being written at this
//! moment, so it is read again, for as long as a write that was interrupted by a busy machine may take; only what
//! stays the same and stays wrong is damaged. The buffer always holds what was read last: that is what is sealed.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::backup::source_file::OpenFile;
use crate::pg::{Lsn, RelationFile, page};
use crate::repo::page_map::PAGE_SIZE;

/// Judges the pages of relations.
#[derive(Debug)]
pub struct PageCheck {
    start_lsn: Lsn,
    segment_pages: u32,
    damaged: AtomicU64,
}

/// How long to wait before each further look: a write is split between two memory pages and may be held up there.
const WAITS: [Duration; 4] = [
    Duration::from_millis(1),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(300),
];
/// After so many damaged pages the disk is the news, and a third of a second for each of them too long.
const PATIENT_PAGES_MAX: u64 = 64;

impl PageCheck {
    /// Creates the check for a backup that started at `start_lsn`.
    pub fn new(start_lsn: Lsn, segment_pages: u32) -> Self {
        Self { start_lsn, segment_pages, damaged: AtomicU64::new(0) }
    }

    /// Checks the whole pages of `buffer`, which was read at `offset`; returns the blocks that are damaged.
    pub fn check(
        &self,
        relation: &RelationFile,
        file: &dyn OpenFile,
        offset: u64,
        buffer: &mut [u8],
    ) -> io::Result<Vec<u32>> {
        let mut damaged = Vec::new();
        let Some(first) = relation.first_page(self.segment_pages) else {
            return Ok(damaged);
        };
        let (pages, _) = buffer.as_chunks_mut::<{ PAGE_SIZE as usize }>();
        for (number, page) in (offset / PAGE_SIZE..).zip(pages) {
            let Some(block) = u32::try_from(number).ok().and_then(|number| first.checked_add(number)) else {
                break;
            };
            if self.is_wrong(page, block) && self.stays_wrong(file, number * PAGE_SIZE, page, block)? {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                damaged.push(block);
            }
        }
        Ok(damaged)
    }

    fn is_wrong(&self, page: &[u8], block: u32) -> bool {
        matches!(page::verify(page, block, self.start_lsn), page::PageVerdict::Mismatch { .. })
    }

    fn stays_wrong(
        &self,
        file: &dyn OpenFile,
        offset: u64,
        page: &mut [u8; PAGE_SIZE as usize],
        block: u32,
    ) -> io::Result<bool> {
        let patient = self.damaged.load(Ordering::Relaxed) < PATIENT_PAGES_MAX;
        let mut changed = false;
        for wait in WAITS.iter().take(if patient { WAITS.len() } else { 1 }) {
            thread::sleep(*wait);
            let mut again = [0; PAGE_SIZE as usize];
            if file.read_at(offset, &mut again)? < again.len() {
                // Truncated meanwhile, which replay does as well.
                return Ok(false);
            }
            changed = again != *page;
            *page = again;
            if !self.is_wrong(page, block) {
                return Ok(false);
            }
        }
        // Still being written after all that time: whoever writes it logs what replay needs.
        Ok(!changed)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Mutex;

    use jiff::Timestamp;

    use crate::backup::source_file::FileState;
    use crate::pg::DataPath;

    use super::*;

    /// Gives one version of the page after the other, the last one for ever.
    #[derive(Debug)]
    struct Changing(Mutex<Vec<Vec<u8>>>);

    impl OpenFile for Changing {
        fn state(&self) -> io::Result<FileState> {
            Ok(FileState { size: PAGE_SIZE, mode: 0o600, modified: Timestamp::UNIX_EPOCH, identity: None })
        }

        fn read_at(&self, _: u64, buffer: &mut [u8]) -> io::Result<usize> {
            let mut versions = self.0.lock().unwrap();
            let page = if versions.len() > 1 { versions.remove(0) } else { versions[0].clone() };
            buffer[..page.len()].copy_from_slice(&page);
            Ok(page.len())
        }

        fn done_with(&self, _: Range<u64>) {}
    }

    fn page(fill: u8, lsn: u64, block: u32) -> Vec<u8> {
        let mut page = vec![fill; PAGE_SIZE as usize];
        page[..4].copy_from_slice(&((lsn >> 32) as u32).to_le_bytes());
        page[4..8].copy_from_slice(&(lsn as u32).to_le_bytes());
        let checksum = page::checksum(&page, block);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
        page
    }

    fn damaged(buffer: &mut [u8], later: Vec<Vec<u8>>) -> Vec<u32> {
        let relation = RelationFile::classify(&DataPath::new("base/5/16384.1").unwrap()).unwrap();
        let check = PageCheck::new(Lsn(0x2000), 131_072);
        check.check(&relation, &Changing(Mutex::new(later)), 5 * PAGE_SIZE, buffer).unwrap()
    }

    const BLOCK: u32 = 131_072 + 5;

    #[test]
    fn a_page_that_stays_wrong_is_damaged_and_counted_from_the_first_segment() {
        let mut wrong = page(1, 0x1000, BLOCK);
        wrong[4000] ^= 1;
        let mut buffer = [wrong.clone(), page(2, 0x1000, BLOCK + 1), vec![0; 8192], vec![3; 100]].concat();
        let before = buffer.clone();
        assert_eq!(damaged(&mut buffer, vec![wrong]), [BLOCK]);
        assert_eq!(buffer, before);
    }

    #[test]
    fn a_page_caught_half_written_is_taken_as_it_is_read_again() {
        let mut torn = page(1, 0x1000, BLOCK);
        torn[4096..].fill(9);
        let whole = page(9, 0x1000, BLOCK);
        let mut buffer = torn.clone();
        assert_eq!(damaged(&mut buffer, vec![torn.clone(), whole.clone()]), [0_u32; 0]);
        assert_eq!(buffer, whole);
        let newer = page(9, 0x3000, 0);
        let mut buffer = torn.clone();
        assert_eq!(damaged(&mut buffer, vec![newer.clone()]), [0_u32; 0]);
        assert_eq!(buffer, newer);
        let mut buffer = torn;
        assert_eq!(damaged(&mut buffer, vec![vec![1; 100]]), [0_u32; 0]);
    }
}
