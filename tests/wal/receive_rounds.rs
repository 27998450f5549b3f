//! Receiver and server are killed and the server's disk is lost, with `ack = "store"` the spool too: every row whose commit
//! was acknowledged is there after a restore.
//!
//! What was acknowledged before it was written would be missing: the receiver dies first, and has only what is in files.
//! `scripts/bench/receive-rounds` does it more often, and measures what synchronous commits cost.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::receive_scene::{Receiver, cluster, lsn, site};
use crate::support::{Cluster, Need, Options, Pgbench, Server, Stop, Walden, program, require, wait_for};

/// Sessions that insert rows.
const CLIENTS: usize = 4;
/// More rows than a session ever comes to.
const ROWS: usize = 200_000;
/// A receiver that has had nothing to do for so long is idle.
const UNTIL_IDLE: Duration = Duration::from_secs(30);

/// A session that inserts row after row; what it printed was acknowledged.
struct Client {
    process: Child,
    printed: PathBuf,
}

impl Client {
    fn start(server: &Server, number: usize, folder: &Path) -> Self {
        let (script, printed) =
            (folder.join(format!("rows{number}.sql")), folder.join(format!("rows{number}")));
        let mut file = File::create(&script).unwrap();
        for row in number * ROWS..(number + 1) * ROWS {
            writeln!(file, "insert into r values ({row}, repeat('x', {})) returning n;", row % 900).unwrap();
        }
        let mut psql = Command::new(program("psql").expect("the test required PostgreSQL"));
        psql.args(["-XqAt", "-f"]).arg(&script).arg(server.connection());
        let psql = psql.stdin(Stdio::null()).stdout(File::create(&printed).unwrap()).stderr(Stdio::null());
        Self { process: psql.spawn().unwrap(), printed }
    }

    /// Returns the rows whose commits were acknowledged; a line without its end is no row.
    fn acknowledged(&self) -> Vec<u32> {
        let text = fs::read_to_string(&self.printed).unwrap();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| line.parse().unwrap()).collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn site_with(cluster: &Cluster, acknowledge: &str) -> crate::support::Site {
    site(cluster).lines(&format!("[sites.main.archive]\nack = \"{acknowledge}\"\n"))
}

/// Lets commits wait for a receiver by its name, and waits until they do.
#[track_caller]
pub fn commit_synchronously(server: &Server, names: &str) {
    server.sql(&format!("alter system set synchronous_standby_names = '{names}'"));
    server.sql("select pg_reload_conf()");
    wait_for("the receiver to be synchronous", || {
        let found = server
            .sql("select application_name from pg_stat_replication where sync_state = 'sync' order by 1");
        (found == names).then_some(())
    });
}

/// One loss; returns how many rows were acknowledged, and which of them are missing after the restore.
#[track_caller]
fn lose_everything(major: u32, acknowledge: &str, as_daemon: bool, rows: usize) -> (usize, Vec<u32>) {
    let mut cluster = cluster(major);
    let walden = Walden::configure(cluster.scratch(), &site_with(&cluster, acknowledge));
    let command: &[&str] = if as_daemon { &["-v", "daemon"] } else { &["-v", "wal", "receive"] };
    let mut receiver = Receiver::start_as(cluster.scratch(), walden, command);
    receiver.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    cluster.sql("create table r (n int, filler text)");
    receiver.walden.run(&["backup"]);
    commit_synchronously(&cluster, "walden_main");
    let folder = cluster.scratch().folder("clients");
    let clients: Vec<Client> = (0..CLIENTS).map(|number| Client::start(&cluster, number, &folder)).collect();
    let acknowledged = || clients.iter().flat_map(Client::acknowledged).collect::<Vec<u32>>();
    wait_for("rows to be acknowledged", || (acknowledged().len() >= rows).then_some(()));

    // The receiver first: what it acknowledged and had in memory alone nobody gives it again.
    receiver.kill();
    cluster.stop(Stop::Kill);
    if acknowledge == "store" {
        fs::remove_dir_all(receiver.spool()).unwrap();
    }
    fs::remove_dir_all(cluster.data_directory()).unwrap();
    let acknowledged = acknowledged();
    drop(clients);
    if acknowledge == "spool" {
        let killed = receiver.state();
        receiver.start_again();
        receiver.wait_for_state("all of the spool is stored", |state| {
            let told_since = state["written_at"] != killed["written_at"];
            let all = state["streaming"] == false && state["stored"] == state["received"];
            (told_since && all && state["received"].is_string()).then_some(())
        });
        receiver.stop();
    }

    let place = cluster.scratch().path().join("restored");
    receiver.walden.run(&["restore", "--target-dir", place.to_str().unwrap()]);
    let mut restored = Server::new(major, &place, &cluster.scratch().folder("run2"));
    restored.set("archive_mode", "off");
    restored.start();
    wait_for("recovery to end", || {
        restored.try_sql("select pg_is_in_recovery()").is_ok_and(|answer| answer == "f").then_some(())
    });
    let found = restored.sql("select n from r");
    let found: std::collections::BTreeSet<u32> = found.lines().map(|line| line.parse().unwrap()).collect();
    let missing: Vec<u32> = acknowledged.iter().copied().filter(|row| !found.contains(row)).collect();
    assert!(missing.is_empty(), "{missing:?} of {}\n{}", acknowledged.len(), receiver.log());
    (acknowledged.len(), missing)
}

/// Writes a line of the report that the script asked for.
fn report(line: &Value) {
    let Ok(path) = std::env::var("WALDEN_RECEIVE_REPORT") else { return };
    writeln!(File::options().append(true).create(true).open(path).unwrap(), "{line}").unwrap();
}

#[track_caller]
fn rounds(acknowledge: &str) {
    let rounds = std::env::var("WALDEN_RECEIVE_ROUNDS").map_or(1, |text| text.parse().unwrap());
    let (mut acknowledged, mut missing, mut seed) = (0, 0, 20_261_121u64);
    for round in 0..rounds {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        // Every other time it is the daemon that receives.
        let as_daemon = (round % 2 == 0) == (acknowledge == "store");
        let lost = lose_everything(15, acknowledge, as_daemon, 50 + (seed >> 33) as usize % 1500);
        acknowledged += lost.0;
        missing += lost.1.len();
    }
    report(&json!({
        "what": "loss", "ack": acknowledge, "rounds": rounds, "acknowledged": acknowledged, "missing": missing,
    }));
}

#[test]
fn acknowledged_by_the_spool_is_recovered_without_the_server_and_its_disk() {
    require!(Need::PostgreSQL(15));
    rounds("spool");
}

#[test]
fn acknowledged_by_the_store_is_recovered_without_server_receiver_and_their_disks() {
    require!(Need::PostgreSQL(15));
    rounds("store");
}

/// Either way to acknowledge once, on another major version than the rounds.
#[track_caller]
fn lose_everything_of(major: u32) {
    for acknowledge in ["spool", "store"] {
        lose_everything(major, acknowledge, acknowledge == "spool", 100);
    }
}

#[test]
fn acknowledged_by_either_is_recovered_on_the_oldest_version() {
    require!(Need::PostgreSQL(13));
    lose_everything_of(13);
}

#[test]
fn acknowledged_by_either_is_recovered_on_the_newest_version() {
    require!(Need::PostgreSQL(18));
    lose_everything_of(18);
}

/// Returns the position behind the last byte that is in the store under any name.
fn end_in_store(folder: &Path, segment_bytes: u64) -> u64 {
    let mut end = 0;
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            end = end.max(end_in_store(&entry.path(), segment_bytes));
            continue;
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        let hex = |range| name.get(range).and_then(|digits| u64::from_str_radix(digits, 16).ok());
        let (Some(_), Some(high), Some(low)) = (hex(0..8), hex(8..16), hex(16..24)) else { continue };
        let start = (high << 32) + low * segment_bytes;
        let bytes = match name.len() {
            24 => segment_bytes,
            _ if name.ends_with(".piece") => hex(34..42).expect("pieces are named by their bytes"),
            _ => continue,
        };
        end = end.max(start + bytes);
    }
    end
}

/// Transactions a second, by pgbench's own word.
fn tps(server: &Server, seconds: u32) -> f64 {
    let seconds = seconds.to_string();
    let printed = Pgbench::run(server, &["--no-vacuum", "--client", "8", "--jobs", "2", "--time", &seconds]);
    let line = printed.lines().find(|line| line.starts_with("tps = ")).unwrap();
    line["tps = ".len()..].split(' ').next().unwrap().parse().unwrap()
}

/// What commits cost, and how soon they are in the store; figures are long runs' affair.
#[test]
fn a_commit_comes_into_the_store_by_itself_however_it_is_acknowledged() {
    require!(Need::PostgreSQL(15));
    let seconds: u32 = std::env::var("WALDEN_RECEIVE_SECONDS").map_or(1, |text| text.parse().unwrap());
    let samples = if seconds > 1 { 20 } else { 2 };
    let cluster = Cluster::start_with(15, Options::default().setting("wal_keep_size", "1GB"));
    Pgbench::initialize(&cluster, 5);
    cluster.sql("create table one (n int)");
    report(&json!({ "what": "tps", "ack": "nobody", "tps": tps(&cluster, seconds) }));
    let walden = Walden::configure(cluster.scratch(), &site_with(&cluster, "spool"));
    let mut receiver = Receiver::start(cluster.scratch(), walden);
    for acknowledge in ["spool", "store"] {
        receiver.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
        let mut seconds_to_store = Vec::new();
        for _ in 0..samples {
            cluster.sql("insert into one values (1)");
            let end = lsn(&cluster.sql("select pg_current_wal_flush_lsn()"));
            let from = Instant::now();
            wait_for("the commit to be in the store", || {
                (end_in_store(&receiver.walden.repository(), 16 << 20) >= end).then_some(())
            });
            seconds_to_store.push(from.elapsed().as_secs_f64());
            std::thread::sleep(Duration::from_millis(100));
        }
        seconds_to_store.sort_by(f64::total_cmp);
        let (middle, last) = (seconds_to_store[samples / 2], seconds_to_store[samples - 1]);
        report(&json!({ "what": "to the store", "ack": acknowledge, "median_s": middle, "max_s": last }));
        commit_synchronously(&cluster, "walden_main");
        report(&json!({ "what": "tps", "ack": acknowledge, "tps": tps(&cluster, seconds) }));
        commit_synchronously(&cluster, "");
        if seconds > 1 {
            std::thread::sleep(UNTIL_IDLE);
            let (loaded, idle) = (receiver.memory_mib("VmHWM:"), receiver.memory_mib("VmRSS:"));
            report(&json!({ "what": "memory", "ack": acknowledge, "loaded_mib": loaded, "idle_mib": idle }));
        }
        receiver.stop();
        if acknowledge == "spool" {
            receiver.walden.reconfigure(cluster.scratch(), &site_with(&cluster, "store"));
            receiver.start_again();
        }
    }
    if seconds > 1 {
        report(&json!({ "what": "tps", "ack": "pg_receivewal", "tps": peer_tps(&cluster, seconds) }));
    }
}

/// The same with PostgreSQL's own receiver, which knows no store.
fn peer_tps(cluster: &Cluster, seconds: u32) -> f64 {
    let folder = cluster.scratch().folder("peer");
    let mut peer = Command::new(cluster.bin_directory().join("pg_receivewal"));
    peer.args(["--synchronous", "-D"]).arg(&folder).arg("-d").arg(cluster.connection());
    let mut peer = peer.env("PGAPPNAME", "peer").stdin(Stdio::null()).spawn().unwrap();
    commit_synchronously(cluster, "peer");
    let tps = tps(cluster, seconds);
    commit_synchronously(cluster, "");
    peer.kill().unwrap();
    peer.wait().unwrap();
    tps
}
