//! A host whose clock is an hour off: what it writes sorts behind what it builds on, and the newest is the newest.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use walden::catalog::basebackups;
use walden::clock::ManualClock;
use walden::codec::{Compression, SeededRandom};
use walden::repo::builder::{BasebackupBuilder, BuilderOptions};
use walden::repo::lease::{Lease, Pin};
use walden::repo::{Basebackup, BasebackupId, Repository};
use walden::storage::{MemoryStore, Store};

use crate::support::repository::{basebackup, site_options, unencrypted};

/// Opens the site as a host with that time would.
async fn open(store: &Arc<MemoryStore>, time: Timestamp, seed: u64) -> Repository {
    let keyring = unencrypted(SeededRandom::new(seed));
    let options = site_options(store.clone(), keyring, ManualClock::new(time));
    Repository::open_or_create(options).await.unwrap().0
}

/// Writes a basebackup as a host with that time would.
async fn write(store: &Arc<MemoryStore>, time: &str, parent: Option<BasebackupId>) -> BasebackupId {
    let time = time.parse().unwrap();
    let repository = open(store, time, 7).await;
    let parent = match parent {
        Some(id) => Some(Arc::new(Basebackup::open(&repository, id).await.unwrap())),
        None => None,
    };
    let options = BuilderOptions { time, ..basebackup(Compression::zstd(1)) };
    let mut builder = BasebackupBuilder::begin(&repository, options, parent).await.unwrap();
    builder.directory("data");
    builder.file("data/PG_VERSION", b"15\n").await.unwrap();
    let id = builder.finish().await.unwrap().id;
    let list = basebackups::list(&repository).await.unwrap();
    assert_eq!(list.resolve("latest").unwrap().record.id, id, "what was written last is the latest");
    id
}

#[tokio::test]
async fn a_basebackup_sorts_behind_its_parent_whatever_the_clocks_say() {
    let store = Arc::new(MemoryStore::new());
    let ahead = write(&store, "2026-11-20T11:15:00Z", None).await;
    let right = write(&store, "2026-11-20T10:16:00Z", Some(ahead)).await;
    let behind = write(&store, "2026-11-20T09:17:00Z", Some(right)).await;
    assert!(ahead < right && right < behind, "{ahead}, {right}, {behind}");
    // An hour that is repeated costs the ids their time, which people read, and nothing else.
    assert_eq!(behind.time().to_string(), "2026-11-20T11:15:02Z");
}

/// A full one has no parent, and is the latest all the same; `write` holds that.
#[tokio::test]
async fn a_full_basebackup_sorts_behind_the_one_before_it() {
    let store = Arc::new(MemoryStore::new());
    let ahead = write(&store, "2026-11-20T11:15:00Z", None).await;
    let right = write(&store, "2026-11-20T10:16:00Z", None).await;
    assert!(ahead < right, "{ahead}, {right}");
}

/// Leases and pins are dated by the store alone, and no clock of a host says when one is over.
#[tokio::test]
async fn a_host_an_hour_off_holds_a_basebackup_and_lets_it_go() {
    let now: Timestamp = "2026-11-20T10:15:00Z".parse().unwrap();
    let store = Arc::new(MemoryStore::with_clock(Arc::new(ManualClock::new(now))));
    let id = write(&store, "2026-11-20T10:15:00Z", None).await;
    for (seed, hours) in [(11, -1), (12, 1)] {
        let repository = open(&store, now + SignedDuration::from_hours(hours), seed).await;
        let mut lease = Lease::create(&repository, id).await.unwrap().expect("the store takes writes");
        lease.renew().await.unwrap();
        lease.end().await.unwrap();
        let pin = Pin::create(&repository, id, "a clone").await.unwrap();
        pin.end(&repository).await.unwrap();
    }
    let below = async |folder: &str| {
        let objects = store.list(folder, None, 100).await.unwrap();
        assert!(objects.iter().all(|object| object.last_modified == now), "{objects:?}");
        let leaf = |key: &str| key.rsplit(['/', '.']).next().unwrap().to_owned();
        let mut leaves: Vec<String> = objects.iter().map(|object| leaf(object.key.as_str())).collect();
        leaves.sort();
        leaves
    };
    assert_eq!(below("main/leases").await, ["0", "0", "1", "1", "end", "end"]);
    let pins = below("main/pins").await;
    assert_eq!((pins.len(), pins.iter().filter(|leaf| *leaf == "end").count()), (4, 2), "{pins:?}");
}
