//! Which basebackup a recovery starts from and which WAL it goes through: decided before anything is written.
//!
//! What the repository holds is read here, listings and signed headers alone where that tells; what follows from it is
//! decided by pure functions. Where only the WAL tells whether a target lies behind a basebackup, the newest is asked
//! first and the older ones after it. Clones and restores ask the same question and get the same answer.

use thiserror::Error;

use crate::catalog::basebackups::{self, BasebackupList, ListedBasebackup, ResolveError};
use crate::catalog::carried::with_carried;
use crate::catalog::recovery_decision::{
    Decision, LeftBehind, PlanError, Reach, TargetPlace, left_behind, place_by_position, plan_recovery,
    window_for,
};
use crate::catalog::recovery_plan::RecoveryPlan;
use crate::catalog::recovery_target::{RecoveryTarget, Target};
use crate::catalog::recovery_window::{Hole, RecoveryWindow};
use crate::catalog::target_search::{SEGMENTS_FORWARD_MAX, Searched, place_by_reading};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::{WalCoverage, list_timelines};
use crate::pg::{TimelineId, WalSegmentNumber};
use crate::repo::documents::BackupRecord;
use crate::repo::{self, BasebackupId, Repository};

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
    /// What the way leaves behind, which has to be said.
    pub left_behind: Vec<LeftBehind>,
    /// Whether the WAL of the plan was too much to be sure that the target is in it.
    pub unproven: bool,
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
    /// No basebackup ends before the target; with what the oldest reaches.
    #[error("no basebackup ended before {target}, not even the oldest: {oldest}")]
    NoneBefore { target: String, oldest: Reach },
    /// No basebackup that ends before the target leads to the timeline; with what the newest reaches.
    #[error(
        "no basebackup before {target} lies on the way to timeline {timeline}, not even the newest: {newest}"
    )]
    NoneOnTimeline { target: String, timeline: TimelineId, newest: Reach },
}

impl PlannedRecovery {
    /// Says what its user should know before anything is written.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(hole) = &self.accepted_hole {
            let end = self.window.end;
            warnings.push(format!("recovery ends at {end}, before a hole: {hole} missing from the archive"));
        }
        warnings.extend(self.left_behind.iter().map(ToString::to_string));
        if self.unproven {
            warnings.push(format!(
                "{} was not found in the first {SEGMENTS_FORWARD_MAX} segments, and no more were read; where it is not \
                 in the others either, the server ends recovery with FATAL",
                self.target.target
            ));
        }
        warnings
    }
}

impl RecoveryError {
    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Basebackup(error) => error.hint(),
            Self::Plan(error) => Some(error.hint()),
            Self::NoneBefore { .. } => Some("\"walden list\" shows when each basebackup ended."),
            Self::NoneOnTimeline { .. } => {
                Some("\"walden info\" shows the timelines and what leads to them.")
            }
        }
    }
}

/// Decides what a recovery stands on, without writing anything.
///
/// Reads WAL, which takes the private key, only to find out whether a target lies in the window: for a time the end of
/// the window, for a transaction or a restore point as much of it as [`SEGMENTS_FORWARD_MAX`] says.
pub async fn plan_for_target(
    repository: &Repository,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    let list = basebackups::list(repository).await?;
    let is_found_by_reading = matches!(request.target.target, Target::Xid(_) | Target::Name(_));
    let (records, tree) = match request.basebackup {
        Some(name) => {
            let record = list.resolve(name)?.record.clone();
            let tree = TimelineTree::load(repository, record.cluster).await?;
            (vec![record], tree)
        }
        None => candidates(repository, &list, request.target).await?,
    };
    if is_found_by_reading && records.len() > 1 {
        return plan_from_any(repository, &records, &tree, request).await;
    }
    plan_from_newest(repository, &records, &tree, request).await
}

/// Plans from the newest basebackup; where the WAL says that the target lies before its end after all, from the one
/// before it.
async fn plan_from_newest(
    repository: &Repository,
    records: &[BackupRecord],
    tree: &TimelineTree,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    let (oldest, newer) = records.split_last().expect("there is one, or none was an error");
    for record in newer {
        match plan_anew(repository, record, tree, request, None).await {
            Err(RecoveryError::Plan(PlanError::BeforeBackup { .. })) => {}
            planned => return planned,
        }
    }
    plan_anew(repository, oldest, tree, request, None).await
}

/// Plans from the newest basebackup behind whose end the target is found.
async fn plan_from_any(
    repository: &Repository,
    records: &[BackupRecord],
    tree: &TimelineTree,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    // A hole is accepted only where no basebackup has the target before it.
    let strict = RecoveryRequest { until_hole: false, ..request };
    let (mut first_failure, mut searched) = (None, None);
    for record in records {
        match plan_anew(repository, record, tree, strict, searched).await {
            Err(RecoveryError::Plan(error)) => {
                if let PlanError::NotFound { reach, .. } = &error {
                    searched = Some(Searched { timeline: reach.timeline, from: record.start_lsn });
                }
                // Of several that were read in vain the oldest tells the most.
                let replaces = match (&first_failure, &error) {
                    (None, _) => true,
                    (Some(PlanError::NotFound { .. } | PlanError::BeforeBackup { .. }), _) => true,
                    (Some(_), _) => false,
                };
                if replaces {
                    first_failure = Some(error);
                }
            }
            planned => return planned,
        }
    }
    match first_failure {
        Some(PlanError::Hole { .. }) if request.until_hole => {
            plan_anew(repository, &records[0], tree, request, None).await
        }
        Some(error) => Err(error.into()),
        None => Err(ResolveError::NoBasebackup.into()),
    }
}

/// Decides about recovery from one basebackup; looks twice before it says that WAL is missing.
async fn plan_anew(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
    request: RecoveryRequest<'_>,
    searched: Option<Searched>,
) -> Result<PlannedRecovery, RecoveryError> {
    if request.target.timeline.is_none() && request.target.target != Target::Immediate {
        refuse_orphans(repository, record, tree).await?;
    }
    match plan_from(repository, record, tree, request, searched).await {
        // A listing is no snapshot, and segments may come out of order: what is missing is looked for once more.
        Err(RecoveryError::Plan(PlanError::Hole { .. } | PlanError::Unrecoverable { .. })) => {
            plan_from(repository, record, tree, request, searched).await
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
        Some(timeline) => {
            let reach = reach_of(repository, record, tree).await?;
            Err(PlanError::MissingHistory { timeline, reach }.into())
        }
        None => Ok(()),
    }
}

/// Decides about recovery from one basebackup, by the WAL that is there now.
async fn plan_from(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
    request: RecoveryRequest<'_>,
    searched: Option<Searched>,
) -> Result<PlannedRecovery, RecoveryError> {
    let target = request.target;
    let timeline = target.timeline.unwrap_or_else(|| tree.latest_after(record.timeline, record.stop_lsn));
    let coverage = load_way(repository, record, tree, timeline).await?;
    let window = window_for(record, tree, &coverage, &target.target, timeline)?;
    let place = match place_by_position(&window, &target.target, record.cluster.segment_size) {
        Some(place) => place,
        None => place_by_reading(repository, record.cluster, &window, target, searched).await?,
    };
    let left_behind = left_behind(tree, &coverage, &window, target, record.cluster.segment_size);
    let Decision { plan, target, accepted_hole } =
        plan_recovery(record, tree, &window, target, place, request.until_hole)?;
    let plan = plan.with_forced(&coverage);
    let unproven = place == TargetPlace::Unproven && accepted_hole.is_none();
    let record = record.clone();
    Ok(PlannedRecovery { record, plan, timeline, target, accepted_hole, window, left_behind, unproven })
}

/// Lists the WAL from a basebackup on that is on the way to a timeline, with what the basebackup carries itself; on the
/// way to the newest that the basebackup leads to, where this one does not pass it.
async fn load_way(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
    timeline: TimelineId,
) -> Result<WalCoverage, repo::Error> {
    let passes = tree.passes(timeline, record.timeline, record.stop_lsn);
    let newest = || tree.latest_after(record.timeline, record.stop_lsn);
    let timeline = if passes { timeline } else { newest() };
    let from = WalSegmentNumber::containing(record.start_lsn, record.cluster.segment_size);
    let way = tree.way_to(timeline).into_iter();
    let way = way.filter(|stretch| stretch.end.is_none_or(|end| end >= record.start_lsn));
    let way = way.map(|stretch| stretch.timeline);
    let coverage = WalCoverage::load_timelines(repository, record.cluster, way, from).await?;
    Ok(with_carried(repository, &coverage, record).into_owned())
}

/// Finds out how far recovery from a basebackup gets, for a refusal that no window was made for.
async fn reach_of(
    repository: &Repository,
    record: &BackupRecord,
    tree: &TimelineTree,
) -> Result<Reach, repo::Error> {
    let newest = tree.latest_after(record.timeline, record.stop_lsn);
    let coverage = load_way(repository, record, tree, newest).await?;
    Ok(Reach::of_newest(record, tree, &coverage))
}

/// Lists the basebackups that ended before the target, as far as their records tell, and lead to its timeline: newest
/// first, at least one, all of the newest cluster.
async fn candidates(
    repository: &Repository,
    list: &BasebackupList,
    target: &RecoveryTarget,
) -> Result<(Vec<BackupRecord>, TimelineTree), RecoveryError> {
    let before = |listed: &&ListedBasebackup| ended_before(&listed.record, &target.target);
    let newest = match target.target {
        Target::Time(_) => list.complete.iter().rfind(before),
        _ => Some(list.resolve("latest")?),
    };
    let Some(newest) = newest else {
        unreadable_newer(list, None, &target.target)?;
        let Some(oldest) = list.complete.first() else { return Err(ResolveError::NoBasebackup.into()) };
        // Nothing will be recovered, so that a damaged history may be passed over.
        let (tree, _) = TimelineTree::load_readable(repository, oldest.record.cluster).await?;
        return Err(none_before(repository, target, &oldest.record, &tree).await?);
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
    let chosen = list.complete.iter().rev().filter(fits).map(|listed| listed.record.clone());
    let chosen: Vec<BackupRecord> = chosen.collect();
    unreadable_newer(list, chosen.first().map(|record| record.id), &target.target)?;
    match (chosen.is_empty(), target.timeline) {
        (false, _) => Ok((chosen, tree)),
        (true, Some(timeline)) => {
            let newest = reach_of(repository, &newest.record, &tree).await?;
            Err(RecoveryError::NoneOnTimeline { target: target.target.to_string(), timeline, newest })
        }
        (true, None) => {
            let oldest = list.complete.iter().find(|listed| listed.record.cluster == cluster);
            let oldest = oldest.map_or(&newest.record, |listed| &listed.record);
            Err(none_before(repository, target, oldest, &tree).await?)
        }
    }
}

async fn none_before(
    repository: &Repository,
    target: &RecoveryTarget,
    oldest: &BackupRecord,
    tree: &TimelineTree,
) -> Result<RecoveryError, repo::Error> {
    let oldest = reach_of(repository, oldest, tree).await?;
    Ok(RecoveryError::NoneBefore { target: target.target.to_string(), oldest })
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
