//! The uppers of one basebackup that fill while a server runs on them: its data directory first, then its tablespaces.
//!
//! What a clone and an unfinished restore have alike, wherever their uppers are mounted. How long reads wait for the store
//! is the supervisor's to say: it knows whether there is recovery to lose. It also says when the hydrator begins, which
//! brings what nobody has asked for. Deliberately absent: mounting.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;

use crate::control::HydrationStatus;
use crate::disk;
use crate::instance::clone_folder::{HydrateSpec, LastHydration};
use crate::instance::hydration;
use crate::mount::lower::Lower;
use crate::mount::mounting::MountError;
use crate::mount::pack_order::PackOrder;
use crate::mount::patience::{Patience, PatienceSwitch, PatientLower};
use crate::mount::repo_lower::RepoLower;
use crate::mount::upper::hydrate::{HydrateOptions, Hydrator};
use crate::mount::upper::{OpenError, Upper};
use crate::repo::entry::TreePath;
use crate::repo::{self, Basebackup, BasebackupId, FileReader, Repository, Transfers};

/// A basebackup that is read by a mount whose reads wait for the store.
#[derive(Debug)]
pub(super) struct LazyBasebackup {
    reader: Arc<FileReader>,
    switch: Arc<PatienceSwitch>,
}

/// The uppers of a mount.
#[derive(Debug)]
pub(super) struct LazyUppers {
    uppers: Vec<Upper>,
    reader: Arc<FileReader>,
    switch: Arc<PatienceSwitch>,
    hydrator: Arc<Hydrator>,
    hydrate_options: HydrateOptions,
    /// What was local when this mount began, as far as the last one knew.
    local_before: u64,
}

/// Why such a mount is not there.
#[derive(Debug, thiserror::Error)]
pub enum MountFailure {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// The basebackup is another one than it was begun with.
    #[error("basebackup {0} is not the one that this was made from")]
    OtherBasebackup(BasebackupId),
    /// The upper.
    #[error(transparent)]
    Upper(#[from] OpenError),
    /// The folder.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// The mount itself.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// What was written could not be made durable.
    #[error("could not sync the files beneath the mount: {0}")]
    Sync(nix::errno::Errno),
    /// What the server must be able to read could not be fetched.
    #[error("could not fetch what PostgreSQL must always be able to read: {0}")]
    Fetch(nix::errno::Errno),
    /// A task of ours ended without an answer.
    #[error("internal error: {0}")]
    Internal(String),
}

/// Decoded chunks kept in memory: what is read goes into the upper, so few are asked for twice.
const CHUNK_CACHE_BYTES: usize = 32 << 20;
/// Stored bytes of the start-up set that a start fetches unasked; what the first sessions read of each database's
/// catalogs is in it too, so it is kept until it is used.
const START_SET_BYTES: u64 = 4 << 20;
/// What is read in critical sections, where PostgreSQL turns a read error into a PANIC.
const NEVER_FAILING: [&str; 4] = ["global", "pg_xact", "pg_multixact", "pg_commit_ts"];

/// How long reads of a server that takes queries wait for the store before they fail.
pub const RUNNING_PATIENCE: Patience = Patience::Deadline(Duration::from_secs(30));
/// How long reads wait while the server is being stopped, those that wait already included.
pub const STOPPING_PATIENCE: Patience = Patience::Deadline(Duration::from_secs(5));

impl LazyBasebackup {
    /// Opens a basebackup, which must be the one of this manifest.
    pub(super) async fn open(
        repository: &Repository,
        id: BasebackupId,
        manifest_digest: &str,
    ) -> Result<Self, MountFailure> {
        let basebackup = Arc::new(Basebackup::open(repository, id).await?);
        if basebackup.record().manifest.digest.to_string() != manifest_digest {
            return Err(MountFailure::OtherBasebackup(id));
        }
        let reader = FileReader::new(basebackup, CHUNK_CACHE_BYTES).sharing(Transfers::per_core());
        let reader = Arc::new(reader);
        // A server that starts lists every directory, several times. What cannot be had of the table now is asked for
        // again by whoever lists what stands in it, and they are told.
        let (start_set, table) =
            futures::join!(reader.prefetch_start_set(START_SET_BYTES), reader.basebackup().load_file_table());
        start_set?;
        if let Err(error) = table {
            tracing::debug!("the file table was not fetched ahead: {error}");
        }
        Ok(Self { reader, switch: PatienceSwitch::new(RUNNING_PATIENCE) })
    }

    /// Returns what reads its files.
    pub(super) fn reader(&self) -> &Arc<FileReader> {
        &self.reader
    }

    /// Returns a part of it, for reads that wait for the store. The links of `pg_tblspc` lead to `places`, by oid, or into
    /// `folder`, whose path ends in a slash; never to where the source had them (failure 27b).
    pub(super) fn part(
        &self,
        repository: &Repository,
        path: &str,
        folder: &[u8],
        places: &BTreeMap<u32, Vec<u8>>,
    ) -> Result<Arc<dyn Lower>, MountFailure> {
        let root = TreePath::new(path).map_err(|error| MountFailure::Internal(error.to_string()))?;
        let lower = RepoLower::new(self.reader.clone(), root).with_tablespace_folder(folder).without_wal();
        let lower = Arc::new(lower.with_tablespace_places(places.clone()));
        Ok(Arc::new(PatientLower::new(lower, self.switch.clone(), repository.shared_clock())))
    }
}

impl LazyUppers {
    /// Puts the uppers of a basebackup together, that of the data directory first.
    pub(super) fn new(
        basebackup: LazyBasebackup,
        uppers: Vec<Upper>,
        repository: &Repository,
        hydrate: HydrateSpec,
        local_before: u64,
    ) -> Self {
        let LazyBasebackup { reader, switch } = basebackup;
        let hydrate_options = HydrateOptions { is_on: hydrate.in_background, rate: hydrate.rate };
        let order = Arc::new(PackOrder::new(reader.clone()));
        let hydrator = Hydrator::new(uppers.clone(), order, repository.shared_clock(), hydrate_options);
        Self { uppers, reader, switch, hydrator, hydrate_options, local_before }
    }

    /// Returns the uppers, that of the data directory first.
    pub(super) fn uppers(&self) -> &[Upper] {
        &self.uppers
    }

    /// Makes everything that was written durable.
    pub(super) async fn sync(&self) -> Result<(), MountFailure> {
        let uppers = self.uppers.clone();
        let sync = move || uppers.iter().try_for_each(Upper::sync_all).map_err(MountFailure::Sync);
        tokio::task::spawn_blocking(sync).await.map_err(|error| MountFailure::Internal(error.to_string()))?
    }

    /// Says how long reads wait for the store, also those that wait already.
    pub(super) fn wait_for_store(&self, patience: Patience) {
        self.switch.set(patience);
    }

    /// Returns the work of fetching what must never fail to be read, apart from this mount's life.
    pub(super) fn fetch_never_failing(
        &self,
    ) -> impl Future<Output = Result<(), MountFailure>> + Send + 'static {
        // The uppers of tablespaces have none of it.
        let data = self.uppers.first().cloned();
        async move {
            let trees = data.iter().flat_map(|data| NEVER_FAILING.map(|name| data.make_local(name)));
            try_join_all(trees).await.map_err(MountFailure::Fetch)?;
            Ok(())
        }
    }

    /// Returns the first damage of the basebackup that this mount met.
    pub(super) fn damage(&self) -> Option<String> {
        self.reader.damage()
    }

    /// Forgets it, because it may have been put right.
    pub(super) fn forget_damage(&self) {
        self.reader.forget_damage();
    }

    /// Returns the work of bringing what is not local yet, apart from this mount's life; it may be dropped at any time.
    pub(super) fn hydrate(&self) -> impl Future<Output = ()> + Send + 'static {
        self.hydrator.clone().run()
    }

    /// Tells whether everything is local and on stable storage.
    pub(super) fn is_hydrated(&self) -> bool {
        self.uppers.iter().all(Upper::is_hydrated)
    }

    /// Returns how many bytes of the basebackup are local or no longer needed.
    pub(super) fn hydrated_bytes(&self) -> u64 {
        let total = self.total_bytes();
        match self.hydrator.report().missing_bytes {
            Some(missing) => total.saturating_sub(missing),
            None => {
                let filled: u64 = self.uppers.iter().map(|upper| upper.stats().filled_bytes).sum();
                self.local_before.saturating_add(filled).min(total)
            }
        }
    }

    /// Returns how the rest of the basebackup comes.
    pub(super) fn hydration(&self) -> HydrationStatus {
        hydration::status_of(self.hydrator.report(), self.hydrate_options.rate)
    }

    /// Returns what is to be remembered of it for when nothing of it runs.
    pub(super) fn last_hydration(&self) -> LastHydration {
        LastHydration {
            hydrated_bytes: self.hydrated_bytes(),
            total_bytes: self.total_bytes(),
            is_done: self.is_hydrated(),
        }
    }

    /// Returns how many bytes the basebackup has.
    pub(super) fn total_bytes(&self) -> u64 {
        self.reader.basebackup().record().size.database_bytes
    }
}
