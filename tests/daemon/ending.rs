//! A daemon that ends, or hangs, or has a store that hangs: nothing is acknowledged that is not there, nobody waits on.

use std::process::Stdio;

use nix::sys::signal::Signal;

use crate::scene::Scene;
use crate::support::{Fault, Need, RemoteS3, Run, Stop, require, wait_for};

/// The store is waited for longer than the tests are: what ends earlier did not wait for it.
const PATIENT: &str = "retry = \"1h\"\ntimeout = \"1h\"\n";

#[test]
fn sigterm_ends_it_in_the_middle_of_an_upload_to_a_store_that_hangs() {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage(PATIENT);
    let scene = Scene::start(15, |site| site.storage(&storage));
    let segments = scene.end_segments(4);
    let mut daemon = scene.daemon();
    scene.pushed(&segments[0]);
    wait_for("look-ahead to have come to its end", || scene.is_stored(&segments[3]).then_some(()));
    let segments = scene.end_segments(3);
    line.inject("PUT", "", usize::MAX, Fault::Silence);
    line.take_requests();
    let push = scene.push(&segments[0]).stderr(Stdio::piped()).spawn().unwrap();
    // Nobody asked for the others, and none of them ends: they are under way side by side.
    let mut heads: Vec<String> = Vec::new();
    wait_for("the uploads of all of them", || {
        heads.extend(line.take_requests());
        let is_put = |segment: &String| {
            heads.iter().any(|head| head.starts_with("PUT ") && head.contains(segment.as_str()))
        };
        segments.iter().all(is_put).then_some(())
    });
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success(), "{}", daemon.log());
    let output = push.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("the daemon was ended before the file was in the archive"), "{message}");
    assert!(!scene.socket().exists());
    // Nothing is left that stands in the way of the next one.
    line.heal();
    let _daemon = scene.daemon();
    for segment in &segments {
        scene.pushed(segment);
        scene.assert_archived(segment);
    }
}

/// Failure 20: a shutdown hung because nothing could archive any more.
#[test]
fn failure_20_the_server_shuts_down_while_the_daemon_hangs() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::start(15, |site| site);
    let daemon = scene.daemon();
    scene.archive();
    scene.archive_wal();
    daemon.signal(Signal::SIGSTOP);
    scene.sql("select pg_logical_emit_message(false, 'test', 'a record')");
    let segment = scene.sql("select pg_walfile_name(pg_switch_wal())");
    scene.cluster.stop(Stop::Fast);
    // The command has done without it.
    assert!(scene.is_stored(&segment), "{}", scene.log());
    scene.assert_archived(&segment);
    daemon.signal(Signal::SIGCONT);
}

#[test]
fn a_daemon_that_is_killed_in_mid_request_is_done_without() {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage(PATIENT);
    let scene = Scene::start(15, |site| site.storage(&storage));
    let segments = scene.end_segments(1);
    let daemon = scene.daemon();
    wait_for("the daemon to have opened the site", || {
        line.take_requests().iter().any(|head| head.contains("site.json")).then_some(())
    });
    wait_for("the site to be there", || line.folder().join("main/site.json").exists().then_some(()));
    line.inject("PUT", &segments[0], usize::MAX, Fault::Silence);
    let push = scene.push(&segments[0]).stderr(Stdio::piped()).spawn().unwrap();
    let asked = |head: &String| head.starts_with("PUT") && head.contains(&segments[0]);
    wait_for("the upload", || line.take_requests().iter().any(asked).then_some(()));
    daemon.signal(Signal::SIGSTOP);
    line.heal();
    daemon.kill();
    let output = push.wait_with_output().unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{message}");
    assert!(message.contains("archiving without the daemon"), "{message}");
    scene.assert_archived(&segments[0]);
}

#[test]
fn a_store_that_fails_is_the_commands_failure_and_no_acknowledgement() {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"2s\"\n");
    let scene = Scene::start(15, |site| site.storage(&storage));
    let segments = scene.end_segments(3);
    let daemon = scene.daemon();
    scene.pushed(&segments[0]);
    wait_for("look-ahead to have come to its end", || scene.is_stored(&segments[2]).then_some(()));
    let segments = scene.end_segments(3);
    line.inject("PUT", "", usize::MAX, Fault::refusal("503 Slow Down", "", "SlowDown"));
    let failed = Run::of(&mut scene.push(&segments[0]), "").expect_code(4);
    assert!(failed.stderr.contains("error: "), "{}", failed.stderr);
    line.heal();
    // What failed ahead of being asked for is not remembered either.
    for segment in &segments {
        scene.pushed(segment);
        scene.assert_archived(segment);
    }
    drop(daemon);
}
