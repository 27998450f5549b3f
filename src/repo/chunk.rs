//! Where a chunk lies, and how tables of chunks stand in map blocks and file-table blocks.
//!
//! A chunk is named absolutely, by the basebackup that wrote its pack, so a block that names it can be kept and
//! referenced by every later basebackup. Tables are delta-coded: chunks of one file mostly follow each other in
//! one pack, and then cost about four bytes each. The offset stands beside the position, so that reading a page
//! needs no table of the pack (decision 0002).

use std::collections::HashMap;

use crate::codec::{CodecId, TAG_LEN};
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// The largest raw chunk. Data chunks hold up to 16 pages; map chunks may be larger.
pub const CHUNK_RAW_MAX: u32 = 1 << 20;
/// The largest pack, so that one PUT and one buffer hold it.
pub const PACK_BYTES_MAX: u32 = 32 << 20;

/// One sealed chunk in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkRef {
    /// The pack that holds it.
    pub pack: PackId,
    /// Counts from 0 in the pack; the nonce.
    pub position: u32,
    /// First byte in the pack.
    pub offset: u32,
    /// Bytes in the pack, tag included.
    pub stored_len: u32,
    /// Bytes after decompression.
    pub raw_len: u32,
    /// How it is compressed.
    pub codec: CodecId,
    /// Its tag where no cipher vouches for it: the table then pins the content.
    pub tag: Option<[u8; TAG_LEN]>,
}

/// Collects the chunks that a block names and gives each an index.
#[derive(Debug, Default)]
pub struct ChunkTableBuilder {
    chunks: Vec<ChunkRef>,
    indexes: HashMap<(PackId, u32), u32>,
}

impl ChunkTableBuilder {
    /// Returns the index of `chunk` in this table.
    pub fn index(&mut self, chunk: &ChunkRef) -> u32 {
        *self.indexes.entry((chunk.pack, chunk.position)).or_insert_with(|| {
            self.chunks.push(*chunk);
            self.chunks.len() as u32 - 1
        })
    }

    /// Returns how many chunks the table has.
    pub fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Returns whether no chunk has been named.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Appends the table.
    pub fn encode(&self, out: &mut WireWriter) {
        let mut packs: Vec<PackId> = Vec::new();
        let mut pack_indexes = HashMap::new();
        for chunk in &self.chunks {
            pack_indexes.entry(chunk.pack).or_insert_with(|| {
                packs.push(chunk.pack);
                packs.len() as u64 - 1
            });
        }
        out.varint(packs.len() as u64);
        for pack in &packs {
            let (seconds, random) = pack.origin.parts();
            out.varint(seconds).u16(random).varint(u64::from(pack.number));
        }
        out.varint(self.chunks.len() as u64);
        let mut previous = Cursor::default();
        for chunk in &self.chunks {
            let pack = pack_indexes[&chunk.pack];
            let expected = previous.expected(pack);
            out.varint(pack)
                .zigzag(i64::from(chunk.position) - expected.position)
                .zigzag(i64::from(chunk.offset) - expected.offset)
                .varint(u64::from(chunk.stored_len))
                .varint(u64::from(chunk.raw_len))
                .u8(chunk.codec as u8 | if chunk.tag.is_some() { HAS_TAG } else { 0 });
            if let Some(tag) = &chunk.tag {
                out.raw(tag);
            }
            previous = Cursor::after(pack, chunk);
        }
    }
}

/// What a pack takes in a table at least: seconds, digits, number.
const PACK_BYTES_MIN: usize = 4;
/// What a chunk takes at least: six fields, each of a byte.
const CHUNK_BYTES_MIN: usize = 6;

/// Takes a table of chunks.
pub fn decode_chunk_table(reader: &mut WireReader<'_>) -> Result<Vec<ChunkRef>, WireError> {
    let count = reader.count_of("pack count", PACK_BYTES_MIN)?;
    let mut packs = Vec::with_capacity(count);
    for _ in 0..count {
        let (seconds, random) = (reader.varint()?, reader.u16()?);
        let origin = BasebackupId::from_parts(seconds, random)
            .map_err(|_| WireError::Invalid { field: "basebackup id" })?;
        packs.push(PackId { origin, number: reader.small("pack number")? });
    }
    let count = reader.count_of("chunk count", CHUNK_BYTES_MIN)?;
    let mut chunks = Vec::with_capacity(count);
    let mut previous = Cursor::default();
    for _ in 0..count {
        let index = reader.varint()?;
        let pack = *packs
            .get(usize::try_from(index).unwrap_or(usize::MAX))
            .ok_or(WireError::Invalid { field: "pack index" })?;
        let expected = previous.expected(index);
        let position = in_pack(expected.position, reader.zigzag()?, "chunk position")?;
        let offset = in_pack(expected.offset, reader.zigzag()?, "chunk offset")?;
        let stored_len = reader.bounded("stored length", u64::from(PACK_BYTES_MAX - offset))? as u32;
        let raw_len = reader.bounded("raw length", u64::from(CHUNK_RAW_MAX))? as u32;
        let flags = reader.u8()?;
        let codec = CodecId::try_from(flags & !HAS_TAG).map_err(|_| WireError::Invalid { field: "codec" })?;
        let tag = if flags & HAS_TAG != 0 { Some(reader.array()?) } else { None };
        if (stored_len as usize) < TAG_LEN {
            return Err(WireError::Invalid { field: "stored length" });
        }
        let chunk = ChunkRef { pack, position, offset, stored_len, raw_len, codec, tag };
        previous = Cursor::after(index, &chunk);
        chunks.push(chunk);
    }
    Ok(chunks)
}

const HAS_TAG: u8 = 0x80;

/// What the next chunk is expected to be, so that only surprises cost bytes.
#[derive(Default, Clone, Copy)]
struct Cursor {
    pack: Option<u64>,
    position: i64,
    offset: i64,
}

impl Cursor {
    fn expected(self, pack: u64) -> Self {
        if self.pack == Some(pack) { self } else { Self::default() }
    }

    fn after(pack: u64, chunk: &ChunkRef) -> Self {
        Self {
            pack: Some(pack),
            position: i64::from(chunk.position) + 1,
            offset: i64::from(chunk.offset) + i64::from(chunk.stored_len),
        }
    }
}

fn in_pack(expected: i64, delta: i64, field: &'static str) -> Result<u32, WireError> {
    expected
        .checked_add(delta)
        .and_then(|value| u32::try_from(value).ok())
        .filter(|value| *value <= PACK_BYTES_MAX)
        .ok_or(WireError::Invalid { field })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunk() -> impl Strategy<Value = ChunkRef> {
        (
            0u64..4,
            0u32..3,
            0u32..1000,
            0u32..1 << 24,
            16u32..70_000,
            0u32..70_000,
            0u8..4,
            any::<Option<[u8; 16]>>(),
        )
            .prop_map(|(seconds, number, position, offset, stored_len, raw_len, codec, tag)| {
                ChunkRef {
                    pack: PackId { origin: BasebackupId::from_parts(seconds, 7).unwrap(), number },
                    position,
                    offset,
                    stored_len,
                    raw_len,
                    codec: CodecId::try_from(codec).unwrap(),
                    tag,
                }
            })
    }

    proptest! {
        #[test]
        fn a_table_comes_back_as_it_was_built(chunks in proptest::collection::vec(chunk(), 0..50)) {
            let mut builder = ChunkTableBuilder::default();
            let indexes: Vec<u32> = chunks.iter().map(|chunk| builder.index(chunk)).collect();
            let mut out = WireWriter::new();
            builder.encode(&mut out);
            let bytes = out.finish();
            let mut reader = WireReader::new(&bytes);
            let table = decode_chunk_table(&mut reader).unwrap();
            reader.finish().unwrap();
            for (chunk, index) in chunks.iter().zip(indexes) {
                let found = table[index as usize];
                prop_assert_eq!((found.pack, found.position), (chunk.pack, chunk.position));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode_chunk_table(&mut WireReader::new(&bytes));
        }
    }

    #[test]
    fn chunks_that_follow_each_other_are_cheap() {
        let mut builder = ChunkTableBuilder::default();
        let origin = "20261120T101500Z-3fa9".parse().unwrap();
        for position in 0..1000 {
            let chunk = ChunkRef {
                pack: PackId { origin, number: 1 },
                position,
                offset: 100 + position * 20_000,
                stored_len: 20_000,
                raw_len: 65_536,
                codec: CodecId::Zstd,
                tag: None,
            };
            builder.index(&chunk);
        }
        let mut out = WireWriter::new();
        builder.encode(&mut out);
        assert!(out.len() < 11 * 1000, "{}", out.len());
    }
}
