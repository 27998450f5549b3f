//! What a copy reads of the source is held to so many bytes a second, where a limit is set.
//!
//! [`Limited`] stands between the readers and any [`Source`]. A read is cut into pieces no larger than
//! [`RateLimit::piece_max`], and each waits for its turn, so that within any time no more is read than the rate gives
//! for that time and one piece: nothing is saved up while nobody reads, and a large read is no burst. The deciding is
//! pure and told what time it is; the threads of the CPU pool wait, which have nothing else to do then. What a server
//! sends is let through as it comes, message by message, which it cuts small.

use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::backup::data_directory::SourceFile;
use crate::backup::source_file::{FileState, OpenFile, Source};
use crate::clock::Clock;
use crate::repo::page_map::PAGE_SIZE;

/// So many bytes a second, for all threads together.
#[derive(Debug)]
pub struct RateLimit {
    rate: NonZeroU64,
    clock: Arc<dyn Clock>,
    /// When what was let through so far has had its time.
    free_at: Mutex<Option<Instant>>,
}

/// A source whose reads wait for their turn.
#[derive(Debug)]
struct Limited {
    source: Arc<dyn Source>,
    limit: Arc<RateLimit>,
}

#[derive(Debug)]
struct LimitedFile {
    file: Box<dyn OpenFile>,
    limit: Arc<RateLimit>,
}

/// Ten pieces a second are even enough for whoever shares the disk.
const PIECES_PER_SECOND: u64 = 10;
/// A piece is whole pages: the halves of one that is cut would be read a tenth of a second apart, and most often torn.
const PIECE_BYTES_MIN: u64 = PAGE_SIZE;
/// A larger piece would be more than a job reads at once.
const PIECE_BYTES_MAX: u64 = 512 << 10;

impl RateLimit {
    /// Creates a limit that has let nothing through yet.
    pub fn new(rate: NonZeroU64, clock: Arc<dyn Clock>) -> Self {
        Self { rate, clock, free_at: Mutex::default() }
    }

    /// Returns the most that goes through at once.
    pub fn piece_max(&self) -> u64 {
        let piece = (self.rate.get() / PIECES_PER_SECOND).clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX);
        piece - piece % PAGE_SIZE
    }

    /// Takes the next turn for a piece, and returns how long from `now` it is until then.
    fn reserve(&self, bytes: u64, now: Instant) -> Duration {
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.get());
        let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begins = free_at.map_or(now, |at| at.max(now));
        *free_at = Some(begins.checked_add(takes).unwrap_or(begins));
        begins.saturating_duration_since(now)
    }

    /// Waits until what a server has sent may be taken; it waits as well, once its buffers are full.
    pub async fn take(&self, bytes: u64) {
        let wait = self.reserve(bytes, self.clock.monotonic());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }

    /// Waits until a piece may go through.
    fn wait(&self, bytes: u64) {
        let wait = self.reserve(bytes, self.clock.monotonic());
        if !wait.is_zero() {
            thread::sleep(wait);
        }
    }
}

/// Puts a limit before a source, where there is one.
pub fn limited(source: Arc<dyn Source>, limit: Option<Arc<RateLimit>>) -> Arc<dyn Source> {
    match limit {
        Some(limit) => Arc::new(Limited { source, limit }),
        None => source,
    }
}

impl Source for Limited {
    fn open(&self, file: &SourceFile) -> io::Result<Box<dyn OpenFile>> {
        let file = self.source.open(file)?;
        Ok(Box::new(LimitedFile { file, limit: self.limit.clone() }))
    }

    fn path(&self, file: &SourceFile) -> PathBuf {
        self.source.path(file)
    }
}

impl OpenFile for LimitedFile {
    fn state(&self) -> io::Result<FileState> {
        self.file.state()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        for piece in buffer.chunks_mut(self.limit.piece_max() as usize) {
            self.limit.wait(piece.len() as u64);
            let count = self.file.read_at(offset + filled as u64, piece)?;
            filled += count;
            if count < piece.len() {
                break;
            }
        }
        Ok(filled)
    }

    fn done_with(&self, range: Range<u64>) {
        self.file.done_with(range);
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use proptest::prelude::*;

    use crate::clock::ManualClock;
    use crate::repo::entry::TreePath;

    use super::*;

    fn limit(rate: u64) -> (RateLimit, ManualClock) {
        let clock = ManualClock::new(Timestamp::UNIX_EPOCH);
        (RateLimit::new(NonZeroU64::new(rate).unwrap(), Arc::new(clock.clone())), clock)
    }

    #[test]
    fn pieces_follow_each_other_and_rest_saves_nothing_up() {
        let (limit, clock) = limit(100_000);
        assert_eq!(limit.piece_max(), 8192);
        let reserve = |bytes| limit.reserve(bytes, clock.monotonic()).as_millis();
        assert_eq!([reserve(10_000), reserve(10_000), reserve(5000), reserve(1)], [0, 100, 200, 250]);
        clock.advance(Duration::from_secs(3600));
        assert_eq!([reserve(10_000), reserve(10_000)], [0, 100]);
    }

    #[test]
    fn the_smallest_rate_reads_pages_and_the_largest_has_no_time() {
        let (slow, clock) = limit(1);
        assert_eq!(slow.piece_max(), PIECE_BYTES_MIN);
        assert_eq!(slow.reserve(8192, clock.monotonic()), Duration::ZERO);
        assert_eq!(slow.reserve(8192, clock.monotonic()), Duration::from_secs(8192));
        let (fast, clock) = limit(u64::MAX);
        assert_eq!(fast.piece_max(), PIECE_BYTES_MAX);
        assert_eq!(fast.reserve(PIECE_BYTES_MAX, clock.monotonic()), Duration::ZERO);
        assert_eq!(fast.reserve(PIECE_BYTES_MAX, clock.monotonic()), Duration::ZERO);
    }

    proptest! {
        /// Between any two moments no more goes through than the rate gives for the time between them and one piece.
        #[test]
        fn there_is_never_a_burst(
            rate in prop_oneof![1u64..20_000, 20_000u64..1_000_000_000],
            steps in proptest::collection::vec((0u64..3000, 1u64..=PIECE_BYTES_MAX), 1..60),
        ) {
            let (limit, clock) = limit(rate);
            prop_assert_eq!(limit.piece_max() % PAGE_SIZE, 0);
            let begun = clock.monotonic();
            let mut turns = Vec::new();
            for (pause, bytes) in steps {
                clock.advance(Duration::from_millis(pause));
                let (now, bytes) = (clock.monotonic(), bytes.min(limit.piece_max()));
                turns.push(((now + limit.reserve(bytes, now) - begun).as_secs_f64(), bytes));
            }
            let mut rest = &turns[..];
            while let [(first, _), behind @ ..] = rest {
                let mut through = 0;
                for (at, bytes) in rest {
                    through += bytes;
                    let allowed = (at - first) * rate as f64 + limit.piece_max() as f64;
                    prop_assert!(through as f64 <= allowed * 1.000_001 + 1.0, "{through} > {allowed}");
                }
                rest = behind;
            }
        }
    }

    /// A file of some length that notes how it is read.
    #[derive(Debug)]
    struct Noting {
        len: usize,
        reads: Arc<Mutex<Vec<usize>>>,
    }

    impl Source for Noting {
        fn open(&self, _: &SourceFile) -> io::Result<Box<dyn OpenFile>> {
            Ok(Box::new(Self { len: self.len, reads: self.reads.clone() }))
        }

        fn path(&self, _: &SourceFile) -> PathBuf {
            PathBuf::new()
        }
    }

    impl OpenFile for Noting {
        fn state(&self) -> io::Result<FileState> {
            let modified = Timestamp::UNIX_EPOCH;
            Ok(FileState { size: self.len as u64, mode: 0o600, modified, identity: None })
        }

        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
            let count = buffer.len().min(self.len.saturating_sub(offset as usize));
            buffer[..count].fill(7);
            self.reads.lock().unwrap().push(count);
            Ok(count)
        }

        fn done_with(&self, _: Range<u64>) {}
    }

    fn read(rate: Option<u64>, len: usize, wanted: usize) -> (usize, Vec<usize>) {
        let reads: Arc<Mutex<Vec<usize>>> = Arc::default();
        let source = Arc::new(Noting { len, reads: reads.clone() });
        let file = SourceFile {
            path: TreePath::new("data/x").unwrap(),
            root: 0,
            size: len as u64,
            mode: 0o600,
            modified: Timestamp::UNIX_EPOCH,
            identity: None,
        };
        let limit = rate.map(|rate| Arc::new(limit(rate).0));
        let open = limited(source, limit).open(&file).unwrap();
        let mut buffer = vec![0; wanted];
        let count = open.read_at(0, &mut buffer).unwrap();
        assert!(
            buffer[..count].iter().all(|byte| *byte == 7) && buffer[count..].iter().all(|byte| *byte == 0)
        );
        let reads = reads.lock().unwrap().clone();
        (count, reads)
    }

    #[test]
    fn a_large_read_goes_through_in_pieces() {
        assert_eq!(read(None, 100_000, 1_300_000), (100_000, vec![100_000]));
        // The clock stands still, and all pieces but the first wait: at this rate less than a millisecond each.
        let rate = Some(3_000_000_000);
        assert_eq!(read(rate, 1_300_000, 1_300_000), (1_300_000, vec![524_288, 524_288, 251_424]));
        assert_eq!(read(rate, 600_000, 1_300_000), (600_000, vec![524_288, 75_712]));
    }
}
