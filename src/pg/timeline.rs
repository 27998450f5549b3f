//! Timelines: every promotion begins a new one.
//! Numbers grow, but a higher number is not a descendant: only the history files tell.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The number of a timeline, never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct TimelineId(u32);

/// Timeline 0 does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no timeline 0")]
pub struct TimelineZero;

impl TimelineId {
    /// The timeline that initdb creates.
    pub const FIRST: Self = Self(1);

    /// Returns the timeline with this number.
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 { None } else { Some(Self(number)) }
    }

    /// Returns the number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Returns the number as it stands in file names: eight upper-case hexadecimal digits.
    pub fn hex8(self) -> String {
        format!("{:08X}", self.0)
    }
}

impl TryFrom<u32> for TimelineId {
    type Error = TimelineZero;

    fn try_from(number: u32) -> Result<Self, TimelineZero> {
        Self::new(number).ok_or(TimelineZero)
    }
}

impl From<TimelineId> for u32 {
    fn from(timeline: TimelineId) -> u32 {
        timeline.0
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "timeline {}", self.0)
    }
}
