//! Failure 1, on every way to the archive: whatever goes wrong, recovery stops or waits, and never ends early.
//!
//! PostgreSQL takes most failures of a restore_command for the end of the archive, opens for writes, and the rows
//! behind are gone without an error. Each test breaks something in the middle of an archive and recovers a copy.

use std::fs;
use std::fs::OpenOptions;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::majors::asked_for;
use crate::outage_report::report;
use crate::scene::{Scene, kill_mount, shell};
use crate::support::{Need, Server, Stop, require, wait_for};

/// Majors come from the script, each with a line of the report.
#[test]
fn nothing_ends_a_recovery_early_on_the_majors_that_the_script_asks_for() {
    for major in asked_for() {
        require!(Need::PostgreSQL(major), Need::Fuse);
        a_damaged_segment_stops_recovery(major);
        a_segment_of_its_own_that_ends_early_is_not_the_end(major);
        a_store_that_is_away(major);
        a_mount_that_is_dead_or_not_there(major);
        a_standby_outlives_everything(major);
        report(&json!({ "what": "never promotes", "major": major, "promotions_by_error": 0 }));
    }
}

#[test]
fn a_damaged_segment_stops_recovery_on_13() {
    a_damaged_segment_stops_recovery(13);
}

#[test]
fn a_damaged_segment_stops_recovery_on_15() {
    a_damaged_segment_stops_recovery(15);
}

#[test]
fn a_damaged_segment_stops_recovery_on_18() {
    a_damaged_segment_stops_recovery(18);
}

fn a_damaged_segment_stops_recovery(major: u32) {
    require!(Need::PostgreSQL(major), Need::Fuse);
    let mut scene = Scene::new(major, 4);
    // Whoever still archives could put the segment back while it is missing.
    scene.cluster.stop(Stop::Fast);
    let object = scene.object(&scene.segments[2]);
    let whole = fs::read(&object).unwrap();
    OpenOptions::new().write(true).open(&object).unwrap().set_len(whole.len() as u64 / 2).unwrap();
    scene.assert_stops(scene.recovering("fetch", &scene.walden.restore_command()), "is damaged");
    let mount = scene.mount();
    scene.assert_stops(scene.recovering("cp", &scene.cp()), "wrong size");
    // Bare cp, which is documented for standbys, does not promote a recovery either while the mount is there.
    scene.assert_stops(scene.recovering("bare", &scene.plain_cp()), "wrong size");
    drop(mount);
    fs::remove_file(&object).unwrap();
    scene.assert_stops(scene.recovering("hole-fetch", &scene.walden.restore_command()), "is missing");
    let mount = scene.mount();
    scene.assert_stops(scene.recovering("hole-cp", &scene.cp()), "wrong size");
    // Repaired, the same data directory goes on to the end.
    fs::write(&object, whole).unwrap();
    scene.assert_recovers(scene.recovering("repaired", &scene.cp())).stop(Stop::Fast);
    drop(mount);
}

#[test]
fn a_segment_of_its_own_that_ends_early_is_not_the_end_on_13() {
    a_segment_of_its_own_that_ends_early_is_not_the_end(13);
}

#[test]
fn a_segment_of_its_own_that_ends_early_is_not_the_end_on_15() {
    a_segment_of_its_own_that_ends_early_is_not_the_end(15);
}

#[test]
fn a_segment_of_its_own_that_ends_early_is_not_the_end_on_18() {
    a_segment_of_its_own_that_ends_early_is_not_the_end(18);
}

/// As in a copy that the storage made of a running server: the segment that was being written then is there up to some
/// point, and it is the one that the archive lacks, while it has those behind it.
fn a_segment_of_its_own_that_ends_early_is_not_the_end(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut scene = Scene::new(major, 4);
    let hole = scene.segments[2].clone();
    let kept = scene.cluster.scratch().path().join("kept");
    shell(scene.cluster.data_directory(), &format!("cp pg_wal/{hole} {}", kept.display()));
    scene.cluster.stop(Stop::Fast);
    fs::remove_file(scene.object(&hole)).unwrap();
    let with_its_own = |name: &str, bytes: usize| {
        let server = scene.recovering(name, &scene.walden.restore_command());
        let script =
            format!("head -c {bytes} {} >pg_wal/{hole}; truncate -s 1M pg_wal/{hole}", kept.display());
        shell(server.data_directory(), &script);
        server
    };
    // No more than the header of the first page and the beginning of a record.
    scene.assert_stops(with_its_own("early", 100), "is missing");
    scene.assert_recovers(with_its_own("whole", 1 << 20)).stop(Stop::Fast);
}

#[test]
fn a_store_that_is_away_stops_fetch_and_is_waited_for_by_the_mount_on_13() {
    a_store_that_is_away(13);
}

#[test]
fn a_store_that_is_away_stops_fetch_and_is_waited_for_by_the_mount_on_15() {
    a_store_that_is_away(15);
}

#[test]
fn a_store_that_is_away_stops_fetch_and_is_waited_for_by_the_mount_on_18() {
    a_store_that_is_away(18);
}

fn a_store_that_is_away(major: u32) {
    require!(Need::PostgreSQL(major), Need::Fuse);
    let scene = Scene::new(major, 4);
    let repository = scene.walden.repository();
    let away = repository.with_extension("away");
    // The whole repository is gone: not a word about what it held.
    fs::rename(&repository, &away).unwrap();
    scene.assert_stops(scene.recovering("gone", &scene.walden.restore_command()), "does not exist");
    fs::rename(&away, &repository).unwrap();
    let mount = scene.mount();
    // A folder that leads to itself fails for everyone, root too, and says nothing of what is in it.
    let clusters = repository.join("main/clusters");
    let hidden = repository.join("main/hidden");
    fs::rename(&clusters, &hidden).unwrap();
    symlink("clusters", &clusters).unwrap();
    scene.assert_stops(scene.recovering("fetch", &scene.walden.restore_command()), "could not");
    let mut waiting = scene.recovering("cp", &scene.cp());
    waiting.spawn();
    wait_for("the mount to wait for the store", || {
        (logged(&scene).matches("waiting for the store").count() >= 3).then_some(())
    });
    assert!(waiting.is_running() && !waiting.log().contains("restored log file"), "{}", waiting.log());
    fs::remove_file(&clusters).unwrap();
    fs::rename(&hidden, &clusters).unwrap();
    wait_for("recovery to go on", || waiting.answers().then_some(()));
    assert_eq!(Scene::rows(&waiting), scene.segments.len());
    waiting.stop(Stop::Fast);
    // The site has gone and the store answers: that proves nothing either.
    fs::rename(repository.join("main"), repository.join("moved")).unwrap();
    scene.assert_stops(scene.recovering("moved-fetch", &scene.walden.restore_command()), "does not exist");
    scene.assert_stops(scene.recovering("moved-cp", &scene.cp()), "FATAL");
    drop(mount);
}

#[test]
fn a_mount_that_is_dead_or_not_there_stops_recovery_on_13() {
    a_mount_that_is_dead_or_not_there(13);
}

#[test]
fn a_mount_that_is_dead_or_not_there_stops_recovery_on_15() {
    a_mount_that_is_dead_or_not_there(15);
}

#[test]
fn a_mount_that_is_dead_or_not_there_stops_recovery_on_18() {
    a_mount_that_is_dead_or_not_there(18);
}

fn a_mount_that_is_dead_or_not_there(major: u32) {
    require!(Need::PostgreSQL(major), Need::Fuse);
    let scene = Scene::new(major, 3);
    scene.assert_stops(scene.recovering("nothing", &scene.cp()), "No such file");
    let mount = scene.mount();
    kill_mount(mount.path());
    wait_for("the mount to be dead", || fs::metadata(mount.path()).err().map(drop));
    scene.assert_stops(scene.recovering("dead", &scene.cp()), "Transport endpoint");
    drop(mount);
    // A dead mount point is replaced by the next mount (failure 38).
    let mount = scene.mount();
    kill_mount(mount.path());
    let again = scene.mount();
    scene.assert_recovers(scene.recovering("again", &scene.cp())).stop(Stop::Fast);
    drop(again);
}

#[test]
fn a_standby_outlives_everything_and_goes_on_on_13() {
    a_standby_outlives_everything(13);
}

#[test]
fn a_standby_outlives_everything_and_goes_on_on_15() {
    a_standby_outlives_everything(15);
}

#[test]
fn a_standby_outlives_everything_and_goes_on_on_18() {
    a_standby_outlives_everything(18);
}

/// Failure 1a: an exit status above 125 shut a standby down on a healthy archive.
fn a_standby_outlives_everything(major: u32) {
    require!(Need::PostgreSQL(major), Need::Fuse);
    let mut scene = Scene::new(major, 2);
    let mount = scene.mount();
    let mut standbys =
        [scene.standby("cp", &scene.plain_cp()), scene.standby("fetch", &scene.walden.restore_command())];
    for standby in &mut standbys {
        standby.start();
        caught_up(standby, 2);
    }
    scene.archive_row();
    standbys.iter().for_each(|standby| caught_up(standby, 3));
    // Nothing answers any more, on either way.
    kill_mount(mount.path());
    let repository = scene.walden.repository();
    let away = repository.with_extension("away");
    fs::rename(&repository, &away).unwrap();
    for standby in &mut standbys {
        let asked = attempts(standby.log());
        wait_for("the standby to ask in vain", || {
            assert!(standby.is_running(), "{}", standby.log());
            (attempts(standby.log()) > asked).then_some(())
        });
        assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    }
    fs::rename(&away, &repository).unwrap();
    drop(mount);
    let mount = scene.mount();
    scene.archive_row();
    for standby in &mut standbys {
        caught_up(standby, 4);
        standby.stop(Stop::Fast);
    }
    drop(mount);
}

/// Counts what a standby's restore_command complained of.
fn attempts(log: String) -> usize {
    log.matches("cp: ").count() + log.matches("error: ").count()
}

#[track_caller]
fn caught_up(standby: &Server, rows: usize) {
    wait_for(&format!("{rows} rows on the standby"), || {
        (standby.try_sql("select count(*) from r") == Ok(rows.to_string())).then_some(())
    });
}

/// Returns what the serving process of the mount has logged.
fn logged(scene: &Scene) -> String {
    let folder = scene.walden.configuration_file().with_file_name("state").join("log");
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| read(&entry.path())).collect()
}
