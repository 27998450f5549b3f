//! What is in the archive, by cluster and timeline: `walden wal list`.
//!
//! Read from names alone, a page of keys at a time, so that an archive of any length is counted in little memory
//! and without any key. Branch points come from the signed headers of the history files.

use jiff::Timestamp;

use crate::catalog::{TimelineCoverage, TimelineTree, list_clusters};
use crate::pg::{TimelineId, WalSegmentName};
use crate::repo::layout::{ObjectName, WalObjectName};
use crate::repo::wal_object::HistoryBranch;
use crate::repo::{ClusterId, Error, Repository};
use crate::storage::ObjectMeta;

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
    /// Its segments, as runs without a hole.
    pub coverage: TimelineCoverage,
    /// How many segments there are.
    pub segments: u64,
    /// Bytes of all its objects as stored.
    pub stored_bytes: u64,
    /// When the newest segment came.
    pub newest_at: Option<Timestamp>,
}

/// Keys asked for at a time.
const PAGE: usize = 1000;

/// Lists the archives of all clusters of a site.
pub async fn list(repository: &Repository) -> Result<Vec<ListedCluster>, Error> {
    let mut clusters = Vec::new();
    for cluster in list_clusters(repository).await? {
        let tree = TimelineTree::load(repository, cluster).await?;
        clusters
            .push(ListedCluster { cluster, timelines: list_timelines(repository, cluster, &tree).await? });
    }
    Ok(clusters)
}

async fn list_timelines(
    repository: &Repository,
    cluster: ClusterId,
    tree: &TimelineTree,
) -> Result<Vec<ListedTimeline>, Error> {
    let layout = repository.layout();
    let mut timelines: Vec<ListedTimeline> = Vec::new();
    let mut after = None;
    loop {
        // Keys ascend by timeline, log and segment, so that each timeline is one stretch of the listing.
        let page = repository.store().list(&layout.wal(cluster), after.as_ref(), PAGE).await?;
        for object in &page {
            let Some(ObjectName::Wal(_, name)) = layout.parse(&object.key) else { continue };
            let timeline = name.segment().timeline();
            if timelines.last().is_none_or(|last| last.timeline != timeline) {
                timelines.push(ListedTimeline::new(timeline, tree));
            }
            if let Some(last) = timelines.last_mut() {
                last.take(name, object, cluster);
            }
        }
        if page.len() < PAGE {
            break;
        }
        after = page.last().map(|object| object.key.clone());
    }
    // A timeline may have a history file and no WAL yet.
    for timeline in tree.timelines() {
        if timelines.iter().all(|listed| listed.timeline != timeline) {
            timelines.push(ListedTimeline::new(timeline, tree));
        }
    }
    timelines.sort_by_key(|listed| listed.timeline);
    Ok(timelines)
}

impl ListedTimeline {
    fn new(timeline: TimelineId, tree: &TimelineTree) -> Self {
        Self {
            timeline,
            branch: tree.branch(timeline),
            coverage: TimelineCoverage::default(),
            segments: 0,
            stored_bytes: 0,
            newest_at: None,
        }
    }

    /// Returns first and last segment of each run.
    pub fn runs(&self, cluster: ClusterId) -> Vec<(WalSegmentName, WalSegmentName)> {
        let name = |number| WalSegmentName::new(self.timeline, number, cluster.segment_size);
        self.coverage.runs().iter().map(|(first, last)| (name(*first), name(*last))).collect()
    }

    fn take(&mut self, name: WalObjectName, object: &ObjectMeta, cluster: ClusterId) {
        self.stored_bytes += object.size;
        match name {
            WalObjectName::Segment(segment) => {
                let Ok(number) = segment.number(cluster.segment_size) else { return };
                self.coverage.push(number);
                self.segments += 1;
                self.newest_at = self.newest_at.max(Some(object.last_modified));
            }
            WalObjectName::Partial { segment, .. } => self.coverage.partials.push(segment),
            WalObjectName::BackupHistory { .. } => {}
        }
    }
}
