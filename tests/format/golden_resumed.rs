//! A basebackup that went on with a killed one, which is a parent without outcome: read as every later release has to.
//!
//! `tests/data/golden-1-resumed` holds the three sites of `golden-1`, with its keys: of the killed attempt there are
//! `begin` and a pack, which no `refs` of its own lists; the one behind it names that pack and has one of its own. It
//! was written once, with `WALDEN_WRITE_GOLDEN=1`, and a repository that is there is never written over.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use walden::clock::{ManualClock, SystemClock};
use walden::codec::{Compression, Compressor, Digest};
use walden::pg::{Lsn, TimelineId};
use walden::repo::builder::{BasebackupBuilder, BuilderOptions};
use walden::repo::documents::ServerRecord;
use walden::repo::entry::{BlobRef, Content, Entry, Node, TreePath};
use walden::repo::manifest::ManifestContent;
use walden::repo::{
    Basebackup, BasebackupId, BasebackupWriter, BeginOptions, Completion, CompressedFrame, FrameKind,
    NamedChunks, ParentBasebackup, Repository, RepositoryOptions,
};
use walden::storage::{LocalStore, ObjectKey};

use crate::golden::{CLUSTER, GoldenSite, SITES, assert_same_lines, describe, golden, keyring, walden_of};
use crate::support::Scratch;

const PAGE: usize = 8192;
const STARTED: &str = "2026-11-22T10:15:00Z";
const LSNS: (Lsn, Lsn) = (Lsn(0x90_0028), Lsn(0x90_0100));
/// The file that came with the killed attempt, and the one that came behind it.
const BEFORE: &str = "data/base/5/16384";
const BEHIND: &str = "data/base/5/16385";

fn resumed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1-resumed")
}

/// Two pages and one of zeros between them: so few that their map stands in the file table.
fn before() -> Vec<u8> {
    let page = |line: &str| line.repeat(PAGE / line.len());
    let pages = [page("of the killed one\n"), "\0".repeat(PAGE), page("and more of it...\n")];
    pages.iter().flat_map(|text| text.bytes().chain([b'\n'; PAGE]).take(PAGE)).collect()
}

fn behind() -> Vec<u8> {
    b"of the one that went on with it\n".repeat(100)
}

async fn open(folder: &Path, site: GoldenSite) -> Repository {
    let options = RepositoryOptions {
        store: Arc::new(LocalStore::open(folder, &SystemClock).unwrap()),
        site: ObjectKey::parse(site.name).unwrap(),
        keyring: keyring(&golden(), site, true),
        clock: Arc::new(ManualClock::new(STARTED.parse().unwrap())),
    };
    Repository::open_or_create(options).await.unwrap().0
}

/// Writes an attempt that stored a pack and was killed; returns what its journal would say, and its files.
async fn killed(
    folder: &Path,
    repository: &Repository,
    compression: Compression,
) -> (ParentBasebackup, Vec<Entry>) {
    let options = BuilderOptions {
        cluster: CLUSTER.parse().unwrap(),
        timeline: TimelineId::FIRST,
        lsns: LSNS,
        time: STARTED.parse().unwrap(),
        compression,
        server: ServerRecord { version: "15.18".to_owned(), major: 15, ..ServerRecord::default() },
    };
    let mut builder = BasebackupBuilder::begin(repository, options, None).await.unwrap();
    for directory in ["data", "data/base", "data/base/5"] {
        builder.directory(directory);
    }
    builder.file("data/PG_VERSION", b"15\n").await.unwrap();
    builder.file(BEFORE, &before()).await.unwrap();
    let id = builder.finish().await.unwrap().id;
    let basebackup = Basebackup::open(repository, id).await.unwrap();
    let mut entries = Vec::new();
    for n in 0..basebackup.block_count() {
        entries.extend(basebackup.block(n).await.unwrap().iter().cloned());
    }
    let layout = repository.layout();
    for object in [layout.outcome(id), layout.manifest(id), layout.refs(id)] {
        fs::remove_file(folder.join(object.as_str())).unwrap();
    }
    let (record, refs) = (basebackup.record().clone(), basebackup.refs().clone());
    (ParentBasebackup { record, digest: None, refs }, entries)
}

/// Goes on with it: its pack is named, and one more is stored.
async fn go_on(
    repository: &Repository,
    (parent, mut entries): (ParentBasebackup, Vec<Entry>),
    compression: Compression,
) -> BasebackupId {
    let mut record = parent.record.clone();
    let begin = BeginOptions {
        cluster: record.cluster,
        timeline: record.timeline,
        wal_floor: LSNS.0,
        parent: Some(Arc::new(parent)),
        host: "golden".to_owned(),
        pid: 1,
    };
    let writer = BasebackupWriter::begin(repository, begin).await.unwrap();
    let (raw, mut pack) = (behind(), writer.create_pack());
    let frame = CompressedFrame::compress(&mut Compressor::new(compression), &raw).unwrap();
    let chunk = pack.append(FrameKind::Data, frame);
    writer.upload(pack.finish()).await.unwrap();
    let content = Content::Part(BlobRef { chunk, at: 0, len: raw.len() as u32 });
    entries.push(Entry {
        path: TreePath::new(BEHIND).unwrap(),
        mode: 0o600,
        modified: STARTED.parse().unwrap(),
        node: Node::File { size: raw.len() as u64, content },
    });
    record.size.files += 1;
    record.size.database_bytes += raw.len() as u64;
    let content = ManifestContent { entries, ..ManifestContent::default() };
    let named = NamedChunks::default();
    writer.finish(Completion { record, content, named, compression }).await.unwrap().id
}

/// Writes the repository and the expectations, of which those that matter are known before anything is read.
async fn write() {
    let folder = resumed().join("repository");
    assert!(!folder.exists(), "the golden repository is written once");
    fs::create_dir_all(&folder).unwrap();
    let mut facts = Vec::new();
    for site in SITES {
        let repository = open(&folder, site).await;
        let [first, second] = site.compressions();
        let killed = killed(&folder, &repository, first).await;
        let dead = killed.0.record.id;
        let id = go_on(&repository, killed, second).await;
        facts.push(format!("basebackup {id} parent {:?} ", Some(dead.to_string())));
        facts.extend([dead, id].map(|origin| format!("{id} names pack 0 of {origin}, ")));
        for (path, bytes) in [(BEFORE, before()), (BEHIND, behind())] {
            let digest = Digest::of(&bytes);
            facts.push(format!("{id} {path} 600 {STARTED} file {} {digest}\n", bytes.len()));
        }
    }
    fs::remove_dir_all(folder.join(".staging")).ok();
    let expected = describe(&golden(), &folder).await;
    for fact in facts {
        assert!(expected.contains(&fact), "{fact:?} is not what is read back");
    }
    fs::write(resumed().join("expected.txt"), expected).unwrap();
}

#[tokio::test]
async fn the_golden_repository_of_a_resumed_basebackup_reads_as_it_was_written() {
    if std::env::var_os("WALDEN_WRITE_GOLDEN").is_some() {
        write().await;
    }
    let expected = fs::read_to_string(resumed().join("expected.txt")).unwrap();
    assert_same_lines(&describe(&golden(), &resumed().join("repository")).await, &expected);
}

/// One is listed and one came to nothing; who reads documents finds no digest where there is no outcome.
#[test]
fn the_commands_read_the_golden_repository_of_a_resumed_basebackup() {
    for site in SITES {
        let scratch = Scratch::new();
        let walden = walden_of(&scratch, &resumed().join("repository"), site);
        let listed = walden.json(&["list"]);
        let [row] = &listed["basebackups"].as_array().unwrap()[..] else { panic!("{listed:#}") };
        let [dead] = &listed["unfinished"].as_array().unwrap()[..] else { panic!("{listed:#}") };
        let (id, dead) = (row["id"].as_str().unwrap(), dead.as_str().unwrap());
        let folder = resumed().join("repository").join(site.name).join("basebackups");
        let begin = fs::read_dir(folder.join(dead)).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = begin.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["begin", "packs"], "a killed attempt has nothing else");
        let text = fs::read_to_string(folder.join(id).join("backup.json")).unwrap();
        // Where it is signed, a line behind the document says by whom.
        let document: Value = serde_json::Deserializer::from_str(&text).into_iter().next().unwrap().unwrap();
        assert_eq!((document["parent"].as_str(), &document["parent_digest"]), (Some(dead), &Value::Null));
        let shown = walden.run(&["show", id, "--files"]).stdout;
        assert!(shown.contains("16384") && shown.contains("16385"), "{shown}");
    }
}
