//! The packs of WAL that a basebackup carries: written beside those of the copy, which they are no part of.
//!
//! A segment is read, checked and compressed in pieces, and packed in order, one at a time and not on the CPU pool: there
//! it would wait its turn behind the copy, however slow a limit makes that. One pack is in memory, and stored before the next
//! begins. That keeps up with a server that writes as fast as the store takes it; with another the server keeps its WAL longer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::backup::error::Error;
use crate::backup::run::blocking;
use crate::codec::{Compression, Compressor};
use crate::pg::{Lsn, WalPageHeader, WalSegmentName};
use crate::repo::{
    BasebackupWriter, ClusterId, CompressedFrame, FileMap, FrameKind, MapWriter, NamedChunks, PackBuilder,
    entry::{Content, Entry, INLINE_BYTES_MAX, Node, TreePath},
    page_map::PAGE_SIZE,
};

/// Packs files that a basebackup carries.
pub(super) struct CarriedFiles {
    writer: Arc<BasebackupWriter>,
    compression: Compression,
    compressor: Compressor,
    pack: PackBuilder,
    maps: MapWriter,
    entries: Vec<Entry>,
}

/// A segment to be copied.
#[derive(Debug, Clone)]
pub(super) struct SegmentFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Which one it is.
    pub(super) name: WalSegmentName,
    /// The position of its first byte.
    pub(super) start: Lsn,
    /// Where its WAL ends; zeros are stored behind that.
    pub(super) end: Lsn,
    /// Whose WAL it is to be.
    pub(super) cluster: ClusterId,
}

/// Bytes read and compressed by one job.
const PIECE_BYTES: u64 = 512 << 10;
/// Bytes of a chunk: what a reader decodes at once.
const CHUNK_BYTES: usize = 8 * PAGE_SIZE as usize;
/// What a basebackup takes beside its other memory to carry WAL: a pack under construction, or on its way.
pub const CARRY_MEMORY: u64 = 40 << 20;
/// The only size of WAL pages that servers are built with.
const WAL_PAGE: usize = 8192;
/// Where the header of a WAL page has its address.
const ADDRESS_AT: usize = 8;
const HEADER_LEN: usize = 24;

impl CarriedFiles {
    /// Creates a packer into packs of `writer`.
    pub(super) fn new(writer: Arc<BasebackupWriter>, compression: Compression) -> Self {
        let (pack, compressor) = (writer.create_pack(), Compressor::new(compression));
        let (maps, entries) = (MapWriter::default(), Vec::new());
        Self { writer, compression, compressor, pack, maps, entries }
    }

    /// Packs a segment as a file of the basebackup.
    ///
    /// # Errors
    /// `WalLost` where the file is gone or holds other WAL by now.
    pub(super) async fn push_segment(
        &mut self,
        tree: TreePath,
        segment: &SegmentFile,
        modified: Timestamp,
    ) -> Result<(), Error> {
        let size = u64::from(segment.cluster.segment_size.bytes());
        let opened = segment.clone();
        let file = Arc::new(blocking(move || opened.open()).await?);
        let mut map = FileMap::default();
        for offset in (0..size).step_by(PIECE_BYTES as usize) {
            let (file, segment, compression) = (file.clone(), segment.clone(), self.compression);
            let length = PIECE_BYTES.min(size - offset) as usize;
            let job = move || segment.compress(&file, offset, length, compression);
            for (pages, frame) in blocking(job).await? {
                match frame {
                    None => map.push_zero(pages),
                    Some(frame) => {
                        self.make_room().await?;
                        map.push(self.pack.append(FrameKind::Data, frame), 0, pages as u32);
                    }
                }
            }
        }
        self.maps.finish_file(self.entries.len() as u64, map);
        self.push_entry(tree, size, modified, Content::Map(Box::default()));
        while self.maps.is_ready() {
            self.write_maps().await?;
        }
        Ok(())
    }

    /// Adds a small file that is in memory.
    pub(super) async fn push_bytes(
        &mut self,
        tree: TreePath,
        bytes: Bytes,
        modified: Timestamp,
    ) -> Result<(), Error> {
        let size = bytes.len() as u64;
        if bytes.len() <= INLINE_BYTES_MAX {
            self.push_entry(tree, size, modified, Content::Inline(bytes));
            return Ok(());
        }
        let mut map = FileMap::default();
        for chunk in bytes.chunks(CHUNK_BYTES) {
            self.make_room().await?;
            let frame = CompressedFrame::compress(&mut self.compressor, chunk)?;
            let pages = (chunk.len() as u64).div_ceil(PAGE_SIZE) as u32;
            map.push(self.pack.append(FrameKind::Data, frame), 0, pages);
        }
        self.maps.finish_file(self.entries.len() as u64, map);
        self.push_entry(tree, size, modified, Content::Map(Box::default()));
        Ok(())
    }

    /// Adds a directory.
    pub(super) fn push_directory(&mut self, path: TreePath, modified: Timestamp) {
        self.entries.push(Entry { path, mode: 0o700, modified, node: Node::Directory });
    }

    /// Stores what is left; returns the entries, and the chunks that maps in map chunks name.
    pub(super) async fn finish(mut self) -> Result<(Vec<Entry>, NamedChunks), Error> {
        while !self.maps.is_empty() {
            self.write_maps().await?;
        }
        if !self.pack.is_empty() {
            self.store_pack().await?;
        }
        let (contents, named): (BTreeMap<u64, Content>, NamedChunks) = self.maps.finish();
        for (number, content) in contents {
            if let Node::File { content: place, .. } = &mut self.entries[number as usize].node {
                *place = content;
            }
        }
        Ok((self.entries, named))
    }

    fn push_entry(&mut self, path: TreePath, size: u64, modified: Timestamp, content: Content) {
        self.entries.push(Entry { path, mode: 0o600, modified, node: Node::File { size, content } });
    }

    async fn write_maps(&mut self) -> Result<(), Error> {
        self.make_room().await?;
        Ok(self.maps.write(&mut self.pack, &mut self.compressor)?)
    }

    async fn make_room(&mut self) -> Result<(), Error> {
        if self.pack.has_room() { Ok(()) } else { self.store_pack().await }
    }

    async fn store_pack(&mut self) -> Result<(), Error> {
        let pack = std::mem::replace(&mut self.pack, self.writer.create_pack()).finish();
        self.writer.upload(pack).await?;
        Ok(())
    }
}

/// Zero pages, or as many pages in a chunk.
type Packed = (u64, Option<CompressedFrame>);

impl SegmentFile {
    fn open(&self) -> Result<File, Error> {
        match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(self.lost()),
            opened => opened.map_err(Error::reading("open", &self.path)),
        }
    }

    fn lost(&self) -> Error {
        Error::WalLost { segment: self.name }
    }

    /// Reads part of the segment, checks it and compresses it.
    fn compress(
        &self,
        file: &File,
        offset: u64,
        length: usize,
        compression: Compression,
    ) -> Result<Vec<Packed>, Error> {
        let mut raw = vec![0; length];
        match file.read_exact_at(&mut raw, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(self.lost()),
            read => read.map_err(Error::reading("read", &self.path))?,
        }
        self.check(&raw, offset)?;
        let wanted = self.end.checked_sub(self.start + offset).unwrap_or(0).min(length as u64);
        raw[wanted as usize..].fill(0);
        let pack = |chunk: &[u8]| -> Result<Packed, Error> {
            let pages = (chunk.len() as u64).div_ceil(PAGE_SIZE);
            if chunk.iter().all(|byte| *byte == 0) {
                return Ok((pages, None));
            }
            let frame = Compressor::on_this_thread(compression, |it| CompressedFrame::compress(it, chunk))?;
            Ok((pages, Some(frame)))
        };
        raw.chunks(CHUNK_BYTES).map(pack).collect()
    }

    /// Checks that each page is of this segment, or empty behind a switch: a server that had no reason to keep the file
    /// writes other WAL into it under another name, also while it is read.
    fn check(&self, raw: &[u8], offset: u64) -> Result<(), Error> {
        for (n, page) in raw.chunks(WAL_PAGE).enumerate() {
            let address = self.start + offset + (n * WAL_PAGE) as u64;
            if address >= self.end {
                break;
            }
            let header = page.get(..HEADER_LEN).ok_or_else(|| self.lost())?;
            let found = header[ADDRESS_AT..].first_chunk().map(|bytes| Lsn(u64::from_le_bytes(*bytes)));
            let is_empty = offset + n as u64 > 0 && header.iter().all(|byte| *byte == 0);
            if !is_empty && found != Some(address) {
                return Err(self.lost());
            }
        }
        if offset > 0 {
            return Ok(());
        }
        let long = WalPageHeader::parse(raw).ok().and_then(|header| header.long);
        let is_ours = long.is_some_and(|long| {
            long.system_identifier == self.cluster.system_identifier
                && long.segment_size == self.cluster.segment_size
        });
        if is_ours { Ok(()) } else { Err(self.lost()) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use crate::clock::SystemClock;
    use crate::pg::TimelineId;
    use crate::repo::carried_wal::{CarriedSegment, CarriedWal, read_carried};
    use crate::repo::documents::BackupRecord;
    use crate::repo::manifest::ManifestContent;
    use crate::repo::{BeginOptions, Completion, Repository, testing};
    use crate::storage::MemoryStore;

    use super::*;

    const SEGMENT_BYTES: usize = 1 << 20;
    /// WAL of a server of version 15 from 0/900000 on; what is not there counts as zeros.
    const WAL: &[u8] = include_bytes!("../../tests/data/wal/15-start");
    const START: Lsn = Lsn(0x90_0000);

    fn segment(content: &[u8], end: u64) -> (tempfile::NamedTempFile, SegmentFile) {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let long = WalPageHeader::parse(WAL).unwrap().long.unwrap();
        let cluster =
            ClusterId { system_identifier: long.system_identifier, segment_size: long.segment_size };
        let name = WalSegmentName::containing(TimelineId::FIRST, START, cluster.segment_size);
        let path = file.path().to_owned();
        (file, SegmentFile { path, name, start: START, end: START + end, cluster })
    }

    fn whole() -> Vec<u8> {
        let mut whole = WAL.to_vec();
        whole.resize(SEGMENT_BYTES, 0);
        whole
    }

    async fn writer(repository: &Repository, cluster: ClusterId) -> Arc<BasebackupWriter> {
        let begin = BeginOptions {
            cluster,
            timeline: TimelineId::FIRST,
            wal_floor: START,
            parent: None,
            host: String::new(),
            pid: 1,
        };
        Arc::new(BasebackupWriter::begin(repository, begin).await.unwrap())
    }

    /// Writes a basebackup of these segments and nothing else.
    async fn carried(repository: &Repository, segments: &[SegmentFile]) -> Result<BackupRecord, Error> {
        let writer = writer(repository, segments[0].cluster).await;
        let mut files = CarriedFiles::new(writer.clone(), Compression::zstd(1));
        let at = Timestamp::UNIX_EPOCH;
        for segment in segments {
            files.push_segment(CarriedWal::path_of(segment.name)?, segment, at).await?;
        }
        let history = TreePath::new("data/pg_wal/00000002.history").unwrap();
        files.push_bytes(history, Bytes::from(vec![b'#'; 200_000]), at).await?;
        let (mut entries, named) = files.finish().await?;
        for above in ["data", "data/pg_wal"] {
            let path = TreePath::new(above).unwrap();
            entries.push(Entry { path, mode: 0o700, modified: at, node: Node::Directory });
        }
        let lsns = (START, segments[0].end);
        let cluster = segments[0].cluster;
        let record =
            crate::backup::server_record::empty_record(writer.id(), cluster, TimelineId::FIRST, lsns);
        let content = ManifestContent { entries, ..ManifestContent::default() };
        let completion = Completion { record, content, named, compression: Compression::zstd(1) };
        Ok(Arc::into_inner(writer).unwrap().finish(completion).await?)
    }

    #[tokio::test]
    async fn a_segment_comes_back_as_far_as_it_counts() {
        let repository = testing::site(MemoryStore::new(), SystemClock).await;
        for end in [SEGMENT_BYTES, 20_000] {
            let mut expected = whole();
            expected[end..].fill(0);
            // Behind the end is what the server is just writing, or had there before.
            let mut content = whole();
            content[end..].fill(7);
            let (_file, segment) = segment(&content, end as u64);
            let record = carried(&repository, std::slice::from_ref(&segment)).await.unwrap();
            let carried = CarriedSegment { basebackup: record.id, end: None };
            let size = segment.cluster.segment_size;
            let read = read_carried(&repository, carried, segment.name, size).await.unwrap();
            assert!(read == expected, "{end}");
            let other = segment.name.next(size).unwrap();
            let absent = read_carried(&repository, carried, other, size).await.unwrap_err();
            assert!(absent.to_string().contains("it is not there"), "{absent}");
        }
    }

    #[tokio::test]
    async fn other_wal_under_the_name_is_never_taken_for_it() {
        let repository = testing::site(MemoryStore::new(), SystemClock).await;
        let mut recycled = whole();
        // The third page is of the segment that comes next under another name.
        recycled[2 * WAL_PAGE + ADDRESS_AT + 3] ^= 1;
        let mut foreign = whole();
        foreign[24] ^= 1;
        let short = whole()[..SEGMENT_BYTES - 1].to_vec();
        for (what, content) in [
            ("recycled", recycled),
            ("foreign", foreign),
            ("short", short),
            ("empty", vec![0; SEGMENT_BYTES]),
        ] {
            let (_file, segment) = segment(&content, SEGMENT_BYTES as u64);
            let error = carried(&repository, &[segment]).await.unwrap_err();
            assert!(matches!(error, Error::WalLost { .. }), "{what}: {error}");
        }
        let (file, segment) = segment(&whole(), SEGMENT_BYTES as u64);
        drop(file);
        let error = carried(&repository, &[segment]).await.unwrap_err();
        assert!(matches!(error, Error::WalLost { .. }), "gone: {error}");
    }
}
