//! Pages into a run: each compared with what is known of it, the changed ones gathered into chunks of eight.
//!
//! ```text
//! buffer ─ CRC ─ for each page: hash ─ as before? ─ named where it stands
//!                                     └ all zero?  ─ nowhere
//!                                     └ else       ─ gathered ─ eight: compressed
//! ```
//! CRC, hash and compression see the same buffer: a page that is torn while it is read is stored exactly as it was
//! summed up, its hash is that of what is stored, and replay mends it. A page that stands in a pack which is written
//! again is gathered though it has not changed. Whoever has pages in a buffer comes here, wherever it read them.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::backup::error::Error;
use crate::backup::source_file::FileState;
use crate::backup::state::{HashKey, KnownBlock, PageHash};
use crate::codec::{Compression, Compressor};
use crate::pg::Crc32c;
use crate::repo::{
    self, CompressedFrame, PackId,
    chunk::ChunkRef,
    page_map::{PAGE_SIZE, PageSource},
};

/// Pages gathered in one chunk.
pub const CHUNK_PAGES: usize = 8;
const PAGE: usize = PAGE_SIZE as usize;

/// How pages are compared and gathered.
#[derive(Debug, Clone)]
pub struct GatherOptions {
    /// How chunks are compressed.
    pub compression: Compression,
    /// What hashes are keyed with; none where nobody will compare with them.
    pub hash_key: Option<HashKey>,
    /// What is stored again though it has not changed.
    pub again: Again,
}

/// What is stored again though it has not changed.
#[derive(Debug, Clone, Default)]
pub enum Again {
    /// What stands nowhere else any more: nothing.
    #[default]
    Nothing,
    /// What stands in these packs.
    Packs(Arc<BTreeSet<PackId>>),
    /// All of it.
    Everything,
}

/// What became of a run of pages.
#[derive(Debug, Default)]
pub struct PageRun {
    /// What the file was when it was opened; none where it had vanished.
    pub state: Option<FileState>,
    /// Bytes that were read; fewer than asked for where the file ends.
    pub bytes: u64,
    /// CRC of them.
    pub crc: Crc32c,
    /// The pages in order: where each stands.
    pub pages: Vec<PagePlace>,
    /// The hash of each page; empty without a key.
    pub hashes: Vec<PageHash>,
    /// The new chunks they stand in.
    pub frames: Vec<CompressedFrame>,
    /// Pages that are not what was known of them.
    pub changed: u64,
    /// Pages that are, and are stored again all the same.
    pub stored_again: u64,
    /// Blocks whose checksum is wrong.
    pub damaged: Vec<u32>,
}

/// Where a page of a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagePlace {
    /// Nowhere: it is all zero.
    Zero,
    /// In this new chunk of the run, at this slot.
    Chunk { frame: usize, slot: u32 },
    /// Where an earlier basebackup stored it.
    Known { chunk: ChunkRef, slot: u32 },
}

/// What is known of a run of pages, which lies within one block of what is known.
#[derive(Debug, Clone, Copy)]
pub struct KnownPages<'a> {
    /// The block.
    pub block: &'a KnownBlock,
    /// The first page of the run in it.
    pub first: u32,
}

/// Takes pages, buffer by buffer, and makes one run of them.
#[derive(Debug)]
pub struct PageGatherer<'a> {
    options: &'a GatherOptions,
    gathered: Vec<u8>,
    run: PageRun,
}

/// Makes one run of the pages of `raw`, of which only the last may be short; `known` is what was known of them.
pub fn gather_pages(
    raw: &[u8],
    known: Option<KnownPages<'_>>,
    options: &GatherOptions,
) -> Result<PageRun, Error> {
    let mut gatherer = PageGatherer::new(options);
    gatherer.push(raw, known)?;
    gatherer.finish()
}

impl Again {
    /// Returns whether what stands in `pack` is stored again.
    pub fn includes(&self, pack: PackId) -> bool {
        match self {
            Self::Nothing => false,
            Self::Packs(packs) => packs.contains(&pack),
            Self::Everything => true,
        }
    }
}

impl<'a> PageGatherer<'a> {
    /// Starts a run.
    pub fn new(options: &'a GatherOptions) -> Self {
        Self { options, gathered: Vec::new(), run: PageRun::default() }
    }

    /// Takes the next pages of the run; only the very last one may be short.
    pub fn push(&mut self, raw: &[u8], known: Option<KnownPages<'_>>) -> Result<(), Error> {
        self.run.crc = self.run.crc.then(Crc32c::of(raw), raw.len() as u64);
        self.run.bytes += raw.len() as u64;
        for (n, page) in (0u32..).zip(raw.chunks(PAGE)) {
            let before = known.and_then(|known| known.page(n));
            let place = match (before, self.hash(page)) {
                (Some((hash, source)), Some(now)) if hash == now => self.place_known(page, source)?,
                _ => {
                    self.run.changed += 1;
                    self.place_changed(page)?
                }
            };
            self.run.pages.push(place);
        }
        Ok(())
    }

    /// Compresses what is left and returns the run.
    pub fn finish(mut self) -> Result<PageRun, Error> {
        self.close_chunk()?;
        Ok(self.run)
    }

    fn hash(&mut self, page: &[u8]) -> Option<PageHash> {
        let hash = self.options.hash_key.as_ref()?.hash(page);
        self.run.hashes.push(hash);
        Some(hash)
    }

    fn place_known(&mut self, page: &[u8], source: PageSource) -> Result<PagePlace, Error> {
        match source {
            PageSource::Zero => Ok(PagePlace::Zero),
            PageSource::Chunk { chunk, .. } if self.options.again.includes(chunk.pack) => {
                self.run.stored_again += 1;
                self.gather(page)
            }
            PageSource::Chunk { chunk, slot } => Ok(PagePlace::Known { chunk, slot }),
        }
    }

    fn place_changed(&mut self, page: &[u8]) -> Result<PagePlace, Error> {
        if is_zero(page) { Ok(PagePlace::Zero) } else { self.gather(page) }
    }

    fn gather(&mut self, page: &[u8]) -> Result<PagePlace, Error> {
        let place =
            PagePlace::Chunk { frame: self.run.frames.len(), slot: (self.gathered.len() / PAGE) as u32 };
        self.gathered.extend_from_slice(page);
        if self.gathered.len() == CHUNK_PAGES * PAGE {
            self.close_chunk()?;
        }
        Ok(place)
    }

    fn close_chunk(&mut self) -> Result<(), Error> {
        if !self.gathered.is_empty() {
            self.run.frames.push(compress(&self.gathered, self.options.compression)?);
            self.gathered.clear();
        }
        Ok(())
    }
}

impl KnownPages<'_> {
    /// Returns the hash of page `n` of the run and where it stands; nothing behind the end of what is known.
    fn page(&self, n: u32) -> Option<(PageHash, PageSource)> {
        let page = self.first.checked_add(n)?;
        let hash = *self.block.hashes.get(page as usize)?;
        let [extent, ..] = self.block.map.overlapping(page, page.checked_add(1)?) else {
            return None;
        };
        let source = match extent.source {
            PageSource::Zero => PageSource::Zero,
            PageSource::Chunk { chunk, slot } => {
                PageSource::Chunk { chunk, slot: slot + (page - extent.first) }
            }
        };
        Some((hash, source))
    }
}

impl PageRun {
    /// Returns whether every page stands where it stood.
    pub fn is_unchanged(&self) -> bool {
        self.changed == 0 && self.stored_again == 0
    }
}

/// Compresses a chunk with this thread's compressor.
pub fn compress(raw: &[u8], compression: Compression) -> Result<CompressedFrame, repo::Error> {
    Compressor::on_this_thread(compression, |compressor| CompressedFrame::compress(compressor, raw))
}

/// Tells whether all bytes are zero, a word at a time.
fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use crate::codec::{CodecId, SeededRandom};
    use crate::repo::BasebackupId;

    use super::*;

    fn options(again: Again) -> GatherOptions {
        let hash_key = Some(HashKey::generate(&SeededRandom::new(1)));
        GatherOptions { compression: Compression::NONE, hash_key, again }
    }

    fn gather(raw: &[u8], known: Option<KnownPages<'_>>, options: &GatherOptions) -> PageRun {
        let mut gatherer = PageGatherer::new(options);
        let half = raw.len() / 2 / PAGE * PAGE;
        gatherer.push(&raw[..half], known).unwrap();
        let behind = known.map(|known| KnownPages { first: known.first + (half / PAGE) as u32, ..known });
        gatherer.push(&raw[half..], behind).unwrap();
        gatherer.finish().unwrap()
    }

    fn chunk(position: u32) -> ChunkRef {
        let origin = BasebackupId::from_parts(7, 7).unwrap();
        ChunkRef {
            pack: PackId { origin, number: position / 2 },
            position,
            offset: 100 * position,
            stored_len: 100,
            raw_len: 8 * PAGE as u32,
            codec: CodecId::Zstd,
            tag: None,
        }
    }

    /// Pages that differ from each other; those of `zeros` are all zero.
    fn pages(count: usize, zeros: &[usize]) -> Vec<u8> {
        let mut raw = vec![0; count * PAGE];
        for page in (0..count).filter(|page| !zeros.contains(page)) {
            raw[page * PAGE + 50] = page as u8 + 1;
        }
        raw
    }

    /// What a basebackup knows that stored `raw` in chunks of eight, with what is not all zero.
    fn known(raw: &[u8], options: &GatherOptions) -> KnownBlock {
        let mut block = KnownBlock::default();
        for (place, hash) in gather(raw, None, options).pages.iter().zip(gather(raw, None, options).hashes) {
            match place {
                PagePlace::Zero => block.map.push_zero(1),
                PagePlace::Chunk { frame, slot } => block.map.push(chunk(*frame as u32), *slot, 1),
                PagePlace::Known { .. } => panic!("nothing was known"),
            }
            block.hashes.push(hash);
        }
        block
    }

    #[test]
    fn zero_pages_take_no_chunk_and_the_others_are_gathered_in_order() {
        let mut raw = vec![0; 20 * PAGE + 100];
        for page in [0, 1, 2, 5, 6, 7, 9, 11, 12, 20] {
            raw[page * PAGE + 50] = page as u8 + 1;
        }
        let run = gather(&raw, None, &options(Again::Nothing));
        assert_eq!(run.frames.len(), 2);
        assert_eq!((run.pages.len(), run.hashes.len(), run.changed), (21, 21, 21));
        assert_eq!(run.pages[3], PagePlace::Zero);
        assert_eq!(run.pages[5], PagePlace::Chunk { frame: 0, slot: 3 });
        assert_eq!(run.pages[12], PagePlace::Chunk { frame: 1, slot: 0 });
        assert_eq!(run.pages[20], PagePlace::Chunk { frame: 1, slot: 1 });
        assert_eq!(run.frames[1].body.len(), PAGE + 100);
        assert_eq!(run.frames[1].body[PAGE + 50], 21);
        assert_eq!((run.bytes, run.crc), (raw.len() as u64, Crc32c::of(&raw)));
    }

    #[test]
    fn a_page_as_it_was_is_named_where_it_stands_and_the_others_are_gathered() {
        let options = options(Again::Nothing);
        let before = pages(30, &[4, 5, 20]);
        let known = known(&before, &options);
        let all = Some(KnownPages { block: &known, first: 0 });
        let unchanged = gather(&before, all, &options);
        assert!(unchanged.is_unchanged() && unchanged.frames.is_empty());
        assert_eq!(unchanged.pages[6], PagePlace::Known { chunk: chunk(0), slot: 4 });
        assert_eq!(unchanged.pages[4], PagePlace::Zero);

        // One page changed, one became zero, one is no longer, two are new behind the end of what is known.
        let mut now = [before.clone(), pages(2, &[])].concat();
        now[3 * PAGE] = 9;
        now[10 * PAGE..11 * PAGE].fill(0);
        now[20 * PAGE] = 7;
        let run = gather(&now, all, &options);
        assert_eq!((run.changed, run.stored_again, run.frames.len()), (5, 0, 1));
        assert_eq!(run.pages[3], PagePlace::Chunk { frame: 0, slot: 0 });
        assert_eq!(run.pages[10], PagePlace::Zero);
        assert_eq!(run.pages[20], PagePlace::Chunk { frame: 0, slot: 1 });
        assert_eq!(run.pages[31], PagePlace::Chunk { frame: 0, slot: 3 });
        assert!(matches!(run.pages[29], PagePlace::Known { .. }));
    }

    #[test]
    fn a_page_is_compared_with_the_one_that_stood_at_its_place() {
        let options = options(Again::Nothing);
        let before = pages(30, &[]);
        let known = known(&before, &options);
        let part = Some(KnownPages { block: &known, first: 10 });
        assert!(gather(&before[10 * PAGE..20 * PAGE], part, &options).is_unchanged());
        assert_eq!(gather(&before[9 * PAGE..19 * PAGE], part, &options).changed, 10);
        // A short last page is another one than the same bytes with zeros behind them.
        let cut = &before[10 * PAGE..20 * PAGE - 100];
        assert_eq!(gather(cut, part, &options).changed, 1);
    }

    #[test]
    fn what_stands_in_a_pack_that_is_written_again_is_gathered() {
        let before = pages(30, &[4]);
        let known = known(&before, &options(Again::Nothing));
        let all = Some(KnownPages { block: &known, first: 0 });
        let packs = Arc::new(BTreeSet::from([chunk(0).pack]));
        let run = gather(&before, all, &options(Again::Packs(packs)));
        // Chunks 0 and 1 hold sixteen pages, and one zero page stands nowhere.
        assert_eq!((run.changed, run.stored_again, run.frames.len()), (0, 16, 2));
        assert!(!run.is_unchanged());
        let run = gather(&before, all, &options(Again::Everything));
        assert_eq!((run.stored_again, run.pages[4]), (29, PagePlace::Zero));
    }

    #[test]
    fn without_a_key_nothing_is_hashed_and_nothing_reused() {
        let keyed = options(Again::Nothing);
        let before = pages(3, &[]);
        let known = known(&before, &keyed);
        let all = Some(KnownPages { block: &known, first: 0 });
        let run = gather(&before, all, &GatherOptions { hash_key: None, ..keyed });
        assert_eq!((run.changed, run.hashes.len(), run.frames.len()), (3, 0, 1));
    }
}
