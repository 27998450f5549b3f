//! The timelines of a cluster, as the history files in the archive tell them.
//!
//! Read from signed plain headers, so no private key is needed. A timeline without a history file in the archive is
//! known by its WAL alone and is nobody's child. Ancestry is walked by switch points, never guessed from numbers.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use crate::pg::{Lsn, TimelineId};
use crate::repo::layout::ObjectName;
use crate::repo::wal_object::{HistoryBranch, read_history_branch};
use crate::repo::{ClusterId, Error, ErrorKind, Repository};

/// Which timeline branched off which, and where.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TimelineTree {
    branches: BTreeMap<TimelineId, HistoryBranch>,
}

/// A stretch of one timeline on the way to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where the way enters it.
    pub begin: Lsn,
    /// Where the way leaves it; none on the last timeline.
    pub end: Option<Lsn>,
}

/// Histories listed at a time; a cluster with this many promotions has one every hour for a month.
const HISTORIES_MAX: usize = 1000;
/// Histories read at a time.
const READS_MAX: usize = 16;

impl TimelineTree {
    /// Reads the branches of all history files of a cluster.
    pub async fn load(repository: &Repository, cluster: ClusterId) -> Result<Self, Error> {
        let (tree, mut damaged) = Self::load_readable(repository, cluster).await?;
        match damaged.pop() {
            Some((_, error)) => Err(error),
            None => Ok(tree),
        }
    }

    /// Reads the branches of all history files of a cluster, and says which are damaged or not trusted.
    ///
    /// For those who show what there is: a way that needs one of the damaged is not known, and must not be guessed.
    ///
    /// # Errors
    /// Where the store cannot tell.
    pub async fn load_readable(
        repository: &Repository,
        cluster: ClusterId,
    ) -> Result<(Self, Vec<(TimelineId, Error)>), Error> {
        let timelines = list_histories(repository, cluster).await?;
        let reads = timelines.into_iter().map(|timeline| async move {
            match read_history_branch(repository, cluster, timeline).await {
                Err(error) if error.kind() != ErrorKind::Damaged => Err(error),
                read => Ok((timeline, read)),
            }
        });
        let read: Vec<_> = futures::stream::iter(reads).buffered(READS_MAX).try_collect().await?;
        let (mut tree, mut damaged) = (Self::default(), Vec::new());
        for (timeline, branch) in read {
            match branch {
                Ok(branch) => {
                    tree.branches.insert(timeline, branch);
                }
                Err(error) => damaged.push((timeline, error)),
            }
        }
        Ok((tree, damaged))
    }

    /// Creates a tree from branches that are known otherwise.
    pub fn new(branches: impl IntoIterator<Item = (TimelineId, HistoryBranch)>) -> Self {
        Self { branches: branches.into_iter().collect() }
    }

    /// Returns where `timeline` branched off.
    pub fn branch(&self, timeline: TimelineId) -> Option<HistoryBranch> {
        self.branches.get(&timeline).copied()
    }

    /// Returns every timeline that has a history file.
    pub fn timelines(&self) -> impl Iterator<Item = TimelineId> {
        self.branches.keys().copied()
    }

    /// Returns the way to `timeline`, oldest stretch first.
    pub fn way_to(&self, timeline: TimelineId) -> Vec<Stretch> {
        let mut way = Vec::new();
        let (mut current, mut end) = (timeline, None);
        loop {
            let branch = self.branch(current);
            way.push(Stretch {
                timeline: current,
                begin: branch.map_or(Lsn::ZERO, |branch| branch.switch),
                end,
            });
            match branch {
                // A parent is always the lower number; anything else would never end.
                Some(branch) if branch.parent < current => {
                    (current, end) = (branch.parent, Some(branch.switch));
                }
                _ => break,
            }
        }
        way.reverse();
        way
    }

    /// Returns whether the way to `timeline` passes `lsn` on `ancestor`.
    pub fn passes(&self, timeline: TimelineId, ancestor: TimelineId, lsn: Lsn) -> bool {
        self.way_to(timeline)
            .iter()
            .any(|stretch| stretch.timeline == ancestor && stretch.end.is_none_or(|end| lsn <= end))
    }

    /// Returns the newest timeline whose way passes `lsn` on `timeline`: PostgreSQL's `latest`.
    pub fn latest_after(&self, timeline: TimelineId, lsn: Lsn) -> TimelineId {
        self.timelines()
            .filter(|newer| self.passes(*newer, timeline, lsn))
            .max()
            .map_or(timeline, |t| t.max(timeline))
    }
}

/// Lists the timelines that have a history file in the archive.
pub async fn list_histories(repository: &Repository, cluster: ClusterId) -> Result<Vec<TimelineId>, Error> {
    let prefix = repository.layout().histories(cluster);
    let (mut timelines, mut after) = (Vec::new(), None);
    loop {
        let page = repository.store().list(&prefix, after.as_ref(), HISTORIES_MAX).await?;
        let full = page.len() == HISTORIES_MAX;
        after = page.last().map(|object| object.key.clone());
        timelines.extend(page.iter().filter_map(|object| match repository.layout().parse(&object.key) {
            Some(ObjectName::History(_, timeline)) => Some(timeline),
            _ => None,
        }));
        if !full {
            return Ok(timelines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// 1 ─ 2 (at 100) ─ 4 (at 200), and 3 that left 1 at 50.
    fn tree() -> TimelineTree {
        let branch = |parent, switch| HistoryBranch { parent: timeline(parent), switch: Lsn(switch) };
        TimelineTree::new([
            (timeline(2), branch(1, 100)),
            (timeline(3), branch(1, 50)),
            (timeline(4), branch(2, 200)),
        ])
    }

    #[test]
    fn the_way_to_a_timeline_follows_switch_points() {
        let way = tree().way_to(timeline(4));
        let expected = [(1, 0, Some(100)), (2, 100, Some(200)), (4, 200, None)];
        let expected = expected.map(|(number, begin, end)| Stretch {
            timeline: timeline(number),
            begin: Lsn(begin),
            end: end.map(Lsn),
        });
        assert_eq!(way, expected);
    }

    #[test]
    fn latest_is_the_newest_descendant_and_not_the_highest_number() {
        let tree = tree();
        assert_eq!(tree.latest_after(timeline(1), Lsn(40)), timeline(4));
        // Behind the switch point of 3 only 2 and 4 are left; behind theirs nobody.
        assert!(!tree.passes(timeline(3), timeline(1), Lsn(60)));
        assert_eq!(tree.latest_after(timeline(1), Lsn(60)), timeline(4));
        assert_eq!(tree.latest_after(timeline(1), Lsn(101)), timeline(1));
        assert_eq!(tree.latest_after(timeline(3), Lsn(60)), timeline(3));
    }

    #[test]
    fn a_history_that_names_itself_does_not_hang_us() {
        let branch = HistoryBranch { parent: timeline(5), switch: Lsn(1) };
        assert_eq!(TimelineTree::new([(timeline(5), branch)]).way_to(timeline(5)).len(), 1);
    }
}
