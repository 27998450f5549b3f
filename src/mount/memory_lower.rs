//! A lower in memory, for tests: recognisable bytes, and a count of everything fetched.
//!
//! The byte at offset `o` of a node is a function of both, never zero, so that a test tells the right byte from a
//! hole and from another file's. Contents come in pieces of [`PIECE`] bytes cut on its multiples, as a full
//! basebackup's chunks do, each handed on by itself.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use jiff::Timestamp;

use crate::mount::lower::{Child, Lower, LowerError, Node, NodeId, NodeKind, Piece, PieceSink};
use crate::repo::Urgency;

/// The size of one piece.
pub const PIECE: u64 = 64 * 1024;

/// A file tree in memory whose contents are computed.
#[derive(Debug, Default)]
pub struct MemoryLower {
    entries: Vec<Entry>,
    fetches: AtomicU64,
    bytes: AtomicU64,
    failures_left: AtomicU32,
    lookup_failures_left: AtomicU32,
    /// After how many pieces the next fetch fails.
    failing_after: Mutex<Option<usize>>,
    asked: Mutex<Vec<(NodeId, Urgency)>>,
    /// Drops pieces from answers, to see whether somebody believes a partial fetch.
    pub short: std::sync::atomic::AtomicBool,
    damaged: Mutex<Option<NodeId>>,
    /// While held for writing, fetches wait: the store does not answer.
    pub gate: Arc<tokio::sync::RwLock<()>>,
    /// While held for writing, fetches stop when they have handed on a piece and there are more.
    pub between: Arc<tokio::sync::RwLock<()>>,
}

#[derive(Debug)]
struct Entry {
    node: Node,
    children: BTreeMap<Vec<u8>, NodeId>,
    target: Vec<u8>,
}

impl MemoryLower {
    /// Builds a tree from paths: a size makes a file, `path/` a directory, `path -> target` a link.
    pub fn build(paths: &[(&str, u64)]) -> Self {
        let mut lower = Self::default();
        lower.push(NodeKind::Directory, 0, b"");
        for (path, size) in paths {
            lower.add(path, *size);
        }
        lower
    }

    fn push(&mut self, kind: NodeKind, size: u64, target: &[u8]) -> NodeId {
        let mode = if kind == NodeKind::Directory { 0o700 } else { 0o600 };
        let mtime = Timestamp::new(1_700_000_000, 123_456_789).expect("a time within range");
        self.entries.push(Entry {
            node: Node { kind, mode, size, mtime },
            children: BTreeMap::new(),
            target: target.to_vec(),
        });
        NodeId(self.entries.len() as u64 - 1)
    }

    fn add(&mut self, path: &str, size: u64) {
        let (path, target) = path.split_once(" -> ").unwrap_or((path, ""));
        let is_directory = path.ends_with('/');
        let mut at = NodeId(0);
        let names: Vec<&str> = path.split('/').filter(|name| !name.is_empty()).collect();
        for (depth, name) in names.iter().enumerate() {
            let known = self.entries[at.0 as usize].children.get(name.as_bytes()).copied();
            at = known.unwrap_or_else(|| {
                let node = match (depth + 1 == names.len(), is_directory, target) {
                    (false, _, _) | (true, true, _) => self.push(NodeKind::Directory, 0, b""),
                    (true, false, "") => self.push(NodeKind::File, size, b""),
                    (true, false, target) => {
                        self.push(NodeKind::Symlink, target.len() as u64, target.as_bytes())
                    }
                };
                self.entries[at.0 as usize].children.insert(name.as_bytes().to_vec(), node);
                node
            });
        }
    }

    /// Returns the node at a path that must exist.
    pub fn at(&self, path: &str) -> NodeId {
        path.split('/')
            .filter(|name| !name.is_empty())
            .fold(NodeId(0), |at, name| self.entries[at.0 as usize].children[name.as_bytes()])
    }

    /// Returns the byte a file has at an offset.
    pub fn byte(node: NodeId, offset: u64) -> u8 {
        let mixed = (node.0 * 31 + offset / 4096).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        ((mixed + offset % 4096) % 255) as u8 + 1
    }

    /// Returns what a file holds in a range.
    pub fn content(&self, node: NodeId, range: Range<u64>) -> Vec<u8> {
        let size = self.entries[node.0 as usize].node.size;
        (range.start.min(size)..range.end.min(size)).map(|offset| Self::byte(node, offset)).collect()
    }

    /// Returns how many fetches were asked for.
    pub fn fetches(&self) -> u64 {
        self.fetches.load(Ordering::SeqCst)
    }

    /// Returns how many bytes were handed out.
    pub fn fetched_bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// Makes the next fetches fail as if the store were away.
    pub fn fail_next_fetches(&self, count: u32) {
        self.failures_left.store(count, Ordering::SeqCst);
    }

    /// Makes the next look-ups fail as if the store were away.
    pub fn fail_next_lookups(&self, count: u32) {
        self.lookup_failures_left.store(count, Ordering::SeqCst);
    }

    /// Makes the store go away once, when the next fetch has handed on so many pieces.
    pub fn fail_after_pieces(&self, pieces: usize) {
        *self.failing_after.lock().expect("no holder of this lock panics") = Some(pieces);
    }

    /// Returns how urgent each fetch was.
    pub fn urgencies(&self) -> Vec<Urgency> {
        self.asked().into_iter().map(|(_, urgency)| urgency).collect()
    }

    /// Returns which node each fetch was for, and how urgent it was.
    pub fn asked(&self) -> Vec<(NodeId, Urgency)> {
        self.asked.lock().expect("no holder of this lock panics").clone()
    }

    /// Makes every fetch of a file fail authentication.
    pub fn damage(&self, path: &str) {
        *self.damaged.lock().expect("no holder of this lock panics") = Some(self.at(path));
    }

    /// Returns which pieces cover ranges, none twice.
    fn pieces(&self, node: NodeId, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, LowerError> {
        let size = self.entry(node)?.node.size;
        let (mut pieces, mut covered) = (Vec::new(), 0);
        for range in ranges {
            let mut start = (range.start / PIECE * PIECE).max(covered);
            while start < range.end.min(size) {
                let end = (start + PIECE).min(size);
                pieces.push(start..end);
                (start, covered) = (end, end);
            }
        }
        if self.short.load(Ordering::SeqCst)
            && let Some(last) = pieces.last_mut()
        {
            last.end = last.start + (last.end - last.start) / 2;
        }
        Ok(pieces)
    }

    fn entry(&self, node: NodeId) -> Result<&Entry, LowerError> {
        self.entries
            .get(node.0 as usize)
            .ok_or_else(|| LowerError::Contract { detail: format!("no {node:?}") })
    }
}

#[async_trait::async_trait]
impl Lower for MemoryLower {
    fn root(&self) -> NodeId {
        NodeId(0)
    }

    async fn node(&self, node: NodeId) -> Result<Node, LowerError> {
        Ok(self.entry(node)?.node)
    }

    async fn lookup(&self, directory: NodeId, name: &[u8]) -> Result<Option<(NodeId, Node)>, LowerError> {
        let entry = self.entry(directory)?;
        if entry.node.kind != NodeKind::Directory {
            return Err(LowerError::Contract { detail: format!("{directory:?} is not a directory") });
        }
        if self.lookup_failures_left.load(Ordering::SeqCst) > 0 {
            self.lookup_failures_left.fetch_sub(1, Ordering::SeqCst);
            let object = format!("memory/{}", directory.0);
            return Err(LowerError::Unreachable { object, detail: "made so".into() });
        }
        let found = entry.children.get(name);
        Ok(found.map(|id| (*id, self.entries[id.0 as usize].node)))
    }

    async fn list(&self, directory: NodeId) -> Result<Vec<Child>, LowerError> {
        let entry = self.entry(directory)?;
        if entry.node.kind != NodeKind::Directory {
            return Err(LowerError::Contract { detail: format!("{directory:?} is not a directory") });
        }
        let children = &entry.children;
        Ok(children.iter().map(|(name, id)| (name.clone(), *id, self.entries[id.0 as usize].node)).collect())
    }

    async fn read_link(&self, node: NodeId) -> Result<Vec<u8>, LowerError> {
        Ok(self.entry(node)?.target.clone())
    }

    async fn fetch_each(
        &self,
        node: NodeId,
        ranges: &[Range<u64>],
        urgency: Urgency,
        sink: &dyn PieceSink,
    ) -> Result<(), LowerError> {
        self.asked.lock().expect("no holder of this lock panics").push((node, urgency));
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let _open = self.gate.read().await;
        // Another task gets its turn here, as it would while a request is under way.
        tokio::task::yield_now().await;
        let object = format!("memory/{}", node.0);
        if *self.damaged.lock().expect("no holder of this lock panics") == Some(node) {
            return Err(LowerError::Damaged { object, detail: "made so".into() });
        }
        if self.failures_left.load(Ordering::SeqCst) > 0 {
            self.failures_left.fetch_sub(1, Ordering::SeqCst);
            return Err(LowerError::Unreachable { object, detail: "made so".into() });
        }
        let failing_after = self.failing_after.lock().expect("no holder of this lock panics").take();
        for (n, range) in self.pieces(node, ranges)?.into_iter().enumerate() {
            if n > 0 {
                drop(self.between.read().await);
            }
            if failing_after == Some(n) {
                return Err(LowerError::Unreachable { object, detail: "made so on the way".into() });
            }
            let bytes: Vec<u8> = range.clone().map(|offset| Self::byte(node, offset)).collect();
            self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
            if sink.take(vec![Piece { offset: range.start, bytes: Bytes::from(bytes) }]).is_break() {
                break;
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }
}
