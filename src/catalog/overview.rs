//! All there is of a site, cluster by cluster, and what can be recovered from it: the facts behind `walden info`.
//!
//! A listing for each timeline, a few small reads for each basebackup and history file, [`READS_MAX`] at a time; no
//! request for a segment but the last of each window. What is damaged is told beside the rest and hides nothing; only
//! a store that cannot tell fails the whole. WAL is read, for the time of the last transaction, where a key is at hand.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;

use crate::catalog::basebackups::{self, ListedBasebackup};
use crate::catalog::carried::with_carried;
use crate::catalog::recovery_window::{
    Recoverability, RecoveryStart, RecoveryWindow, recoverability, windows,
};
use crate::catalog::timeline_tree::TimelineTree;
use crate::catalog::wal_coverage::WalCoverage;
use crate::catalog::wal_records::{LastTransaction, last_transaction};
use crate::pg::{Lsn, TimelineId, WalSegmentName};
use crate::repo::layout::WalObjectName;
use crate::repo::{BasebackupId, ClusterId, Error, ErrorKind, PackId, Refs, Repository, read_refs};

/// A site.
#[derive(Debug)]
pub struct SiteOverview {
    /// Its clusters, those with the newest basebackups last.
    pub clusters: Vec<ClusterOverview>,
    /// Basebackups whose record is damaged or not trusted; nobody knows of which cluster.
    pub unreadable: Vec<(BasebackupId, Error)>,
    /// Attempts that have no outcome: running, or killed.
    pub unfinished: Vec<BasebackupId>,
}

/// A cluster of a site.
#[derive(Debug)]
pub struct ClusterOverview {
    /// The cluster.
    pub cluster: ClusterId,
    /// Which timeline branched off which.
    pub tree: TimelineTree,
    /// History files that are damaged or not trusted.
    pub damaged_histories: Vec<(TimelineId, Error)>,
    /// Its WAL.
    pub coverage: WalCoverage,
    /// Its basebackups, oldest first.
    pub basebackups: Vec<BasebackupOverview>,
    /// What can be recovered, by the timeline that recovery follows.
    pub windows: BTreeMap<TimelineId, Vec<TimelineWindow>>,
}

/// A basebackup and what it is worth.
#[derive(Debug)]
pub struct BasebackupOverview {
    /// What is known of it without any key.
    pub listed: ListedBasebackup,
    /// Whether its WAL is there.
    pub recoverability: Recoverability,
    /// The packs it names, or why that is not known.
    pub refs: Result<Refs, Error>,
}

/// Basebackups that lead to the same end, by WAL that has no gap from the oldest of them on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineWindow {
    /// The basebackups, oldest first.
    pub basebackups: Vec<BasebackupId>,
    /// Where the oldest is consistent, and since when.
    pub begin: (Lsn, Timestamp),
    /// How far recovery gets from there.
    pub window: RecoveryWindow,
    /// When that was.
    pub end: WindowEnd,
}

/// What is known of the time at the end of a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowEnd {
    /// When the last transaction ended, or why that is not known; nothing where none ended.
    pub last_transaction: Result<Option<Timestamp>, String>,
    /// When the last segment was archived, by the store's clock: no transaction in it is later.
    pub archived_at: Option<Timestamp>,
}

/// The stored bytes of the basebackups of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBytes {
    /// Of all packs that a basebackup names, each counted once, and of manifests and lists of packs.
    pub stored: u64,
    /// Of those parts of packs that the newest basebackup names.
    pub live: u64,
}

/// Small objects that are read at a time.
const READS_MAX: usize = 16;
/// Ends of windows at which WAL is read at a time; each takes a few segments of memory.
const ENDS_MAX: usize = 2;

/// Segments at the end of a window among which a transaction is looked for: a load without one can be of any length.
const SEGMENTS_BACK_MAX: usize = 16;

/// Looks at a whole site.
///
/// # Errors
/// Where the store cannot tell.
pub async fn load(repository: &Repository) -> Result<SiteOverview, Error> {
    let list = basebackups::list(repository).await?;
    let mut of_cluster: BTreeMap<ClusterId, Vec<ListedBasebackup>> = BTreeMap::new();
    for cluster in repository.clusters().await? {
        of_cluster.entry(cluster).or_default();
    }
    for listed in list.complete {
        of_cluster.entry(listed.record.cluster).or_default().push(listed);
    }
    let mut clusters = Vec::new();
    for (cluster, basebackups) in of_cluster {
        clusters.push(load_cluster(repository, cluster, basebackups).await?);
    }
    let newest = |overview: &ClusterOverview| overview.basebackups.last().map(|b| b.listed.record.id);
    clusters.sort_by_key(newest);
    Ok(SiteOverview { clusters, unreadable: list.unreadable, unfinished: list.unfinished })
}

async fn load_cluster(
    repository: &Repository,
    cluster: ClusterId,
    listed: Vec<ListedBasebackup>,
) -> Result<ClusterOverview, Error> {
    let (tree, damaged_histories) = TimelineTree::load_readable(repository, cluster).await?;
    let coverage = WalCoverage::load(repository, cluster).await?;
    let refs: Vec<_> = futures::stream::iter(listed.iter().map(|listed| async move {
        match read_refs(repository, &listed.record).await {
            Err(error) if error.kind() != ErrorKind::Damaged => Err(error),
            refs => Ok(refs),
        }
    }))
    .buffered(READS_MAX)
    .try_collect()
    .await?;
    let (mut basebackups, mut found) = (Vec::new(), BTreeMap::new());
    for (listed, refs) in listed.into_iter().zip(refs) {
        let start = RecoveryStart::from(&listed.record);
        let reachable = with_carried(repository, &coverage, &listed.record);
        let windows = windows(start, &tree, &reachable, cluster.segment_size);
        let recoverability = recoverability(start, &tree, &windows);
        let begin = (listed.record.id, listed.record.stop_lsn, listed.record.stopped_at);
        if recoverability == Recoverability::Recoverable {
            windows.into_iter().for_each(|window| add_window(&mut found, begin, window));
        }
        basebackups.push(BasebackupOverview { listed, recoverability, refs });
    }
    let windows = time_windows(repository, cluster, &coverage, found).await?;
    Ok(ClusterOverview { cluster, tree, damaged_histories, coverage, basebackups, windows })
}

/// A window whose end has no time yet.
struct Untimed {
    basebackups: Vec<BasebackupId>,
    begin: (Lsn, Timestamp),
    window: RecoveryWindow,
}

/// Adds what one basebackup reaches to what others do.
fn add_window(
    found: &mut BTreeMap<TimelineId, Vec<Untimed>>,
    (basebackup, lsn, time): (BasebackupId, Lsn, Timestamp),
    window: RecoveryWindow,
) {
    // A timeline that only has a name yet is as far as its parent is; one that a hole cuts off is told.
    let tells = window.reaches_timeline() || !window.holes.is_empty();
    if !window.is_recoverable() || !tells {
        return;
    }
    let of_timeline = found.entry(window.timeline).or_default();
    match of_timeline.iter_mut().find(|known| known.window.end == window.end) {
        Some(known) => {
            known.basebackups.push(basebackup);
            if lsn < known.begin.0 {
                (known.begin, known.window) = ((lsn, time), window);
            }
        }
        None => of_timeline.push(Untimed { basebackups: vec![basebackup], begin: (lsn, time), window }),
    }
}

/// The last segment of a window and the position behind it, by which windows that end alike are known.
type End = (WalSegmentName, Lsn);

fn end_of_window(window: &RecoveryWindow) -> Option<End> {
    Some((window.last_segment()?, window.end))
}

/// Finds the times of the ends, each of which is asked for once.
async fn time_windows(
    repository: &Repository,
    cluster: ClusterId,
    coverage: &WalCoverage,
    found: BTreeMap<TimelineId, Vec<Untimed>>,
) -> Result<BTreeMap<TimelineId, Vec<TimelineWindow>>, Error> {
    let mut ends: BTreeMap<End, &RecoveryWindow> = BTreeMap::new();
    for untimed in found.values().flatten() {
        let Some(last) = end_of_window(&untimed.window) else { continue };
        // The longest of those that end there is looked through.
        let longest = ends.entry(last).or_insert(&untimed.window);
        if untimed.window.start.start_lsn < longest.start.start_lsn {
            *longest = &untimed.window;
        }
    }
    let reads = ends.into_iter().map(|(last, window)| async move {
        Ok::<_, Error>((last, end_of(repository, cluster, coverage, window).await?))
    });
    let ends: BTreeMap<End, WindowEnd> =
        futures::stream::iter(reads).buffered(ENDS_MAX).try_collect().await?;
    let mut timed: BTreeMap<TimelineId, Vec<TimelineWindow>> = BTreeMap::new();
    for (timeline, windows) in found {
        for Untimed { mut basebackups, begin, window } in windows {
            let Some(end) = end_of_window(&window).and_then(|last| ends.get(&last)).cloned() else {
                continue;
            };
            basebackups.sort_unstable();
            timed.entry(timeline).or_default().push(TimelineWindow { basebackups, begin, window, end });
        }
    }
    timed.values_mut().for_each(|windows| windows.sort_by_key(|window| window.window.end));
    Ok(timed)
}

/// Finds out when the last segment was archived; of one that is there in part, when the newest part was.
async fn archived_at(
    repository: &Repository,
    cluster: ClusterId,
    coverage: &WalCoverage,
    window: &RecoveryWindow,
) -> Result<Option<Timestamp>, Error> {
    let Some(last) = window.last_segment() else { return Ok(None) };
    if window.ending.is_some() {
        return Ok(coverage.timelines.get(&last.timeline()).and_then(|held| held.newest_at));
    }
    let key = repository.layout().wal_object(cluster, WalObjectName::Segment(last));
    match repository.store().head(&key).await {
        Ok(meta) => Ok(Some(meta.last_modified)),
        // Expired between the listing and now.
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn end_of(
    repository: &Repository,
    cluster: ClusterId,
    coverage: &WalCoverage,
    window: &RecoveryWindow,
) -> Result<WindowEnd, Error> {
    let archived_at = archived_at(repository, cluster, coverage, window).await?;
    if !repository.keyring().can_read() {
        let last_transaction = Err("there is no private key here".to_owned());
        return Ok(WindowEnd { last_transaction, archived_at });
    }
    let last_transaction = match last_transaction(repository, cluster, window, SEGMENTS_BACK_MAX).await {
        Ok(LastTransaction::EndedAt(time)) => Ok(Some(time)),
        Ok(LastTransaction::None) => Ok(None),
        Ok(LastTransaction::NotNear) => Err(format!("none ended in the last {SEGMENTS_BACK_MAX} segments")),
        Err(error) if error.kind() == ErrorKind::Retry => return Err(error),
        Err(error) => Err(error.to_string()),
    };
    Ok(WindowEnd { last_transaction, archived_at })
}

impl ClusterOverview {
    /// Returns every timeline that anything is known of.
    pub fn timelines(&self) -> BTreeSet<TimelineId> {
        let damaged = self.damaged_histories.iter().map(|(timeline, _)| *timeline);
        let of_basebackups = self.basebackups.iter().map(|basebackup| basebackup.listed.record.timeline);
        let held = self.coverage.timelines.keys().copied();
        held.chain(self.tree.timelines()).chain(damaged).chain(of_basebackups).collect()
    }

    /// Counts what its basebackups take; nothing where one of them does not say which packs it names.
    pub fn stored_bytes(&self) -> Option<StoredBytes> {
        let mut packs: BTreeMap<PackId, u64> = BTreeMap::new();
        let (mut indexes, mut live) = (0, 0);
        for basebackup in &self.basebackups {
            let (refs, record) = (basebackup.refs.as_ref().ok()?, &basebackup.listed.record);
            indexes += record.manifest.size + record.refs.size;
            packs.extend(refs.records().iter().map(|pack| (pack.id, u64::from(pack.size))));
            // The newest comes last.
            live = refs.records().iter().map(|pack| u64::from(pack.live)).sum();
        }
        Some(StoredBytes { stored: packs.values().sum::<u64>() + indexes, live })
    }
}
