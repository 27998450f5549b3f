//! Whole objects of the golden repository, damaged one at a time and read through the doors that engines use.
//!
//! The site that is neither signed nor encrypted is damaged as whoever can write to the store would: digests that are
//! open to all are made to fit the damage again, so that it gets as deep as it can. What a frame's tag covers needs the
//! key of the frame; lies behind it are in the unit tests of `repo`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use walden::clock::SystemClock;
use walden::codec::{Compression, Digest, SystemRandom};
use walden::pg::{Lsn, TimelineId};
use walden::repo::entry::Node;
use walden::repo::layout::{ObjectName, WalObjectName};
use walden::repo::wal_object::{
    ArchiveHead, Replace, WalKey, archive_head, archive_in_parts, archive_piece, archive_wal, newest_head,
    newest_wal, read_history, read_history_branch, read_pieces, read_wal, read_wal_header, supersede_wal,
    verify_wal,
};
use walden::repo::{Basebackup, BasebackupId, FileReader, Keyring, Repository, RepositoryOptions};
use walden::storage::{MemoryStore, ObjectKey, Store};

use crate::counting::peak_of;
use crate::{Edit, edit};

const SITE: &str = "plain";
/// Raw WAL of one segment, a pack, an index and its parsed form: the golden repository has nothing larger.
const BYTES_MAX: usize = 24 << 20;
/// What is kept of decoded chunks.
const CACHE_BYTES: usize = 1 << 20;
/// How much of each end of a file is read: files of the golden repository say that they have 128 MiB of zeros.
const READ_BYTES: u64 = 100_000;
const CASES: u32 = 150;

type Objects = Vec<(ObjectKey, Vec<u8>)>;

/// What is done to an object: its bytes edited, or one number of its JSON set.
#[derive(Debug, Clone)]
enum Damage {
    Bytes(Vec<Edit>),
    Number(Index, u64),
}

fn golden() -> Objects {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1/repository");
    let mut folders: Vec<PathBuf> = vec![top.join(SITE)];
    let mut objects = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let key = path.strip_prefix(&top).unwrap().to_str().unwrap();
                objects.push((ObjectKey::parse(key).unwrap(), fs::read(&path).unwrap()));
            }
        }
    }
    objects.sort();
    futures::executor::block_on(with_later_forms(objects))
}

async fn open(objects: &Objects) -> (Arc<MemoryStore>, Result<Repository, walden::repo::Error>) {
    let store = Arc::new(MemoryStore::new());
    for (key, bytes) in objects {
        store.create(key, Bytes::copy_from_slice(bytes)).await.unwrap();
    }
    let options = RepositoryOptions {
        store: store.clone(),
        site: ObjectKey::parse(SITE).unwrap(),
        keyring: Keyring::unencrypted(Arc::new(SystemRandom)),
        clock: Arc::new(SystemClock),
    };
    (store, Repository::open(options).await)
}

/// Adds what came into the format after the golden repository was written: pieces of a segment, a head, segments in
/// the place of others, and one in parts.
async fn with_later_forms(objects: Objects) -> Objects {
    let (store, repository) = open(&objects).await;
    let repository = repository.unwrap();
    let cluster = repository.clusters().await.unwrap()[0];
    let segment = "00000001000000000000000F".parse().unwrap();
    let key = WalKey::create(repository.keyring()).unwrap();
    let zstd = Compression::zstd(1);
    for range in [0..5000, 5000..9000, 7000..12_000] {
        let bytes = vec![7; range.len()];
        archive_piece(&repository, cluster, segment, range, &bytes, &key, zstd).await.unwrap();
    }
    let written_at = repository.clock().now();
    let head = ArchiveHead { timeline: TimelineId::FIRST, end: Lsn(0xF00_2EE0), written_at };
    archive_head(&repository, cluster, &head).await.unwrap();
    let segment = "000000010000000000000010".parse().unwrap();
    let name = WalObjectName::Segment(segment);
    archive_wal(&repository, cluster, name, &[1; 9000], &key, zstd).await.unwrap();
    for byte in [2, 3] {
        let (replace, raw) = (Replace::Anything, vec![byte; 9000].into());
        supersede_wal(&repository, cluster, segment, replace, &raw, &key, zstd).await.unwrap();
    }
    let place = (cluster, "000000010000000000000011".parse().unwrap());
    archive_in_parts(&repository, place, &vec![4; 9000].into(), 4000, &key, zstd).await.unwrap();
    let mut all = Objects::new();
    for object in store.list("", None, 10_000).await.unwrap() {
        all.push((object.key.clone(), store.get(&object.key, u64::MAX).await.unwrap().to_vec()));
    }
    all
}

fn damage() -> impl Strategy<Value = Damage> {
    let numbers =
        vec![0, 1, 100, 1 << 20, 1 << 29, 1 << 31, u64::from(u32::MAX), 1 << 40, i64::MAX as u64, u64::MAX];
    prop_oneof![
        2 => prop::collection::vec(edit(), 1..4).prop_map(Damage::Bytes),
        1 => (any::<Index>(), select(numbers)).prop_map(|(at, number)| Damage::Number(at, number)),
    ]
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Bytes(edits) => edits.iter().for_each(|edit| edit.apply(bytes)),
            Self::Number(at, number) => match serde_json::from_slice::<Value>(bytes) {
                Ok(mut document) => {
                    let mut numbers = Vec::new();
                    collect_numbers(&mut document, &mut numbers);
                    if !numbers.is_empty() {
                        let chosen = at.index(numbers.len());
                        *numbers.swap_remove(chosen) = json!(number);
                    }
                    *bytes = serde_json::to_vec(&document).unwrap();
                    bytes.push(b'\n');
                }
                Err(_) => Edit::Largest(*at, 4).apply(bytes),
            },
        }
    }
}

fn collect_numbers<'a>(value: &'a mut Value, into: &mut Vec<&'a mut Value>) {
    match value {
        Value::Number(_) => into.push(value),
        Value::Array(values) => values.iter_mut().for_each(|value| collect_numbers(value, into)),
        Value::Object(fields) => fields.values_mut().for_each(|value| collect_numbers(value, into)),
        _ => {}
    }
}

/// Makes what names the damaged object by its digest name it again.
fn repair(objects: &mut Objects, damaged: usize, before: &[u8]) {
    let (key, bytes) = objects[damaged].clone();
    let folder = key.as_str().rsplit_once('/').unwrap().0;
    let part = if key.as_str().ends_with("/manifest") {
        "manifest"
    } else if key.as_str().ends_with("/refs") {
        "refs"
    } else {
        repair_body(&mut objects[damaged].1, before);
        if key.as_str().ends_with(".part") {
            let part = objects[damaged].1.clone();
            objects.iter_mut().for_each(|(_, bytes)| repair_index(bytes, before, &part));
        }
        return;
    };
    let outcome = format!("{folder}/backup.json");
    let (_, record) = objects.iter_mut().find(|(key, _)| key.as_str() == outcome).unwrap();
    let mut document: Value = serde_json::from_slice(record).unwrap();
    let pin = &mut document[part];
    pin["size"] = json!(bytes.len());
    pin["digest"] = json!(Digest::of(&bytes).to_string());
    if part == "manifest" {
        let head = bytes.len().min(usize::try_from(pin["head_size"].as_u64().unwrap()).unwrap());
        let start = bytes.len().min(usize::try_from(pin["start_size"].as_u64().unwrap()).unwrap());
        (pin["head_size"], pin["start_size"]) = (json!(head), json!(start));
        pin["head_digest"] = json!(Digest::of(&bytes[..head]).to_string());
    }
    *record = serde_json::to_vec(&document).unwrap();
    record.push(b'\n');
}

/// Puts the digest of a WAL object's body where its header has that of the body before.
fn repair_body(bytes: &mut [u8], before: &[u8]) {
    let body = |bytes: &[u8]| -> Option<Digest> {
        let length = u32::from_le_bytes(bytes.get(12..16)?.try_into().unwrap());
        Some(Digest::of(bytes.get(16 + length as usize..)?))
    };
    let (Some(old), Some(new)) = (body(before), body(bytes)) else { return };
    if let Some(at) = bytes.windows(32).position(|window| window == old.as_bytes()) {
        bytes[at..at + 32].copy_from_slice(new.as_bytes());
    }
}

/// Puts size and digest of a part where an index has those of the part before, if the size is as long as it was.
fn repair_index(bytes: &mut [u8], before: &[u8], after: &[u8]) {
    let varint = |mut number: usize| {
        let mut bytes = Vec::new();
        while number >= 0x80 {
            bytes.push(number as u8 | 0x80);
            number >>= 7;
        }
        bytes.push(number as u8);
        bytes
    };
    let entry = |part: &[u8]| [&varint(part.len())[..], Digest::of(part).as_bytes()].concat();
    let (old, new) = (entry(before), entry(after));
    if old.len() == new.len()
        && let Some(at) = bytes.windows(old.len()).position(|window| window == old)
    {
        bytes[at..at + old.len()].copy_from_slice(&new);
    }
}

/// Reads all of a site and returns how many reads went well and how many were refused.
async fn read_all(objects: &Objects) -> (usize, usize) {
    let (_, Ok(repository)) = open(objects).await else { return (0, 1) };
    let (mut read, mut refused) = (0, 0);
    let mut count = |well: bool| *(if well { &mut read } else { &mut refused }) += 1;
    for (key, _) in objects {
        match repository.layout().parse(key) {
            Some(ObjectName::Outcome(id)) => count(read_basebackup(&repository, id).await),
            Some(ObjectName::Wal(cluster, name)) => {
                count(read_wal(&repository, cluster, name).await.is_ok());
                count(read_wal_header(&repository, cluster, name).await.is_ok());
                count(verify_wal(&repository, cluster, name).await.is_ok());
                if matches!(name, WalObjectName::Piece { .. }) {
                    count(read_pieces(&repository, cluster, name.segment()).await.is_ok());
                }
                if matches!(name, WalObjectName::Forced { .. }) {
                    count(newest_wal(&repository, cluster, name.segment()).await.is_ok());
                }
            }
            Some(ObjectName::History(cluster, timeline)) => {
                count(read_history(&repository, cluster, timeline).await.is_ok());
                count(read_history_branch(&repository, cluster, timeline).await.is_ok());
            }
            // One that is damaged is passed over.
            Some(ObjectName::Head(cluster, timeline, _)) => {
                count(newest_head(&repository, cluster, timeline).await.is_ok_and(|head| head.is_some()));
            }
            _ => {}
        }
    }
    (read, refused)
}

/// Reads every entry of a basebackup, and returns whether all could be read.
async fn read_basebackup(repository: &Repository, id: BasebackupId) -> bool {
    let Ok(basebackup) = Basebackup::open(repository, id).await else { return false };
    let basebackup = Arc::new(basebackup);
    let reader = FileReader::new(basebackup.clone(), CACHE_BYTES);
    let mut well = reader.prefetch_start_set(CACHE_BYTES as u64).await.is_ok();
    for n in 0..basebackup.block_count() {
        let Ok(entries) = basebackup.block(n).await else {
            well = false;
            continue;
        };
        for entry in entries.iter() {
            if let Node::File { size, .. } = &entry.node {
                for range in [0..READ_BYTES, size.saturating_sub(READ_BYTES)..*size] {
                    well &= reader.read(entry, range).await.is_ok();
                }
            }
            let _ = basebackup.entry(&entry.path).await;
            let _ = basebackup.children(&entry.path).await;
        }
    }
    well
}

#[test]
fn damaged_objects_are_read_or_refused_in_bounded_memory() {
    let objects = golden();
    let whole = futures::executor::block_on(read_all(&objects));
    assert_eq!(whole.1, 0, "{whole:?}");
    assert!(whole.0 > 10, "{whole:?}");
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let cases = (any::<Index>(), damage(), any::<bool>());
    let refusals = std::cell::Cell::new(0);
    TestRunner::new(config)
        .run(&cases, |(at, damage, repaired)| {
            let mut objects = objects.clone();
            let at = at.index(objects.len());
            let before = objects[at].1.clone();
            damage.apply(&mut objects[at].1);
            if repaired {
                repair(&mut objects, at, &before);
            }
            let peak = peak_of(|| {
                let (_, refused) = futures::executor::block_on(read_all(&objects));
                refusals.set(refusals.get() + usize::from(refused > 0));
            });
            prop_assert!(peak <= BYTES_MAX, "{}: {peak} bytes", objects[at].0);
            Ok(())
        })
        .unwrap();
    assert!(refusals.get() > CASES as usize / 4, "{} of {CASES} damages were found", refusals.get());
}
