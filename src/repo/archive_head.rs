//! Heads of the archive: signed notes of how far the WAL of a timeline was known to be archived.
//!
//! The end of an archive looks like any other end, also where somebody cut it off. A head that lies behind it is the
//! proof that there was more. Heads are small documents, written now and then, and each sorts behind the newest
//! there was, whatever the clocks say; writers never write one that is behind it, so the newest ones say all. What a reader makes of one is `catalog`'s business.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, TimelineId};
use crate::repo::error::{Error, ErrorKind};
use crate::repo::id::{ClusterId, HeadId};
use crate::repo::identity::{Identity, ObjectKind};
use crate::repo::layout::ObjectName;
use crate::repo::repository::Repository;
use crate::repo::signed::{DOCUMENT_BYTES_MAX, open_document, seal_document};
use crate::storage;

/// How far the archive reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveHead {
    /// The timeline.
    pub timeline: TimelineId,
    /// The position behind the WAL that was known to be archived.
    pub end: Lsn,
    /// When this was written down.
    pub written_at: Timestamp,
}

/// How far back the newest heads are looked for at first: writers write every 15 minutes while WAL is archived, so
/// that only for a timeline that was left, or is at rest, all heads are listed.
const LOOK_BACK: SignedDuration = SignedDuration::from_hours(24);
/// The newest heads that are read: two hosts may write side by side, and one head may be damaged.
const HEADS_READ: usize = 4;
/// Keys asked for at a time.
const PAGE: usize = 1000;
/// Two hosts may draw the same name within a second, hardly twice.
const NAMES_DRAWN_MAX: u32 = 3;

/// Writes a head.
pub async fn archive_head(
    repository: &Repository,
    cluster: ClusterId,
    head: &ArchiveHead,
) -> Result<HeadId, Error> {
    let newest = newest_ids(repository, cluster, head.timeline).await?.first().copied();
    for drawn in 1.. {
        let id = HeadId::new(head.written_at, newest, repository.keyring().random());
        let identity = identity(repository, cluster, head.timeline, id);
        let bytes = seal_document(repository.keyring(), &identity, head)?;
        let key = repository.layout().head(cluster, head.timeline, id);
        match repository.store().create(&key, bytes).await {
            Ok(()) => return Ok(id),
            Err(error) if error.kind() == storage::ErrorKind::AlreadyExists && drawn < NAMES_DRAWN_MAX => {}
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("the last attempt returns")
}

/// Returns the head that reaches furthest among the newest of a timeline; none where none was written.
///
/// A head that is damaged or not trusted proves nothing and is passed over.
pub async fn newest_head(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<Option<ArchiveHead>, Error> {
    let mut newest: Option<ArchiveHead> = None;
    for id in newest_ids(repository, cluster, timeline).await? {
        match read_head(repository, cluster, timeline, id).await {
            Ok(head) if newest.is_none_or(|newest| newest.end < head.end) => newest = Some(head),
            Ok(_) => {}
            Err(error) if error.is_absent() => {}
            Err(error) if error.kind() == ErrorKind::Damaged => {
                tracing::warn!("an archive head is passed over: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(newest)
}

async fn read_head(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    id: HeadId,
) -> Result<ArchiveHead, Error> {
    let object = format!("archive head {id} of timeline {timeline}");
    let key = repository.layout().head(cluster, timeline, id);
    let bytes = repository.store().get(&key, DOCUMENT_BYTES_MAX).await?;
    let identity = identity(repository, cluster, timeline, id);
    let (head, _) = open_document::<ArchiveHead>(repository.keyring(), &identity, &bytes, &object)?;
    if head.timeline != timeline {
        return Err(Error::damaged(&object, format!("it speaks of timeline {}", head.timeline)));
    }
    Ok(head)
}

/// Returns the names of the newest heads, the newest first.
async fn newest_ids(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
) -> Result<Vec<HeadId>, Error> {
    let lately = repository.clock().now().checked_sub(LOOK_BACK).ok().map(HeadId::first_at);
    let ids = last_ids(repository, cluster, timeline, lately).await?;
    if ids.is_empty() { last_ids(repository, cluster, timeline, None).await } else { Ok(ids) }
}

/// Lists heads from a name on and returns the last of them, the newest first.
async fn last_ids(
    repository: &Repository,
    cluster: ClusterId,
    timeline: TimelineId,
    start: Option<HeadId>,
) -> Result<Vec<HeadId>, Error> {
    let layout = repository.layout();
    let folder = layout.heads(cluster, timeline);
    let mut after = start.map(|id| layout.head(cluster, timeline, id));
    let mut ids: Vec<HeadId> = Vec::new();
    loop {
        let page = repository.store().list(&folder, after.as_ref(), PAGE).await?;
        ids.extend(page.iter().filter_map(|object| match layout.parse(&object.key) {
            Some(ObjectName::Head(_, _, id)) => Some(id),
            _ => None,
        }));
        ids.drain(..ids.len().saturating_sub(HEADS_READ));
        if page.len() < PAGE {
            ids.reverse();
            return Ok(ids);
        }
        after = page.last().map(|object| object.key.clone());
    }
}

fn identity(repository: &Repository, cluster: ClusterId, timeline: TimelineId, id: HeadId) -> Identity {
    Identity { name: id.to_string(), ..repository.identity(ObjectKind::Head, cluster, Some(timeline)) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use crate::clock::ManualClock;
    use crate::repo::testing;
    use crate::storage::MemoryStore;

    use super::*;

    struct Archive {
        store: Arc<MemoryStore>,
        clock: ManualClock,
        repository: Repository,
    }

    fn cluster() -> ClusterId {
        "7301234567890123456-16".parse().unwrap()
    }

    impl Archive {
        async fn new() -> Self {
            Self::at(Arc::new(MemoryStore::new()), "2026-11-20T10:00:00Z").await
        }

        /// As a host sees it whose clock says that.
        async fn at(store: Arc<MemoryStore>, time: &str) -> Self {
            let clock = ManualClock::new(time.parse().unwrap());
            let repository = testing::site(store.clone(), clock.clone()).await;
            Self { store, clock, repository }
        }

        async fn write(&self, timeline: TimelineId, end: u64) -> HeadId {
            self.clock.advance(Duration::from_secs(900));
            let head = ArchiveHead { timeline, end: Lsn(end), written_at: self.repository.clock().now() };
            archive_head(&self.repository, cluster(), &head).await.unwrap()
        }

        fn tamper(&self, id: HeadId, content: Option<&'static str>) {
            let key = self.repository.layout().head(cluster(), TimelineId::FIRST, id);
            self.store.tamper(&key, |_| content.map(Into::into));
        }

        async fn newest(&self) -> Option<u64> {
            let newest = newest_head(&self.repository, cluster(), TimelineId::FIRST).await.unwrap();
            newest.map(|head| head.end.0)
        }
    }

    #[tokio::test]
    async fn the_newest_head_is_found_however_old_it_is_and_how_many_there_are() {
        let archive = Archive::new().await;
        assert_eq!(archive.newest().await, None);
        for end in 1..=1200 {
            archive.write(TimelineId::FIRST, end).await;
        }
        assert_eq!(archive.newest().await, Some(1200));
        archive.clock.advance(Duration::from_secs(86400 * 365));
        assert_eq!(archive.newest().await, Some(1200));
        archive.write(TimelineId::FIRST, 1201).await;
        archive.write(TimelineId::new(2).unwrap(), 5000).await;
        assert_eq!(archive.newest().await, Some(1201));
    }

    /// A clock that was an hour ahead and is set right, and a host that is an hour behind: each writes more heads than are
    /// read.
    #[tokio::test]
    async fn the_newest_head_is_found_though_clocks_differ_by_an_hour() {
        let store = Arc::new(MemoryStore::new());
        let mut hosts = Vec::new();
        for time in ["2026-11-20T11:00:00Z", "2026-11-20T10:00:00Z", "2026-11-20T09:00:00Z"] {
            hosts.push(Archive::at(store.clone(), time).await);
        }
        let mut end = 0;
        for writer in hosts.iter().chain([&hosts[0]]) {
            for _ in 0..=HEADS_READ {
                end += 1;
                writer.write(TimelineId::FIRST, end).await;
                for reader in &hosts {
                    assert_eq!(reader.newest().await, Some(end));
                }
            }
        }
    }

    #[tokio::test]
    async fn of_two_hosts_the_one_that_was_further_counts_and_damage_hides_no_other_head() {
        let archive = Archive::new().await;
        let ids = [archive.write(TimelineId::FIRST, 100).await, archive.write(TimelineId::FIRST, 90).await];
        assert_eq!(archive.newest().await, Some(100));
        archive.tamper(ids[0], Some("{}\n"));
        assert_eq!(archive.newest().await, Some(90));
        archive.tamper(ids[1], Some(""));
        assert_eq!(archive.newest().await, None);
    }
}
