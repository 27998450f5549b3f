//! The contract of `Store` as checks, run on every store and every wrapper.
//!
//! Each function is named after the heading on the trait it holds a store to. They panic with what was
//! violated, and leave nothing behind in the folder they are given when they pass.
//!
//! Deliberately absent: durability, which no caller can observe without cutting the power, and unknown
//! outcomes, which a healthy store does not have; `fault` makes them and the tests of `retry` check them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::error::ErrorKind;
use super::key::ObjectKey;
use super::store::{ObjectMeta, Store};

/// Large enough to be sent in more than one piece by anything that cuts at all.
const LARGE_BYTES: usize = 5 * 1024 * 1024 + 17;

/// How many creates of one key run at once.
const RACERS: u8 = 8;

/// Keys whose order tells bytes from names: `-` and `.` sort before `/`, digits and letters after it.
const TRICKY: [&str; 14] = [
    "a-b/x",
    "a-b/y",
    "a.b",
    "a/b",
    "a/b-c",
    "a/c/d",
    "a/c-d",
    "a/c.d/e",
    "a0",
    "A",
    "a+b",
    "a=b/c/d/e/f",
    "b@c",
    "a_b",
];

/// Checks the whole contract below `folder`, where nothing exists yet.
pub async fn check(store: Arc<dyn Store>, folder: &str) {
    let folder = ObjectKey::parse(folder).expect("a conformance folder is an object key");
    what_is_created_is_read_back(&*store, &folder).await;
    ranges_are_exact(&*store, &folder).await;
    a_large_object_comes_back_whole(&*store, &folder).await;
    absence_is_reported_as_such(&*store, &folder).await;
    create_only(&*store, &folder).await;
    of_many_creates_one_wins(&store, &folder).await;
    listing_agrees_with_a_model(&*store, &folder).await;
    prefixes_are_whole_components(&*store, &folder).await;
    deleting_twice_is_success(&*store, &folder).await;
    nothing_is_left(&*store, &folder).await;
}

async fn what_is_created_is_read_back(store: &dyn Store, folder: &ObjectKey) {
    for (name, body) in [("empty", &b""[..]), ("one", b"1"), ("text", b"twelve bytes")] {
        let key = join(folder, name);
        create(store, &key, body).await;
        let size = body.len() as u64;
        assert_eq!(get(store, &key).await, body, "get of {key} after its create");
        assert_eq!(store.get(&key, size).await.expect("its exact size is not too large"), body);
        let meta = store.head(&key).await.expect("head of an object that exists");
        assert_eq!((meta.key, meta.size), (key.clone(), size));
        if size > 0 {
            let error = store.get(&key, size - 1).await.expect_err("get past size_max");
            assert_eq!(error.kind(), ErrorKind::TooLarge);
            assert_eq!(error.key(), key.as_str(), "an error names its object");
        }
        delete(store, &key).await;
    }
}

async fn ranges_are_exact(store: &dyn Store, folder: &ObjectKey) {
    let key = join(folder, "ranges");
    create(store, &key, b"0123456789").await;
    for (start, end) in [(0, 10), (0, 1), (9, 10), (3, 7)] {
        let read = store.get_range(&key, start..end).await.expect("a range inside the object");
        assert_eq!(read, b"0123456789"[start as usize..end as usize], "range {start}..{end}");
    }
    for (start, end) in [(0, 11), (9, 12), (10, 11), (500, 600)] {
        let error = store.get_range(&key, start..end).await.expect_err("a range past the end");
        assert_eq!(error.kind(), ErrorKind::Truncated, "range {start}..{end}: {error}");
    }
    let error = store.get_range(&key, 4..4).await.expect_err("an empty range");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    delete(store, &key).await;
}

async fn a_large_object_comes_back_whole(store: &dyn Store, folder: &ObjectKey) {
    let key = join(folder, "large");
    let body: Vec<u8> = (0..LARGE_BYTES).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    create(store, &key, &body).await;
    assert!(get(store, &key).await == body, "a large object differs");
    let (start, end) = (LARGE_BYTES / 2, LARGE_BYTES - 5);
    let range = store.get_range(&key, start as u64..end as u64).await.expect("a range of a large object");
    assert!(range == body[start..end], "a range of a large object differs");
    delete(store, &key).await;
}

async fn absence_is_reported_as_such(store: &dyn Store, folder: &ObjectKey) {
    for name in ["missing", "missing/deeper/still"] {
        let key = join(folder, name);
        assert!(store.get(&key, 10).await.expect_err("get of nothing").is_absent());
        assert!(store.get_range(&key, 0..1).await.expect_err("range of nothing").is_absent());
        assert!(store.head(&key).await.expect_err("head of nothing").is_absent());
        assert_eq!(store.list(key.as_str(), None, 10).await.expect("a missing folder is empty"), []);
        let level = store.list_folder(key.as_str()).await.expect("a missing folder is empty");
        assert!(level.folders.is_empty() && level.objects.is_empty());
    }
}

async fn create_only(store: &dyn Store, folder: &ObjectKey) {
    let key = join(folder, "once");
    create(store, &key, b"first").await;
    // Never the same bytes: after a lost answer `Retrying` takes those for its own.
    for body in [&b"second"[..], b"FIRST", b""] {
        let error = store.create(&key, Bytes::copy_from_slice(body)).await.expect_err("a second create");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    }
    assert_eq!(get(store, &key).await, "first", "a refused create changed the object");
    delete(store, &key).await;
    create(store, &key, b"again").await;
    assert_eq!(get(store, &key).await, "again", "a deleted key is free");
    delete(store, &key).await;
}

async fn of_many_creates_one_wins(store: &Arc<dyn Store>, folder: &ObjectKey) {
    let key = join(folder, "race/one");
    let racers: Vec<_> = (0..RACERS)
        .map(|racer| {
            let (store, key) = (Arc::clone(store), key.clone());
            // Bodies of different lengths: a mixture of two would show.
            let body = Bytes::from(vec![racer; 10_000 + usize::from(racer)]);
            tokio::spawn(async move { store.create(&key, body).await })
        })
        .collect();
    let mut winners = Vec::new();
    for (racer, handle) in (0..RACERS).zip(racers) {
        match handle.await.expect("a create does not panic") {
            Ok(()) => winners.push(racer),
            Err(error) => assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}"),
        }
    }
    assert_eq!(winners.len(), 1, "exactly one create of a key succeeds");
    assert_eq!(get(&**store, &key).await, vec![winners[0]; 10_000 + usize::from(winners[0])]);
    delete(&**store, &key).await;
}

async fn listing_agrees_with_a_model(store: &dyn Store, folder: &ObjectKey) {
    let root = join(folder, "listing");
    let mut model = BTreeMap::new();
    for (size, name) in TRICKY.iter().enumerate() {
        let key = join(&root, name);
        create(store, &key, &vec![7; size]).await;
        model.insert(key, size as u64);
    }
    for below in ["", "a", "a/c", "a=b", "a=b/c/d", "a-b", "b", "zzz"] {
        let prefix = if below.is_empty() { root.to_string() } else { format!("{root}/{below}") };
        let inside = format!("{prefix}/");
        let expected: Vec<_> = model.iter().filter(|(key, _)| key.as_str().starts_with(&inside)).collect();
        for after in std::iter::once(None).chain(model.keys().map(Some)) {
            let wanted = expected.iter().filter(|(key, _)| after.is_none_or(|after| *key > after));
            let wanted: Vec<_> = wanted.map(|(key, size)| ((*key).clone(), **size)).collect();
            for limit in [0, 1, 3, TRICKY.len(), 5000] {
                let found = store.list(&prefix, after, limit).await.expect("a listing");
                let found: Vec<_> = found.into_iter().map(|meta| (meta.key, meta.size)).collect();
                let wanted = &wanted[..wanted.len().min(limit)];
                assert_eq!(found, wanted, "list of {prefix} after {after:?}, at most {limit}");
            }
        }
        let level = store.list_folder(&prefix).await.expect("a listing of a folder");
        let wanted: BTreeSet<_> =
            expected.iter().filter_map(|(key, _)| key.as_str()[inside.len()..].split_once('/')).collect();
        let wanted: BTreeSet<_> = wanted.into_iter().map(|(name, _)| name.to_owned()).collect();
        assert_eq!(level.folders, wanted.into_iter().collect::<Vec<_>>(), "folders of {prefix}");
        let wanted =
            expected.iter().map(|(key, _)| key.as_str()).filter(|key| !key[inside.len()..].contains('/'));
        assert_eq!(keys(&level.objects), wanted.collect::<Vec<_>>(), "objects of {prefix}");
    }
    for key in model.keys() {
        let listed = store.list(root.as_str(), None, 5000).await.expect("a listing");
        let listed =
            listed.into_iter().find(|meta| meta.key == *key).expect("an object that exists is listed");
        assert_eq!(store.head(key).await.expect("head of a listed object").size, listed.size);
        delete(store, key).await;
    }
}

async fn prefixes_are_whole_components(store: &dyn Store, folder: &ObjectKey) {
    let inside = join(folder, "prefix/x");
    let beside = join(folder, "prefix-not/x");
    for key in [&inside, &beside] {
        create(store, key, b"x").await;
    }
    for prefix in [format!("{folder}/prefix"), format!("{folder}/prefix/")] {
        let found = store.list(&prefix, None, 10).await.expect("a listing");
        assert_eq!(keys(&found), [inside.as_str()], "prefix {prefix}");
        let level = store.list_folder(&prefix).await.expect("a listing of a folder");
        assert_eq!(keys(&level.objects), [inside.as_str()], "prefix {prefix}");
    }
    for prefix in ["/", "../x", "a//b"] {
        let error = store.list(prefix, None, 10).await.expect_err("a prefix that is no folder");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let error = store.list_folder(prefix).await.expect_err("a prefix that is no folder");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    for key in [&inside, &beside] {
        delete(store, key).await;
    }
}

async fn deleting_twice_is_success(store: &dyn Store, folder: &ObjectKey) {
    let key = join(folder, "deleted/object");
    create(store, &key, b"x").await;
    delete(store, &key).await;
    delete(store, &key).await;
    assert!(store.get(&key, 1).await.expect_err("get of a deleted object").is_absent());
}

async fn nothing_is_left(store: &dyn Store, folder: &ObjectKey) {
    let left = store.list(folder.as_str(), None, 100).await.expect("a listing");
    assert_eq!(left, [], "objects left after their deletion");
}

fn join(folder: &ObjectKey, name: &str) -> ObjectKey {
    folder.join(name).expect("names of this suite are components of object keys")
}

async fn create(store: &dyn Store, key: &ObjectKey, body: &[u8]) {
    store.create(key, Bytes::copy_from_slice(body)).await.expect("a create of a free key");
}

async fn get(store: &dyn Store, key: &ObjectKey) -> Bytes {
    store.get(key, u64::MAX).await.expect("a get of an object that exists")
}

async fn delete(store: &dyn Store, key: &ObjectKey) {
    store.delete(key).await.expect("a delete");
}

fn keys(objects: &[ObjectMeta]) -> Vec<&str> {
    objects.iter().map(|meta| meta.key.as_str()).collect()
}
