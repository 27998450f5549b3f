//! Directories and files of a mount that are not a volume's: made up, or answered one name at a time.
//!
//! A [`DynamicDir`] may be backed by a store and hold hundreds of thousands of names: a look-up asks for one name
//! and lists nothing, a listing comes in batches in the order of names. A directory that must not be mistaken for
//! empty while the store is away (`DIR/wal`) simply does not return until it knows; the reader stays killable.
//! [`StaticDir`] is the one whose names are all known when the mount is made.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;

use crate::mount::caller::Caller;
use crate::mount::fs::{FileKind, IO_BYTES_USUAL, IoMode, Lifetime, Volume};
use crate::mount::lower::LowerError;

/// How many names a listing asks for at a time.
pub const LIST_BATCH: usize = 1000;

/// What a name in a virtual directory stands for.
#[derive(Debug, Clone)]
pub enum Item {
    Directory(Arc<dyn DynamicDir>),
    File(Arc<dyn VirtualFile>),
    Symlink(Vec<u8>),
    /// A whole tree: a basebackup's directory, writable or not. One name must always give the same volume.
    Volume(Arc<dyn Volume>),
}

impl Item {
    /// Returns what a listing shows.
    pub fn kind(&self) -> FileKind {
        match self {
            Self::Directory(_) | Self::Volume(_) => FileKind::Directory,
            Self::File(_) => FileKind::File,
            Self::Symlink(_) => FileKind::Symlink,
        }
    }
}

/// A name that was found.
#[derive(Debug, Clone)]
pub struct Found {
    pub item: Item,
    /// Whether the kernel may remember that the name stands for this.
    pub lifetime: Lifetime,
}

/// A directory whose names are answered when asked.
#[async_trait::async_trait]
pub trait DynamicDir: Send + Sync + Debug {
    /// Finds a name; `None` is proof of absence, and the only answer that ends a recovery.
    async fn lookup(&self, caller: &Caller, name: &[u8]) -> Result<Option<Found>, LowerError>;

    /// Lists up to `limit` names that sort after `after`; fewer than `limit` means the end.
    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError>;

    /// Returns when the directory last changed, for `stat`.
    fn modified(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }
}

/// A file that is not in a lower: a decoded WAL segment, `backup.json`.
#[async_trait::async_trait]
pub trait VirtualFile: Send + Sync + Debug {
    /// Returns what tells this file from another that had its name before, so that the kernel never shows the
    /// old one's pages: a partial segment and the final one differ here.
    fn identity(&self) -> u64;

    /// Returns the size `stat` shows.
    fn size(&self) -> u64;

    /// Returns the permission bits.
    fn mode(&self) -> u32 {
        0o400
    }

    /// Returns when it was last changed.
    fn modified(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    /// Returns how much a program had best read at a time.
    fn io_bytes(&self) -> u32 {
        IO_BYTES_USUAL
    }

    /// Opens it; may take as long as the store needs.
    async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError>;
}

/// An open virtual file.
#[async_trait::async_trait]
pub trait VirtualReader: Send + Sync + Debug {
    /// Reads up to `length` bytes; fewer only at the end. What it says here beats what `stat` said.
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, LowerError>;
}

/// A directory whose names are all known.
#[derive(Debug, Default)]
pub struct StaticDir {
    names: BTreeMap<Vec<u8>, Item>,
    modified: Timestamp,
}

impl StaticDir {
    /// Creates an empty directory.
    pub fn new(modified: Timestamp) -> Self {
        Self { names: BTreeMap::new(), modified }
    }

    /// Adds a name.
    pub fn with(mut self, name: &str, item: Item) -> Self {
        self.names.insert(name.as_bytes().to_vec(), item);
        self
    }
}

#[async_trait::async_trait]
impl DynamicDir for StaticDir {
    async fn lookup(&self, _: &Caller, name: &[u8]) -> Result<Option<Found>, LowerError> {
        Ok(self.names.get(name).map(|item| Found { item: item.clone(), lifetime: Lifetime::Forever }))
    }

    async fn list(&self, after: Option<&[u8]>, limit: usize) -> Result<Vec<(Vec<u8>, FileKind)>, LowerError> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        let names = self.names.range::<[u8], _>((from, Unbounded)).take(limit);
        Ok(names.map(|(name, item)| (name.clone(), item.kind())).collect())
    }

    fn modified(&self) -> Timestamp {
        self.modified
    }
}

/// A small file whose content is known: `backup.json`, `links.txt`, a proof of absence.
#[derive(Debug, Clone)]
pub struct StaticFile {
    content: Bytes,
    modified: Timestamp,
}

impl StaticFile {
    /// Creates a file of this content.
    pub fn new(content: impl Into<Bytes>, modified: Timestamp) -> Self {
        Self { content: content.into(), modified }
    }
}

#[async_trait::async_trait]
impl VirtualFile for StaticFile {
    fn identity(&self) -> u64 {
        0
    }

    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn modified(&self) -> Timestamp {
        self.modified
    }

    async fn open(&self) -> Result<(Arc<dyn VirtualReader>, IoMode), LowerError> {
        Ok((Arc::new(self.clone()), IoMode::Cached))
    }
}

#[async_trait::async_trait]
impl VirtualReader for StaticFile {
    async fn read(&self, offset: u64, length: u32) -> Result<Bytes, LowerError> {
        let size = self.content.len();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(size);
        Ok(self.content.slice(start..start.saturating_add(length as usize).min(size)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_listing_in_batches_shows_every_name_once() {
        let file = Arc::new(StaticFile::new("x", Timestamp::UNIX_EPOCH));
        let names = ["a", "b", "c", "d", "e"];
        let directory = names.iter().fold(StaticDir::new(Timestamp::UNIX_EPOCH), |dir, name| {
            dir.with(name, Item::File(file.clone()))
        });
        let mut seen: Vec<Vec<u8>> = Vec::new();
        loop {
            let batch = directory.list(seen.last().map(Vec::as_slice), 2).await.unwrap();
            seen.extend(batch.iter().map(|(name, _)| name.clone()));
            if batch.len() < 2 {
                break;
            }
        }
        assert_eq!(seen, names.map(|name| name.as_bytes().to_vec()));
    }

    #[tokio::test]
    async fn a_static_file_reads_within_its_bounds() {
        let file = StaticFile::new("hello", Timestamp::UNIX_EPOCH);
        assert_eq!(file.read(1, 3).await.unwrap(), "ell");
        assert_eq!(file.read(3, 100).await.unwrap(), "lo");
        assert_eq!(file.read(u64::MAX, 1).await.unwrap(), "");
    }
}
