//! What is done with the bytes of received files on the CPU pool: checked, summed up, compressed.
//!
//! The bytes are at hand, so nothing here reads. The server verifies checksums while it reads and reads a page again
//! that it caught half written; a page that is wrong here was wrong for it as well.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::plan::SMALL_FILE_BYTES;
use crate::backup::read_pages::{PageRun, compress, compress_pages};
use crate::backup::read_small::{INLINE_BYTES, SmallFile, SmallFiles, SmallPlace};
use crate::backup::source_file::FileState;
use crate::codec::Compression;
use crate::pg::{Crc32c, Lsn, PageVerdict, RelationFile, RelationMap, page};
use crate::repo::page_map::PAGE_SIZE;

use super::error::StreamError;

/// Where what was worked on is to stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// With what a start needs.
    StartSet,
    /// With everything else.
    Rest,
}

/// Some bytes to be worked on.
#[derive(Debug)]
pub enum Work {
    /// Small files of one compartment.
    Together { lane: Lane, files: Vec<ReceivedFile> },
    /// The next bytes of a large file.
    Pages { lane: Lane, number: usize, file: Arc<SourceFile>, range: Range<u64>, raw: Vec<u8>, last: bool },
}

/// A small file that came whole.
#[derive(Debug)]
pub struct ReceivedFile {
    /// Where it stands, and what it is.
    pub file: SourceFile,
    /// Its bytes.
    pub raw: Vec<u8>,
}

/// What became of it.
#[derive(Debug)]
pub enum Done {
    Together { lane: Lane, files: Vec<SourceFile>, together: SmallFiles },
    Pages { lane: Lane, number: usize, file: Arc<SourceFile>, run: PageRun, expected: u64, last: bool },
}

/// What all work shares.
#[derive(Debug)]
pub struct WorkContext {
    /// How chunks are compressed.
    pub compression: Compression,
    /// Judges pages; none where the cluster has no checksums.
    pub page_judge: Option<PageJudge>,
}

/// Judges pages of relations by their checksums.
#[derive(Debug, Clone, Copy)]
pub struct PageJudge {
    /// Pages from here on were written since the backup began.
    pub start_lsn: Lsn,
    /// Pages of a relation's file.
    pub segment_pages: u32,
}

const RELATION_MAP: &[u8] = b"pg_filenode.map";

impl Work {
    /// Does it.
    pub fn execute(self, context: &WorkContext) -> Result<Done, Error> {
        match self {
            Self::Together { lane, files } => {
                let (files, together) = pack_together(files, context)?;
                Ok(Done::Together { lane, files, together })
            }
            Self::Pages { lane, number, file, range, raw, last } => {
                let damaged = context.damaged(&file, range.start, &raw);
                let mut run = compress_pages(&raw, context.compression)?;
                (run.state, run.damaged) = (Some(state_of(&file)), damaged);
                let expected = range.end - range.start;
                Ok(Done::Pages { lane, number, file, run, expected, last })
            }
        }
    }
}

impl WorkContext {
    fn damaged(&self, file: &SourceFile, offset: u64, raw: &[u8]) -> Vec<u32> {
        match (&self.page_judge, file.relation()) {
            (Some(judge), Some(relation)) => judge.damaged(&relation, offset, raw),
            _ => Vec::new(),
        }
    }
}

impl PageJudge {
    /// Returns the blocks that are damaged among the whole pages of `raw`, which stand at `offset` of their file.
    fn damaged(&self, relation: &RelationFile, offset: u64, raw: &[u8]) -> Vec<u32> {
        let Some(first) = relation.first_page(self.segment_pages) else {
            return Vec::new();
        };
        let (pages, _) = raw.as_chunks::<{ PAGE_SIZE as usize }>();
        let numbered = (offset / PAGE_SIZE..).zip(pages).map_while(|(number, page)| {
            Some((u32::try_from(number).ok().and_then(|number| first.checked_add(number))?, page))
        });
        let is_wrong = |page: &[u8], block: u32| {
            matches!(page::verify(page, block, self.start_lsn), PageVerdict::Mismatch { .. })
        };
        numbered.filter(|(block, page)| is_wrong(&page[..], *block)).map(|(block, _)| block).collect()
    }
}

/// Returns what a file was when the server read it.
pub fn state_of(file: &SourceFile) -> FileState {
    FileState { size: file.size, mode: file.mode, modified: file.modified }
}

/// Puts small files side by side into chunks, the tiniest into the file table.
fn pack_together(
    received: Vec<ReceivedFile>,
    context: &WorkContext,
) -> Result<(Vec<SourceFile>, SmallFiles), Error> {
    let mut together = SmallFiles::default();
    let mut files = Vec::with_capacity(received.len());
    let mut gathered: Vec<u8> = Vec::new();
    for (number, ReceivedFile { file, raw }) in received.into_iter().enumerate() {
        if file.path.split().1 == RELATION_MAP {
            RelationMap::parse(&raw).map_err(|error| {
                StreamError::Torn { path: file.path.to_string(), detail: error.to_string() }
            })?;
        }
        let damaged = context.damaged(&file, 0, &raw);
        let (len, crc) = (raw.len() as u32, Crc32c::of(&raw));
        let place = if raw.len() <= INLINE_BYTES {
            SmallPlace::Inline(Bytes::from(raw))
        } else {
            if !gathered.is_empty() && (gathered.len() + raw.len()) as u64 > SMALL_FILE_BYTES {
                together.frames.push(compress(&gathered, context.compression)?);
                gathered.clear();
            }
            let at = gathered.len() as u32;
            gathered.extend_from_slice(&raw);
            SmallPlace::Chunk { frame: together.frames.len(), at }
        };
        together.files.push(SmallFile { number, state: state_of(&file), len, crc, place, damaged });
        files.push(file);
    }
    if !gathered.is_empty() {
        together.frames.push(compress(&gathered, context.compression)?);
    }
    Ok((files, together))
}
