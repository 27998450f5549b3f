//! A store in memory, for tests and for `memory://`.
//!
//! It keeps the whole contract but durability. It is also the strictest store: a key that would make an
//! object of a folder, or a folder of an object, is refused, so that code which runs here runs on a file
//! system too.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use crate::clock::{Clock, SystemClock};

use super::error::Error;
use super::key::ObjectKey;
use super::store::{FOLDER_ENTRIES_MAX, Folder, ObjectMeta, Store, folder_prefix, range_length};

/// Keeps objects in memory; its clones share them.
#[derive(Debug, Clone)]
pub struct MemoryStore {
    clock: Arc<dyn Clock>,
    objects: Arc<Mutex<BTreeMap<ObjectKey, Object>>>,
}

#[derive(Debug, Clone)]
struct Object {
    body: Bytes,
    last_modified: Timestamp,
}

impl MemoryStore {
    /// Creates an empty store on the machine's clock.
    pub fn new() -> Self {
        Self::with_clock(Arc::new(SystemClock))
    }

    /// Creates an empty store whose objects are dated by `clock`.
    pub fn with_clock(clock: Arc<dyn Clock>) -> Self {
        Self { clock, objects: Arc::default() }
    }

    /// Replaces or removes an object behind the contract's back, as damage does; for tests.
    pub fn tamper(&self, key: &ObjectKey, damage: impl FnOnce(Option<Bytes>) -> Option<Bytes>) {
        let mut objects = self.lock();
        let before = objects.remove(key);
        let last_modified = before.as_ref().map_or_else(|| self.clock.now(), |object| object.last_modified);
        if let Some(body) = damage(before.map(|object| object.body)) {
            objects.insert(key.clone(), Object { body, last_modified });
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<ObjectKey, Object>> {
        self.objects.lock().expect("no holder of this lock panics")
    }

    fn body(&self, key: &ObjectKey) -> Result<Bytes, Error> {
        match self.lock().get(key) {
            Some(object) => Ok(object.body.clone()),
            None => Err(Error::NotFound { key: key.to_string() }),
        }
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let last_modified = self.clock.now();
        let mut objects = self.lock();
        if objects.contains_key(key) {
            return Err(Error::AlreadyExists { key: key.to_string() });
        }
        if let Some(other) = clash(&objects, key) {
            return Err(Error::Invalid {
                key: key.to_string(),
                reason: format!("cannot create {key}: the object {other} stands in its way"),
                source: None,
            });
        }
        objects.insert(key.clone(), Object { body, last_modified });
        Ok(())
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        let body = self.body(key)?;
        let size = body.len() as u64;
        if size > size_max {
            return Err(Error::TooLarge { key: key.to_string(), size, size_max });
        }
        Ok(body)
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        let length = range_length(key, &range)?;
        let body = self.body(key)?;
        let size = body.len() as u64;
        if range.end > size {
            let received = size.saturating_sub(range.start);
            return Err(Error::Truncated { key: key.to_string(), expected: length, received });
        }
        let start = usize::try_from(range.start).expect("not past the end of a body in memory");
        let end = usize::try_from(range.end).expect("not past the end of a body in memory");
        Ok(body.slice(start..end))
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        match self.lock().get(key) {
            Some(object) => Ok(meta(key, object)),
            None => Err(Error::NotFound { key: key.to_string() }),
        }
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let folder = folder_prefix(prefix)?;
        let objects = self.lock();
        let start = match after {
            Some(after) if after.as_str() > folder.as_str() => Bound::Excluded(after.as_str()),
            _ => Bound::Included(folder.as_str()),
        };
        let found = objects.range::<str, _>((start, Bound::Unbounded));
        let found = found.take_while(|(key, _)| key.as_str().starts_with(&folder));
        Ok(found.take(limit).map(|(key, object)| meta(key, object)).collect())
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        let prefix = folder_prefix(prefix)?;
        let objects = self.lock();
        let mut folder = Folder::default();
        for (key, object) in objects.range::<str, _>((Bound::Included(prefix.as_str()), Bound::Unbounded)) {
            let Some(rest) = key.as_str().strip_prefix(&prefix) else { break };
            match rest.split_once('/') {
                None => folder.objects.push(meta(key, object)),
                Some((name, _)) => folder.folders.push(name.to_owned()),
            }
        }
        // Not adjacent yet: of `a-b/x`, `a/x`, the keys sort one way and the names of the folders the
        // other.
        folder.folders.sort_unstable();
        folder.folders.dedup();
        let entries = folder.folders.len() + folder.objects.len();
        if entries > FOLDER_ENTRIES_MAX {
            let size_max = FOLDER_ENTRIES_MAX as u64;
            return Err(Error::TooLarge { key: prefix, size: entries as u64, size_max });
        }
        Ok(folder)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        self.lock().remove(key);
        Ok(())
    }
}

/// Finds an object that is a folder of `key`, or for which `key` would have to be a folder.
fn clash(objects: &BTreeMap<ObjectKey, Object>, key: &ObjectKey) -> Option<ObjectKey> {
    for (end, _) in key.as_str().match_indices('/') {
        let folder =
            ObjectKey::parse(&key.as_str()[..end]).expect("whole leading components of a key are a key");
        if objects.contains_key(&folder) {
            return Some(folder);
        }
    }
    let inside = format!("{key}/");
    let mut below = objects.range::<str, _>((Bound::Included(inside.as_str()), Bound::Unbounded));
    below.next().filter(|(other, _)| other.as_str().starts_with(&inside)).map(|(other, _)| other.clone())
}

fn meta(key: &ObjectKey, object: &Object) -> ObjectMeta {
    ObjectMeta { key: key.clone(), size: object.body.len() as u64, last_modified: object.last_modified }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::super::error::ErrorKind;
    use super::*;

    fn key(text: &str) -> ObjectKey {
        ObjectKey::parse(text).unwrap()
    }

    #[tokio::test]
    async fn keeps_the_contract() {
        conformance::check(Arc::new(MemoryStore::new()), "site/conformance").await;
    }

    #[tokio::test]
    async fn an_object_and_a_folder_cannot_share_a_name() {
        let store = MemoryStore::new();
        for text in ["a/b", "a-b", "c"] {
            store.create(&key(text), Bytes::from_static(b"x")).await.unwrap();
        }
        for text in ["a", "c/d", "a/b/c/d"] {
            let error = store.create(&key(text), Bytes::new()).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        }
        store.create(&key("a-"), Bytes::new()).await.unwrap();
    }

    #[tokio::test]
    async fn tampering_shows() {
        let store = MemoryStore::new();
        store.create(&key("a"), Bytes::from_static(b"abc")).await.unwrap();
        store.tamper(&key("a"), |body| Some(body.unwrap().slice(..2)));
        assert_eq!(store.get(&key("a"), 3).await.unwrap(), "ab");
        store.tamper(&key("a"), |_| None);
        assert!(store.get(&key("a"), 3).await.unwrap_err().is_absent());
    }
}
