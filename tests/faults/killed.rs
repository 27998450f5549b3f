//! `kill -9` of `backup`, `wal push` and `restore` at moments drawn from a seed, and at each object that appears in the
//! repository (failure 17): nothing half-made is listed or can be started, the next run is good.
//!
//! `scripts/bench/kill-rounds` draws more moments than a test run has time for.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::site::{Faulted, files_below};
use crate::support::{Need, Run, require};

/// When a process is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// After that share of the time of an undisturbed run.
    Share(f64),
    /// As soon as the repository has so many more files.
    Files(usize),
}

/// Moments that a seed gives, as many as `WALDEN_KILL_ROUNDS` says.
fn drawn(rounds: usize) -> impl Iterator<Item = Moment> {
    let rounds = std::env::var("WALDEN_KILL_ROUNDS").map_or(rounds, |text| text.parse().unwrap());
    let mut state = 0x5eed_u64;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        Moment::Share((state >> 40) as f64 / f64::from(1 << 24))
    })
    .take(rounds)
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Starts a command and kills it at a moment; says whether it had ended by itself before.
fn kill(command: &mut Command, moment: Moment, undisturbed: Duration, files: impl Fn() -> usize) -> bool {
    let (began, before) = (Instant::now(), files());
    let mut process = start(command);
    loop {
        if process.try_wait().unwrap().is_some() {
            return true;
        }
        let due = match moment {
            Moment::Share(share) => began.elapsed() >= undisturbed.mul_f64(share),
            Moment::Files(count) => files() >= before + count,
        };
        if due {
            break;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    process.kill().unwrap();
    process.wait().unwrap();
    false
}

#[test]
fn failure_17_a_backup_killed_at_any_moment_leaves_no_half_one_and_the_next_is_good() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    let began = Instant::now();
    site.walden.run(&["backup"]);
    let undisturbed = began.elapsed();
    let basebackups = site.walden.repository().join("main/basebackups");
    let objects = files_below(&basebackups);
    assert!(objects >= 5, "begin, a pack, manifest, refs and outcome: {objects}");
    let mut killed = 0;
    for moment in (1..objects).map(Moment::Files).chain(drawn(4)) {
        let before = site.listed();
        let backup = &mut site.walden.command();
        let ended = kill(backup.arg("backup"), moment, undisturbed, || files_below(&basebackups));
        killed += usize::from(!ended);
        // What is listed has its outcome, and only an attempt that reached it is added.
        let after = site.listed();
        assert!(after.len() <= before.len() + 1, "{moment:?}: {before:?}, {after:?}");
        assert!(before.iter().all(|id| after.contains(id)), "{moment:?}: {before:?}, {after:?}");
        for id in &after {
            let has = |name: &str| basebackups.join(id).join(name).is_file();
            assert!(["begin", "manifest", "refs", "backup.json"].into_iter().all(has), "{moment:?}: {id}");
        }
    }
    assert!(killed >= 1, "none of the backups was killed before it ended");
    // One may have been committed and killed before it said so: that is a good one too.
    let before = site.listed();
    site.walden.run(&["backup"]);
    let after = site.listed();
    assert_eq!(after.len(), before.len() + 1);
    assert!(fs::read_dir(&basebackups).unwrap().count() > after.len(), "a killed attempt was left behind");
    site.assert_restores(after.iter().max().unwrap());
}

#[test]
fn a_push_killed_at_any_moment_is_accepted_when_postgresql_pushes_again() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    let clusters = site.walden.repository().join("main/clusters");
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
    let mut killed = 0;
    for moment in std::iter::once(Moment::Files(1)).chain(drawn(9)) {
        let segment = site.end_segment();
        let ended = kill(&mut push(&segment), moment, undisturbed, || files_below(&clusters));
        killed += usize::from(!ended);
        assert!(push(&segment).status().unwrap().success(), "{moment:?}");
        let content = fs::read(site.data_directory().join("pg_wal").join(&segment)).unwrap();
        assert!(site.fetched(&segment) == content, "{moment:?}: {segment} came back different");
    }
    // How many depends on what else the machine does.
    assert!(killed >= 1, "none of the pushes was killed before it ended");
}

/// Bit-equal whatever the moment: what is not complete cannot be started, and `--resume` goes on.
#[test]
fn a_restore_killed_at_any_moment_is_completed_by_resume() {
    require!(Need::PostgreSQL(15));
    let site = Faulted::start(|_, site| site);
    site.archive();
    site.walden.run(&["backup"]);
    let place = |name: &str| site.scratch().path().join(name);
    let whole = place("whole");
    let began = Instant::now();
    site.walden.run(&["restore", "--target-dir", whole.to_str().unwrap()]);
    let undisturbed = began.elapsed();
    let mut killed = 0;
    for (n, moment) in [200, 600].map(Moment::Files).into_iter().chain(drawn(6)).enumerate() {
        let directory = place(&format!("killed-{n}"));
        let path = directory.to_str().unwrap();
        let restore = &mut site.walden.command();
        restore.args(["restore", "--target-dir", path]);
        let ended = kill(restore, moment, undisturbed, || files_below(&directory));
        killed += usize::from(!ended);
        let has_begun = directory.join(".walden/restore.json").exists();
        let may_start = directory.join("PG_VERSION").exists() && directory.join("global/pg_control").exists();
        assert!(
            ended || !has_begun || !may_start || directory.join(".walden/complete").exists(),
            "{moment:?}"
        );
        if !ended {
            let resume = if has_begun { &["--resume"][..] } else { &["--force"] };
            site.walden.run(&[&["restore", "--target-dir", path], resume].concat());
        }
        let mut diff = Command::new("diff");
        diff.args(["-r", "--no-dereference", "-x", "walden.restore.json"]).args([&whole, &directory]);
        Run::of(&mut diff, "").expect_success();
        fs::remove_dir_all(&directory).unwrap();
    }
    assert!(killed >= 1, "none of the restores was killed before it ended");
}
