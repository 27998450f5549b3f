//! Object identifiers, as far as they name files: databases, tablespaces, relations.
//!
//! A file name counts only in its one canonical spelling, decimal without a leading zero, so that no two names
//! stand for the same relation.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An object identifier, or a relation's file number; 0 means none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Oid(pub u32);

impl Oid {
    /// No object; stands for the database of shared relations.
    pub const INVALID: Self = Self(0);
    /// The tablespace `pg_default`, in the data directory under `base`.
    pub const DEFAULT_TABLESPACE: Self = Self(1663);
    /// The tablespace `pg_global`, in the data directory under `global`.
    pub const GLOBAL_TABLESPACE: Self = Self(1664);

    /// Reads a name that is an OID: 1 to 4294967295 without a leading zero.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        let canonical = name.first().is_some_and(|b| *b != b'0') && name.iter().all(u8::is_ascii_digit);
        let digits = canonical.then(|| str::from_utf8(name).ok()).flatten()?;
        digits.parse().ok().map(Self)
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_canonical_spelling_is_an_oid() {
        assert_eq!(Oid::from_name(b"16384"), Some(Oid(16384)));
        assert_eq!(Oid::from_name(b"4294967295"), Some(Oid(u32::MAX)));
        for name in [&b""[..], b"0", b"016384", b"+1", b"1 ", b"4294967296", b"1_fsm", b"\xff"] {
            assert_eq!(Oid::from_name(name), None, "{name:?}");
        }
    }
}
