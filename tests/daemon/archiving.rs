//! PostgreSQL archives through the daemon: every segment, ahead of being asked, and each site by itself.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::scene::Scene;
use crate::support::{Account, Fault, Need, Pgbench, RemoteS3, Run, Stop, require, wait_for};

#[test]
fn every_segment_of_a_load_is_in_the_archive_on_13() {
    every_segment_of_a_load_is_in_the_archive(13);
}

#[test]
fn every_segment_of_a_load_is_in_the_archive_on_15() {
    every_segment_of_a_load_is_in_the_archive(15);
}

#[test]
fn every_segment_of_a_load_is_in_the_archive_on_18() {
    every_segment_of_a_load_is_in_the_archive(18);
}

fn every_segment_of_a_load_is_in_the_archive(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut scene = Scene::start(major, |site| site);
    Pgbench::initialize(&scene.cluster, 2);
    // A backlog to begin with, as after an outage.
    let backlog = scene.end_segments(12);
    let daemon = scene.daemon();
    let load = Pgbench::start(&scene.cluster, 2);
    scene.archive();
    let mut last = String::new();
    for _ in 0..3 {
        last = scene.archive_wal();
    }
    drop(load);
    let end = scene.archive_wal();
    assert!(backlog[0] < last && last < end);
    scene.cluster.stop(Stop::Fast);
    let mut segments = 0;
    for entry in fs::read_dir(scene.data_directory().join("pg_wal/archive_status")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(segment) = name.strip_suffix(".done").filter(|name| name.len() == 24) {
            scene.assert_archived(segment);
            segments += 1;
        }
    }
    assert!(segments > backlog.len(), "{segments}");
    let log = daemon.log();
    assert!(log.contains(&format!("archived {}", backlog[0])), "not through the daemon:\n{log}");
    assert!(!log.contains("is not archived"), "{log}");
}

#[test]
fn what_comes_next_is_archived_before_it_is_asked_for_and_each_once() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(10);
    // Of a file that changed just now nothing is remembered.
    scene.settle(&segments);
    let daemon = scene.daemon();
    let ready = fs::read_dir(scene.data_directory().join("pg_wal/archive_status")).unwrap().count();
    assert!(ready >= segments.len());
    // PostgreSQL begins with the oldest one.
    scene.pushed(&segments[0]);
    wait_for("the segments behind it to be in the archive", || {
        segments.iter().all(|segment| daemon.log().contains(&format!("archived {segment}"))).then_some(())
    });
    for segment in &segments {
        if *segment != segments[0] {
            scene.pushed(segment);
        }
        scene.assert_archived(segment);
    }
    for segment in &segments {
        let times = daemon.log().matches(&format!("archived {segment}")).count();
        assert_eq!(times, 1, "{segment} was archived again:\n{}", daemon.log());
    }
}

/// As Debian's servers often have it: `pg_wal` is a link to a volume of its own.
#[test]
fn what_comes_next_is_found_where_pg_wal_leads() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::start(15, |site| site);
    scene.cluster.stop(Stop::Fast);
    let volume = scene.scratch().path().join("volume");
    let script = format!("mv pg_wal {0}; ln -s {0} pg_wal", volume.display());
    let mut link = Account::of_postgresql().command("bash");
    link.args(["-euc", &script]).current_dir(scene.data_directory());
    Run::of(&mut link, "").expect_success();
    scene.cluster.start();
    let segments = scene.end_segments(6);
    assert!(volume.join(&segments[0]).is_file());
    scene.settle(&segments);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    wait_for("the segments behind it to be in the archive", || {
        segments.iter().all(|segment| daemon.log().contains(&format!("archived {segment}"))).then_some(())
    });
    scene.archive();
    let last = scene.archive_wal();
    assert!(daemon.log().contains(&format!("archived {last}")), "{}", daemon.log());
    segments.iter().chain([&last]).for_each(|segment| scene.assert_archived(segment));
}

/// The memory is for PostgreSQL, which asks once. Who asks again may do so because the object is damaged.
#[test]
fn what_was_told_once_is_looked_at_again_and_mended_by_force() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(2);
    scene.settle(&segments);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    let object = object(&scene, &segments[0]);
    let mut bytes = fs::read(&object).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&object, &bytes).unwrap();
    let refused = crate::support::Run::of(&mut scene.push(&segments[0]), "").expect_code(3);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    crate::support::Run::of(scene.push(&segments[0]).arg("--force"), "").expect_success();
    scene.assert_archived(&segments[0]);
    assert_eq!(fs::read(&object).unwrap(), bytes, "it stays as it is");
    assert!(daemon.log().contains(&format!("forced {}", segments[0])), "{}", daemon.log());
}

fn object(scene: &Scene, segment: &str) -> PathBuf {
    let mut find = Command::new("find");
    find.arg(scene.walden.repository()).args(["-name", segment]);
    let found = crate::support::Run::of(&mut find, "").expect_success().stdout;
    assert_eq!(found.lines().count(), 1, "{found}");
    PathBuf::from(found.trim())
}

/// Failure 5, with a memory: PostgreSQL takes old files for new segments, and names come back with other content.
#[test]
fn another_file_under_a_remembered_name_is_looked_at_anew() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(4);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    wait_for("the next segment to be in the archive", || {
        daemon.log().contains(&format!("archived {}", segments[1])).then_some(())
    });
    let path = scene.segment(&segments[1]);
    let content = fs::read(&path).unwrap();
    let mut other = content.clone();
    *other.last_mut().unwrap() ^= 1;
    fs::write(&path, &other).unwrap();
    let refused = crate::support::Run::of(&mut scene.push(&segments[1]), "").expect_code(1);
    assert!(refused.stderr.contains("already exists with different content"), "{}", refused.stderr);
    // The WAL of another segment, moved here: the size is right, and so is the place.
    fs::rename(scene.segment(&segments[3]), &path).unwrap();
    let refused = crate::support::Run::of(&mut scene.push(&segments[1]), "").expect_code(3);
    assert!(refused.stderr.contains("holds WAL from"), "{}", refused.stderr);
    fs::write(&path, &content).unwrap();
    scene.pushed(&segments[1]);
}

#[test]
fn a_site_whose_store_is_dead_does_not_keep_another_waiting() {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1h\"\ntimeout = \"1h\"\n");
    let lines = format!("[sites.dead]\n[sites.dead.storage]\n{storage}");
    let scene = Scene::start(15, |site| site.lines(&lines));
    line.inject("", "", usize::MAX, Fault::Silence);
    let daemon = scene.daemon();
    let segments = scene.end_segments(6);
    let path = format!("pg_wal/{}", segments[0]);
    let mut waiting = scene.walden.command();
    waiting.args(["--site", "dead", "wal", "push", &path]).current_dir(scene.data_directory());
    let mut waiting = waiting.stderr(Stdio::null()).spawn().unwrap();
    wait_for("the dead store to be asked", || (!line.take_requests().is_empty()).then_some(()));
    for segment in &segments {
        let mut push = scene.walden.command();
        let path = format!("pg_wal/{segment}");
        push.args(["--site", "main", "wal", "push", &path]).current_dir(scene.data_directory());
        crate::support::Run::of(&mut push, "").expect_success();
    }
    assert!(waiting.try_wait().unwrap().is_none(), "it waits for its store and nobody else does");
    drop(daemon);
    waiting.kill().unwrap();
    waiting.wait().unwrap();
}
