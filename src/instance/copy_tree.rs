//! Copies a tree of files with owners, modes and times, for a place that a rename does not reach.
//!
//! The caller syncs: it knows what belongs together, and one sync of the file system is cheaper than thousands of
//! files'. Deliberately absent: sockets and fifos, which are of running processes, and hard links, of which a data
//! directory has none.

use std::fs;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};

use crate::disk;
use crate::instance::places::at;

/// Copies what is in `from` into the directory `to`, which exists; what is named `leave_out` at the top is left out.
pub(super) fn copy_tree(from: &Path, to: &Path, leave_out: &str) -> Result<(), disk::Error> {
    let mut directories: Vec<(PathBuf, PathBuf)> = vec![(from.to_owned(), to.to_owned())];
    // Filling a directory changes its times, so those come last, the deepest first.
    let mut filled = Vec::new();
    while let Some((source, copy)) = directories.pop() {
        let is_top = source == from;
        for entry in fs::read_dir(&source).map_err(at("open directory", &source))? {
            let entry = entry.map_err(at("read directory", &source))?;
            if is_top && entry.file_name() == leave_out {
                continue;
            }
            let (path, place) = (entry.path(), copy.join(entry.file_name()));
            let kind = entry.file_type().map_err(at("stat", &path))?;
            if kind.is_symlink() {
                let target = fs::read_link(&path).map_err(at("read the link", &path))?;
                symlink(target, &place).map_err(at("create", &place))?;
                give_alike(&path, &place)?;
            } else if kind.is_dir() {
                fs::create_dir(&place).map_err(at("create directory", &place))?;
                directories.push((path, place));
            } else if kind.is_file() {
                fs::copy(&path, &place).map_err(at("copy a file to", &place))?;
                give_alike(&path, &place)?;
                set_times_alike(&path, &place)?;
            }
        }
        filled.push((source, copy));
    }
    for (source, copy) in filled.iter().rev() {
        give_alike(source, copy)?;
        let mode = fs::metadata(source).map_err(at("stat", source))?.permissions();
        fs::set_permissions(copy, mode).map_err(at("set the mode of", copy))?;
        set_times_alike(source, copy)?;
    }
    Ok(())
}

fn give_alike(source: &Path, copy: &Path) -> Result<(), disk::Error> {
    let (found, own) = (fs::symlink_metadata(source), fs::symlink_metadata(copy));
    let (found, own) = (found.map_err(at("stat", source))?, own.map_err(at("stat", copy))?);
    if (found.uid(), found.gid()) == (own.uid(), own.gid()) {
        return Ok(());
    }
    lchown(copy, Some(found.uid()), Some(found.gid())).map_err(at("change the owner of", copy))
}

fn set_times_alike(source: &Path, copy: &Path) -> Result<(), disk::Error> {
    let found = fs::metadata(source).map_err(at("stat", source))?;
    let modified = found.modified().map_err(at("stat", source))?;
    let file = fs::File::open(copy).map_err(at("open", copy))?;
    file.set_modified(modified).map_err(at("set the times of", copy))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn a_copy_has_the_names_modes_times_and_links_of_what_it_copies() {
        let scratch = tempfile::tempdir().unwrap();
        let (from, to) = (scratch.path().join("from"), scratch.path().join("to"));
        fs::create_dir_all(from.join("base/1")).unwrap();
        fs::create_dir_all(from.join(".walden")).unwrap();
        fs::create_dir(&to).unwrap();
        fs::write(from.join("base/1/16384"), b"rows").unwrap();
        fs::set_permissions(from.join("base"), fs::Permissions::from_mode(0o700)).unwrap();
        fs::set_permissions(from.join("base/1/16384"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink("../elsewhere", from.join("pg_wal")).unwrap();
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        fs::File::open(from.join("base")).unwrap().set_modified(then).unwrap();
        copy_tree(&from, &to, ".walden").unwrap();
        assert_eq!(fs::read(to.join("base/1/16384")).unwrap(), b"rows");
        assert_eq!(fs::read_link(to.join("pg_wal")).unwrap(), Path::new("../elsewhere"));
        assert!(!to.join(".walden").exists());
        let mode = |path: &str| fs::metadata(to.join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode("base"), mode("base/1/16384")), (0o700, 0o640));
        assert_eq!(fs::metadata(to.join("base")).unwrap().modified().unwrap(), then);
    }
}
