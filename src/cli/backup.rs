//! `walden backup`: a basebackup of a running server, from its data directory or by BASE_BACKUP, incremental where that can
//! be.
//!
//! Damaged pages do not fail it, because a backup of a damaged cluster is worth more than none; they are warned of,
//! counted and recorded. An interrupt ends the session, and with it the backup on the server; what has been uploaded
//! by then counts for nothing.

use std::fmt::{self, Write};
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use crate::backup::{
    self, BackupOptions, BackupOutcome, Budget, Checkpoint, Node, RepositoryArchive, WalArchive,
};
use crate::config::{SiteConfig, WalSource, parse_size};
use crate::monitor::Usage;
use crate::repo::ClusterId;
use crate::repo::carried_wal::CarriedWal;

use super::backup_dry_run;
use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::priority;
use super::text::{TextStyle, duration, size};
use super::wal_queue::forget_left_out;

/// Takes a basebackup of a running server
#[derive(Debug, Args)]
pub struct Backup {
    /// Takes a full basebackup: everything is read and stored, nothing of earlier ones is reused
    #[arg(long)]
    full: bool,

    /// How the server begins: with a checkpoint at once, or spread over time
    #[arg(long, value_enum, value_name = "HOW", default_value_t = CheckpointArgument::Fast)]
    checkpoint: CheckpointArgument,

    /// A name for the basebackup, by which commands find it
    #[arg(long, value_name = "L")]
    label: Option<String>,

    /// How long the archive may take to have the WAL that the basebackup needs, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    wal_timeout: u32,

    /// Carries the WAL that it needs itself, so that it is recovered without an archive; from the data directory alone
    #[arg(long, conflicts_with = "wal_timeout")]
    standalone: bool,

    /// The most that is taken of the server's files in a second, such as 50MiB; none for no limit
    #[arg(long, value_name = "R", value_parser = parse_rate)]
    rate_limit: Option<Rate>,

    /// Says what would be read, and writes nothing; from the data directory alone
    #[arg(long)]
    dry_run: bool,
}

/// A rate, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rate(Option<NonZeroU64>);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CheckpointArgument {
    Fast,
    Spread,
}

impl Backup {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        check_label(self.label.as_deref())?;
        let site = context.site()?;
        context.warn_of_missing_protection()?;
        priority::yield_to_others();
        let options = self.options(context, site)?;
        if self.dry_run {
            return backup_dry_run::run(context, site, &options);
        }
        let outcome = context.block_on(async {
            tokio::select! {
                outcome = take(context, site, &options) => outcome,
                signal = interrupted() => Err(signal),
            }
        })??;
        context.end_progress();
        forget_left_out(context, site, &outcome.record);
        context.output.print(&BackupReport::of(outcome, context.traffic.snapshot().requests()))
    }

    fn options(&self, context: &Context, site: &SiteConfig) -> Result<BackupOptions, CommandError> {
        let config = context.config()?;
        let limits = config.limits;
        let carries = if self.standalone { backup::CARRY_MEMORY } else { 0 };
        let memory_bytes = limits.memory_bytes.saturating_sub(carries);
        Ok(BackupOptions {
            source: site.backup_source,
            nodes: nodes(context, site)?,
            data_directory: site.data_directory.clone(),
            label: self.label.clone(),
            wal_received: site.wal == WalSource::Receive,
            full: self.full,
            states: states(context)?,
            checkpoint: match self.checkpoint {
                CheckpointArgument::Fast => Checkpoint::Fast,
                CheckpointArgument::Spread => Checkpoint::Spread,
            },
            compression: config.compression.basebackup,
            budget: Budget::new(memory_bytes, limits.threads, limits.transfers),
            wal_patience: Duration::from_secs(self.wal_timeout.into()),
            standalone: self.standalone,
            rate: self.rate_limit.map_or(limits.rate, |Rate(rate)| rate),
            host: host_name(),
        })
    }
}

async fn take(
    context: &Context,
    site: &SiteConfig,
    options: &BackupOptions,
) -> Result<BackupOutcome, CommandError> {
    let repository = context.open_or_create_repository(site).await?;
    let pool = context.cpu_pool()?;
    let archive = |cluster: ClusterId| -> Box<dyn WalArchive> {
        Box::new(RepositoryArchive { repository: repository.clone(), cluster })
    };
    let monitor = context.monitor();
    Ok(backup::run(&repository, options, &pool, archive, &*monitor).await?)
}

/// Returns where this host remembers basebackups, or why its state folder cannot be used, which is said.
fn states(context: &Context) -> Result<Result<PathBuf, String>, CommandError> {
    match context.config()?.paths.open_state() {
        Ok(state) => Ok(Ok(state.path.join("basebackups"))),
        Err(error) => {
            tracing::warn!("the basebackup is full, and so will the next one be: {error}");
            Ok(Err(error.to_string()))
        }
    }
}

/// Returns the servers that a basebackup may be taken from.
fn nodes(context: &Context, site: &SiteConfig) -> Result<Vec<Node>, CommandError> {
    if site.nodes.is_empty() {
        let message = format!("site \"{}\" has no server to connect to", site.name);
        let hint = format!("Set connection = \"…\" in [sites.{}].", site.name);
        return Err(CommandError::new(ExitKind::Configuration, message).hint(hint));
    }
    let node = |node: &crate::config::Node| -> Result<Node, CommandError> {
        let connection = node.connect_options(&context.environment)?;
        Ok(Node { connection, preferred: node.prefer })
    };
    site.nodes.iter().map(node).collect()
}

/// Refuses a label that would stand for something else where a basebackup is named.
fn check_label(label: Option<&str>) -> Result<(), CommandError> {
    let refused =
        |label: &str| label.is_empty() || label.starts_with("latest") || label.contains(char::is_control);
    match label.filter(|label| refused(label)) {
        Some(label) => Err(CommandError::usage(format!("\"{}\" is not a label", label.escape_debug()))
            .hint("Take any text on one line that does not begin with \"latest\".")),
        None => Ok(()),
    }
}

/// Reads what stands for a rate.
fn parse_rate(text: &str) -> Result<Rate, String> {
    if text == "none" {
        return Ok(Rate(None));
    }
    let bytes = parse_size(text).map_err(|error| match error.hint() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    })?;
    match NonZeroU64::new(bytes) {
        Some(rate) => Ok(Rate(Some(rate))),
        None => Err("nothing would ever be read".to_owned()),
    }
}

/// Waits for SIGINT or SIGTERM.
async fn interrupted() -> CommandError {
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        // Without handlers the signals end the process, which ends the session as well.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    CommandError::failed("interrupted: the basebackup was given up")
}

/// Returns the name of this host.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_owned()
}

/// What `walden backup` prints.
#[derive(Debug, Serialize)]
struct BackupReport {
    id: String,
    label: Option<String>,
    /// The basebackup whose chunks it names; none for a full one.
    parent: Option<String>,
    /// Whether that one was killed, and this one goes on with it: a full one, by what it read and stored.
    resumes: bool,
    /// Why it is full; none for an incremental one.
    full_because: Option<String>,
    /// All of that in words.
    #[serde(skip)]
    decision: String,
    cluster: String,
    timeline: u32,
    start_lsn: String,
    stop_lsn: String,
    started_at: String,
    stopped_at: String,
    files: u64,
    database_bytes: u64,
    /// Bytes that came from the server; none where its data directory was read.
    received_bytes: Option<u64>,
    read_bytes: u64,
    unread_files: u64,
    changed_pages: u64,
    pages_stored_again: u64,
    reused_chunks: u64,
    stored_bytes: u64,
    live_bytes: u64,
    packs_bytes: u64,
    ratio: f64,
    requests: u64,
    seconds: f64,
    bytes_per_second: u64,
    cpu_seconds: f64,
    memory_bytes_peak: u64,
    standalone: bool,
    wal: Option<CarriedWal>,
    damaged_pages: u64,
    vanished_files: u64,
    shrunk_files: u64,
}

impl BackupReport {
    /// Creates the report of a basebackup that took so many requests to the store.
    fn of(outcome: BackupOutcome, requests: u64) -> Self {
        let BackupOutcome { record, took, vanished, shrunk, decision, work, packs_bytes, received_bytes } =
            outcome;
        let in_seconds = |time: Duration| (time.as_secs_f64() * 1000.0).round() / 1000.0;
        let usage = Usage::now();
        Self {
            id: record.id.to_string(),
            label: record.label,
            parent: decision.parent().map(|parent| parent.to_string()),
            resumes: decision.resumes(),
            full_because: decision.reason().map(ToString::to_string),
            decision: decision.to_string(),
            cluster: record.cluster.to_string(),
            timeline: record.timeline.get(),
            start_lsn: record.start_lsn.to_string(),
            stop_lsn: record.stop_lsn.to_string(),
            started_at: record.started_at.to_string(),
            stopped_at: record.stopped_at.to_string(),
            files: record.size.files,
            database_bytes: record.size.database_bytes,
            received_bytes,
            read_bytes: work.bytes_read,
            unread_files: work.files_kept,
            changed_pages: work.pages_changed,
            pages_stored_again: work.pages_stored_again,
            reused_chunks: work.chunks_reused,
            stored_bytes: record.size.stored_bytes,
            live_bytes: record.size.live_bytes,
            packs_bytes,
            ratio: ratio(record.size.database_bytes, record.size.live_bytes),
            requests,
            seconds: in_seconds(took),
            bytes_per_second: (record.size.database_bytes as f64 / took.as_secs_f64().max(0.001)) as u64,
            cpu_seconds: in_seconds(usage.cpu),
            memory_bytes_peak: usage.memory_bytes_peak,
            standalone: record.wal.is_some(),
            wal: record.wal,
            damaged_pages: record.size.damaged_pages,
            vanished_files: vanished,
            shrunk_files: shrunk,
        }
    }
}

impl BackupReport {
    /// Says what an incremental basebackup spared.
    fn write_incremental(&self, out: &mut String) -> fmt::Result {
        write!(
            out,
            "{} read, {} files unread; {} pages changed",
            size(self.read_bytes),
            self.unread_files,
            self.changed_pages
        )?;
        if self.pages_stored_again > 0 {
            write!(out, ", {} stored again", self.pages_stored_again)?;
        }
        let spread = ratio(self.packs_bytes, self.live_bytes);
        writeln!(out, "; {} chunks reused, {spread} stored for each byte in use", self.reused_chunks)
    }
}

/// Returns raw bytes for each stored one, to two digits.
pub(super) fn ratio(raw: u64, stored: u64) -> f64 {
    (raw as f64 / stored.max(1) as f64 * 100.0).round() / 100.0
}

impl Report for BackupReport {
    fn write_text(&self, out: &mut String, _style: &TextStyle) -> fmt::Result {
        write!(out, "basebackup {}", self.id)?;
        if let Some(label) = &self.label {
            write!(out, " \"{label}\"")?;
        }
        writeln!(out)?;
        writeln!(out, "{}", self.decision)?;
        write!(
            out,
            "{} files, {} in {} ({}/s), {} stored",
            self.files,
            size(self.database_bytes),
            duration(Duration::from_secs_f64(self.seconds)),
            size(self.bytes_per_second),
            size(self.stored_bytes),
        )?;
        if self.parent.is_some() {
            write!(out, ", {} in use", size(self.live_bytes))?;
        }
        writeln!(out, " ({}:1)", self.ratio)?;
        if self.parent.is_some() {
            self.write_incremental(out)?;
        }
        if let Some(received) = self.received_bytes {
            writeln!(out, "{} received from the server", size(received))?;
        }
        writeln!(
            out,
            "{} s of processor time, {} of memory at most",
            self.cpu_seconds,
            size(self.memory_bytes_peak)
        )?;
        writeln!(out, "timeline {}, {} to {}", self.timeline, self.start_lsn, self.stop_lsn)?;
        if let Some(wal) = &self.wal {
            writeln!(out, "standalone: it carries the WAL up to {}, and needs no archive", wal.end)?;
        }
        if self.damaged_pages > 0 {
            writeln!(out, "WARNING: {} pages have a wrong checksum in the source", self.damaged_pages)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_a_size_or_none() {
        assert_eq!(parse_rate("50MiB"), Ok(Rate(NonZeroU64::new(50 << 20))));
        assert_eq!(parse_rate("none"), Ok(Rate(None)));
        for bad in ["0B", "50", "50MB", "-1MiB", ""] {
            assert!(parse_rate(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_label_does_not_look_like_something_else() {
        for good in [None, Some("before upgrade"), Some("nächtlich")] {
            assert!(check_label(good).is_ok());
        }
        for bad in ["", "latest", "latest~1", "two\nlines"] {
            assert_eq!(check_label(Some(bad)).unwrap_err().kind, ExitKind::Usage, "{bad:?}");
        }
    }
}
