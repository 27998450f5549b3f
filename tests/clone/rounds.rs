//! A clone is killed under load, again and again while its data comes, when it is whole, and after the cut-over: every
//! commit that was acknowledged is there after the next start, none in part, and PostgreSQL's own check finds nothing.
//!
//! What is killed, when, and how fast the data comes is drawn from a seed before anything begins: the same seed, the same
//! choices. What processes do meanwhile is theirs. `scripts/bench/instant-kills` does it far more often
//! (`WALDEN_INSTANT_ROUNDS`, `WALDEN_INSTANT_SEED`) and has the counts written down (`WALDEN_INSTANT_REPORT`). Power that
//! goes is `mount::upper::tests::power_cut`'s: what a killed process has written the kernel still has.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::processes::Processes;
use crate::site::{Clone, Source};
use crate::support::{Acknowledged, Draw, Need, Options, Writers, mounts_below, require, unmount, wait_for};

/// Rounds where nobody asks for another number.
const ROUNDS: usize = 20;
const SEED: u64 = 0x5eed;
/// Rounds that one clone lives through. In the first of them its data comes slowly, in the last it has everything.
const LIFE: usize = 20;
/// The round of a life in which everything becomes local.
const WHOLE_ROUND: usize = 13;
/// Every so many rounds of a life that has everything, all of it is read and checked.
const CHECK_EVERY: usize = 3;
/// So slow that no clone becomes whole before its time, in rounds of some seconds.
const SLOW: [&str; 4] = ["64KiB", "256KiB", "512KiB", "1MiB"];

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Victim {
    /// The process that mounts and supervises.
    Mount,
    Postmaster,
    /// Those two.
    Both,
    /// Every process, and the mounts are gone: what a reboot leaves, but for what only the kernel has.
    Reboot,
}

const VICTIMS: [Victim; 4] = [Victim::Mount, Victim::Postmaster, Victim::Both, Victim::Reboot];

/// What a round waits for before its commits count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Until {
    Now,
    /// Everything is local.
    Whole,
    /// And every session has opened its files again.
    CutOver,
}

/// One round: a start, a load, a kill; and perhaps a kill of the start that follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Round {
    rate: &'static str,
    until: Until,
    commits: i64,
    pause: Duration,
    /// What the load draws from.
    load: u64,
    victim: Victim,
    /// How long the next supervisor is left alone, and what is killed then.
    again: Option<(Duration, Victim)>,
}

fn plan(seed: u64, rounds: usize) -> Vec<Round> {
    let mut draw = Draw(seed);
    let mut round = |number: usize| {
        let is_slow = number % LIFE < WHOLE_ROUND;
        let until = match (number % LIFE == WHOLE_ROUND, number / LIFE % 2) {
            (false, _) => Until::Now,
            (true, 0) => Until::CutOver,
            (true, _) => Until::Whole,
        };
        let (rate, commits, pause) = (draw.one(&SLOW), 1 + draw.below(300), draw.below(100));
        let (victim, is_again) = (draw.one(&VICTIMS), draw.below(4) == 0);
        let (left_alone, again) = (Duration::from_millis(draw.below(1500)), draw.one(&VICTIMS));
        Round {
            rate: if is_slow { rate } else { "none" },
            until,
            commits: commits as i64,
            pause: Duration::from_millis(pause),
            load: seed.wrapping_add(number as u64),
            victim,
            again: is_again.then_some((left_alone, again)),
        }
    };
    (0..rounds).map(&mut round).collect()
}

/// What came of the rounds.
#[derive(Debug, Default)]
struct Tally {
    seed: u64,
    rounds: usize,
    victims: BTreeMap<Victim, usize>,
    /// Kills of a clone that had not everything, that had, of one after its cut-over, and of a start.
    partial: usize,
    whole: usize,
    cut_over: usize,
    starting: usize,
    commits: i64,
    checks: usize,
}

impl Tally {
    fn new(seed: u64) -> Self {
        let mut tally = Self::default();
        tally.seed = seed;
        tally
    }
}

impl Drop for Tally {
    /// Tells it, also of rounds that a loss ended.
    fn drop(&mut self) {
        let victim = |victim| self.victims.get(&victim).copied().unwrap_or(0);
        let line = json!({
            "seed": self.seed, "rounds": self.rounds, "commits": self.commits,
            "mount": victim(Victim::Mount), "postmaster": victim(Victim::Postmaster),
            "both": victim(Victim::Both), "reboot": victim(Victim::Reboot),
            "partial": self.partial, "whole": self.whole, "after_cut_over": self.cut_over,
            "starting": self.starting, "checks": self.checks, "lost": std::thread::panicking(),
        });
        eprintln!("{line}");
        if let Some(path) = std::env::var_os("WALDEN_INSTANT_REPORT") {
            let _ = fs::write(path, line.to_string());
        }
    }
}

/// A clone that lives through rounds.
struct Life<'a> {
    clone: Clone,
    /// What [`COLD`] says of the source.
    cold: &'a str,
    acknowledged: Acknowledged,
    tally: &'a mut Tally,
}

impl Life<'_> {
    fn go(&mut self, number: usize, round: &Round) {
        if number > 0 {
            let start = ["clone", "start", &self.clone.name, "--hydrate-rate", round.rate];
            self.clone.walden.run(&start);
        }
        self.acknowledged.assert_hold(&self.clone);
        if number > WHOLE_ROUND && (number - WHOLE_ROUND).is_multiple_of(CHECK_EVERY) {
            self.check_all();
        }
        let load = Writers::start(&self.clone, round.load, &self.acknowledged);
        self.wait(round.until);
        let before = load.commits();
        load.wait_for_commits(before + round.commits);
        std::thread::sleep(round.pause);
        self.note(round.victim);
        match (round.until, self.is_whole()) {
            (Until::CutOver, _) => self.tally.cut_over += 1,
            (_, true) => self.tally.whole += 1,
            (_, false) => self.tally.partial += 1,
        }
        self.kill(round.victim);
        let acknowledged = load.end();
        self.tally.commits += acknowledged.total() - self.acknowledged.total();
        self.acknowledged = acknowledged;
        if let Some((left_alone, victim)) = round.again {
            let starting = self.clone.walden.start(&["clone", "start", &self.clone.name]);
            wait_for("a supervisor", || Processes::of(&self.clone).supervisor);
            std::thread::sleep(left_alone);
            self.note(victim);
            self.tally.starting += 1;
            self.kill(victim);
            drop(starting);
        }
    }

    /// Waits for what a round is about.
    fn wait(&self, until: Until) {
        if until != Until::Now {
            wait_for("everything to be local", || self.is_whole().then_some(()));
        }
        if until == Until::CutOver {
            let log = self.clone.folder().join("server.log");
            // The source logs such statements, and so does its clone.
            let is_told =
                || fs::read_to_string(&log).unwrap().contains("drop database if exists walden_cutover");
            let left = "select count(*) from pg_database where datname like 'walden\\_cutover%'";
            wait_for("the cut-over", || (is_told() && self.clone.sql(left) == "0").then_some(()));
        }
    }

    fn is_whole(&self) -> bool {
        self.clone.folder().join("upper/data/.walden/whole").exists()
    }

    fn note(&mut self, victim: Victim) {
        *self.tally.victims.entry(victim).or_default() += 1;
    }

    /// Reads everything there is.
    fn check_all(&mut self) {
        self.acknowledged.assert_hold(&self.clone);
        self.acknowledged.assert_rest(&self.clone);
        assert_eq!(self.clone.sql(COLD), self.cold);
        self.clone.amcheck();
        self.tally.checks += 1;
    }

    /// Kills, and waits until nothing runs.
    fn kill(&self, victim: Victim) {
        let found = Processes::of(&self.clone);
        let end = |process: Option<Pid>| {
            if let Some(process) = process {
                let _ = kill(process, Signal::SIGKILL);
            }
        };
        match victim {
            Victim::Mount => end(found.supervisor),
            // One that has not started it yet is killed itself.
            Victim::Postmaster => end(found.postmaster.or(found.supervisor)),
            Victim::Both => [found.postmaster, found.supervisor].into_iter().for_each(end),
            Victim::Reboot => {
                found.all().for_each(|process| end(Some(process)));
                self.wait_until_nothing_runs();
                mounts_below(&self.clone.folder()).iter().for_each(|mount| unmount(mount));
            }
        }
        self.wait_until_nothing_runs();
    }

    fn wait_until_nothing_runs(&self) {
        wait_for("the clone's processes to end", || Processes::of(&self.clone).is_empty().then_some(()));
    }
}

/// What a table holds that nobody reads before everything is local.
const COLD: &str = "select count(*), sum(n), md5(string_agg(t, '' order by n)) from cold";

fn source() -> Source {
    let source = Source::start(Options::default());
    Writers::prepare(&source, 3);
    source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 200000) n");
    source.sql("create index on cold (t); vacuum; alter system set log_statement = 'ddl'");
    source.sql("checkpoint");
    source.backup_at_rest();
    source.archive_wal();
    source
}

fn number_of(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

#[test]
fn nothing_acknowledged_is_lost_whatever_is_killed_under_load() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let rounds = number_of("WALDEN_INSTANT_ROUNDS", ROUNDS as u64) as usize;
    let seed = number_of("WALDEN_INSTANT_SEED", SEED);
    let plan = plan(seed, rounds);
    let wanted: i64 = plan.iter().map(|round| round.commits).sum();
    let source = source();
    let cold = source.sql(COLD);
    let mut tally = Tally::new(seed);
    for (number, rounds) in plan.chunks(LIFE).enumerate() {
        let clone = source.clone(&format!("life{number}"), &["--hydrate-rate", rounds[0].rate]);
        let mut life = Life { clone, cold: &cold, acknowledged: Acknowledged::default(), tally: &mut tally };
        for (number, round) in rounds.iter().enumerate() {
            eprintln!("round {number}: {round:?}");
            life.go(number, round);
            life.tally.rounds += 1;
        }
        life.clone.run("start");
        life.check_all();
        life.clone.run("delete");
    }
    // A round that nobody wrote in, or that met a clone in another state than it is about, has shown nothing.
    assert!(tally.commits >= wanted, "{tally:?}");
    if rounds >= LIFE {
        assert!(tally.partial >= rounds / 3 && tally.whole > 0 && tally.cut_over > 0, "{tally:?}");
        assert!(tally.starting > 0 && tally.victims.len() == VICTIMS.len(), "{tally:?}");
    }
}

#[test]
fn the_same_seed_makes_the_same_choices() {
    assert_eq!(plan(7, 100), plan(7, 100));
    assert_ne!(plan(7, 100), plan(8, 100));
    let plan = plan(SEED, ROUNDS);
    assert!(VICTIMS.iter().all(|victim| plan.iter().any(|round| round.victim == *victim)), "{plan:?}");
    assert!(plan.iter().any(|round| round.again.is_some()), "{plan:?}");
}
