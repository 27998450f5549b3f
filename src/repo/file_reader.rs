//! The bytes of files: which chunks cover a range, fetched once, decoded once, handed out in pieces.
//!
//! `fetch` returns whole pieces, everything of a chunk that belongs to the file, so that a writable mount can keep
//! what it has paid for. Chunks that lie side by side in a pack come by one request. One fetch of a chunk is under
//! way at a time: whoever needs it meanwhile waits for that one.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::OnceCell;

use crate::repo::basebackup::Basebackup;
use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{BlobRef, Content, Entry, Node};
use crate::repo::error::{Error, ErrorKind};
use crate::repo::id::PackId;
use crate::repo::manifest::PackRange;
use crate::repo::pack::open_chunk;
use crate::repo::page_map::{MAP_BLOCK_BYTES, MapBlock, PAGE_SIZE, PageSource};
use crate::repo::sealed::FrameKind;

/// Part of a file's content, at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
}

/// Reads file contents of one basebackup; shared by all its users.
#[derive(Debug)]
pub struct FileReader {
    basebackup: Arc<Basebackup>,
    raw: Mutex<RawCache>,
    /// Stored bytes fetched ahead, by pack and offset.
    ahead: Mutex<BTreeMap<(PackId, u32), Ahead>>,
    flights: Mutex<HashMap<ChunkKey, Arc<OnceCell<Bytes>>>>,
    damage: OnceLock<String>,
}

type ChunkKey = (PackId, u32);

/// A run of chunks as stored.
#[derive(Debug)]
struct Ahead {
    bytes: Bytes,
    /// Whether it stays when its last chunk has been taken: the start-up set is read in no order.
    stays: bool,
}

#[derive(Debug)]
struct RawCache {
    chunks: LruCache<ChunkKey, Bytes>,
    bytes: usize,
    bytes_max: usize,
}

/// Two chunks this close in a pack are fetched by one request: a gap costs less than a round trip.
const COALESCE_GAP_BYTES: u32 = 16 << 10;
/// One request fetches at most this much, so that the first byte is not kept waiting.
const REQUEST_BYTES_MAX: u32 = 4 << 20;
/// Zero pages come in pieces of this size, cut from one static block.
const ZERO_PIECE_BYTES: usize = 1 << 20;

impl FileReader {
    /// Creates a reader that keeps at most `cache_bytes_max` of decoded chunks.
    pub fn new(basebackup: Arc<Basebackup>, cache_bytes_max: usize) -> Self {
        let raw = RawCache { chunks: LruCache::unbounded(), bytes: 0, bytes_max: cache_bytes_max };
        Self {
            basebackup,
            raw: Mutex::new(raw),
            ahead: Mutex::new(BTreeMap::new()),
            flights: Mutex::new(HashMap::new()),
            damage: OnceLock::new(),
        }
    }

    /// Returns the basebackup.
    pub fn basebackup(&self) -> &Arc<Basebackup> {
        &self.basebackup
    }

    /// Returns the first damage that was met, for whoever has to explain a server that ended of a read error.
    pub fn damage(&self) -> Option<&str> {
        self.damage.get().map(String::as_str)
    }

    /// Returns the bytes of `range`, cut at the end of the file.
    pub async fn read(&self, entry: &Entry, range: Range<u64>) -> Result<Bytes, Error> {
        let range = range.start..range.end.min(entry.size());
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let pieces = self.fetch(entry, range.clone()).await?;
        if let Some(piece) =
            pieces.iter().find(|piece| piece.range().start <= range.start && piece.range().end >= range.end)
        {
            let from = (range.start - piece.offset) as usize;
            return Ok(piece.bytes.slice(from..from + (range.end - range.start) as usize));
        }
        // As much as the caller asks for, which its own limit bounds: a file may claim any size.
        let mut out = vec![0; (range.end - range.start) as usize];
        let mut covered = 0;
        for piece in &pieces {
            let (from, to) = (piece.offset.max(range.start), piece.range().end.min(range.end));
            if from < to {
                let source = &piece.bytes[(from - piece.offset) as usize..(to - piece.offset) as usize];
                out[(from - range.start) as usize..(to - range.start) as usize].copy_from_slice(source);
                covered += source.len();
            }
        }
        // Pieces never overlap, so what they cover adds up.
        if covered == out.len() { Ok(out.into()) } else { Err(hole(entry)) }
    }

    /// Returns pieces that together cover `range` (within the file) and may reach beyond it, never overlapping.
    pub async fn fetch(&self, entry: &Entry, range: Range<u64>) -> Result<Vec<Piece>, Error> {
        let Node::File { size, content } = &entry.node else {
            return Err(Error::Internal(format!("{} is not a file", entry.path)));
        };
        let range = range.start.min(*size)..range.end.min(*size);
        if range.is_empty() {
            return Ok(Vec::new());
        }
        match content {
            Content::Inline(bytes) => Ok(vec![Piece { offset: 0, bytes: bytes.clone() }]),
            Content::Part(blob) => {
                Ok(vec![Piece { offset: 0, bytes: self.blob(FrameKind::Data, blob).await? }])
            }
            Content::Map(block) => self.fetch_pages(block, 0, *size, range).await,
            Content::Blocks(blobs) => {
                let mut pieces = Vec::new();
                for n in range.start / MAP_BLOCK_BYTES..=(range.end - 1) / MAP_BLOCK_BYTES {
                    let blob = blobs.get(n as usize).ok_or_else(|| hole(entry))?;
                    let block = self.map_block(blob, entry).await?;
                    let base = n * MAP_BLOCK_BYTES;
                    let part = range.start.max(base)..range.end.min(base + MAP_BLOCK_BYTES);
                    pieces.extend(self.fetch_pages(&block, base, *size, part).await?);
                }
                Ok(pieces)
            }
        }
    }

    /// Returns one block of a file's page map.
    pub async fn map_block(&self, blob: &BlobRef, entry: &Entry) -> Result<MapBlock, Error> {
        let bytes = self.blob(FrameKind::Map, blob).await?;
        let object = || format!("the page map of {} in {}", entry.path, blob.chunk.pack);
        let block = MapBlock::decode(&bytes).map_err(|error| Error::damaged(object(), error))?;
        Ok(block)
    }

    /// Fetches the start-up set ahead, at most `bytes_max` stored bytes of it, with few requests.
    pub async fn prefetch_start_set(&self, bytes_max: u64) -> Result<u64, Error> {
        let mut fetched = 0;
        for range in &self.basebackup.start().start_set {
            let room = bytes_max.saturating_sub(fetched).min(u64::from(u32::MAX)) as u32;
            let range = PackRange { to: range.to.min(range.from.saturating_add(room)), ..*range };
            if range.from >= range.to {
                break;
            }
            let bytes = self.basebackup.pack_bytes(range.pack, range.from..range.to).await?;
            fetched += bytes.len() as u64;
            let run = Ahead { bytes, stays: true };
            self.ahead.lock().expect("no holder of this lock panics").insert((range.pack, range.from), run);
        }
        Ok(fetched)
    }

    async fn blob(&self, kind: FrameKind, blob: &BlobRef) -> Result<Bytes, Error> {
        let raw = self.chunk(kind, &blob.chunk).await?;
        let (from, to) = (blob.at as usize, blob.at as usize + blob.len as usize);
        if to > raw.len() {
            return Err(Error::damaged(
                blob.chunk.pack,
                format!("chunk {} is too short", blob.chunk.position),
            ));
        }
        Ok(raw.slice(from..to))
    }

    async fn fetch_pages(
        &self,
        block: &MapBlock,
        base: u64,
        size: u64,
        range: Range<u64>,
    ) -> Result<Vec<Piece>, Error> {
        let first = ((range.start - base) / PAGE_SIZE) as u32;
        let end = (range.end - base).div_ceil(PAGE_SIZE) as u32;
        let mut pieces = Vec::new();
        let mut chunks: Vec<ChunkRef> = Vec::new();
        for extent in block.overlapping(first, end) {
            match &extent.source {
                PageSource::Zero => {
                    let (from, to) = (extent.first.max(first), (extent.first + extent.count).min(end));
                    let to = (base + u64::from(to) * PAGE_SIZE).min(size);
                    push_zeros(&mut pieces, base + u64::from(from) * PAGE_SIZE..to);
                }
                PageSource::Chunk { chunk, .. } if !chunks.contains(chunk) => chunks.push(*chunk),
                PageSource::Chunk { .. } => {}
            }
        }
        let raw = self.chunks(FrameKind::Data, &chunks).await?;
        for (chunk, raw) in chunks.iter().zip(raw) {
            for (extent, slot) in block.extents_in(chunk) {
                let offset = base + u64::from(extent.first) * PAGE_SIZE;
                let len = (u64::from(extent.count) * PAGE_SIZE).min(size.saturating_sub(offset));
                let from = slot as usize * PAGE_SIZE as usize;
                let bytes = raw.get(from..from + len as usize).map(|_| raw.slice(from..from + len as usize));
                let bytes = bytes.ok_or_else(|| {
                    Error::damaged(chunk.pack, format!("chunk {} is shorter than its pages", chunk.position))
                })?;
                pieces.push(Piece { offset, bytes });
            }
        }
        Ok(pieces)
    }

    /// Returns decoded chunks, neighbours in a pack fetched together.
    async fn chunks(&self, kind: FrameKind, chunks: &[ChunkRef]) -> Result<Vec<Bytes>, Error> {
        self.fetch_runs_ahead(chunks).await?;
        let mut raw = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            raw.push(self.chunk(kind, chunk).await?);
        }
        Ok(raw)
    }

    async fn chunk(&self, kind: FrameKind, chunk: &ChunkRef) -> Result<Bytes, Error> {
        let key = (chunk.pack, chunk.position);
        if let Some(raw) = self.raw.lock().expect("no holder of this lock panics").get(key) {
            return Ok(raw);
        }
        let flight =
            self.flights.lock().expect("no holder of this lock panics").entry(key).or_default().clone();
        let result = flight.get_or_try_init(|| self.fetch_chunk(kind, chunk)).await.cloned();
        if let Err(error) = &result
            && error.kind() == ErrorKind::Damaged
        {
            self.damage.get_or_init(|| error.to_string());
        }
        self.flights.lock().expect("no holder of this lock panics").remove(&key);
        result
    }

    async fn fetch_chunk(&self, kind: FrameKind, chunk: &ChunkRef) -> Result<Bytes, Error> {
        let stored = match self.take_ahead(chunk) {
            Some(stored) => stored,
            None => {
                self.basebackup.pack_bytes(chunk.pack, chunk.offset..chunk.offset + chunk.stored_len).await?
            }
        };
        let key = self.basebackup.pack_key(chunk.pack)?;
        let raw = Bytes::from(open_chunk(&key, kind, chunk, &stored)?);
        self.raw
            .lock()
            .expect("no holder of this lock panics")
            .put((chunk.pack, chunk.position), raw.clone());
        Ok(raw)
    }

    /// Fetches runs of two and more chunks that are in no cache yet.
    async fn fetch_runs_ahead(&self, chunks: &[ChunkRef]) -> Result<(), Error> {
        let mut missing: Vec<&ChunkRef> = chunks.iter().filter(|chunk| !self.is_at_hand(chunk)).collect();
        missing.sort_by_key(|chunk| (chunk.pack, chunk.offset));
        let mut run: Option<(PackRange, usize)> = None;
        let mut runs = Vec::new();
        for chunk in missing {
            let end = chunk.offset + chunk.stored_len;
            match &mut run {
                Some((range, count))
                    if range.pack == chunk.pack
                        && chunk.offset <= range.to + COALESCE_GAP_BYTES
                        && end - range.from <= REQUEST_BYTES_MAX =>
                {
                    range.to = range.to.max(end);
                    *count += 1;
                }
                _ => {
                    let next = PackRange { pack: chunk.pack, from: chunk.offset, to: end };
                    runs.extend(run.replace((next, 1)));
                }
            }
        }
        runs.extend(run);
        for (range, _) in runs.into_iter().filter(|(_, count)| *count > 1) {
            let bytes = self.basebackup.pack_bytes(range.pack, range.from..range.to).await?;
            let run = Ahead { bytes, stays: false };
            self.ahead.lock().expect("no holder of this lock panics").insert((range.pack, range.from), run);
        }
        Ok(())
    }

    fn is_at_hand(&self, chunk: &ChunkRef) -> bool {
        self.raw.lock().expect("no holder of this lock panics").contains((chunk.pack, chunk.position))
            || self.ahead_run(chunk).is_some()
    }

    fn ahead_run(&self, chunk: &ChunkRef) -> Option<((PackId, u32), Bytes)> {
        let ahead = self.ahead.lock().expect("no holder of this lock panics");
        let (key, Ahead { bytes, .. }) = ahead.range(..=(chunk.pack, chunk.offset)).next_back()?;
        let from = (chunk.offset - key.1.min(chunk.offset)) as usize;
        let held = key.0 == chunk.pack && from + chunk.stored_len as usize <= bytes.len();
        held.then(|| (*key, bytes.slice(from..from + chunk.stored_len as usize)))
    }

    fn take_ahead(&self, chunk: &ChunkRef) -> Option<Bytes> {
        let (key, stored) = self.ahead_run(chunk)?;
        let mut ahead = self.ahead.lock().expect("no holder of this lock panics");
        // A run is let go when its last chunk has been taken.
        let end = chunk.offset + chunk.stored_len;
        if ahead.get(&key).is_some_and(|run| !run.stays && key.1 + run.bytes.len() as u32 == end) {
            ahead.remove(&key);
        }
        Some(stored)
    }
}

impl Piece {
    /// Returns the range of the file that the piece holds.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes.len() as u64
    }
}

impl RawCache {
    fn get(&mut self, key: ChunkKey) -> Option<Bytes> {
        self.chunks.get(&key).cloned()
    }

    fn contains(&self, key: ChunkKey) -> bool {
        self.chunks.contains(&key)
    }

    fn put(&mut self, key: ChunkKey, raw: Bytes) {
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

fn push_zeros(pieces: &mut Vec<Piece>, range: Range<u64>) {
    static ZEROS: [u8; ZERO_PIECE_BYTES] = [0; ZERO_PIECE_BYTES];
    let mut offset = range.start;
    while offset < range.end {
        let len = (range.end - offset).min(ZERO_PIECE_BYTES as u64);
        pieces.push(Piece { offset, bytes: Bytes::from_static(&ZEROS[..len as usize]) });
        offset += len;
    }
}

fn hole(entry: &Entry) -> Error {
    Error::damaged(&entry.path, "its page map does not cover it")
}
