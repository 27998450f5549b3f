//! Timelines: every promotion begins a new one.
//!
//! Numbers grow, but a higher number is not a descendant: only the history files tell (`timeline_history`).

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The number of a timeline, never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(NonZeroU32);

/// Tells that a text or number is not a timeline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a timeline; timelines are numbered from 1")]
pub struct ParseTimelineError {
    text: String,
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;

impl TimelineId {
    /// The timeline `initdb` begins with.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// Returns the timeline of that number, none for 0.
    pub const fn new(number: u32) -> Option<Self> {
        match NonZeroU32::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// Returns the eight upper-case hexadecimal digits that file names begin with.
    pub fn hex8(self) -> String {
        format!("{:08X}", self.get())
    }

    /// Reads the eight upper-case hexadecimal digits of a file name.
    pub fn from_hex8(digits: &str) -> Result<Self, ParseTimelineError> {
        upper_hex8(digits).and_then(Self::new).ok_or_else(|| ParseTimelineError::new(digits))
    }
}

/// Reads eight upper-case hexadecimal digits, the only ones PostgreSQL takes in names.
pub(super) fn upper_hex8(digits: &str) -> Option<u32> {
    let upper = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    let plain = digits.len() == 8 && digits.bytes().all(upper);
    plain.then(|| u32::from_str_radix(digits, 16).ok()).flatten()
}

impl ParseTimelineError {
    fn new(text: &str) -> Self {
        Self { text: text.chars().take(QUOTED_CHARS_MAX).collect() }
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeline {self}")
    }
}

impl FromStr for TimelineId {
    type Err = ParseTimelineError;

    fn from_str(text: &str) -> Result<Self, ParseTimelineError> {
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        let number = digits.then(|| text.parse().ok()).flatten();
        number.and_then(Self::new).ok_or_else(|| ParseTimelineError::new(text))
    }
}

impl TryFrom<u32> for TimelineId {
    type Error = ParseTimelineError;

    fn try_from(number: u32) -> Result<Self, ParseTimelineError> {
        Self::new(number).ok_or_else(|| ParseTimelineError::new(&number.to_string()))
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> Self {
        timeline.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tli(number: u32) -> TimelineId {
        TimelineId::new(number).unwrap()
    }

    #[test]
    fn timelines_are_numbered_from_one() {
        assert_eq!("1".parse(), Ok(TimelineId::FIRST));
        assert_eq!(tli(0x1A).hex8(), "0000001A");
        assert_eq!(TimelineId::from_hex8("0000001A"), Ok(tli(26)));
        for text in ["", "0", "+1", "4294967296", "latest"] {
            assert!(text.parse::<TimelineId>().is_err(), "{text:?}");
        }
        for text in ["", "00000000", "0000001a", "1A", "+000001A", "000000001"] {
            assert!(TimelineId::from_hex8(text).is_err(), "{text:?}");
        }
        assert_eq!(serde_json::to_string(&tli(26)).unwrap(), "26");
        assert!(serde_json::from_str::<TimelineId>("0").is_err());
    }
}
