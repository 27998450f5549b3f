//! `walden site`: setting a site up, and following its cluster over pg_upgrade.

mod init;
mod upgrade;

use clap::{Args, Subcommand};

use crate::config::{self, SiteConfig};
use crate::replication::ConnectOptions;

use super::context::Context;
use super::error::CommandError;

pub(super) use init::archive_command;

/// Sets a site up, and follows its cluster over pg_upgrade
#[derive(Debug, Args)]
pub struct Site {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Init(init::SiteInit),
    Upgrade(upgrade::SiteUpgrade),
}

impl Site {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        match &self.action {
            Action::Init(command) => command.run(context),
            Action::Upgrade(command) => command.run(context),
        }
    }
}

/// Returns how to reach each server of a site.
fn connections(context: &Context, site: &SiteConfig) -> config::Result<Vec<ConnectOptions>> {
    site.nodes.iter().map(|node| node.connect_options(&context.environment)).collect()
}
