//! Writing an object so that it appears whole and stays, and removing one.
//!
//! stage (create exclusively, write, sync) → move to the key without replacing → sync the folder. A crash
//! before the move leaves a staged file, which `sweep_staging` clears a day later; a crash after it leaves
//! a whole object.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, fsync, linkat, unlinkat};

use super::super::error::{Error, ErrorKind, Verb};
use super::super::key::ObjectKey;
use super::errno::{error_of, io_error_of};
use super::folder::Root;
use super::{is_regular, modified_of};

/// Where unfinished objects lie, below the root; no object key begins with a dot.
const STAGING: &str = ".staging";

/// How old a staged file must be before it counts as left behind: no create takes this long.
const STAGED_AGE_MAX: SignedDuration = SignedDuration::from_hours(24);

/// How often a create starts again because a folder it had opened was removed under it.
const ATTEMPTS_MAX: usize = 16;

/// Most names tried for a staged file, should earlier processes of our number have left theirs.
const STAGED_NAMES_MAX: usize = 4096;

static STAGED: AtomicU64 = AtomicU64::new(0);

/// Creates an object.
pub(super) fn create(root: &Root, key: &ObjectKey, body: &Bytes) -> Result<(), Error> {
    let failed = |errno| error_of(Verb::Create, key.as_str(), errno);
    root.check_present(Verb::Create, key.as_str())?;
    let staging = root.open_or_create(root.fd(), STAGING).map_err(failed)?;
    let staged = Staged::write(root, staging.as_fd(), key, body)?;
    let mut outcome = Err(Errno::ENOENT);
    for _ in 0..ATTEMPTS_MAX {
        outcome = move_to_key(root, &staged, key);
        match outcome {
            // The folder was empty and a delete removed it between our opening it and our moving into it.
            Err(Errno::ENOENT) => root.forget_folder(folder_of(key)),
            _ => break,
        }
    }
    match outcome {
        Ok(Moved::Created) => Ok(()),
        Ok(Moved::Taken) => Err(Error::AlreadyExists { key: key.to_string() }),
        Ok(Moved::Unsynced(errno)) => {
            let source = Some(Arc::new(std::io::Error::from(errno)) as _);
            Err(Error::OutcomeUnknown { key: key.to_string(), source })
        }
        Err(errno) => Err(refusal(root, key, errno)),
    }
}

/// Says whether a move that failed this way may have happened: the other end of a network file system went
/// away.
fn may_have_moved(error: &Error, errno: Errno) -> bool {
    error.kind() == ErrorKind::Unreachable || errno == Errno::EIO
}

/// Deletes an object, and the folders it leaves empty.
pub(super) fn delete(root: &Root, key: &ObjectKey) -> Result<(), Error> {
    let failed = |errno| error_of(Verb::Delete, key.as_str(), errno);
    let folder = match root.open_folder(folder_of(key)) {
        Ok(folder) => folder,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return root.check_present(Verb::Delete, key.as_str()),
        Err(errno) => return Err(failed(errno)),
    };
    match unlinkat(&folder, key.name(), UnlinkatFlags::NoRemoveDir) {
        Ok(()) => fsync(&folder).map_err(failed)?,
        Err(Errno::ENOENT) => (),
        Err(errno) => return Err(failed(errno)),
    }
    drop(folder);
    root.remove_empty_folders(folder_of(key)).map_err(failed)
}

/// Removes what creates that never ended left behind; best effort, for a reader may lack the right.
pub(super) fn sweep_staging(root: &Root, now: Timestamp) {
    let Ok(mut staging) = root.open_folder(STAGING).and_then(Dir::from_fd) else { return };
    let mut names = Vec::new();
    for entry in staging.iter().flatten() {
        names.push(entry.file_name().to_owned());
    }
    for name in names {
        let Ok(found) = fstatat(&staging, name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else { continue };
        if !is_regular(&found) || now.duration_since(modified_of(&found)) < STAGED_AGE_MAX {
            continue;
        }
        match unlinkat(&staging, name.as_c_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) => tracing::info!(?name, "removed what a create that never ended had staged"),
            Err(errno) => tracing::debug!(?name, %errno, "could not remove a staged file"),
        }
    }
}

/// A file that is written and synced but has no key yet; removed when dropped.
struct Staged<'a> {
    folder: BorrowedFd<'a>,
    name: String,
    file: File,
}

impl<'a> Staged<'a> {
    fn write(root: &Root, folder: BorrowedFd<'a>, key: &ObjectKey, body: &Bytes) -> Result<Self, Error> {
        let mut staged = Self::create(folder).map_err(|errno| error_of(Verb::Create, key.as_str(), errno))?;
        root.adopt_file(staged.file.as_fd()).map_err(|errno| error_of(Verb::Create, key.as_str(), errno))?;
        let written = staged.file.write_all(body).and_then(|()| staged.file.sync_all());
        written.map_err(|error| io_error_of(Verb::Create, key.as_str(), error))?;
        Ok(staged)
    }

    fn create(folder: BorrowedFd<'a>) -> Result<Self, Errno> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        for _ in 0..STAGED_NAMES_MAX {
            // Exclusive creation makes it ours; the number only makes a clash rare.
            let name = format!("{}-{}", std::process::id(), STAGED.fetch_add(1, Ordering::Relaxed));
            match openat(folder, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR) {
                Ok(fd) => return Ok(Self { folder, name, file: File::from(fd) }),
                Err(Errno::EEXIST) => (),
                Err(errno) => return Err(errno),
            }
        }
        Err(Errno::EEXIST)
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        // After a move there is nothing under this name, and what cannot be removed now is swept later.
        let _ = unlinkat(self.folder, self.name.as_str(), UnlinkatFlags::NoRemoveDir);
    }
}

enum Moved {
    Created,
    Taken,
    /// In place, but perhaps not for ever.
    Unsynced(Errno),
}

fn move_to_key(root: &Root, staged: &Staged<'_>, key: &ObjectKey) -> Result<Moved, Errno> {
    let folder = root.durable_folder(folder_of(key))?;
    match move_without_replacing(staged, folder.as_fd(), key.name()) {
        Ok(()) => Ok(fsync(folder.as_fd()).map_or_else(Moved::Unsynced, |()| Moved::Created)),
        Err(Errno::EEXIST) => {
            if !is_regular(&fstatat(folder.as_fd(), key.name(), AtFlags::empty())?) {
                return Err(Errno::EISDIR);
            }
            // The winner may not have come to its own sync yet, and our caller may act on what it finds
            // there: a segment that is already archived is one PostgreSQL may remove.
            fsync(folder.as_fd())?;
            Ok(Moved::Taken)
        }
        Err(errno) => Err(errno),
    }
}

fn move_without_replacing(staged: &Staged<'_>, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    let from = staged.name.as_str();
    match renameat2(staged.folder, from, folder, name, RenameFlags::RENAME_NOREPLACE) {
        // NFS and some others know no such flag; every one of those can link.
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => link(staged, folder, name),
        outcome => outcome,
    }
}

fn link(staged: &Staged<'_>, folder: BorrowedFd<'_>, name: &str) -> Result<(), Errno> {
    match linkat(staged.folder, staged.name.as_str(), folder, name, AtFlags::empty()) {
        // A repeated NFS request finds the link its first sending made; two names say that it is ours.
        Err(Errno::EEXIST) if fstat(&staged.file)?.st_nlink == 2 => Ok(()),
        outcome => outcome,
    }
}

/// Words what kept a staged object from its key, plainly where an administrator can do something about it.
fn refusal(root: &Root, key: &ObjectKey, errno: Errno) -> Error {
    let folder = root.path().join(folder_of(key));
    let why = match errno {
        Errno::EXDEV => {
            format!("\"{}\" lies on another file system than the repository's root", folder.display())
        }
        Errno::ENOTDIR | Errno::EISDIR => {
            format!("an object and a folder share a name at or above \"{key}\"")
        }
        Errno::EMLINK | Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP => {
            "the file system can neither rename without replacing nor link".to_owned()
        }
        _ => {
            let error = error_of(Verb::Create, key.as_str(), errno);
            if may_have_moved(&error, errno) {
                return Error::OutcomeUnknown { key: key.to_string(), source: Some(Arc::new(error)) };
            }
            return error;
        }
    };
    Error::Invalid { key: key.to_string(), reason: format!("could not create {key}: {why}"), source: None }
}

fn folder_of(key: &ObjectKey) -> &str {
    key.as_str().rsplit_once('/').map_or("", |(folder, _)| folder)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    /// The way taken on NFS, which this machine does not have.
    #[test]
    fn linking_does_not_replace_and_knows_its_own_repetition() {
        let folder = TempDir::new().unwrap();
        let root = Root::open(folder.path()).unwrap();
        let staging = root.open_or_create(root.fd(), STAGING).unwrap();
        let key = ObjectKey::parse("a").unwrap();
        let stage = |body| Staged::write(&root, staging.as_fd(), &key, &Bytes::from_static(body)).unwrap();

        let first = stage(b"first");
        link(&first, root.fd(), "a").unwrap();
        link(&first, root.fd(), "a").expect("a repeated request finds its own link");
        let second = stage(b"second");
        assert_eq!(link(&second, root.fd(), "a"), Err(Errno::EEXIST));
        drop((first, second));
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"first");
        assert_eq!(fs::read_dir(folder.path().join(STAGING)).unwrap().count(), 0);
    }
}
