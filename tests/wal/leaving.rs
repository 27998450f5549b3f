//! Two standbys leave one timeline, one after the other, while a third follows the archive: each promotion takes a
//! timeline of its own, every `.partial` is kept and none is taken for a segment (failures 2, 3, 9, 12b). Then the same with a
//! store that is silent whenever somebody is promoted, and a standby of the first that is promoted as well.
//!
//! Copies are made with the server stopped, because not every version that the tests have comes with pg_basebackup.

use std::fs;

use serde_json::{Value, json};

use crate::outage_report::report;
use crate::receive_scene::Receiver;
use crate::scene::{Scene, recover};
use crate::support::{Fault, Need, Proxy, RemoteS3, Server, Stop, require, wait_for};

#[test]
fn failure_12b_two_standbys_leave_one_timeline_on_13() {
    require!(Need::PostgreSQL(13));
    two_standbys_leave_one_timeline(13);
}

#[test]
fn failure_12b_two_standbys_leave_one_timeline_on_15() {
    require!(Need::PostgreSQL(15));
    two_standbys_leave_one_timeline(15);
}

#[test]
fn failure_12b_two_standbys_leave_one_timeline_on_18() {
    require!(Need::PostgreSQL(18));
    two_standbys_leave_one_timeline(18);
}

fn two_standbys_leave_one_timeline(major: u32) {
    let mut scene = Scene::new(major, 2);
    let mut daemon = Receiver::start_as(scene.cluster.scratch(), scene.walden.clone(), &["-vv", "daemon"]);
    let mut follower = scene.standby("follower", &scene.walden.restore_command());
    follower.start();
    let (mut first, mut second) = (streaming(&scene, "first"), streaming(&scene, "second"));
    for standby in [&first, &second] {
        wait_for_rows(standby, &["0", "1"]);
    }
    // The second one goes away; what it has of the segment is less than what the first one gets.
    scene.cluster.sql("insert into r values (2)");
    for standby in [&first, &second] {
        wait_for_rows(standby, &["0", "1", "2"]);
    }
    second.stop(Stop::Fast);
    scene.cluster.sql("insert into r values (3)");
    wait_for_rows(&first, &["0", "1", "2", "3"]);
    scene.cluster.stop(Stop::Kill);
    promote(&first);
    assert_eq!(timeline(&first), "2");
    first.sql("insert into r values (10)");
    assert!(first.archive_wal().starts_with("00000002"));
    wait_for_rows(&follower, &["0", "1", "2", "3", "10"]);
    // Left on the old timeline, it is given nothing of the segment that nobody archived whole.
    second.set("recovery_target_timeline", "current");
    second.start();
    wait_for_rows(&second, &["0", "1", "2"]);
    promote(&second);
    assert_eq!(timeline(&second), "3", "{}", second.log());
    second.sql("insert into r values (20)");
    assert!(second.archive_wal().starts_with("00000003"));
    // Both go on, and so does who follows the first of them.
    first.sql("insert into r values (11)");
    first.archive_wal();
    wait_for_rows(&follower, &["0", "1", "2", "3", "10", "11"]);
    second.sql("insert into r values (21)");
    second.archive_wal();
    assert!(follower.is_running());
    assert_eq!(follower.sql("select pg_is_in_recovery()"), "t");
    assert_archived(&scene);
    assert!(daemon.log().contains("00000003.history"), "not through the daemon:\n{}", daemon.log());
    for server in [&mut first, &mut second, &mut follower] {
        server.stop(Stop::Fast);
    }
    // Each timeline is recovered as it went; a recovery that opens takes the number behind all of them.
    let ways =
        [("2", "4", vec!["0", "1", "2", "3", "10", "11"]), ("3", "4", vec!["0", "1", "2", "20", "21"])];
    for (target, taken, rows) in &ways {
        let mut server = scene.recovering(&format!("recovered-{target}"), &scene.walden.restore_command());
        server.set("recovery_target_timeline", target);
        recover(&mut server).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(rows_of(&server), *rows, "{}", server.log());
        assert_eq!(timeline(&server), *taken, "{}", server.log());
        server.stop(Stop::Fast);
    }
    let promotions = follower.log().matches("archive recovery complete").count();
    report(&json!({
        "what": "two standbys leave one timeline", "major": major, "promotions": 2, "missing": 0,
        "promotions_by_error": promotions,
    }));
    assert_eq!(promotions, 0, "{}", follower.log());
    daemon.stop();
}

#[test]
fn failure_12b_standbys_are_promoted_while_the_store_is_silent_on_13() {
    require!(Need::PostgreSQL(13));
    standbys_are_promoted_while_the_store_is_silent(13);
}

#[test]
fn failure_12b_standbys_are_promoted_while_the_store_is_silent_on_15() {
    require!(Need::PostgreSQL(15));
    standbys_are_promoted_while_the_store_is_silent(15);
}

#[test]
fn failure_12b_standbys_are_promoted_while_the_store_is_silent_on_18() {
    require!(Need::PostgreSQL(18));
    standbys_are_promoted_while_the_store_is_silent(18);
}

/// 1 is left by the first and the second, and the first's timeline by a standby of it: 1→2→3 and 1→4.
fn standbys_are_promoted_while_the_store_is_silent(major: u32) {
    let line = RemoteS3::start();
    let mut scene = Scene::in_store(&line.storage(IMPATIENT_STORE), major, 2);
    let mut daemon = Receiver::start_as(scene.cluster.scratch(), scene.walden.clone(), &["-vv", "daemon"]);
    let (mut first, mut second) = (streaming(&scene, "first"), streaming(&scene, "second"));
    let mut third = streaming_from(&first, &scene, "third");
    scene.cluster.sql("insert into r values (2)");
    for standby in [&first, &second, &third] {
        wait_for_rows(standby, &["0", "1", "2"]);
    }
    second.stop(Stop::Fast);
    scene.cluster.sql("insert into r values (3)");
    for standby in [&first, &third] {
        wait_for_rows(standby, &["0", "1", "2", "3"]);
    }

    line.inject_only(Fault::Silence);
    scene.cluster.stop(Stop::Kill);
    promote_in_silence(&first, "2", &line);
    first.sql("insert into r values (10)");
    assert!(first.archive_wal().starts_with("00000002"));
    // It stands in a segment that nobody archives whole.
    first.sql("insert into r values (11)");
    wait_for_rows(&third, &["0", "1", "2", "3", "10", "11"]);

    line.inject_only(Fault::Silence);
    first.stop(Stop::Kill);
    promote_in_silence(&third, "3", &line);
    third.sql("insert into r values (30)");
    assert!(third.archive_wal().starts_with("00000003"));

    second.set("recovery_target_timeline", "current");
    second.start();
    wait_for_rows(&second, &["0", "1", "2"]);
    // PostgreSQL takes a history that its restore_command fails to fetch for a number that is free, and this server has
    // none of them itself: so it is told, and what it archives meets the silence.
    line.let_through("GET", "");
    line.let_through("HEAD", "");
    line.inject("", "", usize::MAX, Fault::Silence);
    line.take_requests();
    promote(&second);
    wait_for("something to be archived in vain", || {
        line.take_requests().iter().any(|head| head.starts_with("PUT ")).then_some(())
    });
    line.heal();
    assert_eq!(timeline(&second), "4", "{}", second.log());
    for (server, row, timeline) in [(&second, "20", "00000004"), (&third, "31", "00000003")] {
        server.sql(&format!("insert into r values ({row})"));
        assert!(server.archive_wal().starts_with(timeline));
    }

    assert_ways(&scene, &[(2, 1), (3, 2), (4, 1)], &[2, 1, 0, 0]);
    assert!(daemon.log().contains("00000004.history"), "not through the daemon:\n{}", daemon.log());
    for server in [&mut second, &mut third] {
        server.stop(Stop::Fast);
    }
    let ways = [("3", vec!["0", "1", "2", "3", "10", "11", "30", "31"]), ("4", vec!["0", "1", "2", "20"])];
    for (target, rows) in &ways {
        let mut server = scene.recovering(&format!("recovered-{target}"), &scene.walden.restore_command());
        server.set("recovery_target_timeline", target);
        recover(&mut server).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(rows_of(&server), *rows, "{target}: {}", server.log());
        assert_eq!(timeline(&server), "5", "{target}: {}", server.log());
        server.stop(Stop::Fast);
    }
    report(&json!({
        "what": "standbys promoted while the store is silent", "major": major, "promotions": 3, "missing": 0,
        "promotions_by_error": 0,
    }));
    daemon.stop();
}

/// As short as the silence.
const IMPATIENT_STORE: &str = "timeout = \"1s\"\nretry = \"2s\"\n";

/// Promotes a standby that the store says nothing to, and brings the store back.
#[track_caller]
fn promote_in_silence(standby: &Server, number: &str, line: &Proxy) {
    promote(standby);
    assert!(line.heal() > 0, "nothing was asked of the store while it was silent");
    assert_eq!(timeline(standby), number, "{}", standby.log());
}

/// Starts a standby that streams, and archives once it is promoted.
#[track_caller]
pub fn streaming(scene: &Scene, name: &str) -> Server {
    streaming_from(&scene.cluster, scene, name)
}

/// The same with another primary, which may be a standby itself.
#[track_caller]
fn streaming_from(primary: &Server, scene: &Scene, name: &str) -> Server {
    let mut standby = scene.standby(name, &scene.walden.restore_command());
    standby.set("primary_conninfo", &primary.connection()).set("archive_mode", "on");
    standby.start();
    standby
}

/// Promotes a standby and waits until its control file says so.
#[track_caller]
pub fn promote(standby: &Server) {
    standby.sql("select pg_promote()");
    wait_for("the standby to be promoted", || {
        (standby.sql("select pg_is_in_recovery()") == "f").then_some(())
    });
    // The number of the timeline is there from the next checkpoint on.
    standby.sql("checkpoint");
}

/// Returns the timeline a server is on, by its control file.
pub fn timeline(server: &Server) -> String {
    server.sql("select timeline_id from pg_control_checkpoint()")
}

fn rows_of(server: &Server) -> Vec<String> {
    server.sql("select n from r order by n").lines().map(str::to_owned).collect()
}

#[track_caller]
fn wait_for_rows(standby: &Server, rows: &[&str]) {
    wait_for(&format!("rows {rows:?}"), || {
        let found = standby.try_sql("select n from r order by n").ok()?;
        found.lines().eq(rows.iter().copied()).then_some(())
    });
}

/// Checks that the archive has both ways without a hole, their history files, and what each left of the old timeline.
#[track_caller]
fn assert_archived(scene: &Scene) {
    // Each standby has another beginning of the segment.
    assert_ways(scene, &[(2, 1), (3, 1)], &[2, 0, 0]);
    let history = |server: &str, timeline: &str| {
        fs::read(scene.cluster.scratch().path().join(format!("{server}/pg_wal/{timeline}.history"))).unwrap()
    };
    assert_ne!(history("first", "00000002"), history("second", "00000003"));
}

/// Checks that the archive has these timelines behind the first, each with its parent, its history and no hole, and so many
/// `.partial`s of each, the first too.
#[track_caller]
fn assert_ways(scene: &Scene, expected: &[(u32, u32)], partials: &[usize]) {
    let listed = scene.walden.json(&["wal", "list"]);
    let timelines = listed["clusters"][0]["timelines"].as_array().unwrap();
    let of = |timeline: &Value| (timeline["timeline"].clone(), timeline["parent"].clone());
    let ways: Vec<(Value, Value)> = timelines.iter().map(of).collect();
    let expected: Vec<(Value, Value)> =
        expected.iter().map(|(number, parent)| (json!(number), json!(parent))).collect();
    assert_eq!(ways[1..], expected, "{listed:#}");
    for timeline in &timelines[1..] {
        assert_eq!(timeline["history"], true, "{listed:#}");
        assert_eq!(timeline["runs"].as_array().unwrap().len(), 1, "{listed:#}");
    }
    let left = timelines.iter().map(|timeline| timeline["partials"].as_array().map_or(0, Vec::len));
    assert_eq!(left.collect::<Vec<_>>(), partials, "{listed:#}");
    let check = scene.walden.json(&["wal", "check"]);
    assert_eq!(check["ok"], true, "{check:#}");
}
