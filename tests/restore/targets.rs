//! Every recovery target and action, timelines and holes: one busy cluster, one basebackup, many restores.

use std::fs;
use std::path::{Path, PathBuf};

use crate::source::{Source, wait_until_writable};
use crate::support::{Need, Options, Server, Stop, require, wait_for};

/// Rows 1 to 5 of table `marks`, each in a transaction of its own, and targets among them.
struct Marks {
    source: Source,
    /// That of row 2.
    transaction: String,
    /// Where row 2 is committed.
    lsn: String,
    /// When row 4 was committed, to the microsecond.
    time: String,
    /// Before the basebackup.
    before: String,
}

impl Marks {
    fn make() -> Self {
        let options = Options::default().initdb("--wal-segsize=1").setting("track_commit_timestamp", "on");
        let source = Source::start(options);
        let before = source.sql("select clock_timestamp(); select pg_sleep(0.01)").trim().to_owned();
        source.sql("create table marks (n int)");
        source.backup();
        source.sql("insert into marks values (1)");
        // The next record is the commit's.
        let second = source.sql(
            "begin; insert into marks values (2); \
             select pg_current_xact_id() || ' ' || pg_current_wal_insert_lsn(); commit",
        );
        let (transaction, lsn) = second.trim().split_once(' ').unwrap();
        source.sql("insert into marks values (3)");
        source.sql("select pg_create_restore_point('three')");
        source.sql("insert into marks values (4)");
        let time = source.sql("select pg_xact_commit_timestamp(xmin) from marks where n = 4");
        source.sql("insert into marks values (5)");
        source.archive_wal();
        Self { source, transaction: transaction.to_owned(), lsn: lsn.to_owned(), time, before }
    }
}

fn rows(server: &Server) -> String {
    server.sql("select coalesce(string_agg(n::text, '' order by n), '') from marks")
}

/// A restore and the rows it ends with.
struct Case {
    name: String,
    options: Vec<String>,
    action: &'static str,
    rows: &'static str,
    /// Without a target there is nothing to stop at: recovery ends and the server takes writes.
    has_target: bool,
}

const ACTIONS: [&str; 3] = ["pause", "promote", "shutdown"];
/// Restores under way at once: much of one is waiting.
const LANES: usize = 2;

fn cases(marks: &Marks) -> Vec<Case> {
    let targets: [(&str, &[&str], &'static str); 9] = [
        ("end", &[], "12345"),
        ("immediate", &["--target", "immediate"], ""),
        ("lsn", &["--target-lsn", &marks.lsn], "12"),
        ("before-lsn", &["--target-lsn", &marks.lsn, "--target-exclusive"], "1"),
        ("xid", &["--target-xid", &marks.transaction], "12"),
        ("before-xid", &["--target-xid", &marks.transaction, "--target-exclusive"], "1"),
        ("time", &["--target-time", &marks.time], "1234"),
        ("before-time", &["--target-time", &marks.time, "--target-exclusive"], "123"),
        ("name", &["--target-name", "three"], "123"),
    ];
    let mut cases = Vec::new();
    for (name, options, rows) in targets {
        let has_target = !options.is_empty();
        for action in ACTIONS {
            let options = options.iter().copied().chain(["--target-action", action]).map(str::to_owned);
            let name = format!("{name}-{action}");
            cases.push(Case { name, options: options.collect(), action, rows, has_target });
        }
    }
    cases
}

fn wait_until_paused(server: &Server) {
    wait_for("the pause", || {
        let state = server.try_sql("select pg_get_wal_replay_pause_state()");
        (state.ok()? == "paused").then_some(())
    });
}

/// On the next timeline, taking writes.
#[track_caller]
fn assert_promoted(server: &Server, rows_expected: &str, case: &str) {
    wait_until_writable(server);
    assert_eq!(rows(server), rows_expected, "{case}");
    let segment = server.sql("select pg_walfile_name(pg_current_wal_lsn())");
    assert!(segment.starts_with("00000002"), "{case}: {segment}");
    server.sql("insert into marks values (9)");
}

impl Case {
    fn check(&self, source: &Source) {
        let Self { name, rows: expected, .. } = self;
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        let report = source.restore(name, &options);
        let action = if self.has_target { self.action } else { "promote" };
        assert_eq!(report["target_action"].as_str(), self.has_target.then_some(action), "{name}: {report}");
        let mut server = source.server(name);
        match action {
            "promote" => {
                server.start();
                assert_promoted(&server, expected, name);
            }
            "pause" => {
                server.start();
                wait_until_paused(&server);
                assert_eq!(rows(&server), *expected, "{name}");
                assert!(server.try_sql("insert into marks values (9)").is_err(), "{name} takes writes");
                server.sql("select pg_wal_replay_resume()");
                assert_promoted(&server, expected, name);
            }
            _ => {
                server.spawn();
                let (code, log) = server.wait();
                assert_eq!(code, Some(0), "{name}: {log}");
                assert!(log.contains("shutdown at recovery target"), "{name}: {log}");
                // It would shut down again; told otherwise it shows where it stands.
                server.set("recovery_target_action", "pause").start();
                wait_until_paused(&server);
                assert_eq!(rows(&server), *expected, "{name}");
            }
        }
        drop(server);
        std::fs::remove_dir_all(source.place(name)).unwrap();
    }
}

/// Every target with every action, ending just before it and just after it where that is something else.
#[test]
fn a_restore_stops_at_its_target_and_does_what_was_asked() {
    require!(Need::PostgreSQL(15));
    let marks = Marks::make();
    let cases = cases(&marks);
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let (cases, source) = (&cases, &marks.source);
            scope.spawn(move || cases.iter().skip(lane).step_by(LANES).for_each(|case| case.check(source)));
        }
    });

    // Without an action it waits, and a target that is taken away is none.
    let report = marks.source.restore("default", &["--target-xid", &marks.transaction]);
    assert_eq!(report["target_action"], "pause");
    let mut server = marks.source.server("default");
    server.start();
    wait_until_paused(&server);
    server.stop(Stop::Fast);
    server.set("recovery_target_xid", "").start();
    assert_promoted(&server, "12345", "default");
}

/// The server that wrote the WAL was started anew with larger limits after the basebackup: its configuration there has
/// the old ones, with which replay stops.
#[test]
fn a_target_behind_raised_limits_is_reached_whatever_the_action() {
    require!(Need::PostgreSQL(15));
    let options = Options::default().initdb("--wal-segsize=1").setting("max_prepared_transactions", "2");
    let mut source = Source::start(options);
    source.sql("create table marks (n int)");
    source.backup();
    source.sql("insert into marks values (1)");
    source.sql("select pg_create_restore_point('before')");
    source.sql("alter system set max_prepared_transactions = 30");
    source.sql("alter system set max_connections = 60");
    source.cluster.restart();
    for n in 0..10 {
        source.sql(&format!("begin; insert into marks values ({n}); prepare transaction 'p{n}'"));
    }
    source.sql("insert into marks values (2)");
    source.sql("select pg_create_restore_point('behind')");
    source.sql("insert into marks values (3)");
    source.archive_wal();
    let raised = |report: &serde_json::Value| {
        let settings = report["settings"].as_array().unwrap();
        let limits = settings.iter().filter(|setting| setting["name"].as_str().unwrap().starts_with("max_"));
        limits.map(|limit| format!("{} {}", limit["name"], limit["value"])).collect::<Vec<_>>().join(", ")
    };
    let before = source.restore("before", &["--target-name", "before", "--dry-run"]);
    assert_eq!(raised(&before), "");
    let expected = r#""max_connections" "60", "max_prepared_transactions" "30""#;
    let to = ["--target-name", "behind", "--target-action"];
    for (action, rows_expected) in [("pause", "12"), ("shutdown", "12"), ("promote", "12"), ("end", "123")] {
        let options = if action == "end" { vec![] } else { [&to[..], &[action]].concat() };
        assert_eq!(raised(&source.restore(action, &options)), expected, "{action}");
        let mut server = source.server(action);
        match action {
            "shutdown" => {
                server.spawn();
                let (code, log) = server.wait();
                assert_eq!(code, Some(0), "{log}");
                assert!(log.contains("shutdown at recovery target"), "{log}");
                continue;
            }
            _ => server.start(),
        }
        if action == "pause" {
            wait_until_paused(&server);
            assert_eq!(rows(&server), rows_expected, "{action}");
            server.sql("select pg_wal_replay_resume()");
        }
        assert_promoted(&server, rows_expected, action);
        assert_eq!(server.sql("select count(*) from pg_prepared_xacts"), "10", "{action}");
        server.sql("commit prepared 'p7'");
    }
}

/// Failure 26.
#[test]
fn targets_that_cannot_be_reached_are_refused_and_the_window_is_shown() {
    require!(Need::PostgreSQL(15));
    let marks = Marks::make();
    let id = marks.source.walden.json(&["list"])["basebackups"][0]["id"].as_str().unwrap().to_owned();
    let refused = |options: &[&str], why: &str, window: &str| {
        let directory = marks.source.place("refused");
        let command = ["restore", "--target-dir", directory.to_str().unwrap()];
        let run = marks.source.walden.try_run(&[&command[..], options].concat()).expect_code(1);
        for words in [why, window, "hint: "] {
            assert!(run.stderr.contains(words), "{options:?}: no \"{words}\" in:\n{}", run.stderr);
        }
        assert!(!directory.exists(), "{options:?}: something was written");
    };
    let window = format!(": recovery from basebackup {id} on timeline 1 can end from ");
    refused(&["--target-time", &marks.before], "no basebackup ended before", &window);
    refused(&["latest", "--target-time", &marks.before], "is before the end of basebackup", &window);
    refused(&["--target-time", "2099-01-01 00:00:00Z"], "the archive ends before", &window);
    refused(&["--target-lsn", "FF/0"], "the archive ends before", &window);
    refused(&["--target-timeline", "7"], "lies on the way to timeline 7", &window);
    refused(&["latest", "--target-timeline", "7"], "timeline 7 does not contain basebackup", &window);
    refused(&["--target-name", "nowhere"], "is not in the archived WAL", &window);
    refused(&["--target-xid", "4000000000"], "is not in the archived WAL", &window);
    let lost = marks.source.archive_wal();
    marks.source.archive_wal();
    fs::remove_file(find(&marks.source.walden.repository(), &lost).unwrap()).unwrap();
    refused(&[], &format!("WAL segment {lost} is missing from the archive on the way to"), &window);
    let start = marks.source.walden.json(&["info"])["clusters"][0]["basebackups"][0]["start_lsn"].clone();
    let needed = marks.source.sql(&format!("select pg_walfile_name('{}')", start.as_str().unwrap()));
    fs::remove_file(find(&marks.source.walden.repository(), &needed).unwrap()).unwrap();
    let nothing = format!("basebackup {id} cannot be recovered to any target on timeline 1");
    refused(&[], &format!("WAL segment {needed} is missing from the archive"), &nothing);
    refused(&["--target-lsn", "0/10"], "no basebackup ended before", &nothing);
    let directory = marks.source.place("refused");
    let words = ["restore", "--target-dir", directory.to_str().unwrap(), "--target-time", "13am"];
    marks.source.walden.try_run(&words).expect_code(2);
}

/// The day after: the newest basebackup lies behind the restore point.
#[test]
fn a_restore_point_is_reached_from_the_basebackup_before_it() {
    require!(Need::PostgreSQL(15));
    let marks = Marks::make();
    let newest = marks.source.backup();
    marks.source.sql("insert into marks values (6)");
    marks.source.archive_wal();
    let report = marks.source.restore("shown", &["--target-name", "three", "--dry-run"]);
    assert_ne!(report["basebackup"], newest.as_str());
    for (name, options, expected) in
        [("name", ["--target-name", "three"], "123"), ("xid", ["--target-xid", &marks.transaction], "12")]
    {
        let promoted = [&options[..], &["--target-action", "promote"]].concat();
        assert_eq!(rows(&marks.source.recovered(name, &promoted)), expected, "{name}");
    }
    let place = marks.source.place("late");
    let named =
        ["restore", newest.as_str(), "--target-dir", place.to_str().unwrap(), "--target-name", "three"];
    let run = marks.source.walden.try_run(&named).expect_code(1);
    assert!(run.stderr.contains("is not in the archived WAL"), "{}", run.stderr);
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

    // Without its history nobody knows where timeline 2 belongs, and none is taken for the newest.
    fs::remove_file(find(&source.walden.repository(), "00000002.history").unwrap()).unwrap();
    let directory = source.place("unknown");
    let run = source.walden.try_run(&["restore", "--target-dir", directory.to_str().unwrap()]).expect_code(1);
    assert!(
        run.stderr.contains("the history file of timeline 2 is missing from the archive: "),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains(" on timeline 1 can end from "), "{}", run.stderr);
    assert!(!directory.exists(), "something was written");
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
    assert!(run.stderr.contains(" on timeline 1 can end from "), "{}", run.stderr);
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
