//! Incremental basebackups against a model: random histories of files, each basebackup restored bit by bit.
//!
//! Files come from memory with inodes and ctimes as a file system gives them, the state stands in a folder, the
//! repository in memory. The model knows which pages differ from those of the parent.

mod hinted;
mod many_files;

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use proptest::prelude::*;

use crate::backup::change::{Decision, Incremental, Reason, Today};
use crate::backup::changed_blocks::ChangedBlocks;
use crate::backup::data_directory::FileIdentity;
use crate::backup::error::Error;
use crate::backup::hints::Hints;
use crate::backup::packer::{Packed, Packer, Stored, WorkDone};
use crate::backup::pipeline::{Budget, CopySource, copy};
use crate::backup::plan::{PlanOptions, SMALL_FILE_BYTES};
use crate::backup::read_pages::JobContext;
use crate::backup::read_small::INLINE_BYTES;
use crate::backup::reading::{Reading, plan_reading};
use crate::backup::server_record::empty_record;
use crate::backup::site_state::{Begun, SiteState};
use crate::backup::state::{State, StateFolder};
use crate::backup::tests::{MemorySource, bytes};
use crate::clock::{Clock, ManualClock};
use crate::codec::{
    Compression, CpuPool, NewKeys, RecipientKey, RecipientPrivateKey, SeededRandom, SigningKey, VerifyKey,
    create_keys,
};
use crate::monitor::{Monitor, RecordingMonitor, Task};
use crate::pg::{Crc32c, Lsn, TimelineId};
use crate::repo::{
    Basebackup, BasebackupId, BasebackupWriter, BeginOptions, Completion, FileReader, Keyring,
    KeyringOptions, NamedChunks, Repository,
    documents::BackupRecord,
    entry::{Content, Node, TreePath},
    manifest::ManifestContent,
    page_map::{MAP_BLOCK_BYTES, PAGE_SIZE},
    testing,
};
use crate::storage::{MemoryStore, Store};

const PAGE: usize = PAGE_SIZE as usize;
const BUDGET: Budget = Budget { jobs: 6, uploads: 2 };
/// What a basebackup itself adds.
const MANIFEST: &str = "data/backup_manifest";
const HOUR: Duration = Duration::from_secs(3600);

/// A host with a server's files and a state folder, and the repository it writes to.
pub(super) struct Host {
    pub(super) repository: Repository,
    store: Arc<MemoryStore>,
    pub(super) clock: ManualClock,
    pub(super) states: tempfile::TempDir,
    pub(super) files: BTreeMap<String, Vec<u8>>,
    identities: BTreeMap<String, FileIdentity>,
    next_inode: u64,
    /// Whether files were changed without a trace: what is remembered of them is wrong until all are read.
    forged: bool,
    /// What the server's WAL says.
    hints: Option<Hints>,
    today: Box<dyn Fn(Today) -> Today>,
    pub(super) taken: Vec<Taken>,
}

/// A basebackup and what it was taken of.
pub(super) struct Taken {
    pub(super) record: BackupRecord,
    files: BTreeMap<String, Vec<u8>>,
    identities: BTreeMap<String, FileIdentity>,
    at: Timestamp,
    decision: Decision,
    work: WorkDone,
    written_again: usize,
    pub(super) start_set_again: bool,
    /// How often others had their turn while files were copied.
    turns: u64,
}

/// A basebackup that has begun and has read nothing yet.
struct Announced {
    states: SiteState,
    begun: Begun,
    today: Today,
    writer: Arc<BasebackupWriter>,
    at: Timestamp,
}

/// A basebackup whose files have been read.
struct Copied {
    states: SiteState,
    begun: Begun,
    today: Today,
    writer: Arc<BasebackupWriter>,
    packer: Packer,
    at: Timestamp,
    start_set_again: bool,
    turns: u64,
}

impl Host {
    pub(super) async fn new() -> Self {
        let (store, clock) = (Arc::new(MemoryStore::new()), testing::clock());
        let repository = testing::site(store.clone(), clock.clone()).await;
        Self {
            repository,
            store,
            clock,
            states: tempfile::tempdir().unwrap(),
            files: BTreeMap::new(),
            identities: BTreeMap::new(),
            next_inode: 100,
            forged: false,
            hints: None,
            today: Box::new(|today| today),
            taken: Vec::new(),
        }
    }

    /// Writes a file as a server does: in place where it is there, else as a new one.
    pub(super) fn write(&mut self, path: &str, raw: Vec<u8>) {
        let changed = self.clock.now();
        let new = FileIdentity { device: 7, inode: self.next_inode, changed };
        self.next_inode += 1;
        self.identities.entry(path.to_owned()).or_insert(new).changed = changed;
        self.files.insert(path.to_owned(), raw);
    }

    pub(super) fn change(&mut self, path: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut raw = self.files[path].clone();
        change(&mut raw);
        self.write(path, raw);
    }

    fn remove(&mut self, path: &str) {
        self.files.remove(path);
        self.identities.remove(path);
    }

    /// Takes a basebackup an hour later.
    pub(super) async fn back_up(&mut self) -> &Taken {
        self.try_back_up(false, true).await.unwrap()
    }

    /// Begins a basebackup and copies the files.
    async fn copied(&mut self, full: bool) -> Result<Copied, Error> {
        let announced = self.announced(full).await?;
        self.copied_from(announced).await
    }

    /// Begins a basebackup an hour later.
    async fn announced(&mut self, full: bool) -> Result<Announced, Error> {
        self.clock.advance(HOUR);
        let at = self.clock.now();
        let states = SiteState::take(&self.repository, Ok(self.states.path())).await?;
        let cluster = "7301234567890123456-16".parse().unwrap();
        let today = (self.today)(Today::of(&self.repository, cluster, TimelineId::FIRST, true));
        let prepared = states.prepare(&self.repository, &today, full, None).await?;
        let begin = BeginOptions {
            cluster: today.cluster,
            timeline: today.timeline,
            wal_floor: Lsn(0x0200_0028),
            parent: None,
            host: "test".to_owned(),
            pid: 1,
        };
        let (writer, begun) = states.begin(&self.repository, begin, prepared).await?;
        Ok(Announced { states, begun, today, writer: Arc::new(writer), at })
    }

    /// Copies the files as they are now.
    async fn copied_from(&self, announced: Announced) -> Result<Copied, Error> {
        let Announced { states, begun, today, writer, at } = announced;
        let compression = Compression::zstd(1);
        let mut packer = Packer::new(writer.clone(), compression, BUDGET.uploads)
            .remembering(states.writer(writer.id()).await.unwrap());
        if let Some(parent) = &begun.parent {
            packer = packer.writing_again(parent.written_again());
        }
        if let Some(journal) = states.journal(writer.id(), &begun, &today) {
            packer = packer.journaling(journal);
        }
        let source = MemorySource::of(self.files.clone(), self.identities.clone());
        let files = source.walk();
        let options = PlanOptions { postgres: Some(5), ..PlanOptions::default() };
        let (parent, hints) = (begun.parent.as_deref(), self.hints.as_ref());
        let Reading { plan, start_set_again } = plan_reading(&files, &options, parent, hints);
        let context = Arc::new(JobContext {
            source: Arc::new(source),
            page_check: None,
            compression,
            hash_key: begun.hash_key.clone(),
            parent: begun.parent.clone(),
        });
        let progress = RecordingMonitor::default().start(Task::bytes("backup", plan.bytes));
        let source = CopySource { plan: &plan, files: &files, context: &context, start_set_again };
        let pool = CpuPool::new(2, 2);
        let mut turns = 0;
        {
            let mut copying = pin!(copy(source, &pool, BUDGET, &mut packer, &progress));
            poll_fn(|context| {
                turns += 1;
                copying.as_mut().poll(context)
            })
            .await?;
        }
        Ok(Copied { states, begun, today, writer, packer, at, start_set_again, turns })
    }

    /// Takes a basebackup that is killed before its last packs are up.
    async fn kill(&mut self) -> BasebackupId {
        let Copied { states, packer, writer, .. } = self.copied(false).await.unwrap();
        let id = writer.id();
        // Nothing of it ends in order; the lock goes with the process.
        let _killed = ManuallyDrop::new((packer, writer));
        drop(states);
        id
    }

    /// Takes a basebackup; `saved`: its state is kept.
    async fn try_back_up(&mut self, full: bool, saved: bool) -> Result<&Taken, Error> {
        let copied = self.copied(full).await?;
        self.completed(copied, saved).await
    }

    /// Stores what is left of a basebackup and commits it; `saved`: its state is kept.
    async fn completed(&mut self, copied: Copied, saved: bool) -> Result<&Taken, Error> {
        let Copied { states, begun, today, writer, packer, at, start_set_again, turns } = copied;
        let compression = Compression::zstd(1);
        let Stored { packed, named, state } = packer.finish().await?;
        let copied = packed.entries.iter().zip(&packed.checksums).filter(|_| !self.forged);
        for (entry, crc) in copied.filter(|(entry, _)| entry.path.to_string() != MANIFEST) {
            assert_eq!(*crc, Some(Crc32c::of(&self.files[&entry.path.to_string()])), "{}", entry.path);
        }
        let mut work = packed.work;
        work.chunks_reused = named.chunks_not_of(writer.id());
        let completion = completion_of(packed, named, &writer, &today, compression);
        let committed = Arc::into_inner(writer).unwrap().finish_pinned(completion).await?;
        if saved {
            states.save(state, &begun, &today, &committed).await;
        }
        let written_again = begun.parent.as_ref().map_or(0, |parent| parent.written_again().len())
            + usize::from(start_set_again);
        self.taken.push(Taken {
            record: committed.record,
            files: self.files.clone(),
            identities: self.identities.clone(),
            at,
            decision: begun.decision,
            work,
            written_again,
            start_set_again,
            turns,
        });
        Ok(self.taken.last().unwrap())
    }

    /// Reads every file of a basebackup back.
    async fn restored(&self, id: BasebackupId) -> (FileReader, BTreeMap<String, Vec<u8>>) {
        let basebackup = Basebackup::open(&self.repository, id).await.unwrap();
        let reader = FileReader::new(Arc::new(basebackup), 4 << 20);
        let mut found = BTreeMap::new();
        for n in 0..reader.basebackup().block_count() {
            for entry in reader.basebackup().block(n).await.unwrap().iter() {
                let raw = reader.read(entry, 0..entry.size()).await.unwrap();
                let twice = found.insert(entry.path.to_string(), raw.to_vec());
                assert!(twice.is_none(), "{} is there twice", entry.path);
            }
        }
        (reader, found)
    }

    /// Restores a basebackup and holds it against what it was taken of.
    pub(super) async fn assert_restores(&self, taken: &Taken) {
        self.assert_holds(taken.record.id, &taken.files).await;
    }

    /// Restores a basebackup and holds it against these files.
    pub(super) async fn assert_holds(&self, id: BasebackupId, files: &BTreeMap<String, Vec<u8>>) {
        let (reader, found) = self.restored(id).await;
        let differing: Vec<&String> =
            files.keys().filter(|path| found.get(*path) != files.get(*path)).collect();
        assert!(differing.is_empty(), "basebackup {id}: {differing:?} are not what was read");
        assert_eq!(found.len(), files.len());
        reader.prefetch_start_set(64 << 20).await.unwrap();
    }

    async fn assert_all_restore(&self) {
        for taken in &self.taken {
            self.assert_restores(taken).await;
        }
    }

    /// Opens what is remembered of the last basebackup.
    fn state(&self) -> State {
        let folder = self.states.path().join(self.repository.site().to_string());
        StateFolder::new(folder).open().unwrap().expect("a basebackup is remembered")
    }

    /// Returns where the content of a file stands.
    async fn content(&self, id: BasebackupId, path: &str) -> Content {
        let basebackup = Basebackup::open(&self.repository, id).await.unwrap();
        let (_, entry) = basebackup.entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap();
        let Node::File { content, .. } = entry.node else { panic!("{path} is a file") };
        content
    }
}

/// What a basebackup of these files is committed with: as if the server had written a little WAL meanwhile.
pub(super) fn completion_of(
    packed: Packed,
    named: NamedChunks,
    writer: &BasebackupWriter,
    today: &Today,
    compression: Compression,
) -> Completion {
    let wal = (Lsn(0x0200_0028), Lsn(0x0200_0100));
    let mut record = empty_record(writer.id(), today.cluster, today.timeline, wal);
    record.size = packed.size;
    let content = ManifestContent {
        entries: packed.entries,
        start_set: packed.start_set,
        ..ManifestContent::default()
    };
    Completion { record, content, named, compression }
}

/// How many pages of a basebackup are not as they were in its parent, by the rules of where files stand.
fn pages_changed(parent: &Taken, now: &Taken) -> u64 {
    let place = |raw: &[u8]| match raw.len() {
        len if len <= INLINE_BYTES => 0,
        len if (len as u64) < SMALL_FILE_BYTES => 1,
        _ => 2,
    };
    let mut changed = 0;
    for (path, raw) in &now.files {
        let pages = raw.len().div_ceil(PAGE) as u64;
        let before = parent.files.get(path).filter(|before| place(before) == place(raw));
        changed += match before {
            None => pages,
            Some(before) if place(raw) < 2 => {
                if before == raw {
                    0
                } else {
                    pages
                }
            }
            Some(before) => {
                let before: Vec<&[u8]> = before.chunks(PAGE).collect();
                raw.chunks(PAGE).enumerate().filter(|(n, page)| before.get(*n) != Some(page)).count() as u64
            }
        };
    }
    changed
}

/// How many bytes are read: those of files whose ctime does not vouch for them.
fn bytes_read(parent: &Taken, now: &Taken) -> u64 {
    let settled = |identity: &FileIdentity| identity.changed + Duration::from_secs(2) <= parent.at;
    let unread = |path: &String| {
        let identity = &now.identities[path];
        settled(identity) && parent.identities.get(path) == Some(identity)
    };
    now.files.iter().filter(|(path, _)| !unread(path)).map(|(_, raw)| raw.len() as u64).sum()
}

/// What happens to the files between basebackups.
#[derive(Debug, Clone)]
enum Event {
    Create { file: usize, len: usize, seed: u64 },
    ChangePage { file: usize, at: usize, seed: u64 },
    ZeroPage { file: usize, at: usize },
    Grow { file: usize, by: usize, seed: u64 },
    Truncate { file: usize, at: usize },
    Delete { file: usize },
    BackUp { saved: bool },
    Wait { seconds: u64 },
}

const PATHS: [&str; 7] = [
    "data/global/1262",
    "data/base/5/1259",
    "data/base/5/1249",
    "data/base/16384/16385",
    "data/base/16384/16385_fsm",
    "tablespaces/7/PG_15_1/16384/16400",
    "data/postgresql.conf",
];

fn event() -> impl Strategy<Value = Event> {
    let file = 0..PATHS.len();
    let len = prop_oneof![0usize..200, 0usize..70_000, 60_000usize..900_000];
    prop_oneof![
        2 => (file.clone(), len, any::<u64>())
            .prop_map(|(file, len, seed)| Event::Create { file, len, seed }),
        8 => (file.clone(), any::<usize>(), any::<u64>())
            .prop_map(|(file, at, seed)| Event::ChangePage { file, at, seed }),
        2 => (file.clone(), any::<usize>()).prop_map(|(file, at)| Event::ZeroPage { file, at }),
        2 => (file.clone(), 1usize..100_000, any::<u64>())
            .prop_map(|(file, by, seed)| Event::Grow { file, by, seed }),
        2 => (file.clone(), any::<usize>()).prop_map(|(file, at)| Event::Truncate { file, at }),
        1 => file.prop_map(|file| Event::Delete { file }),
        4 => prop_oneof![9 => Just(true), 1 => Just(false)].prop_map(|saved| Event::BackUp { saved }),
        2 => (0u64..5).prop_map(|seconds| Event::Wait { seconds }),
    ]
}

impl Host {
    fn happen(&mut self, event: &Event) {
        let path = |file: &usize| PATHS[*file];
        let change = |host: &mut Self, file: &usize, change: &dyn Fn(&mut Vec<u8>)| {
            if host.files.get(path(file)).is_some_and(|raw| !raw.is_empty()) {
                host.change(path(file), change);
            }
        };
        match event {
            Event::Create { file, len, seed } => {
                self.remove(path(file));
                self.write(path(file), bytes(*seed, *len));
            }
            Event::ChangePage { file, at, seed } => change(self, file, &|raw| {
                let at = at % raw.len();
                raw[at] = raw[at].wrapping_add(*seed as u8 | 1);
            }),
            Event::ZeroPage { file, at } => change(self, file, &|raw| {
                let page = at % raw.len().div_ceil(PAGE);
                raw.iter_mut().skip(page * PAGE).take(PAGE).for_each(|byte| *byte = 0);
            }),
            Event::Grow { file, by, seed } => change(self, file, &|raw| raw.extend(bytes(*seed, *by))),
            Event::Truncate { file, at } => change(self, file, &|raw| raw.truncate(at % raw.len())),
            Event::Delete { file } => self.remove(path(file)),
            Event::Wait { seconds } => self.clock.advance(Duration::from_secs(*seconds)),
            Event::BackUp { .. } => {}
        }
    }
}

pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn failure_15_every_basebackup_of_a_random_history_restores_bit_by_bit(
        first in proptest::collection::vec((0..PATHS.len(), 0usize..900_000, any::<u64>()), 1..6),
        events in proptest::collection::vec(event(), 1..60),
    ) {
        block_on(async {
            let mut host = Host::new().await;
            for (file, len, seed) in first {
                host.happen(&Event::Create { file, len, seed });
            }
            host.back_up().await;
            let mut remembered = 0;
            for event in events.iter().chain([&Event::BackUp { saved: true }]) {
                host.happen(event);
                let Event::BackUp { saved } = event else { continue };
                host.try_back_up(false, *saved).await.unwrap();
                let (parent, now) = (&host.taken[remembered], host.taken.last().unwrap());
                let Decision::Incremental(incremental) = now.decision else {
                    panic!("{}", now.decision);
                };
                assert_eq!(incremental.parent, parent.record.id);
                assert_eq!(now.work.pages_changed, pages_changed(parent, now), "{:?}", now.decision);
                if now.written_again == 0 {
                    assert_eq!(now.work.pages_stored_again, 0);
                    let all: u64 = now.files.values().map(|raw| raw.len() as u64).sum();
                    let read = if incremental.read_all { all } else { bytes_read(parent, now) };
                    assert_eq!(now.work.bytes_read, read);
                }
                if *saved {
                    remembered = host.taken.len() - 1;
                }
            }
            host.assert_all_restore().await;
        });
    }
}

pub(super) fn a_host_of_a_few_files(host: &mut Host) {
    host.write("data/PG_VERSION", b"15\n".to_vec());
    host.write("data/global/1262", bytes(1, 8192));
    host.write("data/base/5/1259", bytes(2, 120_000));
    host.write("data/base/5/1249", bytes(3, 30 * PAGE));
    host.write("data/base/16384/16385", bytes(4, 3_000_000));
    host.write("data/base/16384/16386", bytes(5, 24_576));
    host.write("data/base/16384/16387", vec![0; 1_000_000]);
}

fn reason(taken: &Taken) -> &Reason {
    taken.decision.reason().unwrap_or_else(|| panic!("{}", taken.decision))
}

#[tokio::test]
async fn a_change_of_one_page_stores_one_page_and_reads_one_file() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    assert_eq!(reason(host.back_up().await), &Reason::NoState);
    host.change("data/base/16384/16385", |raw| raw[100 * PAGE] ^= 1);
    let taken = host.back_up().await;
    assert_eq!((taken.work.pages_changed, taken.work.files_kept), (1, 6));
    assert_eq!(taken.work.bytes_read, 3_000_000);
    // The page, the map of its file, and what is about the basebackup itself.
    assert!(taken.record.size.stored_bytes < 20_000, "{}", taken.record.size.stored_bytes);
    assert!(taken.work.chunks_reused > 40, "{}", taken.work.chunks_reused);
    host.assert_all_restore().await;
}

/// Who can write rows cannot learn the key from one full basebackup and use it behind the next one.
#[tokio::test]
async fn each_full_basebackup_draws_a_key_for_its_hashes_and_an_incremental_one_keeps_it() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    let path = TreePath::new("data/base/5/1249").unwrap();
    let mut of_last = async |full: bool| {
        let is_incremental = host.try_back_up(full, true).await.unwrap().decision.parent().is_some();
        assert_eq!(is_incremental, !full);
        let state = host.state();
        let known = state.find(&path).unwrap().unwrap();
        (state.facts().hash_key.clone(), state.block(&known, 0).unwrap().hashes)
    };
    let mut seen = Vec::new();
    for _ in 0..3 {
        let full = of_last(true).await;
        // The file is as it always was: what differs is the key.
        assert!(seen.iter().all(|(key, hashes)| *key != full.0 && *hashes != full.1), "drawn before");
        for _ in 0..2 {
            assert!(
                of_last(false).await == full,
                "an incremental one has the key and the hashes of its parent"
            );
        }
        seen.push(full);
    }
}

#[tokio::test]
async fn a_forged_ctime_is_caught_by_the_seventh_basebackup() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    // As if the clock had been set back while it was written: inode, size and ctime are those of before.
    host.files.get_mut("data/base/16384/16386").unwrap()[100] ^= 1;
    host.forged = true;
    for n in 1..=7 {
        let taken = host.back_up().await;
        let caught = taken.work.pages_changed;
        assert_eq!(caught, if n == 7 { 3 } else { 0 }, "basebackup {n}");
    }
    host.assert_restores(host.taken.last().unwrap()).await;
}

/// On a standby the WAL vouches for a file up to a start that was long before it is looked at: what came behind is
/// replayed for the basebackup at hand, and by nobody for the next one.
#[tokio::test]
async fn what_the_wal_vouched_for_is_not_taken_for_what_was_read() {
    for late in [false, true] {
        let mut host = Host::new().await;
        a_host_of_a_few_files(&mut host);
        let files = ["data/base/16384/16386", "data/base/16384/16390"];
        host.write(files[1], bytes(6, 40 * PAGE));
        if late {
            // Just before it is read, so that a write behind that may leave the same ctime.
            let at = host.clock.now() + HOUR;
            files.iter().for_each(|path| host.identities.get_mut(*path).unwrap().changed = at);
        }
        host.back_up().await;
        for path in files {
            if late {
                host.files.get_mut(path).unwrap()[100] ^= 1;
            } else {
                host.change(path, |raw| raw[100] ^= 1);
            }
        }
        host.forged = true;
        host.hints = Some(Hints::of(ChangedBlocks::default(), 131_072));
        let vouched = host.back_up().await.work;
        assert_eq!((vouched.pages_changed, vouched.bytes_read), (0, 0), "late: {late}");
        host.hints = None;
        let read = host.back_up().await.work;
        // The small one's three pages are one thing.
        assert_eq!((read.pages_changed, read.bytes_read), (3 + 1, 43 * PAGE as u64), "late: {late}");
        host.assert_restores(host.taken.last().unwrap()).await;
        // And what was read is passed over again.
        assert_eq!(host.back_up().await.work.bytes_read, 0, "late: {late}");
    }
}

#[tokio::test]
async fn files_that_are_kept_let_others_have_their_turn() {
    let mut host = Host::new().await;
    for n in 0..300 {
        host.write(&format!("data/base/5/{}", 20_000 + n), bytes(n, 50));
    }
    host.back_up().await;
    let taken = host.back_up().await;
    assert_eq!(taken.work.files_kept, 300);
    assert!(taken.turns >= 300, "{} turns", taken.turns);
}

#[tokio::test]
async fn a_file_of_which_only_a_part_is_known_names_nothing_of_what_it_was() {
    let mut host = Host::new().await;
    let (path, block) = ("data/base/16384/16385", MAP_BLOCK_BYTES as usize);
    let mut raw = vec![0; block + 4096 * PAGE];
    raw[..40 * PAGE].copy_from_slice(&bytes(7, 40 * PAGE));
    raw[block..block + 40 * PAGE].copy_from_slice(&bytes(8, 40 * PAGE));
    host.write(path, raw);
    host.back_up().await;
    // The state begins with the hashes of the first block and its map; behind them come the hashes of the second.
    let folder = host.states.path().join(host.repository.site().to_string());
    let state = folder.join(format!("{}.pages", host.taken[0].record.id));
    let mut bytes_of_state = std::fs::read(&state).unwrap();
    bytes_of_state[MAP_BLOCK_BYTES as usize / PAGE * 8 + 5000] ^= 1;
    std::fs::write(&state, bytes_of_state).unwrap();
    // Whatever it was, it is something else now, and nobody says so before it is read.
    host.files.get_mut(path).unwrap()[..40 * PAGE].copy_from_slice(&bytes(9, 40 * PAGE));
    host.forged = true;
    let taken = host.back_up().await;
    assert_eq!((taken.work.files_kept, taken.work.chunks_reused), (0, 0));
    let id = taken.record.id;
    let basebackup = Basebackup::open(&host.repository, id).await.unwrap();
    let packs = basebackup.refs().records();
    assert!(packs.iter().all(|record| record.id.origin == id), "{packs:?}");
    host.assert_restores(host.taken.last().unwrap()).await;
}

/// After pg_upgrade among it, which makes another cluster that begins with timeline 1 again (failure 12a).
#[tokio::test]
async fn failure_12a_what_speaks_against_an_incremental_one_is_named() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    let first = host.back_up().await.record.id;
    assert_eq!(reason(host.try_back_up(true, false).await.unwrap()), &Reason::Asked);
    host.today = Box::new(|today| Today { has_checksums: false, ..today });
    assert_eq!(
        reason(host.try_back_up(false, false).await.unwrap()),
        &Reason::OtherChecksums { are_on: false }
    );
    let second = TimelineId::new(2).unwrap();
    host.today = Box::new(move |today| Today { timeline: second, ..today });
    let expected = Reason::OtherTimeline { was: TimelineId::FIRST, is: second };
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &expected);
    host.today = Box::new(|today| Today { cluster: "7-16".parse().unwrap(), ..today });
    assert!(matches!(reason(host.try_back_up(false, false).await.unwrap()), Reason::OtherCluster { .. }));
    host.today = Box::new(|today| today);
    // A keyring that trusts nobody who has not signed.
    let keys = create_keys(3072).unwrap();
    let unencrypted = std::mem::replace(
        &mut host.repository,
        testing::site_with(testing::keyring(&keys, 11), host.store.clone(), host.clock.clone()).await,
    );
    assert!(matches!(reason(host.try_back_up(false, false).await.unwrap()), Reason::ParentDiffers { .. }));
    host.repository = unencrypted;
    let outcome = host.repository.layout().outcome(first);
    let kept = host.store.get(&outcome, 1 << 20).await.unwrap();
    host.store.tamper(&outcome, |_| None);
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &Reason::ParentAbsent(first));
    host.store.create(&outcome, kept).await.unwrap();
    assert!(host.try_back_up(false, false).await.unwrap().decision.parent() == Some(first));
    host.store.create(&host.repository.layout().expired(first), "{}".into()).await.unwrap();
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &Reason::ParentExpired(first));
}

/// Signed by the same host, and readable for others from now on.
#[tokio::test]
async fn other_recipients_make_it_full_and_the_same_ones_do_not() {
    let [ours, theirs] = [create_keys(3072).unwrap(), create_keys(3072).unwrap()];
    let keyring = |recipients: &[&NewKeys], seed: u64| {
        let recipients =
            || recipients.iter().map(|keys| RecipientKey::from_pem(&keys.public_pem).unwrap()).collect();
        let private = |keys: &NewKeys| RecipientPrivateKey::from_pem(&keys.private_pem).unwrap();
        Keyring::new(KeyringOptions {
            recipients: recipients(),
            wal_recipients: recipients(),
            signer: Some(SigningKey::from_pem(&ours.sign_pem).unwrap()),
            trusted_signers: vec![VerifyKey::from_pem(&ours.verify_pem).unwrap()],
            private_keys: vec![private(&ours), private(&theirs)],
            random: Arc::new(SeededRandom::new(seed)),
        })
    };
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    for (seed, recipients, expected) in [
        (11, &[&ours][..], Some(Reason::NoState)),
        (12, &[&ours][..], None),
        (13, &[&ours, &theirs][..], Some(Reason::OtherSealing)),
        (14, &[&theirs, &ours][..], None),
        (15, &[&theirs][..], Some(Reason::OtherSealing)),
    ] {
        let keyring = keyring(recipients, seed);
        host.repository = testing::site_with(keyring, host.store.clone(), host.clock.clone()).await;
        assert_eq!(host.back_up().await.decision.reason(), expected.as_ref(), "{seed}");
    }
    host.assert_all_restore().await;
}

#[tokio::test]
async fn a_damaged_state_is_said_or_costs_what_it_describes_whatever_the_byte() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    let folder = host.states.path().join(host.repository.site().to_string());
    let file = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let file = file.into_iter().find(|path| path.to_string_lossy().ends_with(".pages")).unwrap();
    let whole = std::fs::read(&file).unwrap();
    let mut full = 0;
    for at in (0..whole.len()).step_by(whole.len() / 23) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&file, &damaged).unwrap();
        // As every seventh does; otherwise hashes would not be looked at.
        host.identities.values_mut().for_each(|identity| identity.inode += 1);
        let taken = host.try_back_up(false, false).await.unwrap();
        match &taken.decision {
            Decision::Full(reason) => {
                assert!(matches!(reason, Reason::StateUnusable(_)), "byte {at}: {reason}");
                full += 1;
            }
            // Hashes are not read beforehand: the pages they are of are stored again.
            Decision::Incremental(_) => assert!(taken.work.pages_changed > 0, "byte {at}: nobody noticed"),
        }
        host.assert_restores(host.taken.last().unwrap()).await;
    }
    assert!(full > 5, "{full} of them were full");
    std::fs::write(&file, &whole[..whole.len() - 1]).unwrap();
    assert!(matches!(reason(host.try_back_up(false, false).await.unwrap()), Reason::StateUnusable(_)));
    host.assert_restores(host.taken.last().unwrap()).await;
}

#[tokio::test]
async fn a_missing_and_a_cut_pack_are_stored_again_from_the_files() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    host.change("data/base/16384/16385", |raw| raw[100 * PAGE] ^= 1);
    host.back_up().await;
    let basebackup = Basebackup::open(&host.repository, host.taken[1].record.id).await.unwrap();
    let packs = basebackup.refs().records();
    assert_eq!(packs.len(), 2);
    for (n, pack) in packs.iter().enumerate() {
        let key = host.repository.layout().pack(pack.id, &pack.salt);
        // The first is cut, the second lost.
        host.store.tamper(&key, |pack| pack.filter(|_| n == 0).map(|pack| pack.slice(..pack.len() - 1)));
    }
    let healed = host.back_up().await;
    assert!(healed.decision.parent().is_some(), "{}", healed.decision);
    assert_eq!((healed.work.pages_changed, healed.work.chunks_reused), (0, 0));
    // Every page that is not zero, and neither the tiniest file nor a page of zeros.
    let pages = 1 + 120_000_usize.div_ceil(PAGE) + 30 + 3_000_000_usize.div_ceil(PAGE) + 3;
    assert_eq!(healed.work.pages_stored_again, pages as u64);
    host.assert_restores(host.taken.last().unwrap()).await;
    // And the next one builds upon what was healed.
    assert_eq!(host.back_up().await.work.pages_stored_again, 0);
    host.assert_restores(host.taken.last().unwrap()).await;
}

#[tokio::test]
async fn the_start_up_set_never_lies_in_more_than_four_packs() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    let mut most = 0;
    for n in 0..9 {
        host.change("data/base/5/1249", |raw| raw[n * PAGE] ^= 1);
        let id = host.back_up().await.record.id;
        let basebackup = Basebackup::open(&host.repository, id).await.unwrap();
        let packs: std::collections::BTreeSet<_> =
            basebackup.start().start_set.iter().map(|range| range.pack).collect();
        most = most.max(packs.len());
        assert!((1..=4).contains(&packs.len()), "basebackup {n}: {packs:?}");
    }
    // It would be pointless if each were written whole.
    assert!(most >= 3, "{most}");
    host.assert_all_restore().await;
}

#[tokio::test]
async fn a_map_block_without_a_change_is_named_where_it_stands() {
    let mut host = Host::new().await;
    let block = MAP_BLOCK_BYTES as usize;
    // Mostly zero, so that it costs neither chunks nor time; a page in each block is not.
    let mut raw = vec![0; block + 40 * PAGE];
    // So much that the pack is more than its header and its maps, which would have it written again.
    raw[..40 * PAGE].copy_from_slice(&bytes(7, 40 * PAGE));
    raw[block + 3 * PAGE] = 1;
    host.write("data/base/16384/16385", raw);
    let first = host.back_up().await.record.id;
    host.change("data/base/16384/16385", |raw| raw[block + 9 * PAGE] = 5);
    let second = host.back_up().await;
    assert_eq!(second.work.pages_changed, 1);
    let second = second.record.id;
    let (before, after) = (
        host.content(first, "data/base/16384/16385").await,
        host.content(second, "data/base/16384/16385").await,
    );
    let (Content::Blocks(before), Content::Blocks(after)) = (before, after) else { panic!("not in blocks") };
    assert_eq!((before.len(), after.len()), (2, 2));
    assert_eq!(before[0], after[0]);
    assert_eq!(after[1].chunk.pack.origin, second);
    host.assert_all_restore().await;
    host.taken.clear();
    // A file that was cut to a block's end has one block less, and one that lost pages of a block a new one.
    host.change("data/base/16384/16385", |raw| raw.truncate(block + 20 * PAGE));
    host.back_up().await;
    host.change("data/base/16384/16385", |raw| raw.truncate(block));
    host.back_up().await;
    host.assert_all_restore().await;
}

#[tokio::test]
async fn dead_packs_are_written_again_and_what_is_stored_stays_bounded() {
    let mut host = Host::new().await;
    host.write("data/base/16384/16385", bytes(4, 400 * PAGE));
    host.back_up().await;
    let mut spread = Vec::new();
    for round in 0..30_usize {
        host.change("data/base/16384/16385", |raw| {
            for n in 0..32 {
                let page = (round * 7919 + n * 104_729) % 400;
                raw[page * PAGE..][..PAGE].copy_from_slice(&bytes((round * 1000 + n) as u64, PAGE));
            }
        });
        let id = host.back_up().await.record.id;
        let basebackup = Basebackup::open(&host.repository, id).await.unwrap();
        let named: u64 = basebackup.refs().records().iter().map(|record| u64::from(record.size)).sum();
        spread.push(named as f64 / host.taken[0].record.size.stored_bytes as f64);
    }
    assert!(spread.iter().all(|spread| *spread < 2.5), "{spread:?}");
    assert!(spread.iter().any(|spread| *spread > 1.2), "nothing ever died: {spread:?}");
    host.assert_all_restore().await;
}

#[tokio::test]
async fn two_basebackups_of_a_site_on_a_host_are_kept_apart() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    let held = SiteState::take(&host.repository, Ok(host.states.path())).await.unwrap();
    assert!(matches!(host.try_back_up(false, true).await, Err(Error::State(_))));
    drop(held);
    host.back_up().await;
}

#[tokio::test]
async fn a_state_folder_that_cannot_be_used_is_the_reason_that_is_kept() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    host.back_up().await;
    let cluster = "7301234567890123456-16".parse().unwrap();
    let today = Today::of(&host.repository, cluster, TimelineId::FIRST, true);
    // A file is in the way of the folder; or whoever calls knows why there is none.
    let file = host.states.path().join("in the way");
    std::fs::write(&file, "").unwrap();
    let said = "permission denied".to_owned();
    for (states, expected) in [(Ok(&*file), "in the way"), (Err(&said), "permission denied")] {
        let states = SiteState::take(&host.repository, states).await.unwrap();
        for prepared in [
            states.prepare(&host.repository, &today, false, None).await.unwrap(),
            states.foresee(&host.repository, &today, false, None).await.unwrap(),
        ] {
            let Some(Reason::StateUnusable(why)) = prepared.decision.reason() else {
                panic!("{}", prepared.decision)
            };
            assert!(why.contains(expected), "{why}");
        }
    }
}

#[tokio::test]
async fn a_parent_that_expires_before_it_is_announced_makes_a_full_one() {
    let mut host = Host::new().await;
    a_host_of_a_few_files(&mut host);
    let first = host.back_up().await.record.id;
    let states = SiteState::take(&host.repository, Ok(host.states.path())).await.unwrap();
    let cluster = "7301234567890123456-16".parse().unwrap();
    let today = Today::of(&host.repository, cluster, TimelineId::FIRST, true);
    let prepared = states.prepare(&host.repository, &today, false, None).await.unwrap();
    assert_eq!(prepared.decision.parent(), Some(first));
    host.store.create(&host.repository.layout().expired(first), "{}".into()).await.unwrap();
    let begin = BeginOptions {
        cluster,
        timeline: TimelineId::FIRST,
        wal_floor: Lsn(0x0200_0028),
        parent: None,
        host: "test".to_owned(),
        pid: 1,
    };
    let (writer, begun): (BasebackupWriter, _) =
        states.begin(&host.repository, begin, prepared).await.unwrap();
    assert_eq!(begun.decision, Decision::Full(Reason::ParentExpired(first)));
    assert!(begun.parent.is_none() && writer.id() > first);
}

/// Files of which several packs are full before the last one is read.
fn a_host_of_several_packs(host: &mut Host) {
    for n in 0..6 {
        host.write(&format!("data/base/16384/{}", 17_000 + n), bytes(n, 20_000_000));
    }
    host.write("data/PG_VERSION", b"15\n".to_vec());
}

#[tokio::test]
async fn a_full_one_that_was_killed_is_gone_on_with() {
    let mut host = Host::new().await;
    a_host_of_several_packs(&mut host);
    let killed = host.kill().await;
    host.change("data/base/16384/17000", |raw| raw[100 * PAGE] ^= 1);
    let taken = host.back_up().await;
    let expected = Incremental { parent: killed, read_all: true, resumes: true };
    assert_eq!(taken.decision, Decision::Incremental(expected));
    // Who reads the format finds a parent without outcome, so there is nothing to pin.
    assert_eq!((taken.record.parent, taken.record.parent_digest), (Some(killed), None));
    // Everything is read, and what the store has is not stored again.
    assert_eq!(taken.work.bytes_read, 120_000_003);
    assert!(taken.work.chunks_reused > 300, "{:?}", taken.work);
    assert!(taken.work.pages_stored_again > 0, "{:?}", taken.work);
    let id = taken.record.id;
    host.assert_all_restore().await;
    assert_eq!(host.back_up().await.decision.parent(), Some(id));
    host.assert_restores(host.taken.last().unwrap()).await;
}

/// Everything in a folder but the lock.
fn files_below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.file_name().is_some_and(|name| name != "lock"));
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[tokio::test]
async fn who_only_looks_is_told_of_a_killed_one_and_leaves_it_as_it_was() {
    let mut host = Host::new().await;
    a_host_of_several_packs(&mut host);
    let killed = host.kill().await;
    let folder = host.states.path().join(host.repository.site().to_string());
    let before = files_below(&folder);
    let cluster = "7301234567890123456-16".parse().unwrap();
    let today = Today::of(&host.repository, cluster, TimelineId::FIRST, true);
    let expected = Decision::Incremental(Incremental { parent: killed, read_all: true, resumes: true });
    for _ in 0..2 {
        let states = SiteState::take(&host.repository, Ok(host.states.path())).await.unwrap();
        let foreseen = states.foresee(&host.repository, &today, false, None).await.unwrap();
        assert_eq!(foreseen.decision, expected);
        // Everything would be read.
        assert!(foreseen.parent.is_none());
        assert!(files_below(&folder) == before, "something was written");
    }
    assert_eq!(host.back_up().await.decision, expected);
    host.assert_all_restore().await;
}

#[tokio::test]
async fn what_a_killed_one_left_is_left_out_where_it_does_not_fit() {
    let mut host = Host::new().await;
    a_host_of_several_packs(&mut host);
    let killed = host.kill().await;
    host.store.create(&host.repository.layout().outcome(killed), "{}\n".into()).await.unwrap();
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &Reason::NoState);
    let killed = host.kill().await;
    host.today = Box::new(|today| Today { has_checksums: false, ..today });
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &Reason::NoState);
    host.today = Box::new(|today| today);
    // It is gone with the next attempt, whether that went on with it or not.
    assert_eq!(reason(host.try_back_up(false, false).await.unwrap()), &Reason::NoState);
    assert!(host.taken.iter().all(|taken| taken.record.parent.is_none() && taken.record.id != killed));
}

#[tokio::test]
async fn a_damaged_journal_or_state_of_a_killed_one_never_gives_a_wrong_page() {
    let mut host = Host::new().await;
    a_host_of_several_packs(&mut host);
    for (n, (name, share, expected)) in [
        ("journal", 0.2, false),
        ("journal", 0.9, true),
        ("unfinished", 0.1, true),
        ("unfinished", 0.5, true),
        ("unfinished", 0.9, true),
    ]
    .into_iter()
    .enumerate()
    {
        host.kill().await;
        let folder = host.states.path().join(host.repository.site().to_string());
        let files = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let file = files.into_iter().find(|path| path.to_string_lossy().ends_with(name)).unwrap();
        let mut raw = std::fs::read(&file).unwrap();
        let at = (raw.len() as f64 * share) as usize;
        raw[at] ^= 1;
        std::fs::write(&file, &raw).unwrap();
        host.change("data/base/16384/17001", |raw| raw[n * PAGE] ^= 1);
        let taken = host.try_back_up(false, false).await.unwrap();
        let resumes = matches!(taken.decision, Decision::Incremental(Incremental { resumes: true, .. }));
        // Behind its last pack nothing is believed, whole or not.
        assert_eq!(resumes, expected, "{name} at {share}: {}", taken.decision);
        host.assert_restores(host.taken.last().unwrap()).await;
        host.taken.clear();
    }
}
