//! The manifest of a basebackup: a sealed object of one start frame and the blocks of the file table.
//!
//! The start frame holds what every reader needs at once: which entries each block begins with, tablespaces,
//! links, and where the start-up set lies. A reader that looks for one file opens the head, the start frame and
//! one block, however many files there are.

use crate::codec::{Compression, Compressor};
use crate::repo::chunk::PACK_BYTES_MAX;
use crate::repo::entry::{Entry, PATH_BYTES_MAX, TreePath};
use crate::repo::error::Error;
use crate::repo::file_table::FileTableBlockBuilder;
use crate::repo::id::{BasebackupId, PackId};
use crate::repo::sealed::{CompressedFrame, FRAME_RAW_MAX};
use crate::repo::wire::{WireError, WireReader, WireWriter};

/// Everything a manifest says, before it is cut into frames.
#[derive(Debug, Default)]
pub struct ManifestContent {
    /// All entries, in any order.
    pub entries: Vec<Entry>,
    /// Tablespaces other than the built-in ones.
    pub tablespaces: Vec<Tablespace>,
    /// Links of the source that left PGDATA; their targets' content stands in place of them.
    pub links: Vec<OutsideLink>,
    /// Where the start-up set lies, in the order of worth.
    pub start_set: Vec<PackRange>,
}

/// A tablespace of the source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// Its oid, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Where it was; empty for an in-place tablespace, which is a directory of `pg_tblspc`.
    pub location: Vec<u8>,
    /// Its name in SQL.
    pub name: String,
}

/// A symbolic link of the source whose target was outside PGDATA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutsideLink {
    /// Where it was.
    pub path: TreePath,
    /// Where it pointed.
    pub target: Vec<u8>,
}

/// A run of bytes of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRange {
    /// The pack.
    pub pack: PackId,
    /// First byte.
    pub from: u32,
    /// Behind the last byte.
    pub to: u32,
}

/// The start frame.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ManifestStart {
    /// Blocks of the file table in order; block `n` is frame `n + 1`.
    pub blocks: Vec<BlockInfo>,
    /// Tablespaces other than the built-in ones.
    pub tablespaces: Vec<Tablespace>,
    /// Links of the source that left PGDATA.
    pub links: Vec<OutsideLink>,
    /// Where the start-up set lies.
    pub start_set: Vec<PackRange>,
}

/// Which entries a block of the file table holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockInfo {
    /// Path of its first entry.
    pub first: TreePath,
    /// Number of its first entry among all entries.
    pub first_number: u64,
    /// How many entries it has.
    pub entries: u32,
}

impl ManifestContent {
    /// Sorts the entries and cuts everything into compressed frames, the start frame first.
    pub fn into_frames(mut self, compression: Compression) -> Result<Vec<CompressedFrame>, Error> {
        self.entries.sort_by(|a, b| a.path.split().cmp(&b.path.split()));
        let mut compressor = Compressor::new(compression);
        let mut start = ManifestStart {
            blocks: Vec::new(),
            tablespaces: self.tablespaces,
            links: self.links,
            start_set: self.start_set,
        };
        let mut frames = Vec::new();
        let mut block = FileTableBlockBuilder::default();
        let mut first_number = 0;
        for (number, entry) in self.entries.iter().enumerate() {
            if block.is_empty() {
                first_number = number;
            }
            block.push(entry);
            if block.is_full() || number + 1 == self.entries.len() {
                let first = self.entries[first_number].path.clone();
                start.blocks.push(BlockInfo {
                    first,
                    first_number: first_number as u64,
                    entries: block.len() as u32,
                });
                frames
                    .push(CompressedFrame::compress(&mut compressor, &std::mem::take(&mut block).finish())?);
            }
        }
        let raw = start.encode();
        if raw.len() > FRAME_RAW_MAX {
            let what = "the start frame of the manifest".to_owned();
            return Err(Error::TooLarge { what, size: raw.len() as u64, max: FRAME_RAW_MAX as u64 });
        }
        frames.insert(0, CompressedFrame::compress(&mut compressor, &raw)?);
        Ok(frames)
    }
}

impl ManifestStart {
    /// Returns the block that `path` is in if it is anywhere.
    pub fn block_of(&self, path: &TreePath) -> Option<usize> {
        let after = self.blocks.partition_point(|block| block.first.split() <= path.split());
        after.checked_sub(1)
    }

    /// Returns the blocks that children of `dir` may be in.
    pub fn blocks_of_children(&self, dir: &TreePath) -> std::ops::Range<usize> {
        let dir = dir.as_bytes();
        let from = self.blocks.partition_point(|block| block.first.split() < (dir, b"")).saturating_sub(1);
        let to = self.blocks.partition_point(|block| block.first.split().0 <= dir);
        from..to.max(from)
    }

    /// Returns the block that holds entry `number`.
    pub fn block_of_number(&self, number: u64) -> Option<usize> {
        let after = self.blocks.partition_point(|block| block.first_number <= number);
        let at = after.checked_sub(1)?;
        let block = &self.blocks[at];
        (number - block.first_number < u64::from(block.entries)).then_some(at)
    }

    /// Returns how many entries there are in all.
    pub fn entry_count(&self) -> u64 {
        self.blocks.last().map_or(0, |block| block.first_number + u64::from(block.entries))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = WireWriter::new();
        out.varint(self.blocks.len() as u64);
        for block in &self.blocks {
            out.bytes(block.first.as_bytes()).varint(u64::from(block.entries));
        }
        out.varint(self.tablespaces.len() as u64);
        for tablespace in &self.tablespaces {
            out.varint(u64::from(tablespace.oid))
                .bytes(&tablespace.location)
                .bytes(tablespace.name.as_bytes());
        }
        out.varint(self.links.len() as u64);
        for link in &self.links {
            out.bytes(link.path.as_bytes()).bytes(&link.target);
        }
        out.varint(self.start_set.len() as u64);
        for range in &self.start_set {
            let (seconds, random) = range.pack.origin.parts();
            out.varint(seconds).u16(random).varint(u64::from(range.pack.number));
            out.varint(u64::from(range.from)).varint(u64::from(range.to - range.from));
        }
        out.finish()
    }

    /// Takes the start frame apart.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = WireReader::new(bytes);
        let mut start = Self::default();
        let mut first_number = 0u64;
        for _ in 0..reader.count("block count")? {
            let first = decode_path(&mut reader)?;
            let entries = reader.small("entry count")?;
            if entries == 0 || start.blocks.last().is_some_and(|last| last.first.split() >= first.split()) {
                return Err(WireError::Invalid { field: "order of blocks" });
            }
            start.blocks.push(BlockInfo { first, first_number, entries });
            first_number += u64::from(entries);
        }
        for _ in 0..reader.count("tablespace count")? {
            let oid = reader.small("tablespace oid")?;
            let location = reader.bytes()?.to_vec();
            let name = String::from_utf8_lossy(reader.bytes()?).into_owned();
            if location.len() > PATH_BYTES_MAX || location.contains(&0) {
                return Err(WireError::Invalid { field: "tablespace location" });
            }
            start.tablespaces.push(Tablespace { oid, location, name });
        }
        for _ in 0..reader.count("link count")? {
            let path = decode_path(&mut reader)?;
            start.links.push(OutsideLink { path, target: reader.bytes()?.to_vec() });
        }
        for _ in 0..reader.count("start-up range count")? {
            start.start_set.push(decode_range(&mut reader)?);
        }
        reader.finish().map(|()| start)
    }
}

fn decode_path(reader: &mut WireReader<'_>) -> Result<TreePath, WireError> {
    TreePath::new(reader.bytes()?).map_err(|_| WireError::Invalid { field: "path" })
}

fn decode_range(reader: &mut WireReader<'_>) -> Result<PackRange, WireError> {
    let (seconds, random) = (reader.varint()?, reader.u16()?);
    let origin = BasebackupId::from_parts(seconds, random)
        .map_err(|_| WireError::Invalid { field: "basebackup id" })?;
    let number = reader.small("pack number")?;
    let from = reader.bounded("start of range", u64::from(PACK_BYTES_MAX))? as u32;
    let len = reader.bounded("length of range", u64::from(PACK_BYTES_MAX - from))? as u32;
    Ok(PackRange { pack: PackId { origin, number }, from, to: from + len })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::codec::{CodecId, Decompressor};
    use crate::repo::entry::Node;
    use crate::repo::file_table::decode_block;

    use super::*;

    fn directory(path: &str) -> Entry {
        let modified = jiff::Timestamp::UNIX_EPOCH;
        Entry { path: TreePath::new(path).unwrap(), mode: 0o700, modified, node: Node::Directory }
    }

    fn raw(frame: &CompressedFrame) -> Vec<u8> {
        Decompressor::new().decompress(frame.codec, &frame.body, frame.raw_len as usize).unwrap()
    }

    #[test]
    fn every_path_and_every_child_is_found_through_the_start_frame() {
        let mut entries = vec![directory("data"), directory("data/base"), directory("data/global")];
        for database in 0..7 {
            entries.push(directory(&format!("data/base/{database}")));
            entries.extend((0..600).map(|n| directory(&format!("data/base/{database}/{n}"))));
        }
        let content = ManifestContent { entries: entries.clone(), ..ManifestContent::default() };
        let compression = Compression { algorithm: CodecId::Zstd, level: 3 };
        let frames = content.into_frames(compression).unwrap();
        let start = ManifestStart::decode(&raw(&frames[0])).unwrap();
        assert!(start.blocks.len() > 3);
        assert_eq!(start.entry_count(), entries.len() as u64);
        let blocks: Vec<Vec<Entry>> =
            frames[1..].iter().map(|frame| decode_block(&raw(frame)).unwrap()).collect();
        for entry in &entries {
            let block = &blocks[start.block_of(&entry.path).unwrap()];
            assert!(block.contains(entry), "{}", entry.path);
            let mut children: Vec<&Entry> = Vec::new();
            for n in start.blocks_of_children(&entry.path) {
                children.extend(blocks[n].iter().filter(|e| e.path.split().0 == entry.path.as_bytes()));
            }
            let expected = entries.iter().filter(|e| e.path.split().0 == entry.path.as_bytes()).count();
            assert_eq!(children.len(), expected, "{}", entry.path);
        }
        assert_eq!(start.block_of_number(0), Some(0));
        assert_eq!(start.block_of_number(entries.len() as u64), None);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = ManifestStart::decode(&bytes);
        }
    }
}
