//! A clone that has everything: it comes while the server works, survives stops and kills, and needs no store in the end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::Value;

use crate::site::{Clone, Source};
use crate::support::{Checksums, Need, Options, Pgbench, require, wait_for};

/// A source of some 50 MiB, with a table that nobody touches and a tablespace.
fn source() -> Source {
    let source = Source::start(Options::default());
    Pgbench::initialize(&source, 2);
    let folder = source.scratch().folder("elsewhere");
    source.sql(&format!("create tablespace elsewhere location '{}'", folder.display()));
    source.sql("create table cold as select n, md5(n::text) as t from generate_series(1, 100000) n");
    source.sql("create table far tablespace elsewhere as select n from generate_series(1, 50000) n");
    source.sql("checkpoint");
    source.backup_at_rest();
    source.sql("create table later as select n from generate_series(1, 1000) n");
    source.archive_wal();
    source
}

fn hydration(clone: &Clone) -> Value {
    clone.status()["hydration"].clone()
}

#[track_caller]
fn wait_until_whole(clone: &Clone) {
    wait_for("everything to be local", || {
        let told = hydration(clone);
        assert_ne!(told["state"], "failed", "{told}");
        (told["state"] == "done").then_some(())
    });
}

/// Every file beneath the mount has all of its blocks, or is one that its server made with holes.
#[track_caller]
fn assert_is_local(upper: &Path) {
    let mut folders = vec![upper.to_owned()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let metadata = fs::symlink_metadata(entry.path()).unwrap();
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if metadata.is_file() && metadata.len() > 0 {
                let on_disk = metadata.blocks() * 512;
                assert!(on_disk > 0, "{} has none of {} bytes", entry.path().display(), metadata.len());
                files += 1;
            }
        }
    }
    assert!(files > 500, "{files} files");
}

#[test]
fn a_clone_becomes_whole_under_load_and_needs_no_store_then() {
    require!(Need::PostgreSQL(15), Need::Fuse, Need::Folder);
    let source = source();
    let clone = source.clone("whole", &["--hydrate-rate", "512MiB"]);
    assert_eq!(hydration(&clone)["rate_limit"], 512 << 20);
    let mut load = Pgbench::start(&clone, 2);
    wait_until_whole(&clone);
    assert!(load.is_running(), "the load met an error");
    drop(load);
    // The supervisor's own, and that of a cut-over, stay.
    let sessions = "select count(*) from pg_stat_activity where backend_type = 'client backend' \
                    and pid <> pg_backend_pid() and application_name <> 'walden'";
    wait_for("the sessions of the load to end", || (clone.sql(sessions) == "0").then_some(()));
    let status = clone.status();
    assert_eq!(status["hydrated_bytes"], status["total_bytes"], "{status}");
    assert!(status["total_bytes"].as_u64().unwrap() > 0);
    let shown = clone.walden.run(&["clone", "status", &clone.name]).stdout;
    assert!(shown.contains("  local         all of "), "{shown}");
    assert_is_local(&clone.folder().join("upper/data"));

    let main = source.walden.repository().join("main");
    fs::rename(&main, main.with_extension("away")).unwrap();
    let rows = Checksums::of(&clone);
    // More than the server's buffers hold, and nothing of it from them.
    clone.sql("checkpoint");
    assert_eq!(clone.sql("select count(*), sum(n) from cold"), "100000|5000050000");
    assert_eq!(clone.sql("select count(*) from far"), "50000");
    rows.assert_same(&Checksums::of(&clone));
    clone.amcheck();
    fs::rename(main.with_extension("away"), &main).unwrap();

    clone.run("stop");
    let stopped = clone.status();
    assert_eq!(stopped["state"], "stopped", "{stopped}");
    assert_eq!(stopped["hydration"]["state"], "done", "{stopped}");
    assert_eq!(stopped["hydrated_bytes"], status["hydrated_bytes"]);
    // It needs none as long as it runs; a start asks it.
    fs::rename(&main, main.with_extension("away")).unwrap();
    let refused = clone.walden.try_run(&["clone", "start", &clone.name]);
    assert!(!refused.success() && refused.stderr.contains("main"), "{}", refused.stderr);
    fs::rename(main.with_extension("away"), &main).unwrap();
    clone.run("start");
    assert_eq!(hydration(&clone)["state"], "done");
    rows.assert_same(&Checksums::of(&clone));
    clone.run("delete");
}

#[test]
fn a_clone_that_is_not_hydrated_says_so_and_goes_on_when_it_is_told_to() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let refused = source.walden.as_root().try_run(&["clone", "create", "x", "--hydrate-rate", "0B"]);
    assert!(refused.stderr.contains("--no-hydrate"), "{}", refused.stderr);
    let clone = source.clone("lazy", &["--no-hydrate"]);
    clone.sql("select count(*) from cold");
    // What is local is counted beside the first queries.
    let is_counted = |status: &Value| status["hydrated_bytes"].as_u64() > Some(1 << 20);
    let before = wait_for("what is local to be counted", || Some(clone.status()).filter(is_counted));
    assert_eq!(before["hydration"]["state"], "off");
    assert!(before["hydrated_bytes"].as_u64() < before["total_bytes"].as_u64(), "{before}");
    let [supervisor, _] = clone.processes();
    clone.kill(supervisor);

    clone.walden.run(&["clone", "start", &clone.name, "--hydrate-rate", "none"]);
    assert_eq!(hydration(&clone)["rate_limit"], Value::Null);
    wait_until_whole(&clone);
    assert_eq!(clone.sql("select count(*) from cold"), "100000");
    assert_eq!(clone.sql("select count(*) from later"), "1000");
    // Remembered, and nothing is left to do.
    clone.run("stop");
    clone.run("start");
    assert_eq!(hydration(&clone)["state"], "done");
    clone.run("delete");
}

/// What could not come is asked for again while the server works: nothing has to be stopped after a repair.
#[test]
fn a_clone_whose_hydration_has_failed_is_told_to_go_on_while_it_runs() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let source = source();
    let clone = source.clone("damaged", &["--no-hydrate"]);
    clone.sql("checkpoint");
    // The next process has nothing of the packs in its memory yet.
    clone.run("stop");
    let id = clone.status()["basebackup"].as_str().unwrap().to_owned();
    let packs = source.walden.repository().join("main/basebackups").join(id).join("packs");
    let mut whole = Vec::new();
    for pack in fs::read_dir(packs).unwrap() {
        let path = pack.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let mut damaged = bytes.clone();
        // Not in its last bytes, which say what is where.
        (bytes.len() / 4..bytes.len() * 3 / 4).step_by(1 << 12).for_each(|at| damaged[at] ^= 1);
        fs::write(&path, damaged).unwrap();
        whole.push((path, bytes));
    }
    clone.walden.run(&["clone", "start", &clone.name, "--hydrate-rate", "none"]);
    let has_failed = || {
        let told = wait_for("hydration to fail", || {
            Some(hydration(&clone)).filter(|told| told["state"] == "failed")
        });
        assert!(told["failed_files"].as_u64() > Some(0), "{told}");
    };
    has_failed();
    let processes = clone.processes();
    let again = clone.walden.json(&["clone", "start", &clone.name]);
    assert_eq!(again["state"], "running", "{again}");
    has_failed();
    // Not for options, which would be for the next start.
    let words = ["clone", "start", &clone.name, "--hydrate-rate", "1MiB"];
    let refused = clone.walden.try_run(&words).expect_code(1);
    assert!(refused.stderr.contains("is running already"), "{}", refused.stderr);
    for (path, bytes) in whole {
        fs::write(&path, bytes).unwrap();
    }
    clone.run("start");
    wait_until_whole(&clone);
    assert_eq!(clone.processes(), processes, "something was started anew");
    assert_eq!(clone.sql("select count(*), sum(n) from cold"), "100000|5000050000");
    let refused = clone.walden.try_run(&["clone", "start", &clone.name]).expect_code(1);
    assert!(refused.stderr.contains("is running already"), "{}", refused.stderr);
    clone.run("delete");
}
