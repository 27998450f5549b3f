//! `walden wal check` on the archive of a real server: what is missing is named and put back from pg_wal.

use std::fs;

use crate::scene::Scene;
use crate::support::{Need, require};

/// Failures 9 and 10 from the side of the archive: a segment and a history that are gone are found, and put back while
/// the server has them.
#[test]
fn what_is_missing_is_named_and_put_back_from_pg_wal() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut scene = Scene::new(15, 0);
    scene.cluster.sql("alter system set wal_keep_size = '64MB'");
    scene.cluster.sql("select pg_reload_conf()");
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    for _ in 0..6 {
        scene.archive_row();
    }
    let whole = scene.walden.json(&["wal", "check"]);
    assert_eq!(whole["ok"], true, "{whole:#}");
    assert!(whole["clusters"][0]["objects"].as_u64().unwrap() >= 6, "{whole:#}");

    let (first, second, kept) = (&scene.segments[1], &scene.segments[2], &scene.segments[4]);
    fs::remove_file(scene.object(first)).unwrap();
    fs::remove_file(scene.object(second)).unwrap();
    let bad = scene.walden.try_run(&["wal", "check"]).expect_code(1);
    assert!(bad.stdout.contains(&format!("missing        {first} to {second} (2)")), "{}", bad.stdout);
    assert!(bad.stderr.contains("wal check --repair"), "{}", bad.stderr);

    let repaired = scene.walden.json(&["wal", "check", "--repair"]);
    assert_eq!(repaired["repaired"], serde_json::json!([first, second]), "{repaired:#}");
    assert_eq!((&repaired["ok"], &repaired["not_repaired"]), (&true.into(), &serde_json::json!([])));
    assert!(scene.object(first).is_file());

    // What the server has no more stays missing; what is damaged is told apart from that, and comes first.
    let pg_wal = scene.cluster.data_directory().join("pg_wal");
    fs::remove_file(scene.object(second)).unwrap();
    fs::remove_file(pg_wal.join(second)).unwrap();
    let lost = scene.walden.try_run(&["wal", "check", "--repair"]).expect_code(1);
    assert!(
        lost.stdout.contains(second) && lost.stderr.contains("new basebackup"),
        "{} {}",
        lost.stdout,
        lost.stderr
    );
    let path = scene.object(kept);
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let damaged = scene.walden.try_run(&["wal", "check"]).expect_code(3);
    assert!(damaged.stdout.contains(&format!("damaged        {kept}: ")), "{}", damaged.stdout);

    // A file without PostgreSQL's mark is not taken for a finished one.
    let mark = pg_wal.join(format!("archive_status/{first}.done"));
    fs::remove_file(scene.object(first)).unwrap();
    fs::remove_file(mark).unwrap();
    let unmarked = scene.walden.try_run(&["wal", "check", "--repair"]).expect_code(3);
    assert!(!unmarked.stdout.contains("archived again"), "{}", unmarked.stdout);
}

#[test]
fn every_field_is_documented() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 2);
    let report = scene.walden.json(&["wal", "check"]);
    let document = include_str!("../../docs/wal-check.md");
    let names = report.as_object().unwrap().keys().chain(report["clusters"][0].as_object().unwrap().keys());
    let missing: Vec<&String> = names
        .filter(|name| ![format!("`{name}"), format!("`.{name}")].iter().any(|text| document.contains(text)))
        .collect();
    assert!(missing.is_empty(), "docs/wal-check.md lacks {missing:?}");
}
