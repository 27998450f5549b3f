//! What is in the archive, by cluster and timeline: `walden wal list`.
//!
//! Read from names alone, a page of keys at a time, so that an archive of any length is counted in little memory
//! and without any key. Branch points come from the signed headers of the history files.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::{TimelineCoverage, TimelineTree, WalCoverage};
use crate::pg::{TimelineId, WalSegmentName};
use crate::repo::wal_object::HistoryBranch;
use crate::repo::{ClusterId, Error, Repository};

/// The archive of one cluster.
#[derive(Debug, Clone)]
pub struct ListedCluster {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its timelines, ascending.
    pub timelines: Vec<ListedTimeline>,
}

/// One timeline in the archive.
#[derive(Debug, Clone)]
pub struct ListedTimeline {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it branched off, if its history file is there.
    pub branch: Option<HistoryBranch>,
    /// Why that is not known of a history file that is there.
    pub history_error: Option<String>,
    /// Its segments, as runs without a hole.
    pub coverage: TimelineCoverage,
}

/// Lists the archives of all clusters of a site.
pub async fn list(repository: &Repository) -> Result<Vec<ListedCluster>, Error> {
    let mut clusters = Vec::new();
    for cluster in repository.clusters().await? {
        let (tree, damaged) = TimelineTree::load_readable(repository, cluster).await?;
        let mut damaged: BTreeMap<TimelineId, String> =
            damaged.into_iter().map(|(timeline, error)| (timeline, error.to_string())).collect();
        let mut coverage = WalCoverage::load(repository, cluster).await?.timelines;
        // A timeline may have a history file and no WAL yet.
        let timelines: BTreeSet<TimelineId> =
            coverage.keys().copied().chain(tree.timelines()).chain(damaged.keys().copied()).collect();
        let timelines = timelines.into_iter().map(|timeline| ListedTimeline {
            timeline,
            branch: tree.branch(timeline),
            history_error: damaged.remove(&timeline),
            coverage: coverage.remove(&timeline).unwrap_or_default(),
        });
        clusters.push(ListedCluster { cluster, timelines: timelines.collect() });
    }
    Ok(clusters)
}

impl ListedTimeline {
    /// Returns first and last segment of each run.
    pub fn runs(&self, cluster: ClusterId) -> Vec<(WalSegmentName, WalSegmentName)> {
        let name = |number| WalSegmentName::new(self.timeline, number, cluster.segment_size);
        self.coverage.runs().iter().map(|(first, last)| (name(*first), name(*last))).collect()
    }
}
