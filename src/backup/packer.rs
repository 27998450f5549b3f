//! The ordered end of the pipeline: chunks are sealed into packs in planned order, full packs are uploaded.
//!
//! One task owns the pack under construction, because a chunk's position in it is its nonce. Memory is bounded by
//! the number of uploads: a full pack waits for a free one, and nothing is read meanwhile. The start-up set's chunks
//! and the maps of its files stand in the first packs, and their ranges are noted, wherever they lie. A map block that
//! is as it was is named where it stands; what the next basebackup compares with is remembered on the way.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::backup::change::is_settled;
use crate::backup::data_directory::{FileIdentity, SourceFile};
use crate::backup::error::Error;
use crate::backup::gather::{Again, GatherOptions, PagePlace, PageRun, gather_pages};
use crate::backup::known_parent::KnownParent;
use crate::backup::open_entry::OpenEntry;
use crate::backup::read_pages::JOB_BYTES;
use crate::backup::read_small::{INLINE_BYTES, SmallFiles, SmallPlace};
use crate::backup::remember::{RememberedFile, Remembering};
use crate::backup::source_file::FileState;
use crate::backup::state::{Journal, KnownContent, KnownFile, StateWriter};
use crate::codec::{Compression, Compressor};
use crate::pg::Crc32c;
use crate::repo::{
    self, BasebackupId, BasebackupWriter, CompressedFrame, FrameKind, MapWriter, NamedChunks, PackBuilder,
    PackId, PackRecord,
    chunk::ChunkRef,
    documents::SizeRecord,
    entry::{BlobRef, Content, Entry, INLINE_BYTES_MAX, Node, TreePath},
    manifest::PackRange,
    page_map::{MapBlock, PAGE_SIZE, PageSource},
};

/// Puts what was read into packs, in order.
pub struct Packer {
    writer: Arc<BasebackupWriter>,
    pack: PackBuilder,
    compressor: Compressor,
    compression: Compression,
    maps: MapWriter,
    uploads: JoinSet<Result<PackRecord, repo::Error>>,
    uploads_max: usize,
    open: Option<OpenEntry>,
    remembering: Remembering,
    /// Packs that are not named again.
    again: Arc<BTreeSet<PackId>>,
    in_start_set: bool,
    /// The pack and the maps of whichever is not under way, the start-up set or the rest, where both come in turns.
    aside: Option<(PackBuilder, MapWriter)>,
    packed: Packed,
}

/// What has been packed.
#[derive(Debug, Default)]
pub struct Packed {
    /// Files, their contents filled in at the end.
    pub entries: Vec<Entry>,
    /// CRC of each of `entries`, which have the same order; none where not all of the file was read.
    pub checksums: Vec<Option<Crc32c>>,
    /// Where the start-up set lies.
    pub start_set: Vec<PackRange>,
    /// Files and their bytes, damaged pages.
    pub size: SizeRecord,
    /// Files that had vanished when they were to be read.
    pub vanished: u64,
    /// Files that were shorter than the walk had seen them.
    pub shrunk: u64,
    /// What was read, and what of it had to be stored.
    pub work: WorkDone,
}

/// What was read, and what of it had to be stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkDone {
    /// Files that were taken over without being read.
    pub files_kept: u64,
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Pages that are not as they were; all of them in a full basebackup.
    pub pages_changed: u64,
    /// Pages that are as they were and were stored again all the same.
    pub pages_stored_again: u64,
    /// Chunks of earlier basebackups that are named.
    pub chunks_reused: u64,
}

/// Everything that was packed, durable in the store.
#[derive(Debug)]
pub struct Stored {
    /// Files and where they stand.
    pub packed: Packed,
    /// The chunks that maps in map chunks name.
    pub named: NamedChunks,
    /// What the next basebackup compares with, to be finished after the commit; none where nothing is remembered.
    pub state: Option<StateWriter>,
}

/// Ranges of the start-up set this near to each other are fetched by one request, and what lies between with them.
const RANGE_GAP_MAX: u32 = 64 << 10;
/// Nothing of a file that has no more maps, 2 GiB, is named before all that is known of it has been read: it may have to be
/// read itself in the end. Of a larger one, which few builds of PostgreSQL have, some chunks then count that nobody uses.
const MAPS_HELD_BACK: usize = 16;
/// More ranges would not be fetched ahead anyway.
const RANGES_MAX: usize = 64;

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
            remembering: Remembering::default(),
            again: Arc::default(),
            in_start_set: true,
            aside: None,
            packed: Packed::default(),
        }
    }

    /// Has what is packed remembered for the next basebackup.
    pub fn remembering(mut self, writer: StateWriter) -> Self {
        self.remembering = Remembering::new(writer);
        self
    }

    /// Has what a kill must not cost noted on the way.
    pub fn journaling(mut self, journal: Journal) -> Self {
        self.remembering.journal(journal);
        self
    }

    /// Has what is in some of the parent's packs written again.
    pub fn writing_again(mut self, packs: Arc<BTreeSet<PackId>>) -> Self {
        self.again = packs;
        self
    }

    /// Returns which basebackup is packed.
    pub fn basebackup(&self) -> BasebackupId {
        self.writer.id()
    }

    /// Packs small files.
    pub async fn push_small(&mut self, together: SmallFiles, files: &[SourceFile]) -> Result<(), Error> {
        let chunks = self.append_all(together.frames).await?;
        self.packed.work.pages_changed += together.changed;
        self.packed.work.pages_stored_again += together.stored_again;
        for small in together.files {
            let file = &files[small.number];
            self.packed.shrunk += u64::from(u64::from(small.len) < file.size);
            self.note_damage(file, &small.damaged);
            self.packed.work.bytes_read += u64::from(small.len);
            let content = match small.place {
                SmallPlace::Inline(bytes) => Content::Inline(bytes),
                SmallPlace::Chunk { frame, at } => {
                    Content::Part(BlobRef { chunk: chunks[frame], at, len: small.len })
                }
                SmallPlace::Known(blob) => {
                    self.note_known(&blob.chunk);
                    Content::Part(blob)
                }
            };
            let remembered = RememberedFile {
                identity: small.state.identity,
                damaged_pages: small.damaged.len() as u32,
                hash: small.hash,
                records: Vec::new(),
            };
            let size = u64::from(small.len);
            self.push_file(file.path.clone(), small.state, size, Some(small.crc), content, Some(remembered));
        }
        self.packed.vanished += together.vanished;
        Ok(())
    }

    /// Packs the next run of pages of a file, `expected` bytes unless the file has become shorter; `known` is what was
    /// known of the file.
    pub async fn push_pages(
        &mut self,
        (number, file): (usize, &SourceFile),
        run: PageRun,
        expected: u64,
        known: Option<Arc<KnownFile>>,
    ) -> Result<(), Error> {
        self.note_damage(file, &run.damaged);
        let mut open = self.open.take().unwrap_or_else(|| OpenEntry::new(number, run.state, known));
        debug_assert_eq!(open.number, number, "the pages of two files are interleaved");
        open.damaged += run.damaged.len() as u32;
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
        let Some(mut open) = self.open.take() else {
            return;
        };
        let Some(state) = open.state else {
            self.packed.vanished += 1;
            return;
        };
        self.packed.shrunk += u64::from(open.bytes < file.size);
        let before = open.damage_unread();
        open.damaged += before;
        self.packed.size.damaged_pages += u64::from(before);
        self.push_mapped(file.path.clone(), state, open, true);
    }

    /// Takes a file over as the parent has it, without reading it; returns false where what is known of it cannot be
    /// read, and then it has to be.
    pub fn keep_file(&mut self, file: &SourceFile, parent: &KnownParent) -> bool {
        let Some(known) = parent.file(&file.path) else {
            return false;
        };
        // What the bytes were when they were read. The WAL vouches for them up to where this basebackup begins, and on a
        // standby that is long before the file is looked at: today's ctime may be that of a write behind it.
        let read = FileIdentity { device: known.device, inode: known.inode, changed: known.changed };
        let mut remembered = RememberedFile {
            identity: is_settled(&known, parent.facts().started_at).then_some(read),
            damaged_pages: known.damaged_pages,
            ..RememberedFile::default()
        };
        let content = match &known.content {
            KnownContent::Inline(bytes) => Content::Inline(bytes.clone()),
            KnownContent::Part { blob, hash } => {
                self.note_known(&blob.chunk);
                remembered.hash = Some(*hash);
                Content::Part(*blob)
            }
            KnownContent::Pages { stands, .. } => {
                let mut maps = Vec::new();
                for n in 0..known.block_count() {
                    let (Some(map), Some(record)) =
                        (parent.map(&known, n), self.remembering.copy_block(parent, &known, n))
                    else {
                        return false;
                    };
                    remembered.records.extend(record);
                    maps.push(map);
                    if maps.len() == MAPS_HELD_BACK {
                        self.name_maps(&mut maps);
                    }
                }
                self.name_maps(&mut maps);
                if let Content::Blocks(blobs) = stands {
                    blobs.iter().for_each(|blob| self.note_known(&blob.chunk));
                }
                stands.clone()
            }
        };
        let (size, mode, modified, identity) = (known.size, file.mode, file.modified, file.identity);
        let state = FileState { size, mode, modified, identity };
        self.packed.work.files_kept += 1;
        self.packed.size.damaged_pages += u64::from(known.damaged_pages);
        self.push_file(file.path.clone(), state, size, known.crc, content, Some(remembered));
        true
    }

    /// Names what maps of earlier basebackups name.
    fn name_maps(&mut self, maps: &mut Vec<MapBlock>) {
        for map in maps.drain(..) {
            self.maps.name_block(&map);
            map.extents().iter().for_each(|extent| self.note_source(&extent.source));
        }
    }

    /// Adds a file that is in memory.
    pub async fn push_bytes(&mut self, path: TreePath, state: FileState, raw: Bytes) -> Result<(), Error> {
        let (len, crc) = (raw.len() as u64, Some(Crc32c::of(&raw)));
        let is_control_file = path.as_bytes() == b"data/global/pg_control";
        if raw.len() <= INLINE_BYTES || (is_control_file && raw.len() <= INLINE_BYTES_MAX) {
            self.push_file(path, state, len, crc, Content::Inline(raw), None);
            return Ok(());
        }
        // Nothing of it will be compared.
        let options = GatherOptions { compression: self.compression, hash_key: None, again: Again::Nothing };
        let mut open = OpenEntry::new(0, None, None);
        for part in raw.chunks(JOB_BYTES as usize) {
            self.append_run(&mut open, gather_pages(part, None, &options)?).await?;
        }
        self.push_mapped(path, state, open, false);
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
            self.note_range(self.pack.id(), from, self.pack.len() as u32);
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

    /// Turns to the start-up set or to the rest, for who cannot choose the order: each has packs and maps of its own.
    pub fn turn_to(&mut self, start_set: bool) {
        if self.in_start_set == start_set {
            return;
        }
        let (pack, mut maps) =
            self.aside.take().unwrap_or_else(|| (self.writer.create_pack(), MapWriter::default()));
        maps.count_for(&mut self.maps);
        self.aside = Some((std::mem::replace(&mut self.pack, pack), std::mem::replace(&mut self.maps, maps)));
        self.in_start_set = start_set;
    }

    /// Stores what is left and waits until the store has everything.
    pub async fn finish(mut self) -> Result<Stored, Error> {
        self.close_maps_and_pack().await?;
        let mut further = None;
        if self.aside.is_some() {
            self.turn_to(!self.in_start_set);
            self.close_maps_and_pack().await?;
            further = self.aside.take().map(|(_, maps)| maps.finish());
        }
        while let Some(outcome) = self.uploads.join_next().await {
            joined(outcome)?;
        }
        let (mut contents, mut named) = self.maps.finish();
        if let Some((further, also_named)) = further {
            contents.extend(further);
            named.join(also_named);
        }
        for (number, content) in contents {
            if let Node::File { content: place, .. } = &mut self.packed.entries[number as usize].node {
                *place = content;
            }
        }
        let state = self.remembering.finish(&self.packed.entries, &self.packed.checksums);
        Ok(Stored { packed: self.packed, named, state })
    }

    async fn close_maps_and_pack(&mut self) -> Result<(), Error> {
        self.write_maps().await?;
        if !self.pack.is_empty() {
            self.close_pack().await?;
        }
        Ok(())
    }

    async fn append_run(&mut self, open: &mut OpenEntry, run: PageRun) -> Result<(), Error> {
        open.unchanged &= run.is_unchanged();
        let PageRun { frames, pages, hashes, changed, stored_again, bytes, unread, crc, .. } = run;
        let chunks = self.append_all(frames).await?;
        for (n, place) in pages.into_iter().enumerate() {
            match place {
                PagePlace::Zero => open.map.push_zero(1),
                PagePlace::Chunk { frame, slot } => open.map.push(chunks[frame], slot, 1),
                PagePlace::Known { chunk, slot } => {
                    self.note_known(&chunk);
                    open.map.push(chunk, slot, 1);
                }
            }
            open.hashes.extend(hashes.get(n));
            if open.block_is_full() {
                self.close_block(open);
            }
        }
        open.crc = open.crc.zip(crc).map(|(before, next)| before.then(next, bytes));
        open.bytes += bytes;
        let work = &mut self.packed.work;
        work.bytes_read += bytes - unread;
        work.pages_changed += changed;
        work.pages_stored_again += stored_again;
        Ok(())
    }

    /// Ends a block of a file's map: it is named where it stands if it is as it was, and remembered.
    fn close_block(&mut self, open: &mut OpenEntry) {
        if let Some(blob) = open.standing_block().filter(|blob| !self.again.contains(&blob.chunk.pack)) {
            self.note_known(&blob.chunk);
            open.map.stands_at(open.blocks_done, blob);
        }
        let block = open.take_block(self.remembering.is_on());
        open.records.extend(block.and_then(|block| self.remembering.push_block(&block)));
    }

    fn push_mapped(&mut self, path: TreePath, state: FileState, mut open: OpenEntry, is_remembered: bool) {
        let number = self.packed.entries.len() as u64;
        debug_assert_eq!(open.map.page_count(), open.bytes.div_ceil(PAGE_SIZE));
        if open.has_open_block() {
            self.close_block(&mut open);
        }
        let remembered = is_remembered.then(|| RememberedFile {
            identity: state.identity,
            damaged_pages: open.damaged,
            hash: None,
            records: std::mem::take(&mut open.records),
        });
        self.maps.finish_file(number, open.map);
        self.push_file(path, state, open.bytes, open.crc, Content::Map(Box::default()), remembered);
    }

    fn push_file(
        &mut self,
        path: TreePath,
        state: FileState,
        size: u64,
        crc: Option<Crc32c>,
        content: Content,
        remembered: Option<RememberedFile>,
    ) {
        self.packed.size.files += 1;
        self.packed.size.database_bytes += size;
        let FileState { mode, modified, .. } = state;
        self.packed.entries.push(Entry { path, mode, modified, node: Node::File { size, content } });
        self.packed.checksums.push(crc);
        if let Some(entry) = self.packed.entries.last() {
            self.remembering.push_file(entry, crc, remembered);
        }
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
            self.note_range(self.pack.id(), from, self.pack.len() as u32);
        }
        Ok(chunks)
    }

    fn note_source(&mut self, source: &PageSource) {
        if let PageSource::Chunk { chunk, .. } = source {
            self.note_known(chunk);
        }
    }

    /// Notes where a chunk of an earlier basebackup lies that a start reads.
    fn note_known(&mut self, chunk: &ChunkRef) {
        self.note_range(chunk.pack, chunk.offset, chunk.offset + chunk.stored_len);
    }

    /// Notes a range of a pack that a start reads; ranges stand in the order in which they were first met.
    fn note_range(&mut self, pack: PackId, from: u32, to: u32) {
        if !self.in_start_set || from == to {
            return;
        }
        let ranges = &mut self.packed.start_set;
        let near = |range: &&mut PackRange| {
            range.pack == pack
                && from <= range.to.saturating_add(RANGE_GAP_MAX)
                && range.from <= to.saturating_add(RANGE_GAP_MAX)
        };
        if let Some(range) = ranges.iter_mut().find(near) {
            (range.from, range.to) = (range.from.min(from), range.to.max(to));
        } else if ranges.len() < RANGES_MAX {
            ranges.push(PackRange { pack, from, to });
        }
    }

    /// Hands the pack to an upload, waiting for one to end where all are busy.
    async fn close_pack(&mut self) -> Result<(), Error> {
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack()).finish();
        while self.uploads.len() >= self.uploads_max {
            match self.uploads.join_next().await {
                Some(outcome) => self.remembering.push_pack(&joined(outcome)?),
                None => break,
            }
        }
        // An upload that failed meanwhile ends the backup now, not at its end.
        while let Some(outcome) = self.uploads.try_join_next() {
            self.remembering.push_pack(&joined(outcome)?);
        }
        let writer = self.writer.clone();
        self.uploads.spawn(async move { writer.upload(pack).await });
        Ok(())
    }
}

fn joined(
    outcome: Result<Result<PackRecord, repo::Error>, tokio::task::JoinError>,
) -> Result<PackRecord, Error> {
    match outcome {
        Ok(result) => Ok(result?),
        Err(error) => Err(repo::Error::Internal(format!("an upload ended: {error}")).into()),
    }
}
