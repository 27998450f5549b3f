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

use crate::catalog::wal_reader::{Found, Patience, WalReader, patiently};
use crate::clock::Clock;
use crate::disk::Owner;
use crate::mount::basebackup_dir::{BasebackupsDir, behind, waiting};
use crate::mount::caller::Caller;
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
/// Decoded WAL that is kept for each cluster: some segments, because copies read in small steps, and eight on their way
/// hide a round trip to a far store.
const WAL_CACHE_BYTES_MAX: usize = 144 << 20;

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
            None => self
                .clusters
                .repository
                .clusters()
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
        let listed = waiting(&*self.clock, CLUSTERS, || self.repository.clusters()).await?;
        Ok(listed.unwrap_or_default())
    }
}

#[async_trait::async_trait]
impl DynamicDir for Root {
    async fn lookup(&self, _: &Caller, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
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
    async fn lookup(&self, _: &Caller, name: &[u8]) -> Result<Option<FoundItem>, LowerError> {
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

#[cfg(test)]
mod tests {
    use crate::clock::ManualClock;
    use crate::codec::Compression;
    use crate::mount::caller::Caller;
    use crate::mount::errno::Errno;
    use crate::mount::tree::Ino;
    use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
    use crate::repo::manifest::{OutsideLink, Tablespace};
    use crate::repo::{BasebackupId, testing};
    use crate::storage::{Fault, Faulty, MemoryStore, Recording, Rule, Verb};

    use super::*;

    type TestStore = Recording<Faulty<Arc<MemoryStore>>>;

    struct Site {
        store: Arc<TestStore>,
        clock: ManualClock,
        repository: Repository,
    }

    impl Site {
        async fn new() -> Self {
            let store: Arc<TestStore> = Arc::new(Recording::new(Faulty::new(Arc::default())));
            let clock = testing::clock();
            Self { repository: testing::site(store.clone(), clock.clone()).await, store, clock }
        }

        async fn back_up(&self) -> BasebackupId {
            self.clock.advance(Duration::from_secs(3600));
            let options = BuilderOptions {
                time: self.clock.now(),
                compression: Compression::zstd(1),
                ..testing::basebackup()
            };
            let mut builder = BasebackupBuilder::begin(&self.repository, options, None).await.unwrap();
            for directory in ["data", "data/base", "data/pg_tblspc", "tablespaces", "tablespaces/16400"] {
                builder.directory(directory);
            }
            let path = crate::repo::entry::TreePath::new("data/log").unwrap();
            builder.outside_link(OutsideLink { path, target: b"/var/log/postgresql".to_vec() });
            let (location, name) = (b"/srv/fast".to_vec(), "fast".to_owned());
            builder.tablespace(Tablespace { oid: 16400, location, name });
            let (location, name) = (Vec::new(), "here".to_owned());
            builder.tablespace(Tablespace { oid: 16401, location, name });
            builder.file("data/base/1", &[7; 100_000]).await.unwrap();
            builder.file("data/PG_VERSION", b"15\n").await.unwrap();
            builder.file("data/tablespace_map", b"16400 /srv/fast\n").await.unwrap();
            builder.file("tablespaces/16400/1", &[9; 9000]).await.unwrap();
            builder.finish().await.unwrap().id
        }

        async fn tree(&self) -> (SiteTree, Arc<Tree>) {
            let clock = Arc::new(self.clock.clone());
            let site = SiteTree::open(self.repository.clone(), clock, Owner::current()).await.unwrap();
            let tree = site.tree();
            (site, tree)
        }

        fn count(&self, part: &str) -> usize {
            self.store.calls().iter().filter(|call| call.key.contains(part)).count()
        }
    }

    async fn walk(tree: &Tree, path: &str) -> Result<Ino, Errno> {
        let mut at = Ino::ROOT;
        for name in path.split('/') {
            at = tree.lookup(&Caller::internal(), at, name.as_bytes()).await?.id;
        }
        Ok(at)
    }

    async fn names(tree: &Tree, path: &str) -> Vec<String> {
        let ino = if path.is_empty() { Ino::ROOT } else { walk(tree, path).await.unwrap() };
        let handle = tree.open_directory(ino).await.unwrap();
        let mut names = Vec::new();
        let take = |_, entry: &crate::mount::fs::ListEntry<Ino>| {
            names.push(String::from_utf8(entry.name.clone()).unwrap());
            true
        };
        tree.directory(handle).unwrap().read(&Caller::internal(), 0, take).await.unwrap();
        names.retain(|name| !name.starts_with('.'));
        names.sort();
        names
    }

    async fn read(tree: &Tree, path: &str) -> Result<Vec<u8>, Errno> {
        let ino = walk(tree, path).await?;
        let (handle, _) = tree.open(&Caller::internal(), ino, false).await?;
        let file = tree.file(handle)?;
        Ok(file.read(&Caller::internal(), 0, 1 << 20).await?.to_vec())
    }

    async fn link(tree: &Tree, path: &str) -> String {
        let ino = walk(tree, path).await.unwrap();
        String::from_utf8(tree.read_link(&Caller::internal(), ino).await.unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_basebackup_is_shown_whole_and_no_link_leaves_it() {
        let site = Site::new().await;
        let id = site.back_up().await;
        let (_open, tree) = site.tree().await;
        assert_eq!(names(&tree, "").await, [BASEBACKUPS, CLUSTERS, WAL]);
        assert_eq!(names(&tree, "basebackups").await, [id.to_string(), "latest".to_owned()]);
        assert_eq!(link(&tree, "basebackups/latest").await, id.to_string());
        let top = format!("basebackups/{id}");
        assert_eq!(names(&tree, &top).await, ["backup.json", "data", "links.txt", "tablespaces", "wal"]);
        assert_eq!(names(&tree, &format!("{top}/data")).await, ["PG_VERSION", "base", "pg_tblspc"]);
        assert_eq!(walk(&tree, &format!("{top}/data/tablespace_map")).await, Err(Errno::ENOENT));
        assert_eq!(names(&tree, &format!("{top}/data/pg_tblspc")).await, ["16400"]);
        assert_eq!(link(&tree, &format!("{top}/data/pg_tblspc/16400")).await, "../../tablespaces/16400");
        assert_eq!(link(&tree, &format!("{top}/wal")).await, "../../clusters/7301234567890123456-16/wal");
        assert_eq!(
            read(&tree, &format!("{top}/links.txt")).await.unwrap(),
            b"data/log -> /var/log/postgresql\n"
        );
        assert_eq!(read(&tree, &format!("{top}/data/base/1")).await.unwrap(), [7; 100_000]);
        assert_eq!(read(&tree, &format!("{top}/tablespaces/16400/1")).await.unwrap(), [9; 9000]);
        let record = read(&tree, &format!("{top}/backup.json")).await.unwrap();
        let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
        assert_eq!(record["id"], id.to_string());
    }

    #[tokio::test]
    async fn listing_again_costs_one_request_and_what_is_new_appears() {
        let site = Site::new().await;
        for _ in 0..20 {
            site.back_up().await;
        }
        let (_open, tree) = site.tree().await;
        site.store.take_calls();
        assert_eq!(names(&tree, "basebackups").await.len(), 21);
        assert_eq!(site.store.take_calls().len(), 1);
        let new = site.back_up().await;
        assert_eq!(link(&tree, "basebackups/latest").await, new.to_string());
        // A name is looked up without any listing, and a mark of retention is seen after a while.
        site.store.take_calls();
        walk(&tree, &format!("basebackups/{new}")).await.unwrap();
        assert_eq!(site.store.count(Verb::ListFolder) + site.store.count(Verb::List), 0);
        site.repository.store().create(&site.repository.layout().expired(new), "x".into()).await.unwrap();
        site.clock.advance(RECHECK);
        assert!(!names(&tree, "basebackups").await.contains(&new.to_string()));
        assert_eq!(walk(&tree, &format!("basebackups/{new}")).await, Err(Errno::ENOENT));
    }

    /// Longer than anything is remembered without being looked at again.
    const RECHECK: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn what_is_read_is_leased_until_the_mount_ends() {
        let site = Site::new().await;
        let mut ids = Vec::new();
        for _ in 0..6 {
            ids.push(site.back_up().await);
        }
        let (open, tree) = site.tree().await;
        names(&tree, "basebackups").await;
        assert_eq!(site.count("/leases/"), 0, "looking is not reading");
        // More than are kept open at once, and the first again.
        for id in ids.iter().chain(&ids[..1]) {
            let path = format!("basebackups/{id}/data/base/1");
            assert_eq!(read(&tree, &path).await.unwrap().len(), 100_000);
        }
        assert_eq!(site.count("/leases/"), ids.len());
        open.end_leases().await;
        assert_eq!(site.count("/end"), ids.len());
    }

    #[tokio::test]
    async fn a_store_that_refuses_writes_is_read_all_the_same() {
        let site = Site::new().await;
        let id = site.back_up().await;
        let denied = Fault::Before(crate::storage::ErrorKind::Denied);
        site.store.inner().inject(Rule::on(Verb::Create, denied));
        let (_open, tree) = site.tree().await;
        assert_eq!(read(&tree, &format!("basebackups/{id}/data/PG_VERSION")).await.unwrap(), b"15\n");
    }

    /// Failure 22: a damaged object is an error, for the files in it and for those alone.
    #[tokio::test]
    async fn a_damaged_pack_is_an_input_output_error() {
        let site = Site::new().await;
        let id = site.back_up().await;
        let packs = site.repository.layout().packs(id);
        for object in site.repository.store().list(&packs, None, 10).await.unwrap() {
            site.store.inner().inner().tamper(&object.key, |bytes| {
                let mut bytes = bytes.unwrap().to_vec();
                bytes.iter_mut().skip(100).for_each(|byte| *byte ^= 1);
                Some(bytes.into())
            });
        }
        let (_open, tree) = site.tree().await;
        assert_eq!(read(&tree, &format!("basebackups/{id}/data/base/1")).await, Err(Errno::EIO));
        assert_eq!(read(&tree, &format!("basebackups/{id}/data/PG_VERSION")).await.unwrap(), b"15\n");
    }
}
