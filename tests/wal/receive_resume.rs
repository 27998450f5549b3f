//! The spool is lost and the server is not: receiving goes on at the first hole of the archive, and not behind it.

use std::fs;

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, lsn, segment_at, segments_between};
use crate::receive_trouble::forgetful;
use crate::support::{Need, Server, require, wait_for};

/// Receives some segments, and returns the last one and the two before.
#[track_caller]
fn receive_segments(receiver: &Receiver, server: &Server) -> [String; 3] {
    receiver.wait_until_streaming();
    write_segments(server, 6);
    receiver.wait_until_stored(server);
    let (first, last) = receiver.runs(1).pop().unwrap();
    let segments = segments_between(&first, &last);
    segments.last_chunk::<3>().unwrap().clone()
}

/// Takes a segment from the archive, as if it had still been on its way when the receiver ended, and the spool.
#[track_caller]
fn lose(receiver: &Receiver, segment: &str) {
    fs::remove_file(receiver.object(segment)).unwrap();
    fs::remove_dir_all(receiver.spool()).unwrap();
}

#[track_caller]
fn assert_whole(receiver: &Receiver, server: &Server) {
    write_segments(server, 1);
    receiver.wait_until_stored(server);
    receiver.assert_equals_pg_wal(server, 1, 7);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

#[test]
fn what_the_slot_keeps_and_the_archive_lacks_is_received_again() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    let [_, missing, _] = receive_segments(&receiver, &cluster);
    receiver.stop();
    lose(&receiver, &missing);
    // As if the server had never been told: the slot keeps WAL from the last checkpoint on.
    cluster.sql("select pg_drop_replication_slot('walden_main')");
    cluster.sql("select pg_create_physical_replication_slot('walden_main', true)");
    let kept = cluster.sql("select restart_lsn from pg_replication_slots");
    assert!(segment_at(lsn(&kept)) < missing, "{kept}, {missing}");
    receiver.start_again();
    assert_whole(&receiver, &cluster);
}

/// The slot is ahead, because the spool acknowledged it; the server has it by chance, and the basebackup needs it.
#[test]
fn what_a_basebackup_needs_and_the_archive_lacks_is_received_again() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    let [first, _, third] = receive_segments(&receiver, &cluster);
    receiver.stop();
    fs::remove_file(receiver.object(&first)).unwrap();
    lose(&receiver, &third);
    receiver.start_again();
    assert_whole(&receiver, &cluster);
    let check = receiver.walden.json(&["wal", "check"]);
    assert_eq!(check["ok"], true, "{check:#}");
}

/// Neither the archive nor any server has it: it is told, and no more than it.
#[test]
fn what_no_server_has_any_more_is_told_and_what_is_behind_it_is_received() {
    require!(Need::PostgreSQL(15));
    let cluster = forgetful();
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    let [_, missing, behind] = receive_segments(&receiver, &cluster);
    wait_for("the server to remove what it may", || {
        write_segments(&cluster, 2);
        receiver.wait_until_stored(&cluster);
        cluster.sql("checkpoint");
        (!cluster.data_directory().join("pg_wal").join(&behind).exists()).then_some(())
    });
    receiver.stop();
    lose(&receiver, &missing);
    let kept = cluster.sql("select restart_lsn from pg_replication_slots");
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    let gaps = receiver.state()["gaps"].clone();
    assert_eq!(gaps.as_array().map(Vec::len), Some(1), "{gaps}");
    let ends = ["from", "to"].map(|end| segment_at(lsn(gaps[0][end].as_str().unwrap())));
    assert_eq!(ends, [missing.clone(), behind.clone()]);
    let runs = receiver.runs(1);
    assert_eq!((runs.len(), &runs[1].0), (2, &behind), "{runs:?}");
    // What the slot kept was not let go of on the way there.
    let end = "select restart_lsn >= '{kept}' and wal_status <> 'lost' from pg_replication_slots";
    assert_eq!(cluster.sql(&end.replace("{kept}", &kept)), "t");
}
