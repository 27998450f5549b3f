//! A lock file that one process holds, with the holder's pid inside for the message.
//!
//! The lock is `flock`, so it ends with its process however that ends; the file stays, because removing it
//! would let two processes lock two files of one name. Where it goes with its folder, who has opened it before finds out
//! and tries what stands there by then. Not for network file systems.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::disk::Error;

/// A lock held until it is dropped.
#[derive(Debug)]
pub struct LockFile {
    path: PathBuf,
    _held: Flock<File>,
}

impl LockFile {
    /// Takes the lock or says who holds it; never waits.
    pub fn acquire(path: &Path) -> Result<Self, Error> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                // Who owns the folder could have root write its number into any file.
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
                .map_err(Error::at("open lock file", path))?;
            let mut held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(held) => held,
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    return Err(Error::Locked { path: path.to_owned(), holder: read_pid(&mut file) });
                }
                Err((_, errno)) => return Err(Error::at("lock", path)(errno.into())),
            };
            // A lock of what has lost its name excludes nobody.
            if stands_at(&held, path).map_err(Error::at("stat lock file", path))? {
                write_pid(&mut held).map_err(Error::at("write lock file", path))?;
                return Ok(Self { path: path.to_owned(), _held: held });
            }
        }
    }

    /// Returns where the lock file is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Says who holds a lock, for a message.
pub(crate) fn describe_holder(pid: Option<i32>) -> String {
    match pid {
        Some(pid) => format!("process {pid}"),
        None => "another process".to_owned(),
    }
}

/// Tells whether an open file is still the one of that name.
fn stands_at(file: &File, path: &Path) -> io::Result<bool> {
    let own = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (own.dev(), own.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn write_pid(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    writeln!(file, "{}", std::process::id())
}

fn read_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_holds_it_and_gets_it_afterwards() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("lock");
        let first = LockFile::acquire(&path).unwrap();
        let refused = LockFile::acquire(&path).unwrap_err();
        let pid = std::process::id() as i32;
        assert!(matches!(refused, Error::Locked { holder: Some(holder), .. } if holder == pid));
        assert!(refused.to_string().ends_with(&format!("is locked by process {pid}")));
        drop(first);
        assert_eq!(LockFile::acquire(&path).unwrap().path(), path);
    }

    #[test]
    fn a_link_in_the_stead_of_a_lock_is_not_followed() {
        let scratch = tempfile::tempdir().unwrap();
        let (link, other) = (scratch.path().join("lock"), scratch.path().join("somebody's"));
        std::fs::write(&other, "theirs").unwrap();
        std::os::unix::fs::symlink(&other, &link).unwrap();
        assert!(matches!(LockFile::acquire(&link), Err(Error::Io { .. })));
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "theirs");
    }

    #[test]
    fn what_was_opened_before_its_folder_went_is_no_lock_of_the_one_that_came() {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join("one");
        std::fs::create_dir(&folder).unwrap();
        let path = folder.join("lock");
        let first = LockFile::acquire(&path).unwrap();
        let opened = File::open(&path).unwrap();
        assert!(stands_at(&opened, &path).unwrap());
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(!stands_at(&opened, &path).unwrap());
        std::fs::create_dir(&folder).unwrap();
        let second = LockFile::acquire(&path).unwrap();
        assert!(!stands_at(&opened, &path).unwrap());
        drop(first);
        assert!(matches!(LockFile::acquire(&path), Err(Error::Locked { .. })));
        drop(second);
    }
}
