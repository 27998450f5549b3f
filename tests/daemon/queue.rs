//! `queue_max`: the volume of `pg_wal` does not fill up when the store fails, and nobody fails to hear of the gap.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::scene::Scene;
use crate::support::{Fault, Need, RemoteS3, require, wait_for};

/// Segments of 1 MiB that may wait.
const WAITING_MAX: usize = 8;
const LIMIT: &str = "[sites.main.archive]\nqueue_max = \"8MiB\"\n";

#[test]
fn failure_10_the_limit_holds_while_the_daemon_waits_for_a_store_that_hangs() {
    failure_10_the_limit_holds(true);
}

#[test]
fn failure_10_the_limit_holds_while_the_command_waits_for_a_store_that_hangs() {
    failure_10_the_limit_holds(false);
}

fn failure_10_the_limit_holds(with_daemon: bool) {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1h\"\ntimeout = \"1s\"\n");
    let scene = Scene::start(15, |site| site.storage(&storage).lines(LIMIT));
    let _daemon = with_daemon.then(|| scene.daemon());
    scene.archive();
    scene.archive_wal();
    assert_eq!(left_out(&scene)["status"], "ok");
    line.inject("", "", usize::MAX, Fault::Silence);
    let segments = scene.end_segments(3 * WAITING_MAX);
    wait_for("no more to wait than may", || (waiting(&scene) <= WAITING_MAX).then_some(()));
    let told = scene.log();
    assert!(told.contains(&format!("{} is NOT ARCHIVED", segments[0])), "{told}");
    // What may wait does.
    assert!(waiting(&scene) >= WAITING_MAX - 1, "{}", waiting(&scene));
    let state: Value = serde_json::from_slice(&fs::read(state_file(&scene)).unwrap()).unwrap();
    let gap = &state["gaps"][0];
    assert_eq!(gap["first"], segments[0].as_str(), "{state:#}");
    line.heal();
    scene.archive_wal();
    scene.assert_archived(segments.last().unwrap());
    let failed = left_out(&scene);
    assert_eq!(failed["status"], "failed", "{failed:#}");
    assert!(failed["detail"].as_str().unwrap().contains(segments[0].as_str()), "{failed:#}");

    let noted = fs::read(state_file(&scene)).unwrap();
    let taken = scene.walden.json(&["backup"]);
    let kept = fs::read_to_string(state_file(&scene)).unwrap_or_default();
    assert!(kept.is_empty(), "the basebackup lies behind the gap: {taken:#}\n{kept}");
    assert_eq!(left_out(&scene)["status"], "ok");
    // As where the basebackup was taken on another host.
    fs::write(state_file(&scene), &noted).unwrap();
    let before = left_out(&scene);
    assert_eq!(before["status"], "ok", "{before:#}");
    assert!(before["detail"].as_str().unwrap().contains("before a basebackup"), "{before:#}");
}

#[test]
fn a_gap_that_cannot_be_noted_is_not_made_and_without_a_limit_there_is_none() {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1s\"\ntimeout = \"1s\"\n");
    let scene = Scene::start(15, |site| site.storage(&storage).lines(LIMIT));
    let segments = scene.end_segments(2 * WAITING_MAX);
    line.inject("", "", usize::MAX, Fault::Silence);
    // A folder in the place of the file.
    fs::create_dir_all(state_file(&scene)).unwrap();
    scene.scratch().account().own(state_file(&scene).parent().unwrap());
    let refused = crate::support::Run::of(&mut scene.push(&segments[0]), "").expect_code(1);
    assert!(!refused.stderr.contains("NOT ARCHIVED"), "{}", refused.stderr);
    fs::remove_dir(state_file(&scene)).unwrap();
    let left_out = scene.pushed(&segments[0]);
    assert!(left_out.stderr.contains("NOT ARCHIVED"), "{}", left_out.stderr);
    take_limit_away(&scene);
    let failed = crate::support::Run::of(&mut scene.push(&segments[1]), "").expect_code(4);
    assert!(!failed.stderr.contains("NOT ARCHIVED"), "{}", failed.stderr);
}

/// Failure 9: PostgreSQL asks for a history before all else and would get no further, so that it is left out as well.
#[test]
fn a_history_that_was_left_out_is_archived_once_the_archive_takes_files_again() {
    a_history_that_was_left_out_is_archived(|_| {});
}

/// Whoever has had a gap once may not want the limit any more.
#[test]
fn a_history_that_was_left_out_is_archived_where_there_is_no_limit_any_more() {
    a_history_that_was_left_out_is_archived(take_limit_away);
}

#[track_caller]
fn a_history_that_was_left_out_is_archived(then: impl FnOnce(&Scene)) {
    require!(Need::PostgreSQL(15));
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1s\"\ntimeout = \"1s\"\n");
    let scene = Scene::start(15, |site| site.storage(&storage).lines(LIMIT));
    let segments = scene.end_segments(2 * WAITING_MAX);
    line.inject("", "", usize::MAX, Fault::Silence);
    let left_out = scene.pushed(&segments[0]);
    assert!(left_out.stderr.contains("NOT ARCHIVED"), "{}", left_out.stderr);
    let history = "00000002.history";
    fs::write(scene.segment(history), "1\t0/3000000\tno recovery target specified\n").unwrap();
    scene.scratch().account().own(&scene.segment(history));
    let left_out = scene.pushed(history);
    assert!(left_out.stderr.contains(&format!("{history} is NOT ARCHIVED")), "{}", left_out.stderr);
    assert!(fs::read_to_string(state_file(&scene)).unwrap().contains(history));
    line.heal();
    then(&scene);
    scene.archive();
    wait_for("the history to be archived", || {
        let listed = scene.walden.try_run(&["--json", "wal", "list"]);
        let listed: Value = serde_json::from_str(&listed.stdout).ok()?;
        let timelines = listed["clusters"][0]["timelines"].as_array()?.clone();
        timelines
            .iter()
            .any(|timeline| timeline["timeline"] == 2 && timeline["history"] == true)
            .then_some(())
    });
    wait_for("the note to go", || {
        (!fs::read_to_string(state_file(&scene)).unwrap().contains(history)).then_some(())
    });
    // What is lost is still told.
    assert_eq!(self::left_out(&scene)["status"], "failed");
    assert!(
        scene.log().contains(&format!("{history}, which was left out, is archived now")),
        "{}",
        scene.log()
    );
}

#[track_caller]
fn take_limit_away(scene: &Scene) {
    let configuration = scene.walden.configuration_file();
    let text = fs::read_to_string(&configuration).unwrap();
    assert!(text.contains(LIMIT), "{text}");
    fs::write(&configuration, text.replace(LIMIT, "")).unwrap();
}

/// Returns what `walden check` says of WAL that was left out.
fn left_out(scene: &Scene) -> Value {
    let run = scene.walden.try_run(&["--json", "check"]);
    let items: Vec<Value> = serde_json::Deserializer::from_str(&run.stdout)
        .into_iter::<Vec<Value>>()
        .next()
        .unwrap_or_else(|| panic!("{}", run.stderr))
        .unwrap();
    items.into_iter().find(|item| item["name"] == "WAL left out").expect("there is a limit")
}

fn state_file(scene: &Scene) -> PathBuf {
    scene.walden.configuration_file().with_file_name("state").join("wal-left-out/main.json")
}

fn waiting(scene: &Scene) -> usize {
    let status = fs::read_dir(scene.data_directory().join("pg_wal/archive_status")).unwrap();
    status.filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().ends_with(".ready")).count()
}
