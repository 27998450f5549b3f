//! What a repository keeps of a month: retention by count, as a sweep will do it, and what reading the newest costs.
//!
//! Nothing of Walden deletes yet. `keep` does what a sweep ends with: the documents of what is too old go, and every pack
//! that no kept basebackup lists in its `refs`. Nobody else uses the repository meanwhile, so that none of the steps that
//! protect a sweep from others is here.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use walden::catalog::basebackups;
use walden::clock::SystemClock;
use walden::codec::SystemRandom;
use walden::config::{Config, Environment, KeyPurpose};
use walden::repo::entry::{Entry, Node};
use walden::repo::{self, Basebackup, FileReader, Keyring, Repository, RepositoryOptions};
use walden::storage::{ObjectKey, ObjectMeta, Traffic};

const LIST_PAGE: usize = 1000;
/// What each volume of a mount has for decoded chunks.
const SCAN_CACHE_BYTES: usize = 16 << 20;
/// What is asked for at a time.
const SCAN_READ_BYTES: u64 = 1 << 20;

/// The repository of a month.
pub struct Month {
    repository: Repository,
    traffic: Arc<Traffic>,
}

impl Month {
    /// Opens the only site of a configuration.
    pub async fn open(configuration: &Path) -> anyhow::Result<Self> {
        let environment = Environment::of_process();
        let config = Config::load(Some(configuration), &environment)?;
        let site = config.site(None)?;
        let encryption = config.encryption.as_ref().context("the benches encrypt")?;
        let keyring = Keyring::new(encryption.keyring_options(KeyPurpose::Read, Arc::new(SystemRandom))?);
        let (clock, traffic) = (Arc::new(SystemClock), Arc::new(Traffic::default()));
        let store = site.storage.open(&environment, traffic.clone(), clock.clone(), Duration::MAX)?;
        let options = RepositoryOptions { store, site: site.prefix.clone(), keyring, clock };
        Ok(Self { repository: Repository::open(options).await?, traffic })
    }

    /// Removes all but the newest basebackups, and says what is left.
    pub async fn keep(&self, count: usize) -> anyhow::Result<Value> {
        let (store, layout) = (self.repository.store(), self.repository.layout());
        let listed = basebackups::list(&self.repository).await?;
        if let Some((id, error)) = listed.unreadable.first() {
            bail!("basebackup {id} cannot be read: {error}");
        }
        let newest = &listed.complete.last().context("there is no basebackup")?.record;
        let (old, kept) = listed.complete.split_at(listed.complete.len().saturating_sub(count));
        let mut named = BTreeSet::new();
        for basebackup in kept {
            let refs = repo::read_refs(&self.repository, &basebackup.record).await?;
            named.extend(refs.records().iter().map(|record| layout.pack(record.id, &record.salt)));
            let id = basebackup.record.id;
            named.extend([layout.begin(id), layout.outcome(id), layout.manifest(id), layout.refs(id)]);
        }
        let (mut stored, mut removed) = (0, 0);
        for object in self.list(&layout.basebackups()).await? {
            if named.remove(&object.key) {
                stored += object.size;
            } else {
                store.delete(&object.key).await?;
                removed += object.size;
            }
        }
        if let Some(missing) = named.first() {
            bail!("{missing} is named and is not there");
        }
        Ok(json!({
            "kept": kept.len(),
            "expired": old.len(),
            "stored_bytes": stored,
            "removed_bytes": removed,
            "live_bytes": newest.size.live_bytes,
            "database_bytes": newest.size.database_bytes,
            "newest_stored_bytes": newest.size.stored_bytes,
        }))
    }

    /// Reads every relation of a basebackup from its first byte to its last, and says what the store was asked for.
    pub async fn scan(&self, name: &str) -> anyhow::Result<Value> {
        let id = basebackups::list(&self.repository).await?.resolve(name)?.record.id;
        let basebackup = Arc::new(Basebackup::open(&self.repository, id).await?);
        let mut relations: Vec<Entry> = Vec::new();
        basebackup
            .visit_entries(|_, entry| {
                if is_relation(entry) {
                    relations.push(entry.clone());
                }
                Ok::<_, repo::Error>(())
            })
            .await?;
        let reader = FileReader::new(basebackup, SCAN_CACHE_BYTES);
        let before = self.traffic.snapshot();
        let mut scanned = 0;
        for entry in &relations {
            let mut offset = 0;
            while offset < entry.size() {
                let bytes = reader.read(entry, offset..offset + SCAN_READ_BYTES).await?;
                offset += bytes.len() as u64;
            }
            scanned += offset;
        }
        let read = self.traffic.snapshot().since(&before);
        Ok(json!({
            "basebackup": id.to_string(),
            "scanned_bytes": scanned,
            "fetched_bytes": read.bytes_read,
            "requests": read.requests(),
        }))
    }

    async fn list(&self, prefix: &str) -> anyhow::Result<Vec<ObjectMeta>> {
        let mut objects: Vec<ObjectMeta> = Vec::new();
        loop {
            let after: Option<ObjectKey> = objects.last().map(|object| object.key.clone());
            let page = self.repository.store().list(prefix, after.as_ref(), LIST_PAGE).await?;
            let more = page.len() == LIST_PAGE;
            objects.extend(page);
            if !more {
                return Ok(objects);
            }
        }
    }
}

fn is_relation(entry: &Entry) -> bool {
    let path = entry.path.as_bytes();
    matches!(entry.node, Node::File { .. })
        && (path.starts_with(b"data/base/") || path.starts_with(b"tablespaces/"))
}
