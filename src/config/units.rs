//! Durations and sizes as text: `90s`, `24h`, `512MiB`.
//!
//! A number and one unit, with no fraction: what is written is what is meant. `MB` is a million bytes and `MiB`
//! is 1024 · 1024, as everywhere outside PostgreSQL; PostgreSQL's `MB`, which is the latter, is therefore refused
//! with a hint rather than guessed.

use std::time::Duration;

/// Why a text is no duration or size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// There is no number, or no unit, or something else.
    #[error("not {0}")]
    Malformed(Quantity),
    /// The number has a unit that is not known.
    #[error("unknown unit for {0}")]
    Unit(Quantity),
    /// The value does not fit.
    #[error("{0} is too large")]
    TooLarge(Quantity),
}

/// What is parsed, for the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Time.
    Duration,
    /// Bytes.
    Size,
}

impl std::fmt::Display for Quantity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Duration => "a duration",
            Self::Size => "a size",
        })
    }
}

impl UnitError {
    /// Returns a sentence on what to write.
    pub fn hint(self) -> Option<String> {
        let (Self::Malformed(quantity) | Self::Unit(quantity) | Self::TooLarge(quantity)) = self;
        Some(match quantity {
            Quantity::Duration => "Write a whole number and ms, s, min, h or d, such as \"90s\".".into(),
            Quantity::Size => {
                "Write a whole number and B, KiB, MiB, GiB or TiB (1024 each), such as \"512MiB\".".into()
            }
        })
    }
}

const DURATIONS: [(&str, u64); 6] =
    [("ms", 1), ("s", 1000), ("min", 60_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
const SIZES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Parses a duration such as `90s`, `15min`, `24h` or `7d`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    parse(text, &DURATIONS, Quantity::Duration).map(Duration::from_millis)
}

/// Parses a size in bytes such as `512MiB`.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    parse(text, &SIZES, Quantity::Size)
}

fn parse(text: &str, units: &[(&str, u64)], quantity: Quantity) -> Result<u64, UnitError> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start();
    if number.is_empty() || unit.is_empty() || !unit.chars().all(|c| c.is_ascii_alphabetic()) {
        return Err(UnitError::Malformed(quantity));
    }
    let number: u64 = number.parse().map_err(|_| UnitError::TooLarge(quantity))?;
    let (_, factor) = units.iter().find(|(name, _)| *name == unit).ok_or(UnitError::Unit(quantity))?;
    number.checked_mul(*factor).ok_or(UnitError::TooLarge(quantity))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whole_numbers_with_a_unit_are_read() {
        for (text, seconds) in [("60s", 60), ("24h", 86_400), ("7d", 604_800), ("15min", 900), ("15 m", 900)]
        {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(parse_duration("0ms"), Ok(Duration::ZERO));
        for (text, bytes) in [("0B", 0), ("512MiB", 512 << 20), ("2 TiB", 2 << 40), ("64KiB", 65_536)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn anything_else_is_refused() {
        use Quantity::{Duration as Time, Size};
        for (text, error) in [
            ("", UnitError::Malformed(Time)),
            ("60", UnitError::Malformed(Time)),
            ("s", UnitError::Malformed(Time)),
            ("-1s", UnitError::Malformed(Time)),
            ("1.5h", UnitError::Malformed(Time)),
            ("1h30m", UnitError::Malformed(Time)),
            ("60S", UnitError::Unit(Time)),
            ("2 weeks", UnitError::Unit(Time)),
            ("99999999999999999999s", UnitError::TooLarge(Time)),
            ("18446744073709551615d", UnitError::TooLarge(Time)),
        ] {
            assert_eq!(parse_duration(text), Err(error), "{text}");
        }
        for (text, error) in [
            ("512", UnitError::Malformed(Size)),
            ("512MB", UnitError::Unit(Size)),
            ("512M", UnitError::Unit(Size)),
            ("99999999TiB", UnitError::TooLarge(Size)),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_number_comes_back_in_every_unit(number in 0..1_000_000_u64, unit in 0..SIZES.len()) {
            let (name, factor) = SIZES[unit];
            prop_assert_eq!(parse_size(&format!("{number}{name}")), Ok(number * factor));
        }

        #[test]
        fn arbitrary_text_does_not_panic(text in ".{0,30}") {
            let _ = (parse_size(&text), parse_duration(&text));
        }
    }
}
