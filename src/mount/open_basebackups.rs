//! The basebackups a mount has open: few at a time, each under a lease for as long as the mount lasts.
//!
//! A basebackup is opened when something in it is looked at. Walking over a whole site would otherwise hold every
//! index in memory, so the least recently used is closed again; its lease stays, because the kernel may still show
//! its files. Where the store cannot be written to there is no lease, which is said once.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lru::LruCache;

use crate::mount::repo_lower::ReaderSource;
use crate::repo::lease::{LEASE_RENEWAL_SECONDS, Lease};
use crate::repo::{self, Basebackup, BasebackupId, FileReader, Repository, Transfers};

/// The open basebackups of a mount.
#[derive(Debug)]
pub(crate) struct OpenBasebackups {
    repository: Repository,
    readers: Mutex<LruCache<BasebackupId, Arc<FileReader>>>,
    transfers: Transfers,
    opening: tokio::sync::Mutex<()>,
    leases: tokio::sync::Mutex<HashMap<BasebackupId, Lease>>,
    told_of_no_lease: AtomicBool,
}

/// One of them, opened when it is read.
#[derive(Debug)]
pub(crate) struct OnDemand {
    pub(crate) open: Arc<OpenBasebackups>,
    pub(crate) id: BasebackupId,
}

/// Basebackups open at once; one is what people look at, two is `diff`.
const OPEN_MAX: NonZeroUsize = NonZeroUsize::new(4).expect("4 is not zero");
/// Decoded chunks each of them keeps; pages are cached above, so this is for page maps and small files.
const CACHE_BYTES_MAX: usize = 8 << 20;

impl OpenBasebackups {
    pub(crate) fn new(repository: Repository) -> Self {
        Self {
            repository,
            readers: Mutex::new(LruCache::new(OPEN_MAX)),
            transfers: Transfers::per_core(),
            opening: tokio::sync::Mutex::default(),
            leases: tokio::sync::Mutex::default(),
            told_of_no_lease: AtomicBool::new(false),
        }
    }

    /// Returns the reader of a basebackup, opening it if need be.
    pub(crate) async fn reader(&self, id: BasebackupId) -> Result<Arc<FileReader>, repo::Error> {
        if let Some(reader) = self.opened(id) {
            return Ok(reader);
        }
        let _one_at_a_time = self.opening.lock().await;
        if let Some(reader) = self.opened(id) {
            return Ok(reader);
        }
        self.hold(id).await?;
        let basebackup = Arc::new(Basebackup::open(&self.repository, id).await?);
        let reader = FileReader::new(basebackup, CACHE_BYTES_MAX).sharing(self.transfers.clone());
        let reader = Arc::new(reader);
        self.readers.lock().expect("no holder of this lock panics").put(id, reader.clone());
        Ok(reader)
    }

    /// Takes a lease unless there is one.
    async fn hold(&self, id: BasebackupId) -> Result<(), repo::Error> {
        let mut leases = self.leases.lock().await;
        if leases.contains_key(&id) {
            return Ok(());
        }
        match Lease::create(&self.repository, id).await? {
            Some(lease) => {
                leases.insert(id, lease);
            }
            None if !self.told_of_no_lease.swap(true, Ordering::Relaxed) => {
                tracing::warn!(
                    "the store refuses writes: retention does not know that basebackups are read here"
                );
            }
            None => {}
        }
        Ok(())
    }

    /// Renews the leases for as long as it is polled.
    pub(crate) async fn keep_leases(&self) {
        loop {
            tokio::time::sleep(Duration::from_secs(LEASE_RENEWAL_SECONDS)).await;
            for (id, lease) in &mut *self.leases.lock().await {
                if let Err(error) = lease.renew().await {
                    tracing::warn!("could not renew the lease on basebackup {id}: {error}");
                }
            }
        }
    }

    /// Ends the leases; one that cannot be ended dies by itself.
    pub(crate) async fn end_leases(&self) {
        for (id, lease) in self.leases.lock().await.drain() {
            if let Err(error) = lease.end().await {
                tracing::warn!("could not end the lease on basebackup {id}: {error}");
            }
        }
    }

    fn opened(&self, id: BasebackupId) -> Option<Arc<FileReader>> {
        self.readers.lock().expect("no holder of this lock panics").get(&id).cloned()
    }
}

#[async_trait::async_trait]
impl ReaderSource for OnDemand {
    async fn reader(&self) -> Result<Arc<FileReader>, repo::Error> {
        self.open.reader(self.id).await
    }
}
