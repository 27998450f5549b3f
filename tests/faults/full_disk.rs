//! A repository on a disk that is full: nothing half-made counts, the error says so, and all goes on once there is
//! room.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::site::Faulted;
use crate::support::{Need, Run, Scratch, require, wait_for};

/// Mounts a small file system of its own in the test's folder, which takes it away again.
#[track_caller]
fn small_disk(scratch: &Scratch) -> PathBuf {
    let image = scratch.path().join("disk.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let point = scratch.folder("disk");
    Run::of(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image), "").expect_success();
    Run::of(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&point), "").expect_success();
    scratch.account().own(&point);
    scratch.folder("disk/repository");
    point
}

/// Fills a disk up to the last bytes.
fn fill(disk: &Path, leave: u64) -> PathBuf {
    let path = disk.join("filler");
    let mut file = File::create(&path).unwrap();
    for piece in [1 << 20, 4096] {
        let bytes = vec![1; piece];
        // Synced piece by piece, because what only waits in memory takes no room yet.
        let error = loop {
            if let Err(error) = file.write_all(&bytes).and_then(|()| file.sync_data()) {
                break error;
            }
        };
        assert_eq!(error.kind(), ErrorKind::StorageFull);
    }
    let length = file.metadata().unwrap().len();
    file.set_len(length.saturating_sub(leave)).unwrap();
    file.sync_all().unwrap();
    path
}

#[test]
fn a_repository_on_a_full_disk_refuses_and_goes_on_when_there_is_room() {
    require!(Need::PostgreSQL(15), Need::Root, Need::Program("mkfs.ext4"));
    let site = Faulted::start(|cluster, site| {
        let disk = small_disk(cluster.scratch());
        site.storage(&format!("url = \"file://{}/repository\"", disk.display()))
    });
    let disk = site.scratch().path().join("disk");
    site.archive();
    site.walden.run(&["backup"]);
    let first = site.listed();

    // With nothing left the first object fails, with a little left a pack in the middle of the copy.
    for leave in [0, 1 << 20] {
        let filler = fill(&disk, leave);
        let refused = site.walden.try_run(&["backup"]);
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
