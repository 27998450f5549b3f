//! `walden clone restart`: a stop and a start, with what the clone holds between them on stable storage.
//! One that does not run is started.

use clap::Args;

use crate::instance::clone_folder::CloneFolder;

use super::super::context::Context;
use super::super::error::CommandError;
use super::chosen::Chosen;
use super::expired::refuse_over;
use super::refuse_finalizing;
use super::start::start_and_tell;
use super::stop::stop;

/// Stops a clone and starts it again
#[derive(Debug, Args)]
pub(super) struct CloneRestart {
    /// The name of the clone, or a pattern with * and ?
    name: String,
}

impl CloneRestart {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let chosen = Chosen::find(context, &self.name)?;
        let restart = |folder: &CloneFolder| {
            // What could not be started again is not taken from those who use it.
            refuse_finalizing(folder)?;
            refuse_over(context, folder)?;
            context.block_on_one_thread(stop(folder))??;
            start_and_tell(context, folder)
        };
        chosen.each("restarted", restart, |restarted| chosen.print(context, restarted))
    }
}
