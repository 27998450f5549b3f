//! Restores of basebackups from memory: bit by bit what was put in, whichever way they were interrupted or begun.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use crate::catalog::{
    PlannedRecovery, RecoveryPlan, RecoveryStart, RecoveryTarget, RecoveryWindow, TargetAction,
};
use crate::clock::ManualClock;
use crate::codec::{CpuPool, Sha256};
use crate::disk::{Owner, private_area};
use crate::monitor::VoidMonitor;
use crate::pg::{
    BackupManifest, ControlFile, Crc32c, DataPath, MajorVersion, ManifestChecksum, ManifestDigest,
};
use crate::repo::builder::{BasebackupBuilder, BuilderOptions};
use crate::repo::documents::{BackupRecord, ServerRecord};
use crate::repo::manifest::Tablespace;
use crate::repo::{Basebackup, BasebackupId, ClusterId, Repository, testing};
use crate::restore::plan::{Existing, RecoveryMode, RestoreOptions, RestorePlan, plan_restore};
use crate::restore::run::{Resources, RestoreOutcome, read_unfinished, restore};
use crate::restore::{Error, ErrorKind, take_sample, work_of};
use crate::storage::error::Verb;
use crate::storage::fault::{Fault, Faulty, Rule};
use crate::storage::{ErrorKind as StoreErrorKind, MemoryStore};

mod existing;
mod positions;

const CONTROL_FILE: &[u8] = include_bytes!("../../tests/data/pg_control/15");
const PAGE: usize = 8192;

/// What a data directory holds: path below PGDATA to content.
type Files = BTreeMap<String, Vec<u8>>;

struct Site {
    store: Arc<Faulty<MemoryStore>>,
    clock: ManualClock,
    repository: Repository,
    scratch: tempfile::TempDir,
}

impl Site {
    async fn create() -> Self {
        let clock = testing::clock();
        let store = Arc::new(Faulty::new(MemoryStore::with_clock(Arc::new(clock.clone()))));
        let repository = testing::site(store.clone(), clock.clone()).await;
        Self { store, clock, repository, scratch: scratch() }
    }

    fn cluster() -> ClusterId {
        let control = ControlFile::parse(CONTROL_FILE).unwrap();
        ClusterId { system_identifier: control.system_identifier, segment_size: control.wal_segment_size }
    }

    /// Takes a basebackup of what is given, which may name pages of an earlier one.
    async fn backup(&self, files: &Files, parent: Option<BasebackupId>) -> BackupRecord {
        self.clock.advance(std::time::Duration::from_secs(60));
        let outside: Vec<&str> = files.keys().filter_map(|path| path.strip_prefix("config/")).collect();
        let options = BuilderOptions {
            cluster: Self::cluster(),
            time: "2026-11-20T10:15:00.25Z".parse().unwrap(),
            server: ServerRecord {
                outside_configuration: outside.iter().map(|path| (*path).to_owned()).collect(),
                ..ServerRecord::default()
            },
            ..testing::basebackup()
        };
        let parent = match parent {
            Some(id) => Some(Arc::new(Basebackup::open(&self.repository, id).await.unwrap())),
            None => None,
        };
        let mut builder = BasebackupBuilder::begin(&self.repository, options, parent).await.unwrap();
        builder.directory("data").directory("data/base").directory("data/global").directory("data/pg_tblspc");
        builder.directory("data/pg_wal").symlink("data/latest", "base/1").directory("tablespaces/16400");
        builder.directory("tablespaces/16400/PG_15_202209061");
        if !outside.is_empty() {
            builder.directory("config").directory("config/etc");
        }
        builder.tablespace(Tablespace { oid: 16400, location: b"/srv/ts".to_vec(), name: "ts".to_owned() });
        builder.file("data/PG_VERSION", b"15\n").await.unwrap();
        builder.file("data/global/pg_control", CONTROL_FILE).await.unwrap();
        builder.file("data/tablespace_map", b"16400 /srv/ts\n").await.unwrap();
        builder.file("data/backup_manifest", &manifest(files)).await.unwrap();
        for (path, bytes) in files {
            let tree = match path.strip_prefix("pg_tblspc/") {
                Some(below) => format!("tablespaces/{below}"),
                None if path.starts_with("config/") => path.clone(),
                None => format!("data/{path}"),
            };
            builder.file(&tree, bytes).await.unwrap();
        }
        builder.finish().await.unwrap()
    }

    fn data(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.scratch.path()).unwrap().join(name).join("data")
    }

    fn options(&self, name: &str, existing: Existing) -> RestoreOptions {
        let user = Owner::of(self.scratch.path()).unwrap();
        let data = self.data(name);
        RestoreOptions {
            tablespace_map: vec![("ts".to_owned(), data.with_file_name("ts"))],
            target_directory: data,
            configuration_directory: None,
            existing,
            is_instant: false,
            mode: RecoveryMode::Target,
            restore_command: Some("walden wal fetch %f %p".to_owned()),
            owner: user,
            user,
            apart_from: Vec::new(),
            libc: None,
            source_directory: None,
        }
    }

    async fn plan(&self, id: BasebackupId, name: &str, existing: Existing) -> Result<RestorePlan, Error> {
        let basebackup = Basebackup::open(&self.repository, id).await?;
        let record = basebackup.record().clone();
        plan_restore(&basebackup, planned(record), &self.options(name, existing)).await
    }

    async fn run(&self, plan: &RestorePlan, resume: bool) -> Result<RestoreOutcome, Error> {
        let resources = Resources {
            pool: CpuPool::new(2, 2),
            transfers: 2,
            memory_bytes: 1,
            // A sync after every run, so that there is something to go on from.
            checkpoint_bytes: 1,
        };
        let basebackup = Basebackup::open(&self.repository, plan.basebackup).await?;
        restore(basebackup, plan, resume, &resources, &VoidMonitor).await
    }

    async fn restore(
        &self,
        id: BasebackupId,
        name: &str,
        existing: Existing,
    ) -> Result<RestoreOutcome, Error> {
        let plan = self.plan(id, name, existing).await?;
        self.run(&plan, false).await
    }

    #[track_caller]
    fn assert_restored(&self, name: &str, files: &Files) {
        let data = self.data(name);
        let found = read_back(&data);
        let differing: Vec<&String> =
            files.keys().filter(|path| files.get(*path) != found.get(*path)).collect();
        assert!(differing.is_empty(), "{differing:?} are not what was backed up");
        let own = [
            "PG_VERSION",
            "global/pg_control",
            "backup_manifest",
            "postgresql.auto.conf",
            "recovery.signal",
            "walden.plan.json",
            "walden.restore.json",
        ];
        // Failure 23: without it the server would take the restore for a crash, and recover past every target.
        assert!(found.contains_key("recovery.signal"), "there is no recovery.signal");
        let strange: Vec<_> =
            found.keys().filter(|path| !files.contains_key(*path) && !own.contains(&&***path)).collect();
        assert!(strange.is_empty(), "{strange:?} were not in the backup");
        assert_eq!(found["global/pg_control"], CONTROL_FILE);
        assert_eq!(fs::read_link(data.join("pg_tblspc/16400")).unwrap(), data.with_file_name("ts"));
        assert_eq!(fs::read_link(data.join("latest")).unwrap(), Path::new("base/1"));
        assert!(!data.join(private_area::DIRECTORY_NAME).exists());
    }

    #[track_caller]
    fn assert_cannot_be_started(&self, name: &str) {
        for file in ["PG_VERSION", "global/pg_control"] {
            assert!(!self.data(name).join(file).exists(), "{file} is there");
        }
    }
}

/// In memory where there is such a file system, because every restore syncs.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn planned(record: BackupRecord) -> PlannedRecovery {
    let plan = RecoveryPlan {
        format: 1,
        cluster: record.cluster,
        basebackup: Some(record.id),
        spans: Vec::new(),
        standby: false,
        forced: None,
        carried: None,
    };
    let window = RecoveryWindow {
        timeline: record.timeline,
        start: RecoveryStart::from(&record),
        reached: Vec::new(),
        end: record.stop_lsn,
        holes: Vec::new(),
        ending: None,
        missing_start: None,
    };
    let target = RecoveryTarget::latest(TargetAction::Pause);
    PlannedRecovery {
        timeline: record.timeline,
        record,
        plan,
        target,
        accepted_hole: None,
        window,
        left_behind: Vec::new(),
        unproven: false,
    }
}

fn manifest(files: &Files) -> Vec<u8> {
    struct Digest(Sha256);
    impl ManifestDigest for Digest {
        fn update(&mut self, bytes: &[u8]) {
            self.0.update(bytes);
        }
        fn finish(self) -> [u8; 32] {
            self.0.finish().0
        }
    }
    let identifier = Site::cluster().system_identifier;
    let mut manifest = BackupManifest::new(MajorVersion::V15, identifier, Digest(Sha256::new()));
    for (path, bytes) in files {
        let crc = Crc32c::of(bytes).manifest_hex();
        let path = DataPath::new(path.as_bytes()).unwrap();
        manifest.file(&path, bytes.len() as u64, jiff::Timestamp::UNIX_EPOCH, ManifestChecksum::Crc32c(&crc));
    }
    manifest.finish()
}

/// Reads what is below a data directory, through the links of its tablespaces.
fn read_back(data: &Path) -> Files {
    let mut files = Files::new();
    let mut folders = vec![(data.to_owned(), String::new())];
    while let Some((folder, name)) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let below = format!("{name}{}", entry.file_name().to_str().unwrap());
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            if kind.is_dir() || (kind.is_symlink() && name == "pg_tblspc/") {
                folders.push((path, below + "/"));
            } else if kind.is_file() {
                files.insert(below, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// Pages by their seeds, 0 for zeros, and some bytes more.
fn content(pages: &[u8], more: usize) -> Vec<u8> {
    let page = |seed: &u8| -> Vec<u8> {
        (0..PAGE)
            .map(|n| if *seed == 0 { 0 } else { seed.wrapping_mul(31).wrapping_add((n / 64) as u8) | 1 })
            .collect()
    };
    let mut bytes: Vec<u8> = pages.iter().flat_map(page).collect();
    bytes.extend(std::iter::repeat_n(7, more));
    bytes
}

fn some_files(seed: u8) -> Files {
    let mut files = Files::new();
    files.insert("base/1".to_owned(), content(&[1, seed, 0, 0, 5], 0));
    files.insert("base/2".to_owned(), content(&[], 100));
    files.insert("base/3".to_owned(), content(&(0..60).map(|n| n % 7 + 1).collect::<Vec<_>>(), 0));
    files.insert("base/empty".to_owned(), Vec::new());
    files.insert("base/zero".to_owned(), content(&[0; 20], 0));
    files.insert("pg_tblspc/16400/PG_15_202209061/16500".to_owned(), content(&[seed, 2, 3], 500));
    files
}

fn generations() -> impl Strategy<Value = Vec<Files>> {
    const NAMES: [&str; 6] = [
        "base/1",
        "base/2",
        "base/16384",
        "global/1262",
        "pg_tblspc/16400/PG_15_202209061/5",
        "postgresql.conf",
    ];
    let file = (proptest::collection::vec(0u8..4, 0..24), prop_oneof![Just(0usize), 1usize..300]);
    let files = proptest::collection::btree_map(proptest::sample::select(&NAMES[..]), file, 1..6);
    let files = files.prop_map(|files| {
        files.into_iter().map(|(name, (pages, more))| (name.to_owned(), content(&pages, more))).collect()
    });
    proptest::collection::vec(files, 3)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Incrementals by page, restored anew and one over the other.
    #[test]
    fn every_generation_comes_back_bit_by_bit(generations in generations()) {
        block_on(async {
            let site = Site::create().await;
            let mut parent = None;
            for (n, files) in generations.iter().enumerate() {
                let id = site.backup(files, parent).await.id;
                parent = Some(id);
                let own = format!("own-{n}");
                site.restore(id, &own, Existing::Refuse).await.unwrap();
                site.assert_restored(&own, files);
                site.restore(id, "delta", Existing::Delta).await.unwrap();
                site.assert_restored("delta", files);
                site.restore(id, "replaced", Existing::Replace).await.unwrap();
                site.assert_restored("replaced", files);
            }
        });
    }
}

#[test]
fn modes_times_and_holes_are_those_of_the_source() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        let outcome = site.restore(id, "a", Existing::Refuse).await.unwrap();
        site.assert_restored("a", &some_files(9));
        assert!(outcome.bytes_written < 100 * PAGE as u64, "zeros were written: {outcome:?}");
        let data = site.data("a");
        let time = "2026-11-20T10:15:00.25Z".parse::<jiff::Timestamp>().unwrap();
        for (path, mode) in [("base/3", 0o600), ("base", 0o700), ("", 0o700), ("global/pg_control", 0o600)] {
            let metadata = fs::metadata(data.join(path)).unwrap();
            assert_eq!(metadata.permissions().mode() & 0o7777, mode, "{path}");
            let modified = (metadata.mtime(), metadata.mtime_nsec());
            let touched_since = ["", "global"].contains(&path);
            assert!(touched_since || modified == (time.as_second(), 250_000_000), "{path}");
        }
        let sparse = fs::metadata(data.join("base/zero")).unwrap();
        assert!(sparse.blocks() * 512 < sparse.len(), "zeros take room");
    });
}

/// Failures 22 and 27a: what is damaged fails the restore by name, and the directory cannot be started.
#[test]
fn an_interruption_anywhere_leaves_nothing_to_start_and_can_be_resumed() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        let mut kept = 0;
        for calls in 0.. {
            let name = format!("cut-{calls}");
            let plan = site.plan(id, &name, Existing::Refuse).await.unwrap();
            let down = Fault::Before(StoreErrorKind::Unreachable);
            site.store.inject(Rule::on(Verb::GetRange, down).key("packs").skip(calls));
            let interrupted = site.run(&plan, false).await;
            site.store.heal();
            if interrupted.is_ok() {
                assert!(calls > 0, "nothing was fetched");
                break;
            }
            site.assert_cannot_be_started(&name);
            let again = site.plan(id, &name, Existing::Refuse).await;
            assert!(matches!(again, Err(Error::Unfinished { .. })), "{again:?}");
            let plan = read_unfinished(&site.data(&name)).unwrap();
            kept += site.run(&plan, true).await.unwrap().files_kept;
            site.assert_restored(&name, &some_files(9));
            let nothing = read_unfinished(&site.data(&name));
            assert!(matches!(nothing, Err(Error::NothingToResume { .. })), "{nothing:?}");
        }
        assert!(kept > 0, "nothing that was synced was kept");
    });
}

#[test]
fn what_was_synced_is_not_fetched_again() {
    block_on(async {
        let site = Site::create().await;
        let first = site.backup(&some_files(9), None).await.id;
        let mut files = some_files(10);
        files.insert("base/new".to_owned(), content(&[1, 2, 3], 0));
        // Two basebackups' packs are two runs at least, of which the second fails.
        let id = site.backup(&files, Some(first)).await.id;
        let plan = site.plan(id, "a", Existing::Refuse).await.unwrap();
        let down = Fault::Before(StoreErrorKind::Unreachable);
        let own = id.to_string();
        site.store.inject(
            Rule::on(Verb::GetRange, down).key_where(move |key| key.contains("packs") && key.contains(&own)),
        );
        site.run(&plan, false).await.unwrap_err();
        site.store.heal();
        let plan = read_unfinished(&site.data("a")).unwrap();
        // A file that is complete in the journal is still looked at: this one has another size now.
        let tampered = site.data("a").join("base/3");
        if tampered.exists() {
            fs::write(&tampered, b"x").unwrap();
        }
        site.run(&plan, true).await.unwrap();
        site.assert_restored("a", &files);
    });
}

#[test]
fn a_delta_fetches_only_files_that_differ_and_writes_only_pages_that_do() {
    block_on(async {
        let site = Site::create().await;
        let old = site.backup(&some_files(9), None).await.id;
        site.restore(old, "a", Existing::Refuse).await.unwrap();
        let new = site.backup(&some_files(10), Some(old)).await.id;
        let data = site.data("a");
        fs::write(data.join("base/stranger"), b"x").unwrap();
        fs::create_dir(data.join("pg_wal/archive_status")).unwrap();
        let unchanged = fs::metadata(data.join("base/3")).unwrap().ino();
        let outcome = site.restore(new, "a", Existing::Delta).await.unwrap();
        site.assert_restored("a", &some_files(10));
        assert_eq!(fs::metadata(data.join("base/3")).unwrap().ino(), unchanged);
        assert!(outcome.files_kept >= 4, "{outcome:?}");
        // One page each of base/1 and the tablespace's file, and what is always written.
        let always = CONTROL_FILE.len() as u64 + 2000;
        assert!(outcome.bytes_written <= 2 * PAGE as u64 + always, "{outcome:?}");
    });
}

/// Failure 22, as far as packs go: whatever happens to one, the restore fails, names it, and nothing can be started.
#[test]
fn a_damaged_pack_is_named_and_nothing_can_be_started() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        for (name, fault) in [
            ("cut", Fault::TruncateBody(300)),
            ("flipped", Fault::FlipByte(70)),
            ("gone", Fault::Before(StoreErrorKind::NotFound)),
        ] {
            let plan = site.plan(id, name, Existing::Refuse).await.unwrap();
            site.store.inject(Rule::on(Verb::GetRange, fault).key("packs"));
            let error = site.run(&plan, false).await.unwrap_err();
            site.store.heal();
            let Error::Repository(damage) = &error else { panic!("{error}") };
            assert_eq!(damage.kind(), crate::repo::ErrorKind::Damaged, "{name}: {error}");
            assert!(error.to_string().contains(&format!("pack 0 of basebackup {id}")), "{name}: {error}");
            site.assert_cannot_be_started(name);
        }
    });
}

/// What a dry run measures: pieces of what a restore would fetch, opened as it would open them, and nothing else.
#[test]
fn a_sample_is_fetched_and_opened_and_writes_nothing() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        let plan = site.plan(id, "a", Existing::Refuse).await.unwrap();
        let basebackup = Basebackup::open(&site.repository, id).await.unwrap();
        let work = work_of(&basebackup, &plan);
        assert_eq!(work.bytes, plan.figures.bytes);
        assert!(work.requests >= 1 && work.stored_bytes == plan.figures.stored_bytes, "{work:?}");
        let resources =
            Resources { pool: CpuPool::new(2, 2), transfers: 4, memory_bytes: 1, checkpoint_bytes: 1 };
        let sample = take_sample(&basebackup, &resources).await.unwrap().unwrap();
        assert!((1..=4).contains(&sample.at_once), "{sample:?}");
        assert!(
            sample.fetched_bytes > PAGE as u64 && sample.fetched_bytes <= work.stored_bytes,
            "{sample:?}"
        );
        assert!(sample.unpacked_bytes > PAGE as u64 && sample.unpacked_bytes <= work.bytes, "{sample:?}");
        assert!(!site.data("a").exists());
        // A dry run finds what would fail the restore, as far as its sample goes.
        for fault in [Fault::FlipByte(70), Fault::TruncateBody(300)] {
            site.store.inject(Rule::on(Verb::GetRange, fault).key("packs"));
            let error = take_sample(&basebackup, &resources).await.unwrap_err();
            site.store.heal();
            assert!(error.to_string().contains(&format!("pack 0 of basebackup {id}")), "{error}");
        }
    });
}

#[test]
fn targets_that_hold_something_are_refused_untouched() {
    block_on(async {
        let site = Site::create().await;
        let id = site.backup(&some_files(9), None).await.id;
        let data = site.data("a");
        fs::create_dir_all(&data).unwrap();
        fs::write(data.join("precious"), b"x").unwrap();
        for (existing, kind) in
            [(Existing::Refuse, "not empty"), (Existing::Replace, "not restored by walden")]
        {
            let error = site.plan(id, "a", existing).await.unwrap_err();
            assert!(error.to_string().contains(kind), "{error}");
            assert_eq!(error.kind(), ErrorKind::Input);
            assert!(error.hint().is_some());
        }
        // Failure 25: a tablespace's directory in which something is.
        let tablespace = site.data("b").with_file_name("ts");
        fs::create_dir_all(&tablespace).unwrap();
        fs::write(tablespace.join("precious"), b"x").unwrap();
        for existing in [Existing::Refuse, Existing::Replace, Existing::Delta] {
            let error = site.plan(id, "b", existing).await.unwrap_err();
            assert!(error.to_string().contains("/b/ts\" is not empty"), "{error}");
        }
        assert_eq!(fs::read(tablespace.join("precious")).unwrap(), b"x");
        assert_eq!(fs::read(data.join("precious")).unwrap(), b"x");
        assert_eq!(fs::read_dir(site.data("b").parent().unwrap()).unwrap().count(), 1);
    });
}
