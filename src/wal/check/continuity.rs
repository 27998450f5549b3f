//! What the names in an archive tell: which WAL is missing between what a recovery may begin with and the newest.
//!
//! Pure. What counts as missing is what the recovery windows call a hole, from whichever basebackup: so this and a
//! recovery never differ. Where no basebackup is, it is the gaps between the runs of each timeline. WAL before the
//! oldest basebackup serves nobody and is only counted.

use std::collections::BTreeMap;

use crate::catalog::recovery_window::{recoverability, windows};
use crate::catalog::{
    Recoverability, RecoveryStart, SegmentRange, TimelineCoverage, TimelineTree, WalCoverage,
};
use crate::pg::{TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::BasebackupId;

/// Runs of segments of each timeline, ascending, none touching the next.
type Runs = BTreeMap<TimelineId, Vec<(WalSegmentNumber, WalSegmentNumber)>>;

/// What the names of one cluster tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Continuity {
    /// The first segment that a basebackup may need; the very first where there is no basebackup.
    pub oldest: WalSegmentNumber,
    /// Segments before that.
    pub older: u64,
    /// What is missing, by timeline and name.
    pub missing: Vec<SegmentRange>,
    /// Timelines with WAL or basebackups whose history file is not there.
    pub missing_histories: Vec<TimelineId>,
    /// Basebackups that cannot be recovered, and why.
    pub unrecoverable: Vec<(BasebackupId, Recoverability)>,
}

/// The facts that the names of one cluster rest on.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// Bytes of a segment.
    pub size: WalSegmentSize,
    /// Which timeline branched off which.
    pub tree: &'a TimelineTree,
    /// Timelines whose history file is there and cannot be read.
    pub damaged_histories: &'a [TimelineId],
    /// The WAL that is there.
    pub coverage: &'a WalCoverage,
    /// Where recovery from each basebackup begins.
    pub basebackups: &'a [(BasebackupId, RecoveryStart)],
}

impl Continuity {
    /// Looks for what is missing.
    pub fn of(names: Names<'_>) -> Self {
        let Names { size, tree, coverage, basebackups, .. } = names;
        let starts = basebackups.iter().map(|(_, start)| WalSegmentNumber::containing(start.start_lsn, size));
        let oldest = starts.min().unwrap_or(WalSegmentNumber(0));
        let (mut missing, mut unrecoverable) = (Runs::new(), Vec::new());
        let mut seen: Vec<TimelineId> = Vec::new();
        for (id, start) in basebackups {
            let windows = windows(*start, tree, coverage, size);
            for window in &windows {
                seen.extend(tree.way_to(window.timeline).iter().map(|stretch| stretch.timeline));
                seen.push(window.timeline);
                let holes = window.holes.iter().flat_map(|hole| &hole.missing);
                holes.for_each(|range| add(&mut missing, *range, size));
            }
            match recoverability(*start, tree, &windows) {
                Recoverability::Recoverable => {}
                reason => unrecoverable.push((*id, reason)),
            }
        }
        for (timeline, held) in coverage.timelines.iter().filter(|(timeline, _)| !seen.contains(timeline)) {
            for (first, last) in held.holes() {
                if last >= oldest {
                    missing.entry(*timeline).or_default().push((first.max(oldest), last));
                }
            }
        }
        let older = coverage.timelines.values().flat_map(|held| held.runs()).map(|(first, last)| {
            let end = last.next().min(oldest);
            end.0.saturating_sub(first.0)
        });
        Self {
            oldest,
            older: older.sum(),
            missing: ranges(missing, size),
            missing_histories: missing_histories(names, oldest),
            unrecoverable,
        }
    }

    /// Returns whether a segment is missing.
    pub fn lacks(&self, segment: WalSegmentName) -> bool {
        let of_timeline = |range: &&SegmentRange| range.timeline() == segment.timeline();
        // Of one timeline the order of names is that of segments.
        self.missing.iter().filter(of_timeline).any(|range| (range.first..=range.last).contains(&segment))
    }

    /// Returns whether nothing is missing.
    pub fn is_whole(&self) -> bool {
        let Self { missing, missing_histories, unrecoverable, .. } = self;
        missing.is_empty() && missing_histories.is_empty() && unrecoverable.is_empty()
    }
}

/// A timeline that branched off says so in its history; without that nothing leads to it.
fn missing_histories(names: Names<'_>, oldest: WalSegmentNumber) -> Vec<TimelineId> {
    let Names { tree, damaged_histories, coverage, basebackups, .. } = names;
    let serves = |held: &TimelineCoverage| held.last().is_some_and(|last| last >= oldest);
    let with_wal = coverage.timelines.iter().filter(|(_, held)| serves(held)).map(|(timeline, _)| *timeline);
    let mut timelines: Vec<TimelineId> =
        with_wal.chain(basebackups.iter().map(|(_, start)| start.timeline)).collect();
    timelines.sort_unstable();
    timelines.dedup();
    timelines.retain(|timeline| {
        *timeline > TimelineId::FIRST
            && tree.branch(*timeline).is_none()
            && !damaged_histories.contains(timeline)
    });
    timelines
}

fn add(runs: &mut Runs, range: SegmentRange, size: WalSegmentSize) {
    if let (Ok(first), Ok(last)) = (range.first.number(size), range.last.number(size)) {
        runs.entry(range.timeline()).or_default().push((first, last));
    }
}

/// Joins what overlaps or touches: several basebackups see one hole.
fn ranges(runs: Runs, size: WalSegmentSize) -> Vec<SegmentRange> {
    let mut ranges = Vec::new();
    for (timeline, mut runs) in runs {
        runs.sort_unstable();
        let mut joined: Vec<(WalSegmentNumber, WalSegmentNumber)> = Vec::new();
        for (first, last) in runs {
            match joined.last_mut() {
                Some((_, end)) if first <= end.next() => *end = last.max(*end),
                _ => joined.push((first, last)),
            }
        }
        ranges.extend(joined.into_iter().map(|(first, last)| SegmentRange::new(timeline, first, last, size)));
    }
    ranges
}
