//! The major versions of PostgreSQL Walden knows, and the numbers by which files tell them.
//!
//! `PG_VERSION` and `server_version_num` say it outright; `pg_control` has a format number (shared by
//! 13 to 16) and a catalog version (one for each released major), a WAL page a magic number. Anything else is
//! refused by name: a format read by guess is worse than none. Betas carry other catalog versions and are
//! refused with them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A supported major version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum MajorVersion {
    V13,
    V14,
    V15,
    V16,
    V17,
    V18,
}

/// What is not a version Walden knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    #[error("PostgreSQL {major} is not supported; Walden knows 13 to 18")]
    Unsupported { major: u32 },
    #[error("\"{text}\" is not a PostgreSQL major version")]
    NoVersion { text: String },
}

/// The longest text quoted back in an error.
const QUOTED_CHARS_MAX: usize = 40;

impl MajorVersion {
    /// All of them, oldest first.
    pub const ALL: [Self; 6] = [Self::V13, Self::V14, Self::V15, Self::V16, Self::V17, Self::V18];

    /// Returns the version of that number.
    pub fn new(major: u32) -> Result<Self, VersionError> {
        let version = Self::ALL.into_iter().find(|version| version.number() == major);
        version.ok_or(VersionError::Unsupported { major })
    }

    /// Reads the file `PG_VERSION`; before 10 a major version had two parts.
    pub fn parse_pg_version(text: &str) -> Result<Self, VersionError> {
        let text = text.trim_end();
        let major = text.split('.').next().unwrap_or(text);
        let digits = !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit());
        match digits.then(|| major.parse().ok()).flatten() {
            Some(major) => Self::new(major),
            None => Err(VersionError::NoVersion { text: text.chars().take(QUOTED_CHARS_MAX).collect() }),
        }
    }

    /// Reads the setting `server_version_num`, such as 150020.
    pub fn from_server_version_num(number: u32) -> Result<Self, VersionError> {
        Self::new(number / 10_000)
    }

    /// Returns the number, 13 to 18.
    pub fn number(self) -> u32 {
        match self {
            Self::V13 => 13,
            Self::V14 => 14,
            Self::V15 => 15,
            Self::V16 => 16,
            Self::V17 => 17,
            Self::V18 => 18,
        }
    }

    /// Returns the format number of its `pg_control` (`PG_CONTROL_VERSION`).
    pub fn control_version(self) -> u32 {
        match self {
            Self::V13 | Self::V14 | Self::V15 | Self::V16 => 1300,
            Self::V17 => 1700,
            Self::V18 => 1800,
        }
    }

    /// Returns the catalog version of its releases (`CATALOG_VERSION_NO`).
    pub fn catalog_version(self) -> u32 {
        match self {
            Self::V13 => 202_007_201,
            Self::V14 => 202_107_181,
            Self::V15 => 202_209_061,
            Self::V16 => 202_307_071,
            Self::V17 => 202_406_281,
            Self::V18 => 202_506_291,
        }
    }

    /// Returns the magic number of its WAL pages (`XLOG_PAGE_MAGIC`).
    pub fn wal_page_magic(self) -> u16 {
        match self {
            Self::V13 => 0xD106,
            Self::V14 => 0xD10D,
            Self::V15 => 0xD110,
            Self::V16 => 0xD113,
            Self::V17 => 0xD116,
            Self::V18 => 0xD118,
        }
    }

    /// Returns the version with that catalog version, none for a beta and for other servers.
    pub fn from_catalog_version(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.catalog_version() == number)
    }

    /// Returns the version that writes WAL pages with that magic number.
    pub fn from_wal_page_magic(magic: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.wal_page_magic() == magic)
    }

    /// Returns the folder a cluster of this version has in every tablespace, such as `PG_15_202209061`.
    pub fn tablespace_folder(self) -> String {
        format!("PG_{}_{}", self.number(), self.catalog_version())
    }
}

impl fmt::Display for MajorVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.number(), f)
    }
}

impl FromStr for MajorVersion {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        Self::parse_pg_version(text)
    }
}

impl TryFrom<u32> for MajorVersion {
    type Error = VersionError;

    fn try_from(major: u32) -> Result<Self, VersionError> {
        Self::new(major)
    }
}

impl From<MajorVersion> for u32 {
    fn from(version: MajorVersion) -> Self {
        version.number()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn pg_version_and_server_version_num_are_read() {
        assert_eq!(MajorVersion::parse_pg_version("15\n"), Ok(MajorVersion::V15));
        assert_eq!(MajorVersion::from_server_version_num(180_004), Ok(MajorVersion::V18));
        for version in MajorVersion::ALL {
            assert_eq!(version.to_string().parse(), Ok(version));
            let json = serde_json::to_string(&version).unwrap();
            assert_eq!(json, version.number().to_string());
            assert_eq!(serde_json::from_str::<MajorVersion>(&json).unwrap(), version);
        }
    }

    #[test]
    fn other_versions_are_refused_by_number() {
        assert_eq!(MajorVersion::parse_pg_version("9.6\n"), Err(VersionError::Unsupported { major: 9 }));
        assert_eq!(
            MajorVersion::from_server_version_num(120_017),
            Err(VersionError::Unsupported { major: 12 })
        );
        assert_eq!(MajorVersion::new(19), Err(VersionError::Unsupported { major: 19 }));
        for text in ["", "\n", "x", "+15", " 15", "99999999999"] {
            assert!(MajorVersion::parse_pg_version(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn files_tell_the_version_without_doubt() {
        for version in MajorVersion::ALL {
            assert_eq!(MajorVersion::from_catalog_version(version.catalog_version()), Some(version));
            assert_eq!(MajorVersion::from_wal_page_magic(version.wal_page_magic()), Some(version));
        }
        let catalogs: BTreeSet<u32> = MajorVersion::ALL.map(MajorVersion::catalog_version).into();
        let magics: BTreeSet<u16> = MajorVersion::ALL.map(MajorVersion::wal_page_magic).into();
        assert_eq!((catalogs.len(), magics.len()), (6, 6));
        assert_eq!(MajorVersion::V15.tablespace_folder(), "PG_15_202209061");
    }
}
