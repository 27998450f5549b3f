//! WAL that a basebackup carries itself, as files of its `data/pg_wal`, so that it can be recovered without an archive.
//!
//! `backup.json` names the segments, so that nobody needs a key to know of them; they are read like any other file of
//! the basebackup. Who reads the archive of a cluster is told which basebackups there are that carry WAL
//! ([`CarriedIndex`]), and takes from them what the archive does not have: never anything that it has.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, WalSegmentName, WalSegmentSize};
use crate::repo::basebackup::Basebackup;
use crate::repo::entry::TreePath;
use crate::repo::error::Error;
use crate::repo::file_reader::FileReader;
use crate::repo::id::{BasebackupId, ClusterId};
use crate::repo::repository::Repository;

/// The WAL from the start of a basebackup to its stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedWal {
    /// The segments of each timeline, in the order of recovery.
    pub segments: Vec<CarriedSegments>,
    /// Where it ends: with the last segment, or in it, and what lies behind is zero then.
    pub end: Lsn,
}

/// Neighbouring segments of one timeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedSegments {
    /// The first.
    pub first: WalSegmentName,
    /// The last.
    pub last: WalSegmentName,
}

/// A segment that a basebackup carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CarriedSegment {
    /// The basebackup.
    pub basebackup: BasebackupId,
    /// Where its WAL ends, if not with the segment.
    pub end: Option<Lsn>,
}

/// The basebackups that carry WAL, as far as somebody came across them.
#[derive(Debug, Default)]
pub struct CarriedIndex {
    known: Mutex<VecDeque<(ClusterId, BasebackupId, CarriedWal)>>,
}

/// Basebackups remembered: a recovery goes by one of them, a look at a site by all that it has.
const KNOWN_MAX: usize = 256;
/// Decoded chunks kept while one segment is read, front to back.
const CACHE_BYTES: usize = 1 << 20;

impl CarriedWal {
    /// Returns whether a segment is carried, or the beginning of it.
    pub fn contains(&self, segment: WalSegmentName) -> bool {
        let holds = |range: &CarriedSegments| {
            range.first.timeline() == segment.timeline() && (range.first..=range.last).contains(&segment)
        };
        self.segments.iter().any(holds)
    }

    /// Returns where the WAL of a segment ends, if it does not fill the segment.
    pub fn end_in(&self, segment: WalSegmentName, size: WalSegmentSize) -> Option<Lsn> {
        let fills = segment.end_lsn(size).is_ok_and(|end| end <= self.end);
        let is_last = self.segments.last().is_some_and(|range| range.last == segment);
        (is_last && !fills).then_some(self.end)
    }

    /// Returns the path of a segment in the basebackup.
    pub fn path_of(segment: WalSegmentName) -> Result<TreePath, Error> {
        TreePath::new(format!("data/pg_wal/{segment}")).map_err(|error| Error::Internal(error.to_string()))
    }
}

impl CarriedIndex {
    /// Remembers a basebackup that carries WAL.
    pub fn note(&self, cluster: ClusterId, basebackup: BasebackupId, wal: &CarriedWal) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(_, noted, _)| *noted != basebackup);
        known.push_front((cluster, basebackup, wal.clone()));
        known.truncate(KNOWN_MAX);
    }

    /// Lists the basebackups that carry a segment, the one that was noted last first.
    pub fn find(&self, cluster: ClusterId, segment: WalSegmentName) -> Vec<CarriedSegment> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let holding = known.iter().filter(|(of, _, wal)| *of == cluster && wal.contains(segment));
        let found = holding.map(|(_, basebackup, wal)| CarriedSegment {
            basebackup: *basebackup,
            end: wal.end_in(segment, cluster.segment_size),
        });
        found.collect()
    }
}

/// Reads a segment from the basebackup that carries it; one that is carried in part is filled up with zeros.
///
/// # Errors
/// `Damaged` where the basebackup does not have what its record names.
pub async fn read_carried(
    repository: &Repository,
    carried: CarriedSegment,
    segment: WalSegmentName,
    size: WalSegmentSize,
) -> Result<Bytes, Error> {
    let basebackup = Arc::new(Basebackup::open(repository, carried.basebackup).await?);
    let path = CarriedWal::path_of(segment)?;
    let damaged = |detail: &str| {
        Error::damaged(format!("basebackup {}", carried.basebackup), format!("{path}: {detail}"))
    };
    let (_, entry) = basebackup.entry(&path).await?.ok_or_else(|| damaged("it is not there"))?;
    if entry.size() != u64::from(size.bytes()) {
        return Err(damaged("it has not the size of a segment"));
    }
    FileReader::new(basebackup, CACHE_BYTES).read(&entry, 0..entry.size()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(number: u32) -> WalSegmentName {
        format!("0000000100000000{number:08X}").parse().unwrap()
    }

    #[test]
    fn a_segment_is_found_with_its_end_and_no_other() {
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let other: ClusterId = "7301234567890123457-16".parse().unwrap();
        let id: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        let end = Lsn((6 << 24) + 500);
        let wal = CarriedWal { segments: vec![CarriedSegments { first: name(4), last: name(6) }], end };
        let index = CarriedIndex::default();
        assert!(index.find(cluster, name(5)).is_empty());
        index.note(cluster, id, &wal);
        let whole = CarriedSegment { basebackup: id, end: None };
        assert_eq!(index.find(cluster, name(4)), [whole]);
        assert_eq!(index.find(cluster, name(6)), [CarriedSegment { end: Some(end), ..whole }]);
        for (cluster, segment) in [(cluster, name(3)), (cluster, name(7)), (other, name(5))] {
            assert!(index.find(cluster, segment).is_empty(), "{segment}");
        }
        let sibling = "000000020000000000000005".parse().unwrap();
        assert!(index.find(cluster, sibling).is_empty());
        // One that fills its segment ends with it; one that is noted again is known once.
        index.note(cluster, id, &CarriedWal { end: Lsn(7 << 24), ..wal });
        assert_eq!(index.find(cluster, name(6)), [whole]);
    }

    #[test]
    fn no_more_basebackups_are_remembered_than_a_site_has_use_for() {
        let cluster: ClusterId = "7301234567890123456-16".parse().unwrap();
        let index = CarriedIndex::default();
        let wal = CarriedWal {
            segments: vec![CarriedSegments { first: name(4), last: name(6) }],
            end: Lsn(7 << 24),
        };
        for n in 0..KNOWN_MAX + 7 {
            index.note(cluster, format!("20261120T101500Z-{n:04x}").parse().unwrap(), &wal);
        }
        let found = index.find(cluster, name(4));
        assert_eq!(found.len(), KNOWN_MAX);
        assert_eq!(found[0].basebackup.to_string(), format!("20261120T101500Z-{:04x}", KNOWN_MAX + 6));
    }
}
