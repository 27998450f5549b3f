//! `walden check`: every setting, right and connection that backups rest on, one line each.
//!
//! this host → its keys → the store → the site → each server → the way of a WAL segment. Nothing is changed: what is
//! written to the store is removed, and the WAL segment that is ended would have been ended anyway.

mod host;
mod keys;
mod left_out;
mod receiver;

use std::fmt::{self, Write};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::codec::SystemRandom;
use crate::config::{KeyPurpose, SiteConfig, WalSource};
use crate::repo::Repository;
use crate::repo::layout::Layout;
use crate::site::{
    CheckedServer, Item, NodeOptions, Status, check_cluster, check_server, check_store, check_wal_round_trip,
    cluster_of,
};

use super::context::Context;
use super::error::CommandError;
use super::output::Report;
use super::text::TextStyle;

/// How long one request to the store is repeated: somebody waits for the answer, and another try is one command away.
const STORE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a segment may take to the archive and back, unless told otherwise.
pub(super) const WAL_SECONDS_DEFAULT: u32 = 60;

/// Checks configuration, keys, store, servers and a WAL round trip, one line each
#[derive(Debug, Args)]
pub struct Check {
    /// How long a WAL segment may take to be in the archive, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = WAL_SECONDS_DEFAULT)]
    wal_timeout: u32,
}

impl Check {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let patience = Duration::from_secs(self.wal_timeout.into());
        let report = CheckReport { items: context.block_on(check_all(context, site, patience))?? };
        context.end_progress();
        context.output.print(&report)?;
        match report.count(Status::Failed) {
            0 => Ok(()),
            failed => {
                let all = report.items.len();
                Err(CommandError::failed(format!(
                    "{failed} of {all} checks of site \"{}\" failed",
                    site.name
                )))
            }
        }
    }
}

/// What `walden check` prints: as JSON a plain list.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct CheckReport {
    pub(super) items: Vec<Item>,
}

impl CheckReport {
    /// Counts the items of a status.
    pub(super) fn count(&self, status: Status) -> usize {
        self.items.iter().filter(|item| item.status == status).count()
    }
}

impl Report for CheckReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        let width = self.items.iter().map(|item| item.name.chars().count()).max().unwrap_or(0);
        for item in &self.items {
            writeln!(out, "{:<7}  {:<width$}  {}", item.status.name(), item.name, item.detail)?;
            if let Some(hint) = &item.hint {
                writeln!(out, "{:<7}  {:<width$}  hint: {hint}", "", "")?;
            }
        }
        Ok(())
    }
}

/// Checks everything; an error only where there is no configuration to check.
pub(super) async fn check_all(
    context: &Context,
    site: &SiteConfig,
    patience: Duration,
) -> Result<Vec<Item>, CommandError> {
    let config = context.config()?;
    let mut items = host::check_host(config);
    let (key_items, usable) = keys::check_keys(config);
    items.extend(key_items);
    let repository = check_repository(context, site, usable.reads, &mut items).await;
    items.extend(left_out::check_left_out(config, site, repository.as_ref()).await);
    items.extend(receiver::check_receiver(config, site, repository.as_ref(), context.clock().now()).await);
    let archives = if usable.writes { repository.as_ref() } else { None };
    if site.nodes.is_empty() {
        items.push(Item::skipped("connection", "the site has no server; this host only reads backups"));
    }
    for (n, node) in site.nodes.iter().enumerate() {
        let number = (site.nodes.len() > 1).then_some(n + 1);
        let options = NodeOptions {
            connection: node.connect_options(&context.environment)?,
            source: site.backup_source,
            data_directory: site.data_directory.clone(),
            site: site.name.clone(),
            slot: (site.wal == WalSource::Receive).then(|| site.slot.clone()),
            has_others: number.is_some(),
        };
        let found = check_node(context, site, &options, archives, patience).await;
        items.extend(found.into_iter().map(|item| item.of_node(number)));
    }
    Ok(items)
}

/// Looks at the store and the site in it, and opens the repository for reading as far as this host can.
async fn check_repository(
    context: &Context,
    site: &SiteConfig,
    reads: bool,
    items: &mut Vec<Item>,
) -> Option<Repository> {
    let place = site.storage.location.to_string();
    let store = match context.open_store_within(site, STORE_PATIENCE) {
        Ok(store) => store,
        Err(error) => {
            let hint = error.hint().unwrap_or_else(|| "Correct [storage] in the configuration.".to_owned());
            items.push(Item::failed("store", format!("{place}: {}", crate::site::describe(&error)), hint));
            return None;
        }
    };
    let layout = Layout::new(site.prefix.clone());
    let found = check_store(&*store, &layout, &place, &*context.clock(), &SystemRandom).await;
    let needed = |item: &Item| item.name == "store" || item.name == "store listing";
    let works = found.iter().all(|item| !needed(item) || item.status == Status::Ok);
    items.extend(found);
    if !works {
        items.push(Item::skipped("site", "the store has to work first"));
        return None;
    }
    let purpose = if reads { KeyPurpose::Read } else { KeyPurpose::Inspect };
    match context.open_repository_within(site, purpose, STORE_PATIENCE).await {
        Ok(repository) => {
            let detail = format!("\"{}\" in {place}, {}", site.prefix, repository.site());
            items.push(Item::ok("site", detail));
            Some(repository)
        }
        Err(error) => {
            let hint = "`walden site init` creates a site that is not there yet.";
            items.push(Item::failed("site", error.message(), hint));
            None
        }
    }
}

/// Looks at one server, and at the way of its WAL where there is a `repository` that it can write to.
async fn check_node(
    context: &Context,
    site: &SiteConfig,
    options: &NodeOptions,
    repository: Option<&Repository>,
    patience: Duration,
) -> Vec<Item> {
    let CheckedServer { mut items, server } = check_server(options).await;
    let Some((session, facts)) = server else {
        items.push(Item::skipped("WAL round trip", "the server has to answer first"));
        return items;
    };
    items.push(host::check_programs(facts.version.number(), site.bin_directory.as_deref()));
    let Some(repository) = repository else {
        items.push(Item::skipped("WAL round trip", "keys, store and site have to be right first"));
        return items;
    };
    let cluster = check_cluster(repository, cluster_of(&facts)).await;
    let is_of_site = cluster.status == Status::Ok;
    items.push(cluster);
    items.push(if is_of_site {
        let received = options.slot.is_some();
        check_wal_round_trip(repository, &session, &facts, received, patience, &*context.clock()).await
    } else {
        Item::skipped("WAL round trip", "the site takes no WAL of this cluster")
    });
    items
}
