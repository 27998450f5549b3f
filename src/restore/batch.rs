//! What is written together: files, the chunks they are made of in the order of the packs, and which bytes go where.
//!
//! Every byte of a file is either zero, or inline, or stands in exactly one place; `left` counts those to come, so a
//! file is finished by whoever writes its last byte, and one that is not is noticed.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

use bytes::Bytes;
use jiff::Timestamp;

use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{Content, Entry, Node};
use crate::repo::page_map::{MAP_BLOCK_BYTES, MapBlock, PAGE_SIZE, PageSource};

/// A file to write.
#[derive(Debug)]
pub(super) struct FileTask {
    /// Its number in the file table.
    pub number: u64,
    /// Where it goes.
    pub path: PathBuf,
    /// Its size.
    pub size: u64,
    /// Its permission bits.
    pub mode: u32,
    /// Its time of modification.
    pub modified: Timestamp,
    /// Whether something is there whose equal pages stay.
    pub in_place: bool,
    /// Bytes that are still to be written from chunks.
    pub left: AtomicU64,
}

/// Bytes of a chunk and where they go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Which file of the batch.
    pub file: u32,
    /// First byte in the raw chunk.
    pub at: u32,
    /// Number of bytes.
    pub len: u32,
    /// First byte in the file.
    pub offset: u64,
}

/// A chunk to open.
#[derive(Debug)]
pub(super) struct ChunkTask {
    /// The chunk.
    pub chunk: ChunkRef,
    /// Its places among those of the batch.
    pub places: Range<usize>,
}

/// Files that are written together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The files.
    pub files: Vec<FileTask>,
    /// The chunks, ascending by pack and offset.
    pub chunks: Vec<ChunkTask>,
    /// Where their bytes go.
    pub places: Vec<Place>,
    /// Files whose content is at hand: by number in the batch.
    pub inline: Vec<(usize, Bytes)>,
    /// Zeros of files that are in place: number in the batch, bytes.
    pub holes: Vec<(usize, Range<u64>)>,
}

/// Collects a batch.
#[derive(Debug, Default)]
pub(super) struct BatchBuilder {
    batch: Batch,
    found: Vec<(ChunkRef, Place)>,
}

/// Places and files of a batch, which bound its memory to about 100 MiB; as many as 32 GiB in a row have.
const PLACES_MAX: usize = 1 << 19;
const FILES_MAX: usize = 1 << 17;

impl BatchBuilder {
    /// Returns whether the batch is large enough.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= PLACES_MAX || self.batch.files.len() >= FILES_MAX
    }

    /// Adds a file; `blocks` are the blocks of its page map where they stand in chunks of their own.
    pub(super) fn add(
        &mut self,
        number: u64,
        path: PathBuf,
        entry: &Entry,
        blocks: &[MapBlock],
        in_place: bool,
    ) {
        let Node::File { size, content } = &entry.node else { return };
        let file = self.batch.files.len();
        let (mode, modified) = (entry.mode, entry.modified);
        let left = AtomicU64::new(0);
        self.batch.files.push(FileTask { number, path, size: *size, mode, modified, in_place, left });
        match content {
            Content::Inline(bytes) => self.batch.inline.push((file, bytes.clone())),
            Content::Part(blob) => {
                self.push(blob.chunk, Place { file: file as u32, offset: 0, at: blob.at, len: blob.len });
            }
            Content::Map(block) => self.add_block(file, block, 0, *size),
            Content::Blocks(_) => {
                for (n, block) in (0..).zip(blocks) {
                    self.add_block(file, block, n * MAP_BLOCK_BYTES, *size);
                }
            }
        }
    }

    fn add_block(&mut self, file: usize, block: &MapBlock, base: u64, size: u64) {
        for extent in block.extents() {
            let offset = base + u64::from(extent.first) * PAGE_SIZE;
            let len = (u64::from(extent.count) * PAGE_SIZE).min(size.saturating_sub(offset));
            match &extent.source {
                PageSource::Chunk { chunk, slot } => {
                    let at = slot * PAGE_SIZE as u32;
                    self.push(*chunk, Place { file: file as u32, offset, at, len: len as u32 });
                }
                PageSource::Zero if self.batch.files[file].in_place => {
                    self.batch.holes.push((file, offset..offset + len));
                }
                PageSource::Zero => {}
            }
        }
    }

    fn push(&mut self, chunk: ChunkRef, place: Place) {
        *self.batch.files[place.file as usize].left.get_mut() += u64::from(place.len);
        self.found.push((chunk, place));
    }

    /// Returns the batch, its chunks in the order of the packs.
    pub(super) fn finish(self) -> Batch {
        let Self { mut batch, mut found } = self;
        found.sort_unstable_by_key(|(chunk, place)| {
            (chunk.pack, chunk.offset, chunk.position, place.file, place.offset)
        });
        for (n, (chunk, place)) in found.into_iter().enumerate() {
            batch.places.push(place);
            match batch.chunks.last_mut() {
                Some(last) if last.chunk.pack == chunk.pack && last.chunk.position == chunk.position => {
                    last.places.end = n + 1;
                }
                _ => batch.chunks.push(ChunkTask { chunk, places: n..n + 1 }),
            }
        }
        batch
    }
}
