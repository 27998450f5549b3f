//! Reading files of a running server: positioned reads that disturb it as little as possible.
//!
//! A file may be gone when it is opened, and longer or shorter than it was; that is for the caller to judge. Access
//! times are left alone, and what a backup alone brought into the page cache does not stay there to push out what
//! the server uses. [`Source`] is a trait so that tests can do to files what a busy server does.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;

use crate::backup::data_directory::{FileIdentity, SourceFile, SourceTree, mode_and_time};
use crate::backup::page_cache::{self, Residency};

/// Opens the files of a walk.
pub trait Source: Send + Sync + Debug {
    /// Opens a file for reading; `NotFound` where it is gone.
    fn open(&self, file: &SourceFile) -> io::Result<Box<dyn OpenFile>>;

    /// Returns where a file is, for messages.
    fn path(&self, file: &SourceFile) -> PathBuf;
}

/// An open file of the source.
pub trait OpenFile: Send + Sync + Debug {
    /// Returns what it is now.
    fn state(&self) -> io::Result<FileState>;

    /// Reads from `offset` on; fewer bytes than asked for only at the end of the file.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Says that a range will not be read again.
    fn done_with(&self, range: Range<u64>);
}

/// What an open file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileState {
    /// Its size.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Time of last modification.
    pub modified: Timestamp,
    /// What tells whether it is still this one later; none where the source has no inodes.
    pub identity: Option<FileIdentity>,
}

/// The files of a data directory.
#[derive(Debug)]
pub struct DirectorySource {
    tree: Arc<SourceTree>,
}

impl DirectorySource {
    /// Creates the source of the files that a walk found.
    pub fn new(tree: Arc<SourceTree>) -> Self {
        Self { tree }
    }
}

impl Source for DirectorySource {
    fn open(&self, file: &SourceFile) -> io::Result<Box<dyn OpenFile>> {
        let path = self.path(file);
        let open = |flags: i32| OpenOptions::new().read(true).custom_flags(flags).open(&path);
        // Only the owner and root may leave the access time alone.
        let file = match open(libc::O_NOATIME) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => open(0)?,
            other => other?,
        };
        page_cache::read_sequentially(&file);
        let resident = Residency::of(&file)?;
        Ok(Box::new(DirectoryFile { file, resident }))
    }

    fn path(&self, file: &SourceFile) -> PathBuf {
        self.tree.source_path(file)
    }
}

#[derive(Debug)]
struct DirectoryFile {
    file: File,
    resident: Residency,
}

impl OpenFile for DirectoryFile {
    fn state(&self) -> io::Result<FileState> {
        let metadata = self.file.metadata()?;
        let (mode, modified) = mode_and_time(&metadata);
        Ok(FileState { size: metadata.len(), mode, modified, identity: FileIdentity::of(&metadata) })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.file.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn done_with(&self, range: Range<u64>) {
        self.resident.restore(&self.file, range);
    }
}
