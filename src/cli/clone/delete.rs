//! `walden clone delete`: stops a clone, lets go of its basebackup, and removes everything of it.
//! The pin is ended before the folder goes: a folder without its pin is a clone one can still delete.

use clap::Args;
use serde::Serialize;
use std::fmt::{self, Write};

use crate::config::KeyPurpose;
use crate::instance::clone_folder::CloneFolder;
use crate::mount::mounting;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::TextStyle;
use super::existing;
use super::stop::stop;

/// Stops a clone and removes everything of it
#[derive(Debug, Args)]
pub(super) struct CloneDelete {
    /// The name of the clone
    name: String,
}

#[derive(Debug, Serialize)]
struct Deleted {
    name: String,
    deleted: bool,
}

impl CloneDelete {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        context.block_on(async {
            stop(&folder).await?;
            end_pin(context, &folder).await
        })??;
        let mount_point = folder.mount_point();
        if mounting::is_mount_point(&mount_point) {
            mounting::detach(&mount_point).map_err(|error| CommandError::failed(error.to_string()))?;
        }
        std::fs::remove_dir_all(folder.path()).map_err(|error| {
            CommandError::failed(format!("could not remove \"{}\": {error}", folder.path().display()))
        })?;
        context.output.print(&Deleted { name: self.name.clone(), deleted: true })
    }
}

async fn end_pin(context: &Context, folder: &CloneFolder) -> Result<(), CommandError> {
    // A folder whose description was never written has no pin.
    let Ok(spec) = folder.read_spec() else { return Ok(()) };
    let Some(pin) = spec.pin else { return Ok(()) };
    let site = context.config()?.site(Some(&spec.site))?;
    let repository = context.open_repository(site, KeyPurpose::Read).await?;
    pin.end(&repository).await.map_err(|error| {
        CommandError::from(error).context(format!("could not let go of basebackup {}", spec.basebackup))
    })
}

impl Report for Deleted {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        writeln!(out, "clone {} is deleted", self.name)
    }
}
