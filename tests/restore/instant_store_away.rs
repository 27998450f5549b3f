//! The store away while an instant restore recovers, runs, becomes plain and stops: it is waited for, nothing is promoted early,
//! and nothing that was acknowledged is lost.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use crate::instant_scene::{Restored, Scene, Victim, word};
use crate::support::{Need, Options, require, wait_for};

/// A folder of the repository that cannot be read: it leads to itself, which fails for everyone, root too, and says
/// nothing of what is in it.
struct Hidden {
    folder: PathBuf,
}

impl Hidden {
    fn new(folder: PathBuf) -> Self {
        fs::rename(&folder, folder.with_extension("hidden")).unwrap();
        symlink(folder.file_name().unwrap(), &folder).unwrap();
        Self { folder }
    }

    fn show(self) {
        fs::remove_file(&self.folder).unwrap();
        fs::rename(self.folder.with_extension("hidden"), &self.folder).unwrap();
    }
}

fn scene() -> Scene {
    let scene = Scene::start(Options::default());
    // A call is tried again by itself, and would be for minutes before anything else is seen.
    let file = scene.source.walden.configuration_file();
    let impatient = fs::read_to_string(&file).unwrap().replace("[storage]\n", "[storage]\nretry = \"1s\"\n");
    fs::write(file, impatient).unwrap();
    scene.source.sql("create table changed as select n from generate_series(1, 1000) n");
    for table in ["cold", "colder"] {
        scene
            .source
            .sql(&format!("create table {table} as select n, md5(n::text) from generate_series(1, 20000) n"));
    }
    scene.source.sql("vacuum changed");
    scene.source.backup();
    scene.source.sql("delete from changed where n = 1");
    scene.source.sql("select pg_create_restore_point('here')");
    scene.source.sql("delete from changed where n = 2");
    scene.source.archive_wal();
    scene
}

impl Scene {
    fn archive(&self) -> PathBuf {
        self.source.walden.repository().join("main/clusters")
    }

    fn packs(&self) -> PathBuf {
        let folder = fs::read_dir(self.source.walden.repository().join("main/basebackups")).unwrap();
        let mut folders: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
        assert_eq!(folders.len(), 1, "the source has one basebackup");
        folders.remove(0).join("packs")
    }

    /// What PostgreSQL reads in critical sections is there, asked for or not.
    #[track_caller]
    fn assert_shared_files_are_local(&self, restored: &Restored<'_>) {
        let beneath = self.beneath();
        let mut files = 0;
        for directory in ["global", "pg_xact", "pg_multixact/members", "pg_multixact/offsets", "pg_commit_ts"]
        {
            let mounted = restored.directory.join(directory);
            for entry in fs::read_dir(&mounted).unwrap().flatten() {
                let size = entry.metadata().unwrap().len();
                // Walden's private area has this one.
                if entry.file_name() == "pg_control" || size == 0 {
                    continue;
                }
                let local = fs::metadata(beneath.path(&entry.path()));
                let on_disk = local.map_or(0, |local| local.blocks() * 512);
                assert!(on_disk >= size, "{} has {on_disk} of {size} bytes", entry.path().display());
                files += 1;
            }
        }
        assert!(files > 40, "{files} files");
    }

    /// Reads what the restored servers have said.
    #[track_caller]
    fn assert_no_panic(&self) {
        let folder = fs::read_dir(self.source.scratch().path().join("walden/state/log")).unwrap();
        let logs = folder.map(|entry| entry.unwrap().path());
        let logs: Vec<PathBuf> =
            logs.filter(|path| path.to_string_lossy().ends_with(".server.log")).collect();
        assert!(!logs.is_empty(), "no server has a log");
        for log in logs {
            let log = fs::read_to_string(log).unwrap();
            assert!(log.contains("ready to accept"), "this is no server's log: {log}");
            assert!(!log.contains("PANIC"), "{log}");
        }
    }
}

const STATE: &str = "select pg_get_wal_replay_pause_state()";

/// Its recovery begins anew after a reboot, and neither the WAL nor the pages come.
#[test]
fn a_recovery_waits_for_the_store_and_is_not_promoted_without_it() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &["--target-name", "here", "--target-action", "pause"]);
    wait_for("the pause", || (restored.sql(STATE) == "paused").then_some(()));
    restored.kill(Victim::Host);
    // What recovery has fetched would do without the archive.
    for entry in fs::read_dir(restored.directory.join("pg_wal")).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_file() {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    let archive = Hidden::new(scene.archive());
    let mut beside = restored.resume_beside(&["--hydrate-rate", "64KiB"]);
    wait_for("the store to be missed", || {
        beside.assert_no_failure();
        beside.has_told("store").then_some(())
    });
    assert!(!restored.try_sql("select pg_is_in_recovery()").is_ok_and(|it| it == "f"), "it was promoted");
    archive.show();
    wait_for("the pause", || {
        beside.assert_no_failure();
        restored.try_sql(STATE).is_ok_and(|it| it == "paused").then_some(())
    });
    assert_eq!(restored.sql("select count(*) from changed"), "999");
    restored.sql("select pg_wal_replay_resume()");
    wait_for("the promotion", || (restored.sql("select pg_is_in_recovery()") == "f").then_some(()));
    assert_eq!(restored.sql("select timeline_id from pg_control_checkpoint()"), "2");
    restored.stop();
}

#[test]
fn a_server_that_answers_misses_the_store_with_an_error_and_becomes_plain_once_it_is_back() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "256KiB"]);
    restored.wait_until_writable(&mut beside);
    // PostgreSQL lets sessions in when it likes; Walden says that it answers once it cannot panic of a read any more.
    wait_for("the word that it answers", || {
        beside.assert_no_failure();
        beside.has_told("answering queries after").then_some(())
    });
    scene.assert_shared_files_are_local(&restored);
    assert_eq!(restored.sql("select count(*) from changed"), "998");
    let packs = Hidden::new(scene.packs());
    let missed = restored.try_sql("select sum(n) from cold").unwrap_err();
    assert!(missed.contains("Input/output error"), "{missed}");
    // What it has, and what it makes, it goes on with.
    restored
        .sql("create role one; comment on role one is 'x'; select txid_status('3'::bigint); drop role one");
    restored.sql("insert into changed values (0); checkpoint");
    wait_for("the store to be missed", || {
        beside.assert_no_failure();
        beside.has_told("store").then_some(())
    });
    assert!(restored.answers(), "the server goes on without it");
    assert!(!beside.has_ended(), "it cannot be plain without the store");
    packs.show();
    assert_eq!(restored.sql("select sum(n) from cold"), "200010000");
    scene.assert_no_panic();
    restored.finish();
    assert_eq!(restored.sql("select count(*) from changed"), "999");
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}

/// Neither a stop nor the way back needs what is not there.
#[test]
fn a_stop_without_the_store_comes_to_its_end_and_loses_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("insert into changed values (0)");
    let packs = Hidden::new(scene.packs());
    let sql = crate::support::Sql::clone(&restored);
    let reader = std::thread::spawn(move || sql.try_sql("select sum(n) from colder"));
    let waits = "select count(*) from pg_stat_activity where query like '%from colder' and state = 'active'";
    wait_for("a reader to wait for a page", || (restored.sql(waits) == "1").then_some(()));
    // PostgreSQL's own stop, then the supervisor's.
    nix::sys::signal::kill(restored.supervisor().unwrap(), nix::sys::signal::Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    assert!(reader.join().unwrap().is_err());
    assert!(restored.mounts().is_empty(), "a mount is left");
    assert!(!restored.answers());
    restored.assert_bare_refuses_twice();
    packs.show();
    scene.assert_no_panic();
    restored.finish();
    assert_eq!(restored.sql("select count(*) from changed"), "999");
    assert_eq!(restored.sql("select sum(n) from colder"), "200010000");
    restored.stop();
    restored.assert_plain();
}

/// Going on does not help until the object is well: it is named, the server stays, and what it asks for elsewhere comes. Then
/// the same process goes on, and nobody has to stop the server for that.
#[test]
fn a_damaged_pack_keeps_it_from_being_plain_and_is_named() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("checkpoint");
    // The next process has nothing of the packs in its memory yet.
    nix::sys::signal::kill(restored.supervisor().unwrap(), nix::sys::signal::Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    let mut whole = Vec::new();
    for pack in fs::read_dir(scene.packs()).unwrap() {
        let path = pack.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let mut damaged = bytes.clone();
        // Not in its last bytes, which say what is where.
        let places = (bytes.len() / 4..bytes.len() * 3 / 4).step_by(1 << 12);
        places.for_each(|at| damaged[at] ^= 1);
        fs::write(&path, damaged).unwrap();
        whole.push((path, bytes));
    }
    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    restored.wait_until_writable(&mut beside);
    wait_for("the damage to be told", || {
        assert!(!beside.has_told("\"plain\""), "{}", beside.told());
        (beside.has_told("packs/") || beside.has_told("pack ") || beside.has_ended()).then_some(())
    });
    assert!(beside.has_told("pack"), "the object is not named: {}", beside.told());
    assert!(restored.answers(), "the server is gone");
    restored.sql("insert into changed values (0)");
    let status = beside.wait();
    assert!(!status.success(), "{status}: {}", beside.told());
    assert!(restored.answers(), "the server is gone");
    let servers = [restored.supervisor().unwrap(), restored.postmaster()];
    let again = restored.try_resume().expect_code(1);
    assert!(again.stderr.contains("does not become whole"), "{}", again.stderr);
    for (path, bytes) in whole {
        fs::write(&path, bytes).unwrap();
        scene.source.scratch().account().own(&path);
    }
    let report = restored.resume();
    assert_eq!(word(&report, "state"), "plain", "{report}");
    assert_eq!([restored.supervisor().unwrap(), restored.postmaster()], servers);
    assert_eq!(restored.sql("select count(*) from changed"), "999");
    assert_eq!(restored.sql("select sum(n) from cold"), "200010000");
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}
