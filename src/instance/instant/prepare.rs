//! What a directory is given once, while nothing is mounted over it: its settings, and a pg_wal of its own.
//!
//! Files that stand in the upper hide those of the basebackup, so they are written beneath, as any restore writes them, and
//! nothing of it goes through the mount. A mark in the private area says that all of this has been done: a server that has
//! run since has its own word on them.

use std::path::Path;

use crate::disk::durable::{self, Create};
use crate::instance::instant::InstantError;
use crate::instance::instant::unfinished::area_of;
use crate::repo::FileReader;
use crate::restore::plan::RestorePlan;
use crate::restore::settings_files::{restore_configuration, stored_auto_conf, write_settings};

/// Says that the directory has what only it has.
const PREPARED_FILE: &str = "prepared";

/// Prepares the data directory, unless that has been done; its upper is open, and nothing is mounted.
pub(super) async fn prepare(reader: &FileReader, plan: &RestorePlan) -> Result<(), InstantError> {
    let data = &plan.destinations.data;
    let mark = area_of(data).join(PREPARED_FILE);
    if mark.exists() {
        return Ok(());
    }
    let directory = Create::PRIVATE_DIRECTORY.owned_by(plan.owner());
    for folder in ["pg_wal", "pg_wal/archive_status"] {
        durable::create_dir(&data.join(folder), directory)?;
    }
    restore_configuration(reader, plan).await?;
    write_settings(plan, &stored_auto_conf(reader).await?)?;
    Ok(durable::write_file(&mark, b"", Create::PRIVATE_FILE)?)
}

/// Removes the word of a server that is gone: nobody has a file open here, and its number may be another's now.
pub(super) fn forget_dead_server(beneath: &Path) -> Result<(), InstantError> {
    Ok(durable::remove_file(&beneath.join("postmaster.pid"))?)
}
