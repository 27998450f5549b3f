//! WAL segments: their size, their numbers and their names.
//!
//! The log is cut into segments of one size, chosen by `initdb`; a segment's number is its place in the log,
//! its name is timeline, log and segment in 24 hexadecimal digits. A *log* is 4 GiB, so how often the last
//! eight digits count before they carry depends on the size: only with 16 MiB is the successor of `…FF` the
//! next log's `…00`. Every conversion therefore asks for the size, and a name that cannot exist at that size
//! is an error, not a number.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::lsn::Lsn;
use super::timeline::{TimelineId, upper_hex8};

/// The size of one cluster's WAL segments: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct WalSegmentSize(u32);

/// A segment's place in the log, counted in segments of its cluster's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentNumber(pub u64);

/// The file name of a segment, such as `00000001000000A0000000FF`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalSegmentName {
    timeline: TimelineId,
    log: u32,
    segment: u32,
}

/// What cannot be a segment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalSegmentError {
    #[error("{bytes} bytes is not a WAL segment size; it is a power of two from 1 MiB to 1 GiB")]
    Size { bytes: u32 },
    #[error("\"{text}\" is not the name of a WAL segment")]
    Name { text: String },
    #[error("no WAL segment is called {name} where segments have {} MiB", size.bytes() >> 20)]
    NameForSize { name: WalSegmentName, size: WalSegmentSize },
    #[error("{name} is the last WAL segment there can be")]
    EndOfLog { name: WalSegmentName },
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;
/// The bytes of what PostgreSQL calls a log (an `XLogId`).
const LOG_BYTES: u64 = 1 << 32;

impl WalSegmentSize {
    /// The size a cluster has unless `initdb --wal-segsize` said otherwise.
    pub const DEFAULT: Self = Self(16 << 20);
    /// The smallest size, 1 MiB.
    pub const MIN: Self = Self(1 << 20);
    /// The largest size, 1 GiB.
    pub const MAX: Self = Self(1 << 30);

    /// Checks a size in bytes.
    pub fn new(bytes: u32) -> Result<Self, WalSegmentError> {
        let valid = bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&Self(bytes));
        if valid { Ok(Self(bytes)) } else { Err(WalSegmentError::Size { bytes }) }
    }

    /// Returns the size in bytes.
    pub const fn bytes(self) -> u32 {
        self.0
    }

    /// Returns how many segments make 4 GiB: 256 at the default size.
    pub fn segments_per_log(self) -> u64 {
        LOG_BYTES / self.bytes_u64()
    }

    /// Returns where `lsn` lies in its segment.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 & (self.bytes_u64() - 1)
    }

    fn bytes_u64(self) -> u64 {
        u64::from(self.0)
    }
}

impl Default for WalSegmentSize {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl TryFrom<u32> for WalSegmentSize {
    type Error = WalSegmentError;

    fn try_from(bytes: u32) -> Result<Self, WalSegmentError> {
        Self::new(bytes)
    }
}

impl From<WalSegmentSize> for u32 {
    fn from(size: WalSegmentSize) -> Self {
        size.bytes()
    }
}

impl WalSegmentNumber {
    /// Returns the segment that holds the byte at `lsn` (`XLByteToSeg`).
    pub fn containing(lsn: Lsn, size: WalSegmentSize) -> Self {
        Self(lsn.0 / size.bytes_u64())
    }

    /// Returns the segment that holds the byte before `lsn` (`XLByteToPrevSeg`): the last one needed to have
    /// the log up to `lsn`. Position 0, which ends nothing, gives the first.
    pub fn ending_at(lsn: Lsn, size: WalSegmentSize) -> Self {
        Self::containing(Lsn(lsn.0.saturating_sub(1)), size)
    }

    /// Returns the position of the segment's first byte; a number no LSN reaches gives the last position.
    pub fn start_lsn(self, size: WalSegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(size.bytes_u64()))
    }

    /// Returns the following number.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl WalSegmentName {
    /// Names the segment of that number.
    ///
    /// # Panics
    ///
    /// If no LSN lies in a segment of that number; those made from an LSN or a name at the same size are safe.
    pub fn new(timeline: TimelineId, number: WalSegmentNumber, size: WalSegmentSize) -> Self {
        let per_log = size.segments_per_log();
        let log = u32::try_from(number.0 / per_log).expect("the number was counted at this segment size");
        let segment = u32::try_from(number.0 % per_log).expect("at most 4096 segments make a log");
        Self { timeline, log, segment }
    }

    /// Names the segment that holds the byte at `lsn`.
    pub fn containing(timeline: TimelineId, lsn: Lsn, size: WalSegmentSize) -> Self {
        Self::new(timeline, WalSegmentNumber::containing(lsn, size), size)
    }

    /// Reads a file name: 24 upper-case hexadecimal digits, of which the first eight are not all 0.
    pub fn parse(text: &str) -> Result<Self, WalSegmentError> {
        let part = |from: usize| text.get(from..from + 8).and_then(upper_hex8);
        let parts = (text.len() == 24).then(|| Some((TimelineId::new(part(0)?)?, part(8)?, part(16)?)));
        match parts.flatten() {
            Some((timeline, log, segment)) => Ok(Self { timeline, log, segment }),
            None => Err(WalSegmentError::Name { text: text.chars().take(QUOTED_CHARS_MAX).collect() }),
        }
    }

    /// Returns the timeline, the first eight digits.
    pub fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// Returns the log, the second eight digits: the high half of the segment's LSNs.
    pub fn log(self) -> u32 {
        self.log
    }

    /// Returns the segment of the same number on another timeline.
    pub fn on_timeline(self, timeline: TimelineId) -> Self {
        Self { timeline, ..self }
    }

    /// Returns the segment's place in a log of segments of that size.
    pub fn number(self, size: WalSegmentSize) -> Result<WalSegmentNumber, WalSegmentError> {
        let (log, segment, per_log) = (u64::from(self.log), u64::from(self.segment), size.segments_per_log());
        if segment >= per_log {
            return Err(WalSegmentError::NameForSize { name: self, size });
        }
        Ok(WalSegmentNumber(log * per_log + segment))
    }

    /// Returns the position of the first byte.
    pub fn start_lsn(self, size: WalSegmentSize) -> Result<Lsn, WalSegmentError> {
        Ok(self.number(size)?.start_lsn(size))
    }

    /// Returns the position after the last byte.
    pub fn end_lsn(self, size: WalSegmentSize) -> Result<Lsn, WalSegmentError> {
        let end = self.start_lsn(size)?.checked_add(size.bytes_u64());
        end.ok_or(WalSegmentError::EndOfLog { name: self })
    }

    /// Returns the segment that follows on the same timeline.
    pub fn next(self, size: WalSegmentSize) -> Result<Self, WalSegmentError> {
        Ok(Self::containing(self.timeline, self.end_lsn(size)?, size))
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
    type Err = WalSegmentError;

    fn from_str(text: &str) -> Result<Self, WalSegmentError> {
        Self::parse(text)
    }
}

impl Serialize for WalSegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WalSegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> WalSegmentName {
        text.parse().unwrap()
    }

    fn mib(mib: u32) -> WalSegmentSize {
        WalSegmentSize::new(mib << 20).unwrap()
    }

    #[test]
    fn sizes_are_powers_of_two_from_1_mib_to_1_gib() {
        for shift in 0..32 {
            assert_eq!(WalSegmentSize::new(1 << shift).is_ok(), (20..=30).contains(&shift), "{shift}");
        }
        for bytes in [0, 3 << 20, (16 << 20) + 1, u32::MAX] {
            assert_eq!(WalSegmentSize::new(bytes), Err(WalSegmentError::Size { bytes }));
        }
        assert_eq!(mib(16).segments_per_log(), 256);
        assert_eq!(serde_json::to_string(&mib(64)).unwrap(), "67108864");
        assert!(serde_json::from_str::<WalSegmentSize>("5").is_err());
    }

    /// Failures 6 and 7.
    #[test]
    fn the_successor_of_ff_depends_on_the_size() {
        let successor = |of, size| name(of).next(size).map(|n| n.to_string());
        let cases = [
            ("0000000100000000000000FF", 16, "000000010000000100000000"),
            ("0000000100000000000000FE", 16, "0000000100000000000000FF"),
            ("0000000100000000000000FF", 1, "000000010000000000000100"),
            ("000000010000000000000FFF", 1, "000000010000000100000000"),
            ("00000001000000000000003F", 64, "000000010000000100000000"),
            ("000000010000000000000003", 1024, "000000010000000100000000"),
            ("00000002FFFFFFFE000000FF", 16, "00000002FFFFFFFF00000000"),
        ];
        for (of, size, expected) in cases {
            assert_eq!(successor(of, mib(size)).as_deref(), Ok(expected), "{of} at {size} MiB");
        }
        let last = name("00000001FFFFFFFF000000FF");
        assert_eq!(last.next(mib(16)), Err(WalSegmentError::EndOfLog { name: last }));
    }

    #[test]
    fn a_name_that_the_size_does_not_allow_is_an_error() {
        let name = name("000000010000000000000100");
        assert_eq!(name.number(mib(1)), Ok(WalSegmentNumber(256)));
        let size = mib(16);
        assert_eq!(name.number(size), Err(WalSegmentError::NameForSize { name, size }));
        assert!(name.start_lsn(size).is_err() && name.next(size).is_err());
    }

    #[test]
    fn a_position_on_the_border_ends_the_earlier_segment() {
        let size = mib(16);
        assert_eq!(WalSegmentNumber::containing(Lsn(2 << 24), size), WalSegmentNumber(2));
        assert_eq!(WalSegmentNumber::ending_at(Lsn(2 << 24), size), WalSegmentNumber(1));
        assert_eq!(WalSegmentNumber::ending_at(Lsn((2 << 24) + 1), size), WalSegmentNumber(2));
        assert_eq!(WalSegmentNumber::ending_at(Lsn::ZERO, size), WalSegmentNumber(0));
        assert_eq!(size.offset_of(Lsn((2 << 24) + 40)), 40);
    }

    #[test]
    fn other_names_are_refused() {
        let wrong = [
            "",
            "00000001000000000000000",
            "0000000100000000000000011",
            "00000001000000000000000a",
            "000000000000000000000001",
            "0000000100000000000000/1",
            "+00000010000000000000001",
            "00000001000000000000000\u{e4}",
            "é0000010000000000000001",
        ];
        for text in wrong {
            assert!(WalSegmentName::parse(text).is_err(), "{text:?}");
        }
    }

    prop_compose! {
        fn sizes()(shift in 20u32..=30) -> WalSegmentSize {
            WalSegmentSize::new(1 << shift).unwrap()
        }
    }

    proptest! {
        #[test]
        fn positions_numbers_and_names_agree(lsn: u64, timeline in 1u32.., size in sizes()) {
            let (lsn, timeline) = (Lsn(lsn), TimelineId::new(timeline).unwrap());
            let number = WalSegmentNumber::containing(lsn, size);
            let name = WalSegmentName::new(timeline, number, size);
            prop_assert_eq!(name.to_string().parse(), Ok(name));
            prop_assert_eq!(name.timeline(), timeline);
            prop_assert_eq!(name.number(size), Ok(number));
            prop_assert_eq!(name.start_lsn(size).unwrap() + size.offset_of(lsn), lsn);
            if let Ok(next) = name.next(size) {
                prop_assert_eq!(next.number(size), Ok(WalSegmentNumber(number.0 + 1)));
                prop_assert!(next > name);
                prop_assert_eq!(name.end_lsn(size), next.start_lsn(size));
                prop_assert_eq!(WalSegmentNumber::ending_at(name.end_lsn(size).unwrap(), size), number);
            }
        }

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9A-Fa-f]{22,26}|.*", size in sizes()) {
            if let Ok(name) = WalSegmentName::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
                let _ = (name.start_lsn(size), name.end_lsn(size), name.next(size));
            }
        }
    }
}
