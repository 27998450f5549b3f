//! Every recovery target and action, timelines and holes: one busy cluster, one basebackup, many restores.

use std::fs;
use std::path::{Path, PathBuf};

use crate::source::{Source, wait_until_writable};
use crate::support::{Need, Options, Server, Stop, require, wait_for};

/// Rows 1 to 5 of table `marks`, each in a transaction of its own, with a target after most of them.
struct Marks {
    source: Source,
    /// After row 1.
    lsn: String,
    /// That of row 2.
    transaction: String,
    /// After row 4.
    time: String,
    /// Before the basebackup.
    before: String,
}

impl Marks {
    fn make() -> Self {
        let source = Source::start(Options::default().initdb("--wal-segsize=1"));
        let before = source.sql("select clock_timestamp(); select pg_sleep(0.01)").trim().to_owned();
        source.sql("create table marks (n int)");
        source.backup();
        source.sql("insert into marks values (1)");
        let lsn = source.sql("select pg_current_wal_insert_lsn()");
        let transaction =
            source.sql("begin; insert into marks values (2); select pg_current_xact_id(); commit");
        source.sql("insert into marks values (3)");
        source.sql("select pg_create_restore_point('three')");
        source.sql("insert into marks values (4)");
        let time = source.sql("select pg_sleep(0.01); select clock_timestamp(); select pg_sleep(0.01)");
        source.sql("insert into marks values (5)");
        source.archive_wal();
        Self { source, lsn, transaction, time: time.trim().to_owned(), before }
    }
}

fn rows(server: &Server) -> String {
    server.sql("select coalesce(string_agg(n::text, '' order by n), '') from marks")
}

#[test]
fn a_restore_stops_at_its_target_and_does_what_was_asked() {
    require!(Need::PostgreSQL(15));
    let marks = Marks::make();
    for (name, options, expected) in [
        ("immediate", vec!["--target", "immediate"], ""),
        ("lsn", vec!["--target-lsn", &marks.lsn], "1"),
        ("xid", vec!["--target-xid", &marks.transaction], "12"),
        ("before-xid", vec!["--target-xid", &marks.transaction, "--target-exclusive"], "1"),
        ("name", vec!["--target-name", "three"], "123"),
        ("time", vec!["--target-time", &marks.time], "1234"),
    ] {
        let promoted = [&options[..], &["--target-action", "promote"]].concat();
        let server = marks.source.recovered(name, &promoted);
        assert_eq!(rows(&server), expected, "{name}");
        server.sql("insert into marks values (9)");
    }
    // Without an action it waits, readable, and goes on when told.
    marks.source.restore("waits", &["--target-name", "three"]);
    let mut server = marks.source.server("waits");
    server.start();
    wait_for("the pause", || {
        (server.sql("select pg_get_wal_replay_pause_state()") == "paused").then_some(())
    });
    assert_eq!(rows(&server), "123");
    server.sql("select pg_wal_replay_resume()");
    wait_until_writable(&server);
    assert_eq!(rows(&server), "123");
    drop(server);
    // A server that has shut down at its target shows it when it is told to go on from there.
    marks.source.restore("stops", &["--target-lsn", &marks.lsn, "--target-action", "shutdown"]);
    let mut server = marks.source.server("stops");
    server.spawn();
    let (_, log) = server.wait();
    assert!(log.contains("shutdown at recovery target"), "{log}");
}

/// Failure 26.
#[test]
fn targets_that_cannot_be_reached_are_refused_and_the_window_is_shown() {
    require!(Need::PostgreSQL(15));
    let marks = Marks::make();
    let refused = |options: &[&str], why: &str| {
        let directory = marks.source.place("refused");
        let command = ["restore", "--target-dir", directory.to_str().unwrap()];
        let run = marks.source.walden.try_run(&[&command[..], options].concat()).expect_code(1);
        assert!(run.stderr.contains(why), "no \"{why}\" in:\n{}", run.stderr);
        assert!(run.stderr.contains("hint: "), "{}", run.stderr);
        assert!(!directory.exists(), "something was written");
    };
    refused(&["--target-time", &marks.before], "no basebackup ended before");
    refused(&["latest", "--target-time", &marks.before], "is before the end of basebackup");
    refused(&["--target-time", "2099-01-01 00:00:00Z"], "the archive ends before");
    refused(&["--target-lsn", "FF/0"], "can end from");
    refused(&["--target-timeline", "7"], "timeline 7");
    let directory = marks.source.place("refused");
    let words = ["restore", "--target-dir", directory.to_str().unwrap(), "--target-time", "13am"];
    marks.source.walden.try_run(&words).expect_code(2);
}

/// Onto the new timeline, then to a moment of the old one.
#[test]
fn a_restore_follows_the_timeline_that_is_named() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    source.sql("create table marks (n int)");
    source.backup();
    source.sql("insert into marks values (1)");
    let lsn = source.sql("select pg_current_wal_insert_lsn()");
    source.sql("insert into marks values (2)");
    source.archive_wal();
    // It archives as its source did, and so brings timeline 2 into the archive.
    source.restore("second", &["--target-lsn", &lsn, "--target-action", "promote"]);
    let mut second = Server::new(15, &source.place("second"), &source.scratch().folder("run"));
    second.start();
    wait_until_writable(&second);
    second.sql("insert into marks values (3)");
    second.archive_wal();
    second.stop(Stop::Fast);

    let report = source.restore("newest", &["--dry-run"]);
    assert_eq!(report["timeline"], 2);
    assert!(!source.place("newest").exists());
    assert_eq!(rows(&source.recovered("newest", &[])), "13");
    assert_eq!(rows(&source.recovered("oldest", &["--target-timeline", "1"])), "12");
}

#[test]
fn recovery_ends_before_a_hole_only_where_that_is_said() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default().initdb("--wal-segsize=1"));
    source.sql("create table marks (n int)");
    source.backup();
    source.sql("insert into marks values (1)");
    source.archive_wal();
    source.sql("insert into marks values (2)");
    let lost = source.archive_wal();
    source.sql("insert into marks values (3)");
    source.archive_wal();
    fs::remove_file(find(&source.walden.repository(), &lost).unwrap()).unwrap();

    let directory = source.place("hole");
    let command = ["restore", "--target-dir", directory.to_str().unwrap()];
    let run = source.walden.try_run(&command).expect_code(1);
    assert!(run.stderr.contains(&lost) && run.stderr.contains("--until-hole"), "{}", run.stderr);
    assert!(!directory.exists());
    let report = source.restore("hole", &["--until-hole"]);
    assert!(report["warnings"][0].as_str().unwrap().contains(&lost), "{report}");
    let mut server = source.server("hole");
    server.start();
    wait_until_writable(&server);
    assert_eq!(rows(&server), "1");
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    fs::read_dir(folder).ok()?.flatten().find_map(|entry| {
        let path = entry.path();
        if path.is_dir() { find(&path, name) } else { (entry.file_name() == name).then_some(path) }
    })
}
