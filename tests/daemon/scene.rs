//! A server with small segments, its site, and a daemon that can be ended in several ways.

use std::fs;
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use walden::catalog::PLAN_FILE_NAME;

use crate::support::{Cluster, Options, Run, Site, Walden, wait_for};

/// A cluster that keeps all its WAL, and its Walden; nothing is archived yet.
pub struct Scene {
    // Dropped in this order: the server has to be gone before its folder.
    pub cluster: Cluster,
    pub walden: Walden,
}

impl Deref for Scene {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl Scene {
    /// Starts a cluster of a major version; `adjust` says how the site is configured.
    #[track_caller]
    pub fn start(major: u32, adjust: impl Fn(Site) -> Site) -> Self {
        Self::start_with_segments(major, 1, adjust)
    }

    /// The same with segments of so many MiB.
    #[track_caller]
    pub fn start_with_segments(major: u32, mebibytes: u32, adjust: impl Fn(Site) -> Site) -> Self {
        let options = Options::default().initdb(&format!("--wal-segsize={mebibytes}"));
        // Without a command that succeeds nothing is archived, and everything stays marked ready.
        let options = options.setting("wal_keep_size", "2GB");
        let cluster = Cluster::start_with(major, options.setting("archive_command", "false"));
        let site = Site::of(&cluster, cluster.data_directory()).bin_directory(&cluster.bin_directory());
        let walden = Walden::configure(cluster.scratch(), &adjust(site));
        Self { cluster, walden }
    }

    /// Starts a daemon and waits until it listens.
    #[track_caller]
    pub fn daemon(&self) -> Daemon {
        Daemon::start(self.walden.command(), &self.socket(), &self.scratch().path().join("daemon.log"))
    }

    /// Starts a daemon as root, which the test has to be, and waits until it listens.
    #[track_caller]
    pub fn daemon_of_root(&self) -> Daemon {
        let mut command = Command::new(self.walden.command().get_program());
        command.arg("--config").arg(self.walden.configuration_file());
        Daemon::start(command, &self.socket(), &self.scratch().path().join("daemon.log"))
    }

    /// Returns where the daemon listens.
    pub fn socket(&self) -> PathBuf {
        self.walden.configuration_file().with_file_name("run").join("daemon.sock")
    }

    /// Lets PostgreSQL archive from now on.
    pub fn archive(&self) {
        self.set_archive_command(&self.walden.archive_command());
    }

    /// Ends some segments while nothing archives them; returns their names.
    #[track_caller]
    pub fn end_segments(&self, count: usize) -> Vec<String> {
        let end = "select pg_logical_emit_message(false, 'test', repeat(md5(random()::text), 9000));
                   select pg_walfile_name(pg_switch_wal());";
        let names = self.sql(&end.repeat(count));
        names.lines().filter(|line| line.len() == 24).map(str::to_owned).collect()
    }

    /// Waits until no segment has changed within the last second.
    #[track_caller]
    pub fn settle(&self, segments: &[String]) {
        wait_for("the segments to be left alone", || {
            let age = |name: &String| fs::metadata(self.segment(name)).unwrap().modified().unwrap().elapsed();
            segments.iter().all(|name| age(name).is_ok_and(|age| age.as_secs() >= 1)).then_some(())
        });
    }

    /// Makes the command by which PostgreSQL has a segment archived.
    pub fn push(&self, segment: &str) -> Command {
        let mut command = self.walden.command();
        command.args(["wal", "push", &format!("pg_wal/{segment}")]).current_dir(self.data_directory());
        command
    }

    /// Has a segment archived by hand, which has to succeed.
    #[track_caller]
    pub fn pushed(&self, segment: &str) -> Run {
        Run::of(&mut self.push(segment), "").expect_success()
    }

    /// Returns where a file of `pg_wal` is.
    pub fn segment(&self, name: &str) -> PathBuf {
        self.data_directory().join("pg_wal").join(name)
    }

    /// Checks that the archive has a segment, byte for byte.
    #[track_caller]
    pub fn assert_archived(&self, segment: &str) {
        let data = self.data_directory();
        let mut command = self.walden.command();
        command.args(["wal", "fetch", segment, "fetched"]).current_dir(data);
        Run::of(&mut command, "").expect_success();
        let same = fs::read(data.join("fetched")).unwrap() == fs::read(self.segment(segment)).unwrap();
        assert!(same, "{segment} came back different");
        // The plan pins the end of the archive for a recovery; here each fetch is one of its own.
        for file in ["fetched", PLAN_FILE_NAME] {
            fs::remove_file(data.join(file)).unwrap();
        }
    }

    /// Says whether the repository has an object for a segment.
    pub fn is_stored(&self, segment: &str) -> bool {
        let run = self.walden.json(&["wal", "list"]);
        let timelines = run["clusters"].as_array().into_iter().flatten();
        let timelines = timelines.flat_map(|cluster| cluster["timelines"].as_array().into_iter().flatten());
        let runs = timelines.flat_map(|timeline| timeline["runs"].as_array().into_iter().flatten());
        runs.into_iter().any(|run| {
            let (first, last) = (run["first"].as_str().unwrap(), run["last"].as_str().unwrap());
            (first..=last).contains(&segment)
        })
    }
}

/// Documented are five seconds for a daemon to end: that what it waits for adds up to less is asserted where those waits
/// stand, when they are compiled. Here is told apart what would hold it up for a minute or for good, on a machine that is
/// loaded.
const ENDING: Duration = Duration::from_secs(25);

/// A daemon; it is killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until it listens.
    #[track_caller]
    fn start(command: Command, socket: &Path, log: &Path) -> Self {
        let mut daemon = Self::spawn(command, log);
        wait_for("the daemon to listen", || {
            assert!(daemon.process.try_wait().unwrap().is_none(), "the daemon ended:\n{}", daemon.log());
            UnixStream::connect(socket).ok()
        });
        daemon
    }

    fn spawn(mut command: Command, log: &Path) -> Self {
        let file = fs::OpenOptions::new().create(true).append(true).open(log).unwrap();
        command.args(["-vv", "daemon"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        Self { process: command.spawn().unwrap(), log: log.to_owned() }
    }

    /// Returns all that was logged, by earlier daemons as well.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Returns its process.
    pub fn process(&self) -> u32 {
        self.process.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    /// Waits until it has ended, as it was told to.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + ENDING;
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it has not ended within {ENDING:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends it without a chance to do anything about it.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
