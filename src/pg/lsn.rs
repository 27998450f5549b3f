//! A position in the write-ahead log.
//!
//! An LSN counts bytes since the log began, across segments and timelines; it says where, never on which
//! timeline. Text is PostgreSQL's own `16/B374D848`: two halves in upper-case hexadecimal without leading
//! zeros; either case is read. Deliberately absent: segments, whose size differs between clusters
//! (`wal_segment`).

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A byte position in the write-ahead log (`XLogRecPtr`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

/// Tells that a text is not an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not an LSN; one looks like 16/B374D848")]
pub struct ParseLsnError {
    text: String,
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;

impl Lsn {
    /// The position PostgreSQL calls invalid: nothing is ever written there.
    pub const ZERO: Self = Self(0);

    /// Tells whether this is PostgreSQL's invalid position.
    pub fn is_zero(self) -> bool {
        self == Self::ZERO
    }

    /// Returns the position `bytes` further on, none past the end of the 64-bit log.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// Returns the bytes from `earlier` to here, none if `earlier` is later.
    pub fn checked_sub(self, earlier: Self) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }

    /// Reads the eight bytes PostgreSQL stores in a page header: two words, the high one first.
    pub fn from_page_bytes(bytes: [u8; 8]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        let (high, low) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        Self(u64::from(high) << 32 | u64::from(low))
    }
}

/// For positions of our own reckoning; what comes from a file goes through `checked_add`.
impl Add<u64> for Lsn {
    type Output = Self;

    fn add(self, bytes: u64) -> Self {
        self.checked_add(bytes).expect("a log written at 1 GB/s reaches the last LSN after 500 years")
    }
}

/// For positions known to be in order; what comes from a file goes through `checked_sub`.
impl Sub for Lsn {
    type Output = u64;

    fn sub(self, earlier: Self) -> u64 {
        self.checked_sub(earlier).expect("the caller has the two positions in order")
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, ParseLsnError> {
        let halves = text.split_once('/');
        let value = halves.and_then(|(high, low)| Some(half(high)? << 32 | half(low)?));
        value.map(Self).ok_or_else(|| ParseLsnError { text: text.chars().take(QUOTED_CHARS_MAX).collect() })
    }
}

/// Reads one to eight hexadecimal digits; `from_str_radix` alone would take a sign.
fn half(digits: &str) -> Option<u64> {
    let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn text_is_postgresqls() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!(Lsn(0x1_0000_0028).to_string(), "1/28");
        assert_eq!(Lsn::ZERO.to_string(), "0/0");
        assert_eq!("FFFFFFFF/FFFFFFFF".parse(), Ok(Lsn(u64::MAX)));
        assert_eq!("0/0000a1b2".parse(), Ok(Lsn(0xA1B2)));
    }

    #[test]
    fn other_text_is_refused() {
        for text in
            ["", "/", "0", "0/", "/0", "0/123456789", "+1/0", "0/-1", "0x1/0", " 0/0", "0/0 ", "0/0/0"]
        {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
        let error = "x".repeat(500).parse::<Lsn>().unwrap_err();
        assert!(error.to_string().len() < 120);
    }

    #[test]
    fn arithmetic_knows_the_ends_of_the_log() {
        assert_eq!(Lsn(u64::MAX).checked_add(1), None);
        assert_eq!(Lsn(1).checked_sub(Lsn(2)), None);
        assert_eq!(Lsn(10) + 5 - Lsn(12), 3);
    }

    #[test]
    fn a_page_keeps_the_high_word_first() {
        let bytes = [0x16, 0, 0, 0, 0x48, 0xD8, 0x74, 0xB3];
        assert_eq!(Lsn::from_page_bytes(bytes), Lsn(0x16_B374_D848));
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(value: u64) {
            let lsn = Lsn(value);
            prop_assert_eq!(lsn.to_string().parse(), Ok(lsn));
            let json = serde_json::to_string(&lsn).unwrap();
            prop_assert_eq!(&json, &format!("\"{lsn}\""));
            prop_assert_eq!(serde_json::from_str::<Lsn>(&json).unwrap(), lsn);
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<Lsn>();
        }
    }
}
