//! The bytes of files: which chunks cover a range, fetched once, decoded once, handed on in pieces as they come.
//!
//! ```text
//! ranges ─▶ FetchPlan ─▶ Flights (nobody else fetches these) ─▶ runs of neighbours in a pack
//!   run ─▶ Transfers (a place, room) ─▶ one request ─▶ CPU pool (authenticate, inflate) ─▶ pieces ─▶ taker
//! ```
//! Pieces are whole, everything of a chunk that belongs to the file, so that a writable mount can keep what it has paid
//! for. Runs are fetched side by side and handed on in the order in which they come. What is damaged keeps nothing else
//! from being handed on: the fetch then ends with that error.

use std::collections::{BTreeMap, HashSet};
use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;

use crate::repo::basebackup::Basebackup;
use crate::repo::chunk::ChunkRef;
use crate::repo::chunk_cache::ChunkCache;
use crate::repo::chunk_runs::{ChunkRun, RunLimits, StoredRun, plan_runs_within};
use crate::repo::entry::{BlobRef, Content, Entry, Node};
use crate::repo::error::{Error, ErrorKind};
use crate::repo::fetch_plan::{ChunkKey, FetchPlan, WantedChunk};
use crate::repo::flights::{Claim, Flights};
use crate::repo::id::PackId;
use crate::repo::manifest::PackRange;
use crate::repo::page_map::{MAP_BLOCK_BYTES, MapBlock, PageSource};
use crate::repo::sealed::FrameKind;
use crate::repo::transfers::{Transfers, Urgency};

/// Part of a file's content, at its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Bytes,
}

/// Takes pieces as they come, and says whether more are wanted.
pub type PieceTaker<'a> = dyn Fn(Vec<Piece>) -> ControlFlow<()> + Send + Sync + 'a;

/// Reads file contents of one basebackup; shared by all its users.
#[derive(Debug)]
pub struct FileReader {
    basebackup: Arc<Basebackup>,
    /// Page maps have a cache of their own: all that is read of a large file passes by the other one.
    maps: Mutex<ChunkCache>,
    cache: Mutex<ChunkCache>,
    /// The start-up set as stored, by pack and offset. It is read in no order, so it stays.
    start_set: Mutex<BTreeMap<(PackId, u32), Bytes>>,
    flights: Arc<Flights<ChunkKey>>,
    transfers: Transfers,
    damage: Mutex<Option<String>>,
}

/// Chunks this close in a pack are fetched by one request: a gap costs less than a round trip. What a request brings is
/// no more when it is open than the largest part anybody asks for.
const LIMITS: RunLimits =
    RunLimits { bytes_max: REQUEST_BYTES_MAX, gap_bytes_max: 16 << 10, raw_bytes_max: 8 << 20 };
/// Requests are no longer than what a line of 100 MB/s brings in two round trips of 20 ms, so that the first byte is not
/// kept waiting: 4 MiB of pages that do not compress, and the tags of their chunks.
const REQUEST_BYTES_MAX: u32 = (4 << 20) + (4 << 10);
/// A job on the pool opens so many chunks, a mebibyte: little enough to come soon, enough to be worth handing over.
const CHUNKS_PER_JOB: usize = 16;
/// So few chunks are opened where they arrive: handing them over would cost more than it spreads.
const CHUNKS_OPENED_HERE: usize = 2;
/// Zero pages come in pieces of this size, cut from one static block.
const ZERO_PIECE_BYTES: usize = 1 << 20;

impl FileReader {
    /// Creates a reader that keeps at most `cache_bytes_max` of decoded chunks.
    pub fn new(basebackup: Arc<Basebackup>, cache_bytes_max: usize) -> Self {
        Self {
            basebackup,
            maps: Mutex::new(ChunkCache::new(cache_bytes_max / 4)),
            cache: Mutex::new(ChunkCache::new(cache_bytes_max - cache_bytes_max / 4)),
            start_set: Mutex::new(BTreeMap::new()),
            flights: Flights::new(),
            transfers: Transfers::default(),
            damage: Mutex::default(),
        }
    }

    /// Shares the bounds of what is under way, and the threads, with other readers.
    pub fn sharing(self, transfers: Transfers) -> Self {
        Self { transfers, ..self }
    }

    /// Returns the basebackup.
    pub fn basebackup(&self) -> &Arc<Basebackup> {
        &self.basebackup
    }

    /// Returns the first damage that was met, for whoever has to explain a server that ended of a read error.
    pub fn damage(&self) -> Option<String> {
        self.lock_damage().clone()
    }

    /// Forgets the damage that was met, because it may have been put right: what still is damaged is met again.
    pub fn forget_damage(&self) {
        *self.lock_damage() = None;
    }

    fn lock_damage(&self) -> MutexGuard<'_, Option<String>> {
        self.damage.lock().expect("no holder of this lock panics")
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
        let fetched = Mutex::new(Vec::new());
        let take = |pieces: Vec<Piece>| -> ControlFlow<()> {
            fetched.lock().expect("no holder of this lock panics").extend(pieces);
            ControlFlow::Continue(())
        };
        let ranges = [range];
        self.fetch_each(entry, &ranges, Urgency::Foreground, &take).await?;
        Ok(fetched.into_inner().expect("no holder of this lock panics"))
    }

    /// Hands on pieces as [`fetch`](Self::fetch) returns them, for ranges that ascend, until nobody wants more.
    ///
    /// Dropping the future ends what it has under way and leaves it to whoever wants the same.
    pub async fn fetch_each(
        &self,
        entry: &Entry,
        ranges: &[Range<u64>],
        urgency: Urgency,
        take: &PieceTaker<'_>,
    ) -> Result<(), Error> {
        let outcome = self.fetch_all(entry, ranges, urgency, take).await;
        if let Err(error) = &outcome
            && error.kind() == ErrorKind::Damaged
        {
            self.lock_damage().get_or_insert_with(|| error.to_string());
        }
        outcome
    }

    /// Returns one block of a file's page map.
    pub async fn map_block(&self, blob: &BlobRef, entry: &Entry) -> Result<MapBlock, Error> {
        self.map_block_as(blob, entry, Urgency::Foreground).await
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
            let mut start_set = self.start_set.lock().expect("no holder of this lock panics");
            start_set.insert((range.pack, range.from), bytes);
        }
        Ok(fetched)
    }

    /// Gets chunks of small files ready, neighbours in a pack by one request, for whoever reads the files next.
    ///
    /// What is decoded must fit the cache of chunks, or some of it is fetched again.
    pub async fn load_together(&self, entries: &[Entry]) -> Result<(), Error> {
        let mut plan = FetchPlan::default();
        for entry in entries {
            let Node::File { content, .. } = &entry.node else { continue };
            match content {
                Content::Part(blob) => plan.add_chunk(blob.chunk),
                Content::Map(block) => {
                    for extent in block.extents() {
                        if let PageSource::Chunk { chunk, .. } = &extent.source {
                            plan.add_chunk(*chunk);
                        }
                    }
                }
                // The first is here, and the others are not small.
                Content::Inline(_) | Content::Blocks(_) => {}
            }
        }
        let take = |_: Vec<Piece>| -> ControlFlow<()> { ControlFlow::Continue(()) };
        self.fetch_chunks(plan.finish().chunks, Urgency::Background, &take).await
    }

    async fn fetch_all(
        &self,
        entry: &Entry,
        ranges: &[Range<u64>],
        urgency: Urgency,
        take: &PieceTaker<'_>,
    ) -> Result<(), Error> {
        let Node::File { size, content } = &entry.node else {
            return Err(Error::Internal(format!("{} is not a file", entry.path)));
        };
        let cut = ranges.iter().map(|range| range.start.min(*size)..range.end.min(*size));
        let ranges: Vec<Range<u64>> = cut.filter(|range| !range.is_empty()).collect();
        if ranges.is_empty() {
            return Ok(());
        }
        let mut plan = FetchPlan::default();
        match content {
            Content::Inline(bytes) => {
                let _ = take(vec![Piece { offset: 0, bytes: bytes.clone() }]);
            }
            Content::Part(blob) => plan.add_blob(blob),
            Content::Map(block) => plan.add_block(block, 0, *size, &ranges),
            Content::Blocks(blobs) => {
                for n in blocks_of(&ranges) {
                    let blob = blobs.get(n as usize).ok_or_else(|| hole(entry))?;
                    let block = self.map_block_as(blob, entry, urgency).await?;
                    plan.add_block(&block, n * MAP_BLOCK_BYTES, *size, &ranges);
                }
            }
        }
        let FetchPlan { zeros, chunks } = plan.finish();
        let zeros: Vec<Piece> = zeros.into_iter().flat_map(zero_pieces).collect();
        if !zeros.is_empty() && take(zeros).is_break() {
            return Ok(());
        }
        self.fetch_chunks(chunks, urgency, take).await
    }

    async fn map_block_as(&self, blob: &BlobRef, entry: &Entry, urgency: Urgency) -> Result<MapBlock, Error> {
        let raw = self.map_chunk(&blob.chunk, urgency).await?;
        let bytes = raw.get(blob.at as usize..blob.at as usize + blob.len as usize);
        let bytes = bytes.ok_or_else(|| too_short(&blob.chunk))?;
        let object = || format!("the page map of {} in {}", entry.path, blob.chunk.pack);
        MapBlock::decode(bytes).map_err(|error| Error::damaged(object(), error))
    }

    /// Returns a decoded chunk of page maps.
    async fn map_chunk(&self, chunk: &ChunkRef, urgency: Urgency) -> Result<Bytes, Error> {
        let key = (chunk.pack, chunk.position);
        let cached = || self.maps.lock().expect("no holder of this lock panics").get(key);
        if let Some(raw) = cached() {
            return Ok(raw);
        }
        let claim = self.flights.claim(&[key], urgency).await;
        if let Some(raw) = cached() {
            return Ok(raw);
        }
        let raw = match self.open_at_hand(FrameKind::Map, chunk)? {
            Some(raw) => raw,
            None => {
                let bytes = u64::from(chunk.stored_len) + u64::from(chunk.raw_len);
                let _permit = self.transfers.admit(urgency, bytes).await;
                claim.goes_out();
                let range = chunk.offset..chunk.offset.saturating_add(chunk.stored_len);
                let run = ChunkRun { pack: chunk.pack, range, chunks: 0..1 };
                let stored = self.basebackup.fetch_run(&run).await?;
                Bytes::from(stored.open(FrameKind::Map, chunk)?)
            }
        };
        self.maps.lock().expect("no holder of this lock panics").put(key, raw.clone());
        Ok(raw)
    }

    /// Fetches data chunks: those that nobody fetches first, then those that others have fetched meanwhile.
    async fn fetch_chunks(
        &self,
        mut wanted: Vec<WantedChunk>,
        urgency: Urgency,
        take: &PieceTaker<'_>,
    ) -> Result<(), Error> {
        let mut damage = None;
        while !wanted.is_empty() {
            let keys: Vec<ChunkKey> = wanted.iter().map(WantedChunk::key).collect();
            let claim = self.flights.claim(&keys, urgency).await;
            let held: HashSet<ChunkKey> = claim.keys().iter().copied().collect();
            let (mine, others): (Vec<_>, Vec<_>) =
                wanted.into_iter().partition(|chunk| held.contains(&chunk.key()));
            if noted(&mut damage, self.fetch_mine(mine, claim, urgency, take).await)?.is_break() {
                return Ok(());
            }
            wanted = others;
        }
        damage.map_or(Ok(()), Err)
    }

    /// Fetches the chunks of a claim, in the claim's order.
    async fn fetch_mine(
        &self,
        mine: Vec<WantedChunk>,
        mut claim: Claim<ChunkKey>,
        urgency: Urgency,
        take: &PieceTaker<'_>,
    ) -> Result<ControlFlow<()>, Error> {
        let mut damage = None;
        let mut far = Vec::new();
        for chunk in mine {
            let at_hand = if let Some(raw) = self.cached(chunk.key()) {
                hand_on([(chunk, raw)], take)
            } else if let Some(raw) = self.open_at_hand(FrameKind::Data, &chunk.chunk)? {
                self.keep(chunk.key(), &raw);
                hand_on([(chunk, raw)], take)
            } else {
                far.push(chunk);
                continue;
            };
            if noted(&mut damage, at_hand)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        let missing: HashSet<ChunkKey> = far.iter().map(WantedChunk::key).collect();
        claim.land(|key| !missing.contains(key));
        let runs = plan_runs_within(LIMITS, far.iter().map(|chunk| &chunk.chunk));
        let mut far = far.into_iter();
        let mut fetches = FuturesUnordered::new();
        for run in runs {
            let chunks: Vec<WantedChunk> = far.by_ref().take(run.chunks.len()).collect();
            let claim = claim.split_front(chunks.len());
            fetches.push(self.fetch_run(run, chunks, claim, urgency, take));
        }
        while let Some(outcome) = fetches.next().await {
            if noted(&mut damage, outcome)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        damage.map_or(Ok(ControlFlow::Continue(())), Err)
    }

    /// Fetches a run by one request, and hands its chunks on as they are opened.
    async fn fetch_run(
        &self,
        run: ChunkRun,
        chunks: Vec<WantedChunk>,
        mut claim: Claim<ChunkKey>,
        urgency: Urgency,
        take: &PieceTaker<'_>,
    ) -> Result<ControlFlow<()>, Error> {
        let mut permit = self.transfers.admit(urgency, bytes_of(&run, &chunks)).await;
        claim.goes_out();
        let stored = Arc::new(self.basebackup.fetch_run(&run).await?);
        permit.answered();
        let is_spread = chunks.len() > CHUNKS_OPENED_HERE;
        let mut opening = FuturesUnordered::new();
        for group in chunks.chunks(CHUNKS_PER_JOB) {
            opening.push(self.open(stored.clone(), group.to_vec(), is_spread));
        }
        let mut damage = None;
        while let Some(opened) = opening.next().await {
            let opened = opened?;
            let here: HashSet<ChunkKey> = opened.chunks.iter().map(|(wanted, _)| wanted.key()).collect();
            let handed_on = self.keep_and_hand_on(opened, take);
            // Only now: who waits for one of these finds it in the cache.
            claim.land(|key| here.contains(key));
            if noted(&mut damage, handed_on)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        damage.map_or(Ok(ControlFlow::Continue(())), Err)
    }

    async fn open(
        &self,
        stored: Arc<StoredRun>,
        chunks: Vec<WantedChunk>,
        is_spread: bool,
    ) -> Result<Opened, Error> {
        match self.transfers.pool().filter(|_| is_spread) {
            Some(pool) => Ok(pool.run(move || open_chunks(&stored, chunks)).await?),
            None => Ok(open_chunks(&stored, chunks)),
        }
    }

    fn keep_and_hand_on(&self, opened: Opened, take: &PieceTaker<'_>) -> Result<ControlFlow<()>, Error> {
        for (wanted, raw) in &opened.chunks {
            self.keep(wanted.key(), raw);
        }
        let mut damage = opened.damage;
        let flow = noted(&mut damage, hand_on(opened.chunks, take))?;
        if flow.is_break() { Ok(flow) } else { damage.map_or(Ok(flow), Err) }
    }

    fn cached(&self, key: ChunkKey) -> Option<Bytes> {
        self.cache.lock().expect("no holder of this lock panics").get(key)
    }

    fn keep(&self, key: ChunkKey, raw: &Bytes) {
        self.cache.lock().expect("no holder of this lock panics").put(key, raw.clone());
    }

    /// Opens a chunk of the start-up set, if it was fetched ahead. For one that is damaged the store is asked, each time: it may
    /// have come to that on the way, or have been repaired since, and what was fetched ahead stays as long as this reader.
    fn open_at_hand(&self, kind: FrameKind, chunk: &ChunkRef) -> Result<Option<Bytes>, Error> {
        let stored = self.in_start_set(chunk)?;
        Ok(stored.and_then(|stored| stored.open(kind, chunk).ok()).map(Bytes::from))
    }

    /// Returns a chunk of the start-up set as stored, if it was fetched ahead.
    fn in_start_set(&self, chunk: &ChunkRef) -> Result<Option<StoredRun>, Error> {
        let stored = {
            let start_set = self.start_set.lock().expect("no holder of this lock panics");
            let Some(((pack, from), bytes)) = start_set.range(..=(chunk.pack, chunk.offset)).next_back()
            else {
                return Ok(None);
            };
            // The last one at or before it: of the same pack, `from` is not beyond the chunk.
            let at = chunk.offset.saturating_sub(*from) as usize;
            let end = at + chunk.stored_len as usize;
            if *pack != chunk.pack || end > bytes.len() {
                return Ok(None);
            }
            bytes.slice(at..end)
        };
        let key = self.basebackup.pack_key(chunk.pack)?;
        Ok(Some(StoredRun::at_hand(chunk.offset, stored, key)))
    }
}

impl Piece {
    /// Returns the range of the file that the piece holds.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes.len() as u64
    }
}

/// Chunks that were opened together, and the first that could not be.
struct Opened {
    chunks: Vec<(WantedChunk, Bytes)>,
    damage: Option<Error>,
}

fn open_chunks(stored: &StoredRun, wanted: Vec<WantedChunk>) -> Opened {
    let mut opened = Opened { chunks: Vec::with_capacity(wanted.len()), damage: None };
    for wanted in wanted {
        match stored.open(FrameKind::Data, &wanted.chunk) {
            Ok(raw) => opened.chunks.push((wanted, Bytes::from(raw))),
            Err(error) => {
                opened.damage.get_or_insert(error);
            }
        }
    }
    opened
}

/// Cuts chunks into pieces and hands these on together.
fn hand_on(
    chunks: impl IntoIterator<Item = (WantedChunk, Bytes)>,
    take: &PieceTaker<'_>,
) -> Result<ControlFlow<()>, Error> {
    let (mut pieces, mut damage) = (Vec::new(), None);
    for (wanted, raw) in chunks {
        for place in &wanted.places {
            let range = place.at as usize..place.at as usize + place.len as usize;
            if range.end <= raw.len() {
                pieces.push(Piece { offset: place.offset, bytes: raw.slice(range) });
            } else {
                damage.get_or_insert_with(|| too_short(&wanted.chunk));
            }
        }
    }
    if !pieces.is_empty() && take(pieces).is_break() {
        return Ok(ControlFlow::Break(()));
    }
    damage.map_or(Ok(ControlFlow::Continue(())), Err)
}

/// Takes note of the first damage and goes on: what is whole beside it is handed on. Any other error is the end.
fn noted(
    damage: &mut Option<Error>,
    outcome: Result<ControlFlow<()>, Error>,
) -> Result<ControlFlow<()>, Error> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::Damaged => {
            damage.get_or_insert(error);
            Ok(ControlFlow::Continue(()))
        }
        outcome => outcome,
    }
}

/// Returns the bytes that a run takes, as stored and when its chunks are open.
fn bytes_of(run: &ChunkRun, chunks: &[WantedChunk]) -> u64 {
    let raw: u64 = chunks.iter().map(|wanted| u64::from(wanted.chunk.raw_len)).sum();
    u64::from(run.range.end - run.range.start) + raw
}

/// Returns the blocks of a page map that hold any of `ranges`, ascending and none twice.
fn blocks_of(ranges: &[Range<u64>]) -> Vec<u64> {
    let blocks = |range: &Range<u64>| range.start / MAP_BLOCK_BYTES..=(range.end - 1) / MAP_BLOCK_BYTES;
    let mut all: Vec<u64> = ranges.iter().flat_map(blocks).collect();
    all.dedup();
    all
}

fn zero_pieces(range: Range<u64>) -> impl Iterator<Item = Piece> {
    static ZEROS: [u8; ZERO_PIECE_BYTES] = [0; ZERO_PIECE_BYTES];
    range.clone().step_by(ZERO_PIECE_BYTES).map(move |offset| {
        let len = (range.end - offset).min(ZERO_PIECE_BYTES as u64);
        Piece { offset, bytes: Bytes::from_static(&ZEROS[..len as usize]) }
    })
}

fn too_short(chunk: &ChunkRef) -> Error {
    Error::damaged(chunk.pack, format!("chunk {} is shorter than what is named of it", chunk.position))
}

fn hole(entry: &Entry) -> Error {
    Error::damaged(&entry.path, "its page map does not cover it")
}
