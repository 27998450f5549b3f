//! The four kinds of names that the server's archiver and recovery use.
//!
//! Anything else is refused: a name becomes part of an object key and of a path, and the server never asks for
//! another. Case and length are exactly the server's.

use std::fmt;
use std::str::FromStr;

use crate::pg::timeline::TimelineId;
use crate::pg::wal_segment::WalSegmentName;

/// The name of a file that PostgreSQL archives or asks back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArchiveFileName {
    /// A complete segment.
    Segment(WalSegmentName),
    /// The last segment of a timeline that was left by promotion: `<segment>.partial`.
    Partial(WalSegmentName),
    /// A timeline history file: `<timeline>.history`.
    History(TimelineId),
    /// A backup history file: `<segment>.<offset>.backup`.
    BackupHistory { segment: WalSegmentName, offset: u32 },
}

/// A name that is none of the four.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not the name of a WAL segment, partial segment, timeline history or backup history file")]
pub struct InvalidArchiveFileName(String);

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
    type Err = InvalidArchiveFileName;

    fn from_str(text: &str) -> Result<Self, InvalidArchiveFileName> {
        parse(text).ok_or_else(|| InvalidArchiveFileName(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<ArchiveFileName> {
    if let Some(timeline) = text.strip_suffix(".history") {
        return TimelineId::new(hex8(timeline)?).map(ArchiveFileName::History);
    }
    let (segment, suffix) = text.split_at_checked(24)?;
    let segment = segment.parse().ok()?;
    match suffix {
        "" => Some(ArchiveFileName::Segment(segment)),
        ".partial" => Some(ArchiveFileName::Partial(segment)),
        _ => {
            let offset = hex8(suffix.strip_prefix('.')?.strip_suffix(".backup")?)?;
            Some(ArchiveFileName::BackupHistory { segment, offset })
        }
    }
}

fn hex8(text: &str) -> Option<u32> {
    let valid = text.len() == 8 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
    if valid { u32::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_four_kinds_come_back_as_they_were() {
        for text in [
            "000000010000000000000002",
            "0000000100000000000000FF.partial",
            "0000000A.history",
            "000000010000000000000002.00000028.backup",
        ] {
            assert_eq!(text.parse::<ArchiveFileName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "00000000.history",
            "0000000a.history",
            "1.history",
            "../000000010000000000000002",
            "000000010000000000000002.gz",
            "000000010000000000000002.partial.partial",
            "000000010000000000000002.28.backup",
            "RECOVERYXLOG",
        ] {
            assert!(text.parse::<ArchiveFileName>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text: String) {
            if let Ok(name) = text.parse::<ArchiveFileName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
