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

/// An estimate before anything is written, and what it stands on.
#[test]
fn a_dry_run_estimates_from_a_sample_and_writes_nothing() {
    require!(Need::PostgreSQL(15));
    let source = Source::start(Options::default());
    Pgbench::initialize(&source, 2);
    source.backup();
    source.archive_wal();
    let report = source.restore("planned", &["--dry-run"]);
    assert!(!source.place("planned").exists());
    let figure = |name: &str| report["estimate"][name].as_f64().unwrap_or_else(|| panic!("{name}: {report}"));
    assert!(figure("seconds") > 0.0 && figure("round_trip_seconds") > 0.0, "{report}");
    assert!(
        ["store", "processors"].contains(&report["estimate"]["limited_by"].as_str().unwrap()),
        "{report}"
    );
    // What was read is what was counted: the sample, its round trips, and the file table.
    let sampled = figure("sample_bytes");
    assert!(sampled > 100_000.0 && sampled <= report["stored_bytes"].as_f64().unwrap(), "{report}");
    assert!(report["bytes_fetched"].as_f64().unwrap() >= sampled, "{report}");
    assert!(figure("requests") >= 1.0 && figure("sample_requests") >= 1.0, "{report}");

    let directory = source.place("planned");
    let words = ["restore", "--dry-run", "--target-dir", directory.to_str().unwrap()];
    let told = source.walden.run(&words).stdout;
    assert!(told.contains("takes about ") && told.contains("if the disk keeps up"), "{told}");
    assert!(told.contains("estimated from ") && told.contains(" a round trip"), "{told}");
    // A restore that was done has no estimate, and one that exists already costs at most that much.
    let done = source.restore("done", &[]);
    assert!(done["estimate"].is_null());
    assert_planned_is_done(&report, &done);
    let directory = source.place("done");
    let words = ["restore", "--dry-run", "--delta", "--target-dir", directory.to_str().unwrap()];
    let told = source.walden.run(&words).stdout;
    assert!(told.contains("takes at most about "), "{told}");
}

/// Checks what a dry run has said by what a restore with the same options has done.
#[track_caller]
fn assert_planned_is_done(planned: &serde_json::Value, done: &serde_json::Value) {
    let number = |report: &serde_json::Value, name: &str| {
        report[name].as_u64().unwrap_or_else(|| panic!("{name}: {report}"))
    };
    let [plan, outcome] = [planned, done].map(|report| move |name: &str| number(report, name));
    assert_eq!(plan("files"), outcome("files_written"));
    assert_eq!(plan("bytes"), outcome("bytes_restored"));
    // All that is stored is fetched, and beside it no more than what the plan was made of.
    let beside = plan("bytes_fetched") - number(&planned["estimate"], "sample_bytes");
    let stored = plan("stored_bytes")..=plan("stored_bytes") + beside;
    assert!(stored.contains(&outcome("bytes_fetched")), "{} in {stored:?}", outcome("bytes_fetched"));
}
