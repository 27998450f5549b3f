//! The ground the other tests stand on, tested itself: servers of three major versions, checksums that notice a
//! changed row, a load that remembers its commits, and clusters that leave nothing behind.

#[path = "../support/mod.rs"]
mod support;

mod backup;
mod by_replication;
mod incremental;
mod isolation;
mod promoted;
mod received_changes;
mod replication;
mod session;
mod source;
mod wal_summaries;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::{Chaos, Checksums, Cluster, DebianCluster, Ledger, Need, Options, Pgbench};
use support::{Run, Scratch, Server, Site, Sql, Stop, Walden, require};

#[test]
fn a_cluster_of_13_starts_stops_and_restarts() {
    starts_stops_and_restarts(13);
}

#[test]
fn a_cluster_of_15_starts_stops_and_restarts() {
    starts_stops_and_restarts(15);
}

#[test]
fn a_cluster_of_18_starts_stops_and_restarts() {
    starts_stops_and_restarts(18);
}

fn starts_stops_and_restarts(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut cluster = Cluster::start(major);
    assert_eq!(cluster.sql("select current_setting('server_version_num')::int / 10000"), major.to_string());
    assert_eq!(cluster.sql("show data_checksums"), "on");
    cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 1000) n");
    let before = Checksums::of(&cluster);
    for how in [Stop::Fast, Stop::Immediate, Stop::Kill] {
        cluster.stop(how);
        assert!(!cluster.is_running() && !cluster.answers(), "{how:?}");
        cluster.start();
        before.assert_same(&Checksums::of(&cluster));
    }
    let folder = cluster.scratch().path().to_owned();
    drop(cluster);
    assert!(!folder.exists());
}

#[test]
fn options_reach_initdb_and_the_configuration() {
    require!(Need::PostgreSQL(18));
    let options = Options::default().without_checksums().initdb("--wal-segsize=1").setting("work_mem", "7MB");
    let cluster = Cluster::start_with(18, options);
    let settings = cluster.rows("select current_setting('data_checksums'), current_setting('wal_segment_size'), current_setting('work_mem')");
    assert_eq!(settings, [["off", "1MB", "7MB"]]);
}

#[test]
fn checksums_see_every_change_of_a_row_and_nothing_else() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    cluster.sql("create database other; create unlogged table forgotten (n int); create table \"an odd | name\" (n int, t text)");
    let other = cluster.in_database("other");
    other.sql("create schema s; create table s.t (n int, t text); insert into s.t values (1, 'a'), (2, 'b'), (3, null)");
    let before = Checksums::of(&cluster);
    assert_eq!(before.len(), 2);
    cluster.sql("insert into forgotten values (1)");
    before.assert_same(&Checksums::of(&cluster));
    other.sql("delete from s.t where n = 1; insert into s.t values (1, 'a')");
    before.assert_same(&Checksums::of(&cluster));
    for change in [
        "update s.t set t = 'c' where n = 2",
        "delete from s.t where n = 2",
        "insert into s.t values (2, 'b'), (2, 'b')",
    ] {
        other.sql(change);
        let after = Checksums::of(&cluster);
        assert_eq!(before.differences(&after).len(), 1, "{change}");
    }
    other.sql("create table s.more ()");
    assert_eq!(before.differences(&Checksums::of(&cluster)).len(), 2);
}

#[test]
fn wal_is_archived_and_waited_for() {
    require!(Need::PostgreSQL(13));
    let cluster = Cluster::start(13);
    let archive = cluster.scratch().folder("archive");
    cluster.set_archive_command(&format!("cp %p {}/%f", archive.display()));
    let first = cluster.archive_wal();
    let second = cluster.archive_wal();
    assert!(first < second, "{first} {second}");
    assert!(archive.join(first).exists() && archive.join(second).exists());
}

#[test]
fn a_copy_of_a_data_directory_runs_beside_its_source() {
    require!(Need::PostgreSQL(18));
    let mut cluster = Cluster::start(18);
    Pgbench::initialize(&cluster, 1);
    Pgbench::run(&cluster, &["--transactions", "50", "--client", "2"]);
    cluster.stop(Stop::Fast);
    let copy = cluster.scratch().path().join("copy");
    Run::of(Command::new("cp").arg("-a").args([cluster.data_directory(), &copy]), "").expect_success();
    cluster.start();
    let run = cluster.scratch().folder("run-copy");
    let mut second = Server::new(18, &copy, &run);
    second.set("work_mem", "5MB").start();
    assert_eq!(second.sql("show work_mem"), "5MB");
    Checksums::of(&cluster).assert_same(&Checksums::of(&second));
}

#[test]
fn a_server_that_cannot_start_says_why() {
    require!(Need::PostgreSQL(15));
    let scratch = Scratch::new();
    let mut server = Server::new(15, &scratch.folder("empty"), &scratch.folder("run"));
    let log = server.try_start().unwrap_err();
    assert!(log.contains("postgresql.conf"), "{log}");
}

#[test]
fn what_the_load_was_told_is_committed_survives_kill_9() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_commits(200);
    cluster.stop(Stop::Kill);
    let acknowledged = chaos.abandon().acknowledged();
    cluster.start();
    Ledger::assert_holds(&cluster, acknowledged);
    assert!(acknowledged >= 200);
}

#[test]
fn the_load_changes_files_of_every_kind_and_ends_when_told() {
    require!(Need::PostgreSQL(18));
    let cluster = Cluster::start(18);
    let chaos = Chaos::start(&cluster);
    chaos.wait_for_churn(5);
    let ledger = chaos.finish();
    assert_eq!(cluster.sql("select count(*) > 0 from pgbench_history"), "t");
    assert_eq!(cluster.sql("select count(*) > 50 from growing"), "t");
    let before = Checksums::of(&cluster);
    Ledger::assert_holds(&cluster, ledger.acknowledged());
    before.assert_same(&Checksums::of(&cluster));
    let missing = std::panic::catch_unwind(|| Ledger::assert_holds(&cluster, ledger.acknowledged() + 1));
    assert!(missing.is_err());
}

#[test]
fn a_debian_cluster_keeps_its_configuration_in_etc_and_leaves_nothing() {
    require!(Need::DebianCluster, Need::PostgreSQL(15));
    let cluster = DebianCluster::start(&[("work_mem", "6MB")]);
    assert_eq!(cluster.sql("show work_mem"), "6MB");
    let (etc, data) = (cluster.configuration_directory(), cluster.data_directory());
    assert_eq!(Path::new(&cluster.sql("show config_file")), etc.join("postgresql.conf"));
    assert!(!data.join("postgresql.conf").exists());
    cluster.control("restart");
    assert!(cluster.answers());
    drop(cluster);
    assert!(!etc.exists() && !data.exists());
}

#[test]
fn the_runner_gives_walden_a_configuration_it_accepts() {
    let scratch = Scratch::new();
    let cluster = Sql::at(&scratch.folder("run"), 5432);
    let walden = Walden::configure(&scratch, &Site::of(&cluster, &scratch.folder("data")));
    let keys = walden.json(&["key", "list"]);
    assert!(keys.to_string().contains("\"test\""), "{keys}");
    assert!(fs::read_to_string(walden.configuration_file()).unwrap().contains(&cluster.connection()));
    walden.try_run(&["key", "list", "--no-such-option"]).expect_code(2);
    let plain = Scratch::new();
    let walden = Walden::configure(&plain, &Site::of(&cluster, &plain.folder("data")).unencrypted());
    walden.run(&["key", "list"]);
}

#[test]
fn a_need_that_is_not_met_skips_a_test_and_fails_ci() {
    let needs = [Need::PostgreSQL(99)];
    assert_eq!(support::missing(&needs, false).as_deref(), Some("PostgreSQL 99"));
    assert!(std::panic::catch_unwind(|| support::missing(&needs, true)).is_err());
    assert_eq!(support::missing(&[], true), None);
}

#[test]
fn a_scratch_folder_ends_what_a_test_left_in_it() {
    let scratch = Scratch::new();
    let inside = scratch.folder("inside");
    fs::write(inside.join("file"), "").unwrap();
    let mut left = Command::new("sleep").arg("600").current_dir(&inside).spawn().unwrap();
    drop(scratch);
    assert!(!inside.exists());
    assert!(!left.wait().unwrap().success());
}
