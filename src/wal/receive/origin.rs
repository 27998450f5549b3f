//! How a server came to its timeline, where it does not tell that itself.
//!
//! A copy of a server that was made without WAL (`pg_basebackup -X none`) has no history file of the timeline it is on, and
//! needs none. Where it left the timelines before is told by the file that the spool has, or by the archive: the branch
//! points stand in the headers of the histories there, which takes no private key, and a receiver has none.

use std::collections::VecDeque;
use std::time::Duration;

use crate::pg::{HistoryError, TimelineHistory, TimelineId, TimelineSwitch};
use crate::repo::wal_object::read_history_branch;
use crate::repo::{self, ClusterId, Repository};
use crate::wal::receive::state::Shared;

/// Small reads, one for each timeline. A store that is away must not keep us from the other servers.
const ARCHIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads a history file.
pub(super) fn parse_history(timeline: TimelineId, content: &[u8]) -> Result<TimelineHistory, HistoryError> {
    TimelineHistory::parse(timeline, &String::from_utf8_lossy(content))
}

/// Returns the history of a timeline by what is spooled and archived; nothing where it is not known there.
pub(super) async fn known_history(
    shared: &Shared,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Option<TimelineHistory> {
    let spooled = shared.spool.history(timeline);
    if let Some(history) = spooled.and_then(|content| parse_history(timeline, &content).ok()) {
        return Some(history);
    }
    let repository = shared.repository.borrow().clone()?;
    let archived = archived_history(&repository, cluster, timeline);
    match tokio::time::timeout(ARCHIVE_TIMEOUT, archived).await {
        Ok(Ok(history)) => Some(history),
        Ok(Err(error)) => {
            tracing::debug!("the archive does not tell of timeline {timeline}: {error}");
            None
        }
        Err(_) => {
            tracing::debug!("the archive does not answer about timeline {timeline}");
            None
        }
    }
}

/// Follows the branch points from a timeline back to the first.
async fn archived_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<TimelineHistory, repo::Error> {
    let (mut switches, mut child) = (VecDeque::new(), timeline);
    while child != TimelineId::FIRST {
        let branch = read_history_branch(repository, cluster, child).await?;
        if branch.parent >= child {
            let detail = format!("timeline {} is its parent", branch.parent);
            return Err(repo::Error::damaged(format!("history of timeline {child}"), detail));
        }
        let (timeline, lsn) = (branch.parent, branch.switch);
        switches.push_front(TimelineSwitch { timeline, lsn, reason: String::new() });
        child = branch.parent;
    }
    Ok(TimelineHistory { timeline, switches: switches.into() })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::clock::SystemClock;
    use crate::pg::Lsn;
    use crate::repo::testing;
    use crate::repo::wal_object::{HistoryBranch, WalKey, archive_history};
    use crate::storage::MemoryStore;

    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[tokio::test]
    async fn the_branch_points_in_the_archive_tell_the_way_to_a_timeline_unless_one_is_missing() {
        let repository = testing::site(Arc::new(MemoryStore::new()), SystemClock).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let put = async |timeline, content: &str| {
            let history = parse_history(tli(timeline), content.as_bytes()).unwrap();
            let branch = HistoryBranch::of(&history);
            let raw = content.as_bytes();
            archive_history(&repository, cluster, tli(timeline), branch, raw, &key).await.unwrap();
        };
        put(5, "1\t0/5000100\tx\n3\t0/8000000\ty\n").await;
        archived_history(&repository, cluster, tli(5)).await.unwrap_err();
        put(3, "1\t0/5000100\tx\n").await;
        let history = archived_history(&repository, cluster, tli(5)).await.unwrap();
        let told: Vec<_> = history.switches.iter().map(|switch| (switch.timeline, switch.lsn)).collect();
        assert_eq!(told, [(tli(1), Lsn(0x500_0100)), (tli(3), Lsn(0x800_0000))]);
        assert_eq!(history.timeline, tli(5));
    }
}
