//! What `walden restore` prints: the plan with `--dry-run`, else what was done and how to go on.
//!
//! The names of the fields are a promise, kept in `docs/restore.md`.

use std::fmt::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::catalog::Target;
use crate::restore::plan::RestorePlan;
use crate::restore::recovery_settings::Setting;
use crate::restore::run::RestoreOutcome;
use crate::storage::TrafficSnapshot;

use super::output::Report;
use super::text::{TextStyle, duration, size};

/// What a restore took.
#[derive(Debug, Clone, Copy)]
pub(super) struct Spent {
    /// What the store was asked.
    pub traffic: TrafficSnapshot,
    /// How long it took.
    pub seconds: f64,
}

/// The report; field names are stable.
#[derive(Debug, Serialize)]
pub(super) struct RestoreReport {
    dry_run: bool,
    site: String,
    basebackup: String,
    target_directory: String,
    tablespaces: Vec<TablespaceReport>,
    config_directory: Option<String>,
    standby: bool,
    timeline: u32,
    target: Option<String>,
    target_action: Option<String>,
    files: u64,
    directories: u64,
    bytes: u64,
    packs: u64,
    stored_bytes: u64,
    wal_segments: u64,
    wal_bytes: u64,
    files_written: u64,
    files_kept: u64,
    bytes_restored: u64,
    bytes_fetched: u64,
    requests: u64,
    seconds: f64,
    settings: Vec<Setting>,
    config_settings: Vec<Setting>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize)]
struct TablespaceReport {
    oid: u32,
    name: String,
    directory: String,
}

impl RestoreReport {
    /// Creates the report of a plan and, unless nothing was to be written, its outcome.
    pub(super) fn new(site: &str, plan: RestorePlan, outcome: Option<RestoreOutcome>, spent: Spent) -> Self {
        let places = &plan.destinations;
        let named = |oid: &u32| plan.tablespace_names.get(oid).cloned().unwrap_or_default();
        let tablespace = |(oid, path): (&u32, &std::path::PathBuf)| TablespaceReport {
            oid: *oid,
            name: named(oid),
            directory: path.display().to_string(),
        };
        let target = plan.target.as_ref();
        let action = target.filter(|target| target.target != Target::Latest);
        let done = outcome.unwrap_or(RestoreOutcome { files_written: 0, files_kept: 0, bytes_written: 0 });
        Self {
            dry_run: outcome.is_none(),
            site: site.to_owned(),
            basebackup: plan.basebackup.to_string(),
            target_directory: places.data.display().to_string(),
            tablespaces: places.tablespaces.iter().map(tablespace).collect(),
            config_directory: places
                .configuration
                .as_ref()
                .map(|place| place.directory.display().to_string()),
            standby: plan.recovery.standby,
            timeline: plan.timeline.get(),
            target: target.map(|target| target.target.to_string()),
            target_action: action.map(|target| target.action.to_string()),
            files: plan.figures.files,
            directories: plan.figures.directories,
            bytes: plan.figures.bytes,
            packs: plan.figures.packs,
            stored_bytes: plan.figures.stored_bytes,
            wal_segments: plan.figures.wal_segments,
            wal_bytes: plan.figures.wal_bytes,
            files_written: done.files_written,
            files_kept: done.files_kept,
            bytes_restored: done.bytes_written,
            bytes_fetched: spent.traffic.bytes_read,
            requests: spent.traffic.requests(),
            seconds: (spent.seconds * 1000.0).round() / 1000.0,
            settings: plan.settings,
            config_settings: plan.configuration.map(|(_, settings)| settings).unwrap_or_default(),
            warnings: plan.warnings,
        }
    }

    fn write_plan(&self, out: &mut String) -> fmt::Result {
        writeln!(
            out,
            "would write {} files, {}, from {} packs, {} stored",
            self.files,
            size(self.bytes),
            self.packs,
            size(self.stored_bytes)
        )?;
        writeln!(
            out,
            "recovery fetches at most {} WAL segments, {}",
            self.wal_segments,
            size(self.wal_bytes)
        )?;
        writeln!(out, "postgresql.auto.conf gets")?;
        for Setting { name, value } in &self.settings {
            writeln!(out, "  {name} = '{value}'")?;
        }
        Ok(())
    }

    fn write_outcome(&self, out: &mut String) -> fmt::Result {
        let rate = (self.bytes_restored as f64 / self.seconds.max(0.001)) as u64;
        write!(
            out,
            "{} files, {} written in {} ({}/s), {} fetched by {} requests",
            self.files,
            size(self.bytes_restored),
            duration(Duration::from_secs_f64(self.seconds)),
            size(rate),
            size(self.bytes_fetched),
            self.requests
        )?;
        match self.files_kept {
            0 => writeln!(out),
            kept => writeln!(out, "; {kept} files were there already"),
        }
    }
}

impl Report for RestoreReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        writeln!(out, "basebackup {} to \"{}\"", self.basebackup, self.target_directory)?;
        for TablespaceReport { oid, name, directory } in &self.tablespaces {
            writeln!(out, "tablespace {oid} \"{name}\" to \"{directory}\"")?;
        }
        if let Some(directory) = &self.config_directory {
            writeln!(out, "configuration to \"{directory}\"")?;
        }
        match self.dry_run {
            true => self.write_plan(out)?,
            false => self.write_outcome(out)?,
        }
        match (&self.target, &self.target_action) {
            (None, _) => writeln!(out, "started, it follows its primary"),
            (Some(target), None) => {
                writeln!(
                    out,
                    "started, it recovers to {target} on timeline {} and takes writes",
                    self.timeline
                )
            }
            (Some(target), Some(action)) => {
                writeln!(out, "started, it recovers to {target} on timeline {}, then {action}", self.timeline)
            }
        }
    }
}
