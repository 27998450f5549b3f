//! One request of the store that fails, at each position of pushing and of fetching a segment in parts: the segment is
//! there as a whole or not at all, and the next push converges.

use std::sync::Arc;

use walden::codec::Compression;
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{Archived, WalKey, archive_in_parts};
use walden::repo::{Error, Repository};
use walden::storage::{Call, MemoryStore, Recording, Rule, Store, Verb};

use crate::positions::{Scene, TestStore, faults, faulty, lies, names_what, retrying};

/// Three parts of the segment, the last one short: what is in them does not matter here, only what follows what.
const PART_BYTES: usize = 120_000;
const PARTS: usize = 3;

/// Pushes the segment in parts, in a site that is created where it is missing.
async fn push(scene: &Scene, store: Arc<dyn Store>, seed: u64) -> Result<Archived, Error> {
    let (repository, _) = Repository::open_or_create(scene.options(store, seed)).await?;
    let WalObjectName::Segment(segment) = Scene::name() else { unreachable!("it is a segment") };
    let key = WalKey::create(repository.keyring())?;
    let (place, zstd) = ((Scene::cluster(), segment), Compression::zstd(1));
    archive_in_parts(&repository, place, &scene.segment.clone().into(), PART_BYTES, &key, zstd).await
}

async fn calls_of_a_push(scene: &Scene) -> Vec<Call> {
    let log = Recording::new(MemoryStore::new());
    push(scene, Arc::new(log.clone()), 1).await.unwrap();
    let calls = log.calls();
    let stored = |call: &&Call| call.verb == Verb::Create && call.key.contains("/wal/");
    assert_eq!(calls.iter().filter(stored).count(), PARTS + 1, "{calls:#?}");
    calls
}

#[tokio::test]
async fn pushing_parts_survives_a_fault_at_every_position_or_leaves_no_segment() {
    let scene = Scene::new();
    let mut failures = 0;
    for (position, call) in calls_of_a_push(&scene).await.iter().enumerate() {
        for (fault, retries) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let what =
                format!("{fault:?} at call {position}, {:?} of {}, retried: {retries}", call.verb, call.key);
            let store = faulty();
            store.inject(Rule::always(fault.clone()).skip(position).times(1));
            let used = if retries { retrying(store.clone()) } else { store.clone() as Arc<dyn Store> };
            let outcome = push(&scene, used, 1).await;
            assert_eq!(store.faults(), 1, "{what}");
            store.heal();
            let is_there = is_there(&scene, &store, &what).await;
            if let Err(error) = &outcome {
                failures += 1;
                assert!(!retries || lies(fault), "{what}: {error}");
                assert!(names_what(error), "{what}: {error}");
            }
            assert!(is_there || outcome.is_err(), "{what}: it was said to be archived");
            let next = push(&scene, store.clone(), 2).await;
            let next = next.unwrap_or_else(|error| panic!("{what}, then: {error}"));
            assert_eq!(next == Archived::Identical, is_there, "{what}");
            assert!(self::is_there(&scene, &store, &what).await, "{what}");
        }
    }
    assert!(failures > 0, "no fault failed a push");
}

/// Says whether the segment is there; by half it never is.
async fn is_there(scene: &Scene, store: &TestStore, what: &str) -> bool {
    match scene.read_segment(store.clone()).await {
        Ok(segment) => {
            assert!(segment == scene.segment, "{what}: other bytes");
            true
        }
        Err(error) => {
            assert!(error.is_absent(), "{what}: {error}");
            false
        }
    }
}

#[tokio::test]
async fn fetching_parts_with_a_fault_at_every_position_is_right_or_fails_and_names_what() {
    let scene = Scene::new();
    let memory = Arc::new(MemoryStore::new());
    push(&scene, memory.clone(), 1).await.unwrap();
    let log = Recording::new(memory.clone());
    assert!(scene.read_segment(Arc::new(log.clone())).await.unwrap() == scene.segment);
    let calls = log.calls();
    assert!(calls.iter().filter(|call| call.key.ends_with(".part")).count() >= PARTS, "{calls:#?}");
    for (position, call) in calls.iter().enumerate() {
        for (fault, retries) in faults(call).iter().flat_map(|fault| [(fault, false), (fault, true)]) {
            let what =
                format!("{fault:?} at call {position}, {:?} of {}, retried: {retries}", call.verb, call.key);
            let store: TestStore = Arc::new(walden::storage::Faulty::new(memory.clone()));
            store.inject(Rule::always(fault.clone()).skip(position).times(1));
            let used = if retries { retrying(store.clone()) } else { store.clone() as Arc<dyn Store> };
            match scene.read_segment(used).await {
                Ok(segment) => assert!(segment == scene.segment, "{what}: other bytes"),
                Err(error) => {
                    assert!(!retries || lies(fault), "{what}: {error}");
                    // Absence would be the end of the archive.
                    assert!(!error.is_absent() && names_what(&error), "{what}: {error}");
                }
            }
            assert_eq!(store.faults(), 1, "{what}");
            store.heal();
            assert!(scene.read_segment(store).await.unwrap() == scene.segment, "{what}");
        }
    }
}
