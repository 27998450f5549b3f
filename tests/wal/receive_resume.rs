//! The spool is lost and the server is not: receiving goes on at the first hole of the archive, and not behind it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, lsn, segment_at, segments_between, site};
use crate::receive_trouble::{forgetful, receive_something, stop_before, write_until_removed};
use crate::scene::find;
use crate::support::{Cluster, Fault, Need, RemoteS3, Server, Walden, require, wait_for};

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

/// Checks that one gap is told, and that the archive has two runs, of which the second begins with the segment in which the
/// gap ends; returns the segment that the gap begins in.
#[track_caller]
fn gap_before(receiver: &Receiver, segment: &str) -> String {
    let gaps = receiver.state()["gaps"].clone();
    assert_eq!(gaps.as_array().map(Vec::len), Some(1), "{gaps}");
    let [from, to] = ["from", "to"].map(|end| segment_at(lsn(gaps[0][end].as_str().unwrap())));
    assert_eq!(to, segment, "{}", receiver.log());
    let runs = receiver.runs(1);
    assert_eq!((runs.len(), runs[1].0.as_str()), (2, segment), "{runs:?}");
    from
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
    assert_eq!(gap_before(&receiver, &behind), missing, "{}", receiver.log());
    // What the slot kept was not let go of on the way there.
    let end = "select restart_lsn >= '{kept}' and wal_status <> 'lost' from pg_replication_slots";
    assert_eq!(cluster.sql(&end.replace("{kept}", &kept)), "t");
}

/// Takes all there is of segments from the archive, pieces as well.
#[track_caller]
fn remove_all_of(segments: &[String], folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            remove_all_of(segments, &path);
        } else if segments.iter().any(|segment| name.starts_with(segment)) {
            fs::remove_file(&path).unwrap();
        }
    }
}

/// The archive lacks two segments, of which the server has removed the first and keeps the second for another slot; the
/// receiver's is made by `make_slot`.
#[track_caller]
fn receives_what_a_server_has_of_a_hole(make_slot: &str) {
    let cluster = forgetful();
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    receive_segments(&receiver, &cluster);
    cluster.sql("checkpoint");
    cluster.sql("select pg_create_physical_replication_slot('other', true)");
    let kept = cluster.sql("select restart_lsn from pg_replication_slots where slot_name = 'other'");
    let first = receiver.runs(1)[0].0.clone();
    let [removed, kept] =
        segments_between(&first, &segment_at(lsn(&kept))).last_chunk::<2>().unwrap().clone();
    write_until_removed(&cluster, &removed);
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.stop();
    let runs = receiver.runs(1);
    assert!(runs.len() == 1 && runs[0].1 > kept, "{runs:?}");
    remove_all_of(&[removed.clone(), kept.clone()], &receiver.walden.repository());
    fs::remove_dir_all(receiver.spool()).unwrap();
    cluster.sql("select pg_drop_replication_slot('walden_main')");
    cluster.sql(make_slot);
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    assert_eq!(gap_before(&receiver, &kept), removed, "{}", receiver.log());
}

#[test]
fn what_the_slot_keeps_of_a_hole_is_received_though_its_beginning_is_gone() {
    require!(Need::PostgreSQL(15));
    receives_what_a_server_has_of_a_hole("select pg_copy_physical_replication_slot('other', 'walden_main')");
}

/// The slot was made anew.
#[test]
fn what_a_server_has_of_a_hole_beside_the_slot_is_received_though_its_beginning_is_gone() {
    require!(Need::PostgreSQL(15));
    receives_what_a_server_has_of_a_hole("select pg_create_physical_replication_slot('walden_main', true)");
}

/// What another slot keeps begins before the redo position, where a slot that is made anew begins.
#[test]
fn what_a_server_has_beside_the_slot_is_received_behind_what_it_has_removed() {
    require!(Need::PostgreSQL(15));
    let cluster = forgetful();
    let mut receiver = Receiver::of(&cluster);
    receive_something(&receiver, &cluster);
    let next = stop_before(&mut receiver);
    cluster.sql("select pg_drop_replication_slot('walden_main')");
    write_segments(&cluster, 2);
    cluster.sql("checkpoint");
    cluster.sql("select pg_create_physical_replication_slot('other', true)");
    let kept = cluster.sql("select restart_lsn from pg_replication_slots where slot_name = 'other'");
    let kept = segment_at(lsn(&kept));
    assert!(kept > next, "{kept}, {next}");
    write_until_removed(&cluster, &next);
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    gap_before(&receiver, &kept);
}

/// Receives while the store is away, and ends with some segments in the spool, of which the second has lost its end and
/// the third is gone; returns the receiver, the store and the names of all.
#[track_caller]
fn spoil_spool(cluster: &Cluster) -> (Receiver, RemoteS3, Vec<String>) {
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1s\"\ntimeout = \"1s\"\n");
    let site = site(cluster).storage(&storage).lines("[sites.main.archive]\nack = \"store\"\n");
    let walden = Walden::configure(cluster.scratch(), &site);
    let mut receiver = Receiver::start(cluster.scratch(), walden);
    receive_something(&receiver, cluster);
    // Not one that lets the store have something after all.
    line.disturb(1, [Fault::CutRequest]);
    write_segments(cluster, 5);
    let end = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
    receiver.wait_for_state("all is spooled", |state| {
        (state["received"].as_str().map(lsn) >= Some(end)).then_some(())
    });
    receiver.kill();
    let last = segment_at(lsn(receiver.state()["received"].as_str().unwrap()));
    let first = segments_between("000000010000000000000001", &last).into_iter();
    let names: Vec<String> = first.filter(|name| spooled(&receiver, name).is_some()).collect();
    assert!(names.len() >= 5, "{names:?}");
    let cut = spooled(&receiver, &names[1]).unwrap();
    let length = cut.metadata().unwrap().len();
    fs::File::options().write(true).open(&cut).unwrap().set_len(length - 1).unwrap();
    fs::remove_file(spooled(&receiver, &names[2]).unwrap()).unwrap();
    (receiver, line, names)
}

fn spooled(receiver: &Receiver, segment: &str) -> Option<PathBuf> {
    find(&receiver.spool(), &format!("{segment}.spool"))
}

/// The disk has lost what was synced, and the server has it still.
#[test]
fn what_is_missing_within_the_spool_is_received_again() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let (mut receiver, line, _) = spoil_spool(&cluster);
    line.heal();
    receiver.start_again();
    assert_whole(&receiver, &cluster);
    assert!(receiver.log().contains("is missing in the spool"), "{}", receiver.log());
}

/// The same where the slot was lost as well: no more is told than what is missing, and what is behind it is stored.
#[test]
fn what_is_missing_within_the_spool_is_told_where_no_server_has_it_any_more() {
    require!(Need::PostgreSQL(15));
    let cluster = forgetful();
    let (mut receiver, line, names) = spoil_spool(&cluster);
    cluster.sql("select pg_drop_replication_slot('walden_main')");
    write_until_removed(&cluster, names.last().unwrap());
    line.heal();
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    let gap = &receiver.state()["gaps"][0];
    let ends = ["from", "to"].map(|end| segment_at(lsn(gap[end].as_str().unwrap())));
    assert_eq!(ends, [names[1].clone(), names[3].clone()], "{}", receiver.log());
    let runs = receiver.runs(1);
    assert!(runs.iter().any(|(first, _)| *first == names[3]), "{runs:?}");
}
