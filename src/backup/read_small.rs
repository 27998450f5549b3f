//! Several small files of one compartment, read and compressed together.
//!
//! The work of one job on the CPU pool. The tiniest files go into the file table itself; one that is as it was is named
//! where it stands. A file may have grown since the walk: a relation is read as far as it went then, because what came
//! later is in the WAL; any other file is read as it is, for it may have been replaced, up to [`GROWN_BYTES_MAX`].

use std::io;
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::gather::compress;
use crate::backup::plan::SMALL_FILE_BYTES;
use crate::backup::read_pages::JobContext;
use crate::backup::source_file::{FileState, OpenFile};
use crate::backup::state::{KnownContent, PageHash};
use crate::codec::Compression;
use crate::pg::{Crc32c, RelationMap};
use crate::repo::{CompressedFrame, entry::BlobRef, page_map::PAGE_SIZE};

/// Files that were read together.
#[derive(Debug, Default)]
pub struct SmallFiles {
    /// Those that were there, in order.
    pub files: Vec<SmallFile>,
    /// The chunks that hold them.
    pub frames: Vec<CompressedFrame>,
    /// How many had vanished.
    pub vanished: u64,
    /// Pages of those that are not as they were.
    pub changed: u64,
    /// Pages of those that are, and are stored again all the same.
    pub stored_again: u64,
}

/// A small file.
#[derive(Debug)]
pub struct SmallFile {
    /// Its index among the files of the walk.
    pub number: usize,
    /// What it was when it was opened.
    pub state: FileState,
    /// Bytes that were read.
    pub len: u32,
    /// CRC of them.
    pub crc: Crc32c,
    /// Their hash; none without a key.
    pub hash: Option<PageHash>,
    /// Where they stand.
    pub place: SmallPlace,
    /// Blocks whose checksum is wrong.
    pub damaged: Vec<u32>,
}

/// Where a small file stands.
#[derive(Debug)]
pub enum SmallPlace {
    /// In the file table.
    Inline(Bytes),
    /// In this new chunk, from this byte on.
    Chunk { frame: usize, at: u32 },
    /// Where an earlier basebackup stored them.
    Known(BlobRef),
}

/// A file up to this size costs less in the file table than a reference to it.
pub const INLINE_BYTES: usize = 64;
/// What a small file that is no relation may have grown to; more of it is left for the next backup.
pub const GROWN_BYTES_MAX: u64 = 512 << 10;
const RELATION_MAP: &[u8] = b"pg_filenode.map";
/// A server up to 15 overwrites the map in place: half of it may be seen, but not for long.
const MAP_WAITS: [Duration; 4] = [
    Duration::from_millis(1),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(500),
];

/// Reads `files`, given with their numbers; `again`: they are stored, whatever is known of them.
pub fn read_small(
    files: &[(usize, SourceFile)],
    again: bool,
    context: &JobContext,
) -> Result<SmallFiles, Error> {
    let options = context.gathering(again);
    let mut together = SmallFiles::default();
    let mut gathered: Vec<u8> = Vec::new();
    for (number, file) in files {
        let Some((state, raw, damaged)) = read_one(file, context)? else {
            together.vanished += 1;
            continue;
        };
        let (len, crc) = (raw.len() as u32, Crc32c::of(&raw));
        let hash = options.hash_key.as_ref().map(|key| key.hash(&raw));
        let before = known_place(file, &raw, hash, context);
        let pages = u64::from(len).div_ceil(PAGE_SIZE);
        let place = if raw.len() <= INLINE_BYTES {
            together.changed += if before.is_none() { pages } else { 0 };
            SmallPlace::Inline(raw.into())
        } else if let Some(Before::At(blob)) = before
            && !options.again.includes(blob.chunk.pack)
        {
            SmallPlace::Known(blob)
        } else {
            *if before.is_some() { &mut together.stored_again } else { &mut together.changed } += pages;
            together.place(&raw, file, &mut gathered, context.compression)?
        };
        together.files.push(SmallFile { number: *number, state, len, crc, hash, place, damaged });
    }
    if !gathered.is_empty() {
        together.frames.push(compress(&gathered, context.compression)?);
    }
    Ok(together)
}

impl SmallFiles {
    /// Places a file behind those that are gathered for the next chunk, which is made first where it would grow too large.
    pub fn place(
        &mut self,
        raw: &[u8],
        file: &SourceFile,
        gathered: &mut Vec<u8>,
        compression: Compression,
    ) -> Result<SmallPlace, Error> {
        let mut at = begins_at(gathered.len(), file);
        if at > 0 && (at + raw.len()) as u64 > SMALL_FILE_BYTES {
            self.frames.push(compress(gathered, compression)?);
            gathered.clear();
            at = 0;
        }
        gathered.resize(at, 0);
        gathered.extend_from_slice(raw);
        Ok(SmallPlace::Chunk { frame: self.frames.len(), at: at as u32 })
    }
}

/// Returns where a file begins in a chunk that has so many bytes: a relation at a page, so that each of its pages can be
/// named by itself.
fn begins_at(gathered: usize, file: &SourceFile) -> usize {
    if file.relation().is_some() { gathered.next_multiple_of(PAGE_SIZE as usize) } else { gathered }
}

/// Where the bytes of a small file stood that are still the same.
enum Before {
    Inline,
    At(BlobRef),
}

/// Looks up whether a file held the same bytes in the basebackup that is built upon.
fn known_place(
    file: &SourceFile,
    raw: &[u8],
    hash: Option<PageHash>,
    context: &JobContext,
) -> Option<Before> {
    match context.parent.as_ref()?.file(&file.path)?.content {
        KnownContent::Inline(bytes) => (bytes == raw).then_some(Before::Inline),
        KnownContent::Part { blob, hash: known } => {
            (Some(known) == hash && blob.len as usize == raw.len()).then_some(Before::At(blob))
        }
        KnownContent::Pages { .. } => None,
    }
}

/// Returns how much of a small file is read, given its size at the walk and now.
fn readable(is_relation: bool, walked: u64, now: u64) -> u64 {
    if is_relation { now.min(walked) } else { now.min(walked.max(GROWN_BYTES_MAX)) }
}

type ReadFile = (FileState, Vec<u8>, Vec<u32>);

fn read_one(file: &SourceFile, context: &JobContext) -> Result<Option<ReadFile>, Error> {
    let path = context.source.path(file);
    let mut waits = MAP_WAITS.iter();
    loop {
        let open = match context.source.open(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(Error::reading("open", &path))?,
        };
        let read = read_open(file, &*open, context).map_err(Error::reading("read", &path))?;
        if file.path.split().1 != RELATION_MAP {
            return Ok(Some(read));
        }
        match (RelationMap::parse(&read.1), waits.next()) {
            (Ok(_), _) => return Ok(Some(read)),
            (Err(_), Some(wait)) => thread::sleep(*wait),
            (Err(error), None) => {
                return Err(Error::reading("use", &path)(io::Error::new(io::ErrorKind::InvalidData, error)));
            }
        }
    }
}

fn read_open(file: &SourceFile, open: &dyn OpenFile, context: &JobContext) -> io::Result<ReadFile> {
    let state = open.state()?;
    let relation = file.relation();
    let mut raw = vec![0; readable(relation.is_some(), file.size, state.size) as usize];
    let count = open.read_at(0, &mut raw)?;
    raw.truncate(count);
    let damaged = match (&relation, &context.page_check) {
        (Some(relation), Some(check)) => check.check(relation, open, 0, &mut raw)?,
        _ => Vec::new(),
    };
    open.done_with(0..raw.len() as u64);
    Ok((state, raw, damaged))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relation_is_read_as_far_as_it_went_and_others_as_they_are() {
        assert_eq!(readable(true, 8192, 16_384), 8192);
        assert_eq!(readable(true, 8192, 0), 0);
        assert_eq!(readable(false, 100, 300), 300);
        assert_eq!(readable(false, 100, 20), 20);
        assert_eq!(readable(false, 100, 1 << 30), GROWN_BYTES_MAX);
    }
}
