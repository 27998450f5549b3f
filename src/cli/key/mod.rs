//! `walden key`: the keys that backups are encrypted and signed with.

mod create;
mod list;

use clap::{Args, Subcommand};

use super::context::Context;
use super::error::CommandError;

/// Creates and lists the keys that encrypt and sign backups
#[derive(Debug, Args)]
pub(super) struct Key {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Create(create::KeyCreate),
    List(list::KeyList),
}

impl Key {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        match &self.action {
            Action::Create(command) => command.run(context),
            Action::List(command) => command.run(context),
        }
    }
}

/// Creates a key in `folder` and returns the lines that make it known, for tests of what reads them.
#[cfg(test)]
pub(super) fn create_in(folder: &std::path::Path, id: &str, bits: u32) -> Result<String, CommandError> {
    create::create_in(folder, id, bits).map(|key| key.configuration)
}
