//! What is done with the bytes of received files on the CPU pool: checked, compared with what is known, compressed.
//!
//! The bytes are at hand, so nothing here reads. The server verifies checksums while it reads and reads a page again
//! that it caught half written; a page that is wrong here was wrong for it as well. What has not changed since the
//! basebackup that is built upon is named where it stands, by the same rule as for a data directory (`gather`): the
//! server sends all of it each time, and what is stored is what differs.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::gather::{
    Again, GatherOptions, KnownPages, PageGatherer, PageRun, compress, gather_pages,
};
use crate::backup::known_parent::{KnownBlocks, KnownParent};
use crate::backup::read_small::{INLINE_BYTES, SmallFile, SmallFiles, SmallPlace};
use crate::backup::source_file::FileState;
use crate::backup::state::{HashKey, KnownBlock, KnownContent, KnownFile, PageHash};
use crate::backup::stream::error::StreamError;
use crate::codec::Compression;
use crate::pg::{Crc32c, Lsn, PageVerdict, RelationFile, RelationMap, page};
use crate::repo::{
    entry::BlobRef,
    page_map::{MAP_BLOCK_BYTES, MAP_BLOCK_PAGES, PAGE_SIZE, PageSource},
};

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
    /// The next bytes of a large file, within one block of its map.
    Pages { file: Arc<LargeReceived>, range: Range<u64>, raw: Vec<u8>, last: bool },
    /// The next pages of a file of which only those in `sent` came, whose bytes are `raw`; the others are as they were
    /// below `kept_below`, and zero from there on. All are within one block of its map.
    Changed {
        file: Arc<LargeReceived>,
        pages: Range<u32>,
        sent: Vec<u32>,
        raw: Vec<u8>,
        kept_below: u32,
        last: bool,
    },
    /// A file that is as it was.
    Keep(Arc<LargeReceived>),
}

/// A small file that came whole.
#[derive(Debug)]
pub struct ReceivedFile {
    /// Where it stands, and what it is.
    pub file: SourceFile,
    /// Its bytes.
    pub raw: Vec<u8>,
}

/// A large file, which several pieces of work are about.
#[derive(Debug)]
pub struct LargeReceived {
    /// Its number among the large files.
    pub number: usize,
    /// Where it is to stand.
    pub lane: Lane,
    /// Where it stands, and what it is.
    pub file: SourceFile,
    known: KnownBlocks,
}

/// What became of it.
#[derive(Debug)]
pub enum Done {
    Together { lane: Lane, files: Vec<SourceFile>, together: SmallFiles },
    Pages { file: Arc<LargeReceived>, run: PageRun, expected: u64, last: bool, known: Option<Arc<KnownFile>> },
    Keep(Arc<LargeReceived>),
}

/// What all work shares.
#[derive(Debug)]
pub struct WorkContext {
    /// How chunks are compressed.
    pub compression: Compression,
    /// Judges pages; none where the cluster has no checksums.
    pub page_judge: Option<PageJudge>,
    /// What page hashes are keyed with; none where nothing will be remembered.
    pub hash_key: Option<HashKey>,
    /// The basebackup that is built upon; none for a full one.
    pub parent: Option<Arc<KnownParent>>,
    /// Whether the start-up set is stored again as a whole.
    pub start_set_again: bool,
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
                let (files, together) = pack_together(files, lane, context)?;
                Ok(Done::Together { lane, files, together })
            }
            Self::Pages { file, range, raw, last } => {
                let block = file.known_block(range.start / MAP_BLOCK_BYTES, context);
                let first = (range.start % MAP_BLOCK_BYTES / PAGE_SIZE) as u32;
                let options = context.gathering(file.lane);
                let known = block.as_deref().map(|block| KnownPages { block, first });
                let mut run = gather_pages(&raw, known, &options)?;
                run.state = Some(state_of(&file.file));
                run.damaged = context.damaged(&file.file, range.start, &raw);
                let (expected, known) = (range.end - range.start, file.known(context));
                Ok(Done::Pages { file, run, expected, last, known })
            }
            Self::Changed { file, pages, sent, raw, kept_below, last } => {
                let sent = sent.into_iter().zip(raw.chunks_exact(PAGE_SIZE as usize));
                let run = put_together(&file, pages, sent, kept_below, context)?;
                let (expected, known) = (run.bytes, file.known(context));
                Ok(Done::Pages { file, run, expected, last, known })
            }
            Self::Keep(file) => Ok(Done::Keep(file)),
        }
    }
}

/// Puts a run of pages together of those that were sent and those that are as they were.
fn put_together<'a>(
    file: &LargeReceived,
    pages: Range<u32>,
    sent: impl Iterator<Item = (u32, &'a [u8])>,
    kept_below: u32,
    context: &WorkContext,
) -> Result<PageRun, Error> {
    let options = context.gathering(file.lane);
    let mut gatherer = PageGatherer::new(&options);
    let block = file.known_block(u64::from(pages.start) / MAP_BLOCK_PAGES, context);
    let size = file.known(context).map_or(0, |known| known.size);
    let (mut sent, mut damaged) = (sent.peekable(), Vec::new());
    for page in pages {
        let first = (u64::from(page) % MAP_BLOCK_PAGES) as u32;
        let known = block.as_deref().map(|block| KnownPages { block, first });
        match sent.next_if(|(number, _)| *number == page) {
            Some((_, raw)) => {
                gatherer.push(raw, known)?;
                damaged.extend(context.damaged(&file.file, u64::from(page) * PAGE_SIZE, raw));
            }
            None if page < kept_below => {
                let known = known.and_then(|known| known.page(0));
                let known = known.or_else(|| file.page_in_chunk(page, context));
                // Half a page was read while it was written.
                let kept = known.filter(|_| u64::from(page) < size / PAGE_SIZE);
                if kept.is_none() && u64::from(page) < size.div_ceil(PAGE_SIZE) {
                    return Err(StreamError::NotKnown { path: file.file.path.to_string() }.into());
                }
                gatherer.push_unread(kept);
            }
            None => gatherer.push_unread(None),
        }
    }
    let mut run = gatherer.finish()?;
    (run.state, run.damaged) = (Some(state_of(&file.file)), damaged);
    Ok(run)
}

impl WorkContext {
    fn damaged(&self, file: &SourceFile, offset: u64, raw: &[u8]) -> Vec<u32> {
        match (&self.page_judge, file.relation()) {
            (Some(judge), Some(relation)) => judge.damaged(&relation, offset, raw),
            _ => Vec::new(),
        }
    }

    fn gathering(&self, lane: Lane) -> GatherOptions {
        let again = match &self.parent {
            _ if self.start_set_again && lane == Lane::StartSet => Again::Everything,
            Some(parent) => Again::Packs(parent.written_again()),
            None => Again::Nothing,
        };
        GatherOptions { compression: self.compression, hash_key: self.hash_key.clone(), again }
    }
}

impl LargeReceived {
    /// Prepares a file; nothing is looked up yet.
    pub fn new(number: usize, lane: Lane, file: SourceFile) -> Self {
        Self { number, lane, file, known: KnownBlocks::default() }
    }

    /// Returns what is known of the file.
    fn known(&self, context: &WorkContext) -> Option<Arc<KnownFile>> {
        self.known.file(&self.file.path, context.parent.as_deref())
    }

    /// Returns where a page stands of a file that shares a chunk with others, if it stands where one can be named. Its
    /// hash is not known: the next basebackup finds it changed.
    fn page_in_chunk(&self, page: u32, context: &WorkContext) -> Option<(PageHash, PageSource)> {
        let known = self.known(context)?;
        let KnownContent::Part { blob, .. } = &known.content else {
            return None;
        };
        let is_there = (u64::from(page) + 1) * PAGE_SIZE <= u64::from(blob.len);
        let slot = blob.at / PAGE_SIZE as u32 + page;
        let source = PageSource::Chunk { chunk: blob.chunk, slot };
        (is_there && u64::from(blob.at).is_multiple_of(PAGE_SIZE)).then_some((PageHash([0; 8]), source))
    }

    fn known_block(&self, n: u64, context: &WorkContext) -> Option<Arc<KnownBlock>> {
        self.known.block(n, &self.file.path, context.parent.as_deref())
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
    FileState { size: file.size, mode: file.mode, modified: file.modified, identity: None }
}

/// Puts small files side by side into chunks, the tiniest into the file table; names those that are as they were.
fn pack_together(
    received: Vec<ReceivedFile>,
    lane: Lane,
    context: &WorkContext,
) -> Result<(Vec<SourceFile>, SmallFiles), Error> {
    let options = context.gathering(lane);
    let mut together = SmallFiles::default();
    let mut files = Vec::with_capacity(received.len());
    let mut gathered: Vec<u8> = Vec::new();
    for (number, ReceivedFile { file, raw }) in received.into_iter().enumerate() {
        check_relation_map(&file, &raw)?;
        let damaged = context.damaged(&file, 0, &raw);
        let (len, crc) = (raw.len() as u32, Crc32c::of(&raw));
        let hash = options.hash_key.as_ref().map(|key| key.hash(&raw));
        let before = match context.parent.as_ref().and_then(|parent| parent.file(&file.path)) {
            Some(KnownFile { content: KnownContent::Inline(bytes), .. }) if bytes == raw => Before::Inline,
            Some(KnownFile { content: KnownContent::Part { blob, hash: known }, .. })
                if Some(known) == hash && blob.len == len =>
            {
                Before::At(blob)
            }
            _ => Before::Different,
        };
        let pages = u64::from(len).div_ceil(PAGE_SIZE);
        let place = match before {
            Before::At(blob) if !options.again.includes(blob.chunk.pack) => SmallPlace::Known(blob),
            Before::Inline if raw.len() <= INLINE_BYTES => SmallPlace::Inline(Bytes::from(raw)),
            _ => {
                match before {
                    Before::Different => together.changed += pages,
                    _ => together.stored_again += pages,
                }
                if raw.len() <= INLINE_BYTES {
                    SmallPlace::Inline(Bytes::from(raw))
                } else {
                    together.place(&raw, &file, &mut gathered, context.compression)?
                }
            }
        };
        together.files.push(SmallFile { number, state: state_of(&file), len, crc, hash, place, damaged });
        files.push(file);
    }
    if !gathered.is_empty() {
        together.frames.push(compress(&gathered, context.compression)?);
    }
    Ok((files, together))
}

/// Whether and where the bytes of a small file stood that are still the same.
#[derive(Clone, Copy)]
enum Before {
    Different,
    Inline,
    At(BlobRef),
}

/// Nobody reads a map again that the server caught half written.
fn check_relation_map(file: &SourceFile, raw: &[u8]) -> Result<(), StreamError> {
    if file.path.split().1 != RELATION_MAP {
        return Ok(());
    }
    RelationMap::parse(raw)
        .map(drop)
        .map_err(|error| StreamError::Torn { path: file.path.to_string(), detail: error.to_string() })
}
