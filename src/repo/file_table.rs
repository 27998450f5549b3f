//! Blocks of the file table: about a thousand entries each, children of one directory side by side.
//!
//! Entries ascend by directory, then by name, so that a directory's children are one run and a look-up is two
//! binary searches. A block names chunks by an index into a table of its own, and can be read alone.
//!
//! ```text
//! chunk table
//! directories: path, entry count, then for each entry
//!   name, kind and content tag, mode, modified (seconds zigzag, nanoseconds), and by tag
//!   directory | link: target | inline: bytes | part: size, chunk, at | map: size, extents
//!   | blocks: size, count, (chunk, at, length)…
//! ```

use bytes::Bytes;
use jiff::Timestamp;

use crate::repo::chunk::{ChunkRef, ChunkTableBuilder, decode_chunk_table};
use crate::repo::entry::{BlobRef, Content, Entry, INLINE_BYTES_MAX, Node, PATH_BYTES_MAX, TreePath};
use crate::repo::page_map::{MAP_BLOCK_BYTES, MapBlock, PAGE_SIZE};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// A block is closed when it has this many entries…
pub const BLOCK_ENTRIES_MAX: usize = 1024;
/// …or this many bytes, so that one look-up fetches little.
pub const BLOCK_BYTES_TARGET: usize = 64 << 10;

const DIRECTORY: u8 = 0;
const SYMLINK: u8 = 1;
const INLINE: u8 = 2;
const PART: u8 = 3;
const MAP: u8 = 4;
const BLOCKS: u8 = 5;
/// A file larger than this does not exist on Linux.
const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// Collects entries, in order, into one block.
#[derive(Debug, Default)]
pub struct FileTableBlockBuilder {
    chunks: ChunkTableBuilder,
    directories: Vec<(Vec<u8>, u32, WireWriter)>,
    entries: usize,
    bytes: usize,
}

impl FileTableBlockBuilder {
    /// Appends an entry, which sorts after all before it.
    pub fn push(&mut self, entry: &Entry) {
        let (dir, name) = entry.path.split();
        if self.directories.last().is_none_or(|(path, ..)| path != dir) {
            self.bytes += dir.len() + 4;
            self.directories.push((dir.to_vec(), 0, WireWriter::new()));
        }
        let (_, count, out) = self.directories.last_mut().expect("one was just pushed if there was none");
        *count += 1;
        let (before, chunks_before) = (out.len(), self.chunks.len());
        encode_entry(name, entry, &mut self.chunks, out);
        self.entries += 1;
        self.bytes += out.len() - before + (self.chunks.len() - chunks_before) * 8;
    }

    /// Returns whether the block should be closed.
    pub fn is_full(&self) -> bool {
        self.entries >= BLOCK_ENTRIES_MAX || self.bytes >= BLOCK_BYTES_TARGET
    }

    /// Returns how many entries the block has.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Returns whether the block has no entry.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Returns the block's bytes.
    pub fn finish(self) -> Vec<u8> {
        let mut out = WireWriter::new();
        self.chunks.encode(&mut out);
        out.varint(self.directories.len() as u64);
        for (path, count, entries) in self.directories {
            out.bytes(&path).varint(u64::from(count)).raw(&entries.finish());
        }
        out.finish()
    }
}

/// Takes a block apart.
pub fn decode_block(bytes: &[u8]) -> Result<Vec<Entry>, WireError> {
    let mut reader = WireReader::new(bytes);
    let chunks = decode_chunk_table(&mut reader)?;
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..reader.count("directory count")? {
        let dir = decode_path(&mut reader)?;
        for _ in 0..reader.count("entry count")? {
            // Each holds its directory's path, which the block has only once.
            if entries.len() == BLOCK_ENTRIES_MAX {
                return Err(WireError::Invalid { field: "entry count" });
            }
            let entry = decode_entry(&dir, &mut reader, &chunks)?;
            if entries.last().is_some_and(|last| last.path.split() >= entry.path.split()) {
                return Err(WireError::Invalid { field: "order of entries" });
            }
            entries.push(entry);
        }
    }
    reader.finish().map(|()| entries)
}

fn encode_entry(name: &[u8], entry: &Entry, chunks: &mut ChunkTableBuilder, out: &mut WireWriter) {
    let tag = match &entry.node {
        Node::Directory => DIRECTORY,
        Node::Symlink(_) => SYMLINK,
        Node::File { content, .. } => content_tag(content),
    };
    out.bytes(name).u8(tag).varint(u64::from(entry.mode));
    out.zigzag(entry.modified.as_second()).zigzag(i64::from(entry.modified.subsec_nanosecond()));
    match &entry.node {
        Node::Directory => {}
        Node::Symlink(target) => {
            out.bytes(target);
        }
        Node::File { size, content } => encode_content(*size, content, chunks, out),
    }
}

/// Returns how a content is told from others: what [`decode_content`] wants to know.
pub fn content_tag(content: &Content) -> u8 {
    match content {
        Content::Inline(_) => INLINE,
        Content::Part(_) => PART,
        Content::Map(_) => MAP,
        Content::Blocks(_) => BLOCKS,
    }
}

/// Appends where the `size` bytes of a file are, naming chunks by their index in `chunks`.
pub fn encode_content(size: u64, content: &Content, chunks: &mut ChunkTableBuilder, out: &mut WireWriter) {
    match content {
        Content::Inline(bytes) => {
            out.bytes(bytes);
        }
        Content::Part(blob) => {
            out.varint(size).varint(u64::from(chunks.index(&blob.chunk))).varint(u64::from(blob.at));
        }
        Content::Map(block) => {
            out.varint(size);
            block.encode_extents(chunks, out);
        }
        Content::Blocks(blobs) => {
            out.varint(size).varint(blobs.len() as u64);
            for blob in blobs {
                out.varint(u64::from(chunks.index(&blob.chunk)));
                out.varint(u64::from(blob.at)).varint(u64::from(blob.len));
            }
        }
    }
}

fn decode_entry(
    dir: &TreePath,
    reader: &mut WireReader<'_>,
    chunks: &[ChunkRef],
) -> Result<Entry, WireError> {
    let name = reader.bytes()?;
    if name.is_empty() || name.contains(&b'/') {
        return Err(WireError::Invalid { field: "name" });
    }
    let path = dir.join(name).map_err(|_| WireError::Invalid { field: "name" })?;
    let tag = reader.u8()?;
    let mode = reader.bounded("mode", 0o7777)? as u32;
    let (seconds, nanoseconds) = (reader.zigzag()?, reader.zigzag()?);
    let modified = i32::try_from(nanoseconds)
        .ok()
        .and_then(|nanoseconds| Timestamp::new(seconds, nanoseconds).ok())
        .ok_or(WireError::Invalid { field: "time" })?;
    let node = match tag {
        DIRECTORY => Node::Directory,
        SYMLINK => Node::Symlink(decode_target(reader)?),
        _ => {
            let (size, content) = decode_content(tag, reader, chunks)?;
            Node::File { size, content }
        }
    };
    Ok(Entry { path, mode, modified, node })
}

/// Takes the size of a file and where its bytes are, which fits the size.
pub fn decode_content(
    tag: u8,
    reader: &mut WireReader<'_>,
    chunks: &[ChunkRef],
) -> Result<(u64, Content), WireError> {
    if tag == INLINE {
        let bytes = reader.bytes()?;
        if bytes.len() > INLINE_BYTES_MAX {
            return Err(WireError::Invalid { field: "inline content" });
        }
        return Ok((bytes.len() as u64, Content::Inline(Bytes::copy_from_slice(bytes))));
    }
    let size = reader.bounded("file size", FILE_SIZE_MAX)?;
    let content = match tag {
        PART => {
            let len = u32::try_from(size).map_err(|_| WireError::Invalid { field: "file size" })?;
            Content::Part(decode_blob(reader, chunks, Some(len))?)
        }
        MAP => {
            let block = MapBlock::decode_extents(reader, chunks)?;
            if u64::from(block.page_count()) != size.div_ceil(PAGE_SIZE) {
                return Err(WireError::Invalid { field: "page count" });
            }
            Content::Map(Box::new(block))
        }
        BLOCKS => {
            let count = reader.count("map block count")?;
            if count as u64 != size.div_ceil(MAP_BLOCK_BYTES) {
                return Err(WireError::Invalid { field: "map block count" });
            }
            Content::Blocks((0..count).map(|_| decode_blob(reader, chunks, None)).collect::<Result<_, _>>()?)
        }
        _ => {
            return Err(WireError::Invalid { field: "kind of entry" });
        }
    };
    Ok((size, content))
}

fn decode_blob(
    reader: &mut WireReader<'_>,
    chunks: &[ChunkRef],
    len: Option<u32>,
) -> Result<BlobRef, WireError> {
    let index = reader.small("chunk index")?;
    let chunk = *chunks.get(index as usize).ok_or(WireError::Invalid { field: "chunk index" })?;
    let at = reader.bounded("position in chunk", u64::from(chunk.raw_len))? as u32;
    let len = match len {
        Some(len) => len,
        None => reader.small("length in chunk")?,
    };
    if len > chunk.raw_len - at {
        return Err(WireError::Invalid { field: "length in chunk" });
    }
    Ok(BlobRef { chunk, at, len })
}

fn decode_path(reader: &mut WireReader<'_>) -> Result<TreePath, WireError> {
    TreePath::new(reader.bytes()?).map_err(|_| WireError::Invalid { field: "path" })
}

fn decode_target(reader: &mut WireReader<'_>) -> Result<Vec<u8>, WireError> {
    let target = reader.bytes()?;
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
        return Err(WireError::Invalid { field: "link target" });
    }
    Ok(target.to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::codec::CodecId;
    use crate::repo::id::{BasebackupId, PackId};

    use super::*;

    fn chunk(n: u32) -> ChunkRef {
        ChunkRef {
            pack: PackId { origin: BasebackupId::from_parts(1, 2).unwrap(), number: n % 3 },
            position: n,
            offset: n * 1000,
            stored_len: 1000,
            raw_len: 65_536,
            codec: CodecId::Zstd,
            tag: None,
        }
    }

    fn node() -> impl Strategy<Value = Node> {
        prop_oneof![
            Just(Node::Directory),
            proptest::collection::vec(1u8.., 1..20).prop_map(Node::Symlink),
            proptest::collection::vec(any::<u8>(), 0..40).prop_map(|bytes| Node::File {
                size: bytes.len() as u64,
                content: Content::Inline(bytes.into())
            }),
            (0u32..30, 0u32..1000, 0u32..5000).prop_map(|(n, at, len)| Node::File {
                size: u64::from(len),
                content: Content::Part(BlobRef { chunk: chunk(n), at, len })
            }),
            proptest::collection::vec(0u32..30, 1..10).prop_map(|chunks| {
                let mut block = MapBlock::default();
                block.push_zero(3);
                chunks.iter().for_each(|n| block.push(chunk(*n), 2, 4));
                let size = u64::from(block.page_count()) * PAGE_SIZE - 100;
                Node::File { size, content: Content::Map(Box::new(block)) }
            }),
            (1u64..5).prop_map(|blocks| Node::File {
                size: blocks * MAP_BLOCK_BYTES - 8192,
                content: Content::Blocks(
                    (0..blocks).map(|n| BlobRef { chunk: chunk(n as u32), at: 7, len: 90 }).collect()
                )
            }),
        ]
    }

    fn entries() -> impl Strategy<Value = Vec<Entry>> {
        let name = proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'\n'), Just(0xff)], 1..4);
        let path =
            proptest::collection::vec(name, 1..4).prop_map(|parts| TreePath::new(parts.join(&b'/')).unwrap());
        let entry = (path, 0u32..0o7777, -5_000_000_000i64..5_000_000_000, 0i32..999_999_999, node());
        proptest::collection::vec(entry, 0..40).prop_map(|entries| {
            let mut entries: Vec<Entry> = entries
                .into_iter()
                .map(|(path, mode, seconds, nanos, node)| {
                    let nanos = if seconds < 0 { -nanos } else { nanos };
                    Entry { path, mode, modified: Timestamp::new(seconds, nanos).unwrap(), node }
                })
                .collect();
            entries.sort_by(|a, b| a.path.split().cmp(&b.path.split()));
            entries.dedup_by(|a, b| a.path == b.path);
            entries
        })
    }

    #[test]
    fn a_block_cannot_make_much_of_one_long_path() {
        let block = |entries: u32| {
            let mut builder = FileTableBlockBuilder::default();
            for n in 0..entries {
                let path = TreePath::new(format!("{}/{n:04}", "d".repeat(4000))).unwrap();
                let modified = Timestamp::UNIX_EPOCH;
                builder.push(&Entry { path, mode: 0o700, modified, node: Node::Directory });
            }
            builder.finish()
        };
        assert_eq!(decode_block(&block(1024)).unwrap().len(), 1024);
        assert_eq!(decode_block(&block(1025)), Err(WireError::Invalid { field: "entry count" }));
    }

    #[test]
    fn an_entry_without_a_name_is_refused() {
        // No packs, no chunks, one directory "" with one entry "": a directory of mode 0.
        let bytes = [0, 0, 1, 0, 1, 0, 0, 0, 0, 0];
        assert_eq!(decode_block(&bytes), Err(WireError::Invalid { field: "name" }));
    }

    proptest! {
        #[test]
        fn entries_come_back_as_they_were(entries in entries()) {
            let mut builder = FileTableBlockBuilder::default();
            entries.iter().for_each(|entry| builder.push(entry));
            prop_assert_eq!(decode_block(&builder.finish()).unwrap(), entries);
        }

        #[test]
        fn damaged_blocks_never_panic(entries in entries(), at: usize, flip in 1u8..) {
            let mut builder = FileTableBlockBuilder::default();
            entries.iter().for_each(|entry| builder.push(entry));
            let mut bytes = builder.finish();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let _ = decode_block(&bytes);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode_block(&bytes);
        }
    }
}
