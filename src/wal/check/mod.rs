//! Whether the archive has all WAL that a recovery from any basebackup may ask for: `walden wal check`.
//!
//! names → what is missing (`continuity`, pure) → the objects that are there (`objects`) → findings for each cluster;
//! `repair` then archives again what the server still has. Nothing takes a private key.
//! *Missing* and *damaged* are findings; a store that cannot tell is an error, so that silence is never a good answer.

mod continuity;
mod objects;
mod pieces;
pub mod repair;
#[cfg(test)]
mod tests;
mod written;

use std::collections::BTreeMap;

use crate::catalog::recoverable::recoverability_of;
use crate::catalog::{Recoverability, RecoveryStart, TimelineTree, WalCoverage, basebackups};
use crate::pg::TimelineId;
use crate::repo::{BasebackupId, ClusterId, Error, Repository};

pub use continuity::{Continuity, Names};
pub use objects::{DamagedFile, Depth, Examined, SupersededFile};

/// What was found in a site.
#[derive(Debug)]
pub struct Findings {
    /// By cluster.
    pub clusters: Vec<ClusterFindings>,
    /// Basebackups whose record is damaged or not trusted: nobody knows what WAL they need.
    pub unreadable: Vec<(BasebackupId, String)>,
}

/// What was found in the archive of one cluster.
#[derive(Debug)]
pub struct ClusterFindings {
    /// The cluster.
    pub cluster: ClusterId,
    /// What the names tell.
    pub continuity: Continuity,
    /// History files that are damaged or not trusted.
    pub damaged_histories: Vec<(TimelineId, String)>,
    /// The objects.
    pub examined: Examined,
}

impl Findings {
    /// Returns whether nothing is missing or damaged.
    pub fn is_good(&self) -> bool {
        self.unreadable.is_empty() && self.clusters.iter().all(ClusterFindings::is_good)
    }

    /// Counts the objects that are damaged or not trusted.
    pub fn damaged(&self) -> usize {
        let of_cluster =
            |found: &ClusterFindings| found.damaged_histories.len() + found.examined.damaged.len();
        self.unreadable.len() + self.clusters.iter().map(of_cluster).sum::<usize>()
    }
}

impl ClusterFindings {
    /// Returns whether nothing is missing or damaged.
    pub fn is_good(&self) -> bool {
        self.continuity.is_whole() && self.damaged_histories.is_empty() && self.examined.damaged.is_empty()
    }
}

/// Checks the archives of all clusters of a site.
///
/// # Errors
/// Where the store cannot tell.
pub async fn check(repository: &Repository, depth: Depth) -> Result<Findings, Error> {
    let list = basebackups::list(repository).await?;
    let mut starts: BTreeMap<ClusterId, Vec<(BasebackupId, RecoveryStart)>> = BTreeMap::new();
    let mut unrecoverable = Vec::new();
    for listed in &list.complete {
        let of_cluster = starts.entry(listed.record.cluster).or_default();
        if listed.record.wal.is_none() {
            of_cluster.push((listed.record.id, RecoveryStart::from(&listed.record)));
            continue;
        }
        // It carries its WAL: of the archive it needs a history at most, and what is not there behind it is no hole.
        match recoverability_of(repository, listed).await? {
            Recoverability::Recoverable => {}
            reason => unrecoverable.push((listed.record.cluster, listed.record.id, reason)),
        }
    }
    for cluster in repository.clusters().await? {
        starts.entry(cluster).or_default();
    }
    let mut clusters = Vec::new();
    for (cluster, basebackups) in starts {
        let mut findings = check_cluster(repository, cluster, &basebackups, depth).await?;
        let own =
            unrecoverable.iter().filter(|(of, ..)| *of == cluster).map(|(_, id, reason)| (*id, *reason));
        findings.continuity.unrecoverable.extend(own);
        clusters.push(findings);
    }
    let unreadable = list.unreadable.into_iter().map(|(id, error)| (id, error.to_string()));
    Ok(Findings { clusters, unreadable: unreadable.collect() })
}

async fn check_cluster(
    repository: &Repository,
    cluster: ClusterId,
    basebackups: &[(BasebackupId, RecoveryStart)],
    depth: Depth,
) -> Result<ClusterFindings, Error> {
    let (tree, damaged) = TimelineTree::load_readable(repository, cluster).await?;
    let coverage = WalCoverage::load(repository, cluster).await?;
    let damaged_histories: Vec<_> =
        damaged.into_iter().map(|(timeline, error)| (timeline, error.to_string())).collect();
    let damaged: Vec<TimelineId> = damaged_histories.iter().map(|(timeline, _)| *timeline).collect();
    let continuity = Continuity::of(Names {
        size: cluster.segment_size,
        tree: &tree,
        damaged_histories: &damaged,
        coverage: &coverage,
        basebackups,
    });
    let examined = objects::examine(repository, cluster, &coverage, continuity.oldest, depth).await?;
    Ok(ClusterFindings { cluster, continuity, damaged_histories, examined })
}
