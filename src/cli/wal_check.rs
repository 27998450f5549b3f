//! `walden wal check`: whether the archive has all WAL that a recovery may ask for, and what can be put back.
//!
//! Needs no private key. Exits with 0 where nothing is missing, 1 where something is, 3 where something is damaged, and
//! 4 where the store cannot tell. After `--repair` the report and the status are those of a second look. Field names
//! are documented in `docs/wal-check.md`.

use std::fmt::{self, Write};
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use crate::catalog::SegmentRange;
use crate::config::{KeyPurpose, SiteConfig};
use crate::pg::TimelineId;
use crate::replication::Session;
use crate::repo::Repository;
use crate::wal::check::repair::{Repaired, cluster_of_directory, repair};
use crate::wal::check::{ClusterFindings, Depth, Findings, SupersededFile, check};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::{TextStyle, size};

/// Checks that the archive has all WAL from the oldest basebackup on
#[derive(Debug, Args)]
pub(super) struct WalCheck {
    /// Archive again what is missing or damaged and still in pg_wal of the server
    #[arg(long)]
    repair: bool,
    /// Read all of every file, not only its signed header
    #[arg(long)]
    bodies: bool,
}

impl WalCheck {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let depth = if self.bodies { Depth::Bodies } else { Depth::Headers };
        let (findings, repaired) = context.block_on_one_thread(async {
            if !self.repair {
                let repository = context.open_repository(site, KeyPurpose::Inspect).await?;
                return Ok::<_, CommandError>((check(&repository, depth).await?, None));
            }
            let repository = context.open_or_create_repository(site).await?;
            let found = check(&repository, depth).await?;
            let repaired = put_back(context, site, &repository, &found).await?;
            let found = if found.is_good() { found } else { check(&repository, depth).await? };
            Ok((found, Some(repaired)))
        })??;
        let report = CheckReport::new(site.name.clone(), &findings, repaired);
        context.output.print(&report)?;
        match (findings.damaged(), findings.is_good()) {
            (0, true) => Ok(()),
            (0, false) => Err(self.incomplete()),
            (damaged, _) => {
                let message = format!("{damaged} objects of the archive are damaged or not trusted");
                Err(CommandError::new(ExitKind::Damaged, message).hint(self.way_out()))
            }
        }
    }

    fn way_out(&self) -> &'static str {
        if self.repair {
            "A recovery stops where it meets one; a new basebackup needs none of the WAL before it."
        } else {
            "\"walden wal check --repair\" replaces those segments that the server still has."
        }
    }

    fn incomplete(&self) -> CommandError {
        let hint = if self.repair {
            "What the server has no more is lost: take a new basebackup, so that recovery can go on behind the hole."
        } else {
            "\"walden wal check --repair\" archives again what the server still has."
        };
        CommandError::failed("WAL is missing from the archive").hint(hint)
    }
}

/// Archives again what is missing or damaged of the cluster of the site's data directory.
async fn put_back(
    context: &Context,
    site: &SiteConfig,
    repository: &Repository,
    found: &Findings,
) -> Result<Repaired, CommandError> {
    let data_directory = match &site.data_directory {
        Some(directory) => directory.clone(),
        None => ask_for_directory(context, site).await?,
    };
    let cluster = cluster_of_directory(&data_directory)?;
    let compression = context.config()?.compression.wal;
    match found.clusters.iter().find(|found| found.cluster == cluster) {
        Some(found) => Ok(repair(repository, found, &data_directory, compression).await?),
        None => Ok(Repaired::default()),
    }
}

const DATA_DIRECTORY: &str = "SELECT current_setting('data_directory') AS data_directory";

/// Asks the first server of the site that answers.
async fn ask_for_directory(context: &Context, site: &SiteConfig) -> Result<PathBuf, CommandError> {
    let mut last = None;
    for node in &site.nodes {
        let asked = async {
            let session = Session::connect(&node.connect_options(&context.environment)?).await?;
            let row = session.query_one(DATA_DIRECTORY, &[]).await?;
            Ok::<_, CommandError>(row.text("data_directory")?.into())
        };
        match asked.await {
            Ok(directory) => return Ok(directory),
            Err(error) => last = Some(error),
        }
    }
    let hint = "Set data_directory of the site: --repair takes WAL from its pg_wal.";
    Err(last.unwrap_or_else(|| CommandError::failed("the site has no server")).hint(hint))
}

/// What `wal check` prints.
#[derive(Debug, Serialize)]
struct CheckReport {
    site: String,
    ok: bool,
    clusters: Vec<ClusterReport>,
    unreadable: Vec<Named>,
    /// The files that `--repair` archived.
    repaired: Vec<String>,
    /// The segments that it archived in the place of damaged ones.
    replaced: Vec<String>,
    not_repaired: Vec<Named>,
}

#[derive(Debug, Serialize)]
struct ClusterReport {
    cluster: String,
    system_identifier: String,
    segment_bytes: u32,
    /// Objects that were looked at.
    objects: u64,
    /// Segments before the oldest basebackup.
    older_segments: u64,
    missing: Vec<SegmentRange>,
    missing_histories: Vec<TimelineId>,
    damaged: Vec<Named>,
    /// Damaged objects that readers pass over for others.
    superseded: Vec<SupersededReport>,
    unrecoverable: Vec<Named>,
}

/// A damaged object, the one that readers take instead, and what is wrong with the damaged one.
#[derive(Debug, Serialize)]
struct SupersededReport {
    name: String,
    by: String,
    reason: String,
}

/// A file or basebackup, and what is wrong with it.
#[derive(Debug, Serialize)]
struct Named {
    name: String,
    reason: String,
}

impl Named {
    fn new((name, reason): (impl ToString, impl ToString)) -> Self {
        Self { name: name.to_string(), reason: reason.to_string() }
    }
}

impl CheckReport {
    fn new(site: String, findings: &Findings, repaired: Option<Repaired>) -> Self {
        let Repaired { archived, replaced, refused } = repaired.unwrap_or_default();
        Self {
            site,
            ok: findings.is_good(),
            clusters: findings.clusters.iter().map(ClusterReport::of).collect(),
            unreadable: findings.unreadable.iter().map(|(id, reason)| Named::new((id, reason))).collect(),
            repaired: archived,
            replaced,
            not_repaired: refused.into_iter().map(Named::new).collect(),
        }
    }
}

impl SupersededReport {
    fn of(file: &SupersededFile) -> Self {
        let SupersededFile { name, by, reason } = file;
        Self { name: name.clone(), by: by.clone(), reason: reason.clone() }
    }
}

impl ClusterReport {
    fn of(found: &ClusterFindings) -> Self {
        let continuity = &found.continuity;
        let histories = found.damaged_histories.iter();
        let histories =
            histories.map(|(timeline, reason)| Named::new((format!("{}.history", timeline.hex8()), reason)));
        let files = found.examined.damaged.iter().map(|file| Named::new((&file.name, &file.reason)));
        let basebackups = continuity.unrecoverable.iter();
        Self {
            cluster: found.cluster.to_string(),
            system_identifier: found.cluster.system_identifier.to_string(),
            segment_bytes: found.cluster.segment_size.bytes(),
            objects: found.examined.objects,
            older_segments: continuity.older,
            missing: continuity.missing.clone(),
            missing_histories: continuity.missing_histories.clone(),
            damaged: histories.chain(files).collect(),
            superseded: found.examined.superseded.iter().map(SupersededReport::of).collect(),
            unrecoverable: basebackups.map(|(id, reason)| Named::new((id, reason))).collect(),
        }
    }

    fn is_good(&self) -> bool {
        let Self { missing, missing_histories, damaged, unrecoverable, .. } = self;
        missing.is_empty() && missing_histories.is_empty() && damaged.is_empty() && unrecoverable.is_empty()
    }
}

impl Report for CheckReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        if self.clusters.is_empty() {
            writeln!(out, "There is no WAL in site {}.", self.site)?;
        }
        for cluster in &self.clusters {
            cluster.write_text(out)?;
        }
        for Named { name, reason } in &self.unreadable {
            writeln!(out, "basebackup {name} cannot be read: {reason}")?;
        }
        for name in &self.repaired {
            writeln!(out, "archived again: {name}")?;
        }
        for name in &self.replaced {
            writeln!(out, "archived in the place of a damaged one: {name}")?;
        }
        for Named { name, reason } in &self.not_repaired {
            writeln!(out, "not archived again: {name}: {reason}")?;
        }
        Ok(())
    }
}

impl ClusterReport {
    fn write_text(&self, out: &mut String) -> fmt::Result {
        let segment = size(self.segment_bytes.into());
        writeln!(out, "Cluster {}, segments of {segment}", self.system_identifier)?;
        for range in &self.missing {
            writeln!(out, "  missing        {range}")?;
        }
        for timeline in &self.missing_histories {
            writeln!(out, "  missing        {}.history", timeline.hex8())?;
        }
        for Named { name, reason } in &self.damaged {
            writeln!(out, "  damaged        {name}: {reason}")?;
        }
        for SupersededReport { name, by, reason } in &self.superseded {
            writeln!(out, "  superseded     {name}, by {by}: {reason}")?;
        }
        for Named { name, reason } in &self.unrecoverable {
            writeln!(out, "  unrecoverable  basebackup {name}: {reason}")?;
        }
        let older = match self.older_segments {
            0 => String::new(),
            count => format!("; {count} segments are older than any basebackup"),
        };
        let verdict = if self.is_good() { "all there" } else { "not all is there" };
        writeln!(out, "  {} objects looked at, {verdict}{older}", self.objects)
    }
}
