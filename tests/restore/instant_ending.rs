//! How an instant restore ends: under load, with a cut-over or without, by the end of its server; what holds the basebackup
//! until then and no longer, and what is left when it is plain.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::instant_scene::{Holds, Scene, Victim, word};
use crate::source::wait_until_writable;
use crate::support::{Chaos, Checksums, Ledger, Need, Options, Sql, program, require, wait_for};

/// A session that has read a table and stays open, as those of a pool do.
struct Held {
    process: Child,
}

impl Held {
    #[track_caller]
    fn start(sql: &Sql) -> Self {
        let mut psql = Command::new(program("psql").expect("the test required it"));
        psql.args([
            "--no-psqlrc",
            "--quiet",
            "-c",
            "select count(*) from cold",
            "-c",
            "select pg_sleep(600)",
        ]);
        psql.arg(sql.connection()).env("PGAPPNAME", "held");
        psql.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let held = Self { process: psql.spawn().unwrap() };
        let sleeps = "select count(*) from pg_stat_activity where application_name = 'held' and wait_event = 'PgSleep'";
        wait_for("a session to be held", || (sql.sql(sleeps) == "1").then_some(()));
        held
    }

    /// Whether its backend has the table open.
    #[track_caller]
    fn has_it_open(sql: &Sql) -> bool {
        let pid = sql.sql("select pid from pg_stat_activity where application_name = 'held'");
        let path = sql.sql("select pg_relation_filepath('cold')");
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let mut opened = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
        opened.any(|opened| opened.ends_with(&path))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn scene() -> Scene {
    Scene::filled(Options::default())
}

/// Files of a restored directory that are not on the disk as long as they say they are.
#[track_caller]
fn holes(directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap().flatten() {
        let metadata = fs::symlink_metadata(entry.path()).unwrap();
        if metadata.is_dir() {
            holes(&entry.path(), found);
        } else if metadata.is_file() && metadata.len() > 0 && metadata.blocks() == 0 {
            found.push(entry.path().display().to_string());
        }
    }
}

#[test]
fn it_becomes_plain_under_load_and_then_outlives_everything() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let beneath = scene.beneath();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "8MiB"]);
    restored.wait_until_writable(&mut beside);
    assert_eq!(scene.holds(), Holds { pins: 1, open_pins: 1, open_leases: 0 });
    let load = Chaos::start(&restored);
    load.wait_for_commits(50);
    load.wait_for_churn(1);
    let report = beside.report();
    assert_eq!(word(&report, "state"), "plain");
    assert_eq!(word(&report, "target_directory"), restored.directory.to_str().unwrap());
    let seconds = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert!(seconds("answered_after_seconds") <= seconds("plain_after_seconds"), "{report}");
    let bytes = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert_eq!(bytes("hydrated_bytes"), bytes("total_bytes"), "{report}");
    assert!(bytes("requests") > 0 && bytes("bytes_fetched") > 0, "{report}");
    scene.wait_until_let_go();
    // It runs on, through mounts over what is a data directory already.
    for file in ["PG_VERSION", "global/pg_control"] {
        assert!(beneath.path(&restored.directory).join(file).is_file(), "{file} is not in its place");
    }
    load.wait_for_commits(50);
    load.wait_for_churn(1);
    restored.sql("checkpoint");
    load.wait_for_commits(50);
    restored.kill(Victim::Host);
    let acknowledged = load.abandon().acknowledged();

    restored.start();
    wait_until_writable(&restored);
    assert!(restored.sql("show data_directory") == restored.directory.to_str().unwrap());
    Ledger::assert_holds(&restored, acknowledged);
    assert_eq!(restored.sql("select count(*), sum(n) from cold"), "200000|20000100000");
    restored.amcheck();
    restored.stop();
    restored.assert_checksums();
    // What was left of it is nobody's business any more, and goes.
    let left = restored.try_resume();
    assert!(restored.mounts().is_empty(), "a mount over a plain directory: {}", left.stderr);
    restored.assert_plain();
    let mut sparse = Vec::new();
    holes(&restored.directory, &mut sparse);
    assert_eq!(sparse, [] as [String; 0]);
}

#[test]
fn mounts_and_area_go_with_the_server_and_nothing_before() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    assert_eq!(word(&restored.begin(&[]), "state"), "plain");
    let held = Held::start(&restored);
    restored.sql("create table own as select n from generate_series(1, 1000) n");
    assert!(Held::has_it_open(&restored), "nobody has asked for a cut-over");
    assert!(!restored.mounts().is_empty(), "the server's files are in it");
    let rows = Checksums::of(&restored);
    restored.stop();
    drop(held);
    restored.assert_plain();
    restored.assert_checksums();
    // Nothing to go on with, and nobody's restore any more.
    let nothing = restored.try_resume().expect_code(1);
    assert!(nothing.stderr.contains("hint: ") || nothing.stderr.contains("nothing"), "{}", nothing.stderr);
    restored.assert_plain();
    restored.assert_starts_natively();
    rows.assert_same(&Checksums::of(&restored));
    // As any restored directory: it is full, and only --force replaces it.
    let again = restored.try_begin(&[]).expect_code(1);
    assert!(again.stderr.contains("a server is running"), "{}", again.stderr);
    restored.stop();
    let again = restored.try_begin(&[]).expect_code(1);
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
    rows.assert_same(&{
        restored.start();
        Checksums::of(&restored)
    });
    restored.stop();
}

#[test]
fn a_cut_over_has_all_sessions_open_their_files_again_and_leaves_no_database() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--cut-over", "--hydrate-rate", "8MiB"]);
    restored.wait_until_writable(&mut beside);
    let held = Held::start(&restored);
    assert!(Held::has_it_open(&restored));
    let before = restored.sql("select max(oid) from pg_database");
    assert_eq!(word(&beside.report(), "state"), "plain");
    let left = "select count(*) from pg_database where datname like 'walden%'";
    // It may come after the word that all is plain.
    wait_for("the session to let go of its files", || (!Held::has_it_open(&restored)).then_some(()));
    wait_for("the scratch database to be dropped", || (restored.sql(left) == "0").then_some(()));
    assert_eq!(restored.sql("select max(oid) from pg_database"), before);
    drop(held);
    restored.stop();
    restored.assert_plain();
    restored.assert_starts_natively();
    assert_eq!(restored.sql(left), "0");
    restored.stop();
}

/// Who was told to cut over and killed on the way leaves a scratch database; nobody may find it later.
#[test]
fn what_a_killed_cut_over_has_left_goes_with_the_next() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    restored.begin(&["--no-hydrate", "--cut-over"]);
    restored.sql("create database walden_cutover_0123456789abcdef");
    restored.kill(Victim::Both);
    restored.finish();
    let left = "select count(*) from pg_database where datname like 'walden%'";
    wait_for("the cut-over to be over", || (restored.sql(left) == "0").then_some(()));
    restored.stop();
    restored.assert_plain();
    restored.assert_starts_natively();
    assert_eq!(restored.sql(left), "0");
    restored.stop();
}

/// Nobody thinks of everything at three in the morning: what was not asked for is asked for later, where no server is in the way.
#[test]
fn a_cut_over_can_be_asked_for_when_it_is_resumed() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let (restored, report) = scene.answering("restored", &[]);
    assert!(report["cut_over"].is_null(), "{report}");
    let mut while_served = restored.resume_beside(&["--cut-over"]);
    assert_eq!(while_served.wait().code(), Some(2), "{}", while_served.told());
    assert!(while_served.told().contains("hint: End it"), "{}", while_served.told());
    restored.kill(Victim::Both);
    let report = restored.resume_beside(&["--cut-over", "--hydrate-rate", "none"]).report();
    assert_eq!((word(&report, "state"), word(&report, "cut_over")), ("plain", "done"), "{report}");
    restored.stop();
    restored.assert_plain();
    let words = ["restore", "--resume", "--cut-over", "--target-dir", restored.directory.to_str().unwrap()];
    scene.walden().try_run(&words).expect_code(1);
}

/// Its owner stops and starts it as any server, while half of it is in the store.
#[test]
fn a_server_that_is_stopped_while_it_is_unfinished_starts_again_on_the_mount() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Root);
    let scene = scene();
    let restored = scene.place("restored");
    let mut beside = restored.begin_beside(&["--hydrate-rate", "2MiB"]);
    restored.wait_until_writable(&mut beside);
    restored.sql("create table own as select n from generate_series(1, 1000) n");
    let supervisor = restored.supervisor();
    restored.stop();
    assert!(!restored.mounts().is_empty(), "without its mount it cannot be started");
    restored.start();
    wait_until_writable(&restored);
    assert_eq!(restored.sql("select count(*) from own"), "1000");
    assert_eq!(restored.supervisor(), supervisor, "a server that somebody else started is recognised");
    restored.sql("insert into own values (0)");
    let own = restored.postmaster();
    assert_eq!(word(&beside.report(), "state"), "plain");
    assert_eq!(restored.postmaster(), own, "the server of its owner is not fought");
    assert_eq!(restored.sql("select count(*) from own"), "1001");
    restored.pg_ctl(&["-w", "-m", "fast", "restart", "-l", "/dev/null"]).expect_success();
    wait_until_writable(&restored);
    assert_eq!(restored.sql("select count(*) from own"), "1001");
    restored.stop();
    restored.assert_plain();
    restored.assert_starts_natively();
    restored.stop();
}
