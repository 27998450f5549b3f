//! The example of `docs/format.md`, decoded; written anew with `WALDEN_UPDATE_DOCS=1`.
//!
//! The page holds every object of a small repository and the keys to it. The test puts those bytes into a store in
//! memory and reads both basebackups back; then it checks, at the places the page names, the fields it names.

mod golden;
mod golden_forms;
mod golden_resumed;
mod golden_writer;
#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use walden::codec::{Compression, NewKeys, RecipientPrivateKey, SeededRandom, VerifyKey, create_keys};
use walden::pg::{Lsn, TimelineId, WalSegmentName};
use walden::repo::builder::{BasebackupBuilder, BuilderOptions};
use walden::repo::entry::TreePath;
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{
    ArchiveHead, Replace, WalKey, archive_head, archive_in_parts, archive_piece, archive_wal, newest_head,
    read_pieces, read_wal, supersede_wal,
};
use walden::repo::{Basebackup, BasebackupId, ClusterId, FileReader, Keyring, KeyringOptions, Repository};
use walden::storage::{MemoryStore, ObjectKey, Store};

use support::repository::{basebackup, clock, keyring, site_options};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/format.md");
const BACKUP_LABEL: &[u8] = b"START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n";

fn builder_options() -> BuilderOptions {
    basebackup(Compression::NONE)
}

/// The relation of the example: a zero page, then the beginning of another.
fn relation() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    bytes.extend_from_slice(b"a page of the first basebackup that the second one names");
    bytes
}

fn wal_name() -> WalObjectName {
    WalObjectName::BackupHistory { segment: "000000010000000000000002".parse().unwrap(), offset: 0x28 }
}

/// The segment that is there in two pieces.
fn growing() -> WalSegmentName {
    "000000010000000000000003".parse().unwrap()
}

/// The segment that another one has taken the place of.
fn superseded() -> WalSegmentName {
    "000000010000000000000004".parse().unwrap()
}

/// The segment that is stored in parts, smaller than any archiver makes them.
fn in_parts() -> WalSegmentName {
    "000000010000000000000005".parse().unwrap()
}

const FORMS: [&[u8]; 2] = [b"a segment as it was archived first", b"the segment that counts"];
const PART_BYTES: usize = 16;
const PARTS: &[u8] = b"the first part, and the second";
const PIECES: [&[u8]; 2] = [b"the beginning of a segment, ", b"as far as it was received"];

fn head() -> ArchiveHead {
    let written_at = "2026-11-20T10:15:00Z".parse().unwrap();
    ArchiveHead { timeline: TimelineId::FIRST, end: Lsn(0x300_0035), written_at }
}

async fn build() -> (Arc<MemoryStore>, NewKeys) {
    let (store, keys) = (Arc::new(MemoryStore::default()), create_keys(3072).unwrap());
    let options = site_options(store.clone(), keyring(&keys, SeededRandom::new(1)), clock());
    let (repository, _) = Repository::open_or_create(options).await.unwrap();
    let mut first = BasebackupBuilder::begin(&repository, builder_options(), None).await.unwrap();
    first.directory("data").directory("data/base").directory("data/base/5");
    first.file("data/PG_VERSION", b"15\n").await.unwrap();
    first.file("data/base/5/16384", &relation()).await.unwrap();
    let first = first.finish().await.unwrap();
    let parent = Arc::new(Basebackup::open(&repository, first.id).await.unwrap());
    let mut second = BasebackupBuilder::begin(&repository, builder_options(), Some(parent)).await.unwrap();
    second.directory("data").directory("data/base").directory("data/base/5");
    second.file("data/base/5/16384", &relation()).await.unwrap();
    second.file("data/postgresql.conf", &[b'#'; 80]).await.unwrap();
    second.finish().await.unwrap();
    let key = WalKey::create(repository.keyring()).unwrap();
    let cluster = builder_options().cluster;
    archive_wal(&repository, cluster, wal_name(), BACKUP_LABEL, &key, Compression::NONE).await.unwrap();
    let mut at = 0;
    for piece in PIECES {
        let range = at..at + piece.len() as u32;
        at = range.end;
        archive_piece(&repository, cluster, growing(), range, piece, &key, Compression::NONE).await.unwrap();
    }
    archive_forms(&repository, cluster, &key).await;
    archive_head(&repository, cluster, &head()).await.unwrap();
    (store, keys)
}

async fn archive_forms(repository: &Repository, cluster: ClusterId, key: &WalKey) {
    let [first, second] = FORMS;
    let name = WalObjectName::Segment(superseded());
    archive_wal(repository, cluster, name, first, key, Compression::NONE).await.unwrap();
    let (replace, second) = (Replace::Anything, second.into());
    supersede_wal(repository, cluster, superseded(), replace, &second, key, Compression::NONE).await.unwrap();
    let place = (cluster, in_parts());
    archive_in_parts(repository, place, &PARTS.into(), PART_BYTES, key, Compression::NONE).await.unwrap();
}

async fn write_example() {
    let (store, keys) = build().await;
    let page = std::fs::read_to_string(PAGE).unwrap();
    let (text, _) = page.split_once("<!-- generated").unwrap_or((&page, ""));
    let mut out = text.trim_end().to_owned();
    out.push_str("\n\n<!-- generated: everything below is written by tests/format -->\n");
    for (name, pem) in
        [("recipient, private", keys.private_pem.as_str()), ("signer, public", keys.verify_pem.as_str())]
    {
        write!(out, "\n```key {name}\n{}\n```\n", pem.trim_end()).unwrap();
    }
    for object in store.list("", None, 1000).await.unwrap() {
        let bytes = store.get(&object.key, u64::MAX).await.unwrap();
        let is_text = bytes.iter().all(|byte| byte.is_ascii_graphic() || matches!(byte, b' ' | b'\n'));
        if is_text {
            write!(
                out,
                "\n```document {}\n{}\n```\n",
                object.key,
                String::from_utf8_lossy(&bytes).trim_end()
            )
            .unwrap();
        } else {
            write!(out, "\n```object {}\n{}```\n", object.key, hex_dump(&bytes)).unwrap();
        }
    }
    std::fs::write(PAGE, out).unwrap();
}

fn hex_dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (n, line) in bytes.chunks(32).enumerate() {
        writeln!(out, "{:04x}  {}", n * 32, hex::encode(line)).unwrap();
    }
    out
}

/// The fenced blocks of the page: what the fence says and what is in it.
fn blocks(page: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut open: Option<(String, String)> = None;
    for line in page.lines() {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(title)) => open = Some((title.to_owned(), String::new())),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some((_, content)), None) => {
                content.push_str(line);
                content.push('\n');
            }
            (None, None) => {}
        }
    }
    blocks
}

fn from_hex_dump(text: &str) -> Vec<u8> {
    text.lines().flat_map(|line| hex::decode(line.split_once("  ").unwrap().1).unwrap()).collect()
}

fn find<'a>(blocks: &'a [(String, String)], title: &str) -> &'a str {
    &blocks.iter().find(|(name, _)| name == title).unwrap_or_else(|| panic!("the page has no {title}")).1
}

async fn read(reader: &FileReader, path: &str) -> Vec<u8> {
    let (_, entry) = reader.basebackup().entry(&TreePath::new(path).unwrap()).await.unwrap().unwrap();
    reader.read(&entry, 0..entry.size()).await.unwrap().to_vec()
}

#[tokio::test]
async fn the_example_of_the_page_decodes() {
    if std::env::var_os("WALDEN_UPDATE_DOCS").is_some() {
        write_example().await;
    }
    let page = std::fs::read_to_string(PAGE).unwrap();
    let blocks = blocks(&page);
    let store = Arc::new(MemoryStore::default());
    let mut packs = Vec::new();
    for (title, content) in &blocks {
        if let Some(key) = title.strip_prefix("document ") {
            store.create(&ObjectKey::parse(key).unwrap(), Bytes::from(content.clone())).await.unwrap();
        }
        if let Some(key) = title.strip_prefix("object ") {
            let bytes = from_hex_dump(content);
            check_header(key, &bytes);
            if key.contains("/packs/") {
                packs.push((key.to_owned(), bytes.clone()));
            }
            store.create(&ObjectKey::parse(key).unwrap(), bytes.into()).await.unwrap();
        }
    }
    let keyring = Keyring::new(KeyringOptions {
        recipients: Vec::new(),
        wal_recipients: Vec::new(),
        signer: None,
        trusted_signers: vec![VerifyKey::from_pem(find(&blocks, "key signer, public")).unwrap()],
        private_keys: vec![RecipientPrivateKey::from_pem(find(&blocks, "key recipient, private")).unwrap()],
        random: Arc::new(SeededRandom::new(2)),
    });
    let repository = Repository::open(site_options(store.clone(), keyring, clock())).await.unwrap();

    let ids = basebackup_ids(&blocks);
    let [first, second] = ids[..] else { panic!("the example has two basebackups, not {ids:?}") };
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, first).await.unwrap()), 1 << 20);
    assert_eq!(read(&reader, "data/PG_VERSION").await, b"15\n");
    assert_eq!(read(&reader, "data/base/5/16384").await, relation());
    let reader = FileReader::new(Arc::new(Basebackup::open(&repository, second).await.unwrap()), 1 << 20);
    assert_eq!(reader.basebackup().record().parent, Some(first));
    assert_eq!(read(&reader, "data/base/5/16384").await, relation());
    assert_eq!(read(&reader, "data/postgresql.conf").await, [b'#'; 80]);
    let named: Vec<_> = reader.basebackup().refs().records().iter().map(|record| record.id.origin).collect();
    assert_eq!(named, [first, second], "the second basebackup names a pack of each");
    assert_eq!(read_wal(&repository, builder_options().cluster, wal_name()).await.unwrap(), BACKUP_LABEL);
    let cluster = builder_options().cluster;
    let read = async |segment| read_wal(&repository, cluster, WalObjectName::Segment(segment)).await.unwrap();
    assert_eq!(read(superseded()).await, FORMS[1]);
    assert_eq!(read(in_parts()).await, PARTS);
    let parts = blocks.iter().filter(|(title, _)| title.ends_with(".part")).count();
    assert_eq!(parts, PARTS.len().div_ceil(PART_BYTES));
    assert_eq!(read_pieces(&repository, cluster, growing()).await.unwrap(), PIECES.concat());
    assert_eq!(newest_head(&repository, cluster, TimelineId::FIRST).await.unwrap(), Some(head()));
    check_refs(&from_hex_dump(find(&blocks, &format!("object main/basebackups/{second}/refs"))), &packs);
}

fn basebackup_ids(blocks: &[(String, String)]) -> Vec<BasebackupId> {
    let ids = blocks.iter().filter_map(|(title, _)| {
        title.strip_prefix("document main/basebackups/")?.strip_suffix("/begin")?.parse().ok()
    });
    ids.collect()
}

/// Magic, kind, version, features and length stand where the page says.
fn check_header(key: &str, bytes: &[u8]) {
    let kind = [("/manifest", 1), ("/refs", 2), ("/packs/", 3), ("/wal/", 4)];
    let kind = kind.iter().find(|(part, _)| key.contains(part)).unwrap().1;
    assert_eq!(&bytes[..6], b"WALDEN", "{key}");
    assert_eq!(bytes[6..8], [kind, 1], "{key}");
    let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let (mut at, mut last, mut features) = (16, 0, 0);
    while at < 16 + length {
        let (tag, len) = (bytes[at], u32::from_le_bytes(bytes[at + 1..at + 5].try_into().unwrap()) as usize);
        assert!(tag > last, "{key}");
        // Sections that came later are announced.
        features |= match tag {
            6 => 1,
            7 => 2,
            _ => 0,
        };
        (at, last) = (at + 5 + len, tag);
    }
    assert_eq!(at, 16 + length, "{key}");
    assert_eq!(u32::from_le_bytes(bytes[8..12].try_into().unwrap()), features, "{key}");
}

/// Records of 90 bytes, with the size, the salt and the digest of the packs on the page.
fn check_refs(bytes: &[u8], packs: &[(String, Vec<u8>)]) {
    let count = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
    assert_eq!(bytes.len(), 20 + 90 * count);
    for record in bytes[20..].chunks(90) {
        let size = u32::from_le_bytes(record[14..18].try_into().unwrap());
        let salt = hex::encode(&record[26..30]);
        let (_, pack) = packs.iter().find(|(key, _)| key.ends_with(&salt)).unwrap();
        assert_eq!(pack.len(), size as usize);
        assert_eq!(walden::codec::Digest::of(pack).as_bytes(), &record[58..90]);
    }
}
