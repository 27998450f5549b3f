//! Counting what goes to a store and what comes back, at the edge.
//!
//! [`Counted`] stands directly on a store, below the retries, so its figures are what the store is asked
//! and would bill: every attempt counts, and a listing counts once for each thousand keys, as S3 pages
//! them. The figures of `walden demo` and of the benches are these.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use serde::Serialize;

use super::error::{Error, Verb};
use super::key::ObjectKey;
use super::store::{Folder, ObjectMeta, Store};

/// Keys a store returns for one request of a listing.
pub const KEYS_PER_REQUEST: usize = 1000;

/// Running totals, shared between the stores that add to them and whoever reads them.
#[derive(Debug, Default)]
pub struct Traffic {
    requests: [AtomicU64; Verb::ALL.len()],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// The totals at one moment, or between two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct TrafficSnapshot {
    /// Objects created, and attempts to.
    pub create_requests: u64,
    /// Whole objects read.
    pub get_requests: u64,
    /// Ranges read.
    pub get_range_requests: u64,
    /// Objects looked up.
    pub head_requests: u64,
    /// Pages listed, of trees and of folders.
    pub list_requests: u64,
    /// Objects deleted.
    pub delete_requests: u64,
    /// Bytes of objects received; keys and sizes in listings are not counted.
    pub bytes_read: u64,
    /// Bytes of objects stored; a refused or failed create counts as a request only.
    pub bytes_written: u64,
}

impl Traffic {
    /// Reads the totals.
    pub fn snapshot(&self) -> TrafficSnapshot {
        let requests = |verb: Verb| self.requests[index(verb)].load(Ordering::Relaxed);
        TrafficSnapshot {
            create_requests: requests(Verb::Create),
            get_requests: requests(Verb::Get),
            get_range_requests: requests(Verb::GetRange),
            head_requests: requests(Verb::Head),
            list_requests: requests(Verb::List) + requests(Verb::ListFolder),
            delete_requests: requests(Verb::Delete),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
        }
    }

    fn requested(&self, verb: Verb, requests: u64) {
        self.requests[index(verb)].fetch_add(requests, Ordering::Relaxed);
    }

    fn read(&self, body: &Bytes) {
        self.bytes_read.fetch_add(body.len() as u64, Ordering::Relaxed);
    }
}

impl TrafficSnapshot {
    /// Returns the number of all requests.
    pub fn requests(&self) -> u64 {
        self.read_requests() + self.create_requests + self.delete_requests
    }

    /// Returns the number of requests that change nothing.
    pub fn read_requests(&self) -> u64 {
        self.get_requests + self.get_range_requests + self.head_requests + self.list_requests
    }

    /// Returns what was added since `earlier`, a snapshot of the same totals.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            create_requests: self.create_requests - earlier.create_requests,
            get_requests: self.get_requests - earlier.get_requests,
            get_range_requests: self.get_range_requests - earlier.get_range_requests,
            head_requests: self.head_requests - earlier.head_requests,
            list_requests: self.list_requests - earlier.list_requests,
            delete_requests: self.delete_requests - earlier.delete_requests,
            bytes_read: self.bytes_read - earlier.bytes_read,
            bytes_written: self.bytes_written - earlier.bytes_written,
        }
    }
}

fn index(verb: Verb) -> usize {
    Verb::ALL.iter().position(|&other| other == verb).expect("ALL holds every verb")
}

/// A store whose traffic is counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
    traffic: Arc<Traffic>,
}

impl<S> Counted<S> {
    /// Adds what goes to and from `inner` to `traffic`.
    pub fn new(inner: S, traffic: Arc<Traffic>) -> Self {
        Self { inner, traffic }
    }
}

#[async_trait]
impl<S: Store> Store for Counted<S> {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let size = body.len() as u64;
        self.traffic.requested(Verb::Create, 1);
        self.inner.create(key, body).await?;
        self.traffic.bytes_written.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        self.traffic.requested(Verb::Get, 1);
        let body = self.inner.get(key, size_max).await?;
        self.traffic.read(&body);
        Ok(body)
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        self.traffic.requested(Verb::GetRange, 1);
        let body = self.inner.get_range(key, range).await?;
        self.traffic.read(&body);
        Ok(body)
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        self.traffic.requested(Verb::Head, 1);
        self.inner.head(key).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let outcome = self.inner.list(prefix, after, limit).await;
        self.traffic.requested(Verb::List, pages(outcome.as_ref().map_or(0, Vec::len)));
        outcome
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        let outcome = self.inner.list_folder(prefix).await;
        let entries = outcome.as_ref().map_or(0, |folder| folder.folders.len() + folder.objects.len());
        self.traffic.requested(Verb::ListFolder, pages(entries));
        outcome
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        self.traffic.requested(Verb::Delete, 1);
        self.inner.delete(key).await
    }
}

fn pages(entries: usize) -> u64 {
    entries.div_ceil(KEYS_PER_REQUEST).max(1) as u64
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::super::memory::MemoryStore;
    use super::*;

    #[tokio::test]
    async fn keeps_the_contract() {
        let store = Counted::new(MemoryStore::new(), Arc::default());
        conformance::check(Arc::new(store), "conformance").await;
    }

    #[tokio::test]
    async fn counts_requests_by_verb_and_bytes_that_arrived() {
        let traffic = Arc::new(Traffic::default());
        let store = Counted::new(MemoryStore::new(), Arc::clone(&traffic));
        let key = ObjectKey::parse("a/b").unwrap();
        store.create(&key, Bytes::from_static(b"0123456789")).await.unwrap();
        store.create(&key, Bytes::from_static(b"0123456789")).await.unwrap_err();
        let created = traffic.snapshot();
        store.get(&key, 10).await.unwrap();
        store.get_range(&key, 2..5).await.unwrap();
        store.get_range(&key, 2..50).await.unwrap_err();
        store.head(&key).await.unwrap();
        store.list("", None, 10).await.unwrap();
        store.list_folder("a").await.unwrap();
        store.delete(&key).await.unwrap();
        assert_eq!((created.create_requests, created.bytes_written, created.requests()), (2, 10, 2));
        let read = traffic.snapshot().since(&created);
        let expected = TrafficSnapshot {
            get_requests: 1,
            get_range_requests: 2,
            head_requests: 1,
            list_requests: 2,
            delete_requests: 1,
            bytes_read: 13,
            ..TrafficSnapshot::default()
        };
        assert_eq!(read, expected);
        assert_eq!((read.requests(), read.read_requests()), (7, 6));
    }

    #[test]
    fn a_listing_costs_a_request_for_each_thousand_keys() {
        assert_eq!([0, 1, 1000, 1001, 66_000].map(pages), [1, 1, 1, 2, 66]);
    }
}
