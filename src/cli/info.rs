//! `walden info`: what points in time can be recovered, by cluster and timeline, and what that takes.
//!
//! Needs no private key; with one at hand it says when the last transaction of each window ended. What cannot be read
//! is shown as that, and the command then exits as for damaged data: a script must not take the rest for all. Field
//! names are documented in `docs/info.md`.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde::Serialize;

use crate::catalog::overview::{self, BasebackupOverview, ClusterOverview, SiteOverview, TimelineWindow};
use crate::catalog::{Ending, Hole, Recoverability, SegmentRange};
use crate::codec::SystemRandom;
use crate::config::KeyPurpose;
use crate::pg::{Lsn, TimelineId, WalSegmentName, WalSegmentSize};

use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;

/// Shows what points in time can be recovered, gaps in the WAL, and sizes
#[derive(Debug, Args)]
pub struct Info {}

impl Info {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let found = context.block_on_one_thread(async {
            let repository = context.open_repository(site, purpose(context)?).await?;
            Ok::<_, CommandError>(overview::load(&repository).await?)
        })??;
        let report = InfoReport::of(&found, site.name.clone(), context.clock().now());
        context.output.print(&report)?;
        let unreadable = report.unreadable.len();
        let damaged: usize = report.clusters.iter().map(ClusterReport::damaged).sum();
        match unreadable + damaged {
            0 => Ok(()),
            count => {
                let message = format!("{count} objects are damaged or not trusted");
                Err(CommandError::new(ExitKind::Damaged, message))
            }
        }
    }
}

/// Private keys serve only for the times of the last transactions: one that cannot be opened fails nothing.
fn purpose(context: &Context) -> Result<KeyPurpose, CommandError> {
    match context.config()?.keyring(KeyPurpose::Read, std::sync::Arc::new(SystemRandom)) {
        Ok(_) => Ok(KeyPurpose::Read),
        Err(error) => {
            tracing::warn!("goes on without private keys: {error}");
            Ok(KeyPurpose::Inspect)
        }
    }
}

/// What `walden info` prints.
#[derive(Debug, Serialize)]
pub(super) struct InfoReport {
    pub site: String,
    pub clusters: Vec<ClusterReport>,
    pub unreadable: Vec<UnreadableReport>,
    pub unfinished: Vec<String>,
}

/// A cluster of the site.
#[derive(Debug, Serialize)]
pub(super) struct ClusterReport {
    pub cluster: String,
    pub system_identifier: String,
    pub segment_bytes: u32,
    pub server_version: Option<String>,
    pub stored_bytes: Option<u64>,
    pub live_bytes: Option<u64>,
    pub stored_per_live: Option<f64>,
    pub wal_stored_bytes: u64,
    pub newest_basebackup: Option<NewestReport>,
    pub newest_wal: Option<NewestReport>,
    pub timelines: Vec<TimelineReport>,
    pub basebackups: Vec<BasebackupReport>,
}

/// The newest of something, and its age by this host's clock.
#[derive(Debug, Serialize)]
pub(super) struct NewestReport {
    pub name: String,
    pub at: Timestamp,
    pub age_seconds: f64,
}

/// A timeline of a cluster.
#[derive(Debug, Serialize)]
pub(super) struct TimelineReport {
    pub timeline: u32,
    pub parent: Option<u32>,
    pub switch_lsn: Option<String>,
    pub history_error: Option<String>,
    pub segments: u64,
    pub stored_bytes: u64,
    pub newest_at: Option<Timestamp>,
    pub runs: Vec<SegmentRange>,
    pub holes: Vec<SegmentRange>,
    pub partials: Vec<WalSegmentName>,
    pub windows: Vec<WindowReport>,
}

/// What can be recovered on a timeline without passing a hole.
#[derive(Debug, Serialize)]
pub(super) struct WindowReport {
    pub basebackups: Vec<String>,
    pub begin_lsn: String,
    pub begin_time: Timestamp,
    pub end_lsn: String,
    pub last_transaction_at: Option<Timestamp>,
    pub last_transaction_unknown: Option<String>,
    pub archived_at: Option<Timestamp>,
    pub reaches_timeline: bool,
    pub hole: Option<Hole>,
    pub partial: Option<WalSegmentName>,
    pub pieces_end_lsn: Option<String>,
}

/// A basebackup and whether it can be recovered.
#[derive(Debug, Serialize)]
pub(super) struct BasebackupReport {
    pub id: String,
    pub label: Option<String>,
    pub timeline: u32,
    pub start_lsn: String,
    pub stop_lsn: String,
    pub started_at: Timestamp,
    pub stopped_at: Timestamp,
    pub database_bytes: u64,
    pub stored_bytes: u64,
    pub live_bytes: u64,
    pub standalone: bool,
    pub recoverable: bool,
    pub reason: Option<String>,
}

/// A basebackup whose record cannot be read or trusted.
#[derive(Debug, Serialize)]
pub(super) struct UnreadableReport {
    pub id: String,
    pub reason: String,
}

impl InfoReport {
    fn of(found: &SiteOverview, site: String, now: Timestamp) -> Self {
        let unreadable = found.unreadable.iter();
        Self {
            site,
            clusters: found.clusters.iter().map(|cluster| ClusterReport::of(cluster, now)).collect(),
            unreadable: unreadable
                .map(|(id, error)| UnreadableReport { id: id.to_string(), reason: error.to_string() })
                .collect(),
            unfinished: found.unfinished.iter().map(ToString::to_string).collect(),
        }
    }
}

impl ClusterReport {
    fn of(found: &ClusterOverview, now: Timestamp) -> Self {
        let newest = found.basebackups.last().map(|basebackup| &basebackup.listed.record);
        let stored = found.stored_bytes();
        let newest_of = |name: String, at: Timestamp| NewestReport {
            name,
            at,
            // A clock that is behind the store's makes nothing younger than new.
            age_seconds: now.duration_since(at).as_secs_f64().max(0.0),
        };
        Self {
            cluster: found.cluster.to_string(),
            system_identifier: found.cluster.system_identifier.to_string(),
            segment_bytes: found.cluster.segment_size.bytes(),
            server_version: newest.map(|record| record.server.version.clone()),
            stored_bytes: stored.map(|bytes| bytes.stored),
            live_bytes: stored.map(|bytes| bytes.live),
            stored_per_live: stored
                .filter(|bytes| bytes.live > 0)
                .map(|bytes| round(bytes.stored as f64 / bytes.live as f64)),
            wal_stored_bytes: found.coverage.timelines.values().map(|timeline| timeline.stored_bytes).sum(),
            newest_basebackup: newest.map(|record| newest_of(record.id.to_string(), record.stopped_at)),
            newest_wal: newest_wal(found).map(|(name, at)| newest_of(name.to_string(), at)),
            timelines: found
                .timelines()
                .into_iter()
                .map(|timeline| TimelineReport::of(found, timeline))
                .collect(),
            basebackups: found.basebackups.iter().map(BasebackupReport::of).collect(),
        }
    }

    /// Counts what cannot be read or trusted.
    fn damaged(&self) -> usize {
        let histories = self.timelines.iter().filter(|timeline| timeline.history_error.is_some());
        histories.count() + usize::from(!self.basebackups.is_empty() && self.stored_bytes.is_none())
    }
}

/// Two digits behind the point say all.
fn round(ratio: f64) -> f64 {
    (ratio * 100.0).round() / 100.0
}

/// The last segment of the timeline whose newest segment came last.
fn newest_wal(found: &ClusterOverview) -> Option<(WalSegmentName, Timestamp)> {
    let newest = found.coverage.timelines.iter().filter_map(|(timeline, coverage)| {
        let name = WalSegmentName::new(*timeline, coverage.last()?, found.cluster.segment_size);
        Some((name, coverage.newest_at?))
    });
    newest.max_by_key(|(_, at)| *at)
}

impl TimelineReport {
    fn of(found: &ClusterOverview, timeline: TimelineId) -> Self {
        let size = found.cluster.segment_size;
        let coverage = found.coverage.timelines.get(&timeline).cloned().unwrap_or_default();
        let range = |(first, last): &_| SegmentRange::new(timeline, *first, *last, size);
        let branch = found.tree.branch(timeline);
        let damaged = found.damaged_histories.iter().find(|(damaged, _)| *damaged == timeline);
        let history_error = match damaged {
            Some((_, error)) => Some(error.to_string()),
            None if branch.is_none() && timeline > TimelineId::FIRST => {
                Some(Recoverability::MissingHistory(timeline).to_string())
            }
            None => None,
        };
        let mut partials = coverage.partials.clone();
        partials.dedup();
        Self {
            timeline: timeline.get(),
            parent: branch.map(|branch| branch.parent.get()),
            switch_lsn: branch.map(|branch| branch.switch.to_string()),
            history_error,
            segments: coverage.segments(),
            stored_bytes: coverage.stored_bytes,
            newest_at: coverage.newest_at,
            runs: coverage.runs().iter().map(range).collect(),
            holes: coverage.holes().iter().map(range).collect(),
            partials,
            windows: found
                .windows
                .get(&timeline)
                .into_iter()
                .flatten()
                .map(|window| WindowReport::of(window, size))
                .collect(),
        }
    }
}

/// Where the pieces of the last segment end; nothing where there are none.
fn pieces_end(ending: Ending, size: WalSegmentSize) -> Option<Lsn> {
    let start = ending.segment.start_lsn(size).ok()?;
    (ending.pieces_end > start).then_some(ending.pieces_end)
}

impl WindowReport {
    fn of(found: &TimelineWindow, size: WalSegmentSize) -> Self {
        let (window, end) = (&found.window, &found.end);
        Self {
            basebackups: found.basebackups.iter().map(ToString::to_string).collect(),
            begin_lsn: found.begin.0.to_string(),
            begin_time: found.begin.1,
            end_lsn: window.end.to_string(),
            last_transaction_at: end.last_transaction.clone().ok().flatten(),
            last_transaction_unknown: end.last_transaction.clone().err(),
            archived_at: end.archived_at,
            reaches_timeline: window.reaches_timeline(),
            hole: window.holes.first().cloned(),
            partial: window.ending.filter(|ending| ending.partial).map(|ending| ending.segment),
            pieces_end_lsn: window
                .ending
                .and_then(|ending| pieces_end(ending, size))
                .map(|end| end.to_string()),
        }
    }

    /// Returns the first WAL missing behind the window, as the beginning of a sentence.
    pub(super) fn hole_text(&self) -> Option<String> {
        self.hole.as_ref().map(ToString::to_string)
    }
}

impl BasebackupReport {
    fn of(found: &BasebackupOverview) -> Self {
        let record = &found.listed.record;
        let reason = match (&found.recoverability, &found.refs) {
            (Recoverability::Recoverable, Ok(_)) => None,
            (Recoverability::Recoverable, Err(error)) => Some(error.to_string()),
            (reason, _) => Some(reason.to_string()),
        };
        Self {
            id: record.id.to_string(),
            label: record.label.clone(),
            timeline: record.timeline.get(),
            start_lsn: record.start_lsn.to_string(),
            stop_lsn: record.stop_lsn.to_string(),
            started_at: record.started_at,
            stopped_at: record.stopped_at,
            database_bytes: record.size.database_bytes,
            stored_bytes: record.size.stored_bytes,
            live_bytes: record.size.live_bytes,
            standalone: record.wal.is_some(),
            recoverable: reason.is_none(),
            reason,
        }
    }
}

impl NewestReport {
    /// Returns its age.
    pub(super) fn age(&self) -> Duration {
        Duration::from_secs_f64(self.age_seconds)
    }
}
