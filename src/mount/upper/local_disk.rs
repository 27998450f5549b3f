//! What the upper asks of the local file system, as a trait: everything it does goes through here.
//!
//! So a test can put a disk in its place that records, fails or loses what was not synced. Paths are relative to the
//! upper's directory, which `RealDisk` holds open: when a mount lies over that very directory, what is beneath stays
//! reachable. Nothing follows a symbolic link. The origin (where in the lower a file or directory came from) is an
//! extended attribute, so it moves with a rename and cannot part from the data.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::disk::Owner;
use crate::mount::fs::{Attributes, Capacity, FileKind, NewNode, SetTime};

/// What `lstat` says about something in the upper.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalStat {
    pub(crate) attributes: Attributes,
    pub(crate) inode: u64,
}

/// Times to set; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Times {
    pub(crate) atime: Option<SetTime>,
    pub(crate) mtime: Option<SetTime>,
}

impl Times {
    /// Sets the modification time alone.
    pub(crate) fn modified(at: SystemTime) -> Self {
        Self { atime: None, mtime: Some(SetTime::At(at)) }
    }
}

/// An open file of the upper.
pub(crate) trait LocalFile: Send + Sync + Debug {
    /// Fills `buffer` from `offset` as far as the file goes, and returns how far that was.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes all of `data`.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    fn set_length(&self, length: u64) -> io::Result<()>;
    fn allocate(&self, offset: u64, length: u64, keep_size: bool) -> io::Result<()>;
    /// Gives a range back: it reads as a hole again.
    fn make_hole(&self, offset: u64, length: u64) -> io::Result<()>;
    fn sync(&self, data_only: bool) -> io::Result<()>;
    fn stat(&self) -> io::Result<LocalStat>;
    /// Finds the first data at or after `offset`; `None` when there is none up to the end.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;
    /// Finds the first hole at or after `offset`, which lies below the size; the end counts as one.
    fn next_hole(&self, offset: u64) -> io::Result<u64>;
    fn set_mode(&self, mode: u32) -> io::Result<()>;
    fn set_owner(&self, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    fn set_times(&self, times: Times) -> io::Result<()>;
    fn set_origin(&self, origin: &[u8]) -> io::Result<()>;
    /// Starts reading a range into the page cache, and does not wait for it.
    fn read_ahead(&self, offset: u64, length: u64) -> io::Result<()>;
    /// Drops what the kernel has of the file in its cache, but for what is not on the disk yet.
    fn drop_cache(&self) -> io::Result<()>;
    /// Returns another descriptor of the open file, for the kernel.
    fn descriptor(&self) -> io::Result<OwnedFd>;
}

/// An open directory of the upper, which stays the same wherever it is moved.
pub(crate) trait LocalDirectory: Send + Sync + Debug {
    /// Puts the names in it on stable storage.
    fn sync(&self) -> io::Result<()>;
}

/// The directory an upper lives in.
pub(crate) trait LocalDisk: Send + Sync + Debug {
    /// Returns what is at a path, or `None`.
    fn stat(&self, path: &Path) -> io::Result<Option<LocalStat>>;
    /// Opens a file that is there, for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn LocalFile>>;
    /// Creates a file that must not be there.
    fn create(&self, path: &Path, mode: u32) -> io::Result<Arc<dyn LocalFile>>;
    fn make_directory(&self, path: &Path, mode: u32) -> io::Result<()>;
    fn make_node(&self, path: &Path, what: NewNode, mode: u32) -> io::Result<()>;
    fn make_symlink(&self, target: &[u8], path: &Path) -> io::Result<()>;
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    fn remove_directory(&self, path: &Path) -> io::Result<()>;
    fn read_link(&self, path: &Path) -> io::Result<Vec<u8>>;
    fn list(&self, path: &Path) -> io::Result<Vec<(Vec<u8>, FileKind)>>;
    fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()>;
    fn set_owner(&self, path: &Path, uid: Option<u32>, gid: Option<u32>) -> io::Result<()>;
    fn set_times(&self, path: &Path, times: Times) -> io::Result<()>;
    /// Returns the origin of a file or directory, or `None` where it has none.
    fn origin(&self, path: &Path) -> io::Result<Option<Vec<u8>>>;
    fn set_origin(&self, path: &Path, origin: &[u8]) -> io::Result<()>;
    fn open_directory(&self, path: &Path) -> io::Result<Box<dyn LocalDirectory>>;
    /// Syncs everything of the file system.
    fn sync_all(&self) -> io::Result<()>;
    fn capacity(&self) -> io::Result<Capacity>;

    /// Puts the names in a directory on stable storage.
    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        self.open_directory(path)?.sync()
    }

    /// Gives a path to an owner, if it is not theirs already.
    fn give(&self, path: &Path, owner: Owner) -> io::Result<()> {
        match self.stat(path)? {
            Some(stat) if stat.attributes.owner != owner => {
                self.set_owner(path, Some(owner.uid), Some(owner.gid))
            }
            _ => Ok(()),
        }
    }
}
