//! The bytes of a state, version 1 (`docs/decisions/2101-state-file.md`).
//!
//! ```text
//! header     42  magic 8, version 4, required features 4, basebackup (seconds 8, digits 2), tag
//! blocks         of each block of pages the hashes (8 a page), tag, the map, tag; between them sorted runs of files,
//!                where these were too many for memory
//! index          files ascending by directory and name, in frames of about 64 KiB
//! directory      of each frame of the index: place, length, files, first path
//! facts
//! footer     56  magic 8, directory (offset 8, length 4), facts (8, 4), files 8, tag
//! ```
//! Each part ends in a tag of 16 bytes: BLAKE3 of its bytes, salted with the basebackup, the kind of part and where it
//! stands, so that an intact part of another place or another state is damage as well. Whoever can write here can
//! forge it (the folder is private); decoders therefore trust no number, and check that what they return fits together.

use std::fmt;

use jiff::Timestamp;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::backup::state::{HashKey, KnownBlock, KnownContent, KnownFile, PageHash, RecordAt, StateFacts};
use crate::codec::Digest;
use crate::pg::{Crc32c, Lsn, SystemIdentifier, TimelineId, WalSegmentSize};
use crate::repo::{
    self, BasebackupId, ClusterId,
    chunk::{ChunkTableBuilder, decode_chunk_table},
    entry::{Content, TreePath},
    page_map::{MAP_BLOCK_BYTES, MAP_BLOCK_PAGES, PAGE_SIZE},
    wire::{WireError, WireReader, WireWriter},
};

pub(super) const VERSION: u32 = 1;
pub(super) const HEADER_LEN: usize = 26 + TAG_LEN;
pub(super) const FOOTER_LEN: usize = 40 + TAG_LEN;
pub(super) const TAG_LEN: usize = 16;
/// 16384 pages that each stand in a chunk of their own, with a tag, take 800 KiB, and their hashes 128 KiB.
pub(super) const BLOCK_BYTES_MAX: u32 = 4 << 20;
/// A frame of the index is closed when it has as many bytes: one look-up reads one frame.
pub(super) const INDEX_FRAME_BYTES: usize = 64 << 10;
/// What is known of one file: the places of the page maps of a file of 50 TiB.
pub(super) const FILE_BYTES_MAX: usize = 8 << 20;
/// A frame with one such file behind what had gathered.
pub(super) const INDEX_FRAME_BYTES_MAX: u32 = (FILE_BYTES_MAX + 2 * INDEX_FRAME_BYTES) as u32;
/// Some hundred million files.
pub(super) const DIRECTORY_BYTES_MAX: u32 = 64 << 20;
/// A path and 200 bytes.
pub(super) const FACTS_BYTES_MAX: u32 = 64 << 10;

const HEADER_MAGIC: &[u8; 8] = b"WALDSTAT";
const FOOTER_MAGIC: &[u8; 8] = b"WALDENDS";
/// None yet.
const REQUIRED_FEATURES: u32 = 0;
const PAGE_HASH_LEN: usize = 8;

/// The parts of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Header = 1,
    Hashes = 2,
    Map = 3,
    Run = 4,
    Index = 5,
    Directory = 6,
    Facts = 7,
    Footer = 8,
    Journal = 9,
}

impl Part {
    /// What messages call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Hashes => "list of page hashes",
            Self::Map => "page map",
            Self::Run => "sorted run",
            Self::Index => "index",
            Self::Directory => "directory of the index",
            Self::Facts => "record of the basebackup",
            Self::Footer => "end",
            Self::Journal => "journal",
        }
    }
}

/// What is wrong with a part.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// Its tag is not that of these bytes at this place.
    Checksum,
    /// It is not where, or not as long as, another part says.
    Place,
    /// It cannot be taken apart.
    Wire(WireError),
    /// It does not fit what else is known.
    Contradiction(&'static str),
    /// The system could not read it.
    Unreadable(String),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checksum => f.write_str("has a wrong checksum"),
            Self::Place => f.write_str("is not within the file"),
            Self::Wire(error) => write!(f, "{error}"),
            Self::Contradiction(what) => f.write_str(what),
            Self::Unreadable(error) => write!(f, "cannot be read: {error}"),
        }
    }
}

impl From<WireError> for Flaw {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

/// Appends the tag of a part that is to stand at `offset`.
pub(super) fn seal(id: BasebackupId, part: Part, offset: u64, payload: &mut Vec<u8>) {
    let tag = tag(id, part, offset, payload);
    payload.extend_from_slice(&tag);
}

/// Checks a part that was read at `offset` and returns it without its tag.
pub(super) fn unseal(id: BasebackupId, part: Part, offset: u64, bytes: &[u8]) -> Result<&[u8], Flaw> {
    let (payload, found) = bytes.split_last_chunk::<TAG_LEN>().ok_or(Flaw::Checksum)?;
    if *found == tag(id, part, offset, payload) { Ok(payload) } else { Err(Flaw::Checksum) }
}

fn tag(id: BasebackupId, part: Part, offset: u64, payload: &[u8]) -> [u8; TAG_LEN] {
    let (seconds, random) = id.parts();
    let mut salt = [0; 32];
    salt[..8].copy_from_slice(&seconds.to_le_bytes());
    salt[8..10].copy_from_slice(&random.to_le_bytes());
    salt[10] = part as u8;
    salt[16..24].copy_from_slice(&offset.to_le_bytes());
    let digest = Digest::salted(&salt, payload);
    *digest.as_bytes().first_chunk().expect("a digest has 32 bytes")
}

/// Returns the header, sealed.
pub(super) fn encode_header(id: BasebackupId) -> Vec<u8> {
    let (seconds, random) = id.parts();
    let mut out = WireWriter::new();
    out.raw(HEADER_MAGIC).u32(VERSION).u32(REQUIRED_FEATURES).u64(seconds).u16(random);
    let mut bytes = out.finish();
    seal(id, Part::Header, 0, &mut bytes);
    bytes
}

/// What a header says, as far as it must be known before anything else is trusted.
pub(super) enum HeaderSays {
    /// It is of this version and of this basebackup.
    Ours(BasebackupId),
    /// It is of another version, or needs what this release does not know.
    Other { version: u32 },
}

/// Takes a header apart.
pub(super) fn decode_header(bytes: &[u8; HEADER_LEN]) -> Result<HeaderSays, Flaw> {
    let mut reader = WireReader::new(bytes);
    if reader.array::<8>()? != *HEADER_MAGIC {
        return Err(Flaw::Contradiction("is not that of a state"));
    }
    let (version, required) = (reader.u32()?, reader.u32()?);
    if version > VERSION || (version == VERSION && required != REQUIRED_FEATURES) {
        return Ok(HeaderSays::Other { version });
    }
    let id = take_id(&mut reader)?;
    unseal(id, Part::Header, 0, bytes)?;
    if version == VERSION { Ok(HeaderSays::Ours(id)) } else { Err(Flaw::Contradiction("has no version")) }
}

/// Where everything else begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Footer {
    pub(super) directory: RecordAt,
    pub(super) facts: RecordAt,
    pub(super) files: u64,
}

impl Footer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = WireWriter::new();
        out.raw(FOOTER_MAGIC);
        for at in [self.directory, self.facts] {
            out.u64(at.offset).u32(at.len);
        }
        out.u64(self.files);
        out.finish()
    }

    pub(super) fn decode(payload: &[u8]) -> Result<Self, Flaw> {
        let mut reader = WireReader::new(payload);
        if reader.array::<8>()? != *FOOTER_MAGIC {
            return Err(Flaw::Contradiction("is missing"));
        }
        let mut at = || Ok::<_, Flaw>(RecordAt { offset: reader.u64()?, len: reader.u32()? });
        let (directory, facts) = (at()?, at()?);
        let files = reader.u64()?;
        reader.finish()?;
        Ok(Self { directory, facts, files })
    }
}

/// One frame of the index, as the directory names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IndexFrame {
    pub(super) at: RecordAt,
    pub(super) files: u32,
    pub(super) first: TreePath,
}

pub(super) fn encode_directory(frames: &[IndexFrame]) -> Vec<u8> {
    let mut out = WireWriter::new();
    out.varint(frames.len() as u64);
    for IndexFrame { at, files, first } in frames {
        out.varint(at.offset).varint(u64::from(at.len)).varint(u64::from(*files)).bytes(first.as_bytes());
    }
    out.finish()
}

pub(super) fn decode_directory(payload: &[u8]) -> Result<Vec<IndexFrame>, Flaw> {
    let mut reader = WireReader::new(payload);
    let count = reader.count_of("frame count", 4)?;
    let mut frames: Vec<IndexFrame> = Vec::with_capacity(count);
    for _ in 0..count {
        let at = RecordAt { offset: reader.varint()?, len: reader.small("frame length")? };
        let files = reader.small("file count")?;
        let first = take_path(&mut reader)?;
        if frames.last().is_some_and(|last| last.first.split() >= first.split()) {
            return Err(Flaw::Contradiction("is out of order"));
        }
        frames.push(IndexFrame { at, files, first });
    }
    reader.finish()?;
    Ok(frames)
}

/// Returns the bytes that the hashes of so many pages take, with their tag.
pub(super) fn hashes_len(pages: u32) -> u32 {
    pages * PAGE_HASH_LEN as u32 + TAG_LEN as u32
}

pub(super) fn encode_hashes(hashes: &[PageHash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

pub(super) fn decode_hashes(payload: &[u8]) -> Result<Vec<PageHash>, Flaw> {
    match payload.as_chunks::<PAGE_HASH_LEN>() {
        (hashes, []) => Ok(hashes.iter().map(|hash| PageHash(*hash)).collect()),
        (_, rest) => Err(WireError::Trailing { left: rest.len() }.into()),
    }
}

/// Says what does not fit together in a block that is to be written.
pub(super) fn objection_to_block(block: &KnownBlock) -> Option<&'static str> {
    let pages = block.map.page_count();
    if u64::from(pages) > MAP_BLOCK_PAGES || pages == 0 {
        return Some("a block of pages has none or too many");
    }
    (block.hashes.len() != pages as usize).then_some("a block has not one hash for each page")
}

/// Says what does not fit together in a file that is to be written, or was read.
pub(super) fn objection_to_file(file: &KnownFile) -> Option<&'static str> {
    let blocks = file.size.div_ceil(MAP_BLOCK_BYTES);
    match &file.content {
        KnownContent::Inline(bytes) => {
            let fits = bytes.len() as u64 == file.size && bytes.len() <= repo::entry::INLINE_BYTES_MAX;
            (!fits).then_some("its inline content has not its size")
        }
        KnownContent::Part { blob, .. } => {
            (u64::from(blob.len) != file.size).then_some("its part of a chunk has not its size")
        }
        KnownContent::Pages { stands, records } => {
            let fits = match stands {
                Content::Map(map) => u64::from(map.page_count()) == file.size.div_ceil(PAGE_SIZE),
                Content::Blocks(blobs) => blobs.len() as u64 == blocks,
                Content::Inline(_) | Content::Part(_) => false,
            };
            if !fits {
                return Some("its page map has not its size");
            }
            (records.len() as u64 != blocks).then_some("its blocks have not its size")
        }
    }
}

/// Whether a file's CRC is known.
const NO_CRC: u8 = 0;
const HAS_CRC: u8 = 1;

pub(super) fn encode_file(file: &KnownFile) -> Vec<u8> {
    let mut chunks = ChunkTableBuilder::default();
    let mut content = WireWriter::new();
    let stands = match &file.content {
        KnownContent::Inline(bytes) => &Content::Inline(bytes.clone()),
        KnownContent::Part { blob, .. } => &Content::Part(*blob),
        KnownContent::Pages { stands, .. } => stands,
    };
    content.u8(repo::content_tag(stands));
    repo::encode_content(file.size, stands, &mut chunks, &mut content);
    match &file.content {
        KnownContent::Inline(_) => {}
        KnownContent::Part { hash, .. } => {
            content.raw(&hash.0);
        }
        KnownContent::Pages { records, .. } => {
            for at in records {
                content.varint(at.offset).varint(u64::from(at.len));
            }
        }
    }
    let mut out = WireWriter::new();
    out.bytes(file.path.as_bytes()).varint(file.inode).varint(file.device);
    put_time(&mut out, file.changed);
    match file.crc {
        Some(crc) => out.u8(HAS_CRC).u32(crc.0),
        None => out.u8(NO_CRC),
    };
    out.varint(u64::from(file.damaged_pages));
    chunks.encode(&mut out);
    out.raw(&content.finish());
    out.finish()
}

/// Returns the path of a file, without the rest.
pub(super) fn path_of_file(record: &[u8]) -> Result<TreePath, Flaw> {
    take_path(&mut WireReader::new(record))
}

pub(super) fn decode_file(record: &[u8]) -> Result<KnownFile, Flaw> {
    let mut reader = WireReader::new(record);
    let path = take_path(&mut reader)?;
    let (inode, device) = (reader.varint()?, reader.varint()?);
    let changed = take_time(&mut reader)?;
    let crc = match reader.u8()? {
        NO_CRC => None,
        HAS_CRC => Some(Crc32c(reader.u32()?)),
        _ => return Err(Flaw::Contradiction("has a CRC of no known kind")),
    };
    let damaged_pages = reader.small("damaged pages")?;
    let chunks = decode_chunk_table(&mut reader)?;
    let tag = reader.u8()?;
    let (size, stands) = repo::decode_content(tag, &mut reader, &chunks)?;
    let content = match stands {
        Content::Inline(bytes) => KnownContent::Inline(bytes),
        Content::Part(blob) => KnownContent::Part { blob, hash: PageHash(reader.array()?) },
        stands @ (Content::Map(_) | Content::Blocks(_)) => {
            let blocks = size.div_ceil(MAP_BLOCK_BYTES);
            // Each takes two bytes at least, so no more are made room for than can be there.
            let room = blocks.min(reader.left() as u64 / 2) as usize;
            let mut records = Vec::with_capacity(room);
            for _ in 0..blocks {
                records.push(RecordAt { offset: reader.varint()?, len: reader.small("block length")? });
            }
            KnownContent::Pages { stands, records }
        }
    };
    reader.finish()?;
    let file = KnownFile { path, size, inode, device, changed, crc, damaged_pages, content };
    match objection_to_file(&file) {
        None => Ok(file),
        Some(what) => Err(Flaw::Contradiction(what)),
    }
}

pub(super) fn encode_facts(facts: &StateFacts) -> Vec<u8> {
    let mut out = WireWriter::new();
    let (seconds, random) = facts.basebackup.parts();
    out.raw(facts.site.as_bytes()).u64(seconds).u16(random).raw(facts.backup_json.as_bytes());
    out.u64(facts.cluster.system_identifier.0).u32(facts.cluster.segment_size.bytes());
    out.u32(facts.timeline.get()).u64(facts.start_lsn.0).u64(facts.stop_lsn.0);
    put_time(&mut out, facts.started_at);
    out.u8(u8::from(facts.has_checksums)).raw(facts.sealing.as_bytes()).u32(facts.chunk_pages);
    out.raw(&*facts.hash_key.0).u32(facts.since_read_all);
    out.finish()
}

pub(super) fn decode_facts(payload: &[u8]) -> Result<StateFacts, Flaw> {
    let mut reader = WireReader::new(payload);
    let facts = StateFacts {
        site: Uuid::from_bytes(reader.array()?),
        basebackup: take_id(&mut reader)?,
        backup_json: Digest(reader.array()?),
        cluster: ClusterId {
            system_identifier: SystemIdentifier(reader.u64()?),
            segment_size: WalSegmentSize::new(reader.u32()?)
                .map_err(|_| WireError::Invalid { field: "segment size" })?,
        },
        timeline: TimelineId::new(reader.u32()?).ok_or(WireError::Invalid { field: "timeline" })?,
        start_lsn: Lsn(reader.u64()?),
        stop_lsn: Lsn(reader.u64()?),
        started_at: take_time(&mut reader)?,
        has_checksums: match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Err(WireError::Invalid { field: "checksum setting" }.into()),
        },
        sealing: Digest(reader.array()?),
        chunk_pages: reader.u32()?,
        hash_key: HashKey(Zeroizing::new(reader.array()?)),
        since_read_all: reader.u32()?,
    };
    reader.finish()?;
    Ok(facts)
}

fn take_id(reader: &mut WireReader<'_>) -> Result<BasebackupId, WireError> {
    BasebackupId::from_parts(reader.u64()?, reader.u16()?)
        .map_err(|_| WireError::Invalid { field: "basebackup id" })
}

fn take_path(reader: &mut WireReader<'_>) -> Result<TreePath, Flaw> {
    TreePath::new(reader.bytes()?).map_err(|_| WireError::Invalid { field: "path" }.into())
}

fn put_time(out: &mut WireWriter, time: Timestamp) {
    out.zigzag(time.as_second()).zigzag(i64::from(time.subsec_nanosecond()));
}

fn take_time(reader: &mut WireReader<'_>) -> Result<Timestamp, WireError> {
    let (seconds, nanoseconds) = (reader.zigzag()?, reader.zigzag()?);
    let nanoseconds = i32::try_from(nanoseconds).ok();
    nanoseconds
        .and_then(|nanoseconds| Timestamp::new(seconds, nanoseconds).ok())
        .ok_or(WireError::Invalid { field: "time" })
}
