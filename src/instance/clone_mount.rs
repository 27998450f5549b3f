//! The writable mount of a clone: one upper for the data directory, one for each tablespace, and the archive.
//!
//! ```text
//! mnt/data                 the data directory of the basebackup, with everything changed since
//! mnt/tablespaces/<oid>    its tablespaces
//! mnt/wal                  the archive, by the clone's plan
//! ```
//! A dead mount that a killed supervisor left is detached first; the caller holds the folder's lock, so nobody else
//! can be behind it. Closing syncs every upper before the mount goes.
//! How long reads wait for the store is the supervisor's to say: it knows whether there is recovery to lose. It also says
//! when the hydrator begins, which brings what nobody has asked for.

use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;

use crate::catalog::RecoveryPlan;
use crate::catalog::wal_reader::WalReader;
use crate::control::HydrationStatus;
use crate::disk::durable::{self, Create};
use crate::disk::{self, Binding, Owner};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, LastHydration};
use crate::instance::hydration;
use crate::mount::lower::Lower;
use crate::mount::mounting::{self, MountError, MountOptions, Mounted};
use crate::mount::pack_order::PackOrder;
use crate::mount::patience::{Patience, PatienceSwitch, PatientLower};
use crate::mount::repo_lower::RepoLower;
use crate::mount::tree::Tree;
use crate::mount::upper::hydrate::{HydrateOptions, Hydrator};
use crate::mount::upper::{OpenError, Upper, UpperOptions};
use crate::mount::virtual_dir::{Item, StaticDir};
use crate::mount::wal_dir::WalDir;
use crate::pg::ArchiveFileName;
use crate::repo::entry::TreePath;
use crate::repo::{self, Basebackup, FileReader, Repository, Transfers};

/// A clone's mount.
#[derive(Debug)]
pub struct CloneMount {
    mounted: Option<Mounted>,
    uppers: Vec<Upper>,
    reader: Arc<FileReader>,
    switch: Arc<PatienceSwitch>,
    hydrator: Arc<Hydrator>,
    hydrate_options: HydrateOptions,
    /// What was local when this mount began, as far as the last one knew.
    local_before: u64,
}

/// Why a clone's mount is not there.
#[derive(Debug, thiserror::Error)]
pub enum MountFailure {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// The basebackup is another one than the clone was made from.
    #[error("basebackup {0} is not the one that this clone was made from")]
    OtherBasebackup(repo::BasebackupId),
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
    #[error("could not sync the clone's files: {0}")]
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
/// Decoded segments kept in memory, so that a copy in small reads decodes each once.
const WAL_CACHE_BYTES: usize = 64 << 20;
/// Stored bytes of the start-up set that a start fetches unasked; what the first sessions read of each database's
/// catalogs is in it too, so it is kept until it is used.
const START_SET_BYTES: u64 = 4 << 20;
/// What is read in critical sections, where PostgreSQL turns a read error into a PANIC.
const NEVER_FAILING: [&str; 4] = ["global", "pg_xact", "pg_multixact", "pg_commit_ts"];

/// How long reads of a server that takes queries wait for the store before they fail.
pub const RUNNING_PATIENCE: Patience = Patience::Deadline(Duration::from_secs(30));
/// How long reads wait while the server is being stopped, those that wait already included.
pub const STOPPING_PATIENCE: Patience = Patience::Deadline(Duration::from_secs(5));

impl CloneMount {
    /// Opens the basebackup and the uppers of a clone and mounts them.
    pub async fn open(
        repository: &Repository,
        folder: &CloneFolder,
        spec: &CloneSpec,
        plan: RecoveryPlan,
    ) -> Result<Self, MountFailure> {
        let mount_point = folder.mount_point();
        if mounting::is_mount_point(&mount_point) {
            let left = mount_point.clone();
            tokio::task::spawn_blocking(move || mounting::detach_dead(&left))
                .await
                .map_err(|error| MountFailure::Internal(error.to_string()))??;
        }
        let wal =
            WalReader::new(repository.clone(), spec.cluster, repository.shared_clock(), WAL_CACHE_BYTES);
        let wal = Arc::new(wal);
        if !folder.upper().join("data").exists() {
            // The first start: recovery asks for these as soon as there is a mount.
            wal.read_ahead(plan.whole_segments().map(ArchiveFileName::Segment));
        }
        let basebackup = Arc::new(Basebackup::open(repository, spec.basebackup).await?);
        if basebackup.record().manifest.digest.to_string() != spec.manifest_digest {
            return Err(MountFailure::OtherBasebackup(spec.basebackup));
        }
        let reader = FileReader::new(basebackup.clone(), CHUNK_CACHE_BYTES).sharing(Transfers::per_core());
        let reader = Arc::new(reader);
        reader.prefetch_start_set(START_SET_BYTES).await?;
        let owner = Owner { uid: spec.owner.0, gid: spec.owner.1 };
        let switch = PatienceSwitch::new(RUNNING_PATIENCE);
        let patient = |path: &str| patient_lower(repository, folder, &reader, &switch, path);
        let data = open_upper(folder, spec, patient("data")?, "data", "data", true).await?;
        let mut uppers = vec![data.clone()];
        let mut tablespaces = StaticDir::new(spec.created_at);
        for tablespace in &basebackup.start().tablespaces {
            if tablespace.location.is_empty() {
                continue;
            }
            let oid = tablespace.oid.to_string();
            let path = format!("tablespaces/{oid}");
            let name = format!("tablespace-{oid}");
            let upper = open_upper(folder, spec, patient(&path)?, &name, &path, false).await?;
            tablespaces = tablespaces.with(&oid, Item::Volume(Arc::new(upper.clone())));
            uppers.push(upper);
        }
        let root = StaticDir::new(spec.created_at)
            .with("data", Item::Volume(Arc::new(data)))
            .with("tablespaces", Item::Directory(Arc::new(tablespaces)))
            .with("wal", Item::Directory(Arc::new(WalDir::new(wal, Some(plan)))));
        let tree = Tree::new(Item::Directory(Arc::new(root)), owner);
        let options = MountOptions::new(format!("walden:{}", spec.name), false);
        let runtime = tokio::runtime::Handle::current();
        let mounted =
            tokio::task::spawn_blocking(move || mounting::mount(tree, &mount_point, &options, &runtime))
                .await
                .map_err(|error| MountFailure::Internal(error.to_string()))??;
        let hydrate_options = HydrateOptions { is_on: spec.hydrate.in_background, rate: spec.hydrate.rate };
        let order = Arc::new(PackOrder::new(reader.clone()));
        let hydrator = Hydrator::new(uppers.clone(), order, repository.shared_clock(), hydrate_options);
        let local_before = folder.read_hydration().hydrated_bytes;
        Ok(Self { mounted: Some(mounted), uppers, reader, switch, hydrator, hydrate_options, local_before })
    }

    /// Makes everything that was written durable.
    pub async fn sync(&self) -> Result<(), MountFailure> {
        let uppers = self.uppers.clone();
        let sync = move || uppers.iter().try_for_each(Upper::sync_all).map_err(MountFailure::Sync);
        tokio::task::spawn_blocking(sync).await.map_err(|error| MountFailure::Internal(error.to_string()))?
    }

    /// Says how long reads wait for the store, also those that wait already.
    pub fn wait_for_store(&self, patience: Patience) {
        self.switch.set(patience);
    }

    /// Returns the work of fetching what must never fail to be read, apart from this mount's life.
    pub fn fetch_never_failing(&self) -> impl Future<Output = Result<(), MountFailure>> + Send + 'static {
        // The uppers of tablespaces have none of it.
        let data = self.uppers.first().cloned();
        async move {
            let trees = data.iter().flat_map(|data| NEVER_FAILING.map(|name| data.make_local(name)));
            try_join_all(trees).await.map_err(MountFailure::Fetch)?;
            Ok(())
        }
    }

    /// Returns the first damage of the basebackup that this mount met.
    pub fn damage(&self) -> Option<&str> {
        self.reader.damage()
    }

    /// Returns the work of bringing what is not local yet, apart from this mount's life; it may be dropped at any time.
    pub fn hydrate(&self) -> impl Future<Output = ()> + Send + 'static {
        self.hydrator.clone().run()
    }

    /// Tells whether everything is local and on stable storage.
    pub fn is_hydrated(&self) -> bool {
        self.uppers.iter().all(Upper::is_hydrated)
    }

    /// Returns how many bytes of the basebackup are local or no longer needed.
    pub fn hydrated_bytes(&self) -> u64 {
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
    pub fn hydration(&self) -> HydrationStatus {
        hydration::status_of(self.hydrator.report(), self.hydrate_options.rate)
    }

    /// Returns what is to be remembered of it for when nothing of the clone runs.
    pub fn last_hydration(&self) -> LastHydration {
        LastHydration {
            hydrated_bytes: self.hydrated_bytes(),
            total_bytes: self.total_bytes(),
            is_done: self.is_hydrated(),
        }
    }

    /// Returns how many bytes the basebackup has.
    pub fn total_bytes(&self) -> u64 {
        self.reader.basebackup().record().size.database_bytes
    }

    /// Makes everything durable and unmounts.
    pub async fn close(&mut self) -> Result<(), MountFailure> {
        let synced = self.sync().await;
        if let Some(mut mounted) = self.mounted.take() {
            let unmount = move || match mounted.unmount() {
                Err(MountError::Busy { path, holders }) => {
                    tracing::warn!("\"{}\" is still in use: {holders:?}", path.display());
                    mounted.detach()
                }
                other => other,
            };
            tokio::task::spawn_blocking(unmount)
                .await
                .map_err(|error| MountFailure::Internal(error.to_string()))??;
        }
        synced
    }
}

/// A part of the basebackup, for reads that wait for the store.
fn patient_lower(
    repository: &Repository,
    folder: &CloneFolder,
    reader: &Arc<FileReader>,
    switch: &Arc<PatienceSwitch>,
    path: &str,
) -> Result<Arc<dyn Lower>, MountFailure> {
    // The links of pg_tblspc lead to where this mount has the tablespaces, and nowhere else (failure 27b).
    let tablespaces = folder.mount_point().join("tablespaces/").into_os_string().into_vec();
    let root = TreePath::new(path).map_err(|error| MountFailure::Internal(error.to_string()))?;
    let lower = Arc::new(RepoLower::new(reader.clone(), root).with_tablespace_folder(&tablespaces));
    Ok(Arc::new(PatientLower::new(lower, switch.clone(), repository.shared_clock())))
}

async fn open_upper(
    folder: &CloneFolder,
    spec: &CloneSpec,
    lower: Arc<dyn Lower>,
    name: &str,
    path: &str,
    holds_back: bool,
) -> Result<Upper, MountFailure> {
    let owner = Owner { uid: spec.owner.0, gid: spec.owner.1 };
    let directory = folder.upper().join(name);
    durable::create_dir_all(&directory, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    let binding = Binding {
        basebackup: spec.basebackup.to_string(),
        manifest_digest: spec.manifest_digest.clone(),
        part: path.to_owned(),
    };
    Ok(Upper::open(lower, UpperOptions { directory, binding, owner, holds_back }).await?)
}
