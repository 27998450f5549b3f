//! When the head of a timeline is due: every quarter of an hour in which WAL is archived, whoever of this host does it.
//!
//! A small file a timeline, below the state folder, says when the last one was; the daemon and commands share it. The
//! first look begins the interval, so that who archives a few files writes none. A turn is taken before the head is
//! written: a store that fails is asked again at the next one, and not at each file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use crate::disk::durable::{Create, create_dir_all, write_file};
use crate::disk::{self, Owner, state_file};
use crate::pg::TimelineId;
use crate::repo::ClusterId;
use crate::wal::Error;

/// The notes of a site.
#[derive(Debug, Clone)]
pub struct HeadNotes {
    folder: PathBuf,
    owner: Owner,
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Who asked is to write a head.
    Now,
    /// Nobody is, for so long.
    In(Duration),
}

/// How often a head is written. What is cut off within the last of these cannot be told from what never came; more often is
/// more requests for a server that archives one segment an hour.
pub const HEAD_INTERVAL: Duration = Duration::from_secs(15 * 60);
/// Where the notes of all sites are, below the state folder.
const FOLDER: &str = "wal-heads";
/// A note is a time.
const NOTE_BYTES_MAX: u64 = 64;

impl HeadNotes {
    /// Returns the notes of a site; what is written gets the owner of the state folder.
    pub fn of(state: &Path, owner: Owner, site: &str) -> Self {
        Self { folder: state.join(FOLDER).join(site), owner }
    }

    /// Takes the turn to write a head of a timeline, if it is due.
    pub fn take_turn(&self, cluster: ClusterId, timeline: TimelineId, now: Timestamp) -> Result<Turn, Error> {
        let path = self.folder.join(format!("{cluster}-{}", timeline.hex8()));
        let turn = match state_file::read(&path, "when a head was written", NOTE_BYTES_MAX) {
            Ok(bytes) => decide(String::from_utf8_lossy(&bytes).trim().parse().ok(), now),
            Err(disk::Error::Malformed { .. }) => Turn::Now,
            Err(error) if error.is_not_found() => {
                self.note(&path, now)?;
                return Ok(Turn::In(HEAD_INTERVAL));
            }
            Err(error) => return Err(error.into()),
        };
        if turn == Turn::Now {
            self.note(&path, now)?;
        }
        Ok(turn)
    }

    fn note(&self, path: &Path, now: Timestamp) -> Result<(), Error> {
        create_dir_all(&self.folder, Create::PRIVATE_DIRECTORY.owned_by(self.owner))?;
        Ok(write_file(path, format!("{now}\n").as_bytes(), Create::PRIVATE_FILE.owned_by(self.owner))?)
    }
}

/// Decides by the last time. One that lies in the future, or is none, is no reason to wait.
fn decide(last: Option<Timestamp>, now: Timestamp) -> Turn {
    let since = last.and_then(|last| Duration::try_from(now.duration_since(last)).ok());
    match since.and_then(|since| HEAD_INTERVAL.checked_sub(since)) {
        Some(left) if !left.is_zero() => Turn::In(left),
        _ => Turn::Now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_all_who_archive_one_has_the_turn_every_quarter_of_an_hour() {
        let folder = tempfile::tempdir().unwrap();
        let notes = || HeadNotes::of(folder.path(), Owner::current(), "main");
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let start: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        let at = |timeline: u32, seconds: i64| {
            let now = start + jiff::SignedDuration::from_secs(seconds);
            notes().take_turn(cluster, TimelineId::new(timeline).unwrap(), now).unwrap()
        };
        let left = |seconds| Turn::In(Duration::from_secs(seconds));
        assert_eq!(at(1, 0), left(900), "the first look begins the interval");
        assert_eq!(at(1, 899), left(1));
        assert_eq!(at(2, 899), left(900), "another timeline has an interval of its own");
        assert_eq!(at(1, 900), Turn::Now);
        assert_eq!(at(1, 900), left(900), "somebody else has taken it");
        assert_eq!(at(1, 5000), Turn::Now);
        // The clock was set back.
        assert_eq!(at(1, 4000), Turn::Now);
        assert_eq!(at(1, 4000), left(900));
    }

    #[test]
    fn a_note_that_is_none_is_no_reason_to_wait_and_one_that_cannot_be_written_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let notes = HeadNotes::of(folder.path(), Owner::current(), "main");
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let now: Timestamp = "2026-11-21T10:00:00Z".parse().unwrap();
        let path = notes.folder.join(format!("{cluster}-00000001"));
        std::fs::create_dir_all(&notes.folder).unwrap();
        let long = "2026-11-21T10:00:00Z\n".repeat(10);
        for garbage in ["", "soon", long.as_str()] {
            std::fs::write(&path, garbage).unwrap();
            assert_eq!(notes.take_turn(cluster, TimelineId::FIRST, now).unwrap(), Turn::Now, "{garbage}");
            let next = notes.take_turn(cluster, TimelineId::FIRST, now).unwrap();
            assert_eq!(next, Turn::In(HEAD_INTERVAL));
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(notes.take_turn(cluster, TimelineId::FIRST, now).is_err());
    }
}
