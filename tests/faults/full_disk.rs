//! A repository on a disk that is full: nothing half-made counts, the error says so, and all goes on once there is
//! room.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};

use crate::site::Faulted;
use crate::support::{Need, Server, fill, require, small_disk, wait_for};

/// What a restore that has begun, and can go on, tells to do.
const GO_ON: &str = "Then go on with --resume";

#[test]
fn a_repository_on_a_full_disk_refuses_and_goes_on_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Program("mkfs.ext4"));
    let site = Faulted::start(|cluster, site| {
        let disk = small_disk(cluster.scratch(), "disk", 64, &[]);
        cluster.scratch().folder("disk/repository");
        site.storage(&format!("url = \"file://{}/repository\"", disk.display()))
    });
    let disk = site.scratch().path().join("disk");
    site.archive();
    site.walden.run(&["backup"]);
    let first = site.listed();

    // With nothing left the first object fails, with a little left a pack in the middle of the copy.
    for leave in [0, 1 << 20] {
        let filler = fill(&disk, leave);
        let refused = site.walden.try_run(&["backup", "--full"]);
        assert_eq!(refused.code(), Some(1), "{}", refused.stderr);
        assert!(refused.stderr.contains("no space is left in the store"), "{}", refused.stderr);
        assert_eq!(site.listed(), first, "nothing half-made is listed");
        fs::remove_file(filler).unwrap();
    }

    let filler = fill(&disk, 0);
    let segment = site.end_segment();
    let failed = "select failed_count > 0 from pg_stat_archiver";
    wait_for("PostgreSQL to be told", || (site.sql(failed) == "t").then_some(()));
    assert!(
        site.data_directory().join("pg_wal").join(&segment).exists(),
        "PostgreSQL keeps what is not archived"
    );
    let content = fs::read(site.data_directory().join("pg_wal").join(&segment)).unwrap();
    fs::remove_file(filler).unwrap();
    site.wait_until_archived(&segment);
    assert!(site.fetched(&segment) == content);
    site.walden.run(&["backup"]);
    let ids = site.listed();
    assert_eq!(ids.len(), 2);
    site.assert_restores(ids.iter().max().unwrap());
}

/// The plan counts bytes before anything is written; what it cannot foresee is a disk that others fill meanwhile, here
/// with files instead of bytes.
#[test]
fn a_restore_to_a_full_disk_is_refused_or_goes_on_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Program("mkfs.ext4"));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let disk = small_disk(site.scratch(), "disk", 128, &["-N", "2048"]);
    let target = disk.join("restored");
    let restore = |options: &[&str]| {
        site.walden.try_run(&[&["restore", "--target-dir", target.to_str().unwrap()], options].concat())
    };
    let filler = fill(&disk, 1 << 20);
    let refused = restore(&[]);
    assert_ne!(refused.code(), Some(0));
    assert!(refused.stderr.contains("space") && refused.stderr.contains("hint:"), "{}", refused.stderr);
    assert!(!target.exists(), "nothing is written");
    fs::remove_file(filler).unwrap();

    let crowd = disk.join("crowd");
    fs::create_dir(&crowd).unwrap();
    (0..1700).for_each(|n| drop(File::create(crowd.join(n.to_string())).unwrap()));
    let failed = restore(&[]);
    assert_eq!(failed.code(), Some(1), "{}", failed.stderr);
    assert!(failed.stderr.contains("No space left on device"), "{}", failed.stderr);
    assert!(!target.join("global/pg_control").exists(), "it can be started");
    assert!(failed.stderr.contains(GO_ON), "{}", failed.stderr);
    fs::remove_dir_all(crowd).unwrap();
    // One that is begun anew, and fails before the unfinished one is given up, is not what --resume would go on with.
    let area = target.join(".walden");
    chown(&area, Some(0), Some(0)).unwrap();
    fs::set_permissions(&area, fs::Permissions::from_mode(0o755)).unwrap();
    for (option, goes_on) in [("--force", false), ("--resume", true)] {
        let failed = restore(&[option]);
        assert_eq!(failed.code(), Some(1), "{}", failed.stderr);
        assert!(failed.stderr.contains("Permission denied"), "{}", failed.stderr);
        assert_eq!(failed.stderr.contains(GO_ON), goes_on, "{}", failed.stderr);
    }
    site.scratch().account().own(&area);
    assert_eq!(restore(&["--resume"]).code(), Some(0));
    let mut server = Server::new(15, &target, &site.scratch().folder("run"));
    server.set("archive_mode", "off").start();
    assert_eq!(server.sql("select count(*) from kept"), "20000");
}

/// What PostgreSQL writes comes first to know, as on any file system; what was committed is there afterwards.
#[test]
fn a_clone_on_a_full_disk_tells_its_server_and_goes_on_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Fuse, Need::Program("mkfs.ext4"));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let disk = small_disk(site.scratch(), "walden/clones", 192, &[]);
    let walden = site.walden.as_root();
    walden.run(&["clone", "create", "full"]);
    let psql = |sql: &str| walden.try_run(&["clone", "psql", "full", "--", "-XAtc", sql]);
    psql("create table own as select n from generate_series(1, 1000) n").expect_success();
    let filler = fill(&disk, 0);
    let refused =
        psql("create table large as select repeat(n::text, 100) as text from generate_series(1, 200000) n");
    assert_ne!(refused.code(), Some(0));
    // Its log stands on the same disk, and may be what had no room; a server that ends itself tells psql nothing.
    let told = refused.stderr + &fs::read_to_string(disk.join("full/server.log")).unwrap();
    assert!(told.contains("No space left on device"), "{told}");
    fs::remove_file(filler).unwrap();
    // Without room for WAL a server ends itself, and the clone with it.
    if walden.json(&["clone", "status", "full"])["state"] != "running" {
        walden.try_run(&["clone", "stop", "full"]);
        walden.run(&["clone", "start", "full"]);
    }
    let rows = "select (select count(*) from own), (select count(*) from kept), to_regclass('large') is null";
    assert_eq!(psql(rows).expect_success().stdout.trim(), "1000|20000|t");
    psql("create table large as select n from generate_series(1, 10000) n").expect_success();
    walden.run(&["clone", "delete", "full"]);
}
