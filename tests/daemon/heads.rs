//! Heads of an archive that PostgreSQL's archive_command fills: with a daemon or without, now and then.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use crate::scene::Scene;
use crate::support::{Need, Run, require, wait_for};

#[test]
fn how_far_the_archive_reaches_is_noted_with_a_daemon_and_without() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let scene = Scene::start(15, |site| site.lines("[sites.main.archive]\nfetch_wait = \"1s\"\n"));
    let segments = scene.end_segments(4);
    scene.pushed(&segments[0]);
    assert_eq!(heads(&scene), 0, "the interval begins with the first file");
    let note = note(&scene);
    let backdate = || fs::write(&note, "2026-01-01T00:00:00Z\n").unwrap();
    backdate();
    scene.pushed(&segments[1]);
    assert_eq!(heads(&scene), 1);
    scene.pushed(&segments[2]);
    assert_eq!(heads(&scene), 1, "not at each file");
    backdate();
    // Nothing to look ahead for: what comes first is what the head is written for.
    for mark in fs::read_dir(scene.data_directory().join("pg_wal/archive_status")).unwrap() {
        fs::remove_file(mark.unwrap().path()).unwrap();
    }
    let daemon = scene.daemon();
    scene.pushed(&segments[3]);
    assert!(daemon.log().contains(&format!("archived {}", segments[3])), "{}", daemon.log());
    wait_for("the daemon to write a head", || (heads(&scene) == 2).then_some(()));
    drop(daemon);

    // Somebody cuts the tail off, and the server has it no more.
    let object = find(&scene, &["-name", &segments[3]]).pop().unwrap();
    fs::remove_file(object).unwrap();
    fs::remove_file(scene.segment(&segments[3])).unwrap();
    let mut fetch = scene.walden.command();
    fetch.args(["wal", "fetch", &segments[3], "fetched"]).current_dir(scene.data_directory());
    let refused = Run::of(&mut fetch, "").expect_code(200);
    assert!(refused.stderr.contains("is missing"), "{}", refused.stderr);
}

/// `install -d -o postgres` leaves the group to root, which the daemon can give nothing to.
#[test]
fn a_folder_that_root_made_for_postgres_serves() {
    require!(Need::PostgreSQL(15), Need::Folder, Need::Root);
    let scene = Scene::start(15, |site| site);
    let state = scene.walden.configuration_file().with_file_name("state");
    fs::create_dir_all(&state).unwrap();
    let owner = fs::metadata(scene.data_directory()).unwrap().uid();
    std::os::unix::fs::chown(&state, Some(owner), Some(0)).unwrap();
    let segments = scene.end_segments(1);
    let pushed = scene.pushed(&segments[0]);
    assert!(!pushed.stderr.contains("head"), "{}", pushed.stderr);
    note(&scene);
}

/// A push is not less of one where this host can remember nothing.
#[test]
fn a_host_that_cannot_remember_archives_all_the_same() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(2);
    let folder = scene.walden.configuration_file().with_file_name("state").join("wal-heads");
    fs::write(&folder, "").unwrap();
    let alone = scene.pushed(&segments[0]);
    assert!(!alone.stderr.contains("head"), "{}", alone.stderr);
    let daemon = scene.daemon();
    scene.pushed(&segments[1]);
    wait_for("the daemon to say so", || {
        daemon.log().contains("it cannot be told whether a head").then_some(())
    });
    segments.iter().for_each(|segment| scene.assert_archived(segment));
    assert_eq!(heads(&scene), 0);
}

/// Returns the one file that says when a head was written last.
#[track_caller]
fn note(scene: &Scene) -> PathBuf {
    let folder = scene.walden.configuration_file().with_file_name("state").join("wal-heads/main");
    let notes: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(notes.len(), 1, "{notes:?}");
    notes[0].clone()
}

/// Counts the heads in the repository.
fn heads(scene: &Scene) -> usize {
    find(scene, &["-path", "*/heads/*", "-type", "f"]).len()
}

fn find(scene: &Scene, what: &[&str]) -> Vec<PathBuf> {
    let found = Run::of(Command::new("find").arg(scene.walden.repository()).args(what), "").expect_success();
    found.stdout.lines().map(PathBuf::from).collect()
}
