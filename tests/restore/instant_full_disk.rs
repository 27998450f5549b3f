//! An instant restore whose disk is full, or keeps the last step from being taken: sessions are told, what nobody has read yet
//! can still be read, and once there is room all goes on with every row that was acknowledged.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::instant_scene::{Beside, Restored, Scene, word};
use crate::source::wait_until_writable;
use crate::support::{Acknowledged, Need, Options, Run, Writers, fill, require, small_disk, wait_for};

const COLD: &str = "select count(*), sum(n), sum(hashtext(t)) from cold";

/// In which a supervisor, and the command that follows it, look several times.
const LOOKS: Duration = Duration::from_secs(3);

/// A source with a table that nobody reads and small segments of WAL, and a small disk for its restore.
fn scene() -> (Scene, PathBuf) {
    let scene = Scene::start(Options::default().initdb("--wal-segsize=1"));
    Writers::prepare(&scene.source, 1);
    scene.source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 100000) n");
    // Else who reads a row writes its page, to remember that its transaction has ended.
    scene.source.sql("vacuum (freeze)");
    scene.source.sql("checkpoint");
    scene.source.backup();
    scene.source.archive_wal();
    let disk = small_disk(scene.source.scratch(), "disk", 192, &[]);
    (scene, disk)
}

/// Shows what is on the disk beneath the mounts.
#[track_caller]
fn beneath(scene: &Scene, disk: &Path) -> PathBuf {
    let at = scene.source.scratch().folder("below");
    let mut mount = Command::new("mount");
    Run::of(mount.args(["--bind", "--make-private"]).arg(disk).arg(&at), "").expect_success();
    at.join("restored")
}

/// What of a file is on the disk, in bytes.
fn on_disk(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |found| found.blocks() * 512)
}

/// Goes on where the server could not write its WAL and is not started any more.
#[track_caller]
fn goes_on(restored: &Restored<'_>) -> Beside {
    let mut beside = restored.resume_beside(&[]);
    wait_for("the server to take writes", || {
        if beside.has_ended() && !restored.answers() {
            beside = restored.resume_beside(&[]);
        }
        restored.try_sql("select pg_is_in_recovery()").is_ok_and(|it| it == "f").then_some(())
    });
    beside
}

#[test]
fn on_a_full_disk_cold_data_is_read_writes_are_told_and_nothing_acknowledged_is_lost() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("mkfs.ext4"));
    let (scene, disk) = scene();
    let cold = scene.source.sql(COLD);
    let restored = scene.at(disk.join("restored"));
    assert_eq!(word(&restored.begin(&["--no-hydrate"]), "state"), "answering");
    wait_until_writable(&restored);
    let mut acknowledged = Acknowledged::default();
    let load = Writers::start(&restored, 1, &acknowledged);
    load.wait_for_commits(200);
    acknowledged = load.finish();
    restored.sql("checkpoint");

    let file = beneath(&scene, &disk).join(restored.sql("select pg_relation_filepath('cold')"));
    let filler = fill(&disk, 0);
    let before = on_disk(&file);
    assert_eq!(restored.sql(COLD), cold, "nothing of it was local");
    assert_eq!(restored.sql(COLD), cold, "once more, from the store again");
    assert_eq!(on_disk(&file), before, "what was read took the last of the room");
    let load = Writers::start(&restored, 2, &acknowledged);
    let refused = restored.try_sql("create table large as select repeat(t, 10) as t from cold").unwrap_err();
    // Where WAL finds no room either the server ends, and the session with it.
    let is_told = ["No space left on device", "server closed the connection", "connection to server"];
    assert!(is_told.iter().any(|told| refused.contains(told)), "{refused}");
    acknowledged = load.end();
    assert!(restored.supervisor().is_some(), "it stays mounted");

    fs::remove_file(filler).unwrap();
    drop(goes_on(&restored));
    acknowledged.assert_hold(&restored);
    assert_eq!(restored.sql(COLD), cold);
    assert_eq!(restored.sql("select to_regclass('large') is null"), "t");
    let load = Writers::start(&restored, 3, &acknowledged);
    load.wait_for_commits(100);
    acknowledged = load.finish();
    restored.finish();
    acknowledged.assert_hold(&restored);
    acknowledged.assert_rest(&restored);
    restored.assert_ends_sound();
}

#[test]
fn the_last_of_the_disk_is_left_to_the_server_and_it_becomes_plain_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("mkfs.ext4"));
    let (scene, disk) = scene();
    let restored = scene.at(disk.join("restored"));
    assert_eq!(word(&restored.begin(&["--no-hydrate"]), "state"), "answering");
    wait_until_writable(&restored);
    let file = beneath(&scene, &disk).join(restored.sql("select pg_relation_filepath('cold')"));
    kill(restored.supervisor().unwrap(), Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    let before = on_disk(&file);
    let filler = fill(&disk, 8 << 20);
    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    restored.wait_until_writable(&mut beside);
    wait_for("the rest to wait for room", || {
        beside.assert_no_failure();
        beside.has_told("no room").then_some(())
    });
    let mut acknowledged = Acknowledged::default();
    let load = Writers::start(&restored, 1, &acknowledged);
    // Few, for what is left of the disk takes their WAL and that of the tables that come and go beside them.
    load.wait_for_commits(20);
    acknowledged = load.finish();
    assert!(!beside.has_ended(), "{}", beside.told());
    assert_eq!(on_disk(&file), before, "a twentieth of the disk is more than was left");
    fs::remove_file(filler).unwrap();
    assert_eq!(word(&beside.report(), "state"), "plain");
    acknowledged.assert_hold(&restored);
    restored.assert_ends_sound();
}

/// The mark of a plain directory cannot be made: that is told, tried again, and no word on a server that was stopped meanwhile.
#[test]
fn a_last_step_that_fails_is_told_and_taken_later_whatever_becomes_of_the_server() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse);
    let scene = Scene::filled(Options::default());
    let beneath = scene.beneath();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "2MiB"]);
    restored.wait_until_writable(&mut beside);
    let mark = beneath.path(&restored.directory).join(".walden/complete");
    fs::create_dir(&mark).unwrap();
    wait_for("the failure to be told", || {
        beside.assert_no_failure();
        beside.has_told("could be put in its place").then_some(())
    });
    restored.stop();
    // A few looks of the supervisor, and of the command that follows it.
    let begun = Instant::now();
    while begun.elapsed() < LOOKS {
        assert!(!beside.has_ended(), "a server that was stopped has failed: {}", beside.told());
        std::thread::sleep(Duration::from_millis(100));
    }
    fs::remove_dir(&mark).unwrap();
    assert_eq!(word(&beside.report(), "state"), "plain");
    restored.assert_plain();
    restored.assert_starts_natively();
    assert_eq!(restored.sql("select count(*), sum(n) from cold"), "200000|20000100000");
    restored.stop();
}
