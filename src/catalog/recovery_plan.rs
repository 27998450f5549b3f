//! What a recovery may ask of the archive, and the answer to each name it asks for.
//!
//! PostgreSQL takes "not there" for "the archive ends here" and promotes. So *absent* is said only of what lies
//! outside the plan or is proven not to exist; what lies inside and does not come is *cannot tell*, however the
//! store failed (failure 1). The plan is pinned when recovery begins: WAL that is archived later is not part of it.
//! A standby's plan pins nothing, because a standby waits and never promotes by itself (failure 1a).

use serde::{Deserialize, Serialize};

use crate::catalog::timeline_tree::{Stretch, TimelineTree};
use crate::catalog::wal_coverage::{TimelineCoverage, WalCoverage};
use crate::catalog::window_ending::Ending;
use crate::pg::{ArchiveFileName, Lsn, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::carried_wal::CarriedWal;
use crate::repo::forced_index::ForcedListing;
use crate::repo::{BasebackupId, ClusterId, Repository};

/// The name of the plan's file in a data directory.
pub const PLAN_FILE_NAME: &str = "walden.plan.json";

/// What a recovery may ask of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryPlan {
    /// Version of this file, 1.
    pub format: u32,
    /// The cluster whose archive it is.
    pub cluster: ClusterId,
    /// The basebackup that recovery starts from, where Walden restored it.
    pub basebackup: Option<BasebackupId>,
    /// The stretches of WAL that recovery goes through, or may go through.
    pub spans: Vec<TimelineSpan>,
    /// Whether the server is a standby, which follows the archive and never ends.
    pub standby: bool,
    /// The segments that had been superseded when the plan was made; nothing where nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forced: Option<Vec<WalSegmentName>>,
    /// The WAL that the basebackup carries, and that the archive need not have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub carried: Option<CarriedWal>,
}

/// The segments of one timeline that belong to a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineSpan {
    /// The timeline.
    pub timeline: TimelineId,
    /// First segment.
    pub first: WalSegmentName,
    /// Last segment; none where the plan is not pinned.
    pub last: Option<WalSegmentName>,
    /// Whether the timeline's history file was in the archive.
    pub history: bool,
    /// Where the WAL of the last segment ends, if the archive has no more than its beginning or the way leaves it there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<Lsn>,
}

/// What the store says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InArchive {
    /// It is there.
    Present,
    /// The store answered that it is not there.
    Absent,
    /// The store did not answer, or what it gave is damaged.
    Unknown,
}

/// What is answered to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The file is handed out.
    Serve,
    /// The archive ends before it.
    Absent,
    /// Recovery must not go on without it.
    CannotTell,
}

impl RecoveryPlan {
    /// Makes the plan of a server that was not restored by Walden: every timeline from its beginning to its newest
    /// stored segment, or without an end for a standby.
    pub fn of_archive(
        cluster: ClusterId,
        tree: &TimelineTree,
        coverage: &WalCoverage,
        standby: bool,
    ) -> Self {
        let size = cluster.segment_size;
        let mut spans: Vec<TimelineSpan> = coverage
            .timelines
            .iter()
            .filter_map(|(timeline, held)| {
                let begin = tree.branch(*timeline).map_or(Lsn::ZERO, |branch| branch.switch);
                let begin = WalSegmentNumber::containing(begin, size);
                let name = |number| WalSegmentName::new(*timeline, number, size);
                let ending = ending_of(*timeline, held, tree, coverage, size);
                let proven = Some(held.proven_end(size)).filter(|end| !end.is_zero());
                let proven = proven.map(|end| WalSegmentNumber::ending_at(end, size));
                let unfinished = ending.and_then(|ending| ending.segment.number(size).ok());
                let newest = proven.max(unfinished)?;
                let oldest = held.runs().first().map_or(newest, |run| run.0);
                let first = if tree.branch(*timeline).is_some() { begin.min(newest) } else { oldest };
                let end = ending.filter(|ending| ending.segment == name(newest)).map(|ending| ending.end);
                let (last, end) = if standby { (None, None) } else { (Some(name(newest)), end) };
                let history = tree.branch(*timeline).is_some();
                Some(TimelineSpan { timeline: *timeline, first: name(first), last, history, end })
            })
            .collect();
        let bare = tree.timelines().filter(|timeline| !coverage.timelines.contains_key(timeline));
        spans.extend(bare.filter_map(|timeline| bare_span(timeline, tree, coverage, size, standby)));
        spans.sort_by_key(|span| span.timeline);
        let (basebackup, forced, carried) = (None, None, None);
        Self { format: 1, cluster, basebackup, spans, standby, forced, carried }.with_forced(coverage)
    }

    /// Notes which of its segments are superseded, by the listing that the plan was made from.
    pub fn with_forced(mut self, coverage: &WalCoverage) -> Self {
        let forced = coverage.timelines.values().flat_map(|held| &held.forced).copied();
        self.forced = Some(forced.filter(|segment| self.contains_segment(*segment)).collect());
        self
    }

    /// Tells the readers of a repository what the plan knows: which WAL its basebackup carries, and of superseded segments,
    /// so that they ask about none.
    ///
    /// Not of a standby's: it follows what is archived, and superseded, from now on.
    pub fn tell(&self, repository: &Repository) {
        if let (Some(basebackup), Some(wal)) = (self.basebackup, &self.carried) {
            repository.carried_index().note(self.cluster, basebackup, wal);
        }
        let Some(forced) = self.forced.as_ref().filter(|_| !self.standby) else { return };
        for span in &self.spans {
            let Some(last) = span.last else { continue };
            repository.forced_index().note(ForcedListing {
                cluster: self.cluster,
                timeline: span.timeline,
                segments: span.first..=last,
                but_last: false,
                forced: forced.clone(),
                listed_at: None,
            });
        }
    }

    /// Returns where the WAL of a segment ends, if recovery is to have no more of it than its beginning.
    ///
    /// Never for a standby: it may have got more of the segment by streaming, and confirmed it, and would write over that.
    pub fn ending_of(&self, segment: WalSegmentName) -> Option<Lsn> {
        let span = self.span(segment.timeline()).filter(|span| span.last == Some(segment));
        span.filter(|_| !self.standby).and_then(|span| span.end)
    }

    /// Returns whether a segment is all that the plan has of a timeline, as of one whose history alone was archived.
    pub fn is_bare(&self, segment: WalSegmentName) -> bool {
        self.span(segment.timeline()).is_some_and(|span| {
            span.history && span.first == segment && span.last == Some(segment) && span.end.is_none()
        })
    }

    /// Returns the span of a timeline.
    pub fn span(&self, timeline: TimelineId) -> Option<&TimelineSpan> {
        self.spans.iter().find(|span| span.timeline == timeline)
    }

    /// Lists the segments that recovery goes through, in its order; those of an open end are not known.
    pub fn segments(&self) -> impl Iterator<Item = WalSegmentName> {
        let size = self.cluster.segment_size;
        self.spans.iter().flat_map(move |span| {
            // A name that cannot be at this size stands for no segment.
            let ends = span.last.and_then(|last| span.first.number(size).ok().zip(last.number(size).ok()));
            let numbers = ends.into_iter().flat_map(|(first, last)| first.0..=last.0);
            numbers.map(move |number| WalSegmentName::new(span.timeline, WalSegmentNumber(number), size))
        })
    }

    /// Lists the segments that recovery goes through and that are served whole: what may be read ahead.
    pub fn whole_segments(&self) -> impl Iterator<Item = WalSegmentName> {
        self.segments().filter(|segment| self.ending_of(*segment).is_none())
    }

    /// Lists the whole segments that recovery will most likely ask for after this one; what it gets is not decided by it.
    ///
    /// A plan made from the archive holds timelines that recovery does not go through. One that begins behind the
    /// segment is taken to be the one that recovery turns to there, because the server prefers the newest; one that
    /// holds this number under another name has been passed over by the server.
    pub fn segments_behind(&self, segment: WalSegmentName) -> impl Iterator<Item = WalSegmentName> {
        let size = self.cluster.segment_size;
        let here = self.span(segment.timeline()).filter(|_| self.contains_segment(segment));
        // A name that cannot be at this size stands for no segment.
        let begin = here.and_then(|_| segment.number(size).ok());
        let candidates = begin.map_or_else(Vec::new, |begin| self.spans_behind(segment.timeline(), begin));
        let end = WalSegmentNumber::containing(Lsn(u64::MAX), size).0;
        let numbers = begin.into_iter().flat_map(move |begin| begin.0 + 1..=end);
        let behind = numbers.map_while(move |number| {
            // The newest of those that have begun; where it has ended the archive has.
            let (span, _, last) = candidates.iter().rev().find(|(_, first, _)| *first <= number)?;
            (number <= *last).then(|| WalSegmentName::new(span.timeline, WalSegmentNumber(number), size))
        });
        behind.filter(|segment| self.ending_of(*segment).is_none())
    }

    /// Returns the span of a timeline and those of later ones that begin behind a segment of it, with their ends.
    fn spans_behind(&self, timeline: TimelineId, begin: WalSegmentNumber) -> Vec<(TimelineSpan, u64, u64)> {
        let size = self.cluster.segment_size;
        let ends = self.spans.iter().filter_map(|span| {
            let first = span.first.number(size).ok()?.0;
            let last = span.last.map_or(Ok(u64::MAX), |last| last.number(size).map(|last| last.0)).ok()?;
            Some((*span, first, last))
        });
        let mut behind: Vec<_> = ends
            .filter(|(span, first, _)| {
                span.timeline == timeline || (span.timeline > timeline && *first > begin.0)
            })
            .collect();
        behind.sort_by_key(|(span, ..)| span.timeline);
        behind
    }

    /// Returns whether recovery may need the file of this name.
    pub fn contains(&self, name: ArchiveFileName) -> bool {
        match name {
            ArchiveFileName::Segment(segment) => self.contains_segment(segment),
            ArchiveFileName::History(timeline) => self.span(timeline).is_some_and(|span| span.history),
            // Recovery never asks for these; people do.
            ArchiveFileName::Partial(_) | ArchiveFileName::BackupHistory { .. } => false,
        }
    }

    fn contains_segment(&self, segment: WalSegmentName) -> bool {
        // A standby follows timelines that did not exist when its plan was made.
        if self.standby {
            return true;
        }
        self.span(segment.timeline())
            .is_some_and(|span| span.first <= segment && span.last.is_none_or(|last| segment <= last))
    }
}

/// Returns the span of a timeline whose history alone has come: who goes there needs the segment in which it began, and
/// must not be given its parent's, which may go on on another way. Where the parent has no more of it than its beginning
/// that is handed out up to the switch point, and the segment is not missed.
fn bare_span(
    timeline: TimelineId,
    tree: &TimelineTree,
    coverage: &WalCoverage,
    size: WalSegmentSize,
    standby: bool,
) -> Option<TimelineSpan> {
    let branch = tree.branch(timeline)?;
    let number = WalSegmentNumber::containing(branch.switch, size);
    let parent = coverage.timelines.get(&branch.parent);
    let is_begun = parent.is_some_and(|parent| {
        let name = WalSegmentName::new(branch.parent, number, size);
        !parent.contains(number) && (parent.partials.contains(&name) || parent.pieces.contains_key(&number))
    });
    let first = WalSegmentName::new(timeline, number, size);
    let last = (!standby).then_some(first);
    let is_needed = branch.switch > number.start_lsn(size) && !is_begun;
    is_needed.then_some(TimelineSpan { timeline, first, last, history: true, end: None })
}

/// Returns what there is of the segment behind the last whole one of a timeline.
///
/// Of a timeline that another one left in that segment it is cut at the switch point: a recovery comes here only where
/// the newer timeline has nothing of the segment.
fn ending_of(
    timeline: TimelineId,
    held: &TimelineCoverage,
    tree: &TimelineTree,
    coverage: &WalCoverage,
    size: WalSegmentSize,
) -> Option<Ending> {
    let last = held.pieces.last_key_value().map(|(number, _)| *number);
    let last = last.filter(|last| Some(*last) > held.last());
    let partial = || held.partials.iter().filter_map(|partial| partial.number(size).ok()).max();
    let number = last.or_else(|| held.last().map(WalSegmentNumber::next)).or_else(partial)?;
    let begin = tree.branch(timeline).map_or(Lsn::ZERO, |branch| branch.switch);
    let of_segment = |switch: &Lsn| WalSegmentNumber::containing(*switch, size) == number;
    let children = tree.timelines().filter_map(|child| tree.branch(child));
    let switches = children.filter(|branch| branch.parent == timeline).map(|branch| branch.switch);
    let end = switches.filter(of_segment).min();
    let proven = held.proven_end(size);
    let proven = end.map_or(proven, |end| proven.min(end));
    let ending = Ending::find(&[Stretch { timeline, begin, end }], coverage, number, size);
    // Where more was written than there is, recovery must not end.
    ending.filter(|ending| ending.end >= proven)
}

/// Decides what is answered to one name.
///
/// `valid_in_pg_wal` says that the server has the segment itself, with all that the plan goes by, in which case it is
/// told *absent* and reads its own copy.
pub fn answer(
    plan: &RecoveryPlan,
    name: ArchiveFileName,
    archive: InArchive,
    valid_in_pg_wal: bool,
) -> Answer {
    let is_segment = matches!(name, ArchiveFileName::Segment(_));
    match archive {
        // Behind the pinned end recovery has no business, even if the segment has come since.
        InArchive::Present if is_segment && !plan.contains(name) => Answer::Absent,
        InArchive::Present => Answer::Serve,
        InArchive::Absent if valid_in_pg_wal || plan.standby || !plan.contains(name) => Answer::Absent,
        InArchive::Absent => Answer::CannotTell,
        // The server asks for one segment past the target, which no failing store may turn into an error.
        InArchive::Unknown if is_segment && !plan.contains(name) => Answer::Absent,
        InArchive::Unknown => Answer::CannotTell,
    }
}

#[cfg(test)]
mod tests {
    use crate::catalog::wal_coverage::TimelineCoverage;
    use crate::repo::wal_object::HistoryBranch;

    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    fn plan() -> RecoveryPlan {
        RecoveryPlan {
            format: 1,
            cluster: "7301234567890123456-16".parse().unwrap(),
            basebackup: None,
            spans: vec![
                TimelineSpan {
                    timeline: timeline(1),
                    first: "000000010000000000000002".parse().unwrap(),
                    last: Some("000000010000000000000004".parse().unwrap()),
                    history: false,
                    end: None,
                },
                TimelineSpan {
                    timeline: timeline(2),
                    first: "000000020000000000000005".parse().unwrap(),
                    last: Some("000000020000000000000007".parse().unwrap()),
                    history: true,
                    end: None,
                },
            ],
            standby: false,
            forced: None,
            carried: None,
        }
    }

    fn ask(plan: &RecoveryPlan, name: &str, archive: InArchive) -> Answer {
        answer(plan, name.parse().unwrap(), archive, false)
    }

    #[test]
    fn segments_come_in_the_order_of_recovery_and_cross_to_the_next_timeline() {
        let plan = plan();
        let behind = |name: &str| {
            let behind = plan.segments_behind(name.parse().unwrap()).map(|segment| segment.to_string());
            behind.collect::<Vec<_>>()
        };
        assert_eq!(plan.segments().count(), 6);
        assert_eq!(
            behind("000000010000000000000003")[..2],
            ["000000010000000000000004", "000000020000000000000005"]
        );
        assert_eq!(behind("000000020000000000000006"), ["000000020000000000000007"]);
        assert!(behind("000000020000000000000007").is_empty());
        assert!(behind("000000010000000000000009").is_empty());
    }

    /// The plan that the first fetch makes holds every timeline from its beginning to its end.
    #[test]
    fn of_the_timelines_of_an_archive_recovery_is_expected_on_the_newest_that_it_has_not_passed_over() {
        let mut plan = plan();
        plan.spans[0].last = Some("000000010000000000000009".parse().unwrap());
        let sibling = TimelineSpan {
            timeline: timeline(3),
            first: "000000030000000000000006".parse().unwrap(),
            last: Some("000000030000000000000008".parse().unwrap()),
            history: true,
            end: None,
        };
        plan.spans.push(sibling);
        let behind = |name: &str| {
            let behind = plan.segments_behind(name.parse().unwrap()).map(|name| name.to_string());
            behind.map(|name| format!("{}/{}", &name[7..8], &name[22..])).collect::<Vec<_>>()
        };
        assert_eq!(behind("000000010000000000000003"), ["1/04", "2/05", "3/06", "3/07", "3/08"]);
        // 3 holds this number too, and the server has not asked for it.
        assert_eq!(behind("000000020000000000000006"), ["2/07"]);
        assert_eq!(behind("000000010000000000000007"), ["1/08", "1/09"]);
    }

    /// Failure 7: the successor of `…FF` is the next log's `…00`, with 16 MiB alone.
    #[test]
    fn the_successor_of_the_last_segment_of_a_log_depends_on_the_size() {
        for (mib, name, next) in [
            (16, "0000000100000002000000FF", "000000010000000300000000"),
            (1, "0000000100000002000000FF", "000000010000000200000100"),
            (1, "000000010000000200000FFF", "000000010000000300000000"),
            (1024, "000000010000000200000003", "000000010000000300000000"),
        ] {
            let cluster = format!("7301234567890123456-{mib}").parse().unwrap();
            let first = "000000010000000000000002".parse().unwrap();
            let span = TimelineSpan { timeline: timeline(1), first, last: None, history: false, end: None };
            let plan = RecoveryPlan { cluster, spans: vec![span], ..plan() };
            let behind = plan.segments_behind(name.parse().unwrap()).next();
            assert_eq!(behind.unwrap().to_string(), next, "{mib} MiB");
        }
    }

    /// Failure 1: a store error during recovery looked like the end of the archive.
    #[test]
    fn inside_the_plan_nothing_but_the_file_itself_is_an_answer() {
        for name in ["000000010000000000000003", "000000020000000000000007", "00000002.history"] {
            assert_eq!(ask(&plan(), name, InArchive::Present), Answer::Serve);
            assert_eq!(ask(&plan(), name, InArchive::Absent), Answer::CannotTell);
            assert_eq!(ask(&plan(), name, InArchive::Unknown), Answer::CannotTell);
        }
    }

    /// Failure 9, the other way round: the history has come, and no segment of its timeline yet.
    #[test]
    fn a_timeline_of_which_only_the_history_came_needs_the_segment_in_which_it_began() {
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let branch = |switch| HistoryBranch { parent: timeline(1), switch: Lsn(switch) };
        let mut held = TimelineCoverage::default();
        (3..9).for_each(|number| held.push(WalSegmentNumber(number)));
        let coverage = WalCoverage { timelines: [(timeline(1), held)].into() };
        let tree = TimelineTree::new([(timeline(2), branch(6 << 24 | 0x28)), (timeline(3), branch(7 << 24))]);
        let plan = RecoveryPlan::of_archive(cluster, &tree, &coverage, false);
        assert_eq!(ask(&plan, "000000020000000000000006", InArchive::Absent), Answer::CannotTell);
        assert_eq!(ask(&plan, "000000020000000000000007", InArchive::Absent), Answer::Absent);
        // Timeline 3 began with a segment, so that nothing of its parent is in there.
        assert_eq!(ask(&plan, "000000030000000000000007", InArchive::Absent), Answer::Absent);
        assert_eq!(ask(&plan, "000000010000000000000008", InArchive::Present), Answer::Serve);
    }

    #[test]
    fn outside_the_plan_the_archive_has_ended() {
        for name in ["000000020000000000000008", "000000010000000000000005", "000000030000000000000005"] {
            for archive in [InArchive::Present, InArchive::Absent, InArchive::Unknown] {
                assert_eq!(ask(&plan(), name, archive), Answer::Absent, "{name}");
            }
        }
    }

    /// Failure 9: a missing `.history` made recovery stop on the older timeline.
    #[test]
    fn a_history_file_is_absent_only_when_the_store_says_so() {
        assert_eq!(ask(&plan(), "00000001.history", InArchive::Absent), Answer::Absent);
        assert_eq!(ask(&plan(), "00000003.history", InArchive::Absent), Answer::Absent);
        // One that exists is shown: the server must not choose its number again.
        assert_eq!(ask(&plan(), "00000003.history", InArchive::Present), Answer::Serve);
        assert_eq!(ask(&plan(), "00000003.history", InArchive::Unknown), Answer::CannotTell);
    }

    /// Failure 1a: the same rule turned round shut a standby down on a healthy archive.
    #[test]
    fn a_standby_is_told_absent_and_waits() {
        let standby = RecoveryPlan { standby: true, ..plan() };
        assert_eq!(ask(&standby, "000000020000000000000008", InArchive::Absent), Answer::Absent);
        assert_eq!(ask(&standby, "000000020000000000000008", InArchive::Present), Answer::Serve);
        assert_eq!(ask(&standby, "000000030000000000000008", InArchive::Present), Answer::Serve);
        assert_eq!(ask(&standby, "000000020000000000000006", InArchive::Unknown), Answer::CannotTell);
    }

    /// Two timelines, the second of which left the first at 500 bytes into segment 5.
    fn tree() -> TimelineTree {
        let branch = HistoryBranch { parent: timeline(1), switch: Lsn((5 << 24) + 500) };
        TimelineTree::new([(timeline(2), branch)])
    }

    fn planned(tree: &TimelineTree, coverage: &WalCoverage) -> Vec<(String, String, Option<u64>)> {
        let cluster = plan().cluster;
        let plan = RecoveryPlan::of_archive(cluster, tree, coverage, false);
        let standby = RecoveryPlan::of_archive(cluster, tree, coverage, true);
        assert!(standby.spans.iter().all(|span| span.last.is_none() && span.end.is_none()));
        let text = |span: &TimelineSpan| {
            let last = span.last.unwrap();
            (span.first.to_string(), last.to_string(), span.end.map(|end| end.0 & 0xFF_FFFF))
        };
        plan.spans.iter().map(text).collect()
    }

    /// Whole segments 2 to 4 of timeline 1 and pieces of a later one, up to as many bytes.
    fn coverage(pieces: Option<(u64, u32)>) -> WalCoverage {
        let mut held = TimelineCoverage::default();
        (2..=4).for_each(|number| held.push(WalSegmentNumber(number)));
        if let Some((number, to)) = pieces {
            held.push_piece(WalSegmentNumber(number), 0, to, WalSegmentSize::DEFAULT);
        }
        WalCoverage { timelines: [(timeline(1), held)].into() }
    }

    #[test]
    fn a_plan_of_an_archive_ends_in_the_segment_that_is_there_in_part() {
        let (first, alone) = ("000000010000000000000002".to_owned(), TimelineTree::default());
        let whole = (first.clone(), "000000010000000000000004".to_owned(), None);
        let fifth = |end| (first.clone(), "000000010000000000000005".to_owned(), end);
        assert_eq!(planned(&alone, &coverage(None)), [whole]);
        assert_eq!(planned(&alone, &coverage(Some((5, 700)))), [fifth(Some(700))]);
        // Another timeline left it there, and has nothing of its own yet.
        assert_eq!(planned(&tree(), &coverage(Some((5, 700)))), [fifth(Some(500))]);
        assert_eq!(planned(&tree(), &coverage(Some((5, 300)))), [fifth(Some(300))]);
        // A piece behind a missing segment: recovery goes there, and does not end before it.
        let sixth = (first.clone(), "000000010000000000000006".to_owned(), Some(700));
        assert_eq!(planned(&alone, &coverage(Some((6, 700)))), [sixth]);
        let mut partial = coverage(None);
        let held = partial.timelines.get_mut(&timeline(1)).unwrap();
        held.partials.push("000000010000000000000005".parse().unwrap());
        assert_eq!(planned(&alone, &partial), [fifth(Some(0))], "the end of the segment");
        assert_eq!(planned(&tree(), &partial), [fifth(Some(500))]);
    }

    #[test]
    fn a_plan_of_an_archive_goes_as_far_as_anything_proves_that_wal_was_written() {
        let (first, alone) = ("000000010000000000000002".to_owned(), TimelineTree::default());
        let with_head = |pieces, head| {
            let mut coverage = coverage(pieces);
            coverage.timelines.get_mut(&timeline(1)).unwrap().head = Some(Lsn(head));
            planned(&alone, &coverage)
        };
        let to = |last: &str, end| [(first.clone(), format!("0000000100000000000000{last}"), end)];
        assert_eq!(with_head(None, 7 << 24), to("06", None));
        assert_eq!(with_head(Some((5, 700)), (5 << 24) + 700), to("05", Some(700)));
        // Of the last segment there was more: what is there of it is not its end.
        assert_eq!(with_head(Some((5, 700)), (5 << 24) + 701), to("05", None));
        let mut gap = coverage(Some((5, 700)));
        let held = gap.timelines.get_mut(&timeline(1)).unwrap();
        held.push_piece(WalSegmentNumber(5), 800, 900, WalSegmentSize::DEFAULT);
        assert_eq!(planned(&alone, &gap), to("05", None));
    }

    #[test]
    fn what_the_server_has_itself_it_may_read_itself() {
        let name = "000000020000000000000006".parse().unwrap();
        assert_eq!(answer(&plan(), name, InArchive::Absent, true), Answer::Absent);
        assert_eq!(answer(&plan(), name, InArchive::Unknown, true), Answer::CannotTell);
    }
}
