//! Decoded chunks, the least recently used let go of first.
//!
//! For what is asked for in parts: a page map, and the chunks that small files share.

use bytes::Bytes;
use lru::LruCache;

use crate::repo::fetch_plan::ChunkKey;

/// Decoded chunks, as many as a number of bytes allows.
#[derive(Debug)]
pub(crate) struct ChunkCache {
    chunks: LruCache<ChunkKey, Bytes>,
    bytes: usize,
    bytes_max: usize,
}

impl ChunkCache {
    /// Creates a cache that keeps at most `bytes_max`.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { chunks: LruCache::unbounded(), bytes: 0, bytes_max }
    }

    pub(crate) fn get(&mut self, key: ChunkKey) -> Option<Bytes> {
        self.chunks.get(&key).cloned()
    }

    pub(crate) fn put(&mut self, key: ChunkKey, raw: Bytes) {
        self.bytes += raw.len();
        if let Some(replaced) = self.chunks.put(key, raw) {
            self.bytes -= replaced.len();
        }
        while self.bytes > self.bytes_max {
            let Some((_, evicted)) = self.chunks.pop_lru() else {
                break;
            };
            self.bytes -= evicted.len();
        }
    }
}
