//! Incremental basebackups of real servers: each as whole as a full one, and full where they cannot be sound.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::backup::{Opened, archiving, id_of, recover, verify_backup};
use crate::by_replication;
use crate::support::{
    Account, Chaos, Checksums, Cluster, Ledger, Need, Options, Pgbench, Run, Stop, Walden, require, wait_for,
};

/// Waits until no file of the server has a ctime that a basebackup that begins now would not trust.
fn settle() {
    let until = SystemTime::now() + Duration::from_millis(2100);
    wait_for("ctimes to be past", || (SystemTime::now() > until).then_some(()));
}

fn number(outcome: &Value, name: &str) -> u64 {
    outcome[name].as_u64().unwrap_or_else(|| panic!("{name} of {outcome}"))
}

fn packs_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for basebackup in fs::read_dir(folder).unwrap() {
        let Ok(packs) = fs::read_dir(basebackup.unwrap().path().join("packs")) else { continue };
        found.extend(packs.map(|pack| pack.unwrap().path()));
    }
    found.sort();
    found
}

fn incremental_basebackups_under_load_are_whole(major: u32) {
    require!(Need::PostgreSQL(major));
    let mut cluster = Cluster::start(major);
    let space = cluster.scratch().folder("space");
    cluster.sql(&format!("create tablespace fast location '{}'", space.display()));
    cluster
        .sql("create table kept tablespace fast as select n, md5(n::text) from generate_series(1, 20000) n");
    Pgbench::initialize(&cluster, 3);
    let walden = archiving(&cluster);
    let full = walden.json(&["backup"]);
    assert_eq!(full["parent"], Value::Null);
    assert_eq!(full["full_because"], "this host remembers no basebackup of the site");
    let chaos = Chaos::start(&cluster);
    let (mut parent, mut last) = (full.clone(), full.clone());
    for n in 0..4 {
        chaos.wait_for_churn(2);
        last = walden.json(&["backup"]);
        assert_eq!(last["parent"], parent["id"], "{last}");
        assert_eq!(
            (&last["full_because"], &last["damaged_pages"]),
            (&Value::Null, &Value::from(0)),
            "{last}"
        );
        assert!(n > 0 || number(&last, "stored_bytes") < number(&full, "stored_bytes"), "{last}");
        assert!(number(&last, "reused_chunks") > 0, "{last}");
        parent = last.clone();
    }
    chaos.wait_for_churn(2);
    let acknowledged = chaos.finish().acknowledged();
    cluster.archive_wal();

    for (name, outcome) in [("first", &full), ("last", &last)] {
        let opened = Opened::open(&walden.repository(), id_of(outcome));
        let data = opened.restore(cluster.scratch(), name);
        verify_backup(&cluster, &data);
        let run = cluster.scratch().folder(&format!("run-{name}"));
        let copy = recover(&walden, major, &data, &run);
        Ledger::assert_holds(&copy, acknowledged);
        Checksums::of(&cluster).assert_same(&Checksums::of(&copy));
        drop(copy);
        fs::remove_dir_all(cluster.scratch().path().join(name)).unwrap();
    }
    cluster.stop(Stop::Fast);
}

#[test]
fn incremental_basebackups_of_15_under_load_are_whole() {
    incremental_basebackups_under_load_are_whole(15);
}

#[test]
fn incremental_basebackups_of_13_under_load_are_whole() {
    incremental_basebackups_under_load_are_whole(13);
}

#[test]
fn incremental_basebackups_of_18_under_load_are_whole() {
    incremental_basebackups_under_load_are_whole(18);
}

#[test]
fn a_mount_of_an_incremental_basebackup_passes_pg_verifybackup_and_nothing_unchanged_is_read() {
    require!(Need::PostgreSQL(15), Need::Fuse);
    let cluster = Cluster::start(15);
    Pgbench::initialize(&cluster, 5);
    cluster.sql("vacuum freeze; checkpoint");
    let walden = archiving(&cluster);
    settle();
    let first = walden.json(&["backup"]);
    Pgbench::run(&cluster, &["--transactions", "50", "--client", "1", "--no-vacuum"]);
    cluster.sql("checkpoint");
    settle();
    let text = walden.run(&["backup"]).stdout;
    assert!(text.contains("incremental to ") && text.contains(" chunks reused"), "{text}");
    settle();
    // Nothing but what each basebackup itself leaves has changed.
    let idle = walden.json(&["backup"]);
    assert!(number(&idle, "read_bytes") < number(&idle, "database_bytes") / 4, "{idle}");
    assert!(number(&idle, "stored_bytes") < 2 << 20, "{idle}");
    assert!(number(&idle, "unread_files") * 2 > number(&idle, "files"), "{idle}");
    let root = walden.as_root();
    let mounted = root.mount(&cluster.scratch().folder("mnt"));
    for id in [id_of(&first), id_of(&idle)] {
        let data = mounted.path().join("basebackups").join(id).join("data");
        let verify = cluster.bin_directory().join("pg_verifybackup");
        Run::of(Command::new(verify).arg("-n").arg(&data), "").expect_success();
    }
}

/// The time of last modification can be set, the ctime cannot.
#[test]
fn a_forged_time_of_modification_hides_nothing() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 50000) n; checkpoint");
    let walden = archiving(&cluster);
    settle();
    walden.json(&["backup"]);
    let file = cluster.sql("select pg_relation_filepath('t')");
    cluster.stop(Stop::Fast);
    let path = cluster.data_directory().join(&file);
    let before = fs::metadata(&path).unwrap();
    let open = fs::OpenOptions::new().write(true).open(&path).unwrap();
    open.write_all_at(&[0x55], 3 * 8192 + 4000).unwrap();
    open.set_modified(before.modified().unwrap()).unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.mtime(), before.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
    cluster.start();
    settle();
    let outcome = walden.json(&["backup"]);
    assert_ne!(outcome["parent"], Value::Null, "{outcome}");
    assert_eq!(outcome["damaged_pages"], 1, "{outcome}");
}

#[test]
fn packs_that_are_gone_are_stored_again_and_what_was_restored_from_them_is_whole_again() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    Pgbench::initialize(&cluster, 2);
    let walden = archiving(&cluster);
    walden.json(&["backup"]);
    cluster.sql("update pgbench_accounts set abalance = 7 where aid % 100 = 0; checkpoint");
    walden.json(&["backup"]);
    let packs = packs_below(&walden.repository().join("main/basebackups"));
    assert!(packs.len() >= 2, "{packs:?}");
    fs::remove_file(&packs[0]).unwrap();
    let last = packs.last().unwrap();
    let cut = fs::metadata(last).unwrap().len() - 1;
    fs::OpenOptions::new().write(true).open(last).unwrap().set_len(cut).unwrap();
    let run = walden.run(&["backup", "--json"]);
    assert!(run.stderr.contains("2 packs are missing or cut"), "{}", run.stderr);
    let healed: Value = serde_json::from_str(&run.stdout).unwrap();
    assert!(number(&healed, "pages_stored_again") > 1000, "{healed}");
    let opened = Opened::open(&walden.repository(), id_of(&healed));
    let data = opened.restore(cluster.scratch(), "healed");
    verify_backup(&cluster, &data);
    cluster.archive_wal();
    let copy = recover(&walden, 15, &data, &cluster.scratch().folder("run-healed"));
    Checksums::of(&cluster).assert_same(&Checksums::of(&copy));
    drop(copy);
    let next = walden.json(&["backup"]);
    assert_eq!(next["pages_stored_again"], 0, "{next}");
    cluster.stop(Stop::Fast);
}

/// Returns the file in which a host remembers the last basebackup.
fn state_of(cluster: &Cluster) -> PathBuf {
    let folder = cluster.scratch().path().join("walden/state/basebackups");
    let site = fs::read_dir(&folder).unwrap().next().unwrap().unwrap().path();
    let files = fs::read_dir(site).unwrap().map(|entry| entry.unwrap().path());
    files.into_iter().find(|path| path.extension().is_some_and(|it| it == "pages")).expect("a state is there")
}

fn reason(walden: &Walden, options: &[&str]) -> String {
    let outcome = walden.json(&[&["backup"][..], options].concat());
    assert_eq!(outcome["parent"], Value::Null, "{outcome}");
    outcome["full_because"].as_str().unwrap_or_else(|| panic!("{outcome}")).to_owned()
}

#[test]
fn why_a_basebackup_is_full_is_said() {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    let said = |options: &[&str], expected: &str| {
        let said = reason(&walden, options);
        assert!(said.contains(expected), "{said}, not {expected}");
        let text = walden.json(&["backup"]);
        assert_ne!(text["parent"], Value::Null, "the one after it is incremental: {text}");
    };
    said(&[], "this host remembers no basebackup");
    said(&["--full"], "as asked for");
    let text = walden.run(&["backup", "--full"]).stdout;
    assert!(text.contains("full: as asked for"), "{text}");

    let state = state_of(&cluster);
    let mut bytes = fs::read(&state).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&state, bytes).unwrap();
    said(&[], "is damaged");
    fs::remove_file(state_of(&cluster)).unwrap();
    said(&[], "this host remembers no basebackup");

    let outcome = |id: &str| walden.repository().join("main/basebackups").join(id).join("backup.json");
    let id = walden.json(&["backup"])["id"].as_str().unwrap().to_owned();
    fs::remove_file(outcome(&id)).unwrap();
    said(&[], &format!("basebackup {id} is not complete"));
    let id = walden.json(&["backup"])["id"].as_str().unwrap().to_owned();
    let mut record = fs::read(outcome(&id)).unwrap();
    record.push(b'\n');
    fs::write(outcome(&id), record).unwrap();
    said(&[], &format!("basebackup {id} cannot be built upon"));
    let id = walden.json(&["backup"])["id"].as_str().unwrap().to_owned();
    let expired = outcome(&id).with_file_name("expired");
    fs::write(&expired, "{}").unwrap();
    Account::of_postgresql().own(&expired);
    said(&[], &format!("basebackup {id} has expired"));

    cluster.stop(Stop::Fast);
    let checksums = cluster.bin_directory().join("pg_checksums");
    let data = cluster.data_directory().to_owned();
    Run::of(Account::of_postgresql().command(checksums).args(["--disable", "-D"]).arg(data), "")
        .expect_success();
    cluster.start();
    said(&[], "data checksums were switched off");
}

#[test]
fn a_second_basebackup_of_the_site_on_this_host_is_refused_while_one_is_taken() {
    require!(Need::PostgreSQL(15));
    let cluster = Cluster::start(15);
    let walden = archiving(&cluster);
    walden.json(&["backup"]);
    cluster.set_archive_command("/bin/false");
    let unfinished = || walden.json(&["list"])["unfinished"].as_array().unwrap().len();
    // Without an archive it waits for WAL behind the copy.
    let mut child = walden.command().arg("backup").spawn().unwrap();
    wait_for("the attempt to begin", || (unfinished() > 0).then_some(()));
    let refused = walden.try_run(&["backup"]).expect_code(1);
    assert!(refused.stderr.contains("another basebackup of this site is being taken"), "{}", refused.stderr);
    Run::of(Command::new("kill").args(["-KILL", &child.id().to_string()]), "").expect_success();
    child.wait().unwrap();
    // What the killed one left is neither in the way nor believed.
    cluster.set_archive_command(&walden.archive_command());
    let outcome = walden.json(&["backup"]);
    assert_ne!(outcome["parent"], Value::Null, "{outcome}");
}

/// From 17 on the server can say which blocks have changed, whatever happened to the ctimes.
#[test]
fn wal_summaries_spare_reading_files_whose_ctime_is_new() {
    require!(Need::PostgreSQL(18));
    let options = Options::default().setting("summarize_wal", "on");
    let mut cluster = Cluster::start_with(18, options);
    Pgbench::initialize(&cluster, 5);
    cluster.sql("vacuum freeze; checkpoint");
    let walden = archiving(&cluster);
    walden.json(&["backup"]);
    cluster.sql("create table t as select n, md5(n::text) from generate_series(1, 10000) n");
    cluster.sql("update pgbench_tellers set tbalance = 7");
    for file in ["pgbench_accounts", "pgbench_accounts_pkey", "pgbench_branches"] {
        let path =
            cluster.data_directory().join(cluster.sql(&format!("select pg_relation_filepath('{file}')")));
        let open = fs::OpenOptions::new().write(true).open(path).unwrap();
        open.set_modified(SystemTime::now()).unwrap();
    }
    settle();
    let outcome = walden.json(&["backup"]);
    let accounts: u64 = cluster.sql("select pg_relation_size('pgbench_accounts')").parse().unwrap();
    assert!(number(&outcome, "read_bytes") < accounts, "{outcome}");
    let data = Opened::open(&walden.repository(), id_of(&outcome)).restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    cluster.archive_wal();
    let copy = recover(&walden, 18, &data, &cluster.scratch().folder("run-copy"));
    Checksums::of(&cluster).assert_same(&Checksums::of(&copy));
    drop(copy);
    cluster.stop(Stop::Fast);
}

/// Failure 17: what a kill leaves is gone on with, or stays unfinished; never is it half a basebackup that looks whole.
fn a_full_basebackup_that_was_killed_is_gone_on_with(archiving: fn(&Cluster) -> Walden) {
    require!(Need::PostgreSQL(15));
    let mut cluster = Cluster::start(15);
    // Bytes that do not compress, so that a pack is full soon, in files of 50 MB: one is gone on with when it was read whole.
    for table in 1..=8 {
        cluster.sql(&format!(
            "create table large{table} (n int, text bytea);
            alter table large{table} alter text set storage external;
            insert into large{table} select n, (select string_agg(sha512(({table}00000000 + n * 1000 + k)::text::bytea), '')
                from generate_series(1, 64) k) from generate_series(1, 12500) n"
        ));
    }
    cluster.sql("checkpoint");
    let walden = archiving(&cluster);
    let basebackups = walden.repository().join("main/basebackups");
    let mut child = walden.command().arg("backup").spawn().unwrap();
    // When the fourth pack is there, the store has acknowledged the first.
    wait_for("packs", || (basebackups.exists() && packs_below(&basebackups).len() > 3).then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
    let unfinished = walden.json(&["list"])["unfinished"].clone();
    let [killed] = &unfinished.as_array().unwrap()[..] else { panic!("{unfinished}") };
    cluster.sql("update large1 set n = -n where n % 1000 = 0; checkpoint");
    let outcome = walden.json(&["backup"]);
    assert_eq!(&outcome["parent"], killed, "{outcome}");
    assert!(number(&outcome, "reused_chunks") > 300, "{outcome}");
    assert!(number(&outcome, "stored_bytes") < number(&outcome, "live_bytes"), "{outcome}");
    let data = Opened::open(&walden.repository(), id_of(&outcome)).restore(cluster.scratch(), "copy");
    verify_backup(&cluster, &data);
    cluster.archive_wal();
    let copy = recover(&walden, 15, &data, &cluster.scratch().folder("run-copy"));
    Checksums::of(&cluster).assert_same(&Checksums::of(&copy));
    drop(copy);
    // And it is a parent like any other.
    let next = walden.json(&["backup"]);
    assert_eq!(next["parent"], outcome["id"], "{next}");
    cluster.stop(Stop::Fast);
}

#[test]
fn failure_17_a_full_basebackup_that_was_killed_while_it_copied_is_gone_on_with() {
    a_full_basebackup_that_was_killed_is_gone_on_with(archiving);
}

/// There the files come in the server's order, into two packs side by side.
#[test]
fn failure_17_a_full_basebackup_that_was_killed_while_the_server_sent_it_is_gone_on_with() {
    a_full_basebackup_that_was_killed_is_gone_on_with(by_replication::archiving);
}
