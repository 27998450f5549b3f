//! Recoveries whose fetches leave a prefetcher behind: killed at any moment, stuck, or before a store that comes and goes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::majors::asked_for;
use crate::outage_report::report;
use crate::scene::{Scene, copy_all, recover, shell};
use crate::support::{Fault, Need, RemoteS3, Run, Stop, Walden, require, wait_for};

/// Returns the processes that read ahead for a data directory.
pub fn prefetchers(data_directory: &Path) -> Vec<Pid> {
    let data_directory = data_directory.canonicalize().unwrap();
    let wanted = format!("internal\0prefetch\0{}\0", data_directory.display());
    let pids = fs::read_dir("/proc").unwrap().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        // One that has just ended is none.
        let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&arguments).contains(&wanted)
    })
    .map(Pid::from_raw)
    .collect()
}

/// Waits until a prefetcher takes requests for a data directory, and returns it.
pub fn wait_for_prefetcher(walden: &Walden, data_directory: &Path) -> Pid {
    let folder = walden.configuration_file().with_file_name("run/fetch");
    wait_for("a prefetcher", || {
        let listens = fs::read_dir(&folder).ok()?.flatten();
        let listens =
            listens.filter(|entry| entry.path().extension().is_some_and(|end| end == "sock")).count();
        prefetchers(data_directory).first().copied().filter(|_| listens > 0)
    })
}

#[test]
fn a_prefetcher_that_is_killed_at_any_moment_costs_nothing_but_time() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 30);
    let mut server = scene.recovering("killed", &scene.walden.restore_command());
    let data = server.data_directory().to_owned();
    let (over, killed) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut pause = 1;
            while !over.load(Ordering::Relaxed) {
                for pid in prefetchers(&data) {
                    // From the moment it begins until it has answered a few times.
                    thread::sleep(Duration::from_millis(pause));
                    pause = (pause * 7 + 3) % 97;
                    killed.fetch_add(usize::from(kill(pid, Signal::SIGKILL).is_ok()), Ordering::Relaxed);
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        let recovered = recover(&mut server);
        over.store(true, Ordering::Relaxed);
        recovered.unwrap_or_else(|log| panic!("{log}"));
    });
    assert_eq!(Scene::rows(&server), scene.segments.len(), "{}", server.log());
    assert!(killed.into_inner() > 0, "there was no prefetcher to kill");
    server.stop(Stop::Fast);
}

#[test]
fn a_prefetcher_that_is_stuck_is_left_behind() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 4);
    let data = scene.cluster.scratch().path().join("copy");
    let fetch = |name: &str| {
        let mut command = scene.walden.command();
        command.args(["wal", "fetch", name, "pg_wal/RECOVERYXLOG"]).current_dir(&data);
        Run::of(&mut command, "").code()
    };
    assert_eq!(fetch(&scene.segments[0]), Some(0));
    let stuck = wait_for_prefetcher(&scene.walden, &data);
    assert_eq!(fetch(&scene.segments[1]), Some(0));
    kill(stuck, Signal::SIGSTOP).unwrap();
    for segment in &scene.segments[2..] {
        assert_eq!(fetch(segment), Some(0));
        let restored = fs::read(data.join("pg_wal/RECOVERYXLOG")).unwrap();
        assert_eq!(restored, fs::read(scene.cluster.data_directory().join("pg_wal").join(segment)).unwrap());
    }
    assert_eq!(fetch("00000002.history"), Some(1));
    // Awake again it finds that nobody will ask it any more.
    kill(stuck, Signal::SIGCONT).unwrap();
    wait_for("the prefetcher to end", || (!prefetchers(&data).contains(&stuck)).then_some(()));
}

/// Opens the files without a name that a process has open in a folder, so that their inodes are nobody else's.
fn unnamed_files(pid: Pid, folder: &Path) -> Vec<fs::File> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let unnamed = open.filter(|entry| {
        let named = fs::read_link(entry.path()).unwrap_or_default();
        named.parent() == Some(folder) && named.to_string_lossy().ends_with(" (deleted)")
    });
    // What has been given up meanwhile cannot be opened any more.
    unnamed.filter_map(|entry| fs::File::open(entry.path()).ok()).collect()
}

#[test]
fn what_was_written_ahead_becomes_the_servers_file_and_nothing_of_the_rest_is_left() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 6);
    let data = scene.cluster.scratch().path().join("copy");
    let folder = data.join("pg_wal").canonicalize().unwrap();
    let restored = folder.join("RECOVERYXLOG");
    let fetch = |segment: &str| {
        let mut command = scene.walden.command();
        command.args(["wal", "fetch", segment, "pg_wal/RECOVERYXLOG"]).current_dir(&data);
        Run::of(&mut command, "").expect_code(0);
        let own = scene.cluster.data_directory().join("pg_wal").join(segment);
        assert!(fs::read(&restored).unwrap() == fs::read(own).unwrap(), "{segment}");
        let found = fs::metadata(&restored).unwrap();
        assert_eq!((found.mode() & 0o7777, found.nlink()), (0o600, 1));
        found
    };
    let owner = fetch(&scene.segments[0]).uid();
    let names = || {
        let names = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.collect::<BTreeSet<_>>()
    };
    let before = names();
    let prefetcher = wait_for_prefetcher(&scene.walden, &data);
    // After a second without requests it gives up what it has written, so that it may take more than one turn.
    wait_for("a segment that was written ahead", || {
        scene.segments[1..].iter().find_map(|segment| {
            let ahead = unnamed_files(prefetcher, &folder);
            let found = fetch(segment);
            assert_eq!(found.uid(), owner);
            let is_it = |file: &fs::File| file.metadata().is_ok_and(|file| file.ino() == found.ino());
            ahead.iter().any(is_it).then_some(())
        })
    });
    kill(prefetcher, Signal::SIGKILL).unwrap();
    wait_for("the prefetcher to be gone", || prefetchers(&data).is_empty().then_some(()));
    assert_eq!(names(), before);
}

#[test]
fn a_prefetcher_ends_with_its_data_directory() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 2);
    let server = scene.assert_recovers(scene.recovering("gone", &scene.walden.restore_command()));
    let data = server.data_directory().to_owned();
    wait_for_prefetcher(&scene.walden, &data);
    drop(server);
    fs::rename(&data, data.with_extension("moved")).unwrap();
    fs::create_dir(&data).unwrap();
    wait_for("the prefetcher to end", || prefetchers(&data).is_empty().then_some(()));
}

/// Everything in a data directory is made anew, and the directory stays: nothing that was read for the recovery before
/// is handed to the next one.
#[test]
fn a_data_directory_that_is_made_anew_in_its_place_gets_what_is_archived_now() {
    require!(Need::PostgreSQL(15));
    let scene = Scene::new(15, 4);
    let data = scene.recovering("again", "").data_directory().to_owned();
    let keep = data.with_extension("keep");
    copy_all(&data, &keep);
    let fetch = |segment: &str| {
        let mut command = scene.walden.command();
        command.args(["wal", "fetch", segment, "pg_wal/RECOVERYXLOG"]).current_dir(&data);
        Run::of(&mut command, "").expect_code(0);
        fs::read(data.join("pg_wal/RECOVERYXLOG")).unwrap()
    };
    fetch(&scene.segments[0]);
    let first = wait_for_prefetcher(&scene.walden, &data);
    // It reads ahead behind this one.
    fetch(&scene.segments[1]);
    let own = scene.cluster.data_directory().join("pg_wal").join(&scene.segments[2]);
    let mut other = fs::read(&own).unwrap();
    let last = other.len() - 1;
    other[last] ^= 1;
    fs::write(&own, &other).unwrap();
    scene.walden.run(&["wal", "push", own.to_str().unwrap(), "--force"]);
    let inode = fs::metadata(&data).unwrap().ino();
    shell(&data, "find . -mindepth 1 -delete");
    shell(&keep, &format!("cp -a . '{}'", data.display()));
    assert_eq!(fs::metadata(&data).unwrap().ino(), inode);
    assert!(fetch(&scene.segments[2]) == other, "it was read for the recovery before");
    wait_for("the prefetcher of the recovery before to end", || {
        (!prefetchers(&data).contains(&first)).then_some(())
    });
}

#[test]
fn a_standby_follows_a_live_archive_through_a_flapping_store_on_13() {
    require!(Need::PostgreSQL(13));
    a_standby_follows(13, Way::Fetch);
}

#[test]
fn a_standby_follows_a_live_archive_through_a_flapping_store_on_15() {
    require!(Need::PostgreSQL(15));
    a_standby_follows(15, Way::Fetch);
}

#[test]
fn a_standby_follows_a_live_archive_through_a_flapping_store_on_18() {
    require!(Need::PostgreSQL(18));
    a_standby_follows(18, Way::Fetch);
}

#[test]
fn a_standby_follows_by_plain_cp_from_a_mount_of_a_flapping_store_on_13() {
    require!(Need::PostgreSQL(13), Need::Fuse);
    a_standby_follows(13, Way::Cp);
}

#[test]
fn a_standby_follows_by_plain_cp_from_a_mount_of_a_flapping_store_on_15() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    a_standby_follows(15, Way::Cp);
}

#[test]
fn a_standby_follows_by_plain_cp_from_a_mount_of_a_flapping_store_on_18() {
    require!(Need::PostgreSQL(18), Need::Fuse);
    a_standby_follows(18, Way::Cp);
}

/// Majors come from the script, each with a line of the report.
#[test]
fn a_standby_follows_on_the_majors_that_the_script_asks_for() {
    for major in asked_for() {
        require!(Need::PostgreSQL(major), Need::Fuse);
        a_standby_follows(major, Way::Fetch);
        a_standby_follows(major, Way::Cp);
        report(&json!({ "what": "flapping store", "major": major, "missing": 0, "promotions_by_error": 0 }));
    }
}

/// What the restore_command of a standby is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `wal fetch`.
    Fetch,
    /// The documented `cp` from the mount.
    Cp,
}

/// Rows that come while the standby follows, each in a segment of its own.
const ROWS: usize = 16;
/// Segments that are pushed side by side, the last one first.
const BATCH: usize = 4;

/// Failure 1a, the other way round: a standby follows an archive that is written in any order, through a store that
/// fails every few requests, and neither stops nor promotes.
fn a_standby_follows(major: u32, way: Way) {
    let line = RemoteS3::start();
    let scene = Scene::in_store(&line.storage("timeout = \"1s\"\nretry = \"5s\"\n"), major, 1);
    // Segments are pushed by the test from here on.
    scene.cluster.set_archive_command("false");
    let mount = (way == Way::Cp).then(|| scene.mount());
    let command = if way == Way::Cp { scene.plain_cp() } else { scene.walden.restore_command() };
    let mut standby = scene.standby("standby", &command);
    let push = |segment: &str| {
        let mut command = scene.walden.command();
        command
            .args(["wal", "push", &format!("pg_wal/{segment}")])
            .current_dir(scene.cluster.data_directory());
        Run::of(&mut command, "").code()
    };
    standby.spawn();
    let faults = [Fault::CutAnswer, Fault::refusal("503 Slow Down", "", "SlowDown"), Fault::LoseAnswer];
    line.disturb(3, faults);
    let mut waiting = Vec::new();
    for row in 1..=ROWS {
        scene.cluster.sql(&format!("insert into r values ({row})"));
        waiting.push(scene.cluster.sql("select pg_walfile_name(pg_switch_wal())"));
        if waiting.len() == BATCH {
            // Side by side and the last one first.
            let batch: Vec<String> = waiting.drain(..).rev().collect();
            thread::scope(|scope| {
                for segment in &batch {
                    scope.spawn(|| wait_for("a push", || (push(segment) == Some(0)).then_some(())));
                }
            });
            assert!(standby.is_running(), "{}", standby.log());
        }
    }
    wait_for("the standby to catch up", || {
        assert!(standby.is_running(), "{}", standby.log());
        (standby.answers() && Scene::rows(&standby) == 1 + ROWS).then_some(())
    });
    assert!(line.heal() > 0, "no request was disturbed");
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    assert!(!standby.log().contains("archive recovery complete"), "{}", standby.log());
    standby.stop(Stop::Fast);
    drop(mount);
}
