//! A clone at the end of the archive holds what the source held, though the basebackup was taken under load.

use crate::site::{Clone, Source, assert_unchanged, backup_under_load, listing};
use crate::support::{
    Checksums, DebianCluster, Ledger, Need, Options, Scratch, Site, Stop, Walden, open_fuse_to_users,
    require, wait_for,
};

/// Holds a clone against what the source held, and writes to it.
fn check(expected: &Checksums, clone: &Clone, acknowledged: i64) {
    expected.assert_same(&Checksums::of(clone));
    Ledger::assert_holds(clone, acknowledged);
    clone.sql("update pgbench_accounts set abalance = abalance + 1 where aid < 1000; drop table growing");
}

fn a_clone_of_a_basebackup_taken_under_load_equals_its_source(major: u32) {
    require!(Need::PostgreSQL(15), Need::PostgreSQL(major), Need::Fuse);
    let mut source = Source::start_major(major, Options::default());
    let acknowledged = source.backup();
    source.archive_wal();
    let expected = Checksums::of(&source);
    // Stopped, no file of the source may change for any reason.
    source.cluster.stop(Stop::Fast);
    let files = listing(source.data_directory());
    let clone = source.clone("busy", &[]);
    check(&expected, &clone, acknowledged);
    if major >= 14 {
        clone.amcheck();
    }
    clone.run("delete");
    assert_unchanged(&files, source.data_directory());
    source.cluster.start();
    expected.assert_same(&Checksums::of(&source));
}

#[test]
fn a_clone_of_15_under_load_equals_its_source() {
    a_clone_of_a_basebackup_taken_under_load_equals_its_source(15);
}

#[test]
fn a_clone_of_13_under_load_equals_its_source() {
    a_clone_of_a_basebackup_taken_under_load_equals_its_source(13);
}

#[test]
fn a_clone_of_18_under_load_equals_its_source() {
    a_clone_of_a_basebackup_taken_under_load_equals_its_source(18);
}

/// The configuration of such a cluster is in /etc, where the basebackup takes it from and no clone looks.
#[test]
fn a_clone_of_a_debian_cluster_runs_without_the_files_in_etc() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::DebianCluster);
    let source = DebianCluster::start(&[("max_wal_size", "256MB")]);
    let scratch = Scratch::new();
    let walden = Walden::configure(&scratch, &Site::of(&source, &source.data_directory()));
    source.sql(&format!("alter system set archive_command = '{}'", walden.archive_command()));
    source.sql("select pg_reload_conf()");
    let acknowledged = backup_under_load(&source, &walden);
    source.sql("select pg_logical_emit_message(false, 'test', 'a record')");
    let segment = source.sql("select pg_walfile_name(pg_switch_wal())");
    let archived = format!("select last_archived_wal >= '{segment}' from pg_stat_archiver");
    wait_for("the last segment to be archived", || (source.sql(&archived) == "t").then_some(()));
    let expected = Checksums::of(&source);
    source.control("stop");
    let folders = [source.data_directory(), source.configuration_directory()];
    let files = folders.each_ref().map(|folder| listing(folder));
    let clone = Clone::create(&walden.as_root(), "debian", &[]);
    check(&expected, &clone, acknowledged);
    clone.amcheck();
    let own = clone.folder().join("config/postgresql.conf");
    assert_eq!(clone.sql("show config_file"), own.display().to_string());
    clone.run("delete");
    folders.iter().zip(&files).for_each(|(folder, before)| assert_unchanged(before, folder));
    source.control("start");
    expected.assert_same(&Checksums::of(&source));
}

/// As PostgreSQL's own account, without root: fusermount3 and a user namespace.
#[test]
fn an_ordinary_user_has_clones_too() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    open_fuse_to_users();
    let source = Source::start(Options::default());
    source.sql("create table kept as select n, md5(n::text) from generate_series(1, 10000) n");
    source.backup();
    source.sql("update kept set n = -n where n % 3 = 0");
    source.archive_wal();
    let clone = Clone::create(&source.walden, "own", &[]);
    Checksums::of(&source).assert_same(&Checksums::of(&clone));
    let outside = source.scratch().folder("outside");
    let refused = clone.try_sql(&format!("copy kept to '{}/rows'", outside.display())).unwrap_err();
    assert!(refused.contains("Read-only") || refused.contains("Permission denied"), "{refused}");
    clone.sql("delete from kept where n < 0");
    let rows = clone.sql("select count(*) from kept");
    let [supervisor, _] = clone.processes();
    clone.kill(supervisor);
    clone.run("start");
    assert_eq!(clone.sql("select count(*) from kept"), rows);
    clone.run("delete");
    assert!(!clone.folder().exists() && outside.read_dir().unwrap().next().is_none());
}
