//! What `push` and `fetch` need to know of the data directory they work for.
//!
//! Both are run by the server with its data directory as the current one, and are given paths below it. Which
//! cluster it is stands in `global/pg_control`, which the server rewrites in place now and then: a copy with a
//! wrong checksum was read in the middle of that and is read again.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::pg::{CONTROL_FILE_SIZE, ControlFile, ControlFileError};
use crate::repo::ClusterId;
use crate::wal::Error;

/// How often a torn control file is read again; the server writes it in one call.
const TORN_READS_MAX: u32 = 20;
const TORN_PAUSE: Duration = Duration::from_millis(10);

/// Returns the data directory whose `pg_wal` holds `path`.
pub(crate) fn of_wal_file(path: &Path) -> Result<PathBuf, Error> {
    let invalid = || Error::Path { path: path.to_owned() };
    path.file_name().ok_or_else(invalid)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).ok_or_else(invalid)?;
    // By its name, not by what it is: pg_wal may be a link to another disk.
    let data_directory = folder.parent().ok_or_else(invalid)?;
    let here = data_directory.as_os_str().is_empty();
    Ok(if here { PathBuf::from(".") } else { data_directory.to_owned() })
}

/// Reads the control file of a data directory.
pub(crate) fn read_control_file(data_directory: &Path) -> Result<ControlFile, Error> {
    let path = data_directory.join("global/pg_control");
    for attempt in 1.. {
        let bytes = read_at_most(&path, CONTROL_FILE_SIZE as u64)?;
        match ControlFile::parse(&bytes) {
            Ok(control) => return Ok(control),
            Err(ControlFileError::Checksum) if attempt < TORN_READS_MAX => thread::sleep(TORN_PAUSE),
            Err(error) => return Err(Error::ControlFile { path, error }),
        }
    }
    unreachable!("the last attempt returns")
}

/// Returns the cluster that a control file is of.
pub(crate) fn cluster_of(control: &ControlFile) -> ClusterId {
    ClusterId { system_identifier: control.system_identifier, segment_size: control.wal_segment_size }
}

/// Reads a file, at most one byte more than `length_max`, so that a longer one shows.
pub(crate) fn read_at_most(path: &Path, length_max: u64) -> Result<Vec<u8>, Error> {
    let unreadable = |source| Error::Unreadable { path: path.to_owned(), source };
    let file = File::open(path).map_err(unreadable)?;
    let length = file.metadata().map_err(unreadable)?.len().min(length_max);
    let mut bytes = Vec::with_capacity(length as usize + 1);
    file.take(length_max + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_directory_is_above_pg_wal_wherever_that_leads() {
        for (path, expected) in [
            ("pg_wal/000000010000000000000001", "."),
            ("./pg_wal/00000002.history", "."),
            ("/srv/data/pg_wal/000000010000000000000001", "/srv/data"),
        ] {
            assert_eq!(of_wal_file(Path::new(path)).unwrap(), Path::new(expected), "{path}");
        }
        for path in ["000000010000000000000001", "/", ""] {
            assert!(matches!(of_wal_file(Path::new(path)), Err(Error::Path { .. })), "{path}");
        }
    }
}
