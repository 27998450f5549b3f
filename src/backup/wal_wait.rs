//! The WAL a basebackup needs: without all of it, the basebackup never becomes consistent.
//!
//! Parallel pushes may deliver the last segment first, so every segment from start to stop is looked for (failure
//! 21b), until a deadline: an archive that does not work is found now and not at the restore. History files that
//! the archive may lack are put there from `pg_wal`. What the archive has is asked through [`WalArchive`].

use std::time::Duration;

use async_trait::async_trait;

use crate::backup::error::Error;
use crate::backup::live_directory::read_histories;
use crate::catalog::WalCoverage;
use crate::clock::Clock;
use crate::pg::{TimelineId, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::{
    self, ClusterId, Repository,
    wal_object::{HistoryBranch, WalKey, archive_history, read_history_branch},
};

/// Segments that must be in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeededWal {
    /// The timeline of start and stop.
    pub timeline: TimelineId,
    /// The segment that holds START WAL LOCATION.
    pub first: WalSegmentNumber,
    /// The segment that holds the last byte before the stop LSN.
    pub last: WalSegmentNumber,
    /// Their size.
    pub size: WalSegmentSize,
}

/// Tells which WAL has been archived.
#[async_trait]
pub trait WalArchive: Send + Sync {
    /// Returns the first of the needed segments that is not in the archive.
    async fn first_missing(&self, needed: &NeededWal) -> Result<Option<WalSegmentNumber>, repo::Error>;
}

/// The archive of a cluster in a repository.
#[derive(Debug, Clone)]
pub struct RepositoryArchive {
    /// The repository.
    pub repository: Repository,
    /// The cluster.
    pub cluster: ClusterId,
}

#[async_trait]
impl WalArchive for RepositoryArchive {
    async fn first_missing(&self, needed: &NeededWal) -> Result<Option<WalSegmentNumber>, repo::Error> {
        let NeededWal { timeline, first, last, .. } = *needed;
        let coverage = WalCoverage::load_timeline(&self.repository, self.cluster, timeline, first).await?;
        Ok(coverage.first_missing(first, last))
    }
}

/// Between two looks at the archive, growing from the first to the last.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Waits until the archive has all that is needed.
///
/// # Errors
/// `WalMissing`, naming the first missing segment, where it has not after `patience`.
pub async fn wait_for_wal(
    archive: &dyn WalArchive,
    needed: &NeededWal,
    clock: &dyn Clock,
    patience: Duration,
) -> Result<(), Error> {
    let began = clock.monotonic();
    let mut pause = POLL.0;
    let mut told = false;
    loop {
        let Some(missing) = archive.first_missing(needed).await? else {
            return Ok(());
        };
        let segment = WalSegmentName::new(needed.timeline, missing, needed.size);
        let left = patience.saturating_sub(clock.monotonic().duration_since(began));
        if left.is_zero() {
            return Err(Error::WalMissing { segment, waited: patience });
        }
        if pause == POLL.1 && !told {
            tracing::info!("waiting for WAL segment {segment} to be archived");
            told = true;
        }
        tokio::time::sleep(pause.min(left)).await;
        pause = (pause * 2).min(POLL.1);
    }
}

/// Puts the history files of `pg_wal` into the archive, and checks that `timeline` has one there.
///
/// # Errors
/// `Different` where another server archived another history for a timeline of this one's past.
pub async fn archive_histories(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    data_directory: &std::path::Path,
) -> Result<(), Error> {
    let directory = data_directory.to_owned();
    let histories = tokio::task::spawn_blocking(move || read_histories(&directory))
        .await
        .map_err(|error| repo::Error::Internal(error.to_string()))??;
    if !histories.is_empty() {
        let key = WalKey::create(repository.keyring())?;
        for (history, raw) in &histories {
            let branch = HistoryBranch::of(history);
            match archive_history(repository, cluster, history.timeline, branch, raw, &key).await {
                Ok(_) => {}
                // Of a timeline this server has only seen in passing.
                Err(error @ repo::Error::Different { .. }) if history.timeline > timeline => {
                    tracing::warn!("{error}");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    check_history(repository, cluster, timeline).await
}

/// Checks that the archive has the history file of `timeline`, which the first has none of.
pub(super) async fn check_history(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<(), Error> {
    if timeline == TimelineId::FIRST {
        return Ok(());
    }
    match read_history_branch(repository, cluster, timeline).await {
        Ok(_) => Ok(()),
        Err(error) if error.is_absent() => Err(Error::HistoryMissing { timeline }),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::repo::layout::WalObjectName;
    use crate::repo::testing;
    use crate::repo::wal_object::archive_wal;
    use crate::storage::MemoryStore;

    use super::*;

    /// Misses one segment after the other, then none.
    struct Filling(Mutex<Vec<u64>>);

    #[async_trait]
    impl WalArchive for Filling {
        async fn first_missing(&self, _: &NeededWal) -> Result<Option<WalSegmentNumber>, repo::Error> {
            let mut missing = self.0.lock().unwrap();
            let first = missing.first().copied();
            if missing.len() != 1 && !missing.is_empty() {
                missing.remove(0);
            }
            Ok(first.map(WalSegmentNumber))
        }
    }

    fn needed() -> NeededWal {
        let (first, last) = (WalSegmentNumber(3), WalSegmentNumber(5));
        NeededWal { timeline: TimelineId::FIRST, first, last, size: WalSegmentSize::DEFAULT }
    }

    #[tokio::test]
    async fn failure_21b_a_hole_before_the_stop_segment_is_not_passed_over() {
        let stuck = Filling(Mutex::new(vec![4]));
        let patience = Duration::from_millis(150);
        let error = wait_for_wal(&stuck, &needed(), &SystemClock, patience).await.unwrap_err();
        assert!(error.to_string().contains("000000010000000000000004"), "{error}");
        assert!(error.hint().is_some());
    }

    #[tokio::test]
    async fn failure_21b_the_archive_is_asked_for_every_segment() {
        let repository = testing::site(MemoryStore::new(), SystemClock).await;
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let key = WalKey::create(repository.keyring()).unwrap();
        let archive = RepositoryArchive { repository: repository.clone(), cluster };
        for (segment, missing) in [(5, Some(3)), (3, Some(4)), (9, Some(4)), (4, None)] {
            let name =
                WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(segment), cluster.segment_size);
            let name = WalObjectName::Segment(name);
            archive_wal(&repository, cluster, name, b"x", &key, Compression::NONE).await.unwrap();
            let found = archive.first_missing(&needed()).await.unwrap();
            assert_eq!(found, missing.map(WalSegmentNumber), "after {segment}");
        }
    }

    #[tokio::test]
    async fn it_waits_until_the_archive_has_caught_up() {
        let complete = Filling(Mutex::new(Vec::new()));
        wait_for_wal(&complete, &needed(), &SystemClock, Duration::ZERO).await.unwrap();
        struct Late(Mutex<u32>);
        #[async_trait]
        impl WalArchive for Late {
            async fn first_missing(&self, _: &NeededWal) -> Result<Option<WalSegmentNumber>, repo::Error> {
                let mut looks = self.0.lock().unwrap();
                *looks += 1;
                Ok((*looks < 3).then_some(WalSegmentNumber(5)))
            }
        }
        wait_for_wal(&Late(Mutex::new(0)), &needed(), &SystemClock, Duration::from_secs(60)).await.unwrap();
    }
}
