//! Basebackups written and read back whole: full, incremental, damaged, foreign.
//! Everything here goes through the public face of `repo` and a store in memory.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use crate::codec::{
    Compression, NewKeys, RecipientKey, RecipientPrivateKey, SeededRandom, SigningKey, VerifyKey, create_keys,
};
use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
use crate::repo::entry::{Content, Node, TreePath};
use crate::repo::layout::WalObjectName;
use crate::repo::page_map::PAGE_SIZE;
use crate::repo::wal_object::{Archived, WalKey, archive_wal, read_wal};
use crate::repo::{
    Basebackup, BasebackupId, ErrorKind, FileReader, Keyring, KeyringOptions, Repository, RepositoryOptions,
    testing,
};
use crate::storage::{self, Folder, MemoryStore, ObjectKey, ObjectMeta, Store};

/// Keys are slow to make and the same for all tests.
fn keys() -> &'static NewKeys {
    static KEYS: std::sync::OnceLock<NewKeys> = std::sync::OnceLock::new();
    KEYS.get_or_init(|| create_keys(3072).unwrap())
}

fn keyring(keys: &NewKeys) -> Keyring {
    testing::keyring(keys, 7)
}

async fn repository(store: Arc<MemoryStore>, keyring: Keyring) -> Repository {
    testing::site_with(keyring, store, testing::clock()).await
}

fn options() -> BuilderOptions {
    BuilderOptions { compression: Compression::zstd(3), ..testing::basebackup() }
}

async fn read(reader: &FileReader, path: &str) -> Vec<u8> {
    let (_, entry) = reader.basebackup().entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap();
    reader.read(&entry, 0..entry.size()).await.unwrap().to_vec()
}

async fn open(repository: &Repository, id: BasebackupId) -> FileReader {
    FileReader::new(Arc::new(Basebackup::open(repository, id).await.unwrap()), 4 << 20)
}

fn pages(seed: u8, count: usize) -> Vec<u8> {
    (0..count * PAGE_SIZE as usize).map(|n| (n / 7) as u8 ^ (n / PAGE_SIZE as usize) as u8 ^ seed).collect()
}

#[tokio::test]
async fn a_second_basebackup_names_chunks_of_the_first_and_reads_alone() {
    let repository = repository(Arc::default(), keyring(keys())).await;
    let mut first = pages(1, 40);
    let mut full = BasebackupBuilder::begin(&repository, options(), None).await.unwrap();
    full.directory("data").directory("data/base").directory("data/base/5").symlink("data/link", "base/5");
    full.file("data/PG_VERSION", b"15\n").await.unwrap();
    full.file("data/postgresql.conf", &[b'#'; 3000]).await.unwrap();
    full.file("data/base/5/16384", &first).await.unwrap();
    let full = full.finish().await.unwrap();

    let parent = Arc::new(Basebackup::open(&repository, full.id).await.unwrap());
    first[3 * 8192 + 5] ^= 1;
    first[17 * 8192] ^= 1;
    first[20 * 8192..22 * 8192].fill(0);
    first.truncate(39 * 8192 + 100);
    let mut second = BasebackupBuilder::begin(&repository, options(), Some(parent)).await.unwrap();
    second.directory("data").directory("data/base").directory("data/base/5");
    second.file("data/base/5/16384", &first).await.unwrap();
    let second = second.finish().await.unwrap();

    assert!(second.id > full.id);
    assert_eq!(second.parent, Some(full.id));
    let reader = open(&repository, second.id).await;
    assert_eq!(read(&reader, "data/base/5/16384").await, first);
    assert!(reader.basebackup().refs().records().iter().any(|record| record.id.origin == full.id));
    let own: u32 = reader
        .basebackup()
        .refs()
        .records()
        .iter()
        .filter(|record| record.id.origin == second.id)
        .map(|record| record.live)
        .sum();
    assert!(own > 0 && u64::from(own) < full.size.live_bytes / 3, "{own} of {}", full.size.live_bytes);
    let reader = open(&repository, full.id).await;
    assert_eq!(read(&reader, "data/base/5/16384").await, pages(1, 40));
    assert_eq!(read(&reader, "data/postgresql.conf").await, [b'#'; 3000]);
    let children = reader.basebackup().children(&TreePath::new("data").unwrap()).await.unwrap();
    let names: Vec<String> = children.iter().map(|(_, entry)| entry.path.to_string()).collect();
    assert_eq!(names, ["data/PG_VERSION", "data/base", "data/link", "data/postgresql.conf"]);
}

#[tokio::test]
async fn another_hosts_key_is_no_key_and_another_signer_is_not_trusted() {
    let store: Arc<MemoryStore> = Arc::default();
    let writer = repository(store.clone(), keyring(keys())).await;
    let mut full = BasebackupBuilder::begin(&writer, options(), None).await.unwrap();
    full.file("data/base/5/1", &pages(1, 3)).await.unwrap();
    let id = full.finish().await.unwrap().id;

    let stranger = create_keys(3072).unwrap();
    let foreign = repository(store.clone(), keyring(&stranger)).await;
    let error = Basebackup::open(&foreign, id).await.unwrap_err();
    assert!(error.to_string().contains("is not among trusted_signers"), "{error}");

    let reader = KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: None,
        trusted_signers: vec![VerifyKey::from_pem(&keys().verify_pem).unwrap()],
        private_keys: vec![RecipientPrivateKey::from_pem(&stranger.private_pem).unwrap()],
        random: Arc::new(SeededRandom::new(8)),
    };
    let keyless = repository(store.clone(), Keyring::new(reader)).await;
    let error = Basebackup::open(&keyless, id).await.unwrap_err();
    assert!(error.to_string().contains("none of these private keys is here"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Input);

    let unsigned = Keyring::unencrypted(Arc::new(SeededRandom::new(9)));
    let unsigned = repository(store.clone(), unsigned).await;
    let mut plain = BasebackupBuilder::begin(&unsigned, options(), None).await.unwrap();
    plain.file("data/base/5/1", &pages(1, 3)).await.unwrap();
    let id = plain.finish().await.unwrap().id;
    let error = Basebackup::open(&writer, id).await.unwrap_err();
    assert!(error.to_string().contains("it is not signed"), "{error}");
    let reader = open(&unsigned, id).await;
    assert_eq!(read(&reader, "data/base/5/1").await, pages(1, 3));
}

/// A standby's key opens WAL and no basebackup.
#[tokio::test]
async fn the_key_of_a_wal_recipient_opens_wal_and_no_basebackup() {
    let store: Arc<MemoryStore> = Arc::default();
    let standby = create_keys(3072).unwrap();
    let host = |private: &NewKeys| {
        Keyring::new(KeyringOptions {
            recipients: vec![RecipientKey::from_pem(&keys().public_pem).unwrap()],
            wal_recipients: vec![
                RecipientKey::from_pem(&keys().public_pem).unwrap(),
                RecipientKey::from_pem(&standby.public_pem).unwrap(),
            ],
            signer: Some(SigningKey::from_pem(&keys().sign_pem).unwrap()),
            trusted_signers: vec![VerifyKey::from_pem(&keys().verify_pem).unwrap()],
            private_keys: vec![RecipientPrivateKey::from_pem(&private.private_pem).unwrap()],
            random: Arc::new(SeededRandom::new(12)),
        })
    };
    let primary = repository(store.clone(), host(keys())).await;
    let mut full = BasebackupBuilder::begin(&primary, options(), None).await.unwrap();
    full.file("data/base/5/1", &pages(1, 3)).await.unwrap();
    let id = full.finish().await.unwrap().id;
    let name = WalObjectName::Segment("000000010000000000000002".parse().unwrap());
    let raw = pages(9, 2048);
    let key = WalKey::create(primary.keyring()).unwrap();
    archive_wal(&primary, options().cluster, name, &raw, &key, Compression::zstd(1)).await.unwrap();

    let standby = repository(store, host(&standby)).await;
    assert_eq!(read_wal(&standby, options().cluster, name).await.unwrap(), raw);
    let error = Basebackup::open(&standby, id).await.unwrap_err();
    assert!(matches!(error, crate::repo::Error::NoPrivateKey { .. }), "{error}");
    assert_eq!(read(&open(&primary, id).await, "data/base/5/1").await, pages(1, 3));
}

#[tokio::test]
async fn a_segment_is_archived_once_and_compared_ever_after() {
    let repository = repository(Arc::default(), keyring(keys())).await;
    let cluster = options().cluster;
    let name = WalObjectName::Segment("000000010000000000000002".parse().unwrap());
    let key = WalKey::create(repository.keyring()).unwrap();
    let mut raw = pages(9, 2048);
    let compression = Compression::zstd(1);
    let archived = archive_wal(&repository, cluster, name, &raw, &key, compression).await.unwrap();
    assert_eq!(archived, Archived::Created);
    // Sealed again the bytes are others, the content is not.
    let key = WalKey::create(repository.keyring()).unwrap();
    let archived = archive_wal(&repository, cluster, name, &raw, &key, compression).await.unwrap();
    assert_eq!(archived, Archived::Identical);
    assert_eq!(read_wal(&repository, cluster, name).await.unwrap(), raw);
    raw[100] ^= 1;
    let error = archive_wal(&repository, cluster, name, &raw, &key, compression).await.unwrap_err();
    assert!(error.to_string().contains("already exists with different content"), "{error}");
}

/// Flips, cuts and swaps every object of a basebackup and reads it again: an error that names it, or (for bytes
/// nobody reads) the right content; never anything else.
#[tokio::test]
async fn a_damaged_object_is_never_served() {
    for encrypted in [true, false] {
        let keyring = || {
            if encrypted { keyring(keys()) } else { Keyring::unencrypted(Arc::new(SeededRandom::new(1))) }
        };
        let store: Arc<MemoryStore> = Arc::default();
        let repository = repository(store.clone(), keyring()).await;
        let mut builder = BasebackupBuilder::begin(&repository, options(), None).await.unwrap();
        builder.directory("data");
        builder.file("data/small", &[b'x'; 3000]).await.unwrap();
        builder.file("data/16384", &pages(3, 40)).await.unwrap();
        let id = builder.finish().await.unwrap().id;
        let objects = store.list("", None, 1000).await.unwrap();
        for object in objects.iter().filter(|object| !object.key.as_str().ends_with("/begin")) {
            let bytes = store.get(&object.key, u64::MAX).await.unwrap();
            let mut variants = vec![bytes.slice(..bytes.len() / 2), bytes.slice(..bytes.len() - 1)];
            for at in (0..bytes.len()).step_by((bytes.len() / 40).max(1)) {
                let mut flipped = bytes.to_vec();
                flipped[at] ^= 0x10;
                variants.push(flipped.into());
            }
            for variant in variants {
                let damaged: Arc<MemoryStore> = Arc::default();
                for other in &objects {
                    let body = if other.key == object.key {
                        variant.clone()
                    } else {
                        store.get(&other.key, u64::MAX).await.unwrap()
                    };
                    damaged.create(&other.key, body).await.unwrap();
                }
                // Without signatures `backup.json` and `site.json` are what they are: JSON that may lie.
                if !encrypted && object.key.as_str().ends_with(".json") {
                    continue;
                }
                let options = testing::options(damaged, testing::clock(), 1);
                let outcome = read_everything(RepositoryOptions { keyring: keyring(), ..options }, id).await;
                if let Ok(contents) = &outcome {
                    assert_eq!(contents[0], vec![b'x'; 3000], "{}", object.key);
                    assert_eq!(contents[1], pages(3, 40), "{}", object.key);
                }
                let slack = ["/packs/", "/site.json"].iter().any(|name| object.key.as_str().contains(name));
                assert!(outcome.is_err() || slack, "{} was served damaged", object.key);
            }
        }
    }
}

/// Failure 42: "create only if absent" claimed by a store that does not honour it.
#[tokio::test]
async fn a_store_that_overwrites_is_refused_before_anything_is_written() {
    let store = Arc::new(Overwriting(MemoryStore::new()));
    let options = testing::options(store.clone(), testing::clock(), 1);
    let error = Repository::open_or_create(options).await.unwrap_err();
    assert!(error.to_string().contains("refuse a second put"), "{error}");
    assert!(store.list("", None, 10).await.unwrap().is_empty());
}

/// Answers every create with success, and keeps what came last.
#[derive(Debug)]
struct Overwriting(MemoryStore);

#[async_trait::async_trait]
impl Store for Overwriting {
    async fn create(&self, key: &ObjectKey, body: Bytes) -> Result<(), storage::Error> {
        self.0.delete(key).await?;
        self.0.create(key, body).await
    }

    async fn get(&self, key: &ObjectKey, size_max: u64) -> Result<Bytes, storage::Error> {
        self.0.get(key, size_max).await
    }

    async fn get_range(&self, key: &ObjectKey, range: Range<u64>) -> Result<Bytes, storage::Error> {
        self.0.get_range(key, range).await
    }

    async fn head(&self, key: &ObjectKey) -> Result<ObjectMeta, storage::Error> {
        self.0.head(key).await
    }

    async fn list(
        &self,
        prefix: &str,
        after: Option<&ObjectKey>,
        limit: usize,
    ) -> Result<Vec<ObjectMeta>, storage::Error> {
        self.0.list(prefix, after, limit).await
    }

    async fn list_folder(&self, prefix: &str) -> Result<Folder, storage::Error> {
        self.0.list_folder(prefix).await
    }

    async fn delete(&self, key: &ObjectKey) -> Result<(), storage::Error> {
        self.0.delete(key).await
    }
}

async fn read_everything(
    options: RepositoryOptions,
    id: BasebackupId,
) -> Result<Vec<Vec<u8>>, crate::repo::Error> {
    let repository = Repository::open(options).await?;
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, id).await?), 1 << 20);
    let mut contents = Vec::new();
    for path in ["data/small", "data/16384"] {
        let found = reader.basebackup().entry(&TreePath::new(path).unwrap()).await?;
        let (_, entry) = found.ok_or_else(|| crate::repo::Error::damaged(path, "it is not there"))?;
        contents.push(reader.read(&entry, 0..entry.size()).await?.to_vec());
    }
    Ok(contents)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn random_ranges_of_a_file_of_many_basebackups_are_its_bytes(
        histories in proptest::collection::vec(proptest::collection::vec((0usize..300, any::<u8>()), 0..40), 1..4),
        size in 1usize..300 * 8192,
        ranges in proptest::collection::vec((0u64..300 * 8192, 1u64..100_000), 1..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let repository = repository(Arc::default(), keyring(keys())).await;
            let mut bytes = vec![0; size];
            let mut parent = None;
            for changes in histories {
                for (page, value) in changes {
                    let range = (page * 8192).min(size)..((page + 1) * 8192).min(size);
                    bytes[range].fill(value);
                }
                let mut builder = BasebackupBuilder::begin(&repository, options(), parent.take()).await.unwrap();
                builder.file("data/base/5/16384", &bytes).await.unwrap();
                let id = builder.finish().await.unwrap().id;
                parent = Some(Arc::new(Basebackup::open(&repository, id).await.unwrap()));
            }
            let reader = FileReader::new(parent.unwrap(), 200_000);
            let path = TreePath::new("data/base/5/16384").unwrap();
            let (_, entry) = reader.basebackup().entry(&path).await.unwrap().unwrap();
            if let Node::File { content: Content::Inline(_), .. } = entry.node {
                return;
            }
            for (from, len) in ranges {
                let expected = &bytes[(from as usize).min(size)..((from + len) as usize).min(size)];
                assert_eq!(reader.read(&entry, from..from + len).await.unwrap(), expected);
            }
        });
    }
}
