//! Whether a recovery can reach its target, and the plan if so: pure, from a window and the target's place.
//!
//! Refused is what PostgreSQL would refuse only after hours of replay, and what it would not refuse at all: a target
//! behind a hole, where it would end early and promote. Where a target cannot be proven cheaply and nothing speaks
//! against it, the server decides, and it ends FATAL rather than early.

use std::fmt;

use jiff::Timestamp;

use crate::catalog::recovery_plan::{RecoveryPlan, TimelineSpan};
use crate::catalog::recovery_target::{RecoveryTarget, Target, TargetAction};
use crate::catalog::recovery_window::{Hole, RecoveryWindow, SegmentRange};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::WalCoverage;
use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::BasebackupId;
use crate::repo::documents::BackupRecord;

/// Where a target lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetPlace {
    /// In the window.
    Within,
    /// Not in the window; with the time at which the last transaction there ended, if that was looked for.
    Behind(Option<Timestamp>),
    /// On the way, but before the basebackup is consistent; for a time with that at which the last transaction before that
    /// ended, by PostgreSQL's own record.
    TooEarly(Option<Timestamp>),
    /// Perhaps in the window: only replay would tell.
    Unproven,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// What recovery may ask for.
    pub plan: RecoveryPlan,
    /// Where it ends: the target that was asked for, or the end of the plan where that lies before an accepted hole.
    pub target: RecoveryTarget,
    /// The hole before which it ends, because the user wants that.
    pub accepted_hole: Option<Hole>,
}

/// WAL of a timeline that the way to another one leaves behind: what was written there since is not recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftBehind {
    /// The timeline, and the one that leaves it.
    pub timelines: (TimelineId, TimelineId),
    /// Where they part.
    pub switch: Lsn,
    /// Its newest segment.
    pub newest: WalSegmentName,
    /// When the last of its segments came, by the store's clock.
    pub newest_at: Option<Timestamp>,
}

/// What a basebackup can be recovered to, for messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The basebackup.
    pub basebackup: BasebackupId,
    /// Where the basebackup is consistent, and since when.
    pub begin: (Lsn, Timestamp),
    /// The position behind the WAL without a gap.
    pub end: Lsn,
    /// When the last transaction before it ended, if that is known.
    pub newest: Option<Timestamp>,
    /// The timeline that is aimed at.
    pub timeline: TimelineId,
    /// The first segment missing of those without which nothing of this can be reached.
    pub missing_start: Option<WalSegmentName>,
}

/// Why no plan can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The target lies before the basebackup is consistent.
    #[error("{target} is before the end of basebackup {}: {reach}", .reach.basebackup)]
    BeforeBackup { target: String, reach: Reach },
    /// The target timeline does not descend from the basebackup; with what its own way reaches.
    #[error("timeline {timeline} does not contain basebackup {}, which ended on timeline {from}: {reach}", .reach.basebackup)]
    OtherTimeline { timeline: TimelineId, from: TimelineId, reach: Reach },
    /// The history file of the target timeline, or of one that might be it, is not in the archive; no server goes there
    /// without. The reach is that of the newest timeline whose place is known, or what the missing file would open.
    #[error(
        "the history file of timeline {timeline} is missing from the archive: {}{reach}",
        if .reach.timeline == *.timeline { "with it, " } else { "" }
    )]
    MissingHistory { timeline: TimelineId, reach: Reach },
    /// WAL is missing without which the basebackup never becomes consistent: nothing can be reached.
    #[error(
        "basebackup {basebackup} cannot be recovered to any target on timeline {timeline}: WAL segment {missing} is \
         missing from the archive"
    )]
    Unrecoverable { basebackup: BasebackupId, timeline: TimelineId, missing: WalSegmentName },
    /// WAL is missing on the way to the target.
    #[error("{hole} missing from the archive on the way to {target}: {reach}")]
    Hole { hole: Hole, target: String, reach: Reach },
    /// The WAL was read, and the target is not in it.
    #[error("{target} is not in the archived WAL: {reach}")]
    NotFound { target: String, reach: Reach },
    /// The archive ends before the target.
    #[error("the archive ends before {target}: {reach}")]
    BeyondArchive { target: String, reach: Reach },
    /// No WAL is known behind the end of the basebackup, by which PostgreSQL would see that it has come there.
    #[error(
        "PostgreSQL cannot stop at the end of basebackup {} to {action}: it would notice at the next record of the WAL, and \
         there is none",
        .reach.basebackup
    )]
    NothingBehind { action: TargetAction, reach: Reach },
}

impl PlanError {
    /// Returns what the user should do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::BeforeBackup { .. } => "Choose an older basebackup, or a later target.",
            Self::OtherTimeline { .. } => "Choose a basebackup that the target timeline descends from.",
            Self::MissingHistory { .. } => {
                "Push it again from pg_wal of a server that is on the timeline, or name another one with \
                 --target-timeline."
            }
            Self::Unrecoverable { .. } => {
                "Push the segment again if a server still has it, or name another basebackup."
            }
            Self::Hole { .. } => {
                "Push what is missing again if a server still has it (one that was just promoted archives the first \
                 segment of its timeline after pg_switch_wal()), choose an earlier target or another timeline with \
                 --target-timeline, or end recovery there with --until-hole."
            }
            Self::NotFound { .. } => {
                "Check the name and the timeline: another one is followed with --target-timeline; \"walden info\" shows \
                 them."
            }
            Self::BeyondArchive { .. } => "Choose an earlier target, or wait until more WAL is archived.",
            Self::NothingBehind { .. } => "End recovery there with --target-action promote.",
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { basebackup, begin, end, newest, timeline, missing_start } = *self;
        if let Some(missing) = missing_start {
            return PlanError::Unrecoverable { basebackup, timeline, missing }.fmt(f);
        }
        write!(f, "recovery from basebackup {basebackup} on timeline {timeline} can end from {}", begin.0)?;
        write!(f, " ({}) to {end}", begin.1)?;
        match newest {
            Some(newest) => write!(f, ", the last transaction there ended at {newest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for LeftBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { timelines: (left, followed), switch, newest, newest_at } = self;
        write!(
            f,
            "recovery follows timeline {followed}, which left timeline {left} at {switch}; what timeline {left} "
        )?;
        write!(f, "wrote after that, up to {newest}")?;
        if let Some(newest_at) = newest_at {
            write!(f, " (archived at {newest_at})")?;
        }
        write!(f, ", is not recovered: --target-timeline {left} follows that one")
    }
}

impl Reach {
    /// Says what a window holds, with the time of the last transaction where that was looked for.
    pub fn new(record: &BackupRecord, window: &RecoveryWindow, newest: Option<Timestamp>) -> Self {
        Self {
            basebackup: record.id,
            begin: (record.stop_lsn, record.stopped_at),
            end: window.end,
            newest,
            timeline: window.timeline,
            missing_start: window.missing_start,
        }
    }

    /// Says how far the newest timeline that a basebackup leads to is reached.
    pub fn of_newest(record: &BackupRecord, tree: &TimelineTree, coverage: &WalCoverage) -> Self {
        let newest = tree.latest_after(record.timeline, record.stop_lsn);
        let window = RecoveryWindow::new(record.into(), tree, coverage, newest, record.cluster.segment_size);
        Self::new(record, &window.expect("the newest timeline after a basebackup passes it"), None)
    }
}

/// Returns how far recovery to a target gets, whose timeline is numeric by now; refuses what lies outside whatever
/// the archive has. The coverage is that of the way to the timeline, or to the newest where this one does not pass.
pub fn window_for(
    record: &BackupRecord,
    tree: &TimelineTree,
    coverage: &WalCoverage,
    target: &Target,
    timeline: TimelineId,
) -> Result<RecoveryWindow, PlanError> {
    let size = record.cluster.segment_size;
    let Some(window) = RecoveryWindow::new(record.into(), tree, coverage, timeline, size) else {
        let reach = Reach::of_newest(record, tree, coverage);
        return Err(PlanError::OtherTimeline { timeline, from: record.timeline, reach });
    };
    let reach = Reach::new(record, &window, None);
    let is_before = match target {
        Target::Lsn(lsn) => *lsn < record.stop_lsn,
        Target::Time(time) => *time < record.stopped_at,
        _ => false,
    };
    if is_before {
        return Err(PlanError::BeforeBackup { target: target.to_string(), reach });
    }
    if timeline > TimelineId::FIRST && tree.branch(timeline).is_none() {
        return Err(PlanError::MissingHistory { timeline, reach });
    }
    match window.missing_start {
        Some(missing) => Err(PlanError::Unrecoverable { basebackup: record.id, timeline, missing }),
        None => Ok(window),
    }
}

/// Returns where a target lies, where that follows from positions; nothing where the WAL has to be read.
pub fn place_by_position(
    window: &RecoveryWindow,
    target: &Target,
    size: WalSegmentSize,
) -> Option<TargetPlace> {
    let is_whole = window.holes.is_empty();
    match target {
        Target::Immediate => Some(TargetPlace::Within),
        Target::Latest if is_whole => Some(TargetPlace::Within),
        Target::Latest => Some(TargetPlace::Behind(None)),
        // The server stops at the first record that begins at the target or behind it.
        Target::Lsn(lsn) if *lsn >= window.end => Some(TargetPlace::Behind(None)),
        Target::Lsn(lsn) => {
            let ending = window.ending.and_then(|ending| ending.segment.start_lsn(size).ok());
            ending.is_none_or(|begin| *lsn < begin).then_some(TargetPlace::Within)
        }
        Target::Xid(_) | Target::Name(_) | Target::Time(_) => None,
    }
}

/// Lists what the way to a timeline leaves behind, where nobody has named the timeline and the target may lie there.
pub fn left_behind(
    tree: &TimelineTree,
    coverage: &WalCoverage,
    window: &RecoveryWindow,
    target: &RecoveryTarget,
    size: WalSegmentSize,
) -> Vec<LeftBehind> {
    if target.timeline.is_some() || target.target == Target::Immediate {
        return Vec::new();
    }
    let way = tree.way_to(window.timeline);
    let parted = way.windows(2).filter_map(|pair| {
        let (left, switch, followed) = (pair[0].timeline, pair[0].end?, pair[1].timeline);
        let held = coverage.timelines.get(&left)?;
        let newest = held.last().filter(|last| *last > WalSegmentNumber::containing(switch, size))?;
        let is_common =
            matches!(target.target, Target::Lsn(lsn) if lsn <= switch) || switch < window.start.stop_lsn;
        (!is_common).then_some(LeftBehind {
            timelines: (left, followed),
            switch,
            newest: WalSegmentName::new(left, newest, size),
            newest_at: held.newest_at,
        })
    });
    parted.collect()
}

/// Plans recovery from a basebackup through its window.
///
/// With `until_hole` a target behind a hole becomes the end of the WAL before it.
pub fn plan_recovery(
    record: &BackupRecord,
    tree: &TimelineTree,
    window: &RecoveryWindow,
    target: &RecoveryTarget,
    place: TargetPlace,
    until_hole: bool,
) -> Result<Decision, PlanError> {
    let newest = match place {
        TargetPlace::Behind(newest) => newest,
        TargetPlace::Within | TargetPlace::TooEarly(_) | TargetPlace::Unproven => None,
    };
    let shown = || (target.target.to_string(), Reach::new(record, window, newest));
    let mut decision = Decision {
        plan: plan_through(record, tree, window, &window.reached),
        target: target.clone(),
        accepted_hole: None,
    };
    match (place, window.holes.first()) {
        (TargetPlace::Within, _) if target.target == Target::Immediate => {
            // Recovery ends at the stop position and needs nothing behind it.
            decision.plan = plan_through(record, tree, window, &up_to(record, &window.reached));
            // The server stops before the record behind; without one, as a standby's own WAL may have none, it ends FATAL, for the
            // target was not reached. The end of that WAL is the same place.
            if window.end <= record.stop_lsn {
                if target.action != TargetAction::Promote {
                    let (action, reach) = (target.action, shown().1);
                    return Err(PlanError::NothingBehind { action, reach });
                }
                decision.target.target = Target::Latest;
            }
        }
        (TargetPlace::Within, _) | (TargetPlace::Unproven, None) => {}
        (TargetPlace::TooEarly(ended), _) => {
            let (target, mut reach) = shown();
            reach.begin.1 = ended.map_or(reach.begin.1, |ended| ended.max(reach.begin.1));
            return Err(PlanError::BeforeBackup { target, reach });
        }
        (_, Some(hole)) if until_hole => {
            decision.target.target = Target::Latest;
            decision.accepted_hole = Some(hole.clone());
        }
        (_, Some(hole)) => {
            let (target, reach) = shown();
            return Err(PlanError::Hole { hole: hole.clone(), target, reach });
        }
        (TargetPlace::Behind(_), None) => {
            let (target, reach) = shown();
            if matches!(decision.target.target, Target::Xid(_) | Target::Name(_)) {
                return Err(PlanError::NotFound { target, reach });
            }
            return Err(PlanError::BeyondArchive { target, reach });
        }
    }
    Ok(decision)
}

/// Returns the ranges up to the segment that holds the last byte before the stop position.
fn up_to(record: &BackupRecord, reached: &[SegmentRange]) -> Vec<SegmentRange> {
    let size = record.cluster.segment_size;
    let last = WalSegmentNumber::ending_at(record.stop_lsn, size);
    let mut ranges = Vec::new();
    for range in reached {
        let name = WalSegmentName::new(range.timeline(), last, size);
        if range.first > name {
            break;
        }
        ranges.push(SegmentRange { last: range.last.min(name), ..*range });
    }
    ranges
}

fn plan_through(
    record: &BackupRecord,
    tree: &TimelineTree,
    window: &RecoveryWindow,
    ranges: &[SegmentRange],
) -> RecoveryPlan {
    let spans = ranges.iter().map(|range| TimelineSpan {
        timeline: range.timeline(),
        first: range.first,
        last: Some(range.last),
        history: tree.branch(range.timeline()).is_some(),
        end: window.end_of(range),
    });
    RecoveryPlan {
        format: 1,
        cluster: record.cluster,
        basebackup: Some(record.id),
        spans: spans.collect(),
        standby: false,
        forced: None,
        carried: record.wal.clone(),
    }
}
