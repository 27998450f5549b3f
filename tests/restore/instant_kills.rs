//! `kill -9` of the supervisor, of the postmaster, of both and of a whole host, at moments drawn from a seed while the rest of
//! the basebackup comes: every row that the restored server acknowledged is there after `restore --resume`, and after the end.
//!
//! The seed is printed; `WALDEN_KILL_SEED` draws the same moments again. The server syncs: a mount that died must not take
//! what it was told is durable. In the end the directory is plain and PostgreSQL's own programs read every page of it.
//! `scripts/bench/instant-kills` does it far more often (`WALDEN_KILL_ROUNDS`, for each of five tests) and has the counts written
//! down (`WALDEN_KILL_REPORT`).

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::instant_scene::{Beneath, Beside, Restored, Scene, Victim, is_alive, is_there, word};
use crate::support::{
    Acknowledged, Chaos, Checksums, Draw, Ledger, Need, Options, Writers, processes_in, require, wait_for,
};

/// Kills of a test, where nobody asks for another number, and of one restore in it.
const ROUNDS: usize = 3;
const LIFE: usize = 3;
/// So much load before a kill at least, and so much longer at most.
const COMMITS: i64 = 30;
const DELAY_MAX: Duration = Duration::from_secs(3);
/// How fast it comes to the first restore of a test, and to later ones: in some minutes, or so that the kills of a restore fall
/// anywhere up to its end.
const RATE: &str = "256KiB";
const RATES: [&str; 4] = [RATE, "1MiB", "2MiB", "4MiB"];

/// Moments drawn from a seed.
struct Moments {
    draw: Draw,
}

impl Moments {
    fn new(tally: &Tally) -> Self {
        Self { draw: Draw(tally.seed) }
    }

    fn next(&mut self) -> Duration {
        Duration::from_micros(self.draw.below(DELAY_MAX.as_micros() as u64))
    }

    /// What a load draws from.
    fn load(&mut self) -> u64 {
        self.draw.below(1 << 31)
    }

    /// How fast all of it comes to one restore of several.
    fn rate(&mut self, victim: Victim, number: usize) -> &'static str {
        match victim {
            _ if number == 0 => RATE,
            // A supervisor that lives on must not come to the end between two looks.
            Victim::Postmaster => self.draw.one(&RATES[..2]),
            Victim::Supervisor | Victim::Both | Victim::Host => self.draw.one(&RATES),
        }
    }
}

/// What came of the rounds of a test.
struct Tally {
    test: String,
    seed: u64,
    wanted: usize,
    rounds: usize,
    commits: i64,
    /// Rounds whose kill found the directory plain.
    plain: usize,
}

impl Tally {
    fn new(test: &str) -> Self {
        let nanos = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
        let seed = number_of("WALDEN_KILL_SEED");
        let seed = seed.unwrap_or_else(|| nanos() as u64 ^ u64::from(std::process::id()));
        let wanted = number_of("WALDEN_KILL_ROUNDS").map_or(ROUNDS, |rounds| rounds as usize);
        eprintln!("{test}: WALDEN_KILL_SEED={seed} WALDEN_KILL_ROUNDS={wanted}");
        Self { test: test.to_owned(), seed, wanted, rounds: 0, commits: 0, plain: 0 }
    }

    /// Ends the load of a round.
    fn end(&mut self, load: Writers) -> Acknowledged {
        self.rounds += 1;
        self.commits += load.commits();
        load.end()
    }
}

impl Drop for Tally {
    /// Tells it, also of rounds that a loss ended.
    fn drop(&mut self) {
        let line = json!({
            "test": self.test, "seed": self.seed, "wanted": self.wanted, "rounds": self.rounds,
            "commits": self.commits, "plain": self.plain, "lost": std::thread::panicking(),
        });
        eprintln!("{line}");
        if let Some(path) = std::env::var_os("WALDEN_KILL_REPORT") {
            let report = File::options().create(true).append(true).open(path);
            let _ = report.and_then(|mut report| writeln!(report, "{line}"));
        }
    }
}

fn number_of(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// Most of what the load writes to is of the basebackup, and may come at any moment of it.
fn source() -> Scene {
    let scene = Scene::start(Options::default().setting("fsync", "on"));
    Writers::prepare(&scene.source, 2);
    scene.fill()
}

/// Goes on, and finds every row that was acknowledged.
#[track_caller]
fn goes_on(restored: &Restored<'_>, acknowledged: &mut Acknowledged) -> Beside {
    let mut beside = restored.resume_beside(&[]);
    restored.wait_until_writable(&mut beside);
    acknowledged.assert_hold(restored);
    assert_eq!(restored.sql("select count(*), sum(n) from later"), "1000|500500");
    beside
}

/// Comes to the end, and checks what is left then.
#[track_caller]
fn ends_plain(restored: &Restored<'_>, mut beside: Beside, acknowledged: &mut Acknowledged) {
    assert_eq!(word(&beside.report(), "state"), "plain");
    assert_holds_all(restored, acknowledged);
    let rows = Checksums::of(restored);
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
    restored.assert_starts_natively();
    rows.assert_same(&Checksums::of(restored));
    restored.stop();
}

/// Goes on with a directory that is plain without Walden, and checks what is in it.
#[track_caller]
fn goes_on_plain(restored: &Restored<'_>, acknowledged: &mut Acknowledged) {
    // It takes dead mounts away, and says that there is nothing to go on with.
    let left = restored.try_resume();
    assert!(restored.mounts().is_empty(), "a mount over a plain directory: {}", left.stderr);
    restored.start();
    crate::source::wait_until_writable(restored);
    assert_holds_all(restored, acknowledged);
    restored.stop();
    restored.assert_plain();
    restored.assert_checksums();
}

/// Reads everything there is.
#[track_caller]
fn assert_holds_all(restored: &Restored<'_>, acknowledged: &mut Acknowledged) {
    acknowledged.assert_hold(restored);
    acknowledged.assert_rest(restored);
    assert_eq!(restored.sql("select count(*), sum(n) from cold"), "200000|20000100000");
    restored.amcheck();
}

fn a_restore_survives(victim: Victim) {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let mut tally = Tally::new(&format!("{victim:?}"));
    let mut moments = Moments::new(&tally);
    let scene = source();
    let beneath = scene.beneath();
    let mut number = 0;
    while tally.rounds < tally.wanted {
        let restored = scene.place(&format!("restored-{number}"));
        let rate = moments.rate(victim, number);
        live(&scene, &beneath, &restored, (victim, rate), &mut moments, &mut tally);
        number += 1;
        let holds = scene.holds();
        assert_eq!((holds.pins, holds.open_pins, holds.open_leases), (number, 0, 0), "{holds:?}");
        fs::remove_dir_all(&restored.directory).unwrap();
    }
}

/// Has a restore live through some rounds, and come to its end.
#[track_caller]
fn live(
    scene: &Scene,
    beneath: &Beneath,
    restored: &Restored<'_>,
    (victim, rate): (Victim, &str),
    moments: &mut Moments,
    tally: &mut Tally,
) {
    let seen = beneath.path(&restored.directory).join("PG_VERSION");
    let mut beside = restored.begin_beside(&["--hydrate-rate", rate]);
    restored.wait_until_writable(&mut beside);
    // What the restores before it have archived is in it.
    let mut acknowledged = Acknowledged::default();
    acknowledged.assert_hold(restored);
    for _ in 0..LIFE.min(tally.wanted - tally.rounds) {
        let load = Writers::start(restored, moments.load(), &acknowledged);
        load.wait_for_commits(COMMITS);
        let delay = moments.next();
        eprintln!("round {}: {victim:?} after {delay:?}, at {rate}", tally.rounds);
        std::thread::sleep(delay);
        restored.kill(victim);
        acknowledged = tally.end(load);
        // Whoever followed hears of it; a server that is gone is no success, unless nothing was left to be followed.
        wait_for("the command to end", || beside.has_ended().then_some(()));
        if seen.exists() {
            tally.plain += 1;
            return goes_on_plain(restored, &mut acknowledged);
        }
        if victim == Victim::Host {
            restored.assert_bare_refuses_twice();
        }
        assert_eq!(scene.holds().open_pins, 1, "it is still needed");
        beside = goes_on(restored, &mut acknowledged);
    }
    drop(beside);
    // As fast as it comes: nobody is killed any more.
    restored.kill(Victim::Host);
    let beside = hurry(restored);
    acknowledged.assert_hold(restored);
    ends_plain(restored, beside, &mut acknowledged);
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
    let mut tally = Tally::new("End");
    let mut moments = Moments::new(&tally);
    let scene = source();
    let beneath = scene.beneath();
    for round in 0..tally.wanted {
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
        let delay = moments.next() / 30 * u32::try_from(round % ROUNDS).unwrap();
        eprintln!("round {round}: the host after {delay:?}");
        std::thread::sleep(delay);
        load.wait_for_commits(1);
        restored.kill(Victim::Host);
        let acknowledged = load.abandon().acknowledged();
        tally.rounds += 1;
        tally.commits += acknowledged;
        drop(beside);
        if restored.directory.join("PG_VERSION").exists() {
            tally.plain += 1;
        } else {
            restored.assert_bare_refuses();
            let mut beside = restored.resume_beside(&[]);
            restored.wait_until_writable(&mut beside);
            Ledger::assert_holds(&restored, acknowledged);
            beside.report();
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
    let load = Writers::start(&restored, 1, &Acknowledged::default());
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
    let mut acknowledged = load.end();
    if restored.supervisor().is_none() {
        goes_on(&restored, &mut acknowledged);
    }
    restored.finish();
    acknowledged.assert_hold(&restored);
    restored.assert_ends_sound();
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
    restored.assert_ends_sound();
}
