//! What a restore remembers of its mounts, so that one that was killed and then detached by somebody is still known.
//!
//! What of a mount is passed through can be written without the process that served it, and once the mount has no place any
//! more nobody finds it by its path. The kernel's numbers of mounts are not given again while one is held, but anew after a
//! boot: so they are remembered with that.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::disk::state_file;
use crate::instance::clone_folder::write_json;
use crate::instance::instant::InstantError;
use crate::instance::instant::unfinished::area_of;
use crate::instance::lazy_uppers::MountFailure;
use crate::mount::{MountError, holders};

const MOUNTS_FILE: &str = "mounts.json";
const WHAT: &str = "the mounts of a restore";
/// How often, and in what steps, processes are looked at that hold a mount and may be ending: for ten seconds.
const LOOKS: u32 = 100;
const LOOK: Duration = Duration::from_millis(100);

/// The mounts of the last supervisor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    /// Which boot of the host they belong to.
    boot: String,
    /// The kernel's numbers.
    mounts: Vec<u32>,
}

/// Remembers what is mounted at some paths; `beneath` leads to the data directory beneath.
pub(super) fn remember<'a>(
    beneath: &Path,
    paths: impl IntoIterator<Item = &'a Path>,
) -> Result<(), InstantError> {
    let Some(boot) = boot() else { return Ok(()) };
    let mounts = paths.into_iter().filter_map(holders::mount_id).collect();
    Ok(write_json(&area_of(beneath).join(MOUNTS_FILE), &Remembered { boot, mounts }, WHAT)?)
}

/// Waits until nobody holds a mount that is remembered and was detached.
///
/// # Errors
/// Names who goes on holding one.
pub(super) fn refuse_held(data: &Path) -> Result<(), InstantError> {
    let remembered: Remembered = match state_file::read_document(&area_of(data).join(MOUNTS_FILE), WHAT) {
        Err(error) if error.is_not_found() => return Ok(()),
        read => read?,
    };
    if boot().is_none_or(|boot| boot != remembered.boot) {
        return Ok(());
    }
    let mut looks_left = LOOKS;
    loop {
        let holders = holders::find_detached(&remembered.mounts);
        if holders.is_empty() {
            return Ok(());
        }
        looks_left -= 1;
        if looks_left == 0 {
            return Err(MountFailure::Mount(MountError::Busy { path: data.to_owned(), holders }).into());
        }
        std::thread::sleep(LOOK);
    }
}

/// Returns what names this boot of the host.
fn boot() -> Option<String> {
    let read = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(read.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::PrivateArea;

    #[test]
    fn what_is_mounted_is_remembered_with_its_boot_and_no_detached_mount() {
        let scratch = tempfile::tempdir().unwrap();
        refuse_held(scratch.path()).unwrap();
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        remember(scratch.path(), [Path::new("/proc"), Path::new("/nonexistent")]).unwrap();
        let file = area.directory().join(MOUNTS_FILE);
        let remembered: Remembered = state_file::read_document(&file, WHAT).unwrap();
        assert_eq!(remembered.boot, boot().unwrap());
        assert_eq!(remembered.mounts, [holders::mount_id(Path::new("/proc")).unwrap()]);
        // That one has its place.
        refuse_held(scratch.path()).unwrap();
        std::fs::write(&file, "{").unwrap();
        refuse_held(scratch.path()).unwrap_err();
    }
}
