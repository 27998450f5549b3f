//! What is written down of a restore that goes on while its server runs, and what a killed one has left mounted.
//!
//! `.walden/restore.json` has the plan, as of any restore, and `.walden/instant.json` the rest. Both lie beneath the mount:
//! while it is served nobody sees them, and its supervisor answers instead, at a socket whose name follows from the
//! directory's. A dead mount hides them too, and is taken away first. Only who began it goes on with it.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::disk::durable::{self, Create};
use crate::disk::{self, PrivateArea, private_area, state_file};
use crate::instance::clone_folder::{HydrateSpec, write_json};
use crate::instance::instant::InstantError;
use crate::instance::lazy_uppers::MountFailure;
use crate::mount::mounting;
use crate::repo::Repository;
use crate::repo::lease::Pin;
use crate::restore;
use crate::restore::plan::RestorePlan;
use crate::restore::run::read_unfinished;
use crate::restore::target::{INSTANT_FILE_NAME, MARKER_FILE_NAME, RestoreMarker, resolve};

/// How a restore goes on whose server runs before everything is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstantSpec {
    /// Version of this file, 1.
    pub format: u32,
    /// The site in the configuration.
    pub site: String,
    /// What keeps the basebackup; nothing where the store takes no writes.
    pub pin: Option<Pin>,
    /// How the rest of the basebackup comes.
    pub hydrate: HydrateSpec,
    /// Whether sessions are to open their files anew once everything is local.
    pub cut_over: bool,
    /// The major version of the cluster.
    pub major: u32,
    /// PostgreSQL's programs.
    pub bin_directory: PathBuf,
    /// The main configuration file, where it is not in PGDATA.
    pub config_file: Option<PathBuf>,
    /// Whether the first record about a page after a checkpoint brings the whole page.
    pub full_page_writes: bool,
    /// The role that initdb created.
    pub superuser: String,
    /// When it was begun.
    pub began_at: Timestamp,
}

/// An unfinished restore of this kind.
#[derive(Debug, Clone)]
pub struct Unfinished {
    /// What was decided.
    pub plan: RestorePlan,
    /// How it goes on.
    pub spec: InstantSpec,
}

/// What stands in a target.
#[derive(Debug)]
pub enum Found {
    /// A restore that goes on while its server runs.
    Instant(Box<Unfinished>),
    /// None of that kind; a plain one perhaps.
    Other,
    /// A data directory that was one, and of which only dead mounts were left.
    Plain,
}

/// Why the last supervisor ended, for whoever started it.
#[derive(Debug, Serialize, Deserialize)]
struct LastWords {
    message: String,
    #[serde(default)]
    damaged: bool,
}

const FORMAT: u32 = 1;
/// How often, and in what steps, a mount is looked at whose process does not answer and is not gone: for ten seconds.
const DYING_LOOKS_MAX: u32 = 200;
const DYING_LOOK: Duration = Duration::from_millis(50);
const LAST_WORDS_FILE: &str = "last.json";
const WHAT: &str = "how a restore goes on";

/// Looks what an earlier process has left in a target that nobody serves; dead mounts are taken away.
///
/// # Errors
/// Where a process has files of a dead mount open, a server runs, or somebody else began it.
pub fn find(target: &Path) -> Result<Found, InstantError> {
    let data = resolve(target);
    let was_mounted = detach_dead(&data)?;
    if was_mounted {
        detach_tablespaces(&data)?;
    }
    let Some(area) = PrivateArea::open(&data)? else {
        return Ok(if was_mounted { Found::Plain } else { Found::Other });
    };
    let path = area.directory().join(INSTANT_FILE_NAME);
    let (spec, author): (InstantSpec, _) = match state_file::read_owned_document(&path, WHAT) {
        Err(error) if error.is_not_found() => return Ok(Found::Other),
        read => read?,
    };
    if disk::Owner::current().is_root() && !author.is_root() {
        let author = author.user();
        return Err(restore::Error::OthersPlan { path: data, author }.into());
    }
    if spec.format != FORMAT {
        let detail = format!("it has format {}", spec.format);
        return Err(restore::Error::State { path, detail }.into());
    }
    let plan = read_unfinished(&data)?;
    for place in plan.destinations.tablespaces.values() {
        detach_dead(place)?;
    }
    Ok(Found::Instant(Box::new(Unfinished { plan, spec })))
}

/// Takes away what a killed process has left mounted at a place; true where something was.
fn detach_dead(place: &Path) -> Result<bool, InstantError> {
    let (mut found, mut looks) = (false, 0);
    // One over another, where somebody has mounted over a dead one.
    while mounting::is_own(place) {
        found = true;
        if mounting::is_dead(place) {
            mounting::detach_dead(place).map_err(MountFailure::Mount)?;
        } else if looks < DYING_LOOKS_MAX {
            // Nobody answers for it: a process that was killed goes in a moment, one that ends unmounts.
            looks += 1;
            std::thread::sleep(DYING_LOOK);
        } else {
            return Err(InstantError::Served(place.to_owned()));
        }
    }
    Ok(found)
}

/// Takes away the dead mounts of a plain directory's tablespaces, which its marker names.
fn detach_tablespaces(data: &Path) -> Result<(), InstantError> {
    let marker: Result<RestoreMarker, _> =
        state_file::read_document(&data.join(MARKER_FILE_NAME), "the marker of a restore");
    for place in marker.iter().flat_map(|marker| marker.destinations.tablespaces.values()) {
        detach_dead(place)?;
    }
    Ok(())
}

impl Unfinished {
    /// Writes down how it goes on from now.
    pub fn write_spec(&self) -> Result<(), InstantError> {
        write_spec(&self.plan, &self.spec)
    }

    /// Gives it up for another restore into the same directory: ends its pin, and has nobody take it for what it was.
    pub async fn give_up(&self, repository: &Repository) -> Result<(), InstantError> {
        for place in self.plan.destinations.tablespaces.values() {
            let area = place.join(private_area::DIRECTORY_NAME);
            match std::fs::remove_dir_all(&area) {
                Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                    return Err(disk::Error::Io { action: "remove", path: area, source }.into());
                }
                _ => {}
            }
        }
        if let Some(pin) = &self.spec.pin {
            pin.end(repository).await?;
        }
        let area = area_of(&self.plan.destinations.data);
        Ok(durable::remove_file(&area.join(INSTANT_FILE_NAME))?)
    }
}

/// Writes down how a restore goes on; its private area is there.
pub(super) fn write_spec(plan: &RestorePlan, spec: &InstantSpec) -> Result<(), InstantError> {
    Ok(write_json(&area_of(&plan.destinations.data).join(INSTANT_FILE_NAME), spec, WHAT)?)
}

/// Returns the private area of a directory.
pub(super) fn area_of(directory: &Path) -> PathBuf {
    directory.join(private_area::DIRECTORY_NAME)
}

/// Writes down why a supervisor ended; `data` leads beneath the mount.
pub(super) fn write_last_words(data: &Path, message: String, damaged: bool) -> Result<(), disk::Error> {
    let area = area_of(data);
    if !area.is_dir() {
        return Ok(());
    }
    write_json(&area.join(LAST_WORDS_FILE), &LastWords { message, damaged }, "why a restore stopped")
}

/// Reads why the last supervisor ended, and whether of damage; nothing where it was told to.
pub fn read_last_words(target: &Path) -> Option<(String, bool)> {
    let path = area_of(&resolve(target)).join(LAST_WORDS_FILE);
    let last: LastWords = state_file::read_document(&path, "why a restore stopped").ok()?;
    Some((last.message, last.damaged))
}

/// Forgets why the last supervisor ended.
pub(super) fn clear_last_words(data: &Path) -> Result<(), disk::Error> {
    durable::remove_file(&area_of(data).join(LAST_WORDS_FILE))
}

/// Returns where the supervisor of a target listens, below the run folder; the folder is made if need be.
pub fn control_socket(run: &Path, target: &Path) -> Result<PathBuf, disk::Error> {
    let folder = run.join("restores");
    durable::create_dir_all(&folder, Create::PRIVATE_DIRECTORY)?;
    Ok(folder.join(format!("{}.sock", name_of(target))))
}

/// Returns a short name that follows from a target's path: a socket's may have 107 bytes.
pub fn name_of(target: &Path) -> String {
    // FNV-1a: the same for every release, and nobody gains by a collision of paths that he may write to.
    let hash = resolve(target).as_os_str().as_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_one_name_however_it_is_written_and_others_have_others() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let name = name_of(&data);
        assert_eq!(name.len(), 16);
        assert_eq!(name_of(&scratch.path().join("data/")), name);
        std::os::unix::fs::symlink(&data, scratch.path().join("link")).unwrap();
        assert_eq!(name_of(&scratch.path().join("link")), name);
        assert_ne!(name_of(&scratch.path().join("data2")), name);
        let socket = control_socket(scratch.path(), &data).unwrap();
        assert!(socket.parent().unwrap().is_dir(), "{}", socket.display());
    }

    #[test]
    fn what_is_not_begun_is_no_restore_of_this_kind_and_a_newer_format_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        assert!(matches!(find(scratch.path()), Ok(Found::Other)));
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        assert!(matches!(find(scratch.path()), Ok(Found::Other)));
        let spec = r#"{"format":2,"site":"main","pin":null,"hydrate":{"in_background":true,"rate":null},
            "cut_over":false,"major":15,"bin_directory":"/b","config_file":null,"full_page_writes":true,"superuser":"postgres",
            "began_at":"2026-11-22T06:00:00Z"}"#;
        std::fs::write(area.directory().join(INSTANT_FILE_NAME), spec).unwrap();
        let refused = find(scratch.path()).unwrap_err();
        assert!(refused.to_string().contains("it has format 2"), "{refused}");
        assert!(refused.hint().unwrap().contains("release"), "{refused:?}");
    }

    #[test]
    fn the_last_words_are_read_until_they_are_forgotten() {
        let scratch = tempfile::tempdir().unwrap();
        write_last_words(scratch.path(), "nobody hears it".to_owned(), false).unwrap();
        assert!(read_last_words(scratch.path()).is_none());
        PrivateArea::create(scratch.path(), None).unwrap();
        write_last_words(scratch.path(), "the disk is full".to_owned(), true).unwrap();
        assert_eq!(read_last_words(scratch.path()), Some(("the disk is full".to_owned(), true)));
        clear_last_words(scratch.path()).unwrap();
        clear_last_words(scratch.path()).unwrap();
        assert!(read_last_words(scratch.path()).is_none());
    }
}
