//! Notes how far the archive of a timeline reaches: the proof against a tail that is cut off later.
//!
//! For who archives: a receiver, the daemon, and a `wal push` without one, every quarter of an hour (`head_notes`). What is
//! noted is what a listing shows to be stored, whoever stored it. A head never goes back: where the archive has become
//! shorter than its newest head, that is said and nothing is written.

use crate::catalog::WalCoverage;
use crate::pg::{Lsn, TimelineId, WalSegmentNumber};
use crate::repo::wal_object::{ArchiveHead, archive_head, newest_head};
use crate::repo::{ClusterId, Error, Repository};

/// What became of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadWritten {
    /// It was written, for this position.
    Written(Lsn),
    /// The newest one says so already, or nothing is archived.
    Unchanged,
    /// The archive ends before its newest head: WAL has been removed from its end.
    CutOff { head: Lsn, archived: Lsn },
}

/// Writes a head for a timeline, where more is archived than the newest one says.
pub async fn write(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<HeadWritten, Error> {
    let newest = newest_head(repository, cluster, timeline).await?.map(|head| head.end);
    let size = cluster.segment_size;
    let from = match newest {
        Some(head) => WalSegmentNumber::ending_at(head, size),
        None => newest_log(repository, cluster, timeline).await?,
    };
    let archived = WalCoverage::load_timeline(repository, cluster, timeline, from).await?.proven_end(size);
    let decided = decide(newest, archived);
    if let HeadWritten::Written(end) = decided {
        let head = ArchiveHead { timeline, end, written_at: repository.clock().now() };
        archive_head(repository, cluster, &head).await?;
    }
    Ok(decided)
}

/// Returns the first segment of the newest log of a timeline: where its end lies, however long the archive is.
async fn newest_log(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<WalSegmentNumber, Error> {
    let folder = repository.layout().wal_timeline(cluster, timeline);
    let logs = repository.store().list_folder(&folder).await?.folders;
    let log = logs.iter().filter_map(|log| u64::from_str_radix(log.trim_end_matches('/'), 16).ok()).max();
    Ok(WalSegmentNumber(log.unwrap_or(0) * cluster.segment_size.segments_per_log()))
}

/// Writes a head, and says what is wrong; returns whether the head says how far the archive reaches now.
pub async fn keep(repository: &Repository, cluster: ClusterId, timeline: TimelineId) -> bool {
    match write(repository, cluster, timeline).await {
        Ok(HeadWritten::CutOff { head, archived }) => tracing::error!(
            "timeline {timeline} ends at {archived} in the archive, which reached {head}: WAL was removed from its end"
        ),
        Ok(HeadWritten::Written(_) | HeadWritten::Unchanged) => {}
        Err(error) => {
            tracing::warn!("how far the archive reaches could not be noted: {error}");
            return false;
        }
    }
    true
}

/// Decides what to write, from the newest head and the position behind all that is listed from its segment on.
fn decide(newest: Option<Lsn>, archived: Lsn) -> HeadWritten {
    match newest {
        Some(head) if archived < head => HeadWritten::CutOff { head, archived },
        Some(head) if archived == head => HeadWritten::Unchanged,
        None if archived.is_zero() => HeadWritten::Unchanged,
        _ => HeadWritten::Written(archived),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use crate::clock::SystemClock;
    use crate::codec::Compression;
    use crate::pg::WalSegmentName;
    use crate::repo::layout::WalObjectName;
    use crate::repo::testing;
    use crate::repo::wal_object::{WalKey, archive_piece, archive_wal};
    use crate::storage::{MemoryStore, Store};

    use super::*;

    fn cluster() -> ClusterId {
        "7301234567890123456-1".parse().unwrap()
    }

    fn segment(number: u64) -> WalSegmentName {
        WalSegmentName::new(TimelineId::FIRST, WalSegmentNumber(number), cluster().segment_size)
    }

    #[tokio::test]
    async fn a_head_follows_the_archive_and_never_goes_back() {
        let store = Arc::new(MemoryStore::new());
        let repository = testing::site(store.clone(), SystemClock).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        let zstd = Compression::zstd(1);
        let head = async || write(&repository, cluster(), TimelineId::FIRST).await.unwrap();
        assert_eq!(head().await, HeadWritten::Unchanged);
        let whole = async |number| {
            let name = WalObjectName::Segment(segment(number));
            archive_wal(&repository, cluster(), name, b"x", &key, zstd).await.unwrap();
        };
        whole(2).await;
        whole(3).await;
        assert_eq!(head().await, HeadWritten::Written(Lsn(4 << 20)));
        assert_eq!(head().await, HeadWritten::Unchanged);
        archive_piece(&repository, cluster(), segment(4), 0..7, &[1; 7], &key, zstd).await.unwrap();
        assert_eq!(head().await, HeadWritten::Written(Lsn((4 << 20) + 7)));
        whole(4).await;
        assert_eq!(head().await, HeadWritten::Written(Lsn(5 << 20)));
        let last = repository.layout().wal_object(cluster(), WalObjectName::Segment(segment(4)));
        store.delete(&last).await.unwrap();
        let archived = Lsn((4 << 20) + 7);
        assert_eq!(head().await, HeadWritten::CutOff { head: Lsn(5 << 20), archived });
        let newest = newest_head(&repository, cluster(), TimelineId::FIRST).await.unwrap().unwrap();
        assert_eq!(newest.end, Lsn(5 << 20));
    }

    /// The first head of an archive that is years old: in a site with 100 000 segments pages of keys take longer than a
    /// server waits for its archive_command.
    #[tokio::test]
    async fn the_first_head_of_a_long_archive_costs_a_listing_of_its_last_log() {
        let repository = testing::site(Arc::new(MemoryStore::new()), SystemClock).await;
        let key = WalKey::create(repository.keyring()).unwrap();
        for number in [1, 2, 4095, 4096, 3 * 4096 + 1] {
            let name = WalObjectName::Segment(segment(number));
            archive_wal(&repository, cluster(), name, b"x", &key, Compression::zstd(1)).await.unwrap();
        }
        let from = newest_log(&repository, cluster(), TimelineId::FIRST).await.unwrap();
        assert_eq!(from, WalSegmentNumber(3 * 4096));
        let written = write(&repository, cluster(), TimelineId::FIRST).await.unwrap();
        assert_eq!(written, HeadWritten::Written(Lsn((3 * 4096 + 2) << 20)));
    }
}
