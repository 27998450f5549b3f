//! `kill -9` of the supervisor, of the postmaster, of both and of a whole host, at moments drawn from a seed while the rest of
//! the basebackup comes: every row that the restored server acknowledged is there after `restore --resume`, and after the end.
//!
//! The seed is printed; `WALDEN_KILL_SEED` draws the same moments again. The server syncs: a mount that died must not take
//! what it was told is durable. In the end the directory is plain and PostgreSQL's own programs read every page of it.

use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::instant_scene::{Beside, Restored, Scene, Victim, is_alive, is_there, word};
use crate::support::{Chaos, Checksums, Ledger, Need, Options, processes_in, require, wait_for};

/// Kills of one restore; the last one may find it plain.
const ROUNDS: usize = 3;
/// So much load before a kill at least, and so much longer at most.
const COMMITS: i64 = 30;
const DELAY_MAX: Duration = Duration::from_secs(3);
/// Some minutes for all of it: no round meets its end unless a test wants that.
const RATE: &str = "256KiB";

/// Moments drawn from a seed.
struct Moments {
    state: u64,
}

impl Moments {
    fn new(test: &str) -> Self {
        let given = std::env::var("WALDEN_KILL_SEED").ok().map(|text| text.parse().unwrap());
        let nanos = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let seed = given.unwrap_or_else(|| nanos() as u64 ^ u64::from(std::process::id()));
        eprintln!("{test}: WALDEN_KILL_SEED={seed}");
        Self { state: seed }
    }

    fn next(&mut self) -> Duration {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        DELAY_MAX.mul_f64((self.state >> 40) as f64 / f64::from(1 << 24))
    }
}

fn source() -> Scene {
    Scene::filled(Options::default().setting("fsync", "on"))
}

/// Goes on, and finds every row that was acknowledged.
#[track_caller]
fn goes_on(restored: &Restored<'_>, acknowledged: i64) -> Beside {
    let mut beside = restored.resume_beside(&[]);
    restored.wait_until_writable(&mut beside);
    Ledger::assert_holds(restored, acknowledged);
    assert_eq!(restored.sql("select count(*), sum(n) from later"), "1000|500500");
    beside
}

/// Comes to the end, and checks what is left then.
#[track_caller]
fn ends_plain(scene: &Scene, restored: &Restored<'_>, mut beside: Beside, acknowledged: i64) {
    assert_eq!(word(&beside.report(), "state"), "plain");
    Ledger::assert_holds(restored, acknowledged);
    restored.amcheck();
    let rows = Checksums::of(restored);
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
    restored.assert_starts_natively();
    rows.assert_same(&Checksums::of(restored));
    restored.stop();
    let holds = scene.holds();
    assert_eq!((holds.pins, holds.open_pins, holds.open_leases), (1, 0, 0), "{holds:?}");
}

fn a_restore_survives(victim: Victim) {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let mut moments = Moments::new(&format!("{victim:?}"));
    let scene = source();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", RATE]);
    restored.wait_until_writable(&mut beside);
    let mut acknowledged = 0;
    for round in 0..ROUNDS {
        let load = Chaos::start(&restored);
        load.wait_for_commits(COMMITS);
        let delay = moments.next();
        eprintln!("round {round}: {victim:?} after {delay:?}");
        std::thread::sleep(delay);
        restored.kill(victim);
        acknowledged = load.abandon().acknowledged();
        // Whoever followed hears of it; a server that is gone is no success.
        wait_for("the command to end", || beside.has_ended().then_some(()));
        if victim == Victim::Host {
            restored.assert_bare_refuses_twice();
        }
        assert_eq!(scene.holds().open_pins, 1, "it is still needed");
        beside = goes_on(&restored, acknowledged);
    }
    drop(beside);
    // As fast as it comes: nobody is killed any more.
    restored.kill(Victim::Host);
    let beside = hurry(&restored);
    Ledger::assert_holds(&restored, acknowledged);
    ends_plain(&scene, &restored, beside, acknowledged);
}

/// Goes on without a limit.
#[track_caller]
fn hurry(restored: &Restored<'_>) -> Beside {
    let mut beside = restored.resume_beside(&["--hydrate-rate", "none"]);
    restored.wait_until_writable(&mut beside);
    beside
}

#[test]
fn every_acknowledged_row_survives_the_death_of_the_supervisor() {
    a_restore_survives(Victim::Supervisor);
}

#[test]
fn every_acknowledged_row_survives_the_death_of_the_postmaster() {
    a_restore_survives(Victim::Postmaster);
}

#[test]
fn every_acknowledged_row_survives_the_death_of_both() {
    a_restore_survives(Victim::Both);
}

#[test]
fn every_acknowledged_row_survives_a_reboot() {
    a_restore_survives(Victim::Host);
}

/// At the very end, which is short: as soon as one of the two files is in its place, or some moment later. It is plain then,
/// or a resume makes it so.
#[test]
fn a_host_that_dies_while_the_last_files_come_to_their_place_loses_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let mut moments = Moments::new("the end");
    let scene = source();
    let beneath = scene.beneath();
    for round in 0..ROUNDS {
        let restored = scene.place(&format!("restored-{round}"));
        let mut beside = restored.begin_beside(&[]);
        restored.wait_until_writable(&mut beside);
        let load = Chaos::start(&restored);
        let seen = beneath.path(&restored.directory).join("global/pg_control");
        wait_for("pg_control to come to its place", || {
            beside.assert_no_failure();
            seen.exists().then_some(())
        });
        // The rest takes milliseconds.
        let delay = moments.next() / 30 * u32::try_from(round).unwrap();
        eprintln!("round {round}: the host after {delay:?}");
        std::thread::sleep(delay);
        load.wait_for_commits(1);
        restored.kill(Victim::Host);
        let acknowledged = load.abandon().acknowledged();
        drop(beside);
        if !restored.directory.join("PG_VERSION").exists() {
            restored.assert_bare_refuses();
            goes_on(&restored, acknowledged).report();
            restored.stop();
        }
        // From here on PostgreSQL needs nobody's help.
        restored.start();
        crate::source::wait_until_writable(&restored);
        // What PostgreSQL has dropped since then would come back from the basebackup under a mount.
        let on_top = restored.try_resume();
        assert!(restored.mounts().is_empty(), "a mount over a plain directory: {}", on_top.stderr);
        Ledger::assert_holds(&restored, acknowledged);
        restored.amcheck();
        restored.stop();
        let left = restored.try_resume();
        eprintln!("round {round}: resume after that: {:?} {}", left.code(), left.stderr);
        restored.assert_plain();
        restored.assert_checksums();
        fs::remove_dir_all(&restored.directory).unwrap();
    }
}

/// A mount that died, and a server that did not hear of it: what it has open may still write.
#[test]
fn a_supervisor_that_dies_takes_its_server_along() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = source();
    let (restored, _) = scene.answering("restored", &[]);
    restored.sql("create table kept as select n from generate_series(1, 1000) n");
    // Waits for no statement and has nothing to do: it must end all the same.
    restored.kill(Victim::Supervisor);
    assert!(!restored.answers());
    assert!(!restored.mounts().is_empty(), "the dead mount keeps everybody from the directory");
    let started = restored.pg_ctl(&["-w", "start"]);
    assert!(!started.success(), "a server starts on a dead mount");
    restored.finish();
    assert_eq!(restored.sql("select count(*) from kept"), "1000");
    restored.stop();
    restored.assert_plain();
}

/// Nobody tells a server that its owner has started: it goes on until it meets the mount, and until then holds it.
#[test]
fn a_server_that_its_owner_has_started_holds_the_mount_of_a_dead_supervisor() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = source();
    let (restored, _) = scene.answering("restored", &[]);
    restored.stop();
    restored.start();
    crate::source::wait_until_writable(&restored);
    let load = Chaos::start(&restored);
    load.wait_for_commits(COMMITS);
    let (supervisor, postmaster) = (restored.supervisor().unwrap(), restored.postmaster());
    // It is not to meet the dead mount before somebody else has.
    kill(postmaster, Signal::SIGSTOP).unwrap();
    kill(supervisor, Signal::SIGKILL).unwrap();
    wait_for("the supervisor to be gone", || (!is_alive(supervisor)).then_some(()));
    let refused = restored.try_resume();
    assert!(is_alive(postmaster), "it was to wait");
    assert!(!refused.success(), "a mount beside one that is still written to");
    assert!(
        refused.stderr.contains(&postmaster.to_string()),
        "who holds it is not named: {}",
        refused.stderr
    );
    for signal in [Signal::SIGQUIT, Signal::SIGCONT] {
        kill(postmaster, signal).unwrap();
    }
    let is_gone = || processes_in(&restored.directory).is_empty() && !is_there(postmaster);
    wait_for("the server to be gone, and collected", || is_gone().then_some(()));
    let acknowledged = load.abandon().acknowledged();
    if restored.supervisor().is_none() {
        goes_on(&restored, acknowledged);
    }
    restored.finish();
    Ledger::assert_holds(&restored, acknowledged);
    restored.amcheck();
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}

/// One process of the server that dies takes all of its sessions along, and not the server: before it is plain, and after.
#[test]
fn a_backend_that_is_killed_ends_no_server() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = source();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "3MiB"]);
    restored.wait_until_writable(&mut beside);
    restored.sql("create table kept as select n from generate_series(1, 1000) n");
    let crash = || {
        let pid = restored.sql("select pid from pg_stat_activity where backend_type = 'walwriter'");
        let pid = Pid::from_raw(pid.parse().unwrap());
        kill(pid, Signal::SIGKILL).unwrap();
        wait_for("the process to be gone", || (!is_alive(pid)).then_some(()));
        let rows = "select count(*) from kept";
        wait_for("the server to recover", || {
            restored.try_sql(rows).is_ok_and(|it| it == "1000").then_some(())
        });
        crate::source::wait_until_writable(&restored);
    };
    crash();
    assert_eq!(word(&beside.report(), "state"), "plain");
    crash();
    restored.amcheck();
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}
