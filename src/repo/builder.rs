//! Basebackups from memory: a full one, or one that names pages of its parent.
//!
//! What `backup` does to a server, this does to files a test made up, through the same writer: so that readers,
//! mounts and the example in `docs/format.md` do not need a server. What has changed it finds by reading the parent,
//! where `backup` compares with what its host remembers.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::codec::{Compression, Compressor};
use crate::pg::{Lsn, TimelineId};
use crate::repo::basebackup::Basebackup;
use crate::repo::basebackup_writer::{BasebackupWriter, BeginOptions, Completion, ParentBasebackup};
use crate::repo::documents::{BackupRecord, ManifestPin, ObjectPin, ServerRecord, SizeRecord};
use crate::repo::entry::{BlobRef, Content, Entry, Node, TreePath};
use crate::repo::error::Error;
use crate::repo::file_reader::FileReader;
use crate::repo::id::ClusterId;
use crate::repo::manifest::{ManifestContent, OutsideLink, Tablespace};
use crate::repo::map_writer::{FileMap, MapWriter};
use crate::repo::pack::PackBuilder;
use crate::repo::page_map::{MAP_BLOCK_BYTES, MapBlock, PAGE_SIZE, PageSource};
use crate::repo::repository::Repository;
use crate::repo::sealed::{CompressedFrame, FrameKind};

/// What a made-up basebackup says of its cluster.
#[derive(Debug, Clone)]
pub struct BuilderOptions {
    /// The cluster.
    pub cluster: ClusterId,
    /// The timeline.
    pub timeline: TimelineId,
    /// Start and stop of the backup.
    pub lsns: (Lsn, Lsn),
    /// When it started; also the time of every entry.
    pub time: Timestamp,
    /// How chunks and manifest are compressed.
    pub compression: Compression,
    /// What the server is said to be.
    pub server: ServerRecord,
}

/// Writes one basebackup from memory.
#[expect(missing_debug_implementations, reason = "a compressor has nothing to show")]
pub struct BasebackupBuilder {
    options: BuilderOptions,
    writer: BasebackupWriter,
    pack: PackBuilder,
    compressor: Compressor,
    maps: MapWriter,
    parent: Option<FileReader>,
    content: ManifestContent,
    numbers: BTreeMap<u64, usize>,
    size: SizeRecord,
}

const PAGES_PER_CHUNK: usize = 8;
const INLINE_BYTES: usize = 64;

impl BasebackupBuilder {
    /// Starts a basebackup that may name pages of `parent`.
    pub async fn begin(
        repository: &Repository,
        options: BuilderOptions,
        parent: Option<Arc<Basebackup>>,
    ) -> Result<Self, Error> {
        let begin = BeginOptions {
            cluster: options.cluster,
            timeline: options.timeline,
            wal_floor: options.lsns.0,
            parent: parent.as_ref().map(|parent| {
                Arc::new(ParentBasebackup {
                    record: parent.record().clone(),
                    digest: parent.digest(),
                    refs: parent.refs().clone(),
                })
            }),
            host: "builder".to_owned(),
            pid: 1,
        };
        let writer = BasebackupWriter::begin(repository, begin).await?;
        let pack = writer.create_pack();
        Ok(Self {
            compressor: Compressor::new(options.compression),
            options,
            writer,
            pack,
            maps: MapWriter::default(),
            parent: parent.map(|parent| FileReader::new(parent, 16 << 20)),
            content: ManifestContent::default(),
            numbers: BTreeMap::new(),
            size: SizeRecord::default(),
        })
    }

    /// Adds a directory.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.push(path, 0o700, Node::Directory)
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.push(path, 0o777, Node::Symlink(target.as_bytes().to_vec()))
    }

    /// Adds a tablespace to the list; its directories and files are added like any others.
    pub fn tablespace(&mut self, tablespace: Tablespace) -> &mut Self {
        self.content.tablespaces.push(tablespace);
        self
    }

    /// Adds a link that left PGDATA to the list.
    pub fn outside_link(&mut self, link: OutsideLink) -> &mut Self {
        self.content.links.push(link);
        self
    }

    /// Adds a file; pages that are the parent's at the same place are named, not stored.
    pub async fn file(&mut self, path: &str, bytes: &[u8]) -> Result<&mut Self, Error> {
        self.size.files += 1;
        self.size.database_bytes += bytes.len() as u64;
        let size = bytes.len() as u64;
        if bytes.len() <= INLINE_BYTES || path.ends_with("/pg_control") {
            let content = Content::Inline(bytes.to_vec().into());
            return Ok(self.push(path, 0o600, Node::File { size, content }));
        }
        if size < PAGE_SIZE {
            let chunk = self.store(bytes).await?;
            let content = Content::Part(BlobRef { chunk, at: 0, len: bytes.len() as u32 });
            return Ok(self.push(path, 0o600, Node::File { size, content }));
        }
        let map = self.map_pages(path, bytes).await?;
        let number = self.content.entries.len() as u64;
        self.maps.finish_file(number, map);
        self.numbers.insert(number, self.content.entries.len());
        let content = Content::Map(Box::default());
        Ok(self.push(path, 0o600, Node::File { size, content }))
    }

    /// Stores manifest and refs and commits.
    pub async fn finish(mut self) -> Result<BackupRecord, Error> {
        while !self.maps.is_empty() {
            self.maps.write(&mut self.pack, &mut self.compressor)?;
            self.close_pack().await?;
        }
        if !self.pack.is_empty() {
            self.close_pack().await?;
        }
        let (contents, named) = self.maps.finish();
        for (number, content) in contents {
            if let Node::File { content: place, .. } = &mut self.content.entries[self.numbers[&number]].node {
                *place = content;
            }
        }
        let record = empty_record(&self.options, self.writer.id(), self.size);
        let compression = self.options.compression;
        self.writer.finish(Completion { record, content: self.content, named, compression }).await
    }

    fn push(&mut self, path: &str, mode: u32, node: Node) -> &mut Self {
        let path = TreePath::new(path).expect("tests name valid paths");
        self.content.entries.push(Entry { path, mode, modified: self.options.time, node });
        self
    }

    /// Maps every page: zero, the parent's, or gathered with other changed pages into a new chunk.
    async fn map_pages(&mut self, path: &str, bytes: &[u8]) -> Result<FileMap, Error> {
        let old = self.parent_pages(path).await?;
        let mut gathered = Vec::new();
        let mut places: Vec<PageSource> = Vec::new();
        let mut open: Vec<usize> = Vec::new();
        for (n, page) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
            places.push(PageSource::Zero);
            match old.get(n) {
                _ if page.iter().all(|byte| *byte == 0) => {}
                Some((old_page, source)) if old_page == page => places[n] = *source,
                _ => {
                    gathered.extend_from_slice(page);
                    open.push(n);
                }
            }
            if open.len() == PAGES_PER_CHUNK {
                self.place(&mut gathered, &mut open, &mut places).await?;
            }
        }
        self.place(&mut gathered, &mut open, &mut places).await?;
        let mut map = FileMap::default();
        for source in places {
            match source {
                PageSource::Zero => map.push_zero(1),
                PageSource::Chunk { chunk, slot } => map.push(chunk, slot, 1),
            }
        }
        Ok(map)
    }

    async fn place(
        &mut self,
        gathered: &mut Vec<u8>,
        open: &mut Vec<usize>,
        places: &mut [PageSource],
    ) -> Result<(), Error> {
        if open.is_empty() {
            return Ok(());
        }
        let chunk = self.store(gathered).await?;
        for (slot, page) in (0u32..).zip(open.drain(..)) {
            places[page] = PageSource::Chunk { chunk, slot };
        }
        gathered.clear();
        Ok(())
    }

    /// Returns the pages of the parent's file of that name and where each stands.
    async fn parent_pages(&self, path: &str) -> Result<Vec<(Vec<u8>, PageSource)>, Error> {
        let Some(parent) = &self.parent else {
            return Ok(Vec::new());
        };
        let path = TreePath::new(path).expect("tests name valid paths");
        let Some((_, entry)) = parent.basebackup().entry(&path).await? else {
            return Ok(Vec::new());
        };
        let Node::File { size, content } = &entry.node else {
            return Ok(Vec::new());
        };
        let mut sources = Vec::new();
        match content {
            Content::Map(block) => sources.extend(sources_of(block)),
            Content::Blocks(blobs) => {
                for blob in blobs {
                    sources.extend(sources_of(&parent.map_block(blob, &entry).await?));
                }
            }
            Content::Inline(_) | Content::Part(_) => {}
        }
        debug_assert!(sources.len() as u64 * PAGE_SIZE <= size.next_multiple_of(MAP_BLOCK_BYTES));
        let bytes = parent.read(&entry, 0..*size).await?;
        Ok(bytes.chunks(PAGE_SIZE as usize).map(<[u8]>::to_vec).zip(sources).collect())
    }

    async fn store(&mut self, raw: &[u8]) -> Result<crate::repo::chunk::ChunkRef, Error> {
        if !self.pack.has_room() {
            self.close_pack().await?;
        }
        let frame = CompressedFrame::compress(&mut self.compressor, raw)?;
        Ok(self.pack.append(FrameKind::Data, frame))
    }

    async fn close_pack(&mut self) -> Result<(), Error> {
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack());
        self.writer.upload(pack.finish()).await
    }
}

fn sources_of(block: &MapBlock) -> Vec<PageSource> {
    let mut sources = Vec::new();
    for extent in block.extents() {
        for n in 0..extent.count {
            sources.push(match extent.source {
                PageSource::Zero => PageSource::Zero,
                PageSource::Chunk { chunk, slot } => PageSource::Chunk { chunk, slot: slot + n },
            });
        }
    }
    sources
}

fn empty_record(options: &BuilderOptions, id: crate::repo::BasebackupId, size: SizeRecord) -> BackupRecord {
    let nothing = crate::codec::Digest([0; 32]);
    BackupRecord {
        id,
        parent: None,
        parent_digest: None,
        label: None,
        cluster: options.cluster,
        timeline: options.timeline,
        start_lsn: options.lsns.0,
        stop_lsn: options.lsns.1,
        wal_floor: options.lsns.0,
        started_at: options.time,
        stopped_at: options.time,
        server: options.server.clone(),
        keys: Vec::new(),
        manifest: ManifestPin { size: 0, digest: nothing, head_size: 0, head_digest: nothing, start_size: 0 },
        refs: ObjectPin { size: 0, digest: nothing },
        size,
    }
}
