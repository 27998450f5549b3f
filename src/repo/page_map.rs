//! The page map of a file, in blocks of 16384 pages (128 MiB).
//!
//! A block lists extents: runs of pages that stand in neighbouring slots of one chunk, or that are all zero and
//! stand nowhere. Extents cover the block without gaps, so only their lengths are stored. A page's chunk may have
//! been written by any basebackup; no chain is followed to find it.

use crate::repo::chunk::{ChunkRef, ChunkTableBuilder, decode_chunk_table};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// Bytes of a page, the unit of change.
pub const PAGE_SIZE: u64 = 8192;
/// Pages that one map block describes.
pub const MAP_BLOCK_PAGES: u64 = 16_384;
/// Bytes of a file that one map block describes.
pub const MAP_BLOCK_BYTES: u64 = MAP_BLOCK_PAGES * PAGE_SIZE;

/// The map of up to 16384 neighbouring pages of one file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapBlock {
    extents: Vec<Extent>,
}

/// A run of pages that stand together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First page, counted from the start of the block.
    pub first: u32,
    /// Number of pages, at least one.
    pub count: u32,
    /// Where they are.
    pub source: PageSource,
}

/// Where a run of pages is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSource {
    /// Nowhere: all bytes are zero.
    Zero,
    /// In the chunk, from this slot on; slots are [`PAGE_SIZE`] apart.
    Chunk { chunk: ChunkRef, slot: u32 },
}

impl MapBlock {
    /// Appends `count` zero pages.
    pub fn push_zero(&mut self, count: u32) {
        let first = self.page_count();
        match self.extents.last_mut() {
            Some(Extent { count: last, source: PageSource::Zero, .. }) => *last += count,
            _ => self.extents.push(Extent { first, count, source: PageSource::Zero }),
        }
    }

    /// Appends `count` pages that stand in `chunk` from `slot` on.
    pub fn push(&mut self, chunk: ChunkRef, slot: u32, count: u32) {
        let first = self.page_count();
        if let Some(Extent { count: last, source: PageSource::Chunk { chunk: previous, slot: from }, .. }) =
            self.extents.last_mut()
            && *previous == chunk
            && *from + *last == slot
        {
            *last += count;
            return;
        }
        self.extents.push(Extent { first, count, source: PageSource::Chunk { chunk, slot } });
    }

    /// Returns how many pages the block describes.
    pub fn page_count(&self) -> u32 {
        self.extents.last().map_or(0, |extent| extent.first + extent.count)
    }

    /// Returns the extents in order.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// Returns the extents that hold any of the pages `first..end`.
    pub fn overlapping(&self, first: u32, end: u32) -> &[Extent] {
        let from = self.extents.partition_point(|extent| extent.first + extent.count <= first);
        let to = self.extents.partition_point(|extent| extent.first < end);
        &self.extents[from..to.max(from)]
    }

    /// Returns the extents of this block that stand in `chunk`.
    pub fn extents_in<'a>(&'a self, chunk: &'a ChunkRef) -> impl Iterator<Item = (&'a Extent, u32)> {
        self.extents.iter().filter_map(move |extent| match &extent.source {
            PageSource::Chunk { chunk: found, slot } if found == chunk => Some((extent, *slot)),
            _ => None,
        })
    }

    /// Appends the extents, naming chunks by their index in `chunks`.
    pub fn encode_extents(&self, chunks: &mut ChunkTableBuilder, out: &mut WireWriter) {
        out.varint(self.extents.len() as u64);
        for extent in &self.extents {
            out.varint(u64::from(extent.count));
            match &extent.source {
                PageSource::Zero => out.varint(0),
                PageSource::Chunk { chunk, slot } => {
                    out.varint(u64::from(chunks.index(chunk)) + 1).varint(u64::from(*slot))
                }
            };
        }
    }

    /// Takes extents that name chunks of `chunks`.
    pub fn decode_extents(reader: &mut WireReader<'_>, chunks: &[ChunkRef]) -> Result<Self, WireError> {
        // Zero pages are the shortest: how many, and that they are.
        let count = reader.count_of("extent count", 2)?;
        let mut block = Self { extents: Vec::with_capacity(count.min(MAP_BLOCK_PAGES as usize)) };
        for _ in 0..count {
            let first = block.page_count();
            let count = reader.bounded("page count", MAP_BLOCK_PAGES - u64::from(first))? as u32;
            let index = reader.small("chunk index")?;
            let source = match index.checked_sub(1) {
                None => PageSource::Zero,
                Some(index) => {
                    let chunk =
                        *chunks.get(index as usize).ok_or(WireError::Invalid { field: "chunk index" })?;
                    let slots = chunk.raw_len.div_ceil(PAGE_SIZE as u32);
                    let slot = reader.small("slot")?;
                    if slot.checked_add(count).is_none_or(|end| end > slots) {
                        return Err(WireError::Invalid { field: "slot" });
                    }
                    PageSource::Chunk { chunk, slot }
                }
            };
            if count == 0 {
                return Err(WireError::Invalid { field: "page count" });
            }
            block.extents.push(Extent { first, count, source });
        }
        Ok(block)
    }

    /// Returns the block as it stands alone in a map chunk: a table of chunks, then the extents.
    pub fn encode(&self) -> Vec<u8> {
        let mut chunks = ChunkTableBuilder::default();
        let mut extents = WireWriter::new();
        self.encode_extents(&mut chunks, &mut extents);
        let mut out = WireWriter::new();
        chunks.encode(&mut out);
        out.raw(&extents.finish());
        out.finish()
    }

    /// Takes a block that stands alone.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = WireReader::new(bytes);
        let chunks = decode_chunk_table(&mut reader)?;
        let block = Self::decode_extents(&mut reader, &chunks)?;
        reader.finish().map(|()| block)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::codec::CodecId;
    use crate::repo::id::{BasebackupId, PackId};

    use super::*;

    fn chunk(n: u32) -> ChunkRef {
        ChunkRef {
            pack: PackId {
                origin: BasebackupId::from_parts(1, u16::from(n.is_multiple_of(3))).unwrap(),
                number: n % 5,
            },
            position: n,
            offset: n * 100,
            stored_len: 100,
            raw_len: 65_536,
            codec: CodecId::Zstd,
            tag: None,
        }
    }

    /// A model: for each page its chunk and slot, or nothing for a zero page.
    fn model() -> impl Strategy<Value = Vec<Option<(u32, u32)>>> {
        proptest::collection::vec(proptest::option::of((0u32..20, 0u32..8)), 0..300)
    }

    fn build(pages: &[Option<(u32, u32)>]) -> MapBlock {
        let mut block = MapBlock::default();
        for page in pages {
            match page {
                None => block.push_zero(1),
                Some((n, slot)) => block.push(chunk(*n), *slot, 1),
            }
        }
        block
    }

    proptest! {
        #[test]
        fn a_block_comes_back_and_finds_every_page(pages in model()) {
            let block = build(&pages);
            let decoded = MapBlock::decode(&block.encode()).unwrap();
            prop_assert_eq!(&decoded, &block);
            prop_assert_eq!(decoded.page_count() as usize, pages.len());
            for (page, expected) in (0u32..).zip(&pages) {
                let [extent] = decoded.overlapping(page, page + 1) else { panic!("one extent a page") };
                let found = match extent.source {
                    PageSource::Zero => None,
                    PageSource::Chunk { chunk, slot } => Some((chunk.position, slot + page - extent.first)),
                };
                prop_assert_eq!(found, *expected);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = MapBlock::decode(&bytes);
        }

        #[test]
        fn damaged_blocks_never_panic(pages in model(), at: usize, flip in 1u8..) {
            let mut bytes = build(&pages).encode();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let _ = MapBlock::decode(&bytes);
        }
    }
}
