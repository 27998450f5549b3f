//! `walden site init`: the site in the store, the lines for `postgresql.conf`, and the first `check`.
//!
//! Can be run again at any time: what is there is left as it is, and said to be. A check that fails is no failure of
//! `init`, because the first one runs before the server has its settings.

use std::fmt::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::backup::ServerFacts;
use crate::config::{SiteConfig, WalSource};
use crate::replication::{ConnectOptions, Session};
use crate::site::{ArchiveCommand, Item, Setting, Status, cluster_of, wanted_settings};

use super::super::check::{CheckReport, WAL_SECONDS_DEFAULT, check_all};
use super::super::context::Context;
use super::super::error::CommandError;
use super::super::output::Report;
use super::super::text::TextStyle;
use super::connections;

/// Creates the site in the store, shows what postgresql.conf needs, and checks everything
#[derive(Debug, Args)]
pub(super) struct SiteInit {
    /// How long a WAL segment may take to be in the archive, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = WAL_SECONDS_DEFAULT)]
    wal_timeout: u32,
}

impl SiteInit {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        context.warn_of_missing_protection()?;
        let command = match site.wal {
            WalSource::Push => Some(archive_command(context, site)?),
            // It makes its slot itself, on whichever server of the site is the primary then.
            WalSource::Receive => None,
        };
        let nodes = connections(context, site)?;
        let patience = Duration::from_secs(self.wal_timeout.into());
        let report = context.block_on(async {
            let (repository, created) = context.create_repository(site).await?;
            let facts = first_facts(&nodes).await;
            if let Some(facts) = &facts {
                repository.admit(cluster_of(facts)).await?;
            }
            Ok::<_, CommandError>(InitReport {
                site: site.name.clone(),
                uuid: repository.site().to_string(),
                storage: site.storage.location.to_string(),
                created,
                cluster: facts.as_ref().map(|facts| cluster_of(facts).to_string()),
                settings: wanted_settings(command.as_ref(), facts.as_ref()),
                check: check_all(context, site, patience).await?,
            })
        })??;
        context.end_progress();
        context.output.print(&report)
    }
}

/// Returns the command by which a server archives into a site.
pub(in crate::cli) fn archive_command(
    context: &Context,
    site: &SiteConfig,
) -> Result<ArchiveCommand, CommandError> {
    let failed =
        |what: &str, error: std::io::Error| CommandError::failed(format!("could not find {what}: {error}"));
    let binary = std::env::current_exe().map_err(|error| failed("the running binary", error))?;
    let file = &context.config()?.file;
    let configuration: PathBuf =
        std::path::absolute(file).map_err(|error| failed("the configuration file", error))?;
    Ok(ArchiveCommand { binary, configuration, site: site.name.clone() })
}

/// Asks the first server that answers; why another does not is told by the check that follows.
async fn first_facts(nodes: &[ConnectOptions]) -> Option<ServerFacts> {
    for node in nodes {
        let Ok(session) = Session::connect(node).await else { continue };
        if let Ok(facts) = ServerFacts::gather(&session).await {
            return Some(facts);
        }
    }
    None
}

/// What `site init` prints.
#[derive(Debug, Serialize)]
struct InitReport {
    site: String,
    uuid: String,
    storage: String,
    created: bool,
    cluster: Option<String>,
    settings: Vec<Setting>,
    check: Vec<Item>,
}

impl Report for InitReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let Self { site, storage, .. } = self;
        let done = if self.created { "is created" } else { "was there before, and is left as it is" };
        writeln!(out, "site \"{site}\" in {storage} {done}")?;
        if let Some(cluster) = &self.cluster {
            writeln!(out, "it is of cluster {cluster}")?;
        }
        writeln!(out, "\npostgresql.conf needs")?;
        for setting in &self.settings {
            writeln!(out, "  {}", setting.line())?;
        }
        let changed = |takes: &str| {
            let names: Vec<&str> = self
                .settings
                .iter()
                .filter(|setting| setting.takes == takes)
                .map(|setting| setting.name)
                .collect();
            names.join(", ")
        };
        let (restart, reload) = (changed("restart"), changed("reload"));
        match (restart.is_empty(), reload.is_empty()) {
            (true, true) => writeln!(out, "which are in force.")?,
            (true, false) => writeln!(out, "and a reload, for {reload}.")?,
            (false, _) => writeln!(out, "and a restart of the server, for {restart}.")?,
        }
        writeln!(out)?;
        let check = CheckReport { items: self.check.clone() };
        check.write_text(out, style)?;
        let failed = check.count(Status::Failed);
        if failed > 0 {
            writeln!(out, "\n{failed} checks failed; `walden check` repeats them.")?;
        }
        Ok(())
    }
}
