//! Brings a clone back to the state of its creation: what was changed goes, and recovery begins again.
//!
//! A mark in the folder comes first and goes last, so that whoever starts the clone next finishes what a kill has left
//! of it. Basebackup, plan, target and pin stay; so do the logs. Only for who holds the folder's lock.

use std::path::PathBuf;

use crate::disk::durable::{self, Create};
use crate::disk::{self, Owner};
use crate::instance::clone_folder::{CloneFolder, CloneSpec, LastHydration};
use crate::instance::create::write_places;
use crate::instance::places::remove;

/// Begins: from now on nothing of what was changed counts.
pub fn begin(folder: &CloneFolder) -> Result<(), disk::Error> {
    durable::write_file(&mark(folder), b"", Create::PRIVATE_FILE)
}

/// Ends what was begun, if something was.
pub fn complete(folder: &CloneFolder, spec: &CloneSpec) -> Result<(), disk::Error> {
    if !mark(folder).exists() {
        return Ok(());
    }
    let owner = Owner { uid: spec.owner.0, gid: spec.owner.1 };
    for directory in [folder.upper(), folder.pg_wal(), folder.stand_ins()] {
        remove(&directory)?;
        durable::create_dir(&directory, Create::PRIVATE_DIRECTORY.owned_by(owner))?;
    }
    write_places(folder, spec, owner)?;
    folder.write_hydration(&LastHydration::default())?;
    durable::remove_file(&mark(folder))
}

fn mark(folder: &CloneFolder) -> PathBuf {
    folder.path().join("resetting")
}
