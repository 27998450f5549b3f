//! What is at a place on this host, and taking it away: for who moves, copies and removes whole trees.
//! Deliberately absent: where what belongs; who plans knows that.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use crate::disk;
use crate::disk::durable;

/// Removes what is in a directory, except what is named `keep`.
pub(super) fn clear(directory: &Path, keep: &str) -> Result<(), disk::Error> {
    for entry in fs::read_dir(directory).map_err(at("open directory", directory))? {
        let entry = entry.map_err(at("read directory", directory))?;
        if entry.file_name() == keep {
            continue;
        }
        remove(&entry.path())?;
    }
    durable::fsync_dir(directory)
}

/// Removes a file or a whole tree.
pub(super) fn remove(path: &Path) -> Result<(), disk::Error> {
    let is_directory = fs::symlink_metadata(path).is_ok_and(|found| found.is_dir());
    let removed = if is_directory { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Tells whether a place can be taken: nothing is there, or an empty directory, and no link to one.
pub(super) fn is_absent_or_empty(path: &Path) -> Result<bool, disk::Error> {
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        return Ok(false);
    }
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(at("open directory", path)(error)),
    }
}

/// Returns the number of the file system of the nearest directory above a path, or of itself.
pub(super) fn device_of(path: &Path) -> Result<u64, disk::Error> {
    let existing = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    Ok(fs::metadata(existing).map_err(at("stat", existing))?.dev())
}

/// Tells whether anything bears the name, be it a link that leads nowhere.
pub(super) fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Tells whether a file is one of its directory's own, and no link to another.
pub(super) fn is_plain_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}

/// Reads a plain file; what is not there, or is a link or a pipe, says nothing.
///
/// What a server could write it may have made a link to what only its reader may read.
pub(super) fn read_plain(path: &Path) -> Result<Vec<u8>, disk::Error> {
    if !is_plain_file(path) {
        return Ok(Vec::new());
    }
    let mut bytes = Vec::new();
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    opened.and_then(|mut file| file.read_to_end(&mut bytes)).map_err(at("read", path))?;
    Ok(bytes)
}

/// Returns a closure for `map_err` that names the action and the path.
pub(super) fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> disk::Error {
    let path = path.to_owned();
    move |source| disk::Error::Io { action, path, source }
}
