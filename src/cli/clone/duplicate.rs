//! `walden clone duplicate`: a second clone of the same basebackup at the same target, without the first one's changes.
//! It has a folder, a socket, a pin and a port of its own.

use clap::Args;

use crate::config::KeyPurpose;
use crate::instance::clone_folder::CloneFolder;
use crate::instance::duplicate::duplicate;

use super::super::context::Context;
use super::super::error::CommandError;
use super::delete::take_back;
use super::start::start_and_tell;
use super::status::StatusReport;
use super::{existing, status_of};

/// Makes another clone like one was when it was made
#[derive(Debug, Args)]
pub(super) struct CloneDuplicate {
    /// The name of the clone
    name: String,

    /// The name of the new one: letters, digits, - and _
    new: String,

    /// The port in the name of its socket; else the first above those of all clones
    #[arg(long, value_name = "P")]
    port: Option<u16>,

    /// Makes the clone without starting it
    #[arg(long)]
    no_start: bool,
}

impl CloneDuplicate {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        let config = context.config()?;
        let clones = config.paths.open_clones()?;
        let new = CloneFolder::new(&clones.path, &self.new)
            .map_err(|error| CommandError::usage(error.to_string()))?;
        let port = match self.port {
            Some(port) => port,
            None => free_port(&CloneFolder::list(&clones.path)?),
        };
        let site = config.site(Some(&folder.read_spec()?.site))?;
        context.block_on(async {
            let repository = context.open_repository(site, KeyPurpose::Read).await?;
            Ok::<_, CommandError>(duplicate(&repository, &folder, &new, port).await?)
        })??;
        let status = match self.no_start {
            true => context.block_on_one_thread(status_of(&new))??,
            false => start_and_tell(context, &new).map_err(|error| take_back(context, &new, error))?,
        };
        context.output.print(&StatusReport(status))
    }
}

/// Returns a port that no clone has; one that cannot be read has none that counts.
fn free_port(clones: &[CloneFolder]) -> u16 {
    let ports = clones.iter().filter_map(|folder| folder.read_spec().ok()).map(|spec| spec.port);
    // Each socket is in a folder of its own: a port that is used again is in nobody's way.
    ports.max().and_then(|port| port.checked_add(1)).unwrap_or(u16::MAX)
}
