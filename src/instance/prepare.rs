//! What a clone's data directory is given before its first start, and what a killed server has left before others.
//!
//! Links, signal file and marker come once, in that order: the marker says that the rest has been done. Runs on a thread
//! that may block, because it goes through the clone's own mount.

use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::disk::durable::{self, Create};
use crate::disk::{CloneMarker, Owner};
use crate::instance::clone_folder::{CloneFolder, CloneSpec};
use crate::instance::supervise::SuperviseError;
use crate::pg::{ControlFile, RECOVERY_SIGNAL, STANDBY_SIGNAL};

/// Makes the data directory the clone's own, once, and reads its control file.
pub(super) fn prepare(folder: &CloneFolder, spec: &CloneSpec) -> Result<ControlFile, SuperviseError> {
    let data = folder.data_directory();
    let owner = Owner { uid: spec.owner.0, gid: spec.owner.1 };
    let step = |action, path: &Path| {
        let path = path.display().to_string();
        move |source| SuperviseError::Prepare { action, path, source }
    };
    let pid_file = data.join("postmaster.pid");
    if CloneMarker::detect(&data)?.is_none() {
        let wal = data.join("pg_wal");
        std::fs::remove_dir_all(&wal).map_err(step("remove", &wal))?;
        symlink(folder.pg_wal(), &wal).map_err(step("link", &wal))?;
        for name in [STANDBY_SIGNAL, "tablespace_map"] {
            remove_if_there(&data.join(name)).map_err(step("remove", &data.join(name)))?;
        }
        durable::write_file(&data.join(RECOVERY_SIGNAL), b"", Create::PRIVATE_FILE.owned_by(owner))?;
        // Last: it says that everything above has been done.
        let marker = CloneMarker {
            name: spec.name.clone(),
            site: spec.site.clone(),
            basebackup: spec.basebackup.to_string(),
        };
        marker.write(&data, Create { mode: 0o600, owner: Some(owner) })?;
    } else {
        // Whoever wrote them died with the last supervisor: the lock is ours.
        // Left empty by a kill, or with the number of a process that is somebody else's by now, each keeps a server from starting.
        let socket_lock = folder.run().join(format!(".s.PGSQL.{}.lock", spec.port));
        for file in [pid_file, socket_lock] {
            remove_if_there(&file).map_err(step("remove", &file))?;
        }
    }
    let control = data.join("global/pg_control");
    let bytes = std::fs::read(&control).map_err(step("read", &control))?;
    Ok(ControlFile::parse(&bytes)?)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
