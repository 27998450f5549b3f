//! Receiving in trouble: WAL the server has removed, a store that is away, a volume that is full.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, cluster_with, lsn, segment_at, site};
use crate::scene::base_backup;
use crate::support::{
    Cluster, Fault, Need, Options, Pgbench, RemoteS3, Run, Server, Site, Stop, Walden, require, wait_for,
};

/// Makes a cluster that removes WAL as soon as no slot keeps it.
#[track_caller]
pub fn forgetful() -> Cluster {
    forgetful_of(15)
}

/// The same of another major version.
#[track_caller]
pub fn forgetful_of(major: u32) -> Cluster {
    let options = Options::default().initdb("--wal-segsize=1").setting("archive_mode", "off");
    Cluster::start_with(major, options.setting("max_wal_size", "2MB").setting("min_wal_size", "2MB"))
}

/// Writes WAL and checkpoints until a segment is no longer in pg_wal.
#[track_caller]
pub fn write_until_removed(server: &Server, segment: &str) {
    wait_for("the server to remove a segment", || {
        write_segments(server, 2);
        server.sql("checkpoint");
        (!server.data_directory().join("pg_wal").join(segment).exists()).then_some(())
    });
}

#[track_caller]
pub fn receive_something(receiver: &Receiver, server: &Server) {
    receiver.wait_until_streaming();
    write_segments(server, 1);
    receiver.wait_until_stored(server);
}

/// Stops a receiver, and returns the segment of timeline 1 that it wants next.
///
/// It goes by where receiving ended: `pg_walfile_name` of a position where a segment ends names that one, whose removal
/// says nothing.
#[track_caller]
pub fn stop_before(receiver: &mut Receiver) -> String {
    receiver.stop();
    segment_at(lsn(receiver.state()["received"].as_str().unwrap()))
}

/// Failure 12: the slot keeps nothing of what is missing, whether it was lost or made anew.
#[track_caller]
fn loses_wal(lose: impl FnOnce(&Server)) {
    let cluster = forgetful();
    let mut receiver = Receiver::of(&cluster);
    receive_something(&receiver, &cluster);
    let next = stop_before(&mut receiver);
    let end = receiver.state()["received"].clone();
    lose(&cluster);
    write_until_removed(&cluster, &next);
    receiver.start_again();
    // Not before the slot holds on to what comes: this server removes what is a segment behind.
    let gaps = receiver.wait_for_state("the gap, and WAL behind it", |state| {
        let told = state["gaps"].as_array().is_some_and(|gaps| !gaps.is_empty());
        (told && state["streaming"] == true).then(|| state["gaps"].clone())
    });
    cluster.sql("alter system reset max_slot_wal_keep_size");
    cluster.sql("select pg_reload_conf()");
    let gap = &gaps[0];
    assert_eq!((gaps.as_array().map(Vec::len), &gap["from"]), (Some(1), &end), "{gaps}");
    assert!(receiver.log().contains("take a new basebackup"), "{}", receiver.log());
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    let runs = receiver.runs(1);
    assert_eq!(runs.len(), 2, "{runs:?}");
    // What is behind the hole begins where the state says.
    assert_eq!(runs[1].0, segment_at(lsn(gap["to"].as_str().unwrap())));
    // The next start remembers, and takes nothing for missing anew.
    receiver.stop();
    receiver.start_again();
    receiver.wait_until_streaming();
    assert_eq!(receiver.state()["gaps"], gaps);
    // Until a basebackup lies behind it.
    let (status, detail) = receiver.checked("WAL missing");
    assert!(status == "failed" && detail.contains(gap["from"].as_str().unwrap()), "{status}: {detail}");
    assert_eq!(receiver.checked("receiver").0, "ok");
    receiver.walden.run(&["backup"]);
    assert_eq!(receiver.checked("WAL missing").0, "ok");
    receiver.stop();
    receiver.start_again();
    receiver.wait_for_state("no gap", |state| {
        (state["gaps"].as_array().is_some_and(Vec::is_empty) && state["streaming"] == true).then_some(())
    });
    assert_eq!(receiver.checked("WAL missing"), ("ok".to_owned(), "none".to_owned()));
}

#[test]
fn a_lost_slot_is_replaced_and_what_is_missing_is_named() {
    require!(Need::PostgreSQL(15));
    loses_wal(|server| {
        server.sql("alter system set max_slot_wal_keep_size = '1MB'");
        server.sql("select pg_reload_conf()");
    });
}

#[test]
fn a_slot_made_anew_above_what_is_needed_is_noticed() {
    require!(Need::PostgreSQL(15));
    loses_wal(|server| {
        server.sql("select pg_drop_replication_slot('walden_main')");
        write_segments(server, 3);
        server.sql("select pg_create_physical_replication_slot('walden_main', true)");
    });
}

/// Stops a receiver of two servers, and has the primary remove what it wants next; the standby has all of it.
#[track_caller]
fn removed_by_one_of_two() -> (Cluster, Server, Receiver) {
    let primary = forgetful();
    let data = primary.scratch().path().join("standby");
    // Its own slot lets the standby have what the primary removes.
    base_backup(&primary, &data, &["-R", "-C", "-S", "standby"]);
    let mut standby = Server::new(15, &data, &primary.scratch().folder("run2"));
    standby.set("wal_keep_size", "1GB").start();
    let (first, second) = (primary.connection(), standby.connection());
    let nodes = [(first.as_str(), "primary"), (second.as_str(), "primary")];
    let site = Site::of(&primary, primary.data_directory()).nodes(&nodes).key("wal = \"receive\"");
    let mut receiver = Receiver::start(primary.scratch(), Walden::configure(primary.scratch(), &site));
    receive_something(&receiver, &primary);
    let next = stop_before(&mut receiver);
    primary.sql("select pg_drop_replication_slot('walden_main')");
    write_until_removed(&primary, &next);
    let end = primary.sql("select pg_current_wal_flush_lsn()");
    wait_for("the standby to have it all", || {
        (standby.sql(&format!("select pg_last_wal_receive_lsn() >= '{end}'")) == "t").then_some(())
    });
    (primary, standby, receiver)
}

#[test]
fn what_one_server_removed_is_received_from_another_that_has_it() {
    require!(Need::PostgreSQL(15));
    let (primary, standby, mut receiver) = removed_by_one_of_two();
    receiver.start_again();
    receiver.wait_until_stored(&primary);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
    receiver.assert_equals_pg_wal(&standby, 1, 3);
    assert_eq!(standby.sql("select count(*) from pg_replication_slots"), "0", "it would keep WAL for good");
}

/// The one that has it is down when the other one is found to have removed it.
#[test]
fn what_one_server_removed_is_waited_for_while_another_does_not_answer() {
    require!(Need::PostgreSQL(15));
    let (primary, mut standby, mut receiver) = removed_by_one_of_two();
    standby.stop(Stop::Fast);
    receiver.start_again();
    receiver.wait_for_state("what is waited for", |state| {
        let message = state["receive_problem"]["message"].as_str()?;
        message.contains("whether that is elsewhere is not known yet").then_some(())
    });
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
    // Nothing more is lost while it waits.
    let kept =
        "select slot_name, restart_lsn is not null from pg_replication_slots where slot_name <> 'standby'";
    assert_eq!(primary.rows(kept), [["walden_main", "t"]]);
    standby.start();
    receiver.wait_until_stored(&primary);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
    receiver.assert_equals_pg_wal(&standby, 1, 3);
}

/// As by a snapshot of its disk: it writes other WAL than it did before, on the same timeline.
#[test]
fn a_primary_that_was_set_back_is_told_and_received_from_once_it_has_come_as_far() {
    require!(Need::PostgreSQL(15));
    let mut cluster = cluster(15);
    let mut receiver =
        Receiver::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site(&cluster)));
    receive_something(&receiver, &cluster);
    cluster.stop(Stop::Fast);
    let saved = cluster.data_directory().with_file_name("saved");
    let mut copy = Command::new("cp");
    Run::of(copy.arg("-a").arg(cluster.data_directory()).arg(&saved), "").expect_success();
    cluster.start();
    write_segments(&cluster, 3);
    receiver.wait_until_stored(&cluster);
    let end = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
    cluster.stop(Stop::Immediate);
    fs::remove_dir_all(cluster.data_directory()).unwrap();
    fs::rename(&saved, cluster.data_directory()).unwrap();
    cluster.start();
    let set_back = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
    let gaps = receiver.wait_for_state("the gap", |state| {
        let gaps = state["gaps"].as_array().filter(|gaps| !gaps.is_empty())?;
        state["receive_problem"]["message"].as_str()?.contains("was set back").then(|| gaps.clone())
    });
    let [from, to] = ["from", "to"].map(|position| lsn(gaps[0][position].as_str().unwrap()));
    assert!(gaps.len() == 1 && from <= set_back && end <= to, "{gaps:?}, {set_back:X}, {end:X}");
    // It is told once, and the next start knows it.
    receiver.stop();
    receiver.start_again();
    write_segments(&cluster, 4);
    receiver.wait_until_stored(&cluster);
    receiver.wait_until_streaming();
    assert_eq!(receiver.state()["gaps"], serde_json::Value::Array(gaps));
    assert_eq!(receiver.log().matches("the server was set back to").count(), 1, "{}", receiver.log());
    assert_eq!(receiver.checked("WAL missing").0, "failed");
    receiver.walden.run(&["backup"]);
    assert_eq!(receiver.checked("WAL missing").0, "ok");
}

/// While a store is away the spool grows, not the memory; nothing is lost by kills in between.
#[test]
fn a_store_that_is_away_for_long_is_caught_up_with() {
    require!(Need::PostgreSQL(15));
    let cluster = cluster(15);
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1s\"\ntimeout = \"1s\"\n");
    let walden = Walden::configure(cluster.scratch(), &site(&cluster).storage(&storage));
    let mut receiver = Receiver::start(cluster.scratch(), walden);
    receive_something(&receiver, &cluster);
    line.disturb(1, [Fault::CutRequest, Fault::CutAnswer]);
    Pgbench::initialize(&cluster, 2);
    for _ in 0..3 {
        write_segments(&cluster, 3);
        let end = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
        receiver.wait_for_state("all is spooled", |state| {
            (state["received"].as_str().map(lsn) >= Some(end)).then_some(())
        });
        receiver.kill();
        receiver.start_again();
    }
    receiver.wait_for_state("the trouble", |state| state["store_problem"].is_object().then_some(()));
    let waiting = receiver.state()["spooled_bytes"].as_u64().unwrap();
    assert!(waiting > 20 << 20, "{waiting} bytes wait");
    let taken = receiver.memory_mib("VmHWM:");
    assert!(taken < 150, "{taken} MiB, where {waiting} bytes wait");
    // Told to stop it does not wait for the store.
    receiver.stop();
    receiver.start_again();
    line.heal();
    receiver.wait_until_stored(&cluster);
    receiver.wait_for_state("no trouble", |state| state["store_problem"].is_null().then_some(()));
    receiver.assert_equals_pg_wal(&cluster, 1, 20);
    let taken = receiver.memory_mib("VmHWM:");
    assert!(taken < 300, "{taken} MiB while it caught up");
}

/// A volume of its own for a spool.
struct Volume(PathBuf);

impl Volume {
    fn mount(folder: &Path, mebibytes: u32) -> Self {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mebibytes}m,mode=777"), "walden-test"]).arg(folder);
        Run::of(&mut mount, "").expect_success();
        Self(folder.to_owned())
    }

    /// Takes room, or gives it back.
    fn fill(&self, mebibytes: u64) {
        let path = self.0.join("ballast");
        if mebibytes == 0 {
            return fs::remove_file(path).unwrap();
        }
        nix::fcntl::posix_fallocate(File::create(path).unwrap(), 0, (mebibytes << 20) as i64).unwrap();
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_full_volume_pauses_receiving_until_there_is_half_as_much_room_again() {
    require!(Need::PostgreSQL(15), Need::Root);
    // Shorter than the interval at which a server that can be heard is told.
    let cluster = cluster_with(15, Options::default().setting("wal_sender_timeout", "6s"));
    let walden = Walden::configure(cluster.scratch(), &site(&cluster));
    let spool = cluster.scratch().path().join("walden/state/spool");
    fs::create_dir_all(&spool).unwrap();
    for folder in [spool.parent().unwrap(), &spool] {
        cluster.scratch().account().own(folder);
    }
    let volume = Volume::mount(&spool, 900);
    cluster.scratch().account().own(&spool);
    let receiver = Receiver::start(cluster.scratch(), walden);
    receive_something(&receiver, &cluster);
    let paused = |receiver: &Receiver, paused: bool| {
        receiver.wait_for_state("the pause", |state| (state["paused"] == paused).then_some(()));
    };
    volume.fill(500);
    paused(&receiver, true);
    write_segments(&cluster, 3);
    // The slot keeps what is not received, and the connection stays: the server hears of us, and we not of it.
    let since = cluster.sql("select clock_timestamp()");
    let sender =
        format!("select pid, reply_time > '{since}'::timestamptz + interval '13s' from pg_stat_replication");
    let process = cluster.sql("select pid from pg_stat_replication");
    wait_for("two timeouts of the server to pass", || {
        let found = cluster.rows(&sender);
        assert!(found.len() == 1 && found[0][0] == process, "{found:?} is not {process}: {}", cluster.log());
        (found[0][1] == "t").then_some(())
    });
    let kept =
        cluster.sql("select pg_current_wal_lsn() - restart_lsn from pg_replication_slots where active");
    assert!(kept.parse::<u64>().unwrap() >= 2 << 20, "{kept}");
    assert_eq!(receiver.checked("receiver").0, "failed");
    volume.fill(0);
    paused(&receiver, false);
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 4);
}
