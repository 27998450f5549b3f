//! Servers whose `pg_wal` is a link to a volume of its own (`initdb --waldir`): every way of WAL goes through it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::scene::{Scene, shell};
use crate::support::{Need, Run, Stop, require};

#[test]
fn wal_is_archived_recovered_and_put_back_through_a_link_on_13() {
    wal_is_archived_recovered_and_put_back_through_a_link(13);
}

#[test]
fn wal_is_archived_recovered_and_put_back_through_a_link_on_18() {
    wal_is_archived_recovered_and_put_back_through_a_link(18);
}

fn wal_is_archived_recovered_and_put_back_through_a_link(major: u32) {
    require!(Need::PostgreSQL(major), Need::Folder);
    let mut scene = Scene::new(major, 1);
    scene.cluster.sql("alter system set wal_keep_size = '64MB'");
    scene.cluster.stop(Stop::Fast);
    let volume = link_away(scene.cluster.data_directory());
    scene.cluster.start();
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    for _ in 0..4 {
        scene.archive_row();
    }

    // What is restored lies on the volume as well, with nothing left of what was on its way.
    let server = scene.recovering("linked", &scene.walden.restore_command());
    let restored = link_away(server.data_directory());
    let mut server = scene.assert_recovers(server);
    server.stop(Stop::Fast);
    assert!(fs::symlink_metadata(server.data_directory().join("pg_wal")).unwrap().is_symlink());
    let names: Vec<String> = fs::read_dir(&restored)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.iter().any(|name| name.starts_with("00000002")), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with('.') || name.contains("RECOVERY")), "{names:?}");

    // What the archive lacks is found on the volume: by a recovery that reads it itself, and by the repair.
    let hole = scene.segments[2].clone();
    assert!(volume.join(&hole).is_file());
    fs::remove_file(scene.object(&hole)).unwrap();
    let mut fetch = scene.walden.command();
    fetch.args(["wal", "fetch", &hole, "pg_wal/RECOVERYXLOG"]).current_dir(scene.cluster.data_directory());
    let own = Run::of(&mut fetch, "").expect_code(1);
    assert!(own.stderr.contains("is not in the archive"), "{}", own.stderr);
    let repaired = scene.walden.json(&["wal", "check", "--repair"]);
    assert_eq!((&repaired["repaired"], &repaired["ok"]), (&json!([hole]), &true.into()), "{repaired:#}");
    assert!(scene.object(&hole).is_file());
}

/// Moves `pg_wal` of a server that does not run to a volume of its own, and returns where that is.
#[track_caller]
fn link_away(data_directory: &Path) -> PathBuf {
    let volume = data_directory.with_extension("wal");
    let to = volume.display();
    shell(data_directory, &format!("mv pg_wal {to}; ln -s {to} pg_wal"));
    volume
}
