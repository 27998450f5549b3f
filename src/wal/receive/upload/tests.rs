//! The storing half on a spool of its own and a site in memory.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::clock::{ManualClock, SystemClock};
use crate::codec::SeededRandom;
use crate::pg::{Lsn, WalSegmentSize};
use crate::repo::wal_object::{WalKey, archive_piece, archive_wal, newest_head, read_pieces, read_wal};
use crate::repo::{Keyring, RepositoryOptions};
use crate::storage::{self, Fault, Faulty, MemoryStore, ObjectKey, Rule, Store};
use crate::wal::spool::Spool;
use crate::wal::tests::{MIB, SYSTEM, segment};

use super::*;

/// The number of the segment that is received.
const NUMBER: u64 = 9;
const PATIENCE: Duration = Duration::from_secs(60);

/// What is received, in a folder and a store that stay when the storing half ends.
struct Scene {
    folder: TempDir,
    store: Arc<MemoryStore>,
    /// Whether the repository cannot be opened.
    is_closed: Arc<AtomicBool>,
}

/// A storing half at work.
struct Storing {
    shared: Arc<Shared>,
    stop: watch::Sender<Stop>,
    task: JoinHandle<Result<(), Error>>,
}

fn cluster() -> ClusterId {
    ClusterId { system_identifier: SYSTEM, segment_size: WalSegmentSize::MIN }
}

fn name() -> WalSegmentName {
    WalSegmentName::containing(TimelineId::FIRST, at(0).lsn, WalSegmentSize::MIN)
}

/// The position of a byte of the segment.
fn at(offset: usize) -> Position {
    Position { timeline: TimelineId::FIRST, lsn: Lsn(NUMBER * MIB as u64 + offset as u64) }
}

async fn open(store: Arc<dyn Store>) -> Result<Repository, repo::Error> {
    let options = RepositoryOptions {
        store,
        site: ObjectKey::parse("main").unwrap(),
        keyring: Keyring::unencrypted(Arc::new(SeededRandom::new(7))),
        clock: Arc::new(SystemClock),
    };
    Ok(Repository::open_or_create(options).await?.0)
}

impl Scene {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), store: Arc::default(), is_closed: Arc::default() }
    }

    fn spool(&self) -> Spool {
        Spool::open(self.folder.path(), WalSegmentSize::MIN, None).unwrap()
    }

    fn spooled_file(&self) -> PathBuf {
        self.folder.path().join(format!("{}.spool", name()))
    }

    /// Starts storing what comes into the spool, each byte at once.
    fn start(&self) -> Storing {
        self.start_by(Arc::new(SystemClock))
    }

    /// The same by a clock of the test's.
    fn start_by(&self, clock: Arc<dyn Clock>) -> Storing {
        let (stop, stopped) = watch::channel(Stop::No);
        let shared = Arc::new(Shared::new(self.spool(), Vec::new()));
        let (store, is_closed) = (self.store.clone(), self.is_closed.clone());
        let open: OpenRepository = Arc::new(move || {
            let (store, is_closed) = (store.clone(), is_closed.clone());
            Box::pin(async move {
                if is_closed.load(Ordering::Relaxed) {
                    return Err(repo::Error::Internal("no key".into()));
                }
                open(store).await
            })
        });
        let uploader = Uploader {
            shared: shared.clone(),
            cluster: cluster(),
            open,
            clock,
            compression: Compression::zstd(1),
            rule: PieceRule { interval: Duration::from_secs(2), bytes: 8 << 20, at_once: true },
            stop: stopped,
        };
        Storing { shared, stop, task: tokio::spawn(uploader.run()) }
    }

    /// Puts a piece of the segment into the store, and returns its key.
    async fn put(&self, from: usize, to: usize) -> ObjectKey {
        let repository = open(self.store.clone()).await.unwrap();
        let key = WalKey::create(repository.keyring()).unwrap();
        let bytes = &segment(1, NUMBER)[from..to];
        let range = from as u32..to as u32;
        let zstd = Compression::zstd(1);
        archive_piece(&repository, cluster(), name(), range.clone(), bytes, &key, zstd).await.unwrap();
        let piece = WalObjectName::Piece { segment: name(), from: range.start, to: range.end };
        repository.layout().wal_object(cluster(), piece)
    }

    /// The same, and spoils it.
    async fn put_spoiled(&self, from: usize, to: usize) {
        let key = self.put(from, to).await;
        self.store.tamper(&key, |bytes| {
            let mut bytes = bytes.unwrap().to_vec();
            *bytes.last_mut().unwrap() ^= 1;
            Some(bytes.into())
        });
    }

    /// Returns how far the newest head says that the archive reaches.
    async fn head(&self) -> Option<Lsn> {
        let repository = open(self.store.clone()).await.unwrap();
        newest_head(&repository, cluster(), TimelineId::FIRST).await.unwrap().map(|head| head.end)
    }

    async fn wait_for_head(&self, to: usize) {
        let waiting = async {
            while self.head().await != Some(at(to).lsn) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("a head is written in time");
    }
}

impl Storing {
    fn receive(&self, from: usize, to: usize) {
        self.shared.spool.append(at(from), &segment(1, NUMBER)[from..to]).unwrap();
        self.shared.spooled.notify_one();
    }

    fn problem(&self) -> Option<String> {
        self.shared.state().store_problem.as_ref().map(|problem| problem.message.clone())
    }

    async fn wait_until_stored(&self, to: usize) {
        let mut durable = self.shared.durable.subscribe();
        let stored = durable.wait_for(|durable| *durable >= Some(at(to)));
        tokio::time::timeout(PATIENCE, stored).await.expect("all is stored in time").unwrap();
    }

    async fn wait_for(&self, what: &str, found: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !found(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| panic!("{what}: {:?}", self.problem()));
    }

    async fn end(self) -> Result<(), Error> {
        self.stop.send_replace(Stop::Soon);
        tokio::time::timeout(PATIENCE, self.task).await.expect("it ends in time").unwrap()
    }
}

#[tokio::test]
async fn a_piece_in_the_store_that_nobody_can_use_holds_back_nothing_and_is_told() {
    let scene = Scene::new();
    let storing = scene.start();
    storing.receive(0, 100);
    storing.wait_until_stored(100).await;
    assert_eq!(storing.problem(), None);
    scene.put_spoiled(100, 200).await;
    storing.receive(100, 200);
    storing.wait_until_stored(200).await;
    let told = storing.problem().unwrap();
    assert!(told.contains("00000064-000000C8.piece is damaged"), "{told}");
    let repository = open(scene.store.clone()).await.unwrap();
    let wal = segment(1, NUMBER);
    assert!(read_pieces(&repository, cluster(), name()).await.unwrap() == wal[..200]);
    // As long as the pieces serve somebody.
    storing.receive(200, 300);
    storing.wait_until_stored(300).await;
    assert_eq!(storing.problem(), Some(told));
    storing.receive(300, MIB);
    storing.shared.spool.append(at(MIB), &segment(1, NUMBER + 1)[..100]).unwrap();
    storing.wait_until_stored(MIB + 100).await;
    storing
        .wait_for("the segment leaves the spool", |storing| storing.shared.spool.oldest(2).len() == 1)
        .await;
    storing.wait_for("nothing is told any more", |storing| storing.problem().is_none()).await;
    storing.end().await.unwrap();
    assert!(read_wal(&repository, cluster(), WalObjectName::Segment(name())).await.unwrap() == wal);
}

/// As where it was killed between meeting the piece and storing its bytes elsewhere: the spool has the only copy.
#[tokio::test]
async fn a_piece_in_the_store_that_nobody_can_use_does_not_count_at_the_next_start() {
    let scene = Scene::new();
    {
        let spool = scene.spool();
        spool.append(at(0), &segment(1, NUMBER)[..200]).unwrap();
        // The timeline ended there, so that what there is of its last segment may leave.
        let next = Position { timeline: TimelineId::new(2).unwrap(), ..at(0) };
        spool.append(next, &segment(2, NUMBER)[..100]).unwrap();
    }
    scene.put(0, 100).await;
    scene.put_spoiled(100, 200).await;
    let storing = scene.start();
    storing
        .wait_for("the segment leaves the spool", |storing| storing.shared.spool.oldest(2).len() == 1)
        .await;
    storing.end().await.unwrap();
    let repository = open(scene.store.clone()).await.unwrap();
    assert!(read_pieces(&repository, cluster(), name()).await.unwrap() == segment(1, NUMBER)[..200]);
}

/// Of a segment that is whole in the store as well, by its name, where only its beginning was received.
#[tokio::test]
async fn a_segment_in_the_store_that_nobody_can_use_does_not_count_at_the_next_start() {
    let scene = Scene::new();
    {
        let spool = scene.spool();
        spool.append(at(0), &segment(1, NUMBER)[..200]).unwrap();
        let next = Position { timeline: TimelineId::new(2).unwrap(), ..at(0) };
        spool.append(next, &segment(2, NUMBER)[..100]).unwrap();
    }
    let repository = open(scene.store.clone()).await.unwrap();
    let (key, wal) = (WalKey::create(repository.keyring()).unwrap(), segment(1, NUMBER));
    let whole = WalObjectName::Segment(name());
    archive_wal(&repository, cluster(), whole, &wal, &key, Compression::zstd(1)).await.unwrap();
    scene.store.tamper(&repository.layout().wal_object(cluster(), whole), |bytes| {
        let mut bytes = bytes.unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        Some(bytes.into())
    });
    let storing = scene.start();
    storing
        .wait_for("the segment leaves the spool", |storing| storing.shared.spool.oldest(2).len() == 1)
        .await;
    storing.end().await.unwrap();
    assert!(read_pieces(&repository, cluster(), name()).await.unwrap() == wal[..200]);
}

/// A file that a disk cannot read, or that belongs to somebody else, must not keep all else from being stored.
#[tokio::test]
async fn an_object_that_cannot_be_read_counts_as_not_there_unless_the_store_is_away() {
    let scene = Scene::new();
    scene.put(0, 100).await;
    let key = scene.put(100, 200).await;
    let store = Faulty::new(scene.store.clone());
    let repository = open(Arc::new(store.clone())).await.unwrap();
    let stored = async || stored_of(&repository, cluster(), name()).await.map(|stored| stored.bytes);
    assert_eq!(stored().await.unwrap(), 200);
    for (unreadable, bytes) in [(key.as_str(), 100), ("", 0)] {
        for kind in [storage::ErrorKind::Denied, storage::ErrorKind::Invalid, storage::ErrorKind::Other] {
            store.inject(Rule::always(Fault::Before(kind)).key(unreadable));
            assert_eq!(stored().await.unwrap(), bytes, "{kind:?}");
            store.heal();
        }
        store.inject(Rule::always(Fault::Before(storage::ErrorKind::Unreachable)).key(unreadable));
        stored().await.unwrap_err();
        store.heal();
    }
}

#[tokio::test]
async fn a_repository_that_could_not_be_opened_is_no_problem_once_it_is_open() {
    let scene = Scene::new();
    scene.is_closed.store(true, Ordering::Relaxed);
    let storing = scene.start();
    storing.wait_for("it is told", |storing| storing.problem().is_some()).await;
    scene.is_closed.store(false, Ordering::Relaxed);
    storing.wait_for("it is told no more", |storing| storing.problem().is_none()).await;
    storing.end().await.unwrap();
}

#[tokio::test]
async fn a_history_that_is_none_holds_back_nothing() {
    let scene = Scene::new();
    scene.spool().put_history(TimelineId::FIRST, b"no history").unwrap();
    let storing = scene.start();
    storing.receive(0, 100);
    storing.wait_until_stored(100).await;
    let told = storing.problem().unwrap();
    assert!(told.contains("timeline 1 is stored without its history"), "{told}");
    storing.end().await.unwrap();
}

/// The disk has lost what was durable. The next start finds out what is left, and what is missing.
#[tokio::test]
async fn a_spool_that_lost_what_it_held_ends_it_and_is_known_when_it_is_opened_again() {
    let scene = Scene::new();
    {
        let spool = scene.spool();
        spool.append(at(0), &segment(1, NUMBER)[..1000]).unwrap();
        spool.append(at(1000), &segment(1, NUMBER)[1000..]).unwrap();
        spool.append(at(MIB), &segment(1, NUMBER + 1)[..100]).unwrap();
    }
    scene.is_closed.store(true, Ordering::Relaxed);
    let storing = scene.start();
    let mut bytes = fs::read(scene.spooled_file()).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(scene.spooled_file(), bytes).unwrap();
    scene.is_closed.store(false, Ordering::Relaxed);
    let ended = tokio::time::timeout(PATIENCE, storing.task).await.expect("it ends in time").unwrap();
    assert!(matches!(ended, Err(Error::Disk(disk::Error::Malformed { .. }))), "{ended:?}");
    assert_eq!(scene.spool().holes(), [(at(1000), at(MIB).lsn)]);
    // What is left is stored, and what is behind the hole does not count before that is filled, or given up.
    let wal = segment(1, NUMBER);
    for is_filled in [false, true] {
        let storing = scene.start();
        let hole = storing.shared.hole().unwrap();
        assert_eq!((hole.from, hole.to), (at(1000), at(MIB).lsn));
        storing.wait_until_stored(1000).await;
        let repository = open(scene.store.clone()).await.unwrap();
        let behind = WalSegmentName::containing(TimelineId::FIRST, at(MIB).lsn, WalSegmentSize::MIN);
        while read_pieces(&repository, cluster(), behind).await.map_or(0, |wal| wal.len()) < 100 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if is_filled {
            storing.receive(1000, 2000);
            storing.wait_until_stored(2000).await;
            assert_eq!(storing.shared.hole().unwrap().from, at(2000));
        }
        storing.end().await.unwrap();
        if !is_filled {
            assert_eq!(scene.spool().oldest(2).len(), 2, "only what is around the hole tells of it");
        }
    }
    let storing = scene.start();
    storing.wait_until_stored(2000).await;
    assert_eq!(storing.shared.snapshot().stored, Some(at(2000).lsn));
    storing.receive(2000, MIB);
    storing.wait_until_stored(MIB + 100).await;
    assert_eq!(storing.shared.hole(), None);
    storing
        .wait_for("the segment leaves the spool", |storing| storing.shared.spool.oldest(2).len() == 1)
        .await;
    storing.end().await.unwrap();
    let repository = open(scene.store.clone()).await.unwrap();
    assert!(read_wal(&repository, cluster(), WalObjectName::Segment(name())).await.unwrap() == wal);
}

#[tokio::test]
async fn what_is_behind_a_hole_counts_once_that_is_given_up() {
    let scene = Scene::new();
    {
        let spool = scene.spool();
        spool.append(at(0), &segment(1, NUMBER)[..1000]).unwrap();
        spool.append(at(MIB), &segment(1, NUMBER + 1)[..100]).unwrap();
    }
    let storing = scene.start();
    storing.wait_until_stored(1000).await;
    assert_eq!(storing.shared.snapshot().stored, Some(at(1000).lsn));
    storing.shared.give_up_hole(storing.shared.hole().unwrap());
    storing.wait_until_stored(MIB + 100).await;
    storing
        .wait_for("the segment leaves the spool", |storing| storing.shared.spool.oldest(2).len() == 1)
        .await;
    storing.end().await.unwrap();
}

/// A receiver may run for months: what is cut off of the archive's end shows by the newest head alone.
#[tokio::test]
async fn a_head_is_written_again_once_in_an_interval() {
    let scene = Scene::new();
    scene.put(0, 100).await;
    let clock = ManualClock::new("2026-11-22T04:30:00Z".parse().unwrap());
    let storing = scene.start_by(Arc::new(clock.clone()));
    // All of it is stored: the first head has nothing else beside it.
    storing.receive(0, 100);
    scene.wait_for_head(100).await;
    clock.advance(HEAD_INTERVAL - Duration::from_secs(1));
    for to in [200, 300] {
        storing.receive(to - 100, to);
        storing.wait_until_stored(to).await;
    }
    assert_eq!(scene.head().await, Some(at(100).lsn), "the interval is not over");
    clock.advance(Duration::from_secs(1));
    scene.wait_for_head(300).await;
    storing.end().await.unwrap();
}
