//! From an upper to an ordinary data directory, while its server runs.
//!
//! ```text
//! let go of the lower: pg_control, PG_VERSION come to their places → mark        from here on it is plain
//! forget origins → release the tablespaces → boot unit → pin → release the data directory
//! ```
//! Every step may be taken again after a crash; the mark says that only these are left. The pin ends before the private
//! area goes, which is where it is written down. A store that does not answer holds up only that.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::task::JoinSet;

use crate::disk::durable::{self, Create};
use crate::disk::{self, LockFile, PrivateArea, private_area};
use crate::instance::instant::InstantError;
use crate::instance::instant::boot_unit::Systemd;
use crate::instance::instant::mounts::{InstantMounts, blocking};
use crate::instance::instant::unfinished::{Unfinished, area_of};
use crate::instance::lazy_uppers::MountFailure;
use crate::mount::mounting::{open_beneath, path_of};
use crate::mount::upper::{Upper, forget_origins};
use crate::repo::Repository;
use crate::restore::destinations::Destinations;
use crate::restore::run::COMPLETE_FILE;

/// The end of one restore.
#[derive(Debug, Default)]
pub(super) struct Ending {
    task: JoinSet<()>,
    is_plain: bool,
}

/// Between two attempts to end a pin.
const AGAIN: Duration = Duration::from_secs(30);
/// How long a process that has nothing else to do waits for the store to take the end of its pin.
const LAST_WAIT: Duration = Duration::from_secs(20);

impl Ending {
    /// Tells whether the directory is plain.
    pub(super) fn is_plain(&self) -> bool {
        self.is_plain
    }

    /// Makes the directory plain, which takes a moment; what is left to be tidied is begun.
    pub(super) async fn make_plain(
        &mut self,
        mounts: &InstantMounts,
        unfinished: &Unfinished,
        repository: &Repository,
    ) -> Result<(), InstantError> {
        let (uppers, beneath) = (mounts.uppers().to_vec(), mounts.beneath());
        let data = beneath.first().cloned().unwrap_or_default();
        blocking(move || {
            // Tablespaces first: with the data directory's files in place it can be started.
            for (upper, path) in uppers.iter().zip(&beneath).rev() {
                upper.stand_alone().map_err(failed("complete", path))?;
            }
            Ok(durable::write_file(&area_of(&data).join(COMPLETE_FILE), b"", Create::PRIVATE_FILE)?)
        })
        .await?;
        self.is_plain = true;
        self.task.spawn(tidy(
            mounts.uppers().to_vec(),
            mounts.beneath(),
            unfinished.clone(),
            repository.clone(),
        ));
        Ok(())
    }

    /// Waits for what is left to be tidied, as long as anybody should.
    pub(super) async fn finish(&mut self) {
        let all = async { while self.task.join_next().await.is_some() {} };
        if tokio::time::timeout(LAST_WAIT, all).await.is_err() {
            tracing::warn!(
                "the store does not take note that the basebackup is needed no more; --resume tries again"
            );
        }
        self.task.shutdown().await;
    }
}

async fn tidy(uppers: Vec<Upper>, beneath: Vec<PathBuf>, unfinished: Unfinished, repository: Repository) {
    let data = unfinished.plan.destinations.data.clone();
    let places = beneath.clone();
    let tidied = blocking(move || {
        for path in &places {
            // Through the link in /proc, to the directory itself.
            forget_origins(&path.join("."))
                .map_err(|source| ending("forget the origins in", path, source))?;
        }
        for upper in &uppers {
            upper.sync_all().map_err(failed("sync", &data))?;
        }
        for path in places.iter().skip(1) {
            release(path)?;
        }
        remove_unit(&data);
        Ok(())
    })
    .await;
    if let Err(error) = tidied {
        tracing::error!("the directory is plain, and not everything of Walden's is gone from it: {error}");
        return;
    }
    if let Some(pin) = &unfinished.spec.pin {
        while let Err(error) = pin.end(&repository).await {
            tracing::warn!("could not let go of basebackup {}: {error}", pin.id);
            tokio::time::sleep(AGAIN).await;
        }
    }
    let released = blocking(move || Ok(beneath.first().map_or(Ok(()), |data| release(data))?)).await;
    match released {
        Ok(()) => tracing::info!("the directory is an ordinary data directory"),
        Err(error) => tracing::error!("the private area stays: {error}"),
    }
}

impl Unfinished {
    /// Tidies what a process has left that ended when the directory was plain already.
    ///
    /// # Errors
    /// Where another process is at it, and where the store does not take the end of the pin: it is as good as before then.
    pub async fn tidy(&self, repository: &Repository) -> Result<(), InstantError> {
        let destinations = self.plan.destinations.clone();
        let held = blocking(move || tidy_places(&destinations)).await?;
        let Some((lock, data)) = held else { return Ok(()) };
        if let Some(pin) = &self.spec.pin {
            pin.end(repository).await?;
        }
        blocking(move || Ok(release(&path_of(&data))?)).await?;
        drop(lock);
        Ok(())
    }
}

/// Tidies all but what remembers the pin; returns who keeps others away meanwhile, and the data directory.
fn tidy_places(destinations: &Destinations) -> Result<Option<(LockFile, File)>, InstantError> {
    let Destinations { data, tablespaces, .. } = destinations;
    let Some(area) = PrivateArea::open(data)? else { return Ok(None) };
    let lock = area.lock()?;
    let opened = open_beneath(data).map_err(MountFailure::Mount)?;
    let tablespaces = tablespaces.values().map(|place| (place, true));
    for (place, is_tablespace) in std::iter::once((data, false)).chain(tablespaces) {
        let directory = open_beneath(place).map_err(MountFailure::Mount)?;
        let path = path_of(&directory);
        forget_origins(&path.join(".")).map_err(|source| ending("forget the origins in", place, source))?;
        durable::sync_file_system(&path)?;
        if is_tablespace {
            release(&path)?;
        }
    }
    remove_unit(data);
    Ok(Some((lock, opened)))
}

fn remove_unit(data: &Path) {
    if let Err(error) = Systemd::of_host().remove(data) {
        tracing::warn!("could not remove the unit that mounts at boot: {error}");
    }
}

/// Removes the private area of a directory that needs it no more.
fn release(directory: &Path) -> Result<(), disk::Error> {
    match PrivateArea::open(directory)? {
        Some(area) => area.release(),
        None => private_area::clear_released(directory),
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(nix::errno::Errno) -> InstantError {
    move |errno| ending(action, path, errno.into())
}

fn ending(action: &'static str, path: &Path, source: std::io::Error) -> InstantError {
    InstantError::Ending { action, path: path.to_owned(), source }
}
