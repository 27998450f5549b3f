//! WAL by streaming: what the archive holds is what the server wrote, whatever happens to either or to the receiver.

use std::fs;

use crate::receive_scene::{Receiver, cluster, lsn};
use crate::scene::base_backup;
use crate::support::{Need, Pgbench, Server, Site, Stop, Walden, require, wait_for};

/// Writes enough WAL to end some segments, and ends the last.
#[track_caller]
pub fn write_segments(server: &Server, count: usize) {
    for _ in 0..count {
        server.sql("select pg_logical_emit_message(true, 'test', repeat('some WAL ', 40000))");
        server.sql("select pg_switch_wal()");
    }
}

#[track_caller]
fn receives_what_the_server_wrote(major: u32) {
    let cluster = cluster(major);
    Pgbench::initialize(&cluster, 1);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    Pgbench::run(&cluster, &["--no-vacuum", "--client", "4", "--transactions", "1500"]);
    write_segments(&cluster, 2);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 4);
    receiver.stop();
    assert_eq!(receiver.state()["streaming"], false);
    let slot = "select slot_type, active from pg_replication_slots where slot_name = 'walden_main'";
    assert_eq!(cluster.rows(slot), [["physical", "f"]]);
}

#[test]
fn every_segment_received_under_load_is_the_servers_own() {
    require!(Need::PostgreSQL(15));
    receives_what_the_server_wrote(15);
}

#[test]
fn every_segment_received_from_the_oldest_version_is_the_servers_own() {
    require!(Need::PostgreSQL(13));
    receives_what_the_server_wrote(13);
}

#[test]
fn every_segment_received_from_the_newest_version_is_the_servers_own() {
    require!(Need::PostgreSQL(18));
    receives_what_the_server_wrote(18);
}

/// Failure 4.
#[test]
fn the_segment_of_an_idle_server_has_no_final_name_until_it_is_whole() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let receiver = Receiver::of(&cluster);
    cluster.sql("create table r (n int)");
    receiver.wait_until_stored(&cluster);
    let open = cluster.sql("select pg_walfile_name(pg_current_wal_lsn())");
    let last =
        |receiver: &Receiver| receiver.runs(1).last().map(|(_, last)| last.clone()).unwrap_or_default();
    assert!(last(&receiver) < open, "{:?} and {open} is open", receiver.runs(1));
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    assert!(last(&receiver) >= open);
    receiver.assert_equals_pg_wal(&cluster, 1, 1);
}

#[test]
fn a_receiver_killed_at_any_moment_leaves_no_gap() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    Pgbench::initialize(&cluster, 1);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    let load = Pgbench::start(&cluster, 2);
    // By bytes of WAL, not by time: each kill falls somewhere else in a segment, a piece and a sync.
    let mut seed = 20261121u64;
    for _ in 0..8 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let from = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
        let more = 50_000 + (seed >> 40) % 700_000;
        wait_for("more WAL", || {
            (lsn(&cluster.sql("select pg_current_wal_flush_lsn()")) >= from + more).then_some(())
        });
        receiver.kill();
        receiver.start_again();
    }
    drop(load);
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 3);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

#[test]
fn a_promoted_standby_is_followed_from_the_start_of_the_switch_point_segment() {
    require!(Need::PostgreSQL(15));
    let mut primary = cluster(15);
    let scratch_run = primary.scratch().folder("run2");
    let data = primary.scratch().path().join("standby");
    base_backup(&primary, &data, &["-R"]);
    let mut standby = Server::new(15, &data, &scratch_run);
    standby.start();
    let nodes = [(primary.connection(), "primary"), (standby.connection(), "primary")];
    let nodes: Vec<(&str, &str)> =
        nodes.iter().map(|(connection, prefer)| (&**connection, *prefer)).collect();
    let site = Site::of(&primary, primary.data_directory()).nodes(&nodes).key("wal = \"receive\"");
    let mut receiver = Receiver::start(primary.scratch(), Walden::configure(primary.scratch(), &site));
    write_segments(&primary, 2);
    primary.sql("create table r as select generate_series(1, 100) n");
    receiver.wait_until_stored(&primary);
    let end = primary.sql("select pg_current_wal_flush_lsn()");
    wait_for("the standby to have it all", || {
        (standby.sql(&format!("select pg_last_wal_receive_lsn() >= '{end}'")) == "t").then_some(())
    });
    primary.stop(Stop::Kill);
    standby.sql("select pg_promote()");
    standby.sql("insert into r values (101)");
    write_segments(&standby, 2);
    receiver.wait_until_stored(&standby);
    receiver.assert_equals_pg_wal(&standby, 2, 2);
    let history = fs::read(data.join("pg_wal/00000002.history")).unwrap();
    assert_eq!(receiver.fetch(&standby, "00000002.history").as_deref(), Some(&history[..]));
    let switch = String::from_utf8(history).unwrap().split('\t').nth(1).unwrap().to_owned();
    let first = receiver.runs(2)[0].0.clone();
    let holding = format!("{:08X}{:08X}", lsn(&switch) >> 32, (lsn(&switch) & 0xFFFF_FFFF) >> 20);
    assert_eq!(&first[8..], holding);
    // The old primary, back on its own timeline, is not taken for the server of the site.
    receiver.stop();
    primary.start();
    receiver.start_again();
    write_segments(&standby, 1);
    receiver.wait_until_stored(&standby);
    receiver.assert_equals_pg_wal(&standby, 2, 3);
}
