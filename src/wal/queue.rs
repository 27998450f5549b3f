//! The WAL that waits for the archive, and the limit that the administrator has set to it.
//!
//! PostgreSQL keeps what is not archived, for ever: when the store fails for long the volume of `pg_wal` fills, and the
//! server ends. With a limit the server lives on and the archive gets a gap; which of the two is worse is not ours
//! to say, so that there is none by default. Decided here; what is left out is noted by `left_out`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::disk::CloneMarker;
use crate::pg::{ArchiveFileName, WalSegmentSize};
use crate::repo::ClusterId;
use crate::wal::Error;
use crate::wal::data_directory::{cluster_of, of_wal_file, read_control_file};

/// The WAL of a data directory that waits for the archive.
#[derive(Debug)]
pub struct WalQueue {
    data_directory: PathBuf,
    cluster: ClusterId,
    max_bytes: u64,
}

/// More waits than may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overflow {
    /// Segments that wait.
    pub segments: u64,
    /// What they take on their volume.
    pub bytes: u64,
    /// What they may take.
    pub max_bytes: u64,
}

const READY: &str = ".ready";
/// So many segments may wait whatever the limit is: a server in good health has some waiting, and a limit below that
/// is a slip of the unit.
const SEGMENTS_MIN: u64 = 4;

impl WalQueue {
    /// Looks whose queue it is that `path` (`pg_wal/NAME` of a data directory) is in.
    ///
    /// # Errors
    /// `Clone` where it is a clone's: it archives nothing, so that nothing of it is left out.
    pub fn of(path: &Path, max_bytes: u64) -> Result<Self, Error> {
        let data_directory = of_wal_file(path)?;
        if let Some(marker) = CloneMarker::detect(&data_directory)? {
            return Err(Error::Clone { path: data_directory, name: marker.name });
        }
        let cluster = cluster_of(&read_control_file(&data_directory)?);
        Ok(Self { data_directory, cluster, max_bytes })
    }

    /// Returns the cluster that writes it.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Counts what waits, and returns it where that is more than may.
    pub fn overflow(&self) -> io::Result<Option<Overflow>> {
        let mut segments = 0;
        for entry in fs::read_dir(self.data_directory.join("pg_wal/archive_status"))? {
            let name = entry?.file_name();
            let ready = name.to_str().and_then(|name| name.strip_suffix(READY)).map(str::parse);
            // The other kinds are some lines of text.
            if let Some(Ok(ArchiveFileName::Segment(_) | ArchiveFileName::Partial(_))) = ready {
                segments += 1;
            }
        }
        Ok(overflow(segments, self.cluster.segment_size, self.max_bytes))
    }
}

fn overflow(segments: u64, size: WalSegmentSize, max_bytes: u64) -> Option<Overflow> {
    let bytes = segments.saturating_mul(size.bytes().into());
    (segments > SEGMENTS_MIN && bytes > max_bytes).then_some(Overflow { segments, bytes, max_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_one_of_bytes_and_never_below_some_segments() {
        let size = |mebibytes: u32| WalSegmentSize::new(mebibytes << 20).unwrap();
        for (segments, mebibytes, max_mebibytes, over) in [
            (0, 16, 0, false),
            (4, 16, 1, false),
            (5, 16, 1, true),
            (64, 16, 1024, false),
            (65, 16, 1024, true),
            (1024, 1, 1024, false),
            (1025, 1, 1024, true),
            (4, 1024, 1024, false),
        ] {
            let found = overflow(segments, size(mebibytes), max_mebibytes << 20);
            assert_eq!(found.is_some(), over, "{segments} × {mebibytes} MiB, {max_mebibytes} MiB may wait");
            if let Some(found) = found {
                assert_eq!(found.bytes, segments * (u64::from(mebibytes) << 20));
            }
        }
    }
}
