//! What a fetch takes: zeros, and chunks with the places in the file that each of them fills.
//!
//! Pure. A chunk is planned once, however many of the wanted pages stand in it, and with everything of it that belongs
//! to the same block of the file: what is paid for is handed out. Chunks come out in the order of the packs, which is
//! the order in which neighbours can share a request.

use std::ops::Range;

use crate::repo::chunk::ChunkRef;
use crate::repo::entry::BlobRef;
use crate::repo::id::PackId;
use crate::repo::page_map::{MapBlock, PAGE_SIZE, PageSource};

/// A chunk, by its pack and its position there.
pub(crate) type ChunkKey = (PackId, u32);

/// A chunk that is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WantedChunk {
    /// The chunk.
    pub(crate) chunk: ChunkRef,
    /// Where its bytes go.
    pub(crate) places: Vec<Place>,
}

/// Bytes of a chunk and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// First byte in the file.
    pub(crate) offset: u64,
    /// First byte in the raw chunk.
    pub(crate) at: u32,
    /// Number of bytes.
    pub(crate) len: u32,
}

/// What one fetch takes.
#[derive(Debug, Default)]
pub(crate) struct FetchPlan {
    /// Bytes of the file that are zero and stand nowhere.
    pub(crate) zeros: Vec<Range<u64>>,
    /// Chunks, ascending by pack and offset once the plan is finished.
    pub(crate) chunks: Vec<WantedChunk>,
}

impl WantedChunk {
    /// Returns which chunk it is.
    pub(crate) fn key(&self) -> ChunkKey {
        (self.chunk.pack, self.chunk.position)
    }

    fn order(&self) -> (PackId, u32, u32) {
        order(&self.chunk)
    }
}

impl FetchPlan {
    /// Adds a chunk of which nothing is handed on: it is to be at hand.
    pub(crate) fn add_chunk(&mut self, chunk: ChunkRef) {
        self.chunks.push(WantedChunk { chunk, places: Vec::new() });
    }

    /// Adds a file that is one part of a chunk.
    pub(crate) fn add_blob(&mut self, blob: &BlobRef) {
        let place = Place { offset: 0, at: blob.at, len: blob.len };
        self.chunks.push(WantedChunk { chunk: blob.chunk, places: vec![place] });
    }

    /// Adds what covers `ranges` of the pages that `block` describes: those of a file of `size` bytes from `base` on.
    ///
    /// The ranges ascend and lie within the file; what of them is not of this block is left out.
    pub(crate) fn add_block(&mut self, block: &MapBlock, base: u64, size: u64, ranges: &[Range<u64>]) {
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for pages in pages_of(ranges, base, block.page_count()) {
            for extent in block.overlapping(pages.start, pages.end) {
                match &extent.source {
                    PageSource::Zero => {
                        let from = extent.first.max(pages.start);
                        let to = (extent.first + extent.count).min(pages.end);
                        let zeros = base + u64::from(from) * PAGE_SIZE..base + u64::from(to) * PAGE_SIZE;
                        self.add_zeros(zeros.start..zeros.end.min(size));
                    }
                    PageSource::Chunk { chunk, .. } => chunks.push(*chunk),
                }
            }
        }
        chunks.sort_unstable_by_key(order);
        chunks.dedup_by_key(|chunk| (chunk.pack, chunk.position));
        let mut wanted: Vec<WantedChunk> =
            chunks.into_iter().map(|chunk| WantedChunk { chunk, places: Vec::new() }).collect();
        for extent in block.extents() {
            let PageSource::Chunk { chunk, slot } = &extent.source else { continue };
            let Ok(n) = wanted.binary_search_by_key(&order(chunk), WantedChunk::order) else { continue };
            let offset = base + u64::from(extent.first) * PAGE_SIZE;
            let len = (u64::from(extent.count) * PAGE_SIZE).min(size.saturating_sub(offset));
            if len > 0 {
                // Both fit: the slots of a chunk end within it, and no chunk is larger than a mebibyte.
                let (at, len) = (slot * PAGE_SIZE as u32, len as u32);
                wanted[n].places.push(Place { offset, at, len });
            }
        }
        self.chunks.append(&mut wanted);
    }

    /// Puts the chunks in order, each once.
    pub(crate) fn finish(mut self) -> Self {
        self.chunks.sort_by_key(WantedChunk::order);
        self.chunks.dedup_by(|next, kept| {
            let is_same = next.key() == kept.key();
            if is_same {
                kept.places.append(&mut next.places);
            }
            is_same
        });
        self
    }

    fn add_zeros(&mut self, zeros: Range<u64>) {
        match self.zeros.last_mut() {
            Some(last) if last.end == zeros.start => last.end = zeros.end,
            _ if zeros.is_empty() => {}
            _ => self.zeros.push(zeros),
        }
    }
}

fn order(chunk: &ChunkRef) -> (PackId, u32, u32) {
    (chunk.pack, chunk.offset, chunk.position)
}

/// Returns the pages of a block of `count` pages, which begins at `base`, that hold any of `ranges`; none twice.
fn pages_of(ranges: &[Range<u64>], base: u64, count: u32) -> Vec<Range<u32>> {
    let block_end = base + u64::from(count) * PAGE_SIZE;
    let mut pages: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        let (start, end) = (range.start.max(base), range.end.min(block_end));
        if start >= end {
            continue;
        }
        let first = ((start - base) / PAGE_SIZE) as u32;
        let end = (end - base).div_ceil(PAGE_SIZE) as u32;
        match pages.last_mut() {
            Some(last) if first <= last.end => last.end = last.end.max(end),
            _ => pages.push(first..end),
        }
    }
    pages
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use crate::codec::CodecId;
    use crate::repo::id::BasebackupId;

    use super::*;

    const SLOTS: u32 = 8;

    fn chunk(n: u32) -> ChunkRef {
        ChunkRef {
            pack: PackId { origin: BasebackupId::from_parts(1, 2).unwrap(), number: n % 3 },
            position: n,
            offset: n * 100,
            stored_len: 100,
            raw_len: SLOTS * PAGE_SIZE as u32,
            codec: CodecId::Zstd,
            tag: None,
        }
    }

    /// For each page of a file its chunk and slot, or nothing for a zero page.
    type Pages = Vec<Option<(u32, u32)>>;

    fn block_of(pages: &[Option<(u32, u32)>]) -> MapBlock {
        let mut block = MapBlock::default();
        for page in pages {
            match page {
                None => block.push_zero(1),
                Some((n, slot)) => block.push(chunk(*n), *slot, 1),
            }
        }
        block
    }

    fn pages() -> impl Strategy<Value = Pages> {
        proptest::collection::vec(proptest::option::of((0u32..12, 0..SLOTS)), 1..100)
    }

    fn ranges(within: u64) -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((0u64..60_000, 1u64..60_000), 0..8).prop_map(move |steps| {
            let mut at = 0;
            let mut ranges = Vec::new();
            for (gap, length) in steps {
                let range = (at + gap).min(within)..(at + gap + length).min(within);
                at = range.end;
                if !range.is_empty() {
                    ranges.push(range);
                }
            }
            ranges
        })
    }

    /// Says of each page of the file whether the plan brings it, and from where; a page brought twice is an error.
    fn brought(plan: &FetchPlan, size: u64) -> BTreeMap<u64, Option<(u32, u32)>> {
        let mut brought = BTreeMap::new();
        let mut bring = |offset: u64, source: Option<(u32, u32)>| {
            assert_eq!(offset % PAGE_SIZE, 0);
            assert!(brought.insert(offset / PAGE_SIZE, source).is_none(), "twice: {offset}");
        };
        for zeros in &plan.zeros {
            assert!(zeros.end == size || zeros.end % PAGE_SIZE == 0);
            for offset in zeros.clone().step_by(PAGE_SIZE as usize) {
                bring(offset, None);
            }
        }
        for WantedChunk { chunk, places } in &plan.chunks {
            assert!(!places.is_empty());
            for place in places {
                let end = place.offset + u64::from(place.len);
                assert!(end == size || end % PAGE_SIZE == 0);
                for n in 0..u64::from(place.len).div_ceil(PAGE_SIZE) {
                    let slot = place.at / PAGE_SIZE as u32 + n as u32;
                    bring(place.offset + n * PAGE_SIZE, Some((chunk.position, slot)));
                }
            }
        }
        brought
    }

    proptest! {
        #[test]
        fn what_was_asked_for_comes_once_and_with_it_all_of_each_chunk_that_has_any_of_it(
            (pages, asked) in pages().prop_flat_map(|pages| {
                let size = pages.len() as u64 * PAGE_SIZE;
                (Just(pages), ranges(size))
            }),
            cut in 0..PAGE_SIZE,
            split in 0usize..100,
        ) {
            let size = pages.len() as u64 * PAGE_SIZE - cut;
            let asked: Vec<Range<u64>> =
                asked.into_iter().map(|range| range.start..range.end.min(size)).filter(|r| !r.is_empty()).collect();
            // The map in two blocks, as that of a file of more than 128 MiB is in several.
            let split = split.min(pages.len());
            let mut plan = FetchPlan::default();
            let first = &pages[..split];
            plan.add_block(&block_of(first), 0, size, &asked);
            plan.add_block(&block_of(&pages[split..]), split as u64 * PAGE_SIZE, size, &asked);
            let plan = plan.finish();
            prop_assert!(plan.chunks.windows(2).all(|pair| pair[0].order() < pair[1].order()));

            let is_asked = |page: u64| {
                asked.iter().any(|range| range.start < (page + 1) * PAGE_SIZE && page * PAGE_SIZE < range.end)
            };
            let mut expected = BTreeMap::new();
            for (offset, part) in [(0, first), (split, &pages[split..])] {
                let numbered = || (offset as u64..).zip(part);
                let wanted: Vec<u32> =
                    numbered().filter(|(n, _)| is_asked(*n)).filter_map(|(_, page)| page.map(|(c, _)| c)).collect();
                for (n, page) in numbered() {
                    if page.map_or(is_asked(n), |(chunk, _)| wanted.contains(&chunk)) {
                        expected.insert(n, *page);
                    }
                }
            }
            prop_assert_eq!(brought(&plan, size), expected);
        }
    }

    #[test]
    fn a_small_file_is_one_part_of_one_chunk() {
        let mut plan = FetchPlan::default();
        plan.add_blob(&BlobRef { chunk: chunk(4), at: 300, len: 77 });
        let plan = plan.finish();
        let places = vec![Place { offset: 0, at: 300, len: 77 }];
        assert_eq!((plan.chunks, plan.zeros), (vec![WantedChunk { chunk: chunk(4), places }], Vec::new()));
    }
}
