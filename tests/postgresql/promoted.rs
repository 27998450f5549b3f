//! Incremental basebackups of 17 and later where the server is, or was, a standby: what has changed is in its summaries,
//! also across the timeline that its promotion began.
//!
//! The last basebackup was taken of the primary, whose files have other inodes: where the summaries are not asked, all
//! of the promoted server is read, or sent. What comes back is looked at by the index alone, which believes the
//! visibility map, and by the table alone.

use std::process::Command;

use serde_json::Value;

use crate::backup::{Opened, id_of, recover};
use crate::by_replication::{archiving, site};
use crate::received_changes::{came_in_parts, number};
use crate::support::{
    Checksums, Cluster, Need, Options, Run, Scratch, Server, Site, Sql, Stop, Walden, require, wait_for,
};

/// How the files of the server are got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From its data directory, with its summaries as hints.
    Directory,
    /// From itself, which is told of the last basebackup by `UPLOAD_MANIFEST`.
    Server,
}

impl Way {
    fn site(self, server: &Server) -> Site {
        match self {
            Self::Directory => Site::of(server, server.data_directory()).unencrypted(),
            Self::Server => site(server),
        }
    }
}

const TABLES: &str = "
    create table t as select n, repeat('x', 100) as s from generate_series(1, 40000) n;
    create index on t (n);
    create table still as select n, md5(n::text) as s from generate_series(1, 300000) n;
    create table shrinks as select n, repeat('x', 500) as s from generate_series(1, 8000) n;
    create table gone as select generate_series(1, 20000) n;
    vacuum freeze;";

/// A cluster of which nothing changes but what the test changes.
fn summarizing(major: u32) -> Cluster {
    let options = Options::default().setting("summarize_wal", "on").setting("autovacuum", "off");
    let cluster = Cluster::start_with(major, options);
    cluster.sql(TABLES);
    cluster
}

/// Copies a cluster while it stands still, and starts the copy as its standby.
fn standby_of(cluster: &mut Cluster) -> Server {
    let data = cluster.scratch().path().join("standby");
    cluster.stop(Stop::Fast);
    Run::of(Command::new("cp").arg("-a").args([cluster.data_directory(), &data]), "").expect_success();
    cluster.start();
    cluster.scratch().file("standby/standby.signal", "");
    let mut standby = Server::new(cluster.major(), &data, &cluster.scratch().folder("run-standby"));
    standby.set("primary_conninfo", &cluster.connection());
    standby.start();
    standby
}

/// Changes pages, cuts a file and lets it grow again, and clears bits of a visibility map, which no summary names.
fn change(sql: &Sql, round: u32) {
    sql.sql(&format!(
        "update t set s = 'y' where n % 1000 = {round};
         delete from t where n % 1000 = 500 + {round};
         delete from shrinks where n > 4000 - {round} * 500;
         vacuum (truncate) shrinks;
         insert into shrinks select n, 'round {round}' from generate_series(1, 10000) n;
         create table made{round} as select n, md5(n::text) from generate_series(1, 10000) n;
         drop table if exists gone"
    ));
}

/// What is in the table by its index and the visibility map, and by the table.
fn by_either_scan(sql: &Sql) -> [String; 2] {
    let query = "select count(n) || ' ' || sum(n) from t where n > 0";
    let by = |settings: &str, plan: &str| {
        let settings = format!("{settings}; set enable_bitmapscan = off; ");
        let explained = sql.sql(&format!("{settings} explain (costs off) {query}"));
        assert!(explained.contains(plan), "{explained}");
        sql.sql(&format!("{settings} {query}"))
    };
    [
        by("set enable_seqscan = off", "Index Only Scan"),
        by("set enable_indexscan = off; set enable_indexonlyscan = off", "Seq Scan"),
    ]
}

/// Restores a basebackup, recovers it and compares it with its source, which stands still and has archived all it has.
fn assert_equals(source: &Server, scratch: &Scratch, walden: &Walden, outcome: &Value, name: &str) {
    let opened = Opened::open(&walden.repository(), id_of(outcome));
    let data = opened.restore(scratch, name);
    let copy = recover(walden, source.major(), &data, &scratch.folder(&format!("run-{name}")));
    let [by_index, by_table] = by_either_scan(&copy);
    assert_eq!(by_index, by_table, "{name}: the index finds other rows than are there");
    assert_eq!([by_index, by_table], by_either_scan(source), "{name}");
    Checksums::of(source).assert_same(&Checksums::of(&copy));
}

fn a_server_that_was_promoted_says_what_has_changed(major: u32, way: Way) {
    require!(Need::PostgreSQL(major));
    let mut cluster = summarizing(major);
    let walden = Walden::configure(cluster.scratch(), &way.site(&cluster));
    cluster.set_archive_command(&walden.archive_command());
    let mut standby = standby_of(&mut cluster);
    let full = walden.json(&["backup"]);
    assert_eq!((&full["timeline"], &full["parent"]), (&1.into(), &Value::Null), "{full}");

    change(&cluster, 1);
    // The standby gets all of it before the primary ends.
    cluster.stop(Stop::Fast);
    standby.sql("select pg_promote()");
    wait_for("the promotion", || (standby.sql("select pg_is_in_recovery()") == "f").then_some(()));
    change(&standby, 2);
    // The second timeline's come behind all of the first one's.
    wait_for("summaries of the second timeline", || {
        standby.sql("checkpoint");
        let count = standby.sql("select count(*) from pg_available_wal_summaries() where tli = 2");
        (count != "0").then_some(())
    });
    walden.reconfigure(cluster.scratch(), &way.site(&standby));
    let run = walden.run(&["-v", "--output", "json", "backup"]);
    let second: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&second["timeline"], &second["parent"]), (&2.into(), &full["id"]), "{second}");
    match way {
        Way::Server => assert!(came_in_parts(&second), "{second}\n{}", run.stderr),
        Way::Directory => {
            let read = number(&second, "read_bytes");
            assert!(read * 2 < number(&second, "database_bytes"), "{second}\n{}", run.stderr);
            assert!(number(&second, "unread_files") * 2 > number(&second, "files"), "{second}");
        }
    }
    standby.archive_wal();
    assert_equals(&standby, cluster.scratch(), &walden, &second, "second");

    // And on, within the new timeline.
    change(&standby, 3);
    let third = walden.json(&["backup"]);
    assert_eq!(third["parent"], second["id"], "{third}");
    if way == Way::Server {
        assert!(came_in_parts(&third), "{third}");
    }
    standby.archive_wal();
    assert_equals(&standby, cluster.scratch(), &walden, &third, "third");
    standby.stop(Stop::Fast);
}

#[test]
fn of_17_that_was_promoted_the_data_directory_is_read_where_either_timeline_has_changed_it() {
    a_server_that_was_promoted_says_what_has_changed(17, Way::Directory);
}

#[test]
fn of_18_that_was_promoted_the_data_directory_is_read_where_either_timeline_has_changed_it() {
    a_server_that_was_promoted_says_what_has_changed(18, Way::Directory);
}

#[test]
fn of_17_that_was_promoted_only_what_has_changed_on_either_timeline_comes() {
    a_server_that_was_promoted_says_what_has_changed(17, Way::Server);
}

#[test]
fn of_18_that_was_promoted_only_what_has_changed_on_either_timeline_comes() {
    a_server_that_was_promoted_says_what_has_changed(18, Way::Server);
}

/// A standby begins where it last could have restarted, long before what its files hold by then.
#[test]
fn of_a_standby_of_18_only_what_has_changed_comes_three_times_over() {
    require!(Need::PostgreSQL(18));
    let mut cluster = summarizing(18);
    let walden = archiving(&cluster);
    let mut standby = standby_of(&mut cluster);
    let scratch = Scratch::new();
    let (of_cluster, of_standby) = (cluster.connection(), standby.connection());
    // The standby is preferred, and the primary ends the segment that it stops in.
    let nodes = site(&cluster).nodes(&[(&of_cluster, "standby"), (&of_standby, "standby")]);
    let from_standby = Walden::configure(&scratch, &nodes.storage(&walden.storage()));
    let mut taken: Vec<Value> = Vec::new();
    for round in 1..=3 {
        change(&cluster, round);
        cluster.sql("checkpoint");
        // What is flushed of this by the standby is nothing it could restart from yet.
        cluster.sql(&format!("update t set s = 'z' where n % 1000 = 100 + {round}"));
        let lsn = cluster.sql("select pg_current_wal_lsn()");
        wait_for("the standby to come behind", || {
            let replayed = format!("select pg_last_wal_replay_lsn() >= '{lsn}'");
            (standby.sql(&replayed) == "t").then_some(())
        });
        // So that the next one does not begin where the last one did.
        standby.sql("checkpoint");
        let run = from_standby.run(&["-v", "--output", "json", "backup", "--wal-timeout", "60"]);
        let from = format!("from socket \"{}", standby.host.display());
        assert!(run.stderr.contains(&from), "{}", run.stderr);
        let outcome: Value = serde_json::from_str(&run.stdout).unwrap();
        if let Some(before) = taken.last() {
            assert_eq!(outcome["parent"], before["id"], "{outcome}");
            assert!(came_in_parts(&outcome), "{outcome}\n{}", run.stderr);
        }
        taken.push(outcome);
    }
    standby.stop(Stop::Fast);
    cluster.archive_wal();
    for (outcome, name) in taken.iter().zip(["first", "second", "third"]) {
        assert_equals(&cluster, cluster.scratch(), &walden, outcome, name);
        let opened = Opened::open(&walden.repository(), id_of(outcome));
        let label = String::from_utf8(opened.file("data/backup_label")).unwrap();
        assert!(label.contains("BACKUP FROM: standby"), "{label}");
    }
}
