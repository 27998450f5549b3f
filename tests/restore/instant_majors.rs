//! Instant restores of other versions of PostgreSQL, and by its own account: what differs is what the server is told and asked,
//! and what a mount without root is.

use nix::sys::signal::{Signal, kill};

use crate::instant_scene::{Restored, Scene, Victim, word};
use crate::support::{
    Chaos, Checksums, Ledger, Need, Options, open_fuse_to_users, processes_in, require, wait_for,
};

/// What a server says it was told.
const TOLD: &str = "select string_agg(name || '=' || setting, ' ' order by name) from pg_settings
     where source = 'command line' and name in
         ('restart_after_crash', 'recovery_init_sync_method', 'recovery_prefetch', 'io_method')";

fn told(major: u32, is_recovering: bool) -> String {
    let words = [
        (18, true, "io_method=worker"),
        (14, true, "recovery_init_sync_method=syncfs"),
        (15, is_recovering, "recovery_prefetch=off"),
        (13, true, "restart_after_crash=off"),
    ];
    let words = words.into_iter().filter(|(since, is_told, _)| *is_told && major >= *since);
    words.map(|(.., word)| word).collect::<Vec<_>>().join(" ")
}

/// It pauses at its target, is promoted, dies with its host under load, comes back, becomes plain and needs nobody.
fn a_restore_of(major: u32) {
    require!(Need::PostgreSQL(15), Need::PostgreSQL(major), Need::Fuse, Need::Root);
    let scene = Scene::filled_major(major, Options::default().setting("fsync", "on"));
    let source = &scene.source;
    let expected = Checksums::of(source);
    source.sql("select pg_create_restore_point('here'); insert into later values (-1)");
    source.archive_wal();

    let target = ["--target-name", "here", "--target-action", "pause"];
    let (restored, report) = scene.answering("restored", &target);
    assert_eq!((word(&report, "state"), word(&report, "server")), ("answering", "paused"), "{report}");
    assert_eq!(restored.sql("select count(*), min(n) from later"), "1000|1");
    assert_eq!(restored.sql(TOLD), told(major, true));
    restored.sql("select pg_wal_replay_resume()");
    crate::source::wait_until_writable(&restored);
    expected.assert_same(&Checksums::of(&restored));
    let load = Chaos::start(&restored);
    load.wait_for_commits(30);
    load.wait_for_churn(1);
    restored.kill(Victim::Host);
    let acknowledged = load.abandon().acknowledged();
    restored.assert_bare_refuses_twice();

    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    let report = beside.report();
    assert_eq!((word(&report, "state"), word(&report, "server")), ("plain", "running"), "{report}");
    restored.wait_until_writable(&mut beside);
    assert_eq!(restored.sql(TOLD), told(major, false));
    Ledger::assert_holds(&restored, acknowledged);
    ends(&scene, &restored);
}

/// Stops what is plain, and has it started by nobody but its owner.
#[track_caller]
fn ends(scene: &Scene, restored: &Restored<'_>) {
    let rows = Checksums::of(restored);
    restored.stop();
    restored.assert_plain();
    let holds = scene.holds();
    assert_eq!((holds.pins, holds.open_pins, holds.open_leases), (1, 0, 0), "{holds:?}");
    restored.assert_starts_natively();
    rows.assert_same(&Checksums::of(restored));
    assert_eq!(restored.sql(TOLD), "", "that was for one start");
    restored.stop();
}

#[test]
fn a_restore_of_13_is_used_at_once_and_outlives_its_host() {
    a_restore_of(13);
}

#[test]
fn a_restore_of_18_is_used_at_once_and_outlives_its_host() {
    a_restore_of(18);
}

/// Sessions open their files anew where the version can have them do so.
#[test]
fn a_restore_of_18_cuts_over() {
    require!(Need::PostgreSQL(15), Need::PostgreSQL(18), Need::Fuse, Need::Root);
    let scene = Scene::filled_major(18, Options::default());
    let restored = scene.place("restored");
    let report = restored.begin(&["--cut-over"]);
    assert_eq!((word(&report, "state"), word(&report, "cut_over")), ("plain", "done"), "{report}");
    assert_eq!(restored.sql("select count(*) from pg_database where datname like 'walden%'"), "0");
    ends(&scene, &restored);
}

/// Without root: fusermount3 mounts, nothing is passed through, and WAL is written through the mount.
#[test]
fn an_ordinary_user_restores_at_once_too() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    open_fuse_to_users();
    let scene = Scene::filled(Options::default().setting("fsync", "on")).by_owner();
    let expected = Checksums::of(&scene.source);
    let (restored, report) = scene.answering("restored", &[]);
    assert_eq!(word(&report, "state"), "answering");
    assert!(report["warnings"].to_string().contains("without root"), "{report}");
    assert_eq!(restored.mounts(), std::slice::from_ref(&restored.directory), "pg_wal is in it");
    crate::source::wait_until_writable(&restored);
    expected.assert_same(&Checksums::of(&restored));
    let load = Chaos::start(&restored);
    load.wait_for_commits(30);
    kill(restored.supervisor().unwrap(), Signal::SIGKILL).unwrap();
    wait_for("the server to end with its supervisor", || {
        (restored.supervisor().is_none() && processes_in(&restored.directory).is_empty()).then_some(())
    });
    let acknowledged = load.abandon().acknowledged();
    assert!(!restored.mounts().is_empty(), "a dead mount is what this is about");

    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    let report = beside.report();
    assert_eq!((word(&report, "state"), word(&report, "server")), ("plain", "running"), "{report}");
    restored.wait_until_writable(&mut beside);
    Ledger::assert_holds(&restored, acknowledged);
    restored.amcheck();
    ends(&scene, &restored);
    restored.assert_checksums();
}
