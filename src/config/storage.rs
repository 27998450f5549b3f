//! `[storage]`: which object store, and how to get in.
//!
//! Deliberately absent: secrets of the environment and of files; they are fetched when the store is opened, so
//! that a configuration can be read where the secret cannot.

use std::path::PathBuf;

use super::error::Result;
use super::table::Table;

/// An object store as it is configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StorageConfig {
    /// Where the repository lies.
    pub url: String,
    /// A file with the certificate authority of the endpoint.
    pub ca_file: Option<PathBuf>,
}

impl StorageConfig {
    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let Some(url) = table.text("url") else {
            return Err(table.missing("url", "Such as url = \"file:///var/lib/walden/repo\".".to_owned()));
        };
        Ok(Self { url: url.value, ca_file: table.path("ca_file")? })
    }
}
