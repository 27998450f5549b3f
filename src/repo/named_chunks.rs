//! Which chunks a basebackup names, a bit for each, so that packs can be listed with their live bytes.
//!
//! A terabyte has sixteen million chunks; a set of them would not fit, twelve thousand small bitmaps do.

use std::collections::BTreeMap;

use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{Content, Node};
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::page_map::{MapBlock, PageSource};

/// The chunks that have been named so far.
#[derive(Debug, Default)]
pub struct NamedChunks {
    packs: BTreeMap<PackId, NamedInPack>,
}

#[derive(Debug, Default)]
struct NamedInPack {
    positions: Vec<u64>,
    bytes: u32,
}

impl NamedChunks {
    /// Names a chunk; naming it again changes nothing.
    pub fn name(&mut self, chunk: &ChunkRef) {
        let pack = self.packs.entry(chunk.pack).or_default();
        let (word, bit) = (chunk.position as usize / 64, 1u64 << (chunk.position % 64));
        if pack.positions.len() <= word {
            pack.positions.resize(word + 1, 0);
        }
        if pack.positions[word] & bit == 0 {
            pack.positions[word] |= bit;
            pack.bytes += chunk.stored_len;
        }
    }

    /// Names every chunk of a map block.
    pub fn name_block(&mut self, block: &MapBlock) {
        for extent in block.extents() {
            if let PageSource::Chunk { chunk, .. } = &extent.source {
                self.name(chunk);
            }
        }
    }

    /// Names every chunk that an entry names itself.
    pub fn name_content(&mut self, node: &Node) {
        let Node::File { content, .. } = node else {
            return;
        };
        match content {
            Content::Inline(_) => {}
            Content::Part(blob) => self.name(&blob.chunk),
            Content::Map(block) => self.name_block(block),
            Content::Blocks(blobs) => blobs.iter().for_each(|blob| self.name(&blob.chunk)),
        }
    }

    /// Returns the stored bytes of `pack` that are named.
    pub fn live_bytes(&self, pack: PackId) -> u32 {
        self.packs.get(&pack).map_or(0, |pack| pack.bytes)
    }

    /// Returns how many chunks of other packs than those of `own` are named.
    pub fn chunks_not_of(&self, own: BasebackupId) -> u64 {
        let others = self.packs.iter().filter(|(pack, _)| pack.origin != own);
        others.flat_map(|(_, named)| &named.positions).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Returns the packs of which anything is named.
    pub fn packs(&self) -> impl Iterator<Item = PackId> {
        self.packs.keys().copied()
    }
}
