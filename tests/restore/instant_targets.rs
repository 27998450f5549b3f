//! Instant restores that end somewhere: at a target they pause, and become plain while they do; promoted, they archive on
//! their new timeline as their source did.

use crate::instant_scene::{Scene, Victim, word};
use crate::support::{Checksums, Need, Options, require, wait_for};

fn scene() -> Scene {
    let scene = Scene::start(Options::default().initdb("--wal-segsize=1"));
    scene.source.sql("create table marks (n int)");
    scene.source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 50000) n");
    scene.source.backup();
    scene.source.sql("insert into marks values (1)");
    scene.source.sql("select pg_create_restore_point('one')");
    scene.source.sql("insert into marks values (2); delete from cold where n % 2 = 0");
    scene.source.archive_wal();
    scene
}

const ROWS: &str = "select string_agg(n::text, '' order by n) from marks";
const STATE: &str = "select pg_get_wal_replay_pause_state()";

#[test]
fn a_restore_that_pauses_becomes_plain_and_pauses_again_without_walden() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let report = restored.begin(&["--target-name", "one", "--target-action", "pause"]);
    assert_eq!((word(&report, "state"), word(&report, "server")), ("plain", "paused"));
    assert_eq!(restored.sql(STATE), "paused", "the end of hydration is not the end of the pause");
    assert_eq!(restored.sql(ROWS), "1");
    assert!(restored.try_sql("insert into marks values (9)").is_err(), "it takes writes");
    restored.stop();
    restored.assert_plain();
    assert_eq!(scene.holds().open_pins, 0);
    restored.start();
    wait_for("the pause", || restored.try_sql(STATE).is_ok_and(|it| it == "paused").then_some(()));
    assert_eq!(restored.sql(ROWS), "1");
    restored.sql("select pg_wal_replay_resume()");
    wait_for("the promotion", || (restored.sql("select pg_is_in_recovery()") == "f").then_some(()));
    restored.sql("insert into marks values (9)");
    assert_eq!(restored.sql(ROWS), "19");
    assert_eq!(restored.sql("select count(*) from cold"), "50000");
    restored.amcheck();
    restored.stop();
}

/// Somebody looks, decides and lets it go on while most of it is in the store; a host dies before and after.
#[test]
fn a_restore_that_pauses_is_promoted_while_it_is_unfinished() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &["--target-name", "one", "--target-action", "pause"]);
    wait_for("the pause", || (restored.sql(STATE) == "paused").then_some(()));
    restored.kill(Victim::Host);
    restored.assert_bare_refuses();
    let mut beside = restored.resume_beside(&["--hydrate-rate", "64KiB"]);
    wait_for("the pause", || {
        beside.assert_no_failure();
        restored.try_sql(STATE).is_ok_and(|it| it == "paused").then_some(())
    });
    assert_eq!(restored.sql(ROWS), "1");
    restored.sql("select pg_wal_replay_resume()");
    wait_for("the promotion", || (restored.sql("select pg_is_in_recovery()") == "f").then_some(()));
    restored.sql("insert into marks values (9)");
    drop(beside);
    restored.kill(Victim::Host);
    restored.assert_bare_refuses();
    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    assert_eq!(word(&beside.report(), "state"), "plain");
    wait_for("the end of recovery", || (restored.sql("select pg_is_in_recovery()") == "f").then_some(()));
    assert_eq!(restored.sql(ROWS), "19", "it was promoted, and does not recover a second time");
    assert_eq!(restored.sql("select count(*) from cold"), "50000");
    restored.stop();
    restored.assert_plain();
}

/// Own ports, own archive: it is the cluster that it was, on the next timeline.
#[test]
fn what_is_promoted_archives_on_its_new_timeline_while_it_is_unfinished() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &["--target-name", "one", "--target-action", "promote"]);
    wait_for("the promotion", || (restored.sql("select pg_is_in_recovery()") == "f").then_some(()));
    for (name, value) in
        [("archive_mode", "on"), ("archive_command", &*scene.source.walden.archive_command())]
    {
        assert_eq!(restored.sql(&format!("show {name}")), value);
    }
    restored.sql("insert into marks values (9)");
    let segment = restored.sql("select pg_walfile_name(pg_switch_wal())");
    assert!(segment.starts_with("00000002"), "{segment}");
    let archived = format!("select coalesce(last_archived_wal >= '{segment}', false) from pg_stat_archiver");
    wait_for("the segment to be archived", || (restored.sql(&archived) == "t").then_some(()));
    let timelines = scene.source.walden.json(&["info"])["clusters"][0]["timelines"].clone();
    assert_eq!(timelines.as_array().unwrap().len(), 2, "{timelines}");
    let rows = Checksums::of(&restored);
    restored.finish();
    restored.stop();
    restored.assert_plain();
    // And the store gives it back.
    let again = scene.place("again");
    assert_eq!(word(&again.begin(&[]), "state"), "plain");
    rows.assert_same(&Checksums::of(&again));
    assert_eq!(again.sql("select timeline_id from pg_control_checkpoint()"), "3");
    again.stop();
    again.assert_plain();
}

/// Every table of a busy cluster, at the end of its archive, before a byte more has come than was asked for.
#[test]
fn all_of_it_is_right_before_and_after_it_is_plain() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let rows = Checksums::of(&scene.source);
    let (restored, _) = scene.answering("restored", &[]);
    rows.assert_same(&Checksums::of(&restored));
    restored.amcheck();
    restored.finish();
    rows.assert_same(&Checksums::of(&restored));
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
    restored.assert_starts_natively();
    rows.assert_same(&Checksums::of(&restored));
    restored.stop();
}

/// Nothing comes and nobody answers: there is nothing to wait for.
#[test]
fn a_restore_that_shuts_down_at_its_target_and_is_not_hydrated_is_waited_for_no_longer() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let mut beside =
        restored.begin_beside(&["--no-hydrate", "--target-name", "one", "--target-action", "shutdown"]);
    let status = beside.wait();
    eprintln!("{status}: {}", beside.told());
    assert!(!restored.answers() && restored.supervisor().is_some());
    assert_eq!(scene.holds().open_pins, 1);
    restored.finish();
    restored.assert_plain();
}

/// Nobody answers then: the directory becomes plain without a server, and stands where it was to.
#[test]
fn a_restore_that_shuts_down_at_its_target_becomes_plain_and_the_command_ends() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let report = restored.begin(&["--target-name", "one", "--target-action", "shutdown"]);
    assert_eq!(word(&report, "state"), "plain");
    assert!(!restored.answers());
    restored.assert_plain();
    assert_eq!(scene.holds().open_pins, 0);
    // Told otherwise it shows where it stands.
    let auto = restored.directory.join("postgresql.auto.conf");
    let told = std::fs::read_to_string(&auto).unwrap() + "\nrecovery_target_action = 'pause'\n";
    std::fs::write(&auto, told).unwrap();
    restored.start();
    wait_for("the pause", || restored.try_sql(STATE).is_ok_and(|it| it == "paused").then_some(()));
    assert_eq!(restored.sql(ROWS), "1");
    restored.stop();
}
