//! One site, two hosts that would receive it: one does at a time, and the other goes on where it ended.

use std::fs;

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, lsn, segment_at, site};
use crate::receive_trouble::{forgetful, write_until_removed};
use crate::support::{Cluster, Fault, Need, RemoteS3, Scratch, Site, Walden, require};

/// The second host's connection is `user`'s, and it is told `refusal`.
#[track_caller]
fn takes_turns(cluster: &Cluster, user: &str, refusal: &str) {
    let own = site(cluster).unencrypted();
    let mut first = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &own));
    first.wait_until_streaming();
    write_segments(cluster, 1);
    first.wait_until_stored(cluster);
    let host = Scratch::new();
    let connection = cluster.connection().replace("user=postgres", &format!("user={user}"));
    let other = Site::of(cluster, cluster.data_directory())
        .nodes(&[(connection.as_str(), "primary")])
        .key("wal = \"receive\"")
        .unencrypted()
        .storage(&first.walden.storage());
    let mut second = Receiver::start(&host, Walden::configure(&host, &other));
    second.wait_for_state("that the slot is in use", |state| {
        state["receive_problem"]["message"].as_str()?.contains(refusal).then_some(())
    });
    // The first one is not disturbed, and the server removes what the second one found to be next.
    let next = segment_at(lsn(first.state()["received"].as_str().unwrap()));
    write_until_removed(cluster, &next);
    first.wait_until_stored(cluster);
    assert_eq!((&first.state()["streaming"], &second.state()["streaming"]), (&true.into(), &false.into()));
    first.stop();
    second.wait_until_streaming();
    write_segments(cluster, 1);
    second.wait_until_stored(cluster);
    assert_eq!(second.state()["gaps"], serde_json::json!([]), "{}", second.log());
    assert_eq!(second.runs(1).len(), 1, "{:?}\n{}", second.runs(1), second.log());
    // The first one takes it back with the spool it had, behind which the server has removed what the archive has.
    let next = segment_at(lsn(first.state()["received"].as_str().unwrap()));
    write_until_removed(cluster, &next);
    second.wait_until_stored(cluster);
    second.stop();
    first.start_again();
    write_segments(cluster, 1);
    first.wait_until_stored(cluster);
    assert_eq!(first.state()["gaps"], serde_json::json!([]), "{}", first.log());
    assert_eq!(first.runs(1).len(), 1, "{:?}\n{}", first.runs(1), first.log());
}

#[test]
fn a_second_host_waits_until_the_slot_is_free() {
    require!(Need::PostgreSQL(15));
    takes_turns(&forgetful(), "postgres", "in use by walden_main");
}

/// Nor does one that cannot look at the slot: the server says so when a stream is asked for.
#[test]
fn a_second_host_that_may_only_replicate_waits_until_the_slot_is_free() {
    require!(Need::PostgreSQL(15));
    let mut cluster = forgetful();
    cluster.sql("create role walden login replication");
    let hba = "local all postgres trust\nlocal replication postgres trust\nlocal replication walden trust\n";
    fs::write(cluster.data_directory().join("pg_hba.conf"), hba).unwrap();
    cluster.restart();
    takes_turns(&cluster, "walden", "is active");
}

/// The spool lets receiving begin before the store has answered, and the archive has what another host received.
#[test]
fn a_store_that_is_away_at_the_start_is_waited_for_before_a_gap_is_told() {
    require!(Need::PostgreSQL(15));
    let cluster = forgetful();
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1h\"\ntimeout = \"1s\"\n");
    let own = site(&cluster).unencrypted().storage(&storage);
    let mut first = Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &own));
    first.wait_until_streaming();
    write_segments(&cluster, 1);
    first.wait_until_stored(&cluster);
    first.stop();
    let host = Scratch::new();
    let mut second = Receiver::start(&host, Walden::configure(&host, &own));
    second.wait_until_streaming();
    let next = segment_at(lsn(first.state()["received"].as_str().unwrap()));
    write_until_removed(&cluster, &next);
    second.wait_until_stored(&cluster);
    second.stop();
    line.inject("", "", usize::MAX, Fault::Silence);
    first.start_again();
    first.wait_for_state("that the archive is waited for", |state| {
        let message = state["receive_problem"]["message"].as_str()?;
        message.contains("the archive could not be opened so far").then_some(())
    });
    line.heal();
    write_segments(&cluster, 1);
    first.wait_until_stored(&cluster);
    assert_eq!(first.state()["gaps"], serde_json::json!([]), "{}", first.log());
    assert_eq!(first.runs(1).len(), 1, "{:?}\n{}", first.runs(1), first.log());
}
