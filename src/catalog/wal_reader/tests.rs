//! What was read ahead, and forced by somebody before anybody asked for it; and partial segments, some of them damaged.

use crate::clock::ManualClock;
use crate::codec::Compression;
use crate::pg::{TimelineId, WalSegmentNumber};
use crate::repo::testing;
use crate::repo::wal_object::{Replace, WalKey, archive_wal, supersede_wal};
use crate::storage::{Fault, Faulty, MemoryStore, Recording, Rule, Verb};

use super::*;

const CACHE_BYTES: usize = 16 << 20;
const NOW: fn(&ManualClock) -> Patience = |clock| Patience::Until(clock.monotonic());

struct Archive {
    store: Recording<Arc<Faulty<MemoryStore>>>,
    clock: ManualClock,
    repository: Repository,
    key: WalKey,
    reader: Arc<WalReader>,
}

fn cluster() -> ClusterId {
    "7301234567890123456-1".parse().unwrap()
}

fn segment(number: u64) -> WalSegmentName {
    WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(number), cluster().segment_size)
}

impl Archive {
    /// Archives segments 1 to 4, and has 2 to 4 read ahead.
    async fn read_ahead() -> Self {
        let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
        let store = Recording::new(Arc::new(Faulty::new(MemoryStore::new())));
        let repository = testing::site(store.clone(), clock.clone()).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        for number in 1..=4 {
            let name = WalObjectName::Segment(segment(number));
            archive_wal(&repository, cluster(), name, b"old", &key, Compression::NONE).await.unwrap();
        }
        let shared: Arc<dyn Clock> = Arc::new(clock.clone());
        let reader = Arc::new(WalReader::new(repository.clone(), cluster(), shared, CACHE_BYTES));
        let archive = Self { store, clock, repository, key, reader };
        archive.reader.read_ahead((2..=4).map(|number| ArchiveFileName::Segment(segment(number))));
        while archive.reader.cache().files.len() < 3 {
            tokio::task::yield_now().await;
        }
        archive.store.take_calls();
        archive
    }

    async fn force(&self, number: u64) {
        // Another process does it: what this one knows does not change by that.
        let new = b"new".to_vec().into();
        let (repository, key, replace) = (&self.repository, &self.key, Replace::Anything);
        supersede_wal(repository, cluster(), segment(number), replace, &new, key, Compression::NONE)
            .await
            .unwrap();
        self.store.take_calls();
    }

    async fn read(&self, number: u64) -> Bytes {
        let name = ArchiveFileName::Segment(segment(number));
        match self.reader.read(name, NOW(&self.clock)).await.unwrap() {
            Found::Present(bytes) => bytes,
            found => panic!("{found:?}"),
        }
    }
}

#[tokio::test]
async fn what_was_read_ahead_and_forced_since_is_read_again() {
    let archive = Archive::read_ahead().await;
    assert_eq!(archive.read(2).await, &b"old"[..]);
    assert_eq!(archive.store.take_calls(), []);
    archive.force(3).await;
    archive.force(2).await;
    archive.clock.advance(LISTING_AGE_MAX);
    // Asked for its size, as a mount is first, it is not handed out yet.
    let name = ArchiveFileName::Segment(segment(3));
    archive.reader.size(name, NOW(&archive.clock)).await.unwrap();
    assert_eq!(archive.read(3).await, &b"new"[..]);
    // Who has begun to copy one goes on with it.
    assert_eq!(archive.read(2).await, &b"old"[..]);
    archive.reader.forget_served();
    assert_eq!(archive.read(2).await, &b"new"[..]);
}

#[tokio::test]
async fn one_listing_serves_all_that_was_read_ahead() {
    let archive = Archive::read_ahead().await;
    archive.clock.advance(LISTING_AGE_MAX);
    for number in 2..=4 {
        assert_eq!(archive.read(number).await, &b"old"[..]);
    }
    let calls = archive.store.take_calls();
    assert_eq!(calls.iter().map(|call| call.verb).collect::<Vec<_>>(), [Verb::List]);
}

#[tokio::test]
async fn a_store_that_cannot_tell_is_waited_for_like_any_read() {
    let archive = Archive::read_ahead().await;
    archive.clock.advance(LISTING_AGE_MAX);
    archive.store.inner().inject(Rule::on(Verb::List, Fault::Before(storage::ErrorKind::Unreachable)));
    let name = ArchiveFileName::Segment(segment(2));
    let error = archive.reader.read(name, NOW(&archive.clock)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Retry);
    archive.store.inner().heal();
    assert_eq!(archive.read(2).await, &b"old"[..]);
}

#[tokio::test]
async fn a_damaged_partial_does_not_hide_another_and_is_no_absence() {
    let clock = ManualClock::new("2026-11-21T10:00:00Z".parse().unwrap());
    let store = Arc::new(MemoryStore::new());
    let repository = testing::site(store.clone(), clock.clone()).await;
    let key = WalKey::create(repository.keyring()).unwrap();
    let partial = |content: &str| partial_object(segment(3), Digest::of(content.as_bytes()));
    for content in ["long", "longest", "lo"] {
        let (name, content) = (partial(content), content.as_bytes());
        archive_wal(&repository, cluster(), name, content, &key, Compression::NONE).await.unwrap();
    }
    let shared: Arc<dyn Clock> = Arc::new(clock.clone());
    let reader = WalReader::new(repository.clone(), cluster(), shared, CACHE_BYTES);
    let read = async || {
        // Each time from the store.
        reader.forget_served();
        reader.read(ArchiveFileName::Partial(segment(3)), NOW(&clock)).await.unwrap()
    };
    let damage = |content: &str| {
        store.tamper(&repository.layout().wal_object(cluster(), partial(content)), |bytes| {
            let mut bytes = bytes.unwrap().to_vec();
            *bytes.last_mut().unwrap() ^= 1;
            Some(bytes.into())
        });
    };
    for (longest, next) in [("longest", Some("long")), ("long", Some("lo")), ("lo", None)] {
        let found = read().await;
        assert!(matches!(&found, Found::Present(bytes) if *bytes == longest.as_bytes()), "{found:?}");
        damage(longest);
        let found = read().await;
        match (&found, next) {
            (Found::Present(bytes), Some(next)) => assert_eq!(*bytes, next.as_bytes()),
            (Found::Unreadable(error), None) => assert_eq!(error.kind(), ErrorKind::Damaged),
            _ => panic!("{found:?}"),
        }
    }
}
