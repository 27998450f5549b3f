//! The files of a restored server that Walden writes itself: what makes it recover, and what says where it came from.
//!
//! Settings come last of all files, when what they stand in is there: a block in `postgresql.auto.conf`, one in the
//! configuration outside PGDATA, the signal file, the plan that `wal fetch` goes by, and the marker.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::catalog::PLAN_FILE_NAME;
use crate::disk::durable::{self, Create};
use crate::repo::FileReader;
use crate::repo::entry::{Entry, Node, TreePath};
use crate::restore::Error;
use crate::restore::plan::RestorePlan;
use crate::restore::recovery_settings::{AUTO_CONF, included_folders, with_block};
use crate::restore::target::{MARKER_FILE_NAME, RestoreMarker};

/// A configuration file is read whole; the largest that anybody has are lists of rules and users.
const CONFIGURATION_BYTES_MAX: u64 = 64 << 20;

/// Writes into the data directory what makes the server recover; `auto_conf` is what `postgresql.auto.conf` says before.
pub fn write_settings(plan: &RestorePlan, auto_conf: &[u8]) -> Result<(), Error> {
    let data = &plan.destinations.data;
    let create = Create::PRIVATE_FILE.owned_by(plan.owner());
    durable::write_file(&data.join(AUTO_CONF), &with_block(auto_conf, &plan.settings, AUTO_CONF), create)?;
    durable::write_file(&data.join(plan.signal()), b"", create)?;
    durable::write_file(&data.join(PLAN_FILE_NAME), &to_json(&plan.recovery)?, create)?;
    let marker = RestoreMarker {
        format: 1,
        basebackup: plan.basebackup,
        cluster: plan.recovery.cluster,
        destinations: plan.destinations.clone(),
    };
    Ok(durable::write_file(&data.join(MARKER_FILE_NAME), &to_json(&marker)?, create)?)
}

/// Has the configuration outside PGDATA, which is there, name the new places.
pub fn write_configuration(plan: &RestorePlan) -> Result<(), Error> {
    let (Some(path), Some((_, settings))) = (main_file(plan)?, &plan.configuration) else { return Ok(()) };
    let before = fs::read(&path).map_err(Error::at("read", &path))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    for included in included_folders(&before) {
        let create = Create { mode: 0o755, ..Create::PRIVATE_DIRECTORY.owned_by(plan.owner()) };
        durable::create_dir_all(&folder.join(included), create)?;
    }
    let create = Create { mode: 0o644, ..Create::PRIVATE_FILE.owned_by(plan.owner()) };
    Ok(durable::write_file(&path, &with_block(&before, settings, ""), create)?)
}

/// Returns where the main configuration file is that is restored outside PGDATA, if it is.
pub fn main_file(plan: &RestorePlan) -> Result<Option<PathBuf>, Error> {
    let Some((main, _)) = &plan.configuration else { return Ok(None) };
    match TreePath::new(main.as_bytes()) {
        Ok(main) => plan.destinations.place(&main),
        Err(_) => Ok(None),
    }
}

/// Reads what a basebackup has of `postgresql.auto.conf`.
pub async fn stored_auto_conf(reader: &FileReader) -> Result<Vec<u8>, Error> {
    let path = tree_path(&format!("data/{AUTO_CONF}"))?;
    match reader.basebackup().entry(&path).await? {
        Some((_, entry)) if matches!(entry.node, Node::File { .. }) => read_whole(reader, &entry).await,
        _ => Ok(Vec::new()),
    }
}

/// Writes the configuration outside PGDATA, file by file; what has been written is written again.
pub async fn restore_configuration(reader: &FileReader, plan: &RestorePlan) -> Result<(), Error> {
    let Some(place) = &plan.destinations.configuration else { return Ok(()) };
    let owner = plan.owner();
    durable::create_dir_all(&place.directory, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    let mut folders = vec![tree_path("config")?];
    while let Some(folder) = folders.pop() {
        for (_, entry) in reader.basebackup().children(&folder).await? {
            let to = plan.destinations.place(&entry.path)?;
            match (&entry.node, to) {
                (Node::Directory, to) => {
                    if let Some(to) = to {
                        let create = Create { owner: Some(owner), mode: entry.mode };
                        durable::create_dir_all(&to, create)?;
                    }
                    folders.push(entry.path.clone());
                }
                (_, None) => {}
                (Node::File { .. }, Some(to)) => {
                    let create = Create { owner: Some(owner), mode: entry.mode };
                    durable::write_file(&to, &read_whole(reader, &entry).await?, create)?;
                }
                (Node::Symlink(target), Some(to)) => {
                    durable::remove_file(&to)?;
                    let target = Path::new(std::ffi::OsStr::from_bytes(target));
                    symlink(target, &to).map_err(Error::at("create link", &to))?;
                    owner.give(&to)?;
                }
            }
        }
    }
    write_configuration(plan)
}

async fn read_whole(reader: &FileReader, entry: &Entry) -> Result<Vec<u8>, Error> {
    let size = entry.size();
    if size > CONFIGURATION_BYTES_MAX {
        let what =
            format!("a configuration file of {size} bytes, and at most {CONFIGURATION_BYTES_MAX} are read");
        return Err(Error::Unfit { path: PathBuf::from(entry.path.to_string()), what });
    }
    Ok(reader.read(entry, 0..size).await?.to_vec())
}

fn tree_path(path: &str) -> Result<TreePath, Error> {
    TreePath::new(path).map_err(|error| Error::Internal(error.to_string()))
}

/// Reads a file that need not be there. What cannot be read is no reason to leave out what it says (failure 24).
pub(super) fn read_or_empty(path: &Path) -> Result<Vec<u8>, Error> {
    match fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other.map_err(Error::at("read", path)),
    }
}

/// Writes a value as a document of its own.
pub fn to_json<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| Error::Internal(error.to_string()))?;
    text.push(b'\n');
    Ok(text)
}
