//! Receiving by a role that may only replicate, and run no statement: it learns of a lost slot all the same.

use std::fs;

use serde_json::Value;

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, lsn, segment_at, site};
use crate::receive_trouble::{forgetful_of, receive_something, stop_before, write_until_removed};
use crate::support::{Cluster, Need, Site, Walden, require, wait_for};

/// The slot, as whoever may ask sees it.
const SLOT: &str = "select wal_status, active from pg_replication_slots where slot_name = 'walden_main'";

/// Lets a role in for replication alone, and describes the site that is received from by it.
#[track_caller]
fn site_without_statements(cluster: &mut Cluster) -> Site {
    cluster.sql("create role walden login replication");
    let hba = "local all postgres trust\nlocal replication walden trust\n";
    fs::write(cluster.data_directory().join("pg_hba.conf"), hba).unwrap();
    cluster.restart();
    let connection = cluster.connection().replace("user=postgres", "user=walden");
    site(cluster).nodes(&[(connection.as_str(), "primary")])
}

#[track_caller]
fn is_replaced_and_the_gap_named(major: u32) {
    let mut cluster = forgetful_of(major);
    let site = site_without_statements(&mut cluster);
    let mut receiver = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site));
    receive_something(&receiver, &cluster);
    let next = stop_before(&mut receiver);
    let end = receiver.state()["received"].clone();
    cluster.sql("alter system set max_slot_wal_keep_size = '1MB'");
    cluster.sql("select pg_reload_conf()");
    write_until_removed(&cluster, &next);
    assert_eq!(cluster.rows(SLOT), [["lost", "f"]]);
    receiver.start_again();
    let gaps = receiver.wait_for_state("the gap, and WAL behind it", |state| {
        let told = state["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty());
        (told && state["streaming"] == true).then(|| state["gaps"].clone())
    });
    cluster.sql("alter system reset max_slot_wal_keep_size");
    cluster.sql("select pg_reload_conf()");
    assert_eq!((gaps.as_array().map(Vec::len), &gaps[0]["from"]), (Some(1), &end), "{gaps}");
    let log = receiver.log();
    assert!(log.contains("slot \"walden_main\" was lost") && log.contains("take a new basebackup"), "{log}");
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    assert!(keeps_wal(&cluster), "{:?}", cluster.rows(SLOT));
    let runs = receiver.runs(1);
    let behind = segment_at(lsn(gaps[0]["to"].as_str().unwrap()));
    assert!(runs.len() == 2 && runs[1].0 == behind, "{runs:?} begins again at {behind}");
}

/// Tells whether the slot is in use, and not lost.
#[track_caller]
fn keeps_wal(cluster: &Cluster) -> bool {
    matches!(&cluster.rows(SLOT)[..], [row] if row[0] != "lost" && row[1] == "t")
}

/// The server would start streaming from it all the same.
#[test]
fn a_lost_slot_is_replaced_without_a_statement() {
    require!(Need::PostgreSQL(15));
    is_replaced_and_the_gap_named(15);
}

/// Version 18 refuses to stream from it.
#[test]
fn a_lost_slot_of_the_newest_version_is_replaced_without_a_statement() {
    require!(Need::PostgreSQL(18));
    is_replaced_and_the_gap_named(18);
}

/// Its position is still there then, so that nothing but the refusal tells. The server happens to have all WAL.
#[test]
fn a_slot_that_was_invalidated_for_its_idleness_is_replaced_without_a_statement() {
    require!(Need::PostgreSQL(18));
    let mut cluster = cluster(18);
    let site = site_without_statements(&mut cluster);
    let mut receiver = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site));
    receive_something(&receiver, &cluster);
    receiver.stop();
    cluster.sql("alter system set idle_replication_slot_timeout = '1s'");
    cluster.sql("select pg_reload_conf()");
    wait_for("the slot to be invalidated", || {
        write_segments(&cluster, 1);
        cluster.sql("checkpoint");
        (cluster.rows(SLOT) == [["lost", "f"]]).then_some(())
    });
    cluster.sql("alter system reset idle_replication_slot_timeout");
    cluster.sql("select pg_reload_conf()");
    receiver.start_again();
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    assert!(keeps_wal(&cluster), "{:?}", cluster.rows(SLOT));
    assert!(receiver.log().contains("can no longer access replication slot"), "{}", receiver.log());
    assert_eq!(receiver.state()["gaps"], Value::Array(Vec::new()), "{}", receiver.log());
    receiver.assert_equals_pg_wal(&cluster, 1, 3);
}
