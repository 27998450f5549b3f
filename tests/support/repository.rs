//! A repository opened through the library, for tests that do without the binary: its keys, its site, basebackups.
//!
//! It needs nothing else of this folder, so that a test binary without servers takes this file alone.
#![allow(dead_code, reason = "every test binary uses its own part of this")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walden::clock::{Clock, ManualClock};
use walden::codec::{
    Compression, NewKeys, Random, RecipientKey, RecipientPrivateKey, SigningKey, SystemRandom, VerifyKey,
};
use walden::pg::{Lsn, TimelineId};
use walden::repo::builder::BuilderOptions;
use walden::repo::documents::ServerRecord;
use walden::repo::{Keyring, KeyringOptions, RepositoryOptions};
use walden::storage::{ObjectKey, Store};

/// How the site "main" of a store is opened.
pub fn site_options(
    store: impl Store + 'static,
    keyring: Keyring,
    clock: impl Clock + 'static,
) -> RepositoryOptions {
    let site = ObjectKey::parse("main").unwrap();
    RepositoryOptions { store: Arc::new(store), site, keyring, clock: Arc::new(clock) }
}

/// A host without any key.
pub fn unencrypted(random: impl Random + 'static) -> Keyring {
    Keyring::unencrypted(Arc::new(random))
}

/// A host that encrypts for itself, signs, and takes nobody else's word.
pub fn keyring(keys: &NewKeys, random: impl Random + 'static) -> Keyring {
    encrypting(&keys.public_pem, &keys.private_pem, &keys.sign_pem, &keys.verify_pem, Arc::new(random))
}

/// The same with the keys that lie in a folder, under the names that configurations of tests name.
pub fn keyring_in(folder: &Path) -> Keyring {
    let pem = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    let (public, private) = (pem("test.pub.pem"), pem("test.pem"));
    let (sign, verify) = (pem("test.sign.pem"), pem("test.verify.pem"));
    encrypting(&public, &private, &sign, &verify, Arc::new(SystemRandom))
}

fn encrypting(public: &str, private: &str, sign: &str, verify: &str, random: Arc<dyn Random>) -> Keyring {
    Keyring::new(KeyringOptions {
        recipients: vec![RecipientKey::from_pem(public).unwrap()],
        wal_recipients: vec![RecipientKey::from_pem(public).unwrap()],
        signer: Some(SigningKey::from_pem(sign).unwrap()),
        trusted_signers: vec![VerifyKey::from_pem(verify).unwrap()],
        private_keys: vec![RecipientPrivateKey::from_pem(private).unwrap()],
        random,
    })
}

/// Where the keys of the golden repository are.
pub fn golden_keys() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1/keys")
}

/// A clock that stands still when basebackups of tests end.
pub fn clock() -> ManualClock {
    ManualClock::new("2026-11-20T10:15:00Z".parse().unwrap())
}

/// A basebackup of a server with segments of 16 MiB, within its second one.
pub fn basebackup(compression: Compression) -> BuilderOptions {
    BuilderOptions {
        cluster: "7301234567890123456-16".parse().unwrap(),
        timeline: TimelineId::FIRST,
        lsns: (Lsn(0x200_0028), Lsn(0x200_0100)),
        time: "2026-11-20T10:15:00Z".parse().unwrap(),
        compression,
        server: ServerRecord { major: 15, ..ServerRecord::default() },
    }
}
