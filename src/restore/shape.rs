//! Everything of a basebackup that is not a file's content: directories, links, and what stands at each of them.
//!
//! Directories come first and get their modes and times last; links come after all files, so that nothing is ever
//! written through one. A link that would lead out of its part is damage: no basebackup of Walden's has one.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::disk::Owner;
use crate::disk::durable::{self, Create};
use crate::repo::entry::{Entry, Node, TreePath};
use crate::repo::{self, Basebackup};
use crate::restore::Error;
use crate::restore::destinations::Destinations;
use crate::restore::file_writer::system_time;

/// Directories and links.
#[derive(Debug, Default)]
pub(super) struct Shape {
    /// Directories, each before what is in it, with mode and time.
    pub directories: Vec<(PathBuf, u32, Timestamp)>,
    /// Links and their targets.
    pub links: Vec<(PathBuf, PathBuf)>,
    /// Files by their places.
    pub files: HashMap<PathBuf, u64>,
}

const LINK_DIRECTORY: &[u8] = b"data/pg_tblspc";

impl Shape {
    /// Reads the shape of what goes to `destinations`.
    pub(super) async fn of(basebackup: &Basebackup, destinations: &Destinations) -> Result<Self, Error> {
        let mut shape = Self::default();
        basebackup.visit_entries(|number, entry| shape.add(number, entry, destinations)).await?;
        for (oid, path) in &destinations.tablespaces {
            let link = destinations.data.join("pg_tblspc").join(oid.to_string());
            shape.links.push((link, path.clone()));
        }
        Ok(shape)
    }

    fn add(&mut self, number: u64, entry: &Entry, destinations: &Destinations) -> Result<(), Error> {
        let Some(place) = destinations.place(&entry.path)? else { return Ok(()) };
        match &entry.node {
            Node::Directory => self.directories.push((place, entry.mode, entry.modified)),
            // The links of tablespaces are made anew (failure 27b).
            Node::Symlink(_) if entry.path.split().0 == LINK_DIRECTORY => {}
            Node::Symlink(target) => {
                if leaves_its_part(&entry.path, target) {
                    let detail = format!("the link leads out of it, to {}", String::from_utf8_lossy(target));
                    let object = entry.path.to_string();
                    return Err(repo::Error::Damaged { object, detail }.into());
                }
                self.links.push((place, PathBuf::from(OsStr::from_bytes(target))));
            }
            Node::File { .. } => {
                self.files.insert(place, number);
            }
        }
        Ok(())
    }

    /// Makes every directory, private for as long as it is being filled.
    pub(super) fn make_directories(&self, destinations: &Destinations, owner: Owner) -> Result<(), Error> {
        for (root, _) in destinations.all() {
            durable::create_dir_all(root, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
        }
        for (path, ..) in &self.directories {
            match fs::DirBuilder::new().mode(0o700).create(path) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(Error::at("create directory", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes the links.
    pub(super) fn make_links(&self, owner: Owner) -> Result<(), Error> {
        for (path, target) in &self.links {
            if fs::read_link(path).is_ok_and(|found| found == *target) {
                continue;
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::at("remove", path)(error));
                }
                _ => symlink(target, path).map_err(Error::at("create link", path))?,
            }
            owner.give(path)?;
        }
        Ok(())
    }

    /// Gives the directories their owner, mode and time, the innermost first.
    pub(super) fn finish_directories(&self, owner: Owner) -> Result<(), Error> {
        for (path, mode, modified) in self.directories.iter().rev() {
            owner.give(path)?;
            fs::set_permissions(path, Permissions::from_mode(*mode))
                .map_err(Error::at("set the mode of", path))?;
            let set = File::open(path).and_then(|directory| directory.set_modified(system_time(*modified)));
            set.map_err(Error::at("set the time of", path))?;
        }
        Ok(())
    }

    /// Returns whether a directory is one of the basebackup's.
    pub(super) fn directory_set(&self) -> std::collections::HashSet<&Path> {
        self.directories.iter().map(|(path, ..)| &**path).collect()
    }
}

/// Tells whether a link leads out of `data`, `config` or its tablespace, going by the text of its target.
fn leaves_its_part(path: &TreePath, target: &[u8]) -> bool {
    let parts_of_root = if path.as_bytes().starts_with(b"tablespaces/") { 2 } else { 1 };
    let above = path.split().0.split(|byte| *byte == b'/').count();
    let mut depth = above;
    for part in target.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." if depth <= parts_of_root => return true,
            b".." => depth -= 1,
            _ => depth += 1,
        }
    }
    target.starts_with(b"/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_stays_in_its_part() {
        for (path, target, leaves) in [
            ("data/a/link", "../b", false),
            ("data/a/link", "../../config/x", true),
            ("data/link", "base/1", false),
            ("data/link", "..", true),
            ("data/link", "/etc/passwd", true),
            ("data/a/link", "b/../../../x", true),
            ("tablespaces/16400/PG_15/link", "..", false),
            ("tablespaces/16400/PG_15/link", "../..", true),
        ] {
            let path = TreePath::new(path).unwrap();
            assert_eq!(leaves_its_part(&path, target.as_bytes()), leaves, "{path} {target}");
        }
    }
}
