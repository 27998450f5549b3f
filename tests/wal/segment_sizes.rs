//! Segments of other sizes than 16 MiB, out of a server, into a basebackup and back (failures 6 and 7).
//!
//! Each server begins just before the end of a log, so that the successor of its last segment (`FF` at 16 MiB) is met.
//! `scripts/bench/wal-segsize` asks for sizes that are too large for every day; `receive_servers` does the same by streaming.

use std::env;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;

use crate::scene::Scene;
use crate::support::{Need, Stop, require, wait_for};

/// Segments that are archived, of two logs.
const SEGMENTS: usize = 3;
const LOG_MIB: u32 = 4096;
/// Above this size a segment is stored in parts.
pub const ONE_OBJECT_MIB: u32 = 64;

#[test]
fn segments_of_1_mib_come_back_across_the_end_of_a_log() {
    come_back(1);
}

#[test]
fn segments_of_64_mib_come_back_across_the_end_of_a_log() {
    come_back(64);
}

#[test]
fn segments_of_128_mib_come_back_from_their_parts_across_the_end_of_a_log() {
    come_back(128);
}

/// Sizes in MiB come from the script, each a run with a line of the report.
#[test]
fn segments_of_the_sizes_that_the_script_asks_for_come_back() {
    asked_for().into_iter().for_each(come_back);
}

/// Returns the sizes in MiB that the script asks for.
pub fn asked_for() -> Vec<u32> {
    let sizes = env::var("WALDEN_WAL_SEGSIZES").unwrap_or_default();
    sizes.split(' ').filter(|size| !size.is_empty()).map(|mib| mib.parse().unwrap()).collect()
}

/// Failure 17 for a push: between any two parts of a segment, and between the last one and the index.
#[test]
fn failure_17_a_push_that_is_killed_among_its_parts_leaves_no_segment_and_the_next_one_stores_it() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut scene = Scene::with_segments_of(128, 15, 0, None);
    scene.archive_row();
    let segment = scene.segments[0].clone();
    let (index, own) = (scene.object(&segment), scene.cluster.data_directory().join("pg_wal").join(&segment));
    let folder = index.with_file_name("");
    let objects = || {
        let paths = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        let of_segment = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(&segment);
        paths.filter(of_segment).collect::<Vec<_>>()
    };
    let push = || {
        let mut command = scene.walden.command();
        command.args(["wal", "push"]).arg(&own).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let mut among_parts = 0;
    for parts in 1..=4 {
        objects().iter().for_each(|object| fs::remove_file(object).unwrap());
        let mut pushing = push();
        wait_for("so many parts", || {
            (objects().len() >= parts || pushing.try_wait().unwrap().is_some()).then_some(())
        });
        pushing.kill().unwrap();
        pushing.wait().unwrap();
        among_parts += usize::from(!index.exists());
        assert!(index.exists() || !objects().is_empty(), "it was killed before it stored anything");
        assert!(push().wait().unwrap().success(), "{parts}");
        assert!(index.exists(), "{parts}");
        scene.assert_fetched(&segment);
    }
    assert!(among_parts > 0, "no kill fell among the parts");
}

fn come_back(mib: u32) {
    require!(Need::PostgreSQL(15), Need::Fuse);
    // Of the second log: servers with large segments come to the end of the first before they are set to it.
    let first = format!("0000000100000001{:08X}", LOG_MIB / mib - 2);
    let mut scene = Scene::with_segments_of(mib, 15, 0, Some(&first));
    let began = Instant::now();
    (0..SEGMENTS).for_each(|_| scene.archive_row());
    let pushed = began.elapsed().as_secs_f64();
    assert!(scene.segments.iter().any(|name| name == "000000010000000200000000"), "{:?}", scene.segments);
    scene.walden.run(&["backup", "--checkpoint", "fast"]);
    assert_listed_without_a_hole(&scene, mib);
    if mib > ONE_OBJECT_MIB {
        let folder = scene.object(&scene.segments[0]).with_file_name("");
        let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let parts = names.filter(|name| name.to_string_lossy().ends_with(".part")).count();
        assert!(parts as u32 >= mib / ONE_OBJECT_MIB, "{parts}");
    }
    let began = Instant::now();
    let mut fetched = scene.assert_recovers(scene.recovering("fetched", &scene.walden.restore_command()));
    let fetched_in = began.elapsed().as_secs_f64();
    fetched.stop(Stop::Fast);
    fs::remove_dir_all(fetched.data_directory()).unwrap();
    let mount = scene.mount();
    let mut copied = scene.assert_recovers(scene.recovering("copied", &scene.cp()));
    copied.stop(Stop::Fast);
    drop(mount);
    report(&format!(
        r#"{{"segment_mib":{mib},"segments":{SEGMENTS},"push_seconds":{pushed:.1},"recovery_seconds":{fetched_in:.1},"recovered":true}}"#
    ));
}

#[track_caller]
fn assert_listed_without_a_hole(scene: &Scene, mib: u32) {
    let listed = scene.walden.json(&["wal", "list"]);
    let cluster = &listed["clusters"][0];
    assert_eq!(cluster["segment_bytes"], mib << 20, "{listed:#}");
    // Before that there is what the server wrote before it was set to its segment.
    let newest = cluster["timelines"][0]["runs"].as_array().unwrap().last().unwrap();
    assert!(newest["first"].as_str().unwrap() <= scene.segments[0].as_str(), "{listed:#}");
    assert!(newest["last"].as_str().unwrap() >= scene.segments[SEGMENTS - 1].as_str(), "{listed:#}");
}

/// Writes a line for the script, which is there only if everything before it was as it should be.
pub fn report(line: &str) {
    let Ok(path) = env::var("WALDEN_WAL_SEGSIZE_REPORT") else { return };
    let mut file = OpenOptions::new().append(true).create(true).open(path).unwrap();
    writeln!(file, "{line}").unwrap();
}
