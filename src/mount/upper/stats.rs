//! What an upper has fetched, counted since it was opened.
//!
//! Counters only: nothing here is read back to decide something.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::mount::lower::Piece;

/// The counters, shared by everyone who counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) fetches: AtomicU64,
    pub(crate) pieces: AtomicU64,
    pub(crate) fetched_bytes: AtomicU64,
    pub(crate) filled_bytes: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) materialized: AtomicU64,
    pub(crate) read_through: AtomicU64,
    pub(crate) read_aheads: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) hints: AtomicU64,
}

/// What an upper has fetched since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UpperStats {
    /// Calls to the lower for content.
    pub fetches: u64,
    /// Pieces it answered with.
    pub pieces: u64,
    /// Bytes in them.
    pub fetched_bytes: u64,
    /// Bytes of them that were written into the upper; the rest was local by then.
    pub filled_bytes: u64,
    /// Times somebody needed bytes that were not local.
    pub waits: u64,
    /// Files and directories of the lower that got a place in the upper.
    pub materialized: u64,
    /// Reads answered from the lower without keeping the bytes, because the disk was full.
    pub read_through: u64,
    /// Times something was fetched because it followed what was read.
    pub read_aheads: u64,
    /// Reads that came here; those of files that are passed through do not.
    pub reads: u64,
    /// Hints that something will be read, which went to the local file.
    pub hints: u64,
}

impl Counters {
    /// Adds to a counter.
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// Counts pieces that the lower answered with.
    pub(crate) fn came(&self, pieces: &[Piece]) {
        Self::add(&self.pieces, pieces.len() as u64);
        Self::add(&self.fetched_bytes, pieces.iter().map(|piece| piece.bytes.len() as u64).sum());
    }

    /// Returns the figures of this moment.
    pub(crate) fn stats(&self) -> UpperStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        UpperStats {
            fetches: get(&self.fetches),
            pieces: get(&self.pieces),
            fetched_bytes: get(&self.fetched_bytes),
            filled_bytes: get(&self.filled_bytes),
            waits: get(&self.waits),
            materialized: get(&self.materialized),
            read_through: get(&self.read_through),
            read_aheads: get(&self.read_aheads),
            reads: get(&self.reads),
            hints: get(&self.hints),
        }
    }
}
