//! The writable mount of a clone: one upper for the data directory, one for each tablespace, and the archive.
//!
//! ```text
//! mnt/data                 the data directory of the basebackup, with everything changed since
//! mnt/tablespaces/<oid>    its tablespaces
//! mnt/wal                  the archive, by the clone's plan
//! ```
//! A dead mount that a killed supervisor left is detached first; the caller holds the folder's lock, so nobody else
//! can be behind it. Closing syncs every upper before the mount goes. What the uppers do is `lazy_uppers`' affair.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;

use crate::catalog::RecoveryPlan;
use crate::catalog::wal_reader::WalReader;
use crate::disk::durable::{self, Create};
use crate::disk::{Binding, Owner};
use crate::instance::clone_folder::{CloneFolder, CloneSpec};
use crate::instance::lazy_uppers::{LazyBasebackup, LazyUppers, MountFailure};
use crate::mount::lower::Lower;
use crate::mount::mounting::{self, MountError, MountOptions, Mounted};
use crate::mount::tree::Tree;
use crate::mount::upper::{Upper, UpperOptions};
use crate::mount::virtual_dir::{Item, StaticDir};
use crate::mount::wal_dir::WalDir;
use crate::pg::ArchiveFileName;
use crate::repo::Repository;

/// A clone's mount.
#[derive(Debug)]
pub(super) struct CloneMount {
    mounted: Option<Mounted>,
    uppers: LazyUppers,
}

/// Decoded segments kept in memory, so that a copy in small reads decodes each once.
const WAL_CACHE_BYTES: usize = 64 << 20;

impl Deref for CloneMount {
    type Target = LazyUppers;

    fn deref(&self) -> &LazyUppers {
        &self.uppers
    }
}

impl CloneMount {
    /// Opens the basebackup and the uppers of a clone and mounts them.
    pub(super) async fn open(
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
        plan.tell(repository);
        if !folder.upper().join("data").exists() {
            // The first start: recovery asks for these as soon as there is a mount.
            wal.read_ahead(plan.whole_segments().map(ArchiveFileName::Segment));
        }
        let basebackup = LazyBasebackup::open(repository, spec.basebackup, &spec.manifest_digest).await?;
        let owner = Owner { uid: spec.owner.0, gid: spec.owner.1 };
        // The links of pg_tblspc lead to where this mount has the tablespaces.
        let tablespace_folder = folder.mount_point().join("tablespaces/").into_os_string().into_vec();
        let part = |path: &str| basebackup.part(repository, path, &tablespace_folder, &BTreeMap::new());
        let data = open_upper(folder, spec, part("data")?, "data", "data", true).await?;
        let mut uppers = vec![data.clone()];
        let mut tablespaces = StaticDir::new(spec.created_at);
        for tablespace in &basebackup.reader().basebackup().start().tablespaces {
            if tablespace.location.is_empty() {
                continue;
            }
            let oid = tablespace.oid.to_string();
            let path = format!("tablespaces/{oid}");
            let name = format!("tablespace-{oid}");
            let upper = open_upper(folder, spec, part(&path)?, &name, &path, false).await?;
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
        let local_before = folder.read_hydration().hydrated_bytes;
        let uppers = LazyUppers::new(basebackup, uppers, repository, spec.hydrate, local_before);
        Ok(Self { mounted: Some(mounted), uppers })
    }

    /// Makes everything durable and unmounts.
    pub(super) async fn close(&mut self) -> Result<(), MountFailure> {
        let synced = self.sync().await;
        if let Some(mounted) = self.mounted.take() {
            tokio::task::spawn_blocking(move || take_away(mounted))
                .await
                .map_err(|error| MountFailure::Internal(error.to_string()))??;
        }
        synced
    }
}

/// Unmounts, and detaches what somebody still holds.
pub(super) fn take_away(mut mounted: Mounted) -> Result<(), MountError> {
    match mounted.unmount() {
        Err(MountError::Busy { path, holders }) => {
            tracing::warn!("\"{}\" is still in use: {holders:?}", path.display());
            mounted.detach()
        }
        other => other,
    }
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
