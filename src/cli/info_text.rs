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
        if let Some(end) = &self.pieces_end_lsn {
            writeln!(out, "                 of its last WAL segment there are pieces, up to {end}")?;
        }
        if let Some(partial) = self.partial {
            writeln!(out, "                 its last WAL segment is {partial}.partial, which may hold less")?;
        }
        if let Some(hole) = self.hole_text() {
            writeln!(out, "                 it ends there because {hole} missing")?;
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
            match &row.reason {
                Some(reason) => format!("no: {reason}"),
                None if row.standalone => "yes, standalone".to_owned(),
                None => "yes".to_owned(),
            },
        ]);
    }
    out.push('\n');
    table.write(out);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use jiff::Timestamp;
    use jiff::tz::TimeZone;
    use serde_json::Value;

    use crate::catalog::{Hole, SegmentRange};

    use super::super::info::UnreadableReport;
    use super::*;

    fn at(time: &str) -> Timestamp {
        format!("2026-11-20T{time}Z").parse().unwrap()
    }

    fn range(first: &str, last: &str, segments: u64) -> SegmentRange {
        let name = |number: &str| format!("0000000100000000000000{number}").parse().unwrap();
        SegmentRange { first: name(first), last: name(last), segments }
    }

    fn window() -> WindowReport {
        WindowReport {
            basebackups: vec!["20261120T100000Z-0001".to_owned(), "20261120T110000Z-0002".to_owned()],
            begin_lsn: "0/3000028".to_owned(),
            begin_time: at("10:00:05"),
            end_lsn: "0/6000000".to_owned(),
            last_transaction_at: Some(at("11:30:00")),
            last_transaction_unknown: None,
            archived_at: Some(at("11:31:00")),
            reaches_timeline: true,
            hole: Some(Hole { missing: vec![range("06", "07", 2)], behind: vec![range("08", "09", 2)] }),
            partial: None,
            pieces_end_lsn: Some("0/5F00028".to_owned()),
        }
    }

    fn report(window: WindowReport) -> InfoReport {
        let newest =
            |name: &str| NewestReport { name: name.to_owned(), at: at("11:31:00"), age_seconds: 200.0 };
        let timeline = TimelineReport {
            timeline: 1,
            parent: None,
            switch_lsn: None,
            history_error: None,
            segments: 5,
            stored_bytes: 5 << 20,
            newest_at: Some(at("11:31:00")),
            runs: vec![range("03", "05", 3), range("08", "09", 2)],
            holes: vec![range("06", "07", 2)],
            partials: vec!["00000001000000000000000A".parse().unwrap()],
            windows: vec![window],
        };
        let basebackup = BasebackupReport {
            id: "20261120T100000Z-0001".to_owned(),
            label: None,
            timeline: 1,
            start_lsn: "0/3000028".to_owned(),
            stop_lsn: "0/3000100".to_owned(),
            started_at: at("10:00:00"),
            stopped_at: at("10:00:05"),
            database_bytes: 64 << 20,
            stored_bytes: 20 << 20,
            live_bytes: 18 << 20,
            standalone: false,
            recoverable: false,
            reason: Some("something is missing".to_owned()),
        };
        let cluster = ClusterReport {
            cluster: "7301234567890123456-16".to_owned(),
            system_identifier: "7301234567890123456".to_owned(),
            segment_bytes: 16 << 20,
            server_version: Some("15.18 (Debian 15.18-1)".to_owned()),
            stored_bytes: Some(30 << 20),
            live_bytes: Some(20 << 20),
            stored_per_live: Some(1.5),
            wal_stored_bytes: 5 << 20,
            newest_basebackup: Some(newest("20261120T110000Z-0002")),
            newest_wal: Some(newest("000000010000000000000009")),
            timelines: vec![timeline],
            basebackups: vec![basebackup],
        };
        let unreadable =
            UnreadableReport { id: "20261120T090000Z-0003".to_owned(), reason: "it is damaged".to_owned() };
        InfoReport {
            site: "main".to_owned(),
            clusters: vec![cluster],
            unreadable: vec![unreadable],
            unfinished: vec!["20261120T120000Z-0004".to_owned()],
        }
    }

    fn text_of(report: &InfoReport) -> String {
        let mut text = String::new();
        report.write_text(&mut text, &TextStyle { time_zone: TimeZone::UTC.into() }).unwrap();
        text
    }

    #[test]
    fn people_see_windows_holes_and_what_each_basebackup_is_worth() {
        let expected = "\
Cluster 7301234567890123456, PostgreSQL 15.18, WAL segments of 16.0 MiB
  basebackups  1, 30.0 MiB stored for 20.0 MiB live (1.5:1), newest 3 min 20 s old (20261120T110000Z-0002)
  WAL          5 segments, 5.00 MiB stored, newest 3 min 20 s old (000000010000000000000009)

  Timeline 1
    recoverable  from 2026-11-20 10:00:05+00:00 to 2026-11-20 11:30:00+00:00, the last transaction
                 LSN 0/3000028 to 0/6000000, basebackup 20261120T100000Z-0001 and 1 later
                 of its last WAL segment there are pieces, up to 0/5F00028
                 it ends there because WAL segments 000000010000000000000006 to 000000010000000000000007 (2) are missing
    WAL          000000010000000000000003 to 000000010000000000000005 (3)
    missing      000000010000000000000006 to 000000010000000000000007 (2)
    WAL          000000010000000000000008 to 000000010000000000000009 (2)
    partial      00000001000000000000000A

  BASEBACKUP             STOPPED                    TLI  STOP LSN      ADDED      LIVE  RECOVERABLE
  20261120T100000Z-0001  2026-11-20 10:00:05+00:00    1  0/3000100  20.0 MiB  18.0 MiB  no: something is missing

basebackup 20261120T090000Z-0003 cannot be read: it is damaged
basebackup 20261120T120000Z-0004 is running, or was killed before it was complete
";
        assert_eq!(text_of(&report(window())), expected);
    }

    #[test]
    fn an_end_that_is_not_known_is_not_made_up() {
        let unknown = || WindowReport {
            last_transaction_at: None,
            last_transaction_unknown: Some("no key".to_owned()),
            ..window()
        };
        let none = || WindowReport { last_transaction_at: None, ..window() };
        for (window, end) in [
            (unknown(), "to at most 2026-11-20 11:31:00+00:00, when its WAL was archived (no key)"),
            (WindowReport { archived_at: None, ..unknown() }, "to a time that is not known (no key)"),
            (none(), "no transaction ended since"),
            (
                WindowReport { last_transaction_at: Some(at("10:00:00")), ..window() },
                "no transaction ended since",
            ),
        ] {
            let text = text_of(&report(window));
            assert!(text.contains(&format!("from 2026-11-20 10:00:05+00:00 {end}\n")), "{end}: {text}");
        }
    }

    fn names_of(value: &Value, names: &mut BTreeSet<String>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| names_of(item, names)),
            Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                names.insert(name.clone());
                names_of(value, names);
            }),
            _ => {}
        }
    }

    #[test]
    fn every_field_is_documented() {
        let mut names = BTreeSet::new();
        names_of(&serde_json::to_value(report(window())).unwrap(), &mut names);
        assert!(names.len() > 40, "{names:?}");
        let document = include_str!("../../docs/info.md");
        let words: BTreeSet<&str> =
            document.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
        let missing: Vec<_> = names.iter().filter(|name| !words.contains(name.as_str())).collect();
        assert!(missing.is_empty(), "docs/info.md lacks {missing:?}");
    }
}
