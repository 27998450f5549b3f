//! `walden internal …`: what the binary starts of itself in the background; not for people.
//!
//! Each is the long-running half of a command that returns (`detached` starts it), prints one document when it
//! serves, and logs from then on.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::instance::launch;

use super::context::Context;
use super::detached;
use super::error::CommandError;
use super::mount;
use super::prefetch::Prefetch;
use super::serve_clone::ServeClone;
use super::serve_restore::ServeRestore;

/// Processes that walden starts of itself
#[derive(Debug, Args)]
pub struct Internal {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Serve(Serve),
    ServeClone(ServeClone),
    ServeRestore(ServeRestore),
    Prefetch(Prefetch),
    /// Becomes a postmaster that can write nowhere but in its clone
    RunPostgres,
}

/// Serves a mount of a site
#[derive(Debug, Args)]
struct Serve {
    /// Where
    dir: PathBuf,

    /// Lets other users in
    #[arg(long)]
    allow_other: bool,
}

impl Internal {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        detached::leave_session();
        match &self.action {
            Action::Serve(serve) => mount::serve(context, &serve.dir, serve.allow_other),
            Action::ServeClone(command) => command.run(context),
            Action::ServeRestore(command) => command.run(context),
            Action::Prefetch(command) => command.run(context),
            Action::RunPostgres => Err(CommandError::failed(launch::run().to_string())),
        }
    }
}
