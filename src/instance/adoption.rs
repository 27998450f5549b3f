//! The claim of an adopted clone on its timeline in the archive of the site whose cluster it goes on as.
//!
//! ```text
//! the site takes the cluster → nobody's WAL stands on the timeline → nor its history, unless this clone put it there
//!   → all histories of the clone are created, or are the archive's
//! ```
//! The number of a clone's own timeline is the first that the archive had no history of when its recovery ended: two clones
//! of one day have the same, and so may a server that was promoted since. Their WAL cannot be told apart in one archive.
//! So all of this comes before the point of no return; the clone can then still be left private, or be made anew.
//! Deliberately absent: the WAL, which the server archives.

use std::fs;
use std::path::PathBuf;

use crate::catalog::timeline_tree::list_histories;
use crate::catalog::wal_coverage::WalCoverage;
use crate::disk::durable::{self, Create};
use crate::disk::{self, state_file};
use crate::instance::clone_folder::CloneFolder;
use crate::instance::places::at;
use crate::pg::{ArchiveFileName, HistoryError, TimelineHistory, TimelineId, WalSegmentNumber};
use crate::repo::wal_object::{HistoryBranch, WalKey, archive_history};
use crate::repo::{self, ClusterId, Repository};

/// Why a clone may not go on as the cluster that it was made from.
#[derive(Debug, thiserror::Error)]
pub enum AdoptionError {
    /// The repository, or it is not of this cluster.
    #[error(transparent)]
    Repository(#[from] repo::Error),
    /// A file.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// What should be a history is none.
    #[error(transparent)]
    History(#[from] HistoryError),
    /// The clone has not begun a timeline.
    #[error("\"{}\" has no timeline history", path.display())]
    NoHistory { path: PathBuf },
    /// Another server is, or was, on the timeline.
    #[error("timeline {timeline}, which the clone is on, is another server's in the archive")]
    Taken { timeline: TimelineId },
    /// The archive knows an ancestor of the clone's timeline as something else.
    #[error("the archive has another history of timeline {timeline} than the clone")]
    OtherBranch { timeline: TimelineId },
}

/// Histories are some lines of text.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

impl AdoptionError {
    /// Returns what the user should do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Repository(error) => error.hint(),
            Self::Disk(error) => error.hint(),
            Self::History(_) | Self::NoHistory { .. } => None,
            Self::Taken { .. } | Self::OtherBranch { .. } => Some(
                "Make another clone, which comes onto a timeline of its own, or leave --adopt out and give this one an \
                 archive of its own.",
            ),
        }
    }
}

/// Has the archive of a site keep the timeline of a stopped clone for it; done again it changes nothing.
pub async fn claim_timeline(
    repository: &Repository,
    cluster: ClusterId,
    folder: &CloneFolder,
) -> Result<(), AdoptionError> {
    let histories = histories(folder)?;
    let Some((own, text)) = histories.last() else {
        return Err(AdoptionError::NoHistory { path: folder.pg_wal() });
    };
    let timeline = own.timeline;
    repository.admit(cluster).await?;
    let held = WalCoverage::load_timeline(repository, cluster, timeline, WalSegmentNumber(0)).await?;
    let is_empty = held.segments() == 0 && held.partials.is_empty() && held.pieces.is_empty();
    let is_known = list_histories(repository, cluster).await?.contains(&timeline);
    if !is_empty || is_known && !is_claimed(folder, text)? {
        return Err(AdoptionError::Taken { timeline });
    }
    // First: an attempt that ends after the history is there has to know it again.
    durable::write_file(&folder.claim_file(), text.as_bytes(), Create::PRIVATE_FILE)?;
    let key = WalKey::create(repository.keyring())?;
    for (history, text) in &histories {
        let (timeline, branch) = (history.timeline, HistoryBranch::of(history));
        match archive_history(repository, cluster, timeline, branch, text.as_bytes(), &key).await {
            Err(repo::Error::Different { .. }) => return Err(AdoptionError::OtherBranch { timeline }),
            archived => archived?,
        };
    }
    Ok(())
}

/// Reads the histories that a clone's server has, its own timeline's last.
fn histories(folder: &CloneFolder) -> Result<Vec<(TimelineHistory, String)>, AdoptionError> {
    let wal = folder.pg_wal();
    let mut found = Vec::new();
    for entry in fs::read_dir(&wal).map_err(at("open directory", &wal))? {
        let path = entry.map_err(at("read directory", &wal))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).map(str::parse::<ArchiveFileName>);
        if let Some(Ok(ArchiveFileName::History(timeline))) = name {
            let bytes = state_file::read(&path, "a timeline history", HISTORY_BYTES_MAX)?;
            let text = String::from_utf8_lossy(&bytes).into_owned();
            found.push((TimelineHistory::parse(timeline, &text)?, text));
        }
    }
    found.sort_by_key(|(history, _)| history.timeline);
    Ok(found)
}

/// Tells whether an earlier attempt of this clone has put this very history into the archive, or was about to.
fn is_claimed(folder: &CloneFolder, text: &str) -> Result<bool, AdoptionError> {
    match state_file::read(&folder.claim_file(), "a claim on a timeline", HISTORY_BYTES_MAX) {
        Err(error) if error.is_not_found() => Ok(false),
        read => Ok(read? == text.as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::codec::Compression;
    use crate::pg::WalSegmentName;
    use crate::repo::layout::WalObjectName;
    use crate::repo::testing;
    use crate::repo::wal_object::archive_wal;
    use crate::storage::MemoryStore;

    fn cluster() -> ClusterId {
        "7301234567890123456-16".parse().unwrap()
    }

    fn timeline(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    /// A clone that came from timeline 2 onto timeline 3.
    fn clone(clones: &Path, name: &str, left_two_at: &str) -> CloneFolder {
        let folder = CloneFolder::new(clones, name).unwrap();
        fs::create_dir_all(folder.pg_wal().join("archive_status")).unwrap();
        let two = "1\t0/3000000\tno recovery target specified\n";
        fs::write(folder.pg_wal().join("00000002.history"), two).unwrap();
        let three = format!("{two}\n2\t{left_two_at}\tno recovery target specified\n");
        fs::write(folder.pg_wal().join("00000003.history"), three).unwrap();
        fs::write(folder.pg_wal().join("000000030000000000000005"), "wal").unwrap();
        folder
    }

    async fn site() -> Repository {
        testing::site(MemoryStore::new(), testing::clock()).await
    }

    #[tokio::test]
    async fn a_timeline_is_claimed_once_and_by_one_clone() {
        let (clones, repository) = (tempfile::tempdir().unwrap(), site().await);
        let one = clone(clones.path(), "one", "0/5000000");
        for _ in 0..2 {
            claim_timeline(&repository, cluster(), &one).await.unwrap();
        }
        let known = list_histories(&repository, cluster()).await.unwrap();
        assert_eq!(known, [timeline(2), timeline(3)]);
        // Another clone of that day: its history may well be the same, letter by letter.
        for left_two_at in ["0/5000000", "0/6000000"] {
            let other = clone(clones.path(), "other", left_two_at);
            let error = claim_timeline(&repository, cluster(), &other).await.unwrap_err();
            assert!(matches!(error, AdoptionError::Taken { timeline: of } if of == timeline(3)), "{error}");
            assert!(error.hint().is_some());
        }
    }

    #[tokio::test]
    async fn wal_on_the_timeline_is_another_servers_also_of_one_that_has_claimed_it() {
        let (clones, repository) = (tempfile::tempdir().unwrap(), site().await);
        let one = clone(clones.path(), "one", "0/5000000");
        claim_timeline(&repository, cluster(), &one).await.unwrap();
        let name = WalSegmentName::new(timeline(3), WalSegmentNumber(5), cluster().segment_size);
        let key = WalKey::create(repository.keyring()).unwrap();
        let name = WalObjectName::Segment(name);
        archive_wal(&repository, cluster(), name, b"wal", &key, Compression::NONE).await.unwrap();
        let error = claim_timeline(&repository, cluster(), &one).await.unwrap_err();
        assert!(matches!(error, AdoptionError::Taken { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_ancestor_that_left_elsewhere_and_another_cluster_are_refused() {
        let (clones, repository) = (tempfile::tempdir().unwrap(), site().await);
        let one = clone(clones.path(), "one", "0/5000000");
        let two = TimelineHistory::parse(timeline(2), "1\t0/4000000\tanother\n").unwrap();
        let (key, branch) = (WalKey::create(repository.keyring()).unwrap(), HistoryBranch::of(&two));
        let text = two.to_string();
        archive_history(&repository, cluster(), timeline(2), branch, text.as_bytes(), &key).await.unwrap();
        let error = claim_timeline(&repository, cluster(), &one).await.unwrap_err();
        assert!(matches!(error, AdoptionError::OtherBranch { timeline: of } if of == timeline(2)), "{error}");
        let foreign: ClusterId = "7301234567890123457-16".parse().unwrap();
        let error = claim_timeline(&repository, foreign, &one).await.unwrap_err();
        assert!(matches!(error, AdoptionError::Repository(repo::Error::ForeignCluster { .. })), "{error}");
        fs::remove_dir_all(one.pg_wal()).unwrap();
        fs::create_dir(one.pg_wal()).unwrap();
        let error = claim_timeline(&repository, cluster(), &one).await.unwrap_err();
        assert!(matches!(error, AdoptionError::NoHistory { .. }), "{error}");
    }
}
