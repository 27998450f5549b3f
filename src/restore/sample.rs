//! A few requests of the kind that a restore makes, timed: what a dry run estimates from.
//!
//! ```text
//! file table ─▶ the largest files ─▶ chunks of theirs, spread out ─▶ fetched at once ─▶ opened on the pool
//! ```
//! Nothing is written. What is read is authenticated, so a dry run fails where a key or a sampled pack would fail the
//! restore.

use std::time::Duration;

use futures::future::try_join_all;

use crate::repo::chunk::ChunkRef;
use crate::repo::entry::{Content, Entry, Node};
use crate::repo::page_map::{MapBlock, PageSource};
use crate::repo::{Basebackup, ChunkRun, FrameKind, StoredRun, plan_runs, runs_expected};
use crate::restore::Error;
use crate::restore::batches::{fetch_maps, map_block};
use crate::restore::estimate::{Sample, Work};
use crate::restore::plan::RestorePlan;
use crate::restore::run::Resources;

/// Stored bytes of a sample: a second at 32 MiB/s, and enough for connections to reach their pace.
const SAMPLE_BYTES_MAX: u32 = 32 << 20;
/// Stored bytes of one request of a sample.
const REQUEST_BYTES_MAX: u32 = 4 << 20;
/// Files that a sample is taken from; the largest are most of a cluster, and one alone may be of one kind.
const FILES_MAX: usize = 16;
/// The shortest of so many small requests is a round trip; others met something on their way.
const ROUND_TRIPS: usize = 3;

/// Neighbouring chunks, and the one request that fetches them.
type Piece = (Vec<ChunkRef>, ChunkRun);

/// Returns what the restore of a basebackup by a plan has to move.
pub fn work_of(basebackup: &Basebackup, plan: &RestorePlan) -> Work {
    let packs = basebackup.refs().records();
    let requests = packs.iter().map(|pack| u64::from(runs_expected(pack.size, pack.live))).sum();
    Work { stored_bytes: plan.figures.stored_bytes, requests, bytes: plan.figures.bytes }
}

/// Measures the way from the store and the unpacking; nothing where the basebackup has nothing in packs.
pub async fn take_sample(basebackup: &Basebackup, resources: &Resources) -> Result<Option<Sample>, Error> {
    let chunks = some_chunks(basebackup, resources.transfers).await?;
    let pieces = pieces_of(&chunks, resources.transfers);
    let Some((first, _)) = pieces.first() else { return Ok(None) };
    // The first requests open the connections, which a restore does once.
    try_join_all(pieces.iter().map(|(chunks, _)| fetch(basebackup, chunks[0]))).await?;
    let clock = basebackup.repository().clock();
    let mut round_trip = Duration::MAX;
    for _ in 0..ROUND_TRIPS {
        let began = clock.monotonic();
        fetch(basebackup, first[0]).await?;
        round_trip = round_trip.min(clock.monotonic().saturating_duration_since(began));
    }
    let began = clock.monotonic();
    let fetched = try_join_all(pieces.iter().map(|(_, run)| basebackup.fetch_run(run))).await?;
    let fetched_in = clock.monotonic().saturating_duration_since(began);
    let at_once = pieces.len();
    let fetched_bytes = pieces.iter().map(|(_, run)| u64::from(run.range.end - run.range.start)).sum();
    let began = clock.monotonic();
    let opened = pieces.into_iter().zip(fetched).map(|((chunks, _), stored)| {
        resources.pool.run(move || chunks.iter().try_fold(0, |sum, chunk| opened_bytes(&stored, chunk, sum)))
    });
    let mut unpacked_bytes = 0;
    for opened in try_join_all(opened).await? {
        unpacked_bytes += opened?;
    }
    let unpacked_in = clock.monotonic().saturating_duration_since(began);
    Ok(Some(Sample { at_once, round_trip, fetched_bytes, fetched_in, unpacked_bytes, unpacked_in }))
}

fn opened_bytes(stored: &StoredRun, chunk: &ChunkRef, sum: u64) -> Result<u64, Error> {
    Ok(sum + stored.open(FrameKind::Data, chunk)?.len() as u64)
}

async fn fetch(basebackup: &Basebackup, chunk: ChunkRef) -> Result<StoredRun, Error> {
    let range = chunk.offset..chunk.offset.saturating_add(chunk.stored_len);
    Ok(basebackup.fetch_run(&ChunkRun { pack: chunk.pack, range, chunks: 0..1 }).await?)
}

/// Returns chunks of the largest files, ascending by pack and offset.
async fn some_chunks(basebackup: &Basebackup, transfers: usize) -> Result<Vec<ChunkRef>, Error> {
    let mut largest: Vec<Entry> = Vec::with_capacity(FILES_MAX + 1);
    let consider = |_, entry: &Entry| {
        if let Node::File { size, content } = &entry.node
            && !matches!(content, Content::Inline(_))
        {
            let at = largest.partition_point(|other| other.size() >= *size);
            largest.insert(at, entry.clone());
            largest.truncate(FILES_MAX);
        }
        Ok::<_, Error>(())
    };
    basebackup.visit_entries(consider).await?;
    // Of a file with many map blocks one is enough: it is 128 MiB of the file.
    let blob = |entry: &Entry| match &entry.node {
        Node::File { content: Content::Blocks(blobs), .. } => blobs.first().copied(),
        _ => None,
    };
    let blobs: Vec<_> = largest.iter().filter_map(blob).collect();
    let raw = fetch_maps(basebackup, transfers, &blobs.iter().collect::<Vec<_>>()).await?;
    let mut chunks = Vec::new();
    for entry in &largest {
        match &entry.node {
            Node::File { content: Content::Part(blob), .. } => chunks.push(blob.chunk),
            Node::File { content: Content::Map(block), .. } => chunks.extend(chunks_of(block)),
            _ => {
                if let Some(blob) = blob(entry) {
                    chunks.extend(chunks_of(&map_block(&blob, &raw, entry)?));
                }
            }
        }
    }
    chunks.sort_unstable_by_key(|chunk| (chunk.pack, chunk.offset));
    chunks.dedup_by_key(|chunk| (chunk.pack, chunk.position));
    Ok(chunks)
}

fn chunks_of(block: &MapBlock) -> impl Iterator<Item = ChunkRef> {
    block.extents().iter().filter_map(|extent| match &extent.source {
        PageSource::Chunk { chunk, .. } => Some(*chunk),
        PageSource::Zero => None,
    })
}

/// Cuts as many requests out of the chunks as a restore has under way, evenly spread; each is one run.
fn pieces_of(chunks: &[ChunkRef], transfers: usize) -> Vec<Piece> {
    let each_max = (SAMPLE_BYTES_MAX / transfers.max(1) as u32).min(REQUEST_BYTES_MAX);
    let part = chunks.len().div_ceil(transfers.max(1)).max(1);
    let piece = |chunks: &[ChunkRef]| {
        let from = chunks[0].offset;
        let fits = |chunk: &&ChunkRef| {
            let end = chunk.offset.saturating_add(chunk.stored_len);
            chunk.pack == chunks[0].pack && end - from <= each_max
        };
        // One chunk at least, whatever its size.
        let count = chunks.iter().take_while(fits).count().max(1);
        let run = plan_runs(&chunks[..count]).swap_remove(0);
        (chunks[run.chunks.clone()].to_vec(), run)
    };
    chunks.chunks(part).map(piece).collect()
}

#[cfg(test)]
mod tests {
    use crate::codec::CodecId;
    use crate::repo::{BasebackupId, PackId};

    use super::*;

    fn chunk(number: u32, position: u32, stored_len: u32) -> ChunkRef {
        let pack = PackId { origin: BasebackupId::from_parts(1, 2).unwrap(), number };
        let offset = position * stored_len;
        ChunkRef { pack, position, offset, stored_len, raw_len: 65_536, codec: CodecId::Zstd, tag: None }
    }

    #[test]
    fn a_sample_is_bounded_and_spread_over_the_packs() {
        let chunks: Vec<ChunkRef> =
            (0..6).flat_map(|pack| (0..1500).map(move |n| chunk(pack, n, 20_000))).collect();
        let pieces = pieces_of(&chunks, 8);
        assert_eq!(pieces.len(), 8);
        let total: u32 = pieces.iter().map(|(_, run)| run.range.end - run.range.start).sum();
        assert!(total <= SAMPLE_BYTES_MAX, "{total}");
        let mut packs: Vec<u32> = pieces.iter().map(|(_, run)| run.pack.number).collect();
        packs.dedup();
        assert_eq!(packs, [0, 1, 2, 3, 4, 5]);
        for (chunks, run) in &pieces {
            let last = chunks.last().unwrap();
            assert_eq!(run.range, chunks[0].offset..last.offset + last.stored_len);
        }
        let many = pieces_of(&chunks, 1024);
        assert!(many.iter().all(|(_, run)| run.range.end - run.range.start <= 32 << 10), "{many:?}");
    }

    #[test]
    fn little_makes_a_small_sample_and_nothing_none() {
        assert!(pieces_of(&[], 8).is_empty());
        let three: Vec<ChunkRef> = (0..3).map(|n| chunk(0, n, 100)).collect();
        assert_eq!(pieces_of(&three, 8).len(), 3);
        let large = [chunk(0, 0, REQUEST_BYTES_MAX + 1)];
        assert_eq!(pieces_of(&large, 1)[0].0.len(), 1);
    }
}
