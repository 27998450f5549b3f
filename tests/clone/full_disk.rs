//! A clone whose disk is full: sessions are told, what nobody has read yet can still be read, and once there is room all goes
//! on with every row that was acknowledged.

use std::fs;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use crate::site::{Clone, Source};
use crate::support::{Acknowledged, Need, Options, Writers, fill, require, small_disk, wait_for};

const COLD: &str = "select count(*), sum(n), sum(hashtext(t)) from cold";

/// A source with a table that nobody reads, small segments of WAL, and a small disk for its clones.
fn source() -> (Source, PathBuf) {
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    Writers::prepare(&source, 1);
    source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 100000) n");
    // Else who reads a row writes its page, to remember that its transaction has ended.
    source.sql("vacuum (freeze)");
    source.sql("checkpoint");
    source.backup_at_rest();
    source.archive_wal();
    let disk = small_disk(source.scratch(), "walden/clones", 192, &[]);
    (source, disk)
}

/// What of a table's file is on the disk, in bytes.
fn on_disk(clone: &Clone, table: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = clone.sql(&format!("select pg_relation_filepath('{table}')"));
    fs::metadata(clone.folder().join("upper/data").join(file)).map_or(0, |found| found.blocks() * 512)
}

/// The logs are on the disk that is filled, and what this test looks for is said when it is full.
#[track_caller]
fn keep_room_for_logs(clone: &Clone) {
    for name in ["mount.log", "server.log"] {
        let log = fs::File::options().append(true).open(clone.folder().join(name)).unwrap();
        fallocate(&log, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 1 << 20).unwrap();
    }
}

#[test]
fn on_a_full_disk_cold_data_is_read_writes_are_told_and_nothing_acknowledged_is_lost() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("mkfs.ext4"));
    let (source, disk) = source();
    let cold = source.sql(COLD);
    let clone = source.clone("full", &["--no-hydrate"]);
    let mut acknowledged = Acknowledged::default();
    let load = Writers::start(&clone, 1, &acknowledged);
    load.wait_for_commits(200);
    acknowledged = load.finish();
    clone.sql("checkpoint");

    keep_room_for_logs(&clone);
    let filler = fill(&disk, 0);
    let before = on_disk(&clone, "cold");
    assert_eq!(clone.sql(COLD), cold, "nothing of it was local");
    assert_eq!(clone.sql(COLD), cold, "once more, from the store again");
    assert_eq!(on_disk(&clone, "cold"), before, "what was read took the last of the room");
    let log = clone.folder().join("mount.log");
    assert!(fs::read_to_string(&log).unwrap().contains("what is read is not kept"));

    let load = Writers::start(&clone, 2, &acknowledged);
    let large = "create table large as select repeat(t, 10) as t from cold";
    let refused = clone.try_sql(large).unwrap_err();
    // Where WAL finds no room either the server ends, and the session with it.
    let is_told = ["No space left on device", "server closed the connection", "connection to server"];
    assert!(is_told.iter().any(|told| refused.contains(told)), "{refused}");
    acknowledged = load.end();
    let said = fs::read_to_string(clone.folder().join("server.log")).unwrap();
    assert!(said.contains("No space left on device"), "{said}");

    fs::remove_file(filler).unwrap();
    go_on(&clone);
    acknowledged.assert_hold(&clone);
    assert_eq!(clone.sql(COLD), cold);
    assert_eq!(clone.sql("select to_regclass('large') is null"), "t");
    let load = Writers::start(&clone, 3, &acknowledged);
    load.wait_for_commits(100);
    acknowledged = load.finish();
    acknowledged.assert_hold(&clone);
    acknowledged.assert_rest(&clone);
    clone.amcheck();
    clone.run("delete");
}

/// A server that could not write its WAL, or a commit, has ended, and the clone with it.
fn go_on(clone: &Clone) {
    wait_for("the clone to run or to have ended", || {
        let state = clone.state();
        if state == "running" && clone.answers() {
            return Some(());
        }
        let is_over = ["failed", "stopped"].contains(&state.as_str());
        is_over.then(|| clone.run("start"))
    });
}

#[test]
fn hydration_leaves_the_last_of_the_disk_to_the_server_and_goes_on_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("mkfs.ext4"));
    let (source, disk) = source();
    let clone = source.clone("waits", &["--no-hydrate"]);
    clone.run("stop");
    let leave = 8 << 20;
    let filler = fill(&disk, leave);
    clone.walden.run(&["clone", "start", &clone.name, "--hydrate-rate", "none"]);
    let hydration = || clone.status()["hydration"].clone();
    wait_for("hydration to wait for room", || {
        let told = hydration();
        assert_ne!(told["state"], "done", "{told}");
        told["reason"].as_str().is_some_and(|why| why.contains("no room")).then_some(())
    });
    // A twentieth of 192 MiB is more than was left: nothing came.
    assert!(free(&disk) > 0);
    let mut acknowledged = Acknowledged::default();
    let load = Writers::start(&clone, 1, &acknowledged);
    // Few, for what is left of the disk takes their WAL and that of the tables that come and go beside them.
    load.wait_for_commits(20);
    acknowledged = load.finish();
    acknowledged.assert_hold(&clone);
    fs::remove_file(filler).unwrap();
    wait_for("everything to be local", || (hydration()["state"] == "done").then_some(()));
    acknowledged.assert_hold(&clone);
    clone.run("delete");
}

fn free(disk: &Path) -> u64 {
    let figures = nix::sys::statvfs::statvfs(disk).unwrap();
    figures.blocks_available() * figures.fragment_size()
}
