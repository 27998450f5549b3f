//! The file table, cut into batches; page maps that stand in chunks of their own are fetched on the way.
//!
//! One pass over all entries, in order; a batch may end in the middle of a block of the table.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{BlobRef, Content, Entry, Node};
use crate::repo::page_map::MapBlock;
use crate::repo::{self, BLOCKS_AHEAD, Basebackup, FrameKind, PackId, plan_runs};
use crate::restore::Error;
use crate::restore::batch::{Batch, BatchBuilder};

/// What becomes of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FileFate {
    /// It is not written: it is there, or has no place.
    Skip,
    /// It is written anew.
    Write(PathBuf),
    /// What differs of it is written.
    Mend(PathBuf),
}

/// Cuts the files of a basebackup into batches.
pub(super) struct Batches<F> {
    basebackup: Arc<Basebackup>,
    fate: F,
    transfers: usize,
    block: usize,
    entry: usize,
}

/// Map blocks that are held at a time, each at most a few hundred KiB.
const MAP_BLOCKS_MAX: usize = 128;

/// Opened chunks by pack and position.
pub(super) type RawChunks = HashMap<(PackId, u32), Vec<u8>>;

impl<F: FnMut(u64, &Entry) -> Result<FileFate, Error>> Batches<F> {
    /// Starts at the beginning; `fate` is asked about each file.
    pub(super) fn new(basebackup: Arc<Basebackup>, transfers: usize, fate: F) -> Self {
        Self { basebackup, fate, transfers, block: 0, entry: 0 }
    }

    /// Returns the next batch, or nothing at the end.
    pub(super) async fn next(&mut self) -> Result<Option<Batch>, Error> {
        if self.block >= self.basebackup.block_count() {
            return Ok(None);
        }
        let mut builder = BatchBuilder::default();
        while self.block < self.basebackup.block_count() && !builder.is_full() {
            if self.entry == 0 && self.block.is_multiple_of(BLOCKS_AHEAD) {
                let to = (self.block + BLOCKS_AHEAD).min(self.basebackup.block_count());
                self.basebackup.load_blocks(self.block..to).await?;
            }
            let entries = self.basebackup.block(self.block).await?;
            let first = self.basebackup.start().blocks[self.block].first_number;
            self.add_some(&entries, first, &mut builder).await?;
            if self.entry == entries.len() {
                (self.block, self.entry) = (self.block + 1, 0);
            }
        }
        Ok(Some(builder.finish()))
    }

    /// Adds files of one table block, until their page maps are many enough to be fetched.
    async fn add_some(
        &mut self,
        entries: &[Entry],
        first: u64,
        builder: &mut BatchBuilder,
    ) -> Result<(), Error> {
        let mut files: Vec<(u64, &Entry, PathBuf, bool)> = Vec::new();
        let mut blobs: Vec<&BlobRef> = Vec::new();
        while self.entry < entries.len() && blobs.len() < MAP_BLOCKS_MAX {
            let (number, entry) = (first + self.entry as u64, &entries[self.entry]);
            self.entry += 1;
            let Node::File { content, .. } = &entry.node else { continue };
            let (path, in_place) = match (self.fate)(number, entry)? {
                FileFate::Skip => continue,
                FileFate::Write(path) => (path, false),
                FileFate::Mend(path) => (path, true),
            };
            if let Content::Blocks(found) = content {
                blobs.extend(found);
            }
            files.push((number, entry, path, in_place));
        }
        let raw = fetch_maps(&self.basebackup, self.transfers, &blobs).await?;
        for (number, entry, path, in_place) in files {
            let blocks = match &entry.node {
                Node::File { content: Content::Blocks(blobs), .. } => {
                    blobs.iter().map(|blob| map_block(blob, &raw, entry)).collect::<Result<_, _>>()?
                }
                _ => Vec::new(),
            };
            builder.add(number, path, entry, &blocks, in_place);
        }
        Ok(())
    }
}

/// Fetches and opens the chunks that blocks of page maps are in.
pub(super) async fn fetch_maps(
    basebackup: &Basebackup,
    transfers: usize,
    blobs: &[&BlobRef],
) -> Result<RawChunks, Error> {
    let mut chunks: Vec<ChunkRef> = blobs.iter().map(|blob| blob.chunk).collect();
    chunks.sort_unstable_by_key(|chunk| (chunk.pack, chunk.offset));
    chunks.dedup_by_key(|chunk| (chunk.pack, chunk.position));
    let runs = plan_runs(&chunks);
    let chunks = &chunks;
    let fetched = futures::stream::iter(runs.into_iter().map(|run| async move {
        let stored = basebackup.fetch_run(&run).await?;
        let open = |chunk: &ChunkRef| {
            Ok::<_, repo::Error>(((chunk.pack, chunk.position), stored.open(FrameKind::Map, chunk)?))
        };
        chunks[run.chunks].iter().map(open).collect::<Result<Vec<_>, _>>()
    }))
    .buffer_unordered(transfers.max(1));
    let opened: Vec<_> = fetched.try_collect().await?;
    Ok(opened.into_iter().flatten().collect())
}

/// Reads a block of a page map out of its chunk.
pub(super) fn map_block(blob: &BlobRef, raw: &RawChunks, entry: &Entry) -> Result<MapBlock, Error> {
    let damaged = |detail: String| repo::Error::Damaged {
        object: format!("the page map of {} in {}", entry.path, blob.chunk.pack),
        detail,
    };
    let chunk = raw.get(&(blob.chunk.pack, blob.chunk.position));
    let bytes = chunk.and_then(|chunk| chunk.get(blob.at as usize..blob.at as usize + blob.len as usize));
    let bytes = bytes.ok_or_else(|| damaged("it is too short".to_owned()))?;
    Ok(MapBlock::decode(bytes).map_err(|error| damaged(error.to_string()))?)
}
