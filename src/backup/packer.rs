//! The ordered end of the pipeline: chunks are sealed into packs in planned order, full packs are uploaded.
//!
//! One task owns the pack under construction, because a chunk's position in it is its nonce. Memory is bounded by
//! the number of uploads: a full pack waits for a free one, and nothing is read meanwhile. The start-up set's chunks
//! and the maps of its files stand in the first packs, and their ranges are noted.

use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::read_pages::{JOB_BYTES, PagePlace, PageRun, compress_pages};
use crate::backup::read_small::{INLINE_BYTES, SmallFiles, SmallPlace};
use crate::backup::source_file::FileState;
use crate::codec::{Compression, Compressor};
use crate::pg::Crc32c;
use crate::repo::{
    self, BasebackupWriter, CompressedFrame, FileMap, FrameKind, MapWriter, NamedChunks, PackBuilder,
    chunk::ChunkRef,
    documents::SizeRecord,
    entry::{BlobRef, Content, Entry, INLINE_BYTES_MAX, Node, TreePath},
    manifest::PackRange,
    page_map::PAGE_SIZE,
};

/// Puts what was read into packs, in order.
pub struct Packer {
    writer: Arc<BasebackupWriter>,
    pack: PackBuilder,
    compressor: Compressor,
    compression: Compression,
    maps: MapWriter,
    uploads: JoinSet<Result<(), repo::Error>>,
    uploads_max: usize,
    open: Option<OpenEntry>,
    in_start_set: bool,
    packed: Packed,
}

/// What has been packed.
#[derive(Debug, Default)]
pub struct Packed {
    /// Files, their contents filled in at the end.
    pub entries: Vec<Entry>,
    /// CRC of each of `entries`, which have the same order.
    pub checksums: Vec<Crc32c>,
    /// Where the start-up set lies.
    pub start_set: Vec<PackRange>,
    /// Files and their bytes, damaged pages.
    pub size: SizeRecord,
    /// Files that had vanished when they were to be read.
    pub vanished: u64,
    /// Files that were shorter than the walk had seen them.
    pub shrunk: u64,
}

/// A file of which some pages have been packed.
#[derive(Debug)]
struct OpenEntry {
    number: usize,
    state: Option<FileState>,
    map: FileMap,
    bytes: u64,
    crc: Crc32c,
    ended: bool,
}

impl Packer {
    /// Creates a packer that uploads at most `uploads_max` packs at a time.
    pub fn new(writer: Arc<BasebackupWriter>, compression: Compression, uploads_max: usize) -> Self {
        let pack = writer.create_pack();
        Self {
            writer,
            pack,
            compressor: Compressor::new(compression),
            compression,
            maps: MapWriter::default(),
            uploads: JoinSet::new(),
            uploads_max: uploads_max.max(1),
            open: None,
            in_start_set: true,
            packed: Packed::default(),
        }
    }

    /// Packs small files.
    pub async fn push_small(&mut self, together: SmallFiles, files: &[SourceFile]) -> Result<(), Error> {
        let chunks = self.append_all(together.frames).await?;
        for small in together.files {
            let file = &files[small.number];
            self.packed.shrunk += u64::from(u64::from(small.len) < file.size);
            self.note_damage(file, &small.damaged);
            let content = match small.place {
                SmallPlace::Inline(bytes) => Content::Inline(bytes),
                SmallPlace::Chunk { frame, at } => {
                    Content::Part(BlobRef { chunk: chunks[frame], at, len: small.len })
                }
            };
            self.push_file(file.path.clone(), small.state, u64::from(small.len), small.crc, content);
        }
        self.packed.vanished += together.vanished;
        Ok(())
    }

    /// Packs the next run of pages of a file, `expected` bytes unless the file has become shorter.
    pub async fn push_pages(
        &mut self,
        number: usize,
        file: &SourceFile,
        run: PageRun,
        expected: u64,
    ) -> Result<(), Error> {
        self.note_damage(file, &run.damaged);
        let mut open = self.open.take().unwrap_or_else(|| OpenEntry {
            number,
            state: run.state,
            map: FileMap::default(),
            bytes: 0,
            crc: Crc32c::default(),
            ended: false,
        });
        debug_assert_eq!(open.number, number, "the pages of two files are interleaved");
        // A file that was truncated and has grown again since: what came behind the gap is in the WAL.
        if !open.ended {
            open.ended = run.bytes < expected;
            self.append_run(&mut open, run).await?;
        }
        self.open = Some(open);
        Ok(())
    }

    /// Ends the file whose pages were packed last.
    pub fn end_file(&mut self, file: &SourceFile) {
        let Some(open) = self.open.take() else {
            return;
        };
        let Some(state) = open.state else {
            self.packed.vanished += 1;
            return;
        };
        self.packed.shrunk += u64::from(open.bytes < file.size);
        self.push_mapped(file.path.clone(), state, open);
    }

    /// Adds a file that is in memory.
    pub async fn push_bytes(&mut self, path: TreePath, state: FileState, raw: Bytes) -> Result<(), Error> {
        let (len, crc) = (raw.len() as u64, Crc32c::of(&raw));
        let is_control_file = path.as_bytes() == b"data/global/pg_control";
        if raw.len() <= INLINE_BYTES || (is_control_file && raw.len() <= INLINE_BYTES_MAX) {
            self.push_file(path, state, len, crc, Content::Inline(raw));
            return Ok(());
        }
        let (map, ended) = (FileMap::default(), false);
        let mut open = OpenEntry { number: 0, state: None, map, bytes: 0, crc: Crc32c::default(), ended };
        for part in raw.chunks(JOB_BYTES as usize) {
            self.append_run(&mut open, compress_pages(part, self.compression)?).await?;
        }
        self.push_mapped(path, state, open);
        Ok(())
    }

    /// Writes the page maps that have gathered behind the chunks they are about.
    pub async fn write_maps(&mut self) -> Result<(), Error> {
        while !self.maps.is_empty() {
            if !self.pack.has_room() {
                self.close_pack().await?;
            }
            let from = self.pack.len() as u32;
            self.maps.write(&mut self.pack, &mut self.compressor)?;
            self.note_start_range(from);
        }
        Ok(())
    }

    /// Returns what has been packed so far; contents of larger files are not yet filled in.
    pub fn packed(&self) -> &Packed {
        &self.packed
    }

    /// Ends the start-up set: what follows is not fetched ahead.
    pub fn end_start_set(&mut self) {
        self.in_start_set = false;
    }

    /// Stores what is left and waits until the store has everything.
    pub async fn finish(mut self) -> Result<(Packed, NamedChunks), Error> {
        self.write_maps().await?;
        if !self.pack.is_empty() {
            self.close_pack().await?;
        }
        while let Some(outcome) = self.uploads.join_next().await {
            joined(outcome)?;
        }
        let (contents, named) = self.maps.finish();
        for (number, content) in contents {
            if let Node::File { content: place, .. } = &mut self.packed.entries[number as usize].node {
                *place = content;
            }
        }
        Ok((self.packed, named))
    }

    async fn append_run(&mut self, open: &mut OpenEntry, run: PageRun) -> Result<(), Error> {
        let chunks = self.append_all(run.frames).await?;
        for place in run.pages {
            match place {
                PagePlace::Zero => open.map.push_zero(1),
                PagePlace::Chunk { frame, slot } => open.map.push(chunks[frame], slot, 1),
            }
        }
        open.crc = open.crc.then(run.crc, run.bytes);
        open.bytes += run.bytes;
        Ok(())
    }

    fn push_mapped(&mut self, path: TreePath, state: FileState, open: OpenEntry) {
        let number = self.packed.entries.len() as u64;
        debug_assert_eq!(open.map.page_count(), open.bytes.div_ceil(PAGE_SIZE));
        self.maps.finish_file(number, open.map);
        self.push_file(path, state, open.bytes, open.crc, Content::Map(Box::default()));
    }

    fn push_file(&mut self, path: TreePath, state: FileState, size: u64, crc: Crc32c, content: Content) {
        self.packed.size.files += 1;
        self.packed.size.database_bytes += size;
        let FileState { mode, modified, .. } = state;
        self.packed.entries.push(Entry { path, mode, modified, node: Node::File { size, content } });
        self.packed.checksums.push(crc);
    }

    fn note_damage(&mut self, file: &SourceFile, blocks: &[u32]) {
        self.packed.size.damaged_pages += blocks.len() as u64;
        if let (Some(first), Some(last)) = (blocks.first(), blocks.last()) {
            tracing::warn!(
                file = %file.path,
                "{} pages have a wrong checksum, the first is block {first}, the last block {last}",
                blocks.len(),
            );
        }
    }

    async fn append_all(&mut self, frames: Vec<CompressedFrame>) -> Result<Vec<ChunkRef>, Error> {
        let mut chunks = Vec::with_capacity(frames.len());
        for frame in frames {
            if self.maps.is_ready() {
                self.write_maps().await?;
            }
            if !self.pack.has_room() {
                self.close_pack().await?;
            }
            let from = self.pack.len() as u32;
            chunks.push(self.pack.append(FrameKind::Data, frame));
            self.note_start_range(from);
        }
        Ok(chunks)
    }

    /// Notes what was appended to the pack since it had `from` bytes.
    fn note_start_range(&mut self, from: u32) {
        let (pack, to) = (self.pack.id(), self.pack.len() as u32);
        if !self.in_start_set || from == to {
            return;
        }
        match self.packed.start_set.last_mut() {
            Some(range) if range.pack == pack && range.to == from => range.to = to,
            _ => self.packed.start_set.push(PackRange { pack, from, to }),
        }
    }

    /// Hands the pack to an upload, waiting for one to end where all are busy.
    async fn close_pack(&mut self) -> Result<(), Error> {
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack()).finish();
        while self.uploads.len() >= self.uploads_max {
            match self.uploads.join_next().await {
                Some(outcome) => joined(outcome)?,
                None => break,
            }
        }
        // An upload that failed meanwhile ends the backup now, not at its end.
        while let Some(outcome) = self.uploads.try_join_next() {
            joined(outcome)?;
        }
        let writer = self.writer.clone();
        self.uploads.spawn(async move { writer.upload(pack).await });
        Ok(())
    }
}

fn joined(outcome: Result<Result<(), repo::Error>, tokio::task::JoinError>) -> Result<(), Error> {
    match outcome {
        Ok(result) => Ok(result?),
        Err(error) => Err(repo::Error::Internal(format!("an upload ended: {error}")).into()),
    }
}
