//! A cluster as Debian makes it: `pg_createcluster`, with the configuration in `/etc`, outside the data directory.

use std::fs;
use std::net::TcpListener;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::needs::program;
use super::{Run, Sql};

const MAJOR: &str = "15";
const PREFIX: &str = "waldentest";
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A running cluster that is dropped, with its configuration and log, when it goes out of scope.
#[derive(Debug)]
pub struct DebianCluster {
    name: String,
    sql: Sql,
}

impl Deref for DebianCluster {
    type Target = Sql;

    fn deref(&self) -> &Sql {
        &self.sql
    }
}

impl DebianCluster {
    /// Creates and starts a cluster with lines added to its `postgresql.conf`.
    #[track_caller]
    pub fn start(settings: &[(&str, &str)]) -> Self {
        drop_clusters_of_dead_tests();
        let name = format!("{PREFIX}{}x{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut create = Command::new(program("pg_createcluster").expect("the test required it"));
        create.args([
            "--port",
            &port.to_string(),
            "--start-conf",
            "manual",
            "-o",
            "fsync=off",
            "-o",
            "archive_mode=on",
        ]);
        for (setting, value) in settings {
            create.arg("-o").arg(format!("{setting}={value}"));
        }
        Run::of(create.args([MAJOR, &name, "--", "--data-checksums", "--no-sync"]), "").expect_success();
        let cluster = Self { sql: Sql::at(Path::new("/var/run/postgresql"), port), name };
        // Peer authentication would ask the test to be user postgres.
        let trust = "local all all trust\nlocal replication all trust\n";
        fs::write(cluster.configuration_directory().join("pg_hba.conf"), trust).unwrap();
        cluster.control("start");
        cluster
    }

    /// Runs an action of `pg_ctlcluster`: start, stop, restart, reload.
    #[track_caller]
    pub fn control(&self, action: &str) {
        self.try_control(action).expect_success();
    }

    /// Runs an action of `pg_ctlcluster`, whatever comes of it.
    pub fn try_control(&self, action: &str) -> Run {
        let mut command = Command::new(program("pg_ctlcluster").expect("it comes with pg_createcluster"));
        command.args(["--skip-systemctl-redirect", MAJOR, &self.name, action]);
        Run::of(&mut command, "")
    }

    /// Returns where `postgresql.conf`, `pg_hba.conf` and `conf.d` are.
    pub fn configuration_directory(&self) -> PathBuf {
        Path::new("/etc/postgresql").join(MAJOR).join(&self.name)
    }

    /// Returns the data directory.
    pub fn data_directory(&self) -> PathBuf {
        Path::new("/var/lib/postgresql").join(MAJOR).join(&self.name)
    }
}

impl Drop for DebianCluster {
    fn drop(&mut self) {
        drop_cluster(&self.name);
    }
}

fn drop_cluster(name: &str) {
    if let Some(program) = program("pg_dropcluster") {
        let dropped = Run::of(Command::new(program).args(["--stop", MAJOR, name]), "");
        if !dropped.success() {
            eprintln!("pg_dropcluster {MAJOR} {name}: {}", dropped.stderr);
        }
    }
}

/// Drops what a test that was killed could not: the name says whose it was.
fn drop_clusters_of_dead_tests() {
    let clusters = fs::read_dir(Path::new("/etc/postgresql").join(MAJOR)).into_iter().flatten().flatten();
    for name in clusters.filter_map(|entry| entry.file_name().into_string().ok()) {
        let Some((pid, _)) = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('x')) else {
            continue;
        };
        if !Path::new("/proc").join(pid).exists() {
            drop_cluster(&name);
        }
    }
}
