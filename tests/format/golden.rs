//! The golden repository of format 1, read as every later release has to read it.
//!
//! `tests/data/golden-1` was written once, by `golden_writer`, and is never written again: three sites (encrypted and
//! signed, signed alone, neither), every codec, a full basebackup and an incremental one that names its packs, WAL.
//! `expected.txt` says what each object, file and fact has to be; the keys beside it are published.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walden::clock::SystemClock;
use walden::codec::{
    Compression, Digest, RecipientKey, RecipientPrivateKey, SigningKey, SystemRandom, VerifyKey,
};
use walden::repo::entry::{Entry, Node};
use walden::repo::layout::ObjectName;
use walden::repo::wal_object::{newest_head, read_history, read_history_branch, read_wal, read_wal_header};
use walden::repo::{
    Basebackup, BasebackupId, FileReader, Keyring, KeyringOptions, Repository, RepositoryOptions,
};
use walden::storage::{LocalStore, ObjectKey};

use crate::golden_writer;
use crate::support::{Mounted, Need, Run, Scratch, Walden, require};

/// The cluster the samples of WAL are from.
pub const CLUSTER: &str = "7710459600104976879-1";
/// So many files that the expectations have one line for all of them.
pub const MANY: &str = "data/base/6/";

/// One site of the golden repository.
#[derive(Debug, Clone, Copy)]
pub struct GoldenSite {
    pub name: &'static str,
    pub encrypted: bool,
    pub signed: bool,
}

pub const SITES: [GoldenSite; 3] = [
    GoldenSite { name: "sealed", encrypted: true, signed: true },
    GoldenSite { name: "signed", encrypted: false, signed: true },
    GoldenSite { name: "plain", encrypted: false, signed: false },
];

impl GoldenSite {
    /// Of the full basebackup and the incremental one.
    pub fn compressions(self) -> [Compression; 2] {
        match (self.encrypted, self.signed) {
            (true, _) => [Compression::zstd(3), other("lz4")],
            (false, true) => [Compression::NONE, Compression::NONE],
            (false, false) => [other("snappy"), Compression::zstd(1)],
        }
    }

    /// Of segments of WAL; none as it is, nor by snappy, which leaves 50 KB of a MiB of zeros.
    pub fn wal_compressions(self) -> [Compression; 2] {
        match (self.encrypted, self.signed) {
            (true, _) => [Compression::zstd(1), other("lz4")],
            (false, true) => [other("lz4"), Compression::zstd(1)],
            (false, false) => [Compression::zstd(1), Compression::zstd(19)],
        }
    }

    /// What the configuration of its host says; a private key would say that everything is encrypted.
    fn encryption(self) -> String {
        let section = |recipients: &str, keys: &str| {
            format!(
                "[encryption]\nrecipients = [{recipients}]\nsigner = \"test\"\ntrusted_signers = [\"test\"]\n\
                 [encryption.keys.test]\nsigning_key_file = \"test.sign.pem\"\n\
                 verify_key_file = \"test.verify.pem\"\n{keys}"
            )
        };
        let keys = "public_key_file = \"test.pub.pem\"\nprivate_key_file = \"test.pem\"\n";
        match (self.encrypted, self.signed) {
            (true, _) => section("\"test\"", keys),
            (false, true) => section("", ""),
            (false, false) => String::new(),
        }
    }
}

fn other(algorithm: &str) -> Compression {
    serde_json::from_value(serde_json::json!({ "algorithm": algorithm })).unwrap()
}

/// The folder of the golden repository and its keys.
pub fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1")
}

/// Reads a sample of `tests/data`.
pub fn sample(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

/// Makes a segment of a MiB of a sample of its beginning, in the name of the golden cluster.
pub fn segment(name: &str) -> Vec<u8> {
    let mut bytes = sample(name);
    bytes[24..32].copy_from_slice(&sample("wal/15-start")[24..32]);
    bytes.resize(1 << 20, 0);
    bytes
}

/// Makes the keyring of a site's reader, or of its writer.
pub fn keyring(folder: &Path, site: GoldenSite, writes: bool) -> Keyring {
    let pem = |name: &str| fs::read_to_string(folder.join("keys").join(name)).unwrap();
    let recipients = || {
        let pem = (site.encrypted && writes).then(|| pem("test.pub.pem"));
        pem.iter().map(|pem| RecipientKey::from_pem(pem).unwrap()).collect()
    };
    let verify = || VerifyKey::from_pem(&pem("test.verify.pem")).unwrap();
    let private = || RecipientPrivateKey::from_pem(&pem("test.pem")).unwrap();
    Keyring::new(KeyringOptions {
        recipients: recipients(),
        wal_recipients: recipients(),
        signer: (site.signed && writes).then(|| SigningKey::from_pem(&pem("test.sign.pem")).unwrap()),
        trusted_signers: site.signed.then(verify).into_iter().collect(),
        private_keys: site.encrypted.then(private).into_iter().collect(),
        random: Arc::new(SystemRandom),
    })
}

/// Says everything the golden repository holds, as it is read, one fact a line.
pub async fn describe(folder: &Path, repository: &Path) -> String {
    let mut out = String::new();
    let store = Arc::new(LocalStore::open(repository, &SystemClock).unwrap());
    for site in SITES {
        let options = RepositoryOptions {
            store: store.clone(),
            site: ObjectKey::parse(site.name).unwrap(),
            keyring: keyring(folder, site, false),
            clock: Arc::new(SystemClock),
        };
        let repository = Repository::open(options).await.unwrap();
        writeln!(out, "site {} {}", site.name, repository.site()).unwrap();
        for object in repository.store().list(site.name, None, 1000).await.unwrap() {
            let bytes = repository.store().get(&object.key, u64::MAX).await.unwrap();
            writeln!(out, "object {} {} {}", object.key, bytes.len(), Digest::of(&bytes)).unwrap();
            match repository.layout().parse(&object.key) {
                Some(ObjectName::Outcome(id)) => describe_basebackup(&mut out, &repository, id).await,
                Some(name @ (ObjectName::Wal(..) | ObjectName::History(..))) => {
                    describe_wal(&mut out, &repository, name).await;
                }
                Some(ObjectName::Head(cluster, timeline, _)) => {
                    let head = newest_head(&repository, cluster, timeline).await.unwrap().unwrap();
                    writeln!(out, "head {cluster} {timeline} {} {}", head.end, head.written_at).unwrap();
                }
                Some(_) => {}
                // Leases and pins are nothing that anybody reads by its name.
                None => assert!(
                    object.key.as_str().contains("/leases/") || object.key.as_str().contains("/pins/")
                ),
            }
        }
    }
    out
}

async fn describe_basebackup(out: &mut String, repository: &Repository, id: BasebackupId) {
    let basebackup = Arc::new(Basebackup::open(repository, id).await.unwrap());
    let (record, start) = (basebackup.record(), basebackup.start());
    writeln!(
        out,
        "basebackup {id} parent {:?} cluster {} timeline {} {} to {} of {} files, {} bytes, {} stored, {} live",
        record.parent.map(|id| id.to_string()),
        record.cluster,
        record.timeline,
        record.start_lsn,
        record.stop_lsn,
        record.size.files,
        record.size.database_bytes,
        record.size.stored_bytes,
        record.size.live_bytes
    )
    .unwrap();
    writeln!(out, "{id} server {} of {}", record.server.version, record.server.superuser).unwrap();
    for tablespace in &start.tablespaces {
        let location = tablespace.location.escape_ascii();
        writeln!(out, "{id} tablespace {} {} \"{location}\"", tablespace.oid, tablespace.name).unwrap();
    }
    for link in &start.links {
        writeln!(out, "{id} link out {} \"{}\"", link.path, link.target.escape_ascii()).unwrap();
    }
    for pack in basebackup.refs().records() {
        writeln!(out, "{id} names pack {} of {}, {} bytes", pack.id.number, pack.id.origin, pack.size)
            .unwrap();
    }
    let reader = FileReader::new(basebackup.clone(), 16 << 20);
    let (mut many, mut count) = (String::new(), 0);
    for n in 0..basebackup.block_count() {
        for entry in basebackup.block(n).await.unwrap().iter() {
            if entry.path.as_bytes().starts_with(MANY.as_bytes()) {
                many.push_str(&describe_entry(&reader, id, entry).await);
                count += 1;
            } else {
                out.push_str(&describe_entry(&reader, id, entry).await);
            }
        }
    }
    writeln!(out, "{id} {MANY} {count} files {}", Digest::of(many.as_bytes())).unwrap();
}

async fn describe_entry(reader: &FileReader, id: BasebackupId, entry: &Entry) -> String {
    let place = format!("{id} {} {:o} {}", entry.path.as_bytes().escape_ascii(), entry.mode, entry.modified);
    match &entry.node {
        Node::Directory => format!("{place} directory\n"),
        Node::Symlink(target) => format!("{place} link \"{}\"\n", target.escape_ascii()),
        Node::File { size, .. } => {
            let bytes = reader.read(entry, 0..*size).await.unwrap();
            assert_eq!(bytes.len() as u64, *size);
            format!("{place} file {size} {}\n", Digest::of(&bytes))
        }
    }
}

async fn describe_wal(out: &mut String, repository: &Repository, name: ObjectName) {
    match name {
        ObjectName::Wal(cluster, name) => {
            let bytes = read_wal(repository, cluster, name).await.unwrap();
            let header = read_wal_header(repository, cluster, name).await.unwrap();
            assert_eq!(header.raw_size, bytes.len() as u64);
            writeln!(out, "WAL {cluster} {name:?} {} {}", bytes.len(), Digest::of(&bytes)).unwrap();
        }
        ObjectName::History(cluster, timeline) => {
            let bytes = read_history(repository, cluster, timeline).await.unwrap();
            let branch = read_history_branch(repository, cluster, timeline).await.unwrap();
            let digest = Digest::of(&bytes);
            let (parent, switch) = (branch.parent, branch.switch);
            let len = bytes.len();
            writeln!(out, "history {cluster} {timeline} {len} {digest} parent {parent} at {switch}").unwrap();
        }
        _ => unreachable!("only WAL is asked for"),
    }
}

#[tokio::test]
async fn the_golden_repository_reads_as_it_was_written() {
    if std::env::var_os("WALDEN_WRITE_GOLDEN").is_some() {
        golden_writer::write(&golden()).await;
    }
    let expected = fs::read_to_string(golden().join("expected.txt")).unwrap();
    let read = describe(&golden(), &golden().join("repository")).await;
    assert_same_lines(&read, &expected);
}

#[track_caller]
pub fn assert_same_lines(read: &str, expected: &str) {
    for (n, (read, expected)) in read.lines().zip(expected.lines()).enumerate() {
        assert_eq!(read, expected, "line {}", n + 1);
    }
    assert_eq!(read.lines().count(), expected.lines().count());
}

fn walden(scratch: &Scratch, site: GoldenSite) -> Walden {
    walden_of(scratch, &golden().join("repository"), site)
}

/// Walden with a copy of a golden repository, which commands may write leases into.
pub fn walden_of(scratch: &Scratch, repository: &Path, site: GoldenSite) -> Walden {
    let walden = Walden::new(scratch);
    for folder in ["state", "run", "clones"] {
        scratch.folder(&format!("walden/{folder}"));
    }
    copy(scratch, repository, "walden/repository");
    for key in ["test.pem", "test.pub.pem", "test.sign.pem", "test.verify.pem"] {
        scratch.file(&format!("walden/{key}"), &fs::read_to_string(golden().join("keys").join(key)).unwrap());
    }
    let folder = walden.repository().with_file_name("");
    let folder = folder.to_str().unwrap().trim_end_matches('/');
    scratch.file(
        "walden/walden.toml",
        &format!(
            "[paths]\nstate = \"{folder}/state\"\nrun = \"{folder}/run\"\nclones = \"{folder}/clones\"\n\
             [storage]\nurl = \"file://{folder}/repository\"\n{}\
             [sites.{}]\nconnection = \"host=/nonexistent\"\n",
            site.encryption(),
            site.name
        ),
    );
    walden
}

fn copy(scratch: &Scratch, from: &Path, to: &str) {
    let folder = scratch.folder(to);
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            copy(scratch, &entry.path(), &format!("{to}/{name}"));
        } else {
            let file = folder.join(name);
            fs::write(&file, fs::read(entry.path()).unwrap()).unwrap();
            scratch.account().own(&file);
        }
    }
}

/// The ids of a site's basebackups, the full one first.
fn basebackups(expected: &str, site: GoldenSite) -> Vec<&str> {
    let start = expected.find(&format!("site {} ", site.name)).unwrap();
    let part = &expected[start + 1..];
    let part = &part[..part.find("\nsite ").unwrap_or(part.len())];
    let ids: Vec<_> =
        part.lines().filter_map(|line| line.strip_prefix("basebackup ")?.split(' ').next()).collect();
    assert_eq!(ids.len(), 2);
    ids
}

#[test]
fn the_commands_read_the_golden_repository() {
    let expected = fs::read_to_string(golden().join("expected.txt")).unwrap();
    for site in SITES {
        let scratch = Scratch::new();
        let walden = walden(&scratch, site);
        let ids = basebackups(&expected, site);
        let list = walden.run(&["list"]).stdout;
        assert!(ids.iter().all(|id| list.contains(id)), "{list}");
        let shown = walden.run(&["show", ids[1], "--files"]).stdout;
        assert!(shown.contains("16391") && !shown.contains("5/empty"), "{shown}");
        let wal = walden.run(&["wal", "list"]).stdout;
        assert!(
            wal.contains("000000010000000000000009") && wal.contains(CLUSTER.trim_end_matches("-1")),
            "{wal}"
        );
        assert_fetched(&scratch, &walden, "000000010000000000000009", &segment("wal/15-start"));
        let history = b"1\t0/D00000\tno recovery target specified\n";
        assert_fetched(&scratch, &walden, "00000002.history", history);
    }
}

/// Fetches as a standby of the cluster would.
pub fn assert_fetched(scratch: &Scratch, walden: &Walden, name: &str, content: &[u8]) {
    let data = scratch.folder("data");
    for folder in ["data/global", "data/pg_wal"] {
        scratch.folder(folder);
    }
    let control = data.join("global/pg_control");
    fs::write(&control, sample("pg_control/15")).unwrap();
    scratch.account().own(&control);
    scratch.file("data/standby.signal", "");
    let mut command = walden.command();
    command.args(["wal", "fetch", name, "pg_wal/RECOVERYXLOG"]).current_dir(&data);
    Run::of(&mut command, "").expect_success();
    assert!(fs::read(data.join("pg_wal/RECOVERYXLOG")).unwrap() == content, "{name} came as something else");
}

#[test]
fn a_mount_shows_the_golden_repository() {
    require!(Need::Fuse);
    let expected = fs::read_to_string(golden().join("expected.txt")).unwrap();
    for site in SITES {
        let scratch = Scratch::new();
        let walden = walden(&scratch, site).as_root();
        let mounted = walden.mount(&scratch.folder("mnt"));
        for id in basebackups(&expected, site) {
            let files = expected_files(&expected, id);
            assert!(files.len() > 12, "{files:?}");
            assert_shown(&mounted, id, &files);
        }
    }
}

/// What is expected of the files of a basebackup that a mount shows as they are: escaped path and digest.
fn expected_files<'a>(expected: &'a str, id: &str) -> BTreeMap<&'a str, &'a str> {
    let of_file = |line: &'a str| {
        let (place, digest) = line.strip_prefix(id)?.strip_prefix(' ')?.rsplit_once(' ')?;
        let (place, _) = place.split_once(" file ")?;
        let path = place.rsplitn(3, ' ').nth(2)?;
        (!path.starts_with("config/")).then_some((path, digest))
    };
    expected.lines().filter_map(of_file).collect()
}

fn assert_shown(mounted: &Mounted, id: &str, expected: &BTreeMap<&str, &str>) {
    let mut shown = BTreeMap::new();
    for root in ["data", "tablespaces"] {
        read_below(&mounted.path().join("basebackups").join(id), root, &mut shown);
    }
    for (path, digest) in expected {
        assert_eq!(shown.get(*path).map(String::as_str), Some(*digest), "{id} {path}");
    }
    assert_eq!(shown.len(), expected.len(), "{shown:?}");
}

fn read_below(top: &Path, path: &str, shown: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(top.join(path)).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{path}/{}", entry.file_name().into_string().unwrap());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            read_below(top, &path, shown);
        } else if kind.is_file() && !path.starts_with(MANY) {
            let read = fs::read(top.join(&path)).unwrap_or_else(|error| panic!("{path}: {error}"));
            let digest = Digest::of(&read);
            shown.insert(path.as_bytes().escape_ascii().to_string(), digest.to_string());
        }
    }
}
