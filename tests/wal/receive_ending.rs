//! A receiver that is told to end while something hangs: a server, a store, a disk. It ends soon, and loses nothing.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::receive::write_segments;
use crate::receive_scene::{Receiver, cluster, lsn, site};
use crate::support::{Cluster, Fault, Line, Need, RemoteS3, Site, Walden, require, wait_for};

const COMMAND: &[&str] = &["-v", "wal", "receive"];
const DAEMON: &[&str] = &["-v", "daemon"];

/// A file system that takes every request and answers none, like a mount whose server is gone.
struct DeadMount {
    folder: PathBuf,
    device: Option<File>,
}

impl DeadMount {
    #[track_caller]
    fn over(folder: &Path) -> Self {
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("walden-test"), folder, Some("fuse"), flags, Some(options.as_str())).unwrap();
        Self { folder: folder.to_owned(), device: Some(device) }
    }
}

impl Drop for DeadMount {
    fn drop(&mut self) {
        // Whoever still waits gets an error.
        drop(self.device.take());
        let _ = umount2(&self.folder, MntFlags::MNT_DETACH);
    }
}

#[track_caller]
fn over_line(cluster: &Cluster, line: &Line) -> Walden {
    let connection = line.connection();
    let nodes = Site::of(cluster, cluster.data_directory()).nodes(&[(connection.as_str(), "primary")]);
    Walden::configure(cluster.scratch(), &nodes.key("wal = \"receive\""))
}

/// Receives over a line that falls silent in some way, is told to end then, and goes on by another one.
#[track_caller]
fn ends_while_a_server_is_silent(command: &[&str], silence: impl Fn(&Line)) {
    let cluster = cluster(15);
    let line = Line::to(&cluster);
    silence(&line);
    let mut receiver = Receiver::start_as(cluster.scratch(), over_line(&cluster, &line), command);
    wait_for("it to wait for an answer", || (line.held() > 0).then_some(()));
    receiver.stop_soon();
    receiver.walden.reconfigure(cluster.scratch(), &site(&cluster));
    receiver.start_again();
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 1);
}

#[test]
fn the_command_ends_while_the_first_server_says_nothing() {
    require!(Need::PostgreSQL(15));
    ends_while_a_server_is_silent(COMMAND, Line::silence_everybody);
}

#[test]
fn the_daemon_ends_while_the_first_server_says_nothing() {
    require!(Need::PostgreSQL(15));
    ends_while_a_server_is_silent(DAEMON, Line::silence_everybody);
}

#[test]
fn the_command_ends_while_a_server_does_not_begin_to_stream() {
    require!(Need::PostgreSQL(15));
    ends_while_a_server_is_silent(COMMAND, Line::silence_streams);
}

#[test]
fn the_command_ends_while_the_slot_cannot_be_looked_at() {
    require!(Need::PostgreSQL(15));
    ends_while_a_server_is_silent(COMMAND, Line::silence_sessions);
}

#[track_caller]
fn ends_while_a_store_is_silent(command: &[&str]) {
    let cluster = cluster(15);
    let line = RemoteS3::start();
    // The store is waited for longer than the test is.
    let storage = line.storage("retry = \"1h\"\ntimeout = \"1h\"\n");
    let walden = Walden::configure(cluster.scratch(), &site(&cluster).storage(&storage));
    let mut receiver = Receiver::start_as(cluster.scratch(), walden, command);
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    line.inject("PUT", "", usize::MAX, Fault::Silence);
    line.take_requests();
    write_segments(&cluster, 3);
    wait_for("the upload", || line.take_requests().iter().any(|head| head.starts_with("PUT")).then_some(()));
    receiver.stop_soon();
    line.heal();
    receiver.start_again();
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 4);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

#[test]
fn the_command_ends_in_the_middle_of_an_upload_to_a_store_that_hangs() {
    require!(Need::PostgreSQL(15));
    ends_while_a_store_is_silent(COMMAND);
}

#[test]
fn the_daemon_ends_in_the_middle_of_an_upload_to_a_store_that_hangs() {
    require!(Need::PostgreSQL(15));
    ends_while_a_store_is_silent(DAEMON);
}

/// A thread that waits for a dead mount cannot be told anything: it is left behind.
#[test]
fn the_command_ends_while_the_repository_is_on_a_dead_mount() {
    require!(Need::PostgreSQL(15), Need::Folder, Need::Fuse, Need::Root);
    let cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    write_segments(&cluster, 2);
    receiver.wait_until_stored(&cluster);
    let (segment, _) = receiver.runs(1)[0].clone();
    receiver.stop();
    let folder = receiver.object(&segment).parent().unwrap().to_owned();
    let dead = DeadMount::over(&folder);
    receiver.start_again();
    let end = lsn(&cluster.sql("select pg_current_wal_flush_lsn()")) + 1;
    write_segments(&cluster, 1);
    receiver.wait_for_state("what is spooled", |state| {
        (state["received"].as_str().map(lsn) >= Some(end)).then_some(())
    });
    assert!(
        receiver.state()["store_problem"].is_null(),
        "it fails and does not hang: {:#}",
        receiver.state()
    );
    receiver.stop_soon();
    drop(dead);
    receiver.start_again();
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 3);
}

/// Returns the segments in the spool of the only cluster, the oldest first.
fn spooled(receiver: &Receiver) -> Vec<String> {
    let folders = fs::read_dir(receiver.spool()).unwrap().flatten().filter(|entry| entry.path().is_dir());
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).unwrap().flatten());
    let segment = |file: fs::DirEntry| Some(file.file_name().to_str()?.strip_suffix(".spool")?.to_owned());
    let mut segments: Vec<String> = files.filter_map(segment).collect();
    segments.sort();
    segments
}

/// What is on its way to the store is in memory. Once it is there the spool is to let it go, and hangs.
#[test]
fn the_command_ends_while_a_spool_on_a_dead_mount_is_to_let_segments_go() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let cluster = cluster(15);
    let line = RemoteS3::start();
    let storage = line.storage("retry = \"1h\"\ntimeout = \"1s\"\n");
    let walden = Walden::configure(cluster.scratch(), &site(&cluster).storage(&storage));
    let mut receiver = Receiver::start_on_one_thread(cluster.scratch(), walden, COMMAND);
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    // A piece that was on its way would hold back the segment.
    line.let_through("PUT", ".piece");
    line.inject("PUT", "", usize::MAX, Fault::Silence);
    line.take_requests();
    write_segments(&cluster, 3);
    let mut heads = Vec::new();
    let is_put = |heads: &[String], segment: &str| {
        let target = |head: &String| Some(head.strip_prefix("PUT ")?.split([' ', '?']).next()?.to_owned());
        heads.iter().filter_map(target).any(|target| target.ends_with(segment))
    };
    let oldest = wait_for("the oldest segment to be on its way, with others behind it", || {
        heads.extend(line.take_requests());
        let segments = spooled(&receiver);
        // The newest one would stay.
        segments.first().filter(|oldest| segments.len() > 1 && is_put(&heads, oldest)).cloned()
    });
    let dead = DeadMount::over(&receiver.spool());
    line.heal();
    wait_for("the store to have it", || {
        receiver.runs(1).last().is_some_and(|(_, last)| *last >= oldest).then_some(())
    });
    receiver.stop_soon();
    drop(dead);
    receiver.start_again();
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 4);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}

/// What could not be spooled was not acknowledged, and comes again.
#[test]
fn the_command_ends_while_the_spool_is_on_a_dead_mount() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let cluster = cluster(15);
    let mut receiver = Receiver::of(&cluster);
    receiver.wait_until_streaming();
    write_segments(&cluster, 1);
    receiver.wait_until_stored(&cluster);
    let dead = DeadMount::over(&receiver.spool());
    // The next segment wants a file of its own. What the receiver says of itself is below the mount as well.
    write_segments(&cluster, 2);
    wait_for("the server to have sent it", || {
        let sent = "select sent_lsn >= pg_current_wal_flush_lsn() from pg_stat_replication";
        (cluster.sql(sent) == "t").then_some(())
    });
    // It is told now and then where we are, as after each write: by then all that is on its way has come.
    let since = cluster.sql("select clock_timestamp()");
    let told = format!("select reply_time > '{since}'::timestamptz + interval '1s' from pg_stat_replication");
    wait_for("the server to be told again", || (cluster.sql(&told) == "t").then_some(()));
    let behind = "select write_lsn < sent_lsn, flush_lsn < sent_lsn from pg_stat_replication";
    assert_eq!(cluster.rows(behind), [["t", "t"]], "{}", receiver.log());
    receiver.stop_soon();
    // What hangs was not waited for any longer than is documented.
    assert!(receiver.log().contains("ending at once, with something that hangs"), "{}", receiver.log());
    drop(dead);
    receiver.start_again();
    receiver.wait_until_stored(&cluster);
    receiver.assert_equals_pg_wal(&cluster, 1, 3);
    assert_eq!(receiver.state()["gaps"], serde_json::json!([]), "{}", receiver.log());
}
