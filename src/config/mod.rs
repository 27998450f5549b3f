//! The configuration file and the environment, turned into the Options of the modules below.
//!
//! text → `document` (TOML with lines, checked against `schema`) → `table` → one reader per section → [`Config`].
//! After that nothing knows of TOML any more. Every complaint names file, line and key. Only keys that do
//! something are accepted; those of later releases are refused by name, so that nobody relies on them.
//!
//! This is the only module that reads the environment ([`Environment`]); what comes from there and is needed
//! below travels as an option, as everything else does.

mod compression;
mod credentials;
mod document;
mod encryption;
mod environment;
mod error;
mod limits;
mod locate;
mod nearest;
mod paths;
#[cfg(test)]
mod reference;
mod schema;
mod secret_file;
mod site;
mod storage;
mod table;
#[cfg(test)]
mod tests;
mod units;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::codec::Random;
use crate::repo::{Keyring, KeyringOptions};

pub use compression::CompressionConfig;
pub use encryption::{
    EncryptionConfig, KeyFiles, KeyPurpose, KeyRole, open_private, open_public, open_signing, open_verify,
};
pub use environment::{Environment, LazyTimeZone};
pub use error::{Error, ErrorKind, Place, Problem, Result};
pub use limits::{Limits, machine_memory};
pub use nearest::nearest;
pub use paths::{OwnedFolder, Paths};
pub use secret_file::{NamedFile, read_secret};
pub use site::{Node, SiteConfig, WalSource};
pub use storage::StorageConfig;
pub use units::{parse_duration, parse_size};

use document::Source;
use secret_file::check_mode;

/// More than any configuration has, and far below what would be noticed.
const CONFIG_BYTES_MAX: u64 = 4 << 20;

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
    /// Lists the files that a host reads to fetch: the configuration, private keys and the signers' public ones.
    pub fn files_for_fetching(&self) -> impl Iterator<Item = &Path> {
        let keys = self.encryption.iter().flat_map(|encryption| encryption.keys.values());
        let of_keys = keys.flat_map(|files| [files.private.as_ref(), files.verify.as_ref()]);
        std::iter::once(self.file.as_path()).chain(of_keys.flatten().map(|file| file.path.as_path()))
    }

    /// Finds the configuration file (`explicit`, `WALDEN_CONFIG`, `./walden.toml`, `/etc/walden/walden.toml`) and
    /// reads it.
    pub fn load(explicit: Option<&Path>, environment: &Environment) -> Result<Self> {
        let file = locate::locate(explicit, environment)?;
        let unreadable =
            |source| Error::Unreadable { what: "the configuration file", path: file.clone(), source };
        let mut open = File::open(&file).map_err(unreadable)?;
        let mut text = String::new();
        (&mut open).take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(unreadable(io::Error::new(io::ErrorKind::InvalidData, "the file is too long")));
        }
        let config = Self::parse(&text, &file, environment)?;
        if config.sites.values().any(SiteConfig::holds_secret) {
            check_mode("the configuration file, which holds a secret,", &file, &open)?;
        }
        Ok(config)
    }

    /// Reads the text of a configuration file; `file` is for messages and relative paths.
    pub fn parse(text: &str, file: &Path, environment: &Environment) -> Result<Self> {
        let source = Source::new(file, text);
        let parsed = source.parse()?;
        let root = source.root(&parsed);
        let storage = root.table("storage");
        if storage.is_present() {
            // Also where every site has a store of its own: nobody should wonder which one is used.
            StorageConfig::read(&storage)?;
        }
        let mut sites = BTreeMap::new();
        for (name, table) in root.named_tables("sites") {
            let site = SiteConfig::read(&name, &table, &storage)?;
            if let Some(other) = sites.values().find(|other| site.collides_with(other)) {
                let reason = format!(
                    "its prefix \"{}\" lies in the same place as that of site \"{}\"",
                    site.prefix, other.name
                );
                return Err(name.bad(reason, "Give each site a prefix of its own.".to_owned()));
            }
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

    /// Returns the keys that this host needs for `purpose`.
    pub fn keyring(&self, purpose: KeyPurpose, random: Arc<dyn Random>) -> Result<Keyring> {
        match &self.encryption {
            Some(encryption) => {
                let keyring = Keyring::new(encryption.keyring_options(purpose, random)?);
                // A host that reads has no use for the recipients' keys, but their names say what it may expect.
                let expected = !encryption.recipients.is_empty();
                Ok(if expected { keyring.expecting_encryption() } else { keyring })
            }
            None => Ok(Keyring::unencrypted(random)),
        }
    }

    /// Returns the keys for reading what no trusted signer vouches for.
    pub fn keyring_trusting_anyone(&self, random: Arc<dyn Random>) -> Result<Keyring> {
        let Some(encryption) = &self.encryption else { return Ok(Keyring::unencrypted(random)) };
        let options = encryption.keyring_options(KeyPurpose::Read, random)?;
        Ok(Keyring::new(KeyringOptions { trusted_signers: Vec::new(), ..options }))
    }

    /// Lists the files that decide what is read of a site: the configuration itself and those that it names.
    pub fn files<'a>(&'a self, site: &'a SiteConfig) -> impl Iterator<Item = &'a Path> {
        let keys = self.encryption.iter().flat_map(|encryption| encryption.keys.values());
        let keys = keys.flat_map(|key| KeyRole::ALL.into_iter().filter_map(|role| key.get(role)));
        let keys = keys.map(|file| file.path.as_path());
        std::iter::once(self.file.as_path()).chain(keys).chain(site.storage.files())
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
