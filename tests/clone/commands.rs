//! The commands of a clone's life beside start and stop: promote, restart, reload, reset, duplicate, and several at once.

use std::fs;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::site::{Clone, Source};
use crate::support::{Need, Options, Sql, mounts_below, program, require, wait_for};

/// A source at rest with a thousand rows, one of them after the basebackup.
fn source() -> Source {
    let source = Source::start(Options::default());
    source.sql("create table kept as select n from generate_series(1, 999) n");
    source.backup_at_rest();
    source.sql("insert into kept values (1000)");
    source.sql("select pg_create_restore_point('here')");
    source.archive_wal();
    source
}

const COUNT: &str = "select count(*) from kept";

#[track_caller]
fn states(clone: &Clone, pattern: &str) -> Vec<String> {
    let clones = clone.walden.json(&["clone", "list", pattern])["clones"].clone();
    let text = |clone: &Value, field: &str| clone[field].as_str().unwrap().to_owned();
    let clones = clones.as_array().unwrap().iter();
    clones.map(|clone| format!("{} {}", text(clone, "name"), text(clone, "state"))).collect()
}

#[test]
fn promote_ends_a_recovery_that_waits_and_returns_when_the_clone_takes_writes() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("waits", &["--target-name", "here", "--target-action", "pause"]);
    assert_eq!(clone.state(), "paused");
    // Whoever ends all sessions ends the supervisor's too.
    clone.sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'walden'");
    assert_eq!(clone.state(), "paused");
    let status = clone.walden.json(&["clone", "promote", "waits"]);
    assert_eq!(status["state"], "running", "{status}");
    clone.sql("insert into kept values (1001)");
    let again = clone.walden.try_run(&["clone", "promote", "waits"]).expect_code(1);
    assert!(again.stderr.contains("it is not in recovery"), "{}", again.stderr);
    clone.run("stop");
    let stopped = clone.walden.try_run(&["clone", "promote", "waits"]).expect_code(1);
    assert!(stopped.stderr.contains("hint: \"walden clone start waits\""), "{}", stopped.stderr);
    clone.run("start");
    assert_eq!(clone.sql(COUNT), "1001");
    clone.run("delete");
}

#[test]
fn restart_keeps_the_data_and_reload_reads_the_files_again() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("again", &[]);
    clone.sql("insert into kept values (1001)");
    let [_, postmaster] = clone.processes();
    let status = clone.walden.json(&["clone", "restart", "again"]);
    assert_eq!(status["state"], "running", "{status}");
    assert_ne!(clone.processes()[1], postmaster);
    assert_eq!(clone.sql(COUNT), "1001");

    let file = clone.folder().join("config/postgresql.conf");
    fs::write(&file, fs::read_to_string(&file).unwrap() + "work_mem = '9MB'\n").unwrap();
    assert_ne!(clone.sql("show work_mem"), "9MB");
    clone.run("reload");
    wait_for("the file to be read", || (clone.sql("show work_mem") == "9MB").then_some(()));
    // A session of the supervisor's is in nobody's way.
    clone.sql("create database own");

    clone.run("stop");
    let stopped = clone.walden.try_run(&["clone", "reload", "again"]).expect_code(1);
    assert!(stopped.stderr.contains("is not running"), "{}", stopped.stderr);
    clone.run("restart");
    assert_eq!(clone.sql("show work_mem"), "9MB");
    clone.run("delete");
}

#[test]
fn reset_brings_back_what_the_clone_was_when_it_was_made() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("back", &[]);
    clone.sql("delete from kept; create database own; checkpoint");
    clone.run("reset");
    assert_eq!(clone.sql(COUNT), "1000");
    assert_eq!(clone.sql("select count(*) from pg_database where datname = 'own'"), "0");
    assert_eq!(source.pins(), (1, 0), "the basebackup was held all the while");
    clone.amcheck();

    // One that was killed after its first step is ended by whoever starts the clone.
    clone.sql("delete from kept");
    clone.run("stop");
    fs::write(clone.folder().join("resetting"), "").unwrap();
    fs::remove_dir_all(clone.folder().join("pg_wal")).unwrap();
    clone.run("start");
    assert_eq!(clone.sql(COUNT), "1000");
    assert!(!clone.folder().join("resetting").exists());
    clone.walden.run(&["clone", "reset", "back", "--no-start"]);
    assert_eq!(clone.state(), "stopped");
    clone.run("delete");
}

#[test]
fn a_duplicate_is_a_clone_of_its_own_without_the_changes_of_the_first() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("first", &["--target-name", "here"]);
    // It goes by the plan of the first, whatever the archive has by now.
    source.sql("insert into kept values (-1)");
    source.archive_wal();
    clone.sql("delete from kept where n <= 500");
    let status = clone.walden.json(&["clone", "duplicate", "first", "second"]);
    assert_eq!((&status["name"], &status["state"]), (&"second".into(), &"running".into()));
    let first = clone.status();
    assert_eq!((&status["basebackup"], &status["target"]), (&first["basebackup"], &first["target"]));
    assert_ne!((&status["port"], &status["data_directory"]), (&first["port"], &first["data_directory"]));
    let second = Clone::at(&clone.walden, &status);
    assert_eq!(second.sql(COUNT), "1000");
    second.sql("insert into kept values (1001)");
    assert_eq!(clone.sql(COUNT), "500");
    assert_eq!(source.pins(), (2, 0));
    let taken = clone.walden.try_run(&["clone", "duplicate", "first", "second"]);
    assert!(!taken.success() && taken.stderr.contains("exists already"), "{}", taken.stderr);
    clone.run("delete");
    assert_eq!(second.sql(COUNT), "1001");
    second.run("delete");
    assert_eq!(source.pins(), (2, 2));
}

#[test]
fn a_pattern_means_every_clone_it_matches_and_stop_all_means_all() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let one = source.clone("team-one", &[]);
    source.clone("team-two", &[]);
    source.clone("other", &["--no-start"]);
    one.walden.run(&["clone", "stop", "team-*"]);
    assert_eq!(states(&one, "*"), ["other stopped", "team-one stopped", "team-two stopped"]);
    one.walden.run(&["clone", "start", "team-t??"]);
    assert_eq!(states(&one, "team*"), ["team-one stopped", "team-two running"]);
    let started = one.walden.json(&["clone", "start", "team-*"]);
    assert_eq!(started["clones"].as_array().unwrap().len(), 2, "one that runs is passed over: {started}");
    let text = one.walden.run(&["clone", "status", "team-*"]).stdout;
    assert!(
        text.contains("clone team-one is running") && text.contains("clone team-two is running"),
        "{text}"
    );
    one.walden.run(&["clone", "stop", "--all"]);
    assert!(states(&one, "*").iter().all(|state| state.ends_with(" stopped")));
    for command in ["stop", "start", "status", "list", "restart", "delete"] {
        let run = one.walden.try_run(&["clone", command, "nobody*"]).expect_code(1);
        assert!(run.stderr.contains("matches \"nobody*\""), "{}", run.stderr);
        assert!(run.stderr.contains("hint: \"walden clone list\""), "{}", run.stderr);
    }
    let deleted = one.walden.json(&["clone", "delete", "team-*"]);
    assert_eq!(deleted["deleted"], serde_json::json!(["team-one", "team-two"]));
    assert_eq!(states(&one, "*"), ["other stopped"]);
    one.walden.run(&["clone", "delete", "other"]);
    one.walden.run(&["clone", "stop", "--all"]);
}

/// What it holds stands in its description: without it the basebackup would be held for ever.
#[test]
fn a_clone_whose_description_cannot_be_read_is_not_deleted() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("odd", &["--no-start"]);
    let file = clone.folder().join("clone.json");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replacen('{', "{ \"of_a_later_release\": 1,", 1)).unwrap();
    source.clone("even", &["--no-start"]);
    // Those that can be read are shown, and done with what was asked for.
    let list = clone.walden.try_run(&["clone", "list"]).expect_code(3);
    let shown = |name: &str| list.stdout.lines().any(|line| line.starts_with(name));
    assert!(shown("even ") && !shown("odd "), "{}", list.stdout);
    assert!(list.stderr.contains("1 of 2 clones could not be asked: odd: "), "{}", list.stderr);
    let deleted = clone.walden.try_run(&["clone", "delete", "*"]).expect_code(3);
    assert_eq!(deleted.stdout, "clone even is deleted\n");
    assert!(deleted.stderr.contains("1 of 2 clones could not be deleted: odd: "), "{}", deleted.stderr);
    let refused = clone.walden.try_run(&["clone", "delete", "odd"]).expect_code(3);
    assert!(refused.stderr.contains("which basebackup the clone holds"), "{}", refused.stderr);
    assert!(clone.folder().join("upper").exists());
    assert_eq!(source.pins(), (2, 1));
    fs::write(&file, text.replacen("\"format\": 1", "\"format\": 2", 1)).unwrap();
    let later = clone.walden.try_run(&["clone", "start", "odd"]).expect_code(3);
    assert!(later.stderr.contains("its format is 2"), "{}", later.stderr);
    fs::write(&file, text).unwrap();
    clone.run("delete");
    assert_eq!(source.pins(), (2, 2));
}

/// It has all sessions of 15 and later open their files again, and is not seen by anybody who looks afterwards.
#[test]
fn a_cut_over_leaves_no_database() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("local", &[]);
    // What an attempt that was killed has left, and what is somebody's own.
    clone.sql("create database walden_cutover_0123456789abcdef");
    clone.sql("create database walden_cutover_notes");
    clone.sql("alter system set default_transaction_read_only = on");
    clone.sql("select pg_reload_conf()");
    let whole = clone.folder().join("upper/data/.walden/whole");
    wait_for("the clone to be whole", || whole.exists().then_some(()));
    let left = "select string_agg(datname, ' ') from pg_database where datname like 'walden_cutover_%'";
    wait_for("the cut-over to be over", || (clone.sql(left) == "walden_cutover_notes").then_some(()));
    assert_eq!(clone.sql(COUNT), "1000");
    clone.run("delete");
}

/// A session that does nothing and goes on until it is killed.
fn idle_session(sql: &Sql) -> Child {
    session_of(&sql.connection())
}

fn session_of(connection: &str) -> Child {
    let mut session = Command::new(program("psql").unwrap());
    session.arg(connection).stdin(Stdio::piped()).stdout(Stdio::null());
    session.spawn().unwrap()
}

#[test]
fn a_cut_over_waits_for_who_is_in_template0_and_says_so() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    source.sql("alter database template0 allow_connections true");
    source.sql("select pg_create_restore_point('open')");
    source.archive_wal();
    let clone = source.clone("waits", &["--target-name", "open", "--target-action", "pause"]);
    let mut session = idle_session(&clone.in_database("template0"));
    let there = "select count(*) from pg_stat_activity where datname = 'template0'";
    wait_for("the session to be there", || (clone.sql(there) == "1").then_some(()));
    let whole = clone.folder().join("upper/data/.walden/whole");
    wait_for("the clone to be whole", || whole.exists().then_some(()));
    clone.run("promote");
    let waits_for = || clone.status()["cut_over_waits_for"].as_str().map(str::to_owned);
    let reason = wait_for("the cut-over to wait", waits_for);
    assert!(reason.contains("template0"), "{reason}");
    let text = clone.walden.run(&["clone", "status", "waits"]).stdout;
    assert!(text.contains("  cut-over      waits: "), "{text}");
    session.kill().unwrap();
    session.wait().unwrap();
    wait_for("the cut-over to be over", || waits_for().is_none().then_some(()));
    assert_eq!(clone.sql("select count(*) from pg_database where datname like 'walden%'"), "0");
    clone.run("delete");
}

/// Sessions that opened a file before it was whole would go on the slow way; they are not ended for that.
#[test]
fn a_cut_over_has_sessions_open_their_files_again() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("held", &["--target-name", "here", "--target-action", "pause"]);
    let mut session = Command::new(program("psql").unwrap());
    session.args(["--no-psqlrc", "-c", COUNT, "-c", "select pg_sleep(600)"]).arg(clone.connection());
    session.env("PGAPPNAME", "held").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut session = session.spawn().unwrap();
    let held = "select pid from pg_stat_activity where application_name = 'held' and wait_event = 'PgSleep'";
    let pid = wait_for("the session to have read", || Some(clone.sql(held)).filter(|pid| !pid.is_empty()));
    let path = clone.sql("select pg_relation_filepath('kept')");
    let has_it_open = || {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let mut opened = descriptors.filter_map(|descriptor| fs::read_link(descriptor.path()).ok());
        opened.any(|opened| opened.ends_with(&path))
    };
    let whole = clone.folder().join("upper/data/.walden/whole");
    wait_for("the clone to be whole", || whole.exists().then_some(()));
    assert!(has_it_open(), "nothing can be cut over in a recovery");
    clone.run("promote");
    wait_for("the session to let go of its files", || (!has_it_open()).then_some(()));
    assert_eq!(clone.sql(held), pid, "the session was ended");
    session.kill().unwrap();
    session.wait().unwrap();
    let left = "select count(*) from pg_database where datname like 'walden%'";
    wait_for("the cut-over to be over", || (clone.sql(left) == "0").then_some(()));
    clone.run("delete");
}

/// As if the time that a clone was made for had passed.
fn let_expire(clone: &Clone) {
    let file = clone.folder().join("clone.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert!(spec["expires_at"].is_string(), "{spec}");
    spec["expires_at"] = "2001-01-01T00:00:00Z".into();
    // As the supervisor may look at any moment.
    let new = clone.folder().join("clone.json.new");
    fs::write(&new, spec.to_string()).unwrap();
    fs::rename(new, file).unwrap();
}

#[test]
fn a_clone_that_has_expired_goes_once_nobody_is_connected() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    // Somebody who asks, somebody who follows, and so many that nobody can look who is there.
    let clones = ["asks", "follows", "fills"].map(|name| {
        let clone = source.clone(name, &["--expires", "12h"]);
        assert!(clone.status()["expires_at"].is_string());
        let text = clone.walden.run(&["clone", "status", name]).stdout;
        assert!(text.contains("  expires  "), "{text}");
        let mut sessions = Vec::new();
        if name == "fills" {
            clone.sql("alter system set max_connections = 6");
            clone.run("restart");
            wait_for("all connections to be taken", || match clone.try_sql("select 1") {
                Err(error) if error.contains("too many clients") => Some(()),
                _ => {
                    sessions.push(session_of(&clone.connection()));
                    None
                }
            });
        } else {
            let option = if name == "follows" { "replication=1" } else { "" };
            sessions.push(session_of(&format!("{} {option}", clone.connection())));
            let there = "select count(*) from pg_stat_activity where backend_type = 'walsender' \
                         or application_name = 'psql' and state = 'idle'";
            wait_for("the session to be there", || (clone.sql(there) == "1").then_some(()));
        }
        (clone, sessions)
    });
    clones.iter().for_each(|(clone, _)| let_expire(clone));
    for (clone, mut sessions) in clones {
        let log = clone.folder().join("mount.log");
        wait_for("its end to be put off", || {
            fs::read_to_string(&log).unwrap().contains("when nobody is connected").then_some(())
        });
        for command in ["restart", "reset"] {
            let refused = clone.walden.try_run(&["clone", command, &clone.name]).expect_code(1);
            assert!(refused.stderr.contains("has expired"), "{}", refused.stderr);
        }
        assert_eq!(clone.state(), "running");
        for session in &mut sessions {
            session.kill().unwrap();
            session.wait().unwrap();
        }
        wait_for("the clone to be gone", || (!clone.folder().exists()).then_some(()));
        assert!(mounts_below(&clone.folder()).is_empty());
    }
    assert_eq!(source.pins(), (3, 3));
}

#[test]
fn a_clone_that_has_expired_at_rest_is_deleted_by_the_next_who_looks() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("brief", &["--expires", "1h"]);
    clone.run("stop");
    let_expire(&clone);
    let refused = clone.walden.try_run(&["clone", "start", "brief"]).expect_code(1);
    assert!(refused.stderr.contains("has expired"), "{}", refused.stderr);
    let list = clone.walden.run(&["clone", "list"]);
    assert!(list.stderr.contains("clone \"brief\" has expired and is deleted"), "{}", list.stderr);
    assert!(list.stdout.contains("there is no clone"), "{}", list.stdout);
    assert!(!clone.folder().exists());
    assert_eq!(source.pins(), (1, 1));
    let wrong = source.walden.try_run(&["clone", "create", "other", "--expires", "soon"]).expect_code(2);
    assert!(wrong.stderr.contains("--expires soon"), "{}", wrong.stderr);
}
