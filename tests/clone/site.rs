//! A source with a repository that archives, and clones of it as a test holds them.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Deref;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{Chaos, Options, Run, Sql, Walden, bin_directory, wait_for};

pub use crate::support::Source;

impl Source {
    /// Starts a cluster that archives with `walden wal push`.
    #[track_caller]
    pub fn start(options: Options) -> Self {
        Self::start_major(15, options)
    }

    #[track_caller]
    pub fn start_major(major: u32, options: Options) -> Self {
        let source = Self::configured(major, options, |_, site| site);
        source.archive();
        source
    }

    /// Takes a basebackup while everything moves; returns the last commit that was acknowledged.
    #[track_caller]
    pub fn backup(&self) -> i64 {
        backup_under_load(self, &self.walden)
    }

    /// Takes a basebackup of a source at rest, where a test names each segment: a load would fill hundreds of them.
    #[track_caller]
    pub fn backup_at_rest(&self) {
        self.walden.run(&["backup"]);
    }

    /// Makes a clone as root where the test is root.
    #[track_caller]
    pub fn clone(&self, name: &str, options: &[&str]) -> Clone {
        Clone::create(&self.walden.as_root(), name, options)
    }

    /// Where clones are.
    pub fn clones(&self) -> PathBuf {
        self.scratch().path().join("walden/clones")
    }

    /// Counts pins that hold a basebackup, and the objects that end them.
    pub fn pins(&self) -> (usize, usize) {
        let files = listing(&self.walden.repository());
        let pins = files.keys().filter(|path| path.iter().any(|part| part == "pins") && path.is_file());
        let (ends, pins): (Vec<_>, Vec<_>) =
            pins.partition(|path| path.extension().is_some_and(|extension| extension == "end"));
        (pins.len(), ends.len())
    }
}

/// Lets the load run before, during and after a basebackup; returns the last acknowledged commit.
#[track_caller]
pub fn backup_under_load(sql: &Sql, walden: &Walden) -> i64 {
    let chaos = Chaos::start(sql);
    chaos.wait_for_churn(1);
    walden.run(&["backup"]);
    chaos.wait_for_churn(1);
    let acknowledged = chaos.finish().acknowledged();
    let sessions = "select count(*) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()";
    wait_for("the sessions of the load to end", || (sql.sql(sessions) == "0").then_some(()));
    acknowledged
}

/// A clone; a test that fails leaves it to its scratch folder.
pub struct Clone {
    pub walden: Walden,
    pub name: String,
    sql: Sql,
}

impl Deref for Clone {
    type Target = Sql;

    fn deref(&self) -> &Sql {
        &self.sql
    }
}

impl Clone {
    #[track_caller]
    pub fn create(walden: &Walden, name: &str, options: &[&str]) -> Self {
        Self::at(walden, &walden.json(&[&["clone", "create", name], options].concat()))
    }

    /// Returns the clone that a status is of.
    #[track_caller]
    pub fn at(walden: &Walden, status: &Value) -> Self {
        let port = u16::try_from(status["port"].as_u64().unwrap()).unwrap();
        let sql = Sql::at(Path::new(status["socket_directory"].as_str().unwrap()), port);
        Self { walden: walden.clone(), name: status["name"].as_str().unwrap().to_owned(), sql }
    }

    /// Names a clone that may not be there.
    pub fn named(walden: &Walden, name: &str, sql: Sql) -> Self {
        Self { walden: walden.clone(), name: name.to_owned(), sql }
    }

    #[track_caller]
    pub fn status(&self) -> Value {
        self.walden.json(&["clone", "status", &self.name])
    }

    #[track_caller]
    pub fn state(&self) -> String {
        self.status()["state"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub fn run(&self, action: &str) {
        self.walden.run(&["clone", action, &self.name]);
    }

    /// The processes of the clone: its supervisor and its postmaster.
    #[track_caller]
    pub fn processes(&self) -> [Pid; 2] {
        let status = self.status();
        ["supervisor_pid", "server_pid"]
            .map(|field| Pid::from_raw(i32::try_from(status[field].as_i64().unwrap()).unwrap()))
    }

    /// Checks every heap and index of the clone by PostgreSQL's own program, which knows 14 and later.
    #[track_caller]
    pub fn amcheck(&self) {
        let bin = bin_directory(15).expect("the test required it");
        let mut amcheck = Command::new(bin.join("pg_amcheck"));
        amcheck.args(["--all", "--install-missing", "--heapallindexed", "-h"]).arg(&self.host);
        amcheck.args(["-p", &self.port.to_string(), "-U", "postgres"]);
        Run::of(&mut amcheck, "").expect_success();
    }

    /// The clone's folder.
    pub fn folder(&self) -> PathBuf {
        self.sql.host.parent().unwrap().to_owned()
    }

    /// Kills one of its processes and waits until nothing of it runs.
    #[track_caller]
    pub fn kill(&self, process: Pid) {
        let folder = self.folder().display().to_string();
        let all = self.processes();
        kill(process, Signal::SIGKILL).unwrap();
        wait_for("supervisor and postmaster to end", || (!all.into_iter().any(is_alive)).then_some(()));
        wait_for("the clone's processes to end", || servers_of(&folder).is_empty().then_some(()));
    }
}

/// Whether a process runs; one that only waits to be collected does not.
pub fn is_alive(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

/// Servers and supervisors that name a folder: in the command line, the title of the process, or as their directory.
pub fn servers_of(folder: &str) -> Vec<String> {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let processes = processes.filter(|path| path.join("stat").exists());
    let of = |path: &PathBuf| {
        let command = fs::read(path.join("cmdline")).unwrap_or_default();
        let directory = fs::read_link(path.join("cwd")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let names = command.contains(folder) || directory.to_string_lossy().contains(folder);
        names.then(|| format!("{}: {command}", path.display()))
    };
    processes.filter_map(|path| of(&path)).collect()
}

/// What is below a folder: name to mode, size, time of change and content.
pub type Listing = BTreeMap<PathBuf, (u32, u64, i64, Vec<u8>)>;

pub fn listing(folder: &Path) -> Listing {
    let mut found = Listing::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().flatten() {
            let path = entry.path();
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            let content = if metadata.is_file() { fs::read(&path).unwrap_or_default() } else { Vec::new() };
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            let changed = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
            found.insert(path, (metadata.permissions().mode(), metadata.len(), changed, content));
        }
    }
    found
}

/// Fails with the names of what is not the same.
#[track_caller]
pub fn assert_unchanged(before: &Listing, folder: &Path) {
    let after = listing(folder);
    let names = before.keys().chain(after.keys());
    let changed: Vec<_> = names.filter(|name| before.get(*name) != after.get(*name)).collect();
    assert!(changed.is_empty(), "these have changed: {changed:?}");
}
