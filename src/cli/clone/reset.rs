//! `walden clone reset`: what was changed in a clone goes, and it recovers again to the same target.
//! Killed on the way it goes on at the clone's next start; the basebackup stays pinned all the while.

use clap::Args;

use crate::instance::reset;

use super::super::context::Context;
use super::super::error::CommandError;
use super::delete::detach_dead_mount;
use super::expired::refuse_over;
use super::start::start_and_tell;
use super::status::StatusReport;
use super::stop::stop;
use super::{existing, refuse_finalizing, status_of};

/// Brings a clone back to the state of its creation
#[derive(Debug, Args)]
pub(super) struct CloneReset {
    /// The name of the clone
    name: String,

    /// Leaves the clone stopped
    #[arg(long)]
    no_start: bool,
}

impl CloneReset {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let folder = existing(context, &self.name)?;
        // What could not be started again is not taken from those who use it.
        refuse_finalizing(&folder)?;
        refuse_over(context, &folder)?;
        let spec = folder.read_spec()?;
        context.block_on_one_thread(stop(&folder))??;
        {
            let _lock = context.block_on_one_thread(folder.lock_to_work())??;
            // Between the first look and the lock somebody may have begun to finalize it.
            refuse_finalizing(&folder)?;
            detach_dead_mount(&folder)?;
            reset::begin(&folder)?;
            reset::complete(&folder, &spec)?;
        }
        let status = match self.no_start {
            true => context.block_on_one_thread(status_of(&folder))??,
            false => start_and_tell(context, &folder)?,
        };
        context.output.print(&StatusReport(status))
    }
}
