//! What a fetch costs at the store, and what becomes of it when others want the same, give up, or the store fails.
//!
//! Pages are stored as they are, so that the figures follow from sizes alone.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex};

use bytes::Bytes;

use crate::codec::CpuPool;
use crate::repo::builder::BasebackupBuilder;
use crate::repo::entry::{Entry, TreePath};
use crate::repo::page_map::PAGE_SIZE;
use crate::repo::transfers::REQUESTS_MAX;
use crate::repo::{Basebackup, Error, ErrorKind, FileReader, Piece, Transfers, Urgency, testing};
use crate::storage::{self, Call, Fault, Faulty, MemoryStore, Recording, Rule, Verb};

type TestStore = Recording<Faulty<MemoryStore>>;

const CHUNK: u64 = 64 << 10;
/// A chunk that is neither compressed nor encrypted, and its tag.
const STORED: u64 = CHUNK + 16;
/// 64 chunks that do not get smaller.
const REQUEST_BYTES_MAX: u64 = (4 << 20) + (4 << 10);
const CHUNKS: u64 = 128;
const SIZE: u64 = CHUNKS * CHUNK;

/// A basebackup with one file of 8 MiB, open, its page map read.
struct Scene {
    store: TestStore,
    reader: Arc<FileReader>,
    entry: Entry,
    bytes: Bytes,
}

impl Scene {
    async fn new() -> Self {
        let store = Recording::new(Faulty::new(MemoryStore::new()));
        let repository = testing::site(store.clone(), testing::clock()).await;
        let bytes: Vec<u8> = (0..SIZE).map(|n| (n / 11 + n / PAGE_SIZE) as u8 | 1).collect();
        let mut builder = BasebackupBuilder::begin(&repository, testing::basebackup(), None).await.unwrap();
        builder.directory("data").file("data/16384", &bytes).await.unwrap();
        let id = builder.finish().await.unwrap().id;
        let basebackup = Arc::new(Basebackup::open(&repository, id).await.unwrap());
        let path = TreePath::new("data/16384").unwrap();
        let (_, entry) = basebackup.entry(&path).await.unwrap().unwrap();
        let reader = FileReader::new(basebackup, 2 * SIZE as usize);
        // The last chunk is at hand from here on, and so is the page map.
        reader.read(&entry, SIZE - 1..SIZE).await.unwrap();
        store.take_calls();
        Self { store, reader: Arc::new(reader), entry, bytes: bytes.into() }
    }

    /// Fetches ranges, and checks every piece that comes; returns how many bytes that were.
    async fn fetch(&self, ranges: &[Range<u64>]) -> (u64, Result<(), Error>) {
        fetch(self.reader.clone(), self.entry.clone(), self.bytes.clone(), ranges.to_vec()).await
    }

    fn spawn(&self, ranges: Vec<Range<u64>>) -> tokio::task::JoinHandle<(u64, Result<(), Error>)> {
        tokio::spawn(fetch(self.reader.clone(), self.entry.clone(), self.bytes.clone(), ranges))
    }

    /// Takes the range requests since the last time.
    fn requests(&self) -> Vec<Call> {
        let calls = self.store.take_calls();
        assert!(calls.iter().all(|call| call.verb == Verb::GetRange), "{calls:?}");
        calls
    }

    fn faulty(&self) -> &Faulty<MemoryStore> {
        self.store.inner()
    }
}

async fn fetch(
    reader: Arc<FileReader>,
    entry: Entry,
    bytes: Bytes,
    ranges: Vec<Range<u64>>,
) -> (u64, Result<(), Error>) {
    let come = Mutex::new(0);
    let take = |pieces: Vec<Piece>| -> ControlFlow<()> {
        for piece in pieces {
            let range = piece.range();
            assert!(piece.bytes == bytes[range.start as usize..range.end as usize], "{range:?}");
            *come.lock().unwrap() += piece.bytes.len() as u64;
        }
        ControlFlow::Continue(())
    };
    let outcome = reader.fetch_each(&entry, &ranges, Urgency::Foreground, &take).await;
    let come = *come.lock().unwrap();
    (come, outcome)
}

fn stored(requests: &[Call]) -> u64 {
    requests.iter().map(|call| call.bytes).sum()
}

/// One page of every fourth chunk: too far apart to share requests.
fn scattered() -> Vec<Range<u64>> {
    (0..CHUNKS / 4).map(|n| n * 4 * CHUNK..n * 4 * CHUNK + PAGE_SIZE).collect()
}

#[tokio::test]
async fn a_large_range_costs_few_requests_and_a_page_one() {
    let scene = Scene::new().await;
    let (come, outcome) = scene.fetch(&[3 * CHUNK + 5..3 * CHUNK + 6]).await;
    outcome.unwrap();
    assert_eq!((come, stored(&scene.requests())), (CHUNK, STORED));
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    outcome.unwrap();
    assert_eq!(come, SIZE);
    let requests = scene.requests();
    // What is at hand in the middle is a gap too wide to be fetched again.
    let in_runs = |chunks: u64| chunks.div_ceil(REQUEST_BYTES_MAX / STORED);
    assert_eq!(requests.len() as u64, in_runs(3) + in_runs(CHUNKS - 1 - 4), "{requests:?}");
    assert!(requests.iter().all(|call| call.bytes <= REQUEST_BYTES_MAX), "{requests:?}");
    assert_eq!(stored(&requests), (CHUNKS - 2) * STORED);
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    outcome.unwrap();
    assert_eq!((come, scene.requests().len()), (SIZE, 0));
}

#[tokio::test]
async fn requests_are_under_way_together_but_not_without_bound_and_a_fetch_that_is_dropped_ends_them() {
    let scene = Scene::new().await;
    scene.faulty().inject(Rule::on(Verb::GetRange, Fault::HangBefore));
    let hangs = scene.spawn(scattered());
    while scene.faulty().faults() < REQUESTS_MAX {
        tokio::task::yield_now().await;
    }
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(scene.faulty().faults(), REQUESTS_MAX);
    // Another reader waits for the same, and takes it over when the first is gone.
    let waits = scene.spawn(vec![0..PAGE_SIZE]);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert_eq!(scene.faulty().faults(), REQUESTS_MAX);
    scene.faulty().heal();
    hangs.abort();
    assert!(hangs.await.unwrap_err().is_cancelled());
    let (come, outcome) = waits.await.unwrap();
    outcome.unwrap();
    assert_eq!(come, CHUNK);
    let (come, outcome) = scene.fetch(&scattered()).await;
    outcome.unwrap();
    assert_eq!(come, CHUNKS / 4 * CHUNK);
}

#[tokio::test]
async fn readers_of_overlapping_ranges_share_one_fetch_of_each_chunk() {
    let scene = Scene::new().await;
    let readers: Vec<_> = (0..48u64)
        .map(|n| {
            let start = n * 7919 * PAGE_SIZE % (SIZE / 2);
            scene.spawn(vec![start..start + SIZE / 3])
        })
        .collect();
    for reader in readers {
        let (come, outcome) = reader.await.unwrap();
        outcome.unwrap();
        assert!(come >= SIZE / 3);
    }
    assert!(stored(&scene.requests()) <= (CHUNKS - 1) * STORED);
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    outcome.unwrap();
    assert_eq!(come, SIZE);
}

#[tokio::test]
async fn readers_that_give_up_at_any_moment_leave_the_others_their_bytes() {
    let scene = Scene::new().await;
    let readers: Vec<_> = (0..64u64)
        .map(|n| {
            let start = n * 104_729 * PAGE_SIZE % (SIZE / 2);
            (n, scene.spawn(vec![start..start + SIZE / 2]))
        })
        .collect();
    for (n, reader) in readers {
        if n % 3 == 0 {
            for _ in 0..n % 7 {
                tokio::task::yield_now().await;
            }
            reader.abort();
            let _ = reader.await;
        } else {
            let (come, outcome) = reader.await.unwrap();
            outcome.unwrap();
            assert!(come >= SIZE / 2);
        }
    }
}

#[tokio::test]
async fn a_store_that_fails_in_the_middle_is_an_error_and_what_came_before_is_right() {
    let scene = Scene::new().await;
    let away = Fault::After(storage::ErrorKind::Unreachable);
    scene.faulty().inject(Rule::on(Verb::GetRange, away).skip(1).times(1));
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Retry);
    assert!(come < SIZE, "{come}");
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    outcome.unwrap();
    assert_eq!(come, SIZE);
    assert_eq!(scene.reader.damage(), None);
}

#[tokio::test]
async fn a_damaged_chunk_is_an_error_and_everything_beside_it_comes_all_the_same() {
    let scene = Scene::new().await;
    scene.faulty().inject(Rule::on(Verb::GetRange, Fault::FlipByte(5 * STORED as usize + 3)).times(1));
    let (come, outcome) = scene.fetch(&[0..SIZE]).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Damaged);
    assert_eq!(come, SIZE - CHUNK);
    assert!(scene.reader.damage().is_some());
}

#[tokio::test]
async fn who_wants_no_more_is_not_given_more() {
    let scene = Scene::new().await;
    let batches = Mutex::new(0);
    let take = |_: Vec<Piece>| -> ControlFlow<()> {
        *batches.lock().unwrap() += 1;
        ControlFlow::Break(())
    };
    let ranges = [0..SIZE];
    scene.reader.fetch_each(&scene.entry, &ranges, Urgency::Background, &take).await.unwrap();
    assert_eq!(*batches.lock().unwrap(), 1);
}

#[tokio::test]
async fn chunks_of_many_small_files_are_loaded_by_one_request() {
    let store = Recording::new(Faulty::new(MemoryStore::new()));
    let repository = testing::site(store.clone(), testing::clock()).await;
    let mut builder = BasebackupBuilder::begin(&repository, testing::basebackup(), None).await.unwrap();
    builder.directory("data");
    let content = |n: u8| vec![n + 1; 1000 + usize::from(n) * 1000];
    for n in 0..20 {
        builder.file(&format!("data/{n:02}"), &content(n)).await.unwrap();
    }
    let id = builder.finish().await.unwrap().id;
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, id).await.unwrap()), 1 << 20);
    let children = reader.basebackup().children(&TreePath::new("data").unwrap()).await.unwrap();
    let entries: Vec<Entry> = children.into_iter().map(|(_, entry)| entry).collect();
    store.take_calls();
    reader.load_together(&entries).await.unwrap();
    assert_eq!(store.take_calls().len(), 1);
    for (n, entry) in (0..).zip(&entries) {
        assert_eq!(reader.read(entry, 0..entry.size()).await.unwrap(), content(n), "{}", entry.path);
    }
    assert!(store.take_calls().is_empty());
}

#[tokio::test]
async fn a_pool_opens_the_same_bytes() {
    let Scene { store, reader, entry, bytes } = Scene::new().await;
    let reader = FileReader::new(reader.basebackup().clone(), 1 << 20);
    let reader = Arc::new(reader.sharing(Transfers::new(CpuPool::new(2, 2))));
    let (come, outcome) = fetch(reader, entry, bytes, vec![0..SIZE]).await;
    outcome.unwrap();
    assert_eq!(come, SIZE);
    assert!(!store.take_calls().is_empty());
}
