//! Which of some basebackups can be recovered: what counts as a backup, and what only looks like one (failure 21b).
//!
//! Normally one page of a listing for each basebackup, [`READS_MAX`] of them at a time, however long the archive: the
//! segments from start to stop on its own timeline. Only where one is missing is all of the cluster's WAL looked at,
//! because another timeline may begin with a copy of it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};

use crate::catalog::basebackups::ListedBasebackup;
use crate::catalog::carried::with_carried;
use crate::catalog::recovery_window::{
    Recoverability, RecoveryStart, RecoveryWindow, recoverability, windows,
};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::WalCoverage;
use crate::pg::WalSegmentNumber;
use crate::repo::documents::BackupRecord;
use crate::repo::{ClusterId, Error, Repository};

/// Basebackups whose WAL is looked for at a time.
const READS_MAX: usize = 16;

/// Decides for each basebackup whether it can be recovered.
///
/// # Errors
/// Where the store cannot tell.
pub async fn recoverabilities(
    repository: &Repository,
    basebackups: &[ListedBasebackup],
) -> Result<Vec<Recoverability>, Error> {
    let clusters: BTreeSet<ClusterId> = basebackups.iter().map(|listed| listed.record.cluster).collect();
    let mut trees = BTreeMap::new();
    for cluster in clusters {
        // A damaged history is as good as none for those that need it, and no matter to the others.
        trees.insert(cluster, TimelineTree::load_readable(repository, cluster).await?.0);
    }
    let looks = basebackups.iter().map(|listed| by_own_timeline(repository, &listed.record, &trees));
    let mut found: Vec<Recoverability> =
        futures::stream::iter(looks).buffered(READS_MAX).try_collect().await?;
    let mut coverages: BTreeMap<ClusterId, WalCoverage> = BTreeMap::new();
    for (listed, found) in basebackups.iter().zip(&mut found) {
        let record = &listed.record;
        if !matches!(found, Recoverability::MissingWal(_)) {
            continue;
        }
        let coverage = match coverages.entry(record.cluster) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(WalCoverage::load(repository, record.cluster).await?),
        };
        let (start, tree) = (RecoveryStart::from(record), &trees[&record.cluster]);
        let reachable = with_carried(repository, coverage, record);
        let windows = windows(start, tree, &reachable, record.cluster.segment_size);
        *found = recoverability(start, tree, &windows);
    }
    Ok(found)
}

/// Decides whether one basebackup can be recovered.
///
/// # Errors
/// Where the store cannot tell.
pub async fn recoverability_of(
    repository: &Repository,
    listed: &ListedBasebackup,
) -> Result<Recoverability, Error> {
    let found = recoverabilities(repository, std::slice::from_ref(listed)).await?;
    found.first().copied().ok_or_else(|| Error::Internal("a basebackup was not looked at".to_owned()))
}

async fn by_own_timeline(
    repository: &Repository,
    record: &BackupRecord,
    trees: &BTreeMap<ClusterId, TimelineTree>,
) -> Result<Recoverability, Error> {
    let (start, tree) = (RecoveryStart::from(record), &trees[&record.cluster]);
    let (cluster, timeline, size) = (record.cluster, record.timeline, record.cluster.segment_size);
    let first = WalSegmentNumber::containing(record.start_lsn, size);
    let last = WalSegmentNumber::ending_at(record.stop_lsn, size);
    let held = WalCoverage::load_segments(repository, cluster, timeline, first..=last).await?;
    let coverage = WalCoverage { timelines: BTreeMap::from([(timeline, held)]) };
    let reachable = with_carried(repository, &coverage, record);
    let window = RecoveryWindow::new(start, tree, &reachable, timeline, size);
    Ok(recoverability(start, tree, window.as_slice()))
}
