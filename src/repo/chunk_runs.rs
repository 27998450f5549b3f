//! Many chunks at once: neighbours in a pack fetched by one request, opened one by one by whoever has a thread free.
//!
//! For a restore, which reads all of a basebackup, and for the file reader, which reads what a server asks for and
//! wants it sooner: they differ in their limits. Nothing is cached and nothing is waited for twice; the caller sorts,
//! bounds what is under way, and decides where a run is opened.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::codec::FrameKey;
use crate::repo::basebackup::Basebackup;
use crate::repo::chunk::ChunkRef;
use crate::repo::error::Error;
use crate::repo::id::PackId;
use crate::repo::pack::open_chunk;
use crate::repo::sealed::FrameKind;

/// The longest run of a restore: few enough requests for a store that is far away, small enough to have many under way.
pub const RUN_BYTES_MAX: u32 = 8 << 20;
/// A gap between two chunks that costs less than a round trip.
const GAP_BYTES_MAX: u32 = 128 << 10;

/// How long a run may get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunLimits {
    /// Stored bytes, gaps included.
    pub bytes_max: u32,
    /// Bytes that do not belong to it, between two chunks.
    pub gap_bytes_max: u32,
    /// Bytes its chunks have when they are open.
    pub raw_bytes_max: u64,
}

/// The limits of a restore, which opens and writes chunk by chunk: what is open at once does not grow with a run.
const RESTORE: RunLimits =
    RunLimits { bytes_max: RUN_BYTES_MAX, gap_bytes_max: GAP_BYTES_MAX, raw_bytes_max: u64::MAX };

/// Neighbouring chunks of one pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkRun {
    /// The pack.
    pub pack: PackId,
    /// Their bytes in it, gaps included.
    pub range: Range<u32>,
    /// Which of the chunks that were planned.
    pub chunks: Range<usize>,
}

/// The stored bytes of a run.
#[derive(Debug)]
pub struct StoredRun {
    from: u32,
    bytes: Bytes,
    key: Arc<FrameKey>,
}

/// Cuts chunks into the runs of a restore; the chunks ascend by pack and offset.
pub fn plan_runs<'a>(chunks: impl IntoIterator<Item = &'a ChunkRef>) -> Vec<ChunkRun> {
    plan_runs_within(RESTORE, chunks)
}

/// Cuts chunks into runs; the chunks ascend by pack and offset. One that is beyond the limits by itself is a run.
pub fn plan_runs_within<'a>(
    limits: RunLimits,
    chunks: impl IntoIterator<Item = &'a ChunkRef>,
) -> Vec<ChunkRun> {
    let mut runs: Vec<ChunkRun> = Vec::new();
    let mut raw_bytes = 0;
    for (n, chunk) in chunks.into_iter().enumerate() {
        let end = chunk.offset.saturating_add(chunk.stored_len);
        raw_bytes += u64::from(chunk.raw_len);
        match runs.last_mut() {
            Some(run)
                if run.pack == chunk.pack
                    && chunk.offset >= run.range.start
                    && chunk.offset <= run.range.end.saturating_add(limits.gap_bytes_max)
                    && run.range.end.max(end) - run.range.start <= limits.bytes_max
                    && raw_bytes <= limits.raw_bytes_max =>
            {
                run.range.end = run.range.end.max(end);
                run.chunks.end = n + 1;
            }
            _ => {
                raw_bytes = u64::from(chunk.raw_len);
                runs.push(ChunkRun { pack: chunk.pack, range: chunk.offset..end, chunks: n..n + 1 });
            }
        }
    }
    runs
}

/// Returns how many runs it takes, at most, to fetch so many live bytes of a pack of a size: its whole length in the
/// longest runs, and one more for each gap that is too long to be fetched with its neighbours.
pub fn runs_expected(size: u32, live: u32) -> u32 {
    let gaps = size.saturating_sub(live) / GAP_BYTES_MAX;
    live.div_ceil(RUN_BYTES_MAX) + if live == 0 { 0 } else { gaps }
}

impl Basebackup {
    /// Fetches a run by one request.
    pub async fn fetch_run(&self, run: &ChunkRun) -> Result<StoredRun, Error> {
        let key = self.pack_key(run.pack)?;
        let bytes = self.pack_bytes(run.pack, run.range.clone()).await?;
        Ok(StoredRun { from: run.range.start, bytes, key })
    }
}

impl StoredRun {
    /// Takes stored bytes of a pack that are at hand, from the byte `from` on.
    pub(crate) fn at_hand(from: u32, bytes: Bytes, key: Arc<FrameKey>) -> Self {
        Self { from, bytes, key }
    }

    /// Opens one chunk of the run.
    ///
    /// # Errors
    /// `Damaged`, naming the pack and the chunk, where the bytes are not the ones that were sealed.
    pub fn open(&self, kind: FrameKind, chunk: &ChunkRef) -> Result<Vec<u8>, Error> {
        // Bytes that are not there are as good as cut off, which `open_chunk` tells.
        let from = (chunk.offset.saturating_sub(self.from) as usize).min(self.bytes.len());
        let to = from.saturating_add(chunk.stored_len as usize).min(self.bytes.len());
        open_chunk(&self.key, kind, chunk, &self.bytes[from..to])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::codec::CodecId;
    use crate::repo::id::BasebackupId;

    use super::*;

    fn chunk(number: u32, position: u32, offset: u32, stored_len: u32) -> ChunkRef {
        let pack = PackId { origin: BasebackupId::from_parts(1, 2).unwrap(), number };
        ChunkRef { pack, position, offset, stored_len, raw_len: 65_536, codec: CodecId::Zstd, tag: None }
    }

    #[test]
    fn neighbours_share_a_request_and_others_do_not() {
        let far = 200 + GAP_BYTES_MAX + 1;
        let chunks =
            [chunk(0, 0, 0, 100), chunk(0, 1, 100, 100), chunk(0, 2, far, 50), chunk(1, 0, far + 50, 10)];
        let runs = plan_runs(&chunks);
        let ranges: Vec<_> = runs.iter().map(|run| (run.pack.number, run.range.clone())).collect();
        assert_eq!(ranges, [(0, 0..200), (0, far..far + 50), (1, far + 50..far + 60)]);
        assert_eq!(runs[0].chunks, 0..2);
    }

    #[test]
    fn a_whole_pack_takes_few_runs_and_one_with_gaps_more() {
        let mib = 1 << 20;
        assert_eq!(runs_expected(0, 0), 0);
        assert_eq!(runs_expected(32 * mib, 0), 0);
        assert_eq!(runs_expected(1, 1), 1);
        assert_eq!(runs_expected(32 * mib, 32 * mib), 4);
        assert_eq!(runs_expected(32 * mib, 31 * mib), 4 + 8);
        // Every second stretch of 256 KiB is dead: as many runs as there are gaps, and no fewer are expected.
        let stretch = 256 << 10;
        let chunks: Vec<ChunkRef> = (0..64).map(|n| chunk(0, n, 2 * n * stretch, stretch)).collect();
        let runs = plan_runs(&chunks).len() as u32;
        assert!(runs_expected(32 * mib, 16 * mib) >= runs, "{runs}");
    }

    #[test]
    fn a_run_has_an_end_and_every_chunk_is_in_one() {
        let chunks: Vec<ChunkRef> = (0..30).map(|n| chunk(0, n, n << 20, 1 << 20)).collect();
        let runs = plan_runs(&chunks);
        assert!(runs.iter().all(|run| run.range.end - run.range.start <= RUN_BYTES_MAX));
        let covered: Vec<usize> = runs.iter().flat_map(|run| run.chunks.clone()).collect();
        assert_eq!(covered, (0..30).collect::<Vec<_>>());
    }

    /// Chunks of some packs, ascending, with gaps and of many sizes; now and then two share bytes.
    fn ascending() -> impl Strategy<Value = Vec<ChunkRef>> {
        proptest::collection::vec((0u32..10, 0u32..300, 16u32..200, 1u32..2000), 0..60).prop_map(|steps| {
            let (mut number, mut offset) = (0, 0);
            let mut chunks = Vec::new();
            for (position, (leap, gap, stored_len, raw_len)) in (0..).zip(steps) {
                if leap == 0 {
                    (number, offset) = (number + 1, 0);
                }
                offset += if leap == 1 { 0 } else { gap };
                chunks.push(ChunkRef { raw_len, ..chunk(number, position, offset, stored_len) });
                offset += if leap == 1 { 8 } else { stored_len };
            }
            chunks
        })
    }

    proptest! {
        #[test]
        fn runs_keep_their_limits_hold_every_chunk_once_and_are_as_few_as_can_be(
            chunks in ascending(),
            bytes_max in 100u32..3000,
            gap_bytes_max in 0u32..300,
            raw_bytes_max in 1000u64..20_000,
        ) {
            let limits = RunLimits { bytes_max, gap_bytes_max, raw_bytes_max };
            let runs = plan_runs_within(limits, &chunks);
            let covered: Vec<usize> = runs.iter().flat_map(|run| run.chunks.clone()).collect();
            prop_assert_eq!(covered, (0..chunks.len()).collect::<Vec<_>>());
            // The model: a set of chunks is one request if its hull and its decoded bytes are within the limits and
            // no gap in it is too wide.
            let is_request = |part: &[ChunkRef]| {
                let end = |chunk: &ChunkRef| chunk.offset + chunk.stored_len;
                let reach = |n: usize| part[..n].iter().map(end).max().unwrap_or(0);
                part.iter().all(|chunk| chunk.pack == part[0].pack)
                    && part.iter().map(|chunk| u64::from(chunk.raw_len)).sum::<u64>() <= raw_bytes_max
                    && (1..part.len()).all(|n| part[n].offset <= reach(n) + gap_bytes_max)
                    && reach(part.len()) - part[0].offset <= bytes_max
            };
            for (n, run) in runs.iter().enumerate() {
                let part = &chunks[run.chunks.clone()];
                prop_assert!(part.len() == 1 || is_request(part), "{run:?}");
                prop_assert_eq!(run.range.start, part[0].offset);
                let end = part.iter().map(|chunk| chunk.offset + chunk.stored_len).max();
                prop_assert_eq!(Some(run.range.end), end);
                if n + 1 < runs.len() {
                    let longer = &chunks[run.chunks.start..run.chunks.end + 1];
                    prop_assert!(!is_request(longer), "{run:?} could have taken the next chunk too");
                }
            }
        }
    }
}
