//! What `walden restore` prints: the plan with `--dry-run`, else what was done and how to go on.
//!
//! The names of the fields are a promise, kept in `docs/restore.md`.

use std::fmt::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::catalog::Target;
use crate::restore::plan::{Existing, RestorePlan};
use crate::restore::recovery_settings::Setting;
use crate::restore::run::RestoreOutcome;
use crate::restore::{Limit, Sample, Work, estimate};
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
    /// Of a dry run: about how long it would take, and how that is known.
    estimate: Option<Estimated>,
    files_written: u64,
    files_kept: u64,
    bytes_restored: u64,
    bytes_fetched: u64,
    requests: u64,
    seconds: f64,
    settings: Vec<Setting>,
    config_settings: Vec<Setting>,
    warnings: Vec<String>,
    /// What is there already may save some of it.
    #[serde(skip)]
    at_most: bool,
}

/// An estimate with what it stands on.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Estimated {
    seconds: f64,
    limited_by: Limit,
    requests: u64,
    sample_bytes: u64,
    sample_requests: usize,
    round_trip_seconds: f64,
    fetched_bytes_per_second: Option<u64>,
    unpacked_bytes_per_second: Option<u64>,
}

#[derive(Debug, Serialize)]
struct TablespaceReport {
    oid: u32,
    name: String,
    directory: String,
}

impl Estimated {
    /// Estimates from a sample.
    pub(super) fn new(work: &Work, sample: &Sample) -> Self {
        let found = estimate(work, sample);
        Self {
            seconds: milliseconds(found.duration.as_secs_f64()),
            limited_by: found.limit,
            requests: work.requests,
            sample_bytes: sample.fetched_bytes,
            sample_requests: sample.at_once,
            round_trip_seconds: (sample.round_trip.as_secs_f64() * 1e6).round() / 1e6,
            fetched_bytes_per_second: found.rates.0,
            unpacked_bytes_per_second: found.rates.1,
        }
    }

    fn write(&self, at_most: bool, out: &mut String) -> fmt::Result {
        let most = if at_most { "at most " } else { "" };
        let by = match self.limited_by {
            Limit::Store => "the store",
            Limit::Processors => "the processors",
        };
        let rate = |rate: Option<u64>| rate.map_or("an unknown rate".to_owned(), |rate| size(rate) + "/s");
        writeln!(
            out,
            "takes {most}about {}, limited by {by}, if the disk keeps up; the replay of WAL comes after it",
            about(self.seconds)
        )?;
        writeln!(
            out,
            "estimated from {} in {} requests at once: {} from the store, {} unpacked, {:.1} ms a round trip",
            size(self.sample_bytes),
            self.sample_requests,
            rate(self.fetched_bytes_per_second),
            rate(self.unpacked_bytes_per_second),
            self.round_trip_seconds * 1000.0
        )
    }
}

/// Shows a time that is an estimate: below a second nobody waits.
fn about(seconds: f64) -> String {
    let rounded = Duration::try_from_secs_f64(seconds.ceil()).unwrap_or(Duration::MAX);
    match rounded.as_secs() {
        0..=1 => "a second".to_owned(),
        seconds @ 2..60 => format!("{seconds} s"),
        _ => duration(rounded),
    }
}

fn milliseconds(seconds: f64) -> f64 {
    (seconds * 1000.0).round() / 1000.0
}

impl RestoreReport {
    /// Creates the report of a plan and, unless nothing was to be written, its outcome.
    pub(super) fn new(
        site: &str,
        plan: RestorePlan,
        outcome: Option<RestoreOutcome>,
        estimate: Option<Estimated>,
        spent: Spent,
    ) -> Self {
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
            estimate,
            at_most: plan.existing == Existing::Delta,
            files_written: done.files_written,
            files_kept: done.files_kept,
            bytes_restored: done.bytes_written,
            bytes_fetched: spent.traffic.bytes_read,
            requests: spent.traffic.requests(),
            seconds: milliseconds(spent.seconds),
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
        if let Some(estimate) = &self.estimate {
            estimate.write(self.at_most, out)?;
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_says_what_it_stands_on_and_what_it_leaves_out() {
        let work = Work { stored_bytes: 1000 << 20, requests: 80, bytes: 4000 << 20 };
        let sample = Sample {
            at_once: 8,
            round_trip: Duration::from_millis(20),
            fetched_bytes: 10 << 20,
            fetched_in: Duration::from_millis(120),
            unpacked_bytes: 40 << 20,
            unpacked_in: Duration::from_millis(50),
        };
        let estimated = Estimated::new(&work, &sample);
        let mut text = String::new();
        estimated.write(false, &mut text).unwrap();
        assert_eq!(
            text,
            "takes about 11 s, limited by the store, if the disk keeps up; the replay of WAL comes after it\n\
             estimated from 10.0 MiB in 8 requests at once: 100 MiB/s from the store, 800 MiB/s unpacked, \
             20.0 ms a round trip\n"
        );
        text.clear();
        Estimated::new(&work, &Sample { unpacked_in: Duration::from_secs(1), ..sample })
            .write(true, &mut text)
            .unwrap();
        assert!(text.starts_with("takes at most about 1 min 40 s, limited by the processors,"), "{text}");
        assert_eq!(
            [0.0, 0.2, 1.2, 59.5, f64::MAX].map(about)[..4],
            ["a second", "a second", "2 s", "1 min 0 s"]
        );
    }
}
