//! A server that is shut down while it is backed up: it ends, the backup fails and says why, and the next one is good.

use std::fs::{self, File};
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use crate::site::Faulted;
use crate::support::{Need, Stop, require, wait_for};

/// A backup on its way, with what it says.
struct BackingUp(Child);

impl BackingUp {
    fn start(site: &Faulted, options: &[&str]) -> Self {
        let mut command = site.walden.command();
        command.arg("backup").args(options);
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// Waits for its end, which has to be a failure, and returns what it said.
    #[track_caller]
    fn failure(mut self) -> String {
        let status = wait_for("the backup to end", || self.0.try_wait().unwrap());
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(matches!(status.code(), Some(1 | 4)), "{status}: {text}");
        text
    }
}

impl Drop for BackingUp {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the server has done a statement that begins or ends a backup, by its log.
fn wait_until_done(site: &Faulted, function: &str) {
    // Parsing it is logged as well, when it has not been done yet.
    let line =
        |line: &str| line.contains("duration: ") && line.contains("execute") && line.contains(function);
    wait_for(&format!("{function} to be done"), || site.log().lines().any(line).then_some(()));
}

/// A large file that takes no room, so that there is time to stop the server while it is being copied.
fn large_file(site: &Faulted) {
    let path = site.data_directory().join("base/large");
    File::create(&path).unwrap().set_len(256 << 30).unwrap();
    site.scratch().account().own(&path);
}

/// Files of which each is sent at one go: a walsender looks around between two.
fn many_files(site: &Faulted) -> Vec<PathBuf> {
    let paths: Vec<PathBuf> =
        (0..256).map(|n| site.data_directory().join(format!("base/large.{n}"))).collect();
    for path in &paths {
        File::create(path).unwrap().set_len(1 << 30).unwrap();
        site.scratch().account().own(path);
    }
    paths
}

/// Failure 20, while the files are copied and while the server begins: with its sessions the backup ends.
#[test]
fn failure_20_a_server_that_is_shut_down_ends_and_the_backup_fails() {
    require!(Need::PostgreSQL(15));
    let mut site = Faulted::start(|_, site| site);
    site.archive();
    site.sql("alter system set log_min_duration_statement = 0");
    site.sql("select pg_reload_conf()");
    let begins = BackingUp::start(&site, &["--checkpoint", "spread"]);
    let beginning = "select count(*) from pg_stat_activity where state = 'active' and query like '%pg_backup_start%' \
        and pid <> pg_backend_pid()";
    wait_for("the backup to begin", || (site.sql(beginning) == "1").then_some(()));
    site.cluster.stop(Stop::Fast);
    let said = begins.failure();
    assert!(said.contains("shutdown") || said.contains("terminating connection"), "{said}");

    large_file(&site);
    site.cluster.start();
    let copies = BackingUp::start(&site, &[]);
    wait_until_done(&site, "pg_backup_start");
    site.cluster.stop(Stop::Fast);
    let said = copies.failure();
    assert!(said.contains("terminating connection"), "{said}");

    fs::remove_file(site.data_directory().join("base/large")).unwrap();
    site.cluster.start();
    assert_eq!(site.listed(), Vec::<String>::new());
    site.walden.run(&["backup"]);
    site.assert_restores(&site.listed()[0]);
}

/// Failure 20 where the server sends the files, while it begins and while it sends: a walsender that nobody listens to any
/// more does not keep it from its end.
#[test]
fn failure_20_a_server_that_is_shut_down_while_it_sends_ends_and_the_backup_fails() {
    require!(Need::PostgreSQL(15));
    let mut site = Faulted::start(|_, site| site.key("backup_source = \"replication\""));
    site.archive();
    let in_phase = |site: &Faulted, phase: &str| {
        let phases = format!("select count(*) from pg_stat_progress_basebackup where phase = '{phase}'");
        wait_for(phase, || (site.sql(&phases) == "1").then_some(()));
    };
    let begins = BackingUp::start(&site, &["--checkpoint", "spread"]);
    in_phase(&site, "waiting for checkpoint to finish");
    site.cluster.stop(Stop::Fast);
    let said = begins.failure();
    assert!(said.contains("shutdown") || said.contains("terminating connection"), "{said}");

    let files = many_files(&site);
    site.cluster.start();
    let sends = BackingUp::start(&site, &[]);
    in_phase(&site, "streaming database files");
    site.cluster.stop(Stop::Fast);
    let said = sends.failure();
    assert!(said.contains("terminating connection"), "{said}");

    files.iter().for_each(|path| fs::remove_file(path).unwrap());
    site.cluster.start();
    assert_eq!(site.listed(), Vec::<String>::new());
    site.walden.run(&["backup"]);
    site.assert_restores(&site.listed()[0]);
}

/// Failure 20 of a standalone basebackup, whose session keeps WAL by a slot: neither does that keep the server.
#[test]
fn failure_20_a_server_that_is_shut_down_ends_and_the_standalone_backup_fails() {
    require!(Need::PostgreSQL(15));
    let mut site = Faulted::start(|_, site| site);
    site.archive();
    site.sql("alter system set log_min_duration_statement = 0");
    site.sql("select pg_reload_conf()");
    large_file(&site);
    let copies = BackingUp::start(&site, &["--standalone"]);
    wait_until_done(&site, "pg_backup_start");
    site.cluster.stop(Stop::Fast);
    let said = copies.failure();
    assert!(said.contains("terminating connection"), "{said}");

    fs::remove_file(site.data_directory().join("base/large")).unwrap();
    site.cluster.start();
    assert_eq!(site.sql("select count(*) from pg_replication_slots"), "0");
    assert_eq!(site.listed(), Vec::<String>::new());
    site.walden.run(&["backup", "--standalone"]);
    site.assert_restores(&site.listed()[0]);
}

/// Failure 20 as it was seen: the end of a backup waited for an archive that nothing could reach any more.
#[test]
fn failure_20_a_server_whose_archive_fails_can_be_shut_down_while_a_backup_waits_for_it() {
    require!(Need::PostgreSQL(15));
    let mut site = Faulted::start(|_, site| site);
    site.archive();
    site.sql("alter system set log_min_duration_statement = 0");
    site.set_archive_command("false");
    let waits = BackingUp::start(&site, &["--wal-timeout", "10"]);
    wait_until_done(&site, "pg_backup_stop");
    site.cluster.stop(Stop::Fast);
    let said = waits.failure();
    assert!(said.contains("archive"), "{said}");

    site.cluster.start();
    assert_eq!(site.listed(), Vec::<String>::new());
    site.archive();
    site.walden.run(&["backup"]);
    site.assert_restores(&site.listed()[0]);
}
