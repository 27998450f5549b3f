//! `walden list`: the basebackups of a site.
//!
//! Read from signed documents and names of WAL segments, so no private key is needed. A basebackup without all its WAL
//! is none, and the list says so. A record that cannot be read or trusted is shown as what it is, and the command then
//! exits as for damaged data: a script must not take the rest for all.

use std::fmt;
use std::fmt::Write;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::catalog::Recoverability;
use crate::catalog::basebackups::{BasebackupList, ListedBasebackup, list};
use crate::catalog::recoverable::recoverabilities;
use crate::config::KeyPurpose;
use crate::repo::keyring::Trust;

use super::backup::ratio;
use super::context::Context;
use super::error::CommandError;
use super::exit::ExitKind;
use super::output::Report;
use super::text::{Align, TextStyle, TextTable, duration, size};

/// Lists the basebackups
#[derive(Debug, Args)]
pub struct List {}

impl List {
    pub(super) fn run(&self, context: &Context) -> Result<(), CommandError> {
        let site = context.site()?;
        let (found, worth) = context.block_on_one_thread(async {
            let repository = context.open_repository(site, KeyPurpose::Inspect).await?;
            let found = list(&repository).await?;
            let worth = recoverabilities(&repository, &found.complete).await?;
            Ok::<_, CommandError>((found, worth))
        })??;
        let unreadable = found.unreadable.len();
        context.output.print(&ListReport::of(&found, &worth))?;
        if unreadable > 0 {
            let message = format!("{unreadable} basebackups have a damaged or untrusted record");
            return Err(CommandError::new(ExitKind::Damaged, message));
        }
        Ok(())
    }
}

/// What `walden list` prints.
#[derive(Debug, Serialize)]
struct ListReport {
    basebackups: Vec<ListedRow>,
    unreadable: Vec<UnreadableRow>,
    unfinished: Vec<String>,
}

/// One basebackup.
#[derive(Debug, Serialize)]
pub(super) struct ListedRow {
    id: String,
    label: Option<String>,
    parent: Option<String>,
    cluster: String,
    timeline: u32,
    start_lsn: String,
    stop_lsn: String,
    started_at: jiff::Timestamp,
    stopped_at: jiff::Timestamp,
    seconds: f64,
    server_version: String,
    host: String,
    files: u64,
    database_bytes: u64,
    stored_bytes: u64,
    live_bytes: u64,
    ratio: f64,
    damaged_pages: u64,
    signed: bool,
    standalone: bool,
    recoverable: bool,
    unrecoverable_because: Option<String>,
}

#[derive(Debug, Serialize)]
struct UnreadableRow {
    id: String,
    reason: String,
}

impl ListReport {
    fn of(list: &BasebackupList, worth: &[Recoverability]) -> Self {
        let unreadable = list.unreadable.iter();
        let rows = list.complete.iter().zip(worth);
        Self {
            basebackups: rows.map(|(listed, worth)| ListedRow::of(listed, *worth)).collect(),
            unreadable: unreadable
                .map(|(id, error)| UnreadableRow { id: id.to_string(), reason: error.to_string() })
                .collect(),
            unfinished: list.unfinished.iter().map(ToString::to_string).collect(),
        }
    }
}

impl ListedRow {
    pub(super) fn of(listed: &ListedBasebackup, worth: Recoverability) -> Self {
        let record = &listed.record;
        Self {
            id: record.id.to_string(),
            label: record.label.clone(),
            parent: record.parent.map(|parent| parent.to_string()),
            cluster: record.cluster.to_string(),
            timeline: record.timeline.get(),
            start_lsn: record.start_lsn.to_string(),
            stop_lsn: record.stop_lsn.to_string(),
            started_at: record.started_at,
            stopped_at: record.stopped_at,
            seconds: record.stopped_at.duration_since(record.started_at).as_secs_f64(),
            server_version: record.server.version.clone(),
            host: record.server.host.clone(),
            files: record.size.files,
            database_bytes: record.size.database_bytes,
            stored_bytes: record.size.stored_bytes,
            live_bytes: record.size.live_bytes,
            ratio: ratio(record.size.database_bytes, record.size.live_bytes),
            damaged_pages: record.size.damaged_pages,
            signed: matches!(listed.trust, Trust::Signed(_)),
            standalone: record.wal.is_some(),
            recoverable: worth == Recoverability::Recoverable,
            unrecoverable_because: (worth != Recoverability::Recoverable).then(|| worth.to_string()),
        }
    }
}

impl Report for ListReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let mut table = TextTable::new(&[
            ("ID", Align::Left),
            ("STARTED", Align::Left),
            ("TOOK", Align::Right),
            ("SIZE", Align::Right),
            ("STORED", Align::Right),
            ("TLI", Align::Right),
            ("STOP LSN", Align::Left),
            ("VERSION", Align::Left),
            ("LABEL", Align::Left),
        ]);
        for row in &self.basebackups {
            let version = row.server_version.split(' ').next().unwrap_or_default();
            table.row([
                row.id.clone(),
                style.time(row.started_at),
                duration(Duration::from_secs_f64(row.seconds.max(0.0))),
                size(row.database_bytes),
                size(row.stored_bytes),
                row.timeline.to_string(),
                row.stop_lsn.clone(),
                version.to_owned(),
                row.label.clone().unwrap_or_default(),
            ]);
        }
        if table.is_empty() {
            writeln!(out, "no basebackups")?;
        } else {
            table.write(out);
        }
        for row in self.basebackups.iter().filter(|row| row.standalone) {
            writeln!(out, "{}: standalone, it carries the WAL that it needs", row.id)?;
        }
        for row in &self.basebackups {
            if let Some(reason) = &row.unrecoverable_because {
                writeln!(out, "{}: cannot be recovered: {reason}", row.id)?;
            }
        }
        for row in &self.unreadable {
            writeln!(out, "{}: {}", row.id, row.reason)?;
        }
        for id in &self.unfinished {
            writeln!(out, "{id}: running, or killed before it was complete")?;
        }
        Ok(())
    }
}

impl ListedRow {
    /// Writes everything about the basebackup, a line for each fact.
    pub(super) fn write_details(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let damaged = match self.damaged_pages {
            0 => "none".to_owned(),
            pages => format!("{pages} pages"),
        };
        for (what, value) in [
            ("basebackup", self.id.clone()),
            ("label", self.label.clone().unwrap_or_default()),
            ("started", style.time(self.started_at)),
            ("stopped", style.time(self.stopped_at)),
            ("cluster", self.cluster.clone()),
            ("server", format!("PostgreSQL {} on {}", self.server_version, self.host)),
            ("timeline", self.timeline.to_string()),
            ("WAL", format!("{} to {}", self.start_lsn, self.stop_lsn)),
            ("files", self.files.to_string()),
            ("size", size(self.database_bytes)),
            (
                "stored",
                format!("{} ({}:1), {} added", size(self.live_bytes), self.ratio, size(self.stored_bytes)),
            ),
            ("damage in the source", damaged),
            ("signed", if self.signed { "yes" } else { "no" }.to_owned()),
            (
                "standalone",
                if self.standalone { "yes: it carries the WAL that it needs" } else { "no" }.to_owned(),
            ),
            (
                "recoverable",
                self.unrecoverable_because
                    .as_ref()
                    .map_or("yes".to_owned(), |reason| format!("no: {reason}")),
            ),
        ] {
            writeln!(out, "{what:<22}{value}")?;
        }
        Ok(())
    }
}
