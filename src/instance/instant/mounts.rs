//! The mounts of a restore: over the data directory and over each tablespace's, each with the directory beneath as its upper.
//!
//! Everything beneath is opened before the mounts hide it. `pg_wal` is the directory beneath itself, shown through the
//! mount again where root can do that; else it is reached through the mount, which is slower and the same. On the way down
//! what hides nothing else goes first; whatever is still held stays, unless there is no time left for that.
//!
//! This process looks beneath, not through its own mounts: a thread that waits for its own answer when it is killed would
//! keep the mount, and all who wait for it, for ever.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::durable::{self, Create};
use crate::disk::{Binding, Owner};
use crate::instance::clone_mount::take_away;
use crate::instance::instant::InstantError;
use crate::instance::instant::prepare::prepare;
use crate::instance::instant::unfinished::Unfinished;
use crate::instance::lazy_uppers::{LazyBasebackup, LazyUppers, MountFailure};
use crate::mount::lower::Lower;
use crate::mount::mounting::{self, MountError, MountOptions, Mounted};
use crate::mount::tree::Tree;
use crate::mount::upper::{Upper, UpperOptions};
use crate::mount::virtual_dir::Item;
use crate::repo::Repository;
use crate::restore::plan::RestorePlan;

/// The mounts of a restore.
#[derive(Debug)]
pub(super) struct InstantMounts {
    uppers: LazyUppers,
    /// The data directory's last.
    mounted: Vec<Mounted>,
    /// Where pg_wal is shown, if it is.
    shown: Option<PathBuf>,
    /// Each directory beneath a mount, that of the data directory first.
    beneath: Vec<File>,
}

/// A directory that is to be mounted over.
struct Place {
    directory: PathBuf,
    upper: Upper,
    beneath: File,
}

impl Deref for InstantMounts {
    type Target = LazyUppers;

    fn deref(&self) -> &LazyUppers {
        &self.uppers
    }
}

impl InstantMounts {
    /// Opens the basebackup and the uppers of a restore, prepares the directory where that has not been done, and mounts.
    pub(super) async fn open(repository: &Repository, unfinished: &Unfinished) -> Result<Self, InstantError> {
        let Unfinished { plan, spec } = unfinished;
        let basebackup = LazyBasebackup::open(repository, plan.basebackup, &plan.manifest_digest).await?;
        let links = plan.destinations.tablespaces.iter();
        let links: BTreeMap<u32, Vec<u8>> =
            links.map(|(oid, path)| (*oid, path.clone().into_os_string().into_vec())).collect();
        let part = |path: &str| basebackup.part(repository, path, b"", &links);
        let data = &plan.destinations.data;
        let mut places = vec![open_place(plan, data, part("data")?, "data", true).await?];
        for (oid, directory) in &plan.destinations.tablespaces {
            let path = format!("tablespaces/{oid}");
            places.push(open_place(plan, directory, part(&path)?, &path, false).await?);
        }
        prepare(basebackup.reader(), plan).await?;
        let uppers = places.iter().map(|place| place.upper.clone()).collect();
        let uppers = LazyUppers::new(basebackup, uppers, repository, spec.hydrate, 0);
        let (runtime, owner) = (tokio::runtime::Handle::current(), plan.owner());
        blocking(move || mount_all(uppers, places, owner, &runtime)).await
    }

    /// Returns a path by which the data directory beneath is reached.
    pub(super) fn data_beneath(&self) -> PathBuf {
        self.beneath.first().map(path_of).unwrap_or_default()
    }

    /// Returns paths by which all directories beneath are reached, that of the data directory first.
    pub(super) fn beneath(&self) -> Vec<PathBuf> {
        self.beneath.iter().map(path_of).collect()
    }

    /// Unmounts what nobody holds; true where nothing is left. May be called again.
    pub(super) async fn try_close(&mut self) -> Result<bool, InstantError> {
        let (shown, mounted) = (self.shown.take(), std::mem::take(&mut self.mounted));
        let (shown, mounted, outcome) = blocking(move || {
            let (shown, mut left, mut outcome) = (unshow(shown), Vec::new(), Ok(()));
            for mut mount in mounted {
                // The data directory is last: what is held of it may be held through pg_wal.
                match mount.unmount() {
                    Ok(()) => {}
                    Err(MountError::Busy { .. }) => left.push(mount),
                    // Somebody else has unmounted it.
                    Err(MountError::NotMounted { .. }) => {}
                    Err(error) => {
                        outcome = Err(error);
                        left.push(mount);
                    }
                }
            }
            Ok((shown, left, outcome))
        })
        .await?;
        (self.shown, self.mounted) = (shown, mounted);
        outcome.map_err(MountFailure::Mount)?;
        Ok(self.shown.is_none() && self.mounted.is_empty())
    }

    /// Makes everything durable and takes the mounts away, whoever holds them.
    pub(super) async fn close(&mut self) -> Result<(), InstantError> {
        let synced = self.sync().await;
        let (shown, mounted) = (self.shown.take(), std::mem::take(&mut self.mounted));
        let taken = blocking(move || {
            // What is still held goes with the mount that it is on.
            let _ = unshow(shown);
            let mut outcome = Ok(());
            for mount in mounted {
                match take_away(mount) {
                    Ok(()) | Err(MountError::NotMounted { .. }) => {}
                    Err(error) => outcome = Err(error),
                }
            }
            Ok(outcome.map_err(MountFailure::Mount)?)
        });
        let taken = taken.await;
        synced?;
        taken
    }
}

/// Takes pg_wal from its path; returns it where it is held.
fn unshow(shown: Option<PathBuf>) -> Option<PathBuf> {
    let path = shown?;
    match mounting::unbind(&path) {
        Ok(true) => None,
        Ok(false) => Some(path),
        Err(error) => {
            // It is none any more: somebody else has unmounted it.
            tracing::warn!("{error}");
            None
        }
    }
}

async fn open_place(
    plan: &RestorePlan,
    directory: &Path,
    lower: Arc<dyn Lower>,
    part: &str,
    holds_back: bool,
) -> Result<Place, InstantError> {
    let owner = plan.owner();
    durable::create_dir_all(directory, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    let binding = Binding {
        basebackup: plan.basebackup.to_string(),
        manifest_digest: plan.manifest_digest.clone(),
        part: part.to_owned(),
    };
    let beneath = mounting::open_beneath(directory).map_err(MountFailure::Mount)?;
    let directory = directory.to_owned();
    let options = UpperOptions { directory: directory.clone(), binding, owner, holds_back };
    let upper = Upper::open(lower, options).await.map_err(MountFailure::Upper)?;
    Ok(Place { directory, upper, beneath })
}

/// Mounts over every place, the data directory last; where one cannot be, none stays.
fn mount_all(
    uppers: LazyUppers,
    places: Vec<Place>,
    owner: Owner,
    runtime: &tokio::runtime::Handle,
) -> Result<InstantMounts, InstantError> {
    let Some(data) = places.first().map(|place| place.directory.clone()) else {
        return Err(InstantError::Internal("a restore has a data directory".to_owned()));
    };
    let wal = File::open(data.join("pg_wal")).map_err(|source| InstantError::Ending {
        action: "open directory",
        path: data.join("pg_wal"),
        source,
    })?;
    let mut mounted = Vec::new();
    for place in places.iter().rev() {
        let tree = Tree::new(Item::Volume(Arc::new(place.upper.clone())), owner);
        let mut options = MountOptions::new(format!("walden:{}", place.directory.display()), false);
        options.over_content = true;
        mounted
            .push(mounting::mount(tree, &place.directory, &options, runtime).map_err(MountFailure::Mount)?);
    }
    let beneath = places.into_iter().map(|place| place.beneath).collect();
    let mut mounts = InstantMounts { uppers, mounted, shown: None, beneath };
    if Owner::current().is_root() {
        let path = data.join("pg_wal");
        mounting::bind(&wal, &path).map_err(MountFailure::Mount)?;
        mounts.shown = Some(path);
    }
    Ok(mounts)
}

fn path_of(directory: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// Runs what blocks on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, InstantError> + Send + 'static,
) -> Result<T, InstantError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| InstantError::Internal(error.to_string()))?
}
