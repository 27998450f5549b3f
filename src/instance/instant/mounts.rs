//! The mounts of a restore: over the data directory and over each tablespace's, each with the directory beneath as its upper.
//!
//! Everything beneath is opened before the mounts hide it. `pg_wal` is the directory beneath itself, shown through the
//! mount again where root can do that; else it is reached through the mount, which is slower and the same. On the way down
//! what hides nothing else goes first; whatever is still held stays, unless there is no time left for that.
//!
//! This process looks beneath, not through its own mounts: a thread that waits for its own answer when it is killed would
//! keep the mount, and all who wait for it, for ever. It goes by descriptors, because who owns a directory may put a link
//! in its place.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Deref;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::durable::{self, Create};
use crate::disk::{self, Binding, Owner, PrivateArea};
use crate::instance::clone_mount::take_away;
use crate::instance::instant::InstantError;
use crate::instance::instant::prepare::{is_prepared, prepare};
use crate::instance::instant::remembered::remember;
use crate::instance::instant::unfinished::Unfinished;
use crate::instance::lazy_uppers::{LazyBasebackup, LazyUppers, MountFailure};
use crate::mount::lower::Lower;
use crate::mount::mounting::{self, MountError, MountOptions, Mounted};
use crate::mount::tree::Tree;
use crate::mount::upper::{OpenError, Upper, UpperOptions};
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
    beneath: Vec<Arc<File>>,
    /// How often somebody was found who holds a mount that nobody needs.
    busy_looks: u32,
}

/// How often a mount is found busy before its holders are told: a process that ends needs a moment.
const BUSY_LOOKS: u32 = 5;

/// A directory that is to be mounted over.
struct Place {
    directory: PathBuf,
    upper: Upper,
    beneath: Arc<File>,
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
        self.beneath.first().map(|directory| mounting::path_of(directory)).unwrap_or_default()
    }

    /// Returns paths by which all directories beneath are reached, that of the data directory first.
    pub(super) fn beneath(&self) -> Vec<PathBuf> {
        self.beneath.iter().map(|directory| mounting::path_of(directory)).collect()
    }

    /// Unmounts what nobody holds; true where nothing is left. May be called again.
    pub(super) async fn try_close(&mut self) -> Result<bool, InstantError> {
        let (shown, mounted) = (self.shown.take(), std::mem::take(&mut self.mounted));
        let (shown, mounted, busy, outcome) = blocking(move || {
            let (shown, mut left, mut busy, mut outcome) = (unshow(shown), Vec::new(), Vec::new(), Ok(()));
            for mut mount in mounted {
                // The data directory is last: what is held of it may be held through pg_wal.
                match mount.unmount() {
                    Ok(()) => {}
                    Err(error @ MountError::Busy { .. }) => {
                        busy.push(error);
                        left.push(mount);
                    }
                    // Somebody else has unmounted it.
                    Err(MountError::NotMounted { .. }) => {}
                    Err(error) => {
                        outcome = Err(error);
                        left.push(mount);
                    }
                }
            }
            Ok((shown, left, busy, outcome))
        })
        .await?;
        (self.shown, self.mounted) = (shown, mounted);
        self.busy_looks = self.busy_looks.saturating_add(u32::from(!busy.is_empty()));
        if self.busy_looks == BUSY_LOOKS {
            busy.iter().for_each(|error| tracing::warn!("the mount stays until it is let go of: {error}"));
        }
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

/// Opens a directory that is to be mounted over, and its upper.
async fn open_place(
    plan: &RestorePlan,
    directory: &Path,
    lower: Arc<dyn Lower>,
    part: &str,
    holds_back: bool,
) -> Result<Place, InstantError> {
    let owner = plan.owner();
    let was_begun = is_prepared(&plan.destinations.data);
    if !was_begun {
        durable::create_dir_all(directory, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    let binding = Binding {
        basebackup: plan.basebackup.to_string(),
        manifest_digest: plan.manifest_digest.clone(),
        part: part.to_owned(),
    };
    let beneath = Arc::new(mounting::open_beneath(directory).map_err(MountFailure::Mount)?);
    let (path, directory) = (mounting::path_of(&beneath), directory.to_owned());
    check_place(&path, &directory, owner, was_begun)?;
    let options = UpperOptions { directory: path, binding, owner, holds_back };
    let opened = Upper::open(lower, options).await;
    let upper = opened.map_err(|error| named(error, &directory)).map_err(MountFailure::Upper)?;
    Ok(Place { directory, upper, beneath })
}

/// Has an error name a directory that it knows by its descriptor.
fn named(error: OpenError, directory: &Path) -> OpenError {
    let path = directory.to_owned();
    match error {
        OpenError::Lost { .. } => OpenError::Lost { path },
        OpenError::Io { source, .. } => OpenError::Io { path, source },
        OpenError::Disk(disk::Error::Locked { holder, .. }) => disk::Error::Locked { path, holder }.into(),
        OpenError::Disk(disk::Error::BoundElsewhere { found, wanted, .. }) => {
            disk::Error::BoundElsewhere { path, found, wanted }.into()
        }
        other => other,
    }
}

/// Refuses a directory, which `path` leads to, that is not the one it was.
///
/// A tablespace whose disk is not mounted would come anew from the basebackup, older than everything else. And what is not
/// the server's own was put there by its user for root to give to him.
fn check_place(path: &Path, directory: &Path, owner: Owner, was_begun: bool) -> Result<(), InstantError> {
    let found = Owner::of(path)?;
    if Owner::current().is_root() && found.uid != owner.uid {
        return Err(InstantError::NotItsOwn { path: directory.to_owned(), found, owner });
    }
    let area = PrivateArea::open(path)?;
    let binding = area.map_or(Ok(None), |area| area.binding())?;
    match was_begun && binding.is_none() {
        true => Err(InstantError::NotThere(directory.to_owned())),
        false => Ok(()),
    }
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
    let wal = match Owner::current().is_root() {
        true => open_wal(&data)?,
        false => None,
    };
    let mut mounted = Vec::new();
    for place in places.iter().rev() {
        let tree = Tree::new(Item::Volume(Arc::new(place.upper.clone())), owner);
        let mut options = MountOptions::new(format!("walden:{}", place.directory.display()), false);
        options.over_content = true;
        options.at = Some(place.beneath.clone());
        mounted
            .push(mounting::mount(tree, &place.directory, &options, runtime).map_err(MountFailure::Mount)?);
    }
    let beneath = places.into_iter().map(|place| place.beneath).collect();
    let mut mounts = InstantMounts { uppers, mounted, shown: None, beneath, busy_looks: 0 };
    if let Some(wal) = wal {
        let path = data.join("pg_wal");
        mounting::bind(&wal, &path).map_err(MountFailure::Mount)?;
        mounts.shown = Some(path);
    }
    let paths = mounts.mounted.iter().map(Mounted::path).chain(mounts.shown.as_deref());
    remember(&mounts.data_beneath(), paths)?;
    Ok(mounts)
}

/// Opens a pg_wal that is to be shown through the mount; nothing where it is a link: what that leads to is on no mount.
fn open_wal(data: &Path) -> Result<Option<File>, InstantError> {
    let path = data.join("pg_wal");
    let is_link = std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
    if is_link {
        tracing::info!("\"{}\" is a link, and is left as it is", path.display());
        return Ok(None);
    }
    Ok(Some(mounting::open_beneath(&path).map_err(MountFailure::Mount)?))
}

/// Runs what blocks on a thread for that.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, InstantError> + Send + 'static,
) -> Result<T, InstantError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| InstantError::Internal(error.to_string()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        Owner::current()
    }

    #[test]
    fn a_tablespace_whose_disk_is_not_mounted_does_not_come_anew() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path();
        check_place(place, place, owner(), false).unwrap();
        for _ in 0..2 {
            let refused = check_place(place, place, owner(), true).unwrap_err();
            assert!(matches!(&refused, InstantError::NotThere(path) if path == place), "{refused}");
            assert!(refused.hint().unwrap().contains("mounted"), "{refused:?}");
            // One that nobody has bound yet is none either.
            PrivateArea::create(place, None).unwrap();
        }
        let part = "tablespaces/16400".to_owned();
        let binding = Binding { basebackup: "b".to_owned(), manifest_digest: "d".to_owned(), part };
        PrivateArea::open(place).unwrap().unwrap().bind(&binding).unwrap();
        check_place(place, place, owner(), true).unwrap();
    }

    #[test]
    fn root_takes_no_directory_that_is_not_the_servers_own() {
        if !owner().is_root() {
            eprintln!("skipped: needs root");
            return;
        }
        let scratch = tempfile::tempdir().unwrap();
        let other = Owner { uid: 65_534, gid: 65_534 };
        let refused = check_place(scratch.path(), scratch.path(), other, false).unwrap_err();
        assert!(matches!(refused, InstantError::NotItsOwn { .. }), "{refused}");
    }

    #[test]
    fn a_pg_wal_that_is_a_link_is_not_shown() {
        let scratch = tempfile::tempdir().unwrap();
        open_wal(scratch.path()).unwrap_err();
        let (real, wal) = (scratch.path().join("real"), scratch.path().join("pg_wal"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &wal).unwrap();
        assert!(open_wal(scratch.path()).unwrap().is_none());
        std::fs::remove_file(&wal).unwrap();
        std::fs::create_dir(&wal).unwrap();
        assert!(open_wal(scratch.path()).unwrap().is_some());
    }

    #[test]
    fn a_link_in_a_places_stead_is_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let (real, link) = (scratch.path().join("real"), scratch.path().join("link"));
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        mounting::open_beneath(&real).unwrap();
        mounting::open_beneath(&link).unwrap_err();
    }
}
