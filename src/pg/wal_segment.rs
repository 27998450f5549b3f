//! WAL segments: their size, their numbers, their names of 24 hexadecimal digits.
//!
//! A name is timeline, log and segment, eight digits each; a log is 4 GiB, so how high the last part counts, and
//! what follows `…FF`, depends on the segment size. Nothing here assumes 16 MiB.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::pg::lsn::Lsn;
use crate::pg::timeline::TimelineId;

/// The size of a cluster's WAL segments: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct WalSegmentSize(u32);

/// A number of bytes that no cluster has as its segment size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes is not a valid WAL segment size")]
pub struct InvalidSegmentSize(u32);

/// The number of a segment on a timeline, counted from the start of the WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentNumber(pub u64);

/// The file name of a segment, `000000010000000000000002`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentName {
    timeline: TimelineId,
    log: u32,
    segment: u32,
}

/// A text or number that is not a segment's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not a valid WAL segment name")]
pub struct InvalidSegmentName(String);

impl WalSegmentSize {
    /// 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// Checks a size in bytes.
    pub fn new(bytes: u32) -> Result<Self, InvalidSegmentSize> {
        let valid = bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes);
        if valid { Ok(Self(bytes)) } else { Err(InvalidSegmentSize(bytes)) }
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// Returns how many segments a log of 4 GiB has.
    pub const fn segments_per_log(self) -> u64 {
        (1 << 32) / self.0 as u64
    }
}

impl TryFrom<u32> for WalSegmentSize {
    type Error = InvalidSegmentSize;

    fn try_from(bytes: u32) -> Result<Self, InvalidSegmentSize> {
        Self::new(bytes)
    }
}

impl From<WalSegmentSize> for u32 {
    fn from(size: WalSegmentSize) -> u32 {
        size.0
    }
}

impl WalSegmentNumber {
    /// Returns the segment that holds the byte at `lsn`.
    pub fn containing(lsn: Lsn, size: WalSegmentSize) -> Self {
        Self(lsn.0 / u64::from(size.bytes()))
    }

    /// Returns the segment that holds the byte before `lsn`: at a boundary, the one that ends there.
    pub fn ending_at(lsn: Lsn, size: WalSegmentSize) -> Self {
        Self(lsn.0.saturating_sub(1) / u64::from(size.bytes()))
    }

    /// Returns the position of its first byte.
    pub fn start_lsn(self, size: WalSegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(u64::from(size.bytes())))
    }

    /// Returns the following number.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl WalSegmentName {
    /// Returns the name of segment `number` of `timeline`.
    pub fn new(timeline: TimelineId, number: WalSegmentNumber, size: WalSegmentSize) -> Self {
        let per_log = size.segments_per_log();
        Self { timeline, log: (number.0 / per_log) as u32, segment: (number.0 % per_log) as u32 }
    }

    /// Returns the timeline.
    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// Returns the middle part of the name.
    pub fn log(&self) -> u32 {
        self.log
    }

    /// Returns the segment's number.
    ///
    /// # Errors
    /// Where the last part is higher than segments of this size count.
    pub fn number(&self, size: WalSegmentSize) -> Result<WalSegmentNumber, InvalidSegmentName> {
        let per_log = size.segments_per_log();
        if u64::from(self.segment) >= per_log {
            return Err(InvalidSegmentName(self.to_string()));
        }
        Ok(WalSegmentNumber(u64::from(self.log) * per_log + u64::from(self.segment)))
    }

    /// Returns the position of its first byte.
    pub fn start_lsn(&self, size: WalSegmentSize) -> Result<Lsn, InvalidSegmentName> {
        Ok(self.number(size)?.start_lsn(size))
    }

    /// Returns the position behind its last byte.
    pub fn end_lsn(&self, size: WalSegmentSize) -> Result<Lsn, InvalidSegmentName> {
        Ok(self.number(size)?.next().start_lsn(size))
    }

    /// Returns the name of the segment that follows on the same timeline.
    pub fn next(&self, size: WalSegmentSize) -> Result<Self, InvalidSegmentName> {
        Ok(Self::new(self.timeline, self.number(size)?.next(), size))
    }
}

impl fmt::Display for WalSegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), self.log, self.segment)
    }
}

impl fmt::Debug for WalSegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for WalSegmentName {
    type Err = InvalidSegmentName;

    fn from_str(text: &str) -> Result<Self, InvalidSegmentName> {
        let valid = text.len() == 24 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F'));
        let part = |from: usize| u32::from_str_radix(text.get(from..from + 8)?, 16).ok();
        let parse = || Some(Self { timeline: TimelineId::new(part(0)?)?, log: part(8)?, segment: part(16)? });
        valid.then(parse).flatten().ok_or_else(|| InvalidSegmentName(text.to_owned()))
    }
}

impl Serialize for WalSegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WalSegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Failure 7: the successor of `…FF` was computed wrongly.
    #[test]
    fn the_last_segment_of_a_log_is_followed_by_the_next_log_at_every_size() {
        for (mebibytes, last) in [(1, "00000FFF"), (16, "000000FF"), (64, "0000003F"), (1024, "00000003")] {
            let size = WalSegmentSize::new(mebibytes << 20).unwrap();
            let name: WalSegmentName = format!("000000010000000A{last}").parse().unwrap();
            assert_eq!(name.next(size).unwrap().to_string(), "000000010000000B00000000");
            let beyond: WalSegmentName = "000000010000000A00001000".parse().unwrap();
            assert!(beyond.number(size).is_err());
        }
    }

    #[test]
    fn a_position_at_a_boundary_ends_one_segment_and_begins_the_next() {
        let size = WalSegmentSize::DEFAULT;
        let lsn = Lsn(3 << 24);
        assert_eq!(WalSegmentNumber::containing(lsn, size), WalSegmentNumber(3));
        assert_eq!(WalSegmentNumber::ending_at(lsn, size), WalSegmentNumber(2));
        assert_eq!(WalSegmentNumber::ending_at(lsn + 1, size), WalSegmentNumber(3));
    }

    #[test]
    fn what_is_not_a_name_is_refused() {
        for bad in [
            "",
            "00000001000000000000000",
            "00000001000000000000000a",
            "000000000000000000000001",
            "../000010000000000000002",
        ] {
            assert!(bad.parse::<WalSegmentName>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn names_and_numbers_are_inverse(timeline in 1u32.., number in 0u64..1 << 40, shift in 20u32..=30) {
            let size = WalSegmentSize::new(1 << shift).unwrap();
            let number = WalSegmentNumber(number % (1 << (64 - shift)).min(1 << 40));
            let number = WalSegmentNumber(number.0 % (u64::from(u32::MAX) * size.segments_per_log()));
            let name = WalSegmentName::new(TimelineId::new(timeline).unwrap(), number, size);
            prop_assert_eq!(name.to_string().parse::<WalSegmentName>().unwrap(), name);
            prop_assert_eq!(name.number(size).unwrap(), number);
            prop_assert_eq!(name.next(size).unwrap().number(size).unwrap(), number.next());
        }
    }
}
