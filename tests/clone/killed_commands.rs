//! `kill -9` of `clone create`, `reset`, `duplicate` and `finalize` at moments drawn from a seed: between what they write down
//! and what they do there is no moment from which the next call does not come to the end, and no pin that nobody ends.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::finalize::Native;
use crate::processes::Processes;
use crate::site::{Clone, Source, listing};
use crate::support::{Draw, Need, Options, Sql, Walden, mounts_below, require, wait_for};

/// Kills of each command, unless `WALDEN_COMMAND_KILLS` says how many.
const KILLS: usize = 5;
/// Draws for each kill that is wanted: a command may be over before it is killed.
const DRAWS_PER_KILL_MAX: usize = 4;

fn source() -> Source {
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    source.sql("create table kept as select n from generate_series(1, 1000) n");
    source.backup_at_rest();
    source.sql("insert into kept values (1001)");
    source.archive_wal();
    source
}

const CONTENT: &str = "select count(*), sum(n) from kept";
const ROWS: &str = "1001|501501";

/// The moments of one command.
struct Kills {
    draw: Draw,
    undisturbed: Duration,
    wanted: usize,
    killed: usize,
    drawn: usize,
}

impl Kills {
    fn new(seed: u64, undisturbed: Duration) -> Self {
        let wanted = std::env::var("WALDEN_COMMAND_KILLS").map_or(KILLS, |text| text.parse().unwrap());
        Self { draw: Draw(seed), undisturbed, wanted, killed: 0, drawn: 0 }
    }

    /// Draws the next moment, until there were as many kills as are wanted.
    fn next(&mut self) -> Option<Duration> {
        if self.killed == self.wanted {
            return None;
        }
        assert!(
            self.drawn < DRAWS_PER_KILL_MAX * self.wanted,
            "{} kills in {} draws",
            self.killed,
            self.drawn
        );
        self.drawn += 1;
        Some(self.undisturbed.mul_f64(self.draw.below(1000) as f64 / 1000.0))
    }

    /// Starts a command and kills it at a moment, if it has not come to its end by then.
    fn kill(&mut self, walden: &Walden, arguments: &[&str], at: Duration) {
        let mut running = walden.start(arguments);
        std::thread::sleep(at);
        running.process.kill().unwrap();
        let status = running.process.wait().unwrap();
        let was_killed = status.signal() == Some(9);
        assert!(status.success() || was_killed, "{arguments:?}: {status}");
        self.killed += usize::from(was_killed);
        if !was_killed {
            // What was measured was slower, before all was in memory or beside other tests.
            self.undisturbed = self.undisturbed.min(at);
        }
    }
}

fn timed(work: impl FnOnce()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

/// Every pin has its end; an end without a pin holds nothing.
#[track_caller]
fn assert_nothing_is_held(source: &Source) {
    let (pins, _) = source.pins();
    assert!(pins > 0, "no clone has pinned anything");
    let files = listing(&source.walden.repository());
    let mut pins = files.keys().filter(|path| {
        path.iter().any(|part| part == "pins") && path.is_file() && path.extension().is_none()
    });
    let held = pins.find(|pin| !pin.with_extension("end").exists());
    assert_eq!(held, None, "it holds a basebackup for nobody");
}

fn clone_of(source: &Source, name: &str) -> Clone {
    let run = source.clones().join(name).join("run");
    Clone::named(&source.walden.as_root(), name, Sql::at(&run, 5432))
}

/// Has a clone whose command was killed run, by the command that is next.
#[track_caller]
fn go_on(clone: &Clone, again: &[&str]) {
    if !clone.folder().join("clone.json").exists() {
        clone.walden.run(again);
    }
    if Processes::of(clone).supervisor.is_none() {
        clone.run("start");
    }
    wait_for("the clone to answer", || clone.answers().then_some(()));
}

#[test]
fn a_clone_whose_making_was_killed_is_made_by_the_next_call() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let first = source.clone("first", &[]);
    for command in ["create", "duplicate"] {
        let arguments: Vec<&str> = match command {
            "create" => vec!["clone", "create", "again"],
            _ => vec!["clone", "duplicate", "first", "again", "--port", "5432"],
        };
        let clone = clone_of(&source, "again");
        for rest in [&["--no-start"][..], &[]] {
            let arguments = [&arguments[..], rest].concat();
            let undisturbed = timed(|| drop(clone.walden.run(&arguments)));
            clone.run("delete");
            let mut kills = Kills::new(0xc0de, undisturbed);
            let mut half_made = 0;
            while let Some(at) = kills.next() {
                kills.kill(&clone.walden, &arguments, at);
                if kills.drawn.is_multiple_of(2) && clone.folder().exists() {
                    // As it lies there.
                    half_made += usize::from(!clone.folder().join("clone.json").exists());
                    clone.run("delete");
                }
                go_on(&clone, &arguments);
                assert_eq!(clone.sql(CONTENT), ROWS, "{command} killed after {at:?}");
                clone.run("delete");
                assert!(!clone.folder().exists() && mounts_below(&clone.folder()).is_empty());
            }
            eprintln!("{command} {rest:?}: {} kills, {half_made} half made", kills.killed);
        }
    }
    first.run("delete");
    assert_nothing_is_held(&source);
}

#[test]
fn a_reset_that_is_killed_is_ended_by_the_next_call_or_start() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("reset", &[]);
    let undisturbed = timed(|| clone.run("reset"));
    let mut kills = Kills::new(0x5e7, undisturbed);
    while let Some(at) = kills.next() {
        clone.sql("delete from kept; create table own as select 1 as n");
        kills.kill(&clone.walden, &["clone", "reset", "reset"], at);
        // Killed before it was written down, nothing has happened; after that it is reset whatever is called.
        let is_begun = clone.folder().join("resetting").exists();
        let is_called_again = kills.drawn.is_multiple_of(2);
        if is_called_again {
            clone.run("reset");
        } else {
            // What it had asked the supervisor for is under way by then.
            std::thread::sleep(Duration::from_millis(300));
            wait_for("the clone to answer", || {
                if Processes::of(&clone).supervisor.is_none() {
                    clone.run("start");
                }
                clone.answers().then_some(())
            });
        }
        let found = (clone.sql(CONTENT), clone.sql("select to_regclass('own') is null"));
        let reset = (ROWS.to_owned(), "t".to_owned());
        let untouched = ("0|".to_owned(), "f".to_owned());
        let may_be_untouched = !is_begun && !is_called_again;
        assert!(found == reset || (may_be_untouched && found == untouched), "killed after {at:?}: {found:?}");
        if found != reset {
            clone.run("reset");
        }
    }
    clone.run("delete");
    assert_nothing_is_held(&source);
}

#[test]
fn a_finalize_that_is_killed_at_any_moment_is_ended_by_the_next_call() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let places = source.scratch().folder("places");
    let finalize = |clone: &Clone, to: &Path| -> Vec<String> {
        ["clone", "finalize", &clone.name, "--to", to.to_str().unwrap()].map(str::to_owned).to_vec()
    };
    let first = source.clone("first", &[]);
    let arguments = finalize(&first, &places.join("first"));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let undisturbed = timed(|| drop(first.walden.run(&arguments)));
    let mut kills = Kills::new(0xf1a, undisturbed);
    while let Some(at) = kills.next() {
        let (clone, to) =
            (source.clone(&format!("last{}", kills.drawn), &[]), places.join(kills.drawn.to_string()));
        clone.sql("insert into kept values (1002)");
        let arguments = finalize(&clone, &to);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        kills.kill(&clone.walden, &arguments, at);
        if clone.folder().exists() {
            clone.walden.run(&arguments);
        }
        assert!(!clone.folder().exists() && mounts_below(&clone.folder()).is_empty(), "killed after {at:?}");
        wait_for("the clone's processes to end", || Processes::of(&clone).is_empty().then_some(()));
        let native = Native::start(&to, &to, clone.port);
        assert_eq!(native.sql.sql(CONTENT), "1002|502503", "killed after {at:?}");
        drop(native);
        fs::remove_dir_all(&to).unwrap();
    }
    assert_nothing_is_held(&source);
}
