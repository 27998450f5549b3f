//! What the daemon takes of the machine: bounded while it catches up, little while it waits.

use std::fs;
use std::time::SystemTime;

use crate::scene::Scene;
use crate::support::{Need, require, wait_for};

/// Behind a server that has written for a while; segments of the usual size, so that memory is what is short.
const SEGMENTS: usize = 24;
const LOADED_MIB_MAX: u64 = 300;
const IDLE_MIB_MAX: u64 = 40;

#[test]
fn it_catches_up_within_300_mib_and_waits_within_40() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::start_with_segments(15, 16, |site| site);
    let segments = scene.end_segments(SEGMENTS);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    wait_for("the segments behind it to be in the archive", || {
        segments.iter().all(|segment| daemon.log().contains(&format!("archived {segment}"))).then_some(())
    });
    let loaded = mebibytes(daemon.process(), "VmHWM:");
    assert!(loaded <= LOADED_MIB_MAX, "{loaded} MiB while it caught up");
    wait_for("the daemon to give memory back", || {
        (mebibytes(daemon.process(), "VmRSS:") <= IDLE_MIB_MAX).then_some(())
    });
}

#[test]
fn a_large_segment_is_never_whole_in_memory() {
    require!(Need::PostgreSQL(15));
    const MEBIBYTES: u32 = 128;
    let scene = Scene::start_with_segments(15, MEBIBYTES, |site| site);
    let segments = scene.end_segments(1);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    // Asked again, it compares the segment with what it has stored.
    fs::File::options()
        .append(true)
        .open(scene.segment(&segments[0]))
        .unwrap()
        .set_modified(SystemTime::now())
        .unwrap();
    scene.pushed(&segments[0]);
    let loaded = mebibytes(daemon.process(), "VmHWM:");
    assert!(loaded < u64::from(MEBIBYTES), "{loaded} MiB for a segment of {MEBIBYTES} MiB");
    scene.assert_archived(&segments[0]);
}

fn mebibytes(process: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() / 1024
}
