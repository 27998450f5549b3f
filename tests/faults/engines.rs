//! One request of the store that fails, at each position of a whole basebackup of a live server, and of making a clone:
//! the run is right, or fails and says where; nothing half-made is listed or left, and the next run converges.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use walden::backup::{
    self, BackupOptions, BackupOutcome, BackupSource, Budget, Checkpoint, Node, RepositoryArchive, WalArchive,
};
use walden::catalog::host::Host;
use walden::catalog::{RecoveryTarget, TargetAction, basebackups};
use walden::clock::SystemClock;
use walden::codec::{Compression, CpuPool, SystemRandom};
use walden::disk::Owner;
use walden::instance::clone_folder::{CloneFolder, HydrateSpec};
use walden::instance::create::{CreateOptions, create};
use walden::monitor::VoidMonitor;
use walden::replication::{ConnectOptions, ServerRole};
use walden::repo::entry::TreePath;
use walden::repo::{Basebackup, ClusterId, FileReader, Repository};
use walden::storage::{ErrorKind, Fault, Faulty, LocalStore, RetryOptions, Retrying, Rule, Store};

use crate::site::Faulted;
use crate::support::repository::{site_options, unencrypted};
use crate::support::{Need, Resting, require};

type TestStore = Arc<Faulty<LocalStore>>;

/// More calls than any of the runs makes: a loop that never ends is a failure too.
const CALLS_MAX: usize = 300;

fn store_of(site: &Faulted) -> TestStore {
    Arc::new(Faulty::new(LocalStore::open(&site.walden.repository(), &SystemClock).unwrap()))
}

/// The layer that asks again, as every command has it between itself and its store.
fn retrying(store: &TestStore) -> Arc<dyn Store> {
    let pause = Duration::from_millis(1);
    let options = RetryOptions { pause_first: pause, pause_max: pause, ..RetryOptions::default() };
    Arc::new(Retrying::new(store.clone(), options, Arc::new(SystemClock), 1))
}

async fn open(store: Arc<dyn Store>) -> Result<Repository, walden::repo::Error> {
    Repository::open(site_options(store, unencrypted(SystemRandom), SystemClock)).await
}

/// No effect, and an effect whose answer was lost.
fn faults() -> [Fault; 2] {
    [Fault::Before(ErrorKind::Unreachable), Fault::After(ErrorKind::OutcomeUnknown)]
}

/// What the run meets: each fault once as it is, and the one that is hardest to tell once with the layer between.
fn rounds() -> [(Fault, bool); 3] {
    let [unreached, lost] = faults();
    [(unreached, false), (lost.clone(), false), (lost, true)]
}

/// The store as a run uses it.
fn used(store: &TestStore, retried: bool) -> Arc<dyn Store> {
    if retried { retrying(store) } else { store.clone() }
}

/// Says whether an error tells which object or folder it is about.
fn names_what(text: &str) -> bool {
    ["main/", "of basebackup ", "WAL file "].iter().any(|name| text.contains(name))
}

/// Takes a basebackup; an incremental one where a folder for states has that of an earlier one.
async fn back_up(
    store: Arc<dyn Store>,
    site: &Faulted,
    pool: &CpuPool,
    states: Option<PathBuf>,
) -> Result<BackupOutcome, backup::Error> {
    let repository = open(store).await?;
    let node = Node { connection: ConnectOptions::new(site.connection()), preferred: ServerRole::Primary };
    let options = BackupOptions {
        source: BackupSource::DataDirectory,
        nodes: vec![node],
        data_directory: None,
        label: None,
        wal_received: false,
        full: false,
        states: states.ok_or_else(|| "nothing is to be remembered".to_owned()),
        checkpoint: Checkpoint::Fast,
        compression: Compression::zstd(1),
        budget: Budget::new(128 << 20, 2, 4),
        standalone: false,
        rate: None,
        wal_patience: Duration::from_secs(60),
        host: "here".to_owned(),
    };
    let archive = |cluster: ClusterId| -> Box<dyn WalArchive> {
        Box::new(RepositoryArchive { repository: repository.clone(), cluster })
    };
    backup::run(&repository, &options, pool, archive, &VoidMonitor).await
}

/// Opens every basebackup that is listed, reads a file of each, and returns how many there are.
async fn whole_basebackups(store: &TestStore) -> usize {
    let repository = open(store.clone()).await.unwrap();
    let listed = basebackups::list(&repository).await.unwrap();
    assert!(listed.unreadable.is_empty(), "{:?}", listed.unreadable);
    for basebackup in &listed.complete {
        let opened = Basebackup::open(&repository, basebackup.record.id).await.unwrap();
        let reader = FileReader::new(Arc::new(opened), 1 << 20);
        let path = TreePath::new("data/global/pg_control").unwrap();
        let (_, entry) = reader.basebackup().entry(&path).await.unwrap().expect("it is always there");
        assert_eq!(reader.read(&entry, 0..entry.size()).await.unwrap().len(), 8192);
    }
    listed.complete.len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_survives_a_fault_at_every_call_or_fails_and_the_next_converges() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site.unencrypted());
    site.archive();
    site.walden.run(&["backup"]);
    let (store, pool) = (store_of(&site), CpuPool::new(2, 2));
    let mut whole = whole_basebackups(&store).await;
    for (fault, retried) in rounds() {
        let mut failures = 0;
        for calls in 0..CALLS_MAX {
            let before = store.faults();
            store.inject(Rule::always(fault.clone()).skip(calls).times(1));
            let outcome = back_up(used(&store, retried), &site, &pool, None).await;
            store.heal();
            let after = whole_basebackups(&store).await;
            match outcome {
                Ok(_) => assert_eq!(after, whole + 1, "{fault:?} at call {calls}"),
                Err(error) => {
                    failures += 1;
                    assert_eq!(after, whole, "{fault:?} at call {calls}: {error}");
                    assert!(names_what(&error.to_string()), "{fault:?} at call {calls}: {error}");
                }
            }
            whole = after;
            if store.faults() == before {
                let told = format!("{fault:?}, retried: {retried}: {calls} calls, {failures} failures");
                // Asked again, every run succeeds.
                assert!(calls >= 8 && retried == (failures == 0), "{told}");
                break;
            }
        }
    }
    let ids = site.listed();
    site.assert_restores(ids.iter().max().unwrap());
}

/// An incremental asks for more: its parent and that one's packs. None of the answers, and none that stays away, makes it
/// name what is not there; and an attempt that failed leaves a state that the next builds upon.
async fn incrementals_survive(fault: Fault, retried: bool) {
    let site = Resting::start(|_, site| site.unencrypted());
    site.walden.run(&["backup"]);
    let (store, pool) = (store_of(&site), CpuPool::new(2, 2));
    let states = Some(site.scratch().folder("states"));
    let first = back_up(store.clone(), &site, &pool, states.clone()).await.unwrap();
    assert!(first.record.parent.is_none(), "a folder without states");
    let (mut whole, mut last) = (whole_basebackups(&store).await, first.record.id);
    let mut failures = 0;
    for calls in 0..CALLS_MAX {
        site.change();
        let before = store.faults();
        store.inject(Rule::always(fault.clone()).skip(calls).times(1));
        let outcome = back_up(used(&store, retried), &site, &pool, states.clone()).await;
        store.heal();
        let what = format!("{fault:?} at call {calls}, retried: {retried}");
        let after = whole_basebackups(&store).await;
        match outcome {
            Ok(outcome) => {
                assert_eq!(after, whole + 1, "{what}");
                assert_eq!(outcome.record.parent, Some(last), "{what}: {:?}", outcome.decision);
                last = outcome.record.id;
                // A page that is named wrongly goes on being named so, and is found by a later look.
                if calls.is_multiple_of(4) || store.faults() == before {
                    site.assert_exact(&site.taken(&last.to_string()));
                }
            }
            Err(error) => {
                failures += 1;
                assert_eq!(after, whole, "{what}: {error}");
                assert!(names_what(&error.to_string()), "{what}: {error}");
            }
        }
        whole = after;
        if store.faults() == before {
            let told = format!("{fault:?}, retried: {retried}: {calls} calls, {failures} failures");
            // Asked again, every run succeeds.
            assert!(calls >= 10 && retried == (failures == 0), "{told}");
            return;
        }
    }
    panic!("a basebackup makes more than {CALLS_MAX} calls");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_with_a_call_that_is_not_reached_fails_and_the_next_converges() {
    require!(Need::PostgreSQL(15));
    incrementals_survive(Fault::Before(ErrorKind::Unreachable), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_with_a_lost_answer_is_right_or_fails_and_the_next_converges() {
    require!(Need::PostgreSQL(15));
    incrementals_survive(Fault::After(ErrorKind::OutcomeUnknown), false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incremental_that_asks_again_survives_a_lost_answer_at_every_call() {
    require!(Need::PostgreSQL(15));
    incrementals_survive(Fault::After(ErrorKind::OutcomeUnknown), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn making_a_clone_survives_a_fault_at_every_call_or_fails_and_leaves_nothing() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site.unencrypted());
    site.archive();
    site.walden.run(&["backup"]);
    site.archive_wal();
    let store = store_of(&site);
    let clones = site.scratch().path().join("walden/clones");
    let owner = Owner::of(site.data_directory()).unwrap();
    let options = CreateOptions {
        site: "main".to_owned(),
        basebackup: None,
        target: RecoveryTarget::latest(TargetAction::Promote),
        until_hole: false,
        port: 5432,
        read_early: false,
        bin_directory: Some(site.bin_directory()),
        owner,
        user: Owner::current(),
        host: Host::here(None),
        preload: Vec::new(),
        hydrate: HydrateSpec::default(),
        expires_at: None,
    };
    for (fault, retried) in rounds() {
        let mut failures = 0;
        for calls in 0..CALLS_MAX {
            let folder = CloneFolder::new(&clones, &format!("clone-{calls}")).unwrap();
            let before = store.faults();
            store.inject(Rule::always(fault.clone()).skip(calls).times(1));
            let outcome = match open(used(&store, retried)).await {
                Ok(repository) => create(&repository, &folder, &options).await.map_err(|e| e.to_string()),
                Err(error) => Err(error.to_string()),
            };
            store.heal();
            if let Err(error) = outcome {
                failures += 1;
                assert!(names_what(&error), "{fault:?} at call {calls}: {error}");
                assert!(!folder.path().exists(), "{fault:?} at call {calls} left a folder: {error}");
                create(&open(store.clone()).await.unwrap(), &folder, &options).await.unwrap();
            }
            assert_eq!(folder.read_spec().unwrap().name, folder.name());
            folder.discard();
            if store.faults() == before {
                let told = format!("{fault:?}, retried: {retried}: {calls} calls, {failures} failures");
                // Asked again, every run succeeds.
                assert!(calls >= 8 && retried == (failures == 0), "{told}");
                break;
            }
        }
    }
}
