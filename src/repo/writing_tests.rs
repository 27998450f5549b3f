//! The order in which a basebackup is written, and what stops it on the way: each step that the format's protocol
//! rests on, taken away or found changed.

use std::sync::Arc;

use bytes::Bytes;

use crate::codec::Compression;
use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
use crate::repo::documents::Outcome;
use crate::repo::identity::ObjectKind;
use crate::repo::signed::seal_document;
use crate::repo::{Basebackup, BasebackupId, Error, ErrorKind, Repository, testing};
use crate::storage::{MemoryStore, Recording, Store, Verb};

type Calls = Arc<Recording<MemoryStore>>;

async fn site() -> (Calls, Repository) {
    let store: Calls = Arc::new(Recording::new(MemoryStore::new()));
    let repository = testing::site(store.clone(), testing::clock()).await;
    (store, repository)
}

fn options() -> BuilderOptions {
    BuilderOptions { compression: Compression::zstd(1), ..testing::basebackup() }
}

/// Pages of which no two are alike.
fn pages(count: usize) -> Vec<u8> {
    (0..count * 8192).map(|n| (n / 8192 + 1) as u8).collect()
}

async fn full(repository: &Repository) -> Arc<Basebackup> {
    let mut builder = BasebackupBuilder::begin(repository, options(), None).await.unwrap();
    builder.file("data/base/5/1", &pages(12)).await.unwrap();
    let id = builder.finish().await.unwrap().id;
    Arc::new(Basebackup::open(repository, id).await.unwrap())
}

/// Writes a basebackup that reuses all of its parent's pages but the first.
async fn child(repository: &Repository, parent: Arc<Basebackup>) -> Result<BasebackupId, Error> {
    let mut builder = BasebackupBuilder::begin(repository, options(), Some(parent)).await?;
    let mut bytes = pages(12);
    bytes[..8192].fill(77);
    builder.file("data/base/5/1", &bytes).await?;
    Ok(builder.finish().await?.id)
}

#[tokio::test]
async fn begin_comes_first_then_the_parent_then_content_and_the_outcome_last() {
    let (store, repository) = site().await;
    let parent = full(&repository).await;
    let old = parent.record().id;
    store.take_calls();
    let id = child(&repository, parent).await.unwrap();
    let calls = store.take_calls();
    let at = |verb: Verb, key: &str| {
        let found = calls.iter().position(|call| call.verb == verb && call.key.ends_with(key));
        found.unwrap_or_else(|| panic!("no {verb:?} of {key} in {calls:#?}"))
    };
    let order = [
        at(Verb::Create, &format!("{id}/begin")),
        at(Verb::Get, &format!("{old}/expired")),
        at(Verb::Get, &format!("{old}/backup.json")),
        calls.iter().position(|call| call.verb == Verb::Create && call.key.contains("/packs/")).unwrap(),
        calls.iter().rposition(|call| call.verb == Verb::Create && call.key.contains("/packs/")).unwrap(),
        at(Verb::List, &format!("{old}/packs/")),
        at(Verb::Create, &format!("{id}/manifest")),
        at(Verb::Create, &format!("{id}/refs")),
        at(Verb::Create, &format!("{id}/backup.json")),
    ];
    assert!(order.is_sorted(), "{order:?} in {calls:#?}");
    assert_eq!(order[8], calls.len() - 1, "nothing comes after the outcome: {calls:#?}");
    assert!(!calls.iter().any(|call| call.verb == Verb::Delete));
}

#[tokio::test]
async fn a_parent_that_expired_or_has_no_outcome_or_was_given_up_is_not_built_upon() {
    let (store, repository) = site().await;
    let parent = full(&repository).await;
    let id = parent.record().id;
    let layout = repository.layout();
    let outcome = store.get(&layout.outcome(id), 1 << 20).await.unwrap();

    store.create(&layout.expired(id), Bytes::from_static(b"x")).await.unwrap();
    let error = child(&repository, parent.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Expired(expired) if expired == id), "{error}");
    store.delete(&layout.expired(id)).await.unwrap();

    store.delete(&layout.outcome(id)).await.unwrap();
    let error = child(&repository, parent.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Incomplete(incomplete) if incomplete == id), "{error}");

    let identity = repository.basebackup_identity(ObjectKind::Outcome, id);
    let given_up = seal_document(repository.keyring(), &identity, &Outcome::Abandoned { id }).unwrap();
    store.create(&layout.outcome(id), given_up).await.unwrap();
    let error = child(&repository, parent.clone()).await.unwrap_err();
    assert!(matches!(error, Error::Abandoned(abandoned) if abandoned == id), "{error}");

    store.delete(&layout.outcome(id)).await.unwrap();
    store.create(&layout.outcome(id), outcome).await.unwrap();
    child(&repository, parent).await.unwrap();
}

/// A clock that was once wrong by years must not date everything that comes after.
#[tokio::test]
async fn an_attempt_from_far_ahead_does_not_date_the_next() {
    let (store, repository) = site().await;
    let wrong: BasebackupId = "20310101T000000Z-0001".parse().unwrap();
    store.create(&repository.layout().begin(wrong), Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(full(&repository).await.record().id.time(), repository.clock().now());
}

/// A sweeper that took the attempt for dead has settled its outcome first.
#[tokio::test]
async fn an_attempt_that_was_given_up_meanwhile_fails_at_its_end() {
    let (store, repository) = site().await;
    let mut builder = BasebackupBuilder::begin(&repository, options(), None).await.unwrap();
    builder.file("data/base/5/1", &pages(3)).await.unwrap();
    let begun = store.inner().list("main/basebackups", None, 1).await.unwrap();
    let id: BasebackupId = begun[0].key.as_str().split('/').nth(2).unwrap().parse().unwrap();
    let identity = repository.basebackup_identity(ObjectKind::Outcome, id);
    let given_up = seal_document(repository.keyring(), &identity, &Outcome::Abandoned { id }).unwrap();
    store.create(&repository.layout().outcome(id), given_up).await.unwrap();
    let error = builder.finish().await.unwrap_err();
    assert!(matches!(error, Error::Abandoned(abandoned) if abandoned == id), "{error}");
    let error = Basebackup::open(&repository, id).await.unwrap_err();
    assert!(matches!(error, Error::Abandoned(_)), "{error}");
}

/// Failure 32: a sweep removed what a running backup had just reused.
#[tokio::test]
async fn a_reused_pack_that_is_gone_or_cut_keeps_the_outcome_from_being_written() {
    for cut in [false, true] {
        let (store, repository) = site().await;
        let parent = full(&repository).await;
        let pack = parent.refs().records()[0];
        let mut builder = BasebackupBuilder::begin(&repository, options(), Some(parent)).await.unwrap();
        builder.file("data/base/5/1", &pages(13)).await.unwrap();
        let key = repository.layout().pack(pack.id, &pack.salt);
        let bytes = store.get(&key, 1 << 30).await.unwrap();
        store.delete(&key).await.unwrap();
        if cut {
            store.create(&key, bytes.slice(..bytes.len() - 1)).await.unwrap();
        }
        let error = builder.finish().await.unwrap_err();
        assert!(matches!(&error, Error::PacksMissing(packs) if packs == &[pack.id]), "{error}");
        assert!(error.to_string().contains(&pack.id.to_string()), "{error}");
        assert_eq!(error.kind(), ErrorKind::Damaged);
        let objects = store.inner().list("main/basebackups", None, 1000).await.unwrap();
        let outcomes = objects.iter().filter(|object| object.key.as_str().ends_with("backup.json"));
        assert_eq!(outcomes.count(), 1, "only the parent's");
    }
}
