//! Objects of the archive that nobody can use: what is received is stored all the same.

use std::fs;

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, segments_between, site};
use crate::support::{Cluster, Need, Stop, Walden, require, wait_for};

/// Lets another bit stand in the last byte of an object.
#[track_caller]
fn flip(receiver: &Receiver, name: &str) {
    let object = receiver.object(name);
    let mut bytes = fs::read(&object).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::remove_file(&object).unwrap();
    fs::write(&object, bytes).unwrap();
}

/// Ends the timeline of a server that nobody follows, and begins the next one.
#[track_caller]
pub fn begin_timeline(cluster: &mut Cluster) {
    cluster.stop(Stop::Fast);
    cluster.scratch().file("data/standby.signal", "");
    cluster.start();
    cluster.sql("select pg_promote()");
}

/// Receives the beginning of timeline 2, lets its history in the store be spoiled, and receives more of it.
#[track_caller]
fn goes_on_behind_a_spoiled_history(
    cluster: &mut Cluster,
    receiver: &mut Receiver,
    spoil: impl FnOnce(&Receiver, &Cluster),
    runs: fn(&Receiver, u64) -> Vec<(String, String)>,
) {
    write_segments(cluster, 1);
    receiver.wait_until_stored(cluster);
    begin_timeline(cluster);
    write_segments(cluster, 1);
    receiver.wait_until_stored(cluster);
    receiver.stop();
    spoil(receiver, cluster);
    receiver.start_again();
    receiver.wait_until_streaming();
    write_segments(cluster, 1);
    cluster.sql("select pg_logical_emit_message(false, 'test', 'a record')");
    let segment = cluster.sql("select pg_walfile_name(pg_switch_wal())");
    receiver.wait_until_stored(cluster);
    wait_for("the segment to be there as a whole", || {
        runs(receiver, 2).last().is_some_and(|(_, last)| *last >= segment).then_some(())
    });
    assert_eq!(runs(receiver, 2).len(), 1, "{:?}", runs(receiver, 2));
    receiver.wait_for_state("what is wrong", |state| {
        let message = state["store_problem"]["message"].as_str()?;
        message.contains("timeline 2 is stored without its history").then_some(())
    });
}

#[test]
fn a_damaged_history_in_the_store_holds_back_nothing_and_is_replaced_once_it_is_removed() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    // Its header, by which the timeline is known, is sound.
    let spoil = |receiver: &Receiver, _: &Cluster| flip(receiver, "00000002.history");
    goes_on_behind_a_spoiled_history(&mut cluster, &mut receiver, spoil, Receiver::runs);
    receiver.stop();
    fs::remove_file(receiver.object("00000002.history")).unwrap();
    receiver.start_again();
    let own = fs::read(cluster.data_directory().join("pg_wal/00000002.history")).unwrap();
    wait_for("the history to be there again", || {
        (receiver.fetch(&cluster, "00000002.history").as_deref() == Some(&own[..])).then_some(())
    });
    receiver.wait_for_state("no trouble", |state| state["store_problem"].is_null().then_some(()));
    receiver.assert_equals_pg_wal(&cluster, 2, 3);
}

/// Signing was switched on for a site that there was already.
#[test]
fn a_history_that_nobody_signed_holds_back_nothing() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let walden = Walden::configure(cluster.scratch(), &site(&cluster));
    walden.reconfigure(cluster.scratch(), &site(&cluster).unencrypted());
    let mut receiver = Receiver::start(cluster.scratch(), walden);
    let spoil = |receiver: &Receiver, cluster: &Cluster| {
        receiver.walden.reconfigure(cluster.scratch(), &site(cluster));
    };
    let runs = Receiver::runs_beside_a_spoiled_history;
    goes_on_behind_a_spoiled_history(&mut cluster, &mut receiver, spoil, runs);
}

/// It is received again because the one before it is missing: the archive gets a sound one beside it.
#[test]
fn a_damaged_segment_in_the_store_is_superseded_by_the_one_that_is_received() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    receiver.walden.run(&["backup"]);
    write_segments(&cluster, 5);
    receiver.wait_until_stored(&cluster);
    let (first, last) = receiver.runs(1).pop().unwrap();
    let names = segments_between(&first, &last);
    let [missing, damaged, _] = names.last_chunk::<3>().unwrap();
    receiver.stop();
    fs::remove_file(receiver.object(missing)).unwrap();
    flip(&receiver, damaged);
    fs::remove_dir_all(receiver.spool()).unwrap();
    receiver.start_again();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 6);
    assert!(receiver.log().contains("is archived beside it"), "{}", receiver.log());
    let check = receiver.walden.json(&["wal", "check", "--bodies"]);
    assert_eq!(check["ok"], true, "{check:#}");
    let superseded = check["clusters"][0]["superseded"][0]["name"].as_str();
    assert_eq!(superseded, Some(damaged.as_str()), "{check:#}");
}
