//! The names things have in a repository: basebackup, cluster, pack, archive head.
//!
//! A basebackup's id is its start time and four random hex digits. It sorts by time, a child always after its
//! parent whatever the clocks say, and it is never used twice.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::codec::Random;
use crate::pg::{SystemIdentifier, WalSegmentSize};

/// The id of one attempt at a basebackup, `20261120T101500Z-3fa9`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BasebackupId {
    /// Start time, seconds since 1970.
    seconds: u64,
    random: u16,
}

/// A text that should have been a name of this module and is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a valid {what}")]
pub struct InvalidName {
    what: &'static str,
    text: String,
}

impl BasebackupId {
    const FORMAT: &'static str = "%Y%m%dT%H%M%SZ";
    const TIME_LEN: usize = "20261120T101500Z".len();
    /// The last second with a four-digit year, so that ids have one length and sort as text.
    const SECONDS_MAX: u64 = 253_402_300_799;

    /// Creates an id for a basebackup that starts `now`, which sorts after the one `before` it.
    pub fn new(now: Timestamp, before: Option<BasebackupId>, random: &dyn Random) -> Self {
        let clock = u64::try_from(now.as_second()).unwrap_or(0).min(Self::SECONDS_MAX);
        let seconds = before.map_or(clock, |before| clock.max(before.seconds + 1)).min(Self::SECONDS_MAX);
        let mut digits = [0; 2];
        random.fill(&mut digits);
        Self { seconds, random: u16::from_be_bytes(digits) }
    }

    /// Rebuilds an id from the two numbers it has in binary structures.
    pub fn from_parts(seconds: u64, random: u16) -> Result<Self, InvalidName> {
        if seconds > Self::SECONDS_MAX {
            return Err(InvalidName { what: "basebackup id", text: format!("{seconds}-{random:04x}") });
        }
        Ok(Self { seconds, random })
    }

    /// Returns the two numbers an id has in binary structures: seconds since 1970 and the random digits.
    pub fn parts(&self) -> (u64, u16) {
        (self.seconds, self.random)
    }

    /// Returns the start time that the id was made from.
    pub fn time(&self) -> Timestamp {
        Timestamp::from_second(self.seconds as i64).expect("an id holds at most SECONDS_MAX")
    }
}

impl fmt::Display for BasebackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.time().to_zoned(TimeZone::UTC);
        write!(f, "{}-{:04x}", time.strftime(Self::FORMAT), self.random)
    }
}

impl fmt::Debug for BasebackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for BasebackupId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = || InvalidName { what: "basebackup id", text: text.to_owned() };
        let (time, digits) = text.split_at_checked(Self::TIME_LEN).ok_or_else(invalid)?;
        let digits = digits.strip_prefix('-').filter(|d| d.len() == 4).ok_or_else(invalid)?;
        let time = jiff::civil::DateTime::strptime(Self::FORMAT, time).map_err(|_| invalid())?;
        let time = time.to_zoned(TimeZone::UTC).map_err(|_| invalid())?.timestamp();
        let seconds = u64::try_from(time.as_second()).map_err(|_| invalid())?;
        let random = u16::from_str_radix(digits, 16).map_err(|_| invalid())?;
        let id = Self::from_parts(seconds, random).map_err(|_| invalid())?;
        // One spelling only: a second one would be a second object with the same meaning.
        if id.to_string() == text { Ok(id) } else { Err(invalid()) }
    }
}

/// A cluster within a site: after pg_upgrade or a new initdb the next one stands beside it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClusterId {
    /// The identifier in pg_control.
    pub system_identifier: SystemIdentifier,
    /// The size of its WAL segments, without which a segment's name has no meaning.
    pub segment_size: WalSegmentSize,
}

impl ClusterId {
    /// Stands in identities of objects that are bound to a basebackup's id alone.
    pub(crate) const UNKNOWN: Self =
        Self { system_identifier: SystemIdentifier(0), segment_size: WalSegmentSize::DEFAULT };
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.system_identifier, self.segment_size.bytes() >> 20)
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ClusterId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let parse = || {
            let (identifier, mebibytes) = text.split_once('-')?;
            let mebibytes: u32 = mebibytes.parse().ok().filter(|m| *m <= 1024)?;
            let segment_size = WalSegmentSize::new(mebibytes << 20).ok()?;
            let id = Self { system_identifier: SystemIdentifier(identifier.parse().ok()?), segment_size };
            (id.to_string() == text).then_some(id)
        };
        parse().ok_or_else(|| InvalidName { what: "cluster", text: text.to_owned() })
    }
}

/// A pack, wherever it is named from: the basebackup that wrote it and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId {
    /// The basebackup whose folder holds the pack.
    pub origin: BasebackupId,
    /// Counts from 0 in the order of writing.
    pub number: u32,
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pack {} of basebackup {}", self.number, self.origin)
    }
}

/// The name of an archive head, `20261120T101500Z-3fa9`: when it was written, or a second behind the
/// newest where a clock was further, and digits that keep two hosts apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HeadId(BasebackupId);

impl HeadId {
    /// Names a head that is written `now`, which sorts after the one `before` it.
    pub fn new(now: Timestamp, before: Option<Self>, random: &dyn Random) -> Self {
        Self(BasebackupId::new(now, before.map(|before| before.0), random))
    }

    /// Returns a name that sorts before every other of this time or later.
    pub fn first_at(time: Timestamp) -> Self {
        let seconds = u64::try_from(time.as_second()).unwrap_or(0).min(BasebackupId::SECONDS_MAX);
        Self(BasebackupId { seconds, random: 0 })
    }
}

impl fmt::Display for HeadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for HeadId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = |_| InvalidName { what: "archive head", text: text.to_owned() };
        text.parse().map(Self).map_err(invalid)
    }
}

macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_text!(BasebackupId);
serde_as_text!(ClusterId);

#[cfg(test)]
mod tests {
    use crate::codec::SeededRandom;

    use super::*;

    #[test]
    fn an_id_is_its_time_and_four_digits() {
        let id: BasebackupId = "20261120T101500Z-3fa9".parse().unwrap();
        assert_eq!(id.to_string(), "20261120T101500Z-3fa9");
        assert_eq!(id.time().to_string(), "2026-11-20T10:15:00Z");
        let (seconds, random) = id.parts();
        assert_eq!(BasebackupId::from_parts(seconds, random).unwrap(), id);
    }

    #[test]
    fn other_spellings_are_refused() {
        for text in [
            "",
            "latest",
            "20261120T101500Z-3FA9",
            "20261120T101500Z-3fa",
            "20261120T101500Z-+3f9",
            "20261320T101500Z-3fa9",
            "20261120T101500Z_3fa9",
            "2026112 T101500Z-3fa9",
            "20261120T101500Z-3fa99",
        ] {
            assert!(text.parse::<BasebackupId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_child_sorts_after_its_parent_when_the_clock_went_back() {
        let random = SeededRandom::new(1);
        let parent: BasebackupId = "20261120T101500Z-ffff".parse().unwrap();
        let child = BasebackupId::new("2026-11-20T09:15:00Z".parse().unwrap(), Some(parent), &random);
        assert!(child > parent);
        assert!(child.to_string() > parent.to_string());
        assert_eq!(child.time().to_string(), "2026-11-20T10:15:01Z");
    }

    #[test]
    fn a_cluster_is_named_by_identifier_and_segment_size() {
        let id: ClusterId = "7301234567890123456-16".parse().unwrap();
        assert_eq!(id.segment_size.bytes(), 16 << 20);
        for text in
            ["7301234567890123456", "7301234567890123456-3", "x-16", "7301234567890123456-016", "1-4096"]
        {
            assert!(text.parse::<ClusterId>().is_err(), "{text:?}");
        }
    }
}
