//! Writes the golden repository: once for each version of the format, never again for the same one.
//!
//! `WALDEN_WRITE_GOLDEN=1` lets the test call this; a repository that is there is never written over. What is
//! compared for ever is checked here against what was put in, so that the expectations are not just what a
//! reader happened to say.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use walden::clock::{ManualClock, SystemClock};
use walden::codec::{Compression, Digest, NewKeys, create_keys};
use walden::pg::{Lsn, TimelineId};
use walden::repo::builder::{BasebackupBuilder, BuilderOptions};
use walden::repo::documents::ServerRecord;
use walden::repo::entry::TreePath;
use walden::repo::layout::WalObjectName;
use walden::repo::lease::{Lease, Pin};
use walden::repo::manifest::{OutsideLink, Tablespace};
use walden::repo::wal_object::{HistoryBranch, WalKey, archive_history, archive_wal};
use walden::repo::{Basebackup, BasebackupId, Repository, RepositoryOptions};
use walden::storage::{LocalStore, ObjectKey};

use crate::golden::{CLUSTER, GoldenSite, MANY, SITES, describe, keyring, sample, segment};

const PAGE: usize = 8192;
/// A file of two map blocks: 16384 pages and some.
const LARGE_PAGES: usize = 16_500;
/// Where it has pages that are not zero: at both ends of chunks and of blocks.
const PLACES: [usize; 6] = [0, 7, 8, 16_383, 16_384, LARGE_PAGES - 1];
const STARTED: &str = "2026-11-20T10:15:00Z";

/// Files of one basebackup, and what is said of each in the expectations.
struct Content {
    files: Vec<(String, Vec<u8>)>,
}

/// Writes keys, repository and expectations into `folder`.
pub async fn write(folder: &Path) {
    let repository = folder.join("repository");
    assert!(!repository.exists(), "the golden repository is written once");
    fs::create_dir_all(folder.join("keys")).unwrap();
    fs::create_dir_all(&repository).unwrap();
    let keys = create_keys(3072).unwrap();
    write_keys(folder, &keys);
    let mut put_in = Vec::new();
    for site in SITES {
        put_in.extend(write_site(folder, site).await);
    }
    let expected = describe(folder, &repository).await;
    for fact in put_in {
        assert!(expected.contains(&fact), "{fact:?} is not what is read back");
    }
    fs::write(folder.join("expected.txt"), expected).unwrap();
    let _ = fs::remove_dir_all(repository.join(".staging"));
}

fn write_keys(folder: &Path, keys: &NewKeys) {
    for (name, pem) in [
        ("test.pem", keys.private_pem.as_str()),
        ("test.pub.pem", &keys.public_pem),
        ("test.sign.pem", keys.sign_pem.as_str()),
        ("test.verify.pem", &keys.verify_pem),
    ] {
        fs::write(folder.join("keys").join(name), pem).unwrap();
    }
}

async fn write_site(folder: &Path, site: GoldenSite) -> Vec<String> {
    let store = Arc::new(LocalStore::open(&folder.join("repository"), &SystemClock).unwrap());
    let options = RepositoryOptions {
        store,
        site: ObjectKey::parse(site.name).unwrap(),
        keyring: keyring(folder, site, true),
        clock: Arc::new(ManualClock::new(STARTED.parse().unwrap())),
    };
    let (repository, _) = Repository::open_or_create(options).await.unwrap();
    let [full, incremental] = site.compressions();
    let first = Content::full(site);
    let first_id = first.write(&repository, builder_options(full), None).await;
    let parent = Arc::new(Basebackup::open(&repository, first_id).await.unwrap());
    let second = first.changed();
    let second_id = second.write(&repository, builder_options(incremental), Some(parent)).await;
    // An attempt that came to nothing.
    BasebackupBuilder::begin(&repository, builder_options(full), None).await.unwrap();
    hold(&repository, first_id, second_id).await;
    let mut facts = write_wal(&repository, site).await;
    for (id, content) in [(first_id, &first), (second_id, &second)] {
        let kept = content.files.iter().filter(|(path, _)| !path.starts_with(MANY));
        facts.extend(kept.map(|(path, bytes)| {
            format!(
                "{id} {} 600 {STARTED} file {} {}\n",
                path.as_bytes().escape_ascii(),
                bytes.len(),
                Digest::of(bytes)
            )
        }));
    }
    facts
}

/// A lease that goes on, one that ended, a pin that holds and one that does not.
async fn hold(repository: &Repository, first: BasebackupId, second: BasebackupId) {
    let mut lease = Lease::create(repository, second).await.unwrap().unwrap();
    lease.renew().await.unwrap();
    Lease::create(repository, first).await.unwrap().unwrap().end().await.unwrap();
    Pin::create(repository, first, "clone \"golden\"").await.unwrap();
    Pin::create(repository, second, "clone \"gone\"").await.unwrap().end(repository).await.unwrap();
}

async fn write_wal(repository: &Repository, site: GoldenSite) -> Vec<String> {
    let cluster = CLUSTER.parse().unwrap();
    let key = WalKey::create(repository.keyring()).unwrap();
    let [first, second] = site.wal_compressions();
    let whole = |name: &str| WalObjectName::Segment(name.parse().unwrap());
    let partial = segment("wal/15-border-0D00000");
    let backup = b"START WAL LOCATION: 0/900028 (file 000000010000000000000009)\n".to_vec();
    let objects = [
        (whole("000000010000000000000009"), segment("wal/15-start"), first),
        (whole("00000001000000000000000E"), segment("wal/15-border-0E00000"), second),
        (
            WalObjectName::Partial {
                segment: "00000001000000000000000D".parse().unwrap(),
                digest: Digest::of(&partial).as_bytes()[..4].try_into().unwrap(),
            },
            partial,
            first,
        ),
        (
            WalObjectName::BackupHistory {
                segment: "000000010000000000000009".parse().unwrap(),
                offset: 0x28,
            },
            backup,
            Compression::NONE,
        ),
    ];
    let mut facts = Vec::new();
    for (name, raw, compression) in objects {
        archive_wal(repository, cluster, name, &raw, &key, compression).await.unwrap();
        facts.push(format!(" {} {}\n", raw.len(), Digest::of(&raw)));
    }
    let histories = [
        (2, 1, 0xD0_0000, "1\t0/D00000\tno recovery target specified\n"),
        (3, 2, 0xE0_0000, "1\t0/D00000\tno recovery target specified\n\n2\t0/E00000\tbefore 2026-11-20\n"),
    ];
    for (timeline, parent, switch, text) in histories {
        let branch = HistoryBranch { parent: TimelineId::new(parent).unwrap(), switch: Lsn(switch) };
        let timeline = TimelineId::new(timeline).unwrap();
        archive_history(repository, cluster, timeline, branch, text.as_bytes(), &key).await.unwrap();
        facts.push(format!(
            " {} {} parent {parent} at {}\n",
            text.len(),
            Digest::of(text.as_bytes()),
            Lsn(switch)
        ));
    }
    facts
}

fn builder_options(compression: Compression) -> BuilderOptions {
    BuilderOptions {
        cluster: CLUSTER.parse().unwrap(),
        timeline: TimelineId::FIRST,
        lsns: (Lsn(0x90_0028), Lsn(0x90_0100)),
        time: STARTED.parse().unwrap(),
        compression,
        server: ServerRecord {
            version: "15.18".to_owned(),
            major: 15,
            block_size: PAGE as u32,
            superuser: "postgres".to_owned(),
            ..ServerRecord::default()
        },
    }
}

/// Pages that compress a little, the same ones for the same seed.
fn pages(seed: u32, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut bytes = vec![0; count * PAGE];
    for line in bytes.chunks_mut(256) {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        line[..4].copy_from_slice(&state.to_le_bytes());
        line[4..40].fill((state >> 24) as u8);
    }
    bytes
}

impl Content {
    fn full(site: GoldenSite) -> Self {
        let mut large = vec![0; LARGE_PAGES * PAGE];
        // What is stored as it is had better be little.
        let stored_whole = site.compressions()[0] == Compression::NONE;
        let (relation, places) = if stored_whole { (2, &[7, 16_384][..]) } else { (9, &PLACES[..]) };
        for &at in places {
            large[at * PAGE..][..PAGE].copy_from_slice(&pages(at as u32 + 100, 1));
        }
        let mut short = pages(3, 2);
        short.truncate(PAGE + 100);
        let named = [
            ("data/PG_VERSION", b"15\n".to_vec()),
            ("data/backup_label", sample_label()),
            ("data/base/5/16384", [vec![0; PAGE], pages(1, relation)].concat()),
            ("data/base/5/16385", large),
            ("data/base/5/16386", vec![0; 4 * PAGE]),
            ("data/base/5/16387", short),
            ("data/base/5/empty", Vec::new()),
            ("data/global/pg_control", [sample("pg_control/15"), vec![0; PAGE - 512]].concat()),
            ("data/odd/ leading, trailing ", b"spaces".to_vec()),
            ("data/odd/line\nbreak\ttab", b"line".to_vec()),
            ("data/odd/quotes\"'\\`$(true)", b"quotes".to_vec()),
            ("data/odd/\u{e4}\u{1f418}", b"not ASCII".to_vec()),
            ("data/postgresql.conf", "# made up\nport = 5432\n".repeat(100).into_bytes()),
            ("config/pg_hba.conf", b"local all all trust\n".repeat(10)),
            ("tablespaces/16400/PG_15_202209061/5/16390", pages(5, 3)),
        ];
        let mut files: Vec<_> = named.into_iter().map(|(path, bytes)| (path.to_owned(), bytes)).collect();
        files.push((format!("data/odd/{}", "n".repeat(255)), b"the longest name".to_vec()));
        if site.encrypted {
            // More entries than one block of the file table has.
            files.extend((0..1100).map(|n| (format!("{MANY}{n}"), n.to_string().into_bytes())));
        }
        Self { files }
    }

    /// What an hour later there is: some pages others, a file longer, one shorter, one gone, one new.
    fn changed(&self) -> Self {
        let mut files = self.files.clone();
        files.retain(|(path, _)| path != "data/base/5/empty");
        for (path, bytes) in &mut files {
            match path.as_str() {
                "data/base/5/16384" => {
                    bytes[2 * PAGE..3 * PAGE].copy_from_slice(&pages(11, 1));
                    bytes.extend(pages(12, 1));
                }
                "data/base/5/16385" => bytes[16_400 * PAGE..16_401 * PAGE].copy_from_slice(&pages(13, 1)),
                "tablespaces/16400/PG_15_202209061/5/16390" => bytes.truncate(2 * PAGE),
                _ => {}
            }
        }
        files.push(("data/base/5/16391".to_owned(), pages(14, 2)));
        Self { files }
    }

    async fn write(
        &self,
        repository: &Repository,
        options: BuilderOptions,
        parent: Option<Arc<Basebackup>>,
    ) -> BasebackupId {
        let mut builder = BasebackupBuilder::begin(repository, options, parent).await.unwrap();
        for path in [
            "config",
            "data",
            "data/base",
            "data/base/5",
            "data/base/6",
            "data/global",
            "data/odd",
            "data/pg_notify",
            "data/pg_tblspc",
            "tablespaces",
            "tablespaces/16400",
            "tablespaces/16400/PG_15_202209061",
            "tablespaces/16400/PG_15_202209061/5",
        ] {
            builder.directory(path);
        }
        builder.symlink("data/odd/link", "../base/5/16384").symlink("data/odd/nowhere", "/nonexistent\n");
        let location = b"/srv/tablespace one".to_vec();
        builder.tablespace(Tablespace { oid: 16400, location, name: "one".to_owned() });
        let path = TreePath::new("data/log").unwrap();
        builder.outside_link(OutsideLink { path, target: b"/var/log/postgresql".to_vec() });
        for (path, bytes) in &self.files {
            builder.file(path, bytes).await.unwrap();
        }
        builder.finish().await.unwrap().id
    }
}

fn sample_label() -> Vec<u8> {
    b"START WAL LOCATION: 0/900028 (file 000000010000000000000009)\nCHECKPOINT LOCATION: 0/900060\n\
      BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-20 10:15:00 UTC\nLABEL: golden\n\
      START TIMELINE: 1\n"
        .to_vec()
}
