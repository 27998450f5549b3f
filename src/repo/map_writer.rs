//! Turns finished page maps into file contents: small maps stand in the file table, larger ones in map chunks.
//!
//! Maps of many files share a map chunk. Its place is known only when it is sealed, so a file's content is handed
//! out at the end, by the number that the caller gave the file. A map block that an earlier basebackup has written as
//! it is now is named where it stands.

use std::collections::BTreeMap;

use crate::codec::Compressor;
use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{BlobRef, Content};
use crate::repo::error::Error;
use crate::repo::named_chunks::NamedChunks;
use crate::repo::pack::PackBuilder;
use crate::repo::page_map::{MAP_BLOCK_PAGES, MapBlock};
use crate::repo::sealed::{CompressedFrame, FrameKind};

/// Maps of up to this many pages stand in the file table: most relations are smaller.
const INLINE_PAGES_MAX: u32 = 16;
/// Raw bytes of a map chunk: one look-up in a large file fetches one of these.
const MAP_CHUNK_BYTES: usize = 32 << 10;

/// Collects the maps of a basebackup's files.
#[derive(Debug, Default)]
pub struct MapWriter {
    raw: Vec<u8>,
    pending: Vec<(u64, usize, u32, u32)>,
    /// Files whose map stands in the file table.
    contents: BTreeMap<u64, Content>,
    /// Where the map blocks of the others stand; nothing where a block is still pending.
    places: BTreeMap<u64, Vec<Option<BlobRef>>>,
    /// The chunks that maps in map chunks name.
    named: NamedChunks,
}

/// Collects the pages of one file, block after block.
#[derive(Debug, Default)]
pub struct FileMap {
    blocks: Vec<MapBlock>,
    /// Blocks that stand in map chunks already, by their number.
    standing: BTreeMap<usize, BlobRef>,
}

impl FileMap {
    /// Appends `count` zero pages.
    pub fn push_zero(&mut self, mut count: u64) {
        while count > 0 {
            let (block, room) = self.current();
            let now = count.min(u64::from(room)) as u32;
            block.push_zero(now);
            count -= u64::from(now);
        }
    }

    /// Appends `count` pages that stand in `chunk` from `slot` on.
    pub fn push(&mut self, chunk: ChunkRef, mut slot: u32, mut count: u32) {
        while count > 0 {
            let (block, room) = self.current();
            let now = count.min(room);
            block.push(chunk, slot, now);
            (slot, count) = (slot + now, count - now);
        }
    }

    /// Says that block `n`, which is complete, stands at `blob` exactly as it is here: it is not written again.
    pub fn stands_at(&mut self, n: usize, blob: BlobRef) {
        debug_assert!(n < self.blocks.len(), "a block that is not there stands nowhere");
        self.standing.insert(n, blob);
    }

    /// Returns block `n`.
    pub fn block(&self, n: usize) -> Option<&MapBlock> {
        self.blocks.get(n)
    }

    /// Returns how many pages have been appended.
    pub fn page_count(&self) -> u64 {
        let full = self.blocks.len().saturating_sub(1) as u64 * MAP_BLOCK_PAGES;
        full + self.blocks.last().map_or(0, |block| u64::from(block.page_count()))
    }

    fn current(&mut self) -> (&mut MapBlock, u32) {
        let full = self.blocks.last().is_none_or(|block| u64::from(block.page_count()) == MAP_BLOCK_PAGES);
        if full {
            self.blocks.push(MapBlock::default());
        }
        let block = self.blocks.last_mut().expect("one was just pushed if there was none");
        let room = MAP_BLOCK_PAGES as u32 - block.page_count();
        (block, room)
    }
}

impl MapWriter {
    /// Takes the finished map of file `number`; returns whether a map chunk is ready to be written.
    pub fn finish_file(&mut self, number: u64, map: FileMap) -> bool {
        let FileMap { mut blocks, standing } = map;
        if blocks.len() <= 1 && blocks.first().is_none_or(|block| block.page_count() <= INLINE_PAGES_MAX) {
            let block = blocks.pop().unwrap_or_default();
            self.contents.insert(number, Content::Map(Box::new(block)));
            return false;
        }
        self.places.insert(number, (0..blocks.len()).map(|n| standing.get(&n).copied()).collect());
        for (n, block) in blocks.iter().enumerate() {
            self.named.name_block(block);
            if standing.contains_key(&n) {
                continue;
            }
            let bytes = block.encode();
            self.pending.push((number, n, self.raw.len() as u32, bytes.len() as u32));
            self.raw.extend_from_slice(&bytes);
        }
        self.is_ready()
    }

    /// Returns whether enough maps have gathered for a map chunk.
    pub fn is_ready(&self) -> bool {
        self.raw.len() >= MAP_CHUNK_BYTES
    }

    /// Writes what has gathered as map chunks of about [`MAP_CHUNK_BYTES`], as far as `pack` has room.
    ///
    /// Called again with the next pack until [`MapWriter::is_empty`].
    pub fn write(&mut self, pack: &mut PackBuilder, compressor: &mut Compressor) -> Result<(), Error> {
        let mut written = 0;
        while written < self.pending.len() && pack.has_room() {
            let from = self.pending[written].2;
            let mut end = written + 1;
            while end < self.pending.len()
                && (self.pending[end].2 + self.pending[end].3 - from) as usize <= MAP_CHUNK_BYTES
            {
                end += 1;
            }
            let last = self.pending[end - 1];
            let raw = &self.raw[from as usize..(last.2 + last.3) as usize];
            let chunk = pack.append(FrameKind::Map, CompressedFrame::compress(compressor, raw)?);
            for &(number, n, at, len) in &self.pending[written..end] {
                let blob = BlobRef { chunk, at: at - from, len };
                if let Some(place) = self.places.get_mut(&number).and_then(|places| places.get_mut(n)) {
                    *place = Some(blob);
                }
            }
            written = end;
        }
        let kept_from = self.pending.get(written).map_or(self.raw.len() as u32, |pending| pending.2);
        self.raw.drain(..kept_from as usize);
        self.pending.drain(..written);
        self.pending.iter_mut().for_each(|pending| pending.2 -= kept_from);
        Ok(())
    }

    /// Returns whether everything has been written.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Names the chunks of a map block of a file that is kept as it is, maps and all.
    pub fn name_block(&mut self, block: &MapBlock) {
        self.named.name_block(block);
    }

    /// Returns the contents by file number, and the chunks that maps in map chunks name.
    pub fn finish(mut self) -> (BTreeMap<u64, Content>, NamedChunks) {
        debug_assert!(self.is_empty(), "maps are left that no pack holds");
        for (number, places) in self.places {
            let blobs = places.into_iter().map(|place| place.expect("every map that was pending is written"));
            self.contents.insert(number, Content::Blocks(blobs.collect()));
        }
        (self.contents, self.named)
    }
}
