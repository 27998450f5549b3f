//! A store that takes requests and answers none, for a while: what is local goes on under load, without a request; what is
//! not is an error after the deadline, a stop comes to its end, and everything goes on when the store is back.
//!
//! `store_away` has the same of a store that refuses. Here each request hangs until its own time is over.

use std::fs;
use std::thread;

use crate::site::{Clone, Source};
use crate::support::{
    Acknowledged, Fault, Need, Options, Proxy, S3, Site, Sql, Walden, Writers, require, s3_storage, wait_for,
};

/// A source whose clones reach their store over a line.
struct Scene {
    walden: Walden,
    line: Proxy,
    // There as long as the line leads to it.
    _store: S3,
    _source: Source,
}

const COLD: &str = "select count(*), sum(n) from cold";
const COLD_ROWS: &str = "200000|20000100000";

impl Scene {
    fn new() -> Self {
        let source = Source::start(Options::default());
        Writers::prepare(&source, 1);
        for table in ["cold", "colder"] {
            source.sql(&format!(
                "create table {table} as select n, md5(n::text) from generate_series(1, 200000) n"
            ));
        }
        // Nothing but what a test does is to read.
        source.sql("alter system set autovacuum = off");
        source.sql("create role before");
        source.sql("vacuum");
        source.sql("checkpoint");
        source.backup_at_rest();
        source.sql("insert into breathing values (0, md5('0'))");
        source.archive_wal();
        let store = S3::over(&source.walden.repository());
        let line = Proxy::to(&store.endpoint());
        let impatient = s3_storage(&line.endpoint()) + "retry = \"2s\"\ntimeout = \"1s\"\n";
        let described = Site::of(&source, source.data_directory())
            .bin_directory(&source.bin_directory())
            .storage(&impatient);
        source.walden.reconfigure(source.scratch(), &described);
        Self { walden: source.walden.as_root(), line, _store: store, _source: source }
    }

    fn clone(&self, name: &str, options: &[&str]) -> Clone {
        Clone::create(&self.walden, name, options)
    }
}

fn log(clone: &Clone, name: &str) -> String {
    fs::read_to_string(clone.folder().join(name)).unwrap_or_default()
}

fn waits(clone: &Clone) -> usize {
    log(clone, "mount.log").lines().filter(|line| line.contains("waiting for the store")).count()
}

#[test]
fn a_store_that_is_silent_for_a_while_loses_nothing_and_keeps_nobody() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new();
    let clone = scene.clone("silent", &["--no-hydrate"]);
    let mut acknowledged = Acknowledged::default();
    // What the load touches has come by then.
    let load = Writers::start(&clone, 1, &acknowledged);
    load.wait_for_commits(100);
    acknowledged = load.finish();
    // Of the catalogs that these statements go through nothing is missing the second time.
    let shared =
        "select txid_status('3'::bigint); select count(*) from commits; alter role before connection limit 7;
                  begin; savepoint a; insert into commits values (9, 1); rollback; checkpoint";
    clone.sql(shared);

    scene.line.inject_only(Fault::Silence);
    scene.line.take_requests();
    // Old transactions and new ones, roles, a checkpoint: what is read in critical sections is local, never asked for.
    clone.sql(shared);
    assert_eq!(scene.line.take_requests(), [] as [String; 0], "the store was asked");
    let missed = clone.try_sql(COLD).unwrap_err();
    assert!(missed.contains("Input/output error"), "{missed}");
    assert!(!scene.line.take_requests().is_empty());
    assert!(clone.answers());
    scene.line.heal();
    assert_eq!(clone.sql(COLD), COLD_ROWS);

    scene.line.inject_only(Fault::Silence);
    let (waited, colder) = (waits(&clone), Sql::clone(&clone));
    let reader = thread::spawn(move || colder.try_sql("select sum(n) from colder"));
    wait_for("a reader to wait for a page", || (waits(&clone) > waited).then_some(()));
    clone.run("stop");
    assert!(reader.join().unwrap().is_err());
    assert_eq!(clone.state(), "stopped");
    let said = log(&clone, "server.log");
    assert!(
        said.contains("received fast shutdown request") && !said.contains("immediate shutdown"),
        "{said}"
    );
    assert!(said.trim_end().ends_with("database system is shut down"), "{said}");
    assert!(!said.contains("PANIC"), "{said}");
    // Opening needs the store: that is told, and leaves nothing.
    let refused = clone.walden.try_run(&["clone", "start", &clone.name]);
    assert!(!refused.success() && refused.stderr.contains(&scene.line.endpoint()), "{}", refused.stderr);
    crate::terminated::assert_ended(&clone);

    scene.line.heal();
    clone.run("start");
    acknowledged.assert_hold(&clone);
    acknowledged.assert_rest(&clone);
    assert_eq!(clone.sql("select sum(n) from colder"), "20000100000");
    clone.run("delete");
}

#[test]
fn a_recovery_that_meets_a_silent_store_waits_and_so_does_hydration_under_load() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let scene = Scene::new();
    let clone = scene.clone("waits", &["--no-start", "--hydrate-rate", "1MiB"]);
    // The archive alone: what is needed before there is a recovery comes.
    scene.line.inject("", "/clusters/", usize::MAX, Fault::Silence);
    let mut starting = clone.walden.start(&["clone", "start", &clone.name]);
    wait_for("recovery to wait for the archive", || (waits(&clone) > 0).then_some(()));
    assert_eq!(clone.state(), "recovering");
    scene.line.heal();
    let status = wait_for("the clone to be started", || starting.process.try_wait().unwrap());
    assert!(status.success(), "{status}");
    assert_eq!(clone.sql("select count(*) from breathing where n = 0"), "1");

    let mut acknowledged = Acknowledged::default();
    Writers::warm(&clone);
    let load = Writers::start(&clone, 1, &acknowledged);
    load.wait_for_commits(100);
    scene.line.inject_only(Fault::Silence);
    let hydration = || clone.status()["hydration"].clone();
    wait_for("hydration to miss the store", || {
        let told = hydration();
        assert_ne!(told["state"], "done", "it ended before the store went away: {told}");
        told["reason"].as_str().is_some_and(|why| why.contains("the store does not answer")).then_some(())
    });
    // Sessions that have what they need go on all the while.
    let before = load.commits();
    load.wait_for_commits(before + 100);
    scene.line.heal();
    acknowledged = load.end();
    clone.run("stop");
    clone.walden.run(&["clone", "start", &clone.name, "--hydrate-rate", "none"]);
    acknowledged.assert_hold(&clone);
    wait_for("everything to be local", || (hydration()["state"] == "done").then_some(()));
    assert_eq!(clone.sql(COLD), COLD_ROWS);
    clone.amcheck();
    clone.run("delete");
}
