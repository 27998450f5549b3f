//! Segments that come into the archive in any order, and an archive that ends behind a hole: whoever recovers goes as far
//! as there is no gap, and never takes a gap for the end (failures 1, 7 and 21b).
//!
//! `scripts/bench/wal-outage` does the first with more segments.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::outage_report::report;
use crate::receive_scene::{Receiver, cluster, site};
use crate::scene::{Scene, copy_all, recover, shell};
use crate::support::{Need, Run, Server, Stop, Walden, require, wait_for};

/// Segments that come out of order, unless `WALDEN_ARRIVAL_SEGMENTS` says how many.
const SEGMENTS: usize = 9;

/// Ends so many segments with a row each while nothing archives them; returns their names.
#[track_caller]
fn unarchived(scene: &mut Scene, count: usize) -> Vec<String> {
    scene.cluster.set_archive_command("false");
    let mut segments: Vec<String> = Vec::new();
    while segments.len() < count {
        let row = scene.segments.len() + segments.len();
        scene.cluster.sql(&format!("insert into r values ({row})"));
        let segment = scene.cluster.sql("select pg_walfile_name(pg_switch_wal())");
        // The archiver may not have heard yet.
        if segments.is_empty() && was_archived(scene, &segment) {
            scene.segments.push(segment);
        } else {
            segments.push(segment);
        }
    }
    segments
}

/// Waits until the archiver has tried a segment, and says whether it is archived.
#[track_caller]
fn was_archived(scene: &Scene, segment: &str) -> bool {
    wait_for("the archiver to try", || {
        let tried = scene.cluster.rows("select last_archived_wal, last_failed_wal from pg_stat_archiver");
        tried[0].iter().position(|name| name == segment).map(|column| column == 0)
    })
}

#[track_caller]
fn push(scene: &Scene, segment: &str) {
    let mut command = scene.walden.command();
    command.args(["wal", "push", &format!("pg_wal/{segment}")]).current_dir(scene.cluster.data_directory());
    Run::of(&mut command, "").expect_success();
}

/// Returns how many segments `wal check` finds missing, and whether it is content.
#[track_caller]
fn missing(walden: &Walden) -> (u64, bool) {
    let run = walden.try_run(&["--output", "json", "wal", "check"]);
    let check: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("{}", run.stderr));
    let holes = check["clusters"][0]["missing"].as_array().cloned().unwrap_or_default();
    let segments = holes.iter().map(|hole| hole["segments"].as_u64().unwrap()).sum();
    assert_eq!(check["ok"] == true, run.success(), "{check:#}");
    (segments, run.success())
}

#[track_caller]
fn wait_for_rows(standby: &mut Server, rows: usize) {
    wait_for(&format!("{rows} rows on the standby"), || {
        assert!(standby.is_running(), "{}", standby.log());
        (standby.try_sql("select count(*) from r") == Ok(rows.to_string())).then_some(())
    });
}

#[test]
fn what_arrives_out_of_order_is_followed_as_far_as_there_is_no_gap() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::new(15, 2);
    let count = env::var("WALDEN_ARRIVAL_SEGMENTS").map_or(SEGMENTS, |text| text.parse().unwrap());
    let segments = unarchived(&mut scene, count);
    let archived = scene.segments.len();
    let mut standby = scene.standby("standby", &scene.walden.restore_command());
    standby.start();
    wait_for_rows(&mut standby, archived);
    // The last one comes first, so that there is a gap until the end; the others by a seed.
    let mut order: Vec<usize> = (0..count - 1).collect();
    let mut seed = 20_261_121_u64;
    for end in (1..order.len()).rev() {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(end, (seed >> 33) as usize % (end + 1));
    }
    order.insert(0, count - 1);
    let (mut there, mut gaps) = (vec![false; count], 0);
    for index in order {
        push(&scene, &segments[index]);
        there[index] = true;
        let without_gap = there.iter().take_while(|there| **there).count();
        let (holes, content) = missing(&scene.walden);
        assert_eq!(holes as usize, there.iter().filter(|there| !**there).count());
        assert_eq!(content, without_gap == count);
        gaps += usize::from(!content);
        wait_for_rows(&mut standby, archived + without_gap);
        assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    }
    let promotions = standby.log().matches("selected new timeline").count();
    report(&json!({
        "what": "out of order", "segments": count, "gaps": gaps, "missing": missing(&scene.walden).0,
        "promotions_by_error": promotions,
    }));
    assert_eq!(promotions, 0, "{}", standby.log());
    standby.stop(Stop::Fast);
    scene.segments.extend(segments);
    scene.assert_recovers(scene.recovering("recovered", &scene.walden.restore_command())).stop(Stop::Fast);
}

#[test]
fn a_hole_before_the_last_thing_archived_stops_recovery_whatever_its_target_and_a_standby_waits() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::new(15, 3);
    let segments = unarchived(&mut scene, 2);
    let archived = scene.segments.len();
    let target = scene.cluster.sql("select pg_current_wal_lsn()");
    scene.cluster.sql("select pg_logical_emit_message(true, 'test', 'behind the target')");
    let last = scene.cluster.sql("select pg_walfile_name(pg_switch_wal())");
    // What recovery would need first is not there.
    push(&scene, &segments[1]);
    push(&scene, &last);
    assert_eq!(missing(&scene.walden), (1, false));
    let restore_command = scene.walden.restore_command();
    let mut stopped = 0;
    for action in ["promote", "pause", "shutdown"] {
        let mut server = scene.recovering(action, &restore_command);
        server.set("recovery_target_lsn", &target).set("recovery_target_action", action);
        scene.assert_stops(server, &format!("{} is missing", segments[0]));
        stopped += 1;
    }
    scene.assert_stops(scene.recovering("end", &restore_command), &format!("{} is missing", segments[0]));
    // A standby asks for it again and again.
    let asked = scene.cluster.scratch().path().join("asked");
    let asking = format!("echo %f >> {}; {restore_command}", asked.display());
    let mut standby = scene.standby("standby", &asking);
    standby.start();
    wait_for_rows(&mut standby, archived);
    let times = || fs::read_to_string(&asked).unwrap().matches(&segments[0]).count();
    let before = times();
    wait_for("the standby to ask for the hole again", || (times() >= before + 3).then_some(()));
    wait_for_rows(&mut standby, archived);
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    // Filled, everybody goes on where he stopped.
    push(&scene, &segments[0]);
    assert_eq!(missing(&scene.walden), (0, true));
    let rows = archived + segments.len();
    wait_for_rows(&mut standby, rows);
    let promotions = standby.log().matches("selected new timeline").count();
    report(&json!({
        "what": "hole before the end", "recoveries_stopped": stopped + 1, "missing": 0, "promotions_by_error": promotions,
    }));
    assert_eq!(promotions, 0, "{}", standby.log());
    standby.stop(Stop::Fast);
    let scratch = scene.cluster.scratch();
    let mut again = Server::new(15, &scratch.path().join("end"), &scratch.folder("run"));
    again.set("restore_command", &restore_command).set("archive_mode", "off").set("hot_standby", "off");
    recover(&mut again).unwrap();
    assert_eq!(Scene::rows(&again), rows, "{}", again.log());
    again.stop(Stop::Fast);
}

/// The hole is the last thing itself: nothing is behind it, and a head that the receiver signed says that there was more.
#[test]
fn a_lost_end_that_a_head_speaks_of_is_missing_and_not_the_end() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let mut cluster = cluster(15);
    let lines = site(&cluster).lines("[sites.main.archive]\nfetch_wait = \"1s\"\n");
    cluster.sql("create table r (n int)");
    let mut receiver = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &lines));
    receiver.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    receiver.walden.run(&["backup"]);
    let mut segments = Vec::new();
    for row in 0..3 {
        cluster.sql(&format!("insert into r values ({row})"));
        segments.push(cluster.sql("select pg_walfile_name(pg_switch_wal())"));
    }
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    // A head is signed when receiving begins, and then from time to time.
    let archive = receiver.walden.repository();
    let files = |part: &str| -> Vec<PathBuf> {
        let found = shell(&archive, &format!("find . -type f -path '*{part}*'"));
        found.lines().map(|path| archive.join(path)).collect()
    };
    let heads = files("/heads/").len();
    receiver.start_again();
    wait_for("another head", || (files("/heads/").len() > heads).then_some(()));
    receiver.stop();
    assert_eq!(missing(&receiver.walden), (0, true));
    let planned = cluster.scratch().path().join("planned");
    receiver.walden.run(&["restore", "--target-dir", planned.to_str().unwrap()]);
    let unplanned = cluster.scratch().path().join("unplanned");
    copy_all(&planned, &unplanned);
    fs::remove_file(unplanned.join("walden.plan.json")).unwrap();
    cluster.stop(Stop::Fast);
    let of_end = |path: &Path| path.file_name().unwrap().to_str().unwrap() >= segments[2].as_str();
    files("/wal/").iter().filter(|path| of_end(path)).for_each(|path| fs::remove_file(path).unwrap());
    let (holes, content) = missing(&receiver.walden);
    assert!(holes >= 1 && !content, "{holes}");
    for data in [planned, unplanned] {
        let mut server = Server::new(15, &data, &cluster.scratch().folder("run2"));
        server.set("archive_mode", "off").set("hot_standby", "off");
        let log = recover(&mut server).expect_err("it recovered without its end");
        assert!(log.contains(&format!("{} is missing", segments[2])), "{log}");
        assert!(!log.contains("archive recovery complete"), "{log}");
    }
    report(&json!({ "what": "lost end", "recoveries_stopped": 2, "missing": 0, "promotions_by_error": 0 }));
}
