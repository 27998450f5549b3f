//! `PGDATA/walden.clone`: the text file that says "this data directory is a clone".
//!
//! Whoever would archive or receive WAL for a data directory looks for it first and refuses, so that a clone
//! can never write into the archive it came from (failure 8). Its presence alone decides: a marker that cannot be
//! parsed, or cannot even be read, still marks. The text is for the person who finds it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::disk::Error;
use crate::disk::durable::{self, Create};

/// The marker's name in the data directory.
pub const FILE_NAME: &str = "walden.clone";

/// No marker is longer; what follows is not read.
const LENGTH_MAX: u64 = 64 * 1024;

/// What a clone says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CloneMarker {
    /// The clone's name.
    pub name: String,
    /// The site it was made from.
    pub site: String,
    /// The basebackup it stands on.
    pub basebackup: String,
}

impl CloneMarker {
    /// Writes the marker into a data directory, replacing one that is there.
    pub fn write(&self, data_directory: &Path, create: Create) -> Result<(), Error> {
        durable::write_file(&path_in(data_directory), self.to_text().as_bytes(), create)
    }

    /// Returns the marker of a data directory, or `None` where there is none.
    ///
    /// Fields of a marker that does not parse are empty; only a clean *not there* is `None`.
    pub fn detect(data_directory: &Path) -> Result<Option<Self>, Error> {
        let path = path_in(data_directory);
        match std::fs::symlink_metadata(&path) {
            Ok(_) => {}
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::at("stat", &path)(source)),
        }
        let mut content = Vec::new();
        // What cannot be read still marks.
        let _ = File::open(&path).and_then(|file| file.take(LENGTH_MAX).read_to_end(&mut content));
        let text = String::from_utf8_lossy(&content).into_owned();
        Ok(Some(Self::from_text(&text)))
    }

    /// Returns the marker's text.
    pub fn to_text(&self) -> String {
        format!(
            "# This data directory is a Walden clone. It must not archive WAL: `walden wal push` and the\n\
             # daemon refuse it while this file is here. `walden clone finalize --adopt` removes it.\n\
             name = {}\nsite = {}\nbasebackup = {}\n",
            one_line(&self.name),
            one_line(&self.site),
            one_line(&self.basebackup)
        )
    }

    fn from_text(text: &str) -> Self {
        let mut marker = Self::default();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            let value = value.trim().to_owned();
            match key.trim() {
                "name" => marker.name = value,
                "site" => marker.site = value,
                "basebackup" => marker.basebackup = value,
                _ => {}
            }
        }
        marker
    }
}

/// Returns where the marker of a data directory is.
pub fn path_in(data_directory: &Path) -> PathBuf {
    data_directory.join(FILE_NAME)
}

fn one_line(value: &str) -> String {
    value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_marker_is_detected_with_its_fields() {
        let scratch = tempfile::tempdir().unwrap();
        assert_eq!(CloneMarker::detect(scratch.path()).unwrap(), None);
        let marker = CloneMarker {
            name: "yesterday".into(),
            site: "main".into(),
            basebackup: "20261120T101500Z-3fa9".into(),
        };
        marker.write(scratch.path(), Create::PRIVATE_FILE).unwrap();
        assert_eq!(CloneMarker::detect(scratch.path()).unwrap(), Some(marker));
    }

    #[test]
    fn anything_at_the_marker_s_name_marks() {
        let scratch = tempfile::tempdir().unwrap();
        std::fs::write(path_in(scratch.path()), b"\xff\xfe garbage").unwrap();
        assert_eq!(CloneMarker::detect(scratch.path()).unwrap(), Some(CloneMarker::default()));
        std::fs::remove_file(path_in(scratch.path())).unwrap();
        std::os::unix::fs::symlink("dangling", path_in(scratch.path())).unwrap();
        assert!(CloneMarker::detect(scratch.path()).unwrap().is_some());
    }

    #[test]
    fn a_name_cannot_forge_another_field() {
        let marker =
            CloneMarker { name: "a\nsite = forged".into(), site: "main".into(), ..CloneMarker::default() };
        assert_eq!(CloneMarker::from_text(&marker.to_text()).site, "main");
    }
}
