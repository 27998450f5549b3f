//! `walden wal list`: what the archive holds, by names alone.
//!
//! A history file that is damaged or not trusted is shown as that, and the command then exits as for damaged data.

use std::fmt::{self, Write};

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use crate::config::KeyPurpose;
use crate::pg::WalSegmentName;
use crate::repo::ClusterId;
use crate::wal::list::{ListedCluster, ListedTimeline, list};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::{Align, TextStyle, TextTable, size};

/// Shows which WAL is in the archive, by cluster and timeline
#[derive(Debug, Args)]
pub(super) struct WalList {}

impl WalList {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let clusters = context.block_on_one_thread(async {
            let repository = context.open_repository(site, KeyPurpose::Inspect).await?;
            Ok::<_, CommandError>(list(&repository).await?)
        })??;
        let clusters: Vec<_> = clusters.iter().map(ClusterReport::of).collect();
        let timelines = clusters.iter().flat_map(|cluster| &cluster.timelines);
        let spoiled = timelines.filter_map(|timeline| timeline.history_error.clone()).next();
        context.output.print(&WalReport { site: site.name.clone(), clusters })?;
        match spoiled {
            // The rest was shown; a script must not take it for all that there is to know.
            Some(error) => Err(CommandError::new(ExitKind::Damaged, error)),
            None => Ok(()),
        }
    }
}

/// What `wal list` found.
#[derive(Debug, Serialize)]
struct WalReport {
    site: String,
    clusters: Vec<ClusterReport>,
}

#[derive(Debug, Serialize)]
struct ClusterReport {
    cluster: String,
    system_identifier: String,
    segment_bytes: u32,
    timelines: Vec<TimelineReport>,
}

#[derive(Debug, Serialize)]
struct TimelineReport {
    timeline: u32,
    /// Whether the timeline's history file is there; timeline 1 never has one.
    history: bool,
    /// Why the history file that is there cannot be used; the timeline's parent is not known then.
    #[serde(skip_serializing_if = "Option::is_none")]
    history_error: Option<String>,
    parent: Option<u32>,
    switch_lsn: Option<String>,
    segments: u64,
    bytes: u64,
    stored_bytes: u64,
    newest_at: Option<Timestamp>,
    runs: Vec<Run>,
    partials: Vec<WalSegmentName>,
}

#[derive(Debug, Serialize)]
struct Run {
    first: WalSegmentName,
    last: WalSegmentName,
}

impl ClusterReport {
    fn of(listed: &ListedCluster) -> Self {
        let cluster = listed.cluster;
        Self {
            cluster: cluster.to_string(),
            system_identifier: cluster.system_identifier.to_string(),
            segment_bytes: cluster.segment_size.bytes(),
            timelines: listed
                .timelines
                .iter()
                .map(|timeline| TimelineReport::of(timeline, cluster))
                .collect(),
        }
    }
}

impl TimelineReport {
    fn of(listed: &ListedTimeline, cluster: ClusterId) -> Self {
        Self {
            timeline: listed.timeline.get(),
            history: listed.branch.is_some() || listed.history_error.is_some(),
            history_error: listed.history_error.clone(),
            parent: listed.branch.map(|branch| branch.parent.get()),
            switch_lsn: listed.branch.map(|branch| branch.switch.to_string()),
            segments: listed.coverage.segments(),
            bytes: listed.coverage.segments() * u64::from(cluster.segment_size.bytes()),
            stored_bytes: listed.coverage.stored_bytes,
            newest_at: listed.coverage.newest_at,
            runs: listed.runs(cluster).into_iter().map(|(first, last)| Run { first, last }).collect(),
            partials: listed.coverage.partials.clone(),
        }
    }
}

impl Report for WalReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        if self.clusters.is_empty() {
            return writeln!(out, "There is no WAL in site {}.", self.site);
        }
        for cluster in &self.clusters {
            let segment = size(cluster.segment_bytes.into());
            writeln!(out, "Cluster {}, segments of {segment}", cluster.system_identifier)?;
            let mut table = TextTable::new(&[
                ("TIMELINE", Align::Right),
                ("FROM", Align::Left),
                ("FIRST", Align::Left),
                ("LAST", Align::Left),
                ("SEGMENTS", Align::Right),
                ("STORED", Align::Right),
                ("NEWEST", Align::Left),
                ("", Align::Left),
            ]);
            for timeline in &cluster.timelines {
                timeline.write_rows(&mut table, style);
            }
            table.write(out);
            out.push('\n');
        }
        Ok(())
    }
}

impl TimelineReport {
    /// Writes a row for the timeline, and one for each further run behind a hole.
    fn write_rows(&self, table: &mut TextTable, style: &TextStyle) {
        let branch = self.parent.zip(self.switch_lsn.as_ref());
        let from = branch.map_or(String::new(), |(parent, lsn)| format!("{parent} at {lsn}"));
        let mut notes = Vec::new();
        if self.runs.len() > 1 {
            notes.push(format!("{} holes", self.runs.len() - 1));
        }
        if !self.partials.is_empty() {
            notes.push(format!("{} partial", self.partials.len()));
        }
        if self.history_error.is_some() {
            notes.push("history cannot be used".to_owned());
        }
        let first = self.runs.first();
        table.row([
            self.timeline.to_string(),
            from,
            first.map_or_else(String::new, |run| run.first.to_string()),
            first.map_or_else(String::new, |run| run.last.to_string()),
            self.segments.to_string(),
            size(self.stored_bytes),
            self.newest_at.map_or_else(String::new, |time| style.time(time)),
            notes.join(", "),
        ]);
        for run in self.runs.iter().skip(1) {
            table.row([String::new(), String::new(), run.first.to_string(), run.last.to_string()]);
        }
    }
}
