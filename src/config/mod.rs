//! The configuration file and the environment, turned into the Options of the modules below.
//!
//! text → `document` (TOML with lines, checked against `schema`) → `table` → one reader per section → [`Config`].
//! After that nothing knows of TOML any more. Every complaint names file, line and key. Only keys that do
//! something are accepted; those of later releases are refused by name, so that nobody relies on them.
//!
//! This is the only module that reads the environment ([`Environment`]); what comes from there and is needed
//! below travels as an option, as everything else does.

mod compression;
mod document;
mod encryption;
mod environment;
mod error;
mod limits;
mod locate;
mod nearest;
mod paths;
mod schema;
mod secret_file;
mod site;
mod storage;
mod table;
mod units;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub use compression::CompressionConfig;
pub use encryption::{EncryptionConfig, KeyFile, KeyFiles, KeyRole};
pub use environment::Environment;
pub use error::{Error, ErrorKind, Place, Problem, Result};
pub use limits::Limits;
pub use nearest::nearest;
pub use paths::{OwnedFolder, Paths};
pub use site::{Node, ServerRole, SiteConfig};
pub use storage::StorageConfig;

use document::Source;

/// The whole configuration, with everything that was left out filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The file it was read from.
    pub file: PathBuf,
    /// Folders on this host.
    pub paths: Paths,
    /// Keys and signers; `None`: nothing is encrypted and nothing is signed.
    pub encryption: Option<EncryptionConfig>,
    /// How data is compressed.
    pub compression: CompressionConfig,
    /// How much of the machine is taken.
    pub limits: Limits,
    /// The sites by name.
    pub sites: BTreeMap<String, SiteConfig>,
}

impl Config {
    /// Finds the configuration file (`explicit`, `WALDEN_CONFIG`, `./walden.toml`, `/etc/walden/walden.toml`) and
    /// reads it.
    pub fn load(explicit: Option<&Path>, environment: &Environment) -> Result<Self> {
        let file = locate::locate(explicit, environment)?;
        let text = std::fs::read_to_string(&file).map_err(|source| Error::Unreadable {
            what: "the configuration file",
            path: file.clone(),
            source,
        })?;
        Self::parse(&text, &file, environment)
    }

    /// Reads the text of a configuration file; `file` is for messages and relative paths.
    pub fn parse(text: &str, file: &Path, environment: &Environment) -> Result<Self> {
        let source = Source::new(file, text);
        let parsed = source.parse()?;
        let root = source.root(&parsed);
        let storage = root.table("storage");
        let mut sites = BTreeMap::new();
        for (name, table) in root.named_tables("sites") {
            let site = SiteConfig::read(&name, &table, &storage)?;
            sites.insert(name.value, site);
        }
        let encryption = root.table("encryption");
        Ok(Self {
            file: file.to_owned(),
            paths: Paths::read(&root.table("paths"), environment)?,
            encryption: if encryption.is_present() {
                Some(EncryptionConfig::read(&encryption)?)
            } else {
                None
            },
            compression: CompressionConfig::read(&root.table("compression"))?,
            limits: Limits::read(&root.table("limits"))?,
            sites,
        })
    }

    /// Returns the site of that name, or the only one.
    pub fn site(&self, name: Option<&str>) -> Result<&SiteConfig> {
        let configured = || self.sites.keys().cloned().collect();
        match name {
            Some(name) => self.sites.get(name).ok_or_else(|| Error::UnknownSite {
                name: name.to_owned(),
                nearest: nearest(name, self.sites.keys().map(String::as_str)).map(str::to_owned),
                configured: configured(),
            }),
            None => match self.sites.len() {
                0 => Err(Error::NoSite { path: self.file.clone() }),
                1 => Ok(self.sites.values().next().expect("a map of length 1 has a value")),
                _ => Err(Error::SiteNotChosen { configured: configured() }),
            },
        }
    }
}
