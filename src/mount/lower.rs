//! The lower: an immutable tree whose file contents arrive on demand.
//!
//! This is the seam between the mount and the repository. A basebackup implements it over its manifest and page
//! maps; tests implement it in memory and count what is fetched. The contract: nothing a `Lower` answers ever
//! changes while it lives, a fetch covers what it was asked for or fails, and bytes it hands on are authenticated.
//! Deliberately absent: retries (`patience`), caching of contents and single-flight (the callers), owners.

use std::fmt::Debug;
use std::ops::{ControlFlow, Range};
use std::sync::Mutex;

use bytes::Bytes;
use jiff::Timestamp;

use crate::repo::Urgency;

/// A directory, file or symbolic link of one lower.
///
/// Stable for the lower's life, and below `NodeId::MAX` so that a mount can number several lowers side by side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The largest number a node may have.
    pub const MAX: Self = Self((1 << 39) - 1);
}

/// What kind of thing a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NodeKind {
    Directory,
    File,
    Symlink,
}

/// What a lower knows about a node without its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    pub kind: NodeKind,
    /// Permission bits, `0o7777` at most.
    pub mode: u32,
    /// Bytes of content; a symbolic link's is the length of its target, a directory's 0.
    pub size: u64,
    pub mtime: Timestamp,
}

/// Some content of a file, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file the bytes belong.
    pub offset: u64,
    pub bytes: Bytes,
}

/// Takes pieces as they come.
pub trait PieceSink: Send + Sync {
    /// Takes some, and says whether more are wanted.
    fn take(&self, pieces: Vec<Piece>) -> ControlFlow<()>;
}

/// Keeps all pieces, for who waits for all of them.
#[derive(Debug, Default)]
struct Collected(Mutex<Vec<Piece>>);

/// An entry of a directory.
pub type Child = (Vec<u8>, NodeId, Node);

/// An immutable tree whose file contents arrive on demand.
#[async_trait::async_trait]
pub trait Lower: Send + Sync + Debug {
    /// Returns the tree's top directory.
    fn root(&self) -> NodeId;

    /// Returns what is known about a node, the root included.
    async fn node(&self, node: NodeId) -> Result<Node, LowerError>;

    /// Finds a name in a directory; `None` is proof that it is not there.
    async fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<Option<(NodeId, Node)>, LowerError>;

    /// Lists a directory, without `.` and `..`, in any order.
    async fn list(&self, directory: NodeId) -> Result<Vec<Child>, LowerError>;

    /// Returns where a symbolic link points.
    async fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LowerError>;

    /// Fetches what covers `ranges` of a file, which ascend, and hands it on as it comes.
    ///
    /// The pieces are whole as stored (a chunk's slots that belong to this file), in any order, and may reach
    /// beyond the ranges on both sides; together they cover all of them that lies below the file's size. Each begins
    /// and ends at a multiple of 4 KiB or at the end of the file, so that it can be kept without its neighbours.
    /// Pages that are all zero come as pieces of zeros. A fetch that fails may have handed on some; one whose sink
    /// wants no more has not failed.
    async fn fetch_each(
        &self,
        node: NodeId,
        ranges: &[Range<u64>],
        urgency: Urgency,
        sink: &dyn PieceSink,
    ) -> Result<(), LowerError>;

    /// Fetches what covers `range` of a file, for somebody who needs all of it at once.
    async fn fetch(&self, node: NodeId, range: Range<u64>) -> Result<Vec<Piece>, LowerError> {
        let (all, ranges) = (Collected::default(), [range]);
        self.fetch_each(node, &ranges, Urgency::Foreground, &all).await?;
        Ok(all.0.into_inner().expect("no holder of this lock panics"))
    }
}

impl PieceSink for Collected {
    fn take(&self, pieces: Vec<Piece>) -> ControlFlow<()> {
        self.0.lock().expect("no holder of this lock panics").extend(pieces);
        ControlFlow::Continue(())
    }
}

impl Piece {
    /// Returns the range of the file that the piece holds.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.bytes.len() as u64)
    }
}

/// Why a lower could not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LowerError {
    /// The object was read and is not what was written.
    #[error("object \"{object}\" is damaged: {detail}")]
    Damaged { object: String, detail: String },
    /// The object is whole but nobody trusted vouches for it.
    #[error("object \"{object}\" is not trusted: {detail}")]
    Untrusted { object: String, detail: String },
    /// The store answered that the object is not there.
    #[error("object \"{object}\" is missing")]
    Missing { object: String },
    /// The store did not answer, or not in time; the same call may succeed later.
    #[error("could not reach the store for object \"{object}\": {detail}")]
    Unreachable { object: String, detail: String },
    /// The call makes no sense for this node, or an answer broke the contract above.
    #[error("bug in the lower: {detail}")]
    Contract { detail: String },
}

impl LowerError {
    /// Returns true when waiting may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}
