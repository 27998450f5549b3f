//! The number `initdb` gives a cluster, which its standbys and restored copies share.
//!
//! It tells clusters apart, never a primary from its standby or a clone from its source. JSON carries it as a
//! string: it needs all 64 bits, and many readers of JSON keep only 53.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A cluster's system identifier, as in `pg_control` and in the first page of every WAL segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SystemIdentifier(pub u64);

/// Tells that a text is not a system identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a system identifier; one looks like 7423456789012345678")]
pub struct ParseSystemIdentifierError {
    text: String,
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;

impl fmt::Display for SystemIdentifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for SystemIdentifier {
    type Err = ParseSystemIdentifierError;

    fn from_str(text: &str) -> Result<Self, ParseSystemIdentifierError> {
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        let value = digits.then(|| text.parse().ok()).flatten();
        value
            .map(Self)
            .ok_or_else(|| ParseSystemIdentifierError { text: text.chars().take(QUOTED_CHARS_MAX).collect() })
    }
}

impl Serialize for SystemIdentifier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SystemIdentifier {
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
    fn other_text_is_refused() {
        for text in ["", "+1", "-1", " 1", "1 ", "18446744073709551616", "0x1"] {
            assert!(text.parse::<SystemIdentifier>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(value: u64) {
            let identifier = SystemIdentifier(value);
            prop_assert_eq!(identifier.to_string().parse(), Ok(identifier));
            let json = serde_json::to_string(&identifier).unwrap();
            prop_assert_eq!(&json, &format!("\"{value}\""));
            prop_assert_eq!(serde_json::from_str::<SystemIdentifier>(&json).unwrap(), identifier);
        }
    }
}
