//! `DIR/wal`: the WAL archive of a cluster, made so that `cp DIR/wal/%f %p` never ends a recovery by mistake.
//!
//! A name is answered by what the archive proves. There: the file. Proven absent: `ENOENT`, and `NAME.absent` is
//! there. Damaged, or missing while something shows that it was written: a file of length 0, which PostgreSQL
//! refuses. A history file that cannot be read, and everything while the store does not answer: no answer, until
//! there is one. With a plan, a recovery's own, the plan decides what is missing and where the archive ends.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::Semaphore;

use crate::catalog::timeline_tree::list_histories;
use crate::catalog::wal_reader::{Found, Patience, Pauses, WalReader};
use crate::catalog::{Answer, InArchive, RecoveryPlan, WalAhead, answer};
use crate::codec::Digest;
use crate::mount::caller::Caller;
use crate::mount::fs::{FileKind, Lifetime};
use crate::mount::lower::LowerError;
use crate::mount::repo_lower::lower_error;
use crate::mount::restoring::RestoringServer;
use crate::mount::virtual_dir::{DynamicDir, Found as FoundItem, Item, StaticFile};
use crate::mount::wal_beginnings::WalBeginnings;
use crate::mount::wal_evidence::{Absence, Evidence};
use crate::mount::wal_file::{EmptyFile, Opened, PartialFile, WalFile};
use crate::pg::{ArchiveFileName, Lsn, TimelineId, WalSegmentName, WalSegmentNumber};
use crate::repo;
use crate::repo::layout::{ObjectName, WalObjectName};

/// The WAL archive of one cluster as a directory.
#[derive(Debug)]
pub struct WalDir {
    reader: Arc<WalReader>,
    ahead: Arc<WalAhead>,
    copies: Arc<Copies>,
    held: Arc<Semaphore>,
    plan: Option<RecoveryPlan>,
    evidence: Evidence,
    beginnings: WalBeginnings,
}

/// Which segments are copied, as far as a mount without a plan can tell what is wanted next.
#[derive(Debug)]
struct Copies {
    ahead: Arc<WalAhead>,
    /// Whether a plan tells instead, as soon as a name is looked up.
    planned: bool,
    last: Mutex<Option<WalSegmentNumber>>,
}

/// What a server is shown of a segment whose beginning alone is in the archive.
#[derive(Debug)]
enum Shown {
    /// It has more of it itself, which it reads when it is told that there is none.
    Absent,
    /// The beginning, filled up with zeros.
    Beginning(Bytes),
    /// It cannot be told, or must not be.
    Empty,
}

impl Shown {
    fn item(self) -> Option<Item> {
        match self {
            Self::Absent => None,
            Self::Beginning(content) => Some(part_item(content)),
            Self::Empty => Some(Item::File(Arc::new(EmptyFile))),
        }
    }
}

/// The suffix of the file whose presence proves absence.
const ABSENT: &str = ".absent";
/// Keys asked for at a time.
const PAGE: usize = 1000;
/// Files that are kept while they are copied; who copies more at once has them from the cache, or read again.
const HELD_MAX: usize = 4;
/// How long a listing waits for the store; unlike a look-up it may fail, because no copy lists.
const LIST_PATIENCE: Duration = Duration::from_secs(30);

impl WalDir {
    /// Shows what `reader` reads, by the plan of a recovery if there is one.
    pub fn new(reader: Arc<WalReader>, plan: Option<RecoveryPlan>) -> Self {
        if let Some(plan) = &plan {
            plan.tell(reader.repository());
        }
        let ahead = Arc::new(WalAhead::new(reader.clone()));
        let (planned, last) = (plan.is_some(), Mutex::default());
        let copies = Arc::new(Copies { ahead: ahead.clone(), planned, last });
        Self {
            reader,
            ahead,
            copies,
            held: Arc::new(Semaphore::new(HELD_MAX)),
            plan,
            evidence: Evidence::default(),
            beginnings: WalBeginnings::default(),
        }
    }

    async fn find(&self, caller: &Caller, name: ArchiveFileName) -> Result<Option<Item>, LowerError> {
        if self.is_outside_plan(name) {
            return Ok(None);
        }
        match name {
            ArchiveFileName::Segment(segment) => self.find_segment(caller, segment).await,
            ArchiveFileName::Partial(_) => self.find_partial(name).await,
            ArchiveFileName::History(_) | ArchiveFileName::BackupHistory { .. } => {
                self.find_history(name).await
            }
        }
    }

    async fn find_segment(
        &self,
        caller: &Caller,
        segment: WalSegmentName,
    ) -> Result<Option<Item>, LowerError> {
        if let Some(end) = self.plan.as_ref().and_then(|plan| plan.ending_of(segment)) {
            let found = self.reader.read_ending(segment, end, Patience::Forever).await;
            return self.find_part(segment, found.map_err(|error| lower_error(&error))?);
        }
        if let Some(shown) = self.shown_before(caller, segment).await {
            return Ok(shown.item());
        }
        match self.size_of(segment).await? {
            Found::Present(size) => Ok(Some(self.file(ArchiveFileName::Segment(segment), size))),
            Found::Unreadable(error) => {
                tracing::error!("WAL segment {segment} is served with length 0: {error}");
                Ok(Shown::Empty.item())
            }
            Found::Absent => match self.absence(segment).await? {
                Absence::Proven => Ok(None),
                Absence::EndsIn(end) => Ok(self.show_beginning(caller, segment, end).await?.item()),
                Absence::Hole { evidence } => {
                    tracing::error!("WAL segment {segment} is missing and served with length 0: {evidence}");
                    Ok(Shown::Empty.item())
                }
            },
        }
    }

    /// Returns what a server is shown of a segment whose beginning it was shown a moment ago, whatever has come since.
    async fn shown_before(&self, caller: &Caller, segment: WalSegmentName) -> Option<Shown> {
        let now = self.reader.clock().monotonic();
        if self.beginnings.is_empty(now) {
            return None;
        }
        let server = RestoringServer::of(caller).await?;
        let beginning = self.beginnings.find(server.identity(), segment, now)?;
        Some(self.show_to(&server, segment, beginning).await)
    }

    /// Shows the segment in which the archive ends. A standby may have more of it by streaming, confirmed, and would write
    /// over that.
    async fn show_beginning(
        &self,
        caller: &Caller,
        segment: WalSegmentName,
        end: Lsn,
    ) -> Result<Shown, LowerError> {
        let Some(server) = RestoringServer::of(caller).await else {
            tracing::warn!(
                "WAL segment {segment} is there up to {end}, in pieces, and served with length 0: whoever asks is not \
                 seen to run in the data directory of a server that recovers and is no standby"
            );
            return Ok(Shown::Empty);
        };
        let found = self.reader.read_ending(segment, end, Patience::Forever).await;
        let Found::Present(beginning) = found.map_err(|error| lower_error(&error))? else {
            tracing::error!("WAL segment {segment} is served with length 0: its pieces cannot be read");
            return Ok(Shown::Empty);
        };
        let beginning =
            self.beginnings.show(server.identity(), segment, beginning, self.reader.clock().monotonic());
        Ok(self.show_to(&server, segment, beginning).await)
    }

    /// Shows a beginning to a server that has no more of the segment itself.
    async fn show_to(&self, server: &RestoringServer, segment: WalSegmentName, beginning: Bytes) -> Shown {
        match server.has_more_than(&beginning, segment, self.reader.cluster()).await {
            Ok(false) => Shown::Beginning(beginning),
            Ok(true) => {
                tracing::info!(
                    "a recovery has more of WAL segment {segment}, where the archive ends, itself"
                );
                Shown::Absent
            }
            Err(error) => {
                tracing::error!("WAL segment {segment} is served with length 0: the server's own: {error}");
                Shown::Empty
            }
        }
    }

    /// Returns how large a segment is. A recovery that looks at one reads it next, and then the one behind it: so with
    /// a plan it is read at once, and others ahead, instead of asking the store for each step of a copy.
    async fn size_of(&self, segment: WalSegmentName) -> Result<Found<u64>, LowerError> {
        let name = ArchiveFileName::Segment(segment);
        let found = match &self.plan {
            None => self.reader.size(name, Patience::Forever).await,
            Some(plan) => {
                self.ahead.follow(segment, Some(plan));
                let found = self.reader.read(name, Patience::Forever).await;
                found.map(|found| found.map(|bytes| bytes.len() as u64))
            }
        };
        found.map_err(|error| lower_error(&error))
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
            Found::Present(content) => Ok(Some(part_item(content))),
            Found::Absent => Ok(None),
            Found::Unreadable(error) => {
                tracing::error!("{name} is served with length 0: {error}");
                Ok(Some(Item::File(Arc::new(EmptyFile))))
            }
        }
    }

    /// Shows the segment in which the plan ends; without its beginning the recovery must not end there.
    fn find_part(&self, segment: WalSegmentName, found: Found<Bytes>) -> Result<Option<Item>, LowerError> {
        let reason = match found {
            Found::Present(content) => return Ok(Some(part_item(content))),
            Found::Absent => "the archive has less of it than the recovery plan".to_owned(),
            Found::Unreadable(error) => error.to_string(),
        };
        tracing::error!("WAL segment {segment} is served with length 0: {reason}");
        Ok(Some(Item::File(Arc::new(EmptyFile))))
    }

    /// Tells whether recovery may go on without the file.
    async fn is_proven_absent(&self, caller: &Caller, name: ArchiveFileName) -> Result<bool, LowerError> {
        if self.is_outside_plan(name) {
            return Ok(true);
        }
        if let ArchiveFileName::Segment(segment) = name
            && let Some(shown) = self.shown_before(caller, segment).await
        {
            return Ok(matches!(shown, Shown::Absent));
        }
        match self.reader.size(name, Patience::Forever).await.map_err(|error| lower_error(&error))? {
            Found::Present(_) | Found::Unreadable(_) => Ok(false),
            Found::Absent => match name {
                ArchiveFileName::Segment(segment) => match self.absence(segment).await? {
                    Absence::Proven => Ok(true),
                    Absence::EndsIn(end) => {
                        Ok(matches!(self.show_beginning(caller, segment, end).await?, Shown::Absent))
                    }
                    Absence::Hole { .. } => Ok(false),
                },
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
        let (repository, cluster) = (self.reader.repository(), self.reader.cluster());
        let look = || self.evidence.look(repository, cluster, segment);
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

    fn is_outside_plan(&self, name: ArchiveFileName) -> bool {
        let outside = |plan| answer(plan, name, InArchive::Present, false) == Answer::Absent;
        self.plan.as_ref().is_some_and(outside)
    }

    /// Tells whether the plan, where there is one, takes the store's *not there* for an answer.
    fn says_absent(&self, name: ArchiveFileName) -> bool {
        let absent = |plan| answer(plan, name, InArchive::Absent, false) == Answer::Absent;
        self.plan.as_ref().is_none_or(absent)
    }

    /// Returns the names under which PostgreSQL knows an object, ascending; pieces and partials stand for their segment
    /// where the plan ends in it.
    fn names_of(&self, object: WalObjectName) -> Vec<ArchiveFileName> {
        let segment = object.segment();
        let own = match object {
            WalObjectName::Segment(segment) => Some(ArchiveFileName::Segment(segment)),
            WalObjectName::Partial { segment, .. } => Some(ArchiveFileName::Partial(segment)),
            WalObjectName::BackupHistory { segment, offset } => {
                Some(ArchiveFileName::BackupHistory { segment, offset })
            }
            // It is read under the segment's own name, under which nothing else may be left.
            WalObjectName::Forced { segment, .. } => Some(ArchiveFileName::Segment(segment)),
            // PostgreSQL knows no name for what is only a part of a file.
            WalObjectName::Piece { .. } | WalObjectName::Part { .. } => None,
        };
        let is_ending = self.plan.as_ref().is_some_and(|plan| plan.ending_of(segment).is_some());
        let part = is_ending.then_some(ArchiveFileName::Segment(segment));
        part.filter(|part| own != Some(*part)).into_iter().chain(own).collect()
    }

    fn file(&self, name: ArchiveFileName, size: u64) -> Item {
        let (reader, held, opened) = (self.reader.clone(), self.held.clone(), self.copies.clone());
        Item::File(Arc::new(WalFile { reader, name, size, held, opened }))
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
                for name in self.names_of(object) {
                    let text = name.to_string();
                    let is_next = names.last().is_none_or(|last| text > *last)
                        && after.is_none_or(|after| text > after.to_string());
                    if is_next && !self.is_outside_plan(name) {
                        names.push(text);
                    }
                }
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
    async fn lookup(&self, caller: &Caller, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let Ok(name) = std::str::from_utf8(name) else { return Ok(None) };
        if let Some(name) = name.strip_suffix(ABSENT) {
            let Ok(name) = name.parse() else { return Ok(None) };
            let proof = self.is_proven_absent(caller, name).await?;
            let content = format!("{name} is not in the archive\n");
            let file = || Item::File(Arc::new(StaticFile::new(content, Timestamp::UNIX_EPOCH)));
            return Ok(proof.then(|| FoundItem { item: file(), lifetime: Lifetime::Once }));
        }
        let Ok(name) = name.parse::<ArchiveFileName>() else { return Ok(None) };
        let item = self.find(caller, name).await?;
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

impl Opened for Copies {
    /// Reads ahead once a second segment in a row is copied: one alone says nothing about the next.
    fn opened(&self, name: ArchiveFileName) {
        let ArchiveFileName::Segment(segment) = name else { return };
        if self.planned {
            return;
        }
        let Ok(number) = segment.number(self.ahead.reader().cluster().segment_size) else { return };
        let last = self.last.lock().expect("no holder of this lock panics").replace(number);
        // The same number again may be the same segment, or the one with which another timeline begins.
        if last.is_some_and(|last| number.0 == last.0 || number.0 == last.0 + 1) {
            self.ahead.follow(segment, None);
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

/// A beginning of a segment as it is now; more of it may come, so that each content is a file of its own.
fn part_item(content: Bytes) -> Item {
    let digest = *Digest::of(&content).as_bytes();
    let identity = u64::from_le_bytes(*digest.first_chunk().expect("a digest has 32 bytes"));
    Item::File(Arc::new(PartialFile { content, identity: identity.max(2) }))
}

#[cfg(test)]
mod tests {
    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::mount::fs::IoMode;
    use crate::mount::restoring::tests::RestoreCommand;
    use crate::pg::Lsn;
    use crate::repo::wal_object::{
        ArchiveHead, HistoryBranch, WalKey, archive_head, archive_history, archive_piece, archive_wal,
    };
    use crate::repo::{ClusterId, Repository, testing};
    use crate::storage::{self, Fault, Faulty, MemoryStore, Recording, Rule, Store, Verb};

    use super::*;

    const MIB: u64 = 1 << 20;

    struct Archive {
        store: Arc<Recording<Faulty<Arc<MemoryStore>>>>,
        repository: Repository,
    }

    impl Archive {
        async fn new() -> Self {
            let store = Arc::new(Recording::new(Faulty::new(Arc::new(MemoryStore::new()))));
            Self { repository: testing::site(store.clone(), SystemClock).await, store }
        }

        /// Archives segments of timelines 1, 2, …, and histories `(timeline, parent, switch in segments)`.
        async fn of(segments: &[(u32, u64)], histories: &[(u32, u32, f64)]) -> Self {
            let archive = Self::new().await;
            let key = WalKey::create(archive.repository.keyring()).unwrap();
            let (repository, zstd) = (&archive.repository, Compression::zstd(1));
            for (timeline, number) in segments {
                let object = WalObjectName::Segment(segment(*timeline, *number));
                let raw = vec![*number as u8; 300_000];
                archive_wal(repository, cluster(), object, &raw, &key, zstd).await.unwrap();
            }
            for (timeline, parent, switch) in histories {
                let switch = Lsn((switch * MIB as f64) as u64);
                let branch = HistoryBranch { parent: tli(*parent), switch };
                let text = format!("{parent}\t{switch}\tx\n");
                let raw = text.as_bytes();
                archive_history(repository, cluster(), tli(*timeline), branch, raw, &key).await.unwrap();
            }
            archive
        }

        fn dir(&self, plan: Option<RecoveryPlan>) -> WalDir {
            let clock = Arc::new(SystemClock);
            let reader = WalReader::new(self.repository.clone(), cluster(), clock, 8 << 20);
            WalDir::new(Arc::new(reader), plan)
        }

        fn tamper(&self, timeline: u32, number: u64, damage: impl FnOnce(&[u8]) -> Vec<u8>) {
            let object = WalObjectName::Segment(segment(timeline, number));
            let key = self.repository.layout().wal_object(cluster(), object);
            self.store.inner().inner().tamper(&key, |bytes| bytes.map(|bytes| damage(&bytes).into()));
        }
    }

    fn cluster() -> ClusterId {
        "7301234567890123456-1".parse().unwrap()
    }

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn segment(timeline: u32, number: u64) -> WalSegmentName {
        WalSegmentName::new(tli(timeline), WalSegmentNumber(number), cluster().segment_size)
    }

    /// What a copy of the name would be: its length and whether its absence is proven.
    #[derive(Debug, PartialEq)]
    enum Seen {
        Bytes(usize),
        ProvenAbsent,
    }

    async fn see(dir: &WalDir, name: &str) -> Seen {
        let found = dir.lookup(&Caller::internal(), name.as_bytes()).await.unwrap();
        let proof = dir.lookup(&Caller::internal(), format!("{name}{ABSENT}").as_bytes()).await.unwrap();
        // Never both, and never neither: either would let a recovery end that must not.
        assert_eq!(found.is_none(), proof.is_some(), "{name}");
        let Some(FoundItem { item: Item::File(file), .. }) = found else { return Seen::ProvenAbsent };
        let (reader, _) = file.open().await.unwrap();
        Seen::Bytes(reader.read(0, u32::MAX).await.unwrap().len())
    }

    async fn see_segment(dir: &WalDir, timeline: u32, number: u64) -> Seen {
        see(dir, &segment(timeline, number).to_string()).await
    }

    #[tokio::test]
    async fn absence_is_proven_only_behind_everything_that_shows_a_segment_was_written() {
        // 1 was left in segment 5 by 2, whose archive begins there; 3 left 2 at the end of segment 7.
        let archive =
            Archive::of(&[(1, 2), (1, 4), (2, 5), (2, 6), (3, 8)], &[(2, 1, 5.5), (3, 2, 8.0)]).await;
        let dir = archive.dir(None);
        for (timeline, number, seen) in [
            (1, 2, Seen::Bytes(300_000)),
            // A later one is there, or expired ones before it.
            (1, 3, Seen::Bytes(0)),
            (1, 1, Seen::Bytes(0)),
            // The switch-point segment is read from the child, and nothing of 1 lies behind it.
            (1, 5, Seen::ProvenAbsent),
            (1, 6, Seen::ProvenAbsent),
            // Nothing later on its own timeline, but 3 goes through it.
            (2, 7, Seen::Bytes(0)),
            (2, 8, Seen::ProvenAbsent),
            (3, 8, Seen::Bytes(300_000)),
            (3, 9, Seen::ProvenAbsent),
            (4, 9, Seen::ProvenAbsent),
        ] {
            assert_eq!(see_segment(&dir, timeline, number).await, seen, "{timeline} {number}");
        }
        assert_eq!(see(&dir, "00000002.history").await, Seen::Bytes(13));
        assert_eq!(see(&dir, "00000004.history").await, Seen::ProvenAbsent);
        for stranger in ["", "x", "RECOVERYXLOG", ".absent", "000000010000000000000002.tmp"] {
            assert!(
                dir.lookup(&Caller::internal(), stranger.as_bytes()).await.unwrap().is_none(),
                "{stranger}"
            );
        }
    }

    #[tokio::test]
    async fn damage_anywhere_is_a_file_without_content() {
        for damage in [
            |bytes: &[u8]| bytes[..bytes.len() - 1].to_vec(),
            |bytes: &[u8]| bytes[..10].to_vec(),
            |bytes: &[u8]| [&bytes[..20], &[bytes[20] ^ 1], &bytes[21..]].concat(),
            |bytes: &[u8]| [&bytes[..bytes.len() - 9], &[0xee; 9]].concat(),
        ] {
            let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
            archive.tamper(1, 3, damage);
            let dir = archive.dir(None);
            assert_eq!(see_segment(&dir, 1, 3).await, Seen::Bytes(0));
            assert_eq!(see_segment(&dir, 1, 2).await, Seen::Bytes(300_000));
        }
        // Another segment's object under this name is not this segment.
        let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
        let store = archive.store.inner().inner();
        let object = WalObjectName::Segment(segment(1, 2));
        let other = store.get(&archive.repository.layout().wal_object(cluster(), object), 1 << 30).await;
        archive.tamper(1, 3, |_| other.unwrap().to_vec());
        assert_eq!(see_segment(&archive.dir(None), 1, 3).await, Seen::Bytes(0));
    }

    /// Waits until the store has been asked this often since `calls` was emptied.
    async fn asked(archive: &Archive, times: usize) {
        while archive.store.calls().len() < times {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Failure 1: a store that does not answer is waited for, whatever it was asked.
    #[tokio::test]
    async fn no_name_is_answered_while_the_store_is_away() {
        let archive = Archive::of(&[(1, 2)], &[(2, 1, 2.5)]).await;
        for kind in [storage::ErrorKind::Unreachable, storage::ErrorKind::Denied, storage::ErrorKind::Other] {
            let dir = Arc::new(archive.dir(None));
            let (there, absent) = (segment(1, 2).to_string(), segment(1, 3).to_string());
            let names = [(there, true), (absent, false)].into_iter();
            let names = names.chain([("00000002.history".into(), true), ("00000003.history".into(), false)]);
            let names: Vec<(String, bool)> = names
                .flat_map(|(name, there)| [(format!("{name}{ABSENT}"), !there), (name, there)])
                .collect();
            archive.store.inner().inject(Rule::always(Fault::Before(kind)));
            archive.store.take_calls();
            let waiting: Vec<_> = names
                .iter()
                .map(|(name, _)| {
                    let (dir, name) = (dir.clone(), name.clone());
                    tokio::spawn(async move {
                        dir.lookup(&Caller::internal(), name.as_bytes()).await.unwrap().is_some()
                    })
                })
                .collect();
            asked(&archive, 3 * names.len()).await;
            for ((name, there), waiting) in names.iter().zip(&waiting) {
                assert!(!waiting.is_finished(), "{name} was answered, {kind:?}, {there}");
            }
            archive.store.inner().heal();
            for ((name, there), waiting) in names.iter().zip(waiting) {
                assert_eq!(waiting.await.unwrap(), *there, "{name}");
            }
        }
    }

    #[tokio::test]
    async fn a_history_that_cannot_be_read_is_waited_for_and_never_empty() {
        let archive = Archive::of(&[(1, 2)], &[(2, 1, 2.5)]).await;
        let key = archive.repository.layout().history(cluster(), tli(2));
        let mut whole = None;
        archive.store.inner().inner().tamper(&key, |bytes| {
            whole = bytes.clone();
            bytes.map(|bytes| bytes.slice(..bytes.len() - 1))
        });
        let dir = Arc::new(archive.dir(None));
        archive.store.take_calls();
        let waiting = tokio::spawn(async move { see(&dir, "00000002.history").await });
        asked(&archive, 3).await;
        assert!(!waiting.is_finished());
        archive.store.inner().inner().tamper(&key, |_| whole);
        assert_eq!(waiting.await.unwrap(), Seen::Bytes(13));
    }

    #[tokio::test]
    async fn a_site_that_is_gone_proves_nothing() {
        let archive = Archive::of(&[(1, 2)], &[]).await;
        archive.store.inner().inner().tamper(&archive.repository.layout().site(), |_| None);
        assert_eq!(see_segment(&archive.dir(None), 1, 3).await, Seen::Bytes(0));
    }

    fn plan_to(last: u64) -> RecoveryPlan {
        let span = crate::catalog::TimelineSpan {
            timeline: tli(1),
            first: segment(1, 2),
            last: Some(segment(1, last)),
            history: false,
            end: None,
        };
        let (basebackup, spans, forced, carried) = (None, vec![span], Some(Vec::new()), None);
        RecoveryPlan { format: 1, cluster: cluster(), basebackup, spans, standby: false, forced, carried }
    }

    #[tokio::test]
    async fn a_recovery_finds_the_next_segments_at_hand_and_the_store_is_asked_once_for_each() {
        let segments: Vec<(u32, u64)> = (2..=12).map(|number| (1, number)).collect();
        let archive = Archive::of(&segments, &[]).await;
        let dir = archive.dir(Some(plan_to(12)));
        archive.store.take_calls();
        assert_eq!(see_segment(&dir, 1, 2).await, Seen::Bytes(300_000));
        // The cache holds eight segments: the one that is read, and seven to come.
        asked(&archive, 8).await;
        tokio::task::yield_now().await;
        assert_eq!(archive.store.take_calls().len(), 8);
        for number in 3..=12 {
            assert_eq!(see_segment(&dir, 1, number).await, Seen::Bytes(300_000), "{number}");
            tokio::task::yield_now().await;
        }
        assert_eq!(archive.store.take_calls().len(), 3);
    }

    #[tokio::test]
    async fn without_a_plan_a_second_copy_in_a_row_has_read_ahead_what_is_there() {
        let segments: Vec<(u32, u64)> =
            (2..=12).filter(|number| *number != 7).map(|number| (1, number)).collect();
        let archive = Archive::of(&segments, &[]).await;
        let dir = archive.dir(None);
        archive.store.take_calls();
        assert_eq!(see_segment(&dir, 1, 2).await, Seen::Bytes(300_000));
        let bodies = |archive: &Archive| {
            let calls = archive.store.calls();
            calls.iter().filter(|call| call.verb == Verb::Get).count()
        };
        tokio::task::yield_now().await;
        assert_eq!(bodies(&archive), 1, "one copy alone says nothing about the next");
        archive.store.take_calls();
        assert_eq!(see_segment(&dir, 1, 3).await, Seen::Bytes(300_000));
        // 4, 5 and 6 come after it; 7 is not there.
        while bodies(&archive) < 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::task::yield_now().await;
        archive.store.take_calls();
        for number in 4..=6 {
            assert_eq!(see_segment(&dir, 1, number).await, Seen::Bytes(300_000), "{number}");
        }
        assert_eq!(bodies(&archive), 0);
        assert_eq!(see_segment(&dir, 1, 7).await, Seen::Bytes(0));
        // Backwards, as a recovery asks at its end.
        assert_eq!(see_segment(&dir, 1, 5).await, Seen::Bytes(300_000));
    }

    /// Failure 7: the successor of `…FF` was computed wrongly.
    #[tokio::test]
    async fn failure_7_without_a_plan_what_is_read_ahead_goes_on_behind_the_end_of_a_log() {
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let names = ["2000000FD", "2000000FE", "2000000FF", "300000000", "300000001"]
            .map(|end| format!("00000001{end:0>16}"));
        let archive = Archive::new().await;
        let key = WalKey::create(archive.repository.keyring()).unwrap();
        for name in &names {
            let (object, raw) = (WalObjectName::Segment(name.parse().unwrap()), vec![1; 1000]);
            let zstd = Compression::zstd(1);
            archive_wal(&archive.repository, cluster, object, &raw, &key, zstd).await.unwrap();
        }
        let cache = 8 * cluster.segment_size.bytes() as usize;
        let reader = WalReader::new(archive.repository.clone(), cluster, Arc::new(SystemClock), cache);
        let dir = WalDir::new(Arc::new(reader), None);
        let bodies = || {
            let calls = archive.store.calls().into_iter().filter(|call| call.verb == Verb::Get);
            let mut keys: Vec<String> = calls.map(|call| call.key).collect();
            keys.sort();
            keys
        };
        archive.store.take_calls();
        assert_eq!(see(&dir, &names[0]).await, Seen::Bytes(1000));
        assert_eq!(see(&dir, &names[1]).await, Seen::Bytes(1000));
        while bodies().len() < names.len() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::task::yield_now().await;
        // Each once, and nothing that is not there.
        for (key, name) in bodies().iter().zip(&names) {
            assert!(key.ends_with(name), "{key} for {name}");
        }
        assert_eq!(bodies().len(), names.len());
        archive.store.take_calls();
        for name in &names[2..] {
            assert_eq!(see(&dir, name).await, Seen::Bytes(1000), "{name}");
        }
        assert_eq!(bodies(), Vec::<String>::new());
        assert_eq!(see(&dir, "000000010000000300000002").await, Seen::ProvenAbsent);
    }

    #[tokio::test]
    async fn with_a_plan_the_plan_decides_where_the_archive_ends() {
        let archive = Archive::of(&[(1, 2), (1, 3), (1, 5), (1, 6)], &[]).await;
        let dir = archive.dir(Some(plan_to(5)));
        assert_eq!(see_segment(&dir, 1, 3).await, Seen::Bytes(300_000));
        assert_eq!(see_segment(&dir, 1, 4).await, Seen::Bytes(0));
        // What is read ahead has its turn before anything is counted.
        tokio::task::yield_now().await;
        archive.store.take_calls();
        // Behind the plan's end nobody is asked, and what is there is not shown.
        assert_eq!(see_segment(&dir, 1, 6).await, Seen::ProvenAbsent);
        assert_eq!(archive.store.take_calls(), []);
        assert_eq!(see(&dir, "00000002.history").await, Seen::ProvenAbsent);
        let listed = dir.list(None, 100).await.unwrap();
        let names: Vec<WalSegmentName> =
            listed.iter().map(|(name, _)| std::str::from_utf8(name).unwrap().parse().unwrap()).collect();
        assert_eq!(names, [segment(1, 2), segment(1, 3), segment(1, 5)]);
    }

    impl Archive {
        async fn piece(&self, number: u64, from: u32, to: u32) {
            let key = WalKey::create(self.repository.keyring()).unwrap();
            let (segment, bytes) = (segment(1, number), vec![7; (to - from) as usize]);
            let zstd = Compression::zstd(1);
            archive_piece(&self.repository, cluster(), segment, from..to, &bytes, &key, zstd).await.unwrap();
        }
    }

    /// Shows the content of a segment, and whether the kernel may keep it.
    async fn content_of(dir: &WalDir, number: u64) -> (Vec<u8>, u64, bool) {
        let found = dir
            .lookup(&Caller::internal(), segment(1, number).to_string().as_bytes())
            .await
            .unwrap()
            .unwrap();
        let keeps = matches!(found.lifetime, Lifetime::Forever);
        let Item::File(file) = found.item else { panic!("it is no file") };
        let (reader, mode) = file.open().await.unwrap();
        assert_eq!(mode, IoMode::Direct);
        (reader.read(0, u32::MAX).await.unwrap().to_vec(), file.identity(), keeps)
    }

    #[tokio::test]
    async fn the_segment_in_which_a_plan_ends_is_shown_padded_and_uncached() {
        let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
        archive.piece(4, 0, 500).await;
        archive.piece(4, 500, 900).await;
        let planned = |end| {
            let mut plan = plan_to(4);
            plan.spans[0].end = Some(Lsn(4 * MIB + end));
            plan
        };
        let dir = archive.dir(Some(planned(700)));
        let (content, identity, keeps) = content_of(&dir, 4).await;
        assert_eq!(content, [vec![7; 700], vec![0; MIB as usize - 700]].concat());
        assert!(identity > 1 && !keeps);
        assert!(content_of(&dir, 3).await.2, "a whole segment is kept");
        let (_, other, _) = content_of(&archive.dir(Some(planned(900))), 4).await;
        assert_ne!(identity, other, "another content is another file");
        let names = dir.list(None, 100).await.unwrap();
        let expected = [2, 3, 4].map(|number| segment(1, number).to_string().into_bytes());
        assert_eq!(names.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), expected);
        assert_eq!(dir.list(Some(&expected[2]), 100).await.unwrap(), []);
        // Less than planned is a hole, and not the end.
        assert_eq!(see_segment(&archive.dir(Some(planned(901))), 1, 4).await, Seen::Bytes(0));
        // A standby waits for the whole segment.
        let standby = RecoveryPlan { standby: true, ..planned(700) };
        assert_eq!(see_segment(&archive.dir(Some(standby)), 1, 4).await, Seen::ProvenAbsent);
    }

    /// What a recovery that ends is shown of a segment, and a standby at the same moment.
    async fn without_a_plan(archive: &Archive, number: u64) -> (Vec<u8>, usize) {
        let restoring = RestoreCommand::new();
        let (dir, name) = (archive.dir(None), segment(1, number).to_string());
        let content = async |dir: &WalDir| {
            let found = dir.lookup(&restoring.caller(), name.as_bytes()).await.unwrap().unwrap();
            assert!(matches!(found.lifetime, Lifetime::Once));
            let Item::File(file) = found.item else { panic!("it is no file") };
            file.open().await.unwrap().0.read(0, u32::MAX).await.unwrap().to_vec()
        };
        let shown = content(&dir).await;
        let proof = dir.lookup(&restoring.caller(), format!("{name}{ABSENT}").as_bytes()).await.unwrap();
        assert!(proof.is_none(), "both are there");
        std::fs::write(restoring.folder.path().join("standby.signal"), "").unwrap();
        (shown, content(&dir).await.len())
    }

    #[tokio::test]
    async fn without_a_plan_a_recovery_that_ends_is_shown_the_pieces_in_which_the_archive_ends() {
        let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
        archive.piece(4, 0, 500).await;
        archive.piece(4, 500, 900).await;
        let padded = |length: usize| [vec![7; length], vec![0; MIB as usize - length]].concat();
        assert_eq!(without_a_plan(&archive, 4).await, (padded(900), 0));
        let head = async |end| {
            let written_at = archive.repository.clock().now();
            let head = ArchiveHead { timeline: tli(1), end: Lsn(end), written_at };
            archive_head(&archive.repository, cluster(), &head).await.unwrap();
        };
        head(4 * MIB + 900).await;
        assert_eq!(without_a_plan(&archive, 4).await, (padded(900), 0));
        // The archive had more of it.
        head(4 * MIB + 901).await;
        assert_eq!(without_a_plan(&archive, 4).await, (vec![], 0));
        // A gap in the pieces, and a later segment's.
        let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
        archive.piece(4, 0, 500).await;
        assert_eq!(without_a_plan(&archive, 4).await, (padded(500), 0));
        archive.piece(4, 501, 900).await;
        assert_eq!(without_a_plan(&archive, 4).await, (vec![], 0));
        archive.piece(4, 500, 501).await;
        assert_eq!(without_a_plan(&archive, 4).await, (padded(900), 0));
        archive.piece(5, 0, 10).await;
        assert_eq!(without_a_plan(&archive, 4).await, (vec![], 0));
    }

    #[tokio::test]
    async fn a_copy_goes_on_with_what_it_was_shown_first() {
        let archive = Archive::of(&[(1, 2), (1, 3)], &[]).await;
        archive.piece(4, 0, 500).await;
        let (restoring, dir) = (RestoreCommand::new(), archive.dir(None));
        let identity = async || {
            let name = segment(1, 4).to_string();
            let found = dir.lookup(&restoring.caller(), name.as_bytes()).await.unwrap().unwrap();
            let Item::File(file) = found.item else { panic!("it is no file") };
            (file.identity(), file.size())
        };
        let first = identity().await;
        archive.piece(4, 500, 900).await;
        assert_eq!(identity().await, first);
        // All of it comes, and the next one's beginning.
        archive.piece(4, 900, MIB as u32).await;
        archive.piece(5, 0, 10).await;
        assert_eq!(identity().await, first);
        // Anybody else sees what there is.
        let (content, ..) = content_of(&dir, 4).await;
        assert_eq!(content, vec![7; MIB as usize]);
    }

    #[tokio::test]
    async fn a_recovery_that_has_more_of_the_last_segment_itself_reads_its_own() {
        let mut wal = include_bytes!("../../tests/data/wal/15-start").to_vec();
        wal[24..32].copy_from_slice(&cluster().system_identifier.0.to_le_bytes());
        wal.resize(MIB as usize, 0);
        let archive = Archive::new().await;
        let key = WalKey::create(archive.repository.keyring()).unwrap();
        let (nine, zstd) = (segment(1, 9), Compression::zstd(1));
        archive_piece(&archive.repository, cluster(), nine, 0..9000, &wal[..9000], &key, zstd).await.unwrap();
        let see = async |own: Option<&[u8]>| {
            let (restoring, dir) = (RestoreCommand::new(), archive.dir(None));
            if let Some(own) = own {
                std::fs::write(restoring.folder.path().join(format!("pg_wal/{nine}")), own).unwrap();
            }
            let looked = async |suffix: &str| {
                let name = format!("{nine}{suffix}");
                dir.lookup(&restoring.caller(), name.as_bytes()).await.unwrap().is_some()
            };
            // Whatever is asked for first.
            (looked(ABSENT).await, looked("").await, looked(ABSENT).await)
        };
        let (served, absent) = ((false, true, false), (true, false, true));
        assert_eq!(see(None).await, served);
        assert_eq!(see(Some(&wal)).await, absent);
        let short = [&wal[..5000], &vec![0; wal.len() - 5000]].concat();
        assert_eq!(see(Some(&short)).await, served, "it has less");
        assert_eq!(see(Some(&wal[..9000])).await, served, "it is no whole file");
        let mut of_another = wal.clone();
        of_another[24] ^= 1;
        assert_eq!(see(Some(&of_another)).await, served);
    }

    #[tokio::test]
    async fn pieces_of_a_timeline_that_another_one_left_are_shown_up_to_the_switch_point() {
        let at = |bytes: u32| 4.0 + f64::from(bytes) / MIB as f64;
        let padded = |length: usize| [vec![7; length], vec![0; MIB as usize - length]].concat();
        for (switch, shown) in [(300, padded(300)), (500, padded(500)), (501, vec![]), (MIB as u32, vec![])] {
            let archive = Archive::of(&[(1, 3)], &[(2, 1, at(switch))]).await;
            archive.piece(4, 0, 500).await;
            assert_eq!(without_a_plan(&archive, 4).await, (shown, 0), "{switch}");
        }
    }

    #[tokio::test]
    async fn without_a_plan_pieces_and_heads_prove_that_wal_was_written() {
        let archive = Archive::of(&[(1, 2)], &[]).await;
        archive.piece(4, 0, 500).await;
        let dir = archive.dir(None);
        for (number, seen) in [(3, Seen::Bytes(0)), (4, Seen::Bytes(0)), (5, Seen::ProvenAbsent)] {
            assert_eq!(see_segment(&dir, 1, number).await, seen, "{number}");
        }
        let written_at = archive.repository.clock().now();
        let head = ArchiveHead { timeline: tli(1), end: Lsn(6 * MIB), written_at };
        archive_head(&archive.repository, cluster(), &head).await.unwrap();
        for (number, seen) in [(5, Seen::Bytes(0)), (6, Seen::ProvenAbsent)] {
            assert_eq!(see_segment(&dir, 1, number).await, seen, "{number}");
        }
    }

    #[tokio::test]
    async fn a_listing_comes_in_batches_in_the_order_of_names_and_a_lookup_lists_no_folder() {
        let segments: Vec<(u32, u64)> = (0..30).map(|n| (1 + n / 15, 4090 + u64::from(n % 15))).collect();
        let archive = Archive::of(&segments, &[(2, 1, 4090.5), (7, 2, 4100.0)]).await;
        let dir = archive.dir(None);
        let whole = dir.list(None, 1000).await.unwrap();
        assert_eq!(whole.len(), 32);
        assert!(whole.is_sorted_by(|(one, _), (other, _)| one < other));
        let mut batches: Vec<(Vec<u8>, FileKind)> = Vec::new();
        loop {
            let after = batches.last().map(|(name, _)| name.clone());
            let batch = dir.list(after.as_deref(), 7).await.unwrap();
            let last = batch.len() < 7;
            batches.extend(batch);
            if last {
                break;
            }
        }
        assert_eq!(batches, whole);
        archive.store.take_calls();
        assert_eq!(see_segment(&dir, 1, 4092).await, Seen::Bytes(300_000));
        // One request tells of all that may supersede it and those behind it.
        let calls = archive.store.calls();
        assert!(calls.iter().all(|call| call.verb != Verb::ListFolder), "{calls:#?}");
        assert!(calls.iter().filter(|call| call.verb == Verb::List).count() <= 1, "{calls:#?}");
    }
}
