//! Failure 8: a restored clone archived into the live repository. The daemon that knows its data directory as the site's
//! archives nothing of it and receives nothing for it.

use std::fs;
use std::path::PathBuf;

use crate::scene::Scene;
use crate::support::{Need, Run, require, wait_for};

/// Says of the server's data directory that it is a clone's.
fn mark(scene: &Scene) -> PathBuf {
    let marker = scene.data_directory().join("walden.clone");
    fs::write(&marker, "name = yesterday\n").unwrap();
    marker
}

#[test]
fn failure_8_the_daemon_archives_nothing_of_a_clone() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site);
    let segments = scene.end_segments(2);
    let daemon = scene.daemon();
    let marker = mark(&scene);
    let refused = Run::of(&mut scene.push(&segments[0]), "");
    assert!(!refused.status.success(), "{refused:?}");
    assert!(refused.stderr.contains("is that of clone \"yesterday\""), "{}", refused.stderr);
    assert!(daemon.log().contains("which must not archive"), "{}", daemon.log());
    // Neither what it was asked for nor what comes next.
    assert!(!daemon.log().contains("archived 0"), "{}", daemon.log());
    fs::remove_file(marker).unwrap();
    scene.pushed(&segments[0]);
    assert!(daemon.log().contains(&format!("archived {}", segments[0])), "{}", daemon.log());
}

#[test]
fn failure_8_the_daemon_receives_nothing_for_a_clone() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start(15, |site| site.key("wal = \"receive\""));
    let marker = mark(&scene);
    let refused = scene.daemon();
    wait_for("the receiver to end", || refused.log().contains("which must not archive").then_some(()));
    assert_eq!(scene.sql("select count(*) from pg_replication_slots"), "0", "{}", refused.log());
    assert!(!scene.scratch().path().join("walden/state/spool/main").exists());
    refused.kill();
    // By nothing else than the marker.
    fs::remove_file(marker).unwrap();
    let daemon = scene.daemon();
    let active = "select count(*) from pg_replication_slots where active";
    wait_for("WAL to be received", || (scene.sql(active) == "1").then_some(()));
    drop(daemon);
}
