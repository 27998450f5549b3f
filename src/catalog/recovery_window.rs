//! How far recovery gets from a basebackup: which WAL is there without a gap, and what lies behind the first gap.
//!
//! Pure: the way to a timeline is cut into what the archive has and what it lacks. The window begins where the
//! basebackup is consistent and ends before the first segment missing, or in it, where its beginning is there. A gap
//! with WAL behind it is a hole, and so is one below a switch point or a head: the history or the head says that there
//! was WAL. Everything else is the end of the archive. Segments past a switch point and partial segments are never
//! *behind*.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::catalog::timeline_tree::{Stretch, TimelineTree};
use crate::catalog::wal_coverage::WalCoverage;
use crate::catalog::window_ending::Ending;
use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::documents::BackupRecord;

/// Where recovery from a basebackup begins, and where it may end at the earliest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryStart {
    /// The timeline of the basebackup.
    pub timeline: TimelineId,
    /// START WAL LOCATION.
    pub start_lsn: Lsn,
    /// Where it is consistent.
    pub stop_lsn: Lsn,
}

/// Neighbouring segments of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRange {
    /// The first.
    pub first: WalSegmentName,
    /// The last.
    pub last: WalSegmentName,
    /// How many there are.
    pub segments: u64,
}

/// Segments that are missing although something shows that they were written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hole {
    /// What is missing; in several ranges only where it goes over from one timeline to the next.
    pub missing: Vec<SegmentRange>,
    /// What stands behind it, up to the next hole or the end; nothing where only a switch point lies behind it.
    pub behind: Vec<SegmentRange>,
}

/// What can be recovered from one basebackup along the way to one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveryWindow {
    /// The timeline that the way leads to.
    pub timeline: TimelineId,
    /// Where it begins.
    pub start: RecoveryStart,
    /// The WAL from the start on, without a gap; one range for each timeline. With the segment of the ending.
    pub reached: Vec<SegmentRange>,
    /// The position behind the WAL that is reached: no record from here on can be.
    pub end: Lsn,
    /// The holes behind that, nearest first.
    pub holes: Vec<Hole>,
    /// The last segment that is reached, where there is no more of it than its beginning.
    pub ending: Option<Ending>,
    /// The first segment missing of those without which the basebackup is never consistent.
    pub missing_start: Option<WalSegmentName>,
}

/// Whether a basebackup can be recovered at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recoverability {
    /// All it needs is there.
    Recoverable,
    /// A segment between its start and its stop is not in the archive (failure 21b).
    MissingWal(WalSegmentName),
    /// The history file of its timeline is not in the archive, or cannot be read.
    MissingHistory(TimelineId),
}

impl From<&BackupRecord> for RecoveryStart {
    fn from(record: &BackupRecord) -> Self {
        Self { timeline: record.timeline, start_lsn: record.start_lsn, stop_lsn: record.stop_lsn }
    }
}

impl SegmentRange {
    /// Creates a range of segments of one timeline, `first` not behind `last`.
    pub fn new(
        timeline: TimelineId,
        first: WalSegmentNumber,
        last: WalSegmentNumber,
        size: WalSegmentSize,
    ) -> Self {
        let name = |number| WalSegmentName::new(timeline, number, size);
        Self { first: name(first), last: name(last), segments: last.0 - first.0 + 1 }
    }

    /// Returns the timeline.
    pub fn timeline(&self) -> TimelineId {
        self.first.timeline()
    }
}

impl fmt::Display for SegmentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.segments {
            1 => write!(f, "{}", self.first),
            count => write!(f, "{} to {} ({count})", self.first, self.last),
        }
    }
}

/// As the beginning of a sentence: `WAL segment … is`, `WAL segments … are`.
impl fmt::Display for Hole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges: Vec<String> = self.missing.iter().map(ToString::to_string).collect();
        let one = self.missing.iter().map(|range| range.segments).sum::<u64>() == 1;
        let (noun, verb) = if one { ("segment", "is") } else { ("segments", "are") };
        write!(f, "WAL {noun} {} {verb}", ranges.join(" and "))
    }
}

impl RecoveryWindow {
    /// Looks how far recovery from `start` gets on the way to `timeline`; nothing where the way does not pass it.
    pub fn new(
        start: RecoveryStart,
        tree: &TimelineTree,
        coverage: &WalCoverage,
        timeline: TimelineId,
        size: WalSegmentSize,
    ) -> Option<Self> {
        if !tree.passes(timeline, start.timeline, start.stop_lsn) {
            return None;
        }
        let way = tree.way_to(timeline);
        let proven_end =
            coverage.timelines.get(&timeline).map_or(Lsn::ZERO, |coverage| coverage.proven_end(size));
        // The history of a timeline proves that there is WAL up to where it began.
        let proven_end = proven_end.max(began_within(&way, start, size).unwrap_or(Lsn::ZERO));
        let mut pieces = Vec::new();
        let first_segment =
            |stretch: &Stretch| WalSegmentNumber::containing(stretch.begin.max(start.start_lsn), size);
        // A standby's basebackup may begin before its timeline does; then the way begins on the parent.
        for stretch in &way {
            // The switch-point segment is read from the child, which begins with a copy of it.
            let last = match stretch.end {
                Some(end) => match WalSegmentNumber::containing(end, size).0.checked_sub(1) {
                    Some(last) => WalSegmentNumber(last),
                    None => continue,
                },
                None if proven_end.is_zero() => continue,
                None => WalSegmentNumber::ending_at(proven_end, size),
            };
            cut(coverage, stretch.timeline, first_segment(stretch), last, size, &mut pieces);
        }
        let reached_len = pieces.iter().take_while(|(_, held)| *held).count();
        let holes = holes_of(&pieces[reached_len..]);
        let reached: Vec<SegmentRange> = pieces[..reached_len].iter().map(|(range, _)| *range).collect();
        let end = match reached.last() {
            Some(range) => range.last.end_lsn(size).ok()?,
            None => WalSegmentNumber::containing(start.start_lsn, size).start_lsn(size),
        };
        let mut window = Self { timeline, start, reached, end, holes, ending: None, missing_start: None };
        let next = WalSegmentNumber::containing(end, size);
        // One that ends where recovery begins holds nothing to replay.
        let ending = Ending::find(&way, coverage, next, size).filter(|ending| ending.end > start.start_lsn);
        if let Some(ending) = ending {
            window.end_in(ending, next, size);
        }
        // Nothing on the last timeline lies behind the ending, and before it every switch point is passed.
        let is_last = way.last().is_some_and(|stretch| first_segment(stretch) <= next);
        if is_last && proven_end <= window.end {
            window.holes.clear();
        }
        if window.whole_or_pieces_end() < start.stop_lsn {
            window.missing_start = Some(window.next_segment(tree, size));
        }
        Some(window)
    }

    /// Adds the segment of which there is only the beginning.
    fn end_in(&mut self, ending: Ending, number: WalSegmentNumber, size: WalSegmentSize) {
        match self.reached.last_mut() {
            Some(range) if range.timeline() == ending.segment.timeline() => {
                (range.last, range.segments) = (ending.segment, range.segments + 1);
            }
            _ => self.reached.push(SegmentRange::new(ending.segment.timeline(), number, number, size)),
        }
        (self.end, self.ending) = (ending.end, Some(ending));
    }

    /// Returns the position behind the WAL that names alone prove to be there: how much a `.partial` holds is not known.
    pub fn whole_or_pieces_end(&self) -> Lsn {
        self.ending.map_or(self.end, |ending| ending.pieces_end)
    }

    /// Returns the first and the last segment of each timeline, and where the WAL of the last one ends.
    pub fn stretches(&self) -> impl Iterator<Item = (WalSegmentName, WalSegmentName, Option<Lsn>)> {
        self.reached.iter().map(|range| (range.first, range.last, self.end_of(range)))
    }

    /// Returns where the WAL of a range ends, if not with its last segment.
    pub fn end_of(&self, range: &SegmentRange) -> Option<Lsn> {
        self.ending.filter(|ending| ending.segment == range.last).map(|ending| ending.end)
    }

    /// Returns whether the basebackup becomes consistent on this way.
    pub fn is_recoverable(&self) -> bool {
        self.missing_start.is_none()
    }

    /// Returns whether recovery comes as far as the timeline that the way leads to.
    pub fn reaches_timeline(&self) -> bool {
        self.reached.last().is_some_and(|range| range.timeline() == self.timeline)
    }

    /// Returns the last segment that is reached.
    pub fn last_segment(&self) -> Option<WalSegmentName> {
        self.reached.last().map(|range| range.last)
    }

    /// Returns the segment that recovery would need next.
    fn next_segment(&self, tree: &TimelineTree, size: WalSegmentSize) -> WalSegmentName {
        let way = tree.way_to(self.timeline);
        let number = WalSegmentNumber::containing(self.whole_or_pieces_end(), size);
        let child =
            way.iter().rev().find(|stretch| WalSegmentNumber::containing(stretch.begin, size) <= number);
        WalSegmentName::new(child.map_or(self.timeline, |stretch| stretch.timeline), number, size)
    }
}

/// Returns where the last timeline of a way began, if that is within a segment and behind the start: up to there the
/// segment holds what its parent wrote last, and recovery must not end before it in silence.
fn began_within(way: &[Stretch], start: RecoveryStart, size: WalSegmentSize) -> Option<Lsn> {
    let begin = way.last()?.begin;
    let is_within = begin > WalSegmentNumber::containing(begin, size).start_lsn(size);
    (is_within && begin > start.start_lsn).then_some(begin)
}

/// Cuts a stretch of a timeline into ranges that are there and ranges that are not.
fn cut(
    coverage: &WalCoverage,
    timeline: TimelineId,
    first: WalSegmentNumber,
    last: WalSegmentNumber,
    size: WalSegmentSize,
    pieces: &mut Vec<(SegmentRange, bool)>,
) {
    let held = coverage.timelines.get(&timeline);
    let mut push = |first: WalSegmentNumber, last: WalSegmentNumber, held| {
        if first <= last {
            pieces.push((SegmentRange::new(timeline, first, last, size), held));
        }
    };
    let mut at = first;
    for (from, to) in held.map(|held| held.runs()).unwrap_or_default() {
        let (from, to) = (*from.max(&at), *to.min(&last));
        if from > to {
            continue;
        }
        if from > at {
            push(at, WalSegmentNumber(from.0 - 1), false);
        }
        push(from, to, true);
        at = to.next();
    }
    push(at, last, false);
}

/// Groups pieces that begin with a gap into holes and what is behind each.
fn holes_of(pieces: &[(SegmentRange, bool)]) -> Vec<Hole> {
    let mut holes: Vec<Hole> = Vec::new();
    for (range, held) in pieces {
        match holes.last_mut() {
            Some(hole) if *held => hole.behind.push(*range),
            Some(hole) if hole.behind.is_empty() => hole.missing.push(*range),
            _ => holes.push(Hole { missing: vec![*range], behind: Vec::new() }),
        }
    }
    holes
}

/// Looks how far recovery gets on every way that passes a basebackup, by timeline.
pub fn windows(
    start: RecoveryStart,
    tree: &TimelineTree,
    coverage: &WalCoverage,
    size: WalSegmentSize,
) -> Vec<RecoveryWindow> {
    let mut timelines: Vec<TimelineId> = tree.timelines().collect();
    timelines.push(start.timeline);
    timelines.sort_unstable();
    timelines.dedup();
    let windows = timelines.into_iter();
    windows.filter_map(|timeline| RecoveryWindow::new(start, tree, coverage, timeline, size)).collect()
}

/// Decides whether a basebackup can be recovered, from its windows.
pub fn recoverability(
    start: RecoveryStart,
    tree: &TimelineTree,
    windows: &[RecoveryWindow],
) -> Recoverability {
    if start.timeline > TimelineId::FIRST && tree.branch(start.timeline).is_none() {
        return Recoverability::MissingHistory(start.timeline);
    }
    if windows.iter().any(RecoveryWindow::is_recoverable) {
        return Recoverability::Recoverable;
    }
    // Its own way is always among them.
    match windows.iter().find_map(|window| window.missing_start) {
        Some(missing) => Recoverability::MissingWal(missing),
        None => Recoverability::MissingHistory(start.timeline),
    }
}

impl fmt::Display for Recoverability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Recoverable => f.write_str("recoverable"),
            Self::MissingWal(segment) => write!(f, "WAL segment {segment} is missing from the archive"),
            Self::MissingHistory(timeline) => {
                write!(f, "the history file of timeline {timeline} is missing from the archive or damaged")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use crate::catalog::wal_coverage::TimelineCoverage;
    use crate::repo::wal_object::HistoryBranch;

    use super::*;

    const SIZES: [u32; 3] = [1 << 20, 16 << 20, 1 << 30];

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn coverage_of(held: &BTreeMap<u32, BTreeSet<u64>>) -> WalCoverage {
        let coverage = |numbers: &BTreeSet<u64>| {
            let mut coverage = TimelineCoverage::default();
            numbers.iter().for_each(|number| coverage.push(WalSegmentNumber(*number)));
            coverage
        };
        let timelines = held.iter().map(|(number, numbers)| (timeline(*number), coverage(numbers)));
        WalCoverage { timelines: timelines.collect() }
    }

    /// An archive on which a test writes `1: 3-5 8` for what timeline 1 has, in segments of 16 MiB.
    fn archive(text: &str) -> WalCoverage {
        let mut held = BTreeMap::new();
        for line in text.split(';') {
            let (number, ranges) = line.trim().split_once(':').unwrap();
            let numbers: &mut BTreeSet<u64> = held.entry(number.parse().unwrap()).or_default();
            for range in ranges.split_whitespace() {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                numbers.extend(first.parse::<u64>().unwrap()..=last.parse().unwrap());
            }
        }
        coverage_of(&held)
    }

    /// A position in the middle of a segment of 16 MiB.
    fn within(segment: u64) -> Lsn {
        Lsn((segment << 24) + 0x28)
    }

    fn tree(branches: &[(u32, u32, Lsn)]) -> TimelineTree {
        let branch = |&(number, parent, switch)| {
            (timeline(number), HistoryBranch { parent: timeline(parent), switch })
        };
        TimelineTree::new(branches.iter().map(branch))
    }

    /// A basebackup from within one segment to within another.
    fn start(number: u32, first: u64, last: u64) -> RecoveryStart {
        RecoveryStart { timeline: timeline(number), start_lsn: within(first), stop_lsn: within(last) }
    }

    fn window(start: RecoveryStart, tree: &TimelineTree, held: &str, number: u32) -> RecoveryWindow {
        RecoveryWindow::new(start, tree, &archive(held), timeline(number), WalSegmentSize::DEFAULT).unwrap()
    }

    fn names(ranges: &[SegmentRange]) -> Vec<String> {
        ranges.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_gap_with_wal_behind_it_is_a_hole_and_one_without_is_the_end() {
        let found = window(start(1, 3, 3), &tree(&[]), "1: 2-5 8-9 11", 1);
        assert_eq!(names(&found.reached), ["000000010000000000000003 to 000000010000000000000005 (3)"]);
        assert_eq!(found.end, Lsn(6 << 24));
        assert_eq!(found.holes.len(), 2);
        assert_eq!(
            found.holes[0].to_string(),
            "WAL segments 000000010000000000000006 to 000000010000000000000007 (2) are"
        );
        assert_eq!(
            names(&found.holes[0].behind),
            ["000000010000000000000008 to 000000010000000000000009 (2)"]
        );
        assert_eq!(found.holes[1].to_string(), "WAL segment 00000001000000000000000A is");
        let whole = window(start(1, 3, 3), &tree(&[]), "1: 2-5", 1);
        assert!(whole.holes.is_empty() && whole.is_recoverable());
    }

    /// Failure 21b: the stop segment was archived, an earlier one not yet, and the basebackup counted as good.
    #[test]
    fn failure_21b_the_stop_segment_alone_makes_no_basebackup_recoverable() {
        let (tree, size) = (tree(&[]), WalSegmentSize::DEFAULT);
        for (held, expected) in [
            ("1: 3-5", Recoverability::Recoverable),
            ("1: 3 5", Recoverability::MissingWal("000000010000000000000004".parse().unwrap())),
            ("1: 4-9", Recoverability::MissingWal("000000010000000000000003".parse().unwrap())),
            ("1: 3-4", Recoverability::MissingWal("000000010000000000000005".parse().unwrap())),
            ("1:", Recoverability::MissingWal("000000010000000000000003".parse().unwrap())),
        ] {
            let windows = windows(start(1, 3, 5), &tree, &archive(held), size);
            assert_eq!(recoverability(start(1, 3, 5), &tree, &windows), expected, "{held}");
        }
        // A stop position on the border needs the segment before it and none behind it.
        let border = RecoveryStart { stop_lsn: Lsn(5 << 24), ..start(1, 3, 5) };
        let windows = windows(border, &tree, &archive("1: 3-4"), size);
        assert_eq!(recoverability(border, &tree, &windows), Recoverability::Recoverable);
    }

    /// Failure 9: without its history file no server goes to a timeline.
    #[test]
    fn failure_9_a_basebackup_needs_the_history_of_its_timeline() {
        let size = WalSegmentSize::DEFAULT;
        let held = archive("2: 3-9");
        let orphan = tree(&[]);
        let found = windows(start(2, 3, 5), &orphan, &held, size);
        let missing = Recoverability::MissingHistory(timeline(2));
        assert_eq!(recoverability(start(2, 3, 5), &orphan, &found), missing);
        let known = tree(&[(2, 1, within(2))]);
        let found = windows(start(2, 3, 5), &known, &held, size);
        assert_eq!(recoverability(start(2, 3, 5), &known, &found), Recoverability::Recoverable);
    }

    #[test]
    fn the_way_goes_over_to_the_child_at_the_switch_point_segment() {
        let tree = tree(&[(2, 1, within(6))]);
        let found = window(start(1, 3, 3), &tree, "1: 3-5; 2: 6-9", 2);
        assert_eq!(
            names(&found.reached),
            [
                "000000010000000000000003 to 000000010000000000000005 (3)",
                "000000020000000000000006 to 000000020000000000000009 (4)"
            ]
        );
        assert!(found.reaches_timeline() && found.holes.is_empty());
        // A hole over the switch point belongs to both.
        let torn = window(start(1, 3, 3), &tree, "1: 3-4; 2: 8-9", 2);
        assert_eq!(
            torn.holes[0].to_string(),
            "WAL segments 000000010000000000000005 and 000000020000000000000006 to 000000020000000000000007 (2) are"
        );
    }

    #[test]
    fn segments_past_the_switch_point_are_not_later() {
        let tree = tree(&[(2, 1, within(6))]);
        // The old primary went on; on the way to timeline 2 that is nothing.
        let found = window(start(1, 3, 3), &tree, "1: 3-5 7-9; 2: 6", 2);
        assert_eq!((found.end, found.holes.len(), found.reaches_timeline()), (Lsn(7 << 24), 0, true));
        // Who wants to stay on timeline 1 sees a hole.
        assert_eq!(window(start(1, 3, 3), &tree, "1: 3-5 7-9", 1).holes.len(), 1);
        // Below the switch point there was WAL, whoever has it now.
        let lost = window(start(1, 3, 3), &tree, "1: 3-4 7-9", 2);
        assert_eq!((lost.holes[0].missing.len(), &lost.holes[0].behind[..]), (2, &[][..]));
    }

    /// The history is archived at once, the first segment of the child when it is full: until then what was written
    /// last before the switch is in no archive, and recovery must not pass that over in silence.
    #[test]
    fn the_segment_in_which_a_timeline_began_is_missed_where_it_is_not_there() {
        let (inside, border) = (tree(&[(2, 1, within(6))]), tree(&[(2, 1, Lsn(6 << 24))]));
        let found = window(start(1, 3, 3), &inside, "1: 3-5", 2);
        assert_eq!((found.end, found.reaches_timeline()), (Lsn(6 << 24), false));
        assert_eq!(found.holes[0].to_string(), "WAL segment 000000020000000000000006 is");
        // Its parent's segment will do, up to the switch point and no further.
        let found = window(start(1, 3, 3), &inside, "1: 3-9", 2);
        assert_eq!((found.end, found.holes.len(), found.reached[0].segments), (within(6), 0, 4));
        // Behind that more of the child has come, and recovery must not end before it.
        let found = window(start(1, 3, 3), &inside, "1: 3-9; 2: 7", 2);
        assert_eq!((found.end, found.holes.len()), (within(6), 1));
        // Nothing was written in a segment that begins with the switch.
        assert!(window(start(1, 3, 3), &border, "1: 3-5", 2).holes.is_empty());
        // A basebackup of the child itself begins behind that.
        let own = RecoveryStart { timeline: timeline(2), start_lsn: within(6) + 1, stop_lsn: within(6) + 2 };
        assert!(window(own, &inside, "1: 3-5", 2).holes.is_empty());
        // One that begins with its timeline finds nothing in what its parent has up to there.
        let at_switch =
            RecoveryStart { timeline: timeline(2), start_lsn: within(6), stop_lsn: within(6) + 2 };
        let found = window(at_switch, &inside, "1: 6", 2);
        assert_eq!((found.reached.len(), found.ending), (0, None));
    }

    #[test]
    fn a_partial_is_at_the_end_and_never_behind_a_hole() {
        let with_partials = |held: &str, partials: &[&str]| {
            let mut coverage = archive(held);
            for partial in partials {
                let name: WalSegmentName = partial.parse().unwrap();
                coverage.timelines.entry(name.timeline()).or_default().partials.push(name);
            }
            coverage
        };
        let (size, tree) = (WalSegmentSize::DEFAULT, tree(&[(2, 1, within(6))]));
        let found = |held, partials: &[&str], number| {
            let coverage = with_partials(held, partials);
            RecoveryWindow::new(start(1, 3, 3), &tree, &coverage, timeline(number), size).unwrap()
        };
        let partial = |found: &RecoveryWindow| found.ending.map(|ending| ending.segment.to_string());
        let end = found("1: 3-5", &["000000010000000000000006"], 2);
        assert_eq!(partial(&end).as_deref(), Some("000000010000000000000006"));
        // The way leaves the timeline there, and who stays on it has all that the partial may hold.
        assert_eq!((end.end, end.whole_or_pieces_end()), (within(6), Lsn(6 << 24)));
        assert_eq!(found("1: 3-5", &["000000010000000000000006"], 1).end, Lsn(7 << 24));
        let later = found("1: 3-5", &["000000010000000000000008"], 1);
        assert_eq!((partial(&later), later.holes.len(), later.end), (None, 0, Lsn(6 << 24)));
        // Once the child has the switch-point segment, the parent's partial is nothing any more.
        assert_eq!(partial(&found("1: 3-5; 2: 6", &["000000010000000000000006"], 2)), None);
        let past = found("1: 3-5; 2: 6-7", &["000000010000000000000008"], 2);
        assert_eq!(partial(&past), None);
        // How much a partial holds is not known, so that no basebackup is recoverable by it.
        let backup = |held| {
            let coverage = with_partials(held, &["000000010000000000000006"]);
            RecoveryWindow::new(start(1, 3, 6), &tree, &coverage, timeline(1), size).unwrap()
        };
        assert_eq!(backup("1: 3-5").missing_start, Some("000000010000000000000006".parse().unwrap()));
    }

    /// What is there of one timeline: whole segments, pieces `(segment, from, to)`, and the newest head.
    fn pieced(held: &str, pieces: &[(u64, u32, u32)], head: Option<Lsn>) -> RecoveryWindow {
        let mut coverage = archive(held);
        let first = coverage.timelines.entry(timeline(1)).or_default();
        for (number, from, to) in pieces {
            first.push_piece(WalSegmentNumber(*number), *from, *to, WalSegmentSize::DEFAULT);
        }
        first.head = head;
        let size = WalSegmentSize::DEFAULT;
        RecoveryWindow::new(start(1, 3, 3), &tree(&[]), &coverage, timeline(1), size).unwrap()
    }

    #[test]
    fn pieces_lengthen_the_last_segment_and_prove_a_hole_before_them() {
        let end = pieced("1: 3-5", &[(6, 0, 0x100), (6, 0x100, 0x500)], None);
        assert_eq!(names(&end.reached), ["000000010000000000000003 to 000000010000000000000006 (4)"]);
        assert_eq!((end.end, end.holes.len()), (Lsn((6 << 24) + 0x500), 0));
        assert_eq!(end.stretches().next().unwrap().2, Some(end.end));
        // A piece behind a gap: what is before it can be had, and it is said that there was more.
        let gap = pieced("1: 3-5", &[(6, 0, 0x100), (6, 0x200, 0x500)], None);
        assert_eq!((gap.end, gap.holes.len()), (Lsn((6 << 24) + 0x100), 1));
        assert_eq!(gap.holes[0].to_string(), "WAL segment 000000010000000000000006 is");
        let first_missing = pieced("1: 3-5", &[(6, 0x100, 0x500)], None);
        assert_eq!((first_missing.end, first_missing.holes.len()), (Lsn(6 << 24), 1));
        // A segment is missing between, and of one with WAL behind it there is the beginning.
        let later = pieced("1: 3-5", &[(7, 0, 0x100)], None);
        assert_eq!((later.end, later.holes[0].missing[0].segments), (Lsn(6 << 24), 2));
        let before = pieced("1: 3-5 7-8", &[(6, 0, 0x100)], None);
        assert_eq!((before.end, names(&before.holes[0].behind).len()), (Lsn((6 << 24) + 0x100), 1));
        // All of a segment in pieces is the segment, and pieces that the whole segment followed are nothing.
        let whole = pieced("1: 3-5", &[(6, 0, 1 << 24), (7, 0, 8)], None);
        assert_eq!((whole.end, whole.holes.len()), (Lsn((7 << 24) + 8), 0));
        let old = pieced("1: 3-5", &[(5, 0, 0x100)], None);
        assert_eq!((old.end, old.ending), (Lsn(6 << 24), None));
    }

    #[test]
    fn a_head_behind_the_last_segment_proves_that_a_tail_was_cut_off() {
        for (pieces, head, end, missing) in [
            (&[][..], Lsn(6 << 24), Lsn(6 << 24), 0),
            (&[], Lsn((6 << 24) + 1), Lsn(6 << 24), 1),
            (&[], Lsn(9 << 24), Lsn(6 << 24), 3),
            (&[(6, 0, 0x100)], Lsn((6 << 24) + 0x100), Lsn((6 << 24) + 0x100), 0),
            (&[(6, 0, 0x100)], Lsn((6 << 24) + 0x101), Lsn((6 << 24) + 0x100), 1),
        ] {
            let found = pieced("1: 3-5", pieces, Some(head));
            let holes: Vec<u64> = found.holes.iter().map(|hole| hole.missing[0].segments).collect();
            assert_eq!((found.end, holes.iter().sum::<u64>()), (end, missing), "{head}");
        }
        // All of the timeline was cut off.
        let none = pieced("1:", &[], Some(Lsn(5 << 24)));
        assert_eq!(none.holes[0].missing[0].segments, 2);
    }

    /// Failures 6 and 7: other segment sizes, and the successor of `…FF`.
    #[test]
    fn failure_7_a_run_goes_on_over_the_end_of_a_log_at_any_segment_size() {
        for bytes in SIZES {
            let size = WalSegmentSize::new(bytes).unwrap();
            let per_log = size.segments_per_log();
            let numbers: BTreeSet<u64> = (per_log - 2..per_log + 3).collect();
            let coverage = coverage_of(&BTreeMap::from([(1, numbers)]));
            let lsn = WalSegmentNumber(per_log - 2).start_lsn(size);
            let start = RecoveryStart { timeline: timeline(1), start_lsn: lsn + 0x28, stop_lsn: lsn + 0x100 };
            let found = RecoveryWindow::new(start, &tree(&[]), &coverage, timeline(1), size).unwrap();
            assert_eq!((found.reached.len(), found.reached[0].segments, found.holes.len()), (1, 5, 0));
            assert_eq!(found.end, WalSegmentNumber(per_log + 3).start_lsn(size));
        }
    }

    /// The segment of each number that recovery reads on the way to a timeline, by the plainest of rules: that of the
    /// newest timeline on the way which has begun by then.
    fn model(
        start: RecoveryStart,
        branches: &BTreeMap<u32, (u32, u64)>,
        held: &BTreeMap<u32, BTreeSet<u64>>,
        target: u32,
        size: WalSegmentSize,
    ) -> Option<Vec<(u32, u64, bool)>> {
        let bytes = u64::from(size.bytes());
        let mut way = vec![(target, 0)];
        while let Some((parent, switch)) = branches.get(&way[0].0) {
            way[0].1 = *switch;
            way.insert(0, (*parent, 0));
        }
        let own = way.iter().position(|(timeline, _)| *timeline == start.timeline.get())?;
        if way.get(own + 1).is_some_and(|(_, switch)| *switch < start.stop_lsn.0) {
            return None;
        }
        let first = start.start_lsn.0 / bytes;
        let owner = |number: u64| way.iter().rev().find(|(_, switch)| switch / bytes <= number).unwrap().0;
        let is_held = |number: u64| held.get(&owner(number)).is_some_and(|held| held.contains(&number));
        // Up to the last switch point there was WAL, whether it is there or not.
        let (_, switch) = way[way.len() - 1];
        let began = (switch % bytes != 0 && switch > start.start_lsn.0).then_some(switch / bytes);
        let is_known = |number: &u64| is_held(*number) || owner(*number) != target || began == Some(*number);
        let last = (first..200).rev().find(is_known);
        Some(last.map_or(Vec::new(), |last| {
            (first..=last).map(|number| (owner(number), number, is_held(number))).collect()
        }))
    }

    proptest! {
        #[test]
        fn a_window_is_what_reading_segment_by_segment_finds(
            size in 0usize..3,
            held in proptest::collection::btree_map(1u32..5, proptest::collection::btree_set(0u64..40, 0..40), 1..5),
            branches in proptest::collection::btree_map(2u32..5, (1u32..4, 0u64..4000), 0..4),
            begin in (1u32..5, 0u64..3000, 0u64..1000),
        ) {
            let size = WalSegmentSize::new(SIZES[size]).unwrap();
            let unit = u64::from(size.bytes()) / 100;
            let mut grown: BTreeMap<u32, (u32, u64)> = BTreeMap::new();
            for (child, (parent, switch)) in branches {
                // No server leaves a timeline before it began.
                let parent = parent.min(child - 1);
                let begun = grown.get(&parent).map_or(0, |(_, begun)| *begun);
                grown.insert(child, (parent, (switch * unit).max(begun)));
            }
            let branches = grown;
            let edges: Vec<_> =
                branches.iter().map(|(child, (parent, switch))| (*child, *parent, Lsn(*switch))).collect();
            let (tree, coverage) = (tree(&edges), coverage_of(&held));
            let (number, from, length) = begin;
            let start = RecoveryStart {
                timeline: timeline(number),
                start_lsn: Lsn(from * unit),
                stop_lsn: Lsn((from + length) * unit + 1),
            };
            for target in 1..5 {
                let found = RecoveryWindow::new(start, &tree, &coverage, timeline(target), size);
                let Some(expected) = model(start, &branches, &held, target, size) else {
                    prop_assert!(found.is_none());
                    continue;
                };
                let found = found.unwrap();
                let flat = |ranges: &[SegmentRange], is_held: bool| -> Vec<(u32, u64, bool)> {
                    let numbers = |range: &SegmentRange| {
                        let (first, last) = (range.first.number(size).unwrap().0, range.last.number(size).unwrap().0);
                        let timeline = range.timeline().get();
                        (first..=last).map(move |number| (timeline, number, is_held)).collect::<Vec<_>>()
                    };
                    ranges.iter().flat_map(numbers).collect()
                };
                if let Some(ending) = found.ending {
                    // What its parent has of the segment in which a timeline began, where the timeline has nothing of it.
                    let number = ending.segment.number(size).unwrap();
                    let left = ending.segment.timeline().get();
                    prop_assert!(coverage.timelines[&ending.segment.timeline()].contains(number));
                    prop_assert!(expected.iter().any(|(owner, at, held)| *at == number.0 && *owner > left && !held));
                    prop_assert!(branches.values().any(|branch| *branch == (left, found.end.0)));
                    continue;
                }
                let mut all = flat(&found.reached, true);
                let reached = all.len();
                for hole in &found.holes {
                    all.extend(flat(&hole.missing, false));
                    all.extend(flat(&hole.behind, true));
                }
                prop_assert_eq!(reached, expected.iter().take_while(|(_, _, held)| *held).count());
                let needed = start.start_lsn.0 / u64::from(size.bytes())..=(start.stop_lsn.0 - 1) / u64::from(size.bytes());
                let covered = |number: u64| all[..reached].iter().any(|(_, held, _)| *held == number);
                prop_assert_eq!(found.is_recoverable(), needed.clone().all(covered));
                prop_assert_eq!(all, expected);
            }
        }
    }
}
