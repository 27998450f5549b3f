//! A clone's life: stopped and started, killed, made twice, made in vain, deleted.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::site::{Clone, Source, assert_unchanged, listing, servers_of};
use crate::support::{Chaos, Ledger, Need, Options, mounts_below, require, wait_for};

/// A source with a row, a basebackup and an archive that is complete.
fn source() -> Source {
    source_with(Options::default())
}

fn source_with(options: Options) -> Source {
    let source = Source::start(options);
    source.sql("create table kept as select n from generate_series(1, 1000) n");
    source.backup();
    source.sql("insert into kept values (1001)");
    source.archive_wal();
    source
}

#[track_caller]
fn assert_nothing_is_left(source: &Source, clone: &Clone) {
    let folder = clone.folder();
    assert!(!folder.exists());
    assert_eq!(mounts_below(&folder), [] as [std::path::PathBuf; 0]);
    let folder = folder.display().to_string();
    wait_for("the clone's processes to end", || servers_of(&folder).is_empty().then_some(()));
    let (pins, ends) = source.pins();
    assert_eq!(pins, ends, "a pin holds the basebackup");
}

/// Failure 6: segments of other sizes than 16 MiB; those above 64 MiB come from their parts.
fn a_clone_recovers_from_segments_of(mib: u32) {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source_with(Options::default().initdb(&format!("--wal-segsize={mib}")));
    let clone = source.clone("sized", &[]);
    assert_eq!(clone.sql("select count(*) from kept"), "1001");
    assert_eq!(
        clone.sql("select setting from pg_settings where name = 'wal_segment_size'"),
        (mib << 20).to_string()
    );
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
}

#[test]
fn a_clone_recovers_from_segments_of_64_mib() {
    a_clone_recovers_from_segments_of(64);
}

#[test]
fn a_clone_recovers_from_segments_of_128_mib() {
    a_clone_recovers_from_segments_of(128);
}

#[test]
fn what_was_committed_is_there_after_a_stop_and_delete_leaves_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("stopped", &[]);
    assert_eq!(clone.sql("select count(*) from kept"), "1001");
    assert_eq!(source.pins(), (1, 0));
    assert_lists_its_settings(&clone);
    clone.sql("insert into kept select n from generate_series(1, 5000) n; create index on kept (n)");
    clone.run("stop");
    assert_eq!(clone.state(), "stopped");
    assert!(mounts_below(&clone.folder()).is_empty() && !clone.answers());
    assert_lists_its_settings(&clone);
    clone.run("stop");
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), "6001");
    assert_eq!(clone.state(), "running");
    assert!(!clone.walden.try_run(&["clone", "start", "stopped"]).success(), "it runs already");
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
    assert_eq!(source.pins(), (1, 1));
    assert!(!clone.walden.try_run(&["clone", "status", "stopped"]).success());
}

/// Each setting that is not the source's, with the reason.
#[track_caller]
fn assert_lists_its_settings(clone: &Clone) {
    let status = clone.status();
    let settings = status["settings"].as_array().unwrap();
    let listed = |name: &str, value: &str| {
        let found = settings.iter().find(|setting| setting["name"] == name);
        let found = found.unwrap_or_else(|| panic!("{name} is not listed: {status}"));
        assert_eq!(found["value"], value, "{name}");
        assert!(!found["reason"].as_str().unwrap().is_empty(), "{name}");
    };
    listed("archive_mode", "off");
    listed("synchronous_standby_names", "");
    listed("max_logical_replication_workers", "0");
    let text = clone.walden.run(&["clone", "status", &clone.name]).stdout;
    assert!(text.contains(&format!("settings      {} differ from the source's", settings.len())), "{text}");
}

#[test]
fn every_acknowledged_row_survives_the_supervisors_death() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("killed", &[]);
    let load = Chaos::start(&clone);
    load.wait_for_commits(100);
    load.wait_for_churn(1);
    let [supervisor, _] = clone.processes();
    clone.kill(supervisor);
    let acknowledged = load.abandon().acknowledged();
    assert_eq!(clone.state(), "stopped");
    clone.run("start");
    Ledger::assert_holds(&clone, acknowledged);
    assert_eq!(clone.sql("select count(*) from kept"), "1001");
    // Once more, and deleted as it lies there, with a dead mount (failure 38).
    let [supervisor, _] = clone.processes();
    clone.kill(supervisor);
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
}

/// What is passed through can be written without the process that served it: nobody mounts the same files beside that.
#[test]
fn a_clone_is_not_started_while_somebody_has_a_file_of_its_killed_mount_open() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("open", &[]);
    let whole = clone.folder().join("upper/data/.walden/whole");
    wait_for("everything to be local", || whole.exists().then_some(()));
    let file = clone.sql("select pg_relation_filepath('kept')");
    let mut holder = Command::new("bash")
        .args(["-c", "exec 3<>\"$FILE\"; echo open; read"])
        .env("FILE", clone.folder().join("mnt/data").join(file))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(holder.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "open\n");
    let [supervisor, _] = clone.processes();
    clone.kill(supervisor);
    for command in ["start", "delete"] {
        let refused = clone.walden.try_run(&["clone", command, "open"]).expect_code(1);
        assert!(
            refused.stderr.contains(&format!("is in use by process {} (bash)", holder.id())),
            "{}",
            refused.stderr
        );
        assert!(
            refused.stderr.contains(&format!("hint: End process {}: ", holder.id())),
            "{}",
            refused.stderr
        );
    }
    drop(holder.stdin.take());
    holder.wait().unwrap();
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), "1001");
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
}

/// As on hosts where /var/lib is kept elsewhere.
#[test]
fn a_clone_whose_folder_is_behind_a_link_runs_and_outlives_its_supervisor() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let real = source.scratch().path().join("walden/elsewhere");
    fs::rename(source.clones(), &real).unwrap();
    std::os::unix::fs::symlink(&real, source.clones()).unwrap();
    let clone = source.clone("linked", &[]);
    for command in ["start", "delete"] {
        let [supervisor, _] = clone.processes();
        clone.kill(supervisor);
        clone.run(command);
    }
    assert!(mounts_below(&real).is_empty());
    assert_nothing_is_left(&source, &clone);
}

#[test]
fn a_server_that_is_killed_is_told_and_can_be_started_again() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("crashed", &[]);
    clone.sql("insert into kept values (1002)");
    let [_, postmaster] = clone.processes();
    clone.kill(postmaster);
    let status = clone.status();
    assert_eq!(status["state"], "failed", "{status}");
    assert!(status["message"].as_str().unwrap().contains("PostgreSQL ended"), "{status}");
    assert!(mounts_below(&clone.folder()).is_empty());
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), "1002");
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
}

#[test]
fn a_clone_that_cannot_be_made_leaves_nothing() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let walden = source.walden.as_root();
    let refused = |options: &[&str], because: &str| {
        let run = walden.try_run(&[&["clone", "create", "vain"], options].concat());
        assert!(!run.success() && run.stderr.contains(because), "{options:?}: {}", run.stderr);
        assert!(!source.clones().join("vain").exists(), "{options:?} left a folder");
        let (pins, ends) = source.pins();
        assert_eq!(pins, ends, "{options:?} left a pin");
    };
    refused(&["--backup", "20010101"], "20010101");
    refused(&["--target-lsn", "FF/0"], "the archive ends before");
    refused(&["--target-lsn", "FF/0"], " on timeline 1 can end from ");
    refused(
        &["--target-lsn", "0/10"],
        "no basebackup ended before LSN 0/10, not even the oldest: recovery from",
    );
    refused(
        &["--target-time", "2001-01-01 00:00:00+00"],
        "no basebackup ended before time 2001-01-01T00:00:00Z",
    );
    refused(&["--target-timeline", "7"], "lies on the way to timeline 7, not even the newest: recovery from");
    // Files that are damaged are found when the WAL is looked through, with the basebackup pinned already.
    let files = listing(&source.walden.repository());
    let segments: Vec<_> =
        files.keys().filter(|path| path.iter().any(|part| part == "wal") && path.is_file()).collect();
    let newest = segments.iter().max_by_key(|path| path.file_name()).unwrap();
    let whole = fs::read(newest).unwrap();
    fs::write(newest, &whole[..whole.len() / 2]).unwrap();
    let file = newest.file_name().unwrap().to_str().unwrap();
    refused(&[], &format!("WAL file {file} is damaged: its body is not the one its header names"));
    fs::remove_file(newest).unwrap();
    source.sql("insert into kept values (1002)");
    source.archive_wal();
    refused(&[], &format!("WAL segment {file} is missing from the archive on the way to"));
    refused(&[], " on timeline 1 can end from ");
}

#[test]
fn a_clone_is_not_made_over_another() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("one", &[]);
    clone.sql("insert into kept values (1002)");
    clone.run("stop");
    let before = listing(&clone.folder());
    let again = clone.walden.try_run(&["clone", "create", "one"]);
    assert!(!again.success() && again.stderr.contains("exists already"), "{}", again.stderr);
    assert_unchanged(&before, &clone.folder());
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), "1002");
    clone.run("delete");
    assert_nothing_is_left(&source, &clone);
}
