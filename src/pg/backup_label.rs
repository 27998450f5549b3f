//! `backup_label`: where recovery of a backup begins.
//!
//! The text comes back from `pg_backup_stop` and is part of the data; without it a copy recovers from the wrong
//! checkpoint and is silently corrupt. Read by the rules of the server's `read_backup_label`: the first two lines
//! must stand, the others may be missing, and lines nobody knows are passed over.

use std::str::FromStr;

use super::lsn::Lsn;
use super::timeline::TimelineId;
use super::wal_segment::WalSegmentName;

/// What a backup label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where redo begins: every segment from here on is needed.
    pub start_wal_location: Lsn,
    /// The segment that holds it.
    pub start_wal_file: WalSegmentName,
    /// The checkpoint record to begin with, at or after the start.
    pub checkpoint_location: Lsn,
    pub from: Option<BackupFrom>,
    /// Local time of the server with a zone's abbreviation, for people only.
    pub start_time: Option<String>,
    pub label: Option<String>,
    /// On 11 and later always there, and the timeline of `start_wal_file`.
    pub start_timeline: Option<TimelineId>,
    /// The start of the backup this one is an increment to (17 and later); the server refuses to start from it
    /// until `pg_combinebackup` has made it whole.
    pub incremental_from: Option<Lsn>,
}

/// Which kind of server a backup was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFrom {
    Primary,
    Standby,
}

/// Why a text is not a backup label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    #[error("backup_label has no valid line \"{key}\"")]
    Line { key: &'static str },
    #[error("backup_label starts on timeline {timeline} but in the segment {segment}")]
    OtherTimeline { timeline: TimelineId, segment: WalSegmentName },
    #[error("backup_label has the checkpoint at {checkpoint}, before its start at {start}")]
    CheckpointBeforeStart { checkpoint: Lsn, start: Lsn },
}

const START: &str = "START WAL LOCATION";
const CHECKPOINT: &str = "CHECKPOINT LOCATION";
const FROM: &str = "BACKUP FROM";
const START_TIMELINE: &str = "START TIMELINE";
const INCREMENTAL_FROM: &str = "INCREMENTAL FROM LSN";

impl BackupLabel {
    /// Reads a label.
    pub fn parse(text: &str) -> Result<Self, BackupLabelError> {
        let mut lines = text.lines();
        let mut required = |key| {
            let value = lines.next().and_then(|line| value_of(line, key));
            value.ok_or(BackupLabelError::Line { key })
        };
        let (start_wal_location, start_wal_file) =
            parse_start(required(START)?).ok_or(BackupLabelError::Line { key: START })?;
        let checkpoint_location = parsed(CHECKPOINT, required(CHECKPOINT)?)?;
        let mut label = Self {
            start_wal_location,
            start_wal_file,
            checkpoint_location,
            from: None,
            start_time: None,
            label: None,
            start_timeline: None,
            incremental_from: None,
        };
        for line in lines {
            label.read_optional(line)?;
        }
        label.check()?;
        Ok(label)
    }

    fn read_optional(&mut self, line: &str) -> Result<(), BackupLabelError> {
        let Some((key, value)) = line.split_once(": ") else { return Ok(()) };
        match key {
            FROM => self.from = Some(BackupFrom::parse(value).ok_or(BackupLabelError::Line { key: FROM })?),
            "START TIME" => self.start_time = Some(value.to_owned()),
            "LABEL" => self.label = Some(value.to_owned()),
            START_TIMELINE => self.start_timeline = Some(parsed(START_TIMELINE, value)?),
            INCREMENTAL_FROM => self.incremental_from = Some(parsed(INCREMENTAL_FROM, value)?),
            _ => {}
        }
        Ok(())
    }

    fn check(&self) -> Result<(), BackupLabelError> {
        let (segment, checkpoint, start) =
            (self.start_wal_file, self.checkpoint_location, self.start_wal_location);
        match self.start_timeline.filter(|timeline| *timeline != segment.timeline()) {
            Some(timeline) => Err(BackupLabelError::OtherTimeline { timeline, segment }),
            None if checkpoint < start => Err(BackupLabelError::CheckpointBeforeStart { checkpoint, start }),
            None => Ok(()),
        }
    }

    /// Returns the timeline the backup started on.
    pub fn timeline(&self) -> TimelineId {
        self.start_wal_file.timeline()
    }
}

impl BackupFrom {
    /// 13 still says `master`.
    fn parse(text: &str) -> Option<Self> {
        match text {
            "primary" | "master" => Some(Self::Primary),
            "standby" => Some(Self::Standby),
            _ => None,
        }
    }
}

fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.strip_prefix(key)?.strip_prefix(": ")
}

fn parsed<T: FromStr>(key: &'static str, value: &str) -> Result<T, BackupLabelError> {
    value.parse().map_err(|_| BackupLabelError::Line { key })
}

/// Reads `0/2000028 (file 000000010000000000000002)`.
fn parse_start(value: &str) -> Option<(Lsn, WalSegmentName)> {
    let (lsn, file) = value.split_once(" (file ")?;
    Some((lsn.parse().ok()?, file.strip_suffix(')')?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As 15 returned it.
    const LABEL: &str = "START WAL LOCATION: 0/F00028 (file 00000001000000000000000F)
CHECKPOINT LOCATION: 0/F00060
BACKUP METHOD: streamed
BACKUP FROM: primary
START TIME: 2026-11-21 03:22:33 UTC
LABEL: the label: odd
START TIMELINE: 1
";

    #[test]
    fn a_label_of_the_server_is_read() {
        let label = BackupLabel::parse(LABEL).unwrap();
        assert_eq!(label.start_wal_location, Lsn(0xF0_0028));
        assert_eq!(label.start_wal_file.to_string(), "00000001000000000000000F");
        assert_eq!(label.checkpoint_location, Lsn(0xF0_0060));
        assert_eq!(label.from, Some(BackupFrom::Primary));
        assert_eq!(label.start_time.as_deref(), Some("2026-11-21 03:22:33 UTC"));
        assert_eq!(label.label.as_deref(), Some("the label: odd"));
        assert_eq!(label.start_timeline, Some(TimelineId::FIRST));
        assert_eq!((label.timeline(), label.incremental_from), (TimelineId::FIRST, None));
    }

    #[test]
    fn words_of_other_versions_and_servers_are_read() {
        let from = |word: &str| BackupLabel::parse(&LABEL.replace("primary", word)).map(|label| label.from);
        assert_eq!(from("master"), Ok(Some(BackupFrom::Primary)));
        assert_eq!(from("standby"), Ok(Some(BackupFrom::Standby)));
        assert_eq!(from("cascade"), Err(BackupLabelError::Line { key: FROM }));
        let increment = format!("{LABEL}INCREMENTAL FROM LSN: 0/D00028\nINCREMENTAL FROM TLI: 1\nNEW: x\n");
        assert_eq!(BackupLabel::parse(&increment).unwrap().incremental_from, Some(Lsn(0xD0_0028)));
    }

    #[test]
    fn a_label_that_leads_recovery_astray_is_refused() {
        let error = |from: &str, to: &str| BackupLabel::parse(&LABEL.replace(from, to)).unwrap_err();
        assert_eq!(BackupLabel::parse(""), Err(BackupLabelError::Line { key: START }));
        assert_eq!(error("0/F00028", "F00028"), BackupLabelError::Line { key: START });
        assert_eq!(error("0000000F)", "0000000F"), BackupLabelError::Line { key: START });
        assert_eq!(error("CHECKPOINT LOCATION: ", ""), BackupLabelError::Line { key: CHECKPOINT });
        assert_eq!(error("TIMELINE: 1", "TIMELINE: 0"), BackupLabelError::Line { key: START_TIMELINE });
        assert!(matches!(error("TIMELINE: 1", "TIMELINE: 2"), BackupLabelError::OtherTimeline { .. }));
        assert!(matches!(error("0/F00060", "0/F00020"), BackupLabelError::CheckpointBeforeStart { .. }));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(line in 0usize..7, text: String) {
            let mut lines: Vec<&str> = LABEL.lines().collect();
            lines[line] = &text;
            let _ = BackupLabel::parse(&lines.join("\n"));
            let _ = BackupLabel::parse(&text);
        }
    }
}
