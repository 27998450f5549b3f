//! WAL that no server has any more and that was never received, and when that stops to matter.
//!
//! Gaps are told in `receive.json` until a basebackup lies behind them: it needs nothing of what is missing. Who reads
//! that file may know of a newer basebackup than the receiver that wrote it, and asks [`Gap::lies_before`] again.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, TimelineId};
use crate::repo::ClusterId;
use crate::wal::left_out::RecoveryStart;

/// A hole in what was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The cluster that wrote it.
    pub cluster: ClusterId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first position that is missing.
    pub from: Lsn,
    /// Where the WAL goes on.
    pub to: Lsn,
    /// When that was noticed.
    pub noticed_at: Timestamp,
}

/// Gaps that are told. One basebackup ends them all, so that the oldest go first; more come only where a server keeps so
/// little WAL that it is lost again and again, and the file that names them is written every second.
const GAPS_MAX: usize = 64;

impl Gap {
    /// Returns whether a recovery that begins there needs nothing of it.
    pub fn lies_before(&self, start: &RecoveryStart) -> bool {
        self.cluster == start.cluster && self.timeline <= start.timeline && self.to <= start.lsn
    }

    /// Returns whether it tells all of another one.
    pub(super) fn holds(&self, other: &Self) -> bool {
        let same = (self.cluster, self.timeline) == (other.cluster, other.timeline);
        same && self.from <= other.from && other.to <= self.to
    }

    /// Returns whether another one begins within it, or where it ends.
    fn reaches(&self, next: &Self) -> bool {
        let same = (self.cluster, self.timeline) == (next.cluster, next.timeline);
        same && (self.from..=self.to).contains(&next.from)
    }
}

/// Takes note of a gap: one that goes on where the newest ends makes that one longer, and one that is known is no news.
pub(super) fn note_gap(gaps: &mut Vec<Gap>, gap: Gap) {
    if gaps.iter().any(|known| known.holds(&gap)) {
        return;
    }
    match gaps.last_mut().filter(|last| last.reaches(&gap)) {
        Some(last) => last.to = last.to.max(gap.to),
        None => gaps.push(gap),
    }
    keep_newest(gaps);
}

/// Lets the oldest go where there are too many.
pub(super) fn keep_newest(gaps: &mut Vec<Gap>) {
    gaps.drain(..gaps.len().saturating_sub(GAPS_MAX));
}

#[cfg(test)]
mod tests {
    use crate::pg::{SystemIdentifier, WalSegmentSize};

    use super::*;

    fn cluster(number: u64) -> ClusterId {
        ClusterId { system_identifier: SystemIdentifier(number), segment_size: WalSegmentSize::DEFAULT }
    }

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn gap(timeline: u32, from: u64, to: u64) -> Gap {
        let noticed_at = Timestamp::from_second(from as i64).unwrap();
        Gap { cluster: cluster(7), timeline: tli(timeline), from: Lsn(from), to: Lsn(to), noticed_at }
    }

    #[test]
    fn a_basebackup_ends_a_gap_once_it_begins_behind_it() {
        let start = |number, timeline, lsn| RecoveryStart {
            cluster: cluster(number),
            timeline: tli(timeline),
            lsn: Lsn(lsn),
        };
        let gap = gap(2, 0x300, 0x500);
        assert!(gap.lies_before(&start(7, 2, 0x500)));
        assert!(gap.lies_before(&start(7, 3, 0x528)), "on a timeline that came later");
        assert!(!gap.lies_before(&start(7, 2, 0x4FF)), "within it");
        assert!(!gap.lies_before(&start(7, 2, 0x200)), "before it");
        assert!(!gap.lies_before(&start(7, 1, 0x900)), "on an older timeline");
        assert!(!gap.lies_before(&start(8, 2, 0x900)), "of another cluster");
    }

    #[test]
    fn a_gap_that_goes_on_is_one_and_a_gap_that_is_known_is_no_news() {
        let mut gaps = Vec::new();
        for (next, expected) in [
            (gap(1, 0x100, 0x200), vec![(0x100, 0x200)]),
            (gap(1, 0x100, 0x200), vec![(0x100, 0x200)]),
            // The receiver ended before it had anything from behind the gap, which is larger now.
            (gap(1, 0x100, 0x300), vec![(0x100, 0x300)]),
            (gap(1, 0x300, 0x400), vec![(0x100, 0x400)]),
            (gap(1, 0x200, 0x300), vec![(0x100, 0x400)]),
            (gap(1, 0x500, 0x600), vec![(0x100, 0x400), (0x500, 0x600)]),
            (gap(2, 0x600, 0x700), vec![(0x100, 0x400), (0x500, 0x600), (0x600, 0x700)]),
        ] {
            note_gap(&mut gaps, next);
            let found: Vec<_> = gaps.iter().map(|gap| (gap.from.0, gap.to.0)).collect();
            assert_eq!(found, expected);
        }
        assert_eq!(gaps[0].noticed_at, gap(1, 0x100, 0).noticed_at, "since it was noticed first");
        note_gap(&mut gaps, Gap { noticed_at: Timestamp::UNIX_EPOCH, ..gap(1, 0x500, 0x600) });
        assert_eq!(gaps.len(), 3);
    }

    #[test]
    fn a_gap_holds_what_lies_within_it() {
        let known = gap(2, 0x300, 0x500);
        assert!(known.holds(&known) && known.holds(&gap(2, 0x400, 0x500)));
        for other in [gap(2, 0x2FF, 0x500), gap(2, 0x300, 0x501), gap(1, 0x300, 0x500), gap(3, 0x300, 0x500)]
        {
            assert!(!known.holds(&other), "{other:?}");
        }
        assert!(!known.holds(&Gap { cluster: cluster(8), ..known.clone() }));
    }

    #[test]
    fn of_too_many_gaps_the_oldest_go() {
        let mut gaps = Vec::new();
        for number in 0..GAPS_MAX as u64 + 3 {
            note_gap(&mut gaps, gap(1, number * 0x100, number * 0x100 + 1));
        }
        assert_eq!(gaps.len(), GAPS_MAX);
        assert_eq!(gaps[0].from, Lsn(0x300));
    }
}
