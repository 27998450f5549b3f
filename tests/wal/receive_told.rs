//! What `receive.json` tells of a receiver to those who look, and for how long that is believed.

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, site};
use crate::support::{Need, Walden, require};

/// It leaves a state in which all is well.
#[test]
fn a_receiver_that_was_killed_is_missed() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let mut receiver =
        Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site(&cluster)));
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    assert_eq!(receiver.checked("receiver").0, "ok");
    // Whether or not anything comes.
    let before = receiver.state()["written_at"].clone();
    receiver.wait_for_state("it is there", |state| (state["written_at"] != before).then_some(()));
    receiver.kill();
    let left = receiver.state();
    assert!(left["streaming"] == true && left["receive_problem"].is_null(), "{left:#}");
    // A while ago.
    receiver.date_state("2026-01-01T00:00:00Z");
    let (status, detail) = receiver.checked("receiver");
    let said = "no receiver has run since 2026-01-01T00:00:00Z";
    assert!(status == "failed" && detail.starts_with(said), "{status}: {detail}");
    receiver.start_again();
    receiver.wait_for_state("streaming again", |state| {
        let is_new = state["written_at"] != "2026-01-01T00:00:00Z";
        (is_new && state["streaming"] == true).then_some(())
    });
    assert_eq!(receiver.checked("receiver").0, "ok");
}
