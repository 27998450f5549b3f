//! Which basebackup a recovery starts from and which WAL it goes through: decided before anything is written.
//!
//! What the repository holds is read here, listings and signed headers alone; what follows from it is decided by pure
//! functions. Clones and restores ask the same question and get the same answer.

use thiserror::Error;

use crate::catalog::basebackups::{self, BasebackupList, ListedBasebackup, ResolveError};
use crate::catalog::recovery_plan::{PlanError, RecoveryPlan, plan_recovery};
use crate::catalog::recovery_target::{RecoveryTarget, Target};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::WalCoverage;
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
}

impl RecoveryError {
    /// Returns what the user should do, where that is not plain from the message.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Basebackup(error) => error.hint(),
            Self::Plan(error) => Some(error.hint()),
            Self::NoneBefore(_) => Some("\"walden list\" shows when each basebackup ended."),
        }
    }
}

/// Decides what a recovery stands on, without writing anything.
pub async fn plan_for_target(
    repository: &Repository,
    request: RecoveryRequest<'_>,
) -> Result<PlannedRecovery, RecoveryError> {
    let RecoveryRequest { basebackup, target } = request;
    let list = basebackups::list(repository).await?;
    let record = choose(&list, basebackup, target)?.record.clone();
    let tree = TimelineTree::load(repository, record.cluster).await?;
    let timeline = target.timeline.unwrap_or_else(|| tree.latest_after(record.timeline, record.stop_lsn));
    let mut coverage = WalCoverage::default();
    let from = WalSegmentNumber::containing(record.start_lsn, record.cluster.segment_size);
    for stretch in tree.way_to(timeline).into_iter().filter(|stretch| stretch.timeline >= record.timeline) {
        let held = WalCoverage::load_timeline(repository, record.cluster, stretch.timeline, from).await?;
        coverage.timelines.insert(stretch.timeline, held);
    }
    let (plan, timeline) = plan_recovery(&record, &tree, &coverage, target)?;
    Ok(PlannedRecovery { record, plan, timeline })
}

/// Chooses the newest basebackup that ended before the target, or the one that is named.
fn choose<'a>(
    list: &'a BasebackupList,
    named: Option<&str>,
    target: &RecoveryTarget,
) -> Result<&'a ListedBasebackup, RecoveryError> {
    if let Some(name) = named {
        return Ok(list.resolve(name)?);
    }
    let ended_before = |record: &BackupRecord| match &target.target {
        Target::Time(time) => record.stopped_at < *time,
        Target::Lsn(lsn) => record.stop_lsn <= *lsn,
        _ => true,
    };
    if list.complete.is_empty() {
        return Ok(list.resolve("latest")?);
    }
    let chosen = list.complete.iter().rev().find(|listed| ended_before(&listed.record));
    // One that began behind the target would not have been chosen, whatever its record says.
    let began_before = |id: BasebackupId| match &target.target {
        Target::Time(time) => id.time() < *time,
        _ => true,
    };
    let newer = |id| chosen.is_none_or(|listed| id > listed.record.id);
    match list.unreadable_among(|id| newer(id) && began_before(id)) {
        Some(error) => Err(error.into()),
        None => chosen.ok_or_else(|| RecoveryError::NoneBefore(target.target.to_string())),
    }
}
