//! What was left out of the archive because too much WAL waited: one JSON file a site, below the state folder.
//!
//! Written before PostgreSQL is told that the file is archived, which removes the file. `walden check` fails while
//! anything stands in it that no basebackup has been taken behind; a basebackup from this host takes those out. Timeline
//! histories stay in `pg_wal` whatever PostgreSQL is told, so that they are archived later, and go then.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::disk::durable::{self, Create};
use crate::disk::{self, LockFile, Owner, state_file};
use crate::pg::{ArchiveFileName, Lsn, TimelineId};
use crate::repo::ClusterId;
use crate::repo::documents::BackupRecord;
use crate::wal::Error;

/// All that was left out of a site's archive from this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The gaps, the oldest first.
    pub gaps: Vec<Gap>,
}

/// Files that were left out one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The cluster that wrote them, as in the repository.
    pub cluster: String,
    /// The first file.
    pub first: String,
    /// The last file.
    pub last: String,
    /// How many they are.
    pub files: u64,
    /// When the first was left out.
    pub since: Timestamp,
    /// When the last was left out.
    pub until: Timestamp,
}

/// Where the recovery from a basebackup begins.
#[derive(Debug, Clone, Copy)]
pub struct RecoveryStart {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its timeline.
    pub timeline: TimelineId,
    /// The first position whose WAL is needed.
    pub lsn: Lsn,
}

impl RecoveryStart {
    /// Returns where the recovery from a basebackup begins.
    pub fn of(record: &BackupRecord) -> Self {
        Self { cluster: record.cluster, timeline: record.timeline, lsn: record.start_lsn }
    }
}

/// Where the files of all sites are, below the state folder.
const FOLDER: &str = "wal-left-out";
/// Gaps that are told apart; the oldest two become one beyond that, with what lies between them.
const GAPS_MAX: usize = 256;
/// Two seconds in all.
const LOCK_ATTEMPTS_MAX: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// Returns the file of a site.
pub fn file_of(state: &Path, site: &str) -> PathBuf {
    state.join(FOLDER).join(format!("{site}.json"))
}

impl LeftOut {
    /// Reads the file of a site; without one nothing was left out.
    pub fn load(path: &Path) -> Result<Self, Error> {
        match state_file::read_document(path, "what was left out of the archive") {
            Err(error) if error.is_not_found() => Ok(Self::default()),
            Err(disk::Error::Malformed { path, detail, .. }) => Err(Error::Malformed { path, detail }),
            read => Ok(read?),
        }
    }

    /// Changes the file of a site durably, one process at a time; it is removed where nothing is left out any more.
    pub fn change(path: &Path, owner: Owner, change: impl FnOnce(&mut Self)) -> Result<(), Error> {
        if let Some(folder) = path.parent() {
            durable::create_dir_all(folder, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
        }
        let _lock = lock(&path.with_extension("lock"), owner)?;
        let mut left_out = Self::load(path)?;
        change(&mut left_out);
        left_out.save(path, owner)
    }

    fn save(&self, path: &Path, owner: Owner) -> Result<(), Error> {
        if self.gaps.is_empty() {
            return Ok(durable::remove_file(path)?);
        }
        let bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Malformed { path: path.to_owned(), detail: error.to_string() })?;
        Ok(durable::write_file(path, &bytes, Create::PRIVATE_FILE.owned_by(owner))?)
    }

    /// Takes note of one more file; one that the last gap ends with already is no news.
    pub fn note(&mut self, cluster: ClusterId, name: ArchiveFileName, now: Timestamp) {
        let (cluster_text, text) = (cluster.to_string(), name.to_string());
        if let Some(gap) = self.gaps.last_mut().filter(|gap| gap.cluster == cluster_text) {
            if gap.last == text {
                gap.until = now;
                return;
            }
            if follows(cluster, &gap.last, name) {
                (gap.last, gap.until) = (text, now);
                gap.files += 1;
                return;
            }
        }
        let (first, last) = (text.clone(), text);
        self.gaps.push(Gap { cluster: cluster_text, first, last, files: 1, since: now, until: now });
        if self.gaps.len() > GAPS_MAX {
            // A history is still to be archived, and has to be known by its name.
            let mergeable = |two: &[Gap]| two.iter().all(|gap| gap.history().is_none());
            let at = self.gaps.windows(2).position(mergeable).unwrap_or(0);
            let oldest = self.gaps.remove(at);
            let next = &mut self.gaps[at];
            (next.first, next.since) = (oldest.first, oldest.since);
            next.files += oldest.files;
        }
    }

    /// Lists the timeline histories of a cluster that were left out.
    pub fn histories(&self, cluster: ClusterId) -> Vec<ArchiveFileName> {
        let cluster = cluster.to_string();
        self.gaps.iter().filter(|gap| gap.cluster == cluster).filter_map(Gap::history).collect()
    }

    /// Forgets a timeline history that is archived now.
    pub fn forget_history(&mut self, cluster: ClusterId, name: ArchiveFileName) {
        let cluster = cluster.to_string();
        self.gaps.retain(|gap| gap.cluster != cluster || gap.history() != Some(name));
    }

    /// Forgets the gaps that a basebackup lies behind.
    pub fn forget_before(&mut self, start: &RecoveryStart) {
        self.gaps.retain(|gap| !gap.lies_before(start));
    }
}

impl Gap {
    /// Returns the timeline history that it is, if it is one.
    fn history(&self) -> Option<ArchiveFileName> {
        let name = self.last.parse().ok().filter(|name| matches!(name, ArchiveFileName::History(_)));
        name.filter(|_| self.first == self.last)
    }

    /// Returns whether a recovery that begins there needs nothing of the gap.
    pub fn lies_before(&self, start: &RecoveryStart) -> bool {
        let Ok(last) = self.last.parse::<ArchiveFileName>() else { return false };
        if self.cluster != start.cluster.to_string() || start.timeline < last.timeline() {
            return false;
        }
        match last {
            ArchiveFileName::History(_) => true,
            ArchiveFileName::Segment(segment)
            | ArchiveFileName::Partial(segment)
            | ArchiveFileName::BackupHistory { segment, .. } => {
                segment.end_lsn(start.cluster.segment_size).is_ok_and(|end| start.lsn >= end)
            }
        }
    }
}

/// Takes the lock of a file; whoever holds it reads and writes some kilobytes.
fn lock(path: &Path, owner: Owner) -> Result<LockFile, Error> {
    for attempt in 1.. {
        match LockFile::acquire(path) {
            Err(disk::Error::Locked { .. }) if attempt < LOCK_ATTEMPTS_MAX => thread::sleep(LOCK_PAUSE),
            Err(error) => return Err(error.into()),
            Ok(lock) => {
                // Root may be the first to take it, and PostgreSQL's user has to take it next.
                owner.give(path)?;
                return Ok(lock);
            }
        }
    }
    unreachable!("the last attempt returns")
}

fn follows(cluster: ClusterId, last: &str, name: ArchiveFileName) -> bool {
    let Ok(ArchiveFileName::Segment(last)) = last.parse() else { return false };
    last.next(cluster.segment_size).is_ok_and(|next| ArchiveFileName::Segment(next) == name)
}

#[cfg(test)]
mod tests {
    use crate::pg::{SystemIdentifier, WalSegmentSize};

    use super::*;

    fn cluster(mebibytes: u32) -> ClusterId {
        let segment_size = WalSegmentSize::new(mebibytes << 20).unwrap();
        ClusterId { system_identifier: SystemIdentifier(7), segment_size }
    }

    fn noted(names: &[&str]) -> LeftOut {
        let mut left_out = LeftOut::default();
        let mut now: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        for name in names {
            left_out.note(cluster(16), name.parse().unwrap(), now);
            now += Duration::from_secs(1);
        }
        left_out
    }

    fn ends(left_out: &LeftOut) -> Vec<(&str, &str, u64)> {
        left_out.gaps.iter().map(|gap| (gap.first.as_str(), gap.last.as_str(), gap.files)).collect()
    }

    #[test]
    fn files_in_a_row_are_one_gap_and_a_repetition_is_none() {
        let (a, b, c) = ("0000000100000000000000FE", "0000000100000000000000FF", "000000010000000100000000");
        let left_out = noted(&[a, b, b, c, "00000002.history", "000000020000000100000002"]);
        let next = "000000020000000100000002";
        let expected = [(a, c, 3), ("00000002.history", "00000002.history", 1), (next, next, 1)];
        assert_eq!(ends(&left_out), expected);
        assert_eq!(left_out.gaps[0].until.duration_since(left_out.gaps[0].since).as_secs(), 3);
    }

    #[test]
    fn histories_are_known_until_they_are_archived_however_many_gaps_there_are() {
        let history: ArchiveFileName = "00000002.history".parse().unwrap();
        let mut left_out = noted(&["000000010000000000000005", "00000002.history"]);
        let now = left_out.gaps[0].since;
        for n in 0..2 * GAPS_MAX as u32 {
            left_out.note(
                cluster(16),
                format!("0000000200000001{:08X}", 2 * (n % 128)).parse().unwrap(),
                now,
            );
        }
        assert_eq!(left_out.gaps.len(), GAPS_MAX);
        assert_eq!(left_out.gaps.iter().map(|gap| gap.files).sum::<u64>(), 2 + 2 * GAPS_MAX as u64);
        assert_eq!(left_out.histories(cluster(16)), [history]);
        assert!(left_out.histories(cluster(64)).is_empty(), "another cluster");
        left_out.forget_history(cluster(64), history);
        left_out.forget_history(cluster(16), "00000003.history".parse().unwrap());
        assert_eq!(left_out.histories(cluster(16)), [history]);
        left_out.forget_history(cluster(16), history);
        assert!(left_out.histories(cluster(16)).is_empty());
        assert_eq!(left_out.gaps.len(), GAPS_MAX - 1, "segments are gone for good");
    }

    #[test]
    fn a_gap_is_behind_a_basebackup_that_begins_after_its_last_segment() {
        let start = |cluster, timeline, lsn: &str| RecoveryStart {
            cluster,
            timeline: TimelineId::new(timeline).unwrap(),
            lsn: lsn.parse().unwrap(),
        };
        let gap = &noted(&["000000020000000000000004", "000000020000000000000005"]).gaps[0];
        assert!(gap.lies_before(&start(cluster(16), 2, "0/6000000")));
        assert!(gap.lies_before(&start(cluster(16), 3, "0/6000028")));
        assert!(!gap.lies_before(&start(cluster(16), 2, "0/5FFFFFF")));
        assert!(!gap.lies_before(&start(cluster(16), 1, "0/6000000")), "an older timeline");
        assert!(!gap.lies_before(&start(cluster(64), 2, "1/0")), "another cluster");
        let history = &noted(&["00000003.history"]).gaps[0];
        assert!(history.lies_before(&start(cluster(16), 3, "0/28")));
        assert!(!history.lies_before(&start(cluster(16), 2, "1/0")));
        let mut left_out = noted(&["000000020000000000000004", "000000020000000000000007"]);
        left_out.forget_before(&start(cluster(16), 2, "0/6000000"));
        assert_eq!(ends(&left_out), [("000000020000000000000007", "000000020000000000000007", 1)]);
    }

    #[test]
    fn the_file_comes_back_goes_away_and_grows_no_further_than_its_bound() {
        let folder = tempfile::tempdir().unwrap();
        let (path, owner) = (file_of(folder.path(), "main"), Owner::current());
        assert_eq!(LeftOut::load(&path).unwrap(), LeftOut::default());
        let names: Vec<String> =
            (0..2 * GAPS_MAX).map(|n| format!("0000000100000001{:08X}", n % 256)).collect();
        let names: Vec<&str> = names.iter().step_by(2).map(String::as_str).collect();
        let left_out = noted(&names.repeat(2));
        LeftOut::change(&path, owner, |file| *file = left_out.clone()).unwrap();
        assert_eq!(LeftOut::load(&path).unwrap(), left_out);
        assert_eq!(left_out.gaps.len(), GAPS_MAX);
        assert_eq!(left_out.gaps[0].first, names[0]);
        assert_eq!(left_out.gaps.iter().map(|gap| gap.files).sum::<u64>(), 2 * names.len() as u64);
        let held = lock(&path.with_extension("lock"), owner).unwrap();
        let waiting = LeftOut::change(&path, owner, |_| ());
        assert!(matches!(waiting, Err(Error::Disk(disk::Error::Locked { .. }))), "{waiting:?}");
        drop(held);
        LeftOut::change(&path, owner, |file| file.gaps.clear()).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(LeftOut::load(&path), Err(Error::Malformed { .. })));
    }
}
