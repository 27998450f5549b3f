//! `walden site upgrade`: the server's new system identifier becomes one more cluster of the site.
//! It needs no key, writes one small object, and can be run again.

use std::fmt::{self, Write};

use clap::Args;
use serde::Serialize;

use crate::config::KeyPurpose;
use crate::site::{UpgradeError, Upgraded, upgrade};

use super::super::context::Context;
use super::super::error::CommandError;
use super::super::exit::ExitKind;
use super::super::output::Report;
use super::super::text::TextStyle;
use super::connections;

/// Accepts the server's new system identifier, after pg_upgrade or a new initdb
#[derive(Debug, Args)]
pub(super) struct SiteUpgrade {}

impl SiteUpgrade {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let nodes = connections(context, site)?;
        let upgraded = context.block_on_one_thread(async {
            let repository = context.open_repository(site, KeyPurpose::Inspect).await?;
            Ok::<_, CommandError>(upgrade(&repository, &nodes).await?)
        })??;
        context.output.print(&UpgradeReport::of(upgraded))
    }
}

/// What `site upgrade` prints.
#[derive(Debug, Serialize)]
struct UpgradeReport {
    cluster: String,
    server_version: String,
    accepted: bool,
    other_clusters: Vec<String>,
}

impl UpgradeReport {
    fn of(upgraded: Upgraded) -> Self {
        Self {
            cluster: upgraded.cluster.to_string(),
            server_version: upgraded.version,
            accepted: upgraded.is_new,
            other_clusters: upgraded.others.iter().map(ToString::to_string).collect(),
        }
    }
}

impl Report for UpgradeReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        let Self { cluster, server_version, .. } = self;
        if !self.accepted {
            return writeln!(out, "cluster {cluster} (PostgreSQL {server_version}) was accepted before");
        }
        writeln!(out, "cluster {cluster} (PostgreSQL {server_version}) is now of this site")?;
        for other in &self.other_clusters {
            writeln!(out, "cluster {other} stays: it can go on archiving, and its backups can be restored")?;
        }
        writeln!(out, "Take a basebackup now: those of another cluster do not help this one.")
    }
}

impl From<UpgradeError> for CommandError {
    fn from(error: UpgradeError) -> Self {
        match error {
            UpgradeError::NoNode => Self::new(ExitKind::Configuration, error.to_string())
                .hint("Set connection = \"…\" in the site's configuration."),
            UpgradeError::Server(error) => crate::backup::Error::from(error).into(),
            UpgradeError::Repository(error) => error.into(),
        }
    }
}
