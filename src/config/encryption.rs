//! `[encryption]`: who can read what is stored and whose word is taken, as key files by id.
//!
//! Reading the section checks that every id leads to a key and every role to its kind of file. The files are read
//! later and by need: a host that writes never opens a private key, a host that reads never opens a signing key,
//! so that one configuration can serve both. Whatever a file turns out to be is complained of at its line.

use std::collections::BTreeMap;
use std::path::PathBuf;

use zeroize::Zeroizing;

use crate::codec::{self, RecipientKey, RecipientPrivateKey, SigningKey, VerifyKey};

use super::error::{Error, Place, Problem, Result};
use super::nearest::nearest;
use super::secret_file::{read_public, read_secret};
use super::table::{Entry, Table};

/// Who can read, who vouches, who is trusted; ids lead to `keys`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptionConfig {
    /// Who can read basebackups; empty: not encrypted.
    pub recipients: Vec<String>,
    /// Who can read WAL; empty: not encrypted.
    pub wal_recipients: Vec<String>,
    /// Who vouches for what this host writes.
    pub signer: Option<String>,
    /// Whose word this host takes.
    pub trusted_signers: Vec<String>,
    /// The files of every key.
    pub keys: BTreeMap<String, KeyFiles>,
}

/// The files of one key that this host has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyFiles {
    /// The recipient's public key.
    pub public: Option<KeyFile>,
    /// The recipient's private key.
    pub private: Option<KeyFile>,
    /// The signer's private key.
    pub signing: Option<KeyFile>,
    /// The signer's public key.
    pub verify: Option<KeyFile>,
}

/// A key file and the place that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFile {
    /// The file.
    pub path: PathBuf,
    place: Place,
}

/// The four kinds of key file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KeyRole {
    /// `public_key_file`.
    Public,
    /// `private_key_file`.
    Private,
    /// `signing_key_file`.
    Signing,
    /// `verify_key_file`.
    Verify,
}

impl KeyRole {
    /// Every role, in the order of the document.
    pub const ALL: [Self; 4] = [Self::Public, Self::Private, Self::Signing, Self::Verify];

    /// Returns the key of the configuration that names such a file.
    pub fn config_key(self) -> &'static str {
        match self {
            Self::Public => "public_key_file",
            Self::Private => "private_key_file",
            Self::Signing => "signing_key_file",
            Self::Verify => "verify_key_file",
        }
    }

    /// Returns whether such a file must be kept secret.
    pub fn is_secret(self) -> bool {
        matches!(self, Self::Private | Self::Signing)
    }
}

impl KeyFiles {
    /// Returns the file of a role, if this host has it.
    pub fn get(&self, role: KeyRole) -> Option<&KeyFile> {
        match role {
            KeyRole::Public => self.public.as_ref(),
            KeyRole::Private => self.private.as_ref(),
            KeyRole::Signing => self.signing.as_ref(),
            KeyRole::Verify => self.verify.as_ref(),
        }
    }

    fn read(table: &Table<'_>) -> Result<Self> {
        let file = |role: KeyRole| -> Result<Option<KeyFile>> {
            let place = table.text(role.config_key()).map(|entry| entry.place());
            Ok(table.path(role.config_key())?.zip(place).map(|(path, place)| KeyFile { path, place }))
        };
        Ok(Self {
            public: file(KeyRole::Public)?,
            private: file(KeyRole::Private)?,
            signing: file(KeyRole::Signing)?,
            verify: file(KeyRole::Verify)?,
        })
    }
}

impl KeyFile {
    /// Reads a recipient's public key.
    pub fn public(&self) -> Result<RecipientKey> {
        self.open(KeyRole::Public, RecipientKey::from_pem)
    }

    /// Reads a recipient's private key, refusing a file that others can read.
    pub fn private(&self) -> Result<RecipientPrivateKey> {
        self.open(KeyRole::Private, RecipientPrivateKey::from_pem)
    }

    /// Reads a signer's private key, refusing a file that others can read.
    pub fn signing(&self) -> Result<SigningKey> {
        self.open(KeyRole::Signing, SigningKey::from_pem)
    }

    /// Reads a signer's public key.
    pub fn verify(&self) -> Result<VerifyKey> {
        self.open(KeyRole::Verify, VerifyKey::from_pem)
    }

    fn open<K>(&self, role: KeyRole, parse: fn(&str) -> codec::Result<K>) -> Result<K> {
        let what = "the key file";
        let text = if role.is_secret() {
            read_secret(what, &self.path)
        } else {
            read_public(what, &self.path).map(Zeroizing::new)
        };
        let text = text.map_err(|error| self.complain(role, error.to_string(), error.hint()))?;
        parse(&text).map_err(|error| {
            let reason = format!("\"{}\" is {error}", self.path.display());
            self.complain(role, reason, error.hint())
        })
    }

    fn complain(&self, role: KeyRole, reason: String, hint: Option<String>) -> Error {
        let problem = Problem::File { key: role.config_key(), reason, hint };
        Error::Content { place: self.place.clone(), problem }
    }
}

impl EncryptionConfig {
    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let mut keys = BTreeMap::new();
        for (id, key) in table.named_tables("keys") {
            keys.insert(id.value, KeyFiles::read(&key)?);
        }
        let recipients = ids(table, "recipients", &keys, None)?.unwrap_or_default();
        let config = Self {
            wal_recipients: ids(table, "wal_recipients", &keys, None)?.unwrap_or_else(|| recipients.clone()),
            recipients,
            signer: match table.text("signer") {
                Some(entry) => Some(check_id(entry, &keys, Some(KeyRole::Signing))?),
                None => None,
            },
            trusted_signers: ids(table, "trusted_signers", &keys, Some(KeyRole::Verify))?.unwrap_or_default(),
            keys,
        };
        Ok(config)
    }
}

fn ids(
    table: &Table<'_>,
    key: &str,
    keys: &BTreeMap<String, KeyFiles>,
    role: Option<KeyRole>,
) -> Result<Option<Vec<String>>> {
    let Some(entries) = table.texts(key) else { return Ok(None) };
    let mut ids: Vec<String> = Vec::new();
    for entry in entries {
        if ids.contains(&entry.value) {
            return Err(entry.bad(format!("\"{}\" is there twice", entry.value), None));
        }
        ids.push(check_id(entry, keys, role)?);
    }
    Ok(Some(ids))
}

/// Checks that an id leads to a key, and the key to the kind of file that is needed.
fn check_id(
    entry: Entry<'_, String>,
    keys: &BTreeMap<String, KeyFiles>,
    role: Option<KeyRole>,
) -> Result<String> {
    let Some(files) = keys.get(&entry.value) else {
        let near = nearest(&entry.value, keys.keys().map(String::as_str)).map(str::to_owned);
        return Err(entry.unknown("key", &entry.value, near));
    };
    if let Some(role) = role.filter(|role| files.get(*role).is_none()) {
        let reason = format!("key \"{}\" has no {}", entry.value, role.config_key());
        return Err(entry.bad(reason, format!("Add it below [encryption.keys.\"{}\"].", entry.value)));
    }
    Ok(entry.value)
}
