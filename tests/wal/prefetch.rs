//! Recoveries whose fetches leave a prefetcher behind: killed at any moment, stuck, or before a store that comes and goes.

use std::collections::VecDeque;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::scene::{Scene, base_backup, copy_all, recover, shell};
use crate::support::{Cluster, Fault, Need, Options, Proxy, Run, S3, Server, Site, Stop, Walden, require};
use crate::support::{s3_storage, wait_for};

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

/// Failure 1a, the other way round: a standby follows an archive that is written in any order, through a store that
/// fails every few requests, and neither stops nor promotes.
#[test]
fn a_standby_follows_a_live_archive_through_a_flapping_store() {
    require!(Need::PostgreSQL(15));
    let options = Options::default().initdb("--wal-segsize=1").setting("wal_keep_size", "1GB");
    let mut cluster = Cluster::start_with(15, options);
    let s3 = S3::over(&cluster.scratch().folder("objects"));
    let line = Proxy::to(&s3.endpoint());
    let storage = s3_storage(&line.endpoint()) + "timeout = \"1s\"\nretry = \"5s\"\n";
    let site = Site::of(&cluster, cluster.data_directory())
        .storage(&storage)
        .lines("[sites.main.archive]\nfetch_wait = \"1s\"\n");
    let walden = Walden::configure(cluster.scratch(), &site);
    cluster.sql("create table r (n int)");
    let data = cluster.scratch().path().join("standby");
    base_backup(&cluster, &data, &["-X", "stream"]);
    cluster.scratch().file("standby/standby.signal", "");
    let mut standby = Server::new(15, &data, &cluster.scratch().folder("run-standby"));
    standby.set("restore_command", &walden.restore_command()).set("hot_standby", "on");
    standby.set("wal_retrieve_retry_interval", "100ms").set("archive_mode", "off");
    let push = |segment: &str| {
        let mut command = walden.command();
        command.args(["wal", "push", &format!("pg_wal/{segment}")]).current_dir(cluster.data_directory());
        Run::of(&mut command, "").code()
    };
    let first = cluster.sql("select pg_walfile_name(pg_current_wal_lsn())");
    cluster.sql("select pg_switch_wal()");
    assert_eq!(push(&first), Some(0));
    standby.spawn();
    let faults = || [Fault::CutAnswer, Fault::refusal("503 Slow Down", "", "SlowDown"), Fault::LoseAnswer];
    line.disturb(3, faults());
    let mut waiting = VecDeque::new();
    for round in 0..24 {
        cluster.sql(&format!("insert into r values ({round})"));
        waiting.push_back(cluster.sql("select pg_walfile_name(pg_switch_wal())"));
        if waiting.len() == 4 {
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
        (standby.answers() && Scene::rows(&standby) == 24).then_some(())
    });
    assert!(line.heal() > 0, "no request was disturbed");
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    assert!(!standby.log().contains("archive recovery complete"), "{}", standby.log());
    standby.stop(Stop::Fast);
    cluster.stop(Stop::Fast);
}
