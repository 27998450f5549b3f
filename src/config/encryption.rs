//! `[encryption]`: who can read what is stored and whose word is taken, as key files by id.
//!
//! Reading the section checks that every id leads to a key and every role to its kind of file. The files are read
//! later and by need: a host that writes never opens a private key, a host that reads never opens a signing key,
//! so that one configuration can serve both. Whatever a file turns out to be is complained of at its line.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::{self, Random, RecipientKey, RecipientPrivateKey, SigningKey, VerifyKey};
use crate::repo::KeyringOptions;

use super::error::{Error, Place, Problem, Result};
use super::nearest::nearest;
use super::secret_file::NamedFile;
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
    place: Place,
}

/// The files of one key that this host has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyFiles {
    /// The recipient's public key.
    pub public: Option<NamedFile>,
    /// The recipient's private key.
    pub private: Option<NamedFile>,
    /// The signer's private key.
    pub signing: Option<NamedFile>,
    /// The signer's public key.
    pub verify: Option<NamedFile>,
    place: Place,
}

/// What a host is about to do with its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyPurpose {
    /// To list and check what there is: needs no secret.
    Inspect,
    /// To back up and archive: the recipients' public keys and the signing key.
    Write,
    /// To mount, clone, restore and fetch: the private keys.
    Read,
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
    pub fn get(&self, role: KeyRole) -> Option<&NamedFile> {
        match role {
            KeyRole::Public => self.public.as_ref(),
            KeyRole::Private => self.private.as_ref(),
            KeyRole::Signing => self.signing.as_ref(),
            KeyRole::Verify => self.verify.as_ref(),
        }
    }

    fn read(table: &Table<'_>) -> Result<Self> {
        let file = |role: KeyRole| NamedFile::read(table, role.config_key());
        Ok(Self {
            public: file(KeyRole::Public)?,
            private: file(KeyRole::Private)?,
            signing: file(KeyRole::Signing)?,
            verify: file(KeyRole::Verify)?,
            place: table.place(),
        })
    }
}

/// Reads a recipient's public key.
pub fn open_public(file: &NamedFile) -> Result<RecipientKey> {
    parse(file, &file.public()?, RecipientKey::from_pem)
}

/// Reads a recipient's private key, refusing a file that others can read.
pub fn open_private(file: &NamedFile) -> Result<RecipientPrivateKey> {
    parse(file, &file.secret()?, RecipientPrivateKey::from_pem)
}

/// Reads a signer's private key, refusing a file that others can read.
pub fn open_signing(file: &NamedFile) -> Result<SigningKey> {
    parse(file, &file.secret()?, SigningKey::from_pem)
}

/// Reads a signer's public key.
pub fn open_verify(file: &NamedFile) -> Result<VerifyKey> {
    parse(file, &file.public()?, VerifyKey::from_pem)
}

fn parse<K>(file: &NamedFile, text: &str, parse: fn(&str) -> codec::Result<K>) -> Result<K> {
    let complain =
        |error: codec::Error| file.complain(format!("\"{}\": {error}", file.path.display()), error.hint());
    parse(text).map_err(complain)
}

impl EncryptionConfig {
    pub(super) fn read(table: &Table<'_>) -> Result<Self> {
        let mut keys = BTreeMap::new();
        for (id, key) in table.named_tables("keys") {
            keys.insert(id.value, KeyFiles::read(&key)?);
        }
        let recipients = ids(table, "recipients", &keys, None)?.unwrap_or_default();
        let wal_recipients = ids(table, "wal_recipients", &keys, None)?;
        if wal_recipients.as_ref().is_some_and(|wal| wal.is_empty() != recipients.is_empty()) {
            let reason = "either both recipients and wal_recipients name keys, or none does";
            let hint = "Half of a backup in clear text is a backup in clear text.".to_owned();
            return Err(table.at("wal_recipients").bad(reason, hint));
        }
        Ok(Self {
            wal_recipients: wal_recipients.unwrap_or_else(|| recipients.clone()),
            recipients,
            signer: match table.text("signer") {
                Some(entry) => Some(check_id(entry, &keys, Some(KeyRole::Signing))?),
                None => None,
            },
            trusted_signers: ids(table, "trusted_signers", &keys, Some(KeyRole::Verify))?.unwrap_or_default(),
            keys,
            place: table.place(),
        })
    }

    /// Reads the key files that a host needs for `purpose`, and no others.
    pub fn keyring_options(&self, purpose: KeyPurpose, random: Arc<dyn Random>) -> Result<KeyringOptions> {
        let public = |ids: &[String]| -> Result<Vec<RecipientKey>> {
            ids.iter().map(|id| self.open(id, KeyRole::Public, open_public)).collect()
        };
        let mut options = KeyringOptions {
            recipients: Vec::new(),
            wal_recipients: Vec::new(),
            signer: None,
            trusted_signers: self
                .trusted_signers
                .iter()
                .map(|id| self.open(id, KeyRole::Verify, open_verify))
                .collect::<Result<_>>()?,
            private_keys: Vec::new(),
            random,
        };
        match purpose {
            KeyPurpose::Inspect => {}
            KeyPurpose::Write => {
                let Some(signer) = &self.signer else { return Err(self.no_signer()) };
                options.signer = Some(self.open(signer, KeyRole::Signing, open_signing)?);
                options.recipients = public(&self.recipients)?;
                options.wal_recipients = public(&self.wal_recipients)?;
            }
            KeyPurpose::Read => {
                let files = self.keys.values().filter_map(|files| files.private.as_ref());
                options.private_keys = files.map(open_private).collect::<Result<_>>()?;
            }
        }
        Ok(options)
    }

    fn open<K>(&self, id: &str, role: KeyRole, open: fn(&NamedFile) -> Result<K>) -> Result<K> {
        match self.keys.get(id).and_then(|files| files.get(role)) {
            Some(file) => open(file),
            None => {
                let place = self.keys.get(id).map_or(&self.place, |files| &files.place).clone();
                let section = format!("in [encryption.keys.\"{id}\"]");
                let hint =
                    format!("This host needs the file that `walden key create --id {id}` wrote for it.");
                let problem = Problem::MissingKey { key: role.config_key(), section, hint: Some(hint) };
                Err(Error::Content { place, problem })
            }
        }
    }

    fn no_signer(&self) -> Error {
        let hint = "A host that writes names the key that vouches for it, such as signer = \"2026-11\".";
        let problem = Problem::MissingKey {
            key: "signer",
            section: "in [encryption]".to_owned(),
            hint: Some(hint.to_owned()),
        };
        Error::Content { place: self.place.clone(), problem }
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
