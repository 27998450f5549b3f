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
use crate::instance::instant::boot_unit::Systemd;
use crate::instance::instant::{InstantError, remembered};
use crate::instance::lazy_uppers::MountFailure;
use crate::mount::mounting;
use crate::mount::upper::forget_origins;
use crate::repo::Repository;
use crate::repo::lease::Pin;
use crate::restore;
use crate::restore::destinations::Destinations;
use crate::restore::plan::RestorePlan;
use crate::restore::run::{COMPLETE_FILE, read_plan, read_unfinished};
use crate::restore::target::{INSTANT_FILE_NAME, MARKER_FILE_NAME, RestoreMarker, STATE_FILE_NAME, resolve};

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
    /// One whose directory is plain, and which has not been tidied; its server may run.
    Ended(Box<Unfinished>),
    /// None of that kind; a plain one perhaps.
    Other,
    /// A data directory that was one, and of which only dead mounts were left.
    Plain,
}

/// Why the last supervisor ended, for whoever started it; nothing is written where it was told to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastWords {
    /// What it means to a caller, by the name that JSON has for that.
    pub kind: String,
    /// What failed.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

const FORMAT: u32 = 1;
/// How often, and in what steps, a mount is looked at whose process does not answer and is not gone: for ten seconds.
const DYING_LOOKS_MAX: u32 = 200;
const DYING_LOOK: Duration = Duration::from_millis(50);
/// Each user's folder of sockets is named by its number.
const FOLDER_PREFIX: &str = "restores-";
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
        // Killed on the last step of all.
        let was_released = private_area::has_released(&data);
        if was_released {
            private_area::clear_released(&data)?;
        }
        return Ok(if was_mounted || was_released { Found::Plain } else { Found::Other });
    };
    let Some(spec) = read_spec(&data)? else { return Ok(Found::Other) };
    // Before it had begun, it ended.
    if !area.directory().join(STATE_FILE_NAME).exists() {
        return Ok(Found::Other);
    }
    let has_ended = is_plain(&data, &area);
    if !has_ended {
        remembered::refuse_held(&data)?;
    }
    let plan = if has_ended { read_plan(&data)? } else { read_unfinished(&data)? };
    for place in plan.destinations.tablespaces.values() {
        detach_dead(place)?;
    }
    let unfinished = Box::new(Unfinished { plan, spec });
    Ok(if has_ended { Found::Ended(unfinished) } else { Found::Instant(unfinished) })
}

/// Tells whether the mount of a restore lies on a target whose process has died; of one that only reads nothing is told.
///
/// What it hides is not seen, so it may be a data directory by now that only was restored: `--resume` tells.
pub fn is_left_dead(target: &Path) -> bool {
    let data = resolve(target);
    mounting::is_own_writable(&data) && mounting::is_dead(&data)
}

/// Tells whether a target over which nothing is mounted is an ordinary data directory, tidied or not.
pub fn has_become_plain(target: &Path) -> bool {
    let data = resolve(target);
    if mounting::is_own(&data) {
        return false;
    }
    match PrivateArea::open(&data) {
        Ok(Some(area)) => is_plain(&data, &area),
        Ok(None) => private_area::HELD_BACK.iter().all(|(place, _)| data.join(place).exists()),
        Err(_) => false,
    }
}

/// Tells whether a data directory needs nobody any more, though its area is still there. It is never mounted over again:
/// what its server has dropped since then stands in no journal, and would be seen in the basebackup.
fn is_plain(data: &Path, area: &PrivateArea) -> bool {
    let has = |name: &str| area.directory().join(name).exists();
    let placed = |(place, name): &(&str, &str)| {
        data.join(place).exists() && !area.held_directory().join(name).exists()
    };
    has(COMPLETE_FILE) || (has(private_area::WHOLE_MARK) && private_area::HELD_BACK.iter().all(placed))
}

/// Reads how a restore goes on, of a directory over which nothing is mounted; nothing where it is none of this kind.
pub(super) fn read_spec(data: &Path) -> Result<Option<InstantSpec>, InstantError> {
    let path = area_of(data).join(INSTANT_FILE_NAME);
    let (spec, author): (InstantSpec, disk::Owner) = match state_file::read_owned_document(&path, WHAT) {
        Err(error) if error.is_not_found() => return Ok(None),
        read => read?,
    };
    if disk::Owner::current().is_root() && !author.is_root() {
        let (path, author) = (data.to_owned(), author.user());
        return Err(restore::Error::OthersPlan { path, author }.into());
    }
    if spec.format != FORMAT {
        let detail = format!("it has format {}", spec.format);
        return Err(restore::Error::State { path, detail }.into());
    }
    Ok(Some(spec))
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
        let path = area_of(&self.plan.destinations.data).join(INSTANT_FILE_NAME);
        Ok(write_json(&path, &self.spec, WHAT)?)
    }

    /// Gives it up for another restore into the same directory: ends its pin, and has nobody take it for what it was.
    ///
    /// The pin comes first: where the store does not answer all is as before. What has lost a part of it is not gone on with.
    pub async fn give_up(&self, repository: &Repository) -> Result<(), InstantError> {
        if let Some(pin) = &self.spec.pin {
            pin.end(repository).await?;
        }
        let Destinations { data, tablespaces, .. } = &self.plan.destinations;
        for place in tablespaces.values() {
            PrivateArea::discard(place)?;
        }
        // What the other restore keeps of it must not say where in this basebackup it came from.
        for place in std::iter::once(data).chain(tablespaces.values()) {
            forget_origins(place).map_err(disk::Error::at("forget the origins in", place))?;
        }
        if let Err(error) = Systemd::of_host().remove(data) {
            tracing::warn!("could not remove the unit that mounts at boot: {error}");
        }
        Ok(durable::remove_file(&area_of(data).join(INSTANT_FILE_NAME))?)
    }
}

impl LastWords {
    /// Writes them down in a target over which nothing is mounted, and that has an area of its own.
    pub fn write(&self, target: &Path) -> Result<(), disk::Error> {
        match Self::file(target)? {
            Some(file) => write_json(&file, self, "why a restore stopped"),
            None => Ok(()),
        }
    }

    /// Reads those of the last supervisor, if there are any.
    pub fn read(target: &Path) -> Option<Self> {
        let file = Self::file(target).ok()??;
        state_file::read_document(&file, "why a restore stopped").ok()
    }

    /// Forgets them.
    pub fn clear(target: &Path) -> Result<(), disk::Error> {
        Self::file(target)?.map_or(Ok(()), |file| durable::remove_file(&file))
    }

    /// Returns their place; the area is no link that the owner of the directory has put there.
    fn file(target: &Path) -> Result<Option<PathBuf>, disk::Error> {
        let area = PrivateArea::open(&resolve(target))?;
        Ok(area.map(|area| area.directory().join(LAST_WORDS_FILE)))
    }
}

/// Returns the private area of a directory.
pub(super) fn area_of(directory: &Path) -> PathBuf {
    directory.join(private_area::DIRECTORY_NAME)
}

/// Returns where the supervisor of a target listens, below the run folder, in this user's own folder there, which is made
/// if need be: who comes first would shut out everybody else.
pub fn control_socket(run: &Path, target: &Path) -> Result<PathBuf, disk::Error> {
    let folder = run.join(format!("{FOLDER_PREFIX}{}", disk::Owner::current().uid));
    durable::create_dir_all(&folder, Create::PRIVATE_DIRECTORY)?;
    Ok(folder.join(socket_name(target)))
}

/// Returns where the supervisor of a target is asked: this user's, or another's where root finds only such a one.
pub fn socket_to_ask(run: &Path, target: &Path) -> Result<PathBuf, disk::Error> {
    let own = control_socket(run, target)?;
    if own.exists() || !disk::Owner::current().is_root() {
        return Ok(own);
    }
    Ok(sockets_of_others(run, target).next().unwrap_or(own))
}

/// Finds sockets for a target in everybody's folders.
fn sockets_of_others(run: &Path, target: &Path) -> impl Iterator<Item = PathBuf> {
    let name = socket_name(target);
    let entries = std::fs::read_dir(run).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_name().as_bytes().starts_with(FOLDER_PREFIX.as_bytes()));
    folders.map(move |folder| folder.path().join(&name)).filter(|path| path.exists())
}

fn socket_name(target: &Path) -> String {
    format!("{}.sock", name_of(target))
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
    fn each_user_has_a_folder_of_sockets_and_root_finds_those_of_others() {
        let scratch = tempfile::tempdir().unwrap();
        let (run, target) = (scratch.path(), Path::new("/srv/data"));
        let own = control_socket(run, target).unwrap();
        let user = disk::Owner::current();
        assert!(own.starts_with(run.join(format!("restores-{}", user.uid))), "{}", own.display());
        assert_eq!(socket_to_ask(run, target).unwrap(), own);
        let others = run.join("restores-4294967294");
        std::fs::create_dir(&others).unwrap();
        let theirs = others.join(own.file_name().unwrap());
        std::fs::write(&theirs, "").unwrap();
        let asked = if user.is_root() { &theirs } else { &own };
        assert_eq!(&socket_to_ask(run, target).unwrap(), asked);
        assert_eq!(socket_to_ask(run, Path::new("/srv/other")).unwrap().parent(), own.parent());
        std::fs::write(&own, "").unwrap();
        assert_eq!(socket_to_ask(run, target).unwrap(), own);
    }

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
    fn what_a_kill_on_the_last_step_has_left_is_removed_once() {
        let scratch = tempfile::tempdir().unwrap();
        let released = scratch.path().join("pgsql_tmp.walden");
        std::fs::create_dir_all(released.join("held")).unwrap();
        assert!(matches!(find(scratch.path()), Ok(Found::Plain)));
        assert!(!released.exists());
        assert!(matches!(find(scratch.path()), Ok(Found::Other)));
    }

    #[test]
    fn a_directory_is_plain_once_both_files_are_in_their_places_and_not_before() {
        let scratch = tempfile::tempdir().unwrap();
        let data = scratch.path();
        let area = PrivateArea::create(data, None).unwrap();
        std::fs::create_dir(data.join("global")).unwrap();
        let write = |path: PathBuf| std::fs::write(path, b"x").unwrap();
        for (_, name) in private_area::HELD_BACK {
            write(area.held_directory().join(name));
        }
        for (place, name) in private_area::HELD_BACK {
            assert!(!is_plain(data, &area) && !has_become_plain(data), "{place}");
            std::fs::rename(area.held_directory().join(name), data.join(place)).unwrap();
        }
        assert!(!is_plain(data, &area), "somebody may have put them there");
        write(area.directory().join(private_area::WHOLE_MARK));
        assert!(is_plain(data, &area));
        std::fs::remove_file(data.join("PG_VERSION")).unwrap();
        assert!(!is_plain(data, &area));
        write(area.directory().join(COMPLETE_FILE));
        assert!(is_plain(data, &area) && has_become_plain(data));
        PrivateArea::discard(data).unwrap();
        assert!(!has_become_plain(data), "one of them is gone");
        write(data.join("PG_VERSION"));
        assert!(has_become_plain(data));
    }

    #[test]
    fn the_last_words_are_read_until_they_are_forgotten() {
        let scratch = tempfile::tempdir().unwrap();
        let (target, message) = (scratch.path().join("data"), "the disk is full".to_owned());
        let words = LastWords { kind: "failed".to_owned(), message, hint: Some("Make room.".to_owned()) };
        std::fs::create_dir(&target).unwrap();
        words.write(&target).unwrap();
        assert!(LastWords::read(&target).is_none(), "nobody hears it");
        // What its owner leads elsewhere is left alone there.
        let (outside, area) = (scratch.path().join("outside"), target.join(private_area::DIRECTORY_NAME));
        std::fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, &area).unwrap();
        words.write(&target).unwrap_err();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        std::fs::remove_file(&area).unwrap();
        PrivateArea::create(&target, None).unwrap();
        words.write(&target).unwrap();
        assert_eq!(LastWords::read(&target), Some(words));
        LastWords::clear(&target).unwrap();
        LastWords::clear(&target).unwrap();
        assert!(LastWords::read(&target).is_none());
    }
}
