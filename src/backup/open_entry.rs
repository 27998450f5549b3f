//! A file of which some pages have been packed: its map as far as it goes, and how that compares with what was known.
//!
//! Block by block: whether everything in it stands where it stood, so that the map block need not be written again, and
//! the hashes of its pages, for the next basebackup. Deliberately absent: packs and chunks.

use std::sync::Arc;

use crate::backup::source_file::FileState;
use crate::backup::state::{KnownBlock, KnownContent, KnownFile, PageHash, RecordAt};
use crate::pg::Crc32c;
use crate::repo::{
    FileMap,
    entry::{BlobRef, Content},
    page_map::MAP_BLOCK_PAGES,
};

/// A file that is being packed.
#[derive(Debug)]
pub struct OpenEntry {
    /// Its index among the files of the walk.
    pub number: usize,
    /// What it was when it was opened; none where it had vanished.
    pub state: Option<FileState>,
    /// Its map so far.
    pub map: FileMap,
    /// Bytes packed so far.
    pub bytes: u64,
    /// CRC of them.
    pub crc: Crc32c,
    /// Whether its end has been met; what comes later does not belong to it.
    pub ended: bool,
    /// Pages whose checksum is wrong.
    pub damaged: u32,
    /// Whether everything in the block under way stands where it stood.
    pub unchanged: bool,
    /// Hashes of the pages of the block under way.
    pub hashes: Vec<PageHash>,
    /// Blocks that are complete.
    pub blocks_done: usize,
    /// Where complete blocks are remembered.
    pub records: Vec<RecordAt>,
    known: Option<Arc<KnownFile>>,
}

impl OpenEntry {
    /// Starts a file of which `known` is known.
    pub fn new(number: usize, state: Option<FileState>, known: Option<Arc<KnownFile>>) -> Self {
        Self {
            number,
            state,
            map: FileMap::default(),
            bytes: 0,
            crc: Crc32c::default(),
            ended: false,
            damaged: 0,
            unchanged: true,
            hashes: Vec::new(),
            blocks_done: 0,
            records: Vec::new(),
            known,
        }
    }

    /// Returns whether the block under way has all its pages.
    pub fn block_is_full(&self) -> bool {
        self.map.page_count() == (self.blocks_done as u64 + 1) * MAP_BLOCK_PAGES
    }

    /// Returns whether the block under way has any page.
    pub fn has_open_block(&self) -> bool {
        self.map.page_count() > self.blocks_done as u64 * MAP_BLOCK_PAGES
    }

    /// Returns where the block under way, which is complete, stands already; nothing where it has to be written.
    pub fn standing_block(&self) -> Option<BlobRef> {
        let known = self.known.as_ref().filter(|_| self.unchanged)?;
        let KnownContent::Pages { stands: Content::Blocks(blobs), .. } = &known.content else {
            return None;
        };
        let block = self.map.block(self.blocks_done)?;
        let as_long = known.pages_of_block(self.blocks_done as u64) == block.page_count();
        blobs.get(self.blocks_done).filter(|_| as_long).copied()
    }

    /// Ends the block under way; returns what is known of it now where that `is_wanted`.
    pub fn take_block(&mut self, is_wanted: bool) -> Option<KnownBlock> {
        let hashes = std::mem::take(&mut self.hashes);
        let map = self.map.block(self.blocks_done).filter(|_| is_wanted).cloned();
        (self.blocks_done, self.unchanged) = (self.blocks_done + 1, true);
        let map = map.filter(|map| map.page_count() as usize == hashes.len())?;
        Some(KnownBlock { map, hashes })
    }
}
