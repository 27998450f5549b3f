//! Who reads a file from front to back, and how far ahead of them to fetch.
//!
//! Pure, one for each file. It follows a few streams, each a place that reads advance from. Reads need not be in order:
//! the workers of one parallel scan read stretches of up to a mebibyte side by side, each with a descriptor of its own,
//! and together they are one stream. What tells a stream from a crowd of scattered reads is that most of what lies
//! behind it was wanted. Then the next window is fetched, twice as large as the last; when a stream becomes sparse the
//! window falls, and a seek begins a new stream, which has everything to prove.

use std::ops::Range;

use crate::mount::single_flight::WINDOW;

/// The first window: the stretch a parallel worker of PostgreSQL up to 16 reads by itself.
const WINDOW_MIN: u64 = 256 << 10;
/// The largest window: two of them are what a line of 200 MB/s brings in four round trips of 20 ms.
const WINDOW_MAX: u64 = 8 << 20;
/// Windows that are wanted beyond the one being read before the next is not asked for: of a line and two cores each has
/// one, while another is being written. With one a scan at 20 ms waited half of its time.
const WINDOWS_AHEAD: u64 = 3;
/// A stream is believed after this much: two chunks, the least that shows a direction.
const TRIGGER: u64 = 128 << 10;
/// How far a read may lie from where the stream is, on both sides: the stretches of four parallel workers beside a leader's
/// (1 MiB each in a table of 1 to 2 GiB, from PostgreSQL 14 on), and the gaps that a visibility map leaves. Where tables
/// are larger stretches are, and each is a stream of its own.
const TOLERANCE: u64 = 4 << 20;
/// So much of what lies behind a stream is remembered at least: workers who all begin a stretch at once leave no more than
/// [`TOLERANCE`] unread, which must not make half of it.
const REMEMBERED_MIN: u64 = 2 * TOLERANCE;
/// Of what lies behind a stream, one part in so many was wanted at least.
const SPARSE_AT: u64 = 2;
/// Streams followed in one file; more scans than that at once in one segment are served page by page.
const STREAMS_MAX: usize = 4;

/// What to fetch, because it is likely to be read next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReadAhead {
    pub(crate) range: Range<u64>,
}

/// The streams in one file.
#[derive(Debug, Default)]
pub(crate) struct Sequential {
    streams: Vec<Stream>,
    reads: u64,
}

/// One place that reads advance from.
#[derive(Debug)]
struct Stream {
    /// Where the part begins that is remembered: whenever the stream is judged half of it is forgotten, but for the last
    /// [`REMEMBERED_MIN`], so that workers who are a stretch ahead of others do not make it look sparse.
    since: u64,
    /// Bytes read since then.
    read: u64,
    /// The end of what was read.
    next: u64,
    /// Where it was when it was last judged.
    judged: u64,
    /// The end of what was fetched ahead.
    frontier: u64,
    /// How much to fetch at a time; 0 while nothing is proved.
    window: u64,
    /// Which read was its last.
    used: u64,
}

impl Sequential {
    /// Takes note of a read; says what to fetch ahead, below `limit`.
    pub(crate) fn note(&mut self, read: &Range<u64>, limit: u64) -> Option<ReadAhead> {
        let read = read.start..read.end.min(limit);
        if read.is_empty() {
            return None;
        }
        self.reads += 1;
        let near = self.streams.iter().enumerate().filter(|(_, stream)| stream.is_near(read.start));
        let nearest = near.min_by_key(|(_, stream)| stream.next.abs_diff(read.start)).map(|(n, _)| n);
        let n = nearest.unwrap_or_else(|| self.begin(read.start));
        let stream = &mut self.streams[n];
        stream.used = self.reads;
        stream.note(&read, limit).map(|range| ReadAhead { range })
    }

    /// Takes back what was said of `range`, and of what lies beyond: it is not being fetched.
    pub(crate) fn take_back(&mut self, range: &Range<u64>) {
        // In any order. What did come of those behind it is local, and is not fetched again.
        let is_ahead = |stream: &&mut Stream| stream.next < range.end && range.end <= stream.frontier;
        for stream in self.streams.iter_mut().filter(is_ahead) {
            stream.frontier = range.start;
        }
    }

    /// Begins a stream, in the place of the one that nobody has used for longest.
    fn begin(&mut self, at: u64) -> usize {
        let stream = Stream { since: at, read: 0, next: at, judged: at, frontier: 0, window: 0, used: 0 };
        if self.streams.len() < STREAMS_MAX {
            self.streams.push(stream);
            return self.streams.len() - 1;
        }
        let oldest = (0..self.streams.len()).min_by_key(|n| self.streams[*n].used).unwrap_or(0);
        self.streams[oldest] = stream;
        oldest
    }
}

impl Stream {
    fn is_near(&self, at: u64) -> bool {
        self.next.abs_diff(at) <= TOLERANCE
    }

    fn note(&mut self, read: &Range<u64>, limit: u64) -> Option<Range<u64>> {
        self.read += read.end - read.start;
        self.next = self.next.max(read.end);
        let advanced = self.next - self.judged;
        let enough = if self.window == 0 { TRIGGER } else { self.window / 2 };
        let is_far_ahead = self.frontier.saturating_sub(self.next) > WINDOWS_AHEAD * self.window;
        if advanced < enough || is_far_ahead {
            return None;
        }
        let remembered = self.next - self.since;
        let is_sparse = self.read.saturating_mul(SPARSE_AT) < remembered;
        self.judged = self.next;
        let (since, has_gaps) = (self.since, self.read < remembered);
        let kept = (remembered / 2).max(REMEMBERED_MIN).min(remembered);
        (self.since, self.read) = (self.next - kept, self.read.min(remembered) * kept / remembered);
        if is_sparse {
            self.window = if self.window > WINDOW_MIN { self.window / 2 } else { 0 };
            return None;
        }
        self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
        // What is left of the window that is being read comes with it.
        let ahead = self.frontier.max(self.next.next_multiple_of(WINDOW));
        let from = if self.frontier < self.next && has_gaps {
            // Others read side by side with the foremost, and what they have not come to yet is wanted too.
            self.frontier.max(since) / WINDOW * WINDOW
        } else {
            ahead
        };
        let to = ahead.saturating_add(self.window).min(limit);
        if from >= to {
            return None;
        }
        self.frontier = to;
        Some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MIB: u64 = 1024 * KIB;
    const PAGE: u64 = 8 * KIB;
    const LIMIT: u64 = 1024 * MIB;

    /// Reads pages and returns what was said, with the number of the read at which it was.
    fn verdicts(
        sequential: &mut Sequential,
        pages: impl IntoIterator<Item = u64>,
    ) -> Vec<(usize, Range<u64>)> {
        let note = |page: u64| sequential.note(&(page * PAGE..(page + 1) * PAGE), LIMIT);
        pages.into_iter().map(note).enumerate().filter_map(|(n, said)| Some((n, said?.range))).collect()
    }

    /// Checks that verdicts follow each other without gap or overlap, and returns where they end.
    fn contiguous(verdicts: &[(usize, Range<u64>)]) -> u64 {
        for pair in verdicts.windows(2) {
            assert_eq!(pair[0].1.end, pair[1].1.start, "{verdicts:?}");
        }
        verdicts.last().map_or(0, |(_, range)| range.end)
    }

    #[test]
    fn a_scan_is_followed_by_windows_that_double_up_to_the_largest() {
        let said = verdicts(&mut Sequential::default(), 0..4096);
        let kib = |from: u64, to: u64| from * KIB..to * KIB;
        let expected = [
            (128, kib(128, 384)),
            (256, kib(384, 896)),
            (512, kib(896, 1920)),
            (1024, kib(1920, 3968)),
            (2048, kib(3968, 8064)),
            (4096, kib(8064, 16256)),
            (8192, kib(16256, 24448)),
            (12288, kib(24448, 32640)),
            (16384, kib(32640, 40832)),
            (20480, kib(40832, 49024)),
            (24576, kib(49024, 57216)),
            (32640, kib(57216, 65408)),
        ];
        // The read that ends there is the one that is followed.
        let expected: Vec<_> = expected.map(|(end, range)| ((end * KIB / PAGE) as usize - 1, range)).into();
        assert_eq!(said, expected);
    }

    #[test]
    fn a_scan_never_waits_for_its_windows_and_they_never_run_far_away() {
        let mut sequential = Sequential::default();
        let mut frontier = 0;
        for page in 0..LIMIT / PAGE {
            let read = page * PAGE..(page + 1) * PAGE;
            if let Some(ReadAhead { range }) = sequential.note(&read, LIMIT) {
                assert!(range.start % WINDOW == 0 && range.end % WINDOW == 0);
                frontier = range.end;
            }
            assert!(
                read.end <= 2 * WINDOW || frontier > read.end || frontier == LIMIT,
                "{read:?}: {frontier}"
            );
            assert!(
                frontier.saturating_sub(read.end) <= (WINDOWS_AHEAD + 1) * WINDOW_MAX,
                "{read:?}: {frontier}"
            );
        }
        assert_eq!(frontier, LIMIT);
    }

    #[test]
    fn large_reads_are_followed_as_well_and_nothing_beyond_the_end_is_fetched() {
        let mut sequential = Sequential::default();
        let said: Vec<_> = (0..3).map(|n| sequential.note(&(n * MIB..(n + 1) * MIB), 2 * MIB + 77)).collect();
        let said: Vec<_> = said.into_iter().map(|said| said.map(|said| said.range)).collect();
        let first = MIB..MIB + 256 * KIB;
        assert_eq!(said, [Some(first), Some(2 * MIB..2 * MIB + 77), None]);
        assert_eq!(sequential.note(&(LIMIT..LIMIT + PAGE), LIMIT), None);
    }

    #[test]
    fn scattered_and_backward_reads_are_not_followed() {
        let scattered = (0..5000u64).map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (LIMIT / PAGE));
        let said = verdicts(&mut Sequential::default(), scattered);
        assert!(said.is_empty(), "{said:?}");
        assert!(verdicts(&mut Sequential::default(), (0..5000).rev()).is_empty());
        // Every tenth page, as an index scan in the order of the heap may.
        assert!(verdicts(&mut Sequential::default(), (0..5000).map(|n| n * 10)).is_empty());
        // The same pages over and over.
        assert!(verdicts(&mut Sequential::default(), (0..5000).map(|n| n % 10)).is_empty());
    }

    #[test]
    fn small_gaps_do_not_end_a_scan() {
        // Three of four pages: the others are all-visible.
        let said = verdicts(&mut Sequential::default(), (0..8000).filter(|page| page % 4 != 1));
        assert!(contiguous(&said) >= 8000 * PAGE);
        // A gap of 512 KiB now and then.
        let said = verdicts(&mut Sequential::default(), (0..8000).filter(|page| page % 512 >= 64));
        assert!(contiguous(&said) >= 7900 * PAGE);
    }

    #[test]
    fn parallel_workers_are_one_stream() {
        for (workers, stretch) in [(2, 32), (3, 1), (4, 32), (2, 64), (3, 64), (3, 128), (5, 128), (3, 256)] {
            let mut sequential = Sequential::default();
            let total = 16_384u64;
            // Each worker takes the next stretch when it has read its own; they read at the same speed.
            let mut taken = 0;
            let mut places = vec![0..0; workers];
            let mut order = Vec::new();
            while order.len() < total as usize {
                for place in &mut places {
                    if place.start == place.end && taken < total {
                        *place = taken..(taken + stretch).min(total);
                        taken += stretch;
                    }
                    order.extend(place.next());
                }
            }
            let said = verdicts(&mut sequential, order);
            let case = format!("{workers} workers, {stretch} pages: {said:?}");
            assert_eq!(sequential.streams.len(), 1, "{case}");
            assert!(contiguous(&said) >= total * PAGE, "{case}");
            // In windows as large as those of one reader.
            assert!(said.len() < 30, "{case}");
        }
    }

    #[test]
    fn a_seek_begins_anew_and_what_was_left_can_go_on() {
        let mut sequential = Sequential::default();
        assert_eq!(verdicts(&mut sequential, 0..64).len(), 3);
        let elsewhere = verdicts(&mut sequential, 50_000..50_017);
        let start = (50_000 * PAGE + TRIGGER).next_multiple_of(WINDOW);
        assert_eq!(elsewhere, [(15, start..start + WINDOW_MIN)]);
        let back = verdicts(&mut sequential, 64..128);
        assert_eq!(back.first().map(|(_, range)| range.start), Some(1920 * KIB));
    }

    #[test]
    fn scans_at_several_places_are_each_followed_and_the_least_used_is_forgotten() {
        let mut sequential = Sequential::default();
        let places = [0u64, 10_000, 20_000, 30_000];
        let all = (0..64u64).flat_map(|n| places.map(|place| place + n));
        let said = verdicts(&mut sequential, all);
        assert_eq!(said.len(), 4 * 3, "{said:?}");
        assert_eq!(sequential.streams.len(), STREAMS_MAX);
        verdicts(&mut sequential, [50_000]);
        assert_eq!(sequential.streams.len(), STREAMS_MAX);
        assert!(sequential.streams.iter().all(|stream| !stream.is_near(32 * PAGE)));
    }

    #[test]
    fn a_scan_that_becomes_sparse_is_given_up_by_and_by() {
        let mut sequential = Sequential::default();
        assert!(verdicts(&mut sequential, 0..2048).len() > 5);
        let said = verdicts(&mut sequential, (0..4000).map(|n| 2048 + n * 16));
        assert!(said.iter().all(|(n, _)| *n < 64), "{said:?}");
        assert!(sequential.streams.iter().all(|stream| stream.window == 0));
    }

    #[test]
    fn what_could_not_be_fetched_is_asked_for_again() {
        let mut sequential = Sequential::default();
        let said = verdicts(&mut sequential, 0..16);
        assert_eq!(said, [(15, 128 * KIB..384 * KIB)]);
        sequential.take_back(&said[0].1);
        let said = verdicts(&mut sequential, 16..32);
        assert_eq!(said, [(15, 256 * KIB..768 * KIB)]);
        // Several are under way, and end in any order: the next begins with the first that failed.
        let said = verdicts(&mut sequential, 32..256);
        let [first, second] = [1, 2].map(|n| said[n].1.clone());
        sequential.take_back(&second);
        sequential.take_back(&first);
        assert_eq!(sequential.streams[0].frontier, first.start);
    }
}
