//! Receiving over switches of the timeline: while nobody receives, behind what was received, and with commits that wait.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::receive::write_segments;
use crate::receive_damage::begin_timeline;
use crate::receive_scene::{Receiver, cluster, lsn, site};
use crate::scene::base_backup;
use crate::support::{Need, Running, Server, Site, Stop, Walden, program, require, wait_for};

/// Returns where a timeline of a server was begun.
#[track_caller]
fn switch_point(server: &Server, timeline: u32) -> u64 {
    let history = server.data_directory().join(format!("pg_wal/{timeline:08X}.history"));
    let history = fs::read_to_string(history).unwrap();
    lsn(history.lines().last().unwrap().split('\t').nth(1).unwrap())
}

/// Checks that a timeline is in the archive from the segment on in which it was begun, and so is its history.
#[track_caller]
fn assert_received(receiver: &Receiver, server: &Server, timeline: u32, at_least: usize) {
    receiver.assert_equals_pg_wal(server, timeline.into(), at_least);
    let switch = switch_point(server, timeline);
    let begun = format!("{timeline:08X}{:08X}{:08X}", switch >> 32, (switch & 0xFFFF_FFFF) >> 20);
    assert_eq!(receiver.runs(timeline.into())[0].0, begun);
    let name = format!("{timeline:08X}.history");
    let own = fs::read(server.data_directory().join("pg_wal").join(&name)).unwrap();
    assert_eq!(receiver.fetch(server, &name).as_deref(), Some(&own[..]));
}

#[test]
fn two_switches_while_nobody_receives_are_followed_one_after_the_other_on_13() {
    require!(Need::PostgreSQL(13));
    two_switches_are_followed_one_after_the_other(13);
}

#[test]
fn two_switches_while_nobody_receives_are_followed_one_after_the_other_on_15() {
    require!(Need::PostgreSQL(15));
    two_switches_are_followed_one_after_the_other(15);
}

#[test]
fn two_switches_while_nobody_receives_are_followed_one_after_the_other_on_18() {
    require!(Need::PostgreSQL(18));
    two_switches_are_followed_one_after_the_other(18);
}

#[track_caller]
fn two_switches_are_followed_one_after_the_other(major: u32) {
    let mut cluster = cluster(major);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    for _ in 0..2 {
        write_segments(&cluster, 2);
        cluster.sql("create table if not exists r (n int); insert into r values (1)");
        begin_timeline(&mut cluster);
    }
    write_segments(&cluster, 2);
    receiver.start_again();
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 3);
    assert_received(&receiver, &cluster, 2, 2);
    assert_received(&receiver, &cluster, 3, 2);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
    let check = receiver.walden.json(&["wal", "check"]);
    assert_eq!(check["ok"], true, "{check:#}");
}

/// The standby that is promoted never had the last of what was received: it is WAL of a timeline that was left.
#[test]
fn a_timeline_that_was_begun_before_the_end_of_what_was_received_is_followed_from_its_beginning() {
    require!(Need::PostgreSQL(15));
    let mut primary = cluster(15);
    let data = primary.scratch().path().join("standby");
    base_backup(&primary, &data, &["-R"]);
    let mut standby = Server::new(15, &data, &primary.scratch().folder("run2"));
    standby.start();
    let (first, second) = (primary.connection(), standby.connection());
    let nodes = [(first.as_str(), "primary"), (second.as_str(), "primary")];
    let site = Site::of(&primary, primary.data_directory()).nodes(&nodes).key("wal = \"receive\"");
    let receiver = Receiver::start(primary.scratch(), Walden::configure(primary.scratch(), &site));
    receiver.wait_until_streaming();
    write_segments(&primary, 1);
    let end = primary.sql("select pg_current_wal_flush_lsn()");
    wait_for("the standby to have it all", || {
        (standby.sql(&format!("select pg_last_wal_receive_lsn() >= '{end}'")) == "t").then_some(())
    });
    standby.stop(Stop::Fast);
    write_segments(&primary, 3);
    receiver.wait_until_stored(&primary);
    let received = lsn(receiver.state()["received"].as_str().unwrap());
    primary.stop(Stop::Kill);
    standby.start();
    standby.sql("select pg_promote()");
    assert!(switch_point(&standby, 2) < received);
    write_segments(&standby, 2);
    // The new timeline has not come as far yet as the old one was received.
    let end = lsn(&standby.sql("select pg_current_wal_flush_lsn()"));
    assert!(end < received);
    receiver.wait_for_state("the new timeline in the store", |state| {
        let stored = state["stored"].as_str().map(lsn)?;
        (state["timeline"] == 2 && (end..received).contains(&stored)).then_some(())
    });
    assert_received(&receiver, &standby, 2, 2);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

/// Commits wait for the store on both sides of the switch, and what they said is there when all else is lost.
#[test]
fn commits_wait_for_the_store_over_a_switch_and_are_recovered() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let site = site(&cluster).lines("[sites.main.archive]\nack = \"store\"\n");
    let mut receiver = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site));
    receiver.wait_until_streaming();
    cluster.sql("create table r (n int)");
    receiver.walden.run(&["backup"]);
    cluster.sql("alter system set synchronous_standby_names = 'walden_main'");
    cluster.sql("select pg_reload_conf()");
    commit(&cluster, "insert into r values (1)");
    begin_timeline(&mut cluster);
    commit(&cluster, "insert into r values (2)");
    cluster.stop(Stop::Kill);
    receiver.kill();
    fs::remove_dir_all(receiver.spool()).unwrap();
    fs::remove_dir_all(cluster.data_directory()).unwrap();
    let place = cluster.scratch().path().join("restored");
    receiver.walden.run(&["restore", "--target-dir", place.to_str().unwrap()]);
    let mut restored = Server::new(15, &place, &cluster.scratch().folder("run2"));
    restored.set("archive_mode", "off").set("synchronous_standby_names", "");
    restored.start();
    wait_for("recovery to end", || {
        restored.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
    });
    assert_eq!(restored.sql("select n from r order by 1"), "1\n2", "{}", receiver.log());
}

/// As the copy of a server that was made without WAL: it needs no history of the timeline it is on.
#[track_caller]
fn take_history_away(server: &Server) -> (PathBuf, Vec<u8>) {
    let history = server.data_directory().join("pg_wal/00000002.history");
    let content = fs::read(&history).unwrap();
    fs::remove_file(&history).unwrap();
    (history, content)
}

#[test]
fn a_server_without_the_history_of_its_timeline_is_received_from_on_that_timeline() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    begin_timeline(&mut cluster);
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    take_history_away(&cluster);
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 2, 2);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

/// What was received is on the timeline before, all of it: where that ended the archive tells.
#[test]
fn the_archive_tells_of_the_history_that_a_server_lacks_and_without_it_that_is_said() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    // It waits until we have all of it.
    cluster.stop(Stop::Fast);
    receiver.stop();
    begin_timeline(&mut cluster);
    wait_for("the timeline", || (cluster.sql("select pg_is_in_recovery()") == "f").then_some(()));
    let (path, content) = take_history_away(&cluster);
    cluster.sql("select pg_drop_replication_slot('walden_main')");
    receiver.start_again();
    let told = receiver.wait_for_state("what is missing", |state| {
        let message = state["receive_problem"]["message"].as_str()?;
        message.contains("no history file of its timeline 2").then(|| message.to_owned())
    });
    assert!(told.contains("Copy the file into pg_wal of that server"), "{told}");
    let slot = "select count(*) from pg_replication_slots where slot_name = 'walden_main'";
    wait_for("a slot, so that nothing is removed meanwhile", || (cluster.sql(slot) == "1").then_some(()));
    // While the file is there, nobody is to hear of it from the server.
    receiver.stop();
    fs::write(&path, content).unwrap();
    receiver.walden.run(&["wal", "push", path.to_str().unwrap()]);
    fs::remove_file(&path).unwrap();
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 2, 1);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

/// Runs a statement in a session of its own, so that a commit that waits for ever fails the test.
#[track_caller]
pub fn commit(server: &Server, statement: &str) {
    let mut psql = Command::new(program("psql").expect("the test required PostgreSQL"));
    psql.args(["-XqAt", "-c", statement]).arg(server.connection());
    let mut session = Running { process: psql.stdin(Stdio::null()).spawn().unwrap() };
    let status = wait_for(&format!("the commit of \"{statement}\""), || session.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
}
