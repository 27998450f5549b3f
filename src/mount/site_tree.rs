//! A whole site as a directory: `basebackups`, `clusters`, and `wal` for the cluster that is current.
//!
//! ```text
//! basebackups/<id>/{data,tablespaces,config,backup.json,links.txt,wal}    basebackups/latest
//! clusters/<c>/wal                                                        wal
//! ```
//! Look-ups by name list nothing. What appears in the repository appears here without a remount. Which cluster
//! `wal` stands for was decided when the mount was made and is looked at again now and then; a store that is away
//! never changes it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::catalog::list_clusters;
use crate::catalog::wal_reader::{Found, Patience, WalReader, patiently};
use crate::clock::Clock;
use crate::disk::Owner;
use crate::mount::basebackup_dir::{BasebackupsDir, behind, waiting};
use crate::mount::fs::{FileKind, Lifetime};
use crate::mount::inventory::Inventory;
use crate::mount::lower::LowerError;
use crate::mount::open_basebackups::OpenBasebackups;
use crate::mount::repo_lower::lower_error;
use crate::mount::tree::Tree;
use crate::mount::virtual_dir::{DynamicDir, Found as FoundItem, Item, StaticDir};
use crate::mount::wal_dir::WalDir;
use crate::repo::{self, ClusterId, Repository};

/// A site that can be mounted.
#[derive(Debug)]
pub struct SiteTree {
    root: Arc<Root>,
    open: Arc<OpenBasebackups>,
    owner: Owner,
}

/// `DIR` itself.
#[derive(Debug)]
struct Root {
    basebackups: Arc<BasebackupsDir>,
    clusters: Arc<ClustersDir>,
    inventory: Arc<Inventory>,
    clock: Arc<dyn Clock>,
    current: Mutex<Option<(ClusterId, Instant)>>,
}

/// `DIR/clusters`.
#[derive(Debug)]
struct ClustersDir {
    repository: Repository,
    clock: Arc<dyn Clock>,
    wal: Mutex<HashMap<ClusterId, Arc<WalDir>>>,
}

/// How often it is looked whether another cluster is the current one.
const CURRENT_FOR: Duration = Duration::from_secs(60);
/// Decoded WAL that is kept for each cluster: some segments, because copies read in small steps.
const WAL_CACHE_BYTES_MAX: usize = 64 << 20;

const BASEBACKUPS: &str = "basebackups";
const CLUSTERS: &str = "clusters";
const WAL: &str = "wal";

impl SiteTree {
    /// Prepares a site for mounting; everything in it belongs to `owner`.
    ///
    /// # Errors
    /// Where the store does not answer now: a mount that begins so could not tell what it stands for.
    pub async fn open(
        repository: Repository,
        clock: Arc<dyn Clock>,
        owner: Owner,
    ) -> Result<Self, repo::Error> {
        let inventory = Arc::new(Inventory::new(repository.clone(), clock.clone()));
        let open = Arc::new(OpenBasebackups::new(repository.clone()));
        let basebackups =
            Arc::new(BasebackupsDir::new(inventory.clone(), open.clone(), clock.clone(), owner));
        let clusters = Arc::new(ClustersDir { repository, clock: clock.clone(), wal: Mutex::default() });
        let root = Root { basebackups, clusters, inventory, clock, current: Mutex::default() };
        root.look_for_current().await?;
        Ok(Self { root: Arc::new(root), open, owner })
    }

    /// Returns the tree to mount.
    pub fn tree(&self) -> Arc<Tree> {
        Tree::new(Item::Directory(self.root.clone()), self.owner)
    }

    /// Keeps what is read here from being deleted, for as long as it is polled.
    pub async fn keep_leases(&self) {
        self.open.keep_leases().await;
    }

    /// Tells retention that nothing is read here any more.
    pub async fn end_leases(&self) {
        self.open.end_leases().await;
    }
}

impl Root {
    /// Returns the cluster of the newest basebackup, or of the newest initdb where there is none.
    async fn look_for_current(&self) -> Result<Option<ClusterId>, repo::Error> {
        let newest = match self.inventory.newest().await {
            Ok(newest) => newest,
            // One damaged record must not take the WAL away.
            Err(error) if error.kind() == repo::ErrorKind::Damaged => {
                tracing::error!("{error}");
                None
            }
            Err(error) => return Err(error),
        };
        let cluster = match newest {
            Some(listed) => Some(listed.record.cluster),
            // A system identifier begins with the time of initdb.
            None => list_clusters(&self.clusters.repository)
                .await?
                .into_iter()
                .max_by_key(|cluster| cluster.system_identifier),
        };
        if let Some(cluster) = cluster {
            let now = self.clock.monotonic();
            *self.current.lock().expect("no holder of this lock panics") = Some((cluster, now));
        }
        Ok(cluster)
    }

    async fn current(&self) -> Result<Option<ClusterId>, LowerError> {
        let now = self.clock.monotonic();
        let known = *self.current.lock().expect("no holder of this lock panics");
        match known {
            Some((cluster, at)) if now.saturating_duration_since(at) < CURRENT_FOR => Ok(Some(cluster)),
            Some((cluster, _)) => match self.look_for_current().await {
                Ok(found) => Ok(found.or(Some(cluster))),
                Err(error) => {
                    tracing::warn!("{error}");
                    Ok(Some(cluster))
                }
            },
            None => {
                let look = || self.look_for_current();
                match patiently(&*self.clock, Patience::Forever, WAL, look).await {
                    Ok(Found::Present(found)) => Ok(found),
                    Ok(Found::Absent) => Ok(None),
                    Ok(Found::Unreadable(error)) | Err(error) => Err(lower_error(&error)),
                }
            }
        }
    }
}

impl ClustersDir {
    fn wal(&self, cluster: ClusterId) -> Arc<WalDir> {
        let make = || {
            let (repository, clock) = (self.repository.clone(), self.clock.clone());
            let reader = WalReader::new(repository, cluster, clock, WAL_CACHE_BYTES_MAX);
            Arc::new(WalDir::new(Arc::new(reader), None))
        };
        let mut all = self.wal.lock().expect("no holder of this lock panics");
        all.entry(cluster).or_insert_with(make).clone()
    }

    async fn clusters(&self) -> Result<Vec<ClusterId>, LowerError> {
        let listed = waiting(&*self.clock, CLUSTERS, || list_clusters(&self.repository)).await?;
        Ok(listed.unwrap_or_default())
    }
}

#[async_trait::async_trait]
impl DynamicDir for Root {
    async fn lookup(&self, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let (item, lifetime) = match std::str::from_utf8(name).unwrap_or_default() {
            BASEBACKUPS => (Item::Directory(self.basebackups.clone()), Lifetime::Forever),
            CLUSTERS => (Item::Directory(self.clusters.clone()), Lifetime::Forever),
            WAL => match self.current().await? {
                Some(cluster) => (Item::Directory(self.clusters.wal(cluster)), Lifetime::Once),
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        Ok(Some(FoundItem { item, lifetime }))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        let mut names = vec![BASEBACKUPS, CLUSTERS];
        if self.current().await?.is_some() {
            names.push(WAL);
        }
        let names = names.into_iter().map(|name| (name.into(), FileKind::Directory)).collect();
        Ok(behind(names, after, limit))
    }
}

#[async_trait::async_trait]
impl DynamicDir for ClustersDir {
    async fn lookup(&self, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
        let Some(cluster) = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()) else {
            return Ok(None);
        };
        if !self.clusters().await?.contains(&cluster) {
            return Ok(None);
        }
        let wal = Item::Directory(self.wal(cluster));
        let item = Item::Directory(Arc::new(StaticDir::new(Timestamp::UNIX_EPOCH).with(WAL, wal)));
        Ok(Some(FoundItem { item, lifetime: Lifetime::Forever }))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        let clusters = self.clusters().await?;
        let mut names: Vec<_> =
            clusters.iter().map(|cluster| (cluster.to_string().into_bytes(), FileKind::Directory)).collect();
        names.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(behind(names, after, limit))
    }
}
