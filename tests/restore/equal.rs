//! A restore, recovered, is the source: every table, at the moment the WAL ends or the load stood still.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::source::Source;
use crate::support::{Checksums, Need, Options, Pgbench, Run, require, wait_for};

#[test]
fn a_restore_of_a_cluster_under_load_equals_its_source() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    source.sql("alter system set work_mem = '9MB'");
    Pgbench::initialize(&source, 2);
    let load = Pgbench::start(&source, 2);
    let id = source.backup();
    drop(load);
    let sessions = "select count(*) from pg_stat_activity where application_name = 'pgbench'";
    wait_for("the load to be gone", || (source.sql(sessions) == "0").then_some(()));
    let expected = Checksums::of(&source);
    source.archive_wal();

    let report = source.restore("restored", &[]);
    assert_eq!(report["basebackup"], id.as_str());
    assert_eq!(report["timeline"], 1);
    assert!(report["bytes_restored"].as_u64().unwrap() > 20_000_000, "{report}");
    let mut server = source.server("restored");
    // The server's own judge of a backup.
    let mut verify = std::process::Command::new(server.bin_directory().join("pg_verifybackup"));
    verify.args(["-n", "-i", "walden.plan.json", "-i", "walden.restore.json"]);
    Run::of(verify.arg(server.data_directory()), "").expect_success();
    server.start();
    crate::source::wait_until_writable(&server);
    expected.assert_same(&Checksums::of(&server));
    let mode = fs::metadata(server.data_directory()).unwrap().mode() & 0o7777;
    assert_eq!(mode, 0o700);
    // What ALTER SYSTEM had set by the time of the basebackup is kept (failure 24).
    assert_eq!(server.sql("show work_mem"), "9MB");
    let segment = server.sql("select pg_walfile_name(pg_current_wal_lsn())");
    assert!(segment.starts_with("00000002"), "{segment}");
}
