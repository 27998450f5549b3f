//! Fixed-length byte names that print and parse as lower-case hexadecimal.
//!
//! Digests, key ids and recipients are all of this shape. The macro gives each its own type, so that a signer
//! is never taken for a recipient. Upper-case digits are refused: a name has one spelling.

/// Says why a text is not the hexadecimal spelling of a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not {bytes} bytes in lower-case hexadecimal")]
pub struct ParseHexError {
    /// The text as given, cut to a printable length.
    pub text: String,
    /// How many bytes the name has.
    pub bytes: usize,
}

impl ParseHexError {
    const TEXT_CHARS_MAX: usize = 80;

    pub(super) fn new(text: &str, bytes: usize) -> Self {
        Self { text: text.chars().take(Self::TEXT_CHARS_MAX).collect(), bytes }
    }
}

/// Reads exactly `N` bytes of lower-case hexadecimal.
pub(super) fn parse<const N: usize>(text: &str) -> Result<[u8; N], ParseHexError> {
    let mut bytes = [0; N];
    let one_spelling = !text.bytes().any(|c| c.is_ascii_uppercase());
    match hex::decode_to_slice(text, &mut bytes) {
        Ok(()) if one_spelling => Ok(bytes),
        _ => Err(ParseHexError::new(text, N)),
    }
}

/// Defines a public byte-array type that displays, parses and serializes as hexadecimal.
macro_rules! hex_bytes {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Returns the bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::codec::ParseHexError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                $crate::codec::hex_bytes::parse(text).map(Self)
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

pub(super) use hex_bytes;

#[cfg(test)]
mod tests {
    hex_bytes!(
        /// A short name, for the tests.
        ShortName,
        4
    );

    #[test]
    fn a_name_has_one_spelling() {
        let name: ShortName = "00ff10a7".parse().unwrap();
        assert_eq!(name.as_bytes(), &[0x00, 0xff, 0x10, 0xa7]);
        assert_eq!(name.to_string(), "00ff10a7");
        for wrong in ["00FF10A7", "00ff10a", "00ff10a7 ", "00ff10a7ff", "", "0xff10a7", "00ff10ag"] {
            assert!(wrong.parse::<ShortName>().is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn a_name_is_a_string_in_json() {
        let name = ShortName([1, 2, 3, 4]);
        let json = serde_json::to_string(&name).unwrap();
        assert_eq!(json, "\"01020304\"");
        assert_eq!(serde_json::from_str::<ShortName>(&json).unwrap(), name);
        assert!(serde_json::from_str::<ShortName>("\"0102\"").is_err());
    }

    #[test]
    fn the_message_does_not_repeat_a_long_text() {
        let error = "é".repeat(10_000).parse::<ShortName>().unwrap_err();
        assert!(error.to_string().chars().count() < 200);
    }
}
