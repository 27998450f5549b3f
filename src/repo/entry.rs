//! Files, directories and links of a basebackup, as its file table describes them.
//!
//! The tree has three roots: `data` (PGDATA), `tablespaces/<oid>` and `config` (what lived outside PGDATA). Paths
//! are bytes: PostgreSQL and file systems allow names that are not text.

use std::fmt;

use bytes::Bytes;
use jiff::Timestamp;

use crate::repo::chunk::ChunkRef;
use crate::repo::page_map::MapBlock;

/// A relative path below the root of a basebackup, `data/base/5/16384`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TreePath(Vec<u8>);

/// A path that leaves the tree, is empty in a component, or is too long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a path within a basebackup")]
pub struct InvalidPath(String);

/// One directory, file or symbolic link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it stands.
    pub path: TreePath,
    /// Permission bits, `0o7777` at most.
    pub mode: u32,
    /// Time of last modification.
    pub modified: Timestamp,
    /// What it is and holds.
    pub node: Node,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A file of `size` bytes.
    File { size: u64, content: Content },
}

/// Where a file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// In the file table itself: `pg_control` and the tiniest files, at most [`INLINE_BYTES_MAX`].
    Inline(Bytes),
    /// In one chunk, from this byte on, as many bytes as the file has.
    Part(BlobRef),
    /// By the page map that stands here: at most one block.
    Map(Box<MapBlock>),
    /// By page-map blocks in map chunks, one for each [`crate::repo::page_map::MAP_BLOCK_PAGES`].
    Blocks(Vec<BlobRef>),
}

/// A run of bytes within a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobRef {
    /// The chunk.
    pub chunk: ChunkRef,
    /// First byte in the raw chunk.
    pub at: u32,
    /// Number of bytes.
    pub len: u32,
}

/// `pg_control` is 8 KiB and the largest file that is stored inline.
pub const INLINE_BYTES_MAX: usize = 8192;
/// As Linux has it.
pub const PATH_BYTES_MAX: usize = 4096;

impl TreePath {
    /// Checks a path: relative, `/` between components, none of them empty, `.` or `..`; empty for the root.
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, InvalidPath> {
        let path = path.into();
        let component_ok = |part: &[u8]| !matches!(part, b"" | b"." | b"..") && !part.contains(&0);
        let valid =
            path.is_empty() || (path.len() <= PATH_BYTES_MAX && path.split(|b| *b == b'/').all(component_ok));
        if valid { Ok(Self(path)) } else { Err(InvalidPath(String::from_utf8_lossy(&path).into_owned())) }
    }

    /// The root of the basebackup.
    pub fn root() -> Self {
        Self::default()
    }

    /// Returns the path of `name` in this directory.
    pub fn join(&self, name: &[u8]) -> Result<Self, InvalidPath> {
        let mut path = self.0.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Self::new(path)
    }

    /// Returns the bytes of the path.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the directory part and the name.
    pub fn split(&self) -> (&[u8], &[u8]) {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&self.0[..slash], &self.0[slash + 1..]),
            None => (&[], &self.0),
        }
    }

    /// Returns the path below `root`, where it is below it or the root itself.
    pub fn strip(&self, root: &[u8]) -> Option<&[u8]> {
        let rest = self.0.strip_prefix(root)?;
        if root.is_empty() || rest.is_empty() { Some(rest) } else { rest.strip_prefix(b"/") }
    }
}

impl Entry {
    /// Returns the number of bytes of a file, the length of a link's target, 0 for a directory.
    pub fn size(&self) -> u64 {
        match &self.node {
            Node::Directory => 0,
            Node::Symlink(target) => target.len() as u64,
            Node::File { size, .. } => *size,
        }
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.0))
    }
}

impl fmt::Debug for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", String::from_utf8_lossy(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_within_the_tree() {
        for bad in ["/etc/passwd", "data/../../etc", "data//x", "data/", ".", "data/./x", "a\0b"] {
            assert!(TreePath::new(bad).is_err(), "{bad:?}");
        }
        let path = TreePath::new("data/base/5/16384").unwrap();
        assert_eq!(path.split(), (&b"data/base/5"[..], &b"16384"[..]));
        assert_eq!(path.strip(b"data"), Some(&b"base/5/16384"[..]));
        assert_eq!(path.strip(b"dat"), None);
        assert_eq!(path.strip(b""), Some(&b"data/base/5/16384"[..]));
        assert_eq!(TreePath::root().join(b"data").unwrap().to_string(), "data");
        assert_eq!(TreePath::new("data").unwrap().split(), (&b""[..], &b"data"[..]));
    }
}
