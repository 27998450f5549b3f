//! `walden clone status` and `walden clone list`.
//! Field names of the JSON are those of `control::CloneStatus`, which scripts rely on.

use std::fmt::{self, Write};

use clap::Args;
use serde::Serialize;

use crate::control::CloneStatus;
use crate::instance::clone_folder::CloneFolder;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::{Align, TextStyle, TextTable, size};
use super::{existing, status_of};

/// Shows how a clone is
#[derive(Debug, Args)]
pub(super) struct CloneStatusCommand {
    /// The name of the clone
    name: String,
}

/// Shows the clones of this host
#[derive(Debug, Args)]
pub(super) struct CloneList {}

impl CloneStatusCommand {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        let status = context.block_on_one_thread(status_of(&folder))??;
        context.output.print(&StatusReport(status))
    }
}

impl CloneList {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folders = CloneFolder::list(&context.config()?.paths.clones)?;
        let clones = context.block_on_one_thread(async {
            let mut clones = Vec::new();
            for folder in &folders {
                clones.push(status_of(folder).await?);
            }
            Ok::<_, CommandError>(clones)
        })??;
        context.output.print(&ListReport { clones })
    }
}

/// How one clone is.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct StatusReport(pub CloneStatus);

#[derive(Debug, Serialize)]
struct ListReport {
    clones: Vec<CloneStatus>,
}

impl Report for StatusReport {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        let status = &self.0;
        writeln!(out, "clone {} is {}", status.name, status.state)?;
        if let Some(message) = &status.message {
            writeln!(out, "  because       {message}")?;
        }
        writeln!(
            out,
            "  basebackup    {} of site {}, recovered to {}",
            status.basebackup, status.site, status.target
        )?;
        writeln!(out, "  data          {}", status.data_directory.display())?;
        for warning in &status.warnings {
            writeln!(out, "  warning       {warning}")?;
        }
        let (socket, port, user) = (status.socket_directory.display(), status.port, &status.superuser);
        writeln!(out, "  connect       psql -h {socket} -p {port} -U {user}")?;
        if !status.settings.is_empty() {
            let (count, name) = (status.settings.len(), &status.name);
            writeln!(
                out,
                "  settings      {count} differ from the source's: see walden --output json clone status {name}"
            )?;
        }
        if let Some(seconds) = status.seconds_to_ready {
            let (fetched, total) = (size(status.bytes_fetched), size(status.total_bytes));
            writeln!(out, "  first answer  after {seconds:.2} s")?;
            writeln!(out, "  fetched       {fetched} in {} requests, of {total}", status.requests)?;
        }
        Ok(())
    }
}

impl Report for ListReport {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        let mut table = TextTable::new(&[
            ("name", Align::Left),
            ("state", Align::Left),
            ("basebackup", Align::Left),
            ("target", Align::Left),
            ("socket", Align::Left),
            ("port", Align::Right),
        ]);
        for clone in &self.clones {
            table.row([
                clone.name.clone(),
                clone.state.to_string(),
                clone.basebackup.clone(),
                clone.target.clone(),
                clone.socket_directory.display().to_string(),
                clone.port.to_string(),
            ]);
        }
        if table.is_empty() {
            return writeln!(out, "there is no clone on this host");
        }
        table.write(out);
        Ok(())
    }
}
