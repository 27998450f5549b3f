//! One round of WAL on each major version: out of a server through the daemon, back by `wal fetch` and by `cp` from the mount,
//! over a promotion with its history file and its `.partial`, and received from the new primary.
//!
//! The oldest and the newest version are in every run of the tests; `scripts/bench/wal-majors` asks for all there are, here, of
//! the failures that must not promote and of the standby that follows a store that fails.

use std::env;
use std::fs;

use serde_json::json;

use crate::leaving::{promote, streaming, timeline};
use crate::outage_report::report;
use crate::receive_scene::Receiver;
use crate::scene::{Scene, recover};
use crate::support::{Need, Server, Site, Stop, require, wait_for};

/// Rows before the promotion, each in a segment of its own but the last, which is in the `.partial`.
const ROWS: usize = 4;

#[test]
fn a_round_of_wal_on_13() {
    require!(Need::PostgreSQL(13), Need::Fuse);
    round(13);
}

#[test]
fn a_round_of_wal_on_18() {
    require!(Need::PostgreSQL(18), Need::Fuse);
    round(18);
}

/// Majors come from the script, each with a line of the report.
#[test]
fn a_round_of_wal_on_the_majors_that_the_script_asks_for() {
    for major in asked_for() {
        require!(Need::PostgreSQL(major), Need::Fuse);
        round(major);
    }
}

/// Returns the majors that `scripts/bench/wal-majors` asks for.
pub fn asked_for() -> Vec<u32> {
    let majors = env::var("WALDEN_WAL_MAJORS").unwrap_or_default();
    majors.split_whitespace().map(|major| major.parse().unwrap()).collect()
}

fn round(major: u32) {
    let mut scene = Scene::new(major, 0);
    let mut daemon = Receiver::start_as(scene.cluster.scratch(), scene.walden.clone(), &["-vv", "daemon"]);
    (1..ROWS).for_each(|_| scene.archive_row());
    assert!(daemon.log().contains(&format!("archived {}", scene.segments[0])), "{}", daemon.log());
    let mount = scene.mount();
    for (name, command) in [("fetched", scene.walden.restore_command()), ("copied", scene.cp())] {
        scene.assert_recovers(scene.recovering(name, &command)).stop(Stop::Fast);
    }

    let mut standby = streaming(&scene, "standby");
    scene.cluster.sql(&format!("insert into r values ({})", ROWS - 1));
    wait_for("the row to be streamed", || (Scene::rows(&standby) == ROWS).then_some(()));
    scene.cluster.stop(Stop::Kill);
    promote(&standby);
    standby.sql(&format!("insert into r values ({ROWS})"));
    standby.archive_wal();
    let listed = scene.walden.json(&["wal", "list"]);
    let timelines = &listed["clusters"][0]["timelines"];
    assert_eq!(timelines[0]["partials"].as_array().unwrap().len(), 1, "{listed:#}");
    assert_eq!((&timelines[1]["timeline"], &timelines[1]["parent"]), (&json!(2), &json!(1)), "{listed:#}");
    for (name, command) in [("fetched-2", scene.walden.restore_command()), ("copied-2", scene.cp())] {
        let mut recovered = scene.recovering(name, &command);
        recover(&mut recovered).unwrap_or_else(|log| panic!("{log}"));
        assert_eq!(Scene::rows(&recovered), ROWS + 1, "{name}: {}", recovered.log());
        assert_eq!(timeline(&recovered), "3", "{name}");
        recovered.stop(Stop::Fast);
    }
    drop(mount);
    let received = receive(&scene, &mut daemon, &standby);
    let check = scene.walden.json(&["wal", "check"]);
    assert_eq!(check["ok"], true, "{check:#}");
    report(&json!({
        "what": "round", "major": major, "version": standby.sql("show server_version"),
        "pushed": scene.segments.len(), "fetched": true, "copied": true, "promoted": true, "received": received,
        "missing": 0,
    }));
    standby.stop(Stop::Fast);
    daemon.stop();
}

/// Has the daemon receive from the new primary what was pushed so far; returns how many segments came that way.
#[track_caller]
fn receive(scene: &Scene, daemon: &mut Receiver, primary: &Server) -> usize {
    daemon.stop();
    primary.set_archive_command("true");
    let site = Site::of(primary, primary.data_directory())
        .bin_directory(&primary.bin_directory())
        .key("wal = \"receive\"");
    daemon.walden.reconfigure(scene.cluster.scratch(), &site);
    daemon.start_again();
    daemon.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    let mut segments = Vec::new();
    for row in ["100", "101", "102"] {
        primary.sql(&format!("insert into r values ({row})"));
        segments.push(primary.sql("select pg_walfile_name(pg_switch_wal())"));
    }
    daemon.wait_until_stored(primary);
    for segment in &segments {
        let own = fs::read(primary.data_directory().join("pg_wal").join(segment)).unwrap();
        assert!(daemon.fetch(primary, segment).as_deref() == Some(&own[..]), "{segment} differs");
    }
    let runs = daemon.runs(2);
    assert_eq!(runs.len(), 1, "{runs:?}\n{}", daemon.log());
    assert_eq!(daemon.state()["gaps"], json!([]), "{:#}", daemon.state());
    segments.len()
}
