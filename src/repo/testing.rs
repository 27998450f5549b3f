//! What unit tests stand on, here and in the modules above: a site in a store, a keyring, and basebackups.

use std::sync::Arc;

use jiff::Timestamp;

use crate::clock::{Clock, ManualClock};
use crate::codec::{
    Compression, NewKeys, RecipientKey, RecipientPrivateKey, SeededRandom, SigningKey, VerifyKey,
};
use crate::pg::{Lsn, TimelineId};
use crate::repo::builder::BuilderOptions;
use crate::repo::documents::ServerRecord;
use crate::repo::{Keyring, KeyringOptions, Repository, RepositoryOptions};
use crate::storage::{ObjectKey, Store};

/// The site "main" of a store, unencrypted. Processes that write into one site draw from seeds of their own.
pub fn options(store: impl Store + 'static, clock: impl Clock + 'static, seed: u64) -> RepositoryOptions {
    RepositoryOptions {
        store: Arc::new(store),
        site: ObjectKey::parse("main").unwrap(),
        keyring: Keyring::unencrypted(Arc::new(SeededRandom::new(seed))),
        clock: Arc::new(clock),
    }
}

/// Opens that site, and makes it where there is none.
pub async fn site(store: impl Store + 'static, clock: impl Clock + 'static) -> Repository {
    open(options(store, clock, 3)).await
}

/// Opens that site with the keys of another host.
pub async fn site_with(
    keyring: Keyring,
    store: impl Store + 'static,
    clock: impl Clock + 'static,
) -> Repository {
    open(RepositoryOptions { keyring, ..options(store, clock, 3) }).await
}

async fn open(options: RepositoryOptions) -> Repository {
    Repository::open_or_create(options).await.unwrap().0
}

/// A host that encrypts for itself, signs, and takes nobody else's word.
pub fn keyring(keys: &NewKeys, seed: u64) -> Keyring {
    Keyring::new(KeyringOptions {
        recipients: vec![RecipientKey::from_pem(&keys.public_pem).unwrap()],
        wal_recipients: vec![RecipientKey::from_pem(&keys.public_pem).unwrap()],
        signer: Some(SigningKey::from_pem(&keys.sign_pem).unwrap()),
        trusted_signers: vec![VerifyKey::from_pem(&keys.verify_pem).unwrap()],
        private_keys: vec![RecipientPrivateKey::from_pem(&keys.private_pem).unwrap()],
        random: Arc::new(SeededRandom::new(seed)),
    })
}

/// A host that signs, and takes nobody else's word, without encryption.
pub fn signing_keyring(seed: u64) -> Keyring {
    let sign = include_str!("../../tests/data/golden-1/keys/test.sign.pem");
    let verify = include_str!("../../tests/data/golden-1/keys/test.verify.pem");
    Keyring::new(KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: Some(SigningKey::from_pem(sign).unwrap()),
        trusted_signers: vec![VerifyKey::from_pem(verify).unwrap()],
        private_keys: Vec::new(),
        random: Arc::new(SeededRandom::new(seed)),
    })
}

/// When basebackups of tests end.
pub fn time() -> Timestamp {
    "2026-11-20T10:15:00Z".parse().unwrap()
}

/// A clock that says so until it is advanced.
pub fn clock() -> ManualClock {
    ManualClock::new(time())
}

/// A basebackup of a server with segments of 16 MiB, within its second one.
pub fn basebackup() -> BuilderOptions {
    BuilderOptions {
        cluster: "7301234567890123456-16".parse().unwrap(),
        timeline: TimelineId::FIRST,
        lsns: (Lsn(0x0200_0028), Lsn(0x0200_0100)),
        time: time(),
        compression: Compression::NONE,
        server: ServerRecord { major: 15, ..ServerRecord::default() },
    }
}
