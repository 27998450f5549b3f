//! The repository's root folder and the folders below it: opened, created durably, removed when empty.
//!
//! An object survives a loss of power only if every folder on the way to it does. Whoever creates a folder
//! syncs the one that holds it; another process may rely on a folder whose creator has not come that far
//! yet. So the first time this process creates something in a folder, it syncs the whole way, and then
//! keeps the folder open: as long as it is open, a removal and re-creation under the same name by someone
//! else cannot be mistaken for it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fchmod, fstat, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, geteuid, unlinkat};

use super::super::error::{Error, Verb};
use super::errno::error_of;

/// Most folders held open at once; past it all are closed and opened again as needed.
const FOLDERS_OPEN_MAX: usize = 64;

/// The root folder of a store, held open, and what created files inherit from it.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    fd: OwnedFd,
    file_mode: Mode,
    folder_mode: Mode,
    owner: Option<(Uid, Gid)>,
    durable: Mutex<HashMap<String, Arc<OwnedFd>>>,
}

impl Root {
    /// Opens an existing folder.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let invalid = |what: &str, errno: Option<Errno>| Error::Invalid {
            key: path.display().to_string(),
            reason: format!("repository folder \"{}\" {what}", path.display()),
            source: errno.map(|errno| Arc::new(std::io::Error::from(errno)) as _),
        };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let fd = open(path, flags, Mode::empty()).map_err(|errno| match errno {
            Errno::ENOENT => invalid("does not exist", Some(errno)),
            Errno::ENOTDIR => invalid("is not a folder", Some(errno)),
            _ => error_of(Verb::List, &path.display().to_string(), errno),
        })?;
        let found = fstat(&fd).map_err(|errno| invalid("cannot be examined", Some(errno)))?;
        let group = found.st_mode & 0o070;
        let inherited_group = found.st_mode & libc::S_ISGID;
        Ok(Self {
            path: path.to_owned(),
            fd,
            // Nobody rewrites an object, so the group's right to write ends at the folders.
            file_mode: Mode::from_bits_truncate(0o600 | (group & 0o040)),
            folder_mode: Mode::from_bits_truncate(0o700 | group | inherited_group),
            owner: geteuid().is_root().then(|| (Uid::from_raw(found.st_uid), Gid::from_raw(found.st_gid))),
            durable: Mutex::default(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Checks that the root has not been removed under us, where nothing found would prove nothing.
    pub(super) fn check_present(&self, verb: Verb, key: &str) -> Result<(), Error> {
        let found = fstat(&self.fd).map_err(|errno| error_of(verb, key, errno))?;
        if found.st_nlink > 0 {
            return Ok(());
        }
        Err(Error::Invalid {
            key: key.to_owned(),
            reason: format!(
                "could not {verb} {key}: repository folder \"{}\" was removed",
                self.path.display()
            ),
            source: None,
        })
    }

    /// Gives a new file the owner and mode the root prescribes.
    pub(super) fn adopt_file(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        self.adopt(fd, self.file_mode)
    }

    fn adopt(&self, fd: BorrowedFd<'_>, mode: Mode) -> Result<(), Errno> {
        if let Some((user, group)) = self.owner {
            fchown(fd, Some(user), Some(group))?;
        }
        // After the change of owner, which clears the set-group-id bit; and not left to the umask.
        fchmod(fd, mode)
    }

    /// Opens a folder for reading its entries or syncing them.
    pub(super) fn open_folder(&self, folder: &str) -> Result<OwnedFd, Errno> {
        open_below(self.fd(), if folder.is_empty() { "." } else { folder })
    }

    /// Opens the folder that is to hold a new object, created if need be, durable with all above it.
    pub(super) fn durable_folder(&self, folder: &str) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = self.durable_folders().get(folder) {
            return Ok(Arc::clone(fd));
        }
        let mut current = self.open_folder("")?;
        for name in folder.split('/').filter(|name| !name.is_empty()) {
            let next = self.open_or_create(current.as_fd(), name)?;
            fsync(&current)?;
            current = next;
        }
        let current = Arc::new(current);
        let mut durable = self.durable_folders();
        if durable.len() >= FOLDERS_OPEN_MAX {
            durable.clear();
        }
        durable.insert(folder.to_owned(), Arc::clone(&current));
        Ok(current)
    }

    /// Opens or creates a folder that need not survive.
    pub(super) fn open_or_create(&self, above: BorrowedFd<'_>, name: &str) -> Result<OwnedFd, Errno> {
        match open_below(above, name) {
            Err(Errno::ENOENT) => (),
            opened => return opened,
        }
        match mkdirat(above, name, Mode::S_IRWXU) {
            // Somebody else was faster, and gives it its mode.
            Err(Errno::EEXIST) => open_below(above, name),
            Err(errno) => Err(errno),
            Ok(()) => {
                let created = open_below(above, name)?;
                self.adopt(created.as_fd(), self.folder_mode)?;
                Ok(created)
            }
        }
    }

    /// Forgets a folder held open, because it was found to be gone.
    pub(super) fn forget_folder(&self, folder: &str) {
        self.durable_folders().remove(folder);
    }

    /// Removes `folder` and those above it as far as they are empty, stopping below the root.
    pub(super) fn remove_empty_folders(&self, folder: &str) -> Result<(), Errno> {
        let mut folder = folder;
        while !folder.is_empty() {
            match unlinkat(self.fd(), folder, UnlinkatFlags::RemoveDir) {
                // Not empty, or gone already; an old server may say either of the first two.
                Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOENT) => return Ok(()),
                // Not ours to remove, such as a mount point: the object is deleted all the same.
                Err(Errno::EACCES | Errno::EPERM | Errno::EBUSY | Errno::ENOTDIR) => return Ok(()),
                Err(errno) => return Err(errno),
                Ok(()) => self.forget_folder(folder),
            }
            folder = folder.rsplit_once('/').map_or("", |(above, _)| above);
            match self.open_folder(folder) {
                Ok(above) => fsync(&above)?,
                Err(Errno::ENOENT) => (),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn durable_folders(&self) -> MutexGuard<'_, HashMap<String, Arc<OwnedFd>>> {
        self.durable.lock().expect("no holder of this lock panics")
    }
}

fn open_below(above: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    openat(above, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}
