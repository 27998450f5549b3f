//! What a test needs from the machine, and what happens when it is not there.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::test_store::{StoreKind, report};

/// Something a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// `/dev/fuse`, and `fusermount3` where not root.
    Fuse,
    /// The server binaries of a major version, and psql and pgbench of any.
    PostgreSQL(u32),
    /// `pg_createcluster`, which wants root.
    DebianCluster,
    /// A program of that name.
    Program(&'static str),
    /// A repository that the binary itself keeps in a folder, in a run of the tests that keeps none in S3.
    Folder,
    /// The rights of root: loop mounts, dropped caches, other owners.
    Root,
}

impl Need {
    /// Says what is missing, or nothing.
    fn missing(self) -> Option<String> {
        match self {
            Self::Fuse if !Path::new("/dev/fuse").exists() => Some("/dev/fuse".into()),
            Self::Fuse if !is_root() && program("fusermount3").is_none() => {
                Some("fusermount3 (package fuse3)".into())
            }
            Self::PostgreSQL(major) if bin_directory(major).is_none() => Some(format!("PostgreSQL {major}")),
            Self::PostgreSQL(_) if program("psql").is_none() => Some("psql (package postgresql-15)".into()),
            Self::DebianCluster if !is_root() => Some("root, for pg_createcluster".into()),
            Self::DebianCluster if program("pg_createcluster").is_none() => Some("pg_createcluster".into()),
            Self::Program(name) if program(name).is_none() => Some(name.into()),
            Self::Root if !is_root() => Some("root".into()),
            _ => None,
        }
    }
}

/// Says on the runner's standard error which needs are not met; fails where `CI` is set.
pub fn unmet(needs: &[Need]) -> bool {
    if needs.contains(&Need::Folder) && StoreKind::of_this_run() != StoreKind::File {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let why = "it is about a repository in a folder, and this run keeps them in S3";
        shout(&format!("SKIPPED {test}: {why}\n"));
        report("inapplicable", why);
        return true;
    }
    let Some(missing) = missing(needs, std::env::var_os("CI").is_some()) else { return false };
    report("inapplicable", &format!("this machine has no {missing}"));
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    shout(&format!("SKIPPED {test}: this machine has no {missing}; scripts/install test gets what it can\n"));
    true
}

/// Lists the needs that are not met; under CI it fails instead.
pub fn missing(needs: &[Need], ci: bool) -> Option<String> {
    let missing: Vec<String> = needs.iter().filter_map(|need| need.missing()).collect();
    let list = missing.join(", ");
    assert!(missing.is_empty() || !ci, "under CI nothing may be missing, but there is no {list}");
    (!missing.is_empty()).then_some(list)
}

/// Writes where a person looks: nextest keeps the output of a test that passes to itself, so its own is used.
fn shout(message: &str) {
    let runner = format!("/proc/{}/fd/2", nix::unistd::getppid());
    let told = OpenOptions::new().append(true).open(runner).and_then(|mut f| f.write_all(message.as_bytes()));
    if told.is_err() {
        eprint!("{message}");
    }
}

/// Says whether the test runs as root.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Finds the server binaries of a major version: Debian's, or those `scripts/install` took from npm.
pub fn bin_directory(major: u32) -> Option<PathBuf> {
    let installed = caches().map(|cache| cache.join(format!("postgresql/{major}/bin")));
    let mut candidates =
        std::iter::once(PathBuf::from(format!("/usr/lib/postgresql/{major}/bin"))).chain(installed);
    candidates.find(|bin| bin.join("postgres").exists())
}

/// Lists where `scripts/install` puts what Debian does not have: root's cache and the caller's own.
fn caches() -> impl Iterator<Item = PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), PathBuf::from);
    [PathBuf::from("/var/cache/walden"), cache.join("walden")].into_iter()
}

/// Finds a program among Debian's PostgreSQL programs, on the path, or with moto.
///
/// The path comes second: there Debian's psql is a script that looks at all clusters first, and fails on one that
/// another test is just making.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = vec!["/usr/lib/postgresql/15/bin".into()];
    folders.extend(std::env::split_paths(&path));
    folders.push("/usr/sbin".into());
    folders.extend(caches().map(|cache| cache.join("moto/bin")));
    folders
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|file| fs::metadata(file).is_ok_and(|m| m.is_file()))
}
