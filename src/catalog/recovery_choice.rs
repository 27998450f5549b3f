//! Which basebackup a recovery starts from and which WAL it goes through: decided before anything is written.
//!
//! What the repository holds is read here, listings and signed headers alone; what follows from it is decided by pure
//! functions. Clones and restores ask the same question and get the same answer.

use std::ops::ControlFlow;

use jiff::Timestamp;
use thiserror::Error;

use crate::catalog::basebackups::{self, BasebackupList, ListedBasebackup, ResolveError};
use crate::catalog::recovery_decision::{
    Decision, PlanError, TargetPlace, place_by_position, plan_recovery, window_for,
};
use crate::catalog::recovery_plan::RecoveryPlan;
use crate::catalog::recovery_target::{RecoveryTarget, Target};
use crate::catalog::recovery_window::{Hole, RecoveryWindow};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::{WalCoverage, list_timelines};
use crate::catalog::wal_records::{
    LastTransaction, is_reached, last_transaction, segments_of, visit_records,
};
use crate::pg::{TimelineId, WalSegmentNumber};
use crate::repo::documents::BackupRecord;
use crate::repo::{self, BasebackupId, ClusterId, Repository};

/// What is to be recovered.
#[derive(Debug, Clone, Copy)]
pub struct RecoveryRequest<'a> {
    /// The basebackup, as a user names it; chosen by the target where none is named.
    pub basebackup: Option<&'a str>,
    /// Where recovery ends.
    pub target: &'a RecoveryTarget,
    /// Whether recovery shall end before a hole that the target lies behind.
    pub until_hole: bool,
}

/// What was decided.
#[derive(Debug)]
pub struct PlannedRecovery {
    /// The basebackup.
    pub record: BackupRecord,
    /// What recovery may ask for.
    pub plan: RecoveryPlan,
    /// The timeline it follows.
    pub timeline: TimelineId,
    /// Where it ends: as requested, or at the end of the plan where that lies before an accepted hole.
    pub target: RecoveryTarget,
    /// The hole before which it ends, which has to be said.
    pub accepted_hole: Option<Hole>,
    /// What could be recovered from the basebackup on this timeline.
    pub window: RecoveryWindow,
}

/// Why nothing can be recovered as requested.
#[derive(Debug, Error)]
pub enum RecoveryError {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// The basebackup that was named.
    #[error(transparent)]
    Basebackup(#[from] ResolveError),
    /// The target.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// No basebackup ends before the target.
    #[error("no basebackup ended before {0}")]
    NoneBefore(String),
    /// No basebackup that ends before the target leads to the timeline.
    #[error("no basebackup before {target} lies on the way to timeline {timeline}")]
    NoneOnTimeline { target: String, timeline: TimelineId },
}

impl RecoveryError {
    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Basebackup(error) => error.hint(),
            Self::Plan(error) => Some(error.hint()),
            Self::NoneBefore(_) => Some("\"walden list\" shows when each basebackup ended."),
            Self::NoneOnTimeline { .. } => {
                Some("\"walden info\" shows the timelines and what leads to them.")
            }
        }
    }
}

/// Segments at the end of a window among which a transaction is looked for. Recovery reads them all anyway; an idle server
/// that archives every minute fills four hours with so many.
const SEGMENTS_BACK_MAX: usize = 256;

/// Decides what a recovery stands on, without writing anything.
///
/// Reads WAL, which takes the private key, only to find out whether a target lies in the window: for a time the end of
/// the window, for a transaction or a restore point all of it, and that only where there is a hole behind it.
pub async fn plan_for_target(
    repository: &Repository,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    let list = basebackups::list(repository).await?;
    let (record, tree) = match request.basebackup {
        Some(name) => {
            let record = list.resolve(name)?.record.clone();
            let tree = TimelineTree::load(repository, record.cluster).await?;
            (record, tree)
        }
        None => choose(repository, &list, request.target).await?,
    };
    if request.target.timeline.is_none() && request.target.target != Target::Immediate {
        refuse_orphans(repository, &record, &tree).await?;
    }
    match plan_from(repository, &record, &tree, request).await {
        // A listing is no snapshot, and segments may come out of order: what is missing is looked for once more.
        Err(RecoveryError::Plan(PlanError::Hole { .. } | PlanError::Unrecoverable { .. })) => {
            plan_from(repository, &record, &tree, request).await
        }
        planned => planned,
    }
}

/// Refuses to say which timeline is the newest where there is WAL of one that nobody knows the place of: going by the
/// others would end recovery on an older timeline without a word (failure 9).
async fn refuse_orphans(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
) -> Result<(), RecoveryError> {
    let timelines = list_timelines(repository, record.cluster).await?;
    let is_orphan = |timeline: &TimelineId| *timeline > record.timeline && tree.branch(*timeline).is_none();
    match timelines.into_iter().find(is_orphan) {
        Some(timeline) => Err(PlanError::MissingHistory { timeline }.into()),
        None => Ok(()),
    }
}

/// Decides about recovery from one basebackup, by the WAL that is there now.
async fn plan_from(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    let target = request.target;
    let timeline = target.timeline.unwrap_or_else(|| tree.latest_after(record.timeline, record.stop_lsn));
    let from = WalSegmentNumber::containing(record.start_lsn, record.cluster.segment_size);
    let way = tree.way_to(timeline).into_iter();
    let way = way.filter(|stretch| stretch.end.is_none_or(|end| end >= record.start_lsn));
    let way = way.map(|stretch| stretch.timeline);
    let coverage = WalCoverage::load_timelines(repository, record.cluster, way, from).await?;
    let window = window_for(record, tree, &coverage, &target.target, timeline)?;
    let place = match place_by_position(&window, &target.target, record.cluster.segment_size) {
        Some(place) => place,
        None => place_by_reading(repository, record.cluster, &window, target).await?,
    };
    let Decision { plan, target, accepted_hole } =
        plan_recovery(record, tree, &window, target, place, request.until_hole)?;
    Ok(PlannedRecovery { record: record.clone(), plan, timeline, target, accepted_hole, window })
}

/// Finds out from the WAL of a window whether a target lies in it.
async fn place_by_reading(
    repository: &Repository,
    cluster: ClusterId,
    window: &RecoveryWindow,
    target: &RecoveryTarget,
) -> Result<TargetPlace, repo::Error> {
    if let Target::Time(time) = target.target {
        let last = last_transaction(repository, cluster, window, SEGMENTS_BACK_MAX).await?;
        return Ok(place_of_time(last, time, target.inclusive));
    }
    let mut segments = segments_of(window.stretches(), cluster.segment_size);
    let mut start = window.start.start_lsn;
    if let (Target::Lsn(_), Some(ending)) = (&target.target, window.ending) {
        // By its position it lies in the last segment, if that goes so far.
        segments.retain(|part| part.name == ending.segment);
        start = ending.segment.start_lsn(cluster.segment_size).map_or(start, |begin| start.max(begin));
    }
    let mut place = TargetPlace::Behind(None);
    let visit = |lsn, payload| {
        if is_reached(&target.target, lsn, &payload) {
            place = TargetPlace::Within;
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    };
    visit_records(repository, cluster, segments, start, visit).await?;
    Ok(place)
}

/// The server stops at a time only where it sees a transaction that ended later, or then where the target is
/// exclusive; where it sees none it ends FATAL (failure 26).
fn place_of_time(last: LastTransaction, time: Timestamp, inclusive: bool) -> TargetPlace {
    match last {
        LastTransaction::EndedAt(ended) if ended > time || (ended == time && !inclusive) => {
            TargetPlace::Within
        }
        LastTransaction::EndedAt(ended) => TargetPlace::Behind(Some(ended)),
        LastTransaction::None => TargetPlace::Behind(None),
        LastTransaction::NotNear => TargetPlace::Unproven,
    }
}

/// Chooses the newest basebackup that ended before the target and leads to its timeline.
async fn choose(
    repository: &Repository,
    list: &BasebackupList,
    target: &RecoveryTarget,
) -> Result<(BackupRecord, TimelineTree), RecoveryError> {
    let before = |listed: &&ListedBasebackup| ended_before(&listed.record, &target.target);
    let none_before = || RecoveryError::NoneBefore(target.target.to_string());
    let newest = match target.target {
        Target::Time(_) => list.complete.iter().rfind(before),
        _ => Some(list.resolve("latest")?),
    };
    let Some(newest) = newest else {
        unreadable_newer(list, None, &target.target)?;
        return Err(if list.complete.is_empty() { ResolveError::NoBasebackup.into() } else { none_before() });
    };
    // Positions and timelines of another cluster of the site mean nothing in this one.
    let cluster = newest.record.cluster;
    let tree = TimelineTree::load(repository, cluster).await?;
    let leads_there = |record: &BackupRecord| match target.timeline {
        Some(timeline) => tree.passes(timeline, record.timeline, record.stop_lsn),
        None => true,
    };
    let fits = |listed: &&ListedBasebackup| {
        listed.record.cluster == cluster && before(listed) && leads_there(&listed.record)
    };
    let chosen = list.complete.iter().rfind(fits).map(|listed| listed.record.clone());
    unreadable_newer(list, chosen.as_ref().map(|record| record.id), &target.target)?;
    match (chosen, target.timeline) {
        (Some(record), _) => Ok((record, tree)),
        (None, Some(timeline)) => {
            Err(RecoveryError::NoneOnTimeline { target: target.target.to_string(), timeline })
        }
        (None, None) => Err(none_before()),
    }
}

fn ended_before(record: &BackupRecord, target: &Target) -> bool {
    match target {
        Target::Time(time) => record.stopped_at < *time,
        Target::Lsn(lsn) => record.stop_lsn <= *lsn,
        _ => true,
    }
}

/// Refuses to pass over a basebackup that cannot be read and might be the one that is meant.
fn unreadable_newer(
    list: &BasebackupList,
    chosen: Option<BasebackupId>,
    target: &Target,
) -> Result<(), ResolveError> {
    // One that began behind the target would not have been chosen, whatever its record says.
    let began_before = |id: BasebackupId| match target {
        Target::Time(time) => id.time() < *time,
        _ => true,
    };
    let newer = |id| chosen.is_none_or(|chosen| id > chosen);
    match list.unreadable_among(|id| newer(id) && began_before(id)) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
