//! `kill -9` of `backup`, `wal push` and `restore` at moments drawn from a seed, upload and commit among them
//! (failure 17), each followed by a good run: nothing half-made counts or can be started, nothing is lost.
//!
//! A killed process is sorted by what it left behind, so that one sees where the kills fell; a test that never hit the
//! upload or the commit fails. `scripts/bench/kill-rounds` draws more moments than a test run has time for
//! (`WALDEN_KILL_ROUNDS`) and has the counts written down (`WALDEN_KILL_REPORT`).

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::site::{Faulted, content_of, files_below};
use crate::support::{Need, Resting, Run, Stop, StoreKind, require};

/// How far a process has come, by what can be seen of its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Nothing of it is there.
    Begin,
    /// Parts of it are: objects go up, or the files of a restore are written.
    Upload,
    /// All that is missing is what makes it count, or it counts and the process has not said so.
    Commit,
    /// The process ended before it was killed.
    Ended,
}

impl Phase {
    const ALL: [(Self, &str); 4] =
        [(Self::Begin, "begin"), (Self::Upload, "upload"), (Self::Commit, "commit"), (Self::Ended, "ended")];
}

/// When a process is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// After that share of the time of an undisturbed run.
    Share(f64),
    /// That long after it was seen to come to a phase.
    After(Phase, Duration),
}

/// The moments of one command, and what fell where.
struct Rounds {
    command: &'static str,
    undisturbed: Duration,
    state: u64,
    drawn: usize,
    /// Kills that are wanted: a process that ended first is none.
    kills_wanted: usize,
    /// Draws that aimed at a missed phase.
    aimed: usize,
    hit: BTreeMap<Phase, usize>,
    /// The phases that some kill must fall into.
    wanted: &'static [Phase],
    /// Kills after which the work counted all the same.
    counted: usize,
}

/// Kills of one command where an own test run has time for no more.
const KILLS: usize = 20;
/// Draws for each kill that is wanted. A push is over in some 50 ms, and this process may not get a processor for as long:
/// half of its moments come too late. Where fewer than a quarter hit, they are drawn wrongly.
const DRAWS_PER_KILL_MAX: usize = 4;
/// Moments are drawn in this share of the time of an undisturbed run: the end of it is the commit, which others aim at,
/// and a process that is over is not killed.
const SHARE_MAX: f64 = 0.9;
/// Rounds that aim at a phase that none has hit yet: it may be over before this process gets a processor again.
const AIMED_ROUNDS_MAX: usize = 40;
/// A commit is over after some milliseconds, most of which have passed when it is seen.
const COMMIT_MOST: Duration = Duration::from_millis(2);

impl Rounds {
    fn of(command: &'static str, undisturbed: Duration) -> Self {
        let kills_wanted = std::env::var("WALDEN_KILL_ROUNDS").map_or(KILLS, |text| text.parse().unwrap());
        let hit = Phase::ALL.into_iter().map(|(phase, _)| (phase, 0)).collect();
        let wanted = &[Phase::Upload, Phase::Commit];
        Self {
            command,
            undisturbed,
            state: 0x5eed,
            drawn: 0,
            kills_wanted,
            aimed: 0,
            hit,
            wanted,
            counted: 0,
        }
    }

    /// Counts the processes that were killed while they ran.
    fn kills(&self) -> usize {
        self.drawn - self.hit[&Phase::Ended]
    }

    fn fraction(&mut self) -> f64 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 40) as f64 / f64::from(1 << 24)
    }

    /// Draws the next moment, until there are as many kills as are wanted: half of them anywhere in the run, the others
    /// in its upload and its commit. Those that come on top aim at what was missed.
    fn next(&mut self) -> Option<Moment> {
        let missed = self.wanted.iter().copied().find(|phase| self.hit[phase] == 0);
        let fraction = self.fraction();
        let may_draw = self.drawn < DRAWS_PER_KILL_MAX * self.kills_wanted;
        let moment = match missed {
            _ if self.kills() < self.kills_wanted && may_draw => match self.drawn % 4 {
                0 | 2 => Moment::Share(fraction * SHARE_MAX),
                1 => Moment::After(Phase::Upload, self.undisturbed.mul_f64(fraction / 4.0)),
                _ => Moment::After(Phase::Commit, COMMIT_MOST.mul_f64(fraction)),
            },
            Some(phase) if self.aimed < AIMED_ROUNDS_MAX => {
                self.aimed += 1;
                Moment::After(phase, Duration::ZERO)
            }
            _ => return None,
        };
        self.drawn += 1;
        Some(moment)
    }

    /// Starts a command and kills it at a moment; returns how far it had come.
    fn kill(&mut self, command: &mut Command, moment: Moment, seen: impl Fn() -> Phase) -> Phase {
        let began = Instant::now();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let mut due = match moment {
            Moment::Share(share) => Some(began + self.undisturbed.mul_f64(share)),
            Moment::After(..) => None,
        };
        let phase = loop {
            if process.try_wait().unwrap().is_some() {
                break Phase::Ended;
            }
            if let (None, Moment::After(phase, delay)) = (due, moment)
                && seen() >= phase
            {
                due = Some(Instant::now() + delay);
            }
            if due.is_some_and(|due| Instant::now() >= due) {
                process.kill().unwrap();
                // It may have come to its end just now.
                break if process.wait().unwrap().code().is_some() { Phase::Ended } else { seen() };
            }
            std::thread::sleep(Duration::from_micros(100));
        };
        *self.hit.get_mut(&phase).expect("every phase has its count") += 1;
        phase
    }

    /// Checks that there were as many kills as are wanted, and that they fell where they matter.
    #[track_caller]
    fn assert_hit(&self) {
        let (kills, wanted) = (self.kills(), self.kills_wanted);
        assert!(kills >= wanted, "{}: {kills} kills of {wanted}, in {} draws", self.command, self.drawn);
        for phase in self.wanted {
            assert!(
                self.hit[phase] > 0,
                "{}: none of {} kills fell into {phase:?}",
                self.command,
                self.drawn
            );
        }
    }
}

impl Drop for Rounds {
    /// Says what fell where, also of rounds that a loss ended.
    fn drop(&mut self) {
        let hit: String =
            Phase::ALL.iter().map(|(phase, name)| format!("\"{name}\":{},", self.hit[phase])).collect();
        let line = format!(
            "{{\"command\":\"{}\",\"rounds\":{},{hit}\"counted\":{},\"lost\":{}}}\n",
            self.command,
            self.drawn,
            self.counted,
            std::thread::panicking()
        );
        eprint!("{line}");
        if let Some(path) = std::env::var_os("WALDEN_KILL_REPORT") {
            let report = fs::File::options().append(true).create(true).open(path);
            let _ = report.and_then(|mut report| report.write_all(line.as_bytes()));
        }
    }
}

fn names_in(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// The objects that stand in the folder of an attempt before it is committed.
const PREPARED: [&str; 3] = ["begin", "manifest", "refs"];
const OUTCOME: &str = "backup.json";

/// How far the attempts have come that are not among those there were.
fn backup_phase(basebackups: &Path, before: &[PathBuf]) -> Phase {
    let attempts = names_in(basebackups).into_iter().filter(|attempt| !before.contains(attempt));
    let of = |attempt: PathBuf| if attempt.join("manifest").exists() { Phase::Commit } else { Phase::Upload };
    attempts.map(of).max().unwrap_or(Phase::Begin)
}

#[test]
fn failure_17_a_backup_killed_at_any_moment_leaves_no_half_one_and_the_next_is_good() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    // An incremental one is over sooner than a full one, and both are killed.
    let began = Instant::now();
    site.walden.run(&["backup"]);
    let mut rounds = Rounds::of("backup", began.elapsed());
    let basebackups = site.walden.repository().join("main/basebackups");
    let (mut listed, mut last_of_killed) = (site.listed(), None);
    while let Some(moment) = rounds.next() {
        let before = names_in(&basebackups);
        let arguments =
            if rounds.drawn.is_multiple_of(2) { &["backup"][..] } else { &["backup", "--full"][..] };
        let phase = rounds
            .kill(site.walden.command().args(arguments), moment, || backup_phase(&basebackups, &before));
        // What is listed has its outcome, and only an attempt that reached it is added.
        let after = site.listed();
        let added: Vec<&String> = after.iter().filter(|id| !listed.contains(id)).collect();
        assert!(listed.iter().all(|id| after.contains(id)), "{moment:?}: {listed:?}, {after:?}");
        assert!(added.len() <= 1, "{moment:?}: {listed:?}, {after:?}");
        assert!(added.is_empty() || phase >= Phase::Commit, "{moment:?}, {phase:?}: {added:?} counts");
        for id in &added {
            let has = |name: &str| basebackups.join(id).join(name).is_file();
            assert!(PREPARED.into_iter().chain([OUTCOME]).all(has), "{moment:?}: {id}");
            if phase != Phase::Ended {
                rounds.counted += 1;
                last_of_killed = Some((*id).clone());
            }
        }
        // The next is good, whatever was left.
        let good = site.walden.json(&["backup"])["id"].as_str().unwrap().to_owned();
        let now = site.listed();
        assert_eq!(now.len(), after.len() + 1, "{moment:?}");
        assert!(now.contains(&good) && after.iter().all(|id| now.contains(id)), "{moment:?}: {now:?}");
        listed = now;
    }
    rounds.assert_hit();
    assert!(names_in(&basebackups).len() > listed.len(), "no killed attempt was left behind");
    // One that was committed, and killed before it said so, is as good as any.
    for id in last_of_killed.iter().chain(listed.iter().max()) {
        site.assert_restores(id);
    }
}

/// What a killed one has left of its state, finished or not, is no reason to be wrong, nor to begin anew.
#[test]
fn an_incremental_killed_at_any_moment_leaves_a_state_that_the_next_is_right_with() {
    require!(Need::PostgreSQL(15));
    let site = Resting::start(|_, site| site);
    site.back_up();
    site.change();
    let began = Instant::now();
    site.walden.run(&["backup"]);
    let mut rounds = Rounds::of("incremental backup", began.elapsed());
    let basebackups = site.walden.repository().join("main/basebackups");
    while let Some(moment) = rounds.next() {
        site.change();
        let (before, listed) = (names_in(&basebackups), site.listed());
        let phase =
            rounds.kill(site.walden.command().arg("backup"), moment, || backup_phase(&basebackups, &before));
        for id in site.listed().iter().filter(|id| !listed.contains(id)) {
            rounds.counted += usize::from(phase != Phase::Ended);
            site.assert_exact(&site.taken(id));
        }
        let good = site.back_up();
        assert!(good.parent.is_some(), "{moment:?}, {phase:?}: {} is a full one", good.id);
        // A page that is named wrongly goes on being named so, and is found by a later look.
        if rounds.drawn.is_multiple_of(4) {
            site.assert_exact(&good);
        }
    }
    rounds.assert_hit();
    site.change();
    site.assert_exact(&site.back_up());
    let state = site.scratch().path().join("walden/state/basebackups");
    assert_eq!(files_below(&state), 2, "a lock and one state are left of all of them");
}

#[test]
fn a_push_killed_at_any_moment_is_accepted_when_postgresql_pushes_again() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    let (clusters, staging) =
        (site.walden.repository().join("main/clusters"), site.walden.repository().join(".staging"));
    let push = |segment: &str| {
        let mut command = site.walden.command();
        command.args(["wal", "push", &format!("pg_wal/{segment}")]).current_dir(site.data_directory());
        command
    };
    let measured = || {
        let began = Instant::now();
        assert!(push(&site.end_segment()).status().unwrap().success());
        began.elapsed()
    };
    // The first one creates the site as well.
    let undisturbed = std::iter::repeat_with(measured).take(3).min().expect("three were taken");
    let mut rounds = Rounds::of("push", undisturbed);
    if StoreKind::of_this_run() != StoreKind::File {
        // A server shows nothing of an upload that has not ended.
        rounds.wanted = &[Phase::Commit];
    }
    while let Some(moment) = rounds.next() {
        let segment = site.end_segment();
        let (stored, staged) = (files_below(&clusters), files_below(&staging));
        // What stays staged is of the killed push: nothing else writes here.
        let seen = || match files_below(&clusters) {
            now if now > stored => Phase::Commit,
            _ if files_below(&staging) > staged => Phase::Upload,
            _ => Phase::Begin,
        };
        let phase = rounds.kill(&mut push(&segment), moment, seen);
        rounds.counted += usize::from(phase == Phase::Commit);
        assert!(push(&segment).status().unwrap().success(), "{moment:?}, {phase:?}");
        let content = fs::read(site.data_directory().join("pg_wal").join(&segment)).unwrap();
        assert!(site.fetched(&segment) == content, "{moment:?}, {phase:?}: {segment} came back different");
    }
    rounds.assert_hit();
}

/// How far a restore into a directory has come.
fn restore_phase(directory: &Path) -> Phase {
    let area = directory.join(".walden");
    if area.join("complete").exists() || may_start(directory) {
        Phase::Commit
    } else if area.join("restore.json").exists() {
        Phase::Upload
    } else {
        Phase::Begin
    }
}

/// Walden's area in a data directory, and what it is called once it is withdrawn and about to be removed.
const AREA_NAMES: [&str; 2] = [".walden", "pgsql_tmp.walden"];

/// Compares two restored directories but for the area that goes last and the note of when each was restored.
#[track_caller]
fn assert_same(whole: &Path, restored: &Path) {
    let mut diff = Command::new("diff");
    diff.args(["-r", "--no-dereference", "-x", "walden.restore.json"]);
    diff.args(AREA_NAMES.into_iter().flat_map(|name| ["-x", name]));
    Run::of(diff.args([whole, restored]), "").expect_success();
    assert_eq!(owners_and_modes(whole), owners_and_modes(restored), "{}", restored.display());
}

/// The user, the group and the mode of everything at or below a directory but for the area that goes last.
fn owners_and_modes(directory: &Path) -> BTreeMap<PathBuf, (u32, u32, u32)> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(path) = waiting.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            let is_area = |path: &PathBuf| AREA_NAMES.iter().any(|name| path.ends_with(name));
            waiting.extend(names_in(&path).into_iter().filter(|path| !is_area(path)));
        }
        let below = path.strip_prefix(directory).unwrap().to_owned();
        found.insert(below, (metadata.uid(), metadata.gid(), metadata.mode()));
    }
    found
}

fn may_start(directory: &Path) -> bool {
    directory.join("PG_VERSION").exists() && directory.join("global/pg_control").exists()
}

/// Bit-equal whatever the moment: what is not complete cannot be started, and `--resume` goes on.
#[test]
fn a_restore_killed_at_any_moment_is_completed_by_resume() {
    require!(Need::PostgreSQL(15));
    let mut site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let content = site.content();
    // What else it archived would be in the plans of later restores.
    site.cluster.stop(Stop::Fast);
    let whole = site.scratch().path().join("whole");
    let began = Instant::now();
    site.walden.run(&["restore", "--target-dir", whole.to_str().unwrap()]);
    let mut rounds = Rounds::of("restore", began.elapsed());
    while let Some(moment) = rounds.next() {
        let directory = site.scratch().path().join(format!("killed-{}", rounds.drawn));
        let path = directory.to_str().unwrap();
        let restore = &mut site.walden.command();
        restore.args(["restore", "--target-dir", path]);
        let phase = rounds.kill(restore, moment, || restore_phase(&directory));
        let may_start = may_start(&directory);
        rounds.counted += usize::from(may_start && phase == Phase::Commit);
        let begun = directory.join(".walden/restore.json").exists();
        if may_start {
            // Whether or not the area beside it is gone, and whatever a later command makes of it.
            assert_same(&whole, &directory);
        }
        if begun || !may_start {
            let on = if begun { "--resume" } else { "--force" };
            site.walden.run(&["restore", "--target-dir", path, on]);
            assert!(!directory.join(".walden").exists(), "{moment:?}, {phase:?}");
        } else if phase != Phase::Ended {
            // It is complete, so that the good run is another one.
            let other = site.scratch().path().join("other");
            site.walden.run(&["restore", "--target-dir", other.to_str().unwrap()]);
            assert_same(&whole, &other);
            fs::remove_dir_all(&other).unwrap();
        }
        assert_same(&whole, &directory);
        fs::remove_dir_all(&directory).unwrap();
    }
    rounds.assert_hit();
    // They all are what `whole` is, and that is what the source was.
    assert_eq!(content_of(&site.started(&whole)), content);
}
