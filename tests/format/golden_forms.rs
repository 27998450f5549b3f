//! Forms of WAL that came into format 1 after its golden repository was written, read as every later release has to.
//!
//! `tests/data/golden-1-forms` holds the same three sites, with the keys of `golden-1`: segments that others have taken
//! the place of, segments in parts, pieces, a head. It was written once, with `WALDEN_WRITE_GOLDEN=1`, and a repository
//! that is there is never written over. Parts are smaller than any archiver makes them, which readers do not mind.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walden::clock::{ManualClock, SystemClock};
use walden::codec::{Compression, Digest};
use walden::pg::{Lsn, TimelineId, WalSegmentName};
use walden::repo::layout::WalObjectName;
use walden::repo::wal_object::{
    ArchiveHead, Replace, WalKey, archive_head, archive_in_parts, archive_piece, archive_wal, newest_wal,
    supersede_wal,
};
use walden::repo::{ClusterId, Repository, RepositoryOptions};
use walden::storage::{LocalStore, ObjectKey};

use crate::golden::{CLUSTER, GoldenSite, SITES, assert_same_lines, describe, golden, keyring, segment};
use crate::golden::{assert_fetched, walden_of};
use crate::support::Scratch;

const STARTED: &str = "2026-11-21T10:15:00Z";
/// A part of a segment of a MiB.
const PART_BYTES: usize = 300_000;
/// Segments by the last digits of their names, and the sample whose content readers get.
const NEWEST: [(u32, &str); 5] = [
    (9, "wal/15-border-0E00000"),
    (0xA, "wal/15-border-0D00000"),
    (0xB, "wal/15-start"),
    (0xC, "wal/15-start"),
    (0xD, "wal/15-border-0D00000"),
];
const PIECES: [std::ops::Range<u32>; 3] = [0..5000, 5000..9000, 7000..12_000];

struct Writer {
    folder: PathBuf,
    repository: Repository,
    cluster: ClusterId,
    key: WalKey,
    compressions: [Compression; 2],
}

fn forms() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden-1-forms")
}

fn named(number: u32) -> WalSegmentName {
    format!("0000000100000000{number:08X}").parse().unwrap()
}

impl Writer {
    async fn open(folder: &Path, site: GoldenSite) -> Self {
        let store = Arc::new(LocalStore::open(folder, &SystemClock).unwrap());
        let options = RepositoryOptions {
            store,
            site: ObjectKey::parse(site.name).unwrap(),
            keyring: keyring(&golden(), site, true),
            clock: Arc::new(ManualClock::new(STARTED.parse().unwrap())),
        };
        let (repository, _) = Repository::open_or_create(options).await.unwrap();
        let key = WalKey::create(repository.keyring()).unwrap();
        let (folder, cluster) = (folder.to_owned(), CLUSTER.parse().unwrap());
        Self { folder, repository, cluster, key, compressions: site.wal_compressions() }
    }

    async fn push(&self, number: u32, sample: &str) {
        let (name, raw) = (WalObjectName::Segment(named(number)), segment(sample));
        archive_wal(&self.repository, self.cluster, name, &raw, &self.key, self.compressions[0])
            .await
            .unwrap();
    }

    async fn force(&self, number: u32, sample: &str) {
        let raw = segment(sample).into();
        let (repository, key, replace) = (&self.repository, &self.key, Replace::Anything);
        supersede_wal(repository, self.cluster, named(number), replace, &raw, key, self.compressions[1])
            .await
            .unwrap();
    }

    async fn push_in_parts(&self, number: u32, sample: &str) {
        let (place, raw) = ((self.cluster, named(number)), segment(sample).into());
        archive_in_parts(&self.repository, place, &raw, PART_BYTES, &self.key, self.compressions[0])
            .await
            .unwrap();
    }

    fn path(&self, name: WalObjectName) -> PathBuf {
        self.folder.join(self.repository.layout().wal_object(self.cluster, name).as_str())
    }

    async fn newest(&self, number: u32) -> PathBuf {
        self.path(newest_wal(&self.repository, self.cluster, named(number)).await.unwrap())
    }

    async fn write(&self) {
        let [start, first, second] = ["wal/15-start", "wal/15-border-0D00000", "wal/15-border-0E00000"];
        // One after the other.
        self.push(9, start).await;
        self.force(9, first).await;
        self.force(9, second).await;
        // Two at once, and a third that ends that.
        self.push(0xA, first).await;
        self.force(0xA, start).await;
        let one = self.newest(0xA).await;
        let aside = self.folder.join("aside");
        fs::rename(&one, &aside).unwrap();
        self.force(0xA, second).await;
        fs::rename(&aside, &one).unwrap();
        self.force(0xA, first).await;
        // The body of what was replaced is cut.
        self.push(0xB, start).await;
        let standing = self.path(WalObjectName::Segment(named(0xB)));
        let bytes = fs::read(&standing).unwrap();
        fs::remove_file(&standing).unwrap();
        fs::write(&standing, &bytes[..bytes.len() - 1]).unwrap();
        self.force(0xB, start).await;
        self.push_in_parts(0xC, start).await;
        self.push_in_parts(0xD, start).await;
        self.force(0xD, first).await;
        let raw = segment(start);
        for range in PIECES {
            let bytes = &raw[range.start as usize..range.end as usize];
            let (repository, key, zstd) = (&self.repository, &self.key, self.compressions[0]);
            archive_piece(repository, self.cluster, named(0xE), range, bytes, key, zstd).await.unwrap();
        }
        let (timeline, written_at) = (TimelineId::FIRST, self.repository.clock().now());
        let head = ArchiveHead { timeline, end: Lsn(0xE0_2EE0), written_at };
        archive_head(&self.repository, self.cluster, &head).await.unwrap();
    }
}

/// Writes the repository and the expectations, of which those that matter are known before anything is read.
async fn write() {
    let repository = forms().join("repository");
    assert!(!repository.exists(), "the golden repository is written once");
    fs::create_dir_all(&repository).unwrap();
    for site in SITES {
        Writer::open(&repository, site).await.write().await;
    }
    fs::remove_dir_all(repository.join(".staging")).ok();
    let expected = describe(&golden(), &repository).await;
    for (number, sample) in NEWEST {
        let fact = format!("Segment({:?}) {} {}\n", named(number), 1 << 20, Digest::of(&segment(sample)));
        assert_eq!(expected.matches(&fact).count(), SITES.len(), "{fact:?} is not what is read back");
    }
    fs::write(forms().join("expected.txt"), expected).unwrap();
}

#[tokio::test]
async fn the_golden_repository_of_later_forms_reads_as_it_was_written() {
    if std::env::var_os("WALDEN_WRITE_GOLDEN").is_some() {
        write().await;
    }
    let expected = fs::read_to_string(forms().join("expected.txt")).unwrap();
    assert_same_lines(&describe(&golden(), &forms().join("repository")).await, &expected);
}

#[test]
fn the_commands_read_the_golden_repository_of_later_forms() {
    for site in SITES {
        let scratch = Scratch::new();
        let walden = walden_of(&scratch, &forms().join("repository"), site);
        for (number, sample) in NEWEST {
            assert_fetched(&scratch, &walden, &named(number).to_string(), &segment(sample));
        }
        let checked = walden.json(&["wal", "check", "--bodies"]);
        let cluster = &checked["clusters"][0];
        assert_eq!(
            (&checked["ok"], &cluster["damaged"]),
            (&true.into(), &serde_json::json!([])),
            "{checked:#}"
        );
        let superseded = cluster["superseded"].as_array().unwrap();
        assert_eq!(superseded.len(), 1, "{checked:#}");
        assert_eq!(superseded[0]["name"], named(0xB).to_string());
    }
}
