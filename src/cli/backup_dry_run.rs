//! `walden backup --dry-run`: what a basebackup would read, and how; nothing is written.
//!
//! Shown is what is decided before a basebackup is begun. How much of it would be stored nobody knows before it is read.

use std::fmt::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::backup::{self, BackupOptions, DryRun};
use crate::config::{KeyPurpose, SiteConfig};
use crate::repo::Repository;

use super::context::Context;
use super::error::CommandError;
use super::output::Report;
use super::text::{TextStyle, duration, size};

/// Looks at what would be read, and prints it.
pub(super) fn run(context: &Context, site: &SiteConfig, options: &BackupOptions) -> Result<(), CommandError> {
    let found = context.block_on(async {
        let repository = open(context, site).await?;
        Ok::<_, CommandError>(backup::dry_run(repository.as_ref(), options).await?)
    })??;
    found.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    context.output.print(&DryRunReport::of(found, options))
}

/// Opens the repository of a site; a site that does not exist yet would be created.
async fn open(context: &Context, site: &SiteConfig) -> Result<Option<Repository>, CommandError> {
    let opened = Repository::open(context.repository_options(site, KeyPurpose::Write)?).await;
    match opened {
        Ok(repository) => Ok(Some(repository)),
        Err(error) if error.is_absent() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What `walden backup --dry-run` prints.
#[derive(Debug, Serialize)]
struct DryRunReport {
    dry_run: bool,
    /// The basebackup whose chunks it would name; none for a full one.
    parent: Option<String>,
    /// Whether that one was killed, and would be gone on with.
    resumes: bool,
    /// Why it would be full; none for an incremental one.
    full_because: Option<String>,
    /// All of that in words.
    #[serde(skip)]
    decision: String,
    data_directory: String,
    cluster: String,
    first_of_cluster: bool,
    timeline: u32,
    standby: bool,
    server_version: String,
    redo_lsn: String,
    files: u64,
    database_bytes: u64,
    files_read: u64,
    bytes_read: u64,
    tablespaces: Vec<TablespaceRow>,
    start_set: Vec<StartSetRow>,
    outside_configuration: Vec<String>,
    standalone: bool,
    bytes_per_second_max: Option<u64>,
    seconds_min: Option<f64>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct TablespaceRow {
    oid: u32,
    name: String,
    bytes: u64,
}

/// A group of the files that a start needs.
#[derive(Debug, Serialize)]
struct StartSetRow {
    group: String,
    files: usize,
    bytes: u64,
    left_out: usize,
}

impl DryRunReport {
    fn of(found: DryRun, options: &BackupOptions) -> Self {
        let groups = found.start_set.into_iter();
        Self {
            dry_run: true,
            parent: found.decision.parent().map(|parent| parent.to_string()),
            resumes: found.decision.resumes(),
            full_because: found.decision.reason().map(ToString::to_string),
            decision: found.decision.to_string(),
            data_directory: found.data_directory.display().to_string(),
            cluster: found.cluster.to_string(),
            first_of_cluster: found.is_first,
            timeline: found.timeline.get(),
            standby: found.in_recovery,
            server_version: found.server_version,
            redo_lsn: found.redo_lsn.to_string(),
            files: found.files.0,
            database_bytes: found.files.1,
            files_read: found.read.0,
            bytes_read: found.read.1,
            tablespaces: found
                .tablespaces
                .into_iter()
                .map(|(oid, name, bytes)| TablespaceRow { oid, name, bytes })
                .collect(),
            start_set: groups
                .map(|group| StartSetRow {
                    group: group.group.to_string(),
                    files: group.files,
                    bytes: group.bytes,
                    left_out: group.left_out,
                })
                .collect(),
            outside_configuration: found.outside_configuration,
            standalone: options.standalone,
            bytes_per_second_max: options.rate.map(std::num::NonZeroU64::get),
            seconds_min: options.rate.map(|rate| (found.read.1 as f64 / rate.get() as f64).round()),
            warnings: found.warnings,
        }
    }
}

impl Report for DryRunReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        let role = if self.standby { "a standby" } else { "a primary" };
        write!(out, "would read {} files, {}", self.files_read, size(self.bytes_read))?;
        if self.files_read < self.files {
            write!(out, " of {} files, {}", self.files, size(self.database_bytes))?;
        }
        writeln!(out, ", from \"{}\"", self.data_directory)?;
        writeln!(
            out,
            "{:<14}PostgreSQL {}, {role}, timeline {}",
            "server", self.server_version, self.timeline
        )?;
        let first = if self.first_of_cluster { ", the first of this site" } else { "" };
        writeln!(out, "{:<14}{}{first}", "cluster", self.cluster)?;
        writeln!(out, "{:<14}{}", "basebackup", self.decision)?;
        for TablespaceRow { oid, name, bytes } in &self.tablespaces {
            writeln!(out, "{:<14}{name} ({oid}), {}", "tablespace", size(*bytes))?;
        }
        for StartSetRow { group, files, bytes, left_out } in &self.start_set {
            write!(out, "{:<14}{group}: {files} files, {}", "read first", size(*bytes))?;
            writeln!(
                out,
                "{}",
                if *left_out > 0 { format!(", {left_out} more do not fit") } else { String::new() }
            )?;
        }
        for name in &self.outside_configuration {
            writeln!(out, "{:<14}/{name}", "configuration")?;
        }
        let wal = match self.standalone {
            true => "carried by the basebackup",
            false => "from the archive",
        };
        writeln!(out, "{:<14}from {} or later, {wal}", "WAL", self.redo_lsn)?;
        if let (Some(rate), Some(seconds)) = (self.bytes_per_second_max, self.seconds_min) {
            let least = duration(Duration::from_secs_f64(seconds));
            writeln!(out, "{:<14}{}/s at most, so it takes at least {least}", "rate", size(rate))?;
        }
        writeln!(out, "nothing was written")
    }
}
