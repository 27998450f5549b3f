//! SIGTERM to who serves an instant restore, as a service manager sends it: the server is stopped, everything acknowledged is
//! there when it is resumed, nothing stays mounted, and the exit status says that all went well.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::instant_scene::{Restored, Scene};
use crate::source::wait_until_writable;
use crate::support::{
    Acknowledged, Draw, Need, Options, Running, Writers, mounts_below, processes_in, require, wait_for,
};

/// Starts of which each is told to end at a moment of its own.
const STARTS: usize = 20;

const STATE: &str = "select pg_get_wal_replay_pause_state()";
const COLD: &str = "select count(*), sum(n) from cold";

fn scene() -> Scene {
    let scene = Scene::start(Options::default());
    Writers::prepare(&scene.source, 1);
    let cold = "create table cold as select n, md5(n::text) as t from generate_series(1, 100000) n";
    scene.source.sql(cold);
    scene.source.backup();
    scene.source.sql("insert into cold values (0, 'later')");
    scene.source.sql("select pg_create_restore_point('here')");
    scene.source.archive_wal();
    scene
}

/// A restore's supervisor, run as a service manager runs one, so that one sees how it ends.
struct Supervisor(Running);

impl Supervisor {
    fn start(scene: &Scene, restored: &Restored<'_>) -> Self {
        let mut command = scene.walden().command();
        command.args(["--site", "main", "internal", "serve-restore"]).arg(&restored.directory);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(Running { process: command.spawn().unwrap() })
    }

    fn terminate(&self) {
        kill(Pid::from_raw(self.0.process.id() as i32), Signal::SIGTERM).unwrap();
    }

    #[track_caller]
    fn wait(mut self) -> ExitStatus {
        wait_for("the supervisor to end", || self.0.process.try_wait().unwrap())
    }
}

/// Nothing runs, and nothing is mounted, be it dead.
#[track_caller]
fn assert_ended(restored: &Restored<'_>) {
    assert_eq!(mounts_below(&restored.directory), [] as [PathBuf; 0]);
    wait_for("the server's processes to end", || processes_in(&restored.directory).is_empty().then_some(()));
}

/// Ends the supervisor that a command has left.
#[track_caller]
fn end(restored: &Restored<'_>) {
    kill(restored.supervisor().unwrap(), Signal::SIGTERM).unwrap();
    wait_for("the supervisor to end", || restored.supervisor().is_none().then_some(()));
    assert_ended(restored);
}

/// What the server has said.
#[track_caller]
fn server_log(scene: &Scene) -> String {
    let folder = fs::read_dir(scene.source.place("walden/state/log")).unwrap();
    let paths = folder.map(|entry| entry.unwrap().path());
    let logs: Vec<PathBuf> = paths.filter(|path| path.to_str().unwrap().ends_with(".server.log")).collect();
    assert_eq!(logs.len(), 1, "{logs:?}");
    fs::read_to_string(&logs[0]).unwrap()
}

#[test]
fn what_was_acknowledged_is_there_after_sigterm_under_load() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "128KiB"]);
    restored.wait_until_writable(&mut beside);
    drop(beside);
    end(&restored);
    let mut acknowledged = Acknowledged::default();
    for (signals, is_for_all) in [(1, false), (3, false), (1, true)] {
        let supervisor = Supervisor::start(&scene, &restored);
        wait_until_writable(&restored);
        acknowledged.assert_hold(&restored);
        let load = Writers::start(&restored, 1, &acknowledged);
        load.wait_for_commits(100);
        if is_for_all {
            // As systemd does by default, with every process of a service.
            for process in processes_in(&restored.directory) {
                kill(process, Signal::SIGTERM).unwrap_or_default();
            }
        }
        for _ in 0..signals {
            supervisor.terminate();
            std::thread::sleep(Duration::from_millis(30));
        }
        let status = supervisor.wait();
        assert_eq!(status.code(), Some(0), "{status}");
        acknowledged = load.end();
        assert_ended(&restored);
        let log = server_log(&scene);
        assert!(log.trim_end().ends_with("database system is shut down"), "{log}");
        assert!(!log.contains("immediate shutdown"), "{log}");
    }
    restored.assert_bare_refuses();
    assert_eq!(scene.holds().open_pins, 1, "it is still needed");
    restored.finish();
    acknowledged.assert_hold(&restored);
    acknowledged.assert_rest(&restored);
    restored.assert_ends_sound();
}

/// While it opens, mounts, starts PostgreSQL, and recovers.
#[test]
fn sigterm_at_any_moment_of_a_start_leaves_no_mount_and_the_next_start_is_right() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let (restored, _) = scene.answering("restored", &["--target-name", "here", "--target-action", "pause"]);
    end(&restored);
    let is_there = || restored.try_sql(STATE).is_ok_and(|state| state == "paused").then_some(());
    let (begun, supervisor) = (Instant::now(), Supervisor::start(&scene, &restored));
    wait_for("the pause", is_there);
    let undisturbed = begun.elapsed();
    supervisor.terminate();
    assert_eq!(supervisor.wait().code(), Some(0));
    assert_ended(&restored);

    let (mut draw, mut in_peace, mut mounted, mut started) = (Draw(0x7ef), 0, 0, 0);
    for start in 0..STARTS {
        let supervisor = Supervisor::start(&scene, &restored);
        std::thread::sleep(undisturbed.mul_f64(draw.below(1000) as f64 / 1000.0));
        mounted += usize::from(!restored.mounts().is_empty());
        started += usize::from(!processes_in(&restored.directory).is_empty());
        supervisor.terminate();
        let status = supervisor.wait();
        // Before it listens it has done nothing.
        let is_early = status.signal() == Some(Signal::SIGTERM as i32);
        assert!(is_early || status.code() == Some(0), "start {start}: {status}");
        in_peace += usize::from(!is_early);
        assert_ended(&restored);
    }
    eprintln!("{in_peace} of {STARTS} in peace, {mounted} with a mount, {started} with a server");
    assert!(in_peace > STARTS / 2 && mounted > 0 && started > 0 && started < STARTS);
    restored.assert_bare_refuses_twice();
    restored.finish();
    wait_for("the pause", is_there);
    restored.sql("select pg_wal_replay_resume()");
    wait_until_writable(&restored);
    assert_eq!(restored.sql(COLD), "100001|5000050000");
    restored.assert_ends_sound();
}
