//! A run of pages of one file: read, checked, and compressed into chunks of eight.
//!
//! The work of one job on the CPU pool. A page that is all zero takes no chunk; the others are gathered in order.
//! Checksum, CRC and compression see the same buffer, so a page that is torn while it is read is stored exactly as
//! it was summed up, and replay mends it. The file is opened by the first of its jobs and closed by the last.

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::page_check::PageCheck;
use crate::backup::source_file::{FileState, OpenFile, Source};
use crate::codec::{Compression, Compressor};
use crate::pg::{Crc32c, RelationFile};
use crate::repo::{self, CompressedFrame, page_map::PAGE_SIZE};

/// Bytes that one job reads: enough to make a job worth its hand-over, few enough for many of them in flight.
pub const JOB_BYTES: u64 = 512 << 10;
/// Pages gathered in one chunk.
const CHUNK_PAGES: usize = 8;
const PAGE: usize = PAGE_SIZE as usize;

/// What all jobs of a copy share.
#[derive(Debug)]
pub struct JobContext {
    /// Where files are opened.
    pub source: Arc<dyn Source>,
    /// Judges pages of relations; none where the cluster has no checksums.
    pub page_check: Option<PageCheck>,
    /// How chunks are compressed.
    pub compression: Compression,
}

/// A file that is read by several jobs.
#[derive(Debug)]
pub struct LargeFile {
    /// Its index among the files of the walk.
    pub number: usize,
    file: SourceFile,
    relation: Option<RelationFile>,
    opened: OnceLock<Opened>,
}

#[derive(Debug)]
enum Opened {
    Open(Box<dyn OpenFile>, FileState),
    Vanished,
    Failed(io::ErrorKind, String),
}

/// What became of a run of pages.
#[derive(Debug)]
pub struct PageRun {
    /// What the file was when it was opened; none where it had vanished.
    pub state: Option<FileState>,
    /// Bytes that were read; fewer than asked for where the file ends.
    pub bytes: u64,
    /// CRC of them.
    pub crc: Crc32c,
    /// The pages in order: where each stands.
    pub pages: Vec<PagePlace>,
    /// The chunks they stand in.
    pub frames: Vec<CompressedFrame>,
    /// Blocks whose checksum is wrong.
    pub damaged: Vec<u32>,
}

/// Where a page of a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagePlace {
    /// Nowhere: it is all zero.
    Zero,
    /// In this chunk of the run, at this slot.
    Chunk { frame: usize, slot: u32 },
}

impl LargeFile {
    /// Prepares a file; nothing is opened yet.
    pub fn new(number: usize, file: SourceFile) -> Self {
        let relation = file.relation();
        Self { number, file, relation, opened: OnceLock::new() }
    }

    /// Reads the bytes of `range`, which begins at a page.
    pub fn read(&self, range: Range<u64>, context: &JobContext) -> Result<PageRun, Error> {
        let path = || context.source.path(&self.file);
        let (open, state) = match self.opened.get_or_init(|| open(&*context.source, &self.file)) {
            Opened::Open(open, state) => (&**open, *state),
            Opened::Vanished => return Ok(PageRun::nothing(None)),
            Opened::Failed(kind, text) => {
                return Err(Error::reading("open", &path())(io::Error::new(*kind, text.clone())));
            }
        };
        let mut buffer = vec![0; (range.end - range.start) as usize];
        let count = open.read_at(range.start, &mut buffer).map_err(Error::reading("read", &path()))?;
        buffer.truncate(count);
        let mut damaged = Vec::new();
        if let (Some(relation), Some(check)) = (&self.relation, &context.page_check) {
            damaged = check
                .check(relation, open, range.start, &mut buffer)
                .map_err(Error::reading("read", &path()))?;
        }
        open.done_with(range);
        let mut run = compress_pages(&buffer, context.compression)?;
        (run.state, run.damaged) = (Some(state), damaged);
        Ok(run)
    }
}

impl PageRun {
    fn nothing(state: Option<FileState>) -> Self {
        let (pages, frames, damaged) = (Vec::new(), Vec::new(), Vec::new());
        Self { state, bytes: 0, crc: Crc32c::default(), pages, frames, damaged }
    }
}

fn open(source: &dyn Source, file: &SourceFile) -> Opened {
    let opened = source.open(file).and_then(|open| {
        let state = open.state()?;
        Ok((open, state))
    });
    match opened {
        Ok((open, state)) => Opened::Open(open, state),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Opened::Vanished,
        Err(error) => Opened::Failed(error.kind(), error.to_string()),
    }
}

/// Gathers the pages of `raw` that are not all zero into chunks; only the last page may be short.
pub fn compress_pages(raw: &[u8], compression: Compression) -> Result<PageRun, Error> {
    let mut run = PageRun { bytes: raw.len() as u64, crc: Crc32c::of(raw), ..PageRun::nothing(None) };
    let mut gathered: Vec<u8> = Vec::with_capacity(CHUNK_PAGES * PAGE);
    for page in raw.chunks(PAGE) {
        if is_zero(page) {
            run.pages.push(PagePlace::Zero);
            continue;
        }
        let slot = (gathered.len() / PAGE) as u32;
        run.pages.push(PagePlace::Chunk { frame: run.frames.len(), slot });
        gathered.extend_from_slice(page);
        if gathered.len() == CHUNK_PAGES * PAGE {
            run.frames.push(compress(&gathered, compression)?);
            gathered.clear();
        }
    }
    if !gathered.is_empty() {
        run.frames.push(compress(&gathered, compression)?);
    }
    Ok(run)
}

/// Compresses a chunk with this thread's compressor.
pub fn compress(raw: &[u8], compression: Compression) -> Result<CompressedFrame, repo::Error> {
    Compressor::on_this_thread(compression, |compressor| CompressedFrame::compress(compressor, raw))
}

/// Tells whether all bytes are zero, a word at a time.
fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_pages_take_no_chunk_and_the_others_are_gathered_in_order() {
        let mut raw = vec![0; 20 * PAGE + 100];
        for page in [0, 1, 2, 5, 6, 7, 9, 11, 12, 20] {
            raw[page * PAGE + 50] = page as u8 + 1;
        }
        let run = compress_pages(&raw, Compression::NONE).unwrap();
        assert_eq!(run.frames.len(), 2);
        assert_eq!(run.pages.len(), 21);
        assert_eq!(run.pages[3], PagePlace::Zero);
        assert_eq!(run.pages[5], PagePlace::Chunk { frame: 0, slot: 3 });
        assert_eq!(run.pages[12], PagePlace::Chunk { frame: 1, slot: 0 });
        assert_eq!(run.pages[20], PagePlace::Chunk { frame: 1, slot: 1 });
        assert_eq!(run.frames[1].body.len(), PAGE + 100);
        assert_eq!(run.frames[1].body[PAGE + 50], 21);
        assert_eq!((run.bytes, run.crc), (raw.len() as u64, Crc32c::of(&raw)));
    }
}
