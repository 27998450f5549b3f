//! A store that remembers every call, for tests that hold code to a number of requests or an order of them.
//!
//! Unlike `traffic` it keeps each call with its key, so it grows with them: it is for tests only.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;

use super::error::{Error, ErrorKind, Verb};
use super::key::ObjectKey;
use super::store::{Folder, ObjectMeta, Store};

/// One call and how it ended, in the order in which calls ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// What was asked.
    pub verb: Verb,
    /// The object, or the prefix of a listing.
    pub key: String,
    /// The range asked for, of `get_range`.
    pub range: Option<Range<u64>>,
    /// Bytes of object content that went or came.
    pub bytes: u64,
    /// How it failed, if it did.
    pub failure: Option<ErrorKind>,
}

/// A store whose calls are remembered; its clones share the memory.
#[derive(Debug, Clone)]
pub struct Recording<S> {
    inner: S,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl<S> Recording<S> {
    /// Remembers the calls that go to `inner`.
    pub fn new(inner: S) -> Self {
        Self { inner, calls: Arc::default() }
    }

    /// Returns the calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().clone()
    }

    /// Returns the calls so far and forgets them.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *self.lock())
    }

    /// Counts the calls of one verb.
    pub fn count(&self, verb: Verb) -> usize {
        self.lock().iter().filter(|call| call.verb == verb).count()
    }

    /// Returns the store below.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Call>> {
        self.calls.lock().expect("no holder of this lock panics")
    }

    fn note<T>(
        &self,
        verb: Verb,
        key: &str,
        range: Option<Range<u64>>,
        outcome: Result<T, Error>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Result<T, Error> {
        let failure = outcome.as_ref().err().map(Error::kind);
        let bytes = outcome.as_ref().map_or(0, bytes) as u64;
        self.lock().push(Call { verb, key: key.to_owned(), range, bytes, failure });
        outcome
    }
}

#[async_trait]
impl<S: Store> Store for Recording<S> {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let size = body.len();
        let outcome = self.inner.create(key, body).await;
        self.note(Verb::Create, key.as_str(), None, outcome, |()| size)
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        let outcome = self.inner.get(key, size_max).await;
        self.note(Verb::Get, key.as_str(), None, outcome, Bytes::len)
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        let outcome = self.inner.get_range(key, range.clone()).await;
        self.note(Verb::GetRange, key.as_str(), Some(range), outcome, Bytes::len)
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        let outcome = self.inner.head(key).await;
        self.note(Verb::Head, key.as_str(), None, outcome, |_| 0)
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let outcome = self.inner.list(prefix, after, limit).await;
        self.note(Verb::List, prefix, None, outcome, |_| 0)
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        let outcome = self.inner.list_folder(prefix).await;
        self.note(Verb::ListFolder, prefix, None, outcome, |_| 0)
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        let outcome = self.inner.delete(key).await;
        self.note(Verb::Delete, key.as_str(), None, outcome, |()| 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::super::memory::MemoryStore;
    use super::*;

    #[tokio::test]
    async fn keeps_the_contract() {
        conformance::check(Arc::new(Recording::new(MemoryStore::new())), "conformance").await;
    }

    #[tokio::test]
    async fn remembers_verb_key_range_bytes_and_failure() {
        let store = Recording::new(MemoryStore::new());
        let key = ObjectKey::parse("a/b").unwrap();
        store.create(&key, Bytes::from_static(b"0123456789")).await.unwrap();
        store.get_range(&key, 2..5).await.unwrap();
        store.get(&key, 9).await.unwrap_err();
        store.list_folder("a").await.unwrap();
        let call =
            |verb, key: &str, range, bytes, failure| Call { verb, key: key.into(), range, bytes, failure };
        let expected = [
            call(Verb::Create, "a/b", None, 10, None),
            call(Verb::GetRange, "a/b", Some(2..5), 3, None),
            call(Verb::Get, "a/b", None, 0, Some(ErrorKind::TooLarge)),
            call(Verb::ListFolder, "a", None, 0, None),
        ];
        assert_eq!(store.count(Verb::GetRange), 1);
        assert_eq!(store.take_calls(), expected);
        assert!(store.calls().is_empty());
    }
}
