//! Which segments of a `pg_wal` are complete, by the control file: what a server has that marks nothing for an archive.
//!
//! Without archive_mode there are no marks, nor after a standby was promoted, whose older segments have some. A segment
//! that ends before the last checkpoint's redo position was written to its end; on a timeline that was left it has to end
//! before that was left, too. One that was recycled under a later name is behind it, or refused by its header.

use std::path::Path;

use crate::pg::{ControlFile, Lsn, TimelineHistory, TimelineId, WalSegmentName, WalSegmentSize};
use crate::wal::Error;
use crate::wal::data_directory::{read_at_most, read_control_file};

/// Up to where a server has written WAL for certain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Written {
    timeline: TimelineId,
    redo: Lsn,
    size: WalSegmentSize,
    /// How that timeline came about, where that is known: nothing is known of those before it otherwise.
    history: Option<TimelineHistory>,
}

/// As long as a server reads one.
const HISTORY_BYTES_MAX: u64 = 1 << 20;

impl Written {
    /// Reads it from a data directory.
    pub(super) fn of(data_directory: &Path) -> Result<Self, Error> {
        let ControlFile { timeline, redo, wal_segment_size: size, .. } = read_control_file(data_directory)?;
        let path = data_directory.join(format!("pg_wal/{}.history", timeline.hex8()));
        let text = read_at_most(&path, HISTORY_BYTES_MAX).ok();
        let history =
            text.and_then(|text| TimelineHistory::parse(timeline, &String::from_utf8_lossy(&text)).ok());
        Ok(Self { timeline, redo, size, history })
    }

    /// Tells whether all of a segment was written.
    pub(super) fn covers(&self, segment: WalSegmentName) -> bool {
        let end = if segment.timeline() == self.timeline {
            Some(self.redo)
        } else {
            self.history.as_ref().and_then(|history| history.switch_of(segment.timeline()))
        };
        let Ok(last) = segment.end_lsn(self.size) else { return false };
        end.is_some_and(|end| last <= end.min(self.redo))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_complete_before_the_redo_position_and_before_its_timeline_was_left() {
        let two = TimelineId::new(2).unwrap();
        let history = TimelineHistory::parse(two, "1\t0/5000100\tx\n").unwrap();
        let (redo, size) = (Lsn(0x8000028), WalSegmentSize::DEFAULT);
        let written = Written { timeline: two, redo, size, history: Some(history) };
        let covers = |written: &Written, name: &str| written.covers(name.parse().unwrap());
        for (name, expected) in [
            ("000000020000000000000005", true),
            ("000000020000000000000007", true),
            // Where redo begins, and what may be of any age behind it.
            ("000000020000000000000008", false),
            ("000000020000000000000009", false),
            ("000000010000000000000004", true),
            // The one that holds the switch point is complete on the new timeline only.
            ("000000010000000000000005", false),
            ("000000010000000000000006", false),
            // None of its ancestors.
            ("000000030000000000000004", false),
        ] {
            assert_eq!(covers(&written, name), expected, "{name}");
        }
        let earlier = Written { redo: Lsn(0x4000000), ..written.clone() };
        assert!(
            covers(&earlier, "000000010000000000000003") && !covers(&earlier, "000000010000000000000004")
        );
        let alone = Written { history: None, ..written };
        assert!(covers(&alone, "000000020000000000000005") && !covers(&alone, "000000010000000000000004"));
        assert!(!covers(&alone, "FFFFFFFEFFFFFFFF000000FF"));
    }
}
