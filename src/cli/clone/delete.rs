//! `walden clone delete`: stops a clone, lets go of its basebackup, and removes everything of it.
//!
//! Who removes holds the clone's lock, so that nobody starts or finalizes it meanwhile. The pin is ended before the folder
//! goes: a folder without its pin is a clone one can still delete.

use clap::Args;
use serde::Serialize;
use std::fmt::{self, Write};
use std::path::Path;

use crate::config::KeyPurpose;
use crate::disk::LockFile;
use crate::instance::clone_folder::CloneFolder;
use crate::instance::finalize_plan::read_order;
use crate::instance::half_made::Making;
use crate::mount::mounting;
use crate::repo;
use crate::repo::lease::Pin;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::exit::ExitKind;
use super::super::output::Report;
use super::super::text::TextStyle;
use super::chosen::Chosen;
use super::on_its_way;
use super::stop::stop;

/// Stops a clone and removes everything of it
#[derive(Debug, Args)]
pub(super) struct CloneDelete {
    /// The name of the clone, or a pattern with * and ?
    name: String,
}

#[derive(Debug, Serialize)]
struct Deleted {
    name: String,
    deleted: bool,
}

#[derive(Debug, Serialize)]
struct SeveralDeleted {
    deleted: Vec<String>,
}

impl CloneDelete {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let chosen = Chosen::find(context, &self.name)?;
        chosen.each(
            "deleted",
            |folder| delete(context, folder),
            |deleted| match chosen.are_several {
                true => context.output.print(&SeveralDeleted { deleted }),
                false => context.output.print(&Deleted { name: self.name.clone(), deleted: true }),
            },
        )
    }
}

/// Stops a clone and removes everything of it; returns its name.
pub(super) fn delete(context: &Context, folder: &CloneFolder) -> Result<String, CommandError> {
    refuse_begun(folder)?;
    context.block_on_one_thread(stop(folder))??;
    let lock = context.block_on_one_thread(folder.lock_to_work())??;
    remove(context, folder, &lock)?;
    Ok(folder.name().to_owned())
}

/// Removes everything of a clone that does not run, for who holds its lock: what may be done is looked at only now.
pub(super) fn remove(context: &Context, folder: &CloneFolder, _lock: &LockFile) -> Result<(), CommandError> {
    refuse_begun(folder)?;
    // It may be refused, so it comes before anything is given up.
    detach_dead_mount(folder)?;
    context.block_on(end_pin(context, folder))??;
    Ok(folder.remove()?)
}

/// Removes a clone of what turned out to be damaged before its server was started: there is nothing to look at, and no
/// start will do better. One that failed otherwise stays, with its logs.
pub(super) fn take_back(context: &Context, folder: &CloneFolder, error: CommandError) -> CommandError {
    if error.kind != ExitKind::Damaged || has_text(&folder.server_log()) {
        return error;
    }
    if let Err(left) = delete(context, folder) {
        tracing::warn!("the clone that did not start could not be removed: {}", left.error);
    }
    error
}

fn has_text(log: &Path) -> bool {
    std::fs::metadata(log).is_ok_and(|metadata| metadata.len() > 0)
}

/// Refuses a clone that is on its way to be a data directory, once anything of it is there: it would be lost.
fn refuse_begun(folder: &CloneFolder) -> Result<(), CommandError> {
    match read_order(folder)? {
        Some(order) if order.has_begun() => Err(on_its_way(folder)),
        _ => Ok(()),
    }
}

/// Takes away the mount that a killed supervisor has left, as soon as nobody has anything of it open.
pub(super) fn detach_dead_mount(folder: &CloneFolder) -> Result<(), CommandError> {
    let mount_point = folder.mount_point();
    if !mounting::is_mount_point(&mount_point) {
        return Ok(());
    }
    mounting::detach_dead(&mount_point).map_err(|error| {
        let hint = error.hint();
        CommandError { hint, ..CommandError::failed(error.to_string()) }
    })
}

async fn end_pin(context: &Context, folder: &CloneFolder) -> Result<(), CommandError> {
    let spec = match folder.read_spec() {
        // One that was never made may hold it all the same.
        Err(error) if error.is_not_found() => {
            let Some(making) = Making::read(folder)? else { return Ok(()) };
            let site = context.config()?.site(Some(&making.site))?;
            let repository = context.open_repository(site, KeyPurpose::Read).await?;
            return making.end(&repository).await.map_err(|error| held_on(error, &making.pin));
        }
        read => read.map_err(|error| {
            CommandError::from(error)
                .context("it cannot be told which basebackup the clone holds")
                .hint(format!(
                    "Delete it with the release of Walden that made it; who removes \"{}\" by hand leaves the basebackup held.",
                    folder.path().display()
                ))
        })?,
    };
    let Some(pin) = spec.pin else { return Ok(()) };
    let_go(context, &spec.site, &pin).await
}

/// Lets go of a basebackup.
pub(super) async fn let_go(context: &Context, site: &str, pin: &Pin) -> Result<(), CommandError> {
    let site = context.config()?.site(Some(site))?;
    let repository = context.open_repository(site, KeyPurpose::Read).await?;
    pin.end(&repository).await.map_err(|error| held_on(error, pin))
}

fn held_on(error: repo::Error, pin: &Pin) -> CommandError {
    CommandError::from(error).context(format!("could not let go of basebackup {}", pin.id))
}

impl Report for Deleted {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        writeln!(out, "clone {} is deleted", self.name)
    }
}

impl Report for SeveralDeleted {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        self.deleted.iter().try_for_each(|name| writeln!(out, "clone {name} is deleted"))
    }
}
