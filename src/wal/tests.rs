//! Push and fetch on a data directory that is made up, over stores that fail as told: every way in and every way out.

mod held;
mod last_request;
mod own_copy;
mod written;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{PLAN_FILE_NAME, RecoveryPlan};
use crate::clock::{Clock, SystemClock};
use crate::codec::Compression;
use crate::disk::CloneMarker;
use crate::disk::durable::Create;
use crate::pg::{Lsn, STANDBY_SIGNAL, SystemIdentifier, WalSegmentName, WalSegmentNumber, WalSegmentSize};
use crate::repo::wal_object::{Archived, WalKey, archive_piece};
use crate::repo::{self, ClusterId, Repository, RepositoryOptions, testing};
use crate::storage::{ErrorKind, Fault, Faulty, MemoryStore, ObjectKey, Rule, Verb};
use crate::wal::archive::Archive;
use crate::wal::fetch::{FetchOptions, Fetched, fetch};
use crate::wal::head::{self, HeadWritten};
use crate::wal::push::{OnConflict, check_file, push};
use crate::wal::{Error, list, plan_file};

mod positions;

pub(in crate::wal) const MIB: usize = 1 << 20;
pub(in crate::wal) const SYSTEM: SystemIdentifier = SystemIdentifier(7_301_234_567_890_123_456);

/// A data directory with a control file, beside a site in memory.
struct Server {
    folder: tempfile::TempDir,
    store: Faulty<Arc<MemoryStore>>,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["global", "pg_wal"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let server = Self { folder, store: Faulty::new(Arc::default()) };
        server.write_control(1, 0, MIB as u32);
        server
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cluster() -> ClusterId {
        let segment_size = WalSegmentSize::new(MIB as u32).unwrap();
        ClusterId { system_identifier: SYSTEM, segment_size }
    }

    fn write_control(&self, timeline: u32, redo: u64, segment_bytes: u32) {
        let mut bytes = vec![0; 8192];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &SYSTEM.0.to_le_bytes());
        put(8, &1300u32.to_le_bytes());
        put(12, &202_209_061_u32.to_le_bytes());
        put(16, &6u32.to_le_bytes());
        put(40, &redo.to_le_bytes());
        put(48, &timeline.to_le_bytes());
        put(52, &timeline.to_le_bytes());
        put(172, &1u32.to_le_bytes());
        put(204, &8u32.to_le_bytes());
        put(208, &1_234_567.0f64.to_le_bytes());
        for (at, value) in
            [(216, 8192), (220, 131_072), (224, 8192), (228, segment_bytes), (232, 64), (236, 32)]
        {
            put(at, &u32::to_le_bytes(value));
        }
        put(240, &1996u32.to_le_bytes());
        put(244, &2048u32.to_le_bytes());
        put(248, &[1]);
        let crc = crc32c(&bytes[..288]);
        bytes[288..292].copy_from_slice(&crc.to_le_bytes());
        fs::write(self.path("global/pg_control"), bytes).unwrap();
    }

    fn write_wal(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path("pg_wal").join(name);
        fs::write(&path, content).unwrap();
        path
    }

    async fn push(&self, name: &str, content: &[u8]) -> Result<Archived, Error> {
        let file = check_file(&self.write_wal(name, content))?;
        let (repository, _) = Repository::open_or_create(self.options()).await?;
        push(&repository, &file, Compression::zstd(1), OnConflict::Refuse).await
    }

    async fn push_segments(&self, timeline: u32, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            let name = name(timeline, number);
            self.push(&name, &segment(timeline, number)).await.unwrap();
            fs::remove_file(self.path("pg_wal").join(name)).unwrap();
        }
    }

    fn options(&self) -> RepositoryOptions {
        testing::options(self.store.clone(), SystemClock, 7)
    }

    async fn open(&self) -> Result<Repository, repo::Error> {
        Repository::open(self.options()).await
    }

    async fn fetch(&self, name: &str) -> Result<Fetched, Error> {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        self.fetch_from(&Archive::once(async || self.open().await, clock), name).await
    }

    async fn fetch_from<O>(&self, archive: &Archive<O>, name: &str) -> Result<Fetched, Error>
    where
        O: AsyncFn() -> Result<Repository, repo::Error>,
    {
        let options = FetchOptions {
            data_directory: self.folder.path().to_owned(),
            name: name.parse().unwrap(),
            target: self.path("pg_wal/RECOVERYXLOG"),
            wait: Duration::from_millis(1),
        };
        fetch(&options, archive).await
    }

    fn plan(&self) -> RecoveryPlan {
        serde_json::from_slice(&fs::read(self.path(PLAN_FILE_NAME)).unwrap()).unwrap()
    }
}

fn name(timeline: u32, number: u64) -> String {
    let size = WalSegmentSize::new(MIB as u32).unwrap();
    WalSegmentName::new(timeline.try_into().unwrap(), WalSegmentNumber(number), size).to_string()
}

pub(in crate::wal) fn segment(timeline: u32, number: u64) -> Vec<u8> {
    let mut bytes = vec![number as u8; MIB];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &0xD110u16.to_le_bytes());
    put(2, &2u16.to_le_bytes());
    put(4, &timeline.to_le_bytes());
    put(8, &(number * MIB as u64).to_le_bytes());
    put(16, &[0; 8]);
    put(24, &SYSTEM.0.to_le_bytes());
    put(32, &(MIB as u32).to_le_bytes());
    put(36, &8192u32.to_le_bytes());
    bytes
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82F6_3B78 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

#[tokio::test]
async fn all_four_kinds_of_files_are_archived_once_and_compared_afterwards() {
    let server = Server::new();
    let label = format!("{}.00000028.backup", name(1, 2));
    let text = b"START WAL LOCATION: 0/200028 (file 000000010000000000000002)\n";
    // Failure 3: after promotion .partial was refused and archiving stopped for ever.
    let partial = format!("{}.partial", name(1, 3));
    for (file, content) in [
        (name(1, 2), segment(1, 2)),
        (partial.clone(), segment(1, 3)),
        ("00000002.history".to_owned(), b"1\t0/300100\tno recovery target specified\n".to_vec()),
        (label, text.to_vec()),
    ] {
        assert_eq!(server.push(&file, &content).await.unwrap(), Archived::Created, "{file}");
        assert_eq!(server.push(&file, &content).await.unwrap(), Archived::Identical, "{file}");
    }
    let mut other = segment(1, 2);
    other[MIB - 1] ^= 1;
    let refused = server.push(&name(1, 2), &other).await.unwrap_err();
    assert!(matches!(refused, Error::Repository(repo::Error::Different { .. })), "{refused}");
    // Failure 12b: another server that was on the timeline leaves a different partial.
    let mut other = segment(1, 3);
    other[MIB - 1] ^= 1;
    assert_eq!(server.push(&partial, &other).await.unwrap(), Archived::Created);
    let listed = list::list(&server.open().await.unwrap()).await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].cluster, Server::cluster());
    let [first, second] = &listed[0].timelines[..] else { panic!("{listed:?}") };
    assert_eq!((first.coverage.segments(), first.coverage.partials.len(), first.branch), (1, 2, None));
    assert_eq!(second.coverage.segments(), 0);
    assert_eq!(second.branch.unwrap().switch.to_string(), "0/300100");
}

#[tokio::test]
async fn what_is_not_what_its_name_says_is_refused() {
    let server = Server::new();
    let mut foreign = segment(1, 2);
    foreign[24] ^= 1;
    let mut other_size = segment(1, 2);
    other_size[32..36].copy_from_slice(&(2 * MIB as u32).to_le_bytes());
    for (why, file, content) in [
        // Failure 5: a recycled segment with a future name.
        ("holds WAL from", name(1, 9), segment(1, 2)),
        // Failure 11: truncated WAL.
        ("bytes", name(1, 2), segment(1, 2)[..MIB / 2].to_vec()),
        ("bytes", name(1, 2), [segment(1, 2), vec![0]].concat()),
        ("system identifier", name(1, 2), foreign),
        // Failure 6: segments of another size.
        ("segments of 2097152 bytes", name(1, 2), other_size),
        ("timeline 2", name(1, 2), segment(2, 2)),
        ("does not begin", name(1, 2), vec![0; MIB]),
        ("not the name", "RECOVERYXLOG".to_owned(), segment(1, 2)),
        ("not the name", format!("{}.tmp", name(1, 2)), segment(1, 2)),
        ("ancestor", "00000002.history".to_owned(), b"\n".to_vec()),
        ("not text", "00000002.history".to_owned(), vec![0xff; 20]),
        ("no start of a backup", format!("{}.00000028.backup", name(1, 2)), b"x".to_vec()),
    ] {
        let error = server.push(&file, &content).await.unwrap_err();
        assert!(error.to_string().contains(why), "{file}: {error}");
    }
    assert!(server.open().await.is_err(), "nothing may have reached the store");
}

/// Failure 8: a restored clone archived into the live repository.
#[tokio::test]
async fn a_clone_archives_nothing() {
    let server = Server::new();
    let marker = CloneMarker { name: "yesterday".into(), ..CloneMarker::default() };
    marker.write(server.folder.path(), Create::PRIVATE_FILE).unwrap();
    let error = server.push(&name(1, 2), &segment(1, 2)).await.unwrap_err();
    assert!(matches!(&error, Error::Clone { name, .. } if name == "yesterday"), "{error}");
}

/// Failure 12a: after pg_upgrade the new cluster's timeline 1 collided with the old one's names.
#[tokio::test]
async fn another_cluster_in_the_same_site_has_names_of_its_own() {
    let server = Server::new();
    server.push_segments(1, [2]).await;
    let mut other = Server::new();
    other.store = server.store.clone();
    // Rewritten with another identifier, as pg_upgrade leaves it.
    let path = other.path("global/pg_control");
    let mut control = fs::read(&path).unwrap();
    control[0] ^= 1;
    let crc = crc32c(&control[..288]);
    control[288..292].copy_from_slice(&crc.to_le_bytes());
    fs::write(path, control).unwrap();
    let mut content = segment(1, 2);
    content[24] ^= 1;
    // A server that was pointed here by mistake leaves nothing behind.
    let error = other.push(&name(1, 2), &content).await.unwrap_err();
    assert!(error.to_string().contains("is not of this site"), "{error}");
    assert!(error.hint().unwrap().contains("walden site upgrade"));
    let repository = server.open().await.unwrap();
    assert_eq!(list::list(&repository).await.unwrap().len(), 1);
    let cluster = check_file(&other.path(&format!("pg_wal/{}", name(1, 2)))).unwrap().cluster;
    assert!(repository.accept(cluster).await.unwrap());
    assert!(!repository.accept(cluster).await.unwrap(), "it was accepted before");
    assert_eq!(other.push(&name(1, 2), &content).await.unwrap(), Archived::Created);
    // A roll-back to the old cluster goes on where it was.
    server.push_segments(1, [3]).await;
    let clusters = list::list(&repository).await.unwrap();
    assert_eq!(clusters.len(), 2);
}

#[tokio::test]
async fn the_first_fetch_pins_the_end_and_later_ones_go_by_it() {
    let server = Server::new();
    server.push_segments(1, 2..=4).await;
    assert_eq!(server.fetch("00000002.history").await.unwrap(), Fetched::Absent);
    assert_eq!(server.plan().spans[0].last.unwrap().to_string(), name(1, 4));
    assert_eq!(server.fetch(&name(1, 2)).await.unwrap(), Fetched::Restored);
    assert_eq!(fs::read(server.path("pg_wal/RECOVERYXLOG")).unwrap(), segment(1, 2));
    // What comes later is not part of this recovery, and past its end no store is asked.
    server.push_segments(1, [5]).await;
    assert_eq!(server.fetch(&name(1, 5)).await.unwrap(), Fetched::Absent);
    server.store.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    assert_eq!(server.fetch(&name(1, 5)).await.unwrap(), Fetched::Absent);
}

/// Failure 1: a store error during recovery looked like the end of the archive.
#[tokio::test]
async fn a_store_that_fails_in_any_way_never_looks_like_the_end() {
    for planned in [false, true] {
        for kind in [
            ErrorKind::Unreachable,
            ErrorKind::Denied,
            ErrorKind::Invalid,
            ErrorKind::Other,
            ErrorKind::Truncated,
        ] {
            for verb in [Verb::Get, Verb::ListFolder] {
                let server = Server::new();
                server.push_segments(1, 2..=4).await;
                if planned {
                    server.fetch(&name(1, 2)).await.unwrap();
                }
                server.store.inject(Rule::on(verb, Fault::Before(kind)));
                let outcome = server.fetch(&name(1, 3)).await;
                if planned && verb == Verb::ListFolder {
                    assert_eq!(outcome.unwrap(), Fetched::Restored, "nothing is listed any more");
                } else {
                    assert!(outcome.is_err(), "{kind:?} of {verb:?}");
                    let history = server.fetch("00000002.history").await;
                    assert!(history.is_err() || verb == Verb::ListFolder, "{kind:?} of {verb:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_hole_a_damaged_object_and_a_missing_site_stop_recovery() {
    let server = Server::new();
    server.push_segments(1, 2..=4).await;
    server.fetch(&name(1, 2)).await.unwrap();
    let key = ObjectKey::parse(&format!(
        "main/clusters/{}/wal/00000001/00000000/{}",
        Server::cluster(),
        name(1, 3)
    ));
    let key = key.unwrap();
    server.store.inner().tamper(&key, |bytes| bytes.map(|bytes| bytes.slice(..bytes.len() - 1)));
    let error = server.fetch(&name(1, 3)).await.unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
    server.store.inner().tamper(&key, |_| None);
    let error = server.fetch(&name(1, 3)).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    server.store.inner().tamper(&ObjectKey::parse("main/site.json").unwrap(), |_| None);
    assert!(server.fetch(&name(1, 4)).await.is_err());
    assert!(!server.path("pg_wal/RECOVERYXLOG.tmp").exists());
}

#[tokio::test]
async fn an_archive_without_anything_of_the_cluster_is_not_an_end() {
    let server = Server::new();
    assert!(server.fetch("00000002.history").await.is_err());
    let (..) = Repository::open_or_create(server.options()).await.unwrap();
    let error = server.fetch("00000002.history").await.unwrap_err();
    assert!(matches!(error, Error::NoArchive { .. }), "{error}");
    assert!(!server.path(PLAN_FILE_NAME).exists());
}

/// Failure 1a: the same rule turned round shut a standby down on a healthy archive.
#[tokio::test]
async fn a_standby_is_told_absent_at_once_and_pins_nothing() {
    let server = Server::new();
    server.push_segments(1, 2..=3).await;
    fs::write(server.path(STANDBY_SIGNAL), "").unwrap();
    assert_eq!(server.fetch(&name(1, 4)).await.unwrap(), Fetched::Absent);
    server.push_segments(1, [4]).await;
    assert_eq!(server.fetch(&name(1, 4)).await.unwrap(), Fetched::Restored);
    assert!(!server.path(PLAN_FILE_NAME).exists());
    // A plan that was carried here pins nothing either.
    let pinned = RecoveryPlan { standby: false, ..plan_file::standby_plan(Server::cluster()) };
    plan_file::write(server.folder.path(), &pinned).unwrap();
    assert_eq!(server.fetch(&name(1, 4)).await.unwrap(), Fetched::Restored);
    server.store.inject(Rule::always(Fault::Before(ErrorKind::Unreachable)));
    assert!(server.fetch(&name(1, 4)).await.is_err(), "a failing store is an error; its status is 1 there");
}

#[tokio::test]
async fn a_plan_of_another_recovery_is_replaced_and_one_that_is_garbage_stops_recovery() {
    let server = Server::new();
    server.push_segments(1, 2..=3).await;
    server.fetch(&name(1, 2)).await.unwrap();
    // The server was promoted since, and is being recovered again from where it got to.
    server.push("00000002.history", b"1\t0/300100\tx\n").await.unwrap();
    server.push_segments(2, 3..=6).await;
    server.write_control(2, 5 * MIB as u64, MIB as u32);
    assert_eq!(server.fetch(&name(2, 6)).await.unwrap(), Fetched::Restored);
    assert_eq!(server.plan().spans.len(), 2);
    // A standby's plan pins nothing, which would let a hole pass for the end.
    plan_file::write(server.folder.path(), &plan_file::standby_plan(Server::cluster())).unwrap();
    assert_eq!(server.fetch(&name(2, 5)).await.unwrap(), Fetched::Restored);
    assert!(!server.plan().standby);
    for garbage in ["", "{}", "[1]"] {
        fs::write(server.path(PLAN_FILE_NAME), garbage).unwrap();
        let error = server.fetch(&name(2, 7)).await.unwrap_err();
        assert!(matches!(error, Error::Plan { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_fetch_that_was_killed_leaves_nothing_for_long() {
    let server = Server::new();
    server.push_segments(1, [2]).await;
    let leftover = server.write_wal(".walden-tmp-1-0-RECOVERYXLOG", b"half");
    let other = server.write_wal(".walden-tmp-1-0-other", b"half");
    server.fetch(&name(1, 2)).await.unwrap();
    assert!(!leftover.exists() && other.exists());
}

#[tokio::test]
async fn the_longest_partial_is_the_one_that_is_read() {
    let server = Server::new();
    server.push_segments(1, [2]).await;
    let partial = format!("{}.partial", name(1, 3));
    let cut = |used: usize| {
        let mut content = segment(1, 3);
        content[used..].fill(0);
        content
    };
    for used in [4000, 9000, 100] {
        server.push(&partial, &cut(used)).await.unwrap();
    }
    assert_eq!(server.fetch(&partial).await.unwrap(), Fetched::Restored);
    assert_eq!(fs::read(server.path("pg_wal/RECOVERYXLOG")).unwrap(), cut(9000));
}

/// WAL of a server of version 15 from 0/900000 on, as if ours had written it; its first bytes, filled up with zeros.
fn written(length: usize) -> Vec<u8> {
    let mut bytes = include_bytes!("../../tests/data/wal/15-start")[..length].to_vec();
    bytes[24..32].copy_from_slice(&SYSTEM.0.to_le_bytes());
    bytes.resize(MIB, 0);
    bytes
}

impl Server {
    /// Stores a piece of the segment with the sample of WAL.
    async fn piece(&self, from: u32, to: u32) {
        let repository = self.open().await.unwrap();
        let key = WalKey::create(repository.keyring()).unwrap();
        let bytes = &written(to as usize)[from as usize..to as usize];
        let segment = name(1, 9).parse().unwrap();
        let zstd = Compression::zstd(1);
        archive_piece(&repository, Self::cluster(), segment, from..to, bytes, &key, zstd).await.unwrap();
    }

    fn fetched(&self) -> Vec<u8> {
        fs::read(self.path("pg_wal/RECOVERYXLOG")).unwrap()
    }
}

#[tokio::test]
async fn the_segment_that_is_there_in_pieces_is_the_last_one_and_has_what_was_planned() {
    let server = Server::new();
    server.push_segments(1, 7..=8).await;
    server.piece(0, 9000).await;
    server.piece(9000, 12_000).await;
    assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), Fetched::Restored);
    assert!(server.fetched() == written(12_000));
    assert_eq!(server.plan().spans[0].end, Some(Lsn(9 * MIB as u64 + 12_000)));
    assert_eq!(server.fetch(&name(1, 10)).await.unwrap(), Fetched::Absent);
    // More of it is not part of this recovery, nor is the whole segment.
    server.piece(12_000, 20_000).await;
    server.push(&name(1, 9), &written(24_000)).await.unwrap();
    fs::remove_file(server.path("pg_wal").join(name(1, 9))).unwrap();
    assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), Fetched::Restored);
    assert!(server.fetched() == written(12_000));
    // Less of it is not the end.
    let object = |leaf: &str| {
        let folder = format!("main/clusters/{}/wal/00000001/00000000", Server::cluster());
        ObjectKey::parse(&format!("{folder}/{}{leaf}", name(1, 9))).unwrap()
    };
    for leaf in ["", ".00002328-00002EE0.piece"] {
        server.store.inner().tamper(&object(leaf), |_| None);
    }
    let error = server.fetch(&name(1, 9)).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    // A standby gets whole segments alone: it may have more of this one by streaming.
    fs::write(server.path(STANDBY_SIGNAL), "").unwrap();
    assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), Fetched::Absent);
}

#[tokio::test]
async fn a_server_that_has_more_of_the_last_segment_itself_is_told_to_read_that() {
    let server = Server::new();
    server.push_segments(1, 7..=8).await;
    server.piece(0, 12_000).await;
    for (own, expected) in [(5000, Fetched::Restored), (12_000, Fetched::Restored), (20_000, Fetched::Absent)]
    {
        server.write_wal(&name(1, 9), &written(own));
        assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), expected, "{own}");
    }
    // A recycled file is none of its own.
    server.write_wal(&name(1, 9), &segment(1, 3));
    assert_eq!(server.fetch(&name(1, 9)).await.unwrap(), Fetched::Restored);
}

#[tokio::test]
async fn a_tail_that_was_cut_off_is_not_the_end_of_the_archive() {
    let server = Server::new();
    server.push_segments(1, 7..=9).await;
    let repository = server.open().await.unwrap();
    let timeline = crate::pg::TimelineId::FIRST;
    let written = head::write(&repository, Server::cluster(), timeline).await.unwrap();
    assert_eq!(written, HeadWritten::Written(Lsn(10 * MIB as u64)));
    let last = format!("main/clusters/{}/wal/00000001/00000000/{}", Server::cluster(), name(1, 9));
    server.store.inner().tamper(&ObjectKey::parse(&last).unwrap(), |_| None);
    assert_eq!(server.fetch(&name(1, 8)).await.unwrap(), Fetched::Restored);
    let error = server.fetch(&name(1, 9)).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    assert_eq!(server.fetch(&name(1, 10)).await.unwrap(), Fetched::Absent);
}
