//! A lower as a read-only volume.
//!
//! Node numbers are the lower's own plus one, so nothing has to be remembered about what the kernel knows. Content
//! goes through the kernel's page cache; behind it stands a small cache of decoded pages, because a chunk holds
//! more than the page that was asked for and decoding it again for each would cost more than the request.

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};
use lru::LruCache;
use nix::errno::Errno;

use crate::disk::Owner;
use crate::mount::caller::Caller;
use crate::mount::errno;
use crate::mount::fs::{
    Attributes, Capacity, Entry, IO_BYTES_USUAL, IoMode, Lifetime, ListEntry, LocalId, OpenFile, Opened,
    Seek, Volume,
};
use crate::mount::lower::{Lower, LowerError, Node, NodeId, NodeKind, Piece};
use crate::mount::single_flight::Flights;
use crate::repo::Urgency;

/// What is cached as one, PostgreSQL's page.
const PAGE: u64 = 8192;

/// How much decoded content one volume keeps: enough for the chunks a few hundred scattered reads touch.
const CACHE_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A lower as a read-only volume.
#[derive(Debug, Clone)]
pub struct LowerVolume {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    lower: Arc<dyn Lower>,
    owner: Owner,
    flights: Flights,
    pages: Mutex<LruCache<(NodeId, u64), Bytes>>,
}

#[derive(Debug)]
struct LowerFile {
    shared: Arc<Shared>,
    node: NodeId,
    size: u64,
}

impl LowerVolume {
    /// Shows `lower` as belonging to `owner`.
    pub fn new(lower: Arc<dyn Lower>, owner: Owner) -> Self {
        let pages =
            std::num::NonZero::new(CACHE_BYTES_MAX / PAGE as usize).expect("the cache is larger than a page");
        let shared =
            Shared { lower, owner, flights: Flights::new(), pages: Mutex::new(LruCache::new(pages)) };
        Self { shared: Arc::new(shared) }
    }

    /// Finds a node's metadata: a lower answers by name only, so the root is the one node without an entry.
    fn entry(&self, id: NodeId, node: &Node) -> Result<Entry, Errno> {
        Ok(Entry {
            id: local(id)?,
            attributes: attributes(node, self.shared.owner),
            lifetime: Lifetime::Forever,
        })
    }
}

#[async_trait::async_trait]
impl Volume for LowerVolume {
    fn root(&self) -> LocalId {
        LocalId(self.shared.lower.root().0 + 1)
    }

    async fn lookup(&self, caller: &Caller, directory: LocalId, name: &[u8]) -> Result<Entry, Errno> {
        let lower = &self.shared.lower;
        let found = caller.killable(async { errno_of(lower.lookup(node_id(directory), name).await) }).await?;
        let (id, node) = found.ok_or(Errno::ENOENT)?;
        self.entry(id, &node)
    }

    async fn attributes(&self, caller: &Caller, node: LocalId) -> Result<Entry, Errno> {
        let lower = &self.shared.lower;
        let found = caller.killable(async { errno_of(lower.node(node_id(node)).await) }).await?;
        self.entry(node_id(node), &found)
    }

    async fn read_link(&self, caller: &Caller, node: LocalId) -> Result<Vec<u8>, Errno> {
        let lower = &self.shared.lower;
        caller.killable(async { errno_of(lower.read_link(node_id(node)).await) }).await
    }

    async fn list(&self, caller: &Caller, directory: LocalId) -> Result<Vec<ListEntry>, Errno> {
        let lower = &self.shared.lower;
        let children = caller.killable(async { errno_of(lower.list(node_id(directory)).await) }).await?;
        children
            .into_iter()
            .map(|(name, id, node)| Ok(ListEntry { name, id: local(id)?, kind: node.kind.into() }))
            .collect()
    }

    async fn open(&self, caller: &Caller, node: LocalId, writable: bool) -> Result<Opened, Errno> {
        if writable {
            return Err(Errno::EROFS);
        }
        let found = self.attributes(caller, node).await?;
        let file =
            LowerFile { shared: self.shared.clone(), node: node_id(node), size: found.attributes.size };
        Ok(Opened { file: Arc::new(file), mode: IoMode::Cached })
    }

    fn capacity(&self) -> Result<Capacity, Errno> {
        Ok(Capacity { block_size: 4096, ..Capacity::default() })
    }
}

#[async_trait::async_trait]
impl OpenFile for LowerFile {
    async fn read(&self, caller: &Caller, offset: u64, length: u32) -> Result<Bytes, Errno> {
        let end = offset.saturating_add(u64::from(length)).min(self.size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        caller.killable(self.shared.read(self.node, self.size, offset, end)).await
    }

    async fn seek(&self, offset: u64, what: Seek) -> Result<u64, Errno> {
        match what {
            _ if offset >= self.size => Err(Errno::ENXIO),
            Seek::Data => Ok(offset),
            Seek::Hole => Ok(self.size),
        }
    }
}

impl Shared {
    /// Reads `offset..end`, which lies within the file, fetching each missing stretch once.
    async fn read(&self, node: NodeId, size: u64, offset: u64, end: u64) -> Result<Bytes, Errno> {
        let first = offset / PAGE;
        let pages = (end.div_ceil(PAGE) - first) as usize;
        // Bounded by what one FUSE read asks for, 1 MiB.
        let mut got: Vec<Option<Bytes>> = vec![None; pages];
        loop {
            self.take_cached(node, first, &mut got);
            let missing = missing_ranges(first, &got, size);
            if missing.is_empty() {
                break;
            }
            let claim = self.flights.claim(node, &missing, Urgency::Foreground).await;
            // Somebody else's flight may have landed while we waited for ours.
            self.take_cached(node, first, &mut got);
            for run in missing_ranges(first, &got, size).iter().flat_map(|missing| claim.runs_in(missing)) {
                let pieces = errno_of(self.lower.fetch(node, run.clone()).await)?;
                self.keep(node, size, &pieces, first, &mut got);
                if missing_in(first, &got, size, &run) {
                    let detail = format!("fetch of bytes {run:?} of {node:?} left a gap");
                    return Err(errno::of_lower(&LowerError::Contract { detail }));
                }
            }
        }
        Ok(assemble(&got, (offset - first * PAGE) as usize, (end - offset) as usize))
    }

    fn take_cached(&self, node: NodeId, first: u64, got: &mut [Option<Bytes>]) {
        let mut cached = self.pages.lock().expect("no holder of this lock panics");
        for (page, slot) in (first..).zip(got.iter_mut()).filter(|(_, slot)| slot.is_none()) {
            *slot = cached.get(&(node, page)).cloned();
        }
    }

    /// Keeps every whole page of the pieces, and hands those that were asked for to `got`.
    fn keep(&self, node: NodeId, size: u64, pieces: &[Piece], first: u64, got: &mut [Option<Bytes>]) {
        let mut cached = self.pages.lock().expect("no holder of this lock panics");
        for piece in pieces {
            let end = piece.offset.saturating_add(piece.bytes.len() as u64).min(size);
            for page in piece.offset.div_ceil(PAGE)..end.div_ceil(PAGE) {
                let (start, stop) = (page * PAGE, ((page + 1) * PAGE).min(size));
                if stop > end {
                    continue;
                }
                let from = (start - piece.offset) as usize;
                // Copied, or one page would keep its whole chunk in memory.
                let bytes = Bytes::copy_from_slice(&piece.bytes[from..from + (stop - start) as usize]);
                if let Some(slot) = page.checked_sub(first).and_then(|index| got.get_mut(index as usize)) {
                    *slot = Some(bytes.clone());
                }
                cached.put((node, page), bytes);
            }
        }
    }
}

/// Returns the runs of missing pages as bytes, in order.
fn missing_ranges(first: u64, got: &[Option<Bytes>], size: u64) -> Vec<std::ops::Range<u64>> {
    let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
    for (page, _) in (first..).zip(got).filter(|(_, slot)| slot.is_none()) {
        let bytes = page * PAGE..((page + 1) * PAGE).min(size);
        match ranges.last_mut() {
            Some(range) if range.end == bytes.start => range.end = bytes.end,
            _ => ranges.push(bytes),
        }
    }
    ranges
}

fn missing_in(first: u64, got: &[Option<Bytes>], size: u64, run: &std::ops::Range<u64>) -> bool {
    (first..).zip(got).any(|(page, slot)| {
        slot.is_none() && page * PAGE < run.end && ((page + 1) * PAGE).min(size) > run.start
    })
}

fn assemble(got: &[Option<Bytes>], skip: usize, length: usize) -> Bytes {
    if let [Some(only)] = got {
        return only.slice(skip..skip + length);
    }
    let mut joined = BytesMut::with_capacity(got.len() * PAGE as usize);
    for page in got.iter().flatten() {
        joined.extend_from_slice(page);
    }
    joined.freeze().slice(skip..skip + length)
}

/// Returns what `stat` shows for a lower's node that belongs to `owner`.
pub(crate) fn attributes(node: &Node, owner: Owner) -> Attributes {
    let mtime = SystemTime::from(node.mtime);
    Attributes {
        kind: node.kind.into(),
        mode: node.mode & 0o7777,
        owner,
        size: node.size,
        // Nothing of it is on a local disk, but tools take 0 for a hole and would skip the content.
        blocks: if node.kind == NodeKind::File { node.size.div_ceil(512) } else { 0 },
        links: 1,
        atime: mtime,
        mtime,
        ctime: mtime,
        io_bytes: IO_BYTES_USUAL,
    }
}

fn errno_of<T>(outcome: Result<T, LowerError>) -> Result<T, Errno> {
    outcome.map_err(|error| errno::of_lower(&error))
}

fn node_id(id: LocalId) -> NodeId {
    NodeId(id.0.saturating_sub(1))
}

fn local(id: NodeId) -> Result<LocalId, Errno> {
    if id <= NodeId::MAX {
        return Ok(LocalId(id.0 + 1));
    }
    Err(errno::of_lower(&LowerError::Contract { detail: format!("{id:?} is beyond NodeId::MAX") }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mount::memory_lower::MemoryLower;

    async fn open(lower: &Arc<MemoryLower>, path: &str) -> Arc<dyn OpenFile> {
        let volume = LowerVolume::new(lower.clone(), Owner::current());
        let id = LocalId(lower.at(path).0 + 1);
        volume.open(&Caller::internal(), id, false).await.unwrap().file
    }

    #[tokio::test]
    async fn reads_are_right_at_every_edge() {
        let size = 3 * 65536 + 8192 + 77;
        let lower = Arc::new(MemoryLower::build(&[("base/1/16384", size)]));
        let node = lower.at("base/1/16384");
        let file = open(&lower, "base/1/16384").await;
        let caller = Caller::internal();
        for (offset, length) in [
            (0, 1),
            (8191, 2),
            (65535, 2),
            (65536, 131072),
            (size - 1, 1),
            (size - 5, 100),
            (size, 1),
            (u64::MAX, 9),
        ] {
            let got = file.read(&caller, offset, length).await.unwrap();
            assert_eq!(
                got,
                lower.content(node, offset..offset.saturating_add(u64::from(length))),
                "{offset}+{length}"
            );
        }
    }

    /// Nothing changes, so what was read once need not come here again.
    #[tokio::test]
    async fn its_files_are_for_the_page_cache() {
        let lower = Arc::new(MemoryLower::build(&[("f", 10)]));
        let volume = LowerVolume::new(lower.clone(), Owner::current());
        let opened = volume.open(&Caller::internal(), LocalId(lower.at("f").0 + 1), false).await.unwrap();
        assert_eq!(opened.mode, IoMode::Cached);
        assert!(opened.file.backing().is_err());
    }

    #[tokio::test]
    async fn a_chunk_is_fetched_once_however_many_read_it() {
        let lower = Arc::new(MemoryLower::build(&[("f", 65536)]));
        let file = open(&lower, "f").await;
        let reads = (0..8u64).map(|page| {
            let file = file.clone();
            async move { file.read(&Caller::internal(), page * 8192, 8192).await.unwrap().len() }
        });
        assert_eq!(futures::future::join_all(reads).await, [8192; 8]);
        assert_eq!(lower.fetches(), 1);
    }

    #[tokio::test]
    async fn a_partial_fetch_is_an_error_and_is_asked_again() {
        let lower = Arc::new(MemoryLower::build(&[("f", 65536)]));
        let file = open(&lower, "f").await;
        lower.short.store(true, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(file.read(&Caller::internal(), 60000, 10).await, Err(Errno::EIO));
        lower.short.store(false, std::sync::atomic::Ordering::SeqCst);
        let got = file.read(&Caller::internal(), 60000, 10).await.unwrap();
        assert_eq!(got, lower.content(lower.at("f"), 60000..60010));
    }

    #[tokio::test]
    async fn a_volume_that_cannot_change_says_so() {
        let lower = Arc::new(MemoryLower::build(&[("f", 1)]));
        let volume = LowerVolume::new(lower.clone(), Owner::current());
        let caller = Caller::internal();
        let root = volume.root();
        assert_eq!(volume.unlink(&caller, root, b"f").await, Err(Errno::EROFS));
        assert_eq!(volume.make_directory(&caller, root, b"d", 0o700).await, Err(Errno::EROFS));
        assert_eq!(volume.lookup(&caller, root, b"g").await, Err(Errno::ENOENT));
        let f = volume.lookup(&caller, root, b"f").await.unwrap();
        assert_eq!(f.attributes.mode, 0o600);
        assert!(matches!(volume.open(&caller, f.id, true).await, Err(Errno::EROFS)));
    }
}
