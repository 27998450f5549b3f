//! One site of a repository: its store, its layout, its identity and this host's keys.
//!
//! Engines are functions that take a `&Repository`; it knows none of them.

use std::sync::Arc;

use uuid::Uuid;

use crate::clock::Clock;
use crate::codec::{CpuPool, Random, RandomExt};
use crate::pg::TimelineId;
use crate::repo::carried_wal::CarriedIndex;
use crate::repo::documents::SiteRecord;
use crate::repo::error::Error;
use crate::repo::forced_index::ForcedIndex;
use crate::repo::id::{BasebackupId, ClusterId};
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::keyring::Keyring;
use crate::repo::layout::Layout;
use crate::repo::raw_buffers::RawBuffers;
use crate::repo::signed::DOCUMENT_BYTES_MAX;
use crate::storage::{self, ObjectKey, Store};

/// An open site; clones share it.
#[derive(Debug, Clone)]
pub struct Repository {
    shared: Arc<Shared>,
    pool: Option<CpuPool>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    layout: Layout,
    site: Uuid,
    keyring: Keyring,
    clock: Arc<dyn Clock>,
    forced: ForcedIndex,
    carried: CarriedIndex,
    buffers: Arc<RawBuffers>,
}

/// Where a site is and what this host brings to it.
#[derive(Debug)]
pub struct RepositoryOptions {
    /// The store.
    pub store: Arc<dyn Store>,
    /// The folder of the site in the store.
    pub site: ObjectKey,
    /// This host's keys.
    pub keyring: Keyring,
    /// Names basebackups.
    pub clock: Arc<dyn Clock>,
}

/// The format that this release reads and writes.
const FORMAT: u32 = 1;
const SITE_BYTES_MAX: u64 = 64 << 10;

impl Repository {
    /// Opens a site that exists.
    ///
    /// # Errors
    /// An absent `site.json` is an absent object of the store ([`Error::is_absent`]).
    pub async fn open(options: RepositoryOptions) -> Result<Self, Error> {
        let layout = Layout::new(options.site.clone());
        let record = read_site(&*options.store, &layout).await?;
        Ok(Self::assemble(options, layout, record))
    }

    /// Opens a site, creating it where there is none; returns whether it was created.
    pub async fn open_or_create(options: RepositoryOptions) -> Result<(Self, bool), Error> {
        let layout = Layout::new(options.site.clone());
        match read_site(&*options.store, &layout).await {
            Ok(record) => Ok((Self::assemble(options, layout, record), false)),
            Err(error) if error.is_absent() => {
                refuse_orphans(&*options.store, &layout).await?;
                probe(&*options.store, &layout, options.keyring.random()).await?;
                let record = create_site(&*options.store, &layout, options.keyring.random()).await?;
                Ok((Self::assemble(options, layout, record), true))
            }
            Err(error) => Err(error),
        }
    }

    /// Tries whether the store keeps what everything rests on: create-only puts, and reads that see them (failure 42).
    pub async fn check_store(&self) -> Result<(), Error> {
        probe(self.store(), self.layout(), self.keyring().random()).await
    }

    /// Returns whether retention has marked a basebackup.
    ///
    /// By a whole read: the mark is nearly always absent, and of what is absent a HEAD on S3 does not say whether it
    /// is the object or the bucket that is not there, so that it takes a second request.
    pub async fn is_expired(&self, id: BasebackupId) -> Result<bool, Error> {
        match self.store().get(&self.layout().expired(id), DOCUMENT_BYTES_MAX).await {
            Ok(_) | Err(storage::Error::TooLarge { .. }) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the same repository, which opens whole objects on the threads of `pool`: for a process that reads many at
    /// once, and does something else meanwhile.
    pub fn with_cpu_pool(self, pool: CpuPool) -> Self {
        Self { pool: Some(pool), ..self }
    }

    /// Runs what takes a processor for milliseconds: on the pool, or here where there is none.
    pub(crate) async fn compute<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        match &self.pool {
            Some(pool) => pool.run(job).await?,
            None => job(),
        }
    }

    /// Checks that the site is still there and the same one: in a site that is gone everything is absent.
    ///
    /// # Errors
    /// [`Error::is_absent`] where it has gone.
    pub async fn confirm(&self) -> Result<(), Error> {
        let found = read_site(self.store(), self.layout()).await?.site;
        if found == self.site() {
            return Ok(());
        }
        Err(Error::damaged(self.layout().site(), format!("it is site {found} now, and was {}", self.site())))
    }

    /// Returns the store.
    pub fn store(&self) -> &dyn Store {
        &*self.shared.store
    }

    /// Returns where objects stand.
    pub fn layout(&self) -> &Layout {
        &self.shared.layout
    }

    /// Returns the site's identity.
    pub fn site(&self) -> Uuid {
        self.shared.site
    }

    /// Returns this host's keys.
    pub fn keyring(&self) -> &Keyring {
        &self.shared.keyring
    }

    /// Returns the clock.
    pub fn clock(&self) -> &dyn Clock {
        &*self.shared.clock
    }

    /// Returns the clock, for those who keep it.
    pub fn shared_clock(&self) -> Arc<dyn Clock> {
        self.shared.clock.clone()
    }

    /// Returns what is known of superseding segments without asking the store.
    pub fn forced_index(&self) -> &ForcedIndex {
        &self.shared.forced
    }

    /// Returns what is known of basebackups that carry WAL.
    pub fn carried_index(&self) -> &CarriedIndex {
        &self.shared.carried
    }

    /// Returns memory for the content of WAL files, kept from one to the next.
    pub(crate) fn buffers(&self) -> &Arc<RawBuffers> {
        &self.shared.buffers
    }

    pub(crate) fn identity(
        &self,
        kind: ObjectKind,
        cluster: ClusterId,
        timeline: Option<TimelineId>,
    ) -> Identity {
        Identity { kind, site: self.site(), cluster, timeline, name: String::new(), part: String::new() }
    }

    /// The identity of a document or index of a basebackup: bound to its id, not to a cluster, which only the
    /// document itself can tell.
    pub(crate) fn basebackup_identity(&self, kind: ObjectKind, id: BasebackupId) -> Identity {
        Identity { name: id.to_string(), ..self.identity(kind, ClusterId::UNKNOWN, None) }
    }

    fn assemble(options: RepositoryOptions, layout: Layout, record: SiteRecord) -> Self {
        let RepositoryOptions { store, keyring, clock, .. } = options;
        let (site, forced, carried) = (record.site, ForcedIndex::default(), CarriedIndex::default());
        let buffers = Arc::default();
        let shared = Arc::new(Shared { store, layout, site, keyring, clock, forced, carried, buffers });
        Self { shared, pool: None }
    }
}

async fn probe(store: &dyn Store, layout: &Layout, random: &dyn Random) -> Result<(), Error> {
    let found = storage::probe(store, &layout.probe(&random.array())).await?;
    match (found.create_only, found.read_after_write) {
        (true, true) => Ok(()),
        (false, _) => Err(Error::UnsuitableStore { lacks: "refuse a second put of the same key" }),
        (_, false) => Err(Error::UnsuitableStore { lacks: "show an object to a read that follows its put" }),
    }
}

async fn read_site(store: &dyn Store, layout: &Layout) -> Result<SiteRecord, Error> {
    let key = layout.site();
    let bytes = store.get(&key, SITE_BYTES_MAX).await?;
    let record: SiteRecord = serde_json::from_slice(&bytes).map_err(|error| Error::damaged(&key, error))?;
    if record.format != FORMAT || !record.required.is_empty() {
        return Err(Error::NewerFormat { object: key.to_string(), features: record.format });
    }
    Ok(record)
}

/// Refuses to make a new site of one that lost its `site.json`: everything in it would become a stranger's.
async fn refuse_orphans(store: &dyn Store, layout: &Layout) -> Result<(), Error> {
    for folder in [layout.basebackups(), layout.clusters()] {
        // Another host may create the site at this moment; then its `site.json` is there before anything else.
        if !store.list(&folder, None, 1).await?.is_empty() {
            return match store.head(&layout.site()).await {
                Err(error) if error.is_absent() => {
                    Err(Error::damaged(layout.site(), "it is missing, and the site has other objects"))
                }
                other => Ok(other.map(drop)?),
            };
        }
    }
    Ok(())
}

async fn create_site(store: &dyn Store, layout: &Layout, random: &dyn Random) -> Result<SiteRecord, Error> {
    let mut bytes = [0; 16];
    random.fill(&mut bytes);
    let site = uuid::Builder::from_random_bytes(bytes).into_uuid();
    let record = SiteRecord { format: FORMAT, site, required: Vec::new() };
    let mut body = serde_json::to_vec(&record).map_err(|error| Error::Internal(error.to_string()))?;
    body.push(b'\n');
    match store.create(&layout.site(), body.into()).await {
        Ok(()) => Ok(record),
        // Another host was faster; from now on the site is the one it created.
        Err(error) if error.kind() == storage::ErrorKind::AlreadyExists => read_site(store, layout).await,
        Err(error) => Err(error.into()),
    }
}
