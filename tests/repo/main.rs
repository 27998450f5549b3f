//! What reading a basebackup may cost, counted at the store: requests, bytes and memory.
//!
//! The figures are those the issue names; they hold for any store, because they are counts.

#[path = "../support/repository.rs"]
mod repository;

use std::collections::HashSet;
use std::process::Command;
use std::sync::Arc;

use walden::clock::SystemClock;
use walden::codec::{Compression, RecipientPrivateKey, SeededRandom, create_keys};
use walden::repo::builder::BasebackupBuilder;
use walden::repo::entry::{Entry, TreePath};
use walden::repo::page_map::PAGE_SIZE;
use walden::repo::{Basebackup, BasebackupId, FileReader, Keyring, KeyringOptions, Repository};
use walden::storage::{LocalStore, MemoryStore, Recording, Store};

use repository::{basebackup, clock, keyring, site_options};

async fn site(store: impl Store + 'static, keyring: Keyring) -> Repository {
    Repository::open_or_create(site_options(store, keyring, clock())).await.unwrap().0
}

/// Pages of which half is noise, so that they compress about as badly as a heap may.
fn noisy_pages(count: usize) -> Vec<u8> {
    let mut bytes = vec![b'.'; count * PAGE_SIZE as usize];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for page in bytes.chunks_mut(PAGE_SIZE as usize) {
        for word in page[..4096].chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

async fn entry(reader: &FileReader, path: &str) -> Entry {
    reader.basebackup().entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap().1
}

#[tokio::test]
async fn a_page_of_a_cold_relation_of_a_gibibyte_costs_four_requests_and_then_one() {
    const PAGES: usize = 131_072;
    let store = Recording::new(Arc::new(MemoryStore::new()));
    let keys = create_keys(3072).unwrap();
    let repository = site(store.clone(), keyring(&keys, SeededRandom::new(1))).await;
    let bytes = noisy_pages(PAGES);
    let mut builder =
        BasebackupBuilder::begin(&repository, basebackup(Compression::zstd(1)), None).await.unwrap();
    builder.directory("data").directory("data/base").directory("data/base/5");
    // Enough other files that the file table is not fetched whole with the manifest's beginning.
    for n in 0..20_000 {
        builder.file(&format!("data/base/5/{n}"), &n.to_string().repeat(12).into_bytes()).await.unwrap();
    }
    builder.file("data/base/5/90000", &bytes).await.unwrap();
    let id = builder.finish().await.unwrap().id;

    for page in [77_777usize, 3, PAGES - 1] {
        let reader = FileReader::new(Arc::new(Basebackup::open(&repository, id).await.unwrap()), 1 << 20);
        store.take_calls();
        let from = page as u64 * PAGE_SIZE;
        let read = async |reader: &FileReader, from: u64| {
            let entry = entry(reader, "data/base/5/90000").await;
            reader.read(&entry, from..from + PAGE_SIZE).await.unwrap()
        };
        assert_eq!(read(&reader, from).await, bytes[from as usize..][..PAGE_SIZE as usize]);
        let cold = store.take_calls();
        let cold_bytes: u64 = cold.iter().map(|call| call.bytes).sum();
        println!("page {page}: {} requests, {cold_bytes} bytes", cold.len());
        assert!(cold.len() <= 4, "{cold:#?}");
        assert!(cold_bytes <= 256 << 10, "{cold_bytes} bytes");
        // Another chunk under the same map block: the map is open now.
        let near = if page % 16_384 > 1000 { from - 500 * PAGE_SIZE } else { from + 500 * PAGE_SIZE };
        assert_eq!(read(&reader, near).await, bytes[near as usize..][..PAGE_SIZE as usize]);
        let warm = store.take_calls();
        assert_eq!(warm.len(), 1, "{warm:#?}");
        assert!(warm[0].bytes <= 70 << 10, "{warm:#?}");
    }
}

const CHILD: &str = "WALDEN_TEST_LARGE_BASEBACKUP";

/// Opens the basebackup that the parent process has built, reads one file and tells its memory.
async fn child(argument: &str) {
    let (folder, rest) = argument.split_once('|').unwrap();
    let (id, key) = rest.split_once('|').unwrap();
    let store = Arc::new(LocalStore::open(folder.as_ref(), &SystemClock).unwrap());
    let keyring = Keyring::new(KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: None,
        trusted_signers: Vec::new(),
        private_keys: vec![RecipientPrivateKey::from_pem(&std::fs::read_to_string(key).unwrap()).unwrap()],
        random: Arc::new(SeededRandom::new(2)),
    });
    let repository = site(store, keyring).await;
    let id: BasebackupId = id.parse().unwrap();
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, id).await.unwrap()), 16 << 20);
    let entry = entry(&reader, "data/base/17/150000").await;
    assert_eq!(reader.read(&entry, 0..entry.size()).await.unwrap(), vec![b'7'; 100]);
    // Listing the folder reads its part of the file table, as a starting server does.
    let children = reader.basebackup().children(&TreePath::new("data/base/17").unwrap()).await.unwrap();
    assert_eq!(children.len(), 10_000);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    println!("peak {}", peak.trim().trim_end_matches(" kB").trim());
}

/// Failure 14: one entry was lost wherever a part of the metadata ended.
async fn every_entry_is_there(basebackup: &Basebackup) {
    assert!(basebackup.block_count() > 100, "{} blocks of the file table", basebackup.block_count());
    let mut paths = HashSet::new();
    let note = |_, entry: &Entry| {
        assert!(paths.insert(entry.path.to_string()), "{} is there twice", entry.path);
        Ok::<_, walden::repo::Error>(())
    };
    basebackup.visit_entries(note).await.unwrap();
    let files = (0..200_000).map(|n| format!("data/base/{}/{}", n / 10_000 + 1, n - 10_000));
    let lost: Vec<String> = files.filter(|path| !paths.contains(path)).collect();
    assert!(lost.is_empty(), "{} of the files are lost, the first is {:?}", lost.len(), lost.first());
    assert_eq!(paths.len(), 200_000 + 22, "files and directories");
}

#[tokio::test]
async fn opening_two_hundred_thousand_files_takes_little_memory() {
    if let Ok(argument) = std::env::var(CHILD) {
        return child(&argument).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Arc::new(LocalStore::open(folder.path(), &SystemClock).unwrap());
    let keys = create_keys(3072).unwrap();
    let key_file = folder.path().join("key.pem");
    std::fs::write(&key_file, keys.private_pem.as_str()).unwrap();
    let repository = site(store, keyring(&keys, SeededRandom::new(1))).await;
    let mut builder =
        BasebackupBuilder::begin(&repository, basebackup(Compression::zstd(1)), None).await.unwrap();
    builder.directory("data").directory("data/base");
    for database in 1..=20 {
        builder.directory(&format!("data/base/{database}"));
        for n in 0..10_000 {
            let file = (database - 2) * 10_000 + n;
            builder.file(&format!("data/base/{database}/{file}"), &[b'7'; 100]).await.unwrap();
        }
    }
    let id = builder.finish().await.unwrap().id;
    every_entry_is_there(&Basebackup::open(&repository, id).await.unwrap()).await;
    let argument = format!("{}|{id}|{}", folder.path().display(), key_file.display());
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "opening_two_hundred_thousand_files_takes_little_memory", "--nocapture"])
        .env(CHILD, argument)
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}{}", String::from_utf8_lossy(&output.stderr));
    let peak: u64 = stdout.lines().find_map(|line| line.split("peak ").nth(1)).unwrap().parse().unwrap();
    println!("peak memory {peak} KiB");
    assert!(peak <= 64 << 10, "{peak} KiB");
}
