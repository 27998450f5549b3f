//! File operations as the mount sees them, without FUSE: what `fuse` translates to and tests call directly.
//!
//! A [`Volume`] is one tree with its own node numbers: a basebackup's directory read-only (`lower_volume`) or with
//! an upper above it (`upper`). The mount's tree (`tree`) puts volumes and virtual directories together. Every
//! operation answers a value or an error number; a volume that cannot change inherits the refusals below.
//! Deliberately absent: permission checks (the kernel's `default_permissions`), extended attributes, locks.

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::time::SystemTime;

use bytes::Bytes;
use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::lower::NodeKind;

/// A node within one volume; below 2^40.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalId(pub u64);

/// What kind of thing a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    Directory,
    File,
    Symlink,
    Fifo,
    Socket,
}

impl From<NodeKind> for FileKind {
    fn from(kind: NodeKind) -> Self {
        match kind {
            NodeKind::Directory => Self::Directory,
            NodeKind::File => Self::File,
            NodeKind::Symlink => Self::Symlink,
        }
    }
}

/// What `stat` shows, apart from the inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    pub kind: FileKind,
    /// Permission bits.
    pub mode: u32,
    pub owner: Owner,
    pub size: u64,
    /// Units of 512 bytes used on the local disk.
    pub blocks: u64,
    pub links: u32,
    pub atime: SystemTime,
    pub mtime: SystemTime,
    pub ctime: SystemTime,
    /// How much a program had best read at a time.
    pub io_bytes: u32,
}

/// What programs read at a time of files that are not special, in which random reads are usual.
pub const IO_BYTES_USUAL: u32 = 4096;

/// How long the kernel may remember an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It cannot change without the kernel knowing.
    Forever,
    /// It may be another answer next time.
    Once,
}

/// A node that was found or made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<Id = LocalId> {
    pub id: Id,
    pub attributes: Attributes,
    pub lifetime: Lifetime,
}

/// A name in a directory listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListEntry<Id = LocalId> {
    pub name: Vec<u8>,
    /// A number for `d_ino`.
    pub id: Id,
    pub kind: FileKind,
}

/// How the kernel is to read and write an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoMode {
    /// Through the page cache, which stays valid from one open to the next.
    Cached,
    /// Every call comes to us; a later passthrough open of the same file is still possible.
    Direct,
    /// The local file behind it is read, written and mapped without us, where the kernel can; else as `Direct`.
    ///
    /// Only for a file of which nothing has to be fetched, and that stays so while it is open.
    Passthrough,
}

/// An open file and how to use it.
#[derive(Debug, Clone)]
pub struct Opened {
    pub file: std::sync::Arc<dyn OpenFile>,
    pub mode: IoMode,
}

/// A change of attributes; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttributes {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: Option<SetTime>,
    pub mtime: Option<SetTime>,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    Now,
    At(SystemTime),
}

/// What `mknod` can make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewNode {
    File,
    Fifo,
    Socket,
}

/// What a rename does with a target that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RenameMode {
    Replace,
    /// Fails with `EEXIST`.
    NoReplace,
}

/// What `lseek` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    Data,
    Hole,
}

/// The figures of `statfs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capacity {
    pub block_size: u32,
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
}

/// An open file; dropping the last reference closes it.
#[async_trait::async_trait]
pub trait OpenFile: Send + Sync + Debug {
    /// Reads up to `length` bytes; fewer only at the end of the file.
    async fn read(&self, caller: &Caller, offset: u64, length: u32) -> Result<Bytes, Errno>;

    /// Writes all of `data`.
    async fn write(&self, _caller: &Caller, _offset: u64, _data: Bytes) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Puts what was written on stable storage.
    async fn sync(&self, _data_only: bool) -> Result<(), Errno> {
        Ok(())
    }

    /// Puts on stable storage where the file is found, and nothing of what is in it.
    async fn sync_name(&self) -> Result<(), Errno> {
        Ok(())
    }

    /// Reserves room (`fallocate` with mode 0, or `FALLOC_FL_KEEP_SIZE`).
    async fn allocate(&self, _offset: u64, _length: u64, _keep_size: bool) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Finds the next data or hole at or after an offset; `ENXIO` at or past the end.
    async fn seek(&self, offset: u64, what: Seek) -> Result<u64, Errno>;

    /// Returns the local file to pass through to, of one opened with [`IoMode::Passthrough`].
    fn backing(&self) -> Result<OwnedFd, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Hears that a range of a file that is passed through will be read soon; never waits.
    fn will_need(&self, _offset: u64, _length: u32) {}
}

/// One tree with its own node numbers.
#[async_trait::async_trait]
pub trait Volume: Send + Sync + Debug {
    /// Returns the top directory.
    fn root(&self) -> LocalId;

    /// Finds a name; `ENOENT` is proof that it is not there. Counts as one reference of the kernel's.
    async fn lookup(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<Entry, Errno>;

    /// Takes back references that `lookup` and the makers gave.
    fn forget(&self, _node: LocalId, _references: u64) {}

    /// Returns what `stat` shows.
    async fn attributes(&self, caller: &Caller, node: LocalId) -> Result<Entry, Errno>;

    /// Returns where a symbolic link points.
    async fn read_link(&self, caller: &Caller, node: LocalId) -> Result<Vec<u8>, Errno>;

    /// Lists a directory, without `.` and `..`.
    async fn list(&self, caller: &Caller, directory: LocalId) -> Result<Vec<ListEntry>, Errno>;

    /// Opens a file.
    async fn open(&self, caller: &Caller, node: LocalId, writable: bool) -> Result<Opened, Errno>;

    /// Returns the room there is.
    fn capacity(&self) -> Result<Capacity, Errno>;

    /// Changes attributes and returns the new ones.
    async fn set_attributes(
        &self,
        _: &Caller,
        _node: LocalId,
        _change: SetAttributes,
    ) -> Result<Entry, Errno> {
        Err(Errno::EROFS)
    }

    /// Creates a file and opens it; with `exclusive` the name must be free.
    async fn create(
        &self,
        _: &Caller,
        _directory: LocalId,
        _name: &[u8],
        _mode: u32,
        _exclusive: bool,
    ) -> Result<(Entry, Opened), Errno> {
        Err(Errno::EROFS)
    }

    /// Creates a file, fifo or socket without opening it.
    async fn make_node(
        &self,
        _: &Caller,
        _directory: LocalId,
        _name: &[u8],
        _what: NewNode,
        _mode: u32,
    ) -> Result<Entry, Errno> {
        Err(Errno::EROFS)
    }

    /// Creates a directory.
    async fn make_directory(
        &self,
        _: &Caller,
        _parent: LocalId,
        _name: &[u8],
        _mode: u32,
    ) -> Result<Entry, Errno> {
        Err(Errno::EROFS)
    }

    /// Creates a symbolic link.
    async fn make_symlink(
        &self,
        _: &Caller,
        _directory: LocalId,
        _name: &[u8],
        _to: &[u8],
    ) -> Result<Entry, Errno> {
        Err(Errno::EROFS)
    }

    /// Gives a file another name.
    async fn link(
        &self,
        _: &Caller,
        _node: LocalId,
        _directory: LocalId,
        _name: &[u8],
    ) -> Result<Entry, Errno> {
        Err(Errno::EROFS)
    }

    /// Removes a name that is not a directory's.
    async fn unlink(&self, _: &Caller, _directory: LocalId, _name: &[u8]) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Removes an empty directory.
    async fn remove_directory(&self, _: &Caller, _parent: LocalId, _name: &[u8]) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Renames within the volume.
    async fn rename(
        &self,
        _: &Caller,
        _from: (LocalId, &[u8]),
        _to: (LocalId, &[u8]),
        _mode: RenameMode,
    ) -> Result<(), Errno> {
        Err(Errno::EROFS)
    }

    /// Puts a directory's names on stable storage.
    async fn sync_directory(&self, _directory: LocalId) -> Result<(), Errno> {
        Ok(())
    }
}
