//! A run of pages of one file: read, checked, compared with what is known of them.
//!
//! The work of one job on the CPU pool. What is read piece by piece goes through the checksums and then, in the same
//! buffer, into the gatherer (`gather`). The file is opened by the first of its jobs and closed by the last; what is
//! known of its pages is looked up by the first that needs it, and kept for its neighbours.

use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::gather::{Again, GatherOptions, KnownPages, PageGatherer, PageRun};
use crate::backup::known_parent::{KnownBlocks, KnownParent};
use crate::backup::page_check::PageCheck;
use crate::backup::source_file::{FileState, OpenFile, Source};
use crate::backup::state::{HashKey, KnownFile};
use crate::codec::Compression;
use crate::pg::RelationFile;
use crate::repo::page_map::{MAP_BLOCK_BYTES, PAGE_SIZE};

/// Bytes that are read at once, and that one job reads where everything is stored: enough to make a job worth its
/// hand-over, few enough for many of them in flight.
pub const JOB_BYTES: u64 = 512 << 10;
/// Bytes that one job reads where most pages are as they were, so that the changed ones fill chunks.
pub const WIDE_JOB_BYTES: u64 = 4 << 20;

/// What all jobs of a copy share.
#[derive(Debug)]
pub struct JobContext {
    /// Where files are opened.
    pub source: Arc<dyn Source>,
    /// Judges pages of relations; none where the cluster has no checksums.
    pub page_check: Option<PageCheck>,
    /// How chunks are compressed.
    pub compression: Compression,
    /// What page hashes are keyed with; none where nothing will be remembered.
    pub hash_key: Option<HashKey>,
    /// The basebackup that is built upon; none for a full one.
    pub parent: Option<Arc<KnownParent>>,
}

/// A file that is read by several jobs.
#[derive(Debug)]
pub struct LargeFile {
    /// Its index among the files of the walk.
    pub number: usize,
    file: SourceFile,
    relation: Option<RelationFile>,
    /// Whether it is stored again as a whole.
    again: bool,
    opened: OnceLock<Opened>,
    known: KnownBlocks,
}

#[derive(Debug)]
enum Opened {
    Open(Box<dyn OpenFile>, FileState),
    Vanished,
    Failed(io::ErrorKind, String),
}

impl JobContext {
    /// Returns how pages are gathered; `again` where all of them are stored, changed or not.
    pub fn gathering(&self, again: bool) -> GatherOptions {
        let again = match &self.parent {
            _ if again => Again::Everything,
            Some(parent) => Again::Packs(parent.written_again()),
            None => Again::Nothing,
        };
        GatherOptions { compression: self.compression, hash_key: self.hash_key.clone(), again }
    }
}

impl LargeFile {
    /// Prepares a file; nothing is opened yet. `again`: it is stored as a whole, whatever is known of it.
    pub fn new(number: usize, file: SourceFile, again: bool) -> Self {
        let relation = file.relation();
        let (opened, known) = (OnceLock::new(), KnownBlocks::default());
        Self { number, file, relation, again, opened, known }
    }

    /// Reads the bytes of `range`, which begins at a page and lies within one map block.
    pub fn read(&self, range: Range<u64>, context: &JobContext) -> Result<PageRun, Error> {
        let path = || context.source.path(&self.file);
        let (open, state) = match self.opened.get_or_init(|| open(&*context.source, &self.file)) {
            Opened::Open(open, state) => (&**open, *state),
            Opened::Vanished => return Ok(PageRun::default()),
            Opened::Failed(kind, text) => {
                return Err(Error::reading("open", &path())(io::Error::new(*kind, text.clone())));
            }
        };
        let block = range.start / MAP_BLOCK_BYTES;
        let known = self.known.block(block, &self.file.path, context.parent.as_deref());
        let options = context.gathering(self.again);
        let mut gatherer = PageGatherer::new(&options);
        let mut damaged = Vec::new();
        let mut buffer = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let wanted = (range.end - at).min(JOB_BYTES);
            buffer.resize(wanted as usize, 0);
            let count = open.read_at(at, &mut buffer).map_err(Error::reading("read", &path()))?;
            buffer.truncate(count);
            if let (Some(relation), Some(check)) = (&self.relation, &context.page_check) {
                let found = check.check(relation, open, at, &mut buffer);
                damaged.extend(found.map_err(Error::reading("read", &path()))?);
            }
            open.done_with(at..at + wanted);
            let first = (at % MAP_BLOCK_BYTES / PAGE_SIZE) as u32;
            gatherer.push(&buffer, known.as_deref().map(|block| KnownPages { block, first }))?;
            if (count as u64) < wanted {
                break;
            }
            at += wanted;
        }
        let mut run = gatherer.finish()?;
        (run.state, run.damaged) = (Some(state), damaged);
        Ok(run)
    }

    /// Returns what is known of the file where it was stored as pages.
    pub fn known(&self, context: &JobContext) -> Option<Arc<KnownFile>> {
        self.known.file(&self.file.path, context.parent.as_deref())
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
