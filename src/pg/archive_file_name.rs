//! The four kinds of files PostgreSQL hands to an archive, by name.
//!
//! A segment, a partial segment (what a promoted standby leaves of its old timeline), a timeline history and a
//! backup history. All four must be taken, or archiving stops for ever at the first promotion; every other name
//! is refused, so that no path or stray file reaches the store.

use std::fmt;
use std::str::FromStr;

use super::timeline::{TimelineId, upper_hex8};
use super::wal_segment::WalSegmentName;

/// The name of a file in the WAL archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArchiveFileName {
    /// `000000010000000A000000FF`
    Segment(WalSegmentName),
    /// `000000010000000A000000FF.partial`
    Partial(WalSegmentName),
    /// `00000002.history`
    History(TimelineId),
    /// `000000010000000A000000FF.00000028.backup`, with the backup's start as an offset into that segment.
    BackupHistory { segment: WalSegmentName, offset: u32 },
}

/// Tells that PostgreSQL archives no file of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not the name of a WAL segment, partial segment, timeline history or backup history")]
pub struct ParseArchiveFileNameError {
    text: String,
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;

impl ArchiveFileName {
    /// Returns the timeline the name begins with.
    pub fn timeline(self) -> TimelineId {
        match self {
            Self::Segment(segment) | Self::Partial(segment) | Self::BackupHistory { segment, .. } => {
                segment.timeline()
            }
            Self::History(timeline) => timeline,
        }
    }
}

impl fmt::Display for ArchiveFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(segment) => write!(f, "{segment}"),
            Self::Partial(segment) => write!(f, "{segment}.partial"),
            Self::History(timeline) => write!(f, "{}.history", timeline.hex8()),
            Self::BackupHistory { segment, offset } => write!(f, "{segment}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for ArchiveFileName {
    type Err = ParseArchiveFileNameError;

    fn from_str(text: &str) -> Result<Self, ParseArchiveFileNameError> {
        let refused = || ParseArchiveFileNameError { text: text.chars().take(QUOTED_CHARS_MAX).collect() };
        parse(text).ok_or_else(refused)
    }
}

fn parse(text: &str) -> Option<ArchiveFileName> {
    let Some((first, rest)) = text.split_once('.') else {
        return WalSegmentName::parse(text).ok().map(ArchiveFileName::Segment);
    };
    match rest {
        "history" => TimelineId::from_hex8(first).ok().map(ArchiveFileName::History),
        "partial" => WalSegmentName::parse(first).ok().map(ArchiveFileName::Partial),
        _ => {
            let offset = upper_hex8(rest.strip_suffix(".backup")?)?;
            let segment = WalSegmentName::parse(first).ok()?;
            Some(ArchiveFileName::BackupHistory { segment, offset })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Failure 3.
    #[test]
    fn all_four_kinds_are_taken() {
        let segment = WalSegmentName::parse("000000020000000A000000FF").unwrap();
        let cases = [
            ("000000020000000A000000FF", ArchiveFileName::Segment(segment)),
            ("000000020000000A000000FF.partial", ArchiveFileName::Partial(segment)),
            ("00000002.history", ArchiveFileName::History(segment.timeline())),
            (
                "000000020000000A000000FF.00000028.backup",
                ArchiveFileName::BackupHistory { segment, offset: 0x28 },
            ),
        ];
        for (text, name) in cases {
            assert_eq!(text.parse(), Ok(name));
            assert_eq!(name.to_string(), text);
            assert_eq!(name.timeline().get(), 2);
        }
    }

    #[test]
    fn every_other_name_is_refused() {
        let wrong = [
            "",
            ".",
            "..",
            "../000000020000000A000000FF",
            "pg_wal/000000020000000A000000FF",
            "000000020000000A000000FF/",
            "000000020000000A000000FF ",
            "000000020000000A000000FF\n",
            "000000020000000a000000FF",
            "000000020000000A000000FF.Partial",
            "000000020000000A000000FF.partial.partial",
            "000000020000000A000000FF.gz",
            "000000020000000A000000FF.backup",
            "000000020000000A000000FF.28.backup",
            "000000020000000A000000FF.0000002g.backup",
            "000000000000000A000000FF",
            "00000000.history",
            "0000000a.history",
            "2.history",
            "RECOVERYHISTORY",
            "RECOVERYXLOG",
            "000000020000000A000000FF.ready",
        ];
        for text in wrong {
            assert!(text.parse::<ArchiveFileName>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_is_written_back(
            text in r"[0-9A-F]{24}(\.partial)?|[0-9A-F]{8}\.history|[0-9A-F]{24}\.[0-9A-F]{8}\.backup|.*"
        ) {
            if let Ok(name) = text.parse::<ArchiveFileName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
