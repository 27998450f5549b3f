//! `walden clone reload`: the clone's server reads its configuration files again.
//!
//! They are those in the clone's own `config` folder and postgresql.auto.conf; what keeps the clone private stands on
//! the server's command line, over both.

use std::fmt::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::control::Request;

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::TextStyle;
use super::{ask, existing};

/// Has a clone's server read its configuration files again
#[derive(Debug, Args)]
pub(super) struct CloneReload {
    /// The name of the clone
    name: String,
}

#[derive(Debug, Serialize)]
struct Reloaded {
    name: String,
    reloaded: bool,
    config_directory: PathBuf,
}

impl CloneReload {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        context.block_on_one_thread(ask(&folder, &Request::Reload))??;
        let (name, config_directory) = (self.name.clone(), folder.config());
        context.output.print(&Reloaded { name, reloaded: true, config_directory })
    }
}

impl Report for Reloaded {
    fn write_text(&self, out: &mut String, _: &TextStyle) -> fmt::Result {
        writeln!(out, "clone {} reads \"{}\" again", self.name, self.config_directory.display())
    }
}
