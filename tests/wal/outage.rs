//! The store is away under load for longer than anybody waits, while the daemon and `wal push` are killed again and again;
//! then it comes back: archiving goes on by itself, nothing is missing, and a standby that lives on the archive alone has
//! neither stopped nor promoted (failures 1, 1a, 10 and 39 together).
//!
//! The same site is archived by `archive_command` first and received after that. `scripts/bench/wal-outage` runs it for
//! ten minutes each; here it is seconds.

use std::env;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::outage_report::report;
use crate::receive_scene::{Receiver, lsn, segments_between};
use crate::scene::base_backup;
use crate::support::{Cluster, Fault, Need, Options, PATIENCE, Pgbench, Proxy, S3, Server, Site, Stop};
use crate::support::{Walden, require, s3_storage, wait_for};

/// Seconds without the store, unless `WALDEN_OUTAGE_SECONDS` says how many.
const OUTAGE: Duration = Duration::from_secs(6);
/// Kills in that time, unless `WALDEN_OUTAGE_KILLS` says how many.
const KILLS: u32 = 2;
/// Transactions a second: under a megabyte of WAL, of which ten minutes are to be kept and compared.
const RATE: u32 = 1000;
/// As short as the outage. A long one is met with what Walden does unless told otherwise.
const IMPATIENT_STORE: &str = "timeout = \"1s\"\nretry = \"3s\"\n";
const IMPATIENT_FETCH: &str = "fetch_wait = \"1s\"\n";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Push,
    Receive,
}

#[test]
fn archiving_goes_on_after_an_outage_with_kill_9_and_a_standby_outlives_it() {
    require!(Need::PostgreSQL(15));
    let mut scene = Scene::new();
    let load = Pgbench::start_at_rate(&scene.cluster, 4, RATE);
    let outage = scene.outage(Way::Push);
    drop(load);
    scene.cluster.archive_wal();
    scene.assert_whole(Way::Push, outage);
    scene.receive_from_now_on();
    let load = Pgbench::start_at_rate(&scene.cluster, 4, RATE);
    let outage = scene.outage(Way::Receive);
    drop(load);
    scene.cluster.archive_wal();
    scene.daemon.wait_until_stored(&scene.cluster);
    scene.assert_whole(Way::Receive, outage);
    scene.standby.stop(Stop::Fast);
    scene.daemon.stop();
}

/// A server under load, its daemon, a store that can be taken away, and a standby that has nothing but the archive.
struct Scene {
    // Dropped in this order: the standby and the daemon have to be gone before the cluster's folder.
    standby: Server,
    daemon: Receiver,
    cluster: Cluster,
    line: Proxy,
    _store: S3,
    length: Duration,
    kills: u32,
    /// Nobody waits for long, as the outage is short.
    impatient: bool,
}

/// What an outage was like.
struct Outage {
    length: Duration,
    kills: u32,
    pushes_killed: usize,
    faults: usize,
    caught_up_after: Duration,
}

impl Scene {
    fn new() -> Self {
        let number = |name: &str| env::var(name).ok().map(|text| text.parse::<u32>().unwrap());
        let seconds = number("WALDEN_OUTAGE_SECONDS");
        let (length, impatient) =
            (seconds.map_or(OUTAGE, |s| Duration::from_secs(s.into())), seconds.is_none());
        let kills = number("WALDEN_OUTAGE_KILLS").unwrap_or(KILLS);
        // All WAL is kept, so that it can be compared.
        let options = Options::default().initdb("--wal-segsize=1").setting("wal_keep_size", "16GB");
        let cluster = Cluster::start_with(15, options.setting("archive_command", "false"));
        let scratch = cluster.scratch();
        let store = S3::over(&scratch.folder("objects"));
        let line = Proxy::to(&store.endpoint());
        let walden = Walden::configure(scratch, &site(&cluster, &line, impatient, Way::Push));
        Pgbench::initialize(&cluster, 1);
        let data = scratch.path().join("standby");
        base_backup(&cluster, &data, &["-X", "stream"]);
        scratch.file("standby/standby.signal", "");
        let mut standby = Server::new(15, &data, &scratch.folder("run-standby"));
        standby.set("restore_command", &walden.restore_command()).set("hot_standby", "on");
        standby.set("wal_retrieve_retry_interval", "100ms").set("archive_mode", "off");
        cluster.set_archive_command(&walden.archive_command());
        let daemon = Receiver::start_as(scratch, walden, &["-v", "daemon"]);
        standby.start();
        Self { standby, daemon, cluster, line, _store: store, length, kills, impatient }
    }

    fn position(&self) -> u64 {
        lsn(&self.cluster.sql("select pg_current_wal_flush_lsn()"))
    }

    /// Has the daemon receive what was archived by command so far.
    #[track_caller]
    fn receive_from_now_on(&mut self) {
        self.daemon.stop();
        self.cluster.set_archive_command("true");
        let site = site(&self.cluster, &self.line, self.impatient, Way::Receive);
        self.daemon.walden.reconfigure(self.cluster.scratch(), &site);
        self.daemon.start_again();
        self.daemon.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    }

    /// Takes the store away, kills what archives, brings it back and waits until the standby has all from before that.
    #[track_caller]
    fn outage(&mut self, way: Way) -> Outage {
        let refusal = Fault::refusal("503 Service Unavailable", "", "ServiceUnavailable");
        let faults = [Fault::Silence, refusal, Fault::CutRequest];
        let (away, mut pushes_killed) = (Instant::now(), 0);
        for number in 0..self.kills {
            self.line.inject_only(faults[number as usize % faults.len()].clone());
            let from = self.position();
            let until = away + self.length * (number + 1) / self.kills;
            thread::sleep(until.saturating_duration_since(Instant::now()));
            // What is to be archived piles up between any two kills.
            wait_for("a segment more", || (self.position() >= from + (1 << 20)).then_some(()));
            if way == Way::Push {
                pushes_killed += wait_for("a push to kill", || Some(self.kill_pushes()).filter(|&n| n > 0));
            }
            self.daemon.kill();
            self.assert_standby_follows();
            self.daemon.start_again();
        }
        let end = self.position();
        let (length, back) = (away.elapsed(), Instant::now());
        let faults = self.line.heal();
        let deadline = back + self.length + PATIENCE;
        while lsn(&self.standby.sql("select pg_last_wal_replay_lsn()")) < end {
            self.assert_standby_follows();
            assert!(Instant::now() < deadline, "{:#}\n{}", self.daemon.state(), self.daemon.log());
            thread::sleep(Duration::from_millis(100));
        }
        let caught_up_after = back.elapsed();
        Outage { length, kills: self.kills, pushes_killed, faults, caught_up_after }
    }

    #[track_caller]
    fn assert_standby_follows(&mut self) {
        assert!(self.standby.is_running(), "{}", self.standby.log());
        assert_eq!(self.standby.sql("select pg_is_in_recovery()"), "t");
    }

    /// Kills each `wal push` of the server; returns how many.
    fn kill_pushes(&self) -> usize {
        let configuration = self.daemon.walden.configuration_file().display().to_string();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let pushes = pids.filter(|pid| {
            // One that has just ended is none; the shell that started it has its words in one.
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let arguments = String::from_utf8_lossy(&arguments).into_owned();
            arguments.contains(&configuration) && arguments.contains("\0wal\0push\0")
        });
        pushes.filter(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok()).count()
    }

    /// Checks that the archive has every segment, byte for byte, and that the standby has what the server has.
    #[track_caller]
    fn assert_whole(&mut self, way: Way, outage: Outage) {
        // The archive has whole segments for it, and what autovacuum writes behind them is in none.
        let end = self.position() & !((1 << 20) - 1);
        let from = Instant::now();
        while lsn(&self.standby.sql("select pg_last_wal_replay_lsn()")) < end {
            self.assert_standby_follows();
            assert!(from.elapsed() < PATIENCE, "{:#}\n{}", self.daemon.state(), self.daemon.log());
            thread::sleep(Duration::from_millis(50));
        }
        let sums = "select sum(abalance), (select count(*) from pgbench_history) from pgbench_accounts";
        assert_eq!(self.standby.sql(sums), self.cluster.sql(sums));
        let check = self.daemon.walden.try_run(&["--output", "json", "wal", "check"]);
        let check: Value = serde_json::from_str(&check.stdout).unwrap_or_else(|_| panic!("{}", check.stderr));
        let holes = check["clusters"][0]["missing"].as_array().cloned().unwrap_or_default();
        let missing: u64 = holes.iter().map(|hole| hole["segments"].as_u64().unwrap()).sum();
        let promotions = self.standby.log().matches("selected new timeline").count();
        let runs = self.daemon.runs(1);
        let segments: usize = runs.iter().map(|(first, last)| segments_between(first, last).len()).sum();
        let name = if way == Way::Push { "push" } else { "receive" };
        report(&json!({
            "what": format!("outage, {name}"), "outage_seconds": outage.length.as_secs_f64().round(),
            "daemon_kills": outage.kills, "push_kills": outage.pushes_killed, "requests_failed": outage.faults,
            "segments": segments, "missing": missing, "promotions_by_error": promotions,
            "caught_up_seconds": (outage.caught_up_after.as_secs_f64() * 10.0).round() / 10.0,
        }));
        assert_eq!((missing, promotions), (0, 0), "{check:#}\n{}", self.standby.log());
        assert_eq!(check["ok"], true, "{check:#}");
        assert!(outage.faults > 0, "nothing was asked of the store while it was away");
        // Where WAL is pushed no receiver ever wrote its state.
        let gaps = if way == Way::Push { Value::Null } else { json!([]) };
        assert_eq!(self.daemon.state()["gaps"], gaps, "{:#}", self.daemon.state());
        self.daemon.assert_equals_pg_wal(&self.cluster, 1, outage.kills as usize);
    }
}

fn site(cluster: &Cluster, line: &Proxy, impatient: bool, way: Way) -> Site {
    let storage = s3_storage(&line.endpoint()) + if impatient { IMPATIENT_STORE } else { "" };
    let archive = if impatient { IMPATIENT_FETCH } else { "" };
    let site = Site::of(cluster, cluster.data_directory())
        .bin_directory(&cluster.bin_directory())
        .storage(&storage)
        .lines(&format!("[sites.main.archive]\n{archive}"));
    if way == Way::Receive { site.key("wal = \"receive\"") } else { site }
}
