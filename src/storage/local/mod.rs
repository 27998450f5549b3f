//! The store in a folder, `file://`.
//!
//! An object is a file. It is written under a name of its own in `.staging` below the root, synced, moved
//! to its key without replacing what may be there, and the folder is synced: an object is never visible in
//! part and never lost once `create` returned. The root folder must exist; owner and mode of everything
//! created follow it. It is held open for as long as the store lives and every path is resolved below it,
//! so that mounting over it changes nothing here.
//!
//! `errno` gives the kernel's answers our words, `folder` creates and opens folders, `publish` writes
//! objects, `listing` walks. All of it blocks, so every call runs on tokio's blocking pool.
//!
//! Deliberately absent: staging beside the object. One staging folder makes what a crash left behind
//! visible to `open` without walking the repository, for the price that the repository must be one file
//! system.

mod errno;
mod folder;
mod listing;
mod publish;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use crate::clock::Clock;

use super::error::{Error, Verb};
use super::key::ObjectKey;
use super::store::{Folder, ObjectMeta, Store, folder_prefix, range_length};
use errno::{error_of, io_error_of};
use folder::Root;

/// Keeps objects as files below one folder.
#[derive(Debug, Clone)]
pub struct LocalStore {
    root: Arc<Root>,
}

impl LocalStore {
    /// Opens the store in the existing folder `path` and clears staged files more than a day old.
    pub fn open(path: &Path, clock: &dyn Clock) -> Result<Self, Error> {
        let root = Root::open(path)?;
        publish::sweep_staging(&root, clock.now());
        Ok(Self { root: Arc::new(root) })
    }

    async fn blocking<T, F>(&self, verb: Verb, key: &str, work: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Root) -> Result<T, Error> + Send + 'static,
    {
        let root = Arc::clone(&self.root);
        match tokio::task::spawn_blocking(move || work(&root)).await {
            Ok(result) => result,
            // A panic in there, or a runtime that is shutting down.
            Err(error) => Err(Error::Other { verb, key: key.to_owned(), source: Arc::new(error) }),
        }
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), Error> {
        let owned = key.clone();
        self.blocking(Verb::Create, key.as_str(), move |root| publish::create(root, &owned, &body)).await
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
        let owned = key.clone();
        self.blocking(Verb::Get, key.as_str(), move |root| read_whole(root, &owned, size_max)).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, Error> {
        let length = range_length(key, &range)?;
        let owned = key.clone();
        self.blocking(Verb::GetRange, key.as_str(), move |root| read_range(root, &owned, range.start, length))
            .await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, Error> {
        let owned = key.clone();
        self.blocking(Verb::Head, key.as_str(), move |root| stat(root, &owned)).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, Error> {
        let folder = folder_prefix(prefix)?;
        let after = after.cloned();
        self.blocking(Verb::List, prefix, move |root| listing::list(root, &folder, after.as_ref(), limit))
            .await
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, Error> {
        let folder = folder_prefix(prefix)?;
        self.blocking(Verb::ListFolder, prefix, move |root| listing::list_folder(root, &folder)).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), Error> {
        let owned = key.clone();
        self.blocking(Verb::Delete, key.as_str(), move |root| publish::delete(root, &owned)).await
    }
}

/// Opens the file of an object and returns it with its size.
fn open_object(root: &Root, verb: Verb, key: &ObjectKey) -> Result<(File, u64), Error> {
    // Without O_NONBLOCK a FIFO under an object's name would hold the caller until someone writes to it.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let fd = match openat(root.fd(), key.as_str(), flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(errno) => return Err(absent_or(root, verb, key, errno)),
    };
    let found = fstat(&fd).map_err(|errno| error_of(verb, key.as_str(), errno))?;
    if !is_regular(&found) {
        return Err(not_a_file(root, verb, key));
    }
    Ok((File::from(fd), size_of(&found)))
}

fn read_whole(root: &Root, key: &ObjectKey, size_max: u64) -> Result<Bytes, Error> {
    let (file, size) = open_object(root, Verb::Get, key)?;
    if size > size_max {
        return Err(Error::TooLarge { key: key.to_string(), size, size_max });
    }
    let mut body = reserve(key, size, size_max)?;
    file.take(size).read_to_end(&mut body).map_err(|error| io_error_of(Verb::Get, key.as_str(), error))?;
    match body.len() as u64 {
        received if received < size => {
            Err(Error::Truncated { key: key.to_string(), expected: size, received })
        }
        _ => Ok(body.into()),
    }
}

/// Takes memory for a body; a caller's bound beyond what there is comes back as an error, not as the end of
/// us.
fn reserve(key: &ObjectKey, size: u64, size_max: u64) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    let reserved = usize::try_from(size).ok().and_then(|size| body.try_reserve_exact(size).ok());
    reserved.map(|()| body).ok_or_else(|| Error::TooLarge { key: key.to_string(), size, size_max })
}

fn read_range(root: &Root, key: &ObjectKey, start: u64, length: u64) -> Result<Bytes, Error> {
    let (file, size) = open_object(root, Verb::GetRange, key)?;
    let received = size.saturating_sub(start).min(length);
    let truncated = |received| Error::Truncated { key: key.to_string(), expected: length, received };
    if received < length {
        return Err(truncated(received));
    }
    let mut body = vec![0; usize::try_from(length).map_err(|_| truncated(0))?];
    file.read_exact_at(&mut body, start).map_err(|error| match error.kind() {
        // The file shrank between the look at its size and the read.
        std::io::ErrorKind::UnexpectedEof => truncated(0),
        _ => io_error_of(Verb::GetRange, key.as_str(), error),
    })?;
    Ok(body.into())
}

fn stat(root: &Root, key: &ObjectKey) -> Result<ObjectMeta, Error> {
    match fstatat(root.fd(), key.as_str(), AtFlags::empty()) {
        Ok(found) if is_regular(&found) => Ok(meta(key.clone(), &found)),
        Ok(_) => Err(not_a_file(root, Verb::Head, key)),
        Err(errno) => Err(absent_or(root, Verb::Head, key, errno)),
    }
}

/// Decides what a failed look-up proves: absence only if the repository itself is still there.
fn absent_or(root: &Root, verb: Verb, key: &ObjectKey, errno: Errno) -> Error {
    match errno {
        Errno::ENOENT | Errno::ENOTDIR => match root.check_present(verb, key.as_str()) {
            Ok(()) => Error::NotFound { key: key.to_string() },
            Err(error) => error,
        },
        _ => error_of(verb, key.as_str(), errno),
    }
}

fn not_a_file(root: &Root, verb: Verb, key: &ObjectKey) -> Error {
    Error::Invalid {
        key: key.to_string(),
        reason: format!(
            "could not {verb} {key}: \"{}\" is not a regular file",
            root.path().join(key.as_str()).display()
        ),
        source: None,
    }
}

fn meta(key: ObjectKey, found: &FileStat) -> ObjectMeta {
    ObjectMeta { key, size: size_of(found), last_modified: modified_of(found) }
}

fn is_regular(found: &FileStat) -> bool {
    found.st_mode & libc::S_IFMT == libc::S_IFREG
}

fn size_of(found: &FileStat) -> u64 {
    u64::try_from(found.st_size).unwrap_or(0)
}

/// Reads the time of the last change; a file dated beyond what a timestamp holds counts as old.
fn modified_of(found: &FileStat) -> Timestamp {
    let nanoseconds = i32::try_from(found.st_mtime_nsec).unwrap_or(0);
    Timestamp::new(found.st_mtime, nanoseconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests;
