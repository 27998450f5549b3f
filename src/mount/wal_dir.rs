//! `DIR/wal`: the WAL archive of a cluster, made so that `cp DIR/wal/%f %p` never ends a recovery by mistake.
//!
//! A name is answered by what the archive proves. There: the file. Proven absent: `ENOENT`, and `NAME.absent` is
//! there. Damaged, or missing while something shows that it was written: a file of length 0, which PostgreSQL
//! refuses. A history file that cannot be read, and everything while the store does not answer: no answer, until
//! there is one. With a plan, a recovery's own, the plan decides what is missing and where the archive ends.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::Timestamp;

use crate::catalog::timeline_tree::list_histories;
use crate::catalog::wal_reader::{Found, Patience, Pauses, WalReader};
use crate::catalog::{Answer, InArchive, RecoveryPlan, TimelineTree, answer};
use crate::codec::Digest;
use crate::mount::fs::{FileKind, Lifetime};
use crate::mount::lower::LowerError;
use crate::mount::repo_lower::lower_error;
use crate::mount::virtual_dir::{DynamicDir, Found as FoundItem, Item, StaticFile};
use crate::mount::wal_file::{EmptyFile, PartialFile, WalFile};
use crate::pg::{ArchiveFileName, TimelineId, WalSegmentName};
use crate::repo;
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::{HistoryBranch, read_history_branch};

/// The WAL archive of one cluster as a directory.
#[derive(Debug)]
pub struct WalDir {
    reader: Arc<WalReader>,
    plan: Option<RecoveryPlan>,
    /// Branch points read so far; they never change.
    branches: Mutex<HashMap<TimelineId, HistoryBranch>>,
}

/// Whether a segment that is not in the archive was ever written.
#[derive(Debug, PartialEq, Eq)]
enum Absence {
    /// Nothing shows that it was.
    Proven,
    /// Something does.
    Hole { evidence: String },
}

/// The suffix of the file whose presence proves absence.
const ABSENT: &str = ".absent";
/// Keys asked for at a time.
const PAGE: usize = 1000;
/// How long a listing waits for the store; unlike a look-up it may fail, because no copy lists.
const LIST_PATIENCE: Duration = Duration::from_secs(30);

impl WalDir {
    /// Shows what `reader` reads, by the plan of a recovery if there is one.
    pub fn new(reader: Arc<WalReader>, plan: Option<RecoveryPlan>) -> Self {
        Self { reader, plan, branches: Mutex::default() }
    }

    async fn find(&self, name: ArchiveFileName) -> Result<Option<Item>, LowerError> {
        if self.is_outside_plan(name) {
            return Ok(None);
        }
        match name {
            ArchiveFileName::Segment(segment) => self.find_segment(segment).await,
            ArchiveFileName::Partial(_) => self.find_partial(name).await,
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => {
                self.find_history(name).await
            }
        }
    }

    async fn find_segment(&self, segment: WalSegmentName) -> Result<Option<Item>, LowerError> {
        let name = ArchiveFileName::Segment(segment);
        match self.reader.size(name, Patience::Forever).await.map_err(|error| lower_error(&error))? {
            Found::Present(size) => Ok(Some(self.file(name, size))),
            Found::Unreadable(error) => {
                tracing::error!("WAL segment {segment} is served with length 0: {error}");
                Ok(Some(Item::File(Arc::new(EmptyFile))))
            }
            Found::Absent => match self.absence(segment).await? {
                Absence::Proven => Ok(None),
                Absence::Hole { evidence } => {
                    tracing::error!("WAL segment {segment} is missing and served with length 0: {evidence}");
                    Ok(Some(Item::File(Arc::new(EmptyFile))))
                }
            },
        }
    }

    /// Finds a file of text, and does not return while there is one that cannot be read: an empty history would be
    /// taken for one without ancestors.
    async fn find_history(&self, name: ArchiveFileName) -> Result<Option<Item>, LowerError> {
        let mut pauses = Pauses::new();
        loop {
            let found = self.reader.size(name, Patience::Forever).await;
            match found.map_err(|error| lower_error(&error))? {
                Found::Present(size) => return Ok(Some(self.file(name, size))),
                Found::Absent if self.says_absent(name) => return Ok(None),
                Found::Absent => tracing::error!("waiting for {name}, which recovery needs and is missing"),
                Found::Unreadable(error) => tracing::error!("waiting for {name} to be repaired: {error}"),
            }
            pauses.pause(Patience::Forever, self.reader.clock()).await;
        }
    }

    async fn find_partial(&self, name: ArchiveFileName) -> Result<Option<Item>, LowerError> {
        match self.reader.read(name, Patience::Forever).await.map_err(|error| lower_error(&error))? {
            Found::Present(content) => {
                let digest = *Digest::of(&content).as_bytes();
                let identity = u64::from_le_bytes(*digest.first_chunk().expect("a digest has 32 bytes"));
                Ok(Some(Item::File(Arc::new(PartialFile { content, identity: identity.max(2) }))))
            }
            Found::Absent => Ok(None),
            Found::Unreadable(error) => {
                tracing::error!("{name} is served with length 0: {error}");
                Ok(Some(Item::File(Arc::new(EmptyFile))))
            }
        }
    }

    /// Tells whether recovery may go on without the file.
    async fn is_proven_absent(&self, name: ArchiveFileName) -> Result<bool, LowerError> {
        if self.is_outside_plan(name) {
            return Ok(true);
        }
        match self.reader.size(name, Patience::Forever).await.map_err(|error| lower_error(&error))? {
            Found::Present(_) | Found::Unreadable(_) => Ok(false),
            Found::Absent => match name {
                ArchiveFileName::Segment(segment) => Ok(self.absence(segment).await? == Absence::Proven),
                _ => Ok(self.says_absent(name)),
            },
        }
    }

    /// Decides about a segment that the store says is not there, waiting for the store as long as it takes.
    async fn absence(&self, segment: WalSegmentName) -> Result<Absence, LowerError> {
        let name = ArchiveFileName::Segment(segment);
        if self.plan.is_some() {
            let evidence = || "the recovery plan goes through it".to_owned();
            let absent = self.says_absent(name);
            return Ok(if absent { Absence::Proven } else { Absence::Hole { evidence: evidence() } });
        }
        let look = || self.look_for_evidence(segment);
        let found = self.reader.patiently(Patience::Forever, &name.to_string(), look).await;
        match found.map_err(|error| lower_error(&error))? {
            Found::Present(absence) => Ok(absence),
            // What would tell is itself missing or unreadable.
            Found::Absent => {
                Ok(Absence::Hole { evidence: "the site itself is not there any more".to_owned() })
            }
            Found::Unreadable(error) => Ok(Absence::Hole { evidence: error.to_string() }),
        }
    }

    /// Looks for anything that shows that a segment was written: a later one on its timeline, or a timeline that
    /// left this one behind it.
    async fn look_for_evidence(&self, segment: WalSegmentName) -> Result<Absence, repo::Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        // In a site that is gone everything is absent, and nothing proven.
        repository.store().head(&repository.layout().site()).await?;
        if let Some(later) = self.later_segment(segment).await? {
            return Ok(Absence::Hole { evidence: format!("{later} is there") });
        }
        let Ok(end) = segment.end_lsn(cluster.segment_size) else { return Ok(Absence::Proven) };
        let tree = self.timelines().await?;
        for timeline in tree.timelines() {
            let way = tree.way_to(timeline);
            let left = way.iter().find(|stretch| stretch.timeline == segment.timeline());
            if let Some(switch) = left.and_then(|stretch| stretch.end).filter(|switch| end <= *switch) {
                let evidence = format!("timeline {timeline} goes through it and left it at {switch}");
                return Ok(Absence::Hole { evidence });
            }
        }
        Ok(Absence::Proven)
    }

    async fn later_segment(&self, segment: WalSegmentName) -> Result<Option<WalSegmentName>, repo::Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let layout = repository.layout();
        let folder = layout.wal_timeline(cluster, segment.timeline());
        let mut after = layout.wal_object(cluster, WalObjectName::Segment(segment));
        loop {
            let page = repository.store().list(&folder, Some(&after), PAGE).await?;
            let later = page.iter().find_map(|object| match layout.parse(&object.key) {
                Some(ObjectName::Wal(_, WalObjectName::Segment(later))) if later > segment => Some(later),
                _ => None,
            });
            match page.last() {
                Some(last) if later.is_none() && page.len() == PAGE => after = last.key.clone(),
                _ => return Ok(later),
            }
        }
    }

    /// Returns the timelines as the archive has them now, reading only the histories that are new.
    async fn timelines(&self) -> Result<TimelineTree, repo::Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let mut branches = Vec::new();
        for timeline in list_histories(repository, cluster).await? {
            let known = self.branches.lock().expect("no holder of this lock panics").get(&timeline).copied();
            let branch = match known {
                Some(branch) => branch,
                None => read_history_branch(repository, cluster, timeline).await?,
            };
            self.branches.lock().expect("no holder of this lock panics").insert(timeline, branch);
            branches.push((timeline, branch));
        }
        Ok(TimelineTree::new(branches))
    }

    fn is_outside_plan(&self, name: ArchiveFileName) -> bool {
        let outside = |plan| answer(plan, name, InArchive::Present, false) == Answer::Absent;
        self.plan.as_ref().is_some_and(outside)
    }

    /// Tells whether the plan, where there is one, takes the store's *not there* for an answer.
    fn says_absent(&self, name: ArchiveFileName) -> bool {
        let absent = |plan| answer(plan, name, InArchive::Absent, false) == Answer::Absent;
        self.plan.as_ref().is_none_or(absent)
    }

    fn file(&self, name: ArchiveFileName, size: u64) -> Item {
        Item::File(Arc::new(WalFile { reader: self.reader.clone(), name, size }))
    }

    /// Lists names in their order: of each timeline the history file, then the segments.
    async fn names(&self, after: Option<&str>, limit: usize) -> Result<Vec<String>, repo::Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let layout = repository.layout();
        let after_name = after.and_then(|name| name.parse::<ArchiveFileName>().ok());
        let histories: BTreeSet<TimelineId> =
            list_histories(repository, cluster).await?.into_iter().collect();
        let prefix = layout.wal(cluster);
        let folders = repository.store().list_folder(&prefix).await?.folders;
        let timeline_of = |name: &String| layout.parse_timeline_folder(cluster, &format!("{prefix}{name}"));
        let mut timelines: BTreeSet<TimelineId> = folders.iter().filter_map(timeline_of).collect();
        timelines.extend(&histories);
        let mut names = Vec::new();
        let first = after_name.map(ArchiveFileName::timeline);
        for timeline in timelines.into_iter().filter(|timeline| Some(*timeline) >= first) {
            let history = ArchiveFileName::History(timeline).to_string();
            if histories.contains(&timeline) && after.is_none_or(|after| *history > *after) {
                names.push(history);
            }
            let from = after_name.filter(|name| name.timeline() == timeline);
            self.segment_names(timeline, from, limit, &mut names).await?;
            if names.len() >= limit {
                break;
            }
        }
        names.truncate(limit);
        Ok(names)
    }

    /// Appends names of one timeline behind `after` until there are `limit` in all.
    async fn segment_names(
        &self,
        timeline: TimelineId,
        after: Option<ArchiveFileName>,
        limit: usize,
        names: &mut Vec<String>,
    ) -> Result<(), repo::Error> {
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let layout = repository.layout();
        let object = after.and_then(|after| match after {
            ArchiveFileName::Segment(segment) => Some(WalObjectName::Segment(segment)),
            // Behind every partial of the segment.
            ArchiveFileName::Partial(segment) => Some(WalObjectName::Partial { segment, digest: [0xff; 4] }),
            ArchiveFileName::BackupHistory { segment, offset } => {
                Some(WalObjectName::BackupHistory { segment, offset })
            }
            ArchiveFileName::History(_) => None,
        });
        let mut key = object.map(|object| layout.wal_object(cluster, object));
        let folder = layout.wal_timeline(cluster, timeline);
        while names.len() < limit {
            let page = repository.store().list(&folder, key.as_ref(), PAGE).await?;
            for listed in &page {
                let Some(ObjectName::Wal(_, object)) = layout.parse(&listed.key) else { continue };
                let name = file_name(object);
                let shown = !self.is_outside_plan(name) && Some(&name.to_string()) != names.last();
                names.extend(shown.then(|| name.to_string()));
            }
            if page.len() < PAGE {
                break;
            }
            key = page.last().map(|listed| listed.key.clone());
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl DynamicDir for WalDir {
    async fn lookup(&self, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
        if let Some(name) = name.strip_suffix(ABSENT) {
            let Ok(name) = name.parse() else { return Ok(None) };
            let proof = self.is_proven_absent(name).await?;
            let content = format!("{name} is not in the archive\n");
            let file = || Item::File(Arc::new(StaticFile::new(content, Timestamp::UNIX_EPOCH)));
            return Ok(proof.then(|| FoundItem { item: file(), lifetime: Lifetime::Once }));
        }
        let Ok(name) = name.parse::<ArchiveFileName>() else { return Ok(None) };
        let item = self.find(name).await?;
        Ok(item.map(|item| FoundItem { lifetime: lifetime_of(name, &item), item }))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        let after = after.and_then(|name| std::str::from_utf8(name).ok());
        let patience = Patience::Until(self.reader.clock().monotonic() + LIST_PATIENCE);
        let listed = self.reader.patiently(patience, "the list of WAL", || self.names(after, limit)).await;
        match listed.map_err(|error| lower_error(&error))? {
            Found::Present(names) => {
                Ok(names.into_iter().map(|name| (name.into_bytes(), FileKind::File)).collect())
            }
            Found::Absent => Ok(Vec::new()),
            Found::Unreadable(error) => Err(lower_error(&error)),
        }
    }
}

/// Says how long the kernel may keep what a name stands for: only what can never become something else.
fn lifetime_of(name: ArchiveFileName, item: &Item) -> Lifetime {
    let immutable = !matches!(name, ArchiveFileName::Partial(_));
    match item {
        Item::File(file) if immutable && file.identity() == 0 => Lifetime::Forever,
        _ => Lifetime::Once,
    }
}

/// Returns the name under which PostgreSQL knows an object.
fn file_name(object: WalObjectName) -> ArchiveFileName {
    match object {
        WalObjectName::Segment(segment) => ArchiveFileName::Segment(segment),
        WalObjectName::Partial { segment, .. } => ArchiveFileName::Partial(segment),
        WalObjectName::BackupHistory { segment, offset } => {
            ArchiveFileName::BackupHistory { segment, offset }
        }
    }
}
