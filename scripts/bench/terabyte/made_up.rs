//! Files that never were, packed as `backup::packer` packs real ones.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::task::JoinSet;
use walden::codec::{Compression, Compressor};
use walden::repo::entry::{Content, Entry, Node, TreePath};
use walden::repo::page_map::PAGE_SIZE;
use walden::repo::{
    self, BasebackupWriter, CompressedFrame, FileMap, FrameKind, MapWriter, NamedChunks, PackBuilder,
};

use crate::state::MadeUpState;

/// Raw bytes of a chunk.
pub const CHUNK_BYTES: u64 = PAGES_PER_CHUNK as u64 * PAGE_SIZE;
pub const PAGES_PER_CHUNK: u32 = 8;
/// A pack of 32 MiB holds what compresses to a third of 100 MB.
const CHUNKS_PER_PACK: u64 = 1600;
/// No cluster that was just made has come so far.
const FIRST_FILE_NUMBER: u64 = 1_000_000;
const UPLOADS_MAX: usize = 8;

/// Returns how many chunks file `n` has where they are not all of one size: 80 in the mean.
pub fn chunks_of_mean(n: u64) -> u64 {
    70 + n * 37 % 21
}

/// A page of any of the files; zero pages would stand nowhere, and cost no chunk.
pub fn page() -> Vec<u8> {
    b"made up ".repeat(PAGE_SIZE as usize / 8)
}

/// A basebackup's made-up files.
pub struct MadeUp {
    writer: Arc<BasebackupWriter>,
    modified: Timestamp,
    pack: PackBuilder,
    maps: MapWriter,
    compressor: Compressor,
    chunk: CompressedFrame,
    uploads: JoinSet<Result<(), repo::Error>>,
    chunks_in_pack: u64,
    /// The files so far; their content is known at the end.
    pub entries: Vec<Entry>,
    /// What they say they have.
    pub bytes: u64,
    /// How many packs they take.
    pub packs: u64,
}

impl MadeUp {
    /// Begins with none.
    pub fn new(writer: Arc<BasebackupWriter>, modified: Timestamp) -> Result<Self, repo::Error> {
        let mut compressor = Compressor::new(Compression::default());
        let chunk = CompressedFrame::compress(&mut compressor, &page().repeat(PAGES_PER_CHUNK as usize))?;
        Ok(Self {
            pack: writer.create_pack(),
            writer,
            modified,
            maps: MapWriter::default(),
            compressor,
            chunk,
            uploads: JoinSet::new(),
            chunks_in_pack: 0,
            entries: Vec::new(),
            bytes: 0,
            packs: 0,
        })
    }

    /// Packs file `n` of so many chunks, in one of the folders, and has a state know its pages.
    pub async fn push(
        &mut self,
        n: u64,
        chunks: u64,
        folders: &[TreePath],
        mut state: Option<&mut MadeUpState>,
    ) -> anyhow::Result<()> {
        let mut map = FileMap::default();
        for _ in 0..chunks {
            if self.chunks_in_pack == CHUNKS_PER_PACK {
                self.close_pack().await?;
            }
            let chunk = self.pack.append(FrameKind::Data, self.chunk.clone());
            self.chunks_in_pack += 1;
            map.push(chunk, 0, PAGES_PER_CHUNK);
            if let Some(state) = &mut state {
                state.push_chunk(chunk)?;
            }
        }
        let size = map.page_count() * PAGE_SIZE;
        let folder = &folders[(n % folders.len() as u64) as usize];
        let path = folder.join((FIRST_FILE_NUMBER + n).to_string().as_bytes())?;
        if let Some(state) = state {
            state.end_file(&path, size)?;
        }
        if self.maps.finish_file(n, map) {
            self.maps.write(&mut self.pack, &mut self.compressor)?;
        }
        let node = Node::File { size, content: Content::Map(Box::default()) };
        self.entries.push(Entry { path, mode: 0o600, modified: self.modified, node });
        self.bytes += size;
        Ok(())
    }

    /// Stores what is left; returns the files, and the chunks that their maps name.
    pub async fn finish(mut self) -> anyhow::Result<(Vec<Entry>, NamedChunks)> {
        self.maps.write(&mut self.pack, &mut self.compressor)?;
        self.close_pack().await?;
        while let Some(outcome) = self.uploads.join_next().await {
            outcome??;
        }
        let (contents, named) = self.maps.finish();
        for (n, content) in contents {
            if let Node::File { content: place, .. } = &mut self.entries[n as usize].node {
                *place = content;
            }
        }
        Ok((self.entries, named))
    }

    async fn close_pack(&mut self) -> anyhow::Result<()> {
        (self.chunks_in_pack, self.packs) = (0, self.packs + 1);
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack()).finish();
        if self.uploads.len() >= UPLOADS_MAX
            && let Some(outcome) = self.uploads.join_next().await
        {
            outcome??;
        }
        let writer = self.writer.clone();
        self.uploads.spawn(async move { writer.upload(pack).await.map(drop) });
        Ok(())
    }
}
