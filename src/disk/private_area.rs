//! `.walden/`: Walden's private area inside a directory that is not yet a whole data directory.
//!
//! It lies in an upper or in a restore's target, on the same file system, so that what it holds back can be
//! renamed into place. It holds:
//!
//! ```text
//! .walden/binding.json      the basebackup this directory belongs to
//! .walden/lock              held by the process that fills it
//! .walden/names.journal     names of the lower that are gone (mount::upper)
//! .walden/whole, sync-failed    everything is local and on stable storage; it may not be (mount::upper::stable)
//! .walden/held/…            PG_VERSION and pg_control, so that PostgreSQL refuses the bare directory
//! .walden/tmp/…             files on their way to their place; emptied by whoever opens it
//! ```
//!
//! A mount hides it, a backup skips it, completion removes it. Above it all is a user's: what is opened here is no link.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disk::Error;
use crate::disk::durable::{self, Create};
use crate::disk::lock::LockFile;
use crate::disk::owner::Owner;
use crate::disk::state_file;

/// The area's name in the directory it belongs to.
pub const DIRECTORY_NAME: &str = ".walden";

/// Which files are held back, relative to the data directory, and the names they wait under in `held/`.
///
/// PostgreSQL reads both before anything else; without them it refuses to start. The order is the order in which
/// they are released: `PG_VERSION` last, because both `postgres` and `pg_ctl` look for it first.
pub const HELD_BACK: [(&str, &str); 2] = [("global/pg_control", "pg_control"), ("PG_VERSION", "PG_VERSION")];

/// The name of the mark that says that everything is local and on stable storage: a mount makes it, a finalize asks
/// for it.
pub const WHOLE_MARK: &str = "whole";

/// The name of the mark that says that something was lost of what was written before everything was local.
pub const SYNC_FAILED_MARK: &str = "sync-failed";

/// The basebackup an incomplete directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// The basebackup's id.
    pub basebackup: String,
    /// The digest of its manifest in hex: the id alone could be forged or reused by a copied repository.
    pub manifest_digest: String,
    /// Which part of the basebackup: the data directory or one tablespace.
    pub part: String,
}

const LOCK_NAME: &str = "lock";

/// What a released area is called until it is removed: PostgreSQL's tools and Walden's backups leave out such a name.
const RELEASED_NAME: &str = "pgsql_tmp.walden";

/// Tells whether a crash has left something of an area of `parent` that was released already.
pub fn has_released(parent: &Path) -> bool {
    parent.join(RELEASED_NAME).is_dir()
}

/// Removes what a crash has left of an area of `parent` that was released already.
pub fn clear_released(parent: &Path) -> Result<(), Error> {
    ReleaseStep::Remove { directory: parent.join(RELEASED_NAME) }.take()
}

/// One step of a release, which may be taken again.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ReleaseStep {
    /// A held-back file comes to its place, unless it is there.
    Place { held: PathBuf, place: PathBuf },
    /// The area ceases to be one.
    Withdraw { area: PathBuf, to: PathBuf },
    /// A directory is removed, if there is one.
    Remove { directory: PathBuf },
}

impl ReleaseStep {
    fn take(&self) -> Result<(), Error> {
        match self {
            Self::Place { held, place } if held.exists() => {
                durable::fsync_file(held)?;
                durable::rename(held, place)
            }
            Self::Place { .. } => Ok(()),
            Self::Withdraw { area, to } => durable::rename(area, to),
            Self::Remove { directory } => match fs::remove_dir_all(directory) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    Err(Error::at("remove", directory)(source))
                }
                _ => durable::fsync_parent(directory),
            },
        }
    }
}

/// The private area of one directory.
#[derive(Debug, Clone)]
pub struct PrivateArea {
    directory: PathBuf,
}

impl PrivateArea {
    /// Opens the area of `parent`, creating what is missing of it.
    pub fn create(parent: &Path, owner: Option<Owner>) -> Result<Self, Error> {
        let area = Self { directory: parent.join(DIRECTORY_NAME) };
        let create = Create { owner, ..Create::PRIVATE_DIRECTORY };
        for directory in [area.directory.clone(), area.held_directory(), area.temporary_directory()] {
            durable::create_dir(&directory, create)?;
            let made = fs::symlink_metadata(&directory).map_err(Error::at("stat", &directory))?;
            check_directory(&directory, &made)?;
        }
        Ok(area)
    }

    /// Opens the area of `parent` as it is, or returns `None` where the directory has none.
    pub fn open(parent: &Path) -> Result<Option<Self>, Error> {
        let directory = parent.join(DIRECTORY_NAME);
        match fs::symlink_metadata(&directory) {
            Ok(found) => check_directory(&directory, &found).map(|()| Some(Self { directory })),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::at("stat", &directory)(source)),
        }
    }

    /// Locks the area for this process; the lock ends when the value is dropped.
    pub fn lock(&self) -> Result<LockFile, Error> {
        LockFile::acquire(&self.directory.join(LOCK_NAME))
    }

    /// Removes what a crash left of files on their way; only for who holds the lock.
    pub fn clear_temporary(&self, _held: &LockFile) -> Result<(), Error> {
        let path = self.temporary_directory();
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(&path);
        let opened = opened.map_err(Error::at("open directory", &path))?;
        let path = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
        clear_but(&path, None)
    }

    /// Removes everything but the lock, which says of another restore how far that one came; only for who holds it.
    pub fn clear(&self, _held: &LockFile) -> Result<(), Error> {
        clear_but(&self.directory, Some(LOCK_NAME))
    }

    /// Removes the area of `parent`, if there is one, with all that it holds; only for who begins anew there.
    pub fn discard(parent: &Path) -> Result<(), Error> {
        ReleaseStep::Remove { directory: parent.join(DIRECTORY_NAME) }.take()
    }

    /// Binds the directory to a basebackup, or checks that it is bound to this very one.
    pub fn bind(&self, wanted: &Binding) -> Result<(), Error> {
        let path = self.binding_path();
        if let Some(found) = self.binding()? {
            if found == *wanted {
                return Ok(());
            }
            let describe =
                |b: &Binding| format!("{} ({}, manifest {})", b.basebackup, b.part, b.manifest_digest);
            return Err(Error::BoundElsewhere { path, found: describe(&found), wanted: describe(wanted) });
        }
        let text = serde_json::to_vec_pretty(wanted).expect("strings always serialize");
        durable::create_file(&path, &text, Create::PRIVATE_FILE)
    }

    /// Forgets which basebackup the directory belongs to, for who replaces what is in it.
    pub fn unbind(&self) -> Result<(), Error> {
        durable::remove_file(&self.binding_path())
    }

    /// Returns the basebackup this directory is bound to, if it is.
    pub fn binding(&self) -> Result<Option<Binding>, Error> {
        match state_file::read_document(&self.binding_path(), "the binding to a basebackup") {
            Err(error) if error.is_not_found() => Ok(None),
            read => read.map(Some),
        }
    }

    /// Renames the held-back files into place and removes the area: the directory is then an ordinary one.
    ///
    /// Everything else must be there and synced. Safe to repeat after a crash at any point.
    pub fn release(self) -> Result<(), Error> {
        self.release_steps().iter().try_for_each(ReleaseStep::take)
    }

    /// Returns what a release does, in order; a crash may come before, between and within the steps.
    ///
    /// The area goes in one step. With part of it gone it would say that work is left to be done, and not which.
    fn release_steps(&self) -> Vec<ReleaseStep> {
        let parent = self.directory.parent().expect("the area was built by joining its name to a parent");
        let held = HELD_BACK.iter().map(|(place, name)| ReleaseStep::Place {
            held: self.held_directory().join(name),
            place: parent.join(place),
        });
        let released = parent.join(RELEASED_NAME);
        let last = [
            // What a crash has left of an earlier area.
            ReleaseStep::Remove { directory: released.clone() },
            ReleaseStep::Withdraw { area: self.directory.clone(), to: released.clone() },
            ReleaseStep::Remove { directory: released },
        ];
        held.chain(last).collect()
    }

    /// Returns the area's own directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the directory of the files held back.
    pub fn held_directory(&self) -> PathBuf {
        self.directory.join("held")
    }

    /// Returns the directory of files on their way to their place.
    pub fn temporary_directory(&self) -> PathBuf {
        self.directory.join("tmp")
    }

    /// Returns the journal of names that are gone.
    pub fn names_journal(&self) -> PathBuf {
        self.directory.join("names.journal")
    }

    fn binding_path(&self) -> PathBuf {
        self.directory.join("binding.json")
    }
}

/// Refuses what is no directory, such as a link to one.
fn check_directory(path: &Path, found: &fs::Metadata) -> Result<(), Error> {
    match found.is_dir() {
        true => Ok(()),
        false => Err(Error::at("open directory", path)(io::ErrorKind::NotADirectory.into())),
    }
}

/// Removes what is in a directory, but for one name; no link is followed.
fn clear_but(directory: &Path, spared: Option<&str>) -> Result<(), Error> {
    for entry in fs::read_dir(directory).map_err(Error::at("open directory", directory))? {
        let entry = entry.map_err(Error::at("read directory", directory))?;
        if spared.is_some_and(|spared| entry.file_name() == OsStr::new(spared)) {
            continue;
        }
        let left = entry.path();
        let removed = if left.is_dir() && !left.is_symlink() {
            fs::remove_dir_all(&left)
        } else {
            fs::remove_file(&left)
        };
        removed.map_err(Error::at("remove", &left))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binding(id: &str) -> Binding {
        Binding { basebackup: id.into(), manifest_digest: "ab12".into(), part: "data".into() }
    }

    #[test]
    fn an_area_keeps_its_binding_and_refuses_another() {
        let scratch = tempfile::tempdir().unwrap();
        assert!(PrivateArea::open(scratch.path()).unwrap().is_none());
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        area.bind(&binding("20261120T101500Z-3fa9")).unwrap();
        fs::write(area.temporary_directory().join("left over"), b"x").unwrap();

        let again = PrivateArea::create(scratch.path(), None).unwrap();
        again.clear_temporary(&again.lock().unwrap()).unwrap();
        assert_eq!(fs::read_dir(again.temporary_directory()).unwrap().count(), 0);
        again.bind(&binding("20261120T101500Z-3fa9")).unwrap();
        let refused = again.bind(&binding("20261121T101500Z-0000")).unwrap_err();
        assert!(matches!(refused, Error::BoundElsewhere { .. }));
        assert!(refused.to_string().contains("20261120T101500Z-3fa9"), "{refused}");
        again.unbind().unwrap();
        again.bind(&binding("20261121T101500Z-0000")).unwrap();
    }

    #[test]
    fn a_link_in_the_stead_of_a_directory_is_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let (parent, theirs) = (scratch.path().join("data"), scratch.path().join("theirs"));
        for directory in [&parent, &theirs] {
            fs::create_dir(directory).unwrap();
        }
        fs::write(theirs.join("file"), b"x").unwrap();
        let area = PrivateArea::create(&parent, None).unwrap();
        let lock = area.lock().unwrap();
        fs::remove_dir(area.temporary_directory()).unwrap();
        std::os::unix::fs::symlink(&theirs, area.temporary_directory()).unwrap();
        area.clear_temporary(&lock).unwrap_err();
        PrivateArea::create(&parent, None).unwrap_err();
        fs::remove_dir_all(area.directory()).unwrap();
        std::os::unix::fs::symlink(&theirs, area.directory()).unwrap();
        PrivateArea::create(&parent, None).unwrap_err();
        PrivateArea::open(&parent).unwrap_err();
        PrivateArea::discard(&parent).unwrap();
        assert_eq!(names(&theirs), ["file"]);
        assert!(PrivateArea::open(&parent).unwrap().is_none());
    }

    #[test]
    fn what_an_earlier_restore_has_left_goes_and_the_lock_stays() {
        let scratch = tempfile::tempdir().unwrap();
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        let lock = area.lock().unwrap();
        for left in ["names.journal", WHOLE_MARK, "held/pg_control"] {
            fs::write(area.directory().join(left), b"x").unwrap();
        }
        area.clear(&lock).unwrap();
        assert_eq!(names(area.directory()), ["lock"]);
        assert!(matches!(area.lock(), Err(Error::Locked { .. })), "it is the same lock");
        PrivateArea::discard(scratch.path()).unwrap();
        PrivateArea::discard(scratch.path()).unwrap();
        assert!(PrivateArea::open(scratch.path()).unwrap().is_none());
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn one_process_at_a_time_fills_a_directory() {
        let scratch = tempfile::tempdir().unwrap();
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        let held = area.lock().unwrap();
        assert!(matches!(area.lock(), Err(Error::Locked { .. })));
        drop(held);
        area.lock().unwrap();
    }

    #[test]
    fn release_puts_held_files_in_place_and_can_be_repeated() {
        let scratch = tempfile::tempdir().unwrap();
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        fs::create_dir(scratch.path().join("global")).unwrap();
        fs::write(area.held_directory().join("PG_VERSION"), b"15\n").unwrap();
        // As after a crash between the two renames.
        fs::write(scratch.path().join("global/pg_control"), b"control").unwrap();
        area.release().unwrap();
        assert_eq!(fs::read(scratch.path().join("PG_VERSION")).unwrap(), b"15\n");
        assert_eq!(fs::read(scratch.path().join("global/pg_control")).unwrap(), b"control");
        assert!(PrivateArea::open(scratch.path()).unwrap().is_none());
    }

    /// Whatever is done by then, an area that is there is whole, and the release can be repeated.
    #[test]
    fn a_crash_between_any_two_steps_of_a_release_leaves_a_whole_area_or_none() {
        let steps_of = |scratch: &Path| PrivateArea::open(scratch).unwrap().map(|area| area.release_steps());
        for crash in 0..=5 {
            let scratch = tempfile::tempdir().unwrap();
            let area = PrivateArea::create(scratch.path(), None).unwrap();
            fs::create_dir(scratch.path().join("global")).unwrap();
            fs::write(area.held_directory().join("PG_VERSION"), b"15\n").unwrap();
            fs::write(area.held_directory().join("pg_control"), b"control").unwrap();
            area.bind(&binding("x")).unwrap();
            let steps = steps_of(scratch.path()).unwrap();
            assert_eq!(steps.len(), 5);
            steps[..crash].iter().for_each(|step| step.take().unwrap());
            let may_start =
                ["PG_VERSION", "global/pg_control"].iter().all(|name| scratch.path().join(name).exists());
            match PrivateArea::open(scratch.path()).unwrap() {
                Some(area) => {
                    assert_eq!(area.binding().unwrap(), Some(binding("x")), "{crash}");
                    assert!(area.held_directory().is_dir() && area.temporary_directory().is_dir(), "{crash}");
                    area.release().unwrap();
                }
                None => assert!(may_start, "{crash}"),
            }
            assert_eq!(fs::read(scratch.path().join("PG_VERSION")).unwrap(), b"15\n", "{crash}");
            assert_eq!(fs::read(scratch.path().join("global/pg_control")).unwrap(), b"control", "{crash}");
            assert!(steps_of(scratch.path()).is_none(), "{crash}");
        }
    }

    #[test]
    fn a_damaged_binding_is_an_error_not_a_new_binding() {
        let scratch = tempfile::tempdir().unwrap();
        let area = PrivateArea::create(scratch.path(), None).unwrap();
        fs::write(area.directory().join("binding.json"), b"{").unwrap();
        assert!(matches!(area.bind(&binding("x")), Err(Error::Malformed { .. })));
    }
}
