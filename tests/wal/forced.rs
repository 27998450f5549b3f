//! `wal push --force`: an archive that is mended beside what is wrong, and who reads what afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use crate::scene::Scene;
use crate::support::{Need, Run, Stop, require};

fn push(scene: &Scene, path: &Path, options: &[&str]) -> Run {
    let mut arguments = vec!["wal", "push", path.to_str().unwrap()];
    arguments.extend(options);
    scene.walden.try_run(&arguments)
}

/// A segment of a stranger got into the place of the server's own, as after a failover that left two primaries.
#[test]
fn a_segment_that_is_forced_is_what_recovery_gets_and_what_it_replaced_stays() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new(15, 3);
    let own = scene.cluster.data_directory().join("pg_wal").join(&scene.segments[1]);
    let object = scene.object(&scene.segments[1]);
    let right = fs::read(&own).unwrap();
    // The other one is archived in its place: the same header, other records.
    let mut wrong = right.clone();
    wrong[200..].fill(0);
    fs::remove_file(&object).unwrap();
    fs::write(&own, &wrong).unwrap();
    push(&scene, &own, &[]).expect_code(0);
    fs::write(&own, &right).unwrap();
    let refused = push(&scene, &own, &[]).expect_code(1);
    assert!(refused.stderr.contains("already exists with different content"), "{}", refused.stderr);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    let standing = fs::read(&object).unwrap();
    push(&scene, &own, &["--force"]).expect_code(0);
    // The archiver asks once more, with and without it.
    push(&scene, &own, &["--force"]).expect_code(0);
    push(&scene, &own, &[]).expect_code(0);
    assert_eq!(fs::read(&object).unwrap(), standing);
    assert_eq!(forced(&scene).len(), 1);
    let mut fetched = scene.assert_recovers(scene.recovering("fetched", &scene.walden.restore_command()));
    let plan = fs::read_to_string(fetched.data_directory().join("walden.plan.json")).unwrap();
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!(plan["forced"], serde_json::json!([scene.segments[1]]));
    fetched.stop(Stop::Fast);
    let mount = scene.mount();
    let mut copied = scene.assert_recovers(scene.recovering("copied", &scene.cp()));
    copied.stop(Stop::Fast);
    drop(mount);
    let listed = scene.walden.json(&["wal", "list"]);
    assert_eq!(listed["clusters"][0]["timelines"][0]["runs"].as_array().unwrap().len(), 1, "{listed:#}");
}

#[test]
fn a_damaged_segment_is_refused_with_the_way_out_and_mended_by_it() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 3);
    let own = scene.cluster.data_directory().join("pg_wal").join(&scene.segments[1]);
    let object = scene.object(&scene.segments[1]);
    let mut bytes = fs::read(&object).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&object, &bytes).unwrap();
    scene.assert_stops(scene.recovering("stopped", &scene.walden.restore_command()), "is damaged");
    let refused = push(&scene, &own, &[]).expect_code(3);
    assert!(refused.stderr.contains("--force"), "{}", refused.stderr);
    push(&scene, &own, &["--force"]).expect_code(0);
    let mut recovered = scene.assert_recovers(scene.recovering("mended", &scene.walden.restore_command()));
    recovered.stop(Stop::Fast);
    // Damaged in its turn, it is not passed over for what it replaced.
    let forced = forced(&scene).remove(0);
    let mut bytes = fs::read(&forced).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&forced, &bytes).unwrap();
    scene.assert_stops(scene.recovering("again", &scene.walden.restore_command()), "is damaged");
    push(&scene, &own, &["--force"]).expect_code(0);
    let mut recovered =
        scene.assert_recovers(scene.recovering("mended-again", &scene.walden.restore_command()));
    recovered.stop(Stop::Fast);
}

fn forced(scene: &Scene) -> Vec<PathBuf> {
    let folder = scene.object(&scene.segments[1]).with_file_name("");
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.to_string_lossy().contains(".forced.")).collect()
}
