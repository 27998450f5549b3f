//! Writes that survive a power cut: content first, then the name, then the directory that holds the name.
//!
//! Invariant: a function here that returns `Ok` has synced every file and every directory it changed, and a
//! reader at the final path sees the old content or the new one whole, never a part. Temporary names begin with
//! `.walden-tmp-` beside their target, so that a crash leaves something recognisable. Deliberately absent:
//! retries; a failed fsync is reported once and the caller must treat the content as lost.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::Error;
use crate::disk::owner::Owner;

/// The prefix of names that exist only while a file is being written.
pub const TEMPORARY_PREFIX: &str = ".walden-tmp-";

/// Mode and owner of what is created.
#[derive(Debug, Clone, Copy)]
pub struct Create {
    /// Permission bits, set whatever the umask is.
    pub mode: u32,
    /// The owner to give it to; `None` leaves the caller.
    pub owner: Option<Owner>,
}

impl Create {
    /// Private to the owner: 0600 for a file.
    pub const PRIVATE_FILE: Self = Self { mode: 0o600, owner: None };
    /// Private to the owner: 0700 for a directory.
    pub const PRIVATE_DIRECTORY: Self = Self { mode: 0o700, owner: None };

    /// Returns the same with another owner.
    pub fn owned_by(self, owner: Owner) -> Self {
        Self { owner: Some(owner), ..self }
    }
}

/// Writes a file so that `path` holds the old content or all of the new, even across a power cut.
pub fn write_file(path: &Path, content: &[u8], create: Create) -> Result<(), Error> {
    let temporary = write_temporary(path, content, create)?;
    if let Err(source) = fs::rename(&temporary, path) {
        let _ = fs::remove_file(&temporary);
        return Err(Error::at("rename a new file to", path)(source));
    }
    fsync_parent(path)
}

/// Writes a file that must not exist yet; of two callers exactly one succeeds.
///
/// The loser gets [`Error::Exists`] and the winner's content is never touched. A hard link publishes the name,
/// because `O_EXCL` at the final path would show an empty file to whoever looks in between.
pub fn create_file(path: &Path, content: &[u8], create: Create) -> Result<(), Error> {
    let temporary = write_temporary(path, content, create)?;
    let linked = fs::hard_link(&temporary, path);
    let _ = fs::remove_file(&temporary);
    match linked {
        Ok(()) => fsync_parent(path),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
            Err(Error::Exists { path: path.to_owned() })
        }
        Err(source) => Err(Error::at("create", path)(source)),
    }
}

/// Renames a file or directory and syncs both parents; the content must have been synced by whoever wrote it.
pub fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    fs::rename(from, to).map_err(Error::at("rename a file to", to))?;
    fsync_parent(to)?;
    if from.parent() != to.parent() { fsync_parent(from) } else { Ok(()) }
}

/// Removes a file; one that is not there is as good as removed.
pub fn remove_file(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Ok(()) => fsync_parent(path),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(Error::at("remove", path)(source)),
    }
}

/// Creates a directory and every missing one above it, each with the given mode and owner.
///
/// Directories that exist are left as they are. Each new one is synced into its parent before the next is made.
pub fn create_dir_all(path: &Path, create: Create) -> Result<(), Error> {
    let mut missing = Vec::new();
    let mut at = path;
    while !at.as_os_str().is_empty() && !at.is_dir() {
        missing.push(at);
        match at.parent() {
            Some(parent) => at = parent,
            None => break,
        }
    }
    for directory in missing.into_iter().rev() {
        create_dir(directory, create)?;
    }
    Ok(())
}

/// Creates one directory; one that is there already, perhaps made by another process just now, is left as it is.
pub fn create_dir(path: &Path, create: Create) -> Result<(), Error> {
    match create_new_dir(path, create) {
        Err(Error::Exists { .. }) if path.is_dir() => Ok(()),
        other => other,
    }
}

/// Creates a directory that must not exist yet; of two callers exactly one succeeds, the other gets
/// [`Error::Exists`].
pub fn create_new_dir(path: &Path, create: Create) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(create.mode).create(path) {
        Ok(()) => {}
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::Exists { path: path.to_owned() });
        }
        Err(source) => return Err(Error::at("create directory", path)(source)),
    }
    fs::set_permissions(path, Permissions::from_mode(create.mode))
        .map_err(Error::at("set the mode of", path))?;
    if let Some(owner) = create.owner {
        owner.give(path)?;
    }
    fsync_dir(path)?;
    fsync_parent(path)
}

/// Syncs a directory, so that the names in it survive a power cut.
pub fn fsync_dir(path: &Path) -> Result<(), Error> {
    let directory = File::open(path).map_err(Error::at("open directory", path))?;
    directory.sync_all().map_err(Error::at("fsync directory", path))
}

/// Syncs the directory that holds `path`.
pub fn fsync_parent(path: &Path) -> Result<(), Error> {
    fsync_dir(parent_of(path))
}

/// Syncs one file's content and metadata.
pub fn fsync_file(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::at("open", path))?;
    file.sync_all().map_err(Error::at("fsync", path))
}

/// Syncs the whole file system that holds `path`.
#[expect(unsafe_code, reason = "no wrapper for syncfs that takes a File")]
pub fn sync_file_system(path: &Path) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::at("open", path))?;
    // SAFETY: syncfs only needs a descriptor that stays open during the call, and `file` does.
    let outcome = unsafe { libc::syncfs(file.as_raw_fd()) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(Error::at("sync the file system of", path)(io::Error::last_os_error()))
    }
}

fn write_temporary(path: &Path, content: &[u8], create: Create) -> Result<PathBuf, Error> {
    let temporary = temporary_path(path);
    match fill_new_file(&temporary, content, create) {
        Ok(()) => Ok(temporary),
        Err(error) => {
            let _ = fs::remove_file(&temporary);
            Err(error)
        }
    }
}

/// Returns a name beside `path` that no other file of this process has.
pub(crate) fn temporary_path(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut name = OsString::from(format!(
        "{TEMPORARY_PREFIX}{}-{}-",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    // A long final name must not push the temporary one over NAME_MAX.
    let hint = path.file_name().unwrap_or_default().as_bytes();
    name.push(std::ffi::OsStr::from_bytes(&hint[..hint.len().min(64)]));
    parent_of(path).join(name)
}

fn fill_new_file(path: &Path, content: &[u8], create: Create) -> Result<(), Error> {
    // A leftover of a crashed process with our pid may lie at this name; nobody reads it.
    let _ = fs::remove_file(path);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(create.mode)
        .open(path)
        .map_err(Error::at("create", path))?;
    file.set_permissions(Permissions::from_mode(create.mode)).map_err(Error::at("set the mode of", path))?;
    if let Some(owner) = create.owner {
        owner.give(path)?;
    }
    file.write_all(content).map_err(Error::at("write", path))?;
    file.sync_all().map_err(Error::at("fsync", path))
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn write_replaces_and_leaves_no_temporary() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("state");
        write_file(&path, b"one", Create::PRIVATE_FILE).unwrap();
        write_file(&path, b"two", Create { mode: 0o640, owner: None }).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(names(scratch.path()), ["state"]);
    }

    #[test]
    fn create_never_touches_what_is_there() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("once");
        create_file(&path, b"first", Create::PRIVATE_FILE).unwrap();
        let second = create_file(&path, b"second", Create::PRIVATE_FILE);
        assert!(matches!(second, Err(Error::Exists { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(names(scratch.path()), ["once"]);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_names_the_path() {
        let scratch = tempfile::tempdir().unwrap();
        let error = write_file(&scratch.path().join("no/where"), b"x", Create::PRIVATE_FILE).unwrap_err();
        assert!(error.is_not_found());
        assert!(error.to_string().contains("no/"), "{error}");
        // Renaming a file over a directory fails after the temporary exists: it must be gone again.
        let taken = scratch.path().join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(write_file(&taken, b"x", Create::PRIVATE_FILE).is_err());
        assert_eq!(names(scratch.path()), ["taken"]);
    }

    #[test]
    fn directories_get_the_mode_whatever_the_umask() {
        let scratch = tempfile::tempdir().unwrap();
        let deep = scratch.path().join("a/b/c");
        create_dir_all(&deep, Create { mode: 0o777, owner: None }).unwrap();
        create_dir_all(&deep, Create::PRIVATE_DIRECTORY).unwrap();
        for path in [deep.as_path(), deep.parent().unwrap()] {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o777);
        }
    }

    #[test]
    fn rename_and_remove_work_across_directories() {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&to).unwrap();
        write_file(&from.join("f"), b"x", Create::PRIVATE_FILE).unwrap();
        rename(&from.join("f"), &to.join("g")).unwrap();
        assert_eq!((names(&from).len(), names(&to)), (0, vec!["g".to_owned()]));
        remove_file(&to.join("g")).unwrap();
        remove_file(&to.join("g")).unwrap();
        assert!(names(&to).is_empty());
        sync_file_system(scratch.path()).unwrap();
    }
}
