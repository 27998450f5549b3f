//! Standalone basebackups: of servers that archive nothing, restored where there is nothing but the basebackup.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::instant_scene::Scene;
use crate::source::{Source, wait_until_writable};
use crate::support::{
    Account, Checksums, Need, Options, Pgbench, Run, Scratch, Server, Site, Walden, require, wait_for,
};

/// Keeps hardly any WAL and archives none.
fn forgetful() -> Options {
    let options = Options::default().initdb("--wal-segsize=1").setting("archive_mode", "off");
    options.setting("min_wal_size", "2MB").setting("max_wal_size", "8MB")
}

/// Takes a standalone basebackup so slowly that the server meanwhile recycles WAL that it needs; nothing is written
/// afterwards.
fn take_while_wal_goes(source: &Source) -> Value {
    source.sql("create table kept (n int, t text)");
    Pgbench::initialize(source, 1);
    let mut command = source.walden.command();
    command.args(["--output", "json", "backup", "--standalone", "--rate-limit", "4MiB"]);
    let mut taking = command.stdout(Stdio::piped()).spawn().unwrap();
    // What its session asks once the server is in backup mode.
    let following = "select count(*) from pg_stat_activity where application_name = 'walden' \
                     and (query like '%flush_lsn%' or query like '%slot_advance%')";
    wait_for("the server to be in backup mode", || (source.sql(following) == "1").then_some(()));
    let slots =
        "select string_agg(temporary::text, ' ') from pg_replication_slots where slot_name like 'walden%'";
    assert_eq!(source.sql(slots), "true");
    let needed = source.sql("select pg_walfile_name(pg_current_wal_lsn())");
    let path = source.data_directory().join("pg_wal").join(&needed);
    assert!(path.exists(), "{needed}");
    wait_for("WAL to be recycled that is needed", || {
        source.sql("insert into kept select n, md5(n::text) from generate_series(1, 3000) n");
        source.sql("select pg_switch_wal(); checkpoint");
        (!path.exists()).then_some(())
    });
    assert!(taking.try_wait().unwrap().is_none(), "the basebackup has ended before");
    source.sql("delete from kept where n % 5 = 0");
    let output = taking.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let segments = &report["wal"]["segments"][0];
    let (first, last) = (segments["first"].as_str().unwrap(), segments["last"].as_str().unwrap());
    assert!((first..=last).contains(&&*needed), "{needed} is not needed: {report}");
    let left = "select count(*) from pg_replication_slots";
    wait_for("the slot to go with its session", || (source.sql(left) == "0").then_some(()));
    report
}

/// Nothing was ever archived, and the basebackup is one all the same.
fn assert_stands_alone(walden: &Walden, report: &Value) {
    assert_eq!(report["standalone"], true, "{report}");
    let listed = &walden.json(&["list"])["basebackups"][0];
    assert_eq!((&listed["standalone"], &listed["recoverable"]), (&true.into(), &true.into()), "{listed}");
    let info = walden.json(&["info"]);
    let cluster = &info["clusters"][0];
    assert_eq!(cluster["basebackups"][0]["standalone"], true, "{info}");
    assert_eq!(cluster["timelines"][0]["segments"], 0, "{info}");
    let window = &cluster["timelines"][0]["windows"][0];
    assert_eq!(window["end_lsn"], report["wal"]["end"], "{info}");
    walden.run(&["wal", "check"]);
    let text = walden.run(&["info"]).stdout + &walden.run(&["list"]).stdout;
    assert!(text.contains("yes, standalone") && text.contains("standalone, it carries"), "{text}");
}

/// Restores a basebackup and starts it.
fn recovered(major: u32, walden: &Walden, scratch: &Scratch, name: &str, options: &[&str]) -> Server {
    let place = scratch.path().join(name);
    let words = ["restore", "--target-dir", place.to_str().unwrap()];
    walden.json(&[&words, options].concat());
    let mut server = Server::new(major, &place, &scratch.folder(&format!("run-{name}")));
    server.set("archive_mode", "off").start();
    wait_until_writable(&server);
    server
}

const IMMEDIATE: [&str; 4] = ["--target", "immediate", "--target-action", "promote"];

fn a_standalone_basebackup_is_restored_without_an_archive(major: u32) {
    require!(Need::PostgreSQL(15), Need::PostgreSQL(major));
    let source = Source::start_major(major, forgetful());
    let refused = source.walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("does not archive WAL"), "{}", refused.stderr);
    let report = take_while_wal_goes(&source);
    let expected = Checksums::of(&source);
    assert_stands_alone(&source.walden, &report);
    let (walden, scratch) = (&source.walden, source.scratch());
    let server = recovered(major, walden, scratch, "immediate", &IMMEDIATE);
    expected.assert_same(&Checksums::of(&server));
    let segment = server.sql("select pg_walfile_name(pg_current_wal_lsn())");
    assert!(segment.starts_with("00000002"), "{segment}");
    drop(server);
    // Without a target recovery ends with the WAL there is.
    let server = recovered(major, walden, scratch, "end", &[]);
    expected.assert_same(&Checksums::of(&server));
    server.sql("insert into kept values (-1, 'x'); checkpoint");
}

#[test]
fn a_standalone_basebackup_of_13_is_restored_without_an_archive() {
    a_standalone_basebackup_is_restored_without_an_archive(13);
}

#[test]
fn a_standalone_basebackup_of_15_is_restored_without_an_archive() {
    a_standalone_basebackup_is_restored_without_an_archive(15);
}

#[test]
fn a_standalone_basebackup_of_18_is_restored_without_an_archive() {
    a_standalone_basebackup_is_restored_without_an_archive(18);
}

/// What a mount shows of it is a data directory that any server starts on, with crash recovery alone.
#[test]
fn a_copy_of_a_mounted_standalone_basebackup_starts_without_walden() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = Source::start(forgetful());
    let report = take_while_wal_goes(&source);
    let expected = Checksums::of(&source);
    let mounted = source.walden.mount(&source.scratch().folder("mnt"));
    let copy = source.place("copy");
    let shown = mounted.path().join("basebackups/latest/data");
    Run::of(Account::of_postgresql().command("cp").arg("-rL").args([&shown, &copy]), "").expect_success();
    let segment = report["wal"]["segments"][0]["first"].as_str().unwrap();
    let (in_archive, fetched) = (mounted.path().join("wal").join(segment), source.place("fetched"));
    Run::of(Account::of_postgresql().command("cp").args([&in_archive, &fetched]), "").expect_success();
    assert!(fs::read(&fetched).unwrap() == fs::read(copy.join("pg_wal").join(segment)).unwrap(), "{segment}");
    drop(mounted);
    Run::of(Command::new("chmod").args(["-R", "u+w"]).arg(&copy), "").expect_success();
    Run::of(Command::new("chmod").arg("700").arg(&copy), "").expect_success();
    // With the WAL, which it reads from start to stop.
    let verify = source.bin_directory().join("pg_verifybackup");
    Run::of(Account::of_postgresql().command(verify).arg(&copy), "").expect_success();
    let mut server = Server::new(15, &copy, &source.scratch().folder("run-copy"));
    server.start();
    expected.assert_same(&Checksums::of(&server));
    assert_eq!(server.sql("select timeline_id from pg_control_checkpoint()"), "1");
}

/// A standby cannot end a segment: of its last one the beginning is carried.
#[test]
fn a_standalone_basebackup_of_a_standby_ends_where_it_stopped() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default().setting("archive_mode", "off"));
    let data = source.place("standby");
    let base = source.bin_directory().join("pg_basebackup");
    let mut copy = Account::of_postgresql().command(base);
    copy.arg("-R").arg("-D").arg(&data).arg("-d").arg(source.connection()).arg("-cfast");
    Run::of(&mut copy, "").expect_success();
    let mut standby = Server::new(15, &data, &source.scratch().folder("run-standby"));
    standby.start();
    source.sql("create table kept as select n, md5(n::text) from generate_series(1, 20000) n; checkpoint");
    let written = source.sql("select pg_current_wal_lsn()");
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    wait_for("the standby to have replayed all", || (standby.sql(&replayed) == "t").then_some(()));
    let scratch = Scratch::new();
    let site = Site::of(&standby, &data).bin_directory(&standby.bin_directory());
    let walden = Walden::configure(&scratch, &site);
    let report = walden.json(&["backup", "--standalone"]);
    assert_eq!(report["wal"]["end"], report["stop_lsn"], "{report}");
    assert_stands_alone(&walden, &report);
    // A server that is started from it goes on in its last segment, which has to be archived then.
    let shown = walden.json(&["show", "latest", "--files"]);
    let paths: Vec<&str> =
        shown["files"].as_array().unwrap().iter().map(|file| file["path"].as_str().unwrap()).collect();
    let segments = report["wal"]["segments"].as_array().unwrap();
    let last = segments.last().unwrap()["last"].as_str().unwrap();
    assert!(paths.contains(&&*format!("data/pg_wal/{last}")), "{paths:?}");
    let done: Vec<&&str> = paths.iter().filter(|path| path.ends_with(".done")).collect();
    assert!(!done.iter().any(|path| path.contains(last)), "{done:?}");
    let carried = paths.iter().filter(|path| path.starts_with("data/pg_wal/0")).count();
    assert_eq!(done.len(), carried - 1, "{paths:?}");
    // PostgreSQL sees the immediate target at the record behind it, and an idle standby has none.
    let place = scratch.path().join("refused");
    let refused =
        walden.try_run(&["restore", "--target-dir", place.to_str().unwrap(), "--target", "immediate"]);
    let refused = refused.expect_code(1);
    assert!(refused.stderr.contains("--target-action promote") && !place.exists(), "{}", refused.stderr);
    for (name, options) in [("from-standby", &IMMEDIATE[..]), ("end-of-standby", &[])] {
        let server = recovered(15, &walden, &scratch, name, options);
        let kept = "select count(*), sum(n) from kept";
        assert_eq!(server.sql(kept), source.sql(kept));
    }
}

/// What the archive has since goes on where the carried WAL ends.
#[test]
fn the_archive_goes_on_behind_the_wal_that_is_carried() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    source.set_archive_command("/bin/false");
    source.sql("create table kept as select n from generate_series(1, 1000) n");
    let report = source.walden.json(&["backup", "--standalone"]);
    source.sql("insert into kept select n from generate_series(1001, 2000) n");
    source.archive();
    let last = source.archive_wal();
    let expected = Checksums::of(&source);
    let info = source.walden.json(&["info"]);
    assert!(last.as_str() > report["wal"]["segments"][0]["last"].as_str().unwrap(), "{report}");
    assert_eq!(info["clusters"][0]["basebackups"][0]["recoverable"], true, "{info}");
    let server = recovered(15, &source.walden, source.scratch(), "end", &[]);
    expected.assert_same(&Checksums::of(&server));
}

#[test]
fn an_instant_restore_of_a_standalone_basebackup_needs_no_archive() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root, Need::Folder);
    let scene = Scene::start(forgetful());
    take_while_wal_goes(&scene.source);
    let expected = Checksums::of(&scene.source);
    let (restored, _) = scene.answering("instant", &IMMEDIATE);
    let writable = || (restored.try_sql("select pg_is_in_recovery()").ok()? == "f").then_some(());
    wait_for("the end of recovery", writable);
    expected.assert_same(&Checksums::of(&restored));
    restored.finish();
    expected.assert_same(&Checksums::of(&restored));
    restored.assert_ends_sound();
}

/// A slot that a session uses is taken away by ending that session.
#[test]
fn wal_that_the_server_no_longer_keeps_ends_the_basebackup_and_the_setting_is_named() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(forgetful().setting("max_slot_wal_keep_size", "1MB"));
    source.sql("create table kept (n int, t text)");
    Pgbench::initialize(&source, 5);
    let mut command = source.walden.command();
    command.args(["backup", "--standalone", "--rate-limit", "1MiB"]);
    let mut taking = command.stderr(Stdio::piped()).spawn().unwrap();
    // More than it keeps, each time, and faster than it is copied.
    wait_for("the slot to be lost", || {
        source.sql("insert into kept select n, repeat(md5(n::text), 20) from generate_series(1, 20000) n; checkpoint");
        taking.try_wait().unwrap()
    });
    let output = taking.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{told}");
    assert!(
        told.contains("kept WAL for the standalone basebackup") && told.contains("max_slot_wal_keep_size"),
        "{told}"
    );
    let listed = source.walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
}

#[test]
fn a_server_that_makes_no_slot_is_refused_before_anything_is_read() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(forgetful().setting("max_replication_slots", "0"));
    let refused = source.walden.try_run(&["backup", "--standalone"]).expect_code(2);
    assert!(refused.stderr.contains("max_replication_slots"), "{}", refused.stderr);
    let listed = source.walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
}

#[test]
fn what_takes_the_data_directory_is_refused_where_basebackups_come_through_the_server() {
    require!(Need::PostgreSQL(15));
    let through = "backup_source = \"replication\"";
    let source = Source::configured(15, forgetful(), |_, site| site.key(through));
    for option in ["--standalone", "--dry-run"] {
        let refused = source.walden.try_run(&["backup", option]).expect_code(2);
        assert!(refused.stderr.contains("takes the data directory"), "{option}: {}", refused.stderr);
    }
}

#[test]
fn a_dry_run_says_what_would_be_read_and_writes_nothing() {
    require!(Need::PostgreSQL(15), Need::Folder);
    let source = Source::start(Options::default());
    let folder = source.scratch().folder("space");
    source.sql(&format!("create tablespace fast location '{}'", folder.display()));
    source.sql("create table apart tablespace fast as select n from generate_series(1, 10000) n");
    let asked = "select checkpoints_req from pg_stat_bgwriter";
    let before = source.sql(asked);
    let report = source.walden.json(&["backup", "--dry-run", "--rate-limit", "1MiB"]);
    let number = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert_eq!((&report["dry_run"], &report["parent"]), (&true.into(), &Value::Null), "{report}");
    assert_eq!(report["full_because"], "this host remembers no basebackup of the site", "{report}");
    assert_eq!(number("files_read"), number("files"), "{report}");
    assert!(number("files") > 500 && number("database_bytes") > 15 << 20, "{report}");
    assert_eq!(number("bytes_per_second_max"), 1 << 20);
    let seconds = report["seconds_min"].as_f64().unwrap();
    assert!((seconds - number("database_bytes") as f64 / 1_048_576.0).abs() <= 0.5, "{report}");
    assert_eq!(report["tablespaces"][0]["name"], "fast", "{report}");
    assert!(report["tablespaces"][0]["bytes"].as_u64().unwrap() > 300_000, "{report}");
    assert_eq!(report["first_of_cluster"], true, "{report}");
    let text = source.walden.run(&["backup", "--dry-run"]).stdout;
    assert!(text.starts_with("would read ") && text.ends_with("nothing was written\n"), "{text}");
    assert!(is_empty(&source.walden.repository()), "the repository has something");
    assert_eq!(source.sql(asked), before, "a backup was started");
    // Of an incremental one only what changed would be read.
    // A file is passed over where it was two seconds old when the last basebackup began.
    std::thread::sleep(Duration::from_millis(2500));
    let parent = source.backup();
    source.sql("insert into apart select 1; checkpoint");
    let state = source.walden.configuration_file().with_file_name("state").join("basebackups");
    let remembered = files_below(&state);
    assert!(!remembered.is_empty(), "nothing is remembered");
    let report = source.walden.json(&["backup", "--dry-run"]);
    assert_eq!(report["parent"], parent.as_str(), "{report}");
    assert_eq!((&report["full_because"], &report["resumes"]), (&Value::Null, &false.into()), "{report}");
    assert_eq!(source.walden.json(&["list"])["basebackups"].as_array().unwrap().len(), 1);
    assert!(files_below(&state) == remembered, "what is remembered is not what it was");
    // What follows passes over the same files, but for the few that its own checkpoint writes.
    let number = |report: &Value, name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{report}"));
    let unread = number(&report, "files") - number(&report, "files_read");
    let taken = source.walden.json(&["backup"]);
    let passed_over = number(&taken, "unread_files");
    assert!(unread > 500 && (unread * 9 / 10..=unread).contains(&passed_over), "{report} {taken}");
    assert!(number(&report, "bytes_read") <= number(&taken, "read_bytes"), "{report} {taken}");
    // What would be refused is refused.
    source.set_archive_command("");
    let refused = source.walden.try_run(&["backup", "--dry-run"]).expect_code(2);
    assert!(refused.stderr.contains("archive_command is empty"), "{}", refused.stderr);
}

/// Every file below a folder but locks, and what it has.
fn files_below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else if path.file_name().is_some_and(|name| name != "lock") {
            files.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    files
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().flatten().all(|entry| entry.path().is_dir() && is_empty(&entry.path()))
}

/// What is counted is what was read, and the limit of the configuration is the one that holds.
#[test]
fn the_summary_says_what_a_basebackup_took() {
    require!(Need::PostgreSQL(15));
    let lines = "[limits]\nrate = \"20MiB\"\n";
    let source = Source::configured(15, Options::default(), |_, site| site.lines(lines));
    source.archive();
    let report = source.walden.json(&["backup"]);
    let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"));
    let (read, all) = (number("read_bytes"), number("database_bytes"));
    // All but what is made by walden itself, and pg_control.
    assert!(read <= all && read > all * 0.95, "{report}");
    assert!(number("cpu_seconds") > 0.0 && number("memory_bytes_peak") > 1e7, "{report}");
    // No faster than the limit allows: nothing is waited for here, it has happened.
    assert!(number("seconds") >= read / (20.0 * 1_048_576.0) - 0.1, "{report}");
    let unlimited = source.walden.run(&["backup", "--rate-limit", "none"]).stdout;
    assert!(unlimited.contains(" read, ") && unlimited.contains(" of processor time, "), "{unlimited}");
}
