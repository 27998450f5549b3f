//! A file that appears at its path whole, for a reader that syncs it itself before it relies on it.
//!
//! Written under a temporary name beside its target and renamed by whoever began it, although another process may
//! have written the content: so no late writer can change what stands at the target. Where another process has a whole
//! file ready that has no name yet, that one gets the name. Removed where it is not finished. Deliberately absent: any
//! sync; `durable` has what must survive a power cut by itself.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Seek, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::disk::Error;
use crate::disk::durable::{Create, temporary_path};
use crate::disk::unnamed_file::{link_unnamed, may_replace};

/// A file on its way to its path.
#[derive(Debug)]
pub struct StagedFile {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
}

impl StagedFile {
    /// Creates the empty file.
    pub fn begin(target: &Path, create: Create) -> Result<Self, Error> {
        let temporary = temporary_path(target);
        // A leftover of a crashed process with our pid may lie at this name; nobody reads it.
        let _ = fs::remove_file(&temporary);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(create.mode)
            .open(&temporary)
            .map_err(Error::at("create", &temporary))?;
        let staged = Self { file, temporary, target: target.to_owned() };
        let mode = Permissions::from_mode(create.mode);
        staged.file.set_permissions(mode).map_err(Error::at("set the mode of", &staged.temporary))?;
        if let Some(owner) = create.owner {
            owner.give(&staged.temporary)?;
        }
        Ok(staged)
    }

    /// Returns the file, for whoever writes it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Appends content.
    pub fn write(&mut self, content: &[u8]) -> Result<(), Error> {
        self.file.write_all(content).map_err(Error::at("write", &self.temporary))
    }

    /// Gives it its name, in place of what stood there.
    pub fn finish(self) -> Result<(), Error> {
        fs::rename(&self.temporary, &self.target).map_err(Error::at("rename a new file to", &self.target))
    }

    /// Gives the name to a file that has none and holds all the content, in place of what stood there; where the system
    /// does not let it have that name, its content is copied.
    pub fn finish_with(mut self, mut ready: File) -> Result<(), Error> {
        let named = temporary_path(&self.target);
        if may_replace(&ready, &self.file) && link_unnamed(&ready, &named).is_ok() {
            let renamed = fs::rename(&named, &self.target);
            if renamed.is_err() {
                let _ = fs::remove_file(&named);
            }
            return renamed.map_err(Error::at("rename a new file to", &self.target));
        }
        ready.rewind().map_err(Error::at("read what is to become", &self.target))?;
        io::copy(&mut ready, &mut self.file).map_err(Error::at("write", &self.temporary))?;
        self.finish()
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // Once it is finished there is nothing of this name.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use crate::disk::unnamed_file::begin_unnamed;

    use super::*;

    #[test]
    fn only_a_finished_file_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("RECOVERYXLOG");
        fs::write(&target, "old").unwrap();
        let mut staged = StagedFile::begin(&target, Create::PRIVATE_FILE).unwrap();
        staged.write(b"new").unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"old");
        drop(staged);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let mut staged = StagedFile::begin(&target, Create::PRIVATE_FILE).unwrap();
        staged.write(b"new").unwrap();
        staged.finish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"new");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_that_is_ready_gets_the_name_or_is_copied() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("RECOVERYXLOG");
        // As it should be, and of another mode than is wanted.
        for (create, is_itself) in
            [(Create::PRIVATE_FILE, true), (Create { mode: 0o644, owner: None }, false)]
        {
            fs::write(&target, "old").unwrap();
            let mut ready = begin_unnamed(folder.path(), create).unwrap();
            ready.write_all(b"new content").unwrap();
            let inode = ready.metadata().unwrap().ino();
            let staged = StagedFile::begin(&target, Create::PRIVATE_FILE).unwrap();
            staged.finish_with(ready).unwrap();
            assert_eq!(fs::read(&target).unwrap(), b"new content");
            let found = fs::metadata(&target).unwrap();
            assert_eq!((found.ino() == inode, found.mode() & 0o777), (is_itself, 0o600));
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        // Whatever goes wrong, nothing is left behind.
        let taken = folder.path().join("taken");
        fs::create_dir(&taken).unwrap();
        let ready = begin_unnamed(folder.path(), Create::PRIVATE_FILE).unwrap();
        let staged = StagedFile::begin(&taken, Create::PRIVATE_FILE).unwrap();
        assert!(staged.finish_with(ready).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
