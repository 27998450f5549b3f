//! `kill -9` of the daemon after an acknowledgement, and in the middle of requests, over a store that fails all the
//! time: what was acknowledged is in the archive at that moment, whatever the daemon had still been going to do.
//!
//! `scripts/bench/kill-daemon` does it for many more pushes than a test run has time for.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use walden::catalog::PLAN_FILE_NAME;

use crate::scene::Scene;
use crate::support::{Fault, Need, RemoteS3, Run, require};

/// Acknowledged pushes, unless `WALDEN_KILL_PUSHES` says how many.
const PUSHES: usize = 10;
/// PostgreSQL tries again as well, for ever.
const ATTEMPTS_MAX: usize = 50;
/// Every so many requests meet a fault.
const FAULT_EVERY: usize = 3;

#[test]
fn nothing_that_was_acknowledged_is_missing_after_kill_9_under_a_failing_store() {
    require!(Need::PostgreSQL(15));
    let pushes = std::env::var("WALDEN_KILL_PUSHES").map_or(PUSHES, |text| text.parse().unwrap());
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"3s\"\ntimeout = \"1s\"\n");
    let scene = Scene::start(15, |site| site.storage(&storage));
    // The judge has a line of its own, which does not fail.
    let direct = scene.walden.configuration_file().with_file_name("direct.toml");
    let text = fs::read_to_string(scene.walden.configuration_file()).unwrap();
    fs::write(&direct, text.replace(&line.endpoint(), &line.server().endpoint())).unwrap();
    fs::set_permissions(&direct, fs::Permissions::from_mode(0o600)).unwrap();
    scene.scratch().account().own(&direct);
    let segments = scene.end_segments(pushes);
    assert_eq!(segments.len(), pushes);
    let refusal = Fault::refusal("503 Slow Down", "", "SlowDown");
    let status = |segment: &str, state: &str| {
        scene.data_directory().join(format!("pg_wal/archive_status/{segment}.{state}"))
    };
    // Every third segment is not looked ahead for, so that some are archived when they are asked for.
    for segment in segments.iter().skip(2).step_by(3) {
        fs::remove_file(status(segment, "ready")).unwrap();
    }
    line.disturb(FAULT_EVERY, [Fault::LoseAnswer, Fault::CutRequest, refusal, Fault::CutAnswer]);
    let (mut attempts, mut killed_at_work, mut created, mut state) = (0, 0, 0, 0x5eed_u64);
    for (n, segment) in segments.iter().enumerate() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let acknowledged = (0..ATTEMPTS_MAX).any(|_| {
            attempts += 1;
            let daemon = scene.daemon();
            let mut push = scene.push(segment);
            let mut push = push.arg("--json").stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
            if n % 2 == 1 {
                // Somewhere in the time that a push takes.
                std::thread::sleep(Duration::from_micros(state >> 47));
                killed_at_work += usize::from(push.try_wait().unwrap().is_none());
                daemon.signal(Signal::SIGKILL);
            }
            let output = push.wait_with_output().unwrap();
            daemon.kill();
            created += usize::from(String::from_utf8(output.stdout).unwrap().contains("\"created\": true"));
            output.status.success()
        });
        assert!(acknowledged, "{segment} was never acknowledged");
        // As PostgreSQL does; the next look-ahead begins behind it.
        if status(segment, "ready").exists() {
            fs::rename(status(segment, "ready"), status(segment, "done")).unwrap();
        }
        let mut fetch = Command::new(scene.walden.command().get_program());
        fetch.arg("--config").arg(&direct).args(["wal", "fetch", segment, "fetched"]);
        Run::of(fetch.current_dir(scene.data_directory()), "").expect_success();
        let fetched = scene.data_directory().join("fetched");
        assert!(
            fs::read(&fetched).unwrap() == fs::read(scene.segment(segment)).unwrap(),
            "{segment} came back different"
        );
        fs::remove_file(fetched).unwrap();
        fs::remove_file(scene.data_directory().join(PLAN_FILE_NAME)).unwrap();
    }
    let faults = line.heal();
    assert!(faults > 0, "the store never failed");
    assert!(created > 0, "no acknowledgement was of a segment that was put there for it");
    if let Ok(report) = std::env::var("WALDEN_KILL_REPORT") {
        let figures = json!({
            "acknowledged": pushes, "missing": 0, "attempts": attempts, "created": created,
            "killed_in_mid_request": killed_at_work, "store_faults": faults,
        });
        fs::write(report, figures.to_string()).unwrap();
    }
}
