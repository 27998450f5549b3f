//! Basebackups by BASE_BACKUP: the data directory is never looked at, as if the server were on another host.
//!
//! What is taken is held against the server's own judge of a backup, and started.

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use serde_json::Value;

use crate::backup::{Opened, id_of, recover, sparse_file, verify_backup};
use crate::support::{
    Account, Chaos, Checksums, Cluster, DebianCluster, Ledger, Need, Options, Pgbench, Run, Scratch, Server,
    Site, Sql, Stop, Walden, require, wait_for,
};

/// A site whose servers send their files; a data directory that is named in vain shows that none is read.
pub fn site(sql: &Sql) -> Site {
    let nowhere = Path::new("/nonexistent/data");
    Site::of(sql, nowhere).unencrypted().key("backup_source = \"replication\"")
}

/// A cluster that archives through walden, and walden.
pub fn archiving(cluster: &Cluster) -> Walden {
    let walden = Walden::configure(cluster.scratch(), &site(cluster));
    cluster.set_archive_command(&walden.archive_command());
    walden
}

fn under_load_it_starts_after_replay(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut cluster = Cluster::start(major);
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    cluster.sql("create unlogged table forgotten as select generate_series(1, 1000) n");
    cluster
        .sql("create table kept tablespace fast as select n, md5(n::text) from generate_series(1, 20000) n");
    cluster.sql("create table empty (n int); create database other tablespace fast");
    if major >= 15 {
        cluster.sql("set allow_in_place_tablespaces = on; create tablespace inside location ''");
        cluster.sql("create table within tablespace inside as select generate_series(1, 5000) n");
    }
    fs::write(cluster.data_directory().join("walden.plan.json"), "{}").unwrap();
    Account::of_postgresql().own(&cluster.data_directory().join("walden.plan.json"));
    let walden = archiving(&cluster);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_churn(2);
    let outcome = walden.json(&["backup", "--label", "it's under load"]);
    assert_eq!(outcome["damaged_pages"], 0, "{outcome}");
    chaos.wait_for_churn(2);
    let acknowledged = chaos.finish().acknowledged();
    cluster.archive_wal();

    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let paths = opened.paths();
    for left_out in [
        "data/postmaster.pid",
        "data/pg_wal/0",
        "data/global/pg_internal.init",
        "data/tablespace_map",
        "data/walden.plan.json",
    ] {
        assert!(!paths.iter().any(|path| path.starts_with(left_out)), "{left_out}");
    }
    for there in
        ["data/pg_wal/archive_status", "data/pg_notify", "data/pg_tblspc", "data/base", "tablespaces"]
    {
        assert!(paths.iter().any(|path| path == there), "{there}");
    }
    let record = opened.record();
    let label = String::from_utf8(opened.file("data/backup_label")).unwrap();
    assert!(label.contains(&format!("START WAL LOCATION: {}", record.start_lsn)), "{label}");
    assert!(label.contains("LABEL: it's under load"), "{label}");
    assert!(record.start_lsn < record.stop_lsn && record.started_at <= record.stopped_at, "{record:?}");
    assert_eq!(record.server.platform, format!("linux {}", std::env::consts::ARCH));

    let data = opened.restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    if major >= 15 {
        // Without it recovery takes the directory of a tablespace that was made in place for a wrong one.
        let auto = data.join("postgresql.auto.conf");
        let text = fs::read_to_string(&auto).unwrap();
        fs::write(&auto, format!("{text}allow_in_place_tablespaces = on\n")).unwrap();
    }
    let source = Checksums::of(&cluster);
    let copy = recover(&walden, major, &data, &cluster.scratch().folder("run-copy"));
    Ledger::assert_holds(&copy, acknowledged);
    source.assert_same(&Checksums::of(&copy));
    assert_eq!(copy.sql("select count(*) from forgotten"), "0");
    drop(copy);
    cluster.stop(Stop::Fast);
}

#[test]
fn a_basebackup_of_13_under_load_starts_after_replay() {
    under_load_it_starts_after_replay(13);
}

#[test]
fn a_basebackup_of_15_under_load_starts_after_replay() {
    under_load_it_starts_after_replay(15);
}

#[test]
fn a_basebackup_of_18_under_load_starts_after_replay() {
    under_load_it_starts_after_replay(18);
}

/// Links in an archive have 99 bytes; beyond that the server is asked for a map.
fn a_tablespace_far_away(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = Cluster::start(major);
    let space = cluster.scratch().folder(&format!("space/{}", "long".repeat(30)));
    cluster.sql(&format!("create tablespace far location '{}'", space.display()));
    cluster.sql("create table kept tablespace far as select generate_series(1, 20000) n");
    let walden = archiving(&cluster);
    let outcome = walden.json(&["backup"]);
    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let data = opened.restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    let copy = recover(&walden, major, &data, &cluster.scratch().folder("run-copy"));
    assert_eq!(copy.sql("select count(*) from kept"), "20000");
}

#[test]
fn a_tablespace_whose_path_no_archive_holds_is_taken_on_13() {
    a_tablespace_far_away(13);
}

#[test]
fn a_tablespace_whose_path_no_archive_holds_is_taken_on_18() {
    a_tablespace_far_away(18);
}

#[test]
fn a_basebackup_of_a_standby_starts_after_replay_and_has_the_history_archived() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_churn(1);
    let standby = standby_of(&cluster);
    let scratch = Scratch::new();
    let (of_cluster, of_standby) = (cluster.connection(), standby.connection());
    // The standby is preferred, and the primary ends the segment that it stops in.
    let nodes = site(&cluster).nodes(&[(&of_cluster, "standby"), (&of_standby, "standby")]);
    let from_standby = Walden::configure(&scratch, &nodes.storage(&walden.storage()));
    let taking = from_standby.run(&["-v", "--output", "json", "backup", "--wal-timeout", "60"]);
    assert!(
        taking.stderr.contains(&format!("from socket \"{}", standby.host.display())),
        "{}",
        taking.stderr
    );
    let acknowledged = chaos.finish().acknowledged();
    cluster.archive_wal();
    let taken: Value = serde_json::from_str(&taking.stdout).unwrap();
    let opened = Opened::open(&walden.repository(), id_of(&taken));
    assert!(!opened.paths().iter().any(|path| path == "data/standby.signal"));
    let label = String::from_utf8(opened.file("data/backup_label")).unwrap();
    assert!(label.contains("BACKUP FROM: standby"), "{label}");
    let data = opened.restore(cluster.scratch(), "from-standby");
    verify_backup(&cluster, &data);
    let source = Checksums::of(&cluster);
    let copy = recover(&walden, 15, &data, &cluster.scratch().folder("run-copy"));
    Ledger::assert_holds(&copy, acknowledged);
    source.assert_same(&Checksums::of(&copy));
    drop(copy);

    // Promoted, it has a history, which is asked for by name.
    standby.sql("select pg_promote()");
    standby.set_archive_command(&walden.archive_command());
    let promoted_scratch = Scratch::new();
    let alone = Walden::configure(&promoted_scratch, &site(&standby).storage(&walden.storage()));
    let promoted = alone.json(&["backup"]);
    assert_eq!(promoted["timeline"], 2, "{promoted}");
    let clusters = walden.repository().join("main/clusters").join(promoted["cluster"].as_str().unwrap());
    let history = clusters.join("history/00000002.history");
    standby.archive_wal();
    fs::remove_file(&history).unwrap();
    alone.json(&["backup"]);
    assert!(history.exists(), "the archiver is done with it, so the backup has put it back");
}

#[test]
fn a_standby_that_is_promoted_meanwhile_is_another_server() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let standby = standby_of(&cluster);
    let sparse = standby.data_directory().join("sparse");
    fs::File::create(&sparse).unwrap().set_len(2 << 30).unwrap();
    Account::of_postgresql().own(&sparse);
    let scratch = Scratch::new();
    let from_standby = Walden::configure(&scratch, &site(&standby).storage(&walden.storage()));
    let taking = from_standby.command().arg("backup").stderr(Stdio::piped()).spawn().unwrap();
    wait_for("the server to send files", || sends_files(&standby).then_some(()));
    standby.sql("select pg_promote()");
    let output = taking.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("server changed during the basebackup"), "{told}");
    assert_eq!(output.status.code(), Some(1), "{told}");
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
}

/// Makes a standby and starts it.
fn standby_of(cluster: &Cluster) -> Server {
    let data = cluster.scratch().path().join("standby");
    let mut copy = Account::of_postgresql().command(cluster.bin_directory().join("pg_basebackup"));
    copy.arg("-R").arg("-D").arg(&data).arg("-d").arg(cluster.connection()).arg("-cfast");
    Run::of(&mut copy, "").expect_success();
    let mut standby = Server::new(cluster.major(), &data, &cluster.scratch().folder("run-standby"));
    standby.start();
    standby
}

/// Hands one connection after the other to one of several servers in turn, as a balancer does.
fn balancer(ports: Vec<u16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (client, port) in listener.incoming().zip(ports.into_iter().cycle()) {
            let Ok(client) = client else { return };
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)) else { return };
            let copy = |from: &TcpStream, to: &TcpStream| {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            };
            copy(&client, &server);
            copy(&server, &client);
        }
    });
    port
}

/// Failure 21a by this way: a primary's answers with its standby's files.
#[test]
fn failure_21a_a_connection_that_leads_to_another_server_of_the_cluster_is_refused() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start_with(15, Options::default().setting("listen_addresses", "127.0.0.1"));
    cluster.set("listen_addresses", "127.0.0.1");
    cluster.restart();
    let walden = archiving(&cluster);
    let mut standby = standby_of(&cluster);
    standby.stop(Stop::Fast);
    standby.set("listen_addresses", "127.0.0.1").start();
    let attempt = |ports: Vec<u16>| {
        let connection = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", balancer(ports));
        let scratch = Scratch::new();
        let site = site(&cluster).nodes(&[(&connection, "primary")]).storage(&walden.storage());
        let walden = Walden::configure(&scratch, &site);
        (walden.try_run(&["backup", "--wal-timeout", "60"]), walden.json(&["list"]))
    };
    let (refused, listed) = attempt(vec![cluster.port, standby.port]);
    let refused = refused.expect_code(2);
    assert!(refused.stderr.contains("does not lead to the server of the session"), "{}", refused.stderr);
    assert_eq!(listed["unfinished"].as_array().unwrap().len(), 0, "nothing was begun: {listed}");
    let (taken, _) = attempt(vec![cluster.port]);
    taken.expect_success();
}

#[test]
fn a_damaged_page_is_told_and_fails_nothing() {
    require!(Need::PostgreSQL(15), Need::PostgreSQL(13));
    for major in [13, 15] {
        let mut cluster = Cluster::start(major);
        let walden = archiving(&cluster);
        cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 50000) n; checkpoint");
        let file = cluster.sql("select pg_relation_filepath('t')");
        cluster.stop(Stop::Fast);
        let path = cluster.data_directory().join(&file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[3 * 8192 + 4000] ^= 0x10;
        fs::write(&path, &bytes).unwrap();
        cluster.start();
        let run = walden.run(&["backup", "--json"]);
        assert!(run.stdout.contains("\"damaged_pages\": 1"), "{}", run.stdout);
        assert!(
            run.stderr.contains(&format!("data/{file}")) && run.stderr.contains("block 3"),
            "{}",
            run.stderr
        );
        assert!(run.stderr.contains("checksum verification failure"), "{}", run.stderr);
    }
}

#[test]
fn configuration_outside_the_data_directory_is_read_where_the_role_may() {
    require!(Need::DebianCluster, Need::PostgreSQL(15));
    let cluster = DebianCluster::start(&[("archive_mode", "on"), ("archive_command", "/bin/true")]);
    let scratch = Scratch::new();
    let walden = Walden::configure(&scratch, &site(&cluster));
    cluster.sql(&format!("alter system set archive_command = '{}'", walden.archive_command()));
    cluster.sql("select pg_reload_conf()");
    let outcome = walden.json(&["backup"]);
    let opened = Opened::open(&walden.repository(), id_of(&outcome));
    let names = opened.record().server.outside_configuration;
    let etc = cluster.configuration_directory();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let name = etc.strip_prefix("/").unwrap().join(name).display().to_string();
        assert!(names.contains(&name), "{names:?}");
        assert_eq!(opened.file(&format!("config/{name}")), fs::read(Path::new("/").join(&name)).unwrap());
    }
}

/// Whether the server sends files at this moment.
fn sends_files(cluster: &Sql) -> bool {
    let phase = "select count(*) from pg_stat_progress_basebackup where phase = 'streaming database files'";
    cluster.sql(phase) == "1"
}

/// How many of our sessions a server has.
const LEFT: &str = "select count(*) from pg_stat_activity where application_name like 'walden%'";

fn start_backup(walden: &Walden) -> Child {
    walden.command().arg("backup").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn a_backup_that_loses_either_connection_or_is_ended_leaves_no_basebackup() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    // From 15 on a walsender whose client is gone finds out between two files. A relation's have 1 GiB at most.
    (0..256).for_each(|n| drop(sparse_file(&cluster, &format!("sparse.{n}"), 1)));
    let terminate =
        |what: &str| format!("select count(pg_terminate_backend(pid)) from pg_stat_activity where {what}");
    let ended_by = |cluster: &Cluster, signal: &str| -> Option<i32> {
        wait_for("the server to be left alone", || (cluster.sql(LEFT) == "0").then_some(()));
        let mut child = start_backup(&walden);
        wait_for("the server to send files", || sends_files(cluster).then_some(()));
        match signal {
            "-TERM" | "-KILL" => {
                Run::of(Command::new("kill").args([signal, &child.id().to_string()]), "").expect_success();
            }
            what => assert_eq!(cluster.sql(&terminate(what)), "1"),
        }
        child.wait().unwrap().code()
    };
    // The session that keeps an eye on the server, and the connection that carries the files.
    assert_eq!(
        ended_by(&cluster, "application_name = 'walden' and backend_type = 'client backend'"),
        Some(4)
    );
    assert_eq!(
        ended_by(&cluster, "application_name like 'walden %' and backend_type = 'walsender'"),
        Some(4)
    );
    assert_eq!(ended_by(&cluster, "-TERM"), Some(1));
    assert_eq!(ended_by(&cluster, "-KILL"), None);
    wait_for("the server to be left alone", || (cluster.sql(LEFT) == "0").then_some(()));

    let mut child = start_backup(&walden);
    wait_for("the server to send files", || sends_files(&cluster).then_some(()));
    cluster.stop(Stop::Immediate);
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 0, "{listed}");
    assert_eq!(listed["unfinished"].as_array().unwrap().len(), 5, "{listed}");
}

#[test]
fn what_cannot_be_sent_is_refused_before_anything_is_begun() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    cluster.sql("create role weak login; grant pg_monitor to weak");
    let connection = cluster.connection().replace("user=postgres", "user=weak");
    assert_ne!(connection, cluster.connection());
    let scratch = Scratch::new();
    let weak = site(&cluster).nodes(&[(&connection, "primary")]).storage(&walden.storage());
    let refused = Walden::configure(&scratch, &weak).try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("replication"), "{}", refused.stderr);
    let refused = walden.try_run(&["backup", "--label", &"l".repeat(1024)]).expect_code(2);
    assert!(refused.stderr.contains("label is 1024 bytes long"), "{}", refused.stderr);
    let begun = &walden.json(&["list"])["unfinished"];
    assert_eq!(begun.as_array().unwrap().len(), 0, "{begun}");

    // A data directory with the marker is a clone, on whatever host.
    let marker = cluster.data_directory().join("walden.clone");
    fs::write(&marker, "# it is one\nname = scratch\n").unwrap();
    Account::of_postgresql().own(&marker);
    let refused = walden.try_run(&["backup"]).expect_code(2);
    assert!(refused.stderr.contains("clone \"scratch\""), "{}", refused.stderr);
    fs::remove_file(&marker).unwrap();
    // A name that no archive of the server holds.
    let long = cluster.data_directory().join("n".repeat(120));
    fs::write(&long, "").unwrap();
    Account::of_postgresql().own(&long);
    let refused = walden.try_run(&["backup"]);
    assert!(refused.stderr.contains("too long for tar format"), "{}", refused.stderr);
    fs::remove_file(&long).unwrap();
    Pgbench::initialize(&cluster, 1);
    walden.json(&["backup"]);
    let listed = walden.json(&["list"]);
    assert_eq!(listed["basebackups"].as_array().unwrap().len(), 1, "{listed}");
}

#[test]
fn check_asks_for_the_right_to_replicate_instead_of_the_directory() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    walden.json(&["backup"]);
    let check = |walden: &Walden| -> Vec<Value> {
        let run = walden.try_run(&["--json", "check"]);
        serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:?}"))
    };
    let item = |items: &[Value], name: &str| -> Value {
        items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("{name}: {items:?}")).clone()
    };
    let items = check(&walden);
    assert_eq!(item(&items, "replication")["status"], "ok", "{items:?}");
    assert_eq!(item(&items, "data directory")["status"], "ok", "{items:?}");
    cluster.sql(
        "create role weak login; grant pg_monitor to weak; grant execute on function pg_switch_wal() to weak",
    );
    let connection = cluster.connection().replace("user=postgres", "user=weak");
    let scratch = Scratch::new();
    let weak = site(&cluster).nodes(&[(&connection, "primary")]).storage(&walden.storage());
    let items = check(&Walden::configure(&scratch, &weak));
    let replication = item(&items, "replication");
    assert_eq!(replication["status"], "failed", "{items:?}");
    assert!(replication["hint"].as_str().unwrap().contains("REPLICATION"), "{replication}");
    assert_ne!(item(&items, "rights")["status"], "failed", "it needs no right to start a backup: {items:?}");
}

/// Restores a basebackup, recovers it, and compares it with its source, which stands still.
pub fn assert_equals_source(cluster: &Cluster, walden: &Walden, outcome: &Value, name: &str) {
    let opened = Opened::open(&walden.repository(), id_of(outcome));
    let data = opened.restore(cluster.scratch(), name);
    verify_backup(cluster, &data);
    let run = cluster.scratch().folder(&format!("run-{name}"));
    let copy = recover(walden, cluster.major(), &data, &run);
    Checksums::of(cluster).assert_same(&Checksums::of(&copy));
}

fn what_differs_is_stored(major: u32) {
    require!(Need::PostgreSQL(major));
    let cluster = Cluster::start(major);
    let walden = archiving(&cluster);
    Pgbench::initialize(&cluster, 10);
    let number = |outcome: &Value, name: &str| outcome[name].as_u64().unwrap();
    let full = walden.json(&["backup"]);
    assert!(full["parent"].is_null() && full["full_because"].is_string(), "{full}");

    Pgbench::run(&cluster, &["--transactions", "100", "--client", "2", "--no-vacuum"]);
    let second = walden.json(&["backup"]);
    assert_eq!(second["parent"], full["id"], "{second}");
    assert!(number(&second, "stored_bytes") * 4 < number(&full, "stored_bytes"), "{full}\n{second}");
    let pages = number(&second, "database_bytes") / 8192;
    assert!(number(&second, "changed_pages") * 4 < pages, "{second}");
    // All of it has come, and all of it was compared.
    assert!(number(&second, "read_bytes") * 10 > number(&second, "database_bytes") * 9, "{second}");

    // From the data directory it goes on where the server's files have left off, and back.
    let from_directory = Site::of(&cluster, cluster.data_directory()).unencrypted();
    walden.reconfigure(cluster.scratch(), &from_directory);
    Pgbench::run(&cluster, &["--transactions", "100", "--client", "2", "--no-vacuum"]);
    let third = walden.json(&["backup"]);
    assert_eq!(third["parent"], second["id"], "{third}");
    assert!(number(&third, "stored_bytes") * 4 < number(&full, "stored_bytes"), "{third}");
    walden.reconfigure(cluster.scratch(), &site(&cluster));
    cluster
        .sql("delete from pgbench_history; drop table pgbench_branches; create table later as select 1 as n");
    let fourth = walden.json(&["backup"]);
    assert_eq!(fourth["parent"], third["id"], "{fourth}");
    assert!(number(&fourth, "stored_bytes") * 4 < number(&full, "stored_bytes"), "{fourth}");
    cluster.archive_wal();
    assert_equals_source(&cluster, &walden, &fourth, "fourth");

    let again = walden.json(&["backup", "--full"]);
    assert!(again["parent"].is_null(), "{again}");
    cluster.archive_wal();
    assert_equals_source(&cluster, &walden, &again, "again");
}

#[test]
fn of_13_only_what_differs_is_stored_whichever_way_the_last_one_was_taken() {
    what_differs_is_stored(13);
}

#[test]
fn of_18_only_what_differs_is_stored_whichever_way_the_last_one_was_taken() {
    what_differs_is_stored(18);
}

/// Has a server lose the summaries of its WAL from an LSN on, and that WAL as well, so that it cannot write them again.
fn forget_summaries(cluster: &Cluster, from: &str) {
    let switch = |to: &str| {
        cluster.sql(&format!("alter system set summarize_wal = {to}"));
        cluster.sql("select pg_reload_conf()");
    };
    let summarizers = "select count(*) from pg_stat_activity where backend_type = 'walsummarizer'";
    let segment = cluster.sql(&format!("select pg_walfile_name('{from}')"));
    switch("off");
    wait_for("the summarizer to end", || (cluster.sql(summarizers) == "0").then_some(()));
    let wal = cluster.data_directory().join("pg_wal");
    for summary in fs::read_dir(wal.join("summaries")).unwrap() {
        fs::remove_file(summary.unwrap().path()).unwrap();
    }
    cluster.archive_wal();
    cluster.archive_wal();
    wait_for("the WAL to be removed", || {
        cluster.sql("checkpoint");
        (!wal.join(&segment).exists()).then_some(())
    });
    switch("on");
    wait_for("the summarizer to begin", || (cluster.sql(summarizers) == "1").then_some(()));
}

/// From 17 on the server sends only what has changed, and the basebackup is as whole as any.
#[test]
fn of_18_with_summaries_of_its_wal_only_what_has_changed_comes() {
    require!(Need::PostgreSQL(18));
    let options = Options::default().setting("summarize_wal", "on");
    let cluster = Cluster::start_with(18, options);
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    let walden = archiving(&cluster);
    Pgbench::initialize(&cluster, 10);
    cluster
        .sql("create table far tablespace fast as select n, md5(n::text) from generate_series(1, 50000) n");
    cluster.sql("create table shrinks as select n, repeat('x', 500) as t from generate_series(1, 20000) n");
    cluster.sql("create table small as select n from generate_series(1, 100) n");
    let number = |outcome: &Value, name: &str| outcome[name].as_u64().unwrap();
    let full = walden.json(&["backup"]);
    assert!(number(&full, "received_bytes") > number(&full, "database_bytes"), "{full}");

    // Pages change, files grow, shrink, go and come.
    Pgbench::run(&cluster, &["--transactions", "100", "--client", "2", "--no-vacuum"]);
    cluster.sql("update far set n = -n where n % 1000 = 0; insert into small values (-1)");
    cluster.sql("delete from shrinks where n > 5000");
    cluster.sql("vacuum shrinks");
    cluster.sql("insert into shrinks select n, 'y' from generate_series(1, 3000) n");
    cluster.sql("drop table pgbench_branches; create table later as select 1 as n");
    let second = walden.json(&["backup"]);
    assert_eq!(second["parent"], full["id"], "{second}");
    assert!(number(&second, "received_bytes") * 2 < number(&second, "database_bytes"), "{second}");
    assert!(number(&second, "stored_bytes") * 4 < number(&full, "stored_bytes"), "{full}\n{second}");
    assert_eq!(number(&second, "damaged_pages"), 0, "{second}");
    cluster.archive_wal();
    assert_equals_source(&cluster, &walden, &second, "second");

    // And on, upon one that has no checksums of files of which only parts came; and from the data directory.
    cluster.sql("update far set n = -n where n % 777 = 0; insert into small values (-2)");
    let third = walden.json(&["backup"]);
    assert_eq!(third["parent"], second["id"], "{third}");
    assert!(number(&third, "received_bytes") * 2 < number(&third, "database_bytes"), "{third}");
    let from_directory = Site::of(&cluster, cluster.data_directory()).unencrypted();
    walden.reconfigure(cluster.scratch(), &from_directory);
    let fourth = walden.json(&["backup"]);
    assert_eq!(fourth["parent"], third["id"], "{fourth}");
    assert!(fourth["received_bytes"].is_null(), "{fourth}");
    cluster.archive_wal();
    for (outcome, name) in [(&third, "third"), (&fourth, "fourth")] {
        assert_equals_source(&cluster, &walden, outcome, name);
    }

    // Summaries that were removed cannot tell what has changed: everything comes, and the same is stored.
    walden.reconfigure(cluster.scratch(), &site(&cluster));
    forget_summaries(&cluster, fourth["start_lsn"].as_str().unwrap());
    let run = walden.run(&["-v", "--output", "json", "backup"]);
    let fifth: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(run.stderr.contains("cannot say what has changed"), "{}", run.stderr);
    assert_eq!(fifth["parent"], fourth["id"], "{fifth}");
    assert!(number(&fifth, "received_bytes") > number(&fifth, "database_bytes"), "{fifth}");
}
