//! A server that is received from, the receiver, and ways to look at what came of it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::scene::{find, shell};
use crate::support::{Cluster, Options, Run, Scratch, Server, Site, Walden, wait_for};

/// Walden that receives, with its log.
pub struct Receiver {
    pub walden: Walden,
    log: PathBuf,
    state: PathBuf,
    command: Vec<String>,
    /// How many threads the runtime has, if not one for each core.
    threads: Option<u32>,
    process: Option<Child>,
}

/// Documented are five seconds for a receiver to end: that what it waits for adds up to less is asserted where those waits
/// stand, when they are compiled. Here is told apart what would hold it up for a minute or for good, on a machine that is
/// loaded.
const ENDING: Duration = Duration::from_secs(25);

fn runs_of(list: &Value, timeline: u64) -> Vec<(String, String)> {
    let timelines = list["clusters"][0]["timelines"].as_array().cloned().unwrap_or_default();
    let found = timelines.into_iter().find(|found| found["timeline"] == timeline);
    let runs = found.map(|found| found["runs"].as_array().cloned().unwrap()).unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    runs.iter().map(|run| (text(&run["first"]), text(&run["last"]))).collect()
}

/// Makes a cluster with small segments that keeps all its WAL, so that it can be compared.
#[track_caller]
pub fn cluster(major: u32) -> Cluster {
    cluster_with(major, Options::default())
}

/// The same with further options.
#[track_caller]
pub fn cluster_with(major: u32, options: Options) -> Cluster {
    let options = options.initdb("--wal-segsize=1").setting("wal_keep_size", "1GB");
    Cluster::start_with(major, options.setting("archive_mode", "off"))
}

/// Describes the site of a cluster that is received from.
pub fn site(cluster: &Cluster) -> Site {
    Site::of(cluster, cluster.data_directory())
        .bin_directory(&cluster.bin_directory())
        .key("wal = \"receive\"")
}

impl Receiver {
    /// Starts receiving from a cluster.
    #[track_caller]
    pub fn of(cluster: &Cluster) -> Self {
        Self::start(cluster.scratch(), Walden::configure(cluster.scratch(), &site(cluster)))
    }

    /// Starts receiving for a configuration.
    #[track_caller]
    pub fn start(scratch: &Scratch, walden: Walden) -> Self {
        Self::start_as(scratch, walden, &["-v", "wal", "receive"])
    }

    /// Starts receiving by another command than `wal receive`.
    #[track_caller]
    pub fn start_as(scratch: &Scratch, walden: Walden, command: &[&str]) -> Self {
        Self::start_on(None, scratch, walden, command)
    }

    /// Starts receiving on one thread of the runtime, so that whoever holds it up holds up all.
    #[track_caller]
    pub fn start_on_one_thread(scratch: &Scratch, walden: Walden, command: &[&str]) -> Self {
        Self::start_on(Some(1), scratch, walden, command)
    }

    #[track_caller]
    fn start_on(threads: Option<u32>, scratch: &Scratch, walden: Walden, command: &[&str]) -> Self {
        let command = command.iter().map(|argument| (*argument).to_owned()).collect();
        let log = scratch.path().join("receive.log");
        let state = scratch.path().join("walden/state/spool/main/receive.json");
        let mut receiver = Self { walden, log, state, command, threads, process: None };
        receiver.start_again();
        receiver
    }

    #[track_caller]
    pub fn start_again(&mut self) {
        assert!(self.process.is_none());
        let log = File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = self.walden.command();
        command.args(&self.command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        if let Some(threads) = self.threads {
            command.env("TOKIO_WORKER_THREADS", threads.to_string());
        }
        self.process = Some(command.spawn().unwrap());
    }

    /// Asks it to end and waits until it has.
    #[track_caller]
    pub fn stop(&mut self) {
        self.stop_within(crate::support::PATIENCE);
    }

    /// The same where something hangs that nobody is to wait for.
    #[track_caller]
    pub fn stop_soon(&mut self) {
        self.stop_within(ENDING);
    }

    #[track_caller]
    fn stop_within(&mut self, patience: Duration) {
        let mut process = self.process.take().unwrap();
        // A process that was only just started has not said yet that it listens to it.
        wait_for("the receiver to listen to signals", || {
            let caught = u64::from_str_radix(&status_line(process.id(), "SigCgt:"), 16).unwrap();
            (caught & 1 << (Signal::SIGTERM as u64 - 1) != 0).then_some(())
        });
        kill(Pid::from_raw(process.id() as i32), Signal::SIGTERM).unwrap();
        let deadline = Instant::now() + patience;
        let status = loop {
            match process.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                None => {
                    let _ = process.kill();
                    panic!("it has not ended within {patience:?}\n{}", self.log());
                }
            }
        };
        assert!(status.success(), "{status}\n{}", self.log());
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn wait_for_end(&mut self) -> ExitStatus {
        let mut process = self.process.take().unwrap();
        wait_for("the receiver to end by itself", || process.try_wait().unwrap())
    }

    /// Waits until WAL comes in.
    #[track_caller]
    pub fn wait_until_streaming(&self) {
        self.wait_for_state("streaming", |state| (state["streaming"] == true).then_some(()));
    }

    /// Kills it where it stands.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// Returns the site's spool folder.
    pub fn spool(&self) -> PathBuf {
        self.state.parent().unwrap().to_owned()
    }

    /// Returns a line of the process's memory, such as `VmHWM:`.
    pub fn memory_mib(&self, key: &str) -> u64 {
        let line = status_line(self.process.as_ref().unwrap().id(), key);
        line.trim_end_matches("kB").trim().parse::<u64>().unwrap() / 1024
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns `receive.json`, null while there is none.
    pub fn state(&self) -> Value {
        fs::read(&self.state)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or(Value::Null)
    }

    /// Returns what `walden check` says of something: how it is, and what was seen.
    #[track_caller]
    pub fn checked(&self, name: &str) -> (String, String) {
        // Where nobody receives, no segment comes back however long one waits.
        let run = self.walden.try_run(&["--output", "json", "check", "--wal-timeout", "5"]);
        let items: Value = serde_json::from_str(&run.stdout).unwrap_or_else(|_| panic!("{run:?}"));
        let item = items.as_array().unwrap().iter().find(|item| item["name"] == name);
        let item = item.unwrap_or_else(|| panic!("no line \"{name}\" in {items:#}"));
        let text = |key: &str| item[key].as_str().unwrap().to_owned();
        (text("status"), text("detail"))
    }

    /// Lets `receive.json` be as old as if it had been written at a time, by a receiver that has ended.
    #[track_caller]
    pub fn date_state(&self, written_at: &str) {
        assert!(self.process.is_none());
        let mut state = self.state();
        state["written_at"] = written_at.into();
        fs::write(&self.state, state.to_string()).unwrap();
    }

    /// Waits until the state holds something.
    #[track_caller]
    pub fn wait_for_state<T>(&self, what: &str, found: impl Fn(&Value) -> Option<T>) -> T {
        wait_for(&format!("the receiver's state: {what}"), || found(&self.state()))
    }

    /// Waits until the store has everything up to what the server wrote so far.
    #[track_caller]
    pub fn wait_until_stored(&self, server: &Server) {
        let end = lsn(&server.sql("select pg_current_wal_flush_lsn()"));
        let log = |state: &Value| format!("{state:#}\n{}", self.log());
        let deadline = Instant::now() + crate::support::PATIENCE;
        while self.state()["stored"].as_str().map(lsn) < Some(end) {
            assert!(Instant::now() < deadline, "{}", log(&self.state()));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns first and last segment of each run of a timeline in the archive.
    #[track_caller]
    pub fn runs(&self, timeline: u64) -> Vec<(String, String)> {
        runs_of(&self.walden.json(&["wal", "list"]), timeline)
    }

    /// Returns the same where the archive has a history that nobody can use, if the command says so.
    #[track_caller]
    pub fn runs_beside_a_spoiled_history(&self, timeline: u64) -> Vec<(String, String)> {
        let listed = self.walden.try_run(&["--output", "json", "wal", "list"]).expect_code(3);
        let mut documents = serde_json::Deserializer::from_str(&listed.stdout).into_iter::<Value>();
        let list = documents.next().unwrap().unwrap();
        let timelines = list["clusters"][0]["timelines"].as_array().unwrap();
        let error = timelines.iter().find_map(|found| found["history_error"].as_str()).unwrap();
        assert!(listed.stderr.contains(error), "{}", listed.stderr);
        runs_of(&list, timeline)
    }

    /// Checks that a timeline's segments are there without a hole, and each what the server has.
    #[track_caller]
    pub fn assert_equals_pg_wal(&self, server: &Server, timeline: u64, at_least: usize) {
        let runs = self.runs(timeline);
        assert_eq!(runs.len(), 1, "{runs:?}\n{}", self.log());
        let (first, last) = &runs[0];
        let segments = segments_between(first, last);
        assert!(segments.len() >= at_least, "{runs:?}");
        for segment in segments {
            let own = fs::read(server.data_directory().join("pg_wal").join(&segment));
            let own = own.unwrap_or_else(|error| panic!("{segment}: {error}"));
            assert!(self.fetch(server, &segment).as_deref() == Some(&own[..]), "{segment} differs");
        }
    }

    /// Returns the object of a file of the archive, as a file of the repository.
    #[track_caller]
    pub fn object(&self, name: &str) -> PathBuf {
        find(&self.walden.repository(), name).unwrap_or_else(|| panic!("{name} is not in the repository"))
    }

    /// Fetches a file of the archive as a standby would; nothing where it is absent.
    #[track_caller]
    pub fn fetch(&self, server: &Server, name: &str) -> Option<Vec<u8>> {
        let folder = server.data_directory().with_file_name("fetching");
        let data = server.data_directory().display();
        let there = folder.display();
        shell(
            server.data_directory().parent().unwrap(),
            &format!(
                "mkdir -p {there}/global && cp {data}/global/pg_control {there}/global/ && touch {there}/standby.signal && rm -f {there}/out"
            ),
        );
        let mut command = self.walden.command();
        let run = Run::of(command.args(["wal", "fetch", name, "out"]).current_dir(&folder), "");
        match run.status.code() {
            Some(0) => Some(fs::read(folder.join("out")).unwrap()),
            Some(1) => None,
            _ => panic!("{run:?}"),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// Returns what the kernel says of a process.
fn status_line(process: u32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned()
}

/// Reads an LSN.
pub fn lsn(text: &str) -> u64 {
    let (high, low) = text.trim().split_once('/').unwrap();
    u64::from_str_radix(high, 16).unwrap() << 32 | u64::from_str_radix(low, 16).unwrap()
}

/// Names the segment of 1 MiB on timeline 1 that holds a position, or begins with it.
pub fn segment_at(position: u64) -> String {
    format!("00000001{:08X}{:08X}", position >> 32, (position & 0xFFFF_FFFF) >> 20)
}

/// Names the segments of 1 MiB from one to another, both included.
pub fn segments_between(first: &str, last: &str) -> Vec<String> {
    let number = |name: &str| {
        u64::from_str_radix(&name[8..16], 16).unwrap() << 12 | u64::from_str_radix(&name[16..], 16).unwrap()
    };
    let name = |number: u64| format!("{}{:08X}{:08X}", &first[..8], number >> 12, number & 0xFFF);
    (number(first)..=number(last)).map(name).collect()
}
