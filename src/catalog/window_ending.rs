//! The last segment of a window where the archive has no more than its beginning: as pieces, or as `.partial`.
//!
//! Pure, from names. Pieces say how far they reach; how much WAL a `.partial` holds is known when it is read, so that
//! the end of its segment is taken for the most it can be. A way leaves a timeline at a switch point, and what that
//! timeline's server wrote behind it is never replayed on the way: there the ending is cut, and a whole segment of the
//! timeline that was left counts as far as that where its child's copy has not come.
//! `ending_segment` reads what is decided here.

use serde::{Deserialize, Serialize};

use crate::catalog::timeline_tree::Stretch;
use crate::catalog::wal_coverage::WalCoverage;
use crate::pg::{Lsn, WalSegmentName, WalSegmentNumber, WalSegmentSize};

/// The segment in which a window ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The segment, of which there is no whole one that recovery may read to its end.
    pub segment: WalSegmentName,
    /// The position behind which there is no WAL of it on this way.
    pub end: Lsn,
    /// The position up to which pieces have it without a gap.
    pub pieces_end: Lsn,
    /// Whether there is a `.partial` of it, which may hold more than the pieces.
    pub partial: bool,
}

impl Ending {
    /// Finds what the archive has of the segment of this number on a way: of several timelines that go through it the
    /// one that reaches furthest, and of those the newest.
    pub fn find(
        way: &[Stretch],
        coverage: &WalCoverage,
        number: WalSegmentNumber,
        size: WalSegmentSize,
    ) -> Option<Self> {
        let segment_of = |lsn| WalSegmentNumber::containing(lsn, size);
        let goes_through = |stretch: &&Stretch| {
            segment_of(stretch.begin) <= number && stretch.end.is_none_or(|end| number <= segment_of(end))
        };
        let endings = way.iter().filter(goes_through).filter_map(|stretch| {
            let held = coverage.timelines.get(&stretch.timeline)?;
            let segment = WalSegmentName::new(stretch.timeline, number, size);
            let (start, whole) = (segment.start_lsn(size).ok()?, segment.end_lsn(size).ok()?);
            let left = stretch.end.unwrap_or(whole);
            let contiguous = held.pieces.get(&number).map_or(0, |reach| reach.contiguous);
            let is_whole = left < whole && held.contains(number);
            let pieces_end = if is_whole { left } else { (start + u64::from(contiguous)).min(left) };
            let partial = held.partials.contains(&segment);
            let end = if partial { whole.min(left) } else { pieces_end };
            (end > start).then_some(Self { segment, end, pieces_end, partial })
        });
        endings.max_by_key(|ending| (ending.end, ending.pieces_end, ending.segment))
    }
}

#[cfg(test)]
mod tests {
    use crate::catalog::wal_coverage::TimelineCoverage;
    use crate::pg::TimelineId;

    use super::*;

    const SIZE: WalSegmentSize = WalSegmentSize::DEFAULT;
    const NUMBER: WalSegmentNumber = WalSegmentNumber(6);

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn at(offset: u64) -> Lsn {
        Lsn((6 << 24) + offset)
    }

    /// Pieces of the segment on timelines, and partials.
    fn coverage(pieces: &[(u32, u32, u32)], partials: &[u32]) -> WalCoverage {
        let mut coverage = WalCoverage::default();
        for (number, from, to) in pieces {
            let held: &mut TimelineCoverage = coverage.timelines.entry(timeline(*number)).or_default();
            held.push_piece(NUMBER, *from, *to, SIZE);
        }
        for number in partials {
            let name = WalSegmentName::new(timeline(*number), NUMBER, SIZE);
            coverage.timelines.entry(timeline(*number)).or_default().partials.push(name);
        }
        coverage
    }

    /// The way from timeline 1 to timeline 2, which left it in the segment, and the way that stays.
    fn way(switch: Option<u64>) -> Vec<Stretch> {
        let first = Stretch { timeline: timeline(1), begin: Lsn::ZERO, end: switch.map(at) };
        let second = switch.map(|switch| Stretch { timeline: timeline(2), begin: at(switch), end: None });
        [Some(first), second].into_iter().flatten().collect()
    }

    fn find(switch: Option<u64>, coverage: &WalCoverage) -> Option<(u32, Lsn, bool)> {
        let found = Ending::find(&way(switch), coverage, NUMBER, SIZE)?;
        Some((found.segment.timeline().get(), found.end, found.partial))
    }

    #[test]
    fn an_ending_is_as_far_as_pieces_reach_or_a_partial_may() {
        assert_eq!(find(None, &coverage(&[], &[])), None);
        assert_eq!(find(None, &coverage(&[(1, 10, 20)], &[])), None, "the first piece is missing");
        assert_eq!(find(None, &coverage(&[(1, 0, 10), (1, 10, 30)], &[])), Some((1, at(30), false)));
        assert_eq!(find(None, &coverage(&[(1, 0, 10), (1, 20, 30)], &[])), Some((1, at(10), false)));
        let both = coverage(&[(1, 0, 10)], &[1]);
        assert_eq!(find(None, &both), Some((1, Lsn(7 << 24), true)));
        assert_eq!(Ending::find(&way(None), &both, NUMBER, SIZE).unwrap().pieces_end, at(10));
    }

    #[test]
    fn what_lies_behind_the_switch_point_belongs_to_nobody_on_the_way() {
        // The child's copy is not there yet, and the old server wrote on.
        assert_eq!(find(Some(40), &coverage(&[(1, 0, 60)], &[])), Some((1, at(40), false)));
        assert_eq!(find(Some(40), &coverage(&[(1, 0, 60)], &[1])), Some((1, at(40), true)));
        // Of the child's copy there is less than the parent has, as much, and more.
        assert_eq!(find(Some(40), &coverage(&[(1, 0, 60), (2, 0, 10)], &[])), Some((1, at(40), false)));
        assert_eq!(find(Some(40), &coverage(&[(1, 0, 60), (2, 0, 40)], &[])), Some((2, at(40), false)));
        assert_eq!(find(Some(40), &coverage(&[(1, 0, 60), (2, 0, 50)], &[])), Some((2, at(50), false)));
        // The old server has finished the segment: what it wrote before the switch point is what the child begins with.
        let mut finished = coverage(&[], &[]);
        finished.timelines.entry(timeline(1)).or_default().push(NUMBER);
        assert_eq!(find(Some(40), &finished), Some((1, at(40), false)));
        assert_eq!(find(None, &finished), None, "nobody left it there");
        // A switch at the border leaves nothing of the parent's segment.
        assert_eq!(find(Some(0), &coverage(&[(1, 0, 60)], &[1])), None);
        assert_eq!(
            Ending::find(&way(Some(40)), &coverage(&[(1, 0, 9)], &[]), WalSegmentNumber(7), SIZE),
            None
        );
    }
}
