//! SIGTERM, as a service manager sends it: the server is stopped, everything acknowledged is there at the next start, nothing
//! stays mounted, and the exit status says that all went well; under load, while data comes, at any moment of a start.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::processes::Processes;
use crate::site::{Clone, Source};
use crate::support::{Acknowledged, Draw, Need, Options, Running, Writers, mounts_below, require, wait_for};

/// Starts of which each is told to end at a moment of its own.
const STARTS: usize = 20;

fn source() -> Source {
    let source = Source::start(Options::default());
    Writers::prepare(&source, 1);
    source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 100000) n");
    source.backup_at_rest();
    source.sql("insert into cold values (0, 'later')");
    source.archive_wal();
    source
}

/// A clone's supervisor, run as a service manager runs one, so that one sees how it ends.
pub struct Supervisor(Running);

impl Supervisor {
    pub fn start(clone: &Clone) -> Self {
        let log = clone.folder().join("mount.log");
        let log = File::options().append(true).create(true).open(log).unwrap();
        let mut command = clone.walden.command();
        command.args(["--site", "main", "internal", "serve-clone", &clone.name]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Self(Running { process: command.spawn().unwrap() })
    }

    pub fn terminate(&self) {
        kill(Pid::from_raw(self.0.process.id() as i32), Signal::SIGTERM).unwrap();
    }

    #[track_caller]
    pub fn wait(mut self) -> ExitStatus {
        wait_for("the supervisor to end", || self.0.process.try_wait().unwrap())
    }
}

/// Nothing runs, and nothing is mounted, be it dead.
#[track_caller]
pub fn assert_ended(clone: &Clone) {
    assert_eq!(mounts_below(&clone.folder()), [] as [std::path::PathBuf; 0]);
    wait_for("the clone's processes to end", || Processes::of(clone).is_empty().then_some(()));
}

#[test]
fn what_was_acknowledged_is_there_after_sigterm_under_load() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("load", &["--no-start", "--hydrate-rate", "128KiB"]);
    let mut acknowledged = Acknowledged::default();
    let whole = clone.folder().join("upper/data/.walden/whole");
    for (signals, is_for_all) in [(1, false), (2, false), (5, false), (1, true)] {
        let supervisor = Supervisor::start(&clone);
        wait_for("the clone to answer", || clone.answers().then_some(()));
        acknowledged.assert_hold(&clone);
        let load = Writers::start(&clone, 1, &acknowledged);
        load.wait_for_commits(100);
        assert!(!whole.exists(), "its data still comes");
        if is_for_all {
            // As systemd does by default, with every process of a service.
            Processes::of(&clone)
                .all()
                .for_each(|process| kill(process, Signal::SIGTERM).unwrap_or_default());
        }
        for _ in 0..signals {
            supervisor.terminate();
            std::thread::sleep(Duration::from_millis(30));
        }
        let status = supervisor.wait();
        assert_eq!(status.code(), Some(0), "{status}");
        acknowledged = load.end();
        assert_ended(&clone);
        assert_eq!(clone.state(), "stopped");
        let log = fs::read_to_string(clone.folder().join("server.log")).unwrap();
        assert!(log.trim_end().ends_with("database system is shut down"), "{log}");
        assert!(!log.contains("immediate shutdown"), "{log}");
    }
    clone.run("start");
    acknowledged.assert_hold(&clone);
    clone.amcheck();
    clone.run("delete");
}

/// Returns how long a clone's first start takes here, with its recovery.
#[track_caller]
fn first_start(source: &Source) -> Duration {
    let clone = source.clone("measured", &["--no-start", "--no-hydrate"]);
    let began = Instant::now();
    let supervisor = Supervisor::start(&clone);
    wait_for("the clone to answer", || clone.answers().then_some(()));
    let took = began.elapsed();
    supervisor.terminate();
    assert_eq!(supervisor.wait().code(), Some(0));
    clone.run("delete");
    took
}

#[test]
fn sigterm_at_any_moment_of_a_start_leaves_no_mount_and_the_next_start_is_right() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let undisturbed = first_start(&source);
    let clone = source.clone("starting", &["--no-start", "--no-hydrate"]);
    let (mut draw, mut in_peace, mut recovering) = (Draw(0x7ef), 0, 0);
    let signal_file = clone.folder().join("upper/data/recovery.signal");
    for start in 0..STARTS {
        let supervisor = Supervisor::start(&clone);
        if start == 0 {
            // The one that lets it come to the end of its recovery is the last that can be hit in the middle of it.
            wait_for("recovery to begin", || signal_file.exists().then_some(()));
        } else {
            std::thread::sleep(undisturbed.mul_f64(draw.below(1000) as f64 / 1000.0));
        }
        recovering += usize::from(signal_file.exists());
        supervisor.terminate();
        let status = supervisor.wait();
        // Before it listens it has done nothing.
        let is_early = status.signal() == Some(Signal::SIGTERM as i32);
        assert!(is_early || status.code() == Some(0), "start {start}: {status}");
        in_peace += usize::from(!is_early);
        assert_ended(&clone);
    }
    assert!(
        in_peace > STARTS / 2 && recovering > 0,
        "{in_peace} of {STARTS} in peace, {recovering} in recovery"
    );
    clone.run("start");
    assert_eq!(clone.sql("select count(*), sum(n) from cold"), "100001|5000050000");
    clone.run("delete");
}
