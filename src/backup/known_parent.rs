//! The basebackup that an incremental one builds upon: what this host remembers of it, held against the repository.
//!
//! Before anything is read: the state is opened and read from end to end, but for the hashes, which shows damage and
//! tells how much of each pack is still in use; the record must be the one the state is of; all packs are looked for in
//! the store. What comes out is either why the basebackup is full, or a [`KnownParent`] that answers for one file and one
//! block after the other. Whatever cannot be read later costs only what it describes: those pages are stored again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::backup::change::{Decision, Incremental, Reason, Standing, Today, is_untouched, judge};
use crate::backup::data_directory::SourceFile;
use crate::backup::error::Error;
use crate::backup::hints::Hints;
use crate::backup::live_directory::read_histories;
use crate::backup::rewriting::{Rewriting, origins_max, plan_rewriting};
use crate::backup::run::blocking;
use crate::backup::server_record::empty_record;
use crate::backup::state::{
    Attempt, BackupLock, HashKey, KnownBlock, KnownContent, KnownFile, RecordAt, State, StateError,
    StateFacts, StateFolder, StateWriter,
};
use crate::catalog::timeline_tree::TimelineTree;
use crate::repo::{
    self, PackId, ParentBasebackup, Refs, Repository,
    chunk::ChunkRef,
    documents::Outcome,
    entry::{BlobRef, Content, TreePath},
    missing_packs,
    page_map::{MapBlock, PAGE_SIZE, PageSource},
    read_begin, read_outcome, read_refs,
};

/// A basebackup whose pages are known and may be named.
#[derive(Debug)]
pub struct KnownParent {
    state: State,
    basebackup: Arc<ParentBasebackup>,
    again: Arc<BTreeSet<PackId>>,
    takes_bytes: bool,
    read_all: bool,
    complained: AtomicBool,
}

/// What is known of one file and of its blocks, for work that is done side by side and in order: whoever comes first
/// looks it up, and the last few are kept.
#[derive(Debug, Default)]
pub struct KnownBlocks {
    file: OnceLock<Option<Arc<KnownFile>>>,
    blocks: Mutex<Vec<(u64, Arc<KnownBlock>)>>,
}

const BLOCKS_KEPT: usize = 2;

impl KnownBlocks {
    /// Returns what is known of the file, which is always the one at `path`.
    pub fn file(&self, path: &TreePath, parent: Option<&KnownParent>) -> Option<Arc<KnownFile>> {
        self.file.get_or_init(|| parent?.file(path).map(Arc::new)).clone()
    }

    /// Returns what is known of its block `n`.
    pub fn block(&self, n: u64, path: &TreePath, parent: Option<&KnownParent>) -> Option<Arc<KnownBlock>> {
        let known = self.file(path, parent)?;
        if n >= known.block_count() {
            return None;
        }
        // Whoever comes second waits for the first to have read it.
        let mut blocks = self.blocks.lock().expect("no holder of this lock panics");
        if let Some((_, block)) = blocks.iter().find(|(number, _)| *number == n) {
            return Some(block.clone());
        }
        let block = Arc::new(parent?.block(&known, n)?);
        if blocks.len() == BLOCKS_KEPT {
            blocks.remove(0);
        }
        blocks.push((n, block.clone()));
        Some(block)
    }
}

/// What a basebackup will be, and what it builds upon.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Full or incremental, and why.
    pub decision: Decision,
    /// The basebackup that is built upon; none for a full one, nor where a killed one was only looked at.
    pub parent: Option<Arc<KnownParent>>,
}

/// What a decision is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// A basebackup that is about to be taken.
    ToTake,
    /// To be told: nothing is written anywhere.
    Only,
}

impl Prepared {
    /// Returns that nothing is built upon.
    pub fn full(reason: Reason) -> Self {
        Self { decision: Decision::Full(reason), parent: None }
    }
}

/// Decides what the next basebackup is. Nothing is written anywhere.
///
/// # Errors
/// Where the store cannot tell; what is wrong with the state or the parent is a reason for a full one.
pub async fn prepare(
    repository: &Repository,
    folder: &StateFolder,
    today: &Today,
    data_directory: Option<&Path>,
) -> Result<Prepared, Error> {
    let opening = folder.clone();
    let state = match blocking(move || Ok(opening.open())).await? {
        Ok(Some(state)) => state,
        Ok(None) => return Ok(Prepared::full(Reason::NoState)),
        Err(error) => return Ok(Prepared::full(Reason::StateUnusable(error.to_string()))),
    };
    let id = state.facts().basebackup;
    let (standing, parent) = look_up(repository, id).await?;
    let descends = descends(repository, state.facts(), today, data_directory).await?;
    let (incremental, parent) = match (judge(state.facts(), today, descends, &standing), parent) {
        (Ok(incremental), Some(parent)) => (incremental, parent),
        (Err(reason), _) => return Ok(Prepared::full(reason)),
        (Ok(_), None) => return Ok(Prepared::full(Reason::ParentAbsent(id))),
    };
    let (state, live) = match blocking(move || Ok(surveyed(state))).await? {
        Ok(surveyed) => surveyed,
        Err(error) => return Ok(Prepared::full(Reason::StateUnusable(error.to_string()))),
    };
    if let Some(stranger) = live.keys().find(|pack| parent.refs.find(**pack).is_none()) {
        let detail = format!("{stranger} is none of the packs of basebackup {id}");
        return Ok(Prepared::full(Reason::StateUnusable(detail)));
    }
    build(repository, incremental, parent, (state, live)).await
}

/// Takes up what a full basebackup has left that was killed on this host; none where nothing was left, or it does not
/// fit, which is said.
///
/// Its pages are named only where the page that is read now is the same, and stand in packs that the store has. Who only
/// looks is told of no parent, and not of damage: everything would be read whatever there is.
///
/// # Errors
/// Where the store cannot tell; what was left stays as it was.
pub async fn take_up(
    repository: &Repository,
    (folder, lock): (&StateFolder, &Arc<BackupLock>),
    today: &Today,
    look: Look,
) -> Result<Option<Prepared>, Error> {
    let (looking, held) = (folder.clone(), lock.clone());
    let left = match blocking(move || Ok(looking.attempt(&held))).await? {
        Ok(Some(left)) => left,
        Ok(None) => return Ok(None),
        Err(error) => {
            tracing::warn!("nothing is gone on with of a basebackup that was killed: {error}");
            return Ok(None);
        }
    };
    let id = left.facts.basebackup;
    let (incremental, parent) = match fit(repository, &left, today).await? {
        Ok(fitting) => fitting,
        Err(why) => {
            tracing::warn!("nothing is gone on with of basebackup {id}, which was killed: {why}");
            return Ok(None);
        }
    };
    if look == Look::Only {
        return Ok(Some(Prepared { decision: Decision::Incremental(incremental), parent: None }));
    }
    let (taking, held) = (folder.clone(), lock.clone());
    let state = blocking(move || Ok(taking.take_up(&held, &left).and_then(surveyed))).await?;
    match state {
        Ok(surveyed) => Ok(Some(build(repository, incremental, parent, surveyed).await?)),
        Err(error) => {
            tracing::warn!("nothing is gone on with of basebackup {id}, which was killed: {error}");
            Ok(None)
        }
    }
}

/// Holds what an attempt left against the repository; says why it does not fit.
async fn fit(
    repository: &Repository,
    left: &Attempt,
    today: &Today,
) -> Result<Result<(Incremental, ParentBasebackup), String>, Error> {
    let facts = &left.facts;
    let id = facts.basebackup;
    if repository.is_expired(id).await? {
        return Ok(Err("it has expired".to_owned()));
    }
    match read_outcome(repository, id).await {
        Err(repo::Error::Incomplete(_)) => {}
        Ok(_) => return Ok(Err("it has an outcome".to_owned())),
        Err(error) if error.is_unusable() => return Ok(Err(error.to_string())),
        Err(error) => return Err(error.into()),
    }
    let begin = match read_begin(repository, id).await {
        Ok(begin) if begin.id == id && begin.cluster == facts.cluster => begin,
        Ok(_) => return Ok(Err("its begin is that of another one".to_owned())),
        Err(error) if error.is_unusable() || error.is_absent() => return Ok(Err(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    let same_timeline = begin.timeline == today.timeline;
    let incremental = match judge(facts, today, same_timeline, &Standing::Complete(facts.backup_json)) {
        Ok(incremental) => Incremental { read_all: true, resumes: true, ..incremental },
        Err(reason) => return Ok(Err(reason.to_string())),
    };
    if begin.parent.is_some() || left.packs.iter().any(|pack| pack.id.origin != id) {
        return Ok(Err("it built upon another one".to_owned()));
    }
    let mut record = empty_record(id, begin.cluster, begin.timeline, (begin.wal_floor, begin.wal_floor));
    record.keys = vec![begin.key];
    let refs = Refs::new(left.packs.clone());
    Ok(Ok((incremental, ParentBasebackup { record, digest: None, refs })))
}

fn surveyed(state: State) -> Result<(State, Live), StateError> {
    survey(&state).map(|live| (state, live))
}

/// Looks for the packs and decides which are written again: those that the parent does not name among them.
async fn build(
    repository: &Repository,
    incremental: Incremental,
    parent: ParentBasebackup,
    (state, live): (State, Live),
) -> Result<Prepared, Error> {
    let missing = missing_packs(repository, parent.refs.records().iter()).await?;
    let (at_most, now) = (origins_max(&parent.record.keys), repository.clock().now());
    let rewriting = plan_rewriting(&parent.refs, &live, &missing, at_most, now);
    report(&missing, &rewriting);
    let takes_bytes = rewriting.missing > 0 || rewriting.crowded > 0;
    let mut again = rewriting.packs;
    again.extend(live.keys().filter(|pack| parent.refs.find(**pack).is_none()));
    let (read_all, complained) = (incremental.read_all, AtomicBool::new(false));
    let (basebackup, again) = (Arc::new(parent), Arc::new(again));
    let parent = KnownParent { state, basebackup, again, takes_bytes, read_all, complained };
    Ok(Prepared { decision: Decision::Incremental(incremental), parent: Some(Arc::new(parent)) })
}

/// Stored bytes of each pack that are in use, each page counted by itself.
type Live = BTreeMap<PackId, u64>;

impl KnownParent {
    /// Returns what is known of it as a whole.
    pub fn facts(&self) -> &StateFacts {
        self.state.facts()
    }

    /// Returns what the writer has to know of it.
    pub fn basebackup(&self) -> &Arc<ParentBasebackup> {
        &self.basebackup
    }

    /// Returns the key of its page hashes.
    pub fn hash_key(&self) -> HashKey {
        self.state.facts().hash_key.clone()
    }

    /// Returns which packs are not named again.
    pub fn written_again(&self) -> Arc<BTreeSet<PackId>> {
        self.again.clone()
    }

    /// Returns whether files are read however unchanged they look.
    pub fn reads_all(&self) -> bool {
        self.read_all
    }

    /// Returns whether some pages have to be at hand though they have not changed: packs are gone, or there are too many
    /// basebackups to be named.
    pub fn takes_bytes(&self) -> bool {
        self.takes_bytes
    }

    /// Returns what is known of a file; nothing where there was none, or where the state cannot tell.
    pub fn file(&self, path: &TreePath) -> Option<KnownFile> {
        self.state.find(path).unwrap_or_else(|error| {
            self.complain(&error);
            None
        })
    }

    /// Returns what is known of the pages of block `n` of a file; nothing where the state cannot tell.
    pub fn block(&self, file: &KnownFile, n: u64) -> Option<KnownBlock> {
        self.state.block(file, n).map_err(|error| self.complain(&error)).ok()
    }

    /// Returns the map of block `n` of a file; nothing where the state cannot tell.
    pub fn map(&self, file: &KnownFile, n: u64) -> Option<MapBlock> {
        self.state.map(file, n).map_err(|error| self.complain(&error)).ok()
    }

    /// Has `next` know of block `n` of a file what this knows.
    ///
    /// # Errors
    /// `Damaged` where the state cannot tell, else what is wrong with the next one.
    pub fn copy_block(
        &self,
        next: &mut StateWriter,
        file: &KnownFile,
        n: u64,
    ) -> Result<RecordAt, StateError> {
        next.copy_block(&self.state, file, n)
    }

    /// Returns whether a file can be taken over without reading it: no write to it can have gone unseen, or the WAL has
    /// none, and nothing of it is stored again.
    pub fn is_unread(&self, file: &SourceFile, hints: Option<&Hints>) -> bool {
        if self.read_all {
            return false;
        }
        let last_start = self.state.facts().started_at;
        let is_as_it_was = |known: &KnownFile| {
            is_untouched(file, known, last_start) || hints.is_some_and(|hints| hints.vouch_for(file, known))
        };
        self.file(&file.path).is_some_and(|known| is_as_it_was(&known) && !self.is_written_again(&known))
    }

    /// Returns the packs that hold a file and its maps, as far as they are named again.
    pub fn packs_of(&self, known: &KnownFile) -> BTreeSet<PackId> {
        let mut packs = BTreeSet::new();
        match &known.content {
            KnownContent::Inline(_) => {}
            KnownContent::Part { blob, .. } => drop(packs.insert(blob.chunk.pack)),
            KnownContent::Pages { stands: Content::Blocks(blobs), .. } => {
                packs.extend(blobs.iter().map(|blob| blob.chunk.pack));
                let maps = (0..known.block_count()).filter_map(|n| self.map(known, n));
                maps.for_each(|map| packs.extend(chunks_of(&map).map(|(chunk, _)| chunk.pack)));
            }
            KnownContent::Pages { stands, .. } => {
                if let Content::Map(map) = stands {
                    packs.extend(chunks_of(map).map(|(chunk, _)| chunk.pack));
                }
            }
        }
        packs.retain(|pack| !self.again.contains(pack));
        packs
    }

    /// Streams what is known of files, in order.
    pub fn files(&self) -> impl Iterator<Item = Result<KnownFile, StateError>> + '_ {
        self.state.files()
    }

    /// Returns the packs that hold all the files that `belong`.
    pub fn packs_of_all(&self, mut belongs: impl FnMut(&KnownFile) -> bool) -> BTreeSet<PackId> {
        let mut packs = BTreeSet::new();
        for known in self.files().filter_map(|file| file.map_err(|error| self.complain(&error)).ok()) {
            if belongs(&known) {
                packs.extend(self.packs_of(&known));
            }
        }
        packs
    }

    fn is_written_again(&self, known: &KnownFile) -> bool {
        let again = |chunk: &ChunkRef| self.again.contains(&chunk.pack);
        if self.again.is_empty() {
            return false;
        }
        match &known.content {
            KnownContent::Inline(_) => false,
            KnownContent::Part { blob, .. } => again(&blob.chunk),
            KnownContent::Pages { stands: Content::Map(map), .. } => {
                chunks_of(map).any(|(chunk, _)| again(chunk))
            }
            KnownContent::Pages { stands, .. } => {
                let maps = match stands {
                    Content::Blocks(blobs) => blobs.iter().any(|blob| again(&blob.chunk)),
                    _ => false,
                };
                let in_block = |n| match self.map(known, n) {
                    Some(map) => chunks_of(&map).any(|(chunk, _)| again(chunk)),
                    None => true,
                };
                maps || (0..known.block_count()).any(in_block)
            }
        }
    }

    fn complain(&self, error: &StateError) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!("some pages are stored again: {error}");
        }
    }
}

async fn look_up(
    repository: &Repository,
    id: repo::BasebackupId,
) -> Result<(Standing, Option<ParentBasebackup>), Error> {
    if repository.is_expired(id).await? {
        return Ok((Standing::Expired, None));
    }
    let (record, digest) = match read_outcome(repository, id).await {
        Ok((Outcome::Complete(record), digest, _)) if record.id == id => (*record, digest),
        Ok((Outcome::Complete(record), ..)) => {
            return Ok((
                Standing::Unreadable(format!("its record is that of basebackup {}", record.id)),
                None,
            ));
        }
        Ok((Outcome::Abandoned { .. }, ..)) => return Ok((Standing::Abandoned, None)),
        Err(repo::Error::Incomplete(_)) => return Ok((Standing::Absent, None)),
        Err(error) if error.is_unusable() => return Ok((Standing::Unreadable(error.to_string()), None)),
        Err(error) => return Err(error.into()),
    };
    match read_refs(repository, &record).await {
        Ok(refs) => {
            Ok((Standing::Complete(digest), Some(ParentBasebackup { record, digest: Some(digest), refs })))
        }
        Err(error) if error.is_unusable() => Ok((Standing::Unreadable(error.to_string()), None)),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether the server's timeline passes the end of the remembered basebackup: by its own history files, for the
/// archive may not have them yet, or else by the archive's.
async fn descends(
    repository: &Repository,
    facts: &StateFacts,
    today: &Today,
    data_directory: Option<&Path>,
) -> Result<bool, Error> {
    if facts.timeline == today.timeline || facts.cluster != today.cluster {
        return Ok(true);
    }
    if let Some(directory) = data_directory {
        let directory = directory.to_owned();
        let histories = blocking(move || read_histories(&directory)).await?;
        if let Some((history, _)) = histories.iter().find(|(history, _)| history.timeline == today.timeline) {
            return Ok(history.switch_of(facts.timeline).is_some_and(|switch| facts.stop_lsn <= switch));
        }
    }
    let (tree, _) = TimelineTree::load_readable(repository, today.cluster).await?;
    Ok(tree.passes(today.timeline, facts.timeline, facts.stop_lsn))
}

/// Reads all of a state but the hashes; returns the stored bytes of each pack that are in use, each page counted by
/// itself.
fn survey(state: &State) -> Result<Live, StateError> {
    let mut live = Live::new();
    for file in state.files() {
        let file = file?;
        match &file.content {
            KnownContent::Inline(_) => {}
            KnownContent::Part { blob, .. } => count_blob(&mut live, blob),
            KnownContent::Pages { stands, .. } => {
                if let Content::Blocks(blobs) = stands {
                    blobs.iter().for_each(|blob| count_blob(&mut live, blob));
                }
                for n in 0..file.block_count() {
                    for (chunk, pages) in chunks_of(&state.map(&file, n)?) {
                        let slots = u64::from(chunk.raw_len).div_ceil(PAGE_SIZE).max(1);
                        count(&mut live, chunk, u64::from(pages), slots);
                    }
                }
            }
        }
    }
    Ok(live)
}

fn count_blob(live: &mut BTreeMap<PackId, u64>, blob: &BlobRef) {
    count(live, &blob.chunk, u64::from(blob.len), u64::from(blob.chunk.raw_len.max(1)));
}

/// Counts `part` of the `whole` of a chunk.
fn count(live: &mut BTreeMap<PackId, u64>, chunk: &ChunkRef, part: u64, whole: u64) {
    *live.entry(chunk.pack).or_default() += u64::from(chunk.stored_len) * part / whole;
}

/// Returns the chunks that a map names, and how many pages of each run.
fn chunks_of(map: &MapBlock) -> impl Iterator<Item = (&ChunkRef, u32)> {
    map.extents().iter().filter_map(|extent| match &extent.source {
        PageSource::Zero => None,
        PageSource::Chunk { chunk, .. } => Some((chunk, extent.count)),
    })
}

fn report(missing: &[PackId], rewriting: &Rewriting) {
    if let Some(first) = missing.first() {
        let count = rewriting.missing;
        tracing::warn!("{count} packs are missing or cut, {first} first: what they hold is stored again");
    }
    let Rewriting { sparse, old, crowded, bytes, .. } = rewriting;
    tracing::debug!(
        "{sparse} mostly dead, {old} old and {crowded} other packs are written again, {bytes} bytes of them in use"
    );
}

impl Incremental {
    /// Returns what the next state says of when everything was read.
    pub fn since_read_all(&self, before: u32) -> u32 {
        if self.read_all { 0 } else { before.saturating_add(1) }
    }
}
