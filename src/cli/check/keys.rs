//! What `check` finds in the keys: each file by itself, then what this host can do with them, tried out.
//!
//! A file that is not here is another host's business, unless this host cannot write without it.

use std::sync::Arc;

use crate::codec::SystemRandom;
use crate::config::{
    self, Config, EncryptionConfig, KeyFiles, KeyPurpose, KeyRole, NamedFile, open_private, open_public,
    open_signing, open_verify,
};
use crate::repo::Keyring;
use crate::repo::keyring::Audience;
use crate::site::{Item, Status};

/// What this host can do with its keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Usable {
    /// Write what it is to write.
    pub(super) writes: bool,
    /// Open its private keys.
    pub(super) reads: bool,
}

/// Looks at all keys.
pub(super) fn check_keys(config: &Config) -> (Vec<Item>, Usable) {
    let Some(encryption) = &config.encryption else {
        let detail = "backups are neither encrypted nor signed";
        let hint = "`walden key create` makes keys and prints the lines of [encryption].";
        return (vec![Item::warning("encryption", detail, hint)], Usable { writes: true, reads: true });
    };
    let mut items = vec![check_protection(encryption)];
    items.extend(encryption.keys.iter().map(|(id, files)| check_files(id, files)));
    let all_right = items.iter().all(|item| item.status != Status::Failed);
    let keyring = |purpose| config.keyring(purpose, Arc::new(SystemRandom));
    let writer = keyring(KeyPurpose::Write);
    items.push(match &writer {
        Ok(_) => Item::ok("keys to write", "recipients and signer are here"),
        Err(_) if !all_right => Item::skipped("keys to write", "the key files have to be right first"),
        Err(error) => failed("keys to write", error),
    });
    let here =
        encryption.keys.values().filter_map(|files| files.private.as_ref()).all(|file| file.path.exists());
    let reader = keyring(if here { KeyPurpose::Read } else { KeyPurpose::Inspect });
    if let (Ok(writer), Ok(reader)) = (&writer, &reader) {
        items.push(try_out(writer, reader));
    }
    (items, Usable { writes: writer.is_ok(), reads: here && reader.is_ok() })
}

fn check_protection(encryption: &EncryptionConfig) -> Item {
    let name = "encryption";
    let listed = |ids: &[String]| ids.join(", ");
    if encryption.recipients.is_empty() {
        return Item::warning(name, "backups are signed, not encrypted", "Name recipients in [encryption].");
    }
    if encryption.trusted_signers.is_empty() {
        let detail = "whoever can write to the store can forge backups";
        return Item::warning(name, detail, "Name trusted_signers in [encryption].");
    }
    let (recipients, wal) = (listed(&encryption.recipients), listed(&encryption.wal_recipients));
    let trusted = listed(&encryption.trusted_signers);
    let wal = if wal == recipients { String::new() } else { format!(", WAL for {wal}") };
    Item::ok(name, format!("basebackups for {recipients}{wal}; trusted signers: {trusted}"))
}

/// Opens every file of a key that is on this host, and holds the halves against each other.
fn check_files(id: &str, files: &KeyFiles) -> Item {
    let name = format!("key {id}");
    let opened = (|| -> config::Result<bool> {
        let public = open(files.public.as_ref(), open_public)?.map(|key| key.id());
        let private = open(files.private.as_ref(), open_private)?.map(|key| key.recipient_id());
        let signing = open(files.signing.as_ref(), open_signing)?.map(|key| key.signer_id());
        let verify = open(files.verify.as_ref(), open_verify)?.map(|key| key.signer_id());
        let one_pair = public.zip(private).is_none_or(|(public, private)| public == private);
        Ok(one_pair && signing.zip(verify).is_none_or(|(signing, verify)| signing == verify))
    })();
    match opened {
        Ok(true) => {
            let here = |role: &KeyRole| files.get(*role).is_some_and(|file| file.path.exists());
            let roles: Vec<&str> =
                KeyRole::ALL.iter().filter(|role| here(role)).map(|role| role.config_key()).collect();
            Item::ok(
                name,
                if roles.is_empty() { "no file of it is here".to_owned() } else { roles.join(", ") },
            )
        }
        Ok(false) => {
            let hint = format!("Take all files of {id} from one run of `walden key create`.");
            Item::failed(name, "its public and its private files are not of one pair", hint)
        }
        Err(error) => failed(&name, &error),
    }
}

fn open<K>(file: Option<&NamedFile>, open: fn(&NamedFile) -> config::Result<K>) -> config::Result<Option<K>> {
    file.filter(|file| file.path.exists()).map(open).transpose()
}

/// Seals as this host would and opens it again, as far as the keys here go.
fn try_out(writer: &Keyring, reader: &Keyring) -> Item {
    let name = "keys to read";
    let hint = "Name this host's signer among trusted_signers, and the private keys of today's recipients.";
    for audience in [Audience::Basebackup, Audience::Wal] {
        let sealed = writer.create_key(audience);
        let opened = sealed.and_then(|(_, envelope)| match reader.can_read() {
            true => reader.open_key(&envelope, "what this host writes").map(drop),
            false => Ok(()),
        });
        if let Err(error) = opened {
            return Item::warning(name, error.to_string(), hint);
        }
    }
    if let Err(error) = writer.check_signer(reader) {
        return Item::failed(name, error.to_string(), hint);
    }
    if reader.can_read() {
        Item::ok(name, "what this host writes it can verify and open")
    } else {
        Item::ok(name, "what this host writes it can verify; no private key is here, so it opens nothing")
    }
}

fn failed(name: &str, error: &config::Error) -> Item {
    let hint = error.hint().unwrap_or_else(|| "Correct [encryption] in the configuration.".to_owned());
    Item::failed(name, error.to_string(), hint)
}
