//! A lower over a folder of the local file system: what a basebackup of it would be, without a repository.
//!
//! Nodes are numbered as they are found. The folder must not change meanwhile.

use std::fs;
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use walden::mount::lower::{Child, Lower, LowerError, Node, NodeId, NodeKind, Piece, PieceSink};
use walden::repo::Urgency;

/// The size of one piece.
const PIECE: u64 = 64 * 1024;

#[derive(Debug)]
pub struct FolderLower {
    paths: Mutex<Vec<PathBuf>>,
    pub fetched_bytes: AtomicU64,
}

impl FolderLower {
    pub fn new(folder: &Path) -> Self {
        Self { paths: Mutex::new(vec![folder.to_owned()]), fetched_bytes: AtomicU64::new(0) }
    }

    fn path(&self, node: NodeId) -> PathBuf {
        self.paths.lock().unwrap()[node.0 as usize].clone()
    }

    fn number(&self, path: PathBuf) -> NodeId {
        let mut paths = self.paths.lock().unwrap();
        let known = paths.iter().position(|other| *other == path);
        NodeId(known.unwrap_or_else(|| {
            paths.push(path);
            paths.len() - 1
        }) as u64)
    }

    fn look(path: &Path) -> Option<Node> {
        let found = fs::symlink_metadata(path).ok()?;
        let kind = match found.file_type() {
            kind if kind.is_dir() => NodeKind::Directory,
            kind if kind.is_symlink() => NodeKind::Symlink,
            _ => NodeKind::File,
        };
        let size = if kind == NodeKind::Directory { 0 } else { found.len() };
        let mtime = Timestamp::new(found.mtime(), found.mtime_nsec() as i32).unwrap();
        Some(Node { kind, mode: found.mode() & 0o7777, size, mtime })
    }
}

#[async_trait::async_trait]
impl Lower for FolderLower {
    fn root(&self) -> NodeId {
        NodeId(0)
    }

    async fn node(&self, node: NodeId) -> Result<Node, LowerError> {
        Ok(Self::look(&self.path(node)).unwrap())
    }

    async fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<Option<(NodeId, Node)>, LowerError> {
        let path = self.path(directory).join(std::ffi::OsStr::from_bytes(name));
        Ok(Self::look(&path).map(|node| (self.number(path), node)))
    }

    async fn list(&self, directory: NodeId) -> Result<Vec<Child>, LowerError> {
        let entries = fs::read_dir(self.path(directory)).unwrap().map(|entry| entry.unwrap());
        Ok(entries
            .map(|entry| {
                let node = Self::look(&entry.path()).unwrap();
                (entry.file_name().into_vec(), self.number(entry.path()), node)
            })
            .collect())
    }

    async fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LowerError> {
        Ok(fs::read_link(self.path(node)).unwrap().into_os_string().into_vec())
    }

    async fn fetch_each(
        &self,
        node: NodeId,
        ranges: &[Range<u64>],
        _: Urgency,
        sink: &dyn PieceSink,
    ) -> Result<(), LowerError> {
        // Another task gets its turn, as while a request is under way.
        tokio::task::yield_now().await;
        let file = fs::File::open(self.path(node)).unwrap();
        let size = file.metadata().unwrap().len();
        let mut offset = 0;
        for range in ranges {
            offset = offset.max(range.start / PIECE * PIECE);
            while offset < range.end.min(size) {
                let mut bytes = vec![0; (size - offset).min(PIECE) as usize];
                file.read_exact_at(&mut bytes, offset).unwrap();
                self.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if sink.take(vec![Piece { offset, bytes: bytes.into() }]).is_break() {
                    return Ok(());
                }
                offset += PIECE;
            }
        }
        Ok(())
    }
}
