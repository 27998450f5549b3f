//! `walden info` for people: a paragraph for each cluster, in it one for each timeline.
//!
//! Says first what can be recovered and last what each basebackup is worth. Every number is one of the report's.

use std::fmt::{self, Write};

use super::info::{BasebackupReport, ClusterReport, InfoReport, NewestReport, TimelineReport, WindowReport};
use super::output::Report;
use super::text::{Align, TextStyle, TextTable, duration, size};

impl Report for InfoReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        if self.clusters.is_empty() {
            writeln!(out, "There is nothing in site {}.", self.site)?;
        }
        for cluster in &self.clusters {
            cluster.write_text(out, style)?;
        }
        for row in &self.unreadable {
            writeln!(out, "basebackup {} cannot be read: {}", row.id, row.reason)?;
        }
        for id in &self.unfinished {
            writeln!(out, "basebackup {id} is running, or was killed before it was complete")?;
        }
        Ok(())
    }
}

impl ClusterReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let server = self.server_version.as_deref().and_then(|version| version.split(' ').next());
        let server = server.map_or(String::new(), |version| format!("PostgreSQL {version}, "));
        let segment = size(self.segment_bytes.into());
        writeln!(out, "Cluster {}, {server}WAL segments of {segment}", self.system_identifier)?;
        writeln!(out, "  basebackups  {}", self.basebackups_text())?;
        let segments: u64 = self.timelines.iter().map(|timeline| timeline.segments).sum();
        let newest = self.newest_wal.as_ref().map_or(String::new(), newest_text);
        writeln!(
            out,
            "  WAL          {}, {} stored{newest}",
            counted(segments, "segment"),
            size(self.wal_stored_bytes)
        )?;
        for timeline in &self.timelines {
            timeline.write_text(out, style)?;
        }
        write_basebackups(out, &self.basebackups, style);
        out.push('\n');
        Ok(())
    }

    fn basebackups_text(&self) -> String {
        let count = self.basebackups.len() as u64;
        let bytes = match (self.stored_bytes, self.live_bytes, self.stored_per_live) {
            _ if count == 0 => String::new(),
            (Some(stored), Some(live), Some(ratio)) => {
                format!(", {} stored for {} live ({ratio}:1)", size(stored), size(live))
            }
            (Some(stored), ..) => format!(", {} stored", size(stored)),
            _ => ", stored bytes are not known because a list of packs is damaged".to_owned(),
        };
        let newest = self.newest_basebackup.as_ref().map_or(String::new(), newest_text);
        format!("{count}{bytes}{newest}")
    }
}

fn newest_text(newest: &NewestReport) -> String {
    format!(", newest {} old ({})", duration(newest.age()), newest.name)
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl TimelineReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let from = self.parent.zip(self.switch_lsn.as_ref());
        let from = from.map_or(String::new(), |(parent, lsn)| format!(", from timeline {parent} at {lsn}"));
        writeln!(out, "\n  Timeline {}{from}", self.timeline)?;
        if let Some(error) = &self.history_error {
            writeln!(out, "    {error}")?;
        }
        if self.windows.iter().all(|window| !window.reaches_timeline) {
            writeln!(out, "    nothing can be recovered")?;
        }
        for window in &self.windows {
            window.write_text(out, style)?;
        }
        for (n, run) in self.runs.iter().enumerate() {
            writeln!(out, "    WAL          {run}")?;
            if let Some(hole) = self.holes.get(n) {
                writeln!(out, "    missing      {hole}")?;
            }
        }
        for partial in &self.partials {
            writeln!(out, "    partial      {partial}")?;
        }
        Ok(())
    }
}

impl WindowReport {
    fn write_text(&self, out: &mut String, style: &TextStyle) -> fmt::Result {
        let begin = style.time(self.begin_time);
        let end = match (self.last_transaction_at, &self.last_transaction_unknown, self.archived_at) {
            (Some(last), ..) if last < self.begin_time => "no transaction ended since".to_owned(),
            (Some(last), ..) => format!("to {}, the last transaction", style.time(last)),
            (None, None, _) => "no transaction ended since".to_owned(),
            (None, Some(reason), Some(at)) => {
                format!("to at most {}, when its WAL was archived ({reason})", style.time(at))
            }
            (None, Some(reason), None) => format!("to a time that is not known ({reason})"),
        };
        let of = match &self.basebackups[..] {
            [oldest, .., _] => format!("{oldest} and {} later", self.basebackups.len() - 1),
            _ => self.basebackups.join(", "),
        };
        let reached = if self.reaches_timeline { "recoverable " } else { "not reached " };
        writeln!(out, "    {reached} from {begin} {end}")?;
        writeln!(out, "                 LSN {} to {}, basebackup {of}", self.begin_lsn, self.end_lsn)?;
        if let Some(hole) = self.hole_text() {
            writeln!(out, "                 it ends there because {hole} missing")?;
        }
        if let Some(partial) = self.partial {
            writeln!(out, "                 behind it stands {partial}.partial")?;
        }
        Ok(())
    }
}

fn write_basebackups(out: &mut String, basebackups: &[BasebackupReport], style: &TextStyle) {
    if basebackups.is_empty() {
        return;
    }
    let mut table = TextTable::new(&[
        ("  BASEBACKUP", Align::Left),
        ("STOPPED", Align::Left),
        ("TLI", Align::Right),
        ("STOP LSN", Align::Left),
        ("ADDED", Align::Right),
        ("LIVE", Align::Right),
        ("RECOVERABLE", Align::Left),
    ]);
    for row in basebackups {
        table.row([
            format!("  {}", row.id),
            style.time(row.stopped_at),
            row.timeline.to_string(),
            row.stop_lsn.clone(),
            size(row.stored_bytes),
            size(row.live_bytes),
            row.reason.as_ref().map_or_else(|| "yes".to_owned(), |reason| format!("no: {reason}")),
        ]);
    }
    out.push('\n');
    table.write(out);
}
