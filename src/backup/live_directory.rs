//! The files of a running server by which its directory is recognised: `pg_control` and `postmaster.pid`.
//!
//! The server overwrites `pg_control` in place, so a read may see half of two states; its CRC tells, and it is read
//! again. Everything here blocks and is short. Deliberately absent: judging, which `server_identity` does.

use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use crate::backup::data_directory::mode_and_time;
use crate::backup::error::Error;
use crate::backup::server_identity::DirectoryIdentity;
use crate::backup::source_file::FileState;
use crate::pg::{ClusterState, ControlFile, ControlFileError, PostmasterPid, TimelineHistory, TimelineId};

/// Before each further look at a `pg_control` whose CRC is wrong.
const WAITS: [Duration; 5] = [
    Duration::from_millis(1),
    Duration::from_millis(10),
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_millis(1000),
];
/// A history file has a line for each ancestor; the server has no limit, this is thousands.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

/// Reads `pg_control` until its CRC is right.
pub fn read_control_file(data_directory: &Path) -> Result<(Bytes, FileState, ControlFile), Error> {
    let path = data_directory.join("global/pg_control");
    let mut waits = WAITS.iter();
    loop {
        let bytes = fs::read(&path).map_err(Error::reading("read", &path))?;
        let (mode, modified) = mode_and_time(&fs::metadata(&path).map_err(Error::reading("look up", &path))?);
        match (ControlFile::parse(&bytes), waits.next()) {
            (Ok(control), _) => {
                let state = FileState { size: bytes.len() as u64, mode, modified, identity: None };
                return Ok((bytes.into(), state, control));
            }
            (Err(ControlFileError::Checksum), Some(wait)) => thread::sleep(*wait),
            (Err(error), _) => return Err(Error::ControlFile { path, source: error }),
        }
    }
}

/// Reads what tells which server a directory belongs to.
pub fn read_identity(data_directory: &Path) -> Result<DirectoryIdentity, Error> {
    let (_, _, control) = read_control_file(data_directory)?;
    let path = data_directory.join("postmaster.pid");
    let postmaster = match fs::read_to_string(&path) {
        Ok(text) => PostmasterPid::parse(&text).ok(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(Error::reading("read", &path)(error)),
    };
    let real = fs::canonicalize(data_directory).map_err(Error::reading("find", data_directory))?;
    Ok(DirectoryIdentity {
        data_directory: real,
        system_identifier: control.system_identifier,
        in_recovery: control.state == ClusterState::InArchiveRecovery,
        postmaster,
    })
}

/// Reads the timeline history files that a server has, for its archive may lack them.
pub fn read_histories(data_directory: &Path) -> Result<Vec<(TimelineHistory, Bytes)>, Error> {
    let folder = data_directory.join("pg_wal");
    let mut histories = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::reading("list", &folder))? {
        let path = entry.map_err(Error::reading("list", &folder))?.path();
        let Some(timeline) = path.file_name().and_then(|name| timeline_of(name.to_str()?)) else {
            continue;
        };
        let text = match fs::metadata(&path).and_then(|metadata| {
            if metadata.len() > HISTORY_BYTES_MAX { Ok(String::new()) } else { fs::read_to_string(&path) }
        }) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::reading("read", &path)(error)),
        };
        match TimelineHistory::parse(timeline, &text) {
            Ok(history) => histories.push((history, Bytes::from(text))),
            Err(error) => tracing::warn!("\"{}\" is left out: {error}", path.display()),
        }
    }
    Ok(histories)
}

/// Returns the timeline whose history file is called `name`.
fn timeline_of(name: &str) -> Option<TimelineId> {
    let digits = name.strip_suffix(".history")?;
    let timeline = TimelineId::new(u32::from_str_radix(digits, 16).ok()?)?;
    (timeline.hex8() == digits).then_some(timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_are_found_by_their_names_and_broken_ones_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("pg_wal");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("00000002.history"), "1\t0/3000000\tno recovery target specified\n").unwrap();
        fs::write(folder.join("00000003.history"), "nonsense").unwrap();
        fs::write(folder.join("2.history"), "1\t0/3000000\tx\n").unwrap();
        fs::write(folder.join("000000010000000000000001"), "x").unwrap();
        let histories = read_histories(dir.path()).unwrap();
        assert_eq!(histories.len(), 1);
        assert_eq!(histories[0].0.timeline, TimelineId::new(2).unwrap());
    }

    #[test]
    fn a_control_file_that_stays_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("global")).unwrap();
        fs::write(dir.path().join("global/pg_control"), [0; 8192]).unwrap();
        let error = read_control_file(dir.path()).unwrap_err();
        assert!(error.to_string().contains("global/pg_control"), "{error}");
    }
}
