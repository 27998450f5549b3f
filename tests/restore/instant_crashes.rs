//! An instant restore whose server crashes, or recovers from a crash: while some of it is damaged, while the store is away.
//!
//! A recovery from a crash has no `recovery.signal`. After a power cut it may need pages again that had been fetched, for what
//! was never synced is gone; taking a file of such pages away beneath is that.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::instant_scene::{Beside, Restored, Scene, Victim, is_alive};
use crate::source::wait_until_writable;
use crate::support::{Need, Options, processes_in, require, wait_for};

/// Longer than a read of a server that takes queries waits for the store.
const LONGER_THAN_A_QUERY_WAITS: Duration = Duration::from_secs(36);

/// A process whose death takes all sessions along.
const WALWRITER: &str = "select pid from pg_stat_activity where backend_type = 'walwriter'";

const ROWS: &str = "select count(*) from kept";

/// A folder of the repository that cannot be read until it is shown again: it leads to itself.
struct Hidden(PathBuf);

impl Hidden {
    fn new(folder: PathBuf) -> Self {
        fs::rename(&folder, folder.with_extension("hidden")).unwrap();
        symlink(folder.file_name().unwrap(), &folder).unwrap();
        Self(folder)
    }

    fn show(self) {
        fs::remove_file(&self.0).unwrap();
        fs::rename(self.0.with_extension("hidden"), &self.0).unwrap();
    }
}

/// A source with a table whose visibility map says that all of it is visible.
fn scene() -> Scene {
    let scene = Scene::start(Options::default());
    // A call is tried again by itself, and would be for minutes before anything else is seen.
    let file = scene.source.walden.configuration_file();
    let impatient = fs::read_to_string(&file).unwrap().replace("[storage]\n", "[storage]\nretry = \"1s\"\n");
    fs::write(file, impatient).unwrap();
    for table in ["kept", "cold"] {
        scene.source.sql(&format!(
            "create table {table} with (autovacuum_enabled = off) as \
             select n, md5(n::text) from generate_series(1, 20000) n"
        ));
        scene.source.sql(&format!("vacuum {table}"));
    }
    scene.source.backup();
    scene.source.archive_wal();
    scene
}

/// The folder of the only basebackup.
fn basebackup(scene: &Scene) -> PathBuf {
    let folder = fs::read_dir(scene.source.walden.repository().join("main/basebackups")).unwrap();
    let mut folders: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(folders.len(), 1, "the source has one basebackup");
    folders.remove(0)
}

/// Restores, loses a page that the next recovery needs, and mounts again without starting the server.
#[track_caller]
fn without_a_page(scene: &Scene) -> Restored<'_> {
    let (restored, _) = scene.answering("restored", &[]);
    wait_until_writable(&restored);
    restored.sql("checkpoint");
    // Which clears a bit of the map, and no image of its page goes into the WAL.
    restored.sql("delete from kept where n = 1");
    let map = restored.sql("select pg_relation_filepath('kept') || '_vm'");
    restored.kill(Victim::Host);
    fs::remove_file(restored.directory.join(map)).unwrap();
    let mut mounted = restored.resume_beside(&["--no-start"]);
    assert!(mounted.wait().success(), "{}", mounted.told());
    assert_eq!(restored.mounts().iter().filter(|it| **it == restored.directory).count(), 1);
    restored
}

/// What replays the WAL.
fn startup_process(directory: &Path) -> Option<Pid> {
    processes_in(directory).into_iter().find(|pid| {
        let title = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&title).contains("startup") && is_alive(*pid)
    })
}

#[track_caller]
fn assert_ends_well(restored: &Restored<'_>) {
    assert_eq!(restored.sql(ROWS), "19999");
    restored.finish();
    assert_eq!(restored.sql(ROWS), "19999");
    restored.assert_ends_sound();
}

/// Whoever has started the server, as Debian does at boot before the network is there.
#[test]
fn a_recovery_from_a_crash_waits_for_the_store_longer_than_a_query_does() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let restored = without_a_page(&scene);
    let packs = Hidden::new(basebackup(&scene).join("packs"));
    let log = scene.source.place("own.log");
    restored.pg_ctl(&["-W", "-l", log.to_str().unwrap(), "start"]).expect_success();
    wait_for("the recovery to begin", || startup_process(&restored.directory));
    let begun = Instant::now();
    while begun.elapsed() < LONGER_THAN_A_QUERY_WAITS {
        let told = fs::read_to_string(&log).unwrap();
        assert!(startup_process(&restored.directory).is_some(), "it did not wait: {told}");
        assert!(!told.contains("FATAL:  could not") && !told.contains("PANIC"), "{told}");
        std::thread::sleep(Duration::from_millis(200));
    }
    packs.show();
    wait_until_writable(&restored);
    assert_ends_well(&restored);
}

/// By the supervisor that has just begun, for which this server never answered.
#[test]
fn a_recovery_from_a_crash_that_ends_while_the_store_is_away_starts_again_when_it_is_back() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let restored = without_a_page(&scene);
    let all = Hidden::new(basebackup(&scene));
    let mut beside = restored.resume_beside(&[]);
    let startup = wait_for("the recovery to begin", || {
        beside.assert_no_failure();
        startup_process(&restored.directory)
    });
    kill(startup, Signal::SIGKILL).unwrap();
    wait_for("the server to be waited for", || {
        beside.assert_no_failure();
        beside.has_told("starts again when the store").then_some(())
    });
    assert!(!restored.answers());
    all.show();
    restored.wait_until_writable(&mut beside);
    assert_ends_well(&restored);
}

/// Changes a byte here and there of what is in the packs; returns what they were.
fn damage(packs: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut whole = Vec::new();
    for pack in fs::read_dir(packs).unwrap() {
        let path = pack.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let mut damaged = bytes.clone();
        // Not in its last bytes, which say what is where.
        (bytes.len() / 4..bytes.len() * 3 / 4).step_by(1 << 12).for_each(|at| damaged[at] ^= 1);
        fs::write(&path, damaged).unwrap();
        whole.push((path, bytes));
    }
    whole
}

/// Kills a process of the server, and waits until it has recovered.
#[track_caller]
fn crash(restored: &Restored<'_>, beside: &Beside) {
    let pid = Pid::from_raw(restored.sql(WALWRITER).parse().unwrap());
    kill(pid, Signal::SIGKILL).unwrap();
    wait_for("the process to be gone", || (!is_alive(pid)).then_some(()));
    wait_for("the server to recover", || {
        let is_back = restored.try_sql(ROWS).is_ok_and(|it| it == "20000");
        is_back.then_some(()).or_else(|| restored.supervisor().is_none().then(|| panic!("{}", beside.told())))
    });
}

/// In what nobody reads: the server does not hear of it, and its crash is one like any other.
#[test]
fn a_server_that_crashes_is_started_again_though_a_table_is_damaged() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &[]);
    wait_until_writable(&restored);
    // What is asked later has to be local by then.
    restored.sql(WALWRITER);
    assert_eq!(restored.sql(ROWS), "20000");
    restored.sql("checkpoint");
    // The next process has nothing of the packs in its memory yet.
    kill(restored.supervisor().unwrap(), Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    let whole = damage(&basebackup(&scene).join("packs"));
    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    restored.wait_until_writable(&mut beside);
    wait_for("the damage to be told", || beside.has_ended().then_some(()));
    assert!(beside.told().contains("pack"), "the object is not named: {}", beside.told());
    crash(&restored, &beside);
    crash(&restored, &beside);
    for (path, bytes) in whole {
        fs::write(&path, bytes).unwrap();
        scene.source.scratch().account().own(&path);
    }
    restored.finish();
    assert_eq!(restored.sql(ROWS), "20000");
    restored.assert_ends_sound();
}
