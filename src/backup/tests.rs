//! The copy against stores and sources that misbehave: what is read back is what was read, or there is nothing.
//! Files come from memory, so that a test can let them grow, shrink and vanish as a busy server does.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use crate::backup::data_directory::{FileIdentity, SourceFile};
use crate::backup::error::{Error, ErrorKind};
use crate::backup::packer::{Packed, Packer, Stored};
use crate::backup::pipeline::{Budget, CopySource, copy};
use crate::backup::plan::{PlanOptions, SMALL_FILE_BYTES, plan_copy};
use crate::backup::read_pages::{JOB_BYTES, JobContext};
use crate::backup::read_small::INLINE_BYTES;
use crate::backup::server_record::empty_record;
use crate::backup::source_file::{FileState, OpenFile, Source};
use crate::catalog::basebackups::list;
use crate::codec::{Compression, CpuPool, SealRecorder, create_keys};
use crate::monitor::{Monitor, RecordingMonitor, Task};
use crate::pg::{Crc32c, Lsn, TimelineId};
use crate::repo::{
    Basebackup, BasebackupWriter, BeginOptions, Completion, FileReader, Repository,
    documents::BackupRecord,
    entry::{Content, Node, TreePath},
    manifest::ManifestContent,
    page_map::PageSource,
    testing::{self, time},
};
use crate::storage::{self, Fault, Faulty, MemoryStore, Rule, Store, Verb};

/// Files in memory: what the walk saw, and what a read sees.
#[derive(Debug, Default)]
pub(super) struct MemorySource {
    files: BTreeMap<String, Vec<u8>>,
    identities: BTreeMap<String, FileIdentity>,
    behaviour: BTreeMap<String, Behaviour>,
    open_now: Arc<AtomicUsize>,
    open_most: Arc<AtomicUsize>,
}

#[derive(Debug, Clone)]
enum Behaviour {
    Vanished,
    /// It has these bytes by now.
    Became(Vec<u8>),
    /// Reads beyond this offset find it ended, and the next one finds it whole again.
    TruncatedOnce(u64),
    Fails(i32),
}

#[derive(Debug)]
struct MemoryFile {
    bytes: Vec<u8>,
    identity: Option<FileIdentity>,
    truncated_once: Mutex<Option<u64>>,
    fails: Option<i32>,
    open_now: Arc<AtomicUsize>,
}

impl MemorySource {
    /// Files that have inodes and ctimes.
    pub(super) fn of(files: BTreeMap<String, Vec<u8>>, identities: BTreeMap<String, FileIdentity>) -> Self {
        Self { files, identities, ..Self::default() }
    }

    fn add(&mut self, path: &str, bytes: Vec<u8>) {
        self.files.insert(path.to_owned(), bytes);
    }

    pub(super) fn walk(&self) -> Vec<SourceFile> {
        let entry = |(path, bytes): (&String, &Vec<u8>)| SourceFile {
            path: TreePath::new(path.as_str()).unwrap(),
            root: 0,
            size: bytes.len() as u64,
            mode: 0o640,
            modified: time(),
            identity: self.identities.get(path).copied(),
        };
        self.files.iter().map(entry).collect()
    }
}

impl Source for MemorySource {
    fn open(&self, file: &SourceFile) -> io::Result<Box<dyn OpenFile>> {
        let path = file.path.to_string();
        let behaviour = self.behaviour.get(&path);
        let bytes = match behaviour {
            Some(Behaviour::Vanished) => return Err(io::ErrorKind::NotFound.into()),
            Some(Behaviour::Became(bytes)) => bytes.clone(),
            _ => self.files[&path].clone(),
        };
        let truncated_once = Mutex::new(match behaviour {
            Some(Behaviour::TruncatedOnce(at)) => Some(*at),
            _ => None,
        });
        let fails = match behaviour {
            Some(Behaviour::Fails(errno)) => Some(*errno),
            _ => None,
        };
        let now = self.open_now.fetch_add(1, Ordering::SeqCst) + 1;
        self.open_most.fetch_max(now, Ordering::SeqCst);
        let identity = self.identities.get(&path).copied();
        Ok(Box::new(MemoryFile { bytes, identity, truncated_once, fails, open_now: self.open_now.clone() }))
    }

    fn path(&self, file: &SourceFile) -> PathBuf {
        PathBuf::from(format!("/memory/{}", file.path))
    }
}

impl OpenFile for MemoryFile {
    fn state(&self) -> io::Result<FileState> {
        Ok(FileState {
            size: self.bytes.len() as u64,
            mode: 0o640,
            modified: time(),
            identity: self.identity,
        })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(errno) = self.fails {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let mut end = self.bytes.len() as u64;
        let mut truncated = self.truncated_once.lock().unwrap();
        if truncated.is_some_and(|at| offset + buffer.len() as u64 > at) {
            end = truncated.take().unwrap_or(end);
        }
        let end = end.min(offset + buffer.len() as u64);
        let count = end.saturating_sub(offset) as usize;
        buffer[..count].copy_from_slice(&self.bytes[offset as usize..offset as usize + count]);
        Ok(count)
    }

    fn done_with(&self, _: Range<u64>) {}
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        self.open_now.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn repository(store: impl Store + 'static) -> Repository {
    testing::site(store, testing::clock()).await
}

const BUDGET: Budget = Budget { jobs: 6, uploads: 2 };

/// Does with a source in memory what `run` does with a server.
async fn back_up(
    repository: &Repository,
    source: MemorySource,
    budget: Budget,
) -> Result<(BackupRecord, Packed), Error> {
    let cluster = "7301234567890123456-16".parse().unwrap();
    let lsns = (Lsn(0x0200_0028), Lsn(0x0200_0100));
    let begin = BeginOptions {
        cluster,
        timeline: TimelineId::FIRST,
        wal_floor: lsns.0,
        parent: None,
        host: "test".to_owned(),
        pid: 1,
    };
    let writer = Arc::new(BasebackupWriter::begin(repository, begin).await?);
    let compression = Compression::zstd(1);
    let mut packer = Packer::new(writer.clone(), compression, budget.uploads);
    let files = source.walk();
    let plan = plan_copy(&files, &PlanOptions { postgres: Some(5), ..PlanOptions::default() });
    let context = Arc::new(JobContext {
        source: Arc::new(source),
        page_check: None,
        compression,
        hash_key: None,
        parent: None,
    });
    let pool = CpuPool::new(2, 2);
    let progress = RecordingMonitor::default().start(Task::bytes("backup", plan.bytes));
    let source = CopySource { plan: &plan, files: &files, context: &context, start_set_again: false };
    copy(source, &pool, budget, &mut packer, &progress).await?;
    let control = FileState { size: 8192, mode: 0o600, modified: time(), identity: None };
    packer.push_bytes(TreePath::new("data/global/pg_control")?, control, vec![7; 8192].into()).await?;
    let Stored { packed, named, .. } = packer.finish().await?;
    let mut record = empty_record(writer.id(), cluster, TimelineId::FIRST, lsns);
    record.size = packed.size;
    let content = ManifestContent {
        entries: packed.entries.clone(),
        start_set: packed.start_set.clone(),
        ..ManifestContent::default()
    };
    let writer = Arc::into_inner(writer).expect("no upload is left");
    let record = writer.finish(Completion { record, content, named, compression }).await?;
    Ok((record, packed))
}

/// Reads every file back.
async fn read_back(repository: &Repository, record: &BackupRecord) -> BTreeMap<String, Vec<u8>> {
    let reader = FileReader::new(Arc::new(Basebackup::open(repository, record.id).await.unwrap()), 4 << 20);
    let mut files = BTreeMap::new();
    for n in 0..reader.basebackup().block_count() {
        for entry in reader.basebackup().block(n).await.unwrap().iter() {
            assert_eq!((entry.modified, matches!(entry.node, Node::File { .. })), (time(), true));
            let bytes = reader.read(entry, 0..entry.size()).await.unwrap();
            assert_eq!(bytes.len() as u64, entry.size(), "{}", entry.path);
            files.insert(entry.path.to_string(), bytes.to_vec());
        }
    }
    assert_eq!(files.remove("data/global/pg_control"), Some(vec![7; 8192]));
    files
}

/// Bytes that compress a little and repeat nowhere.
pub(super) fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len).map(|n| if n % 4 == 0 { 0 } else { next() as u8 }).collect()
}

/// What a run of pages of a random file is.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let sizes = prop_oneof![0usize..200, 0usize..70_000, 60_000usize..2_000_000];
    (sizes, any::<u64>(), proptest::collection::vec(0usize..250, 0..40)).prop_map(|(len, seed, zeros)| {
        let mut raw = bytes(seed, len);
        for page in zeros {
            raw.iter_mut().skip(page * 8192).take(8192).for_each(|byte| *byte = 0);
        }
        raw
    })
}

fn a_few_files() -> MemorySource {
    let mut source = MemorySource::default();
    source.add("data/PG_VERSION", b"15\n".to_vec());
    source.add("data/global/1262", bytes(1, 8192));
    source.add("data/base/5/1259", bytes(2, 120_000));
    source.add("data/base/5/1249", bytes(3, 30 * 8192));
    source.add("data/base/16384/16385", bytes(4, 3_000_000));
    source.add("data/base/16384/16386", bytes(5, 24_576));
    source.add("data/base/16384/16387", vec![0; 1_000_000]);
    source
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn what_is_read_back_is_what_was_read(
        files in proptest::collection::btree_map((0u32..4, 16_000u32..16_900), content(), 0..25),
    ) {
        let folders = ["data/base/5", "data/global", "tablespaces/7/PG_15_1/16384", "data"];
        let mut source = MemorySource::default();
        for ((folder, name), raw) in files {
            source.add(&format!("{}/{name}", folders[folder as usize]), raw);
        }
        let expected = source.files.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let repository = repository(MemoryStore::new()).await;
            let (record, packed) = back_up(&repository, source, BUDGET).await.unwrap();
            assert_eq!(record.size.files as usize, expected.len() + 1);
            for (entry, crc) in packed.entries.iter().zip(&packed.checksums) {
                if let Some(raw) = expected.get(&entry.path.to_string()) {
                    assert_eq!(*crc, Crc32c::of(raw), "{}", entry.path);
                }
            }
            assert!(read_back(&repository, &record).await == expected);
        });
    }
}

/// Failure 15: a basebackup could not be restored any more once a file had grown past a size.
#[tokio::test]
async fn failure_15_files_on_both_sides_of_every_threshold_come_back() {
    // Of a file in the table, a page, a chunk, a map in the table, a job, and a file of several jobs.
    let (chunk, job) = (SMALL_FILE_BYTES as usize, JOB_BYTES as usize);
    let thresholds = [INLINE_BYTES, 8192, chunk, 2 * chunk, job, 2 * job];
    let mut source = MemorySource::default();
    for (n, threshold) in thresholds.into_iter().enumerate() {
        for (m, size) in [threshold - 1, threshold, threshold + 1, threshold + 8192].into_iter().enumerate() {
            source.add(&format!("data/base/16384/{}", 20_000 + 10 * n + m), bytes(n as u64, size));
            // The same as a file of no relation.
            source.add(&format!("data/other/{n}-{m}"), bytes(n as u64, size));
        }
    }
    let expected = source.files.clone();
    let repository = repository(MemoryStore::new()).await;
    let (record, _) = back_up(&repository, source, BUDGET).await.unwrap();
    let found = read_back(&repository, &record).await;
    let differing: Vec<&String> =
        expected.keys().filter(|path| found.get(*path) != expected.get(*path)).collect();
    assert!(differing.is_empty(), "{differing:?} are not what was read");
}

#[tokio::test]
async fn the_start_up_set_stands_together_with_its_maps_in_the_first_pack() {
    let repository = repository(MemoryStore::new()).await;
    let (record, packed) = back_up(&repository, a_few_files(), BUDGET).await.unwrap();
    let [range] = packed.start_set[..] else { panic!("{:?}", packed.start_set) };
    assert_eq!(range.pack.number, 0);
    let basebackup = Arc::new(Basebackup::open(&repository, record.id).await.unwrap());
    let reader = FileReader::new(basebackup.clone(), 4 << 20);
    assert_eq!(basebackup.start().start_set, packed.start_set);
    let fetched = reader.prefetch_start_set(4 << 20).await.unwrap();
    assert_eq!(fetched, u64::from(range.to - range.from));
    for (path, inside) in [
        ("data/global/1262", true),
        ("data/base/5/1259", true),
        ("data/base/5/1249", true),
        ("data/base/16384/16385", false),
    ] {
        let (_, entry) = basebackup.entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap();
        let Node::File { content, .. } = &entry.node else { panic!("{path}") };
        let chunk = match content {
            Content::Part(blob) => blob.chunk,
            Content::Blocks(blobs) => blobs[0].chunk,
            Content::Map(map) => match map.extents()[0].source {
                PageSource::Chunk { chunk, .. } => chunk,
                PageSource::Zero => panic!("{path} begins with a zero page"),
            },
            Content::Inline(_) => panic!("{path} is inline"),
        };
        let within = (range.from..range.to).contains(&chunk.offset) && chunk.pack == range.pack;
        assert_eq!(within, inside, "{path}");
    }
}

/// Who reads from a basebackup does so for as long as a server runs on it.
#[tokio::test]
async fn what_came_damaged_when_it_was_fetched_ahead_is_asked_for_again() {
    let (store, source) = (Faulty::new(MemoryStore::new()), a_few_files());
    let expected = source.files.clone();
    let repository = repository(store.clone()).await;
    let (record, packed) = back_up(&repository, source, BUDGET).await.unwrap();
    let bytes: usize = packed.start_set.iter().map(|range| (range.to - range.from) as usize).sum();
    let basebackup = Arc::new(Basebackup::open(&repository, record.id).await.unwrap());
    for at in (0..bytes).step_by(bytes / 40) {
        let reader = FileReader::new(basebackup.clone(), 4 << 20);
        let before = store.faults();
        store.inject(Rule::on(Verb::GetRange, Fault::FlipByte(at)).key("packs/").times(1));
        reader.prefetch_start_set(4 << 20).await.unwrap();
        assert_eq!(store.faults(), before + 1);
        for path in ["data/global/1262", "data/base/5/1259", "data/base/5/1249"] {
            let (_, entry) = basebackup.entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap();
            let read = reader.read(&entry, 0..entry.size()).await;
            assert!(read.unwrap() == expected[path], "{path}, byte {at}");
        }
        assert_eq!(reader.damage(), None);
    }
}

#[tokio::test]
async fn failure_16_files_vanish_grow_and_shrink() {
    let mut source = a_few_files();
    let mut expected = source.files.clone();
    let grown = [expected["data/base/16384/16386"].clone(), bytes(9, 8192)].concat();
    let conf = bytes(8, 90_000);
    let shrunk = expected["data/base/5/1249"][..5 * 8192].to_vec();
    source.behaviour = BTreeMap::from([
        ("data/base/5/1259".to_owned(), Behaviour::Vanished),
        ("data/base/16384/16386".to_owned(), Behaviour::Became(grown)),
        ("data/PG_VERSION".to_owned(), Behaviour::Became(conf.clone())),
        ("data/base/5/1249".to_owned(), Behaviour::Became(shrunk.clone())),
        ("data/base/16384/16385".to_owned(), Behaviour::TruncatedOnce(1_500_000)),
        ("data/global/1262".to_owned(), Behaviour::Became(Vec::new())),
    ]);
    expected.remove("data/base/5/1259");
    expected.insert("data/PG_VERSION".to_owned(), conf);
    expected.insert("data/base/5/1249".to_owned(), shrunk);
    // Which of the readers side by side sees the truncation decides where the file ends; what is kept is its beginning.
    let cut = expected.remove("data/base/16384/16385").unwrap();
    expected.insert("data/global/1262".to_owned(), Vec::new());

    let repository = repository(MemoryStore::new()).await;
    let (record, packed) = back_up(&repository, source, BUDGET).await.unwrap();
    let found = read_back(&repository, &record).await;
    for (path, raw) in &expected {
        assert!(found[path] == *raw, "{path}: {} bytes of {}", found[path].len(), raw.len());
    }
    let kept = &found["data/base/16384/16385"];
    // Never less than was there all the time, and nothing that was not.
    assert!((1_500_000..cut.len()).contains(&kept.len()), "{} bytes of {}", kept.len(), cut.len());
    assert!(cut.starts_with(kept));
    assert_eq!(found.len(), expected.len() + 1);
    assert_eq!((packed.vanished, packed.shrunk), (1, 3));
}

#[tokio::test]
async fn a_file_that_cannot_be_read_fails_the_backup_and_is_named() {
    for path in ["data/base/16384/16385", "data/base/16384/16386"] {
        let store = Arc::new(MemoryStore::new());
        let repository = repository(store).await;
        let mut source = a_few_files();
        source.behaviour.insert(path.to_owned(), Behaviour::Fails(libc::EIO));
        let error = back_up(&repository, source, BUDGET).await.unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
        assert_eq!(error.kind(), ErrorKind::Retry);
        assert!(list(&repository).await.unwrap().complete.is_empty());
    }
}

#[tokio::test]
async fn failure_17_a_store_that_fails_at_any_call_leaves_no_basebackup() {
    let mut reached = 0;
    for calls in 0.. {
        let store = Arc::new(Faulty::new(MemoryStore::new()));
        let repository = repository(store.clone()).await;
        store.inject(Rule::on(Verb::Create, Fault::Before(storage::ErrorKind::Full)).skip(calls).times(1));
        let outcome = back_up(&repository, a_few_files(), BUDGET).await;
        let fired = store.faults() > 0;
        store.heal();
        let listed = list(&repository).await.unwrap();
        if fired {
            assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Input);
            assert!(listed.complete.is_empty(), "call {calls}");
            reached += 1;
        } else {
            assert_eq!(listed.complete.len(), 1);
            break;
        }
    }
    assert!(reached >= 5, "begin, packs, manifest, refs and outcome each fail once: {reached}");
}

#[tokio::test]
async fn failure_43_no_nonce_carries_two_plaintexts_across_failed_and_repeated_uploads() {
    let keys = create_keys(3072).unwrap();
    let recorder = Arc::new(SealRecorder::new());
    let keyring = testing::keyring(&keys, 11).observed_by(recorder.clone());
    let store = Arc::new(Faulty::new(MemoryStore::new()));
    let repository = testing::site_with(keyring, store.clone(), testing::clock()).await;
    for fault in [
        Fault::Before(storage::ErrorKind::Full),
        Fault::After(storage::ErrorKind::OutcomeUnknown),
        Fault::Before(storage::ErrorKind::Unreachable),
    ] {
        for calls in 0..6 {
            store.inject(Rule::on(Verb::Create, fault.clone()).skip(calls).times(1));
            // Fails or not: only what was sealed counts here.
            let _ = back_up(&repository, a_few_files(), BUDGET).await;
            store.heal();
        }
    }
    let (record, _) = back_up(&repository, a_few_files(), BUDGET).await.unwrap();
    assert!(read_back(&repository, &record).await == a_few_files().files);
    assert!(recorder.sealed_count() > 500, "{}", recorder.sealed_count());
    assert_eq!(recorder.reused_nonces(), []);
}

#[tokio::test]
async fn a_slow_store_holds_the_readers_back() {
    let store = Arc::new(Faulty::new(MemoryStore::new()));
    let repository = repository(store.clone()).await;
    store.inject(Rule::on(Verb::Create, Fault::Delay(Duration::from_millis(30))).key("/packs/"));
    let mut source = MemorySource::default();
    for n in 0..24 {
        source.add(&format!("data/base/5/{}", 20_000 + n), bytes(n, 4_000_000));
    }
    let (most, expected) = (source.open_most.clone(), source.files.clone());
    let budget = Budget { jobs: 4, uploads: 1 };
    let (record, _) = back_up(&repository, source, budget).await.unwrap();
    // Each job in flight belongs to one file, and no more are ever open.
    assert!(most.load(Ordering::SeqCst) <= budget.jobs, "{}", most.load(Ordering::SeqCst));
    assert!(read_back(&repository, &record).await == expected);
}
